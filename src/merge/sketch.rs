//! Second moments small enough to travel with a patch, so that a device which has neither the
//! forget nor the retain texts can merge.
//!
//! Per distinct input, with H_F and H_R each scaled to a mean diagonal of 1:
//!
//!   H_F ≈ V·C_F·Vᵀ + diag(d_F),  H_R ≈ V·C_R·Vᵀ + diag(d_R)
//!
//! V `[n_in, m]` holds the top m eigenvectors of H_R + λ·H_F, found by subspace iteration on the
//! rows (Halko, Martinsson & Tropp 2011, algorithm 4.4), so no n_in × n_in matrix is formed.
//! C = VᵀHV keeps both sides exactly within the span; d = diag(H − V·C·Vᵀ), so the diagonal is
//! exact too. Both sides share V: λ can still be chosen when merging, and the error on forget and
//! on retain inputs can be told apart. Storage: V in Q8_0, the roots of C and d in f16, which is
//! 1.06·m·n_in + 4·m² + 4·n_in bytes an input.
//!
//! # What it costs
//!
//! Held-out err_F of error feedback (4 descent passes, ‖ΔW‖/‖W‖ = 1%, damping 1%, λ = 0.5), one
//! tensor each; in brackets the share of tr(H_R + λ·H_F) within the span. "General" is the full H
//! of the built-in text, which a device without a sketch can compute itself.
//!
//! | tensor | nearest code | general | m = 16 | m = 32 | m = 64 | full H |
//! |---|---|---|---|---|---|---|
//! | Gemma-3-270M block 1 attn_output, Q4_K, 1024 | .696 | .300 | .101 (.60) | .084 (.68) | .081 (.76) | .076 |
//! | Gemma-3-270M block 1 ffn_down, Q6_K, 2048 | .136 | .054 | .036 (.42) | .027 (.51) | .017 (.61) | .013 |
//! | built-in model block 2 attn_output, Q4_K, 256 | 1.000 | .132 | .167 (.84) | .120 (.95) | .113 (.99) | .106 |
//! | built-in model block 2 ffn_down, Q6_K, 768 | .305 | .109 | .131 (.51) | .118 (.67) | .104 (.81) | .080 |
//!
//! All of Gemma-3-270M takes 1.7 MB at m = 16, 3.3 MB at 32, 6.8 MB at 64. On the built-in model
//! general text alone beats m = 16 and 32: where little sets the forget texts apart, the tail that
//! a sketch leaves out counts for more.
//!
//! # What a sketch reveals
//!
//! No text, token or order of tokens is stored, but the second moments are a function of the texts
//! and whoever has the model can evaluate the same function on a guess: a sketch can confirm that
//! a guessed set of texts was used, and it shows in which directions of each layer they lie, which
//! tells their subject to one who looks. Two cases would give away more and are excluded. The
//! inputs of block 0 are nearly a table of token embeddings, from which the words and their counts
//! could be solved for: there both sides come from general text alone
//! ([`SketchConfig::n_private_blocks`]). With fewer tokens than directions V would span every
//! single activation: m is at most a quarter of the tokens. What remains is a summary of private
//! texts; treat it as such.

use super::moments::{Captured, MomentsError, Part, Set, product};
use crate::error::Error;
use crate::ggml::{dequantize, quantize};
use crate::gguf::GgmlType;
use crate::graph::weights::block_of;
use crate::rng::SplitMix64;
use crate::subspace::{ThinQr, add_symmetric, eigen_descending, product as product_f64};
use faer::{Mat, MatRef};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use super::sketch_file::{SketchError, SketchFile, companion, save};

/// Directions beyond m during the iteration.
const OVERSAMPLE: usize = 16;
/// Passes over the rows that sharpen V.
const POWER: usize = 3;
/// Columns of a dense matrix built at a time.
const DENSE_COLUMNS: usize = 64;

/// How large a sketch may be and what it favours.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SketchConfig {
    /// Most directions an input keeps.
    pub max_rank: usize,
    /// Most bytes of the file; the rank is lowered to fit.
    pub max_bytes: u64,
    /// Weight of the forget side in the choice of directions.
    pub lambda: f64,
    /// Blocks at the bottom whose moments come from general text only.
    pub n_private_blocks: usize,
    /// Seed of the iteration's start.
    pub seed: u64,
}

impl Default for SketchConfig {
    fn default() -> Self {
        Self {
            max_rank: 64,
            max_bytes: 64 << 20,
            lambda: 0.5,
            n_private_blocks: 1,
            seed: 0,
        }
    }
}

/// Which texts a side of the sketch stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What is forgotten.
    Forget,
    /// What is kept.
    Kept,
}

/// C = G·Gᵀ within the span, and the diagonal outside.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Half {
    /// G [rank, rank], column after column.
    pub root: Vec<f32>,
    /// d [n_in].
    pub rest: Vec<f32>,
}

/// The second moments of one input.
#[derive(Debug, Clone, PartialEq)]
pub struct InputSketch {
    /// Weights that read the input.
    pub tensors: Vec<String>,
    /// Its width.
    pub n_in: usize,
    /// m.
    pub rank: usize,
    /// Share of tr(H_R + λ·H_F) within the span.
    pub explained: f64,
    /// V [n_in, rank].
    pub(super) basis: Vec<f32>,
    /// Forget, kept.
    pub(super) halves: [Half; 2],
}

impl InputSketch {
    /// Bytes in a file, names aside.
    pub fn bytes(&self) -> u64 {
        bytes(self.n_in, self.rank)
    }

    /// H_F or H_R as a dense matrix `[n_in, n_in]` with a mean diagonal of 1.
    ///
    /// An error measured on it is too low (1.5 to 7 times at m = 64), as the rounding was fitted
    /// to the same matrix: good for ranking tensors, not for accepting one.
    pub fn moments(&self, side: Side) -> Vec<f32> {
        self.dense(match side {
            Side::Forget => [1.0, 0.0],
            Side::Kept => [0.0, 1.0],
        })
    }

    /// T `[n_in, rank]` and d `[n_in]` of the same matrix, T·Tᵀ + diag(d).
    pub(super) fn factors(&self, side: Side) -> (Vec<f32>, Vec<f32>) {
        let (n, m) = (self.n_in, self.rank);
        let half = &self.halves[side as usize];
        let mut t = vec![0f32; n * m];
        product(
            &mut t,
            MatRef::from_column_major_slice(&self.basis, n, m),
            MatRef::from_column_major_slice(&half.root, m, m),
        );
        (t, half.rest.clone())
    }

    /// (H_R + λ·H_F)/(1 + λ), as [`Captured::combined`] gives it from the rows.
    pub fn combined(&self, lambda: f64) -> Vec<f32> {
        self.dense([lambda / (1.0 + lambda), 1.0 / (1.0 + lambda)])
    }

    fn dense(&self, weights: [f64; 2]) -> Vec<f32> {
        let (n, m) = (self.n_in, self.rank);
        let basis = MatRef::from_column_major_slice(&self.basis, n, m);
        // H = T·Tᵀ + diag(d) with T = V·[√w·G_F, √w·G_R].
        let mut t = vec![0f32; 2 * n * m];
        for ((half, w), t) in self.halves.iter().zip(weights).zip(t.chunks_mut(n * m)) {
            let root = MatRef::from_column_major_slice(&half.root, m, m);
            product(t, basis, root);
            t.iter_mut().for_each(|v| *v *= w.sqrt() as f32);
        }
        let t = MatRef::from_column_major_slice(&t, n, 2 * m);
        let mut h = vec![0f32; n * n];
        h.par_chunks_mut(n * DENSE_COLUMNS)
            .enumerate()
            .for_each(|(task, columns)| {
                let first = task * DENSE_COLUMNS;
                let n_columns = columns.len() / n;
                product(columns, t, t.subrows(first, n_columns).transpose());
                for (j, column) in columns.chunks_exact_mut(n).enumerate() {
                    for (half, w) in self.halves.iter().zip(weights) {
                        column[first + j] += (w * f64::from(half.rest[first + j])) as f32;
                    }
                }
            });
        h
    }
}

/// Bytes of an input of width `n_in` at rank `m`.
fn bytes(n_in: usize, m: usize) -> u64 {
    let n = n_in as u64;
    let column = basis_type(n_in)
        .row_bytes(n)
        .expect("a width of whole blocks");
    column * m as u64 + 2 * 2 * (m * m) as u64 + 2 * 2 * n
}

/// The type of V's columns: Q8_0, or F16 where they are not whole blocks.
pub(super) fn basis_type(n_in: usize) -> GgmlType {
    if n_in.is_multiple_of(GgmlType::Q8_0.block_len() as usize) {
        GgmlType::Q8_0
    } else {
        GgmlType::F16
    }
}

/// The largest rank that budget, tokens and widths allow; at least 1.
fn rank_within(config: &SketchConfig, widths: &[usize], n_tokens: usize) -> usize {
    let most = config.max_rank.min(n_tokens / 4).max(1);
    (1..=most)
        .rev()
        .find(|&m| {
            let each = widths.iter().map(|&n| bytes(n, m.min(n)));
            each.sum::<u64>() <= config.max_bytes
        })
        .unwrap_or(1)
}

/// Sketch every captured input, from its fitting part.
///
/// # Errors
/// No general text where [`SketchConfig::n_private_blocks`] asks for it, no tokens, a failing
/// disk.
pub fn sketch(captured: &Captured, config: &SketchConfig) -> Result<Vec<InputSketch>, Error> {
    let groups: Vec<&[String]> = captured.groups().collect();
    let widths: Result<Vec<usize>, MomentsError> =
        groups.iter().map(|g| captured.n_in(&g[0])).collect();
    let widths = widths?;
    let n_tokens = Set::ALL.map(|s| captured.n_tokens(s, Part::Fit));
    let rank = rank_within(config, &widths, n_tokens.iter().sum());
    (0..groups.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|i| {
            let mut rng = SplitMix64::stream(config.seed, i as u64);
            one(captured, config, groups[i], rank.min(widths[i]), &mut rng)
        })
        .collect()
}

/// Weights of one token of each set in H_F, in H_R and in what V is chosen for.
fn weights(
    captured: &Captured,
    config: &SketchConfig,
    tensor: &str,
) -> Result<[[f64; 3]; 3], Error> {
    let n_in = captured.n_in(tensor)? as f64;
    let side = |sets: &[Set]| -> Result<[f64; 3], Error> {
        let n: usize = sets.iter().map(|&s| captured.n_tokens(s, Part::Fit)).sum();
        let energy = captured.trace(tensor, sets, Part::Fit)? * n as f64;
        let mut w = [0.0; 3];
        if energy > 0.0 {
            sets.iter().for_each(|&s| w[s as usize] = n_in / energy);
        }
        Ok(w)
    };
    if block_of(tensor).is_some_and(|b| b < config.n_private_blocks) {
        let general = side(&[Set::General])?;
        if general == [0.0; 3] {
            return Err(MomentsError::NoSet {
                wanted: "general".into(),
            }
            .into());
        }
        return Ok([general; 3]);
    }
    Ok([
        side(&[Set::Forget])?,
        side(&Set::KEPT)?,
        captured.combination(tensor, config.lambda, Part::Fit)?,
    ])
}

fn one(
    captured: &Captured,
    config: &SketchConfig,
    tensors: &[String],
    rank: usize,
    rng: &mut SplitMix64,
) -> Result<InputSketch, Error> {
    let tensor = &tensors[0];
    let n_in = captured.n_in(tensor)?;
    let [forget, kept, both] = weights(captured, config, tensor)?;
    let k = (rank + OVERSAMPLE).min(n_in);
    let start = Mat::from_fn(n_in, k, |_, _| f64::from(rng.normal()));
    let mut q = orthonormal(start);
    for _ in 0..POWER {
        q = orthonormal(times(captured, tensor, both, q.as_ref())?);
    }
    let projected = within(captured, tensor, &[both], q.as_ref())?;
    let (values, vectors) = eigen_descending(projected[0].c.as_ref())?;
    let v = product_f64(q.as_ref(), vectors.as_ref().subcols(0, rank));
    let columns: Vec<f32> = v
        .col_iter()
        .flat_map(|c| c.iter().map(|&v| v as f32))
        .collect();
    let basis = stored_basis(&columns, n_in)?;
    let v = Mat::from_fn(n_in, rank, |i, j| f64::from(basis[j * n_in + i]));
    let mut halves = Vec::with_capacity(2);
    for side in within(captured, tensor, &[forget, kept], v.as_ref())? {
        halves.push(half(v.as_ref(), &side)?);
    }
    Ok(InputSketch {
        tensors: tensors.to_vec(),
        n_in,
        rank,
        explained: values[..rank].iter().map(|v| v.max(0.0)).sum::<f64>() / n_in as f64,
        basis,
        halves: halves.try_into().expect("two sides"),
    })
}

fn orthonormal(a: Mat<f64>) -> Mat<f64> {
    let k = a.ncols();
    ThinQr::new(a).q_times(Mat::identity(k, k).as_ref())
}

/// V as the file holds it, decoded again: C and d then make up for what Q8_0 rounds.
fn stored_basis(columns: &[f32], n_in: usize) -> Result<Vec<f32>, Error> {
    let ty = basis_type(n_in).id();
    let bytes = quantize(ty, columns, n_in, None)?;
    let mut out = vec![0f32; columns.len()];
    dequantize(ty, &bytes, &mut out)?;
    Ok(out)
}

/// H·Q over the rows, H = Σ w·x·xᵀ.
fn times(
    captured: &Captured,
    tensor: &str,
    weights: [f64; 3],
    q: MatRef<'_, f64>,
) -> Result<Mat<f64>, Error> {
    let (n, k) = q.shape();
    let q: Vec<f32> = q
        .col_iter()
        .flat_map(|c| c.iter().map(|&v| v as f32))
        .collect();
    let q = MatRef::from_column_major_slice(&q, n, k);
    let mut sum = Mat::<f64>::zeros(n, k);
    let (mut z, mut y) = (Vec::new(), vec![0f32; n * k]);
    captured.visit(tensor, &sets(&[weights]), Part::Fit, &mut |set, x| {
        let x = MatRef::from_column_major_slice(x, n, x.len() / n);
        z.resize(x.ncols() * k, 0.0);
        product(&mut z, x.transpose(), q);
        product(&mut y, x, MatRef::from_column_major_slice(&z, x.ncols(), k));
        let w = weights[set as usize];
        for (sums, y) in sum.col_iter_mut().zip(y.chunks_exact(n)) {
            for (s, &v) in sums.iter_mut().zip(y) {
                *s += w * f64::from(v);
            }
        }
        Ok(())
    })?;
    Ok(sum)
}

/// What V sees of an H.
struct Projected {
    /// VᵀHV [m, m], lower triangle.
    c: Mat<f64>,
    /// diag(H) [n_in].
    diagonal: Vec<f64>,
}

/// [`Projected`] for each H = Σ w·x·xᵀ, in one pass.
fn within(
    captured: &Captured,
    tensor: &str,
    weights: &[[f64; 3]],
    v: MatRef<'_, f64>,
) -> Result<Vec<Projected>, Error> {
    let (n, k) = v.shape();
    let v: Vec<f32> = v
        .col_iter()
        .flat_map(|c| c.iter().map(|&v| v as f32))
        .collect();
    let v = MatRef::from_column_major_slice(&v, n, k);
    let mut sums: Vec<Projected> = weights
        .iter()
        .map(|_| Projected {
            c: Mat::zeros(k, k),
            diagonal: vec![0.0; n],
        })
        .collect();
    let mut z = Vec::new();
    captured.visit(tensor, &sets(weights), Part::Fit, &mut |set, x| {
        let n_tokens = x.len() / n;
        z.resize(k * n_tokens, 0.0);
        product(
            &mut z,
            v.transpose(),
            MatRef::from_column_major_slice(x, n, n_tokens),
        );
        let z = Mat::from_fn(k, n_tokens, |i, j| f64::from(z[j * k + i]));
        for (sum, w) in sums.iter_mut().zip(weights) {
            let w = w[set as usize];
            if w == 0.0 {
                continue;
            }
            add_symmetric(&mut sum.c, z.as_ref(), z.as_ref(), w);
            for x in x.chunks_exact(n) {
                for (d, &x) in sum.diagonal.iter_mut().zip(x) {
                    *d += w * f64::from(x) * f64::from(x);
                }
            }
        }
        Ok(())
    })?;
    Ok(sums)
}

fn sets(weights: &[[f64; 3]]) -> Vec<Set> {
    let used = |s: &Set| weights.iter().any(|w| w[*s as usize] > 0.0);
    Set::ALL.into_iter().filter(used).collect()
}

/// G and d of one side, rounded as the file holds them. A root keeps C positive semi-definite
/// whatever the rounding; d is never below 0.
fn half(v: MatRef<'_, f64>, side: &Projected) -> Result<Half, Error> {
    let m = side.c.nrows();
    let (values, vectors) = eigen_descending(side.c.as_ref())?;
    let root = Mat::from_fn(m, m, |i, j| {
        f64::from(halved(vectors[(i, j)] * values[j].max(0.0).sqrt()))
    });
    let t = product_f64(v, root.as_ref());
    let rest = (0..v.nrows()).map(|i| {
        let within: f64 = t.row(i).iter().map(|v| v * v).sum();
        halved((side.diagonal[i] - within).max(0.0))
    });
    Ok(Half {
        rest: rest.collect(),
        root: root
            .col_iter()
            .flat_map(|c| c.iter().map(|&v| v as f32))
            .collect(),
    })
}

/// Rounded to f16. A mean diagonal of 1 leaves 65,504 times the mean as the largest entry.
fn halved(v: f64) -> f32 {
    f16::from_f64(v.clamp(f64::from(f16::MIN), f64::from(f16::MAX))).to_f32()
}

#[cfg(test)]
#[path = "sketch_tests.rs"]
mod tests;
