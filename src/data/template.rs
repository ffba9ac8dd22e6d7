//! Chat templates: the Jinja text a GGUF carries, rendered as Hugging Face's `apply_chat_template`
//! does it (`trim_blocks`, `lstrip_blocks`, Python string methods, `raise_exception`,
//! `strftime_now`, a `tojson` that does not escape HTML).

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Environment, Error, ErrorKind, Value, context, value::Kwargs};
use serde::Serialize;

use super::error::DataError;
use super::record::Message;

/// Where the layout of a conversation comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Template {
    /// The Jinja source of `tokenizer.chat_template`.
    Gguf(String),
    /// A Jinja source of the user's.
    File {
        /// Its file, for messages.
        path: PathBuf,
        /// Its text.
        source: String,
    },
    /// Plain `Question:`/`Answer:` lines.
    None,
}

impl Template {
    /// Reads a template file.
    pub fn from_file(path: &Path) -> Result<Self, DataError> {
        let source = std::fs::read_to_string(path).map_err(|source| DataError::Read {
            path: path.into(),
            source,
        })?;
        Ok(Template::File {
            path: path.into(),
            source,
        })
    }

    /// In words, for messages and provenance.
    pub fn origin(&self) -> String {
        match self {
            Template::Gguf(_) => "the GGUF".to_owned(),
            Template::File { path, .. } => path.display().to_string(),
            Template::None => "none".to_owned(),
        }
    }

    /// Parses the template once for many records; `None` for [`Template::None`].
    ///
    /// `bos` and `eos` are the texts of those tokens, empty where the vocabulary has none.
    /// `strftime_now` sees the present time, in UTC.
    pub fn compile(&self, bos: &str, eos: &str) -> Result<Option<ChatTemplate>, DataError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |elapsed| elapsed.as_secs());
        self.compile_at(bos, eos, now)
    }

    /// [`Template::compile`] with the time in Unix seconds, for templates that print the date and
    /// runs that must be repeatable.
    pub fn compile_at(
        &self,
        bos: &str,
        eos: &str,
        now: u64,
    ) -> Result<Option<ChatTemplate>, DataError> {
        let (Template::Gguf(source) | Template::File { source, .. }) = self else {
            return Ok(None);
        };
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", move |format: String| strftime(&format, now));
        env.add_filter("tojson", to_json);
        // HF's dialect marks assistant text for masks; the tags print nothing.
        let source = drop_generation_tags(source);
        env.add_template_owned("chat", source)
            .map_err(|source| DataError::Template {
                origin: self.origin(),
                source,
            })?;
        Ok(Some(ChatTemplate {
            env,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            origin: self.origin(),
        }))
    }
}

/// A parsed template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
    origin: String,
}

#[derive(Serialize)]
struct Turn<'a> {
    role: &'a str,
    content: &'a str,
}

impl ChatTemplate {
    /// The conversation as text; `add_generation_prompt` opens the assistant's next turn.
    /// `record` (from 1) is for the error message only.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        record: usize,
    ) -> Result<String, DataError> {
        let messages: Vec<Turn> = messages
            .iter()
            .map(|message| Turn {
                role: message.role.as_str(),
                content: &message.content,
            })
            .collect();
        self.env
            .get_template("chat")
            .and_then(|template| {
                template.render(context! {
                    messages,
                    add_generation_prompt,
                    bos_token => self.bos,
                    eos_token => self.eos,
                    tools => Value::from(()),
                    documents => Value::from(()),
                })
            })
            .map_err(|source| DataError::Render {
                record,
                origin: self.origin.clone(),
                source,
            })
    }
}

/// Removes `{% generation %}` and `{% endgeneration %}`, whose white-space control is kept by
/// turning them into empty comments.
fn drop_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(len) = rest[open..].find("%}") else {
            break;
        };
        let tag = &rest[open..open + len + 2];
        let inner = &tag[2..tag.len() - 2];
        let name = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..open]);
        if name == "generation" || name == "endgeneration" {
            let left = if inner.starts_with('-') { "-" } else { "" };
            let right = if inner.ends_with('-') { "-" } else { "" };
            out.push_str(&format!("{{#{left} {right}#}}"));
        } else {
            out.push_str(tag);
        }
        rest = &rest[open + len + 2..];
    }
    out.push_str(rest);
    out
}

/// `tojson` with Python's `json.dumps(ensure_ascii=False)` spacing, `indent` included.
fn to_json(value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(&value).map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "cannot write as JSON").with_source(error)
    })?;
    let mut out = String::new();
    write_json(&json, indent, 0, &mut out);
    Ok(out)
}

fn write_json(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    use serde_json::Value as Json;
    let (open, close, n_items) = match value {
        Json::Array(items) => ('[', ']', items.len()),
        Json::Object(map) => ('{', '}', map.len()),
        scalar => {
            out.push_str(&scalar.to_string());
            return;
        }
    };
    let new_line = |depth: usize, out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(indent * depth));
        }
    };
    let separate = |i: usize, out: &mut String| {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        new_line(depth + 1, out);
    };
    out.push(open);
    match value {
        Json::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                separate(i, out);
                write_json(item, indent, depth + 1, out);
            }
        }
        Json::Object(map) => {
            for (i, (key, item)) in map.iter().enumerate() {
                separate(i, out);
                out.push_str(&Json::from(key.as_str()).to_string());
                out.push_str(": ");
                write_json(item, indent, depth + 1, out);
            }
        }
        _ => {}
    }
    if n_items > 0 {
        new_line(depth, out);
    }
    out.push(close);
}

/// Date and time in UTC, for people.
pub fn utc_now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    strftime("%F %H:%M UTC", now.map_or(0, |t| t.as_secs()))
}

/// The parts of C's `strftime` that chat templates use; unknown conversions stay as they are.
fn strftime(format: &str, unix_seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let n_days = unix_seconds / 86_400;
    let (year, month, day) = civil(n_days);
    let (hour, minute) = (unix_seconds / 3600 % 24, unix_seconds / 60 % 60);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(n_days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&format!("{year}")),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{:02}", unix_seconds % 60)),
            Some('F') => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of the Gregorian calendar for a day counted from 1970-01-01.
fn civil(n_days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| {
        (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
    };
    // 146,097 days make 400 years, so whole spans of them change nothing but the year.
    let (spans, mut left) = (n_days / 146_097, n_days % 146_097);
    let mut year = 1970 + 400 * spans;
    while left >= 365 + u64::from(is_leap(year)) {
        left -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
