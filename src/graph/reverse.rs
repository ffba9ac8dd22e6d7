//! Reverse accumulation: recorded forward nodes and the gradient of the last one in, gradients of
//! the parameters out, as ggml nodes.

use super::GraphError;
use super::forward::{Node, Record, Wanted};
use super::rules::{Weightless, carries, has_rule, vjp};
use super::template::Template;
use crate::ggml::{Ctx, Tensor, op_name, sys};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// The first op of the template through which gradients must pass and which has no rule, if any.
pub fn first_without_rule(template: &Template) -> Option<String> {
    let on_the_way = template.on_the_way(carries);
    let entries = template.entries.iter().zip(on_the_way);
    let mut ops = entries.filter_map(|(e, on)| e.step.op().filter(|_| on));
    let (op, kind) = ops.find(|&(op, kind)| !has_rule(op, kind))?;
    Some(match op {
        sys::GGML_OP_UNARY | sys::GGML_OP_GLU => format!("{} kind {kind}", op_name(op)),
        _ => op_name(op),
    })
}

/// Stretches of forward nodes that are computed again on the way back, so that their results need
/// not be kept (gradient checkpointing, Chen et al., arXiv 1604.06174). In order, apart from each
/// other; a part lies within one layer or outside all.
#[derive(Debug, Clone, Default)]
pub struct Recomputed {
    /// The nodes of layers. What enters one is kept.
    pub layers: Vec<Range<usize>>,
    /// Parts of the attention of a layer, computed a third time when their turn comes.
    pub parts: Vec<Range<usize>>,
}

/// Values as they are at hand on the way back.
#[derive(Default)]
struct AtHand {
    layer: HashMap<Tensor, Tensor>,
    part: HashMap<Tensor, Tensor>,
}

impl AtHand {
    fn of(&self, t: Tensor) -> Tensor {
        let again = self.part.get(&t).or_else(|| self.layer.get(&t));
        again.copied().unwrap_or(t)
    }

    /// `node` with values that are at hand.
    fn node(&self, node: &Node) -> Node {
        Node {
            src: node.src.iter().map(|&s| self.of(s)).collect(),
            out: self.of(node.out),
            ..node.clone()
        }
    }
}

/// Emit some nodes again, on what is at hand: their results by those they repeat.
fn again(
    c: &mut Ctx,
    (forward, nodes): (&Record, &Range<usize>),
    at_hand: &AtHand,
) -> Result<HashMap<Tensor, Tensor>, GraphError> {
    let mut made: HashMap<Tensor, Tensor> = HashMap::new();
    let mut record = Record {
        decoded: forward.decoded.clone(),
        ..Record::default()
    };
    for node in &forward.nodes[nodes.clone()] {
        let source = |s: &Tensor| made.get(s).copied().unwrap_or_else(|| at_hand.of(*s));
        let src: Vec<Tensor> = node.src.iter().map(source).collect();
        let (offset, nb) = node.view.unwrap_or_default();
        let wanted = Wanted {
            ne: c.ne(node.out),
            nb,
            offset,
            ty: c.ty(node.out),
        };
        let out = record.emit(c, node.op, &node.params, &src, Some(&wanted))?;
        made.insert(node.out, out);
    }
    Ok(made)
}

/// Emit the gradients of `params` for `seed`, the gradient of `output`: every node that depends on
/// one of them passes its own to its sources.
///
/// # Errors
/// An op without a rule, or a parameter on which `output` does not depend.
pub fn gradients(
    c: &mut Ctx,
    (record, recomputed): (&Record, &Recomputed),
    output: Tensor,
    seed: Tensor,
    params: &[Tensor],
    env: &mut dyn Weightless,
) -> Result<Vec<Tensor>, GraphError> {
    let mut needs: HashSet<Tensor> = params.iter().copied().collect();
    for node in &record.nodes {
        let mut sources = node.src.iter().take(carries(node.op));
        if sources.any(|s| needs.contains(s)) {
            needs.insert(node.out);
        }
    }
    let mut grad: HashMap<Tensor, Tensor> = HashMap::from([(output, seed)]);
    let mut at_hand = AtHand::default();
    let ends = |runs: &[Range<usize>]| -> HashMap<usize, Range<usize>> {
        runs.iter().map(|r| (r.end, r.clone())).collect()
    };
    let (layers, parts) = (ends(&recomputed.layers), ends(&recomputed.parts));
    for (i, node) in record.nodes.iter().enumerate().rev() {
        if let Some(run) = layers.get(&(i + 1)) {
            at_hand = AtHand::default();
            at_hand.layer = again(c, (record, run), &at_hand)?;
        }
        if let Some(run) = parts.get(&(i + 1)) {
            at_hand.part.clear();
            at_hand.part = again(c, (record, run), &at_hand)?;
        }
        let Some(g) = grad.get(&node.out).copied() else {
            continue;
        };
        let mut need: Vec<bool> = node.src.iter().map(|s| needs.contains(s)).collect();
        need.iter_mut()
            .skip(carries(node.op))
            .for_each(|n| *n = false);
        if !need.contains(&true) {
            continue;
        }
        let moves = matches!(
            node.op,
            sys::GGML_OP_PERMUTE | sys::GGML_OP_TRANSPOSE | sys::GGML_OP_ADD
        );
        let g = if moves { g } else { c.packed(g)? };
        let source_grads = vjp(c, &at_hand.node(node), g, &need, env)?;
        for ((&s, new), &wanted) in node.src.iter().zip(source_grads).zip(&need) {
            let (Some(new), true) = (new, wanted) else {
                continue;
            };
            let total = match grad.get(&s) {
                Some(&old) => {
                    let (old, new) = (c.packed(old)?, c.packed(new)?);
                    c.add(old, new)?
                }
                None => new,
            };
            grad.insert(s, total);
        }
    }
    params
        .iter()
        .map(|p| match grad.get(p) {
            Some(&g) => Ok(c.packed(g)?),
            None => Err(GraphError::Untraceable(
                "a trained tensor does not reach the output".into(),
            )),
        })
        .collect()
}
