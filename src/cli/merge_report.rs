//! What `nepenthe merge` shows.

use crate::merge::compare::Compared;
use crate::merge::gate::Verdict;
use crate::merge::run::Report;
use crate::merge::same_grid::Outcome;
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors listed one by one: those that lose most.
const LISTED: usize = 8;

/// The report as a table.
pub fn print(r: &Report, undo: Option<&Path>) {
    let file = r.delivered.files[0].display();
    if r.tensors.is_empty() {
        let kinds = counts(
            r.rewritten
                .iter()
                .map(|(_, from, to)| format!("{from} to {to}")),
        );
        println!("{} tensors written: {kinds}", r.rewritten.len());
    } else {
        fitted(r);
    }
    for (round, c) in r.corrections.iter().enumerate() {
        println!(
            "correction {}: {:.2}% of the weights' norm, trained from KL {:.4} to {:.4} before it was merged",
            round + 1,
            100.0 * c.relative_norm,
            c.kl_before,
            c.kl_trained
        );
    }
    if let Some(v) = &r.verdict {
        verdict(v);
    }
    println!(
        "{file}: {} bytes, {:+} beside the model",
        r.delivered.file_len,
        r.delivered.file_len as i64 - r.file_len_before as i64
    );
    if let Some(path) = &r.residue {
        println!("{}: side adapter, to be used with it", path.display());
    }
    for prev in &r.delivered.prev {
        println!("{}: the file before, until merge --confirm", prev.display());
    }
    if let (Some(size), Some(path)) = (&r.delivered.undo, undo) {
        println!(
            "{}: takes it back, {} bytes ({} changed, {} spelled out)",
            path.display(),
            size.file_len,
            size.changed,
            size.spelled
        );
    }
}

fn fitted(r: &Report) {
    let actions = r.tensors.iter().map(|t| match t.action {
        Some(action) => format!("{} {action}", t.from),
        None => format!("{} left as it is", t.from),
    });
    println!("{} tensors: {}", r.tensors.len(), counts(actions));
    let (changed, codes) = r
        .tensors
        .iter()
        .fold((0, 0), |(c, n), t| (c + t.codes_changed, n + t.codes));
    println!(
        "codes changed {changed} of {codes} ({:.2}%); errors on {} tokens, calibrated by {}",
        100.0 * changed as f64 / codes.max(1) as f64,
        if r.held_out { "held-out" } else { "fitted" },
        r.calibration.unwrap_or("nothing"),
    );
    let mut worst: Vec<&Outcome> = r.tensors.iter().collect();
    worst.sort_by(|a, b| b.err_f.total_cmp(&a.err_f));
    println!("most lost                      |dW|/|W|  effect lost  noise on kept  what was done");
    for t in worst.iter().take(LISTED) {
        let action = t.action.map_or("left as it is".into(), |a| a.to_string());
        println!(
            "  {:<28} {:>7.2}% {:>12.4} {:>14.1e}  {action}",
            t.tensor,
            100.0 * t.relative_norm,
            t.err_f,
            t.retain_noise
        );
    }
}

fn verdict(v: &Verdict) {
    println!("                  unmerged   merged       KL");
    let rows = [
        ("forget", &v.forget),
        ("retain", &v.retain),
        ("general", &v.general),
    ];
    for (name, set) in rows {
        if let Some(Compared {
            kl,
            prob_unmerged,
            prob_merged,
            ..
        }) = set
        {
            println!("{name:<8} prob.  {prob_unmerged:>9.4} {prob_merged:>8.4} {kl:>8.4}");
        }
    }
    if let (Some(kept), Some(base)) = (v.kept_effect, v.forget_prob_base) {
        println!(
            "kept {:.1}% of the drop in forget probability from {base:.4}",
            100.0 * kept
        );
    }
}

/// `a: 12, b: 3`
fn counts(kinds: impl Iterator<Item = String>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for kind in kinds {
        *counts.entry(kind).or_default() += 1;
    }
    let parts: Vec<String> = counts.iter().map(|(k, n)| format!("{k}: {n}")).collect();
    parts.join(", ")
}
