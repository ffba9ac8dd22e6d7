//! One context: prompts in, text and probabilities out.

use super::{ActiveSet, Runtime, take_text};
use crate::data::{Message, Record, Role, Template, build_prompt, build_samples};
use crate::error::Error;
use crate::ggml::{Context, ContextOptions, Model, Token};
use crate::likelihood::nll;
use crate::score::{Finish, Sampling, generate_streaming, sequence_nll};
use std::sync::Arc;

/// Tokens per decode.
const N_BATCH: u32 = 512;

/// What a session is asked to go on from.
#[derive(Debug, Clone, Copy)]
pub enum Prompt<'a> {
    /// One message, laid out by the chat template.
    User(&'a str),
    /// A conversation that ends with the user's turn, laid out by the chat template.
    Chat(&'a [Message]),
    /// Text as it is.
    Raw(&'a str),
    /// Tokens as they are.
    Tokens(&'a [Token]),
}

impl<'a> From<&'a str> for Prompt<'a> {
    fn from(text: &'a str) -> Self {
        Self::User(text)
    }
}

/// How to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Generate {
    /// Most tokens.
    pub max_tokens: usize,
    /// How each is chosen; by default the likeliest.
    pub sampling: Sampling,
}

impl Default for Generate {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            sampling: Sampling::default(),
        }
    }
}

/// A token as it comes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Piece<'a> {
    /// The token.
    pub token: Token,
    /// The text it completes; empty while a character of several tokens is unfinished.
    pub text: &'a str,
    /// Its log-probability, before any sampling setting.
    pub logprob: f64,
}

/// What was generated.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The text; an unfinished character at its end is left out.
    pub text: String,
    /// The tokens.
    pub tokens: Vec<Token>,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Of these, how many the session held already.
    pub n_kept: usize,
    /// Why it ended.
    pub finish: Finish,
    /// The patches it was generated under, first token to last.
    pub set: Arc<ActiveSet>,
}

/// How likely an answer is.
#[derive(Debug, Clone)]
pub struct Score {
    /// Tokens of the answer with their log-probabilities, each given all before it.
    pub tokens: Vec<(Token, f64)>,
    /// The patches it was scored under.
    pub set: Arc<ActiveSet>,
}

impl Score {
    /// Log-probability of the whole answer.
    pub fn logprob(&self) -> f64 {
        self.tokens.iter().map(|(_, p)| p).sum()
    }

    /// Probability^(1/tokens).
    pub fn probability(&self) -> f64 {
        (self.logprob() / self.tokens.len().max(1) as f64).exp()
    }
}

/// A context on a runtime's model. May move between threads; each call has it to itself.
pub struct Session {
    runtime: Runtime,
    context: Context,
    /// What the context was last given to apply.
    set: Arc<ActiveSet>,
    /// Tokens of sequence 0 in the KV cache, computed under `set`.
    cached: Vec<Token>,
}

impl Session {
    pub(super) fn new(runtime: Runtime) -> Result<Self, Error> {
        let options = runtime.options();
        let mut context = Context::new(
            runtime.model(),
            ContextOptions {
                n_ctx: options.n_ctx,
                n_batch: N_BATCH.min(options.n_ctx),
                n_threads: options.n_threads,
                flash_attn: true,
                ..ContextOptions::default()
            },
        )?;
        runtime.follow()?;
        let set = runtime.active();
        context.set_adapters(set.adapters())?;
        Ok(Self {
            runtime,
            context,
            set,
            cached: Vec::new(),
        })
    }

    /// The runtime it belongs to.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Tokens its context holds.
    pub fn n_ctx(&self) -> usize {
        self.context.n_ctx()
    }

    /// See the active set now rather than at the next call; what was computed under another is
    /// forgotten. Returns the set.
    ///
    /// # Errors
    /// As [`Runtime::follow`], llama.cpp's refusal.
    pub fn refresh(&mut self) -> Result<Arc<ActiveSet>, Error> {
        self.runtime.follow()?;
        let now = self.runtime.active();
        if now.generation() != self.set.generation() {
            self.cached.clear();
            self.context.set_adapters(now.adapters())?;
            self.set = now.clone();
        }
        Ok(now)
    }

    /// Forget the KV cache.
    pub fn clear(&mut self) {
        self.cached.clear();
        self.context.clear();
    }

    /// Generate after `prompt`. `each` sees every token as it comes and returns false to stop.
    ///
    /// # Errors
    /// A prompt that is empty, does not fit the context or cannot be laid out; llama.cpp's
    /// failures.
    pub fn generate<'p>(
        &mut self,
        prompt: impl Into<Prompt<'p>>,
        options: &Generate,
        each: &mut dyn FnMut(Piece<'_>) -> bool,
    ) -> Result<Generation, Error> {
        let set = self.refresh()?;
        let prompt = self.prompt(prompt.into())?;
        let n_kept = self.keep(&prompt);
        let model = self.runtime.model().clone();
        let (mut bytes, mut text) = (Vec::new(), String::new());
        let (tokens, finish) = generate_streaming(
            &mut self.context,
            &prompt,
            n_kept,
            options.max_tokens,
            &options.sampling,
            &mut |token, logits| {
                bytes.extend(model.piece(token, false));
                let whole = take_text(&mut bytes);
                text.push_str(&whole);
                each(Piece {
                    token,
                    text: &whole,
                    logprob: -nll(logits, token),
                })
            },
        )?;
        let n_prompt = prompt.len();
        if self.runtime.options().keep_cache {
            self.cached = prompt;
            // The last token was chosen, not computed.
            let computed = tokens.len().saturating_sub(1);
            self.cached.extend(&tokens[..computed]);
        }
        Ok(Generation {
            text,
            tokens,
            n_prompt,
            n_kept,
            finish,
            set,
        })
    }

    /// How likely `answer` is after `prompt`, its end included where the prompt is laid out by a
    /// template. `each` sees every token as it comes and returns false to stop.
    ///
    /// # Errors
    /// Prompt and answer that do not fit the context or cannot be laid out, no answer; llama.cpp's
    /// failures.
    pub fn score<'p>(
        &mut self,
        prompt: impl Into<Prompt<'p>>,
        answer: &str,
        each: &mut dyn FnMut(Piece<'_>) -> bool,
    ) -> Result<Score, Error> {
        let set = self.refresh()?;
        let (tokens, first) = self.with_answer(prompt.into(), answer)?;
        self.cached.clear();
        let model = self.runtime.model().clone();
        let (mut bytes, mut scored) = (Vec::new(), Vec::new());
        sequence_nll(&mut self.context, &tokens, first - 1, &mut |token, nll| {
            scored.push((token, -nll));
            bytes.extend(model.piece(token, false));
            each(Piece {
                token,
                text: &take_text(&mut bytes),
                logprob: -nll,
            })
        })?;
        Ok(Score {
            tokens: scored,
            set,
        })
    }

    /// Tokens to generate after.
    fn prompt(&self, prompt: Prompt<'_>) -> Result<Vec<Token>, Error> {
        let tokens = prompt_tokens(&self.runtime, prompt)?;
        self.fits("prompt", tokens.len(), 1)?;
        Ok(tokens)
    }

    /// Tokens of prompt and answer, and where the answer begins.
    fn with_answer(&self, prompt: Prompt<'_>, answer: &str) -> Result<(Vec<Token>, usize), Error> {
        let model = self.runtime.model();
        let mut template = self.runtime.template().clone();
        let messages = |turns: &[Message]| {
            let last = Message {
                role: Role::Assistant,
                content: answer.to_owned(),
            };
            Record::Messages(turns.iter().cloned().chain([last]).collect())
        };
        let record = match prompt {
            Prompt::User(text) => messages(&[user(text)]),
            Prompt::Chat(turns) => messages(turns),
            Prompt::Raw(text) => {
                template = Template::None;
                Record::Completion {
                    prompt: text.to_owned(),
                    completion: answer.to_owned(),
                }
            }
            Prompt::Tokens(tokens) => {
                let first = tokens.len();
                let tokens = [tokens, &model.tokenize(answer, false, false)].concat();
                self.fits("prompt", first, 1)?;
                self.fits("answer", tokens.len(), first + 1)?;
                return Ok((tokens, first));
            }
        };
        // Never cut: more than the context holds is refused below.
        let set = build_samples(&[record], model, &template, usize::MAX / 2)?;
        let sample = &set.samples[0];
        let first = sample.prompt_tokens().len();
        self.fits("prompt and answer", sample.tokens.len(), 2)?;
        Ok((sample.tokens.clone(), first))
    }

    fn fits(&self, setting: &'static str, found: usize, least: usize) -> Result<(), Error> {
        let most = self.n_ctx() - 1;
        if (least..=most).contains(&found) {
            return Ok(());
        }
        Err(Error::Setting {
            setting,
            wanted: format!("{least} to {most} tokens"),
            found: found.to_string(),
        })
    }

    /// Keep what `prompt` begins with in the KV cache and forget the rest; how many tokens those
    /// are. Until the caller notes it again, nothing is known of the cache.
    fn keep(&mut self, prompt: &[Token]) -> usize {
        let cached = std::mem::take(&mut self.cached);
        let kept = common_prefix(self.runtime.model(), &cached, prompt);
        match kept {
            0 => self.context.clear(),
            _ => self.context.forget(0, kept as i32),
        }
        kept
    }
}

/// The tokens that `prompt` stands for.
///
/// # Errors
/// A conversation that cannot be laid out.
pub(crate) fn prompt_tokens(runtime: &Runtime, prompt: Prompt<'_>) -> Result<Vec<Token>, Error> {
    let (model, template) = (runtime.model(), runtime.template());
    Ok(match prompt {
        Prompt::User(text) => build_prompt(&[user(text)], model, template)?,
        Prompt::Chat(messages) => build_prompt(messages, model, template)?,
        Prompt::Raw(text) => model.tokenize(text, true, true),
        Prompt::Tokens(tokens) => tokens.to_vec(),
    })
}

/// How many tokens of `cached`, a sequence's KV cache, serve `prompt`, which is not empty.
pub(crate) fn common_prefix(model: &Model, cached: &[Token], prompt: &[Token]) -> usize {
    // A recurrent state has no positions to go back to, a sliding window may have lost them.
    if model.is_recurrent() || model.n_swa() > 0 {
        return 0;
    }
    let same = cached.iter().zip(prompt).take_while(|(a, b)| a == b);
    // The last token's logits are needed.
    same.count().min(prompt.len() - 1)
}

fn user(text: &str) -> Message {
    Message {
        role: Role::User,
        content: text.to_owned(),
    }
}
