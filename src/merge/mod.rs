//! Patches merged into the model's own weights: what is written, where it goes, and the way back.

pub mod deliver;
pub mod diff;
pub mod record;
pub mod replace;
pub mod rewrite;
pub mod undo;
