//! The embedded runtime ([`nepenthe::runtime`]) for C: ten calls, declared in `nepenthe.h`.
//!
//! In and out: NUL-terminated UTF-8, opaque handles, numbers. Every call but the two that close
//! returns a status, the exit code of the error ([`nepenthe::Error::exit_code`]) or 0; the last
//! error of a thread is kept for that thread alone. No panic leaves a call. The header is written
//! by `cbindgen --config src/capi/cbindgen.toml src/capi/lib.rs -o src/capi/nepenthe.h`.
#![allow(non_camel_case_types, reason = "C's names")]

use nepenthe::Error;
use nepenthe::runtime::{Generate, Options, PatchId, Piece, Runtime, Sampling, Session};
use nepenthe::trust::PublicKey;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// No error.
pub const NEPENTHE_OK: i32 = 0;
/// An argument that cannot be used: a null pointer, text that is no UTF-8, a bad number.
pub const NEPENTHE_USAGE: i32 = 2;
/// A file that is malformed.
pub const NEPENTHE_BAD_FILE: i32 = 3;
/// A patch that is not for this model, or not signed by the key that is required.
pub const NEPENTHE_MISMATCH: i32 = 4;
/// Not enough memory or disk, or a limit of the options.
pub const NEPENTHE_RESOURCES: i32 = 6;
/// The engine failed.
pub const NEPENTHE_ENGINE: i32 = 8;
/// Characters of a patch's id, with the NUL.
pub const NEPENTHE_ID_SIZE: usize = 65;

/// A model and its active patches. Any thread may use it at any time.
pub struct nepenthe_runtime(Runtime);

/// One context. One thread at a time may use it; it keeps its model alive.
pub struct nepenthe_session(Session);

/// How a runtime is set up. Zeros and nulls mean the defaults.
#[repr(C)]
pub struct nepenthe_options {
    /// Tokens a session's context holds; 0: 2048.
    pub n_ctx: u32,
    /// Threads of each session; 0: all cores.
    pub n_threads: u32,
    /// Layers on the GPU; negative: all.
    pub n_gpu_layers: i32,
    /// Take only patches signed by this key, a minisign public key or its file; null: any.
    pub require_signature: *const c_char,
}

/// How to generate. Zeros mean the defaults.
#[repr(C)]
pub struct nepenthe_sampling {
    /// Most tokens; 0: 256.
    pub max_tokens: usize,
    /// Temperature; 0: the likeliest token every time.
    pub temp: f32,
    /// Seed.
    pub seed: u32,
}

/// A patch that applies.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nepenthe_patch {
    /// SHA-256 of its file, NUL-terminated.
    pub id: [c_char; NEPENTHE_ID_SIZE],
    /// The scale it applies at.
    pub scale: f32,
}

/// Receives text as it is made: NUL-terminated, valid during the call, empty while a character is
/// unfinished. Returns false to stop. It must return, not jump or throw.
pub type nepenthe_piece =
    Option<extern "C" fn(user: *mut c_void, text: *const c_char, logprob: f64) -> bool>;

/// What a call failed with.
struct Failure {
    code: i32,
    message: String,
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        let mut message = e.to_string();
        let mut cause = std::error::Error::source(&e);
        while let Some(c) = cause {
            message += &format!(": {c}");
            cause = c.source();
        }
        Self {
            code: i32::from(e.exit_code()),
            message,
        }
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure {
        code: NEPENTHE_USAGE,
        message: message.into(),
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Run `call`, keep what it fails with, and let no panic through.
fn guarded(call: impl FnOnce() -> Result<(), Failure>) -> i32 {
    let failure = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => return NEPENTHE_OK,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            Failure {
                code: NEPENTHE_ENGINE,
                message: format!(
                    "a defect in nepenthe: {}",
                    text.unwrap_or("no reason given")
                ),
            }
        }
    };
    let message = CString::new(failure.message.replace('\0', "?")).unwrap_or_default();
    // On a thread that is ending there is nobody left to ask.
    let _ = LAST.try_with(|last| *last.borrow_mut() = message);
    failure.code
}

/// The text at `text`, which the caller keeps for the call.
///
/// # Safety
/// `text` is null or points to a NUL-terminated string that outlives `'a`.
unsafe fn text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(usage(format!("{what}: wanted text, found a null pointer")));
    }
    // SAFETY: not null, and a C string by this function's contract.
    let text = unsafe { CStr::from_ptr(text) };
    let utf8 = text.to_str();
    utf8.map_err(|_| usage(format!("{what}: wanted UTF-8, found other bytes")))
}

/// What `pointer` points to.
///
/// # Safety
/// `pointer` is null or points to a live `T` that nobody changes during `'a`.
unsafe fn shared<'a, T>(pointer: *const T, what: &str) -> Result<&'a T, Failure> {
    // SAFETY: null or live by this function's contract.
    let found = unsafe { pointer.as_ref() };
    found.ok_or_else(|| usage(format!("{what}: wanted one, found a null pointer")))
}

/// What `pointer` points to, to be changed.
///
/// # Safety
/// `pointer` is null or points to a live `T` that nobody else uses during `'a`.
unsafe fn unique<'a, T>(pointer: *mut T, what: &str) -> Result<&'a mut T, Failure> {
    // SAFETY: null or live and unshared by this function's contract.
    let found = unsafe { pointer.as_mut() };
    found.ok_or_else(|| usage(format!("{what}: wanted one, found a null pointer")))
}

/// Open the model file `model`; `options` may be null. On success `*runtime` is to be closed with
/// nepenthe_close.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_open(
    model: *const c_char,
    options: *const nepenthe_options,
    runtime: *mut *mut nepenthe_runtime,
) -> i32 {
    guarded(|| {
        // SAFETY: the header asks for a place to write to, a C string, and options or null.
        let (out, model, given) = unsafe {
            let out = unique(runtime, "runtime")?;
            *out = std::ptr::null_mut();
            (out, text(model, "model")?, options.as_ref())
        };
        let mut options = Options::default();
        if let Some(given) = given {
            if given.n_ctx > 0 {
                options.n_ctx = given.n_ctx;
            }
            if given.n_threads > 0 {
                options.n_threads = given.n_threads as usize;
            }
            options.n_gpu_layers = given.n_gpu_layers;
            if !given.require_signature.is_null() {
                // SAFETY: a C string by the header.
                let key = unsafe { text(given.require_signature, "require_signature")? };
                options.require_signature = Some(PublicKey::parse(key)?);
            }
        }
        let opened = Runtime::open(model, options)?;
        *out = Box::into_raw(Box::new(nepenthe_runtime(opened)));
        Ok(())
    })
}

/// Close a runtime; null is ignored. Its sessions may live on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_close(runtime: *mut nepenthe_runtime) {
    if !runtime.is_null() {
        // SAFETY: made by Box::into_raw in nepenthe_open, and closed once by the header.
        let runtime = unsafe { Box::from_raw(runtime) };
        guarded(|| {
            drop(runtime);
            Ok(())
        });
    }
}

/// Apply the patch file `path`, `scale` times. If `id` is not null it receives the patch's id,
/// NEPENTHE_ID_SIZE characters. On failure nothing has changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_apply(
    runtime: *const nepenthe_runtime,
    path: *const c_char,
    scale: f32,
    id: *mut c_char,
) -> i32 {
    guarded(|| {
        // SAFETY: a live runtime, a C string, and NEPENTHE_ID_SIZE characters or null.
        let (runtime, path, out) = unsafe {
            let out = id.cast::<[c_char; NEPENTHE_ID_SIZE]>().as_mut();
            (shared(runtime, "runtime")?, text(path, "path")?, out)
        };
        let id = runtime.0.apply(path, scale)?;
        if let Some(out) = out {
            *out = characters(id);
        }
        Ok(())
    })
}

/// Take back the patch with this id.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_revoke(
    runtime: *const nepenthe_runtime,
    id: *const c_char,
) -> i32 {
    guarded(|| {
        // SAFETY: a live runtime and a C string.
        let (runtime, id) = unsafe { (shared(runtime, "runtime")?, text(id, "id")?) };
        let id = id
            .parse::<PatchId>()
            .map_err(|e| usage(format!("id: {e}")))?;
        Ok(runtime.0.revoke(id)?)
    })
}

/// The active patches: `*count` receives how many they are, and `patches` (null, or room for
/// `capacity` of them) as many as there is room for, in the order of their ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_active(
    runtime: *const nepenthe_runtime,
    patches: *mut nepenthe_patch,
    capacity: usize,
    count: *mut usize,
) -> i32 {
    guarded(|| {
        // SAFETY: a live runtime and a place for the count.
        let (runtime, count) = unsafe { (shared(runtime, "runtime")?, unique(count, "count")?) };
        let set = runtime.0.active();
        *count = set.patches().len();
        if patches.is_null() {
            return Ok(());
        }
        for (i, p) in set.patches().iter().take(capacity).enumerate() {
            let patch = nepenthe_patch {
                id: characters(p.id),
                scale: p.scale,
            };
            // SAFETY: `i` is below the capacity that the caller has room for; what was there may
            // be uninitialised and is not read.
            unsafe { patches.add(i).write(patch) };
        }
        Ok(())
    })
}

/// Open a session. On success `*session` is to be closed with nepenthe_session_close.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_session_open(
    runtime: *const nepenthe_runtime,
    session: *mut *mut nepenthe_session,
) -> i32 {
    guarded(|| {
        // SAFETY: a live runtime and a place to write to.
        let (runtime, out) = unsafe { (shared(runtime, "runtime")?, unique(session, "session")?) };
        *out = std::ptr::null_mut();
        let opened = runtime.0.session()?;
        *out = Box::into_raw(Box::new(nepenthe_session(opened)));
        Ok(())
    })
}

/// Close a session; null is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_session_close(session: *mut nepenthe_session) {
    if !session.is_null() {
        // SAFETY: made by Box::into_raw in nepenthe_session_open, and closed once by the header.
        let session = unsafe { Box::from_raw(session) };
        guarded(|| {
            drop(session);
            Ok(())
        });
    }
}

/// Generate an answer to the user's message `prompt`, each piece of it given to `piece` (with
/// `user`) as it is made. `sampling` may be null. The answer is generated, first token to last,
/// under the patches that are active when the call begins.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_generate(
    session: *mut nepenthe_session,
    prompt: *const c_char,
    sampling: *const nepenthe_sampling,
    piece: nepenthe_piece,
    user: *mut c_void,
) -> i32 {
    guarded(|| {
        // SAFETY: a live session that no other thread uses, a C string, settings or null.
        let (session, prompt, given) = unsafe {
            let prompt = text(prompt, "prompt")?;
            (unique(session, "session")?, prompt, sampling.as_ref())
        };
        let piece = piece.ok_or_else(|| usage("piece: wanted a function, found a null pointer"))?;
        let mut options = Generate::default();
        if let Some(given) = given {
            if given.max_tokens > 0 {
                options.max_tokens = given.max_tokens;
            }
            options.sampling = Sampling {
                temp: given.temp,
                seed: given.seed,
                ..Sampling::default()
            };
        }
        let mut each = |p: Piece<'_>| {
            let text = CString::new(p.text.replace('\0', "\u{fffd}")).unwrap_or_default();
            piece(user, text.as_ptr(), p.logprob)
        };
        session.0.generate(prompt, &options, &mut each)?;
        Ok(())
    })
}

/// Log-probability of `answer` (its end included) after the user's message `prompt`, under the
/// patches that are active when the call begins; `n_tokens` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nepenthe_score(
    session: *mut nepenthe_session,
    prompt: *const c_char,
    answer: *const c_char,
    logprob: *mut f64,
    n_tokens: *mut usize,
) -> i32 {
    guarded(|| {
        // SAFETY: a live session that no other thread uses, C strings, places to write to.
        let (session, prompt, answer, logprob, n_tokens) = unsafe {
            (
                unique(session, "session")?,
                text(prompt, "prompt")?,
                text(answer, "answer")?,
                unique(logprob, "logprob")?,
                n_tokens.as_mut(),
            )
        };
        let score = session.0.score(prompt, answer, &mut |_| true)?;
        *logprob = score.logprob();
        if let Some(n) = n_tokens {
            *n = score.tokens.len();
        }
        Ok(())
    })
}

/// What the last call of this thread that failed failed with: one sentence, valid until the next
/// failure on this thread; empty before the first.
#[unsafe(no_mangle)]
pub extern "C" fn nepenthe_error() -> *const c_char {
    // The string stays in its place until the next failure replaces it.
    LAST.try_with(|last| last.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

fn characters(id: PatchId) -> [c_char; NEPENTHE_ID_SIZE] {
    let mut out = [0; NEPENTHE_ID_SIZE];
    for (to, from) in out.iter_mut().zip(id.to_string().bytes()) {
        *to = from as c_char;
    }
    out
}
