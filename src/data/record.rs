//! Files into records: JSON Lines, a JSON array, or plain text.
//!
//! Takes a path; gives [`Record`]s in file order. The four JSON layouts are `question`/`answer`,
//! `prompt`/`completion`, `messages` (a list of `role`/`content`) and `text`; other keys are
//! ignored. Files named `.json`, `.jsonl` or `.ndjson` are JSON, everything else is plain text.

use std::path::Path;

use serde_json::{Map, Value, value::RawValue};

use super::error::{DataError, RecordProblem};

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Standing instructions.
    System,
    /// The question.
    User,
    /// The answer, whose tokens carry the loss.
    Assistant,
}

impl Role {
    /// The name chat templates know.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// One training or evaluation example.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Record {
    /// A question and its answer.
    Qa {
        /// The question.
        question: String,
        /// The answer.
        answer: String,
    },
    /// A prompt and the text that continues it.
    Completion {
        /// What comes before; may be empty.
        prompt: String,
        /// What follows, leading space included.
        completion: String,
    },
    /// A conversation that ends with an assistant turn.
    Messages(Vec<Message>),
    /// Running text, all of which carries the loss.
    Text(String),
}

impl Record {
    /// The record as chat turns; `None` for running text.
    pub fn turns(&self) -> Option<Vec<Message>> {
        let pair = |user: &str, assistant: &str| {
            vec![
                Message {
                    role: Role::User,
                    content: user.to_owned(),
                },
                Message {
                    role: Role::Assistant,
                    content: assistant.to_owned(),
                },
            ]
        };
        match self {
            Record::Qa { question, answer } => Some(pair(question, answer)),
            Record::Completion { prompt, completion } => Some(pair(prompt, completion)),
            Record::Messages(messages) => Some(messages.clone()),
            Record::Text(_) => None,
        }
    }

    /// The same question with another answer; `None` for running text, which asks nothing.
    pub fn answered(&self, answer: &str) -> Option<Self> {
        let answer = answer.trim();
        Some(match self {
            Record::Qa { question, .. } => Record::Qa {
                question: question.clone(),
                answer: answer.to_owned(),
            },
            Record::Completion { prompt, .. } => Record::Completion {
                prompt: prompt.clone(),
                completion: format!(" {answer}"),
            },
            Record::Messages(messages) => {
                let (_, before) = messages.split_last()?;
                let last = Message {
                    role: Role::Assistant,
                    content: answer.to_owned(),
                };
                Record::Messages(before.iter().cloned().chain([last]).collect())
            }
            Record::Text(_) => return None,
        })
    }

    /// The text of the last answer (all of it for running text): what ROUGE compares with.
    pub fn answer(&self) -> &str {
        match self {
            Record::Qa { answer, .. } => answer,
            Record::Completion { completion, .. } => completion,
            Record::Messages(messages) => messages.last().map_or("", |m| &m.content),
            Record::Text(text) => text,
        }
    }
}

/// Reads every record of a file.
///
/// A UTF-8 byte order mark and CRLF line ends are accepted. Errors name the file, the line, what
/// was wanted and what was found.
pub fn load_records(path: &Path) -> Result<Vec<Record>, DataError> {
    let text = read_text(path)?;
    let records = if is_json(path) {
        parse_json(&text, path)?
    } else {
        parse_text(&text).into_iter().map(Record::Text).collect()
    };
    if records.is_empty() {
        return Err(DataError::Empty { path: path.into() });
    }
    Ok(records)
}

/// Reads the non-blank lines of a plain list, such as TOFU's `idontknow.jsonl`, which is a list
/// of sentences and not JSON in spite of its name.
pub fn load_lines(path: &Path) -> Result<Vec<String>, DataError> {
    let text = read_text(path)?;
    let lines: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect();
    if lines.is_empty() {
        return Err(DataError::Empty { path: path.into() });
    }
    Ok(lines)
}

pub(super) fn is_json(path: &Path) -> bool {
    path.extension()
        .and_then(|extension| extension.to_str())
        .is_some_and(|extension| {
            ["json", "jsonl", "ndjson"]
                .iter()
                .any(|known| extension.eq_ignore_ascii_case(known))
        })
}

pub(super) fn read_text(path: &Path) -> Result<String, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Read {
        path: path.into(),
        source,
    })?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        DataError::Utf8 {
            path: path.into(),
            line: line_at(error.as_bytes(), offset),
            offset,
        }
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// The line, from 1, on which byte `offset` stands.
fn line_at(bytes: &[u8], offset: usize) -> usize {
    1 + bytes[..offset].iter().filter(|&&b| b == b'\n').count()
}

/// Splits plain text into paragraphs at blank lines, or into lines where there are none.
pub fn parse_text(text: &str) -> Vec<String> {
    let text = text.replace("\r\n", "\n");
    let text = text.trim();
    let has_blank_line = text.lines().any(|line| line.trim().is_empty());
    if !has_blank_line {
        return text.lines().map(|line| line.trim().to_owned()).collect();
    }
    let mut paragraphs = Vec::new();
    let mut current = String::new();
    for line in text.lines() {
        if line.trim().is_empty() {
            if !current.is_empty() {
                paragraphs.push(std::mem::take(&mut current));
            }
            continue;
        }
        if !current.is_empty() {
            current.push('\n');
        }
        current.push_str(line.trim_end());
    }
    if !current.is_empty() {
        paragraphs.push(current);
    }
    paragraphs
}

/// Parses JSON Lines, a JSON array of records, or one record written over several lines.
/// `path` is for error messages only.
pub fn parse_json(text: &str, path: &Path) -> Result<Vec<Record>, DataError> {
    parse_objects(text, path, record)
}

/// [`parse_json`] for any kind of record: `make` turns one JSON value into it.
pub(super) fn parse_objects<T>(
    text: &str,
    path: &Path,
    make: impl Fn(Value) -> Result<T, RecordProblem>,
) -> Result<Vec<T>, DataError> {
    let body = text.trim_start();
    let first_line = line_at(text.as_bytes(), text.len() - body.len());
    let whole_file_is_one_value = body.starts_with('[')
        || (body.starts_with('{')
            && body.lines().next().is_some_and(|line| {
                serde_json::from_str::<&RawValue>(line).is_err_and(|e| e.is_eof())
            }));
    if whole_file_is_one_value {
        match parse_one_value(text, path, &make) {
            // A first line cut off in mid-value may also be a damaged JSON Lines file.
            Err(DataError::Json { .. }) if body.starts_with('{') => {}
            parsed => return parsed,
        }
    }
    let mut records = Vec::new();
    for (i, line) in text.lines().enumerate().skip(first_line - 1) {
        if line.trim().is_empty() {
            continue;
        }
        let value: Value =
            serde_json::from_str(line).map_err(|source| json_error(path, i + 1, line, source))?;
        records.push(make(value).map_err(|problem| at(path, i + 1, problem))?);
    }
    Ok(records)
}

/// The whole text as one JSON value: an array of records or a single record.
fn parse_one_value<T>(
    text: &str,
    path: &Path,
    make: &impl Fn(Value) -> Result<T, RecordProblem>,
) -> Result<Vec<T>, DataError> {
    let broken = |source: serde_json::Error| {
        let line = source.line().max(1);
        json_error(path, line, text.lines().nth(line - 1).unwrap_or(""), source)
    };
    let raws: Vec<&RawValue> = if text.trim_start().starts_with('[') {
        serde_json::from_str(text).map_err(broken)?
    } else {
        vec![serde_json::from_str(text).map_err(broken)?]
    };
    let mut records = Vec::with_capacity(raws.len());
    // Raw values borrow from `text`, so their addresses say where they stand in it.
    let (mut line, mut seen) = (1, 0);
    for raw in raws {
        let start = raw.get().as_ptr() as usize - text.as_ptr() as usize;
        line += line_at(&text.as_bytes()[seen..], start - seen) - 1;
        seen = start;
        let value: Value = serde_json::from_str(raw.get()).map_err(broken)?;
        records.push(make(value).map_err(|problem| at(path, line, problem))?);
    }
    Ok(records)
}

fn json_error(path: &Path, line: usize, found: &str, source: serde_json::Error) -> DataError {
    let mut start: String = found.trim().chars().take(40).collect();
    if start.len() < found.trim().len() {
        start.push('…');
    }
    let found = if start.is_empty() {
        "the end of the file".to_owned()
    } else {
        format!("`{start}`")
    };
    DataError::Json {
        path: path.into(),
        line,
        found,
        source,
    }
}

pub(super) fn at(path: &Path, line: usize, problem: RecordProblem) -> DataError {
    DataError::Record {
        path: path.into(),
        line,
        problem,
    }
}

/// One JSON value into a record. A complete layout wins over an incomplete one.
fn record(value: Value) -> Result<Record, RecordProblem> {
    let Value::Object(map) = value else {
        return Err(RecordProblem::NotAnObject {
            found: type_name(&value),
        });
    };
    if let Some(messages) = map.get("messages") {
        return parse_messages(messages);
    }
    if map.contains_key("question") && map.contains_key("answer") {
        return Ok(Record::Qa {
            question: text_at(&map, "question", true)?,
            answer: text_at(&map, "answer", true)?,
        });
    }
    if map.contains_key("prompt") && map.contains_key("completion") {
        return Ok(Record::Completion {
            prompt: text_at(&map, "prompt", false)?,
            completion: text_at(&map, "completion", true)?,
        });
    }
    if map.contains_key("text") {
        return Ok(Record::Text(text_at(&map, "text", true)?));
    }
    let halves = [
        ("question", "answer"),
        ("answer", "question"),
        ("prompt", "completion"),
        ("completion", "prompt"),
    ];
    if let Some((present, missing)) = halves.into_iter().find(|(key, _)| map.contains_key(*key)) {
        return Err(RecordProblem::HalfPair { present, missing });
    }
    Err(RecordProblem::UnknownKeys {
        found: keys_of(&map),
    })
}

/// The first few keys, for messages.
pub(super) fn keys_of(map: &Map<String, Value>) -> String {
    let keys: Vec<String> = map.keys().take(8).map(|key| format!("`{key}`")).collect();
    if keys.is_empty() {
        "no keys".to_owned()
    } else {
        keys.join(", ")
    }
}

fn parse_messages(value: &Value) -> Result<Record, RecordProblem> {
    let wrong = |key: String, wanted, value: &Value| RecordProblem::WrongType {
        key,
        wanted,
        found: type_name(value),
    };
    let Value::Array(items) = value else {
        return Err(wrong("messages".into(), "a list", value));
    };
    let mut messages = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let Value::Object(map) = item else {
            return Err(wrong(format!("messages[{index}]"), "an object", item));
        };
        let text = |missing: &'static str| match map.get(missing) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(wrong(
                format!("messages[{index}].{missing}"),
                "a string",
                other,
            )),
            None => Err(RecordProblem::MessageKey { index, missing }),
        };
        let role = match text("role")?.as_str() {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            role => {
                return Err(RecordProblem::UnknownRole {
                    index,
                    role: role.to_owned(),
                });
            }
        };
        let content = text("content")?;
        if content.trim().is_empty() && role == Role::Assistant {
            return Err(RecordProblem::EmptyText {
                key: format!("messages[{index}].content"),
            });
        }
        messages.push(Message { role, content });
    }
    // Turns after the last answer have no answer of their own.
    let last = messages.iter().rposition(|m| m.role == Role::Assistant);
    match last {
        Some(last) => {
            messages.truncate(last + 1);
            Ok(Record::Messages(messages))
        }
        None => Err(RecordProblem::NoAssistant {
            n_messages: messages.len(),
        }),
    }
}

pub(super) fn text_at(
    map: &Map<String, Value>,
    key: &'static str,
    needs_text: bool,
) -> Result<String, RecordProblem> {
    match &map[key] {
        Value::String(text) if needs_text && text.trim().is_empty() => {
            Err(RecordProblem::EmptyText { key: key.into() })
        }
        Value::String(text) => Ok(text.clone()),
        other => Err(RecordProblem::WrongType {
            key: key.into(),
            wanted: "a string",
            found: type_name(other),
        }),
    }
}

pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
