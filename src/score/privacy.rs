//! Memorisation and privacy of a model: one pass over the forget and the holdout answers.
//!
//! Takes the forget set (with paraphrased and wrong answers where the file has them), a holdout set
//! of the same kind that the model never saw, and the report of a retain model where there is one;
//! gives what [`crate::eval::memorisation`] and [`crate::eval::membership`] define.

use super::{answer_losses, answer_rows, scoring_context};
use crate::adapter::Loaded;
use crate::data::{Perturbed, Record, Sample, Template, build_samples};
use crate::error::Error;
use crate::eval::membership::{
    AnswerStats, Attacks, TokenStat, aucs, privacy, privleak, rel_diff, retain_score,
};
use crate::eval::memorisation::{
    Memorised, aggregate, exact_memorisation, extraction_strength, truth_share, utility,
};
use crate::eval::stats::mean;
use crate::ggml::{Context, Model};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The report. Keys that need what was not given are null.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Privacy {
    /// Forget answers.
    pub n_forget: usize,
    /// Holdout answers.
    pub n_holdout: usize,
    /// Share of tokens that min-k and min-k++ average over.
    pub min_k: f64,
    /// Mean extraction strength of the forget answers.
    pub extraction_strength: f64,
    /// Mean exact memorisation of the forget answers.
    pub exact_memorisation: Option<f64>,
    /// Mean probability^(1/tokens) of the forget answers.
    pub probability: f64,
    /// The same of the paraphrased ones.
    pub paraphrase_probability: Option<f64>,
    /// Mean p/(p + q) of paraphrased against wrong answers.
    pub truth_share: Option<f64>,
    /// AUC of each attack, forget against holdout; 1/2: nothing tells them apart.
    pub auc: Attacks<f64>,
    /// Privacy leakage in percent of the retain model.
    pub privleak: Option<Attacks<f64>>,
    /// Relative difference to the retain model's AUC, in percent.
    pub rel_diff: Option<Attacks<f64>>,
    /// max(0, 1 − |privleak|/100).
    pub retain_scores: Option<Attacks<f64>>,
    /// Memorisation score.
    pub memorisation: Option<f64>,
    /// Privacy score.
    pub privacy: Option<f64>,
    /// Utility: the model utility that was given; fluency is not measured.
    pub utility: Option<f64>,
    /// Harmonic mean of the three scores.
    pub aggregate: Option<f64>,
}

/// A report with the answers it is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The report.
    pub report: Privacy,
    /// Per forget answer, in order.
    pub forget: Vec<AnswerStats>,
    /// Per holdout answer, in order.
    pub holdout: Vec<AnswerStats>,
}

/// What is taken from a retain model's report.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct Retain {
    /// Forget answers.
    pub n_forget: usize,
    /// Holdout answers.
    pub n_holdout: usize,
    /// Share of tokens that min-k and min-k++ average over.
    pub min_k: f64,
    /// Its AUCs.
    pub auc: Attacks<f64>,
}

/// What can be wrong with a retain model's report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivacyLogError {
    /// The file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Not such a report.
    #[error("{}: wanted the JSON of `eval --privacy` on a retain model", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// A report on other data or with other settings.
    #[error("{}: wanted a retain model's report with {key} {wanted}, found {found}", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs.
        key: &'static str,
        /// This run's value.
        wanted: f64,
        /// The report's.
        found: f64,
    },
}

impl Retain {
    /// Reads a report and checks that it is about sets of these sizes and this share.
    ///
    /// # Errors
    /// A file that is no such report, or one about something else.
    pub fn load(
        path: &Path,
        n_forget: usize,
        n_holdout: usize,
        min_k: f64,
    ) -> Result<Self, PrivacyLogError> {
        let text = std::fs::read(path).map_err(|source| PrivacyLogError::Read {
            path: path.into(),
            source,
        })?;
        let log: Self = serde_json::from_slice(&text).map_err(|source| PrivacyLogError::Json {
            path: path.into(),
            source,
        })?;
        let checks = [
            ("n_forget", n_forget as f64, log.n_forget as f64),
            ("n_holdout", n_holdout as f64, log.n_holdout as f64),
            ("min_k", min_k, log.min_k),
        ];
        match checks
            .into_iter()
            .find(|(_, wanted, found)| wanted != found)
        {
            None => Ok(log),
            Some((key, wanted, found)) => Err(PrivacyLogError::Other {
                path: path.into(),
                key,
                wanted,
                found,
            }),
        }
    }
}

/// The sets to measure on.
#[derive(Debug, Clone, Copy)]
pub struct Sets<'a> {
    /// To be forgotten.
    pub forget: &'a [Record],
    /// Other answers to the forget questions, one entry a record.
    pub perturbed: Option<&'a [Perturbed]>,
    /// Never seen.
    pub holdout: &'a [Record],
}

/// Measure the model with `adapters`; the report has no retain model's values yet.
///
/// # Errors
/// Records that cannot be tokenised, llama.cpp's failures.
pub fn measure_privacy(
    model: &Model,
    adapters: &Loaded,
    template: &Template,
    sets: Sets<'_>,
    min_k: f64,
    (max_tokens, n_threads): (usize, usize),
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Measured, Error> {
    let samples = |records: &[Record]| build_samples(records, model, template, max_tokens);
    let (forget, holdout) = (
        samples(sets.forget)?.samples,
        samples(sets.holdout)?.samples,
    );
    let others: Vec<Record> = sets
        .perturbed
        .unwrap_or_default()
        .iter()
        .flat_map(|p| p.paraphrased.iter().chain(&p.wrong).cloned())
        .collect();
    let others = if others.is_empty() {
        Vec::new()
    } else {
        samples(&others)?.samples
    };
    let all = || forget.iter().chain(&holdout).chain(&others);
    let longest = all().map(|s| s.tokens.len()).max().unwrap_or(1);
    let total = all().count();
    let mut context = scoring_context(model, adapters, longest, n_threads)?;
    let forget = answers(&mut context, &forget, &mut |n| progress(n, total))?;
    let done = forget.len();
    let holdout = answers(&mut context, &holdout, &mut |n| progress(done + n, total))?;
    let done = done + holdout.len();
    let losses = answer_losses(&mut context, &others, &mut |n| progress(done + n, total))?;
    let losses: Vec<f64> = losses.iter().map(|l| l.per_token()).collect();

    let known = sets.perturbed.map(|perturbed| known(perturbed, &losses));
    let attack = |answers: &[AnswerStats]| -> Vec<Attacks<f64>> {
        answers.iter().map(|a| a.attack(min_k)).collect()
    };
    let over =
        |value: &dyn Fn(&AnswerStats) -> f64| mean(&forget.iter().map(value).collect::<Vec<f64>>());
    let exact: Vec<f64> = forget
        .iter()
        .filter_map(|a| exact_memorisation(&a.tokens))
        .collect();
    let report = Privacy {
        n_forget: forget.len(),
        n_holdout: holdout.len(),
        min_k,
        extraction_strength: over(&|a| extraction_strength(&a.tokens)),
        exact_memorisation: (!exact.is_empty()).then(|| mean(&exact)),
        probability: over(&|a| (-a.loss()).exp()),
        paraphrase_probability: known.map(|(p, _)| p),
        truth_share: known.map(|(_, t)| t),
        auc: aucs(&attack(&forget), &attack(&holdout)),
        privleak: None,
        rel_diff: None,
        retain_scores: None,
        memorisation: None,
        privacy: None,
        utility: None,
        aggregate: None,
    };
    Ok(Measured {
        report,
        forget,
        holdout,
    })
}

/// Mean paraphrase probability and mean truth share, from the losses of all other answers in order.
fn known(perturbed: &[Perturbed], losses: &[f64]) -> (f64, f64) {
    let (mut probs, mut shares) = (Vec::new(), Vec::new());
    let mut rest = losses;
    for p in perturbed {
        let (right, after) = rest.split_at(p.paraphrased.len());
        let (wrong, after) = after.split_at(p.wrong.len());
        rest = after;
        probs.push(mean(
            &right.iter().map(|l| (-l).exp()).collect::<Vec<f64>>(),
        ));
        shares.push(truth_share(right, wrong));
    }
    (mean(&probs), mean(&shares))
}

/// The answers of `samples`, token by token.
fn answers(
    context: &mut Context,
    samples: &[Sample],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<AnswerStats>, Error> {
    let rows = answer_rows(context, samples, &TokenStat::new, progress)?;
    let model = context.model();
    let answer = |(sample, mut tokens): (&Sample, Vec<TokenStat>)| {
        let answered = sample
            .answers
            .iter()
            .flat_map(|a| &sample.tokens[a.clone()]);
        let text = answered.flat_map(|&t| model.piece(t, false)).collect();
        let ends = sample.tokens.last().is_some_and(|&t| model.is_end(t));
        let end = if ends { tokens.pop() } else { None };
        AnswerStats {
            tokens,
            end: end.map(|t| t.log_prob),
            text,
        }
    };
    Ok(samples.iter().zip(rows).map(answer).collect())
}

impl Privacy {
    /// Hold the AUCs against a retain model's.
    pub fn compare(&mut self, retain: &Retain) {
        let pairs = self.auc.zip(&retain.auc);
        self.privleak = Some(pairs.map(|(a, r)| privleak(a, r)));
        self.rel_diff = Some(pairs.map(|(a, r)| rel_diff(a, r)));
        let scores = pairs.map(|(a, r)| retain_score(a, r));
        self.retain_scores = Some(scores);
        self.privacy = Some(privacy(&scores));
    }

    /// Fill in the scores that can be had.
    pub fn aggregate(&mut self, model_utility: Option<f64>) {
        let memorised = || {
            Some(Memorised {
                extraction_strength: self.extraction_strength,
                exact_memorisation: self.exact_memorisation?,
                paraphrase_probability: self.paraphrase_probability?,
                truth_share: self.truth_share?,
            })
        };
        self.memorisation = memorised().map(|m| m.score());
        self.utility = model_utility.map(|u| utility(u, None));
        if let (Some(m), Some(p), Some(u)) = (self.memorisation, self.privacy, self.utility) {
            self.aggregate = Some(aggregate(m, p, u));
        }
    }
}
