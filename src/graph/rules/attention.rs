//! Rotary embedding and softmax.

use super::{Grads, GraphError};
use crate::ggml::{Ctx, Tensor, sys};
use crate::graph::forward::{ATTEND, Node, attended, float};

/// A rotation's transpose is the rotation back; softmax has ggml's own backward op. What is added
/// to the scores (mask, ALiBi) and what takes a share of the sum without having an element (sinks)
/// does not change `dx = s·y·(dy − Σ y·dy)`.
pub fn vjp(c: &mut Ctx, node: &Node, grad: Tensor, need: &[bool]) -> Result<Grads, GraphError> {
    let mut grads = vec![None; need.len()];
    let grad = c.packed(grad)?;
    if node.op == ATTEND {
        let back = c.attend_back(&attended(&node.params, &node.src), grad)?;
        return Ok(vec![Some(back.q), Some(back.k), Some(back.v), None]);
    }
    grads[0] = Some(match node.op {
        sys::GGML_OP_ROPE => {
            let factors = node.src.get(2).copied();
            c.rope(grad, node.src[1], factors, &node.params, true)?
        }
        _ => c.soft_max_back(grad, node.out, float(&node.params, 0))?,
    });
    Ok(grads)
}
