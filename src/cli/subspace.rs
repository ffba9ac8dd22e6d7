//! `nepenthe subspace`.

use super::common::{ModelArgs, Output, TemplateArg};
use crate::capture::pooled_outputs;
use crate::data::{load_records, samples};
use crate::error::Error;
use crate::progress::Progress;
use crate::start::CAPTURE_SAMPLES;
use crate::subspace::retain_only;
use crate::subspace_file;
use clap::Args;
use rayon::prelude::*;
use std::path::PathBuf;

/// Compute what a retain set occupies in a model, to be shared instead of its texts
#[derive(Debug, Args)]
pub struct Subspace {
    #[command(flatten)]
    model: ModelArgs,
    /// What is to be kept (JSON Lines or text)
    #[arg(long, value_name = "FILE")]
    retain: PathBuf,
    /// Subspace file to write
    #[arg(short, long = "output", value_name = "GGUF")]
    out: PathBuf,
    /// Size of the retain basis
    #[arg(long, value_name = "K", default_value_t = 128)]
    retain_rank: usize,
    /// Cut samples to this many tokens
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    #[command(flatten)]
    template: TemplateArg,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

impl Subspace {
    pub(super) fn run(&self) -> Result<(), Error> {
        if !self.force && self.out.exists() {
            return Err(crate::atomic::AtomicError::Exists {
                path: self.out.clone(),
            }
            .into());
        }
        let records = load_records(&self.retain)?;
        let open = self.model.open()?;
        let mut notices = Vec::new();
        let template = self.template.of(&open)?;
        let mut data = samples(
            &open.model,
            &template,
            &records,
            self.max_tokens,
            "retain",
            &mut notices,
        )?;
        data.truncate(CAPTURE_SAMPLES);
        let adaptable = open.trace()?.adaptable;
        let quiet = self.output.quiet || self.output.json;
        let mut progress = Progress::new("capturing outputs", quiet);
        let n = data.len();
        let pooled = pooled_outputs(
            &open.model,
            &adaptable,
            &data,
            self.model.n_threads(),
            &mut |done| {
                progress.set(done, n);
            },
        )?;
        drop(progress);
        let bases: Vec<_> = pooled
            .par_iter()
            .with_max_len(1)
            .map(|p| {
                // The same room for the complement as a hard projection leaves.
                let k = self.retain_rank.min((p.tensor.n_out / 2).max(1));
                retain_only(k, &p.tensor.name, &p.h, p.tensor.n_out)
            })
            .collect::<Result<_, _>>()?;
        let bytes = subspace_file::save(&self.out, &open, &bases, self.force)?;
        if self.output.json {
            let tensors = bases.iter().map(|b| {
                serde_json::json!({
                    "tensor": b.tensor, "n_out": b.n_out, "rank": b.rank, "samples": b.n_samples, "eigenvalues": b.eigenvalues,
                })
            });
            super::emit(&serde_json::json!({
                "file": self.out, "bytes": bytes, "notices": notices, "tensors": tensors.collect::<Vec<_>>(),
            }));
            return Ok(());
        }
        for notice in &notices {
            eprintln!("{notice}");
        }
        println!(
            "{:<32} {:>6} {:>5} {:>11} {:>11}",
            "tensor", "n_out", "k", "share of k", "share of 1"
        );
        for b in &bases {
            let total: f64 = b.eigenvalues.iter().map(|&v| f64::from(v)).sum();
            let share = |k: usize| {
                100.0
                    * b.eigenvalues[..k.min(b.eigenvalues.len())]
                        .iter()
                        .map(|&v| f64::from(v))
                        .sum::<f64>()
                    / total
            };
            println!(
                "{:<32} {:>6} {:>5} {:>10.2}% {:>10.2}%",
                b.tensor,
                b.n_out,
                b.rank,
                share(b.rank),
                share(1)
            );
        }
        println!("{}: {bytes} bytes from {n} samples", self.out.display());
        Ok(())
    }
}
