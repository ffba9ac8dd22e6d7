//! Merged files written, tried, undone in advance, and put in their place.
//!
//! In, the model and a writer for each new part; out, the parts under their final names and,
//! if asked for, the undo file. Nothing outside the staging directory changes before every part
//! is on disk, accepted, and the undo file has been proved.

use super::undo::{self, About, UndoSize};
use crate::atomic::AtomicError;
use crate::error::Error;
use crate::gguf::{Gguf, GgufSet, GgufWriter};
use crate::patch::merged::merged;
use crate::replace::{Mode, Staging, part_paths, prev_of};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Where the merged model goes.
#[derive(Debug, Clone, Copy)]
pub enum To<'a> {
    /// A new file, or the parts of one ([`part_paths`]).
    File(&'a Path),
    /// Over the model itself, which is kept as `.prev`.
    InPlace,
}

/// The undo file to write, and over what.
#[derive(Debug, Clone, Copy)]
pub struct Delivery<'a> {
    /// Where the merged model goes.
    pub to: To<'a>,
    /// Where the undo file goes.
    pub undo: Option<&'a Path>,
    /// Replace existing files.
    pub force: bool,
}

impl Delivery<'_> {
    /// The directory the merged `model` goes to, where there is room for it.
    pub fn dir(&self, model: &Path) -> PathBuf {
        let target = match self.to {
            To::File(out) => out,
            To::InPlace => model,
        };
        match target.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        }
    }
}

/// What stands where.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Delivered {
    /// The merged parts.
    pub files: Vec<PathBuf>,
    /// Their sizes added up, bytes.
    pub file_len: u64,
    /// The replaced parts.
    pub prev: Vec<PathBuf>,
    /// What the undo file holds.
    pub undo: Option<UndoSize>,
}

/// Write `files`, made from `model`, as `how` says. `accept` gets the first staged part, which
/// opens as the whole model, and may refuse it.
///
/// # Errors
/// An existing file without force, a failing disk, what `accept` refuses: then nothing has
/// changed but for an undo file written before a commit that failed.
pub fn deliver(
    model: &GgufSet,
    files: Vec<GgufWriter<'_>>,
    how: Delivery<'_>,
    accept: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<Delivered, Error> {
    let (targets, mode) = match how.to {
        To::File(out) => (part_paths(out, files.len()), Mode::New { force: how.force }),
        To::InPlace => {
            let parts = model.parts().iter();
            let paths = parts.map(|p| p.path().to_owned()).take(files.len());
            (paths.collect::<Vec<_>>(), Mode::InPlace)
        }
    };
    // Asked now, not after the hours that a large merge takes.
    if let Some(path) = how.undo.filter(|p| !how.force && p.exists()) {
        return Err(AtomicError::Exists {
            path: path.to_owned(),
        }
        .into());
    }
    let mut staging = Staging::new(targets.clone(), mode)?;
    let mut file_len = 0;
    for (no, file) in files.into_iter().enumerate() {
        file_len += staging.write(no, |out| Ok(file.write_to(out)?))?;
    }
    accept(&staging.path(0))?;
    let undo = match how.undo {
        None => None,
        Some(path) => {
            let staged = (0..targets.len()).map(|no| Gguf::open(staging.path(no)));
            let staged: Vec<Gguf> = staged.collect::<Result<_, _>>()?;
            let about = about(model.parts(), &staged)?;
            let size = undo::write(model.parts(), &staged, &about, path, how.force)?;
            Some(size)
        }
    };
    staging.commit()?;
    Ok(Delivered {
        prev: match mode {
            Mode::InPlace => targets.iter().map(|t| prev_of(t)).collect(),
            Mode::New { .. } => Vec::new(),
        },
        files: targets,
        file_len,
        undo,
    })
}

/// Names, and the patches that `staged` holds and `original` does not.
fn about(original: &[Gguf], staged: &[Gguf]) -> Result<About, Error> {
    let name = |part: &Gguf| {
        let name = part.path().file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    let old = merged(&original[0])?;
    let new = merged(&staged[0])?;
    Ok(About {
        original: name(&original[0]),
        merged: name(&staged[0]),
        patches: new.into_iter().skip(old.len()).map(|m| m.name).collect(),
    })
}

/// Rebuild at `back` what `undo_path` leads from `model` to; the written parts.
///
/// # Errors
/// A model other than the one the undo file was made for, a damaged undo file, an existing
/// `back` unless `force`, a failing disk.
pub fn revert(
    model: &GgufSet,
    undo_path: &Path,
    back: &Path,
    force: bool,
) -> Result<Vec<PathBuf>, Error> {
    let undo = undo::Undo::open(undo_path)?;
    undo.check(model.parts())?;
    let opened = model.parts().iter().map(|p| undo::open(p.path()));
    let merged: Vec<std::fs::File> = opened.collect::<Result<_, _>>()?;
    let targets = part_paths(back, undo.original().len());
    let mut staging = Staging::new(targets.clone(), Mode::New { force })?;
    let mut restore = undo.start(&merged)?;
    for no in 0..targets.len() {
        staging.write(no, |out| Ok(restore.write_part(out)?))?;
    }
    restore.finish()?;
    staging.commit()?;
    Ok(targets)
}
