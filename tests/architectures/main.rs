//! Every architecture that can be trained, as a model of random weights in a few layers: logits
//! and adapters to the bit of llama.cpp's own, gradients against finite differences, and a step of
//! ReGLU that lowers its loss, on f32 and on K-quantised weights.
#![allow(
    unsafe_code,
    reason = "llama.cpp's C API says which tensors an architecture has"
)]

mod deep;
mod experts;
mod gpu;
mod known;
mod loops;
mod model;
#[path = "../support/rig.rs"]
mod rig;
#[path = "../support/mod.rs"]
mod support;
mod table;

use model::{Form, write};
use nepenthe::data::{GENERAL_TEXT, Sample};
use nepenthe::graph::reverse::first_without_rule;
use nepenthe::graph::trace::trace;
use nepenthe::model::OpenModel;
use nepenthe::start::{start, subspace_config, subspaces};
use nepenthe::train::config::UnlearnConfig;
use nepenthe::train::engine::Engine;
use nepenthe::train::loss::RowObjective;
use nepenthe::train::trainer::{Forget, StepBatch, StepReport, Trainer};
use rig::{Rig, gradients_do_not_depend_on_what_is_kept, gradients_match_finite_differences};
use table::{Arch, for_each_architecture};

fn trains(arch: &Arch, form: Form) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    let written = write(arch, form, &support::mini(), &path);
    let said = nepenthe::ggml::last_messages();
    assert!(
        written,
        "{}: llama.cpp makes no such model: {said:?}",
        arch.name
    );
    let mut rig = Rig::new(&path, RowObjective::CrossEntropy);
    let (plain, theirs) = rig.logits(false);
    same(&plain, &theirs, "logits");
    let (adapted, theirs) = rig.logits(true);
    same(&adapted, &theirs, "adapted logits");
    assert!(adapted != plain, "the adapter does something");
    if form == Form::Exact {
        gradients_match_finite_differences(&mut rig);
        gradients_do_not_depend_on_what_is_kept(&mut rig);
    }
    // With experts a longer step: which of them are chosen changes in jumps, and so does the loss.
    a_step_lowers_the_loss(&rig.open, if arch.experts { 5e-4 } else { 1e-4 });
}

/// Equal to the bit, and numbers.
fn same(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    assert!(ours.iter().all(|v| v.is_finite()), "{what}: not finite");
    let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    let differ = ours
        .iter()
        .zip(theirs)
        .filter(|(a, b)| a.to_bits() != b.to_bits());
    let (n, worst) = (differ.count(), worst.fold(0.0, f32::max));
    assert_eq!(
        n,
        0,
        "{what}: {n} of {} differ, by {worst} at most",
        ours.len()
    );
}

/// Forget and retain loss together, before and after one step from RILA's start with the hard
/// constraint.
fn a_step_lowers_the_loss(open: &OpenModel, lr: f32) {
    let tokens = open.model.tokenize(GENERAL_TEXT, true, false);
    let samples: Vec<Sample> = tokens
        .chunks_exact(16)
        .take(12)
        .map(|t| Sample {
            tokens: t.to_vec(),
            answers: std::iter::once(6..t.len()).collect(),
            truncated: false,
        })
        .collect();
    let (forget, retain) = samples.split_at(6);
    let mut config = UnlearnConfig::default();
    (config.subspace.rank, config.subspace.retain_rank) = (4, 4);
    config.train.alpha = 4.0;
    let engine = Engine::new(open, 1, 256).expect("traceable");
    let (adaptable, sub) = (engine.template.adaptable.clone(), subspace_config(&config));
    let found = subspaces(
        open,
        &adaptable,
        (forget, retain),
        None,
        &sub,
        1,
        None,
        &mut |_, _| {},
    );
    let pairs = start(open, &adaptable, found.expect("subspaces"), &config).expect("pairs");
    let mut trainer = Trainer::new(engine, pairs).expect("room");
    let batch = StepBatch {
        forget: forget
            .iter()
            .map(|sample| Forget {
                sample,
                preferred: None,
                reference: 0.0,
            })
            .collect(),
        retain: retain.iter().collect(),
        forget_share: 1.0,
    };
    let mut loss = |lr: f32| {
        let StepReport { forget, retain, .. } =
            trainer.step(&config.train, &batch, lr).expect("computable");
        forget.expect("given") + retain.expect("given")
    };
    let (before, after) = (loss(lr), loss(0.0));
    assert!(after < before, "a step: {before} to {after}");
}

macro_rules! tests {
    ($id:ident) => {
        mod $id {
            use super::{Form, table, trains};

            #[test]
            fn f32() {
                trains(&table::$id, Form::Exact);
            }

            #[test]
            fn quantised() {
                trains(&table::$id, Form::Quantised);
            }
        }
    };
}

for_each_architecture!(tests);

/// Rows of `src/architectures.md` for those with experts or those without: the weights that each
/// takes adapters on. What is expected of each is checked on the way.
fn rows(with_experts: bool) -> String {
    let mut rows = String::from("| architecture | weights that take adapters |\n|---|---|\n");
    let mut names: Vec<&str> = Vec::new();
    for arch in table::ALL.iter().filter(|a| a.experts == with_experts) {
        if names.contains(&arch.name) {
            continue;
        }
        names.push(arch.name);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("model.gguf");
        assert!(
            write(arch, Form::Exact, &support::mini(), &path),
            "{}",
            arch.name
        );
        let open = OpenModel::open(&path, 0).expect("a good model");
        let template = trace(&open.model, &open.weights).expect(arch.name);
        assert_eq!(first_without_rule(&template), None, "{}", arch.name);
        assert_eq!(
            template.experts().is_empty(),
            !with_experts,
            "{}",
            arch.name
        );
        let kinds = template.adaptable_kinds();
        let frozen = |k: &String| k.contains("exps") || k.contains("gate_inp");
        assert!(!kinds.iter().any(frozen), "{}: {kinds:?}", arch.name);
        rows += &format!("| {} | {} |\n", arch.name, kinds.join(", "));
    }
    rows
}

/// `src/architectures.md`, which `nepenthe check --help` prints. An architecture that an update of
/// llama.cpp loses or changes fails here; `NEPENTHE_UPDATE=1` writes the table anew.
#[test]
fn the_table_lists_what_the_models_give() {
    let (dense, experts) = (rows(false), rows(true));
    let mut refused = String::from("| architecture | why it is not trained |\n|---|---|\n");
    for (why, names) in known::REFUSED {
        for name in *names {
            refused += &format!("| {name} | {why} |\n");
        }
    }
    let table = format!(
        "Dense:\n\n{dense}\nMixtures of experts (the experts and the matrices that choose among \
         them stay as they are):\n\n{experts}\nNot trained:\n\n{refused}"
    );
    let path = support::root().join("src/architectures.md");
    if std::env::var_os("NEPENTHE_UPDATE").is_some() {
        std::fs::write(&path, &table).expect("written");
    }
    let listed = std::fs::read_to_string(&path).expect("the table");
    assert_eq!(table, listed, "NEPENTHE_UPDATE=1 writes it anew");
}
