//! Random Q4_K and Q6_K blocks, written as they lie in the file: no float is ever encoded.
//!
//! Codes are sums of two uniform numbers (a triangle, about as wide as what the encoder makes of
//! normal weights), scales uniform in their upper half. Both are centred, so that a block has mean
//! 0 and a standard deviation that d alone sets.

use half::f16;
use nepenthe::gguf::GgmlType;
use nepenthe::rng::SplitMix64;

/// Scales drawn: 32..=63 of 63.
const SCALES: std::ops::Range<u8> = 32..64;
/// Mean of Q4_K's codes, which the block's minimum takes off.
const MEAN_Q4: f32 = 7.5;

/// Append one block of 256 weights with standard deviation `sd`.
pub fn push(out: &mut Vec<u8>, ty: GgmlType, sd: f32, rng: &mut SplitMix64) {
    match ty {
        GgmlType::Q4_K => q4_k(out, sd, rng),
        GgmlType::Q6_K => q6_k(out, sd, rng),
        other => unreachable!("no {other} in these files"),
    }
}

/// √E[sc²] over [`SCALES`].
fn scale_rms() -> f32 {
    let n = SCALES.len() as f32;
    let squares = SCALES.map(|s| f32::from(s).powi(2)).sum::<f32>();
    (squares / n).sqrt()
}

fn scales<const N: usize>(rng: &mut SplitMix64) -> [u8; N] {
    std::array::from_fn(|_| SCALES.start + rng.below(SCALES.len()) as u8)
}

/// `block_q4_K`: d, dmin, eight 6-bit scales and minima in 12 bytes, 256 nibbles.
fn q4_k(out: &mut Vec<u8>, sd: f32, rng: &mut SplitMix64) {
    // Variance of 0..=7 + 0..=7 + 0..=1.
    let code_sd = (2.0 * 63.0 / 12.0 + 3.0 / 12.0f32).sqrt();
    let d = sd / (scale_rms() * code_sd);
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(f16::from_f32(MEAN_Q4 * d).to_le_bytes());
    // Minimum = scale: each group's mean code stands for 0.
    let s: [u8; 8] = scales(rng);
    let top: [u8; 4] = std::array::from_fn(|g| s[g] | (s[g + 4] >> 4 << 6));
    out.extend(top);
    out.extend(top);
    out.extend((0..4).map(|g| (s[g + 4] & 15) | (s[g + 4] & 15) << 4));
    for _ in 0..32 {
        let codes = rng
            .draw()
            .to_le_bytes()
            .map(|b| (b & 7) + (b >> 3 & 7) + (b >> 6 & 1));
        out.extend(codes.chunks_exact(2).map(|c| c[0] | c[1] << 4));
    }
}

/// `block_q6_K`: 256 low nibbles, 256 high pairs of bits, sixteen 8-bit scales, d.
fn q6_k(out: &mut Vec<u8>, sd: f32, rng: &mut SplitMix64) {
    // Variance of 0..=31 + 0..=31; with 1 added the mean is 32, which stands for 0.
    let code_sd = (2.0 * 1023.0 / 12.0f32).sqrt();
    let d = sd / (scale_rms() * code_sd);
    let mut codes = [0u8; 256];
    for four in codes.chunks_exact_mut(4) {
        let bits = rng.draw();
        for (i, code) in four.iter_mut().enumerate() {
            let ten = bits >> (10 * i);
            *code = (ten & 31) as u8 + (ten >> 5 & 31) as u8 + 1;
        }
    }
    let mut block = [0u8; 192];
    for (i, code) in codes.into_iter().enumerate() {
        block[i / 128 * 64 + i % 64] |= (code & 15) << (i % 128 / 64 * 4);
        block[128 + i / 128 * 32 + i % 32] |= (code >> 4) << (i % 128 / 32 * 2);
    }
    out.extend(block);
    out.extend(scales::<16>(rng));
    out.extend(f16::from_f32(d).to_le_bytes());
}
