//! What can keep new files from their place.

use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why files could not be replaced. Unless said otherwise the old ones stand as they were.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReplaceError {
    #[error("{}: {doing} failed", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
    #[error("{}: the file exists already; wanted a free name, or --force to replace it", path.display())]
    Exists { path: PathBuf },
    #[error("{}: wanted a path that ends in a file name", path.display())]
    NoFileName { path: PathBuf },
    #[error("{}: wanted a regular file, found something else", path.display())]
    NotAFile { path: PathBuf },
    #[error("{}: is a symbolic link; in place wants the file it leads to, since other names may rely on that one", path.display())]
    Symlink { path: PathBuf },
    #[error("{}: another process is writing here", path.display())]
    Busy { path: PathBuf },
    #[error("{}: a merge was interrupted between the parts of this model; `nepenthe merge --recover -m` and its first part completes it", path.display())]
    Pending { path: PathBuf },
    #[error("{}: read back with sha256 {found}..., written with {wanted}...: the disk or memory is at fault", path.display())]
    ReadBack {
        path: PathBuf,
        wanted: String,
        found: String,
    },
    #[error("{}: {problem}", path.display())]
    Journal { path: PathBuf, problem: String },
    #[error("{}: the interrupted merge cannot be completed: wanted sha256 {wanted}... here or staged, found neither", path.display())]
    Lost { path: PathBuf, wanted: String },
    #[error("{}: wanted the previous file here, found none", path.display())]
    NoPrev { path: PathBuf },
}

impl ReplaceError {
    /// As [`Error::exit_code`](crate::Error::exit_code).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io { doing, .. } if *doing == "syncing the directory" => 7,
            Self::Io { .. } | Self::Busy { .. } | Self::ReadBack { .. } => 6,
            Self::Exists { .. }
            | Self::NoFileName { .. }
            | Self::NotAFile { .. }
            | Self::Symlink { .. }
            | Self::NoPrev { .. } => 2,
            Self::Pending { .. } | Self::Journal { .. } | Self::Lost { .. } => 3,
        }
    }
}

pub(super) fn failed(
    path: &Path,
    doing: &'static str,
) -> impl FnOnce(io::Error) -> ReplaceError + use<> {
    let path = path.to_owned();
    move |source| ReplaceError::Io {
        path,
        doing,
        source,
    }
}
