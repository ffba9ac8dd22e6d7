//! What clients of OpenAI's API ask for, checked: requests into prompts and settings.
//!
//! Beyond OpenAI's fields, `top_k`, `min_p` and `repeat_penalty` are taken as llama.cpp's server
//! takes them, and `"patches": "none"` asks for an answer without any patch. Fields that would
//! change the answer and are not supported are refused; others are ignored, as is `model`.

use super::body::{fields, typed};
use super::error::ApiError;
use super::reply::Kind;
use crate::data::{Message, Role};
use crate::ggml::Token;
use crate::runtime::{Prompt, Runtime, prompt_tokens};
use crate::score::Sampling;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// Most stop strings, and most likeliest tokens named.
const MAX_STOPS: usize = 4;
const MAX_TOP: usize = 20;
/// What a completion without `max_tokens` gets, as OpenAI has it.
const COMPLETION_TOKENS: usize = 16;

/// A request that can be answered.
pub(super) struct Ask {
    pub kind: Kind,
    pub prompts: Vec<Arc<[Token]>>,
    /// Texts a prompt.
    pub n: usize,
    /// None: as many as the slot holds.
    pub max_tokens: Option<usize>,
    pub sampling: Sampling,
    pub stops: Vec<String>,
    pub top: Option<usize>,
    /// The prompt is part of the text.
    pub echo: bool,
    pub unpatched: bool,
    pub stream: bool,
    pub include_usage: bool,
}

/// Fields of both endpoints.
#[derive(Deserialize)]
struct Common {
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    stream_options: StreamOptions,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i32>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    seed: Option<i64>,
    stop: Option<Stop>,
    n: Option<usize>,
    patches: Option<String>,
    max_tokens: Option<usize>,
}

#[derive(Deserialize, Default)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "wanted a string or a list of strings")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<ChatMessage>,
    max_completion_tokens: Option<usize>,
    #[serde(default)]
    logprobs: bool,
    top_logprobs: Option<usize>,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "wanted a string or a list of parts of type text"
)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    Text { text: String },
}

#[derive(Deserialize)]
struct Completion {
    prompt: Prompts,
    logprobs: Option<usize>,
    #[serde(default)]
    echo: bool,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "wanted a string, a list of strings, a list of tokens or a list of lists of tokens"
)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<Token>),
    TokenLists(Vec<Vec<Token>>),
}

/// A request to `/v1/chat/completions`.
pub(super) fn chat(runtime: &Runtime, body: &Value) -> Result<Ask, ApiError> {
    refuse_unsupported(body)?;
    let chat: Chat = typed(body)?;
    let messages = chat.messages.iter().enumerate();
    let messages = messages
        .map(|(i, m)| message(i, m))
        .collect::<Result<Vec<_>, _>>()?;
    if messages.is_empty() {
        return Err(ApiError::bad("wanted at least one message").param("messages"));
    }
    if chat.top_logprobs.is_some() && !chat.logprobs {
        let message = "top_logprobs wants logprobs to be true";
        return Err(ApiError::bad(message).param("top_logprobs"));
    }
    let tokens = prompt_tokens(runtime, Prompt::Chat(&messages))?;
    let mut ask = common(body, Kind::Chat, vec![tokens])?;
    ask.max_tokens = chat.max_completion_tokens.or(ask.max_tokens);
    ask.top = chat.logprobs.then(|| chat.top_logprobs.unwrap_or(0));
    checked(ask, runtime, "messages", "top_logprobs")
}

/// A request to `/v1/completions`.
pub(super) fn completion(runtime: &Runtime, body: &Value) -> Result<Ask, ApiError> {
    refuse_unsupported(body)?;
    let completion: Completion = typed(body)?;
    let read = |text: &String| prompt_tokens(runtime, Prompt::Raw(text));
    let prompts = match &completion.prompt {
        Prompts::Text(text) => vec![read(text)?],
        Prompts::Texts(texts) => texts.iter().map(read).collect::<Result<_, _>>()?,
        Prompts::Tokens(tokens) => vec![tokens.clone()],
        Prompts::TokenLists(lists) => lists.clone(),
    };
    let mut ask = common(body, Kind::Text, prompts)?;
    ask.max_tokens = ask.max_tokens.or(Some(COMPLETION_TOKENS));
    ask.top = completion.logprobs;
    ask.echo = completion.echo;
    checked(ask, runtime, "prompt", "logprobs")
}

fn message(i: usize, message: &ChatMessage) -> Result<Message, ApiError> {
    let role = match message.role.as_str() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        other => {
            let wanted = "wanted the role system, developer, user or assistant";
            return Err(ApiError::bad(format!("{wanted}, found {other:?}"))
                .param(format!("messages[{i}].role")));
        }
    };
    let content = match &message.content {
        Content::Text(text) => text.clone(),
        Content::Parts(parts) => parts.iter().map(|Part::Text { text }| &**text).collect(),
    };
    Ok(Message { role, content })
}

fn common(body: &Value, kind: Kind, prompts: Vec<Vec<Token>>) -> Result<Ask, ApiError> {
    let c: Common = typed(body)?;
    let seed = match c.seed {
        Some(seed) => seed as u32,
        None => getrandom::u32().map_err(|e| ApiError::internal(e.to_string()))?,
    };
    Ok(Ask {
        kind,
        prompts: prompts.into_iter().map(Into::into).collect(),
        n: c.n.unwrap_or(1),
        max_tokens: c.max_tokens,
        sampling: Sampling {
            temp: c.temperature.unwrap_or(1.0),
            top_k: c.top_k.unwrap_or(0),
            top_p: c.top_p.unwrap_or(1.0),
            min_p: c.min_p.unwrap_or(0.0),
            repeat_penalty: c.repeat_penalty.unwrap_or(1.0),
            seed,
        },
        stops: match c.stop {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text],
            Some(Stop::Several(texts)) => texts,
        },
        top: None,
        echo: false,
        unpatched: match c.patches.as_deref() {
            None | Some("active") => false,
            Some("none") => true,
            Some(other) => {
                let message = format!("wanted \"active\" or \"none\", found {other:?}");
                return Err(ApiError::bad(message).param("patches"));
            }
        },
        stream: c.stream,
        include_usage: c.stream_options.include_usage,
    })
}

/// `ask` if its numbers are in range.
fn checked(ask: Ask, runtime: &Runtime, prompt: &str, top: &str) -> Result<Ask, ApiError> {
    let s = &ask.sampling;
    let number = |name: &str, wanted: &str, value: f32, ok: bool| match ok {
        true => Ok(()),
        false => Err(ApiError::bad(format!("{name}: wanted {wanted}, found {value}")).param(name)),
    };
    number(
        "temperature",
        "0 to 2",
        s.temp,
        (0.0..=2.0).contains(&s.temp),
    )?;
    let is_part = s.top_p > 0.0 && s.top_p <= 1.0;
    number("top_p", "above 0 and at most 1", s.top_p, is_part)?;
    number("min_p", "0 to 1", s.min_p, (0.0..=1.0).contains(&s.min_p))?;
    let penalty = s.repeat_penalty;
    let is_finite = penalty > 0.0 && penalty.is_finite();
    number("repeat_penalty", "above 0", penalty, is_finite)?;
    number("n", "1 or more", ask.n as f32, ask.n > 0)?;
    let n_top = ask.top.unwrap_or(0);
    number(top, "at most 20", n_top as f32, n_top <= MAX_TOP)?;
    if ask.stops.len() > MAX_STOPS || ask.stops.iter().any(String::is_empty) {
        let message = format!("wanted at most {MAX_STOPS} stop strings, none of them empty");
        return Err(ApiError::bad(message).param("stop"));
    }
    if ask.echo && ask.stream {
        return Err(ApiError::bad("echo is not given in streams").param("echo"));
    }
    if ask.prompts.is_empty() {
        return Err(ApiError::bad("wanted at least one prompt").param(prompt));
    }
    let (most, n_vocab) = (
        runtime.options().n_ctx as usize - 1,
        runtime.model().n_vocab(),
    );
    for tokens in &ask.prompts {
        if tokens.is_empty() {
            return Err(ApiError::bad("wanted a prompt of at least one token").param(prompt));
        }
        if tokens.iter().any(|&t| t < 0 || t as usize >= n_vocab) {
            let message = format!("wanted tokens from 0 to {}", n_vocab - 1);
            return Err(ApiError::bad(message).param(prompt));
        }
        if tokens.len() > most {
            let message = format!(
                "this server's context takes prompts of at most {most} tokens, found {}",
                tokens.len()
            );
            return Err(ApiError::bad(message)
                .param(prompt)
                .code("context_length_exceeded"));
        }
    }
    Ok(ask)
}

/// Refuse fields whose absence would change the answer.
fn refuse_unsupported(body: &Value) -> Result<(), ApiError> {
    for (name, value) in fields(body) {
        let does_nothing = match name.as_str() {
            "tools" | "functions" => *value == json!([]),
            "tool_choice" | "function_call" => value == "none" || value == "auto",
            "response_format" => value["type"] == "text",
            "logit_bias" => *value == json!({}),
            "presence_penalty" | "frequency_penalty" => value.as_f64() == Some(0.0),
            "suffix" => value == "",
            "best_of" => *value == body["n"] || value.as_u64() == Some(1),
            "modalities" => *value == json!(["text"]),
            "audio" | "web_search_options" | "grammar" | "json_schema" => false,
            _ => true,
        };
        if !does_nothing {
            let message = format!("{name} is not supported by this server");
            return Err(ApiError::bad(message).param(name).code("unsupported"));
        }
    }
    Ok(())
}
