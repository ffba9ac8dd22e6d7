//! The page: `page.html` filled in with the evidence, and plots. It loads nothing and runs nothing.

use super::evidence::{Evidence, Kind};
use super::svg::{Axis, Row, Series, heat, intervals, lines};
use crate::robustness::SetsScored;
use crate::score::SetScores;
use minijinja::{Environment, UndefinedBehavior, Value, context};
use std::collections::BTreeMap;

const PAGE: &str = include_str!("page.html");
/// Spectra drawn at most, evenly spread over the tensors.
const MOST_SPECTRA: usize = 32;

/// The page of `evidence`.
pub fn page(evidence: &Evidence) -> String {
    let mut env = Environment::new();
    // The name's ending turns escaping on.
    env.add_template("page.html", PAGE)
        .expect("the page is a template");
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    super::format::register(&mut env);
    let plots: BTreeMap<&str, Value> = plots(evidence)
        .into_iter()
        .map(|(name, svg)| (name, Value::from_safe_string(svg)))
        .collect();
    let page = env.get_template("page.html").expect("added above");
    page.render(context! { e => evidence, plots })
        .expect("the template fits the evidence")
}

fn plots(e: &Evidence) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("probability", probability(e)),
        ("checks", checks(e)),
        ("where", location(e)),
        ("off_retain", off_retain(e)),
        ("energy", energy(e)),
    ];
    let (forget, retain) = losses(e);
    all.push(("forget_loss", forget));
    all.push(("retain_loss", retain));
    all.push(("spectra", spectra(e)));
    all.push(("scales", scales(e)));
    all.push(("relearning", relearning(e)));
    all.retain(|(_, svg)| !svg.is_empty());
    all
}

fn value(s: &SetScores) -> Option<(f64, f64, f64)> {
    let p = s.prob;
    Some((p.mean, p.interval.low, p.interval.high))
}

/// Every set under every variant.
fn probability(e: &Evidence) -> String {
    let mut rows = Vec::new();
    for size in &e.asked.sets {
        rows.push(Row {
            label: format!("{} set", size.set),
            value: None,
            class: 0,
        });
        for v in &e.measured {
            rows.push(Row {
                label: v.name.clone(),
                value: v.set(size.set).and_then(value),
                class: match v.kind {
                    Kind::Base => 0,
                    Kind::Patched => 1,
                    Kind::Merged => 2,
                },
            });
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let title = "Answer probability of each set before and after, with 95% intervals";
    intervals(title, "answer probability", &rows)
}

fn checks(e: &Evidence) -> String {
    if e.training.checks.is_empty() {
        return String::new();
    }
    let s = Series {
        points: e
            .training
            .checks
            .iter()
            .map(|c| (c.step as f64, c.nll))
            .collect(),
        line: true,
        marks: true,
        ..Series::default()
    };
    let rules: Vec<(f64, &str)> = e
        .training
        .unseen_nll
        .map(|level| (level, "unseen level"))
        .into_iter()
        .collect();
    lines(
        "Negative log-likelihood of the forget answers during training",
        &Axis::linear("step", &[0.0]),
        &Axis::linear("forget answer NLL, nats", &[0.0]),
        &[s],
        &rules,
    )
}

fn losses(e: &Evidence) -> (String, String) {
    let one = |title: &str, label: &str, class: usize, points: Vec<(f64, f64)>| {
        if points.is_empty() {
            return String::new();
        }
        let s = Series {
            points,
            class,
            line: true,
            ..Series::default()
        };
        let x = Axis::linear("step", &[0.0]);
        lines(title, &x, &Axis::linear(label, &[0.0]), &[s], &[])
    };
    let steps = &e.training.steps;
    let forget = steps
        .iter()
        .filter_map(|s| Some((s.step as f64, s.forget?)));
    let retain = steps
        .iter()
        .filter_map(|s| Some((s.step as f64, s.retain?)));
    (
        one(
            "Loss on forget samples by step",
            "forget loss",
            0,
            forget.collect(),
        ),
        one(
            "Loss on retain samples by step",
            "retain loss, nats",
            1,
            retain.collect(),
        ),
    )
}

fn location(e: &Evidence) -> String {
    let mut kinds: Vec<String> = Vec::new();
    let mut cells = Vec::new();
    let mut n_layers = 0;
    for t in &e.tensors {
        let Some(layer) = t.layer else { continue };
        let row = kinds.iter().position(|k| *k == t.kind).unwrap_or_else(|| {
            kinds.push(t.kind.clone());
            kinds.len() - 1
        });
        n_layers = n_layers.max(layer as usize + 1);
        let words = format!("{}: {:.3} %", t.name, 100.0 * t.relative_norm);
        cells.push((row, layer as usize, f64::from(t.relative_norm), words));
    }
    // A hostile name may claim any layer.
    if cells.is_empty() || n_layers > 4096 {
        return String::new();
    }
    let most = cells.iter().map(|c| c.2).fold(0.0, f64::max);
    heat(
        "Size of the update by tensor and layer",
        ("tensor", &kinds),
        ("layer", n_layers),
        &cells,
        &format!("‖ΔW‖/‖W‖ from 0 (pale) to {:.2} % (full)", 100.0 * most),
    )
}

fn off_retain(e: &Evidence) -> String {
    let points: Vec<(f64, f64)> = e
        .tensors
        .iter()
        .filter(|t| t.retain_rank > 0 && t.retain_fraction > 0.0)
        .filter_map(|t| Some((f64::from(t.layer?), f64::from(t.retain_fraction).log10())))
        .collect();
    if points.is_empty() {
        return String::new();
    }
    let s = Series {
        points,
        marks: true,
        ..Series::default()
    };
    lines(
        "Share of each tensor's update in the retain directions, by layer",
        &Axis::linear("layer", &[0.0]),
        &Axis::log("‖PᵀΔW‖ / ‖ΔW‖"),
        &[s],
        &[(0.0, "all of it")],
    )
}

/// Evenly spread over `all`.
fn some<T>(all: &[T]) -> impl Iterator<Item = &T> {
    let n = all.len().min(MOST_SPECTRA);
    (0..n).map(move |i| &all[i * all.len() / n])
}

fn energy(e: &Evidence) -> String {
    let with: Vec<_> = e
        .tensors
        .iter()
        .filter(|t| t.singular_values.iter().any(|&v| v > 0.0))
        .collect();
    if with.is_empty() {
        return String::new();
    }
    let series: Vec<Series> = some(&with)
        .map(|t| {
            let squares = t
                .singular_values
                .iter()
                .map(|&v| f64::from(v) * f64::from(v));
            let total: f64 = squares.clone().sum();
            let mut sum = 0.0;
            let cumulative = squares.enumerate().map(|(i, s)| {
                sum += s;
                ((i + 1) as f64, sum / total)
            });
            Series {
                points: std::iter::once((0.0, 0.0)).chain(cumulative).collect(),
                line: true,
                faint: true,
                ..Series::default()
            }
        })
        .collect();
    lines(
        "Share of each tensor's update in its first directions",
        &Axis::linear("directions", &[0.0]),
        &Axis::linear("share of ‖ΔW‖²", &[0.0, 1.0]),
        &series,
        &[],
    )
}

fn spectra(e: &Evidence) -> String {
    if e.spectra.is_empty() {
        return String::new();
    }
    let curve = |values: &[f32], class: usize| {
        let first = f64::from(values.first().copied().unwrap_or(1.0)).max(f64::MIN_POSITIVE);
        // Below f32's rounding of the largest, squared, there is only noise.
        let shares = values.iter().map(|&v| f64::from(v) / first);
        let points = shares.enumerate().filter(|(_, share)| *share > 1e-12);
        Series {
            points: points
                .map(|(i, share)| ((i + 1) as f64, share.log10()))
                .collect(),
            class,
            line: true,
            faint: true,
            ..Series::default()
        }
    };
    let mut series = Vec::new();
    for s in some(&e.spectra) {
        series.push(curve(&s.retain, 1));
        if !s.forget.is_empty() {
            series.push(curve(&s.forget, 0));
        }
    }
    let named = |label: &str, class| Series {
        label: label.into(),
        class,
        line: true,
        ..Series::default()
    };
    series.push(named("retain set", 1));
    if e.spectra.iter().any(|s| !s.forget.is_empty()) {
        series.push(named("forget set", 0));
    }
    lines(
        "Eigenvalues of the outputs of each adapted tensor",
        &Axis::linear("eigenvalue, largest first", &[0.0]),
        &Axis::log("share of the largest"),
        &series,
        &[],
    )
}

/// One series per set that the points have, with its band.
fn sets<'p>(points: impl Iterator<Item = (f64, [Option<&'p SetScores>; 3])>) -> Vec<Series> {
    let names = ["forget", "retain", "paraphrased"];
    let mut series: Vec<Series> = names
        .iter()
        .enumerate()
        .map(|(class, label)| Series {
            label: (*label).to_owned(),
            class,
            line: true,
            marks: true,
            ..Series::default()
        })
        .collect();
    for (x, scores) in points {
        for (s, scores) in series.iter_mut().zip(scores) {
            if let Some((mean, low, high)) = scores.and_then(value) {
                s.points.push((x, mean));
                s.band.push((x, low, high));
            }
        }
    }
    series.retain(|s| !s.points.is_empty());
    series
}

fn three(s: &SetsScored) -> [Option<&SetScores>; 3] {
    [Some(&s.forget), s.retain.as_ref(), s.paraphrased.as_ref()]
}

fn scales(e: &Evidence) -> String {
    let Some(r) = e.robustness.iter().find(|r| r.scales.len() > 1) else {
        return String::new();
    };
    lines(
        "Answer probability by scale of the patch",
        &Axis::linear("scale, 1 as deployed", &[0.0]),
        &Axis::linear("answer probability", &[0.0, 1.0]),
        &sets(
            r.scales
                .iter()
                .map(|p| (f64::from(p.scale), three(&p.sets))),
        ),
        &[],
    )
}

fn relearning(e: &Evidence) -> String {
    let Some(relearn) = e.robustness.iter().find_map(|r| r.relearn.as_ref()) else {
        return String::new();
    };
    let points = relearn.points.iter();
    lines(
        "Answer probability while training on other data",
        &Axis::linear("steps of training on other data", &[0.0]),
        &Axis::linear("answer probability", &[0.0, 1.0]),
        &sets(points.map(|p| (p.step as f64, [Some(&p.forget), p.retain.as_ref(), None]))),
        &[],
    )
}
