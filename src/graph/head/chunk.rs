//! The head's graph for one number of rows.

use crate::ggml::{Backend, Ctx, Graph, Plan, Precision, Side, Tensor, Way, sys};
use crate::graph::GraphError;
use crate::graph::forward::{Record, Wanted};
use crate::graph::place::place_apart;
use crate::graph::rules::{Tile, Weightless, vjp};
use crate::graph::tape::Parts;
use crate::graph::template::{Leaf, Step};
use crate::graph::weights::{Multiplying, is_slow};

/// What follows the head's product has no weights to be multiplied with.
struct NoWeights;

impl Weightless for NoWeights {
    fn transposed(&mut self, _: &mut Ctx, _: Tensor) -> Result<Option<Tensor>, GraphError> {
        Ok(None)
    }

    fn decoded(&self, _: Tensor) -> Option<Precision> {
        None
    }

    fn products(&self) -> Option<Precision> {
        None
    }

    fn tile(&self, _: Tensor) -> Option<Tile> {
        None
    }
}

/// The head's graph for one number of rows.
pub(super) struct Chunk {
    pub n_rows: usize,
    ctx: Ctx,
    forward: Graph,
    /// What follows the product, backwards: graph, seed and the product's gradient.
    after: Option<(Graph, Tensor, Tensor)>,
    /// The product backwards: graph, and the hidden rows' gradient.
    back: Option<(Graph, Tensor)>,
    plan: Plan,
    hidden: Tensor,
    pub logits: Tensor,
    rows: Vec<f32>,
}

/// Nodes of the head on the way forward.
struct Nodes {
    record: Record,
    hidden: Tensor,
    weight: Tensor,
    product: Tensor,
    logits: Tensor,
}

impl Chunk {
    /// Build the head of `parts.template`.
    ///
    /// # Errors
    /// Ops after the output product that cannot be rebuilt or differentiated.
    pub fn new(
        parts: &Parts<'_>,
        cpu: &Backend,
        weights: &mut Multiplying,
        n_rows: usize,
    ) -> Result<Self, GraphError> {
        let mut c = Ctx::new(256)?;
        if cpu.gpu().is_some() {
            c.for_gpu();
        }
        let nodes = forward(&mut c, parts, cpu, weights, n_rows as i64)?;
        let Nodes {
            hidden,
            product,
            logits,
            ..
        } = nodes;
        c.set_output(logits);
        c.set_output(product);
        let whole = c.graph(&[logits])?;
        let n_forward = c.n_nodes(whole);
        let mut inputs = vec![hidden];
        let mut after = None;
        if logits != product {
            let seed = c.leaf(sys::GGML_TYPE_F32, c.ne(logits), "seed")?;
            inputs.push(seed);
            let mut g = seed;
            for node in nodes.record.nodes.iter().skip(1).rev() {
                let mut need = vec![false; node.src.len()];
                need[0] = true;
                g = vjp(&mut c, node, g, &need, &mut NoWeights)?[0].expect("asked for");
            }
            let g = c.packed(g)?;
            c.set_output(g);
            c.extend_graph(whole, &[g]);
            after = Some((seed, g));
        }
        let n_after = c.n_nodes(whole);
        let mut back = None;
        if cpu.side_of(None) == Side::Host && c.takes_decoded(nodes.weight, Way::Back) {
            // The logits are overwritten with their gradients.
            let g = after.map_or(logits, |(_, g)| g);
            let d = c.decoded_product(nodes.weight, g, Way::Back, Precision::Fast)?;
            c.set_output(d);
            c.extend_graph(whole, &[d]);
            back = Some(d);
        }
        let n = c.n_nodes(whole);
        cpu.place(&mut c, &inputs)?;
        if cpu.gpu().is_some() && after.is_some() {
            let first_on_gpu = match cpu.side_of(None) {
                Side::Device => 0,
                Side::Host => usize::MAX,
            };
            place_apart(&mut c, cpu, (whole, n_forward), &[], first_on_gpu)?;
        }
        let forward = c.graph_part(whole, 0..n_forward)?;
        let mut passes = vec![forward];
        let after = match after {
            Some((seed, g)) => {
                passes.push(c.graph_part(whole, n_forward..n_after)?);
                Some((passes[1], seed, g))
            }
            None => None,
        };
        let back = match back {
            Some(d) => {
                passes.push(c.graph_part(whole, n_after..n)?);
                passes.last().map(|&graph| (graph, d))
            }
            None => None,
        };
        let plan = cpu.plan(&c, whole, &passes)?;
        Ok(Self {
            n_rows,
            ctx: c,
            forward,
            after,
            back,
            plan,
            hidden,
            logits,
            rows: Vec::new(),
        })
    }

    /// Size of the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.ctx.ne(self.logits)[0] as usize
    }

    /// Bytes of its graph.
    pub fn bytes(&self) -> usize {
        self.plan.bytes
    }

    /// Compute the logits `[n_vocab, n_rows]` of at most that many `rows`, for the caller to change;
    /// those past the given rows are of nothing.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn logits<'a>(
        &'a mut self,
        cpu: &mut Backend,
        rows: &[f32],
        scratch: &'a mut Vec<f32>,
    ) -> Result<&'a mut [f32], GraphError> {
        self.rows.clear();
        self.rows.extend_from_slice(rows);
        self.rows.resize(self.ctx.n_elements(self.hidden), 0.0);
        self.ctx.write(self.hidden, &self.rows)?;
        cpu.compute(&self.ctx, &self.plan, self.forward)?;
        Ok(self.ctx.values(self.logits, scratch)?)
    }

    /// The product's gradient `[n_vocab, n_rows]` from that of the logits, which stands in their
    /// place.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn product_gradient<'a>(
        &'a mut self,
        cpu: &mut Backend,
        scratch: &'a mut Vec<f32>,
    ) -> Result<&'a [f32], GraphError> {
        let Some((graph, seed, g)) = self.after else {
            return match self.ctx.on_host(self.logits) {
                true => Ok(self.ctx.values(self.logits, scratch)?),
                // They were changed where they were read to.
                false => Ok(scratch),
            };
        };
        let wanted = self.ctx.values(self.logits, scratch)?.to_vec();
        self.ctx.write(seed, &wanted)?;
        cpu.compute(&self.ctx, &self.plan, graph)?;
        Ok(self.ctx.values(g, scratch)?)
    }

    /// The rows' gradient `[n_embd, n_rows]` from the product's, by all of the matrix; none where
    /// that is not possible.
    ///
    /// # Errors
    /// When ggml fails.
    pub fn back<'a>(
        &'a mut self,
        cpu: &mut Backend,
        scratch: &'a mut Vec<f32>,
    ) -> Result<Option<&'a [f32]>, GraphError> {
        let Some((graph, d)) = self.back else {
            return Ok(None);
        };
        cpu.compute(&self.ctx, &self.plan, graph)?;
        Ok(Some(self.ctx.values(d, scratch)?))
    }

    /// Whether [`Chunk::back`] is possible.
    pub fn has_back(&self) -> bool {
        self.back.is_some()
    }
}

/// The head's nodes for `r` rows.
fn forward(
    c: &mut Ctx,
    parts: &Parts<'_>,
    cpu: &Backend,
    weights: &mut Multiplying,
    r: i64,
) -> Result<Nodes, GraphError> {
    let template = parts.template;
    let mut record = Record::default();
    let n_embd = template.entries[template.hidden].ne[0].at(1, 1);
    let hidden = c.leaf(sys::GGML_TYPE_F32, [n_embd, r, 1, 1], "hidden")?;
    let mut leaf = |c: &mut Ctx, name: &str| match cpu.side_of(None) {
        Side::Device => weights.plain(c, parts.weights, cpu, name),
        Side::Host => parts.weights.leaf(c, name),
    };
    let name = &template.output_weight;
    let weight = leaf(c, name)?;
    if cpu.side_of(None) == Side::Host && is_slow(parts.weights.info(name)?.ty) {
        record.decoded.insert(weight, Precision::Fast);
    }
    let mut built = vec![None; template.entries.len()];
    built[template.hidden] = Some(hidden);
    let mut product = None;
    for (i, e) in template.entries.iter().enumerate().skip(template.head) {
        let Step::Op {
            op,
            params,
            src,
            nb,
            offset,
        } = &e.step
        else {
            if let Step::Leaf(Leaf::Weight(name)) = &e.step {
                built[i] = Some(leaf(c, name)?);
            }
            continue;
        };
        let src: Option<Vec<Tensor>> = if i == template.head {
            Some(vec![weight, hidden])
        } else {
            src.iter().map(|&s| built[s]).collect()
        };
        let Some(src) = src else {
            return Err(GraphError::Untraceable(format!(
                "its output head reads {}, which is not a product of the hidden state",
                e.name
            )));
        };
        // The head has no tokens: only its rows count.
        let wanted = Wanted::of(e, (nb, *offset), (r, r));
        let out = record.emit(c, *op, params, &src, Some(&wanted))?;
        product.get_or_insert(out);
        built[i] = Some(out);
    }
    let logits = built.last().copied().flatten();
    Ok(Nodes {
        record,
        hidden,
        weight,
        product: product.expect("the head starts with a product"),
        logits: logits.expect("the template ends with its logits"),
    })
}
