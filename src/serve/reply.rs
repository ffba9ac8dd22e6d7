//! Answers in the forms of OpenAI's two endpoints, whole and in chunks.

use super::job::{Chosen, Piece};
use crate::runtime::Finish;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Which endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Text,
}

/// What all parts of an answer say.
pub(super) struct Reply {
    pub kind: Kind,
    pub id: String,
    /// Unix seconds.
    pub created: u64,
    pub model: Arc<str>,
    /// Of the model and the patches it was made under.
    pub fingerprint: String,
}

/// A text of an answer, complete.
#[derive(Default)]
pub(super) struct Written {
    /// The prompt, where it is part of the text.
    pub prompt: String,
    pub scored: Vec<Chosen>,
    pub text: String,
    pub tokens: Vec<Chosen>,
    pub finish: Option<Finish>,
}

/// Tokens of an answer, as `usage` counts them.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Usage {
    pub prompt: usize,
    pub kept: usize,
    pub completion: usize,
}

impl Usage {
    fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.kept},
        })
    }
}

impl Reply {
    fn object(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": &*self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }

    /// The whole answer.
    pub(super) fn whole(&self, texts: &[Written], logprobs: bool, usage: Usage) -> Value {
        let choices = texts.iter().enumerate().map(|(index, w)| {
            let finish = w.finish.map(finish_reason);
            match self.kind {
                Kind::Chat => json!({
                    "index": index,
                    "message": {"role": "assistant", "content": w.text, "refusal": null},
                    "logprobs": logprobs.then(|| chat_logprobs(&w.tokens)),
                    "finish_reason": finish,
                }),
                Kind::Text => {
                    let tokens: Vec<&Chosen> = w.scored.iter().chain(&w.tokens).collect();
                    // Without the prompt's tokens, offsets begin behind its text.
                    let from = if w.scored.is_empty() {
                        w.prompt.chars().count()
                    } else {
                        0
                    };
                    json!({
                        "index": index,
                        "text": w.prompt.clone() + &w.text,
                        "logprobs": logprobs.then(|| text_logprobs(&tokens, from)),
                        "finish_reason": finish,
                    })
                }
            }
        });
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Text => "text_completion",
        };
        let mut answer = self.object(object, choices.collect());
        answer["usage"] = usage.json();
        answer
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        self.object(
            match self.kind {
                Kind::Chat => "chat.completion.chunk",
                Kind::Text => "text_completion",
            },
            choices,
        )
    }

    /// The first chunk of a text, where the endpoint has one.
    pub(super) fn opening(&self, index: usize) -> Option<Value> {
        (self.kind == Kind::Chat).then(|| {
            self.chunk(vec![json!({
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": null,
                "finish_reason": null,
            })])
        })
    }

    /// A chunk of text, which begins `offset` characters into it.
    pub(super) fn piece(
        &self,
        index: usize,
        piece: &Piece,
        logprobs: bool,
        offset: usize,
    ) -> Value {
        self.chunk(vec![match self.kind {
            Kind::Chat => json!({
                "index": index,
                "delta": {"content": piece.text},
                "logprobs": logprobs.then(|| chat_logprobs(&piece.tokens)),
                "finish_reason": null,
            }),
            Kind::Text => {
                let tokens: Vec<&Chosen> = piece.tokens.iter().collect();
                json!({
                    "index": index,
                    "text": piece.text,
                    "logprobs": logprobs.then(|| text_logprobs(&tokens, offset)),
                    "finish_reason": null,
                })
            }
        }])
    }

    /// A text's last chunk.
    pub(super) fn ending(&self, index: usize, finish: Finish) -> Value {
        let reason = finish_reason(finish);
        self.chunk(vec![match self.kind {
            Kind::Chat => json!({
                "index": index, "delta": {}, "logprobs": null, "finish_reason": reason,
            }),
            Kind::Text => json!({
                "index": index, "text": "", "logprobs": null, "finish_reason": reason,
            }),
        }])
    }

    /// The answer's last chunk, where it was asked for.
    pub(super) fn usage(&self, usage: Usage) -> Value {
        let mut chunk = self.chunk(Vec::new());
        chunk["usage"] = usage.json();
        chunk
    }
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::End | Finish::Stopped => "stop",
        Finish::Length | Finish::Room => "length",
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A log-probability that JSON can hold; OpenAI writes −9999 for what cannot be.
fn finite(logprob: f64) -> f64 {
    logprob.max(-9999.0)
}

/// With the tokens' ids, as llama.cpp's server gives them.
fn chat_logprobs(tokens: &[Chosen]) -> Value {
    let one = |t: &Chosen| {
        json!({
            "id": t.token,
            "token": lossy(&t.bytes),
            "logprob": t.logprob.map(finite),
            "bytes": t.bytes,
        })
    };
    let content = tokens.iter().map(|t| {
        let mut token = one(t);
        token["top_logprobs"] = t.top.iter().map(one).collect();
        token
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// `from`: characters of the text before the first token.
fn text_logprobs(tokens: &[&Chosen], from: usize) -> Value {
    let mut offset = from;
    let mut offsets = Vec::with_capacity(tokens.len());
    for t in tokens {
        offsets.push(offset);
        offset += lossy(&t.bytes).chars().count();
    }
    let top = tokens.iter().map(|t| {
        t.logprob?;
        let top = t.top.iter();
        let top = top.map(|t| (lossy(&t.bytes), json!(t.logprob.map(finite))));
        Some(top.collect::<Map<_, _>>())
    });
    json!({
        "tokens": tokens.iter().map(|t| lossy(&t.bytes)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprob.map(finite)).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

/// `value` as a response.
pub(super) fn json(value: &Value) -> Response {
    ([(CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}
