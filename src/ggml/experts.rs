//! Constructors that mixtures of experts need: products with the matrix that an id names, their
//! biases, the ranking that chooses ids, and rows written by id.
//!
//! Ids are i32 `[n_used, n_tokens]`. ggml does not check them against the number of experts: they
//! must come from a ranking of as many scores ([`Ctx::argsort`]).

use super::ctx::{Ctx, Result, Tensor};

impl Ctx {
    /// Matrix `ids[i, t]` of the stack `experts [k, m, n_expert]` on `b [k, n_b, t]`, whose rows
    /// repeat up to the number of ids: `[m, n_used, t]`.
    ///
    /// # Errors
    /// Shapes that do not multiply, rows that are not packed, or ids that are not i32.
    pub fn mul_mat_id(&mut self, experts: Tensor, b: Tensor, ids: Tensor) -> Result<Tensor> {
        let (x, y, i) = (self.ne(experts), self.ne(b), self.ne(ids));
        let ok = x[0] == y[0]
            && x[3] == 1
            && y[3] == 1
            && self.is_ids(ids)
            && i[1] == y[2]
            && i[0] % y[1] == 0
            && self.rows_packed(experts)
            && self.nb(experts)[0] <= self.nb(experts)[1]
            && self.rows_packed(b)
            && self.is_f32(b);
        self.need(
            ok,
            "mul_mat_id",
            "[k, m, experts] by f32 [k, n, t] and i32 ids [used, t]",
            &[experts, b, ids],
        )?;
        // SAFETY: checked above; ids are below the number of experts (see the module).
        let raw = unsafe {
            let (c, experts, b) = (self.raw(), self.ptr(experts), self.ptr(b));
            ggml_sys::ggml_mul_mat_id(c, experts, b, self.ptr(ids))
        };
        self.keep(raw)
    }

    /// `a [n, n_used, t]` plus row `ids[i, t]` of `b [n, n_expert]`.
    ///
    /// # Errors
    /// Shapes that do not belong together, or ids that are not i32.
    pub fn add_id(&mut self, a: Tensor, b: Tensor, ids: Tensor) -> Result<Tensor> {
        let (x, y, i) = (self.ne(a), self.ne(b), self.ne(ids));
        let ok = self.is_f32(a)
            && self.is_f32(b)
            && self.rows_packed(a)
            && self.rows_packed(b)
            && self.is_ids(ids)
            && x[0] == y[0]
            && y[2] * y[3] * x[3] == 1
            && x[1] == i[0]
            && x[2] == i[1];
        self.need(
            ok,
            "add_id",
            "f32 [n, used, t], f32 [n, experts] and i32 ids [used, t]",
            &[a, b, ids],
        )?;
        // SAFETY: checked above; ids as in `mul_mat_id`.
        let raw =
            unsafe { ggml_sys::ggml_add_id(self.raw(), self.ptr(a), self.ptr(b), self.ptr(ids)) };
        self.keep(raw)
    }

    /// Indices that sort each row, i32; `order`: ggml's number.
    ///
    /// # Errors
    /// A tensor that is not f32 with packed rows, or another order.
    pub fn argsort(&mut self, a: Tensor, order: u32) -> Result<Tensor> {
        let ok = self.is_f32(a)
            && self.rows_packed(a)
            && self.ne(a)[0] <= i64::from(i32::MAX)
            && order <= ggml_sys::llama::GGML_SORT_ORDER_DESC;
        self.need(ok, "argsort", "f32 with packed rows", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_argsort(self.raw(), self.ptr(a), order) };
        self.keep(raw)
    }

    /// `a` with the rows of `b [n, k, …]` written over those that `ids` (i32 `[k, …]`) name. It
    /// takes the memory of `a`.
    ///
    /// # Errors
    /// Shapes that do not belong together, or ids that are not i32.
    pub fn set_rows(&mut self, a: Tensor, b: Tensor, ids: Tensor) -> Result<Tensor> {
        let (x, y, i) = (self.ne(a), self.ne(b), self.ne(ids));
        let ok = self.is_f32(a)
            && self.is_f32(b)
            && self.is_contiguous(a)
            && self.is_contiguous(b)
            && self.ty(ids) == ggml_sys::GGML_TYPE_I32
            && x[0] == y[0]
            && x[2] == y[2]
            && x[3] == y[3]
            && y[1] == i[0]
            && y[2] == i[1]
            && y[3] == i[2]
            && i[3] == 1;
        self.need(
            ok,
            "set_rows",
            "f32 [n, rows, …], f32 [n, k, …] and i32 ids [k, …]",
            &[a, b, ids],
        )?;
        // SAFETY: checked above; ids come from a ranking of as many scores as there are rows.
        let raw =
            unsafe { ggml_sys::ggml_set_rows(self.raw(), self.ptr(a), self.ptr(b), self.ptr(ids)) };
        self.keep(raw)
    }

    /// A contiguous copy of `a` as `ty`: any type as f32, and f32 and i32 as one another.
    ///
    /// # Errors
    /// Other types, rows that are not packed, or more elements than ggml counts (2³²).
    pub fn cast(&mut self, a: Tensor, ty: u32) -> Result<Tensor> {
        let number = |ty: u32| ty == ggml_sys::GGML_TYPE_F32 || ty == ggml_sys::GGML_TYPE_I32;
        let known = ty == ggml_sys::GGML_TYPE_F32 || (number(self.ty(a)) && number(ty));
        let ok = known && self.rows_packed(a) && u32::try_from(self.n_elements(a)).is_ok();
        self.need(ok, "cast", "packed rows and a type that it converts", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_cast(self.raw(), self.ptr(a), ty) };
        self.keep(raw)
    }

    /// Whether no id occurs twice in a row of `ids`: a ranking, or the first part of one.
    pub fn ids_differ(&self, ids: Tensor) -> bool {
        let ranks = |op: u32| op == ggml_sys::GGML_OP_ARGSORT;
        let op = self.op(ids);
        ranks(op) || (op == ggml_sys::GGML_OP_VIEW && self.view_source_op(ids).is_some_and(ranks))
    }

    fn is_ids(&self, ids: Tensor) -> bool {
        let i = self.ne(ids);
        self.ty(ids) == ggml_sys::GGML_TYPE_I32 && i[2] * i[3] == 1
    }
}
