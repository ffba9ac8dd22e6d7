//! Rounding W_q + ΔW onto the grid W_q sits on, so that the outputs change as ΔW would change
//! them.
//!
//! Per row, with t = w_q + Δw and errors e = t − ŵ, the loss is e·H·eᵀ. Columns are rounded in
//! their natural order, each to the code nearest to t_k + Σ_{j<k} e_j·U_jk (see
//! [`super::factor`]); then coordinate descent changes single codes while that lowers the loss
//! (`descent.rs`). A row that plain rounding serves better takes plain rounding as its
//! start, so the loss is never above plain rounding's. Source: MERGE, after GPTQ (arXiv
//! 2210.17323) and QuIP (arXiv 2307.13304).
//!
//! Rows are independent: tiles of them run in parallel, each sequential in itself, and the result
//! is the same for any number of threads. About 4·n_in² flops a row, nearly all in products of
//! matrices.

use super::descent::Row;
use super::error::RoundError;
use super::factor::Factor;
use super::grid::{Cells, Grid};
use super::refit::best_factors;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows of a tile: enough to make products of matrices, few enough to stay in cache.
const TILE_ROWS: usize = 64;
/// Columns rounded one by one before their errors go on to all later ones as one product.
const BLOCK: usize = 32;
/// Columns of a product elsewhere.
const WIDE: usize = 256;

/// How far to look for codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Search {
    /// Most passes of coordinate descent.
    pub passes: usize,
    /// Most passes over pairs of codes, after that.
    pub pair_passes: usize,
    /// How often the blocks' scales are fitted to the codes and descent begins again. With 0 only
    /// code bits change.
    pub refits: usize,
}

impl Default for Search {
    fn default() -> Self {
        Self {
            passes: 20,
            pair_passes: 0,
            refits: 0,
        }
    }
}

/// What rounding did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rounded {
    /// Elements whose code changed.
    pub n_changed: usize,
    /// Elements in all.
    pub n_elements: usize,
    /// Codes moved by coordinate descent, some of them back and forth.
    pub n_moves: usize,
    /// Rows for which feedback was no better than plain rounding.
    pub n_plain: usize,
    /// tr(E·H·Eᵀ) on the damped moments; 0 without moments.
    pub loss: f64,
}

impl Rounded {
    fn plus(self, o: Self) -> Self {
        Self {
            n_changed: self.n_changed + o.n_changed,
            n_elements: self.n_elements + o.n_elements,
            n_moves: self.n_moves + o.n_moves,
            n_plain: self.n_plain + o.n_plain,
            loss: self.loss + o.loss,
        }
    }
}

/// Round W_q + ΔW onto the grid of `bytes`, whole rows of W_q, in place: only code bits change.
/// `update` adds a row of ΔW (numbered from the first row of `bytes`) to a slice \[n_in\].
/// Without `factor` every element takes its nearest code.
///
/// # Errors
/// Rows or moments of another length; weights or updates that are not finite. `bytes` is then
/// partly written.
pub fn round_rows(
    grid: &Grid,
    bytes: &mut [u8],
    update: &(dyn Fn(usize, &mut [f32]) + Sync),
    factor: Option<&Factor>,
    search: Search,
) -> Result<Rounded, RoundError> {
    grid.n_rows(bytes)?;
    if let Some(f) = factor
        && f.n_in != grid.n_in()
    {
        return Err(RoundError::Length {
            what: "second moments",
            wanted: grid.n_in(),
            found: f.n_in,
        });
    }
    let tiles: Result<Vec<Rounded>, RoundError> = bytes
        .par_chunks_mut(TILE_ROWS * grid.row_bytes())
        .enumerate()
        .map_init(Tile::default, |tile, (t, bytes)| {
            tile.load(grid, bytes, t * TILE_ROWS, update)?;
            let mut done = Rounded::default();
            match factor {
                None => tile.plain(grid),
                Some(f) => {
                    tile.sweep(grid, f);
                    done.n_plain = tile.keep_plain(grid, f);
                    done.loss = tile.loss(f);
                    if search.passes > 0 {
                        tile.gradient(f);
                        let (n_moves, gain) = tile.descend(grid, f, search);
                        done.n_moves = n_moves;
                        done.loss -= gain;
                    }
                    for _ in 0..search.refits {
                        if !tile.refit(grid, f, bytes)? {
                            break;
                        }
                        done.loss = tile.exact_loss();
                        let (n_moves, gain) = tile.descend(grid, f, search);
                        done.n_moves += n_moves;
                        done.loss -= gain;
                    }
                }
            }
            done.n_elements = tile.code.len();
            grid.encode(&tile.code, bytes)?;
            let codes = tile.code.iter().zip(&tile.before);
            done.n_changed = codes.filter(|(now, before)| now != before).count();
            Ok(done)
        })
        .collect();
    Ok(tiles?.into_iter().fold(Rounded::default(), Rounded::plus))
}

/// Rows being rounded; every matrix is [n_in, rows].
#[derive(Default)]
struct Tile {
    n: usize,
    cells: Cells,
    /// Codes of w_q.
    before: Vec<i32>,
    /// w_q + Δw.
    target: Vec<f32>,
    /// The target with the feedback of earlier errors.
    work: Vec<f32>,
    code: Vec<i32>,
    value: Vec<f32>,
    /// target − value.
    error: Vec<f32>,
    /// D_k·(e_k + Σ_{j<k} e_j·U_jk).
    residual: Vec<f32>,
    /// E·H.
    gradient: Vec<f32>,
}

impl Tile {
    fn load(
        &mut self,
        grid: &Grid,
        bytes: &[u8],
        first: usize,
        update: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<(), RoundError> {
        self.n = grid.n_in();
        grid.decode(bytes, &mut self.cells).map_err(|e| match e {
            RoundError::NotFinite { what, row, column } => RoundError::NotFinite {
                what,
                row: first + row,
                column,
            },
            e => e,
        })?;
        let len = self.cells.value.len();
        // Δw is summed apart, or the weight would swallow its small terms.
        self.target.clear();
        self.target.resize(len, 0.0);
        for (r, row) in self.target.chunks_exact_mut(self.n).enumerate() {
            update(first + r, row);
        }
        if let Some(at) = self.target.iter().position(|v| !v.is_finite()) {
            return Err(RoundError::NotFinite {
                what: "the update",
                row: first + at / self.n,
                column: at % self.n,
            });
        }
        for (t, w) in self.target.iter_mut().zip(&self.cells.value) {
            *t += w;
        }
        self.before.clone_from(&self.cells.code);
        self.work.clone_from(&self.target);
        self.code.resize(len, 0);
        self.value.resize(len, 0.0);
        self.error.resize(len, 0.0);
        self.residual.resize(len, 0.0);
        self.gradient.resize(len, 0.0);
        Ok(())
    }

    fn n_rows(&self) -> usize {
        self.code.len() / self.n
    }

    /// Every element to its nearest code.
    fn plain(&mut self, grid: &Grid) {
        for i in 0..self.code.len() {
            (self.code[i], self.value[i]) = grid.nearest(&self.cells, i, self.target[i]);
        }
    }

    /// Error feedback over all columns.
    fn sweep(&mut self, grid: &Grid, f: &Factor) {
        let n = self.n;
        for first in (0..n).step_by(BLOCK) {
            let end = (first + BLOCK).min(n);
            for r in 0..self.n_rows() {
                let row = r * n;
                for k in first..end {
                    let (i, wanted) = (row + k, self.work[row + k]);
                    let (code, value) = grid.nearest(&self.cells, i, wanted);
                    let e = self.target[i] - value;
                    (self.code[i], self.value[i], self.error[i]) = (code, value, e);
                    self.residual[i] = f.d[k] * (wanted - value);
                    if e != 0.0 {
                        let later = &mut self.work[i + 1..row + end];
                        for (w, u) in later.iter_mut().zip(&f.unit_row(k)[k + 1..]) {
                            *w += e * u;
                        }
                    }
                }
            }
            if end < n {
                let u = f.unit();
                let e = MatRef::from_row_major_slice(&self.error, self.code.len() / n, n);
                let rows = self.code.len() / n;
                let w = MatMut::from_row_major_slice_mut(&mut self.work, rows, n);
                matmul(
                    w.subcols_mut(end, n - end),
                    Accum::Add,
                    e.subcols(first, end - first),
                    u.submatrix(first, end, end - first, n - end),
                    1.0,
                    Par::Seq,
                );
            }
        }
    }

    /// Loss of row `r`.
    fn row_loss(&self, f: &Factor, r: usize) -> f64 {
        self.residual[r * self.n..(r + 1) * self.n]
            .iter()
            .zip(&f.d)
            .map(|(r, d)| f64::from(*r) * f64::from(*r) / f64::from(*d))
            .sum()
    }

    fn loss(&self, f: &Factor) -> f64 {
        (0..self.n_rows()).map(|r| self.row_loss(f, r)).sum()
    }

    /// Rows that plain rounding serves better take its codes; returns how many. The loss is a sum
    /// over columns: most often a few of them show that no row does.
    fn keep_plain(&mut self, grid: &Grid, f: &Factor) -> usize {
        let (n, rows) = (self.n, self.n_rows());
        let swept: Vec<f64> = (0..rows).map(|r| self.row_loss(f, r)).collect();
        let mut plain = vec![0f64; rows];
        // The work matrix is spent: it takes plain errors, the gradient plain residuals.
        let mut codes = vec![(0, 0f32); self.code.len()];
        for (i, c) in codes.iter_mut().enumerate() {
            *c = grid.nearest(&self.cells, i, self.target[i]);
            self.work[i] = self.target[i] - c.1;
        }
        for first in (0..n).step_by(WIDE) {
            let end = (first + WIDE).min(n);
            let u = f.unit();
            matmul(
                MatMut::from_row_major_slice_mut(&mut self.gradient, rows, n)
                    .subcols_mut(first, end - first),
                Accum::Replace,
                MatRef::from_row_major_slice(&self.work, rows, n).subcols(0, end),
                u.submatrix(0, first, end, end - first),
                1.0,
                Par::Seq,
            );
            for (r, sum) in plain.iter_mut().enumerate() {
                for k in first..end {
                    let y = f64::from(self.gradient[r * n + k]);
                    *sum += f64::from(f.d[k]) * y * y;
                }
            }
            if plain.iter().zip(&swept).all(|(p, s)| p >= s) {
                return 0;
            }
        }
        let mut better = 0;
        for r in (0..rows).filter(|&r| plain[r] < swept[r]) {
            better += 1;
            for k in 0..n {
                let i = r * n + k;
                (self.code[i], self.value[i]) = codes[i];
                self.error[i] = self.work[i];
                self.residual[i] = f.d[k] * self.gradient[i];
            }
        }
        better
    }

    /// E·H = residual·Uᵀ, of which only the upper triangle counts.
    fn gradient(&mut self, f: &Factor) {
        let (n, rows) = (self.n, self.n_rows());
        let u = f.unit();
        let y = MatRef::from_row_major_slice(&self.residual, rows, n);
        for first in (0..n).step_by(WIDE) {
            let wide = WIDE.min(n - first);
            matmul(
                MatMut::from_row_major_slice_mut(&mut self.gradient, rows, n)
                    .subcols_mut(first, wide),
                Accum::Replace,
                y.subcols(first, n - first),
                u.submatrix(first, first, wide, n - first).transpose(),
                1.0,
                Par::Seq,
            );
        }
    }

    /// Scales of `bytes` fitted to the codes, and everything that follows from them; false where
    /// there are none. A row that does not gain, because f16 is too coarse for it, stays as it is.
    fn refit(&mut self, grid: &Grid, f: &Factor, bytes: &mut [u8]) -> Result<bool, RoundError> {
        let Some((block_len, n_fields)) = grid.fields() else {
            return Ok(false);
        };
        grid.encode(&self.code, bytes)?;
        self.decoded(grid, f, bytes)?;
        let (n, row_bytes) = (self.n, grid.row_bytes());
        let before: Vec<f64> = (0..self.n_rows()).map(|r| self.exact_row_loss(r)).collect();
        let was = bytes.to_vec();
        let mut scaled = vec![0f32; n];
        for (r, row) in bytes.chunks_exact_mut(row_bytes).enumerate() {
            let own = r * n..(r + 1) * n;
            let values = self.value[own.clone()].iter();
            let offset = &self.cells.offset[own.clone()];
            for (s, (v, m)) in scaled.iter_mut().zip(values.zip(offset)) {
                *s = v - m;
            }
            let parts = [scaled.as_slice(), offset];
            let gradient = &self.gradient[own];
            if let Some(by) = best_factors(&parts[..n_fields], block_len, gradient, f) {
                grid.scale_fields(row, &by);
            }
        }
        self.decoded(grid, f, bytes)?;
        let lost = |r: &usize| self.exact_row_loss(*r) >= before[*r];
        let lost: Vec<usize> = (0..self.n_rows()).filter(lost).collect();
        for &r in &lost {
            let own = r * row_bytes..(r + 1) * row_bytes;
            bytes[own.clone()].copy_from_slice(&was[own]);
        }
        if !lost.is_empty() {
            self.decoded(grid, f, bytes)?;
        }
        Ok(true)
    }

    /// Cells, codes, values, errors and gradient of `bytes` as they are now.
    fn decoded(&mut self, grid: &Grid, f: &Factor, bytes: &[u8]) -> Result<(), RoundError> {
        grid.decode(bytes, &mut self.cells)?;
        self.code.clone_from(&self.cells.code);
        self.value.clone_from(&self.cells.value);
        let errors = self.target.iter().zip(&self.value);
        for (e, (t, v)) in self.error.iter_mut().zip(errors) {
            *e = t - v;
        }
        let (n, rows) = (self.n, self.n_rows());
        matmul(
            MatMut::from_row_major_slice_mut(&mut self.gradient, rows, n),
            Accum::Replace,
            MatRef::from_row_major_slice(&self.error, rows, n),
            f.h(),
            1.0,
            Par::Seq,
        );
        Ok(())
    }

    /// e·H·eᵀ of row `r`, as [`decoded`](Self::decoded) left it.
    fn exact_row_loss(&self, r: usize) -> f64 {
        let own = r * self.n..(r + 1) * self.n;
        let pairs = self.error[own.clone()].iter().zip(&self.gradient[own]);
        pairs.map(|(e, g)| f64::from(*e) * f64::from(*g)).sum()
    }

    fn exact_loss(&self) -> f64 {
        (0..self.n_rows()).map(|r| self.exact_row_loss(r)).sum()
    }

    fn descend(&mut self, grid: &Grid, f: &Factor, search: Search) -> (usize, f64) {
        let (n, mut moves, mut gain) = (self.n, 0, 0.0);
        let rows = self.code.chunks_exact_mut(n).zip(
            self.value
                .chunks_exact_mut(n)
                .zip(self.gradient.chunks_exact_mut(n)),
        );
        for (r, (code, (value, gradient))) in rows.enumerate() {
            let mut row = Row::new(grid, &self.cells, r * n, f, code, value, gradient);
            row.descend(search);
            moves += row.n_moves;
            gain += row.gain;
        }
        (moves, gain)
    }
}

#[cfg(test)]
#[path = "feedback_tests.rs"]
mod tests;
