//! Sketched moments as a file beside the patch, `PATCH.moments.gguf`.
//!
//! Not in the patch: llama.cpp refuses a LoRA file with tensors of other names, and prints every
//! metadata value of it, so that megabytes in an array would be spelled out as text at each load.
//!
//! Per input i, named after the first weight that reads it: `<weight>.basis [n_in, m]` (V; Q8_0,
//! or F16 where rows are not whole blocks), `<weight>.forget [m, m]` and `<weight>.kept [m, m]`
//! (the roots G, F16), `<weight>.rest [n_in, 2]` (the diagonals d of both sides, F16).

use super::sketch::{Half, InputSketch, basis_type};
use crate::digest::Digest;
use crate::error::Error;
use crate::ggml::{dequantize, quantize};
use crate::gguf::{GgmlType, Gguf, GgufWriter, Metadata};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use thiserror::Error;

const KIND: &str = "nepenthe.moments";
const FORMAT: u32 = 1;
const KEY_PATCHES: &str = "nepenthe.moments.patch";
const KEY_TENSORS: &str = "nepenthe.moments.tensor";
const KEY_INPUTS: &str = "nepenthe.moments.input";
const KEY_EXPLAINED: &str = "nepenthe.moments.explained";

/// Why sketched moments are refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum SketchError {
    #[error("{}: wanted second moments of format {FORMAT}, found {found}", path.display())]
    Kind { path: PathBuf, found: String },
    #[error("{}: {name}: wanted {wanted}, found {found}", path.display())]
    Content {
        path: PathBuf,
        name: String,
        wanted: String,
        found: String,
    },
    #[error("{}: wanted second moments of {tensor}, found none", path.display())]
    NoTensor { path: PathBuf, tensor: String },
    #[error("{}: made for other patches than the ones given", path.display())]
    Patches { path: PathBuf },
}

impl SketchError {
    /// Whether the file is well formed but for other patches or another model.
    pub fn is_mismatch(&self) -> bool {
        matches!(self, Self::NoTensor { .. } | Self::Patches { .. })
    }
}

/// Where the moments that belong to a patch are looked for: `p.gguf` has `p.moments.gguf`.
pub fn companion(patch: &Path) -> PathBuf {
    patch.with_extension("moments.gguf")
}

/// Write `sketches`, which were captured with the patches of these digests applied. Returns the
/// file's size.
///
/// # Errors
/// An existing `path` unless `force`, a failing disk.
pub fn save(
    path: &Path,
    sketches: &[InputSketch],
    patches: &[Digest],
    force: bool,
) -> Result<u64, Error> {
    let mut meta = Metadata::new();
    meta.set("general.type", KIND);
    meta.set("nepenthe.moments.format", FORMAT);
    let digests: Vec<String> = patches.iter().map(Digest::to_string).collect();
    meta.set(KEY_PATCHES, digests);
    let of_inputs = || sketches.iter().enumerate();
    let tensors: Vec<String> = of_inputs().flat_map(|(_, s)| s.tensors.clone()).collect();
    let inputs: Vec<u32> = of_inputs()
        .flat_map(|(i, s)| vec![i as u32; s.tensors.len()])
        .collect();
    meta.set(KEY_TENSORS, tensors);
    meta.set(KEY_INPUTS, inputs);
    let explained: Vec<f32> = sketches.iter().map(|s| s.explained as f32).collect();
    meta.set(KEY_EXPLAINED, explained);
    let mut file = GgufWriter::new(path, meta);
    for s in sketches {
        let (n, m) = (s.n_in as u64, s.rank as u64);
        let name = |part: &str| format!("{}.{part}", s.tensors[0]);
        let ty = basis_type(s.n_in);
        // The decoded blocks encode to themselves.
        let basis = quantize(ty.id(), &s.basis, s.n_in, None)?;
        file.tensor(&name("basis"), &[n, m], ty, move |w| {
            Ok(w.write_all(&basis)?)
        })?;
        for (part, half) in ["forget", "kept"].into_iter().zip(&s.halves) {
            let root = halves(&half.root);
            file.tensor(&name(part), &[m, m], GgmlType::F16, move |w| {
                Ok(w.write_all(&root)?)
            })?;
        }
        let rest = [halves(&s.halves[0].rest), halves(&s.halves[1].rest)].concat();
        file.tensor(&name("rest"), &[n, 2], GgmlType::F16, move |w| {
            Ok(w.write_all(&rest)?)
        })?;
    }
    Ok(file.save(force)?)
}

fn halves(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
        .collect()
}

/// Sketched moments from a file; each input is read when asked for.
#[derive(Debug)]
pub struct SketchFile {
    gguf: Gguf,
    /// Weights by input.
    groups: Vec<Vec<String>>,
    index: HashMap<String, usize>,
    explained: Vec<f32>,
    patches: Vec<Digest>,
}

impl SketchFile {
    /// Open `path`.
    ///
    /// # Errors
    /// A malformed file, one of another kind or format.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let gguf = Gguf::open(path)?;
        let meta = gguf.metadata();
        let kind = meta.get_opt::<&str>("general.type")?.unwrap_or("a model");
        let format = meta.get_opt::<u32>("nepenthe.moments.format")?;
        if kind != KIND || format != Some(FORMAT) {
            let found = format.filter(|_| kind == KIND);
            return Err(SketchError::Kind {
                path: path.to_owned(),
                found: found.map_or(kind.to_owned(), |f| f.to_string()),
            }
            .into());
        }
        let bad = |name: &str, wanted: String, found: String| SketchError::Content {
            path: path.to_owned(),
            name: name.to_owned(),
            wanted,
            found,
        };
        let patches = meta
            .get::<Vec<&str>>(KEY_PATCHES)?
            .into_iter()
            .map(|d| {
                Digest::parse(d)
                    .ok_or_else(|| bad(KEY_PATCHES, "SHA-256 digests".into(), format!("{d:?}")))
            })
            .collect::<Result<_, _>>()?;
        let tensors: Vec<String> = meta.get(KEY_TENSORS)?;
        let inputs: Vec<u32> = meta.get(KEY_INPUTS)?;
        let explained: Vec<f32> = meta.get(KEY_EXPLAINED)?;
        if inputs.len() != tensors.len() {
            let wanted = format!("{} entries", tensors.len());
            return Err(bad(KEY_INPUTS, wanted, inputs.len().to_string()).into());
        }
        let mut groups: Vec<Vec<String>> = Vec::new();
        let mut index = HashMap::new();
        for (tensor, input) in tensors.into_iter().zip(inputs) {
            let input = input as usize;
            if input > groups.len() || input + 1 < groups.len() {
                let wanted = "inputs numbered in order".to_owned();
                return Err(bad(KEY_INPUTS, wanted, input.to_string()).into());
            }
            if input == groups.len() {
                groups.push(Vec::new());
            }
            if index.insert(tensor.clone(), input).is_some() {
                return Err(bad(KEY_TENSORS, "each tensor once".into(), tensor).into());
            }
            groups[input].push(tensor);
        }
        if explained.len() != groups.len() {
            let wanted = format!("{} entries", groups.len());
            return Err(bad(KEY_EXPLAINED, wanted, explained.len().to_string()).into());
        }
        Ok(Self {
            groups,
            index,
            explained,
            patches,
            gguf,
        })
    }

    /// Weights in groups that share an input.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &[String]> {
        self.groups.iter().map(Vec::as_slice)
    }

    /// Whether the moments were taken with just these patches applied, in any order.
    ///
    /// # Errors
    /// [`SketchError::Patches`].
    pub fn check_patches(&self, patches: &[Digest]) -> Result<(), SketchError> {
        let sorted = |digests: &[Digest]| {
            let mut digests: Vec<[u8; 32]> = digests.iter().map(|d| d.0).collect();
            digests.sort_unstable();
            digests
        };
        if sorted(&self.patches) == sorted(patches) {
            return Ok(());
        }
        Err(SketchError::Patches {
            path: self.gguf.path().to_owned(),
        })
    }

    /// The moments of the input of `tensor`, of which the model says it is `n_in` wide.
    ///
    /// # Errors
    /// A tensor that is not there, of another shape or type, or with values that are not finite.
    pub fn input(&self, tensor: &str, n_in: usize) -> Result<InputSketch, Error> {
        let path = self.gguf.path();
        let Some(&i) = self.index.get(tensor) else {
            return Err(SketchError::NoTensor {
                path: path.to_owned(),
                tensor: tensor.to_owned(),
            }
            .into());
        };
        let name = |part: &str| format!("{}.{part}", self.groups[i][0]);
        let rank = self.gguf.require(&name("basis"))?.ne[1];
        let rank = usize::try_from(rank).unwrap_or(usize::MAX);
        if rank > n_in {
            return Err(self.content(&name("basis"), format!("[{n_in}, {n_in}] at most"), rank));
        }
        let basis = self.values(&name("basis"), basis_type(n_in), n_in, rank)?;
        let rest = self.values(&name("rest"), GgmlType::F16, n_in, 2)?;
        if let Some(v) = rest.iter().find(|v| **v < 0.0) {
            return Err(self.content(&name("rest"), "values of 0 or more".into(), v));
        }
        let half = |part: &str, rest: &[f32]| -> Result<Half, Error> {
            Ok(Half {
                root: self.values(&name(part), GgmlType::F16, rank, rank)?,
                rest: rest.to_vec(),
            })
        };
        let (forget, kept) = rest.split_at(n_in);
        Ok(InputSketch {
            tensors: self.groups[i].clone(),
            n_in,
            rank,
            explained: f64::from(self.explained[i]),
            halves: [half("forget", forget)?, half("kept", kept)?],
            basis,
        })
    }

    fn values(&self, name: &str, ty: GgmlType, n: usize, m: usize) -> Result<Vec<f32>, Error> {
        let info = self.gguf.require(name)?;
        if info.ty != ty || info.ne != [n as u64, m as u64, 1, 1] {
            let found = format!("{} of {:?}", info.ty.name(), info.dims());
            return Err(self.content(name, format!("{} of [{n}, {m}]", ty.name()), found));
        }
        let mut out = vec![0f32; n * m];
        dequantize(ty.id(), &self.gguf.read_tensor(name)?, &mut out)?;
        match out.iter().find(|v| !v.is_finite()) {
            Some(v) => Err(self.content(name, "finite values".into(), v)),
            None => Ok(out),
        }
    }

    fn content(&self, name: &str, wanted: String, found: impl ToString) -> Error {
        SketchError::Content {
            path: self.gguf.path().to_owned(),
            name: name.to_owned(),
            wanted,
            found: found.to_string(),
        }
        .into()
    }
}
