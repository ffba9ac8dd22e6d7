//! Adapters on some layers alone: what lies below is computed once, and nothing else changes.

mod support;

use nepenthe::data::{GENERAL_TEXT, Sample};
use nepenthe::graph::trained::{Factor, Trained};
use nepenthe::model::OpenModel;
use nepenthe::patch::Patch;
use nepenthe::rng::SplitMix64;
use nepenthe::train::engine::{Engine, Item};
use nepenthe::train::layers::Layers;
use std::path::Path;
use std::process::{Command, Output};

const RANK: usize = 3;

fn samples(open: &OpenModel) -> Vec<Sample> {
    let tokens = open.model.tokenize(GENERAL_TEXT, true, false);
    [(0, 24), (40, 57), (80, 99), (120, 131)]
        .iter()
        .map(|&(from, to)| Sample {
            tokens: tokens[from..to].to_vec(),
            answers: std::iter::once(5..to - from).collect(),
            truncated: false,
        })
        .collect()
}

/// Losses and gradients of passes over `batches`, with the same random factors.
fn passes(engine: &mut Engine<'_>, batches: &[&[&Sample]]) -> Vec<(Vec<f64>, Vec<Vec<f32>>)> {
    let adaptable = engine.template.adaptable.clone();
    let factor = |tensor| Factor {
        tensor,
        rank: RANK,
        scale: 0.7,
        trainable: true,
    };
    let list = (0..adaptable.len()).map(factor).collect();
    let mut factors = engine.factors(list).expect("room");
    let mut rng = SplitMix64(5);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| 0.08 * rng.normal()).collect() };
    for (i, t) in adaptable.iter().enumerate() {
        let (a, b) = (random(RANK * t.n_in), random(RANK * t.n_out));
        factors.write(i, &a, &b).expect("its shape");
    }
    let pass = |batch: &&[&Sample]| {
        let sizes = adaptable.iter().flat_map(|t| [t.n_in, t.n_out]);
        let mut grads: Vec<Vec<f32>> = sizes.map(|n| vec![0.0; RANK * n]).collect();
        let items: Vec<Item<'_>> = batch.iter().map(|s| Item::remembered(s, 0.5)).collect();
        let losses = engine.gradients(Trained::Factors(&factors), &items, None, &mut grads);
        let losses = losses.expect("computable");
        (losses.iter().map(|l| l.per_token()).collect(), grads)
    };
    batches.iter().map(pass).collect()
}

#[test]
fn what_is_kept_changes_no_bit() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let layers: Layers = "3,4".parse().expect("layers");
    let engine = |on: bool| {
        let engine = Engine::new(&open, 1, 256).expect("traceable");
        let engine = engine.on_layers(Some(&layers)).expect("its layers");
        if on { engine } else { engine.without_prefix() }
    };
    let data = samples(&open);
    let [a, b, c, d] = [&data[0], &data[1], &data[2], &data[3]];
    // The third batch has samples that are known and one that is not, the last all of them in
    // another order.
    let batches: [&[&Sample]; 4] = [&[a, b], &[a, b], &[b, c, a], &[d, c, b]];
    let (mut kept, mut whole) = (engine(true), engine(false));
    assert!(
        kept.template
            .adaptable
            .iter()
            .all(|t| t.name.starts_with("blk.3.") || t.name.starts_with("blk.4."))
    );
    let (found, wanted) = (passes(&mut kept, &batches), passes(&mut whole, &batches));
    for (i, (f, w)) in found.iter().zip(&wanted).enumerate() {
        assert!(w.1.iter().flatten().any(|g| *g != 0.0));
        assert!(f == w, "batch {i}: {:?} {:?}", f.0, w.0);
    }
    let tokens: usize = data.iter().map(|s| s.tokens.len() - 1).sum();
    let (n, bytes) = kept.kept_below();
    let n_embd = open.model.n_embd();
    // The residual stream and the token ids it belongs to, nothing else.
    assert_eq!((n, bytes), (4, (4 * tokens * (n_embd + 1)) as u64));
    assert_eq!(whole.kept_below(), (0, 0));
}

fn unlearn(out: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nepenthe"))
        .args([
            "unlearn",
            "-t",
            "1",
            "--steps",
            "3",
            "--no-sketch",
            "-q",
            "-m",
        ])
        .arg(support::mini())
        .arg("--forget")
        .arg(support::demo("forget.jsonl"))
        .arg("--retain")
        .arg(support::demo("retain.jsonl"))
        .arg("-o")
        .arg(out)
        .args(more)
        .output()
        .expect("the program runs")
}

#[test]
fn a_patch_of_some_layers_holds_those_and_others_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("patch.gguf");
    let run = unlearn(&path, &["--layers", "2,4"]);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{said}");
    let patch = Patch::open(&path).expect("a patch");
    let of_layers = |n: &str| n.starts_with("blk.2.") || n.starts_with("blk.4.");
    assert!(patch.updates.iter().all(|u| of_layers(&u.tensor)));
    assert_eq!(patch.updates.len(), 14);

    let other = dir.path().join("other.gguf");
    let run = unlearn(&other, &["--layers", "3-5"]);
    let said = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(2), "{said}");
    assert!(
        said.contains("layers from 0 to 4") && said.contains("3-5"),
        "{said}"
    );
    assert!(!other.exists());
}
