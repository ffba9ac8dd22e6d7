//! Scores of a set with their intervals: what reports and sweeps compare.

use super::Evaluation;
use crate::eval::stats::{Interval, bootstrap_mean, mean};
use crate::likelihood::SampleLoss;
use serde::{Deserialize, Serialize};

/// Of the bootstrap.
const N_RESAMPLES: usize = 2000;
const CONFIDENCE: f64 = 0.95;
/// Every interval is drawn with the same seed, so that equal scores have equal intervals.
const SEED: u64 = 1;

/// A mean over samples and its 95% bootstrap interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Of resampled sets.
    pub interval: Interval,
}

impl Mean {
    /// Of `values`; none without a value.
    pub fn of(values: &[f64]) -> Option<Self> {
        (!values.is_empty()).then(|| Self {
            mean: mean(values),
            interval: bootstrap_mean(values, CONFIDENCE, N_RESAMPLES, SEED),
        })
    }
}

/// Answers of one set under one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetScores {
    /// Samples.
    pub n: usize,
    /// Answer probability^(1/tokens).
    pub prob: Mean,
    /// Mean −log p of an answer token, nats.
    pub nll: Mean,
    /// ROUGE-L recall of greedy answers, where they were written.
    pub rouge_l: Option<Mean>,
}

impl SetScores {
    /// Of losses alone; none without a sample.
    pub fn of_losses(losses: &[SampleLoss]) -> Option<Self> {
        Self::of(losses.iter().map(SampleLoss::per_token).collect(), &[])
    }

    /// Of an evaluation, with its greedy answers; none without a sample.
    pub fn of_evaluation(e: &Evaluation) -> Option<Self> {
        let rouge: Vec<f64> = e.scored.iter().filter_map(|s| s.rouge_l).collect();
        Self::of(e.scored.iter().map(|s| s.nll).collect(), &rouge)
    }

    fn of(nll: Vec<f64>, rouge: &[f64]) -> Option<Self> {
        let prob: Vec<f64> = nll.iter().map(|nll| (-nll).exp()).collect();
        Some(Self {
            n: nll.len(),
            prob: Mean::of(&prob)?,
            nll: Mean::of(&nll)?,
            rouge_l: Mean::of(rouge),
        })
    }
}
