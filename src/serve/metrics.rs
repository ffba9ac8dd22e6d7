//! What `/metrics` says, in Prometheus's text format.

use super::error::ApiError;
use axum::response::{IntoResponse, Response};
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

/// Upper bounds of the histograms' buckets, seconds.
const SECONDS: [f64; 12] = [
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
];

/// The server's counters.
pub(super) struct Metrics {
    registry: Registry,
    pub requests: IntCounterVec,
    pub prompt_tokens: IntCounter,
    pub kept_tokens: IntCounter,
    pub generated_tokens: IntCounter,
    pub batches: IntCounter,
    pub switches: IntCounter,
    pub slots: IntGauge,
    pub active: IntGauge,
    pub waiting: IntGauge,
    pub patches: IntGauge,
    pub first_token: Histogram,
    pub answer: Histogram,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let registry = Registry::new();
        let known = "names are constants and used once";
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help).expect(known);
            registry.register(Box::new(counter.clone())).expect(known);
            counter
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help).expect(known);
            registry.register(Box::new(gauge.clone())).expect(known);
            gauge
        };
        let histogram = |name: &str, help: &str| {
            let opts = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
            let histogram = Histogram::with_opts(opts).expect(known);
            registry.register(Box::new(histogram.clone())).expect(known);
            histogram
        };
        let requests = Opts::new("nepenthe_requests_total", "Requests by route and status");
        let requests = IntCounterVec::new(requests, &["route", "status"]).expect(known);
        registry.register(Box::new(requests.clone())).expect(known);
        Self {
            requests,
            prompt_tokens: counter("nepenthe_prompt_tokens_total", "Tokens of prompts"),
            kept_tokens: counter(
                "nepenthe_kept_tokens_total",
                "Tokens of prompts that were in a slot's KV cache",
            ),
            generated_tokens: counter("nepenthe_generated_tokens_total", "Tokens generated"),
            batches: counter("nepenthe_batches_total", "Batches decoded"),
            switches: counter(
                "nepenthe_set_switches_total",
                "Changes of the adapters between batches",
            ),
            slots: gauge("nepenthe_slots", "Texts that can be written side by side"),
            active: gauge("nepenthe_slots_active", "Texts being written"),
            waiting: gauge("nepenthe_queue_length", "Texts that wait for a slot"),
            patches: gauge("nepenthe_patches_active", "Patches that apply"),
            first_token: histogram(
                "nepenthe_first_token_seconds",
                "From a request's acceptance to its first token",
            ),
            answer: histogram(
                "nepenthe_answer_seconds",
                "From a request's acceptance to its answer's end",
            ),
            registry,
        }
    }

    /// All of them as a response.
    pub(super) fn render(&self) -> Result<Response, ApiError> {
        let mut text = Vec::new();
        let encoder = TextEncoder::new();
        encoder
            .encode(&self.registry.gather(), &mut text)
            .map_err(|e| ApiError::internal(e.to_string()))?;
        let kind = [("content-type", encoder.format_type().to_owned())];
        Ok((kind, text).into_response())
    }
}
