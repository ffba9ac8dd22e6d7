//! Causal attention in ops of this project's own, for batches packed from several samples: a query
//! is multiplied with the keys of its own sample alone, and no matrix of tokens by tokens is made on
//! either way. What the way back needs of the softmax it computes again.
//!
//! Shapes: `q [d, T, H]`, `k [d, T, H_kv]`, `v [T, d_v, H_kv]` as llama.cpp has it (a view of rows of
//! `d_v`), `first [1, T]`, the number of the first key that each query sees; the last is its own.
//! Head h reads key head `h·H_kv / H`. Rows may lie apart, elements of a row may not.

use super::ctx::{Ctx, Result, Tensor};
use super::custom::number;
use super::lanes::{add_scaled, dots, exp_in_place, mixed};
use ggml_sys::ggml_tensor;
use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::ops::Range;

/// Queries or keys at a time.
const TOGETHER: usize = 4;

/// Sources of an attention.
#[derive(Debug, Clone, Copy)]
pub struct Attended {
    /// `[d, T, H]`.
    pub q: Tensor,
    /// `[d, T, H_kv]`.
    pub k: Tensor,
    /// `[T, d_v, H_kv]`.
    pub v: Tensor,
    /// `[1, T]`.
    pub first: Tensor,
    /// Of the scores.
    pub scale: f32,
}

/// Gradients of an attention's sources, in their shapes.
pub struct AttendedBack {
    /// Of the queries.
    pub q: Tensor,
    /// Of the keys.
    pub k: Tensor,
    /// Of the values.
    pub v: Tensor,
}

impl Ctx {
    /// Whether [`Ctx::attend`] takes these.
    pub fn attends(&self, a: &Attended) -> bool {
        let [q, k, v, first] = [a.q, a.k, a.v, a.first].map(|t| self.ne(t));
        let f32s = [a.q, a.k, a.v, a.first].iter().all(|&t| self.is_f32(t));
        f32s && self.rows_packed(a.q)
            && self.rows_packed(a.k)
            && self.nb(a.v)[1] == size_of::<f32>()
            && self.is_contiguous(a.first)
            && q[0] == k[0]
            && q[1] == k[1]
            && v[0] == k[1]
            && first == [1, q[1], 1, 1]
            && k[2] == v[2]
            && q[2] % k[2] == 0
            && q[3] * k[3] * v[3] == 1
    }

    /// `softmax(scale·K·q)·V` over the keys that each query sees: `[d_v, T, H]`. CPU only.
    ///
    /// # Errors
    /// What [`Ctx::attends`] does not allow.
    pub fn attend(&mut self, a: &Attended) -> Result<Tensor> {
        let sources = [a.q, a.k, a.v, a.first];
        self.need(
            self.attends(a),
            "attend",
            "queries, keys and values",
            &sources,
        )?;
        let (q, v) = (self.ne(a.q), self.ne(a.v));
        let shape = (ggml_sys::GGML_TYPE_F32, [v[1], q[1], q[2], 1]);
        // SAFETY: checked above.
        unsafe { self.custom(shape, &sources, forward, a.scale.to_bits() as usize) }
    }

    /// Gradients of [`Ctx::attend`] for `grad [d_v, T, H]`.
    ///
    /// # Errors
    /// What [`Ctx::attends`] does not allow, or another gradient.
    pub fn attend_back(&mut self, a: &Attended, grad: Tensor) -> Result<AttendedBack> {
        let (q, k, v) = (self.ne(a.q), self.ne(a.k), self.ne(a.v));
        let sources = [a.q, a.k, a.v, a.first, grad];
        let ok = self.attends(a)
            && self.is_f32(grad)
            && self.rows_packed(grad)
            && self.ne(grad) == [v[1], q[1], q[2], 1];
        self.need(ok, "attend_back", "an attention and its gradient", &sources)?;
        let scale = a.scale.to_bits() as usize;
        let rows = (
            ggml_sys::GGML_TYPE_F32,
            [q[0] + STATS as i64, q[1], q[2], 1],
        );
        let both = (ggml_sys::GGML_TYPE_F32, [k[0] + v[1], k[1], k[2], 1]);
        // SAFETY: checked above; a query's row has room for its gradient and what the keys need of
        // its softmax, a key's for its gradient and its value's.
        let (with_stats, both) = unsafe {
            let with_stats = self.custom(rows, &sources, back_to_queries, scale)?;
            let sources = [a.q, a.k, a.v, a.first, grad, with_stats];
            (
                with_stats,
                self.custom(both, &sources, back_to_keys, scale)?,
            )
        };
        let nb = self.nb(with_stats);
        let dq = self.view(with_stats, q, nb, 0)?;
        let nb = self.nb(both);
        let dk = self.view(both, k, nb, 0)?;
        let dv = self.view(both, [v[1], v[0], v[2], 1], nb, k[0] as usize * nb[0])?;
        let dv = self.transpose(dv)?;
        Ok(AttendedBack {
            q: dq,
            k: dk,
            v: dv,
        })
    }
}

/// What a query's row holds behind its gradient: the logarithm of its softmax's sum, and the mean of
/// its weights' gradients.
const STATS: usize = 2;

/// Rows of f32, `ne[1]` of them in each of `ne[2]` heads.
#[derive(Clone, Copy)]
struct Rows {
    data: *const u8,
    len: usize,
    /// Bytes from row to row, and from head to head.
    apart: [usize; 2],
}

impl Rows {
    fn of(t: &ggml_tensor) -> Self {
        Self {
            data: t.data.cast(),
            len: t.ne[0] as usize,
            apart: [t.nb[1], t.nb[2]],
        }
    }

    /// Values, whose rows lie across.
    fn across(t: &ggml_tensor) -> Self {
        Self {
            data: t.data.cast(),
            len: t.ne[1] as usize,
            apart: [t.nb[0], t.nb[2]],
        }
    }

    /// # Safety
    /// There is such a row, with memory, and nobody writes it meanwhile.
    unsafe fn row<'a>(self, row: usize, head: usize) -> &'a [f32] {
        let at = row * self.apart[0] + head * self.apart[1];
        // SAFETY: the caller's promise; f32 tensors are aligned.
        unsafe { std::slice::from_raw_parts(self.data.add(at).cast(), self.len) }
    }

    /// # Safety
    /// The same, and nobody reads it.
    unsafe fn row_mut<'a>(self, row: usize, head: usize) -> &'a mut [f32] {
        let at = row * self.apart[0] + head * self.apart[1];
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at).cast_mut().cast(), self.len) }
    }
}

/// A node's tensors.
struct Node<'a> {
    q: Rows,
    k: Rows,
    v: Rows,
    first: &'a [f32],
    grad: Option<Rows>,
    with_stats: Option<Rows>,
    out: Rows,
    scale: f32,
    n_heads: usize,
    n_kv: usize,
}

impl Node<'_> {
    /// # Safety
    /// A live node of [`Ctx::attend`] or [`Ctx::attend_back`], whose sources have memory.
    unsafe fn of(dst: *mut ggml_tensor, user: *mut c_void) -> Self {
        // SAFETY: the caller's promise.
        let (dst, [q, k, v, first]) = unsafe {
            let src = (*dst).src;
            (&*dst, [&*src[0], &*src[1], &*src[2], &*src[3]])
        };
        let n = q.ne[1] as usize;
        // SAFETY: as above; a null source is none.
        let (first, grad, with_stats) = unsafe {
            (
                std::slice::from_raw_parts(first.data.cast::<f32>(), n),
                dst.src[4].as_ref().map(Rows::of),
                dst.src[5].as_ref().map(Rows::of),
            )
        };
        Self {
            q: Rows::of(q),
            k: Rows::of(k),
            v: Rows::across(v),
            first,
            grad,
            with_stats,
            out: Rows::of(dst),
            scale: f32::from_bits(number(user) as u32),
            n_heads: q.ne[2] as usize,
            n_kv: k.ne[2] as usize,
        }
    }

    fn n_tokens(&self) -> usize {
        self.first.len()
    }

    fn seen(&self, query: usize) -> Range<usize> {
        (self.first[query] as usize).min(query)..query + 1
    }

    /// Groups of [`TOGETHER`] tokens in each of `n_heads` heads, this thread's in turn.
    fn share(
        &self,
        n_heads: usize,
        (ith, nth): (c_int, c_int),
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let n = self.n_tokens();
        let groups = n.div_ceil(TOGETHER);
        let all = (0..groups * n_heads)
            .skip(ith as usize)
            .step_by(nth as usize);
        // Groups first: those of one head cost more the later they come.
        all.map(move |i| {
            let first = i / n_heads * TOGETHER;
            (i % n_heads, first..(first + TOGETHER).min(n))
        })
    }

    /// Softmax weights of `queries` of a head over keys from the first that any of them sees, and
    /// the logarithms of their sums.
    ///
    /// # Safety
    /// As for [`Node::of`].
    unsafe fn weights(
        &self,
        head: usize,
        queries: &Range<usize>,
        p: &mut [Vec<f32>; TOGETHER],
    ) -> (Range<usize>, [f32; TOGETHER]) {
        let kv = head * self.n_kv / self.n_heads;
        let keys = self.seen(queries.start).start..queries.end;
        // The first query stands in for those past the last.
        let query = |r: usize| queries.start + if r < queries.len() { r } else { 0 };
        let rows: [&[f32]; TOGETHER] = std::array::from_fn(|r| {
            // SAFETY: a query of this head.
            unsafe { self.q.row(query(r), head) }
        });
        for p in p.iter_mut() {
            p.clear();
            p.resize(keys.len(), 0.0);
        }
        for key in keys.clone() {
            // SAFETY: a key of this head.
            let scores = dots(rows, unsafe { self.k.row(key, kv) });
            for (p, s) in p.iter_mut().zip(scores) {
                p[key - keys.start] = s * self.scale;
            }
        }
        let mut logs = [0.0; TOGETHER];
        for (r, (p, log)) in p.iter_mut().zip(&mut logs).enumerate() {
            let seen = self.seen(query(r));
            let (before, rest) = p.split_at_mut(seen.start - keys.start);
            let (own, after) = rest.split_at_mut(seen.len());
            let max = own.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum = exp_in_place(own, max);
            own.iter_mut().for_each(|x| *x /= sum);
            before.fill(0.0);
            after.fill(0.0);
            *log = max + sum.ln();
        }
        (keys, logs)
    }
}

thread_local! {
    /// Weights of some queries, and their gradients.
    static SCRATCH: RefCell<[[Vec<f32>; TOGETHER]; 2]> = RefCell::default();
}

unsafe extern "C" fn forward(dst: *mut ggml_tensor, ith: c_int, nth: c_int, scale: *mut c_void) {
    // SAFETY: ggml hands over the live node that `Ctx::attend` made; rows of groups of queries are
    // no other thread's.
    unsafe {
        let node = Node::of(dst, scale);
        SCRATCH.with_borrow_mut(|[p, _]| {
            for (head, queries) in node.share(node.n_heads, (ith, nth)) {
                let kv = head * node.n_kv / node.n_heads;
                let (keys, _) = node.weights(head, &queries, p);
                let weights: [&[f32]; TOGETHER] = std::array::from_fn(|r| p[r].as_slice());
                let out = |r: usize| node.out.row_mut(queries.start + r, head);
                let value = |key: usize| node.v.row(keys.start + key, kv);
                mixed(weights, queries.len(), value, node.v.len, out);
            }
        });
    }
}

unsafe extern "C" fn back_to_queries(
    dst: *mut ggml_tensor,
    ith: c_int,
    nth: c_int,
    scale: *mut c_void,
) {
    // SAFETY: as in `forward`, for `Ctx::attend_back`.
    unsafe {
        let node = Node::of(dst, scale);
        let grad = node.grad.expect("its fifth source");
        let d = node.q.len;
        SCRATCH.with_borrow_mut(|[p, dp]| {
            for (head, queries) in node.share(node.n_heads, (ith, nth)) {
                let kv = head * node.n_kv / node.n_heads;
                let (keys, logs) = node.weights(head, &queries, p);
                let query = |r: usize| queries.start + if r < queries.len() { r } else { 0 };
                let rows: [&[f32]; TOGETHER] = std::array::from_fn(|r| grad.row(query(r), head));
                for dp in dp.iter_mut() {
                    dp.clear();
                    dp.resize(keys.len(), 0.0);
                }
                for key in keys.clone() {
                    let g = dots(rows, node.v.row(key, kv));
                    for (dp, g) in dp.iter_mut().zip(g) {
                        dp[key - keys.start] = g;
                    }
                }
                let mut means = [0.0; TOGETHER];
                for ((p, dp), mean) in p.iter().zip(dp.iter_mut()).zip(&mut means) {
                    *mean = p.iter().zip(dp.iter()).map(|(p, g)| p * g).sum();
                    for (g, p) in dp.iter_mut().zip(p) {
                        *g = p * (*g - *mean) * node.scale;
                    }
                }
                let weights: [&[f32]; TOGETHER] = std::array::from_fn(|r| dp[r].as_slice());
                let out = |r: usize| {
                    let row = node.out.row_mut(queries.start + r, head);
                    (row[d], row[d + 1]) = (logs[r], means[r]);
                    &mut row[..d]
                };
                let key = |key: usize| node.k.row(keys.start + key, kv);
                mixed(weights, queries.len(), key, d, out);
            }
        });
    }
}

unsafe extern "C" fn back_to_keys(
    dst: *mut ggml_tensor,
    ith: c_int,
    nth: c_int,
    scale: *mut c_void,
) {
    // SAFETY: as in `forward`, for `Ctx::attend_back`; rows of groups of keys are no other thread's.
    unsafe {
        let node = Node::of(dst, scale);
        let grad = node.grad.expect("its fifth source");
        let with_stats = node.with_stats.expect("its sixth source");
        let (d, n_group) = (node.q.len, node.n_heads / node.n_kv);
        for (kv, keys) in node.share(node.n_kv, (ith, nth)) {
            keys.clone()
                .for_each(|key| node.out.row_mut(key, kv).fill(0.0));
            let key = |r: usize| keys.start + if r < keys.len() { r } else { 0 };
            let key_rows: [&[f32]; TOGETHER] = std::array::from_fn(|r| node.k.row(key(r), kv));
            let value_rows: [&[f32]; TOGETHER] = std::array::from_fn(|r| node.v.row(key(r), kv));
            for query in keys.start..node.n_tokens() {
                let seen = node.seen(query);
                if seen.start >= keys.end {
                    break;
                }
                for head in kv * n_group..(kv + 1) * n_group {
                    let (q, g) = (node.q.row(query, head), grad.row(query, head));
                    let stats = &with_stats.row(query, head)[d..];
                    let scores = dots(key_rows, q);
                    let slopes = dots(value_rows, g);
                    for (r, key) in keys.clone().enumerate().filter(|(_, k)| seen.contains(k)) {
                        let p = (scores[r] * node.scale - stats[0]).exp();
                        let (dk, dv) = node.out.row_mut(key, kv).split_at_mut(d);
                        add_scaled(dv, g, p);
                        add_scaled(dk, q, p * (slopes[r] - stats[1]) * node.scale);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Backend;
    use super::*;
    use crate::rng::SplitMix64;

    /// Against ggml's own ops with a mask, both ways: heads that share keys, sample borders, a
    /// window, widths that are no multiple of a vector's, several threads.
    #[test]
    fn it_is_what_ggmls_ops_compute() {
        for (d, d_v, heads, n_kv, n) in [(16, 16, 4, 2, 23), (21, 13, 3, 1, 9), (64, 64, 2, 2, 70)]
        {
            let mut rng = SplitMix64::stream(7, d as u64);
            let firsts: Vec<f32> = (0..n)
                .map(|i| match i {
                    0..5 => 0.0,
                    5..8 => 5.0,
                    _ => 8f32.max(i as f32 - 30.0),
                })
                .collect();
            let mut mask = vec![f32::NEG_INFINITY; n * n];
            for i in 0..n {
                mask[i * n + firsts[i] as usize..=i * n + i].fill(0.0);
            }
            let mut values = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
            let (q, k, v) = (
                values(d * n * heads),
                values(d * n * n_kv),
                values(d_v * n * n_kv),
            );
            let g = values(d_v * n * heads);
            let (d, d_v, heads, n_kv) = (d as i64, d_v as i64, heads as i64, n_kv as i64);
            let (t, scale) = (n as i64, 0.3);
            for threads in [1, 3] {
                let mut cpu = Backend::new(threads).expect("a CPU");
                let mut c = Ctx::new(128).expect("room");
                let leaf = |c: &mut Ctx, ne: [i64; 3]| {
                    c.leaf(0, [ne[0], ne[1], ne[2], 1], "").expect("a leaf")
                };
                // As llama.cpp has them: heads within a token.
                let ts = [
                    leaf(&mut c, [d, heads, t]),
                    leaf(&mut c, [d, n_kv, t]),
                    leaf(&mut c, [d_v, n_kv, t]),
                    leaf(&mut c, [1, t, 1]),
                    leaf(&mut c, [d_v, t, heads]),
                    leaf(&mut c, [t, t, 1]),
                ];
                let [q_in, k_in, v_in, first, grad, mask_in] = ts;
                let a = Attended {
                    q: c.permute(q_in, [0, 2, 1, 3]).expect("fits"),
                    k: c.permute(k_in, [0, 2, 1, 3]).expect("fits"),
                    v: c.permute(v_in, [1, 2, 0, 3]).expect("fits"),
                    first,
                    scale,
                };
                let out = c.attend(&a).expect("fits");
                let back = c.attend_back(&a, grad).expect("fits");
                let ours = [out, back.q, back.k, back.v].map(|x| c.packed(x).expect("fits"));
                let theirs = reference(&mut c, &a, grad, mask_in);
                cpu.place(&mut c, &ts).expect("room");
                for (x, values) in ts.iter().zip([&q, &k, &v, &firsts, &g, &mask]) {
                    c.write(*x, values).expect("its values");
                }
                let all: Vec<Tensor> = ours.iter().chain(&theirs).copied().collect();
                all.iter().for_each(|&x| c.set_output(x));
                let graph = c.graph(&all).expect("a graph");
                let plan = cpu.plan(&c, graph, &[graph]).expect("room");
                cpu.compute(&c, &plan, graph).expect("computable");
                for (i, (&a, &b)) in ours.iter().zip(&theirs).enumerate() {
                    assert_eq!(c.ne(a), c.ne(b));
                    let (mut x, mut y) = (vec![0f32; c.n_elements(a)], vec![0f32; c.n_elements(b)]);
                    c.read(a, &mut x).expect("its shape");
                    c.read(b, &mut y).expect("its shape");
                    let size = y.iter().fold(0f32, |m, v| m.max(v.abs()));
                    for (x, y) in x.iter().zip(&y) {
                        assert!((x - y).abs() <= 1e-5 * size, "{i}: {x} for {y} of {size}");
                    }
                }
            }
        }
    }

    /// The same by ggml's ops.
    fn reference(c: &mut Ctx, a: &Attended, grad: Tensor, mask: Tensor) -> [Tensor; 4] {
        let (k, v) = (c.packed(a.k).expect("fits"), c.packed(a.v).expect("fits"));
        let q = c.packed(a.q).expect("fits");
        let scores = c.mul_mat(k, q).expect("fits");
        let p = c
            .soft_max(scores, Some(mask), None, a.scale, 0.0)
            .expect("fits");
        let out = c.mul_mat(v, p).expect("fits");
        let turned = c.transposed(v).expect("fits");
        let dp = c.mul_mat(turned, grad).expect("fits");
        let ds = c.soft_max_back(dp, p, a.scale).expect("fits");
        let turned = c.transposed(k).expect("fits");
        let dq = c.mul_mat(turned, ds).expect("fits");
        let of_heads = |c: &mut Ctx, full: Tensor, like: Tensor| {
            let (ne, want, nb) = (c.ne(full), c.ne(like), c.nb(full));
            let n = ne[2] / want[2];
            let shape = [ne[0], ne[1], want[2], n];
            let nb = [nb[0], nb[1], nb[2] * n as usize, nb[2]];
            let apart = c.view(full, shape, nb, 0).expect("fits");
            c.repeat_back(apart, like).expect("fits")
        };
        let (qt, st) = (
            c.transposed(q).expect("fits"),
            c.transposed(ds).expect("fits"),
        );
        let dk = c.mul_mat(qt, st).expect("fits");
        let dk = of_heads(c, dk, k);
        let (pt, gt) = (
            c.transposed(p).expect("fits"),
            c.transposed(grad).expect("fits"),
        );
        let dv = c.mul_mat(pt, gt).expect("fits");
        let dv = of_heads(c, dv, v);
        [out, dq, dk, dv]
    }
}
