//! A recorded llama.cpp graph, freed of its KV cache and written for any batch size.
//!
//! Every size in llama.cpp's graph is affine in the number of tokens T and of output rows
//! R: three recordings give the coefficients ([`super::recording`]), and the graph can then be
//! built for any (T, R) without asking llama.cpp again.

use super::weights::block_of;
use crate::ggml::sys;
use std::collections::BTreeSet;

/// `base + per_t·T + per_r·R`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Affine {
    pub(super) base: i64,
    pub(super) per_t: i64,
    pub(super) per_r: i64,
}

impl Affine {
    /// The value at (T, R).
    pub fn at(self, t: i64, r: i64) -> i64 {
        self.base + self.per_t * t + self.per_r * r
    }
}

/// Where a leaf of the graph gets its values.
#[derive(Debug, Clone, PartialEq)]
pub enum Leaf {
    /// A tensor of the model file.
    Weight(String),
    /// Token ids, i32 `[T]`.
    Tokens,
    /// Positions, i32 `[T]` (or four sections of it).
    Positions,
    /// Indices of the tokens whose logits are wanted, i32 `[R]`.
    OutIds,
    /// An f32 input that holds one value throughout (embedding scales).
    Constant(f32),
    /// Additive attention mask, f32 `[T, T]`.
    Mask {
        /// Limited to the model's sliding window.
        window: bool,
        /// Minus the distance of the two tokens, for ALiBi, instead of 0.
        distance: bool,
    },
}

/// How an entry comes about.
#[derive(Debug, Clone)]
pub enum Step {
    /// From outside.
    Leaf(Leaf),
    /// The batch's own keys or values `[d, heads, T]`, where llama.cpp reads its cache;
    /// `transposed`: values, as `[T, heads, d]`.
    Cached {
        /// Entry with the values that llama.cpp stores.
        src: usize,
        /// Read along tokens first.
        transposed: bool,
    },
    /// The place where llama.cpp adds adapters of weight `tensor`: `base + Σ s·B(A·x)`.
    Adapter {
        /// Output without adapters.
        base: usize,
        /// The layer's input.
        x: usize,
        /// Index into [`Template::adaptable`].
        tensor: usize,
    },
    /// Another entry as it is: where llama.cpp would add adapters of a weight that gets none here.
    Same(usize),
    /// A ggml op.
    Op {
        /// ggml's number.
        op: u32,
        /// Raw parameters.
        params: [i32; 16],
        /// Sources.
        src: Vec<usize>,
        /// Strides of a view.
        nb: [Affine; 4],
        /// Bytes into its source at which a view starts.
        offset: Affine,
    },
}

/// One tensor of the template.
#[derive(Debug, Clone)]
pub struct Entry {
    /// How it comes about.
    pub step: Step,
    /// Elements per dimension.
    pub ne: [Affine; 4],
    /// ggml's type number.
    pub ty: u32,
    /// llama.cpp's name.
    pub name: String,
}

/// A weight that llama.cpp applies adapters to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adaptable {
    /// Name in the model file.
    pub name: String,
    /// Input width.
    pub n_in: usize,
    /// Output width.
    pub n_out: usize,
    /// Products with it in one pass: models that loop over their layers have several.
    pub n_uses: usize,
}

/// Matrices of experts, one of which an id chooses for each token: they stay as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Experts {
    /// Name of the stack in the model file.
    pub name: String,
    /// How many there are.
    pub count: usize,
    /// How many each token is sent through.
    pub used: usize,
}

/// The whole graph, from token ids to logits.
#[derive(Debug, Clone)]
pub struct Template {
    /// In order: sources before readers.
    pub entries: Vec<Entry>,
    /// Entry with the final hidden state `[n_embd, R]`, which the output head reads.
    pub hidden: usize,
    /// The head's product with the output matrix.
    pub head: usize,
    /// Name of the output matrix.
    pub output_weight: String,
    /// Weights that take adapters, in order of use.
    pub adaptable: Vec<Adaptable>,
}

impl Template {
    /// The ops in use, each once, in order of first use; with the kind of activation where an op
    /// has several.
    pub fn ops(&self) -> Vec<(u32, u32)> {
        let mut ops = Vec::new();
        for op in self.entries.iter().filter_map(|e| e.step.op()) {
            if !ops.contains(&op) {
                ops.push(op);
            }
        }
        ops
    }

    /// Whether the gradient of the output passes through each entry on its way to an adapter.
    /// `carries`: through how many of its first sources an op's does; the others hold indices and
    /// the like.
    pub fn on_the_way(&self, carries: impl Fn(u32) -> usize) -> Vec<bool> {
        let sources = |e: &Entry| -> Vec<usize> {
            let n = e.step.op().map_or(usize::MAX, |(op, _)| carries(op));
            e.step.sources().into_iter().take(n).collect()
        };
        let sources: Vec<Vec<usize>> = self.entries.iter().map(sources).collect();
        let mut adapted = vec![false; self.entries.len()];
        for (i, e) in self.entries.iter().enumerate() {
            let above = sources[i].iter().any(|&s| adapted[s]);
            adapted[i] = above || matches!(e.step, Step::Adapter { .. });
        }
        let mut reached = vec![false; self.entries.len()];
        if let Some(output) = reached.last_mut() {
            *output = true;
        }
        for i in (0..reached.len()).rev().filter(|&i| adapted[i]) {
            if reached[i] {
                sources[i].iter().for_each(|&s| reached[s] = true);
            }
        }
        adapted.iter().zip(reached).map(|(a, r)| *a && r).collect()
    }

    /// Take adapters on those weights alone that `keep` says.
    pub fn adapt_only(&mut self, keep: impl Fn(&Adaptable) -> bool) {
        let mut number = Vec::new();
        let mut kept = 0;
        for t in &self.adaptable {
            number.push(keep(t).then_some(kept));
            kept += usize::from(number.last() != Some(&None));
        }
        for e in &mut self.entries {
            if let Step::Adapter { base, tensor, .. } = &mut e.step {
                match number[*tensor] {
                    Some(n) => *tensor = n,
                    None => e.step = Step::Same(*base),
                }
            }
        }
        self.adaptable.retain(keep);
    }

    /// Whether rows of entry `i` are looked up by number, as token embeddings are.
    pub fn is_table(&self, i: usize) -> bool {
        self.entries.iter().any(|e| match &e.step {
            Step::Op { op, src, .. } => *op == sys::GGML_OP_GET_ROWS && src[0] == i,
            _ => false,
        })
    }

    /// What the adaptable weights are called within their blocks (`attn_q`), each once, sorted.
    pub fn adaptable_kinds(&self) -> Vec<String> {
        let kind = |name: &str| -> String {
            let parts = name.split('.');
            parts
                .filter(|p| !["blk", "weight"].contains(p) && p.parse::<u32>().is_err())
                .collect()
        };
        let kinds: BTreeSet<String> = self.adaptable.iter().map(|t| kind(&t.name)).collect();
        kinds.into_iter().collect()
    }

    /// The stacks of experts, in order of use.
    pub fn experts(&self) -> Vec<Experts> {
        let stack = |e: &Entry| {
            let Step::Op { op, src, .. } = &e.step else {
                return None;
            };
            if *op != sys::GGML_OP_MUL_MAT_ID {
                return None;
            }
            let (stack, ids) = (&self.entries[src[0]], &self.entries[src[2]]);
            let n = |n: Affine| usize::try_from(n.base).unwrap_or(0);
            match &stack.step {
                Step::Leaf(Leaf::Weight(name)) => Some(Experts {
                    name: name.clone(),
                    count: n(stack.ne[2]),
                    used: n(ids.ne[0]),
                }),
                _ => None,
            }
        };
        self.entries.iter().filter_map(stack).collect()
    }
}

impl Step {
    /// The op, with the kind of activation where it has several.
    pub fn op(&self) -> Option<(u32, u32)> {
        match self {
            Self::Op { op, params, .. } => match *op {
                sys::GGML_OP_UNARY | sys::GGML_OP_GLU => Some((*op, params[0] as u32)),
                _ => Some((*op, 0)),
            },
            _ => None,
        }
    }

    /// The entries it is made from.
    pub fn sources(&self) -> Vec<usize> {
        match self {
            Self::Leaf(_) => Vec::new(),
            Self::Cached { src, .. } => vec![*src],
            Self::Adapter { base, x, .. } => vec![*base, *x],
            Self::Same(of) => vec![*of],
            Self::Op { src, .. } => src.clone(),
        }
    }

    /// The block of the weight it is, if it is one of a block's.
    pub fn block(&self) -> Option<usize> {
        match self {
            Self::Leaf(Leaf::Weight(name)) => block_of(name),
            _ => None,
        }
    }
}
