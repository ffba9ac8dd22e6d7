//! Path in, checked [`Gguf`] out: the header is read and validated field by field, tensor data
//! is read with `pread` when asked for.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::gguf::cursor::Cursor;
use crate::gguf::header::{check_layout, read_fixed, read_metadata, read_records};
use crate::gguf::types::pad;
use crate::gguf::{GgufError, Metadata, TensorInfo, VERSION, alignment_of};

/// An open GGUF file whose header has passed every check.
///
/// Every tensor's data lies inside the file and overlaps no other's. Gaps between tensors, a
/// missing padding after the last one, and bytes after the data are accepted.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    version: u32,
    alignment: u64,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    header_len: u64,
    data_offset: u64,
    file_len: u64,
}

impl Gguf {
    /// Opens `path` and reads its header.
    ///
    /// # Errors
    /// One [`GgufError`] variant per field that can be wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let failed = |doing| {
            move |source| GgufError::Io {
                path: path.to_owned(),
                doing,
                source,
            }
        };
        // asked before opening, since opening a FIFO would wait for its other end
        if !fs::metadata(path).map_err(failed("opening"))?.is_file() {
            return Err(GgufError::NotAFile {
                path: path.to_owned(),
            });
        }
        Self::from_file(File::open(path).map_err(failed("opening"))?, path)
    }

    /// Reads the header of an open file; `path` is what errors name.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_file(file: File, path: &Path) -> Result<Self, GgufError> {
        let failed = |doing| {
            move |source| GgufError::Io {
                path: path.to_owned(),
                doing,
                source,
            }
        };
        let file_len = file
            .metadata()
            .map_err(failed("asking for its size"))?
            .len();

        let mut cursor = Cursor::new(path, file_len, BufReader::with_capacity(1 << 16, &file));
        let (version, n_tensors, n_entries) = read_fixed(&mut cursor)?;
        let metadata = read_metadata(&mut cursor, n_entries)?;
        let alignment = alignment_of(path, &metadata)?;
        let (tensors, by_name) = read_records(&mut cursor, n_tensors, alignment)?;
        let header_len = cursor.pos;
        // the header is at most MAX_HEADER_BYTES long
        let data_offset = pad(header_len, alignment).expect("a bounded header cannot overflow");
        check_layout(path, &tensors, alignment, data_offset, file_len)?;

        Ok(Self {
            path: path.to_owned(),
            file,
            version,
            alignment,
            metadata,
            tensors,
            by_name,
            header_len,
            data_offset,
            file_len,
        })
    }

    /// The path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// `general.alignment`, or 32.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Keys and values in file order.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Tensor records in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Header size in bytes, up to the last tensor record and without the padding after it.
    pub fn header_len(&self) -> u64 {
        self.header_len
    }

    /// Where the data section starts. In a file without tensors it may lie past the end.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// File size in bytes when it was opened.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Whether [`GgufWriter`](crate::gguf::GgufWriter) would lay the file out just so: version 3,
    /// tensors end to end in file order, nothing after the last one's padding. If the padding
    /// bytes are zeros too, a copy through it is byte-identical.
    pub fn is_canonical(&self) -> bool {
        let mut at = 0;
        for t in &self.tensors {
            if t.offset != at {
                return false;
            }
            at += t.n_bytes.next_multiple_of(self.alignment);
        }
        self.version == VERSION && self.data_offset + at == self.file_len
    }

    /// The open file, for mapping it.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The record of the tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// As [`tensor`](Self::tensor), with an error that names what is missing.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`].
    pub fn require(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.tensor(name).ok_or_else(|| GgufError::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
        })
    }

    /// All data bytes of the tensor called `name`.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`], [`GgufError::OutOfMemory`], or a failed read.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>, GgufError> {
        let info = self.require(name)?;
        let out_of_memory = || GgufError::OutOfMemory {
            path: self.path.clone(),
            tensor: name.to_owned(),
            wanted: info.n_bytes,
        };
        let n = usize::try_from(info.n_bytes).map_err(|_| out_of_memory())?;
        let mut out = Vec::new();
        out.try_reserve_exact(n).map_err(|_| out_of_memory())?;
        out.resize(n, 0);
        self.read_tensor_at(name, 0, &mut out)?;
        Ok(out)
    }

    /// Fills `out` from byte `start` of the tensor's data.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`], [`GgufError::TensorRange`], or a failed read.
    pub fn read_tensor_at(&self, name: &str, start: u64, out: &mut [u8]) -> Result<(), GgufError> {
        let info = self.require(name)?;
        let wanted = out.len() as u64;
        if start
            .checked_add(wanted)
            .is_none_or(|end| end > info.n_bytes)
        {
            return Err(GgufError::TensorRange {
                path: self.path.clone(),
                tensor: name.to_owned(),
                start,
                wanted,
                n_bytes: info.n_bytes,
            });
        }
        self.read_at(info.absolute_offset(self.data_offset) + start, out)
    }

    /// The tensor's data as a stream, for copying a tensor larger than memory.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`].
    pub fn tensor_reader(&self, name: &str) -> Result<TensorReader<'_>, GgufError> {
        let info = self.require(name)?;
        Ok(TensorReader {
            file: &self.file,
            at: info.absolute_offset(self.data_offset),
            left: info.n_bytes,
        })
    }

    /// Fills `out` from byte `offset` of the file, whatever lies there.
    ///
    /// # Errors
    /// [`GgufError::FileChanged`] if the file has shrunk, [`GgufError::Io`] otherwise.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), GgufError> {
        self.file
            .read_exact_at(out, offset)
            .map_err(|source| match self.file.metadata() {
                Ok(now) if now.len() < self.file_len => GgufError::FileChanged {
                    path: self.path.clone(),
                    expected: self.file_len,
                    actual: now.len(),
                },
                _ => GgufError::Io {
                    path: self.path.clone(),
                    doing: "reading",
                    source,
                },
            })
    }
}

/// Streams one tensor's data; see [`Gguf::tensor_reader`].
#[derive(Debug)]
pub struct TensorReader<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for TensorReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = out
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut out[..n], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}
