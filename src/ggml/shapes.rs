//! Constructors of views, copies and repeats.

use super::ctx::{Ctx, Result, Tensor};

impl Ctx {
    /// The same elements in another shape.
    ///
    /// # Errors
    /// Another number of elements, or a tensor that is not contiguous.
    pub fn reshape(&mut self, a: Tensor, ne: [i64; 4]) -> Result<Tensor> {
        let ok = self.is_contiguous(a)
            && ne.iter().product::<i64>() as usize == self.n_elements(a)
            && ne.iter().all(|&n| n > 0);
        self.need(
            ok,
            "reshape",
            "a contiguous tensor with as many elements",
            &[a],
        )?;
        // SAFETY: checked above.
        let raw = unsafe {
            ggml_sys::ggml_reshape_4d(self.raw(), self.ptr(a), ne[0], ne[1], ne[2], ne[3])
        };
        self.keep(raw)
    }

    /// A strided view into `a`, `offset` bytes in.
    ///
    /// # Errors
    /// A view that leaves the tensor.
    pub fn view(
        &mut self,
        a: Tensor,
        ne: [i64; 4],
        nb: [usize; 4],
        offset: usize,
    ) -> Result<Tensor> {
        // SAFETY: valid type number.
        let (size, block) = unsafe {
            let ty = self.ty(a);
            (ggml_sys::ggml_type_size(ty), ggml_sys::ggml_blck_size(ty))
        };
        // A row of a quantised type is a run of blocks, each with `block` elements.
        let blocks = [ne[0] / block.max(1), ne[1], ne[2], ne[3]];
        let last: usize = (0..4)
            .map(|d| (blocks[d].max(1) as usize - 1) * nb[d])
            .sum();
        let ok = ne.iter().all(|&n| n > 0)
            && block > 0
            && ne[0] % block == 0
            && nb[0] == size
            && self.rows_packed(a)
            && offset + last + size <= self.n_bytes(a);
        self.need(ok, "view", "a view inside the tensor", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe {
            ggml_sys::ggml_view_4d(
                self.raw(),
                self.ptr(a),
                ne[0],
                ne[1],
                ne[2],
                ne[3],
                nb[1],
                nb[2],
                nb[3],
                offset,
            )
        };
        self.keep(raw)
    }

    /// Dimension `d` of `a` becomes dimension `axes[d]`.
    ///
    /// # Errors
    /// Axes that are no permutation.
    pub fn permute(&mut self, a: Tensor, axes: [i32; 4]) -> Result<Tensor> {
        let mut seen = [false; 4];
        for x in axes {
            if let Some(s) = usize::try_from(x).ok().and_then(|x| seen.get_mut(x)) {
                *s = true;
            }
        }
        self.need(
            seen == [true; 4],
            "permute",
            "a permutation of four axes",
            &[a],
        )?;
        // SAFETY: checked above.
        let raw = unsafe {
            ggml_sys::ggml_permute(self.raw(), self.ptr(a), axes[0], axes[1], axes[2], axes[3])
        };
        self.keep(raw)
    }

    /// First two dimensions swapped, as a view.
    ///
    /// # Errors
    /// No room.
    pub fn transpose(&mut self, a: Tensor) -> Result<Tensor> {
        self.room()?;
        // SAFETY: live tensor.
        let raw = unsafe { ggml_sys::ggml_transpose(self.raw(), self.ptr(a)) };
        self.keep(raw)
    }

    /// A contiguous copy, in shape `ne`.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn cont(&mut self, a: Tensor, ne: [i64; 4]) -> Result<Tensor> {
        let ok =
            ne.iter().product::<i64>() as usize == self.n_elements(a) && ne.iter().all(|&n| n > 0);
        self.need(ok, "cont", "as many elements", &[a])?;
        // SAFETY: checked above.
        let raw =
            unsafe { ggml_sys::ggml_cont_4d(self.raw(), self.ptr(a), ne[0], ne[1], ne[2], ne[3]) };
        self.keep(raw)
    }

    /// `a` itself when contiguous, else a contiguous copy of it.
    ///
    /// # Errors
    /// No room.
    pub fn packed(&mut self, a: Tensor) -> Result<Tensor> {
        if self.is_contiguous(a) {
            Ok(a)
        } else {
            self.cont(a, self.ne(a))
        }
    }

    /// A contiguous transposed copy: `[m, n, …] → [n, m, …]`. ggml's own copies one element at a
    /// time.
    ///
    /// # Errors
    /// No room.
    pub fn transposed(&mut self, a: Tensor) -> Result<Tensor> {
        let ne = self.ne(a);
        if self.on_cpu() && self.is_f32(a) && self.rows_packed(a) && ne[3] == 1 {
            return self.turned(a, 0..ne[0], ggml_sys::GGML_TYPE_F32);
        }
        let t = self.transpose(a)?;
        self.cont(t, self.ne(t))
    }

    /// `a` repeated to shape `ne`.
    ///
    /// # Errors
    /// A shape that is no multiple of `a`'s.
    pub fn repeat(&mut self, a: Tensor, ne: [i64; 4]) -> Result<Tensor> {
        let from = self.ne(a);
        let whole = (0..4).all(|d| ne[d] > 0 && ne[d] % from[d] == 0);
        let ok = self.is_f32(a) && self.rows_packed(a) && whole;
        self.need(ok, "repeat", "f32 and multiples of its shape", &[a])?;
        // SAFETY: checked above.
        let raw = unsafe {
            ggml_sys::ggml_repeat_4d(self.raw(), self.ptr(a), ne[0], ne[1], ne[2], ne[3])
        };
        self.keep(raw)
    }

    /// `a` followed by `b` along dimension `dim`.
    ///
    /// # Errors
    /// Shapes that differ in another dimension.
    pub fn concat(&mut self, a: Tensor, b: Tensor, dim: usize) -> Result<Tensor> {
        let (x, y) = (self.ne(a), self.ne(b));
        let same = dim < 4 && (0..4).all(|d| d == dim || x[d] == y[d]);
        let ok = self.is_f32(a) && self.is_f32(b) && same;
        self.need(
            ok,
            "concat",
            "f32 of one shape but for one dimension",
            &[a, b],
        )?;
        // SAFETY: checked above; dim is below 4.
        let raw =
            unsafe { ggml_sys::ggml_concat(self.raw(), self.ptr(a), self.ptr(b), dim as i32) };
        self.keep(raw)
    }

    /// Sum the repeats of `a` down to `like`'s shape (the transpose of broadcasting).
    ///
    /// # Errors
    /// Shapes that do not repeat.
    pub fn repeat_back(&mut self, a: Tensor, like: Tensor) -> Result<Tensor> {
        let ok = self.is_f32(a) && self.rows_packed(a) && self.repeats(like, a);
        self.need(
            ok,
            "repeat_back",
            "f32 repeats of the second tensor",
            &[a, like],
        )?;
        // SAFETY: checked above.
        let raw = unsafe { ggml_sys::ggml_repeat_back(self.raw(), self.ptr(a), self.ptr(like)) };
        self.keep(raw)
    }

    /// `a` with `b` added into the view (`nb`, `offset`) of it.
    ///
    /// # Errors
    /// A view that leaves `a`.
    pub fn acc(&mut self, a: Tensor, b: Tensor, nb: [usize; 4], offset: usize) -> Result<Tensor> {
        let n = self.ne(b);
        let last: usize = (0..4).map(|d| (n[d] as usize - 1) * nb[d]).sum();
        let ok = self.is_f32(a)
            && self.is_f32(b)
            && self.is_contiguous(a)
            && self.is_contiguous(b)
            && nb[0] == 4
            && offset + last + 4 <= self.n_bytes(a);
        self.need(ok, "acc", "contiguous f32 and a view inside it", &[a, b])?;
        // SAFETY: checked above.
        let raw = unsafe {
            ggml_sys::ggml_acc(
                self.raw(),
                self.ptr(a),
                self.ptr(b),
                nb[1],
                nb[2],
                nb[3],
                offset,
            )
        };
        self.keep(raw)
    }
}
