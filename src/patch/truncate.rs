//! An update at the least rank that keeps it within a stated error: B·A is factored by QR of both
//! sides and SVD of the small core ([`NetUpdate::truncate`]), so no [n_in, n_out] matrix is formed.

use super::{Storage, Update};
use crate::error::Error;
use crate::project::NetUpdate;

impl Update {
    /// The update of `tensor` that `net` is.
    pub fn of(tensor: &str, net: &NetUpdate) -> Self {
        let (n_in, n_out, rank) = net.shape();
        Self {
            tensor: tensor.to_owned(),
            n_in,
            n_out,
            rank,
            scale: net.scale(),
            lora_a: net.lora_a().to_vec(),
            lora_b: net.lora_b().to_vec(),
        }
    }

    /// It without its name.
    ///
    /// # Errors
    /// Factors of the wrong size.
    pub fn net(&self) -> Result<NetUpdate, Error> {
        let shape = (self.n_in, self.n_out, self.rank);
        let (a, b) = (self.lora_a.clone(), self.lora_b.clone());
        Ok(NetUpdate::new(shape, self.scale, a, b)?)
    }
}

/// `update` at the least rank that is within `error`·‖ΔW‖ of it and suits `storage`, and how far it
/// is, relative to ‖ΔW‖. The factors' columns are orthogonal, singular values split evenly over both.
///
/// # Errors
/// When the decomposition does not converge.
pub fn truncate(update: &Update, error: f64, storage: Storage) -> Result<(Update, f64), Error> {
    let small = update.net()?.truncate(error, storage.rank_step())?;
    let tensor = &update.tensor;
    Ok((Update::of(tensor, &small.update), small.discarded.sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Diagonal: singular values 4, 2, 1 by construction.
    fn diagonal() -> Update {
        let one = |at: usize, n: usize| (0..n).map(move |i| if i == at { 1.0 } else { 0.0 });
        Update {
            tensor: "w".into(),
            n_in: 5,
            n_out: 4,
            rank: 3,
            scale: 2.0,
            lora_a: (0..3).flat_map(|j| one(j, 5)).collect(),
            lora_b: (0..4)
                .flat_map(|o| (0..3).map(move |j| if o == j { [2.0, 1.0, 0.5][j] } else { 0.0 }))
                .collect(),
        }
    }

    #[test]
    fn the_rank_is_the_least_within_the_error() {
        let whole = diagonal();
        let norm = 21f64.sqrt();
        for (error, rank, found) in [
            (0.0, 3, 0.0),
            (0.9 / norm, 3, 0.0),
            (1.1 / norm, 2, 1.0 / norm),
            (0.49, 1, 5f64.sqrt() / norm),
            (1.0, 1, 5f64.sqrt() / norm),
        ] {
            let (small, off) = truncate(&whole, error, Storage::F16).expect("it converges");
            assert_eq!(small.rank, rank, "error {error}");
            assert!((off - found).abs() < 1e-6, "{off} {found}");
        }
    }
}
