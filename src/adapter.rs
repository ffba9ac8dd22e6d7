//! Patches and adapters made ready for llama.cpp, which does not check all of their fields.

use crate::error::Error;
use crate::ggml::{Adapter, Model};
use crate::model::OpenModel;
use crate::patch::{Intake, Patch, is_peft};
use crate::trust::PublicKey;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

/// Loaded adapters with their scales.
pub type Loaded = Vec<(Arc<Adapter>, f32)>;

/// Check every adapter against the model, then load it. The scales are the user's.
///
/// # Errors
/// A malformed adapter, one for another model, or llama.cpp's refusal.
pub fn open_adapters<'a>(
    open: &OpenModel,
    specs: impl IntoIterator<Item = (&'a Path, f32)>,
) -> Result<Loaded, Error> {
    specs
        .into_iter()
        .map(|(path, scale)| {
            let patch = Patch::open_any(path, &open.weights)?;
            patch.check_shapes(&open.weights)?;
            patch.check_base(&open.weights)?;
            let adapter = if is_peft(path) {
                load_patch(&open.model, &patch)?
            } else {
                Arc::new(Adapter::load(&open.model, path)?)
            };
            Ok((adapter, scale))
        })
        .collect()
}

/// [`open_adapters`] of files that `key` signed: each is read once, and verified before a byte of
/// it is parsed.
///
/// # Errors
/// As there, and the signature's refusal.
pub fn open_signed<'a>(
    open: &OpenModel,
    specs: impl IntoIterator<Item = (&'a Path, f32)>,
    key: &PublicKey,
) -> Result<Loaded, Error> {
    let scratch = scratch()?;
    specs
        .into_iter()
        .map(|(path, scale)| {
            let intake = Intake::read(path, scratch.path(), u64::MAX, Some(key))?;
            let patch = intake.patch()?;
            patch.check_shapes(&open.weights)?;
            patch.check_base(&open.weights)?;
            Ok((intake.adapter(&open.model)?, scale))
        })
        .collect()
}

fn scratch() -> Result<TempDir, Error> {
    tempfile::tempdir().map_err(|source| Error::Io {
        path: std::env::temp_dir(),
        doing: "making a temporary directory",
        source,
    })
}

/// Load a patch that is in memory, with its factors as they would be stored: llama.cpp reads
/// files alone, so it goes through a temporary one.
///
/// # Errors
/// A full disk, factors outside f16, llama.cpp's refusal.
pub fn load_patch(model: &Model, patch: &Patch) -> Result<Arc<Adapter>, Error> {
    let dir = scratch()?;
    let path = dir.path().join("patch.gguf");
    patch.save(&path, false)?;
    Ok(Arc::new(Adapter::load(model, &path)?))
}
