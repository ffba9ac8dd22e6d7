//! A template's entries into nodes of one batch shape, and those into the nodes of their gradients.

use super::GraphError;
use super::attention::{Attention, Numbers, attentions, masks_only, plain};
use super::batch::MaskKind;
use super::forward::{Record, Wanted};
use super::part::Part;
use super::reverse::{Recomputed, gradients};
use super::rules::{Tile, Weightless};
use super::tape::{End, Parts};
use super::template::{Entry, Leaf, Step};
use super::trained::Trained;
use super::weights::{Multiplying, Weights, block_of, is_slow};
use crate::ggml::{Backend, Ctx, Precision, Side, Tensor, sys};
use std::collections::{HashMap, HashSet};

/// Ids of experts in a graph: the first `used` of each row of `ranking`, i32 `[n, T]`.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Chosen {
    pub ranking: Tensor,
    pub used: usize,
}

struct Env<'a> {
    weights: &'a Weights,
    multiplying: &'a mut Multiplying,
    cpu: &'a Backend,
    frozen: HashMap<Tensor, String>,
    factors: HashSet<Tensor>,
}

impl Weightless for Env<'_> {
    fn transposed(&mut self, c: &mut Ctx, w: Tensor) -> Result<Option<Tensor>, GraphError> {
        let Some(name) = self.frozen.get(&w) else {
            return Ok(None);
        };
        self.multiplying.leaf(c, self.weights, self.cpu, name)
    }

    fn decoded(&self, w: Tensor) -> Option<Precision> {
        match self.frozen.get(&w) {
            Some(name) => self.multiplying.decoded(self.cpu, name),
            None => self.products().filter(|_| self.factors.contains(&w)),
        }
    }

    fn products(&self) -> Option<Precision> {
        let on_host = self.cpu.gpu().is_none();
        on_host.then_some(self.multiplying.precision())
    }

    fn tile(&self, w: Tensor) -> Option<Tile> {
        let frozen = self.frozen.contains_key(&w);
        frozen.then(|| self.multiplying.tile())
    }
}

/// Nodes of the tiles that weights may be decoded in on the way back: three for each.
fn n_tile_nodes(parts: &Parts<'_>, tile: Tile) -> Result<usize, GraphError> {
    let mut n = 0;
    for e in &parts.template.entries {
        if let Step::Leaf(Leaf::Weight(name)) = &e.step {
            let info = parts.weights.info(name)?;
            let ne = info.ne.map(|n| n as i64);
            let block = i64::try_from(info.ty.block_len()).unwrap_or(1);
            n += 3 * tile.count(ne, block);
        }
    }
    Ok(n)
}

/// What a graph reads from outside.
#[derive(Default)]
pub(super) struct Inputs {
    /// All of it.
    pub all: Vec<Tensor>,
    pub tokens: Vec<Tensor>,
    pub positions: Option<Tensor>,
    pub out_ids: Option<Tensor>,
    pub masks: Vec<(Tensor, MaskKind)>,
    /// Where the keys of each query begin, and their numbers, for attention by tiles.
    pub firsts: Vec<(Tensor, Option<usize>)>,
    pub numbers: Option<Numbers>,
    /// Masks of the inputs of adaptable tensors, by their number.
    pub dropout: Vec<(usize, Tensor)>,
    /// What is read across from below, `[n, T]` each.
    pub below: Vec<Tensor>,
    pub constants: Vec<(Tensor, f32)>,
}

/// What was built.
pub(super) struct Built {
    pub c: Ctx,
    pub inputs: Inputs,
    pub chosen: Vec<Chosen>,
    /// Tensors made before this number are of the part of the model that the host keeps.
    pub first_on_gpu: usize,
}

/// A graph on its way.
pub(super) struct Builder<'a> {
    parts: &'a Parts<'a>,
    trained: Trained<'a>,
    gradient: bool,
    cpu: &'a Backend,
    multiplying: &'a mut Multiplying,
    t: i64,
    r: i64,
    pub c: Ctx,
    record: Record,
    recomputed: Recomputed,
    built: Vec<Option<Tensor>>,
    inputs: Inputs,
    chosen: Vec<Chosen>,
    frozen: HashMap<Tensor, String>,
    params: Vec<Tensor>,
    /// A and B of each factor.
    factors: Vec<(Tensor, Tensor)>,
    free: HashMap<String, Tensor>,
    /// Attention that is computed a few queries at a time, by the entry it ends in.
    tiled: HashMap<usize, Attention>,
    n_queries: usize,
    /// Attention that one op computes, if its sources fit.
    whole: HashSet<usize>,
    trains: bool,
    /// Ops of this project's own on the way forward.
    own_ops: bool,
    block: Option<usize>,
    /// The first node of each block.
    begins: Vec<usize>,
    first_on_gpu: Option<usize>,
}

impl<'a> Builder<'a> {
    /// A context with room for the graph, and the leaves of what is trained in it.
    pub fn new(
        parts: &'a Parts<'a>,
        trained: Trained<'a>,
        (n_tokens, n_rows): (usize, usize),
        gradient: bool,
        cpu: &'a Backend,
        multiplying: &'a mut Multiplying,
    ) -> Result<Self, GraphError> {
        let template = parts.template;
        let n_factors = match trained {
            Trained::Factors(f) => f.list.len(),
            _ => 0,
        };
        let room = 24 * template.entries.len()
            + 64 * n_factors
            + n_tile_nodes(parts, multiplying.tile())?
            + 1024;
        let is_below = matches!(parts.part, Part::Below(_));
        let trains = is_below || matches!(trained, Trained::Factors(_));
        let own_ops = trains && cpu.gpu().is_none() && multiplying.precision() == Precision::Fast;
        let all = attentions(template);
        let whole = match own_ops {
            true => plain(template, &all),
            false => HashMap::new(),
        };
        let one_op = whole.keys().copied().collect();
        let tiled = match parts.recompute {
            Some(n) if n < n_tokens => all,
            _ => whole,
        };
        let n_queries = parts.recompute.unwrap_or(n_tokens).max(1);
        let room = match parts.recompute {
            Some(_) => 2 * room + 64 * tiled.len() * n_tokens.div_ceil(n_queries),
            None => room,
        };
        let mut builder = Self {
            parts,
            trained,
            gradient,
            cpu,
            multiplying,
            t: n_tokens as i64,
            r: n_rows as i64,
            c: Ctx::new(room)?,
            record: Record::default(),
            recomputed: Recomputed::default(),
            built: vec![None; template.entries.len()],
            inputs: Inputs::default(),
            chosen: Vec::new(),
            frozen: HashMap::new(),
            params: Vec::new(),
            factors: Vec::new(),
            free: HashMap::new(),
            whole: one_op,
            tiled,
            n_queries,
            trains,
            own_ops,
            block: None,
            begins: Vec::new(),
            first_on_gpu: None,
        };
        if cpu.gpu().is_some() {
            builder.c.for_gpu();
        }
        builder.trained_leaves()?;
        Ok(builder)
    }

    fn trained_leaves(&mut self) -> Result<(), GraphError> {
        match self.trained {
            Trained::Factors(f) => {
                for (i, factor) in f.list.iter().enumerate() {
                    let (a, b) = f.leaves(&mut self.c, self.parts.template, i)?;
                    self.factors.push((a, b));
                    if self.own_ops {
                        // Differences of factors are small beside them: not for BF16.
                        self.record
                            .decoded
                            .extend([a, b].map(|f| (f, Precision::Exact)));
                    }
                    if factor.trainable && self.gradient {
                        self.params.extend([a, b]);
                    }
                }
            }
            Trained::Weights(w) => {
                for name in w.names() {
                    let leaf = w.leaf(&mut self.c, name)?;
                    let leaf = leaf.expect("the set holds its own names");
                    self.free.insert(name.clone(), leaf);
                    if self.gradient {
                        self.params.push(leaf);
                    }
                }
            }
            Trained::Nothing => {}
        }
        Ok(())
    }

    /// Build all up to `end`, and return the outputs.
    ///
    /// # Errors
    /// Ops that cannot be rebuilt.
    pub fn forward(&mut self, end: End) -> Result<Vec<Tensor>, GraphError> {
        let template = self.parts.template;
        let last = match (self.parts.part, end) {
            (Part::Below(prefix), _) => prefix.end - 1,
            (_, End::Hidden) => template.hidden,
            (_, End::Logits) => template.entries.len() - 1,
        };
        let needed = self.parts.part.needs(template, last);
        let inner: HashSet<usize> = self
            .tiled
            .values()
            .flat_map(|a| a.inner())
            .copied()
            .collect();
        for (i, e) in template.entries.iter().enumerate().take(last + 1) {
            if !needed[i] || inner.contains(&i) {
                continue;
            }
            let tensor = if self.parts.part.given(i) {
                let x = self.input(e.ty, e.ne.map(|n| n.at(self.t, self.r)), &e.name)?;
                self.inputs.below.push(x);
                x
            } else {
                self.enter_block(e);
                self.entry(i, e)?
            };
            self.built[i] = Some(tensor);
        }
        let roots = match self.parts.part {
            Part::Below(prefix) => prefix.crossing.as_slice(),
            _ => &[last],
        };
        let outputs: Vec<Tensor> = roots.iter().map(|&i| self.source(i)).collect();
        outputs.iter().for_each(|&o| self.c.set_output(o));
        Ok(outputs)
    }

    fn source(&self, i: usize) -> Tensor {
        self.built[i].expect("sources come before readers")
    }

    /// A leaf that is written before each pass.
    fn input(&mut self, ty: u32, ne: [i64; 4], name: &str) -> Result<Tensor, GraphError> {
        let x = self.c.leaf(ty, ne, name)?;
        self.inputs.all.push(x);
        Ok(x)
    }

    /// Note where a block begins, if `e` reads the first weight of one.
    fn enter_block(&mut self, e: &Entry) {
        let template = self.parts.template;
        let sources = e.step.sources().into_iter();
        let block = sources
            .filter_map(|s| template.entries[s].step.block())
            .max();
        if block.is_some() && block != self.block {
            self.block = block;
            if self.cpu.side_of(block) == Side::Device {
                self.first_on_gpu.get_or_insert(self.c.n_tensors());
            }
            self.begins.push(self.record.nodes.len());
        }
    }

    fn entry(&mut self, i: usize, e: &Entry) -> Result<Tensor, GraphError> {
        match &e.step {
            Step::Leaf(Leaf::Weight(name)) => self.weight(i, name),
            Step::Leaf(leaf) => self.leaf(i, e, leaf),
            Step::Cached { src, transposed } => {
                let (src, ne) = (self.source(*src), e.ne.map(|n| n.at(self.t, self.r)));
                self.record.cached(&mut self.c, src, ne, *transposed)
            }
            Step::Same(of) => Ok(self.source(*of)),
            Step::Adapter { base, x, tensor } => self.adapter(*base, *x, *tensor),
            Step::Op { .. } => match self.tiled.get(&i).cloned() {
                Some(attention) => self.attention(i, &attention),
                None => self.op(e),
            },
        }
    }

    /// Entry `i`, a weight of the model file or one that is trained.
    fn weight(&mut self, i: usize, name: &str) -> Result<Tensor, GraphError> {
        if let Some(&w) = self.free.get(name) {
            return Ok(w);
        }
        let (template, weights) = (self.parts.template, self.parts.weights);
        // Rows are looked up where the table is: it stays on the host.
        let on_device = self.cpu.side_of(block_of(name)) == Side::Device && !template.is_table(i);
        let w = match on_device {
            true => self
                .multiplying
                .plain(&mut self.c, weights, self.cpu, name)?,
            false => weights.leaf(&mut self.c, name)?,
        };
        if self.trains
            && is_slow(weights.info(name)?.ty)
            && let Some(precision) = self.multiplying.decoded(self.cpu, name)
            && precision == Precision::Fast
        {
            self.record.decoded.insert(w, precision);
        }
        self.frozen.insert(w, name.to_owned());
        Ok(w)
    }

    fn leaf(&mut self, i: usize, e: &Entry, leaf: &Leaf) -> Result<Tensor, GraphError> {
        let (t, ne) = (self.t, e.ne.map(|n| n.at(self.t, self.r)));
        let windowed = |on: bool| self.parts.window.filter(|_| on);
        if let Leaf::Mask { window, .. } = leaf
            && masks_only(self.parts.template, &self.tiled, i)
        {
            let window = windowed(*window);
            let x = self.input(sys::GGML_TYPE_F32, [1, t, 1, 1], &e.name)?;
            self.inputs.firsts.push((x, window));
            return Ok(x);
        }
        let (ty, ne) = match leaf {
            Leaf::Mask { .. } => (sys::GGML_TYPE_F32, [t, t, 1, 1]),
            Leaf::Constant(_) => (sys::GGML_TYPE_F32, ne),
            _ => (sys::GGML_TYPE_I32, ne),
        };
        let kind = match *leaf {
            Leaf::Mask { window, distance } => Some(MaskKind {
                window: windowed(window),
                distance,
            }),
            _ => None,
        };
        let x = self.input(ty, ne, &e.name)?;
        let inputs = &mut self.inputs;
        match leaf {
            Leaf::Tokens => inputs.tokens.push(x),
            Leaf::Positions => inputs.positions = Some(x),
            Leaf::OutIds => inputs.out_ids = Some(x),
            Leaf::Mask { .. } => inputs.masks.extend(kind.map(|k| (x, k))),
            Leaf::Constant(value) => inputs.constants.push((x, *value)),
            Leaf::Weight(_) => unreachable!("not an input"),
        }
        Ok(x)
    }

    /// `base + Σ s·B(A·x)` over the factors of adaptable tensor `tensor`.
    fn adapter(&mut self, base: usize, x: usize, tensor: usize) -> Result<Tensor, GraphError> {
        let (mut y, mut x) = (self.source(base), self.source(x));
        let Trained::Factors(f) = self.trained else {
            return Ok(y);
        };
        let on_this = |k: &usize| f.list[*k].tensor == tensor;
        let own: Vec<usize> = (0..f.list.len()).filter(on_this).collect();
        if f.dropout && self.gradient && !own.is_empty() {
            let mask = self.input(sys::GGML_TYPE_F32, self.c.ne(x), "")?;
            self.inputs.dropout.push((tensor, mask));
            let (c, op) = (&mut self.c, sys::GGML_OP_MUL);
            x = self.record.emit(c, op, &[0; 16], &[x, mask], None)?;
        }
        for k in own {
            let (c, scale) = (&mut self.c, f.list[k].scale);
            y = self.record.low_rank(c, y, x, self.factors[k], scale)?;
        }
        Ok(y)
    }

    fn attention(&mut self, i: usize, attention: &Attention) -> Result<Tensor, GraphError> {
        if self.whole.contains(&i) {
            let template = self.parts.template;
            let source = |i: usize| self.built[i].expect("sources come before readers");
            let (c, record) = (&mut self.c, &mut self.record);
            if let Some(out) = attention.emit_whole(c, record, template, &source)? {
                return Ok(out);
            }
        }
        let numbers = match self.inputs.numbers {
            Some(numbers) => numbers,
            None => {
                let numbers = Numbers {
                    keys: self.input(sys::GGML_TYPE_F32, [self.t, 1, 1, 1], "")?,
                    queries: self.input(sys::GGML_TYPE_F32, [1, self.t, 1, 1], "")?,
                };
                *self.inputs.numbers.insert(numbers)
            }
        };
        let parts = (self.parts.template, self.n_queries, numbers);
        let source = |i: usize| self.built[i].expect("sources come before readers");
        let (out, tiles) = attention.emit(&mut self.c, &mut self.record, parts, &source)?;
        self.recomputed.parts.extend(tiles);
        Ok(out)
    }

    fn op(&mut self, e: &Entry) -> Result<Tensor, GraphError> {
        let Step::Op {
            op,
            params,
            src,
            nb,
            offset,
        } = &e.step
        else {
            unreachable!("called for ops");
        };
        let src: Vec<Tensor> = src.iter().map(|&s| self.source(s)).collect();
        let wanted = Wanted::of(e, (nb, *offset), (self.t, self.r));
        if *op == sys::GGML_OP_MUL_MAT_ID {
            let ranking = self.c.view_root(src[2]);
            let used = self.c.ne(src[2])[0] as usize;
            if !self.chosen.contains(&Chosen { ranking, used }) {
                self.c.set_output(ranking);
                self.chosen.push(Chosen { ranking, used });
            }
        }
        let out = self
            .record
            .emit(&mut self.c, *op, params, &src, Some(&wanted));
        let out = out.map_err(|err| name_op(err, self.parts, &e.name))?;
        if self.c.ne(out) != wanted.ne {
            return Err(GraphError::Untraceable(format!(
                "{} comes out as {:?}, llama.cpp has {:?}",
                e.name,
                self.c.ne(out),
                wanted.ne
            )));
        }
        Ok(out)
    }

    /// The way back from `output`, if anything is trained: its seed, and the gradients of what is.
    ///
    /// # Errors
    /// Ops that cannot be differentiated.
    pub fn backward(
        &mut self,
        output: Tensor,
    ) -> Result<Option<(Tensor, Vec<Tensor>)>, GraphError> {
        if self.params.is_empty() {
            return Ok(None);
        }
        let seed = self.input(sys::GGML_TYPE_F32, self.c.ne(output), "seed")?;
        let mut env = Env {
            weights: self.parts.weights,
            multiplying: self.multiplying,
            cpu: self.cpu,
            frozen: std::mem::take(&mut self.frozen),
            factors: self.factors.iter().flat_map(|&(a, b)| [a, b]).collect(),
        };
        if self.parts.recompute.is_some() {
            // The last layer comes first on the way back: its results are still at hand.
            self.recomputed.layers = self.begins.windows(2).map(|w| w[0]..w[1]).collect();
        }
        let forward = (&self.record, &self.recomputed);
        let c = &mut self.c;
        let mut grads = gradients(c, forward, output, seed, &self.params, &mut env)?;
        if let Trained::Factors(f) = self.trained
            && f.sums()
        {
            for (i, g) in grads.iter_mut().enumerate() {
                let sum = f.grad_leaf(c, i)?;
                *g = c.add_into(sum, *g)?;
            }
        } else {
            grads.iter().for_each(|&g| c.set_output(g));
        }
        Ok(Some((seed, grads)))
    }

    /// What came of it.
    pub fn built(self) -> Built {
        Built {
            c: self.c,
            inputs: self.inputs,
            chosen: self.chosen,
            first_on_gpu: self.first_on_gpu.unwrap_or(usize::MAX),
        }
    }
}

fn name_op(err: GraphError, parts: &Parts<'_>, node: &str) -> GraphError {
    match err {
        GraphError::Op { op, .. } => GraphError::Op {
            arch: parts.weights.arch().unwrap_or("unknown").to_owned(),
            op,
            node: node.to_owned(),
        },
        other => other,
    }
}
