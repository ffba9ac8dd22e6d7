//! What can be wrong with a data file, a record or a template.

use std::path::PathBuf;

use super::sample::TokenizeError;

/// A mistake in the user's data. Lines and records count from 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not UTF-8.
    #[error("{}:{line}: wanted UTF-8 text, found an invalid byte at offset {offset}", path.display())]
    Utf8 {
        /// The file.
        path: PathBuf,
        /// Line of the first invalid byte.
        line: usize,
        /// Its offset from the start of the file.
        offset: usize,
    },
    /// The file holds no record.
    #[error("{}: wanted at least one record, found an empty file", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line is not JSON.
    #[error("{}:{line}: wanted one JSON object per line, found {found}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The start of the offending text.
        found: String,
        /// The parser's reason; its position counts from `line`.
        source: serde_json::Error,
    },
    /// A record is JSON but not a usable record.
    #[error("{}:{line}: {problem}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The line on which the record starts.
        line: usize,
        /// What was wanted and what was found.
        problem: RecordProblem,
    },
    /// The chat template cannot be compiled.
    #[error("the chat template from {origin} does not compile")]
    Template {
        /// Where it came from: "the GGUF" or a file name.
        origin: String,
        /// The template engine's reason, with its line.
        source: minijinja::Error,
    },
    /// The chat template refuses a record.
    #[error("record {record}: the chat template from {origin} cannot render it")]
    Render {
        /// The record's number in its set.
        record: usize,
        /// Where the template came from.
        origin: String,
        /// The template engine's reason.
        source: minijinja::Error,
    },
    /// The tokenizer failed.
    #[error("record {record}: cannot be tokenised")]
    Tokenize {
        /// The record's number in its set.
        record: usize,
        /// The tokenizer's reason.
        source: TokenizeError,
    },
    /// The length limit leaves no room for a prompt and an answer.
    #[error("wanted a sample length of at least {min} tokens, got {max_tokens}")]
    MaxTokens {
        /// The limit asked for.
        max_tokens: usize,
        /// The least that works.
        min: usize,
    },
    /// A directory without question files.
    #[error("{}: wanted .csv, .json or .jsonl files in the directory, found none", path.display())]
    NoFiles {
        /// The directory.
        path: PathBuf,
    },
    /// A subject without solved questions.
    #[error("{}: wanted a file with solved questions on `{subject}`, found none", path.display())]
    NoShots {
        /// Where they were looked for.
        path: PathBuf,
        /// The subject.
        subject: String,
    },
    /// Fewer solved questions than asked for.
    #[error("{}: wanted {wanted} solved questions, found {found}", path.display())]
    FewShots {
        /// The file.
        path: PathBuf,
        /// How many were asked for.
        wanted: usize,
        /// How many there are.
        found: usize,
    },
    /// Every record was too short to carry a loss.
    #[error("wanted at least one record of two tokens or more, found none among {n_records}")]
    NoSamples {
        /// How many records there were.
        n_records: usize,
    },
}

/// What is wrong with one record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordProblem {
    /// Not an object.
    #[error("wanted a JSON object, found {found}")]
    NotAnObject {
        /// Its JSON type.
        found: &'static str,
    },
    /// None of the known layouts.
    #[error(
        "wanted `question` and `answer`, `prompt` and `completion`, `messages`, or `text`, found {found}"
    )]
    UnknownKeys {
        /// The keys it has.
        found: String,
    },
    /// One half of a pair.
    #[error("`{present}` needs `{missing}` beside it")]
    HalfPair {
        /// The key that is there.
        present: &'static str,
        /// The key that is not.
        missing: &'static str,
    },
    /// A key that this kind of file must have.
    #[error("wanted `{key}`, found {found}")]
    MissingKey {
        /// The key.
        key: &'static str,
        /// The keys it has.
        found: String,
    },
    /// A value of the wrong type.
    #[error("wanted {wanted} in `{key}`, found {found}")]
    WrongType {
        /// The key, as a path inside the record.
        key: String,
        /// The type wanted.
        wanted: &'static str,
        /// The type found.
        found: &'static str,
    },
    /// A text that must say something says nothing.
    #[error("`{key}` is empty")]
    EmptyText {
        /// The key, as a path inside the record.
        key: String,
    },
    /// A message without one of its two keys.
    #[error("messages[{index}] has no `{missing}`")]
    MessageKey {
        /// Which message, from 0.
        index: usize,
        /// `role` or `content`.
        missing: &'static str,
    },
    /// A role nobody knows.
    #[error("messages[{index}]: wanted role system, user or assistant, found `{role}`")]
    UnknownRole {
        /// Which message, from 0.
        index: usize,
        /// The role found.
        role: String,
    },
    /// Nothing to learn or to forget.
    #[error("wanted at least one assistant turn in `messages`, found {n_messages} without")]
    NoAssistant {
        /// How many messages there are.
        n_messages: usize,
    },
    /// Not a question with four choices.
    #[error("wanted 4 choices, found {found}")]
    Choices {
        /// How many there are.
        found: usize,
    },
    /// An answer that names none of the four choices.
    #[error("wanted an answer from 0 to 3 or from A to D, found {found}")]
    Answer {
        /// What stands there.
        found: String,
    },
    /// A CSV row with too many or too few fields.
    #[error("wanted {wanted} fields, found {found}")]
    Fields {
        /// The header's number, or six where there is none.
        wanted: usize,
        /// The row's.
        found: usize,
    },
    /// A CSV header without the columns of a question.
    #[error("wanted columns question, choice0 to choice3 (or A to D) and answer, found {found}")]
    Header {
        /// The columns that are there.
        found: String,
    },
}
