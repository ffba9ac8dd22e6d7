//! `nepenthe merge`.

use super::common::{AdapterArgs, Output};
use crate::error::Error;
use crate::graph::weights::Weights;
use crate::merge::rewrite::{OutType, rewrite};
use crate::patch::Patch;
use clap::Args;
use std::path::PathBuf;

/// Merge patches or LoRA adapters into the model's weights
#[derive(Debug, Args)]
pub struct Merge {
    /// Model file (GGUF; any part of a split one)
    #[arg(short, long, value_name = "GGUF")]
    model: PathBuf,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// File to write
    #[arg(short, long, value_name = "GGUF")]
    output_file: PathBuf,
    /// What adapted tensors are written as
    #[arg(long, value_enum, default_value_t = OutType::F16)]
    out_type: OutType,
    /// Replace the output file if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

impl Merge {
    pub(super) fn run(&self) -> Result<(), Error> {
        let model = Weights::open(&self.model)?;
        let specs = self.adapters.specs()?;
        if specs.is_empty() {
            return Err(Error::Setting {
                setting: "lora",
                wanted: "at least one patch".into(),
                found: "none".into(),
            });
        }
        let mut patches = Vec::new();
        for (path, scale) in specs {
            let patch = Patch::open(path)?;
            patch.check_shapes(&model)?;
            patch.check_base(&model)?;
            patches.push((patch, scale));
        }
        let report = rewrite(
            &model,
            &patches,
            self.out_type,
            &self.output_file,
            self.force,
        )?;
        if self.output.json {
            super::emit(&report);
        } else if !self.output.quiet {
            println!(
                "{}: {} tensors updated ({}), {} copied as bytes, {} bytes",
                self.output_file.display(),
                report.tensors.len(),
                types(&report.tensors),
                report.n_copied,
                report.file_len
            );
        }
        Ok(())
    }
}

/// `Q4_K to F16: 12, ...`
fn types(tensors: &[(String, String, String)]) -> String {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for (_, from, to) in tensors {
        let key = format!("{from} to {to}");
        match counts.iter_mut().find(|(k, _)| *k == key) {
            Some((_, n)) => *n += 1,
            None => counts.push((key, 1)),
        }
    }
    let parts: Vec<String> = counts.iter().map(|(k, n)| format!("{k}: {n}")).collect();
    parts.join(", ")
}
