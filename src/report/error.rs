//! What can be wrong with evidence and the files it is made from.

use crate::error::into_error;
use crate::eval::tofu_log::LogError;
use crate::score::PrivacyLogError;
use crate::score::tofu::PartialError;
use std::path::PathBuf;
use thiserror::Error;

/// Any failure of evaluation and report that is its own.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EvidenceError {
    /// A TOFU log that was refused.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A partial log that was refused.
    #[error(transparent)]
    Partial(#[from] PartialError),
    /// A retain model's privacy report that was refused.
    #[error(transparent)]
    PrivacyLog(#[from] PrivacyLogError),
    /// A report that cannot be made, or whose verdict is not met.
    #[error(transparent)]
    Report(#[from] ReportError),
}

into_error!(Evidence(EvidenceError): LogError, PartialError, PrivacyLogError, ReportError);

impl EvidenceError {
    /// As [`Error::exit_code`](crate::Error::exit_code).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Partial(PartialError::Other { .. }) => 4,
            Self::Log(_) | Self::Partial(_) | Self::PrivacyLog(_) => 3,
            Self::Report(e) => e.exit_code(),
        }
    }
}

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
