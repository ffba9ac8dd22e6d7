//! Codes told apart from scales, without a decoder of our own: when the bytes of scales and
//! minima are set to the same fixed values in two blocks, decoded elements differ exactly where
//! the codes do.
//!
//! Offsets are those of the structs in ggml's `ggml-common.h`.

use crate::gguf::GgmlType;

/// 1.0 as f16, little-endian.
const ONE: [u8; 2] = [0x00, 0x3c];

/// Where the scales of a block stand, and what they are set to: values for which no two codes
/// decode alike.
pub(super) struct Layout {
    block_bytes: usize,
    /// (first byte, bytes it is set to).
    scales: Vec<(usize, Vec<u8>)>,
}

impl Layout {
    /// None for types whose codes are no plain integers (IQ, ternary, floats).
    pub fn of(ty: GgmlType) -> Option<Self> {
        let d = |at: usize| (at, ONE.to_vec());
        let scales = match ty {
            GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => vec![d(0)],
            GgmlType::Q4_1 | GgmlType::Q5_1 => vec![d(0), d(2)],
            // Sixteen bytes of a scale (low nibble) and a minimum each; d and dmin at the end.
            GgmlType::Q2_K => vec![(0, vec![0x01; 16]), d(80), d(82)],
            // Six bits a scale, less 32: all zero is a scale of -32.
            GgmlType::Q3_K => vec![(96, vec![0; 12]), d(108)],
            // Six bits a scale and a minimum: bytes 0..4 and 4..8 whole, 8..12 in nibbles.
            GgmlType::Q4_K | GgmlType::Q5_K => {
                let six = [[0x01; 8].as_slice(), &[0x11; 4]].concat();
                vec![d(0), d(2), (4, six)]
            }
            GgmlType::Q6_K => vec![(192, vec![1; 16]), d(208)],
            _ => return None,
        };
        Some(Self {
            block_bytes: ty.block_bytes() as usize,
            scales,
        })
    }

    /// The blocks with their scales set to the fixed values.
    pub fn codes_alone(&self, blocks: &[u8]) -> Vec<u8> {
        let mut out = blocks.to_vec();
        for block in out.chunks_exact_mut(self.block_bytes) {
            for (at, bytes) in &self.scales {
                block[*at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
        out
    }

    /// Bytes of scales and minima in which two runs of blocks differ.
    pub fn scale_bytes_that_differ(&self, a: &[u8], b: &[u8]) -> u64 {
        let blocks = a
            .chunks_exact(self.block_bytes)
            .zip(b.chunks_exact(self.block_bytes));
        let count = |(a, b): (&[u8], &[u8])| {
            let ranges = self.scales.iter().map(|(at, v)| *at..at + v.len());
            ranges.flatten().filter(|&i| a[i] != b[i]).count() as u64
        };
        blocks.map(count).sum()
    }
}
