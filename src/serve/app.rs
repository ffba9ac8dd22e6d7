//! What all handlers share, and the way from a request to the engine and back.

use super::ask::Ask;
use super::auth::check_origin;
use super::error::ApiError;
use super::job::{Event, Job, Message, Under};
use super::lora::Lora;
use super::metrics::Metrics;
use super::page::Report;
use super::{Options, body};
use crate::digest::Digest;
use crate::ggml::Model;
use crate::runtime::{ActiveSet, Runtime};
use crate::score::Sampling;
use axum::http::{HeaderMap, StatusCode};
use sha2::{Digest as _, Sha256};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// The server.
pub(super) struct App {
    pub runtime: Runtime,
    pub options: Options,
    /// The model's file name, without its ending.
    pub model: Arc<str>,
    /// Unix seconds.
    pub started: u64,
    pub model_digest: Digest,
    pub metrics: Arc<Metrics>,
    pub inbox: mpsc::Sender<Message>,
    /// A permit for every text in a slot or in the queue.
    pub room: Arc<Semaphore>,
    pub loras: Mutex<Vec<Lora>>,
    /// Directories that patches may be applied from, with links resolved.
    pub patch_dirs: Vec<PathBuf>,
    pub report: Report,
    /// Where uploads are written.
    pub uploads: TempDir,
    pub is_ending: AtomicBool,
    pub n_requests: AtomicU64,
}

/// What comes of a request's texts.
pub(super) struct Ticket {
    pub events: UnboundedReceiver<(usize, Event)>,
    /// Texts that are not over.
    pub n_left: usize,
}

impl Ticket {
    /// The next event; the engine's failure is an error.
    pub(super) async fn next(&mut self) -> Result<(usize, Event), ApiError> {
        match self.events.recv().await {
            Some((_, Event::Failed(message))) => Err(ApiError::internal(message)),
            Some((index, event)) => {
                self.n_left -= usize::from(matches!(event, Event::Done { .. }));
                Ok((index, event))
            }
            None => Err(ApiError::ending()),
        }
    }
}

impl App {
    /// Most texts that may be in slots and queue.
    pub(super) fn capacity(&self) -> usize {
        self.options.slots + self.options.queue
    }

    /// Refuse what a page from elsewhere may have sent.
    pub(super) fn check_origin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let names = self.options.hosts.as_slice();
        let minds = self.options.address.ip().is_loopback() || !names.is_empty();
        check_origin(headers, minds.then_some(names))
    }

    /// See what has changed in the store, if there is one. While it is broken nothing is answered:
    /// it may hold a patch that must apply.
    pub(super) fn follow(&self) -> Result<(), ApiError> {
        self.runtime.follow().map_err(|e| ApiError {
            status: StatusCode::SERVICE_UNAVAILABLE,
            code: Some("store"),
            ..ApiError::from(e)
        })
    }

    pub(super) fn limits(&self) -> body::Limits {
        body::Limits {
            bytes: self.options.max_body,
            patience: self.options.read_timeout,
        }
    }

    /// A name for the next answer.
    pub(super) fn answer_id(&self, prefix: &str) -> String {
        let n = self.n_requests.fetch_add(1, Ordering::Relaxed);
        format!(
            "{prefix}-{}-{:x}{n:06x}",
            self.model_digest.short(),
            self.started
        )
    }

    /// A short digest of the model and of `set`.
    pub(super) fn fingerprint(&self, set: &ActiveSet) -> String {
        let mut hash = Sha256::new();
        hash.update(self.model_digest.0);
        hash.update(set.digest().0);
        format!("np-{}", Digest(hash.finalize().into()).short())
    }

    /// Hand the texts of `ask` to the engine.
    pub(super) fn submit(&self, ask: &Ask) -> Result<Ticket, ApiError> {
        if self.is_ending.load(Ordering::Relaxed) {
            return Err(ApiError::ending());
        }
        let n_texts = ask.prompts.len().saturating_mul(ask.n);
        if n_texts > self.capacity() {
            let message = format!(
                "this server writes at most {} texts at a time, the request asks for {n_texts}",
                self.capacity()
            );
            return Err(ApiError::bad(message).param("n"));
        }
        let places = self.room.clone().try_acquire_many_owned(n_texts as u32);
        let mut places = places.map_err(|_| {
            let message = "all slots and the queue are full: try again shortly";
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).code("queue_full")
        })?;
        let (events, receiver) = unbounded_channel();
        let under = Arc::new(Under {
            unpatched: ask.unpatched,
            ..Under::default()
        });
        let n_ctx = self.runtime.options().n_ctx as usize;
        for index in 0..n_texts {
            let job = Job {
                prompt: ask.prompts[index / ask.n].clone(),
                max_tokens: ask.max_tokens.unwrap_or(n_ctx),
                sampling: Sampling {
                    seed: ask.sampling.seed.wrapping_add(index as u32),
                    ..ask.sampling.clone()
                },
                stops: ask.stops.clone(),
                top: ask.top,
                score_prompt: ask.echo && ask.top.is_some(),
                under: under.clone(),
                index,
                events: events.clone(),
                _place: places.split(1).expect("as many as texts"),
                accepted: Instant::now(),
            };
            self.inbox
                .send(Message::Job(job))
                .map_err(|_| ApiError::ending())?;
        }
        Ok(Ticket {
            events: receiver,
            n_left: n_texts,
        })
    }

    /// Do `work`, which takes longer than a handler may hold up the others.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let app = self.clone();
        tokio::task::spawn_blocking(move || work(&app))
            .await
            .map_err(|e| ApiError::internal(e.to_string()))?
    }
}

/// Unix seconds.
pub(super) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |t| t.as_secs())
}

/// What `/v1/models` calls `model`.
pub(super) fn model_name(model: &Model) -> Arc<str> {
    let stem = model.path().file_stem().unwrap_or_default();
    stem.to_string_lossy().into()
}
