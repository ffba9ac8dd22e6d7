//! Rotary embedding and softmax.

use super::{Grads, GraphError};
use crate::ggml::{Ctx, Tensor, sys};
use crate::graph::forward::{Node, float};

/// A rotation's transpose is the rotation back; softmax has ggml's own backward op.
pub fn vjp(c: &mut Ctx, node: &Node, grad: Tensor, need: &[bool]) -> Result<Grads, GraphError> {
    let mut grads = vec![None; need.len()];
    let grad = c.packed(grad)?;
    grads[0] = Some(match node.op {
        sys::GGML_OP_ROPE => {
            let factors = node.src.get(2).copied();
            c.rope(grad, node.src[1], factors, &node.params, true)?
        }
        _ => {
            if float(&node.params, 1) != 0.0 {
                return Err(GraphError::NoRule {
                    op: "SOFT_MAX with ALiBi".into(),
                });
            }
            c.soft_max_back(grad, node.out, float(&node.params, 0))?
        }
    });
    Ok(grads)
}
