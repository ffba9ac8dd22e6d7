//! SHA-256 of files and of single tensors.
//!
//! A tensor's digest covers its name, type, shape and bytes, not its offset: a re-split or
//! renamed file keeps the digests of its tensors.

use crate::error::Error;
use crate::gguf::{Gguf, GgufSet};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

const READ_BYTES: usize = 1 << 20;

/// 32 bytes, written as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Reads 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(out))
    }

    /// The first twelve digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl From<Digest> for String {
    fn from(d: Digest) -> Self {
        d.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("wanted 64 hexadecimal digits, found {text:?}"))
    }
}

/// One file's length and digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileDigest {
    /// Bytes.
    pub len: u64,
    /// SHA-256.
    #[serde(rename = "sha256")]
    pub digest: Digest,
}

/// A file as a report names it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileId {
    /// File name without its folder; of a split model, that of the first part.
    pub name: String,
    /// Of the file, or of all parts of a split one in order.
    pub sha256: Digest,
    /// Size of the file, or of all parts.
    pub bytes: u64,
}

impl FileId {
    /// Of any file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::metadata(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            doing: "reading",
            source,
        })?;
        Ok(Self {
            name: file_name(path),
            sha256: of_file(path)?,
            bytes: bytes.len(),
        })
    }

    /// Of a model.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_model(set: &GgufSet) -> Result<Self, Error> {
        Ok(Self {
            name: file_name(set.parts()[0].path()),
            sha256: of_model(set)?,
            bytes: set.parts().iter().map(Gguf::file_len).sum(),
        })
    }
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Of one file.
///
/// # Errors
/// When it cannot be read.
pub fn of_file(path: &Path) -> Result<Digest, Error> {
    let mut hash = Sha256::new();
    add_file(&mut hash, path)?;
    Ok(Digest(hash.finalize().into()))
}

/// Of a model: its file, or all parts of a split one in order.
///
/// # Errors
/// When a file cannot be read.
pub fn of_model(set: &GgufSet) -> Result<Digest, Error> {
    let mut hash = Sha256::new();
    for part in set.parts() {
        add_file(&mut hash, part.path())?;
    }
    Ok(Digest(hash.finalize().into()))
}

fn add_file(hash: &mut Sha256, path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io {
        path: path.to_owned(),
        doing: "reading",
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Of one tensor; `None` when the file has none of that name.
///
/// # Errors
/// When it cannot be read.
pub fn of_tensor(set: &GgufSet, name: &str) -> Result<Option<Digest>, Error> {
    let Some((part, info)) = set.tensor(name) else {
        return Ok(None);
    };
    let mut hash = Sha256::new();
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name.as_bytes());
    hash.update(info.ty.id().to_le_bytes());
    for n in info.ne {
        hash.update(n.to_le_bytes());
    }
    add_tensor(&mut hash, part, name)?;
    Ok(Some(Digest(hash.finalize().into())))
}

fn add_tensor(hash: &mut Sha256, part: &Gguf, name: &str) -> Result<(), Error> {
    let mut reader = part.tensor_reader(name)?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let n = reader.read(&mut buffer).map_err(|source| Error::Io {
            path: part.path().to_owned(),
            doing: "reading",
            source,
        })?;
        if n == 0 {
            return Ok(());
        }
        hash.update(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_back_from_its_text() {
        let digest = Digest(std::array::from_fn(|i| (i * 37) as u8));
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
        assert_eq!(Digest::parse("ab"), None);
        assert_eq!(Digest::parse(&"g".repeat(64)), None);
    }

    #[test]
    fn a_file_has_the_published_digest() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("abc");
        std::fs::write(&path, "abc").expect("room for three bytes");
        // FIPS 180-2, appendix B.1.
        let wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_file(&path).expect("readable").to_string(), wanted);
    }
}
