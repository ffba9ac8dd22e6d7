//! The same-grid merge from files to a file: calibrate → fit → write → accept → put in place.

use super::calibration::Calibration;
use super::correct::{Correct, Correction, Draft};
use super::decide::{Limits, Policy, Reason};
use super::deliver::{Delivered, Delivery, deliver};
use super::gate::{GateConfig, Verdict, gate};
use super::imatrix::Imatrix;
use super::moments::{MomentsConfig, Sources, capture};
use super::rewrite::{Form, OutType, rewrite};
use super::same_grid::{Fitted, Options, Outcome, Rounding, fit};
use super::sketch::{SketchFile, companion};
use crate::adapter::{Loaded, load_patch, open_adapters};
use crate::data::{Record, Sample, Template, general_records, samples};
use crate::digest::of_file;
use crate::error::Error;
use crate::ggml::Model;
use crate::gguf::GgufWriter;
use crate::graph::weights::Weights;
use crate::model::OpenModel;
use crate::patch::{Info, Patch, Update, base_of};
use crate::progress::Ui;
use serde::Serialize;
use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Models up to this size are open together with their merged file when the two are compared.
const TOGETHER_BYTES: u64 = 384 << 20;

/// Texts a merge is calibrated and judged on; any may be empty.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    /// What the patch forgets.
    pub forget: Vec<Record>,
    /// What it keeps.
    pub retain: Vec<Record>,
    /// Anything else the model should go on doing; empty: the built-in general text.
    pub general: Vec<Record>,
}

/// What is written.
#[derive(Debug, Clone)]
pub enum How {
    /// Codes on the grids that are there.
    SameGrid(Options),
    /// Adapted tensors in another type, or encoded again in their own.
    Rewrite(OutType),
}

/// A whole merge.
#[derive(Debug)]
pub struct Job<'a> {
    /// The model, any part of a split one.
    pub model: &'a Path,
    /// Patches and adapters with their scales.
    pub specs: Vec<(&'a Path, f32)>,
    /// Texts at hand.
    pub texts: Texts,
    /// Chat template of the texts; none: the model's own.
    pub template: Option<Template>,
    /// A sketch of the moments; none: the one beside the patch, if it is there and no texts are.
    pub sketch: Option<&'a Path>,
    /// An importance matrix of llama.cpp's.
    pub imatrix: Option<&'a Path>,
    /// What is written.
    pub how: How,
    /// Most bytes the file may grow by, percent of its size.
    pub max_growth: Option<f64>,
    /// How often a same-grid merge is corrected.
    pub rounds: usize,
    /// What the merged file must do; none: it is not tried.
    pub gate: Option<GateConfig>,
    /// Put the file in place although it fails.
    pub keep_failed: bool,
    /// Where it goes.
    pub delivery: Delivery<'a>,
    /// What the files look like.
    pub form: Form,
    /// Samples are cut to this many tokens.
    pub max_tokens: usize,
    /// ggml threads.
    pub n_threads: usize,
    /// Layers on the GPU.
    pub n_gpu_layers: i32,
}

/// What was done.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where the second moments came from; none for a rewrite.
    pub calibration: Option<&'static str>,
    /// Whether errors are of tokens that the merge was not fitted to.
    pub held_out: bool,
    /// Tensor by tensor, of a same-grid merge; errors are those of the first fit.
    pub tensors: Vec<Outcome>,
    /// What was corrected after it, round by round.
    pub corrections: Vec<Correction>,
    /// Tensors and their types before and after, of a rewrite.
    pub rewritten: Vec<(String, String, String)>,
    /// Size of the model before, bytes.
    pub file_len_before: u64,
    /// What model and patch do, and the file.
    pub verdict: Option<Verdict>,
    /// Side adapter that belongs to the file.
    pub residue: Option<PathBuf>,
    /// Where everything is.
    #[serde(flatten)]
    pub delivered: Delivered,
}

/// Tokenised texts.
#[derive(Debug, Default)]
struct Tokens {
    forget: Vec<Sample>,
    retain: Vec<Sample>,
    general: Vec<Sample>,
}

impl Tokens {
    fn new(job: &Job<'_>, open: &OpenModel, ui: &mut dyn Ui) -> Result<Self, Error> {
        let template = match &job.template {
            Some(t) => t.clone(),
            None => open.template()?,
        };
        let mut notices = Vec::new();
        let mut tokenise = |records: &[Record], set: &str| -> Result<Vec<Sample>, Error> {
            if records.is_empty() {
                return Ok(Vec::new());
            }
            let n = job.max_tokens;
            Ok(samples(
                &open.model,
                &template,
                records,
                n,
                set,
                &mut notices,
            )?)
        };
        let general = match job.texts.general.as_slice() {
            [] => general_records(),
            given => given.to_vec(),
        };
        let tokens = Self {
            forget: tokenise(&job.texts.forget, "forget")?,
            retain: tokenise(&job.texts.retain, "retain")?,
            general: tokenise(&general, "general")?,
        };
        for notice in &notices {
            ui.notice(notice);
        }
        Ok(tokens)
    }

    fn sources(&self) -> Sources<'_> {
        Sources {
            forget: &self.forget,
            retain: &self.retain,
            general: &self.general,
        }
    }
}

/// Merge.
///
/// # Errors
/// Patches that do not fit, a merged file that fails the gate ([`super::gate::GateError`]; nothing is
/// then at the output; with `keep_failed` it is, and the report's verdict says that it failed),
/// bad files, failures of engine and disk.
///
/// `correct` makes the corrections that the job has rounds for.
pub fn merge(
    job: Job<'_>,
    correct: Option<Box<dyn Correct>>,
    ui: &mut dyn Ui,
) -> Result<Report, Error> {
    if job.rounds > 0 {
        job.check_rounds()?;
    }
    let weights = Weights::open(job.model)?;
    let patches = open_patches(&job, &weights)?;
    let parts = weights.set().parts().iter();
    let file_len_before = parts.map(crate::gguf::Gguf::file_len).sum();
    let mut run = Run {
        job: &job,
        weights: &weights,
        patches: &patches,
        tokens: OnceCell::new(),
        report: Report {
            calibration: None,
            held_out: false,
            tensors: Vec::new(),
            corrections: Vec::new(),
            rewritten: Vec::new(),
            file_len_before,
            verdict: None,
            residue: None,
            delivered: Delivered::default(),
        },
    };
    match &job.how {
        How::Rewrite(out_type) => {
            let plan = rewrite(&weights, &patches, *out_type, job.form)?;
            run.report.rewritten = plan.tensors;
            run.put(plan.files, &[], ui)?;
        }
        How::SameGrid(options) => {
            let mut options = options.clone();
            if let Some(percent) = job.max_growth {
                options.limits = options.limits.with_growth(percent, file_len_before);
            }
            let mut fitted = run.fit_all(&options, ui)?;
            if let Some(mut correct) = correct {
                for round in 0..job.rounds {
                    let correction;
                    (fitted, correction) =
                        run.corrected(fitted, (round, &options), correct.as_mut(), ui)?;
                    run.report.corrections.push(correction);
                }
            }
            let files = fitted.files(&weights, &patches, job.form)?;
            run.put(files, &fitted.residues, ui)?;
            run.report.tensors = fitted.outcomes;
        }
    }
    Ok(run.report)
}

impl Job<'_> {
    /// Corrections are trained on texts, and to what is in the file.
    fn check_rounds(&self) -> Result<(), Error> {
        let found = match &self.how {
            How::Rewrite(_) => "a merge into another type",
            How::SameGrid(o) if matches!(o.limits.policy, Policy::Residue | Policy::Auto) => {
                "a policy that may leave residues beside the file"
            }
            How::SameGrid(_) if self.texts.forget.is_empty() => "no --forget",
            How::SameGrid(_) => return Ok(()),
        };
        Err(Error::Setting {
            setting: "rounds",
            wanted: "a merge into the file (--policy grid or promote) and the texts it is for"
                .into(),
            found: found.into(),
        })
    }
}

fn open_patches(job: &Job<'_>, weights: &Weights) -> Result<Vec<(Patch, f32)>, Error> {
    job.specs
        .iter()
        .map(|&(path, scale)| {
            let patch = Patch::open_any(path, weights)?;
            patch.check_shapes(weights)?;
            patch.check_base(weights)?;
            Ok((patch, scale))
        })
        .collect()
}

/// A merge under way.
struct Run<'j> {
    job: &'j Job<'j>,
    weights: &'j Weights,
    patches: &'j [(Patch, f32)],
    /// Made when a model is first open for them.
    tokens: OnceCell<Tokens>,
    report: Report,
}

impl Run<'_> {
    fn tokens(&self, open: &OpenModel, ui: &mut dyn Ui) -> Result<&Tokens, Error> {
        if self.tokens.get().is_none() {
            let made = Tokens::new(self.job, open, ui)?;
            return Ok(self.tokens.get_or_init(|| made));
        }
        Ok(self.tokens.get().expect("looked at above"))
    }

    /// Every tensor fitted; what the user should know of it is said.
    fn fit_all(&mut self, options: &Options, ui: &mut dyn Ui) -> Result<Fitted, Error> {
        let scratch = self.job.delivery.dir(self.job.model);
        let calibration = self.calibrate(&scratch, ui)?;
        self.report.calibration = Some(calibration.name());
        self.report.held_out = calibration.holds_out();
        if !calibration.knows_forget() && options.rounding == Rounding::Feedback {
            ui.notice(&format!(
            "calibrated by {} alone: what the patch changes most is not in there, and more of it may be lost; --forget and --retain, or the sketch that belongs to the patch, say what it is",
            calibration.name()
        ));
        }
        let fitted = fit(
            self.weights,
            self.patches,
            &calibration,
            options,
            &scratch,
            &mut |done, total| ui.progress("fitting", done, total),
        )?;
        let left_out = fitted.outcomes.iter().filter(|o| o.action.is_none());
        let left_out: Vec<&Outcome> = left_out.collect();
        if let Some(first) = left_out.first() {
            ui.notice(&format!(
            "{} of {} tensors stay as they are: {} is {}, a type without a grid to merge on; --promote writes such tensors in a larger one",
            left_out.len(),
            fitted.outcomes.len(),
            first.tensor,
            first.from
        ));
        }
        let in_need = fitted
            .outcomes
            .iter()
            .filter(|o| o.reason == Reason::NotAllowed);
        let n = in_need.count();
        if n > 0 {
            ui.notice(&format!(
            "{n} of {} tensors get updates that their grid holds badly; --policy auto or --max-growth lets them grow by a type or keep a residue beside the file",
            fitted.outcomes.len()
        ));
        }
        Ok(fitted)
    }

    /// `fitted` with a patch merged into it that `correct` makes of the file it would be.
    fn corrected(
        &self,
        fitted: Fitted,
        (round, options): (usize, &Options),
        correct: &mut dyn Correct,
        ui: &mut dyn Ui,
    ) -> Result<(Fitted, Correction), Error> {
        let job = self.job;
        let scratch = job.delivery.dir(job.model);
        let dir = tempfile::tempdir_in(&scratch).map_err(|source| Error::Io {
            path: scratch.clone(),
            doing: "making a temporary directory",
            source,
        })?;
        let draft = dir.path().join("draft.gguf");
        let form = Form {
            join: true,
            record: false,
        };
        for file in fitted.files(self.weights, self.patches, form)? {
            let mut out = std::fs::File::create(&draft).map_err(|source| Error::Io {
                path: draft.clone(),
                doing: "writing",
                source,
            })?;
            file.write_to(&mut out)?;
        }
        self.weights.release();
        if self.tokens.get().is_none() {
            self.tokens(&OpenModel::open(job.model, job.n_gpu_layers)?, ui)?;
        }
        let tokens = self.tokens.get().expect("made above");
        let tensors: BTreeSet<String> = fitted.replaced.keys().cloned().collect();
        let (patch, correction) = correct.patch(
            &Draft {
                unmerged: &|| self.unmerged(),
                merged: &draft,
                sources: tokens.sources(),
                tensors: &tensors,
                round,
                n_threads: job.n_threads,
                n_gpu_layers: job.n_gpu_layers,
            },
            ui,
        )?;
        let calibration = {
            let open = OpenModel::open(&draft, job.n_gpu_layers)?;
            let adapters = vec![(load_patch(&open.model, &patch)?, 1.0)];
            let tensors: Vec<String> = patch.updates.iter().map(|u| u.tensor.clone()).collect();
            self.captured((&open, &adapters), &tensors, tokens, &scratch, ui)?
        };
        let options = Options {
            limits: Limits {
                policy: Policy::Grid,
                ..options.limits
            },
            promote: false,
            ..options.clone()
        };
        let later = fit(
            &Weights::open(&draft)?,
            &[(patch, 1.0)],
            &calibration,
            &options,
            &scratch,
            &mut |done, total| ui.progress("fitting the correction", done, total),
        )?;
        Ok((fitted.then(later, self.weights)?, correction))
    }

    /// Model and patches.
    fn unmerged(&self) -> Result<(Model, Loaded), Error> {
        let open = OpenModel::open(self.job.model, self.job.n_gpu_layers)?;
        let adapters = open_adapters(&open, self.job.specs.iter().copied())?;
        Ok((open.model, adapters))
    }

    fn captured(
        &self,
        (open, adapters): (&OpenModel, &Loaded),
        tensors: &[String],
        tokens: &Tokens,
        scratch: &Path,
        ui: &mut dyn Ui,
    ) -> Result<Calibration, Error> {
        let config = MomentsConfig {
            spill_dir: scratch.to_owned(),
            ..MomentsConfig::default()
        };
        Ok(Calibration::Texts(capture(
            open,
            adapters,
            tensors,
            &tokens.sources(),
            &config,
            self.job.n_threads,
            &mut |done, total| ui.progress("capturing inputs", done, total),
        )?))
    }

    /// Write the files, try them out, put them in place, with their residues beside them.
    fn put(
        &mut self,
        files: Vec<GgufWriter<'_>>,
        residues: &[Update],
        ui: &mut dyn Ui,
    ) -> Result<(), Error> {
        let (job, mut verdict) = (self.job, None);
        let delivered = deliver(self.weights.set(), files, job.delivery, |staged| {
            let Some(config) = &job.gate else {
                return Ok(());
            };
            let found = self.try_out(config, residues, staged, ui)?;
            if !job.keep_failed {
                found.clone().accepted()?;
            }
            verdict = Some(found);
            Ok(())
        })?;
        self.report.verdict = verdict;
        self.report.delivered = delivered;
        if !residues.is_empty() {
            let merged = &self.report.delivered.files[0];
            let path = merged.with_extension("residue.gguf");
            residue_of(residues, &Weights::open(merged)?)?.save(&path, job.delivery.force)?;
            self.report.residue = Some(path);
        }
        Ok(())
    }

    /// Second moments from the best source at hand. The model is open only while its inputs are
    /// captured.
    fn calibrate(&self, scratch: &Path, ui: &mut dyn Ui) -> Result<Calibration, Error> {
        let (job, patches) = (self.job, self.patches);
        if let Some(path) = job.imatrix {
            return Ok(Calibration::Imatrix(Imatrix::open(path)?));
        }
        let texts = !(job.texts.forget.is_empty()
            && job.texts.retain.is_empty()
            && job.texts.general.is_empty());
        let beside = match job.specs.as_slice() {
            [(path, _)] if !texts => Some(companion(path)).filter(|p| p.is_file()),
            _ => None,
        };
        if let Some(path) = job.sketch.or(beside.as_deref()) {
            let sketch = SketchFile::open(path)?;
            let digests: Result<Vec<_>, Error> =
                patches.iter().map(|(p, _)| of_file(&p.path)).collect();
            sketch.check_patches(&digests?)?;
            ui.notice(&format!("calibrating by {}", path.display()));
            return Ok(Calibration::Sketch(sketch));
        }
        let open = OpenModel::open(job.model, job.n_gpu_layers)?;
        let tokens = self.tokens(&open, ui)?;
        let adapters = open_adapters(&open, job.specs.iter().copied())?;
        let tensors: BTreeSet<String> = patches
            .iter()
            .flat_map(|(p, _)| p.updates.iter().map(|u| u.tensor.clone()))
            .collect();
        let tensors: Vec<String> = tensors.into_iter().collect();
        self.captured((&open, &adapters), &tensors, tokens, scratch, ui)
    }

    /// The staged file against model and patches.
    fn try_out(
        &self,
        config: &GateConfig,
        residues: &[Update],
        staged: &Path,
        ui: &mut dyn Ui,
    ) -> Result<Verdict, Error> {
        let job = self.job;
        if self.tokens.get().is_none() {
            self.tokens(&OpenModel::open(job.model, job.n_gpu_layers)?, ui)?;
        }
        let tokens = self.tokens.get().expect("made above");
        let merged = || {
            let open = OpenModel::open(staged, job.n_gpu_layers)?;
            let residues: Loaded = match residues {
                [] => Vec::new(),
                _ => {
                    let residue = residue_of(residues, &open.weights)?;
                    vec![(load_patch(&open.model, &residue)?, 1.0)]
                }
            };
            Ok((open.model, residues))
        };
        self.weights.release();
        gate(
            (&|| self.unmerged(), &merged),
            self.report.file_len_before > TOGETHER_BYTES,
            &tokens.sources(),
            config,
            job.n_threads,
            &mut |done, total| ui.progress("comparing", done, total),
        )
    }
}

fn residue_of(residues: &[Update], merged: &Weights) -> Result<Patch, Error> {
    let info = Info::new(base_of(merged)?, "residue", serde_json::Value::Null, 0);
    Ok(Patch::new(merged.arch()?, info, residues.to_vec()))
}
