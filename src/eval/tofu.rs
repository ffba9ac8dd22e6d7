//! TOFU's scores (Maini et al., arXiv 2401.06121), aggregated as its official program does.
//!
//! Takes per-example losses and ROUGE recalls of four splits, or a finished log of another tool;
//! gives the nine parts, model utility (their harmonic mean) and forget quality (the p-value of a
//! two-sample Kolmogorov-Smirnov test on truth ratios against a model that never saw the forget
//! set). With losses as means over tokens,
//!
//! t = exp(mean perturbed loss - paraphrased loss)
//!
//! and a split's truth ratio is mean max(0, 1 - 1/t), on the forget set mean min(t, 1/t).

use serde::{Deserialize, Serialize};

use super::ks::ks_2samp;
use super::stats::{harmonic_mean, mean};
use super::tofu_log::LogError;

/// TOFU's four question sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Fictitious authors to be kept.
    Retain,
    /// Real authors.
    RealAuthors,
    /// World facts.
    WorldFacts,
    /// Fictitious authors to be forgotten.
    Forget,
}

impl Split {
    /// All four, in the order of the official log.
    pub const ALL: [Split; 4] = [
        Split::Retain,
        Split::RealAuthors,
        Split::WorldFacts,
        Split::Forget,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Split::Retain => "retain",
            Split::RealAuthors => "real authors",
            Split::WorldFacts => "world facts",
            Split::Forget => "forget",
        }
    }

    /// The split's key in `eval_log_aggregated.json`.
    pub fn official_key(self) -> &'static str {
        match self {
            Split::Retain => "eval_log.json",
            Split::RealAuthors => "eval_real_author_wo_options.json",
            Split::WorldFacts => "eval_real_world_wo_options.json",
            Split::Forget => "eval_log_forget.json",
        }
    }

    /// Real authors and world facts have answer choices to normalise over.
    pub fn has_choices(self) -> bool {
        matches!(self, Split::RealAuthors | Split::WorldFacts)
    }
}

/// How a model takes one answer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AnswerLoss {
    /// Mean negative log-likelihood over the answer's tokens.
    pub avg: f64,
    /// The number of tokens; 0 where a log does not say.
    pub n_tokens: u32,
}

impl AnswerLoss {
    /// Probability^(1/tokens).
    pub fn prob(self) -> f64 {
        (-self.avg).exp()
    }
}

/// What TOFU measures on one question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// The question's index in its split.
    pub index: String,
    /// Prompt, greedy answer and true answer, where kept.
    pub generated: Option<[String; 3]>,
    /// The true answer.
    pub answer: AnswerLoss,
    /// The paraphrased answer; on splits with choices the true answer again.
    pub paraphrased: AnswerLoss,
    /// The wrong answers.
    pub perturbed: Vec<AnswerLoss>,
    /// ROUGE-1 recall of the greedy answer, where kept.
    pub rouge_1_recall: Option<f64>,
    /// ROUGE-L recall of the greedy answer, where one was written.
    pub rouge_l_recall: Option<f64>,
}

impl Example {
    /// t = exp(mean perturbed loss - paraphrased loss): above 1 where the model prefers the truth.
    /// The log's field `truth_ratio` holds 1/t.
    pub fn truth_ratio(&self) -> f64 {
        let perturbed: Vec<f64> = self.perturbed.iter().map(|answer| answer.avg).collect();
        (mean(&perturbed) - self.paraphrased.avg).exp()
    }

    /// The true answer's probability over the sum of all choices' probabilities.
    pub fn normalised_prob(&self) -> f64 {
        let wrong: f64 = self.perturbed.iter().map(|answer| answer.prob()).sum();
        self.answer.prob() / (self.answer.prob() + wrong)
    }
}

/// One split's three numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SplitScores {
    /// Mean answer probability, normalised over choices where there are any.
    pub prob: f64,
    /// Mean ROUGE-L recall, where every question has one.
    pub rouge_l: Option<f64>,
    /// Aggregated truth ratio.
    pub truth_ratio: f64,
}

/// Aggregates one split.
pub fn split_scores(split: Split, examples: &[Example]) -> SplitScores {
    let over =
        |value: &dyn Fn(&Example) -> f64| mean(&examples.iter().map(value).collect::<Vec<f64>>());
    SplitScores {
        prob: if split.has_choices() {
            over(&Example::normalised_prob)
        } else {
            over(&|example| example.answer.prob())
        },
        rouge_l: examples
            .iter()
            .map(|example| example.rouge_l_recall)
            .collect::<Option<Vec<f64>>>()
            .map(|recalls| mean(&recalls)),
        truth_ratio: over(&|example| {
            let t = example.truth_ratio();
            if split == Split::Forget {
                t.min(1.0 / t)
            } else {
                (1.0 - 1.0 / t).max(0.0)
            }
        }),
    }
}

/// What a log of either format says: enough to score with.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Summary {
    /// The splits' numbers in the order of [`Split::ALL`], where present.
    pub splits: [Option<SplitScores>; 4],
    /// t of every forget question, where present.
    pub forget_truth_ratios: Option<Vec<f64>>,
}

impl Summary {
    /// Aggregates examples; an empty split counts as absent.
    pub fn of(examples: [&[Example]; 4]) -> Self {
        let mut summary = Summary::default();
        for ((split, examples), slot) in Split::ALL
            .into_iter()
            .zip(examples)
            .zip(&mut summary.splits)
        {
            *slot = (!examples.is_empty()).then(|| split_scores(split, examples));
        }
        let forget = examples[3];
        summary.forget_truth_ratios =
            (!forget.is_empty()).then(|| forget.iter().map(Example::truth_ratio).collect());
        summary
    }

    /// t of every forget question.
    ///
    /// # Errors
    /// A log without them.
    pub fn truth_ratios(&self) -> Result<&[f64], LogError> {
        self.forget_truth_ratios
            .as_deref()
            .ok_or(LogError::MissingTruthRatios)
    }
}

/// TOFU's result for one model; `None` is what its log does not say. The nine parts of model
/// utility come first.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct TofuScores {
    pub retain_prob: Option<f64>,
    pub retain_rouge_l: Option<f64>,
    pub retain_truth_ratio: Option<f64>,
    pub real_authors_prob: Option<f64>,
    pub real_authors_rouge_l: Option<f64>,
    pub real_authors_truth_ratio: Option<f64>,
    pub world_facts_prob: Option<f64>,
    pub world_facts_rouge_l: Option<f64>,
    pub world_facts_truth_ratio: Option<f64>,
    /// Harmonic mean of the nine, when all are there.
    pub model_utility: Option<f64>,
    /// The forget split, where measured.
    pub forget: Option<SplitScores>,
    /// p-value against the retain model, where one was given.
    pub forget_quality: Option<f64>,
    /// Its natural logarithm.
    pub forget_quality_ln: Option<f64>,
    /// The distance behind it.
    pub forget_ks: Option<f64>,
}

impl TofuScores {
    /// The parts of model utility, in the order of the fields.
    pub fn nine(&self) -> [Option<f64>; 9] {
        [
            self.retain_prob,
            self.retain_rouge_l,
            self.retain_truth_ratio,
            self.real_authors_prob,
            self.real_authors_rouge_l,
            self.real_authors_truth_ratio,
            self.world_facts_prob,
            self.world_facts_rouge_l,
            self.world_facts_truth_ratio,
        ]
    }
}

/// Scores a model's log; forget quality needs a retain model's log of the same questions.
///
/// # Errors
/// A log without one of the nine parts, or two logs that cannot be compared.
pub fn score(log: &Summary, retain_log: Option<&Summary>) -> Result<TofuScores, LogError> {
    for split in [Split::Retain, Split::RealAuthors, Split::WorldFacts] {
        let scores = log.splits[split as usize].ok_or(LogError::MissingSplit { split })?;
        if scores.rouge_l.is_none() {
            return Err(LogError::MissingMetric {
                place: split.official_key().to_owned(),
                metric: "rougeL_recall",
            });
        }
    }
    score_present(log, retain_log)
}

/// As [`score`], of whatever parts the log holds.
///
/// # Errors
/// Two logs that cannot be compared.
pub fn score_present(log: &Summary, retain_log: Option<&Summary>) -> Result<TofuScores, LogError> {
    let test = match retain_log {
        None => None,
        Some(reference) => {
            let (ours, theirs) = (log.truth_ratios()?, reference.truth_ratios()?);
            if ours.len() != theirs.len() {
                return Err(LogError::ForgetCounts {
                    n: ours.len(),
                    n_retain_log: theirs.len(),
                });
            }
            Some(ks_2samp(ours, theirs).map_err(|source| LogError::Test { source })?)
        }
    };
    let of = |split: Split| log.splits[split as usize];
    let prob = |split| of(split).map(|scores| scores.prob);
    let rouge_l = |split| of(split).and_then(|scores| scores.rouge_l);
    let truth_ratio = |split| of(split).map(|scores| scores.truth_ratio);
    let mut scores = TofuScores {
        retain_prob: prob(Split::Retain),
        retain_rouge_l: rouge_l(Split::Retain),
        retain_truth_ratio: truth_ratio(Split::Retain),
        real_authors_prob: prob(Split::RealAuthors),
        real_authors_rouge_l: rouge_l(Split::RealAuthors),
        real_authors_truth_ratio: truth_ratio(Split::RealAuthors),
        world_facts_prob: prob(Split::WorldFacts),
        world_facts_rouge_l: rouge_l(Split::WorldFacts),
        world_facts_truth_ratio: truth_ratio(Split::WorldFacts),
        model_utility: None,
        forget: of(Split::Forget),
        forget_quality: test.map(|test| test.p),
        forget_quality_ln: test.map(|test| test.ln_p),
        forget_ks: test.map(|test| test.statistic),
    };
    let nine: Option<Vec<f64>> = scores.nine().into_iter().collect();
    scores.model_utility = nine.map(|nine| harmonic_mean(&nine));
    Ok(scores)
}
