//! The order in which samples are drawn: a fresh permutation for every pass, a function of the
//! seed alone, so that a resumed run goes on exactly where the interrupted one was.

use crate::rng::SplitMix64;
use serde::{Deserialize, Serialize};

/// A position in the endless sequence of shuffled passes over `n` samples.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    seed: u64,
    stream: u64,
    n: usize,
    pass: u64,
    at: usize,
    #[serde(skip)]
    permutation: Vec<usize>,
}

impl Order {
    /// Over `n` samples (at least one); `stream` keeps sets of one run apart.
    pub fn new(seed: u64, stream: u64, n: usize) -> Self {
        assert!(n > 0, "an empty set has no order");
        Self {
            seed,
            stream,
            n,
            pass: 0,
            at: 0,
            permutation: Vec::new(),
        }
    }

    /// Samples in a pass.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The next sample.
    pub fn draw(&mut self) -> usize {
        if self.at == self.n {
            self.pass += 1;
            self.at = 0;
            self.permutation.clear();
        }
        if self.permutation.is_empty() {
            self.permutation = (0..self.n).collect();
            SplitMix64::stream(self.seed, self.stream << 40 | self.pass)
                .shuffle(&mut self.permutation);
        }
        self.at += 1;
        self.permutation[self.at - 1]
    }

    /// The next `n` samples.
    pub fn take(&mut self, n: usize) -> Vec<usize> {
        (0..n).map(|_| self.draw()).collect()
    }

    /// The next samples for which `keep` holds, `n` at most, each once.
    pub fn take_where(&mut self, n: usize, keep: impl Fn(usize) -> bool) -> Vec<usize> {
        let mut taken = Vec::new();
        let n_kept = (0..self.n).filter(|&i| keep(i)).count().min(n);
        while taken.len() < n_kept {
            let i = self.draw();
            if keep(i) && !taken.contains(&i) {
                taken.push(i);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_holds_every_sample_and_differs_from_the_last() {
        let mut order = Order::new(1, 2, 20);
        let (first, second) = (order.take(20), order.take(20));
        assert_ne!(first, second);
        for mut pass in [first, second] {
            pass.sort_unstable();
            assert_eq!(pass, (0..20).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_stored_position_goes_on_where_it_was() {
        let mut order = Order::new(9, 0, 7);
        order.take(10);
        let text = serde_json::to_string(&order).expect("plain fields");
        let mut copy: Order = serde_json::from_str(&text).expect("its own text");
        assert_eq!(order.take(30), copy.take(30));
    }

    #[test]
    fn take_where_ends_when_too_few_are_left() {
        let mut order = Order::new(9, 0, 7);
        let mut taken = order.take_where(5, |i| i < 3);
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2]);
        assert!(order.take_where(5, |_| false).is_empty());
    }
}
