//! Metadata and tensor sources in, a GGUF v3 file out, streamed: only the header is in memory.
//!
//! Tensors are laid end to end in the order they were added, each padded with zeros to the
//! alignment, the last one too, as ggml's own writer does.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::atomic::{same_error, write_atomic};
use crate::gguf::cursor::{check_key_len, text};
use crate::gguf::header::check_name_len;
use crate::gguf::types::{checked_tensor, pad};
use crate::gguf::{
    Array, GgmlType, Gguf, GgufError, MAGIC, MAX_ARRAY_DEPTH, MAX_HEADER_BYTES, Metadata,
    RawString, SourceError, TensorInfo, VERSION, Value, alignment_of,
};

const COPY_BYTES: usize = 1 << 20;

/// Writes a tensor's data to the file when its turn comes.
type Source<'a> = Box<dyn FnOnce(&mut dyn Write) -> Result<(), SourceError> + 'a>;

/// A GGUF file to be written.
pub struct GgufWriter<'a> {
    path: PathBuf,
    metadata: Metadata,
    tensors: Vec<(TensorInfo, Source<'a>)>,
    names: HashSet<String>,
}

impl std::fmt::Debug for GgufWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tensors: Vec<_> = self.tensors.iter().map(|(info, _)| info).collect();
        f.debug_struct("GgufWriter")
            .field("path", &self.path)
            .field("metadata", &self.metadata)
            .field("tensors", &tensors)
            .finish()
    }
}

/// Where everything will lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// All bytes before the data section, padding included.
    pub header: Vec<u8>,
    /// Tensor records with their final offsets.
    pub tensors: Vec<TensorInfo>,
    /// `general.alignment`, or 32.
    pub alignment: u64,
    /// Size of the whole file.
    pub file_len: u64,
}

impl<'a> GgufWriter<'a> {
    /// A file without tensors. `path` is where [`save`](Self::save) puts it and what errors name.
    pub fn new(path: impl AsRef<Path>, metadata: Metadata) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            metadata,
            tensors: Vec::new(),
            names: HashSet::new(),
        }
    }

    /// The metadata that will be written.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }

    /// Adds a tensor of shape `ne` (1 to 4 dimensions, ggml order) whose data `fill` writes when
    /// its turn comes; it must write exactly the bytes that shape and type take.
    ///
    /// # Errors
    /// A bad or repeated name, a bad shape.
    pub fn tensor(
        &mut self,
        name: &str,
        ne: &[u64],
        ty: GgmlType,
        fill: impl FnOnce(&mut dyn Write) -> Result<(), SourceError> + 'a,
    ) -> Result<&mut Self, GgufError> {
        let offset = 0; // of the name; not in a file yet
        check_name_len(&self.path, offset, name.len() as u64)?;
        text(name.into()).map_err(|found| GgufError::TensorNameText {
            path: self.path.clone(),
            offset,
            found,
        })?;
        let info = checked_tensor(&self.path, name, ne, ty)?;
        if !self.names.insert(name.to_owned()) {
            return Err(GgufError::DuplicateTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            });
        }
        self.tensors.push((info, Box::new(fill)));
        Ok(self)
    }

    /// Adds a tensor whose data is all that `input` yields.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn tensor_from_reader(
        &mut self,
        name: &str,
        ne: &[u64],
        ty: GgmlType,
        mut input: impl Read + 'a,
    ) -> Result<&mut Self, GgufError> {
        self.tensor(name, ne, ty, move |out| {
            let mut buffer = vec![0; COPY_BYTES];
            loop {
                match input.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(n) => out.write_all(&buffer[..n])?,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e.into()),
                }
            }
        })
    }

    /// Adds a tensor whose data is in memory.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn tensor_from_bytes(
        &mut self,
        name: &str,
        ne: &[u64],
        ty: GgmlType,
        bytes: &'a [u8],
    ) -> Result<&mut Self, GgufError> {
        self.tensor(name, ne, ty, move |out| Ok(out.write_all(bytes)?))
    }

    /// Adds `from`'s tensor called `name` unchanged.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor), or [`GgufError::MissingTensor`].
    pub fn copy_tensor(&mut self, from: &'a Gguf, name: &str) -> Result<&mut Self, GgufError> {
        let info = from.require(name)?;
        self.tensor_from_reader(name, info.dims(), info.ty, from.tensor_reader(name)?)
    }

    /// Checks the metadata and works out the header and every offset.
    ///
    /// # Errors
    /// A bad key, alignment or array nesting, or a header or file too large.
    pub fn layout(&self) -> Result<Layout, GgufError> {
        let alignment = alignment_of(&self.path, &self.metadata)?;
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            let offset = header.len() as u64;
            check_key_len(&self.path, offset, key.len() as u64)?;
            text(key.into()).map_err(|found| GgufError::KeyText {
                path: self.path.clone(),
                offset,
                found,
            })?;
            put_bytes(&mut header, key.as_bytes());
            put_value(&mut header, value).map_err(|TooDeep| GgufError::ArrayDepth {
                path: self.path.clone(),
                key: key.to_owned(),
                offset,
                max: MAX_ARRAY_DEPTH,
            })?;
        }
        let mut tensors = Vec::with_capacity(self.tensors.len());
        let mut at = 0u64;
        for (info, _) in &self.tensors {
            put_bytes(&mut header, info.name.as_bytes());
            header.extend(info.n_dims.to_le_bytes());
            header.extend(info.dims().iter().flat_map(|n| n.to_le_bytes()));
            header.extend(info.ty.id().to_le_bytes());
            header.extend(at.to_le_bytes());
            tensors.push(TensorInfo {
                offset: at,
                ..info.clone()
            });
            at = pad(info.n_bytes, alignment)
                .and_then(|n| n.checked_add(at))
                .filter(|&end| end <= i64::MAX as u64)
                .ok_or_else(|| GgufError::ShapeOverflow {
                    path: self.path.clone(),
                    tensor: info.name.clone(),
                    ne: Box::new(info.ne),
                })?;
        }
        if header.len() as u64 > MAX_HEADER_BYTES {
            return Err(GgufError::HeaderTooLarge {
                path: self.path.clone(),
                offset: MAX_HEADER_BYTES,
                what: "the header".to_owned(),
                limit: MAX_HEADER_BYTES,
            });
        }
        header.resize(header.len().next_multiple_of(alignment as usize), 0);
        Ok(Layout {
            file_len: header.len() as u64 + at,
            header,
            tensors,
            alignment,
        })
    }

    /// Writes the file to `out` and returns its size in bytes.
    ///
    /// # Errors
    /// As [`layout`](Self::layout), a failed write, or a source that fails or yields the wrong
    /// number of bytes. What was written before is then in `out`.
    pub fn write_to(self, out: &mut dyn Write) -> Result<u64, GgufError> {
        let layout = self.layout()?;
        let path = self.path;
        let failed = |source| GgufError::Io {
            path: path.clone(),
            doing: "writing",
            source,
        };
        out.write_all(&layout.header).map_err(failed)?;
        for (info, fill) in self.tensors {
            let mut data = Counted {
                out: &mut *out,
                wanted: info.n_bytes,
                found: 0,
                error: None,
            };
            let result = fill(&mut data);
            let (found, error) = (data.found, data.error);
            if let Some(source) = error {
                return Err(failed(source));
            }
            // before the source's own error, which may be the one `Counted` gave it
            if found > info.n_bytes || (result.is_ok() && found < info.n_bytes) {
                return Err(GgufError::TensorData {
                    path,
                    tensor: info.name,
                    wanted: info.n_bytes,
                    found,
                });
            }
            if let Err(source) = result {
                return Err(GgufError::TensorSource {
                    path,
                    tensor: info.name,
                    source,
                });
            }
            let padding = info.n_bytes.next_multiple_of(layout.alignment) - info.n_bytes;
            io::copy(&mut io::repeat(0).take(padding), out).map_err(failed)?;
        }
        out.flush().map_err(failed)?;
        Ok(layout.file_len)
    }

    /// Writes the file under its path with [`write_atomic`] and returns its size in bytes.
    ///
    /// # Errors
    /// As [`write_to`](Self::write_to), or [`GgufError::Atomic`]: the path exists and `force` is
    /// not set, or the disk failed.
    pub fn save(self, force: bool) -> Result<u64, GgufError> {
        let path = self.path.clone();
        write_atomic(&path, force, |out| self.write_to(out))
    }
}

/// Passes on at most `wanted` bytes and keeps the output's error apart from the source's.
struct Counted<'a> {
    out: &'a mut dyn Write,
    wanted: u64,
    found: u64,
    error: Option<io::Error>,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.wanted.saturating_sub(self.found) {
            self.found += bytes.len() as u64;
            return Err(io::Error::other("more data than the tensor has room for"));
        }
        match self.out.write(bytes) {
            Ok(n) => {
                self.found += n as u64;
                Ok(n)
            }
            Err(e) => {
                if e.kind() != io::ErrorKind::Interrupted {
                    self.error = Some(same_error(&e));
                }
                Err(e)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // the whole file is flushed once, at its end
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

struct TooDeep;

fn put_value(out: &mut Vec<u8>, value: &Value) -> Result<(), TooDeep> {
    out.extend(value.value_type().id().to_le_bytes());
    match value {
        Value::U8(n) => out.extend(n.to_le_bytes()),
        Value::I8(n) => out.extend(n.to_le_bytes()),
        Value::U16(n) => out.extend(n.to_le_bytes()),
        Value::I16(n) => out.extend(n.to_le_bytes()),
        Value::U32(n) => out.extend(n.to_le_bytes()),
        Value::I32(n) => out.extend(n.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::U64(n) => out.extend(n.to_le_bytes()),
        Value::I64(n) => out.extend(n.to_le_bytes()),
        Value::F64(x) => out.extend(x.to_le_bytes()),
        Value::Bool(b) => out.push(u8::from(*b)),
        Value::String(RawString(s)) => put_bytes(out, s),
        Value::Array(a) => put_array(out, a, 1)?,
    }
    Ok(())
}

fn put_array(out: &mut Vec<u8>, array: &Array, depth: usize) -> Result<(), TooDeep> {
    if depth > MAX_ARRAY_DEPTH {
        return Err(TooDeep);
    }
    out.extend(array.element_type().id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U64(v) => out.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|n| n.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&b| u8::from(b))),
        Array::String(v) => v.iter().for_each(|s| put_bytes(out, s.as_bytes())),
        Array::Array(v) => {
            for inner in v {
                put_array(out, inner, depth + 1)?;
            }
        }
    }
    Ok(())
}
