//! ROUGE-1 and ROUGE-L (C.-Y. Lin, 2004) with the tokenisation of Google's `rouge_score` and
//! `use_stemmer=True`, which TOFU uses: lower case, split at everything outside `[a-z0-9]`, words
//! of more than three letters stemmed.

use std::collections::HashMap;

use serde::Serialize;

use super::porter;

/// Precision over the prediction, recall over the reference, and their harmonic mean.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Score {
    /// Matches over the words of the prediction.
    pub precision: f64,
    /// Matches over the words of the reference.
    pub recall: f64,
    /// 2pr / (p + r).
    pub f1: f64,
}

/// Both scores of one pair.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Rouge {
    /// Common words, with multiplicity.
    pub rouge_1: Score,
    /// Longest common subsequence of words.
    pub rouge_l: Score,
}

/// Scores a prediction against a reference. A side without words scores 0.
pub fn rouge(reference: &str, prediction: &str) -> Rouge {
    let (reference, prediction) = (stemmed_words(reference), stemmed_words(prediction));
    let score = |n_common: usize| Score::new(n_common, reference.len(), prediction.len());
    Rouge {
        rouge_1: score(n_common_words(&reference, &prediction)),
        rouge_l: score(longest_common_subsequence(&reference, &prediction)),
    }
}

impl Score {
    fn new(n_common: usize, n_reference: usize, n_prediction: usize) -> Self {
        if n_reference == 0 || n_prediction == 0 {
            return Score::default();
        }
        let precision = n_common as f64 / n_prediction as f64;
        let recall = n_common as f64 / n_reference as f64;
        let f1 = if n_common > 0 {
            2.0 * precision * recall / (precision + recall)
        } else {
            0.0
        };
        Score {
            precision,
            recall,
            f1,
        }
    }
}

/// The words the scores compare.
pub fn stemmed_words(text: &str) -> Vec<String> {
    text.to_lowercase()
        .split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit())
        .filter(|word| !word.is_empty())
        .map(|word| {
            if word.len() > 3 {
                porter::stem(word)
            } else {
                word.to_owned()
            }
        })
        .collect()
}

fn n_common_words(reference: &[String], prediction: &[String]) -> usize {
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in reference {
        *left.entry(word).or_default() += 1;
    }
    prediction
        .iter()
        .filter(|word| match left.get_mut(word.as_str()) {
            Some(n) if *n > 0 => {
                *n -= 1;
                true
            }
            _ => false,
        })
        .count()
}

fn longest_common_subsequence(a: &[String], b: &[String]) -> usize {
    // row[j] is the length for the words of `a` seen so far and b[..j].
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other {
                diagonal + 1
            } else {
                above.max(row[j])
            };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_punctuation_and_endings_do_not_matter() {
        let score = rouge("The cat's running, quickly!", "the CAT s runs quick");
        assert_eq!(score.rouge_1.recall, 0.8);
        assert_eq!(rouge("Who?", "¿").rouge_l, Score::default());
    }

    #[test]
    fn order_matters_to_rouge_l_only() {
        let score = rouge("one two three", "three two one");
        assert_eq!(score.rouge_1.f1, 1.0);
        assert_eq!(score.rouge_l.recall, 1.0 / 3.0);
    }
}
