//! The rules of mixtures of experts: products chosen by id, their biases, scores selected by a
//! ranking, and gates with limits.

use super::bench::{Bench, Frozen, check, check_at};
use nepenthe::ggml::{Backend, Ctx, Tensor, dequantize, quantize, sys};
use nepenthe::graph::forward::{Record, floats};
use nepenthe::graph::reverse::{Recomputed, gradients};
use nepenthe::rng::SplitMix64;

const N_TOKENS: i64 = 5;
/// Two of three experts for each of five tokens.
const IDS: [i32; 10] = [0, 2, 1, 0, 2, 1, 0, 1, 2, 0];

fn normals(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = SplitMix64(seed);
    (0..n).map(|_| rng.normal()).collect()
}

fn ids(b: &mut Bench) -> Tensor {
    b.ids_of(&[2, N_TOKENS], &IDS)
}

/// Rows of activations for each expert, or one that they share; 7 output rows in tiles of 3.
fn product(rows: i64) {
    check(|b| {
        let stack = b.constant(&[6, 7, 3], normals(6 * 7 * 3, 5));
        let (x, ids) = (b.param(&[6, rows, N_TOKENS]), ids(b));
        b.op(sys::GGML_OP_MUL_MAT_ID, &[0; 16], &[stack, x, ids])
    });
}

#[test]
fn products_with_rows_of_their_own() {
    product(2);
}

#[test]
fn products_that_share_a_row() {
    product(1);
}

#[test]
fn biases_by_id() {
    check(|b| {
        let bias = b.constant(&[6, 3], normals(18, 5));
        let (x, ids) = (b.param(&[6, 2, N_TOKENS]), ids(b));
        b.op(sys::GGML_OP_ADD_ID, &[0; 16], &[x, bias, ids])
    });
}

/// Decoding tile by tile is exact: the same gradient from encoded experts as from their values.
#[test]
fn the_gradient_of_encoded_experts_is_that_of_their_values() {
    let n = WIDTH * 7 * 3;
    for ty in [12, 14, 8] {
        let bytes = quantize(ty, &normals(n, 5), WIDTH, None).expect("encodable");
        let mut values = vec![0f32; n];
        dequantize(ty, &bytes, &mut values).expect("decodable");
        let encoded = gradient(ty, &bytes);
        let exact = gradient(sys::GGML_TYPE_F32, bytemuck::cast_slice(&values));
        assert!(exact.iter().any(|g| g.abs() > 1.0));
        assert_eq!(encoded, exact, "type {ty}");
    }
}

/// Two blocks of K-quants, and so two tiles.
const WIDTH: usize = 512;

/// Of `[512, 1, 5]` activations through a stack `[512, 7, 3]`, for a seed of normal numbers.
fn gradient(ty: u32, stack: &[u8]) -> Vec<f32> {
    let mut cpu = Backend::new(1).expect("a CPU");
    let (mut c, mut record) = (Ctx::new(1024).expect("a context"), Record::default());
    let mut leaf = |ty, ne| c.leaf(ty, ne, "").expect("a leaf");
    let experts = leaf(ty, [WIDTH as i64, 7, 3, 1]);
    let x = leaf(sys::GGML_TYPE_F32, [WIDTH as i64, 1, N_TOKENS, 1]);
    let ids = leaf(sys::GGML_TYPE_I32, [2, N_TOKENS, 1, 1]);
    let seed = leaf(sys::GGML_TYPE_F32, [7, 2, N_TOKENS, 1]);
    let src = [experts, x, ids];
    let out = record.emit(&mut c, sys::GGML_OP_MUL_MAT_ID, &[0; 16], &src, None);
    let out = out.expect("built");
    let grads = gradients(
        &mut c,
        (&record, &Recomputed::default()),
        out,
        seed,
        &[x],
        &mut Frozen(vec![experts]),
    )
    .expect("rules");
    let graph = c.graph(&grads).expect("a graph");
    c.set_output(grads[0]);
    let _memory = cpu.place(&mut c, &[experts, x, ids, seed]).expect("room");
    let plan = cpu.plan(&c, graph, &[graph]).expect("room");
    c.write(experts, stack).expect("its length");
    c.write(ids, &IDS).expect("its length");
    c.write(seed, &normals(7 * 2 * 5, 9)).expect("its length");
    cpu.compute(&c, &plan, graph).expect("computable");
    let mut g = vec![0f32; WIDTH * 5];
    c.read(grads[0], &mut g).expect("its length");
    g
}

/// The scores of a token's first two experts, as a ranking of other numbers has them.
#[test]
fn scores_selected_by_a_ranking() {
    check(|b| {
        let scores = b.param(&[1, 3, N_TOKENS]);
        let by = b.constant(&[3, N_TOKENS], normals(15, 5));
        let mut order = [0; 16];
        order[0] = 1;
        let ranking = b.op(sys::GGML_OP_ARGSORT, &order, &[by]);
        let first = b.view(ranking, [2, N_TOKENS, 1, 1], [4, 12, 60, 60], 0);
        let picked = b.op(sys::GGML_OP_GET_ROWS, &[0; 16], &[scores, first]);
        b.op(sys::GGML_OP_SQR, &[0; 16], &[picked])
    });
}

/// Ids that do not come from a ranking may name a row twice.
#[test]
fn scores_selected_twice() {
    check(|b| {
        let scores = b.param(&[1, 3, N_TOKENS]);
        let ids = b.ids_of(&[2, N_TOKENS], &[0, 0, 1, 1, 2, 1, 0, 2, 2, 2]);
        let picked = b.op(sys::GGML_OP_GET_ROWS, &[0; 16], &[scores, ids]);
        b.op(sys::GGML_OP_SQR, &[0; 16], &[picked])
    });
}

/// Slope 1.7, limit 1.5.
fn limited(kind: u32) {
    check_at(0.03, 2e-3, |b| {
        let x = b.param_off(&[20, 8], &[1.5]);
        let y = b.param_off(&[20, 8], &[-1.5, 1.5]);
        let mut params = floats(&[0.0, 0.0, 1.7, 1.5]);
        params[0] = kind as i32;
        b.op(sys::GGML_OP_GLU, &params, &[x, y])
    });
}

#[test]
fn swiglu_with_a_slope_and_limits() {
    limited(sys::GGML_GLU_OP_SWIGLU_OAI);
}

#[test]
fn swiglu_with_limits() {
    limited(sys::GGML_GLU_OP_SWIGLU_CLAMP);
}
