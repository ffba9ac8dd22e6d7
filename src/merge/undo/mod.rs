//! Undo files: what takes a merged model back to the file it was made from, byte for byte.
//!
//! In, the parts of the original and of the merged model; out, a sparse reverse delta. Every
//! byte of the original is either a copy of merged bytes, a copy plus a sparse difference, or
//! spelled out (tensors whose type changed, metadata that only the original has).
//!
//! File, little-endian: magic, version u32, parts of the original u32, parts of the merged
//! model u32, length of the text u32; per part, original first, its length u64 and SHA-256; the
//! text (JSON, for people: names and the patches taken back); length of the body u64; the body
//! (zlib; `blocks.rs` has its form); SHA-256 of all that.

pub(crate) mod blocks;
mod decode;
mod encode;
mod error;
mod header;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;

pub use crate::digest::FileDigest;
pub use error::{BodyError, Mismatch, UndoError};
pub use header::About;

use crate::atomic::write_atomic_verified;
use crate::error::Error;
use crate::gguf::Gguf;
use crate::patch::merged::KEY_NAMES;
use header::Header;
use serde::Serialize;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// First bytes of an undo file.
pub const MAGIC: [u8; 8] = *b"nepUNDO\n";
/// The version written and read.
pub const VERSION: u32 = 1;

/// What an undo file holds, in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct UndoSize {
    /// Bytes of the original that equal the merged bytes beside them.
    pub same: u64,
    /// Bytes kept as a difference.
    pub changed: u64,
    /// Bytes spelled out.
    pub spelled: u64,
    /// Size of the undo file.
    pub file_len: u64,
}

/// Write to `path` what turns `merged` back into `original`, and prove it: the file is read
/// back and the original's digests rebuilt from it before it gets its name.
///
/// `about` names the two for people; file names of `merged` may be temporary ones.
///
/// # Errors
/// An existing `path` unless `force`, a failing disk, or a file that changes meanwhile.
pub fn write(
    original: &[Gguf],
    merged: &[Gguf],
    about: &About,
    path: &Path,
    force: bool,
) -> Result<UndoSize, Error> {
    let ids = |parts: &[Gguf]| parts.iter().map(header::id_of).collect::<Result<_, _>>();
    let header = Header {
        original: ids(original)?,
        merged: ids(merged)?,
        about: about.clone(),
    };
    write_atomic_verified(
        path,
        force,
        |out| encode::write(&header, original, merged, path, out),
        |temp, _| {
            let undo = Undo::open(temp)?;
            let files = merged.iter().map(|part| open(part.path()));
            let files: Vec<File> = files.collect::<Result<_, _>>()?;
            let mut restore = undo.start(&files)?;
            for _ in original {
                restore.write_part(&mut io::sink())?;
            }
            restore.finish()?;
            Ok(())
        },
    )
}

/// An undo file whose header and digest have been checked.
#[derive(Debug)]
pub struct Undo {
    path: PathBuf,
    header: Header,
    body_at: u64,
    body_len: u64,
}

impl Undo {
    /// Read the header and check the file's own digest.
    ///
    /// # Errors
    /// One [`UndoError`] variant per field that can be wrong.
    pub fn open(path: &Path) -> Result<Self, UndoError> {
        header::open(path)
    }

    /// Parts of the original, in order.
    pub fn original(&self) -> &[FileDigest] {
        &self.header.original
    }

    /// Parts of the merged model it applies to, in order.
    pub fn merged(&self) -> &[FileDigest] {
        &self.header.merged
    }

    /// What the two files were called and which patches lie between them.
    pub fn about(&self) -> &About {
        &self.header.about
    }

    /// Whether `parts` are the merged model this file was made for.
    ///
    /// # Errors
    /// [`UndoError::Original`] when they are what it leads back to, [`UndoError::Other`] for
    /// any other model.
    pub fn check(&self, parts: &[Gguf]) -> Result<(), Error> {
        let found: Vec<FileDigest> = parts.iter().map(header::id_of).collect::<Result<_, _>>()?;
        if found == self.header.merged {
            return Ok(());
        }
        let path = self.path.clone();
        let model = parts[0].path().to_owned();
        if found == self.header.original {
            return Err(UndoError::Original { path, model }.into());
        }
        // Of the first part that differs, or of the whole when their number does.
        let mut pairs = self.header.merged.iter().zip(&found);
        let differ = pairs.clone().find(|(a, b)| a != b).or(pairs.next_back());
        let (wanted, found_id) = differ.expect("both have a part: neither may be empty");
        let last: Option<Vec<String>> = parts[0].metadata().get_opt(KEY_NAMES)?;
        Err(UndoError::Other(Box::new(Mismatch {
            path,
            model,
            name: self.header.about.merged.clone(),
            wanted: wanted.digest.short(),
            n_wanted: self.header.merged.len(),
            takes_back: self.header.about.patches.join(", "),
            found: found_id.digest.short(),
            n_found: found.len(),
            last: last.and_then(|names| names.last().cloned()),
        }))
        .into())
    }

    /// Start rebuilding the original from the `merged` files, which must be those that
    /// [`check`](Self::check) accepts.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn start<'a>(&'a self, merged: &'a [File]) -> Result<Restore<'a>, UndoError> {
        Ok(Restore(decode::Decoder::new(self, merged)?))
    }
}

/// Rebuilds the parts of the original one after the other.
pub struct Restore<'a>(decode::Decoder<'a>);

impl Restore<'_> {
    /// Write the next part to `out` and check its digest.
    ///
    /// # Errors
    /// A damaged body, a failing disk, a result other than the original.
    pub fn write_part(&mut self, out: &mut dyn Write) -> Result<FileDigest, UndoError> {
        self.0.write_part(out)
    }

    /// Check that nothing is left; the size of what was read.
    ///
    /// # Errors
    /// A body that goes on.
    pub fn finish(self) -> Result<UndoSize, UndoError> {
        self.0.finish()
    }
}

pub(crate) fn open(path: &Path) -> Result<File, UndoError> {
    File::open(path).map_err(|source| UndoError::Io {
        path: path.to_owned(),
        doing: "opening",
        source,
    })
}
