//! What becomes of each adapted tensor: merged on its grid, promoted to a larger type, or left
//! out of the file as a residue in a small side adapter.
//!
//! A tensor needs help where the update is too small for the grid (‖ΔW‖/‖W‖ below a limit) or the
//! held-out error is too large. Bytes go first to those that need it, then, where a budget was
//! given, to wherever an error falls most per byte, until nothing more fits. Pure: what each
//! choice costs and loses was measured before ([`super::measure`]).

use crate::gguf::GgmlType;
use serde::{Serialize, Serializer};
use std::fmt;

/// What may be done to tensors that need help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Nothing: every tensor is merged on its grid
    Grid,
    /// A larger type
    Promote,
    /// A side adapter
    Residue,
    /// Whichever loses least per byte
    Auto,
}

/// What is done to one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Merged on the grid it has.
    Grid,
    /// Merged and written in this type.
    Promote(GgmlType),
    /// Left as it is; the update stays beside it in a pair of this rank.
    Residue {
        /// The pair's rank.
        rank: usize,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grid => f.write_str("grid"),
            Self::Promote(ty) => write!(f, "promote to {ty}"),
            Self::Residue { rank } => write!(f, "residue of rank {rank}"),
        }
    }
}

impl Serialize for Action {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// One way to treat a tensor, measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The way.
    pub action: Action,
    /// Bytes it adds to the files (0 on the grid).
    pub growth: u64,
    /// Share of the update's effect it loses, held out.
    pub err_f: f64,
    /// Noise on what is kept, held out.
    pub retain_noise: f64,
}

/// One adapted tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// ‖ΔW‖/‖W‖.
    pub relative_norm: f64,
    /// What losing all of the update would cost, in a unit shared by all tensors. 1 weighs all
    /// tensors' errors alike.
    pub effect: f64,
    /// Merging on the grid; [`Choice::growth`] 0. None where the type has no grid.
    pub grid: Option<Choice>,
    /// The other choices.
    pub others: Vec<Choice>,
}

/// When a tensor needs help and what may be spent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Limits {
    /// What may be done.
    pub policy: Policy,
    /// Largest held-out error on the grid.
    pub max_err: f64,
    /// Smallest ‖ΔW‖/‖W‖ on the grid.
    pub min_norm: f64,
    /// Bytes that may be added; none: as many as tensors in need take.
    pub max_growth: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            policy: Policy::Auto,
            max_err: 0.05,
            min_norm: 0.003,
            max_growth: None,
        }
    }
}

impl Limits {
    /// A budget of `percent` of a file of `file_len` bytes.
    pub fn with_growth(mut self, percent: f64, file_len: u64) -> Self {
        self.max_growth = Some((file_len as f64 * percent.max(0.0) / 100.0) as u64);
        self
    }
}

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The grid holds the update.
    GoodEnough,
    /// The update is too small for the grid.
    SmallUpdate,
    /// The grid loses too much of it.
    LargeError,
    /// The type has no grid to merge on.
    NoGrid,
    /// The budget was best spent here.
    BestUse,
    /// It needs help that no budget was left for.
    OverBudget,
    /// It needs help, and nothing that was measured is better.
    NoBetter,
    /// It needs help, which the policy does not give.
    NotAllowed,
}

/// What was decided for one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The tensor.
    pub name: String,
    /// What is done; none: the update is dropped, because the type has no grid and nothing else
    /// is allowed or affordable.
    pub choice: Option<Choice>,
    /// Why.
    pub reason: Reason,
}

struct State<'a> {
    c: &'a Candidate,
    chosen: Option<Choice>,
    others: Vec<Choice>,
}

impl State<'_> {
    fn need(&self, limits: &Limits) -> Option<Reason> {
        match self.chosen {
            None => Some(Reason::NoGrid),
            Some(c) if c.action == Action::Grid && self.c.relative_norm < limits.min_norm => {
                Some(Reason::SmallUpdate)
            }
            Some(c) if c.err_f > limits.max_err => Some(Reason::LargeError),
            Some(_) => None,
        }
    }

    fn lost(&self, choice: Option<Choice>) -> f64 {
        self.c.effect * choice.map_or(1.0, |c| c.err_f)
    }

    fn growth(&self) -> u64 {
        self.chosen.map_or(0, |c| c.growth)
    }

    /// The other choice that loses least per byte more than now, and its gain per byte.
    fn best_move(&self, left: u64) -> Option<(f64, Choice)> {
        let mut best: Option<(f64, Choice)> = None;
        for &o in &self.others {
            let gain = self.lost(self.chosen) - self.lost(Some(o));
            let fits = o.growth <= self.growth().saturating_add(left);
            if gain <= 0.0 || !fits {
                continue;
            }
            let more = o.growth.saturating_sub(self.growth());
            // What costs nothing more comes first.
            let rate = gain / more.max(1) as f64;
            if best.is_none_or(|(r, _)| rate > r) {
                best = Some((rate, o));
            }
        }
        best
    }
}

/// Decide for every tensor, in the order given. The same input gives the same answer.
pub fn decide(candidates: &[Candidate], limits: &Limits) -> Vec<Decision> {
    let allowed = |c: &&Choice| match limits.policy {
        Policy::Grid => false,
        Policy::Promote => matches!(c.action, Action::Promote(_)),
        Policy::Residue => matches!(c.action, Action::Residue { .. }),
        Policy::Auto => true,
    };
    let mut states: Vec<State<'_>> = candidates
        .iter()
        .map(|c| State {
            c,
            chosen: c.grid,
            others: c.others.iter().filter(allowed).copied().collect(),
        })
        .collect();
    let needs: Vec<Option<Reason>> = states.iter().map(|s| s.need(limits)).collect();
    let mut left = limits.max_growth.unwrap_or(u64::MAX);
    spend(&mut states, &mut left, |s| s.need(limits).is_some());
    if limits.max_growth.is_some() {
        spend(&mut states, &mut left, |_| true);
    }
    states
        .iter()
        .zip(needs)
        .map(|(s, need)| {
            let moved = s.chosen != s.c.grid;
            let reason = match need {
                None if moved => Reason::BestUse,
                None => Reason::GoodEnough,
                Some(need) if moved => need,
                Some(_) if limits.policy == Policy::Grid => Reason::NotAllowed,
                Some(_) if s.best_move(u64::MAX).is_some() => Reason::OverBudget,
                Some(_) => Reason::NoBetter,
            };
            Decision {
                name: s.c.name.clone(),
                choice: s.chosen,
                reason,
            }
        })
        .collect()
}

/// Moves tensors for which `wanted` holds, best gain per byte first, until none is left or fits.
fn spend(states: &mut [State<'_>], left: &mut u64, wanted: impl Fn(&State<'_>) -> bool) {
    loop {
        let mut best: Option<(f64, usize, Choice)> = None;
        for (i, s) in states.iter().enumerate().filter(|(_, s)| wanted(s)) {
            if let Some((rate, choice)) = s.best_move(*left)
                && best.is_none_or(|(r, ..)| rate > r)
            {
                best = Some((rate, i, choice));
            }
        }
        let Some((_, i, choice)) = best else {
            return;
        };
        *left = left
            .saturating_add(states[i].growth())
            .saturating_sub(choice.growth);
        states[i].chosen = Some(choice);
    }
}

/// Types to promote `ty` to, rows of `n_in`: Q4_K to Q5_K, which has all levels of its and so moves
/// no weight but by the update; everything to the [`larger`] type.
pub fn promotions(ty: GgmlType, n_in: usize) -> Vec<GgmlType> {
    let finer = (ty == GgmlType::Q4_K).then_some(GgmlType::Q5_K);
    finer.into_iter().chain(larger(ty, n_in)).collect()
}

/// The next larger type for rows of `n_in`, if its blocks fit: the K types by their bits, the
/// others to Q5_1, Q8_0 and F16, types without a grid to the K or block type above them.
pub fn larger(ty: GgmlType, n_in: usize) -> Option<GgmlType> {
    use GgmlType as T;
    let above: &[T] = match ty {
        T::Q1_0 | T::IQ1_S | T::IQ1_M | T::TQ1_0 | T::TQ2_0 | T::Q2_0 => {
            &[T::Q2_K, T::Q4_0, T::F16]
        }
        T::IQ2_XXS | T::IQ2_XS | T::IQ2_S | T::Q2_K => &[T::Q3_K, T::Q4_K, T::Q5_1, T::F16],
        T::IQ3_XXS | T::IQ3_S | T::Q3_K => &[T::Q4_K, T::Q5_1, T::F16],
        T::Q4_K | T::Q5_K | T::IQ4_XS => &[T::Q6_K, T::Q8_0, T::F16],
        T::Q4_0 | T::Q4_1 | T::IQ4_NL | T::MXFP4 | T::NVFP4 => &[T::Q5_1, T::Q8_0, T::F16],
        T::Q5_0 | T::Q5_1 | T::Q6_K => &[T::Q8_0, T::F16],
        T::Q8_0 | T::Q8_1 | T::Q8_K => &[T::F16],
        T::F16 | T::BF16 => &[T::F32],
        _ => &[],
    };
    let bytes = |t: T| t.row_bytes(n_in as u64);
    let now = bytes(ty)?;
    above
        .iter()
        .copied()
        .find(|&t| bytes(t).is_some_and(|b| b > now))
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
