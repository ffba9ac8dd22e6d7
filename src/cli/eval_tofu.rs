//! `nepenthe eval --tofu`.

use super::common::{AdapterArgs, ModelArgs, Output, TemplateArg, TrustArgs};
use super::interrupt;
use super::score::print_scores;
use crate::error::Error;
use crate::eval::tofu::{Split, Summary, TofuScores, score_present};
use crate::eval::tofu_log::{LogFormat, check_forget_count, read_summary, write_log};
use crate::progress::Progress;
use crate::score::tofu::{Partial, TofuOptions, TofuSet, TofuWatch, evaluate_tofu, run_key};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Flags of `--tofu`.
#[derive(Debug, Args)]
pub struct TofuArgs {
    /// TOFU's folder: forget quality and model utility
    #[arg(long, value_name = "FOLDER", requires = "split")]
    pub(super) tofu: Option<PathBuf>,
    /// Its forget set
    #[arg(long, value_enum, requires = "tofu")]
    split: Option<ForgetSplit>,
    /// Only these of its four sets
    #[arg(long, value_enum, value_name = "SET", num_args = 1.., value_delimiter = ',', requires = "tofu")]
    only: Vec<OnlySet>,
    /// Write the log of every question
    #[arg(short, long = "output", value_name = "LOG", requires = "tofu")]
    out: Option<PathBuf>,
    /// Form of the log
    #[arg(long, value_enum, default_value_t = LogFormat::Official, requires = "out")]
    log_format: LogFormat,
    /// Log of a model that never saw the forget set: print forget quality
    #[arg(long, value_name = "LOG", requires = "tofu")]
    retain_log: Option<PathBuf>,
    /// Continue an interrupted evaluation
    #[arg(long, requires = "out")]
    resume: bool,
    /// Replace the log if it exists
    #[arg(long, requires = "out")]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum ForgetSplit {
    Forget01,
    Forget05,
    Forget10,
}

impl ForgetSplit {
    fn name(self) -> &'static str {
        match self {
            Self::Forget01 => "forget01",
            Self::Forget05 => "forget05",
            Self::Forget10 => "forget10",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum OnlySet {
    Forget,
    Retain,
    RealAuthors,
    WorldFacts,
}

impl OnlySet {
    fn split(self) -> Split {
        match self {
            Self::Forget => Split::Forget,
            Self::Retain => Split::Retain,
            Self::RealAuthors => Split::RealAuthors,
            Self::WorldFacts => Split::WorldFacts,
        }
    }
}

/// The rest of `eval`'s flags.
pub(super) struct Shared<'a> {
    pub(super) model: &'a ModelArgs,
    pub(super) adapters: &'a AdapterArgs,
    /// Whose patches are believed.
    pub(super) trust: &'a TrustArgs,
    pub(super) template: &'a TemplateArg,
    pub(super) limit: Option<usize>,
    pub(super) max_tokens: usize,
    pub(super) generate: bool,
    pub(super) output: Output,
}

#[derive(Serialize)]
struct Report {
    split: ForgetSplit,
    /// Questions of the sets that were asked.
    n: serde_json::Map<String, serde_json::Value>,
    #[serde(flatten)]
    scores: TofuScores,
    n_truncated: usize,
}

impl TofuArgs {
    pub(super) fn run(&self, dir: &Path, shared: &Shared<'_>) -> Result<(), Error> {
        let forget = self.split.expect("required beside --tofu");
        // What can be wrong with files is said before the model is loaded.
        let sets = self.sets(dir, forget, shared.limit)?;
        let retain_log = match &self.retain_log {
            Some(path) => {
                let asked = sets.iter().find(|s| s.split == Split::Forget);
                let asked = asked.ok_or_else(|| Error::Setting {
                    setting: "retain-log",
                    wanted: "the forget set to be evaluated".into(),
                    found: "--only without forget".into(),
                })?;
                let log = read_summary(path)?;
                check_forget_count(&log, asked.questions.len()).map_err(|e| e.of(path))?;
                Some(log)
            }
            None => None,
        };
        let partial_path = self.out.as_deref().map(|out| self.partial_path(out));
        let partial_path = partial_path.transpose()?;

        let open = shared.model.open()?;
        let adapters = shared.adapters.open(&open, shared.trust)?;
        let template = shared.template.of(&open)?;
        let options = TofuOptions {
            max_tokens: shared.max_tokens,
            generate: shared.generate,
            n_threads: shared.model.n_threads(),
        };
        let mut partial = match &partial_path {
            Some(path) => {
                interrupt::listen("stopping");
                let specs = shared.adapters.specs()?;
                let run = run_key(&open, &specs, &template, &sets, options)?;
                if self.resume && path.exists() {
                    Partial::resume(path, &run)?
                } else {
                    Partial::begin(path, &run)?
                }
            }
            None => Partial::none(),
        };
        let mut watch = Watch(Progress::new(
            "asking",
            shared.output.quiet || shared.output.json,
        ));
        let run = evaluate_tofu(
            &open.model,
            &adapters,
            &template,
            &sets,
            options,
            &mut partial,
            &mut watch,
        )?;
        drop(watch);
        let summary = Summary::of(run.examples.each_ref().map(Vec::as_slice));
        let scores = score_present(&summary, retain_log.as_ref())?;
        if let Some(out) = &self.out {
            write_log(out, self.force, self.log_format, &run.examples)?;
            partial.finish()?;
        }
        if run.n_truncated > 0 {
            eprintln!(
                "{} answers were cut to {} tokens",
                run.n_truncated, options.max_tokens
            );
        }
        if shared.output.json {
            let n = sets.iter().map(|s| {
                let name = s.split.name().replace(' ', "_");
                (name, s.questions.len().into())
            });
            super::emit(&Report {
                split: forget,
                n: n.collect(),
                scores,
                n_truncated: run.n_truncated,
            });
        } else {
            print_scores(&scores);
        }
        Ok(())
    }

    fn sets(
        &self,
        dir: &Path,
        forget: ForgetSplit,
        limit: Option<usize>,
    ) -> Result<Vec<TofuSet>, Error> {
        let wanted = |split: Split| {
            self.only.is_empty() || self.only.iter().any(|only| only.split() == split)
        };
        let limit = limit.map(|n| n.max(1));
        Split::ALL
            .into_iter()
            .filter(|&split| wanted(split))
            .map(|split| Ok(TofuSet::load(dir, split, forget.name(), limit)?))
            .collect()
    }

    /// Where finished questions are kept until `out` is whole.
    fn partial_path(&self, out: &Path) -> Result<PathBuf, Error> {
        if !self.force && out.exists() {
            return Err(crate::atomic::AtomicError::Exists {
                path: out.to_owned(),
            }
            .into());
        }
        let mut name = out.as_os_str().to_owned();
        name.push(".partial");
        let path = PathBuf::from(name);
        if path.exists() && !self.resume && !self.force {
            return Err(Error::Setting {
                setting: "output",
                wanted: "--resume to go on with it, or --force to begin anew".into(),
                found: format!("an interrupted evaluation in {}", path.display()),
            });
        }
        Ok(path)
    }
}

struct Watch(Progress);

impl TofuWatch for Watch {
    fn progress(&mut self, done: usize, total: usize) {
        self.0.note(done, total, " questions");
    }

    fn stop(&mut self) -> bool {
        interrupt::asked()
    }
}
