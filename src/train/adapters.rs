//! The trained state: a low-rank pair per adapted tensor, and what it started from.
//!
//! A tensor's layer computes `W0·x + s·B(A·x) − s·B0(A0·x)`: the reference overwrites W0 with
//! W0 − s·B0·A0, here the second pair is a frozen adapter of its own, so the quantised weights
//! stay as they are. With plain LoRA there is no second pair. Under either there may be frozen
//! terms of another origin ([`Beneath`]), such as a patch that is to be trained on top of.

use crate::error::Error;
use crate::graph::GraphError;
use crate::graph::template::Adaptable;
use crate::graph::trained::{Factor, Factors};
use crate::graph::weights::Weights;
use crate::patch::Update;
use crate::project::NetUpdate;
use crate::rng::SplitMix64;
use crate::subspace::Subspace;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef};

/// Stream numbers of [`SplitMix64::stream`].
const INIT_STREAM: u64 = 1;

/// One adapted tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Index into the template's adaptable tensors.
    pub index: usize,
    /// Which tensor.
    pub tensor: Adaptable,
    /// Rank r.
    pub rank: usize,
    /// A [n_in, r].
    pub a: Vec<f32>,
    /// B [r, n_out].
    pub b: Vec<f32>,
    /// A0 [n_in, r] and B0 [r, n_out], frozen; none for plain LoRA.
    pub initial: Option<(Vec<f32>, Vec<f32>)>,
    /// P [n_out, k]; empty without one.
    pub basis: Vec<f32>,
}

/// A frozen term `scale·B(A·x)` that belongs to the model as far as training is concerned: no part
/// of the net update.
#[derive(Debug, Clone, PartialEq)]
pub struct Beneath {
    /// Index into the template's adaptable tensors.
    pub index: usize,
    /// Rank.
    pub rank: usize,
    /// Scale.
    pub scale: f32,
    /// A [n_in, rank].
    pub a: Vec<f32>,
    /// B [rank, n_out].
    pub b: Vec<f32>,
}

/// All adapted tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs {
    /// In the order of the template.
    pub list: Vec<Pair>,
    /// s.
    pub scale: f32,
    /// What is trained on top of, the model aside. Checkpoints do not hold it.
    pub beneath: Vec<Beneath>,
}

impl Pairs {
    /// RILA: B0 = Q_r, A0 = Q_rᵀ·W0 (ReGLU, section 3), and A, B start there. Tensors without
    /// a single positive eigenvalue are left out.
    ///
    /// # Errors
    /// Weights that cannot be decoded.
    pub fn rila(
        weights: &Weights,
        adaptable: &[Adaptable],
        subspaces: Vec<Subspace>,
        scale: f32,
    ) -> Result<Self, Error> {
        let list = adaptable
            .iter()
            .enumerate()
            .zip(subspaces)
            .filter(|(_, s)| s.rank > 0)
            .map(|((index, tensor), s)| {
                let w = weights.decoded(&tensor.name)?;
                let a0 = product_with_weight(&s.rila, &w, (tensor.n_in, tensor.n_out, s.rank));
                let mut b0 = vec![0.0; s.rank * tensor.n_out];
                for (r, q) in s.rila.chunks_exact(tensor.n_out).enumerate() {
                    for (o, v) in q.iter().enumerate() {
                        b0[o * s.rank + r] = *v;
                    }
                }
                Ok(Pair {
                    index,
                    tensor: tensor.clone(),
                    rank: s.rank,
                    a: a0.clone(),
                    b: b0.clone(),
                    initial: Some((a0, b0)),
                    basis: s.retain.basis,
                })
            })
            .collect::<Result<_, GraphError>>()?;
        Ok(Self {
            list,
            scale,
            beneath: Vec::new(),
        })
    }

    /// Plain LoRA: A uniform in ±1/√n_in, B zero, as PEFT starts it. `bases`: P per tensor for
    /// the constraint, or empty.
    pub fn lora(
        adaptable: &[Adaptable],
        rank: usize,
        scale: f32,
        seed: u64,
        bases: Vec<Vec<f32>>,
    ) -> Self {
        let mut bases = bases.into_iter();
        let list = adaptable
            .iter()
            .enumerate()
            .map(|(index, tensor)| {
                let rank = rank.min(tensor.n_in).min(tensor.n_out);
                let mut rng = SplitMix64::stream(seed, INIT_STREAM << 32 | index as u64);
                let bound = 1.0 / (tensor.n_in as f32).sqrt();
                let a = (0..tensor.n_in * rank)
                    .map(|_| bound * (2.0 * rng.uniform() - 1.0))
                    .collect();
                Pair {
                    index,
                    tensor: tensor.clone(),
                    rank,
                    a,
                    b: vec![0.0; rank * tensor.n_out],
                    initial: None,
                    basis: bases.next().unwrap_or_default(),
                }
            })
            .collect();
        Self {
            list,
            scale,
            beneath: Vec::new(),
        }
    }

    /// The same on top of `updates`, each at a scale of the user's.
    ///
    /// # Errors
    /// A tensor that is not among `adaptable`, or of another shape.
    pub fn on_top_of<'u>(
        mut self,
        updates: impl IntoIterator<Item = (&'u Update, f32)>,
        adaptable: &[Adaptable],
    ) -> Result<Self, Error> {
        for (u, scale) in updates {
            let fits = |t: &Adaptable| (&t.name, t.n_in, t.n_out) == (&u.tensor, u.n_in, u.n_out);
            let Some(index) = adaptable.iter().position(fits) else {
                return Err(Error::Setting {
                    setting: "lora",
                    wanted: "a patch of tensors that can be trained on top of".into(),
                    found: format!("{} [{}, {}]", u.tensor, u.n_in, u.n_out),
                });
            };
            self.beneath.push(Beneath {
                index,
                rank: u.rank,
                scale: scale * u.scale,
                a: u.lora_a.clone(),
                b: u.lora_b.clone(),
            });
        }
        Ok(self)
    }

    /// The tape's factors: all trained pairs, then all frozen ones, then what is beneath.
    pub fn factors(&self) -> Vec<Factor> {
        let factor = |p: &Pair, scale, trainable| Factor {
            tensor: p.index,
            rank: p.rank,
            scale,
            trainable,
        };
        let trained = self.list.iter().map(|p| factor(p, self.scale, true));
        let frozen = self.list.iter().filter(|p| p.initial.is_some());
        let beneath = self.beneath.iter().map(|b| Factor {
            tensor: b.index,
            rank: b.rank,
            scale: b.scale,
            trainable: false,
        });
        trained
            .chain(frozen.map(|p| factor(p, -self.scale, false)))
            .chain(beneath)
            .collect()
    }

    /// Copy every pair into `factors`, made from [`Pairs::factors`].
    ///
    /// # Errors
    /// Never for factors of these pairs.
    pub fn write_all(&self, factors: &mut Factors) -> Result<(), Error> {
        let trained = self.list.iter().map(|p| (&p.a, &p.b));
        let frozen = self.list.iter().filter_map(|p| p.initial.as_ref());
        let frozen = frozen.map(|(a, b)| (a, b));
        let beneath = self.beneath.iter().map(|b| (&b.a, &b.b));
        for (i, (a, b)) in trained.chain(frozen).chain(beneath).enumerate() {
            factors.write(i, a, b)?;
        }
        Ok(())
    }

    /// Let go of all values but the bases, which are in the factors now.
    pub fn hollow(&mut self) {
        for p in &mut self.list {
            (p.a, p.b) = (Vec::new(), Vec::new());
            if let Some(initial) = &mut p.initial {
                *initial = (Vec::new(), Vec::new());
            }
        }
        for b in &mut self.beneath {
            (b.a, b.b) = (Vec::new(), Vec::new());
        }
    }

    /// Take back from `factors` what [`Pairs::hollow`] let go of, as it is now.
    ///
    /// # Errors
    /// Never for factors of these pairs.
    pub fn fill(&mut self, factors: &Factors) -> Result<(), Error> {
        for (i, p) in self.list.iter_mut().enumerate() {
            factors.read(i, &mut p.a, &mut p.b)?;
        }
        let frozen = self.list.iter_mut().filter_map(|p| p.initial.as_mut());
        let frozen = frozen.map(|(a, b)| (a, b));
        let beneath = self.beneath.iter_mut().map(|b| (&mut b.a, &mut b.b));
        let n = factors.list.iter().filter(|f| f.trainable).count();
        for (i, (a, b)) in frozen.chain(beneath).enumerate() {
            factors.read(n + i, a, b)?;
        }
        Ok(())
    }

    /// Lengths of the trained tensors in the tape's order: A, B of the first pair, ...
    pub fn lengths(&self) -> Vec<usize> {
        self.list
            .iter()
            .flat_map(|p| [p.a.len(), p.b.len()])
            .collect()
    }

    /// Σ of the ranks.
    pub fn total_rank(&self) -> usize {
        self.list.iter().map(|p| p.rank).sum()
    }
}

impl Pair {
    /// ΔW under scale s.
    ///
    /// # Errors
    /// Never for a pair whose factors have their shapes.
    pub fn net(&self, scale: f32) -> Result<NetUpdate, Error> {
        let shape = (self.tensor.n_in, self.tensor.n_out, self.rank);
        Ok(match &self.initial {
            Some((a0, b0)) => NetUpdate::from_trained(shape, scale, (&self.a, &self.b), (a0, b0))?,
            None => NetUpdate::new(shape, scale, self.a.clone(), self.b.clone())?,
        })
    }
}

/// Qᵀ·W: `q [n_out, r]`, `w [n_in, n_out]`, result `[n_in, r]`.
fn product_with_weight(
    q: &[f32],
    w: &[f32],
    (n_in, n_out, rank): (usize, usize, usize),
) -> Vec<f32> {
    let mut out = vec![0.0; n_in * rank];
    matmul(
        MatMut::from_column_major_slice_mut(&mut out, n_in, rank),
        Accum::Replace,
        MatRef::from_column_major_slice(w, n_in, n_out),
        MatRef::from_column_major_slice(q, n_out, rank),
        1.0,
        faer::get_global_parallelism(),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_with_weight_is_the_naive_sum() {
        let (n_in, n_out, rank) = (5, 7, 3);
        let w: Vec<f32> = (0..n_in * n_out).map(|i| (i as f32 * 0.37).sin()).collect();
        let q: Vec<f32> = (0..n_out * rank).map(|i| (i as f32 * 0.61).cos()).collect();
        let got = product_with_weight(&q, &w, (n_in, n_out, rank));
        for r in 0..rank {
            for i in 0..n_in {
                let naive: f32 = (0..n_out).map(|o| q[r * n_out + o] * w[o * n_in + i]).sum();
                assert!((got[r * n_in + i] - naive).abs() < 1e-5);
            }
        }
    }
}
