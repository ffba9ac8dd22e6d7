//! The main path: open model → data → capture → subspaces → train → project → patch.
//!
//! Every stage is a function of its own and most artifacts are also files, so that each stage
//! can be run alone.

use crate::adapter::{Loaded, open_adapters};
use crate::atomic::AtomicError;
use crate::capture::pooled_outputs;
use crate::data::{
    Record, Sample, SampleSet, Template, build_samples, general_records, overlap, refusals,
    refused, salted_hash,
};
use crate::digest::{Digest, of_model};
use crate::error::Error;
use crate::graph::template::Adaptable;
use crate::merge::leave::leave_sketch;
use crate::merge::moments::Sources;
use crate::merge::sketch::companion;
use crate::model::OpenModel;
use crate::patch::{Info, Patch, TensorInfo, Update, base_of, digest_of};
use crate::project::NetUpdate;
use crate::score::evaluate;
use crate::subspace::{Pooled, Retain, RetainBasis, Subspace, SubspaceConfig, solve_all};
use crate::train::adapters::Pairs;
use crate::train::checkpoint::{Checkpoint, Identity};
use crate::train::config::{Constraint, Init, Objective, TrainConfig, UnlearnConfig};
use crate::train::engine::{Engine, mean_nll};
use crate::train::fit::{Ended, FitData, FitState, Until, Watch, fit};
use crate::train::trainer::{Forget, StepBatch, Trainer};
use crate::unseen::exchanged_answers;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Samples of a split whose outputs are pooled: the paper's 256, in data order.
pub const CAPTURE_SAMPLES: usize = 256;
/// Samples of each set in the table before and after.
const MEASURED: usize = 40;

/// What is to be forgotten and what is to be kept.
#[derive(Debug, Clone)]
pub struct Sets {
    /// Forget records.
    pub forget_records: Vec<Record>,
    /// Retain records.
    pub retain_records: Vec<Record>,
    /// Forget samples.
    pub forget: Vec<Sample>,
    /// Retain samples.
    pub retain: Vec<Sample>,
    /// Samples like the forget set's that the model has never seen, if there are any at hand.
    pub unseen: Vec<Sample>,
    /// A refusal of every forget question, where the objective prefers one.
    pub preferred: Vec<Sample>,
    /// Whether the built-in general text stands in for a retain set.
    pub general: bool,
    /// What the user should know about the data.
    pub notices: Vec<String>,
}

impl Sets {
    fn moment_sources<'a>(&'a self, general: &'a [Sample]) -> Sources<'a> {
        Sources {
            forget: &self.forget,
            // The general text would otherwise be counted twice.
            retain: if self.general { &[] } else { &self.retain },
            general,
        }
    }

    /// Tokenise both sets. Without `retain_records` the built-in general text is used.
    ///
    /// # Errors
    /// A retain set that holds forget records, records that cannot be tokenised, empty sets.
    pub fn new(
        open: &OpenModel,
        template: &Template,
        forget_records: Vec<Record>,
        retain_records: Option<Vec<Record>>,
        unseen_records: &[Record],
        max_tokens: usize,
    ) -> Result<Self, Error> {
        let general = retain_records.is_none();
        let retain_records = retain_records.unwrap_or_else(general_records);
        let shared = overlap(&forget_records, &retain_records);
        if shared.n_shared > 0 {
            return Err(Error::Overlap(shared));
        }
        let mut notices = Vec::new();
        if general {
            notices.push(format!(
                "no retain set given: {} built-in records of general text stand in for it",
                retain_records.len()
            ));
        }
        let forget = samples(
            open,
            template,
            &forget_records,
            max_tokens,
            "forget",
            &mut notices,
        )?;
        let retain = samples(
            open,
            template,
            &retain_records,
            max_tokens,
            "retain",
            &mut notices,
        )?;
        let unseen = if unseen_records.is_empty() {
            Vec::new()
        } else {
            let records = unseen_records;
            samples(open, template, records, max_tokens, "unseen", &mut notices)?
        };
        Ok(Self {
            forget_records,
            retain_records,
            forget,
            retain,
            unseen,
            preferred: Vec::new(),
            general,
            notices,
        })
    }

    /// Answer every forget question with one of `refusals` (none: built-in ones) if the objective
    /// is DPO; refuse them if it is not.
    ///
    /// # Errors
    /// Refusals for another objective, forget records without a question.
    pub fn prefer(
        mut self,
        given: Option<&[String]>,
        open: &OpenModel,
        template: &Template,
        config: &TrainConfig,
    ) -> Result<Self, Error> {
        if config.objective != Objective::Dpo {
            return match given {
                None => Ok(self),
                Some(_) => Err(Error::Setting {
                    setting: "idk",
                    wanted: "the objective dpo, which alone prefers refusals".into(),
                    found: format!("{:?}", config.objective).to_lowercase(),
                }),
            };
        }
        let given = given.map_or_else(refusals, <[String]>::to_vec);
        let no_question = |found: String| Error::Setting {
            setting: "objective dpo",
            wanted: "a forget set of questions, so that there is something to refuse".into(),
            found,
        };
        let records = refused(&self.forget_records, &given, config.seed)
            .map_err(|n| no_question(format!("record {n} without one")))?;
        let set = build_samples(&records, &open.model, template, config.max_tokens)?;
        if set.samples.len() != self.forget.len() {
            return Err(no_question("records too short to be trained on".into()));
        }
        self.preferred = set.samples;
        Ok(self)
    }

    /// What training sees of it.
    pub fn fit_data(&self) -> FitData<'_> {
        FitData {
            forget: &self.forget,
            preferred: &self.preferred,
            retain: &self.retain,
        }
    }
}

/// The built-in general text as samples.
fn general_samples(
    open: &OpenModel,
    template: &Template,
    config: &UnlearnConfig,
) -> Result<Vec<Sample>, Error> {
    let (records, most) = (general_records(), config.train.max_tokens);
    samples(open, template, &records, most, "general", &mut Vec::new())
}

/// Tokenise `records`, with a notice for whatever was cut or left out.
///
/// # Errors
/// Records that cannot be tokenised.
pub fn samples(
    open: &OpenModel,
    template: &Template,
    records: &[Record],
    max_tokens: usize,
    set: &str,
    notices: &mut Vec<String>,
) -> Result<Vec<Sample>, Error> {
    let SampleSet {
        samples,
        n_truncated,
        n_skipped,
    } = build_samples(records, &open.model, template, max_tokens)?;
    if n_truncated > 0 {
        notices.push(format!(
            "{n_truncated} of {} {set} samples cut to {max_tokens} tokens",
            samples.len()
        ));
    }
    if n_skipped > 0 {
        notices.push(format!(
            "{n_skipped} {set} records left out: nothing in them to predict"
        ));
    }
    Ok(samples)
}

/// Bases of every adaptable tensor, from one forward pass over each set (one in all with
/// `shared`, retain bases computed before).
///
/// # Errors
/// When llama.cpp fails, or shared bases do not fit the model.
pub fn subspaces(
    open: &OpenModel,
    adaptable: &[Adaptable],
    (forget, retain): (&[Sample], &[Sample]),
    shared: Option<Vec<RetainBasis>>,
    config: &SubspaceConfig,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Subspace>, Error> {
    let forget = &forget[..forget.len().min(CAPTURE_SAMPLES)];
    let retain = &retain[..retain.len().min(CAPTURE_SAMPLES)];
    let n_retain = if shared.is_some() { 0 } else { retain.len() };
    let total = forget.len() + n_retain;
    let h_f = pooled_outputs(&open.model, adaptable, forget, n_threads, &mut |n| {
        progress(n, total)
    })?;
    let Some(shared) = shared else {
        let n_f = forget.len();
        let h_r = pooled_outputs(&open.model, adaptable, retain, n_threads, &mut |n| {
            progress(n_f + n, total)
        })?;
        let pooled: Vec<Pooled<'_>> = h_f
            .iter()
            .zip(&h_r)
            .map(|(f, r)| Pooled {
                tensor: &f.tensor.name,
                n_out: f.tensor.n_out,
                forget: &f.h,
                retain: Retain::Pooled(&r.h),
            })
            .collect();
        return Ok(solve_all(config, &pooled)?);
    };
    let pooled: Vec<Pooled<'_>> = h_f
        .iter()
        .zip(&shared)
        .map(|(f, basis)| Pooled {
            tensor: &f.tensor.name,
            n_out: f.tensor.n_out,
            forget: &f.h,
            retain: Retain::Shared(basis),
        })
        .collect();
    Ok(solve_all(config, &pooled)?)
}

/// Low-rank pairs as the configuration starts them.
///
/// # Errors
/// Weights that cannot be decoded.
pub fn start(
    open: &OpenModel,
    adaptable: &[Adaptable],
    subspaces: Vec<Subspace>,
    config: &UnlearnConfig,
) -> Result<Pairs, Error> {
    let scale = config.train.alpha / config.subspace.rank as f32;
    match config.train.init {
        Init::Rila => Pairs::rila(&open.weights, adaptable, subspaces, scale),
        Init::Lora => {
            let bases = subspaces.into_iter().map(|s| s.retain.basis).collect();
            Ok(Pairs::lora(
                adaptable,
                config.subspace.rank,
                scale,
                config.train.seed,
                bases,
            ))
        }
    }
}

/// The subspace settings that go with the constraint: a hard projection needs B0 within the
/// complement of P.
pub fn subspace_config(config: &UnlearnConfig) -> SubspaceConfig {
    SubspaceConfig {
        off_retain: config.train.constraint == Constraint::Project,
        ..config.subspace.clone()
    }
}

/// Answer NLL that counts as unseen, and what it was derived from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnseenLevel {
    /// Mean answer NLL, nats per token, at which training stops.
    pub nll: f64,
    /// What it follows from.
    pub source: LevelSource,
}

/// What the unseen level follows from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LevelSource {
    /// The settings.
    Asked,
    /// The NLL of answers that the model has never seen.
    Unseen,
    /// A multiple of this NLL, of the forget questions with answers that belong to others.
    Exchanged(f64),
}

/// When to stop: after fixed steps if there are any, else at the unseen level.
///
/// # Errors
/// When ggml fails.
pub fn until(
    trainer: &mut Trainer<'_>,
    open: &OpenModel,
    template: &Template,
    sets: &Sets,
    config: &UnlearnConfig,
) -> Result<(Until, Option<UnseenLevel>), Error> {
    if let Some(steps) = config.train.fixed_steps(sets.forget.len()) {
        return Ok((Until::Steps(steps), None));
    }
    let level = unseen_level(trainer, open, template, sets, config)?;
    Ok((Until::Level(level.nll), Some(level)))
}

/// The unseen level under the parameters as they are: as asked, or the NLL of answers the model
/// has never seen, or that of answers which are true of someone else ([`exchanged_answers`]) times
/// a factor, because the model has learned what such answers look like.
///
/// # Errors
/// When ggml fails.
pub fn unseen_level(
    trainer: &mut Trainer<'_>,
    open: &OpenModel,
    template: &Template,
    sets: &Sets,
    config: &UnlearnConfig,
) -> Result<UnseenLevel, Error> {
    let stop = &config.stop;
    if let Some(nll) = stop.nll {
        return Ok(UnseenLevel {
            nll,
            source: LevelSource::Asked,
        });
    }
    let mut mean = |samples: &[Sample]| -> Result<f64, Error> {
        let n = stop.check_samples.min(samples.len());
        let spread: Vec<&Sample> = (0..n).map(|i| &samples[i * samples.len() / n]).collect();
        Ok(mean_nll(&trainer.losses(&spread)?))
    };
    if !sets.unseen.is_empty() {
        return Ok(UnseenLevel {
            nll: mean(&sets.unseen)?,
            source: LevelSource::Unseen,
        });
    }
    let exchanged = exchanged_answers(&sets.forget_records, &sets.retain_records);
    let set = build_samples(&exchanged, &open.model, template, config.train.max_tokens)?;
    let nll = mean(&set.samples)?;
    Ok(UnseenLevel {
        nll: stop.factor * nll,
        source: LevelSource::Exchanged(nll),
    })
}

/// The net update of one tensor and where it lives.
#[derive(Debug, Clone)]
pub struct NetReport {
    /// Tensor name.
    pub tensor: String,
    /// ΔW in factors.
    pub net: NetUpdate,
    /// ‖ΔW‖.
    pub norm: f64,
    /// ‖ΔW‖/‖W‖.
    pub relative_norm: f64,
    /// ‖PᵀΔW‖/‖ΔW‖.
    pub retain_fraction: f64,
    /// Rank of the pair.
    pub rank: usize,
    /// Size of P.
    pub retain_rank: usize,
}

impl NetReport {
    /// As a patch records it.
    ///
    /// # Errors
    /// A weight that cannot be read.
    pub fn info(&self, open: &OpenModel) -> Result<TensorInfo, Error> {
        Ok(TensorInfo {
            name: self.tensor.clone(),
            digest: digest_of(&open.weights, &self.tensor)?,
            rank: self.rank as u32,
            retain_rank: self.retain_rank as u32,
            norm: self.norm as f32,
            relative_norm: self.relative_norm as f32,
            retain_fraction: self.retain_fraction as f32,
        })
    }
}

/// Net updates of all pairs, projected once more where the constraint is hard (rounding of the
/// factors in f32 leaves about 1e-7 of them in P).
///
/// # Errors
/// Weights that cannot be decoded.
pub fn net_updates(
    open: &OpenModel,
    pairs: &Pairs,
    constraint: Constraint,
) -> Result<Vec<NetReport>, Error> {
    (0..pairs.list.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|i| {
            let pair = &pairs.list[i];
            let mut net = pairs.net(i)?;
            if constraint == Constraint::Project && !pair.basis.is_empty() {
                net.project_output(&pair.basis)?;
            }
            let w = open.weights.decoded(&pair.tensor.name)?;
            let w_norm = w
                .iter()
                .map(|&v| f64::from(v) * f64::from(v))
                .sum::<f64>()
                .sqrt();
            let norm = net.norm();
            Ok(NetReport {
                tensor: pair.tensor.name.clone(),
                norm,
                relative_norm: if w_norm > 0.0 { norm / w_norm } else { 0.0 },
                retain_fraction: net.retain_fraction(&pair.basis)?,
                rank: pair.rank,
                retain_rank: pair.basis.len() / pair.tensor.n_out,
                net,
            })
        })
        .collect()
}

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
    /// The patch to write.
    pub out: PathBuf,
    /// Replace it if it exists.
    pub force: bool,
    /// Leave beside the patch what a device without the texts needs to merge it.
    pub sketch: bool,
    /// Where an interrupted run is put.
    pub checkpoint: PathBuf,
    /// Go on from there instead of starting.
    pub resume: bool,
}

/// Shows a run to the user.
pub trait Ui: Watch {
    /// A sentence worth reading.
    fn notice(&mut self, text: &str);
    /// A stage and how far it is.
    fn progress(&mut self, stage: &str, done: usize, total: usize);
}

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
}

/// Forget: from a model and texts to a patch on disk.
///
/// # Errors
/// Bad data or settings, a model that cannot be traced, failures of engine and disk, and
/// [`Error::Interrupted`] when the watcher stopped the run (a checkpoint is then on disk).
pub fn unlearn(job: Job<'_>, ui: &mut dyn Ui) -> Result<Report, Error> {
    let began = Instant::now();
    let config = &job.config;
    config.train.validate()?;
    config.stop.validate()?;
    let beside = job.sketch.then(|| companion(&job.out));
    for path in [Some(&job.out), beside.as_ref()].into_iter().flatten() {
        if !job.force && path.exists() {
            let path = path.clone();
            return Err(AtomicError::Exists { path }.into());
        }
    }
    let open = job.open;
    let sets = Sets::new(
        open,
        &job.template,
        job.forget,
        job.retain,
        &job.unseen,
        config.train.max_tokens,
    )?
    .prefer(job.refusals.as_deref(), open, &job.template, &config.train)?;
    for notice in &sets.notices {
        ui.notice(notice);
    }
    let engine = Engine::new(open, job.n_threads, config.train.micro_tokens)?;
    let adaptable = engine.template.adaptable.clone();
    let identity = Identity {
        base: of_model(open.weights.set())?,
        data: data_digest(&sets),
        config: serde_json::to_value(config).expect("plain values"),
    };
    let (mut trainer, mut state) = if job.resume {
        let checkpoint: Checkpoint<RunState> =
            Checkpoint::open(&job.checkpoint, &identity, &adaptable)?;
        let mut trainer = Trainer::new(engine, checkpoint.pairs)?;
        trainer.moments = checkpoint.moments;
        trainer.step = checkpoint.step;
        let mut state = checkpoint.state;
        state.fit.before = checkpoint.before;
        (trainer, state)
    } else {
        let subspaces = subspaces(
            open,
            &adaptable,
            (&sets.forget, &sets.retain),
            job.shared,
            &subspace_config(config),
            job.n_threads,
            &mut |done, total| ui.progress("capturing outputs", done, total),
        )?;
        if let Some(notice) = lowered(&subspaces) {
            ui.notice(&notice);
        }
        let pairs = start(open, &adaptable, subspaces, config)?;
        if pairs.list.is_empty() {
            return Err(Error::NothingToTrain);
        }
        let mut trainer = Trainer::new(engine, pairs)?;
        let (until, level) = until(&mut trainer, open, &job.template, &sets, config)?;
        let mut fit = FitState::new(&config.train, until, sets.forget.len(), sets.retain.len());
        if config.train.objective.has_reference() {
            fit.reference = sets.fit_data().references(&mut trainer)?;
        }
        (trainer, RunState { fit, level })
    };
    let measure = |adapters: &Loaded, ui: &mut dyn Ui, stage: &str| -> Result<Both, Error> {
        Ok(Both {
            forget: measure(
                open,
                adapters,
                &job.template,
                &sets.forget_records,
                config,
                job.n_threads,
                &mut |d, t| {
                    ui.progress(&format!("{stage}: forget set"), d, t);
                },
            )?,
            retain: measure(
                open,
                adapters,
                &job.template,
                &sets.retain_records,
                config,
                job.n_threads,
                &mut |d, t| {
                    ui.progress(&format!("{stage}: retain set"), d, t);
                },
            )?,
        })
    };
    let before = measure(&Vec::new(), ui, "before")?;
    if let Some(level) = &state.level {
        let from = match level.source {
            LevelSource::Asked => "as asked".to_owned(),
            LevelSource::Unseen => "that of the unseen answers".to_owned(),
            LevelSource::Exchanged(nll) => format!(
                "{:.2} x the {nll:.2} of answers that are true of others",
                config.stop.factor
            ),
        };
        ui.notice(&format!(
            "unseen level: answer NLL {:.2} ({from}); now {:.2}",
            level.nll, before.forget.nll
        ));
    }
    let ended = fit(
        &mut trainer,
        &config.train,
        &config.stop,
        &mut state.fit,
        sets.fit_data(),
        ui,
    )?;
    if ended == Ended::Interrupted {
        let checkpoint = Checkpoint {
            identity,
            pairs: trainer.pairs,
            moments: trainer.moments,
            step: trainer.step,
            before: state.fit.before.take(),
            state,
        };
        checkpoint.save(&job.checkpoint)?;
        return Err(Error::Interrupted {
            checkpoint: job.checkpoint,
            step: checkpoint.step,
        });
    }
    if ended == Ended::NotReached {
        ui.notice(&format!(
            "the unseen level was not reached in {} steps; --max-steps or a higher --lr may help",
            trainer.step
        ));
    }
    let nets = net_updates(open, &trainer.pairs, config.train.constraint)?;
    let steps = trainer.step;
    drop(trainer);
    let method = match (config.train.init, config.train.constraint) {
        (Init::Rila, Constraint::None) => "rila",
        (Init::Rila, _) => "reglu",
        (Init::Lora, _) => "lora",
    };
    let mut info = Info::new(
        base_of(&open.weights)?,
        method,
        identity.config,
        config.train.seed,
    );
    let salt = new_salt(&identity.data);
    info.forget_hash = Some(Digest(salted_hash(&sets.forget_records, &salt.0)));
    info.salt = Some(salt);
    info.n_forget = sets.forget_records.len() as u32;
    info.n_retain = sets.retain_records.len() as u32;
    info.training = serde_json::json!({
        "steps": steps, "ended": ended, "level": state.level, "checks": state.fit.checks,
        "general_retain": sets.general,
    });
    let mut updates = Vec::with_capacity(nets.len());
    for n in &nets {
        info.tensors.push(n.info(open)?);
        updates.push(update(n)?);
    }
    let mut patch = Patch::new(open.weights.arch()?, info, updates);
    // Measured through llama.cpp, on the factors as they are stored.
    let dir = tempfile::tempdir().map_err(|source| Error::Io {
        path: std::env::temp_dir(),
        doing: "making a temporary directory",
        source,
    })?;
    let trial = dir.path().join("patch.gguf");
    patch.save(&trial, false)?;
    let adapters = open_adapters(open, [(trial.as_path(), 1.0)])?;
    let after = measure(&adapters, ui, "after")?;
    drop(adapters);
    if let Some(info) = &mut patch.info {
        info.metrics = serde_json::json!({ "before": before, "after": after });
    }
    let patch_bytes = patch.save(&job.out, job.force)?;
    let sketch = if job.sketch {
        let (path, bytes) = leave_sketch(
            open,
            &job.out,
            &sets.moment_sources(&general_samples(open, &job.template, config)?),
            job.n_threads,
            job.force,
            &mut |done, total| ui.progress("sketching moments", done, total),
        )?;
        Some(SketchLeft { path, bytes })
    } else {
        None
    };
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

/// ΔW in the balanced factors of its singular value decomposition: B·A − B0·A0 nearly cancels,
/// and 16 bits of each would keep few of the difference.
fn update(n: &NetReport) -> Result<Update, Error> {
    let (n_in, n_out, rank) = n.net.shape();
    let balanced = n.net.refactor(rank)?.update;
    let (_, _, rank) = balanced.shape();
    Ok(Update {
        tensor: n.tensor.clone(),
        n_in,
        n_out,
        rank,
        scale: balanced.scale(),
        lora_a: balanced.lora_a().to_vec(),
        lora_b: balanced.lora_b().to_vec(),
    })
}

fn measure(
    open: &OpenModel,
    adapters: &Loaded,
    template: &Template,
    records: &[Record],
    config: &UnlearnConfig,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Measured, Error> {
    let n = records.len().min(MEASURED);
    let chosen: Vec<Record> = (0..n)
        .map(|i| records[i * records.len() / n].clone())
        .collect();
    let limits = (config.train.max_tokens, n_threads);
    let e = evaluate(
        &open.model,
        adapters,
        template,
        &chosen,
        true,
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

/// One sentence for all tensors whose bases came out smaller than asked.
fn lowered(subspaces: &[Subspace]) -> Option<String> {
    let all: Vec<String> = subspaces.iter().flat_map(Subspace::lowered).collect();
    let first = all.first()?;
    Some(match all.len() {
        1 => first.clone(),
        n => format!("{first} (and {} more bases, for the same reason)", n - 1),
    })
}

/// Names data in a checkpoint; never leaves this machine, so it needs no salt.
fn data_digest(sets: &Sets) -> Digest {
    let forget = salted_hash(&sets.forget_records, b"forget");
    let tokens = sets.preferred.iter().flat_map(|s| &s.tokens);
    let mut salt = forget.to_vec();
    salt.extend(tokens.flat_map(|t| t.to_le_bytes()));
    Digest(salted_hash(&sets.retain_records, &salt))
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
