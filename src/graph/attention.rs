//! Attention a few queries at a time: scores, softmax and weighted values of a tile of queries
//! against all keys, so that no matrix of tokens by tokens is whole at any time.
//!
//! In llama.cpp's graph attention without its fused kernel is K·q [T, T, heads], operations on
//! single elements (scale, soft cap), a softmax over keys with a mask, and the product with V. All
//! of them work on each query (dimension 1) by itself: a tile of them gives the same numbers.

use super::GraphError;
use super::forward::{Record, Wanted};
use super::template::{Leaf, Step, Template};
use crate::ggml::{Ctx, Tensor, sys};
use std::collections::HashMap;
use std::ops::Range;

/// The entries of one attention, in order of computation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attention {
    /// K·q, what is done with the scores, and the softmax last.
    scores: Vec<usize>,
    /// The product of values and weights.
    out: usize,
}

/// Every attention of `template` that can be computed by tiles, by the entry it ends in.
pub fn attentions(template: &Template) -> HashMap<usize, Attention> {
    let entries = &template.entries;
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); entries.len()];
    for (i, e) in entries.iter().enumerate() {
        for s in e.step.sources() {
            readers[s].push(i);
        }
    }
    let only_reader = |i: usize| match readers[i].as_slice() {
        [one] => Some(*one),
        _ => None,
    };
    let op = |i: usize| match &entries[i].step {
        Step::Op { op, src, .. } => Some((*op, src.as_slice())),
        _ => None,
    };
    let find = |last: usize| -> Option<Attention> {
        let (sys::GGML_OP_SOFT_MAX, [first, mask, ..]) = op(last)? else {
            return None;
        };
        let masked = matches!(entries[*mask].step, Step::Leaf(Leaf::Mask { .. }));
        let out = only_reader(last).filter(|&o| {
            op(o).is_some_and(|(op, src)| op == sys::GGML_OP_MUL_MAT && src[1] == last)
        })?;
        let (mut scores, mut at) = (vec![last], *first);
        loop {
            only_reader(at)?;
            scores.push(at);
            match op(at)? {
                (sys::GGML_OP_MUL_MAT, _) => break,
                (sys::GGML_OP_SCALE | sys::GGML_OP_UNARY, src) => at = src[0],
                _ => return None,
            }
        }
        scores.reverse();
        masked.then_some(Attention { scores, out })
    };
    (0..entries.len())
        .filter_map(find)
        .map(|a| (a.out, a))
        .collect()
}

impl Attention {
    /// Its entries but the last.
    pub fn inner(&self) -> &[usize] {
        &self.scores
    }

    /// Emit it with at most `n_queries` queries at a time; `source` gives the tensors of entries
    /// outside. Returns the result, and the stretches of nodes of the tiles.
    ///
    /// # Errors
    /// Tensors that ggml does not take.
    pub fn emit(
        &self,
        c: &mut Ctx,
        record: &mut Record,
        (template, n_queries): (&Template, usize),
        source: &dyn Fn(usize) -> Tensor,
    ) -> Result<(Tensor, Vec<Range<usize>>), GraphError> {
        let step = |i: usize| match &template.entries[i].step {
            Step::Op {
                op, params, src, ..
            } => (*op, params, src),
            _ => unreachable!("an attention is made of ops"),
        };
        let (_, score_params, first) = step(self.scores[0]);
        let (_, out_params, last) = step(self.out);
        let (keys, values) = (source(first[0]), source(last[0]));
        let queries = record.packed(c, source(first[1]))?;
        let (ne, nb) = (c.ne(queries), c.nb(queries));
        let (mut whole, mut tiles) = (None, Vec::new());
        let n = ne[1] as usize;
        for begin in (0..n).step_by(n_queries.max(1)) {
            let from = record.nodes.len();
            let rows = n_queries.min(n - begin) as i64;
            let wanted = Wanted {
                ne: [ne[0], rows, ne[2], ne[3]],
                nb,
                offset: begin * nb[1],
                ty: c.ty(queries),
            };
            let none = &[0; 16];
            let q = record.emit(c, sys::GGML_OP_VIEW, none, &[queries], Some(&wanted))?;
            let mut x = record.emit(c, sys::GGML_OP_MUL_MAT, score_params, &[keys, q], None)?;
            for &i in &self.scores[1..] {
                let (op, params, src) = step(i);
                let mut sources = vec![x];
                for (k, &s) in src.iter().enumerate().skip(1) {
                    let t = source(s);
                    sources.push(if op == sys::GGML_OP_SOFT_MAX && k == 1 {
                        let (ne, nb) = (c.ne(t), c.nb(t));
                        c.view(t, [ne[0], rows, ne[2], ne[3]], nb, begin * nb[1])?
                    } else {
                        t
                    });
                }
                x = record.emit(c, op, params, &sources, None)?;
            }
            x = record.emit(c, sys::GGML_OP_MUL_MAT, out_params, &[values, x], None)?;
            tiles.push(from..record.nodes.len());
            let mut along = [0; 16];
            along[0] = 1;
            whole = Some(match whole {
                None => x,
                Some(w) => record.emit(c, sys::GGML_OP_CONCAT, &along, &[w, x], None)?,
            });
        }
        let whole = whole.ok_or_else(|| GraphError::Untraceable("no queries".into()))?;
        Ok((whole, tiles))
    }
}
