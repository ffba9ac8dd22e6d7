//! Writing answers: greedy for many prompts at once, sampled and streamed for one.

use super::N_PARALLEL;
use super::sampling::{Finish, Sampling, Writer, argmax};
use crate::error::Error;
use crate::ggml::{Batch, Context, Token};

struct Running {
    prompt: usize,
    pos: i32,
    next: Token,
}

/// Greedy answers to `prompts`, `N_PARALLEL` of them at a time; each ends before the model's
/// end-of-generation token or at `max_tokens`.
///
/// # Errors
/// llama.cpp's failures.
pub fn generate_greedy(
    context: &mut Context,
    prompts: &[Vec<Token>],
    max_tokens: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<Token>>, Error> {
    generate_watched(context, prompts, max_tokens, &mut |finished| {
        progress(finished);
        Ok(())
    })
}

/// [`generate_greedy`] that `watch`, told before every decode how many answers are finished, can
/// end.
///
/// # Errors
/// llama.cpp's failures, and what `watch` ends it with.
pub(super) fn generate_watched(
    context: &mut Context,
    prompts: &[Vec<Token>],
    max_tokens: usize,
    watch: &mut dyn FnMut(usize) -> Result<(), Error>,
) -> Result<Vec<Vec<Token>>, Error> {
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut running: Vec<Option<Running>> = (0..N_PARALLEL).map(|_| None).collect();
    let mut queue = 0..prompts.len();
    let mut finished = 0;
    context.clear();
    // What all prompts begin with is computed once, where there is a sequence to hold it.
    let opening = match context.n_seq_max() > N_PARALLEL {
        true => common_opening(prompts),
        false => 0,
    };
    if opening > 0 {
        prefill(context, &prompts[0][..opening], 0, N_PARALLEL as i32)?;
    }
    loop {
        watch(finished)?;
        for (slot, run) in running.iter_mut().enumerate() {
            // A slot may pass through several prompts whose answers end at once.
            while run.is_none() {
                let Some(prompt) = queue.next() else { break };
                context.forget(slot as i32, 0);
                if opening > 0 {
                    context.share(N_PARALLEL as i32, slot as i32);
                }
                let row = prefill(context, &prompts[prompt], opening, slot as i32)?;
                let next = argmax(
                    context
                        .logits(row)
                        .expect("the last token's were asked for"),
                );
                *run = step(
                    context,
                    prompt,
                    prompts[prompt].len() as i32,
                    next,
                    max_tokens,
                    &mut answers[prompt],
                );
                finished += usize::from(run.is_none());
            }
        }
        let mut batch = Batch::default();
        let mut slots = Vec::new();
        for (slot, run) in running.iter().enumerate() {
            if let Some(run) = run {
                batch.push(run.next, run.pos, slot as i32, true);
                slots.push(slot);
            }
        }
        if batch.is_empty() {
            return Ok(answers);
        }
        context.decode(&mut batch)?;
        for (at, slot) in slots.into_iter().enumerate() {
            let run = running[slot].take().expect("slots hold running prompts");
            let next = argmax(context.logits(at).expect("asked for"));
            let answer = &mut answers[run.prompt];
            running[slot] = step(context, run.prompt, run.pos + 1, next, max_tokens, answer);
            finished += usize::from(running[slot].is_none());
        }
    }
}

/// Note `next`; `None` when the answer is over.
fn step(
    context: &Context,
    prompt: usize,
    pos: i32,
    next: Token,
    max_tokens: usize,
    answer: &mut Vec<Token>,
) -> Option<Running> {
    if context.model().is_end(next) || answer.len() >= max_tokens {
        return None;
    }
    answer.push(next);
    Some(Running { prompt, pos, next })
}

/// Decode a prompt from position `from` on into sequence `seq`, which holds what is before; the row
/// of its last token's logits.
fn prefill(context: &mut Context, prompt: &[Token], from: usize, seq: i32) -> Result<usize, Error> {
    let last = prompt.len().saturating_sub(1);
    let (mut row, mut pos) = (0, from);
    for piece in prompt[from..].chunks(context.n_batch()) {
        let mut batch = Batch::default();
        for (i, &token) in piece.iter().enumerate() {
            batch.push(token, pos as i32, seq, pos == last);
            (row, pos) = (i, pos + 1);
        }
        context.decode(&mut batch)?;
    }
    Ok(row)
}

/// How many tokens all prompts begin with, the last of each left out: its logits are needed.
fn common_opening(prompts: &[Vec<Token>]) -> usize {
    let Some((first, rest)) = prompts.split_first() else {
        return 0;
    };
    let common = |other: &Vec<Token>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    rest.iter()
        .map(|other| common(other).min(other.len().saturating_sub(1)))
        .fold(first.len().saturating_sub(1), usize::min)
}

/// Generate after `prompt`, of which sequence 0 holds the first `kept` tokens (below all of them)
/// and nothing else. `each` gets every token with the logits `[n_vocab]` it was chosen from, and
/// returns false to stop. Returns the tokens; the context then holds the prompt and all of them
/// but the last.
///
/// # Errors
/// llama.cpp's failures.
pub fn generate_streaming(
    context: &mut Context,
    prompt: &[Token],
    kept: usize,
    max_tokens: usize,
    sampling: &Sampling,
    each: &mut dyn FnMut(Token, &[f32]) -> bool,
) -> Result<(Vec<Token>, Finish), Error> {
    let mut writer = Writer::new(context.model(), sampling, max_tokens);
    let mut row = prefill(context, prompt, kept, 0)?;
    let mut out = Vec::new();
    for pos in prompt.len().. {
        let logits = context
            .logits(row)
            .expect("the last token's were asked for");
        let next = match writer.next(logits) {
            Ok(next) => next,
            Err(finish) => return Ok((out, finish)),
        };
        out.push(next);
        if !each(next, logits) {
            return Ok((out, Finish::Stopped));
        }
        if pos + 1 >= context.n_ctx() {
            return Ok((out, Finish::Room));
        }
        let mut batch = Batch::default();
        batch.push(next, pos as i32, 0, true);
        context.decode(&mut batch)?;
        row = 0;
    }
    unreachable!("positions have no end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prompt_keeps_its_last_token() {
        let prompts = |tokens: &[&[Token]]| tokens.iter().map(|t| t.to_vec()).collect::<Vec<_>>();
        assert_eq!(common_opening(&prompts(&[&[1, 2, 3], &[1, 2, 4]])), 2);
        assert_eq!(common_opening(&prompts(&[&[1, 2, 3], &[1, 2]])), 1);
        assert_eq!(common_opening(&prompts(&[&[1], &[1]])), 0);
        assert_eq!(common_opening(&[]), 0);
    }
}
