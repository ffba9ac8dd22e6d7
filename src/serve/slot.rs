//! A slot of the engine, and the text that is being written in it: logits in, events out.

use super::job::{Chosen, Event, Job, Piece};
use super::metrics::Metrics;
use super::text::Text;
use crate::digest::Digest;
use crate::ggml::{Model, Token};
use crate::likelihood::nll;
use crate::runtime::{ActiveSet, Finish};
use crate::score::Writer;
use std::sync::Arc;

/// A sequence of the context.
pub(super) struct Slot {
    /// Tokens of it in the KV cache.
    pub cached: Vec<Token>,
    /// The set they were computed under.
    pub key: Digest,
    /// Turn in which it was last used.
    pub used: u64,
    pub running: Option<Running>,
}

/// A text that is being written.
pub(super) struct Running {
    model: Model,
    pub job: Job,
    pub set: Arc<ActiveSet>,
    writer: Writer,
    text: Text,
    /// The token that was chosen and not yet computed; none while the prompt is computed.
    pub next: Option<Token>,
    n_tokens: usize,
    /// The prompt's tokens, as far as they are scored.
    scored: Vec<Chosen>,
}

impl Running {
    /// One that begins.
    pub(super) fn new(job: Job, set: Arc<ActiveSet>, model: &Model) -> Self {
        Self {
            writer: Writer::new(model, &job.sampling, job.max_tokens),
            text: Text::new(job.stops.clone()),
            next: None,
            n_tokens: 0,
            scored: Vec::new(),
            model: model.clone(),
            set,
            job,
        }
    }

    /// Go on from `logits`, which follow the first `n` tokens; `is_last`: nothing else does.
    /// False when the text is over.
    pub(super) fn read(
        &mut self,
        logits: &[f32],
        n: usize,
        is_last: bool,
        n_ctx: usize,
        metrics: &Metrics,
    ) -> bool {
        let model = &self.model.clone();
        if self.job.score_prompt && n <= self.job.prompt.len() {
            if n == 1 {
                self.scored.push(Chosen {
                    token: self.job.prompt[0],
                    bytes: model.piece(self.job.prompt[0], false),
                    logprob: None,
                    top: Vec::new(),
                });
            }
            match self.job.prompt.get(n) {
                Some(&token) => {
                    let top = self.job.top.unwrap_or(0);
                    self.scored.push(chosen(model, logits, token, top));
                }
                None => {
                    let scored = std::mem::take(&mut self.scored);
                    self.tell(Event::Prompt(scored));
                }
            }
        }
        if !is_last || n < self.job.prompt.len() {
            return true;
        }
        let token = match self.writer.next(logits) {
            Ok(token) => token,
            Err(finish) => {
                let rest = self.text.finish();
                self.over(rest, finish, metrics);
                return false;
            }
        };
        if self.n_tokens == 0 {
            let took = self.job.accepted.elapsed();
            metrics.first_token.observe(took.as_secs_f64());
        }
        self.n_tokens += 1;
        metrics.generated_tokens.inc();
        let top = self.job.top;
        let chosen = top.map(|top| chosen(model, logits, token, top));
        let (mut piece, is_stop) = self.text.push(&model.piece(token, false), chosen);
        if is_stop {
            self.over(piece, Finish::Stopped, metrics);
            return false;
        }
        if n + 1 >= n_ctx {
            let rest = self.text.finish();
            piece.text += &rest.text;
            piece.tokens.extend(rest.tokens);
            self.over(piece, Finish::Room, metrics);
            return false;
        }
        if !piece.is_empty() {
            self.tell(Event::Piece(piece));
        }
        self.next = Some(token);
        true
    }

    fn over(&self, rest: Piece, finish: Finish, metrics: &Metrics) {
        if !rest.is_empty() {
            self.tell(Event::Piece(rest));
        }
        let took = self.job.accepted.elapsed();
        metrics.answer.observe(took.as_secs_f64());
        self.tell(Event::Done {
            finish,
            n_tokens: self.n_tokens,
        });
    }

    /// A client that has gone is noticed at the next turn.
    pub(super) fn tell(&self, event: Event) {
        let _ = self.job.events.send((self.job.index, event));
    }
}

/// `token` with its log-probability in `logits [n_vocab]` and those of the `top` likeliest.
fn chosen(model: &Model, logits: &[f32], token: Token, top: usize) -> Chosen {
    let logprob = -nll(logits, token);
    // log p = logit − log Σ exp, the same for every token.
    let log_sum = f64::from(logits[token as usize]) - logprob;
    let mut order: Vec<Token> = (0..logits.len() as Token).collect();
    let by_logit = |a: &Token, b: &Token| {
        let (a, b) = (*a as usize, *b as usize);
        logits[b].total_cmp(&logits[a]).then(a.cmp(&b))
    };
    let top = top.min(order.len());
    if top > 0 {
        order.select_nth_unstable_by(top - 1, by_logit);
    }
    order.truncate(top);
    order.sort_unstable_by(by_logit);
    let named = |t: Token| Chosen {
        token: t,
        bytes: model.piece(t, true),
        logprob: Some(f64::from(logits[t as usize]) - log_sum),
        top: Vec::new(),
    };
    Chosen {
        token,
        bytes: model.piece(token, false),
        logprob: Some(logprob),
        top: order.into_iter().map(named).collect(),
    }
}
