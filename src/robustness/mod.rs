//! Does what was forgotten stay forgotten? Other scales of the patch, other wordings, training on
//! other data, other quantisations of the merged file.
//!
//! Everything but relearning is decoded by llama.cpp, as the file will be used; relearning is
//! scored on the graphs that are trained.

pub mod relearn;

use crate::adapter::{Loaded, open_adapters};
use crate::data::{Record, Sample, Template, samples};
use crate::digest::FileId;
use crate::error::Error;
use crate::model::OpenModel;
use crate::progress::Ui;
use crate::score::{SetScores, losses_of};
use crate::train::memory::Budget;
use relearn::{Relearn, RelearnConfig, relearn};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Form of the JSON.
pub const FORMAT: u32 = 1;

/// Texts to measure on.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    /// What was forgotten.
    pub forget: Vec<Record>,
    /// What is kept; may be empty.
    pub retain: Vec<Record>,
    /// The forget questions in other words; may be empty.
    pub paraphrased: Vec<Record>,
}

/// What is tried.
pub struct Job<'a> {
    /// The model, or a merged file.
    pub open: &'a OpenModel,
    /// Chat template.
    pub template: Template,
    /// Patches with their scales; none for a merged file.
    pub specs: Vec<(&'a Path, f32)>,
    /// Multiples of those scales to try; looked at only where there is a patch.
    pub scales: Vec<f32>,
    /// Files that the patch was merged into.
    pub merged: Vec<PathBuf>,
    /// Texts.
    pub texts: Texts,
    /// What to train on, and how.
    pub relearn: Option<(Vec<Record>, RelearnConfig)>,
    /// Samples of each set, evenly spread over it.
    pub max_samples: usize,
    /// Samples are cut to this many tokens.
    pub max_tokens: usize,
    /// ggml threads.
    pub n_threads: usize,
    /// What relearning may take beside the mapped model; none: what the machine has free.
    pub memory: Option<Budget>,
    /// Layers on the GPU, of merged files.
    pub n_gpu_layers: i32,
}

/// A patch as it was applied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Applied {
    /// The patch.
    pub file: FileId,
    /// Its scale.
    pub scale: f32,
}

/// All sets under one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetsScored {
    /// Forget set.
    pub forget: SetScores,
    /// Retain set, if one was given.
    pub retain: Option<SetScores>,
    /// Forget questions in other words, if they were given.
    pub paraphrased: Option<SetScores>,
}

/// One scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScalePoint {
    /// Multiple of the deployed scale: 0 is the model alone, 1 what is deployed.
    pub scale: f32,
    /// Scores.
    pub sets: SetsScored,
}

/// One merged file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilePoint {
    /// The file.
    pub file: FileId,
    /// Its types and how many tensors have each.
    pub types: BTreeMap<String, usize>,
    /// Scores.
    pub sets: SetsScored,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Robustness {
    /// [`FORMAT`].
    pub robustness_format: u32,
    /// The model.
    pub model: FileId,
    /// What was applied to it.
    pub patches: Vec<Applied>,
    /// Model with patches, or the merged file.
    pub deployed: SetsScored,
    /// Sweep of the scale; empty without a patch.
    pub scales: Vec<ScalePoint>,
    /// Training on top of it.
    pub relearn: Option<Relearn>,
    /// Merged files.
    pub files: Vec<FilePoint>,
}

/// Samples of each set.
struct Tokens {
    forget: Vec<Sample>,
    retain: Vec<Sample>,
    paraphrased: Vec<Sample>,
}

impl Tokens {
    fn new(job: &Job<'_>, open: &OpenModel, ui: &mut dyn Ui) -> Result<Self, Error> {
        let mut notices = Vec::new();
        let mut tokens = |records: &[Record], set: &str| {
            if records.is_empty() {
                return Ok(Vec::new());
            }
            let records = spread(records, job.max_samples);
            let max = job.max_tokens;
            samples(&open.model, &job.template, &records, max, set, &mut notices)
        };
        let all = Self {
            forget: tokens(&job.texts.forget, "forget")?,
            retain: tokens(&job.texts.retain, "retain")?,
            paraphrased: tokens(&job.texts.paraphrased, "paraphrased")?,
        };
        for notice in &notices {
            ui.notice(notice);
        }
        Ok(all)
    }

    fn score(
        &self,
        open: &OpenModel,
        adapters: &Loaded,
        n_threads: usize,
    ) -> Result<SetsScored, Error> {
        let of = |samples: &[Sample]| -> Result<Option<SetScores>, Error> {
            if samples.is_empty() {
                return Ok(None);
            }
            let losses = losses_of(&open.model, adapters, samples, n_threads)?;
            Ok(SetScores::of_losses(&losses))
        };
        Ok(SetsScored {
            forget: of(&self.forget)?.ok_or_else(no_forget)?,
            retain: of(&self.retain)?,
            paraphrased: of(&self.paraphrased)?,
        })
    }
}

fn no_forget() -> Error {
    Error::Setting {
        setting: "forget",
        wanted: "at least one record".into(),
        found: "none".into(),
    }
}

/// At most `most` records, evenly spread over all of them.
pub fn spread(records: &[Record], most: usize) -> Vec<Record> {
    let n = records.len().min(most.max(1));
    (0..n)
        .map(|i| records[i * records.len() / n].clone())
        .collect()
}

/// Try everything that `job` asks for.
///
/// # Errors
/// Bad settings, patches that do not fit, texts that cannot be tokenised, failures of the engine.
pub fn robustness(job: &Job<'_>, ui: &mut dyn Ui) -> Result<Robustness, Error> {
    if let Some(bad) = job.scales.iter().find(|s| !s.is_finite()) {
        return Err(Error::Setting {
            setting: "scales",
            wanted: "finite numbers".into(),
            found: bad.to_string(),
        });
    }
    if let Some((_, config)) = &job.relearn {
        config.validate()?;
    }
    let tokens = Tokens::new(job, job.open, ui)?;
    let loaded = open_adapters(job.open, job.specs.iter().copied())?;
    let patches: Result<Vec<Applied>, Error> = job.specs.iter().map(applied).collect();
    let deployed = tokens.score(job.open, &loaded, job.n_threads)?;
    let mut scales = Vec::new();
    let wanted: &[f32] = if loaded.is_empty() { &[] } else { &job.scales };
    for (done, &scale) in wanted.iter().enumerate() {
        ui.progress("scales", done, wanted.len());
        let scaled = loaded.iter().map(|(a, s)| (a.clone(), s * scale));
        scales.push(ScalePoint {
            scale,
            sets: tokens.score(job.open, &scaled.collect(), job.n_threads)?,
        });
    }
    drop(loaded);
    let mut files = Vec::new();
    for (done, path) in job.merged.iter().enumerate() {
        ui.progress("merged files", done, job.merged.len());
        files.push(merged(job, path, ui)?);
    }
    let relearn = match &job.relearn {
        Some((records, config)) => Some(relearn(
            job,
            records,
            config,
            (&tokens.forget, &tokens.retain),
            ui,
        )?),
        None => None,
    };
    Ok(Robustness {
        robustness_format: FORMAT,
        model: FileId::of_model(job.open.weights.set())?,
        patches: patches?,
        deployed,
        scales,
        relearn,
        files,
    })
}

fn applied(spec: &(&Path, f32)) -> Result<Applied, Error> {
    // What PEFT saves is a folder; its name and the digest of its weights stand for it.
    let weights = spec.0.join("adapter_model.safetensors");
    let file = if spec.0.is_dir() { &weights } else { spec.0 };
    Ok(Applied {
        file: FileId::of(file)?,
        scale: spec.1,
    })
}

fn merged(job: &Job<'_>, path: &Path, ui: &mut dyn Ui) -> Result<FilePoint, Error> {
    let open = OpenModel::open(path, job.n_gpu_layers)?;
    let tokens = Tokens::new(job, &open, ui)?;
    let mut types = BTreeMap::new();
    for t in open.weights.set().parts().iter().flat_map(|p| p.tensors()) {
        *types.entry(t.ty.name().to_owned()).or_default() += 1;
    }
    Ok(FilePoint {
        file: FileId::of_model(open.weights.set())?,
        types,
        sets: tokens.score(&open, &Vec::new(), job.n_threads)?,
    })
}
