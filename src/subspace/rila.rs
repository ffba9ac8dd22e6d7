//! RILA basis: top eigenvectors of C_Δ = (1−β)·C_F − β·C_R without forming it.
//!
//! With roots C_F = F·Fᵀ and C_R = L·Lᵀ, let Z = [√(1−β)·F, √β·L] [n_out, m] and
//! D = diag(+1…, −1…), so C_Δ = Z·D·Zᵀ. Thin QR Z = U·R and the m x m eigenproblem
//! R·D·Rᵀ = V·Λ·Vᵀ give its non-zero spectrum; Q_r = U·V_r. Directions outside the span of Z have
//! eigenvalue zero and say nothing about the forget set: only positive eigenvalues are used.

use super::spectrum::{
    add_symmetric, canonical_f32, count_above, eigen_descending, factor_spectrum,
};
use super::spectrum::{to_f32, to_f64};
use super::{
    MAX_FACTOR, RetainBasis, Subspace, SubspaceConfig, SubspaceError, ThinQr, remove_span,
};
use faer::{Mat, MatRef};

/// Both bases from `forget` [n_out, n], a root of C_F, and the retain basis.
pub(super) fn solve(
    config: &SubspaceConfig,
    forget: Mat<f64>,
    n_forget: usize,
    retain: RetainBasis,
) -> Result<Subspace, SubspaceError> {
    check(config, n_forget, &retain)?;
    let forget_eigenvalues = factor_spectrum(forget.as_ref())?;
    let (values, vectors) = top_of_difference(config, forget, &retain)?;
    Ok(assemble(
        config,
        n_forget,
        &values,
        vectors.as_ref(),
        &forget_eigenvalues,
        retain,
    ))
}

/// Refuses an empty forget set and a rank above the width.
pub(super) fn check(
    config: &SubspaceConfig,
    n_forget: usize,
    retain: &RetainBasis,
) -> Result<(), SubspaceError> {
    if n_forget == 0 {
        return Err(SubspaceError::EmptyForget {
            tensor: retain.tensor.clone(),
        });
    }
    if config.rank > retain.n_out {
        return Err(SubspaceError::RankAboveWidth {
            tensor: retain.tensor.clone(),
            rank: config.rank,
            n_out: retain.n_out,
        });
    }
    Ok(())
}

/// The artifact from the spectrum of C_Δ, largest first, and at least its first `rank` vectors.
pub(super) fn assemble(
    config: &SubspaceConfig,
    n_forget: usize,
    values: &[f64],
    vectors: MatRef<'_, f64>,
    forget_eigenvalues: &[f64],
    retain: RetainBasis,
) -> Subspace {
    let n_positive = count_above(values, largest_magnitude(values));
    let rank = n_positive.min(config.rank);
    Subspace {
        tensor: retain.tensor.clone(),
        n_out: retain.n_out,
        n_forget,
        rank_wanted: config.rank,
        rank,
        rila: canonical_f32(vectors.subcols(0, rank)),
        rila_eigenvalues: to_f32(&values[..rank]),
        delta_eigenvalues: to_f32(&values[..values.len().min(MAX_FACTOR)]),
        n_positive,
        forget_eigenvalues: to_f32(&forget_eigenvalues[..forget_eigenvalues.len().min(MAX_FACTOR)]),
        retain,
    }
}

fn largest_magnitude(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |best: f64, v| best.max(v.abs()))
}

/// Spectrum of Z·D·Zᵀ within the span of Z, largest first, and its top `rank` eigenvectors.
fn top_of_difference(
    config: &SubspaceConfig,
    forget: Mat<f64>,
    retain: &RetainBasis,
) -> Result<(Vec<f64>, Mat<f64>), SubspaceError> {
    let (n_out, n_f, n_l) = (retain.n_out, forget.ncols(), retain.n_factor());
    let (w_f, w_r) = ((1.0 - config.beta).sqrt(), config.beta.sqrt());
    let mut z = Mat::from_fn(n_out, n_f + n_l, |i, j| {
        if j < n_f {
            w_f * forget[(i, j)]
        } else {
            w_r * retain.factor[(j - n_f) * n_out + i]
        }
    });
    drop(forget);
    if config.off_retain && retain.rank > 0 {
        remove_span(&mut z, &to_f64(&retain.basis, n_out, retain.rank, 1.0));
    }
    let qr = (z.ncols() < n_out).then(|| ThinQr::new(z.clone()));
    let core = qr.as_ref().map_or(z, ThinQr::r);
    let signed = Mat::from_fn(core.nrows(), core.ncols(), |i, j| {
        if j < n_f { core[(i, j)] } else { -core[(i, j)] }
    });
    let mut difference = Mat::zeros(core.nrows(), core.nrows());
    add_symmetric(&mut difference, core.as_ref(), signed.as_ref(), 1.0);
    let (values, vectors) = eigen_descending(difference.as_ref())?;
    let top = vectors.as_ref().subcols(0, config.rank.min(values.len()));
    let basis = qr.map_or_else(|| top.to_owned(), |qr| qr.q_times(top));
    Ok((values, basis))
}
