//! What passes between the HTTP side and the engine: texts to write, and what comes of them.

use crate::ggml::Token;
use crate::runtime::ActiveSet;
use crate::score::{Finish, Sampling};
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

/// What the engine is told.
pub(super) enum Message {
    /// Write a text.
    Job(Job),
    /// The active patches have changed: wake up and let go of the old ones.
    Changed,
    /// End now, whatever is being written.
    Stop,
}

/// One text to write.
pub(super) struct Job {
    /// Tokens it follows; not empty, and fewer than a slot holds.
    pub prompt: Arc<[Token]>,
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// Texts before which it ends.
    pub stops: Vec<String>,
    /// Likeliest tokens to name beside each; none: no log-probabilities at all.
    pub top: Option<usize>,
    /// Log-probabilities of the prompt's tokens too.
    pub score_prompt: bool,
    /// The set of the request it belongs to.
    pub under: Arc<Under>,
    /// Which of the request's texts it is.
    pub index: usize,
    /// Unbounded, but a text ends at its slot's size: a slow reader must not hold up the others.
    pub events: UnboundedSender<(usize, Event)>,
    /// Its place in slots and queue, free again when it is dropped.
    pub _place: OwnedSemaphorePermit,
    pub accepted: Instant,
}

/// Under which patches a request is answered: those active when its first text begins.
#[derive(Default)]
pub(super) struct Under {
    /// Under none, whatever is active.
    pub unpatched: bool,
    pub set: OnceLock<Arc<ActiveSet>>,
}

/// What comes of a job, in this order; none follows the last two.
pub(super) enum Event {
    /// It has a slot.
    Started {
        set: Arc<ActiveSet>,
        /// Tokens of the prompt that the slot held already.
        n_kept: usize,
    },
    /// The prompt's tokens, when they were asked for.
    Prompt(Vec<Chosen>),
    Piece(Piece),
    Done {
        finish: Finish,
        n_tokens: usize,
    },
    Failed(String),
}

/// Text that is sure to belong to the answer.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Piece {
    pub text: String,
    /// The tokens that end in it, where log-probabilities are wanted.
    pub tokens: Vec<Chosen>,
}

impl Piece {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }
}

/// A token and how likely it was.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chosen {
    pub token: Token,
    /// Its part of the text; control tokens have none.
    pub bytes: Vec<u8>,
    /// Before any sampling setting; none for a prompt's first token.
    pub logprob: Option<f64>,
    /// The likeliest tokens in its place, likeliest first; control tokens are spelled out.
    pub top: Vec<Chosen>,
}
