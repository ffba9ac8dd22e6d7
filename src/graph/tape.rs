//! Forward and backward graphs for one batch shape, over the mapped model and a set of
//! low-rank factors.

use super::GraphError;
use super::batch::Packed;
use super::build::{Builder, Built, Chosen, Inputs};
pub use super::part::Part;
use super::place::{DEEP, place_apart};
use super::template::Template;
use super::trained::Trained;
use super::weights::{Multiplying, Weights};
use crate::ggml::{Backend, Ctx, Graph, Plan, Split, Tensor};

/// Writes the dropout mask `[n_in, T]` of the adaptable tensor with this index.
pub type FillMask<'a> = &'a dyn Fn(usize, &mut [f32]);

/// Where the graph ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Final hidden state `[n_embd, R]`; the head is computed elsewhere, in chunks.
    Hidden,
    /// Logits `[n_vocab, R]`.
    Logits,
}

/// The model as a tape sees it.
pub struct Parts<'a> {
    /// The graph.
    pub template: &'a Template,
    /// The mapped file.
    pub weights: &'a Weights,
    /// Sliding window, if the model has one.
    pub window: Option<usize>,
    /// Compute layers again on the way back instead of keeping their results, and attention by at
    /// most so many queries at a time: for long sequences.
    pub recompute: Option<usize>,
    /// Which part of the graph.
    pub part: Part<'a>,
}

/// Forward and backward graphs of one shape.
pub struct Tape {
    ctx: Ctx,
    forward: Graph,
    backward: Option<Graph>,
    plan: Plan,
    inputs: Inputs,
    dropping: bool,
    outputs: Vec<Tensor>,
    seed: Option<Tensor>,
    grads: Vec<Tensor>,
    /// Bytes of tensors that the plan does not place.
    apart: usize,
    chosen: Vec<Chosen>,
    shape: (usize, usize),
}

impl Tape {
    /// Build the graphs for `n_tokens` tokens and `n_rows` output rows. Without `gradient`,
    /// or without anything trainable, there is no backward graph.
    ///
    /// # Errors
    /// Ops that cannot be rebuilt or differentiated, and want of memory.
    pub fn new(
        parts: &Parts<'_>,
        trained: Trained<'_>,
        end: End,
        (n_tokens, n_rows): (usize, usize),
        gradient: bool,
        cpu: &Backend,
        multiplying: &mut Multiplying,
    ) -> Result<Self, GraphError> {
        let mut builder = Builder::new(
            parts,
            trained,
            (n_tokens, n_rows),
            gradient,
            cpu,
            multiplying,
        )?;
        let outputs = builder.forward(end)?;
        let full = builder.c.graph(&outputs)?;
        let n_forward = builder.c.n_nodes(full);
        let (seed, grads) = builder.backward(outputs[0])?.unzip();
        let grads = grads.unwrap_or_default();
        let Built {
            c: mut ctx,
            inputs,
            chosen,
            first_on_gpu,
        } = builder.built();
        let (forward, backward) = if seed.is_some() {
            ctx.extend_graph(full, &grads);
            let n = ctx.n_nodes(full);
            let forward = ctx.graph_part(full, 0..n_forward)?;
            (forward, Some(ctx.graph_part(full, n_forward..n)?))
        } else {
            (full, None)
        };
        if inputs.tokens.is_empty() && inputs.below.is_empty() {
            return Err(GraphError::Untraceable("its graph reads no tokens".into()));
        }
        let mut apart = cpu.place(&mut ctx, &inputs.all)?.size();
        let on_gpu = cpu.gpu().is_some() && backward.is_some();
        if on_gpu || parts.template.entries.len() > DEEP {
            apart += place_apart(&mut ctx, cpu, (full, n_forward), &grads, first_on_gpu)?;
        }
        for &(x, value) in &inputs.constants {
            let values = vec![value; ctx.n_elements(x)];
            ctx.write(x, &values)?;
        }
        let passes: Vec<Graph> = [forward].into_iter().chain(backward).collect();
        let plan = cpu.plan(&ctx, full, &passes)?;
        let mut tape = Self {
            ctx,
            forward,
            backward,
            plan,
            dropping: !inputs.dropout.is_empty(),
            inputs,
            outputs,
            seed,
            grads,
            apart,
            chosen,
            shape: (n_tokens, n_rows),
        };
        tape.set_dropout(None)?;
        Ok(tape)
    }

    /// Leave the graphs' memory to the next tape on `cpu`.
    pub fn retire(self, cpu: &Backend) {
        cpu.retire(self.plan);
    }

    /// Whether the graph has dropout masks to set.
    pub fn has_dropout(&self) -> bool {
        !self.inputs.dropout.is_empty()
    }

    /// Set the masks for the passes to come. `None` takes dropout out: all ones, which change no
    /// bit.
    ///
    /// # Errors
    /// Never for a tape that was built.
    pub fn set_dropout(&mut self, fill: Option<FillMask<'_>>) -> Result<(), GraphError> {
        if fill.is_none() && !self.dropping {
            return Ok(());
        }
        let mut mask = Vec::new();
        for &(tensor, leaf) in &self.inputs.dropout {
            mask.clear();
            mask.resize(self.ctx.n_elements(leaf), 1.0);
            if let Some(fill) = fill {
                fill(tensor, &mut mask);
            }
            self.ctx.write(leaf, &mask)?;
        }
        self.dropping = fill.is_some();
        Ok(())
    }

    /// Give what is read across from below, one tensor after another, as the tape of the part
    /// [below](Part::Below) puts it out.
    ///
    /// # Errors
    /// Another length.
    pub fn set_below(&mut self, values: &[f32]) -> Result<(), GraphError> {
        let wanted: usize = self
            .inputs
            .below
            .iter()
            .map(|&b| self.ctx.n_elements(b))
            .sum();
        if values.len() != wanted {
            return Err(GraphError::Batch {
                what: "values from below",
                wanted,
                found: values.len(),
            });
        }
        let mut at = 0;
        for &b in &self.inputs.below {
            let n = self.ctx.n_elements(b);
            self.ctx.write(b, &values[at..at + n])?;
            at += n;
        }
        Ok(())
    }

    /// (T, R) the graphs were built for.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Bytes of intermediate tensors and gradients.
    pub fn bytes(&self) -> usize {
        self.plan.bytes + self.apart
    }

    /// Number of trained tensors.
    pub fn n_grads(&self) -> usize {
        self.grads.len()
    }

    /// Compute the output `[n_embd or n_vocab, R]` for a batch of this shape.
    ///
    /// # Errors
    /// A batch of another shape.
    pub fn forward(
        &mut self,
        cpu: &mut Backend,
        batch: &Packed,
        out: &mut Vec<f32>,
    ) -> Result<(), GraphError> {
        let check = |what, wanted, found| {
            if wanted == found {
                Ok(())
            } else {
                Err(GraphError::Batch {
                    what,
                    wanted,
                    found,
                })
            }
        };
        check("tokens", self.shape.0, batch.n_tokens())?;
        check("rows", self.shape.1, batch.n_padded_rows())?;
        for &tokens in &self.inputs.tokens {
            self.ctx.write(tokens, &batch.tokens)?;
        }
        if let Some(p) = self.inputs.positions {
            let sections = self.ctx.n_elements(p) / batch.positions.len();
            // Multi-section rope: time, height and width agree for text, the fourth is 0.
            let mut positions = batch.positions.repeat(sections.min(3));
            positions.resize(sections * batch.positions.len(), 0);
            self.ctx.write(p, &positions)?;
        }
        if let Some(ids) = self.inputs.out_ids {
            self.ctx.write(ids, &batch.rows)?;
        }
        for &(first, window) in &self.inputs.firsts {
            self.ctx.write(first, &batch.first_seen(window))?;
        }
        if let Some(numbers) = self.inputs.numbers {
            let numbered: Vec<f32> = (0..batch.n_tokens()).map(|i| i as f32).collect();
            self.ctx.write(numbers.keys, &numbered)?;
            self.ctx.write(numbers.queries, &numbered)?;
        }
        for &(m, kind) in &self.inputs.masks {
            self.ctx.write(m, &batch.mask(kind))?;
        }
        cpu.compute(&self.ctx, &self.plan, self.forward)?;
        out.clear();
        for &output in &self.outputs {
            let at = out.len();
            out.resize(at + self.ctx.n_elements(output), 0.0);
            self.ctx.read(output, &mut out[at..])?;
        }
        Ok(())
    }

    /// Propagate `seed`, the gradient of the output of the last forward pass.
    ///
    /// # Errors
    /// Another length, or a tape without anything trainable.
    pub fn backward(&mut self, cpu: &mut Backend, seed: &[f32]) -> Result<(), GraphError> {
        let (Some(graph), Some(s)) = (self.backward, self.seed) else {
            return Err(GraphError::NoRule {
                op: "of a tape without parameters".into(),
            });
        };
        self.ctx.write(s, seed)?;
        cpu.compute(&self.ctx, &self.plan, graph)?;
        Ok(())
    }

    /// Gradient of trained tensor `i` after [`Tape::backward`]: for factors A and B of each
    /// trainable factor in turn, for whole weights their order.
    ///
    /// # Errors
    /// Another length.
    pub fn read_grad(&self, i: usize, out: &mut [f32]) -> Result<(), GraphError> {
        Ok(self.ctx.read(self.grads[i], out)?)
    }

    /// The experts that the last forward pass chose: for each choice the graph makes (one a layer,
    /// as a rule) and each token or output row there, their ids in ascending order.
    ///
    /// # Errors
    /// Never for a tape that was computed.
    pub fn chosen_experts(&self) -> Result<Vec<Vec<Vec<i32>>>, GraphError> {
        let ids = |c: &Chosen| {
            let mut ranking = vec![0i32; self.ctx.n_elements(c.ranking)];
            self.ctx.read(c.ranking, &mut ranking)?;
            let row = self.ctx.ne(c.ranking)[0] as usize;
            let of_token = |row: &[i32]| {
                let mut ids = row[..c.used].to_vec();
                ids.sort_unstable();
                ids
            };
            Ok(ranking.chunks_exact(row).map(of_token).collect())
        };
        self.chosen.iter().map(ids).collect()
    }

    /// What of both passes a GPU leaves to the CPU.
    pub fn split(&self, cpu: &Backend) -> Split {
        let mut split = cpu.split(&self.ctx, self.forward);
        if let Some(backward) = self.backward {
            let more = cpu.split(&self.ctx, backward);
            split.nodes += more.nodes;
            for (op, n) in more.on_cpu {
                *split.on_cpu.entry(op).or_default() += n;
            }
        }
        split
    }

    /// Elements of gradient `i`.
    pub fn grad_len(&self, i: usize) -> usize {
        self.ctx.n_elements(self.grads[i])
    }
}
