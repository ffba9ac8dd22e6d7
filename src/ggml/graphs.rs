//! Graphs of a context: made of roots, cut into parts, looked into.

use super::ctx::{Ctx, Graph, OpError, Result, Tensor};
use ggml_sys::{ggml_cgraph, ggml_tensor};
use std::collections::{HashMap, HashSet};
use std::ptr::NonNull;

impl Ctx {
    /// A graph that computes `roots` and all they need, in the order in which they were made.
    ///
    /// # Errors
    /// More than four graphs, or no root.
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
    /// More than four graphs.
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
        if self.graphs.len() >= 4 {
            return Err(OpError::Backend("a context holds four graphs"));
        }
        // SAFETY: `new` reserved the memory of four graphs of this capacity.
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
