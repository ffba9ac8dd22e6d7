//! llama.cpp's own compute graph, recorded, rebuilt over the mapped model file with LoRA
//! factors on its linear layers, and differentiated by a table of vector-Jacobian rules.
//!
//! [`trace`] records, [`recording`] makes of it a [`template`] free of batch size and KV cache,
//! [`tape`] builds forward and backward for one batch shape, [`reverse`] goes back through it,
//! [`rules`] holds the derivative of every op, [`head`] turns hidden states into logits a few rows at a time.

#[cfg(feature = "train")]
pub mod attention;
pub mod batch;
#[cfg(feature = "train")]
mod build;
#[cfg(feature = "train")]
pub mod copies;
#[cfg(feature = "train")]
pub mod forward;
#[cfg(feature = "train")]
pub mod head;
#[cfg(feature = "train")]
pub mod part;
#[cfg(feature = "train")]
mod place;
#[cfg(feature = "train")]
pub mod prefix;
#[cfg(feature = "train")]
pub mod recording;
#[cfg(feature = "train")]
pub mod reverse;
#[cfg(feature = "train")]
pub mod rules;
#[cfg(feature = "train")]
pub mod tape;
#[cfg(feature = "train")]
pub mod template;
#[cfg(feature = "train")]
pub mod trace;
#[cfg(feature = "train")]
pub mod trained;
pub mod weights;

use crate::ggml::{LlamaError, OpError, QuantError};
use crate::gguf::GgufError;
use thiserror::Error;

/// Why a model's graph cannot be recorded, rebuilt or differentiated.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GraphError {
    /// The model's graph is of a kind the recorder does not handle.
    #[error("this model cannot be traced: {0}")]
    Untraceable(String),
    /// A graph input of unknown meaning.
    #[error(
        "this model cannot be traced: its graph reads an input called {0:?}, which has no known meaning"
    )]
    Input(String),
    /// An op that cannot be rebuilt.
    #[error("architecture {arch}: the graph op {op} (at {node}) cannot be rebuilt")]
    Op {
        /// The model's architecture.
        arch: String,
        /// ggml's op.
        op: String,
        /// The node.
        node: String,
    },
    /// An op without a vector-Jacobian rule.
    #[error("the graph op {op} has no gradient rule")]
    NoRule {
        /// ggml's op.
        op: String,
    },
    /// A batch that does not fit the graph.
    #[error("a batch of {found} {what} does not fit a graph for {wanted}")]
    Batch {
        /// What is counted.
        what: &'static str,
        /// As the graph was built.
        wanted: usize,
        /// As given.
        found: usize,
    },
    /// ggml refused.
    #[error(transparent)]
    Ggml(#[from] OpError),
    /// llama.cpp refused.
    #[error(transparent)]
    Llama(#[from] LlamaError),
    /// The model file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Weights that cannot be decoded.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// The temporary adapter of the trace.
    #[error("cannot write the adapter that the trace attaches: {0}")]
    Temp(#[from] std::io::Error),
}
