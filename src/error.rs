//! What can go wrong, and the exit code it means.

use crate::atomic::AtomicError;
use crate::data::{DataError, Overlap};
use crate::ggml::{DecodeError, LlamaError, OpError, QuantError};
use crate::gguf::GgufError;
use crate::graph::GraphError;
use crate::patch::PatchError;
use crate::proof::ProofError;
use crate::replace::ReplaceError;
use crate::runtime::RuntimeError;
use crate::store::StoreError;
use crate::trust::TrustError;
use std::path::PathBuf;
use thiserror::Error;

/// Any failure of the program: one clear sentence, causes in `source`.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A GGUF file that was refused.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A data file or record that was refused.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The graph could not be recorded, built or run.
    #[error(transparent)]
    Graph(GraphError),
    /// llama.cpp refused.
    #[error(transparent)]
    Llama(#[from] LlamaError),
    /// A file could not be put in place.
    #[error(transparent)]
    Atomic(#[from] AtomicError),
    /// A patch that was refused.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// A patch store that was refused, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A patch that does not act.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// A key or a signature that was refused.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// What a runtime refuses.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A server that does not run.
    #[cfg(feature = "serve")]
    #[error(transparent)]
    Serve(#[from] crate::serve::ServeError),
    /// A PEFT adapter that was refused.
    #[cfg(feature = "peft")]
    #[error(transparent)]
    Peft(#[from] crate::patch::peft::PeftError),
    /// What is wrong with a merge, or with the linear algebra under it.
    #[cfg(feature = "merge")]
    #[error(transparent)]
    Merge(crate::merge::MergeError),
    /// What is wrong with training and its files.
    #[cfg(feature = "train")]
    #[error(transparent)]
    Train(crate::train::TrainError),
    /// What is wrong with evidence and its files.
    #[cfg(feature = "evidence")]
    #[error(transparent)]
    Evidence(crate::report::EvidenceError),
    /// Files that could not be put in place of others.
    #[error(transparent)]
    Replace(#[from] ReplaceError),
    /// A configuration file that was refused.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line and column.
        problem: String,
    },
    /// The user interrupted a run that can go on.
    #[error("interrupted after step {step}; the run is kept in {}", checkpoint.display())]
    Interrupted {
        /// Its checkpoint.
        checkpoint: PathBuf,
        /// Steps taken.
        step: u64,
    },
    /// The user interrupted an evaluation that can go on.
    #[error(
        "interrupted after {done} of {total} questions, which {} holds; --resume does the rest",
        partial.display()
    )]
    Stopped {
        /// Its partial log.
        partial: PathBuf,
        /// Questions kept.
        done: usize,
        /// Questions in all.
        total: usize,
    },
    /// No tensor has a direction that sets the forget set apart.
    #[error(
        "no tensor has a direction in which the forget set exceeds the retain set; \
         a lower --beta or a smaller --retain-rank leaves more"
    )]
    NothingToTrain,
    /// A GGUF that is not a model where a model was wanted.
    #[error("{}: wanted a model, found a GGUF of type {found:?}", path.display())]
    NotAModel {
        /// The file.
        path: PathBuf,
        /// Its `general.type`.
        found: String,
    },
    /// A file could not be read or written.
    #[error("{}: {doing} failed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A retain set that holds what is to be forgotten.
    #[error(
        "the retain set holds {} of the {} forget records{}: what is kept cannot be forgotten",
        .0.n_shared, .0.n_forget, if .0.identical { " and nothing else" } else { "" }
    )]
    Overlap(Overlap),
    /// Training ran away.
    #[error("{what} is not finite at step {step}; a lower learning rate may help")]
    NotFinite {
        /// What.
        what: &'static str,
        /// Optimiser step, from 1.
        step: u64,
    },
    /// A setting that cannot be used.
    #[error("{setting}: wanted {wanted}, found {found}")]
    Setting {
        /// The flag or configuration key.
        setting: &'static str,
        /// What it takes.
        wanted: String,
        /// What it was given.
        found: String,
    },
}

impl From<GraphError> for Error {
    fn from(e: GraphError) -> Self {
        match e {
            GraphError::Gguf(e) => Self::Gguf(e),
            GraphError::Llama(e) => Self::Llama(e),
            other => Self::Graph(other),
        }
    }
}

impl From<OpError> for Error {
    fn from(e: OpError) -> Self {
        Self::Graph(GraphError::Ggml(e))
    }
}

impl From<QuantError> for Error {
    fn from(e: QuantError) -> Self {
        Self::Graph(GraphError::Quant(e))
    }
}

impl From<DecodeError> for Error {
    fn from(e: DecodeError) -> Self {
        Self::Llama(LlamaError::Decode(e))
    }
}

impl Error {
    /// The process's exit code: 2 usage, 3 bad file, 4 signature or base mismatch,
    /// 5 quality gate not met, 6 resources, 7 committed but durability unknown, 8 engine.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setting { .. } | Self::Config { .. } | Self::NothingToTrain => 2,
            Self::Atomic(e) | Self::Gguf(GgufError::Atomic(e)) => match e {
                AtomicError::Exists { .. } | AtomicError::NoFileName { .. } => 2,
                AtomicError::Io { doing, .. } if *doing == "syncing the directory" => 7,
                AtomicError::Io { .. } => 6,
            },
            Self::Patch(PatchError::TooLarge { .. }) => 6,
            Self::Patch(e) if e.is_mismatch() => 4,
            Self::Replace(e) => e.exit_code(),
            Self::Runtime(e) => e.exit_code(),
            Self::Trust(e) => e.exit_code(),
            #[cfg(feature = "serve")]
            Self::Serve(e) => e.exit_code(),
            Self::Store(e) => e.exit_code(),
            #[cfg(feature = "merge")]
            Self::Merge(e) => e.exit_code(),
            #[cfg(feature = "train")]
            Self::Train(e) => e.exit_code(),
            #[cfg(feature = "evidence")]
            Self::Evidence(e) => e.exit_code(),
            #[cfg(feature = "peft")]
            Self::Peft(_) => 3,
            Self::Proof(_) => 4,
            Self::Interrupted { .. } | Self::Stopped { .. } => 130,
            Self::Patch(_)
            | Self::Overlap(_)
            | Self::Gguf(_)
            | Self::Data(_)
            | Self::NotAModel { .. } => 3,
            Self::Io { .. } | Self::Graph(GraphError::Ggml(OpError::Memory { .. })) => 6,
            Self::NotFinite { .. } | Self::Graph(_) | Self::Llama(_) => 8,
        }
    }
}

/// `?` takes errors of a group to [`Error`] as well: `$group` is the variant, `$inner` the group.
#[cfg(feature = "merge")]
macro_rules! into_error {
    ($group:ident($inner:ident): $($cause:ty),+) => {$(
        impl From<$cause> for $crate::error::Error {
            fn from(e: $cause) -> Self {
                Self::$group($inner::from(e))
            }
        }
    )+};
}
#[cfg(feature = "merge")]
pub(crate) use into_error;
