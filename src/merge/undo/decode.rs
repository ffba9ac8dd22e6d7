//! Rebuilds the original from the merged files and the body; trusts neither.

use super::blocks::{COPY, DIFF, MAX_BLOCK, SPELLED};
use super::{BodyError, FileDigest, Undo, UndoError, UndoSize, open};
use crate::digest::Digest;
use flate2::bufread::ZlibDecoder;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Take, Write};
use std::os::unix::fs::FileExt;

type Body = BufReader<ZlibDecoder<BufReader<Take<File>>>>;

pub(super) struct Decoder<'a> {
    undo: &'a Undo,
    merged: &'a [File],
    body: Body,
    /// Inflated bytes read.
    at: u64,
    /// The part being rebuilt.
    part: usize,
    size: UndoSize,
    block: Vec<u8>,
}

/// Why a block failed: the body, or the disk.
enum Failure {
    Body(BodyError),
    Undo(UndoError),
}

impl From<BodyError> for Failure {
    fn from(e: BodyError) -> Self {
        Self::Body(e)
    }
}

impl<'a> Decoder<'a> {
    pub fn new(undo: &'a Undo, merged: &'a [File]) -> Result<Self, UndoError> {
        let failed = |source| UndoError::Io {
            path: undo.path.clone(),
            doing: "reading",
            source,
        };
        let mut file = open(&undo.path)?;
        let file_len = file.metadata().map_err(failed)?.len();
        file.seek(SeekFrom::Start(undo.body_at)).map_err(failed)?;
        let body = ZlibDecoder::new(BufReader::new(file.take(undo.body_len)));
        Ok(Self {
            undo,
            merged,
            body: BufReader::with_capacity(1 << 16, body),
            at: 0,
            part: 0,
            size: UndoSize {
                file_len,
                ..UndoSize::default()
            },
            block: vec![0; MAX_BLOCK as usize],
        })
    }

    pub fn write_part(&mut self, out: &mut dyn Write) -> Result<FileDigest, UndoError> {
        let wanted = self.undo.header.original[self.part];
        let mut hash = Sha256::new();
        let mut left = wanted.len;
        while left > 0 {
            let n = self.block(left, &mut hash, out).map_err(|e| match e {
                Failure::Undo(e) => e,
                Failure::Body(problem) => self.problem(problem),
            })?;
            left -= n;
        }
        let found = Digest(hash.finalize().into());
        if found != wanted.digest {
            return Err(UndoError::Rebuilt {
                path: self.undo.path.clone(),
                part: self.part,
                wanted: wanted.digest.short(),
                found: found.short(),
            });
        }
        self.part += 1;
        Ok(wanted)
    }

    pub fn finish(mut self) -> Result<UndoSize, UndoError> {
        let mut next = [0];
        match self.body.read(&mut next) {
            Ok(0) => Ok(self.size),
            Ok(_) => Err(self.problem(BodyError::Trailing)),
            Err(e) => Err(self.problem(e.into())),
        }
    }

    fn problem(&self, problem: BodyError) -> UndoError {
        UndoError::Body {
            path: self.undo.path.clone(),
            part: self.part,
            at: self.at,
            problem,
        }
    }

    /// Write one block; the bytes of the original it covers.
    fn block(&mut self, left: u64, hash: &mut Sha256, out: &mut dyn Write) -> Result<u64, Failure> {
        let mut kind = [0];
        self.read(&mut kind)?;
        match kind[0] {
            COPY => {
                let (part, offset, len) = self.place(left)?;
                let mut done = 0;
                while done < len {
                    let n = (len - done).min(MAX_BLOCK);
                    self.read_merged(part, offset + done, n)?;
                    self.put(n, hash, out)?;
                    done += n;
                }
                self.size.same += len;
                Ok(len)
            }
            DIFF => {
                let (part, offset, len) = self.place(left.min(MAX_BLOCK))?;
                let runs = self.runs(len)?;
                self.read_merged(part, offset, len)?;
                let mut changed = 0;
                let mut delta = Vec::new();
                for (start, end) in runs {
                    delta.resize((end - start) as usize, 0);
                    self.read(&mut delta)?;
                    let bytes = &mut self.block[start as usize..end as usize];
                    for (byte, d) in bytes.iter_mut().zip(&delta) {
                        *byte = byte.wrapping_add(*d);
                    }
                    changed += end - start;
                }
                self.size.changed += changed;
                self.size.same += len - changed;
                self.put(len, hash, out)?;
                Ok(len)
            }
            SPELLED => {
                let len = self.length(left.min(MAX_BLOCK))?;
                let mut block = std::mem::take(&mut self.block);
                let read = self.read(&mut block[..len as usize]);
                self.block = block;
                read?;
                self.put(len, hash, out)?;
                self.size.spelled += len;
                Ok(len)
            }
            found => Err(BodyError::Kind { found }.into()),
        }
    }

    /// Merged part, offset and length (1 to `max`) of a block, inside that part.
    fn place(&mut self, max: u64) -> Result<(usize, u64, u64), BodyError> {
        let part = self.number()?;
        let merged = &self.undo.header.merged;
        let Some(file) = usize::try_from(part).ok().and_then(|p| merged.get(p)) else {
            return Err(BodyError::Part {
                found: part,
                max: merged.len() as u64,
            });
        };
        let offset = self.number()?;
        let len = self.length(max)?;
        if offset.checked_add(len).is_none_or(|end| end > file.len) {
            return Err(BodyError::Range {
                part,
                offset,
                len,
                max: file.len,
            });
        }
        Ok((part as usize, offset, len))
    }

    fn length(&mut self, max: u64) -> Result<u64, BodyError> {
        match self.number()? {
            found if (1..=max).contains(&found) => Ok(found),
            found => Err(BodyError::BlockLength { found, max }),
        }
    }

    /// Start and end of each run in a block of `len` bytes. Each run takes a byte at least, so
    /// there are no more than `len`, and memory grows with what is read.
    fn runs(&mut self, len: u64) -> Result<Vec<(u64, u64)>, BodyError> {
        let n = self.number()?;
        if !(1..=len).contains(&n) {
            return Err(BodyError::Runs { found: n, max: len });
        }
        let mut out = Vec::new();
        let mut at = 0u64;
        for _ in 0..n {
            let (gap, run) = (self.number()?, self.number()?);
            let left = len - at;
            let found = gap.saturating_add(run);
            if run == 0 || found > left {
                return Err(BodyError::Run { found, left });
            }
            out.push((at + gap, at + found));
            at += found;
        }
        Ok(out)
    }

    fn number(&mut self) -> Result<u64, BodyError> {
        let mut out = 0u64;
        for shift in (0..64).step_by(7) {
            let mut byte = [0];
            self.read(&mut byte)?;
            let bits = u64::from(byte[0] & 0x7f);
            if bits << shift >> shift != bits {
                return Err(BodyError::Number);
            }
            out |= bits << shift;
            if byte[0] < 0x80 {
                return Ok(out);
            }
        }
        Err(BodyError::Number)
    }

    fn read(&mut self, out: &mut [u8]) -> Result<(), BodyError> {
        self.body.read_exact(out)?;
        self.at += out.len() as u64;
        Ok(())
    }

    /// Fill the front of `block` with merged bytes; the range was checked.
    fn read_merged(&mut self, part: usize, offset: u64, n: u64) -> Result<(), Failure> {
        let out = &mut self.block[..n as usize];
        self.merged[part]
            .read_exact_at(out, offset)
            .map_err(|source| {
                Failure::Undo(UndoError::Io {
                    path: self.undo.path.clone(),
                    doing: "reading the merged model beside it",
                    source,
                })
            })
    }

    fn put(&self, n: u64, hash: &mut Sha256, out: &mut dyn Write) -> Result<(), Failure> {
        let bytes = &self.block[..n as usize];
        hash.update(bytes);
        out.write_all(bytes).map_err(|source| {
            Failure::Undo(UndoError::Io {
                path: self.undo.path.clone(),
                doing: "writing the original",
                source,
            })
        })
    }
}
