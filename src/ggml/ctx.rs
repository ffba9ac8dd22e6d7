//! A ggml context with checked constructors: tensors are small ids, every op verifies what
//! ggml would otherwise assert.
//!
//! Shapes are in ggml order, `ne[0]` fastest. Naming trap: `mul_mat(a [k, m], b [k, n])`
//! gives `[m, n]`.

use super::buffer::Buffer;
use ggml_sys::{ggml_backend_buffer_type_t, ggml_cgraph, ggml_context, ggml_tensor, llama};
use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use thiserror::Error;

/// A tensor of one [`Ctx`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tensor(u32);

/// A graph of one [`Ctx`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Graph(u32);

/// Why an op could not be built or run.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum OpError {
    /// Shapes, types or strides an op does not take.
    #[error("{op}: wanted {wanted}, found {found}")]
    Shape {
        /// The op.
        op: &'static str,
        /// What it takes.
        wanted: &'static str,
        /// What it was given.
        found: String,
    },
    /// The context has no room for another tensor header.
    #[error("no room for another tensor in a graph of {0} tensors")]
    Full(usize),
    /// Memory that could not be had.
    #[error("cannot allocate {bytes} bytes")]
    Memory {
        /// How many bytes were asked for.
        bytes: usize,
    },
    /// The backend failed.
    #[error("ggml: {0}")]
    Backend(&'static str),
    /// A tensor without memory was to be computed, read or written.
    #[error("tensor {0} has no memory")]
    Unallocated(String),
}

/// Owner of tensor headers, graphs, and of the buffers bound to them.
pub struct Ctx {
    raw: NonNull<ggml_context>,
    tensors: Vec<NonNull<ggml_tensor>>,
    graphs: Vec<NonNull<ggml_cgraph>>,
    buffers: Vec<Arc<Buffer>>,
    capacity: usize,
}

pub(super) type Result<T> = std::result::Result<T, OpError>;

impl Ctx {
    /// A context with room for `capacity` tensors and three graphs of them.
    ///
    /// # Errors
    /// When ggml cannot allocate the headers.
    pub fn new(capacity: usize) -> Result<Self> {
        super::log::install();
        // SAFETY: plain size queries and a constructor.
        let raw = unsafe {
            let mem_size = capacity * (ggml_sys::ggml_tensor_overhead() + 16)
                + 3 * ggml_sys::ggml_graph_overhead_custom(capacity, false)
                + 4096;
            ggml_sys::ggml_init(ggml_sys::ggml_init_params {
                mem_size,
                mem_buffer: null_mut(),
                no_alloc: true,
            })
        };
        Ok(Self {
            raw: NonNull::new(raw).ok_or(OpError::Backend("a context does not start"))?,
            tensors: Vec::with_capacity(capacity),
            graphs: Vec::new(),
            buffers: Vec::new(),
            capacity,
        })
    }

    pub(super) fn raw(&self) -> *mut ggml_context {
        self.raw.as_ptr()
    }

    fn get(&self, t: Tensor) -> &ggml_tensor {
        // SAFETY: ids are handed out by `keep` only; headers live as long as the context.
        unsafe { self.tensors[t.0 as usize].as_ref() }
    }

    /// `t` as the evaluation callback would see it.
    #[cfg(test)]
    pub(super) fn node(&self, t: Tensor) -> super::NodeView<'_> {
        super::NodeView::new(self.get(t))
    }

    pub(super) fn ptr(&self, t: Tensor) -> *mut ggml_tensor {
        self.tensors[t.0 as usize].as_ptr()
    }

    fn room(&self) -> Result<()> {
        // Constructors such as `cont` make one header each; a margin covers those that make two.
        if self.tensors.len() + 4 > self.capacity {
            return Err(OpError::Full(self.capacity));
        }
        Ok(())
    }

    pub(super) fn keep(&mut self, raw: *mut ggml_tensor) -> Result<Tensor> {
        let raw = NonNull::new(raw).ok_or(OpError::Full(self.capacity))?;
        let id = u32::try_from(self.tensors.len()).map_err(|_| OpError::Full(self.capacity))?;
        self.tensors.push(raw);
        Ok(Tensor(id))
    }

    fn describe(&self, ts: &[Tensor]) -> String {
        let one = |&t: &Tensor| {
            let g = self.get(t);
            format!("{:?} (type {}, strides {:?})", g.ne, g.type_, g.nb)
        };
        ts.iter().map(one).collect::<Vec<_>>().join(" and ")
    }

    pub(super) fn need(
        &self,
        ok: bool,
        op: &'static str,
        wanted: &'static str,
        ts: &[Tensor],
    ) -> Result<()> {
        if ok {
            return self.room();
        }
        Err(OpError::Shape {
            op,
            wanted,
            found: self.describe(ts),
        })
    }

    // ---- facts -------------------------------------------------------------------------

    /// Elements per dimension.
    pub fn ne(&self, t: Tensor) -> [i64; 4] {
        self.get(t).ne
    }

    /// Strides in bytes.
    pub fn nb(&self, t: Tensor) -> [usize; 4] {
        self.get(t).nb
    }

    /// ggml's type number.
    pub fn ty(&self, t: Tensor) -> u32 {
        self.get(t).type_
    }

    /// Elements of a block of the tensor's type.
    pub fn block(&self, t: Tensor) -> i64 {
        // SAFETY: type numbers of live tensors are valid.
        unsafe { ggml_sys::ggml_blck_size(self.ty(t)) }.max(1)
    }

    /// Elements in all.
    pub fn n_elements(&self, t: Tensor) -> usize {
        self.ne(t).iter().product::<i64>() as usize
    }

    /// Bytes from the first to the last element.
    pub fn n_bytes(&self, t: Tensor) -> usize {
        // SAFETY: live header.
        unsafe { ggml_sys::ggml_nbytes(self.ptr(t)) }
    }

    /// Bytes that the tensor needs in a buffer of type `buft`, which may want more than its data.
    pub(super) fn needs(&self, t: Tensor, buft: ggml_backend_buffer_type_t) -> usize {
        // SAFETY: live header, and the buffer type of a live backend.
        unsafe { ggml_sys::ggml_backend_buft_get_alloc_size(buft, self.ptr(t)) }
    }

    /// Whether the tensor has memory yet.
    pub fn has_memory(&self, t: Tensor) -> bool {
        !self.get(t).data.is_null()
    }

    /// The ggml op number that computes the tensor (0: a leaf).
    pub fn op(&self, t: Tensor) -> u32 {
        self.get(t).op
    }

    /// Whether elements lie in order without gaps.
    pub fn is_contiguous(&self, t: Tensor) -> bool {
        let g = self.get(t);
        // SAFETY: type numbers of live tensors are valid.
        let (block, size) = unsafe {
            (
                ggml_sys::ggml_blck_size(g.type_).max(1),
                ggml_sys::ggml_type_size(g.type_),
            )
        };
        let mut stride = size;
        for d in 0..4 {
            if g.ne[d] != 1 && g.nb[d] != stride {
                return false;
            }
            stride *= if d == 0 { g.ne[0] / block } else { g.ne[d] } as usize;
        }
        true
    }

    pub(super) fn is_f32(&self, t: Tensor) -> bool {
        self.ty(t) == ggml_sys::GGML_TYPE_F32
    }

    pub(super) fn rows_packed(&self, t: Tensor) -> bool {
        let g = self.get(t);
        // SAFETY: valid type number.
        g.nb[0] == unsafe { ggml_sys::ggml_type_size(g.type_) }
    }

    /// Whether rows are packed and lie at equal distances throughout, as ggml's
    /// `is_contiguous_1` has it.
    fn rows_even(&self, t: Tensor) -> bool {
        let (ne, nb) = (self.ne(t).map(|n| n as usize), self.nb(t));
        let mut next = if ne[1] == 1 {
            nb[0] * ne[0]
        } else {
            nb[1] * ne[1]
        };
        for d in 2..4 {
            if ne[d] != 1 && nb[d] != next {
                return false;
            }
            next *= ne[d];
        }
        self.rows_packed(t)
    }

    /// The op of the tensor that `t` is a view of.
    pub(super) fn view_source_op(&self, t: Tensor) -> Option<u32> {
        // SAFETY: a live tensor's view source is live.
        unsafe { self.get(t).view_src.as_ref() }.map(|v| v.op)
    }

    /// The tensor of this context that `t` is a view of, or `t`.
    pub fn view_root(&self, t: Tensor) -> Tensor {
        let source = self.get(t).view_src;
        if source.is_null() {
            return t;
        }
        let found = self.tensors.iter().position(|p| p.as_ptr() == source);
        found.map_or(t, |i| Tensor(i as u32))
    }

    fn repeats(&self, small: Tensor, large: Tensor) -> bool {
        let (s, l) = (self.ne(small), self.ne(large));
        (0..4).all(|d| s[d] > 0 && l[d] % s[d] == 0)
    }

    // ---- leaves ------------------------------------------------------------------------

    /// A tensor without memory: a weight, a parameter or an input.
    ///
    /// # Errors
    /// A row that is not a multiple of the type's block, a bad dimension, or no room.
    pub fn leaf(&mut self, ty: u32, ne: [i64; 4], name: &str) -> Result<Tensor> {
        self.room()?;
        let bad = |found: String| OpError::Shape {
            op: "leaf",
            wanted: "a known type, positive dimensions and whole blocks per row",
            found,
        };
        if ty >= ggml_sys::llama::GGML_TYPE_COUNT || ne.iter().any(|&n| n <= 0) {
            return Err(bad(format!("{ne:?} of type {ty}")));
        }
        // SAFETY: the type number is in range.
        let block = unsafe { ggml_sys::ggml_blck_size(ty) };
        if block == 0 || ne[0] % block != 0 {
            return Err(bad(format!("{ne:?} of type {ty}")));
        }
        // SAFETY: checked type and dimensions; room for the header.
        let raw = unsafe { ggml_sys::ggml_new_tensor(self.raw(), ty, 4, ne.as_ptr()) };
        let t = self.keep(raw)?;
        self.set_name(t, name);
        Ok(t)
    }

    /// Name a tensor (ggml keeps 63 bytes).
    pub fn set_name(&mut self, t: Tensor, name: &str) {
        let c = CString::new(name.replace('\0', "?")).expect("no NUL left");
        // SAFETY: live header, NUL-terminated name.
        unsafe { ggml_sys::ggml_set_name(self.ptr(t), c.as_ptr()) };
    }

    /// Keep the tensor's memory to the end of the graph: its value is read outside.
    pub fn set_output(&mut self, t: Tensor) {
        // SAFETY: live header.
        unsafe { ggml_sys::ggml_set_output(self.ptr(t)) };
    }

    /// Copy another node's op parameters: scale, epsilon, rope settings, precision.
    pub fn set_op_params(&mut self, t: Tensor, params: &[i32; 16]) {
        // SAFETY: live header, exclusive access.
        unsafe { (*self.ptr(t)).op_params = *params };
    }

    /// Let the tensor's data be `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// When it does not fit, or the tensor already has memory.
    pub fn bind(&mut self, t: Tensor, buffer: &Arc<Buffer>, offset: usize) -> Result<()> {
        let end = offset.checked_add(self.n_bytes(t));
        if end.is_none_or(|e| e > buffer.size()) || !self.get(t).data.is_null() {
            return Err(OpError::Shape {
                op: "bind",
                wanted: "an unbound tensor that fits its buffer",
                found: format!(
                    "{} at byte {offset} of {}",
                    self.describe(&[t]),
                    buffer.size()
                ),
            });
        }
        // SAFETY: the range lies inside the buffer, which `buffers` keeps alive.
        let status = unsafe {
            let at = buffer.base().as_ptr().add(offset);
            ggml_sys::ggml_backend_tensor_alloc(buffer.raw(), self.ptr(t), at.cast())
        };
        if status != ggml_sys::GGML_STATUS_SUCCESS {
            return Err(OpError::Backend("a tensor cannot be bound"));
        }
        if !self.buffers.iter().any(|b| Arc::ptr_eq(b, buffer)) {
            self.buffers.push(buffer.clone());
        }
        Ok(())
    }

    // ---- data --------------------------------------------------------------------------

    /// Write a contiguous tensor.
    ///
    /// # Errors
    /// A length other than the tensor's, or no memory.
    pub fn write<T: bytemuck::Pod>(&mut self, t: Tensor, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        self.check_data(t, bytes.len())?;
        // SAFETY: the tensor has memory for exactly `bytes.len()` bytes.
        unsafe {
            ggml_sys::ggml_backend_tensor_set(self.ptr(t), bytes.as_ptr().cast(), 0, bytes.len())
        };
        Ok(())
    }

    /// Read a contiguous tensor.
    ///
    /// # Errors
    /// A length other than the tensor's, or no memory.
    pub fn read<T: bytemuck::Pod>(&self, t: Tensor, out: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
        self.check_data(t, bytes.len())?;
        // SAFETY: the tensor has memory for exactly `bytes.len()` bytes.
        unsafe {
            ggml_sys::ggml_backend_tensor_get(
                self.ptr(t),
                bytes.as_mut_ptr().cast(),
                0,
                bytes.len(),
            )
        };
        Ok(())
    }

    /// The values of a contiguous f32 tensor: in place where they are on this host, else read into
    /// `scratch`. They are the caller's to change, but only what is [written](Self::write) is sure to
    /// reach the tensor.
    ///
    /// # Errors
    /// Another type, or no memory.
    pub fn values<'a>(&'a mut self, t: Tensor, scratch: &'a mut Vec<f32>) -> Result<&'a mut [f32]> {
        let n = self.n_elements(t);
        self.check_data(t, n * size_of::<f32>())?;
        if !self.on_host(t) {
            scratch.resize(n, 0.0);
            self.read(t, scratch)?;
            return Ok(scratch);
        }
        // SAFETY: the tensor has memory for `n` floats on this host, aligned as ggml aligns all
        // data; the borrow of `self` keeps others from it meanwhile.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.get(t).data.cast(), n) })
    }

    /// Whether the memory of `t`, which has some, is this host's.
    pub(super) fn on_host(&self, t: Tensor) -> bool {
        let g = self.get(t);
        // SAFETY: a tensor with memory, or what it is a view of, has a live buffer.
        unsafe {
            let buffer = g.view_src.as_ref().map_or(g.buffer, |v| v.buffer);
            ggml_sys::ggml_backend_buffer_is_host(buffer)
        }
    }

    fn check_data(&self, t: Tensor, n_bytes: usize) -> Result<()> {
        if self.get(t).data.is_null() {
            return Err(OpError::Unallocated(self.describe(&[t])));
        }
        if n_bytes != self.n_bytes(t) || !self.is_contiguous(t) {
            return Err(OpError::Shape {
                op: "copy",
                wanted: "a contiguous tensor and as many bytes as it has",
                found: format!("{} and {n_bytes} bytes", self.describe(&[t])),
            });
        }
        Ok(())
    }

    // ---- arithmetic --------------------------------------------------------------------

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

    // ---- matrices ----------------------------------------------------------------------

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

    // ---- normalisation, attention, activations -------------------------------------------

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

    // ---- shapes ------------------------------------------------------------------------

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

    /// A contiguous transposed copy: `[m, n, …] → [n, m, …]`.
    ///
    /// # Errors
    /// No room.
    pub fn transposed(&mut self, a: Tensor) -> Result<Tensor> {
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

    // ---- graphs ------------------------------------------------------------------------

    /// A graph that computes `roots` and all they need, in the order in which they were made.
    ///
    /// # Errors
    /// More than three graphs, or no root.
    pub fn graph(&mut self, roots: &[Tensor]) -> Result<Graph> {
        let g = self.new_graph()?;
        self.extend_graph(g, roots);
        Ok(g)
    }

    /// Append `roots` and all they need, in the order in which they were made, to a graph.
    ///
    /// ggml's own walk from the result back recurses once a node: a deep model would end the
    /// thread's stack. Sources are made before their readers, so it is given one node at a time;
    /// and what is computed when it was made needs its sources no longer than it must.
    pub fn extend_graph(&mut self, g: Graph, roots: &[Tensor]) {
        let mut needed: HashSet<*mut ggml_tensor> = HashSet::new();
        let mut open: Vec<*mut ggml_tensor> = roots.iter().map(|&t| self.ptr(t)).collect();
        while let Some(t) = open.pop() {
            if needed.insert(t) {
                // SAFETY: sources of live headers are live.
                let sources = unsafe { (*t).src };
                open.extend(sources.iter().filter(|s| !s.is_null()));
            }
        }
        for t in &self.tensors {
            if needed.contains(&t.as_ptr()) {
                // SAFETY: live graph and tensor; the graph has room for every header of the
                // context.
                unsafe { ggml_sys::ggml_build_forward_expand(self.graph_ptr(g), t.as_ptr()) };
            }
        }
    }

    /// A context with one graph, of `n` times the same leaf: for the sizes of tables.
    pub(super) fn filler(n: usize) -> Result<(Self, Graph)> {
        let mut c = Self::new(n + 8)?;
        let leaf = c.leaf(ggml_sys::GGML_TYPE_F32, [1, 1, 1, 1], "")?;
        let g = c.new_graph()?;
        for _ in 0..n {
            // SAFETY: live graph and tensor; the graph has room for `n + 8` nodes.
            unsafe { ggml_sys::ggml_graph_add_node(c.graph_ptr(g), c.ptr(leaf)) };
        }
        Ok((c, g))
    }

    /// Nodes `range` of `of`, as a graph of their own.
    ///
    /// # Errors
    /// More than three graphs.
    pub fn graph_part(&mut self, of: Graph, range: std::ops::Range<usize>) -> Result<Graph> {
        let g = self.new_graph()?;
        let n = self.n_nodes(of);
        for i in range.start..range.end.min(n) {
            // SAFETY: `i` is below the node count; both graphs are live.
            unsafe {
                let node = ggml_sys::ggml_graph_node(self.graph_ptr(of), i as i32);
                ggml_sys::ggml_graph_add_node(self.graph_ptr(g), node);
            }
        }
        Ok(g)
    }

    /// Number of nodes.
    pub fn n_nodes(&self, g: Graph) -> usize {
        // SAFETY: live graph.
        unsafe { ggml_sys::ggml_graph_n_nodes(self.graph_ptr(g)) as usize }
    }

    /// Every tensor, in the order in which they were made.
    pub(super) fn tensors(&self) -> impl Iterator<Item = Tensor> + '_ {
        (0..self.tensors.len()).map(|i| Tensor(i as u32))
    }

    /// How many there are.
    pub fn n_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Whether `t` is one of the first `n`.
    pub fn made_before(&self, t: Tensor, n: usize) -> bool {
        (t.0 as usize) < n
    }

    /// The nodes of `g` that are computed: all but views.
    pub(super) fn computed(&self, g: Graph) -> Vec<Tensor> {
        let nodes = (0..self.n_nodes(g)).map(|i| {
            // SAFETY: the index is below the node count.
            unsafe { ggml_sys::ggml_graph_node(self.graph_ptr(g), i as i32) }
        });
        let nodes: HashSet<*mut ggml_tensor> = nodes.collect();
        let no_view = |&t: &Tensor| {
            nodes.contains(&self.ptr(t))
                && !matches!(
                    self.op(t),
                    ggml_sys::GGML_OP_RESHAPE
                        | ggml_sys::GGML_OP_VIEW
                        | ggml_sys::GGML_OP_PERMUTE
                        | ggml_sys::GGML_OP_TRANSPOSE
                )
        };
        self.tensors().filter(no_view).collect()
    }

    /// The sources of nodes of `g` that are no nodes of it, each once.
    pub(super) fn read_from_outside(&self, g: Graph) -> Vec<Tensor> {
        let node = |i: usize| {
            // SAFETY: the index is below the node count.
            unsafe { ggml_sys::ggml_graph_node(self.graph_ptr(g), i as i32) }
        };
        let nodes: HashSet<*mut ggml_tensor> = (0..self.n_nodes(g)).map(node).collect();
        let mut read = HashSet::new();
        for &t in &nodes {
            // SAFETY: nodes of a live graph are live.
            let sources = unsafe { (*t).src };
            read.extend(sources.into_iter().filter(|s| !nodes.contains(s)));
        }
        self.tensors()
            .filter(|&t| read.contains(&self.ptr(t)))
            .collect()
    }

    /// What the nodes of `g` from `n` on read of those before them, each once, as the tensors that
    /// own the memory.
    pub fn carried_over(&self, g: Graph, n: usize) -> Vec<Tensor> {
        let ids = self.tensors.iter().enumerate();
        let ids: HashMap<*mut ggml_tensor, u32> =
            ids.map(|(i, t)| (t.as_ptr(), i as u32)).collect();
        let owner = |t: *mut ggml_tensor| {
            // SAFETY: nodes, sources and view sources of a live graph are live.
            let source = unsafe { (*t).view_src };
            if source.is_null() { t } else { source }
        };
        // SAFETY: the index is below the node count.
        let node = |i: usize| unsafe { ggml_sys::ggml_graph_node(self.graph_ptr(g), i as i32) };
        let before: HashSet<_> = (0..n).map(|i| owner(node(i))).collect();
        let mut carried = HashSet::new();
        for i in n..self.n_nodes(g) {
            // SAFETY: as above.
            let sources = unsafe { (*node(i)).src };
            let read = sources.into_iter().filter(|s| !s.is_null()).map(owner);
            carried.extend(read.filter(|s| before.contains(s)));
        }
        let ids = carried.iter().filter_map(|t| ids.get(t).copied());
        ids.map(Tensor).collect()
    }

    fn new_graph(&mut self) -> Result<Graph> {
        if self.graphs.len() >= 3 {
            return Err(OpError::Backend("a context holds three graphs"));
        }
        // SAFETY: `new` reserved the memory of three graphs of this capacity.
        let raw = unsafe { ggml_sys::ggml_new_graph_custom(self.raw(), self.capacity, false) };
        self.graphs
            .push(NonNull::new(raw).ok_or(OpError::Full(self.capacity))?);
        Ok(Graph(self.graphs.len() as u32 - 1))
    }

    pub(super) fn graph_ptr(&self, g: Graph) -> *mut ggml_cgraph {
        self.graphs[g.0 as usize].as_ptr()
    }

    /// Every node and source of the graph must have memory before ggml touches it.
    pub(super) fn check_allocated(&self, g: Graph) -> Result<()> {
        let mut seen = HashSet::new();
        for i in 0..self.n_nodes(g) {
            // SAFETY: `i` is below the node count; nodes and sources are live headers.
            unsafe {
                let node = ggml_sys::ggml_graph_node(self.graph_ptr(g), i as i32);
                let sources = (*node).src.iter().copied().filter(|s| !s.is_null());
                for t in sources.chain([node]) {
                    if seen.insert(t) && (*t).data.is_null() {
                        return Err(OpError::Unallocated(format!("{:?}", (*t).ne)));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for Ctx {
    fn drop(&mut self) {
        // SAFETY: owned; headers are only reachable through this struct.
        unsafe { ggml_sys::ggml_free(self.raw()) };
    }
}

// SAFETY: a context is plain memory; `&mut self` guards every mutation.
unsafe impl Send for Ctx {}
