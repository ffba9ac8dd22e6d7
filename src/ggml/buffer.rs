//! Memory that tensors live in: a backend's own, or a mapped file's.

use super::ctx::OpError;
use ggml_sys::{ggml_backend_buffer_t, ggml_backend_buffer_type_t};
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

/// Memory that tensors live in: allocated, or borrowed from a mapped file.
pub struct Buffer {
    raw: ggml_backend_buffer_t,
    /// What must stay alive as long as the buffer (the mapping it points into).
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl Buffer {
    /// A zeroed buffer of at least `size` bytes of type `buft`.
    pub(super) fn new(buft: ggml_backend_buffer_type_t, size: usize) -> Result<Arc<Self>, OpError> {
        // SAFETY: the caller's buffer type is a live backend's own.
        let raw = unsafe { ggml_sys::llama::ggml_backend_buft_alloc_buffer(buft, size.max(64)) };
        if raw.is_null() {
            return Err(OpError::Memory { bytes: size });
        }
        // SAFETY: just allocated.
        unsafe { ggml_sys::ggml_backend_buffer_clear(raw, 0) };
        Ok(Arc::new(Self { raw, _keep: None }))
    }

    /// A read-only buffer over `bytes`, which `keep` keeps alive. Its base must be
    /// 32-byte aligned (a mapping is).
    ///
    /// # Errors
    /// An unaligned base.
    pub fn over<T: Any + Send + Sync>(
        keep: Arc<T>,
        bytes: fn(&T) -> &[u8],
    ) -> Result<Arc<Self>, OpError> {
        let slice = bytes(&keep);
        if !(slice.as_ptr() as usize).is_multiple_of(32) || slice.is_empty() {
            return Err(OpError::Backend("a mapped file is not 32-byte aligned"));
        }
        let (ptr, len) = (slice.as_ptr(), slice.len());
        // SAFETY: the memory lives as long as `keep`, which this struct holds. ggml takes a
        // mutable pointer but only writes destinations of nodes, and weights are leaves.
        let raw = unsafe { ggml_sys::ggml_backend_cpu_buffer_from_ptr(ptr.cast_mut().cast(), len) };
        if raw.is_null() {
            return Err(OpError::Backend("a mapped file cannot be used as a buffer"));
        }
        let buffer = Self {
            raw,
            _keep: Some(keep),
        };
        buffer.holds_weights();
        Ok(Arc::new(buffer))
    }

    /// Tell ggml that weights are in it: what reads them is then computed where they are, instead
    /// of moving them.
    pub fn holds_weights(&self) {
        // SAFETY: live buffer; sets a number.
        unsafe {
            ggml_sys::ggml_backend_buffer_set_usage(
                self.raw,
                ggml_sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS,
            );
        }
    }

    pub(super) fn raw(&self) -> ggml_backend_buffer_t {
        self.raw
    }

    /// Bytes in the buffer.
    pub fn size(&self) -> usize {
        // SAFETY: live buffer.
        unsafe { ggml_sys::ggml_backend_buffer_get_size(self.raw) }
    }

    /// First byte's address: on this host, or as the device counts.
    pub(super) fn base(&self) -> NonNull<u8> {
        // SAFETY: live buffer, never of size 0.
        NonNull::new(unsafe { ggml_sys::ggml_backend_buffer_get_base(self.raw) }.cast())
            .expect("a buffer has a base address")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: owned; tensors that point here are kept with an Arc to it by their Ctx.
        unsafe { ggml_sys::ggml_backend_buffer_free(self.raw) };
    }
}

// SAFETY: a buffer is plain memory; reads and writes go through Ctx, which is borrowed
// mutably for writes.
unsafe impl Send for Buffer {}
// SAFETY: see above; nothing is mutated through `&Buffer`.
unsafe impl Sync for Buffer {}
