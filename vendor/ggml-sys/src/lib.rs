//! The ggml names nepenthe uses, as `llama-cpp-sys-2` builds them.
//!
//! The `ggml-sys` crate on the public registry dates from 2023 and predates GGUF,
//! so this one re-exports the pinned build's own bindings: raw names, the contract
//! of each group, and asserts on the layouts that `src/ggml/` reads fields of.
//! There is no logic here.
//!
//! Every ggml constructor asserts its preconditions in C and ends the process when
//! one fails. Callers check type, shape and contiguity first.
#![no_std]
#![allow(clippy::missing_safety_doc)]

/// Everything `llama-cpp-sys-2` binds, for the llama.cpp side of the house.
pub use llama_cpp_sys_2 as llama;

/// Plain data: a tensor's header. `ne` counts elements, `nb` strides bytes, index 0 is
/// the fastest dimension.
pub use llama_cpp_sys_2::{
    ggml_backend_buffer_t, ggml_backend_buffer_type_t, ggml_backend_dev_t, ggml_backend_sched_t,
    ggml_backend_t, ggml_cgraph, ggml_context, ggml_gallocr_t, ggml_init_params, ggml_tensor,
    ggml_threadpool_params, ggml_threadpool_t, ggml_type,
};

/// Contexts hold tensor headers. With `no_alloc` the data lives in backend buffers.
pub use llama_cpp_sys_2::{
    ggml_free, ggml_get_mem_size, ggml_init, ggml_nbytes, ggml_new_tensor, ggml_set_input,
    ggml_set_name, ggml_set_output, ggml_set_param, ggml_tensor_overhead, ggml_used_mem,
};

/// Node constructors. Naming trap: `ggml_mul_mat(a, b)` is `b·aᵀ` in row-major terms:
/// `a [k, m]`, `b [k, n]` give `[m, n]`.
pub use llama_cpp_sys_2::{
    ggml_acc, ggml_add, ggml_add_id, ggml_argsort, ggml_cast, ggml_clamp, ggml_concat, ggml_cont,
    ggml_cont_4d, ggml_div, ggml_fill, ggml_get_rows, ggml_get_rows_back, ggml_glu, ggml_glu_split,
    ggml_log, ggml_mean, ggml_mul, ggml_mul_mat, ggml_mul_mat_id, ggml_norm, ggml_out_prod,
    ggml_permute, ggml_repeat, ggml_repeat_4d, ggml_repeat_back, ggml_reshape_4d, ggml_rms_norm,
    ggml_rms_norm_back, ggml_rope_ext, ggml_rope_ext_back, ggml_rope_multi, ggml_rope_multi_back,
    ggml_scale, ggml_scale_bias, ggml_set_rows, ggml_silu_back, ggml_soft_max_add_sinks,
    ggml_soft_max_ext, ggml_soft_max_ext_back, ggml_sqr, ggml_sqrt, ggml_sub, ggml_sum_rows,
    ggml_transpose, ggml_unary, ggml_view_4d,
};

/// Graphs, the graph allocator and the CPU backend. `ggml_gallocr` reuses a tensor's
/// memory after its last reader unless the tensor is flagged output.
pub use llama_cpp_sys_2::{
    ggml_backend_alloc_ctx_tensors, ggml_backend_buffer_clear, ggml_backend_buffer_free,
    ggml_backend_buffer_get_base, ggml_backend_buffer_get_size, ggml_backend_cpu_buffer_from_ptr,
    ggml_backend_cpu_init, ggml_backend_cpu_set_n_threads, ggml_backend_cpu_set_threadpool,
    ggml_backend_free, ggml_backend_get_default_buffer_type, ggml_backend_graph_compute,
    ggml_backend_tensor_alloc, ggml_backend_tensor_get, ggml_backend_tensor_set,
    ggml_build_forward_expand, ggml_gallocr_alloc_graph, ggml_gallocr_free,
    ggml_gallocr_get_buffer_size, ggml_gallocr_new, ggml_gallocr_reserve, ggml_graph_add_node,
    ggml_graph_n_nodes, ggml_graph_node, ggml_graph_overhead_custom, ggml_new_graph_custom,
    ggml_threadpool_free, ggml_threadpool_new, ggml_threadpool_params_default,
};

/// GPUs. The scheduler gives each node to the first backend that takes it and copies between
/// them; it ends the process when a tensor that already has memory lies where its op is not
/// supported. Buffers of a device have addresses of their own: data goes through
/// `ggml_backend_tensor_set` and `_get`.
pub use llama_cpp_sys_2::{
    GGML_BACKEND_BUFFER_USAGE_WEIGHTS, GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU,
    ggml_backend_buffer_is_host, ggml_backend_buffer_set_usage, ggml_backend_buft_get_alignment,
    ggml_backend_buft_get_alloc_size, ggml_backend_dev_count, ggml_backend_dev_description,
    ggml_backend_dev_get, ggml_backend_dev_init, ggml_backend_dev_name, ggml_backend_dev_type,
    ggml_backend_sched_alloc_graph, ggml_backend_sched_free, ggml_backend_sched_get_buffer_size,
    ggml_backend_sched_graph_compute, ggml_backend_sched_new, ggml_backend_sched_reserve,
    ggml_backend_sched_set_tensor_backend, ggml_backend_supports_op,
};

/// Types, their blocks, and the reference encoders. `ggml_quantize_chunk` needs rows that
/// are a multiple of the block; `to_float` of the traits decodes one run of blocks.
pub use llama_cpp_sys_2::{
    ggml_blck_size, ggml_get_type_traits, ggml_op_name, ggml_quantize_chunk,
    ggml_quantize_requires_imatrix, ggml_row_size, ggml_type_name, ggml_type_size, ggml_version,
};

/// Numbers of the enums, with ggml's own names.
pub use llama_cpp_sys_2::{
    GGML_GLU_OP_GEGLU, GGML_GLU_OP_GEGLU_QUICK, GGML_GLU_OP_REGLU, GGML_GLU_OP_SWIGLU,
    GGML_GLU_OP_SWIGLU_CLAMP, GGML_GLU_OP_SWIGLU_OAI, GGML_OP_ADD, GGML_OP_ADD_ID, GGML_OP_ARGSORT,
    GGML_OP_CLAMP, GGML_OP_CONCAT, GGML_OP_CONT, GGML_OP_CPY, GGML_OP_DIV, GGML_OP_FILL,
    GGML_OP_GET_ROWS, GGML_OP_GLU, GGML_OP_MEAN, GGML_OP_MUL, GGML_OP_MUL_MAT, GGML_OP_MUL_MAT_ID,
    GGML_OP_NONE, GGML_OP_NORM, GGML_OP_PERMUTE, GGML_OP_REPEAT, GGML_OP_RESHAPE, GGML_OP_RMS_NORM,
    GGML_OP_ROPE, GGML_OP_SCALE, GGML_OP_SET_ROWS, GGML_OP_SOFT_MAX, GGML_OP_SQR, GGML_OP_SQRT,
    GGML_OP_SUB, GGML_OP_SUM_ROWS, GGML_OP_TRANSPOSE, GGML_OP_UNARY, GGML_OP_VIEW,
    GGML_STATUS_SUCCESS, GGML_TENSOR_FLAG_INPUT, GGML_TYPE_BF16, GGML_TYPE_F16, GGML_TYPE_F32,
    GGML_TYPE_I32, GGML_TYPE_I64, GGML_UNARY_OP_ABS, GGML_UNARY_OP_EXP, GGML_UNARY_OP_GELU,
    GGML_UNARY_OP_GELU_QUICK, GGML_UNARY_OP_RELU, GGML_UNARY_OP_SIGMOID, GGML_UNARY_OP_SILU,
    GGML_UNARY_OP_SOFTPLUS, GGML_UNARY_OP_STEP, GGML_UNARY_OP_TANH, GGML_UNARY_OP_XIELU,
};

// The recorder copies these fields out of llama.cpp's live graph: a layout that moved
// must fail to compile, not to run.
const _: () = {
    assert!(core::mem::size_of::<ggml_tensor>() == 336);
    assert!(core::mem::offset_of!(ggml_tensor, ne) == 16);
    assert!(core::mem::offset_of!(ggml_tensor, nb) == 48);
    assert!(core::mem::offset_of!(ggml_tensor, op) == 80);
    assert!(core::mem::offset_of!(ggml_tensor, op_params) == 84);
    assert!(core::mem::offset_of!(ggml_tensor, flags) == 148);
    assert!(core::mem::offset_of!(ggml_tensor, src) == 152);
    assert!(core::mem::offset_of!(ggml_tensor, view_src) == 232);
    assert!(core::mem::offset_of!(ggml_tensor, view_offs) == 240);
    assert!(core::mem::offset_of!(ggml_tensor, data) == 248);
    assert!(core::mem::offset_of!(ggml_tensor, name) == 256);
};
