//! Sketched moments left beside a patch by whoever made it, so that a device with the model and
//! the patch alone can merge.

use super::moments::{MomentsConfig, Sources, capture};
use super::sketch::{SketchConfig, companion, save, sketch};
use crate::adapter::open_adapters;
use crate::digest::of_file;
use crate::error::Error;
use crate::model::OpenModel;
use crate::patch::Patch;
use std::path::{Path, PathBuf};

/// Tokens of each set behind a sketch: it holds far fewer directions than that.
const MAX_TOKENS: usize = 2048;

/// Write the sketch that belongs to the patch at `path`: where it is, and its size.
///
/// # Errors
/// An existing file unless `force`, failures of engine and disk.
pub fn leave_sketch(
    open: &OpenModel,
    path: &Path,
    sources: &Sources<'_>,
    n_threads: usize,
    force: bool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(PathBuf, u64), Error> {
    let adapters = open_adapters(open, [(path, 1.0)])?;
    let updates = Patch::open(path)?.updates;
    let tensors: Vec<String> = updates.into_iter().map(|u| u.tensor).collect();
    let config = MomentsConfig {
        max_tokens: MAX_TOKENS,
        ..MomentsConfig::default()
    };
    let captured = capture(
        open, &adapters, &tensors, sources, &config, n_threads, progress,
    )?;
    let sketches = sketch(&captured, &SketchConfig::default())?;
    let out = companion(path);
    let size = save(&out, &sketches, &[of_file(path)?], force)?;
    Ok((out, size))
}
