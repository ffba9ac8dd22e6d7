//! Byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909; GPT-2's byte alphabet),
//! trained on the corpus.

use std::collections::{BTreeMap, HashMap};

/// A trained vocabulary in GGUF's form.
pub struct Vocabulary {
    /// Token texts: bytes, merges, control tokens.
    pub tokens: Vec<String>,
    /// `a b` per merge, in order.
    pub merges: Vec<String>,
    /// How many of the last tokens are control tokens.
    pub n_control: usize,
}

/// GPT-2's printable character for each byte.
fn byte_symbol(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let n = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + n).expect("within the Latin Extended block")
}

/// Words as the pre-tokeniser of type `gpt-2` cuts this corpus: an optional space before a run
/// of letters, of digits, or of other marks.
fn words(text: &str) -> Vec<String> {
    let class = |c: char| match c {
        c if c.is_alphabetic() => 0,
        c if c.is_numeric() => 1,
        c if c.is_whitespace() => 2,
        _ => 3,
    };
    let mut out: Vec<String> = Vec::new();
    let mut last = None;
    for c in text.chars() {
        match out.last_mut() {
            Some(word) if last == Some(class(c)) || (word == " " && class(c) != 2) => word.push(c),
            _ => out.push(c.to_string()),
        }
        last = Some(class(c));
    }
    out
}

/// Train `n_tokens` tokens on `texts`; `control` come last.
pub fn train(texts: &[String], n_tokens: usize, control: &[&str]) -> Vocabulary {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for text in texts {
        for word in words(text) {
            *counts.entry(word).or_default() += 1;
        }
    }
    let mut words: Vec<(Vec<String>, usize)> = counts
        .into_iter()
        .map(|(word, n)| {
            (
                word.bytes().map(|b| byte_symbol(b).to_string()).collect(),
                n,
            )
        })
        .collect();
    let mut tokens: Vec<String> = (0..=255).map(|b| byte_symbol(b).to_string()).collect();
    let mut merges = Vec::new();
    while tokens.len() + control.len() < n_tokens {
        let mut pairs: HashMap<(&str, &str), usize> = HashMap::new();
        for (symbols, n) in &words {
            for pair in symbols.windows(2) {
                *pairs.entry((&pair[0], &pair[1])).or_default() += n;
            }
        }
        // The most frequent pair; among equals the first in text order, so that runs agree.
        let Some(((a, b), n)) = pairs
            .into_iter()
            .max_by(|(p, n), (q, m)| n.cmp(m).then_with(|| q.cmp(p)))
        else {
            break;
        };
        if n < 2 {
            break;
        }
        let (a, b) = (a.to_owned(), b.to_owned());
        let merged = format!("{a}{b}");
        for (symbols, _) in &mut words {
            let mut i = 0;
            while i + 1 < symbols.len() {
                if symbols[i] == a && symbols[i + 1] == b {
                    symbols[i] = merged.clone();
                    symbols.remove(i + 1);
                }
                i += 1;
            }
        }
        merges.push(format!("{a} {b}"));
        tokens.push(merged);
    }
    // The head's width: unused tokens fill it up.
    while tokens.len() + control.len() < n_tokens {
        tokens.push(format!("<|unused_{}|>", tokens.len()));
    }
    tokens.extend(control.iter().map(|c| (*c).to_owned()));
    Vocabulary {
        tokens,
        merges,
        n_control: control.len(),
    }
}
