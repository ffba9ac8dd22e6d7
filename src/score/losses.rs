//! Answer losses and perplexity, several sequences to a decode.

use super::N_PARALLEL;
use crate::data::Sample;
use crate::error::Error;
use crate::ggml::{Batch, Context, Token};
use crate::graph::batch::pack;
use crate::likelihood::SampleLoss;
use crate::likelihood::nll;
use rayon::prelude::*;

/// Bytes of logits a decode may hold.
pub(super) const LOGIT_BYTES: usize = 128 << 20;

/// A logits row of the batch: where it is, whose it is, and the token that follows.
struct Row {
    at: usize,
    sample: usize,
    token: Token,
}

/// −log p of every answer token of `samples`, summed per sample.
///
/// # Errors
/// llama.cpp's failures.
pub fn answer_losses(
    context: &mut Context,
    samples: &[Sample],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<SampleLoss>, Error> {
    let rows = answer_rows(context, samples, &nll, progress)?;
    let sum = |nll: Vec<f64>| SampleLoss {
        nll: nll.iter().sum(),
        loss: nll.iter().sum(),
        n_tokens: nll.len(),
    };
    Ok(rows.into_iter().map(sum).collect())
}

/// `measure` of every answer token of `samples`: of the row of logits before it `[n_vocab]`, and
/// the token.
///
/// # Errors
/// llama.cpp's failures.
pub fn answer_rows<T: Send>(
    context: &mut Context,
    samples: &[Sample],
    measure: &(dyn Fn(&[f32], Token) -> T + Sync),
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<T>>, Error> {
    let max_rows = (LOGIT_BYTES / (4 * context.model().n_vocab())).max(1);
    let mut measured: Vec<Vec<T>> = samples.iter().map(|_| Vec::new()).collect();
    let lengths: Vec<usize> = samples.iter().map(|s| s.tokens.len() - 1).collect();
    let mut done = 0;
    let together = context.n_seq_max().min(N_PARALLEL);
    for bin in pack(&lengths, context.n_batch()) {
        for group in bin.chunks(together) {
            let mut at = 0;
            while at < group.len() {
                // As many samples as the logits of one decode have room for, at least one.
                let mut rows = 0;
                let mut end = at;
                while end < group.len()
                    && (end == at || rows + samples[group[end]].n_answer_tokens() <= max_rows)
                {
                    rows += samples[group[end]].n_answer_tokens();
                    end += 1;
                }
                let rows = decode(context, samples, &group[at..end])?;
                for (row, value) in rows.iter().zip(measure_rows(context, &rows, measure)) {
                    measured[row.sample].push(value);
                }
                done += end - at;
                progress(done);
                at = end;
            }
        }
    }
    Ok(measured)
}

fn decode(context: &mut Context, samples: &[Sample], group: &[usize]) -> Result<Vec<Row>, Error> {
    let mut batch = Batch::default();
    let mut rows = Vec::new();
    for (seq, &s) in group.iter().enumerate() {
        let sample = &samples[s];
        let n = sample.tokens.len() - 1;
        for (pos, &token) in sample.tokens[..n].iter().enumerate() {
            let wanted = sample.answers.iter().any(|a| a.contains(&(pos + 1)));
            if wanted {
                rows.push(Row {
                    at: batch.len(),
                    sample: s,
                    token: sample.tokens[pos + 1],
                });
            }
            batch.push(token, pos as i32, seq as i32, wanted);
        }
    }
    context.clear();
    context.decode(&mut batch)?;
    Ok(rows)
}

fn measure_rows<T: Send>(
    context: &Context,
    rows: &[Row],
    measure: &(dyn Fn(&[f32], Token) -> T + Sync),
) -> Vec<T> {
    let rows: Vec<(usize, Token)> = rows.iter().map(|r| (r.at, r.token)).collect();
    measure_at(context, &rows, measure)
}

/// −log p of each token after the batch's token at its place.
pub(super) fn row_nll(context: &Context, rows: &[(usize, Token)]) -> Vec<f64> {
    measure_at(context, rows, &nll)
}

fn measure_at<T: Send>(
    context: &Context,
    rows: &[(usize, Token)],
    measure: &(dyn Fn(&[f32], Token) -> T + Sync),
) -> Vec<T> {
    let logits: Vec<(&[f32], Token)> = rows
        .iter()
        .map(|&(at, token)| (context.logits(at).expect("asked for in this batch"), token))
        .collect();
    logits
        .par_iter()
        .map(|(row, token)| measure(row, *token))
        .collect()
}

/// Perplexity of `tokens` in windows of `n_ctx` that do not overlap, each scored in its second
/// half as llama.cpp's perplexity tool does; the first token of a window is replaced by `bos`
/// where there is one. A last window that is not full is left out.
///
/// Returns perplexity and the number of tokens scored.
///
/// # Errors
/// llama.cpp's failures.
pub fn perplexity(
    context: &mut Context,
    tokens: &[Token],
    n_ctx: usize,
    bos: Option<Token>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(f64, usize), Error> {
    let n_windows = tokens.len() / n_ctx;
    let (mut sum, mut n) = (0.0, 0);
    let first = n_ctx / 2;
    for (w, window) in tokens.chunks_exact(n_ctx).enumerate() {
        let mut window = window.to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        sequence_nll(context, &window, first, &mut |_, nll| {
            sum += nll;
            n += 1;
            true
        })?;
        progress(w + 1, n_windows);
    }
    Ok(((sum / n.max(1) as f64).exp(), n))
}

/// −log p of every token of `tokens` after number `first`, each given all before it. `each` gets
/// them in order with their tokens, a decode's worth at a time, and returns false to stop. What
/// the context held before is forgotten.
///
/// # Errors
/// llama.cpp's failures.
pub fn sequence_nll(
    context: &mut Context,
    tokens: &[Token],
    first: usize,
    each: &mut dyn FnMut(Token, f64) -> bool,
) -> Result<(), Error> {
    let max_rows = (LOGIT_BYTES / (4 * context.model().n_vocab())).clamp(1, context.n_batch());
    let last = tokens.len().saturating_sub(1);
    context.clear();
    let mut at = 0;
    while at < last {
        // Before the scored part no logits are wanted, and batches may be full.
        let room = if at < first { first - at } else { max_rows };
        let end = (at + room.min(context.n_batch())).min(last);
        let mut batch = Batch::default();
        let mut rows = Vec::new();
        for pos in at..end {
            let wanted = pos >= first;
            if wanted {
                rows.push((batch.len(), tokens[pos + 1]));
            }
            batch.push(tokens[pos], pos as i32, 0, wanted);
        }
        context.decode(&mut batch)?;
        for (nll, (_, token)) in row_nll(context, &rows).into_iter().zip(&rows) {
            if !each(*token, nll) {
                return Ok(());
            }
        }
        at = end;
    }
    Ok(())
}
