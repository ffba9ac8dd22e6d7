//! Models of random weights for any architecture, as GGUF files.
//!
//! llama.cpp itself says which tensors an architecture has: given nothing but hyper-parameters it
//! makes a model and shows every tensor it wants (`llama_model_init_from_user`). Names and shapes
//! are taken down there, and a file with random values for them is written with our own writer.

use super::table::{Arch, Key};
use llama_cpp_sys_2 as c;
use nepenthe::ggml::quantize;
use nepenthe::gguf::{GgmlType, Gguf, GgufWriter, Metadata};
use nepenthe::rng::SplitMix64;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_void};
use std::path::Path;

/// Which file of an architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// f32, 64 wide.
    Exact,
    /// Q4_K and Q6_K, 256 wide: a row of a K-quant has at least one block of 256.
    Quantised,
}

impl Form {
    /// Widths and numbers of heads are multiplied by this; the size of a head stays.
    fn times(self) -> u32 {
        match self {
            Self::Exact => 1,
            Self::Quantised => 4,
        }
    }
}

/// Keys that grow with the model's width.
const WIDTHS: [&str; 8] = [
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_chunk_feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "embedding_length_per_layer_input",
];

/// What every architecture is given; it reads the keys it knows.
const COMMON: [(&str, Key); 9] = [
    ("context_length", Key::U(2048)),
    ("embedding_length", Key::U(64)),
    ("block_count", Key::U(2)),
    ("feed_forward_length", Key::U(128)),
    ("attention.head_count", Key::U(4)),
    ("attention.head_count_kv", Key::U(2)),
    ("attention.layer_norm_epsilon", Key::F(1e-5)),
    ("attention.layer_norm_rms_epsilon", Key::F(1e-5)),
    ("attention.sliding_window", Key::U(24)),
];

/// What every architecture with experts is given besides.
pub const EXPERTS: [(&str, Key); 10] = [
    ("block_count", Key::U(3)),
    ("expert_count", Key::U(4)),
    ("expert_used_count", Key::U(2)),
    ("expert_feed_forward_length", Key::U(64)),
    ("expert_shared_count", Key::U(1)),
    ("expert_shared_feed_forward_length", Key::U(64)),
    ("expert_weights_norm", Key::B(true)),
    ("expert_weights_scale", Key::F(1.5)),
    ("interleave_moe_layer_step", Key::U(1)),
    ("leading_dense_block_count", Key::U(1)),
];

fn metadata(arch: &Arch, form: Form, vocabulary: &Gguf) -> Metadata {
    let mut meta = Metadata::new();
    meta.set("general.architecture", arch.name);
    let experts: &[(&str, Key)] = if arch.experts { &EXPERTS } else { &[] };
    for &(key, value) in COMMON.iter().chain(experts).chain(arch.keys) {
        let wide = WIDTHS.contains(&key);
        // xIELU's keys have no architecture's name before them.
        let prefix = if key.starts_with("xielu") {
            String::new()
        } else {
            format!("{}.", arch.name)
        };
        let name = format!("{prefix}{key}");
        let times = if wide { form.times() } else { 1 };
        match value {
            Key::U(v) => meta.set(&name, v * times),
            Key::Same(v) => meta.set(&name, v),
            Key::F(v) => meta.set(&name, v),
            Key::B(v) => meta.set(&name, v),
            Key::Us(v) => meta.set(&name, v.iter().map(|v| v * times).collect::<Vec<_>>()),
            Key::Fs(v) => meta.set(&name, v.to_vec()),
            Key::Bs(v) => meta.set(&name, v.to_vec()),
            Key::No => meta.remove(&name),
        };
    }
    for (key, value) in vocabulary.metadata().iter() {
        if key.starts_with("tokenizer.") {
            meta.set(key, value.clone());
        }
    }
    meta
}

/// A tensor that llama.cpp asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    name: String,
    ne: Vec<u64>,
}

unsafe extern "C" fn take_down(tensor: *mut c::ggml_tensor, list: *mut c_void) {
    // SAFETY: llama.cpp hands over a live tensor and the pointer it was given.
    let (tensor, list) = unsafe { (&*tensor, &mut *list.cast::<Vec<Wanted>>()) };
    // SAFETY: ggml NUL-terminates names.
    let name = unsafe { CStr::from_ptr(tensor.name.as_ptr()) };
    let n_dims = (1..4)
        .rev()
        .find(|&d| tensor.ne[d] > 1)
        .map_or(1, |d| d + 1);
    list.push(Wanted {
        name: name.to_string_lossy().into_owned(),
        ne: tensor.ne[..n_dims].iter().map(|&n| n as u64).collect(),
    });
}

/// The tensors of a model with these hyper-parameters, in llama.cpp's order; none if it does not
/// make one.
fn wanted(meta: &Metadata, dir: &Path) -> Option<Vec<Wanted>> {
    let path = dir.join("metadata.gguf");
    GgufWriter::new(&path, meta.clone())
        .save(true)
        .expect("written");
    let c_path = CString::new(path.to_str().expect("a plain path")).expect("no NUL");
    let mut list: Vec<Wanted> = Vec::new();
    // SAFETY: a good file, default parameters, and a list that outlives the calls.
    unsafe {
        let no_data = c::gguf_init_params {
            no_alloc: true,
            ctx: std::ptr::null_mut(),
        };
        let gguf = c::gguf_init_from_file(c_path.as_ptr(), no_data);
        assert!(!gguf.is_null(), "llama.cpp reads the metadata");
        let params = c::llama_model_default_params();
        let user = std::ptr::from_mut(&mut list).cast();
        let model = c::llama_model_init_from_user(gguf, Some(take_down), user, params);
        c::gguf_free(gguf);
        if model.is_null() {
            return None;
        }
        c::llama_model_free(model);
    }
    // Tied and repeated tensors are shown once for every use.
    let mut seen = BTreeSet::new();
    list.retain(|t| seen.insert(t.name.clone()));
    Some(list)
}

/// As files of this architecture have them: scales only where asked for, and one matrix for
/// queries, keys and values where converters write one.
fn as_in_files(arch: &Arch, all: Vec<Wanted>) -> Vec<Wanted> {
    let router = |n: &str| n.contains("ffn_gate_inp");
    let scale = |n: &str| !router(n) && (n.ends_with(".scale") || n.ends_with(".input_scale"));
    let mut out: Vec<Wanted> = Vec::new();
    for t in all {
        if scale(&t.name) && (!arch.scales || t.name.ends_with(".input_scale")) {
            continue;
        }
        let part = ["attn_q.", "attn_k.", "attn_v."]
            .iter()
            .find(|p| t.name.contains(*p));
        let Some(part) = part.filter(|_| arch.fused) else {
            out.push(t);
            continue;
        };
        let name = t.name.replace(part, "attn_qkv.");
        match out.iter_mut().find(|o| o.name == name) {
            Some(whole) => *whole.ne.last_mut().expect("a shape") += t.ne.last().expect("a shape"),
            None => out.push(Wanted { name, ne: t.ne }),
        }
    }
    out
}

/// Standard normal values scaled so that activations keep their size, norms and divisors near 1.
fn values(name: &str, ne: &[u64], rng: &mut SplitMix64) -> Vec<f32> {
    let n = ne.iter().product::<u64>() as usize;
    let near_one = name.contains("norm") && name.ends_with(".weight")
        || name.contains("rope_f")
        || name.ends_with("scale");
    (0..n)
        .map(|_| match near_one {
            true => 1.0 + 0.2 * rng.uniform(),
            false if ne.len() == 1 => 0.2 * rng.normal(),
            false if name.contains("embd") => 0.6 * rng.normal(),
            false => rng.normal() / (ne[0] as f32).sqrt(),
        })
        .collect()
}

fn type_of(name: &str, ne: &[u64], form: Form) -> GgmlType {
    let matrix = name.ends_with(".weight") && !name.contains("norm") && ne.len() >= 2;
    let kept = name.contains("position_embd") || name.contains("ffn_gate_inp");
    if form == Form::Exact || !matrix || kept {
        return GgmlType::F32;
    }
    let more = ["attn_v.", "ffn_down.", "output.weight"]
        .iter()
        .any(|m| name.contains(m));
    match ne[0] {
        n if n % 256 == 0 && more => GgmlType::Q6_K,
        n if n % 256 == 0 => GgmlType::Q4_K,
        n if n % 32 == 0 => GgmlType::Q8_0,
        _ => GgmlType::F32,
    }
}

/// Write a model of `arch` to `path`; false if llama.cpp makes no such model.
pub fn write(arch: &Arch, form: Form, vocabulary: &Path, path: &Path) -> bool {
    let vocabulary = Gguf::open(vocabulary).expect("a good model");
    let meta = metadata(arch, form, &vocabulary);
    let dir = path.parent().expect("a file in a directory");
    let Some(list) = wanted(&meta, dir) else {
        return false;
    };
    let tensors: Vec<_> = as_in_files(arch, list)
        .into_iter()
        .enumerate()
        .map(|(i, t)| {
            let mut rng = SplitMix64::stream(7, i as u64);
            let ty = type_of(&t.name, &t.ne, form);
            let values = values(&t.name, &t.ne, &mut rng);
            let bytes = quantize(ty.id(), &values, t.ne[0] as usize, None).expect("encodable");
            (t, ty, bytes)
        })
        .collect();
    let mut file = GgufWriter::new(path, meta);
    for (t, ty, bytes) in &tensors {
        file.tensor_from_bytes(&t.name, &t.ne, *ty, bytes)
            .expect("a good tensor");
    }
    file.save(true).expect("room on the disk");
    true
}
