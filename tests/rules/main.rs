//! Every vector-Jacobian rule against finite differences of its own op.

mod bench;
mod experts;

use bench::{Bench, check, check_at, ints};
use nepenthe::ggml::{Tensor, sys};
use nepenthe::graph::forward::floats;

fn binary(op: u32) {
    check(|b| {
        let (x, y) = (
            b.param(&[5, 3, 2]),
            b.param_off(&[5, 1, 2], &[0.0, -0.2, 0.2]),
        );
        b.op(op, &[0; 16], &[x, y])
    });
}

#[test]
fn add() {
    binary(sys::GGML_OP_ADD);
}

#[test]
fn sub() {
    binary(sys::GGML_OP_SUB);
}

#[test]
fn mul() {
    binary(sys::GGML_OP_MUL);
}

#[test]
fn div() {
    check(|b| {
        let (x, y) = (
            b.param(&[5, 3, 2]),
            b.param_at(&[5, 1, 2], |v| 2.0 + v.tanh()),
        );
        b.op(sys::GGML_OP_DIV, &[0; 16], &[x, y])
    });
}

#[test]
fn a_tensor_used_twice_gets_both_gradients() {
    check(|b| {
        let x = b.param(&[5, 3]);
        let y = b.op(sys::GGML_OP_MUL, &[0; 16], &[x, x]);
        b.op(sys::GGML_OP_ADD, &[0; 16], &[y, x])
    });
}

fn plain(op: u32, params: [i32; 16]) {
    check(|b| {
        let x = b.param(&[6, 3, 2]);
        b.op(op, &params, &[x])
    });
}

#[test]
fn sqr() {
    plain(sys::GGML_OP_SQR, [0; 16]);
}

#[test]
fn scale() {
    plain(sys::GGML_OP_SCALE, floats(&[-1.7, 0.4]));
}

#[test]
fn sum_rows() {
    plain(sys::GGML_OP_SUM_ROWS, [0; 16]);
}

#[test]
fn mean() {
    plain(sys::GGML_OP_MEAN, [0; 16]);
}

#[test]
fn rms_norm() {
    plain(sys::GGML_OP_RMS_NORM, floats(&[1e-5]));
}

#[test]
fn norm() {
    plain(sys::GGML_OP_NORM, floats(&[1e-5]));
}

#[test]
fn sqrt() {
    check(|b| {
        let x = b.param_at(&[6, 3], |v| 1.0 + v * v);
        b.op(sys::GGML_OP_SQRT, &[0; 16], &[x])
    });
}

#[test]
fn clamp() {
    check(|b| {
        let x = b.param_off(&[12, 5], &[-0.5, 0.8]);
        b.op(sys::GGML_OP_CLAMP, &floats(&[-0.5, 0.8]), &[x])
    });
}

/// Of a frozen weight, decoded a few columns at a time: 13 of them in tiles of 9.
#[test]
fn mul_mat_by_tiles() {
    check(|b| {
        let values = (0..13 * 7).map(|i| (i as f32 * 0.37).sin()).collect();
        let w = b.constant(&[13, 7], values);
        let x = b.param(&[13, 5]);
        b.op(sys::GGML_OP_MUL_MAT, &[0; 16], &[w, x])
    });
}

#[test]
fn mul_mat() {
    check(|b| {
        let (x, y) = (b.param(&[6, 4, 2]), b.param(&[6, 5, 4]));
        b.op(sys::GGML_OP_MUL_MAT, &[0; 16], &[x, y])
    });
}

#[test]
fn get_rows() {
    check(|b| {
        let x = b.param(&[6, 4]);
        let ids = b.ids(&[2, 0, 2]);
        b.op(sys::GGML_OP_GET_ROWS, &[0; 16], &[x, ids])
    });
}

/// `n_dims`, mode, base, and the first dimension that turns.
fn rope(n_dims: i32, mode: i32, offset: i32) {
    check(|b| {
        let x = b.param(&[16, 2, 3]);
        let multi = mode & 8 != 0;
        let pos: &[i32] = match multi {
            true => &[0, 1, 5, 0, 1, 5, 0, 1, 5, 0, 0, 0],
            false => &[0, 1, 5],
        };
        let pos = b.ids(pos);
        let factors = b.constant(&[8], (0..8).map(|i| 1.0 + 0.1 * i as f32).collect());
        let mut params = floats(&[0.0, 0.0, 0.0, 0.0, 0.0, 1e4, 0.9, 0.0, 1.1, 32.0, 1.0]);
        (params[1], params[2], params[4], params[15]) = (n_dims, mode, 2048, offset);
        if multi {
            params[11..14].copy_from_slice(&[2, 3, 3]);
        }
        b.op(sys::GGML_OP_ROPE, &params, &[x, pos, factors])
    });
}

#[test]
fn rope_of_neighbours() {
    rope(12, 0, 0);
}

#[test]
fn rope_of_halves() {
    rope(16, 2, 0);
}

#[test]
fn rope_in_sections() {
    rope(16, 8, 0);
}

#[test]
fn rope_of_the_last_dimensions() {
    rope(8, 0, 8);
}

/// Scores of 4 heads with a mask that hides the future and holds distances.
fn soft_max(max_bias: f32, with_sinks: bool) {
    check(|b| {
        let x = b.param(&[6, 6, 4]);
        let values = (0..36).map(|i| match (i % 6, i / 6) {
            (k, q) if k > q => f32::NEG_INFINITY,
            (k, q) => -((q - k) as f32),
        });
        let mask = b.constant(&[6, 6], values.collect());
        let mut src = vec![x, mask];
        if with_sinks {
            src.push(b.constant(&[4], vec![0.5, -1.0, 2.0, 0.0]));
        }
        b.op(sys::GGML_OP_SOFT_MAX, &floats(&[0.6, max_bias]), &src)
    });
}

#[test]
fn soft_max_with_a_mask() {
    soft_max(0.0, false);
}

#[test]
fn soft_max_with_alibi() {
    soft_max(8.0, false);
}

#[test]
fn soft_max_with_sinks() {
    soft_max(0.0, true);
}

/// Step and tolerance: ggml looks GELU up in a table of f16, a staircase for small steps.
fn activation(op: u32, params: [i32; 16], (h, tolerance): (f32, f64)) {
    check_at(h, tolerance, |b| {
        let x = b.param_off(&[40, 8], &[0.0]);
        b.op(op, &params, &[x])
    });
}

const FINE: (f32, f64) = (0.03, 2e-3);
const TABLE: (f32, f64) = (0.25, 1e-2);

#[test]
fn silu() {
    activation(
        sys::GGML_OP_UNARY,
        ints(&[sys::GGML_UNARY_OP_SILU as i32]),
        FINE,
    );
}

#[test]
fn tanh() {
    activation(
        sys::GGML_OP_UNARY,
        ints(&[sys::GGML_UNARY_OP_TANH as i32]),
        FINE,
    );
}

#[test]
fn relu() {
    activation(
        sys::GGML_OP_UNARY,
        ints(&[sys::GGML_UNARY_OP_RELU as i32]),
        FINE,
    );
}

#[test]
fn sigmoid() {
    activation(
        sys::GGML_OP_UNARY,
        ints(&[sys::GGML_UNARY_OP_SIGMOID as i32]),
        FINE,
    );
}

#[test]
fn softplus() {
    let op = sys::GGML_UNARY_OP_SOFTPLUS;
    activation(sys::GGML_OP_UNARY, ints(&[op as i32]), FINE);
}

#[test]
fn exp() {
    let op = sys::GGML_UNARY_OP_EXP;
    activation(sys::GGML_OP_UNARY, ints(&[op as i32]), FINE);
}

#[test]
fn gelu() {
    activation(
        sys::GGML_OP_UNARY,
        ints(&[sys::GGML_UNARY_OP_GELU as i32]),
        TABLE,
    );
}

#[test]
fn gelu_quick() {
    activation(
        sys::GGML_OP_UNARY,
        ints(&[sys::GGML_UNARY_OP_GELU_QUICK as i32]),
        TABLE,
    );
}

#[test]
fn xielu() {
    let mut params = floats(&[0.0, 0.9, 1.3, 0.5, -1e-6]);
    params[0] = sys::GGML_UNARY_OP_XIELU as i32;
    activation(sys::GGML_OP_UNARY, params, FINE);
}

/// In two tensors, in one, and in one with the halves swapped.
fn gate(kind: u32, (h, tolerance): (f32, f64)) {
    check_at(h, tolerance, |b| {
        let (x, y) = (b.param_off(&[20, 8], &[0.0]), b.param(&[20, 8]));
        b.op(sys::GGML_OP_GLU, &ints(&[kind as i32]), &[x, y])
    });
    for swapped in [0, 1] {
        check_at(h, tolerance, |b| {
            let x = b.param_off(&[40, 8], &[0.0]);
            b.op(sys::GGML_OP_GLU, &ints(&[kind as i32, swapped]), &[x])
        });
    }
}

#[test]
fn swiglu() {
    gate(sys::GGML_GLU_OP_SWIGLU, FINE);
}

#[test]
fn reglu() {
    gate(sys::GGML_GLU_OP_REGLU, FINE);
}

#[test]
fn geglu() {
    gate(sys::GGML_GLU_OP_GEGLU, TABLE);
}

#[test]
fn geglu_quick() {
    gate(sys::GGML_GLU_OP_GEGLU_QUICK, TABLE);
}

/// Squared, so that a gradient in the wrong place shows.
fn moved(build: impl Fn(&mut Bench) -> Tensor) {
    check(|b| {
        let x = build(b);
        let ne = b.c.ne(x);
        let x = b.shaped(sys::GGML_OP_CONT, x, ne);
        b.op(sys::GGML_OP_SQR, &[0; 16], &[x])
    });
}

#[test]
fn permute() {
    moved(|b| {
        let x = b.param(&[2, 3, 4, 5]);
        b.op(sys::GGML_OP_PERMUTE, &ints(&[1, 2, 0, 3]), &[x])
    });
}

#[test]
fn transpose() {
    moved(|b| {
        let x = b.param(&[2, 3, 4]);
        b.op(sys::GGML_OP_TRANSPOSE, &[0; 16], &[x])
    });
}

#[test]
fn reshape() {
    moved(|b| {
        let x = b.param(&[6, 4]);
        b.shaped(sys::GGML_OP_RESHAPE, x, [3, 2, 4, 1])
    });
}

#[test]
fn repeat() {
    moved(|b| {
        let x = b.param(&[3, 1, 4]);
        b.shaped(sys::GGML_OP_REPEAT, x, [6, 2, 4, 1])
    });
}

#[test]
fn concat() {
    for dim in [0, 2] {
        moved(|b| {
            let mut ne = [3, 2, 4];
            let x = b.param(&ne);
            ne[dim as usize] = 5;
            let y = b.param(&ne);
            b.op(sys::GGML_OP_CONCAT, &ints(&[dim]), &[x, y])
        });
    }
}

#[test]
fn view_of_a_part() {
    moved(|b| {
        let x = b.param(&[12, 5]);
        b.view(x, [2, 2, 5, 1], [4, 8, 48, 240], 16)
    });
}

/// Its four numbers a row as a matrix, as llama.cpp stores values.
#[test]
fn view_of_a_part_in_another_shape() {
    moved(|b| {
        let x = b.param(&[12, 5]);
        let part = b.view(x, [2, 2, 5, 1], [4, 8, 48, 240], 16);
        b.view(part, [4, 5, 1, 1], [4, 48, 240, 240], 0)
    });
}
