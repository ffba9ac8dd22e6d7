//! Ops of this project's own among ggml's. The CPU alone computes them.

use super::ctx::{Ctx, Result, Tensor};
use ggml_sys::{ggml_tensor, llama};
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

/// ggml's `GGML_N_TASKS_MAX`.
const ALL_THREADS: c_int = -1;

/// What computes a node: it is given the live node, whose sources have memory, this thread's number
/// and how many there are, and the node's [user number](number).
pub(super) type Compute = unsafe extern "C" fn(*mut ggml_tensor, c_int, c_int, *mut c_void);

impl Ctx {
    /// A node `ne` of type `ty` that `compute` computes from `sources`, all threads at once.
    ///
    /// # Safety
    /// `compute` reads no more than such sources hold, and writes no more than such a node does.
    pub(super) unsafe fn custom(
        &mut self,
        (ty, ne): (u32, [i64; 4]),
        sources: &[Tensor],
        compute: Compute,
        user: usize,
    ) -> Result<Tensor> {
        self.room()?;
        let mut sources: Vec<*mut ggml_tensor> = sources.iter().map(|&s| self.ptr(s)).collect();
        // SAFETY: live sources, which ggml copies; the number travels in the user pointer, which is
        // never followed. The rest is the caller's promise.
        let raw = unsafe {
            llama::ggml_custom_4d(
                self.raw(),
                ty,
                ne[0],
                ne[1],
                ne[2],
                ne[3],
                sources.as_mut_ptr(),
                sources.len() as c_int,
                Some(compute),
                ALL_THREADS,
                null_mut::<c_void>().wrapping_byte_add(user),
            )
        };
        self.keep(raw)
    }
}

/// A node's user number.
pub(super) fn number(user: *mut c_void) -> usize {
    user.addr()
}
