//! Constructors of arithmetic on elements, and of sums and products of matrices.

use super::ctx::{Ctx, Result, Tensor};
use ggml_sys::{ggml_context, ggml_tensor, llama};

impl Ctx {
    /// `a + b`, `b` repeated along `a`.
    ///
    /// # Errors
    /// Shapes that do not repeat.
    pub fn add(&mut self, a: Tensor, b: Tensor) -> Result<Tensor> {
        self.binary("add", a, b, ggml_sys::ggml_add)
    }

    /// `a + b`, written over leaf `a`.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn add_into(&mut self, a: Tensor, b: Tensor) -> Result<Tensor> {
        let ok = self.ne(a) == self.ne(b) && self.op(a) == ggml_sys::GGML_OP_NONE;
        self.need(ok, "add_into", "a leaf and a tensor of its shape", &[a, b])?;
        self.binary("add_into", a, b, llama::ggml_add_inplace)
    }

    /// `a − b`.
    ///
    /// # Errors
    /// Shapes that do not repeat.
    pub fn sub(&mut self, a: Tensor, b: Tensor) -> Result<Tensor> {
        self.binary("sub", a, b, ggml_sys::ggml_sub)
    }

    /// Elementwise `a · b`.
    ///
    /// # Errors
    /// Shapes that do not repeat.
    pub fn mul(&mut self, a: Tensor, b: Tensor) -> Result<Tensor> {
        self.binary("mul", a, b, ggml_sys::ggml_mul)
    }

    /// Elementwise `a / b`.
    ///
    /// # Errors
    /// Shapes that do not repeat.
    pub fn div(&mut self, a: Tensor, b: Tensor) -> Result<Tensor> {
        self.binary("div", a, b, ggml_sys::ggml_div)
    }

    fn binary(
        &mut self,
        op: &'static str,
        a: Tensor,
        b: Tensor,
        make: unsafe extern "C" fn(
            *mut ggml_context,
            *mut ggml_tensor,
            *mut ggml_tensor,
        ) -> *mut ggml_tensor,
    ) -> Result<Tensor> {
        let ok = self.is_f32(a)
            && self.is_f32(b)
            && self.rows_packed(a)
            && self.rows_packed(b)
            && self.repeats(b, a);
        self.need(
            ok,
            op,
            "two f32 tensors, the second repeating into the first",
            &[a, b],
        )?;
        // SAFETY: checked above.
        let raw = unsafe { make(self.raw(), self.ptr(a), self.ptr(b)) };
        self.keep(raw)
    }

    /// `a·s + b`.
    ///
    /// # Errors
    /// A tensor that is not contiguous f32.
    pub fn scale(&mut self, a: Tensor, s: f32, b: f32) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.is_contiguous(a);
        self.need(ok, "scale", "contiguous f32", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_scale_bias(self.raw(), self.ptr(a), s, b) };
        self.keep(raw)
    }

    /// Elementwise square.
    ///
    /// # Errors
    /// A tensor that is not contiguous f32.
    pub fn sqr(&mut self, a: Tensor) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.is_contiguous(a);
        self.need(ok, "sqr", "contiguous f32", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_sqr(self.raw(), self.ptr(a)) };
        self.keep(raw)
    }

    /// Elementwise square root.
    ///
    /// # Errors
    /// A tensor that is not contiguous f32.
    pub fn sqrt(&mut self, a: Tensor) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.is_contiguous(a);
        self.need(ok, "sqrt", "contiguous f32", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_sqrt(self.raw(), self.ptr(a)) };
        self.keep(raw)
    }

    /// Elements below `min` become `min`, those above `max` become `max`.
    ///
    /// # Errors
    /// A tensor that is not contiguous f32.
    pub fn clamp(&mut self, a: Tensor, min: f32, max: f32) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.is_contiguous(a);
        self.need(ok, "clamp", "contiguous f32", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_clamp(self.raw(), self.ptr(a), min, max) };
        self.keep(raw)
    }

    /// A unary op by its ggml number (tanh, gelu, silu, relu, …).
    ///
    /// # Errors
    /// A tensor that is not contiguous f32, or an unknown number.
    pub fn unary(&mut self, a: Tensor, op: u32) -> Result<Tensor> {
        let ok =
            self.is_f32(a) && self.is_contiguous(a) && op < ggml_sys::llama::GGML_UNARY_OP_COUNT;
        self.need(ok, "unary", "contiguous f32 and a known op", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_unary(self.raw(), self.ptr(a), op) };
        self.keep(raw)
    }

    /// Sum over `ne[0]`: `[n, a, b, c] → [1, a, b, c]`.
    ///
    /// # Errors
    /// A tensor that is not f32 with packed rows.
    pub fn sum_rows(&mut self, a: Tensor) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.rows_packed(a);
        self.need(ok, "sum_rows", "f32 with packed rows", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_sum_rows(self.raw(), self.ptr(a)) };
        self.keep(raw)
    }

    /// Mean over `ne[0]`: `[n, a, b, c] → [1, a, b, c]`.
    ///
    /// # Errors
    /// A tensor that is not f32 with packed rows.
    pub fn mean(&mut self, a: Tensor) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.rows_packed(a);
        self.need(ok, "mean", "f32 with packed rows", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_mean(self.raw(), self.ptr(a)) };
        self.keep(raw)
    }

    /// A tensor of `a`'s shape filled with `value`.
    ///
    /// # Errors
    /// A tensor that is not contiguous f32.
    pub fn fill_like(&mut self, a: Tensor, value: f32) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.is_contiguous(a);
        self.need(ok, "fill", "contiguous f32", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_fill(self.raw(), self.ptr(a), value) };
        self.keep(raw)
    }

    /// `a [k, m, …]`, `b [k, n, …]` → `[m, n, …]`; `a`'s outer dimensions repeat along `b`'s.
    ///
    /// # Errors
    /// Shapes that do not multiply, or rows that are not packed.
    pub fn mul_mat(&mut self, a: Tensor, b: Tensor) -> Result<Tensor> {
        let (x, y) = (self.ne(a), self.ne(b));
        let ok = x[0] == y[0]
            && y[2] % x[2] == 0
            && y[3] % x[3] == 0
            && self.rows_packed(a)
            && self.rows_packed(b)
            && self.nb(a)[0] <= self.nb(a)[1]
            && self.is_f32(b);
        self.need(
            ok,
            "mul_mat",
            "[k, m, …] by f32 [k, n, …] with packed rows",
            &[a, b],
        )?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_mul_mat(self.raw(), self.ptr(a), self.ptr(b)) };
        self.keep(raw)
    }

    /// `a [m, k, …]`, `b [n, k, …]` → `[m, n, …]`: the sum over `k` of outer products.
    ///
    /// # Errors
    /// Shapes that do not multiply.
    pub fn out_prod(&mut self, a: Tensor, b: Tensor) -> Result<Tensor> {
        let (x, y) = (self.ne(a), self.ne(b));
        let ok = x[1] == y[1]
            && y[2] % x[2] == 0
            && y[3] % x[3] == 0
            && self.rows_packed(a)
            && self.is_f32(b);
        self.need(ok, "out_prod", "[m, k, …] by f32 [n, k, …]", &[a, b])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_out_prod(self.raw(), self.ptr(a), self.ptr(b)) };
        self.keep(raw)
    }

    /// Rows of `a [n, rows]` by `ids` (i32 `[k]`) → f32 `[n, k]`.
    ///
    /// # Errors
    /// Ids that are not i32, or mismatched outer dimensions.
    pub fn get_rows(&mut self, a: Tensor, ids: Tensor) -> Result<Tensor> {
        let (x, i) = (self.ne(a), self.ne(ids));
        let ok =
            self.ty(ids) == ggml_sys::GGML_TYPE_I32 && x[2] == i[1] && x[3] == i[2] && i[3] == 1;
        self.need(ok, "get_rows", "rows and i32 ids", &[a, ids])?;
        // SAFETY: checked above; ids are range-checked by whoever writes them.
        let raw = unsafe { ggml_sys::ggml_get_rows(self.raw(), self.ptr(a), self.ptr(ids)) };
        self.keep(raw)
    }

    /// The transpose of [`Ctx::get_rows`]: rows of `grad [n, k]` added into zeros of
    /// `like`'s shape.
    ///
    /// # Errors
    /// Shapes that do not belong together.
    pub fn get_rows_back(&mut self, grad: Tensor, ids: Tensor, like: Tensor) -> Result<Tensor> {
        let (g, i, l) = (self.ne(grad), self.ne(ids), self.ne(like));
        let ok = self.is_f32(grad)
            && self.is_contiguous(grad)
            && self.ty(ids) == ggml_sys::GGML_TYPE_I32
            && i[1] * i[2] * i[3] == 1
            && g[0] == l[0]
            && g[1] == i[0]
            && l[2] * l[3] * g[2] * g[3] == 1;
        self.need(
            ok,
            "get_rows_back",
            "gradient [n, k], ids [k], like [n, rows]",
            &[grad, ids, like],
        )?;
        // SAFETY: checked above.
        let raw = unsafe {
            ggml_sys::ggml_get_rows_back(self.raw(), self.ptr(grad), self.ptr(ids), self.ptr(like))
        };
        self.keep(raw)
    }
}
