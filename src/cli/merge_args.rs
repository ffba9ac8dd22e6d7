//! Flags of `nepenthe merge` that say how to fit, on which texts, and what is accepted.

use crate::data::{Record, Template, load_records};
use crate::error::Error;
use crate::merge::decide::Policy;
use crate::merge::gate::GateConfig;
use crate::merge::run::Texts;
use crate::merge::same_grid::{Options, Rounding};
use clap::Args;
use std::path::{Path, PathBuf};

/// How codes are chosen and what else is allowed.
#[derive(Debug, Args)]
#[group(id = "FitArgs", multiple = true)]
pub struct FitArgs {
    /// How codes are chosen on the grids that are there
    #[arg(long, value_enum, default_value_t = Rounding::Feedback)]
    rounding: Rounding,
    /// What may be done to tensors that their grid does not serve (default: grid, or auto where
    /// the file may grow)
    #[arg(long, value_enum)]
    policy: Option<Policy>,
    /// Let the files grow by this share of the model's size, spent where it helps most
    #[arg(long, value_name = "PERCENT")]
    pub max_growth: Option<f64>,
    /// Write tensors whose type has no grid (IQ and others) in a larger type
    #[arg(long)]
    promote: bool,
    /// Weight of the forget texts against all others
    #[arg(long)]
    lambda: Option<f64>,
    /// Damping of the second moments, as a share of their mean diagonal
    #[arg(long)]
    damping: Option<f64>,
    /// Passes of coordinate descent
    #[arg(long)]
    passes: Option<usize>,
    /// Fit the scales inside the blocks to the chosen codes as well, this many times: more is
    /// kept in the same size, but more than code bits changes
    #[arg(long, value_name = "TIMES", num_args = 0..=1, default_missing_value = "3")]
    refit_scales: Option<usize>,
    /// Correct the merged file this many times: train a small update on it towards what model and
    /// patch say of the texts, and merge that as well
    #[cfg(feature = "train")]
    #[arg(long, value_name = "N", default_value_t = 0)]
    rounds: usize,
}

impl FitArgs {
    /// Corrections.
    pub fn rounds(&self) -> usize {
        #[cfg(feature = "train")]
        return self.rounds;
        #[cfg(not(feature = "train"))]
        return 0;
    }

    /// As the merge takes them.
    pub fn options(&self) -> Options {
        let mut o = Options {
            rounding: self.rounding,
            promote: self.promote,
            ..Options::default()
        };
        o.lambda = self.lambda.unwrap_or(o.lambda);
        o.damping = self.damping.unwrap_or(o.damping);
        o.passes = self.passes.unwrap_or(o.passes);
        o.refits = self.refit_scales.unwrap_or(o.refits);
        o.limits.policy = match (self.policy, self.max_growth) {
            (Some(policy), _) => policy,
            (None, Some(_)) => Policy::Auto,
            (None, None) => Policy::Grid,
        };
        o
    }
}

/// Texts to calibrate and to judge on.
#[derive(Debug, Args)]
pub struct TextArgs {
    /// What the patch forgets
    #[arg(long, value_name = "FILE")]
    forget: Option<PathBuf>,
    /// What it keeps
    #[arg(long, value_name = "FILE")]
    retain: Option<PathBuf>,
    /// Other text the model should go on with as before (default: built-in general text)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    calibrate: Vec<PathBuf>,
    /// Sketch of the second moments (default: the one beside the patch, where no texts are given)
    #[arg(long, value_name = "GGUF")]
    pub sketch: Option<PathBuf>,
    /// Importance matrix of llama-imatrix
    #[arg(long, value_name = "GGUF", conflicts_with = "sketch")]
    pub imatrix: Option<PathBuf>,
    /// Chat template: the model's own, none, or a Jinja file
    #[arg(long, value_name = "gguf|none|FILE", default_value = "gguf")]
    template: String,
    /// Cut samples to this many tokens
    #[arg(long, default_value_t = 512)]
    pub max_tokens: usize,
}

impl TextArgs {
    /// Read all files.
    ///
    /// # Errors
    /// A file that cannot be read or parsed.
    pub fn load(&self) -> Result<Texts, Error> {
        let one = |path: &Option<PathBuf>| -> Result<Vec<Record>, Error> {
            Ok(path.as_deref().map_or(Ok(Vec::new()), load_records)?)
        };
        let mut general = Vec::new();
        for path in &self.calibrate {
            general.extend(load_records(path)?);
        }
        Ok(Texts {
            forget: one(&self.forget)?,
            retain: one(&self.retain)?,
            general,
        })
    }

    /// The template, unless it is the model's own.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn template(&self) -> Result<Option<Template>, Error> {
        Ok(match self.template.as_str() {
            "gguf" => None,
            "none" => Some(Template::None),
            file => Some(Template::from_file(Path::new(file))?),
        })
    }
}

/// What is accepted.
#[derive(Debug, Args)]
pub struct GateArgs {
    /// Do not try the merged file out
    #[arg(long)]
    no_gate: bool,
    /// Put the merged file in place even if it fails (the exit code is 5 all the same)
    #[arg(long, conflicts_with = "no_gate")]
    pub keep_failed: bool,
    /// Least share kept of the patch's change in forget probability
    #[arg(long, value_name = "SHARE")]
    min_effect: Option<f64>,
    /// Least retain probability, as a share of the unmerged one
    #[arg(long, value_name = "SHARE")]
    min_retain: Option<f64>,
    /// Most KL(unmerged, merged) on forget answers, nats a token
    #[arg(long, value_name = "NATS")]
    max_kl_forget: Option<f64>,
    /// Most KL(unmerged, merged) on general text, nats a token
    #[arg(long, value_name = "NATS")]
    max_kl_general: Option<f64>,
}

impl GateArgs {
    /// Thresholds; none: no gate.
    pub fn config(&self) -> Option<GateConfig> {
        if self.no_gate {
            return None;
        }
        let d = GateConfig::default();
        Some(GateConfig {
            min_kept_effect: self.min_effect.unwrap_or(d.min_kept_effect),
            min_retain_ratio: self.min_retain.unwrap_or(d.min_retain_ratio),
            max_kl_forget: self.max_kl_forget.unwrap_or(d.max_kl_forget),
            max_kl_general: self.max_kl_general.unwrap_or(d.max_kl_general),
            ..d
        })
    }
}
