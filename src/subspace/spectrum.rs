//! Dense kernels under the subspace solvers: thin QR, self-adjoint eigen and left SVD, in f64.
//!
//! All of them run on the calling thread (`Par::Seq`): the stage is parallel over tensors, so
//! results do not depend on the number of threads, and no global faer setting is touched.

use super::SubspaceError;
use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_q_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply_q,
};
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::linalg::qr::no_pivoting::factor::{
    qr_in_place, qr_in_place_scratch, recommended_block_size,
};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Accum, ColRef, Conj, Mat, MatRef, Par};

/// Q and R of a tall matrix, Q kept as Householder reflectors.
pub(crate) struct ThinQr {
    packed: Mat<f64>,
    coeff: Mat<f64>,
}

impl ThinQr {
    /// Factors `a` [m, n]. Rank-deficient columns are fine (R is then an upper staircase).
    pub(crate) fn new(mut a: Mat<f64>) -> Self {
        let (m, n) = a.shape();
        let block = recommended_block_size::<f64>(m, n);
        let mut coeff = Mat::zeros(block, m.min(n));
        let scratch = qr_in_place_scratch::<f64>(m, n, block, Par::Seq, Default::default());
        qr_in_place(
            a.as_mut(),
            coeff.as_mut(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        );
        Self { packed: a, coeff }
    }

    /// R [min(m, n), n].
    pub(crate) fn r(&self) -> Mat<f64> {
        let (m, n) = self.packed.shape();
        Mat::from_fn(
            m.min(n),
            n,
            |i, j| {
                if i <= j { self.packed[(i, j)] } else { 0.0 }
            },
        )
    }

    /// Q·small [m, c] for `small` [min(m, n), c], without forming Q.
    pub(crate) fn q_times(&self, small: MatRef<'_, f64>) -> Mat<f64> {
        let (m, cols) = (self.packed.nrows(), small.ncols());
        let size = self.coeff.ncols();
        let mut out = Mat::zeros(m, cols);
        out.as_mut().subrows_mut(0, small.nrows()).copy_from(small);
        let scratch = apply_q_scratch::<f64>(m, self.coeff.nrows(), cols);
        apply_q(
            self.packed.as_ref().subcols(0, size),
            self.coeff.as_ref(),
            Conj::No,
            out.as_mut(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
        );
        out
    }
}

/// Eigenvalues, largest first, and the matching unit eigenvectors (columns) of a symmetric
/// matrix of which only the lower triangle is read.
pub(crate) fn eigen_descending(a: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>), SubspaceError> {
    let n = a.nrows();
    let mut values = Diag::zeros(n);
    let mut vectors = Mat::zeros(n, n);
    let yes = ComputeEigenvectors::Yes;
    let scratch = self_adjoint_evd_scratch::<f64>(n, yes, Par::Seq, Default::default());
    self_adjoint_evd(
        a,
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| SubspaceError::NoConvergence)?;
    // faer's eigenvalues ascend.
    let values = values.column_vector().iter().rev().copied().collect();
    Ok((values, vectors.as_ref().reverse_cols().to_owned()))
}

/// Eigenvalues alone, largest first; only the lower triangle is read.
pub(crate) fn eigenvalues_descending(a: MatRef<'_, f64>) -> Result<Vec<f64>, SubspaceError> {
    let mut values = Diag::zeros(a.nrows());
    let no = ComputeEigenvectors::No;
    let scratch = self_adjoint_evd_scratch::<f64>(a.nrows(), no, Par::Seq, Default::default());
    self_adjoint_evd(
        a,
        values.as_mut(),
        None,
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| SubspaceError::NoConvergence)?;
    Ok(values.column_vector().iter().rev().copied().collect())
}

/// Singular values, largest first, and left singular vectors [m, min(m, n)] of `a` [m, n].
pub(crate) fn left_svd(a: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>), SubspaceError> {
    let (m, n) = a.shape();
    let mut values = Diag::zeros(m.min(n));
    let mut left = Mat::zeros(m, m.min(n));
    let (thin, no) = (ComputeSvdVectors::Thin, ComputeSvdVectors::No);
    let scratch = svd_scratch::<f64>(m, n, thin, no, Par::Seq, Default::default());
    svd(
        a,
        values.as_mut(),
        Some(left.as_mut()),
        None,
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| SubspaceError::NoConvergence)?;
    Ok((values.column_vector().iter().copied().collect(), left))
}

/// Lower triangle of `c` += `scale`·a·bᵀ, where a·bᵀ is symmetric.
pub(crate) fn add_symmetric(c: &mut Mat<f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>, scale: f64) {
    triangular_matmul(
        c.as_mut(),
        BlockStructure::TriangularLower,
        Accum::Add,
        a,
        BlockStructure::Rectangular,
        b.transpose(),
        BlockStructure::Rectangular,
        scale,
        Par::Seq,
    );
}

/// a·b in f64 on this thread.
pub(crate) fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    faer::linalg::matmul::matmul(out.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

/// Eigenvalues of C = z·zᵀ that need not vanish, largest first: of zᵀz or zzᵀ, the smaller.
pub(crate) fn factor_spectrum(z: MatRef<'_, f64>) -> Result<Vec<f64>, SubspaceError> {
    let z = if z.nrows() < z.ncols() {
        z
    } else {
        z.transpose()
    };
    let mut gram = Mat::zeros(z.nrows(), z.nrows());
    add_symmetric(&mut gram, z, z, 1.0);
    let mut values = eigenvalues_descending(gram.as_ref())?;
    values.iter_mut().for_each(|v| *v = v.max(0.0));
    Ok(values)
}

/// How many of `values` (largest first) exceed the relative tolerance of `scale`.
pub(crate) fn count_above(values: &[f64], scale: f64) -> usize {
    values
        .iter()
        .take_while(|&&v| v > super::RELATIVE_TOLERANCE * scale)
        .count()
}

/// Columns of `m` as f32, one after the other, with [`canonical_sign`]s.
pub(crate) fn canonical_f32(m: MatRef<'_, f64>) -> Vec<f32> {
    let mut out = Vec::with_capacity(m.nrows() * m.ncols());
    for col in m.col_iter() {
        let sign = canonical_sign(col);
        out.extend(col.iter().map(|&v| (sign * v) as f32));
    }
    out
}

/// The sign that makes the entry of largest magnitude (the first on a tie) positive, so that a
/// basis does not depend on the solver.
pub(crate) fn canonical_sign(col: ColRef<'_, f64>) -> f64 {
    let largest = col.iter().fold(
        0.0f64,
        |best, &v| if v.abs() > best.abs() { v } else { best },
    );
    if largest < 0.0 { -1.0 } else { 1.0 }
}

/// A column-major f32 slice [rows, cols] as f64, times `scale`.
pub(crate) fn to_f64(data: &[f32], rows: usize, cols: usize, scale: f64) -> Mat<f64> {
    Mat::from_fn(rows, cols, |i, j| f64::from(data[j * rows + i]) * scale)
}

/// Eigenvalues for the artifact.
pub(crate) fn to_f32(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}
