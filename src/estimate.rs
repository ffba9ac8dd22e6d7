//! What a run will take: memory by the plan it would follow, time from one micro-batch.

use crate::data::Sample;
use crate::error::Error;
use crate::graph::batch::pack;
use crate::model::OpenModel;
use crate::sets::Sets;
use crate::train::adapters::Pairs;
use crate::train::config::{Init, UnlearnConfig};
use crate::train::engine::Engine;
use crate::train::memory::Budget;
use crate::train::trainer::{Forget, StepBatch, Trainer};
use crate::unlearn::{most_rank, plan};
use serde::Serialize;
use std::time::Instant;

/// Tokens of the step that comes before the measured one.
const WARM_UP: usize = 32;

/// What a run will take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Size of the model file, mapped.
    pub model_bytes: u64,
    /// Peak memory beside it.
    pub memory_bytes: u64,
    /// Peak of both, as the kernel counts a process's memory (`VmHWM`): the file's pages are in
    /// it while they are mapped, once.
    pub resident_bytes: u64,
    /// Whether layers are computed again on the way back.
    pub recompute: bool,
    /// Weights of which copies are kept, and bytes of those copies.
    pub copies: usize,
    /// Their bytes.
    pub copies_bytes: u64,
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
    /// The memory in words.
    pub fn memory_text(&self) -> String {
        let mib = |bytes: u64| bytes >> 20;
        format!(
            "{} MiB of its own beside the model file's {} MiB: {} MiB resident{}{}",
            mib(self.memory_bytes),
            mib(self.model_bytes),
            mib(self.resident_bytes),
            match self.copies {
                0 => String::new(),
                n => format!(", {n} stacks of experts copied for the way back"),
            },
            match self.recompute {
                true => ", layers computed twice",
                false => "",
            }
        )
    }

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

/// Estimate memory, time and disk.
///
/// # Errors
/// A model that cannot be traced, or a budget that is too small.
pub fn estimate(
    open: &OpenModel,
    sets: &Sets,
    config: &UnlearnConfig,
    n_threads: usize,
    memory: Option<Budget>,
) -> Result<Estimate, Error> {
    let mut engine = Engine::new(open, n_threads, config.train.micro_tokens)?
        .on_layers(config.train.layers.as_ref())?;
    let plan = plan(&mut engine, memory, sets, config, None)?;
    let adaptable = engine.template.adaptable.clone();
    let mut pairs = Pairs::lora(&adaptable, most_rank(config, sets), 1.0, 0, Vec::new());
    if config.train.init == Init::Rila {
        for p in &mut pairs.list {
            p.initial = Some((p.a.clone(), p.b.clone()));
        }
    }
    let n_params: usize = pairs.lengths().iter().sum();
    let n_bases: usize = adaptable
        .iter()
        .map(|t| t.n_out * config.subspace.retain_rank)
        .sum();
    let mut trainer = Trainer::new(engine, pairs)?;
    open.release();
    let step_seconds = seconds(&mut trainer, sets, config)?;
    let fixed = config.train.fixed_steps(sets.forget.len());
    let model_bytes = open.file_bytes();
    let (memory_bytes, recompute, copies, copies_bytes) = match &plan {
        Some(p) => (p.bytes, p.recompute, p.copies.len(), p.copies.bytes),
        None => {
            let held = trainer.engine.bytes() + trainer.bytes();
            (held as u64, false, 0, 0)
        }
    };
    Ok(Estimate {
        model_bytes,
        memory_bytes,
        resident_bytes: memory_bytes + model_bytes,
        recompute,
        copies,
        copies_bytes,
        step_seconds,
        max_steps: fixed.unwrap_or(config.stop.max_steps),
        fixed: fixed.is_some(),
        patch_bytes: 2 * 2 * n_params as u64,
        checkpoint_bytes: 4 * (4 * n_params + n_bases) as u64,
    })
}

/// Seconds of a step on samples of both sets: its largest micro-batch is computed, the others by
/// their tokens, and the optimiser once.
fn seconds(trainer: &mut Trainer<'_>, sets: &Sets, config: &UnlearnConfig) -> Result<f64, Error> {
    let n = config.train.step_samples();
    let spread = |set: &[Sample]| -> Vec<usize> {
        let n = n.min(set.len());
        (0..n).map(|i| i * set.len() / n).collect()
    };
    let forget = spread(&sets.forget);
    let retain = match config.train.objective.has_retain() {
        true => spread(&sets.retain),
        false => Vec::new(),
    };
    let of_forget = |i: usize| {
        let preferred = sets.preferred.get(i).map_or(0, |s| s.tokens.len());
        sets.forget[i].tokens.len() + preferred
    };
    let lengths: Vec<usize> = forget
        .iter()
        .map(|&i| of_forget(i))
        .chain(retain.iter().map(|&i| sets.retain[i].tokens.len()))
        .collect();
    let bins = pack(&lengths, config.train.micro_tokens);
    let tokens = |bin: &[usize]| bin.iter().map(|&i| lengths[i]).sum::<usize>();
    let largest = bins
        .iter()
        .max_by_key(|bin| tokens(bin))
        .expect("a forget set");
    let mut batch = StepBatch {
        forget_share: 1.0,
        ..StepBatch::default()
    };
    for &i in largest {
        match forget.get(i) {
            Some(&i) => batch.forget.push(Forget {
                sample: &sets.forget[i],
                preferred: sets.preferred.get(i),
                reference: 0.0,
            }),
            None => batch.retain.push(&sets.retain[retain[i - forget.len()]]),
        }
    }
    // Copies are made and pages read by the first step on whatever tokens.
    let mut short = sets.forget[0].clone();
    short.tokens.truncate(WARM_UP);
    short.answers = std::iter::once(1..short.tokens.len()).collect();
    let warm_up = StepBatch {
        retain: vec![&short],
        ..StepBatch::default()
    };
    trainer.step(&config.train, &warm_up, 0.0)?;
    let mut time = |batch: &StepBatch<'_>| -> Result<f64, Error> {
        let began = Instant::now();
        trainer.step(&config.train, batch, 0.0)?;
        Ok(began.elapsed().as_secs_f64())
    };
    let update = time(&StepBatch::default())?;
    let one = time(&batch)? - update;
    Ok(update + one.max(0.0) * lengths.iter().sum::<usize>() as f64 / tokens(largest) as f64)
}
