//! The net update ΔW = s·(B·A − B0·A0) of one adapted tensor, in factors, kept off the retain
//! basis P.
//!
//! In: lora_a [n_in, rank], lora_b [rank, n_out] and P [n_out, k], ggml order (row o of lora_b
//! holds its `rank` values contiguously, so the slice is Bᵀ in column-major order). Out:
//! projected factors, ‖ΔW‖, ‖PᵀΔW‖/‖ΔW‖, a refactoring of lower rank, and the
//! representation-orthogonal loss ([`rol`]). No n_out x n_in matrix is ever formed.
//!
//! Source: ReGLU, arXiv 2604.17396 (ROL); the projection of the net update is this project's.

mod rol;

pub use rol::{RolNorm, RolTerm, rol, rol_term};

use crate::subspace::{SubspaceError, ThinQr, left_svd, product, to_f64};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use thiserror::Error;

/// Factors that do not fit together.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ProjectError {
    /// A slice of the wrong length.
    #[error("{what} must hold {wanted} values, found {found}")]
    Length {
        /// Which factor.
        what: &'static str,
        /// Values its shape asks for.
        wanted: usize,
        /// Values given.
        found: usize,
    },
    /// Rank 0, or a basis that is no multiple of the width.
    #[error("{what} must be {wanted}, found {found}")]
    Shape {
        /// Which dimension.
        what: &'static str,
        /// Its range.
        wanted: String,
        /// What was given.
        found: usize,
    },
    /// The solver below failed.
    #[error("the update could not be refactored")]
    Solver(#[from] SubspaceError),
}

/// ΔW = scale·B·A [n_in, n_out] of one tensor, in factors.
#[derive(Debug, Clone, PartialEq)]
pub struct NetUpdate {
    n_in: usize,
    n_out: usize,
    rank: usize,
    scale: f32,
    lora_a: Vec<f32>,
    lora_b: Vec<f32>,
}

/// What a refactoring left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Refactored {
    /// The update of lower rank, scale 1 (for a LoRA file: alpha = rank).
    pub update: NetUpdate,
    /// ‖ΔW − ΔW'‖²/‖ΔW‖²; 0 where ΔW = 0.
    pub discarded: f64,
}

impl NetUpdate {
    /// From `lora_a` [n_in, rank] and `lora_b` [rank, n_out].
    pub fn new(
        (n_in, n_out, rank): (usize, usize, usize),
        scale: f32,
        lora_a: Vec<f32>,
        lora_b: Vec<f32>,
    ) -> Result<Self, ProjectError> {
        if rank == 0 {
            let wanted = "at least 1".into();
            return Err(ProjectError::Shape {
                what: "the rank",
                wanted,
                found: 0,
            });
        }
        length("lora_a", lora_a.len(), n_in * rank)?;
        length("lora_b", lora_b.len(), rank * n_out)?;
        Ok(Self {
            n_in,
            n_out,
            rank,
            scale,
            lora_a,
            lora_b,
        })
    }

    /// s·(B·A − B0·A0) as one pair of rank 2r: lora_b [2r, n_out] = [B, −B0], lora_a [n_in, 2r]
    /// = [A; A0]. `trained` and `initial` are (lora_a [n_in, r], lora_b [r, n_out]).
    pub fn from_trained(
        (n_in, n_out, r): (usize, usize, usize),
        scale: f32,
        trained: (&[f32], &[f32]),
        initial: (&[f32], &[f32]),
    ) -> Result<Self, ProjectError> {
        for (what, found) in [
            ("lora_a", trained.0.len()),
            ("the initial lora_a", initial.0.len()),
        ] {
            length(what, found, n_in * r)?;
        }
        for (what, found) in [
            ("lora_b", trained.1.len()),
            ("the initial lora_b", initial.1.len()),
        ] {
            length(what, found, r * n_out)?;
        }
        let lora_a = [trained.0, initial.0].concat();
        let mut lora_b = Vec::with_capacity(2 * r * n_out);
        for o in 0..n_out {
            lora_b.extend_from_slice(&trained.1[o * r..(o + 1) * r]);
            lora_b.extend(initial.1[o * r..(o + 1) * r].iter().map(|v| -v));
        }
        Self::new((n_in, n_out, 2 * r), scale, lora_a, lora_b)
    }

    /// (n_in, n_out, rank).
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.n_in, self.n_out, self.rank)
    }

    /// The factor s before B·A.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// A [n_in, rank].
    pub fn lora_a(&self) -> &[f32] {
        &self.lora_a
    }

    /// B [rank, n_out].
    pub fn lora_b(&self) -> &[f32] {
        &self.lora_b
    }

    /// ΔW <- (I − PPᵀ)·ΔW for `basis` [n_out, k]: hard projection off the retain outputs.
    pub fn project_output(&mut self, basis: &[f32]) -> Result<(), ProjectError> {
        project_lora_b(&mut self.lora_b, basis, self.rank, self.n_out)
    }

    /// ΔW <- ΔW·(I − PPᵀ) for `basis` [n_in, k] of the retain INPUTS.
    pub fn project_input(&mut self, basis: &[f32]) -> Result<(), ProjectError> {
        project_lora_a(&mut self.lora_a, basis, self.rank, self.n_in)
    }

    /// ‖ΔW‖_F. By QR of both factors rather than their Gram matrices: B·A and B0·A0 nearly
    /// cancel early in training, and squares would lose half the digits.
    pub fn norm(&self) -> f64 {
        let (b, a) = self.factors();
        let core = product(ThinQr::new(b).r().as_ref(), self.r_a(a).transpose());
        f64::from(self.scale).abs() * core.norm_l2()
    }

    /// ‖PᵀΔW‖_F / ‖ΔW‖_F for `basis` [n_out, k]; 0 where ΔW = 0.
    pub fn retain_fraction(&self, basis: &[f32]) -> Result<f64, ProjectError> {
        let k = basis_width(basis, self.n_out)?;
        let (b, a) = self.factors();
        let r_a = self.r_a(a);
        let p = to_f64(basis, self.n_out, k, 1.0);
        let inside = product(product(p.transpose(), b.as_ref()).as_ref(), r_a.transpose());
        let whole = product(ThinQr::new(b).r().as_ref(), r_a.transpose()).norm_l2();
        Ok(if whole > 0.0 {
            inside.norm_l2() / whole
        } else {
            0.0
        })
    }

    /// The best update of rank `rank` (or below, where ΔW has less): QR of both factors, SVD of
    /// the small core, σ split evenly over both sides.
    pub fn refactor(&self, rank: usize) -> Result<Refactored, ProjectError> {
        if rank == 0 {
            let wanted = "at least 1".into();
            return Err(ProjectError::Shape {
                what: "the rank",
                wanted,
                found: 0,
            });
        }
        self.refactor_by(|_| rank)
    }

    /// The update of the least rank (at least 1) that is within `error`·‖ΔW‖ of this one; of those
    /// that are a multiple of `step`, where it has as many.
    ///
    /// # Errors
    /// When the decomposition does not converge.
    pub fn truncate(&self, error: f64, step: usize) -> Result<Refactored, ProjectError> {
        self.refactor_by(|sigma| {
            let energy: f64 = sigma.iter().map(|s| s * s).sum();
            // From the small end, so that what is discarded is not lost in what is kept.
            let mut lost = 0.0;
            let small = sigma.iter().rev().take_while(|s| {
                lost += **s * **s;
                lost <= error * error * energy
            });
            let least = (sigma.len() - small.count()).max(1);
            least.next_multiple_of(step.max(1))
        })
    }

    /// [`refactor`](Self::refactor) to the rank that `choose` finds in the singular values.
    fn refactor_by(
        &self,
        choose: impl FnOnce(&[f64]) -> usize,
    ) -> Result<Refactored, ProjectError> {
        let (b, a) = self.factors();
        let (qr_b, qr_a) = (ThinQr::new(b), ThinQr::new(a));
        let core =
            product(qr_b.r().as_ref(), qr_a.r().transpose()) * faer::Scale(f64::from(self.scale));
        let (sigma, u) = left_svd(core.as_ref())?;
        let rank = choose(&sigma).min(sigma.len());
        // core = U·S·Vᵀ, hence V·√S = coreᵀ·U/√S; a zero σ has no direction.
        let root: Vec<f64> = sigma.iter().map(|s| s.sqrt()).collect();
        let floor = root[0] * f64::EPSILON.sqrt();
        let over = |j: usize| if root[j] > floor { 1.0 / root[j] } else { 0.0 };
        let right = product(core.transpose(), u.as_ref().subcols(0, rank));
        let small_b = Mat::from_fn(u.nrows(), rank, |i, j| {
            if root[j] > floor {
                u[(i, j)] * root[j]
            } else {
                0.0
            }
        });
        let small_a = Mat::from_fn(right.nrows(), rank, |i, j| right[(i, j)] * over(j));
        let (b, a) = (
            qr_b.q_times(small_b.as_ref()),
            qr_a.q_times(small_a.as_ref()),
        );
        let energy: f64 = sigma.iter().map(|s| s * s).sum();
        let lost: f64 = sigma[rank..].iter().map(|s| s * s).sum();
        let lora_a = a
            .col_iter()
            .flat_map(|c| c.iter().map(|&v| v as f32))
            .collect();
        let lora_b = b
            .row_iter()
            .flat_map(|r| r.iter().map(|&v| v as f32))
            .collect();
        Ok(Refactored {
            update: Self::new((self.n_in, self.n_out, rank), 1.0, lora_a, lora_b)?,
            discarded: if energy > 0.0 { lost / energy } else { 0.0 },
        })
    }

    /// B [n_out x rank] and Aᵀ [n_in x rank] as matrices.
    fn factors(&self) -> (Mat<f64>, Mat<f64>) {
        let r = self.rank;
        let b = Mat::from_fn(self.n_out, r, |o, j| f64::from(self.lora_b[o * r + j]));
        (b, to_f64(&self.lora_a, self.n_in, r, 1.0))
    }

    fn r_a(&self, a: Mat<f64>) -> Mat<f64> {
        ThinQr::new(a).r()
    }
}

/// B <- B − P·(PᵀB), in place on `lora_b` [rank, n_out], for `basis` P [n_out, k].
pub fn project_lora_b(
    lora_b: &mut [f32],
    basis: &[f32],
    rank: usize,
    n_out: usize,
) -> Result<(), ProjectError> {
    let k = basis_width(basis, n_out)?;
    length("lora_b", lora_b.len(), rank * n_out)?;
    let mut bt = MatMut::from_column_major_slice_mut(lora_b, rank, n_out);
    let p = MatRef::from_column_major_slice(basis, n_out, k);
    let mut inside = Mat::<f32>::zeros(rank, k);
    matmul(
        inside.as_mut(),
        Accum::Replace,
        bt.as_ref(),
        p,
        1.0,
        Par::Seq,
    );
    matmul(
        bt.as_mut(),
        Accum::Add,
        inside.as_ref(),
        p.transpose(),
        -1.0,
        Par::Seq,
    );
    Ok(())
}

/// A <- A − (A·P)·Pᵀ, in place on `lora_a` [n_in, rank], for `basis` P [n_in, k].
pub fn project_lora_a(
    lora_a: &mut [f32],
    basis: &[f32],
    rank: usize,
    n_in: usize,
) -> Result<(), ProjectError> {
    let k = basis_width(basis, n_in)?;
    length("lora_a", lora_a.len(), n_in * rank)?;
    let mut at = MatMut::from_column_major_slice_mut(lora_a, n_in, rank);
    let p = MatRef::from_column_major_slice(basis, n_in, k);
    let mut inside = Mat::<f32>::zeros(k, rank);
    matmul(
        inside.as_mut(),
        Accum::Replace,
        p.transpose(),
        at.as_ref(),
        1.0,
        Par::Seq,
    );
    matmul(at.as_mut(), Accum::Add, p, inside.as_ref(), -1.0, Par::Seq);
    Ok(())
}

/// Columns of `basis` [width, k].
fn basis_width(basis: &[f32], width: usize) -> Result<usize, ProjectError> {
    if width == 0 || !basis.len().is_multiple_of(width) {
        return Err(ProjectError::Shape {
            what: "the size of the basis",
            wanted: format!("a multiple of {width}"),
            found: basis.len(),
        });
    }
    Ok(basis.len() / width)
}

fn length(what: &'static str, found: usize, wanted: usize) -> Result<(), ProjectError> {
    if found == wanted {
        Ok(())
    } else {
        Err(ProjectError::Length {
            what,
            wanted,
            found,
        })
    }
}
