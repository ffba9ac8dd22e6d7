//! Losses of whole answers and dropout through the graph, against finite differences and against
//! what they must become in the limit.

mod support;

use nepenthe::data::{GENERAL_TEXT, Sample};
use nepenthe::graph::trained::{Factor, Factors, Trained};
use nepenthe::model::OpenModel;
use nepenthe::rng::SplitMix64;
use nepenthe::train::answer_loss::AnswerLoss;
use nepenthe::train::dropout::Dropout;
use nepenthe::train::engine::{Aim, Engine, Item};
use nepenthe::train::loss::RowObjective;

/// The embedded model in f32 and two pairs of answers.
struct Rig {
    open: OpenModel,
    forget: [Sample; 2],
    preferred: [Sample; 2],
}

type Values = Vec<(Vec<f32>, Vec<f32>)>;

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("f32.gguf");
        support::decoded(&support::mini(), &path);
        let open = OpenModel::open(&path, 0).expect("a good model");
        let tokens = open.model.tokenize(GENERAL_TEXT, true, false);
        let sample = |from: usize, to: usize, answer: usize| Sample {
            tokens: tokens[from..to].to_vec(),
            answers: std::iter::once(answer..to - from).collect(),
            truncated: false,
        };
        Self {
            open,
            forget: [sample(0, 24, 9), sample(40, 57, 6)],
            preferred: [sample(80, 99, 11), sample(120, 131, 5)],
        }
    }

    /// Small micro-batches, so that some answers share one and others do not.
    fn engine(&self) -> Engine<'_> {
        Engine::new(&self.open, 1, 48).expect("traceable").exact()
    }

    fn items(&self, loss: AnswerLoss, paired: bool) -> Vec<Item<'_>> {
        self.forget
            .iter()
            .zip(&self.preferred)
            .map(|(sample, preferred)| Item {
                sample,
                aim: Aim::Answer {
                    loss,
                    preferred: paired.then_some(preferred),
                },
                weight: 0.5,
            })
            .collect()
    }
}

fn factors(engine: &Engine<'_>, seed: u64) -> (Factors, Values) {
    let list = (0..engine.template.adaptable.len())
        .map(|tensor| Factor {
            tensor,
            rank: 3,
            scale: 0.7,
            trainable: true,
        })
        .collect();
    (
        engine.factors(list).expect("room"),
        random(engine, seed, 0.08),
    )
}

fn random(engine: &Engine<'_>, seed: u64, by: f32) -> Values {
    let mut rng = SplitMix64(seed);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| by * rng.normal()).collect() };
    engine
        .template
        .adaptable
        .iter()
        .map(|t| (random(3 * t.n_in), random(3 * t.n_out)))
        .collect()
}

fn write(factors: &mut Factors, values: &Values) {
    for (i, (a, b)) in values.iter().enumerate() {
        factors.write(i, a, b).expect("their shapes");
    }
}

/// The weighted loss, and its gradients in the tape's order.
fn gradients(
    engine: &mut Engine<'_>,
    factors: &Factors,
    items: &[Item<'_>],
    dropout: Option<Dropout>,
) -> (f64, Vec<Vec<f32>>) {
    let mut grads: Vec<Vec<f32>> = engine
        .template
        .adaptable
        .iter()
        .flat_map(|t| [vec![0.0; 3 * t.n_in], vec![0.0; 3 * t.n_out]])
        .collect();
    let losses = engine
        .gradients(Trained::Factors(factors), items, dropout, &mut grads)
        .expect("computable");
    let total = losses
        .iter()
        .zip(items)
        .map(|(l, i)| l.loss * f64::from(i.weight))
        .sum();
    (total, grads)
}

fn check(rig: &Rig, items: &[Item<'_>], dropout: Option<Dropout>, what: &str) {
    let mut engine = rig.engine();
    let (mut factors, values) = factors(&engine, 3);
    factors.dropout = dropout.is_some();
    write(&mut factors, &values);
    let (_, grads) = gradients(&mut engine, &factors, items, dropout);
    for seed in [17, 18] {
        let direction = random(&engine, seed, 1.0);
        let analytic: f64 = direction
            .iter()
            .flat_map(|(a, b)| [a, b])
            .zip(&grads)
            .flat_map(|(d, g)| d.iter().zip(g))
            .map(|(d, g)| f64::from(*d) * f64::from(*g))
            .sum();
        let mut at = |h: f32| {
            let add = |x: &[f32], d: &[f32]| -> Vec<f32> {
                x.iter().zip(d).map(|(x, d)| x + h * d).collect()
            };
            let moved = values
                .iter()
                .zip(&direction)
                .map(|((a, b), (da, db))| (add(a, da), add(b, db)))
                .collect();
            write(&mut factors, &moved);
            gradients(&mut engine, &factors, items, dropout).0
        };
        // Richardson: the error of the symmetric difference is of order h^2.
        let h = 5e-4f32;
        let mut slope = |h: f32| (at(h) - at(-h)) / (2.0 * f64::from(h));
        let numeric = (4.0 * slope(h) - slope(2.0 * h)) / 3.0;
        let relative = (analytic - numeric).abs() / analytic.abs().max(1e-2);
        assert!(
            relative < 1e-2,
            "{what}: {analytic} against {numeric} ({relative:.1e})"
        );
    }
}

#[test]
fn gradients_of_whole_answers_match_finite_differences() {
    let rig = Rig::new();
    let preference = |reference| AnswerLoss::Preference {
        beta: 0.1,
        reference,
    };
    // References near the margins: the sigmoid is then in its curved part.
    let npo = rig.items(preference(50.0), false);
    check(&rig, &npo, None, "npo");
    let simnpo = AnswerLoss::Normalised {
        beta: 2.5,
        gamma: 10.0,
    };
    check(&rig, &rig.items(simnpo, false), None, "simnpo");
    check(&rig, &rig.items(preference(10.0), true), None, "dpo");
}

#[test]
fn gradients_under_dropout_match_finite_differences() {
    let rig = Rig::new();
    let items: Vec<Item<'_>> = rig
        .forget
        .iter()
        .map(|s| Item::remembered(s, 0.05))
        .collect();
    let dropout = Dropout {
        rate: 0.2,
        seed: 1,
        step: 4,
    };
    check(&rig, &items, Some(dropout), "dropout");
}

#[test]
fn npo_with_a_small_beta_is_gradient_ascent() {
    let rig = Rig::new();
    let mut engine = rig.engine();
    let (mut factors, values) = factors(&engine, 5);
    write(&mut factors, &values);
    let ascent: Vec<Item<'_>> = rig
        .forget
        .iter()
        .map(|sample| Item {
            sample,
            aim: Aim::Rows(RowObjective::Ascent),
            weight: 0.5,
        })
        .collect();
    let (_, wanted) = gradients(&mut engine, &factors, &ascent, None);
    let norm = |g: &[Vec<f32>]| {
        let squares = g.iter().flatten().map(|v| f64::from(*v).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let mut off = |beta: f64| {
        let npo = AnswerLoss::Preference {
            beta,
            reference: 20.0,
        };
        let (_, got) = gradients(&mut engine, &factors, &rig.items(npo, false), None);
        let difference: Vec<Vec<f32>> = got
            .iter()
            .zip(&wanted)
            .map(|(g, w)| g.iter().zip(w).map(|(g, w)| g - w).collect())
            .collect();
        norm(&difference) / norm(&wanted)
    };
    let (large, small, smallest) = (off(1e-1), off(1e-3), off(1e-6));
    assert!(large > 0.1, "{large}");
    assert!(small < large / 10.0, "{small} against {large}");
    assert!(smallest < 1e-4, "{smallest}");
}

#[test]
fn dropout_is_off_outside_training_and_acts_on_the_net_update_alone() {
    let rig = Rig::new();
    let items: Vec<Item<'_>> = rig
        .forget
        .iter()
        .map(|s| Item::remembered(s, 1.0))
        .collect();
    let dropout = Dropout {
        rate: 0.5,
        seed: 1,
        step: 0,
    };
    let mut engine = rig.engine();
    // A trained pair on its frozen twin, as RILA starts: no net update.
    let n = engine.template.adaptable.len();
    let pair = |scale, trainable| {
        move |tensor| Factor {
            tensor,
            rank: 3,
            scale,
            trainable,
        }
    };
    let list = (0..n)
        .map(pair(0.7, true))
        .chain((0..n).map(pair(-0.7, false)))
        .collect();
    let mut factors = engine.factors(list).expect("room");
    let start = random(&engine, 7, 0.08);
    write(&mut factors, &start.iter().chain(&start).cloned().collect());
    let nll =
        |losses: &[nepenthe::likelihood::SampleLoss]| -> f64 { losses.iter().map(|l| l.nll).sum() };
    let plain = engine
        .losses(Trained::Factors(&factors), &items)
        .expect("computable");
    let base = {
        engine.reset();
        let base = engine.losses(Trained::Nothing, &items).expect("computable");
        engine.reset();
        nll(&base)
    };
    factors.dropout = true;
    let (at_start, _) = gradients(&mut engine, &factors, &items, Some(dropout));
    assert!((at_start - base).abs() < 1e-2, "{at_start} against {base}");
    // The same tape, evaluated: not a bit is different from a graph without masks.
    let evaluated = engine
        .losses(Trained::Factors(&factors), &items)
        .expect("computable");
    assert_eq!(plain, evaluated);
    // With a net update masks do matter, and repeat.
    let moved: Values = random(&engine, 8, 0.08);
    write(&mut factors, &moved);
    let evaluated = engine
        .losses(Trained::Factors(&factors), &items)
        .expect("computable");
    let (once, _) = gradients(&mut engine, &factors, &items, Some(dropout));
    let (again, _) = gradients(&mut engine, &factors, &items, Some(dropout));
    let later = Dropout { step: 1, ..dropout };
    let (later, _) = gradients(&mut engine, &factors, &items, Some(later));
    assert_eq!(once, again);
    assert!((once - nll(&evaluated)).abs() > 0.05, "{once}");
    assert_ne!(once, later);
}
