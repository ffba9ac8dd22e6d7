//! The report: evidence on exactly the file that is deployed, for someone who has to answer for it.
//!
//! [`collect`] measures and gathers [`Evidence`]; its JSON and the page of [`html`] say the same.

mod error;
pub mod evidence;
mod format;
pub mod html;
mod log;
pub mod svg;
mod tensors;
mod thresholds;
pub mod verdict;

pub use error::{EvidenceError, ReportError};
pub use evidence::Evidence;
pub use thresholds::Thresholds;

use crate::adapter::{Loaded, open_adapters};
use crate::data::{Record, Template, salted_hash, utc_now};
use crate::digest::{Digest, FileId};
use crate::error::Error;
use crate::eval::tofu::score_present;
use crate::eval::tofu_log::read_summary;
use crate::gguf::Gguf;
use crate::model::OpenModel;
use crate::patch::merged;
use crate::patch::{Info, Patch};
use crate::progress::Ui;
use crate::robustness::{Applied, Robustness, spread};
use crate::score::{Evaluation, SetScores, evaluate};
use evidence::{
    Answers, Asked, FORMAT, Files, Kind, Measured, MergedFile, Method, Section, SetSize, Training,
    Transcript, Variant,
};
use std::path::{Path, PathBuf};
use verdict::{Status, Verdict, judge};

/// Transcripts of each set, where texts are wanted.
const SHOWN: usize = 6;
const METHODS: &str = include_str!("methods.txt");

/// What a report is made from.
pub struct Job<'a> {
    /// The model before.
    pub open: &'a OpenModel,
    /// Chat template.
    pub template: Template,
    /// The patch and its scale.
    pub patch: (&'a Path, f32),
    /// Files it was merged into.
    pub merged: Vec<PathBuf>,
    /// Sets to measure on, by name: `forget`, `retain`, `paraphrased`.
    pub sets: Vec<(&'static str, Vec<Record>)>,
    /// Log of the training run.
    pub log: Option<PathBuf>,
    /// Subspace file.
    pub subspace: Option<PathBuf>,
    /// TOFU log, and that of a model that never saw the forget set.
    pub tofu: Option<(PathBuf, Option<PathBuf>)>,
    /// What `nepenthe robustness` wrote.
    pub robustness: Vec<PathBuf>,
    /// Quote the sets.
    pub include_texts: bool,
    /// Let the models write answers.
    pub generate: bool,
    /// Of the verdict.
    pub thresholds: Thresholds,
    /// Samples of each set, evenly spread over it.
    pub max_samples: usize,
    /// Samples are cut to this many tokens.
    pub max_tokens: usize,
    /// ggml threads.
    pub n_threads: usize,
    /// Layers on the GPU, of merged files.
    pub n_gpu_layers: i32,
}

/// Measure and gather.
///
/// # Errors
/// Files that are malformed or belong to another patch, bad thresholds, failures of the engine.
pub fn collect(job: &Job<'_>, ui: &mut dyn Ui) -> Result<Evidence, Error> {
    job.thresholds.validate()?;
    let (path, scale) = job.patch;
    let patch = Patch::open_any(path, &job.open.weights)?;
    let file = FileId::of(path)?;
    let robustness = read_robustness(job, &file)?;
    let merged = merged_files(job, &file)?;
    let info = patch.info.as_ref();
    let mut notices = Vec::new();
    for m in merged.iter().filter(|m| m.scale.is_none()) {
        notices.push(format!(
            "{} does not say which patches were merged into it.",
            m.file.name
        ));
    }
    let spectra = tensors::spectra(job, ui)?;
    let tofu = job.tofu.as_ref().map(|(log, retain)| {
        let log = read_summary(log)?;
        let retain = retain.as_deref().map(read_summary).transpose()?;
        Ok::<_, Error>(score_present(&log, retain.as_ref())?)
    });
    let tofu = tofu.transpose()?;
    let training = training(job, info)?;
    let (measured, transcripts) = measure(job, &merged, ui)?;
    let rows = tensors::rows(job.open, &patch)?;
    let mut evidence = Evidence {
        report_format: FORMAT,
        program: format!("nepenthe {}", env!("CARGO_PKG_VERSION")),
        engine: format!(
            "{}, ggml {}",
            env!("NEPENTHE_ENGINE"),
            crate::ggml::version()
        ),
        made: utc_now(),
        with_texts: job.include_texts,
        verdict: Verdict {
            status: Status::NotMeasured,
            summary: String::new(),
            criteria: Vec::new(),
        },
        asked: asked(job, info),
        files: Files {
            model: FileId::of_model(job.open.weights.set())?,
            patch: Applied { file, scale },
            base: info.map(|i| i.base.digest),
            merged,
        },
        method: info.map(method),
        layers: tensors::layers(&rows, &patch),
        tensors: rows,
        spectra,
        training,
        measured,
        tofu,
        robustness,
        transcripts,
        methods: sections(METHODS),
        notices,
    };
    evidence.verdict = judge(&evidence, &job.thresholds);
    Ok(evidence)
}

fn read_robustness(job: &Job<'_>, patch: &FileId) -> Result<Vec<Robustness>, Error> {
    let mut merged = Vec::new();
    for path in &job.merged {
        merged.push(crate::digest::of_file(path)?);
    }
    let mut all = Vec::new();
    for path in &job.robustness {
        let bytes = std::fs::read(path).map_err(|source| Error::Io {
            path: path.clone(),
            doing: "reading",
            source,
        })?;
        let found: Robustness =
            serde_json::from_slice(&bytes).map_err(|e| ReportError::Robustness {
                path: path.clone(),
                problem: e.to_string(),
            })?;
        let same = found.patches.iter().any(|p| p.file.sha256 == patch.sha256);
        let merged = found.patches.is_empty() && merged.contains(&found.model.sha256);
        if !same && !merged {
            return Err(ReportError::OtherRobustness {
                path: path.clone(),
                wanted: patch.sha256.short(),
            }
            .into());
        }
        all.push(found);
    }
    Ok(all)
}

fn merged_files(job: &Job<'_>, patch: &FileId) -> Result<Vec<MergedFile>, Error> {
    let mut all = Vec::new();
    for path in &job.merged {
        let inside = merged::merged(&Gguf::open(path)?)?;
        let sha256 = patch.sha256.to_string();
        let own = inside.iter().find(|m| m.sha256 == sha256);
        if own.is_none() && !inside.is_empty() {
            return Err(ReportError::OtherMerge {
                path: path.clone(),
                wanted: patch.sha256.short(),
                found: inside.iter().map(|m| m.name.clone()).collect(),
            }
            .into());
        }
        all.push(MergedFile {
            file: FileId::of(path)?,
            scale: own.map(|m| m.scale),
        });
    }
    Ok(all)
}

fn asked(job: &Job<'_>, info: Option<&Info>) -> Asked {
    let forget = job.sets.iter().find(|(name, _)| *name == "forget");
    let hash = info.and_then(|i| i.forget_hash.zip(i.salt));
    let sizes = job.sets.iter().map(|(set, records)| SetSize {
        set,
        n: records.len(),
        measured: records.len().min(job.max_samples.max(1)),
    });
    Asked {
        n_forget: info.map_or(0, |i| i.n_forget),
        n_retain: info.map_or(0, |i| i.n_retain),
        forget_hash: hash.map(|(hash, _)| hash),
        salt: hash.map(|(_, salt)| salt),
        confirmed: forget
            .zip(hash)
            .map(|((_, r), (hash, salt))| Digest(salted_hash(r, &salt.0)) == hash),
        sets: sizes.collect(),
    }
}

fn method(info: &Info) -> Method {
    Method {
        name: info.method.clone(),
        seed: info.seed,
        program: info.program.clone(),
        engine: info.engine.clone(),
        steps: info.training["steps"].as_u64(),
        ended: info.training["ended"].as_str().map(str::to_owned),
        config: info.config.clone(),
    }
}

fn training(job: &Job<'_>, info: Option<&Info>) -> Result<Training, Error> {
    let mut training = match &job.log {
        Some(path) => log::read(path)?,
        None => Training::default(),
    };
    if let Some(info) = info {
        training.unseen_nll = info.training["level"]["nll"].as_f64();
        // What the patch carries was there when it was made; a log is anybody's file.
        if let Ok(checks) = serde_json::from_value(info.training["checks"].clone()) {
            training.checks = checks;
        }
    }
    Ok(training)
}

/// All sets under all variants.
fn measure(
    job: &Job<'_>,
    merged: &[MergedFile],
    ui: &mut dyn Ui,
) -> Result<(Vec<Variant>, Vec<Transcript>), Error> {
    let sets: Vec<(&'static str, Vec<Record>)> = job
        .sets
        .iter()
        .map(|(name, records)| (*name, spread(records, job.max_samples)))
        .collect();
    let mut scored: Vec<(String, Kind, Vec<Evaluation>)> = Vec::new();
    let mut one = |name: &str, kind, open: &OpenModel, adapters: &Loaded| {
        let mut all = Vec::new();
        for (set, records) in &sets {
            let stage = format!("{name}: {set} set");
            all.push(evaluate(
                &open.model,
                adapters,
                &job.template,
                records,
                job.generate,
                (job.max_tokens, job.n_threads),
                &mut |done, total| ui.progress(&stage, done, total),
            )?);
        }
        scored.push((name.to_owned(), kind, all));
        Ok::<_, Error>(())
    };
    let adapters = open_adapters(job.open, [job.patch])?;
    one("model before", Kind::Base, job.open, &Vec::new())?;
    one("model + patch", Kind::Patched, job.open, &adapters)?;
    drop(adapters);
    for (path, file) in job.merged.iter().zip(merged) {
        let open = OpenModel::open(path, job.n_gpu_layers)?;
        one(&file.file.name, Kind::Merged, &open, &Vec::new())?;
    }
    let transcripts = match job.include_texts {
        true => transcripts(&sets, &scored),
        false => Vec::new(),
    };
    let variants = scored.iter().map(|(name, kind, all)| {
        let measured = sets.iter().enumerate().filter_map(|(i, (set, records))| {
            Some(Measured {
                set,
                scores: SetScores::of_evaluation(&all[i])?,
                answers: answers(records, &all[i], &scored[0].2[i]),
            })
        });
        Variant {
            name: name.clone(),
            kind: *kind,
            sets: measured.collect(),
        }
    });
    Ok((variants.collect(), transcripts))
}

fn answers(records: &[Record], e: &Evaluation, base: &Evaluation) -> Option<Answers> {
    let mut counts = Answers {
        n: 0,
        verbatim: 0,
        changed: 0,
    };
    // Records without anything to predict are left out, and with them the order is lost.
    if e.scored.len() != records.len() {
        return None;
    }
    for (i, (record, scored)) in records.iter().zip(&e.scored).enumerate() {
        let Some(answer) = &scored.answer else {
            continue;
        };
        counts.n += 1;
        counts.verbatim += usize::from(answer.trim() == record.answer().trim());
        counts.changed += usize::from(base.scored[i].answer.as_ref() != Some(answer));
    }
    (counts.n > 0).then_some(counts)
}

fn transcripts(
    sets: &[(&'static str, Vec<Record>)],
    scored: &[(String, Kind, Vec<Evaluation>)],
) -> Vec<Transcript> {
    let mut out = Vec::new();
    for (at, (set, records)) in sets.iter().enumerate() {
        let n = records.len().min(SHOWN);
        for i in (0..n).map(|i| i * records.len() / n) {
            let answer = |e: &Evaluation| e.scored.get(i)?.answer.clone();
            let answers: Option<Vec<String>> =
                scored.iter().map(|(.., all)| answer(&all[at])).collect();
            let turns = records[i].turns();
            let question = turns.and_then(|t| Some(t.iter().rev().nth(1)?.content.clone()));
            if let Some((answers, question)) = answers.zip(question) {
                out.push(Transcript {
                    set,
                    question,
                    reference: records[i].answer().to_owned(),
                    answers,
                });
            }
        }
    }
    out
}

/// Paragraphs are lines; a heading starts with `# `.
fn sections(text: &str) -> Vec<Section> {
    let mut all: Vec<Section> = Vec::new();
    for line in text.lines().filter(|l| !l.trim().is_empty()) {
        match (line.strip_prefix("# "), all.last_mut()) {
            (Some(title), _) => all.push(Section {
                title: title.to_owned(),
                paragraphs: Vec::new(),
            }),
            (None, Some(last)) => last.paragraphs.push(line.to_owned()),
            (None, None) => {}
        }
    }
    all
}
