//! What a file says of the patches merged into it: the `nepenthe.merged.*` keys.

use crate::digest::{Digest, of_file, of_model};
use crate::error::Error;
use crate::gguf::{Gguf, GgufError, Metadata};
use crate::graph::weights::Weights;
use crate::patch::{Patch, PatchError};
use serde::Serialize;

/// File names of the merged patches, oldest first.
pub const KEY_NAMES: &str = "nepenthe.merged.name";
/// Their digests.
pub const KEY_DIGESTS: &str = "nepenthe.merged.sha256";
/// The scales they were merged at.
pub const KEY_SCALES: &str = "nepenthe.merged.scale";
/// Digest of the model before the first merge.
pub const KEY_BASE: &str = "nepenthe.merged.base";

/// One patch that a file contains.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Merged {
    /// File name of the patch.
    pub name: String,
    /// Its digest.
    pub sha256: String,
    /// The scale it was merged at.
    pub scale: f32,
}

/// The patches merged into `file` (the first part of a split one), oldest first.
///
/// # Errors
/// Keys of other types, or lists of different lengths.
pub fn merged(file: &Gguf) -> Result<Vec<Merged>, GgufError> {
    let meta = file.metadata();
    let names: Vec<String> = meta.get_opt(KEY_NAMES)?.unwrap_or_default();
    let digests: Vec<String> = meta.get_opt(KEY_DIGESTS)?.unwrap_or_default();
    let scales: Vec<f32> = meta.get_opt(KEY_SCALES)?.unwrap_or_default();
    for (key, n) in [(KEY_DIGESTS, digests.len()), (KEY_SCALES, scales.len())] {
        if n != names.len() {
            return Err(GgufError::WrongType {
                path: file.path().to_owned(),
                key: key.to_owned(),
                wanted: "as many entries as nepenthe.merged.name",
                found: format!("{n} for {} names", names.len()),
            });
        }
    }
    let entries = names.into_iter().zip(digests).zip(scales);
    Ok(entries
        .map(|((name, sha256), scale)| Merged {
            name,
            sha256,
            scale,
        })
        .collect())
}

/// Write down in `meta` what was merged; refuse a patch that is in the file already.
///
/// # Errors
/// [`PatchError::Merged`].
pub fn record(model: &Weights, patches: &[(Patch, f32)], meta: &mut Metadata) -> Result<(), Error> {
    let first = &model.set().parts()[0];
    let mut list = merged(first)?;
    for (patch, scale) in patches {
        let digest: Digest = of_file(&patch.path)?;
        let sha256 = digest.to_string();
        if list.iter().any(|m| m.sha256 == sha256) {
            return Err(PatchError::Merged {
                path: patch.path.clone(),
                model: first.path().to_owned(),
            }
            .into());
        }
        let name = patch.path.file_name().unwrap_or_default();
        list.push(Merged {
            name: name.to_string_lossy().into_owned(),
            sha256,
            scale: *scale,
        });
    }
    if meta.value(KEY_BASE).is_none() {
        meta.set(KEY_BASE, of_model(model.set())?.to_string());
    }
    let of = |f: fn(&Merged) -> String| list.iter().map(f).collect::<Vec<String>>();
    meta.set(KEY_NAMES, of(|m| m.name.clone()));
    meta.set(KEY_DIGESTS, of(|m| m.sha256.clone()));
    meta.set(
        KEY_SCALES,
        list.iter().map(|m| m.scale).collect::<Vec<f32>>(),
    );
    Ok(())
}
