//! A small graph under construction, and its gradients against finite differences.

use nepenthe::ggml::{Backend, Ctx, Precision, Tensor, sys};
use nepenthe::graph::GraphError;
use nepenthe::graph::forward::{Record, Wanted};
use nepenthe::graph::reverse::{Recomputed, gradients};
use nepenthe::graph::rules::{Tile, Weightless};
use nepenthe::rng::SplitMix64;

/// Frozen weights without copies: they are decoded, in small tiles.
pub struct Frozen(pub Vec<Tensor>);

impl Weightless for Frozen {
    fn transposed(&mut self, _: &mut Ctx, _: Tensor) -> Result<Option<Tensor>, GraphError> {
        Ok(None)
    }

    fn decoded(&self, w: Tensor) -> Option<Precision> {
        self.0.contains(&w).then_some(Precision::Exact)
    }

    fn products(&self) -> Option<Precision> {
        Some(Precision::Exact)
    }

    fn tile(&self, w: Tensor) -> Option<Tile> {
        let tile = Tile {
            bytes: 256,
            exact: true,
        };
        self.0.contains(&w).then_some(tile)
    }
}

/// A small graph under construction: its parameters and constants, with their values.
pub struct Bench {
    pub c: Ctx,
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
    pub fn param_at(&mut self, ne: &[i64], at: impl Fn(f32) -> f32) -> Tensor {
        let t = self.leaf(sys::GGML_TYPE_F32, ne);
        let n = self.c.n_elements(t);
        let values = (0..n).map(|_| at(self.rng.normal())).collect();
        self.params.push((t, values));
        t
    }

    pub fn param(&mut self, ne: &[i64]) -> Tensor {
        self.param_at(ne, |v| v)
    }

    /// Away from `kinks` by more than any step of a finite difference.
    pub fn param_off(&mut self, ne: &[i64], kinks: &'static [f32]) -> Tensor {
        self.param_at(ne, |v| {
            let near = kinks.iter().find(|k| (v - **k).abs() < 0.1);
            near.map_or(v, |k| k + 0.1f32.copysign(v - k))
        })
    }

    pub fn constant(&mut self, ne: &[i64], values: Vec<f32>) -> Tensor {
        let t = self.leaf(sys::GGML_TYPE_F32, ne);
        self.constants.push((t, values));
        t
    }

    pub fn ids(&mut self, values: &[i32]) -> Tensor {
        self.ids_of(&[values.len() as i64], values)
    }

    pub fn ids_of(&mut self, ne: &[i64], values: &[i32]) -> Tensor {
        let t = self.leaf(sys::GGML_TYPE_I32, ne);
        self.ids.push((t, values.to_vec()));
        t
    }

    pub fn op(&mut self, op: u32, params: &[i32; 16], src: &[Tensor]) -> Tensor {
        let out = self.record.emit(&mut self.c, op, params, src, None);
        out.expect("built")
    }

    pub fn shaped(&mut self, op: u32, src: Tensor, ne: [i64; 4]) -> Tensor {
        let wanted = Wanted {
            ne,
            ..Wanted::default()
        };
        let out = self
            .record
            .emit(&mut self.c, op, &[0; 16], &[src], Some(&wanted));
        out.expect("built")
    }

    pub fn view(&mut self, src: Tensor, ne: [i64; 4], nb: [usize; 4], offset: usize) -> Tensor {
        let ty = sys::GGML_TYPE_F32;
        let (op, wanted) = (sys::GGML_OP_VIEW, Wanted { ne, nb, offset, ty });
        let out = self
            .record
            .emit(&mut self.c, op, &[0; 16], &[src], Some(&wanted));
        out.expect("built")
    }
}

pub fn ints(values: &[i32]) -> [i32; 16] {
    let mut params = [0; 16];
    params[..values.len()].copy_from_slice(values);
    params
}

/// `⟨seed, J·d⟩` by the rules against a difference quotient of step `h`, for random `seed` and
/// directions d of one parameter at a time.
pub fn check_at(h: f32, tolerance: f64, build: impl Fn(&mut Bench) -> Tensor) {
    let mut cpu = Backend::new(1).expect("a CPU");
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
    let grads = gradients(
        &mut c,
        (&record, &Recomputed::default()),
        out,
        seed,
        &leaves,
        &mut Frozen(constants.iter().map(|(t, _)| *t).collect()),
    )
    .expect("rules");
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
    let plan = cpu.plan(&c, graph, &[graph]).expect("room");
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
        cpu.compute(c, &plan, graph).expect("computable");
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

pub fn check(build: impl Fn(&mut Bench) -> Tensor) {
    check_at(0.03, 2e-3, build);
}
