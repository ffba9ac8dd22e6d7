//! Multiple-choice questions: WMDP's JSON and MMLU's CSV into the prompts they are asked with.
//!
//! The prompt is that of lm-evaluation-harness (tasks `mmlu` and `wmdp_bio`, `wmdp_chem`,
//! `wmdp_cyber`, which share it): a line naming the topic and a blank line; each solved question
//! followed by its letter and a blank line; the question, four lettered choices and `Answer:`.
//! The answer continues it with a space and a letter.
//!
//! WMDP (Li et al., arXiv 2403.03218): objects with `question`, `choices` and `answer`, as a JSON
//! array or JSON Lines. MMLU (Hendrycks et al., arXiv 2009.03300): question, four choices and
//! answer, with or without a header. Both take an answer as 0 to 3 or A to D.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::{DataError, RecordProblem};
use super::record::{at, parse_objects, read_text, type_name};

/// The names of the choices, in order.
pub const LETTERS: [char; 4] = ['A', 'B', 'C', 'D'];

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What is asked.
    pub question: String,
    /// The choices, in the order of [`LETTERS`].
    pub choices: [String; 4],
    /// Index of the right one.
    pub answer: usize,
}

/// The questions of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The file's name without `_test`, `_val`, `_dev` or `_questions`.
    pub name: String,
    /// What the prompt says the questions are about.
    pub topic: String,
    /// Where they came from.
    pub path: PathBuf,
    /// In file order, never empty.
    pub questions: Vec<Question>,
}

/// How a file of questions is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ChoiceFormat {
    /// WMDP where the file begins as JSON does, else MMLU.
    #[default]
    Auto,
    /// JSON objects.
    Wmdp,
    /// CSV.
    Mmlu,
}

impl Subject {
    /// The prompt for `question`, after `shots`. A shot that is the question itself is left out,
    /// as the harness does.
    pub fn prompt(&self, shots: &[Question], question: &Question) -> String {
        let mut prompt = format!(
            "The following are multiple choice questions (with answers) about {}.\n\n",
            self.topic
        );
        for shot in shots.iter().filter(|&shot| shot != question) {
            shot.ask(&mut prompt);
            prompt.push(' ');
            prompt.push(LETTERS[shot.answer]);
            prompt.push_str("\n\n");
        }
        question.ask(&mut prompt);
        prompt
    }
}

impl Question {
    fn ask(&self, prompt: &mut String) {
        prompt.push_str(self.question.trim());
        for (letter, choice) in LETTERS.iter().zip(&self.choices) {
            // The harness trims the question and not the choices.
            prompt.push_str(&format!("\n{letter}. {choice}"));
        }
        prompt.push_str("\nAnswer:");
    }
}

/// Reads files of questions, one subject each; of a directory every `.csv`, `.json`, `.jsonl` and
/// `.ndjson` file, by name. `topic` replaces the topic that the names give.
///
/// # Errors
/// Files that cannot be read or hold something else; each names file, line, wanted and found.
pub fn load_subjects(
    paths: &[PathBuf],
    format: ChoiceFormat,
    topic: Option<&str>,
) -> Result<Vec<Subject>, DataError> {
    let mut subjects = Vec::new();
    for path in paths {
        for file in question_files(path)? {
            let (questions, format) = load_questions(&file, format)?;
            let name = subject_name(&file);
            let topic = topic.map_or_else(|| topic_of(&name, format), str::to_owned);
            subjects.push(Subject {
                name,
                topic,
                path: file,
                questions,
            });
        }
    }
    Ok(subjects)
}

/// The first `n` solved questions for each subject: from `dev` itself, or from the file of the
/// subject's name where `dev` is a directory.
///
/// # Errors
/// As [`load_subjects`]; a subject without a file, or a file with fewer questions.
pub fn load_shots(
    dev: &Path,
    n: usize,
    format: ChoiceFormat,
    subjects: &[Subject],
) -> Result<Vec<Vec<Question>>, DataError> {
    let files = question_files(dev)?;
    let of = |subject: &Subject| {
        let file = if dev.is_dir() {
            files.iter().find(|file| subject_name(file) == subject.name)
        } else {
            files.first()
        };
        let file = file.ok_or_else(|| DataError::NoShots {
            path: dev.into(),
            subject: subject.name.clone(),
        })?;
        let (mut questions, _) = load_questions(file, format)?;
        if questions.len() < n {
            return Err(DataError::FewShots {
                path: file.clone(),
                wanted: n,
                found: questions.len(),
            });
        }
        questions.truncate(n);
        Ok(questions)
    };
    subjects.iter().map(of).collect()
}

fn question_files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let unreadable = |source| DataError::Read {
        path: path.into(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        let extension = file.extension().and_then(|e| e.to_str()).unwrap_or("");
        if file.is_file() && ["csv", "json", "jsonl", "ndjson"].contains(&extension) {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(DataError::NoFiles { path: path.into() });
    }
    files.sort();
    Ok(files)
}

fn subject_name(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let name = ["_test", "_val", "_dev", "_questions"]
        .iter()
        .find_map(|suffix| stem.strip_suffix(suffix));
    name.unwrap_or(&stem).to_owned()
}

/// The words of the harness's task descriptions: a subject of MMLU with spaces, the fields of WMDP
/// spelled out.
fn topic_of(name: &str, format: ChoiceFormat) -> String {
    let fields = [
        ("bio", "biology"),
        ("chem", "chemistry"),
        ("cyber", "cybersecurity"),
    ];
    let field = fields.iter().find(|(short, _)| {
        format == ChoiceFormat::Wmdp && name.split(['-', '_']).any(|word| word == *short)
    });
    field.map_or_else(|| name.replace('_', " "), |(_, long)| (*long).to_owned())
}

/// The questions of one file, and which of the two formats it has.
fn load_questions(
    path: &Path,
    format: ChoiceFormat,
) -> Result<(Vec<Question>, ChoiceFormat), DataError> {
    let text = read_text(path)?;
    let is_json = match format {
        ChoiceFormat::Auto => text.trim_start().starts_with(['[', '{']),
        format => format == ChoiceFormat::Wmdp,
    };
    let (questions, format) = if is_json {
        (parse_wmdp(&text, path)?, ChoiceFormat::Wmdp)
    } else {
        (parse_mmlu(&text, path)?, ChoiceFormat::Mmlu)
    };
    if questions.is_empty() {
        return Err(DataError::Empty { path: path.into() });
    }
    Ok((questions, format))
}

/// Parses WMDP's JSON. `path` is for error messages only.
///
/// # Errors
/// What is no such question, with its line.
pub fn parse_wmdp(text: &str, path: &Path) -> Result<Vec<Question>, DataError> {
    parse_objects(text, path, |value| {
        let Value::Object(map) = value else {
            return Err(RecordProblem::NotAnObject {
                found: type_name(&value),
            });
        };
        let wrong = |key: String, wanted, value| RecordProblem::WrongType {
            key,
            wanted,
            found: type_name(value),
        };
        let question = key(&map, "question")?;
        let question = question
            .as_str()
            .ok_or_else(|| wrong("question".into(), "a string", question))?;
        let listed = key(&map, "choices")?;
        let listed = listed
            .as_array()
            .ok_or_else(|| wrong("choices".into(), "a list", listed))?;
        let mut choices = Vec::with_capacity(4);
        for (i, choice) in listed.iter().enumerate() {
            let text = choice.as_str();
            let text = text.ok_or_else(|| wrong(format!("choices[{i}]"), "a string", choice))?;
            choices.push(text.to_owned());
        }
        let answer = match key(&map, "answer")? {
            Value::String(answer) => answer.clone(),
            answer => answer.to_string(),
        };
        build(question, choices, &answer)
    })
}

fn key<'a>(map: &'a Map<String, Value>, key: &'static str) -> Result<&'a Value, RecordProblem> {
    map.get(key).ok_or_else(|| {
        let keys: Vec<String> = map.keys().take(8).map(|key| format!("`{key}`")).collect();
        RecordProblem::MissingKey {
            key,
            found: if keys.is_empty() {
                "no keys".to_owned()
            } else {
                keys.join(", ")
            },
        }
    })
}

/// Parses MMLU's CSV. `path` is for error messages only.
///
/// # Errors
/// What is no such row, with its line.
pub fn parse_mmlu(text: &str, path: &Path) -> Result<Vec<Question>, DataError> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .from_reader(text.as_bytes());
    let mut columns: [usize; 6] = [0, 1, 2, 3, 4, 5];
    let mut n_columns = 6;
    let mut questions = Vec::new();
    for (i, row) in reader.records().enumerate() {
        let row = row.expect("UTF-8 in memory, rows of any length");
        let start = row.position().map_or(0, |p| p.byte() as usize);
        let problem = |problem| at(path, line_of(text, start), problem);
        if i == 0 && row.iter().any(|field| field.eq_ignore_ascii_case("answer")) {
            columns = header(&row).map_err(problem)?;
            n_columns = row.len();
            continue;
        }
        if row.len() != n_columns {
            return Err(problem(RecordProblem::Fields {
                wanted: n_columns,
                found: row.len(),
            }));
        }
        let [question, choices @ .., answer] = columns.map(|column| &row[column]);
        let choices = choices.iter().map(|&choice| choice.to_owned()).collect();
        questions.push(build(question, choices, answer).map_err(problem)?);
    }
    Ok(questions)
}

/// The line, from 1, of the row that begins at byte `start` or after the blank lines there, which
/// the reader counts to the row.
fn line_of(text: &str, start: usize) -> usize {
    let blank = text[start..]
        .bytes()
        .take_while(|b| matches!(b, b'\r' | b'\n'));
    let end = start + blank.count();
    1 + text[..end].bytes().filter(|&b| b == b'\n').count()
}

/// Where the header has question, the four choices and answer.
fn header(row: &csv::StringRecord) -> Result<[usize; 6], RecordProblem> {
    let find = |names: &[&str]| {
        row.iter()
            .position(|field| names.iter().any(|name| field.eq_ignore_ascii_case(name)))
    };
    let columns = [
        find(&["question"]),
        find(&["choice0", "A"]),
        find(&["choice1", "B"]),
        find(&["choice2", "C"]),
        find(&["choice3", "D"]),
        find(&["answer"]),
    ];
    match columns {
        [Some(q), Some(a), Some(b), Some(c), Some(d), Some(answer)] => Ok([q, a, b, c, d, answer]),
        _ => Err(RecordProblem::Header {
            found: row.iter().take(12).collect::<Vec<_>>().join(", "),
        }),
    }
}

fn build(question: &str, choices: Vec<String>, answer: &str) -> Result<Question, RecordProblem> {
    if question.trim().is_empty() {
        return Err(RecordProblem::EmptyText {
            key: "question".into(),
        });
    }
    let choices = choices
        .try_into()
        .map_err(|choices: Vec<String>| RecordProblem::Choices {
            found: choices.len(),
        })?;
    let index = match answer.trim() {
        "0" | "A" | "a" => 0,
        "1" | "B" | "b" => 1,
        "2" | "C" | "c" => 2,
        "3" | "D" | "d" => 3,
        other => {
            return Err(RecordProblem::Answer {
                found: format!("`{}`", other.chars().take(40).collect::<String>()),
            });
        }
    };
    Ok(Question {
        question: question.to_owned(),
        choices,
        answer: index,
    })
}
