//! Training: losses over logits, the optimiser, the loop.

pub mod adamw;
pub mod adapters;
pub mod answer_loss;
pub mod below;
pub mod checkpoint;
pub mod config;
pub mod distil;
pub mod dropout;
pub mod engine;
mod error;
pub mod fit;
pub mod item;
pub mod layers;
pub mod learn;
pub mod loss;
pub mod memory;
pub mod net;
pub mod order;
pub mod soft;
pub mod trainer;

pub use error::TrainError;
