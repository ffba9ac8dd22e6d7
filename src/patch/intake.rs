//! A patch file on its way in: read once, hashed and (where a key is required) verified as it is
//! read, and parsed only then.
//!
//! Whoever can write to the file may change it between a check and a use. What is parsed here, and
//! what llama.cpp loads, is therefore a private copy of the very bytes that were verified.

use super::{Patch, PatchError};
use crate::digest::Digest;
use crate::error::Error;
use crate::ggml::{Adapter, Model};
use crate::gguf::{Gguf, GgufError};
use crate::trust::{PublicKey, Signature};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::NamedTempFile;

const READ_BYTES: usize = 1 << 20;

/// Bytes of a patch, taken in; the copy is removed with it.
pub struct Intake {
    digest: Digest,
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
        let failed = |path: &Path, doing| {
            let path = path.to_owned();
            move |source| Error::Io {
                path,
                doing,
                source,
            }
        };
        // Asked before opening, since opening a FIFO would wait for its other end.
        let about = fs::metadata(path).map_err(failed(path, "opening"))?;
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
        let mut input = File::open(path).map_err(failed(path, "opening"))?;
        let mut copy = NamedTempFile::new_in(into).map_err(failed(into, "making a copy"))?;
        let mut hash = Sha256::new();
        let mut n_bytes = 0;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let n = input.read(&mut buffer).map_err(failed(path, "reading"))?;
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
            copy.write_all(&buffer[..n])
                .map_err(failed(into, "making a copy"))?;
        }
        verifier.map_or(Ok(()), |v| v.finish())?;
        Ok(Self {
            digest: Digest(hash.finalize().into()),
            n_bytes,
            path: path.to_owned(),
            copy,
            signature,
        })
    }

    /// SHA-256 of the bytes.
    pub fn digest(&self) -> Digest {
        self.digest
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
        let copy = self.copy.reopen().map_err(|source| Error::Io {
            path: self.copy.path().to_owned(),
            doing: "opening",
            source,
        })?;
        Patch::from_gguf(&Gguf::from_file(copy, &self.path)?)
    }

    /// Have llama.cpp load them; the caller has checked the [`patch`](Self::patch) against `model`.
    ///
    /// # Errors
    /// llama.cpp's refusal.
    pub fn adapter(&self, model: &Model) -> Result<Arc<Adapter>, Error> {
        Ok(Arc::new(Adapter::load(model, self.copy.path())?))
    }
}

impl std::fmt::Debug for Intake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Intake")
            .field("path", &self.path)
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}
