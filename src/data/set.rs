//! Whole sets: how much two share, and a hash that names one without giving it away.

use std::collections::HashSet;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::record::Record;

/// How much of the forget set stands in the retain set as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Overlap {
    /// Forget records that are also retain records.
    pub n_shared: usize,
    /// All forget records.
    pub n_forget: usize,
    /// All retain records.
    pub n_retain: usize,
    /// The two sets hold the same contents, order and repetition aside.
    pub identical: bool,
}

/// Compares contents, trimmed and with runs of white space collapsed. The layout does not matter:
/// a `question`/`answer` record equals a two-message conversation that says the same.
pub fn overlap(forget: &[Record], retain: &[Record]) -> Overlap {
    let keys = |records: &[Record]| records.iter().map(content_key).collect::<Vec<_>>();
    let (forget_keys, retain_keys) = (keys(forget), keys(retain));
    let forget_set: HashSet<&String> = forget_keys.iter().collect();
    let retain_set: HashSet<&String> = retain_keys.iter().collect();
    Overlap {
        n_shared: forget_keys
            .iter()
            .filter(|key| retain_set.contains(key))
            .count(),
        n_forget: forget.len(),
        n_retain: retain.len(),
        identical: !forget_set.is_empty() && forget_set == retain_set,
    }
}

/// SHA-256 over the salt and the exact contents in order, every part preceded by its length, so
/// that neither moving text between fields nor reordering records keeps the hash.
pub fn salted_hash(records: &[Record], salt: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(salt);
    part(&(records.len() as u64).to_le_bytes());
    for record in records {
        let parts = parts(record);
        part(&(parts.len() as u64).to_le_bytes());
        for (label, content) in parts {
            part(label.as_bytes());
            part(content.as_bytes());
        }
    }
    hash.finalize().into()
}

/// A record as labelled contents.
fn parts(record: &Record) -> Vec<(&'static str, String)> {
    match (record.turns(), record) {
        (Some(turns), _) => turns
            .into_iter()
            .map(|turn| (turn.role.as_str(), turn.content))
            .collect(),
        (None, record) => vec![("text", record.answer().to_owned())],
    }
}

fn content_key(record: &Record) -> String {
    let mut key = String::new();
    for (label, content) in parts(record) {
        key.push_str(label);
        for word in content.split_whitespace() {
            key.push(' ');
            key.push_str(word);
        }
        // White space was collapsed, so a newline cannot stand inside a part.
        key.push('\n');
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Message, Role};

    fn qa(question: &str, answer: &str) -> Record {
        Record::Qa {
            question: question.into(),
            answer: answer.into(),
        }
    }

    #[test]
    fn overlap_sees_through_white_space_and_layout() {
        let forget = [qa("Who?", "Ann  Lee\n"), qa("Where?", "Oslo")];
        let turn = |role, content: &str| Message {
            role,
            content: content.into(),
        };
        let retain = [
            Record::Messages(vec![
                turn(Role::User, " Who? "),
                turn(Role::Assistant, "Ann Lee"),
            ]),
            Record::Text("Where? Oslo".into()),
        ];
        let shared = overlap(&forget, &retain);
        assert_eq!((shared.n_shared, shared.identical), (1, false));
        let reversed = [forget[1].clone(), forget[0].clone(), forget[0].clone()];
        assert!(overlap(&forget, &reversed).identical);
        assert_eq!(overlap(&forget, &[]).n_shared, 0);
        assert!(!overlap(&[], &[]).identical);
    }

    #[test]
    fn hash_depends_on_salt_order_and_field_borders() {
        let (a, b) = (qa("ab", "c"), qa("a", "bc"));
        let base = salted_hash(&[a.clone(), b.clone()], b"salt");
        assert_eq!(base, salted_hash(&[a.clone(), b.clone()], b"salt"));
        assert_ne!(base, salted_hash(&[b.clone(), a.clone()], b"salt"));
        assert_ne!(base, salted_hash(&[a.clone(), b.clone()], b"tlas"));
        assert_ne!(salted_hash(&[a], b""), salted_hash(&[b], b""));
    }
}
