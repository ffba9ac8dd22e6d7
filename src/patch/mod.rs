//! The forget patch: a LoRA GGUF that stock llama.cpp loads, with provenance beside it.
//!
//! Tensors per adapted weight: `<weight>.lora_a [n_in, rank]` and `<weight>.lora_b
//! [rank, n_out]`, so that ΔW = scale·B·A. `adapter.lora.alpha` is 0: llama.cpp then takes the
//! user's scale alone, whatever the ranks. The `nepenthe.*` keys say which file the patch fits
//! ([`Base`]), how it was made and what it does ([`Info`]); never a word of what was forgotten.

mod canary;
#[cfg(feature = "merge")]
mod combine;
pub mod delta;
mod error;
mod info;
mod intake;
pub mod merged;
#[cfg(feature = "merge")]
mod overlap;
#[cfg(feature = "peft")]
pub mod peft;
#[cfg(not(feature = "peft"))]
#[path = "no_peft.rs"]
pub mod peft;
mod storage;
#[cfg(feature = "merge")]
mod truncate;

pub use canary::Canary;
#[cfg(feature = "merge")]
pub use combine::{Combined, CombinedTensor, Weighting, combine};
pub use error::PatchError;
pub use info::{Base, FORMAT, Info, TensorInfo};
pub use intake::{Intake, PatchId, check_scale};
#[cfg(feature = "merge")]
pub use overlap::{Angles, Overlap, overlaps};
pub use storage::Storage;
#[cfg(feature = "merge")]
pub use truncate::truncate;

use crate::digest::Digest;
use crate::error::Error;
use crate::ggml::dequantize;
use crate::gguf::{Gguf, GgufWriter, Metadata, Value};
use crate::graph::weights::Weights;
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// One weight's update ΔW = scale·B·A.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// The weight's name in the model.
    pub tensor: String,
    /// Input width.
    pub n_in: usize,
    /// Output width.
    pub n_out: usize,
    /// Rank of the pair.
    pub rank: usize,
    /// The adapter's own scale, alpha / rank; 1 for our patches.
    pub scale: f32,
    /// A [n_in, rank].
    pub lora_a: Vec<f32>,
    /// B [rank, n_out].
    pub lora_b: Vec<f32>,
}

/// A patch, or any LoRA adapter in llama.cpp's form.
#[derive(Debug, Clone, PartialEq)]
pub struct Patch {
    /// Architecture of the models it fits.
    pub arch: String,
    /// Provenance; none for adapters of other programs.
    pub info: Option<Info>,
    /// In file order.
    pub updates: Vec<Update>,
    /// Where it was read from.
    pub path: PathBuf,
}

impl Patch {
    /// A patch of this program.
    pub fn new(arch: &str, info: Info, updates: Vec<Update>) -> Self {
        Self {
            arch: arch.to_owned(),
            info: Some(info),
            updates,
            path: PathBuf::new(),
        }
    }

    /// Write it, factors as f16. Returns the file's size.
    ///
    /// # Errors
    /// An existing `path` unless `force`, a failing disk, a value outside f16.
    pub fn save(&self, path: &Path, force: bool) -> Result<u64, Error> {
        self.save_as(path, force, Storage::F16)
    }

    /// Write it with factors in `storage`. Returns the file's size.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_as(&self, path: &Path, force: bool, storage: Storage) -> Result<u64, Error> {
        let mut meta = Metadata::new();
        meta.set("general.type", "adapter");
        meta.set("general.architecture", self.arch.as_str());
        meta.set("adapter.type", "lora");
        meta.set("adapter.lora.alpha", 0f32);
        if let Some(info) = &self.info {
            info.write(&mut meta);
        }
        let encoded: Result<Vec<_>, Error> = self
            .updates
            .iter()
            .map(|u| storage.encode(u, path))
            .collect();
        let encoded = encoded?;
        let mut file = GgufWriter::new(path, meta);
        for (u, pair) in self.updates.iter().zip(&encoded) {
            for (part, factor) in ["lora_a", "lora_b"].into_iter().zip(pair) {
                let name = format!("{}.{part}", u.tensor);
                file.tensor_from_bytes(&name, &factor.ne, factor.ty, &factor.bytes)?;
            }
        }
        Ok(file.save(force)?)
    }

    /// Read a LoRA adapter in llama.cpp's form; every field is checked, because llama.cpp ends
    /// the process on some bad ones.
    ///
    /// # Errors
    /// A file that is no LoRA adapter, of a newer format, or with bad tensors.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::from_gguf(&Gguf::open(path)?)
    }

    /// [`open`](Self::open) of a file whose header is read.
    ///
    /// # Errors
    /// As there.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, Error> {
        let (path, meta) = (gguf.path(), gguf.metadata());
        let wrong = |key: &'static str, wanted: &'static str, found: &str| PatchError::Kind {
            path: path.to_owned(),
            key,
            wanted,
            found: found.to_owned(),
        };
        let kind = meta.get_opt::<&str>("general.type")?.unwrap_or("model");
        if kind != "adapter" {
            return Err(wrong("general.type", "adapter", kind).into());
        }
        let adapter: &str = meta.get("adapter.type")?;
        if adapter != "lora" {
            return Err(wrong("adapter.type", "lora", adapter).into());
        }
        // llama.cpp ends the process on an alpha of any other type, be it f64.
        let alpha = match meta.value("adapter.lora.alpha") {
            None => 0.0,
            Some(Value::F32(alpha)) => *alpha,
            Some(other) => {
                return Err(wrong("adapter.lora.alpha", "an f32", &other.describe()).into());
            }
        };
        if !alpha.is_finite() {
            return Err(wrong("adapter.lora.alpha", "a finite number", &alpha.to_string()).into());
        }
        let info = Info::read(path, meta)?;
        let mut bases = Vec::new();
        for t in gguf.tensors() {
            let Some(base) = t.name.strip_suffix(".lora_a") else {
                let partner = t
                    .name
                    .strip_suffix(".lora_b")
                    .map(|base| format!("{base}.lora_a"));
                match partner {
                    Some(a) if gguf.tensor(&a).is_some() => continue,
                    Some(a) => {
                        return Err(PatchError::Unpaired {
                            path: path.to_owned(),
                            found: t.name.clone(),
                            wanted: a,
                        }
                        .into());
                    }
                    None => {
                        return Err(PatchError::Stray {
                            path: path.to_owned(),
                            tensor: t.name.clone(),
                        }
                        .into());
                    }
                }
            };
            bases.push(base);
        }
        let updates = bases.par_iter().map(|base| read_update(gguf, base, alpha));
        let updates = updates.collect::<Result<Vec<_>, Error>>()?;
        if updates.is_empty() {
            return Err(PatchError::NoTensors {
                path: path.to_owned(),
            }
            .into());
        }
        Ok(Self {
            arch: meta.get::<&str>("general.architecture")?.to_owned(),
            info,
            updates,
            path: path.to_owned(),
        })
    }

    /// Read an adapter of either kind: a GGUF, or what PEFT saves ([`is_peft`]).
    ///
    /// # Errors
    /// As [`open`](Self::open) or [`peft::open`].
    pub fn open_any(path: &Path, model: &Weights) -> Result<Self, Error> {
        if is_peft(path) {
            peft::open(path, model)
        } else {
            Self::open(path)
        }
    }

    /// Whether architecture and every shape fit `model`.
    ///
    /// # Errors
    /// [`PatchError::Arch`], [`PatchError::NoSuchTensor`] or [`PatchError::Misfit`].
    pub fn check_shapes(&self, model: &Weights) -> Result<(), Error> {
        let arch = model.arch()?;
        if arch != self.arch {
            return Err(PatchError::Arch {
                path: self.path.clone(),
                wanted: arch.to_owned(),
                found: self.arch.clone(),
            }
            .into());
        }
        for u in &self.updates {
            let Some((_, t)) = model.set().tensor(&u.tensor) else {
                return Err(PatchError::NoSuchTensor {
                    path: self.path.clone(),
                    tensor: u.tensor.clone(),
                }
                .into());
            };
            if t.ne != [u.n_in as u64, u.n_out as u64, 1, 1] {
                return Err(PatchError::Misfit {
                    path: self.path.clone(),
                    tensor: u.tensor.clone(),
                    wanted: t.dims().to_vec(),
                    found: [u.n_in, u.n_out],
                    base: self.info.as_ref().map(|i| i.base.name.clone()),
                }
                .into());
            }
        }
        Ok(())
    }

    /// Whether the patch was made for `model`: the whole file's digest, or else those of all
    /// adapted tensors. Adapters without provenance pass.
    ///
    /// # Errors
    /// [`PatchError::Base`].
    pub fn check_base(&self, model: &Weights) -> Result<(), Error> {
        let Some(info) = &self.info else {
            return Ok(());
        };
        // The tensors alone first: cheaper than the file, and enough. What a merge left out fits
        // its merged file alone and names no tensors.
        let mut differ = info.tensors.is_empty().then(|| "the file".to_owned());
        let found = info
            .tensors
            .par_iter()
            .map(|t| model.tensor_digest(&t.name));
        let found = found.collect::<Result<Vec<_>, Error>>()?;
        let mut tensors = info.tensors.iter().zip(found);
        if let Some((t, _)) = tensors.find(|(t, found)| *found != Some(t.digest)) {
            differ = Some(t.name.clone());
        }
        let Some(tensor) = differ else {
            return Ok(());
        };
        let found = model.digest()?;
        if found == info.base.digest {
            return Ok(());
        }
        Err(PatchError::Base {
            path: self.path.clone(),
            base: info.base.name.clone(),
            wanted: info.base.digest.short(),
            found: found.short(),
            tensor,
        }
        .into())
    }
}

/// Whether `path` is a PEFT adapter by its form: a directory, or a `.safetensors` file.
pub fn is_peft(path: &Path) -> bool {
    path.is_dir() || path.extension().is_some_and(|e| e == "safetensors")
}

fn read_update(gguf: &Gguf, base: &str, alpha: f32) -> Result<Update, Error> {
    let path = gguf.path();
    let names = [format!("{base}.lora_a"), format!("{base}.lora_b")];
    let Some(b) = gguf.tensor(&names[1]) else {
        return Err(PatchError::Unpaired {
            path: path.to_owned(),
            found: names[0].clone(),
            wanted: names[1].clone(),
        }
        .into());
    };
    let a = gguf.require(&names[0])?;
    let matrix = |t: &crate::gguf::TensorInfo| t.ne[2] == 1 && t.ne[3] == 1;
    if !matrix(a) || !matrix(b) || a.ne[1] != b.ne[0] {
        return Err(PatchError::Shape {
            path: path.to_owned(),
            tensor: base.to_owned(),
            wanted: "lora_a [n_in, rank] and lora_b [rank, n_out]".into(),
            found: format!("{:?} and {:?}", a.dims(), b.dims()),
        }
        .into());
    }
    let decode = |name: &String, t: &crate::gguf::TensorInfo| -> Result<Vec<f32>, Error> {
        let mut out = vec![0f32; t.n_elements() as usize];
        dequantize(t.ty.id(), &gguf.read_tensor(name)?, &mut out)?;
        match out.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(PatchError::NotFinite {
                path: path.to_owned(),
                tensor: name.clone(),
                at,
            }
            .into()),
            None => Ok(out),
        }
    };
    let rank = a.ne[1] as usize;
    Ok(Update {
        tensor: base.to_owned(),
        n_in: a.ne[0] as usize,
        n_out: b.ne[1] as usize,
        rank,
        scale: if alpha == 0.0 {
            1.0
        } else {
            alpha / rank as f32
        },
        lora_a: decode(&names[0], a)?,
        lora_b: decode(&names[1], b)?,
    })
}

/// What a patch made now for `model` says of its base.
///
/// # Errors
/// When the file cannot be read.
pub fn base_of(model: &Weights) -> Result<Base, Error> {
    let set = model.set();
    let name = set.parts()[0].path().file_name();
    Ok(Base {
        digest: model.digest()?,
        name: name.map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
    })
}

/// The digest of a tensor that is known to be there.
///
/// # Errors
/// When the file cannot be read.
pub fn digest_of(model: &Weights, tensor: &str) -> Result<Digest, Error> {
    model.info(tensor)?;
    Ok(model.tensor_digest(tensor)?.expect("looked up above"))
}
