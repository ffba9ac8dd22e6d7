//! What can go wrong, and the exit code it means.

use crate::atomic::AtomicError;
use crate::data::{DataError, Overlap};
use crate::eval::tofu_log::LogError;
use crate::ggml::{DecodeError, LlamaError, OpError, QuantError};
use crate::gguf::GgufError;
use crate::graph::GraphError;
use crate::merge::error::RoundError;
use crate::merge::gate::GateError;
use crate::merge::imatrix::ImatrixError;
use crate::merge::moments::MomentsError;
use crate::merge::replace::ReplaceError;
use crate::merge::sketch::SketchError;
use crate::merge::undo::UndoError;
use crate::patch::PatchError;
use crate::patch::peft::PeftError;
use crate::project::ProjectError;
use crate::proof::ProofError;
use crate::report::ReportError;
use crate::runtime::RuntimeError;
use crate::score::PrivacyLogError;
use crate::score::tofu::PartialError;
use crate::store::StoreError;
use crate::subspace::SubspaceError;
use crate::subspace_file::SubspaceFileError;
use crate::train::checkpoint::CheckpointError;
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
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// A subspace file that was refused.
    #[error(transparent)]
    SubspaceFile(#[from] SubspaceFileError),
    /// An undo file that was refused.
    #[error(transparent)]
    Undo(#[from] UndoError),
    /// Files that could not be put in place of others.
    #[error(transparent)]
    Replace(#[from] ReplaceError),
    /// A checkpoint that was refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A configuration file that was refused.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line and column.
        problem: String,
    },
    /// No second moments for a merge.
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
    /// The user interrupted a run that can go on.
    #[error("interrupted after step {step}; the run is kept in {}", checkpoint.display())]
    Interrupted {
        /// Its checkpoint.
        checkpoint: PathBuf,
        /// Steps taken.
        step: u64,
    },
    /// A TOFU log that was refused.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A partial log that was refused.
    #[error(transparent)]
    Partial(#[from] PartialError),
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
    /// Outputs from which no subspace can be found.
    #[error(transparent)]
    Subspace(#[from] SubspaceError),
    /// Factors that do not fit together.
    #[error(transparent)]
    Project(#[from] ProjectError),
    /// Weights or second moments that cannot be rounded on.
    #[error(transparent)]
    Round(#[from] RoundError),
    /// Training ran away.
    #[error("{what} is not finite at step {step}; a lower learning rate may help")]
    NotFinite {
        /// What.
        what: &'static str,
        /// Optimiser step, from 1.
        step: u64,
    },
    /// A retain model's privacy report that was refused.
    #[error(transparent)]
    PrivacyLog(#[from] PrivacyLogError),
    /// A report that cannot be made, or whose verdict is not met.
    #[error(transparent)]
    Report(#[from] ReportError),
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
            Self::Setting { .. } => 2,
            Self::Atomic(e) | Self::Gguf(GgufError::Atomic(e)) => match e {
                AtomicError::Exists { .. } | AtomicError::NoFileName { .. } => 2,
                AtomicError::Io { doing, .. } if *doing == "syncing the directory" => 7,
                AtomicError::Io { .. } => 6,
            },
            Self::Patch(PatchError::TooLarge { .. }) => 6,
            Self::Patch(e) => {
                if e.is_mismatch() {
                    4
                } else {
                    3
                }
            }
            Self::Checkpoint(CheckpointError::Other { .. }) => 4,
            Self::Replace(e) => e.exit_code(),
            Self::Report(e) => e.exit_code(),
            Self::Runtime(e) => e.exit_code(),
            Self::Trust(e) => e.exit_code(),
            #[cfg(feature = "serve")]
            Self::Serve(e) => e.exit_code(),
            Self::Store(e) => e.exit_code(),
            Self::Proof(_) => 4,
            Self::Undo(UndoError::Io { .. }) => 6,
            Self::Undo(e) if e.is_mismatch() => 4,
            Self::Config { .. } => 2,
            Self::Interrupted { .. } | Self::Stopped { .. } => 130,
            Self::Partial(PartialError::Other { .. }) => 4,
            Self::Log(_) | Self::Partial(_) => 3,
            Self::NothingToTrain => 2,
            Self::SubspaceFile(SubspaceFileError::Base { .. }) => 4,
            Self::SubspaceFile(_) => 3,
            Self::Checkpoint(_)
            | Self::Undo(_)
            | Self::PrivacyLog(_)
            | Self::Peft(_)
            | Self::Overlap(_)
            | Self::Gguf(_)
            | Self::Data(_)
            | Self::NotAModel { .. } => 3,
            Self::Io { .. } => 6,
            Self::Graph(GraphError::Ggml(OpError::Memory { .. }))
            | Self::Moments(MomentsError::Memory { .. }) => 6,
            Self::Moments(MomentsError::NoTokens | MomentsError::NoSet { .. })
            | Self::Imatrix(_)
            | Self::Gate(GateError::NoSamples | GateError::Vocabulary { .. }) => 3,
            Self::Gate(_) => 5,
            Self::Sketch(e) => {
                if e.is_mismatch() {
                    4
                } else {
                    3
                }
            }
            Self::Moments(MomentsError::Budget { .. }) => 2,
            Self::Subspace(SubspaceError::Config { .. } | SubspaceError::RankAboveWidth { .. }) => {
                2
            }
            Self::Round(RoundError::Quant(_) | RoundError::NotPositive { .. }) => 8,
            Self::Round(_) => 3,
            Self::Subspace(_) | Self::Project(_) | Self::NotFinite { .. } => 8,
            Self::Graph(_) | Self::Llama(_) | Self::Moments(_) => 8,
        }
    }
}
