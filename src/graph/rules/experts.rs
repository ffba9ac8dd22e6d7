//! Products with the matrices of chosen experts, which stay as they are, and their biases.

use super::{Grads, GraphError, Weightless, tile_rows};
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
    let full = match env.transposed_experts(c, experts)? {
        Some(turned) => c.mul_mat_id(turned, g, ids)?,
        None => by_tiles(c, experts, g, ids, env.tile())?,
    };
    let db = if c.ne(full) == c.ne(b) {
        full
    } else {
        c.repeat_back(full, b)?
    };
    Ok(vec![None, Some(db), None])
}

/// `Σ over tiles of W_e[tile]ᵀ·g[tile]`: a tile is some rows of every expert, decoded and
/// transposed, and its memory goes to the next one. All ops are ggml's own, and exact in f32.
fn by_tiles(
    c: &mut Ctx,
    experts: Tensor,
    g: Tensor,
    ids: Tensor,
    bytes: usize,
) -> Result<Tensor, GraphError> {
    let (ne, nb) = (c.ne(experts), c.nb(experts));
    let (g_ne, g_nb) = (c.ne(g), c.nb(g));
    let rows = tile_rows(ne, bytes);
    let mut total = None;
    for first in (0..ne[1]).step_by(rows as usize) {
        let n = rows.min(ne[1] - first);
        let tile = c.view(experts, [ne[0], n, ne[2], 1], nb, nb[1] * first as usize)?;
        let tile = c.cast(tile, sys::GGML_TYPE_F32)?;
        let turned = c.transposed(tile)?;
        let part = c.view(g, [n, g_ne[1], g_ne[2], 1], g_nb, g_nb[0] * first as usize)?;
        let part = c.packed(part)?;
        let product = c.mul_mat_id(turned, part, ids)?;
        total = Some(match total {
            Some(sum) => c.add(sum, product)?,
            None => product,
        });
    }
    Ok(total.expect("experts have rows"))
}
