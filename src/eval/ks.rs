//! The two-sample two-sided Kolmogorov-Smirnov test with an exact p-value in log space.
//!
//! Takes two samples; gives D = sup |F₁ - F₂| and P(D' ≥ D) under the hypothesis that both come
//! from one distribution. All orders of the pooled sample are then equally likely, so with
//! q(i, j) = P(a random lattice path to (i, j) has met |i/n₁ - j/n₂| ≥ D) the recurrence
//!
//! q(i, j) = 1 outside, else (i·q(i-1, j) + j·q(i, j-1)) / (i + j)
//!
//! ends in the p-value q(n₁, n₂) (path counting after J. Hodges, Arkiv för Matematik 3, 1958, here
//! as probabilities). Every term is positive, so nothing cancels however small the p-value is;
//! below the range of f64 the same recurrence runs in logarithms. Ties and the choice of the
//! asymptotic formula are those of `scipy.stats.ks_2samp(method="auto")`.

use serde::Serialize;

use super::kolmogorov;

/// Above this size of the larger sample the asymptotic formula is used, as in SciPy.
const MAX_EXACT: usize = 10_000;

/// Below this the plain recurrence may have lost digits to underflow.
const PLAIN_FLOOR: f64 = 1e-280;

/// The outcome of a test.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct KsTest {
    /// D, the largest distance between the two empirical distribution functions.
    pub statistic: f64,
    /// ln of the p-value; finite even where `p` is 0.
    pub ln_p: f64,
    /// The p-value.
    pub p: f64,
    /// Whether it was counted exactly.
    pub exact: bool,
}

/// Why a test is impossible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KsError {
    /// A sample has no values.
    #[error("kolmogorov-smirnov test: wanted two samples with values, got {n1} and {n2}")]
    Empty {
        /// Size of the first sample.
        n1: usize,
        /// Size of the second sample.
        n2: usize,
    },
    /// A value cannot be ordered.
    #[error("kolmogorov-smirnov test: value {index} of sample {sample} is not a number")]
    NotANumber {
        /// 1 or 2.
        sample: usize,
        /// Position in that sample, from 0.
        index: usize,
    },
}

/// Tests whether two samples come from one distribution.
pub fn ks_2samp(a: &[f64], b: &[f64]) -> Result<KsTest, KsError> {
    if a.is_empty() || b.is_empty() {
        return Err(KsError::Empty {
            n1: a.len(),
            n2: b.len(),
        });
    }
    for (sample, values) in [(1, a), (2, b)] {
        if let Some(index) = values.iter().position(|v| v.is_nan()) {
            return Err(KsError::NotANumber { sample, index });
        }
    }
    Ok(p_value(a.len(), b.len(), distance(a, b)))
}

/// n₁n₂D as a whole number. Tied values are passed together before the distance is taken.
fn distance(a: &[f64], b: &[f64]) -> u64 {
    let sorted = |values: &[f64]| {
        let mut values = values.to_vec();
        // Adding zero makes -0 equal to 0 in the total order too.
        values.iter_mut().for_each(|v| *v += 0.0);
        values.sort_by(f64::total_cmp);
        values
    };
    let (a, b) = (sorted(a), sorted(b));
    let (n1, n2) = (a.len(), b.len());
    let (mut i, mut j, mut largest) = (0, 0, 0);
    while i < n1 && j < n2 {
        let value = a[i].min(b[j]);
        while i < n1 && a[i] == value {
            i += 1;
        }
        while j < n2 && b[j] == value {
            j += 1;
        }
        largest = largest.max((i as u64 * n2 as u64).abs_diff(j as u64 * n1 as u64));
    }
    largest
}

/// The p-value of `distance` = n₁n₂D.
fn p_value(n1: usize, n2: usize, distance: u64) -> KsTest {
    let statistic = distance as f64 / (n1 as f64 * n2 as f64);
    let exact = n1.max(n2) <= MAX_EXACT;
    let (p, ln_p) = if distance == 0 {
        (1.0, 0.0)
    } else if exact {
        let p = plain_recurrence(n1, n2, distance).min(1.0);
        if p > PLAIN_FLOOR {
            (p, p.ln())
        } else {
            let ln_p = log_recurrence(n1, n2, distance);
            (ln_p.exp(), ln_p)
        }
    } else {
        let (m, n) = (n1 as f64, n2 as f64);
        let ln_p = kolmogorov::ln_sf((m * n / (m + n)).round_ties_even() as u64, statistic);
        (ln_p.exp(), ln_p)
    };
    KsTest {
        statistic,
        ln_p,
        p,
        exact,
    }
}

/// q(n₁, n₂) in plain f64.
fn plain_recurrence(n1: usize, n2: usize, distance: u64) -> f64 {
    let mut row = vec![0.0f64; n2 + 1];
    for i in 0..=n1 {
        let mut left = 0.0;
        for (j, cell) in row.iter_mut().enumerate() {
            let apart = (i as u64 * n2 as u64).abs_diff(j as u64 * n1 as u64);
            left = if apart >= distance {
                1.0
            } else if i + j == 0 {
                0.0
            } else {
                (i as f64 * *cell + j as f64 * left) / (i + j) as f64
            };
            *cell = left;
        }
    }
    row[n2]
}

/// ln q(n₁, n₂).
fn log_recurrence(n1: usize, n2: usize, distance: u64) -> f64 {
    let ln: Vec<f64> = (0..=n1 + n2).map(|k| (k as f64).ln()).collect();
    let mut row = vec![f64::NEG_INFINITY; n2 + 1];
    for i in 0..=n1 {
        let mut left = f64::NEG_INFINITY;
        for (j, cell) in row.iter_mut().enumerate() {
            let apart = (i as u64 * n2 as u64).abs_diff(j as u64 * n1 as u64);
            left = if apart >= distance {
                0.0
            } else if i + j == 0 {
                f64::NEG_INFINITY
            } else {
                ln_add(ln[i] + *cell, ln[j] + left) - ln[i + j]
            };
            *cell = left;
        }
    }
    row[n2]
}

/// ln(eᵃ + eᵇ).
fn ln_add(a: f64, b: f64) -> f64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == f64::NEG_INFINITY {
        high
    } else {
        high + (low - high).exp().ln_1p()
    }
}

#[cfg(test)]
#[path = "ks_tests.rs"]
mod tests;
