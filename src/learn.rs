//! Plain LoRA fine-tuning, end to end: from a model and texts to an adapter on disk.

use crate::adapter::open_adapters;
use crate::atomic::AtomicError;
use crate::data::{Record, Sample, Template, salted_hash, samples};
use crate::digest::{Digest, of_model};
use crate::error::Error;
use crate::model::OpenModel;
use crate::patch::{Info, Patch, Update, base_of};
use crate::score::evaluate;
use crate::train::adapters::Pairs;
use crate::train::checkpoint::{Checkpoint, Identity};
use crate::train::config::TrainConfig;
use crate::train::engine::Engine;
use crate::train::fit::Ended;
use crate::train::learn::{LearnState, learn as fit};
use crate::train::memory::{Budget, Shape};
use crate::train::net::net_updates;
use crate::train::trainer::Trainer;
use crate::unlearn::{Measured, Ui};
use serde::Serialize;
use std::path::PathBuf;

/// A whole run.
pub struct Job<'a> {
    /// Model.
    pub open: &'a OpenModel,
    /// Chat template.
    pub template: Template,
    /// What is to be learned.
    pub records: Vec<Record>,
    /// Settings.
    pub config: TrainConfig,
    /// Rank of the pairs.
    pub rank: usize,
    /// Stop at this mean answer probability.
    pub until_prob: Option<f64>,
    /// ggml threads.
    pub n_threads: usize,
    /// What the run may take beside the mapped model; none: what the machine has free.
    pub memory: Option<Budget>,
    /// The adapter to write.
    pub out: PathBuf,
    /// Replace it if it exists.
    pub force: bool,
    /// Where an interrupted run is put.
    pub checkpoint: PathBuf,
    /// Go on from there instead of starting.
    pub resume: bool,
}

/// What a run did.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Why training ended.
    pub ended: Ended,
    /// Optimiser steps.
    pub steps: u64,
    /// The model alone.
    pub before: Measured,
    /// With the adapter as written.
    pub after: Measured,
    /// Size of the adapter, bytes.
    pub adapter_bytes: u64,
}

/// Learn, and write the adapter.
///
/// # Errors
/// As [`crate::unlearn::unlearn`].
pub fn learn(job: Job<'_>, ui: &mut dyn Ui) -> Result<Report, Error> {
    let config = &job.config;
    if !job.force && job.out.exists() {
        return Err(AtomicError::Exists { path: job.out }.into());
    }
    let open = job.open;
    let mut notices = Vec::new();
    let data = samples(
        &open.model,
        &job.template,
        &job.records,
        config.max_tokens,
        "data",
        &mut notices,
    )?;
    for notice in &notices {
        ui.notice(notice);
    }
    let mut engine =
        Engine::new(open, job.n_threads, config.micro_tokens)?.on_layers(config.layers.as_ref())?;
    let adaptable = engine.template.adaptable.clone();
    let identity = Identity {
        base: of_model(open.weights.set())?,
        data: Digest(salted_hash(&job.records, b"learn")),
        config: serde_json::json!({ "train": config, "rank": job.rank, "until_prob": job.until_prob }),
    };
    let (mut trainer, mut state) = if job.resume {
        let checkpoint: Checkpoint<LearnState> =
            Checkpoint::open(&job.checkpoint, &identity, &adaptable)?;
        let mut state = checkpoint.state;
        let memory = job.memory.or(state.memory);
        state.memory = plan(&mut engine, memory, &job, &data)?;
        let mut trainer = Trainer::new(engine, checkpoint.pairs)?;
        trainer.moments = checkpoint.moments;
        trainer.step = checkpoint.step;
        (trainer, state)
    } else {
        let memory = plan(&mut engine, job.memory, &job, &data)?;
        let scale = config.alpha / job.rank as f32;
        let pairs = Pairs::lora(&adaptable, job.rank, scale, config.seed, Vec::new());
        let steps = config.fixed_steps(data.len()).unwrap_or(1);
        let mut state = LearnState::new(config, steps, job.until_prob, data.len());
        state.memory = memory;
        (Trainer::new(engine, pairs)?, state)
    };
    let before = measure(&job, &Vec::new(), ui, "before")?;
    open.release();
    let ended = fit(&mut trainer, config, &mut state, &data, ui)?;
    if ended == Ended::Interrupted {
        let (pairs, moments, step) = trainer.into_parts()?;
        let checkpoint = Checkpoint {
            identity,
            pairs,
            moments,
            step,
            state,
            before: None,
        };
        checkpoint.save(&job.checkpoint)?;
        return Err(Error::Interrupted {
            checkpoint: job.checkpoint,
            step: checkpoint.step,
        });
    }
    let mut info = Info::new(
        base_of(&open.weights)?,
        "learn",
        identity.config,
        config.seed,
    );
    info.training =
        serde_json::json!({ "steps": trainer.step, "ended": ended, "samples": data.len() });
    let (pairs, _, steps) = trainer.into_parts()?;
    let mut updates = Vec::with_capacity(pairs.list.len());
    for net in net_updates(open, pairs, config.constraint)? {
        info.tensors.push(net.info(open)?);
        updates.push(Update::of(&net.tensor, &net.net));
    }
    let patch = Patch::new(open.weights.arch()?, info, updates);
    open.release();
    let adapter_bytes = patch.save(&job.out, job.force)?;
    let adapters = open_adapters(open, [(job.out.as_path(), 1.0)])?;
    let after = measure(&job, &adapters, ui, "after")?;
    Ok(Report {
        ended,
        steps,
        before,
        after,
        adapter_bytes,
    })
}

/// Plan memory for a run on `data`, and keep to it; what it was planned for.
fn plan(
    engine: &mut Engine<'_>,
    memory: Option<Budget>,
    job: &Job<'_>,
    data: &[Sample],
) -> Result<Option<Budget>, Error> {
    let shape = Shape {
        rank: job.rank,
        frozen: false,
        basis: 0,
        snapshots: 0,
        beneath: 0,
    };
    let n = job.config.step_samples().min(data.len());
    let plan = engine.plan(memory, &shape, &longest(data, n))?;
    Ok(plan.map(|p| p.budget))
}

/// Token counts of `n` samples, each as long as the longest.
pub(crate) fn longest(data: &[Sample], n: usize) -> Vec<usize> {
    let longest = data.iter().map(|s| s.tokens.len()).max();
    vec![longest.unwrap_or(1); n]
}

fn measure(
    job: &Job<'_>,
    adapters: &crate::adapter::Loaded,
    ui: &mut dyn Ui,
    stage: &str,
) -> Result<Measured, Error> {
    let limits = (job.config.max_tokens, job.n_threads);
    let progress = &mut |done, total| ui.progress(stage, done, total);
    let e = evaluate(
        &job.open.model,
        adapters,
        &job.template,
        &job.records,
        false,
        limits,
        progress,
    )?;
    Ok(Measured {
        n: e.n,
        prob: e.prob,
        rouge_l: e.rouge_l,
        nll: e.nll,
    })
}
