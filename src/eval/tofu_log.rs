//! The official TOFU log, `eval_log_aggregated.json`, read and written: split → metric → question
//! index → value. Also the door to logs of either known format.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::atomic::{AtomicError, write_atomic};

use super::ks::KsError;
use super::tofu::{AnswerLoss, Example, Split, Summary};
use super::tofu_eval;

/// What can be wrong with a log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum LogError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is not a usable log", path.display())]
    In {
        path: PathBuf,
        source: Box<LogError>,
    },
    #[error("wanted a TOFU log in JSON")]
    Json { source: serde_json::Error },
    #[error(
        "wanted TOFU's eval_log_aggregated.json or open-unlearning's TOFU_EVAL.json, found {found}"
    )]
    Unknown { found: String },
    #[error("the log has no {} split ({})", split.name(), split.official_key())]
    MissingSplit { split: Split },
    #[error("the log has no truth ratios of single forget questions")]
    MissingTruthRatios,
    #[error("{place}: the log has no `{metric}`")]
    MissingMetric { place: String, metric: &'static str },
    #[error("{place}: wanted {wanted}, found {found}")]
    WrongType {
        place: String,
        wanted: &'static str,
        found: String,
    },
    #[error("{place}: wanted one value for each of {wanted} questions, found {found}")]
    Counts {
        place: String,
        wanted: usize,
        found: usize,
    },
    #[error("{place}: there is no value for question {index}")]
    MissingQuestion { place: String, index: String },
    #[error("{place}: there is no question")]
    EmptySplit { place: String },
    #[error(
        "{n} forget questions cannot be compared with the {n_retain_log} of the retain model's log"
    )]
    ForgetCounts { n: usize, n_retain_log: usize },
    #[error("forget quality cannot be tested")]
    Test { source: KsError },
}

/// The four splits' examples, in the order of [`Split::ALL`]; an absent split is empty.
pub type Examples = [Vec<Example>; 4];

impl LogError {
    /// The same, naming the file.
    pub fn of(self, path: &Path) -> Self {
        LogError::In {
            path: path.into(),
            source: Box::new(self),
        }
    }
}

/// Which program's log to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// TOFU's own `eval_log_aggregated.json`.
    Official,
    /// open-unlearning's `TOFU_EVAL.json`.
    OpenUnlearning,
}

/// Reads a log of either format from a file.
pub fn read_summary(path: &Path) -> Result<Summary, LogError> {
    let text = std::fs::read_to_string(path).map_err(|source| LogError::Read {
        path: path.into(),
        source,
    })?;
    parse_summary(&text).map_err(|error| error.of(path))
}

/// Whether a retain model's log can be compared with `n` forget questions.
///
/// # Errors
/// No truth ratios in it, or as many as are not wanted.
pub fn check_forget_count(retain_log: &Summary, n: usize) -> Result<(), LogError> {
    let n_retain_log = retain_log.truth_ratios()?.len();
    if n_retain_log == n {
        Ok(())
    } else {
        Err(LogError::ForgetCounts { n, n_retain_log })
    }
}

/// Writes a log to a file, whole or not at all.
///
/// # Errors
/// The file exists (unless `force`), or cannot be written.
pub fn write_log(
    path: &Path,
    force: bool,
    format: LogFormat,
    examples: &Examples,
) -> Result<(), AtomicError> {
    let log = match format {
        LogFormat::Official => to_official(examples),
        LogFormat::OpenUnlearning => tofu_eval::to_open_unlearning(examples),
    };
    write_atomic(path, force, |out| {
        let written = serde_json::to_writer_pretty(&mut *out, &log)
            .map_err(std::io::Error::from)
            .and_then(|()| out.write_all(b"\n"));
        written.map_err(|source| AtomicError::Io {
            path: path.to_owned(),
            doing: "writing",
            source,
        })
    })
}

/// Reads a log of either format.
pub fn parse_summary(text: &str) -> Result<Summary, LogError> {
    let log = parse_object(text)?;
    if is_official(&log) {
        let examples = official_examples(&log)?;
        return Ok(Summary::of(examples.each_ref().map(Vec::as_slice)));
    }
    let summary = tofu_eval::summary(&log)?;
    if summary == Summary::default() {
        let keys: Vec<&str> = log.keys().take(6).map(String::as_str).collect();
        return Err(LogError::Unknown {
            found: format!("the keys [{}]", keys.join(", ")),
        });
    }
    Ok(summary)
}

/// Reads the single questions of an official log.
pub fn parse_official(text: &str) -> Result<Examples, LogError> {
    official_examples(&parse_object(text)?)
}

fn parse_object(text: &str) -> Result<Map<String, Value>, LogError> {
    match serde_json::from_str(text).map_err(|source| LogError::Json { source })? {
        Value::Object(log) => Ok(log),
        other => Err(LogError::Unknown {
            found: kind(&other),
        }),
    }
}

fn is_official(log: &Map<String, Value>) -> bool {
    Split::ALL
        .iter()
        .any(|s| log.contains_key(s.official_key()))
}

pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "a boolean".into(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("the text `{}`", text.chars().take(30).collect::<String>()),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(map) => format!("an object of {}", map.len()),
    }
}

/// A place in the log that reads numbers and says where it failed.
pub(super) struct Metric<'a> {
    pub(super) place: String,
    pub(super) values: &'a Value,
}

impl<'a> Metric<'a> {
    fn of(split: &'a Value, key: &str, metric: &'static str) -> Result<Self, LogError> {
        let place = format!("{key}, {metric}");
        match split.get(metric) {
            Some(values) => Ok(Metric { place, values }),
            None => Err(LogError::MissingMetric {
                place: key.to_owned(),
                metric,
            }),
        }
    }

    /// The question indices: an object's keys, or the positions of a list (older logs).
    pub(super) fn indices(&self) -> Result<Vec<String>, LogError> {
        match self.values {
            Value::Object(map) => Ok(map.keys().cloned().collect()),
            Value::Array(items) => Ok((0..items.len()).map(|i| i.to_string()).collect()),
            other => Err(self.wrong("values by question", other)),
        }
    }

    pub(super) fn at(&self, index: &str) -> Result<&'a Value, LogError> {
        let value = match self.values {
            Value::Array(items) => index.parse().ok().and_then(|i: usize| items.get(i)),
            other => other.get(index),
        };
        value.ok_or_else(|| LogError::MissingQuestion {
            place: self.place.clone(),
            index: index.to_owned(),
        })
    }

    fn number(&self, index: &str) -> Result<f64, LogError> {
        let value = self.at(index)?;
        value.as_f64().ok_or_else(|| self.wrong("a number", value))
    }

    fn numbers(&self, index: &str) -> Result<Vec<f64>, LogError> {
        let value = self.at(index)?;
        let numbers: Option<Vec<f64>> = value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_f64).collect());
        match numbers {
            Some(numbers) if !numbers.is_empty() => Ok(numbers),
            _ => Err(self.wrong("a list of numbers", value)),
        }
    }

    fn wrong(&self, wanted: &'static str, found: &Value) -> LogError {
        LogError::WrongType {
            place: self.place.clone(),
            wanted,
            found: kind(found),
        }
    }
}

fn official_examples(log: &Map<String, Value>) -> Result<Examples, LogError> {
    let mut examples = Examples::default();
    for (split, slot) in Split::ALL.into_iter().zip(&mut examples) {
        if let Some(value) = log.get(split.official_key()) {
            *slot = official_split(value, split.official_key())?;
        }
    }
    Ok(examples)
}

fn official_split(split: &Value, key: &str) -> Result<Vec<Example>, LogError> {
    let answer = Metric::of(split, key, "avg_gt_loss")?;
    let paraphrased = Metric::of(split, key, "avg_paraphrased_loss")?;
    let perturbed = Metric::of(split, key, "average_perturb_loss")?;
    let optional = |metric| Metric::of(split, key, metric).ok();
    let rouge_1 = optional("rouge1_recall");
    let rouge_l = optional("rougeL_recall");
    let generated = optional("generated_text");
    let n_answer = optional("num_token_gt");
    let n_paraphrased = optional("num_token_paraphrased");
    let n_perturbed = optional("num_token_perturb");
    let indices = answer.indices()?;
    if indices.is_empty() {
        return Err(LogError::EmptySplit {
            place: key.to_owned(),
        });
    }
    for metric in [&paraphrased, &perturbed].into_iter().chain(&rouge_l) {
        let found = metric.indices()?.len();
        if found != indices.len() {
            return Err(LogError::Counts {
                place: metric.place.clone(),
                wanted: indices.len(),
                found,
            });
        }
    }
    let count = |metric: &Option<Metric>, index: &str| {
        let n = metric.as_ref().and_then(|m| m.number(index).ok());
        n.map_or(0, |n| n as u32)
    };
    indices
        .into_iter()
        .map(|index| {
            let wrong = perturbed.numbers(&index)?;
            let n_wrong = n_perturbed.as_ref().and_then(|m| m.numbers(&index).ok());
            let n_wrong = n_wrong.filter(|n| n.len() == wrong.len());
            Ok(Example {
                generated: generated
                    .as_ref()
                    .and_then(|m| m.at(&index).ok())
                    .and_then(|value| serde_json::from_value(value.clone()).ok()),
                answer: AnswerLoss {
                    avg: answer.number(&index)?,
                    n_tokens: count(&n_answer, &index),
                },
                paraphrased: AnswerLoss {
                    avg: paraphrased.number(&index)?,
                    n_tokens: count(&n_paraphrased, &index),
                },
                perturbed: (0..wrong.len())
                    .map(|i| AnswerLoss {
                        avg: wrong[i],
                        n_tokens: n_wrong.as_ref().map_or(0, |n| n[i] as u32),
                    })
                    .collect(),
                rouge_1_recall: rouge_1.as_ref().map(|m| m.number(&index)).transpose()?,
                rouge_l_recall: rouge_l.as_ref().map(|m| m.number(&index)).transpose()?,
                index,
            })
        })
        .collect()
}

/// The official `eval_log_aggregated.json` of these examples.
pub fn to_official(examples: &Examples) -> Value {
    let mut log = Map::new();
    for (split, examples) in Split::ALL.into_iter().zip(examples) {
        if !examples.is_empty() {
            log.insert(
                split.official_key().to_owned(),
                split_to_official(split, examples),
            );
        }
    }
    Value::Object(log)
}

fn split_to_official(split: Split, examples: &[Example]) -> Value {
    let by_index = |value: &dyn Fn(&Example) -> Value| {
        let pairs = examples.iter().map(|e| (e.index.clone(), value(e)));
        Value::Object(pairs.collect())
    };
    let sum = |loss: AnswerLoss| loss.avg * f64::from(loss.n_tokens);
    let each = |e: &Example, value: &dyn Fn(AnswerLoss) -> Value| {
        Value::Array(e.perturbed.iter().map(|&loss| value(loss)).collect())
    };
    let mut log = json!({
        "avg_gt_loss": by_index(&|e| json!(e.answer.avg)),
        "gt_loss": by_index(&|e| json!(sum(e.answer))),
        "num_token_gt": by_index(&|e| json!(e.answer.n_tokens)),
        "generated_text": by_index(&|e| json!(e.generated)),
        "rouge1_recall": by_index(&|e| json!(e.rouge_1_recall)),
        "rougeL_recall": by_index(&|e| json!(e.rouge_l_recall)),
        "average_perturb_loss": by_index(&|e| each(e, &|loss| json!(loss.avg))),
        "avg_paraphrased_loss": by_index(&|e| json!(e.paraphrased.avg)),
        "truth_ratio": by_index(&|e| json!(1.0 / e.truth_ratio())),
        "paraphrased_loss": by_index(&|e| json!(sum(e.paraphrased))),
        "perturb_loss": by_index(&|e| each(e, &|loss| json!(sum(loss)))),
        "num_token_paraphrased": by_index(&|e| json!(e.paraphrased.n_tokens)),
        "num_token_perturb": by_index(&|e| each(e, &|loss| json!(loss.n_tokens))),
    });
    if split.has_choices() {
        log["normalized_gt_loss"] = by_index(&|e| json!(-e.normalised_prob().ln()));
    }
    // What was never measured is left out, as a log without it would.
    if let Value::Object(metrics) = &mut log {
        metrics.retain(|_, values| {
            values
                .as_object()
                .is_none_or(|v| !v.values().all(Value::is_null))
        });
    }
    log
}
