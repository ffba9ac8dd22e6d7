//! Whether a model can be trained here: its graph traced, rebuilt, compared with llama.cpp's own
//! decode, and one training step measured.

use crate::data::{GENERAL_TEXT, Sample};
use crate::error::Error;
use crate::ggml::{Batch, Context, ContextOptions, Token};
use crate::graph::batch::{Packed, Sequence};
use crate::graph::reverse::first_without_rule;
use crate::graph::tape::{End, Part, Parts, Tape};
use crate::graph::template::{self, Template};
use crate::graph::trained::Trained;
use crate::graph::weights::Multiplying;
use crate::model::OpenModel;
use crate::train::adapters::Pairs;
use crate::train::config::{Constraint, TrainConfig};
use crate::train::engine::Engine;
use crate::train::memory::{Budget, Plan, Shape};
use crate::train::trainer::{StepBatch, Trainer};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;

/// Tokens compared; a multiple of 8, or the attention sums of both sides differ in length.
const N_PARITY: usize = 64;
/// Tokens of the timed step.
const N_STEP: usize = 256;
/// Rank of the timed step.
const RANK: usize = 32;

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Checked {
    /// Architecture.
    pub arch: String,
    /// Weights that take adapters.
    pub adaptable: usize,
    /// Their names.
    pub tensors: Vec<String>,
    /// What they are called within their blocks, each once.
    pub kinds: Vec<String>,
    /// The frozen experts of a mixture.
    pub experts: Option<Experts>,
    /// The first op without a gradient rule; training is then impossible.
    pub missing_rule: Option<String>,
    /// Largest absolute difference of the rebuilt graph's logits from llama_decode's.
    pub max_abs_diff: f64,
    /// The same over the largest absolute logit.
    pub max_rel_diff: f64,
    /// Share of tokens with the same likeliest next token, 0 to 1.
    pub argmax_agree: f64,
    /// Tokens compared.
    pub n_tokens: usize,
    /// Milliseconds of the trace.
    pub trace_ms: f64,
    /// One step of 256 tokens at rank 32, if the model can be trained.
    pub step: Option<Step>,
}

/// Experts, which stay as they are, with the matrices that choose among them. Gradients pass through
/// those that are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Experts {
    /// Experts of a layer, at most.
    pub count: usize,
    /// Those that a token is sent through, at most.
    pub used: usize,
    /// Stacks of their matrices, over all layers.
    pub stacks: usize,
    /// Bytes of those stacks in the file.
    pub bytes: usize,
    /// Stacks that are decoded anew in every backward pass, as there is no memory for transposed
    /// copies of them all.
    pub decoded: usize,
}

/// A measured training step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// Tokens.
    pub tokens: usize,
    /// Seconds, forward and backward.
    pub seconds: f64,
    /// Seconds of a forward pass alone.
    pub forward_seconds: f64,
    /// Bytes of graph, transposed weights, parameters and moments.
    pub memory_bytes: usize,
    /// The GPU it was computed on, if it was.
    pub gpu: Option<OnGpu>,
}

/// A step on a GPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OnGpu {
    /// ggml's name of it.
    pub name: String,
    /// Operations of a step.
    pub nodes: usize,
    /// Of those it leaves to the CPU, by ggml's name.
    pub on_cpu: BTreeMap<String, usize>,
}

/// Check `open`.
///
/// # Errors
/// A model that cannot be traced or computed.
pub fn check(open: &OpenModel, n_threads: usize, memory: Option<Budget>) -> Result<Checked, Error> {
    let began = Instant::now();
    let template = open.trace()?;
    let trace_ms = began.elapsed().as_secs_f64() * 1e3;
    let mut tokens = open.model.tokenize(GENERAL_TEXT, true, false);
    tokens.truncate(N_STEP + 1);
    let compared = &tokens[..N_PARITY.min(tokens.len() / 8 * 8)];
    let ours = rebuilt_logits(open, &template, compared, n_threads)?;
    let theirs = llama_logits(open, compared, n_threads)?;
    let (max_abs_diff, largest, agree) = compare(&ours, &theirs, open.model.n_vocab());
    let missing_rule = first_without_rule(&template);
    let step = match missing_rule {
        Some(_) => None,
        None => Some(measure_step(open, tokens.clone(), n_threads, memory)?),
    };
    let (step, plan) = step.unzip();
    Ok(Checked {
        arch: open.weights.arch()?.to_owned(),
        adaptable: template.adaptable.len(),
        tensors: template.adaptable.iter().map(|t| t.name.clone()).collect(),
        kinds: template.adaptable_kinds(),
        experts: experts(open, &template, plan.flatten().as_ref())?,
        missing_rule,
        max_abs_diff,
        max_rel_diff: max_abs_diff / largest.max(f64::MIN_POSITIVE),
        argmax_agree: agree as f64 / compared.len() as f64,
        n_tokens: compared.len(),
        trace_ms,
        step,
    })
}

/// The experts of the graph, if it has any.
fn experts(
    open: &OpenModel,
    template: &Template,
    plan: Option<&Plan>,
) -> Result<Option<Experts>, Error> {
    let stacks = template.experts();
    let (mut bytes, mut decoded) = (0, 0);
    for stack in &stacks {
        bytes += open.weights.bytes(&stack.name)?.len();
        decoded += usize::from(plan.is_some_and(|p| !p.copies.has(&stack.name)));
    }
    let most = |of: fn(&template::Experts) -> usize| stacks.iter().map(of).max();
    Ok(most(|s| s.count)
        .zip(most(|s| s.used))
        .map(|(count, used)| Experts {
            count,
            used,
            stacks: stacks.len(),
            bytes,
            decoded,
        }))
}

fn rebuilt_logits(
    open: &OpenModel,
    template: &Template,
    tokens: &[Token],
    n_threads: usize,
) -> Result<Vec<f32>, Error> {
    let mut cpu = open.backend(n_threads)?;
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let batch = Packed::new(&[Sequence {
        tokens,
        rows: &rows,
    }]);
    let parts = Parts {
        template,
        weights: &open.weights,
        window: usize::try_from(open.model.n_swa()).ok().filter(|&w| w > 0),
        recompute: None,
        part: Part::Whole,
    };
    let shape = (batch.n_tokens(), batch.n_padded_rows());
    let mut multiplying = Multiplying::default();
    let mut tape = Tape::new(
        &parts,
        Trained::Nothing,
        End::Logits,
        shape,
        false,
        &cpu,
        &mut multiplying,
    )?;
    let mut out = Vec::new();
    tape.forward(&mut cpu, &batch, &mut out)?;
    out.truncate(tokens.len() * open.model.n_vocab());
    Ok(out)
}

fn llama_logits(open: &OpenModel, tokens: &[Token], n_threads: usize) -> Result<Vec<f32>, Error> {
    let mut context = Context::new(
        &open.model,
        ContextOptions {
            n_ctx: 512,
            n_batch: 512,
            n_threads,
            kv_f32: true,
            ..ContextOptions::default()
        },
    )?;
    let mut batch = Batch::default();
    for (pos, &token) in tokens.iter().enumerate() {
        batch.push(token, pos as i32, 0, true);
    }
    context.decode(&mut batch)?;
    let rows = (0..tokens.len()).map(|i| context.logits(i).expect("asked for"));
    Ok(rows.flatten().copied().collect())
}

/// (largest difference, largest absolute logit, rows with the same argmax).
fn compare(ours: &[f32], theirs: &[f32], n_vocab: usize) -> (f64, f64, usize) {
    let argmax = |row: &[f32]| {
        row.iter()
            .enumerate()
            .max_by(|a, b| a.1.total_cmp(b.1))
            .map(|(i, _)| i)
    };
    let (mut diff, mut largest, mut agree) = (0f64, 0f64, 0);
    for (a, b) in ours.chunks_exact(n_vocab).zip(theirs.chunks_exact(n_vocab)) {
        for (x, y) in a.iter().zip(b) {
            // A NaN on one side alone must not pass for agreement.
            let d = if x == y {
                0.0
            } else {
                f64::from((x - y).abs())
            };
            diff = if d.is_nan() {
                f64::INFINITY
            } else {
                diff.max(d)
            };
            largest = largest.max(f64::from(y.abs()));
        }
        agree += usize::from(argmax(a) == argmax(b));
    }
    (diff, largest, agree)
}

fn on_gpu(engine: &Engine<'_>) -> Option<OnGpu> {
    let split = engine.split()?;
    Some(OnGpu {
        name: engine.cpu.gpu()?.to_owned(),
        nodes: split.nodes,
        on_cpu: split.on_cpu,
    })
}

fn measure_step(
    open: &OpenModel,
    tokens: Vec<Token>,
    n_threads: usize,
    memory: Option<Budget>,
) -> Result<(Step, Option<Plan>), Error> {
    let n = tokens.len();
    let mut engine = Engine::new(open, n_threads, N_STEP)?;
    let shape = Shape {
        rank: RANK,
        frozen: false,
        basis: 0,
        snapshots: 0,
        beneath: 0,
    };
    let plan = engine.plan(memory, &shape, &[n])?;
    let pairs = Pairs::lora(&engine.template.adaptable, RANK, 1.0, 0, Vec::new());
    let mut trainer = Trainer::new(engine, pairs)?;
    let sample = Sample {
        tokens,
        // Half of it answer, as question and answer data has it.
        answers: std::iter::once(n / 2..n).collect(),
        truncated: false,
    };
    let config = TrainConfig {
        constraint: Constraint::None,
        ..TrainConfig::default()
    };
    let batch = StepBatch {
        retain: vec![&sample],
        ..StepBatch::default()
    };
    // The first step makes the transposed copies.
    trainer.step(&config, &batch, 0.0)?;
    let began = Instant::now();
    trainer.step(&config, &batch, 0.0)?;
    let seconds = began.elapsed().as_secs_f64();
    let gpu = on_gpu(&trainer.engine);
    let began = Instant::now();
    trainer.losses(&[&sample])?;
    let forward_seconds = began.elapsed().as_secs_f64();
    let step = Step {
        tokens: n,
        seconds,
        forward_seconds,
        gpu,
        memory_bytes: trainer.engine.bytes() + trainer.bytes(),
    };
    Ok((step, plan))
}
