//! Weights written on a finer grid of the same form, exactly: every level of the old grid is one of
//! the new, whose step is a whole fraction of the old one. What re-encoding loses of weights on a
//! uniform grid (up to half a step of the new one, as neither end nor number of levels fit) is often
//! more than the update that is to be merged.

use crate::gguf::GgmlType;
use half::f16;

/// Weights in a block of the old types.
const N: usize = 32;

/// A block on a uniform grid: weight i is `d·codes[i] + m`.
struct Uniform {
    codes: [u8; N],
    d: f32,
    m: f32,
}

/// Blocks `bytes` of type `from` on the grid of `to`, if that refines theirs. Exact as long as the
/// smaller scale is a normal f16.
pub fn refine(from: GgmlType, to: GgmlType, bytes: &[u8]) -> Option<Vec<u8>> {
    use GgmlType as T;
    if (from, to) == (T::Q4_K, T::Q5_K) {
        return Some(bytes.chunks_exact(144).flat_map(q4_k_as_q5_k).collect());
    }
    let read: fn(&[u8]) -> Uniform = match from {
        T::Q4_0 => q4_0,
        T::Q4_1 => q4_1,
        T::Q5_0 => q5_0,
        _ => return None,
    };
    let write: fn(&Uniform, &mut Vec<u8>) = match (from, to) {
        (T::Q4_0 | T::Q4_1, T::Q5_1) => q5_1,
        (T::Q5_0, T::Q8_0) => q8_0,
        _ => return None,
    };
    let size = from.row_bytes(N as u64)? as usize;
    let mut out = Vec::new();
    for block in bytes.chunks_exact(size) {
        write(&read(block), &mut out);
    }
    Some(out)
}

fn scale(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Codes of four bits: the low halves of 16 bytes, then the high ones.
fn nibbles(bytes: &[u8]) -> [u8; N] {
    std::array::from_fn(|i| bytes[i % 16] >> (i / 16 * 4) & 15)
}

/// f16 d, 16 bytes of codes; weight `d·(code - 8)`.
fn q4_0(b: &[u8]) -> Uniform {
    let d = scale(b);
    Uniform {
        codes: nibbles(&b[2..]),
        d,
        m: -8.0 * d,
    }
}

/// f16 d, f16 m, 16 bytes of codes.
fn q4_1(b: &[u8]) -> Uniform {
    Uniform {
        codes: nibbles(&b[4..]),
        d: scale(b),
        m: scale(&b[2..]),
    }
}

/// f16 d, the fifth bits of 32 codes, 16 bytes of the others; weight `d·(code - 16)`.
fn q5_0(b: &[u8]) -> Uniform {
    let d = scale(b);
    let low = nibbles(&b[6..]);
    Uniform {
        codes: std::array::from_fn(|i| low[i] | (b[2 + i / 8] >> (i % 8) & 1) << 4),
        d,
        m: -16.0 * d,
    }
}

/// f16 d, f16 m, the fifth bits, 16 bytes of the others: 16 levels become every other one of 32.
fn q5_1(u: &Uniform, out: &mut Vec<u8>) {
    out.extend(f16::from_f32(u.d / 2.0).to_le_bytes());
    out.extend(f16::from_f32(u.m).to_le_bytes());
    let codes = u.codes.map(|c| 2 * c);
    let fifth = |byte: usize| (0..8).fold(0, |bits, i| bits | (codes[8 * byte + i] >> 4) << i);
    out.extend((0..4).map(fifth));
    out.extend((0..16).map(|i| codes[i] & 15 | (codes[i + 16] & 15) << 4));
}

/// f16 d, 32 bytes of codes: 32 levels become every eighth one of 256. `m` is 16 steps below 0.
fn q8_0(u: &Uniform, out: &mut Vec<u8>) {
    out.extend(f16::from_f32(u.d / 8.0).to_le_bytes());
    out.extend(u.codes.map(|c| (8 * (i16::from(c) - 16)) as i8 as u8));
}

/// Both have f16 d and dmin and 12 bytes of scales and mins, then 128 bytes of four bits for 256
/// codes; Q5_K has 32 bytes of fifth bits between. 16 levels become every other one of 32, d half of
/// what it was: a code's highest bit is its fifth then.
fn q4_k_as_q5_k(b: &[u8]) -> [u8; 176] {
    let (head, codes) = b.split_at(16);
    let mut out = [0; 176];
    out[..16].copy_from_slice(head);
    out[..2].copy_from_slice(&f16::from_f32(scale(b) / 2.0).to_le_bytes());
    // A byte holds codes of two runs of 32; each run has its own bit in a byte of fifth bits.
    for (at, pair) in codes.iter().enumerate() {
        let (run, place) = (at / 32 * 2, at % 32);
        out[16 + place] |= (pair >> 3 & 1) << run | (pair >> 7) << (run + 1);
        out[48 + at] = pair << 1 & 0xee;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::{dequantize, quantize};
    use crate::rng::SplitMix64;

    #[test]
    fn no_weight_moves() {
        use GgmlType as T;
        let mut rng = SplitMix64(4);
        let values: Vec<f32> = (0..64 * N).map(|_| 0.1 * rng.normal()).collect();
        let n_in = 8 * N;
        for (from, to) in [
            (T::Q4_0, T::Q5_1),
            (T::Q4_1, T::Q5_1),
            (T::Q5_0, T::Q8_0),
            (T::Q4_K, T::Q5_K),
        ] {
            let bytes = quantize(from.id(), &values, n_in, None).expect("a type with an encoder");
            let finer = refine(from, to, &bytes).expect("a finer grid");
            let decode = |ty: T, bytes: &[u8]| {
                let mut out = vec![0f32; values.len()];
                dequantize(ty.id(), bytes, &mut out).expect("whole blocks");
                out
            };
            let (old, new) = (decode(from, &bytes), decode(to, &finer));
            assert_eq!(old, new, "{from} to {to}");
            // Encoding anew does move them.
            let anew = quantize(to.id(), &old, n_in, None).expect("a type with an encoder");
            assert_ne!(decode(to, &anew), old, "{from} to {to}");
        }
        assert!(refine(T::Q4_K, T::Q6_K, &[]).is_none());
        assert!(refine(T::Q5_1, T::Q8_0, &[]).is_none());
    }
}
