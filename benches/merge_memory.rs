//! How much memory `nepenthe merge` takes, beside the bound file + 1 GB + one matrix.
//!
//! `cargo bench --bench merge_memory -- --shape 1b|3b|7b|8b [--blocks N] [--dir DIR] [--threads N]
//! [--passes N] [--gate] [--adapt PART] [--nepenthe FILE]`
//!
//! Writes a synthetic model and patch (see `shapes`) under `--dir`, merges them in a process of
//! their own, calibrated by the built-in general text, and watches that process in
//! `/proc/PID/status`: its peak (`VmHWM`, the kernel's own), and what is mapped from files
//! (`RssFile`) and what is not (`RssAnon`), sampled. One matrix is H of the widest input in f32,
//! a GB 10^9 bytes. Then the merged file must open, differ from the model in every adapted tensor
//! and in no other, and revert to the very bytes. `--adapt` cuts
//! the patch to matrices with this in their names (`attn`); `--nepenthe` names another build of
//! the program.

#[path = "shapes/blocks.rs"]
mod blocks;
#[path = "shapes/llama.rs"]
mod llama;
mod support;

use llama::Shape;
use nepenthe::digest::of_file;
use nepenthe::gguf::Gguf;
use nepenthe::patch::Patch;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::{Args, Fallible, Used};

fn main() -> Fallible<()> {
    let args = Args::parse();
    let Some(shape) = args.value("--shape") else {
        println!("skipped: --shape 1b|3b|7b|8b says what to merge (7b and 8b: with --blocks 2)");
        return Ok(());
    };
    let shape = Shape::find(shape, args.number("--blocks")?)?;
    let dir = args.value("--dir").map(PathBuf::from);
    let dir = tempfile::tempdir_in(dir.unwrap_or_else(std::env::temp_dir))?;
    let path = |name: &str| dir.path().join(name);
    let bench = Bench {
        program: args
            .value("--nepenthe")
            .unwrap_or(env!("CARGO_BIN_EXE_nepenthe"))
            .into(),
        model: path("model.gguf"),
        patch: path("patch.gguf"),
        merged: path("merged.gguf"),
        undo: path("undo"),
        back: path("back.gguf"),
    };
    let vocabulary = Gguf::open(support::mini())?;
    let file_len = llama::write_model(&bench.model, &shape, &vocabulary, 1)?;
    let adapted = args.value("--adapt").unwrap_or_default();
    let n_adapted = llama::write_patch(&bench.patch, &bench.model, &shape, adapted, 2)?;
    let used = bench.merge(&args)?;
    let updates = Patch::open(&bench.patch)?.updates;
    let widest = updates.iter().map(|u| u.n_in).max().unwrap_or(0);
    let matrix = 4 * (widest as u64).pow(2);
    let bound = file_len + 1_000_000_000 + matrix;
    let mb = |bytes: u64| bytes as f64 / 1e6;
    println!(
        "{} shape, {} blocks: {n_adapted} tensors, widest input {widest}",
        shape.name, shape.n_layer
    );
    println!("{:<34} {:>8.0} MB", "file", mb(file_len));
    println!("{:<34} {:>8.0} MB", "one matrix", mb(matrix));
    println!("{:<34} {:>8.0} MB", "bound", mb(bound));
    let held = if used.peak <= bound { "" } else { " (above)" };
    println!("{:<34} {:>8.0} MB{held}", "peak, all pages", mb(used.peak));
    println!("{:<34} {:>8.0} MB", "most from files", mb(used.file));
    println!("{:<34} {:>8.0} MB", "most of its own", mb(used.anon));
    println!("{:<34} {:>8.0} s", "CPU", used.cpu);
    bench.check()?;
    println!("opens; only adapted tensors differ; reverts to the same bytes");
    Ok(())
}

struct Bench {
    program: PathBuf,
    model: PathBuf,
    patch: PathBuf,
    merged: PathBuf,
    undo: PathBuf,
    back: PathBuf,
}

impl Bench {
    fn merge(&self, args: &Args) -> Fallible<Used> {
        let mut command = Command::new(&self.program);
        command.arg("merge").arg("-m").arg(&self.model);
        command.arg("--lora").arg(&self.patch);
        command.arg("-o").arg(&self.merged);
        command.arg("--undo").arg(&self.undo);
        // Random logits say nothing of a merge; the gate is here for its memory.
        command.arg(if args.has("--gate") {
            "--keep-failed"
        } else {
            "--no-gate"
        });
        for flag in ["--threads", "--passes"] {
            if let Some(n) = args.value(flag) {
                command.args([flag, n]);
            }
        }
        if let Some(n) = args.value("--threads") {
            command.env("RAYON_NUM_THREADS", n);
        }
        // Exit code 5 is the gate's opinion of a random model, and no failure here.
        support::watch(command.stdout(Stdio::null()), &[0, 5])
    }

    fn check(&self) -> Fallible<()> {
        let run = |args: &[&str], files: &[&Path]| -> Fallible<Vec<u8>> {
            let mut command = Command::new(&self.program);
            let (first, rest) = args.split_first().expect("a subcommand");
            let done = command.arg(first).args(files).args(rest).output()?;
            if !done.status.success() {
                return Err(String::from_utf8_lossy(&done.stderr).into());
            }
            Ok(done.stdout)
        };
        run(&["inspect", "--json"], &[&self.merged])?;
        let diff = run(&["diff", "--json"], &[&self.model, &self.merged])?;
        let diff: serde_json::Value = serde_json::from_slice(&diff)?;
        let changed = diff["tensors"].as_array().ok_or("diff: no tensors")?;
        let changed_names: BTreeSet<&str> =
            changed.iter().filter_map(|t| t["name"].as_str()).collect();
        let patch = Patch::open(&self.patch)?;
        let adapted: BTreeSet<&str> = patch.updates.iter().map(|u| u.tensor.as_str()).collect();
        if changed_names != adapted {
            let odd: Vec<_> = adapted.symmetric_difference(&changed_names).collect();
            return Err(format!("adapted or changed, but not both: {odd:?}").into());
        }
        if changed.iter().any(|t| t["scale_bytes_changed"] != 0) {
            return Err("scales changed".into());
        }
        let [merged, undo, back] =
            [&self.merged, &self.undo, &self.back].map(|p| p.to_string_lossy().into_owned());
        run(
            &["revert", "-m", &merged, "--undo", &undo, "-o", &back],
            &[],
        )?;
        if of_file(&self.back)? != of_file(&self.model)? {
            return Err("revert(merge(x)) is not x".into());
        }
        Ok(())
    }
}
