//! A relearning attack (Hu et al., arXiv 2406.13356): a few steps of plain LoRA on other data, on
//! top of the patched or merged model, and how much of the forget set comes back.
//!
//! The learning rate is constant, so that the score after k steps is that of an attack of k steps.

use super::Job;
use crate::data::{Record, Sample, overlap, samples};
use crate::error::Error;
use crate::learn::longest;
use crate::likelihood::SampleLoss;
use crate::patch::Patch;
use crate::progress::Ui;
use crate::score::SetScores;
use crate::train::adapters::Pairs;
use crate::train::config::{Constraint, Init, TrainConfig};
use crate::train::engine::Engine;
use crate::train::memory::Shape;
use crate::train::order::Order;
use crate::train::trainer::{StepBatch, Trainer};
use serde::{Deserialize, Serialize};

/// Stream of the data order, apart from those of other loops.
const ORDER_STREAM: u64 = 5;

/// How the attack is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RelearnConfig {
    /// Steps after which the sets are scored, rising.
    pub steps: Vec<usize>,
    /// Learning rate, constant.
    pub lr: f32,
    /// Rank of the pairs.
    pub rank: usize,
    /// Samples per step.
    pub batch: usize,
    /// Seed of pairs and data order.
    pub seed: u64,
}

impl Default for RelearnConfig {
    fn default() -> Self {
        Self {
            steps: vec![0, 5, 10, 20],
            lr: 1e-3,
            rank: 32,
            batch: 8,
            seed: 42,
        }
    }
}

impl RelearnConfig {
    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self) -> Result<(), Error> {
        let bad = |setting, wanted: &str, found: String| {
            Err(Error::Setting {
                setting,
                wanted: wanted.into(),
                found,
            })
        };
        if self.steps.is_empty() || !self.steps.is_sorted_by(|a, b| a < b) {
            let found = format!("{:?}", self.steps);
            return bad("relearn-steps", "numbers of steps that rise", found);
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return bad("lr", "a number above 0", self.lr.to_string());
        }
        if self.rank == 0 || self.batch == 0 {
            let found = format!("rank {}, batch {}", self.rank, self.batch);
            return bad("relearn", "a rank and a batch of at least 1", found);
        }
        Ok(())
    }

    fn train(&self, max_tokens: usize) -> TrainConfig {
        TrainConfig {
            init: Init::Lora,
            constraint: Constraint::None,
            lr: self.lr,
            batch: self.batch,
            weight_decay: 0.0,
            seed: self.seed,
            max_tokens,
            ..TrainConfig::default()
        }
    }
}

/// The sets after some steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelearnPoint {
    /// Steps taken.
    pub step: usize,
    /// Mean loss on the attack's own data since the last point; none before the first step.
    pub loss: Option<f64>,
    /// Forget set.
    pub forget: SetScores,
    /// Retain set, if one was given.
    pub retain: Option<SetScores>,
}

/// The attack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relearn {
    /// Records trained on.
    pub n_records: usize,
    /// Forget records that are among them: an attack that knows part of the answers.
    pub n_shared: usize,
    /// How.
    pub config: RelearnConfig,
    /// In order of steps.
    pub points: Vec<RelearnPoint>,
}

/// Train on `records`, scoring `forget` and `retain` on the way.
///
/// # Errors
/// Bad settings, a patch that cannot be trained on top of, failures of the engine.
pub fn relearn(
    job: &Job<'_>,
    records: &[Record],
    config: &RelearnConfig,
    (forget, retain): (&[Sample], &[Sample]),
    ui: &mut dyn Ui,
) -> Result<Relearn, Error> {
    config.validate()?;
    let open = job.open;
    let mut notices = Vec::new();
    let data = samples(
        &open.model,
        &job.template,
        records,
        job.max_tokens,
        "relearning",
        &mut notices,
    )?;
    for notice in &notices {
        ui.notice(notice);
    }
    let train = config.train(job.max_tokens);
    let mut engine = Engine::new(open, job.n_threads, train.micro_tokens)?;
    let adaptable = engine.template.adaptable.clone();
    let mut patches = Vec::new();
    for &(path, scale) in &job.specs {
        patches.push((Patch::open_any(path, &open.weights)?, scale));
    }
    let beneath = patches
        .iter()
        .flat_map(|(p, scale)| p.updates.iter().map(|u| (u, *scale)));
    let scale = train.alpha / config.rank as f32;
    let pairs = Pairs::lora(&adaptable, config.rank, scale, config.seed, Vec::new())
        .on_top_of(beneath, &adaptable)?;
    let shape = Shape {
        rank: config.rank,
        frozen: false,
        basis: 0,
        snapshots: 0,
        beneath: pairs.beneath.iter().map(|b| b.a.len() + b.b.len()).sum(),
    };
    let n = config.batch.min(data.len());
    engine.plan(job.memory, &shape, &longest(&data, n))?;
    open.release();
    let mut trainer = Trainer::new(engine, pairs)?;
    let mut order = Order::new(config.seed, ORDER_STREAM, data.len());
    let last = *config.steps.last().expect("validated");
    let mut points = Vec::new();
    let mut losses = Vec::new();
    for &wanted in &config.steps {
        while (trainer.step as usize) < wanted {
            ui.progress("relearning", trainer.step as usize, last);
            let drawn = order.take(config.batch.min(data.len()));
            let batch = StepBatch {
                retain: drawn.iter().map(|&i| &data[i]).collect(),
                ..StepBatch::default()
            };
            losses.extend(trainer.step(&train, &batch, config.lr)?.retain);
        }
        points.push(RelearnPoint {
            step: wanted,
            loss: (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64),
            forget: scores(&mut trainer, forget)?.ok_or_else(super::no_forget)?,
            retain: scores(&mut trainer, retain)?,
        });
        losses.clear();
    }
    Ok(Relearn {
        n_records: records.len(),
        n_shared: overlap(&job.texts.forget, records).n_shared,
        config: config.clone(),
        points,
    })
}

fn scores(trainer: &mut Trainer<'_>, samples: &[Sample]) -> Result<Option<SetScores>, Error> {
    let all: Vec<&Sample> = samples.iter().collect();
    let losses: Vec<SampleLoss> = match all.is_empty() {
        true => Vec::new(),
        false => trainer.losses(&all)?,
    };
    Ok(SetScores::of_losses(&losses))
}
