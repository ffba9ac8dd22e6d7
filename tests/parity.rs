//! The rebuilt graph against llama.cpp's own decode, and its gradients against finite
//! differences.

#[path = "support/rig.rs"]
mod rig;
mod support;

use nepenthe::check::check;
use nepenthe::model::OpenModel;
use nepenthe::train::loss::RowObjective;
use rig::{Rig, gradients_match_finite_differences};
use std::path::Path;

fn logits_are_llamas(path: &Path, arch: &str, adaptable: usize) {
    let open = OpenModel::open(path, 0).expect("a good model");
    let c = check(&open, 1, None).expect("a traceable model");
    assert_eq!((c.arch.as_str(), c.adaptable), (arch, adaptable));
    assert_eq!(c.missing_rule, None);
    assert_eq!(c.n_tokens, 64);
    assert_eq!(c.argmax_agree, 1.0);
    // Bit-identical, which is stronger than the 1e-4 asked for.
    assert_eq!(c.max_abs_diff, 0.0, "{path:?}");
    let step = c.step.expect("trainable");
    assert!(step.memory_bytes > 0 && step.seconds > 0.0);
}

#[test]
fn the_embedded_models_logits_are_llamas() {
    logits_are_llamas(&support::mini(), "llama", 35);
}

#[test]
fn stories_logits_are_llamas() {
    if let Some(path) = support::stories() {
        logits_are_llamas(&path, "llama", 35);
    }
}

#[test]
fn smollm2_logits_are_llamas() {
    if let Some(path) = support::cached("SmolLM2-135M-Instruct.Q4_1.gguf") {
        logits_are_llamas(&path, "llama", 210);
    }
}

#[test]
fn gemma_logits_are_llamas() {
    if let Some(path) = support::cached("gemma-3-270m-q4_k_m.gguf") {
        logits_are_llamas(&path, "gemma3", 126);
    }
}

#[test]
fn gradients_of_the_embedded_model_match_finite_differences() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("f32.gguf");
    support::decoded(&support::mini(), &path);
    for objective in [RowObjective::CrossEntropy, RowObjective::InvertedHinge] {
        gradients_match_finite_differences(&mut Rig::new(&path, objective));
    }
}

#[test]
fn gradients_of_stories_match_finite_differences() {
    if let Some(path) = support::stories() {
        let mut rig = Rig::new(&path, RowObjective::CrossEntropy);
        gradients_match_finite_differences(&mut rig);
    }
}
