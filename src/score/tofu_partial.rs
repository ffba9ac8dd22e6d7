//! The finished blocks of a TOFU evaluation that is under way, beside its log: JSON Lines, the
//! first of which says what is evaluated, each further one a block. A half-written last line is
//! dropped.

use crate::error::Error;
use crate::eval::tofu::{Example, Split};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Why a partial log cannot be continued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PartialError {
    /// Not one of ours.
    #[error(
        "{}:{line}: wanted the partial log of an evaluation, found something else", path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// Begun under other circumstances.
    #[error("{}: the evaluation was begun with another {key}: {found}, now {wanted}", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs.
        key: String,
        /// Its value now.
        wanted: String,
        /// Its value in the file.
        found: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Block {
    split: Split,
    first: usize,
    examples: Vec<Example>,
}

/// Blocks that are done, and where new ones are kept.
#[derive(Default)]
pub struct Partial {
    blocks: Vec<Block>,
    file: Option<(PathBuf, File)>,
}

impl Partial {
    /// Keeps nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Begins a partial log at `path`, replacing what is there. `run` says what is evaluated.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin(path: &Path, run: &Map<String, Value>) -> Result<Self, Error> {
        let failed = io_error(path, "writing");
        let mut file = File::create(path).map_err(failed)?;
        write_line(&mut file, run).map_err(io_error(path, "writing"))?;
        Ok(Self {
            blocks: Vec::new(),
            file: Some((path.to_owned(), file)),
        })
    }

    /// Continues the partial log at `path`.
    ///
    /// # Errors
    /// A file that cannot be read, is no partial log, or is that of another `run`.
    pub fn resume(path: &Path, run: &Map<String, Value>) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(io_error(path, "reading"))?;
        // What follows the last line end was being written when the run ended.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let malformed = |line| {
            move |source| PartialError::Malformed {
                path: path.to_owned(),
                line,
                source,
            }
        };
        let mut lines = text[..whole].lines();
        let begun: Map<String, Value> =
            serde_json::from_str(lines.next().unwrap_or("")).map_err(malformed(1))?;
        let keys = run.keys().chain(begun.keys());
        if let Some(key) = keys.into_iter().find(|k| run.get(*k) != begun.get(*k)) {
            let of = |map: &Map<String, Value>| map.get(key).unwrap_or(&Value::Null).to_string();
            return Err(PartialError::Other {
                path: path.to_owned(),
                key: key.clone(),
                wanted: of(run),
                found: of(&begun),
            }
            .into());
        }
        let blocks = lines
            .enumerate()
            .map(|(i, line)| serde_json::from_str(line).map_err(malformed(i + 2)))
            .collect::<Result<_, _>>()?;
        let file = File::options().append(true).open(path);
        let file = file.map_err(io_error(path, "opening"))?;
        file.set_len(whole as u64)
            .map_err(io_error(path, "writing"))?;
        Ok(Self {
            blocks,
            file: Some((path.to_owned(), file)),
        })
    }

    /// Where the blocks are kept.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|(path, _)| path.as_path())
    }

    /// The block of `n` questions of `split` from `first`, if it is done.
    pub fn block(&self, split: Split, first: usize, n: usize) -> Option<&[Example]> {
        let found = self
            .blocks
            .iter()
            .find(|b| b.split == split && b.first == first && b.examples.len() == n);
        found.map(|b| b.examples.as_slice())
    }

    /// Keep a block; nothing without a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&mut self, split: Split, first: usize, examples: &[Example]) -> Result<(), Error> {
        if let Some((path, file)) = &mut self.file {
            let block = Block {
                split,
                first,
                examples: examples.to_vec(),
            };
            write_line(file, &block).map_err(io_error(path, "writing"))?;
        }
        Ok(())
    }

    /// Remove the file: the log itself is in place.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn finish(self) -> Result<(), Error> {
        match self.file {
            Some((path, _)) => {
                std::fs::remove_file(&path).map_err(io_error(&path, "removing the partial log"))
            }
            None => Ok(()),
        }
    }
}

fn io_error(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        path,
        doing,
        source,
    }
}

/// One write of a whole line, on the disk before the next block begins.
fn write_line(file: &mut File, value: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    file.write_all(&line)?;
    file.sync_data()
}
