//! Activations and gated activations.

use super::{Grads, GraphError};
use crate::ggml::{Ctx, GELU_CUBIC, GELU_SCALE, Tensor, sys};
use crate::graph::forward::{Node, float};

/// GELU's logistic form x·σ(1.702·x) (Hendrycks & Gimpel, arXiv 1606.08415).
const GELU_QUICK: f32 = 1.702;

/// Gates `act(a)·b`: `da = g·b·act'(a)`, `db = g·act(a)`; a fused gate is split in halves.
pub fn vjp(c: &mut Ctx, node: &Node, grad: Tensor, need: &[bool]) -> Result<Grads, GraphError> {
    let grad = c.packed(grad)?;
    if node.op == sys::GGML_OP_UNARY {
        let op = node.params[0] as u32;
        let g = match op {
            sys::GGML_UNARY_OP_XIELU => xielu(c, node, grad)?,
            _ => unary(c, op, node.src[0], node.out, grad)?,
        };
        return Ok(vec![Some(g)]);
    }
    let kind = node.params[0] as u32;
    if let Some(limited) = Limited::of(node) {
        return limited.vjp(c, node, grad, need);
    }
    let gate = gate(kind).ok_or_else(|| GraphError::NoRule {
        op: format!("GLU kind {kind}"),
    })?;
    if let [a, b] = node.src[..] {
        // Halves of one product come as views of it.
        let (a, b) = (c.packed(a)?, c.packed(b)?);
        let ga = if need[0] {
            Some(gated(c, gate, a, b, grad)?)
        } else {
            None
        };
        let gb = if need[1] {
            let act = c.unary(a, gate)?;
            Some(c.mul(grad, act)?)
        } else {
            None
        };
        return Ok(vec![ga, gb]);
    }
    Ok(vec![Some(fused(c, gate, node, grad)?)])
}

/// Whether a gate has a rule.
pub fn has_gate_rule(glu: u32) -> bool {
    gate(glu).is_some() || is_limited(glu)
}

/// The activation of a gate without limits.
fn gate(glu: u32) -> Option<u32> {
    match glu {
        sys::GGML_GLU_OP_SWIGLU => Some(sys::GGML_UNARY_OP_SILU),
        sys::GGML_GLU_OP_GEGLU => Some(sys::GGML_UNARY_OP_GELU),
        sys::GGML_GLU_OP_REGLU => Some(sys::GGML_UNARY_OP_RELU),
        sys::GGML_GLU_OP_GEGLU_QUICK => Some(sys::GGML_UNARY_OP_GELU_QUICK),
        _ => None,
    }
}

/// Whether an activation has a rule.
pub fn has_rule(unary: u32) -> bool {
    matches!(
        unary,
        sys::GGML_UNARY_OP_SILU
            | sys::GGML_UNARY_OP_TANH
            | sys::GGML_UNARY_OP_RELU
            | sys::GGML_UNARY_OP_SIGMOID
            | sys::GGML_UNARY_OP_SOFTPLUS
            | sys::GGML_UNARY_OP_EXP
            | sys::GGML_UNARY_OP_GELU
            | sys::GGML_UNARY_OP_GELU_QUICK
            | sys::GGML_UNARY_OP_XIELU
    )
}

fn gated(c: &mut Ctx, gate: u32, a: Tensor, b: Tensor, grad: Tensor) -> Result<Tensor, GraphError> {
    let g = c.mul(grad, b)?;
    if gate == sys::GGML_UNARY_OP_SILU {
        return Ok(c.silu_back(g, a)?);
    }
    if gate == sys::GGML_UNARY_OP_GELU {
        return gelu(c, a, g);
    }
    let act = c.unary(a, gate)?;
    unary(c, gate, a, act, g)
}

fn is_limited(glu: u32) -> bool {
    glu == sys::GGML_GLU_OP_SWIGLU_OAI || glu == sys::GGML_GLU_OP_SWIGLU_CLAMP
}

/// Gates with limits, in two tensors: with `x = min(a, limit)` and `y = clamp(b, −limit, limit)`,
/// `x·σ(αx)·(y + shift)`: gpt-oss has a slope α of its own and a shift of 1, others 1 and 0.
struct Limited {
    alpha: f32,
    limit: f32,
    shift: f32,
}

impl Limited {
    fn of(node: &Node) -> Option<Self> {
        let oai = node.params[0] as u32 == sys::GGML_GLU_OP_SWIGLU_OAI;
        if !is_limited(node.params[0] as u32) || node.src.len() != 2 {
            return None;
        }
        Some(Self {
            alpha: if oai { float(&node.params, 2) } else { 1.0 },
            limit: float(&node.params, 3),
            shift: if oai { 1.0 } else { 0.0 },
        })
    }

    /// `da = g·(y + shift)·(x·σ(αx))'·[a < limit]`, `db = g·x·σ(αx)·[|b| < limit]`. With `u = αx`:
    /// `x·σ(αx) = silu(u)/α`, and its derivative is silu's at u.
    fn vjp(&self, c: &mut Ctx, node: &Node, g: Tensor, need: &[bool]) -> Result<Grads, GraphError> {
        let (a, b) = (c.packed(node.src[0])?, c.packed(node.src[1])?);
        let x = c.clamp(a, f32::NEG_INFINITY, self.limit)?;
        let u = c.scale(x, self.alpha, 0.0)?;
        let (mut ga, mut gb) = (None, None);
        if need[0] {
            let y = c.clamp(b, -self.limit, self.limit)?;
            let y = c.scale(y, 1.0, self.shift)?;
            let g = c.mul(g, y)?;
            let g = c.silu_back(g, u)?;
            let below = self.below(c, a)?;
            ga = Some(c.mul(g, below)?);
        }
        if need[1] {
            let act = c.unary(u, sys::GGML_UNARY_OP_SILU)?;
            let act = c.scale(act, 1.0 / self.alpha, 0.0)?;
            let g = c.mul(g, act)?;
            let size = c.unary(b, sys::GGML_UNARY_OP_ABS)?;
            let below = self.below(c, size)?;
            gb = Some(c.mul(g, below)?);
        }
        Ok(vec![ga, gb])
    }

    /// 1 where `x` is below the limit, else 0.
    fn below(&self, c: &mut Ctx, x: Tensor) -> Result<Tensor, GraphError> {
        let room = c.scale(x, -1.0, self.limit)?;
        Ok(c.unary(room, sys::GGML_UNARY_OP_STEP)?)
    }
}

/// `[a; b]` in one tensor: the gradients of the halves, put side by side again.
fn fused(c: &mut Ctx, gate: u32, node: &Node, grad: Tensor) -> Result<Tensor, GraphError> {
    let x = node.src[0];
    let (ne, nb) = (c.ne(x), c.nb(x));
    let half = [ne[0] / 2, ne[1], ne[2], ne[3]];
    let skip = nb[0] * half[0] as usize;
    let swapped = node.params[1] != 0;
    let (at_a, at_b) = if swapped { (skip, 0) } else { (0, skip) };
    let a = c.view(x, half, nb, at_a)?;
    let a = c.packed(a)?;
    let b = c.view(x, half, nb, at_b)?;
    let b = c.packed(b)?;
    let ga = gated(c, gate, a, b, grad)?;
    let act = c.unary(a, gate)?;
    let gb = c.mul(grad, act)?;
    let zero = c.fill_like(x, 0.0)?;
    let with_a = c.acc(zero, ga, nb, at_a)?;
    Ok(c.acc(with_a, gb, nb, at_b)?)
}

/// `grad · act'(x)`, with `y = act(x)` at hand.
fn unary(c: &mut Ctx, op: u32, x: Tensor, y: Tensor, grad: Tensor) -> Result<Tensor, GraphError> {
    match op {
        sys::GGML_UNARY_OP_SILU => Ok(c.silu_back(grad, x)?),
        sys::GGML_UNARY_OP_TANH => {
            let y2 = c.sqr(y)?;
            let d = c.scale(y2, -1.0, 1.0)?;
            Ok(c.mul(grad, d)?)
        }
        sys::GGML_UNARY_OP_RELU => {
            let step = c.unary(y, sys::GGML_UNARY_OP_STEP)?;
            Ok(c.mul(grad, step)?)
        }
        sys::GGML_UNARY_OP_SIGMOID => {
            let y2 = c.sqr(y)?;
            let d = c.sub(y, y2)?;
            Ok(c.mul(grad, d)?)
        }
        sys::GGML_UNARY_OP_SOFTPLUS => {
            let d = c.unary(x, sys::GGML_UNARY_OP_SIGMOID)?;
            Ok(c.mul(grad, d)?)
        }
        sys::GGML_UNARY_OP_EXP => Ok(c.mul(grad, y)?),
        sys::GGML_UNARY_OP_GELU_QUICK => {
            // With u = kx: x·σ(u) = silu(u)/k, so its derivative is silu's at u.
            let u = c.scale(x, GELU_QUICK, 0.0)?;
            Ok(c.silu_back(grad, u)?)
        }
        sys::GGML_UNARY_OP_GELU => gelu(c, x, grad),
        other => Err(GraphError::NoRule {
            op: format!("UNARY kind {other}"),
        }),
    }
}

/// With `u = c(x + kx³)`, `t = tanh u`:
/// `gelu' = ½(1 + t) + ½x(1 − t²)·c(1 + 3kx²)`.
fn gelu(c: &mut Ctx, x: Tensor, grad: Tensor) -> Result<Tensor, GraphError> {
    if c.on_cpu() {
        let (grad, x) = (c.packed(grad)?, c.packed(x)?);
        return Ok(c.gelu_back(grad, x)?);
    }
    let x2 = c.sqr(x)?;
    let inner = c.scale(x2, GELU_SCALE * GELU_CUBIC, GELU_SCALE)?;
    let u = c.mul(inner, x)?;
    let t = c.unary(u, sys::GGML_UNARY_OP_TANH)?;
    let t2 = c.sqr(t)?;
    let sech2 = c.scale(t2, -0.5, 0.5)?;
    let slope = c.scale(x2, 3.0 * GELU_SCALE * GELU_CUBIC, GELU_SCALE)?;
    let bend = c.mul(sech2, slope)?;
    let bend = c.mul(bend, x)?;
    let level = c.scale(t, 0.5, 0.5)?;
    let d = c.add(bend, level)?;
    Ok(c.mul(grad, d)?)
}

/// xIELU (Huang et al., arXiv 2411.13010) with its parameters as ggml stores them:
/// `p·x² + βx` above 0, `n·(exp(min(x, ε)) − 1 − x) + βx` below, ε a small negative number. Hence
/// `β − n + 2p·relu(x) + n·[x > 0] + n·exp(x)·[x < ε]`.
fn xielu(c: &mut Ctx, node: &Node, grad: Tensor) -> Result<Tensor, GraphError> {
    let [n, p, beta, eps] = [1, 2, 3, 4].map(|i| float(&node.params, i));
    let x = node.src[0];
    let up = c.unary(x, sys::GGML_UNARY_OP_RELU)?;
    let step = c.unary(x, sys::GGML_UNARY_OP_STEP)?;
    let down = c.sub(x, up)?;
    let e = c.unary(down, sys::GGML_UNARY_OP_EXP)?;
    let under = c.scale(x, -1.0, eps)?;
    let under = c.unary(under, sys::GGML_UNARY_OP_STEP)?;
    let e = c.mul(e, under)?;
    let bend = c.add(e, step)?;
    let bend = c.scale(bend, n, beta - n)?;
    let rise = c.scale(up, 2.0 * p, 0.0)?;
    let d = c.add(bend, rise)?;
    Ok(c.mul(grad, d)?)
}
