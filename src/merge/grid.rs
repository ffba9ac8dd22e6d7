//! The grid a quantised row already sits on: w = S·q + M, with codes q, steps S and offsets M
//! read from the existing blocks, and changed codes written back into code bits only.
//!
//! | type | S | M | codes |
//! |---|---|---|---|
//! | Q4_0, Q5_0 | d | 0 | -8..7, -16..15 |
//! | Q4_1, Q5_1 | d | m | 0..15, 0..31 |
//! | Q8_0 | d | 0 | -127..127 |
//! | Q2_K | d·sc4 | -dmin·m4 | 0..3 |
//! | Q3_K | d·(sc6 - 32) | 0 | -4..3 |
//! | Q4_K, Q5_K | d·sc6 | -dmin·m6 | 0..15, 0..31 |
//! | Q6_K | d·sc8 | 0 | -32..31 |
//! | F16, BF16, F32 | | | the bit pattern |
//!
//! Codes of the symmetric types are signed here: (q - 8)·d is exact in f32 where q·d - 8·d need
//! not be. Q8_0 is given -127..127 only: ggml's encoders never write -128 (d = max|w|/127), so
//! kernels, which take |q| in eight bits (`_mm256_sign_epi8`), never meet it; one code of 256 is
//! not worth finding out what each of them does. A -128 that is in the file already may stay.
//!
//! Block layouts follow `ggml-common.h`, values `dequantize_row_*` in `ggml-quants.c` (ggml 0.26).

use super::error::RoundError;
use crate::gguf::GgmlType;
use half::{bf16, f16};

/// Where bits of an element's code are: byte of the block, and shift within it.
type Place = fn(usize) -> (usize, u32);

/// One block type.
struct Layout {
    /// Place and number of the low bits.
    low: (Place, u32),
    /// The same of the high bits, where they are kept apart.
    high: Option<(Place, u32)>,
    /// What is taken from the unsigned code.
    zero: i32,
    /// Elements that share a step.
    group: usize,
    /// Step and offset of group `g`.
    step: fn(&[u8], usize) -> (f32, f32),
    /// Where the block's f16 fields are: what steps are in proportion to, then what offsets are.
    fields: &'static [usize],
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The 6-bit scale and min of group `g` in the 12 bytes that Q4_K and Q5_K share.
fn scale_min_k4(s: &[u8], g: usize) -> (u8, u8) {
    if g < 4 {
        (s[g] & 63, s[g + 4] & 63)
    } else {
        (
            (s[g + 4] & 15) | (s[g - 4] >> 6 << 4),
            (s[g + 4] >> 4) | (s[g] >> 6 << 4),
        )
    }
}

fn step_k4(block: &[u8], g: usize) -> (f32, f32) {
    let (scale, min) = scale_min_k4(&block[4..16], g);
    (
        half_at(block, 0) * f32::from(scale),
        -(half_at(block, 2) * f32::from(min)),
    )
}

/// The 6-bit scale of group `g` of Q3_K: four low bits in bytes 0..8, two high ones in 8..12.
fn scale_q3(s: &[u8], g: usize) -> i8 {
    let low = (s[g % 8] >> (4 * (g / 8))) & 15;
    let high = (s[8 + g % 4] >> (2 * (g / 4))) & 3;
    (low | high << 4) as i8 - 32
}

/// Two bits of four 32-element runs share a byte, in each half of the block.
fn crumb(i: usize) -> (usize, u32) {
    (i / 128 * 32 + i % 32, i as u32 % 128 / 32 * 2)
}

impl Layout {
    fn of(ty: GgmlType) -> Option<Self> {
        let nibble32: [Place; 4] = [
            |i| (2 + i % 16, i as u32 / 16 * 4),
            |i| (4 + i % 16, i as u32 / 16 * 4),
            |i| (6 + i % 16, i as u32 / 16 * 4),
            |i| (8 + i % 16, i as u32 / 16 * 4),
        ];
        let only_d: fn(&[u8], usize) -> (f32, f32) = |b, _| (half_at(b, 0), 0.0);
        let d_and_m: fn(&[u8], usize) -> (f32, f32) = |b, _| (half_at(b, 0), half_at(b, 2));
        Some(match ty {
            GgmlType::Q4_0 => Self {
                low: (nibble32[0], 4),
                high: None,
                zero: 8,
                group: 32,
                step: only_d,
                fields: &[0],
            },
            GgmlType::Q4_1 => Self {
                low: (nibble32[1], 4),
                high: None,
                zero: 0,
                group: 32,
                step: d_and_m,
                fields: &[0, 2],
            },
            GgmlType::Q5_0 => Self {
                low: (nibble32[2], 4),
                high: Some((|i| (2 + i / 8, i as u32 % 8), 1)),
                zero: 16,
                group: 32,
                step: only_d,
                fields: &[0],
            },
            GgmlType::Q5_1 => Self {
                low: (nibble32[3], 4),
                high: Some((|i| (4 + i / 8, i as u32 % 8), 1)),
                zero: 0,
                group: 32,
                step: d_and_m,
                fields: &[0, 2],
            },
            // Two's complement; the sign is put on in `Grid::code`.
            GgmlType::Q8_0 => Self {
                low: (|i| (2 + i, 0), 8),
                high: None,
                zero: 0,
                group: 32,
                step: only_d,
                fields: &[0],
            },
            GgmlType::Q2_K => Self {
                low: (
                    |i| {
                        let (byte, shift) = crumb(i);
                        (16 + byte, shift)
                    },
                    2,
                ),
                high: None,
                zero: 0,
                group: 16,
                step: |b, g| {
                    (
                        half_at(b, 80) * f32::from(b[g] & 15),
                        -(half_at(b, 82) * f32::from(b[g] >> 4)),
                    )
                },
                fields: &[80, 82],
            },
            GgmlType::Q3_K => Self {
                low: (
                    |i| {
                        let (byte, shift) = crumb(i);
                        (32 + byte, shift)
                    },
                    2,
                ),
                high: Some((|i| (i % 32, i as u32 / 32), 1)),
                zero: 4,
                group: 16,
                step: |b, g| (half_at(b, 108) * f32::from(scale_q3(&b[96..108], g)), 0.0),
                fields: &[108],
            },
            GgmlType::Q4_K => Self {
                low: (|i| (16 + i / 64 * 32 + i % 32, i as u32 % 64 / 32 * 4), 4),
                high: None,
                zero: 0,
                group: 32,
                step: step_k4,
                fields: &[0, 2],
            },
            GgmlType::Q5_K => Self {
                low: (|i| (48 + i / 64 * 32 + i % 32, i as u32 % 64 / 32 * 4), 4),
                high: Some((|i| (16 + i % 32, i as u32 / 32), 1)),
                zero: 0,
                group: 32,
                step: step_k4,
                fields: &[0, 2],
            },
            GgmlType::Q6_K => Self {
                low: (|i| (i / 128 * 64 + i % 64, i as u32 % 128 / 64 * 4), 4),
                high: Some((
                    |i| (128 + i / 128 * 32 + i % 32, i as u32 % 128 / 32 * 2),
                    2,
                )),
                zero: 32,
                group: 16,
                step: |b, g| (half_at(b, 208) * f32::from(b[192 + g] as i8), 0.0),
                fields: &[208],
            },
            _ => return None,
        })
    }

    fn bits(&self) -> u32 {
        self.low.1 + self.high.map_or(0, |(_, bits)| bits)
    }
}

enum Kind {
    Codes {
        layout: Layout,
        block_len: usize,
        block_bytes: usize,
        /// Smallest and largest code.
        range: (i32, i32),
    },
    F32,
    F16,
    Bf16,
}

/// The grid of rows of one type and length.
pub struct Grid {
    ty: GgmlType,
    n_in: usize,
    row_bytes: usize,
    kind: Kind,
}

/// Decoded rows, one entry per element.
#[derive(Debug, Clone, Default)]
pub struct Cells {
    /// The codes: of quantised types as in the table above, of floats the bit pattern.
    pub code: Vec<i32>,
    /// S; empty for floats.
    pub step: Vec<f32>,
    /// M; empty for floats.
    pub offset: Vec<f32>,
    /// The values the codes stand for.
    pub value: Vec<f32>,
}

/// Adding and taking away 1.5·2²³ rounds to the nearest integer, ties to even, for |x| < 2²².
const TO_INTEGER: f32 = 12_582_912.0;

impl Grid {
    /// The grid of rows of `n_in` elements of type `ty`.
    ///
    /// # Errors
    /// [`RoundError::NoGrid`], [`RoundError::RowLength`].
    pub fn new(ty: GgmlType, n_in: usize) -> Result<Self, RoundError> {
        let kind = match ty {
            GgmlType::F32 => Kind::F32,
            GgmlType::F16 => Kind::F16,
            GgmlType::BF16 => Kind::Bf16,
            _ => {
                let layout = Layout::of(ty).ok_or(RoundError::NoGrid { ty })?;
                let range = match ty {
                    GgmlType::Q8_0 => (-127, 127),
                    _ => (-layout.zero, (1 << layout.bits()) - 1 - layout.zero),
                };
                Kind::Codes {
                    layout,
                    block_len: ty.block_len() as usize,
                    block_bytes: ty.block_bytes() as usize,
                    range,
                }
            }
        };
        match ty.row_bytes(n_in as u64) {
            Some(bytes) if n_in > 0 => Ok(Self {
                ty,
                n_in,
                row_bytes: bytes as usize,
                kind,
            }),
            _ => Err(RoundError::RowLength { ty, n_in }),
        }
    }

    /// The rows' type.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Elements in a row.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Bytes in a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Whether values are codes times a step (not floats).
    pub fn has_codes(&self) -> bool {
        matches!(self.kind, Kind::Codes { .. })
    }

    /// Rows in `bytes`.
    ///
    /// # Errors
    /// No whole number of rows.
    pub fn n_rows(&self, bytes: &[u8]) -> Result<usize, RoundError> {
        if bytes.len().is_multiple_of(self.row_bytes) {
            return Ok(bytes.len() / self.row_bytes);
        }
        Err(RoundError::Length {
            what: "bytes of whole rows",
            wanted: bytes.len().next_multiple_of(self.row_bytes),
            found: bytes.len(),
        })
    }

    /// Decode whole rows.
    ///
    /// # Errors
    /// Part of a row; a scale or a value that is not finite.
    pub fn decode(&self, bytes: &[u8], cells: &mut Cells) -> Result<(), RoundError> {
        let n = self.n_rows(bytes)? * self.n_in;
        cells.code.resize(n, 0);
        cells.value.resize(n, 0.0);
        let coded = if self.has_codes() { n } else { 0 };
        cells.step.resize(coded, 0.0);
        cells.offset.resize(coded, 0.0);
        let floats = cells.code.iter_mut().zip(&mut cells.value);
        match &self.kind {
            Kind::F32 => {
                for ((c, v), b) in floats.zip(bytes.chunks_exact(4)) {
                    *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    *c = v.to_bits() as i32;
                }
            }
            Kind::F16 => {
                for ((c, v), b) in floats.zip(bytes.chunks_exact(2)) {
                    let x = f16::from_le_bytes([b[0], b[1]]);
                    (*c, *v) = (i32::from(x.to_bits()), x.to_f32());
                }
            }
            Kind::Bf16 => {
                for ((c, v), b) in floats.zip(bytes.chunks_exact(2)) {
                    let x = bf16::from_le_bytes([b[0], b[1]]);
                    (*c, *v) = (i32::from(x.to_bits()), x.to_f32());
                }
            }
            Kind::Codes {
                layout,
                block_len,
                block_bytes,
                ..
            } => {
                for (block, first) in bytes
                    .chunks_exact(*block_bytes)
                    .zip((0..n).step_by(*block_len))
                {
                    for g in 0..block_len / layout.group {
                        let (step, offset) = (layout.step)(block, g);
                        for i in g * layout.group..(g + 1) * layout.group {
                            let code = layout.read(block, i);
                            cells.code[first + i] = code;
                            cells.step[first + i] = step;
                            cells.offset[first + i] = offset;
                            cells.value[first + i] = step * code as f32 + offset;
                        }
                    }
                }
            }
        }
        match cells.value.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(RoundError::NotFinite {
                what: "the weight",
                row: at / self.n_in,
                column: at % self.n_in,
            }),
            None => Ok(()),
        }
    }

    /// Write `code` into the rows it was decoded from. Bits that hold no code are left alone;
    /// returns how many elements changed.
    ///
    /// # Errors
    /// A slice of another length.
    pub fn encode(&self, code: &[i32], bytes: &mut [u8]) -> Result<usize, RoundError> {
        let wanted = self.n_rows(bytes)? * self.n_in;
        if code.len() != wanted {
            return Err(RoundError::Length {
                what: "codes",
                wanted,
                found: code.len(),
            });
        }
        let mut changed = 0;
        match &self.kind {
            Kind::Codes {
                layout,
                block_len,
                block_bytes,
                ..
            } => {
                for (block, codes) in bytes
                    .chunks_exact_mut(*block_bytes)
                    .zip(code.chunks_exact(*block_len))
                {
                    for (i, &c) in codes.iter().enumerate() {
                        if layout.read(block, i) != c {
                            layout.write(block, i, c);
                            changed += 1;
                        }
                    }
                }
            }
            Kind::F32 => {
                for (b, c) in bytes.chunks_exact_mut(4).zip(code) {
                    changed += usize::from(put(b, &c.to_le_bytes()));
                }
            }
            Kind::F16 | Kind::Bf16 => {
                for (b, c) in bytes.chunks_exact_mut(2).zip(code) {
                    changed += usize::from(put(b, &(*c as u16).to_le_bytes()));
                }
            }
        }
        Ok(changed)
    }

    /// Elements of a block and the number of its f16 fields: one that its steps are in proportion
    /// to, and one for its offsets where it has them. None for floats.
    pub fn fields(&self) -> Option<(usize, usize)> {
        match &self.kind {
            Kind::Codes {
                layout, block_len, ..
            } => Some((*block_len, layout.fields.len())),
            _ => None,
        }
    }

    /// Multiply the fields of a row's blocks, one after another, by 1 + `by`. A field that would
    /// become zero, infinite or of the other sign stays.
    pub fn scale_fields(&self, row: &mut [u8], by: &[f64]) {
        let Kind::Codes {
            layout,
            block_bytes,
            ..
        } = &self.kind
        else {
            return;
        };
        let blocks = row.chunks_exact_mut(*block_bytes);
        for (block, by) in blocks.zip(by.chunks_exact(layout.fields.len())) {
            for (&at, by) in layout.fields.iter().zip(by) {
                let was = half_at(block, at);
                let now = f16::from_f64(f64::from(was) * (1.0 + by));
                if now.is_finite() && now.to_f32() * was > 0.0 {
                    block[at..at + 2].copy_from_slice(&now.to_le_bytes());
                }
            }
        }
    }

    /// The code nearest to `v` at element `i`, and the value it stands for. An element without a
    /// step holds only what it holds; the value that is there gives its own code even where the
    /// offset drowns the step.
    pub fn nearest(&self, cells: &Cells, i: usize, v: f32) -> (i32, f32) {
        let (was, value) = (cells.code[i], cells.value[i]);
        if v == value {
            return (was, value);
        }
        match &self.kind {
            Kind::Codes {
                range: (low, high), ..
            } => {
                let (step, offset) = (cells.step[i], cells.offset[i]);
                if step == 0.0 {
                    return (was, value);
                }
                let x = ((v - offset) / step).clamp(-1024.0, 1024.0);
                let q = ((x + TO_INTEGER) - TO_INTEGER) as i32;
                let q = q.clamp((*low).min(was), *high);
                (q, step * q as f32 + offset)
            }
            Kind::F32 => (v.to_bits() as i32, v),
            // Past the largest number is the largest number: an infinity would end the model.
            Kind::F16 => {
                let max = f16::MAX.to_f32();
                let x = f16::from_f32(v.clamp(-max, max));
                (i32::from(x.to_bits()), x.to_f32())
            }
            Kind::Bf16 => {
                let max = bf16::MAX.to_f32();
                let x = bf16::from_f32(v.clamp(-max, max));
                (i32::from(x.to_bits()), x.to_f32())
            }
        }
    }
}

impl Layout {
    fn read(&self, block: &[u8], i: usize) -> i32 {
        let mut code = field(block, self.low, i);
        if self.low.1 == 8 {
            return i32::from(code as u8 as i8);
        }
        if let Some(high) = self.high {
            code |= field(block, high, i) << self.low.1;
        }
        code - self.zero
    }

    fn write(&self, block: &mut [u8], i: usize, code: i32) {
        let code = code + self.zero;
        set_field(block, self.low, i, code);
        if let Some(high) = self.high {
            set_field(block, high, i, code >> self.low.1);
        }
    }
}

fn field(block: &[u8], (place, bits): (Place, u32), i: usize) -> i32 {
    let (byte, shift) = place(i);
    i32::from(block[byte] >> shift) & ((1 << bits) - 1)
}

fn set_field(block: &mut [u8], (place, bits): (Place, u32), i: usize, code: i32) {
    let (byte, shift) = place(i);
    let mask = (((1u32 << bits) - 1) as u8) << shift;
    block[byte] = (block[byte] & !mask) | (((code as u8) << shift) & mask);
}

fn put(bytes: &mut [u8], new: &[u8]) -> bool {
    let changed = bytes != new;
    bytes.copy_from_slice(new);
    changed
}

#[cfg(test)]
#[path = "grid_tests.rs"]
pub(super) mod tests;
