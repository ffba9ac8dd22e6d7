//! Robustness and the report, on the embedded model.

mod support;

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use support::{demo, fails, json, mini, nepenthe};

fn text(path: &Path) -> &str {
    path.to_str().expect("plain names")
}

/// A folder with a patch `p.gguf` and its `log.jsonl`.
struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    fn new(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let made = Self { dir };
        let (model, forget, retain) = (mini(), demo("forget.jsonl"), demo("retain.jsonl"));
        let (patch, log) = (made.at("p.gguf"), made.at("log.jsonl"));
        let mut args = vec!["unlearn", "-m", text(&model), "--forget", text(&forget)];
        args.extend(["--retain", text(&retain), "-o", text(&patch), "-t", "1"]);
        args.extend(["--log", text(&log), "--no-sketch", "--json"]);
        args.extend(more);
        json(&args);
        made
    }

    /// Three steps: enough for all that does not look at the scores.
    fn quick() -> Self {
        Self::new(&["--steps", "3"])
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What robustness says of the patch, in `r.json` as well.
    fn robustness(&self, more: &[&str]) -> Value {
        let (model, patch, forget) = (mini(), self.at("p.gguf"), demo("forget.jsonl"));
        let mut args = vec!["robustness", "-m", text(&model), "--lora", text(&patch)];
        args.extend(["--forget", text(&forget), "-t", "1", "--json"]);
        args.extend(more);
        let found = json(&args);
        fs::write(self.at("r.json"), found.to_string()).expect("room on the disk");
        found
    }

    /// Page and JSON of a report.
    fn report(&self, more: &[&str]) -> (String, Value) {
        let (model, patch) = (mini(), self.at("p.gguf"));
        let (html, out) = (self.at("report.html"), self.at("report.json"));
        let (forget, retain) = (demo("forget.jsonl"), demo("retain.jsonl"));
        let mut args = vec!["report", "-m", text(&model), "--lora", text(&patch)];
        args.extend(["--forget", text(&forget), "--retain", text(&retain)]);
        args.extend(["--max-samples", "12", "-t", "1", "-o", text(&html)]);
        args.extend(["--json", text(&out)]);
        args.extend(more);
        let done = nepenthe(&args);
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{stderr}");
        let page = fs::read_to_string(&html).expect("a page");
        let bytes = fs::read(&out).expect("a report");
        (page, serde_json::from_slice(&bytes).expect("JSON"))
    }
}

fn prob(sets: &Value, set: &str) -> f64 {
    sets[set]["prob"]["mean"].as_f64().expect("a number")
}

#[test]
fn a_patch_that_forgets_is_shown_to_and_its_report_has_no_text_of_the_sets() {
    let made = Made::new(&["--max-steps", "24", "--lr", "1e-3"]);
    let (retain, paraphrased) = (demo("retain.jsonl"), demo("paraphrase.jsonl"));
    let general = demo("general.jsonl");
    let mut more = vec![
        "--retain",
        text(&retain),
        "--paraphrased",
        text(&paraphrased),
    ];
    more.extend(["--relearn", text(&general), "--relearn-steps", "0,3"]);
    more.extend(["--scales", "0,0.5,1", "--max-samples", "20"]);
    let found = made.robustness(&more);
    more_of_the_patch_forgets_more(&found);
    relearning_starts_from_the_patched_model(&found);
    let (log, robust) = (made.at("log.jsonl"), made.at("r.json"));
    let mut more = vec!["--log", text(&log), "--robustness", text(&robust)];
    more.extend(["--paraphrased", text(&paraphrased)]);
    let (page, report) = made.report(&more);
    every_section_is_there(&page);
    assert_eq!(report["asked"]["confirmed"], true);
    assert_eq!(report["asked"]["n_forget"], 20);
    assert!(report["training"]["unseen_nll"].as_f64() > Some(0.0));
    no_text_of_the_sets(&(page + &report.to_string()));
}

fn more_of_the_patch_forgets_more(found: &Value) {
    let (model, forget) = (mini(), demo("forget.jsonl"));
    let mut args = vec!["robustness", "-m", text(&model), "--forget", text(&forget)];
    args.extend(["--max-samples", "20", "-t", "1", "--json"]);
    let base = json(&args);
    assert!(base["scales"].as_array().is_some_and(Vec::is_empty));
    let at = |i: usize| &found["scales"][i]["sets"];
    // Scale 0 is the model without the patch, to the bit.
    assert_eq!(at(0)["forget"], base["deployed"]["forget"]);
    assert_eq!(at(2), &found["deployed"]);
    let curve = [0, 1, 2].map(|i| prob(at(i), "forget"));
    assert!(curve[0] > curve[1] && curve[1] > curve[2], "{curve:?}");
    // What is kept falls less than what is forgotten.
    let kept = prob(at(2), "retain") / prob(at(0), "retain");
    assert!(kept > curve[2] / curve[0], "{kept} {curve:?}");
}

fn relearning_starts_from_the_patched_model(found: &Value) {
    let relearn = &found["relearn"];
    assert_eq!(relearn["n_shared"], 0);
    let points = relearn["points"].as_array().expect("a list");
    assert_eq!(points.len(), 2);
    let start = prob(&points[0], "forget");
    // The trained graphs and llama.cpp's decode differ in the type of the cache.
    let deployed = prob(&found["deployed"], "forget");
    let base = prob(&found["scales"][0]["sets"], "forget");
    assert!((start - deployed).abs() < 0.01, "{start} {deployed}");
    assert!((start - base).abs() > 0.05, "{start} {base}");
    assert!(points[0]["loss"].is_null() && points[1]["loss"].as_f64() > Some(0.0));
    assert_ne!(prob(&points[1], "forget"), start);
}

fn every_section_is_there(page: &str) {
    for id in [
        "verdict",
        "asked",
        "files",
        "measured",
        "robustness",
        "method",
        "where",
        "training",
        "answers",
        "methods",
    ] {
        assert!(page.contains(&format!("<section id=\"{id}\">")), "{id}");
    }
    let (opened, closed) = (page.matches("<svg").count(), page.matches("</svg>").count());
    // Probability, checks, where, off retain, energy, two losses, scales, relearning.
    assert_eq!((opened, closed), (9, 9));
    // Nothing is fetched and nothing runs.
    for outside in ["<script", "http://", "https://", "<link", "<img", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
}

fn no_text_of_the_sets(report: &str) {
    for name in ["forget.jsonl", "retain.jsonl", "paraphrase.jsonl"] {
        assert!(!report.contains(name), "{name}");
        let lines = fs::read_to_string(demo(name)).expect("readable");
        for line in lines.lines() {
            let record: Value = serde_json::from_str(line).expect("JSON");
            for key in ["question", "answer"] {
                let quoted = record[key].as_str().expect("text");
                assert!(!report.contains(quoted), "{quoted}");
            }
            // First and family name stand side by side.
            let words = record["answer"].as_str().expect("text").split(' ');
            let words: Vec<&str> = words.collect();
            let capital = |w: &str| w.starts_with(char::is_uppercase);
            for pair in words.windows(2).filter(|p| p.iter().all(|w| capital(w))) {
                assert!(!report.contains(&pair.join(" ")), "{pair:?}");
            }
        }
    }
}

#[test]
fn page_and_json_say_the_same() {
    let (page, report) = Made::quick().report(&[]);
    for variant in report["measured"].as_array().expect("a list") {
        for set in variant["sets"].as_array().expect("a list") {
            for score in ["prob", "nll", "rouge_l"] {
                let mean = &set["scores"][score]["mean"];
                let text = format!("{:.4} [", mean.as_f64().expect("a number"));
                assert!(page.contains(&text), "{text}");
            }
        }
    }
    let verdict = &report["verdict"];
    let summary = verdict["summary"].as_str().expect("text");
    assert!(page.contains(summary), "{summary}");
    let criteria = verdict["criteria"].as_array().expect("a list");
    assert_eq!(
        page.matches("<div class=\"criterion").count(),
        criteria.len()
    );
    for c in criteria {
        assert!(page.contains(c["claim"].as_str().expect("text")));
    }
    for file in ["model", "patch"] {
        let file = &report["files"][file];
        let digest = file["sha256"].as_str().or(file["file"]["sha256"].as_str());
        assert!(page.contains(digest.expect("a digest")));
    }
    let hash = report["asked"]["forget_hash"].as_str().expect("a hash");
    assert!(page.contains(hash));
}

#[test]
fn quoted_texts_are_escaped() {
    let made = Made::quick();
    let hostile = "Who is <script>alert(1)</script> & \"O'Brien\"?";
    let data = made.at("hostile.jsonl");
    let record = serde_json::json!({ "question": hostile, "answer": "</p><img src=x>" });
    fs::write(&data, format!("{record}\n")).expect("room on the disk");
    let model = mini();
    let patch = made.at("<b>p.gguf");
    fs::copy(made.at("p.gguf"), &patch).expect("room on the disk");
    let (html, out) = (made.at("h.html"), made.at("h.json"));
    let mut args = vec!["report", "-m", text(&model), "--lora", text(&patch)];
    args.extend(["--forget", text(&data), "--include-texts", "-t", "1"]);
    args.extend(["-o", text(&html), "--json", text(&out), "--strict"]);
    // Another set than the patch was made for is no evidence.
    let e = fails(5, &args);
    assert!(e.contains("the verdict is not met"), "{e}");
    let page = fs::read_to_string(&html).expect("a page");
    assert!(page.contains("&lt;script&gt;alert(1)"), "quoted, escaped");
    for raw in ["<script", "<img", "<b>p.gguf"] {
        assert!(!page.contains(raw), "{raw}");
    }
    let report: Value = serde_json::from_slice(&fs::read(&out).expect("a report")).expect("JSON");
    assert_eq!(report["transcripts"][0]["question"], hostile);
    assert_eq!(report["asked"]["confirmed"], false);
    // And an existing report is not replaced.
    assert!(fails(2, &args).contains("exists"));
}

#[test]
fn files_of_other_patches_are_refused() {
    let made = Made::quick();
    let (model, patch) = (mini(), made.at("p.gguf"));
    let mut other = made.robustness(&["--scales", "1", "--max-samples", "2"]);
    other["patches"][0]["file"]["sha256"] = "0".repeat(64).into();
    let (path, html) = (made.at("other.json"), made.at("other.html"));
    fs::write(&path, other.to_string()).expect("room on the disk");
    let mut args = vec!["report", "-m", text(&model), "--lora", text(&patch)];
    args.extend(["-o", text(&html), "-t", "1", "--robustness", text(&path)]);
    assert!(fails(4, &args).contains("found those of others"));
    fs::write(&path, "{\"robustness_format\": 1}").expect("room on the disk");
    assert!(fails(3, &args).contains("other.json"));
    let bad = ["--max-level", "nan"];
    args.truncate(9);
    args.extend(bad);
    assert!(fails(2, &args).contains("max-level"));
    assert!(!html.exists());
}
