//! What a runtime refuses.

use super::PatchId;
use thiserror::Error;

/// Why a call on a runtime or a session failed.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum RuntimeError {
    #[error("no patch {id} is active")]
    NotActive { id: PatchId },
    #[error("patch {id} is the store's: change it there, with `nepenthe patch`")]
    Stored { id: PatchId },
    #[error("wanted at most {wanted} active patches, found one more")]
    TooMany { wanted: usize },
}

impl RuntimeError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotActive { .. } | Self::Stored { .. } => 2,
            Self::TooMany { .. } => 6,
        }
    }
}
