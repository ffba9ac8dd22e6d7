//! Patches merged into the model's own weights.

pub mod decide;
pub mod delta;
mod descent;
pub mod error;
pub mod factor;
pub mod feedback;
pub mod grid;
pub mod measure;
pub mod promote;
pub mod rewrite;
