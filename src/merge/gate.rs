//! The acceptance gate: does the merged file do what model and patch did together?
//!
//! Both are decoded on the same batches ([`super::compare`]). The thresholds, and why they are
//! where they are:
//!
//! - **Kept effect** ≥ 0.9 of the change in forget probability that the patch makes: what a merge
//!   is for. Re-encoding into K-quants keeps 0 to 0.05 of a small update.
//! - **Retain probability** ≥ 0.97 of the unmerged one: a reader does not notice, and noise on
//!   retained outputs shows here before it shows on general text.
//! - **KL on general text** ≤ 0.05, between what Q4_K_M (0.031) and Q4_0 (0.072) cost
//!   Llama-3-8B against f16 (llama.cpp, tools/perplexity/README.md): the merge is not a larger
//!   loss than the format is.
//! - **KL on forget answers** ≤ 0.5: a model without its patch was 2.5 away (Gemma-3-270M, Q4_0),
//!   so a fifth of the patch may be lost in distribution, though not in what it achieves (the
//!   first line).

use super::compare::{Compared, Comparison, Side, TOGETHER};
use super::moments::{Set, Sources};
use crate::data::Sample;
use crate::error::Error;
use crate::likelihood::mean_prob;
use crate::score::{answer_losses, small_scoring_context};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A patch that moves the forget probability by less is not judged by how much of that is kept:
/// the samples' own noise is as large.
const LEAST_EFFECT: f64 = 0.05;

/// Thresholds and how much is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GateConfig {
    /// Least share kept of the patch's change in forget probability.
    pub min_kept_effect: f64,
    /// Least retain probability, as a share of the unmerged one.
    pub min_retain_ratio: f64,
    /// Most KL on forget answers, nats a token.
    pub max_kl_forget: f64,
    /// Most KL on general text, nats a token.
    pub max_kl_general: f64,
    /// Samples of each set, evenly spread over it.
    pub max_samples: usize,
}

impl Default for GateConfig {
    fn default() -> Self {
        Self {
            min_kept_effect: 0.9,
            min_retain_ratio: 0.97,
            max_kl_forget: 0.5,
            max_kl_general: 0.05,
            max_samples: 40,
        }
    }
}

impl GateConfig {
    /// Whether the thresholds can be met at all.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self) -> Result<(), Error> {
        let limits = [
            ("min-kept-effect", self.min_kept_effect),
            ("min-retain-ratio", self.min_retain_ratio),
            ("max-kl-forget", self.max_kl_forget),
            ("max-kl-general", self.max_kl_general),
        ];
        for (setting, value) in limits {
            if !(0.0..f64::INFINITY).contains(&value) {
                return Err(Error::Setting {
                    setting,
                    wanted: "a number, 0 or above".into(),
                    found: value.to_string(),
                });
            }
        }
        if self.max_samples == 0 {
            return Err(Error::Setting {
                setting: "max-samples",
                wanted: "at least 1".into(),
                found: "0".into(),
            });
        }
        Ok(())
    }
}

/// Why a merge is not accepted, or cannot be judged.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum GateError {
    #[error("the merged file does not do what model and patch do: {}", failures.join("; "))]
    Failed { failures: Vec<String> },
    #[error("the merged file: wanted a vocabulary of {wanted} tokens, found {found}")]
    Vocabulary { wanted: usize, found: usize },
    #[error("the gate: wanted samples to compare on, found none")]
    NoSamples,
}

/// What was measured and whether it is enough.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Forget set, if there is one.
    pub forget: Option<Compared>,
    /// Retain set.
    pub retain: Option<Compared>,
    /// General text.
    pub general: Option<Compared>,
    /// Forget probability of the model without patch.
    pub forget_prob_base: Option<f64>,
    /// Share of the patch's change in forget probability that the merged file has; none where
    /// the patch changes too little to tell.
    pub kept_effect: Option<f64>,
    /// Retain probability, merged over unmerged.
    pub retain_ratio: Option<f64>,
    /// One sentence for each threshold that was missed.
    pub failures: Vec<String>,
}

impl Verdict {
    /// Whether the merged file is accepted.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    /// Itself, if the merged file is accepted.
    ///
    /// # Errors
    /// [`GateError::Failed`].
    pub fn accepted(self) -> Result<Self, GateError> {
        if self.passed() {
            return Ok(self);
        }
        Err(GateError::Failed {
            failures: self.failures,
        })
    }

    fn judge(&mut self, config: &GateConfig) {
        let mut fail = |ok: bool, text: String| {
            if !ok {
                self.failures.push(text);
            }
        };
        // Negated comparisons would let NaN pass.
        if let Some(kept) = self.kept_effect {
            let least = config.min_kept_effect;
            fail(
                kept >= least,
                format!("{kept:.3} of the change in forget probability kept, wanted {least}"),
            );
        }
        if let Some(ratio) = self.retain_ratio {
            let least = config.min_retain_ratio;
            fail(
                ratio >= least,
                format!("retain probability {ratio:.3} of the unmerged one, wanted {least}"),
            );
        }
        let sets = [
            ("forget answers", &self.forget, config.max_kl_forget),
            ("general text", &self.general, config.max_kl_general),
        ];
        for (name, compared, most) in sets {
            if let Some(c) = compared {
                fail(
                    c.kl <= most,
                    format!("KL on {name} {:.4}, wanted at most {most}", c.kl),
                );
            }
        }
    }
}

/// Compare the `merged` side with the `unmerged` one and judge it. Sets that are empty are not
/// judged. The merged side may carry adapters of its own (residues beside the file).
///
/// With `apart`, never more than one of the two is open: what a device has room for when the model
/// fills its memory.
///
/// `progress` gets decodes done, in samples, and all of them.
///
/// # Errors
/// Bad settings, models of different vocabularies, no samples at all, llama.cpp's failures. A merged file that
/// does not pass is no error here: see [`Verdict::accepted`].
pub fn gate(
    (unmerged, merged): (Side<'_>, Side<'_>),
    apart: bool,
    sources: &Sources<'_>,
    config: &GateConfig,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Verdict, Error> {
    config.validate()?;
    let chosen = Set::ALL.map(|set| spread(sources.of(set), config.max_samples));
    let n_forget = chosen[0].len();
    let total: usize = chosen.iter().map(Vec::len).sum::<usize>() + n_forget;
    if total == 0 {
        return Err(GateError::NoSamples.into());
    }
    let forget_prob_base = if n_forget > 0 {
        let (model, _) = unmerged()?;
        let longest = chosen[0].iter().map(|s| s.tokens.len()).max().unwrap_or(1);
        let mut context = small_scoring_context(&model, &[], longest, n_threads, TOGETHER)?;
        Some(mean_prob(&answer_losses(
            &mut context,
            &chosen[0],
            &mut |_| {},
        )?))
    } else {
        None
    };
    let mut done = n_forget;
    progress(done, total);
    let mut comparison = Comparison::new(unmerged, merged, apart, n_threads);
    let mut compared = Vec::new();
    for samples in &chosen {
        let one = (!samples.is_empty())
            .then(|| {
                comparison.of(samples, &mut |n| {
                    done += n;
                    progress(done, total);
                })
            })
            .transpose()?;
        compared.push(one);
    }
    let general = compared.pop().flatten();
    let retain = compared.pop().flatten();
    let forget = compared.pop().flatten();
    let kept_effect = forget.as_ref().zip(forget_prob_base).and_then(|(f, base)| {
        let effect = base - f.prob_unmerged;
        (effect.abs() >= LEAST_EFFECT).then(|| (base - f.prob_merged) / effect)
    });
    let retain_ratio = retain.as_ref().map(|r| r.prob_merged / r.prob_unmerged);
    let mut verdict = Verdict {
        forget,
        retain,
        general,
        forget_prob_base,
        kept_effect,
        retain_ratio,
        failures: Vec::new(),
    };
    verdict.judge(config);
    Ok(verdict)
}

/// At most so many of `samples`, evenly spread.
pub fn spread(samples: &[Sample], most: usize) -> Vec<Sample> {
    let n = samples.len().min(most);
    (0..n)
        .map(|i| samples[i * samples.len() / n].clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(kept: f64, retain: f64, kl: f64) -> Vec<String> {
        let compared = Compared {
            samples: 1,
            tokens: 1,
            kl,
            prob_unmerged: 0.5,
            prob_merged: 0.5,
        };
        let mut v = Verdict {
            forget: Some(compared.clone()),
            retain: Some(compared.clone()),
            general: Some(compared),
            forget_prob_base: Some(0.9),
            kept_effect: Some(kept),
            retain_ratio: Some(retain),
            failures: Vec::new(),
        };
        v.judge(&GateConfig::default());
        v.failures
    }

    #[test]
    fn thresholds_that_mean_nothing_are_refused() {
        assert!(GateConfig::default().validate().is_ok());
        for bad in [f64::NAN, -0.1, f64::INFINITY] {
            let config = GateConfig {
                max_kl_general: bad,
                ..GateConfig::default()
            };
            let e = config.validate().expect_err("refused");
            assert!(e.to_string().starts_with("max-kl-general"), "{e}");
        }
    }

    #[test]
    fn every_threshold_fails_alone_and_nan_passes_none() {
        assert!(verdict(0.95, 0.99, 0.01).is_empty());
        assert!(verdict(0.5, 0.99, 0.01)[0].contains("forget probability kept"));
        assert!(verdict(0.95, 0.9, 0.01)[0].contains("retain probability"));
        assert!(verdict(0.95, 0.99, 0.1)[0].contains("general text"));
        assert_eq!(verdict(f64::NAN, f64::NAN, f64::NAN).len(), 4);
    }
}
