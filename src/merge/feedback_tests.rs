#![allow(clippy::needless_range_loop, reason = "written as the formulas are")]

use super::*;
use crate::gguf::GgmlType;
use crate::merge::grid::tests::{CODED, random_blocks};
use crate::patch::delta::Delta;
use crate::rng::SplitMix64;

const N: usize = 512;
const ROWS: usize = 66;
const TYPES: [GgmlType; 12] = {
    let c = CODED;
    [
        c[0],
        c[1],
        c[2],
        c[3],
        c[4],
        c[5],
        c[6],
        c[7],
        c[8],
        c[9],
        GgmlType::F16,
        GgmlType::BF16,
    ]
};

/// Second moments as layers have them: a few strong directions over a decaying rest.
fn moments(n: usize, rng: &mut SplitMix64) -> Vec<f32> {
    let directions: Vec<Vec<f32>> = (0..2 * n)
        .map(|i| {
            let strength = 10.0 / (1.0 + i as f32);
            (0..n).map(|_| strength * rng.normal()).collect()
        })
        .collect();
    let mut h = vec![0f64; n * n];
    for x in &directions {
        for i in 0..n {
            for j in 0..n {
                h[i * n + j] += f64::from(x[i]) * f64::from(x[j]);
            }
        }
    }
    h.iter().map(|&v| v as f32).collect()
}

fn tensor(ty: GgmlType, n: usize, rows: usize, rng: &mut SplitMix64) -> Vec<u8> {
    let mut floats = || 0.05 * rng.normal();
    match ty {
        GgmlType::F16 => (0..n * rows)
            .flat_map(|_| half::f16::from_f32(floats()).to_le_bytes())
            .collect(),
        GgmlType::BF16 => (0..n * rows)
            .flat_map(|_| half::bf16::from_f32(floats()).to_le_bytes())
            .collect(),
        _ => random_blocks(ty, n * rows / ty.block_len() as usize, rng),
    }
}

struct Case {
    grid: Grid,
    bytes: Vec<u8>,
    values: Vec<f32>,
    delta: Vec<f32>,
}

impl Case {
    /// A tensor and an update of `relative` its norm, of rank 4.
    fn new(ty: GgmlType, n: usize, rows: usize, relative: f64, seed: u64) -> Self {
        let mut rng = SplitMix64::stream(seed, ty.id().into());
        let grid = Grid::new(ty, n).unwrap();
        let bytes = tensor(ty, n, rows, &mut rng);
        let mut cells = Cells::default();
        grid.decode(&bytes, &mut cells).unwrap();
        let values = cells.value;
        let a: Vec<f32> = (0..4 * n).map(|_| rng.normal()).collect();
        let b: Vec<f32> = (0..4 * rows).map(|_| rng.normal()).collect();
        let mut d = Delta::new(n, rows);
        d.push(&a, &b, 4, 1.0).unwrap();
        let mut delta = vec![0f32; n * rows];
        for (r, row) in delta.chunks_exact_mut(n).enumerate() {
            d.add_row(r, row);
        }
        let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let scale = relative * norm(&values) / norm(&delta);
        delta.iter_mut().for_each(|v| *v *= scale as f32);
        Self {
            grid,
            bytes,
            values,
            delta,
        }
    }

    fn round(&self, factor: Option<&Factor>, search: Search) -> (Vec<u8>, Rounded) {
        let n = self.grid.n_in();
        let mut bytes = self.bytes.clone();
        let update = |r: usize, row: &mut [f32]| {
            for (v, d) in row.iter_mut().zip(&self.delta[r * n..]) {
                *v += d;
            }
        };
        let done = round_rows(&self.grid, &mut bytes, &update, factor, search).unwrap();
        (bytes, done)
    }

    /// Per row e·H·eᵀ in f64.
    fn losses(&self, bytes: &[u8], h: &[f32]) -> Vec<f64> {
        let n = self.grid.n_in();
        let mut cells = Cells::default();
        self.grid.decode(bytes, &mut cells).unwrap();
        (0..self.values.len() / n)
            .map(|r| {
                let e: Vec<f64> = (r * n..(r + 1) * n)
                    .map(|i| f64::from(self.values[i] + self.delta[i]) - f64::from(cells.value[i]))
                    .collect();
                (0..n)
                    .map(|i| e[i] * (0..n).map(|j| f64::from(h[i * n + j]) * e[j]).sum::<f64>())
                    .sum()
            })
            .collect()
    }
}

fn sweep_only() -> Search {
    Search {
        passes: 0,
        pair_passes: 0,
        refits: 0,
    }
}

fn refitted() -> Search {
    Search {
        refits: 3,
        ..Search::default()
    }
}

fn with_pairs() -> Search {
    Search {
        passes: 20,
        pair_passes: 20,
        refits: 0,
    }
}

/// GPTQ as its paper writes it: the inverse, its upper Cholesky factor, one column at a time.
fn gptq(case: &Case, h: &[f32]) -> Vec<u8> {
    let n = case.grid.n_in();
    // Gauss-Jordan in f64.
    let mut a: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let mut row: Vec<f64> = (0..n).map(|j| f64::from(h[i * n + j])).collect();
            row.extend((0..n).map(|j| f64::from(u8::from(i == j))));
            row
        })
        .collect();
    for p in 0..n {
        let pivot = a[p][p];
        a[p].iter_mut().for_each(|v| *v /= pivot);
        let row = a[p].clone();
        for (i, other) in a.iter_mut().enumerate() {
            if i != p {
                let f = other[p];
                other.iter_mut().zip(&row).for_each(|(v, r)| *v -= f * r);
            }
        }
    }
    // chol(H⁻¹) = L·Lᵀ, U = Lᵀ.
    let mut l = vec![vec![0f64; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| l[i][k] * l[j][k]).sum();
            let rest = a[i][n + j] - dot;
            l[i][j] = if i == j { rest.sqrt() } else { rest / l[j][j] };
        }
    }
    let mut cells = Cells::default();
    case.grid.decode(&case.bytes, &mut cells).unwrap();
    let mut codes = cells.code.clone();
    for r in 0..codes.len() / n {
        let mut t: Vec<f64> = (r * n..(r + 1) * n)
            .map(|i| f64::from(case.values[i] + case.delta[i]))
            .collect();
        for k in 0..n {
            let i = r * n + k;
            let (q, v) = case.grid.nearest(&cells, i, t[k] as f32);
            codes[i] = q;
            let err = (t[k] - f64::from(v)) / l[k][k];
            for j in k + 1..n {
                t[j] -= err * l[j][k];
            }
        }
    }
    let mut bytes = case.bytes.clone();
    case.grid.encode(&codes, &mut bytes).unwrap();
    bytes
}

#[test]
fn the_sweep_is_gptq() {
    let n = 96;
    let h = moments(n, &mut SplitMix64(1));
    let factor = Factor::new(h.clone(), n, 0.01).unwrap();
    for ty in [
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q8_0,
    ] {
        let case = Case::new(ty, n, 67, 0.02, 5);
        let (found, done) = case.round(Some(&factor), sweep_only());
        let wanted = gptq(&case, &factor.moments());
        // Sums in f32 and f64 may fall on two sides of a tie, and the rest of that row differs.
        let row = case.grid.row_bytes();
        let same = found
            .chunks(row)
            .zip(wanted.chunks(row))
            .filter(|(a, b)| a == b);
        assert!(same.count() >= 65 - done.n_plain, "{ty}");
    }
}

#[test]
fn the_reported_loss_is_the_loss() {
    let h = moments(N, &mut SplitMix64(2));
    let factor = Factor::new(h.clone(), N, 0.01).unwrap();
    for ty in TYPES {
        let case = Case::new(ty, N, 5, 0.01, 6);
        for search in [sweep_only(), Search::default(), with_pairs(), refitted()] {
            let (bytes, done) = case.round(Some(&factor), search);
            let wanted: f64 = case.losses(&bytes, &factor.moments()).iter().sum();
            let off = (done.loss - wanted).abs();
            assert!(
                off <= 1e-3 * wanted,
                "{ty} {search:?}: {} {wanted}",
                done.loss
            );
        }
    }
}

#[test]
fn no_row_is_worse_than_plain_rounding_and_every_pass_lowers_the_loss() {
    let h = moments(N, &mut SplitMix64(3));
    let factor = Factor::new(h.clone(), N, 0.01).unwrap();
    for ty in TYPES {
        let case = Case::new(ty, N, 8, 0.01, 7);
        let (plain, _) = case.round(None, sweep_only());
        let mut above = case.losses(&plain, &factor.moments());
        for (passes, pair_passes) in [(0, 0), (1, 0), (20, 0), (20, 20)] {
            let search = Search {
                passes,
                pair_passes,
                ..sweep_only()
            };
            let (bytes, _) = case.round(Some(&factor), search);
            let losses = case.losses(&bytes, &factor.moments());
            for (r, (l, a)) in losses.iter().zip(&above).enumerate() {
                assert!(
                    *l <= a * (1.0 + 1e-5),
                    "{ty} row {r} pass {passes}: {l} > {a}"
                );
            }
            above = losses;
        }
    }
}

#[test]
fn feedback_keeps_an_update_that_plain_rounding_loses() {
    let h = moments(N, &mut SplitMix64(4));
    let factor = Factor::new(h.clone(), N, 0.01).unwrap();
    let case = Case::new(GgmlType::Q4_K, N, ROWS, 0.01, 8);
    let sum = |bytes: &[u8]| case.losses(bytes, &h).iter().sum::<f64>();
    let plain = sum(&case.round(None, sweep_only()).0);
    let swept = sum(&case.round(Some(&factor), sweep_only()).0);
    let descended = sum(&case.round(Some(&factor), Search::default()).0);
    assert!(swept < 0.25 * plain, "{swept} {plain}");
    assert!(descended < 0.9 * swept, "{descended} {swept}");
}

/// Every row gains, and only codes and the blocks' f16 fields change: steps of a block keep their
/// ratios, offsets too.
#[test]
fn fitting_the_scales_lowers_the_loss_and_changes_nothing_but_them() {
    let h = moments(N, &mut SplitMix64(14));
    let factor = Factor::new(h, N, 0.01).unwrap();
    for ty in CODED {
        let case = Case::new(ty, N, 8, 0.01, 15);
        let losses = |search| {
            let (bytes, _) = case.round(Some(&factor), search);
            (case.losses(&bytes, &factor.moments()), bytes)
        };
        let (before, _) = losses(Search::default());
        let (after, bytes) = losses(refitted());
        for (r, (a, b)) in after.iter().zip(&before).enumerate() {
            assert!(*a <= b * (1.0 + 1e-5), "{ty} row {r}: {a} > {b}");
        }
        let sum = |l: &[f64]| l.iter().sum::<f64>();
        // There is much to gain with one scale for 32 codes, little with one for 256, or with codes
        // nearly as fine as f16 is.
        use GgmlType as T;
        let small_blocks = matches!(ty, T::Q4_0 | T::Q4_1 | T::Q5_0 | T::Q5_1);
        let most = if small_blocks { 0.95 } else { 1.0 };
        assert!(
            sum(&after) < most * sum(&before),
            "{ty}: {after:?} {before:?}"
        );
        let (mut was, mut now) = (Cells::default(), Cells::default());
        case.grid.decode(&case.bytes, &mut was).unwrap();
        case.grid.decode(&bytes, &mut now).unwrap();
        let block = ty.block_len() as usize;
        for part in [|c: &Cells| c.step.clone(), |c: &Cells| c.offset.clone()] {
            for (was, now) in part(&was).chunks(block).zip(part(&now).chunks(block)) {
                let ratios = was.iter().zip(now).filter(|(w, _)| **w != 0.0);
                let ratios: Vec<f32> = ratios.map(|(w, n)| n / w).collect();
                let first = ratios.first().copied().unwrap_or(1.0);
                assert!(first > 0.0, "{ty}: a sign turned");
                let off = ratios.iter().map(|r| (r / first - 1.0).abs());
                assert!(off.fold(0.0, f32::max) < 1e-5, "{ty}: {ratios:?}");
            }
        }
    }
}

#[test]
fn no_single_code_and_no_pair_of_steps_helps_any_more() {
    let n = 64;
    let factor = Factor::new(moments(n, &mut SplitMix64(12)), n, 0.01).unwrap();
    for ty in [GgmlType::Q4_0, GgmlType::Q5_1, GgmlType::Q8_0] {
        let case = Case::new(ty, n, 4, 0.05, 13);
        let (bytes, _) = case.round(Some(&factor), with_pairs());
        let mut cells = Cells::default();
        case.grid.decode(&bytes, &mut cells).unwrap();
        let moments = factor.moments();
        let h = |i: usize, j: usize| f64::from(moments[i * n + j]);
        for r in 0..4 {
            let at = |i: usize| r * n + i;
            let e: Vec<f64> = (0..n)
                .map(|i| f64::from(case.values[at(i)] + case.delta[at(i)] - cells.value[at(i)]))
                .collect();
            let g: Vec<f64> = (0..n)
                .map(|i| (0..n).map(|j| h(i, j) * e[j]).sum())
                .collect();
            let loss: f64 = e.iter().zip(&g).map(|(e, g)| e * g).sum();
            // Every step the grid has, as the change of value it makes.
            let steps: Vec<(usize, f64)> = (0..n)
                .flat_map(|i| [(i, 1.0), (i, -1.0)])
                .filter_map(|(i, sign)| {
                    let v = cells.value[at(i)];
                    let (q, to) = case
                        .grid
                        .nearest(&cells, at(i), v + sign * cells.step[at(i)]);
                    (q != cells.code[at(i)]).then(|| (i, f64::from(to - v)))
                })
                .collect();
            for &(i, a) in &steps {
                let single = a * a * h(i, i) - 2.0 * a * g[i];
                assert!(single > -1e-3 * loss, "{ty} row {r}: {i}");
                for &(j, b) in steps.iter().filter(|s| s.0 != i) {
                    let pair = single + b * b * h(j, j) - 2.0 * b * g[j] + 2.0 * a * b * h(i, j);
                    assert!(
                        pair > -1e-3 * loss,
                        "{ty} row {r}: {i} and {j}: {pair} of {loss}"
                    );
                }
            }
        }
    }
}

#[test]
fn no_update_changes_no_byte() {
    let h = moments(N, &mut SplitMix64(5));
    let factor = Factor::new(h.clone(), N, 0.01).unwrap();
    for ty in TYPES {
        let mut case = Case::new(ty, N, ROWS, 0.01, 9);
        case.delta.fill(0.0);
        for (factor, search) in [
            (None, Search::default()),
            (Some(&factor), Search::default()),
            (Some(&factor), refitted()),
        ] {
            let (bytes, done) = case.round(factor, search);
            assert!(bytes == case.bytes, "{ty}");
            assert_eq!((done.n_changed, done.loss), (0, 0.0), "{ty}");
        }
    }
}

#[test]
fn f32_takes_the_whole_update() {
    let n = 40;
    let mut rng = SplitMix64(6);
    let w: Vec<f32> = (0..2 * n).map(|_| rng.normal()).collect();
    let mut bytes: Vec<u8> = w.iter().flat_map(|v| v.to_le_bytes()).collect();
    let factor = Factor::new(moments(n, &mut rng), n, 0.01).unwrap();
    let grid = Grid::new(GgmlType::F32, n).unwrap();
    let update = |_: usize, row: &mut [f32]| row.iter_mut().for_each(|v| *v += 0.125);
    round_rows(&grid, &mut bytes, &update, Some(&factor), Search::default()).unwrap();
    let wanted: Vec<u8> = w.iter().flat_map(|v| (v + 0.125).to_le_bytes()).collect();
    assert!(bytes == wanted);
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let h = moments(N, &mut SplitMix64(7));
    let case = Case::new(GgmlType::Q5_K, N, 200, 0.01, 10);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let factor = Factor::new(h.clone(), N, 0.01).unwrap();
            case.round(Some(&factor), Search::default())
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn elements_without_a_step_pass_their_error_on() {
    let h = moments(N, &mut SplitMix64(8));
    let factor = Factor::new(h.clone(), N, 0.01).unwrap();
    let mut case = Case::new(GgmlType::Q4_K, N, 3, 0.05, 11);
    // The first block of every row loses its steps.
    for row in case.bytes.chunks_exact_mut(2 * 144) {
        row[..2].fill(0);
    }
    let mut cells = Cells::default();
    case.grid.decode(&case.bytes, &mut cells).unwrap();
    case.values = cells.value;
    let (plain, _) = case.round(None, sweep_only());
    let (bytes, done) = case.round(Some(&factor), Search::default());
    for (a, b) in bytes.chunks_exact(288).zip(case.bytes.chunks_exact(288)) {
        assert_eq!(a[..144], b[..144], "frozen codes stay");
    }
    assert!(done.n_changed > 0);
    let sum = |b: &[u8]| case.losses(b, &factor.moments()).iter().sum::<f64>();
    assert!(sum(&bytes) < sum(&plain));
}

#[test]
fn what_does_not_fit_or_is_not_finite_is_refused() {
    let factor = Factor::new(moments(32, &mut SplitMix64(9)), 32, 0.01).unwrap();
    let grid = Grid::new(GgmlType::Q4_0, 64).unwrap();
    let mut bytes = random_blocks(GgmlType::Q4_0, 2 * 66, &mut SplitMix64(9));
    let none = |_: usize, _: &mut [f32]| {};
    let e = round_rows(&grid, &mut bytes, &none, Some(&factor), Search::default());
    assert!(matches!(
        e,
        Err(RoundError::Length {
            wanted: 64,
            found: 32,
            ..
        })
    ));
    let nan = |r: usize, row: &mut [f32]| {
        if r == 65 {
            row[3] = f32::NAN;
        }
    };
    let e = round_rows(&grid, &mut bytes, &nan, None, Search::default());
    assert!(matches!(
        e,
        Err(RoundError::NotFinite {
            row: 65,
            column: 3,
            ..
        })
    ));

    assert!(matches!(
        Factor::new(vec![1.0, 2.0, 2.0, 1.0], 2, 0.01),
        Err(RoundError::NotPositive { .. })
    ));
    assert!(matches!(
        Factor::new(vec![1.0, 0.0, f32::INFINITY, 1.0], 2, 0.01),
        Err(RoundError::NotFinite {
            row: 1,
            column: 0,
            ..
        })
    ));
    assert!(Factor::new(vec![1.0; 3], 2, 0.01).is_err());
    assert!(Factor::new(vec![0.0; 4], 2, 0.01).is_ok());
}
