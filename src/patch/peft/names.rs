//! Hugging Face module names to GGUF tensor names.

/// How a weight's rows stand in the GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// As in the Hugging Face model.
    Same,
    /// Of q and k, reordered within each head.
    Interleaved,
}

/// What a module is in a GGUF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    pub tensor: String,
    pub rows: Rows,
}

/// Architectures whose weights are those of the Hugging Face model one to one but for names and
/// the rows of q and k; whether those are reordered.
const ARCHITECTURES: [(&str, bool); 11] = [
    ("llama", true),
    ("granite", true),
    ("smollm3", true),
    ("mistral3", true),
    ("qwen2", false),
    ("qwen3", false),
    ("gemma", false),
    ("gemma2", false),
    ("gemma3", false),
    ("phi3", false),
    ("olmo2", false),
];

/// Module in a block, tensor in a block.
const MODULES: [(&str, &str); 9] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    // phi3 keeps these fused, in the order of the Hugging Face model.
    ("self_attn.qkv_proj", "attn_qkv"),
    ("mlp.gate_up_proj", "ffn_up"),
];

/// What `name` (without `base_model.model.`) is in a model of `arch`, if that is known.
pub(super) fn module(arch: &str, name: &str) -> Option<Module> {
    let (_, reordered) = ARCHITECTURES.iter().find(|(a, _)| *a == arch)?;
    if name == "lm_head" {
        return Some(Module {
            tensor: "output.weight".into(),
            rows: Rows::Same,
        });
    }
    // The language model of a vision model is one level deeper.
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let name = name.strip_prefix("model.").unwrap_or(name);
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let (layer, module) = name.strip_prefix("layers.")?.split_once('.')?;
    // No sign, no leading zero: one spelling for each block.
    let block: u32 = layer
        .parse()
        .ok()
        .filter(|n: &u32| n.to_string() == layer)?;
    let fused = matches!(module, "self_attn.qkv_proj" | "mlp.gate_up_proj");
    if fused != (arch == "phi3") && (fused || matches!(module, "mlp.gate_proj" | "mlp.up_proj")) {
        return None;
    }
    let (_, tensor) = MODULES.iter().find(|(m, _)| *m == module)?;
    let rows = match *tensor {
        "attn_q" | "attn_k" if *reordered => Rows::Interleaved,
        _ => Rows::Same,
    };
    Some(Module {
        tensor: format!("blk.{block}.{tensor}.weight"),
        rows,
    })
}
