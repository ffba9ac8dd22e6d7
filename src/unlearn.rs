//! The main path: open model → data → capture → subspaces → train → project → patch.
//!
//! Every stage is a function of its own and most artifacts are also files, so that each stage
//! can be run alone.

use crate::capture::pooled_outputs;
use crate::data::{Message, Record, Role, Sample, SampleSet, Template, build_samples, general_records, overlap};
use crate::error::Error;
use crate::graph::template::Adaptable;
use crate::model::OpenModel;
use crate::project::NetUpdate;
use crate::subspace::{Pooled, Retain, RetainBasis, Subspace, SubspaceConfig, solve_all};
use crate::train::adapters::Pairs;
use crate::train::config::{Constraint, Init, StopConfig, UnlearnConfig};
use crate::train::engine::mean_nll;
use crate::train::fit::Until;
use crate::train::trainer::Trainer;
use rayon::prelude::*;

/// Samples of a split whose outputs are pooled: the paper's 256, in data order.
pub const CAPTURE_SAMPLES: usize = 256;
/// Answers that stand in for others' when there is nothing to exchange.
const FALLBACK_ANSWERS: usize = 8;

/// What is to be forgotten and what is to be kept.
#[derive(Debug, Clone)]
pub struct Sets {
    /// Forget records.
    pub forget_records: Vec<Record>,
    /// Retain records.
    pub retain_records: Vec<Record>,
    /// Forget samples.
    pub forget: Vec<Sample>,
    /// Retain samples.
    pub retain: Vec<Sample>,
    /// Whether the built-in general text stands in for a retain set.
    pub general: bool,
    /// What the user should know about the data.
    pub notices: Vec<String>,
}

impl Sets {
    /// Tokenise both sets. Without `retain_records` the built-in general text is used.
    ///
    /// # Errors
    /// A retain set that holds forget records, records that cannot be tokenised, empty sets.
    pub fn new(
        open: &OpenModel,
        template: &Template,
        forget_records: Vec<Record>,
        retain_records: Option<Vec<Record>>,
        max_tokens: usize,
    ) -> Result<Self, Error> {
        let general = retain_records.is_none();
        let retain_records = retain_records.unwrap_or_else(general_records);
        let shared = overlap(&forget_records, &retain_records);
        if shared.n_shared > 0 {
            return Err(Error::Overlap(shared));
        }
        let mut notices = Vec::new();
        if general {
            notices.push(format!(
                "no retain set given: {} built-in records of general text stand in for it",
                retain_records.len()
            ));
        }
        let forget = samples(open, template, &forget_records, max_tokens, "forget", &mut notices)?;
        let retain = samples(open, template, &retain_records, max_tokens, "retain", &mut notices)?;
        Ok(Self {
            forget_records,
            retain_records,
            forget,
            retain,
            general,
            notices,
        })
    }
}

/// Tokenise `records`, with a notice for whatever was cut or left out.
///
/// # Errors
/// Records that cannot be tokenised.
pub fn samples(
    open: &OpenModel,
    template: &Template,
    records: &[Record],
    max_tokens: usize,
    set: &str,
    notices: &mut Vec<String>,
) -> Result<Vec<Sample>, Error> {
    let SampleSet {
        samples,
        n_truncated,
        n_skipped,
    } = build_samples(records, &open.model, template, max_tokens)?;
    if n_truncated > 0 {
        notices.push(format!("{n_truncated} of {} {set} samples cut to {max_tokens} tokens", samples.len()));
    }
    if n_skipped > 0 {
        notices.push(format!("{n_skipped} {set} records left out: nothing in them to predict"));
    }
    Ok(samples)
}

/// Bases of every adaptable tensor, from one forward pass over each set (one in all with
/// `shared`, retain bases computed before).
///
/// # Errors
/// When llama.cpp fails, or shared bases do not fit the model.
pub fn subspaces(
    open: &OpenModel,
    adaptable: &[Adaptable],
    (forget, retain): (&[Sample], &[Sample]),
    shared: Option<Vec<RetainBasis>>,
    config: &SubspaceConfig,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Subspace>, Error> {
    let forget = &forget[..forget.len().min(CAPTURE_SAMPLES)];
    let retain = &retain[..retain.len().min(CAPTURE_SAMPLES)];
    let n_retain = if shared.is_some() { 0 } else { retain.len() };
    let total = forget.len() + n_retain;
    let h_f = pooled_outputs(&open.model, adaptable, forget, n_threads, &mut |n| progress(n, total))?;
    let Some(shared) = shared else {
        let n_f = forget.len();
        let h_r = pooled_outputs(&open.model, adaptable, retain, n_threads, &mut |n| progress(n_f + n, total))?;
        let pooled: Vec<Pooled<'_>> = h_f
            .iter()
            .zip(&h_r)
            .map(|(f, r)| Pooled {
                tensor: &f.tensor.name,
                n_out: f.tensor.n_out,
                forget: &f.h,
                retain: Retain::Pooled(&r.h),
            })
            .collect();
        return Ok(solve_all(config, &pooled)?);
    };
    let pooled: Vec<Pooled<'_>> = h_f
        .iter()
        .zip(&shared)
        .map(|(f, basis)| Pooled {
            tensor: &f.tensor.name,
            n_out: f.tensor.n_out,
            forget: &f.h,
            retain: Retain::Shared(basis),
        })
        .collect();
    Ok(solve_all(config, &pooled)?)
}

/// Low-rank pairs as the configuration starts them.
///
/// # Errors
/// Weights that cannot be decoded.
pub fn start(
    open: &OpenModel,
    adaptable: &[Adaptable],
    subspaces: Vec<Subspace>,
    config: &UnlearnConfig,
) -> Result<Pairs, Error> {
    let scale = config.train.alpha / config.subspace.rank as f32;
    match config.train.init {
        Init::Rila => Pairs::rila(&open.weights, adaptable, subspaces, scale),
        Init::Lora => {
            let bases = subspaces.into_iter().map(|s| s.retain.basis).collect();
            Ok(Pairs::lora(adaptable, config.subspace.rank, scale, config.train.seed, bases))
        }
    }
}

/// The subspace settings that go with the constraint: a hard projection needs B0 within the
/// complement of P.
pub fn subspace_config(config: &UnlearnConfig) -> SubspaceConfig {
    SubspaceConfig {
        off_retain: config.train.constraint == Constraint::Project,
        ..config.subspace.clone()
    }
}

/// Answer NLL that counts as unseen, and what it was derived from.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct UnseenLevel {
    /// Mean answer NLL, nats per token, at which training stops.
    pub nll: f64,
    /// Mean NLL of the forget prompts with each other's answers, before training.
    pub exchanged: Option<f64>,
}

/// When to stop: after fixed steps if there are any, else at the unseen level.
///
/// # Errors
/// When ggml fails.
pub fn until(
    trainer: &mut Trainer<'_>,
    open: &OpenModel,
    template: &Template,
    sets: &Sets,
    config: &UnlearnConfig,
) -> Result<(Until, Option<UnseenLevel>), Error> {
    if let Some(steps) = config.train.fixed_steps(sets.forget.len()) {
        return Ok((Until::Steps(steps), None));
    }
    let level = unseen_level(trainer, open, template, &sets.forget_records, &config.stop, config.train.max_tokens)?;
    Ok((Until::Level(level.nll), Some(level)))
}

/// The unseen level of `records` under the parameters as they are: the NLL of answers that are
/// true of someone else, times a factor (METHOD.md: such answers are a lower mark).
///
/// # Errors
/// When ggml fails.
pub fn unseen_level(
    trainer: &mut Trainer<'_>,
    open: &OpenModel,
    template: &Template,
    records: &[Record],
    stop: &StopConfig,
    max_tokens: usize,
) -> Result<UnseenLevel, Error> {
    if let Some(nll) = stop.nll {
        return Ok(UnseenLevel { nll, exchanged: None });
    }
    let exchanged = exchanged_answers(records);
    let set = build_samples(&exchanged, &open.model, template, max_tokens)?;
    let n = stop.check_samples.min(set.samples.len());
    let chosen: Vec<&Sample> = (0..n).map(|i| &set.samples[i * set.samples.len() / n]).collect();
    let nll = mean_nll(&trainer.losses(&chosen)?);
    Ok(UnseenLevel {
        nll: stop.factor * nll,
        exchanged: Some(nll),
    })
}

/// Every record with the answer of another one, half the set away; a single record gets
/// answers from the general text.
fn exchanged_answers(records: &[Record]) -> Vec<Record> {
    let n = records.len();
    if n == 1 {
        let others = general_records().into_iter().filter(|r| matches!(r, Record::Qa { .. }));
        return others
            .take(FALLBACK_ANSWERS)
            .map(|other| with_answer(&records[0], &other))
            .collect();
    }
    let shift = n.div_ceil(2);
    (0..n).map(|i| with_answer(&records[i], &records[(i + shift) % n])).collect()
}

fn with_answer(record: &Record, other: &Record) -> Record {
    match record {
        Record::Qa { question, .. } => Record::Qa {
            question: question.clone(),
            answer: other.answer().trim().to_owned(),
        },
        Record::Completion { prompt, .. } => Record::Completion {
            prompt: prompt.clone(),
            completion: format!(" {}", other.answer().trim()),
        },
        Record::Messages(messages) => {
            let mut messages: Vec<Message> = messages.clone();
            if let Some(last) = messages.last_mut() {
                *last = Message {
                    role: Role::Assistant,
                    content: other.answer().to_owned(),
                };
            }
            Record::Messages(messages)
        }
        // Running text: the first half of one, the second half of the other.
        Record::Text(text) => Record::Completion {
            prompt: halves(text).0.to_owned(),
            completion: halves(other.answer()).1.to_owned(),
        },
    }
}

/// `text` cut at the white space nearest to its middle.
fn halves(text: &str) -> (&str, &str) {
    let middle = text.len() / 2;
    let spaces = text.char_indices().filter(|(_, c)| c.is_whitespace());
    let cut = spaces.map(|(i, _)| i).min_by_key(|&i| i.abs_diff(middle)).unwrap_or(text.len());
    text.split_at(cut)
}

/// The net update of one tensor and where it lives.
#[derive(Debug, Clone)]
pub struct NetReport {
    /// Tensor name.
    pub tensor: String,
    /// ΔW in factors.
    pub net: NetUpdate,
    /// ‖ΔW‖.
    pub norm: f64,
    /// ‖ΔW‖/‖W‖.
    pub relative_norm: f64,
    /// ‖PᵀΔW‖/‖ΔW‖.
    pub retain_fraction: f64,
    /// Rank of the pair.
    pub rank: usize,
    /// Size of P.
    pub retain_rank: usize,
}

/// Net updates of all pairs, projected once more where the constraint is hard (rounding of the
/// factors in f32 leaves about 1e-7 of them in P).
///
/// # Errors
/// Weights that cannot be decoded.
pub fn net_updates(open: &OpenModel, pairs: &Pairs, constraint: Constraint) -> Result<Vec<NetReport>, Error> {
    (0..pairs.list.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|i| {
            let pair = &pairs.list[i];
            let mut net = pairs.net(i)?;
            if constraint == Constraint::Project && !pair.basis.is_empty() {
                net.project_output(&pair.basis)?;
            }
            let w = open.weights.decoded(&pair.tensor.name)?;
            let w_norm = w.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
            let norm = net.norm();
            Ok(NetReport {
                tensor: pair.tensor.name.clone(),
                norm,
                relative_norm: if w_norm > 0.0 { norm / w_norm } else { 0.0 },
                retain_fraction: net.retain_fraction(&pair.basis)?,
                rank: pair.rank,
                retain_rank: pair.basis.len() / pair.tensor.n_out,
                net,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qa(i: usize) -> Record {
        Record::Qa {
            question: format!("q{i}"),
            answer: format!("a{i}"),
        }
    }

    #[test]
    fn exchanged_answers_are_never_ones_own() {
        for n in 2..9 {
            let records: Vec<Record> = (0..n).map(qa).collect();
            for (old, new) in records.iter().zip(exchanged_answers(&records)) {
                assert_ne!(old.answer(), new.answer(), "{n}");
            }
        }
        let alone = exchanged_answers(&[qa(0)]);
        assert_eq!(alone.len(), FALLBACK_ANSWERS);
        assert!(alone.iter().all(|r| r.answer() != "a0"));
    }

    #[test]
    fn running_text_is_exchanged_by_halves() {
        let texts = ["one two three four", "five six seven eight"].map(|t| Record::Text(t.into()));
        let exchanged = exchanged_answers(&texts);
        assert_eq!(
            exchanged[0],
            Record::Completion {
                prompt: "one two".into(),
                completion: " seven eight".into()
            }
        );
    }
}
