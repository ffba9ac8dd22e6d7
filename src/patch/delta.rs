//! ΔW = Σ s·B·A of one tensor, a row at a time: no [n_in, n_out] matrix is ever formed.

use super::{Patch, PatchError, Update};
use crate::error::Error;
use crate::graph::weights::Weights;
use std::collections::HashMap;

/// One low-rank term: `lora_a` [n_in, rank], `lora_b` [rank, n_out].
#[derive(Debug, Clone, Copy)]
struct Term<'a> {
    lora_a: &'a [f32],
    lora_b: &'a [f32],
    rank: usize,
    scale: f32,
}

/// The sum of several adapters' updates of one tensor.
#[derive(Debug, Clone)]
pub struct Delta<'a> {
    n_in: usize,
    n_out: usize,
    terms: Vec<Term<'a>>,
}

impl<'a> Delta<'a> {
    /// No update of a tensor [n_in, n_out].
    pub fn new(n_in: usize, n_out: usize) -> Self {
        Self {
            n_in,
            n_out,
            terms: Vec::new(),
        }
    }

    /// Adds `scale`·B·A with `lora_a` [n_in, rank] and `lora_b` [rank, n_out].
    ///
    /// # Errors
    /// Factors of another size.
    pub fn push(
        &mut self,
        lora_a: &'a [f32],
        lora_b: &'a [f32],
        rank: usize,
        scale: f32,
    ) -> Result<(), PatchError> {
        for (what, wanted, found) in [
            ("lora_a", self.n_in * rank, lora_a.len()),
            ("lora_b", rank * self.n_out, lora_b.len()),
        ] {
            if wanted != found {
                return Err(PatchError::Factors {
                    what,
                    wanted,
                    found,
                });
            }
        }
        self.terms.push(Term {
            lora_a,
            lora_b,
            rank,
            scale,
        });
        Ok(())
    }

    /// Adds a patch's update at `scale` (times the update's own).
    ///
    /// # Errors
    /// An update of another shape.
    pub fn push_update(&mut self, u: &'a Update, scale: f32) -> Result<(), PatchError> {
        self.push(&u.lora_a, &u.lora_b, u.rank, u.scale * scale)
    }

    /// Columns of the tensor.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Rows of the tensor.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// All terms as one pair: `lora_a` `[n_in, rank]`, `lora_b` `[rank, n_out]` with the scales in it,
    /// and the rank.
    pub fn factors(&self) -> (Vec<f32>, Vec<f32>, usize) {
        let rank = self.terms.iter().map(|t| t.rank).sum();
        let lora_a = self.terms.iter().flat_map(|t| t.lora_a).copied().collect();
        let row = |o: usize| {
            self.terms.iter().flat_map(move |t| {
                let row = &t.lora_b[o * t.rank..(o + 1) * t.rank];
                row.iter().map(|b| b * t.scale)
            })
        };
        (lora_a, (0..self.n_out).flat_map(row).collect(), rank)
    }

    /// Adds row `row` of ΔW to `values` `[n_in]`.
    pub fn add_row(&self, row: usize, values: &mut [f32]) {
        for t in &self.terms {
            let b = &t.lora_b[row * t.rank..(row + 1) * t.rank];
            for (b, a) in b.iter().zip(t.lora_a.chunks_exact(self.n_in)) {
                let w = t.scale * b;
                if w != 0.0 {
                    for (v, a) in values.iter_mut().zip(a) {
                        *v += w * a;
                    }
                }
            }
        }
    }
}

/// The updates of `patches`, each at its scale, by tensor. Those that change nothing are left out:
/// their tensors keep their bytes, which encoding again would not leave alone.
///
/// # Errors
/// Patches that do not fit `model`.
pub fn deltas<'a>(
    model: &Weights,
    patches: &'a [(Patch, f32)],
) -> Result<HashMap<&'a str, Delta<'a>>, Error> {
    let mut deltas: HashMap<&str, Delta<'_>> = HashMap::new();
    for (patch, scale) in patches {
        patch.check_shapes(model)?;
        for u in patch.updates.iter().filter(|u| changes(u, *scale)) {
            deltas
                .entry(&u.tensor)
                .or_insert_with(|| Delta::new(u.n_in, u.n_out))
                .push_update(u, *scale)?;
        }
    }
    Ok(deltas)
}

/// Whether an update is more than zeros.
fn changes(u: &Update, scale: f32) -> bool {
    let any = |v: &[f32]| v.iter().any(|x| *x != 0.0);
    scale * u.scale != 0.0 && any(&u.lora_a) && any(&u.lora_b)
}

/// ΔW [n_in, n_out] of `u`, rows of outputs.
#[cfg(test)]
pub(super) fn dense(u: &Update) -> Vec<f64> {
    let mut sum = Delta::new(u.n_in, u.n_out);
    sum.push_update(u, 1.0).expect("its own shape");
    let mut rows = vec![0f32; u.n_in * u.n_out];
    for (o, row) in rows.chunks_mut(u.n_in).enumerate() {
        sum.add_row(o, row);
    }
    rows.into_iter().map(f64::from).collect()
}
