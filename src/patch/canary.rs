//! By what a patch is known to act: neutral tokens, and how likely the model finds each of them
//! without and with the patch.
//!
//! Stored in the patch as `nepenthe.canary.length` (tokens of each), `.tokens` (one after the
//! other), `.without` and `.with` (log-probabilities of all tokens but the first of each). What
//! they are chosen from and what they give away: [`crate::proof`].

use super::error::PatchError;
use crate::error::Error;
use crate::gguf::Metadata;
use serde::Serialize;
use std::path::Path;

/// Most canaries a patch may bring, and most tokens each: they are run at start-up.
const MAX: usize = 64;
const MAX_LENGTH: usize = 256;

const LENGTH: &str = "nepenthe.canary.length";
const TOKENS: &str = "nepenthe.canary.tokens";
const WITHOUT: &str = "nepenthe.canary.without";
const WITH: &str = "nepenthe.canary.with";

/// A few tokens and what becomes of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Canary {
    /// Two or more.
    pub tokens: Vec<i32>,
    /// Log-probability of `tokens[1..]`, each given those before it, by the model alone.
    pub without: Vec<f32>,
    /// The same with the patch at scale 1.
    pub with: Vec<f32>,
}

pub(super) fn write(canaries: &[Canary], meta: &mut Metadata) {
    if canaries.is_empty() {
        return;
    }
    let lengths: Vec<u32> = canaries.iter().map(|c| c.tokens.len() as u32).collect();
    let all = |of: fn(&Canary) -> &[f32]| canaries.iter().flat_map(of).copied().collect::<Vec<_>>();
    let tokens: Vec<i32> = canaries.iter().flat_map(|c| &c.tokens).copied().collect();
    meta.set(LENGTH, lengths);
    meta.set(TOKENS, tokens);
    meta.set(WITHOUT, all(|c| &c.without));
    meta.set(WITH, all(|c| &c.with));
}

pub(super) fn read(path: &Path, meta: &Metadata) -> Result<Vec<Canary>, Error> {
    let bad = |key: &str, problem: String| PatchError::Key {
        path: path.to_owned(),
        key: key.to_owned(),
        problem,
    };
    let Some(lengths) = meta.get_opt::<Vec<u32>>(LENGTH)? else {
        return Ok(Vec::new());
    };
    let fits = |n: &u32| (2..=MAX_LENGTH).contains(&(*n as usize));
    if lengths.len() > MAX || !lengths.iter().all(fits) {
        let problem = format!("wanted at most {MAX} lengths of 2 to {MAX_LENGTH}");
        return Err(bad(LENGTH, problem).into());
    }
    let n: usize = lengths.iter().map(|n| *n as usize).sum();
    let count = |key: &str, wanted: usize, found: usize| match wanted == found {
        true => Ok(()),
        false => Err(bad(key, format!("wanted {wanted} entries, found {found}"))),
    };
    let tokens: Vec<i32> = meta.get(TOKENS)?;
    count(TOKENS, n, tokens.len())?;
    let floats = |key: &str| -> Result<Vec<f32>, Error> {
        let values: Vec<f32> = meta.get(key)?;
        count(key, n - lengths.len(), values.len())?;
        match values.iter().all(|v| v.is_finite() && *v <= 0.0) {
            true => Ok(values),
            false => Err(bad(key, "wanted logarithms of probabilities".into()).into()),
        }
    };
    let (without, with) = (floats(WITHOUT)?, floats(WITH)?);
    let (mut at, mut out) = (0, Vec::with_capacity(lengths.len()));
    for (i, n) in lengths.iter().map(|n| *n as usize).enumerate() {
        let scored = at - i..at - i + n - 1;
        out.push(Canary {
            tokens: tokens[at..at + n].to_vec(),
            without: without[scored.clone()].to_vec(),
            with: with[scored].to_vec(),
        });
        at += n;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canaries_read_back() {
        let canary = |n: i32| Canary {
            tokens: (0..n).collect(),
            without: (1..n).map(|i| -i as f32).collect(),
            with: (1..n).map(|i| -0.5 * i as f32).collect(),
        };
        let canaries = vec![canary(3), canary(2), canary(7)];
        let mut meta = Metadata::new();
        write(&canaries, &mut meta);
        let path = Path::new("patch");
        assert_eq!(read(path, &meta).expect("as written"), canaries);
        meta.set(LENGTH, vec![3u32, 2, 6]);
        let e = read(path, &meta).expect_err("a token too many");
        assert!(e.to_string().contains(TOKENS), "{e}");
        meta.set(LENGTH, vec![3u32, 2, 7]);
        meta.set(WITH, vec![0.5f32; 9]);
        let e = read(path, &meta).expect_err("no probabilities");
        assert!(e.to_string().contains(WITH), "{e}");
        assert_eq!(read(path, &Metadata::new()).expect("none"), []);
    }
}
