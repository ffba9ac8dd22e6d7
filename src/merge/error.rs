//! Why rows could not be put on their grid.

use crate::gguf::GgmlType;
use thiserror::Error;

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
