//! Patches merged into the model's own weights: what is written, where it goes, and the way back.

pub mod calibration;
pub mod compare;
pub mod correct;
pub mod decide;
pub mod deliver;
mod descent;
pub mod diff;
pub mod error;
pub mod factor;
pub mod feedback;
pub mod gate;
pub mod grid;
pub mod imatrix;
mod inputs;
pub mod leave;
pub mod measure;
pub mod moments;
pub mod promote;
mod refine;
mod refit;
pub mod rewrite;
pub mod run;
pub mod same_grid;
mod scratch;
pub mod sketch;
mod sketch_file;
mod spill;
pub mod undo;

pub use error::MergeError;
