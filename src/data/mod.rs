//! From files on disk to token samples with answer masks.
//!
//! The path of the data: a file becomes [`Record`]s (`record`), a record becomes text through a
//! chat template (`template`), text becomes a [`Sample`] of token ids together with the ranges
//! whose loss counts (`sample`). Multiple-choice questions have layouts and a prompt of their own
//! (`choice`). [`overlap`] and [`salted_hash`] (`set`) describe whole sets.

#[cfg(feature = "evidence")]
pub mod choice;
mod error;
mod perturbed;
mod record;
mod refusal;
mod sample;
mod set;
mod template;
mod tofu;

pub use error::{DataError, RecordProblem};
pub use perturbed::{Perturbed, load_perturbed};
pub use record::{Message, Record, Role, load_lines, load_records, parse_json, parse_text};
pub use refusal::{refusals, refused};
pub use sample::{
    Sample, SampleSet, Tokenize, TokenizeError, build_prompt, build_samples, samples,
};
pub use set::{Overlap, overlap, salted_hash};

pub use template::{ChatTemplate, Template, utc_now};
pub use tofu::{TofuQuestion, load_tofu};

/// General English prose and question/answer pairs written for this project, one paragraph per
/// record. Stands in for the retain set when the user gives none.
pub const GENERAL_TEXT: &str = include_str!("general.txt");

/// [`GENERAL_TEXT`] as records: `Question:`/`Answer:` paragraphs become question/answer records,
/// every other paragraph a text record.
pub fn general_records() -> Vec<Record> {
    parse_text(GENERAL_TEXT)
        .into_iter()
        .map(|paragraph| {
            let pair = paragraph
                .strip_prefix("Question: ")
                .and_then(|rest| rest.split_once("\nAnswer: "));
            match pair {
                Some((question, answer)) => Record::Qa {
                    question: question.to_owned(),
                    answer: answer.to_owned(),
                },
                None => Record::Text(paragraph),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn general_text_is_varied_and_of_the_stated_size() {
        let records = general_records();
        let n_qa = records
            .iter()
            .filter(|r| matches!(r, Record::Qa { .. }))
            .count();
        assert!((70..=120).contains(&records.len()), "{}", records.len());
        assert!(n_qa >= 25 && records.len() - n_qa >= 25, "{n_qa} pairs");
        assert!((12_000..=16_400).contains(&GENERAL_TEXT.len()));
        let itself = overlap(&records, &records);
        assert!(itself.identical);
        let distinct: std::collections::HashSet<_> = records.iter().collect();
        assert_eq!(distinct.len(), records.len(), "a paragraph stands twice");
    }
}
