//! One patch of several: per weight, ΔW = Σ wᵢΔWᵢ, truncated by SVD to a stated error.
//!
//! Where updates overlap, their plain sum moves what they share too far (patches that pull the
//! same way) or not far enough (patches that pull against each other). The weights chosen here
//! make the sum reach, along each update, as far as that update alone: Gw = diag(G) with
//! Gᵢⱼ = ⟨ΔWᵢ, ΔWⱼ⟩, solved in the least-norm sense, since updates may be multiples of each other,
//! and held within 0 to 2. Updates that do not overlap keep weight 1; the same patch twice gets
//! ½ and ½.

use super::delta::Delta;
use super::overlap::inner;
use super::{Patch, PatchError, Storage, Update, truncate};
use crate::error::Error;
use crate::project::ProjectError;
use crate::subspace::eigen_descending;
use faer::Mat;
use serde::Serialize;

/// Eigenvalues of G below this fraction of the largest are rounding.
const TOLERANCE: f64 = 1e-6;

/// How the updates of one weight are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighting {
    /// By the conflicts between them.
    Auto,
    /// As they are.
    Equal,
}

/// What became of one weight.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CombinedTensor {
    /// Its name.
    pub tensor: String,
    /// Weight of each patch; none where it does not adapt this tensor.
    pub weights: Vec<Option<f64>>,
    /// Rank of the sum before truncation.
    pub rank_before: usize,
    /// And after.
    pub rank: usize,
    /// ‖ΔW − ΔW'‖/‖ΔW‖.
    pub error: f64,
}

/// Several patches as one.
#[derive(Debug, Clone)]
pub struct Combined {
    /// In the order of the tensors' first appearance.
    pub updates: Vec<Update>,
    /// Of each.
    pub tensors: Vec<CombinedTensor>,
}

/// Add `patches`, each at its scale, and truncate every weight's sum within `error` of it, to ranks
/// that suit `storage`.
///
/// # Errors
/// Patches of different shapes, a decomposition that does not converge.
pub fn combine(
    patches: &[(Patch, f32)],
    error: f64,
    weighting: Weighting,
    storage: Storage,
) -> Result<Combined, Error> {
    let mut names: Vec<&str> = Vec::new();
    for u in patches.iter().flat_map(|(p, _)| &p.updates) {
        if !names.contains(&u.tensor.as_str()) {
            names.push(&u.tensor);
        }
    }
    let mut out = Combined {
        updates: Vec::with_capacity(names.len()),
        tensors: Vec::with_capacity(names.len()),
    };
    for name in names {
        let (update, about) = combine_tensor(name, patches, error, weighting, storage)?;
        out.updates.push(update);
        out.tensors.push(about);
    }
    Ok(out)
}

fn combine_tensor(
    name: &str,
    patches: &[(Patch, f32)],
    error: f64,
    weighting: Weighting,
    storage: Storage,
) -> Result<(Update, CombinedTensor), Error> {
    let mut present: Vec<(usize, &Update, f32)> = Vec::new();
    for (i, (patch, scale)) in patches.iter().enumerate() {
        if let Some(u) = patch.updates.iter().find(|u| u.tensor == name) {
            if let Some((_, first, _)) = present.first() {
                same_shape(patch, first, u)?;
            }
            present.push((i, u, *scale));
        }
    }
    let weights = match weighting {
        Weighting::Auto => chosen(&present)?,
        Weighting::Equal => vec![1.0; present.len()],
    };
    let first = present[0].1;
    let mut sum = Delta::new(first.n_in, first.n_out);
    for ((_, u, scale), w) in present.iter().zip(&weights) {
        sum.push_update(u, scale * *w as f32)?;
    }
    let (lora_a, lora_b, rank_before) = sum.factors();
    let whole = Update {
        tensor: name.to_owned(),
        rank: rank_before,
        scale: 1.0,
        lora_a,
        lora_b,
        ..*first
    };
    let (small, error) = truncate(&whole, error, storage)?;
    let mut by_patch = vec![None; patches.len()];
    for ((i, ..), w) in present.iter().zip(weights) {
        by_patch[*i] = Some(w);
    }
    let about = CombinedTensor {
        tensor: name.to_owned(),
        weights: by_patch,
        rank_before,
        rank: small.rank,
        error,
    };
    Ok((small, about))
}

/// w with Gw = diag(G), of least norm, within 0 to 2.
fn chosen(updates: &[(usize, &Update, f32)]) -> Result<Vec<f64>, Error> {
    let n = updates.len();
    let gram = Mat::from_fn(n, n, |i, j| {
        let ((_, a, s), (_, b, t)) = (updates[i], updates[j]);
        f64::from(s) * f64::from(t) * inner(a, b)
    });
    let (values, vectors) = eigen_descending(gram.as_ref()).map_err(ProjectError::from)?;
    let mut weights = vec![0.0; n];
    let floor = TOLERANCE * values.first().copied().unwrap_or(0.0);
    for (k, value) in values.iter().enumerate().filter(|(_, v)| **v > floor) {
        let v = |i: usize| vectors[(i, k)];
        let along: f64 = (0..n).map(|i| v(i) * gram[(i, i)]).sum();
        for (i, w) in weights.iter_mut().enumerate() {
            *w += v(i) * along / value;
        }
    }
    Ok(weights.iter().map(|w| w.clamp(0.0, 2.0)).collect())
}

/// Whether two updates are of one weight.
pub(super) fn same_shape(patch: &Patch, wanted: &Update, found: &Update) -> Result<(), Error> {
    if (wanted.n_in, wanted.n_out) == (found.n_in, found.n_out) {
        return Ok(());
    }
    Err(PatchError::Shape {
        path: patch.path.clone(),
        tensor: found.tensor.clone(),
        wanted: format!("{:?} as in the other patch", [wanted.n_in, wanted.n_out]),
        found: format!("{:?}", [found.n_in, found.n_out]),
    }
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patch::delta::dense;

    fn patch(a: [f32; 3], b: [f32; 2]) -> (Patch, f32) {
        let update = Update {
            tensor: "w".into(),
            n_in: 3,
            n_out: 2,
            rank: 1,
            scale: 1.0,
            lora_a: a.to_vec(),
            lora_b: b.to_vec(),
        };
        let patch = Patch {
            arch: "llama".into(),
            info: None,
            updates: vec![update],
            path: "p".into(),
        };
        (patch, 1.0)
    }

    fn near(found: &[f64], wanted: &[f64]) {
        let off = found.iter().zip(wanted).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f64::max) < 1e-5, "{found:?} {wanted:?}");
    }

    fn weights(patches: &[(Patch, f32)]) -> Vec<f64> {
        let combined = combine(patches, 0.0, Weighting::Auto, Storage::F16).expect("it converges");
        combined.tensors[0]
            .weights
            .iter()
            .map(|w| w.expect("adapted"))
            .collect()
    }

    #[test]
    fn weights_follow_the_conflict() {
        let a = patch([1.0, 0.0, 0.0], [1.0, 0.0]);
        let apart = patch([0.0, 1.0, 0.0], [0.0, 2.0]);
        near(&weights(&[a.clone(), apart]), &[1.0, 1.0]);
        near(&weights(&[a.clone(), a.clone()]), &[0.5, 0.5]);
        // A cosine of ½ and its opposite.
        let h = 0.75f32.sqrt();
        let near_a = patch([0.5, h, 0.0], [1.0, 0.0]);
        near(&weights(&[a.clone(), near_a]), &[2.0 / 3.0, 2.0 / 3.0]);
        let against = patch([-0.5, h, 0.0], [1.0, 0.0]);
        near(&weights(&[a.clone(), against]), &[2.0, 2.0]);
    }

    #[test]
    fn the_sum_is_the_sum() {
        let a = patch([1.0, 2.0, 0.5], [1.0, -1.0]);
        let mut b = patch([0.3, -1.0, 2.0], [0.5, 2.0]);
        b.1 = -2.0;
        let both = combine(&[a.clone(), b.clone()], 0.0, Weighting::Equal, Storage::F16)
            .expect("it converges");
        let sum: Vec<f64> = dense(&a.0.updates[0])
            .iter()
            .zip(dense(&b.0.updates[0]))
            .map(|(a, b)| a - 2.0 * b)
            .collect();
        near(&dense(&both.updates[0]), &sum);
        assert_eq!((both.tensors[0].rank_before, both.tensors[0].rank), (2, 2));
        let wide = patch([1.0; 3], [1.0; 2]);
        let mut tall = wide.clone();
        tall.0.updates[0].n_out = 1;
        tall.0.updates[0].lora_b.pop();
        let e =
            combine(&[wide, tall], 0.0, Weighting::Auto, Storage::F16).expect_err("other shapes");
        assert_eq!(e.exit_code(), 3, "{e}");
    }
}
