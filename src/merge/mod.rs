//! Patches merged into the model's own weights.

pub mod gate;
pub mod imatrix;
mod inputs;
pub mod moments;
pub mod delta;
mod descent;
pub mod error;
pub mod factor;
pub mod feedback;
pub mod grid;
pub mod measure;
pub mod rewrite;
pub mod sketch;
mod sketch_file;
mod spill;
