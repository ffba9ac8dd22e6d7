//! The same-grid merge as its users run it, on the embedded model.

mod support;

use nepenthe::ggml::quantize;
use nepenthe::gguf::{GgmlType, Gguf, GgufWriter};
use nepenthe::graph::weights::Weights;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use support::{demo, fails, json, mini};

fn text(path: &Path) -> &str {
    path.to_str().expect("plain names")
}

/// A patch that forgets, with its sketch; made once a process.
fn patch() -> &'static Path {
    static PATCH: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = PATCH.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("p.gguf");
        let (model, forget, retain) = (mini(), demo("forget.jsonl"), demo("retain.jsonl"));
        let args = ["unlearn", "-m", text(&model), "--forget", text(&forget)];
        let more = ["--retain", text(&retain), "-o", text(&path)];
        let last = ["--steps", "20", "--lr", "2e-3", "-t", "1", "--json"];
        json(&[&args[..], &more[..], &last[..]].concat());
        (dir, path)
    });
    path
}

/// `nepenthe merge` of the patch into the embedded model, on all its texts.
fn merge_args<'a>(model: &'a Path, out: &'a Path, texts: &'a [PathBuf; 3]) -> Vec<&'a str> {
    let [forget, retain, general] = texts;
    vec![
        "merge",
        "-m",
        text(model),
        "--lora",
        text(patch()),
        "-o",
        text(out),
        "--forget",
        text(forget),
        "--retain",
        text(retain),
        "--calibrate",
        text(general),
        "-t",
        "1",
        "--json",
    ]
}

fn texts() -> [PathBuf; 3] {
    ["forget.jsonl", "retain.jsonl", "general.jsonl"].map(demo)
}

fn number(value: &serde_json::Value) -> f64 {
    value.as_f64().expect("a number")
}

#[test]
fn the_effect_survives_at_equal_size_and_the_merge_is_undone_byte_for_byte() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| dir.path().join(name);
    let (model, texts, out, undo) = (mini(), texts(), path("m.gguf"), path("m.undo"));
    let mut args = merge_args(&model, &out, &texts);
    args.extend(["--no-record", "--undo", text(&undo)]);
    let report = json(&args);
    let verdict = &report["verdict"];
    assert!(number(&verdict["kept_effect"]) >= 0.95, "{verdict}");
    assert!(number(&verdict["retain_ratio"]) >= 0.97, "{verdict}");
    let (before, after) = (
        fs::read(&model).expect("readable"),
        fs::read(&out).expect("readable"),
    );
    assert_eq!(before.len(), after.len());
    // Header, and every tensor without an update: not a byte differs.
    let gguf = Gguf::open(&model).expect("a good model");
    let data = gguf.data_offset();
    assert_eq!(before[..data as usize], after[..data as usize]);
    let adapted: Vec<&str> = report["tensors"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|t| t["tensor"].as_str().expect("a name"))
        .collect();
    assert_eq!(adapted.len(), 35);
    for t in gguf.tensors() {
        let at = t.absolute_offset(data) as usize;
        let range = at..at + (t.row_bytes() * t.n_rows()) as usize;
        let same = before[range.clone()] == after[range];
        assert_eq!(same, !adapted.contains(&t.name.as_str()), "{}", t.name);
    }
    let back = path("back.gguf");
    let revert = ["revert", "-m", text(&out), "--undo", text(&undo)];
    json(&[&revert[..], &["-o", text(&back), "--json"]].concat());
    assert!(fs::read(&back).expect("readable") == before);
}

#[test]
fn a_device_with_model_and_patch_alone_can_merge() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, out) = (mini(), dir.path().join("m.gguf"));
    let args = ["merge", "-m", text(&model), "--lora", text(patch())];
    let report = json(&[&args[..], &["-o", text(&out), "-t", "1", "--json"]].concat());
    assert_eq!(report["calibration"], "sketch");
    let forget = demo("forget.jsonl");
    let prob = |model: &Path, more: &[&str]| {
        let args = ["eval", "-m", text(model), "--data", text(&forget)];
        let last = ["--no-generate", "-t", "1", "--json"];
        number(&json(&[&args[..], more, &last[..]].concat())["prob"])
    };
    let (base, unmerged) = (prob(&model, &[]), prob(&model, &["--lora", text(patch())]));
    let kept = (base - prob(&out, &[])) / (base - unmerged);
    assert!(kept > 0.9, "{kept} of {base} to {unmerged}");
}

#[test]
fn a_file_without_the_effect_is_refused_and_not_left_behind() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, texts, out) = (mini(), texts(), dir.path().join("m.gguf"));
    let mut args = merge_args(&model, &out, &texts);
    // Nothing passes a gate that wants more than there is.
    args.extend(["--min-effect", "2"]);
    let stderr = fails(5, &args);
    assert!(stderr.contains("change in forget probability"), "{stderr}");
    assert!(fs::read_dir(dir.path()).expect("readable").next().is_none());
    args.push("--keep-failed");
    fails(5, &args);
    assert!(out.is_file());
}

#[test]
fn nearest_codes_lose_what_feedback_keeps() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, texts) = (mini(), texts());
    let lost = |rounding: &str| {
        let out = dir.path().join(rounding);
        let mut args = merge_args(&model, &out, &texts);
        args.extend(["--rounding", rounding, "--no-gate"]);
        let report = json(&args);
        let tensors = report["tensors"].as_array().expect("a list").clone();
        let sum: f64 = tensors.iter().map(|t| number(&t["err_f"])).sum();
        sum / tensors.len() as f64
    };
    let (nearest, feedback) = (lost("nearest"), lost("feedback"));
    assert!(feedback < 0.5 * nearest, "{feedback} against {nearest}");
}

#[test]
fn growth_is_spent_within_its_budget_and_lowers_the_error() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, texts) = (mini(), texts());
    let size = fs::metadata(&model).expect("there").len();
    let run = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let mut args = merge_args(&model, &out, &texts);
        args.extend(["--no-record", "--no-gate"]);
        args.extend(more);
        let report = json(&args);
        let tensors = report["tensors"].as_array().expect("a list").clone();
        let worst = tensors.iter().map(|t| number(&t["err_f"]));
        let grown = tensors.iter().map(|t| number(&t["growth"])).sum::<f64>();
        (worst.fold(0.0, f64::max), grown, report)
    };
    let (worst, grown, _) = run("grid.gguf", &[]);
    assert_eq!(grown, 0.0);
    let (promoted, grown, report) = run(
        "promoted.gguf",
        &["--policy", "promote", "--max-growth", "20"],
    );
    assert!(grown > 0.0 && grown <= 0.2 * size as f64, "{grown}");
    assert!(promoted <= worst, "{promoted} against {worst}");
    assert_eq!(
        number(&report["file_len"]) - number(&report["file_len_before"]),
        grown
    );
    let (_, grown, report) = run(
        "residue.gguf",
        &["--policy", "residue", "--max-growth", "8"],
    );
    let side = report["residue"].as_str().expect("a side adapter");
    assert!(grown > 0.0 && grown <= 0.08 * size as f64, "{grown}");
    // It belongs to the merged file and to no other.
    let merged = dir.path().join("residue.gguf");
    let data = demo("forget.jsonl");
    let with = |model: &Path| -> Vec<String> {
        let args = ["eval", "-m", text(model), "--lora", side];
        let last = ["--data", text(&data), "--no-generate", "-t", "1", "--json"];
        [&args[..], &last[..]]
            .concat()
            .iter()
            .map(|s| s.to_string())
            .collect()
    };
    let good = with(&merged);
    json(&good.iter().map(String::as_str).collect::<Vec<_>>());
    let bad = with(&model);
    fails(4, &bad.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn a_patch_at_scale_zero_changes_no_byte() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, texts, out) = (mini(), texts(), dir.path().join("m.gguf"));
    let mut args = merge_args(&model, &out, &texts);
    let zero = format!("{}:0", text(patch()));
    args[4] = &zero;
    args.extend(["--no-record", "--no-gate"]);
    json(&args);
    assert!(fs::read(&out).expect("readable") == fs::read(&model).expect("readable"));
}

/// The embedded model with its blocks' matrices in `ty`.
fn coarse(out: &Path, ty: GgmlType) {
    let weights = Weights::open(&mini()).expect("a good model");
    let part = &weights.set().parts()[0];
    let mut file = GgufWriter::new(out, weights.set().metadata().clone());
    for t in part.tensors() {
        if t.name.starts_with("blk.") && t.n_rows() > 1 {
            let values = weights.decoded(&t.name).expect("decodes");
            let bytes = quantize(ty.id(), &values, t.ne[0] as usize, None).expect("encodes");
            let bytes = std::io::Cursor::new(bytes);
            file.tensor_from_reader(&t.name, t.dims(), ty, bytes)
                .expect("fits");
        } else {
            file.copy_tensor(part, &t.name).expect("copies");
        }
    }
    file.save(false).expect("writes");
}

#[test]
fn a_correction_takes_the_file_nearer_to_model_and_patch() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, patch) = (dir.path().join("coarse.gguf"), dir.path().join("p.gguf"));
    // 16 levels and one scale for 32 of them: much to be taken back.
    coarse(&model, GgmlType::Q4_0);
    let texts = texts();
    let args = ["unlearn", "-m", text(&model), "--forget", text(&texts[0])];
    let more = ["--retain", text(&texts[1]), "-o", text(&patch)];
    let last = [
        "--steps",
        "20",
        "--lr",
        "2e-3",
        "--no-generate",
        "-t",
        "1",
        "--json",
    ];
    json(&[&args[..], &more[..], &last[..]].concat());
    let merged = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let undo = dir.path().join(format!("{name}.undo"));
        let mut args = merge_args(&model, &out, &texts);
        args[4] = text(&patch);
        args.extend(["--keep-failed", "--no-record", "--undo", text(&undo)]);
        args.push("--refit-scales");
        args.extend(more);
        let done = support::nepenthe(&args);
        let report: serde_json::Value =
            serde_json::from_slice(&done.stdout).expect("a report whatever the verdict");
        (report, out, undo)
    };
    let (once, ..) = merged("once.gguf", &[]);
    let (twice, out, undo) = merged("twice.gguf", &["--rounds", "1"]);
    let kl = |report: &serde_json::Value, set: &str| number(&report["verdict"][set]["kl"]);
    let (before, after) = (kl(&once, "forget"), kl(&twice, "forget"));
    assert!(after < 0.8 * before, "{before} to {after}");
    // Still the same size and types; and undone to the original.
    let read = |path: &Path| fs::read(path).expect("readable");
    assert_eq!(read(&model).len(), read(&out).len());
    for t in twice["tensors"].as_array().expect("a list") {
        assert_eq!(t["from"], t["to"]);
        assert!(number(&t["codes_changed"]) > 0.0, "{t}");
    }
    let back = dir.path().join("back.gguf");
    let revert = ["revert", "-m", text(&out), "--undo", text(&undo)];
    json(&[&revert[..], &["-o", text(&back), "--json"]].concat());
    assert!(read(&back) == read(&model));
}

#[test]
fn corrections_need_texts_and_a_merge_into_the_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, texts, out) = (mini(), texts(), dir.path().join("m.gguf"));
    let mut args = merge_args(&model, &out, &texts);
    args.extend(["--rounds", "1", "--max-growth", "5"]);
    let stderr = fails(2, &args);
    assert!(stderr.contains("residues beside the file"), "{stderr}");
    let args = ["merge", "-m", text(&model), "--lora", text(patch())];
    let more = ["-o", text(&out), "--rounds", "1", "-t", "1"];
    let stderr = fails(2, &[&args[..], &more[..]].concat());
    assert!(stderr.contains("no --forget"), "{stderr}");
    assert!(!out.exists());
}
