//! What can be wrong with the files of a report.

use std::path::PathBuf;
use thiserror::Error;

/// Why no report is made.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ReportError {
    #[error("{}, line {line}: wanted an event of a training log: {problem}", path.display())]
    Log {
        path: PathBuf,
        line: usize,
        problem: String,
    },
    #[error("{}: wanted what `nepenthe robustness --json` prints: {problem}", path.display())]
    Robustness { path: PathBuf, problem: String },
    #[error("{}: wanted scores of the patch {wanted} or of a merged file of the report, found those of others", path.display())]
    OtherRobustness { path: PathBuf, wanted: String },
    #[error("{}: wanted a file that the patch {wanted} was merged into, found one with {}", path.display(), found.join(", "))]
    OtherMerge {
        path: PathBuf,
        wanted: String,
        found: Vec<String>,
    },
    #[error("the verdict is not met: {0}")]
    NotMet(String),
}

impl ReportError {
    /// As [`crate::Error::exit_code`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Log { .. } | Self::Robustness { .. } => 3,
            Self::OtherRobustness { .. } | Self::OtherMerge { .. } => 4,
            Self::NotMet(_) => 5,
        }
    }
}
