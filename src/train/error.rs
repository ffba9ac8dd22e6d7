//! What can be wrong with the files of training.

use super::checkpoint::CheckpointError;
use crate::error::into_error;
use crate::subspace_file::SubspaceFileError;
use thiserror::Error;

/// Any failure of training that is its own.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A checkpoint that was refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A subspace file that was refused.
    #[error(transparent)]
    SubspaceFile(#[from] SubspaceFileError),
}

into_error!(Train(TrainError): CheckpointError, SubspaceFileError);

impl TrainError {
    /// As [`Error::exit_code`](crate::Error::exit_code).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Checkpoint(CheckpointError::Other { .. })
            | Self::SubspaceFile(SubspaceFileError::Base { .. }) => 4,
            Self::Checkpoint(_) | Self::SubspaceFile(_) => 3,
        }
    }
}
