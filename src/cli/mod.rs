//! The command line, one file per subcommand. Flags follow llama.cpp where it has them.

#[cfg(feature = "train")]
mod check;
mod common;
#[cfg(feature = "train")]
mod demo;
#[cfg(feature = "merge")]
mod diff;
#[cfg(feature = "evidence")]
mod eval;
#[cfg(feature = "evidence")]
mod eval_choice;
#[cfg(feature = "evidence")]
mod eval_privacy;
#[cfg(feature = "evidence")]
mod eval_tofu;
mod inspect;
#[cfg(any(feature = "train", feature = "serve"))]
mod interrupt;
mod keys;
#[cfg(feature = "train")]
mod learn;
#[cfg(feature = "merge")]
mod merge;
#[cfg(feature = "merge")]
mod merge_args;
#[cfg(feature = "merge")]
mod merge_report;
mod patch;
#[cfg(feature = "merge")]
mod patch_several;
#[cfg(feature = "evidence")]
mod report;
#[cfg(feature = "merge")]
mod revert;
#[cfg(feature = "evidence")]
mod robustness;
mod run;
#[cfg(feature = "evidence")]
mod score;
#[cfg(feature = "serve")]
mod serve;
#[cfg(feature = "train")]
mod subspace;
#[cfg(feature = "train")]
mod train_ui;
#[cfg(feature = "train")]
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
    #[cfg(feature = "train")]
    Unlearn(Box<unlearn::Unlearn>),
    #[cfg(feature = "train")]
    Subspace(subspace::Subspace),
    #[cfg(feature = "train")]
    Learn(learn::Learn),
    Run(run::Run),
    #[cfg(feature = "serve")]
    Serve(Box<serve::Serve>),
    #[cfg(feature = "evidence")]
    Eval(Box<eval::Eval>),
    #[cfg(feature = "evidence")]
    Score(score::Score),
    #[cfg(feature = "evidence")]
    Robustness(Box<robustness::RobustnessArgs>),
    #[cfg(feature = "evidence")]
    Report(Box<report::ReportArgs>),
    #[cfg(feature = "merge")]
    Merge(merge::Merge),
    #[cfg(feature = "merge")]
    Revert(revert::Revert),
    #[cfg(feature = "merge")]
    Diff(diff::DiffArgs),
    Inspect(inspect::Inspect),
    Patch(patch::PatchArgs),
    Keygen(keys::Keygen),
    Sign(keys::Sign),
    #[cfg(feature = "train")]
    Check(check::Check),
    #[cfg(feature = "train")]
    Demo(demo::Demo),
}

impl Cli {
    /// Run the subcommand.
    ///
    /// # Errors
    /// Whatever it fails with.
    pub fn run(self) -> Result<(), Error> {
        match self.command {
            #[cfg(feature = "train")]
            Command::Unlearn(c) => c.run(),
            #[cfg(feature = "train")]
            Command::Subspace(c) => c.run(),
            #[cfg(feature = "train")]
            Command::Learn(c) => c.run(),
            Command::Run(c) => c.run(),
            #[cfg(feature = "serve")]
            Command::Serve(c) => c.run(),
            #[cfg(feature = "evidence")]
            Command::Eval(c) => c.run(),
            #[cfg(feature = "evidence")]
            Command::Score(c) => c.run(),
            #[cfg(feature = "evidence")]
            Command::Robustness(c) => c.run(),
            #[cfg(feature = "evidence")]
            Command::Report(c) => c.run(),
            #[cfg(feature = "merge")]
            Command::Merge(c) => c.run(),
            #[cfg(feature = "merge")]
            Command::Revert(c) => c.run(),
            #[cfg(feature = "merge")]
            Command::Diff(c) => c.run(),
            Command::Inspect(c) => c.run(),
            Command::Patch(c) => c.run(),
            Command::Keygen(c) => c.run(),
            Command::Sign(c) => c.run(),
            #[cfg(feature = "train")]
            Command::Check(c) => c.run(),
            #[cfg(feature = "train")]
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
