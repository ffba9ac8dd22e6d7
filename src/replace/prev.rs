//! The file that was replaced, kept as `NAME.prev`.

use super::error::failed;
use super::{Mode, ReplaceError, Staging, exists, parent, siblings, sync_dir};
use crate::error::Error;
use crate::fault::point;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where the file replaced at `target` is kept.
pub fn prev_of(target: &Path) -> PathBuf {
    let mut path = target.as_os_str().to_owned();
    path.push(".prev");
    path.into()
}

/// Make `NAME.prev` the file now at `target`, in place of an older one.
pub(super) fn keep(target: &Path) -> Result<(), ReplaceError> {
    let prev = prev_of(target);
    let same = |a: &Path, b: &Path| match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    };
    // Done before the process was killed. Renaming one link over another of the same file does
    // nothing and would leave both.
    if same(target, &prev) {
        return Ok(());
    }
    let mut temp = prev.clone().into_os_string();
    temp.push(".new");
    let temp = PathBuf::from(temp);
    if exists(&temp) {
        point();
        fs::remove_file(&temp).map_err(failed(&temp, "removing"))?;
    }
    link_or_copy(target, &temp)?;
    point();
    fs::rename(&temp, &prev).map_err(failed(&prev, "renaming into place"))
}

/// A second name for `from`, or where there are none a synced copy.
pub(super) fn link_or_copy(from: &Path, to: &Path) -> Result<(), ReplaceError> {
    point();
    match fs::hard_link(from, to) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(failed(to, "linking")(e));
        }
        Err(_) => {} // the copy says what is wrong, if something is
    }
    fs::copy(from, to).map_err(failed(to, "copying"))?;
    point();
    File::open(to)
        .and_then(|f| f.sync_all())
        .map_err(failed(to, "syncing to disk"))
}

/// Remove the `.prev` files of the model at `path` (any part): the new one is good. What was
/// removed.
///
/// # Errors
/// A failing disk.
pub fn confirm(path: &Path) -> Result<Vec<PathBuf>, ReplaceError> {
    let mut removed = Vec::new();
    for part in siblings(path) {
        let prev = prev_of(&part);
        if exists(&prev) {
            point();
            fs::remove_file(&prev).map_err(failed(&prev, "removing"))?;
            removed.push(prev);
        }
    }
    if !removed.is_empty() {
        sync_dir(parent(path))?;
    }
    Ok(removed)
}

/// Put the `.prev` files of the model at `path` (any part) back in its place, all or none. What
/// was put back.
///
/// # Errors
/// A part without `.prev`, a failing disk.
pub fn restore(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let parts = siblings(path);
    for prev in parts.iter().map(|part| prev_of(part)) {
        if !exists(&prev) {
            return Err(ReplaceError::NoPrev { path: prev }.into());
        }
    }
    let mut staging = Staging::new(parts.clone(), Mode::InPlace)?;
    for (no, part) in parts.iter().enumerate() {
        staging.adopt(no, &prev_of(part))?;
    }
    staging.commit_keeping(false)?;
    confirm(path)?;
    Ok(parts)
}
