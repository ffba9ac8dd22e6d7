//! Tokens into the text that a client may see: whole characters, and nothing of a stop string.
//!
//! A stop string may begin in one token and end in another, so text that could still become one is
//! held back until it is decided.

use super::job::{Chosen, Piece};
use crate::runtime::take_text;

/// A text on its way out.
pub(super) struct Text {
    stops: Vec<String>,
    /// The beginning of an unfinished character.
    bytes: Vec<u8>,
    /// Text that may still become a stop string.
    held: String,
    /// Where in `held` a token's text begins and ends.
    tokens: Vec<(usize, usize, Chosen)>,
}

impl Text {
    /// One that ends before any of `stops`, none of which is empty.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            bytes: Vec::new(),
            held: String::new(),
            tokens: Vec::new(),
        }
    }

    /// Add a token. Returns what may be shown now, and whether a stop string came: then the text
    /// is over.
    pub(super) fn push(&mut self, bytes: &[u8], chosen: Option<Chosen>) -> (Piece, bool) {
        let begin = self.held.len();
        self.bytes.extend(bytes);
        self.held.push_str(&take_text(&mut self.bytes));
        let end = self.held.len();
        self.tokens.extend(chosen.map(|c| (begin, end, c)));
        let found = self.stops.iter().filter_map(|s| self.held.find(s)).min();
        if let Some(at) = found {
            self.held.truncate(at);
            self.tokens.retain(|(begin, ..)| *begin < at);
            return (self.finish(), true);
        }
        let kept = self.stops.iter().map(|s| undecided(&self.held, s)).max();
        let shown = self.held.len() - kept.unwrap_or(0);
        let rest = self.held.split_off(shown);
        let n = self
            .tokens
            .iter()
            .take_while(|(_, end, _)| *end <= shown)
            .count();
        let piece = Piece {
            text: std::mem::replace(&mut self.held, rest),
            tokens: self.tokens.drain(..n).map(|(.., c)| c).collect(),
        };
        for (begin, end, _) in &mut self.tokens {
            *begin = begin.saturating_sub(shown);
            *end -= shown;
        }
        (piece, false)
    }

    /// What was held back, when nothing more comes; an unfinished character is left out.
    pub(super) fn finish(&mut self) -> Piece {
        Piece {
            text: std::mem::take(&mut self.held),
            tokens: self.tokens.drain(..).map(|(.., c)| c).collect(),
        }
    }
}

/// Bytes at the end of `text` that are the beginning of `stop`.
fn undecided(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(text: &str) -> Chosen {
        Chosen {
            token: 0,
            bytes: text.as_bytes().to_vec(),
            logprob: Some(-1.0),
            top: Vec::new(),
        }
    }

    /// What is shown after each of `tokens`, and whether the last ended the text.
    fn shown(stops: &[&str], tokens: &[&[u8]]) -> (Vec<String>, bool) {
        let mut text = Text::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = Vec::new();
        for token in tokens {
            let (piece, over) = text.push(token, None);
            out.push(piece.text);
            if over {
                return (out, true);
            }
        }
        (out, false)
    }

    #[test]
    fn a_stop_string_is_found_across_tokens() {
        let (out, over) = shown(&["\n\nUser"], &[b"one\n", b"\nUs", b"er: two"]);
        assert_eq!(
            (out, over),
            (vec!["one".into(), "".into(), "".into()], true)
        );
        let (out, over) = shown(&["born", "bore"], &[b"was bo", b"ld"]);
        assert_eq!((out, over), (vec!["was ".into(), "bold".into()], false));
        let (out, over) = shown(&["aab"], &[b"a", b"a", b"a", b"b"]);
        assert_eq!(out.concat(), "a");
        assert!(over);
        // The first of two.
        assert_eq!(shown(&["cd", "b"], &[b"abcd"]), (vec!["a".into()], true));
    }

    #[test]
    fn characters_come_whole_and_stops_may_hold_them() {
        let bytes = "aé→".as_bytes();
        let (out, over) = shown(&["→"], &[&bytes[..2], &bytes[2..4], &bytes[4..]]);
        assert_eq!(out, ["a", "é", ""]);
        assert!(over);
    }

    #[test]
    fn tokens_come_with_the_text_they_end_in() {
        let mut text = Text::new(vec!["stop".into()]);
        assert_eq!(text.push(b"x st", Some(chosen("x st"))).0.tokens, []);
        let (piece, over) = text.push(b"ill", Some(chosen("ill")));
        assert_eq!((piece.text.as_str(), over), ("still", false));
        assert_eq!(piece.tokens, [chosen("x st"), chosen("ill")]);
        assert_eq!(text.push(b"st", Some(chosen("st"))).0, Piece::default());
        let (piece, over) = text.push(b"op", Some(chosen("op")));
        assert!(over && piece.is_empty());
        text = Text::new(vec!["stop".into()]);
        text.push(b"sto", Some(chosen("sto")));
        assert_eq!(text.finish().text, "sto");
    }
}
