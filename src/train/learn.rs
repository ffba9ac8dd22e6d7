//! Plain LoRA fine-tuning: the trainer without a forget set. It makes the models that know what
//! is to be forgotten, and relearning attacks.

use super::adamw::linear_schedule;
use super::config::TrainConfig;
use super::fit::{Ended, Event, Watch};
use super::memory::Budget;
use super::order::Order;
use super::trainer::{StepBatch, Trainer};
use crate::data::Sample;
use crate::error::Error;
use crate::likelihood::mean_prob;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Where learning stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LearnState {
    /// Most steps.
    pub steps: usize,
    /// Stop at this mean answer probability^(1/tokens), looked at after every pass.
    pub until_prob: Option<f64>,
    /// Mean answer probability at the last look.
    pub prob: Option<f64>,
    /// What memory was planned for: another plan might round otherwise.
    #[serde(default)]
    pub memory: Option<Budget>,
    order: Order,
}

impl LearnState {
    /// Before the first step, over `n` samples.
    pub fn new(config: &TrainConfig, steps: usize, until_prob: Option<f64>, n: usize) -> Self {
        Self {
            steps,
            until_prob,
            prob: None,
            memory: None,
            order: Order::new(config.seed, 4, n),
        }
    }
}

/// Learn `samples`.
///
/// # Errors
/// When ggml fails or training runs away.
pub fn learn(
    trainer: &mut Trainer<'_>,
    config: &TrainConfig,
    state: &mut LearnState,
    samples: &[Sample],
    watch: &mut dyn Watch,
) -> Result<Ended, Error> {
    let n = config.step_samples().min(samples.len());
    let pass = samples.len().div_ceil(n);
    let warmup = config.warmup.unwrap_or(pass.min(state.steps.div_ceil(10)));
    loop {
        let step = trainer.step as usize;
        if watch.stop() {
            return Ok(Ended::Interrupted);
        }
        if let Some(until) = state.until_prob
            && step > 0
            && (step.is_multiple_of(pass) || step >= state.steps)
        {
            let all: Vec<&Sample> = samples.iter().collect();
            let prob = mean_prob(&trainer.losses(&all)?);
            state.prob = Some(prob);
            watch.seen(&Event::Learned {
                step: trainer.step,
                prob,
            });
            if prob >= until {
                return Ok(Ended::Learned);
            }
        }
        if step >= state.steps {
            return Ok(if state.until_prob.is_some() {
                Ended::NotReached
            } else {
                Ended::Steps
            });
        }
        let began = Instant::now();
        let lr = linear_schedule(config.lr, step, warmup, state.steps);
        let drawn = state.order.take(n);
        let batch = StepBatch {
            retain: drawn.iter().map(|&i| &samples[i]).collect(),
            ..StepBatch::default()
        };
        let report = trainer.step(config, &batch, lr)?;
        watch.seen(&Event::Step {
            step: trainer.step,
            of: state.steps,
            lr,
            report: &report,
            seconds: began.elapsed().as_secs_f64(),
        });
    }
}
