//! Products in BF16 on AVX-512: each instruction multiplies pairs and adds them up in f32.

use super::kernel::{Kernel, Out};
use std::arch::x86_64::{
    __m256bh, __m256i, __m512bh, __m512i, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh, _mm512_dpbf16_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_or_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_ps,
    _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64,
};
use std::mem::transmute;

/// Lanes of a register.
const WIDTH: usize = 16;
const LANES: usize = 2 * WIDTH;
/// Rows at a time: 24 of the 32 registers hold their sums.
const ROWS: usize = 12;

/// BF16 in, f32 out.
pub struct Bf16;

impl Kernel for Bf16 {
    const LANES: usize = LANES;
    const DEPTH: usize = 2;
    const ROWS: usize = ROWS;
    const STRIDE: usize = WIDTH;

    fn turn(lines: &[f32], stride: usize, depth: usize, units: &mut [u32]) {
        let whole = depth / LANES * LANES;
        assert!(lines.len() >= (LANES - 1) * stride + depth && units.len() >= depth / 2 * LANES);
        for from in (0..whole).step_by(LANES) {
            for lane in [0, WIDTH] {
                let (lines, units) = (
                    &lines[lane * stride + from..],
                    &mut units[from / 2 * LANES + lane..],
                );
                // SAFETY: this build is for processors that have the instructions; 16 lines of 32
                // numbers and 16 units of 16 lanes are there, as was asserted.
                unsafe {
                    turn_block(lines.as_ptr(), (stride, WIDTH), units.as_mut_ptr(), LANES);
                };
            }
        }
        for (lane, line) in lines.chunks(stride).take(LANES).enumerate() {
            for (k, pair) in line[..depth].chunks_exact(2).enumerate().skip(whole / 2) {
                units[k * LANES + lane] = both(pair);
            }
        }
    }

    fn pair(a: &[f32], b: &[f32], units: &mut [u32]) {
        assert!(a.len() == LANES && b.len() == LANES && units.len() == LANES);
        // SAFETY: as above; all three are as long as two registers.
        unsafe { pair(a.as_ptr(), b.as_ptr(), units.as_mut_ptr()) };
    }

    fn tile(rows: &[f32], inner: usize, units: &mut [u32]) {
        let n_rows = rows.len() / inner;
        let whole = inner / LANES * LANES;
        assert!(n_rows <= ROWS && units.len() >= inner / 2 * WIDTH);
        for from in (0..whole).step_by(LANES) {
            // SAFETY: as above; `n_rows` rows and 16 units of 16 are there.
            unsafe {
                let units = units[from / 2 * WIDTH..].as_mut_ptr();
                turn_block(rows[from..].as_ptr(), (inner, n_rows), units, WIDTH);
            }
        }
        for (r, row) in rows.chunks_exact(inner).enumerate() {
            for (k, pair) in row.chunks_exact(2).enumerate().skip(whole / 2) {
                units[k * WIDTH + r] = both(pair);
            }
        }
    }

    unsafe fn multiply(panel: &[u32], tile: &[u32], out: Out, add: bool) {
        let n_units = tile.len() / WIDTH;
        assert!(panel.len() >= n_units * LANES && (1..=ROWS).contains(&out.n_rows));
        let sums = match out.n_rows {
            12 => sums::<12>,
            11 => sums::<11>,
            10 => sums::<10>,
            9 => sums::<9>,
            8 => sums::<8>,
            7 => sums::<7>,
            6 => sums::<6>,
            5 => sums::<5>,
            4 => sums::<4>,
            3 => sums::<3>,
            2 => sums::<2>,
            _ => sums::<1>,
        };
        // SAFETY: as above; units were counted, and `out` is the caller's promise.
        unsafe { sums(panel.as_ptr(), tile.as_ptr(), n_units, out, add) };
    }
}

/// Two numbers in one unit.
fn both(pair: &[f32]) -> u32 {
    let [a, b] = [pair[0], pair[1]].map(|x| u32::from(half::bf16::from_f32(x).to_bits()));
    a | b << 16
}

/// `out (+)= panel · tile` for `N` rows.
///
/// # Safety
/// `n_units` units in both, `out` to be written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn sums<const N: usize>(
    panel: *const u32,
    tile: *const u32,
    n_units: usize,
    out: Out,
    add: bool,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    for u in 0..n_units {
        // SAFETY: the caller's promise; `__m512bh` is 512 bits of any pattern.
        unsafe {
            let w = panel.add(u * LANES).cast::<i32>();
            let w0: __m512bh = transmute(_mm512_loadu_si512(w.cast()));
            let w1: __m512bh = transmute(_mm512_loadu_si512(w.add(WIDTH).cast()));
            let x = tile.add(u * WIDTH).cast::<i32>();
            for (r, sum) in sums.iter_mut().enumerate() {
                let x: __m512bh = transmute(_mm512_set1_epi32(*x.add(r)));
                sum[0] = _mm512_dpbf16_ps(sum[0], w0, x);
                sum[1] = _mm512_dpbf16_ps(sum[1], w1, x);
            }
        }
    }
    for (r, sum) in sums.iter().enumerate() {
        // SAFETY: the caller's promise for `n_lanes` lanes.
        unsafe {
            let at = out.at.add(r * out.outer);
            if out.n_lanes == LANES {
                let [a, b] = match add {
                    true => [
                        _mm512_add_ps(_mm512_loadu_ps(at), sum[0]),
                        _mm512_add_ps(_mm512_loadu_ps(at.add(WIDTH)), sum[1]),
                    ],
                    false => *sum,
                };
                _mm512_storeu_ps(at, a);
                _mm512_storeu_ps(at.add(WIDTH), b);
            } else {
                let mut lanes = [0f32; LANES];
                _mm512_storeu_ps(lanes.as_mut_ptr(), sum[0]);
                _mm512_storeu_ps(lanes.as_mut_ptr().add(WIDTH), sum[1]);
                out.put(r, &lanes, add);
            }
        }
    }
}

/// Up to 16 lines of 32 numbers into 16 units of 16 lanes, `apart` from one another.
///
/// # Safety
/// Both are there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn turn_block(
    lines: *const f32,
    (stride, n_lines): (usize, usize),
    units: *mut u32,
    apart: usize,
) {
    // Loops, not closures: those would be compiled without the instructions.
    let mut rows = [_mm512_setzero_si512(); WIDTH];
    for (i, row) in rows.iter_mut().enumerate().take(n_lines) {
        // SAFETY: the caller's promise; both types are 512 bits of any pattern.
        unsafe {
            let line = lines.add(i * stride);
            let (low, high) = (_mm512_loadu_ps(line), _mm512_loadu_ps(line.add(WIDTH)));
            *row = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        }
    }
    for (u, row) in transposed(rows).into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(units.add(u * apart).cast(), row) };
    }
}

/// A 16 x 16 matrix of 32-bit numbers, transposed.
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut a = rows;
    // Within 128 bits: 4 x 4 matrices, each transposed.
    for r in 0..4 {
        let (r0, r1) = (rows[4 * r], rows[4 * r + 1]);
        let (r2, r3) = (rows[4 * r + 2], rows[4 * r + 3]);
        let (ab, cd) = (_mm512_unpacklo_epi32(r0, r1), _mm512_unpacklo_epi32(r2, r3));
        let (ef, gh) = (_mm512_unpackhi_epi32(r0, r1), _mm512_unpackhi_epi32(r2, r3));
        a[4 * r] = _mm512_unpacklo_epi64(ab, cd);
        a[4 * r + 1] = _mm512_unpackhi_epi64(ab, cd);
        a[4 * r + 2] = _mm512_unpacklo_epi64(ef, gh);
        a[4 * r + 3] = _mm512_unpackhi_epi64(ef, gh);
    }
    // Then the 4 x 4 matrix of those.
    let mut out = a;
    for c in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x44>(a[c], a[4 + c]);
        let high = _mm512_shuffle_i32x4::<0xee>(a[c], a[4 + c]);
        let low2 = _mm512_shuffle_i32x4::<0x44>(a[8 + c], a[12 + c]);
        let high2 = _mm512_shuffle_i32x4::<0xee>(a[8 + c], a[12 + c]);
        out[c] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        out[4 + c] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        out[8 + c] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
    out
}

/// One unit of 32 lanes: the first line's numbers in the lower halves, the second's in the upper.
///
/// # Safety
/// 32 of each.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pair(a: *const f32, b: *const f32, units: *mut u32) {
    for first in [0, WIDTH] {
        // SAFETY: the caller's promise; the converted halves are 256 bits of any pattern.
        unsafe {
            let low = _mm512_cvtneps_pbh(_mm512_loadu_ps(a.add(first)));
            let high = _mm512_cvtneps_pbh(_mm512_loadu_ps(b.add(first)));
            let (low, high) = (
                _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(low)),
                _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(high)),
            );
            let both = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
            _mm512_storeu_ps(units.add(first).cast(), _mm512_castsi512_ps(both));
        }
    }
}
