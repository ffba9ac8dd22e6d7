//! Training towards another model's distributions, row by row: knowledge distillation
//! (Hinton et al., arXiv 1503.02531) with the teacher's answers computed beforehand.

use super::adamw::linear_schedule;
use super::config::TrainConfig;
use super::engine::{Aim, Item};
use super::order::Order;
use super::soft::Soft;
use super::trainer::Trainer;
use crate::data::Sample;
use crate::error::Error;

/// A sample and what another model says of each of its answer rows.
#[derive(Debug, Clone)]
pub struct Lesson {
    /// The sample.
    pub sample: Sample,
    /// One for each answer row, in order.
    pub rows: Vec<Soft>,
}

/// Stream of the first set's order; those of other loops are below it.
const STREAM: u64 = 8;

/// Train for `steps` towards `sets`, each of which weighs the same; a step takes `config`'s batch of
/// each. `seen` gets the steps done and the KL of the step's rows, averaged over the sets, in nats.
///
/// # Errors
/// When ggml fails or training runs away.
pub fn distil(
    trainer: &mut Trainer<'_>,
    config: &TrainConfig,
    steps: usize,
    sets: &[Vec<Lesson>],
    seen: &mut dyn FnMut(usize, f64),
) -> Result<(), Error> {
    let sets: Vec<&Vec<Lesson>> = sets.iter().filter(|s| !s.is_empty()).collect();
    let mut orders: Vec<Order> = (STREAM..)
        .zip(&sets)
        .map(|(stream, set)| Order::new(config.seed, stream, set.len()))
        .collect();
    let warmup = steps.div_ceil(10);
    for step in 0..steps {
        let mut items = Vec::new();
        for (set, order) in sets.iter().zip(&mut orders) {
            let drawn = order.take(config.step_samples().min(set.len()));
            let drawn: Vec<&Lesson> = drawn.iter().map(|&i| &set[i]).collect();
            let rows: usize = drawn.iter().map(|l| l.rows.len()).sum();
            let weight = 1.0 / (sets.len() * rows.max(1)) as f32;
            items.extend(drawn.iter().map(|l| Item {
                sample: &l.sample,
                aim: Aim::Taught(&l.rows),
                weight,
            }));
        }
        let lr = linear_schedule(config.lr, step, warmup, steps);
        let done = trainer.descend(config, &items, lr)?;
        let weighted = done.losses.iter().zip(&items);
        let kl = weighted.map(|(l, i)| l.loss * f64::from(i.weight)).sum();
        seen(step + 1, kl);
    }
    Ok(())
}
