//! `nepenthe revert`.

use super::common::Output;
use crate::error::Error;
use crate::gguf::GgufSet;
use crate::merge::deliver;
use crate::replace;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// Take a merged model back to the file it was made from, byte for byte
#[derive(Debug, Args)]
pub struct Revert {
    /// Merged model (GGUF; any part of a split one)
    #[arg(short, long, value_name = "GGUF")]
    model: PathBuf,
    /// Undo file that the merge wrote
    #[arg(long, value_name = "FILE")]
    undo: PathBuf,
    /// File to write; a split original gets its part names from it
    #[arg(short, long, value_name = "GGUF")]
    output_file: PathBuf,
    /// Replace the output file if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

impl Revert {
    pub(super) fn run(&self) -> Result<(), Error> {
        for path in [&self.model, &self.output_file] {
            super::merge::settled(replace::settle(path)?, path);
        }
        let model = GgufSet::open(&self.model)?;
        let files = deliver::revert(&model, &self.undo, &self.output_file, self.force)?;
        if self.output.json {
            super::emit(&json!({ "files": files }));
        } else if !self.output.quiet {
            for file in &files {
                println!("{}: as it was before the merge", file.display());
            }
        }
        Ok(())
    }
}
