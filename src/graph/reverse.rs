//! Reverse accumulation: recorded forward nodes and the gradient of the last one in, gradients of
//! the parameters out, as ggml nodes.

use super::GraphError;
use super::forward::Record;
use super::rules::{Weightless, carries, has_rule, vjp};
use super::template::Template;
use crate::ggml::{Ctx, Tensor, op_name, sys};
use std::collections::{HashMap, HashSet};

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

/// Emit the gradients of `params` for `seed`, the gradient of `output`: every node that depends on
/// one of them passes its own to its sources.
///
/// # Errors
/// An op without a rule, or a parameter on which `output` does not depend.
pub fn gradients(
    c: &mut Ctx,
    record: &Record,
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
    for node in record.nodes.iter().rev() {
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
        let source_grads = vjp(c, node, g, &need, env)?;
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
