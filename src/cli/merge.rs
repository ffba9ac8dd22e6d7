//! `nepenthe merge`.

use super::common::{AdapterArgs, Output};
use crate::error::Error;
use crate::graph::weights::Weights;
use crate::merge::deliver::{Delivery, To, deliver};
use crate::merge::replace;
use crate::merge::rewrite::{OutType, rewrite};
use crate::patch::Patch;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Merge patches or LoRA adapters (GGUF, or a PEFT directory) into the model's weights
#[derive(Debug, Args)]
pub struct Merge {
    /// Model file (GGUF; any part of a split one)
    #[arg(short, long, value_name = "GGUF")]
    model: PathBuf,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// File to write; the parts of a split model get their names from it
    #[arg(short, long, value_name = "GGUF")]
    output_file: Option<PathBuf>,
    /// Replace the model itself; the old file stays as .prev until --confirm or the next merge
    #[arg(long, conflicts_with_all = ["output_file", "join"])]
    in_place: bool,
    /// Write a file that takes the merge back byte for byte (see revert)
    #[arg(long, value_name = "FILE")]
    undo: Option<PathBuf>,
    /// What adapted tensors are written as
    #[arg(long, value_enum, default_value_t = OutType::F16)]
    out_type: OutType,
    /// Write a split model as one file
    #[arg(long)]
    join: bool,
    /// Replace the output and the undo file if they exist
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    after: After,
    #[command(flatten)]
    output: Output,
}

/// What to do about an earlier merge in place, instead of a new one.
#[derive(Debug, Args)]
#[group(multiple = false)]
struct After {
    /// Remove the .prev of an earlier --in-place
    #[arg(long)]
    confirm: bool,
    /// Put the .prev of an earlier --in-place back
    #[arg(long)]
    restore: bool,
    /// Complete an interrupted merge, if there is one
    #[arg(long)]
    recover: bool,
}

impl Merge {
    pub(super) fn run(&self) -> Result<(), Error> {
        for path in [Some(&self.model), self.output_file.as_ref()] {
            let Some(path) = path else { continue };
            settled(replace::settle(path)?, path);
        }
        if self.after.confirm || self.after.restore || self.after.recover {
            return self.tidy();
        }
        let to = match &self.output_file {
            Some(out) => To::File(out),
            None if self.in_place => To::InPlace,
            None => {
                return Err(Error::Setting {
                    setting: "output-file",
                    wanted: "a file to write, or --in-place".into(),
                    found: "neither".into(),
                });
            }
        };
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
            let patch = Patch::open_any(path, &model)?;
            patch.check_shapes(&model)?;
            patch.check_base(&model)?;
            patches.push((patch, scale));
        }
        let plan = rewrite(&model, &patches, self.out_type, self.join)?;
        let how = Delivery {
            to,
            undo: self.undo.as_deref(),
            force: self.force,
        };
        let done = deliver(model.set(), plan.files, how, |_| Ok(()))?;
        let hint = modelfile(&done.files);
        if self.output.json {
            super::emit(&json!({
                "tensors": plan.tensors,
                "n_copied": plan.n_copied,
                "file_len": done.file_len,
                "files": done.files,
                "prev": done.prev,
                "undo": done.undo,
                "modelfile": hint,
            }));
        } else if !self.output.quiet {
            println!(
                "{}: {} tensors updated ({}), {} copied as bytes, {} bytes",
                done.files[0].display(),
                plan.tensors.len(),
                types(&plan.tensors),
                plan.n_copied,
                done.file_len
            );
            for prev in &done.prev {
                println!("{}: the file before, until merge --confirm", prev.display());
            }
            if let (Some(size), Some(path)) = (&done.undo, &self.undo) {
                println!(
                    "{}: takes it back, {} bytes ({} changed, {} spelled out)",
                    path.display(),
                    size.file_len,
                    size.changed,
                    size.spelled
                );
            }
        }
        if !self.output.quiet {
            match hint {
                Some(text) => {
                    eprintln!("for Ollama, a Modelfile with the line\n{}", text.trim_end())
                }
                None => {
                    eprintln!("for Ollama, merge with --join: it takes models in one file only")
                }
            }
        }
        Ok(())
    }

    fn tidy(&self) -> Result<(), Error> {
        let (removed, restored) = match &self.after {
            a if a.confirm => (replace::confirm(&self.model)?, Vec::new()),
            a if a.restore => (Vec::new(), replace::restore(&self.model)?),
            _ => (Vec::new(), Vec::new()),
        };
        if self.output.json {
            super::emit(&json!({ "removed": removed, "restored": restored }));
        } else if !self.output.quiet {
            for path in &removed {
                println!("{}: removed", path.display());
            }
            for path in &restored {
                println!("{}: as it was before the merge", path.display());
            }
            if self.after.confirm && removed.is_empty() {
                println!("{}: no .prev file to remove", self.model.display());
            }
        }
        Ok(())
    }
}

/// Say that an interrupted merge was completed.
pub(super) fn settled(completed: bool, path: &Path) {
    if completed {
        eprintln!("{}: completed an interrupted merge", path.display());
    }
}

/// What Ollama wants to know of a model in one file; it finds the chat template in the GGUF.
fn modelfile(files: &[PathBuf]) -> Option<String> {
    let [file] = files else { return None };
    let full = std::path::absolute(file).unwrap_or_else(|_| file.clone());
    Some(format!("FROM {}\n", full.display()))
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
