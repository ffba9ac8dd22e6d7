//! The distribution of the one-sample Kolmogorov-Smirnov statistic D_n, which SciPy's two-sample
//! test falls back to for large samples. The choice of formula by region follows R. Simard and
//! P. L'Ecuyer, "Computing the two-sided Kolmogorov-Smirnov distribution" (J. Stat. Softw. 39,
//! 2011).

use std::f64::consts::PI;

/// ln P(D_n ≥ x).
pub(super) fn ln_sf(n: u64, x: f64) -> f64 {
    let size = n as f64;
    let t = size * x;
    if t <= 0.5 {
        return 0.0;
    }
    if x >= 1.0 {
        return f64::NEG_INFINITY;
    }
    if t <= 1.0 {
        // Ruben and Gambino: P(D_n < x) = n! ((2t - 1) / n)^n.
        let ln_cdf = ln_factorial_ratio(n) + size * (2.0 * t - 1.0).ln();
        return ln_one_minus_exp(ln_cdf);
    }
    if t >= size - 1.0 {
        return 2f64.ln() + size * (-x).ln_1p();
    }
    let tail_starts = if n <= 140 { 4.0 } else { 2.2 };
    if x >= 0.5 || t * x > tail_starts {
        return (2f64.ln() + ln_one_sided(n, x)).min(0.0);
    }
    let cdf = if n <= 140 || (n <= 100_000 && size * x.powf(1.5) <= 1.4) {
        durbin_matrix(n, x)
    } else {
        pelz_good(size, x)
    };
    (1.0 - cdf).clamp(0.0, 1.0).ln()
}

/// ln(1 - exp(y)) for y ≤ 0.
fn ln_one_minus_exp(y: f64) -> f64 {
    if y > -2f64.ln() {
        (-y.exp_m1()).ln()
    } else {
        (-y.exp()).ln_1p()
    }
}

/// ln(n! / n^n), term by term: n is at most a few ten thousand here, or the caller is rare.
fn ln_factorial_ratio(n: u64) -> f64 {
    (1..=n).map(|i| (i as f64 / n as f64).ln()).sum()
}

/// ln P(D_n⁺ ≥ x) by Smirnov's sum of positive terms,
/// x Σ_j C(n, j) (x + j/n)^(j-1) (1 - x - j/n)^(n-j), in logarithms.
fn ln_one_sided(n: u64, x: f64) -> f64 {
    let size = n as f64;
    let last = (size * (1.0 - x)).floor() as u64;
    let mut ln_choose = 0.0;
    let mut terms = Vec::with_capacity(last as usize + 1);
    for j in 0..=last.min(n) {
        let at = j as f64;
        if j > 0 {
            ln_choose += ((size - at + 1.0) / at).ln();
        }
        let rest = 1.0 - x - at / size;
        if rest > 0.0 {
            terms.push(ln_choose + (at - 1.0) * (x + at / size).ln() + (size - at) * rest.ln());
        } else if j == n {
            terms.push(ln_choose + (at - 1.0) * (x + at / size).ln());
        }
    }
    let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = terms.iter().map(|term| (term - largest).exp()).sum();
    x.ln() + largest + sum.ln()
}

/// P(D_n < x) by Durbin's matrix, as G. Marsaglia, W. Tsang and J. Wang compute it (J. Stat.
/// Softw. 8, 2003): the middle of H^n times n!/n^n.
fn durbin_matrix(n: u64, x: f64) -> f64 {
    let t = n as f64 * x;
    let k = t.ceil() as usize;
    let h = k as f64 - t;
    let m = 2 * k - 1;
    let mut matrix = Matrix {
        size: m,
        cells: vec![0.0; m * m],
        exponent: 0,
    };
    for row in 0..m {
        for column in 0..m.min(row + 2) {
            matrix.cells[row * m + column] = 1.0;
        }
    }
    for i in 0..m {
        let power = h.powi(i as i32 + 1);
        matrix.cells[i * m] -= power;
        matrix.cells[(m - 1) * m + (m - 1 - i)] -= power;
    }
    matrix.cells[(m - 1) * m] += (2.0 * h - 1.0).max(0.0).powi(m as i32);
    for row in 0..m {
        for column in 0..m.min(row + 1) {
            for divisor in 1..=row - column + 1 {
                matrix.cells[row * m + column] /= divisor as f64;
            }
        }
    }
    let power = matrix.power(n);
    let middle = power.cells[(k - 1) * m + k - 1];
    (middle.ln() + f64::from(power.exponent) * 2f64.ln() + ln_factorial_ratio(n)).exp()
}

/// A square matrix times 2^exponent, so that high powers do not overflow.
struct Matrix {
    size: usize,
    cells: Vec<f64>,
    exponent: i32,
}

impl Matrix {
    fn times(&self, other: &Matrix) -> Matrix {
        let m = self.size;
        let mut cells = vec![0.0; m * m];
        for row in 0..m {
            for inner in 0..m {
                let factor = self.cells[row * m + inner];
                for column in 0..m {
                    cells[row * m + column] += factor * other.cells[inner * m + column];
                }
            }
        }
        let mut exponent = self.exponent + other.exponent;
        let largest = cells.iter().copied().fold(0.0, f64::max);
        if largest > 1e100 {
            cells.iter_mut().for_each(|cell| *cell *= 2f64.powi(-300));
            exponent += 300;
        }
        Matrix {
            size: m,
            cells,
            exponent,
        }
    }

    fn power(&self, n: u64) -> Matrix {
        let half = match n {
            1 => return self.times(&Matrix::identity(self.size)),
            _ => self.power(n / 2),
        };
        let square = half.times(&half);
        if n.is_multiple_of(2) {
            square
        } else {
            square.times(self)
        }
    }

    fn identity(size: usize) -> Matrix {
        let mut cells = vec![0.0; size * size];
        for i in 0..size {
            cells[i * size + i] = 1.0;
        }
        Matrix {
            size,
            cells,
            exponent: 0,
        }
    }
}

/// P(D_n < x) by the expansion of W. Pelz and I. Good (J. Roy. Statist. Soc. B 38, 1976):
/// K0 + K1/√n + K2/n + K3/n^1.5 at z = x√n.
fn pelz_good(n: f64, x: f64) -> f64 {
    let z = x * n.sqrt();
    let z2 = z * z;
    let (z4, z6) = (z2 * z2, z2 * z2 * z2);
    let (pi2, pi4, pi6) = (PI.powi(2), PI.powi(4), PI.powi(6));
    let mut k = [0.0; 4];
    // Terms fall off as exp(-m²π²/8z²) and exp(-m²π²/2z²).
    for i in (1..=(16.0 * z / PI).ceil() as i32).rev() {
        let m2 = f64::from(2 * i - 1).powi(2);
        let odd = (-m2 * pi2 / (8.0 * z2)).exp();
        k[0] += odd / z;
        k[1] += odd * (pi2 * m2 / 4.0 - z2) / (6.0 * z4);
        k[2] += odd
            * (6.0 * z6
                + 2.0 * z4
                + pi2 / 4.0 * (2.0 * z4 - 5.0 * z2) * m2
                + pi4 / 16.0 * (1.0 - 2.0 * z2) * m2 * m2)
            / (72.0 * z6 * z);
        k[3] += odd
            * (-30.0 * z6 - 90.0 * z4 * z4
                + pi2 / 4.0 * (135.0 * z4 - 96.0 * z6) * m2
                + pi4 / 16.0 * (212.0 * z4 - 60.0 * z2) * m2 * m2
                + pi6 / 64.0 * (5.0 - 30.0 * z2) * m2 * m2 * m2)
            / (6480.0 * z6 * z4);
        let i2 = f64::from(i).powi(2);
        let every = (-i2 * pi2 / (2.0 * z2)).exp();
        k[2] -= pi2 / (36.0 * z2 * z) * i2 * every;
        k[3] += pi2 / (216.0 * z6) * (3.0 * z2 - pi2 * i2) * i2 * every;
    }
    (2.0 * PI).sqrt() * (k[0] + k[1] / n.sqrt() + k[2] / n + k[3] / n.powf(1.5))
}
