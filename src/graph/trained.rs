//! What a tape trains: low-rank factors over a frozen model, or whole weights, in backend memory.

use super::GraphError;
use super::template::Template;
use super::weights::Weights;
use crate::ggml::{Backend, Buffer, Ctx, Tensor, sys};
use std::sync::Arc;

/// One low-rank term `scale·B(A·x)` on an adaptable weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factor {
    /// Index into [`Template::adaptable`].
    pub tensor: usize,
    /// Rank.
    pub rank: usize,
    /// Scale s.
    pub scale: f32,
    /// Whether gradients are wanted.
    pub trainable: bool,
}

/// Low-rank factors in backend memory: `lora_a [n_in, rank]`, `lora_b [rank, n_out]` each.
pub struct Factors {
    /// What they adapt.
    pub list: Vec<Factor>,
    /// Whether tapes with gradients multiply a mask into the input of every adapted weight, one
    /// for all its factors ([`set_dropout`](super::tape::Tape::set_dropout)).
    pub dropout: bool,
    ctx: Ctx,
    tensors: Vec<(Tensor, Tensor)>,
    offsets: Vec<(usize, usize)>,
    buffer: Arc<Buffer>,
    sums: Option<Sums>,
}

/// Gradients of the trainable factors, A and B of each in turn, as the tapes add them up.
struct Sums {
    ctx: Ctx,
    tensors: Vec<Tensor>,
    offsets: Vec<usize>,
    buffer: Arc<Buffer>,
}

impl Factors {
    /// Zeroed factors for `list`.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(cpu: &Backend, template: &Template, list: Vec<Factor>) -> Result<Self, GraphError> {
        let mut ctx = Ctx::new(2 * list.len() + 8)?;
        let mut tensors = Vec::new();
        let (mut offsets, mut at) = (Vec::new(), 0usize);
        let mut place = |bytes: usize| {
            let here = at;
            at += cpu.stride(bytes);
            here
        };
        for f in &list {
            let t = &template.adaptable[f.tensor];
            let (a, b) = (a_shape(t.n_in, f.rank), b_shape(t.n_out, f.rank));
            tensors.push((
                ctx.leaf(sys::GGML_TYPE_F32, a, "")?,
                ctx.leaf(sys::GGML_TYPE_F32, b, "")?,
            ));
            offsets.push((place(t.n_in * f.rank * 4), place(t.n_out * f.rank * 4)));
        }
        let buffer = cpu.alloc(at)?;
        for (&(a, b), &(at_a, at_b)) in tensors.iter().zip(&offsets) {
            ctx.bind(a, &buffer, at_a)?;
            ctx.bind(b, &buffer, at_b)?;
        }
        Ok(Self {
            list,
            dropout: false,
            ctx,
            tensors,
            offsets,
            buffer,
            sums: None,
        })
    }

    /// Have the tapes add gradients up in memory beside the factors, instead of each holding those
    /// of its last pass: one copy of them less.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn sum_gradients(&mut self, cpu: &Backend, template: &Template) -> Result<(), GraphError> {
        let trained: Vec<&Factor> = self.list.iter().filter(|f| f.trainable).collect();
        let mut ctx = Ctx::new(2 * trained.len() + 8)?;
        let (mut tensors, mut offsets, mut at) = (Vec::new(), Vec::new(), 0usize);
        for f in trained {
            let t = &template.adaptable[f.tensor];
            for shape in [a_shape(t.n_in, f.rank), b_shape(t.n_out, f.rank)] {
                let leaf = ctx.leaf(sys::GGML_TYPE_F32, shape, "")?;
                tensors.push(leaf);
                offsets.push(at);
                at += ctx.n_bytes(leaf).next_multiple_of(64);
            }
        }
        let buffer = cpu.alloc(at)?;
        for (&t, &at) in tensors.iter().zip(&offsets) {
            ctx.bind(t, &buffer, at)?;
        }
        self.sums = Some(Sums {
            ctx,
            tensors,
            offsets,
            buffer,
        });
        Ok(())
    }

    /// Whether the tapes add gradients up here.
    pub(super) fn sums(&self) -> bool {
        self.sums.is_some()
    }

    /// Set the summed gradients to zero.
    ///
    /// # Errors
    /// Never for factors of this program.
    pub fn clear_gradients(&mut self) -> Result<(), GraphError> {
        if let Some(sums) = &mut self.sums {
            let mut zeros = Vec::new();
            for &t in &sums.tensors {
                zeros.resize(sums.ctx.n_elements(t), 0f32);
                sums.ctx.write(t, &zeros)?;
            }
        }
        Ok(())
    }

    /// Summed gradient `i`: A and B of each trainable factor in turn.
    ///
    /// # Errors
    /// Never for factors that [sum](Self::sum_gradients) them.
    pub fn gradient(&self, i: usize, out: &mut Vec<f32>) -> Result<(), GraphError> {
        let sums = self.sums.as_ref().expect(SUMMED);
        out.resize(sums.ctx.n_elements(sums.tensors[i]), 0.0);
        Ok(sums.ctx.read(sums.tensors[i], out)?)
    }

    /// Set summed gradient `i`.
    ///
    /// # Errors
    /// Another length.
    pub fn set_gradient(&mut self, i: usize, values: &[f32]) -> Result<(), GraphError> {
        let sums = self.sums.as_mut().expect(SUMMED);
        Ok(sums.ctx.write(sums.tensors[i], values)?)
    }

    /// A leaf of `c` over summed gradient `i`.
    pub(super) fn grad_leaf(&self, c: &mut Ctx, i: usize) -> Result<Tensor, GraphError> {
        let sums = self.sums.as_ref().expect(SUMMED);
        let leaf = c.leaf(sys::GGML_TYPE_F32, sums.ctx.ne(sums.tensors[i]), "")?;
        c.bind(leaf, &sums.buffer, sums.offsets[i])?;
        Ok(leaf)
    }

    /// Factor `i`: `a [n_in, rank]`, `b [rank, n_out]`.
    ///
    /// # Errors
    /// Never for factors of this program.
    pub fn read(&self, i: usize, a: &mut Vec<f32>, b: &mut Vec<f32>) -> Result<(), GraphError> {
        let (ta, tb) = self.tensors[i];
        a.resize(self.ctx.n_elements(ta), 0.0);
        b.resize(self.ctx.n_elements(tb), 0.0);
        self.ctx.read(ta, a)?;
        self.ctx.read(tb, b)?;
        Ok(())
    }

    /// Set factor `i`: `a [n_in, rank]`, `b [rank, n_out]`.
    ///
    /// # Errors
    /// Other lengths.
    pub fn write(&mut self, i: usize, a: &[f32], b: &[f32]) -> Result<(), GraphError> {
        let (ta, tb) = self.tensors[i];
        self.ctx.write(ta, a)?;
        self.ctx.write(tb, b)?;
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.buffer.size() + self.sums.as_ref().map_or(0, |s| s.buffer.size())
    }

    pub(super) fn leaves(
        &self,
        c: &mut Ctx,
        template: &Template,
        i: usize,
    ) -> Result<(Tensor, Tensor), GraphError> {
        let f = &self.list[i];
        let t = &template.adaptable[f.tensor];
        let a = c.leaf(sys::GGML_TYPE_F32, a_shape(t.n_in, f.rank), "")?;
        let b = c.leaf(sys::GGML_TYPE_F32, b_shape(t.n_out, f.rank), "")?;
        c.bind(a, &self.buffer, self.offsets[i].0)?;
        c.bind(b, &self.buffer, self.offsets[i].1)?;
        Ok((a, b))
    }
}

/// Why gradients can be asked for.
const SUMMED: &str = "sum_gradients was called";

fn a_shape(n_in: usize, rank: usize) -> [i64; 4] {
    [n_in as i64, rank as i64, 1, 1]
}

fn b_shape(n_out: usize, rank: usize) -> [i64; 4] {
    [rank as i64, n_out as i64, 1, 1]
}

/// Whole weights that are trained instead of frozen, in f32.
pub struct FreeWeights {
    names: Vec<String>,
    shapes: Vec<[i64; 4]>,
    ctx: Ctx,
    tensors: Vec<Tensor>,
    offsets: Vec<usize>,
    buffer: Arc<Buffer>,
}

impl FreeWeights {
    /// The named weights, decoded from the model file.
    ///
    /// # Errors
    /// No tensor of that name, or no memory.
    pub fn new(cpu: &Backend, weights: &Weights, names: Vec<String>) -> Result<Self, GraphError> {
        let mut ctx = Ctx::new(names.len() + 8)?;
        let (mut tensors, mut offsets, mut shapes, mut at) = (vec![], vec![], vec![], 0usize);
        for name in &names {
            let info = weights.info(name)?;
            let ne = info.ne.map(|n| n as i64);
            tensors.push(ctx.leaf(sys::GGML_TYPE_F32, ne, name)?);
            offsets.push(at);
            shapes.push(ne);
            at += cpu.stride(info.n_elements() as usize * 4);
        }
        let buffer = cpu.alloc(at)?;
        for ((&t, &at), name) in tensors.iter().zip(&offsets).zip(&names) {
            ctx.bind(t, &buffer, at)?;
            ctx.write(t, &weights.decoded(name)?)?;
        }
        Ok(Self {
            names,
            shapes,
            ctx,
            tensors,
            offsets,
            buffer,
        })
    }

    /// The names, in order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Values of weight `i`.
    ///
    /// # Errors
    /// Never for weights of this set.
    pub fn read(&self, i: usize) -> Result<Vec<f32>, GraphError> {
        let mut out = vec![0f32; self.ctx.n_elements(self.tensors[i])];
        self.ctx.read(self.tensors[i], &mut out)?;
        Ok(out)
    }

    /// Set weight `i`.
    ///
    /// # Errors
    /// Another length.
    pub fn write(&mut self, i: usize, values: &[f32]) -> Result<(), GraphError> {
        Ok(self.ctx.write(self.tensors[i], values)?)
    }

    pub(super) fn leaf(&self, c: &mut Ctx, name: &str) -> Result<Option<Tensor>, GraphError> {
        let Some(i) = self.names.iter().position(|n| n == name) else {
            return Ok(None);
        };
        let t = c.leaf(sys::GGML_TYPE_F32, self.shapes[i], name)?;
        c.bind(t, &self.buffer, self.offsets[i])?;
        Ok(Some(t))
    }
}

/// What is trained.
#[derive(Clone, Copy)]
pub enum Trained<'a> {
    /// Low-rank factors; the model is frozen. Some of them may be frozen too.
    Factors(&'a Factors),
    /// Whole weights.
    Weights(&'a FreeWeights),
    /// Nothing.
    Nothing,
}
