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
/// `shared`, retain bases computed before).
///
/// # Errors
/// When llama.cpp fails, or shared bases do not fit the model.
pub fn subspaces(
    open: &OpenModel,
    adaptable: &[Adaptable],
    (forget, retain): (&[Sample], &[Sample]),
    shared: Option<Vec<RetainBasis>>,
    config: &SubspaceConfig,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Subspace>, Error> {
    let forget = &forget[..forget.len().min(CAPTURE_SAMPLES)];
    let retain = &retain[..retain.len().min(CAPTURE_SAMPLES)];
    let n_retain = if shared.is_some() { 0 } else { retain.len() };
    let total = forget.len() + n_retain;
    let h_f = pooled_outputs(&open.model, adaptable, forget, n_threads, &mut |n| {
        progress(n, total)
    })?;
    let n_f = forget.len();
    let h_r = match &shared {
        Some(_) => Vec::new(),
        None => pooled_outputs(&open.model, adaptable, retain, n_threads, &mut |n| {
            progress(n_f + n, total)
        })?,
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
    Ok(solve_all(config, &pooled)?)
}

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
