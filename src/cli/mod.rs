//! The command line, one file per subcommand. Flags follow llama.cpp where it has them.

mod check;
mod common;
mod demo;
mod diff;
mod eval;
mod eval_choice;
mod eval_privacy;
mod eval_tofu;
mod inspect;
mod interrupt;
mod keys;
mod learn;
mod merge;
mod merge_args;
mod merge_report;
mod patch;
mod patch_several;
mod report;
mod revert;
mod robustness;
mod run;
mod score;
#[cfg(feature = "serve")]
mod serve;
mod subspace;
mod train_ui;
mod unlearn;

pub use common::{AdapterArgs, AdapterSpec, ModelArgs, Output};

use crate::error::Error;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::io::Write;

/// Make a deployed, quantised GGUF model forget, and show that it did.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Unlearn(Box<unlearn::Unlearn>),
    Subspace(subspace::Subspace),
    Learn(learn::Learn),
    Run(run::Run),
    #[cfg(feature = "serve")]
    Serve(Box<serve::Serve>),
    Eval(Box<eval::Eval>),
    Score(score::Score),
    Robustness(Box<robustness::RobustnessArgs>),
    Report(Box<report::ReportArgs>),
    Merge(merge::Merge),
    Revert(revert::Revert),
    Diff(diff::DiffArgs),
    Inspect(inspect::Inspect),
    Patch(patch::PatchArgs),
    Keygen(keys::Keygen),
    Sign(keys::Sign),
    Check(check::Check),
    Demo(demo::Demo),
}

impl Cli {
    /// Run the subcommand.
    ///
    /// # Errors
    /// Whatever it fails with.
    pub fn run(self) -> Result<(), Error> {
        match self.command {
            Command::Unlearn(c) => c.run(),
            Command::Subspace(c) => c.run(),
            Command::Learn(c) => c.run(),
            Command::Run(c) => c.run(),
            #[cfg(feature = "serve")]
            Command::Serve(c) => c.run(),
            Command::Eval(c) => c.run(),
            Command::Score(c) => c.run(),
            Command::Robustness(c) => c.run(),
            Command::Report(c) => c.run(),
            Command::Merge(c) => c.run(),
            Command::Revert(c) => c.run(),
            Command::Diff(c) => c.run(),
            Command::Inspect(c) => c.run(),
            Command::Patch(c) => c.run(),
            Command::Keygen(c) => c.run(),
            Command::Sign(c) => c.run(),
            Command::Check(c) => c.run(),
            Command::Demo(c) => c.run(),
        }
    }
}

/// Print `report` as one JSON document on stdout.
fn emit(report: &impl serde::Serialize) {
    let text = serde_json::to_string_pretty(report).expect("reports hold plain values");
    // A reader that went away is no failure of ours.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// llama.cpp's `-ngl` has three letters after one dash, which clap does not parse.
pub fn llama_style(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    args.map(|a| {
        if a == "-ngl" {
            "--n-gpu-layers".into()
        } else {
            a
        }
    })
    .collect()
}
