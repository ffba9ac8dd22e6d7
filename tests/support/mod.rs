//! What several test files need: where models are, and a binary to run.
#![allow(dead_code, reason = "each test file uses its part")]

use nepenthe::ggml::dequantize;
use nepenthe::gguf::{GgmlType, Gguf, GgufWriter};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The embedded model.
pub fn mini() -> PathBuf {
    root().join("models/nepenthe-mini.gguf")
}

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// A demo data file.
pub fn demo(name: &str) -> PathBuf {
    root().join("models/demo").join(name)
}

/// A model of the cache, or the printed reason why the test is skipped.
pub fn cached(name: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("NEPENTHE_CACHE")
        .map(PathBuf::from)
        .or_else(|| {
            let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let base = base.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")));
            base.map(|b| b.join("nepenthe"))
        })?;
    present(dir.join(name), "models/fetch.sh gets it")
}

/// The 260 K-parameter model kept beside the repository.
pub fn stories() -> Option<PathBuf> {
    let dir = root().join("../shared/models/stories260k");
    let file = std::fs::read_dir(&dir).ok().and_then(|entries| {
        let paths = entries.filter_map(|e| Some(e.ok()?.path()));
        paths
            .into_iter()
            .find(|p| p.extension().is_some_and(|e| e == "gguf"))
    });
    present(file.unwrap_or(dir), "it is no part of this repository")
}

fn present(path: PathBuf, hint: &str) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path);
    }
    eprintln!("skipped: {} is not at hand ({hint})", path.display());
    None
}

/// Run the program with one thread where it takes threads.
pub fn nepenthe(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nepenthe"))
        .args(args)
        .output()
        .expect("the binary was built")
}

/// Run it, expect success, and parse its stdout.
pub fn json(args: &[&str]) -> serde_json::Value {
    let out = nepenthe(args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {stderr}");
    serde_json::from_slice(&out.stdout).expect("JSON on stdout")
}

/// Run it, expect this exit code, and give stderr: one line that starts with the program's name.
pub fn fails(code: i32, args: &[&str]) -> String {
    let out = nepenthe(args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {stderr}");
    let last = stderr.trim_end().lines().last().unwrap_or("").to_owned();
    assert!(
        last.starts_with("nepenthe: ") || code == 2,
        "{args:?}: {stderr}"
    );
    stderr
}

/// `from` with every tensor decoded to F32.
pub fn decoded(from: &Path, to: &Path) {
    let gguf = Gguf::open(from).expect("a good model");
    let mut meta = gguf.metadata().clone();
    meta.set("general.file_type", 0u32);
    let tensors: Vec<_> = gguf
        .tensors()
        .iter()
        .map(|t| {
            let mut values = vec![0f32; t.n_elements() as usize];
            let row = t.ne[0] as usize;
            let bytes = gguf.read_tensor(&t.name).expect("readable");
            for (b, v) in bytes
                .chunks(t.row_bytes() as usize)
                .zip(values.chunks_mut(row))
            {
                dequantize(t.ty.id(), b, v).expect("a known type");
            }
            (t, values)
        })
        .collect();
    let mut file = GgufWriter::new(to, meta);
    for (t, values) in &tensors {
        file.tensor_from_bytes(
            &t.name,
            t.dims(),
            GgmlType::F32,
            bytemuck::cast_slice(values),
        )
        .expect("a good tensor");
    }
    file.save(true).expect("room on the disk");
}
