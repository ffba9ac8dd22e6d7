//! The output head, a few rows at a time.
//!
//! With a vocabulary of 262,144 tokens the logits of one batch outweigh everything else,
//! so hidden rows go through the head in chunks whose logits take 64 MB. On the way back
//! only vocabulary rows with a gradient above [`SPARSE`] are decoded: after a softmax that is a
//! few percent of them where the model is sure of itself. Where it is not, all are.

mod chunk;

use super::GraphError;
use super::tape::Parts;
use super::weights::{Multiplying, Weights};
use crate::ggml::{Backend, dequantize};
use chunk::Chunk;
use rayon::prelude::*;
use std::ops::Range;

/// Bytes of the logits of a chunk, at most; but [`FEW`] rows.
const LOGITS: usize = 64 << 20;
/// Rows of a chunk: a multiple of this many, and this many where few are left.
const FEW: usize = 12;
/// Rows of a chunk, at most.
const MANY: usize = 240;
/// Logit gradients below this are taken as zero (gradient error 4e-4 in all).
pub const SPARSE: f32 = 1e-7;
/// With more than one gradient in so many above [`SPARSE`], the product by all of the matrix is
/// faster.
const DENSE: usize = 12;
/// The sparse product is cut into this many pieces whatever the number of threads, so
/// that its sums come out the same on any machine.
const PIECES: usize = 8;
/// Vocabulary rows that are looked through together.
const STRETCH: usize = 4096;

/// The head's graphs.
pub struct Head {
    few: Chunk,
    many: Chunk,
    n_embd: usize,
    output_weight: String,
    scratch: Vec<f32>,
}

/// Computes a chunk's loss: rows of logits `[n_vocab]` in, their gradients out in place.
/// The first argument is the index of the chunk's first row.
pub trait RowLosses {
    /// `logits` holds `n_rows` rows; overwrite each with the loss's gradient.
    fn grade(&mut self, first: usize, n_rows: usize, logits: &mut [f32]);
}

impl Head {
    /// Build the head of `parts.template`.
    ///
    /// # Errors
    /// Ops after the output product that cannot be rebuilt or differentiated.
    pub fn new(
        parts: &Parts<'_>,
        cpu: &Backend,
        weights: &mut Multiplying,
    ) -> Result<Self, GraphError> {
        let few = Chunk::new(parts, cpu, weights, FEW)?;
        let fit = LOGITS / (size_of::<f32>() * few.n_vocab());
        let many = (fit / FEW * FEW).clamp(FEW, MANY);
        let many = Chunk::new(parts, cpu, weights, many)?;
        let template = parts.template;
        Ok(Self {
            few,
            many,
            n_embd: template.entries[template.hidden].ne[0].at(1, 1) as usize,
            output_weight: template.output_weight.clone(),
            scratch: Vec::new(),
        })
    }

    /// Size of the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.few.n_vocab()
    }

    /// Width of a hidden row.
    pub fn n_embd(&self) -> usize {
        self.n_embd
    }

    /// Bytes of its graphs.
    pub fn bytes(&self) -> usize {
        self.few.bytes() + self.many.bytes()
    }

    /// The rows after `first` that are taken together, of `n_rows`, and the graph for them.
    fn next(&mut self, first: usize, n_rows: usize) -> (Range<usize>, &mut Chunk) {
        let left = n_rows - first;
        let chunk = match 2 * left > self.many.n_rows {
            true => &mut self.many,
            false => &mut self.few,
        };
        (first..first + left.min(chunk.n_rows), chunk)
    }

    /// Show `losses` the logits of `n_rows` hidden rows, chunk by chunk.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn logits(
        &mut self,
        cpu: &mut Backend,
        hidden: &[f32],
        n_rows: usize,
        losses: &mut dyn RowLosses,
    ) -> Result<(), GraphError> {
        let (n_embd, n_vocab) = (self.n_embd, self.n_vocab());
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut first = 0;
        while first < n_rows {
            let (rows, chunk) = self.next(first, n_rows);
            let hidden = &hidden[rows.start * n_embd..rows.end * n_embd];
            let logits = chunk.logits(cpu, hidden, &mut scratch)?;
            losses.grade(first, rows.len(), &mut logits[..rows.len() * n_vocab]);
            first = rows.end;
        }
        self.scratch = scratch;
        Ok(())
    }

    /// As [`Head::logits`], and propagate the gradients `losses` leaves behind to `d_hidden`
    /// (rows past `n_rows` become zero).
    ///
    /// # Errors
    /// When ggml fails, or the output matrix cannot be decoded.
    pub fn gradients(
        &mut self,
        cpu: &mut Backend,
        weights: &Weights,
        hidden: &[f32],
        n_rows: usize,
        losses: &mut dyn RowLosses,
        d_hidden: &mut Vec<f32>,
    ) -> Result<(), GraphError> {
        d_hidden.clear();
        d_hidden.resize(hidden.len(), 0.0);
        let (n_embd, n_vocab) = (self.n_embd, self.n_vocab());
        let output_weight = self.output_weight.clone();
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut first = 0;
        while first < n_rows {
            let (rows, chunk) = self.next(first, n_rows);
            let n = rows.len();
            let span = rows.start * n_embd..rows.end * n_embd;
            let logits = chunk.logits(cpu, &hidden[span.clone()], &mut scratch)?;
            losses.grade(first, n, &mut logits[..n * n_vocab]);
            logits[n * n_vocab..].fill(0.0);
            let has_back = chunk.has_back();
            let grad = &chunk.product_gradient(cpu, &mut scratch)?[..n * n_vocab];
            let active = active(grad, n_vocab);
            let d_hidden = &mut d_hidden[span];
            if has_back && active.n_gradients * DENSE > grad.len() {
                let d = chunk.back(cpu, &mut scratch)?.expect("it has one");
                d_hidden.copy_from_slice(&d[..n * n_embd]);
            } else {
                sparse_product(weights, &output_weight, grad, &active.rows, d_hidden)?;
            }
            first = rows.end;
        }
        self.scratch = scratch;
        Ok(())
    }
}

/// Where gradients are above [`SPARSE`].
struct Active {
    /// Vocabulary rows with one.
    rows: Vec<usize>,
    /// How many there are.
    n_gradients: usize,
}

/// Of `g [n_vocab, n]`.
fn active(g: &[f32], n_vocab: usize) -> Active {
    let stretch = |first: usize| {
        let len = STRETCH.min(n_vocab - first);
        let mut counts = [0u16; STRETCH];
        for row in g.chunks_exact(n_vocab) {
            for (count, g) in counts.iter_mut().zip(&row[first..first + len]) {
                *count += u16::from(g.abs() > SPARSE);
            }
        }
        let rows = (0..len).filter(|&v| counts[v] > 0).map(|v| first + v);
        let n_gradients = counts.iter().map(|&c| usize::from(c)).sum::<usize>();
        (rows.collect::<Vec<_>>(), n_gradients)
    };
    let firsts = (0..n_vocab).into_par_iter().step_by(STRETCH);
    let parts: Vec<(Vec<usize>, usize)> = firsts.map(stretch).collect();
    Active {
        n_gradients: parts.iter().map(|p| p.1).sum(),
        rows: parts.into_iter().flat_map(|p| p.0).collect(),
    }
}

/// `out [n_embd, n] = Wᵀ·g` for `W [n_embd, n_vocab]` and `g [n_vocab, n]`, over `active` rows of W.
fn sparse_product(
    weights: &Weights,
    name: &str,
    g: &[f32],
    active: &[usize],
    out: &mut [f32],
) -> Result<(), GraphError> {
    let info = weights.info(name)?;
    let (n_embd, n_vocab) = (info.ne[0] as usize, info.ne[1] as usize);
    let n = g.len() / n_vocab;
    let (ty, row_bytes) = (info.ty.id(), info.row_bytes() as usize);
    let bytes = weights.bytes(name)?;
    let piece = active.len().div_ceil(PIECES).max(1);
    let partial: Vec<Vec<f32>> = active
        .par_chunks(piece)
        .map(|ids| {
            let mut sum = vec![0f32; n * n_embd];
            let mut row = vec![0f32; n_embd];
            for &v in ids {
                dequantize(ty, &bytes[v * row_bytes..(v + 1) * row_bytes], &mut row)?;
                for r in 0..n {
                    let w = g[r * n_vocab + v];
                    if w.abs() > SPARSE {
                        let into = &mut sum[r * n_embd..(r + 1) * n_embd];
                        for (s, x) in into.iter_mut().zip(&row) {
                            *s += w * x;
                        }
                    }
                }
            }
            Ok(sum)
        })
        .collect::<Result<_, GraphError>>()?;
    out.fill(0.0);
    for sum in partial {
        for (o, s) in out.iter_mut().zip(sum) {
            *o += s;
        }
    }
    Ok(())
}
