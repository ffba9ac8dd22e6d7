//! Retain subspaces as a file: a site can share what its retain set occupies without sharing a
//! text of it.
//!
//! Per tensor: P `[n_out, k]` in f32 and the compact factor L `[n_out, n]` of C_R = L·Lᵀ in f64,
//! from which RILA is solved for any forget set; single samples cannot be read from either.

use crate::digest::{Digest, of_model, of_tensor};
use crate::error::Error;
use crate::gguf::{GgmlType, Gguf, GgufWriter, Metadata};
use crate::model::OpenModel;
use crate::subspace::RetainBasis;
use std::path::{Path, PathBuf};
use thiserror::Error;

const KIND: &str = "nepenthe.subspace";
const FORMAT: u32 = 1;

/// Why a subspace file is refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum SubspaceFileError {
    #[error("{}: wanted a subspace file of format {FORMAT}, found {found}", path.display())]
    Kind { path: PathBuf, found: String },
    #[error("{}: {name}: wanted {wanted}, found {found}", path.display())]
    Content {
        path: PathBuf,
        name: String,
        wanted: String,
        found: String,
    },
    #[error("{}: made for another model: {tensor} differs", path.display())]
    Base { path: PathBuf, tensor: String },
}

/// Write `bases` for the model. Returns the file's size.
///
/// # Errors
/// An existing `path` unless `force`, a failing disk.
pub fn save(
    path: &Path,
    open: &OpenModel,
    bases: &[RetainBasis],
    force: bool,
) -> Result<u64, Error> {
    let set = open.weights.set();
    let mut meta = Metadata::new();
    meta.set("general.type", KIND);
    meta.set("general.architecture", open.weights.arch()?);
    meta.set("nepenthe.subspace.format", FORMAT);
    meta.set("nepenthe.base.sha256", of_model(set)?.to_string());
    meta.set(
        "nepenthe.subspace.tensor",
        bases.iter().map(|b| b.tensor.clone()).collect::<Vec<_>>(),
    );
    let digests: Result<Vec<String>, Error> = bases
        .iter()
        .map(|b| Ok(of_tensor(set, &b.tensor)?.map_or_else(String::new, |d| d.to_string())))
        .collect();
    meta.set("nepenthe.subspace.sha256", digests?);
    meta.set(
        "nepenthe.subspace.samples",
        bases.iter().map(|b| b.n_samples as u32).collect::<Vec<_>>(),
    );
    meta.set(
        "nepenthe.subspace.rank",
        bases.iter().map(|b| b.rank as u32).collect::<Vec<_>>(),
    );
    meta.set(
        "nepenthe.subspace.wanted",
        bases
            .iter()
            .map(|b| b.rank_wanted as u32)
            .collect::<Vec<_>>(),
    );
    meta.set(
        "nepenthe.subspace.discarded",
        bases.iter().map(|b| b.discarded).collect::<Vec<_>>(),
    );
    let mut file = GgufWriter::new(path, meta);
    for b in bases {
        let n_out = b.n_out as u64;
        let ty = GgmlType::F32;
        if b.rank > 0 {
            let bytes = bytemuck::cast_slice(&b.basis);
            file.tensor_from_bytes(
                &format!("{}.basis", b.tensor),
                &[n_out, b.rank as u64],
                ty,
                bytes,
            )?;
        }
        let n = b.n_factor() as u64;
        file.tensor_from_bytes(
            &format!("{}.eigenvalues", b.tensor),
            &[n],
            ty,
            bytemuck::cast_slice(&b.eigenvalues),
        )?;
        let bytes = bytemuck::cast_slice(&b.factor);
        file.tensor_from_bytes(
            &format!("{}.factor", b.tensor),
            &[n_out, n],
            GgmlType::F64,
            bytes,
        )?;
    }
    Ok(file.save(force)?)
}

/// Read the bases of every adaptable tensor of `open`, in the template's order.
///
/// # Errors
/// A file that is no subspace file, malformed, or for another model.
pub fn open_for(path: &Path, open: &OpenModel) -> Result<Vec<RetainBasis>, Error> {
    let adaptable = open.trace()?.adaptable;
    let gguf = Gguf::open(path)?;
    let meta = gguf.metadata();
    let kind = meta.get_opt::<&str>("general.type")?.unwrap_or("a model");
    let format = meta.get_opt::<u32>("nepenthe.subspace.format")?;
    if kind != KIND || format != Some(FORMAT) {
        return Err(SubspaceFileError::Kind {
            path: path.to_owned(),
            found: format
                .filter(|_| kind == KIND)
                .map_or(kind.to_owned(), |f| f.to_string()),
        }
        .into());
    }
    let names: Vec<&str> = meta.get("nepenthe.subspace.tensor")?;
    let digests: Vec<&str> = meta.get("nepenthe.subspace.sha256")?;
    let samples: Vec<u32> = meta.get("nepenthe.subspace.samples")?;
    let wanted: Vec<u32> = meta.get("nepenthe.subspace.wanted")?;
    let discarded: Vec<f64> = meta.get("nepenthe.subspace.discarded")?;
    for found in [digests.len(), samples.len(), wanted.len(), discarded.len()] {
        if found != names.len() {
            return Err(content(
                path,
                "nepenthe.subspace keys",
                format!("{} entries", names.len()),
                found,
            ));
        }
    }
    adaptable
        .iter()
        .map(|t| {
            let Some(i) = names.iter().position(|n| *n == t.name) else {
                return Err(content(path, &t.name, "a retain basis".into(), "none"));
            };
            if of_tensor(open.weights.set(), &t.name)? != Digest::parse(digests[i]) {
                return Err(SubspaceFileError::Base {
                    path: path.to_owned(),
                    tensor: t.name.clone(),
                }
                .into());
            }
            let basis_name = format!("{}.basis", t.name);
            let (basis, rank) = match gguf.tensor(&basis_name) {
                Some(_) => matrix::<4>(&gguf, &basis_name, GgmlType::F32, t.n_out)?,
                None => (Vec::new(), 0),
            };
            let (factor, n) =
                matrix::<8>(&gguf, &format!("{}.factor", t.name), GgmlType::F64, t.n_out)?;
            let eigen_name = format!("{}.eigenvalues", t.name);
            let (eigenvalues, _) = matrix::<4>(&gguf, &eigen_name, GgmlType::F32, n)?;
            let floats = |bytes: Vec<[u8; 4]>| {
                bytes
                    .into_iter()
                    .map(f32::from_le_bytes)
                    .collect::<Vec<f32>>()
            };
            let basis = floats(basis);
            let factor: Vec<f64> = factor.into_iter().map(f64::from_le_bytes).collect();
            if basis.iter().any(|v| !v.is_finite()) || factor.iter().any(|v| !v.is_finite()) {
                return Err(content(
                    path,
                    &t.name,
                    "finite values".into(),
                    "one that is not",
                ));
            }
            Ok(RetainBasis {
                tensor: t.name.clone(),
                n_out: t.n_out,
                n_samples: samples[i] as usize,
                rank_wanted: wanted[i] as usize,
                rank,
                basis,
                eigenvalues: floats(eigenvalues),
                factor,
                discarded: discarded[i],
            })
        })
        .collect()
}

/// The values of a tensor of `rows` rows and any number of columns, as raw N-byte numbers.
fn matrix<const N: usize>(
    gguf: &Gguf,
    name: &str,
    ty: GgmlType,
    rows: usize,
) -> Result<(Vec<[u8; N]>, usize), Error> {
    let info = gguf.require(name)?;
    if info.ty != ty || info.ne[0] != rows as u64 || info.ne[2] * info.ne[3] != 1 {
        let wanted = format!("{} of [{rows}, any]", ty.name());
        return Err(content(
            gguf.path(),
            name,
            wanted,
            format!("{} of {:?}", info.ty.name(), info.dims()),
        ));
    }
    let bytes = gguf.read_tensor(name)?;
    Ok((bytes.as_chunks::<N>().0.to_vec(), info.ne[1] as usize))
}

fn content(path: &Path, name: &str, wanted: String, found: impl ToString) -> Error {
    SubspaceFileError::Content {
        path: path.to_owned(),
        name: name.to_owned(),
        wanted,
        found: found.to_string(),
    }
    .into()
}
