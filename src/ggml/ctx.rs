//! A ggml context with checked constructors: tensors are small ids, every op verifies what
//! ggml would otherwise assert.
//!
//! Shapes are in ggml order, `ne[0]` fastest. Naming trap: `mul_mat(a [k, m], b [k, n])`
//! gives `[m, n]`.

use super::buffer::Buffer;
use ggml_sys::{ggml_backend_buffer_type_t, ggml_cgraph, ggml_context, ggml_tensor};
use std::collections::HashMap;
use std::ffi::CString;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use thiserror::Error;

/// A tensor of one [`Ctx`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tensor(pub(super) u32);

/// A graph of one [`Ctx`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Graph(pub(super) u32);

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
    pub(super) tensors: Vec<NonNull<ggml_tensor>>,
    pub(super) graphs: Vec<NonNull<ggml_cgraph>>,
    buffers: Vec<Arc<Buffer>>,
    pub(super) capacity: usize,
    /// Rows in the order of [`super::product`], by what they are the rows of and whether in BF16.
    pub(super) tiles: HashMap<(Tensor, bool), Tensor>,
    on_cpu: bool,
}

pub(super) type Result<T> = std::result::Result<T, OpError>;

impl Ctx {
    /// A context with room for `capacity` tensors and four graphs of them.
    ///
    /// # Errors
    /// When ggml cannot allocate the headers.
    pub fn new(capacity: usize) -> Result<Self> {
        super::log::install();
        // SAFETY: plain size queries and a constructor.
        let raw = unsafe {
            let mem_size = capacity * (ggml_sys::ggml_tensor_overhead() + 16)
                + 4 * ggml_sys::ggml_graph_overhead_custom(capacity, false)
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
            tiles: HashMap::new(),
            on_cpu: true,
        })
    }

    /// A GPU is to compute what it can: ops of this project's own, which it lacks, are left to where
    /// they are asked for.
    pub fn for_gpu(&mut self) {
        self.on_cpu = false;
    }

    /// Whether the CPU computes everything.
    pub fn on_cpu(&self) -> bool {
        self.on_cpu
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

    pub(super) fn room(&self) -> Result<()> {
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

    /// Whether it has two dimensions at most.
    pub fn is_matrix(&self, t: Tensor) -> bool {
        self.ne(t)[2..] == [1, 1]
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
    pub(super) fn rows_even(&self, t: Tensor) -> bool {
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

    pub(super) fn repeats(&self, small: Tensor, large: Tensor) -> bool {
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
    pub fn on_host(&self, t: Tensor) -> bool {
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
}

impl Drop for Ctx {
    fn drop(&mut self) {
        // SAFETY: owned; headers are only reachable through this struct.
        unsafe { ggml_sys::ggml_free(self.raw()) };
    }
}

// SAFETY: a context is plain memory; `&mut self` guards every mutation.
unsafe impl Send for Ctx {}
