//! How the factors of a patch are stored: as f16, or as Q8_0 for devices.
//!
//! Q8_0 halves the file again and, more to the point, the time that every token pays for the
//! patch: ggml multiplies a row of B in whole blocks of 32, where in f16 a short row is mostly
//! overhead. Ranks are filled up with zeros to whole blocks; rows of A that are no whole blocks
//! stay f16. The update is then off by about one percent of its norm, of which a share lies in the
//! retain subspace that it was kept out of.

use super::{PatchError, Update};
use crate::error::Error;
use crate::ggml::{dequantize, quantize};
use crate::gguf::GgmlType;
use half::f16;
use serde::Serialize;
use std::path::Path;

/// Elements of a Q8_0 block.
const BLOCK: usize = 32;

/// Type of the factors in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, clap::ValueEnum)]
pub enum Storage {
    /// 16-bit floats
    #[default]
    #[value(name = "f16")]
    F16,
    /// 8-bit blocks of 32: half the size, and faster
    #[value(name = "q8_0")]
    Q8_0,
}

/// A factor as it lies in the file.
pub(super) struct Encoded {
    pub ty: GgmlType,
    pub ne: [u64; 2],
    pub bytes: Vec<u8>,
}

impl Storage {
    /// Ranks it stores without waste are multiples of this.
    pub fn rank_step(self) -> usize {
        match self {
            Self::F16 => 1,
            Self::Q8_0 => BLOCK,
        }
    }

    /// A and scale·B.
    pub(super) fn encode(self, u: &Update, path: &Path) -> Result<[Encoded; 2], Error> {
        let rank = u.rank.next_multiple_of(self.rank_step());
        let mut a = u.lora_a.clone();
        a.resize(rank * u.n_in, 0.0);
        let mut b = vec![0f32; rank * u.n_out];
        for (to, from) in b.chunks_mut(rank).zip(u.lora_b.chunks(u.rank)) {
            for (t, f) in to.iter_mut().zip(from) {
                *t = f * u.scale;
            }
        }
        Ok([
            self.factor(&a, [u.n_in, rank], (u, "lora_a"), path)?,
            self.factor(&b, [rank, u.n_out], (u, "lora_b"), path)?,
        ])
    }

    fn factor(
        self,
        values: &[f32],
        ne: [usize; 2],
        (u, part): (&Update, &'static str),
        path: &Path,
    ) -> Result<Encoded, Error> {
        // Q8_0 holds an f16 scale: what f16 cannot hold overflows there as well.
        if let Some(at) = values.iter().position(|&v| !f16::from_f32(v).is_finite()) {
            return Err(PatchError::NotFinite {
                path: path.to_owned(),
                tensor: format!("{}.{part}", u.tensor),
                at,
            }
            .into());
        }
        let (ty, bytes) = if self == Self::Q8_0 && ne[0].is_multiple_of(BLOCK) {
            let ty = GgmlType::Q8_0;
            (ty, quantize(ty.id(), values, ne[0], None)?)
        } else {
            let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            (GgmlType::F16, bytemuck::cast_slice(&halves).to_vec())
        };
        Ok(Encoded {
            ty,
            ne: ne.map(|n| n as u64),
            bytes,
        })
    }

    /// `update` as it reads after being stored.
    ///
    /// # Errors
    /// A value outside f16.
    pub fn rounded(self, update: &Update) -> Result<Update, Error> {
        let [a, b] = self.encode(update, Path::new(""))?;
        let decode = |e: &Encoded| -> Result<Vec<f32>, Error> {
            let mut out = vec![0f32; (e.ne[0] * e.ne[1]) as usize];
            dequantize(e.ty.id(), &e.bytes, &mut out)?;
            Ok(out)
        };
        Ok(Update {
            tensor: update.tensor.clone(),
            rank: a.ne[1] as usize,
            scale: 1.0,
            lora_a: decode(&a)?,
            lora_b: decode(&b)?,
            ..*update
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patch::Patch;
    use crate::patch::delta::dense;
    use crate::rng::SplitMix64;

    fn update(n_in: usize, rank: usize) -> Update {
        let mut rng = SplitMix64(rank as u64);
        let mut noise = |n: usize| (0..n).map(|_| rng.normal()).collect();
        Update {
            tensor: "w".into(),
            n_in,
            n_out: 48,
            rank,
            scale: 0.5,
            lora_a: noise(n_in * rank),
            lora_b: noise(48 * rank),
        }
    }

    /// What is read back is what [`Storage::rounded`] says, near what was meant, in the types and
    /// ranks that were promised.
    #[test]
    fn a_file_holds_what_was_rounded() {
        let dir = tempfile::tempdir().expect("a directory");
        for (storage, n_in, rank, stored, most) in [
            (Storage::F16, 64, 20, 20, 1e-3),
            (Storage::Q8_0, 64, 20, 32, 2e-2),
            (Storage::Q8_0, 64, 64, 64, 2e-2),
            (Storage::Q8_0, 40, 20, 32, 2e-2),
        ] {
            let path = dir.path().join(format!("{storage:?}.{n_in}.{rank}.gguf"));
            let whole = update(n_in, rank);
            let patch = Patch {
                arch: "llama".into(),
                info: None,
                updates: vec![whole.clone()],
                path: path.clone(),
            };
            patch.save_as(&path, false, storage).expect("room");
            let read = Patch::open(&path).expect("just written").updates.remove(0);
            assert_eq!(read, storage.rounded(&whole).expect("small numbers"));
            assert_eq!(read.rank, stored);
            let (found, wanted) = (dense(&read), dense(&whole));
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
            let off = norm(&mut found.iter().zip(&wanted).map(|(a, b)| a - b));
            let off = off / norm(&mut wanted.iter().copied());
            assert!(off < most && off > 0.0, "{storage:?}: {off}");
        }
    }

    #[test]
    fn numbers_past_f16_are_refused() {
        let mut big = update(64, 32);
        big.lora_b[5] = 1e6;
        for storage in [Storage::F16, Storage::Q8_0] {
            let e = storage.rounded(&big).expect_err("too large");
            assert!(e.to_string().contains("w.lora_b"), "{e}");
        }
    }
}
