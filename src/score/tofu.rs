//! TOFU's questions put to a model: per question the losses of the true, paraphrased and wrong
//! answers, and the greedy answer's ROUGE recall.
//!
//! Takes TOFU's `*_perturbed.json` files; gives [`Examples`], which `eval::tofu` aggregates. The
//! prompts are those training samples have, so a model is asked in the form it was taught.
//! Questions are worked on in blocks whose bounds do not depend on where a run was interrupted:
//! a resumed run gives the same bytes.

use super::generate::generate_watched;
pub use super::tofu_partial::{Partial, PartialError};
use super::{MAX_ANSWER, N_PARALLEL, context_for, shared_losses};
use crate::data::{DataError, Sample, Template, TofuQuestion, build_samples, load_tofu};
use crate::digest::{self, Digest};
use crate::error::Error;
use crate::eval::rouge::rouge;
use crate::eval::tofu::{AnswerLoss, Example, Split};
use crate::eval::tofu_log::Examples;
use crate::ggml::{Adapter, Context, Model};
use crate::likelihood::SampleLoss;
use crate::model::OpenModel;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Questions to a block: what an interruption may cost.
const BLOCK: usize = 32;
/// Answers decoded side by side when their losses are taken.
const N_ANSWERS: usize = 64;

/// The questions of one split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TofuSet {
    /// Which split.
    pub split: Split,
    /// Its questions, in file order.
    pub questions: Vec<TofuQuestion>,
}

impl TofuSet {
    /// Reads a split from TOFU's folder; `forget` names the forget split (`forget01`), `limit`
    /// keeps the first questions only.
    ///
    /// # Errors
    /// A missing or malformed file.
    pub fn load(
        dir: &Path,
        split: Split,
        forget: &str,
        limit: Option<usize>,
    ) -> Result<Self, DataError> {
        let name = match split {
            Split::Retain => "retain",
            Split::RealAuthors => "real_authors",
            Split::WorldFacts => "world_facts",
            Split::Forget => forget,
        };
        let path = dir.join(format!("{name}_perturbed.json"));
        let mut questions = load_tofu(&path, !split.has_choices())?;
        questions.truncate(limit.unwrap_or(usize::MAX));
        Ok(Self { split, questions })
    }
}

/// How questions are put.
#[derive(Debug, Clone, Copy)]
pub struct TofuOptions {
    /// Samples are cut to this many tokens.
    pub max_tokens: usize,
    /// Whether greedy answers are written.
    pub generate: bool,
    /// ggml threads.
    pub n_threads: usize,
}

/// What a run evaluates, to tell whether a partial log is its own.
///
/// # Errors
/// A file that cannot be read.
pub fn run_key(
    open: &OpenModel,
    adapters: &[(&Path, f32)],
    template: &Template,
    sets: &[TofuSet],
    options: TofuOptions,
) -> Result<Map<String, Value>, Error> {
    let text_digest = |text: &dyn Debug| -> Digest {
        Digest(Sha256::digest(format!("{text:?}").as_bytes()).into())
    };
    let adapters = adapters
        .iter()
        .map(|(path, scale)| Ok(json!([digest::of_file(path)?, scale])))
        .collect::<Result<Vec<_>, Error>>()?;
    let key = json!({
        "program": concat!("nepenthe ", env!("CARGO_PKG_VERSION")),
        "model": digest::of_model(open.weights.set())?,
        "adapters": adapters,
        "template": text_digest(template),
        "questions": text_digest(&sets),
        "max_tokens": options.max_tokens,
        "generate": options.generate,
    });
    match key {
        Value::Object(key) => Ok(key),
        _ => unreachable!("an object is written above"),
    }
}

/// Who follows the work.
pub trait TofuWatch {
    /// So many of the questions that were left to do are done.
    fn progress(&mut self, done: usize, total: usize);
    /// Whether to stop; what is done is kept in the partial log.
    fn stop(&mut self) -> bool;
}

/// What an evaluation gives.
#[derive(Debug, Clone, PartialEq)]
pub struct TofuRun {
    /// Every question.
    pub examples: Examples,
    /// Answers that were cut to fit.
    pub n_truncated: usize,
}

/// Put every question of `sets` to the model with `adapters`; `partial` holds the blocks that are
/// done and receives new ones.
///
/// # Errors
/// Answers that cannot be tokenised, llama.cpp's failures, a partial log that cannot be written,
/// [`Error::Stopped`] when `watch` asks for it.
pub fn evaluate_tofu(
    model: &Model,
    adapters: &[(Arc<Adapter>, f32)],
    template: &Template,
    sets: &[TofuSet],
    options: TofuOptions,
    partial: &mut Partial,
    watch: &mut dyn TofuWatch,
) -> Result<TofuRun, Error> {
    let mut n_truncated = 0;
    let mut prepared = Vec::with_capacity(sets.len());
    for set in sets {
        let (samples, n) = prepare(&set.questions, model, template, options.max_tokens)?;
        n_truncated += n;
        prepared.push(samples);
    }
    let longest = prepared.iter().flatten().flatten().map(|s| s.tokens.len());
    let room = longest.max().unwrap_or(1) + if options.generate { MAX_ANSWER } else { 0 };
    let mut context = context_for(
        model,
        adapters,
        (N_PARALLEL * room.max(32), room),
        options.n_threads,
        N_ANSWERS,
    )?;

    let mut work = Work::new(sets, partial, watch);
    let mut examples = Examples::default();
    for (set, samples) in sets.iter().zip(&prepared) {
        for (first, questions) in blocks(&set.questions) {
            let n = questions.len();
            let found = match partial.block(set.split, first, n) {
                Some(found) => found.to_vec(),
                None => {
                    let samples = &samples[first..first + n];
                    let found = put(&mut context, first, questions, samples, options, &mut work)?;
                    partial.add(set.split, first, &found)?;
                    work.done += n;
                    found
                }
            };
            examples[set.split as usize].extend(found);
        }
    }
    Ok(TofuRun {
        examples,
        n_truncated,
    })
}

/// Blocks of questions with the index of their first.
fn blocks(questions: &[TofuQuestion]) -> impl Iterator<Item = (usize, &[TofuQuestion])> {
    let firsts = (0..questions.len()).step_by(BLOCK);
    firsts.zip(questions.chunks(BLOCK))
}

/// Every question's samples in the order of [`TofuQuestion::records`], and how many were cut.
fn prepare(
    questions: &[TofuQuestion],
    model: &Model,
    template: &Template,
    max_tokens: usize,
) -> Result<(Vec<Vec<Sample>>, usize), Error> {
    let records: Vec<_> = questions.iter().flat_map(TofuQuestion::records).collect();
    let set = build_samples(&records, model, template, max_tokens)?;
    if set.n_skipped > 0 {
        return Err(DataError::NoSamples {
            n_records: set.n_skipped,
        }
        .into());
    }
    let mut samples = set.samples.into_iter();
    let prepared = questions
        .iter()
        .map(|q| samples.by_ref().take(q.records().count()).collect())
        .collect();
    Ok((prepared, set.n_truncated))
}

/// One block: losses of all answers, then the greedy answers.
fn put(
    context: &mut Context,
    first: usize,
    questions: &[TofuQuestion],
    samples: &[Vec<Sample>],
    options: TofuOptions,
    work: &mut Work<'_>,
) -> Result<Vec<Example>, Error> {
    let losses = shared_losses(context, samples, &mut |n| {
        // Losses and answers take about the same time.
        work.tick(if options.generate { n / 2 } else { n })
    })?;
    let mut examples: Vec<Example> = questions
        .iter()
        .zip(&losses)
        .enumerate()
        .map(|(i, (question, losses))| example(first + i, question, losses))
        .collect();
    if !options.generate {
        return Ok(examples);
    }
    let prompts: Vec<_> = samples
        .iter()
        .map(|s| s[0].prompt_tokens().to_vec())
        .collect();
    let n = questions.len();
    let answers = generate_watched(context, &prompts, MAX_ANSWER, &mut |finished| {
        work.tick((n + finished) / 2)
    })?;
    for ((example, question), tokens) in examples.iter_mut().zip(questions).zip(&answers) {
        let text = context.model().detokenize(tokens).trim().to_owned();
        let score = rouge(&question.answer, &text);
        example.rouge_1_recall = Some(score.rouge_1.recall);
        example.rouge_l_recall = Some(score.rouge_l.recall);
        example.generated = Some([question.question.clone(), text, question.answer.clone()]);
    }
    Ok(examples)
}

/// The losses of one question's answers, true one first.
fn example(index: usize, question: &TofuQuestion, losses: &[SampleLoss]) -> Example {
    let losses: Vec<AnswerLoss> = losses
        .iter()
        .map(|loss| AnswerLoss {
            avg: loss.per_token(),
            n_tokens: loss.n_tokens as u32,
        })
        .collect();
    // Without a paraphrased answer the true one stands for it, as in the official program.
    let n_right = 1 + usize::from(question.paraphrased.is_some());
    let (right, wrong) = losses.split_at(n_right);
    Example {
        index: index.to_string(),
        generated: None,
        answer: right[0],
        paraphrased: right[n_right - 1],
        perturbed: wrong.to_vec(),
        rouge_1_recall: None,
        rouge_l_recall: None,
    }
}

/// Counts questions and asks whether to go on.
struct Work<'a> {
    /// Questions in finished blocks of this run.
    done: usize,
    /// Questions this run has to do.
    total: usize,
    /// Questions an earlier run did.
    n_before: usize,
    partial: Option<PathBuf>,
    watch: &'a mut dyn TofuWatch,
}

impl<'a> Work<'a> {
    fn new(sets: &[TofuSet], partial: &Partial, watch: &'a mut dyn TofuWatch) -> Self {
        let mut work = Self {
            done: 0,
            total: 0,
            n_before: 0,
            partial: partial.path().map(Path::to_owned),
            watch,
        };
        for set in sets {
            for (first, questions) in blocks(&set.questions) {
                let n = questions.len();
                match partial.block(set.split, first, n) {
                    Some(_) => work.n_before += n,
                    None => work.total += n,
                }
            }
        }
        work
    }

    /// `n` questions of the present block are done.
    fn tick(&mut self, n: usize) -> Result<(), Error> {
        self.watch.progress(self.done + n, self.total);
        match &self.partial {
            Some(partial) if self.watch.stop() => Err(Error::Stopped {
                done: self.n_before + self.done,
                total: self.n_before + self.total,
                partial: partial.clone(),
            }),
            _ => Ok(()),
        }
    }
}
