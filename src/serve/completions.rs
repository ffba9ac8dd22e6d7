//! `/v1/chat/completions` and `/v1/completions`.
//!
//! Every answer says what it was made under: `system_fingerprint`, and the header
//! `nepenthe-fingerprint`, are a digest of the model's file and of the active patches with their
//! scales; the header `nepenthe-patches` lists these. The set is the one that is active when the
//! answer begins to be written, and it is the same for all texts of a request.

use super::app::{App, Ticket, now};
use super::ask::{self, Ask};
use super::body;
use super::error::ApiError;
use super::job::{Event, Piece};
use super::reply::{self, Kind, Reply, Usage, Written};
use crate::runtime::ActiveSet;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

pub(super) async fn chat(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::object(body, app.limits()).await?;
    answer(app, headers, move |app| ask::chat(&app.runtime, &body)).await
}

pub(super) async fn completion(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::object(body, app.limits()).await?;
    answer(app, headers, move |app| {
        ask::completion(&app.runtime, &body)
    })
    .await
}

async fn answer(
    app: Arc<App>,
    headers: HeaderMap,
    read: impl FnOnce(&App) -> Result<Ask, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let ask = app
        .blocking(move |app| {
            let ask = read(app)?;
            // A store that has changed is followed before anything is answered under the old set.
            app.follow()?;
            Ok(ask)
        })
        .await?;
    if ask.unpatched {
        if !app.options.allow_unpatched {
            let message = "answers without patches show what was forgotten: \
                           this server was started without --allow-unpatched";
            return Err(ApiError::forbidden(message).param("patches"));
        }
        app.options.keys.may_manage(&headers)?;
    }
    let mut ticket = app.submit(&ask)?;
    // Headers wait for the first text to begin: they say which patches it is written under.
    let (index, first) = ticket.next().await?;
    let Event::Started { set, n_kept } = first else {
        return Err(ApiError::internal("a text that did not begin"));
    };
    let prefix = match ask.kind {
        Kind::Chat => "chatcmpl",
        Kind::Text => "cmpl",
    };
    let reply = Reply {
        kind: ask.kind,
        id: app.answer_id(prefix),
        created: now(),
        model: app.model.clone(),
        fingerprint: app.fingerprint(&set),
    };
    let under = [
        ("nepenthe-fingerprint", reply.fingerprint.clone()),
        ("nepenthe-patches", listed(&set)),
    ];
    drop(set);
    let usage = Usage {
        prompt: ask.prompts.iter().map(|p| p.len()).sum(),
        kept: n_kept,
        completion: 0,
    };
    let mut response = match ask.stream {
        true => streamed(Stream::new(ask, reply, ticket, usage, index)),
        false => reply::json(&whole(&app, &ask, &reply, ticket, usage).await?),
    };
    for (name, value) in under {
        let value = HeaderValue::try_from(value).expect("hexadecimal digits and numbers");
        response.headers_mut().insert(name, value);
    }
    Ok(response)
}

/// The patches of `set` for a header: the beginning of each one's id and its scale.
fn listed(set: &ActiveSet) -> String {
    let one = |p: &crate::runtime::ActivePatch| format!("{};scale={}", p.id.0.short(), p.scale);
    match set.patches() {
        [] => "none".to_owned(),
        patches => patches.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

/// Wait for all texts.
async fn whole(
    app: &App,
    ask: &Ask,
    reply: &Reply,
    mut ticket: Ticket,
    mut usage: Usage,
) -> Result<Value, ApiError> {
    let mut texts: Vec<Written> = Vec::new();
    texts.resize_with(ticket.n_left, Written::default);
    if ask.echo {
        for (i, written) in texts.iter_mut().enumerate() {
            written.prompt = app.runtime.model().detokenize(&ask.prompts[i / ask.n]);
        }
    }
    while ticket.n_left > 0 {
        let (index, event) = ticket.next().await?;
        let written = &mut texts[index];
        match event {
            Event::Started { n_kept, .. } => usage.kept += n_kept,
            Event::Prompt(scored) => written.scored = scored,
            Event::Piece(piece) => {
                written.text += &piece.text;
                written.tokens.extend(piece.tokens);
            }
            Event::Done { finish, n_tokens } => {
                written.finish = Some(finish);
                usage.completion += n_tokens;
            }
            Event::Failed(_) => {}
        }
    }
    Ok(reply.whole(&texts, ask.top.is_some(), usage))
}

/// An answer on its way, event by event.
struct Stream {
    ask: Ask,
    reply: Reply,
    ticket: Ticket,
    usage: Usage,
    /// Characters sent of each text.
    offsets: Vec<usize>,
    ready: VecDeque<String>,
    is_over: bool,
}

impl Stream {
    /// `index`: the text that has begun.
    fn new(ask: Ask, reply: Reply, ticket: Ticket, usage: Usage, index: usize) -> Self {
        let mut stream = Self {
            offsets: vec![0; ticket.n_left],
            ready: VecDeque::new(),
            is_over: false,
            ask,
            reply,
            ticket,
            usage,
        };
        stream.begin(index);
        stream
    }

    fn begin(&mut self, index: usize) {
        self.ready
            .extend(self.reply.opening(index).map(|v| v.to_string()));
    }

    fn piece(&mut self, index: usize, piece: &Piece) {
        let logprobs = self.ask.top.is_some();
        let chunk = self
            .reply
            .piece(index, piece, logprobs, self.offsets[index]);
        self.offsets[index] += piece.text.chars().count();
        self.ready.push_back(chunk.to_string());
    }

    fn see(&mut self, index: usize, event: Event) {
        match event {
            Event::Started { n_kept, .. } => {
                self.usage.kept += n_kept;
                self.begin(index);
            }
            Event::Piece(piece) => self.piece(index, &piece),
            Event::Done { finish, n_tokens } => {
                self.usage.completion += n_tokens;
                let chunk = self.reply.ending(index, finish);
                self.ready.push_back(chunk.to_string());
            }
            Event::Prompt(_) | Event::Failed(_) => {}
        }
    }

    /// The next event's data; none after the last.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            if self.is_over {
                return None;
            }
            if self.ticket.n_left == 0 {
                if self.ask.include_usage {
                    self.ready
                        .push_back(self.reply.usage(self.usage).to_string());
                }
                self.ready.push_back("[DONE]".to_owned());
                self.is_over = true;
                continue;
            }
            match self.ticket.next().await {
                Ok((index, event)) => self.see(index, event),
                // The status has been sent: the error is the last event, and no [DONE] follows.
                Err(e) => {
                    self.ready.push_back(e.json().to_string());
                    self.is_over = true;
                }
            }
        }
    }
}

fn streamed(stream: Stream) -> Response {
    let events = stream::unfold(stream, async |mut stream| {
        let data = stream.next().await?;
        Some((
            Ok::<_, Infallible>(sse::Event::default().data(data)),
            stream,
        ))
    });
    Sse::new(events)
        .keep_alive(KeepAlive::default())
        .into_response()
}
