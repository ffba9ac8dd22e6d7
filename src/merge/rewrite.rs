//! The simple merge: adapted tensors are decoded, updated and written in another type (or
//! encoded again in their own), all other tensors are copied as bytes.
//!
//! Encoding a small update into a coarse grid loses most of it (MERGE: about 1% of a typical
//! update survives in Q4_K), so `Keep` is for large updates; F16 keeps everything and grows the
//! file.

use crate::digest::{Digest, of_file, of_model};
use crate::error::Error;
use crate::ggml::{can_encode, dequantize, quantize};
use crate::gguf::{GgmlType, GgufWriter, Metadata};
use crate::graph::weights::Weights;
use crate::patch::{Patch, PatchError};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::HashMap;
use std::path::Path;

/// Rows updated and encoded at a time by one worker.
const BLOCK_ROWS: usize = 64;
/// Rows in memory at a time.
const CHUNK_ROWS: usize = 4096;
const KEY_NAMES: &str = "nepenthe.merged.name";
const KEY_DIGESTS: &str = "nepenthe.merged.sha256";
const KEY_SCALES: &str = "nepenthe.merged.scale";
const KEY_BASE: &str = "nepenthe.merged.base";

/// What adapted tensors are written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OutType {
    /// 16-bit floats: the update is kept whole
    F16,
    /// 8-bit blocks of 32 (F16 where rows are no multiple of 32)
    #[value(name = "q8_0")]
    Q8_0,
    /// Their own type, encoded again
    Keep,
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct Rewritten {
    /// Adapted tensors: name, type before, type after.
    pub tensors: Vec<(String, String, String)>,
    /// Tensors copied as bytes.
    pub n_copied: usize,
    /// Size of the written file, bytes.
    pub file_len: u64,
}

/// Merge `patches`, each at its scale, into `model` and write the result to `out`. A split
/// model becomes one file.
///
/// # Errors
/// Patches that do not fit, the same patch twice (now or merged before), a type that cannot be
/// written, an existing `out` unless `force`, a failing disk.
pub fn rewrite(
    model: &Weights,
    patches: &[(Patch, f32)],
    out_type: OutType,
    out: &Path,
    force: bool,
) -> Result<Rewritten, Error> {
    for (patch, _) in patches {
        patch.check_shapes(model)?;
    }
    let set = model.set();
    let mut meta = set.metadata().clone();
    record(model, patches, &mut meta)?;
    for key in ["split.no", "split.count", "split.tensors.count"] {
        meta.remove(key);
    }
    let mut updates: HashMap<&str, Vec<(&crate::patch::Update, f32)>> = HashMap::new();
    for (patch, scale) in patches {
        for u in &patch.updates {
            updates
                .entry(&u.tensor)
                .or_default()
                .push((u, scale * u.scale));
        }
    }
    let mut tensors = Vec::new();
    let mut n_copied = 0;
    let mut file = GgufWriter::new(out, meta);
    for (part, info) in set.tensors() {
        let Some(updates) = updates.get(info.name.as_str()) else {
            file.copy_tensor(part, &info.name)?;
            n_copied += 1;
            continue;
        };
        let n_in = info.ne[0] as usize;
        let to = target_type(info.ty, out_type, n_in);
        if !can_encode(to.id()) {
            return Err(Error::Setting {
                setting: "out-type",
                wanted: format!("a type ggml can write for {}", info.name),
                found: to.name().into(),
            });
        }
        tensors.push((
            info.name.clone(),
            info.ty.name().to_owned(),
            to.name().to_owned(),
        ));
        let (from, row_bytes, n_rows) =
            (info.ty, info.row_bytes() as usize, info.n_rows() as usize);
        let bytes = model.bytes(&info.name)?;
        let updates = updates.clone();
        file.tensor(&info.name, info.dims(), to, move |w| {
            for first in (0..n_rows).step_by(CHUNK_ROWS) {
                let last = (first + CHUNK_ROWS).min(n_rows);
                let encoded: Result<Vec<Vec<u8>>, crate::ggml::QuantError> = (first..last)
                    .into_par_iter()
                    .step_by(BLOCK_ROWS)
                    .map(|row| {
                        let end = (row + BLOCK_ROWS).min(last);
                        let mut values = vec![0f32; (end - row) * n_in];
                        for (o, values) in (row..end).zip(values.chunks_exact_mut(n_in)) {
                            dequantize(
                                from.id(),
                                &bytes[o * row_bytes..(o + 1) * row_bytes],
                                values,
                            )?;
                            for (u, scale) in &updates {
                                add_row(u, *scale, o, values);
                            }
                        }
                        quantize(to.id(), &values, n_in, None)
                    })
                    .collect();
                for block in encoded? {
                    w.write_all(&block)?;
                }
            }
            Ok(())
        })?;
    }
    let file_len = file.save(force)?;
    Ok(Rewritten {
        tensors,
        n_copied,
        file_len,
    })
}

/// Adds `scale·(B·A)[row]` to `values [n_in]`.
fn add_row(u: &crate::patch::Update, scale: f32, row: usize, values: &mut [f32]) {
    let b = &u.lora_b[row * u.rank..(row + 1) * u.rank];
    for (b, a) in b.iter().zip(u.lora_a.chunks_exact(u.n_in)) {
        let w = scale * b;
        for (v, a) in values.iter_mut().zip(a) {
            *v += w * a;
        }
    }
}

fn target_type(from: GgmlType, out: OutType, n_in: usize) -> GgmlType {
    match out {
        OutType::Keep => from,
        OutType::Q8_0 if n_in.is_multiple_of(GgmlType::Q8_0.block_len() as usize) => GgmlType::Q8_0,
        _ => GgmlType::F16,
    }
}

/// Write down in `meta` what was merged; refuse a patch that is in the file already.
///
/// # Errors
/// [`PatchError::Merged`].
fn record(model: &Weights, patches: &[(Patch, f32)], meta: &mut Metadata) -> Result<(), Error> {
    let mut names: Vec<String> = meta.get_opt(KEY_NAMES)?.unwrap_or_default();
    let mut digests: Vec<String> = meta.get_opt(KEY_DIGESTS)?.unwrap_or_default();
    let mut scales: Vec<f32> = meta.get_opt(KEY_SCALES)?.unwrap_or_default();
    for (patch, scale) in patches {
        let digest: Digest = of_file(&patch.path)?;
        if digests.contains(&digest.to_string()) {
            return Err(PatchError::Merged {
                path: patch.path.clone(),
                model: model.set().parts()[0].path().to_owned(),
            }
            .into());
        }
        let name = patch.path.file_name().unwrap_or_default();
        names.push(name.to_string_lossy().into_owned());
        digests.push(digest.to_string());
        scales.push(*scale);
    }
    if meta.value(KEY_BASE).is_none() {
        meta.set(KEY_BASE, of_model(model.set())?.to_string());
    }
    meta.set(KEY_NAMES, names);
    meta.set(KEY_DIGESTS, digests);
    meta.set(KEY_SCALES, scales);
    Ok(())
}
