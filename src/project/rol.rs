//! Representation-orthogonal loss: L_ROL = norm·Σ ‖BᵀP‖_F², gradient 2·norm·P·(PᵀB).
//!
//! The plain sum ([`RolNorm::Reference`]) grows with the number of tensors and the rank: on
//! Gemma-3-270M (126 tensors, r 32) it starts at 435 beside a task loss of 2.6. The mean over
//! all columns of all B ([`RolNorm::PerRank`]) lies in [0, 1] while B has unit columns, so its
//! weight carries over between models; the paper's λ = 0.5 on that model is λ = 0.5·126·32 = 2016.

use super::{ProjectError, basis_width, length};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How ROL is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolNorm {
    /// Σ over tensors, as published.
    Reference,
    /// Σ over tensors / Σ of their ranks: the mean share of a column of B inside P.
    #[default]
    PerRank,
}

impl RolNorm {
    /// The factor before the plain sum; `total_rank` is the sum of the tensors' ranks
    /// (n_tensors·r where no rank was lowered).
    pub fn factor(self, total_rank: usize) -> f64 {
        match self {
            Self::Reference => 1.0,
            Self::PerRank => 1.0 / total_rank.max(1) as f64,
        }
    }

    /// The λ of this normalisation that equals `lambda` on the published sum.
    pub fn from_reference(self, lambda: f64, total_rank: usize) -> f64 {
        lambda / self.factor(total_rank)
    }
}

/// One tensor's part of ROL.
#[derive(Debug)]
pub struct RolTerm<'a> {
    /// B [rank, n_out].
    pub lora_b: &'a [f32],
    /// P [n_out, k].
    pub basis: &'a [f32],
    /// Rank of the adapter.
    pub rank: usize,
    /// Output width.
    pub n_out: usize,
    /// Gradient of the loss by B [rank, n_out], added to.
    pub grad: &'a mut [f32],
}

/// Adds `scale`·2·P·(PᵀB) to `term.grad`; gives the plain ‖BᵀP‖² (not scaled).
pub fn rol_term(term: &mut RolTerm<'_>, scale: f32) -> Result<f64, ProjectError> {
    let (rank, n_out) = (term.rank, term.n_out);
    let k = basis_width(term.basis, n_out)?;
    length("lora_b", term.lora_b.len(), rank * n_out)?;
    length("the gradient of lora_b", term.grad.len(), rank * n_out)?;
    // lora_b in ggml order is Bᵀ column-major.
    let bt = MatRef::from_column_major_slice(term.lora_b, rank, n_out);
    let p = MatRef::from_column_major_slice(term.basis, n_out, k);
    let mut inside = Mat::<f32>::zeros(rank, k);
    matmul(inside.as_mut(), Accum::Replace, bt, p, 1.0, Par::Seq);
    let grad = MatMut::from_column_major_slice_mut(term.grad, rank, n_out);
    matmul(
        grad,
        Accum::Add,
        inside.as_ref(),
        p.transpose(),
        2.0 * scale,
        Par::Seq,
    );
    Ok(inside
        .col_iter()
        .flat_map(|c| c.iter())
        .map(|&v| f64::from(v).powi(2))
        .sum())
}

/// [`rol_term`] over all tensors, on all rayon workers: `scale` is λ·[`RolNorm::factor`]. Gives
/// the plain sum Σ ‖BᵀP‖², added in the order of `terms`, so it does not depend on the threads.
pub fn rol(terms: &mut [RolTerm<'_>], scale: f32) -> Result<f64, ProjectError> {
    let values: Result<Vec<f64>, _> = terms
        .par_iter_mut()
        .with_max_len(1)
        .map(|term| rol_term(term, scale))
        .collect();
    Ok(values?.iter().sum())
}
