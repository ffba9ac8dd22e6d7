//! Corrections of merged files: a plain LoRA pair on every tensor of the file, trained towards what
//! model and patches say of the texts at hand ([`distil`]).

use crate::data::Sample;
use crate::error::Error;
use crate::learn::longest;
use crate::merge::compare::answer_rows;
use crate::merge::correct::{Correct, Correction, Draft};
use crate::merge::gate::spread;
use crate::merge::moments::Set;
use crate::model::OpenModel;
use crate::patch::{Info, Patch, Update, base_of};
use crate::progress::Ui;
use crate::train::adapters::Pairs;
use crate::train::config::{Constraint, Init, TrainConfig};
use crate::train::distil::{Lesson, distil};
use crate::train::engine::Engine;
use crate::train::memory::Shape;
use crate::train::net::net_updates;
use crate::train::soft::Soft;
use crate::train::trainer::Trainer;

/// Samples of each set that are learned from, evenly spread over it.
const SAMPLES: usize = 200;

/// Trains corrections; keeps what the teacher said from round to round.
#[derive(Debug)]
pub struct Distiller {
    /// Rank of the pairs.
    pub rank: usize,
    /// Steps of training.
    pub steps: usize,
    /// The trainer's settings.
    pub config: TrainConfig,
    lessons: Vec<Vec<Lesson>>,
}

impl Default for Distiller {
    fn default() -> Self {
        Self {
            rank: 16,
            steps: 60,
            config: TrainConfig {
                init: Init::Lora,
                constraint: Constraint::None,
                // An update twice as large takes back more, and its own merge loses more of that.
                alpha: 16.0,
                lr: 1e-4,
                weight_decay: 0.0,
                ..TrainConfig::default()
            },
            lessons: Vec::new(),
        }
    }
}

impl Distiller {
    /// What the teacher says of each set.
    fn ask(&mut self, draft: &Draft<'_>, ui: &mut dyn Ui) -> Result<(), Error> {
        let chosen = Set::ALL.map(|set| spread(draft.sources.of(set), SAMPLES));
        let total: usize = chosen.iter().map(Vec::len).sum();
        let mut done = 0;
        for samples in chosen {
            let mut rows: Vec<Vec<Soft>> = vec![Vec::new(); samples.len()];
            if !samples.is_empty() {
                answer_rows(
                    draft.unmerged,
                    &samples,
                    draft.n_threads,
                    &mut |sample, row| rows[sample].push(Soft::of(row)),
                    &mut |n| {
                        done += n;
                        ui.progress("what model and patch say", done, total);
                    },
                )?;
            }
            let lessons = samples.into_iter().zip(rows);
            self.lessons.push(
                lessons
                    .map(|(sample, rows)| Lesson { sample, rows })
                    .collect(),
            );
        }
        Ok(())
    }
}

impl Correct for Distiller {
    fn patch(&mut self, draft: &Draft<'_>, ui: &mut dyn Ui) -> Result<(Patch, Correction), Error> {
        if self.lessons.is_empty() {
            self.ask(draft, ui)?;
        }
        let config = TrainConfig {
            seed: self.config.seed + draft.round as u64,
            ..self.config.clone()
        };
        let open = OpenModel::open(draft.merged, draft.n_gpu_layers)?;
        let mut engine = Engine::new(&open, draft.n_threads, config.micro_tokens)?
            .on_tensors(|name| draft.tensors.contains(name));
        let adaptable = engine.template.adaptable.clone();
        if adaptable.is_empty() {
            return Err(Error::NothingToTrain);
        }
        let shape = Shape {
            rank: self.rank,
            frozen: false,
            basis: 0,
            snapshots: 0,
            beneath: 0,
        };
        let lengths: Vec<usize> = self
            .lessons
            .iter()
            .flat_map(|set| {
                let samples: Vec<Sample> = set.iter().map(|l| l.sample.clone()).collect();
                longest(&samples, config.step_samples().min(set.len()))
            })
            .collect();
        engine.plan(None, &shape, &lengths)?;
        let scale = config.alpha / self.rank as f32;
        let pairs = Pairs::lora(&adaptable, self.rank, scale, config.seed, Vec::new());
        let mut trainer = Trainer::new(engine, pairs)?;
        let steps = self.steps;
        let mut kl = Vec::new();
        distil(
            &mut trainer,
            &config,
            steps,
            &self.lessons,
            &mut |done, of_step| {
                kl.push(of_step);
                ui.progress("correcting", done, steps);
            },
        )?;
        let (pairs, _, _) = trainer.into_parts()?;
        let info = Info::new(
            base_of(&open.weights)?,
            "correction",
            serde_json::Value::Null,
            config.seed,
        );
        let nets = net_updates(&open, pairs, config.constraint)?;
        let norms: f64 = nets.iter().map(|n| n.relative_norm).sum();
        let updates = nets.iter().map(|n| Update::of(&n.tensor, &n.net)).collect();
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
        let some = kl.len().div_ceil(6);
        Ok((
            Patch::new(open.weights.arch()?, info, updates),
            Correction {
                kl_before: mean(&kl[..some]),
                kl_trained: mean(&kl[kl.len() - some..]),
                relative_norm: norms / nets.len() as f64,
            },
        ))
    }
}
