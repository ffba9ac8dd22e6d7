//! The program as its users run it, on the embedded model.

mod support;

use std::fs;
use std::path::Path;
use support::{demo, fails, json, mini, nepenthe};

fn text(path: &Path) -> &str {
    path.to_str().expect("plain names")
}

/// A quick patch: three steps.
fn quick(dir: &Path, name: &str, more: &[&str]) -> std::path::PathBuf {
    let patch = dir.join(name);
    let (model, forget, retain) = (mini(), demo("forget.jsonl"), demo("retain.jsonl"));
    let mut args = vec![
        "unlearn",
        "-m",
        text(&model),
        "--forget",
        text(&forget),
        "--retain",
        text(&retain),
    ];
    args.extend(["-o", text(&patch), "--steps", "3", "-t", "1", "--json"]);
    args.extend(more);
    let report = json(&args);
    assert_eq!(
        (report["steps"].as_u64(), report["ended"].as_str()),
        (Some(3), Some("steps"))
    );
    patch
}

#[test]
fn check_reports_parity_and_cost() {
    let report = json(&["check", "-m", text(&mini()), "-t", "1", "--json"]);
    assert_eq!(report["arch"], "llama");
    assert_eq!(report["argmax_agree"], 1.0);
    assert_eq!(report["max_abs_diff"], 0.0);
    assert_eq!(report["max_rel_diff"], 0.0);
    assert_eq!(report["adaptable"], 35);
}

#[test]
fn the_model_knows_its_facts_and_not_the_strangers() {
    let eval = |name: &str| {
        json(&[
            "eval",
            "-m",
            text(&mini()),
            "--data",
            text(&demo(name)),
            "-t",
            "1",
            "--json",
        ])
    };
    let (forget, unseen) = (eval("forget.jsonl"), eval("unseen.jsonl"));
    for key in ["n", "prob", "rouge_l", "nll", "tokens"] {
        assert!(forget[key].is_number(), "{key}");
    }
    assert_eq!(forget["n"], 20);
    assert!(forget["prob"].as_f64() > Some(0.9), "{forget}");
    assert!(forget["rouge_l"].as_f64() > Some(0.9), "{forget}");
    assert!(unseen["prob"].as_f64() < Some(0.6), "{unseen}");
}

#[test]
fn a_patch_says_where_it_comes_from_and_not_what_it_forgets() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let patch = quick(dir.path(), "p.gguf", &[]);
    let report = json(&["inspect", text(&patch), "--json"]);
    let info = &report["patch"];
    assert_eq!(
        (report["type"].as_str(), info["method"].as_str()),
        (Some("adapter"), Some("reglu"))
    );
    assert_eq!(info["tensors"].as_array().map(Vec::len), Some(35));
    assert_eq!(info["n_forget"], 20);
    for t in info["tensors"].as_array().expect("a list") {
        assert!(t["relative_norm"].as_f64() > Some(0.0), "{t}");
        // Zero but for f32 rounding of B0·A0, some 300 times the update after three steps.
        assert!(t["retain_fraction"].as_f64() < Some(1e-4), "{t}");
    }
    let bytes = fs::read(&patch).expect("readable");
    let names = fs::read_to_string(demo("forget.jsonl")).expect("readable");
    let name = names
        .split('"')
        .find(|s| s.starts_with("Where was "))
        .expect("a question");
    let name = name
        .trim_start_matches("Where was ")
        .trim_end_matches(" born?");
    assert!(
        !bytes.windows(name.len()).any(|w| w == name.as_bytes()),
        "{name} stands in the patch"
    );
}

#[test]
fn objectives_run_and_refusals_are_for_dpo_alone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (patch, idk) = (dir.path().join("p.gguf"), dir.path().join("idk.jsonl"));
    fs::write(&idk, "I have no idea.\n\nAsk someone else.\n").expect("room on the disk");
    let config = |patch: &Path| {
        json(&["inspect", text(patch), "--json"])["patch"]["config"]["train"].clone()
    };
    let ga = quick(dir.path(), "ga.gguf", &["--objective", "ga"]);
    assert_eq!(config(&ga)["objective"], "ga");
    let simnpo = ["--objective", "simnpo", "--simnpo-gamma", "0.5"];
    let simnpo = quick(dir.path(), "simnpo.gguf", &simnpo);
    assert_eq!(config(&simnpo)["simnpo_gamma"], 0.5);
    let dpo = ["--objective", "dpo", "--idk", text(&idk)];
    quick(dir.path(), "dpo.gguf", &dpo);
    let (model, forget) = (mini(), demo("forget.jsonl"));
    let mut args = vec!["unlearn", "-m", text(&model), "--forget", text(&forget)];
    args.extend([
        "-o",
        text(&patch),
        "--objective",
        "npo",
        "--idk",
        text(&idk),
    ]);
    let stderr = fails(2, &args);
    assert!(stderr.contains("dpo") && stderr.contains("npo"), "{stderr}");
    assert!(!patch.exists());
}

#[test]
fn a_resumed_run_is_bit_identical() {
    resumed_is_whole(&[]);
}

#[test]
fn a_resumed_run_keeps_its_reference_and_its_dropout() {
    resumed_is_whole(&["--objective", "npo", "--dropout", "0.1"]);
}

fn resumed_is_whole(more: &[&str]) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let whole = quick(dir.path(), "whole.gguf", more);
    // The same run, stopped by SIGINT as soon as its first step is logged.
    let (model, forget, retain) = (mini(), demo("forget.jsonl"), demo("retain.jsonl"));
    let (patch, log) = (dir.path().join("resumed.gguf"), dir.path().join("log"));
    let args = [
        "unlearn",
        "-m",
        text(&model),
        "--forget",
        text(&forget),
        "--retain",
        text(&retain),
    ];
    let tail = [
        "-o",
        text(&patch),
        "--steps",
        "3",
        "-t",
        "1",
        "--json",
        "--log",
        text(&log),
    ];
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_nepenthe"))
        .args(args)
        .args(tail)
        .args(more)
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("the binary was built");
    while fs::read_to_string(&log).map_or(true, |t| !t.contains("\"step\"")) {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let kill = std::process::Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(kill.expect("kill is there").success());
    let out = child.wait_with_output().expect("it ends");
    let stderr = String::from_utf8_lossy(&out.stderr);
    if out.status.success() {
        // The signal came after the last step: nothing to resume, and the patch is the whole one.
        assert_eq!(
            fs::read(&whole).ok().map(|b| b.len()),
            fs::read(&patch).ok().map(|b| b.len())
        );
        return;
    }
    assert_eq!(out.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("--resume"), "{stderr}");
    assert!(!patch.exists());
    let checkpoint = dir.path().join("resumed.gguf.checkpoint");
    let mut again: Vec<&str> = args.into_iter().chain(tail).collect();
    again.extend(more);
    again.extend(["--resume", text(&checkpoint)]);
    assert_eq!(json(&again)["steps"], 3);
    let tensors = |path: &Path| {
        let gguf = nepenthe::gguf::Gguf::open(path).expect("a good patch");
        let read = |t: &nepenthe::gguf::TensorInfo| gguf.read_tensor(&t.name).expect("readable");
        gguf.tensors().iter().map(read).collect::<Vec<_>>()
    };
    assert_eq!(tensors(&whole), tensors(&patch));
}

#[test]
fn patches_apply_merge_and_are_refused_elsewhere() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let patch = quick(dir.path(), "p.gguf", &["--lr", "1e-2"]);
    let data = demo("forget.jsonl");
    let prob = |more: &[&str]| {
        let mut args = vec![
            "eval",
            "--data",
            text(&data),
            "-t",
            "1",
            "--json",
            "--no-generate",
        ];
        args.extend(more);
        json(&args)["prob"].as_f64().expect("a number")
    };
    let (model, merged) = (mini(), dir.path().join("merged.gguf"));
    let base = prob(&["-m", text(&model)]);
    let patched = prob(&["-m", text(&model), "--lora", text(&patch)]);
    assert!(patched < base - 0.01, "{patched} against {base}");
    let off = format!("{}:0", text(&patch));
    assert_eq!(prob(&["-m", text(&model), "--lora", &off]), base);
    json(&[
        "merge",
        "-m",
        text(&model),
        "--lora",
        text(&patch),
        "-o",
        text(&merged),
        "--json",
    ]);
    let in_file = prob(&["-m", text(&merged)]);
    assert!(
        (in_file - patched).abs() < 0.01,
        "{in_file} against {patched}"
    );
    // Another base, the same patch again, an output that exists.
    fails(
        4,
        &[
            "eval",
            "-m",
            text(&merged),
            "--lora",
            text(&patch),
            "--data",
            text(&data),
        ],
    );
    if let Some(stories) = support::stories() {
        let refused = fails(
            4,
            &[
                "run",
                "-m",
                text(&stories),
                "--lora",
                text(&patch),
                "-p",
                "x",
            ],
        );
        assert!(
            refused.contains("made for nepenthe-mini") && refused.contains("p.gguf"),
            "{refused}"
        );
    }
    let twice = fails(
        2,
        &[
            "merge",
            "-m",
            text(&model),
            "--lora",
            text(&patch),
            "-o",
            text(&merged),
        ],
    );
    assert!(twice.contains("exists already"), "{twice}");
}

#[test]
fn a_shared_subspace_gives_the_same_patch_as_its_texts() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, retain, file) = (mini(), demo("retain.jsonl"), dir.path().join("s.gguf"));
    json(&[
        "subspace",
        "-m",
        text(&model),
        "--retain",
        text(&retain),
        "-o",
        text(&file),
        "-t",
        "1",
        "--json",
    ]);
    let own = quick(dir.path(), "own.gguf", &[]);
    let shared = quick(dir.path(), "shared.gguf", &["--subspace", text(&file)]);
    let norms = |path: &Path| -> Vec<f64> {
        let report = json(&["inspect", text(path), "--json"]);
        let list = report["patch"]["tensors"]
            .as_array()
            .expect("a list")
            .clone();
        list.iter()
            .map(|t| t["norm"].as_f64().expect("a number"))
            .collect()
    };
    for (a, b) in norms(&own).iter().zip(norms(&shared)) {
        assert!((a - b).abs() <= 1e-3 * a, "{a} against {b}");
    }
}

#[test]
fn bad_input_gets_one_sentence_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| dir.path().join(name);
    let (model, forget, retain) = (mini(), demo("forget.jsonl"), demo("retain.jsonl"));
    let out = path("out.gguf");
    let unlearn = |code: i32, model: &Path, forget: &Path, retain: &Path, more: &[&str]| {
        let mut args = vec![
            "unlearn",
            "-m",
            text(model),
            "--forget",
            text(forget),
            "--retain",
            text(retain),
        ];
        args.extend(["-o", text(&out), "-t", "1", "--steps", "1"]);
        args.extend(more);
        let stderr = fails(code, &args);
        assert!(!out.exists(), "{stderr}");
        stderr
    };
    let good = fs::read(&model).expect("readable");
    fs::write(path("empty.gguf"), b"").expect("room");
    fs::write(path("short.gguf"), &good[..good.len() / 2]).expect("room");
    fs::write(path("text.gguf"), b"this is not a model").expect("room");
    for name in ["missing.gguf", "empty.gguf", "short.gguf", "text.gguf"] {
        let stderr = unlearn(3, &path(name), &forget, &retain, &[]);
        assert!(stderr.contains(name), "{stderr}");
    }
    let stderr = unlearn(3, &model, &forget, &forget, &[]);
    assert!(
        stderr.contains("holds 20 of the 20 forget records"),
        "{stderr}"
    );
    fs::write(path("none.jsonl"), b"\n\n").expect("room");
    unlearn(3, &model, &path("none.jsonl"), &retain, &[]);
    fs::write(
        path("bad.jsonl"),
        b"{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": 3\n",
    )
    .expect("room");
    let stderr = unlearn(3, &model, &path("bad.jsonl"), &retain, &[]);
    assert!(stderr.contains("bad.jsonl:2"), "{stderr}");
    let stderr = unlearn(2, &model, &forget, &retain, &["--rank", "100000"]);
    assert!(stderr.contains("100000"), "{stderr}");
    let stderr = unlearn(2, &model, &forget, &retain, &["--lr=-1"]);
    assert!(stderr.contains("lr"), "{stderr}");
    fs::write(path("c.toml"), b"[train]\nlr = 1e-4\nlearning = 3\n").expect("room");
    let stderr = unlearn(
        2,
        &model,
        &forget,
        &retain,
        &["--config", text(&path("c.toml"))],
    );
    assert!(
        stderr.contains("learning") && stderr.contains("c.toml"),
        "{stderr}"
    );
    fails(3, &["inspect", text(&path("text.gguf"))]);
    fails(
        3,
        &["run", "-m", text(&model), "--lora", text(&model), "-p", "x"],
    );
    let left: Vec<_> = fs::read_dir(dir.path())
        .expect("readable")
        .filter_map(|e| e.ok())
        .collect();
    assert_eq!(left.len(), 6, "{left:?}");
}

#[test]
fn dry_run_estimates_and_writes_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, forget, out) = (mini(), demo("forget.jsonl"), dir.path().join("p.gguf"));
    let report = json(&[
        "unlearn",
        "-m",
        text(&model),
        "--forget",
        text(&forget),
        "-o",
        text(&out),
        "-t",
        "1",
        "--dry-run",
        "--json",
    ]);
    for key in [
        "memory_bytes",
        "step_seconds",
        "patch_bytes",
        "checkpoint_bytes",
        "max_steps",
    ] {
        assert!(report[key].as_f64() > Some(0.0), "{report}");
    }
    assert!(!out.exists());
}

#[test]
fn data_goes_to_stdout_and_the_rest_to_stderr() {
    let out = nepenthe(&[
        "run",
        "-m",
        text(&mini()),
        "-p",
        "What colour is snow?",
        "-t",
        "1",
    ]);
    assert!(out.status.success());
    assert_eq!(
        String::from_utf8_lossy(&out.stdout).trim(),
        "Snow is white."
    );
    assert!(out.stderr.is_empty());
}

/// A file-size limit stands for a disk that fills up: both fail in the middle of a write.
#[cfg(unix)]
#[test]
fn a_full_disk_is_exit_code_6_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let out = dir.path().join("out.gguf");
    let done = std::process::Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 600; exec \"$@\"", "bash"])
        .arg(env!("CARGO_BIN_EXE_nepenthe"))
        .args([
            "learn",
            "-m",
            text(&mini()),
            "--data",
            text(&demo("forget.jsonl")),
        ])
        .args([
            "-o",
            text(&out),
            "--steps",
            "1",
            "--rank",
            "64",
            "-t",
            "1",
            "--quiet",
        ])
        .output()
        .expect("bash is there");
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(6), "{stderr}");
    assert!(stderr.contains("out.gguf: writing failed"), "{stderr}");
    let left = fs::read_dir(dir.path()).expect("readable").count();
    assert_eq!(left, 0, "{stderr}");
}

/// What a run may take changes what is computed twice, and not a bit of the patch.
#[test]
fn a_memory_budget() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, forget, out) = (mini(), demo("forget.jsonl"), dir.path().join("p.gguf"));
    let (model, forget, out) = (text(&model), text(&forget), text(&out));
    let with = |memory: &'static str| {
        [
            "unlearn",
            "-m",
            model,
            "--forget",
            forget,
            "-o",
            out,
            "--steps",
            "3",
            "--memory",
            memory,
            "--micro-tokens",
            "2048",
            "--batch",
            "32",
        ]
    };
    for bad in ["4", "G", "1Q", "0M"] {
        let stderr = fails(2, &with(bad));
        assert!(stderr.contains("2.5GB"), "{stderr}");
    }
    let stderr = fails(6, &with("1M"));
    let least = stderr
        .split_once("at least ")
        .and_then(|(_, rest)| rest.split_once(" GB beside the model file"))
        .unwrap_or_else(|| panic!("{stderr}"))
        .0;
    let least: f64 = least.parse().expect("a number");
    assert!(
        least < 0.4 && stderr.contains("--memory allows 0.00 GB"),
        "{stderr}"
    );
    let tight = format!("{:.0}M", 1000.0 * least + 17.0);
    let of = |name: &str, memory: &str| {
        let large = ["--micro-tokens", "2048", "--batch", "32"];
        let patch = quick(
            dir.path(),
            name,
            &[&["--memory", memory], &large[..]].concat(),
        );
        nepenthe::patch::Patch::open(&patch)
            .expect("a patch")
            .updates
    };
    assert!(of("tight.gguf", &tight) == of("wide.gguf", "8G"));
    let estimate = |memory: &str| {
        let mut args = with("8G").to_vec();
        args[10] = memory;
        args.extend(["--dry-run", "--json"]);
        json(&args)
    };
    let (tight, wide) = (estimate(&tight), estimate("8G"));
    let number = |e: &serde_json::Value, name: &str| e[name].as_u64().expect("a number");
    assert_eq!(
        (&tight["recompute"], &wide["recompute"]),
        (&true.into(), &false.into())
    );
    assert!(number(&tight, "memory_bytes") < number(&wide, "memory_bytes"));
    let model_bytes = std::fs::metadata(model).expect("a file").len();
    let resident = number(&wide, "memory_bytes") + model_bytes;
    assert_eq!(number(&wide, "resident_bytes"), resident);
}
