//! A set of records scored: probability of the true answers, and greedy answers beside them.

use super::{MAX_ANSWER, answer_losses, generate_greedy, scoring_context};
use crate::data::{Record, Template, build_samples};
use crate::error::Error;
use crate::eval::rouge::rouge;
use crate::ggml::{Adapter, Model};
use crate::likelihood::{mean_nll, mean_prob};
use serde::Serialize;
use std::sync::Arc;

/// One record's scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    /// Mean −log p of an answer token.
    pub nll: f64,
    /// Answer tokens.
    pub tokens: usize,
    /// ROUGE-L recall of the greedy answer, if one was written.
    pub rouge_l: Option<f64>,
    /// The greedy answer.
    pub answer: Option<String>,
}

/// Scores of a set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Samples.
    pub n: usize,
    /// Mean over samples of answer probability^(1/tokens).
    pub prob: f64,
    /// Mean ROUGE-L recall of the greedy answers against the true ones.
    pub rouge_l: Option<f64>,
    /// Mean over samples of the mean answer NLL.
    pub nll: f64,
    /// Answer tokens in all.
    pub tokens: usize,
    /// Per record, in order.
    #[serde(skip)]
    pub scored: Vec<Scored>,
}

/// Score `records` under the model with `adapters`. Greedy answers are written unless
/// `generate` is false; running text has none.
///
/// # Errors
/// Records that cannot be tokenised, llama.cpp's failures.
pub fn evaluate(
    model: &Model,
    adapters: &[(Arc<Adapter>, f32)],
    template: &Template,
    records: &[Record],
    generate: bool,
    (max_tokens, n_threads): (usize, usize),
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Evaluation, Error> {
    let samples = build_samples(records, model, template, max_tokens)?.samples;
    let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let asked: Vec<usize> = (0..records.len())
        .filter(|&i| generate && samples.len() == records.len() && records[i].turns().is_some())
        .collect();
    let room = if asked.is_empty() {
        longest
    } else {
        longest + MAX_ANSWER
    };
    let mut context = scoring_context(model, adapters, room, n_threads)?;
    let total = samples.len() + asked.len();
    let losses = answer_losses(&mut context, &samples, &mut |n| progress(n, total))?;
    let prompts: Vec<Vec<i32>> = asked
        .iter()
        .map(|&i| samples[i].prompt_tokens().to_vec())
        .collect();
    let n_scored = samples.len();
    let answers = generate_greedy(&mut context, &prompts, MAX_ANSWER, &mut |n| {
        progress(n_scored + n, total)
    })?;
    let mut scored: Vec<Scored> = losses
        .iter()
        .map(|l| Scored {
            nll: l.per_token(),
            tokens: l.n_tokens,
            rouge_l: None,
            answer: None,
        })
        .collect();
    for (&i, tokens) in asked.iter().zip(&answers) {
        let text = model.detokenize(tokens).trim().to_owned();
        scored[i].rouge_l = Some(rouge(records[i].answer(), &text).rouge_l.recall);
        scored[i].answer = Some(text);
    }
    Ok(Evaluation {
        n: samples.len(),
        prob: mean_prob(&losses),
        nll: mean_nll(&losses),
        tokens: losses.iter().map(|l| l.n_tokens).sum(),
        rouge_l: mean(scored.iter().filter_map(|s| s.rouge_l)),
        scored,
    })
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (n, sum) = values.fold((0usize, 0.0), |(n, sum), v| (n + 1, sum + v));
    (n > 0).then(|| sum / n as f64)
}
