//! How much of an update a merge loses, on second moments it was not fitted to.
//!
//! E = W_q + ΔW − W' for the merged tensor W' (of any type). On inputs x with moments H = Σ x·xᵀ
//!
//! - err = tr(E·H_F·Eᵀ)/tr(ΔW·H_F·ΔWᵀ), the share of the update's effect on what is forgotten
//!   that is lost: 0 kept whole, 1 as if nothing had been merged;
//! - noise = tr(E·H_R·Eᵀ)/tr(W·H_R·Wᵀ), what the merge adds to outputs on what is kept.

use super::error::RoundError;
use super::factor::check;
use super::grid::{Cells, Grid};
use crate::ggml::dequantize;
use crate::gguf::GgmlType;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

const TILE_ROWS: usize = 64;

/// Second moments of a layer's inputs.
#[derive(Debug, Clone, Copy)]
pub enum Moments<'a> {
    /// H [n_in, n_in].
    Full(&'a [f32]),
    /// Its diagonal \[n_in\], as an imatrix has it: inputs are taken for uncorrelated.
    Diagonal(&'a [f32]),
    /// X·Xᵀ/n + diag(rest) for columns X [n_in, columns], never formed: what captured inputs and
    /// sketches are, at a fraction of H's size.
    Sum {
        /// X.
        columns: &'a [f32],
        /// n.
        n: f64,
        /// Added to the diagonal \[n_in\]; empty: nothing.
        rest: &'a [f32],
    },
}

/// Rows of one tensor before and after.
#[derive(Clone, Copy)]
pub struct Merged<'a> {
    /// The base's grid or any other type ggml decodes.
    pub before: (GgmlType, &'a [u8]),
    /// The merged rows.
    pub after: (GgmlType, &'a [u8]),
    /// Row length.
    pub n_in: usize,
    /// Adds a row of ΔW to a slice \[n_in\].
    pub update: &'a (dyn Fn(usize, &mut [f32]) + Sync),
}

/// Sums of squares; ratios by the methods.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measured {
    /// ‖W_q‖².
    pub weight: f64,
    /// ‖ΔW‖².
    pub update: f64,
    /// tr(E·H_F·Eᵀ).
    pub forget_error: f64,
    /// tr(ΔW·H_F·ΔWᵀ).
    pub forget_effect: f64,
    /// tr(E·H_R·Eᵀ).
    pub retain_error: f64,
    /// tr(W_q·H_R·W_qᵀ).
    pub retain_output: f64,
}

impl Measured {
    /// ‖ΔW‖/‖W‖.
    pub fn relative_norm(&self) -> f64 {
        ratio(self.update, self.weight).sqrt()
    }

    /// Share of the update's effect that is lost; 0 where there is none to lose.
    pub fn err_f(&self) -> f64 {
        ratio(self.forget_error, self.forget_effect)
    }

    /// Noise on what is kept.
    pub fn retain_noise(&self) -> f64 {
        ratio(self.retain_error, self.retain_output)
    }

    fn plus(self, o: Self) -> Self {
        Self {
            weight: self.weight + o.weight,
            update: self.update + o.update,
            forget_error: self.forget_error + o.forget_error,
            forget_effect: self.forget_effect + o.forget_effect,
            retain_error: self.retain_error + o.retain_error,
            retain_output: self.retain_output + o.retain_output,
        }
    }
}

fn ratio(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / b }
}

/// Measure a merged tensor on the moments of forget and retain inputs.
///
/// # Errors
/// Rows or moments of another length; types ggml does not decode.
pub fn measure(
    merged: &Merged<'_>,
    forget: Moments<'_>,
    retain: Moments<'_>,
) -> Result<Measured, RoundError> {
    let n = merged.n_in;
    for h in [forget, retain] {
        match h {
            Moments::Full(h) => check(h, n)?,
            Moments::Diagonal(d) if d.len() == n => {}
            Moments::Sum { columns, rest, .. } => {
                if !columns.len().is_multiple_of(n) {
                    return Err(RoundError::Length {
                        what: "inputs of whole columns",
                        wanted: columns.len().next_multiple_of(n),
                        found: columns.len(),
                    });
                }
                if !rest.is_empty() && rest.len() != n {
                    return Err(RoundError::Length {
                        what: "the diagonal of the second moments",
                        wanted: n,
                        found: rest.len(),
                    });
                }
            }
            Moments::Diagonal(d) => {
                return Err(RoundError::Length {
                    what: "the diagonal of the second moments",
                    wanted: n,
                    found: d.len(),
                });
            }
        }
    }
    let (before, n_rows) = rows(merged.before, n)?;
    let (after, found) = rows(merged.after, n)?;
    if n_rows != found {
        return Err(RoundError::Length {
            what: "merged rows",
            wanted: n_rows,
            found,
        });
    }
    let tiles: Result<Vec<Measured>, RoundError> = (0..n_rows)
        .into_par_iter()
        .step_by(TILE_ROWS)
        .map(|first| {
            let end = (first + TILE_ROWS).min(n_rows);
            let w = decode(merged.before.0, &before, first..end, n)?;
            let mut delta = vec![0f32; w.len()];
            for (r, row) in delta.chunks_exact_mut(n).enumerate() {
                (merged.update)(first + r, row);
            }
            let mut error = decode(merged.after.0, &after, first..end, n)?;
            for (e, (w, d)) in error.iter_mut().zip(w.iter().zip(&delta)) {
                *e = (w - *e) + d;
            }
            let square = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum();
            Ok(Measured {
                weight: square(&w),
                update: square(&delta),
                forget_error: quadratic(&error, forget, n),
                forget_effect: quadratic(&delta, forget, n),
                retain_error: quadratic(&error, retain, n),
                retain_output: quadratic(&w, retain, n),
            })
        })
        .collect();
    Ok(tiles?.into_iter().fold(Measured::default(), Measured::plus))
}

struct Rows<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
}

fn rows((ty, bytes): (GgmlType, &[u8]), n_in: usize) -> Result<(Rows<'_>, usize), RoundError> {
    let row_bytes = match ty.row_bytes(n_in as u64) {
        Some(b) if b > 0 => b as usize,
        _ => return Err(RoundError::RowLength { ty, n_in }),
    };
    if !bytes.len().is_multiple_of(row_bytes) {
        return Err(RoundError::Length {
            what: "bytes of whole rows",
            wanted: bytes.len().next_multiple_of(row_bytes),
            found: bytes.len(),
        });
    }
    Ok((Rows { bytes, row_bytes }, bytes.len() / row_bytes))
}

/// Our own decoding where there is a grid (E is then exactly 0 where no code changed and no update
/// was asked for, and agrees with what was rounded), ggml's elsewhere.
fn decode(
    ty: GgmlType,
    rows: &Rows<'_>,
    range: std::ops::Range<usize>,
    n_in: usize,
) -> Result<Vec<f32>, RoundError> {
    let bytes = &rows.bytes[range.start * rows.row_bytes..range.end * rows.row_bytes];
    if let Ok(grid) = Grid::new(ty, n_in) {
        let mut cells = Cells::default();
        grid.decode(bytes, &mut cells)?;
        return Ok(cells.value);
    }
    let mut out = vec![0f32; range.len() * n_in];
    dequantize(ty.id(), bytes, &mut out)?;
    Ok(out)
}

/// tr(X·H·Xᵀ) for rows X [n, rows].
fn quadratic(x: &[f32], h: Moments<'_>, n: usize) -> f64 {
    match h {
        Moments::Diagonal(d) => x
            .chunks_exact(n)
            .flat_map(|row| row.iter().zip(d))
            .map(|(v, d)| f64::from(*v).powi(2) * f64::from(*d))
            .sum(),
        Moments::Sum {
            columns,
            n: n_tokens,
            rest,
        } => {
            let (rows, k) = (x.len() / n, columns.len() / n);
            let mut outputs = vec![0f32; rows * k];
            matmul(
                MatMut::from_column_major_slice_mut(&mut outputs, k, rows),
                Accum::Replace,
                MatRef::from_row_major_slice(columns, k, n),
                MatRef::from_column_major_slice(x, n, rows),
                1.0,
                Par::Seq,
            );
            let sum: f64 = outputs.iter().map(|y| f64::from(*y).powi(2)).sum();
            sum / n_tokens + quadratic(x, Moments::Diagonal(rest), n)
        }
        Moments::Full(h) => {
            let rows = x.len() / n;
            let mut product = vec![0f32; x.len()];
            matmul(
                MatMut::from_row_major_slice_mut(&mut product, rows, n),
                Accum::Replace,
                MatRef::from_row_major_slice(x, rows, n),
                MatRef::from_row_major_slice(h, n, n),
                1.0,
                Par::Seq,
            );
            x.iter()
                .zip(&product)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        }
    }
}

#[cfg(test)]
#[allow(clippy::needless_range_loop, reason = "written as the formulas are")]
mod tests {
    use super::*;
    use crate::merge::grid::tests::random_blocks;
    use crate::rng::SplitMix64;

    const N: usize = 64;
    const ROWS: usize = 70;

    fn moments(rng: &mut SplitMix64) -> Vec<f32> {
        let x: Vec<f32> = (0..N * N).map(|_| rng.normal()).collect();
        let mut h = vec![0f32; N * N];
        for x in x.chunks_exact(N) {
            for i in 0..N {
                for j in 0..N {
                    h[i * N + j] += x[i] * x[j];
                }
            }
        }
        h
    }

    #[test]
    fn sums_agree_with_the_definition() {
        let mut rng = SplitMix64(1);
        let (hf, hr) = (moments(&mut rng), moments(&mut rng));
        let before = random_blocks(GgmlType::Q4_0, ROWS * N / 32, &mut rng);
        let after = random_blocks(GgmlType::Q8_0, ROWS * N / 32, &mut rng);
        let delta: Vec<f32> = (0..N * ROWS).map(|_| 0.01 * rng.normal()).collect();
        let update = |r: usize, row: &mut [f32]| {
            for (v, d) in row.iter_mut().zip(&delta[r * N..]) {
                *v += d;
            }
        };
        let merged = Merged {
            before: (GgmlType::Q4_0, &before),
            after: (GgmlType::Q8_0, &after),
            n_in: N,
            update: &update,
        };
        let found = measure(&merged, Moments::Full(&hf), Moments::Full(&hr)).unwrap();
        let (mut w, mut m) = (vec![0f32; N * ROWS], vec![0f32; N * ROWS]);
        dequantize(GgmlType::Q4_0.id(), &before, &mut w).unwrap();
        dequantize(GgmlType::Q8_0.id(), &after, &mut m).unwrap();
        let e: Vec<f32> = (0..N * ROWS).map(|i| w[i] + delta[i] - m[i]).collect();
        let naive = |x: &[f32], h: &[f32]| {
            let mut sum = 0f64;
            for x in x.chunks_exact(N) {
                for i in 0..N {
                    for j in 0..N {
                        sum += f64::from(x[i]) * f64::from(h[i * N + j]) * f64::from(x[j]);
                    }
                }
            }
            sum
        };
        for (found, wanted) in [
            (found.forget_error, naive(&e, &hf)),
            (found.forget_effect, naive(&delta, &hf)),
            (found.retain_error, naive(&e, &hr)),
            (found.retain_output, naive(&w, &hr)),
        ] {
            assert!((found - wanted).abs() < 1e-4 * wanted, "{found} {wanted}");
        }
        // A diagonal is the full matrix without its other entries.
        let d: Vec<f32> = hf.iter().step_by(N + 1).copied().collect();
        let mut full = vec![0f32; N * N];
        for (i, d) in d.iter().enumerate() {
            full[i * N + i] = *d;
        }
        let a = measure(&merged, Moments::Diagonal(&d), Moments::Full(&hr)).unwrap();
        let b = measure(&merged, Moments::Full(&full), Moments::Full(&hr)).unwrap();
        assert!((a.err_f() - b.err_f()).abs() < 1e-5 * b.err_f());
    }

    #[test]
    fn moments_that_are_never_formed_measure_as_formed_ones() {
        let mut rng = SplitMix64(4);
        let bytes = random_blocks(GgmlType::Q4_0, ROWS * N / 32, &mut rng);
        let columns: Vec<f32> = (0..9 * N).map(|_| rng.normal()).collect();
        let rest: Vec<f32> = (0..N).map(|_| rng.uniform()).collect();
        let mut h = vec![0f32; N * N];
        for x in columns.chunks_exact(N) {
            for i in 0..N {
                for j in 0..N {
                    h[i * N + j] += x[i] * x[j] / 9.0;
                }
            }
        }
        for i in 0..N {
            h[i * N + i] += rest[i];
        }
        let some = |_: usize, row: &mut [f32]| row[3] += 0.1;
        let merged = Merged {
            before: (GgmlType::Q4_0, &bytes),
            after: (GgmlType::Q4_0, &bytes),
            n_in: N,
            update: &some,
        };
        let sum = Moments::Sum {
            columns: &columns,
            n: 9.0,
            rest: &rest,
        };
        let a = measure(&merged, sum, sum).unwrap();
        let b = measure(&merged, Moments::Full(&h), Moments::Full(&h)).unwrap();
        assert!((a.forget_effect / b.forget_effect - 1.0).abs() < 1e-5);
        assert!((a.retain_output / b.retain_output - 1.0).abs() < 1e-5);
        let short = Moments::Sum {
            columns: &columns[1..],
            n: 9.0,
            rest: &[],
        };
        assert!(measure(&merged, short, sum).is_err());
    }

    #[test]
    fn an_unmerged_update_is_lost_and_none_costs_nothing() {
        let mut rng = SplitMix64(2);
        let h = moments(&mut rng);
        let bytes = random_blocks(GgmlType::Q5_1, ROWS * N / 32, &mut rng);
        let some = |_: usize, row: &mut [f32]| row.iter_mut().for_each(|v| *v += 1e-3);
        let none = |_: usize, _: &mut [f32]| {};
        let with = |update: &(dyn Fn(usize, &mut [f32]) + Sync)| {
            let merged = Merged {
                before: (GgmlType::Q5_1, &bytes),
                after: (GgmlType::Q5_1, &bytes),
                n_in: N,
                update,
            };
            measure(&merged, Moments::Full(&h), Moments::Full(&h)).unwrap()
        };
        assert_eq!(with(&some).err_f(), 1.0);
        assert_eq!(
            (with(&none).err_f(), with(&none).retain_noise()),
            (0.0, 0.0)
        );
        assert_eq!(with(&none).relative_norm(), 0.0);
    }

    #[test]
    fn shapes_that_differ_are_refused() {
        let bytes = random_blocks(GgmlType::Q4_0, 4, &mut SplitMix64(3));
        let none = |_: usize, _: &mut [f32]| {};
        let merged = |after, n_in| Merged {
            before: (GgmlType::Q4_0, &bytes),
            after: (GgmlType::Q4_0, after),
            n_in,
            update: &none,
        };
        let d = [1.0; 64];
        let go = |m: Merged<'_>, d| measure(&m, Moments::Diagonal(d), Moments::Diagonal(d));
        assert!(go(merged(&bytes, 64), &d).is_ok());
        assert!(go(merged(&bytes[..36], 64), &d).is_err());
        assert!(go(merged(&bytes, 48), &d[..48]).is_err());
        assert!(go(merged(&bytes, 64), &d[..63]).is_err());
    }
}
