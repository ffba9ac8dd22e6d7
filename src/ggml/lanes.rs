//! Sums over rows of f32 at the width this build's vectors have.

/// As wide as a register.
#[cfg(target_feature = "avx512f")]
pub type Vector = wide::f32x16;
/// As wide as a register.
#[cfg(not(target_feature = "avx512f"))]
pub type Vector = wide::f32x8;

/// Lanes of a [`Vector`].
pub const WIDTH: usize = size_of::<Vector>() / size_of::<f32>();

fn sum(v: Vector) -> f32 {
    v.to_array().iter().sum()
}

/// Products of `N` rows with `x`.
pub fn dots<const N: usize>(rows: [&[f32]; N], x: &[f32]) -> [f32; N] {
    let (wide, rest) = x.as_chunks::<WIDTH>();
    let mut sums = [Vector::default(); N];
    for (i, x) in wide.iter().enumerate() {
        let x = Vector::new(*x);
        for r in 0..N {
            let row = rows[r][i * WIDTH..].first_chunk().expect("as long as x");
            sums[r] = Vector::new(*row).mul_add(x, sums[r]);
        }
    }
    let mut out = sums.map(sum);
    let done = x.len() - rest.len();
    for (out, row) in out.iter_mut().zip(rows) {
        *out += row[done..]
            .iter()
            .zip(rest)
            .map(|(a, b)| a * b)
            .sum::<f32>();
    }
    out
}

/// `out += by·x`.
pub fn add_scaled(out: &mut [f32], x: &[f32], by: f32) {
    for (o, x) in out.iter_mut().zip(x) {
        *o = x.mul_add(by, *o);
    }
}

/// For each of the first `n` of `N` rows of weights: `out(row) = Σ weight·x(i)`, rows of `len`.
pub fn mixed<'a, const N: usize>(
    weights: [&[f32]; N],
    n: usize,
    x: impl Fn(usize) -> &'a [f32],
    len: usize,
    out: impl Fn(usize) -> &'a mut [f32],
) {
    let whole = len / WIDTH * WIDTH;
    for from in (0..whole).step_by(WIDTH) {
        let mut sums = [Vector::default(); N];
        let n_weights = weights[0].len();
        for (i, x) in (0..n_weights).map(|i| (i, x(i))) {
            let x = Vector::new(*x[from..].first_chunk().expect("whole vectors"));
            for r in 0..N {
                sums[r] = x.mul_add(Vector::splat(weights[r][i]), sums[r]);
            }
        }
        for (r, sum) in sums.iter().enumerate().take(n) {
            out(r)[from..from + WIDTH].copy_from_slice(&sum.to_array());
        }
    }
    for from in whole..len {
        for (r, weights) in weights.iter().enumerate().take(n) {
            let terms = weights.iter().enumerate().map(|(i, w)| w * x(i)[from]);
            out(r)[from] = terms.sum();
        }
    }
}

/// `exp(x − max)` of each, and their sum.
pub fn exp_in_place(x: &mut [f32], max: f32) -> f32 {
    let (wide, rest) = x.as_chunks_mut::<WIDTH>();
    let mut total = Vector::default();
    for x in wide {
        let e = (Vector::new(*x) - max).exp();
        total += e;
        *x = e.to_array();
    }
    let mut total = sum(total);
    for x in rest {
        *x = (*x - max).exp();
        total += *x;
    }
    total
}
