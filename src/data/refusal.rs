//! "I don't know" in place of an answer: what I-don't-know DPO prefers.

use super::record::Record;
use crate::rng::SplitMix64;

/// Stream number of [`SplitMix64::stream`].
const STREAM: u64 = 6;

/// Refusals written for this project, for when the user gives none.
pub fn refusals() -> Vec<String> {
    include_str!("refusals.txt")
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Every question of `records` with one of `refusals` for an answer: a function of the seed and
/// the position alone. Each keeps its refusal for the whole run, so that the reference model is
/// asked about it once.
///
/// # Errors
/// The number, from 1, of the first record that asks nothing.
pub fn refused(records: &[Record], refusals: &[String], seed: u64) -> Result<Vec<Record>, usize> {
    records
        .iter()
        .enumerate()
        .map(|(i, record)| {
            let drawn = SplitMix64::stream(seed, STREAM << 40 | i as u64).below(refusals.len());
            let asks =
                !matches!(record, Record::Completion { prompt, .. } if prompt.trim().is_empty());
            record
                .answered(&refusals[drawn])
                .filter(|_| asks)
                .ok_or(i + 1)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn questions(n: usize) -> Vec<Record> {
        let qa = |i| Record::Qa {
            question: format!("q{i}"),
            answer: format!("a{i}"),
        };
        (0..n).map(qa).collect()
    }

    #[test]
    fn refusals_are_drawn_by_seed_and_keep_the_question() {
        let (records, all) = (questions(200), refusals());
        let drawn = refused(&records, &all, 1).expect("questions");
        assert_eq!(drawn, refused(&records, &all, 1).expect("questions"));
        assert_ne!(drawn, refused(&records, &all, 2).expect("questions"));
        for (new, old) in drawn.iter().zip(&records) {
            assert_eq!(
                new.turns().map(|t| t[0].clone()),
                old.turns().map(|t| t[0].clone())
            );
            assert!(all.iter().any(|r| r == new.answer()), "{}", new.answer());
        }
        let used: std::collections::HashSet<&str> = drawn.iter().map(Record::answer).collect();
        assert_eq!(used.len(), all.len());
    }

    #[test]
    fn what_asks_nothing_is_named() {
        let mut records = questions(2);
        records.push(Record::Text("Running text.".into()));
        assert_eq!(refused(&records, &refusals(), 1), Err(3));
        records[1] = Record::Completion {
            prompt: " ".into(),
            completion: "x".into(),
        };
        assert_eq!(refused(&records, &refusals(), 1), Err(2));
    }
}
