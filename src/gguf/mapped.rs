//! Read-only memory mapping of a checked GGUF file.

use std::path::Path;

use memmap2::Mmap;

use crate::gguf::{Gguf, GgufError};

/// A [`Gguf`] with its file mapped, so that tensor data is a slice.
///
/// If another process truncates the file meanwhile, touching the lost pages kills this process
/// (SIGBUS). Code that must survive that reads with [`Gguf::read_tensor`].
#[derive(Debug)]
pub struct MappedGguf {
    gguf: Gguf,
    map: Mmap,
}

impl MappedGguf {
    /// Opens, checks and maps `path`.
    ///
    /// # Errors
    /// As [`Gguf::open`], [`GgufError::FileChanged`], or [`GgufError::Io`] if mapping fails.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        Self::new(Gguf::open(path)?)
    }

    /// Maps a file that is open already.
    ///
    /// # Errors
    /// [`GgufError::FileChanged`], or [`GgufError::Io`] if mapping fails.
    pub fn new(gguf: Gguf) -> Result<Self, GgufError> {
        // SAFETY: `Mmap::map` asks that the file not change while it is mapped. This crate never
        // writes to a model in place (`atomic` renames a new file over the old name, which
        // leaves a mapped one as it was), and the map is private to this struct, read-only, and
        // only ever seen as bytes, for which every bit pattern is valid.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(gguf.file()) };
        let map = map.map_err(|source| GgufError::Io {
            path: gguf.path().to_owned(),
            doing: "mapping",
            source,
        })?;
        // tensor ranges were checked against the length seen when the file was opened
        if (map.len() as u64) < gguf.file_len() {
            return Err(GgufError::FileChanged {
                path: gguf.path().to_owned(),
                expected: gguf.file_len(),
                actual: map.len() as u64,
            });
        }
        Ok(Self { gguf, map })
    }

    /// The checked file.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The whole file, as mapped.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Give the pages read so far back to the system; what is touched again is read again. A
    /// system that cannot do so keeps them.
    pub fn release(&self) {
        #[cfg(unix)]
        {
            // SAFETY: dropping pages loses what was written to them; this map is read-only and of
            // a file, so that the next access finds the same bytes.
            #[allow(unsafe_code)]
            let advised = unsafe {
                self.map
                    .unchecked_advise(memmap2::UncheckedAdvice::DontNeed)
            };
            drop(advised);
        }
    }

    /// The data of the tensor called `name`; starts at a multiple of 8 bytes in memory.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`].
    pub fn tensor_bytes(&self, name: &str) -> Result<&[u8], GgufError> {
        let info = self.gguf.require(name)?;
        // in range: the reader has checked every tensor against the length checked in `new`
        let start = info.absolute_offset(self.gguf.data_offset()) as usize;
        Ok(&self.map[start..start + info.n_bytes as usize])
    }
}
