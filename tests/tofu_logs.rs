//! TOFU scores against the official logs and tests/golden/tofu.py, and logs that are wrong.

use std::path::{Path, PathBuf};

use nepenthe::eval::tofu::{Split, Summary, TofuScores, score};
use nepenthe::eval::tofu_eval::to_open_unlearning;
use nepenthe::eval::tofu_log::{
    Examples, LogError, parse_official, parse_summary, read_summary, to_official,
};
use serde_json::{Value, json};

fn log_text(name: &str) -> Option<String> {
    let shared = std::env::var_os("NEPENTHE_SHARED")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let path = shared.join(format!(
        "data/tofu/eval_logs/phi_{name}/eval_log_aggregated.json"
    ));
    let text = std::fs::read_to_string(&path).ok();
    if text.is_none() {
        eprintln!(
            "skipped: {} is not there (set NEPENTHE_SHARED)",
            path.display()
        );
    }
    text
}

fn summary(examples: &Examples) -> Summary {
    Summary::of(examples.each_ref().map(Vec::as_slice))
}

fn assert_close(got: f64, want: &Value, what: &str) {
    let want = want.as_f64().expect("a golden number");
    assert!(
        (got - want).abs() <= 1e-9 * want.abs(),
        "{what}: {got} {want}"
    );
}

/// The nine parts, utility and forget split against the oracle's.
fn assert_scores(scores: &TofuScores, golden: &Value) {
    let got = serde_json::to_value(scores).unwrap();
    for (key, want) in golden.as_object().unwrap() {
        let part = match key.strip_prefix("forget_") {
            Some(part) => &got["forget"][part],
            None => &got[key],
        };
        assert_close(part.as_f64().unwrap(), want, key);
    }
}

#[test]
fn official_logs_give_the_official_scores() {
    let (Some(full), Some(retain)) = (log_text("full"), log_text("retain90")) else {
        return;
    };
    let golden: Value = serde_json::from_str(include_str!("golden/tofu.json")).unwrap();
    let (full, retain) = (
        parse_official(&full).unwrap(),
        parse_official(&retain).unwrap(),
    );
    let scores = score(&summary(&full), Some(&summary(&retain))).unwrap();
    println!(
        "full against retain90: model utility {}, forget quality {:e}, D {}",
        scores.model_utility.unwrap(),
        scores.forget_quality.unwrap(),
        scores.forget_ks.unwrap(),
    );
    assert_scores(&scores, &golden["full"]);
    assert_scores(
        &score(&summary(&retain), None).unwrap(),
        &golden["retain90"],
    );
    let test = &golden["full_vs_retain90_first_300"];
    assert_close(scores.forget_quality.unwrap(), &test["forget_quality"], "p");
    assert_close(scores.forget_ks.unwrap(), &test["forget_ks"], "D");
    assert_close(
        scores.forget_quality_ln.unwrap().exp(),
        &test["forget_quality"],
        "exp ln p",
    );

    let first_40 = |examples: &Examples| {
        let mut examples = examples.clone();
        examples[Split::Forget as usize].truncate(40);
        summary(&examples)
    };
    let scores = score(&first_40(&full), Some(&first_40(&retain))).unwrap();
    let test = &golden["full_vs_retain90_first_40"];
    assert_close(
        scores.forget_quality.unwrap(),
        &test["forget_quality"],
        "p of 40",
    );
}

#[test]
fn truth_ratios_equal_the_logged_ones() {
    for name in ["full", "retain90"] {
        let Some(text) = log_text(name) else { return };
        let log: Value = serde_json::from_str(&text).unwrap();
        let examples = parse_official(&text).unwrap();
        let mut n = 0;
        for (split, examples) in Split::ALL.into_iter().zip(&examples) {
            for example in examples {
                // The log holds 1/t, computed in 32 bits: above 1 the error is relative.
                let logged = log[split.official_key()]["truth_ratio"][&example.index]
                    .as_f64()
                    .unwrap();
                assert!(
                    (1.0 / example.truth_ratio() - logged).abs() < 1e-6 * logged.max(1.0),
                    "{}",
                    example.index
                );
                n += 1;
                if split.has_choices() {
                    let logged =
                        log[split.official_key()]["normalized_gt_loss"][&example.index].as_f64();
                    assert!((-example.normalised_prob().ln() - logged.unwrap()).abs() < 1e-6);
                }
            }
        }
        assert_eq!(n, 300 + 100 + 117 + 300);
    }
}

#[test]
fn written_logs_read_back_the_same() {
    let Some(text) = log_text("full") else { return };
    let examples = parse_official(&text).unwrap();
    let written = to_official(&examples);
    assert_eq!(parse_official(&written.to_string()).unwrap(), examples);
    // Same keys in the same order, same values up to the 32-bit sums of the original.
    let original: Value = serde_json::from_str(&text).unwrap();
    for (key, split) in original.as_object().unwrap() {
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&written[key]), keys(split), "{key}");
        for (metric, values) in split.as_object().unwrap() {
            assert_eq!(keys(&written[key][metric]), keys(values));
            let (got, want) = (&written[key][metric]["0"], &values["0"]);
            if let (Some(got), Some(want)) = (got.as_f64(), want.as_f64()) {
                assert!(
                    (got - want).abs() <= 1e-6 * want.abs(),
                    "{metric}: {got} {want}"
                );
            }
        }
    }
}

#[test]
fn open_unlearning_logs_give_the_same_scores() {
    let (Some(full), Some(retain)) = (log_text("full"), log_text("retain90")) else {
        return;
    };
    let (full, retain) = (
        parse_official(&full).unwrap(),
        parse_official(&retain).unwrap(),
    );
    let through = |examples| parse_summary(&to_open_unlearning(examples).to_string()).unwrap();
    let here = score(&summary(&full), Some(&summary(&retain))).unwrap();
    let there = score(&through(&full), Some(&through(&retain))).unwrap();
    assert!((here.model_utility.unwrap() - there.model_utility.unwrap()).abs() < 1e-12);
    assert_eq!(here.forget_ks, there.forget_ks);
    assert_eq!(here.forget_quality, there.forget_quality);
}

#[test]
fn open_unlearning_values_are_read_in_every_form() {
    let mut log = json!({
        "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.25}, "1": {"score": 4.0}}},
        "forget_Q_A_Prob": 0.1,
        "forget_Q_A_ROUGE": {"value_by_index": {"0": {"rougeL_recall": 0.5}, "1": {"rougeL_recall": 1.0}}},
    });
    let summary = parse_summary(&log.to_string()).unwrap();
    let forget = summary.splits[3].unwrap();
    assert_eq!(
        (forget.prob, forget.rouge_l, forget.truth_ratio),
        (0.1, Some(0.75), 0.5)
    );
    let ratios = summary.forget_truth_ratios.clone().unwrap();
    assert!((ratios[0] - 4.0).abs() < 1e-8 && (ratios[1] - 0.25).abs() < 1e-8);
    let error = score(&summary, None).unwrap_err();
    assert!(
        matches!(
            error,
            LogError::MissingSplit {
                split: Split::Retain
            }
        ),
        "{error}"
    );
    log["forget_truth_ratio"]["value_by_index"]["1"] = json!({"score": null});
    let error = parse_summary(&log.to_string()).unwrap_err();
    assert!(error.to_string().contains("question 1"), "{error}");
}

/// A small whole log in the official format.
fn small() -> Value {
    let split = json!({
        "avg_gt_loss": {"0": 1.0, "1": 2.0},
        "rougeL_recall": {"0": 0.5, "1": 0.25},
        "avg_paraphrased_loss": {"0": 1.0, "1": 2.0},
        "average_perturb_loss": {"0": [2.0, 3.0], "1": [3.0, 3.0]},
    });
    let pairs = Split::ALL.map(|s| (s.official_key().to_owned(), split.clone()));
    Value::Object(pairs.into_iter().collect())
}

#[test]
fn logs_without_counts_and_texts_are_enough() {
    let log = parse_summary(&small().to_string()).unwrap();
    let scores = score(&log, Some(&log)).unwrap();
    assert_eq!(scores.forget_quality, Some(1.0));
    let t = [1.5f64.exp(), 1f64.exp()];
    let ratio = (2.0 - 1.0 / t[0] - 1.0 / t[1]) / 2.0;
    assert!((scores.retain_truth_ratio.unwrap() - ratio).abs() < 1e-15);
    let mut lists = small();
    for split in Split::ALL {
        for (_, values) in lists[split.official_key()].as_object_mut().unwrap() {
            *values = values.as_object().unwrap().values().cloned().collect();
        }
    }
    assert_eq!(parse_summary(&lists.to_string()).unwrap(), log);
}

#[test]
fn a_wrong_file_is_named() {
    let path = std::env::temp_dir().join(format!("nepenthe-log-{}.json", std::process::id()));
    std::fs::write(&path, "[]").unwrap();
    let error = read_summary(&path).unwrap_err();
    assert!(error.to_string().contains("nepenthe-log-"), "{error}");
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(read_summary(&path), Err(LogError::Read { .. })));
}

#[test]
fn wrong_logs_are_named() {
    let broken = |change: &dyn Fn(&mut Value)| {
        let mut log = small();
        change(&mut log);
        parse_summary(&log.to_string()).unwrap_err().to_string()
    };
    let key = "eval_log.json";
    let text = broken(&|log| {
        log[key]["rougeL_recall"]
            .as_object_mut()
            .unwrap()
            .remove("1");
    });
    assert_eq!(
        text,
        "eval_log.json, rougeL_recall: wanted one value for each of 2 questions, found 1"
    );
    let text = broken(&|log| {
        log[key]
            .as_object_mut()
            .unwrap()
            .remove("avg_paraphrased_loss");
    });
    assert_eq!(text, "eval_log.json: the log has no `avg_paraphrased_loss`");
    let text = broken(&|log| log[key]["avg_gt_loss"]["1"] = json!("x"));
    assert!(
        text.contains("wanted a number, found the text `x`"),
        "{text}"
    );
    let text = broken(&|log| log[key]["average_perturb_loss"]["0"] = json!([]));
    assert!(
        text.contains("wanted a list of numbers, found a list of 0"),
        "{text}"
    );
    let text = broken(&|log| log[key]["avg_gt_loss"] = json!({}));
    assert!(text.contains("there is no question"), "{text}");
    let text = broken(&|log| *log = json!({"a": 1}));
    assert!(text.contains("found the keys [a]"), "{text}");
    assert!(matches!(
        parse_summary("{\"a\": NaN}"),
        Err(LogError::Json { .. })
    ));

    let whole = parse_summary(&small().to_string()).unwrap();
    let mut part = small();
    part.as_object_mut().unwrap().remove("eval_log_forget.json");
    let part = parse_summary(&part.to_string()).unwrap();
    assert!(matches!(
        score(&whole, Some(&part)),
        Err(LogError::MissingTruthRatios)
    ));
    assert!(score(&part, None).unwrap().forget.is_none());
    let mut short = whole.clone();
    short.forget_truth_ratios.as_mut().unwrap().pop();
    assert!(matches!(
        score(&whole, Some(&short)),
        Err(LogError::ForgetCounts {
            n: 2,
            n_retain_log: 1
        })
    ));
}
