//! `nepenthe eval --choice`.

use super::common::{ModelArgs, Output};
use crate::adapter::Loaded;
use crate::data::choice::{ChoiceFormat, LETTERS, Question, Subject, load_shots, load_subjects};
use crate::error::Error;
use crate::eval::choice::Accuracy;
use crate::model::OpenModel;
use crate::progress::Progress;
use crate::score::{Answered, answer_choices};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Multiple-choice questions (asked without a chat template)
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Multiple choice")]
pub struct ChoiceArgs {
    /// Questions with four choices: WMDP (JSON) or MMLU (CSV) files or directories, one subject a
    /// file
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub choice: Vec<PathBuf>,
    /// How they are written
    #[arg(long, value_enum, default_value_t = Format::Auto, requires = "choice")]
    format: Format,
    /// Solved questions before each question
    #[arg(long, value_name = "N", requires = "choice", requires = "dev")]
    shots: Option<usize>,
    /// Where they come from: a file, or a directory with one of each subject's name
    #[arg(long, value_name = "FILE", requires = "shots")]
    dev: Option<PathBuf>,
    /// What the prompt says the questions are about (default: from the file's name)
    #[arg(long, value_name = "WORDS", requires = "choice")]
    topic: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Auto,
    Wmdp,
    Mmlu,
}

impl From<Format> for ChoiceFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Auto => Self::Auto,
            Format::Wmdp => Self::Wmdp,
            Format::Mmlu => Self::Mmlu,
        }
    }
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    overall: Accuracy,
    shots: usize,
    /// Prompts longer than the model's context.
    truncated: usize,
    subjects: Vec<SubjectReport>,
}

#[derive(Serialize)]
struct SubjectReport {
    subject: String,
    topic: String,
    #[serde(flatten)]
    accuracy: Accuracy,
}

impl ChoiceArgs {
    /// The files, with the solved questions for each.
    ///
    /// # Errors
    /// Files that are no such questions.
    pub fn load(&self, limit: Option<usize>) -> Result<Vec<(Subject, Vec<Question>)>, Error> {
        let format = self.format.into();
        let mut subjects = load_subjects(&self.choice, format, self.topic.as_deref())?;
        let shots = match (&self.dev, self.shots) {
            (Some(dev), Some(n)) => load_shots(dev, n, format, &subjects)?,
            _ => vec![Vec::new(); subjects.len()],
        };
        for subject in &mut subjects {
            subject
                .questions
                .truncate(limit.unwrap_or(usize::MAX).max(1));
        }
        Ok(subjects.into_iter().zip(shots).collect())
    }

    /// Ask them and report.
    ///
    /// # Errors
    /// Whatever asking fails with.
    pub fn run(
        &self,
        subjects: &[(Subject, Vec<Question>)],
        (open, adapters): (&OpenModel, &Loaded),
        model: &ModelArgs,
        (details, output): (Option<&Path>, Output),
    ) -> Result<(), Error> {
        let mut progress = Progress::new("asking", output.quiet || output.json);
        let total: usize = subjects.iter().map(|(s, _)| s.questions.len()).sum();
        let mut asked = 0;
        let mut reports = Vec::new();
        let mut answers = Vec::new();
        for (subject, shots) in subjects {
            let prompts = subject.questions.iter().map(|q| subject.prompt(shots, q));
            let prompts: Vec<String> = prompts.collect();
            let answered = answer_choices(
                &open.model,
                adapters,
                &prompts,
                model.n_threads(),
                &mut |n| progress.set(asked + n, total),
            )?;
            asked += prompts.len();
            let right = answered.iter().zip(&subject.questions);
            let hits = right.filter(|(a, q)| a.chosen == q.answer).count();
            reports.push(SubjectReport {
                subject: subject.name.clone(),
                topic: subject.topic.clone(),
                accuracy: Accuracy::new(hits, answered.len()),
            });
            answers.push(answered);
        }
        drop(progress);
        if let Some(path) = details {
            write_details(path, subjects, &answers)?;
        }
        let accuracies: Vec<Accuracy> = reports.iter().map(|r| r.accuracy.clone()).collect();
        let report = Report {
            overall: Accuracy::pooled(&accuracies),
            shots: self.shots.unwrap_or(0),
            truncated: answers.iter().flatten().filter(|a| a.truncated).count(),
            subjects: reports,
        };
        if output.json {
            super::emit(&report);
        } else {
            print(&report);
        }
        Ok(())
    }
}

fn print(report: &Report) {
    let line = |name: &str, a: &Accuracy| {
        println!(
            "{name:<40} {:>6} {:>9.4}  {:.4} to {:.4} {:>8.4}",
            a.n, a.accuracy, a.interval.low, a.interval.high, a.stderr
        );
    };
    println!(
        "{:<40} {:>6} {:>9}  {:<16} {:>8}",
        "subject", "n", "accuracy", "95% interval", "stderr"
    );
    for subject in &report.subjects {
        line(&subject.subject, &subject.accuracy);
    }
    if report.subjects.len() > 1 {
        line("all", &report.overall);
    }
    if report.truncated > 0 {
        println!(
            "{} prompts were cut to the model's context",
            report.truncated
        );
    }
}

fn write_details(
    path: &Path,
    subjects: &[(Subject, Vec<Question>)],
    answers: &[Vec<Answered>],
) -> Result<(), Error> {
    crate::atomic::write_atomic(path, true, |out| {
        for ((subject, _), answered) in subjects.iter().zip(answers) {
            for (i, (question, a)) in subject.questions.iter().zip(answered).enumerate() {
                let line = serde_json::json!({
                    "subject": subject.name,
                    "index": i,
                    "answer": LETTERS[question.answer],
                    "chosen": LETTERS[a.chosen],
                    "log_likelihoods": a.log_likelihoods,
                    "truncated": a.truncated,
                });
                writeln!(out, "{line}").map_err(|source| Error::Io {
                    path: path.to_owned(),
                    doing: "writing",
                    source,
                })?;
            }
        }
        Ok(())
    })
}
