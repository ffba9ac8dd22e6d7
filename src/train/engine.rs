//! One place that owns the graphs: samples in, losses and gradients out.

use super::loss::{BatchLosses, RowObjective, Target};
use crate::data::Sample;
use crate::error::Error;
use crate::ggml::Cpu;
use crate::graph::batch::{Packed, Sequence, pack};
use crate::graph::head::Head;
use crate::graph::tape::{End, Factors, Parts, Tape, Trained};
use crate::graph::template::Template;
use crate::graph::trace::trace;
use crate::graph::weights::Transposed;
use crate::model::OpenModel;
use rayon::prelude::*;

/// A sample to compute, what its answer tokens are trained towards, and their weight.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// The sample.
    pub sample: &'a Sample,
    /// Objective of its rows.
    pub objective: RowObjective,
    /// Weight of each row.
    pub weight: f32,
}

/// Losses of one sample, summed over its answer tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SampleLoss {
    /// Σ objective.
    pub loss: f64,
    /// Σ −log p.
    pub nll: f64,
    /// Answer tokens.
    pub n_tokens: usize,
}

impl SampleLoss {
    /// Mean −log p of an answer token.
    pub fn per_token(&self) -> f64 {
        self.nll / self.n_tokens.max(1) as f64
    }
}

/// Graphs, scratch memory and threads for one model.
pub struct Engine<'m> {
    /// The model.
    pub open: &'m OpenModel,
    /// Its graph.
    pub template: Template,
    /// The backend.
    pub cpu: Cpu,
    window: Option<usize>,
    transposed: Transposed,
    head: Head,
    tape: Option<(Tape, bool)>,
    max_tokens: usize,
    hidden: Vec<f32>,
    seed: Vec<f32>,
    grad: Vec<f32>,
}

impl<'m> Engine<'m> {
    /// Trace `open` and prepare its head. `max_tokens`: tokens per micro-batch, which
    /// bounds the memory of activations.
    ///
    /// # Errors
    /// A model that cannot be traced.
    pub fn new(open: &'m OpenModel, n_threads: usize, max_tokens: usize) -> Result<Self, Error> {
        let template = trace(&open.model, &open.weights)?;
        let cpu = Cpu::new(n_threads)?;
        let window = usize::try_from(open.model.n_swa()).ok().filter(|&w| w > 0);
        let head = Head::new(
            &Parts {
                template: &template,
                weights: &open.weights,
                window,
            },
            &cpu,
        )?;
        Ok(Self {
            open,
            template,
            cpu,
            window,
            transposed: Transposed::default(),
            head,
            tape: None,
            max_tokens,
            hidden: Vec::new(),
            seed: Vec::new(),
            grad: Vec::new(),
        })
    }

    /// Bytes of graph memory and transposed weights in use.
    pub fn bytes(&self) -> usize {
        self.transposed.bytes() + self.tape.as_ref().map_or(0, |(t, _)| t.bytes())
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
        self.compute(trained, items, None)
    }

    /// Losses of `items`, and their gradients added to `grads` (one vector per trained
    /// tensor, in the tape's order).
    ///
    /// # Errors
    /// When ggml fails.
    pub fn gradients(
        &mut self,
        trained: Trained<'_>,
        items: &[Item<'_>],
        grads: &mut [Vec<f32>],
    ) -> Result<Vec<SampleLoss>, Error> {
        self.compute(trained, items, Some(grads))
    }

    fn compute(
        &mut self,
        trained: Trained<'_>,
        items: &[Item<'_>],
        mut grads: Option<&mut [Vec<f32>]>,
    ) -> Result<Vec<SampleLoss>, Error> {
        let mut losses = vec![SampleLoss::default(); items.len()];
        let lengths: Vec<usize> = items.iter().map(|i| i.sample.tokens.len() - 1).collect();
        for bin in pack(&lengths, self.max_tokens) {
            let rows: Vec<Vec<usize>> = bin.iter().map(|&i| rows_of(items[i].sample)).collect();
            let sequences: Vec<Sequence<'_>> = bin
                .iter()
                .zip(&rows)
                .map(|(&i, rows)| Sequence {
                    tokens: &items[i].sample.tokens[..lengths[i]],
                    rows,
                })
                .collect();
            let batch = Packed::new(&sequences);
            let mut targets = Vec::with_capacity(batch.n_rows);
            for (&i, rows) in bin.iter().zip(&rows) {
                targets.extend(rows.iter().map(|&r| Target {
                    token: items[i].sample.tokens[r + 1],
                    objective: items[i].objective,
                    weight: items[i].weight,
                }));
            }
            let graded = self.micro_batch(trained, &batch, &targets, grads.as_deref_mut())?;
            let mut at = 0;
            for (&i, rows) in bin.iter().zip(&rows) {
                for g in &graded[at..at + rows.len()] {
                    losses[i].loss += g.loss;
                    losses[i].nll += g.nll;
                }
                losses[i].n_tokens = rows.len();
                at += rows.len();
            }
        }
        Ok(losses)
    }

    fn micro_batch(
        &mut self,
        trained: Trained<'_>,
        batch: &Packed,
        targets: &[Target],
        grads: Option<&mut [Vec<f32>]>,
    ) -> Result<Vec<super::loss::Graded>, Error> {
        let gradient = grads.is_some();
        self.fit_tape(trained, (batch.n_tokens(), batch.n_padded_rows()), gradient)?;
        let (tape, _) = self.tape.as_mut().expect("fit_tape leaves one");
        tape.forward(&mut self.cpu, batch, &mut self.hidden)?;
        let mut losses = BatchLosses::new(targets, gradient);
        let n_rows = batch.n_rows;
        let Some(grads) = grads else {
            self.head
                .logits(&mut self.cpu, &self.hidden, n_rows, &mut losses)?;
            return Ok(losses.graded);
        };
        let weights = &self.open.weights;
        self.head.gradients(
            &mut self.cpu,
            weights,
            &self.hidden,
            n_rows,
            &mut losses,
            &mut self.seed,
        )?;
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
        Ok(losses.graded)
    }

    /// A tape of this shape; the last one is kept, since most batches repeat a shape.
    fn fit_tape(
        &mut self,
        trained: Trained<'_>,
        shape: (usize, usize),
        gradient: bool,
    ) -> Result<(), Error> {
        let fits = |(t, g): &(Tape, bool)| t.shape() == shape && (*g || !gradient);
        if self.tape.as_ref().is_some_and(fits) {
            return Ok(());
        }
        self.tape = None;
        let parts = Parts {
            template: &self.template,
            weights: &self.open.weights,
            window: self.window,
        };
        let tape = Tape::new(
            &parts,
            trained,
            End::Hidden,
            shape,
            gradient,
            &self.cpu,
            &mut self.transposed,
        )?;
        self.tape = Some((tape, gradient));
        Ok(())
    }

    /// Forget the graph: the factors it was built over are about to change shape.
    pub fn reset(&mut self) {
        self.tape = None;
    }

    /// Factors in this engine's backend memory.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn factors(&self, list: Vec<crate::graph::tape::Factor>) -> Result<Factors, Error> {
        Ok(Factors::new(&self.cpu, &self.template, list)?)
    }
}

/// Rows whose next token is an answer token.
fn rows_of(sample: &Sample) -> Vec<usize> {
    sample
        .answers
        .iter()
        .flat_map(|a| a.clone())
        .filter(|&j| j > 0)
        .map(|j| j - 1)
        .collect()
}

/// Mean over samples of each one's mean answer NLL.
pub fn mean_nll(losses: &[SampleLoss]) -> f64 {
    losses.iter().map(SampleLoss::per_token).sum::<f64>() / losses.len().max(1) as f64
}

/// Mean over samples of answer probability^(1/tokens).
pub fn mean_prob(losses: &[SampleLoss]) -> f64 {
    let probs = losses.iter().map(|l| (-l.per_token()).exp());
    probs.sum::<f64>() / losses.len().max(1) as f64
}
