//! How much of the forget set a model still holds word for word, and open-unlearning's aggregate
//! (Dorna et al., arXiv 2506.12618, appendix F.1; code: `src/evals/metrics/memorization.py`).
//!
//! Per answer, from its tokens without the end token: [`extraction_strength`] and
//! [`exact_memorisation`]. Over sets: the memorisation score is the harmonic mean of one minus each
//! of extraction strength, exact memorisation, paraphrase probability and truth ratio; utility that
//! of model utility and fluency; the aggregate that of memorisation, privacy and utility. All grow
//! with success.

use super::membership::TokenStat;
use super::stats::{harmonic_mean, mean};

/// The share of the answer that follows on its own once its beginning is given: 1 − k/n, k the
/// least number of tokens after which every token is the likeliest (Carlini et al. 2021).
///
/// An answer whose last token is missed has 1/n, as in open-unlearning's code, not 0; one without
/// tokens has 0.
pub fn extraction_strength(tokens: &[TokenStat]) -> f64 {
    if tokens.is_empty() {
        return 0.0;
    }
    let k = tokens.iter().rposition(|t| !t.hit).map_or(0, |i| i + 1);
    1.0 - k.min(tokens.len() - 1) as f64 / tokens.len() as f64
}

/// The share of tokens that are the likeliest in their places (Tirumala et al., arXiv 2205.10770);
/// none for an answer without tokens.
pub fn exact_memorisation(tokens: &[TokenStat]) -> Option<f64> {
    let hits = tokens.iter().filter(|t| t.hit).count();
    (!tokens.is_empty()).then(|| hits as f64 / tokens.len() as f64)
}

/// p/(p + q), p and q the geometric means of the true and of the wrong answers' probabilities
/// exp(−loss): the truth ratio of the aggregate, which grows with what is known. (TOFU's own grows
/// towards ignorance.)
pub fn truth_share(true_losses: &[f64], wrong_losses: &[f64]) -> f64 {
    let (p, q) = ((-mean(true_losses)).exp(), (-mean(wrong_losses)).exp());
    p / (p + q + 1e-10)
}

/// What the memorisation score is made of, each in 0..=1.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct Memorised {
    pub extraction_strength: f64,
    pub exact_memorisation: f64,
    pub paraphrase_probability: f64,
    pub truth_share: f64,
}

impl Memorised {
    /// The memorisation score.
    pub fn score(&self) -> f64 {
        harmonic_mean(&[
            1.0 - self.extraction_strength,
            1.0 - self.exact_memorisation,
            1.0 - self.paraphrase_probability,
            1.0 - self.truth_share,
        ])
    }
}

/// Utility: model utility, and fluency where a classifier gave one.
pub fn utility(model_utility: f64, fluency: Option<f64>) -> f64 {
    fluency.map_or(model_utility, |f| harmonic_mean(&[model_utility, f]))
}

/// The aggregate.
pub fn aggregate(memorisation: f64, privacy: f64, utility: f64) -> f64 {
    harmonic_mean(&[memorisation, privacy, utility])
}
