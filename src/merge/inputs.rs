//! One forward pass of llama.cpp that keeps what enters the adapted weights.
//!
//! The eval callback shows every `MUL_MAT` of the real graph, on any backend, with the adapters
//! applied; its second source is the layer's input. Weights that multiply the same tensor (q, k
//! and v; gate and up) share one record, found by the identity of that tensor in the graph and
//! not by name. Inputs go to disk as they appear (see `spill`), so the pass needs no more memory
//! than inference does.

use super::moments::{Captured, MomentsConfig, MomentsError, Part, Set, Sources};
use super::spill::{Spill, row_bytes};
use crate::adapter::Loaded;
use crate::data::Sample;
use crate::error::Error;
use crate::ggml::{Batch, Context, ContextOptions, DecodeError, Hook, NodeView, Token, sys};
use crate::graph::batch::pack;
use crate::model::OpenModel;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Cells of the KV cache, where no sample is longer.
const N_CTX: usize = 512;
/// Sequences that live side by side.
const N_SEQ: usize = 64;
/// Bytes of logits that a decode may make llama.cpp reserve. Every token is an output (the last
/// layer would drop it otherwise), though the head is never computed.
const LOGIT_BYTES: usize = 128 << 20;
/// One sample in this many is held out.
const HELD_OUT: usize = 10;

/// One distinct input.
#[derive(Debug)]
pub(super) struct Input {
    /// The weights that read it, in order of use.
    pub tensors: Vec<String>,
    pub n_in: usize,
    /// Where each batch's rows start in the spill.
    pub starts: Vec<u64>,
    /// Σ‖x‖² per set and part.
    pub energy: [[f64; 2]; 3],
}

/// Rows that one decode left in the spill: the fitting part's first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub set: Set,
    pub n: [usize; 2],
}

struct Watch {
    /// Input width of every weight asked for.
    wanted: HashMap<String, usize>,
    /// First reader of each input: the node at which the input is copied.
    readers: HashMap<String, usize>,
    by_source: HashMap<usize, usize>,
    inputs: Vec<Input>,
    spill: Spill,
    /// Only looking at which weights share an input.
    discovering: bool,
    set: Set,
    n_tokens: usize,
    /// Tokens of the batch that are kept, per part.
    keep: [Vec<usize>; 2],
    values: Vec<f32>,
    left: usize,
    failed: Option<Error>,
}

impl Watch {
    fn discover(&mut self, name: &str, source: usize) {
        let Some(&n_in) = self.wanted.get(name) else {
            return;
        };
        let new = self.inputs.len();
        let input = *self.by_source.entry(source).or_insert(new);
        if input == new {
            self.readers.insert(name.to_owned(), new);
            self.inputs.push(Input {
                tensors: Vec::new(),
                n_in,
                starts: Vec::new(),
                energy: [[0.0; 2]; 3],
            });
        }
        let tensors = &mut self.inputs[input].tensors;
        if !tensors.iter().any(|t| t == name) {
            tensors.push(name.to_owned());
        }
    }

    fn take(&mut self, i: usize, node: &NodeView<'_>) -> Result<(), Error> {
        let input = &mut self.inputs[i];
        let n_in = input.n_in;
        let tensor = || input.tensors[0].clone();
        let wanted = || format!("[{n_in}, {}]", self.n_tokens);
        let ne = node
            .read_src(1, &mut self.values)
            .map_err(|found| MomentsError::Input {
                tensor: tensor(),
                wanted: wanted(),
                found,
            })?;
        if ne[0] != n_in as i64 || self.values.len() != n_in * self.n_tokens {
            return Err(MomentsError::Input {
                tensor: tensor(),
                wanted: wanted(),
                found: format!("{ne:?}"),
            }
            .into());
        }
        let values = &self.values;
        let row = |t: usize| &values[t * n_in..(t + 1) * n_in];
        for (part, keep) in self.keep.iter().enumerate() {
            let mut sum = 0f64;
            for &t in keep {
                sum += row(t).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
            }
            if !sum.is_finite() {
                return Err(MomentsError::NotFinite { tensor: tensor() }.into());
            }
            input.energy[self.set as usize][part] += sum;
        }
        let kept = self.keep.iter().flatten().map(|&t| row(t));
        input.starts.push(self.spill.append(n_in, kept)?);
        Ok(())
    }
}

struct Watcher(Arc<Mutex<Watch>>);

impl Hook for Watcher {
    fn want(&mut self, node: &NodeView<'_>) -> bool {
        if node.op() != sys::GGML_OP_MUL_MAT {
            return false;
        }
        let (Some(name), Some(source)) = (node.weight_name(0), node.src_id(1)) else {
            return false;
        };
        let watch = &mut *self.0.lock().expect("only this thread locks");
        if watch.discovering {
            watch.discover(&name, source);
            return false;
        }
        watch.readers.contains_key(&name)
    }

    fn seen(&mut self, node: &NodeView<'_>) -> bool {
        let watch = &mut *self.0.lock().expect("only this thread locks");
        let name = node.weight_name(0);
        let Some(&i) = name.and_then(|n| watch.readers.get(&n)) else {
            return true;
        };
        if watch.failed.is_none() {
            watch.failed = watch.take(i, node).err();
            watch.left = watch.left.saturating_sub(1);
        }
        true
    }

    /// Nothing of interest follows the last input: the output head need not run.
    fn abort(&mut self) -> bool {
        let watch = self.0.lock().expect("only this thread locks");
        // While discovering, one token is decoded to its end: where the graph is split between
        // devices, the callback is asked about a part only after those before it have run.
        !watch.discovering && (watch.left == 0 || watch.failed.is_some())
    }
}

/// Tokens of one sample that are read and kept: the first is read only (BOS or whatever stands
/// in its place is an attention sink, with inputs a hundred times the size of all others), the
/// last is never an input when the sample is written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    sample: usize,
    fit: Range<usize>,
    held_out: Range<usize>,
}

impl Plan {
    fn n_read(&self) -> usize {
        self.fit.end.max(self.held_out.end)
    }
}

fn n_rows(sample: &Sample) -> usize {
    sample.tokens.len().saturating_sub(2)
}

/// Evenly spread samples of at most `max_tokens` kept tokens in all. Every tenth is held out; of
/// fewer than ten samples, the last tenth of each.
fn plan(samples: &[Sample], max_tokens: usize) -> Vec<Plan> {
    let total: usize = samples.iter().map(n_rows).sum();
    let n = samples.len();
    let chosen = if total <= max_tokens {
        n
    } else {
        (n * max_tokens / total).max(1)
    };
    let mut left = max_tokens;
    let mut plans = Vec::new();
    for i in 0..chosen {
        let sample = i * n / chosen;
        let rows = n_rows(&samples[sample]).min(left);
        left -= rows;
        if rows == 0 {
            continue;
        }
        let end = 1 + rows;
        let fit_end = match chosen {
            HELD_OUT.. if i % HELD_OUT == HELD_OUT - 1 => 1,
            HELD_OUT.. => end,
            _ if rows == 1 => end,
            _ => end - rows.div_ceil(HELD_OUT),
        };
        plans.push(Plan {
            sample,
            fit: 1..fit_end,
            held_out: fit_end..end,
        });
    }
    plans
}

/// Shares of `total` for each of `demands`, the small ones served in full first.
fn share(demands: [usize; 3], mut total: usize) -> [usize; 3] {
    let mut order = [0, 1, 2];
    order.sort_by_key(|&i| demands[i]);
    let mut shares = [0; 3];
    for (served, i) in order.into_iter().enumerate() {
        shares[i] = demands[i].min(total / (3 - served));
        total -= shares[i];
    }
    shares
}

/// Capture the inputs of `tensors` over `sources` with `adapters` applied.
///
/// `progress` gets tokens done and all tokens.
///
/// # Errors
/// A tensor that llama.cpp's graph does not multiply with, inputs that are not finite, a spill
/// budget too small for one token a set, a failing disk, llama.cpp's failures.
pub fn capture(
    open: &OpenModel,
    adapters: &Loaded,
    tensors: &[String],
    sources: &Sources<'_>,
    config: &MomentsConfig,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Captured, Error> {
    let mut wanted = HashMap::new();
    for t in tensors {
        wanted.insert(t.clone(), open.weights.info(t)?.ne[0] as usize);
    }
    let watch = Arc::new(Mutex::new(Watch {
        wanted,
        readers: HashMap::new(),
        by_source: HashMap::new(),
        inputs: Vec::new(),
        spill: Spill::new(&config.spill_dir)?,
        discovering: true,
        set: Set::Forget,
        n_tokens: 0,
        keep: [Vec::new(), Vec::new()],
        values: Vec::new(),
        left: 0,
        failed: None,
    }));
    let all = Set::ALL.map(|set| sources.of(set));
    let longest = all.iter().copied().flatten().map(|s| s.tokens.len()).max();
    let n_ctx = N_CTX.max(longest.unwrap_or(1));
    let n_batch = (LOGIT_BYTES / (4 * open.model.n_vocab().max(1))).clamp(32, N_CTX);
    let mut context = Context::new(
        &open.model,
        ContextOptions {
            n_ctx: n_ctx as u32,
            n_batch: n_batch as u32,
            n_seq_max: N_SEQ as u32,
            n_threads,
            hook: Some(Box::new(Watcher(watch.clone()))),
            ..ContextOptions::default()
        },
    )?;
    context.set_adapters(adapters)?;
    let mut run = Run {
        context,
        watch,
        n_batch,
        batches: Vec::new(),
    };
    let first = all.iter().copied().flatten().find_map(|s| s.tokens.first());
    let Some(&first) = first else {
        return Err(MomentsError::NoTokens.into());
    };
    let per_token = run.discover(first, tensors)?;
    let demands = all.map(|samples| {
        let rows: usize = samples.iter().map(n_rows).sum();
        rows.min(config.max_tokens)
    });
    let room = usize::try_from(config.max_spill_bytes / per_token).unwrap_or(usize::MAX);
    let shares = share(demands, room);
    if demands.iter().zip(shares).any(|(&d, s)| d > 0 && s == 0) {
        return Err(MomentsError::Budget {
            per_token,
            found: config.max_spill_bytes,
        }
        .into());
    }
    let plans: [Vec<Plan>; 3] = std::array::from_fn(|i| plan(all[i], shares[i]));
    let total: usize = plans.iter().flatten().map(Plan::n_read).sum();
    if total == 0 {
        return Err(MomentsError::NoTokens.into());
    }
    let mut done = 0;
    for (set, (samples, plans)) in Set::ALL.into_iter().zip(all.iter().zip(&plans)) {
        let lengths: Vec<usize> = plans.iter().map(Plan::n_read).collect();
        for bin in pack(&lengths, n_ctx) {
            for group in bin.chunks(N_SEQ) {
                let group: Vec<&Plan> = group.iter().map(|&i| &plans[i]).collect();
                run.group(set, samples, &group, &mut |n| {
                    done += n;
                    progress(done, total);
                })?;
            }
        }
    }
    let Run {
        context,
        watch,
        batches,
        ..
    } = run;
    drop(context);
    crate::ggml::last_messages();
    let watch = Arc::into_inner(watch).expect("the context held the other");
    let Watch { inputs, spill, .. } = watch.into_inner().expect("no panic while locked");
    Ok(Captured::new(inputs, batches, spill))
}

struct Run {
    context: Context,
    watch: Arc<Mutex<Watch>>,
    n_batch: usize,
    batches: Vec<Rows>,
}

impl Run {
    /// Find out which weights share an input; returns bytes of one token's inputs on disk.
    fn discover(&mut self, token: Token, tensors: &[String]) -> Result<u64, Error> {
        let mut batch = Batch::default();
        batch.push(token, 0, 0, true);
        self.decode(&mut batch)?;
        self.context.clear();
        let watch = &mut *self.watch.lock().expect("the context is idle");
        watch.discovering = false;
        let found = |t: &&String| watch.inputs.iter().any(|i| i.tensors.contains(t));
        if let Some(missing) = tensors.iter().find(|t| !found(t)) {
            return Err(MomentsError::NoInput {
                tensor: missing.clone(),
            }
            .into());
        }
        Ok(watch
            .inputs
            .iter()
            .map(|i| row_bytes(i.n_in))
            .sum::<u64>()
            .max(1))
    }

    /// Decode samples side by side, `n_batch` tokens at a time: a sample may be cut anywhere,
    /// its beginning is in the cache.
    fn group(
        &mut self,
        set: Set,
        samples: &[Sample],
        group: &[&Plan],
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), Error> {
        let mut tokens: Vec<(Token, usize, usize, Option<Part>)> = Vec::new();
        for (seq, plan) in group.iter().enumerate() {
            let sample = &samples[plan.sample].tokens[..plan.n_read()];
            tokens.extend(sample.iter().enumerate().map(|(pos, &token)| {
                let part = if plan.fit.contains(&pos) {
                    Some(Part::Fit)
                } else {
                    plan.held_out.contains(&pos).then_some(Part::HeldOut)
                };
                (token, pos, seq, part)
            }));
        }
        self.context.clear();
        for piece in tokens.chunks(self.n_batch) {
            let mut batch = Batch::default();
            let mut keep = [Vec::new(), Vec::new()];
            for &(token, pos, seq, part) in piece {
                if let Some(part) = part {
                    keep[part as usize].push(batch.len());
                }
                batch.push(token, pos as i32, seq as i32, true);
            }
            self.batches.push(Rows {
                set,
                n: [keep[0].len(), keep[1].len()],
            });
            {
                let watch = &mut *self.watch.lock().expect("the context is idle");
                watch.set = set;
                watch.n_tokens = piece.len();
                watch.left = watch.inputs.len();
                watch.keep = keep;
            }
            self.decode(&mut batch)?;
            let watch = self.watch.lock().expect("the context is idle");
            if watch.left > 0 {
                let missing = watch
                    .inputs
                    .iter()
                    .find(|i| i.starts.len() < self.batches.len());
                let tensor = missing.map_or_else(String::new, |i| i.tensors[0].clone());
                return Err(MomentsError::NoInput { tensor }.into());
            }
            progress(piece.len());
        }
        Ok(())
    }

    fn decode(&mut self, batch: &mut Batch) -> Result<(), Error> {
        let decoded = self.context.decode(batch);
        if let Some(e) = self
            .watch
            .lock()
            .expect("the context is idle")
            .failed
            .take()
        {
            return Err(e);
        }
        match decoded {
            Ok(()) | Err(DecodeError::Aborted) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(lengths: &[usize]) -> Vec<Sample> {
        lengths
            .iter()
            .map(|&n| Sample {
                tokens: vec![0; n],
                answers: std::iter::once(1..n).collect(),
                truncated: false,
            })
            .collect()
    }

    fn counts(plans: &[Plan]) -> (usize, usize) {
        let sum = |f: fn(&Plan) -> usize| plans.iter().map(f).sum();
        (sum(|p| p.fit.len()), sum(|p| p.held_out.len()))
    }

    #[test]
    fn a_tenth_is_held_out_by_sample_or_by_token() {
        let many = plan(&samples(&[12; 40]), 1000);
        assert_eq!(counts(&many), (360, 40));
        assert!(
            many.iter()
                .all(|p| p.fit.is_empty() || p.held_out.is_empty())
        );
        let few = plan(&samples(&[102, 52]), 1000);
        assert_eq!(counts(&few), (135, 15));
        assert_eq!(
            (few[0].fit.clone(), few[0].held_out.clone()),
            (1..91, 91..101)
        );
        // BOS and the answer's end alone leave nothing to keep.
        assert!(plan(&samples(&[2, 1, 2]), 10).is_empty());
    }

    #[test]
    fn a_cap_spreads_over_the_whole_set() {
        let plans = plan(&samples(&[12; 1000]), 1000);
        let (fit, held) = counts(&plans);
        assert_eq!((plans.len(), fit + held), (100, 1000));
        assert_eq!((plans[1].sample, plans[99].sample), (10, 990));
        assert_eq!(counts(&plan(&samples(&[5000]), 700)), (630, 70));
    }

    #[test]
    fn small_sets_are_served_first() {
        assert_eq!(share([10, 500, 30], 1000), [10, 500, 30]);
        assert_eq!(share([10, 500, 400], 410), [10, 200, 200]);
        assert_eq!(share([0, 0, 9], 5), [0, 0, 5]);
    }
}
