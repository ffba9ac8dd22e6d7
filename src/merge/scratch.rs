//! New tensor bytes, out of memory until the file is written.

use crate::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// An unnamed temporary file.
#[derive(Debug)]
pub(super) struct Scratch {
    dir: PathBuf,
    file: File,
    len: u64,
}

impl Scratch {
    /// In `dir`, which should be where the output goes: `/tmp` may be memory.
    pub fn new(dir: &Path) -> Result<Self, Error> {
        let file = tempfile::tempfile_in(dir).map_err(|source| Error::Io {
            path: dir.to_owned(),
            doing: "making a temporary file",
            source,
        })?;
        Ok(Self {
            dir: dir.to_owned(),
            file,
            len: 0,
        })
    }

    /// Append `bytes`; where they are: offset and length.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(u64, u64), Error> {
        let at = self.len;
        self.file
            .write_all_at(bytes, at)
            .map_err(|source| Error::Io {
                path: self.dir.clone(),
                doing: "writing a temporary file",
                source,
            })?;
        self.len += bytes.len() as u64;
        Ok((at, bytes.len() as u64))
    }

    /// The `len` bytes at offset `at`.
    pub fn read(&self, (at, len): (u64, u64)) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len as usize];
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(|source| Error::Io {
                path: self.dir.clone(),
                doing: "reading a temporary file",
                source,
            })?;
        Ok(bytes)
    }

    /// Copy `len` bytes from offset `at` to `out`.
    pub fn copy(&self, (at, len): (u64, u64), out: &mut dyn Write) -> std::io::Result<()> {
        let mut buffer = vec![0; COPY_BYTES.min(len) as usize];
        let mut done = 0;
        while done < len {
            let n = COPY_BYTES.min(len - done) as usize;
            self.file.read_exact_at(&mut buffer[..n], at + done)?;
            out.write_all(&buffer[..n])?;
            done += n as u64;
        }
        Ok(())
    }
}
