//! Experts stay as they are: how the gradient gets past them, and what `check` says of them.

use super::model::{Form, write};
use super::{rig, rig::Rig, support, table};
use nepenthe::data::Sample;
use nepenthe::graph::copies::Copies;
use nepenthe::graph::trained::Trained;
use nepenthe::model::OpenModel;
use nepenthe::train::engine::{Engine, Item};
use nepenthe::train::loss::RowObjective;
use std::process::Command;

/// With transposed copies of all experts, or decoding them on the way: one sum in another order.
#[test]
fn copies_and_decoding_give_the_same_gradients() {
    for form in [Form::Exact, Form::Quantised] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("model.gguf");
        assert!(write(&table::qwen2moe, form, &support::mini(), &path));
        let mut rig = Rig::new(&path, RowObjective::CrossEntropy);
        let copied = rig.gradients();
        rig.copies = Some(Copies::default());
        let decoded = rig.gradients();
        for (a, b) in copied.iter().zip(&decoded) {
            let size = a.iter().fold(0f32, |m, v| m.max(v.abs()));
            let differ = a.iter().zip(b).map(|(a, b)| (a - b).abs());
            let worst = differ.fold(0f32, f32::max);
            assert!(size > 0.0 && worst <= 1e-4 * size, "{worst} of {size}");
        }
    }
}

/// As training has them, in BF16: to the bit.
#[test]
fn copies_do_not_change_a_bit() {
    for arch in [&table::qwen2moe, &table::llama] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("model.gguf");
        assert!(write(arch, Form::Quantised, &support::mini(), &path));
        let mut rig = Rig::new(&path, RowObjective::CrossEntropy);
        rig::gradients_do_not_depend_on_copies(&mut rig);
    }
}

/// From 8,192 positions on llama4 scales attention, which the recording has not seen.
#[test]
fn llama4_is_not_trained_past_where_it_scales_attention() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    assert!(write(&table::llama4, Form::Exact, &support::mini(), &path));
    let open = OpenModel::open(&path, 0).expect("a good model");
    let mut engine = Engine::new(&open, 1, 256).expect("traceable");
    let mut losses = |n: usize| {
        let sample = Sample {
            tokens: vec![5; n],
            answers: std::iter::once(n - 2..n).collect(),
            truncated: false,
        };
        engine.losses(Trained::Nothing, &[Item::remembered(&sample, 1.0)])
    };
    losses(64).expect("short");
    let error = losses(8193).expect_err("long").to_string();
    let wanted = "max-tokens: wanted at most 8191, as the model scales attention from there on";
    assert!(error.starts_with(wanted), "{error}");
}

#[test]
fn check_says_that_they_are_frozen() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    assert!(write(
        &table::qwen2moe,
        Form::Exact,
        &support::mini(),
        &path
    ));
    let out = Command::new(env!("CARGO_BIN_EXE_nepenthe"))
        .args(["check", "--threads", "1", "-m"])
        .arg(&path)
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}");
    let kinds = "attn_k, attn_output, attn_q, attn_v, ffn_down_shexp, ffn_gate_shexp, ffn_up_shexp";
    for line in [
        &format!("adaptable        21 tensors: {kinds}"),
        "experts          2 of 4 for each token, in 9 stacks (0 MiB): frozen, with the matrices that \
         choose them",
        "training step    257 tokens",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}
