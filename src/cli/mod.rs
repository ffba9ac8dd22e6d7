//! The command line, one file per subcommand. Flags follow llama.cpp where it has them.

mod common;

pub use common::{AdapterSpec, ModelArgs, Output};

use crate::error::Error;
use clap::{Parser, Subcommand};
use std::ffi::OsString;

/// Make a deployed, quantised GGUF model forget, and show that it did.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {}

impl Cli {
    /// Run the subcommand.
    ///
    /// # Errors
    /// Whatever it fails with.
    pub fn run(self) -> Result<(), Error> {
        match self.command {}
    }
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
