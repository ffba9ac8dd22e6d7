//! Three recordings of llama.cpp's graph in, a template of it out: what is read from the KV cache
//! becomes what the batch itself put there, padding of the cache goes, leaves get their meaning.

use super::GraphError;
use super::forward::float;
use super::template::{Adaptable, Affine, Entry, Leaf, Step, Template};
use crate::ggml::{Recorded, RecordedTensor, sys};
use std::collections::HashMap;

/// Three recordings of one model, at (T, R), (2T, R) and (T, 2R).
pub struct Recordings {
    /// At (T, R).
    pub base: Recorded,
    /// At (2T, R).
    pub more_tokens: Recorded,
    /// At (T, 2R).
    pub more_rows: Recorded,
    /// T.
    pub t: i64,
    /// R.
    pub r: i64,
}

/// A [`Step`] before its sources have entries: they are indices of recorded tensors.
enum Origin {
    Leaf(Leaf),
    Cached { src: usize, transposed: bool },
    Adapter { base: usize, x: usize, name: String },
    Op(Vec<usize>),
}

impl Origin {
    fn sources(&self) -> Vec<usize> {
        match self {
            Self::Leaf(_) => Vec::new(),
            Self::Cached { src, .. } => vec![*src],
            Self::Adapter { base, x, .. } => vec![*base, *x],
            Self::Op(src) => src.clone(),
        }
    }
}

struct Builder<'a> {
    rec: &'a Recordings,
    is_weight: &'a dyn Fn(&str) -> bool,
    cache_writer: HashMap<usize, usize>,
    window_masks: Vec<usize>,
    distance_masks: Vec<usize>,
    done: HashMap<usize, usize>,
    entries: Vec<Entry>,
    adaptable: Vec<Adaptable>,
}

impl Template {
    /// Make a template of three recordings. `is_weight`: whether the model file holds a
    /// tensor of that name. `n_ctx`: cells of the full KV cache, so that a smaller cache
    /// is a sliding-window one.
    ///
    /// # Errors
    /// Recordings that differ in more than sizes, inputs of unknown meaning, and graphs
    /// whose output is not a product with a weight.
    pub fn new(
        rec: &Recordings,
        n_ctx: i64,
        is_weight: &dyn Fn(&str) -> bool,
    ) -> Result<Self, GraphError> {
        let (a, b, c) = (&rec.base, &rec.more_tokens, &rec.more_rows);
        let same = |x: &Recorded| {
            x.tensors.len() == a.tensors.len()
                && x.tensors
                    .iter()
                    .zip(&a.tensors)
                    .all(|(p, q)| p.op == q.op && p.src == q.src)
        };
        if !same(b) || !same(c) {
            return Err(GraphError::Untraceable(
                "its graph depends on the batch size".into(),
            ));
        }
        // Rows are also written into what is no cache: the scores of groups of experts.
        let cache_writer = a
            .nodes
            .iter()
            .filter(|&&n| a.tensors[n].op == sys::GGML_OP_SET_ROWS)
            .filter_map(|&n| Some((a.tensors[n].view_src?, a.tensors[n].src[0]?)))
            .filter(|&(cache, _)| a.tensors[cache].op == sys::GGML_OP_NONE)
            .collect();
        let mut builder = Builder {
            rec,
            is_weight,
            cache_writer,
            window_masks: Vec::new(),
            distance_masks: Vec::new(),
            done: HashMap::new(),
            entries: Vec::new(),
            adaptable: Vec::new(),
        };
        builder.find_masks(n_ctx);
        // Some architectures do not name their logits, which are then the last node.
        let named = |n: &&usize| a.tensors[**n].name == "result_output";
        let output = a.nodes.iter().rev().find(named).or(a.nodes.last());
        let output = *output.ok_or_else(|| GraphError::Untraceable("it has no nodes".into()))?;
        let last = builder.visit(output)?;
        let (entries, mut adaptable) = (builder.entries, builder.adaptable);
        count_uses(&entries, &mut adaptable);
        let head = find_head(&entries, last)?;
        let Step::Op { src, .. } = &entries[head].step else {
            unreachable!("find_head returns an op");
        };
        let (weight, hidden) = (src[0], src[1]);
        let Step::Leaf(Leaf::Weight(output_weight)) = &entries[weight].step else {
            unreachable!("find_head returns a product with a weight");
        };
        Ok(Self {
            hidden,
            head,
            output_weight: output_weight.clone(),
            entries,
            adaptable,
        })
    }
}

/// Products with each adaptable weight, adapted there or not: what watches them sees them all.
fn count_uses(entries: &[Entry], adaptable: &mut [Adaptable]) {
    for e in entries {
        let Step::Op { op, src, .. } = &e.step else {
            continue;
        };
        if *op != sys::GGML_OP_MUL_MAT {
            continue;
        }
        if let Step::Leaf(Leaf::Weight(name)) = &entries[src[0]].step
            && let Some(t) = adaptable.iter_mut().find(|t| t.name == *name)
        {
            t.n_uses += 1;
        }
    }
}

/// ggml keeps a view's byte offset as one 64-bit parameter.
fn view_offset(t: &RecordedTensor) -> i64 {
    i64::from(t.op_params[0] as u32) | (i64::from(t.op_params[1]) << 32)
}

/// From the logits back through what follows the head's product (scale, softcap, bias).
fn find_head(entries: &[Entry], last: usize) -> Result<usize, GraphError> {
    let mut at = last;
    loop {
        let Step::Op { op, src, .. } = &entries[at].step else {
            return Err(GraphError::Untraceable(format!(
                "its logits come from {}, not from a product with a weight",
                entries[at].name
            )));
        };
        let is_weight = matches!(&entries[src[0]].step, Step::Leaf(Leaf::Weight(_)));
        if *op == sys::GGML_OP_MUL_MAT && is_weight {
            return Ok(at);
        }
        at = src[0];
    }
}

impl Builder<'_> {
    fn tensor(&self, i: usize) -> &RecordedTensor {
        &self.rec.base.tensors[i]
    }

    fn affine(&self, get: impl Fn(&RecordedTensor) -> i64, i: usize) -> Result<Affine, GraphError> {
        let (a, b, c) = (
            get(&self.rec.base.tensors[i]),
            get(&self.rec.more_tokens.tensors[i]),
            get(&self.rec.more_rows.tensors[i]),
        );
        if (b - a) % self.rec.t != 0 || (c - a) % self.rec.r != 0 {
            let name = &self.tensor(i).name;
            return Err(GraphError::Untraceable(format!(
                "a size of {name} is not affine in the batch"
            )));
        }
        let (per_t, per_r) = ((b - a) / self.rec.t, (c - a) / self.rec.r);
        Ok(Affine {
            base: a - per_t * self.rec.t - per_r * self.rec.r,
            per_t,
            per_r,
        })
    }

    fn ne(&self, i: usize) -> Result<[Affine; 4], GraphError> {
        let mut ne = [Affine::default(); 4];
        for (d, n) in ne.iter_mut().enumerate() {
            *n = self.affine(|t| t.ne[d], i)?;
        }
        Ok(ne)
    }

    fn nb(&self, i: usize) -> Result<[Affine; 4], GraphError> {
        let mut nb = [Affine::default(); 4];
        for (d, n) in nb.iter_mut().enumerate() {
            *n = self.affine(|t| t.nb[d] as i64, i)?;
        }
        Ok(nb)
    }

    /// Masks share one name. The sliding-window one is read by the attention that reads a
    /// cache shorter than the context. A mask read with a slope per head holds distances.
    fn find_masks(&mut self, n_ctx: i64) {
        let tensors = &self.rec.base.tensors;
        for (i, t) in tensors.iter().enumerate() {
            if t.op != sys::GGML_OP_SOFT_MAX {
                continue;
            }
            let Some(mask) = t.src[1] else { continue };
            if self.reads_short_cache(i, n_ctx, 12) && !self.window_masks.contains(&mask) {
                self.window_masks.push(mask);
            }
            if float(&t.op_params, 1) != 0.0 && !self.distance_masks.contains(&mask) {
                self.distance_masks.push(mask);
            }
        }
    }

    fn reads_short_cache(&self, i: usize, n_ctx: i64, depth: usize) -> bool {
        let t = self.tensor(i);
        if self.cache_writer.contains_key(&i) {
            return t.ne[1] < n_ctx;
        }
        depth > 0
            && t.src
                .iter()
                .take(1)
                .flatten()
                .any(|&s| self.reads_short_cache(s, n_ctx, depth - 1))
    }

    fn push(&mut self, i: usize, step: Step) -> Result<usize, GraphError> {
        let ne = self.ne(i)?;
        self.entries.push(Entry {
            step,
            ne,
            ty: self.tensor(i).ty,
            name: self.tensor(i).name.clone(),
        });
        self.done.insert(i, self.entries.len() - 1);
        Ok(self.entries.len() - 1)
    }

    /// The entry of recorded tensor `root`, after those it is made from. Without recursion: a graph
    /// may be deeper than the thread's stack.
    fn visit(&mut self, root: usize) -> Result<usize, GraphError> {
        let mut open = vec![root];
        while let Some(&i) = open.last() {
            let known = open.len();
            if !self.done.contains_key(&i) {
                let origin = self.origin(i)?;
                // The first source comes first: it is taken from the end.
                let sources = origin.sources().into_iter().rev();
                open.extend(sources.filter(|s| !self.done.contains_key(s)));
                if open.len() == known {
                    self.make(i, origin)?;
                }
            }
            if open.len() == known {
                open.pop();
            }
        }
        Ok(self.done[&root])
    }

    /// How recorded tensor `i` comes about.
    fn origin(&self, i: usize) -> Result<Origin, GraphError> {
        let t = self.tensor(i);
        if t.op == sys::GGML_OP_NONE {
            return Ok(Origin::Leaf(self.classify(i, t)?));
        }
        if let Some(cached) = self.cache_read(t)? {
            return Ok(cached);
        }
        if let Some((base, x, name)) = self.adapter(t) {
            return Ok(Origin::Adapter { base, x, name });
        }
        Ok(Origin::Op(t.src.iter().flatten().copied().collect()))
    }

    /// Make the entry of tensor `i`, whose sources have theirs.
    fn make(&mut self, i: usize, origin: Origin) -> Result<usize, GraphError> {
        let step = match origin {
            Origin::Leaf(leaf) => Step::Leaf(leaf),
            Origin::Cached { src, transposed } => {
                let src = self.done[&src];
                Step::Cached { src, transposed }
            }
            Origin::Adapter { base, x, name } => {
                let (base, x) = (self.done[&base], self.done[&x]);
                let tensor = self.adaptable_index(&name, x)?;
                Step::Adapter { base, x, tensor }
            }
            Origin::Op(src) => {
                let t = self.tensor(i);
                Step::Op {
                    op: t.op,
                    params: t.op_params,
                    src: src.iter().map(|s| self.done[s]).collect(),
                    nb: self.nb(i)?,
                    offset: match t.op {
                        sys::GGML_OP_VIEW => self.affine(view_offset, i)?,
                        _ => Affine::default(),
                    },
                }
            }
        };
        self.push(i, step)
    }

    fn classify(&self, i: usize, t: &RecordedTensor) -> Result<Leaf, GraphError> {
        if (self.is_weight)(&t.name) {
            return Ok(Leaf::Weight(t.name.clone()));
        }
        match t.name.as_str() {
            "inp_tokens" => Ok(Leaf::Tokens),
            "inp_pos" => Ok(Leaf::Positions),
            "out_ids" => Ok(Leaf::OutIds),
            "attn_inp_kq_mask" => Ok(Leaf::Mask {
                window: self.window_masks.contains(&i),
                distance: self.distance_masks.contains(&i),
            }),
            _ if self.selects_embeddings(i, t) => Ok(Leaf::Tokens),
            other => t
                .constant
                .map(Leaf::Constant)
                .ok_or_else(|| GraphError::Input(other.to_owned())),
        }
    }

    /// Whether nameless input `i` holds token ids once more: i32, one for each token, selecting
    /// rows of a table of embeddings per layer.
    fn selects_embeddings(&self, i: usize, t: &RecordedTensor) -> bool {
        let is_input = t.flags & sys::GGML_TENSOR_FLAG_INPUT as i32 != 0;
        let table = |r: &RecordedTensor| {
            let from = r.src[0].map(|s| self.tensor(s).name.as_str());
            r.op == sys::GGML_OP_GET_ROWS && from == Some("per_layer_token_embd.weight")
        };
        is_input
            && t.ty == sys::GGML_TYPE_I32
            && t.ne == [self.rec.t, 1, 1, 1]
            && self
                .rec
                .base
                .tensors
                .iter()
                .any(|r| r.src[1] == Some(i) && table(r))
    }

    /// A view of a cache tensor stands for what this batch wrote there.
    fn cache_read(&self, t: &RecordedTensor) -> Result<Option<Origin>, GraphError> {
        let (sys::GGML_OP_VIEW, Some(cache)) = (t.op, t.src[0]) else {
            return Ok(None);
        };
        let Some(&written) = self.cache_writer.get(&cache) else {
            return Ok(None);
        };
        // Values are stored element by element: look through the reshape to one column.
        let mut source = written;
        while self.tensor(source).op == sys::GGML_OP_RESHAPE && self.tensor(source).ne[0] == 1 {
            source = self.tensor(source).src[0].ok_or_else(|| {
                GraphError::Untraceable("a reshape without source feeds the cache".into())
            })?;
        }
        // Keys are read [d, heads, tokens], transposed values [tokens, heads, d].
        let transposed = t.nb[1] > t.nb[2];
        let src = source;
        Ok(Some(Origin::Cached { src, transposed }))
    }

    /// `ADD(base, SCALE(MUL_MAT(lora_b, MUL_MAT(lora_a, x))))`.
    fn adapter(&self, t: &RecordedTensor) -> Option<(usize, usize, String)> {
        let get = |i: Option<usize>| i.map(|i| self.tensor(i));
        let is = |t: &RecordedTensor, op: u32| (t.op == op).then_some(());
        is(t, sys::GGML_OP_ADD)?;
        let scale = get(t.src[1])?;
        is(scale, sys::GGML_OP_SCALE)?;
        let up = get(scale.src[0])?;
        is(up, sys::GGML_OP_MUL_MAT)?;
        let name = get(up.src[0])?.name.strip_suffix(".lora_b")?.to_owned();
        let down = get(up.src[1])?;
        is(down, sys::GGML_OP_MUL_MAT)?;
        Some((t.src[0]?, down.src[1]?, name))
    }

    fn adaptable_index(&mut self, name: &str, x: usize) -> Result<usize, GraphError> {
        if let Some(i) = self.adaptable.iter().position(|a| a.name == name) {
            return Ok(i);
        }
        let n_in = self.entries[x].ne[0].at(self.rec.t, self.rec.r);
        let lora_b = format!("{name}.lora_b");
        let n_out = self
            .rec
            .base
            .tensors
            .iter()
            .find(|t| t.name == lora_b)
            .map(|t| t.ne[1]);
        let (Ok(n_in), Some(Ok(n_out))) = (usize::try_from(n_in), n_out.map(usize::try_from))
        else {
            return Err(GraphError::Untraceable(format!(
                "{name} has no adapter shape"
            )));
        };
        self.adaptable.push(Adaptable {
            name: name.to_owned(),
            n_in,
            n_out,
            n_uses: 0,
        });
        Ok(self.adaptable.len() - 1)
    }
}
