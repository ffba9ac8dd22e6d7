//! Where the update lives, and what the sets occupy.

use super::Job;
use super::evidence::{LayerRow, Spectrum, TensorRow};
use crate::data::samples;
use crate::error::Error;
use crate::model::OpenModel;
use crate::patch::{Patch, Update};
use crate::progress::Ui;
use crate::project::NetUpdate;
use crate::start::subspaces;
use crate::subspace::SubspaceConfig;
use crate::subspace_file;
use std::collections::BTreeMap;

/// Eigenvalues kept of each spectrum.
const MOST_EIGENVALUES: usize = 256;

/// One row per tensor of the patch.
///
/// # Errors
/// Weights that cannot be decoded, factors that do not fit together.
pub fn rows(open: &OpenModel, patch: &Patch) -> Result<Vec<TensorRow>, Error> {
    let mut rows = Vec::new();
    for u in &patch.updates {
        let known = patch.info.as_ref().filter(|i| i.method != "learn");
        let info = patch
            .info
            .as_ref()
            .and_then(|i| i.tensors.iter().find(|t| t.name == u.tensor));
        let relative_norm = match info {
            Some(t) => t.relative_norm,
            None => relative_norm(open, u)?,
        };
        let (layer, kind) = place(&u.tensor);
        rows.push(TensorRow {
            name: u.tensor.clone(),
            layer,
            kind,
            rank: u.rank as u32,
            retain_rank: info.map_or(0, |t| t.retain_rank),
            relative_norm,
            retain_fraction: info.map_or(0.0, |t| t.retain_fraction),
            singular_values: known.map_or_else(Vec::new, |_| balanced(u)),
        });
    }
    Ok(rows)
}

fn net(u: &Update) -> Result<NetUpdate, Error> {
    let shape = (u.n_in, u.n_out, u.rank);
    Ok(NetUpdate::new(
        shape,
        u.scale,
        u.lora_a.clone(),
        u.lora_b.clone(),
    )?)
}

fn relative_norm(open: &OpenModel, u: &Update) -> Result<f32, Error> {
    let w = open.weights.decoded(&u.tensor)?;
    let squares: f64 = w.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    Ok((net(u)?.norm() / squares.sqrt().max(f64::MIN_POSITIVE)) as f32)
}

/// Our patches hold U·√S and √S·Vᵀ: σ is the product of the lengths of a column and its row.
fn balanced(u: &Update) -> Vec<f32> {
    let length = |v: &mut dyn Iterator<Item = &f32>| -> f64 {
        v.map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
    };
    let mut sigma: Vec<f32> = (0..u.rank)
        .map(|r| {
            let a = length(&mut u.lora_a[r * u.n_in..][..u.n_in].iter());
            let b = length(&mut u.lora_b.iter().skip(r).step_by(u.rank));
            (a * b * f64::from(u.scale)) as f32
        })
        .collect();
    sigma.sort_by(|a, b| b.total_cmp(a));
    sigma
}

/// `blk.3.attn_q.weight`: block 3, `attn_q`.
fn place(name: &str) -> (Option<u32>, String) {
    let kind = |s: &str| s.strip_suffix(".weight").unwrap_or(s).to_owned();
    let block = name.strip_prefix("blk.").and_then(|s| s.split_once('.'));
    match block.and_then(|(n, rest)| Some((n.parse().ok()?, rest))) {
        Some((layer, rest)) => (Some(layer), kind(rest)),
        None => (None, kind(name)),
    }
}

/// Rows summed up layer by layer.
pub fn layers(rows: &[TensorRow], patch: &Patch) -> Vec<LayerRow> {
    let mut all: BTreeMap<u32, (f64, Vec<&TensorRow>)> = BTreeMap::new();
    for (row, u) in rows.iter().zip(&patch.updates) {
        let Some(layer) = row.layer else { continue };
        let norm = net(u).map_or(0.0, |n| n.norm());
        let entry = all.entry(layer).or_default();
        entry.0 += norm * norm;
        entry.1.push(row);
    }
    let total: f64 = all.values().map(|(energy, _)| energy).sum();
    all.into_iter()
        .map(|(layer, (energy, rows))| LayerRow {
            layer,
            share: if total > 0.0 { energy / total } else { 0.0 },
            relative_norm: rows.iter().map(|r| f64::from(r.relative_norm)).sum::<f64>()
                / rows.len() as f64,
            retain_fraction: rows
                .iter()
                .map(|r| f64::from(r.retain_fraction))
                .fold(0.0, f64::max),
        })
        .collect()
}

/// Eigenvalues of the retain set from the subspace file, and of the forget set, if it is at hand.
///
/// # Errors
/// A subspace file for another model, failures of the engine.
pub fn spectra(job: &Job<'_>, ui: &mut dyn Ui) -> Result<Vec<Spectrum>, Error> {
    let Some(path) = &job.subspace else {
        return Ok(Vec::new());
    };
    let shared = subspace_file::open_for(path, job.open)?;
    let cut = |v: &[f32]| v[..v.len().min(MOST_EIGENVALUES)].to_vec();
    let mut all: Vec<Spectrum> = shared
        .iter()
        .map(|b| Spectrum {
            tensor: b.tensor.clone(),
            retain_rank: b.rank,
            retain: cut(&b.eigenvalues),
            forget: Vec::new(),
        })
        .collect();
    let Some((_, records)) = job.sets.iter().find(|(name, _)| *name == "forget") else {
        return Ok(all);
    };
    let mut notices = Vec::new();
    let forget = samples(
        &job.open.model,
        &job.template,
        records,
        job.max_tokens,
        "forget",
        &mut notices,
    )?;
    let adaptable = job.open.trace()?.adaptable;
    let solved = subspaces(
        job.open,
        &adaptable,
        (&forget, &[]),
        Some(shared),
        &SubspaceConfig::default(),
        job.n_threads,
        None,
        &mut |done, total| ui.progress("capturing outputs", done, total),
    )?;
    for (spectrum, s) in all.iter_mut().zip(&solved) {
        spectrum.forget = cut(&s.forget_eigenvalues);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_where_a_tensor_is() {
        let at = |n| place(n);
        assert_eq!(at("blk.12.attn_q.weight"), (Some(12), "attn_q".into()));
        assert_eq!(at("output.weight"), (None, "output".into()));
        assert_eq!(at("blk.x.y"), (None, "blk.x.y".into()));
    }

    #[test]
    fn balanced_factors_give_their_singular_values() {
        // 3·e0·e1ᵀ + 2·e1·e0ᵀ with σ split evenly.
        let (p, q) = (3f32.sqrt(), 2f32.sqrt());
        let u = Update {
            tensor: "t".into(),
            n_in: 2,
            n_out: 2,
            rank: 2,
            scale: 1.0,
            // Rows of A are √σ·v; columns of B, which stand rank apart, √σ·u.
            lora_a: vec![q, 0.0, 0.0, p],
            lora_b: vec![0.0, p, q, 0.0],
        };
        let sigma = balanced(&u);
        assert!((sigma[0] - 3.0).abs() < 1e-6, "{sigma:?}");
        assert!((sigma[1] - 2.0).abs() < 1e-6, "{sigma:?}");
    }
}
