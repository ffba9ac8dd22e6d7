//! Measuring a model as it will be used: llama.cpp's own decode, with any adapters applied.
//!
//! [`answer_losses`] scores given answers, [`generate_greedy`] writes answers, [`perplexity`] reads running
//! text, [`evaluate`] is what `nepenthe eval` prints.

mod choice;
mod generate;
mod losses;
mod privacy;
mod sampling;
mod set_scores;
mod shared;
pub mod tofu;
mod tofu_partial;

pub use choice::{Answered, answer_choices};
pub use generate::{generate_greedy, generate_streaming};
pub use losses::{answer_losses, answer_rows, perplexity, sequence_nll};
pub use privacy::{Measured, Privacy, PrivacyLogError, Retain, Sets, measure_privacy};
pub use sampling::{Finish, Sampling, Writer};
pub use set_scores::{Mean, SetScores};
pub use shared::shared_losses;

use crate::data::{Record, Sample, Template, build_samples};
use crate::error::Error;
use crate::eval::rouge::rouge;
use crate::ggml::{Adapter, Context, ContextOptions, Model};
use crate::train::engine::{SampleLoss, mean_nll, mean_prob};
use serde::Serialize;
use std::sync::Arc;

/// Sequences decoded side by side.
pub const N_PARALLEL: usize = 16;
/// Tokens per decode.
pub const N_BATCH: usize = 512;
/// Longest greedy answer.
pub const MAX_ANSWER: usize = 200;

/// A context for scoring with `adapters` applied: room for [`N_PARALLEL`] sequences of
/// `n_per_sequence` tokens.
///
/// # Errors
/// When llama.cpp cannot make it.
pub fn scoring_context(
    model: &Model,
    adapters: &[(Arc<Adapter>, f32)],
    n_per_sequence: usize,
    n_threads: usize,
) -> Result<Context, Error> {
    context_for(model, adapters, n_per_sequence, n_threads, N_PARALLEL)
}

/// [`scoring_context`] with other than [`N_PARALLEL`] sequences in the same room.
fn context_for(
    model: &Model,
    adapters: &[(Arc<Adapter>, f32)],
    n_per_sequence: usize,
    n_threads: usize,
    n_seq_max: usize,
) -> Result<Context, Error> {
    let n_ctx = N_PARALLEL * n_per_sequence.max(32);
    let mut context = Context::new(
        model,
        ContextOptions {
            n_ctx: n_ctx as u32,
            n_batch: N_BATCH.max(n_per_sequence) as u32,
            n_seq_max: n_seq_max as u32,
            n_threads,
            flash_attn: true,
            ..ContextOptions::default()
        },
    )?;
    if !adapters.is_empty() {
        context.set_adapters(adapters)?;
    }
    Ok(context)
}

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

/// Answer losses of `samples` alone, in a context of their own.
///
/// # Errors
/// llama.cpp's failures.
pub fn losses_of(
    model: &Model,
    adapters: &[(Arc<Adapter>, f32)],
    samples: &[Sample],
    n_threads: usize,
) -> Result<Vec<SampleLoss>, Error> {
    let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let mut context = scoring_context(model, adapters, longest, n_threads)?;
    answer_losses(&mut context, samples, &mut |_| {})
}
