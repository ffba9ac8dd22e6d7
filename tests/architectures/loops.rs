//! Models that loop over their layers: what is captured of a weight is the sum over all its uses.

use super::model::{Form, write};
use super::{support, table};
use nepenthe::capture::pooled_outputs;
use nepenthe::data::{GENERAL_TEXT, Sample};
use nepenthe::ggml::{Batch, Context, ContextOptions, Hook, NodeView, sys};
use nepenthe::graph::trace::trace;
use nepenthe::model::OpenModel;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Of each weight: how many products there were, and their outputs summed over tokens.
type Sums = HashMap<String, (usize, Vec<f32>)>;

/// Watches every product with a weight, to the end of the pass.
struct Naive(Arc<Mutex<Sums>>);

impl Hook for Naive {
    fn want(&mut self, node: &NodeView<'_>) -> bool {
        node.op() == sys::GGML_OP_MUL_MAT
    }

    fn seen(&mut self, node: &NodeView<'_>) -> bool {
        let (mut values, n) = (Vec::new(), node.ne()[0] as usize);
        if let (Some(name), true) = (node.src_name(0), node.read_f32(&mut values)) {
            let mut sums = self.0.lock().expect("one thread");
            let (uses, sum) = sums.entry(name).or_insert_with(|| (0, vec![0.0; n]));
            *uses += 1;
            for token in values.chunks_exact(n) {
                sum.iter_mut().zip(token).for_each(|(s, v)| *s += v);
            }
        }
        true
    }
}

fn every_loop_is_captured(arch: &table::Arch) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    assert!(write(arch, Form::Exact, &support::mini(), &path));
    let open = OpenModel::open(&path, 0).expect("a good model");
    let adaptable = trace(&open.model, &open.weights)
        .expect("traceable")
        .adaptable;
    assert!(adaptable.iter().any(|t| t.n_uses > 1), "it loops");
    let mut tokens = open.model.tokenize(GENERAL_TEXT, true, false);
    tokens.truncate(24);
    let sample = Sample {
        answers: std::iter::once(1..tokens.len()).collect(),
        tokens,
        truncated: false,
    };

    let sums = Arc::new(Mutex::new(Sums::new()));
    let options = ContextOptions {
        hook: Some(Box::new(Naive(sums.clone()))),
        ..ContextOptions::default()
    };
    let mut context = Context::new(&open.model, options).expect("a context");
    let mut batch = Batch::default();
    for (pos, &token) in sample.tokens.iter().enumerate() {
        batch.push(token, pos as i32, 0, true);
    }
    context.decode(&mut batch).expect("decodable");
    drop(context);
    let sums = sums.lock().expect("the context is gone");

    let samples = std::slice::from_ref(&sample);
    let found = pooled_outputs(&open.model, &adaptable, samples, 1, &mut |_| {});
    for pooled in found.expect("captured") {
        let (uses, sum) = &sums[&pooled.tensor.name];
        assert_eq!(pooled.tensor.n_uses, *uses, "{}", pooled.tensor.name);
        let size = sum.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (ours, naive) in pooled.h.iter().zip(sum) {
            let differ = (ours - naive).abs();
            assert!(
                differ <= 1e-5 * size,
                "{}: {ours} {naive}",
                pooled.tensor.name
            );
        }
    }
}

#[test]
fn of_nanbeige() {
    every_loop_is_captured(&table::nanbeige);
}

#[test]
fn of_hrm() {
    every_loop_is_captured(&table::hrm_text);
}
