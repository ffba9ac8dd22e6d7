//! Reshapes, permutations, copies and views: the gradient moves back to where the
//! elements came from.

use super::{Grads, GraphError};
use crate::ggml::{Ctx, Tensor, sys};
use crate::graph::forward::Node;

/// The inverse rearrangement of `grad`; a view that leaves elements out gets zeros there.
pub fn vjp(c: &mut Ctx, node: &Node, grad: Tensor) -> Result<Grads, GraphError> {
    let x = node.src[0];
    let ne = c.ne(x);
    let g = match node.op {
        sys::GGML_OP_PERMUTE => {
            let mut back = [0i32; 4];
            for d in 0..4 {
                back[node.params[d] as usize] = d as i32;
            }
            c.permute(grad, back)?
        }
        sys::GGML_OP_TRANSPOSE => c.transpose(grad)?,
        sys::GGML_OP_VIEW if !covers(c, node) => {
            let (offset, nb) = node.view.expect("views carry their strides");
            let like = c.packed(x)?;
            let zero = c.fill_like(like, 0.0)?;
            let g = c.packed(grad)?;
            c.acc(zero, g, nb, offset)?
        }
        _ => {
            let g = c.packed(grad)?;
            c.reshape(g, ne)?
        }
    };
    Ok(vec![Some(g)])
}

/// Whether a view is only a reshape of a contiguous source.
fn covers(c: &Ctx, node: &Node) -> bool {
    c.is_contiguous(node.out)
        && c.is_contiguous(node.src[0])
        && c.n_elements(node.out) == c.n_elements(node.src[0])
}
