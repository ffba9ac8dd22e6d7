//! How much memory training takes, and what it does with what it may take.
//!
//! All figures are bytes of the process's own (the kernel's `RssAnon`); the mapped model file
//! comes on top, whose pages the system takes back when it needs them. What must be there:
//! parameters, what they started from, their gradients and AdamW's moments, retain bases, and a
//! graph. What may be there: what every layer computes on the way forward, instead of computing it
//! again on the way back; and copies of stacks of experts ([`crate::graph::copies`]). The first saves a
//! whole forward pass, which is several times as much for its bytes as copies save, so it comes
//! first.

use super::error::TrainError;
use crate::graph::copies::{Copies, Wanted};
use crate::graph::template::Adaptable;
use crate::graph::trained::Factor;
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Bytes that a process may take beside the mapped model file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget(pub u64);

/// Share of the memory that is free which a run takes without being told how much it may.
const SHARE: f64 = 0.8;

impl FromStr for Budget {
    type Err = String;

    /// `4G`, `2.5GB`, `800M`: decimal units; `GiB` and `MiB` are binary.
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("wanted a size such as 4G, 2.5GB or 800M, found {s:?}");
        let digits = s.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match s[digits.len()..].to_ascii_lowercase().as_str() {
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "t" | "tb" => 1e12,
            "mib" => f64::from(1 << 20),
            "gib" => f64::from(1 << 30),
            _ => return Err(bad()),
        };
        let number: f64 = digits.trim().parse().map_err(|_| bad())?;
        let bytes = number * unit;
        if !(1.0..1e18).contains(&bytes) {
            return Err(bad());
        }
        Ok(Self(bytes as u64))
    }
}

impl Budget {
    /// A share of what the machine has free beside a model file of `file` bytes; none where the
    /// system does not say.
    pub fn available(file: u64) -> Option<Self> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let mut free = field(&text, "MemAvailable:")?;
        let number = |path| {
            std::fs::read_to_string(path)
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
        };
        if let (Some(most), Some(taken)) = (
            number("/sys/fs/cgroup/memory.max"),
            number("/sys/fs/cgroup/memory.current"),
        ) {
            free = free.min(most.saturating_sub(taken));
        }
        // The file's pages count as free while they are cached, and are read in every step.
        let bytes = (SHARE * free as f64) as u64 + own_bytes()?;
        Some(Self(bytes.saturating_sub(file)))
    }
}

/// Bytes of this process's own memory; none where the system does not say.
pub fn own_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    field(&text, "RssAnon:")
}

/// A field of `/proc` in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kib)
}

/// What is trained, as far as its size goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rank of the pairs, at most.
    pub rank: usize,
    /// Whether each has a frozen one it started from.
    pub frozen: bool,
    /// Size of the retain bases, at most; 0 without.
    pub basis: usize,
    /// Earlier parameters that the loop keeps beside those of now.
    pub snapshots: usize,
    /// Elements of what is trained on top of.
    pub beneath: usize,
}

impl Shape {
    /// The factors, as [`Pairs::factors`](super::adapters::Pairs::factors) has them.
    pub fn factors(&self, adaptable: &[Adaptable]) -> Vec<Factor> {
        let of = |trainable: bool| {
            adaptable.iter().enumerate().map(move |(tensor, t)| Factor {
                tensor,
                rank: self.rank.min(t.n_in).min(t.n_out),
                scale: 1.0,
                trainable,
            })
        };
        let frozen = of(false).filter(|_| self.frozen);
        of(true).chain(frozen).collect()
    }

    /// Bytes of parameters, gradients, moments, bases and snapshots.
    pub fn bytes(&self, adaptable: &[Adaptable]) -> u64 {
        let of = |t: &Adaptable| {
            let rank = self.rank.min(t.n_in).min(t.n_out);
            // Parameters, gradients, two moments.
            let copies = 4 + usize::from(self.frozen) + self.snapshots;
            let basis = self.basis.min(t.n_out);
            copies * rank * (t.n_in + t.n_out) + basis * t.n_out
        };
        4 * (adaptable.iter().map(of).sum::<usize>() + self.beneath) as u64
    }
}

/// What training takes at least, and what it can use.
#[derive(Debug, Clone)]
pub struct Need {
    /// Bytes that are there before training, and pass by it.
    pub base: u64,
    /// Bytes of parameters and what belongs to them.
    pub state: u64,
    /// Bytes of the graphs of the largest micro-batch, keeping what each layer computes.
    pub whole: u64,
    /// The same, computing layers again.
    pub again: u64,
    /// Copies, most wanted first.
    pub copies: Vec<Wanted>,
}

/// What is done with the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What it was made for.
    pub budget: Budget,
    /// Bytes for the stages before training, beside what is there anyway.
    pub before: u64,
    /// Bytes that graphs may take.
    pub graph: u64,
    /// Whether the largest micro-batch is computed again layer by layer.
    pub recompute: bool,
    /// Copies of weights.
    pub copies: Copies,
    /// Bytes in all.
    pub bytes: u64,
}

impl Need {
    /// The least that training takes.
    pub fn least(&self) -> u64 {
        self.base + self.state + self.again.min(self.whole)
    }

    /// The best use of `budget`.
    ///
    /// # Errors
    /// [`TrainError::Memory`]: it is less than [`Need::least`].
    pub fn plan(&self, budget: Budget) -> Result<Plan, TrainError> {
        let least = self.least();
        let Some(room) = budget.0.checked_sub(least) else {
            return Err(TrainError::Memory {
                least,
                budget: budget.0,
            });
        };
        let recompute = self.again < self.whole && self.whole - self.again > room;
        let graph = match recompute {
            true => self.again,
            false => self.whole,
        };
        let fixed = self.base + self.state + graph;
        let copies = Copies::within(&self.copies, budget.0.saturating_sub(fixed));
        Ok(Plan {
            budget,
            before: fixed + copies.bytes - self.base,
            graph,
            recompute,
            bytes: fixed + copies.bytes,
            copies,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("4G", 4_000_000_000),
            ("2.5GB", 2_500_000_000),
            ("800M", 800_000_000),
            ("1gib", 1 << 30),
            ("3 MiB", 3 << 20),
        ] {
            assert_eq!(text.parse(), Ok(Budget(bytes)), "{text}");
        }
        for text in [
            "", "4", "G", "-1G", "0M", "4Q", "nanG", "1e30G", "G4", "4 5G",
        ] {
            let error = text.parse::<Budget>().expect_err(text);
            assert!(error.contains("2.5GB") && error.contains(text), "{error}");
        }
    }

    fn need() -> Need {
        let copy = |i: usize| Wanted {
            name: i.to_string(),
            bytes: 30 + i as u64,
        };
        Need {
            base: 10,
            state: 100,
            whole: 400,
            again: 50,
            copies: (0..9).map(copy).collect(),
        }
    }

    #[test]
    fn a_plan_keeps_to_its_budget_and_more_of_it_is_never_less() {
        let need = need();
        let mut kept = (false, 0);
        for budget in 160..1000 {
            let plan = need.plan(Budget(budget)).expect("enough");
            assert!(plan.bytes <= budget, "{plan:?}");
            // What layers compute comes before copies, and pushes some of them out once.
            let now = (!plan.recompute, plan.copies.len());
            assert!(now >= kept, "{budget}: {plan:?}");
            kept = now;
        }
        assert_eq!(kept, (true, 9));
    }

    #[test]
    fn too_little_says_what_the_least_is() {
        let error = need().plan(Budget(159)).expect_err("too little");
        assert_eq!(
            error,
            TrainError::Memory {
                least: 160,
                budget: 159
            }
        );
        assert!(need().plan(Budget(160)).expect("enough").copies.is_empty());
    }

    /// Four copies of 2·(3 + 5) and one that it started from, bases of 5 outputs.
    #[test]
    fn the_state_is_counted() {
        let tensor = Adaptable {
            name: "t".into(),
            n_in: 3,
            n_out: 5,
            n_uses: 1,
        };
        let shape = Shape {
            rank: 2,
            frozen: true,
            basis: 4,
            snapshots: 0,
            beneath: 0,
        };
        assert_eq!(shape.bytes(&[tensor]), 4 * (5 * 16 + 4 * 5));
    }
}
