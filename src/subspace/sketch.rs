//! Token-level covariance, compressed: a mergeable low-rank root of Σ x·xᵀ.
//!
//! Columns are appended to a buffer [n_out, 2·n_keep]; when it is full, the SVD keeps the
//! n_keep largest directions (incremental SVD). The sketch S obeys 0 ⪯ Σ x·xᵀ − S·Sᵀ and the
//! trace of the difference is exactly `discarded` (rounding to f32 aside).

use super::retain::left_factor;
use super::{RetainBasis, SubspaceError, columns, to_f64};
use faer::Mat;

/// A running root of Σ x·xᵀ over tokens.
#[derive(Debug, Clone)]
pub struct Sketch {
    n_out: usize,
    n_keep: usize,
    n_tokens: usize,
    /// [n_out, <= 2·n_keep].
    columns: Vec<f32>,
    energy: f64,
    discarded: f64,
}

impl Sketch {
    /// An empty sketch that keeps `n_keep` directions (at least 1).
    pub fn new(n_out: usize, n_keep: usize) -> Self {
        let (n_keep, columns) = (n_keep.clamp(1, n_out.max(1)), Vec::new());
        Self {
            n_out,
            n_keep,
            n_tokens: 0,
            columns,
            energy: 0.0,
            discarded: 0.0,
        }
    }

    /// Output width.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Tokens seen.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Share of Σ‖x‖² that is no longer in the sketch.
    pub fn discarded(&self) -> f64 {
        if self.energy > 0.0 {
            self.discarded / self.energy
        } else {
            0.0
        }
    }

    /// Adds the outputs `x` [n_out, n] of n tokens.
    pub fn push(&mut self, tensor: &str, x: &[f32]) -> Result<(), SubspaceError> {
        let n = columns(tensor, "token outputs", x, self.n_out)?;
        self.append(x)?;
        self.energy += x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        self.n_tokens += n;
        Ok(())
    }

    /// Adds another sketch of the same tensor.
    pub fn merge(&mut self, other: &Self) -> Result<(), SubspaceError> {
        if self.n_out != other.n_out {
            return Err(SubspaceError::Shape {
                tensor: String::new(),
                what: "the other sketch",
                n_out: self.n_out,
                found: other.n_out,
            });
        }
        self.append(&other.columns)?;
        self.n_tokens += other.n_tokens;
        self.energy += other.energy;
        self.discarded += other.discarded;
        Ok(())
    }

    /// P and the compact factor of C_R, this sketch being that of the retain outputs.
    pub fn retain_basis(
        &mut self,
        rank: usize,
        tensor: &str,
    ) -> Result<RetainBasis, SubspaceError> {
        let root = self.root()?;
        let lost = self.discarded / self.n_tokens.max(1) as f64;
        RetainBasis::from_root(rank, tensor, self.n_tokens, root, lost)
    }

    /// A root of C = Σ x·xᵀ / n, at most `n_keep` columns.
    pub(super) fn root(&mut self) -> Result<Mat<f64>, SubspaceError> {
        if self.n_columns() > self.n_keep {
            self.compress()?;
        }
        let scale = 1.0 / (self.n_tokens.max(1) as f64).sqrt();
        Ok(to_f64(&self.columns, self.n_out, self.n_columns(), scale))
    }

    fn n_columns(&self) -> usize {
        self.columns.len() / self.n_out.max(1)
    }

    fn append(&mut self, mut x: &[f32]) -> Result<(), SubspaceError> {
        while !x.is_empty() {
            let room = 2 * self.n_keep * self.n_out - self.columns.len();
            let (now, later) = x.split_at(room.min(x.len()));
            self.columns.extend_from_slice(now);
            x = later;
            if self.columns.len() == 2 * self.n_keep * self.n_out {
                self.compress()?;
            }
        }
        Ok(())
    }

    fn compress(&mut self) -> Result<(), SubspaceError> {
        let n = self.n_columns();
        let (sigma, u) = left_factor(to_f64(&self.columns, self.n_out, n, 1.0))?;
        let keep = self.n_keep.min(sigma.len());
        self.discarded += sigma[keep..].iter().map(|s| s * s).sum::<f64>();
        self.columns.clear();
        for (j, s) in sigma[..keep].iter().enumerate() {
            self.columns.extend(u.col(j).iter().map(|v| (v * s) as f32));
        }
        Ok(())
    }
}
