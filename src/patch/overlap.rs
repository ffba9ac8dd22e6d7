//! Where two patches touch the same: principal angles between the spaces their updates read from
//! and write to.
//!
//! With orthonormal bases U₁, U₂ of the columns of two updates of one weight (their outputs), the
//! cosines of the principal angles are the singular values of U₁ᵀU₂; the same of the rows (their
//! inputs). Spaces of dimension r₁ and r₂ in n at random have a mean squared cosine of max(r₁,
//! r₂)/n, beside which it is to be read. The cosine of the updates themselves, ⟨ΔW₁, ΔW₂⟩/‖ΔW₁‖‖ΔW₂‖,
//! says whether they pull the same way there.

use super::{Patch, Storage, Update, truncate};
use crate::error::Error;
use crate::subspace::{left_svd, product};
use faer::Mat;
use serde::Serialize;

/// What of an update counts as its space: directions that together make less than this fraction of
/// its norm do not.
const SPACE_ERROR: f64 = 0.01;

/// Angles between two spaces.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Angles {
    /// Largest cosine: 1 where they share a direction.
    pub largest: f64,
    /// Mean squared cosine over the smaller space: 1 where it lies in the other.
    pub mean_square: f64,
    /// What that is for spaces of these dimensions at random.
    pub at_random: f64,
}

/// Two updates of one weight.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overlap {
    /// The weight.
    pub tensor: String,
    /// Of what they write to.
    pub outputs: Angles,
    /// Of what they read from.
    pub inputs: Angles,
    /// Of the updates: 1 the same, 0 apart, −1 opposed.
    pub cosine: f64,
}

/// Of every weight that both patches adapt.
///
/// # Errors
/// When a decomposition does not converge, patches of different models.
pub fn overlaps(a: &Patch, b: &Patch) -> Result<Vec<Overlap>, Error> {
    let mut out = Vec::new();
    for first in &a.updates {
        let Some(second) = b.updates.iter().find(|u| u.tensor == first.tensor) else {
            continue;
        };
        super::combine::same_shape(b, first, second)?;
        let (first, second) = (space(first)?, space(second)?);
        out.push(Overlap {
            tensor: first.update.tensor.clone(),
            outputs: angles(&first.outputs, &second.outputs)?,
            inputs: angles(&first.inputs, &second.inputs)?,
            cosine: cosine(&first.update, &second.update),
        });
    }
    Ok(out)
}

struct Space {
    update: Update,
    /// Orthonormal columns [n_out, rank].
    outputs: Mat<f64>,
    /// Orthonormal columns [n_in, rank].
    inputs: Mat<f64>,
}

fn space(update: &Update) -> Result<Space, Error> {
    let (update, _) = truncate(update, SPACE_ERROR, Storage::F16)?;
    let rank = update.rank;
    // The factors' columns are orthogonal already.
    let outputs = unit(Mat::from_fn(update.n_out, rank, |o, j| {
        f64::from(update.lora_b[o * rank + j])
    }));
    let inputs = unit(Mat::from_fn(update.n_in, rank, |i, j| {
        f64::from(update.lora_a[j * update.n_in + i])
    }));
    Ok(Space {
        update,
        outputs,
        inputs,
    })
}

fn unit(mut columns: Mat<f64>) -> Mat<f64> {
    for j in 0..columns.ncols() {
        let norm = columns.col(j).norm_l2();
        for i in 0..columns.nrows() {
            columns[(i, j)] /= if norm > 0.0 { norm } else { 1.0 };
        }
    }
    columns
}

fn angles(a: &Mat<f64>, b: &Mat<f64>) -> Result<Angles, Error> {
    let between = product(a.transpose(), b.as_ref());
    let (cosines, _) = left_svd(between.as_ref()).map_err(crate::project::ProjectError::from)?;
    let smaller = a.ncols().min(b.ncols()).max(1) as f64;
    Ok(Angles {
        largest: cosines.first().copied().unwrap_or(0.0).min(1.0),
        mean_square: cosines.iter().map(|c| c * c).sum::<f64>() / smaller,
        at_random: a.ncols().max(b.ncols()) as f64 / a.nrows() as f64,
    })
}

fn cosine(a: &Update, b: &Update) -> f64 {
    let norms = inner(a, a) * inner(b, b);
    if norms > 0.0 {
        inner(a, b) / norms.sqrt()
    } else {
        0.0
    }
}

/// ⟨ΔW₁, ΔW₂⟩ = Σⱼₖ (B₁ᵀB₂)ⱼₖ (A₁A₂ᵀ)ⱼₖ, from the factors.
pub(super) fn inner(a: &Update, b: &Update) -> f64 {
    let b_of = |u: &Update| {
        let rank = u.rank;
        Mat::from_fn(u.n_out, rank, |o, j| f64::from(u.lora_b[o * rank + j]))
    };
    let a_of = |u: &Update| {
        let n_in = u.n_in;
        Mat::from_fn(n_in, u.rank, |i, j| f64::from(u.lora_a[j * n_in + i]))
    };
    let outputs = product(b_of(a).transpose(), b_of(b).as_ref());
    let inputs = product(a_of(a).transpose(), a_of(b).as_ref());
    let mut sum = 0.0;
    for j in 0..outputs.nrows() {
        for k in 0..outputs.ncols() {
            sum += outputs[(j, k)] * inputs[(j, k)];
        }
    }
    sum * f64::from(a.scale) * f64::from(b.scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(a: [f32; 4], b: [f32; 3]) -> Update {
        Update {
            tensor: "w".into(),
            n_in: 4,
            n_out: 3,
            rank: 1,
            scale: 1.0,
            lora_a: a.to_vec(),
            lora_b: b.to_vec(),
        }
    }

    fn patch(u: Update) -> Patch {
        Patch {
            arch: "llama".into(),
            info: None,
            updates: vec![u],
            path: "p".into(),
        }
    }

    #[test]
    fn angles_are_those_of_the_directions() {
        let h = 0.5f32.sqrt();
        let a = patch(update([1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0]));
        let b = patch(update([h, h, 0.0, 0.0], [0.0, -3.0, 0.0]));
        let found = &overlaps(&a, &b).expect("it converges")[0];
        let near = |x: f64, y: f64| assert!((x - y).abs() < 1e-6, "{x} {y}");
        near(found.inputs.largest, f64::from(h));
        near(found.inputs.mean_square, 0.5);
        near(found.inputs.at_random, 0.25);
        near(found.outputs.largest, 1.0);
        near(found.cosine, -f64::from(h));
    }
}
