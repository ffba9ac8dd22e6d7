//! GELU's slope in one op of this project's own, where ggml's ops take eleven, each a walk through
//! memory, and its hyperbolic tangent is computed one number at a time.

use super::ctx::{Ctx, Result, Tensor};
use super::custom::Compute;
use ggml_sys::ggml_tensor;
use std::ffi::{c_int, c_void};
use wide::f32x8;

/// √(2/π) and the cubic coefficient of the tanh form of GELU (Hendrycks & Gimpel,
/// arXiv 1606.08415), as ggml computes it.
pub const GELU_SCALE: f32 = 0.797_884_6;
/// See [`GELU_SCALE`].
pub const GELU_CUBIC: f32 = 0.044_715;
/// From here on tanh is ±1 in f32.
const FLAT: f32 = 9.1;
/// Elements a thread takes at a time.
const STRETCH: usize = 4096;

impl Ctx {
    /// `grad · gelu'(x)` for contiguous f32 tensors of one shape. CPU only.
    ///
    /// # Errors
    /// Other tensors.
    pub fn gelu_back(&mut self, grad: Tensor, x: Tensor) -> Result<Tensor> {
        let ok = self.is_f32(grad)
            && self.is_f32(x)
            && self.ne(grad) == self.ne(x)
            && self.is_contiguous(grad)
            && self.is_contiguous(x);
        let wanted = "two contiguous f32 tensors of one shape";
        self.need(ok, "gelu_back", wanted, &[grad, x])?;
        let shape = (ggml_sys::GGML_TYPE_F32, self.ne(x));
        // SAFETY: as checked, all three hold as many floats.
        unsafe { self.custom(shape, &[grad, x], compute as Compute, 0) }
    }
}

unsafe extern "C" fn compute(dst: *mut ggml_tensor, ith: c_int, nth: c_int, _: *mut c_void) {
    // SAFETY: the live node that `Ctx::gelu_back` made; as many floats in each.
    let (grad, x, out, n) = unsafe {
        let (dst, grad, x) = (&*dst, &*(*dst).src[0], &*(*dst).src[1]);
        let n = dst.ne.iter().product::<i64>() as usize;
        (
            grad.data.cast::<f32>(),
            x.data.cast::<f32>(),
            dst.data.cast::<f32>(),
            n,
        )
    };
    let stretches = (0..n).step_by(STRETCH);
    for first in stretches.skip(ith as usize).step_by(nth as usize) {
        let len = STRETCH.min(n - first);
        // SAFETY: inside the `n` floats; this thread's stretch of the results. The allocator may
        // give the node the memory of a source, element for element, so results go by pointer.
        unsafe { stretch(grad.add(first), x.add(first), out.add(first), len) };
    }
}

/// # Safety
/// `n` floats in each.
unsafe fn stretch(grad: *const f32, x: *const f32, out: *mut f32, n: usize) {
    for i in (0..n).step_by(8) {
        let len = 8.min(n - i);
        let (mut gs, mut xs) = ([0f32; 8], [0f32; 8]);
        // SAFETY: the caller's promise; nothing overlaps the arrays.
        unsafe {
            std::ptr::copy_nonoverlapping(grad.add(i), gs.as_mut_ptr(), len);
            std::ptr::copy_nonoverlapping(x.add(i), xs.as_mut_ptr(), len);
            let d = (f32x8::from(gs) * slope(f32x8::from(xs))).to_array();
            std::ptr::copy_nonoverlapping(d.as_ptr(), out.add(i), len);
        }
    }
}

/// With `u = c(x + kx³)`, `t = tanh u`: `½(1 + t) + ½x(1 − t²)·c(1 + 3kx²)`.
fn slope(x: f32x8) -> f32x8 {
    let x2 = x * x;
    let u = x * (x2 * (GELU_SCALE * GELU_CUBIC) + GELU_SCALE);
    let u = u.max(f32x8::splat(-FLAT)).min(f32x8::splat(FLAT));
    // tanh u = 1 − 2/(e²ᵘ + 1).
    let t = f32x8::splat(1.0) - f32x8::splat(2.0) / ((u + u).exp() + 1.0);
    let bend = (f32x8::splat(1.0) - t * t) * (x2 * (3.0 * GELU_SCALE * GELU_CUBIC) + GELU_SCALE);
    (bend * x + t + 1.0) * 0.5
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As near as f32 gets where `1 − t²` cancels.
    #[test]
    fn the_slope_is_that_of_f64() {
        for i in -3000..=3000 {
            let x = f64::from(i) / 250.0;
            let (c, k) = (f64::from(GELU_SCALE), f64::from(GELU_CUBIC));
            let t = (c * (x + k * x.powi(3))).tanh();
            let exact = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 3.0 * k * x * x);
            let found = slope(f32x8::splat(x as f32)).to_array()[3];
            assert!(
                (f64::from(found) - exact).abs() < 3e-6,
                "{x}: {found} for {exact}"
            );
        }
        let ends = slope(f32x8::from([
            1e30,
            -1e30,
            f32::MAX,
            50.0,
            -50.0,
            0.0,
            -0.0,
            12.0,
        ]));
        let ends = ends.to_array();
        assert_eq!((ends[3], ends[4], ends[5]), (1.0, 0.0, 0.5));
    }
}
