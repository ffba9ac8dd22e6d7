//! The header of an undo file, checked field by field.

use super::{MAGIC, Undo, UndoError, VERSION, open as open_file};
use crate::digest::{Digest, FileDigest, of_file};
use crate::error::Error;
use crate::gguf::Gguf;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// `split.count` is a u16.
const MAX_PARTS: u64 = u16::MAX as u64;
const MAX_TEXT: u64 = 1 << 20;
/// Size of a file: what fits `off_t`.
const MAX_FILE: u64 = i64::MAX as u64;
/// Deflate yields at most this many bytes for one (zlib's technical notes).
const MAX_INFLATION: u64 = 1032;
const DIGEST_BYTES: u64 = 32;

/// For people: what an undo file lies between.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// File name of the original (its first part).
    pub original: String,
    /// File name of the merged model (its first part).
    pub merged: String,
    /// Names of the patches that are taken back.
    pub patches: Vec<String>,
}

/// All but the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub original: Vec<FileDigest>,
    pub merged: Vec<FileDigest>,
    pub about: About,
}

impl Header {
    pub fn bytes(&self) -> Vec<u8> {
        let text = serde_json::to_vec(&self.about).expect("strings are JSON");
        let mut out = MAGIC.to_vec();
        for n in [self.original.len(), self.merged.len(), text.len()] {
            debug_assert!(n as u64 <= MAX_TEXT);
        }
        out.extend(VERSION.to_le_bytes());
        out.extend((self.original.len() as u32).to_le_bytes());
        out.extend((self.merged.len() as u32).to_le_bytes());
        out.extend((text.len() as u32).to_le_bytes());
        for id in self.original.iter().chain(&self.merged) {
            out.extend(id.len.to_le_bytes());
            out.extend(id.digest.0);
        }
        out.extend(text);
        out
    }
}

pub(super) fn id_of(part: &Gguf) -> Result<FileDigest, Error> {
    Ok(FileDigest {
        len: part.file_len(),
        digest: of_file(part.path())?,
    })
}

/// Reads fields and keeps track of where it is.
struct Fields<'a> {
    path: &'a Path,
    input: BufReader<&'a File>,
    hash: Sha256,
    at: u64,
    len: u64,
}

impl Fields<'_> {
    fn read(&mut self, what: &'static str, out: &mut [u8]) -> Result<(), UndoError> {
        let (wanted, left) = (out.len() as u64, self.len - self.at);
        if wanted > left {
            return Err(UndoError::End {
                path: self.path.to_owned(),
                what,
                offset: self.at,
                wanted,
                left,
            });
        }
        self.input.read_exact(out).map_err(|source| UndoError::Io {
            path: self.path.to_owned(),
            doing: "reading",
            source,
        })?;
        self.hash.update(&*out);
        self.at += wanted;
        Ok(())
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, UndoError> {
        let mut out = [0; 4];
        self.read(what, &mut out)?;
        Ok(u32::from_le_bytes(out))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, UndoError> {
        let mut out = [0; 8];
        self.read(what, &mut out)?;
        Ok(u64::from_le_bytes(out))
    }

    fn count(&mut self, what: &'static str, max: u64) -> Result<u64, UndoError> {
        let offset = self.at;
        let found = u64::from(self.u32(what)?);
        if (1..=max).contains(&found) {
            return Ok(found);
        }
        Err(UndoError::Count {
            path: self.path.to_owned(),
            what,
            offset,
            found,
            max,
        })
    }

    /// No capacity up front: memory grows with the bytes actually read.
    fn ids(&mut self, n: u64, whose: &str) -> Result<Vec<FileDigest>, UndoError> {
        let mut out = Vec::new();
        for i in 0..n {
            let offset = self.at;
            let found = self.u64("the length of a part")?;
            self.at_most(MAX_FILE, found, offset, || {
                format!("part {i} of the {whose}")
            })?;
            let mut digest = [0; 32];
            self.read("the digest of a part", &mut digest)?;
            out.push(FileDigest {
                len: found,
                digest: Digest(digest),
            });
        }
        Ok(out)
    }

    fn at_most(
        &self,
        max: u64,
        found: u64,
        offset: u64,
        what: impl FnOnce() -> String,
    ) -> Result<(), UndoError> {
        if found <= max {
            return Ok(());
        }
        Err(UndoError::Length {
            path: self.path.to_owned(),
            what: what(),
            offset,
            found,
            max,
        })
    }
}

pub(super) fn open(path: &Path) -> Result<Undo, UndoError> {
    let file = open_file(path)?;
    let failed = |source| UndoError::Io {
        path: path.to_owned(),
        doing: "reading",
        source,
    };
    let len = file.metadata().map_err(failed)?.len();
    let mut f = Fields {
        path,
        input: BufReader::new(&file),
        hash: Sha256::new(),
        at: 0,
        len,
    };
    let mut magic = [0; MAGIC.len()];
    f.read("the magic", &mut magic)?;
    if magic != MAGIC {
        return Err(UndoError::Magic {
            path: path.to_owned(),
            found: magic.to_vec(),
        });
    }
    let version = f.u32("the version")?;
    if version != VERSION {
        return Err(UndoError::Version {
            path: path.to_owned(),
            wanted: VERSION,
            found: version,
        });
    }
    let n_original = f.count("parts of the original", MAX_PARTS)?;
    let n_merged = f.count("parts of the merged model", MAX_PARTS)?;
    let text_len = f.count("bytes of text", MAX_TEXT)?;
    let original = f.ids(n_original, "original")?;
    let merged = f.ids(n_merged, "merged model")?;
    let offset = f.at;
    let mut text = vec![0; text_len as usize]; // at most MAX_TEXT
    f.read("the text", &mut text)?;
    let about = serde_json::from_slice(&text).map_err(|e| UndoError::Text {
        path: path.to_owned(),
        offset,
        problem: e.to_string(),
    })?;
    let body_len = f.u64("the length of the body")?;
    let body_at = f.at;
    let wanted = body_at
        .saturating_add(body_len)
        .saturating_add(DIGEST_BYTES);
    if wanted != len {
        return Err(UndoError::FileLength {
            path: path.to_owned(),
            wanted,
            found: len,
        });
    }
    // Every byte of the original is copied from the merged files, once at most, or inflated:
    // a file that promises more would fill the disk and then be refused.
    let total = |ids: &[FileDigest]| ids.iter().fold(0u64, |n, id| n.saturating_add(id.len));
    let max = total(&merged).saturating_add(body_len.saturating_mul(MAX_INFLATION));
    let offset = (MAGIC.len() + 16) as u64;
    f.at_most(max, total(&original), offset, || "the original".into())?;

    let mut left = body_len;
    let mut buffer = vec![0; 1 << 16];
    while left > 0 {
        let n = left.min(buffer.len() as u64) as usize;
        f.read("the body", &mut buffer[..n])?;
        left -= n as u64;
    }
    let found = Digest(f.hash.clone().finalize().into());
    let mut own = [0; DIGEST_BYTES as usize];
    f.read("the digest", &mut own)?;
    if found.0 != own {
        return Err(UndoError::Damaged {
            path: path.to_owned(),
            wanted: Digest(own).short(),
            found: found.short(),
        });
    }
    Ok(Undo {
        path: path.to_owned(),
        header: Header {
            original,
            merged,
            about,
        },
        body_at,
        body_len,
    })
}
