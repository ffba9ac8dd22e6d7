//! `nepenthe report`.

use super::common::{AdapterSpec, ModelArgs, TemplateArg};
use super::robustness::load;
use crate::atomic::{AtomicError, write_atomic};
use crate::error::Error;
use crate::progress::Stages;
use crate::report::verdict::Status;
use crate::report::{Evidence, Job, ReportError, Thresholds, collect, html::page};
use clap::Args;
use std::path::{Path, PathBuf};

/// Write evidence of forgetting: one self-contained page, and the same as JSON
#[derive(Debug, Args)]
pub struct ReportArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The patch, with an optional scale
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: AdapterSpec,
    /// File that the patch was merged into; may be given several times
    #[arg(long, value_name = "GGUF")]
    merged: Vec<PathBuf>,
    /// What was forgotten (JSON Lines or text)
    #[arg(long, value_name = "FILE")]
    forget: Option<PathBuf>,
    /// What is kept
    #[arg(long, value_name = "FILE")]
    retain: Option<PathBuf>,
    /// The forget questions in other words
    #[arg(long, value_name = "FILE")]
    paraphrased: Option<PathBuf>,
    /// Log that `unlearn --log` wrote
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Retain subspace that `nepenthe subspace` wrote: show its eigenvalues
    #[arg(long, value_name = "GGUF")]
    subspace: Option<PathBuf>,
    /// Log of a TOFU evaluation of the model as deployed
    #[arg(long, value_name = "LOG")]
    tofu: Option<PathBuf>,
    /// Log of a model that never saw the forget set
    #[arg(long, value_name = "LOG", requires = "tofu")]
    retain_log: Option<PathBuf>,
    /// What `nepenthe robustness --json` printed; may be given several times
    #[arg(long, value_name = "JSON")]
    robustness: Vec<PathBuf>,
    /// Quote questions and answers of the sets
    #[arg(long)]
    include_texts: bool,
    /// Do not let the models write answers, only score the given ones
    #[arg(long)]
    no_generate: bool,
    /// Page to write
    #[arg(short, long = "output", value_name = "HTML")]
    out: PathBuf,
    /// Write the same as JSON
    #[arg(long, value_name = "JSON")]
    json: Option<PathBuf>,
    /// Replace files that exist
    #[arg(long)]
    force: bool,
    /// Exit with 5 unless the verdict is met; the report is written all the same
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    template: TemplateArg,
    #[command(flatten)]
    thresholds: ThresholdArgs,
    /// Most samples of each set, evenly spread over it
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_samples: usize,
    /// Cut samples to this many tokens
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    /// No progress on stderr
    #[arg(short, long)]
    quiet: bool,
}

/// Thresholds of the verdict.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Thresholds of the verdict")]
struct ThresholdArgs {
    /// Least forget answer NLL, as a share of the unseen level
    #[arg(long, value_name = "X", default_value_t = Thresholds::default().min_level)]
    min_level: f64,
    /// Most forget answer NLL, as a multiple of the unseen level
    #[arg(long, value_name = "X", default_value_t = Thresholds::default().max_level)]
    max_level: f64,
    /// Most forget probability as a share of that before, without an unseen level
    #[arg(long, value_name = "X", default_value_t = Thresholds::default().max_forget_share)]
    max_forget_share: f64,
    /// Least retain probability, as a share of that before
    #[arg(long, value_name = "X", default_value_t = Thresholds::default().min_retain)]
    min_retain: f64,
    /// Most that other wordings may exceed the forget probability by
    #[arg(long, value_name = "X", default_value_t = Thresholds::default().max_paraphrase_gap)]
    max_paraphrase_gap: f64,
    /// Least share of the fall in forget probability that a merged file keeps
    #[arg(long, value_name = "X", default_value_t = Thresholds::default().min_kept_effect)]
    min_kept_effect: f64,
    /// Most of a tensor's update in the retain directions, under the hard constraint
    #[arg(long, value_name = "X", default_value_t = Thresholds::default().max_retain_fraction)]
    max_retain_fraction: f64,
    /// Most of the fall in forget probability that relearning undoes
    #[arg(long, value_name = "X", default_value_t = Thresholds::default().max_relearned)]
    max_relearned: f64,
    /// Least p-value of TOFU's forget quality
    #[arg(long, value_name = "P", default_value_t = Thresholds::default().min_forget_quality)]
    min_forget_quality: f64,
}

impl ThresholdArgs {
    fn thresholds(&self) -> Thresholds {
        Thresholds {
            min_level: self.min_level,
            max_level: self.max_level,
            max_forget_share: self.max_forget_share,
            min_retain: self.min_retain,
            max_paraphrase_gap: self.max_paraphrase_gap,
            min_kept_effect: self.min_kept_effect,
            max_retain_fraction: self.max_retain_fraction,
            max_relearned: self.max_relearned,
            min_forget_quality: self.min_forget_quality,
        }
    }
}

impl ReportArgs {
    pub(super) fn run(&self) -> Result<(), Error> {
        for path in std::iter::once(&self.out).chain(&self.json) {
            if !self.force && path.exists() {
                let path = path.clone();
                return Err(AtomicError::Exists { path }.into());
            }
        }
        let mut sets = Vec::new();
        for (name, path) in [
            ("forget", &self.forget),
            ("retain", &self.retain),
            ("paraphrased", &self.paraphrased),
        ] {
            if path.is_some() {
                sets.push((name, load(path.as_deref())?));
            }
        }
        let open = self.model.open()?;
        let job = Job {
            open: &open,
            template: self.template.of(&open)?,
            patch: (&self.lora.path, self.lora.scale),
            merged: self.merged.clone(),
            sets,
            log: self.log.clone(),
            subspace: self.subspace.clone(),
            tofu: self.tofu.clone().map(|log| (log, self.retain_log.clone())),
            robustness: self.robustness.clone(),
            include_texts: self.include_texts,
            generate: !self.no_generate,
            thresholds: self.thresholds.thresholds(),
            max_samples: self.max_samples,
            max_tokens: self.max_tokens,
            n_threads: self.model.n_threads(),
            n_gpu_layers: self.model.n_gpu_layers.0,
        };
        let mut ui = Stages::new(self.quiet);
        let evidence = collect(&job, &mut ui)?;
        drop(ui);
        put(&self.out, self.force, &page(&evidence))?;
        if let Some(path) = &self.json {
            let text = serde_json::to_string_pretty(&evidence).expect("evidence is plain values");
            put(path, self.force, &(text + "\n"))?;
        }
        print(&evidence);
        if self.strict && evidence.verdict.status != Status::Met {
            return Err(ReportError::NotMet(evidence.verdict.summary).into());
        }
        Ok(())
    }
}

fn put(path: &Path, force: bool, text: &str) -> Result<(), Error> {
    write_atomic(path, force, |out| {
        out.write_all(text.as_bytes()).map_err(|source| Error::Io {
            path: path.to_owned(),
            doing: "writing",
            source,
        })
    })
}

fn print(e: &Evidence) {
    for c in &e.verdict.criteria {
        let status = match (c.status, c.clear) {
            (Status::Met, true) => "met",
            (Status::Met, false) => "met, within noise",
            (Status::Missed, true) => "MISSED",
            (Status::Missed, false) => "MISSED, within noise",
            (Status::NotMeasured, _) => "not measured",
        };
        let found = c.found.map_or("-".into(), |v| format!("{v:.4}"));
        println!("{status:<20} {} ({}: {found})", c.claim, c.subject);
    }
    println!("{}", e.verdict.summary);
}
