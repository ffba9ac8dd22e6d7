//! `nepenthe patch check` and `nepenthe patch combine`.

use super::common::{AdapterSpec, threads};
use crate::adapter::{Loaded, load_patch, open_adapters};
use crate::error::Error;
use crate::model::OpenModel;
use crate::patch::{
    Info, Overlap, Patch, Storage, TensorInfo, Weighting, base_of, combine, overlaps,
};
use crate::patch::{PatchError, digest_of};
use crate::proof::{choose, measure};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::path::PathBuf;

/// Say where patches overlap, and what they do together
#[derive(Debug, Args)]
pub struct CheckSeveral {
    /// The patches, each with an optional scale
    #[arg(required = true, num_args = 2.., value_name = "FILE[:SCALE]")]
    files: Vec<AdapterSpec>,
    /// Measure on this model what each does alone and in the stack
    #[arg(short, long, value_name = "GGUF")]
    model: Option<PathBuf>,
    /// Threads (default: all cores)
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// Report as JSON on stdout, weight by weight
    #[arg(long)]
    json: bool,
}

impl CheckSeveral {
    pub(super) fn run(&self) -> Result<(), Error> {
        let open_one = |spec: &AdapterSpec| Patch::open(&spec.path);
        let patches: Vec<Patch> = self.files.iter().map(open_one).collect::<Result<_, _>>()?;
        let name = |i: usize| self.files[i].path.display().to_string();
        let mut pairs = Vec::new();
        for j in 0..patches.len() {
            for i in 0..j {
                let found = overlaps(&patches[i], &patches[j])?;
                if !self.json {
                    print_pair(&name(i), &name(j), &found);
                }
                pairs.push(json!({ "a": name(i), "b": name(j), "tensors": found }));
            }
        }
        let mut effects = Vec::new();
        if let Some(path) = &self.model {
            let open = OpenModel::open(path, 0)?;
            let specs = self.files.iter().map(|s| (s.path.as_path(), s.scale));
            let stack = open_adapters(&open, specs)?;
            for (i, patch) in patches.iter().enumerate() {
                let canaries = patch.info.as_ref().map_or(&[][..], |i| &i.canaries);
                let run = |adapters: &Loaded| {
                    measure(&open.model, adapters, canaries, threads(self.threads))
                };
                let alone = run(&vec![stack[i].clone()])?;
                let together = run(&stack)?;
                if !self.json {
                    match (alone, together) {
                        (Some(alone), Some(together)) => println!(
                            "{}: strength {:.2} alone, {:.2} in the stack",
                            name(i),
                            alone.strength,
                            together.strength
                        ),
                        _ => println!("{}: no canaries to measure it on", name(i)),
                    }
                }
                effects.push(json!({ "patch": name(i), "alone": alone, "together": together }));
            }
        }
        if self.json {
            super::emit(&json!({ "pairs": pairs, "effects": effects }));
        }
        Ok(())
    }
}

fn print_pair(a: &str, b: &str, found: &[Overlap]) {
    if found.is_empty() {
        println!("{a} and {b} adapt no weight in common");
        return;
    }
    let mean =
        |of: &dyn Fn(&Overlap) -> f64| found.iter().map(of).sum::<f64>() / found.len() as f64;
    println!("{a} and {b}: {} weights in common, on average", found.len());
    println!(
        "  what they write to   share {:.3} of the smaller space ({:.3} at random)",
        mean(&|o| o.outputs.mean_square),
        mean(&|o| o.outputs.at_random)
    );
    println!(
        "  what they read from  share {:.3} of the smaller space ({:.3} at random)",
        mean(&|o| o.inputs.mean_square),
        mean(&|o| o.inputs.at_random)
    );
    println!(
        "  cosine of the updates {:+.3} (-1: they undo each other, 1: the same twice)",
        mean(&|o| o.cosine)
    );
    let mut worst: Vec<&Overlap> = found.iter().collect();
    worst.sort_by(|a, b| b.cosine.abs().total_cmp(&a.cosine.abs()));
    for o in worst.iter().take(3) {
        println!("    {:<32} {:+.3}", o.tensor, o.cosine);
    }
}

/// How updates of one weight are added.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Weights {
    /// So that each keeps its own effect where they conflict
    Auto,
    /// As they are
    Equal,
}

/// Make one patch of several, or a smaller one of one
#[derive(Debug, Args)]
pub struct Combine {
    /// The patches, each with an optional scale
    #[arg(required = true, value_name = "FILE[:SCALE]")]
    files: Vec<AdapterSpec>,
    /// The model they are for
    #[arg(short, long, value_name = "GGUF")]
    model: PathBuf,
    /// Where it goes
    #[arg(short, long)]
    out: PathBuf,
    /// Each weight's update may be off by this fraction of its norm, for a lower rank
    #[arg(long, default_value_t = 0.01)]
    error: f64,
    /// Type of the factors in the file; with q8_0 ranks are rounded up to multiples of 32
    #[arg(long = "type", value_enum, default_value = "f16", value_name = "TYPE")]
    storage: Storage,
    /// How updates of one weight are added
    #[arg(long, value_enum, default_value = "auto")]
    weights: Weights,
    /// Threads (default: all cores)
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// Replace the patch if it exists
    #[arg(long)]
    force: bool,
    /// Report as JSON on stdout
    #[arg(long)]
    json: bool,
}

impl Combine {
    pub(super) fn run(&self) -> Result<(), Error> {
        if !(0.0..1.0).contains(&self.error) {
            return Err(Error::Setting {
                setting: "error",
                wanted: "0 to below 1".into(),
                found: self.error.to_string(),
            });
        }
        let open = OpenModel::open(&self.model, 0)?;
        let mut patches = Vec::new();
        for spec in &self.files {
            let patch = Patch::open(&spec.path)?;
            patch.check_shapes(&open.weights)?;
            patch.check_base(&open.weights)?;
            if patch.info.is_none() {
                let path = spec.path.clone();
                return Err(PatchError::NoProvenance { path }.into());
            }
            patches.push((patch, spec.scale));
        }
        let weighting = match self.weights {
            Weights::Auto => Weighting::Auto,
            Weights::Equal => Weighting::Equal,
        };
        let mut combined = combine(&patches, self.error, weighting, self.storage)?;
        // What is recorded and tried below is what the file will hold.
        for u in &mut combined.updates {
            *u = self.storage.rounded(u)?;
        }
        let mut info = self.provenance(&open, &patches)?;
        for (u, about) in combined.updates.iter().zip(&combined.tensors) {
            let norm = u.net()?.norm() as f32;
            let squares = open.weights.decoded(&u.tensor)?;
            let whole: f64 = squares.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            info.tensors.push(TensorInfo {
                name: u.tensor.clone(),
                digest: digest_of(&open.weights, &u.tensor)?,
                rank: about.rank as u32,
                retain_rank: 0,
                norm,
                relative_norm: if whole > 0.0 {
                    norm / whole.sqrt() as f32
                } else {
                    0.0
                },
                retain_fraction: 0.0,
            });
        }
        let mut patch = Patch::new(open.weights.arch()?, info, combined.updates);
        let adapters = vec![(load_patch(&open.model, &patch)?, 1.0)];
        let canaries = choose(&open.model, &adapters, threads(self.threads))?;
        if let Some(info) = &mut patch.info {
            info.canaries = canaries;
        }
        let bytes = patch.save_as(&self.out, self.force, self.storage)?;
        let error = combined.tensors.iter().map(|t| t.error).fold(0.0, f64::max);
        if self.json {
            super::emit(&json!({
                "out": self.out, "bytes": bytes, "error": error, "tensors": combined.tensors,
            }));
        } else {
            let rank = |of: fn(&crate::patch::CombinedTensor) -> usize| {
                combined.tensors.iter().map(of).sum::<usize>()
            };
            println!(
                "{}: {bytes} bytes, ranks {} to {} in all, each weight within {error:.4} of the sum",
                self.out.display(),
                rank(|t| t.rank_before),
                rank(|t| t.rank),
            );
        }
        Ok(())
    }

    /// Where the combination comes from: what each part says of itself.
    fn provenance(&self, open: &OpenModel, patches: &[(Patch, f32)]) -> Result<Info, Error> {
        let mut parts = Vec::new();
        let mut metrics = Vec::new();
        let (mut n_forget, mut n_retain) = (0, 0);
        for (patch, scale) in patches {
            let Some(info) = &patch.info else { continue };
            parts.push(json!({
                "sha256": crate::digest::of_file(&patch.path)?, "scale": scale,
                "method": info.method, "config": info.config,
            }));
            metrics.push(info.metrics.clone());
            n_forget += info.n_forget;
            n_retain += info.n_retain;
        }
        let weights = format!("{:?}", self.weights).to_lowercase();
        let config = json!({ "error": self.error, "weights": weights, "parts": parts });
        let mut info = Info::new(base_of(&open.weights)?, "combined", config, 0);
        info.metrics = json!({ "parts": metrics });
        info.n_forget = n_forget;
        info.n_retain = n_retain;
        Ok(info)
    }
}
