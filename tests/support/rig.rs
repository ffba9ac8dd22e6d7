//! A model with random low-rank factors on all that takes them, and one batch of text: what the
//! tests of logits, adapters and gradients have in common.
#![allow(dead_code, reason = "each test file uses its part")]

use nepenthe::data::GENERAL_TEXT;
use nepenthe::ggml::{Adapter, Backend, Batch, Context, ContextOptions, Offload, sys};
use nepenthe::gguf::{GgmlType, GgufWriter, Metadata};
use nepenthe::graph::batch::{Packed, Sequence};
use nepenthe::graph::copies::{Copies, wanted};
use nepenthe::graph::tape::{End, Part, Parts, Tape};
use nepenthe::graph::template::{Step, Template};
use nepenthe::graph::trace::trace;
use nepenthe::graph::trained::{Factor, Factors, Trained};
use nepenthe::graph::weights::Multiplying;
use nepenthe::model::OpenModel;
use nepenthe::rng::SplitMix64;
use nepenthe::train::loss::{RowObjective, Target, grade};
use std::path::Path;
use std::sync::Arc;

/// Tokens compared; a multiple of 8, or the attention sums of both sides differ in length.
const N_TOKENS: usize = 64;
/// Tokens of the two sequences whose rows are graded.
const N_FIRST: usize = 21;
const N_SECOND: usize = 17;
const RANK: usize = 3;
const SCALE: f32 = 0.7;

/// A model, one batch, random factors on every adaptable tensor.
pub struct Rig {
    /// The model.
    pub open: OpenModel,
    /// Its graph.
    pub template: Template,
    cpu: Backend,
    factors: Factors,
    values: Vec<(Vec<f32>, Vec<f32>)>,
    batch: Packed,
    targets: Vec<Target<'static>>,
    /// The copies of weights there may be, if not all.
    pub copies: Option<Copies>,
    /// Weights on the way back as they are, instead of in BF16.
    pub exact: bool,
    /// As in [`Parts`].
    pub recompute: Option<usize>,
}

impl Rig {
    /// Two sequences, eight rows of each graded by `objective`.
    pub fn new(path: &Path, objective: RowObjective) -> Self {
        let open = OpenModel::open(path, 0).expect("a good model");
        let template = trace(&open.model, &open.weights).expect("traceable");
        let cpu = Backend::new(1).expect("a CPU");
        let tokens = open.model.tokenize(GENERAL_TEXT, true, false);
        let (first, second) = (&tokens[..N_FIRST], &tokens[40..40 + N_SECOND]);
        let rows: Vec<usize> = (8..16).collect();
        let batch = Packed::new(&[first, second].map(|tokens| Sequence {
            tokens,
            rows: &rows,
        }));
        let targets = [first, second]
            .iter()
            .flat_map(|t| rows.iter().map(|&r| t[r + 1]))
            .map(|token| Target {
                token,
                objective,
                teacher: None,
                weight: 1.0 / 16.0,
            })
            .collect();
        let list: Vec<Factor> = (0..template.adaptable.len())
            .map(|tensor| Factor {
                tensor,
                rank: RANK,
                scale: SCALE,
                trainable: true,
            })
            .collect();
        let mut rng = SplitMix64(3);
        let mut random =
            |n: usize, by: f32| -> Vec<f32> { (0..n).map(|_| by * rng.normal()).collect() };
        let values = template
            .adaptable
            .iter()
            .map(|t| (random(RANK * t.n_in, 0.08), random(RANK * t.n_out, 0.08)))
            .collect();
        let factors = Factors::new(&cpu, &template, list).expect("room");
        Self {
            open,
            template,
            cpu,
            factors,
            values,
            batch,
            targets,
            copies: None,
            exact: true,
            recompute: None,
        }
    }

    fn tape(&mut self) -> Tape {
        let shape = (self.batch.n_tokens(), self.batch.n_padded_rows());
        self.try_tape(true, shape, true).expect("differentiable")
    }

    /// Why the graph cannot be differentiated, if it cannot.
    pub fn no_gradient(&mut self) -> Option<String> {
        let shape = (self.batch.n_tokens(), self.batch.n_padded_rows());
        let tape = self.try_tape(true, shape, true);
        tape.err().map(|e| e.to_string())
    }

    fn try_tape(
        &mut self,
        adapted: bool,
        shape: (usize, usize),
        gradient: bool,
    ) -> Result<Tape, nepenthe::graph::GraphError> {
        let parts = Parts {
            template: &self.template,
            weights: &self.open.weights,
            window: usize::try_from(self.open.model.n_swa())
                .ok()
                .filter(|&w| w > 0),
            recompute: self.recompute,
            part: Part::Whole,
        };
        // Exact transposed weights: bf16 ones have an error of their own, 2.4e-3.
        let mut transposed = match self.exact {
            true => Multiplying::exact(),
            false => Multiplying::default(),
        };
        if let Some(copies) = &self.copies {
            transposed = transposed.only(copies.clone());
        }
        let trained = match adapted {
            true => Trained::Factors(&self.factors),
            false => Trained::Nothing,
        };
        let (cpu, end) = (&self.cpu, End::Logits);
        Tape::new(&parts, trained, end, shape, gradient, cpu, &mut transposed)
    }

    /// Logits of the first [`N_TOKENS`] tokens of a text, by our graph and by llama_decode, both
    /// without adapters or both with the same ones.
    pub fn logits(&mut self, adapted: bool) -> (Vec<f32>, Vec<f32>) {
        let mut tokens = self.open.model.tokenize(GENERAL_TEXT, true, false);
        tokens.truncate(N_TOKENS);
        let rows: Vec<usize> = (0..tokens.len()).collect();
        let batch = Packed::new(&[Sequence {
            tokens: &tokens,
            rows: &rows,
        }]);
        let shape = (batch.n_tokens(), batch.n_padded_rows());
        let mut tape = self.try_tape(adapted, shape, false).expect("rebuilt");
        for (i, (a, b)) in self.values.iter().enumerate() {
            self.factors.write(i, a, b).expect("their shapes");
        }
        let mut ours = Vec::new();
        tape.forward(&mut self.cpu, &batch, &mut ours)
            .expect("computable");
        ours.truncate(tokens.len() * self.open.model.n_vocab());

        let options = ContextOptions {
            kv_f32: true,
            ..ContextOptions::default()
        };
        let mut context = Context::new(&self.open.model, options).expect("a context");
        if adapted {
            let adapter = self.adapter();
            context.set_adapters(&[(adapter, SCALE)]).expect("set");
        }
        let mut batch = Batch::default();
        for (pos, &token) in tokens.iter().enumerate() {
            batch.push(token, pos as i32, 0, true);
        }
        context.decode(&mut batch).expect("decodable");
        let row = |i| context.logits(i).expect("asked for");
        let theirs = (0..tokens.len()).flat_map(|i| row(i).to_vec()).collect();
        (ours, theirs)
    }

    /// The factors as llama.cpp's adapter, in f32: it takes the user's scale alone.
    fn adapter(&self) -> Arc<Adapter> {
        let mut meta = Metadata::new();
        meta.set("general.type", "adapter");
        meta.set(
            "general.architecture",
            self.open.weights.arch().expect("given"),
        );
        meta.set("adapter.type", "lora");
        meta.set("adapter.lora.alpha", 0f32);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("adapter.gguf");
        let mut file = GgufWriter::new(&path, meta);
        for (t, (a, b)) in self.template.adaptable.iter().zip(&self.values) {
            let (n_in, n_out, rank) = (t.n_in as u64, t.n_out as u64, RANK as u64);
            let parts = [("lora_a", [n_in, rank], a), ("lora_b", [rank, n_out], b)];
            for (part, ne, values) in parts {
                let (name, bytes) = (format!("{}.{part}", t.name), bytemuck::cast_slice(values));
                file.tensor_from_bytes(&name, &ne, GgmlType::F32, bytes)
                    .expect("a good tensor");
            }
        }
        file.save(true).expect("room on the disk");
        Arc::new(Adapter::load(&self.open.model, &path).expect("an adapter"))
    }

    /// Compute this part on the GPU from now on.
    pub fn compute_on_gpu(&mut self, offload: Offload) {
        self.cpu = Backend::new(1)
            .and_then(|cpu| cpu.on_gpu(offload))
            .expect("a GPU");
        let list = self.factors.list.clone();
        self.factors = Factors::new(&self.cpu, &self.template, list).expect("room");
    }

    /// The gradients of all factors, and the experts that were chosen on the way.
    pub fn gradients_and_experts(&mut self) -> (Vec<Vec<f32>>, Vec<Vec<Vec<i32>>>) {
        let mut tape = self.tape();
        let gradients = self.gradients_by(&mut tape);
        (gradients, tape.chosen_experts().expect("computed"))
    }

    /// The gradients of all factors.
    pub fn gradients(&mut self) -> Vec<Vec<f32>> {
        let mut tape = self.tape();
        self.gradients_by(&mut tape)
    }

    fn gradients_by(&mut self, tape: &mut Tape) -> Vec<Vec<f32>> {
        let (values, mut logits) = (self.values.clone(), Vec::new());
        self.loss(tape, &values, &mut logits);
        tape.backward(&mut self.cpu, &logits).expect("computable");
        let read = |i| {
            let mut g = vec![0f32; tape.grad_len(i)];
            tape.read_grad(i, &mut g).expect("its length");
            g
        };
        (0..tape.n_grads()).map(read).collect()
    }

    /// The loss, and the logits' gradients left in `logits`.
    fn loss(
        &mut self,
        tape: &mut Tape,
        values: &[(Vec<f32>, Vec<f32>)],
        logits: &mut Vec<f32>,
    ) -> f64 {
        for (i, (a, b)) in values.iter().enumerate() {
            self.factors.write(i, a, b).expect("their shapes");
        }
        tape.forward(&mut self.cpu, &self.batch, logits)
            .expect("computable");
        let n_vocab = self.open.model.n_vocab();
        let mut total = 0.0;
        for (row, target) in logits.chunks_exact_mut(n_vocab).zip(&self.targets) {
            total += grade(row, *target, true).loss * f64::from(target.weight);
        }
        logits[self.targets.len() * n_vocab..].fill(0.0);
        total
    }
}

/// Computed twice instead of kept, gradients are the same to the bit; with attention a few queries
/// at a time, but for rounding.
pub fn gradients_do_not_depend_on_what_is_kept(rig: &mut Rig) {
    let mut of = |recompute: Option<usize>| {
        rig.recompute = recompute;
        let found = rig.gradients();
        rig.recompute = None;
        found
    };
    let kept = of(None);
    assert!(of(Some(usize::MAX)) == kept, "layers computed again");
    let tiled = of(Some(12));
    let norm = |g: &mut dyn Iterator<Item = f32>| g.map(|v| f64::from(v).powi(2)).sum::<f64>();
    for (i, (a, b)) in tiled.iter().zip(&kept).enumerate() {
        let off = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
        let all = norm(&mut b.iter().copied());
        assert!(off <= 1e-8 * all, "gradient {i}: {off} of {all}");
    }
}

/// Whichever weights have copies, gradients are the same to the bit; in BF16 they are within its error
/// of the exact ones.
pub fn gradients_do_not_depend_on_copies(rig: &mut Rig) {
    let wanted = wanted(&rig.template, &rig.open.weights).expect("its own weights");
    let all: u64 = wanted.iter().map(|w| w.bytes).sum();
    let exact = rig.gradients();
    rig.exact = false;
    let copied = rig.gradients();
    for room in [0, all / 2] {
        let copies = Copies::within(&wanted, room);
        assert!(copies.len() < wanted.len().max(1));
        rig.copies = Some(copies);
        assert!(rig.gradients() == copied, "copies of {room} bytes");
    }
    for (i, (a, b)) in copied.iter().zip(&exact).enumerate() {
        let norm = |g: &mut dyn Iterator<Item = f32>| g.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let off = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
        let all = norm(&mut b.iter().copied());
        assert!(off <= 1e-4 * all, "gradient {i}: {off} of {all}");
    }
    (rig.copies, rig.exact) = (None, true);
}

/// The derivative along a random direction of the factors of each tensor kind alone, so that an
/// error in one rule cannot hide behind the others.
pub fn gradients_match_finite_differences(rig: &mut Rig) {
    let mut tape = rig.tape();
    let mut logits = Vec::new();
    let values = rig.values.clone();
    let grads = rig.gradients_by(&mut tape);
    let kind = |name: &str| name.split('.').nth(2).unwrap_or(name).to_owned();
    let mut kinds: Vec<String> = rig
        .template
        .adaptable
        .iter()
        .map(|t| kind(&t.name))
        .collect();
    kinds.dedup();
    kinds.sort();
    kinds.dedup();
    assert!(kinds.len() >= 2, "{kinds:?}");
    // Padding has experts of its own, on which no loss depends. The last layer has rows alone.
    let (n_real, n_all) = (N_FIRST + N_SECOND, rig.batch.n_tokens());
    let chosen = |tape: &Tape| {
        let mut layers = tape.chosen_experts().expect("computed");
        for layer in layers.iter_mut().filter(|l| l.len() == n_all) {
            layer.truncate(n_real);
        }
        layers
    };
    let before = chosen(&tape);
    // ggml looks GELU up in a table of f16: a staircase, which needs long steps, and several of
    // them to average its noise (about 5e-5 over the step). Clamped values have kinks.
    let looked_up = [
        (sys::GGML_OP_UNARY, sys::GGML_UNARY_OP_GELU),
        (sys::GGML_OP_UNARY, sys::GGML_UNARY_OP_GELU_QUICK),
        (sys::GGML_OP_GLU, sys::GGML_GLU_OP_GEGLU),
    ];
    let ops = rig.template.ops();
    let has = |list: &[(u32, u32)]| ops.iter().any(|op| list.contains(op));
    let kinked = [
        (sys::GGML_OP_GLU, sys::GGML_GLU_OP_REGLU),
        (sys::GGML_OP_GLU, sys::GGML_GLU_OP_SWIGLU_OAI),
        (sys::GGML_OP_GLU, sys::GGML_GLU_OP_SWIGLU_CLAMP),
    ];
    let clamp = [(sys::GGML_OP_CLAMP, 0)];
    let several = |from: u32, by: f32| (from..from + 8).map(|i| by * i as f32).collect();
    // With experts steps are shorter, so that those chosen stay. Their weights' sum is clamped
    // away from zero, which is no kink on the way.
    let (steps, tolerance, least) = match before.is_empty() {
        _ if has(&looked_up) => (several(6, 2e-3), 5e-2, 1e-1),
        true if has(&clamp) => (vec![2e-3], 3e-2, 1e-2),
        true => (vec![2e-3], 1e-2, 1e-2),
        false if has(&kinked) || limited(&rig.template) => (several(2, 1e-4), 3e-2, 1e-2),
        false => (vec![5e-4], 1e-2, 1e-2),
    };
    for wanted in kinds {
        // Which experts are chosen changes in jumps, which no derivative knows: a direction along
        // which it does is passed over.
        let tried = (17..17 + DIRECTIONS).find_map(|seed| {
            let direction = direction(rig, &values, seed, |name| kind(name) == wanted);
            let mut stays = true;
            let mut at = |h: f32| {
                let moved = moved(&values, &direction, h);
                let loss = rig.loss(&mut tape, &moved, &mut logits);
                stays &= chosen(&tape) == before;
                loss
            };
            // Richardson: the error of the symmetric difference is of order h^2.
            let slope =
                |at: &mut dyn FnMut(f32) -> f64, h: f32| (at(h) - at(-h)) / (2.0 * f64::from(h));
            let mut numeric = 0.0;
            for &h in &steps {
                let finer = (4.0 * slope(&mut at, h) - slope(&mut at, 2.0 * h)) / 3.0;
                numeric += finer / steps.len() as f64;
            }
            stays.then_some((direction, numeric))
        });
        let (direction, numeric) = tried.expect("a direction along which no expert changes");
        let products: Vec<f64> = direction
            .iter()
            .enumerate()
            .flat_map(|(i, (a, b))| {
                a.iter()
                    .zip(&grads[2 * i])
                    .chain(b.iter().zip(&grads[2 * i + 1]))
            })
            .map(|(d, g)| f64::from(*d) * f64::from(*g))
            .collect();
        let analytic: f64 = products.iter().sum();
        // Products of random signs may cancel: the error is held against their root sum of
        // squares if that is the larger.
        let size = products.iter().map(|p| p * p).sum::<f64>().sqrt();
        let relative = (analytic - numeric).abs() / analytic.abs().max(size).max(least);
        assert!(
            relative < tolerance,
            "{wanted}: {analytic} against {numeric} ({relative:.1e})"
        );
    }
}

/// Whether values are clamped from above.
fn limited(template: &Template) -> bool {
    template.entries.iter().any(|e| {
        let Step::Op { op, params, .. } = &e.step else {
            return false;
        };
        *op == sys::GGML_OP_CLAMP && f32::from_bits(params[1] as u32).is_finite()
    })
}

/// Directions tried for one along which no expert changes.
const DIRECTIONS: u64 = 64;

type Pairs = Vec<(Vec<f32>, Vec<f32>)>;

/// Standard normal numbers for the factors of the tensors that are `on`, zero for the others.
fn direction(rig: &Rig, values: &Pairs, seed: u64, on: impl Fn(&str) -> bool) -> Pairs {
    let mut rng = SplitMix64(seed);
    let tensors = values.iter().zip(&rig.template.adaptable);
    tensors
        .map(|((a, b), t)| {
            let on = if on(&t.name) { 1.0 } else { 0.0 };
            let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| on * rng.normal()).collect() };
            (random(a.len()), random(b.len()))
        })
        .collect()
}

fn moved(values: &Pairs, direction: &Pairs, h: f32) -> Pairs {
    let add = |x: &[f32], d: &[f32]| x.iter().zip(d).map(|(x, d)| x + h * d).collect();
    let pairs = values.iter().zip(direction);
    pairs
        .map(|((a, b), (da, db))| (add(a, da), add(b, db)))
        .collect()
}

/// |a - b| / |b| over all tensors.
pub fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    let off: f64 = pairs.map(|(a, b)| square(a - b)).sum();
    let all: f64 = b.iter().flatten().map(|&b| square(b)).sum();
    (off / all).sqrt()
}
