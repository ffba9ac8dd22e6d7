//! Second moments H [n_in, n_in] of a layer's inputs, and the factor that error feedback runs on.
//!
//! H + damping = V·Vᵀ with V upper triangular; U = V·diag(V)⁻¹ is unit upper triangular and
//! D = diag(V)². For a row of errors e
//!
//!   e·H·eᵀ = Σ_k D_k·(e_k + Σ_{j<k} e_j·U_jk)²
//!
//! so a code chosen at column k can make up for all earlier errors through U_jk. This is LDLQ
//! (QuIP, arXiv 2307.13304, section 3); it rounds as GPTQ (arXiv 2210.17323) does with
//! chol(H⁻¹)ᵀ, whose inverse V is (QuIP, theorem 6), and needs no inverse.

use super::error::RoundError;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::{Mat, Par};

/// H and its factor: 8·n_in² bytes, and another 8·n_in² while it is made.
pub struct Factor {
    pub(super) n_in: usize,
    /// H with damping [n_in, n_in].
    pub(super) h: Vec<f32>,
    /// U [n_in, n_in], row j holds U_jk; 1 on the diagonal, 0 below.
    pub(super) unit: Vec<f32>,
    /// D [n_in].
    pub(super) d: Vec<f32>,
    /// Largest |H_jk| beside the diagonal, per row [n_in].
    pub(super) coupling: Vec<f32>,
}

impl Factor {
    /// Factor `h` [n_in, n_in] (symmetric) with `damping` times its mean diagonal added to the
    /// diagonal. Moments that are all zero stand for the identity.
    ///
    /// # Errors
    /// A slice of another length, a value that is not finite, a matrix that is not positive
    /// definite in spite of the damping.
    pub fn new(h: &[f32], n_in: usize, damping: f64) -> Result<Self, RoundError> {
        check(h, n_in)?;
        let mean = trace(h, n_in) / n_in.max(1) as f64;
        let ridge = if mean == 0.0 { 1.0 } else { damping * mean };
        // Reversed in both directions, the lower factor L of A becomes the upper one of H.
        let last = n_in.saturating_sub(1);
        let mut a = Mat::<f64>::from_fn(n_in, n_in, |i, j| {
            let (i, j) = (last - i, last - j);
            let mean = 0.5 * (f64::from(h[i * n_in + j]) + f64::from(h[j * n_in + i]));
            if i == j { mean + ridge } else { mean }
        });
        let damped = |i: usize, j: usize| a[(last - i, last - j)] as f32;
        let mut kept = vec![0f32; n_in * n_in];
        for (i, row) in kept.chunks_exact_mut(n_in.max(1)).enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                *v = damped(i, j);
            }
        }
        // On this thread: the result must not depend on their number, and a caller with many
        // tensors factors several at once.
        let scratch = cholesky_in_place_scratch::<f64>(n_in, Par::Seq, Default::default());
        cholesky_in_place(
            a.as_mut(),
            Default::default(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        )
        .map_err(|_| RoundError::NotPositive { n_in, damping })?;
        let diagonal: Vec<f64> = (0..n_in).map(|k| a[(last - k, last - k)]).collect();
        if !diagonal.iter().all(|d| d.is_finite() && *d > 0.0) {
            return Err(RoundError::NotPositive { n_in, damping });
        }
        let mut unit = vec![0f32; n_in * n_in];
        for (j, row) in unit.chunks_exact_mut(n_in.max(1)).enumerate() {
            row[j] = 1.0;
            for (k, u) in row.iter_mut().enumerate().skip(j + 1) {
                *u = (a[(last - j, last - k)] / diagonal[k]) as f32;
            }
        }
        let coupling = kept
            .chunks_exact(n_in.max(1))
            .enumerate()
            .map(|(j, row)| {
                let beside = row.iter().enumerate().filter(|(k, _)| *k != j);
                beside.fold(0f32, |m, (_, h)| m.max(h.abs()))
            })
            .collect();
        Ok(Self {
            n_in,
            coupling,
            h: kept,
            unit,
            d: diagonal.iter().map(|d| (d * d) as f32).collect(),
        })
    }

    /// Input width.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// The damped second moments [n_in, n_in].
    pub fn moments(&self) -> &[f32] {
        &self.h
    }
}

/// What feedback should keep small: H_R/tr(H_R) + `lambda`·H_F/tr(H_F), for the inputs of what is
/// kept and of what is forgotten, both [n_in, n_in]. Moments with trace 0 add nothing.
///
/// # Errors
/// Slices of another length, values that are not finite.
pub fn mix(
    retain: &[f32],
    forget: &[f32],
    n_in: usize,
    lambda: f64,
) -> Result<Vec<f32>, RoundError> {
    check(retain, n_in)?;
    check(forget, n_in)?;
    let scale = |h: &[f32], weight: f64| match trace(h, n_in) {
        0.0 => 0.0,
        t => weight / t,
    };
    let (r, f) = (scale(retain, 1.0), scale(forget, lambda));
    // Trace n_in: entries stay near 1 whatever the width.
    let unit = n_in as f64;
    Ok(retain
        .iter()
        .zip(forget)
        .map(|(a, b)| (unit * (r * f64::from(*a) + f * f64::from(*b))) as f32)
        .collect())
}

pub(super) fn check(h: &[f32], n_in: usize) -> Result<(), RoundError> {
    if h.len() != n_in * n_in {
        return Err(RoundError::Length {
            what: "second moments",
            wanted: n_in * n_in,
            found: h.len(),
        });
    }
    match h.iter().position(|v| !v.is_finite()) {
        Some(at) => Err(RoundError::NotFinite {
            what: "the second moment",
            row: at / n_in,
            column: at % n_in,
        }),
        None => Ok(()),
    }
}

pub(super) fn trace(h: &[f32], n_in: usize) -> f64 {
    h.iter().step_by(n_in + 1).map(|&v| f64::from(v)).sum()
}
