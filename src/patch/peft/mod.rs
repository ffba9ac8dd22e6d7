//! LoRA adapters as Hugging Face PEFT saves them: `adapter_config.json` beside
//! `adapter_model.safetensors`.
//!
//! In, the directory or the safetensors file, and the model it is for; out, a [`Patch`] without
//! provenance, in the model's own names and row order. Whatever a plain ΔW = s·B·A does not
//! express (DoRA, biases, saved modules, changed base weights) is refused by name.
//!
//! PEFT keeps `lora_A.weight [n_in, rank]` and `lora_B.weight [rank, n_out]` (ggml order),
//! s = alpha/r, or alpha/√r with `use_rslora` (rsLoRA, arXiv 2312.03732, eq. 4).
//!
//! Trap: Hugging Face's Llama turns the two halves of a head's rows against each other where
//! llama.cpp's `llama` turns neighbours, so converted files have the rows of q and k
//! reordered, and the rows of B must follow.

mod config;
mod names;
#[cfg(test)]
mod tests;

use super::{Patch, Update};
use crate::error::Error;
use crate::graph::weights::Weights;
use config::Config;
use half::{bf16, f16};
use names::{Module, Rows, module};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use thiserror::Error;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// Why a PEFT adapter is refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PeftError {
    #[error("{}: {doing} failed", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: std::io::Error,
    },
    #[error("{}: wanted a PEFT adapter_config.json: {problem}", path.display())]
    Config { path: PathBuf, problem: String },
    #[error("{}: {key} = {found}: wanted {wanted}; a merge as s*B*A would not be this adapter", path.display())]
    Unsupported {
        path: PathBuf,
        key: String,
        wanted: &'static str,
        found: String,
    },
    #[error("{}: cannot be read as safetensors", path.display())]
    Tensors {
        path: PathBuf,
        source: safetensors::SafeTensorError,
    },
    #[error("{}: tensor {tensor}: wanted {wanted}, found {found}", path.display())]
    Tensor {
        path: PathBuf,
        tensor: String,
        wanted: String,
        found: String,
    },
    #[error("{}: adapts {module}, for which no tensor of a {arch} model is known here", path.display())]
    Module {
        path: PathBuf,
        module: String,
        arch: String,
    },
    #[error("{}: the adapter holds no lora_A and lora_B tensors", path.display())]
    Empty { path: PathBuf },
}

/// Read the adapter at `path`, a directory or the tensor file in it, for `model`.
///
/// # Errors
/// One [`PeftError`] variant per thing that can be wrong; a model without the head counts that
/// the row order depends on.
pub fn open(path: &Path, model: &Weights) -> Result<Patch, Error> {
    let file = if path.is_dir() {
        path.join(TENSORS)
    } else {
        path.to_owned()
    };
    let config = Config::read(&file.with_file_name(CONFIG))?;
    let bytes = fs::read(&file).map_err(|source| PeftError::Io {
        path: file.clone(),
        doing: "reading",
        source,
    })?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|source| PeftError::Tensors {
        path: file.clone(),
        source,
    })?;
    let reader = Reader {
        path: &file,
        arch: model.arch()?,
        model,
        config: &config,
    };
    Ok(Patch {
        arch: model.arch()?.to_owned(),
        info: None,
        updates: reader.updates(&tensors)?,
        path: file,
    })
}

struct Reader<'a> {
    path: &'a Path,
    arch: &'a str,
    model: &'a Weights,
    config: &'a Config,
}

/// The pair of one module.
#[derive(Default)]
struct Pair<'a> {
    a: Option<TensorView<'a>>,
    b: Option<TensorView<'a>>,
}

impl Reader<'_> {
    /// In the model's tensor order.
    fn updates(&self, tensors: &SafeTensors) -> Result<Vec<Update>, Error> {
        let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
        for (name, view) in tensors.iter() {
            let short = name.strip_prefix("base_model.model.").unwrap_or(name);
            if let Some(module) = short.strip_suffix(".lora_A.weight") {
                pairs.entry(module.to_owned()).or_default().a = Some(view);
            } else if let Some(module) = short.strip_suffix(".lora_B.weight") {
                pairs.entry(module.to_owned()).or_default().b = Some(view);
            } else {
                return Err(self
                    .tensor(
                        name,
                        "a name that ends in .lora_A.weight or .lora_B.weight",
                        "another",
                    )
                    .into());
            }
        }
        if pairs.is_empty() {
            return Err(PeftError::Empty {
                path: self.path.to_owned(),
            }
            .into());
        }
        let mut updates = Vec::new();
        for (name, pair) in &pairs {
            updates.push(self.update(name, pair)?);
        }
        let order = |u: &Update| {
            let mut all = self.model.set().tensors();
            all.position(|(_, t)| t.name == u.tensor)
        };
        updates.sort_by_key(order);
        if let Some(two) = updates.windows(2).find(|w| w[0].tensor == w[1].tensor) {
            let wanted = "one module for each tensor of the model";
            return Err(self.tensor(&two[0].tensor, wanted, "two").into());
        }
        Ok(updates)
    }

    fn update(&self, name: &str, pair: &Pair) -> Result<Update, Error> {
        let Some(Module { tensor, rows }) = module(self.arch, name) else {
            return Err(PeftError::Module {
                path: self.path.to_owned(),
                module: name.to_owned(),
                arch: self.arch.to_owned(),
            }
            .into());
        };
        let (Some(a), Some(b)) = (&pair.a, &pair.b) else {
            return Err(self.tensor(name, "lora_A and lora_B", "one of them").into());
        };
        // safetensors has the row length last.
        let (&[rank, n_in], &[n_out, rank_b]) = (a.shape(), b.shape()) else {
            let found = format!("{:?} and {:?}", a.shape(), b.shape());
            return Err(self.tensor(name, "two matrices", &found).into());
        };
        let wanted = self.config.rank(name);
        if rank != wanted || rank_b != wanted {
            let wanted = format!("rank {wanted}, as {CONFIG} says");
            let found = format!("{rank} in lora_A and {rank_b} in lora_B");
            return Err(self.tensor(name, &wanted, &found).into());
        }
        let lora_a = self.values(name, a)?;
        let mut lora_b = self.values(name, b)?;
        if rows == Rows::Interleaved {
            let n_head = self.n_head(&tensor)?;
            if n_head == 0 || !n_out.is_multiple_of(2 * n_head) {
                let wanted = format!("a multiple of {} rows", 2 * n_head);
                return Err(self.tensor(name, &wanted, &n_out.to_string()).into());
            }
            lora_b = interleaved(&lora_b, rank, n_head);
        }
        Ok(Update {
            tensor,
            n_in,
            n_out,
            rank,
            scale: self.config.scale(name),
            lora_a,
            lora_b,
        })
    }

    /// Heads of a q or k tensor, by the model's metadata.
    fn n_head(&self, tensor: &str) -> Result<usize, Error> {
        let meta = self.model.set().metadata();
        let key = format!("{}.attention.head_count", self.arch);
        let kv = format!("{key}_kv");
        // Files without the second key have as many key heads as query heads.
        let n: u32 = match tensor.ends_with("attn_k.weight") && meta.value(&kv).is_some() {
            true => meta.get(&kv)?,
            false => meta.get(&key)?,
        };
        Ok(n as usize)
    }

    fn values(&self, name: &str, view: &TensorView) -> Result<Vec<f32>, Error> {
        let data = view.data();
        let out: Vec<f32> = match view.dtype() {
            Dtype::F32 => words(data).map(f32::from_le_bytes).collect(),
            Dtype::F16 => words(data)
                .map(|b| f16::from_le_bytes(b).to_f32())
                .collect(),
            Dtype::BF16 => words(data)
                .map(|b| bf16::from_le_bytes(b).to_f32())
                .collect(),
            other => {
                return Err(self
                    .tensor(name, "F32, F16 or BF16", &format!("{other:?}"))
                    .into());
            }
        };
        if let Some(at) = out.iter().position(|v| !v.is_finite()) {
            let found = format!("{} at element {at}", out[at]);
            return Err(self.tensor(name, "finite numbers", &found).into());
        }
        Ok(out)
    }

    fn tensor(&self, tensor: &str, wanted: &str, found: &str) -> PeftError {
        PeftError::Tensor {
            path: self.path.to_owned(),
            tensor: tensor.to_owned(),
            wanted: wanted.to_owned(),
            found: found.to_owned(),
        }
    }
}

fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> {
    data.as_chunks::<N>().0.iter().copied()
}

/// `lora_b [rank, n_out]` with the rows of each head reordered from halves (row i of the first
/// half belongs with row i of the second) to neighbours: row 2i + j of the result is row i of
/// half j.
fn interleaved(lora_b: &[f32], rank: usize, n_head: usize) -> Vec<f32> {
    let half = lora_b.len() / rank / n_head / 2;
    let mut out = Vec::with_capacity(lora_b.len());
    for head in lora_b.chunks_exact(2 * half * rank) {
        let (first, second) = head.split_at(half * rank);
        for (a, b) in first.chunks_exact(rank).zip(second.chunks_exact(rank)) {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    out
}
