//! What can be wrong with the files of training.

use super::checkpoint::CheckpointError;
use crate::error::into_error;
use crate::subspace_file::SubspaceFileError;
use thiserror::Error;

/// Any failure of training that is its own.
#[derive(Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A checkpoint that was refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A subspace file that was refused.
    #[error(transparent)]
    SubspaceFile(#[from] SubspaceFileError),
    /// A budget below what training takes.
    #[error(
        "training takes at least {} beside the model file, --memory allows {}; a lower --rank, \
         --retain-rank or --micro-tokens takes less",
        gigabytes(*.least, f64::ceil),
        gigabytes(*.budget, f64::round)
    )]
    Memory {
        /// The least it takes, bytes.
        least: u64,
        /// What it may take.
        budget: u64,
    },
}

/// A size in words, with two digits after the point.
fn gigabytes(bytes: u64, round: fn(f64) -> f64) -> String {
    format!("{:.2} GB", round(bytes as f64 / 1e7) / 1e2)
}

into_error!(Train(TrainError): CheckpointError, SubspaceFileError);

impl TrainError {
    /// As [`Error::exit_code`](crate::Error::exit_code).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Checkpoint(CheckpointError::Other { .. })
            | Self::SubspaceFile(SubspaceFileError::Base { .. }) => 4,
            Self::Checkpoint(_) | Self::SubspaceFile(_) => 3,
            Self::Memory { .. } => 6,
        }
    }
}
