//! Measuring a model as it will be used: llama.cpp's own decode, with any adapters applied.
//!
//! [`answer_losses`] scores given answers, [`generate_greedy`] writes answers, [`perplexity`] reads running
//! text, [`evaluate`] is what `nepenthe eval` prints.

#[cfg(feature = "evidence")]
mod choice;
#[cfg(feature = "train")]
mod evaluate;
mod generate;
mod losses;
#[cfg(feature = "evidence")]
mod privacy;
mod sampling;
#[cfg(feature = "evidence")]
mod set_scores;
#[cfg(feature = "evidence")]
mod shared;
#[cfg(feature = "evidence")]
pub mod tofu;
#[cfg(feature = "evidence")]
mod tofu_partial;

#[cfg(feature = "evidence")]
pub use choice::{Answered, answer_choices};
#[cfg(feature = "train")]
pub use evaluate::{Evaluation, Scored, evaluate};
pub use generate::{generate_greedy, generate_streaming};
pub use losses::{answer_losses, answer_rows, perplexity, sequence_nll};
#[cfg(feature = "evidence")]
pub use privacy::{Measured, Privacy, PrivacyLogError, Retain, Sets, measure_privacy};
pub use sampling::{Finish, Sampling, Writer};
#[cfg(feature = "evidence")]
pub use set_scores::{Mean, SetScores};
#[cfg(feature = "evidence")]
pub use shared::shared_losses;

use crate::data::Sample;
use crate::error::Error;
use crate::ggml::{Adapter, Context, ContextOptions, Model};
use crate::likelihood::SampleLoss;
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
    small_scoring_context(model, adapters, n_per_sequence, n_threads, N_PARALLEL)
}

/// [`scoring_context`] with room for `n_parallel` sequences: a large model's keys and values take a
/// megabyte for two tokens.
///
/// # Errors
/// When llama.cpp cannot make it.
pub fn small_scoring_context(
    model: &Model,
    adapters: &[(Arc<Adapter>, f32)],
    n_per_sequence: usize,
    n_threads: usize,
    n_parallel: usize,
) -> Result<Context, Error> {
    let n_ctx = n_parallel * n_per_sequence.max(32);
    context_for(
        model,
        adapters,
        (n_ctx, n_per_sequence),
        n_threads,
        n_parallel,
    )
}

/// A context of `n_ctx` tokens for so many sequences of so many.
fn context_for(
    model: &Model,
    adapters: &[(Arc<Adapter>, f32)],
    (n_ctx, n_per_sequence): (usize, usize),
    n_threads: usize,
    n_seq_max: usize,
) -> Result<Context, Error> {
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
