//! A patch file on its way in: read once, hashed and (where a key is required) verified as it is
//! read, and parsed only then.
//!
//! Whoever can write to the file may change it between a check and a use. What is parsed here, and
//! what llama.cpp loads, is therefore a private copy of the very bytes that were verified.

use super::{Patch, PatchError};
use crate::atomic::write_atomic;
use crate::digest::Digest;
use crate::error::Error;
use crate::ggml::{Adapter, Model};
use crate::gguf::{Gguf, GgufError};
use crate::trust::{PublicKey, Signature};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use tempfile::NamedTempFile;

const READ_BYTES: usize = 1 << 20;

/// A patch's name wherever it lies: the SHA-256 of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct PatchId(pub Digest);

impl fmt::Display for PatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for PatchId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Digest::try_from(text.to_owned()).map(Self)
    }
}

/// Bytes of a patch, taken in; the copy is removed with it.
pub struct Intake {
    id: PatchId,
    n_bytes: u64,
    path: PathBuf,
    copy: NamedTempFile,
    signature: Option<Signature>,
}

impl Intake {
    /// Copy the file at `path` into the directory `into`. With a `key`, the signature beside the
    /// file must be its.
    ///
    /// # Errors
    /// No regular file, one of more than `max_bytes`, one that `key` did not sign, a failing disk.
    pub fn read(
        path: &Path,
        into: &Path,
        max_bytes: u64,
        key: Option<&PublicKey>,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Io {
            path: into.to_owned(),
            doing: "making a copy",
            source,
        };
        let unreadable = |doing| {
            move |source| GgufError::Io {
                path: path.to_owned(),
                doing,
                source,
            }
        };
        // Asked before opening, since opening a FIFO would wait for its other end.
        let about = fs::metadata(path).map_err(unreadable("opening"))?;
        if !about.is_file() {
            return Err(GgufError::NotAFile {
                path: path.to_owned(),
            }
            .into());
        }
        let signature = key.map(|_| Signature::required(path)).transpose()?;
        let mut verifier = match (key, &signature) {
            (Some(key), Some(signature)) => Some(key.verifier(signature, path)?),
            _ => None,
        };
        let mut input = File::open(path).map_err(unreadable("opening"))?;
        let mut copy = NamedTempFile::new_in(into).map_err(failed)?;
        let mut hash = Sha256::new();
        let mut n_bytes = 0;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let n = input.read(&mut buffer).map_err(unreadable("reading"))?;
            if n == 0 {
                break;
            }
            n_bytes += n as u64;
            if n_bytes > max_bytes {
                return Err(PatchError::TooLarge {
                    path: path.to_owned(),
                    wanted: max_bytes,
                    found: about.len().max(n_bytes),
                }
                .into());
            }
            hash.update(&buffer[..n]);
            if let Some(verifier) = &mut verifier {
                verifier.update(&buffer[..n]);
            }
            copy.write_all(&buffer[..n]).map_err(failed)?;
        }
        verifier.map_or(Ok(()), |v| v.finish())?;
        Ok(Self {
            id: PatchId(Digest(hash.finalize().into())),
            n_bytes,
            path: path.to_owned(),
            copy,
            signature,
        })
    }

    /// Its id.
    pub fn id(&self) -> PatchId {
        self.id
    }

    /// How many they are.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Where they were read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The signature that was verified; none when no key was required.
    pub fn signature(&self) -> Option<&Signature> {
        self.signature.as_ref()
    }

    /// Parse them.
    ///
    /// # Errors
    /// As [`Patch::open`]; errors name the original file.
    pub fn patch(&self) -> Result<Patch, Error> {
        Patch::from_gguf(&Gguf::from_file(self.reopen()?, &self.path)?)
    }

    /// Write them to `to`, in the place of what is there.
    ///
    /// # Errors
    /// A failing disk.
    pub fn store(&self, to: &Path) -> Result<(), Error> {
        let mut copy = self.reopen()?;
        write_atomic(to, true, |mut out: &mut dyn Write| {
            io::copy(&mut copy, &mut out).map_err(|source| Error::Io {
                path: to.to_owned(),
                doing: "writing",
                source,
            })?;
            Ok(())
        })
    }

    fn reopen(&self) -> Result<File, Error> {
        self.copy.reopen().map_err(|source| Error::Io {
            path: self.copy.path().to_owned(),
            doing: "opening",
            source,
        })
    }

    /// Have llama.cpp load them; the caller has checked the [`patch`](Self::patch) against `model`.
    ///
    /// # Errors
    /// llama.cpp's refusal.
    pub fn adapter(&self, model: &Model) -> Result<Arc<Adapter>, Error> {
        Ok(Arc::new(Adapter::load(model, self.copy.path())?))
    }
}

/// Whether a patch can apply at `scale`: at 0 it would silently not.
///
/// # Errors
/// A scale that is 0 or no number.
pub fn check_scale(scale: f32) -> Result<(), Error> {
    if scale.is_finite() && scale != 0.0 {
        return Ok(());
    }
    Err(Error::Setting {
        setting: "scale",
        wanted: "a finite number other than 0".into(),
        found: scale.to_string(),
    })
}

impl fmt::Debug for Intake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intake")
            .field("path", &self.path)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
