//! `nepenthe robustness`.

use super::common::{AdapterArgs, MemoryArg, ModelArgs, Output, TemplateArg};
use crate::data::{Record, load_records};
use crate::error::Error;
use crate::progress::Stages;
use crate::robustness::relearn::RelearnConfig;
use crate::robustness::{Job, Robustness, SetsScored, Texts, robustness};
use crate::score::SetScores;
use clap::Args;
use std::path::{Path, PathBuf};

/// Try whether what was forgotten stays forgotten
#[derive(Debug, Args)]
pub struct RobustnessArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    adapters: AdapterArgs,
    #[command(flatten)]
    template: TemplateArg,
    /// What was forgotten (JSON Lines or text)
    #[arg(long, value_name = "FILE")]
    forget: PathBuf,
    /// What is kept
    #[arg(long, value_name = "FILE")]
    retain: Option<PathBuf>,
    /// The forget questions in other words
    #[arg(long, value_name = "FILE")]
    paraphrased: Option<PathBuf>,
    /// File that the patch was merged into, to be scored as well; may be given several times
    #[arg(long, value_name = "GGUF")]
    merged: Vec<PathBuf>,
    /// Multiples of the patch's scale to try
    #[arg(
        long,
        value_name = "S,...",
        value_delimiter = ',',
        default_value = "0,0.25,0.5,0.75,1,1.25,1.5"
    )]
    scales: Vec<f32>,
    /// Other data to train on: how much of the forget set comes back?
    #[arg(long, value_name = "FILE")]
    relearn: Option<PathBuf>,
    /// Steps after which to look
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "0,5,10,20"
    )]
    relearn_steps: Vec<usize>,
    /// Learning rate of relearning, constant
    #[arg(long, default_value_t = RelearnConfig::default().lr)]
    lr: f32,
    /// Rank of the pairs that relearn
    #[arg(long, default_value_t = RelearnConfig::default().rank)]
    rank: usize,
    /// Samples per step of relearning
    #[arg(long, default_value_t = RelearnConfig::default().batch)]
    batch: usize,
    /// Seed of relearning
    #[arg(short, long, default_value_t = RelearnConfig::default().seed)]
    seed: u64,
    /// Most samples of each set, evenly spread over it
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_samples: usize,
    /// Cut samples to this many tokens
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    /// For relearning
    #[command(flatten)]
    memory: MemoryArg,
    #[command(flatten)]
    output: Output,
}

impl RobustnessArgs {
    pub(super) fn run(&self) -> Result<(), Error> {
        let texts = Texts {
            forget: load_records(&self.forget)?,
            retain: load(self.retain.as_deref())?,
            paraphrased: load(self.paraphrased.as_deref())?,
        };
        let config = RelearnConfig {
            steps: self.relearn_steps.clone(),
            lr: self.lr,
            rank: self.rank,
            batch: self.batch,
            seed: self.seed,
        };
        let relearn = self.relearn.as_deref().map(load_records).transpose()?;
        let open = self.model.open()?;
        let job = Job {
            open: &open,
            template: self.template.of(&open)?,
            specs: self.adapters.specs()?,
            scales: self.scales.clone(),
            merged: self.merged.clone(),
            texts,
            relearn: relearn.map(|records| (records, config)),
            max_samples: self.max_samples,
            max_tokens: self.max_tokens,
            n_threads: self.model.n_threads(),
            memory: self.memory.memory,
            n_gpu_layers: self.model.n_gpu_layers.0,
        };
        let mut ui = Stages::new(self.output.quiet || self.output.json);
        let found = robustness(&job, &mut ui)?;
        drop(ui);
        if self.output.json {
            super::emit(&found);
        } else {
            print(&found);
        }
        Ok(())
    }
}

/// Records of a file, none without one.
pub(super) fn load(path: Option<&Path>) -> Result<Vec<Record>, Error> {
    Ok(path.map(load_records).transpose()?.unwrap_or_default())
}

fn print(r: &Robustness) {
    println!(
        "{:<24} {:>24} {:>24} {:>24}",
        "answer probability", "forget", "retain", "paraphrased"
    );
    let row = |name: &str, sets: &SetsScored| {
        println!(
            "{name:<24} {} {} {}",
            cell(Some(&sets.forget)),
            cell(sets.retain.as_ref()),
            cell(sets.paraphrased.as_ref())
        );
    };
    row("deployed", &r.deployed);
    for p in &r.scales {
        row(&format!("scale x {}", p.scale), &p.sets);
    }
    for f in &r.files {
        row(&f.file.name, &f.sets);
    }
    if let Some(relearn) = &r.relearn {
        println!(
            "relearning on {} records ({} of the forget set among them), learning rate {}",
            relearn.n_records, relearn.n_shared, relearn.config.lr
        );
        for p in &relearn.points {
            println!(
                "{:<24} {} {}",
                format!("after {} steps", p.step),
                cell(Some(&p.forget)),
                cell(p.retain.as_ref())
            );
        }
    }
}

fn cell(scores: Option<&SetScores>) -> String {
    let text = scores.map_or("-".into(), |s| {
        let (mean, i) = (s.prob.mean, s.prob.interval);
        format!("{mean:.4} [{:.4}, {:.4}]", i.low, i.high)
    });
    format!("{text:>24}")
}
