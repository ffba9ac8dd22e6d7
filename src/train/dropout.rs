//! Dropout on the inputs of the low-rank pairs, as PEFT places it: y = W·x + s·B(A·(x∘d)).
//!
//! RILA's frozen pair −s·B0(A0·x) sees the same masked input as the trained one, so dropout acts
//! on the net update s·(B·A − B0·A0) and a training pass at step 0 is the original model. The
//! reference masks the trained pair alone, over a base from which s·B0·A0 was taken away: every
//! training pass then also loses a random share of B0·A0, a part of the model's own weights some
//! hundred times larger than the update. In the mean over masks the two are equal.
//!
//! A mask is a function of (seed, step, micro-batch, tensor) alone, so a resumed run draws what
//! the interrupted one would have.

use crate::rng::SplitMix64;

/// Stream number of [`SplitMix64::stream`].
const STREAM: u64 = 5;

/// The masks of one optimiser step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share of inputs dropped, below 1.
    pub rate: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Steps taken before this one.
    pub step: u64,
}

impl Dropout {
    /// The mask d of adaptable tensor `tensor`: 0 for a dropped input, 1/(1 − rate) for others.
    pub fn fill(&self, micro_batch: usize, tensor: usize, mask: &mut [f32]) {
        let step = SplitMix64::stream(self.seed, STREAM << 56 | self.step).draw();
        let mut rng = SplitMix64::stream(step, (micro_batch as u64) << 32 | tensor as u64);
        let kept = 1.0 / (1.0 - self.rate);
        for d in mask {
            *d = if rng.uniform() < self.rate { 0.0 } else { kept };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(step: u64, micro_batch: usize, tensor: usize) -> Vec<f32> {
        let dropout = Dropout {
            rate: 0.2,
            seed: 7,
            step,
        };
        let mut mask = vec![f32::NAN; 20_000];
        dropout.fill(micro_batch, tensor, &mut mask);
        mask
    }

    #[test]
    fn masks_drop_their_share_and_keep_the_mean() {
        let mask = mask(3, 0, 1);
        let dropped = mask.iter().filter(|&&d| d == 0.0).count() as f64 / mask.len() as f64;
        let mean = mask.iter().map(|&d| f64::from(d)).sum::<f64>() / mask.len() as f64;
        assert!((dropped - 0.2).abs() < 0.01, "{dropped}");
        assert!((mean - 1.0).abs() < 0.015, "{mean}");
    }

    #[test]
    fn masks_repeat_for_one_place_and_differ_between_places() {
        assert_eq!(mask(3, 1, 2), mask(3, 1, 2));
        for other in [mask(4, 1, 2), mask(3, 0, 2), mask(3, 1, 3)] {
            assert_ne!(mask(3, 1, 2), other);
        }
    }
}
