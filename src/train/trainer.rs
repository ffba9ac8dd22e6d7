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
use crate::project::{RolTerm, rol};
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
pub struct Trainer<'m> {
    /// Graphs.
    pub engine: Engine<'m>,
    /// Parameters.
    pub pairs: Pairs,
    /// AdamW's moments, in the tape's order.
    pub moments: Vec<Moments>,
    /// Optimiser steps taken.
    pub step: u64,
    factors: Factors,
    grads: Vec<Vec<f32>>,
}

impl<'m> Trainer<'m> {
    /// Start from `pairs`.
    ///
    /// # Errors
    /// When their memory cannot be had.
    pub fn new(engine: Engine<'m>, pairs: Pairs) -> Result<Self, Error> {
        let mut factors = engine.factors(pairs.factors())?;
        pairs.write_all(&mut factors)?;
        let lengths = pairs.lengths();
        Ok(Self {
            engine,
            moments: lengths.iter().map(|&n| Moments::new(n)).collect(),
            grads: lengths.iter().map(|&n| vec![0.0; n]).collect(),
            factors,
            pairs,
            step: 0,
        })
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
        for g in &mut self.grads {
            g.fill(0.0);
        }
        let dropout = (config.dropout > 0.0).then_some(Dropout {
            rate: config.dropout,
            seed: config.seed,
            step: self.step,
        });
        self.factors.dropout = dropout.is_some();
        let trained = Trained::Factors(&self.factors);
        let losses = self
            .engine
            .gradients(trained, &items, dropout, &mut self.grads)?;
        let rol = match config.constraint {
            Constraint::Rol if config.lambda > 0.0 => Some(self.add_rol(config)?),
            _ => None,
        };
        let grad_norm = self.grad_norm();
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
        for ((x, g), m) in self
            .pairs
            .params_mut()
            .zip(&self.grads)
            .zip(&mut self.moments)
        {
            m.update(&adamw, x, g, lr, clip, self.step);
        }
        if config.constraint == Constraint::Project {
            self.pairs.project()?;
        }
        self.pairs.write_trained(&mut self.factors)?;
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

    /// Forget the running direction of the optimiser (AdamW's first moments), not its scale.
    pub fn rest(&mut self) {
        for m in &mut self.moments {
            m.m.fill(0.0);
        }
    }

    /// Parameters were changed from outside: bring them into the graphs' memory.
    ///
    /// # Errors
    /// Never for the pairs this trainer was made with.
    pub fn refresh(&mut self) -> Result<(), Error> {
        self.pairs.write_all(&mut self.factors)
    }

    fn add_rol(&mut self, config: &TrainConfig) -> Result<f64, Error> {
        let factor = config.rol.factor(self.pairs.total_rank());
        let mut terms: Vec<RolTerm<'_>> = self
            .pairs
            .list
            .iter()
            .zip(self.grads.chunks_exact_mut(2))
            .map(|(p, grads)| RolTerm {
                lora_b: &p.b,
                basis: &p.basis,
                rank: p.rank,
                n_out: p.tensor.n_out,
                grad: &mut grads[1],
            })
            .collect();
        let sum = rol(&mut terms, config.lambda * factor as f32)?;
        Ok(sum * factor)
    }

    fn grad_norm(&self) -> f64 {
        let squares: Vec<f64> = self
            .grads
            .par_iter()
            .map(|g| g.iter().map(|&v| f64::from(v) * f64::from(v)).sum())
            .collect();
        squares.iter().sum::<f64>().sqrt()
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
