//! Patches on a device: a directory that says which are active, changed atomically.
//!
//! `DIR/index.json` lists them ([`Index`]); `DIR/patches/ID.gguf` are the files, each named by its
//! SHA-256, with their signatures beside them. A change writes the new files first and then
//! replaces the index in one rename: a process killed at any point leaves the old set or the new
//! one, and what it left over is removed by the next change. Changes of several processes wait for
//! each other.
//!
//! Every change adds one to the store's sequence number, a return to an earlier set
//! ([`Store::rollback`]) too, so that whoever follows a store ([`crate::runtime`]) notices one
//! that was put back in any other way. A signature may carry a sequence number of its own: a store
//! then takes no patch whose number is not above every one it has taken, so that an old patch,
//! however well signed, cannot be passed off as new.

mod error;
mod index;
#[cfg(test)]
mod kill_tests;

pub use error::StoreError;
pub use index::{Entry, FORMAT, Index, Past, Stamp};

use crate::atomic::write_atomic;
use crate::digest::of_file;
use crate::error::Error;
use crate::fault::point;
use crate::patch::{Intake, PatchError, PatchId, check_scale};
use crate::trust::{PublicKey, Signature, signature_path};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// How a patch is added.
#[derive(Debug, Clone)]
pub struct Add<'a> {
    /// The scale it applies at.
    pub scale: f32,
    /// It must be signed by this key.
    pub key: Option<&'a PublicKey>,
    /// Take it although its signature's sequence number is not above those before.
    pub allow_older: bool,
}

/// A directory of patches.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// The store in `dir`, made if nothing is there.
    ///
    /// # Errors
    /// A failing disk, an index that cannot be read.
    pub fn create(dir: &Path) -> Result<Self, Error> {
        let store = Self {
            dir: dir.to_owned(),
        };
        let patches = store.patches();
        fs::create_dir_all(&patches).map_err(failed(&patches, "creating"))?;
        let _alone = store.lock()?;
        if !Index::path(dir).exists() {
            Index::empty().write(dir)?;
        }
        Index::read(dir)?;
        Ok(store)
    }

    /// The store in `dir`.
    ///
    /// # Errors
    /// [`StoreError::NoIndex`], an index that cannot be read.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Index::read(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it holds now.
    ///
    /// # Errors
    /// An index that is gone, cannot be read, or is of a newer form.
    pub fn index(&self) -> Result<Index, Error> {
        Index::read(&self.dir)
    }

    /// Differs after every change; none where there is no index.
    pub fn stamp(&self) -> Option<Stamp> {
        Index::stamp(&self.dir)
    }

    /// The file of a patch.
    pub fn path_of(&self, id: PatchId) -> PathBuf {
        self.patches().join(format!("{id}.gguf"))
    }

    /// The active patch that `id`, or the beginning of its id, names.
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, id: &str) -> Result<Entry, Error> {
        let index = self.index()?;
        let mut found = index
            .patches
            .into_iter()
            .filter(|e| !id.is_empty() && e.id.to_string().starts_with(&id.to_ascii_lowercase()));
        let (path, id) = (self.dir.clone(), id.to_owned());
        match (found.next(), found.next()) {
            (Some(entry), None) => Ok(entry),
            (None, _) => Err(StoreError::NoPatch { path, id }.into()),
            (Some(_), Some(_)) => Err(StoreError::Ambiguous { path, id }.into()),
        }
    }

    /// Add the patch at `path`, or give it another scale.
    ///
    /// # Errors
    /// A patch that is malformed, without provenance, not signed by the key, or older than one
    /// taken before; a failing disk. The store is then what it was.
    pub fn add(&self, path: &Path, how: &Add<'_>) -> Result<PatchId, Error> {
        check_scale(how.scale)?;
        let _alone = self.lock()?;
        let mut index = self.index()?;
        let intake = Intake::read(path, &self.patches(), u64::MAX, how.key)?;
        let patch = intake.patch()?;
        if patch.info.is_none() {
            return Err(PatchError::NoProvenance {
                path: path.to_owned(),
            }
            .into());
        }
        let id = intake.id();
        let known = index.patches.iter().position(|e| e.id == id);
        if let Some(signature) = intake.signature()
            && known.is_none()
        {
            let number = signature.sequence();
            if number.unwrap_or(0) <= index.accepted && index.accepted > 0 && !how.allow_older {
                return Err(StoreError::OlderPatch {
                    path: path.to_owned(),
                    seen: index.accepted,
                    found: number.map_or_else(|| "missing".into(), |n| n.to_string()),
                }
                .into());
            }
            index.accepted = index.accepted.max(number.unwrap_or(0));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let entry = Entry {
            id,
            name: name.into_owned(),
            scale: how.scale,
        };
        let mut patches = index.patches.clone();
        match known {
            Some(at) if patches[at] == entry => return Ok(id),
            Some(at) => patches[at] = entry,
            None => patches.push(entry),
        }
        let to = self.path_of(id);
        // Signatures that nobody asked to verify are kept for those who will.
        let unverified = match intake.signature() {
            Some(_) => None,
            None => Signature::beside(path)?,
        };
        if let Some(signature) = intake.signature().or(unverified.as_ref()) {
            let to = signature_path(&to);
            write_atomic(&to, true, |out| {
                let text = signature.text().as_bytes();
                out.write_all(text).map_err(failed(&to, "writing"))
            })?;
        }
        intake.store(&to)?;
        index.advance(patches);
        self.commit(&index)?;
        Ok(id)
    }

    /// Take an active patch out.
    ///
    /// # Errors
    /// [`StoreError::NoPatch`], a failing disk.
    pub fn remove(&self, id: PatchId) -> Result<(), Error> {
        let _alone = self.lock()?;
        let mut index = self.index()?;
        let mut patches = index.patches.clone();
        patches.retain(|e| e.id != id);
        if patches.len() == index.patches.len() {
            return Err(StoreError::NoPatch {
                path: self.dir.clone(),
                id: id.to_string(),
            }
            .into());
        }
        index.advance(patches);
        self.commit(&index)
    }

    /// Go back to the set of `sequence`. Returns the sequence number this has.
    ///
    /// # Errors
    /// [`StoreError::NoSet`], a failing disk.
    pub fn rollback(&self, sequence: u64) -> Result<u64, Error> {
        let _alone = self.lock()?;
        let mut index = self.index()?;
        let past = index.history.iter().find(|p| p.sequence == sequence);
        let Some(past) = past else {
            return Err(StoreError::NoSet {
                path: self.dir.clone(),
                sequence,
            }
            .into());
        };
        index.advance(past.patches.clone());
        self.commit(&index)?;
        Ok(index.sequence)
    }

    /// Whether the file of an active patch is what was added and, with a `key`, signed by it.
    ///
    /// # Errors
    /// [`StoreError::Changed`], the signature's refusal, a file that cannot be read.
    pub fn verify(&self, id: PatchId, key: Option<&PublicKey>) -> Result<(), Error> {
        let path = self.path_of(id);
        if key.is_some() {
            let scratch = tempfile::tempdir().map_err(failed(&std::env::temp_dir(), "creating"))?;
            let intake = Intake::read(&path, scratch.path(), u64::MAX, key)?;
            return same(&path, id, intake.id());
        }
        same(&path, id, PatchId(of_file(&path)?))
    }

    /// Copy an active patch, and its signature if it has one, to `to`.
    ///
    /// # Errors
    /// A file that was changed, an existing one unless `force`, a failing disk.
    pub fn export(&self, id: PatchId, to: &Path, force: bool) -> Result<(), Error> {
        let from = self.path_of(id);
        self.verify(id, None)?;
        copy(&from, to, force)?;
        let signature = signature_path(&from);
        match signature.exists() {
            true => copy(&signature, &signature_path(to), force),
            false => Ok(()),
        }
    }

    fn patches(&self) -> PathBuf {
        self.dir.join("patches")
    }

    /// Held while the store is changed; ends with the process.
    fn lock(&self) -> Result<File, Error> {
        let path = self.dir.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let file = file.map_err(failed(&path, "opening"))?;
        match file.lock() {
            // Some network file systems have no locks: two changes at once are then the user's.
            Err(e) if e.kind() != io::ErrorKind::Unsupported => Err(failed(&path, "locking")(e)),
            _ => Ok(file),
        }
    }

    /// Put `index` in place, then remove the files that no set kept by it names.
    fn commit(&self, index: &Index) -> Result<(), Error> {
        index.write(&self.dir)?;
        let named: HashSet<String> = index.entries().map(|e| e.id.to_string()).collect();
        let dir = self.patches();
        for entry in fs::read_dir(&dir).map_err(failed(&dir, "listing"))? {
            let path = entry.map_err(failed(&dir, "listing"))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if named.contains(name.split('.').next().unwrap_or_default()) {
                continue;
            }
            point();
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&path, "removing")(e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn same(path: &Path, id: PatchId, found: PatchId) -> Result<(), Error> {
    if found == id {
        return Ok(());
    }
    Err(StoreError::Changed {
        path: path.to_owned(),
        wanted: id,
        found,
    }
    .into())
}

fn copy(from: &Path, to: &Path, force: bool) -> Result<(), Error> {
    let mut input = File::open(from).map_err(failed(from, "opening"))?;
    write_atomic(to, force, |mut out: &mut dyn Write| {
        io::copy(&mut input, &mut out).map_err(failed(to, "writing"))?;
        Ok(())
    })
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io {
        path,
        doing,
        source,
    }
}
