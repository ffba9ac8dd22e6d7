//! The rebuilt graph against llama.cpp's own decode, and its gradients against finite
//! differences.

mod support;

use nepenthe::check::check;
use nepenthe::data::GENERAL_TEXT;
use nepenthe::ggml::Cpu;
use nepenthe::graph::batch::{Packed, Sequence};
use nepenthe::graph::tape::{End, Factor, Factors, Parts, Tape, Trained};
use nepenthe::graph::trace::trace;
use nepenthe::graph::weights::Transposed;
use nepenthe::model::OpenModel;
use nepenthe::rng::SplitMix64;
use nepenthe::train::loss::{RowObjective, Target, grade};
use std::path::Path;

fn logits_are_llamas(path: &Path, arch: &str, adaptable: usize) {
    let open = OpenModel::open(path, 0).expect("a good model");
    let c = check(&open, 1).expect("a traceable model");
    assert_eq!((c.arch.as_str(), c.adaptable), (arch, adaptable));
    assert_eq!(c.missing_rule, None);
    assert_eq!(c.n_tokens, 64);
    assert_eq!(c.argmax_agree, 1.0);
    // Bit-identical, which is stronger than the 1e-4 asked for.
    assert_eq!(c.max_abs_diff, 0.0, "{path:?}");
    let step = c.step.expect("trainable");
    assert!(step.memory_bytes > 0 && step.seconds > 0.0);
}

#[test]
fn the_embedded_models_logits_are_llamas() {
    logits_are_llamas(&support::mini(), "llama", 35);
}

#[test]
fn stories_logits_are_llamas() {
    if let Some(path) = support::stories() {
        logits_are_llamas(&path, "llama", 35);
    }
}

#[test]
fn smollm2_logits_are_llamas() {
    if let Some(path) = support::cached("SmolLM2-135M-Instruct.Q4_1.gguf") {
        logits_are_llamas(&path, "llama", 210);
    }
}

#[test]
fn gemma_logits_are_llamas() {
    if let Some(path) = support::cached("gemma-3-270m-q4_k_m.gguf") {
        logits_are_llamas(&path, "gemma3", 126);
    }
}

/// A model, one batch, random factors on every adaptable tensor.
struct Rig {
    open: OpenModel,
    template: nepenthe::graph::template::Template,
    cpu: Cpu,
    factors: Factors,
    values: Vec<(Vec<f32>, Vec<f32>)>,
    batch: Packed,
    targets: Vec<Target>,
}

impl Rig {
    fn new(path: &Path, objective: RowObjective) -> Self {
        let open = OpenModel::open(path, 0).expect("a good model");
        let template = trace(&open.model, &open.weights).expect("traceable");
        let cpu = Cpu::new(1).expect("a CPU");
        let tokens = open.model.tokenize(GENERAL_TEXT, true, false);
        let (first, second) = (&tokens[..21], &tokens[40..57]);
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
                weight: 1.0 / 16.0,
            })
            .collect();
        let list: Vec<Factor> = (0..template.adaptable.len())
            .map(|tensor| Factor {
                tensor,
                rank: 3,
                scale: 0.7,
                trainable: true,
            })
            .collect();
        let mut rng = SplitMix64(3);
        let mut random =
            |n: usize, by: f32| -> Vec<f32> { (0..n).map(|_| by * rng.normal()).collect() };
        let values = template
            .adaptable
            .iter()
            .map(|t| (random(3 * t.n_in, 0.08), random(3 * t.n_out, 0.08)))
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
        }
    }

    fn tape(&mut self) -> Tape {
        let parts = Parts {
            template: &self.template,
            weights: &self.open.weights,
            window: usize::try_from(self.open.model.n_swa())
                .ok()
                .filter(|&w| w > 0),
        };
        let shape = (self.batch.n_tokens(), self.batch.n_padded_rows());
        // Exact transposed weights: bf16 ones have an error of their own, 2.4e-3.
        let mut transposed = Transposed::exact();
        let trained = Trained::Factors(&self.factors);
        Tape::new(
            &parts,
            trained,
            End::Logits,
            shape,
            true,
            &self.cpu,
            &mut transposed,
        )
        .expect("differentiable")
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

/// The derivative along a random direction of the factors of each tensor kind alone, so that an
/// error in one rule cannot hide behind the others.
fn gradients_match_finite_differences(path: &Path, objective: RowObjective, tolerance: f64) {
    let mut rig = Rig::new(path, objective);
    let mut tape = rig.tape();
    let mut logits = Vec::new();
    let values = rig.values.clone();
    rig.loss(&mut tape, &values, &mut logits);
    tape.backward(&mut rig.cpu, &logits).expect("computable");
    let mut grads = Vec::new();
    for i in 0..tape.n_grads() {
        let mut g = vec![0f32; tape.grad_len(i)];
        tape.read_grad(i, &mut g).expect("its length");
        grads.push(g);
    }
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
    assert!(kinds.len() >= 7, "{kinds:?}");
    for wanted in kinds {
        let mut rng = SplitMix64(17);
        let direction: Vec<(Vec<f32>, Vec<f32>)> = values
            .iter()
            .zip(&rig.template.adaptable)
            .map(|((a, b), t)| {
                let on = if kind(&t.name) == wanted { 1.0 } else { 0.0 };
                let mut random =
                    |n: usize| -> Vec<f32> { (0..n).map(|_| on * rng.normal()).collect() };
                (random(a.len()), random(b.len()))
            })
            .collect();
        let analytic: f64 = direction
            .iter()
            .enumerate()
            .flat_map(|(i, (a, b))| {
                a.iter()
                    .zip(&grads[2 * i])
                    .chain(b.iter().zip(&grads[2 * i + 1]))
            })
            .map(|(d, g)| f64::from(*d) * f64::from(*g))
            .sum();
        let mut at = |h: f32| {
            let moved: Vec<_> = values
                .iter()
                .zip(&direction)
                .map(|((a, b), (da, db))| {
                    let add = |x: &[f32], d: &[f32]| {
                        x.iter()
                            .zip(d)
                            .map(|(x, d)| x + h * d)
                            .collect::<Vec<f32>>()
                    };
                    (add(a, da), add(b, db))
                })
                .collect();
            rig.loss(&mut tape, &moved, &mut logits)
        };
        // Richardson: the error of the symmetric difference is of order h^2.
        let slope =
            |at: &mut dyn FnMut(f32) -> f64, h: f32| (at(h) - at(-h)) / (2.0 * f64::from(h));
        let h = 2e-3;
        let numeric = (4.0 * slope(&mut at, h) - slope(&mut at, 2.0 * h)) / 3.0;
        let relative = (analytic - numeric).abs() / analytic.abs().max(1e-2);
        assert!(
            relative < tolerance,
            "{wanted}: {analytic} against {numeric} ({relative:.1e})"
        );
    }
}

#[test]
fn gradients_of_the_embedded_model_match_finite_differences() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("f32.gguf");
    support::decoded(&support::mini(), &path);
    for objective in [RowObjective::CrossEntropy, RowObjective::InvertedHinge] {
        gradients_match_finite_differences(&path, objective, 1e-2);
    }
}

#[test]
fn gradients_of_stories_match_finite_differences() {
    if let Some(path) = support::stories() {
        gradients_match_finite_differences(&path, RowObjective::CrossEntropy, 1e-2);
    }
}
