//! How likely a model finds what was said: −log p of a token, of an answer, of a set.
//!
//! In: rows of logits `[n_vocab]` and the tokens that follow them. Out: nats. Exponentials are
//! taken eight at a time and summed in f64.

use crate::ggml::Token;
use wide::f32x8;

/// `−log softmax(row)[token]` of a row `[n_vocab]`, in nats.
pub fn nll(row: &[f32], token: Token) -> f64 {
    let max = maximum(row);
    let logit = row
        .get(token as usize)
        .copied()
        .unwrap_or(f32::NEG_INFINITY);
    exp_sum(row, max).ln() - f64::from(logit - max)
}

/// The largest logit.
pub(crate) fn maximum(row: &[f32]) -> f32 {
    let mut best = f32x8::splat(f32::NEG_INFINITY);
    let (chunks, rest) = row.as_chunks::<8>();
    for c in chunks {
        best = best.max(f32x8::from(*c));
    }
    let lanes = best.to_array().into_iter();
    lanes
        .chain(rest.iter().copied())
        .fold(f32::NEG_INFINITY, f32::max)
}

/// Long rows lose digits in one f32 sum: partial sums of this many lanes are added in f64.
pub(crate) const BLOCK: usize = 512;

/// Σ exp(z − max).
pub(crate) fn exp_sum(row: &[f32], max: f32) -> f64 {
    let mut total = 0f64;
    for block in row.chunks(8 * BLOCK) {
        let mut sum = f32x8::ZERO;
        let (chunks, rest) = block.as_chunks::<8>();
        for c in chunks {
            sum += (f32x8::from(*c) - max).exp();
        }
        total += f64::from(sum.reduce_add());
        total += rest
            .iter()
            .map(|&z| f64::from((z - max).exp()))
            .sum::<f64>();
    }
    total
}

/// Losses of one sample.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SampleLoss {
    /// Σ objective over its answer tokens, or the loss of the whole answer.
    pub loss: f64,
    /// Σ −log p.
    pub nll: f64,
    /// Answer tokens.
    pub n_tokens: usize,
}

impl SampleLoss {
    /// Mean −log p of an answer token.
    pub fn per_token(&self) -> f64 {
        self.nll / self.n_tokens.max(1) as f64
    }
}

/// Mean over samples of each one's mean answer NLL.
pub fn mean_nll(losses: &[SampleLoss]) -> f64 {
    losses.iter().map(SampleLoss::per_token).sum::<f64>() / losses.len().max(1) as f64
}

/// Mean over samples of answer probability^(1/tokens).
pub fn mean_prob(losses: &[SampleLoss]) -> f64 {
    let probs = losses.iter().map(|l| (-l.per_token()).exp());
    probs.sum::<f64>() / losses.len().max(1) as f64
}
