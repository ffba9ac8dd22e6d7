//! A C program on the header and the library alone.

use nepenthe::graph::weights::Weights;
use nepenthe::patch::{Info, Patch, Update, base_of};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where cargo put the libraries: beside the directory of this test.
fn libraries() -> PathBuf {
    let exe = std::env::current_exe().expect("a test binary");
    let deps = exe.parent().expect("a directory");
    deps.to_owned()
}

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A patch for `model` that changes what it says.
fn patch_for(model: &Path, path: &Path) {
    let weights = Weights::open(model).expect("a good model");
    let tensor = "blk.0.ffn_down.weight".to_owned();
    let ne = weights.info(&tensor).expect("a llama").ne;
    let (n_in, n_out) = (ne[0] as usize, ne[1] as usize);
    let update = Update {
        tensor,
        n_in,
        n_out,
        rank: 1,
        scale: 1.0,
        lora_a: vec![0.1; n_in],
        lora_b: (0..n_out).map(|i| (i % 7) as f32 - 3.0).collect(),
    };
    let base = base_of(&weights).expect("readable");
    let info = Info::new(base, "test", serde_json::Value::Null, 0);
    let patch = Patch::new(weights.arch().expect("a model"), info, vec![update]);
    patch.save(path, true).expect("room on the disk");
}

#[test]
fn all_ten_calls_work_from_c() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = dir.path().join("calls");
    let lib = libraries();
    let cc = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let out = Command::new(cc)
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(here().join("tests/calls.c"))
        .arg("-L")
        .arg(&lib)
        .args(["-lnepenthe_c", "-lm"])
        .output()
        .expect("a C compiler, which llama.cpp needs too");
    let complaint = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{complaint}");
    let model = here().join("../../models/nepenthe-mini.gguf");
    let patch = dir.path().join("patch.gguf");
    patch_for(&model, &patch);
    let out = Command::new(&program)
        .args([&model, &patch])
        .env("LD_LIBRARY_PATH", &lib)
        .output()
        .expect("it was compiled");
    let said = String::from_utf8_lossy(&out.stdout);
    let complaint = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}{complaint}");
    assert!(said.contains("all ten calls"), "{said}");
}

/// The header is generated; this is what notices that it was not generated again.
#[test]
fn the_header_declares_what_the_library_exports() {
    let source = std::fs::read_to_string(here().join("lib.rs")).expect("readable");
    let header = std::fs::read_to_string(here().join("nepenthe.h")).expect("readable");
    let names = |text: &str, before: &str| {
        let code: Vec<&str> = text
            .lines()
            .filter(|l| !l.trim().starts_with("//"))
            .collect();
        let code = code.join("\n");
        let name = |rest: &str| {
            let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_')?;
            rest[end..].starts_with('(').then(|| rest[..end].to_owned())
        };
        let mut found: Vec<String> = code.split(before).skip(1).filter_map(name).collect();
        found.sort();
        found
    };
    let exported = names(&source, "fn nepenthe_");
    assert_eq!(exported.len(), 10, "{exported:?}");
    assert_eq!(exported, names(&header, "nepenthe_"));
}
