//! TOFU's questions put to the embedded model: a small folder made of the demo's facts.

mod support;

use nepenthe::data::{Sample, Template, build_samples, load_tofu};
use nepenthe::error::Error;
use nepenthe::eval::tofu::Split;
use nepenthe::eval::tofu_log::{LogFormat, parse_official, write_log};
use nepenthe::ggml::{Context, ContextOptions};
use nepenthe::likelihood::SampleLoss;
use nepenthe::model::OpenModel;
use nepenthe::report::EvidenceError;
use nepenthe::score::tofu::{
    Partial, PartialError, TofuOptions, TofuSet, TofuWatch, evaluate_tofu, run_key,
};
use nepenthe::score::{answer_losses, shared_losses};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use support::{demo, fails, json, mini};
use tempfile::TempDir;

/// More questions than one block of the forget set, few of the others.
const N_FORGET: usize = 40;

fn text(path: &Path) -> &str {
    path.to_str().expect("plain names")
}

/// Facts of the demo as TOFU has them: wrong answers are those of others to the same question.
fn rows(name: &str, n: usize, paraphrased: bool) -> String {
    let facts = fs::read_to_string(demo(name)).expect("part of the repository");
    let facts: Vec<Value> = facts
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let answer = |i: usize| facts[i % facts.len()]["answer"].as_str().expect("a text");
    (0..n)
        .map(|i| {
            // The wrong answers are in the words of the paraphrased one.
            let words = |i| match paraphrased {
                true => format!("It is said that {}", answer(i)),
                false => answer(i).to_owned(),
            };
            let mut row = json!({
                "question": facts[i % facts.len()]["question"],
                "answer": answer(i),
                "perturbed_answer": [words(i + 5), words(i + 10)],
            });
            if paraphrased {
                row["paraphrased_answer"] = words(i).into();
            }
            format!("{row}\n")
        })
        .collect()
}

fn folder() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let files = [
        ("forget01", rows("forget.jsonl", N_FORGET, true)),
        ("retain", rows("retain.jsonl", 6, true)),
        ("real_authors", rows("general.jsonl", 5, false)),
        ("world_facts", rows("unseen.jsonl", 4, false)),
    ];
    for (name, rows) in files {
        let path = dir.path().join(format!("{name}_perturbed.json"));
        fs::write(path, rows).expect("room for a few rows");
    }
    dir
}

fn eval<'a>(dir: &'a Path, model: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["eval", "--tofu", text(dir), "--split", "forget01"];
    args.extend(["-m", text(model), "-t", "1", "--json"]);
    args.extend(more);
    args
}

/// Largest difference of a token's mean loss between two computations.
fn worst<'a>(
    a: impl IntoIterator<Item = &'a SampleLoss>,
    b: impl IntoIterator<Item = &'a SampleLoss>,
) -> f64 {
    a.into_iter().zip(b).fold(0.0, |worst, (a, b)| {
        assert_eq!(a.n_tokens, b.n_tokens);
        f64::max(worst, (a.per_token() - b.per_token()).abs())
    })
}

#[test]
fn a_shared_prefix_changes_nothing_but_rounding() {
    let dir = folder();
    // In 32 bits throughout, so that rounding is small. Quantised activations jump with the order
    // of sums: there the yardstick is what packing samples side by side changes.
    let decoded = dir.path().join("f32.gguf");
    support::decoded(&mini(), &decoded);
    for (model, f32) in [(decoded, true), (mini(), false)] {
        let open = OpenModel::open(&model, 0).unwrap();
        let questions = load_tofu(&dir.path().join("forget01_perturbed.json"), true).unwrap();
        let groups: Vec<Vec<Sample>> = questions[..20]
            .iter()
            .map(|q| {
                let records: Vec<_> = q.records().collect();
                let set = build_samples(&records, &open.model, &Template::None, 128);
                set.unwrap().samples
            })
            .collect();
        let samples: Vec<Sample> = groups.iter().flatten().cloned().collect();
        let options = ContextOptions {
            n_ctx: 2048,
            n_seq_max: 16,
            kv_f32: f32,
            flash_attn: !f32,
            ..ContextOptions::default()
        };
        let mut context = Context::new(&open.model, options).unwrap();
        let packed = answer_losses(&mut context, &samples, &mut |_| {}).unwrap();
        let single: Vec<SampleLoss> = samples
            .iter()
            .flat_map(|s| {
                answer_losses(&mut context, std::slice::from_ref(s), &mut |_| {}).unwrap()
            })
            .collect();
        let mut seen = Vec::new();
        let shared = shared_losses(&mut context, &groups, &mut |n| {
            seen.push(n);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen.last(), Some(&20));
        assert_eq!(shared.iter().flatten().count(), samples.len());
        let off = worst(&single, shared.iter().flatten());
        let noise = worst(&single, &packed);
        println!("{}: {off:e}, packed alone {noise:e}", model.display());
        let bound = if f32 { 1e-5 } else { 3.0 * noise };
        assert!(off <= bound, "{off:e}, packed alone {noise:e}");
    }
}

#[test]
fn a_log_is_written_and_read_back_in_both_forms() {
    let (dir, model) = (folder(), mini());
    let official = dir.path().join("official.json");
    let report = json(&eval(dir.path(), &model, &["-o", text(&official)]));
    assert_eq!(
        report["n"],
        json!({"retain": 6, "real_authors": 5, "world_facts": 4, "forget": N_FORGET})
    );
    let forget = &report["forget"];
    assert!(forget["prob"].as_f64() > Some(0.9), "{report}");
    assert!(forget["rouge_l"].as_f64() > Some(0.9), "{report}");
    assert!(report["model_utility"].as_f64() > Some(0.0), "{report}");

    let examples = parse_official(&fs::read_to_string(&official).unwrap()).unwrap();
    let forget = &examples[Split::Forget as usize];
    assert_eq!(forget.len(), N_FORGET);
    let [question, greedy, truth] = forget[0].generated.as_ref().unwrap();
    assert!(question.ends_with('?') && truth.ends_with('.'));
    let recall = nepenthe::eval::rouge::rouge(truth, greedy).rouge_l.recall;
    assert_eq!(forget[0].rouge_l_recall, Some(recall));
    let world = &examples[Split::WorldFacts as usize][0];
    assert_eq!(world.answer, world.paraphrased);

    let other = dir.path().join("TOFU_EVAL.json");
    write_log(&other, false, LogFormat::OpenUnlearning, &examples).unwrap();
    for log in [&official, &other] {
        let scores = json(&[
            "score",
            "--log",
            text(log),
            "--retain-log",
            text(&official),
            "--json",
        ]);
        for key in scores.as_object().unwrap().keys() {
            if let (Some(a), Some(b)) = (scores[key].as_f64(), report[key].as_f64()) {
                assert!((a - b).abs() < 1e-9, "{key}: {a} {b}");
            }
        }
        assert!(scores["forget_quality"].as_f64() > Some(0.999), "{scores}");
    }
    // The same questions again are the same answers, and only the forget set is enough for them.
    let only = [
        "--only",
        "forget",
        "--retain-log",
        text(&official),
        "--no-generate",
    ];
    let report = json(&eval(dir.path(), &model, &only));
    assert!(report["forget_quality"].as_f64() > Some(0.999), "{report}");
    assert!(report["model_utility"].is_null());
    assert_eq!(report["n"], json!({"forget": N_FORGET}));
}

/// Asks to stop once more questions than `limit` are done.
struct StopPast {
    limit: usize,
    done: usize,
}

impl TofuWatch for StopPast {
    fn progress(&mut self, done: usize, _total: usize) {
        self.done = done;
    }

    fn stop(&mut self) -> bool {
        self.done > self.limit
    }
}

#[test]
fn a_resumed_evaluation_gives_the_same_bytes() {
    let (dir, model) = (folder(), mini());
    let whole = dir.path().join("whole.json");
    json(&eval(dir.path(), &model, &["-o", text(&whole)]));
    assert!(!dir.path().join("whole.json.partial").exists());

    let open = OpenModel::open(&model, 0).unwrap();
    let template = open.template().unwrap();
    let sets: Vec<TofuSet> = Split::ALL
        .into_iter()
        .map(|split| TofuSet::load(dir.path(), split, "forget01", None).unwrap())
        .collect();
    let options = TofuOptions {
        max_tokens: 512,
        generate: true,
        n_threads: 1,
    };
    let key = run_key(&open, &[], &template, &sets, options).unwrap();
    let (log, path) = (
        dir.path().join("log.json"),
        dir.path().join("log.json.partial"),
    );
    let mut partial = Partial::begin(&path, &key).unwrap();
    // In the middle of the forget set's first block: the other three sets are kept.
    let mut watch = StopPast { limit: 15, done: 0 };
    let stopped = evaluate_tofu(
        &open.model,
        &[],
        &template,
        &sets,
        options,
        &mut partial,
        &mut watch,
    );
    let Err(error @ Error::Stopped { done, total, .. }) = stopped else {
        panic!("it was to stop");
    };
    assert_eq!((done, total), (15, 15 + N_FORGET));
    assert_eq!(error.exit_code(), 130);
    assert!(error.to_string().contains("--resume"), "{error}");
    drop(partial);
    // A process that is killed may leave half a line.
    let mut bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.iter().filter(|&&b| b == b'\n').count(), 1 + 3);
    bytes.extend(b"{\"split\":\"forget\",\"fi");
    fs::write(&path, &bytes).unwrap();

    let stderr = fails(2, &eval(dir.path(), &model, &["-o", text(&log)]));
    assert!(stderr.contains("--resume"), "{stderr}");
    let other = ["-o", text(&log), "--resume", "--no-generate"];
    let stderr = fails(4, &eval(dir.path(), &model, &other));
    assert!(stderr.contains("another generate"), "{stderr}");
    json(&eval(dir.path(), &model, &["-o", text(&log), "--resume"]));
    assert_eq!(fs::read(&log).unwrap(), fs::read(&whole).unwrap());
    assert!(!path.exists());

    fs::write(&path, "{\"a\": 1\n").unwrap();
    assert!(matches!(
        Partial::resume(&path, &key),
        Err(Error::Evidence(EvidenceError::Partial(
            PartialError::Malformed { line: 1, .. }
        )))
    ));
}

#[test]
fn what_is_wrong_with_files_is_said_before_the_model_is_asked() {
    let (dir, model) = (folder(), mini());
    let log = dir.path().join("log.json");
    json(&eval(
        dir.path(),
        &model,
        &["-o", text(&log), "--no-generate", "--limit", "3"],
    ));
    let refused = |code, more: &[&str]| fails(code, &eval(dir.path(), &model, more));
    let stderr = refused(3, &["--retain-log", text(&log)]);
    assert!(
        stderr.contains("40 forget questions") && stderr.contains("the 3 of"),
        "{stderr}"
    );
    let stderr = refused(2, &["-o", text(&log)]);
    assert!(stderr.contains("exists"), "{stderr}");
    let stderr = refused(2, &["--only", "retain", "--retain-log", text(&log)]);
    assert!(stderr.contains("retain-log"), "{stderr}");
    refused(2, &["--resume"]);
    refused(2, &["--only", "holdout"]);
    fails(2, &["eval", "--tofu", text(dir.path()), "-m", text(&model)]);
    // Without greedy answers there is no utility, and no answer in the log.
    let stderr = fails(3, &["score", "--log", text(&log), "--json"]);
    assert!(stderr.contains("rougeL_recall"), "{stderr}");
    let scores = json(&["score", "--log", text(&log), "--partial", "--json"]);
    assert!(scores["model_utility"].is_null() && scores["retain_prob"].is_number());

    let retain = dir.path().join("retain_perturbed.json");
    let good = fs::read_to_string(&retain).unwrap();
    fs::write(&retain, good.replacen("perturbed_answer", "wrong", 1)).unwrap();
    let stderr = refused(3, &[]);
    assert!(
        stderr.contains("retain_perturbed.json:1: wanted `perturbed_answer`"),
        "{stderr}"
    );
    fs::write(&retain, format!("{good}{{\"question\": ")).unwrap();
    let stderr = refused(3, &[]);
    assert!(stderr.contains("retain_perturbed.json:7:"), "{stderr}");
    fs::remove_file(&retain).unwrap();
    let stderr = refused(3, &[]);
    assert!(stderr.contains("retain_perturbed.json"), "{stderr}");
    json(&eval(
        dir.path(),
        &model,
        &["--only", "forget", "--limit", "1", "--no-generate"],
    ));
}

#[test]
fn score_reproduces_the_official_figures() {
    let shared = support::root().join("../shared");
    let shared = std::env::var_os("NEPENTHE_SHARED").map_or(shared, PathBuf::from);
    let log = |name: &str| {
        shared.join(format!(
            "data/tofu/eval_logs/phi_{name}/eval_log_aggregated.json"
        ))
    };
    let (full, retain) = (log("full"), log("retain90"));
    if !full.is_file() || !retain.is_file() {
        eprintln!(
            "skipped: {} is not there (set NEPENTHE_SHARED)",
            full.display()
        );
        return;
    }
    let golden: Value = serde_json::from_str(include_str!("golden/tofu.json")).unwrap();
    let scores = json(&[
        "score",
        "--log",
        text(&full),
        "--retain-log",
        text(&retain),
        "--json",
    ]);
    let close = |got: &Value, want: &Value, key: &str| {
        let (got, want) = (got.as_f64().unwrap(), want.as_f64().unwrap());
        assert!(
            (got - want).abs() <= 1e-9 * want.abs(),
            "{key}: {got} {want}"
        );
    };
    for (key, want) in golden["full"].as_object().unwrap() {
        match key.strip_prefix("forget_") {
            Some(part) => close(&scores["forget"][part], want, key),
            None => close(&scores[key], want, key),
        }
    }
    let test = &golden["full_vs_retain90_first_300"];
    close(&scores["forget_quality"], &test["forget_quality"], "p");
    close(&scores["forget_ks"], &test["forget_ks"], "D");
}
