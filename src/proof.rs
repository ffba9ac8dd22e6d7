//! Proof that a patch acts: its canaries, chosen when it is made and run wherever it is applied.
//!
//! A canary is the beginning of a paragraph of the built-in general text ([`GENERAL_TEXT`]), with
//! the log-probabilities its tokens have without and with the patch ([`Canary`]). Of all
//! paragraphs those are taken on which the patch acts most. The forgotten texts have no part in
//! this: the choice is a function of the model and the patch alone, which whoever holds both could
//! make again, so that the canaries give nothing away that the patch does not.
//!
//! With dᵢ = withᵢ − withoutᵢ as stored and mᵢ the same as measured here, the patch's strength is
//! Σ mᵢdᵢ / Σ dᵢ², 1 where it acts as it did and 0 where it does not act; and the model's deviation
//! is rms(withoutᵢ measured − stored) / rms(dᵢ), small against 1 where it is the same model on
//! whatever kernels, and large for another.

use crate::adapter::Loaded;
use crate::data::{GENERAL_TEXT, Sample, parse_text};
use crate::error::Error;
use crate::ggml::Model;
use crate::likelihood::nll;
use crate::patch::Canary;
use crate::score::{answer_rows, scoring_context};
use serde::Serialize;
use thiserror::Error as ThisError;

/// Canaries of a patch.
const N_CANARIES: usize = 4;
/// Tokens of each.
const N_TOKENS: usize = 16;
/// Least root mean square of d, in nats, that is told from another machine's rounding.
const LEAST_EFFECT: f64 = 0.05;
/// And least multiple of this machine's own rounding.
const LEAST_RATIO: f64 = 5.0;
/// Strength of a patch at scale 1 that is believed.
const STRENGTH: std::ops::RangeInclusive<f64> = 0.5..=1.5;
/// Largest deviation of the model alone.
const MAX_DEVIATION: f64 = 0.5;

/// Largest difference of several patches from their concatenation.
const MAX_DIFFERENCE: f64 = 0.25;

/// Why a patch is not believed to act.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, ThisError)]
#[non_exhaustive]
pub enum ProofError {
    #[error(
        "{patch}: not active: its canaries show a strength of {strength:.2}, wanted 0.5 to 1.5"
    )]
    NotActive { patch: String, strength: f64 },
    #[error(
        "{patch}: another model is loaded than it was made for: without the patch its canaries differ by {deviation:.2} of the patch's effect, wanted at most 0.5"
    )]
    OtherModel { patch: String, deviation: f64 },
    #[error(
        "the patches together act otherwise than side by side: they differ by {difference:.2} of their effect, wanted at most 0.25"
    )]
    Together { difference: f64 },
    #[error("{patch}: brings no canaries by which its effect could be seen")]
    NoCanaries { patch: String },
}

/// What canaries show.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Effect {
    /// 1: as when the patch was made; 0: none.
    pub strength: f64,
    /// Of the model alone, relative to the patch's effect.
    pub deviation: f64,
}

impl Effect {
    /// Whether this is the effect of `patch` at scale 1.
    ///
    /// # Errors
    /// [`ProofError::OtherModel`], [`ProofError::NotActive`].
    pub fn believe(&self, patch: &str) -> Result<(), ProofError> {
        let patch = patch.to_owned();
        // A number that is none is no proof either.
        if self.deviation.is_nan() || self.deviation > MAX_DEVIATION {
            let deviation = self.deviation;
            return Err(ProofError::OtherModel { patch, deviation });
        }
        if !STRENGTH.contains(&self.strength) {
            let strength = self.strength;
            return Err(ProofError::NotActive { patch, strength });
        }
        Ok(())
    }
}

/// Canaries for what `adapters` do to `model`; none where it is too little to be seen.
///
/// # Errors
/// llama.cpp's failures.
pub fn choose(model: &Model, adapters: &Loaded, n_threads: usize) -> Result<Vec<Canary>, Error> {
    let begin = |text: String| {
        let mut tokens = model.tokenize(&text, true, false);
        tokens.truncate(N_TOKENS);
        tokens
    };
    let paragraphs = parse_text(GENERAL_TEXT).into_iter().map(begin);
    let tokens: Vec<Vec<i32>> = paragraphs.filter(|t| t.len() == N_TOKENS).collect();
    let tokens: Vec<&[i32]> = tokens.iter().map(Vec::as_slice).collect();
    let of = |adapters: &Loaded, tokens: &[&[i32]]| logprobs(model, adapters, tokens, n_threads);
    let (without, with) = (of(&Vec::new(), &tokens)?, of(adapters, &tokens)?);
    let mut by_effect: Vec<(f64, usize)> = (0..tokens.len())
        .map(|i| (squares(&differences(&without[i], &with[i])), i))
        .collect();
    by_effect.sort_by(|a, b| b.0.total_cmp(&a.0));
    let chosen: Vec<usize> = by_effect.iter().map(|(_, i)| *i).take(N_CANARIES).collect();
    // Once more as they will be run, since other company in a batch is other rounding; which is
    // what another machine's kernels would do.
    let few: Vec<&[i32]> = chosen.iter().map(|&i| tokens[i]).collect();
    let again = (of(&Vec::new(), &few)?, of(adapters, &few)?);
    let (mut effect, mut noise) = (0.0, 0.0);
    for (at, &i) in chosen.iter().enumerate() {
        effect += squares(&differences(&again.0[at], &again.1[at]));
        noise += squares(&differences(&again.0[at], &without[i]));
        noise += squares(&differences(&again.1[at], &with[i]));
    }
    let n = (chosen.len() * (N_TOKENS - 1)) as f64;
    let least = n * LEAST_EFFECT * LEAST_EFFECT;
    // Numbers that are none are no effect either.
    if effect.is_nan() || effect < least.max(LEAST_RATIO * LEAST_RATIO * noise / 2.0) {
        return Ok(Vec::new());
    }
    let short = |values: &[f64]| values.iter().map(|v| *v as f32).collect();
    let canary = |at: usize| Canary {
        tokens: few[at].to_vec(),
        without: short(&again.0[at]),
        with: short(&again.1[at]),
    };
    Ok((0..few.len()).map(canary).collect())
}

/// Run `canaries` with and without `adapters`; none where there are no canaries.
///
/// # Errors
/// llama.cpp's failures, canaries of another vocabulary.
pub fn measure(
    model: &Model,
    adapters: &Loaded,
    canaries: &[Canary],
    n_threads: usize,
) -> Result<Option<Effect>, Error> {
    if canaries.is_empty() {
        return Ok(None);
    }
    let tokens: Vec<&[i32]> = canaries.iter().map(|c| c.tokens.as_slice()).collect();
    let here_without = logprobs(model, &Vec::new(), &tokens, n_threads)?.concat();
    let here_with = logprobs(model, adapters, &tokens, n_threads)?.concat();
    let stored = |of: fn(&Canary) -> &[f32]| -> Vec<f64> {
        let all = canaries.iter().flat_map(of);
        all.map(|v| f64::from(*v)).collect()
    };
    let (without, with) = (stored(|c| &c.without), stored(|c| &c.with));
    let d = differences(&without, &with);
    let m = differences(&here_without, &here_with);
    let inner: f64 = m.iter().zip(&d).map(|(m, d)| m * d).sum();
    let off = differences(&without, &here_without);
    Ok(Some(Effect {
        strength: inner / squares(&d),
        deviation: (squares(&off) / squares(&d)).sqrt(),
    }))
}

/// Whether the adapters `one` do what `several` do, on the tokens of `canaries`.
///
/// # Errors
/// [`ProofError::Together`], llama.cpp's failures.
pub fn same_effect(
    model: &Model,
    (one, several): (&Loaded, &Loaded),
    canaries: &[Canary],
    n_threads: usize,
) -> Result<(), Error> {
    let tokens: Vec<&[i32]> = canaries.iter().map(|c| c.tokens.as_slice()).collect();
    let of = |adapters: &Loaded| -> Result<Vec<f64>, Error> {
        Ok(logprobs(model, adapters, &tokens, n_threads)?.concat())
    };
    let (without, one, several) = (of(&Vec::new())?, of(one)?, of(several)?);
    let effect = squares(&differences(&without, &several)).sqrt();
    let n = without.len() as f64;
    // Patches that cancel leave only rounding, which is compared with the least effect.
    let effect = effect.max(LEAST_EFFECT * n.sqrt());
    let difference = squares(&differences(&several, &one)).sqrt() / effect;
    if difference.is_nan() || difference > MAX_DIFFERENCE {
        return Err(ProofError::Together { difference }.into());
    }
    Ok(())
}

/// Log-probabilities of all tokens but the first of each list.
fn logprobs(
    model: &Model,
    adapters: &Loaded,
    lists: &[&[i32]],
    n_threads: usize,
) -> Result<Vec<Vec<f64>>, Error> {
    let samples: Vec<Sample> = lists
        .iter()
        .map(|tokens| Sample {
            tokens: tokens.to_vec(),
            answers: std::iter::once(1..tokens.len()).collect(),
            truncated: false,
        })
        .collect();
    let longest = lists.iter().map(|t| t.len()).max().unwrap_or(1);
    let mut context = scoring_context(model, adapters, longest, n_threads)?;
    answer_rows(
        &mut context,
        &samples,
        &|row, token| -nll(row, token),
        &mut |_| {},
    )
}

fn differences(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| b - a).collect()
}

fn squares(v: &[f64]) -> f64 {
    v.iter().map(|v| v * v).sum()
}
