//! Training: losses over logits, the optimiser, the loop.

pub mod adamw;
pub mod engine;
pub mod loss;
