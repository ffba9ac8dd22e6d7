//! The main path: open model → data → capture → subspaces → train → project → patch.
//!
//! Every stage is a function of its own and most artifacts are also files, so that each stage
//! can be run alone.

use crate::adapter::{Loaded, load_patch};
use crate::atomic::AtomicError;
use crate::data::{Record, Template, salted_hash};
use crate::digest::{Digest, of_model};
use crate::error::Error;
use crate::merge::leave::leave_sketch;
use crate::merge::sketch::companion;
use crate::model::OpenModel;
use crate::patch::{Info, Patch, base_of};
use crate::progress;
use crate::proof::choose;
use crate::score::evaluate;
use crate::sets::{Sets, general_samples};
use crate::start::{CAPTURE_SAMPLES, lowered, start, subspace_config, subspaces};
use crate::subspace::RetainBasis;
use crate::train::checkpoint::{Checkpoint, Identity};
use crate::train::config::{Constraint, Init, UnlearnConfig};
use crate::train::engine::Engine;
use crate::train::fit::{Ended, FitState, Watch, fit};
use crate::train::memory::{Budget, Plan, Shape};
use crate::train::net::{NetReport, net_updates};
use crate::train::trainer::Trainer;
use crate::unseen::{UnseenLevel, until};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Samples of each set in the table before and after.
const MEASURED: usize = 40;

/// A whole run.
pub struct Job<'a> {
    /// Model.
    pub open: &'a OpenModel,
    /// Chat template.
    pub template: Template,
    /// What is to be forgotten.
    pub forget: Vec<Record>,
    /// What is to be kept; none: the built-in general text.
    pub retain: Option<Vec<Record>>,
    /// Questions like the forget set's that the model has never seen, with their answers; they
    /// give the unseen level. Empty: it is estimated.
    pub unseen: Vec<Record>,
    /// Answers to prefer under DPO; none: built-in ones.
    pub refusals: Option<Vec<String>>,
    /// Retain bases computed before.
    pub shared: Option<Vec<RetainBasis>>,
    /// Settings.
    pub config: UnlearnConfig,
    /// ggml threads.
    pub n_threads: usize,
    /// What the run may take beside the mapped model; none: what the machine has free.
    pub memory: Option<Budget>,
    /// The patch to write.
    pub out: PathBuf,
    /// Replace it if it exists.
    pub force: bool,
    /// Leave beside the patch what a device without the texts needs to merge it.
    pub sketch: bool,
    /// Write greedy answers before and after, for ROUGE: most of the time on a large model.
    pub generate: bool,
    /// Where an interrupted run is put.
    pub checkpoint: PathBuf,
    /// Go on from there instead of starting.
    pub resume: bool,
}

/// Shows a run to the user, and may stop it.
pub trait Ui: Watch + progress::Ui {}

impl<T: Watch + progress::Ui> Ui for T {}

/// Answers of one set, before or after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Samples measured.
    pub n: usize,
    /// Mean answer probability^(1/tokens).
    pub prob: f64,
    /// Mean ROUGE-L recall of greedy answers.
    pub rouge_l: Option<f64>,
    /// Mean answer NLL.
    pub nll: f64,
}

/// Both sets.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Both {
    /// Forget set.
    pub forget: Measured,
    /// Retain set.
    pub retain: Measured,
}

/// The sketch beside a patch.
#[derive(Debug, Clone, Serialize)]
pub struct SketchLeft {
    /// Where it is.
    pub path: PathBuf,
    /// Its size, bytes.
    pub bytes: u64,
}

/// What a run did.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Why training ended.
    pub ended: Ended,
    /// Optimiser steps.
    pub steps: u64,
    /// The unseen level, where it was the end.
    pub level: Option<UnseenLevel>,
    /// The model alone.
    pub before: Both,
    /// The model with the patch as written.
    pub after: Both,
    /// Mean ‖ΔW‖/‖W‖ over adapted tensors.
    pub relative_norm: f64,
    /// Largest ‖PᵀΔW‖/‖ΔW‖.
    pub retain_fraction: f64,
    /// Adapted tensors.
    pub n_tensors: usize,
    /// Size of the patch, bytes.
    pub patch_bytes: u64,
    /// What a merge without texts needs, if it was left beside the patch.
    pub sketch: Option<SketchLeft>,
    /// Seconds from start to finish.
    pub seconds: f64,
}

/// Everything a loop needs to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct RunState {
    fit: FitState,
    level: Option<UnseenLevel>,
    /// What memory was planned for: another plan might round otherwise.
    #[serde(default)]
    memory: Option<Budget>,
}

/// Forget: from a model and texts to a patch on disk.
///
/// # Errors
/// Bad data or settings, a model that cannot be traced, failures of engine and disk, and
/// [`Error::Interrupted`] when the watcher stopped the run (a checkpoint is then on disk).
pub fn unlearn(mut job: Job<'_>, ui: &mut dyn Ui) -> Result<Report, Error> {
    let began = Instant::now();
    job.check()?;
    let sets = job.sets(ui)?;
    let (mut trainer, identity, mut state) = begin(&mut job, &sets, ui)?;
    trainer.engine.reset();
    job.open.release();
    let before = measure_both(&job, &sets, &Vec::new(), "before", ui)?;
    job.open.release();
    if let Some(level) = &state.level {
        let from = level.source.text();
        ui.notice(&format!(
            "unseen level: answer NLL {:.2} ({from}); now {:.2}",
            level.nll, before.forget.nll
        ));
    }
    let config = &job.config;
    let ended = fit(
        &mut trainer,
        &config.train,
        &config.stop,
        &mut state.fit,
        sets.fit_data(),
        ui,
    )?;
    if ended == Ended::Interrupted {
        return Err(keep(job.checkpoint, identity, trainer, state)?);
    }
    if ended == Ended::NotReached {
        ui.notice(&format!(
            "the unseen level was not reached in {} steps; --max-steps or a higher --lr may help",
            trainer.step
        ));
    }
    let (pairs, _, steps) = trainer.into_parts()?;
    let nets = net_updates(job.open, pairs, config.train.constraint)?;
    let mut info = provenance(&job, &sets, identity)?;
    info.training = serde_json::json!({
        "steps": steps, "ended": ended, "level": state.level, "checks": state.fit.checks,
        "general_retain": sets.general,
    });
    let mut patch = patch_of(job.open, info, &nets)?;
    job.open.release();
    let adapters = vec![(load_patch(&job.open.model, &patch)?, 1.0)];
    let after = measure_both(&job, &sets, &adapters, "after", ui)?;
    let canaries = choose(&job.open.model, &adapters, job.n_threads)?;
    if canaries.is_empty() {
        ui.notice(
            "the patch changes neutral text too little for canaries to show that it is active",
        );
    }
    if let Some(info) = &mut patch.info {
        info.metrics = serde_json::json!({ "before": before, "after": after });
        info.canaries = canaries;
    }
    let patch_bytes = patch.save(&job.out, job.force)?;
    let sketch = job
        .sketch
        .then(|| left_beside(&job, &sets, ui))
        .transpose()?;
    let mean = |f: fn(&NetReport) -> f64| nets.iter().map(f).sum::<f64>() / nets.len() as f64;
    Ok(Report {
        ended,
        steps,
        level: state.level,
        before,
        after,
        relative_norm: mean(|n| n.relative_norm),
        retain_fraction: nets.iter().map(|n| n.retain_fraction).fold(0.0, f64::max),
        n_tensors: nets.len(),
        patch_bytes,
        sketch,
        seconds: began.elapsed().as_secs_f64(),
    })
}

impl Job<'_> {
    /// Refuse what would only fail after hours of training.
    fn check(&self) -> Result<(), Error> {
        self.config.train.validate()?;
        self.config.stop.validate()?;
        let beside = self.sketch.then(|| companion(&self.out));
        for path in [Some(&self.out), beside.as_ref()].into_iter().flatten() {
            if !self.force && path.exists() {
                let path = path.clone();
                return Err(AtomicError::Exists { path }.into());
            }
        }
        Ok(())
    }

    fn sets(&mut self, ui: &mut dyn Ui) -> Result<Sets, Error> {
        let train = &self.config.train;
        let sets = Sets::new(
            self.open,
            &self.template,
            std::mem::take(&mut self.forget),
            self.retain.take(),
            &self.unseen,
            train.max_tokens,
        )?
        .prefer(self.refusals.as_deref(), self.open, &self.template, train)?;
        for notice in &sets.notices {
            ui.notice(notice);
        }
        Ok(sets)
    }
}

/// A trainer at its first step, or where the checkpoint left it.
fn begin<'m>(
    job: &mut Job<'m>,
    sets: &Sets,
    ui: &mut dyn Ui,
) -> Result<(Trainer<'m>, Identity, RunState), Error> {
    let (open, config) = (job.open, &job.config);
    let mut engine = Engine::new(open, job.n_threads, config.train.micro_tokens)?
        .on_layers(config.train.layers.as_ref())?;
    let adaptable = engine.template.adaptable.clone();
    let identity = Identity {
        base: of_model(open.weights.set())?,
        data: sets.digest(),
        config: serde_json::to_value(config).expect("plain values"),
    };
    if job.resume {
        let checkpoint: Checkpoint<RunState> =
            Checkpoint::open(&job.checkpoint, &identity, &adaptable)?;
        let mut state = checkpoint.state;
        let memory = job.memory.or(state.memory);
        let plan = plan(&mut engine, memory, sets, config, job.shared.as_deref())?;
        state.memory = plan.map(|p| p.budget);
        let mut trainer = Trainer::new(engine, checkpoint.pairs)?;
        trainer.moments = checkpoint.moments;
        trainer.step = checkpoint.step;
        state.fit.before = checkpoint.before;
        return Ok((trainer, identity, state));
    }
    let plan = plan(&mut engine, job.memory, sets, config, job.shared.as_deref())?;
    let subspaces = subspaces(
        open,
        &adaptable,
        (&sets.forget, &sets.retain),
        job.shared.take(),
        &subspace_config(config),
        job.n_threads,
        plan.as_ref().map(|p| p.before),
        &mut |done, total| ui.progress("capturing outputs", done, total),
    )?;
    open.release();
    if let Some(notice) = lowered(&subspaces) {
        ui.notice(&notice);
    }
    let pairs = start(open, &adaptable, subspaces, config)?;
    if pairs.list.is_empty() {
        return Err(Error::NothingToTrain);
    }
    let mut trainer = Trainer::new(engine, pairs)?;
    let (until, level) = until(&mut trainer, open, &job.template, sets, config)?;
    let mut fit = FitState::new(&config.train, until, sets.forget.len(), sets.retain.len());
    if config.train.objective.has_reference() {
        fit.reference = sets.fit_data().references(&mut trainer)?;
    }
    let memory = plan.map(|p| p.budget);
    Ok((trainer, identity, RunState { fit, level, memory }))
}

/// Rank of the pairs, at most: RILA finds no more directions than there are forget samples.
pub(crate) fn most_rank(config: &UnlearnConfig, sets: &Sets) -> usize {
    let rank = config.subspace.rank;
    match config.train.init {
        Init::Rila => rank.min(sets.forget.len().min(CAPTURE_SAMPLES)),
        Init::Lora => rank,
    }
}

/// Plan memory for a run on `sets`, and keep to it.
///
/// # Errors
/// Less memory than it takes.
pub(crate) fn plan(
    engine: &mut Engine<'_>,
    memory: Option<Budget>,
    sets: &Sets,
    config: &UnlearnConfig,
    shared: Option<&[RetainBasis]>,
) -> Result<Option<Plan>, Error> {
    let largest = |bases: &[RetainBasis]| bases.iter().map(|b| b.rank).max().unwrap_or(0);
    let captured = sets.retain.len().min(CAPTURE_SAMPLES);
    let shape = Shape {
        rank: most_rank(config, sets),
        frozen: config.train.init == Init::Rila,
        basis: shared.map_or(config.subspace.retain_rank.min(captured), largest),
        // What a check may go back to, and where it came from.
        snapshots: match config.train.fixed_steps(sets.forget.len()) {
            Some(_) => 0,
            None => 2,
        },
        beneath: 0,
    };
    engine.plan(memory, &shape, &sets.step_lengths(&config.train))
}

/// Put an interrupted run on disk, and say so.
fn keep(
    path: PathBuf,
    identity: Identity,
    trainer: Trainer<'_>,
    mut state: RunState,
) -> Result<Error, Error> {
    let (pairs, moments, step) = trainer.into_parts()?;
    let checkpoint = Checkpoint {
        identity,
        pairs,
        moments,
        step,
        before: state.fit.before.take(),
        state,
    };
    checkpoint.save(&path)?;
    Ok(Error::Interrupted {
        checkpoint: path,
        step: checkpoint.step,
    })
}

/// Where the patch comes from.
fn provenance(job: &Job<'_>, sets: &Sets, identity: Identity) -> Result<Info, Error> {
    let train = &job.config.train;
    let method = match (train.init, train.constraint) {
        (Init::Rila, Constraint::None) => "rila",
        (Init::Rila, _) => "reglu",
        (Init::Lora, _) => "lora",
    };
    let salt = new_salt(&identity.data);
    let base = base_of(&job.open.weights)?;
    let mut info = Info::new(base, method, identity.config, train.seed);
    info.forget_hash = Some(Digest(salted_hash(&sets.forget_records, &salt.0)));
    info.salt = Some(salt);
    info.n_forget = sets.forget_records.len() as u32;
    info.n_retain = sets.retain_records.len() as u32;
    Ok(info)
}

fn patch_of(open: &OpenModel, mut info: Info, nets: &[NetReport]) -> Result<Patch, Error> {
    let mut updates = Vec::with_capacity(nets.len());
    for n in nets {
        info.tensors.push(n.info(open)?);
        updates.push(n.update()?);
    }
    Ok(Patch::new(open.weights.arch()?, info, updates))
}

/// Both sets through llama.cpp.
fn measure_both(
    job: &Job<'_>,
    sets: &Sets,
    adapters: &Loaded,
    stage: &str,
    ui: &mut dyn Ui,
) -> Result<Both, Error> {
    let mut one = |records: &[Record], set: &str| {
        let stage = format!("{stage}: {set} set");
        measure(job, adapters, records, &mut |done, total| {
            ui.progress(&stage, done, total);
        })
    };
    Ok(Both {
        forget: one(&sets.forget_records, "forget")?,
        retain: one(&sets.retain_records, "retain")?,
    })
}

fn measure(
    job: &Job<'_>,
    adapters: &Loaded,
    records: &[Record],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Measured, Error> {
    let n = records.len().min(MEASURED);
    let spread = (0..n).map(|i| records[i * records.len() / n].clone());
    let e = evaluate(
        &job.open.model,
        adapters,
        &job.template,
        &spread.collect::<Vec<Record>>(),
        job.generate,
        (job.config.train.max_tokens, job.n_threads),
        progress,
    )?;
    Ok(Measured {
        n: e.n,
        prob: e.prob,
        rouge_l: e.rouge_l,
        nll: e.nll,
    })
}

/// What a device without the texts needs to merge the patch.
fn left_beside(job: &Job<'_>, sets: &Sets, ui: &mut dyn Ui) -> Result<SketchLeft, Error> {
    let general = general_samples(job.open, &job.template, job.config.train.max_tokens)?;
    let (path, bytes) = leave_sketch(
        job.open,
        &job.out,
        &sets.moment_sources(&general),
        job.n_threads,
        job.force,
        &mut |done, total| ui.progress("sketching moments", done, total),
    )?;
    Ok(SketchLeft { path, bytes })
}

/// A salt nobody can guess without having the data and the moment.
fn new_salt(data: &Digest) -> Digest {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let state = std::hash::RandomState::new();
    let random = std::hash::BuildHasher::hash_one(&state, now.as_nanos());
    let mut seed = data.0.to_vec();
    seed.extend(random.to_le_bytes());
    seed.extend(now.as_nanos().to_le_bytes());
    Digest(salted_hash(&[], &seed))
}
