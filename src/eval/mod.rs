//! Scores, as the papers and programs that introduced them define them. No model in here.

pub mod choice;
mod kolmogorov;
pub mod ks;
pub mod membership;
pub mod memorisation;
mod porter;
pub mod rouge;
pub mod stats;
pub mod tofu;
pub mod tofu_eval;
pub mod tofu_log;
