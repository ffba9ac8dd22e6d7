//! Samples in, pooled layer outputs out: one forward pass of llama.cpp, watched through its
//! eval callback.
//!
//! For every adaptable weight W and sample s: `h(s) = Σ_t W·x_t` over the sample's real
//! tokens (ReGLU, arXiv 2604.17396, section 3; its reference code also sums padding). Where a model
//! loops over its layers, the sum is over all loops: one update acts in each of them.

use crate::data::Sample;
use crate::error::Error;
use crate::ggml::{Batch, Context, ContextOptions, DecodeError, Hook, Model, NodeView, sys};
use crate::graph::GraphError;
use crate::graph::batch::pack;
use crate::graph::template::Adaptable;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Tokens per decode: large enough to amortise the callback's barriers, small enough that
/// activations stay in cache.
const BATCH_TOKENS: usize = 512;
/// Samples per decode.
const BATCH_SAMPLES: usize = 64;

/// Pooled outputs of one weight: `[n_out, n_samples]`.
#[derive(Debug, Clone)]
pub struct PooledOutputs {
    /// The weight.
    pub tensor: Adaptable,
    /// One column per sample, in data order.
    pub h: Vec<f32>,
}

struct Watch {
    index: HashMap<String, usize>,
    pooled: Vec<Vec<f32>>,
    widths: Vec<usize>,
    /// Token ranges of the samples in the running batch, with their sample numbers.
    spans: Vec<(usize, Range<usize>)>,
    values: Vec<f32>,
    /// Products of a pass, and those of the running one that are still to come.
    n_products: usize,
    to_come: usize,
}

struct Watcher(Arc<Mutex<Watch>>);

impl Hook for Watcher {
    fn want(&mut self, node: &NodeView<'_>) -> bool {
        if node.op() != sys::GGML_OP_MUL_MAT {
            return false;
        }
        let watch = self.0.lock().expect("only this thread locks");
        node.weight_name(0)
            .is_some_and(|n| watch.index.contains_key(&n))
    }

    fn seen(&mut self, node: &NodeView<'_>) -> bool {
        let watch = &mut *self.0.lock().expect("only this thread locks");
        let Some(&i) = node.weight_name(0).and_then(|n| watch.index.get(&n)) else {
            return true;
        };
        if node.read_f32(&mut watch.values) {
            watch.to_come = watch.to_come.saturating_sub(1);
            let n_out = watch.widths[i];
            for (sample, span) in &watch.spans {
                let into = &mut watch.pooled[i][sample * n_out..(sample + 1) * n_out];
                for token in watch.values[span.start * n_out..span.end * n_out].chunks_exact(n_out)
                {
                    for (h, v) in into.iter_mut().zip(token) {
                        *h += v;
                    }
                }
            }
        }
        true
    }

    fn abort(&mut self) -> bool {
        // Nothing of interest follows the last product: the output head need not run.
        self.0.lock().expect("only this thread locks").to_come == 0
    }
}

/// Pool the outputs of `adaptable` over `samples`, in order.
///
/// # Errors
/// When llama.cpp fails.
pub fn pooled_outputs(
    model: &Model,
    adaptable: &[Adaptable],
    samples: &[Sample],
    n_threads: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<PooledOutputs>, Error> {
    let index: HashMap<String, usize> = adaptable
        .iter()
        .enumerate()
        .map(|(i, t)| (t.name.clone(), i))
        .collect();
    let watch = Arc::new(Mutex::new(Watch {
        n_products: adaptable.iter().map(|t| t.n_uses).sum(),
        to_come: 0,
        index,
        pooled: adaptable
            .iter()
            .map(|t| vec![0.0; t.n_out * samples.len()])
            .collect(),
        widths: adaptable.iter().map(|t| t.n_out).collect(),
        spans: Vec::new(),
        values: Vec::new(),
    }));
    let lengths: Vec<usize> = samples.iter().map(|s| s.tokens.len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(1);
    let n_batch = BATCH_TOKENS.max(longest);
    let mut context = Context::new(
        model,
        ContextOptions {
            n_ctx: n_batch as u32,
            n_batch: n_batch as u32,
            n_seq_max: BATCH_SAMPLES as u32,
            n_threads,
            hook: Some(Box::new(Watcher(watch.clone()))),
            ..ContextOptions::default()
        },
    )?;
    let mut seen = 0;
    for bin in pack(&lengths, n_batch) {
        for group in bin.chunks(BATCH_SAMPLES) {
            let mut batch = Batch::default();
            let mut spans = Vec::new();
            for (seq, &s) in group.iter().enumerate() {
                let first = batch.len();
                for (pos, &token) in samples[s].tokens.iter().enumerate() {
                    // Every token an output, or the last layer would drop tokens early.
                    batch.push(token, pos as i32, seq as i32, true);
                }
                spans.push((s, first..batch.len()));
            }
            {
                let mut watch = watch.lock().expect("the context is idle");
                watch.spans = spans;
                watch.to_come = watch.n_products;
            }
            context.clear();
            match context.decode(&mut batch) {
                Ok(()) | Err(DecodeError::Aborted) => {}
                Err(e) => return Err(e.into()),
            }
            let missing = watch.lock().expect("the context is idle").to_come;
            if missing > 0 {
                return Err(GraphError::Untraceable(format!(
                    "{missing} of its products with adaptable weights cannot be watched"
                ))
                .into());
            }
            seen += group.len();
            progress(seen);
        }
    }
    crate::ggml::last_messages();
    drop(context);
    let pooled = std::mem::take(&mut watch.lock().expect("the context is gone").pooled);
    Ok(adaptable
        .iter()
        .zip(pooled)
        .map(|(t, h)| PooledOutputs {
            tensor: t.clone(),
            h,
        })
        .collect())
}
