//! What can be wrong with a merge; of rows that could not be put on their grid, all of it.

use super::gate::GateError;
use super::imatrix::ImatrixError;
use super::moments::MomentsError;
use super::sketch::SketchError;
use super::undo::UndoError;
use crate::error::into_error;
use crate::gguf::GgmlType;
use crate::project::ProjectError;
use crate::subspace::SubspaceError;
use thiserror::Error;

/// Any failure of a merge that is its own.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MergeError {
    /// No second moments.
    #[error(transparent)]
    Moments(#[from] MomentsError),
    /// An importance matrix that was refused.
    #[error(transparent)]
    Imatrix(#[from] ImatrixError),
    /// A file of sketched moments that was refused.
    #[error(transparent)]
    Sketch(#[from] SketchError),
    /// A merged file that is not accepted.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// An undo file that was refused.
    #[error(transparent)]
    Undo(#[from] UndoError),
    /// Weights or second moments that cannot be rounded on.
    #[error(transparent)]
    Round(#[from] RoundError),
    /// Outputs from which no subspace can be found.
    #[error(transparent)]
    Subspace(#[from] SubspaceError),
    /// Factors that do not fit together.
    #[error(transparent)]
    Project(#[from] ProjectError),
}

into_error!(Merge(MergeError): MomentsError, ImatrixError, SketchError, GateError, UndoError,
    RoundError, SubspaceError, ProjectError);

impl MergeError {
    /// As [`Error::exit_code`](crate::Error::exit_code).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Undo(UndoError::Io { .. }) | Self::Moments(MomentsError::Memory { .. }) => 6,
            Self::Undo(e) if e.is_mismatch() => 4,
            Self::Sketch(e) if e.is_mismatch() => 4,
            Self::Moments(MomentsError::Budget { .. })
            | Self::Subspace(SubspaceError::Config { .. } | SubspaceError::RankAboveWidth { .. }) => {
                2
            }
            Self::Moments(MomentsError::NoTokens | MomentsError::NoSet { .. })
            | Self::Gate(GateError::NoSamples | GateError::Vocabulary { .. })
            | Self::Imatrix(_)
            | Self::Sketch(_)
            | Self::Undo(_) => 3,
            Self::Gate(_) => 5,
            Self::Round(RoundError::Quant(_) | RoundError::NotPositive { .. }) => 8,
            Self::Round(_) => 3,
            Self::Subspace(_) | Self::Project(_) | Self::Moments(_) => 8,
        }
    }
}

/// Rows, updates and second moments that cannot be merged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RoundError {
    /// A type whose codes are no plain multiples of a step.
    #[error(
        "type {ty} has no grid to round onto: wanted F32, F16, BF16, Q4_0 to Q8_0 or Q2_K to Q6_K"
    )]
    NoGrid {
        /// The type.
        ty: GgmlType,
    },
    /// A row that is no whole number of blocks.
    #[error("a row of {ty} wants a multiple of {} elements, found {n_in}", ty.block_len())]
    RowLength {
        /// The type.
        ty: GgmlType,
        /// Elements in the row.
        n_in: usize,
    },
    /// A slice of another length than its shape asks for.
    #[error("{what}: wanted {wanted} values, found {found}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// As the shape asks.
        wanted: usize,
        /// As given.
        found: usize,
    },
    /// A scale, an update or a second moment that is not finite.
    #[error("{what} at row {row}, column {column} is not finite")]
    NotFinite {
        /// What.
        what: &'static str,
        /// Row, from 0.
        row: usize,
        /// Column, from 0.
        column: usize,
    },
    /// Second moments that are none.
    #[error("the second moments [{n_in}, {n_in}] are not positive definite at damping {damping}")]
    NotPositive {
        /// Their width.
        n_in: usize,
        /// The damping they were factored at.
        damping: f64,
    },
    /// ggml does not decode or encode it.
    #[error(transparent)]
    Quant(#[from] crate::ggml::QuantError),
}
