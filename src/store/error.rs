//! What a store refuses.

use crate::patch::PatchId;
use std::path::PathBuf;
use thiserror::Error;

/// Why a change or a reading of a store is refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("{}: wanted a patch store, found no index.json in it", path.display())]
    NoIndex { path: PathBuf },
    #[error("{}: wanted the index of a patch store: {problem}", path.display())]
    Index { path: PathBuf, problem: String },
    #[error("{}: wanted store format {wanted} or older, found {found}: this store needs a newer nepenthe", path.display())]
    Format {
        path: PathBuf,
        wanted: u32,
        found: u32,
    },
    #[error(
        "{}: the signature's sequence number is {found}, and {seen} was accepted before; --allow-older takes it all the same",
        path.display()
    )]
    OlderPatch {
        path: PathBuf,
        seen: u64,
        found: String,
    },
    #[error(
        "{}: the store is at sequence {found} and was at {seen} before: it was put back by other means than `nepenthe patch rollback`",
        path.display()
    )]
    OlderStore {
        path: PathBuf,
        seen: u64,
        found: u64,
    },
    #[error("{}: the store has no active patch {id}", path.display())]
    NoPatch { path: PathBuf, id: String },
    #[error("{}: {id} begins the ids of several patches", path.display())]
    Ambiguous { path: PathBuf, id: String },
    #[error("{}: the store keeps no set of sequence {sequence}", path.display())]
    NoSet { path: PathBuf, sequence: u64 },
    #[error("{}: wanted the patch {wanted}, found other bytes (sha256 {found})", path.display())]
    Changed {
        path: PathBuf,
        wanted: PatchId,
        found: PatchId,
    },
}

impl StoreError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoPatch { .. } | Self::Ambiguous { .. } | Self::NoSet { .. } => 2,
            Self::NoIndex { .. } | Self::Index { .. } => 3,
            _ => 4,
        }
    }
}
