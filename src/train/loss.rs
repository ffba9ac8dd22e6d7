//! Losses over rows of logits, with their gradients.
//!
//! Every loss is a mean over answer tokens, so a row's gradient carries its weight
//! (1/number of answer tokens of its set, times γ for the retain set).

use super::soft::Soft;
use crate::ggml::Token;
use crate::graph::head::RowLosses;
use crate::likelihood::{BLOCK, exp_sum, maximum};
use rayon::prelude::*;
use wide::f32x8;

/// What a row is trained towards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowObjective {
    /// Cross-entropy `−log p(y)`: remember.
    CrossEntropy,
    /// Inverted hinge `max(0, 1 + p(y) − max_{v≠y} p(v))`, p = softmax
    /// (Cha et al., "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs").
    InvertedHinge,
    /// Gradient difference's forget half, `+log p(y)`.
    Ascent,
}

/// One row to grade: the token that follows, the objective and its weight.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The token that follows in the sample.
    pub token: Token,
    /// What the row is trained towards.
    pub objective: RowObjective,
    /// Another model's distribution; the row is then trained towards that instead.
    pub teacher: Option<&'a Soft>,
    /// Factor of the loss and its gradient.
    pub weight: f32,
}

/// What grading a row gave.
#[derive(Debug, Clone, Copy, Default)]
pub struct Graded {
    /// The loss, unweighted.
    pub loss: f64,
    /// `−log p(y)`.
    pub nll: f64,
}

/// Grade one row `[n_vocab]` and, when asked, overwrite it with the weighted gradient.
pub fn grade(row: &mut [f32], target: Target<'_>, gradient: bool) -> Graded {
    let y = usize::try_from(target.token).unwrap_or(usize::MAX);
    debug_assert!(
        y < row.len(),
        "targets come from the model's own vocabulary"
    );
    if let Some(teacher) = target.teacher {
        let (loss, nll) = teacher.grade(row, y, target.weight, gradient);
        return Graded { loss, nll };
    }
    let logit_y = row[y];
    let max = maximum(row);
    let (rival, rival_logit) = rival(row, y);
    let nll_of = |sum: f64| sum.ln() - f64::from(logit_y - max);
    if !gradient {
        let sum = exp_sum(row, max);
        let nll = nll_of(sum);
        let rival_p = (f64::from(rival_logit - max).exp()) / sum;
        return Graded {
            loss: loss_of(target.objective, nll, rival_p),
            nll,
        };
    }
    let sum = exp_in_place(row, max);
    let nll = nll_of(sum);
    let (p_y, p_m) = ((-nll).exp(), f64::from(row[rival]) / sum);
    let loss = loss_of(target.objective, nll, p_m);
    let w = target.weight;
    // The row holds exp(z − max); p = row/sum.
    let inv = (1.0 / sum) as f32;
    match target.objective {
        RowObjective::CrossEntropy => {
            scale(row, w * inv);
            row[y] -= w;
        }
        RowObjective::Ascent => {
            scale(row, -w * inv);
            row[y] += w;
        }
        RowObjective::InvertedHinge if loss > 0.0 => {
            // dp_i/dz_k = p_i(δ_ik − p_k).
            let gap = (p_y - p_m) as f32;
            scale(row, -w * inv * gap);
            row[y] += w * p_y as f32;
            row[rival] -= w * p_m as f32;
        }
        RowObjective::InvertedHinge => row.fill(0.0),
    }
    Graded { loss, nll }
}

fn loss_of(objective: RowObjective, nll: f64, rival_p: f64) -> f64 {
    match objective {
        RowObjective::CrossEntropy => nll,
        RowObjective::Ascent => -nll,
        RowObjective::InvertedHinge => (1.0 + (-nll).exp() - rival_p).max(0.0),
    }
}

/// Largest logit other than `y`'s, and where it is.
fn rival(row: &[f32], y: usize) -> (usize, f32) {
    let best = |from: usize, part: &[f32]| {
        let max = maximum(part);
        part.iter().position(|&v| v == max).map(|i| (from + i, max))
    };
    let (left, right) = (best(0, &row[..y]), best(y + 1, &row[y + 1..]));
    match (left, right) {
        (Some(l), Some(r)) if r.1 > l.1 => r,
        (Some(l), _) => l,
        (None, Some(r)) => r,
        (None, None) => (y, f32::NEG_INFINITY),
    }
}

/// Overwrites each z with exp(z − max); returns their sum.
pub(super) fn exp_in_place(row: &mut [f32], max: f32) -> f64 {
    let mut total = 0f64;
    for block in row.chunks_mut(8 * BLOCK) {
        let mut sum = f32x8::ZERO;
        let (chunks, rest) = block.as_chunks_mut::<8>();
        for c in chunks {
            let e = (f32x8::from(*c) - max).exp();
            sum += e;
            *c = e.to_array();
        }
        total += f64::from(sum.reduce_add());
        for z in rest {
            *z = (*z - max).exp();
            total += f64::from(*z);
        }
    }
    total
}

pub(super) fn scale(row: &mut [f32], by: f32) {
    for z in row {
        *z *= by;
    }
}

/// Grades the rows of a batch as the head delivers them.
pub struct BatchLosses<'a> {
    /// One target per row.
    pub targets: &'a [Target<'a>],
    /// Filled in as rows come.
    pub graded: Vec<Graded>,
    /// Overwrite logits with gradients.
    pub gradient: bool,
}

impl<'a> BatchLosses<'a> {
    /// For rows with these targets.
    pub fn new(targets: &'a [Target<'a>], gradient: bool) -> Self {
        Self {
            targets,
            graded: vec![Graded::default(); targets.len()],
            gradient,
        }
    }
}

impl RowLosses for BatchLosses<'_> {
    fn grade(&mut self, first: usize, n_rows: usize, logits: &mut [f32]) {
        let n_vocab = logits.len() / n_rows;
        let gradient = self.gradient;
        logits
            .par_chunks_mut(n_vocab)
            .zip(&self.targets[first..first + n_rows])
            .zip(&mut self.graded[first..first + n_rows])
            .for_each(|((row, &target), graded)| *graded = grade(row, target, gradient));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits() -> Vec<f32> {
        (0..37)
            .map(|i| ((i * 7919 % 101) as f32 / 17.0).sin() * 3.0)
            // The hinge has a kink where two rivals tie; differences must not straddle one.
            .enumerate()
            .map(|(i, z)| {
                if i == 11 || i == 5 {
                    4.0 + i as f32 / 10.0
                } else {
                    z
                }
            })
            .collect()
    }

    fn check(objective: RowObjective, token: Token) {
        let target = Target {
            token,
            objective,
            teacher: None,
            weight: 1.0,
        };
        let mut gradient = logits();
        grade(&mut gradient, target, true);
        for k in 0..gradient.len() {
            let at = |h: f32| {
                let mut z = logits();
                z[k] += h;
                grade(&mut z, target, false).loss
            };
            let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
            let got = f64::from(gradient[k]);
            assert!(
                (numeric - got).abs() < 1e-4,
                "{objective:?} {k}: {numeric} against {got}"
            );
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        for objective in [
            RowObjective::CrossEntropy,
            RowObjective::InvertedHinge,
            RowObjective::Ascent,
        ] {
            for token in [0, 5, 36] {
                check(objective, token);
            }
        }
    }

    #[test]
    fn inverted_hinge_is_one_when_two_tokens_share_everything() {
        let mut row = vec![-50.0f32; 300];
        row[3] = 20.0;
        row[7] = 20.0;
        let target = Target {
            token: 3,
            objective: RowObjective::InvertedHinge,
            teacher: None,
            weight: 1.0,
        };
        assert!((grade(&mut row, target, false).loss - 1.0).abs() < 1e-6);
    }

    #[test]
    fn long_rows_sum_as_f64_does() {
        let mut row: Vec<f32> = (0..262_144).map(|i| (i as f32 * 0.37).sin()).collect();
        let exact: f64 =
            row.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln() - f64::from(row[9]);
        let target = Target {
            token: 9,
            objective: RowObjective::CrossEntropy,
            teacher: None,
            weight: 1.0,
        };
        assert!((grade(&mut row, target, false).nll - exact).abs() < 1e-5);
    }
}
