//! Logits in, the next token out: how it is chosen and when a text ends.

use crate::ggml::{Model, Token};
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;

/// Tokens the repetition penalty looks back on.
const PENALTY_TOKENS: i32 = 64;

/// How the next token is chosen; a temperature of 0 takes the likeliest.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Temperature.
    pub temp: f32,
    /// Keep the k likeliest tokens; 0: all.
    pub top_k: i32,
    /// Keep the likeliest tokens up to this probability in all; 1: all.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the likeliest; 0: all.
    pub min_p: f32,
    /// Penalty on repeating one of the last 64 tokens; 1: none.
    pub repeat_penalty: f32,
    /// Seed.
    pub seed: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temp: 0.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            seed: 42,
        }
    }
}

/// llama.cpp's sampler chain, or none for greedy.
fn sampler(s: &Sampling, n_vocab: usize) -> Option<LlamaSampler> {
    let mut chain = Vec::new();
    if s.repeat_penalty != 1.0 {
        chain.push(LlamaSampler::penalties(
            n_vocab as i32,
            PENALTY_TOKENS,
            s.repeat_penalty,
            0.0,
            0.0,
        ));
    }
    if s.temp <= 0.0 {
        if chain.is_empty() {
            return None;
        }
        chain.push(LlamaSampler::greedy());
    } else {
        if s.top_k > 0 {
            chain.push(LlamaSampler::top_k(s.top_k));
        }
        chain.push(LlamaSampler::top_p(s.top_p, 1));
        chain.push(LlamaSampler::min_p(s.min_p, 1));
        chain.push(LlamaSampler::temp(s.temp));
        chain.push(LlamaSampler::dist(s.seed));
    }
    Some(LlamaSampler::chain(chain, true))
}

/// Let `sampler` choose from a row of logits.
fn choose(sampler: &mut LlamaSampler, row: &[f32]) -> Token {
    let data = row
        .iter()
        .enumerate()
        .map(|(i, &v)| LlamaTokenData::new(LlamaToken(i as i32), v, 0.0));
    let mut candidates = LlamaTokenDataArray::from_iter(data, false);
    sampler.apply(&mut candidates);
    let token = candidates
        .selected_token()
        .map_or_else(|| argmax(row), |t| t.0);
    sampler.accept(LlamaToken(token));
    token
}

/// The first of the largest values: ties do not depend on the order of threads.
pub(super) fn argmax(row: &[f32]) -> Token {
    let mut best = 0;
    for (i, v) in row.iter().enumerate() {
        if *v > row[best] {
            best = i;
        }
    }
    best as Token
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended its answer.
    End,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Room,
    /// Whoever reads it had enough.
    Stopped,
}

/// Writes one text, token by token.
pub struct Writer {
    model: Model,
    sampler: Option<LlamaSampler>,
    left: usize,
}

impl Writer {
    /// For a text of at most `max_tokens`.
    pub fn new(model: &Model, sampling: &Sampling, max_tokens: usize) -> Self {
        Self {
            model: model.clone(),
            sampler: sampler(sampling, model.n_vocab()),
            left: max_tokens,
        }
    }

    /// The token that follows, chosen from `logits [n_vocab]`; or why none does.
    pub fn next(&mut self, logits: &[f32]) -> Result<Token, Finish> {
        let next = match &mut self.sampler {
            Some(sampler) => choose(sampler, logits),
            None => argmax(logits),
        };
        if self.model.is_end(next) {
            return Err(Finish::End);
        }
        self.left = self.left.checked_sub(1).ok_or(Finish::Length)?;
        Ok(next)
    }
}
