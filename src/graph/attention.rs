//! Attention a few queries at a time: scores, softmax and weighted values of a tile of queries
//! against all keys, so that no matrix of tokens by tokens is whole at any time.
//!
//! In llama.cpp's graph attention without its fused kernel is K·q [T, T, heads], operations on
//! single elements (scale, soft cap), a softmax over keys with a mask, and the product with V. All
//! of them work on each query (dimension 1) by itself: a tile of them gives the same numbers. The
//! mask of a tile is made where it is needed, from where the keys of each query begin: query q of a
//! packed batch sees keys l(q) to q.

use super::GraphError;
use super::forward::{ATTEND, Record, Wanted, attended, float, floats};
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

/// Numbers of keys and queries, for masks.
#[derive(Debug, Clone, Copy)]
pub struct Numbers {
    /// 0, 1, … `[T]`.
    pub keys: Tensor,
    /// 0, 1, … `[1, T]`.
    pub queries: Tensor,
}

/// Added to the scores of what a query does not see. Any softmax makes 0 of it, as of −∞.
const HIDDEN: f32 = 1e30;

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

/// Whether the mask `entry` is read by these attentions alone.
pub fn masks_only(
    template: &Template,
    attentions: &HashMap<usize, Attention>,
    entry: usize,
) -> bool {
    let softmaxes: Vec<usize> = attentions
        .values()
        .filter_map(|a| a.scores.last().copied())
        .collect();
    let mut readers = (0..template.entries.len())
        .filter(|&i| template.entries[i].step.sources().contains(&entry));
    readers.all(|i| softmaxes.contains(&i))
}

/// Those of `attentions` that [`Ctx::attend`] computes: nothing between products and softmax, no
/// sinks, no scores that fall with distance, and a mask that nothing else reads.
pub fn plain(
    template: &Template,
    attentions: &HashMap<usize, Attention>,
) -> HashMap<usize, Attention> {
    let plain = |a: &Attention| match (a.scores.as_slice(), &template.entries[a.softmax()].step) {
        ([_, _], Step::Op { params, src, .. }) if src.len() == 2 && float(params, 1) == 0.0 => {
            let mask = &template.entries[src[1]].step;
            matches!(
                mask,
                Step::Leaf(Leaf::Mask {
                    distance: false,
                    ..
                })
            )
        }
        _ => false,
    };
    let found: HashMap<usize, Attention> = attentions
        .iter()
        .filter(|(_, a)| plain(a))
        .map(|(&i, a)| (i, a.clone()))
        .collect();
    let own = |a: &Attention| {
        let mask = template.entries[a.softmax()].step.sources()[1];
        masks_only(template, &found, mask)
    };
    let kept = found.iter().filter(|(_, a)| own(a));
    kept.map(|(&i, a)| (i, a.clone())).collect()
}

impl Attention {
    /// Its softmax.
    fn softmax(&self) -> usize {
        self.scores[self.scores.len() - 1]
    }

    /// Emit it as one node, if [`Ctx::attend`] takes its sources; `source` as for
    /// [`Attention::emit`].
    ///
    /// # Errors
    /// No room.
    pub fn emit_whole(
        &self,
        c: &mut Ctx,
        record: &mut Record,
        template: &Template,
        source: &dyn Fn(usize) -> Tensor,
    ) -> Result<Option<Tensor>, GraphError> {
        let sources = |i: usize| template.entries[i].step.sources();
        let (scores, softmax) = (sources(self.scores[0]), sources(self.softmax()));
        let Step::Op { params, .. } = &template.entries[self.softmax()].step else {
            unreachable!("an attention is made of ops");
        };
        let src = [
            source(scores[1]),
            source(scores[0]),
            source(sources(self.out)[0]),
            source(softmax[1]),
        ];
        if !c.attends(&attended(params, &src)) {
            return Ok(None);
        }
        let out = record.emit(c, ATTEND, &floats(&[float(params, 0)]), &src, None)?;
        Ok(Some(out))
    }

    /// Its entries but the last.
    pub fn inner(&self) -> &[usize] {
        &self.scores
    }

    /// Emit it with at most `n_queries` queries at a time; `source` gives the tensors of entries
    /// outside, and for the mask the first key of each query `[1, T]`. Returns the result, and the
    /// stretches of nodes of the tiles.
    ///
    /// # Errors
    /// Tensors that ggml does not take.
    pub fn emit(
        &self,
        c: &mut Ctx,
        record: &mut Record,
        (template, n_queries, numbers): (&Template, usize, Numbers),
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
                    let is_mask = op == sys::GGML_OP_SOFT_MAX && k == 1;
                    sources.push(match &template.entries[s].step {
                        Step::Leaf(Leaf::Mask { distance, .. }) if is_mask => {
                            let tile = (begin, rows, *distance);
                            mask(c, record, source(s), numbers, tile)?
                        }
                        _ => source(s),
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

/// The mask `[T, rows]` of `rows` queries from `begin` on: 0 for keys from `first` `[1, T]` to the query
/// itself, or minus their distance.
fn mask(
    c: &mut Ctx,
    record: &mut Record,
    first: Tensor,
    numbers: Numbers,
    (begin, rows, distance): (usize, i64, bool),
) -> Result<Tensor, GraphError> {
    let none = &[0; 16];
    let n_keys = c.ne(numbers.keys)[0];
    let of_rows = |c: &mut Ctx, t: Tensor| {
        let nb = c.nb(t);
        c.view(t, [1, rows, 1, 1], nb, begin * nb[1])
    };
    let (first, query) = (of_rows(c, first)?, of_rows(c, numbers.queries)?);
    let wanted = Wanted {
        ne: [n_keys, rows, 1, 1],
        ..Wanted::default()
    };
    let keys = record.emit(c, sys::GGML_OP_REPEAT, none, &[numbers.keys], Some(&wanted))?;
    let mut step = [0; 16];
    step[0] = sys::GGML_UNARY_OP_STEP as i32;
    let from_first = record.emit(c, sys::GGML_OP_SUB, none, &[keys, first], None)?;
    let from_query = record.emit(c, sys::GGML_OP_SUB, none, &[keys, query], None)?;
    // 1 where ±x + ½ is above 0.
    let mut above = |record: &mut Record, x: Tensor, sign: f32| {
        let x = record.emit(c, sys::GGML_OP_SCALE, &floats(&[sign, 0.5]), &[x], None)?;
        record.emit(c, sys::GGML_OP_UNARY, &step, &[x], None)
    };
    let begun = above(record, from_first, 1.0)?;
    let past = above(record, from_query, -1.0)?;
    let seen = record.emit(c, sys::GGML_OP_MUL, none, &[begun, past], None)?;
    let hidden = floats(&[HIDDEN, -HIDDEN]);
    let mask = record.emit(c, sys::GGML_OP_SCALE, &hidden, &[seen], None)?;
    if !distance {
        return Ok(mask);
    }
    record.emit(c, sys::GGML_OP_ADD, none, &[mask, from_query], None)
}
