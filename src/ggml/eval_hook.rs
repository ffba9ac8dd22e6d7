//! llama.cpp's evaluation callback as a safe Rust hook, and the recorder of its graph.

use ggml_sys::ggml_tensor;
use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;

/// A node of llama.cpp's graph, as the callback sees it.
pub struct NodeView<'a>(&'a ggml_tensor);

#[cfg(test)]
impl<'a> NodeView<'a> {
    pub(super) fn new(t: &'a ggml_tensor) -> Self {
        Self(t)
    }
}

impl NodeView<'_> {
    /// ggml's op number.
    pub fn op(&self) -> u32 {
        self.0.op
    }

    /// The node's name, `Qcur-0` and the like.
    pub fn name(&self) -> String {
        name_of(self.0)
    }

    /// The name of source `i`, if there is one.
    pub fn src_name(&self, i: usize) -> Option<String> {
        // SAFETY: non-null sources of a live node are live.
        unsafe { self.0.src.get(i)?.as_ref() }.map(name_of)
    }

    /// The name of source `i` as the model file has it: the scheduler calls its copies of a weight on
    /// another device `DEVICE#weight#n`.
    pub fn weight_name(&self, i: usize) -> Option<String> {
        self.src_name(i).map(|name| original(&name).to_owned())
    }

    /// Elements per dimension.
    pub fn ne(&self) -> [i64; 4] {
        self.0.ne
    }

    /// Copy a contiguous f32 node's values out (from the device, where it is on one).
    /// False, and `out` untouched, when it is neither.
    pub fn read_f32(&self, out: &mut Vec<f32>) -> bool {
        read_f32(self.0, out)
    }

    /// An identity for source `i`, the same for every reader of one tensor within a graph.
    pub fn src_id(&self, i: usize) -> Option<usize> {
        self.0
            .src
            .get(i)
            .filter(|p| !p.is_null())
            .map(|&p| p as usize)
    }

    /// Copy out source `i` in logical order, whatever its strides (f32, f16 or bf16).
    ///
    /// Returns its `ne`; the error names what it is instead, and `out` is then untouched.
    ///
    /// # Errors
    /// No such source, another type, no data.
    pub fn read_src(&self, i: usize, out: &mut Vec<f32>) -> Result<[i64; 4], String> {
        // SAFETY: non-null sources of a live node are live.
        let source = self.0.src.get(i).and_then(|p| unsafe { p.as_ref() });
        let t = source.ok_or_else(|| format!("no source {i}"))?;
        if !read_f32(t, out) {
            read_strided(t, out)?;
        }
        Ok(t.ne)
    }
}

/// Reads the bytes that the tensor spans in one piece and picks its elements from them: one
/// transfer from a device, however the tensor is strided.
fn read_strided(t: &ggml_tensor, out: &mut Vec<f32>) -> Result<(), String> {
    let decode: fn(&[u8]) -> f32 = match t.type_ {
        ggml_sys::GGML_TYPE_F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        ggml_sys::GGML_TYPE_F16 => |b| half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
        ggml_sys::GGML_TYPE_BF16 => |b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        other => return Err(format!("a tensor of type {other}")),
    };
    let size = if t.type_ == ggml_sys::GGML_TYPE_F32 {
        4
    } else {
        2
    };
    // SAFETY: a live node's view source is live.
    let owner = unsafe { t.view_src.as_ref() }.unwrap_or(t);
    if t.data.is_null() || owner.buffer.is_null() || t.ne.iter().any(|&n| n < 1) {
        return Err("a tensor without data".into());
    }
    let ne = t.ne.map(|n| n as usize);
    let span = size + (0..4).map(|d| (ne[d] - 1) * t.nb[d]).sum::<usize>();
    let mut bytes = vec![0; span];
    // SAFETY: `span` is ggml_nbytes of a type without blocks; computed and synchronised by the
    // scheduler before it asks.
    unsafe { ggml_sys::ggml_backend_tensor_get(t, bytes.as_mut_ptr().cast(), 0, span) };
    out.clear();
    out.reserve(ne.iter().product());
    for i3 in 0..ne[3] {
        for i2 in 0..ne[2] {
            for i1 in 0..ne[1] {
                let row = i3 * t.nb[3] + i2 * t.nb[2] + i1 * t.nb[1];
                out.extend((0..ne[0]).map(|i0| {
                    let at = row + i0 * t.nb[0];
                    decode(&bytes[at..at + size])
                }));
            }
        }
    }
    Ok(())
}

fn read_f32(t: &ggml_tensor, out: &mut Vec<f32>) -> bool {
    let mut stride = 4;
    for d in 0..4 {
        if t.ne[d] != 1 && t.nb[d] != stride {
            return false;
        }
        stride *= t.ne[d] as usize;
    }
    // SAFETY: a live node's view source is live.
    let owner = unsafe { t.view_src.as_ref() }.unwrap_or(t);
    if t.type_ != ggml_sys::GGML_TYPE_F32 || t.data.is_null() || owner.buffer.is_null() {
        return false;
    }
    out.resize(stride / 4, 0.0);
    // SAFETY: the tensor is contiguous f32 with `stride` bytes, computed and synchronised
    // by the scheduler before it asks.
    unsafe { ggml_sys::ggml_backend_tensor_get(t, out.as_mut_ptr().cast(), 0, stride) };
    true
}

fn name_of(t: &ggml_tensor) -> String {
    // SAFETY: ggml NUL-terminates names within the array.
    unsafe { CStr::from_ptr(t.name.as_ptr()) }
        .to_string_lossy()
        .into_owned()
}

/// What a context calls for every node: `want` before it is computed, `seen` after, when
/// wanted. `abort` is polled during the computation.
pub trait Hook: Send {
    /// Whether the node's values are wanted. Called for every node, in order.
    fn want(&mut self, node: &NodeView<'_>) -> bool;
    /// The values are there. False stops the computation.
    fn seen(&mut self, node: &NodeView<'_>) -> bool;
    /// Stop before computing anything.
    fn abort(&mut self) -> bool {
        false
    }
}

/// The hook and the panic it may have raised, at a stable address for C.
pub(super) struct HookCell {
    pub hook: Box<dyn Hook>,
    pub panic: Option<Box<dyn Any + Send>>,
}

impl HookCell {
    pub fn guard(&mut self, f: impl FnOnce(&mut dyn Hook) -> bool) -> Option<bool> {
        if self.panic.is_some() {
            return None;
        }
        match catch_unwind(AssertUnwindSafe(|| f(self.hook.as_mut()))) {
            Ok(v) => Some(v),
            Err(payload) => {
                self.panic = Some(payload);
                None
            }
        }
    }
}

/// `cb_eval`: true to an ask means "stop here and show me"; false after means "stop".
pub(super) unsafe extern "C" fn eval(t: *mut ggml_tensor, ask: bool, user: *mut c_void) -> bool {
    // SAFETY: `user` is the context's boxed HookCell; llama.cpp calls from one thread.
    let (cell, node) = unsafe { (&mut *user.cast::<HookCell>(), NodeView(&*t)) };
    if ask {
        cell.guard(|h| h.want(&node)).unwrap_or(false)
    } else {
        cell.guard(|h| h.seen(&node)).unwrap_or(false)
    }
}

/// `abort_callback`: a panicked hook also stops the computation.
pub(super) unsafe extern "C" fn abort(user: *mut c_void) -> bool {
    // SAFETY: as above.
    let cell = unsafe { &mut *user.cast::<HookCell>() };
    cell.guard(|h| h.abort()).unwrap_or(true)
}

/// Inputs up to this many elements are looked at: masks are larger.
const SMALL_INPUT: i64 = 8192;

/// Inputs are filled before the first node is asked about.
fn constant(t: &ggml_tensor) -> Option<f32> {
    let is_input = t.flags & ggml_sys::GGML_TENSOR_FLAG_INPUT as i32 != 0;
    if !is_input || t.op != ggml_sys::GGML_OP_NONE || t.ne.iter().product::<i64>() > SMALL_INPUT {
        return None;
    }
    let mut values = Vec::new();
    let first = *read_f32(t, &mut values).then_some(&values)?.first()?;
    values.iter().all(|&v| v == first).then_some(first)
}

/// One tensor of a recorded graph; sources are indices into [`Recorded::tensors`].
#[derive(Debug, Clone)]
pub struct RecordedTensor {
    /// ggml's op number; 0 is a leaf.
    pub op: u32,
    /// ggml's type number.
    pub ty: u32,
    /// Elements per dimension.
    pub ne: [i64; 4],
    /// Strides in bytes.
    pub nb: [usize; 4],
    /// Raw op parameters.
    pub op_params: [i32; 16],
    /// ggml's flags.
    pub flags: i32,
    /// Sources.
    pub src: [Option<usize>; 10],
    /// The tensor this one is a view of.
    pub view_src: Option<usize>,
    /// The name.
    pub name: String,
    /// The one value that an f32 graph input holds throughout, if it does.
    pub constant: Option<f32>,
}

/// A graph as llama.cpp built it: every node in order of computation, and every leaf.
#[derive(Debug, Clone, Default)]
pub struct Recorded {
    /// Nodes and leaves, in order of discovery (sources before their readers).
    pub tensors: Vec<RecordedTensor>,
    /// Indices of the nodes, in order of computation.
    pub nodes: Vec<usize>,
    index: HashMap<usize, usize>,
}

impl Recorded {
    /// Record one node and whatever it reads.
    pub fn push(&mut self, node: &NodeView<'_>) {
        let i = self.add(node.0);
        self.nodes.push(i);
    }

    /// The index of `t`, after whatever it reads. Without recursion: a graph may be deeper than
    /// the thread's stack.
    fn add(&mut self, t: &ggml_tensor) -> usize {
        let mut open = vec![t];
        while let Some(&t) = open.last() {
            let known = open.len();
            if !self.index.contains_key(&key(t)) {
                let reads = sources(t).chain([t.view_src]).filter(|p| !p.is_null());
                // The first source is to be added first, as it is taken from the end.
                let missing: Vec<&ggml_tensor> = reads
                    .filter(|&p| !self.index.contains_key(&(p as usize)))
                    // SAFETY: sources and view sources of a live node are live.
                    .map(|p| unsafe { &*p })
                    .collect();
                open.extend(missing.into_iter().rev());
                if open.len() == known {
                    self.keep(t);
                }
            }
            if open.len() == known {
                open.pop();
            }
        }
        self.index[&key(t)]
    }

    /// Take down `t`, whose sources are known.
    fn keep(&mut self, t: &ggml_tensor) {
        let known = |p: *mut ggml_tensor| self.index.get(&(p as usize)).copied();
        let mut src = [None; 10];
        for (slot, p) in src.iter_mut().zip(sources(t)) {
            *slot = known(p);
        }
        let recorded = RecordedTensor {
            op: t.op,
            ty: t.type_,
            ne: t.ne,
            nb: t.nb,
            op_params: t.op_params,
            flags: t.flags,
            src,
            view_src: known(t.view_src),
            name: name_of(t),
            constant: constant(t),
        };
        self.index.insert(key(t), self.tensors.len());
        self.tensors.push(recorded);
    }
}

fn original(name: &str) -> &str {
    name.split('#').nth(1).unwrap_or(name)
}

fn key(t: &ggml_tensor) -> usize {
    std::ptr::from_ref(t) as usize
}

/// The sources of `t`; null where it has none, and where a `ggml_cast` node names itself.
fn sources(t: &ggml_tensor) -> impl Iterator<Item = *mut ggml_tensor> + '_ {
    let own = key(t);
    let other = move |&p: &*mut ggml_tensor| if p as usize == own { null_mut() } else { p };
    t.src.iter().map(other)
}

#[cfg(test)]
mod tests {
    use super::original;
    use crate::ggml::{Backend, Ctx};
    use half::f16;

    #[test]
    fn a_copy_on_another_device_is_known_by_the_name_in_the_file() {
        assert_eq!(original("blk.0.attn_q.weight"), "blk.0.attn_q.weight");
        assert_eq!(
            original("CUDA0#blk.0.attn_q.weight#0"),
            "blk.0.attn_q.weight"
        );
    }

    #[test]
    fn sources_are_read_in_logical_order_whatever_their_strides() {
        let cpu = Backend::new(1).expect("a CPU");
        let mut ctx = Ctx::new(16).expect("a context");
        let whole = ctx.leaf(ggml_sys::GGML_TYPE_F32, [4, 3, 2, 1], "whole");
        let half = ctx.leaf(ggml_sys::GGML_TYPE_F16, [4, 3, 1, 1], "half");
        let (whole, half) = (whole.expect("a leaf"), half.expect("a leaf"));
        let _buffer = cpu.place(&mut ctx, &[whole, half]).expect("room");
        let values: Vec<f32> = (0..24).map(|v| v as f32).collect();
        ctx.write(whole, &values).expect("written");
        let halves: Vec<f16> = values[..12].iter().map(|&v| f16::from_f32(v)).collect();
        ctx.write(half, &halves).expect("written");

        // Element (i0, i1, i2) of the permuted view is (i1, i2, i0) of the leaf.
        let turned = ctx.permute(whole, [1, 2, 0, 3]).expect("a view");
        let columns = ctx.transpose(half).expect("a view");
        let readers = [turned, columns].map(|t| {
            let ne = ctx.ne(t);
            ctx.cont(t, ne).expect("a node")
        });
        let mut out = Vec::new();
        let ne = ctx.node(readers[0]).read_src(0, &mut out).expect("f32");
        let [n0, n1, n2] = [ne[0], ne[1], ne[2]].map(|n| n as usize);
        assert_eq!(ne.iter().product::<i64>(), 24);
        let nb = ctx.nb(turned).map(|b| b / 4);
        for i2 in 0..n2 {
            for i1 in 0..n1 {
                for i0 in 0..n0 {
                    let wanted = i0 * nb[0] + i1 * nb[1] + i2 * nb[2];
                    assert_eq!(out[(i2 * n1 + i1) * n0 + i0], wanted as f32);
                }
            }
        }
        assert_ne!(out, values);
        let ne = ctx.node(readers[1]).read_src(0, &mut out).expect("f16");
        assert_eq!(ne, [3, 4, 1, 1]);
        let wanted = (0..12).map(|i| (4 * (i % 3) + i / 3) as f32);
        assert_eq!(out, wanted.collect::<Vec<_>>());
        assert!(ctx.node(readers[1]).read_src(5, &mut out).is_err());
        let ids = [readers[0], readers[1]].map(|r| ctx.node(r).src_id(0));
        assert!(ids[0].is_some() && ids[0] != ids[1]);
    }
}
