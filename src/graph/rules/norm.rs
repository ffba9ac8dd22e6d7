//! RMS norm and layer norm.

use super::{Grads, GraphError};
use crate::ggml::{Ctx, Tensor, sys};
use crate::graph::forward::{Node, float};

/// RMS norm has ggml's own backward op. Layer norm is RMS norm of `x − mean(x)`, so its
/// gradient is that of the RMS norm, less its own mean.
pub fn vjp(c: &mut Ctx, node: &Node, grad: Tensor) -> Result<Grads, GraphError> {
    let eps = float(&node.params, 0);
    let x = c.packed(node.src[0])?;
    let grad = c.packed(grad)?;
    if node.op == sys::GGML_OP_RMS_NORM {
        return Ok(vec![Some(c.rms_norm_back(grad, x, eps)?)]);
    }
    let centred = centre(c, x)?;
    let g = c.rms_norm_back(grad, centred, eps)?;
    Ok(vec![Some(centre(c, g)?)])
}

/// `x − mean(x)` along `ne[0]`.
fn centre(c: &mut Ctx, x: Tensor) -> Result<Tensor, GraphError> {
    let n = c.ne(x)[0] as f32;
    let sum = c.sum_rows(x)?;
    let mean = c.scale(sum, 1.0 / n, 0.0)?;
    Ok(c.sub(x, mean)?)
}
