//! Captured inputs in, second moments out: H = Σ x·xᵀ / n of each adapted weight's input x.
//!
//! Rounding error E costs tr(E·H·Eᵀ) at the layer's output (GPTQ, arXiv 2210.17323; LDLQ, arXiv
//! 2307.13304), with H taken where the weight will be used: at tokens, with the adapters applied.
//! H is built for one tensor at a time from the rows on disk, as f32 products of at most 512
//! tokens summed in f64, a tile of columns at a time: the f64 sums of a whole 11,008-wide matrix
//! would take as much memory as two of it.
//!
//! Disk: Σ(4 + 2·n_in) bytes a token over distinct inputs; 0.16 MB for Gemma-3-270M, 1.5 MB for
//! a 7B model. [`MomentsConfig`] caps both tokens and bytes.

use super::inputs::{Input, Rows};
use super::spill::{Spill, row_bytes};
use crate::data::Sample;
use crate::error::Error;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;
use thiserror::Error;

pub use super::inputs::capture;

/// f64 sums in memory at a time.
const TILE_BYTES: usize = 64 << 20;
/// Columns of one task.
const TASK_COLUMNS: usize = 128;

/// Which texts an input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Set {
    /// To be forgotten.
    Forget,
    /// To be kept.
    Retain,
    /// Neither: general text.
    General,
}

impl Set {
    /// In order.
    pub const ALL: [Self; 3] = [Self::Forget, Self::Retain, Self::General];
    /// What the merged model must still do as before.
    pub const KEPT: [Self; 2] = [Self::Retain, Self::General];
}

/// Nine tenths to fit on, one to measure on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Rounding sees these tokens.
    Fit,
    /// Rounding does not.
    HeldOut,
}

/// Samples of each set; any may be empty, not all.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sources<'a> {
    /// Forget set.
    pub forget: &'a [Sample],
    /// Retain set.
    pub retain: &'a [Sample],
    /// General text.
    pub general: &'a [Sample],
}

impl<'a> Sources<'a> {
    /// Those of `set`.
    pub fn of(&self, set: Set) -> &'a [Sample] {
        match set {
            Set::Forget => self.forget,
            Set::Retain => self.retain,
            Set::General => self.general,
        }
    }
}

/// How much is captured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MomentsConfig {
    /// Tokens kept of each set, evenly spread over it.
    pub max_tokens: usize,
    /// Bytes on disk; fewer tokens are kept where this is the tighter limit.
    pub max_spill_bytes: u64,
    /// Where the unnamed temporary file lies. `/tmp` may be memory: prefer the output's
    /// directory.
    pub spill_dir: PathBuf,
}

impl Default for MomentsConfig {
    fn default() -> Self {
        Self {
            max_tokens: 8192,
            max_spill_bytes: 8 << 30,
            spill_dir: std::env::temp_dir(),
        }
    }
}

/// Why there are no moments.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum MomentsError {
    #[error("tensor {tensor}: wanted a matrix product with it in llama.cpp's graph, found none")]
    NoInput { tensor: String },
    #[error("tensor {tensor}: wanted an input {wanted}, found {found}")]
    Input {
        tensor: String,
        wanted: String,
        found: String,
    },
    #[error("tensor {tensor}: its inputs are not finite")]
    NotFinite { tensor: String },
    #[error("calibration: wanted samples of at least three tokens, found none")]
    NoTokens,
    #[error("calibration: wanted tokens of {wanted}, found none")]
    NoSet { wanted: String },
    #[error("tensor {tensor}: its inputs were not captured")]
    Unknown { tensor: String },
    #[error("calibration: wanted room for {per_token} bytes a token, found {found} bytes in all")]
    Budget { per_token: u64, found: u64 },
    #[error("tensor {tensor}: wanted {wanted} bytes of memory for its second moments, found less")]
    Memory { tensor: String, wanted: u64 },
}

/// Takes the inputs of one set, `[n_in, n]`.
pub type Visitor<'a> = dyn FnMut(Set, &[f32]) -> Result<(), Error> + 'a;

/// Inputs of the adapted weights, on disk.
#[derive(Debug)]
pub struct Captured {
    inputs: Vec<Input>,
    index: HashMap<String, usize>,
    batches: Vec<Rows>,
    spill: Spill,
}

impl Captured {
    pub(super) fn new(inputs: Vec<Input>, batches: Vec<Rows>, spill: Spill) -> Self {
        let index = inputs
            .iter()
            .enumerate()
            .flat_map(|(i, input)| input.tensors.iter().map(move |t| (t.clone(), i)))
            .collect();
        Self {
            inputs,
            index,
            batches,
            spill,
        }
    }

    fn input(&self, tensor: &str) -> Result<&Input, MomentsError> {
        self.index
            .get(tensor)
            .map(|&i| &self.inputs[i])
            .ok_or_else(|| MomentsError::Unknown {
                tensor: tensor.to_owned(),
            })
    }

    /// Weights in groups that share an input, in order of use: one H serves a group.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &[String]> {
        self.inputs.iter().map(|i| i.tensors.as_slice())
    }

    /// Input width of a captured weight.
    ///
    /// # Errors
    /// [`MomentsError::Unknown`].
    pub fn n_in(&self, tensor: &str) -> Result<usize, MomentsError> {
        Ok(self.input(tensor)?.n_in)
    }

    /// Tokens kept of `set` in `part`.
    pub fn n_tokens(&self, set: Set, part: Part) -> usize {
        let of_set = self.batches.iter().filter(|b| b.set == set);
        of_set.map(|b| b.n[part as usize]).sum()
    }

    /// Bytes on disk.
    pub fn spill_bytes(&self) -> u64 {
        self.spill.len()
    }

    /// tr(H), the mean ‖x‖² over the tokens of `sets`; 0 without tokens.
    ///
    /// # Errors
    /// [`MomentsError::Unknown`].
    pub fn trace(&self, tensor: &str, sets: &[Set], part: Part) -> Result<f64, MomentsError> {
        let input = self.input(tensor)?;
        let sum: f64 = sets
            .iter()
            .map(|&s| input.energy[s as usize][part as usize])
            .sum();
        let n: usize = sets.iter().map(|&s| self.n_tokens(s, part)).sum();
        Ok(sum / n.max(1) as f64)
    }

    /// Pass the inputs of `tensor` to `f`, `[n_in, n]` at a time (n at most 512).
    ///
    /// # Errors
    /// An unknown tensor, a failing disk, the error of `f`.
    pub fn visit(
        &self,
        tensor: &str,
        sets: &[Set],
        part: Part,
        f: &mut Visitor<'_>,
    ) -> Result<(), Error> {
        self.visit_input(self.input(tensor)?, sets, part, f)
    }

    fn visit_input(
        &self,
        input: &Input,
        sets: &[Set],
        part: Part,
        f: &mut Visitor<'_>,
    ) -> Result<(), Error> {
        let mut x = Vec::new();
        for (rows, &start) in self.batches.iter().zip(&input.starts) {
            let n = rows.n[part as usize];
            if n == 0 || !sets.contains(&rows.set) {
                continue;
            }
            let skipped = match part {
                Part::Fit => 0,
                Part::HeldOut => rows.n[0] as u64 * row_bytes(input.n_in),
            };
            self.spill.read(start + skipped, input.n_in, n, &mut x)?;
            f(rows.set, &x)?;
        }
        Ok(())
    }

    /// All inputs of `tensor` over the tokens of `sets`, `[n_in, n]`.
    ///
    /// # Errors
    /// As [`visit`](Self::visit), or no tokens.
    pub(super) fn rows(&self, tensor: &str, sets: &[Set], part: Part) -> Result<Vec<f32>, Error> {
        let n: usize = sets.iter().map(|&s| self.n_tokens(s, part)).sum();
        if n == 0 {
            return Err(no_set(sets));
        }
        let mut rows = Vec::with_capacity(n * self.n_in(tensor)?);
        self.visit(tensor, sets, part, &mut |_, x| {
            rows.extend_from_slice(x);
            Ok(())
        })?;
        Ok(rows)
    }

    /// H `[n_in, n_in]` = Σ x·xᵀ / n over the tokens of `sets` together.
    ///
    /// # Errors
    /// An unknown tensor, sets without tokens, no memory, a failing disk.
    pub fn moments(&self, tensor: &str, sets: &[Set], part: Part) -> Result<Vec<f32>, Error> {
        let n: usize = sets.iter().map(|&s| self.n_tokens(s, part)).sum();
        if n == 0 {
            return Err(no_set(sets));
        }
        let mut weights = [0.0; 3];
        for &s in sets {
            weights[s as usize] = 1.0 / n as f64;
        }
        self.weighted(tensor, weights, part)
    }

    /// What the rounding minimises, `[n_in, n_in]`: H_R/tr(H_R) + λ·H_F/tr(H_F), H_R over retain
    /// set and general text together, scaled to a mean diagonal of 1. A side without tokens is
    /// left out. Damping is the rounding's.
    ///
    /// # Errors
    /// As [`moments`](Self::moments).
    pub fn combined(&self, tensor: &str, lambda: f64, part: Part) -> Result<Vec<f32>, Error> {
        self.weighted(tensor, self.combination(tensor, lambda, part)?, part)
    }

    /// Weight of one token of each set in [`combined`](Self::combined).
    ///
    /// # Errors
    /// An unknown tensor, no tokens, a λ below 0.
    pub(super) fn combination(
        &self,
        tensor: &str,
        lambda: f64,
        part: Part,
    ) -> Result<[f64; 3], Error> {
        if !(0.0..f64::INFINITY).contains(&lambda) {
            return Err(Error::Setting {
                setting: "lambda",
                wanted: "a number, 0 or above".into(),
                found: lambda.to_string(),
            });
        }
        let input = self.input(tensor)?;
        let energy = |sets: &[Set]| -> f64 {
            sets.iter()
                .map(|&s| input.energy[s as usize][part as usize])
                .sum()
        };
        let (kept, forget) = (energy(&Set::KEPT), energy(&[Set::Forget]));
        let (kept_share, forget_share) = (f64::from(kept > 0.0), f64::from(forget > 0.0) * lambda);
        if kept_share + forget_share <= 0.0 {
            return Err(no_set(&Set::ALL));
        }
        let unit = input.n_in as f64 / (kept_share + forget_share);
        let weight = |share: f64, energy: f64| {
            if energy > 0.0 {
                share * unit / energy
            } else {
                0.0
            }
        };
        let kept = weight(kept_share, kept);
        Ok([weight(forget_share, forget), kept, kept])
    }

    /// Σ w(set)·x·xᵀ, both triangles.
    fn weighted(&self, tensor: &str, weights: [f64; 3], part: Part) -> Result<Vec<f32>, Error> {
        let input = self.input(tensor)?;
        let n = input.n_in;
        let mut h: Vec<f32> = Vec::new();
        h.try_reserve_exact(n * n)
            .map_err(|_| MomentsError::Memory {
                tensor: tensor.to_owned(),
                wanted: 4 * (n * n) as u64,
            })?;
        h.resize(n * n, 0.0);
        let sets: Vec<Set> = Set::ALL
            .into_iter()
            .filter(|&s| weights[s as usize] > 0.0)
            .collect();
        let width = (TILE_BYTES / 8 / n).clamp(1, n);
        for first in (0..n).step_by(width) {
            let n_columns = width.min(n - first);
            // Column j of the tile holds rows `first..n` of column first + j of H.
            let height = n - first;
            let mut sums = vec![0f64; height * n_columns];
            self.visit_input(input, &sets, part, &mut |set, x| {
                let weight = weights[set as usize];
                let x = MatRef::from_column_major_slice(x, n, x.len() / n);
                sums.par_chunks_mut(height * TASK_COLUMNS)
                    .enumerate()
                    .for_each(|(task, sums)| {
                        let skip = task * TASK_COLUMNS;
                        add_products(x, first + skip, weight, sums, (height, skip));
                    });
                Ok(())
            })?;
            for (j, column) in sums.chunks_exact(height).enumerate() {
                for (i, &v) in column.iter().enumerate().skip(j) {
                    h[(first + j) * n + first + i] = v as f32;
                    h[(first + i) * n + first + j] = v as f32;
                }
            }
        }
        Ok(h)
    }

    /// tr(E·H·Eᵀ), the mean ‖E·x‖² over the tokens of `sets`, for E as rows `[n_in, n_out]`,
    /// without forming H.
    ///
    /// # Errors
    /// As [`moments`](Self::moments).
    pub fn energy(&self, tensor: &str, sets: &[Set], part: Part, e: &[f32]) -> Result<f64, Error> {
        let n_in = self.n_in(tensor)?;
        let n_out = e.len() / n_in;
        let e = MatRef::from_column_major_slice(&e[..n_in * n_out], n_in, n_out);
        let (mut sum, mut n) = (0f64, 0);
        self.visit(tensor, sets, part, &mut |_, x| {
            let x = MatRef::from_column_major_slice(x, n_in, x.len() / n_in);
            sum += (0..n_out)
                .into_par_iter()
                .step_by(TASK_COLUMNS)
                .map(|o| {
                    let e = e.subcols(o, TASK_COLUMNS.min(n_out - o));
                    let mut y = vec![0f32; e.ncols() * x.ncols()];
                    product(&mut y, e.transpose(), x);
                    y.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>()
                })
                .collect::<Vec<f64>>()
                .iter()
                .sum::<f64>();
            n += x.ncols();
            Ok(())
        })?;
        if n == 0 {
            return Err(no_set(sets));
        }
        Ok(sum / n as f64)
    }
}

/// Adds w·x·xᵀ to columns of a tile of which each holds `height` rows; the tile's column 0 is
/// `skip` columns to the left, so that what lies above the diagonal is left alone.
fn add_products(
    x: MatRef<'_, f32>,
    column: usize,
    weight: f64,
    sums: &mut [f64],
    (height, skip): (usize, usize),
) {
    let n_columns = sums.len() / height;
    let n_rows = height - skip;
    let mut products = vec![0f32; n_rows * n_columns];
    product(
        &mut products,
        x.subrows(column, n_rows),
        x.subrows(column, n_columns).transpose(),
    );
    for (sums, products) in sums
        .chunks_exact_mut(height)
        .zip(products.chunks_exact(n_rows))
    {
        for (s, &p) in sums[skip..].iter_mut().zip(products) {
            *s += weight * f64::from(p);
        }
    }
}

/// a·b, column after column, on this thread.
pub(super) fn product(out: &mut [f32], a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let out = MatMut::from_column_major_slice_mut(out, a.nrows(), b.ncols());
    faer::linalg::matmul::matmul(out, Accum::Replace, a, b, 1.0, Par::Seq);
}

fn no_set(sets: &[Set]) -> Error {
    let names: Vec<String> = sets
        .iter()
        .map(|s| format!("{s:?}").to_lowercase())
        .collect();
    MomentsError::NoSet {
        wanted: names.join(" or "),
    }
    .into()
}
