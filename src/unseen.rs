//! How well a model answers what it has never seen: forget records with someone else's answers.
//!
//! A forgotten answer should be as likely as it would be had it never been learned; likelier is
//! not forgotten, unlikelier is a scar that gives the forgotten away. Without a model that never
//! saw the forget set that level is estimated from answers to the most similar questions about
//! someone else, with that one's names put right: "Where was A B born?" gets what the model says
//! of C D, told of A B. The model has learned no such answer, and finds the words around the fact
//! as easy as those of the true one.
//!
//! Answers known by heart were learned as texts, and with them whole phrases of the answers they
//! are exchanged for: these are then easier than answers never read. Measured on three models
//! that had learned invented people by heart, beside the same models without those people
//! (NLL of exchanged answers, NLL of the unseen model): 0.65, 1.16 (embedded model); 1.68, 2.86
//! (SmolLM2-135M, TOFU). The level is 1.9 times the exchanged NLL where answers are near certain,
//! a tenth past both of these: the patched models end at a forget probability of .338 for .387
//! and .060 for .101. Where answers are merely known it is the exchanged NLL itself.

use crate::data::{Record, Role, Sample, Template, build_samples, general_records};
use crate::error::Error;
use crate::likelihood::{mean_nll, mean_prob};
use crate::model::OpenModel;
use crate::sets::Sets;
use crate::train::config::UnlearnConfig;
use crate::train::fit::Until;
use crate::train::trainer::Trainer;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// What the NLL of exchanged answers is multiplied by where the model knows answers by heart.
const BY_HEART: f64 = 1.9;
/// Mean answer probability up to which answers are merely known ...
const KNOWN: f64 = 0.7;
/// ... and from which on they are known by heart; between them the factor grows linearly.
const CERTAIN: f64 = 0.95;
/// Answers that stand in for others' when there is nothing to exchange.
const FALLBACK_ANSWERS: usize = 8;
/// Records looked through for similar questions.
const MAX_DONORS: usize = 1024;

/// Answer NLL that counts as unseen, and what it was derived from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnseenLevel {
    /// Mean answer NLL, nats per token, at which training stops.
    pub nll: f64,
    /// What it follows from.
    pub source: LevelSource,
}

/// What the unseen level follows from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LevelSource {
    /// The settings.
    Asked,
    /// The NLL of answers that the model has never seen.
    Unseen,
    /// The NLL of the forget questions with answers that belong to others, times a factor.
    Exchanged {
        /// That NLL.
        nll: f64,
        /// The factor.
        factor: f64,
    },
}

impl LevelSource {
    /// In words.
    pub fn text(&self) -> String {
        match self {
            Self::Asked => "as asked".to_owned(),
            Self::Unseen => "that of the unseen answers".to_owned(),
            Self::Exchanged { nll, factor } => {
                format!("{factor:.2} x the {nll:.2} of answers that are true of others")
            }
        }
    }
}

/// When to stop: after fixed steps if there are any, else at the unseen level.
///
/// # Errors
/// When ggml fails.
pub fn until(
    trainer: &mut Trainer<'_>,
    open: &OpenModel,
    template: &Template,
    sets: &Sets,
    config: &UnlearnConfig,
) -> Result<(Until, Option<UnseenLevel>), Error> {
    if let Some(steps) = config.train.fixed_steps(sets.forget.len()) {
        return Ok((Until::Steps(steps), None));
    }
    let level = unseen_level(trainer, open, template, sets, config)?;
    Ok((Until::Level(level.nll), Some(level)))
}

/// The unseen level under the parameters as they are: as asked, or the NLL of answers the model
/// has never seen, or that of answers which are true of someone else ([`exchanged_answers`]) times
/// a factor, because the model has learned what such answers look like.
///
/// # Errors
/// When ggml fails.
pub fn unseen_level(
    trainer: &mut Trainer<'_>,
    open: &OpenModel,
    template: &Template,
    sets: &Sets,
    config: &UnlearnConfig,
) -> Result<UnseenLevel, Error> {
    let stop = &config.stop;
    if let Some(nll) = stop.nll {
        return Ok(UnseenLevel {
            nll,
            source: LevelSource::Asked,
        });
    }
    let mut losses = |samples: &[Sample]| {
        let n = stop.check_samples.min(samples.len());
        let spread: Vec<&Sample> = (0..n).map(|i| &samples[i * samples.len() / n]).collect();
        trainer.losses(&spread)
    };
    if !sets.unseen.is_empty() {
        return Ok(UnseenLevel {
            nll: mean_nll(&losses(&sets.unseen)?),
            source: LevelSource::Unseen,
        });
    }
    let exchanged = exchanged_answers(&sets.forget_records, &sets.retain_records);
    let set = build_samples(&exchanged, &open.model, template, config.train.max_tokens)?;
    let nll = mean_nll(&losses(&set.samples)?);
    let factor = match stop.factor {
        Some(factor) => factor,
        None => {
            let known = mean_prob(&losses(&sets.forget)?);
            let by_heart = ((known - KNOWN) / (CERTAIN - KNOWN)).clamp(0.0, 1.0);
            1.0 + by_heart * (BY_HEART - 1.0)
        }
    };
    Ok(UnseenLevel {
        nll: factor * nll,
        source: LevelSource::Exchanged { nll, factor },
    })
}

/// Every record of `forget` with the answer to the most similar question of another subject,
/// from `forget` or `retain`. Where no question names anything, another record's answer as it is.
pub fn exchanged_answers(forget: &[Record], retain: &[Record]) -> Vec<Record> {
    let questions = |records: &[Record]| -> Vec<Option<Question>> {
        records.iter().map(Question::of).collect()
    };
    let retain = &retain[..retain.len().min(MAX_DONORS)];
    let (own, others) = (questions(forget), questions(retain));
    let donors: Vec<(&Record, &Question)> = forget
        .iter()
        .zip(&own)
        .chain(retain.iter().zip(&others))
        .filter_map(|(r, q)| Some((r, q.as_ref()?)))
        .collect();
    let exchanged: Vec<Record> = forget
        .iter()
        .zip(&own)
        .filter_map(|(record, question)| {
            let question = question.as_ref()?;
            let (donor, theirs) = nearest(question, &donors)?;
            let answer = renamed(donor.answer(), theirs, question);
            Some(with_answer(record, &answer))
        })
        .collect();
    // A few records that name nothing do not matter; if most do, names say nothing here.
    if 2 * exchanged.len() >= forget.len() {
        return exchanged;
    }
    shifted(forget)
}

/// Every record with the answer of another one, half the set away; a single record gets
/// answers from the general text.
fn shifted(records: &[Record]) -> Vec<Record> {
    let n = records.len();
    if n == 1 {
        let others = general_records()
            .into_iter()
            .filter(|r| matches!(r, Record::Qa { .. }));
        return others
            .take(FALLBACK_ANSWERS)
            .map(|other| with_answer(&records[0], other.answer()))
            .collect();
    }
    let shift = n.div_ceil(2);
    (0..n)
        .map(|i| with_answer(&records[i], records[(i + shift) % n].answer()))
        .collect()
}

/// The words of a question, and those of them that name something.
struct Question {
    words: HashSet<String>,
    /// In order, each once: capitalised words but the first of the text, and numbers.
    names: Vec<String>,
}

impl Question {
    fn of(record: &Record) -> Option<Self> {
        let turns = record.turns()?;
        let text = &turns.iter().rev().find(|m| m.role == Role::User)?.content;
        let mut names = Vec::new();
        for (i, word) in words(text).enumerate() {
            let names_something = word.starts_with(|c: char| c.is_uppercase() || c.is_numeric());
            if i > 0 && names_something && !names.iter().any(|n| n == word) {
                names.push(word.to_owned());
            }
        }
        Some(Self {
            words: words(text).map(str::to_lowercase).collect(),
            names,
        })
    }

    /// Shared words over all words (Jaccard).
    fn similarity(&self, other: &Self) -> f64 {
        let shared = self.words.intersection(&other.words).count();
        shared as f64 / (self.words.len() + other.words.len() - shared).max(1) as f64
    }
}

/// Runs of letters and digits, with the hyphens inside them.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '-'))
        .map(|w| w.trim_matches('-'))
        .filter(|w| !w.is_empty())
}

/// The most similar question that names something else, the first of equals.
fn nearest<'a>(
    question: &Question,
    donors: &[(&'a Record, &'a Question)],
) -> Option<(&'a Record, &'a Question)> {
    let mut best = None;
    for &(record, other) in donors {
        let mut foreign = other.names.iter().filter(|n| !question.names.contains(n));
        if foreign.next().is_none() || question.names.is_empty() {
            continue;
        }
        let similarity = question.similarity(other);
        if best.is_none_or(|(s, _, _)| similarity > s) {
            best = Some((similarity, record, other));
        }
    }
    best.map(|(_, record, other)| (record, other))
}

/// `answer` with the names that only `from` has replaced, in order, by those only `to` has.
fn renamed(answer: &str, from: &Question, to: &Question) -> String {
    let only = |a: &Question, b: &Question| -> Vec<String> {
        let names = a.names.iter().filter(|n| !b.names.contains(n));
        names.cloned().collect()
    };
    let (old, new) = (only(from, to), only(to, from));
    let mut out = String::with_capacity(answer.len());
    let mut rest = answer;
    while let Some(start) = rest.find(|c: char| c.is_alphanumeric()) {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let word = words(rest).next().expect("a letter starts a word");
        rest = &rest[word.len()..];
        let at = old.iter().position(|o| o == word);
        out.push_str(at.and_then(|i| new.get(i)).map_or(word, String::as_str));
    }
    out + rest
}

fn with_answer(record: &Record, answer: &str) -> Record {
    // Running text: the first half of one, the second half of the other.
    record
        .answered(answer)
        .unwrap_or_else(|| Record::Completion {
            prompt: halves(record.answer()).0.to_owned(),
            completion: halves(answer).1.to_owned(),
        })
}

/// `text` cut at the white space nearest to its middle.
fn halves(text: &str) -> (&str, &str) {
    let middle = text.len() / 2;
    let spaces = text.char_indices().filter(|(_, c)| c.is_whitespace());
    let cut = spaces
        .map(|(i, _)| i)
        .min_by_key(|&i| i.abs_diff(middle))
        .unwrap_or(text.len());
    text.split_at(cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qa(question: &str, answer: &str) -> Record {
        Record::Qa {
            question: question.into(),
            answer: answer.into(),
        }
    }

    #[test]
    fn the_same_question_about_another_gives_its_answer_under_the_right_name() {
        let forget = [qa(
            "Where was Ada Moor born?",
            "Ada Moor was born in Tarrow.",
        )];
        let retain = [
            qa("What does Ben Hill play?", "Ben Hill plays the harp."),
            qa(
                "Where was Ben Hill born?",
                "Hill (Ben Hill) was born in Kessin.",
            ),
        ];
        let exchanged = exchanged_answers(&forget, &retain);
        assert_eq!(exchanged[0].answer(), "Moor (Ada Moor) was born in Kessin.");
    }

    #[test]
    fn exchanged_answers_are_never_ones_own() {
        for n in 2..9 {
            let records: Vec<Record> = (0..n)
                .map(|i| qa(&format!("q{i}"), &format!("a{i}")))
                .collect();
            for (old, new) in records.iter().zip(exchanged_answers(&records, &[])) {
                assert_ne!(old.answer(), new.answer(), "{n}");
            }
        }
        let alone = exchanged_answers(&[qa("q0", "a0")], &[]);
        assert_eq!(alone.len(), FALLBACK_ANSWERS);
        assert!(alone.iter().all(|r| r.answer() != "a0"));
    }

    #[test]
    fn running_text_is_exchanged_by_halves() {
        let texts = ["one two three four", "five six seven eight"].map(|t| Record::Text(t.into()));
        let exchanged = exchanged_answers(&texts, &[]);
        assert_eq!(
            exchanged[0],
            Record::Completion {
                prompt: "one two".into(),
                completion: " seven eight".into()
            }
        );
    }

    #[test]
    fn names_survive_punctuation_and_umlauts() {
        let forget = [qa("Who is Jörg d'Eon?", "Jörg d'Eon is a poet.")];
        let retain = [qa(
            "Who is Zoë Smith-Lee?",
            "\u{201c}Zoë Smith-Lee\u{201d}: a baker\u{2014}Zoë's own words.",
        )];
        let exchanged = exchanged_answers(&forget, &retain);
        assert_eq!(
            exchanged[0].answer(),
            "\u{201c}Jörg Eon\u{201d}: a baker\u{2014}Jörg's own words."
        );
    }
}
