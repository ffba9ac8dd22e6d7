//! One optimiser step: gradients of the batch, the constraint, clipping, AdamW.

use super::adamw::{AdamWConfig, Moments};
use super::adapters::Pairs;
use super::config::{Constraint, TrainConfig};
use super::dropout::Dropout;
use super::engine::{Engine, Item};
use crate::data::Sample;
use crate::error::Error;
use crate::graph::trained::{Factors, Trained};
use crate::likelihood::SampleLoss;
use crate::project::{RolTerm, project_lora_b, rol};
use rayon::prelude::*;
use serde::Serialize;

/// What one step did. Losses are means over the batch's answer tokens, those of whole answers
/// over its samples.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StepReport {
    /// Loss on the forget samples.
    pub forget: Option<f64>,
    /// Cross-entropy on the retain rows.
    pub retain: Option<f64>,
    /// ROL as it enters the loss, before λ.
    pub rol: Option<f64>,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens computed.
    pub tokens: usize,
    /// Per forget sample of the batch.
    #[serde(skip)]
    pub forget_losses: Vec<SampleLoss>,
}

/// What [`Trainer::descend`] did.
#[derive(Debug, Clone, Default)]
pub struct Descent {
    /// Of every item, before the step.
    pub losses: Vec<SampleLoss>,
    /// ROL as it enters the loss, before λ.
    pub rol: Option<f64>,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
}

/// A forget sample and what losses of whole answers compare it with.
#[derive(Debug, Clone, Copy)]
pub struct Forget<'a> {
    /// The sample.
    pub sample: &'a Sample,
    /// The answer preferred to its own (DPO).
    pub preferred: Option<&'a Sample>,
    /// Its answer's NLL under the untouched model, less that of the preferred one (NPO, DPO).
    pub reference: f64,
}

/// The samples of one step.
#[derive(Debug, Clone, Default)]
pub struct StepBatch<'a> {
    /// Towards forgetting.
    pub forget: Vec<Forget<'a>>,
    /// Towards keeping.
    pub retain: Vec<&'a Sample>,
    /// Share of a full forget batch: what is left to forget pulls no harder when it is little.
    pub forget_share: f32,
}

/// Parameters, moments, gradients and the graphs they are trained through.
///
/// Parameters, what they started from and gradients are in the graphs' memory alone, one copy each.
pub struct Trainer<'m> {
    /// Graphs.
    pub engine: Engine<'m>,
    /// AdamW's moments, in the tape's order.
    pub moments: Vec<Moments>,
    /// Optimiser steps taken.
    pub step: u64,
    /// Without their values ([`Pairs::hollow`]).
    pairs: Pairs,
    factors: Factors,
}

/// A pair in the middle of an optimiser step: parameters and gradients of A and B.
#[derive(Default)]
struct Turn {
    params: [Vec<f32>; 2],
    grads: [Vec<f32>; 2],
}

impl<'m> Trainer<'m> {
    /// Start from `pairs`.
    ///
    /// # Errors
    /// When their memory cannot be had.
    pub fn new(engine: Engine<'m>, mut pairs: Pairs) -> Result<Self, Error> {
        let mut factors = engine.factors(pairs.factors())?;
        pairs.write_all(&mut factors)?;
        let lengths = pairs.lengths();
        pairs.hollow();
        factors.sum_gradients(&engine.cpu, &engine.template)?;
        Ok(Self {
            engine,
            moments: lengths.iter().map(|&n| Moments::new(n)).collect(),
            factors,
            pairs,
            step: 0,
        })
    }

    /// What was trained: parameters with what they started from, moments, steps taken. The graphs
    /// go first.
    ///
    /// # Errors
    /// Never for pairs of this trainer.
    pub fn into_parts(self) -> Result<(Pairs, Vec<Moments>, u64), Error> {
        let Self {
            engine,
            moments,
            step,
            mut pairs,
            factors,
        } = self;
        drop(engine);
        pairs.fill(&factors)?;
        Ok((pairs, moments, step))
    }

    /// The trained tensors in the tape's order: A, B of the first pair, ...
    ///
    /// # Errors
    /// Never for pairs of this trainer.
    pub fn params(&self) -> Result<Vec<Vec<f32>>, Error> {
        self.read(0..self.pairs.list.len())
    }

    /// Parameters at which the net update is zero, in the tape's order: where RILA began; for
    /// plain LoRA the A of now and B = 0.
    ///
    /// # Errors
    /// Never for pairs of this trainer.
    pub fn start(&self) -> Result<Vec<Vec<f32>>, Error> {
        let n = self.pairs.list.len();
        if self.pairs.list.iter().all(|p| p.initial.is_some()) {
            return self.read(n..2 * n);
        }
        let mut params = self.params()?;
        for b in params.iter_mut().skip(1).step_by(2) {
            b.fill(0.0);
        }
        Ok(params)
    }

    fn read(&self, factors: std::ops::Range<usize>) -> Result<Vec<Vec<f32>>, Error> {
        let mut values = Vec::new();
        for i in factors {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            self.factors.read(i, &mut a, &mut b)?;
            values.extend([a, b]);
        }
        Ok(values)
    }

    /// Put the parameters at `from + at·(to − from)`.
    ///
    /// # Errors
    /// Never for parameters of this trainer.
    pub fn set_between(
        &mut self,
        from: &[Vec<f32>],
        to: &[Vec<f32>],
        at: f32,
    ) -> Result<(), Error> {
        let between = |i: usize| -> Vec<f32> {
            let values = from[i].iter().zip(&to[i]);
            values.map(|(b, a)| b + at * (a - b)).collect()
        };
        for i in 0..self.pairs.list.len() {
            self.factors
                .write(i, &between(2 * i), &between(2 * i + 1))?;
        }
        Ok(())
    }

    /// Losses of `samples` with the parameters as they are.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn losses(&mut self, samples: &[&Sample]) -> Result<Vec<SampleLoss>, Error> {
        self.engine
            .losses(Trained::Factors(&self.factors), &remembered(samples, 1.0))
    }

    /// Losses of `samples` under the untouched model: no factors in the graph.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn base_losses(&mut self, samples: &[&Sample]) -> Result<Vec<SampleLoss>, Error> {
        self.engine.reset();
        let losses = self
            .engine
            .losses(Trained::Nothing, &remembered(samples, 1.0));
        self.engine.reset();
        losses
    }

    /// Take one step at learning rate `lr`.
    ///
    /// # Errors
    /// When ggml fails, or a gradient is not finite.
    pub fn step(
        &mut self,
        config: &TrainConfig,
        batch: &StepBatch<'_>,
        lr: f32,
    ) -> Result<StepReport, Error> {
        let n_forget = if config.objective.is_whole() {
            batch.forget.len().max(1) as f32
        } else {
            n_tokens(batch.forget.iter().map(|f| f.sample))
        };
        let n_retain = n_tokens(batch.retain.iter().copied());
        let mut items: Vec<Item<'_>> = batch
            .forget
            .iter()
            .map(|f| Item {
                sample: f.sample,
                aim: config.aim(f),
                weight: batch.forget_share / n_forget,
            })
            .collect();
        items.extend(remembered(&batch.retain, config.gamma / n_retain));
        let Descent {
            losses,
            rol,
            grad_norm,
        } = self.descend(config, &items, lr)?;
        let (forget, retain) = losses.split_at(batch.forget.len());
        let mean = |set: &[SampleLoss], n: f32| {
            (!set.is_empty()).then(|| set.iter().map(|l| l.loss).sum::<f64>() / f64::from(n))
        };
        Ok(StepReport {
            forget: mean(forget, n_forget),
            retain: mean(retain, n_retain),
            rol,
            grad_norm,
            tokens: items.iter().map(Item::n_tokens).sum(),
            forget_losses: forget.to_vec(),
        })
    }

    /// Take one step down the weighted losses of `items`, whatever they are.
    ///
    /// # Errors
    /// When ggml fails, or a gradient is not finite.
    pub fn descend(
        &mut self,
        config: &TrainConfig,
        items: &[Item<'_>],
        lr: f32,
    ) -> Result<Descent, Error> {
        self.factors.clear_gradients()?;
        let dropout = (config.dropout > 0.0).then_some(Dropout {
            rate: config.dropout,
            seed: config.seed,
            step: self.step,
        });
        self.factors.dropout = dropout.is_some();
        let trained = Trained::Factors(&self.factors);
        let losses = self.engine.gradients(trained, items, dropout, &mut [])?;
        let rol = match config.constraint {
            Constraint::Rol if config.lambda > 0.0 => Some(self.add_rol(config)?),
            _ => None,
        };
        let grad_norm = self.grad_norm()?;
        if !grad_norm.is_finite() {
            return Err(Error::NotFinite {
                what: "the gradient",
                step: self.step + 1,
            });
        }
        let clip = match f64::from(config.clip) {
            c if c > 0.0 && grad_norm > c => (c / grad_norm) as f32,
            _ => 1.0,
        };
        self.step += 1;
        let adamw = AdamWConfig {
            weight_decay: config.weight_decay,
            ..AdamWConfig::default()
        };
        self.update(&adamw, lr, clip, config.constraint == Constraint::Project)?;
        Ok(Descent {
            losses,
            rol,
            grad_norm,
        })
    }

    /// Forget the running direction of the optimiser (AdamW's first moments), not its scale.
    pub fn rest(&mut self) {
        for m in &mut self.moments {
            m.m.fill(0.0);
        }
    }

    /// AdamW on every pair, a few at a time, and with `project` every B back into the complement of
    /// its P.
    fn update(
        &mut self,
        adamw: &AdamWConfig,
        lr: f32,
        clip: f32,
        project: bool,
    ) -> Result<(), Error> {
        let width = rayon::current_num_threads();
        let mut turns: Vec<Turn> = (0..width).map(|_| Turn::default()).collect();
        for first in (0..self.pairs.list.len()).step_by(width) {
            let pairs = &self.pairs.list[first..(first + width).min(self.pairs.list.len())];
            for (i, turn) in turns.iter_mut().enumerate().take(pairs.len()) {
                let [a, b] = &mut turn.params;
                self.factors.read(first + i, a, b)?;
                for (part, grad) in turn.grads.iter_mut().enumerate() {
                    self.factors.gradient(2 * (first + i) + part, grad)?;
                }
            }
            let moments = &mut self.moments[2 * first..2 * (first + pairs.len())];
            let step = self.step;
            turns
                .par_iter_mut()
                .zip(pairs)
                .zip(moments.par_chunks_mut(2))
                .with_max_len(1)
                .try_for_each(|((turn, pair), moments)| {
                    let of = turn.params.iter_mut().zip(&turn.grads).zip(moments);
                    for ((x, g), m) in of {
                        m.update(adamw, x, g, lr, clip, step);
                    }
                    if project && !pair.basis.is_empty() {
                        let b = &mut turn.params[1];
                        project_lora_b(b, &pair.basis, pair.rank, pair.tensor.n_out)?;
                    }
                    Ok::<(), Error>(())
                })?;
            for (i, turn) in turns.iter().enumerate().take(pairs.len()) {
                let [a, b] = &turn.params;
                self.factors.write(first + i, a, b)?;
            }
        }
        Ok(())
    }

    fn add_rol(&mut self, config: &TrainConfig) -> Result<f64, Error> {
        let factor = config.rol.factor(self.pairs.total_rank());
        let n = self.pairs.list.len();
        let mut of_b = Vec::with_capacity(n);
        for i in 0..n {
            let (mut a, mut b, mut grad) = (Vec::new(), Vec::new(), Vec::new());
            self.factors.read(i, &mut a, &mut b)?;
            self.factors.gradient(2 * i + 1, &mut grad)?;
            of_b.push((b, grad));
        }
        let pairs = self.pairs.list.iter();
        let mut terms: Vec<RolTerm<'_>> = pairs
            .zip(&mut of_b)
            .map(|(p, (b, grad))| RolTerm {
                lora_b: b,
                basis: &p.basis,
                rank: p.rank,
                n_out: p.tensor.n_out,
                grad,
            })
            .collect();
        let sum = rol(&mut terms, config.lambda * factor as f32)?;
        for (i, (_, grad)) in of_b.iter().enumerate() {
            self.factors.set_gradient(2 * i + 1, grad)?;
        }
        Ok(sum * factor)
    }

    fn grad_norm(&self) -> Result<f64, Error> {
        let (mut squares, mut g) = (0.0, Vec::new());
        for i in 0..self.moments.len() {
            self.factors.gradient(i, &mut g)?;
            squares += g.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
        }
        Ok(squares.sqrt())
    }

    /// Bytes of parameters, gradients, moments and bases.
    pub fn bytes(&self) -> usize {
        let moments: usize = self.moments.iter().map(|m| 8 * m.m.len()).sum();
        let bases: usize = self.pairs.list.iter().map(|p| 4 * p.basis.len()).sum();
        self.factors.bytes() + moments + bases
    }
}

fn remembered<'a>(samples: &[&'a Sample], weight: f32) -> Vec<Item<'a>> {
    samples
        .iter()
        .map(|s| Item::remembered(s, weight))
        .collect()
}

/// Answer tokens, at least one: what a mean divides by.
fn n_tokens<'a>(samples: impl Iterator<Item = &'a Sample>) -> f32 {
    samples.map(Sample::n_answer_tokens).sum::<usize>().max(1) as f32
}
