//! Finds what the original and the merged model share, and writes an undo file.

use super::blocks::{BlockWriter, MAX_BLOCK, Place};
use super::header::Header;
use super::{UndoError, UndoSize};
use crate::error::Error;
use crate::gguf::{Gguf, TensorInfo};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Writes header, body and digest to `out`; `path` is for messages.
pub(super) fn write(
    header: &Header,
    original: &[Gguf],
    merged: &[Gguf],
    path: &Path,
    out: &mut dyn Write,
) -> Result<UndoSize, Error> {
    let failed = |source| UndoError::Io {
        path: path.to_owned(),
        doing: "writing",
        source,
    };
    // The body's length stands before it, and a stream cannot go back. Beside the undo file,
    // where there is room for it, not in a /tmp that may be memory.
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mut body = tempfile::tempfile_in(dir).map_err(failed)?;
    let mut blocks = BlockWriter::new(ZlibEncoder::new(
        io::BufWriter::new(&body),
        Compression::default(),
    ));
    let names = places(merged);
    for (i, part) in original.iter().enumerate() {
        encode_part(part, i, merged, &names, &mut blocks, path)?;
    }
    let mut size = UndoSize {
        same: blocks.same,
        changed: blocks.changed,
        spelled: blocks.spelled,
        file_len: 0,
    };
    let ended = blocks.into_inner().finish();
    ended.and_then(|mut w| w.flush()).map_err(failed)?;

    let mut out = Hashed {
        out,
        hash: Sha256::new(),
        n: 0,
    };
    let body_len = body.stream_position().map_err(failed)?;
    out.write_all(&header.bytes()).map_err(failed)?;
    out.write_all(&body_len.to_le_bytes()).map_err(failed)?;
    body.seek(SeekFrom::Start(0)).map_err(failed)?;
    copy(&mut body, &mut out).map_err(failed)?;
    let digest = out.hash.clone().finalize();
    out.write_all(&digest).map_err(failed)?;
    size.file_len = out.n;
    Ok(size)
}

fn copy(from: &mut File, to: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => to.write_all(&buffer[..n])?,
        }
    }
}

struct Hashed<'a> {
    out: &'a mut dyn Write,
    hash: Sha256,
    n: u64,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.n += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Where each tensor of the merged model lies.
type Places<'a> = HashMap<&'a str, (usize, &'a TensorInfo)>;

fn places(merged: &[Gguf]) -> Places<'_> {
    let parts = merged.iter().enumerate();
    parts
        .flat_map(|(i, part)| {
            part.tensors()
                .iter()
                .map(move |t| (t.name.as_str(), (i, t)))
        })
        .collect()
}

/// Header, then tensor by tensor with whatever lies between them.
fn encode_part<W: Write>(
    part: &Gguf,
    no: usize,
    merged: &[Gguf],
    names: &Places<'_>,
    out: &mut BlockWriter<W>,
    path: &Path,
) -> Result<(), Error> {
    let mut buffers = Buffers::new(path);
    let mut tensors: Vec<&TensorInfo> = part.tensors().iter().collect();
    tensors.sort_by_key(|t| t.offset);
    let starts = tensors
        .iter()
        .map(|t| t.absolute_offset(part.data_offset()));
    let starts: Vec<u64> = starts.chain([part.file_len()]).collect();
    // A joined model has one header for all parts.
    let twin = no.min(merged.len() - 1);
    buffers.header(part, merged, twin, out)?;
    let gap = starts[0] - part.header_len();
    buffers.spell(part, part.header_len(), gap, out)?;
    for (t, bounds) in tensors.iter().zip(starts.windows(2)) {
        let len = bounds[1] - bounds[0];
        match names.get(t.name.as_str()) {
            Some(&(i, m)) if m.ty == t.ty && m.n_bytes == t.n_bytes => {
                let offset = m.absolute_offset(merged[i].data_offset());
                // The padding too, as far as the merged file has bytes for it.
                let both = len.min(merged[i].file_len() - offset);
                let place = Place { part: i, offset };
                buffers.diff(part, bounds[0], &merged[i], place, both, out)?;
                buffers.spell(part, bounds[0] + both, len - both, out)?;
            }
            _ => buffers.spell(part, bounds[0], len, out)?,
        }
    }
    out.flush_copy().map_err(|e| buffers.failed(e))?;
    Ok(())
}

struct Buffers<'a> {
    original: Vec<u8>,
    merged: Vec<u8>,
    path: &'a Path,
}

impl<'a> Buffers<'a> {
    fn new(path: &'a Path) -> Self {
        let empty = || vec![0; MAX_BLOCK as usize];
        Self {
            original: empty(),
            merged: empty(),
            path,
        }
    }

    fn failed(&self, source: io::Error) -> UndoError {
        UndoError::Io {
            path: self.path.to_owned(),
            doing: "writing",
            source,
        }
    }

    fn diff<W: Write>(
        &mut self,
        part: &Gguf,
        start: u64,
        from: &Gguf,
        place: Place,
        len: u64,
        out: &mut BlockWriter<W>,
    ) -> Result<(), Error> {
        let mut at = 0;
        while at < len {
            let n = (len - at).min(MAX_BLOCK);
            part.read_at(start + at, &mut self.original[..n as usize])?;
            from.read_at(place.offset + at, &mut self.merged[..n as usize])?;
            let here = Place {
                offset: place.offset + at,
                ..place
            };
            let (a, b) = (&self.original[..n as usize], &self.merged[..n as usize]);
            out.diff(here, a, b).map_err(|e| self.failed(e))?;
            at += n;
        }
        Ok(())
    }

    fn spell<W: Write>(
        &mut self,
        part: &Gguf,
        start: u64,
        len: u64,
        out: &mut BlockWriter<W>,
    ) -> Result<(), Error> {
        let mut at = 0;
        while at < len {
            let n = (len - at).min(MAX_BLOCK);
            part.read_at(start + at, &mut self.original[..n as usize])?;
            let bytes = &self.original[..n as usize];
            out.spell(bytes).map_err(|e| self.failed(e))?;
            at += n;
        }
        Ok(())
    }

    /// The header of `part` against that of the merged part `twin`. Keys are added at the end
    /// of the metadata, so the bytes before the split point agree when both are laid at their
    /// starts, those after it when both are laid at their ends.
    fn header<W: Write>(
        &mut self,
        part: &Gguf,
        merged: &[Gguf],
        twin: usize,
        out: &mut BlockWriter<W>,
    ) -> Result<(), Error> {
        let other = &merged[twin];
        let (len, other_len) = (part.header_len(), other.header_len());
        let both = len.min(other_len);
        let at_start = Place {
            part: twin,
            offset: 0,
        };
        if len == other_len {
            return self.diff(part, 0, other, at_start, len, out);
        }
        // Bounded: a header is at most MAX_HEADER_BYTES, and is in memory parsed anyway.
        let (a, b) = (bytes(part, len)?, bytes(other, other_len)?);
        let split = split_point(&a, &b);
        let head = split.min(both);
        self.diff(part, 0, other, at_start, head, out)?;
        let tail = (len - split.max(head)).min(other_len);
        self.spell(part, head, len - head - tail, out)?;
        let at_end = Place {
            part: twin,
            offset: other_len - tail,
        };
        self.diff(part, len - tail, other, at_end, tail, out)
    }
}

fn bytes(part: &Gguf, len: u64) -> Result<Vec<u8>, Error> {
    let mut out = vec![0; len as usize];
    part.read_at(0, &mut out)?;
    Ok(out)
}

/// The `p` for which most bytes of `a` agree: those below `p` with `b` laid at its start, the
/// others with `b` laid at its end.
fn split_point(a: &[u8], b: &[u8]) -> u64 {
    let at_end = |i: usize| {
        let j = (b.len() + i).checked_sub(a.len());
        j.is_some_and(|j| b[j] == a[i])
    };
    let mut score = (0..a.len()).filter(|&i| at_end(i)).count() as i64;
    let (mut best, mut split) = (score, 0);
    for (i, x) in a.iter().enumerate() {
        score += i64::from(b.get(i) == Some(x)) - i64::from(at_end(i));
        if score > best {
            (best, split) = (score, i + 1);
        }
    }
    split as u64
}
