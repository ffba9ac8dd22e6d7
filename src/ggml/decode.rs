//! Decoders of runs of weights: this project's own for ggml's plain blocks, to the same bits at
//! three to ten times the speed, and ggml's for the others.

use ggml_sys::ggml_type;
use half::f16;

/// Decodes whole blocks: bytes in, as many floats as they hold out.
type Ggml = unsafe extern "C" fn(*const std::ffi::c_void, *mut f32, i64);

/// The same in Rust.
type Own = fn(&[u8], &mut [f32]);

/// How runs of one type are decoded.
#[derive(Clone, Copy)]
pub(super) struct Decoder {
    /// Elements and bytes of a block.
    pub block: usize,
    pub size: usize,
    run: Run,
}

#[derive(Clone, Copy)]
enum Run {
    Own(Own),
    Ggml(Ggml),
}

impl Decoder {
    /// Of a type; none if it is unknown or cannot be decoded.
    pub fn of(ty: ggml_type) -> Option<Self> {
        if ty >= ggml_sys::llama::GGML_TYPE_COUNT {
            return None;
        }
        // SAFETY: the type number is in range; the table is static.
        let (block, size, decode) = unsafe {
            (
                usize::try_from(ggml_sys::ggml_blck_size(ty)).ok()?,
                ggml_sys::ggml_type_size(ty),
                (*ggml_sys::ggml_get_type_traits(ty)).to_float,
            )
        };
        let own: Option<Own> = match ty {
            0 => Some(plain),
            2 => Some(q4_0),
            3 => Some(q4_1),
            6 => Some(q5_0),
            7 => Some(q5_1),
            8 => Some(q8_0),
            _ => None,
        };
        let run = own.map(Run::Own).or(decode.map(Run::Ggml))?;
        (block > 0).then_some(Self { block, size, run })
    }

    /// Bytes of `n` elements; none if they are no whole blocks.
    pub fn bytes(&self, n: usize) -> Option<usize> {
        n.is_multiple_of(self.block)
            .then(|| n / self.block * self.size)
    }

    /// Decode `bytes` into `out`.
    ///
    /// # Panics
    /// If `bytes` are not those of as many elements as `out` holds.
    pub fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(self.bytes(out.len()), Some(bytes.len()), "whole blocks");
        match self.run {
            Run::Own(decode) => decode(bytes, out),
            // SAFETY: the decoder reads exactly these bytes and writes `out.len()` floats; ggml's
            // block structs are read with unaligned-safe loads (alignment 1 or 2, and GGUF data is
            // at least 8-aligned per tensor, rows a multiple of the block).
            Run::Ggml(decode) => unsafe {
                decode(bytes.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64);
            },
        }
    }
}

/// Weights in a block.
const N: usize = 32;

fn plain(bytes: &[u8], out: &mut [f32]) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *o = f32::from_le_bytes(*b);
    }
}

/// The half at byte `at` of a block.
#[inline(always)]
fn half<const SIZE: usize>(block: &[u8; SIZE], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The two sixteens of four-bit numbers from byte `at` on.
#[inline(always)]
fn nibbles<const SIZE: usize>(block: &[u8; SIZE], at: usize) -> [i32; N] {
    let mut x = [0; N];
    for i in 0..N / 2 {
        x[i] = i32::from(block[at + i] & 15);
        x[i + N / 2] = i32::from(block[at + i] >> 4);
    }
    x
}

/// The same with a fifth bit each, from the word at byte `at` that stands before them.
#[inline(always)]
fn fives<const SIZE: usize>(block: &[u8; SIZE], at: usize) -> [i32; N] {
    let word = [block[at], block[at + 1], block[at + 2], block[at + 3]];
    let high = u32::from_le_bytes(word);
    let mut x = nibbles(block, at + 4);
    for (i, x) in x.iter_mut().enumerate() {
        *x |= ((high >> i & 1) << 4) as i32;
    }
    x
}

/// Decode blocks of `SIZE` bytes.
#[inline(always)]
fn blocks<const SIZE: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; SIZE]) -> [f32; N],
) {
    let (bytes, _) = bytes.as_chunks::<SIZE>();
    let (out, _) = out.as_chunks_mut::<N>();
    for (block, out) in bytes.iter().zip(out) {
        *out = decode(block);
    }
}

fn q8_0(bytes: &[u8], out: &mut [f32]) {
    blocks::<34>(bytes, out, |block| {
        let (d, mut x) = (half(block, 0), [0f32; N]);
        for (i, x) in x.iter_mut().enumerate() {
            *x = f32::from(block[2 + i] as i8) * d;
        }
        x
    });
}

fn q4_0(bytes: &[u8], out: &mut [f32]) {
    blocks::<18>(bytes, out, |block| {
        let d = half(block, 0);
        nibbles(block, 2).map(|q| (q - 8) as f32 * d)
    });
}

fn q5_0(bytes: &[u8], out: &mut [f32]) {
    blocks::<22>(bytes, out, |block| {
        let d = half(block, 0);
        fives(block, 2).map(|q| (q - 16) as f32 * d)
    });
}

fn q4_1(bytes: &[u8], out: &mut [f32]) {
    blocks::<20>(bytes, out, |block| {
        let (d, m) = (half(block, 0), half(block, 2));
        nibbles(block, 4).map(|q| q as f32 * d + m)
    });
}

fn q5_1(bytes: &[u8], out: &mut [f32]) {
    blocks::<24>(bytes, out, |block| {
        let (d, m) = (half(block, 0), half(block, 2));
        fives(block, 4).map(|q| q as f32 * d + m)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    /// Arbitrary bytes: every code under every scale, infinite ones and NaN included.
    #[test]
    fn own_decoders_give_ggmls_bits() {
        let mut rng = SplitMix64::stream(3, 5);
        for ty in [2, 3, 6, 7, 8] {
            let decoder = Decoder::of(ty).expect("known");
            assert!(matches!(decoder.run, Run::Own(_)));
            let n = 512 * decoder.block;
            let n_bytes = decoder.bytes(n).expect("whole blocks");
            let bytes: Vec<u8> = (0..n_bytes).map(|_| rng.draw() as u8).collect();
            let (mut ours, mut theirs) = (vec![0f32; n], vec![0f32; n]);
            decoder.decode(&bytes, &mut ours);
            // SAFETY: a valid type with a decoder; as many bytes as `n` elements take.
            unsafe {
                let decode = (*ggml_sys::ggml_get_type_traits(ty)).to_float;
                decode.expect("it has one")(bytes.as_ptr().cast(), theirs.as_mut_ptr(), n as i64);
            }
            for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                assert!(same, "type {ty}, element {i}: {a} for {b}");
            }
        }
    }
}
