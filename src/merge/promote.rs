//! W_q + ΔW in another type than W_q has, or on fresh scales of its own: ggml's encoder chooses
//! the scales, then error feedback the codes.

use super::error::RoundError;
use super::factor::Factor;
use super::feedback::{Rounded, Search, round_rows};
use super::grid::{Cells, Grid};
use super::refine::refine;
use crate::ggml::{dequantize, quantize};
use crate::gguf::GgmlType;
use rayon::prelude::*;

/// Rows encoded at a time.
const CHUNK_ROWS: usize = 64;

/// Encode whole rows `bytes` of type `from`, with `update` added, as `to`. `importance` \[n_in\]
/// weighs columns for the encoder (an imatrix, or the diagonal of H); with `factor` codes are
/// then chosen by [`round_rows`] on the new scales. `to` must have a grid.
///
/// # Errors
/// Types that ggml does not decode or encode, rows that are no blocks of either, and what
/// [`round_rows`] refuses.
///
/// Where `to` has the levels of `from` among its own, only the update is rounded.
pub fn promote_rows(
    (from, bytes): (GgmlType, &[u8]),
    to: GgmlType,
    n_in: usize,
    update: &(dyn Fn(usize, &mut [f32]) + Sync),
    importance: Option<&[f32]>,
    factor: Option<&Factor>,
    search: Search,
) -> Result<(Vec<u8>, Rounded), RoundError> {
    let row_bytes = match from.row_bytes(n_in as u64) {
        Some(b) if b > 0 => b as usize,
        _ => return Err(RoundError::RowLength { ty: from, n_in }),
    };
    if !bytes.len().is_multiple_of(row_bytes) {
        return Err(RoundError::Length {
            what: "bytes of whole rows",
            wanted: bytes.len().next_multiple_of(row_bytes),
            found: bytes.len(),
        });
    }
    let grid = Grid::new(to, n_in)?;
    let wanted = |first: usize, rows: usize| -> Result<Vec<f32>, RoundError> {
        let mut values = vec![0f32; rows * n_in];
        let range = first * row_bytes..(first + rows) * row_bytes;
        dequantize(from.id(), &bytes[range], &mut values)?;
        for (r, row) in values.chunks_exact_mut(n_in).enumerate() {
            update(first + r, row);
        }
        Ok(values)
    };
    if let Some(mut out) = refine(from, to, bytes) {
        let done = round_rows(&grid, &mut out, update, factor, search)?;
        return Ok((out, done));
    }
    let n_rows = bytes.len() / row_bytes;
    let chunks: Result<Vec<Vec<u8>>, RoundError> = (0..n_rows)
        .into_par_iter()
        .step_by(CHUNK_ROWS)
        .map(|first| {
            let values = wanted(first, CHUNK_ROWS.min(n_rows - first))?;
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(RoundError::NotFinite {
                    what: "the updated weight",
                    row: first + at / n_in,
                    column: at % n_in,
                });
            }
            Ok(quantize(to.id(), &values, n_in, importance)?)
        })
        .collect();
    let mut out = chunks?.concat();
    if factor.is_none() {
        return Ok((out, Rounded::default()));
    }
    let encoded = out.clone();
    // What the encoder lost is the update of what it wrote.
    let rest = |r: usize, row: &mut [f32]| {
        let mut cells = Cells::default();
        let range = r * grid.row_bytes()..(r + 1) * grid.row_bytes();
        let decoded = grid.decode(&encoded[range], &mut cells);
        match (decoded, wanted(r, 1)) {
            (Ok(()), Ok(wanted)) => {
                for (v, (w, e)) in row.iter_mut().zip(wanted.iter().zip(&cells.value)) {
                    *v += w - e;
                }
            }
            // Refused by `round_rows` with its place.
            _ => row.fill(f32::NAN),
        }
    };
    let done = round_rows(&grid, &mut out, &rest, factor, search)?;
    Ok((out, done))
}

#[cfg(test)]
#[allow(clippy::needless_range_loop, reason = "written as the formulas are")]
mod tests {
    use super::*;
    use crate::merge::grid::tests::random_blocks;
    use crate::merge::measure::{Merged, Moments, measure};
    use crate::rng::SplitMix64;

    #[test]
    fn feedback_makes_a_promotion_better_than_encoding_alone() {
        let (n, rows) = (256, 70);
        let mut rng = SplitMix64(1);
        let bytes = random_blocks(GgmlType::Q4_K, rows, &mut rng);
        let mut h = vec![0f32; n * n];
        for i in 0..2 * n {
            let strength = 10.0 / (1.0 + i as f32);
            let x: Vec<f32> = (0..n).map(|_| strength * rng.normal()).collect();
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += x[i] * x[j];
                }
            }
        }
        let factor = Factor::new(h.clone(), n, 0.01).unwrap();
        let delta: Vec<f32> = (0..n).map(|_| 2e-3 * rng.normal()).collect();
        let update = |_: usize, row: &mut [f32]| {
            for (v, d) in row.iter_mut().zip(&delta) {
                *v += d;
            }
        };
        let err = |factor| {
            let (after, _) = promote_rows(
                (GgmlType::Q4_K, &bytes),
                GgmlType::Q6_K,
                n,
                &update,
                None,
                factor,
                Search::default(),
            )
            .unwrap();
            assert_eq!(after.len(), rows * 210);
            let merged = Merged {
                before: (GgmlType::Q4_K, &bytes),
                after: (GgmlType::Q6_K, &after),
                n_in: n,
                update: &update,
            };
            measure(&merged, Moments::Full(&h), Moments::Full(&h))
                .unwrap()
                .err_f()
        };
        let (encoded, fed) = (err(None), err(Some(&factor)));
        assert!(fed < 0.3 * encoded, "{fed} {encoded}");
    }
}
