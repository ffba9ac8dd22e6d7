//! Products with the matrices of chosen experts, which stay as they are, and their biases.

use super::{Grads, GraphError, Weightless};
use crate::ggml::{Ctx, Tensor, op_name, sys};
use crate::graph::forward::Node;

/// For `out [m, used, t] = W_e·b` with expert e = ids[i, t] of `W [k, m, experts]`:
/// `db [k, used, t] = W_eᵀ·g`, summed over the experts that share a row of `b`. A bias chosen by id
/// hands the gradient on.
pub fn vjp(
    c: &mut Ctx,
    node: &Node,
    grad: Tensor,
    need: &[bool],
    env: &mut dyn Weightless,
) -> Result<Grads, GraphError> {
    let frozen = if node.op == sys::GGML_OP_ADD_ID { 1 } else { 0 };
    if need[frozen] {
        return Err(GraphError::NoRule {
            op: format!("{} by its experts", op_name(node.op)),
        });
    }
    if node.op == sys::GGML_OP_ADD_ID {
        return Ok(vec![Some(grad), None, None]);
    }
    let [experts, b, ids] = node.src[..] else {
        unreachable!("built with three sources");
    };
    let g = c.packed(grad)?;
    let full = match env.transposed(c, experts)? {
        Some(turned) => c.mul_mat_id(turned, g, ids)?,
        None => {
            let tile = env.tile(experts).unwrap_or_default();
            tile.product(c, experts, |c, w| Ok(c.mul_mat_id(w, g, ids)?))?
        }
    };
    let db = if c.ne(full) == c.ne(b) {
        full
    } else {
        c.repeat_back(full, b)?
    };
    Ok(vec![None, Some(db), None])
}
