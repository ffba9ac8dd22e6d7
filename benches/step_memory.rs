//! How much memory and time `nepenthe unlearn` takes beside what `--dry-run` says of it.
//!
//! `cargo bench --bench step_memory -- --shape 1b|3b|7b|8b [--memory 2.5G] [--batch N] [--steps N]
//! [--rank R] [--init rila|lora] [--threads N] [--blocks N] [--dir DIR] [--data TOFU] [--nepenthe FILE]`
//!
//! Writes a synthetic model (see `shapes`) under `--dir` and short pairs of TOFU, of which two of each
//! set are about 256 tokens: the embedded model's vocabulary is small. Both programs are processes of
//! their own, watched in `/proc/PID/status`: the peak (`VmHWM`, the kernel's own) has the mapped
//! pages of the file in it, pages of its own (`RssAnon`) are sampled. Times are those of the log.

#[path = "shapes/blocks.rs"]
mod blocks;
#[allow(dead_code, reason = "a model without a patch")]
#[path = "shapes/llama.rs"]
mod llama;
mod support;

use llama::Shape;
use nepenthe::gguf::Gguf;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{Args, Fallible};

/// The two authors to be forgotten end the file; the retain pairs are those of others.
const FORGET: usize = 2;
const RETAIN: usize = 2;
const APART: usize = 200;
/// Characters of a question and of an answer.
const CUT: usize = 65;

fn main() -> Fallible<()> {
    let args = Args::parse();
    let Some(shape) = args.value("--shape") else {
        println!("skipped: --shape 1b|3b|7b|8b says what to train");
        return Ok(());
    };
    let data = args.value("--data").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/tofu"),
        PathBuf::from,
    );
    let data = data.join("full.json");
    if !data.exists() {
        println!("skipped: {} is not at hand", data.display());
        return Ok(());
    }
    let shape = Shape::find(shape, args.number("--blocks")?)?;
    let dir = args.value("--dir").map(PathBuf::from);
    let dir = tempfile::tempdir_in(dir.unwrap_or_else(std::env::temp_dir))?;
    let path = |name: &str| dir.path().join(name);
    write_sets(&data, &path("forget.jsonl"), &path("retain.jsonl"))?;
    let vocabulary = Gguf::open(support::mini())?;
    let file = llama::write_model(&path("model.gguf"), &shape, &vocabulary, 1)?;
    let unlearn = |more: &[&str]| {
        let program = args
            .value("--nepenthe")
            .unwrap_or(env!("CARGO_BIN_EXE_nepenthe"));
        let mut command = Command::new(program);
        command.current_dir(dir.path());
        command.args(["unlearn", "-m", "model.gguf", "-o", "patch.gguf"]);
        command.args(["--forget", "forget.jsonl", "--retain", "retain.jsonl"]);
        command.args(["--no-sketch", "--no-generate", "--json"]);
        let given = |flag: &str, or: &str| args.value(flag).unwrap_or(or).to_owned();
        command.args(["--memory", &given("--memory", "2.5G")]);
        command.args(["--batch", &given("--batch", "2")]);
        command.args(["--steps", &given("--steps", "2")]);
        for flag in ["--rank", "--threads", "--init"] {
            if let Some(n) = args.value(flag) {
                command.args([flag, n]);
            }
        }
        command.args(more);
        command
    };
    let out = std::fs::File::create(path("dry.json"))?;
    let dry = support::watch(unlearn(&["--dry-run"]).stdout(out), &[0])?;
    let predicted: Value = serde_json::from_slice(&std::fs::read(path("dry.json"))?)?;
    let number = |name: &str| predicted[name].as_f64().ok_or(format!("no {name}"));
    let used = support::watch(
        unlearn(&["--log", "log.jsonl"]).stdout(std::process::Stdio::null()),
        &[0],
    )?;
    let log = std::fs::read_to_string(path("log.jsonl"))?;
    let steps: Vec<Value> = log
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let steps = steps.iter().filter(|e| e["event"] == "step");
    let seconds: Vec<f64> = steps
        .clone()
        .filter_map(|s| s["seconds"].as_f64())
        .collect();
    let tokens: Vec<u64> = steps.filter_map(|s| s["tokens"].as_u64()).collect();
    println!(
        "{} shape, {} blocks, file {:.0} MB; {tokens:?} tokens a step; copies of {} weights, layers \
         computed {}",
        shape.name,
        shape.n_layer,
        file as f64 / 1e6,
        predicted["copies"],
        if predicted["recompute"] == true {
            "twice"
        } else {
            "once"
        },
    );
    println!(
        "{:<28} {:>10} {:>10} {:>7}",
        "", "predicted", "measured", "ratio"
    );
    let row = |what: &str, predicted: f64, measured: f64| {
        let ratio = predicted / measured;
        println!("{what:<28} {predicted:>10.1} {measured:>10.1} {ratio:>7.2}");
    };
    let mb = |bytes: f64| bytes / 1e6;
    row(
        "its own memory, MB",
        mb(number("memory_bytes")?),
        mb(used.anon as f64),
    );
    row(
        "with the file's pages, MB",
        mb(number("resident_bytes")?),
        mb(used.peak as f64),
    );
    row(
        "a step, s",
        number("step_seconds")?,
        support::median(seconds),
    );
    println!(
        "peak of the dry run less the file: {:.0} MB",
        mb(dry.peak as f64 - file as f64)
    );
    println!(
        "peak less the file: {:.0} MB; {:.0} s of CPU in all",
        mb(used.peak as f64 - file as f64),
        used.cpu
    );
    Ok(())
}

fn write_sets(data: &Path, forget: &Path, retain: &Path) -> Fallible<()> {
    let rows: Vec<Value> = match std::fs::read_to_string(data)? {
        text if text.starts_with('[') => serde_json::from_str(&text)?,
        text => text
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?,
    };
    let write = |path: &Path, rows: &[Value]| -> Fallible<()> {
        let cut = |v: &Value| -> String { v.as_str().unwrap_or("").chars().take(CUT).collect() };
        let pair = |r: &Value| serde_json::json!({ "question": cut(&r["question"]), "answer": cut(&r["answer"]) });
        let lines: String = rows.iter().map(|r| format!("{}\n", pair(r))).collect();
        Ok(std::fs::write(path, lines)?)
    };
    let n = rows.len();
    write(forget, &rows[n - FORGET..])?;
    write(retain, &rows[n - APART..n - APART + RETAIN])
}
