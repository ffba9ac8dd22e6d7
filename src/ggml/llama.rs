//! llama.cpp models, contexts and adapters.
//!
//! `llama-cpp-2` serves for the backend, the vocabulary and the samplers. Its context has
//! no eval callback and takes one adapter at a time, so contexts and adapters are wrapped
//! here over the raw names.

use super::eval_hook::{Hook, HookCell, abort, eval};
use super::log;
use ggml_sys::llama as c;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use thiserror::Error;

/// A token id.
pub type Token = i32;

/// Why llama.cpp could not do what it was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LlamaError {
    /// The model does not load.
    #[error("{path}: llama.cpp does not load this model ({reason})")]
    Load {
        /// The file.
        path: PathBuf,
        /// llama.cpp's last complaint.
        reason: String,
    },
    /// The adapter does not load on this model.
    #[error("{path}: llama.cpp does not load this adapter ({reason})")]
    Adapter {
        /// The file.
        path: PathBuf,
        /// llama.cpp's last complaint.
        reason: String,
    },
    /// No context with these settings.
    #[error("llama.cpp does not make a context of {n_ctx} tokens ({reason})")]
    Context {
        /// Context length.
        n_ctx: u32,
        /// llama.cpp's last complaint.
        reason: String,
    },
    /// A path with a NUL byte.
    #[error("{0}: the path holds a NUL byte")]
    Path(PathBuf),
    /// Adapters that cannot be set.
    #[error("llama.cpp does not apply the adapters ({0})")]
    Apply(String),
    /// A batch that did not decode.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Why a batch did not decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The KV cache has no room for the batch.
    #[error("the context has no room for this batch")]
    NoRoom,
    /// The hook asked to stop.
    #[error("decoding was stopped")]
    Aborted,
    /// llama.cpp failed.
    #[error("llama_decode failed with code {0}")]
    Failed(i32),
    /// The batch is empty, too long, or names tokens or sequences that do not exist.
    #[error("a batch holds {0}")]
    Invalid(&'static str),
}

/// How to load a model.
#[derive(Debug, Clone, Copy)]
pub struct ModelOptions {
    /// Layers to offload; negative: all.
    pub n_gpu_layers: i32,
    /// Let llama.cpp repack weights for the CPU: faster decoding, sums in another order.
    pub repack: bool,
    /// Only the vocabulary.
    pub vocab_only: bool,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            n_gpu_layers: 0,
            repack: true,
            vocab_only: false,
        }
    }
}

struct ModelInner {
    model: LlamaModel,
    path: PathBuf,
    /// llama.cpp lists a model's adapters in a set without a lock: loading and freeing one write
    /// it, making a context and decoding read it. Contexts of one model may live on many threads.
    adapters: RwLock<()>,
}

/// A loaded model; clones share it.
#[derive(Clone)]
pub struct Model(Arc<ModelInner>);

fn backend() {
    static BACKEND: OnceLock<Option<LlamaBackend>> = OnceLock::new();
    BACKEND.get_or_init(|| {
        // SAFETY: called before any thread of ours uses the C library; ggml reads the variable
        // when it aborts, to skip starting a debugger on itself.
        unsafe { std::env::set_var("GGML_NO_BACKTRACE", "1") };
        log::install();
        LlamaBackend::init().ok()
    });
}

fn c_path(path: &Path) -> Result<CString, LlamaError> {
    CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| LlamaError::Path(path.into()))
}

fn last_reason() -> String {
    let mut lines = log::last_messages();
    // The first error names the cause; what follows is "failed to load model".
    lines.retain(|l| !l.is_empty());
    lines
        .iter()
        .find(|l| l.contains("error"))
        .or(lines.last())
        .cloned()
        .unwrap_or_else(|| "no reason given".into())
}

impl Model {
    /// Load `path`. Validate the GGUF first: llama.cpp aborts on some malformed files.
    ///
    /// # Errors
    /// When llama.cpp refuses the file.
    pub fn load(path: &Path, options: ModelOptions) -> Result<Self, LlamaError> {
        backend();
        let c_str = c_path(path)?;
        log::last_messages();
        let mut no_device: [c::ggml_backend_dev_t; 1] = [std::ptr::null_mut()];
        // SAFETY: default parameters with plain fields changed; path and list outlive the call.
        let raw = unsafe {
            let mut p = c::llama_model_default_params();
            p.n_gpu_layers = options.n_gpu_layers;
            if options.n_gpu_layers == 0 {
                // Else a GPU takes part: in caches, and in products of long batches.
                p.devices = no_device.as_mut_ptr();
            }
            p.use_extra_bufts = options.repack;
            p.vocab_only = options.vocab_only;
            c::llama_model_load_from_file(c_str.as_ptr(), p)
        };
        let raw = NonNull::new(raw).ok_or_else(|| LlamaError::Load {
            path: path.into(),
            reason: last_reason(),
        })?;
        // SAFETY: LlamaModel is repr(transparent) over a non-null pointer it owns (pinned
        // version); transmute checks the size. Ownership passes to it.
        let model = unsafe { std::mem::transmute::<NonNull<c::llama_model>, LlamaModel>(raw) };
        Ok(Self(Arc::new(ModelInner {
            model,
            path: path.into(),
            adapters: RwLock::new(()),
        })))
    }

    /// While held, no adapter of this model is loaded or freed.
    fn adapters_stay(&self) -> RwLockReadGuard<'_, ()> {
        let lock = self.0.adapters.read();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    /// While held, nothing reads the list of this model's adapters.
    fn adapters_change(&self) -> RwLockWriteGuard<'_, ()> {
        let lock = self.0.adapters.write();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    fn raw(&self) -> *mut c::llama_model {
        // SAFETY: as in `load`; the pointer is only read here.
        unsafe { *std::ptr::from_ref(&self.0.model).cast::<*mut c::llama_model>() }
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Tokens in the vocabulary.
    pub fn n_vocab(&self) -> usize {
        usize::try_from(self.0.model.n_vocab()).unwrap_or(0)
    }

    /// Width of the residual stream.
    pub fn n_embd(&self) -> usize {
        usize::try_from(self.0.model.n_embd()).unwrap_or(0)
    }

    /// Context length the model was trained with.
    pub fn n_ctx_train(&self) -> u32 {
        self.0.model.n_ctx_train()
    }

    /// Sliding-window length, 0 when there is none.
    pub fn n_swa(&self) -> i32 {
        // SAFETY: live model.
        unsafe { c::llama_model_n_swa(self.raw()) }
    }

    /// Whether the model keeps recurrent state (not traceable).
    pub fn is_recurrent(&self) -> bool {
        self.0.model.is_recurrent() || self.0.model.is_hybrid()
    }

    /// Whether the model starts sequences with an encoder.
    pub fn has_encoder(&self) -> bool {
        // SAFETY: live model.
        unsafe { c::llama_model_has_encoder(self.raw()) }
    }

    /// Tokens of `text`. `special`: add the model's BOS; `parse`: control-token spellings
    /// in the text become control tokens.
    pub fn tokenize(&self, text: &str, special: bool, parse: bool) -> Vec<Token> {
        let tokens = self
            .0
            .model
            .vocab()
            .tokenize(text.as_bytes(), special, parse);
        tokens.into_iter().map(|t| t.0).collect()
    }

    /// The bytes of one token; control tokens are empty unless `special`.
    pub fn piece(&self, token: Token, special: bool) -> Vec<u8> {
        if token < 0 || token as usize >= self.n_vocab() {
            return Vec::new();
        }
        self.0
            .model
            .vocab()
            .token_to_piece(LlamaToken(token), special, None)
    }

    /// The text of `tokens`, without control tokens.
    pub fn detokenize(&self, tokens: &[Token]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&t| self.piece(t, false)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether generation stops at this token.
    pub fn is_end(&self, token: Token) -> bool {
        self.0.model.vocab().is_eog(LlamaToken(token))
    }

    /// Beginning-of-sequence token, if the vocabulary has one.
    pub fn bos(&self) -> Option<Token> {
        known(self.0.model.vocab().bos())
    }

    /// End-of-sequence token, if the vocabulary has one.
    pub fn eos(&self) -> Option<Token> {
        known(self.0.model.vocab().eos())
    }

    /// End-of-turn token, if the vocabulary has one.
    pub fn eot(&self) -> Option<Token> {
        known(self.0.model.vocab().eot())
    }
}

fn known(t: LlamaToken) -> Option<Token> {
    (t.0 >= 0).then_some(t.0)
}

/// A LoRA adapter loaded on one model.
pub struct Adapter {
    raw: NonNull<c::llama_adapter_lora>,
    model: Model,
}

impl Adapter {
    /// Load a LoRA GGUF. The caller has checked its tensors against the model
    /// (this version of llama.cpp does not check every dimension).
    ///
    /// # Errors
    /// When llama.cpp refuses the file.
    pub fn load(model: &Model, path: &Path) -> Result<Self, LlamaError> {
        let c_str = c_path(path)?;
        log::last_messages();
        let alone = model.adapters_change();
        // SAFETY: live model; the path outlives the call; the lock is held.
        let raw = unsafe { c::llama_adapter_lora_init(model.raw(), c_str.as_ptr()) };
        drop(alone);
        Ok(Self {
            raw: NonNull::new(raw).ok_or_else(|| LlamaError::Adapter {
                path: path.into(),
                reason: last_reason(),
            })?,
            model: model.clone(),
        })
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        let _alone = self.model.adapters_change();
        // SAFETY: owned; contexts that use it hold an Arc of it; the lock is held.
        unsafe { c::llama_adapter_lora_free(self.raw.as_ptr()) };
    }
}

// SAFETY: an adapter is immutable after loading.
unsafe impl Send for Adapter {}
// SAFETY: see above.
unsafe impl Sync for Adapter {}

/// Settings of a context.
pub struct ContextOptions {
    /// Tokens the KV cache holds, over all sequences.
    pub n_ctx: u32,
    /// Largest batch, computed in one piece.
    pub n_batch: u32,
    /// Sequences that can live side by side.
    pub n_seq_max: u32,
    /// One cache for all sequences, whatever their lengths, in which they may share cells. Else
    /// each has `n_ctx / n_seq_max` tokens to itself, rounded up to a multiple of 256, and what is
    /// computed for it does not depend on what the others hold.
    pub unified: bool,
    /// ggml threads.
    pub n_threads: usize,
    /// Fused attention. Off for traces and for parity with the training graph.
    pub flash_attn: bool,
    /// Keep K and V in f32 (the training graph's precision) instead of f16.
    pub kv_f32: bool,
    /// Called for every node of every computation.
    pub hook: Option<Box<dyn Hook>>,
}

impl Default for ContextOptions {
    fn default() -> Self {
        Self {
            n_ctx: 512,
            n_batch: 512,
            n_seq_max: 1,
            unified: true,
            n_threads: 1,
            flash_attn: false,
            kv_f32: false,
            hook: None,
        }
    }
}

/// A batch of tokens of one or several sequences.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    tokens: Vec<Token>,
    pos: Vec<i32>,
    /// How many of `seq` each token has.
    n_seq: Vec<i32>,
    seq: Vec<i32>,
    want: Vec<i8>,
}

impl Batch {
    /// Append a token of sequence `seq` at `pos`; `want`: its logits are read.
    pub fn push(&mut self, token: Token, pos: i32, seq: i32, want: bool) {
        self.push_shared(token, pos, &[seq], want);
    }

    /// Append a token that all of `seqs` hold at `pos`: it is computed once. A token's
    /// sequences must be among those of the tokens before it in each of them, so that they
    /// only ever part.
    pub fn push_shared(&mut self, token: Token, pos: i32, seqs: &[i32], want: bool) {
        self.tokens.push(token);
        self.pos.push(pos);
        self.n_seq.push(seqs.len() as i32);
        self.seq.extend_from_slice(seqs);
        self.want.push(i8::from(want));
    }

    /// Tokens in the batch.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether the batch is empty.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Forget the tokens.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.pos.clear();
        self.n_seq.clear();
        self.seq.clear();
        self.want.clear();
    }
}

/// A llama.cpp context: KV cache, active adapters, logits.
pub struct Context {
    raw: NonNull<c::llama_context>,
    model: Model,
    adapters: Vec<(Arc<Adapter>, f32)>,
    hook: Option<Box<HookCell>>,
    n_batch: usize,
    n_seq_max: usize,
    wanted: Vec<bool>,
}

impl Context {
    /// A context on `model`.
    ///
    /// # Errors
    /// When llama.cpp cannot make it (memory, mostly).
    pub fn new(model: &Model, options: ContextOptions) -> Result<Self, LlamaError> {
        log::last_messages();
        let mut hook = options
            .hook
            .map(|hook| Box::new(HookCell { hook, panic: None }));
        let threads = i32::try_from(options.n_threads.clamp(1, 512)).expect("clamped");
        let _list = model.adapters_stay();
        // SAFETY: default parameters with plain fields changed; the hook cell is boxed, so
        // its address holds as long as this struct, which outlives the C context.
        let raw = unsafe {
            let mut p = c::llama_context_default_params();
            p.n_ctx = options.n_ctx;
            p.n_batch = options.n_batch;
            p.n_ubatch = options.n_batch;
            p.n_seq_max = options.n_seq_max;
            p.n_threads = threads;
            p.n_threads_batch = threads;
            p.no_perf = true;
            p.kv_unified = options.unified;
            p.swa_full = false;
            p.flash_attn_type = if options.flash_attn {
                c::LLAMA_FLASH_ATTN_TYPE_AUTO
            } else {
                c::LLAMA_FLASH_ATTN_TYPE_DISABLED
            };
            if options.kv_f32 {
                p.type_k = c::GGML_TYPE_F32;
                p.type_v = c::GGML_TYPE_F32;
            }
            if let Some(cell) = hook.as_deref_mut() {
                let user = std::ptr::from_mut(cell).cast();
                p.cb_eval = Some(eval);
                p.cb_eval_user_data = user;
                p.abort_callback = Some(abort);
                p.abort_callback_data = user;
            }
            c::llama_init_from_model(model.raw(), p)
        };
        Ok(Self {
            raw: NonNull::new(raw).ok_or_else(|| LlamaError::Context {
                n_ctx: options.n_ctx,
                reason: last_reason(),
            })?,
            model: model.clone(),
            adapters: Vec::new(),
            hook,
            n_batch: options.n_batch as usize,
            n_seq_max: options.n_seq_max as usize,
            wanted: Vec::new(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Largest batch.
    pub fn n_batch(&self) -> usize {
        self.n_batch
    }

    /// Sequences that can live side by side.
    pub fn n_seq_max(&self) -> usize {
        self.n_seq_max
    }

    /// Tokens the KV cache holds, as llama.cpp rounded them.
    pub fn n_ctx(&self) -> usize {
        // SAFETY: live context.
        unsafe { c::llama_n_ctx(self.raw.as_ptr()) as usize }
    }

    /// Replace the set of adapters and forget the KV cache, which was computed with the
    /// old set.
    ///
    /// # Errors
    /// An adapter of another model, or llama.cpp's refusal.
    pub fn set_adapters(&mut self, adapters: &[(Arc<Adapter>, f32)]) -> Result<(), LlamaError> {
        self.switch_adapters(adapters)?;
        self.clear();
        Ok(())
    }

    /// Replace the set of adapters and keep the KV cache: the caller knows which sequences were
    /// computed under which set, and lets none go on under another.
    ///
    /// # Errors
    /// As [`set_adapters`](Self::set_adapters).
    pub fn switch_adapters(&mut self, adapters: &[(Arc<Adapter>, f32)]) -> Result<(), LlamaError> {
        if adapters
            .iter()
            .any(|(a, _)| !Arc::ptr_eq(&a.model.0, &self.model.0))
        {
            return Err(LlamaError::Apply(
                "an adapter was loaded on another model".into(),
            ));
        }
        let mut raws: Vec<_> = adapters.iter().map(|(a, _)| a.raw.as_ptr()).collect();
        let mut scales: Vec<f32> = adapters.iter().map(|&(_, s)| s).collect();
        // SAFETY: live context and adapters; both arrays have `raws.len()` entries.
        let code = unsafe {
            c::llama_set_adapters_lora(
                self.raw.as_ptr(),
                raws.as_mut_ptr(),
                raws.len(),
                scales.as_mut_ptr(),
            )
        };
        if code != 0 {
            return Err(LlamaError::Apply(format!("code {code}")));
        }
        self.adapters = adapters.to_vec();
        Ok(())
    }

    /// Forget every sequence.
    pub fn clear(&mut self) {
        // SAFETY: live context.
        unsafe { c::llama_memory_clear(c::llama_get_memory(self.raw.as_ptr()), false) };
    }

    /// Forget sequence `seq` from position `from` on.
    pub fn forget(&mut self, seq: i32, from: i32) {
        // SAFETY: live context.
        unsafe { c::llama_memory_seq_rm(c::llama_get_memory(self.raw.as_ptr()), seq, from, -1) };
    }

    /// Let sequence `to` share the cells of sequence `from`.
    pub fn share(&mut self, from: i32, to: i32) {
        // SAFETY: live context.
        unsafe { c::llama_memory_seq_cp(c::llama_get_memory(self.raw.as_ptr()), from, to, -1, -1) };
    }

    /// Compute a batch.
    ///
    /// # Errors
    /// An invalid batch, a full cache, a stop by the hook, or llama.cpp's failure. A panic
    /// of the hook is raised again here.
    pub fn decode(&mut self, batch: &mut Batch) -> Result<(), DecodeError> {
        let n = batch.len();
        if n == 0 || n > self.n_batch {
            return Err(DecodeError::Invalid(
                "no tokens, or more than the context takes",
            ));
        }
        let n_vocab = self.model.n_vocab();
        if batch.tokens.iter().any(|&t| t < 0 || t as usize >= n_vocab) {
            return Err(DecodeError::Invalid("a token outside the vocabulary"));
        }
        if batch
            .seq
            .iter()
            .any(|&s| s < 0 || s as usize >= self.n_seq_max)
            || batch.pos.iter().any(|&p| p < 0)
            || batch.n_seq.contains(&0)
        {
            return Err(DecodeError::Invalid("a sequence or position out of range"));
        }
        let mut rest = batch.seq.as_mut_slice();
        let mut seq_ptrs = Vec::with_capacity(n);
        for &n_seq in &batch.n_seq {
            let (own, after) = rest.split_at_mut(n_seq as usize);
            seq_ptrs.push(own.as_mut_ptr());
            rest = after;
        }
        let raw = c::llama_batch {
            n_tokens: n as i32,
            token: batch.tokens.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: batch.pos.as_mut_ptr(),
            n_seq_id: batch.n_seq.as_mut_ptr(),
            seq_id: seq_ptrs.as_mut_ptr(),
            logits: batch.want.as_mut_ptr(),
        };
        let list = self.model.adapters_stay();
        // SAFETY: every array has `n` entries, each pointer of `seq_ptrs` as many as `n_seq` says,
        // and all outlive the call; values are in range; no adapter comes or goes meanwhile.
        let code = unsafe { c::llama_decode(self.raw.as_ptr(), raw) };
        drop(list);
        if let Some(payload) = self.hook.as_mut().and_then(|h| h.panic.take()) {
            std::panic::resume_unwind(payload);
        }
        self.wanted = batch.want.iter().map(|&w| w != 0).collect();
        match code {
            0 => Ok(()),
            1 => Err(DecodeError::NoRoom),
            2 => Err(DecodeError::Aborted),
            code => Err(DecodeError::Failed(code)),
        }
    }

    /// Logits of token `i` of the last batch, `[n_vocab]`; none when they were not wanted.
    pub fn logits(&self, i: usize) -> Option<&[f32]> {
        if !*self.wanted.get(i)? {
            return None;
        }
        // SAFETY: live context; token `i` was decoded with logits; the row has n_vocab
        // floats and holds until the next decode, which needs `&mut self`.
        unsafe {
            let row = c::llama_get_logits_ith(self.raw.as_ptr(), i as i32);
            (!row.is_null()).then(|| std::slice::from_raw_parts(row, self.model.n_vocab()))
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: owned; hook and adapters are fields and outlive this call.
        unsafe { c::llama_free(self.raw.as_ptr()) };
    }
}

// SAFETY: a context may be used from any one thread at a time; decoding takes `&mut self`.
unsafe impl Send for Context {}
