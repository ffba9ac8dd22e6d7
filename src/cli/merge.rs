//! `nepenthe merge`.

use super::common::{AdapterArgs, GpuLayers, Output, threads};
use super::merge_args::{FitArgs, GateArgs, TextArgs};
use super::merge_report::print;
use crate::error::Error;
use crate::merge::correct::Correct;
use crate::merge::deliver::{Delivery, To};
use crate::merge::rewrite::{Form, OutType};
use crate::merge::run::{How, Job, merge};
use crate::progress::Stages;
use crate::replace;
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
    /// Write adapted tensors in this type, or encode them again in their own, instead of merging
    /// on the grids that are there
    #[arg(long, value_enum, conflicts_with = "FitArgs")]
    out_type: Option<OutType>,
    #[command(flatten)]
    fit: FitArgs,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    gate: GateArgs,
    /// Threads (default: all cores)
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// Layers to offload to a GPU: a number, auto or all
    #[arg(long = "n-gpu-layers", value_name = "N|auto|all", default_value = "0")]
    n_gpu_layers: GpuLayers,
    /// Write a split model as one file
    #[arg(long)]
    join: bool,
    /// Leave the metadata as it is: the file keeps its exact size and differs in code bits alone,
    /// but does not say which patches it holds
    #[arg(long)]
    no_record: bool,
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
        let specs = self.adapters.specs()?;
        if specs.is_empty() {
            return Err(Error::Setting {
                setting: "lora",
                wanted: "at least one patch".into(),
                found: "none".into(),
            });
        }
        let job = Job {
            model: &self.model,
            specs,
            texts: self.texts.load()?,
            template: self.texts.template()?,
            sketch: self.texts.sketch.as_deref(),
            imatrix: self.texts.imatrix.as_deref(),
            how: match self.out_type {
                Some(out_type) => How::Rewrite(out_type),
                None => How::SameGrid(self.fit.options()),
            },
            max_growth: self.fit.max_growth,
            rounds: self.fit.rounds(),
            gate: self.gate.config(),
            keep_failed: self.gate.keep_failed,
            delivery: Delivery {
                to,
                undo: self.undo.as_deref(),
                force: self.force,
            },
            form: Form {
                join: self.join,
                record: !self.no_record,
            },
            max_tokens: self.texts.max_tokens,
            n_threads: threads(self.threads),
            n_gpu_layers: self.n_gpu_layers.0,
        };
        self.n_gpu_layers.note();
        let mut ui = Stages::new(self.output.quiet || self.output.json);
        let report = merge(job, corrector(), &mut ui)?;
        drop(ui);
        let hint = modelfile(&report.delivered.files);
        if self.output.json {
            let mut json = serde_json::to_value(&report).expect("plain values");
            json["modelfile"] = json!(hint);
            super::emit(&json);
        } else if !self.output.quiet {
            print(&report, self.undo.as_deref());
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
        // Kept although it failed: the exit code says so all the same.
        report
            .verdict
            .map_or(Ok(()), |v| Ok(v.accepted().map(drop)?))
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

#[cfg(feature = "train")]
fn corrector() -> Option<Box<dyn Correct>> {
    Some(Box::new(crate::correct::Distiller::default()))
}

/// A build that cannot train has no flag for it.
#[cfg(not(feature = "train"))]
fn corrector() -> Option<Box<dyn Correct>> {
    None
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
