//! What several test files need: where models are, and a binary to run.
#![allow(dead_code, reason = "each test file uses its part")]

use nepenthe::adapter::open_adapters;
use nepenthe::ggml::dequantize;
use nepenthe::gguf::{GgmlType, Gguf, GgufWriter};
use nepenthe::graph::weights::Weights;
use nepenthe::model::OpenModel;
use nepenthe::patch::{Info, Patch, TensorInfo, Update, base_of, digest_of};
use nepenthe::proof::choose;
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

/// A small patch for `model` that changes what it says, different for every `seed`.
pub fn small_patch(model: &Path, dir: &Path, name: &str, seed: u64) -> PathBuf {
    let weights = Weights::open(model).expect("a good model");
    let base = base_of(&weights).expect("readable");
    let mut info = Info::new(base, "test", serde_json::Value::Null, seed);
    let mut state = seed;
    let mut random = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut updates = Vec::new();
    for tensor in ["blk.0.ffn_down.weight", "blk.1.attn_output.weight"] {
        let ne = weights.info(tensor).expect("a llama").ne;
        let (n_in, n_out, rank) = (ne[0] as usize, ne[1] as usize, 2);
        let mut values = |n: usize| (0..n).map(|_| 0.15 * random()).collect::<Vec<f32>>();
        info.tensors.push(TensorInfo {
            name: tensor.to_owned(),
            digest: digest_of(&weights, tensor).expect("there"),
            rank: rank as u32,
            retain_rank: 0,
            norm: 0.0,
            relative_norm: 0.0,
            retain_fraction: 0.0,
        });
        updates.push(Update {
            tensor: tensor.to_owned(),
            n_in,
            n_out,
            rank,
            scale: 1.0,
            lora_a: values(n_in * rank),
            lora_b: values(rank * n_out),
        });
    }
    let path = dir.join(name);
    let arch = weights.arch().expect("a model");
    Patch::new(arch, info, updates)
        .save(&path, true)
        .expect("room on the disk");
    path
}

/// The patch at `path` with canaries for what it does to the embedded model.
pub fn with_canaries(path: &Path) -> PathBuf {
    let open = OpenModel::open(&mini(), 0).expect("the embedded model");
    let adapters = open_adapters(&open, [(path, 1.0)]).expect("a good patch");
    let mut patch = Patch::open(path).expect("a good patch");
    let canaries = choose(&open.model, &adapters, 1).expect("they can be run");
    assert_eq!(canaries.len(), 4);
    patch.info.as_mut().expect("provenance").canaries = canaries;
    let out = path.with_extension("proven.gguf");
    patch.save(&out, true).expect("room");
    out
}
