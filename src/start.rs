//! Where training starts: the bases of every tensor and the low-rank pairs that follow from them.

use crate::capture::pooled_outputs;
use crate::data::Sample;
use crate::error::Error;
use crate::graph::template::Adaptable;
use crate::model::OpenModel;
use crate::subspace::{Pooled, Retain, RetainBasis, Subspace, SubspaceConfig, solve_all};
use crate::train::adapters::Pairs;
use crate::train::config::{Constraint, Init, UnlearnConfig};

/// Samples of a split whose outputs are pooled: the paper's 256, in data order.
pub const CAPTURE_SAMPLES: usize = 256;

/// Bases of every adaptable tensor, from one forward pass over each set (one in all with
/// `shared`, retain bases computed before). With `room`, tensors are taken in groups whose outputs
/// take no more bytes, each with passes of its own; the bases are the same.
///
/// # Errors
/// When llama.cpp fails, or shared bases do not fit the model.
#[allow(clippy::too_many_arguments, reason = "the inputs of a stage")]
pub fn subspaces(
    open: &OpenModel,
    adaptable: &[Adaptable],
    (forget, retain): (&[Sample], &[Sample]),
    shared: Option<Vec<RetainBasis>>,
    config: &SubspaceConfig,
    n_threads: usize,
    room: Option<u64>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Subspace>, Error> {
    let forget = &forget[..forget.len().min(CAPTURE_SAMPLES)];
    let retain = &retain[..retain.len().min(CAPTURE_SAMPLES)];
    let retain = if shared.is_some() { &[] } else { retain };
    let n_samples = forget.len() + retain.len();
    let groups = groups(adaptable, n_samples, config, room);
    let total = groups.len() * n_samples;
    let mut bases = shared.map(Vec::into_iter);
    let (mut done, mut found) = (0, Vec::with_capacity(adaptable.len()));
    for group in groups {
        let mut pooled = |samples: &[Sample]| {
            let seen = &mut |n| progress(done + n, total);
            let outputs = pooled_outputs(&open.model, group, samples, n_threads, seen);
            done += samples.len();
            outputs
        };
        let h_f = pooled(forget)?;
        let shared: Option<Vec<RetainBasis>> =
            bases.as_mut().map(|b| b.take(group.len()).collect());
        let h_r = match shared {
            Some(_) => Vec::new(),
            None => pooled(retain)?,
        };
        let retain: Vec<Retain<'_>> = match &shared {
            Some(bases) => bases.iter().map(Retain::Shared).collect(),
            None => h_r.iter().map(|r| Retain::Pooled(&r.h)).collect(),
        };
        let pooled: Vec<Pooled<'_>> = h_f
            .iter()
            .zip(retain)
            .map(|(f, retain)| Pooled {
                tensor: &f.tensor.name,
                n_out: f.tensor.n_out,
                forget: &f.h,
                retain,
            })
            .collect();
        let solved = solve_all(config, &pooled)?.into_iter();
        found.extend(solved.map(|mut s| {
            // Training needs P alone of the retain set.
            s.retain.factor = Vec::new();
            s
        }));
    }
    Ok(found)
}

/// Neighbouring tensors whose outputs over `n_samples` are held at a time, so that they, the solver's
/// own copies of them (in f64) and all bases take `room` bytes; at least one tensor.
fn groups<'a>(
    adaptable: &'a [Adaptable],
    n_samples: usize,
    config: &SubspaceConfig,
    room: Option<u64>,
) -> Vec<&'a [Adaptable]> {
    let n_out = |tensors: &[Adaptable]| tensors.iter().map(|t| t.n_out).sum::<usize>() as u64;
    let basis = config.retain_rank.min(n_samples) + config.rank;
    let kept = 4 * basis as u64 * n_out(adaptable);
    let room = room.map_or(u64::MAX, |room| room.saturating_sub(kept));
    let held = |tensors: &[Adaptable]| HELD * n_samples as u64 * n_out(tensors);
    let (mut groups, mut first) = (Vec::new(), 0);
    for i in 1..=adaptable.len() {
        if i == adaptable.len() || held(&adaptable[first..=i]) > room {
            groups.push(&adaptable[first..i]);
            first = i;
        }
    }
    groups
}

/// Bytes held for an output of a sample: in f32 as pooled, in f64 in the compact factor of the
/// retain covariance and in the solver.
const HELD: u64 = 4 + 8 + 8;

/// Low-rank pairs as the configuration starts them.
///
/// # Errors
/// Weights that cannot be decoded.
pub fn start(
    open: &OpenModel,
    adaptable: &[Adaptable],
    subspaces: Vec<Subspace>,
    config: &UnlearnConfig,
) -> Result<Pairs, Error> {
    let scale = config.train.alpha / config.subspace.rank as f32;
    match config.train.init {
        Init::Rila => Pairs::rila(&open.weights, adaptable, subspaces, scale),
        Init::Lora => {
            let bases = subspaces.into_iter().map(|s| s.retain.basis).collect();
            Ok(Pairs::lora(
                adaptable,
                config.subspace.rank,
                scale,
                config.train.seed,
                bases,
            ))
        }
    }
}

/// The subspace settings that go with the constraint: a hard projection needs B0 within the
/// complement of P.
pub fn subspace_config(config: &UnlearnConfig) -> SubspaceConfig {
    SubspaceConfig {
        off_retain: config.train.constraint == Constraint::Project,
        ..config.subspace.clone()
    }
}

/// One sentence for all tensors whose bases came out smaller than asked.
pub(crate) fn lowered(subspaces: &[Subspace]) -> Option<String> {
    let all: Vec<String> = subspaces.iter().flat_map(Subspace::lowered).collect();
    let first = all.first()?;
    Some(match all.len() {
        1 => first.clone(),
        n => format!("{first} (and {} more bases, for the same reason)", n - 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_all_tensors_in_order_and_keep_to_their_room() {
        let tensor = |n_out: usize| Adaptable {
            name: n_out.to_string(),
            n_in: 1,
            n_out,
            n_uses: 1,
        };
        let all: Vec<Adaptable> = [5, 30, 7, 7, 7, 200, 1].map(tensor).to_vec();
        let config = SubspaceConfig {
            rank: 1,
            retain_rank: 1,
            ..SubspaceConfig::default()
        };
        assert_eq!(groups(&all, 10, &config, None), [&all[..]]);
        let kept = 4 * 2 * 257;
        for room in [0, 1000, 7000, 30_000, 60_000] {
            let found = groups(&all, 10, &config, Some(kept + room));
            assert_eq!(found.concat(), all, "{room}");
            for group in found {
                let held: usize = group.iter().map(|t| 200 * t.n_out).sum();
                assert!(group.len() == 1 || held as u64 <= room, "{room}: {held}");
            }
        }
    }
}
