//! TOFU's `*_perturbed.json`: a question with its answer, the answer in other words, and wrong
//! answers in the same words (Maini et al., arXiv 2401.06121).

use std::path::Path;

use serde_json::Value;

use super::error::{DataError, RecordProblem};
use super::record::{Record, keys_of, parse_objects, read_text, text_at, type_name};

/// One row of such a file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TofuQuestion {
    /// `question`.
    pub question: String,
    /// `answer`.
    pub answer: String,
    /// `paraphrased_answer`; real authors and world facts have none.
    pub paraphrased: Option<String>,
    /// `perturbed_answer`, at least one.
    pub perturbed: Vec<String>,
}

impl TofuQuestion {
    /// The question with each answer: the true one, the paraphrased one if there is one, then the
    /// perturbed ones.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        std::iter::once(&self.answer)
            .chain(&self.paraphrased)
            .chain(&self.perturbed)
            .map(|answer| Record::Qa {
                question: self.question.clone(),
                answer: answer.clone(),
            })
    }
}

/// Reads a file of questions; `paraphrased`: whether each must have a paraphrased answer, which
/// is otherwise ignored.
///
/// # Errors
/// The file, its line and what was wanted.
pub fn load_tofu(path: &Path, paraphrased: bool) -> Result<Vec<TofuQuestion>, DataError> {
    let text = read_text(path)?;
    let questions = parse_objects(&text, path, |value| question(value, paraphrased))?;
    if questions.is_empty() {
        return Err(DataError::Empty { path: path.into() });
    }
    Ok(questions)
}

fn question(value: Value, paraphrased: bool) -> Result<TofuQuestion, RecordProblem> {
    let Value::Object(map) = value else {
        return Err(RecordProblem::NotAnObject {
            found: type_name(&value),
        });
    };
    let has = |key: &'static str| match map.contains_key(key) {
        true => Ok(key),
        false => Err(RecordProblem::MissingKey {
            key,
            found: keys_of(&map),
        }),
    };
    let text = |key| text_at(&map, has(key)?, true);
    Ok(TofuQuestion {
        question: text("question")?,
        answer: text("answer")?,
        paraphrased: paraphrased
            .then(|| text("paraphrased_answer"))
            .transpose()?,
        perturbed: wrong_answers(&map[has("perturbed_answer")?])?,
    })
}

fn wrong_answers(value: &Value) -> Result<Vec<String>, RecordProblem> {
    let wrong = |key: String, wanted, found| RecordProblem::WrongType { key, wanted, found };
    let Value::Array(items) = value else {
        return Err(wrong(
            "perturbed_answer".into(),
            "a list of strings",
            type_name(value),
        ));
    };
    if items.is_empty() {
        return Err(RecordProblem::EmptyText {
            key: "perturbed_answer".into(),
        });
    }
    let texts = items.iter().enumerate().map(|(i, item)| {
        let key = format!("perturbed_answer[{i}]");
        match item {
            Value::String(text) if text.trim().is_empty() => Err(RecordProblem::EmptyText { key }),
            Value::String(text) => Ok(text.clone()),
            other => Err(wrong(key, "a string", type_name(other))),
        }
    });
    texts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: &str = r#"{"question":"Q?","answer":"A","paraphrased_answer":"B","perturbed_answer":["C","D"],"x":1}"#;

    fn load(text: &str, paraphrased: bool) -> Result<Vec<TofuQuestion>, String> {
        let path = Path::new("f.json");
        parse_objects(text, path, |value| question(value, paraphrased)).map_err(|e| e.to_string())
    }

    #[test]
    fn records_come_true_paraphrased_perturbed() {
        let answers = |paraphrased| -> Vec<String> {
            let questions = load(ROW, paraphrased).unwrap();
            questions[0]
                .records()
                .map(|r| r.answer().to_owned())
                .collect()
        };
        assert_eq!(answers(true), ["A", "B", "C", "D"]);
        assert_eq!(answers(false), ["A", "C", "D"]);
    }

    #[test]
    fn a_malformed_row_is_named_with_its_line() {
        let broken = |from: &str, to: &str| {
            let text = format!("{ROW}\n{}\n", ROW.replace(from, to));
            load(&text, true).unwrap_err()
        };
        assert_eq!(
            broken("\"answer\":\"A\",", ""),
            "f.json:2: wanted `answer`, found `question`, `paraphrased_answer`, `perturbed_answer`, `x`"
        );
        assert_eq!(
            broken("[\"C\",\"D\"]", "\"C\""),
            "f.json:2: wanted a list of strings in `perturbed_answer`, found a string"
        );
        assert_eq!(
            broken("\"D\"", "3"),
            "f.json:2: wanted a string in `perturbed_answer[1]`, found a number"
        );
        assert_eq!(
            broken("[\"C\",\"D\"]", "[]"),
            "f.json:2: `perturbed_answer` is empty"
        );
        assert_eq!(
            broken("\"B\"", "\" \""),
            "f.json:2: `paraphrased_answer` is empty"
        );
        assert!(load(&ROW.replace("paraphrased_answer", "p"), false).is_ok());
    }
}
