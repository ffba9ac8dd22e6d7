//! An op of this project's own: some columns of a weight, decoded and transposed.
//!
//! With ggml's ops that is a cast and a copy of the transposed view, which walks memory one element
//! of each row at a time: 5 ns a weight on one thread, more than a product with 256 tokens takes.

use super::ctx::{Ctx, Result, Tensor};
use super::custom::number;
use super::decode::Decoder;
use ggml_sys::ggml_tensor;
use half::bf16;
use std::ffi::{c_int, c_void};
use std::ops::Range;

/// Rows decoded at a time: a cache line of each column in BF16.
const ROWS: usize = 32;
/// Columns decoded at a time, a block of K-quants, and the distance of rows in the scratch memory:
/// apart from a power of two, so that a column's elements do not fall on the same cache lines.
const COLUMNS: usize = 256;
const STRIDE: usize = COLUMNS + 16;

impl Ctx {
    /// Columns `columns` of `w [n_in, n_out, n]`, of any type, decoded to BF16 or f32 and
    /// transposed: `[n_out, columns, n]`. CPU only.
    ///
    /// # Errors
    /// Another target, rows that are not packed, or columns that do not begin and end with blocks.
    pub fn turned(&mut self, w: Tensor, columns: Range<i64>, ty: u32) -> Result<Tensor> {
        let ne = self.ne(w);
        // SAFETY: type numbers of live tensors are valid.
        let (block, decodes) = unsafe {
            let from = self.ty(w);
            let traits = ggml_sys::ggml_get_type_traits(from);
            let decodes = from == ggml_sys::GGML_TYPE_F32 || (*traits).to_float.is_some();
            (ggml_sys::ggml_blck_size(from).max(1), decodes)
        };
        let ok = (ty == ggml_sys::GGML_TYPE_BF16 || ty == ggml_sys::GGML_TYPE_F32)
            && decodes
            && COLUMNS as i64 % block == 0
            && self.rows_packed(w)
            && ne[3] == 1
            && 0 <= columns.start
            && columns.start < columns.end
            && columns.end <= ne[0]
            && columns.start % block == 0
            && columns.end % block == 0;
        self.need(
            ok,
            "turned",
            "whole blocks of a weight, as BF16 or f32",
            &[w],
        )?;
        let shape = (ty, [ne[1], columns.end - columns.start, ne[2], 1]);
        // SAFETY: checked above.
        unsafe { self.custom(shape, &[w], turn, columns.start as usize) }
    }
}

/// One thread's share: groups of [`ROWS`] rows of each matrix, in turn.
unsafe extern "C" fn turn(dst: *mut ggml_tensor, ith: c_int, nth: c_int, first: *mut c_void) {
    // SAFETY: ggml hands over the live node that `Ctx::turned` made, with its one source; both have
    // memory when it is computed.
    let (dst, src) = unsafe { (&*dst, &*(*dst).src[0]) };
    let share = Share {
        source: src.data.cast(),
        ty: src.type_,
        nb: [src.nb[1], src.nb[2]],
        n_out: src.ne[1] as usize,
        n: src.ne[2] as usize,
        columns: number(first)..number(first) + dst.ne[1] as usize,
        thread: ith as usize..nth as usize,
    };
    if dst.type_ == ggml_sys::GGML_TYPE_F32 {
        share.turn(dst.data.cast::<f32>(), |x| x);
    } else {
        share.turn(dst.data.cast::<bf16>(), bf16::from_f32);
    }
}

struct Share {
    source: *const u8,
    ty: u32,
    /// Strides of rows and matrices, bytes.
    nb: [usize; 2],
    n_out: usize,
    n: usize,
    columns: Range<usize>,
    /// Thread number, and how many there are.
    thread: Range<usize>,
}

impl Share {
    fn turn<T: Copy + Default>(&self, out: *mut T, convert: impl Fn(f32) -> T) {
        let decoder = Decoder::of(self.ty).expect("a type with a decoder");
        let (block, size) = (decoder.block, decoder.size);
        let groups = self.n_out.div_ceil(ROWS);
        let mut decoded = [0f32; COLUMNS];
        let mut rows = [T::default(); ROWS * STRIDE];
        for group in (self.thread.start..groups * self.n).step_by(self.thread.end) {
            let (matrix, row) = (group / groups, group % groups * ROWS);
            let n_rows = ROWS.min(self.n_out - row);
            for column in self.columns.clone().step_by(COLUMNS) {
                let n_columns = COLUMNS.min(self.columns.end - column);
                for (r, line) in rows.chunks_exact_mut(STRIDE).take(n_rows).enumerate() {
                    let at = matrix * self.nb[1] + (row + r) * self.nb[0] + column / block * size;
                    // SAFETY: whole blocks inside the row, as `Ctx::turned` checked.
                    let bytes = unsafe {
                        let length = n_columns / block * size;
                        std::slice::from_raw_parts(self.source.add(at), length)
                    };
                    let decoded = &mut decoded[..n_columns];
                    decoder.decode(bytes, decoded);
                    for (to, x) in line.iter_mut().zip(decoded) {
                        *to = convert(*x);
                    }
                }
                for c in 0..n_columns {
                    let width = self.columns.len();
                    let at = (matrix * width + column - self.columns.start + c) * self.n_out + row;
                    // SAFETY: the result has `n · width` rows of `n_out`; this group's part of one
                    // is no other thread's.
                    let to = unsafe { std::slice::from_raw_parts_mut(out.add(at), n_rows) };
                    for (r, to) in to.iter_mut().enumerate() {
                        *to = rows[r * STRIDE + c];
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Backend, dequantize, quantize};
    use super::*;

    /// Every element where it belongs: odd numbers of rows, several matrices, parts of the columns.
    #[test]
    fn columns_come_out_as_rows() {
        let (n_in, n_out, n) = (320usize, 45usize, 3usize);
        let values: Vec<f32> = (0..n_in * n_out * n)
            .map(|i| ((i * 7919) % 1013) as f32 / 512.0 - 1.0)
            .collect();
        for ty in [ggml_sys::GGML_TYPE_F32, 8] {
            let bytes = quantize(ty, &values, n_in, None).expect("a type with an encoder");
            let mut plain = vec![0f32; values.len()];
            dequantize(ty, &bytes, &mut plain).expect("just encoded");
            for threads in [1, 3] {
                let mut cpu = Backend::new(threads).expect("a CPU");
                let mut c = Ctx::new(16).expect("room");
                let ne = [n_in as i64, n_out as i64, n as i64, 1];
                let w = c.leaf(ty, ne, "w").expect("a leaf");
                let turned = c
                    .turned(w, 32..288, ggml_sys::GGML_TYPE_F32)
                    .expect("whole blocks");
                cpu.place(&mut c, &[w]).expect("room");
                c.write(w, &bytes).expect("its bytes");
                let graph = c.graph(&[turned]).expect("a graph");
                let plan = cpu.plan(&c, graph, &[graph]).expect("room");
                cpu.compute(&c, &plan, graph).expect("computable");
                let mut out = vec![0f32; 256 * n_out * n];
                c.read(turned, &mut out).expect("its shape");
                for (i, &x) in out.iter().enumerate() {
                    let (o, column, e) = (i % n_out, i / n_out % 256, i / n_out / 256);
                    assert_eq!(x, plain[(e * n_out + o) * n_in + 32 + column], "{i}");
                }
            }
        }
        let mut c = Ctx::new(16).expect("room");
        let w = c.leaf(8, [64, 4, 1, 1], "w").expect("a leaf");
        assert!(c.turned(w, 16..64, ggml_sys::GGML_TYPE_F32).is_err());
        assert!(c.turned(w, 0..96, ggml_sys::GGML_TYPE_F32).is_err());
    }
}
