//! Porter's suffix stripping (M. Porter, "An algorithm for suffix stripping", Program 14.3, 1980)
//! with the changes that NLTK's `PorterStemmer` makes by default, because Google's `rouge_score`
//! stems with it.

/// Words NLTK maps by a table.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// The stem of a lower-case ASCII word.
pub(super) fn stem(word: &str) -> String {
    debug_assert!(word.is_ascii());
    if let Some((_, stem)) = IRREGULAR.iter().find(|(irregular, _)| *irregular == word) {
        return (*stem).to_owned();
    }
    if word.len() <= 2 {
        return word.to_owned();
    }
    let mut word = word.to_owned();
    plural(&mut word);
    past_and_gerund(&mut word);
    final_y(&mut word);
    double_suffix(&mut word);
    first_match(&mut word, &STEP_3, |stem, _| measure(stem) > 0);
    first_match(&mut word, &STEP_4, |stem, suffix| {
        measure(stem) > 1 && (suffix != "ion" || stem.ends_with(['s', 't']))
    });
    final_e(&mut word);
    if word.ends_with("ll") && measure(&word[..word.len() - 1]) > 1 {
        word.pop();
    }
    word
}

/// Whether each letter is a consonant: all but a, e, i, o, u, and y after a consonant.
fn consonants(word: &str) -> Vec<bool> {
    let mut flags: Vec<bool> = Vec::with_capacity(word.len());
    for letter in word.bytes() {
        let before = flags.last().copied();
        flags.push(match letter {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => before.is_none_or(|consonant| !consonant),
            _ => true,
        });
    }
    flags
}

/// Porter's m: how often a consonant follows a vowel.
fn measure(stem: &str) -> usize {
    consonants(stem)
        .windows(2)
        .filter(|w| !w[0] && w[1])
        .count()
}

fn has_vowel(stem: &str) -> bool {
    consonants(stem).contains(&false)
}

fn ends_double_consonant(word: &str) -> bool {
    let bytes = word.as_bytes();
    bytes.len() >= 2
        && bytes[bytes.len() - 1] == bytes[bytes.len() - 2]
        && consonants(word)[bytes.len() - 1]
}

/// Porter's *o, and NLTK's two-letter vowel-consonant stems.
fn ends_cvc(word: &str) -> bool {
    match consonants(word)[..] {
        [.., true, false, true] => !word.ends_with(['w', 'x', 'y']),
        [false, true] => true,
        _ => false,
    }
}

/// Applies the first rule whose suffix fits, if the condition allows; other rules are not tried.
fn first_match(
    word: &mut String,
    rules: &[(&str, &str)],
    allows: impl Fn(&str, &str) -> bool,
) -> bool {
    for (suffix, replacement) in rules {
        if let Some(stem) = word.strip_suffix(suffix) {
            if !allows(stem, suffix) {
                return false;
            }
            word.truncate(word.len() - suffix.len());
            word.push_str(replacement);
            return true;
        }
    }
    false
}

/// Step 1a.
fn plural(word: &mut String) {
    if word.len() == 4 && word.ends_with("ies") {
        word.pop();
        return;
    }
    let rules = [("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")];
    first_match(word, &rules, |_, _| true);
}

/// Step 1b.
fn past_and_gerund(word: &mut String) {
    if word.ends_with("ied") {
        let dropped = if word.len() == 4 { 1 } else { 2 };
        word.truncate(word.len() - dropped);
        return;
    }
    if let Some(stem) = word.strip_suffix("eed") {
        if measure(stem) > 0 {
            word.pop();
        }
        return;
    }
    let suffixes = [("ed", ""), ("ing", "")];
    if !first_match(word, &suffixes, |stem, _| has_vowel(stem)) {
        return;
    }
    let restored = [("at", "ate"), ("bl", "ble"), ("iz", "ize")];
    if first_match(word, &restored, |_, _| true) {
        return;
    }
    if ends_double_consonant(word) {
        if !word.ends_with(['l', 's', 'z']) {
            word.pop();
        }
    } else if measure(word) == 1 && ends_cvc(word) {
        word.push('e');
    }
}

/// Step 1c, NLTK's condition: the letter before is a consonant and not the first.
fn final_y(word: &mut String) {
    if let Some(stem) = word.strip_suffix('y')
        && stem.len() > 1
        && consonants(stem)[stem.len() - 1]
    {
        word.pop();
        word.push('i');
    }
}

/// Step 2.
fn double_suffix(word: &mut String) {
    // NLTK takes "alli" first and runs the result through the step again.
    while word
        .strip_suffix("alli")
        .is_some_and(|stem| measure(stem) > 0)
    {
        word.truncate(word.len() - 2);
    }
    first_match(word, &STEP_2, |stem, suffix| {
        // The l of "logi" counts with the stem.
        if suffix == "logi" {
            measure(&format!("{stem}l")) > 0
        } else {
            measure(stem) > 0
        }
    });
}

/// Step 5a.
fn final_e(word: &mut String) {
    if let Some(stem) = word.strip_suffix('e') {
        let m = measure(stem);
        if m > 1 || (m == 1 && !ends_cvc(stem)) {
            word.pop();
        }
    }
}

const STEP_2: [(&str, &str); 22] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
    ("logi", "log"),
];

const STEP_3: [(&str, &str); 7] = [
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
];

const STEP_4: [(&str, &str); 19] = [
    ("al", ""),
    ("ance", ""),
    ("ence", ""),
    ("er", ""),
    ("ic", ""),
    ("able", ""),
    ("ible", ""),
    ("ant", ""),
    ("ement", ""),
    ("ment", ""),
    ("ent", ""),
    ("ion", ""),
    ("ou", ""),
    ("ism", ""),
    ("ate", ""),
    ("iti", ""),
    ("ous", ""),
    ("ive", ""),
    ("ize", ""),
];
