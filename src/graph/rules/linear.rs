//! Matrix products and row selection.

use super::{Grads, GraphError, Weightless};
use crate::ggml::{Ctx, Precision, Tensor, Way, sys};
use crate::graph::forward::Node;

/// For `out [m, n] = mul_mat(a [k, m], b [k, n])`:
/// `da [k, m] = Σₙ b·gᵀ`, `db [k, n] = a·g`; for row selection the transposed scatter.
pub fn vjp(
    c: &mut Ctx,
    node: &Node,
    grad: Tensor,
    need: &[bool],
    env: &mut dyn Weightless,
) -> Result<Grads, GraphError> {
    let (a, b) = (node.src[0], node.src[1]);
    if node.op == sys::GGML_OP_GET_ROWS {
        let grad = c.packed(grad)?;
        let ga = if need[0] {
            Some(scatter(c, a, b, grad)?)
        } else {
            None
        };
        return Ok(vec![ga, None]);
    }
    let mut grads = vec![None, None];
    if need[0] {
        grads[0] = Some(match env.products() {
            Some(precision) if takes_rows(c, a, b, grad) => left_by_rows(c, b, grad, precision)?,
            _ => left(c, a, b, grad)?,
        });
    }
    if need[1] {
        grads[1] = Some(right(c, a, grad, env)?);
    }
    Ok(grads)
}

/// `db [k, n] = a·g`.
fn right(
    c: &mut Ctx,
    a: Tensor,
    grad: Tensor,
    env: &mut dyn Weightless,
) -> Result<Tensor, GraphError> {
    if let Some(precision) = env.decoded(a)
        && c.takes_decoded(a, Way::Back)
    {
        return Ok(c.decoded_product(a, grad, Way::Back, precision)?);
    }
    let g = c.packed(grad)?;
    if let Some(at) = env.transposed(c, a)? {
        return Ok(c.mul_mat(at, g)?);
    }
    if let Some(tile) = env.tile(a) {
        return tile.product(c, a, |c, w| Ok(c.mul_mat(w, g)?));
    }
    let at = c.transposed(a)?;
    Ok(c.mul_mat(at, g)?)
}

/// The transpose of selecting rows of `a [n, rows, t]` by `ids [k, t]`: the rows of `grad [n, k, t]`
/// added up where they came from.
fn scatter(c: &mut Ctx, a: Tensor, ids: Tensor, grad: Tensor) -> Result<Tensor, GraphError> {
    let (i, i_nb) = (c.ne(ids), c.nb(ids));
    if i[1] * i[2] == 1 {
        return Ok(c.get_rows_back(grad, ids, a)?);
    }
    let like = c.packed(a)?;
    if c.ids_differ(ids) {
        let zero = c.fill_like(like, 0.0)?;
        return Ok(c.set_rows(zero, grad, ids)?);
    }
    // ggml writes rows, it does not add them: one id of each token at a time, as a row may be
    // chosen twice.
    let (g, g_nb) = (c.ne(grad), c.nb(grad));
    let mut total = None;
    for k in 0..i[0] {
        let id = c.view(ids, [1, i[1], i[2], 1], i_nb, i_nb[0] * k as usize)?;
        let row = c.view(grad, [g[0], 1, g[2], g[3]], g_nb, g_nb[1] * k as usize)?;
        let row = c.packed(row)?;
        let zero = c.fill_like(like, 0.0)?;
        let part = c.set_rows(zero, row, id)?;
        total = Some(match total {
            Some(sum) => c.add(sum, part)?,
            None => part,
        });
    }
    Ok(total.expect("rows are selected"))
}

/// Whether [`left_by_rows`] is possible.
fn takes_rows(c: &Ctx, a: Tensor, b: Tensor, grad: Tensor) -> bool {
    // Rows are paired: an odd number of them is not.
    let even = c.ne(b)[1] % 2 == 0;
    even && [a, b, grad].into_iter().all(|t| c.is_matrix(t))
}

/// `da [k, m] = Σₙ b·gᵀ`, of matrices: the one of fewer columns alone is transposed.
fn left_by_rows(
    c: &mut Ctx,
    b: Tensor,
    grad: Tensor,
    precision: Precision,
) -> Result<Tensor, GraphError> {
    let (b, grad) = (c.packed(b)?, c.packed(grad)?);
    let (k, m) = (c.ne(b)[0], c.ne(grad)[0]);
    if m <= k {
        let gt = c.transposed(grad)?;
        return Ok(c.decoded_product(b, gt, Way::Back, precision)?);
    }
    let bt = c.transposed(b)?;
    let turned = c.decoded_product(grad, bt, Way::Back, precision)?;
    Ok(c.transposed(turned)?)
}

/// `da [k, m, …] = mul_mat(bᵀ [n, k], gᵀ [n, m])`, summed over the repeats of `a`.
fn left(c: &mut Ctx, a: Tensor, b: Tensor, grad: Tensor) -> Result<Tensor, GraphError> {
    let bt = c.transposed(b)?;
    let gt = c.transposed(grad)?;
    let full = c.mul_mat(bt, gt)?;
    let (ne, want) = (c.ne(full), c.ne(a));
    if ne == want {
        return Ok(full);
    }
    // ggml repeats `a`'s matrix i over results i·n_rep .. (i+1)·n_rep: neighbours, so the
    // repeats become an outer dimension of their own before they are summed.
    let nb = c.nb(full);
    let n_rep = ne[2] / want[2];
    if want[3] != 1 || ne[3] != 1 {
        return Err(GraphError::NoRule {
            op: "MUL_MAT over four dimensions".into(),
        });
    }
    let apart = c.view(
        full,
        [ne[0], ne[1], want[2], n_rep],
        [nb[0], nb[1], nb[2] * n_rep as usize, nb[2]],
        0,
    )?;
    Ok(c.repeat_back(apart, a)?)
}
