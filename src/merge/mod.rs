//! Patches merged into the model's own weights.

pub mod gate;
pub mod imatrix;
mod inputs;
pub mod moments;
pub mod rewrite;
pub mod sketch;
mod sketch_file;
mod spill;
