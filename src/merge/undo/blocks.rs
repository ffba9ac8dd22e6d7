//! Blocks of the inflated body: kind u8, then numbers as LEB128.
//!
//! - 0, copy: merged part, offset, length.
//! - 1, difference: merged part, offset, length (at most [`MAX_BLOCK`]), number of runs, per run
//!   the equal bytes before it and its length, then for every byte of every run
//!   `original - merged` (mod 256): a code that moved by one step gives the same few values
//!   everywhere, which deflate likes better than the bytes themselves.
//! - 2, spelled out: length (at most [`MAX_BLOCK`]), bytes.
//!
//! Blocks follow one another until a part has its length; the next part begins with the next
//! block.

use std::io::{self, Write};

/// Bytes of the original that one difference or spelled-out block covers at most.
pub(crate) const MAX_BLOCK: u64 = 1 << 20;
pub(super) const COPY: u8 = 0;
pub(super) const DIFF: u8 = 1;
pub(super) const SPELLED: u8 = 2;

/// Equal bytes that do not end a run: a zero each costs less than a new run.
const JOIN: usize = 2;

/// Where bytes lie in the merged model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub part: usize,
    pub offset: u64,
}

pub(super) fn put_number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Writes blocks, joining copies that follow one another.
pub(super) struct BlockWriter<W> {
    out: W,
    copy: Option<(Place, u64)>,
    pub same: u64,
    pub changed: u64,
    pub spelled: u64,
}

impl<W: Write> BlockWriter<W> {
    pub fn new(out: W) -> Self {
        Self {
            out,
            copy: None,
            same: 0,
            changed: 0,
            spelled: 0,
        }
    }

    /// `original` as what lies at `place`, where `merged` (as long, at most a block) was read.
    pub fn diff(&mut self, place: Place, original: &[u8], merged: &[u8]) -> io::Result<()> {
        let len = original.len() as u64;
        if original == merged {
            self.same += len;
            match &mut self.copy {
                Some((at, n)) if at.part == place.part && at.offset + *n == place.offset => {
                    *n += len;
                    return Ok(());
                }
                _ => {
                    self.flush_copy()?;
                    self.copy = Some((place, len));
                    return Ok(());
                }
            }
        }
        self.flush_copy()?;
        let runs = runs(original, merged);
        let mut block = vec![DIFF];
        put_number(&mut block, place.part as u64);
        put_number(&mut block, place.offset);
        put_number(&mut block, len);
        put_number(&mut block, runs.len() as u64);
        let mut at = 0;
        for &(start, end) in &runs {
            put_number(&mut block, (start - at) as u64);
            put_number(&mut block, (end - start) as u64);
            at = end;
        }
        for &(start, end) in &runs {
            self.changed += (end - start) as u64;
            let pairs = original[start..end].iter().zip(&merged[start..end]);
            block.extend(pairs.map(|(o, m)| o.wrapping_sub(*m)));
        }
        self.same = self.same + len - runs.iter().map(|(s, e)| (e - s) as u64).sum::<u64>();
        self.out.write_all(&block)
    }

    /// `original` (at most a block) with nothing to lean on.
    pub fn spell(&mut self, original: &[u8]) -> io::Result<()> {
        self.flush_copy()?;
        let mut block = vec![SPELLED];
        put_number(&mut block, original.len() as u64);
        self.spelled += original.len() as u64;
        self.out.write_all(&block)?;
        self.out.write_all(original)
    }

    /// At the end of a part: no copy may run into the next one.
    pub fn flush_copy(&mut self) -> io::Result<()> {
        let Some((place, len)) = self.copy.take() else {
            return Ok(());
        };
        let mut block = vec![COPY];
        put_number(&mut block, place.part as u64);
        put_number(&mut block, place.offset);
        put_number(&mut block, len);
        self.out.write_all(&block)
    }

    pub fn into_inner(self) -> W {
        self.out
    }
}

/// Where the two differ, start and end, with gaps up to [`JOIN`] bridged.
fn runs(a: &[u8], b: &[u8]) -> Vec<(usize, usize)> {
    let mut out: Vec<(usize, usize)> = Vec::new();
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        if x == y {
            continue;
        }
        match out.last_mut() {
            Some((_, end)) if i - *end <= JOIN => *end = i + 1,
            _ => out.push((i, i + 1)),
        }
    }
    out
}
