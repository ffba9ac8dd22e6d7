//! What can be wrong with an undo file.

use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why an undo file is refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UndoError {
    #[error("{}: {doing} failed", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
    #[error("{}: wanted an undo file (magic `nepUNDO` at byte 0), found `{}`", path.display(), found.escape_ascii())]
    Magic { path: PathBuf, found: Vec<u8> },
    #[error("{}: wanted undo version {wanted} at byte 8, found {found}: this file needs another nepenthe", path.display())]
    Version {
        path: PathBuf,
        wanted: u32,
        found: u32,
    },
    #[error("{}: the file ends inside {what}: wanted {wanted} bytes at byte {offset}, found {left}", path.display())]
    End {
        path: PathBuf,
        what: &'static str,
        offset: u64,
        wanted: u64,
        left: u64,
    },
    #[error("{}: wanted 1 to {max} {what} at byte {offset}, found {found}", path.display())]
    Count {
        path: PathBuf,
        what: &'static str,
        offset: u64,
        found: u64,
        max: u64,
    },
    #[error("{}: {what}: wanted at most {max} bytes at byte {offset}, found {found}", path.display())]
    Length {
        path: PathBuf,
        what: String,
        offset: u64,
        found: u64,
        max: u64,
    },
    #[error("{}: the text at byte {offset}: {problem}", path.display())]
    Text {
        path: PathBuf,
        offset: u64,
        problem: String,
    },
    #[error("{}: wanted a file of {wanted} bytes, as its header says, found {found}", path.display())]
    FileLength {
        path: PathBuf,
        wanted: u64,
        found: u64,
    },
    #[error("{}: the undo file is damaged: its bytes have sha256 {found}..., its last 32 say {wanted}...", path.display())]
    Damaged {
        path: PathBuf,
        wanted: String,
        found: String,
    },
    #[error("{}: part {part}, byte {at} of the inflated body", path.display())]
    Body {
        path: PathBuf,
        part: usize,
        at: u64,
        #[source]
        problem: BodyError,
    },
    #[error("{}: part {part}: wanted the original's sha256 {wanted}..., rebuilt {found}...", path.display())]
    Rebuilt {
        path: PathBuf,
        part: usize,
        wanted: String,
        found: String,
    },
    #[error("{}: {} is the original already: this undo has been applied", path.display(), model.display())]
    Original { path: PathBuf, model: PathBuf },
    #[error("{0}")]
    Other(Box<Mismatch>),
}

/// An undo file and a model that is not the one it was made for.
#[allow(missing_docs, reason = "the message says what each field holds")]
#[derive(Debug, Error)]
#[error(
    "{}: takes back {} from {name} (sha256 {wanted}..., {n_wanted} file(s)); {} is another file (sha256 {found}..., {n_found} file(s)){}",
    path.display(),
    if takes_back.is_empty() { "the changes" } else { takes_back },
    model.display(),
    last.as_ref().map_or(String::new(), |l| format!(", whose last merged patch is {l}: revert that one first"))
)]
pub struct Mismatch {
    pub path: PathBuf,
    pub model: PathBuf,
    pub name: String,
    pub wanted: String,
    pub n_wanted: usize,
    pub takes_back: String,
    pub found: String,
    pub n_found: usize,
    pub last: Option<String>,
}

impl UndoError {
    /// Whether the undo file is well formed and for another model.
    pub fn is_mismatch(&self) -> bool {
        matches!(
            self,
            Self::Version { .. } | Self::Original { .. } | Self::Other(_)
        )
    }
}

/// What is wrong inside the body.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BodyError {
    #[error("the body cannot be inflated")]
    Inflate(#[from] io::Error),
    #[error("wanted a block kind from 0 to 2, found {found}")]
    Kind { found: u8 },
    #[error("wanted a number of at most 64 bits")]
    Number,
    #[error("wanted a merged part below {max}, found {found}")]
    Part { found: u64, max: u64 },
    #[error("bytes {offset} to {offset} + {len} of merged part {part} lie outside its {max} bytes")]
    Range {
        part: u64,
        offset: u64,
        len: u64,
        max: u64,
    },
    #[error("wanted a block of 1 to {max} bytes, found {found}")]
    BlockLength { found: u64, max: u64 },
    #[error("wanted 1 to {max} runs in a block, found {found}")]
    Runs { found: u64, max: u64 },
    #[error("a run of {found} bytes with {left} left in its block")]
    Run { found: u64, left: u64 },
    #[error("the body goes on after the last part")]
    Trailing,
}
