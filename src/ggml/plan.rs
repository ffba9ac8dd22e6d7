//! The memory of a graph's intermediate tensors: ggml's allocator where one backend computes it,
//! its scheduler where a GPU leaves some nodes to the CPU.

use super::backend::Backend;
use super::ctx::{Ctx, Graph, OpError};
use ggml_sys::{ggml_backend_sched_t, ggml_gallocr_t};
use std::ptr::null_mut;

const NO_MEMORY: OpError = OpError::Backend("no memory for the graph");

/// The memory of graphs of one context.
pub struct Plan {
    kind: Kind,
    /// Bytes allocated, on all backends.
    pub bytes: usize,
}

enum Kind {
    One(Allocator),
    Split(Vec<(Graph, Scheduler)>),
}

struct Allocator(ggml_gallocr_t);

impl Drop for Allocator {
    fn drop(&mut self) {
        // SAFETY: owned.
        unsafe { ggml_sys::ggml_gallocr_free(self.0) };
    }
}

/// One graph, cut where it goes from one backend to another, with the copies between them.
struct Scheduler(ggml_backend_sched_t);

impl Drop for Scheduler {
    fn drop(&mut self) {
        // SAFETY: owned; the backends it was made for outlive plans (see `Backend::plan`).
        unsafe { ggml_sys::ggml_backend_sched_free(self.0) };
    }
}

impl Scheduler {
    /// Split `graph` and give its tensors memory.
    ///
    /// A part of a graph has sources that are neither its nodes nor its leaves. ggml sizes its tables
    /// by those two alone, so they are first made for a graph of as many nodes as the context has
    /// tensors; and it takes other sources to be wherever they are read, so it is told where they
    /// are.
    fn new(backend: &Backend, ctx: &Ctx, graph: Graph) -> Result<Self, OpError> {
        let mut backends = backend.raw_in_order();
        let n_backends = backends.len() as i32;
        let n = ctx.n_tensors() + 64;
        let (sizing, filler) = Ctx::filler(n)?;
        // SAFETY: live backends, the CPU's last; default buffer types; the graph and all its
        // sources belong to `ctx`, and both outlive the scheduler (Tape keeps them together).
        unsafe {
            let raw = ggml_sys::ggml_backend_sched_new(
                backends.as_mut_ptr(),
                null_mut(),
                n_backends,
                n,
                false,
                false,
            );
            if raw.is_null() {
                return Err(NO_MEMORY);
            }
            let scheduler = Self(raw);
            let sized = ggml_sys::ggml_backend_sched_reserve(raw, sizing.graph_ptr(filler));
            for t in ctx.read_from_outside(graph) {
                let owner = if ctx.on_host(t) {
                    backends.last()
                } else {
                    backends.first()
                };
                let owner = *owner.expect("the CPU at least");
                ggml_sys::ggml_backend_sched_set_tensor_backend(raw, ctx.ptr(t), owner);
            }
            if sized && ggml_sys::ggml_backend_sched_alloc_graph(raw, ctx.graph_ptr(graph)) {
                Ok(scheduler)
            } else {
                Err(NO_MEMORY)
            }
        }
    }

    fn bytes(&self, backend: &Backend) -> usize {
        let of = |b| {
            // SAFETY: live scheduler and one of its backends.
            unsafe { ggml_sys::ggml_backend_sched_get_buffer_size(self.0, b) }
        };
        backend.raw_in_order().into_iter().map(of).sum()
    }
}

impl Plan {
    /// Memory for every tensor of `graph` that has none, reused along the graph. `old` gives its
    /// own away for that.
    pub(super) fn on_one(
        old: Option<Self>,
        backend: &Backend,
        ctx: &Ctx,
        graph: Graph,
    ) -> Result<Self, OpError> {
        let allocator = match old.map(|p| p.kind) {
            Some(Kind::One(allocator)) => allocator,
            _ => {
                // SAFETY: the buffer type is the backend's own; Allocator owns the result.
                let raw = unsafe { ggml_sys::ggml_gallocr_new(backend.buffer_type()) };
                if raw.is_null() {
                    return Err(NO_MEMORY);
                }
                Allocator(raw)
            }
        };
        // SAFETY: graph and tensors belong to `ctx`; the Plan must outlive the computation (the
        // caller keeps both in one struct).
        let bytes = unsafe {
            if !ggml_sys::ggml_gallocr_alloc_graph(allocator.0, ctx.graph_ptr(graph)) {
                return Err(NO_MEMORY);
            }
            ggml_sys::ggml_gallocr_get_buffer_size(allocator.0, 0)
        };
        Ok(Self {
            kind: Kind::One(allocator),
            bytes,
        })
    }

    /// Memory for each of `parts`, computed one after another. What one reads of those before must
    /// have memory of its own already.
    pub(super) fn split(backend: &Backend, ctx: &Ctx, parts: &[Graph]) -> Result<Self, OpError> {
        let part = |&g| Ok((g, Scheduler::new(backend, ctx, g)?));
        let parts: Vec<(Graph, Scheduler)> = parts.iter().map(part).collect::<Result<_, _>>()?;
        Ok(Self {
            bytes: parts.iter().map(|(_, s)| s.bytes(backend)).sum(),
            kind: Kind::Split(parts),
        })
    }

    /// The scheduler of `graph`, if it has one.
    pub(super) fn scheduler(&self, graph: Graph) -> Option<ggml_backend_sched_t> {
        match &self.kind {
            Kind::One(_) => None,
            Kind::Split(parts) => parts.iter().find(|(g, _)| *g == graph).map(|(_, s)| s.0),
        }
    }
}

// SAFETY: allocators and schedulers are plain memory without thread affinity, and take the
// backends only in `Backend::compute`, which holds them exclusively.
unsafe impl Send for Plan {}
