//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) on host vectors, and the schedule.

use rayon::prelude::*;

/// Settings of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// First-moment decay.
    pub beta1: f32,
    /// Second-moment decay.
    pub beta2: f32,
    /// Denominator offset.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
        }
    }
}

/// Moments of one parameter tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// First moment.
    pub m: Vec<f32>,
    /// Second moment.
    pub v: Vec<f32>,
}

impl Moments {
    /// Zero moments for `n` elements.
    pub fn new(n: usize) -> Self {
        Self {
            m: vec![0.0; n],
            v: vec![0.0; n],
        }
    }

    /// One step: `step` counts from 1. `clip` scales the gradient.
    pub fn update(
        &mut self,
        config: &AdamWConfig,
        x: &mut [f32],
        grad: &[f32],
        lr: f32,
        clip: f32,
        step: u64,
    ) {
        let bias1 = 1.0 - f64::from(config.beta1).powf(step as f64);
        let bias2 = 1.0 - f64::from(config.beta2).powf(step as f64);
        let rate = (f64::from(lr) / bias1) as f32;
        let root = (1.0 / bias2.sqrt()) as f32;
        let decay = 1.0 - lr * config.weight_decay;
        let c = *config;
        x.par_iter_mut()
            .zip(grad)
            .zip(&mut self.m)
            .zip(&mut self.v)
            .with_min_len(1 << 14)
            .for_each(|(((x, &g), m), v)| {
                let g = g * clip;
                *m = c.beta1 * *m + (1.0 - c.beta1) * g;
                *v = c.beta2 * *v + (1.0 - c.beta2) * g * g;
                *x = *x * decay - rate * *m / (v.sqrt() * root + c.eps);
            });
    }
}

/// Learning rate of `step` (from 0) of `total`: linear warm-up, then linear decay to zero.
pub fn linear_schedule(lr: f32, step: usize, warmup: usize, total: usize) -> f32 {
    if step < warmup {
        return lr * (step + 1) as f32 / warmup as f32;
    }
    let left = total.saturating_sub(step) as f32;
    lr * (left / total.saturating_sub(warmup).max(1) as f32).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_step_moves_by_the_rate_against_the_gradient() {
        let mut x = vec![1.0, -1.0];
        let config = AdamWConfig {
            weight_decay: 0.0,
            ..AdamWConfig::default()
        };
        Moments::new(2).update(&config, &mut x, &[3.0, -0.02], 0.1, 1.0, 1);
        assert!(
            (x[0] - 0.9).abs() < 1e-4 && (x[1] + 0.9).abs() < 1e-4,
            "{x:?}"
        );
    }

    #[test]
    fn three_steps_match_the_paper() {
        // Algorithm 2 of the paper in f64, gradient = x, from [1, -2].
        let config = AdamWConfig {
            weight_decay: 0.1,
            ..AdamWConfig::default()
        };
        let mut x = vec![1.0f32, -2.0];
        let mut moments = Moments::new(2);
        for step in 1..=3 {
            let g = x.clone();
            moments.update(&config, &mut x, &g, 0.01, 1.0, step);
        }
        let naive = {
            let (mut x, mut m, mut v) = ([1.0f64, -2.0], [0f64; 2], [0f64; 2]);
            for step in 1..=3 {
                for i in 0..2 {
                    let g = x[i];
                    x[i] *= 1.0 - 0.01 * 0.1;
                    m[i] = 0.9 * m[i] + 0.1 * g;
                    v[i] = 0.999 * v[i] + 0.001 * g * g;
                    let mh = m[i] / (1.0 - 0.9f64.powi(step));
                    let vh = v[i] / (1.0 - 0.999f64.powi(step));
                    x[i] -= 0.01 * mh / (vh.sqrt() + 1e-8);
                }
            }
            x
        };
        for i in 0..2 {
            assert!(
                (f64::from(x[i]) - naive[i]).abs() < 1e-6,
                "{x:?} against {naive:?}"
            );
        }
    }

    #[test]
    fn schedule_rises_then_falls_to_zero() {
        let at = |s| linear_schedule(1.0, s, 4, 20);
        assert_eq!(at(0), 0.25);
        assert_eq!(at(3), 1.0);
        assert_eq!(at(4), 1.0);
        assert!((at(12) - 0.5).abs() < 1e-6);
        assert_eq!(at(20), 0.0);
    }
}
