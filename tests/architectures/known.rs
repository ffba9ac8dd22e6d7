//! Every architecture that the pinned llama.cpp knows is trained here, or refused for a reason: a
//! new one must be put in one list or the other.

use super::table;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

/// Architectures that are not trained, by reason.
pub const REFUSED: &[(&str, &[&str])] = &[
    (
        "it keeps recurrent state",
        &[
            "arwkv7",
            "bailingmoe3",
            "clef",
            "deepseek4",
            "falcon-h1",
            "glm5-next",
            "granitehybrid",
            "jamba",
            "kimi-k3",
            "kimi-linear",
            "lfm2",
            "lfm2moe",
            "mamba",
            "mamba2",
            "minimax-01",
            "nemotron_h",
            "nemotron_h_moe",
            "plamo2",
            "qwen35",
            "qwen35moe",
            "qwen3next",
            "qwen4exp",
            "rwkv6",
            "rwkv6qwen2",
            "rwkv7",
        ],
    ),
    (
        "it encodes text instead of continuing it",
        &[
            "bert",
            "eurobert",
            "gemma-embedding",
            "jina-bert-v2",
            "jina-bert-v3",
            "llama-embed",
            "modern-bert",
            "neo-bert",
            "nomic-bert",
            "nomic-bert-moe",
            "t5",
            "t5encoder",
        ],
    ),
    (
        "it fills in masked tokens instead of continuing text",
        &["dream", "llada", "llada-moe", "rnd1"],
    ),
    (
        "it chooses which tokens to attend to, from a cache of its own",
        &["deepseek32", "dots3note", "glm-dsa", "hy_v4", "minimax-m3"],
    ),
    (
        "it drafts for another model",
        &["dflash", "eagle3", "gemma4-assistant"],
    ),
    (
        "it makes or reads sound or pictures",
        &[
            "chameleon",
            "clip",
            "pockettts",
            "qwen3tts",
            "wavtokenizer-dec",
        ],
    ),
    ("it switches adapters of its own", &["graniteswitch"]),
    ("llama.cpp knows its name but has no graph of it", &["gptj"]),
];

fn cargo(args: &[&str]) -> Vec<u8> {
    let out = Command::new(env!("CARGO"))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    out.stdout
}

/// The architectures in the source of the llama.cpp that this build is linked with.
fn known() -> BTreeSet<String> {
    // Packages of other platforms may not be on this machine.
    let version = cargo(&["-vV"]);
    let version = String::from_utf8_lossy(&version);
    let mut lines = version.lines();
    let host = lines
        .find_map(|l| l.strip_prefix("host: "))
        .expect("a host");
    let format = ["metadata", "--format-version", "1", "--locked", "--offline"];
    let stdout = cargo(&[&format[..], &["--filter-platform", host]].concat());
    let metadata: serde_json::Value = serde_json::from_slice(&stdout).expect("JSON");
    let mut packages = metadata["packages"].as_array().expect("a list").iter();
    let engine = packages
        .find(|p| p["name"] == "llama-cpp-sys-2")
        .expect("the engine is a dependency");
    let manifest = PathBuf::from(engine["manifest_path"].as_str().expect("a path"));
    let source = manifest.with_file_name("llama.cpp/src/llama-arch.cpp");
    let source = std::fs::read_to_string(source).expect("the engine's source");
    let name = |line: &str| {
        let entry = line.trim().strip_prefix("{ LLM_ARCH_")?;
        let name = entry.split('"').nth(1)?;
        (name != "(unknown)").then(|| name.to_owned())
    };
    source.lines().filter_map(name).collect()
}

#[test]
fn every_architecture_of_llama_cpp_is_trained_or_refused_for_a_reason() {
    let known = known();
    assert!(known.len() > 100, "the source has its list: {known:?}");
    let trained: BTreeSet<String> = table::ALL.iter().map(|a| a.name.to_owned()).collect();
    let refused = REFUSED.iter().flat_map(|(_, names)| *names);
    let refused: BTreeSet<String> = refused.map(|n| (*n).to_owned()).collect();
    let both: Vec<_> = trained.intersection(&refused).collect();
    assert!(both.is_empty(), "trained and refused: {both:?}");
    let listed: BTreeSet<String> = trained.union(&refused).cloned().collect();
    let new: Vec<_> = known.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&known).collect();
    assert!(
        new.is_empty() && gone.is_empty(),
        "new in llama.cpp: {new:?}; no longer there: {gone:?}"
    );
}
