//! Builds GGUF files byte by byte, so that tests can put anything anywhere. Shares no code with
//! the writer under test.

use std::path::PathBuf;

use nepenthe::gguf::{Gguf, GgufError};

/// Little-endian bytes of a header under construction.
#[derive(Clone, Default)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub fn u32(self, n: u32) -> Self {
        self.raw(&n.to_le_bytes())
    }

    pub fn u64(self, n: u64) -> Self {
        self.raw(&n.to_le_bytes())
    }

    pub fn string(self, s: &[u8]) -> Self {
        self.u64(s.len() as u64).raw(s)
    }

    /// `GGUF`, version 3, the two counts.
    pub fn header(n_tensors: u64, n_entries: u64) -> Self {
        Self::default()
            .raw(b"GGUF")
            .u32(3)
            .u64(n_tensors)
            .u64(n_entries)
    }

    /// A tensor record.
    pub fn record(self, name: &str, ne: &[u64], ty: u32, offset: u64) -> Self {
        let mut b = self.string(name.as_bytes()).u32(ne.len() as u32);
        for &n in ne {
            b = b.u64(n);
        }
        b.u32(ty).u64(offset)
    }

    /// Zeros up to a multiple of 32, then `n` bytes of data.
    pub fn data(mut self, n: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32), 0);
        self.0.extend((0..n).map(|i| i as u8));
        self
    }

    /// Writes the bytes to a file and opens that. The directory must outlive the result.
    pub fn open_in(&self, dir: &tempfile::TempDir) -> Result<Gguf, GgufError> {
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, &self.0).unwrap();
        Gguf::open(path)
    }

    /// The error that opening these bytes gives.
    pub fn error(&self) -> GgufError {
        let dir = tempfile::tempdir().unwrap();
        let error = self.open_in(&dir).expect_err("the file is hostile");
        let message = error.to_string();
        let path = dir.path().join("model.gguf");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        assert!(!message.ends_with('.'), "{message}");
        error
    }
}

/// A valid file: two keys, tensors `a` (f32 [8, 2]) and `b` (q8_0 [32]), data to its last byte.
pub fn small() -> Bytes {
    Bytes::header(2, 2)
        .string(b"general.architecture")
        .u32(8)
        .string(b"llama")
        .string(b"tokens")
        .u32(9)
        .u32(8)
        .u64(2)
        .string(b"\xff\xfe")
        .string(b"")
        .record("a", &[8, 2], 0, 0)
        .record("b", &[32], 8, 64)
        .data(64 + 34)
}

/// A tensor record file around one record whose fields are given.
pub fn one_record(ne: &[u64], ty: u32, offset: u64) -> Bytes {
    Bytes::header(1, 0).record("a", ne, ty, offset).data(64)
}

/// A file with one key `k`, whose type and value bytes are given, and room after it.
pub fn one_value(ty: u32, value: &[u8]) -> Bytes {
    Bytes::header(0, 1)
        .string(b"k")
        .u32(ty)
        .raw(value)
        .raw(&[0; 64])
}

/// Real models to try, if they are there.
pub fn real_model() -> Option<PathBuf> {
    let path = PathBuf::from("/work/shared/models/stories260k/stories260K-f32.gguf");
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}
