//! Llama-shaped Q4_K_M files of random weights, and random patches for them.
//!
//! Shapes, type mix and order of tensors are those of the real models; vocabulary and chat
//! template are the embedded model's (1,536 tokens), so that llama.cpp tokenises and decodes. The
//! files are smaller than the real ones by what embedding and head lack in tokens. Weights have
//! standard deviation 1/√n_in, those that write to the residual stream 1/√(2·n_layer·n_in), norms
//! are 1: activations stay near 1 through all blocks. There is no `rope_freqs` tensor.

use super::blocks;
use nepenthe::gguf::{GgmlType, Gguf, GgufWriter, Metadata};
use nepenthe::graph::weights::Weights;
use nepenthe::patch::{Info, Patch, Update, base_of};
use nepenthe::rng::SplitMix64;
use std::path::Path;

type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Rank of the patches.
pub const RANK: usize = 16;
/// ‖ΔW‖/‖W‖ of the patches.
const RELATIVE_NORM: f32 = 0.01;
/// Blocks of 256 weights written at a time.
const PIECE: usize = 4096;
const MOSTLY_Q4_K_M: u32 = 15;

/// What sets a model's size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    pub name: &'static str,
    pub n_layer: usize,
    pub n_embd: usize,
    pub n_ff: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    pub rope_base: f32,
    /// The embedding is the head.
    pub tied: bool,
}

impl Shape {
    /// Llama 3.2 1B and 3B, Llama 2 7B, Llama 3 8B.
    pub const ALL: [Self; 4] = [
        Self::new("1b", 16, (2048, 8192), (32, 8), 5e5, true),
        Self::new("3b", 28, (3072, 8192), (24, 8), 5e5, true),
        Self::new("7b", 32, (4096, 11008), (32, 32), 1e4, false),
        Self::new("8b", 32, (4096, 14336), (32, 8), 5e5, false),
    ];

    const fn new(
        name: &'static str,
        n_layer: usize,
        (n_embd, n_ff): (usize, usize),
        (n_head, n_head_kv): (usize, usize),
        rope_base: f32,
        tied: bool,
    ) -> Self {
        Self {
            name,
            n_layer,
            n_embd,
            n_ff,
            n_head,
            n_head_kv,
            rope_base,
            tied,
        }
    }

    /// By name, cut to `n_blocks` blocks if given.
    pub fn find(name: &str, n_blocks: Option<usize>) -> Fallible<Self> {
        let found = Self::ALL.into_iter().find(|s| s.name == name);
        let mut shape = found.ok_or_else(|| {
            let names = Self::ALL.map(|s| s.name).join(", ");
            format!("--shape: wanted one of {names}, found {name}")
        })?;
        if let Some(n) = n_blocks {
            if !(1..=shape.n_layer).contains(&n) {
                let most = shape.n_layer;
                return Err(format!("--blocks: wanted 1 to {most}, found {n}").into());
            }
            shape.n_layer = n;
        }
        Ok(shape)
    }

    /// As llama.cpp's quantiser gives attn_v and ffn_down more bits (`use_more_bits` in
    /// `llama-quant.cpp`): the first and last eighth, and every third in between.
    fn more_bits(&self, block: usize) -> bool {
        let n = self.n_layer;
        block < n / 8 || block >= 7 * n / 8 || (block - n / 8) % 3 == 2
    }

    /// Matrices of one block: name, n_in, n_out, type, standard deviation.
    fn matrices(&self, block: usize) -> [(&'static str, usize, usize, GgmlType, f32); 7] {
        let (d, f) = (self.n_embd, self.n_ff);
        let kv = d / self.n_head * self.n_head_kv;
        let (q4, more) = match self.more_bits(block) {
            true => (GgmlType::Q4_K, GgmlType::Q6_K),
            false => (GgmlType::Q4_K, GgmlType::Q4_K),
        };
        let sd = |n_in: usize| (n_in as f32).sqrt().recip();
        let residual = (2.0 * self.n_layer as f32).sqrt().recip();
        [
            ("attn_q", d, d, q4, sd(d)),
            ("attn_k", d, kv, q4, sd(d)),
            ("attn_v", d, kv, more, sd(d)),
            ("attn_output", d, d, q4, residual * sd(d)),
            ("ffn_gate", d, f, q4, sd(d)),
            ("ffn_up", d, f, q4, sd(d)),
            ("ffn_down", f, d, more, residual * sd(f)),
        ]
    }

    fn metadata(&self, vocabulary: &Gguf) -> Metadata {
        let mut meta = Metadata::new();
        meta.set("general.architecture", "llama");
        meta.set("general.name", format!("synthetic {} shape", self.name));
        meta.set("general.file_type", MOSTLY_Q4_K_M);
        meta.set("general.quantization_version", 2u32);
        let mut number = |key: &str, v: usize| meta.set(&format!("llama.{key}"), v as u32);
        number("context_length", 4096);
        number("embedding_length", self.n_embd);
        number("block_count", self.n_layer);
        number("feed_forward_length", self.n_ff);
        number("attention.head_count", self.n_head);
        number("attention.head_count_kv", self.n_head_kv);
        number("rope.dimension_count", self.n_embd / self.n_head);
        meta.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
        meta.set("llama.rope.freq_base", self.rope_base);
        for (key, value) in vocabulary.metadata().iter() {
            if key.starts_with("tokenizer.") {
                meta.set(key, value.clone());
            }
        }
        meta
    }
}

/// Write a model with the vocabulary of `vocabulary`; its size in bytes.
pub fn write_model(path: &Path, shape: &Shape, vocabulary: &Gguf, seed: u64) -> Fallible<u64> {
    let tokens = vocabulary.require("token_embd.weight")?.ne[1];
    let d = shape.n_embd as u64;
    let mut file = GgufWriter::new(path, shape.metadata(vocabulary));
    let mut n = 0;
    let mut matrix = |file: &mut GgufWriter<'_>, name: &str, ne: [u64; 2], ty, sd| {
        n += 1;
        let mut rng = SplitMix64::stream(seed, n);
        file.tensor(name, &ne, ty, move |out| {
            let mut left = (ne[0] * ne[1] / 256) as usize;
            let mut bytes = Vec::new();
            while left > 0 {
                bytes.clear();
                let piece = left.min(PIECE);
                (0..piece).for_each(|_| blocks::push(&mut bytes, ty, sd, &mut rng));
                out.write_all(&bytes)?;
                left -= piece;
            }
            Ok(())
        })
        .map(|_| ())
    };
    let norm = |file: &mut GgufWriter<'_>, name: &str| {
        file.tensor(name, &[d], GgmlType::F32, move |out| {
            Ok(out.write_all(&1f32.to_le_bytes().repeat(d as usize))?)
        })
        .map(|_| ())
    };
    // A tied embedding is the head, and gets the head's type.
    let (embedding, sd) = match shape.tied {
        true => (GgmlType::Q6_K, (d as f32).sqrt().recip()),
        false => (GgmlType::Q4_K, 1.0),
    };
    matrix(&mut file, "token_embd.weight", [d, tokens], embedding, sd)?;
    for l in 0..shape.n_layer {
        norm(&mut file, &format!("blk.{l}.attn_norm.weight"))?;
        norm(&mut file, &format!("blk.{l}.ffn_norm.weight"))?;
        for (name, n_in, n_out, ty, sd) in shape.matrices(l) {
            let name = format!("blk.{l}.{name}.weight");
            matrix(&mut file, &name, [n_in as u64, n_out as u64], ty, sd)?;
        }
    }
    norm(&mut file, "output_norm.weight")?;
    if !shape.tied {
        let sd = (d as f32).sqrt().recip();
        matrix(&mut file, "output.weight", [d, tokens], GgmlType::Q6_K, sd)?;
    }
    Ok(file.save(true)?)
}

/// Write a random patch of rank [`RANK`] on every matrix of every block of `model` that has
/// `adapted` in its name.
pub fn write_patch(
    path: &Path,
    model: &Path,
    shape: &Shape,
    adapted: &str,
    seed: u64,
) -> Fallible<usize> {
    let mut updates = Vec::new();
    for l in 0..shape.n_layer {
        for (name, n_in, n_out, _, sd) in shape.matrices(l) {
            if !name.contains(adapted) {
                continue;
            }
            let mut rng = SplitMix64::stream(seed, 1 << 32 | updates.len() as u64);
            // ‖B·A‖² is about rank·n_in·n_out·a²·b².
            let a = (n_in as f32).sqrt().recip();
            let b = RELATIVE_NORM * sd / (a * (RANK as f32).sqrt());
            updates.push(Update {
                tensor: format!("blk.{l}.{name}.weight"),
                n_in,
                n_out,
                rank: RANK,
                scale: 1.0,
                lora_a: (0..n_in * RANK).map(|_| a * rng.normal()).collect(),
                lora_b: (0..n_out * RANK).map(|_| b * rng.normal()).collect(),
            });
        }
    }
    let n = updates.len();
    let weights = Weights::open(model)?;
    let info = Info::new(base_of(&weights)?, "random", serde_json::Value::Null, seed);
    Patch::new(weights.arch()?, info, updates).save(path, true)?;
    Ok(n)
}
