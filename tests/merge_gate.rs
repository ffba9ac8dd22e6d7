//! The acceptance gate on the embedded model, and what llama.cpp takes in a LoRA file.

mod support;

use nepenthe::adapter::{Loaded, open_adapters};
use nepenthe::data::{Sample, build_samples, load_records};
use nepenthe::ggml::Adapter;
use nepenthe::gguf::{GgmlType, Gguf, GgufWriter};
use nepenthe::merge::compare::{Comparison, Side};
use nepenthe::merge::gate::{GateConfig, GateError, Verdict, gate};
use nepenthe::merge::moments::Sources;
use nepenthe::model::OpenModel;
use nepenthe::patch::{Patch, Update};
use std::path::Path;

fn samples(open: &OpenModel, file: &str, n: usize) -> Vec<Sample> {
    let mut records = load_records(&support::demo(file)).expect("demo data");
    records.truncate(n);
    let template = open.template().expect("a good template");
    let set = build_samples(&records, &open.model, &template, 512);
    set.expect("demo data tokenise").samples
}

/// A patch of a few steps, by the program itself.
fn patch(dir: &Path) -> std::path::PathBuf {
    let out = dir.join("patch.gguf");
    let args = [
        "unlearn",
        "-m",
        &support::mini().to_string_lossy(),
        "--forget",
        &support::demo("forget.jsonl").to_string_lossy(),
        "--retain",
        &support::demo("retain.jsonl").to_string_lossy(),
        "-o",
        &out.to_string_lossy(),
        "--steps",
        "30",
        "--lr",
        "3e-3",
        "-t",
        "1",
        "--quiet",
    ]
    .map(str::to_owned);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = support::nepenthe(&args);
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{stderr}");
    out
}

fn judged(
    open: &OpenModel,
    adapters: &Loaded,
    merged: (&OpenModel, &Loaded),
    sources: &Sources<'_>,
) -> Verdict {
    let config = GateConfig {
        max_samples: 10,
        ..GateConfig::default()
    };
    let unmerged = || Ok((open.model.clone(), adapters.clone()));
    let merged = || Ok((merged.0.model.clone(), merged.1.clone()));
    let gate = |apart| {
        let sides: (Side<'_>, Side<'_>) = (&unmerged, &merged);
        gate(sides, apart, sources, &config, 1, &mut |_, _| {}).expect("measured")
    };
    let together = gate(false);
    assert_eq!(together, gate(true), "one at a time makes no difference");
    together
}

#[test]
fn a_model_is_no_distance_from_itself() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let none = Loaded::new();
    for file in ["forget.jsonl", "general.jsonl"] {
        let samples = samples(&open, file, 5);
        let side = || Ok((open.model.clone(), none.clone()));
        let mut comparison = Comparison::new(&side, &side, false, 1);
        let same = comparison.of(&samples, &mut |_| {}).expect("compared");
        assert_eq!((same.kl, same.samples), (0.0, samples.len()));
        assert_eq!(same.prob_merged, same.prob_unmerged);
        assert_eq!(
            same.tokens,
            samples.iter().map(Sample::n_answer_tokens).sum::<usize>()
        );
    }
}

#[test]
fn the_gate_passes_the_patched_model_and_fails_the_untouched_base() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let again = OpenModel::open(&support::mini(), 0).expect("a good model");
    let dir = tempfile::tempdir().expect("a directory");
    let path = patch(dir.path());
    let adapters = open_adapters(&open, [(path.as_path(), 1.0)]).expect("loaded");
    let residues = open_adapters(&again, [(path.as_path(), 1.0)]).expect("loaded");
    let sets = ["forget.jsonl", "retain.jsonl", "general.jsonl"].map(|f| samples(&open, f, 10));
    let sources = Sources {
        forget: &sets[0],
        retain: &sets[1],
        general: &sets[2],
    };
    let kept = judged(&open, &adapters, (&again, &residues), &sources);
    assert!(kept.passed(), "{:?}", kept.failures);
    assert_eq!(
        (kept.kept_effect, kept.retain_ratio),
        (Some(1.0), Some(1.0))
    );
    assert_eq!(kept.forget.as_ref().map(|f| f.kl), Some(0.0));

    let base = judged(&open, &adapters, (&again, &Loaded::new()), &sources);
    let forget = base.forget.as_ref().expect("measured");
    let effect = base.forget_prob_base.expect("measured") - forget.prob_unmerged;
    assert!(effect > 0.1, "the patch forgets nothing: {effect}");
    assert!(base.kept_effect.expect("an effect").abs() < 1e-9);
    assert!(forget.kl > 0.0);
    let failed = base.accepted().expect_err("nothing was merged");
    assert!(matches!(&failed, GateError::Failed { failures } if !failures.is_empty()));
    assert_eq!(nepenthe::Error::from(failed).exit_code(), 5);

    let general = Sources {
        general: &sets[2],
        ..Sources::default()
    };
    let partial = judged(&open, &adapters, (&again, &residues), &general);
    assert!(partial.passed() && partial.forget.is_none() && partial.kept_effect.is_none());
}

#[test]
fn llama_refuses_moments_inside_a_patch() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let dir = tempfile::tempdir().expect("a directory");
    let tensor = "blk.0.attn_q.weight";
    let ne = open.weights.info(tensor).expect("a tensor").ne;
    let (n_in, n_out) = (ne[0] as usize, ne[1] as usize);
    let path = dir.path().join("patch.gguf");
    let patch = Patch {
        arch: open.weights.arch().expect("known").to_owned(),
        info: None,
        updates: vec![Update {
            tensor: tensor.into(),
            n_in,
            n_out,
            rank: 1,
            scale: 1.0,
            lora_a: vec![0.01; n_in],
            lora_b: vec![0.01; n_out],
        }],
        path: path.clone(),
    };
    patch.save(&path, false).expect("saved");
    let gguf = Gguf::open(&path).expect("a good patch");
    let with = dir.path().join("with.gguf");
    let mut file = GgufWriter::new(&with, gguf.metadata().clone());
    for t in gguf.tensors() {
        file.copy_tensor(&gguf, &t.name).expect("copied");
    }
    let basis = format!("{tensor}.basis");
    file.tensor_from_bytes(&basis, &[1], GgmlType::F32, &[0; 4])
        .expect("added");
    file.save(false).expect("saved");
    assert!(Adapter::load(&open.model, &path).is_ok());
    let refused = Adapter::load(&open.model, &with)
        .err()
        .expect("unknown tensors");
    // Its reason ("unexpected suffix") is in the log; the test is that it refuses at all.
    assert!(refused.to_string().contains("with.gguf"), "{refused}");
}
