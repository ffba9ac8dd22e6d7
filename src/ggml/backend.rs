//! The CPU backend, its buffers and the plan that gives a graph its memory.

use super::ctx::{Ctx, Graph, OpError, Tensor};
use ggml_sys::{ggml_backend_buffer_t, ggml_backend_t, ggml_gallocr_t, ggml_threadpool_t};
use std::any::Any;
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;

/// A CPU backend with its own thread pool.
///
/// The pool does not poll between graphs: threads that spin while nothing runs starve
/// whoever shares the cores.
pub struct Cpu {
    raw: ggml_backend_t,
    pool: ggml_threadpool_t,
    retired: Cell<Option<Plan>>,
}

impl Cpu {
    /// A backend that computes on `n_threads` threads (at least one).
    ///
    /// # Errors
    /// When ggml cannot set the backend up.
    pub fn new(n_threads: usize) -> Result<Self, OpError> {
        super::log::install();
        let n = i32::try_from(n_threads.clamp(1, 512)).expect("clamped to 512");
        // SAFETY: plain constructors; the pool outlives its use (Drop frees the backend first).
        unsafe {
            let raw = ggml_sys::ggml_backend_cpu_init();
            if raw.is_null() {
                return Err(OpError::Backend("the CPU backend does not start"));
            }
            let mut params = ggml_sys::ggml_threadpool_params_default(n);
            params.poll = 0;
            let pool = ggml_sys::ggml_threadpool_new(&raw mut params);
            if pool.is_null() {
                ggml_sys::ggml_backend_free(raw);
                return Err(OpError::Backend("the thread pool does not start"));
            }
            ggml_sys::ggml_backend_cpu_set_n_threads(raw, n);
            ggml_sys::ggml_backend_cpu_set_threadpool(raw, pool);
            Ok(Self {
                raw,
                pool,
                retired: Cell::default(),
            })
        }
    }

    /// Run every node of `graph`, in order.
    ///
    /// # Errors
    /// When ggml reports a failure, or a tensor of the graph has no memory yet.
    pub fn compute(&mut self, ctx: &Ctx, graph: Graph) -> Result<(), OpError> {
        ctx.check_allocated(graph)?;
        // SAFETY: the graph belongs to `ctx`, all its tensors and sources have memory.
        let status =
            unsafe { ggml_sys::ggml_backend_graph_compute(self.raw, ctx.graph_ptr(graph)) };
        if status == ggml_sys::GGML_STATUS_SUCCESS {
            Ok(())
        } else {
            Err(OpError::Backend("a graph did not compute"))
        }
    }

    /// A zeroed buffer of `size` bytes.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn alloc(&self, size: usize) -> Result<Arc<Buffer>, OpError> {
        // SAFETY: the buffer type is the backend's own.
        let raw = unsafe {
            let buft = ggml_sys::ggml_backend_get_default_buffer_type(self.raw);
            ggml_sys::llama::ggml_backend_buft_alloc_buffer(buft, size.max(64))
        };
        if raw.is_null() {
            return Err(OpError::Memory { bytes: size });
        }
        // SAFETY: just allocated.
        unsafe { ggml_sys::ggml_backend_buffer_clear(raw, 0) };
        Ok(Arc::new(Buffer { raw, _keep: None }))
    }

    /// Give memory to every tensor of `graph` that has none, reusing it along the graph, and
    /// that of a plan which was [retired](Self::retire): fresh pages cost more than many of a
    /// graph's operations.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn plan(&self, ctx: &Ctx, graph: Graph) -> Result<Plan, OpError> {
        const NO_MEMORY: OpError = OpError::Backend("no memory for the graph");
        let mut plan = match self.retired.take() {
            Some(plan) => plan,
            None => {
                // SAFETY: the buffer type is the backend's own; the Plan owns the allocator.
                let raw = unsafe {
                    let buft = ggml_sys::ggml_backend_get_default_buffer_type(self.raw);
                    ggml_sys::ggml_gallocr_new(buft)
                };
                if raw.is_null() {
                    return Err(NO_MEMORY);
                }
                Plan { raw, bytes: 0 }
            }
        };
        // SAFETY: graph and tensors belong to `ctx`; the Plan must outlive the computation (the
        // caller keeps both in one struct).
        unsafe {
            if !ggml_sys::ggml_gallocr_alloc_graph(plan.raw, ctx.graph_ptr(graph)) {
                return Err(NO_MEMORY);
            }
            plan.bytes = ggml_sys::ggml_gallocr_get_buffer_size(plan.raw, 0);
        }
        Ok(plan)
    }

    /// Keep the memory of a graph that is not computed again for the next plan.
    pub fn retire(&self, plan: Plan) {
        self.retired.set(Some(plan));
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        // SAFETY: both are live and owned; the backend stops using the pool first.
        unsafe {
            ggml_sys::ggml_backend_free(self.raw);
            ggml_sys::ggml_threadpool_free(self.pool);
        }
    }
}

// SAFETY: ggml backends and pools may be used from any one thread at a time; `compute`
// takes `&mut self`.
unsafe impl Send for Cpu {}

/// Memory that tensors live in: allocated, or borrowed from a mapped file.
pub struct Buffer {
    raw: ggml_backend_buffer_t,
    /// What must stay alive as long as the buffer (the mapping it points into).
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl Buffer {
    /// A read-only buffer over `bytes`, which `keep` keeps alive. Its base must be
    /// 32-byte aligned (a mapping is).
    ///
    /// # Errors
    /// An unaligned base.
    pub fn over<T: Any + Send + Sync>(
        keep: Arc<T>,
        bytes: fn(&T) -> &[u8],
    ) -> Result<Arc<Self>, OpError> {
        let slice = bytes(&keep);
        if !(slice.as_ptr() as usize).is_multiple_of(32) || slice.is_empty() {
            return Err(OpError::Backend("a mapped file is not 32-byte aligned"));
        }
        let (ptr, len) = (slice.as_ptr(), slice.len());
        // SAFETY: the memory lives as long as `keep`, which this struct holds. ggml takes a
        // mutable pointer but only writes destinations of nodes, and weights are leaves.
        let raw = unsafe { ggml_sys::ggml_backend_cpu_buffer_from_ptr(ptr.cast_mut().cast(), len) };
        if raw.is_null() {
            return Err(OpError::Backend("a mapped file cannot be used as a buffer"));
        }
        Ok(Arc::new(Self {
            raw,
            _keep: Some(keep),
        }))
    }

    pub(super) fn raw(&self) -> ggml_backend_buffer_t {
        self.raw
    }

    /// Bytes in the buffer.
    pub fn size(&self) -> usize {
        // SAFETY: live buffer.
        unsafe { ggml_sys::ggml_backend_buffer_get_size(self.raw) }
    }

    /// First byte's address, on this host.
    pub(super) fn base(&self) -> NonNull<u8> {
        // SAFETY: live buffer; host buffers have a base.
        NonNull::new(unsafe { ggml_sys::ggml_backend_buffer_get_base(self.raw) }.cast())
            .expect("a host buffer has a base address")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: owned; tensors that point here are kept with an Arc to it by their Ctx.
        unsafe { ggml_sys::ggml_backend_buffer_free(self.raw) };
    }
}

// SAFETY: a buffer is plain memory; reads and writes go through Ctx, which is borrowed
// mutably for writes.
unsafe impl Send for Buffer {}
// SAFETY: see above; nothing is mutated through `&Buffer`.
unsafe impl Sync for Buffer {}

/// The memory of one graph's intermediate tensors.
pub struct Plan {
    raw: ggml_gallocr_t,
    /// Bytes allocated.
    pub bytes: usize,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: owned.
        unsafe { ggml_sys::ggml_gallocr_free(self.raw) };
    }
}

// SAFETY: an allocator is plain memory without thread affinity.
unsafe impl Send for Plan {}

/// Place `tensors` one after another in a fresh buffer of the backend.
///
/// # Errors
/// When the memory cannot be had.
impl Cpu {
    /// Place `tensors` one after another in one fresh zeroed buffer.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn place(&self, ctx: &mut Ctx, tensors: &[Tensor]) -> Result<Arc<Buffer>, OpError> {
        const ALIGN: usize = 64;
        let total: usize = tensors
            .iter()
            .map(|&t| ctx.n_bytes(t).next_multiple_of(ALIGN))
            .sum();
        let buffer = self.alloc(total)?;
        let mut at = 0;
        for &t in tensors {
            ctx.bind(t, &buffer, at)?;
            at += ctx.n_bytes(t).next_multiple_of(ALIGN);
        }
        Ok(buffer)
    }
}
