//! Activations on disk: rows of f16 under a power-of-two scale each, in a file without a name.
//!
//! One forward pass sees every layer before any of them is solved. Kept in memory, the inputs of
//! a 7B model would take 3 MB a token in f32; here a row takes 4 + 2·n_in bytes of disk and the
//! process none. The file is unlinked when it is made, so it goes whenever the process does.

use crate::error::Error;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Rows are scaled to a largest magnitude in [2^14, 2^15): no overflow, and 29 binades below it
/// keep all 11 bits.
const TOP_EXPONENT: i32 = 15;

/// The file and how far it is written.
#[derive(Debug)]
pub(super) struct Spill {
    file: File,
    dir: PathBuf,
    len: u64,
    bytes: Vec<u8>,
    halves: Vec<f16>,
}

/// Bytes of one row on disk.
pub(super) fn row_bytes(n_in: usize) -> u64 {
    4 + 2 * n_in as u64
}

impl Spill {
    pub(super) fn new(dir: &Path) -> Result<Self, Error> {
        let file = tempfile::tempfile_in(dir).map_err(|source| Error::Io {
            path: dir.to_owned(),
            doing: "creating a temporary file for activations",
            source,
        })?;
        Ok(Self {
            file,
            dir: dir.to_owned(),
            len: 0,
            bytes: Vec::new(),
            halves: Vec::new(),
        })
    }

    /// Bytes written.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Append rows of `n_in` finite values; returns where they start.
    pub(super) fn append<'a>(
        &mut self,
        n_in: usize,
        rows: impl Iterator<Item = &'a [f32]>,
    ) -> Result<u64, Error> {
        self.bytes.clear();
        self.halves.resize(n_in, f16::ZERO);
        let mut scaled = vec![0f32; n_in];
        for row in rows {
            let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
            let scale = power_of_two_above(largest);
            for (s, v) in scaled.iter_mut().zip(row) {
                *s = v / scale;
            }
            self.halves.convert_from_f32_slice(&scaled);
            self.bytes.extend(scale.to_le_bytes());
            self.bytes.extend(bytemuck::cast_slice(&self.halves));
        }
        let start = self.len;
        self.file
            .write_all_at(&self.bytes, start)
            .map_err(|source| Error::Io {
                path: self.dir.clone(),
                doing: "writing activations to a temporary file",
                source,
            })?;
        self.len += self.bytes.len() as u64;
        Ok(start)
    }

    /// `n` rows from byte `start`, decoded into `out` `[n_in, n]`.
    pub(super) fn read(
        &self,
        start: u64,
        n_in: usize,
        n: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let size = row_bytes(n_in) as usize;
        let mut bytes = vec![0; size * n];
        self.file
            .read_exact_at(&mut bytes, start)
            .map_err(|source| Error::Io {
                path: self.dir.clone(),
                doing: "reading activations back",
                source,
            })?;
        out.resize(n_in * n, 0.0);
        let mut halves = vec![f16::ZERO; n_in];
        for (row, values) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(n_in)) {
            let (scale, row) = row.split_at(4);
            let scale = f32::from_le_bytes(scale.try_into().expect("split at four"));
            bytemuck::cast_slice_mut::<f16, u8>(&mut halves).copy_from_slice(row);
            halves.convert_to_f32_slice(values);
            values.iter_mut().for_each(|v| *v *= scale);
        }
        Ok(())
    }
}

/// The least power of two s with largest/s < 2^[`TOP_EXPONENT`], within f32's normal numbers.
fn power_of_two_above(largest: f32) -> f32 {
    if largest == 0.0 {
        return 1.0;
    }
    let biased = (largest.to_bits() >> 23) as i32;
    let exponent = (biased - 127 + 1 - TOP_EXPONENT).clamp(-126, 127);
    f32::from_bits(((exponent + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_to_half_precision_whatever_their_scale() {
        let mut spill = Spill::new(&std::env::temp_dir()).expect("a temporary file");
        let n_in = 37;
        let rows: Vec<Vec<f32>> = [1e-30f32, 1e-6, 1.0, 3e4, 1e30]
            .iter()
            .map(|&s| {
                (0..n_in)
                    .map(|i| s * ((i * i) as f32 * 0.37).sin())
                    .collect()
            })
            .collect();
        let zero = vec![0f32; n_in];
        let first = spill
            .append(n_in, rows[..2].iter().map(Vec::as_slice))
            .expect("written");
        let second = spill
            .append(
                n_in,
                rows[2..].iter().map(Vec::as_slice).chain([zero.as_slice()]),
            )
            .expect("written");
        assert_eq!((first, second), (0, 2 * row_bytes(n_in)));
        assert_eq!(spill.len(), 6 * row_bytes(n_in));
        let mut back = Vec::new();
        spill.read(second, n_in, 4, &mut back).expect("read");
        assert!(back[3 * n_in..].iter().all(|&v| v == 0.0));
        for (row, back) in rows[2..].iter().zip(back.chunks(n_in)) {
            let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (a, b) in row.iter().zip(back) {
                assert!(
                    (a - b).abs() <= a.abs() / 2048.0 + largest * 1e-9,
                    "{a} {b}"
                );
            }
        }
    }
}
