//! Safe wrappers over ggml and llama.cpp: the only place where this crate calls C.
//!
//! One owner per C handle; what a handle borrows is kept alive by it. C asserts end the
//! process, so every constructor here checks type, shape, contiguity and room first and
//! answers with an error instead.
#![allow(unsafe_code)]

mod activations;
mod arithmetic;
mod attend;
mod backend;
mod buffer;
mod ctx;
mod custom;
mod decode;
mod eval_hook;
mod experts;
mod gelu;
mod graphs;
mod lanes;
mod llama;
mod log;
mod pages;
mod plan;
mod product;
mod quant;
mod shapes;
mod turned;

pub use attend::{Attended, AttendedBack};
pub use backend::{Backend, Offload, Side, Split, gpu_name};
pub use buffer::Buffer;
pub use ctx::{Ctx, Graph, OpError, Tensor};
pub use eval_hook::{Hook, NodeView, Recorded, RecordedTensor};
pub use gelu::{GELU_CUBIC, GELU_SCALE};
pub use llama::{
    Adapter, Batch, Context, ContextOptions, DecodeError, LlamaError, Model, ModelOptions, Token,
};
pub use log::{last_messages, set_verbose};
pub use pages::release_file;
pub use plan::Plan;
pub use product::{FAST_IS_BF16, Precision, Way};
pub use quant::{QuantError, can_encode, dequantize, quantize};

/// ggml's numeric names of types, ops and flags.
pub mod sys {
    pub use ggml_sys::{
        GGML_GLU_OP_GEGLU, GGML_GLU_OP_GEGLU_QUICK, GGML_GLU_OP_REGLU, GGML_GLU_OP_SWIGLU,
        GGML_GLU_OP_SWIGLU_CLAMP, GGML_GLU_OP_SWIGLU_OAI, GGML_OP_ADD, GGML_OP_ADD_ID,
        GGML_OP_ARGSORT, GGML_OP_CLAMP, GGML_OP_CONCAT, GGML_OP_CONT, GGML_OP_CPY, GGML_OP_DIV,
        GGML_OP_FILL, GGML_OP_GET_ROWS, GGML_OP_GLU, GGML_OP_MEAN, GGML_OP_MUL, GGML_OP_MUL_MAT,
        GGML_OP_MUL_MAT_ID, GGML_OP_NONE, GGML_OP_NORM, GGML_OP_PERMUTE, GGML_OP_REPEAT,
        GGML_OP_RESHAPE, GGML_OP_RMS_NORM, GGML_OP_ROPE, GGML_OP_SCALE, GGML_OP_SET_ROWS,
        GGML_OP_SOFT_MAX, GGML_OP_SQR, GGML_OP_SQRT, GGML_OP_SUB, GGML_OP_SUM_ROWS,
        GGML_OP_TRANSPOSE, GGML_OP_UNARY, GGML_OP_VIEW, GGML_TENSOR_FLAG_INPUT, GGML_TYPE_BF16,
        GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_I32, GGML_TYPE_I64, GGML_UNARY_OP_ABS,
        GGML_UNARY_OP_EXP, GGML_UNARY_OP_GELU, GGML_UNARY_OP_GELU_QUICK, GGML_UNARY_OP_RELU,
        GGML_UNARY_OP_SIGMOID, GGML_UNARY_OP_SILU, GGML_UNARY_OP_SOFTPLUS, GGML_UNARY_OP_STEP,
        GGML_UNARY_OP_TANH, GGML_UNARY_OP_XIELU,
    };
}

/// Have blocks of a megabyte and more given back to the system as soon as they are free. glibc
/// moves that border up to 32 MB with every larger block it sees, and what capture leaves behind
/// then stays resident through training: 140 MB of 1,580 on Gemma-3-270M. For programs, at their
/// start.
pub fn return_large_blocks() {
    // SAFETY: sets a number in the allocator.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}

/// Give free memory between used blocks back to the system. Adapters and the graphs that decode
/// with them come and go in blocks of many sizes, and what lies between them otherwise stays
/// resident: 15 KB a round of applying and revoking two small patches.
pub(crate) fn return_free_memory() {
    // SAFETY: looks at free blocks alone.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// End the process now, without the C and C++ libraries' own tidying up: where another thread
/// computes meanwhile, that takes away what it works on, and the process dies of a signal instead.
pub fn exit_at_once(code: i32) -> ! {
    // SAFETY: does not return, and touches no memory.
    unsafe { libc::_exit(code) }
}

/// The name of a ggml op number, as ggml spells it.
pub fn op_name(op: u32) -> String {
    if op >= ggml_sys::llama::GGML_OP_COUNT {
        return format!("op {op}");
    }
    // SAFETY: the number is below GGML_OP_COUNT, so ggml returns a static string.
    let name = unsafe { std::ffi::CStr::from_ptr(ggml_sys::ggml_op_name(op)) };
    name.to_string_lossy().into_owned()
}

/// The version of the ggml this program was built with.
pub fn version() -> String {
    // SAFETY: returns a static string.
    let v = unsafe { std::ffi::CStr::from_ptr(ggml_sys::ggml_version()) };
    v.to_string_lossy().into_owned()
}
