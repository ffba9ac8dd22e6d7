//! One place that owns the graphs: samples in, losses and gradients out.

use super::below::Below;
use super::dropout::Dropout;
use super::item::rows_of;
pub use super::item::{Aim, Item};
use super::layers::Layers;
use super::loss::{BatchLosses, Graded, Target};
use super::memory::{Budget, Need, Plan, Shape, own_bytes};
use crate::data::Sample;
use crate::error::Error;
use crate::ggml::{Backend, Split};
use crate::graph::GraphError;
use crate::graph::batch::{Packed, Sequence, TOKEN_PAD, pack};
use crate::graph::copies::{Copies, wanted};
use crate::graph::head::Head;
use crate::graph::prefix::Prefix;
use crate::graph::tape::{End, Part, Parts, Tape};
use crate::graph::template::{Adaptable, Entry, Step, Template};
use crate::graph::trained::{Factor, Factors, Trained};
use crate::graph::weights::{Multiplying, Weights, block_of};
use crate::likelihood::SampleLoss;
use crate::model::OpenModel;
use rayon::prelude::*;
use std::ops::Range;

/// Where memory is not counted ([`Engine::keep_to`]), batches of more tokens are computed twice
/// rather than kept: see [`Parts::recompute`].
const LONG_TOKENS: usize = 1024;
/// Queries of attention at a time in a batch that is computed twice.
const QUERIES: usize = 256;

/// What passes by a training run: buffers of the head, of a step's losses and of llama.cpp's contexts
/// before and after it.
const PASSING: u64 = 48 << 20;
/// Where the system does not say what a process holds.
const UNKNOWN_BASE: u64 = 128 << 20;
/// A plan does not hang on a few pages.
const ROUND: u64 = 16 << 20;

/// Graphs, scratch memory and threads for one model.
pub struct Engine<'m> {
    /// The model.
    pub open: &'m OpenModel,
    /// Its graph.
    pub template: Template,
    window: Option<usize>,
    multiplying: Multiplying,
    head: Head,
    tape: Option<(Tape, bool)>,
    /// The part of the graph below the adapters, if some of it is.
    below: Option<(Prefix, Below)>,
    max_tokens: usize,
    /// Bytes that graphs may take, if they are counted.
    room: Option<u64>,
    /// Batches of so many tokens are computed twice.
    too_long: usize,
    /// Tokens of a sample from which on attention is scaled by position.
    scaled_from: Option<usize>,
    hidden: Vec<f32>,
    seed: Vec<f32>,
    grad: Vec<f32>,
    /// The backend: last, as the graphs above hold memory of it.
    pub cpu: Backend,
}

impl<'m> Engine<'m> {
    /// Trace `open` and prepare its head. `max_tokens`: tokens per micro-batch, which
    /// bounds the memory of activations.
    ///
    /// # Errors
    /// A model that cannot be traced.
    pub fn new(open: &'m OpenModel, n_threads: usize, max_tokens: usize) -> Result<Self, Error> {
        let template = open.trace()?;
        let cpu = open.backend(n_threads)?;
        let mut multiplying = Multiplying::default();
        let window = usize::try_from(open.model.n_swa()).ok().filter(|&w| w > 0);
        let head = Head::new(
            &Parts {
                template: &template,
                weights: &open.weights,
                window,
                recompute: None,
                part: Part::Whole,
            },
            &cpu,
            &mut multiplying,
        )?;
        let scaled_from = scaled_from(&template, &open.weights)?;
        Ok(Self {
            open,
            template,
            cpu,
            window,
            multiplying,
            head,
            tape: None,
            below: None,
            max_tokens,
            room: None,
            too_long: LONG_TOKENS + 1,
            scaled_from,
            hidden: Vec::new(),
            seed: Vec::new(),
            grad: Vec::new(),
        })
    }

    /// Adapt these layers alone; what lies below the lowest is then computed once for each sample.
    ///
    /// # Errors
    /// Layers that the model does not have.
    pub fn on_layers(mut self, layers: Option<&Layers>) -> Result<Self, Error> {
        let Some(layers) = layers else {
            return Ok(self);
        };
        let n_blocks = self.open.n_blocks()?;
        let adapted = |t: &Adaptable| block_of(&t.name).is_some_and(|b| layers.has(b));
        if layers.last() >= n_blocks || !self.template.adaptable.iter().any(adapted) {
            return Err(Error::Setting {
                setting: "layers",
                wanted: format!("layers from 0 to {}", n_blocks - 1),
                found: layers.to_string(),
            });
        }
        self.template.adapt_only(adapted);
        let prefix = Prefix::of(&self.template);
        self.below = prefix.map(|p| {
            let widths = p.widths(&self.template);
            (p, Below::new(widths))
        });
        Ok(self)
    }

    /// Adapt the tensors alone whose names `keep` says yes to.
    pub fn on_tensors(mut self, keep: impl Fn(&str) -> bool) -> Self {
        self.template.adapt_only(|t| keep(&t.name));
        self
    }

    /// Compute everything in every pass, for comparison.
    pub fn without_prefix(mut self) -> Self {
        self.below = None;
        self
    }

    /// Samples and bytes of what is kept of the layers below the adapted ones.
    pub fn kept_below(&self) -> (usize, u64) {
        self.below.as_ref().map_or((0, 0), |(_, b)| b.held())
    }

    /// Multiply with exact f32 weights on the way back, for gradient checks: see [`Multiplying`].
    pub fn exact(mut self) -> Self {
        self.multiplying = Multiplying::exact();
        self
    }

    /// What a GPU leaves to the CPU of the last graph, if there is a GPU and a graph.
    pub fn split(&self) -> Option<Split> {
        let (tape, _) = self.tape.as_ref()?;
        self.cpu.gpu().map(|_| tape.split(&self.cpu))
    }

    /// What training pairs of `shape` takes, on samples of `lengths` tokens in one step. Graphs are
    /// built for it and not computed.
    ///
    /// # Errors
    /// A model that cannot be differentiated.
    pub fn need(&mut self, shape: &Shape, lengths: &[usize]) -> Result<Need, Error> {
        crate::ggml::return_free_memory();
        let base = own_bytes().unwrap_or(UNKNOWN_BASE) + PASSING;
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let tokens = lengths
            .iter()
            .sum::<usize>()
            .min(self.max_tokens.max(longest));
        let tokens = tokens.next_multiple_of(TOKEN_PAD);
        let list = shape.factors(&self.template.adaptable);
        let factors = self.factors(list)?;
        let graph = |recompute| -> Result<u64, Error> {
            let mut no_copies = Multiplying::default().only(Copies::default());
            let tape = Tape::new(
                &self.parts(recompute),
                Trained::Factors(&factors),
                End::Hidden,
                (tokens, tokens),
                true,
                &self.cpu,
                &mut no_copies,
            )?;
            Ok(tape.bytes() as u64)
        };
        Ok(Need {
            base: base.next_multiple_of(ROUND),
            state: shape.bytes(&self.template.adaptable),
            whole: graph(None)?,
            again: graph(Some(QUERIES))?,
            copies: wanted(&self.template, &self.open.weights)?,
        })
    }

    /// Make a plan for `memory`, or without it for what the machine has free, and keep to it; see
    /// [`Engine::need`] for the others. None where there is no telling what is free, and on a GPU: then
    /// memory is not counted.
    ///
    /// # Errors
    /// Less memory than training takes; what is free is not minded so far.
    pub fn plan(
        &mut self,
        memory: Option<Budget>,
        shape: &Shape,
        lengths: &[usize],
    ) -> Result<Option<Plan>, Error> {
        // A GPU's memory is another matter.
        let on_host = self.cpu.gpu().is_none();
        let free = || Budget::available(self.open.file_bytes()).filter(|_| on_host);
        let Some(budget) = memory.or_else(free) else {
            return Ok(None);
        };
        let need = self.need(shape, lengths)?;
        let budget = match memory {
            Some(budget) => budget,
            None => Budget(budget.0.max(need.least())),
        };
        let plan = need.plan(budget).map_err(Error::Train)?;
        self.keep_to(&plan);
        Ok(Some(plan))
    }

    /// Keep to `plan`.
    pub fn keep_to(&mut self, plan: &Plan) {
        self.reset();
        self.room = Some(plan.graph);
        self.too_long = usize::MAX;
        self.multiplying = Multiplying::default().only(plan.copies.clone());
        if let Some((_, below)) = &mut self.below {
            below.limit(plan.budget.0.saturating_sub(plan.bytes));
        }
    }

    /// Keep every batch whole, whatever memory that takes.
    pub fn keep_whole(&mut self) {
        self.too_long = usize::MAX;
    }

    fn parts(&self, recompute: Option<usize>) -> Parts<'_> {
        Parts {
            template: &self.template,
            weights: &self.open.weights,
            window: self.window,
            recompute,
            part: above(self.below.as_ref()),
        }
    }

    /// Bytes of graph memory and copies of weights in use.
    pub fn bytes(&self) -> usize {
        self.multiplying.bytes() + self.tape.as_ref().map_or(0, |(t, _)| t.bytes())
    }

    /// Losses of `items` in order, without gradients.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn losses(
        &mut self,
        trained: Trained<'_>,
        items: &[Item<'_>],
    ) -> Result<Vec<SampleLoss>, Error> {
        self.compute(trained, items, None, None)
    }

    /// Losses of `items`, and their gradients added to `grads` (one vector per trained
    /// tensor, in the tape's order), with `dropout` on the inputs of factors made for it.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn gradients(
        &mut self,
        trained: Trained<'_>,
        items: &[Item<'_>],
        dropout: Option<Dropout>,
        grads: &mut [Vec<f32>],
    ) -> Result<Vec<SampleLoss>, Error> {
        self.compute(trained, items, dropout, Some(grads))
    }

    fn compute(
        &mut self,
        trained: Trained<'_>,
        items: &[Item<'_>],
        dropout: Option<Dropout>,
        mut grads: Option<&mut [Vec<f32>]>,
    ) -> Result<Vec<SampleLoss>, Error> {
        let mut losses = vec![SampleLoss::default(); items.len()];
        let length = |s: &Sample| s.tokens.len() - 1;
        if let Some(most) = self.scaled_from {
            let lengths = items.iter().flat_map(|i| i.samples().map(length));
            if let Some(found) = lengths.filter(|&n| n > most).max() {
                return Err(Error::Setting {
                    setting: "max-tokens",
                    wanted: format!(
                        "at most {most}, as the model scales attention from there on by position, which \
                         is not trained"
                    ),
                    found: found.to_string(),
                });
            }
        }
        let lengths: Vec<usize> = items
            .iter()
            .map(|i| i.samples().map(length).sum())
            .collect();
        // An item's samples stay together: a loss of whole answers needs them all before the
        // first of its gradients.
        for (micro_batch, bin) in pack(&lengths, self.max_tokens).into_iter().enumerate() {
            let members: Vec<(&Item<'_>, &Sample, Vec<usize>)> = bin
                .iter()
                .flat_map(|&i| items[i].samples().map(move |s| (&items[i], s, rows_of(s))))
                .collect();
            let sequences: Vec<Sequence<'_>> = members
                .iter()
                .map(|(_, sample, rows)| Sequence {
                    tokens: &sample.tokens[..length(sample)],
                    rows,
                })
                .collect();
            let batch = Packed::new(&sequences);
            let mut targets = Vec::with_capacity(batch.n_rows);
            for (item, sample, rows) in &members {
                let (objective, weight) = item.row_target();
                targets.extend(rows.iter().enumerate().map(|(i, &r)| Target {
                    token: sample.tokens[r + 1],
                    objective,
                    teacher: item.teacher(i),
                    weight,
                }));
            }
            let masks = dropout.map(|d| (d, micro_batch));
            let gradient = grads.is_some();
            let below = self.below(&sequences, &batch)?;
            let graded = self.forward(trained, (&batch, below), &targets, masks, gradient)?;
            let mut at = 0;
            let mut spans = members.iter().map(|(_, _, rows)| {
                at += rows.len();
                at - rows.len()..at
            });
            let mut span = || spans.next().expect("one per sample");
            for &i in &bin {
                let item = &items[i];
                let own = span();
                let sum = |of: fn(&Graded) -> f64, rows: &Range<usize>| -> f64 {
                    graded[rows.clone()].iter().map(of).sum()
                };
                let loss = &mut losses[i];
                loss.loss = sum(|g| g.loss, &own);
                loss.nll = sum(|g| g.nll, &own);
                loss.n_tokens = own.len();
                let Aim::Answer { loss: whole, .. } = item.aim else {
                    continue;
                };
                let other = item.preferred().map(|_| span());
                let margin = loss.nll - other.as_ref().map_or(0.0, |rows| sum(|g| g.nll, rows));
                let (value, slope) = whole.grade(margin, own.len());
                loss.loss = value;
                if gradient {
                    let slope = slope as f32 * item.weight;
                    self.scale_rows(own, slope);
                    self.scale_rows(other.unwrap_or_default(), -slope);
                }
            }
            if let Some(grads) = grads.as_deref_mut() {
                self.backward(grads)?;
            }
        }
        Ok(losses)
    }

    /// What is read across from below the adapters, kept from an earlier pass or computed now.
    fn below(
        &mut self,
        sequences: &[Sequence<'_>],
        batch: &Packed,
    ) -> Result<Option<Vec<f32>>, Error> {
        let Some((prefix, below)) = &mut self.below else {
            return Ok(None);
        };
        let shape = (batch.n_tokens(), batch.n_padded_rows());
        if let Some(values) = below.of(sequences, shape.0) {
            return Ok(Some(values));
        }
        let parts = Parts {
            template: &self.template,
            weights: &self.open.weights,
            window: self.window,
            recompute: (shape.0 >= self.too_long).then_some(QUERIES),
            part: Part::Below(prefix),
        };
        let (cpu, copies) = (&mut self.cpu, &mut self.multiplying);
        let mut tape = Tape::new(
            &parts,
            Trained::Nothing,
            End::Hidden,
            shape,
            false,
            cpu,
            copies,
        )?;
        let mut values = Vec::new();
        tape.forward(cpu, batch, &mut values)?;
        tape.retire(cpu);
        below.keep(sequences, shape.0, &values);
        Ok(Some(values))
    }

    /// Losses of all rows; with `gradient`, the tape's seed `[n_embd, R]` is left behind.
    fn forward(
        &mut self,
        trained: Trained<'_>,
        (batch, below): (&Packed, Option<Vec<f32>>),
        targets: &[Target<'_>],
        dropout: Option<(Dropout, usize)>,
        gradient: bool,
    ) -> Result<Vec<Graded>, Error> {
        let shape = (batch.n_tokens(), batch.n_padded_rows());
        self.fit_tape(trained, shape, gradient, dropout.is_some())?;
        let (tape, _) = self.tape.as_mut().expect("fit_tape leaves one");
        match dropout {
            Some((d, micro_batch)) => {
                tape.set_dropout(Some(&|tensor, mask| d.fill(micro_batch, tensor, mask)))?;
            }
            None => tape.set_dropout(None)?,
        }
        if let Some(below) = below {
            tape.set_below(&below)?;
        }
        tape.forward(&mut self.cpu, batch, &mut self.hidden)?;
        let mut losses = BatchLosses::new(targets, gradient);
        let (hidden, n_rows) = (&self.hidden, batch.n_rows);
        if gradient {
            self.head.gradients(
                &mut self.cpu,
                &self.open.weights,
                hidden,
                n_rows,
                &mut losses,
                &mut self.seed,
            )?;
        } else {
            self.head
                .logits(&mut self.cpu, hidden, n_rows, &mut losses)?;
        }
        Ok(losses.graded)
    }

    /// Scale the seed of some rows: the head is linear on its way back.
    fn scale_rows(&mut self, rows: Range<usize>, by: f32) {
        let n = self.head.n_embd();
        for g in &mut self.seed[rows.start * n..rows.end * n] {
            *g *= by;
        }
    }

    /// Propagate the seed and add the gradients to `grads`.
    fn backward(&mut self, grads: &mut [Vec<f32>]) -> Result<(), Error> {
        let (tape, _) = self.tape.as_mut().expect("the forward pass left one");
        tape.backward(&mut self.cpu, &self.seed)?;
        for (i, total) in grads.iter_mut().enumerate() {
            self.grad.resize(total.len(), 0.0);
            tape.read_grad(i, &mut self.grad)?;
            total
                .par_iter_mut()
                .zip(&self.grad)
                .with_min_len(1 << 14)
                .for_each(|(t, g)| *t += g);
        }
        Ok(())
    }

    /// A tape of this shape; the last one is kept, since most batches repeat a shape.
    fn fit_tape(
        &mut self,
        trained: Trained<'_>,
        shape: (usize, usize),
        gradient: bool,
        dropout: bool,
    ) -> Result<(), Error> {
        let fits = |(t, g): &(Tape, bool)| {
            t.shape() == shape && (*g || !gradient) && (t.has_dropout() || !dropout)
        };
        if self.tape.as_ref().is_some_and(fits) {
            return Ok(());
        }
        if let Some((tape, _)) = self.tape.take() {
            tape.retire(&self.cpu);
        }
        let mut again = shape.0 >= self.too_long;
        loop {
            let parts = Parts {
                template: &self.template,
                weights: &self.open.weights,
                window: self.window,
                recompute: again.then_some(QUERIES),
                part: above(self.below.as_ref()),
            };
            let tape = Tape::new(
                &parts,
                trained,
                End::Hidden,
                shape,
                gradient,
                &self.cpu,
                &mut self.multiplying,
            )?;
            let fits = self.room.is_none_or(|room| tape.bytes() as u64 <= room);
            if fits || again {
                self.tape = Some((tape, gradient));
                return Ok(());
            }
            // Nothing of it was computed: its memory was never touched.
            self.too_long = shape.0;
            again = true;
        }
    }

    /// Forget the graph: the factors it was built over are about to change shape.
    pub fn reset(&mut self) {
        self.tape = None;
    }

    /// Factors in this engine's backend memory.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn factors(&self, list: Vec<Factor>) -> Result<Factors, Error> {
        Ok(Factors::new(&self.cpu, &self.template, list)?)
    }
}

fn above(below: Option<&(Prefix, Below)>) -> Part<'_> {
    below.map_or(Part::Whole, |(prefix, _)| Part::Above(prefix))
}

/// The number of tokens up to which `inp_attn_scale` is what the trace saw of it, 1 throughout, where
/// the graph reads it: llama.cpp's `ln(⌊(pos + offset)/length⌋ + 1)·scale + 1`
/// (`llm_graph_input_attn_temp`), with an offset of 0 or 1.
fn scaled_from(template: &Template, weights: &Weights) -> Result<Option<usize>, GraphError> {
    let reads = |e: &Entry| e.name == "inp_attn_scale" && matches!(e.step, Step::Leaf(_));
    if !template.entries.iter().any(reads) {
        return Ok(None);
    }
    let (meta, arch) = (weights.set().metadata(), weights.arch()?);
    let length = match arch {
        "llama4" => Some(8192),
        "mistral3" => meta.get_opt::<u32>("mistral3.rope.scaling.original_context_length")?,
        _ => meta.get_opt::<u32>(&format!("{arch}.attention.temperature_length"))?,
    };
    Ok(length.map(|n| n.saturating_sub(1) as usize))
}
