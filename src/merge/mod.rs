//! Patches merged into the model's own weights.

pub mod rewrite;
