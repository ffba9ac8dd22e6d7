//! The patches that apply together, as one adapter.
//!
//! llama.cpp keeps the adapters of a context in an unordered map, so that with several of them the
//! order of floating-point sums varies from run to run. A set of several patches is therefore laid
//! end to end along the rank, B = [s₁B₁, s₂B₂, ...] and A = [A₁; A₂; ...] per weight, in the order
//! of the patches' ids, and loaded as one adapter: the result depends on which patches are in the
//! set, not on when they came. A single patch is loaded as it stands.

use crate::adapter::{Loaded, load_patch};
use crate::digest::Digest;
use crate::error::Error;
use crate::ggml::Model;
use crate::model::OpenModel;
use crate::patch::delta::{Delta, deltas};
use crate::patch::{Canary, Info, Intake, Patch, PatchId, Update};
use crate::proof::{measure, same_effect};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::sync::Arc;

/// A patch that applies.
#[derive(Debug, Clone)]
pub struct ActivePatch {
    /// Its id.
    pub id: PatchId,
    /// File name it was applied from.
    pub name: String,
    /// The scale it applies at.
    pub scale: f32,
    /// Where it comes from and what it does.
    pub info: Arc<Info>,
    /// Whether the store brought it; it goes when the store says so.
    pub stored: bool,
    pub(super) intake: Arc<Intake>,
}

/// Patches that apply together. Never changes: a change of the runtime's patches makes a new set.
pub struct ActiveSet {
    generation: u64,
    digest: Digest,
    patches: Vec<ActivePatch>,
    adapters: Loaded,
}

impl ActiveSet {
    /// The set of no patches, which every runtime without a store begins with.
    pub fn none() -> Self {
        Self {
            generation: 0,
            digest: Self::digest_of(&[]),
            patches: Vec::new(),
            adapters: Vec::new(),
        }
    }

    /// The set of `patches`, which have been checked against the model.
    pub(super) fn build(
        generation: u64,
        mut patches: Vec<ActivePatch>,
        open: &OpenModel,
    ) -> Result<Self, Error> {
        patches.sort_by_key(|p| p.id.0.0);
        let adapters = match patches.as_slice() {
            [] => Vec::new(),
            [one] => vec![(one.intake.adapter(&open.model)?, one.scale)],
            several => {
                let read = |p: &ActivePatch| Ok((p.intake.patch()?, p.scale));
                let several = several
                    .iter()
                    .map(read)
                    .collect::<Result<Vec<_>, Error>>()?;
                let updates = concatenated(open, &several)?;
                let patch = Patch {
                    arch: open.weights.arch()?.to_owned(),
                    info: None,
                    updates,
                    path: "the patches together".into(),
                };
                // Patches of zeros alone leave nothing to load.
                match patch.updates.is_empty() {
                    true => Vec::new(),
                    false => vec![(load_patch(&open.model, &patch)?, 1.0)],
                }
            }
        };
        Ok(Self {
            generation,
            digest: Self::digest_of(&patches),
            patches,
            adapters,
        })
    }

    /// SHA-256 over ids and scales, in the order of the ids.
    pub(super) fn digest_of(patches: &[ActivePatch]) -> Digest {
        let mut patches: Vec<_> = patches.iter().map(|p| (p.id.0.0, p.scale)).collect();
        patches.sort_by_key(|(id, _)| *id);
        let mut hash = Sha256::new();
        for (id, scale) in patches {
            hash.update(id);
            hash.update(scale.to_le_bytes());
        }
        Digest(hash.finalize().into())
    }

    /// Try what is new in it: every patch that `before` did not hold, alone, and several as one
    /// adapter against the same side by side.
    pub(super) fn prove(
        &self,
        before: &Self,
        model: &Model,
        n_threads: usize,
    ) -> Result<(), Error> {
        for p in self.patches.iter().filter(|p| !before.contains(p.id)) {
            if p.info.canaries.is_empty() {
                continue;
            }
            let adapter = match self.adapters.as_slice() {
                [(adapter, _)] if self.patches.len() == 1 => adapter.clone(),
                _ => p.intake.adapter(model)?,
            };
            let alone = vec![(adapter, 1.0)];
            if let Some(effect) = measure(model, &alone, &p.info.canaries, n_threads)? {
                effect.believe(&p.name)?;
            }
        }
        let canaries = self.patches.iter().flat_map(|p| &p.info.canaries);
        let canaries: Vec<Canary> = canaries.cloned().collect();
        if self.patches.len() > 1 && !canaries.is_empty() {
            let load = |p: &ActivePatch| Ok((p.intake.adapter(model)?, p.scale));
            let apart = self
                .patches
                .iter()
                .map(load)
                .collect::<Result<_, Error>>()?;
            same_effect(model, (&self.adapters, &apart), &canaries, n_threads)?;
        }
        Ok(())
    }

    /// How many sets the runtime had before this one.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Which patches at which scales: sets of the same digest compute the same.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Its patches, in the order of their ids.
    pub fn patches(&self) -> &[ActivePatch] {
        &self.patches
    }

    /// Whether patch `id` is in it.
    pub fn contains(&self, id: PatchId) -> bool {
        self.patches.iter().any(|p| p.id == id)
    }

    /// What a llama.cpp context is given to apply it: one adapter, or none.
    pub fn adapters(&self) -> &Loaded {
        &self.adapters
    }
}

impl fmt::Debug for ActiveSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActiveSet")
            .field("generation", &self.generation)
            .field("patches", &self.patches)
            .finish_non_exhaustive()
    }
}

/// One update per weight: those of all `patches` at their scales, laid along the rank.
fn concatenated(open: &OpenModel, patches: &[(Patch, f32)]) -> Result<Vec<Update>, Error> {
    let mut by_name: Vec<(&str, Delta<'_>)> = deltas(&open.weights, patches)?.into_iter().collect();
    by_name.sort_by_key(|(name, _)| *name);
    let update = |(name, delta): &(&str, Delta<'_>)| {
        let (lora_a, lora_b, rank) = delta.factors();
        Update {
            tensor: (*name).to_owned(),
            n_in: delta.n_in(),
            n_out: delta.n_out(),
            rank,
            scale: 1.0,
            lora_a,
            lora_b,
        }
    };
    Ok(by_name.iter().map(update).collect())
}
