//! Names the engine in every patch: the versions of llama.cpp's bindings that Cargo.lock pins.

use std::{env, fs, path::Path};

fn main() {
    let manifest = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let lock = Path::new(&manifest).join("Cargo.lock");
    println!("cargo:rerun-if-changed={}", lock.display());
    // Built as a dependency there is no lock file of ours: the manifest's pin is then all we know.
    let text = fs::read_to_string(&lock).unwrap_or_default();
    let version = |name: &str| {
        let mut lines = text.lines();
        lines.find(|l| *l == format!("name = \"{name}\""))?;
        let version = lines.next()?.strip_prefix("version = \"")?;
        Some(format!("{name} {}", version.trim_end_matches('"')))
    };
    let engine: Vec<String> = ["llama-cpp-2", "llama-cpp-sys-2"]
        .into_iter()
        .filter_map(version)
        .collect();
    println!("cargo:rustc-env=NEPENTHE_ENGINE={}", engine.join(", "));
}
