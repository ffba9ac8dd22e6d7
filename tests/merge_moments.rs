//! Second moments for the merge against naive accumulation from llama.cpp's own activations.

mod support;

use nepenthe::adapter::{Loaded, open_adapters};
use nepenthe::data::{Sample, build_samples, load_records};
use nepenthe::ggml::{Batch, Context, ContextOptions, Hook, NodeView, sys};
use nepenthe::graph::trace::trace;
use nepenthe::merge::moments::{
    Captured, MomentsConfig, MomentsError, Part, Set, Sources, capture,
};
use nepenthe::model::OpenModel;
use nepenthe::patch::{Patch, Update};
use nepenthe::rng::SplitMix64;
use std::path::Path;
use std::sync::{Arc, Mutex};

fn samples(open: &OpenModel, file: &str, n: usize) -> Vec<Sample> {
    let mut records = load_records(&support::demo(file)).expect("demo data");
    records.truncate(n);
    let template = open.template().expect("a good template");
    let set = build_samples(&records, &open.model, &template, 512);
    set.expect("demo data tokenise").samples
}

fn adaptable(open: &OpenModel) -> Vec<String> {
    let template = trace(&open.model, &open.weights).expect("traceable");
    template.adaptable.into_iter().map(|t| t.name).collect()
}

fn captured(open: &OpenModel, adapters: &Loaded, sources: &Sources<'_>) -> Captured {
    let config = MomentsConfig::default();
    let tensors = adaptable(open);
    capture(
        open,
        adapters,
        &tensors,
        sources,
        &config,
        1,
        &mut |_, _| {},
    )
    .expect("captured")
}

/// A random rank-2 adapter on every tensor, strong enough to be seen.
fn random_adapter(open: &OpenModel, dir: &Path) -> Loaded {
    let mut rng = SplitMix64(7);
    let mut updates = Vec::new();
    for tensor in adaptable(open) {
        let ne = open.weights.info(&tensor).expect("a tensor").ne;
        let (n_in, n_out) = (ne[0] as usize, ne[1] as usize);
        let mut draw = |n: usize| (0..n).map(|_| 0.05 * rng.normal()).collect();
        updates.push(Update {
            lora_a: draw(2 * n_in),
            lora_b: draw(2 * n_out),
            rank: 2,
            scale: 1.0,
            tensor,
            n_in,
            n_out,
        });
    }
    let path = dir.join("random.gguf");
    let patch = Patch {
        arch: open.weights.arch().expect("known").to_owned(),
        info: None,
        updates,
        path: path.clone(),
    };
    patch.save(&path, false).expect("saved");
    open_adapters(open, [(path.as_path(), 1.0)]).expect("loaded")
}

/// Reads one weight's input at every decode.
struct Tap {
    tensor: String,
    rows: Arc<Mutex<Vec<f32>>>,
}

impl Hook for Tap {
    fn want(&mut self, node: &NodeView<'_>) -> bool {
        node.op() == sys::GGML_OP_MUL_MAT && node.src_name(0).as_ref() == Some(&self.tensor)
    }

    fn seen(&mut self, node: &NodeView<'_>) -> bool {
        let mut rows = self.rows.lock().expect("one thread");
        node.read_src(1, &mut rows).expect("an input");
        true
    }
}

/// Σ x·xᵀ / n in f64, every sample decoded alone; the first and the last token do not count.
fn naive(open: &OpenModel, adapters: &Loaded, tensor: &str, samples: &[Sample]) -> Vec<f64> {
    let rows = Arc::new(Mutex::new(Vec::new()));
    let tap = Tap {
        tensor: tensor.to_owned(),
        rows: rows.clone(),
    };
    let options = ContextOptions {
        hook: Some(Box::new(tap)),
        ..ContextOptions::default()
    };
    let mut context = Context::new(&open.model, options).expect("a context");
    context.set_adapters(adapters).expect("applied");
    let n_in = open.weights.info(tensor).expect("a tensor").ne[0] as usize;
    let (mut h, mut n) = (vec![0f64; n_in * n_in], 0.0);
    for s in samples {
        let mut batch = Batch::default();
        for (pos, &token) in s.tokens[..s.tokens.len() - 1].iter().enumerate() {
            batch.push(token, pos as i32, 0, true);
        }
        context.clear();
        context.decode(&mut batch).expect("decoded");
        for x in rows.lock().expect("idle").chunks_exact(n_in).skip(1) {
            for (row, &a) in h.chunks_exact_mut(n_in).zip(x) {
                for (h, &b) in row.iter_mut().zip(x) {
                    *h += f64::from(a) * f64::from(b);
                }
            }
            n += 1.0;
        }
    }
    h.iter_mut().for_each(|v| *v /= n);
    h
}

fn difference(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares = |v: f64| v * v;
    let error: f64 = a
        .iter()
        .zip(b)
        .map(|(&a, &b)| squares(f64::from(a) - b))
        .sum();
    (error / b.iter().copied().map(squares).sum::<f64>()).sqrt()
}

/// The samples of every tenth position are held out: the rest.
fn fitting(samples: &[Sample]) -> Vec<Sample> {
    let keep = samples.iter().enumerate().filter(|(i, _)| i % 10 != 9);
    keep.map(|(_, s)| s.clone()).collect()
}

fn equals_naive(path: &Path, open: &OpenModel, sets: &Sources<'_>) {
    let dir = tempfile::tempdir().expect("a directory");
    let adapters = random_adapter(open, dir.path());
    let found = captured(open, &adapters, sets);
    let forget = fitting(sets.forget);
    for tensor in [
        "blk.0.attn_k.weight",
        "blk.2.ffn_down.weight",
        "blk.4.ffn_up.weight",
    ] {
        let h = found.moments(tensor, &[Set::Forget], Part::Fit).expect("H");
        let error = difference(&h, &naive(open, &adapters, tensor, &forget));
        // Rows are stored in 11 bits, and a decode of another size adds in another order.
        assert!(error < 2e-3, "{path:?} {tensor}: {error:e}");
        let trace = found
            .trace(tensor, &[Set::Forget], Part::Fit)
            .expect("a trace");
        let n = found.n_in(tensor).expect("captured");
        let diagonal: f64 = (0..n).map(|i| f64::from(h[i * (n + 1)])).sum();
        assert!((diagonal / trace - 1.0).abs() < 1e-4, "{diagonal} {trace}");
        for i in 0..n {
            for j in 0..i {
                assert_eq!(h[i * n + j], h[j * n + i]);
            }
        }
    }
}

#[test]
fn moments_equal_a_naive_accumulation() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let forget = samples(&open, "forget.jsonl", 20);
    let retain = samples(&open, "retain.jsonl", 12);
    let sets = Sources {
        forget: &forget,
        retain: &retain,
        general: &[],
    };
    equals_naive(&support::mini(), &open, &sets);
}

#[test]
fn moments_of_another_model_equal_a_naive_accumulation() {
    let Some(path) = support::stories() else {
        return;
    };
    let open = OpenModel::open(&path, 0).expect("a good model");
    let forget = samples(&open, "forget.jsonl", 11);
    let sets = Sources {
        forget: &forget,
        ..Sources::default()
    };
    equals_naive(&path, &open, &sets);
}

#[test]
fn four_inputs_a_block_serve_seven_weights() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let forget = samples(&open, "forget.jsonl", 3);
    let sets = Sources {
        forget: &forget,
        ..Sources::default()
    };
    let found = captured(&open, &Loaded::new(), &sets);
    assert_eq!(found.groups().len(), 4 * 5);
    for b in 0..5 {
        let name = |w: &str| format!("blk.{b}.{w}.weight");
        for (of, with) in [
            ("attn_q", vec!["attn_q", "attn_k", "attn_v"]),
            ("attn_output", vec!["attn_output"]),
            ("ffn_gate", vec!["ffn_gate", "ffn_up"]),
            ("ffn_down", vec!["ffn_down"]),
        ] {
            let mut group: Vec<String> = found
                .groups()
                .find(|g| g.contains(&name(of)))
                .expect("captured")
                .to_vec();
            let mut with: Vec<String> = with.into_iter().map(name).collect();
            group.sort();
            with.sort();
            assert_eq!(group, with);
        }
    }
}

#[test]
fn adapters_change_the_moments_behind_them() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let forget = samples(&open, "forget.jsonl", 10);
    let sets = Sources {
        forget: &forget,
        ..Sources::default()
    };
    let dir = tempfile::tempdir().expect("a directory");
    let adapters = random_adapter(&open, dir.path());
    let (with, without) = (
        captured(&open, &adapters, &sets),
        captured(&open, &Loaded::new(), &sets),
    );
    let h = |found: &Captured, tensor: &str| {
        let h = found.moments(tensor, &[Set::Forget], Part::Fit).expect("H");
        h.into_iter().map(f64::from).collect::<Vec<f64>>()
    };
    // The first input comes before any adapter.
    let first = "blk.0.attn_q.weight";
    assert_eq!(h(&with, first), h(&without, first));
    for tensor in ["blk.0.attn_output.weight", "blk.4.ffn_down.weight"] {
        let changed: Vec<f32> = h(&with, tensor).iter().map(|&v| v as f32).collect();
        let change = difference(&changed, &h(&without, tensor));
        assert!(change > 1e-2, "{tensor}: {change}");
    }
}

#[test]
fn sets_pool_split_and_combine_as_documented() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let forget = samples(&open, "forget.jsonl", 20);
    let retain = samples(&open, "retain.jsonl", 12);
    let general = samples(&open, "general.jsonl", 4);
    let sets = Sources {
        forget: &forget,
        retain: &retain,
        general: &general,
    };
    let found = captured(&open, &Loaded::new(), &sets);
    let rows = |s: &[Sample]| s.iter().map(|s| s.tokens.len() - 2).sum::<usize>();
    for (set, samples) in [
        (Set::Forget, &forget),
        (Set::Retain, &retain),
        (Set::General, &general),
    ] {
        let (fit, held) = (
            found.n_tokens(set, Part::Fit),
            found.n_tokens(set, Part::HeldOut),
        );
        assert_eq!(fit + held, rows(samples));
        let share = held as f64 / (fit + held) as f64;
        assert!((0.04..0.2).contains(&share), "{set:?}: {share}");
    }
    assert_eq!(
        found.n_tokens(Set::Forget, Part::Fit),
        rows(&fitting(&forget))
    );
    let tensor = "blk.1.ffn_down.weight";
    let h = |sets: &[Set]| found.moments(tensor, sets, Part::HeldOut).expect("H");
    let trace = |sets: &[Set]| found.trace(tensor, sets, Part::HeldOut).expect("a trace");
    let (h_f, h_r) = (h(&[Set::Forget]), h(&Set::KEPT));
    let (lambda, n) = (0.5, found.n_in(tensor).expect("captured") as f64);
    let (t_f, t_r) = (trace(&[Set::Forget]), trace(&Set::KEPT));
    let wanted: Vec<f64> = h_f
        .iter()
        .zip(&h_r)
        .map(|(&f, &r)| n * (f64::from(r) / t_r + lambda * f64::from(f) / t_f) / (1.0 + lambda))
        .collect();
    let combined = found.combined(tensor, lambda, Part::HeldOut).expect("H");
    assert!(difference(&combined, &wanted) < 1e-5);

    for lambda in [-1.0, f64::NAN] {
        let refused = found.combined(tensor, lambda, Part::Fit);
        assert_eq!(refused.expect_err("no weight").exit_code(), 2);
    }

    // tr(E·H·Eᵀ) of E = I is tr(H); of a random E, the sum over its rows.
    let n = n as usize;
    let mut rng = SplitMix64(3);
    let e: Vec<f32> = (0..3 * n).map(|_| rng.normal()).collect();
    let wanted: f64 = e
        .chunks(n)
        .map(|e| {
            let rows = h_f.chunks(n).zip(e);
            let each = rows.map(|(h, &ei)| {
                let he: f64 = h
                    .iter()
                    .zip(e)
                    .map(|(&h, &e)| f64::from(h) * f64::from(e))
                    .sum();
                f64::from(ei) * he
            });
            each.sum::<f64>()
        })
        .sum();
    let energy = found
        .energy(tensor, &[Set::Forget], Part::HeldOut, &e)
        .expect("energy");
    assert!((energy / wanted - 1.0).abs() < 1e-4, "{energy} {wanted}");
}

#[test]
fn caps_bound_tokens_and_disk() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let forget = samples(&open, "forget.jsonl", 20);
    let retain = samples(&open, "retain.jsonl", 40);
    let sets = Sources {
        forget: &forget,
        retain: &retain,
        general: &[],
    };
    let tensors = adaptable(&open);
    let run = |config: &MomentsConfig| {
        capture(
            &open,
            &Loaded::new(),
            &tensors,
            &sets,
            config,
            1,
            &mut |_, _| {},
        )
    };
    let tokens =
        |found: &Captured, set| found.n_tokens(set, Part::Fit) + found.n_tokens(set, Part::HeldOut);
    let config = MomentsConfig {
        max_tokens: 50,
        ..MomentsConfig::default()
    };
    let found = run(&config).expect("captured");
    for set in [Set::Forget, Set::Retain] {
        assert!(
            (35..=50).contains(&tokens(&found, set)),
            "{}",
            tokens(&found, set)
        );
    }
    let per_token =
        found.spill_bytes() / (tokens(&found, Set::Forget) + tokens(&found, Set::Retain)) as u64;
    let tight = run(&MomentsConfig {
        max_spill_bytes: 60 * per_token,
        ..config.clone()
    })
    .expect("captured");
    assert!(tight.spill_bytes() <= 60 * per_token && tight.spill_bytes() > 30 * per_token);
    let none = run(&MomentsConfig {
        max_spill_bytes: per_token - 1,
        ..config
    });
    let message = none.expect_err("no room for a token").to_string();
    assert!(message.contains(&per_token.to_string()), "{message}");
}

#[test]
fn what_cannot_be_captured_is_named() {
    let open = OpenModel::open(&support::mini(), 0).expect("a good model");
    let forget = samples(&open, "forget.jsonl", 2);
    let sets = Sources {
        forget: &forget,
        ..Sources::default()
    };
    let run = |tensor: &str, sets: &Sources<'_>| {
        let config = MomentsConfig::default();
        let tensors = [tensor.to_owned()];
        let none = Loaded::new();
        capture(&open, &none, &tensors, sets, &config, 1, &mut |_, _| {})
    };
    let norm = run("blk.0.attn_norm.weight", &sets).expect_err("never multiplied");
    assert!(norm.to_string().contains("blk.0.attn_norm.weight"));
    let empty = run("blk.0.attn_q.weight", &Sources::default()).expect_err("no text");
    assert_eq!(
        (empty.exit_code(), empty.to_string()),
        (3, MomentsError::NoTokens.to_string())
    );
    let found = run("blk.0.attn_q.weight", &sets).expect("captured");
    assert_eq!(found.groups().len(), 1);
    assert!(
        found
            .moments("blk.0.attn_k.weight", &[Set::Forget], Part::Fit)
            .is_err()
    );
    let no_general = found.moments("blk.0.attn_q.weight", &[Set::General], Part::Fit);
    assert!(
        no_general
            .expect_err("no such text")
            .to_string()
            .contains("general")
    );
}
