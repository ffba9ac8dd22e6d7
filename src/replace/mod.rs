//! New files in the place of others, all parts of a model or none.
//!
//! Order: a hidden directory `.NAME.staging` beside the target, in it every part under its own
//! name (so that a split model can be opened and tried there), each synced and read back; then
//! the journal, synced; then the parts are renamed into place. Until the journal has its name
//! nothing outside the directory has changed; from then on every step can be repeated, and
//! [`settle`] finishes what a killed process began. A single new file needs no journal: one
//! rename puts it in place.
//!
//! With [`Mode::InPlace`] the file replaced stays as `NAME.prev`, a hard link where the file
//! system has them, until [`confirm`] removes it, [`restore`] brings it back, or the next merge
//! is committed. A replaced file is never written to: a server may have it mapped.

mod error;
mod journal;
#[cfg(test)]
mod kill_tests;
mod prev;

pub use error::ReplaceError;
pub use journal::{pending, settle};
pub use prev::{confirm, prev_of, restore};

use crate::digest::{Digest, FileDigest, of_file};
use crate::error::Error;
use crate::fault::point;
use crate::gguf::SplitName;
use error::failed;
use journal::{Journal, complete};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File, Metadata, Permissions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const BUFFER_BYTES: usize = 1 << 20;

/// Where new files go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// To free names, or over whatever is there.
    New {
        /// Replace existing files.
        force: bool,
    },
    /// Over the model they were made from, which is kept as `.prev`.
    InPlace,
}

/// The files of `count` parts when the user names `out`: `out` itself, any part's name of such a
/// split, or else names made from `out` less its `.gguf`.
pub fn part_paths(out: &Path, count: usize) -> Vec<PathBuf> {
    if count == 1 {
        return vec![out.to_owned()];
    }
    let count = count as u32; // split.count is a u16
    let name = SplitName::parse(out)
        .filter(|name| name.count == count)
        .unwrap_or_else(|| SplitName {
            prefix: match out.extension() {
                Some(e) if e == "gguf" => out.with_extension(""),
                _ => out.to_owned(),
            },
            no: 0,
            count,
        });
    (0..count).map(|no| name.path_of(no)).collect()
}

/// All parts that the name of one of them tells of; `path` alone for any other name.
fn siblings(path: &Path) -> Vec<PathBuf> {
    match SplitName::parse(path) {
        Some(name) => (0..name.count).map(|no| name.path_of(no)).collect(),
        None => vec![path.to_owned()],
    }
}

/// The staging directory of a model, given any of its parts.
fn staging_dir(path: &Path) -> Result<PathBuf, ReplaceError> {
    let first = match SplitName::parse(path) {
        Some(name) => name.path_of(0),
        None => path.to_owned(),
    };
    let Some(name) = first.file_name() else {
        return Err(ReplaceError::NoFileName {
            path: path.to_owned(),
        });
    };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".staging");
    Ok(parent(&first).join(hidden))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn sync_dir(dir: &Path) -> Result<(), ReplaceError> {
    point();
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(failed(dir, "syncing the directory"))
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// The parts of one model on their way to their names. Dropped before [`commit`](Self::commit),
/// it takes everything back.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    /// Held for its lock, which ends with the process.
    _lock: File,
    targets: Vec<PathBuf>,
    staged: Vec<Option<FileDigest>>,
    mode: Mode,
    /// Nothing to take back: the journal, or the target, is there.
    committed: bool,
}

impl Staging {
    /// Prepare to write `targets`, all in one directory.
    ///
    /// # Errors
    /// A target that exists ([`Mode::New`] without force), that does not or is a symbolic link
    /// ([`Mode::InPlace`]); another process at work on them; an interrupted commit that
    /// [`settle`] must finish first.
    pub fn new(targets: Vec<PathBuf>, mode: Mode) -> Result<Self, ReplaceError> {
        for target in &targets {
            check_target(target, mode)?;
        }
        let dir = staging_dir(&targets[0])?;
        let lock = lock(&dir)?;
        if journal::path(&dir).exists() {
            return Err(ReplaceError::Pending { path: dir });
        }
        clear(&dir)?;
        Ok(Self {
            dir,
            _lock: lock,
            staged: vec![None; targets.len()],
            targets,
            mode,
            committed: false,
        })
    }

    /// Where part `no` stands until the commit. Its name is the target's: opening it opens all
    /// staged parts.
    pub fn path(&self, no: usize) -> PathBuf {
        let name = self.targets[no].file_name();
        self.dir.join(name.expect("checked in new"))
    }

    /// Write part `no`, sync it, read it back.
    ///
    /// # Errors
    /// What `write` fails with, a failing disk, bytes that read back differently.
    pub fn write<T>(
        &mut self,
        no: usize,
        write: impl FnOnce(&mut dyn Write) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let path = self.path(no);
        point();
        let file = File::create_new(&path).map_err(failed(&path, "creating"))?;
        // A replaced file keeps its mode.
        if let Some(old) = fs::symlink_metadata(&self.targets[no])
            .ok()
            .filter(Metadata::is_file)
        {
            let mode = Permissions::from_mode(old.permissions().mode() & 0o777);
            file.set_permissions(mode)
                .map_err(failed(&path, "setting the mode"))?;
        }
        let mut out = Output {
            inner: BufWriter::with_capacity(BUFFER_BYTES, Killable(&file)),
            hash: Sha256::new(),
            len: 0,
        };
        let value = write(&mut out)?;
        out.flush().map_err(failed(&path, "writing"))?;
        let id = FileDigest {
            len: out.len,
            digest: Digest(out.hash.clone().finalize().into()),
        };
        point();
        file.sync_all().map_err(failed(&path, "syncing to disk"))?;
        let found = of_file(&path)?;
        if found != id.digest {
            return Err(ReplaceError::ReadBack {
                path,
                wanted: id.digest.short(),
                found: found.short(),
            }
            .into());
        }
        self.staged[no] = Some(id);
        Ok(value)
    }

    /// Take `from`, which is not written to again, as part `no`: a hard link, or a copy.
    fn adopt(&mut self, no: usize, from: &Path) -> Result<(), Error> {
        let path = self.path(no);
        prev::link_or_copy(from, &path)?;
        self.staged[no] = Some(FileDigest {
            len: fs::metadata(&path)
                .map_err(failed(&path, "asking for its size"))?
                .len(),
            digest: of_file(&path)?,
        });
        Ok(())
    }

    /// Put every part in its place. An error after the journal was written leaves the rest to
    /// [`settle`].
    ///
    /// # Errors
    /// A target taken meanwhile, a failing disk.
    ///
    /// # Panics
    /// When a part was not written.
    pub fn commit(self) -> Result<(), ReplaceError> {
        let keep = self.mode == Mode::InPlace;
        self.commit_keeping(keep)
    }

    fn commit_keeping(mut self, keep_prev: bool) -> Result<(), ReplaceError> {
        for target in &self.targets {
            check_target(target, self.mode)?;
        }
        sync_dir(&self.dir)?;
        let dir = parent(&self.dir).to_owned();
        sync_dir(&dir)?;
        if self.targets.len() == 1 && !keep_prev {
            let (from, to) = (self.path(0), &self.targets[0]);
            put(&from, to, self.mode == Mode::New { force: false })?;
            self.committed = true;
            sync_dir(&dir)?;
            return remove(&self.dir);
        }
        let parts = self.targets.iter().zip(&self.staged);
        let journal = Journal::new(
            keep_prev,
            parts.map(|(target, id)| (target.as_path(), id.expect("every part is written"))),
        );
        // Once the rename inside has happened this is committed, whatever it returns.
        self.committed = true;
        journal.write(&self.dir)?;
        complete(&self.dir, &journal, true)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing more can be done about a disk that refuses; the next run tries again.
            let _ = remove(&self.dir);
        }
    }
}

fn check_target(target: &Path, mode: Mode) -> Result<(), ReplaceError> {
    let path = || target.to_owned();
    match (mode, fs::symlink_metadata(target)) {
        (Mode::InPlace, Ok(m)) if m.is_symlink() => Err(ReplaceError::Symlink { path: path() }),
        (Mode::InPlace, Ok(m)) if !m.is_file() => Err(ReplaceError::NotAFile { path: path() }),
        (Mode::InPlace, Err(source)) => Err(failed(target, "opening")(source)),
        (Mode::New { force: false }, Ok(_)) => Err(ReplaceError::Exists { path: path() }),
        (Mode::New { .. }, Ok(m)) if m.is_dir() => Err(ReplaceError::NotAFile { path: path() }),
        _ => Ok(()),
    }
}

/// The staging directory, made if need be, locked by its inode. flock ends with the process, so
/// that a killed one leaves no lock behind.
fn lock(dir: &Path) -> Result<File, ReplaceError> {
    loop {
        point();
        match fs::create_dir(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(dir, "creating")(e));
            }
            _ => {}
        }
        let file = match File::open(dir) {
            // Removed by the process that had it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(failed(dir, "opening"))?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(ReplaceError::Busy {
                    path: dir.to_owned(),
                });
            }
            // Some network file systems have no locks: two merges at once are then the user's.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(failed(dir, "locking")(e)),
        }
        // The lock may be that of a directory that has been removed since it was opened.
        let ours = file.metadata().map_err(failed(dir, "opening"))?.ino();
        match fs::metadata(dir) {
            Ok(m) if m.ino() == ours => return Ok(file),
            _ => {}
        }
    }
}

/// Remove what a killed process left in the staging directory. Unlink, never truncate: a staged
/// part may be a hard link to a `.prev`.
fn clear(dir: &Path) -> Result<(), ReplaceError> {
    let entries = fs::read_dir(dir).map_err(failed(dir, "listing"))?;
    for entry in entries {
        let path = entry.map_err(failed(dir, "listing"))?.path();
        point();
        fs::remove_file(&path).map_err(failed(&path, "removing"))?;
    }
    Ok(())
}

fn remove(dir: &Path) -> Result<(), ReplaceError> {
    clear(dir)?;
    point();
    fs::remove_dir(dir).map_err(failed(dir, "removing"))
}

/// Rename, or (`fresh`) link and unlink, which does not replace what appeared meanwhile.
fn put(from: &Path, to: &Path, fresh: bool) -> Result<(), ReplaceError> {
    point();
    if fresh {
        match fs::hard_link(from, to) {
            Ok(()) => return Ok(()), // the staged name goes with its directory
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(ReplaceError::Exists {
                    path: to.to_owned(),
                });
            }
            Err(_) => {} // no hard links here
        }
    }
    fs::rename(from, to).map_err(failed(to, "renaming into place"))
}

/// Hashes and counts what passes.
struct Output<'a> {
    inner: BufWriter<Killable<'a>>,
    hash: Sha256,
    len: u64,
}

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.len += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A file whose every write is a point at which tests kill the process.
struct Killable<'a>(&'a File);

impl Write for Killable<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        point();
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
