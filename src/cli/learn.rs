//! `nepenthe learn`.

use super::common::{MemoryArg, ModelArgs, Output, TemplateArg};
use super::train_ui::TrainUi;
use super::unlearn::TrainArgs;
use crate::data::load_records;
use crate::error::Error;
use crate::learn::{Job, learn};
use crate::train::config::{Constraint, Init, TrainConfig};
use clap::Args;
use std::path::PathBuf;

/// Fine-tune: write a LoRA adapter that knows the data
#[derive(Debug, Args)]
pub struct Learn {
    #[command(flatten)]
    model: ModelArgs,
    /// What is to be learned (JSON Lines or text)
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Adapter to write
    #[arg(short, long = "output", value_name = "GGUF")]
    out: PathBuf,
    /// Stop at this mean answer probability, looked at after every pass
    #[arg(long, value_name = "P")]
    until_prob: Option<f64>,
    #[command(flatten)]
    template: TemplateArg,
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    memory: MemoryArg,
    /// Replace the adapter if it exists
    #[arg(long)]
    force: bool,
    /// Go on from a checkpoint
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Write one JSON object per step and check to a file
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Passes when neither steps nor passes are given.
const DEFAULT_EPOCHS: f32 = 8.0;

impl Learn {
    pub(super) fn run(&self) -> Result<(), Error> {
        let mut config = TrainConfig {
            init: Init::Lora,
            constraint: Constraint::None,
            lr: 1e-3,
            batch: 8,
            weight_decay: 0.0,
            epochs: Some(DEFAULT_EPOCHS),
            ..TrainConfig::default()
        };
        self.train.apply(&mut config);
        config.validate()?;
        if let Some(p) = self.until_prob
            && !(p > 0.0 && p < 1.0)
        {
            return Err(Error::Setting {
                setting: "until-prob",
                wanted: "a probability between 0 and 1".into(),
                found: p.to_string(),
            });
        }
        if !self.force && self.out.exists() {
            return Err(crate::atomic::AtomicError::Exists {
                path: self.out.clone(),
            }
            .into());
        }
        let records = load_records(&self.data)?;
        let open = self.model.open()?;
        let template = self.template.of(&open)?;
        let checkpoint = self
            .resume
            .clone()
            .unwrap_or_else(|| super::unlearn::checkpoint_beside(&self.out));
        let mut ui = TrainUi::new(self.output.quiet || self.output.json, self.log.as_deref())?;
        let report = learn(
            Job {
                open: &open,
                template,
                records,
                config,
                rank: self.train.rank.unwrap_or(32),
                until_prob: self.until_prob,
                n_threads: self.model.n_threads(),
                memory: self.memory.memory,
                out: self.out.clone(),
                force: self.force,
                checkpoint: checkpoint.clone(),
                resume: self.resume.is_some(),
            },
            &mut ui,
        );
        ui.finish()?;
        if let Err(Error::Interrupted { .. }) = &report {
            eprintln!(
                "go on with: {}",
                super::unlearn::resume_command(&checkpoint)
            );
        }
        let report = report?;
        if self.output.json {
            super::emit(&report);
        } else {
            println!("                    before   after");
            println!(
                "answer probability {:>7.3} {:>7.3}",
                report.before.prob, report.after.prob
            );
            println!(
                "answer NLL         {:>7.3} {:>7.3}",
                report.before.nll, report.after.nll
            );
            println!(
                "{}: {} steps, {} bytes",
                self.out.display(),
                report.steps,
                report.adapter_bytes
            );
        }
        Ok(())
    }
}
