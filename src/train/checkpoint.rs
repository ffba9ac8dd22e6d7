//! Everything a resumed run needs, in one GGUF: parameters, what they started from, bases,
//! moments, step and position in the data. A resumed run is bit-identical to one that was never
//! interrupted.

use super::adamw::Moments;
use super::adapters::{Pair, Pairs};
use crate::digest::Digest;
use crate::error::Error;
use crate::gguf::{GgmlType, Gguf, GgufWriter, Metadata};
use crate::graph::template::Adaptable;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// `general.type` of a checkpoint.
const KIND: &str = "nepenthe.checkpoint";
const FORMAT: u32 = 1;
/// What is stored per pair, with its suffix.
const PARTS: [&str; 9] = ["a", "b", "a0", "b0", "basis", "m.a", "v.a", "m.b", "v.b"];
/// The same for [`Checkpoint::before`].
const BEFORE: [&str; 2] = ["before.a", "before.b"];

/// Why a checkpoint is refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    #[error("{}: wanted a checkpoint of format {FORMAT}, found {found}", path.display())]
    Kind { path: PathBuf, found: String },
    #[error("{}: made by a run with another {what}: wanted {wanted}, found {found}", path.display())]
    Other {
        path: PathBuf,
        what: &'static str,
        wanted: String,
        found: String,
    },
    #[error("{}: {what} {name}: wanted {wanted}, found {found}", path.display())]
    Content {
        path: PathBuf,
        what: &'static str,
        name: String,
        wanted: String,
        found: String,
    },
}

/// What a run is: it goes on only with the same model, data and settings.
#[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
pub struct Identity {
    /// SHA-256 of the model.
    pub base: Digest,
    /// SHA-256 of the records.
    pub data: Digest,
    /// All settings, as JSON.
    pub config: serde_json::Value,
}

/// A training run at rest.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint<S> {
    /// Which run.
    pub identity: Identity,
    /// Parameters and what they started from.
    pub pairs: Pairs,
    /// AdamW's moments.
    pub moments: Vec<Moments>,
    /// Steps taken.
    pub step: u64,
    /// State of the loop.
    pub state: S,
    /// Earlier parameters the loop may go back to, in the tape's order.
    pub before: Option<Vec<Vec<f32>>>,
}

impl<S: Serialize + DeserializeOwned> Checkpoint<S> {
    /// Write to `path`, replacing what stands there.
    ///
    /// # Errors
    /// A failing disk.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let json = |v: serde_json::Result<String>| v.expect("plain values");
        let mut meta = Metadata::new();
        meta.set("general.type", KIND);
        meta.set("nepenthe.checkpoint.format", FORMAT);
        meta.set(
            "nepenthe.checkpoint.identity",
            json(serde_json::to_string(&self.identity)),
        );
        meta.set(
            "nepenthe.checkpoint.state",
            json(serde_json::to_string(&self.state)),
        );
        meta.set("nepenthe.checkpoint.step", self.step);
        meta.set("nepenthe.checkpoint.scale", self.pairs.scale);
        let pairs = &self.pairs.list;
        meta.set(
            "nepenthe.checkpoint.tensor",
            pairs
                .iter()
                .map(|p| p.tensor.name.clone())
                .collect::<Vec<_>>(),
        );
        meta.set(
            "nepenthe.checkpoint.rank",
            pairs.iter().map(|p| p.rank as u32).collect::<Vec<_>>(),
        );
        let mut file = GgufWriter::new(path, meta);
        for (i, (p, m)) in pairs.iter().zip(self.moments.chunks_exact(2)).enumerate() {
            let before = self
                .before
                .as_ref()
                .map_or(&[][..], |b| &b[2 * i..2 * i + 2]);
            for (name, values) in BEFORE.iter().zip(before) {
                let name = format!("{}.{name}", p.tensor.name);
                file.tensor_from_bytes(
                    &name,
                    &[values.len() as u64],
                    GgmlType::F32,
                    bytemuck::cast_slice(values),
                )?;
            }
            let (a0, b0): (&[f32], &[f32]) = p.initial.as_ref().map_or((&[], &[]), |(a, b)| (a, b));
            let parts: [&[f32]; 9] = [
                &p.a, &p.b, a0, b0, &p.basis, &m[0].m, &m[0].v, &m[1].m, &m[1].v,
            ];
            for (name, values) in PARTS.iter().zip(parts) {
                if !values.is_empty() {
                    let name = format!("{}.{name}", p.tensor.name);
                    let ne = [values.len() as u64];
                    file.tensor_from_bytes(
                        &name,
                        &ne,
                        GgmlType::F32,
                        bytemuck::cast_slice(values),
                    )?;
                }
            }
        }
        file.save(true)?;
        Ok(())
    }

    /// Read `path` for the run `identity` on a model with these `adaptable` tensors.
    ///
    /// # Errors
    /// A file that is no checkpoint, of another run, or malformed.
    pub fn open(path: &Path, identity: &Identity, adaptable: &[Adaptable]) -> Result<Self, Error> {
        let gguf = Gguf::open(path)?;
        let meta = gguf.metadata();
        let kind = meta.get_opt::<&str>("general.type")?.unwrap_or("a model");
        let format = meta.get_opt::<u32>("nepenthe.checkpoint.format")?;
        if kind != KIND || format != Some(FORMAT) {
            return Err(CheckpointError::Kind {
                path: path.to_owned(),
                found: format
                    .filter(|_| kind == KIND)
                    .map_or(kind.to_owned(), |f| f.to_string()),
            }
            .into());
        }
        let found: Identity = read_json(path, meta, "nepenthe.checkpoint.identity")?;
        same_run(path, identity, &found)?;
        let names: Vec<&str> = meta.get("nepenthe.checkpoint.tensor")?;
        let ranks: Vec<u32> = meta.get("nepenthe.checkpoint.rank")?;
        if names.len() != ranks.len() {
            return Err(content(
                path,
                "key",
                "nepenthe.checkpoint.rank",
                names.len(),
                ranks.len(),
            ));
        }
        let (mut list, mut moments, mut before) = (Vec::new(), Vec::new(), Vec::new());
        for (name, rank) in names.iter().zip(ranks) {
            let Some(index) = adaptable.iter().position(|t| t.name == *name) else {
                return Err(content(
                    path,
                    "tensor",
                    name,
                    "an adaptable tensor of the model",
                    "none",
                ));
            };
            let tensor = adaptable[index].clone();
            let rank = rank as usize;
            let part = |suffix: &str, wanted: Option<usize>| {
                read_part(&gguf, &format!("{name}.{suffix}"), wanted)
            };
            let (n_a, n_b) = (Some(tensor.n_in * rank), Some(tensor.n_out * rank));
            let initial = match gguf.tensor(&format!("{name}.a0")) {
                Some(_) => Some((part("a0", n_a)?, part("b0", n_b)?)),
                None => None,
            };
            let basis = match gguf.tensor(&format!("{name}.basis")) {
                Some(_) => part("basis", None)?,
                None => Vec::new(),
            };
            if !basis.len().is_multiple_of(tensor.n_out) {
                let wanted = format!("a multiple of {}", tensor.n_out);
                return Err(content(path, "basis of", name, wanted, basis.len()));
            }
            for (suffix, n) in [("a", n_a), ("b", n_b)] {
                moments.push(Moments {
                    m: part(&format!("m.{suffix}"), n)?,
                    v: part(&format!("v.{suffix}"), n)?,
                });
            }
            if gguf.tensor(&format!("{name}.{}", BEFORE[0])).is_some() {
                before.push(part(BEFORE[0], n_a)?);
                before.push(part(BEFORE[1], n_b)?);
            }
            list.push(Pair {
                index,
                rank,
                a: part("a", n_a)?,
                b: part("b", n_b)?,
                initial,
                basis,
                tensor,
            });
        }
        let moments_len = moments.len();
        Ok(Self {
            identity: found,
            pairs: Pairs {
                list,
                scale: meta.get("nepenthe.checkpoint.scale")?,
                beneath: Vec::new(),
            },
            moments,
            step: meta.get("nepenthe.checkpoint.step")?,
            state: read_json(path, meta, "nepenthe.checkpoint.state")?,
            before: (!before.is_empty() && before.len() == moments_len).then_some(before),
        })
    }
}

fn same_run(path: &Path, wanted: &Identity, found: &Identity) -> Result<(), Error> {
    let other = |what, wanted: String, found: String| -> Result<(), Error> {
        Err(CheckpointError::Other {
            path: path.to_owned(),
            what,
            wanted,
            found,
        }
        .into())
    };
    if wanted.base != found.base {
        return other("model", wanted.base.short(), found.base.short());
    }
    if wanted.data != found.data {
        return other(
            "forget or retain set",
            wanted.data.short(),
            found.data.short(),
        );
    }
    if wanted.config != found.config {
        return other(
            "configuration",
            wanted.config.to_string(),
            found.config.to_string(),
        );
    }
    Ok(())
}

fn read_json<T: DeserializeOwned>(
    path: &Path,
    meta: &Metadata,
    key: &'static str,
) -> Result<T, Error> {
    let text: &str = meta.get(key)?;
    serde_json::from_str(text).map_err(|e| content(path, "key", key, "its JSON", e))
}

fn read_part(gguf: &Gguf, name: &str, wanted: Option<usize>) -> Result<Vec<f32>, Error> {
    let info = gguf.require(name)?;
    let n = info.n_elements() as usize;
    if info.ty != GgmlType::F32 || wanted.is_some_and(|w| w != n) {
        let wanted = wanted.map_or("F32 values".into(), |w| format!("{w} F32 values"));
        return Err(content(
            gguf.path(),
            "tensor",
            name,
            wanted,
            format!("{n} of {}", info.ty.name()),
        ));
    }
    let bytes = gguf.read_tensor(name)?;
    let floats = bytes.as_chunks::<4>().0;
    Ok(floats.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

fn content(
    path: &Path,
    what: &'static str,
    name: &str,
    wanted: impl ToString,
    found: impl ToString,
) -> Error {
    CheckpointError::Content {
        path: path.to_owned(),
        what,
        name: name.to_owned(),
        wanted: wanted.to_string(),
        found: found.to_string(),
    }
    .into()
}
