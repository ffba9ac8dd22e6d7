//! Building forward nodes from the template, and remembering them for the way back.

use super::GraphError;
use super::template::{Affine, Entry};
use crate::ggml::{Attended, Ctx, OpError, Precision, Tensor, Way, op_name, sys};
use std::collections::HashMap;

/// The number of an op that ggml has no name for: an attention by [`Ctx::attend`], its sources q, k,
/// v and `first`, its only parameter the scale.
pub const ATTEND: u32 = 1 << 16;

/// The attention of an [`ATTEND`] node.
pub fn attended(params: &[i32; 16], src: &[Tensor]) -> Attended {
    Attended {
        q: src[0],
        k: src[1],
        v: src[2],
        first: src[3],
        scale: float(params, 0),
    }
}

/// One forward node: all that its vector-Jacobian rule needs to know.
#[derive(Debug, Clone)]
pub struct Node {
    /// ggml's op number.
    pub op: u32,
    /// Raw op parameters.
    pub params: [i32; 16],
    /// Sources.
    pub src: Vec<Tensor>,
    /// The result.
    pub out: Tensor,
    /// Byte offset and strides, for views.
    pub view: Option<(usize, [usize; 4])>,
}

/// A float op parameter.
pub fn float(params: &[i32; 16], i: usize) -> f32 {
    f32::from_bits(params[i] as u32)
}

/// Op parameters with one float.
pub fn floats(values: &[f32]) -> [i32; 16] {
    let mut params = [0; 16];
    for (p, v) in params.iter_mut().zip(values) {
        *p = v.to_bits() as i32;
    }
    params
}

/// Forward nodes in order of computation.
#[derive(Default)]
pub struct Record {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// Weights that products decode first.
    pub decoded: HashMap<Tensor, Precision>,
}

/// What an op needs beyond its sources: the shape it is asked for, and where a view lies.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// Elements per dimension.
    pub ne: [i64; 4],
    /// Strides in bytes.
    pub nb: [usize; 4],
    /// Bytes from the start of the source.
    pub offset: usize,
    /// ggml's type number.
    pub ty: u32,
}

impl Wanted {
    /// What entry `e`, an op, has at (T, R); strides and offset are a view's.
    pub(super) fn of(e: &Entry, (nb, offset): (&[Affine; 4], Affine), (t, r): (i64, i64)) -> Self {
        Self {
            ne: e.ne.map(|n| n.at(t, r)),
            nb: nb.map(|n| n.at(t, r) as usize),
            offset: offset.at(t, r) as usize,
            ty: e.ty,
        }
    }
}

impl Record {
    /// Build `op` on `src` and remember it. `wanted` is needed by shape ops only.
    ///
    /// # Errors
    /// An op that cannot be rebuilt, or sources it does not take.
    pub fn emit(
        &mut self,
        c: &mut Ctx,
        op: u32,
        params: &[i32; 16],
        src: &[Tensor],
        wanted: Option<&Wanted>,
    ) -> Result<Tensor, GraphError> {
        let shape = || {
            wanted.ok_or(GraphError::Ggml(OpError::Backend(
                "a shape op was built without a shape",
            )))
        };
        let mut view = None;
        let out = match (op, src) {
            (sys::GGML_OP_ADD, &[a, b]) => c.add(a, b)?,
            (sys::GGML_OP_SUB, &[a, b]) => c.sub(a, b)?,
            (sys::GGML_OP_MUL, &[a, b]) => c.mul(a, b)?,
            (sys::GGML_OP_DIV, &[a, b]) => c.div(a, b)?,
            (sys::GGML_OP_SQR, &[a]) => c.sqr(a)?,
            (sys::GGML_OP_SQRT, &[a]) => c.sqrt(a)?,
            (sys::GGML_OP_MEAN, &[a]) => c.mean(a)?,
            (sys::GGML_OP_SUM_ROWS, &[a]) => c.sum_rows(a)?,
            (sys::GGML_OP_CLAMP, &[a]) => c.clamp(a, float(params, 0), float(params, 1))?,
            (sys::GGML_OP_REPEAT, &[a]) => c.repeat(a, shape()?.ne)?,
            (sys::GGML_OP_CONCAT, &[a, b]) => c.concat(a, b, params[0] as usize)?,
            (sys::GGML_OP_SCALE, &[a]) => c.scale(a, float(params, 0), float(params, 1))?,
            (sys::GGML_OP_MUL_MAT, &[a, b])
                if self.decoded.contains_key(&a) && c.takes_decoded(a, Way::Forward) =>
            {
                c.decoded_product(a, b, Way::Forward, self.decoded[&a])?
            }
            (sys::GGML_OP_MUL_MAT, &[a, b]) => {
                let a = self.row_packed(c, a)?;
                let b = self.row_packed(c, b)?;
                let out = c.mul_mat(a, b)?;
                c.set_op_params(out, params);
                return Ok(self.push(op, params, vec![a, b], out, None));
            }
            (sys::GGML_OP_RMS_NORM, &[a]) => c.rms_norm(a, float(params, 0))?,
            (sys::GGML_OP_NORM, &[a]) => c.norm(a, float(params, 0))?,
            (sys::GGML_OP_GET_ROWS, &[a, ids]) => c.get_rows(a, ids)?,
            (sys::GGML_OP_ROPE, &[a, pos]) => c.rope(a, pos, None, params, false)?,
            (sys::GGML_OP_ROPE, &[a, pos, factors]) => {
                c.rope(a, pos, Some(factors), params, false)?
            }
            (sys::GGML_OP_SOFT_MAX, &[a]) => {
                c.soft_max(a, None, None, float(params, 0), float(params, 1))?
            }
            (sys::GGML_OP_SOFT_MAX, &[a, mask]) => {
                c.soft_max(a, Some(mask), None, float(params, 0), float(params, 1))?
            }
            (sys::GGML_OP_SOFT_MAX, &[a, mask, sinks]) => {
                let (scale, max_bias) = (float(params, 0), float(params, 1));
                c.soft_max(a, Some(mask), Some(sinks), scale, max_bias)?
            }
            (sys::GGML_OP_GLU, &[a, ref b @ ..]) if b.len() < 2 => {
                let (b, swapped) = (b.first().copied(), params[1] != 0);
                let out = c.glu(a, b, params[0] as u32, swapped)?;
                c.set_op_params(out, params);
                out
            }
            (sys::GGML_OP_MUL_MAT_ID, &[experts, b, ids]) => {
                let out = c.mul_mat_id(experts, b, ids)?;
                c.set_op_params(out, params);
                out
            }
            (sys::GGML_OP_ADD_ID, &[a, b, ids]) => c.add_id(a, b, ids)?,
            (sys::GGML_OP_ARGSORT, &[a]) => c.argsort(a, params[0] as u32)?,
            (sys::GGML_OP_SET_ROWS, &[b, ids, a]) => c.set_rows(a, b, ids)?,
            (sys::GGML_OP_FILL, &[a]) => c.fill_like(a, float(params, 0))?,
            (sys::GGML_OP_CPY, &[a]) => c.cast(a, shape()?.ty)?,
            (sys::GGML_OP_UNARY, &[a]) => {
                let out = c.unary(a, params[0] as u32)?;
                c.set_op_params(out, params);
                out
            }
            (sys::GGML_OP_PERMUTE, &[a]) => {
                c.permute(a, [params[0], params[1], params[2], params[3]])?
            }
            (sys::GGML_OP_TRANSPOSE, &[a]) => c.transpose(a)?,
            (sys::GGML_OP_RESHAPE, &[a]) => {
                let a = self.packed(c, a)?;
                let out = c.reshape(a, shape()?.ne)?;
                return Ok(self.push(op, params, vec![a], out, None));
            }
            (sys::GGML_OP_CONT, &[a]) => c.cont(a, shape()?.ne)?,
            (ATTEND, &[_, _, _, _]) => c.attend(&attended(params, src))?,
            (sys::GGML_OP_VIEW, &[a]) => {
                let w = shape()?;
                view = Some((w.offset, w.nb));
                c.view(a, w.ne, w.nb, w.offset)?
            }
            _ => {
                return Err(GraphError::Op {
                    arch: String::new(),
                    op: format!("{} with {} sources", op_name(op), src.len()),
                    node: String::new(),
                });
            }
        };
        Ok(self.push(op, params, src.to_vec(), out, view))
    }

    fn push(
        &mut self,
        op: u32,
        params: &[i32; 16],
        src: Vec<Tensor>,
        out: Tensor,
        view: Option<(usize, [usize; 4])>,
    ) -> Tensor {
        self.nodes.push(Node {
            op,
            params: *params,
            src,
            out,
            view,
        });
        out
    }

    /// `a`, or a recorded contiguous copy of it.
    pub fn packed(&mut self, c: &mut Ctx, a: Tensor) -> Result<Tensor, GraphError> {
        if c.is_contiguous(a) {
            return Ok(a);
        }
        let wanted = Wanted {
            ne: c.ne(a),
            ..Wanted::default()
        };
        self.emit(c, sys::GGML_OP_CONT, &[0; 16], &[a], Some(&wanted))
    }

    /// `a`, or a recorded contiguous copy when its rows have gaps: products read packed rows.
    fn row_packed(&mut self, c: &mut Ctx, a: Tensor) -> Result<Tensor, GraphError> {
        let (nb, ne) = (c.nb(a), c.ne(a));
        let transposed = ne[1] > 1 && ne[0] > 1 && nb[0] > nb[1];
        if transposed { self.packed(c, a) } else { Ok(a) }
    }

    /// Keys or values of the batch itself, where llama.cpp reads its cache.
    pub fn cached(
        &mut self,
        c: &mut Ctx,
        src: Tensor,
        ne: [i64; 4],
        transposed: bool,
    ) -> Result<Tensor, GraphError> {
        let src = self.packed(c, src)?;
        let straight = if transposed {
            [ne[2], ne[1], ne[0], 1]
        } else {
            ne
        };
        let wanted = Wanted {
            ne: straight,
            ..Wanted::default()
        };
        let x = self.emit(c, sys::GGML_OP_RESHAPE, &[0; 16], &[src], Some(&wanted))?;
        if !transposed {
            return Ok(x);
        }
        let mut axes = [0; 16];
        axes[..4].copy_from_slice(&[2, 1, 0, 3]);
        self.emit(c, sys::GGML_OP_PERMUTE, &axes, &[x], None)
    }

    /// `base + s·B(A·x)` as llama.cpp builds it unless products decode B, recorded for the way back.
    pub fn low_rank(
        &mut self,
        c: &mut Ctx,
        base: Tensor,
        x: Tensor,
        (a, b): (Tensor, Tensor),
        scale: f32,
    ) -> Result<Tensor, GraphError> {
        let none = &[0; 16];
        let mut down = self.emit(c, sys::GGML_OP_MUL_MAT, none, &[a, x], None)?;
        if self.decoded.contains_key(&b) {
            // Not to llama.cpp's bits anyway: the smaller of the two results is scaled.
            if scale != 1.0 {
                let by = floats(&[scale, 0.0]);
                down = self.emit(c, sys::GGML_OP_SCALE, &by, &[down], None)?;
            }
            let up = self.emit(c, sys::GGML_OP_MUL_MAT, none, &[b, down], None)?;
            return self.emit(c, sys::GGML_OP_ADD, none, &[base, up], None);
        }
        let up = self.emit(c, sys::GGML_OP_MUL_MAT, none, &[b, down], None)?;
        let scaled = self.emit(c, sys::GGML_OP_SCALE, &floats(&[scale, 0.0]), &[up], None)?;
        self.emit(c, sys::GGML_OP_ADD, none, &[base, scaled], None)
    }
}
