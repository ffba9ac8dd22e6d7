//! llama.cpp's log: kept out of the way, with the last complaints at hand for errors.

use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once};

const KEPT: usize = 8;
static VERBOSE: AtomicBool = AtomicBool::new(false);
static COMPLAINTS: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// Print llama.cpp's whole log to stderr from now on (or stop doing so).
pub fn set_verbose(on: bool) {
    VERBOSE.store(on, Ordering::Relaxed);
}

/// The last warnings and errors llama.cpp logged, oldest first, and forget them.
pub fn last_messages() -> Vec<String> {
    COMPLAINTS
        .lock()
        .map(|mut q| q.drain(..).collect())
        .unwrap_or_default()
}

/// Route both logs of the C side here. Idempotent.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `receive` has the C signature, never unwinds and lives for ever.
        unsafe {
            ggml_sys::llama::llama_log_set(Some(receive), std::ptr::null_mut());
            ggml_sys::llama::ggml_log_set(Some(receive), std::ptr::null_mut());
        }
    });
}

unsafe extern "C" fn receive(
    level: ggml_sys::llama::ggml_log_level,
    text: *const c_char,
    _: *mut c_void,
) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that lives for this call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    if VERBOSE.load(Ordering::Relaxed) {
        eprint!("{text}");
    }
    let complaint = matches!(
        level,
        ggml_sys::llama::GGML_LOG_LEVEL_WARN | ggml_sys::llama::GGML_LOG_LEVEL_ERROR
    );
    if complaint && let Ok(mut q) = COMPLAINTS.lock() {
        if q.len() == KEPT {
            q.pop_front();
        }
        q.push_back(text.trim().to_owned());
    }
}
