//! Descent on e·H·eᵀ over one row's codes, one or two at a time.
//!
//! With g = e·H, moving value j by a changes the loss by a²·H_jj − 2a·g_j: least at
//! a = g_j/H_jj, of which the grid takes the nearest. Where no single code helps any more, two
//! may: moving k by b as well adds b²·H_kk − 2b·(g_k − a·H_jk). Every move lowers the loss.

use super::factor::Factor;
use super::feedback::Search;
use super::grid::{Cells, Grid};

/// Smallest relative gain of a move: less is rounding noise, and could go round in circles.
const LEAST_GAIN: f32 = 1e-4;
/// Independent maxima, one per vector lane.
const LANES: usize = 16;

/// One row of a tile.
pub(super) struct Row<'a> {
    grid: &'a Grid,
    cells: &'a Cells,
    first: usize,
    f: &'a Factor,
    code: &'a mut [i32],
    value: &'a mut [f32],
    gradient: &'a mut [f32],
    /// Codes moved.
    pub n_moves: usize,
    /// By how much the loss fell.
    pub gain: f64,
}

impl<'a> Row<'a> {
    /// The row whose cells start at `first`; `gradient` [n_in] is e·H and is kept up to date.
    pub fn new(
        grid: &'a Grid,
        cells: &'a Cells,
        first: usize,
        f: &'a Factor,
        code: &'a mut [i32],
        value: &'a mut [f32],
        gradient: &'a mut [f32],
    ) -> Self {
        Self {
            grid,
            cells,
            first,
            f,
            code,
            value,
            gradient,
            n_moves: 0,
            gain: 0.0,
        }
    }

    /// Single codes until nothing changes, then pairs and what they set free.
    pub fn descend(&mut self, search: Search) {
        self.singles(search.passes);
        if !self.grid.has_codes() {
            return;
        }
        for _ in 0..search.pair_passes {
            if self.pairs() == 0 {
                break;
            }
            self.singles(search.passes);
        }
    }

    fn singles(&mut self, passes: usize) {
        for _ in 0..passes {
            let before = self.n_moves;
            for j in 0..self.code.len() {
                let wanted = self.value[j] + self.gradient[j] / self.curvature(j);
                self.try_move(j, wanted);
            }
            if self.n_moves == before {
                break;
            }
        }
    }

    fn curvature(&self, j: usize) -> f32 {
        self.f.h_row(j)[j]
    }

    fn nearest(&self, j: usize, v: f32) -> (i32, f32) {
        self.grid.nearest(self.cells, self.first + j, v)
    }

    /// Move code j to the nearest of `wanted` if that lowers the loss.
    fn try_move(&mut self, j: usize, wanted: f32) {
        let (q, v) = self.nearest(j, wanted);
        if q == self.code[j] {
            return;
        }
        let (by, curvature) = (v - self.value[j], self.curvature(j));
        let lowers = by * (2.0 * self.gradient[j] - by * curvature);
        if lowers > LEAST_GAIN * by * by * curvature {
            self.set(j, q, v);
            self.n_moves += 1;
            self.gain += f64::from(lowers);
        }
    }

    fn set(&mut self, j: usize, q: i32, v: f32) {
        let by = v - self.value[j];
        (self.code[j], self.value[j]) = (q, v);
        for (g, h) in self.gradient.iter_mut().zip(self.f.h_row(j)) {
            *g -= by * h;
        }
    }

    /// For every code and both directions, the best partner; returns the number of pairs moved.
    fn pairs(&mut self) -> usize {
        let n = self.code.len();
        let steps: Vec<f32> = self.cells.step[self.first..self.first + n]
            .iter()
            .map(|s| s.abs())
            .collect();
        // b²·H_kk for one step.
        let costs: Vec<f32> = (0..n)
            .map(|k| steps[k] * steps[k] * self.curvature(k))
            .collect();
        let longest = steps.iter().fold(0f32, |m, s| m.max(*s));
        let mut moved = 0;
        for (j, &step) in steps.iter().enumerate() {
            for sign in [1.0, -1.0] {
                let (q, v) = self.nearest(j, self.value[j] + sign * step);
                if q == self.code[j] {
                    continue;
                }
                let (a, curvature) = (v - self.value[j], self.curvature(j));
                let cost = a * (a * curvature - 2.0 * self.gradient[j]);
                // A partner's own move costs at least nothing: it gains 2|a·b·H_jk| at most.
                if cost >= 2.0 * a.abs() * longest * self.f.coupling[j] {
                    continue;
                }
                let least = cost.max(0.0) + LEAST_GAIN * a * a * curvature;
                if let Some((k, p, u, lowers)) = self.partner(j, a, &steps, &costs, least) {
                    self.set(j, q, v);
                    self.set(k, p, u);
                    self.n_moves += 2;
                    self.gain += f64::from(lowers - cost);
                    moved += 1;
                }
            }
        }
        moved
    }

    /// The code k whose step gains most once j has moved by `a`, if that is over `least`, with its
    /// new code, new value and gain.
    fn partner(
        &self,
        j: usize,
        a: f32,
        steps: &[f32],
        costs: &[f32],
        least: f32,
    ) -> Option<(usize, i32, f32, f32)> {
        let n = self.f.n_in;
        let h = self.f.h_row(j);
        let gain = |g: f32, h: f32, s: f32, c: f32| 2.0 * s * (g - a * h).abs() - c;
        let mut best = [0f32; LANES];
        let lanes = self
            .gradient
            .chunks(LANES)
            .zip(h.chunks(LANES))
            .zip(steps.chunks(LANES).zip(costs.chunks(LANES)));
        for ((g, h), (s, c)) in lanes {
            let each = g.iter().zip(h).zip(s.iter().zip(c));
            for (best, ((g, h), (s, c))) in best.iter_mut().zip(each) {
                let x = gain(*g, *h, *s, *c);
                *best = if x > *best { x } else { *best };
            }
        }
        let best = best.iter().fold(0f32, |m, b| m.max(*b));
        if best <= least {
            return None;
        }
        // A step may lead off the grid: the largest gain need not be one that can be had.
        let mut found = None;
        let mut most = least;
        for k in (0..n).filter(|&k| k != j) {
            if gain(self.gradient[k], h[k], steps[k], costs[k]) <= most {
                continue;
            }
            let slope = self.gradient[k] - a * h[k];
            let (p, u) = self.nearest(k, self.value[k] + steps[k].copysign(slope));
            let b = u - self.value[k];
            let lowers = b * (2.0 * slope - b * self.curvature(k));
            if p != self.code[k] && lowers > most {
                (found, most) = (Some((k, p, u, lowers)), lowers);
            }
        }
        found
    }
}
