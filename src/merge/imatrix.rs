//! llama.cpp's importance matrices as diagonal second moments.
//!
//! A GGUF with `general.type` = `imatrix` holds, for each weight, `<weight>.in_sum2 [n_in, n_mat]`
//! (Σ x² over tokens, f32) and `<weight>.counts [1, n_mat]` (tokens, f32); n_mat above 1 are the
//! experts of a layer. The older `.dat` files are no GGUF and are refused as such.
//!
//! What the diagonal costs: error feedback works through the off-diagonal entries alone. On a
//! fixed grid a diagonal H leaves every weight to its nearest code, whatever its importance, so
//! an imatrix gives same-scale rounding there (it keeps almost nothing of a small update). It
//! helps where blocks get fresh scales, and as a measure of what a tensor's error costs.

use crate::error::Error;
use crate::gguf::{GgmlType, Gguf, TensorInfo};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use thiserror::Error;

const KIND: &str = "imatrix";

/// Why an importance matrix is refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ImatrixError {
    #[error("{}: wanted a GGUF of type {KIND}, found {found}", path.display())]
    Kind { path: PathBuf, found: String },
    #[error("{}: wanted tensors that end in .in_sum2, found none", path.display())]
    Empty { path: PathBuf },
    #[error("{}: tensor {found}: wanted {wanted} beside it, found none", path.display())]
    Unpaired {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    #[error("{}: tensor {tensor}: wanted {wanted}, found {found}", path.display())]
    Content {
        path: PathBuf,
        tensor: String,
        wanted: String,
        found: String,
    },
    #[error("{}: wanted inputs of {tensor}, found none", path.display())]
    NoTensor { path: PathBuf, tensor: String },
    #[error(
        "{}: tensor {tensor}: wanted one matrix of width {n_in}, found {n_mat} of width {width}",
        path.display()
    )]
    Width {
        path: PathBuf,
        tensor: String,
        n_in: usize,
        width: usize,
        n_mat: usize,
    },
}

/// Mean x² of one weight's inputs.
#[derive(Debug, Clone, PartialEq)]
struct Diagonal {
    n_in: usize,
    /// [n_in, n_mat].
    values: Vec<f32>,
}

/// An importance matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Imatrix {
    path: PathBuf,
    diagonals: HashMap<String, Diagonal>,
    /// Names of the texts it was computed from, as its maker gave them.
    pub datasets: Vec<String>,
}

impl Imatrix {
    /// Read `path`.
    ///
    /// # Errors
    /// A malformed file, one of another kind, sums without counts, values no sum of squares can
    /// have.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let gguf = Gguf::open(path)?;
        let meta = gguf.metadata();
        let kind = meta.get_opt::<&str>("general.type")?.unwrap_or("a model");
        if kind != KIND {
            return Err(ImatrixError::Kind {
                path: path.to_owned(),
                found: kind.to_owned(),
            }
            .into());
        }
        let datasets = meta.get_opt("imatrix.datasets")?.unwrap_or_default();
        let mut diagonals = HashMap::new();
        for sums in gguf.tensors() {
            if let Some(name) = sums.name.strip_suffix(".counts") {
                partner(&gguf, sums, &format!("{name}.in_sum2"))?;
            }
            let Some(name) = sums.name.strip_suffix(".in_sum2") else {
                continue;
            };
            let counts = partner(&gguf, sums, &format!("{name}.counts"))?;
            let diagonal = read(&gguf, sums, counts)?;
            diagonals.insert(name.to_owned(), diagonal);
        }
        if diagonals.is_empty() {
            return Err(ImatrixError::Empty {
                path: path.to_owned(),
            }
            .into());
        }
        Ok(Self {
            path: path.to_owned(),
            diagonals,
            datasets,
        })
    }

    /// Mean x² of the inputs of `tensor`, `[n_in]`.
    ///
    /// # Errors
    /// [`ImatrixError::NoTensor`], also where the calibration never reached the tensor, and
    /// [`ImatrixError::Width`].
    pub fn diagonal(&self, tensor: &str, n_in: usize) -> Result<&[f32], ImatrixError> {
        let Some(d) = self.diagonals.get(tensor) else {
            return Err(self.no_tensor(tensor));
        };
        let n_mat = d.values.len() / d.n_in;
        if (d.n_in, n_mat) != (n_in, 1) {
            return Err(ImatrixError::Width {
                path: self.path.clone(),
                tensor: tensor.to_owned(),
                n_in,
                width: d.n_in,
                n_mat,
            });
        }
        if d.values.iter().all(|&v| v == 0.0) {
            return Err(self.no_tensor(tensor));
        }
        Ok(&d.values)
    }

    /// The same as a dense H `[n_in, n_in]`, scaled to a mean diagonal of 1.
    ///
    /// # Errors
    /// As [`diagonal`](Self::diagonal).
    pub fn dense(&self, tensor: &str, n_in: usize) -> Result<Vec<f32>, ImatrixError> {
        let diagonal = self.normalised(tensor, n_in)?;
        let mut h = vec![0f32; n_in * n_in];
        for (i, v) in diagonal.into_iter().enumerate() {
            h[i * (n_in + 1)] = v;
        }
        Ok(h)
    }

    /// [`diagonal`](Self::diagonal) with a mean of 1.
    pub(super) fn normalised(&self, tensor: &str, n_in: usize) -> Result<Vec<f32>, ImatrixError> {
        let diagonal = self.diagonal(tensor, n_in)?;
        let trace: f64 = diagonal.iter().map(|&v| f64::from(v)).sum();
        let scaled = |&v: &f32| (f64::from(v) * n_in as f64 / trace) as f32;
        Ok(diagonal.iter().map(scaled).collect())
    }

    fn no_tensor(&self, tensor: &str) -> ImatrixError {
        ImatrixError::NoTensor {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
        }
    }
}

fn partner<'a>(gguf: &'a Gguf, of: &TensorInfo, name: &str) -> Result<&'a TensorInfo, Error> {
    gguf.tensor(name).ok_or_else(|| {
        ImatrixError::Unpaired {
            path: gguf.path().to_owned(),
            found: of.name.clone(),
            wanted: name.to_owned(),
        }
        .into()
    })
}

fn read(gguf: &Gguf, sums: &TensorInfo, counts: &TensorInfo) -> Result<Diagonal, Error> {
    let bad = |t: &TensorInfo, wanted: String, found: String| ImatrixError::Content {
        path: gguf.path().to_owned(),
        tensor: t.name.clone(),
        wanted,
        found,
    };
    let shape = |t: &TensorInfo| format!("{} of {:?}", t.ty.name(), t.dims());
    let (n_in, n_mat) = (sums.ne[0], sums.ne[1]);
    if sums.ty != GgmlType::F32 || sums.ne[2..] != [1, 1] {
        return Err(bad(sums, "F32 of [n_in, n_mat]".into(), shape(sums)).into());
    }
    if counts.ty != GgmlType::F32 || counts.n_elements() != n_mat {
        return Err(bad(counts, format!("F32 of [1, {n_mat}]"), shape(counts)).into());
    }
    let (mut values, counted) = (floats(gguf, sums)?, floats(gguf, counts)?);
    if let Some(v) = values.iter().find(|v| !v.is_finite() || **v < 0.0) {
        let wanted = "finite sums of squares".to_owned();
        return Err(bad(sums, wanted, v.to_string()).into());
    }
    if let Some(c) = counted.iter().find(|c| !c.is_finite() || **c < 0.0) {
        let wanted = "finite counts of 0 or more".to_owned();
        return Err(bad(counts, wanted, c.to_string()).into());
    }
    for (row, &count) in values.chunks_exact_mut(n_in as usize).zip(&counted) {
        // A count of 0 is an input that the calibration never reached: all zeros says so.
        let scale = if count > 0.0 { 1.0 / count } else { 0.0 };
        row.iter_mut().for_each(|v| *v *= scale);
    }
    Ok(Diagonal {
        n_in: n_in as usize,
        values,
    })
}

fn floats(gguf: &Gguf, t: &TensorInfo) -> Result<Vec<f32>, Error> {
    let bytes = gguf.read_tensor(&t.name)?;
    let (numbers, _) = bytes.as_chunks::<4>();
    Ok(numbers.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgufWriter, Metadata};

    /// Tensors of a small file: name, shape, values.
    type Tensors<'a> = &'a [(&'a str, &'a [u64], &'a [f32])];

    fn opened(kind: &str, tensors: Tensors<'_>) -> Result<Imatrix, Error> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("imatrix.gguf");
        let mut meta = Metadata::new();
        meta.set("general.type", kind);
        meta.set("imatrix.datasets", vec!["wiki.txt"]);
        meta.set("imatrix.chunk_count", 3u32);
        meta.set("imatrix.chunk_size", 512u32);
        let mut file = GgufWriter::new(&path, meta);
        for (name, ne, values) in tensors {
            let bytes = bytemuck::cast_slice(values);
            file.tensor_from_bytes(name, ne, GgmlType::F32, bytes)
                .expect("a good tensor");
        }
        file.save(false).expect("saved");
        Imatrix::open(&path)
    }

    const W: &str = "blk.0.ffn_up.weight";
    const SUMS: (&str, &[u64], &[f32]) = ("blk.0.ffn_up.weight.in_sum2", &[3, 1], &[2.0, 4.0, 6.0]);
    const COUNTS: (&str, &[u64], &[f32]) = ("blk.0.ffn_up.weight.counts", &[1, 1], &[2.0]);

    #[test]
    fn sums_are_divided_by_counts() {
        let m = opened("imatrix", &[SUMS, COUNTS]).expect("a good file");
        assert_eq!(m.datasets, ["wiki.txt"]);
        assert_eq!(m.diagonal(W, 3), Ok(&[1.0, 2.0, 3.0][..]));
        let h = m.dense(W, 3).expect("dense");
        assert_eq!(h, [0.5, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.5]);
        let message = |e: ImatrixError| e.to_string();
        assert!(message(m.diagonal(W, 4).expect_err("another width")).contains("width 4"));
        assert!(message(m.diagonal("x", 3).expect_err("unknown")).contains("inputs of x"));
    }

    #[test]
    fn tensors_that_calibration_never_reached_are_missing() {
        let unseen = ("blk.0.ffn_up.weight.counts", &[1, 1][..], &[0.0][..]);
        let m = opened("imatrix", &[SUMS, unseen]).expect("a good file");
        assert!(matches!(
            m.diagonal(W, 3),
            Err(ImatrixError::NoTensor { .. })
        ));
        let experts = [
            ("e.in_sum2", &[2, 2][..], &[1.0, 1.0, 1.0, 1.0][..]),
            ("e.counts", &[1, 2][..], &[1.0, 1.0][..]),
        ];
        let m = opened("imatrix", &experts).expect("a good file");
        assert!(matches!(
            m.diagonal("e", 2),
            Err(ImatrixError::Width { n_mat: 2, .. })
        ));
    }

    #[test]
    fn hostile_files_are_refused_by_field() {
        let refused = |kind: &str, tensors: Tensors<'_>, part: &str| {
            let e = opened(kind, tensors).expect_err("a hostile file");
            assert_eq!(e.exit_code(), 3, "{e}");
            assert!(e.to_string().contains(part), "{e}");
        };
        refused("model", &[SUMS, COUNTS], "type imatrix, found model");
        refused("imatrix", &[], "found none");
        refused("imatrix", &[SUMS], "counts beside it");
        refused("imatrix", &[COUNTS], "in_sum2 beside it");
        let negative = (
            "blk.0.ffn_up.weight.in_sum2",
            &[3, 1][..],
            &[1.0, -1.0, 1.0][..],
        );
        refused("imatrix", &[negative, COUNTS], "sums of squares, found -1");
        let infinite = (
            "blk.0.ffn_up.weight.in_sum2",
            &[1, 1][..],
            &[f32::INFINITY][..],
        );
        refused("imatrix", &[infinite, COUNTS], "found inf");
        let nan = ("blk.0.ffn_up.weight.counts", &[1, 1][..], &[f32::NAN][..]);
        refused("imatrix", &[SUMS, nan], "found NaN");
        let many = ("blk.0.ffn_up.weight.counts", &[2, 1][..], &[1.0, 1.0][..]);
        refused("imatrix", &[SUMS, many], "F32 of [1, 1]");
        let cube = (
            "blk.0.ffn_up.weight.in_sum2",
            &[1, 1, 2][..],
            &[1.0, 1.0][..],
        );
        refused("imatrix", &[cube, COUNTS], "[n_in, n_mat]");
    }
}
