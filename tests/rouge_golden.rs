//! ROUGE against Google's `rouge_score`; values made by tests/golden/rouge.py.

use nepenthe::eval::rouge::{Score, rouge, stemmed_words};
use serde::Deserialize;

/// Precision, recall, f-measure as the package returns them.
type Values = [f64; 3];

#[derive(Deserialize)]
struct Golden {
    pairs: Vec<(String, String, Values, Values)>,
    stems: String,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/rouge.json")).expect("the script's JSON")
}

fn same(got: Score, want: Values) -> bool {
    [got.precision, got.recall, got.f1]
        .iter()
        .zip(want)
        .all(|(a, b)| (a - b).abs() < 1e-12)
}

#[test]
fn scores_equal_the_python_package() {
    for (reference, prediction, rouge_1, rouge_l) in golden().pairs {
        let got = rouge(&reference, &prediction);
        assert!(
            same(got.rouge_1, rouge_1),
            "{reference:?} {prediction:?}: {got:?}"
        );
        assert!(
            same(got.rouge_l, rouge_l),
            "{reference:?} {prediction:?}: {got:?}"
        );
    }
}

#[test]
fn words_match_their_nltk_stems() {
    for entry in golden().stems.split(' ') {
        let (word, stem) = entry.split_once(':').expect("word:stem");
        assert_eq!(stemmed_words(word), [stem], "{word}");
    }
}
