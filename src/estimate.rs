//! What a run will take, from one micro-batch.

use crate::data::Sample;
use crate::error::Error;
use crate::model::OpenModel;
use crate::sets::Sets;
use crate::start::CAPTURE_SAMPLES;
use crate::train::adapters::Pairs;
use crate::train::config::UnlearnConfig;
use crate::train::engine::Engine;
use crate::train::trainer::{Forget, StepBatch, Trainer};
use serde::Serialize;
use std::time::Instant;

/// What a run will take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Size of the model file, mapped.
    pub model_bytes: u64,
    /// Peak memory beside it.
    pub memory_bytes: u64,
    /// Seconds a step, measured on one micro-batch.
    pub step_seconds: f64,
    /// Steps at most.
    pub max_steps: usize,
    /// Whether that many will be taken.
    pub fixed: bool,
    /// Size of the patch.
    pub patch_bytes: u64,
    /// Size of a checkpoint.
    pub checkpoint_bytes: u64,
}

impl Estimate {
    /// The time in words.
    pub fn time_text(&self) -> String {
        let all = crate::progress::short_time(self.step_seconds * self.max_steps as f64);
        if self.fixed {
            format!("{all} for {} steps", self.max_steps)
        } else {
            format!(
                "at most {all} ({} steps); the unseen level usually comes earlier",
                self.max_steps
            )
        }
    }
}

/// Estimate memory, time and disk, by computing one micro-batch.
///
/// # Errors
/// A model that cannot be traced.
pub fn estimate(
    open: &OpenModel,
    sets: &Sets,
    config: &UnlearnConfig,
    n_threads: usize,
) -> Result<Estimate, Error> {
    let engine = Engine::new(open, n_threads, config.train.micro_tokens)?;
    let adaptable = engine.template.adaptable.clone();
    let rank = config.subspace.rank;
    let pairs = Pairs::lora(&adaptable, rank, 1.0, 0, Vec::new());
    let n_params: usize = pairs.lengths().iter().sum();
    let n_bases: usize = adaptable
        .iter()
        .map(|t| t.n_out * config.subspace.retain_rank)
        .sum();
    let mut trainer = Trainer::new(engine, pairs)?;
    let mean_tokens = |set: &[Sample]| {
        set.iter().map(|s| s.tokens.len()).sum::<usize>() as f64 / set.len().max(1) as f64
    };
    let retain: &[Sample] = if config.train.objective.has_retain() {
        &sets.retain
    } else {
        &[]
    };
    let step_tokens = config.train.step_samples() as f64
        * (mean_tokens(&sets.forget) + mean_tokens(&sets.preferred) + mean_tokens(retain));
    let alone = |sample| Forget {
        sample,
        preferred: None,
        reference: 0.0,
    };
    let mut batch = StepBatch {
        forget_share: 1.0,
        ..StepBatch::default()
    };
    let (mut tokens, mut samples) = (0, sets.forget.iter().chain(&sets.retain));
    while let Some(s) = samples
        .next()
        .filter(|s| tokens + s.tokens.len() <= config.train.micro_tokens)
    {
        tokens += s.tokens.len();
        batch.forget.push(alone(s));
    }
    if batch.forget.is_empty() {
        tokens = sets.forget[0].tokens.len();
        batch.forget.push(alone(&sets.forget[0]));
    }
    // The first step makes the transposed copies; the second is what every later one costs.
    trainer.step(&config.train, &batch, 0.0)?;
    let began = Instant::now();
    trainer.step(&config.train, &batch, 0.0)?;
    let seconds = began.elapsed().as_secs_f64();
    let fixed = config.train.fixed_steps(sets.forget.len());
    let n_captured =
        sets.forget.len().min(CAPTURE_SAMPLES) + sets.retain.len().min(CAPTURE_SAMPLES);
    let pooled: usize = adaptable.iter().map(|t| t.n_out * n_captured * 4).sum();
    let parameters = 4 * (2 * n_params + 4 * n_params + n_bases);
    let training = trainer.engine.bytes() + parameters;
    let parts = open.weights.set().parts();
    Ok(Estimate {
        model_bytes: parts.iter().map(crate::gguf::Gguf::file_len).sum(),
        // Capture comes first and is gone when training starts.
        memory_bytes: training.max(3 * pooled) as u64,
        step_seconds: seconds * step_tokens / tokens as f64,
        max_steps: fixed.unwrap_or(config.stop.max_steps),
        fixed: fixed.is_some(),
        patch_bytes: 2 * 2 * n_params as u64,
        checkpoint_bytes: 4 * (4 * n_params + n_bases) as u64,
    })
}
