//! Continuous batching: one thread, one llama.cpp context, a slot for each text being written.
//!
//! A turn gives waiting texts the free slots, and then, for each set of patches that texts are
//! written under, computes a token of every text of that set in one batch and a piece of one
//! prompt in another, so that a long prompt delays the others by one batch at most. The context's adapters are changed between the batches of different sets,
//! and only then, so that every KV cell of a slot is computed under the set its text began with
//! and a text ends under that set, whatever is applied or revoked meanwhile.
//!
//! A slot keeps its KV cache: the next text of the same set that begins alike goes on from there.

use super::job::{Event, Job, Message};
use super::metrics::Metrics;
use super::slot::{Running, Slot};
use crate::digest::Digest;
use crate::error::Error;
use crate::ggml::{Batch, Context, ContextOptions};
use crate::runtime::{ActiveSet, Runtime, common_prefix};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

/// Tokens per decode.
const N_BATCH: u32 = 512;
/// Logits read of one batch, bytes.
const LOGIT_BYTES: usize = 32 << 20;

/// The scheduler.
pub(super) struct Engine {
    runtime: Runtime,
    context: Context,
    slots: Vec<Slot>,
    waiting: VecDeque<Job>,
    inbox: Receiver<Message>,
    /// The set the context was last given.
    applied: Digest,
    turn: u64,
    metrics: Arc<Metrics>,
}

impl Engine {
    /// With `n_slots` slots of the runtime's context length each.
    ///
    /// # Errors
    /// When llama.cpp has no memory for the context.
    pub(super) fn new(
        runtime: Runtime,
        n_slots: usize,
        inbox: Receiver<Message>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, Error> {
        let options = runtime.options();
        let context = Context::new(
            runtime.model(),
            ContextOptions {
                n_ctx: options.n_ctx.saturating_mul(n_slots as u32),
                n_batch: N_BATCH.max(n_slots as u32),
                n_seq_max: n_slots as u32,
                unified: false,
                n_threads: options.n_threads,
                flash_attn: true,
                ..ContextOptions::default()
            },
        )?;
        let applied = ActiveSet::none().digest();
        let slot = || Slot {
            cached: Vec::new(),
            key: applied,
            used: 0,
            running: None,
        };
        Ok(Self {
            context,
            slots: (0..n_slots).map(|_| slot()).collect(),
            waiting: VecDeque::new(),
            inbox,
            applied,
            turn: 0,
            metrics,
            runtime,
        })
    }

    /// Work until told to stop.
    pub(super) fn run(mut self) {
        while self.receive() {
            self.turn += 1;
            self.drop_abandoned();
            self.admit();
            self.report();
            for set in self.sets() {
                self.advance(&set);
            }
        }
    }

    /// Take in what has come, waiting for it when there is nothing to do; false: stop.
    fn receive(&mut self) -> bool {
        let is_idle = self.waiting.is_empty() && self.slots.iter().all(|s| s.running.is_none());
        if is_idle {
            self.report();
            // A replaced set lives as long as the context is set to it. A refusal shows when the
            // set is used.
            let _ = self.apply(&self.runtime.active());
            let goes_on = self.inbox.recv().is_ok_and(|message| self.take(message));
            if !goes_on {
                return false;
            }
        }
        loop {
            let goes_on = match self.inbox.try_recv() {
                Ok(message) => self.take(message),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => false,
            };
            if !goes_on {
                return false;
            }
        }
    }

    fn take(&mut self, message: Message) -> bool {
        match message {
            Message::Job(job) => self.waiting.push_back(job),
            Message::Stop => return false,
            Message::Changed => {}
        }
        true
    }

    /// Forget texts whose clients have gone.
    fn drop_abandoned(&mut self) {
        self.waiting.retain(|job| !job.events.is_closed());
        for slot in &mut self.slots {
            slot.running.take_if(|r| r.job.events.is_closed());
        }
    }

    /// Give waiting texts free slots, first come, first served.
    fn admit(&mut self) {
        while let Some(job) = self.waiting.pop_front() {
            let set = job.under.set.get_or_init(|| match job.under.unpatched {
                true => Arc::new(ActiveSet::none()),
                false => self.runtime.active(),
            });
            let (set, key) = (set.clone(), set.digest());
            let model = self.runtime.model();
            let kept = |slot: &Slot| match slot.key == key && !job.score_prompt {
                true => common_prefix(model, &slot.cached, &job.prompt),
                false => 0,
            };
            let free = (0..self.slots.len()).filter(|&i| self.slots[i].running.is_none());
            // Of those that serve equally well, the one unused for longest.
            let best = free
                .map(|i| (kept(&self.slots[i]), u64::MAX - self.slots[i].used, i))
                .max();
            let Some((mut n_kept, _, at)) = best else {
                self.waiting.push_front(job);
                return;
            };
            if !self.runtime.options().keep_cache {
                n_kept = 0;
            }
            self.context.forget(at as i32, n_kept as i32);
            self.metrics.prompt_tokens.inc_by(job.prompt.len() as u64);
            self.metrics.kept_tokens.inc_by(n_kept as u64);
            let slot = &mut self.slots[at];
            slot.cached.truncate(n_kept);
            slot.key = key;
            let begun = Event::Started {
                set: set.clone(),
                n_kept,
            };
            // A client that has gone is noticed at the next turn.
            let _ = job.events.send((job.index, begun));
            slot.running = Some(Running::new(job, set, model));
        }
    }

    /// The sets that texts are being written under.
    fn sets(&self) -> Vec<Arc<ActiveSet>> {
        let mut sets: Vec<Arc<ActiveSet>> = Vec::new();
        for running in self.slots.iter().filter_map(|s| s.running.as_ref()) {
            if sets.iter().all(|s| s.digest() != running.set.digest()) {
                sets.push(running.set.clone());
            }
        }
        sets
    }

    /// A token for every text of `set` that is being written, and a piece of the prompt that came
    /// first.
    ///
    /// A prompt is not computed together with anything else: llama.cpp would cut it into pieces of
    /// other lengths, whose sums are rounded otherwise.
    fn advance(&mut self, set: &ActiveSet) {
        let (mut writing, mut reading) = (Vec::new(), None);
        for (at, slot) in self.slots.iter().enumerate() {
            match &slot.running {
                Some(r) if r.set.digest() != set.digest() => {}
                Some(r) if r.next.is_some() => writing.push(at),
                Some(r) => reading = reading.into_iter().chain([(r.job.accepted, at)]).min(),
                None => {}
            }
        }
        self.compute(set, &writing);
        self.compute(set, reading.map(|(_, at)| at).as_slice());
    }

    /// One batch for the texts of `members`, which are under `set`.
    fn compute(&mut self, set: &ActiveSet, members: &[usize]) {
        if members.is_empty() {
            return;
        }
        let (mut batch, rows) = self.batch(members);
        let done = self.apply(set).and_then(|()| {
            self.metrics.batches.inc();
            Ok(self.context.decode(&mut batch)?)
        });
        if let Err(e) = done {
            for &at in members {
                let slot = &mut self.slots[at];
                slot.cached.clear();
                self.context.forget(at as i32, 0);
                if let Some(running) = slot.running.take() {
                    running.tell(Event::Failed(e.to_string()));
                }
            }
            return;
        }
        let n_ctx = self.runtime.options().n_ctx as usize;
        for (at, row, from) in rows {
            let logits = self.context.logits(row).expect("asked for");
            let slot = &mut self.slots[at];
            let Some(running) = &mut slot.running else {
                continue;
            };
            let is_last = from == slot.cached.len();
            if !running.read(logits, from, is_last, n_ctx, &self.metrics) {
                slot.running = None;
            }
        }
    }

    /// Have the context compute under `set`.
    fn apply(&mut self, set: &ActiveSet) -> Result<(), Error> {
        if self.applied != set.digest() {
            self.context.switch_adapters(set.adapters())?;
            self.applied = set.digest();
            self.metrics.switches.inc();
        }
        Ok(())
    }

    /// What comes next of the texts of `members`; whose logits its rows are, each as slot, row and
    /// how many tokens of the slot they follow.
    fn batch(&mut self, members: &[usize]) -> (Batch, Vec<(usize, usize, usize)>) {
        let n_batch = self.context.n_batch();
        let n_rows = (LOGIT_BYTES / (4 * self.runtime.model().n_vocab())).clamp(1, n_batch);
        let (mut batch, mut rows) = (Batch::default(), Vec::new());
        for &at in members {
            let slot = &mut self.slots[at];
            slot.used = self.turn;
            let Some(running) = &slot.running else {
                continue;
            };
            let prompt = &running.job.prompt;
            let ahead = match &running.next {
                Some(next) => std::slice::from_ref(next),
                None => &prompt[slot.cached.len()..],
            };
            let scores = running.job.score_prompt && running.next.is_none();
            let most = if scores { n_rows } else { n_batch };
            for &token in ahead.iter().take(most) {
                let pos = slot.cached.len();
                let want = scores || pos + 1 >= prompt.len();
                if want {
                    rows.push((at, batch.len(), pos + 1));
                }
                batch.push(token, pos as i32, at as i32, want);
                slot.cached.push(token);
            }
        }
        (batch, rows)
    }

    fn report(&self) {
        let active = self.slots.iter().filter(|s| s.running.is_some()).count();
        self.metrics.active.set(active as i64);
        self.metrics.waiting.set(self.waiting.len() as i64);
    }
}
