//! Token-level covariance, exact: Σ x·xᵀ in f64, streamed.
//!
//! n_out² · 8 bytes and n_out² flops per token, and a dense eigenproblem of n_out at the end
//! (about 10·n_out³ flops), so widths up to 4096 only; [`super::Sketch`] is the cheap way.

use super::spectrum::{add_symmetric, eigen_descending, eigenvalues_descending};
use super::{
    RetainBasis, Subspace, SubspaceConfig, SubspaceError, columns, remove_span, rila, to_f64,
};
use faer::{Mat, MatRef};

/// Widest tensor a dense covariance is kept for (128 MiB).
pub const MAX_DENSE: usize = 4096;

/// Running Σ x·xᵀ over tokens.
#[derive(Debug, Clone)]
pub struct Moments {
    n_tokens: usize,
    /// Lower triangle of the sum.
    sum: Mat<f64>,
}

impl Moments {
    /// An empty sum for outputs of width `n_out`.
    pub fn new(n_out: usize) -> Result<Self, SubspaceError> {
        if n_out > MAX_DENSE {
            return Err(SubspaceError::TooWide {
                n_out,
                limit: MAX_DENSE,
            });
        }
        Ok(Self {
            n_tokens: 0,
            sum: Mat::zeros(n_out, n_out),
        })
    }

    /// Tokens seen.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Adds the outputs `x` [n_out, n] of n tokens.
    pub fn push(&mut self, tensor: &str, x: &[f32]) -> Result<(), SubspaceError> {
        let n_out = self.sum.nrows();
        let n = columns(tensor, "token outputs", x, n_out)?;
        let x = to_f64(x, n_out, n, 1.0);
        add_symmetric(&mut self.sum, x.as_ref(), x.as_ref(), 1.0);
        self.n_tokens += n;
        Ok(())
    }

    /// Adds another sum over the same tensor.
    pub fn merge(&mut self, other: &Self) -> Result<(), SubspaceError> {
        same_width(self, other)?;
        self.sum += &other.sum;
        self.n_tokens += other.n_tokens;
        Ok(())
    }

    /// C = Σ x·xᵀ / n, lower triangle.
    fn covariance(&self) -> Mat<f64> {
        let scale = 1.0 / self.n_tokens.max(1) as f64;
        Mat::from_fn(self.sum.nrows(), self.sum.nrows(), |i, j| {
            self.sum[(i, j)] * scale
        })
    }
}

/// The two bases of one tensor from dense token-level covariances.
///
/// RILA uses the dense C_R; the factor in the retain basis holds its top 256 directions only, so
/// a later [`super::solve_shared`] from it leaves out the `discarded` share of C_R.
pub fn solve_dense(
    config: &SubspaceConfig,
    tensor: &str,
    forget: &Moments,
    retain: &Moments,
) -> Result<Subspace, SubspaceError> {
    config.validate()?;
    same_width(retain, forget)?;
    if retain.n_tokens == 0 {
        return Err(SubspaceError::EmptyRetain {
            tensor: tensor.into(),
        });
    }
    let (c_f, c_r) = (forget.covariance(), retain.covariance());
    let (values, vectors) = eigen_descending(c_r.as_ref())?;
    let (k, n_r) = (config.retain_rank, retain.n_tokens);
    let basis = RetainBasis::from_spectrum(k, tensor, n_r, &values, vectors.as_ref(), 0.0);
    drop(vectors);
    rila::check(config, forget.n_tokens, &basis)?;

    let forget_eigenvalues = eigenvalues_descending(c_f.as_ref())?;
    let mut delta = Mat::from_fn(c_f.nrows(), c_f.nrows(), |i, j| {
        (1.0 - config.beta) * c_f[(i, j)] - config.beta * c_r[(i, j)]
    });
    if config.off_retain && basis.rank > 0 {
        let p = to_f64(&basis.basis, basis.n_out, basis.rank, 1.0);
        delta = symmetric(delta.as_ref());
        remove_span(&mut delta, &p);
        delta = delta.transpose().to_owned();
        remove_span(&mut delta, &p);
    }
    let (values, vectors) = eigen_descending(delta.as_ref())?;
    let n_f = forget.n_tokens;
    Ok(rila::assemble(
        config,
        n_f,
        &values,
        vectors.as_ref(),
        &forget_eigenvalues,
        basis,
    ))
}

/// The whole of a matrix of which the lower triangle is given.
fn symmetric(lower: MatRef<'_, f64>) -> Mat<f64> {
    Mat::from_fn(lower.nrows(), lower.nrows(), |i, j| {
        lower[(i.max(j), i.min(j))]
    })
}

fn same_width(wanted: &Moments, found: &Moments) -> Result<(), SubspaceError> {
    if wanted.sum.nrows() == found.sum.nrows() {
        return Ok(());
    }
    Err(SubspaceError::Shape {
        tensor: String::new(),
        what: "the other covariance",
        n_out: wanted.sum.nrows(),
        found: found.sum.nrows(),
    })
}
