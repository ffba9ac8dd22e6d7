//! Coordinate descent on e·H·eᵀ over one row's codes.
//!
//! With g = e·H, moving value j by δ changes the loss by δ²·H_jj − 2δ·g_j: least at
//! δ = g_j/H_jj, of which the grid takes the nearest. Every move lowers the loss.

use super::factor::Factor;
use super::feedback::Search;
use super::grid::{Cells, Grid};

/// Smallest relative gain of a move: less is rounding noise, and could go round in circles.
const LEAST_GAIN: f32 = 1e-4;

/// Descend in the row whose cells start at `first`; `gradient` [n_in] is e·H and is kept up to
/// date. Returns the number of moves and by how much the loss fell.
#[allow(clippy::too_many_arguments, reason = "the parts of one row")]
pub(super) fn descend(
    grid: &Grid,
    cells: &Cells,
    first: usize,
    code: &mut [i32],
    value: &mut [f32],
    gradient: &mut [f32],
    f: &Factor,
    search: Search,
) -> (usize, f64) {
    let n = f.n_in;
    let (mut moves, mut gain) = (0, 0f64);
    for _ in 0..search.passes {
        let before = moves;
        for j in 0..n {
            let (g, curvature) = (gradient[j], f.h[j * n + j]);
            let (q, v) = grid.nearest(cells, first + j, value[j] + g / curvature);
            if q == code[j] {
                continue;
            }
            let by = v - value[j];
            let lowers = by * (2.0 * g - by * curvature);
            if lowers <= LEAST_GAIN * by * by * curvature {
                continue;
            }
            (code[j], value[j]) = (q, v);
            for (g, h) in gradient.iter_mut().zip(&f.h[j * n..(j + 1) * n]) {
                *g -= by * h;
            }
            moves += 1;
            gain += f64::from(lowers);
        }
        if moves == before {
            break;
        }
    }
    (moves, gain)
}
