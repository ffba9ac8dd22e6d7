//! Membership inference: can the forget set still be told from text the model never saw?
//!
//! Four attacks give each sample a score that is low where the model finds it familiar; the AUC of
//! forget against holdout scores is 1 where every forget sample is the more familiar, 1/2 where
//! nothing tells them apart. Formulas, defaults and corner cases are open-unlearning's
//! (Dorna et al., arXiv 2506.12618; `src/evals/metrics/mia/` and `privacy.py`):
//!
//! - `loss` (Yeom et al. 2018): mean −log p over the answer's tokens, its end token included;
//! - `zlib` (Carlini et al. 2021): that loss over the length of the answer's zlib stream;
//! - `min_k` (Shi et al., arXiv 2310.16789): −mean of the lowest k of the log p, end token left out;
//! - `min_k_plus_plus` (Zhang et al., arXiv 2404.02936): the same of (log p − μ)/σ, where μ and σ²
//!   are mean and variance of log p over the vocabulary, weighted by p, σ² ≥ 10⁻⁶.
//!
//! A retain model, which never saw the forget set, rarely has an AUC of 1/2 itself, so its AUCs are
//! what others are held against: [`privleak`] and [`rel_diff`].

use std::io::Write;

use flate2::{Compression, write::ZlibEncoder};
use serde::{Deserialize, Serialize};

use super::stats::{harmonic_mean, mean};

/// open-unlearning's k on TOFU.
pub const MIN_K: f64 = 0.4;

/// What one row of logits says about the token that follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenStat {
    /// log p of the token.
    pub log_prob: f64,
    /// Whether the token is the likeliest one.
    pub hit: bool,
    /// Mean of log p over the vocabulary, `Σ p log p`.
    pub mean: f64,
    /// Variance of log p over the vocabulary, `Σ p log² p − mean²`.
    pub variance: f64,
}

impl TokenStat {
    /// From a row of logits `[n_vocab]`.
    pub fn new(logits: &[f32], token: i32) -> Self {
        let mut best = 0;
        for (i, logit) in logits.iter().enumerate() {
            if *logit > logits[best] {
                best = i;
            }
        }
        let max = f64::from(logits[best]);
        // Moments of d = logit − max, which differs from log p by a constant.
        let (mut sum, mut first, mut second) = (0.0, 0.0, 0.0);
        for logit in logits {
            let d = f64::from(*logit) - max;
            let e = d.exp();
            // A masked token has d = −∞ and no weight.
            if e > 0.0 {
                sum += e;
                first += e * d;
                second += e * d * d;
            }
        }
        let (ln_sum, mean) = (sum.ln(), first / sum);
        let logit = logits.get(token as usize).copied();
        Self {
            log_prob: f64::from(logit.unwrap_or(f32::NEG_INFINITY)) - max - ln_sum,
            hit: best == token as usize,
            mean: mean - ln_sum,
            variance: (second / sum - mean * mean).max(0.0),
        }
    }
}

/// One value for each attack.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Attacks<T> {
    pub loss: T,
    pub zlib: T,
    pub min_k: T,
    pub min_k_plus_plus: T,
}

impl<T: Copy> Attacks<T> {
    /// The same for other values.
    pub fn map<U>(&self, f: impl Fn(T) -> U) -> Attacks<U> {
        Attacks {
            loss: f(self.loss),
            zlib: f(self.zlib),
            min_k: f(self.min_k),
            min_k_plus_plus: f(self.min_k_plus_plus),
        }
    }

    /// Both values of each attack.
    pub fn zip<U: Copy>(&self, other: &Attacks<U>) -> Attacks<(T, U)> {
        Attacks {
            loss: (self.loss, other.loss),
            zlib: (self.zlib, other.zlib),
            min_k: (self.min_k, other.min_k),
            min_k_plus_plus: (self.min_k_plus_plus, other.min_k_plus_plus),
        }
    }

    /// In the order of the fields.
    pub fn values(&self) -> [T; 4] {
        [self.loss, self.zlib, self.min_k, self.min_k_plus_plus]
    }
}

/// An answer as a model takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerStats {
    /// Its tokens, without the end token.
    pub tokens: Vec<TokenStat>,
    /// log p of the end token, where the answer has one.
    pub end: Option<f64>,
    /// Its bytes, without control tokens.
    pub text: Vec<u8>,
}

impl AnswerStats {
    /// Mean −log p, end token included.
    pub fn loss(&self) -> f64 {
        let log_probs = self.tokens.iter().map(|t| t.log_prob).chain(self.end);
        -mean(&log_probs.collect::<Vec<_>>())
    }

    /// All four scores; `k` is the share of tokens that min-k and min-k++ average over.
    pub fn attack(&self, k: f64) -> Attacks<f64> {
        let loss = self.loss();
        let log_probs = self.tokens.iter().map(|t| t.log_prob);
        let normalised = self
            .tokens
            .iter()
            .map(|t| (t.log_prob - t.mean) / t.variance.max(1e-6).sqrt());
        Attacks {
            loss,
            zlib: loss / zlib_length(&self.text) as f64,
            min_k: lowest(log_probs.collect(), k),
            min_k_plus_plus: lowest(normalised.collect(), k),
        }
    }
}

/// −mean of the lowest max(1, ⌊n·k⌋) values; 0 where there are none.
fn lowest(mut values: Vec<f64>, k: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    values.sort_by(f64::total_cmp);
    let n = ((values.len() as f64 * k) as usize).clamp(1, values.len());
    -mean(&values[..n])
}

/// Bytes of the zlib stream at the default level.
pub fn zlib_length(text: &[u8]) -> usize {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    let written = encoder.write_all(text).and_then(|()| encoder.finish());
    written.expect("a vector takes all bytes").len()
}

/// Area under the ROC curve: how often a holdout sample scores above a forget sample, ties half.
/// NaN where a set is empty.
pub fn auc(forget: &[f64], holdout: &[f64]) -> f64 {
    let mut scores: Vec<(f64, bool)> = forget.iter().map(|&s| (s, false)).collect();
    scores.extend(holdout.iter().map(|&s| (s, true)));
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    // Twice the count of pairs, so that ties stay whole numbers.
    let (mut below, mut pairs) = (0usize, 0usize);
    for tied in scores.chunk_by(|a, b| a.0 == b.0) {
        let n_holdout = tied.iter().filter(|(_, is_holdout)| *is_holdout).count();
        let n_forget = tied.len() - n_holdout;
        pairs += n_holdout * (2 * below + n_forget);
        below += n_forget;
    }
    pairs as f64 / 2.0 / (forget.len() * holdout.len()) as f64
}

/// The AUC of each attack.
pub fn aucs(forget: &[Attacks<f64>], holdout: &[Attacks<f64>]) -> Attacks<f64> {
    let of = |value: fn(&Attacks<f64>) -> f64| {
        auc(
            &forget.iter().map(value).collect::<Vec<_>>(),
            &holdout.iter().map(value).collect::<Vec<_>>(),
        )
    };
    Attacks {
        loss: of(|a| a.loss),
        zlib: of(|a| a.zlib),
        min_k: of(|a| a.min_k),
        min_k_plus_plus: of(|a| a.min_k_plus_plus),
    }
}

/// MUSE's privacy leakage in percent (Shi et al., arXiv 2407.06460, eq. 3; there on 1 − AUC):
/// 0 for the retain model, −100 where the forget set is wholly familiar, positive where it is
/// conspicuously unfamiliar.
pub fn privleak(auc: f64, retain_auc: f64) -> f64 {
    let (score, reference) = (1.0 - auc, 1.0 - retain_auc);
    (score - reference) / (reference + 1e-10) * 100.0
}

/// open-unlearning's relative difference of the AUCs in percent.
pub fn rel_diff(auc: f64, retain_auc: f64) -> f64 {
    (auc - retain_auc) / (retain_auc + 1e-10) * 100.0
}

/// How near an AUC is to the retain model's: max(0, 1 − |[`privleak`]|/100), 1 at the retain model
/// and 0 where the forget set is wholly familiar.
///
/// The paper's appendix F.1 scores privacy relative to the retain model and its code has no
/// formula for it; this one is ours.
pub fn retain_score(auc: f64, retain_auc: f64) -> f64 {
    (1.0 - privleak(auc, retain_auc).abs() / 100.0).max(0.0)
}

/// Harmonic mean of the four retain scores.
pub fn privacy(scores: &Attacks<f64>) -> f64 {
    harmonic_mean(&scores.values())
}
