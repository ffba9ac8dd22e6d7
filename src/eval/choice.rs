//! Accuracy on multiple-choice questions, per subject and overall, with its uncertainty twice:
//! Wilson's interval, and the standard error that lm-evaluation-harness prints (sample standard
//! deviation over √n; over subjects the pooled one). Overall accuracy counts every question once,
//! as the harness's groups with `weight_by_size` do.

use serde::{Serialize, Serializer};

use super::stats::{Interval, Z_95, wilson};

/// How many questions were answered rightly.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Accuracy {
    /// Questions.
    pub n: usize,
    /// Rightly answered ones.
    pub hits: usize,
    /// hits/n.
    pub accuracy: f64,
    /// Wilson's 95% interval.
    #[serde(serialize_with = "as_pair")]
    pub interval: Interval,
    /// The harness's standard error; NaN (null in JSON) for a single question.
    pub stderr: f64,
}

fn as_pair<S: Serializer>(interval: &Interval, serializer: S) -> Result<S::Ok, S::Error> {
    [interval.low, interval.high].serialize(serializer)
}

impl Accuracy {
    /// Of one subject.
    pub fn new(hits: usize, n: usize) -> Self {
        let (size, p) = (n as f64, hits as f64 / n as f64);
        Self {
            n,
            hits,
            accuracy: p,
            interval: wilson(hits, n, Z_95),
            // Of zeros and ones: s² = n·p(1−p)/(n−1).
            stderr: (p * (1.0 - p) / (size - 1.0)).sqrt(),
        }
    }

    /// Over subjects: `√(Σ (nᵢ−1)·nᵢ·seᵢ² / (N − k) / N)` is the harness's pooled standard error.
    pub fn pooled(subjects: &[Accuracy]) -> Self {
        let n = subjects.iter().map(|s| s.n).sum();
        let mut all = Self::new(subjects.iter().map(|s| s.hits).sum(), n);
        let squares: f64 = subjects
            .iter()
            .map(|s| (s.n - 1) as f64 * s.n as f64 * s.stderr * s.stderr)
            .sum();
        all.stderr = (squares / (n - subjects.len()) as f64 / n as f64).sqrt();
        all
    }
}

/// The likeliest choice, the first of several: NumPy's `argmax`.
pub fn likeliest(log_likelihoods: &[f64; 4]) -> usize {
    let mut best = 0;
    for (i, ll) in log_likelihoods.iter().enumerate() {
        if *ll > log_likelihoods[best] {
            best = i;
        }
    }
    best
}
