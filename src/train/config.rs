//! What the trainer is told: flags and TOML fill the same structs, and the patch stores them.

use super::answer_loss::AnswerLoss;
use super::engine::Aim;
use super::layers::Layers;
use super::loss::RowObjective;
use super::trainer::Forget;
use crate::error::Error;
use crate::project::RolNorm;
use crate::subspace::SubspaceConfig;
use serde::{Deserialize, Serialize};

/// How the forget set is unlearned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Inverted hinge loss.
    #[default]
    Ihl,
    /// Gradient difference: ascent on the forget set, descent on the retain set.
    Gd,
    /// Gradient ascent on the forget set and nothing else, not even a retain loss.
    Ga,
    /// Negative preference optimisation (Zhang et al., arXiv 2404.05868).
    Npo,
    /// NPO per token and without a reference model (Fan et al., arXiv 2410.07163).
    Simnpo,
    /// Direct preference optimisation towards a refusal (the DPO of Maini et al.,
    /// arXiv 2401.06121, and of the NPO paper).
    Dpo,
}

impl Objective {
    /// Whether the loss is one of whole answers (a mean over samples) rather than of rows (a mean
    /// over answer tokens).
    pub fn is_whole(self) -> bool {
        matches!(self, Self::Npo | Self::Simnpo | Self::Dpo)
    }

    /// Whether it looks at the untouched model.
    pub fn has_reference(self) -> bool {
        matches!(self, Self::Npo | Self::Dpo)
    }

    /// Whether the retain set is trained on.
    pub fn has_retain(self) -> bool {
        self != Self::Ga
    }
}

/// How an adapter starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// Representation-guided: B0 spans what sets the forget set apart (ReGLU, section 3).
    #[default]
    Rila,
    /// Plain LoRA: A random, B zero (Hu et al., arXiv 2106.09685).
    Lora,
}

/// What keeps the update off the retain basis P.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Constraint {
    /// The representation-orthogonal loss, a penalty (ReGLU, section 3).
    Rol,
    /// The net update has no part in P at any step: B0 is found, and B is kept, within the
    /// complement of P.
    #[default]
    Project,
    /// Nothing.
    None,
}

/// Settings of training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Loss on the forget set.
    pub objective: Objective,
    /// How adapters start.
    pub init: Init,
    /// What protects the retain set's representations.
    pub constraint: Constraint,
    /// α of LoRA; the adapter's scale is s = α / rank.
    pub alpha: f32,
    /// Peak learning rate.
    pub lr: f32,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f32,
    /// Forget samples, and as many retain samples, per micro-step.
    pub batch: usize,
    /// Micro-steps per optimiser step.
    pub accumulate: usize,
    /// Fixed number of optimiser steps; the stop rule is then off.
    pub steps: Option<usize>,
    /// Fixed number of passes over the forget set; the stop rule is then off.
    pub epochs: Option<f32>,
    /// Warm-up steps (none: one pass over the forget set, at most a tenth of the steps).
    pub warmup: Option<usize>,
    /// Global gradient norm above which gradients are scaled down; 0: never.
    pub clip: f32,
    /// γ, weight of the retain loss.
    pub gamma: f32,
    /// β of NPO.
    pub npo_beta: f32,
    /// β of SimNPO.
    pub simnpo_beta: f32,
    /// γ of SimNPO, a margin (some call it δ).
    pub simnpo_gamma: f32,
    /// β of DPO.
    pub dpo_beta: f32,
    /// λ, weight of ROL.
    pub lambda: f32,
    /// How ROL is summed.
    pub rol: RolNorm,
    /// Share of adapter inputs dropped in training.
    pub dropout: f32,
    /// Seed of data order, adapters and dropout.
    pub seed: u64,
    /// Layers that are adapted (none: all).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Longer samples are cut to this many tokens.
    pub max_tokens: usize,
    /// Tokens computed at a time: bounds the memory of activations, changes no result but for
    /// the order of sums.
    pub micro_tokens: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            objective: Objective::Ihl,
            init: Init::Rila,
            constraint: Constraint::Project,
            alpha: 64.0,
            lr: 1e-4,
            weight_decay: 0.01,
            batch: 4,
            accumulate: 1,
            steps: None,
            epochs: None,
            warmup: None,
            clip: 1.0,
            gamma: 1.0,
            // Of the papers' TOFU experiments.
            npo_beta: 0.1,
            simnpo_beta: 2.5,
            simnpo_gamma: 0.0,
            dpo_beta: 0.1,
            lambda: 0.5,
            rol: RolNorm::PerRank,
            dropout: 0.0,
            seed: 42,
            layers: None,
            max_tokens: 512,
            micro_tokens: 256,
        }
    }
}

impl TrainConfig {
    /// Refuses settings outside their range.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first bad one.
    pub fn validate(&self) -> Result<(), Error> {
        let positive = |setting, value: f32| {
            in_range(
                setting,
                value,
                f32::MIN_POSITIVE,
                f32::MAX,
                "a number above 0",
            )
        };
        let weight =
            |setting, value: f32| in_range(setting, value, 0.0, f32::MAX, "a number, 0 or above");
        positive("alpha", self.alpha)?;
        positive("lr", self.lr)?;
        weight("weight-decay", self.weight_decay)?;
        weight("clip", self.clip)?;
        weight("gamma", self.gamma)?;
        positive("npo-beta", self.npo_beta)?;
        positive("simnpo-beta", self.simnpo_beta)?;
        weight("simnpo-gamma", self.simnpo_gamma)?;
        positive("dpo-beta", self.dpo_beta)?;
        weight("lambda", self.lambda)?;
        in_range(
            "dropout",
            self.dropout,
            0.0,
            1f32.next_down(),
            "a number from 0 to below 1",
        )?;
        if let Some(epochs) = self.epochs {
            positive("epochs", epochs)?;
        }
        at_least("batch", self.batch, 1)?;
        at_least("accumulate", self.accumulate, 1)?;
        at_least("steps", self.steps.unwrap_or(1), 1)?;
        at_least("max-tokens", self.max_tokens, 8)?;
        at_least("micro-tokens", self.micro_tokens, 32)?;
        if self.steps.is_some() && self.epochs.is_some() {
            return Err(Error::Setting {
                setting: "epochs",
                wanted: "either --steps or --epochs".into(),
                found: "both".into(),
            });
        }
        Ok(())
    }

    /// What a forget sample is trained towards.
    pub fn aim<'a>(&self, forget: &Forget<'a>) -> Aim<'a> {
        let preference = |beta: f32| AnswerLoss::Preference {
            beta: beta.into(),
            reference: forget.reference,
        };
        let loss = match self.objective {
            Objective::Ihl => return Aim::Rows(RowObjective::InvertedHinge),
            Objective::Gd | Objective::Ga => return Aim::Rows(RowObjective::Ascent),
            Objective::Npo => preference(self.npo_beta),
            Objective::Dpo => preference(self.dpo_beta),
            Objective::Simnpo => AnswerLoss::Normalised {
                beta: self.simnpo_beta.into(),
                gamma: self.simnpo_gamma.into(),
            },
        };
        Aim::Answer {
            loss,
            preferred: forget.preferred,
        }
    }

    /// Samples of each set in one optimiser step.
    pub fn step_samples(&self) -> usize {
        self.batch * self.accumulate
    }

    /// Steps when they are fixed by hand, for `n_forget` samples.
    pub fn fixed_steps(&self, n_forget: usize) -> Option<usize> {
        let per_epoch = n_forget as f32 / self.step_samples() as f32;
        self.steps.or_else(|| {
            self.epochs
                .map(|e| (e * per_epoch).ceil().max(1.0) as usize)
        })
    }
}

fn in_range(
    setting: &'static str,
    value: f32,
    low: f32,
    high: f32,
    wanted: &str,
) -> Result<(), Error> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(Error::Setting {
        setting,
        wanted: wanted.into(),
        found: value.to_string(),
    })
}

fn at_least(setting: &'static str, value: usize, least: usize) -> Result<(), Error> {
    if value >= least {
        return Ok(());
    }
    Err(Error::Setting {
        setting,
        wanted: format!("at least {least}"),
        found: value.to_string(),
    })
}

/// When training ends. METHOD: the number of steps decides between forgetting and
/// over-forgetting, so the forget set's own answers are watched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StopConfig {
    /// Mean answer NLL (nats per token) that counts as unseen; none: measured, as `factor` times
    /// the NLL of the forget prompts with each other's answers, before training.
    pub nll: Option<f64>,
    /// See `nll`; none: from how well the forget set is known ([`crate::unseen`]).
    pub factor: Option<f64>,
    /// Steps between checks of the forget set.
    pub check_every: usize,
    /// Forget samples in a check (spread over the set).
    pub check_samples: usize,
    /// Steps of linear decay once the level is reached, in which the retain set recovers.
    pub settle: usize,
    /// Training never takes more steps than this.
    pub max_steps: usize,
}

impl Default for StopConfig {
    fn default() -> Self {
        Self {
            nll: None,
            factor: None,
            check_every: 4,
            check_samples: 64,
            settle: 12,
            max_steps: 200,
        }
    }
}

impl StopConfig {
    /// Refuses settings outside their range.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first bad one.
    pub fn validate(&self) -> Result<(), Error> {
        at_least("check-every", self.check_every, 1)?;
        at_least("check-samples", self.check_samples, 1)?;
        at_least("max-steps", self.max_steps, 1)?;
        if let Some(factor) = self.factor {
            in_range(
                "factor",
                factor as f32,
                0.1,
                10.0,
                "a number from 0.1 to 10",
            )?;
        }
        if let Some(nll) = self.nll {
            in_range(
                "until",
                nll as f32,
                0.01,
                50.0,
                "a number of nats from 0.01 to 50",
            )?;
        }
        Ok(())
    }
}

/// Everything `unlearn` is told.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UnlearnConfig {
    /// Bases.
    pub subspace: SubspaceConfig,
    /// Training.
    pub train: TrainConfig,
    /// Stopping.
    pub stop: StopConfig,
}

/// Named settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// This program's own defaults
    Default,
    /// The reference's values for TOFU on Phi-1.5
    PaperTofu,
    /// The reference's values for WMDP on Zephyr-7B
    PaperWmdp,
}

impl Preset {
    /// The settings behind the name (METHOD.md's "Hyper-parameters in the reference").
    pub fn config(self) -> UnlearnConfig {
        let mut config = UnlearnConfig::default();
        let paper = TrainConfig {
            constraint: Constraint::Rol,
            rol: RolNorm::Reference,
            lambda: 0.5,
            alpha: 64.0,
            ..TrainConfig::default()
        };
        match self {
            Self::Default => {}
            Self::PaperTofu => {
                config.subspace.beta = 0.7;
                config.train = TrainConfig {
                    objective: Objective::Ihl,
                    lr: 1e-4,
                    epochs: Some(5.0),
                    batch: 4,
                    accumulate: 8,
                    dropout: 0.0,
                    ..paper
                };
            }
            Self::PaperWmdp => {
                config.subspace.beta = 0.5;
                config.train = TrainConfig {
                    objective: Objective::Gd,
                    lr: 1e-5,
                    steps: Some(100),
                    batch: 2,
                    accumulate: 16,
                    dropout: 0.05,
                    ..paper
                };
            }
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_survive_toml() {
        for preset in [Preset::Default, Preset::PaperTofu, Preset::PaperWmdp] {
            let config = preset.config();
            config.train.validate().expect("a preset is valid");
            config.stop.validate().expect("a preset is valid");
            let text = toml::to_string(&config).expect("plain values");
            assert_eq!(
                toml::from_str::<UnlearnConfig>(&text).expect("its own text"),
                config
            );
        }
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let bad = TrainConfig {
            dropout: 1.5,
            ..TrainConfig::default()
        };
        let text = bad.validate().expect_err("out of range").to_string();
        assert!(text.contains("dropout") && text.contains("1.5"), "{text}");
        let nan = TrainConfig {
            lr: f32::NAN,
            ..TrainConfig::default()
        };
        assert!(nan.validate().is_err());
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(toml::from_str::<UnlearnConfig>("[train]\nlearning_rate = 1").is_err());
    }
}
