//! Sums, products and scalings, with broadcasting of the second source; sums along rows.

use super::{Grads, GraphError};
use crate::ggml::{Ctx, Tensor, sys};
use crate::graph::forward::{Node, float};

/// `d(a∘b)`; a broadcast `b` collects the sum over its repeats.
pub fn vjp(c: &mut Ctx, node: &Node, grad: Tensor, need: &[bool]) -> Result<Grads, GraphError> {
    let a = node.src[0];
    let wants_a = need[0];
    let wants_b = need.get(1).copied().unwrap_or(false);
    let (mut ga, mut gb) = (None, None);
    match node.op {
        sys::GGML_OP_ADD | sys::GGML_OP_SUB => {
            ga = wants_a.then_some(grad);
            if wants_b {
                let g = if node.op == sys::GGML_OP_SUB {
                    let g = c.packed(grad)?;
                    c.scale(g, -1.0, 0.0)?
                } else {
                    grad
                };
                gb = Some(fold(c, g, node.src[1])?);
            }
        }
        sys::GGML_OP_MUL => {
            if wants_a {
                ga = Some(c.mul(grad, node.src[1])?);
            }
            if wants_b {
                let g = c.mul(grad, a)?;
                gb = Some(fold(c, g, node.src[1])?);
            }
        }
        sys::GGML_OP_DIV => {
            if wants_a {
                ga = Some(c.div(grad, node.src[1])?);
            }
            if wants_b {
                let g = c.mul(grad, node.out)?;
                let g = c.div(g, node.src[1])?;
                let g = c.scale(g, -1.0, 0.0)?;
                gb = Some(fold(c, g, node.src[1])?);
            }
        }
        sys::GGML_OP_SQR => {
            let g = c.mul(grad, a)?;
            let g = c.packed(g)?;
            ga = Some(c.scale(g, 2.0, 0.0)?);
        }
        sys::GGML_OP_SCALE => {
            let g = c.packed(grad)?;
            ga = Some(c.scale(g, float(&node.params, 0), 0.0)?);
        }
        sys::GGML_OP_SQRT => {
            let double = c.scale(node.out, 2.0, 0.0)?;
            ga = Some(c.div(grad, double)?);
        }
        sys::GGML_OP_CLAMP => {
            // Open ends: the derivative where a value is at the bound is taken as 0, as autograd
            // frameworks' one-sided choices also are arbitrary there.
            let above = c.scale(node.out, 1.0, -float(&node.params, 0))?;
            let above = c.unary(above, sys::GGML_UNARY_OP_STEP)?;
            let below = c.scale(node.out, -1.0, float(&node.params, 1))?;
            let below = c.unary(below, sys::GGML_UNARY_OP_STEP)?;
            let inside = c.mul(above, below)?;
            ga = Some(c.mul(grad, inside)?);
        }
        sys::GGML_OP_SUM_ROWS => ga = Some(c.repeat(grad, c.ne(a))?),
        sys::GGML_OP_MEAN => {
            let ne = c.ne(a);
            let g = c.packed(grad)?;
            let g = c.scale(g, 1.0 / ne[0] as f32, 0.0)?;
            ga = Some(c.repeat(g, ne)?);
        }
        _ => unreachable!("the table sends no other op here"),
    }
    Ok(vec![ga, gb])
}

/// Sum the repeats of `g` down to the shape of `like`.
fn fold(c: &mut Ctx, g: Tensor, like: Tensor) -> Result<Tensor, GraphError> {
    if c.ne(g) == c.ne(like) {
        return Ok(g);
    }
    let g = c.packed(g)?;
    let (ne, want) = (c.ne(g), c.ne(like));
    if want[0] == 1 && ne[1..] == want[1..] {
        return Ok(c.sum_rows(g)?);
    }
    Ok(c.repeat_back(g, like)?)
}
