//! Means and intervals. All intervals are two-sided; empty input gives NaN, never a panic.

use crate::rng::SplitMix64;

use serde::{Deserialize, Serialize};

/// A lower and an upper bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower bound.
    pub low: f64,
    /// Upper bound.
    pub high: f64,
}

/// The arithmetic mean.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The harmonic mean: 0 if any value is 0, NaN if any is negative, as SciPy's `hmean`.
pub fn harmonic_mean(values: &[f64]) -> f64 {
    if values.is_empty() || values.iter().any(|v| *v < 0.0 || v.is_nan()) {
        return f64::NAN;
    }
    // 1/0 is infinite and n/∞ is 0, which is the limit.
    values.len() as f64 / values.iter().map(|v| 1.0 / v).sum::<f64>()
}

/// The 97.5% point of the standard normal distribution.
pub const Z_95: f64 = 1.959_963_984_540_054;

/// Wilson's score interval for a proportion (E. Wilson, J. Am. Stat. Assoc. 22, 1927); `z` is
/// [`Z_95`] for 95%.
pub fn wilson(n_hits: usize, n: usize, z: f64) -> Interval {
    let size = n as f64;
    let p = n_hits as f64 / size;
    let shrink = 1.0 + z * z / size;
    let centre = (p + z * z / (2.0 * size)) / shrink;
    let half = z / shrink * (p * (1.0 - p) / size + z * z / (4.0 * size * size)).sqrt();
    // The bounds at 0 and n hits are exact, rounding aside.
    Interval {
        low: if n_hits == 0 && n > 0 {
            0.0
        } else {
            centre - half
        },
        high: if n_hits == n && n > 0 {
            1.0
        } else {
            centre + half
        },
    }
}

/// Percentile bootstrap interval of the mean (B. Efron, Ann. Stat. 7, 1979): the same seed gives
/// the same interval on every machine.
pub fn bootstrap_mean(values: &[f64], confidence: f64, n_resamples: usize, seed: u64) -> Interval {
    if values.is_empty() || n_resamples == 0 {
        return Interval {
            low: f64::NAN,
            high: f64::NAN,
        };
    }
    let mut rng = SplitMix64(seed);
    let mut means: Vec<f64> = (0..n_resamples)
        .map(|_| {
            let sum: f64 = values.iter().map(|_| values[rng.below(values.len())]).sum();
            sum / values.len() as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let tail = (1.0 - confidence.clamp(0.0, 1.0)) / 2.0;
    Interval {
        low: quantile(&means, tail),
        high: quantile(&means, 1.0 - tail),
    }
}

/// Linear interpolation between the order statistics of sorted values, as NumPy's default.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    let below = at.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (at - below as f64) * (sorted[above] - sorted[below])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harmonic_mean_has_its_limits() {
        assert!((harmonic_mean(&[1.0, 2.0, 4.0]) - 12.0 / 7.0).abs() < 1e-15);
        assert_eq!(harmonic_mean(&[0.0, 1.0]), 0.0);
        assert!(harmonic_mean(&[-1.0, 1.0]).is_nan());
        assert!(harmonic_mean(&[]).is_nan() && mean(&[]).is_nan());
    }

    #[test]
    fn wilson_matches_published_values() {
        // R. Newcombe (Stat. Med. 17, 1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
        for (hits, n, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let interval = wilson(hits, n, Z_95);
            assert!((interval.low - low).abs() < 5e-5, "{interval:?}");
            assert!((interval.high - high).abs() < 5e-5, "{interval:?}");
        }
        assert_eq!(wilson(7, 7, Z_95).high, 1.0);
        assert!(wilson(0, 0, Z_95).low.is_nan());
    }

    #[test]
    fn bootstrap_is_repeatable_and_near_the_normal_interval() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 20)).collect();
        let interval = bootstrap_mean(&values, 0.95, 2000, 7);
        assert_eq!(interval, bootstrap_mean(&values, 0.95, 2000, 7));
        let half = Z_95 * (33.25f64 / 400.0).sqrt();
        assert!((interval.low - (9.5 - half)).abs() < 0.05, "{interval:?}");
        assert!((interval.high - (9.5 + half)).abs() < 0.05, "{interval:?}");
        assert_eq!(
            bootstrap_mean(&[3.0; 4], 0.9, 50, 1),
            Interval {
                low: 3.0,
                high: 3.0
            }
        );
        assert!(bootstrap_mean(&[], 0.9, 50, 1).low.is_nan());
    }
}
