//! The model file's tensors, mapped, and the transposed copies that the backward pass
//! multiplies with.

use super::GraphError;
#[cfg(feature = "train")]
use super::copies::Copies;
#[cfg(feature = "train")]
use super::rules::Tile;
use crate::digest::{Digest, of_model, of_tensor};
use crate::error::Error;
#[cfg(feature = "train")]
use crate::ggml::{Backend, Precision, Side, sys};
use crate::ggml::{Buffer, Ctx, Tensor, dequantize};
#[cfg(feature = "train")]
use crate::gguf::GgmlType;
use crate::gguf::{Gguf, GgufSet, MappedGguf, TensorInfo};
#[cfg(feature = "train")]
use half::bf16;
use rayon::prelude::*;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

struct Part {
    map: Arc<MappedGguf>,
    buffer: Arc<Buffer>,
}

/// A model file (or all parts of a split one), checked and mapped read-only.
pub struct Weights {
    parts: Vec<Part>,
    index: HashMap<String, usize>,
    set: GgufSet,
    digests: Mutex<Digests>,
}

/// Digests computed so far: a model is opened once and patches come and go.
#[derive(Default)]
struct Digests {
    file: Option<Digest>,
    tensors: HashMap<String, Digest>,
}

impl Weights {
    /// Open and map `path`; any part of a split file brings the others.
    ///
    /// # Errors
    /// A malformed file, or a failing map.
    pub fn open(path: &Path) -> Result<Self, GraphError> {
        let set = GgufSet::open(path)?;
        let mut parts = Vec::new();
        let mut index = HashMap::new();
        for gguf in set.parts() {
            for t in gguf.tensors() {
                index.insert(t.name.clone(), parts.len());
            }
            let map = Arc::new(MappedGguf::new(Gguf::open(gguf.path())?)?);
            let buffer = Buffer::over(map.clone(), MappedGguf::bytes)?;
            parts.push(Part { map, buffer });
        }
        Ok(Self {
            parts,
            index,
            set,
            digests: Mutex::default(),
        })
    }

    /// The checked headers.
    pub fn set(&self) -> &GgufSet {
        &self.set
    }

    /// Of the file, or of all parts of a split one in order.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn digest(&self) -> Result<Digest, Error> {
        let mut known = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        let digest = match known.file {
            Some(digest) => digest,
            None => of_model(&self.set)?,
        };
        known.file = Some(digest);
        Ok(digest)
    }

    /// Of one tensor; `None` when the model has none of that name.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn tensor_digest(&self, name: &str) -> Result<Option<Digest>, Error> {
        let known = || self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(digest) = known().tensors.get(name) {
            return Ok(Some(*digest));
        }
        // Unlocked, so that several tensors can be read at once.
        let digest = of_tensor(&self.set, name)?;
        if let Some(digest) = digest {
            known().tensors.insert(name.to_owned(), digest);
        }
        Ok(digest)
    }

    /// `general.architecture`.
    ///
    /// # Errors
    /// A missing key.
    pub fn arch(&self) -> Result<&str, GraphError> {
        Ok(self.set.metadata().get::<&str>("general.architecture")?)
    }

    /// Whether the file holds a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Shape and type of a tensor.
    ///
    /// # Errors
    /// No tensor of that name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo, GraphError> {
        let part = self
            .index
            .get(name)
            .map_or(&self.parts[0], |&p| &self.parts[p]);
        Ok(part.map.gguf().require(name)?)
    }

    /// The encoded bytes of a tensor.
    ///
    /// # Errors
    /// No tensor of that name.
    pub fn bytes(&self, name: &str) -> Result<&[u8], GraphError> {
        let part = self
            .index
            .get(name)
            .map_or(&self.parts[0], |&p| &self.parts[p]);
        Ok(part.map.tensor_bytes(name)?)
    }

    /// The decoded values of a tensor, rows after one another: `[n_in, n_out]`.
    ///
    /// # Errors
    /// No tensor of that name, or a type without decoder.
    pub fn decoded(&self, name: &str) -> Result<Vec<f32>, GraphError> {
        let info = self.info(name)?;
        let mut out = vec![0f32; info.n_elements() as usize];
        let row = info.ne[0] as usize;
        let row_bytes = info.row_bytes() as usize;
        let bytes = self.bytes(name)?;
        out.par_chunks_mut(row)
            .zip(bytes.par_chunks(row_bytes))
            .try_for_each(|(o, b)| dequantize(info.ty.id(), b, o))?;
        Ok(out)
    }

    /// Σ w² of a tensor, a few rows of it decoded at a time.
    ///
    /// # Errors
    /// No tensor of that name, or a type without decoder.
    pub fn sum_of_squares(&self, name: &str) -> Result<f64, GraphError> {
        let info = self.info(name)?;
        let mut row = vec![0f32; info.ne[0] as usize];
        let mut sum = 0.0;
        for bytes in self.bytes(name)?.chunks(info.row_bytes() as usize) {
            dequantize(info.ty.id(), bytes, &mut row)?;
            sum += row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        }
        Ok(sum)
    }

    /// Give the pages read so far back to the system; what is touched again is read again.
    pub fn release(&self) {
        for part in &self.parts {
            part.map.release();
        }
    }

    /// A leaf of `ctx` over the mapped bytes of a tensor.
    ///
    /// # Errors
    /// No tensor of that name, or a shape ggml refuses.
    pub fn leaf(&self, ctx: &mut Ctx, name: &str) -> Result<Tensor, GraphError> {
        let part = self
            .index
            .get(name)
            .map_or(&self.parts[0], |&p| &self.parts[p]);
        let gguf = part.map.gguf();
        let info = gguf.require(name)?;
        let ne = info.ne.map(|n| n as i64);
        let t = ctx.leaf(info.ty.id(), ne, name)?;
        let offset = info.absolute_offset(gguf.data_offset());
        ctx.bind(t, &part.buffer, offset as usize)?;
        Ok(t)
    }
}

/// The block of a weight, by its name.
pub fn block_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

/// How frozen weights are multiplied: on this host decoded on the way, to BF16
/// ([`Ctx::decoded_product`]; relative error of the product 2.4e-3), and without copies.
///
/// What that op does not take, stacks of experts and weights on a GPU, gets transposed BF16 copies
/// `[n_out, n_in]`, made on first use and kept: `dX = Wᵀ·dY` is then one `mul_mat`, where ggml's own
/// rule decodes all of W once per token. Two bytes a weight. Where there is not memory for all of
/// them ([`Copies`]), the others are decoded on the way back a tile at a time, to the same values:
/// results do not depend on which copies there are.
#[cfg(feature = "train")]
#[derive(Default)]
pub struct Multiplying {
    buffers: HashMap<String, Arc<Buffer>>,
    plain: HashMap<String, Arc<Buffer>>,
    only: Option<Copies>,
    f32: bool,
}

/// Types that ggml's CPU backend multiplies slower on the way forward than they are decoded and
/// multiplied: all but K-quants, for which it has a kernel of its own, and what it multiplies as it
/// is (`cargo bench --bench rates`).
#[cfg(feature = "train")]
pub(super) fn is_slow(ty: GgmlType) -> bool {
    use GgmlType::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    matches!(ty, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0)
}

#[cfg(feature = "train")]
impl Multiplying {
    /// Keep f32 copies instead: exact, twice the memory. For gradient checks.
    pub fn exact() -> Self {
        Self {
            f32: true,
            ..Self::default()
        }
    }

    /// Keep these copies alone.
    pub fn only(mut self, copies: Copies) -> Self {
        self.only = Some(copies);
        self
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let copies = self.buffers.values().chain(self.plain.values());
        copies.map(|b| b.size()).sum()
    }

    /// How weights without a copy are decoded.
    pub fn tile(&self) -> Tile {
        Tile {
            exact: self.f32,
            ..Tile::default()
        }
    }

    fn keeps(&self, name: &str) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|copies| copies.has(name))
    }

    /// How exactly products decode weights.
    pub fn precision(&self) -> Precision {
        match self.f32 {
            true => Precision::Exact,
            false => Precision::Fast,
        }
    }

    /// The same for a weight: on this host products decode it, on a GPU they do not.
    pub fn decoded(&self, cpu: &Backend, name: &str) -> Option<Precision> {
        (cpu.side_of(block_of(name)) == Side::Host).then_some(self.precision())
    }

    /// A leaf `[n_in, n_out]` for the forward pass: the mapped weight, or on a GPU a copy there.
    ///
    /// # Errors
    /// A weight that cannot be decoded, or no memory.
    pub fn plain(
        &mut self,
        ctx: &mut Ctx,
        weights: &Weights,
        cpu: &Backend,
        name: &str,
    ) -> Result<Tensor, GraphError> {
        if cpu.side_of(block_of(name)) == Side::Host {
            return weights.leaf(ctx, name);
        }
        let info = weights.info(name)?;
        let t = ctx.leaf(info.ty.id(), info.ne.map(|n| n as i64), name)?;
        keep(&mut self.plain, ctx, t, cpu, name, |ctx| {
            Ok(ctx.write(t, weights.bytes(name)?)?)
        })
    }

    /// A leaf `[n_out, n_in]` of `ctx` with the transposed weight, or with each matrix of a stack
    /// transposed; none where no copy of it is kept.
    ///
    /// # Errors
    /// A weight that cannot be decoded, or no memory.
    pub fn leaf(
        &mut self,
        ctx: &mut Ctx,
        weights: &Weights,
        cpu: &Backend,
        name: &str,
    ) -> Result<Option<Tensor>, GraphError> {
        if !self.keeps(name) {
            return Ok(None);
        }
        let info = weights.info(name)?;
        let (n_in, n_out) = (info.ne[0] as usize, info.ne[1] as usize);
        let ty = if self.f32 {
            sys::GGML_TYPE_F32
        } else {
            sys::GGML_TYPE_BF16
        };
        let [_, _, n2, n3] = info.ne.map(|n| n as i64);
        let t = ctx.leaf(ty, [n_out as i64, n_in as i64, n2, n3], "")?;
        let exact = self.f32;
        let leaf = keep(&mut self.buffers, ctx, t, cpu, name, |ctx| {
            let w = weights.decoded(name)?;
            let shape = (n_in, n_out);
            let written = if exact {
                ctx.write(t, &transpose(&w, shape, |x| x))
            } else {
                ctx.write(t, &transpose(&w, shape, bf16::from_f32))
            };
            Ok(written?)
        })?;
        Ok(Some(leaf))
    }
}

/// `t`, bound to the copy kept under `name`; `fill` writes it the first time.
#[cfg(feature = "train")]
fn keep(
    kept: &mut HashMap<String, Arc<Buffer>>,
    ctx: &mut Ctx,
    t: Tensor,
    cpu: &Backend,
    name: &str,
    fill: impl FnOnce(&mut Ctx) -> Result<(), GraphError>,
) -> Result<Tensor, GraphError> {
    if let Some(buffer) = kept.get(name) {
        ctx.bind(t, buffer, 0)?;
        return Ok(t);
    }
    let buffer = cpu.place_on(cpu.side_of(block_of(name)), ctx, &[t])?;
    buffer.holds_weights();
    fill(ctx)?;
    kept.insert(name.to_owned(), buffer);
    Ok(t)
}

/// Rows of `n_in` become columns, in each matrix of a stack; `f` converts each element.
#[cfg(feature = "train")]
fn transpose<T: Copy + Default + Send>(
    stack: &[f32],
    (n_in, n_out): (usize, usize),
    f: impl Fn(f32) -> T + Sync,
) -> Vec<T> {
    let n = n_in * n_out;
    let mut out = vec![T::default(); stack.len()];
    for (w, out) in stack.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
        // Eight output rows at a time: one cache line of every input row.
        out.par_chunks_mut(8 * n_out)
            .enumerate()
            .for_each(|(block, rows)| {
                let first = block * 8;
                for o in 0..n_out {
                    for (i, row) in rows.chunks_mut(n_out).enumerate() {
                        row[o] = f(w[o * n_in + first + i]);
                    }
                }
            });
    }
    out
}
