//! Another model's next-token distribution, and the loss of being far from it.
//!
//! Knowledge distillation with hard cuts: KL(t ‖ s) over the teacher's likeliest tokens and, as one
//! outcome, all others. It is 0 where both agree on these and never above the KL over the whole
//! vocabulary, which would take a row of it to keep.

use super::loss::{exp_in_place, scale};
use crate::likelihood::{exp_sum, maximum};

/// Most tokens kept by themselves.
const MOST: usize = 256;
/// Logits this far below the largest are not: e⁻¹⁴ is 8e-7.
const FAR: f32 = 14.0;
/// Least probability of all others that is divided by.
const LEAST: f64 = 1e-12;

/// The teacher's distribution t over the next token.
#[derive(Debug, Clone, PartialEq)]
pub struct Soft {
    /// Its likeliest tokens.
    tokens: Vec<u32>,
    /// Their probabilities.
    probs: Vec<f32>,
    /// The probability of all others together.
    rest: f64,
}

impl Soft {
    /// Of a row of logits `[n_vocab]`.
    pub fn of(logits: &[f32]) -> Self {
        let max = maximum(logits);
        let sum = exp_sum(logits, max);
        let mut kept: Vec<(usize, f32)> = logits
            .iter()
            .enumerate()
            .map(|(v, &z)| (v, z))
            .filter(|&(_, z)| z >= max - FAR)
            .collect();
        if kept.len() > MOST {
            kept.select_nth_unstable_by(MOST, |a, b| b.1.total_cmp(&a.1));
            kept.truncate(MOST);
        }
        kept.sort_unstable_by_key(|&(v, _)| v);
        let prob = |z: f32| f64::from(z - max).exp() / sum;
        let known: f64 = kept.iter().map(|&(_, z)| prob(z)).sum();
        Self {
            tokens: kept.iter().map(|&(v, _)| v as u32).collect(),
            probs: kept.iter().map(|&(_, z)| prob(z) as f32).collect(),
            rest: (1.0 - known).max(0.0),
        }
    }

    /// KL(t ‖ s) in nats for the row of logits `[n_vocab]` that s is the softmax of, and −log s of
    /// `token`. With `gradient`, the row is overwritten with the gradient times `weight`.
    pub(super) fn grade(
        &self,
        row: &mut [f32],
        token: usize,
        weight: f32,
        gradient: bool,
    ) -> (f64, f64) {
        let max = maximum(row);
        let logit = row[token];
        let logits: Vec<f32> = self.tokens.iter().map(|&v| row[v as usize]).collect();
        let sum = match gradient {
            true => exp_in_place(row, max),
            false => exp_sum(row, max),
        };
        let mut kl = 0.0;
        let mut known = 0.0;
        for (&z, &t) in logits.iter().zip(&self.probs) {
            let log_s = f64::from(z - max) - sum.ln();
            known += log_s.exp();
            if t > 0.0 {
                kl += f64::from(t) * (f64::from(t).ln() - log_s);
            }
        }
        let rest = (1.0 - known).max(LEAST);
        if self.rest > 0.0 {
            kl += self.rest * (self.rest / rest).ln();
        }
        if gradient {
            // The row holds exp(z − max). Of the others each has its part of what they are off
            // by together.
            let off = 1.0 - self.rest / rest;
            scale(row, weight * (off / sum) as f32);
            for ((&v, &z), &t) in self.tokens.iter().zip(&logits).zip(&self.probs) {
                let s = (f64::from(z - max).exp() / sum) as f32;
                row[v as usize] = weight * (s - t);
            }
        }
        (kl, sum.ln() - f64::from(logit - max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::compare::kl;
    use crate::rng::SplitMix64;

    fn logits(seed: u64, n: usize, spread: f32) -> Vec<f32> {
        let mut rng = SplitMix64(seed);
        (0..n).map(|_| spread * rng.normal()).collect()
    }

    #[test]
    fn gradients_match_finite_differences() {
        // Few tokens near the largest; more than are kept; all of them.
        for (n, spread) in [(60, 9.0), (700, 1.0), (40, 1.0)] {
            let (teacher, student) = (logits(1, n, spread), logits(2, n, spread));
            let soft = Soft::of(&teacher);
            assert!(soft.tokens.len() <= MOST.min(n));
            let loss = |row: &[f32]| soft.grade(&mut row.to_vec(), 3, 1.0, false);
            let mut gradient = student.clone();
            let found = soft.grade(&mut gradient, 3, 0.5, true);
            assert_eq!(found, loss(&student));
            for k in 0..n {
                let at = |h: f32| {
                    let mut row = student.clone();
                    row[k] += h;
                    loss(&row).0
                };
                let numeric = 0.5 * (at(1e-2) - at(-1e-2)) / 2e-2;
                let got = f64::from(gradient[k]);
                assert!(
                    (numeric - got).abs() < 1e-4,
                    "{n} {k}: {numeric} against {got}"
                );
            }
        }
    }

    #[test]
    fn it_is_no_more_than_the_divergence_and_nothing_between_equals() {
        let (teacher, student) = (logits(3, 900, 2.0), logits(4, 900, 2.0));
        let soft = Soft::of(&teacher);
        let (found, nll) = soft.grade(&mut student.clone(), 5, 1.0, false);
        let whole = kl(&teacher, &student);
        assert!(found <= whole && found > 0.5 * whole, "{found} of {whole}");
        assert!((nll - crate::likelihood::nll(&student, 5)).abs() < 1e-9);
        // A shift of all logits is no difference.
        let mut shifted: Vec<f32> = teacher.iter().map(|z| z + 3.0).collect();
        let (none, _) = soft.grade(&mut shifted, 5, 1.0, true);
        assert!(none.abs() < 1e-6, "{none}");
        assert!(shifted.iter().all(|g| g.abs() < 1e-6));
        // Few enough to be kept whole: the divergence itself.
        let (teacher, student) = (logits(5, 90, 2.0), logits(6, 90, 2.0));
        let (found, _) = Soft::of(&teacher).grade(&mut student.clone(), 0, 1.0, false);
        assert!((found - kl(&teacher, &student)).abs() < 1e-4);
    }
}
