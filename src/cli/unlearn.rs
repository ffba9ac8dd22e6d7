//! `nepenthe unlearn`.

use super::common::{MemoryArg, ModelArgs, Output, TemplateArg};
use super::train_ui::TrainUi;
use crate::data::{load_lines, load_records};
use crate::error::Error;
use crate::estimate::estimate;
use crate::project::RolNorm;
use crate::sets::Sets;
use crate::subspace_file;
use crate::train::config::{Constraint, Init, Objective, Preset, TrainConfig, UnlearnConfig};
use crate::train::layers::Layers;
use crate::unlearn::{Job, Report, unlearn};
use clap::Args;
use std::path::{Path, PathBuf};

/// Make a model forget: write a patch
#[derive(Debug, Args)]
pub struct Unlearn {
    #[command(flatten)]
    model: ModelArgs,
    /// What is to be forgotten (JSON Lines or text)
    #[arg(long, value_name = "FILE")]
    forget: PathBuf,
    /// What is to be kept (without this: built-in general text)
    #[arg(long, value_name = "FILE")]
    retain: Option<PathBuf>,
    /// Questions of the same kind that the model has never seen, with answers: they say how
    /// unlikely a forgotten answer should be (without this: estimated)
    #[arg(long, value_name = "FILE")]
    unseen: Option<PathBuf>,
    /// Answers to prefer under the objective dpo, one a line (without this: built-in ones)
    #[arg(long, value_name = "FILE")]
    idk: Option<PathBuf>,
    /// Patch to write
    #[arg(short, long = "output", value_name = "GGUF")]
    out: PathBuf,
    /// Retain subspace written by `nepenthe subspace`
    #[arg(long, value_name = "GGUF")]
    subspace: Option<PathBuf>,
    #[command(flatten)]
    template: TemplateArg,
    /// Named settings to start from
    #[arg(long, value_enum, default_value = "default")]
    preset: Preset,
    /// Settings file (TOML) over the preset; flags win over it
    #[arg(long, value_name = "TOML")]
    config: Option<PathBuf>,
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    memory: MemoryArg,
    /// Replace the patch if it exists
    #[arg(long)]
    force: bool,
    /// Do not leave beside the patch the sketch that a device without the texts needs to merge it
    #[arg(long)]
    no_sketch: bool,
    /// Measure before and after without greedy answers and their ROUGE
    #[arg(long)]
    no_generate: bool,
    /// Estimate memory, time and disk, and stop
    #[arg(long)]
    dry_run: bool,
    /// Go on from a checkpoint
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Write one JSON object per step and check to a file
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Settings of the trainer.
#[derive(Debug, Clone, Args)]
pub struct TrainArgs {
    /// Rank of the low-rank pairs
    #[arg(long, value_name = "R")]
    pub rank: Option<usize>,
    /// LoRA's alpha; the scale is alpha / rank
    #[arg(long)]
    pub alpha: Option<f32>,
    /// Peak learning rate
    #[arg(long)]
    pub lr: Option<f32>,
    /// AdamW's weight decay
    #[arg(long)]
    pub weight_decay: Option<f32>,
    /// Samples of each set per micro-step
    #[arg(long)]
    pub batch: Option<usize>,
    /// Micro-steps per optimiser step
    #[arg(long)]
    pub accumulate: Option<usize>,
    /// Take exactly this many steps
    #[arg(long)]
    pub steps: Option<usize>,
    /// Take exactly this many passes over the data
    #[arg(long)]
    pub epochs: Option<f32>,
    /// Warm-up steps
    #[arg(long)]
    pub warmup: Option<usize>,
    /// Gradient norm above which gradients are scaled down (0: never)
    #[arg(long)]
    pub clip: Option<f32>,
    /// Share of adapter inputs dropped in training
    #[arg(long)]
    pub dropout: Option<f32>,
    /// Seed of data order, adapters and dropout
    #[arg(short, long)]
    pub seed: Option<u64>,
    /// Adapt these layers alone, such as 8-15,20: a smaller patch and faster steps, as what lies below
    /// is computed once
    #[arg(long, value_name = "LAYERS")]
    pub layers: Option<Layers>,
    /// Cut samples to this many tokens
    #[arg(long)]
    pub max_tokens: Option<usize>,
    /// Tokens computed at a time: less memory, more time
    #[arg(long)]
    pub micro_tokens: Option<usize>,
}

impl TrainArgs {
    /// Overwrite what was given.
    pub fn apply(&self, c: &mut TrainConfig) {
        set(&mut c.alpha, self.alpha);
        set(&mut c.lr, self.lr);
        set(&mut c.weight_decay, self.weight_decay);
        set(&mut c.batch, self.batch);
        set(&mut c.accumulate, self.accumulate);
        set(&mut c.clip, self.clip);
        set(&mut c.dropout, self.dropout);
        set(&mut c.seed, self.seed);
        set(&mut c.max_tokens, self.max_tokens);
        set(&mut c.micro_tokens, self.micro_tokens);
        if self.steps.is_some() || self.epochs.is_some() {
            c.steps = self.steps;
            c.epochs = self.epochs;
        }
        if self.layers.is_some() {
            c.layers.clone_from(&self.layers);
        }
        c.warmup = self.warmup.or(c.warmup);
    }
}

fn set<T>(to: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *to = value;
    }
}

/// Settings of the method.
#[derive(Debug, Clone, Args)]
struct MethodArgs {
    /// Loss on the forget set
    #[arg(long, value_enum)]
    objective: Option<Objective>,
    /// How adapters start
    #[arg(long, value_enum)]
    init: Option<Init>,
    /// What protects the retain set's representations
    #[arg(long, value_enum)]
    constraint: Option<Constraint>,
    /// Weight of the retain covariance in RILA
    #[arg(long)]
    beta: Option<f64>,
    /// Size of the retain basis
    #[arg(long, value_name = "K")]
    retain_rank: Option<usize>,
    /// Weight of the retain loss
    #[arg(long)]
    gamma: Option<f32>,
    /// NPO's beta: how soon a forgotten answer stops pulling
    #[arg(long)]
    npo_beta: Option<f32>,
    /// SimNPO's beta
    #[arg(long)]
    simnpo_beta: Option<f32>,
    /// SimNPO's margin gamma
    #[arg(long)]
    simnpo_gamma: Option<f32>,
    /// DPO's beta
    #[arg(long)]
    dpo_beta: Option<f32>,
    /// Weight of the representation-orthogonal loss
    #[arg(long)]
    lambda: Option<f32>,
    /// How that loss is summed: per-rank (a mean, 0 to 1) or reference (as published)
    #[arg(long, value_parser = parse_rol)]
    rol: Option<RolNorm>,
    /// Answer NLL to stop at (nats per token), instead of the measured unseen level
    #[arg(long, value_name = "NLL")]
    until: Option<f64>,
    /// The unseen level as a multiple of the NLL of exchanged answers
    #[arg(long)]
    factor: Option<f64>,
    /// Steps between checks of the forget set
    #[arg(long)]
    check_every: Option<usize>,
    /// Steps after the level is reached, in which the retain set recovers
    #[arg(long)]
    settle: Option<usize>,
    /// Most steps
    #[arg(long)]
    max_steps: Option<usize>,
}

fn parse_rol(s: &str) -> Result<RolNorm, String> {
    match s {
        "per-rank" => Ok(RolNorm::PerRank),
        "reference" => Ok(RolNorm::Reference),
        _ => Err(format!("wanted per-rank or reference, found {s:?}")),
    }
}

impl MethodArgs {
    fn apply(&self, c: &mut UnlearnConfig) {
        set(&mut c.train.objective, self.objective);
        set(&mut c.train.init, self.init);
        set(&mut c.train.constraint, self.constraint);
        set(&mut c.subspace.beta, self.beta);
        set(&mut c.subspace.retain_rank, self.retain_rank);
        set(&mut c.train.gamma, self.gamma);
        set(&mut c.train.npo_beta, self.npo_beta);
        set(&mut c.train.simnpo_beta, self.simnpo_beta);
        set(&mut c.train.simnpo_gamma, self.simnpo_gamma);
        set(&mut c.train.dpo_beta, self.dpo_beta);
        set(&mut c.train.lambda, self.lambda);
        set(&mut c.train.rol, self.rol);
        c.stop.nll = self.until.or(c.stop.nll);
        c.stop.factor = self.factor.or(c.stop.factor);
        set(&mut c.stop.check_every, self.check_every);
        set(&mut c.stop.settle, self.settle);
        set(&mut c.stop.max_steps, self.max_steps);
    }
}

impl Unlearn {
    fn settings(&self) -> Result<UnlearnConfig, Error> {
        let mut config = match &self.config {
            Some(path) => read_toml(path, self.preset)?,
            None => self.preset.config(),
        };
        self.train.apply(&mut config.train);
        set(&mut config.subspace.rank, self.train.rank);
        self.method.apply(&mut config);
        config.subspace.validate()?;
        config.train.validate()?;
        config.stop.validate()?;
        Ok(config)
    }

    pub(super) fn run(&self) -> Result<(), Error> {
        let config = self.settings()?;
        if !self.force && !self.dry_run && self.out.exists() {
            return Err(crate::atomic::AtomicError::Exists {
                path: self.out.clone(),
            }
            .into());
        }
        let forget = load_records(&self.forget)?;
        let retain = self.retain.as_deref().map(load_records).transpose()?;
        let unseen = match &self.unseen {
            Some(path) => load_records(path)?,
            None => Vec::new(),
        };
        let refusals = self.idk.as_deref().map(load_lines).transpose()?;
        let open = self.model.open()?;
        let template = self.template.of(&open)?;
        let n_threads = self.model.n_threads();
        if self.dry_run {
            let max = config.train.max_tokens;
            let sets = Sets::new(&open, &template, forget, retain, &unseen, max)?.prefer(
                refusals.as_deref(),
                &open,
                &template,
                &config.train,
            )?;
            let e = estimate(&open, &sets, &config, n_threads, self.memory.memory)?;
            if self.output.json {
                super::emit(&e);
            } else {
                println!("memory  {}", e.memory_text());
                println!("time    {:.1} s a step, {}", e.step_seconds, e.time_text());
                println!(
                    "disk    {} MiB for the patch, {} MiB for a checkpoint",
                    e.patch_bytes >> 20,
                    e.checkpoint_bytes >> 20
                );
            }
            return Ok(());
        }
        let shared = match &self.subspace {
            Some(path) => Some(subspace_file::open_for(path, &open)?),
            None => None,
        };
        let checkpoint = self
            .resume
            .clone()
            .unwrap_or_else(|| checkpoint_beside(&self.out));
        let mut ui = TrainUi::new(self.output.quiet || self.output.json, self.log.as_deref())?;
        let report = unlearn(
            Job {
                open: &open,
                template,
                forget,
                retain,
                unseen,
                refusals,
                shared,
                config,
                n_threads,
                memory: self.memory.memory,
                out: self.out.clone(),
                force: self.force,
                sketch: !self.no_sketch,
                generate: !self.no_generate,
                checkpoint: checkpoint.clone(),
                resume: self.resume.is_some(),
            },
            &mut ui,
        );
        ui.finish()?;
        if let Err(Error::Interrupted { .. }) = &report {
            eprintln!("go on with: {}", resume_command(&checkpoint));
        }
        let report = report?;
        if self.output.json {
            super::emit(&report);
        } else {
            table(&report, &self.out);
        }
        Ok(())
    }
}

fn read_toml(path: &Path, preset: Preset) -> Result<UnlearnConfig, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        doing: "reading",
        source,
    })?;
    let bad = |problem: String| Error::Config {
        path: path.to_owned(),
        problem: problem.trim().replace('\n', " "),
    };
    // Checked on its own first, so that errors name lines; then laid over the preset.
    toml::from_str::<UnlearnConfig>(&text).map_err(|e| bad(e.to_string()))?;
    let over: toml::Table = toml::from_str(&text).map_err(|e| bad(e.to_string()))?;
    let mut base = toml::Table::try_from(preset.config()).expect("plain values");
    for (section, values) in over {
        match (base.get_mut(&section), values) {
            (Some(toml::Value::Table(into)), toml::Value::Table(values)) => into.extend(values),
            (_, values) => {
                base.insert(section, values);
            }
        }
    }
    base.try_into()
        .map_err(|e: toml::de::Error| bad(e.to_string()))
}

/// Where the run that makes `out` is kept when it is interrupted.
pub(super) fn checkpoint_beside(out: &Path) -> PathBuf {
    let mut name = out.to_owned().into_os_string();
    name.push(".checkpoint");
    name.into()
}

/// This command line with `--resume`.
pub(super) fn resume_command(checkpoint: &Path) -> String {
    let mut words: Vec<String> = std::env::args().collect();
    if !words
        .iter()
        .any(|w| w == "--resume" || w.starts_with("--resume="))
    {
        words.extend(["--resume".into(), checkpoint.display().to_string()]);
    }
    let quoted: Vec<String> = words
        .iter()
        .map(|w| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
            if !w.is_empty() && w.chars().all(plain) {
                w.clone()
            } else {
                format!("'{}'", w.replace('\'', r"'\''"))
            }
        })
        .collect();
    quoted.join(" ")
}

pub(super) fn table(r: &Report, out: &Path) {
    let rouge = |m: &crate::unlearn::Measured| m.rouge_l.map_or("-".into(), |r| format!("{r:.3}"));
    println!("                     before   after");
    for (name, before, after) in [
        ("forget", &r.before.forget, &r.after.forget),
        ("retain", &r.before.retain, &r.after.retain),
    ] {
        println!(
            "{name} probability   {:>8.3} {:>7.3}",
            before.prob, after.prob
        );
        println!(
            "{name} ROUGE-L       {:>8} {:>7}",
            rouge(before),
            rouge(after)
        );
    }
    println!(
        "{}: {} tensors, {:.1} MiB, {} steps, mean |dW|/|W| {:.2}%, largest |P'dW|/|dW| {:.1e}",
        out.display(),
        r.n_tensors,
        r.patch_bytes as f64 / f64::from(1 << 20),
        r.steps,
        100.0 * r.relative_norm,
        r.retain_fraction,
    );
    if let Some(s) = &r.sketch {
        println!(
            "{}: {:.1} MiB, lets a device without the texts merge the patch",
            s.path.display(),
            s.bytes as f64 / f64::from(1 << 20)
        );
    }
}
