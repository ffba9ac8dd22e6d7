//! Every vector-Jacobian rule against finite differences of its own op.

use nepenthe::ggml::{Cpu, Ctx, Tensor, sys};
use nepenthe::graph::GraphError;
use nepenthe::graph::forward::{Record, Wanted, floats};
use nepenthe::graph::reverse::gradients;
use nepenthe::graph::rules::Weightless;
use nepenthe::rng::SplitMix64;

struct NoWeights;

impl Weightless for NoWeights {
    fn transposed(&mut self, _: &mut Ctx, _: Tensor) -> Result<Option<Tensor>, GraphError> {
        Ok(None)
    }
}

/// A small graph under construction: its parameters and constants, with their values.
struct Bench {
    c: Ctx,
    record: Record,
    rng: SplitMix64,
    params: Vec<(Tensor, Vec<f32>)>,
    constants: Vec<(Tensor, Vec<f32>)>,
    ids: Vec<(Tensor, Vec<i32>)>,
}

impl Bench {
    fn leaf(&mut self, ty: u32, ne: &[i64]) -> Tensor {
        let mut whole = [1; 4];
        whole[..ne.len()].copy_from_slice(ne);
        self.c.leaf(ty, whole, "").expect("a leaf")
    }

    /// A parameter with values `at` of standard normal numbers.
    fn param_at(&mut self, ne: &[i64], at: impl Fn(f32) -> f32) -> Tensor {
        let t = self.leaf(sys::GGML_TYPE_F32, ne);
        let n = self.c.n_elements(t);
        let values = (0..n).map(|_| at(self.rng.normal())).collect();
        self.params.push((t, values));
        t
    }

    fn param(&mut self, ne: &[i64]) -> Tensor {
        self.param_at(ne, |v| v)
    }

    /// Away from `kinks` by more than any step of a finite difference.
    fn param_off(&mut self, ne: &[i64], kinks: &'static [f32]) -> Tensor {
        self.param_at(ne, |v| {
            let near = kinks.iter().find(|k| (v - **k).abs() < 0.1);
            near.map_or(v, |k| k + 0.1f32.copysign(v - k))
        })
    }

    fn constant(&mut self, ne: &[i64], values: Vec<f32>) -> Tensor {
        let t = self.leaf(sys::GGML_TYPE_F32, ne);
        self.constants.push((t, values));
        t
    }

    fn ids(&mut self, values: &[i32]) -> Tensor {
        let t = self.leaf(sys::GGML_TYPE_I32, &[values.len() as i64]);
        self.ids.push((t, values.to_vec()));
        t
    }

    fn op(&mut self, op: u32, params: &[i32; 16], src: &[Tensor]) -> Tensor {
        let out = self.record.emit(&mut self.c, op, params, src, None);
        out.expect("built")
    }

    fn shaped(&mut self, op: u32, src: Tensor, ne: [i64; 4]) -> Tensor {
        let wanted = Wanted {
            ne,
            ..Wanted::default()
        };
        let out = self
            .record
            .emit(&mut self.c, op, &[0; 16], &[src], Some(&wanted));
        out.expect("built")
    }

    fn view(&mut self, src: Tensor, ne: [i64; 4], nb: [usize; 4], offset: usize) -> Tensor {
        let ty = sys::GGML_TYPE_F32;
        let (op, wanted) = (sys::GGML_OP_VIEW, Wanted { ne, nb, offset, ty });
        let out = self
            .record
            .emit(&mut self.c, op, &[0; 16], &[src], Some(&wanted));
        out.expect("built")
    }
}

fn ints(values: &[i32]) -> [i32; 16] {
    let mut params = [0; 16];
    params[..values.len()].copy_from_slice(values);
    params
}

/// `⟨seed, J·d⟩` by the rules against a difference quotient of step `h`, for random `seed` and
/// directions d of one parameter at a time.
fn check_at(h: f32, tolerance: f64, build: impl Fn(&mut Bench) -> Tensor) {
    let mut cpu = Cpu::new(1).expect("a CPU");
    let mut b = Bench {
        c: Ctx::new(512).expect("a context"),
        record: Record::default(),
        rng: SplitMix64(11),
        params: Vec::new(),
        constants: Vec::new(),
        ids: Vec::new(),
    };
    let out = build(&mut b);
    let Bench {
        mut c,
        record,
        mut rng,
        params,
        constants,
        ids,
    } = b;
    let seed = c
        .leaf(sys::GGML_TYPE_F32, c.ne(out), "seed")
        .expect("a leaf");
    let leaves: Vec<Tensor> = params.iter().map(|(t, _)| *t).collect();
    let grads = gradients(&mut c, &record, out, seed, &leaves, &mut NoWeights).expect("rules");
    let read = c.packed(out).expect("room");
    let graph = c.graph(&[read]).expect("a graph");
    for &t in grads.iter().chain([&read]) {
        c.set_output(t);
    }
    c.extend_graph(graph, &grads);
    let mut inputs = leaves.clone();
    inputs.extend(constants.iter().map(|(t, _)| *t));
    inputs.extend(ids.iter().map(|(t, _)| *t));
    inputs.push(seed);
    let _memory = cpu.place(&mut c, &inputs).expect("room");
    let _plan = cpu.plan(&c, graph).expect("room");
    for (t, values) in &constants {
        c.write(*t, values).expect("its length");
    }
    for (t, values) in &ids {
        c.write(*t, values).expect("its length");
    }
    let seeds: Vec<f32> = (0..c.n_elements(seed)).map(|_| rng.normal()).collect();
    c.write(seed, &seeds).expect("its length");
    let mut value = |c: &mut Ctx, moved: usize, d: &[f32], h: f32| -> f64 {
        for (i, (t, values)) in params.iter().enumerate() {
            let by = if i == moved { h } else { 0.0 };
            let at: Vec<f32> = match i == moved {
                true => values.iter().zip(d).map(|(v, d)| v + by * d).collect(),
                false => values.clone(),
            };
            c.write(*t, &at).expect("its length");
        }
        cpu.compute(c, graph).expect("computable");
        let mut out = vec![0f32; seeds.len()];
        c.read(read, &mut out).expect("its length");
        let products = out
            .iter()
            .zip(&seeds)
            .map(|(o, s)| f64::from(*o) * f64::from(*s));
        products.sum()
    };
    for (i, &grad) in grads.iter().enumerate() {
        let n = params[i].1.len();
        // Bounded, so that no element passes a kink.
        let d: Vec<f32> = (0..n).map(|_| 2.0 * rng.uniform() - 1.0).collect();
        let mut slope = |h: f32| {
            let up = value(&mut c, i, &d, h);
            (up - value(&mut c, i, &d, -h)) / (2.0 * f64::from(h))
        };
        let numeric = (4.0 * slope(h) - slope(2.0 * h)) / 3.0;
        value(&mut c, i, &d, 0.0);
        let mut g = vec![0f32; n];
        c.read(grad, &mut g).expect("its length");
        let products = g.iter().zip(&d).map(|(g, d)| f64::from(*g) * f64::from(*d));
        let analytic: f64 = products.sum();
        let size: f64 = g
            .iter()
            .zip(&d)
            .map(|(g, d)| f64::from((g * d).powi(2)))
            .sum();
        // Against the sum's own size: products of random signs may cancel.
        let error = (analytic - numeric).abs() / analytic.abs().max(size.sqrt());
        assert!(
            error < tolerance && size > 0.0,
            "parameter {i}: {analytic} against {numeric} ({error:.1e})"
        );
    }
}

fn check(build: impl Fn(&mut Bench) -> Tensor) {
    check_at(0.03, 2e-3, build);
}

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
