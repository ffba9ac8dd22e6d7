//! Retain basis P: top eigenvectors of C_R = H_R·H_Rᵀ/n_R, from a thin QR and the SVD of its R.
//!
//! The singular route, not the Gram matrix: the latter squares the condition number, and pooled
//! outputs (sums over a sequence) are dominated by one direction. Beside P, a compact factor
//! L = U·Σ [n_out, <= 256] with L·Lᵀ = C_R is kept: it rebuilds C_R, and so RILA, without the
//! pooled vectors, whose individual samples (the right singular vectors) are dropped.

use super::spectrum::{canonical_f32, canonical_sign, count_above, to_f32};
use super::{SubspaceError, ThinQr, columns, left_svd, to_f64};
use faer::{Mat, MatRef};

/// Columns kept of the compact factor of C_R, and eigenvalues kept for reports.
pub const MAX_FACTOR: usize = 256;

/// P, the spectrum of C_R and its compact factor, for one adapted tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct RetainBasis {
    /// Name of the adapted tensor.
    pub tensor: String,
    /// Output width.
    pub n_out: usize,
    /// Retain samples (or tokens) behind C_R.
    pub n_samples: usize,
    /// Size of P asked for.
    pub rank_wanted: usize,
    /// Size of P: at most `rank_wanted`, at most the rank of H_R.
    pub rank: usize,
    /// P [n_out, rank], orthonormal columns.
    pub basis: Vec<f32>,
    /// The largest eigenvalues of C_R, largest first, one per column of `factor`.
    pub eigenvalues: Vec<f32>,
    /// L [n_out, n_factor], L·Lᵀ = C_R up to `discarded`. In f64: rounding its first, dominant
    /// column to f32 turns the RILA basis by 1e-5.
    pub factor: Vec<f64>,
    /// Share of the trace of C_R that `factor` leaves out; 0 for up to 256 pooled samples.
    pub discarded: f64,
}

impl RetainBasis {
    /// Columns of `factor`.
    pub fn n_factor(&self) -> usize {
        self.factor.len() / self.n_out
    }

    /// P fills the whole output space: a projected update of this tensor is zero.
    pub fn blocks_everything(&self) -> bool {
        self.rank == self.n_out
    }

    /// What had to be lowered, as a sentence for the user.
    pub fn lowered(&self) -> Option<String> {
        (self.rank < self.rank_wanted).then(|| {
            format!(
                "{}: retain basis lowered from {} to {}: the rank of its {} retain outputs",
                self.tensor, self.rank_wanted, self.rank, self.n_samples
            )
        })
    }

    /// From a root of C_R: `root`·`root`ᵀ = C_R. `lost` is the trace missing from it already.
    pub(super) fn from_root(
        rank_wanted: usize,
        tensor: &str,
        n_samples: usize,
        root: Mat<f64>,
        lost: f64,
    ) -> Result<Self, SubspaceError> {
        if n_samples == 0 {
            return Err(SubspaceError::EmptyRetain {
                tensor: tensor.into(),
            });
        }
        let (sigma, u) = left_factor(root)?;
        let eigenvalues: Vec<f64> = sigma.iter().map(|s| s * s).collect();
        Ok(Self::from_spectrum(
            rank_wanted,
            tensor,
            n_samples,
            &eigenvalues,
            u.as_ref(),
            lost,
        ))
    }

    /// From eigenvalues of C_R, largest first, and their eigenvectors (columns of `u`).
    pub(super) fn from_spectrum(
        rank_wanted: usize,
        tensor: &str,
        n_samples: usize,
        eigenvalues: &[f64],
        u: MatRef<'_, f64>,
        lost: f64,
    ) -> Self {
        let largest = eigenvalues.first().copied().unwrap_or(0.0);
        let rank = count_above(eigenvalues, largest).min(rank_wanted);
        let n_factor = eigenvalues.len().min(MAX_FACTOR);
        let mut factor = Vec::with_capacity(u.nrows() * n_factor);
        for (col, value) in u.col_iter().zip(&eigenvalues[..n_factor]) {
            let sigma = canonical_sign(col) * value.max(0.0).sqrt();
            factor.extend(col.iter().map(|v| v * sigma));
        }
        let trace = lost + eigenvalues.iter().map(|v| v.max(0.0)).sum::<f64>();
        let left_out = lost
            + eigenvalues[n_factor..]
                .iter()
                .map(|v| v.max(0.0))
                .sum::<f64>();
        Self {
            tensor: tensor.into(),
            n_out: u.nrows(),
            n_samples,
            rank_wanted,
            rank,
            basis: canonical_f32(u.subcols(0, rank)),
            eigenvalues: to_f32(&eigenvalues[..n_factor]),
            factor,
            discarded: if trace > 0.0 { left_out / trace } else { 0.0 },
        }
    }
}

/// P (`rank` columns at most) and the compact factor of C_R, from `h_r` [n_out, n_R].
pub fn retain_only(
    rank: usize,
    tensor: &str,
    h_r: &[f32],
    n_out: usize,
) -> Result<RetainBasis, SubspaceError> {
    let n_r = columns(tensor, "retain outputs", h_r, n_out)?;
    let scale = 1.0 / (n_r.max(1) as f64).sqrt();
    RetainBasis::from_root(rank, tensor, n_r, to_f64(h_r, n_out, n_r, scale), 0.0)
}

/// Singular values and left singular vectors of `root`, by QR first when it is tall.
pub(super) fn left_factor(root: Mat<f64>) -> Result<(Vec<f64>, Mat<f64>), SubspaceError> {
    if root.nrows() <= root.ncols() {
        return left_svd(root.as_ref());
    }
    let qr = ThinQr::new(root);
    let (sigma, small) = left_svd(qr.r().as_ref())?;
    Ok((sigma, qr.q_times(small.as_ref())))
}
