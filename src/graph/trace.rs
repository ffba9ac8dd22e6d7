//! Recording llama.cpp's graph: a decode that is stopped before anything is computed.
//!
//! The eval callback is asked about every node before the first one runs; the abort
//! callback then stops the computation. With a zero adapter attached to every block
//! matrix, the recording also shows where llama.cpp would add adapters, and to which
//! weights it never does.

use super::GraphError;
use super::recording::Recordings;
use super::template::Template;
use super::weights::Weights;
use crate::ggml::{
    Adapter, Batch, Context, ContextOptions, DecodeError, Hook, Model, NodeView, Recorded,
};
use crate::gguf::{GgmlType, GgufWriter, Metadata, Value};
use std::sync::{Arc, Mutex};

/// llama.cpp rounds the number of cache cells it reads up to this.
const KV_PAD: i64 = 256;
const TRACE_ROWS: i64 = 8;

struct Recorder(Arc<Mutex<Recorded>>);

impl Hook for Recorder {
    fn want(&mut self, node: &NodeView<'_>) -> bool {
        self.0.lock().expect("no panic while recording").push(node);
        false
    }

    fn seen(&mut self, _: &NodeView<'_>) -> bool {
        false
    }

    fn abort(&mut self) -> bool {
        true
    }
}

/// Record `model`'s graph and make a template of it.
///
/// # Errors
/// Recurrent models and encoders, graphs the template cannot express, and llama.cpp's own
/// failures.
pub fn trace(model: &Model, weights: &Weights) -> Result<Template, GraphError> {
    if model.is_recurrent() || model.has_encoder() {
        return Err(GraphError::Untraceable(
            "it keeps recurrent state or starts with an encoder".into(),
        ));
    }
    let adapter = zero_adapter(model, weights)?;
    let window = i64::from(model.n_swa().max(0));
    // A sliding-window cache must come out shorter than the full one to be told apart.
    let n_ctx = if window > 0 {
        (window / KV_PAD + 7) * KV_PAD
    } else {
        2 * KV_PAD
    };
    let record = |t: i64, r: i64| record(model, &adapter, n_ctx, t, r);
    let recordings = Recordings {
        base: record(KV_PAD, TRACE_ROWS)?,
        more_tokens: record(2 * KV_PAD, TRACE_ROWS)?,
        more_rows: record(KV_PAD, 2 * TRACE_ROWS)?,
        t: KV_PAD,
        r: TRACE_ROWS,
    };
    Template::new(&recordings, n_ctx, &|name| weights.has(name))
}

fn record(
    model: &Model,
    adapter: &Arc<Adapter>,
    n_ctx: i64,
    t: i64,
    r: i64,
) -> Result<Recorded, GraphError> {
    let recorded = Arc::new(Mutex::new(Recorded::default()));
    let mut context = Context::new(
        model,
        ContextOptions {
            n_ctx: n_ctx as u32,
            n_batch: t as u32,
            // As the graph that is built from it: views into what is read from the cache then lie
            // as they do there.
            kv_f32: true,
            hook: Some(Box::new(Recorder(recorded.clone()))),
            ..ContextOptions::default()
        },
    )?;
    context.set_adapters(&[(adapter.clone(), 1.0)])?;
    let mut batch = Batch::default();
    for i in 0..t {
        batch.push(0, i as i32, 0, i >= t - r);
    }
    match context.decode(&mut batch) {
        Ok(()) | Err(DecodeError::Aborted) => {}
        Err(e) => return Err(GraphError::Llama(e.into())),
    }
    crate::ggml::last_messages();
    drop(context);
    let recorded = std::mem::take(&mut *recorded.lock().expect("the hook is gone"));
    Ok(recorded)
}

/// The matrices that choose experts, or weigh shared ones: frozen as the experts are, since what
/// is chosen changes in jumps.
const ROUTER: &str = ".ffn_gate_inp";

/// A rank-1 adapter of zeros for every matrix of the blocks that may be adapted.
fn zero_adapter(model: &Model, weights: &Weights) -> Result<Arc<Adapter>, GraphError> {
    let mut meta = Metadata::new();
    meta.set("general.type", Value::from("adapter"));
    meta.set("general.architecture", Value::from(weights.arch()?));
    meta.set("adapter.type", Value::from("lora"));
    meta.set("adapter.lora.alpha", Value::from(1.0f32));
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("zero.gguf");
    let matrices: Vec<_> = weights
        .set()
        .tensors()
        .map(|(_, t)| t)
        .filter(|t| t.name.starts_with("blk.") && t.name.ends_with(".weight") && t.n_dims == 2)
        .filter(|t| !t.name.contains(ROUTER))
        .collect();
    let longest = matrices
        .iter()
        .map(|t| t.ne[0].max(t.ne[1]))
        .max()
        .unwrap_or(0);
    let zeros = vec![0u8; longest as usize * 4];
    let mut file = GgufWriter::new(&path, meta);
    for t in matrices {
        let (n_in, n_out) = (t.ne[0], t.ne[1]);
        let (a, b) = (format!("{}.lora_a", t.name), format!("{}.lora_b", t.name));
        file.tensor_from_bytes(&a, &[n_in, 1], GgmlType::F32, &zeros[..n_in as usize * 4])?;
        file.tensor_from_bytes(&b, &[1, n_out], GgmlType::F32, &zeros[..n_out as usize * 4])?;
    }
    file.save(false)?;
    Ok(Arc::new(Adapter::load(model, &path)?))
}
