//! The log-likelihoods of the letters after a multiple-choice prompt.
//!
//! Tokenised as lm-evaluation-harness does: the prompt alone, then prompt and ` A` together; what
//! the second has beyond the length of the first is the letter. Prompts longer than the model's
//! context lose their beginning. Where all four letters are one token each, one row of logits
//! answers a question; what neighbouring prompts share is decoded once.

use super::{N_BATCH, N_PARALLEL};
use crate::adapter::Loaded;
use crate::data::choice::LETTERS;
use crate::data::{DataError, Tokenize};
use crate::error::Error;
use crate::eval::choice::likeliest;
use crate::ggml::{Batch, Context, ContextOptions, Model, Token};
use crate::likelihood::nll;

/// How a model takes one question.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// log p of each letter, in nats.
    pub log_likelihoods: [f64; 4],
    /// The likeliest letter's index.
    pub chosen: usize,
    /// Whether the prompt was cut to the model's context.
    pub truncated: bool,
}

/// Tokens to decode and the letters' tokens to score on the way.
struct Path {
    prompt: usize,
    tokens: Vec<Token>,
    /// Index into `tokens` of the row, choice, and the token that should follow; ascending.
    wants: Vec<(usize, usize, Token)>,
}

impl Path {
    /// The tokens before the first wanted row: what may be decoded beforehand.
    fn quiet(&self) -> &[Token] {
        &self.tokens[..self.wants[0].0]
    }
}

/// Score the four letters after each prompt.
///
/// # Errors
/// A vocabulary in which a letter has no token of its own; llama.cpp's failures.
pub fn answer_choices(
    model: &Model,
    adapters: &Loaded,
    prompts: &[String],
    n_threads: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Answered>, Error> {
    let max_tokens = model.n_ctx_train().max(2) as usize;
    let mut answered = vec![
        Answered {
            log_likelihoods: [0.0; 4],
            chosen: 0,
            truncated: false,
        };
        prompts.len()
    ];
    let mut paths = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let mut laid_out = lay_out(model, i, prompt).map_err(|source| DataError::Tokenize {
            record: i + 1,
            source,
        })?;
        for path in &mut laid_out {
            answered[i].truncated |= truncate(path, max_tokens);
        }
        paths.append(&mut laid_out);
    }
    let Some(longest) = paths.iter().map(|p| p.tokens.len()).max() else {
        return Ok(answered);
    };
    let mut context = Context::new(
        model,
        ContextOptions {
            n_ctx: (longest + N_BATCH) as u32,
            n_batch: N_BATCH as u32,
            n_seq_max: N_PARALLEL as u32 + 1,
            n_threads,
            flash_attn: true,
            ..ContextOptions::default()
        },
    )?;
    context.set_adapters(adapters)?;
    let mut held = Vec::new();
    let mut first = 0;
    while first < paths.len() {
        let (end, shared) = group(&paths, first, context.n_batch());
        hold(&mut context, &mut held, &paths[first].tokens[..shared])?;
        decode(&mut context, &paths[first..end], shared, &mut answered)?;
        first = end;
        progress(paths.get(end).map_or(prompts.len(), |next| next.prompt));
    }
    for answer in &mut answered {
        answer.chosen = likeliest(&answer.log_likelihoods);
    }
    Ok(answered)
}

fn lay_out(
    model: &Model,
    prompt: usize,
    text: &str,
) -> Result<Vec<Path>, crate::data::TokenizeError> {
    let context = Tokenize::tokenize(model, text, true, false)?;
    let mut letters = Vec::with_capacity(4);
    for letter in LETTERS {
        let whole = Tokenize::tokenize(model, &format!("{text} {letter}"), true, false)?;
        let own = whole.get(context.len()..).unwrap_or(&[]).to_vec();
        if own.is_empty() || context.is_empty() {
            return Err(format!("the letter {letter} has no token of its own").into());
        }
        letters.push(own);
    }
    let last = context.len() - 1;
    if letters.iter().all(|letter| letter.len() == 1) {
        let want = |(choice, letter): (usize, &Vec<Token>)| (last, choice, letter[0]);
        return Ok(vec![Path {
            prompt,
            wants: letters.iter().enumerate().map(want).collect(),
            tokens: context,
        }]);
    }
    let path = |(choice, letter): (usize, &Vec<Token>)| Path {
        prompt,
        tokens: [&context[..], &letter[..letter.len() - 1]].concat(),
        wants: (last..)
            .zip(letter)
            .map(|(at, &t)| (at, choice, t))
            .collect(),
    };
    Ok(letters.iter().enumerate().map(path).collect())
}

/// Cut the beginning, BOS and all, as the harness does.
fn truncate(path: &mut Path, max_tokens: usize) -> bool {
    let n_cut = path.tokens.len().saturating_sub(max_tokens);
    // A letter of more tokens than the context holds would lose its own.
    let n_cut = n_cut.min(path.wants[0].0);
    path.tokens.drain(..n_cut);
    for want in &mut path.wants {
        want.0 -= n_cut;
    }
    n_cut > 0
}

fn common(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// How far the group from `first` on reaches, and how many tokens its paths share with each other
/// and with the path that follows: what is worth holding.
fn group(paths: &[Path], first: usize, n_batch: usize) -> (usize, usize) {
    let mut shared = paths[first].quiet().len();
    let mut best = None;
    let mut n_tokens = 0;
    let limit = paths.len().min(first + N_PARALLEL);
    for end in first + 1..=limit {
        n_tokens += paths[end - 1].tokens.len();
        // Nothing follows the last path; a lone one has nobody to share with.
        if let Some(next) = paths.get(end) {
            shared = shared.min(common(paths[first].quiet(), next.quiet()));
        } else if end == first + 1 && first == 0 {
            shared = 0;
        } else if end == first + 1 {
            shared = shared.min(common(paths[first].quiet(), paths[first - 1].quiet()));
        }
        if best.is_some() && n_tokens - shared * (end - first) > n_batch {
            break;
        }
        best = Some((end, shared));
    }
    best.expect("a group has its first path")
}

/// Let sequence 0 hold `wanted` and nothing else.
fn hold(context: &mut Context, held: &mut Vec<Token>, wanted: &[Token]) -> Result<(), Error> {
    let mut keep = common(held, wanted);
    let model = context.model();
    if keep < held.len() && (model.n_swa() > 0 || model.is_recurrent()) {
        // A sliding window has dropped what stood before the part that goes, and a recurrent
        // state cannot go back.
        keep = 0;
    }
    context.forget(0, keep as i32);
    held.truncate(keep);
    let n_batch = context.n_batch();
    for piece in wanted[keep..].chunks(n_batch) {
        let mut batch = Batch::default();
        for (i, &token) in piece.iter().enumerate() {
            batch.push(token, (held.len() + i) as i32, 0, false);
        }
        context.decode(&mut batch)?;
        held.extend_from_slice(piece);
    }
    Ok(())
}

/// Decode what the paths have beyond the `shared` tokens and add up their log-likelihoods.
fn decode(
    context: &mut Context,
    paths: &[Path],
    shared: usize,
    answered: &mut [Answered],
) -> Result<(), Error> {
    let mut items = Vec::new();
    for (path, seq) in paths.iter().zip(1..) {
        if shared > 0 {
            context.share(0, seq);
        }
        items.extend((shared..path.tokens.len()).map(|at| (path, at, seq)));
    }
    for piece in items.chunks(context.n_batch()) {
        let mut batch = Batch::default();
        for &(path, at, seq) in piece {
            let wanted = path.wants.iter().any(|want| want.0 == at);
            batch.push(path.tokens[at], at as i32, seq, wanted);
        }
        context.decode(&mut batch)?;
        for (i, &(path, at, _)) in piece.iter().enumerate() {
            for &(_, choice, token) in path.wants.iter().filter(|want| want.0 == at) {
                let row = context.logits(i).expect("asked for in this batch");
                answered[path.prompt].log_likelihoods[choice] -= nll(row, token);
            }
        }
    }
    for seq in 1..=paths.len() as i32 {
        context.forget(seq, 0);
    }
    Ok(())
}
