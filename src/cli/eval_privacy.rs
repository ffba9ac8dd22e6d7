//! `nepenthe eval --privacy`.

use super::common::{ModelArgs, Output};
use crate::adapter::Loaded;
use crate::data::{Perturbed, Record, Template, load_perturbed, load_records, overlap};
use crate::error::Error;
use crate::eval::membership::{AnswerStats, Attacks, MIN_K};
use crate::eval::memorisation::{exact_memorisation, extraction_strength};
use crate::model::OpenModel;
use crate::progress::Progress;
use crate::score::{Measured, Privacy, Retain, Sets, measure_privacy};
use clap::Args;
use std::path::{Path, PathBuf};

/// Memorisation and privacy
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Memorisation and privacy")]
pub struct PrivacyArgs {
    /// What the model still holds of the forget set word for word, and whether membership attacks
    /// tell it from a set the model never saw
    #[arg(long, requires = "forget", requires = "holdout")]
    pub privacy: bool,
    /// What was to be forgotten; TOFU's perturbed files give paraphrase probability and truth share
    /// as well
    #[arg(long, value_name = "FILE", requires = "privacy")]
    forget: Option<PathBuf>,
    /// Records of the same kind that the model never saw
    #[arg(long, value_name = "FILE", requires = "privacy")]
    holdout: Option<PathBuf>,
    /// The --json report on a model that never saw the forget set
    #[arg(long, value_name = "LOG", requires = "privacy")]
    retain_model: Option<PathBuf>,
    /// Share of an answer's tokens that min-k and min-k++ look at
    #[arg(long, value_name = "SHARE", default_value_t = MIN_K, requires = "privacy")]
    min_k: f64,
    /// Model utility, for the aggregate score
    #[arg(long, value_name = "0..1", requires = "privacy")]
    model_utility: Option<f64>,
}

/// The sets of a run.
pub struct PrivacySets {
    forget: Vec<Record>,
    perturbed: Option<Vec<Perturbed>>,
    holdout: Vec<Record>,
}

impl PrivacyArgs {
    /// The sets.
    ///
    /// # Errors
    /// Files that are no records; a holdout set that holds forget records.
    pub fn load(&self, limit: Option<usize>) -> Result<PrivacySets, Error> {
        let limit = limit.unwrap_or(usize::MAX).max(1);
        let forget_file = self.forget.as_deref().expect("required by --privacy");
        let holdout_file = self.holdout.as_deref().expect("required by --privacy");
        self.check()?;
        let mut forget = load_records(forget_file)?;
        let mut perturbed = load_perturbed(forget_file)?;
        let mut holdout = load_records(holdout_file)?;
        let shared = overlap(&holdout, &forget).n_shared;
        if shared > 0 {
            return Err(Error::Setting {
                setting: "holdout",
                wanted: "records the model never saw".into(),
                found: format!(
                    "{shared} records of the forget set in {}",
                    holdout_file.display()
                ),
            });
        }
        forget.truncate(limit);
        holdout.truncate(limit);
        if let Some(perturbed) = &mut perturbed {
            perturbed.truncate(limit);
        }
        Ok(PrivacySets {
            forget,
            perturbed,
            holdout,
        })
    }

    fn check(&self) -> Result<(), Error> {
        let share = |setting, value: f64, open: bool| {
            if (0.0..=1.0).contains(&value) && (value > 0.0 || !open) {
                return Ok(());
            }
            Err(Error::Setting {
                setting,
                wanted: if open { "above 0, at most 1" } else { "0 to 1" }.into(),
                found: value.to_string(),
            })
        };
        share("min-k", self.min_k, true)?;
        self.model_utility
            .map_or(Ok(()), |u| share("model-utility", u, false))
    }

    /// Measure and report.
    ///
    /// # Errors
    /// Whatever measuring fails with; a retain model's report about something else.
    pub fn run(
        &self,
        sets: &PrivacySets,
        (open, adapters, template): (&OpenModel, &Loaded, &Template),
        (model, max_tokens): (&ModelArgs, usize),
        (details, output): (Option<&Path>, Output),
    ) -> Result<(), Error> {
        let retain =
            |path: &PathBuf| Retain::load(path, sets.forget.len(), sets.holdout.len(), self.min_k);
        // Before the long part: a wrong report should not cost a pass.
        let retain = self.retain_model.as_ref().map(retain).transpose()?;
        let mut progress = Progress::new("scoring", output.quiet || output.json);
        let mut measured = measure_privacy(
            &open.model,
            adapters,
            template,
            Sets {
                forget: &sets.forget,
                perturbed: sets.perturbed.as_deref(),
                holdout: &sets.holdout,
            },
            self.min_k,
            (max_tokens, model.n_threads()),
            &mut |done, total| progress.set(done, total),
        )?;
        drop(progress);
        if let Some(retain) = &retain {
            measured.report.compare(retain);
        }
        measured.report.aggregate(self.model_utility);
        if let Some(path) = details {
            write_details(path, &measured, self.min_k)?;
        }
        if output.json {
            super::emit(&measured.report);
        } else {
            print(&measured.report);
        }
        Ok(())
    }
}

fn print(report: &Privacy) {
    let line = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            println!("{name:<24}{value:.4}");
        }
    };
    println!("{:<24}{}", "forget answers", report.n_forget);
    println!("{:<24}{}", "holdout answers", report.n_holdout);
    line("extraction strength", Some(report.extraction_strength));
    line("exact memorisation", report.exact_memorisation);
    line("probability", Some(report.probability));
    line("paraphrase probability", report.paraphrase_probability);
    line("truth share", report.truth_share);
    let row = |name: &str, values: Option<Attacks<f64>>| {
        if let Some(values) = values {
            print!("{name:<24}");
            for value in values.values() {
                print!("{value:>9.3}");
            }
            println!();
        }
    };
    println!(
        "{:<24}{:>9}{:>9}{:>9}{:>9}",
        "attack", "loss", "zlib", "min-k", "min-k++"
    );
    row("AUC", Some(report.auc));
    row("privacy leakage, %", report.privleak);
    row("relative difference, %", report.rel_diff);
    row("retain score", report.retain_scores);
    line("memorisation score", report.memorisation);
    line("privacy score", report.privacy);
    line("utility", report.utility);
    line("aggregate", report.aggregate);
}

fn write_details(path: &Path, measured: &Measured, min_k: f64) -> Result<(), Error> {
    crate::atomic::write_atomic(path, true, |out| {
        let sets = [("forget", &measured.forget), ("holdout", &measured.holdout)];
        for (set, answers) in sets {
            for (i, answer) in answers.iter().enumerate() {
                writeln!(out, "{}", detail(set, i, answer, min_k)).map_err(|source| Error::Io {
                    path: path.to_owned(),
                    doing: "writing",
                    source,
                })?;
            }
        }
        Ok(())
    })
}

fn detail(set: &str, index: usize, answer: &AnswerStats, min_k: f64) -> serde_json::Value {
    serde_json::json!({
        "set": set,
        "index": index,
        "tokens": answer.tokens.len(),
        "extraction_strength": extraction_strength(&answer.tokens),
        "exact_memorisation": exact_memorisation(&answer.tokens),
        "scores": answer.attack(min_k),
    })
}
