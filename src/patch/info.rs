//! A patch's provenance, as `nepenthe.*` keys.

use super::canary::{self, Canary};
use super::error::PatchError;
use crate::digest::Digest;
use crate::error::Error;
use crate::gguf::Metadata;
use serde::Serialize;
use serde_json::Value as Json;
use std::path::Path;

/// Format this program writes.
pub const FORMAT: u32 = 1;

/// The file a patch is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Base {
    /// SHA-256 of the file, or of all parts of a split one in order.
    pub digest: Digest,
    /// File name, for people.
    pub name: String,
}

/// One adapted tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorInfo {
    /// Name in the model.
    pub name: String,
    /// SHA-256 over name, type, shape and bytes.
    pub digest: Digest,
    /// RILA rank r.
    pub rank: u32,
    /// Size k of the retain basis.
    pub retain_rank: u32,
    /// ‖ΔW‖.
    pub norm: f32,
    /// ‖ΔW‖/‖W‖.
    pub relative_norm: f32,
    /// ‖PᵀΔW‖/‖ΔW‖.
    pub retain_fraction: f32,
}

/// Where a patch comes from and what it does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Info {
    /// Format version.
    pub format: u32,
    /// The file it is for.
    pub base: Base,
    /// `reglu`, `lora`, ...
    pub method: String,
    /// All settings.
    pub config: Json,
    /// Seed.
    pub seed: u64,
    /// SHA-256 over salt and forget set; the salt is random, so that a guess of the set can be
    /// confirmed by its owner and not looked up in a table.
    pub forget_hash: Option<Digest>,
    /// The salt.
    pub salt: Option<Digest>,
    /// Records in the forget set.
    pub n_forget: u32,
    /// Records in the retain set.
    pub n_retain: u32,
    /// Steps, why training ended, the unseen level.
    pub training: Json,
    /// Before and after.
    pub metrics: Json,
    /// Program and engine versions.
    pub program: String,
    /// llama.cpp's binding.
    pub engine: String,
    /// Per adapted tensor.
    pub tensors: Vec<TensorInfo>,
    /// By which its effect is seen.
    pub canaries: Vec<Canary>,
}

impl Info {
    /// For a patch made now.
    pub fn new(base: Base, method: &str, config: Json, seed: u64) -> Self {
        Self {
            format: FORMAT,
            base,
            method: method.to_owned(),
            config,
            seed,
            forget_hash: None,
            salt: None,
            n_forget: 0,
            n_retain: 0,
            training: Json::Null,
            metrics: Json::Null,
            program: format!("nepenthe {}", env!("CARGO_PKG_VERSION")),
            engine: format!(
                "{}, ggml {}",
                env!("NEPENTHE_ENGINE"),
                crate::ggml::version()
            ),
            tensors: Vec::new(),
            canaries: Vec::new(),
        }
    }

    pub(super) fn write(&self, meta: &mut Metadata) {
        meta.set("nepenthe.format", self.format);
        meta.set("nepenthe.base.sha256", self.base.digest.to_string());
        meta.set("nepenthe.base.name", self.base.name.as_str());
        meta.set("nepenthe.method", self.method.as_str());
        meta.set("nepenthe.config", self.config.to_string());
        meta.set("nepenthe.seed", self.seed);
        if let (Some(hash), Some(salt)) = (&self.forget_hash, &self.salt) {
            meta.set("nepenthe.forget.sha256", hash.to_string());
            meta.set("nepenthe.forget.salt", salt.to_string());
        }
        meta.set("nepenthe.forget.count", self.n_forget);
        meta.set("nepenthe.retain.count", self.n_retain);
        meta.set("nepenthe.training", self.training.to_string());
        meta.set("nepenthe.metrics", self.metrics.to_string());
        meta.set("nepenthe.program", self.program.as_str());
        meta.set("nepenthe.engine", self.engine.as_str());
        canary::write(&self.canaries, meta);
        let t = &self.tensors;
        meta.set(
            "nepenthe.tensor.name",
            t.iter().map(|t| t.name.clone()).collect::<Vec<_>>(),
        );
        let digests: Vec<String> = t.iter().map(|t| t.digest.to_string()).collect();
        meta.set("nepenthe.tensor.sha256", digests);
        meta.set(
            "nepenthe.tensor.rank",
            t.iter().map(|t| t.rank).collect::<Vec<_>>(),
        );
        meta.set(
            "nepenthe.tensor.retain_rank",
            t.iter().map(|t| t.retain_rank).collect::<Vec<_>>(),
        );
        meta.set(
            "nepenthe.tensor.norm",
            t.iter().map(|t| t.norm).collect::<Vec<_>>(),
        );
        meta.set(
            "nepenthe.tensor.relative_norm",
            t.iter().map(|t| t.relative_norm).collect::<Vec<_>>(),
        );
        meta.set(
            "nepenthe.tensor.retain_fraction",
            t.iter().map(|t| t.retain_fraction).collect::<Vec<_>>(),
        );
    }

    /// `None` for adapters of other programs.
    pub(super) fn read(path: &Path, meta: &Metadata) -> Result<Option<Self>, Error> {
        let Some(format) = meta.get_opt::<u32>("nepenthe.format")? else {
            return Ok(None);
        };
        if format > FORMAT {
            return Err(PatchError::Format {
                path: path.to_owned(),
                wanted: FORMAT,
                found: format,
            }
            .into());
        }
        let bad = |key: &str, problem: String| PatchError::Key {
            path: path.to_owned(),
            key: key.to_owned(),
            problem,
        };
        let digest = |key: &str, text: &str| {
            Digest::parse(text)
                .ok_or_else(|| bad(key, format!("wanted 64 hexadecimal digits, found {text:?}")))
        };
        let optional = |key: &str| -> Result<Option<Digest>, Error> {
            Ok(meta
                .get_opt::<&str>(key)?
                .map(|text| digest(key, text))
                .transpose()?)
        };
        let json = |key: &str| -> Result<Json, Error> {
            let text = meta.get_opt::<&str>(key)?.unwrap_or("null");
            Ok(serde_json::from_str(text).map_err(|e| bad(key, format!("wanted JSON: {e}")))?)
        };
        let text = |key: &str| -> Result<String, Error> {
            Ok(meta.get_opt::<&str>(key)?.unwrap_or_default().to_owned())
        };
        let base_key = "nepenthe.base.sha256";
        Ok(Some(Self {
            format,
            base: Base {
                digest: digest(base_key, meta.get(base_key)?)?,
                name: text("nepenthe.base.name")?,
            },
            method: text("nepenthe.method")?,
            config: json("nepenthe.config")?,
            seed: meta.get_opt("nepenthe.seed")?.unwrap_or(0),
            forget_hash: optional("nepenthe.forget.sha256")?,
            salt: optional("nepenthe.forget.salt")?,
            n_forget: meta.get_opt("nepenthe.forget.count")?.unwrap_or(0),
            n_retain: meta.get_opt("nepenthe.retain.count")?.unwrap_or(0),
            training: json("nepenthe.training")?,
            metrics: json("nepenthe.metrics")?,
            program: text("nepenthe.program")?,
            engine: text("nepenthe.engine")?,
            tensors: read_tensors(path, meta, &digest)?,
            canaries: canary::read(path, meta)?,
        }))
    }
}

fn read_tensors(
    path: &Path,
    meta: &Metadata,
    digest: &dyn Fn(&str, &str) -> Result<Digest, PatchError>,
) -> Result<Vec<TensorInfo>, Error> {
    let names: Vec<String> = meta.get("nepenthe.tensor.name")?;
    let same = |key: &str, found: usize| {
        if found == names.len() {
            return Ok(());
        }
        Err(PatchError::Key {
            path: path.to_owned(),
            key: key.to_owned(),
            problem: format!("wanted {} entries, found {found}", names.len()),
        })
    };
    let sha_key = "nepenthe.tensor.sha256";
    let digests: Vec<&str> = meta.get(sha_key)?;
    same(sha_key, digests.len())?;
    let integers = |key: &str| -> Result<Vec<u32>, Error> {
        let v: Vec<u32> = meta.get(key)?;
        same(key, v.len())?;
        Ok(v)
    };
    let floats = |key: &str| -> Result<Vec<f32>, Error> {
        let v: Vec<f32> = meta.get(key)?;
        same(key, v.len())?;
        Ok(v)
    };
    let (rank, retain_rank) = (
        integers("nepenthe.tensor.rank")?,
        integers("nepenthe.tensor.retain_rank")?,
    );
    let norm = floats("nepenthe.tensor.norm")?;
    let relative_norm = floats("nepenthe.tensor.relative_norm")?;
    let retain_fraction = floats("nepenthe.tensor.retain_fraction")?;
    let mut out = Vec::with_capacity(names.len());
    for (i, name) in names.iter().enumerate() {
        out.push(TensorInfo {
            name: name.clone(),
            digest: digest(sha_key, digests[i])?,
            rank: rank[i],
            retain_rank: retain_rank[i],
            norm: norm[i],
            relative_norm: relative_norm[i],
            retain_fraction: retain_fraction[i],
        });
    }
    Ok(out)
}
