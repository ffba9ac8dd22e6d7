//! Where the verdict draws its lines; `verdict` says why.

use crate::error::Error;
use serde::Serialize;

/// Thresholds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Thresholds {
    /// Least forget answer NLL, as a share of the unseen level.
    pub min_level: f64,
    /// Most forget answer NLL, as a multiple of the unseen level.
    pub max_level: f64,
    /// Most forget probability as a share of that before, where there is no unseen level.
    pub max_forget_share: f64,
    /// Least retain probability, as a share of that before.
    pub min_retain: f64,
    /// Most that other wordings may exceed the forget probability by.
    pub max_paraphrase_gap: f64,
    /// Least share of the drop in forget probability that a merged file keeps.
    pub min_kept_effect: f64,
    /// Most ‖PᵀΔW‖/‖ΔW‖ of any tensor, of patches made with the hard constraint.
    pub max_retain_fraction: f64,
    /// Most of the drop in forget probability that relearning undoes.
    pub max_relearned: f64,
    /// Least p-value of TOFU's forget quality.
    pub min_forget_quality: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            min_level: 0.9,
            max_level: 1.5,
            max_forget_share: 0.5,
            min_retain: 0.97,
            max_paraphrase_gap: 0.1,
            min_kept_effect: 0.9,
            max_retain_fraction: 0.01,
            max_relearned: 0.5,
            min_forget_quality: 0.05,
        }
    }
}

impl Thresholds {
    /// Whether they can be compared with at all.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self) -> Result<(), Error> {
        let all = [
            ("min-level", self.min_level),
            ("max-level", self.max_level),
            ("max-forget-share", self.max_forget_share),
            ("min-retain", self.min_retain),
            ("max-paraphrase-gap", self.max_paraphrase_gap),
            ("min-kept-effect", self.min_kept_effect),
            ("max-retain-fraction", self.max_retain_fraction),
            ("max-relearned", self.max_relearned),
            ("min-forget-quality", self.min_forget_quality),
        ];
        match all
            .into_iter()
            .find(|(_, v)| !(0.0..f64::INFINITY).contains(v))
        {
            None => Ok(()),
            Some((setting, value)) => Err(Error::Setting {
                setting,
                wanted: "a number, 0 or above".into(),
                found: value.to_string(),
            }),
        }
    }
}
