//! The net update of every tensor, and where it lives.

use super::adapters::Pairs;
use super::config::Constraint;
use crate::error::Error;
use crate::model::OpenModel;
use crate::patch::{TensorInfo, Update, digest_of};
use crate::project::NetUpdate;
use rayon::prelude::*;

/// The net update of one tensor and where it lives.
#[derive(Debug, Clone)]
pub struct NetReport {
    /// Tensor name.
    pub tensor: String,
    /// ΔW in factors.
    pub net: NetUpdate,
    /// ‖ΔW‖.
    pub norm: f64,
    /// ‖ΔW‖/‖W‖.
    pub relative_norm: f64,
    /// ‖PᵀΔW‖/‖ΔW‖.
    pub retain_fraction: f64,
    /// Rank of the pair.
    pub rank: usize,
    /// Size of P.
    pub retain_rank: usize,
}

impl NetReport {
    /// ΔW in the balanced factors of its singular value decomposition: B·A − B0·A0 nearly cancels,
    /// and 16 bits of each would keep few of the difference.
    ///
    /// # Errors
    /// When the decomposition does not converge.
    pub fn update(&self) -> Result<Update, Error> {
        let (_, _, rank) = self.net.shape();
        Ok(Update::of(&self.tensor, &self.net.refactor(rank)?.update))
    }

    /// As a patch records it.
    ///
    /// # Errors
    /// A weight that cannot be read.
    pub fn info(&self, open: &OpenModel) -> Result<TensorInfo, Error> {
        Ok(TensorInfo {
            name: self.tensor.clone(),
            digest: digest_of(&open.weights, &self.tensor)?,
            rank: self.rank as u32,
            retain_rank: self.retain_rank as u32,
            norm: self.norm as f32,
            relative_norm: self.relative_norm as f32,
            retain_fraction: self.retain_fraction as f32,
        })
    }
}

/// Net updates of all pairs, projected once more where the constraint is hard (rounding of the
/// factors in f32 leaves about 1e-7 of them in P). Each pair goes as its net update comes.
///
/// # Errors
/// Weights that cannot be decoded.
pub fn net_updates(
    open: &OpenModel,
    pairs: Pairs,
    constraint: Constraint,
) -> Result<Vec<NetReport>, Error> {
    let scale = pairs.scale;
    pairs
        .list
        .into_par_iter()
        .with_max_len(1)
        .map(|pair| {
            let mut net = pair.net(scale)?;
            if constraint == Constraint::Project && !pair.basis.is_empty() {
                net.project_output(&pair.basis)?;
            }
            let w_norm = open.weights.sum_of_squares(&pair.tensor.name)?.sqrt();
            let norm = net.norm();
            Ok(NetReport {
                norm,
                relative_norm: if w_norm > 0.0 { norm / w_norm } else { 0.0 },
                retain_fraction: net.retain_fraction(&pair.basis)?,
                rank: pair.rank,
                retain_rank: pair.basis.len() / pair.tensor.n_out,
                tensor: pair.tensor.name,
                net,
            })
        })
        .collect()
}
