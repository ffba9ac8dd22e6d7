//! Corrections: patches for the merged file itself.
//!
//! What rounding loses tensor by tensor adds up along the model. A small update trained on the
//! written file towards model and patches takes most of it back, and is merged like any patch: what
//! that loses is smaller again, because the noise of a merge grows with the update.

use super::compare::Side;
use super::moments::Sources;
use crate::error::Error;
use crate::patch::Patch;
use crate::progress::Ui;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::Path;

/// A merged file, and what it should be.
pub struct Draft<'a> {
    /// Model and patches.
    pub unmerged: Side<'a>,
    /// The merged file, in one part.
    pub merged: &'a Path,
    /// Texts at hand.
    pub sources: Sources<'a>,
    /// Tensors that may change.
    pub tensors: &'a BTreeSet<String>,
    /// Which round this is, from 0.
    pub round: usize,
    /// ggml threads.
    pub n_threads: usize,
    /// Layers on the GPU.
    pub n_gpu_layers: i32,
}

/// A correction as it was made, before it is merged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Correction {
    /// KL(model and patches ‖ file) on the texts' answers, a mean of the sets' means, in the first
    /// sixth of the training, nats a token.
    pub kl_before: f64,
    /// The same in the last sixth.
    pub kl_trained: f64,
    /// ‖ΔW‖/‖W‖, a mean over tensors.
    pub relative_norm: f64,
}

/// Makes corrections.
pub trait Correct {
    /// A patch of `draft.merged` that takes it nearer to model and patches.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    fn patch(&mut self, draft: &Draft<'_>, ui: &mut dyn Ui) -> Result<(Patch, Correction), Error>;
}
