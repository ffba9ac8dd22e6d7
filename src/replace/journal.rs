//! The journal of a commit: which staged files go where, so that it can be finished by another
//! process.

use super::error::failed;
use super::prev::keep;
use super::{FileDigest, ReplaceError, exists, lock, parent, put, remove, staging_dir, sync_dir};
use crate::digest::of_file;
use crate::fault::point;
use crate::gguf::SplitName;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

const FORMAT: u32 = 1;
const NAME: &str = "journal";
/// A part takes some 150 bytes and there are at most 65,535.
const MAX_BYTES: u64 = 32 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Journal {
    format: u32,
    /// Whether replaced files are kept as `.prev`.
    keep_prev: bool,
    parts: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// File name of the target and of the staged file.
    name: String,
    #[serde(flatten)]
    id: FileDigest,
}

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join(NAME)
}

impl Journal {
    pub fn new<'a>(keep_prev: bool, parts: impl Iterator<Item = (&'a Path, FileDigest)>) -> Self {
        let entry = |(path, id): (&Path, FileDigest)| Entry {
            name: path
                .file_name()
                .expect("targets have names")
                .to_string_lossy()
                .into_owned(),
            id,
        };
        Self {
            format: FORMAT,
            keep_prev,
            parts: parts.map(entry).collect(),
        }
    }

    /// Its name appears once its bytes are on disk.
    pub fn write(&self, dir: &Path) -> Result<(), ReplaceError> {
        let bytes = serde_json::to_vec_pretty(self).expect("plain values");
        let (temp, path) = (dir.join("journal.new"), path(dir));
        point();
        let mut file = File::create(&temp).map_err(failed(&temp, "creating"))?;
        point();
        file.write_all(&bytes).map_err(failed(&temp, "writing"))?;
        point();
        file.sync_all().map_err(failed(&temp, "syncing to disk"))?;
        point();
        fs::rename(&temp, &path).map_err(failed(&path, "renaming into place"))?;
        sync_dir(dir)
    }

    fn read(dir: &Path) -> Result<Self, ReplaceError> {
        let path = path(dir);
        let len = fs::metadata(&path).map_err(failed(&path, "opening"))?.len();
        let bad = |problem: String| ReplaceError::Journal {
            path: path.clone(),
            problem,
        };
        if len > MAX_BYTES {
            return Err(bad(format!(
                "wanted at most {MAX_BYTES} bytes, found {len}"
            )));
        }
        let bytes = fs::read(&path).map_err(failed(&path, "reading"))?;
        let journal: Self =
            serde_json::from_slice(&bytes).map_err(|e| bad(format!("wanted a journal: {e}")))?;
        if journal.format != FORMAT {
            return Err(bad(format!(
                "wanted journal format {FORMAT}, found {}",
                journal.format
            )));
        }
        for part in &journal.parts {
            // It must not lead out of the directory.
            if Path::new(&part.name).file_name() != Some(part.name.as_ref()) {
                return Err(bad(format!("wanted a file name, found {:?}", part.name)));
            }
        }
        Ok(journal)
    }
}

/// Carry the journal out; may be repeated from any point. A staged file that is gone is in its
/// place already. `trusted`: the staged files were read back by this process.
pub(super) fn complete(dir: &Path, journal: &Journal, trusted: bool) -> Result<(), ReplaceError> {
    let home = parent(dir).to_owned();
    let mut staged = Vec::new();
    for part in &journal.parts {
        let (from, to) = (dir.join(&part.name), home.join(&part.name));
        let here = exists(&from);
        if !trusted && !is(if here { &from } else { &to }, part.id) {
            return Err(ReplaceError::Lost {
                path: to,
                wanted: part.id.digest.short(),
            });
        }
        if here {
            staged.push((from, to));
        }
    }
    if journal.keep_prev {
        for (_, to) in &staged {
            keep(to)?;
        }
        // The links must be on disk before the names they were made from are taken over.
        sync_dir(&home)?;
    }
    for (from, to) in &staged {
        put(from, to, false)?;
    }
    sync_dir(&home)?;
    sync_dir(dir)?;
    point();
    let path = path(dir);
    fs::remove_file(&path).map_err(failed(&path, "removing"))?;
    remove(dir)?;
    sync_dir(&home)
}

fn is(path: &Path, id: FileDigest) -> bool {
    fs::metadata(path).is_ok_and(|m| m.len() == id.len)
        && of_file(path).is_ok_and(|digest| digest == id.digest)
}

/// Whether a commit on the split model at `path` (any part) was interrupted: some parts may be
/// new and others old. A single file is one or the other.
///
/// # Errors
/// [`ReplaceError::Pending`].
pub fn pending(path: &Path) -> Result<(), ReplaceError> {
    let dir = staging_dir(path)?;
    if SplitName::parse(path).is_some() && self::path(&dir).exists() {
        return Err(ReplaceError::Pending {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Finish an interrupted commit on the model at `path` (any part); remove what a process that
/// did not get as far left. Whether there was a commit to finish.
///
/// # Errors
/// Another process at work on it, a journal that cannot be read, staged files that are gone.
pub fn settle(path: &Path) -> Result<bool, ReplaceError> {
    let dir = staging_dir(path)?;
    if !dir.is_dir() {
        return Ok(false);
    }
    let _lock = lock(&dir)?;
    if self::path(&dir).exists() {
        complete(&dir, &Journal::read(&dir)?, false)?;
        return Ok(true);
    }
    remove(&dir)?;
    Ok(false)
}
