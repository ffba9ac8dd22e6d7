//! The simple merge: adapted tensors are decoded, updated and written in another type (or
//! encoded again in their own), all other tensors are copied as bytes.
//!
//! Encoding a small update into a coarse grid loses most of it (MERGE: about 1% of a typical
//! update survives in Q4_K), so `Keep` is for large updates; F16 keeps everything and grows the
//! file.

use crate::error::Error;
use crate::ggml::{can_encode, dequantize, quantize};
use crate::gguf::{GgmlType, GgufWriter, Metadata};
use crate::graph::weights::Weights;
use crate::patch::Patch;
use crate::patch::delta::deltas;
use crate::patch::merged::record;
use rayon::prelude::*;
use serde::Serialize;

/// Rows updated and encoded at a time by one worker.
const BLOCK_ROWS: usize = 64;
/// Rows in memory at a time.
const CHUNK_ROWS: usize = 4096;

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

/// What the files look like, tensors aside.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    /// Write a split model as one file.
    pub join: bool,
    /// Say in the metadata which patches the file holds. Without it the header keeps its length,
    /// and the file its size and offsets.
    pub record: bool,
}

/// What will be written.
#[derive(Debug)]
pub struct Rewrite<'a> {
    /// One file for each part.
    pub files: Vec<GgufWriter<'a>>,
    /// Adapted tensors: name, type before, type after.
    pub tensors: Vec<(String, String, String)>,
    /// Tensors copied as bytes.
    pub n_copied: usize,
}

/// Plan to merge `patches`, each at its scale, into `model`. A split model stays split, part by
/// part, unless joined.
///
/// # Errors
/// Patches that do not fit, the same patch twice (now or merged before), a type that cannot be
/// written.
pub fn rewrite<'a>(
    model: &'a Weights,
    patches: &'a [(Patch, f32)],
    out_type: OutType,
    form: Form,
) -> Result<Rewrite<'a>, Error> {
    let mut deltas = deltas(model, patches)?;
    let set = model.set();
    let mut files = empty_files(model, patches, form)?;
    let mut tensors = Vec::new();
    let mut n_copied = 0;
    let parts = set.parts().iter().enumerate();
    let all = parts.flat_map(|(no, part)| part.tensors().iter().map(move |t| (no, part, t)));
    for (no, part, info) in all {
        let file = &mut files[if form.join { 0 } else { no }];
        let Some(delta) = deltas.remove(info.name.as_str()) else {
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
                            delta.add_row(o, values);
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
    Ok(Rewrite {
        files,
        tensors,
        n_copied,
    })
}

/// A file for each part of `model` (one in all, if joined), still without tensors.
///
/// # Errors
/// The same patch twice, now or merged before.
pub(super) fn empty_files<'a>(
    model: &'a Weights,
    patches: &[(Patch, f32)],
    form: Form,
) -> Result<Vec<GgufWriter<'a>>, Error> {
    let parts = model.set().parts();
    let mut metas: Vec<Metadata> = parts.iter().map(|p| p.metadata().clone()).collect();
    let mut recorded = metas[0].clone();
    record(model, patches, &mut recorded)?;
    if form.record {
        metas[0] = recorded;
    }
    if form.join {
        metas.truncate(1);
        for key in ["split.no", "split.count", "split.tensors.count"] {
            metas[0].remove(key);
        }
    }
    // Errors name the model: where the files go is not decided here.
    Ok(metas
        .into_iter()
        .zip(parts)
        .map(|(meta, part)| GgufWriter::new(part.path(), meta))
        .collect())
}

fn target_type(from: GgmlType, out: OutType, n_in: usize) -> GgmlType {
    match out {
        OutType::Keep => from,
        OutType::Q8_0 if n_in.is_multiple_of(GgmlType::Q8_0.block_len() as usize) => GgmlType::Q8_0,
        _ => GgmlType::F16,
    }
}
