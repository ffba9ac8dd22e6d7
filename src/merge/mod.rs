//! Patches merged into the model's own weights.

mod inputs;
pub mod moments;
pub mod rewrite;
mod spill;
