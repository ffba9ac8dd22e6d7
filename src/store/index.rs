//! The index of a store: which patches are active, and which were.

use super::StoreError;
use crate::atomic::write_atomic;
use crate::error::Error;
use crate::patch::PatchId;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Form of the index.
pub const FORMAT: u32 = 1;
/// Earlier sets kept, to go back to.
const KEPT_SETS: usize = 8;
/// Largest index read, bytes: a hundred thousand patches.
const MAX_BYTES: u64 = 32 << 20;

/// A patch of the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its id.
    pub id: PatchId,
    /// File name it was added under.
    pub name: String,
    /// The scale it applies at.
    pub scale: f32,
}

/// An earlier set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Past {
    /// When it was.
    pub sequence: u64,
    /// What was active.
    pub patches: Vec<Entry>,
}

/// What a store holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// [`FORMAT`].
    pub format: u32,
    /// Changes so far; every change, a rollback too, adds one.
    pub sequence: u64,
    /// Largest sequence number of a signature accepted so far.
    pub accepted: u64,
    /// Active patches.
    pub patches: Vec<Entry>,
    /// The sets before, oldest first.
    pub history: Vec<Past>,
}

/// By which a changed index is noticed without reading it: every change is a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    modified: (i64, i64),
    bytes: u64,
}

impl Index {
    pub(super) fn path(dir: &Path) -> PathBuf {
        dir.join("index.json")
    }

    pub(super) fn empty() -> Self {
        Self {
            format: FORMAT,
            sequence: 0,
            accepted: 0,
            patches: Vec::new(),
            history: Vec::new(),
        }
    }

    pub(super) fn stamp(dir: &Path) -> Option<Stamp> {
        let about = fs::metadata(Self::path(dir)).ok()?;
        Some(Stamp {
            inode: about.ino(),
            modified: (about.mtime(), about.mtime_nsec()),
            bytes: about.len(),
        })
    }

    pub(super) fn read(dir: &Path) -> Result<Self, Error> {
        let path = Self::path(dir);
        if !path.is_file() {
            return Err(StoreError::NoIndex {
                path: dir.to_owned(),
            }
            .into());
        }
        let mut text = String::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_BYTES).read_to_string(&mut text))
            .map_err(|source| Error::Io {
                path: path.clone(),
                doing: "reading",
                source,
            })?;
        let bad = |e: serde_json::Error| StoreError::Index {
            path: path.clone(),
            problem: e.to_string(),
        };
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        // A newer form may have other fields, so its number is read first.
        let head: Head = serde_json::from_str(&text).map_err(bad)?;
        if head.format > FORMAT {
            return Err(StoreError::Format {
                path,
                wanted: FORMAT,
                found: head.format,
            }
            .into());
        }
        let index: Self = serde_json::from_str(&text).map_err(bad)?;
        if let Some(e) = index
            .entries()
            .find(|e| !e.scale.is_finite() || e.scale == 0.0)
        {
            let problem = format!("the scale of {} is {}", e.id, e.scale);
            return Err(StoreError::Index { path, problem }.into());
        }
        Ok(index)
    }

    /// The set becomes `patches`, and the one before is kept to go back to.
    pub(super) fn advance(&mut self, patches: Vec<Entry>) {
        let before = std::mem::replace(&mut self.patches, patches);
        self.history.push(Past {
            sequence: self.sequence,
            patches: before,
        });
        let old = self.history.len().saturating_sub(KEPT_SETS);
        self.history.drain(..old);
        self.sequence += 1;
    }

    /// Put it in place: from then on it is the store's.
    pub(super) fn write(&self, dir: &Path) -> Result<(), Error> {
        let path = Self::path(dir);
        let text = serde_json::to_string_pretty(self).expect("plain values");
        write_atomic(&path, true, |out| {
            out.write_all(text.as_bytes()).map_err(|source| Error::Io {
                path: path.clone(),
                doing: "writing",
                source,
            })
        })
    }

    /// Patches of this set and of those it can go back to.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        let past = self.history.iter().flat_map(|p| &p.patches);
        self.patches.iter().chain(past)
    }
}
