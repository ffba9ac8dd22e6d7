//! In a build without the feature `peft`: its adapters are refused.

use super::{Patch, PatchError};
use crate::error::Error;
use crate::graph::weights::Weights;
use std::path::Path;

/// Refuse the adapter at `path`.
///
/// # Errors
/// [`PatchError::NoPeft`].
pub fn open(path: &Path, _model: &Weights) -> Result<Patch, Error> {
    let path = path.to_owned();
    Err(PatchError::NoPeft { path }.into())
}
