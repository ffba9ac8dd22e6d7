//! Pooled layer outputs -> RILA basis and retain basis, per adapted tensor.
//!
//! With H_F [n_out, n_F] and H_R [n_out, n_R] (one column per sample, ggml order: the n_out
//! values of a sample are contiguous), C_F = H_F·H_Fᵀ/n_F and C_R = H_R·H_Rᵀ/n_R, uncentred:
//! - `retain`: P, the top eigenvectors of C_R ([`RetainBasis`]);
//! - `rila`: Q_r, the eigenvectors of C_Δ = (1−β)·C_F − β·C_R with the algebraically largest
//!   eigenvalues, positive ones only.
//!
//! Source: ReGLU, arXiv 2604.17396, sections on RILA and ROL. No n_out x n_out matrix is formed
//! unless asked for ([`Moments`]). C_R enters RILA only through the compact factor of
//! [`RetainBasis`], so a run from a shared retain file repeats the original run bit for bit.

mod moments;
mod retain;
mod rila;
mod sketch;
mod spectrum;

pub use moments::{MAX_DENSE, Moments, solve_dense};
pub use retain::{MAX_FACTOR, RetainBasis, retain_only};
pub use sketch::Sketch;
pub(crate) use spectrum::{ThinQr, add_symmetric, eigen_descending, left_svd, product, to_f64};

use faer::Mat;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Eigenvalues at or below this share of the largest magnitude count as zero: a direction of
/// 1e-6 of the largest amplitude is under the resolution of outputs pooled in f32.
pub const RELATIVE_TOLERANCE: f64 = 1e-12;

/// What the subspace stage is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubspaceConfig {
    /// Weight of the retain covariance in C_Δ, in [0, 1).
    pub beta: f64,
    /// Wanted RILA rank r.
    pub rank: usize,
    /// Wanted size k of the retain basis.
    pub retain_rank: usize,
    /// Solve RILA within the complement of the retain basis, so that B0 is orthogonal to P and
    /// projecting B alone keeps the net update off the retain basis.
    pub off_retain: bool,
}

impl Default for SubspaceConfig {
    fn default() -> Self {
        Self {
            beta: 0.7,
            rank: 32,
            retain_rank: 128,
            off_retain: false,
        }
    }
}

impl SubspaceConfig {
    /// For a tensor of `n_out` outputs. A hard projection needs room beside P: there P fills at
    /// most half of the outputs.
    fn fitted(&self, n_out: usize) -> Self {
        let most = if self.off_retain {
            (n_out / 2).max(1)
        } else {
            n_out
        };
        Self {
            retain_rank: self.retain_rank.min(most),
            ..self.clone()
        }
    }

    /// Refuses settings outside their range.
    pub fn validate(&self) -> Result<(), SubspaceError> {
        if !(0.0..1.0).contains(&self.beta) {
            return Err(SubspaceError::Config {
                field: "beta",
                wanted: "at least 0 and below 1",
                found: self.beta.to_string(),
            });
        }
        if self.rank == 0 {
            return Err(SubspaceError::Config {
                field: "rank",
                wanted: "at least 1",
                found: "0".into(),
            });
        }
        if self.retain_rank == 0 {
            return Err(SubspaceError::Config {
                field: "retain_rank",
                wanted: "at least 1",
                found: "0".into(),
            });
        }
        Ok(())
    }
}

/// Why no subspace came out.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum SubspaceError {
    /// A setting out of range.
    #[error("{field} must be {wanted}, found {found}")]
    Config {
        /// The setting.
        field: &'static str,
        /// Its range.
        wanted: &'static str,
        /// What was given.
        found: String,
    },
    /// No retain sample: a random basis in its place would protect nothing.
    #[error("{tensor}: the retain set has no samples, so there is no retain basis")]
    EmptyRetain {
        /// The adapted tensor.
        tensor: String,
    },
    /// No forget sample.
    #[error("{tensor}: the forget set has no samples")]
    EmptyForget {
        /// The adapted tensor.
        tensor: String,
    },
    /// A slice that is not a whole number of columns, or two widths that differ.
    #[error("{tensor}: {what} must hold a multiple of n_out = {n_out} values, found {found}")]
    Shape {
        /// The adapted tensor.
        tensor: String,
        /// Which input.
        what: &'static str,
        /// Output width of the tensor.
        n_out: usize,
        /// Values given.
        found: usize,
    },
    /// NaN or infinity among the outputs.
    #[error("{tensor}: {what} column {column} holds a value that is not finite")]
    NotFinite {
        /// The adapted tensor.
        tensor: String,
        /// Which input.
        what: &'static str,
        /// Its first bad column (sample or token).
        column: usize,
    },
    /// Wanted more directions than the tensor has outputs.
    #[error("{tensor}: rank {rank} is above its {n_out} outputs")]
    RankAboveWidth {
        /// The adapted tensor.
        tensor: String,
        /// Rank asked for.
        rank: usize,
        /// Output width of the tensor.
        n_out: usize,
    },
    /// Too wide for a dense covariance.
    #[error("a dense covariance of {n_out} outputs is above the limit of {limit}; use a sketch")]
    TooWide {
        /// Output width.
        n_out: usize,
        /// [`MAX_DENSE`].
        limit: usize,
    },
    /// The iteration of an eigen or singular value solver did not end.
    #[error("an eigenvalue iteration did not converge")]
    NoConvergence,
}

/// The two bases of one adapted tensor and the spectra behind them.
#[derive(Debug, Clone, PartialEq)]
pub struct Subspace {
    /// Name of the adapted tensor.
    pub tensor: String,
    /// Output width.
    pub n_out: usize,
    /// Forget samples (or tokens) behind C_F.
    pub n_forget: usize,
    /// RILA rank asked for.
    pub rank_wanted: usize,
    /// RILA rank found: at most `rank_wanted`, at most the number of positive eigenvalues.
    pub rank: usize,
    /// Q_r [n_out, rank], orthonormal columns.
    pub rila: Vec<f32>,
    /// Eigenvalues of C_Δ behind `rila`, largest first, all positive; `rank` of them.
    pub rila_eigenvalues: Vec<f32>,
    /// The largest eigenvalues of C_Δ whatever their sign, largest first, at most [`MAX_FACTOR`].
    pub delta_eigenvalues: Vec<f32>,
    /// Positive eigenvalues of C_Δ in all.
    pub n_positive: usize,
    /// The largest eigenvalues of C_F, largest first, at most [`MAX_FACTOR`].
    pub forget_eigenvalues: Vec<f32>,
    /// P and its spectrum.
    pub retain: RetainBasis,
}

impl Subspace {
    /// What had to be lowered, as sentences for the user; empty when all was found as asked.
    pub fn lowered(&self) -> Vec<String> {
        let mut out = Vec::new();
        if self.rank < self.rank_wanted {
            out.push(format!(
                "{}: RILA rank lowered from {} to {}: C_delta has {} positive eigenvalues",
                self.tensor, self.rank_wanted, self.rank, self.n_positive
            ));
        }
        out.extend(self.retain.lowered());
        out
    }
}

/// Where the retain covariance of a tensor comes from.
#[derive(Debug, Clone, Copy)]
pub enum Retain<'a> {
    /// Pooled outputs [n_out, n_R].
    Pooled(&'a [f32]),
    /// A basis computed before, perhaps elsewhere.
    Shared(&'a RetainBasis),
}

/// Pooled outputs of one adapted tensor.
#[derive(Debug, Clone, Copy)]
pub struct Pooled<'a> {
    /// Name of the adapted tensor.
    pub tensor: &'a str,
    /// Output width.
    pub n_out: usize,
    /// H_F [n_out, n_F].
    pub forget: &'a [f32],
    /// H_R, or what stands for it.
    pub retain: Retain<'a>,
}

/// Both bases of one tensor from `h_f` [n_out, n_F] and `h_r` [n_out, n_R].
pub fn solve(
    config: &SubspaceConfig,
    tensor: &str,
    h_f: &[f32],
    h_r: &[f32],
    n_out: usize,
) -> Result<Subspace, SubspaceError> {
    config.validate()?;
    let retain = retain_only(config.retain_rank, tensor, h_r, n_out)?;
    solve_shared(config, h_f, retain)
}

/// The RILA basis from `h_f` [n_out, n_F] and a retain basis computed before. `retain_rank` of
/// the configuration is ignored: P is taken as it is.
pub fn solve_shared(
    config: &SubspaceConfig,
    h_f: &[f32],
    retain: RetainBasis,
) -> Result<Subspace, SubspaceError> {
    config.validate()?;
    let n_f = columns(&retain.tensor, "forget outputs", h_f, retain.n_out)?;
    let scale = 1.0 / (n_f.max(1) as f64).sqrt();
    rila::solve(config, to_f64(h_f, retain.n_out, n_f, scale), n_f, retain)
}

/// The two bases from token-level sketches of the forget and the retain outputs.
pub fn solve_sketch(
    config: &SubspaceConfig,
    tensor: &str,
    forget: &mut Sketch,
    retain: &mut Sketch,
) -> Result<Subspace, SubspaceError> {
    config.validate()?;
    let retain = retain.retain_basis(config.retain_rank, tensor)?;
    if forget.n_out() != retain.n_out {
        return Err(SubspaceError::Shape {
            tensor: tensor.into(),
            what: "forget sketch",
            n_out: retain.n_out,
            found: forget.n_out(),
        });
    }
    let n_f = forget.n_tokens();
    rila::solve(config, forget.root()?, n_f, retain)
}

/// [`solve`] over many tensors, in their order, one tensor per rayon worker: the working memory
/// is about 8·n_out·(n_F + n_R)·3 bytes per worker (25 MB for 2048 outputs and 256 + 256 samples).
pub fn solve_all(
    config: &SubspaceConfig,
    tensors: &[Pooled<'_>],
) -> Result<Vec<Subspace>, SubspaceError> {
    tensors
        .par_iter()
        .with_max_len(1)
        .map(|t| match t.retain {
            Retain::Pooled(h_r) => solve(&config.fitted(t.n_out), t.tensor, t.forget, h_r, t.n_out),
            Retain::Shared(basis) => solve_shared(config, t.forget, basis.clone()),
        })
        .collect()
}

/// The number of columns of `data` [n_out, n], every value checked.
pub(crate) fn columns(
    tensor: &str,
    what: &'static str,
    data: &[f32],
    n_out: usize,
) -> Result<usize, SubspaceError> {
    if n_out == 0 || !data.len().is_multiple_of(n_out) {
        let (tensor, found) = (tensor.into(), data.len());
        return Err(SubspaceError::Shape {
            tensor,
            what,
            n_out,
            found,
        });
    }
    match data.iter().position(|v| !v.is_finite()) {
        Some(at) => Err(SubspaceError::NotFinite {
            tensor: tensor.into(),
            what,
            column: at / n_out,
        }),
        None => Ok(data.len() / n_out),
    }
}

/// x − P·(Pᵀx), twice: P is rounded to f32, and a single pass would leave 1e-7 of x in its span.
pub(crate) fn remove_span(x: &mut Mat<f64>, basis: &Mat<f64>) {
    for _ in 0..2 {
        let inside = product(basis.transpose(), x.as_ref());
        *x -= product(basis.as_ref(), inside.as_ref());
    }
}
