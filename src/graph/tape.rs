//! Forward and backward graphs for one batch shape, over the mapped model and a set of
//! low-rank factors.

use super::GraphError;
use super::attention::{Numbers, attentions, masks_only};
use super::batch::{MaskKind, Packed};
use super::forward::{Record, Wanted};
use super::prefix::Prefix;
use super::reverse::{Recomputed, gradients};
use super::rules::{Tile, Weightless};
use super::template::{Leaf, Step, Template};
use super::trained::Trained;
use super::weights::{Transposed, Weights, block_of};
use crate::ggml::{Backend, Ctx, Graph, Plan, Side, Split, Tensor, sys};
use std::collections::{HashMap, HashSet};

/// Writes the dropout mask `[n_in, T]` of the adaptable tensor with this index.
pub type FillMask<'a> = &'a dyn Fn(usize, &mut [f32]);

/// Where the graph ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Final hidden state `[n_embd, R]`; the head is computed elsewhere, in chunks.
    Hidden,
    /// Logits `[n_vocab, R]`.
    Logits,
}

/// The model as a tape sees it.
pub struct Parts<'a> {
    /// The graph.
    pub template: &'a Template,
    /// The mapped file.
    pub weights: &'a Weights,
    /// Sliding window, if the model has one.
    pub window: Option<usize>,
    /// Compute layers again on the way back instead of keeping their results, and attention by at
    /// most so many queries at a time: for long sequences.
    pub recompute: Option<usize>,
    /// Which part of the graph.
    pub part: Part<'a>,
}

/// A part of a graph.
#[derive(Debug, Clone, Copy, Default)]
pub enum Part<'a> {
    /// All of it.
    #[default]
    Whole,
    /// What is below the adapters: its output is what is read across, one tensor after another.
    Below(&'a Prefix),
    /// What is above, given what is read across ([`Tape::set_below`]).
    Above(&'a Prefix),
}

impl Part<'_> {
    /// Which entries of the template it computes or reads, for `last`.
    fn needs(self, template: &Template, last: usize) -> Vec<bool> {
        let (roots, given) = match self {
            Self::Whole => (vec![last], &[][..]),
            Self::Below(p) => (p.crossing.clone(), &[][..]),
            Self::Above(p) => (vec![last], p.crossing.as_slice()),
        };
        let mut needed = vec![false; template.entries.len()];
        roots.iter().for_each(|&i| needed[i] = true);
        for i in (0..needed.len()).rev() {
            if needed[i] && !given.contains(&i) {
                let sources = template.entries[i].step.sources();
                sources.iter().for_each(|&s| needed[s] = true);
            }
        }
        needed
    }

    /// Whether entry `i` is computed elsewhere and given.
    fn given(self, i: usize) -> bool {
        matches!(self, Self::Above(p) if p.crossing.contains(&i))
    }
}

/// Forward and backward graphs of one shape.
pub struct Tape {
    ctx: Ctx,
    forward: Graph,
    backward: Option<Graph>,
    plan: Plan,
    tokens: Vec<Tensor>,
    positions: Option<Tensor>,
    out_ids: Option<Tensor>,
    masks: Vec<(Tensor, MaskKind)>,
    /// Where the keys of each query begin, and their numbers, for attention by tiles.
    firsts: Vec<(Tensor, Option<usize>)>,
    numbers: Option<Numbers>,
    dropout: Vec<(usize, Tensor)>,
    dropping: bool,
    outputs: Vec<Tensor>,
    /// What is read across from below, `[n, T]` each.
    below: Vec<Tensor>,
    seed: Option<Tensor>,
    grads: Vec<Tensor>,
    /// Bytes of tensors that the plan does not place.
    apart: usize,
    chosen: Vec<Chosen>,
    shape: (usize, usize),
}

/// Ids of experts in a graph: the first `used` of each row of `ranking`, i32 `[n, T]`.
#[derive(Clone, Copy, PartialEq)]
struct Chosen {
    ranking: Tensor,
    used: usize,
}

struct Env<'a> {
    weights: &'a Weights,
    transposed: &'a mut Transposed,
    cpu: &'a Backend,
    frozen: HashMap<Tensor, String>,
}

impl Weightless for Env<'_> {
    fn transposed(&mut self, c: &mut Ctx, w: Tensor) -> Result<Option<Tensor>, GraphError> {
        let Some(name) = self.frozen.get(&w) else {
            return Ok(None);
        };
        self.transposed.leaf(c, self.weights, self.cpu, name)
    }

    fn tile(&self, w: Tensor) -> Option<Tile> {
        let frozen = self.frozen.contains_key(&w);
        frozen.then(|| self.transposed.tile())
    }
}

/// Entries of a template from which on tensors with long lives are placed apart: about 75 layers.
const DEEP: usize = 2048;

/// Give what the way back reads of the way forward, and the gradients, memory of their own that is
/// kept to the end; returns its size. On a GPU each way is planned by itself; in a deep graph they would leave gaps among the others, of
/// which ggml's allocator stands 256 before it ends the process. It takes some more memory, as
/// nothing else uses theirs once they have been read. Tensors of this context made before number
/// `first_on_gpu` are of the part of the model that the host keeps.
pub(super) fn place_apart(
    c: &mut Ctx,
    cpu: &Backend,
    (graph, n_forward): (Graph, usize),
    grads: &[Tensor],
    first_on_gpu: usize,
) -> Result<usize, GraphError> {
    let mut roots = c.carried_over(graph, n_forward);
    roots.extend(grads.iter().map(|&g| c.view_root(g)));
    roots.sort_unstable();
    roots.dedup();
    roots.retain(|&g| !c.has_memory(g));
    let host_bound = cpu.host_bound(c, &roots);
    let of_host = |t: &&Tensor| c.made_before(**t, first_on_gpu) || host_bound.contains(t);
    let (host, device): (Vec<_>, Vec<_>) = roots.iter().partition(of_host);
    let mut bytes = cpu.place_on(Side::Device, c, &device)?.size();
    if !host.is_empty() {
        bytes += cpu.place_on(Side::Host, c, &host)?.size();
    }
    Ok(bytes)
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

impl Tape {
    /// Build the graphs for `n_tokens` tokens and `n_rows` output rows. Without `gradient`,
    /// or without anything trainable, there is no backward graph.
    ///
    /// # Errors
    /// Ops that cannot be rebuilt or differentiated, and want of memory.
    pub fn new(
        parts: &Parts<'_>,
        trained: Trained<'_>,
        end: End,
        (n_tokens, n_rows): (usize, usize),
        gradient: bool,
        cpu: &Backend,
        transposed: &mut Transposed,
    ) -> Result<Self, GraphError> {
        let template = parts.template;
        let last = match (parts.part, end) {
            (Part::Below(prefix), _) => prefix.end - 1,
            (_, End::Hidden) => template.hidden,
            (_, End::Logits) => template.entries.len() - 1,
        };
        let needed = parts.part.needs(template, last);
        let mut below = Vec::new();
        let n_factors = match trained {
            Trained::Factors(f) => f.list.len(),
            _ => 0,
        };
        let room = 24 * template.entries.len()
            + 64 * n_factors
            + n_tile_nodes(parts, transposed.tile())?
            + 1024;
        let tiled = match parts.recompute {
            Some(n) if n < n_tokens => attentions(template),
            _ => HashMap::new(),
        };
        let n_queries = parts.recompute.unwrap_or(n_tokens).max(1);
        let room = match parts.recompute {
            Some(_) => 2 * room + 64 * tiled.len() * n_tokens.div_ceil(n_queries),
            None => room,
        };
        let skipped: HashSet<usize> = tiled.values().flat_map(|a| a.inner()).copied().collect();
        let mut recomputed = Recomputed::default();
        let (mut block, mut begins) = (None, Vec::new());
        let mut first_on_gpu = None;
        let (mut firsts, mut numbers) = (Vec::new(), None);
        let mut c = Ctx::new(room)?;
        let (t, r) = (n_tokens as i64, n_rows as i64);
        let mut record = Record::default();
        let mut built: Vec<Option<Tensor>> = vec![None; template.entries.len()];
        let mut inputs = Vec::new();
        let (mut tokens, mut positions, mut out_ids, mut masks) =
            (Vec::new(), None, None, Vec::new());
        let mut constants = Vec::new();
        let mut dropout = Vec::new();
        let mut chosen: Vec<Chosen> = Vec::new();
        let mut frozen = HashMap::new();
        let mut params: Vec<Tensor> = Vec::new();
        let mut factor_leaves = HashMap::new();
        if let Trained::Factors(f) = trained {
            for (i, factor) in f.list.iter().enumerate() {
                let (a, b) = f.leaves(&mut c, template, i)?;
                factor_leaves.insert(i, (a, b));
                if factor.trainable && gradient {
                    params.extend([a, b]);
                }
            }
        }
        let mut free: HashMap<String, Tensor> = HashMap::new();
        if let Trained::Weights(w) = trained {
            for name in w.names() {
                let leaf = w.leaf(&mut c, name)?.expect("the set holds its own names");
                free.insert(name.clone(), leaf);
                if gradient {
                    params.push(leaf);
                }
            }
        }
        for (i, e) in template.entries.iter().enumerate().take(last + 1) {
            if !needed[i] || skipped.contains(&i) {
                continue;
            }
            if parts.part.given(i) {
                let x = c.leaf(e.ty, e.ne.map(|n| n.at(t, r)), &e.name)?;
                inputs.push(x);
                below.push(x);
                built[i] = Some(x);
                continue;
            }
            let of_block = e.step.sources().into_iter();
            let of_block = of_block
                .filter_map(|s| template.entries[s].step.block())
                .max();
            if of_block.is_some() && of_block != block {
                block = of_block;
                if cpu.side_of(block) == Side::Device {
                    first_on_gpu.get_or_insert(c.n_tensors());
                }
                begins.push(record.nodes.len());
            }
            let ne = e.ne.map(|n| n.at(t, r));
            let source = |s: usize| built[s].expect("sources come before readers");
            let tensor = match &e.step {
                Step::Leaf(Leaf::Weight(name)) => match free.get(name) {
                    Some(&w) => w,
                    None => {
                        let trains = matches!(trained, Trained::Factors(_));
                        let adapted = || template.adaptable.iter().any(|t| t.name == *name);
                        let copied = match cpu.side_of(block_of(name)) {
                            // Rows are looked up where the table is: it stays on the host.
                            Side::Device => !template.is_table(i),
                            Side::Host => trains && adapted(),
                        };
                        let w = if copied {
                            transposed.plain(&mut c, parts.weights, cpu, name)?
                        } else {
                            parts.weights.leaf(&mut c, name)?
                        };
                        frozen.insert(w, name.clone());
                        w
                    }
                },
                Step::Leaf(Leaf::Mask { window, .. }) if masks_only(template, &tiled, i) => {
                    let x = c.leaf(sys::GGML_TYPE_F32, [1, t, 1, 1], &e.name)?;
                    inputs.push(x);
                    firsts.push((x, parts.window.filter(|_| *window)));
                    x
                }
                Step::Leaf(leaf) => {
                    let (ty, ne) = match leaf {
                        Leaf::Mask { .. } => (sys::GGML_TYPE_F32, [t, t, 1, 1]),
                        Leaf::Constant(_) => (sys::GGML_TYPE_F32, ne),
                        _ => (sys::GGML_TYPE_I32, ne),
                    };
                    let x = c.leaf(ty, ne, &e.name)?;
                    inputs.push(x);
                    match leaf {
                        Leaf::Tokens => tokens.push(x),
                        Leaf::Positions => positions = Some(x),
                        Leaf::OutIds => out_ids = Some(x),
                        Leaf::Mask { window, distance } => {
                            let window = parts.window.filter(|_| *window);
                            let distance = *distance;
                            masks.push((x, MaskKind { window, distance }));
                        }
                        Leaf::Constant(value) => constants.push((x, *value)),
                        Leaf::Weight(_) => unreachable!("matched above"),
                    }
                    x
                }
                Step::Cached { src, transposed } => {
                    record.cached(&mut c, source(*src), ne, *transposed)?
                }
                Step::Same(of) => source(*of),
                Step::Adapter { base, x, tensor } => {
                    let (mut y, mut x) = (source(*base), source(*x));
                    if let Trained::Factors(f) = trained {
                        let on_this = |k: &usize| f.list[*k].tensor == *tensor;
                        let own: Vec<usize> = (0..f.list.len()).filter(on_this).collect();
                        if f.dropout && gradient && !own.is_empty() {
                            let mask = c.leaf(sys::GGML_TYPE_F32, c.ne(x), "")?;
                            inputs.push(mask);
                            dropout.push((*tensor, mask));
                            x = record.emit(
                                &mut c,
                                sys::GGML_OP_MUL,
                                &[0; 16],
                                &[x, mask],
                                None,
                            )?;
                        }
                        for k in own {
                            let scale = f.list[k].scale;
                            y = record.low_rank(&mut c, y, x, factor_leaves[&k], scale)?;
                        }
                    }
                    y
                }
                Step::Op {
                    op,
                    params,
                    src,
                    nb,
                    offset,
                } => {
                    if let Some(attention) = tiled.get(&i) {
                        let numbers = match numbers {
                            Some(numbers) => numbers,
                            None => {
                                let keys = c.leaf(sys::GGML_TYPE_F32, [t, 1, 1, 1], "")?;
                                let queries = c.leaf(sys::GGML_TYPE_F32, [1, t, 1, 1], "")?;
                                inputs.extend([keys, queries]);
                                *numbers.insert(Numbers { keys, queries })
                            }
                        };
                        let parts = (template, n_queries, numbers);
                        let (out, tiles) = attention.emit(&mut c, &mut record, parts, &source)?;
                        recomputed.parts.extend(tiles);
                        built[i] = Some(out);
                        continue;
                    }
                    let src: Vec<Tensor> = src.iter().map(|&s| source(s)).collect();
                    let wanted = Wanted {
                        ne,
                        nb: nb.map(|n| n.at(t, r) as usize),
                        offset: offset.at(t, r) as usize,
                        ty: e.ty,
                    };
                    if *op == sys::GGML_OP_MUL_MAT_ID {
                        let ranking = c.view_root(src[2]);
                        let used = c.ne(src[2])[0] as usize;
                        if !chosen.contains(&Chosen { ranking, used }) {
                            c.set_output(ranking);
                            chosen.push(Chosen { ranking, used });
                        }
                    }
                    let out = record.emit(&mut c, *op, params, &src, Some(&wanted));
                    let out = out.map_err(|err| name_op(err, parts, &e.name))?;
                    if c.ne(out) != ne {
                        return Err(GraphError::Untraceable(format!(
                            "{} comes out as {:?}, llama.cpp has {ne:?}",
                            e.name,
                            c.ne(out)
                        )));
                    }
                    out
                }
            };
            built[i] = Some(tensor);
        }
        let roots = match parts.part {
            Part::Below(prefix) => prefix.crossing.as_slice(),
            _ => &[last],
        };
        let outputs: Vec<Tensor> = roots
            .iter()
            .map(|&i| built[i].expect("built above"))
            .collect();
        outputs.iter().for_each(|&o| c.set_output(o));
        let full = c.graph(&outputs)?;
        let output = outputs[0];
        let n_forward = c.n_nodes(full);
        let mut grads = Vec::new();
        let mut seed = None;
        if !params.is_empty() {
            let s = c.leaf(sys::GGML_TYPE_F32, c.ne(output), "seed")?;
            inputs.push(s);
            seed = Some(s);
            let mut env = Env {
                weights: parts.weights,
                transposed,
                cpu,
                frozen,
            };
            if parts.recompute.is_some() {
                // The last layer comes first on the way back: its results are still at hand.
                recomputed.layers = begins.windows(2).map(|w| w[0]..w[1]).collect();
            }
            let forward = (&record, &recomputed);
            grads = gradients(&mut c, forward, output, s, &params, &mut env)?;
            if let Trained::Factors(f) = trained
                && f.sums()
            {
                for (i, g) in grads.iter_mut().enumerate() {
                    let sum = f.grad_leaf(&mut c, i)?;
                    *g = c.add_into(sum, *g)?;
                }
            } else {
                for &g in &grads {
                    c.set_output(g);
                }
            }
            c.extend_graph(full, &grads);
        }
        let (forward, backward) = if params.is_empty() {
            (full, None)
        } else {
            let n = c.n_nodes(full);
            let forward = c.graph_part(full, 0..n_forward)?;
            (forward, Some(c.graph_part(full, n_forward..n)?))
        };
        if tokens.is_empty() && below.is_empty() {
            return Err(GraphError::Untraceable("its graph reads no tokens".into()));
        }
        let inputs = cpu.place(&mut c, &inputs)?.size();
        let on_gpu = cpu.gpu().is_some() && backward.is_some();
        let apart = if on_gpu || template.entries.len() > DEEP {
            let first_on_gpu = first_on_gpu.unwrap_or(usize::MAX);
            place_apart(&mut c, cpu, (full, n_forward), &grads, first_on_gpu)?
        } else {
            0
        };
        for (x, value) in constants {
            let values = vec![value; c.n_elements(x)];
            c.write(x, &values)?;
        }
        let passes: Vec<Graph> = [forward].into_iter().chain(backward).collect();
        let plan = cpu.plan(&c, full, &passes)?;
        let mut tape = Self {
            ctx: c,
            forward,
            backward,
            plan,
            tokens,
            positions,
            out_ids,
            masks,
            firsts,
            numbers,
            dropping: !dropout.is_empty(),
            dropout,
            outputs,
            below,
            seed,
            grads,
            apart: apart + inputs,
            chosen,
            shape: (n_tokens, n_rows),
        };
        tape.set_dropout(None)?;
        Ok(tape)
    }

    /// Leave the graphs' memory to the next tape on `cpu`.
    pub fn retire(self, cpu: &Backend) {
        cpu.retire(self.plan);
    }

    /// Whether the graph has dropout masks to set.
    pub fn has_dropout(&self) -> bool {
        !self.dropout.is_empty()
    }

    /// Set the masks for the passes to come. `None` takes dropout out: all ones, which change no
    /// bit.
    ///
    /// # Errors
    /// Never for a tape that was built.
    pub fn set_dropout(&mut self, fill: Option<FillMask<'_>>) -> Result<(), GraphError> {
        if fill.is_none() && !self.dropping {
            return Ok(());
        }
        let mut mask = Vec::new();
        for &(tensor, leaf) in &self.dropout {
            mask.clear();
            mask.resize(self.ctx.n_elements(leaf), 1.0);
            if let Some(fill) = fill {
                fill(tensor, &mut mask);
            }
            self.ctx.write(leaf, &mask)?;
        }
        self.dropping = fill.is_some();
        Ok(())
    }

    /// Give what is read across from below, one tensor after another, as the tape of the part
    /// [below](Part::Below) puts it out.
    ///
    /// # Errors
    /// Another length.
    pub fn set_below(&mut self, values: &[f32]) -> Result<(), GraphError> {
        let wanted: usize = self.below.iter().map(|&b| self.ctx.n_elements(b)).sum();
        if values.len() != wanted {
            return Err(GraphError::Batch {
                what: "values from below",
                wanted,
                found: values.len(),
            });
        }
        let mut at = 0;
        for &b in &self.below {
            let n = self.ctx.n_elements(b);
            self.ctx.write(b, &values[at..at + n])?;
            at += n;
        }
        Ok(())
    }

    /// (T, R) the graphs were built for.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Bytes of intermediate tensors and gradients.
    pub fn bytes(&self) -> usize {
        self.plan.bytes + self.apart
    }

    /// Number of trained tensors.
    pub fn n_grads(&self) -> usize {
        self.grads.len()
    }

    /// Compute the output `[n_embd or n_vocab, R]` for a batch of this shape.
    ///
    /// # Errors
    /// A batch of another shape.
    pub fn forward(
        &mut self,
        cpu: &mut Backend,
        batch: &Packed,
        out: &mut Vec<f32>,
    ) -> Result<(), GraphError> {
        let check = |what, wanted, found| {
            if wanted == found {
                Ok(())
            } else {
                Err(GraphError::Batch {
                    what,
                    wanted,
                    found,
                })
            }
        };
        check("tokens", self.shape.0, batch.n_tokens())?;
        check("rows", self.shape.1, batch.n_padded_rows())?;
        for &tokens in &self.tokens {
            self.ctx.write(tokens, &batch.tokens)?;
        }
        if let Some(p) = self.positions {
            let sections = self.ctx.n_elements(p) / batch.positions.len();
            // Multi-section rope: time, height and width agree for text, the fourth is 0.
            let mut positions = batch.positions.repeat(sections.min(3));
            positions.resize(sections * batch.positions.len(), 0);
            self.ctx.write(p, &positions)?;
        }
        if let Some(ids) = self.out_ids {
            self.ctx.write(ids, &batch.rows)?;
        }
        for &(first, window) in &self.firsts {
            self.ctx.write(first, &batch.first_seen(window))?;
        }
        if let Some(numbers) = self.numbers {
            let numbered: Vec<f32> = (0..batch.n_tokens()).map(|i| i as f32).collect();
            self.ctx.write(numbers.keys, &numbered)?;
            self.ctx.write(numbers.queries, &numbered)?;
        }
        for &(m, kind) in &self.masks {
            self.ctx.write(m, &batch.mask(kind))?;
        }
        cpu.compute(&self.ctx, &self.plan, self.forward)?;
        out.clear();
        for &output in &self.outputs {
            let at = out.len();
            out.resize(at + self.ctx.n_elements(output), 0.0);
            self.ctx.read(output, &mut out[at..])?;
        }
        Ok(())
    }

    /// Propagate `seed`, the gradient of the output of the last forward pass.
    ///
    /// # Errors
    /// Another length, or a tape without anything trainable.
    pub fn backward(&mut self, cpu: &mut Backend, seed: &[f32]) -> Result<(), GraphError> {
        let (Some(graph), Some(s)) = (self.backward, self.seed) else {
            return Err(GraphError::NoRule {
                op: "of a tape without parameters".into(),
            });
        };
        self.ctx.write(s, seed)?;
        cpu.compute(&self.ctx, &self.plan, graph)?;
        Ok(())
    }

    /// Gradient of trained tensor `i` after [`Tape::backward`]: for factors A and B of each
    /// trainable factor in turn, for whole weights their order.
    ///
    /// # Errors
    /// Another length.
    pub fn read_grad(&self, i: usize, out: &mut [f32]) -> Result<(), GraphError> {
        Ok(self.ctx.read(self.grads[i], out)?)
    }

    /// The experts that the last forward pass chose: for each choice the graph makes (one a layer,
    /// as a rule) and each token or output row there, their ids in ascending order.
    ///
    /// # Errors
    /// Never for a tape that was computed.
    pub fn chosen_experts(&self) -> Result<Vec<Vec<Vec<i32>>>, GraphError> {
        let ids = |c: &Chosen| {
            let mut ranking = vec![0i32; self.ctx.n_elements(c.ranking)];
            self.ctx.read(c.ranking, &mut ranking)?;
            let row = self.ctx.ne(c.ranking)[0] as usize;
            let of_token = |row: &[i32]| {
                let mut ids = row[..c.used].to_vec();
                ids.sort_unstable();
                ids
            };
            Ok(ranking.chunks_exact(row).map(of_token).collect())
        };
        self.chosen.iter().map(ids).collect()
    }

    /// What of both passes a GPU leaves to the CPU.
    pub fn split(&self, cpu: &Backend) -> Split {
        let mut split = cpu.split(&self.ctx, self.forward);
        if let Some(backward) = self.backward {
            let more = cpu.split(&self.ctx, backward);
            split.nodes += more.nodes;
            for (op, n) in more.on_cpu {
                *split.on_cpu.entry(op).or_default() += n;
            }
        }
        split
    }

    /// Elements of gradient `i`.
    pub fn grad_len(&self, i: usize) -> usize {
        self.ctx.n_elements(self.grads[i])
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
