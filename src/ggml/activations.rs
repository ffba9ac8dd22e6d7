//! Constructors of normalisation, attention and activations, with those of their gradients that ggml
//! has.

use super::ctx::{Ctx, Result, Tensor};
use std::ptr::null_mut;

impl Ctx {
    /// RMS norm over `ne[0]`.
    ///
    /// # Errors
    /// A tensor that is not f32 with packed rows.
    pub fn rms_norm(&mut self, a: Tensor, eps: f32) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.rows_packed(a) && eps >= 0.0;
        self.need(ok, "rms_norm", "f32 with packed rows", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_rms_norm(self.raw(), self.ptr(a), eps) };
        self.keep(raw)
    }

    /// Gradient of [`Ctx::rms_norm`] at `x` for `grad`.
    ///
    /// # Errors
    /// Tensors that are not f32 of one shape.
    pub fn rms_norm_back(&mut self, grad: Tensor, x: Tensor, eps: f32) -> Result<Tensor> {
        let ok = self.is_f32(grad)
            && self.is_f32(x)
            && self.ne(grad) == self.ne(x)
            && self.rows_packed(x)
            && self.rows_packed(grad);
        self.need(
            ok,
            "rms_norm_back",
            "two f32 tensors of one shape",
            &[grad, x],
        )?;
        // SAFETY: checked above.
        let raw =
            unsafe { ggml_sys::ggml_rms_norm_back(self.raw(), self.ptr(grad), self.ptr(x), eps) };
        self.keep(raw)
    }

    /// Layer norm over `ne[0]`, without weight and bias.
    ///
    /// # Errors
    /// A tensor that is not f32 with packed rows.
    pub fn norm(&mut self, a: Tensor, eps: f32) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.rows_packed(a) && eps >= 0.0;
        self.need(ok, "norm", "f32 with packed rows", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_norm(self.raw(), self.ptr(a), eps) };
        self.keep(raw)
    }

    /// Softmax over `ne[0]` of `a·scale + mask`, `mask [n_kv, n_tokens]`; with `max_bias` the mask
    /// is scaled by each head's ALiBi slope, with `sinks [n_heads]` each head has one more score
    /// that takes its share of the sum and has no element.
    ///
    /// # Errors
    /// A non-contiguous tensor, a mask that does not cover it, or another number of sinks.
    pub fn soft_max(
        &mut self,
        a: Tensor,
        mask: Option<Tensor>,
        sinks: Option<Tensor>,
        scale: f32,
        max_bias: f32,
    ) -> Result<Tensor> {
        let x = self.ne(a);
        let mask_ok = mask.is_none_or(|m| {
            let n = self.ne(m);
            self.is_contiguous(m)
                && (self.is_f32(m) || self.ty(m) == ggml_sys::GGML_TYPE_F16)
                && n[0] == x[0]
                && n[1] >= x[1]
                && x[2] % n[2] == 0
                && x[3] % n[3] == 0
        });
        let ok = self.is_f32(a)
            && self.is_contiguous(a)
            && mask_ok
            && sinks.is_none_or(|s| self.is_f32(s) && self.ne(s) == [x[2], 1, 1, 1])
            && (max_bias == 0.0 || mask.is_some());
        self.need(
            ok,
            "soft_max",
            "contiguous f32, a mask of its rows and a sink for each head",
            &[a],
        )?;
        let mask = mask.map_or(null_mut(), |m| self.ptr(m));
        let sinks = sinks.map_or(null_mut(), |s| self.ptr(s));
        // SAFETY: checked above; no sinks are a null pointer there as well.
        let raw = unsafe {
            let raw = ggml_sys::ggml_soft_max_ext(self.raw(), self.ptr(a), mask, scale, max_bias);
            ggml_sys::ggml_soft_max_add_sinks(raw, sinks);
            raw
        };
        self.keep(raw)
    }

    /// Gradient of [`Ctx::soft_max`] by its scores, from its result `y`.
    ///
    /// # Errors
    /// Tensors that are not contiguous f32 of one shape.
    pub fn soft_max_back(&mut self, grad: Tensor, y: Tensor, scale: f32) -> Result<Tensor> {
        let ok = [grad, y]
            .iter()
            .all(|&t| self.is_f32(t) && self.is_contiguous(t))
            && self.ne(grad) == self.ne(y);
        self.need(
            ok,
            "soft_max_back",
            "two contiguous f32 tensors of one shape",
            &[grad, y],
        )?;
        // SAFETY: checked above.
        let raw = unsafe {
            ggml_sys::ggml_soft_max_ext_back(self.raw(), self.ptr(grad), self.ptr(y), scale, 0.0)
        };
        self.keep(raw)
    }

    /// Rotary embedding with another node's raw parameters (mode, dimensions, frequencies);
    /// `back`: its transpose. `factors`: per-frequency divisors.
    ///
    /// # Errors
    /// Positions that are not i32, one (or four, for multi-section modes) per token.
    pub fn rope(
        &mut self,
        a: Tensor,
        pos: Tensor,
        factors: Option<Tensor>,
        params: &[i32; 16],
        back: bool,
    ) -> Result<Tensor> {
        let x = self.ne(a);
        let n_pos = self.ne(pos)[0];
        let (n_dims, mode) = (params[1], params[2]);
        let multi = mode & 8 != 0;
        let ok = self.is_f32(a)
            && self.rows_packed(a)
            && self.ty(pos) == ggml_sys::GGML_TYPE_I32
            && n_pos == x[2] * if multi { 4 } else { 1 }
            && n_dims > 0
            && n_dims % 2 == 0
            && i64::from(n_dims) <= x[0]
            && factors.is_none_or(|f| self.is_f32(f) && self.ne(f)[0] >= i64::from(n_dims / 2));
        self.need(
            ok,
            "rope",
            "f32 [d, heads, tokens] and i32 positions",
            &[a, pos],
        )?;
        let factors = factors.map_or(null_mut(), |f| self.ptr(f));
        // The float parameters are overwritten below; only the mode decides the constructor.
        // SAFETY: checked above.
        let raw = unsafe {
            let (c, a, pos) = (self.raw(), self.ptr(a), self.ptr(pos));
            if multi {
                let mut sections = [params[11], params[12], params[13], params[14]];
                let f = if back {
                    ggml_sys::ggml_rope_multi_back
                } else {
                    ggml_sys::ggml_rope_multi
                };
                f(
                    c,
                    a,
                    pos,
                    factors,
                    n_dims,
                    sections.as_mut_ptr(),
                    mode,
                    0,
                    1.0,
                    1.0,
                    0.0,
                    1.0,
                    0.0,
                    0.0,
                )
            } else {
                let f = if back {
                    ggml_sys::ggml_rope_ext_back
                } else {
                    ggml_sys::ggml_rope_ext
                };
                f(
                    c, a, pos, factors, n_dims, mode, 0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0,
                )
            }
        };
        let t = self.keep(raw)?;
        self.set_op_params(t, params);
        Ok(t)
    }

    /// Gated activation `act(a)·b` by ggml's GLU number; without `b` the halves of `a`
    /// (`swapped`: second half gated). Gates with a slope or a limit take them from
    /// [`Ctx::set_op_params`].
    ///
    /// # Errors
    /// Tensors that are not f32 with rows at equal distances and one shape.
    pub fn glu(&mut self, a: Tensor, b: Option<Tensor>, op: u32, swapped: bool) -> Result<Tensor> {
        let shape_ok = match b {
            Some(b) => self.is_f32(b) && self.rows_even(b) && self.ne(a) == self.ne(b),
            None => self.ne(a)[0] % 2 == 0,
        };
        let known = op < ggml_sys::llama::GGML_GLU_OP_COUNT;
        let ok = known && self.is_f32(a) && self.rows_even(a) && shape_ok;
        self.need(
            ok,
            "glu",
            "f32 of one shape with even rows and a known gate",
            &[a],
        )?;
        // SAFETY: checked above.
        let raw = unsafe {
            match b {
                Some(b) => ggml_sys::ggml_glu_split(self.raw(), self.ptr(a), self.ptr(b), op),
                None => ggml_sys::ggml_glu(self.raw(), self.ptr(a), op, swapped),
            }
        };
        self.keep(raw)
    }

    /// `grad · silu'(x)`.
    ///
    /// # Errors
    /// Tensors that are not contiguous f32 of one shape.
    pub fn silu_back(&mut self, grad: Tensor, x: Tensor) -> Result<Tensor> {
        let ok = [grad, x]
            .iter()
            .all(|&t| self.is_f32(t) && self.is_contiguous(t))
            && self.ne(grad) == self.ne(x);
        self.need(
            ok,
            "silu_back",
            "two contiguous f32 tensors of one shape",
            &[grad, x],
        )?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_silu_back(self.raw(), self.ptr(grad), self.ptr(x)) };
        self.keep(raw)
    }
}
