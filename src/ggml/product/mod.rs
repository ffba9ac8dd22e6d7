//! An op of this project's own: a product with a frozen weight of any type, decoded a strip at a time.
//!
//! ggml's products with quantised weights round the activations to 8 bits and, for most types, take
//! one dot product after another: 60 to 140 GFLOP/s on a core that does 400 in BF16. A training step
//! multiplies each weight with hundreds of tokens, so that decoding it costs little: strips of
//! [`LANES`](kernel::Kernel::LANES) results are decoded into the order in which the kernel reads
//! them, multiplied with all tokens while they are in the cache, and forgotten. The way back reads
//! the same bytes, and no copy of a weight is kept for either.
//!
//! Each result is one sum in the order of the inner dimension, whatever the number of threads and of
//! tokens beside it.

#[cfg(all(
    target_arch = "x86_64",
    target_feature = "avx512bf16",
    target_feature = "avx512vl"
))]
mod bf16;
mod float;
mod kernel;

#[cfg(all(
    target_arch = "x86_64",
    target_feature = "avx512bf16",
    target_feature = "avx512vl"
))]
use bf16::Bf16 as Fast;
#[cfg(not(all(
    target_arch = "x86_64",
    target_feature = "avx512bf16",
    target_feature = "avx512vl"
)))]
use float::Float as Fast;

use super::ctx::{Ctx, Result, Tensor};
use super::custom::number;
use super::decode::Decoder;
use float::Float;
use ggml_sys::ggml_tensor;
use kernel::{Kernel, Out};
use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::ops::Range;

/// Inner elements decoded at a time: a strip of them stays in the first cache.
const DEPTH: usize = 512;

/// Which way a weight `W [n_in, n_out]` is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `W·x`, `x [n_in, …]`.
    Forward,
    /// `Wᵀ·x`, `x [n_out, …]`.
    Back,
}

/// What the numbers multiplied are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32: not at all.
    Exact,
    /// BF16 where this processor multiplies it at twice the speed, else f32.
    Fast,
}

/// Whether [`Precision::Fast`] is BF16 in this build.
pub const FAST_IS_BF16: bool = Fast::DEPTH == 2;

impl Ctx {
    /// Whether [`Ctx::decoded_product`] takes weight `w` that way.
    pub fn takes_decoded(&self, w: Tensor, way: Way) -> bool {
        let ne = self.ne(w);
        let decodes = Decoder::of(self.ty(w)).is_some();
        // BF16 is multiplied in pairs.
        let inner = match way {
            Way::Forward => ne[0],
            Way::Back => ne[1],
        };
        decodes && self.is_contiguous(w) && ne[2] * ne[3] == 1 && inner % 2 == 0
    }

    /// The product of a weight `w [n_in, n_out]` of any type with `x`, f32. CPU only.
    ///
    /// # Errors
    /// What [`Ctx::takes_decoded`] does not allow, or shapes that do not fit.
    pub fn decoded_product(
        &mut self,
        w: Tensor,
        x: Tensor,
        way: Way,
        precision: Precision,
    ) -> Result<Tensor> {
        let (ne, x_ne) = (self.ne(w), self.ne(x));
        let (inner, outer) = match way {
            Way::Forward => (ne[0], ne[1]),
            Way::Back => (ne[1], ne[0]),
        };
        let ok = self.takes_decoded(w, way) && self.is_f32(x) && x_ne[0] == inner;
        let wanted = "a weight, and f32 rows of its other side";
        self.need(ok, "decoded_product", wanted, &[w, x])?;
        let tiles = self.tiles(x, precision)?;
        let shape = (ggml_sys::GGML_TYPE_F32, [outer, x_ne[1], x_ne[2], x_ne[3]]);
        let mode = Mode { way, precision };
        // SAFETY: checked above.
        unsafe { self.custom(shape, &[w, tiles], multiply, mode.number()) }
    }

    /// The rows of `x` in the order in which products read them: made once for all products with them.
    fn tiles(&mut self, x: Tensor, precision: Precision) -> Result<Tensor> {
        let key = (x, precision.is_bf16());
        if let Some(&tiles) = self.tiles.get(&key) {
            return Ok(tiles);
        }
        let (inner, n_rows) = (self.ne(x)[0], self.n_elements(x) as i64 / self.ne(x)[0]);
        let packed = self.packed(x)?;
        let [rows, stride, depth] = precision.tile().map(|n| n as i64);
        let shape = [stride * (inner / depth), (n_rows + rows - 1) / rows, 1, 1];
        let mode = Mode {
            way: Way::Forward,
            precision,
        };
        let shape = (ggml_sys::GGML_TYPE_I32, shape);
        // SAFETY: contiguous f32 rows of `inner`, and room for as many tiles.
        let tiles = unsafe { self.custom(shape, &[packed], tile, mode.number())? };
        self.tiles.insert(key, tiles);
        Ok(tiles)
    }
}

impl Precision {
    fn is_bf16(self) -> bool {
        self == Self::Fast && FAST_IS_BF16
    }

    /// Rows of a tile, room for them, and inner elements of a unit.
    fn tile(self) -> [usize; 3] {
        match self {
            Self::Fast => [Fast::ROWS, Fast::STRIDE, Fast::DEPTH],
            Self::Exact => [Float::ROWS, Float::STRIDE, Float::DEPTH],
        }
    }
}

/// How a node is computed.
#[derive(Clone, Copy)]
struct Mode {
    way: Way,
    precision: Precision,
}

impl Mode {
    fn number(self) -> usize {
        usize::from(self.way == Way::Back) + 2 * usize::from(self.precision.is_bf16())
    }

    fn of(number: usize) -> Self {
        Self {
            way: match number & 1 {
                0 => Way::Forward,
                _ => Way::Back,
            },
            precision: match number & 2 {
                0 => Precision::Exact,
                _ => Precision::Fast,
            },
        }
    }
}

thread_local! {
    /// A thread's decoded strips, and a line being decoded.
    static SCRATCH: RefCell<(Vec<u32>, Vec<f32>)> = RefCell::default();
}

/// One thread's share of the tiles: [`Ctx::tiles`].
unsafe extern "C" fn tile(dst: *mut ggml_tensor, ith: c_int, nth: c_int, mode: *mut c_void) {
    // SAFETY: ggml hands over the live node and its source; both have memory when it is computed.
    let (dst, x) = unsafe { (&*dst, &*(*dst).src[0]) };
    let inner = x.ne[0] as usize;
    // SAFETY: contiguous f32, which nobody writes meanwhile.
    let rows = unsafe {
        let n = x.ne.iter().product::<i64>() as usize;
        std::slice::from_raw_parts(x.data.cast::<f32>(), n)
    };
    let precision = Mode::of(number(mode)).precision;
    let [n_rows, _, _] = precision.tile();
    let width = dst.ne[0] as usize;
    let tiles = rows.chunks(n_rows * inner).enumerate();
    for (i, rows) in tiles.skip(ith as usize).step_by(nth as usize) {
        // SAFETY: as above.
        let units =
            unsafe { std::slice::from_raw_parts_mut(dst.data.cast::<u32>().add(i * width), width) };
        match precision {
            Precision::Fast => Fast::tile(rows, inner, units),
            Precision::Exact => Float::tile(rows, inner, units),
        }
    }
}

/// One thread's share of the strips: [`Ctx::decoded_product`].
unsafe extern "C" fn multiply(dst: *mut ggml_tensor, ith: c_int, nth: c_int, mode: *mut c_void) {
    // SAFETY: ggml hands over the live node and its two sources; all have memory when it is computed.
    let (dst, w, tiles) = unsafe { (&*dst, &*(*dst).src[0], &*(*dst).src[1]) };
    // SAFETY: both contiguous; nobody writes them meanwhile.
    let (bytes, tiles) = unsafe {
        let bytes = w.nb[1] * w.ne[1] as usize;
        let units = (tiles.ne[0] * tiles.ne[1]) as usize;
        (
            std::slice::from_raw_parts(w.data.cast::<u8>(), bytes),
            std::slice::from_raw_parts(tiles.data.cast::<u32>(), units),
        )
    };
    let Mode { way, precision } = Mode::of(number(mode));
    let product = Product {
        weight: Weight {
            bytes,
            decoder: Decoder::of(w.type_).expect("a type with a decoder"),
            n_in: w.ne[0] as usize,
            n_out: w.ne[1] as usize,
            row_bytes: w.nb[1],
        },
        way,
        tiles,
        n_rows: (dst.ne[1] * dst.ne[2] * dst.ne[3]) as usize,
        out: dst.data.cast(),
        thread: ith as usize,
        n_threads: nth as usize,
    };
    SCRATCH.with_borrow_mut(|(strips, line)| match precision {
        Precision::Fast => product.compute::<Fast>(strips, line),
        Precision::Exact => product.compute::<Float>(strips, line),
    });
}

struct Weight<'a> {
    bytes: &'a [u8],
    decoder: Decoder,
    n_in: usize,
    n_out: usize,
    row_bytes: usize,
}

impl Weight<'_> {
    /// Columns `columns` of a row; they begin with a block and end with one.
    fn decode(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let Decoder { block, size, .. } = self.decoder;
        let at = row * self.row_bytes;
        let bytes = at + columns.start / block * size..at + columns.end / block * size;
        self.decoder.decode(&self.bytes[bytes], out);
    }
}

struct Product<'a> {
    weight: Weight<'a>,
    way: Way,
    tiles: &'a [u32],
    n_rows: usize,
    /// `[outer, n_rows]`.
    out: *mut f32,
    thread: usize,
    n_threads: usize,
}

impl Product<'_> {
    /// Strip after strip of the results.
    fn compute<K: Kernel>(&self, units: &mut Vec<u32>, line: &mut Vec<f32>) {
        let Weight { n_in, n_out, .. } = self.weight;
        let (width, inner, outer) = match self.way {
            Way::Forward => (K::LANES, n_in, n_out),
            // Two panels, so that more is decoded at a time.
            Way::Back => (
                (2 * K::LANES).next_multiple_of(self.weight.decoder.block),
                n_out,
                n_in,
            ),
        };
        let panel = K::LANES * (DEPTH / K::DEPTH);
        units.resize(width.div_ceil(K::LANES) * panel, 0);
        line.resize(K::LANES.max(2) * DEPTH.max(width), 0.0);
        let tile = K::STRIDE * (inner / K::DEPTH);
        // Where there are too few strips for all threads, each is multiplied in parts.
        let n_strips = outer.div_ceil(width);
        let n_parts = self.n_threads.div_ceil(n_strips);
        let n_tiles = self.tiles.len() / tile;
        let work = (0..n_strips * n_parts).skip(self.thread);
        for (i, part) in work
            .step_by(self.n_threads)
            .map(|w| (w / n_parts, w % n_parts))
        {
            let strip = i * width..((i + 1) * width).min(outer);
            let tiles = n_tiles * part / n_parts..n_tiles * (part + 1) / n_parts;
            for k in (0..inner).step_by(DEPTH) {
                let depth = k..(k + DEPTH).min(inner);
                match self.way {
                    Way::Forward => self.turn_rows::<K>(&strip, &depth, units, line),
                    Way::Back => self.pair_rows::<K>(&strip, &depth, units, line),
                }
                let here = depth.start / K::DEPTH..depth.end / K::DEPTH;
                for (lane, panel) in strip.clone().step_by(K::LANES).zip(units.chunks(panel)) {
                    let all = self.tiles.chunks_exact(tile).enumerate();
                    for (t, tile) in all.take(tiles.end).skip(tiles.start) {
                        let row = t * K::ROWS;
                        let tile = &tile[here.start * K::STRIDE..here.end * K::STRIDE];
                        // SAFETY: this thread's strip of the results, inside `[outer, n_rows]`.
                        unsafe {
                            let out = Out {
                                at: self.out.add(row * outer + lane),
                                outer,
                                n_rows: K::ROWS.min(self.n_rows - row),
                                n_lanes: K::LANES.min(strip.end - lane),
                            };
                            K::multiply(panel, tile, out, k > 0);
                        }
                    }
                }
            }
        }
    }

    /// Rows `strip` of the weight, columns `depth`: lanes are rows.
    fn turn_rows<K: Kernel>(
        &self,
        strip: &Range<usize>,
        depth: &Range<usize>,
        units: &mut [u32],
        line: &mut [f32],
    ) {
        let lines = line.chunks_exact_mut(DEPTH).take(strip.len());
        for (row, line) in strip.clone().zip(lines) {
            self.weight
                .decode(row, depth.clone(), &mut line[..depth.len()]);
        }
        K::turn(line, DEPTH, depth.len(), units);
    }

    /// Columns `strip` of the weight, rows `depth`: lanes are columns.
    fn pair_rows<K: Kernel>(
        &self,
        strip: &Range<usize>,
        depth: &Range<usize>,
        units: &mut [u32],
        line: &mut [f32],
    ) {
        let width = line.len() / 2;
        let (a, b) = line.split_at_mut(width);
        let panel = K::LANES * (DEPTH / K::DEPTH);
        for (u, row) in depth.clone().step_by(K::DEPTH).enumerate() {
            self.weight
                .decode(row, strip.clone(), &mut a[..strip.len()]);
            if K::DEPTH == 2 {
                self.weight
                    .decode(row + 1, strip.clone(), &mut b[..strip.len()]);
            }
            for (p, first) in (0..strip.len()).step_by(K::LANES).enumerate() {
                let lanes = first..first + K::LANES;
                let to = &mut units[p * panel + u * K::LANES..][..K::LANES];
                K::pair(&a[lanes.clone()], &b[lanes], to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Backend, dequantize, quantize};
    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        let mut rng = crate::rng::SplitMix64::stream(seed as u64, 0);
        (0..n).map(|_| rng.normal()).collect()
    }

    /// Against sums in f64 over the decoded weight: both ways, several types, shapes that leave
    /// parts of strips and tiles over, several threads.
    #[test]
    fn products_are_sums_over_the_decoded_weight() {
        let shapes = [(256, 66, 1), (640, 96, 13), (1280, 34, 37), (32, 1026, 5)];
        for (n_in, n_out, n) in shapes {
            for ty in [0u32, 1, 30, 3, 6, 8, 12, 14] {
                // SAFETY: a valid type.
                let block = unsafe { ggml_sys::ggml_blck_size(ty) } as usize;
                if n_in % block != 0 {
                    continue;
                }
                let w = values(n_in * n_out, 1);
                let bytes = quantize(ty, &w, n_in, None).expect("a type with an encoder");
                let mut w = vec![0f32; w.len()];
                dequantize(ty, &bytes, &mut w).expect("just encoded");
                for way in [Way::Forward, Way::Back] {
                    let (inner, outer) = match way {
                        Way::Forward => (n_in, n_out),
                        Way::Back => (n_out, n_in),
                    };
                    let x = values(inner * n, 2);
                    let mut before: Option<Vec<f32>> = None;
                    for (precision, threads) in [
                        (Precision::Exact, 1),
                        (Precision::Fast, 1),
                        (Precision::Fast, 3),
                    ] {
                        let y = product((ty, &bytes, n_in, n_out), &x, way, precision, threads);
                        let tolerance = match precision {
                            Precision::Exact => 2e-6,
                            Precision::Fast if FAST_IS_BF16 => 6e-3,
                            Precision::Fast => 2e-6,
                        };
                        for (i, &found) in y.iter().enumerate() {
                            let (o, t) = (i % outer, i / outer);
                            let term = |k: usize| {
                                let w = match way {
                                    Way::Forward => w[o * n_in + k],
                                    Way::Back => w[k * n_in + o],
                                };
                                f64::from(w) * f64::from(x[t * inner + k])
                            };
                            let sum: f64 = (0..inner).map(term).sum();
                            let norm = (0..inner).map(|k| term(k).powi(2)).sum::<f64>().sqrt();
                            assert!(
                                (sum - f64::from(found)).abs() < tolerance * norm * 3.0,
                                "{ty} {way:?} {precision:?} {n_in}x{n_out}x{n} at {i}: {found} for {sum}"
                            );
                        }
                        if threads == 3 {
                            assert_eq!(before.as_ref(), Some(&y), "threads change nothing");
                        }
                        before = Some(y);
                    }
                }
            }
        }
    }

    fn product(
        (ty, bytes, n_in, n_out): (u32, &[u8], usize, usize),
        x: &[f32],
        way: Way,
        precision: Precision,
        threads: usize,
    ) -> Vec<f32> {
        let mut cpu = Backend::new(threads).expect("a CPU");
        let mut c = Ctx::new(16).expect("room");
        let w = c
            .leaf(ty, [n_in as i64, n_out as i64, 1, 1], "w")
            .expect("a leaf");
        let inner = match way {
            Way::Forward => n_in,
            Way::Back => n_out,
        };
        let ne = [inner as i64, (x.len() / inner) as i64, 1, 1];
        let rows = c.leaf(0, ne, "x").expect("a leaf");
        let y = c.decoded_product(w, rows, way, precision).expect("fitting");
        cpu.place(&mut c, &[w, rows]).expect("room");
        c.write(w, bytes).expect("its bytes");
        c.write(rows, x).expect("its values");
        let graph = c.graph(&[y]).expect("a graph");
        let plan = cpu.plan(&c, graph, &[graph]).expect("room");
        cpu.compute(&c, &plan, graph).expect("computable");
        let mut out = vec![0f32; c.n_elements(y)];
        c.read(y, &mut out).expect("its shape");
        out
    }
}
