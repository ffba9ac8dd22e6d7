//! What differs between two GGUF models, tensor by tensor, a megabyte at a time.
//!
//! Per tensor of both: bytes that differ; where the type separates them, codes and scale bytes
//! that differ (`codes.rs` says how); decoded values that differ; and ‖A − B‖/‖A‖ (Frobenius, f64
//! sums over f32 values).

mod codes;
#[cfg(test)]
mod tests;

use crate::error::Error;
use crate::ggml::dequantize;
use crate::gguf::{Gguf, GgufSet, TensorInfo, Value};
use codes::Layout;
use serde::Serialize;
use std::collections::HashSet;

/// Elements compared at a time.
const CHUNK: u64 = 1 << 18;

/// What differs between model A and model B.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Diff {
    /// No byte of metadata or tensors differs; the files may still be laid out differently.
    pub identical: bool,
    /// Keys that only B has.
    pub keys_added: Vec<String>,
    /// Keys that only A has.
    pub keys_removed: Vec<String>,
    /// Keys with another value in B.
    pub keys_changed: Vec<String>,
    /// Tensors that only B has.
    pub tensors_added: Vec<String>,
    /// Tensors that only A has.
    pub tensors_removed: Vec<String>,
    /// Tensors of both that are not the same, in A's order.
    pub tensors: Vec<TensorDiff>,
    /// Tensors of both that are the same.
    pub n_same: usize,
    /// Sums over the tensors of both.
    pub total: Total,
}

/// Sums over all tensors that both models have.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Total {
    /// Their bytes in A.
    pub bytes: u64,
    /// Bytes that differ in tensors of one type.
    pub bytes_changed: u64,
    /// Codes in the tensors that are not the same and whose type separates them.
    pub codes: u64,
    /// Codes that differ.
    pub codes_changed: u64,
}

/// One tensor that is not the same in both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorDiff {
    /// Its name.
    pub name: String,
    /// Type in A.
    pub type_a: String,
    /// Type in B.
    pub type_b: String,
    /// Shape in A, `ne[0]` first.
    pub shape_a: Vec<u64>,
    /// Shape in B.
    pub shape_b: Vec<u64>,
    /// Elements, in A.
    pub n_elements: u64,
    /// Bytes, in A.
    pub n_bytes: u64,
    /// Bytes that differ; none for another type or shape.
    pub bytes_changed: Option<u64>,
    /// Codes that differ; none where the type does not separate them from the scales.
    pub codes_changed: Option<u64>,
    /// Bytes of scales and minima that differ; none likewise.
    pub scale_bytes_changed: Option<u64>,
    /// Decoded values that differ; none for another shape or a type without decoder.
    pub values_changed: Option<u64>,
    /// ‖A − B‖/‖A‖; none likewise, or when A is zero.
    pub relative_norm: Option<f64>,
}

impl TensorDiff {
    /// Whether type or shape differ.
    pub fn is_retyped(&self) -> bool {
        self.type_a != self.type_b || self.shape_a != self.shape_b
    }
}

/// Compare two models, each in one file or all its parts.
///
/// # Errors
/// A file that cannot be read.
pub fn diff(a: &GgufSet, b: &GgufSet) -> Result<Diff, Error> {
    let mut out = Diff::default();
    let (keys_a, keys_b) = (keys(a), keys(b));
    for (key, value) in &keys_a {
        match keys_b.iter().find(|(k, _)| k == key) {
            None => out.keys_removed.push(key.to_string()),
            Some((_, other)) if !same(value, other) => out.keys_changed.push(key.to_string()),
            Some(_) => {}
        }
    }
    let known: HashSet<&str> = keys_a.iter().map(|(k, _)| *k).collect();
    let added = keys_b.iter().filter(|(k, _)| !known.contains(k));
    out.keys_added = added.map(|(k, _)| k.to_string()).collect();
    for (part, info) in a.tensors() {
        let Some((other, twin)) = b.tensor(&info.name) else {
            out.tensors_removed.push(info.name.clone());
            continue;
        };
        out.total.bytes += info.n_bytes;
        match compare(part, info, other, twin)? {
            None => out.n_same += 1,
            Some(found) => {
                out.total.bytes_changed += found.bytes_changed.unwrap_or(0);
                if let Some(n) = found.codes_changed {
                    out.total.codes += info.n_elements();
                    out.total.codes_changed += n;
                }
                out.tensors.push(found);
            }
        }
    }
    let added = b.tensors().filter(|(_, t)| a.tensor(&t.name).is_none());
    out.tensors_added = added.map(|(_, t)| t.name.clone()).collect();
    out.identical = out.tensors.is_empty()
        && [&out.keys_added, &out.keys_removed, &out.keys_changed]
            .into_iter()
            .chain([&out.tensors_added, &out.tensors_removed])
            .all(Vec::is_empty);
    Ok(out)
}

/// Of all parts, less what says only how the model is split.
fn keys(set: &GgufSet) -> Vec<(&str, &Value)> {
    let all = set.parts().iter().flat_map(|part| part.metadata().iter());
    let mut seen = HashSet::new();
    all.filter(|(k, _)| !k.starts_with("split.") && seen.insert(*k))
        .collect()
}

/// NaN equals itself here: the question is whether the files differ.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::F32(a), Value::F32(b)) => a.to_bits() == b.to_bits(),
        (Value::F64(a), Value::F64(b)) => a.to_bits() == b.to_bits(),
        _ => a == b,
    }
}

/// `None` when nothing differs.
fn compare(
    a: &Gguf,
    info: &TensorInfo,
    b: &Gguf,
    twin: &TensorInfo,
) -> Result<Option<TensorDiff>, Error> {
    let mut out = TensorDiff {
        name: info.name.clone(),
        type_a: info.ty.name().to_owned(),
        type_b: twin.ty.name().to_owned(),
        shape_a: info.dims().to_vec(),
        shape_b: twin.dims().to_vec(),
        n_elements: info.n_elements(),
        n_bytes: info.n_bytes,
        bytes_changed: None,
        codes_changed: None,
        scale_bytes_changed: None,
        values_changed: None,
        relative_norm: None,
    };
    if info.ne != twin.ne {
        return Ok(Some(out));
    }
    let one_type = info.ty == twin.ty;
    let layout = Layout::of(info.ty).filter(|_| one_type);
    let mut sums = Sums::default();
    // Chunks of whole blocks of both types: all block lengths divide 256.
    let n = info.n_elements();
    let mut at = 0;
    while at < n {
        let len = CHUNK.min(n - at);
        let x = read(a, info, at, len)?;
        let y = read(b, twin, at, len)?;
        sums.add(info, &x, twin, &y, len as usize, layout.as_ref());
        at += len;
    }
    if one_type {
        if sums.bytes == 0 {
            return Ok(None);
        }
        out.bytes_changed = Some(sums.bytes);
    }
    if layout.is_some() {
        out.codes_changed = Some(sums.codes);
        out.scale_bytes_changed = Some(sums.scale_bytes);
    }
    if !sums.undecoded {
        out.values_changed = Some(sums.values);
        let ratio = (sums.difference / sums.square).sqrt();
        out.relative_norm = Some(ratio).filter(|r| r.is_finite());
    }
    Ok(Some(out))
}

/// The bytes of `len` elements from element `at`, both whole blocks.
fn read(part: &Gguf, info: &TensorInfo, at: u64, len: u64) -> Result<Vec<u8>, Error> {
    let bytes = |n: u64| n / info.ty.block_len() * info.ty.block_bytes();
    let mut out = vec![0; bytes(len) as usize];
    part.read_tensor_at(&info.name, bytes(at), &mut out)?;
    Ok(out)
}

#[derive(Default)]
struct Sums {
    bytes: u64,
    codes: u64,
    scale_bytes: u64,
    values: u64,
    /// Σ(a − b)².
    difference: f64,
    /// Σa².
    square: f64,
    /// A type without decoder.
    undecoded: bool,
}

impl Sums {
    fn add(
        &mut self,
        a: &TensorInfo,
        x: &[u8],
        b: &TensorInfo,
        y: &[u8],
        len: usize,
        layout: Option<&Layout>,
    ) {
        let same = a.ty == b.ty && x == y;
        if a.ty == b.ty && !same {
            self.bytes += x.iter().zip(y).filter(|(x, y)| x != y).count() as u64;
        }
        let decode = |info: &TensorInfo, bytes: &[u8]| {
            let mut out = vec![0f32; len];
            dequantize(info.ty.id(), bytes, &mut out).ok().map(|()| out)
        };
        let Some(u) = decode(a, x) else {
            self.undecoded = true;
            return;
        };
        self.square += u.iter().map(|u| f64::from(*u).powi(2)).sum::<f64>();
        if same {
            return;
        }
        let Some(v) = decode(b, y) else {
            self.undecoded = true;
            return;
        };
        for (u, v) in u.iter().zip(&v) {
            if u.to_bits() != v.to_bits() {
                self.values += 1;
                self.difference += (f64::from(*u) - f64::from(*v)).powi(2);
            }
        }
        if let Some(layout) = layout {
            self.scale_bytes += layout.scale_bytes_that_differ(x, y);
            let (x, y) = (layout.codes_alone(x), layout.codes_alone(y));
            if let (Some(u), Some(v)) = (decode(a, &x), decode(a, &y)) {
                self.codes += u.iter().zip(&v).filter(|(u, v)| u != v).count() as u64;
            }
        }
    }
}
