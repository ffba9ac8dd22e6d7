//! The output head, a few rows at a time.
//!
//! With a vocabulary of 262,144 tokens the logits of one batch outweigh everything else,
//! so hidden rows go through the head in chunks of [`CHUNK`]. On the way back only
//! vocabulary rows with a gradient above [`SPARSE`] are decoded: after a softmax that is a
//! few percent of them.

use super::GraphError;
use super::forward::{Record, Wanted};
use super::place::place_apart;
use super::rules::{Tile, Weightless, vjp};
use super::tape::Parts;
use super::template::{Leaf, Step};
use super::weights::{Transposed, Weights};
use crate::ggml::{Backend, Ctx, Graph, Plan, Side, Tensor, dequantize, sys};
use rayon::prelude::*;

/// Rows per chunk.
pub const CHUNK: usize = 16;
/// Logit gradients below this are taken as zero (gradient error 4e-4 in all).
pub const SPARSE: f32 = 1e-7;
/// The sparse product is cut into this many pieces whatever the number of threads, so
/// that its sums come out the same on any machine.
const PIECES: usize = 8;

/// The head's graph for one chunk.
pub struct Head {
    ctx: Ctx,
    graph: Graph,
    after: Option<(Graph, Tensor, Tensor)>,
    plan: Plan,
    hidden: Tensor,
    logits: Tensor,
    n_embd: usize,
    n_vocab: usize,
    output_weight: String,
    hidden_chunk: Vec<f32>,
    scratch: Vec<f32>,
}

struct NoWeights;

impl Weightless for NoWeights {
    fn transposed(&mut self, _: &mut Ctx, _: Tensor) -> Result<Option<Tensor>, GraphError> {
        Ok(None)
    }

    fn tile(&self, _: Tensor) -> Option<Tile> {
        None
    }
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
        weights: &mut Transposed,
    ) -> Result<Self, GraphError> {
        let template = parts.template;
        let mut c = Ctx::new(256)?;
        let mut record = Record::default();
        let r = CHUNK as i64;
        let n_embd = template.entries[template.hidden].ne[0].at(1, 1);
        let hidden = c.leaf(sys::GGML_TYPE_F32, [n_embd, r, 1, 1], "hidden")?;
        // A GPU is given copies; on this host no weight of the head is worth one.
        let mut leaf = |c: &mut Ctx, name: &str| match cpu.side_of(None) {
            Side::Device => weights.plain(c, parts.weights, cpu, name),
            Side::Host => parts.weights.leaf(c, name),
        };
        let weight = leaf(&mut c, &template.output_weight)?;
        let mut built = vec![None; template.entries.len()];
        built[template.hidden] = Some(hidden);
        let mut product = None;
        for (i, e) in template.entries.iter().enumerate().skip(template.head) {
            let Step::Op {
                op,
                params,
                src,
                nb,
                offset,
            } = &e.step
            else {
                if let Step::Leaf(Leaf::Weight(name)) = &e.step {
                    built[i] = Some(leaf(&mut c, name)?);
                }
                continue;
            };
            let src: Option<Vec<Tensor>> = if i == template.head {
                Some(vec![weight, hidden])
            } else {
                src.iter().map(|&s| built[s]).collect()
            };
            let Some(src) = src else {
                return Err(GraphError::Untraceable(format!(
                    "its output head reads {}, which is not a product of the hidden state",
                    e.name
                )));
            };
            // The head has no tokens: only its rows count.
            let wanted = Wanted::of(e, (nb, *offset), (r, r));
            let out = record.emit(&mut c, *op, params, &src, Some(&wanted))?;
            product.get_or_insert(out);
            built[i] = Some(out);
        }
        let logits = built
            .last()
            .copied()
            .flatten()
            .expect("the template ends with its logits");
        let product = product.expect("the head starts with a product");
        c.set_output(logits);
        c.set_output(product);
        let graph = c.graph(&[logits])?;
        let mut inputs = vec![hidden];
        let mut after = None;
        if logits != product {
            let seed = c.leaf(sys::GGML_TYPE_F32, c.ne(logits), "seed")?;
            inputs.push(seed);
            let mut g = seed;
            for node in record.nodes.iter().skip(1).rev() {
                let mut need = vec![false; node.src.len()];
                need[0] = true;
                g = vjp(&mut c, node, g, &need, &mut NoWeights)?[0].expect("asked for");
            }
            let g = c.packed(g)?;
            c.set_output(g);
            let n = c.n_nodes(graph);
            c.extend_graph(graph, &[g]);
            let end = c.n_nodes(graph);
            let back = c.graph_part(graph, n..end)?;
            after = Some((back, seed, g));
        }
        cpu.place(&mut c, &inputs)?;
        let whole = graph;
        let (graph, parts) = if let Some((back, _, _)) = after {
            // Forward alone: the nodes before the gradient's.
            let n_forward = c.n_nodes(whole) - c.n_nodes(back);
            if cpu.gpu().is_some() {
                let first_on_gpu = match cpu.side_of(None) {
                    Side::Device => 0,
                    Side::Host => usize::MAX,
                };
                place_apart(&mut c, cpu, (whole, n_forward), &[], first_on_gpu)?;
            }
            let forward = c.graph_part(whole, 0..n_forward)?;
            (forward, vec![forward, back])
        } else {
            (whole, vec![whole])
        };
        let plan = cpu.plan(&c, whole, &parts)?;
        let n_vocab = c.ne(logits)[0] as usize;
        Ok(Self {
            ctx: c,
            graph,
            after,
            plan,
            hidden,
            logits,
            n_embd: n_embd as usize,
            n_vocab,
            output_weight: template.output_weight.clone(),
            hidden_chunk: vec![0.0; n_embd as usize * CHUNK],
            scratch: Vec::new(),
        })
    }

    /// Size of the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// Width of a hidden row.
    pub fn n_embd(&self) -> usize {
        self.n_embd
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
        for first in (0..n_rows).step_by(CHUNK) {
            let n = CHUNK.min(n_rows - first);
            self.chunk(cpu, hidden, first, n)?;
            let logits = self.ctx.values(self.logits, &mut self.scratch)?;
            losses.grade(first, n, &mut logits[..n * self.n_vocab]);
        }
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
        for first in (0..n_rows).step_by(CHUNK) {
            let n = CHUNK.min(n_rows - first);
            self.chunk(cpu, hidden, first, n)?;
            let logits = self.ctx.values(self.logits, &mut self.scratch)?;
            losses.grade(first, n, &mut logits[..n * self.n_vocab]);
            logits[n * self.n_vocab..].fill(0.0);
            let grad = match self.after {
                Some((graph, seed, out)) => {
                    let wanted = logits.to_vec();
                    self.ctx.write(seed, &wanted)?;
                    cpu.compute(&self.ctx, &self.plan, graph)?;
                    self.ctx.values(out, &mut self.scratch)?
                }
                None => logits,
            };
            let into = &mut d_hidden[first * self.n_embd..(first + n) * self.n_embd];
            sparse_product(weights, &self.output_weight, grad, n, into)?;
        }
        Ok(())
    }

    fn chunk(
        &mut self,
        cpu: &mut Backend,
        hidden: &[f32],
        first: usize,
        n: usize,
    ) -> Result<(), GraphError> {
        let rows = &hidden[first * self.n_embd..(first + n) * self.n_embd];
        self.hidden_chunk[..rows.len()].copy_from_slice(rows);
        self.hidden_chunk[rows.len()..].fill(0.0);
        self.ctx.write(self.hidden, &self.hidden_chunk)?;
        cpu.compute(&self.ctx, &self.plan, self.graph)?;
        Ok(())
    }
}

/// `out [n_embd, n] = Wᵀ·g` for `W [n_embd, n_vocab]` and `g [n_vocab, n]`, over the rows of
/// W with a gradient above [`SPARSE`].
fn sparse_product(
    weights: &Weights,
    name: &str,
    g: &[f32],
    n: usize,
    out: &mut [f32],
) -> Result<(), GraphError> {
    let info = weights.info(name)?;
    let (n_embd, n_vocab) = (info.ne[0] as usize, info.ne[1] as usize);
    let (ty, row_bytes) = (info.ty.id(), info.row_bytes() as usize);
    let bytes = weights.bytes(name)?;
    let active: Vec<usize> = (0..n_vocab)
        .into_par_iter()
        .with_min_len(4096)
        .filter(|v| (0..n).any(|r| g[r * n_vocab + v].abs() > SPARSE))
        .collect();
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
