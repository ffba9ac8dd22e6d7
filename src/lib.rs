//! nepenthe: make a deployed, quantised GGUF model forget.

pub mod atomic;
pub mod cli;
pub mod data;
pub mod error;
pub mod eval;
pub mod ggml;
pub mod gguf;
pub mod graph;
pub mod model;

pub use error::Error;
