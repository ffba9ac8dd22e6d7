//! The training loop of `unlearn`.
//!
//! Two schedules. With a fixed number of steps, the reference's: warm-up, then linear decay to
//! zero. By default, until the unseen level: the learning rate stays up while forget samples
//! are drawn only from those whose own answer NLL is still below the level (a sample that has
//! been forgotten is pushed no further: over-forgetting shows). Once the mean has reached the
//! level, the rate decays linearly over the `settle` steps, in which the retain set recovers and
//! only samples that fall far back are pushed again. When a check finds the mean well past the
//! level, the parameters go back along the line to the last check until it is near.

use super::adamw::linear_schedule;
use super::config::{StopConfig, TrainConfig};
use super::order::Order;
use super::trainer::{Forget, StepBatch, StepReport, Trainer};
use crate::data::Sample;
use crate::error::Error;
use crate::likelihood::{mean_nll, mean_prob};
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Share of forget samples that may stay below the level when it counts as reached.
const LEFT_OVER: f64 = 0.1;
/// Past this multiple of the level parameters are taken back.
const TOO_FAR: f64 = 1.1;
/// A pace that needs more checks than this to reach the level is too slow ...
const CHECKS_TO_LEVEL: f64 = 12.0;
/// ... and the learning rate grows by this factor at a check, up to `MAX_BOOST` in all: the rate
/// that suits one width is slow at another.
const BOOST: f32 = 1.3;
const MAX_BOOST: f32 = 8.0;
/// Halvings of the way back.
const HALVINGS: usize = 6;
/// While settling, and the mean has fallen below the level, samples below this share of it are
/// pushed again.
const FALLEN_BACK: f64 = 0.6;
/// Warm-up steps towards a level: a few samples may be forgotten in as many steps.
const WARMUP: usize = 10;

/// When to stop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Until {
    /// After this many steps.
    Steps(usize),
    /// At this mean answer NLL of the forget set.
    Level(f64),
}

/// The forget set at a check.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Steps taken.
    pub step: u64,
    /// Mean answer NLL.
    pub nll: f64,
    /// Mean answer probability^(1/tokens).
    pub prob: f64,
    /// Share of samples still below the level.
    pub below: f64,
}

/// Where training stands; with parameters and moments, all that a resumed run needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FitState {
    /// When to stop.
    pub until: Until,
    /// Latest answer NLL of every forget sample.
    pub nll: Vec<f64>,
    /// Step at which the level was reached.
    pub settled_at: Option<u64>,
    /// Checks so far.
    pub checks: Vec<Check>,
    /// Factor on the learning rate, grown while progress is slow.
    pub boost: f32,
    /// [`Forget::reference`] of every forget sample, for objectives that look at it; kept, so
    /// that a resumed run sees the same bits.
    pub reference: Vec<f64>,
    forget: Order,
    retain: Order,
    /// Parameters at the last check below the level, in the tape's order.
    #[serde(skip)]
    pub before: Option<Vec<Vec<f32>>>,
}

impl FitState {
    /// Before the first step.
    pub fn new(config: &TrainConfig, until: Until, n_forget: usize, n_retain: usize) -> Self {
        Self {
            until,
            nll: vec![0.0; n_forget],
            settled_at: None,
            checks: Vec::new(),
            boost: 1.0,
            reference: Vec::new(),
            forget: Order::new(config.seed, 2, n_forget),
            retain: Order::new(config.seed, 3, n_retain),
            before: None,
        }
    }
}

/// What is trained on.
#[derive(Debug, Clone, Copy)]
pub struct FitData<'a> {
    /// To be forgotten.
    pub forget: &'a [Sample],
    /// The answers preferred to those of `forget`, one each; empty unless the objective is DPO.
    pub preferred: &'a [Sample],
    /// To be kept.
    pub retain: &'a [Sample],
}

impl FitData<'_> {
    /// [`Forget::reference`] of every forget sample.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn references(&self, trainer: &mut Trainer<'_>) -> Result<Vec<f64>, Error> {
        let samples: Vec<&Sample> = self.forget.iter().chain(self.preferred).collect();
        let losses = trainer.base_losses(&samples)?;
        let (forget, preferred) = losses.split_at(self.forget.len());
        let preferred = |i: usize| preferred.get(i).map_or(0.0, |l| l.nll);
        Ok(forget
            .iter()
            .enumerate()
            .map(|(i, l)| l.nll - preferred(i))
            .collect())
    }
}

/// Why training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// The fixed number of steps was taken.
    Steps,
    /// The unseen level was reached.
    Unseen,
    /// It was not, within the most steps allowed.
    NotReached,
    /// The wanted answer probability was reached.
    Learned,
    /// The watcher asked to stop.
    Interrupted,
}

/// What a watcher is shown.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// A step was taken.
    Step {
        /// From 1.
        step: u64,
        /// The last step there will be at most.
        of: usize,
        /// Learning rate.
        lr: f32,
        /// Losses.
        #[serde(flatten)]
        report: &'a StepReport,
        /// Seconds it took.
        seconds: f64,
    },
    /// The forget set was checked.
    Check(Check),
    /// The samples being learned were checked.
    Learned {
        /// Steps taken.
        step: u64,
        /// Mean answer probability^(1/tokens).
        prob: f64,
    },
}

/// Sees events as they happen.
pub trait Watch {
    /// An event.
    fn seen(&mut self, event: &Event<'_>);
    /// Whether to stop after the step under way.
    fn stop(&self) -> bool;
}

/// Train until the end or until `watch` stops it; `state` is then fit for resuming.
///
/// # Errors
/// When ggml fails or training runs away.
pub fn fit(
    trainer: &mut Trainer<'_>,
    config: &TrainConfig,
    stop: &StopConfig,
    state: &mut FitState,
    data: FitData<'_>,
    watch: &mut dyn Watch,
) -> Result<Ended, Error> {
    let n = config.step_samples();
    let forget = data.forget;
    let pass = forget.len().div_ceil(n);
    loop {
        let step = trainer.step as usize;
        if watch.stop() {
            return Ok(Ended::Interrupted);
        }
        let (lr, of) = match state.until {
            Until::Steps(total) => {
                let warmup = config.warmup.unwrap_or(pass.min(total.div_ceil(10)));
                if step >= total {
                    return Ok(Ended::Steps);
                }
                (linear_schedule(config.lr, step, warmup, total), total)
            }
            Until::Level(level) => {
                let near = state.checks.last().is_some_and(|c| c.nll > level / 2.0);
                let every = if near {
                    stop.check_every.div_ceil(2)
                } else {
                    stop.check_every
                };
                let due = step.is_multiple_of(every);
                let last = state.settled_at.map(|s| s as usize + stop.settle);
                let done = last == Some(step);
                if (due || done || step == stop.max_steps)
                    && state.checks.last().is_none_or(|c| c.step < trainer.step)
                {
                    let mut check = check(trainer, stop, state, forget, level)?;
                    if state.settled_at.is_none() {
                        if check.nll > TOO_FAR * level
                            && let Some(before) = state.before.take()
                        {
                            check = take_back(trainer, stop, state, forget, &before, level)?;
                        }
                        if check.nll >= level || check.below <= LEFT_OVER {
                            state.settled_at = Some(trainer.step);
                            state.before = None;
                            // What was gathered pulled towards forgetting, and would go on.
                            trainer.rest();
                        } else {
                            if let (Some(first), Some(last)) =
                                (state.checks.first(), state.checks.last())
                            {
                                let slow =
                                    check.nll - last.nll < (level - first.nll) / CHECKS_TO_LEVEL;
                                let warm = step > config.warmup.unwrap_or(WARMUP);
                                if slow && warm {
                                    state.boost = (state.boost * BOOST).min(MAX_BOOST);
                                }
                            }
                            state.before = Some(trainer.params()?);
                        }
                    }
                    if done && check.nll > TOO_FAR * level {
                        // Settling may carry the forget set on: then the whole update shrinks.
                        let start = trainer.start()?;
                        check = take_back(trainer, stop, state, forget, &start, level)?;
                    }
                    state.checks.push(check);
                    watch.seen(&Event::Check(check));
                }
                if done {
                    return Ok(Ended::Unseen);
                }
                if step >= stop.max_steps {
                    return Ok(Ended::NotReached);
                }
                match state.settled_at {
                    _ if stop.settle == 0 && state.settled_at.is_some() => {
                        return Ok(Ended::Unseen);
                    }
                    Some(since) => {
                        let into = step - since as usize;
                        let lr = config.lr * state.boost * (stop.settle - into) as f32
                            / stop.settle as f32;
                        (lr, since as usize + stop.settle)
                    }
                    None => {
                        let warmup = config.warmup.unwrap_or(WARMUP);
                        let up = (step + 1) as f32 / warmup.max(1) as f32;
                        (config.lr * state.boost * up.min(1.0), stop.max_steps)
                    }
                }
            }
        };
        let began = Instant::now();
        let (batch, drawn) = draw(state, config, data);
        let report = trainer.step(config, &batch, lr)?;
        for (&i, l) in drawn.iter().zip(&report.forget_losses) {
            state.nll[i] = l.per_token();
        }
        watch.seen(&Event::Step {
            step: trainer.step,
            of,
            lr,
            report: &report,
            seconds: began.elapsed().as_secs_f64(),
        });
    }
}

fn draw<'a>(
    state: &mut FitState,
    config: &TrainConfig,
    data: FitData<'a>,
) -> (StepBatch<'a>, Vec<usize>) {
    let n = config.step_samples();
    let n_forget = n.min(data.forget.len());
    let drawn = match state.until {
        Until::Steps(_) => state.forget.take(n_forget),
        Until::Level(level) => {
            let nll = &state.nll;
            let level = match (state.settled_at, state.checks.last()) {
                // Settling is the retain set's time: what is past the level is left alone.
                (Some(_), Some(check)) if check.nll >= level => 0.0,
                (Some(_), _) => FALLEN_BACK * level,
                (None, _) => level,
            };
            state.forget.take_where(n, |i| nll[i] < level)
        }
    };
    let n_retain = if config.objective.has_retain() { n } else { 0 };
    let batch = StepBatch {
        forget_share: drawn.len() as f32 / n_forget as f32,
        forget: drawn
            .iter()
            .map(|&i| Forget {
                sample: &data.forget[i],
                preferred: data.preferred.get(i),
                reference: state.reference.get(i).copied().unwrap_or_default(),
            })
            .collect(),
        retain: state
            .retain
            .take(n_retain)
            .iter()
            .map(|&i| &data.retain[i])
            .collect(),
    };
    (batch, drawn)
}

/// Measure the forget set (or an even spread of it) and take note of each sample's NLL.
fn check(
    trainer: &mut Trainer<'_>,
    stop: &StopConfig,
    state: &mut FitState,
    forget: &[Sample],
    level: f64,
) -> Result<Check, Error> {
    let n = stop.check_samples.min(forget.len());
    // The spread moves on from check to check: every sample is seen in turn.
    let offset = state.checks.len();
    let chosen: Vec<usize> = (0..n)
        .map(|i| (i * forget.len() / n + offset) % forget.len())
        .collect();
    let samples: Vec<&Sample> = chosen.iter().map(|&i| &forget[i]).collect();
    let losses = trainer.losses(&samples)?;
    for (&i, l) in chosen.iter().zip(&losses) {
        state.nll[i] = l.per_token();
    }
    let below = losses.iter().filter(|l| l.per_token() < level).count() as f64 / n as f64;
    Ok(Check {
        step: trainer.step,
        nll: mean_nll(&losses),
        prob: mean_prob(&losses),
        below,
    })
}

/// Put the parameters on the line from `before` to now, as near to the level as a few
/// halvings come.
fn take_back(
    trainer: &mut Trainer<'_>,
    stop: &StopConfig,
    state: &mut FitState,
    forget: &[Sample],
    before: &[Vec<f32>],
    level: f64,
) -> Result<Check, Error> {
    let after = trainer.params()?;
    let (mut low, mut high) = (0f32, 1f32);
    let mut halvings = 0;
    loop {
        let at = (low + high) / 2.0;
        trainer.set_between(before, &after, at)?;
        let now = check(trainer, stop, state, forget, level)?;
        halvings += 1;
        if now.nll < level {
            low = at;
        } else {
            high = at;
        }
        let near = now.nll >= level && now.nll <= TOO_FAR * level;
        if near || halvings == HALVINGS {
            return Ok(now);
        }
    }
}
