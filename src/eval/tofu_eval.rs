//! open-unlearning's TOFU log, `TOFU_EVAL.json` (arXiv 2506.12618), read and written: metric →
//! `agg_value` and `value_by_index`. Its truth-ratio `score` is wrong over right probability, that
//! is 1/t, and its forget quality is taken over 1/(score + 1e-10).

use serde_json::{Map, Value, json};

use super::stats::mean;
use super::tofu::{Example, Split, SplitScores, Summary, split_scores};
use super::tofu_log::{Examples, LogError, Metric, kind};

/// open-unlearning's names of the three metrics of each split, in the order of [`Split::ALL`].
const METRICS: [[&str; 3]; 4] = [
    ["retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"],
    ["ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"],
    ["wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"],
    ["forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_Truth_Ratio"],
];

/// What the log says, absent metrics left out.
pub(super) fn summary(log: &Map<String, Value>) -> Result<Summary, LogError> {
    // Configurations differ in the case of these names.
    let find = |metric: &str| {
        let found = log.iter().find(|(key, _)| key.eq_ignore_ascii_case(metric));
        found.map(|(_, value)| value)
    };
    let mut summary = Summary::default();
    for (names, slot) in METRICS.iter().zip(&mut summary.splits) {
        let [Some(prob), rouge, Some(ratio)] = names.map(find) else {
            continue;
        };
        *slot = Some(SplitScores {
            prob: aggregate(prob, names[0], "prob")?,
            rouge_l: rouge
                .map(|rouge| aggregate(rouge, names[1], "rougeL_recall"))
                .transpose()?,
            truth_ratio: aggregate(ratio, names[2], "")?,
        });
    }
    let forget = METRICS[3][2];
    if let Some(values) = find(forget).and_then(|metric| metric.get("value_by_index")) {
        let scores = values_of(values, forget, "score")?;
        summary.forget_truth_ratios = Some(scores.iter().map(|s| 1.0 / (s + 1e-10)).collect());
    }
    Ok(summary)
}

/// `agg_value`, a bare number (their summary file), or the mean of `field` over the questions.
fn aggregate(metric: &Value, name: &'static str, field: &'static str) -> Result<f64, LogError> {
    if let Some(value) = metric.get("agg_value").unwrap_or(metric).as_f64() {
        return Ok(value);
    }
    match metric.get("value_by_index") {
        Some(values) if !field.is_empty() => Ok(mean(&values_of(values, name, field)?)),
        _ => Err(LogError::MissingMetric {
            place: name.to_owned(),
            metric: "agg_value",
        }),
    }
}

fn values_of(values: &Value, name: &str, field: &'static str) -> Result<Vec<f64>, LogError> {
    let metric = Metric {
        place: format!("{name}, value_by_index"),
        values,
    };
    let indices = metric.indices()?;
    if indices.is_empty() {
        return Err(LogError::EmptySplit {
            place: metric.place,
        });
    }
    indices
        .iter()
        .map(|index| {
            let value = metric.at(index)?;
            let number = value.get(field).and_then(Value::as_f64);
            number.ok_or_else(|| LogError::WrongType {
                place: format!("{}, question {index}", metric.place),
                wanted: field,
                found: kind(value),
            })
        })
        .collect()
}

/// The `TOFU_EVAL.json` of these examples: what model utility and forget quality are made of.
pub fn to_open_unlearning(examples: &Examples) -> Value {
    let mut log = Map::new();
    for ((split, examples), names) in Split::ALL.into_iter().zip(examples).zip(METRICS) {
        if examples.is_empty() {
            continue;
        }
        let by_index = |value: &dyn Fn(&Example) -> Value| {
            let pairs = examples.iter().map(|e| (e.index.clone(), value(e)));
            Value::Object(pairs.collect())
        };
        let scores = split_scores(split, examples);
        let prob = by_index(&|e| {
            if split.has_choices() {
                json!({"prob": e.normalised_prob()})
            } else {
                json!({"prob": e.answer.prob(), "avg_loss": e.answer.avg})
            }
        });
        let rouge = by_index(&|e| match e.rouge_1_recall {
            Some(rouge_1) => json!({"rouge1_recall": rouge_1, "rougeL_recall": e.rouge_l_recall}),
            None => json!({"rougeL_recall": e.rouge_l_recall}),
        });
        let ratio = by_index(&|e| json!({"score": 1.0 / e.truth_ratio()}));
        let aggregates = [Some(scores.prob), scores.rouge_l, Some(scores.truth_ratio)];
        for ((name, agg_value), value_by_index) in
            names.into_iter().zip(aggregates).zip([prob, rouge, ratio])
        {
            // What was never measured is left out.
            let Some(agg_value) = agg_value else { continue };
            let metric = json!({"agg_value": agg_value, "value_by_index": value_by_index});
            log.insert(name.to_owned(), metric);
        }
    }
    log.sort_keys();
    Value::Object(log)
}
