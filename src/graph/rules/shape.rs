//! Reshapes, permutations, copies, views, repeats and concatenations: the gradient moves back to
//! where the elements came from.

use super::{Grads, GraphError};
use crate::ggml::{Ctx, Tensor, sys};
use crate::graph::forward::Node;

/// The inverse rearrangement of `grad`; a view that leaves elements out gets zeros there.
pub fn vjp(c: &mut Ctx, node: &Node, grad: Tensor) -> Result<Grads, GraphError> {
    let x = node.src[0];
    let ne = c.ne(x);
    if node.op == sys::GGML_OP_CONCAT {
        return halves(c, node, grad);
    }
    let g = match node.op {
        sys::GGML_OP_PERMUTE => {
            let mut back = [0i32; 4];
            for d in 0..4 {
                back[node.params[d] as usize] = d as i32;
            }
            c.permute(grad, back)?
        }
        sys::GGML_OP_TRANSPOSE => c.transpose(grad)?,
        sys::GGML_OP_REPEAT => c.repeat_back(grad, x)?,
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

/// The two parts of the gradient of a concatenation.
fn halves(c: &mut Ctx, node: &Node, grad: Tensor) -> Result<Grads, GraphError> {
    let dim = node.params[0] as usize;
    let (a, b) = (c.ne(node.src[0]), c.ne(node.src[1]));
    let nb = c.nb(grad);
    let first = c.view(grad, a, nb, 0)?;
    let second = c.view(grad, b, nb, nb[dim] * a[dim] as usize)?;
    Ok(vec![Some(c.packed(first)?), Some(c.packed(second)?)])
}

/// Whether a view has all elements of its source in their order: both walk through memory alike.
fn covers(c: &Ctx, node: &Node) -> bool {
    let offset = node.view.map_or(0, |(offset, _)| offset);
    offset == 0 && walk(c, node.out) == walk(c, node.src[0])
}

/// Counts and strides from the innermost dimension out, with dimensions that continue one another
/// as one.
fn walk(c: &Ctx, t: Tensor) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (n, stride) in c.ne(t).map(|n| n as usize).into_iter().zip(c.nb(t)) {
        match runs.last_mut() {
            _ if n == 1 => {}
            Some((count, inner)) if stride == *inner * *count => *count *= n,
            _ => runs.push((n, stride)),
        }
    }
    runs
}
