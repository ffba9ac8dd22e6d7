//! TOFU's perturbed records: the same question with the right answer in other words and with wrong
//! ones (`paraphrased_answer`, `perturbed_answer`; a text or a list of texts each).

use std::path::Path;

use serde_json::Value;

use super::error::{DataError, RecordProblem};
use super::record::{Record, is_json, parse_objects, read_text, type_name};

/// One question with other answers than its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Perturbed {
    /// The right answer in other words; never empty.
    pub paraphrased: Vec<Record>,
    /// Wrong answers; never empty.
    pub wrong: Vec<Record>,
}

/// The other answers of every record of a file; none where some record has none.
///
/// # Errors
/// As [`super::load_records`]; other answers that are no texts.
pub fn load_perturbed(path: &Path) -> Result<Option<Vec<Perturbed>>, DataError> {
    if !is_json(path) {
        return Ok(None);
    }
    let all = parse_objects(&read_text(path)?, path, perturbed)?;
    Ok(all.into_iter().collect())
}

fn perturbed(value: Value) -> Result<Option<Perturbed>, RecordProblem> {
    let Some(Value::String(question)) = value.get("question") else {
        return Ok(None);
    };
    let answers = |key: &str| {
        let Some(value) = value.get(key) else {
            return Ok(Vec::new());
        };
        let listed = value.as_array().map_or(std::slice::from_ref(value), |l| l);
        let answer = |value: &Value| match value {
            Value::String(answer) if answer.trim().is_empty() => {
                Err(RecordProblem::EmptyText { key: key.into() })
            }
            Value::String(answer) => Ok(Record::Qa {
                question: question.clone(),
                answer: answer.clone(),
            }),
            other => Err(RecordProblem::WrongType {
                key: key.into(),
                wanted: "a string or a list of strings",
                found: type_name(other),
            }),
        };
        listed.iter().map(answer).collect::<Result<Vec<_>, _>>()
    };
    let (paraphrased, wrong) = (answers("paraphrased_answer")?, answers("perturbed_answer")?);
    let complete = !paraphrased.is_empty() && !wrong.is_empty();
    Ok(complete.then_some(Perturbed { paraphrased, wrong }))
}
