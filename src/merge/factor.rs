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
use faer::{MatMut, MatRef, Par};

/// Columns and rows turned over at a time: two tiles in cache.
const TILE: usize = 64;

/// H and its factor: 8·n_in² bytes, and another 4·n_in² (the caller's H) while it is made.
///
/// The factorisation runs in place, in f64; what it leaves is rounded where it lies, so that row j
/// of the buffer ends as row j of H and then of U: two rows of f32 for one of f64.
pub struct Factor {
    pub(super) n_in: usize,
    /// Rows of H with damping and of U in turn, as f32 [2·n_in, n_in].
    rows: Vec<f64>,
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
    pub fn new(mut h: Vec<f32>, n_in: usize, damping: f64) -> Result<Self, RoundError> {
        check(&h, n_in)?;
        let mean = trace(&h, n_in) / n_in.max(1) as f64;
        let ridge = if mean == 0.0 { 1.0 } else { damping * mean };
        // Reversed in both directions, the lower factor L of A becomes the upper one of H. To
        // reverse both is to reverse the buffer.
        let mut a = vec![0f64; n_in * n_in];
        for i in 0..n_in {
            for j in i..n_in {
                let (ij, ji) = (i * n_in + j, j * n_in + i);
                let mut v = 0.5 * (f64::from(h[ij]) + f64::from(h[ji]));
                if i == j {
                    v += ridge;
                }
                // All that faer reads.
                a[ji] = v;
                (h[ij], h[ji]) = (v as f32, v as f32);
            }
        }
        a.reverse();
        // On this thread: the result must not depend on their number, and a caller with many
        // tensors factors several at once.
        let scratch = cholesky_in_place_scratch::<f64>(n_in, Par::Seq, Default::default());
        cholesky_in_place(
            MatMut::from_column_major_slice_mut(&mut a, n_in, n_in),
            Default::default(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        )
        .map_err(|_| RoundError::NotPositive { n_in, damping })?;
        a.reverse();
        let diagonal: Vec<f64> = a.iter().step_by(n_in + 1).copied().collect();
        if !diagonal.iter().all(|d| d.is_finite() && *d > 0.0) {
            return Err(RoundError::NotPositive { n_in, damping });
        }
        transpose_lower(&mut a, n_in);
        let mut coupling = Vec::with_capacity(n_in);
        let mut unit = vec![0f32; n_in];
        for j in 0..n_in {
            let h = &h[j * n_in..(j + 1) * n_in];
            let beside = h.iter().enumerate().filter(|(k, _)| *k != j);
            coupling.push(beside.fold(0f32, |m, (_, h)| m.max(h.abs())));
            let row = &mut a[j * n_in..(j + 1) * n_in];
            unit[..j].fill(0.0);
            unit[j] = 1.0;
            for k in j + 1..n_in {
                unit[k] = (row[k] / diagonal[k]) as f32;
            }
            let (h_row, unit_row) = bytemuck::cast_slice_mut(row).split_at_mut(n_in);
            h_row.copy_from_slice(h);
            unit_row.copy_from_slice(&unit);
        }
        Ok(Self {
            n_in,
            rows: a,
            d: diagonal.iter().map(|d| (d * d) as f32).collect(),
            coupling,
        })
    }

    /// Input width.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// The damped second moments [n_in, n_in], copied.
    pub fn moments(&self) -> Vec<f32> {
        (0..self.n_in)
            .flat_map(|j| self.h_row(j))
            .copied()
            .collect()
    }

    fn row(&self, j: usize) -> &[f32] {
        bytemuck::cast_slice(&self.rows[j * self.n_in..(j + 1) * self.n_in])
    }

    /// Row j of H with damping [n_in].
    pub(super) fn h_row(&self, j: usize) -> &[f32] {
        &self.row(j)[..self.n_in]
    }

    /// H with damping.
    pub(super) fn h(&self) -> MatRef<'_, f32> {
        let (n, rows) = (self.n_in, bytemuck::cast_slice::<f64, f32>(&self.rows));
        MatRef::from_row_major_slice_with_stride(rows, n, n, 2 * n)
    }

    /// Row j of U [n_in]; 1 on the diagonal, 0 before.
    pub(super) fn unit_row(&self, j: usize) -> &[f32] {
        &self.row(j)[self.n_in..]
    }

    /// U.
    pub(super) fn unit(&self) -> MatRef<'_, f32> {
        let (n, rows) = (self.n_in, bytemuck::cast_slice::<f64, f32>(&self.rows));
        // Of the last row nothing follows U.
        let from_u = rows.get(n..).unwrap_or_default();
        MatRef::from_row_major_slice_with_stride(from_u, n, n, 2 * n)
    }
}

/// Row-major, the lower triangle onto the upper one.
fn transpose_lower(a: &mut [f64], n: usize) {
    for top in (0..n).step_by(TILE) {
        for left in (0..=top).step_by(TILE) {
            for i in top..(top + TILE).min(n) {
                for j in left..(left + TILE).min(i) {
                    a[j * n + i] = a[i * n + j];
                }
            }
        }
    }
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
