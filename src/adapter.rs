//! Patches and adapters made ready for llama.cpp, which does not check all of their fields.

use crate::error::Error;
use crate::ggml::Adapter;
use crate::model::OpenModel;
use crate::patch::Patch;
use crate::patch::peft::is_peft;
use std::path::Path;
use std::sync::Arc;

/// Loaded adapters with their scales.
pub type Loaded = Vec<(Arc<Adapter>, f32)>;

/// Check every adapter against the model, then load it. The scales are the user's. What PEFT
/// saved goes through a temporary file in llama.cpp's form.
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
            if !is_peft(path) {
                return Ok((Arc::new(Adapter::load(&open.model, path)?), scale));
            }
            let dir = tempfile::tempdir().map_err(|source| Error::Io {
                path: std::env::temp_dir(),
                doing: "making a temporary directory",
                source,
            })?;
            let converted = dir.path().join("adapter.gguf");
            patch.save(&converted, false)?;
            Ok((Arc::new(Adapter::load(&open.model, &converted)?), scale))
        })
        .collect()
}
