//! Products in f32, at the width this build's vectors have.

use super::super::lanes::{Vector, WIDTH};
use super::kernel::{Kernel, Out};
use bytemuck::cast_slice;

const LANES: usize = 2 * WIDTH;
/// Sums of two vectors for each row stay in registers.
const ROWS: usize = if WIDTH == 16 { 12 } else { 6 };

/// f32.
pub struct Float;

impl Kernel for Float {
    const LANES: usize = LANES;
    const DEPTH: usize = 1;
    const ROWS: usize = ROWS;
    const STRIDE: usize = ROWS;

    fn turn(lines: &[f32], stride: usize, depth: usize, units: &mut [u32]) {
        // A cache line of each line at a time.
        for first in (0..depth).step_by(16) {
            for (lane, line) in lines.chunks(stride).take(LANES).enumerate() {
                let line = &line[first..depth.min(first + 16)];
                for (k, x) in line.iter().enumerate() {
                    units[(first + k) * LANES + lane] = x.to_bits();
                }
            }
        }
    }

    fn pair(a: &[f32], _: &[f32], units: &mut [u32]) {
        units.iter_mut().zip(a).for_each(|(u, x)| *u = x.to_bits());
    }

    fn tile(rows: &[f32], inner: usize, units: &mut [u32]) {
        for first in (0..inner).step_by(16) {
            for (r, row) in rows.chunks_exact(inner).enumerate() {
                let row = &row[first..inner.min(first + 16)];
                for (k, x) in row.iter().enumerate() {
                    units[(first + k) * ROWS + r] = x.to_bits();
                }
            }
        }
    }

    unsafe fn multiply(panel: &[u32], tile: &[u32], out: Out, add: bool) {
        let sums = sums(cast_slice(panel), cast_slice(tile));
        for (r, sums) in sums.iter().enumerate().take(out.n_rows) {
            let sums: [f32; LANES] = bytemuck::cast(*sums);
            // SAFETY: the caller's promise.
            unsafe { out.put(r, &sums, add) };
        }
    }
}

fn sums(panel: &[f32], tile: &[f32]) -> [[Vector; 2]; ROWS] {
    let mut sums = [[Vector::default(); 2]; ROWS];
    let (panel, _) = panel.as_chunks::<LANES>();
    let (tile, _) = tile.as_chunks::<ROWS>();
    for (w, x) in panel.iter().zip(tile) {
        let w: [Vector; 2] = bytemuck::cast(*w);
        for r in 0..ROWS {
            let x = Vector::splat(x[r]);
            sums[r][0] = w[0].mul_add(x, sums[r][0]);
            sums[r][1] = w[1].mul_add(x, sums[r][1]);
        }
    }
    sums
}
