//! The acceptance gate: does the merged file do what model and patch did together?
//!
//! Both are decoded in step on the same batches, so that only one batch's logits of each are in
//! memory; per row, KL(unmerged ‖ merged) = Σ p·(log p − log q), in nats. Rows are those whose
//! next token is an answer's (all of running text). The thresholds, and why they are where they
//! are:
//!
//! - **Kept effect** ≥ 0.9 of the change in forget probability that the patch makes: what a merge
//!   is for. Re-encoding into K-quants keeps 0 to 0.05 of a small update.
//! - **Retain probability** ≥ 0.97 of the unmerged one: a reader does not notice, and noise on
//!   retained outputs shows here before it shows on general text.
//! - **KL on general text** ≤ 0.05, between what Q4_K_M (0.031) and Q4_0 (0.072) cost
//!   Llama-3-8B against f16 (llama.cpp, tools/perplexity/README.md): the merge is not a larger
//!   loss than the format is.
//! - **KL on forget answers** ≤ 0.5: a model without its patch was 2.5 away (Gemma-3-270M, Q4_0),
//!   so a fifth of the patch may be lost in distribution, though not in what it achieves (the
//!   first line).

use super::moments::{Set, Sources};
use crate::adapter::Loaded;
use crate::data::Sample;
use crate::error::Error;
use crate::ggml::{Batch, Context, Model, Token};
use crate::graph::batch::pack;
use crate::score::{N_PARALLEL, losses_of, scoring_context};
use crate::train::engine::{SampleLoss, mean_prob};
use crate::train::loss::nll;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes of logits that each model may hold.
const LOGIT_BYTES: usize = 64 << 20;
/// A patch that moves the forget probability by less is not judged by how much of that is kept:
/// the samples' own noise is as large.
const LEAST_EFFECT: f64 = 0.05;

/// Thresholds and how much is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GateConfig {
    /// Least share kept of the patch's change in forget probability.
    pub min_kept_effect: f64,
    /// Least retain probability, as a share of the unmerged one.
    pub min_retain_ratio: f64,
    /// Most KL on forget answers, nats a token.
    pub max_kl_forget: f64,
    /// Most KL on general text, nats a token.
    pub max_kl_general: f64,
    /// Samples of each set, evenly spread over it.
    pub max_samples: usize,
}

impl Default for GateConfig {
    fn default() -> Self {
        Self {
            min_kept_effect: 0.9,
            min_retain_ratio: 0.97,
            max_kl_forget: 0.5,
            max_kl_general: 0.05,
            max_samples: 40,
        }
    }
}

impl GateConfig {
    /// Whether the thresholds can be met at all.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self) -> Result<(), Error> {
        let limits = [
            ("min-kept-effect", self.min_kept_effect),
            ("min-retain-ratio", self.min_retain_ratio),
            ("max-kl-forget", self.max_kl_forget),
            ("max-kl-general", self.max_kl_general),
        ];
        for (setting, value) in limits {
            if !(0.0..f64::INFINITY).contains(&value) {
                return Err(Error::Setting {
                    setting,
                    wanted: "a number, 0 or above".into(),
                    found: value.to_string(),
                });
            }
        }
        if self.max_samples == 0 {
            return Err(Error::Setting {
                setting: "max-samples",
                wanted: "at least 1".into(),
                found: "0".into(),
            });
        }
        Ok(())
    }
}

/// Why a merge is not accepted, or cannot be judged.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum GateError {
    #[error("the merged file does not do what model and patch do: {}", failures.join("; "))]
    Failed { failures: Vec<String> },
    #[error("the merged file: wanted a vocabulary of {wanted} tokens, found {found}")]
    Vocabulary { wanted: usize, found: usize },
    #[error("the gate: wanted samples to compare on, found none")]
    NoSamples,
}

/// One set under both models.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    /// Samples.
    pub samples: usize,
    /// Rows compared.
    pub tokens: usize,
    /// Mean KL(unmerged ‖ merged) a token, nats.
    pub kl: f64,
    /// Mean answer probability^(1/tokens), model and patch.
    pub prob_unmerged: f64,
    /// The same of the merged file.
    pub prob_merged: f64,
}

/// What was measured and whether it is enough.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Forget set, if there is one.
    pub forget: Option<Compared>,
    /// Retain set.
    pub retain: Option<Compared>,
    /// General text.
    pub general: Option<Compared>,
    /// Forget probability of the model without patch.
    pub forget_prob_base: Option<f64>,
    /// Share of the patch's change in forget probability that the merged file has; none where
    /// the patch changes too little to tell.
    pub kept_effect: Option<f64>,
    /// Retain probability, merged over unmerged.
    pub retain_ratio: Option<f64>,
    /// One sentence for each threshold that was missed.
    pub failures: Vec<String>,
}

impl Verdict {
    /// Whether the merged file is accepted.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    /// Itself, if the merged file is accepted.
    ///
    /// # Errors
    /// [`GateError::Failed`].
    pub fn accepted(self) -> Result<Self, GateError> {
        if self.passed() {
            return Ok(self);
        }
        Err(GateError::Failed {
            failures: self.failures,
        })
    }

    fn judge(&mut self, config: &GateConfig) {
        let mut fail = |ok: bool, text: String| {
            if !ok {
                self.failures.push(text);
            }
        };
        // Negated comparisons would let NaN pass.
        if let Some(kept) = self.kept_effect {
            let least = config.min_kept_effect;
            fail(
                kept >= least,
                format!("{kept:.3} of the change in forget probability kept, wanted {least}"),
            );
        }
        if let Some(ratio) = self.retain_ratio {
            let least = config.min_retain_ratio;
            fail(
                ratio >= least,
                format!("retain probability {ratio:.3} of the unmerged one, wanted {least}"),
            );
        }
        let sets = [
            ("forget answers", &self.forget, config.max_kl_forget),
            ("general text", &self.general, config.max_kl_general),
        ];
        for (name, compared, most) in sets {
            if let Some(c) = compared {
                fail(
                    c.kl <= most,
                    format!("KL on {name} {:.4}, wanted at most {most}", c.kl),
                );
            }
        }
    }
}

/// Compare `merged` with `model` under `adapters` and judge it. Sets that are empty are not
/// judged. `merged` may carry adapters of its own (residues beside the file).
///
/// `progress` gets decodes done, in samples, and all of them.
///
/// # Errors
/// Bad settings, models of different vocabularies, no samples at all, llama.cpp's failures. A merged file that
/// does not pass is no error here: see [`Verdict::accepted`].
pub fn gate(
    (model, adapters): (&Model, &Loaded),
    (merged, residues): (&Model, &Loaded),
    sources: &Sources<'_>,
    config: &GateConfig,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Verdict, Error> {
    config.validate()?;
    let chosen = Set::ALL.map(|set| spread(sources.of(set), config.max_samples));
    let total: usize = chosen.iter().map(Vec::len).sum::<usize>() + chosen[0].len();
    if total == 0 {
        return Err(GateError::NoSamples.into());
    }
    let mut done = 0;
    let mut compared = Vec::new();
    for samples in &chosen {
        let one = (!samples.is_empty())
            .then(|| {
                compare(
                    (model, adapters),
                    (merged, residues),
                    samples,
                    n_threads,
                    &mut |n| {
                        done += n;
                        progress(done, total);
                    },
                )
            })
            .transpose()?;
        compared.push(one);
    }
    let general = compared.pop().flatten();
    let retain = compared.pop().flatten();
    let forget = compared.pop().flatten();
    let forget_prob_base = match &forget {
        Some(_) => Some(mean_prob(&losses_of(model, &[], &chosen[0], n_threads)?)),
        None => None,
    };
    progress(total, total);
    let kept_effect = forget.as_ref().zip(forget_prob_base).and_then(|(f, base)| {
        let effect = base - f.prob_unmerged;
        (effect.abs() >= LEAST_EFFECT).then(|| (base - f.prob_merged) / effect)
    });
    let retain_ratio = retain.as_ref().map(|r| r.prob_merged / r.prob_unmerged);
    let mut verdict = Verdict {
        forget,
        retain,
        general,
        forget_prob_base,
        kept_effect,
        retain_ratio,
        failures: Vec::new(),
    };
    verdict.judge(config);
    Ok(verdict)
}

fn spread(samples: &[Sample], most: usize) -> Vec<Sample> {
    let n = samples.len().min(most);
    (0..n)
        .map(|i| samples[i * samples.len() / n].clone())
        .collect()
}

/// KL and answer probabilities of `samples` under two models, decoded in step.
///
/// # Errors
/// Models of different vocabularies, no answer tokens, llama.cpp's failures.
pub fn compare(
    (p_model, p_adapters): (&Model, &Loaded),
    (q_model, q_adapters): (&Model, &Loaded),
    samples: &[Sample],
    n_threads: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Compared, Error> {
    let n_vocab = p_model.n_vocab();
    if n_vocab != q_model.n_vocab() {
        return Err(GateError::Vocabulary {
            wanted: n_vocab,
            found: q_model.n_vocab(),
        }
        .into());
    }
    let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let mut contexts = [
        scoring_context(p_model, p_adapters, longest, n_threads)?,
        scoring_context(q_model, q_adapters, longest, n_threads)?,
    ];
    let max_rows = (LOGIT_BYTES / (4 * n_vocab.max(1))).max(1);
    let mut total = Totals {
        kl: 0.0,
        losses: [(); 2].map(|()| vec![SampleLoss::default(); samples.len()]),
    };
    let lengths: Vec<usize> = samples.iter().map(|s| s.tokens.len() - 1).collect();
    for bin in pack(&lengths, contexts[0].n_batch()) {
        for group in bin.chunks(N_PARALLEL) {
            for context in &mut contexts {
                context.clear();
            }
            for piece in pieces(samples, group, max_rows) {
                step(&mut contexts, &piece, &mut total)?;
            }
            progress(group.len());
        }
    }
    let tokens: usize = total.losses[0].iter().map(|l| l.n_tokens).sum();
    if tokens == 0 {
        return Err(GateError::NoSamples.into());
    }
    Ok(Compared {
        samples: samples.len(),
        tokens,
        kl: total.kl / tokens as f64,
        prob_unmerged: mean_prob(&total.losses[0]),
        prob_merged: mean_prob(&total.losses[1]),
    })
}

struct Totals {
    kl: f64,
    losses: [Vec<SampleLoss>; 2],
}

/// A token of a batch; `next`: the answer token that follows, whose row is compared.
#[derive(Clone, Copy)]
struct Position {
    token: Token,
    pos: usize,
    seq: usize,
    sample: usize,
    next: Option<Token>,
}

/// The tokens of a group in pieces with at most `max_rows` rows each. The cache carries a sample
/// over the border, so one long sample needs no more logits than many short ones.
fn pieces(samples: &[Sample], group: &[usize], max_rows: usize) -> Vec<Vec<Position>> {
    let mut pieces = vec![Vec::new()];
    let mut rows = 0;
    for (seq, &s) in group.iter().enumerate() {
        let sample = &samples[s];
        for (pos, pair) in sample.tokens.windows(2).enumerate() {
            let wanted = sample.answers.iter().any(|a| a.contains(&(pos + 1)));
            if wanted && rows == max_rows {
                pieces.push(Vec::new());
                rows = 0;
            }
            rows += usize::from(wanted);
            let piece = pieces.last_mut().expect("starts with one");
            piece.push(Position {
                token: pair[0],
                pos,
                seq,
                sample: s,
                next: wanted.then_some(pair[1]),
            });
        }
    }
    pieces.retain(|p| !p.is_empty());
    pieces
}

fn step(contexts: &mut [Context; 2], piece: &[Position], total: &mut Totals) -> Result<(), Error> {
    for context in contexts.iter_mut() {
        let mut batch = Batch::default();
        for p in piece {
            batch.push(p.token, p.pos as i32, p.seq as i32, p.next.is_some());
        }
        context.decode(&mut batch)?;
    }
    let [p_context, q_context] = &*contexts;
    let rows: Vec<(&[f32], &[f32], Token, usize)> = piece
        .iter()
        .enumerate()
        .filter_map(|(at, position)| {
            Some((
                p_context.logits(at)?,
                q_context.logits(at)?,
                position.next?,
                position.sample,
            ))
        })
        .collect();
    let found: Vec<(f64, [f64; 2])> = rows
        .par_iter()
        .map(|&(p, q, token, _)| (kl(p, q), [nll(p, token), nll(q, token)]))
        .collect();
    for ((.., sample), (kl, nlls)) in rows.iter().zip(found) {
        total.kl += kl;
        for (losses, nll) in total.losses.iter_mut().zip(nlls) {
            losses[*sample].nll += nll;
            losses[*sample].loss += nll;
            losses[*sample].n_tokens += 1;
        }
    }
    Ok(())
}

/// KL(softmax p ‖ softmax q) of two rows of logits, in nats; exactly 0 for equal rows.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let top = |row: &[f32]| row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (p_top, q_top) = (top(p), top(q));
    let (mut p_sum, mut q_sum, mut mean) = (0f64, 0f64, 0f64);
    for (&p, &q) in p.iter().zip(q) {
        let (p, q) = (f64::from(p - p_top), f64::from(q - q_top));
        let e = p.exp();
        p_sum += e;
        q_sum += q.exp();
        // A token that p rules out adds nothing, whatever q says: not 0·∞.
        if e > 0.0 {
            mean += e * (p - q);
        }
    }
    mean / p_sum - p_sum.ln() + q_sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_is_that_of_the_definition() {
        let softmax = |row: &[f32]| {
            let e: Vec<f64> = row.iter().map(|&v| f64::from(v).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.into_iter().map(|v| v / sum).collect::<Vec<f64>>()
        };
        let (p, q) = ([0.5f32, -1.0, 3.0, 0.0], [1.5f32, -2.0, 0.25, 7.0]);
        let wanted: f64 = softmax(&p)
            .iter()
            .zip(softmax(&q))
            .map(|(p, q)| p * (p / q).ln())
            .sum();
        assert!((kl(&p, &q) - wanted).abs() < 1e-12);
        assert_eq!(kl(&p, &p), 0.0);
        // A shift of all logits is no difference, a masked token no infinity.
        let shifted = p.map(|v| v + 100.0);
        assert!(kl(&p, &shifted).abs() < 1e-6);
        assert!(kl(&[0.0, f32::NEG_INFINITY], &[0.0, -1.0]).is_finite());
    }

    fn verdict(kept: f64, retain: f64, kl: f64) -> Vec<String> {
        let compared = Compared {
            samples: 1,
            tokens: 1,
            kl,
            prob_unmerged: 0.5,
            prob_merged: 0.5,
        };
        let mut v = Verdict {
            forget: Some(compared.clone()),
            retain: Some(compared.clone()),
            general: Some(compared),
            forget_prob_base: Some(0.9),
            kept_effect: Some(kept),
            retain_ratio: Some(retain),
            failures: Vec::new(),
        };
        v.judge(&GateConfig::default());
        v.failures
    }

    #[test]
    fn thresholds_that_mean_nothing_are_refused() {
        assert!(GateConfig::default().validate().is_ok());
        for bad in [f64::NAN, -0.1, f64::INFINITY] {
            let config = GateConfig {
                max_kl_general: bad,
                ..GateConfig::default()
            };
            let e = config.validate().expect_err("refused");
            assert!(e.to_string().starts_with("max-kl-general"), "{e}");
        }
    }

    #[test]
    fn every_threshold_fails_alone_and_nan_passes_none() {
        assert!(verdict(0.95, 0.99, 0.01).is_empty());
        assert!(verdict(0.5, 0.99, 0.01)[0].contains("forget probability kept"));
        assert!(verdict(0.95, 0.9, 0.01)[0].contains("retain probability"));
        assert!(verdict(0.95, 0.99, 0.1)[0].contains("general text"));
        assert_eq!(verdict(f64::NAN, f64::NAN, f64::NAN).len(), 4);
    }

    #[test]
    fn pieces_bound_rows_and_keep_every_token_in_order() {
        let sample = |n: usize, answer: usize| Sample {
            tokens: (0..n as i32).collect(),
            answers: std::iter::once(answer..n).collect(),
            truncated: false,
        };
        let samples = [sample(9, 3), sample(5, 1)];
        let pieces = pieces(&samples, &[0, 1], 4);
        let rows = |p: &Vec<Position>| p.iter().filter(|p| p.next.is_some()).count();
        assert_eq!(pieces.iter().map(rows).collect::<Vec<_>>(), [4, 4, 2]);
        let all: Vec<(usize, Token)> = pieces.iter().flatten().map(|p| (p.seq, p.token)).collect();
        let wanted = (0..8).map(|t| (0, t)).chain((0..4).map(|t| (1, t)));
        assert_eq!(all, wanted.collect::<Vec<_>>());
        for p in pieces.iter().flatten() {
            assert!(p.next.is_none_or(|t| t == p.token + 1));
        }
    }
}
