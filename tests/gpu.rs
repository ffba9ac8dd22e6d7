//! The built-in model on a GPU: gradients of all of it, of its last blocks and of none, and the main
//! job with the program. Skips without a GPU; `.ci/check-vulkan` runs it on Mesa's software driver.

#[path = "support/rig.rs"]
mod rig;
mod support;

use nepenthe::ggml::{Offload, gpu_name};
use nepenthe::patch::Patch;

use nepenthe::train::loss::RowObjective;
use rig::{Rig, distance};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

fn skipped() -> bool {
    let name = gpu_name();
    match &name {
        Some(name) => println!("{name}"),
        None => println!("skipped: no GPU, or a build without a backend for it"),
    }
    name.is_none()
}

#[test]
fn gradients_are_those_of_the_cpu_whatever_part_is_on_the_gpu() {
    if skipped() {
        return;
    }
    let mut rig = Rig::new(&support::mini(), RowObjective::CrossEntropy);
    let wanted = rig.gradients();
    for n in [-1, 4, 2, 1] {
        rig.compute_on_gpu(Offload::layers(n, 5));
        let apart = distance(&rig.gradients(), &wanted);
        println!("{n} layers: {apart:.2e}");
        assert!(apart < 5e-2, "{n} layers: {apart}");
    }
}

fn unlearn(dir: &Path, n_gpu_layers: &str) -> (Value, Patch) {
    let few = |name: &str| {
        let text = fs::read_to_string(support::demo(name)).expect("a demo file");
        let lines: Vec<&str> = text.lines().take(2).collect();
        let path = dir.join(name);
        fs::write(&path, lines.join("\n")).expect("room on the disk");
        path
    };
    let patch = dir.join(format!("{n_gpu_layers}.gguf"));
    let run = Command::new(env!("CARGO_BIN_EXE_nepenthe"))
        .args(["unlearn", "--json", "-t", "1", "--steps", "2", "-m"])
        .arg(support::mini())
        .arg("--forget")
        .arg(few("forget.jsonl"))
        .arg("--retain")
        .arg(few("retain.jsonl"))
        .arg("-o")
        .arg(&patch)
        .args(["--n-gpu-layers", n_gpu_layers])
        .output()
        .expect("the program runs");
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{said}");
    let report = serde_json::from_slice(&run.stdout).expect("JSON");
    (report, Patch::open(&patch).expect("a patch"))
}

/// Two steps of the main job: what was captured, trained and measured, there and here.
#[test]
fn a_patch_made_on_a_gpu_is_that_of_the_cpu() {
    if skipped() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (wanted, patch) = unlearn(dir.path(), "0");
    for n in ["all", "2"] {
        let (found, on_gpu) = unlearn(dir.path(), n);
        for path in ["/before/forget", "/after/forget", "/after/retain"] {
            let prob = |v: &Value| {
                v.pointer(path).expect("given")["prob"]
                    .as_f64()
                    .expect("a number")
            };
            let (f, w) = (prob(&found), prob(&wanted));
            println!("{n}: {path} {f} {w}");
            assert!((f - w).abs() < 2e-3, "{n}: {path}: {f} {w}");
        }
        let norm = |v: &Value| v["relative_norm"].as_f64().expect("a number");
        let ratio = norm(&found) / norm(&wanted);
        assert!((ratio - 1.0).abs() < 0.02, "{n}: {ratio}");
        assert_eq!(on_gpu.updates.len(), patch.updates.len());
    }
}
