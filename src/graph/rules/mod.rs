//! The table of vector-Jacobian rules: for every op, the gradient of its sources as ggml
//! nodes, given the gradient of its result.
//!
//! ggml's own differentiator aborts on many ops and decodes whole weight matrices per
//! token; these rules emit plain ops that any backend runs. Each is checked against finite
//! differences in `tests/rules.rs`.

mod activation;
mod attention;
mod elementwise;
mod experts;
mod linear;
mod norm;
mod shape;
mod tiles;

pub use tiles::{TILE, Tile};

use super::GraphError;
use super::forward::{ATTEND, Node};
use crate::ggml::{Ctx, Precision, Tensor, op_name, sys};

/// What a rule can ask for besides the node itself.
pub trait Weightless {
    /// The transposed copy `[n_out, n_in]` (of a stack of experts: of each matrix) of frozen weight
    /// leaf `w`, if `w` is one and a copy of it is kept.
    ///
    /// # Errors
    /// A weight that cannot be decoded, or no memory.
    fn transposed(&mut self, c: &mut Ctx, w: Tensor) -> Result<Option<Tensor>, GraphError>;

    /// How exactly products with leaf `w`, a frozen weight or a factor, decode it, if they do.
    fn decoded(&self, w: Tensor) -> Option<Precision>;

    /// How exactly products of activations are taken by an op of our own; none where they are not.
    fn products(&self) -> Option<Precision>;

    /// How frozen weight leaf `w` is decoded where there is no copy; none for other tensors.
    fn tile(&self, w: Tensor) -> Option<Tile>;
}

/// Gradients of a node's sources, one slot each; none where no gradient is needed.
pub type Grads = Vec<Option<Tensor>>;

/// Emit the gradients of `node`'s sources for `grad`, the gradient of its result.
/// `need[i]`: source `i` depends on a parameter.
///
/// # Errors
/// An op without a rule, or shapes a rule does not handle.
pub fn vjp(
    c: &mut Ctx,
    node: &Node,
    grad: Tensor,
    need: &[bool],
    env: &mut dyn Weightless,
) -> Result<Grads, GraphError> {
    match family(node.op) {
        Some(Family::Elementwise) => elementwise::vjp(c, node, grad, need),
        Some(Family::Linear) => linear::vjp(c, node, grad, need, env),
        Some(Family::Experts) => experts::vjp(c, node, grad, need, env),
        Some(Family::Norm) => norm::vjp(c, node, grad),
        Some(Family::Attention) => attention::vjp(c, node, grad, need),
        Some(Family::Activation) => activation::vjp(c, node, grad, need),
        Some(Family::Shape) => shape::vjp(c, node, grad),
        None => Err(GraphError::NoRule {
            op: op_name(node.op),
        }),
    }
}

/// The files of rules.
enum Family {
    Elementwise,
    Linear,
    Experts,
    Norm,
    Attention,
    Activation,
    Shape,
}

/// Through how many of its first sources an op passes a gradient on, where they depend on a
/// parameter. The others hold indices, positions and masks; which expert comes first in a ranking
/// is piecewise constant.
pub fn carries(op: u32) -> usize {
    match op {
        sys::GGML_OP_ARGSORT | sys::GGML_OP_FILL => 0,
        sys::GGML_OP_GET_ROWS | sys::GGML_OP_ROPE | sys::GGML_OP_SOFT_MAX => 1,
        sys::GGML_OP_MUL_MAT_ID | sys::GGML_OP_ADD_ID => 2,
        ATTEND => 3,
        _ => usize::MAX,
    }
}

/// Where an op's rule stands, if it has one.
fn family(op: u32) -> Option<Family> {
    Some(match op {
        sys::GGML_OP_ADD
        | sys::GGML_OP_SUB
        | sys::GGML_OP_MUL
        | sys::GGML_OP_DIV
        | sys::GGML_OP_SQR
        | sys::GGML_OP_SQRT
        | sys::GGML_OP_CLAMP
        | sys::GGML_OP_SUM_ROWS
        | sys::GGML_OP_MEAN
        | sys::GGML_OP_SCALE => Family::Elementwise,
        sys::GGML_OP_MUL_MAT | sys::GGML_OP_GET_ROWS => Family::Linear,
        sys::GGML_OP_MUL_MAT_ID | sys::GGML_OP_ADD_ID => Family::Experts,
        sys::GGML_OP_RMS_NORM | sys::GGML_OP_NORM => Family::Norm,
        sys::GGML_OP_ROPE | sys::GGML_OP_SOFT_MAX | ATTEND => Family::Attention,
        sys::GGML_OP_GLU | sys::GGML_OP_UNARY => Family::Activation,
        sys::GGML_OP_CONT
        | sys::GGML_OP_CONCAT
        | sys::GGML_OP_REPEAT
        | sys::GGML_OP_RESHAPE
        | sys::GGML_OP_VIEW
        | sys::GGML_OP_PERMUTE
        | sys::GGML_OP_TRANSPOSE => Family::Shape,
        _ => return None,
    })
}

/// Whether [`vjp`] has a rule for an op, or for this `kind` of an op with several activations.
pub fn has_rule(op: u32, kind: u32) -> bool {
    match op {
        sys::GGML_OP_UNARY => activation::has_rule(kind),
        sys::GGML_OP_GLU => activation::has_gate_rule(kind),
        _ => family(op).is_some(),
    }
}
