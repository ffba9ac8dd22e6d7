//! Where graphs are computed: on the CPU, or on a GPU and, where it lacks an op, on the CPU.

use super::buffer::Buffer;
use super::ctx::{Ctx, Graph, OpError, Tensor};
use super::plan::Plan;
use ggml_sys::{ggml_backend_buffer_type_t, ggml_backend_dev_t, ggml_backend_t, ggml_threadpool_t};
use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::ffi::CStr;
use std::sync::Arc;

/// Threads of the CPU and, once [given one](Backend::on_gpu), a GPU.
///
/// Threads are OpenMP's where ggml is built with it, which sleep when a wait takes longer; elsewhere
/// those of a pool that does not poll between graphs: threads that spin while nothing runs starve
/// whoever shares the cores.
pub struct Backend {
    /// Before what it was made for: fields are dropped in order.
    retired: Cell<Option<Plan>>,
    gpu: Option<Gpu>,
    cpu: ggml_backend_t,
    pool: ggml_threadpool_t,
}

struct Gpu {
    raw: ggml_backend_t,
    name: String,
    offload: Offload,
}

/// The part of a model that a GPU holds: its last blocks, as llama.cpp has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offload {
    /// The first block on the GPU.
    pub from_block: usize,
    /// And what follows the blocks.
    pub output: bool,
}

impl Offload {
    /// Everything.
    pub const ALL: Self = Self {
        from_block: 0,
        output: true,
    };

    /// The last `n_gpu_layers` of `n_blocks` blocks, and the output if they are fewer; everything
    /// if negative.
    pub fn layers(n_gpu_layers: i32, n_blocks: usize) -> Self {
        match usize::try_from(n_gpu_layers) {
            Ok(n) => Self {
                from_block: n_blocks.saturating_sub(n),
                output: n > n_blocks,
            },
            Err(_) => Self::ALL,
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: live and owned.
        unsafe { ggml_sys::ggml_backend_free(self.raw) };
    }
}

/// The memory in which a tensor is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The GPU's; the host's where there is none.
    Device,
    /// The host's.
    Host,
}

/// What of a graph a GPU computes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Split {
    /// Nodes in all, but views.
    pub nodes: usize,
    /// Ops that the GPU lacks, with the number of their nodes.
    pub on_cpu: BTreeMap<String, usize>,
}

impl Backend {
    /// A backend that computes on `n_threads` threads (at least one).
    ///
    /// # Errors
    /// When ggml cannot set the backend up.
    pub fn new(n_threads: usize) -> Result<Self, OpError> {
        super::log::install();
        let n = i32::try_from(n_threads.clamp(1, 512)).expect("clamped to 512");
        // SAFETY: plain constructors; the pool outlives its use (Drop frees the backend first).
        unsafe {
            let cpu = ggml_sys::ggml_backend_cpu_init();
            if cpu.is_null() {
                return Err(OpError::Backend("the CPU backend does not start"));
            }
            let mut params = ggml_sys::ggml_threadpool_params_default(n);
            params.poll = 0;
            let pool = ggml_sys::ggml_threadpool_new(&raw mut params);
            if pool.is_null() {
                ggml_sys::ggml_backend_free(cpu);
                return Err(OpError::Backend("the thread pool does not start"));
            }
            ggml_sys::ggml_backend_cpu_set_n_threads(cpu, n);
            ggml_sys::ggml_backend_cpu_set_threadpool(cpu, pool);
            Ok(Self {
                retired: Cell::default(),
                gpu: None,
                cpu,
                pool,
            })
        }
    }

    /// The same with the first GPU that this build of ggml finds, if it finds one, for `offload`.
    ///
    /// # Errors
    /// A GPU that does not start.
    pub fn on_gpu(mut self, offload: Offload) -> Result<Self, OpError> {
        if let Some(device) = first_gpu() {
            // SAFETY: the device is from ggml's own list; Gpu owns the backend.
            let raw = unsafe { ggml_sys::ggml_backend_dev_init(device, std::ptr::null()) };
            if raw.is_null() {
                return Err(OpError::Backend("the GPU does not start"));
            }
            let name = describe(device);
            self.gpu = Some(Gpu { raw, name, offload });
        }
        Ok(self)
    }

    /// What the GPU is called, if there is one.
    pub fn gpu(&self) -> Option<&str> {
        self.gpu.as_ref().map(|g| g.name.as_str())
    }

    /// Where the weights of a block are, or of what follows the blocks.
    pub fn side_of(&self, block: Option<usize>) -> Side {
        let on_gpu = self.gpu.as_ref().is_some_and(|g| match block {
            Some(block) => block >= g.offload.from_block,
            None => g.offload.output,
        });
        if on_gpu { Side::Device } else { Side::Host }
    }

    /// The backends by preference; the CPU is last.
    pub(super) fn raw_in_order(&self) -> Vec<ggml_backend_t> {
        self.gpu.iter().map(|g| g.raw).chain([self.cpu]).collect()
    }

    fn raw(&self, side: Side) -> ggml_backend_t {
        match (&self.gpu, side) {
            (Some(gpu), Side::Device) => gpu.raw,
            _ => self.cpu,
        }
    }

    fn buffer_type_of(&self, side: Side) -> ggml_backend_buffer_type_t {
        // SAFETY: live backend.
        unsafe { ggml_sys::ggml_backend_get_default_buffer_type(self.raw(side)) }
    }

    pub(super) fn buffer_type(&self) -> ggml_backend_buffer_type_t {
        self.buffer_type_of(Side::Device)
    }

    /// Run every node of `graph`, in order. `plan` is the one that gave it memory.
    ///
    /// # Errors
    /// When ggml reports a failure, or a tensor of the graph has no memory yet.
    pub fn compute(&mut self, ctx: &Ctx, plan: &Plan, graph: Graph) -> Result<(), OpError> {
        ctx.check_allocated(graph)?;
        let raw_graph = ctx.graph_ptr(graph);
        // SAFETY: the graph belongs to `ctx`, all its tensors and sources have memory; its
        // scheduler has split this very graph.
        let status = unsafe {
            match plan.scheduler(graph) {
                Some(s) => ggml_sys::ggml_backend_sched_graph_compute(s, raw_graph),
                None => ggml_sys::ggml_backend_graph_compute(self.raw(Side::Device), raw_graph),
            }
        };
        if status == ggml_sys::GGML_STATUS_SUCCESS {
            Ok(())
        } else {
            Err(OpError::Backend("a graph did not compute"))
        }
    }

    /// A zeroed buffer of `size` bytes, on the GPU where there is one.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn alloc(&self, size: usize) -> Result<Arc<Buffer>, OpError> {
        Buffer::new(self.buffer_type(), size)
    }

    fn room_on(&self, side: Side, bytes: usize) -> usize {
        // SAFETY: the buffer type is a live backend's own.
        let align = unsafe { ggml_sys::ggml_backend_buft_get_alignment(self.buffer_type_of(side)) };
        bytes.next_multiple_of(align.max(64))
    }

    /// Bytes from the start of `bytes` of data to where the next tensor may start.
    pub fn stride(&self, bytes: usize) -> usize {
        self.room_on(Side::Device, bytes)
    }

    /// Place `tensors` one after another in one fresh zeroed buffer.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn place(&self, ctx: &mut Ctx, tensors: &[Tensor]) -> Result<Arc<Buffer>, OpError> {
        self.place_on(Side::Device, ctx, tensors)
    }

    /// The same, on a side.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn place_on(
        &self,
        side: Side,
        ctx: &mut Ctx,
        tensors: &[Tensor],
    ) -> Result<Arc<Buffer>, OpError> {
        let buft = self.buffer_type_of(side);
        let room = |ctx: &Ctx, t| self.room_on(side, ctx.needs(t, buft));
        let total: usize = tensors.iter().map(|&t| room(ctx, t)).sum();
        let buffer = Buffer::new(buft, total)?;
        let mut at = 0;
        for &t in tensors {
            ctx.bind(t, &buffer, at)?;
            at += room(ctx, t);
        }
        Ok(buffer)
    }

    /// Give memory to every tensor of `graph` that has none, reusing it along the graph, and
    /// that of a plan which was [retired](Self::retire): fresh pages cost more than many of a
    /// graph's operations. `parts`: the graphs that will be computed, together `graph`; on a GPU
    /// each is planned by itself, and what a later one reads of an earlier one must have memory.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn plan(&self, ctx: &Ctx, graph: Graph, parts: &[Graph]) -> Result<Plan, OpError> {
        match self.gpu {
            Some(_) => Plan::split(self, ctx, parts),
            None => Plan::on_one(self.retired.take(), self, ctx, graph),
        }
    }

    /// Keep the memory of a graph that is not computed again for the next plan.
    pub fn retire(&self, plan: Plan) {
        self.retired.set(Some(plan));
    }

    fn gpu_takes(&self, ctx: &Ctx, t: Tensor) -> bool {
        // SAFETY: live backend and header.
        unsafe { ggml_sys::ggml_backend_supports_op(self.raw(Side::Device), ctx.ptr(t)) }
    }

    /// Those of `owners` that the GPU cannot hold: a node that writes into one of them is not
    /// computed there.
    pub fn host_bound(&self, ctx: &Ctx, owners: &[Tensor]) -> HashSet<Tensor> {
        if self.gpu.is_none() {
            return HashSet::new();
        }
        let owners: HashSet<Tensor> = owners.iter().copied().collect();
        let writers = ctx.tensors().filter(|&t| !self.gpu_takes(ctx, t));
        writers
            .map(|t| ctx.view_root(t))
            .filter(|t| owners.contains(t))
            .collect()
    }

    /// What of `graph` is left to the CPU.
    pub fn split(&self, ctx: &Ctx, graph: Graph) -> Split {
        let mut split = Split::default();
        for t in ctx.computed(graph) {
            split.nodes += 1;
            if !self.gpu_takes(ctx, t) {
                *split.on_cpu.entry(super::op_name(ctx.op(t))).or_default() += 1;
            }
        }
        split
    }
}

/// The first GPU of ggml's list.
fn first_gpu() -> Option<ggml_backend_dev_t> {
    // SAFETY: indices below the count; ggml's list of devices lives as long as the process.
    unsafe {
        (0..ggml_sys::ggml_backend_dev_count())
            .map(|i| ggml_sys::ggml_backend_dev_get(i))
            .find(|&d| {
                let kind = ggml_sys::ggml_backend_dev_type(d);
                kind == ggml_sys::GGML_BACKEND_DEVICE_TYPE_GPU
                    || kind == ggml_sys::GGML_BACKEND_DEVICE_TYPE_IGPU
            })
    }
}

/// The GPU that [`Backend::on_gpu`] would take: its name and what it is.
pub fn gpu_name() -> Option<String> {
    first_gpu().map(describe)
}

fn describe(device: ggml_backend_dev_t) -> String {
    // SAFETY: a live device's names are static strings.
    let text = |p| unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned();
    // SAFETY: as above.
    let (name, what) = unsafe {
        (
            ggml_sys::ggml_backend_dev_name(device),
            ggml_sys::ggml_backend_dev_description(device),
        )
    };
    format!("{} ({})", text(name), text(what))
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Plans hold schedulers over the backends.
        self.retired.take();
        self.gpu = None;
        // SAFETY: both are live and owned; the backend stops using the pool first.
        unsafe {
            ggml_sys::ggml_backend_free(self.cpu);
            ggml_sys::ggml_threadpool_free(self.pool);
        }
    }
}

// SAFETY: ggml backends and pools may be used from any one thread at a time; `compute`
// takes `&mut self`.
unsafe impl Send for Backend {}
