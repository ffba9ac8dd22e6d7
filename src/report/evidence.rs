//! What a report says, as data: the JSON is this, and the page is made of nothing else.

use super::verdict::Verdict;
use crate::digest::{Digest, FileId};
use crate::eval::tofu::TofuScores;
use crate::robustness::{Applied, Robustness};
use crate::score::SetScores;
use crate::train::fit::Check;
use serde::Serialize;
use serde_json::Value as Json;

/// Form of the JSON.
pub const FORMAT: u32 = 1;

/// A whole report. Holds no text of any data set unless `with_texts`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evidence {
    /// [`FORMAT`].
    pub report_format: u32,
    /// Program that measured.
    pub program: String,
    /// Engine that decoded.
    pub engine: String,
    /// When, in UTC.
    pub made: String,
    /// Whether texts of the data are in here.
    pub with_texts: bool,
    /// Criteria and what came of them.
    pub verdict: Verdict,
    /// What the patch was asked to forget and to keep.
    pub asked: Asked,
    /// Which files.
    pub files: Files,
    /// How the patch was made; none for adapters without provenance.
    pub method: Option<Method>,
    /// Where the update lives, tensor by tensor.
    pub tensors: Vec<TensorRow>,
    /// The same, layer by layer.
    pub layers: Vec<LayerRow>,
    /// Eigenvalues of what the sets occupy, where a subspace file was at hand.
    pub spectra: Vec<Spectrum>,
    /// How training went.
    pub training: Training,
    /// Scores measured for this report, the model alone first.
    pub measured: Vec<Variant>,
    /// Scores of a TOFU log.
    pub tofu: Option<TofuScores>,
    /// Robustness files.
    pub robustness: Vec<Robustness>,
    /// Answers word for word; only with texts.
    pub transcripts: Vec<Transcript>,
    /// How to read all this, in plain words.
    pub methods: Vec<Section>,
    /// What the reader should know about the data.
    pub notices: Vec<String>,
}

/// What was asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Asked {
    /// Records to be forgotten, as the patch says.
    pub n_forget: u32,
    /// Records to be kept.
    pub n_retain: u32,
    /// SHA-256 over salt and forget set.
    pub forget_hash: Option<Digest>,
    /// Its salt.
    pub salt: Option<Digest>,
    /// Whether the forget set measured here has that hash; none where either is missing.
    pub confirmed: Option<bool>,
    /// Sets given for this report.
    pub sets: Vec<SetSize>,
}

/// A set given for this report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SetSize {
    /// `forget`, `retain` or `paraphrased`.
    pub set: &'static str,
    /// Records in the file.
    pub n: usize,
    /// Records measured, evenly spread over it.
    pub measured: usize,
}

/// Which files.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Files {
    /// The model before.
    pub model: FileId,
    /// The patch and its scale.
    pub patch: Applied,
    /// The model that the patch says it is for.
    pub base: Option<Digest>,
    /// Files that the patch was merged into.
    pub merged: Vec<MergedFile>,
}

/// A merged file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergedFile {
    /// The file.
    pub file: FileId,
    /// Scale at which it says it contains the patch; none where it says nothing.
    pub scale: Option<f32>,
}

/// How the patch was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Method {
    /// `reglu`, `lora`, ...
    pub name: String,
    /// Seed.
    pub seed: u64,
    /// Program that made it.
    pub program: String,
    /// Its engine.
    pub engine: String,
    /// Optimiser steps.
    pub steps: Option<u64>,
    /// Why training ended.
    pub ended: Option<String>,
    /// All settings.
    pub config: Json,
}

/// Where the update of one tensor lives.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorRow {
    /// Name in the model.
    pub name: String,
    /// Block; none for tensors outside of blocks.
    pub layer: Option<u32>,
    /// Name within the block.
    pub kind: String,
    /// Rank of the update.
    pub rank: u32,
    /// Size of the retain basis P.
    pub retain_rank: u32,
    /// ‖ΔW‖/‖W‖.
    pub relative_norm: f32,
    /// ‖PᵀΔW‖/‖ΔW‖.
    pub retain_fraction: f32,
    /// Singular values of ΔW as stored, largest first; empty where the factors are not those of a
    /// singular value decomposition.
    pub singular_values: Vec<f32>,
}

/// Where the update of one layer lives.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerRow {
    /// Block.
    pub layer: u32,
    /// Share of Σ‖ΔW‖² over all layers.
    pub share: f64,
    /// Mean ‖ΔW‖/‖W‖.
    pub relative_norm: f64,
    /// Largest ‖PᵀΔW‖/‖ΔW‖.
    pub retain_fraction: f64,
}

/// Eigenvalues of one tensor's outputs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spectrum {
    /// Name in the model.
    pub tensor: String,
    /// Size of P.
    pub retain_rank: usize,
    /// Of the retain covariance, largest first.
    pub retain: Vec<f32>,
    /// Of the forget covariance, where the forget set was given.
    pub forget: Vec<f32>,
}

/// How training went.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Training {
    /// Answer NLL of answers never seen, at which it stops.
    pub unseen_nll: Option<f64>,
    /// Checks of the forget set.
    pub checks: Vec<Check>,
    /// Steps of the log.
    pub steps: Vec<StepRow>,
}

/// One step of the log.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, serde::Deserialize)]
pub struct StepRow {
    /// From 1.
    pub step: u64,
    /// Loss on the forget samples.
    pub forget: Option<f64>,
    /// Loss on the retain samples.
    pub retain: Option<f64>,
}

/// What a variant is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The model before.
    Base,
    /// The model with the patch.
    Patched,
    /// A merged file.
    Merged,
}

/// Scores of one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Variant {
    /// In words.
    pub name: String,
    /// Which.
    pub kind: Kind,
    /// Set by set, in the order of [`Asked::sets`].
    pub sets: Vec<Measured>,
}

impl Variant {
    /// Scores of a set by name.
    pub fn set(&self, name: &str) -> Option<&SetScores> {
        let found = self.sets.iter().find(|s| s.set == name);
        found.map(|s| &s.scores)
    }
}

/// One set under one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Its name.
    pub set: &'static str,
    /// Scores.
    pub scores: SetScores,
    /// What can be said of the answers without quoting them.
    pub answers: Option<Answers>,
}

/// Greedy answers, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Answers {
    /// Written.
    pub n: usize,
    /// Word for word the true answer.
    pub verbatim: usize,
    /// Other than the model's before.
    pub changed: usize,
}

/// A question and what every variant answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Transcript {
    /// Its set.
    pub set: &'static str,
    /// The question.
    pub question: String,
    /// The true answer.
    pub reference: String,
    /// In the order of [`Evidence::measured`].
    pub answers: Vec<String>,
}

/// A part of the methods page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Section {
    /// Heading.
    pub title: String,
    /// Paragraphs.
    pub paragraphs: Vec<String>,
}
