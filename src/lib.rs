//! nepenthe: make a deployed, quantised GGUF model forget.

pub mod adapter;
pub mod atomic;
pub mod capture;
pub mod check;
pub mod cli;
pub mod data;
pub mod digest;
pub mod error;
pub mod estimate;
pub mod eval;
pub mod ggml;
pub mod gguf;
pub mod graph;
pub mod learn;
pub mod merge;
pub mod model;
pub mod patch;
pub mod progress;
pub mod project;
pub mod report;
pub mod rng;
pub mod robustness;
pub mod score;
pub mod sets;
pub mod start;
pub mod subspace;
pub mod subspace_file;
pub mod train;
pub mod unlearn;
pub mod unseen;

pub use error::Error;
