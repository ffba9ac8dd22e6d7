//! The architectures, with the hyper-parameters in which each differs from the common ones.

/// A hyper-parameter.
#[derive(Debug, Clone, Copy)]
pub enum Key {
    /// u32.
    U(u32),
    /// f32.
    F(f32),
    /// bool.
    B(bool),
    /// u32, one for each layer or part.
    Us(&'static [u32]),
    /// f32, one for each layer.
    Fs(&'static [f32]),
    /// bool, one for each layer.
    Bs(&'static [bool]),
    /// u32, whatever the model's width.
    Same(u32),
    /// Not given, although common.
    No,
}

/// An architecture of llama.cpp.
#[derive(Debug, Clone, Copy)]
pub struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    /// Hyper-parameters, over or beside the common ones, without the architecture's prefix.
    pub keys: &'static [(&'static str, Key)],
    /// Converters write one matrix for queries, keys and values.
    pub fused: bool,
    /// With the `.scale` that 4-bit floating-point files have for each matrix.
    pub scales: bool,
    /// With experts: [`super::model::EXPERTS`] as well.
    pub experts: bool,
}

impl Arch {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            keys: &[],
            fused: false,
            scales: false,
            experts: false,
        }
    }

    const fn keys(mut self, keys: &'static [(&'static str, Key)]) -> Self {
        self.keys = keys;
        self
    }

    const fn fused(mut self) -> Self {
        self.fused = true;
        self
    }

    const fn moe(name: &'static str) -> Self {
        let mut arch = Self::new(name);
        arch.experts = true;
        arch
    }

    const fn scales(mut self) -> Self {
        self.scales = true;
        self
    }
}

use Key::{B, Bs, F, Fs, No, Same, U, Us};

/// Calls `$with! { name; ... }` with an identifier for each entry of [`ALL`], in order.
macro_rules! architectures {
    ($($id:ident = $arch:expr;)*) => {
        $(#[allow(non_upper_case_globals, reason = "named as its tests")]
        pub const $id: Arch = $arch;)*
        /// Every architecture, in the order of the table.
        pub const ALL: &[Arch] = &[$($id),*];
        macro_rules! for_each_architecture {
            ($with:ident) => { $($with! { $id })* };
        }
        pub(crate) use for_each_architecture;
    };
}

const SECTIONS: (&str, Key) = ("rope.dimension_sections", Us(&[2, 3, 3, 0]));

/// Keys and values through one narrow matrix, read from the cache as they are.
const MLA: [(&str, Key); 9] = [
    ("attention.q_lora_rank", U(32)),
    ("attention.head_count_kv", Same(1)),
    ("attention.kv_lora_rank", U(32)),
    ("attention.key_length", U(40)),
    ("attention.value_length", U(32)),
    ("attention.key_length_mla", U(24)),
    ("attention.value_length_mla", U(16)),
    ("rope.dimension_count", U(8)),
    ("expert_gating_func", U(2)),
];

architectures! {
    apertus = Arch::new("apertus").keys(&[
        ("xielu.alpha_n", Fs(&[0.8, 0.7])), ("xielu.alpha_p", Fs(&[0.9, 1.1])),
        ("xielu.beta", Fs(&[0.5, 0.4])), ("xielu.eps", Fs(&[-1e-6, -1e-6]))]);
    arcee = Arch::new("arcee");
    baichuan = Arch::new("baichuan");
    bitnet = Arch::new("bitnet");
    bloom = Arch::new("bloom").keys(&[("attention.head_count_kv", No)]);
    chatglm = Arch::new("chatglm").fused();
    codeshell = Arch::new("codeshell").fused();
    cogvlm = Arch::new("cogvlm").keys(&[("attention.head_count_kv", No)]);
    cohere2 = Arch::new("cohere2").keys(&[("block_count", U(4)), ("logit_scale", F(0.25))]);
    command_r = Arch::new("command-r").keys(&[("logit_scale", F(0.25))]);
    deci = Arch::new("deci");
    ernie4_5 = Arch::new("ernie4_5");
    exaone = Arch::new("exaone");
    exaone4 = Arch::new("exaone4");
    falcon = Arch::new("falcon");
    gemma = Arch::new("gemma");
    gemma2 = Arch::new("gemma2").keys(&[("attn_logit_softcapping", F(50.0)), ("final_logit_softcapping", F(30.0))]);
    gemma3 = Arch::new("gemma3").keys(&[("block_count", U(6))]);
    gemma3n = Arch::new("gemma3n");
    gemma4 = Arch::new("gemma4").keys(&[("attention.sliding_window_pattern", Bs(&[true, false])), ("embedding_length_per_layer_input", U(32)), ("attention.key_length_swa", U(16)), ("attention.value_length_swa", U(16)), ("final_logit_softcapping", F(30.0))]);
    glm4 = Arch::new("glm4");
    gpt2 = Arch::new("gpt2").keys(&[("attention.head_count_kv", No)]);
    gptneox = Arch::new("gptneox").keys(&[("attention.head_count_kv", No), ("use_parallel_residual", B(true))]);
    granite = Arch::new("granite").keys(&[("logit_scale", F(4.0)), ("residual_scale", F(0.22)), ("embedding_scale", F(3.0)), ("attention.scale", F(0.1))]);
    granite_swa = Arch::new("granite_swa").keys(&[("logit_scale", F(4.0)), ("attention.sliding_window_pattern", Bs(&[true, false]))]);
    hrm_text = Arch::new("hrm_text").keys(&[("block_count", U(4)), ("hrm.layers_per_stack", U(1)), ("hrm.h_cycles", U(2)), ("hrm.l_cycles", U(1))]);
    hunyuan_dense = Arch::new("hunyuan-dense");
    hunyuan_vl = Arch::new("hunyuan_vl").keys(&[SECTIONS]);
    internlm2 = Arch::new("internlm2");
    jais = Arch::new("jais").keys(&[("attention.head_count_kv", No), ("attention.max_alibi_bias", F(8.0))]);
    jais2 = Arch::new("jais2");
    llama = Arch::new("llama");
    llama_scaled = Arch::new("llama").scales();
    maincoder = Arch::new("maincoder");
    minicpm = Arch::new("minicpm");
    minicpm3 = Arch::new("minicpm3").keys(&[("attention.q_lora_rank", U(32)), ("attention.head_count_kv", No), ("attention.kv_lora_rank", U(32)), ("attention.key_length", U(24)), ("attention.value_length", U(16)), ("rope.dimension_count", U(8))]);
    mistral3 = Arch::new("mistral3");
    mpt = Arch::new("mpt").keys(&[("attention.head_count_kv", No), ("attention.clamp_kqv", F(4.0)), ("attention.max_alibi_bias", F(8.0))]);
    muse_glimmer = Arch::new("muse-glimmer").keys(&[("logit_scale", F(0.5))]);
    nanbeige = Arch::new("nanbeige").keys(&[("num_loops", U(2))]);
    nemotron = Arch::new("nemotron");
    olmo = Arch::new("olmo").keys(&[("attention.clamp_kqv", F(1.5))]);
    olmo2 = Arch::new("olmo2").keys(&[("block_count", U(4))]);
    openelm = Arch::new("openelm");
    orion = Arch::new("orion");
    paddleocr = Arch::new("paddleocr").keys(&[SECTIONS]);
    pangu_embedded = Arch::new("pangu-embedded");
    phi2 = Arch::new("phi2").fused().keys(&[("attention.head_count_kv", No)]);
    phi3 = Arch::new("phi3").fused();
    plamo = Arch::new("plamo");
    plamo3 = Arch::new("plamo3");
    plm = Arch::new("plm").keys(&[("attention.head_count_kv", No), ("attention.kv_lora_rank", U(32)), ("attention.key_length", U(24)), ("attention.value_length", U(16)), ("rope.dimension_count", U(8))]);
    qwen = Arch::new("qwen").keys(&[("attention.head_count_kv", No)]);
    qwen2 = Arch::new("qwen2");
    qwen2vl = Arch::new("qwen2vl").keys(&[SECTIONS]);
    qwen3 = Arch::new("qwen3");
    qwen3vl = Arch::new("qwen3vl").keys(&[SECTIONS]);
    refact = Arch::new("refact");
    seed_oss = Arch::new("seed_oss");
    smollm3 = Arch::new("smollm3").keys(&[("block_count", U(4))]);
    spark2_5 = Arch::new("spark2_5").keys(&[("attention.sliding_window_pattern", Bs(&[true, false]))]);
    stablelm = Arch::new("stablelm");
    starcoder = Arch::new("starcoder").keys(&[("attention.head_count_kv", No)]);
    starcoder2 = Arch::new("starcoder2");
    talkie = Arch::new("talkie").keys(&[("logit_scale", F(0.5))]);
    xverse = Arch::new("xverse");

    afmoe = Arch::moe("afmoe").keys(&[("block_count", U(4))]);
    arctic = Arch::moe("arctic");
    bailingmoe = Arch::moe("bailingmoe");
    bailingmoe2 = Arch::moe("bailingmoe2").keys(&[("expert_gating_func", U(2)), ("expert_count", U(8)), ("expert_group_count", U(4)), ("expert_group_used_count", U(2))]);
    cohere2moe = Arch::moe("cohere2moe").keys(&[("block_count", U(4)), ("logit_scale", F(0.25))]);
    dbrx = Arch::moe("dbrx").keys(&[("attention.clamp_kqv", F(4.0))]);
    deepseek = Arch::moe("deepseek");
    deepseek2 = Arch::moe("deepseek2").keys(&[("attention.q_lora_rank", U(32)), ("attention.head_count_kv", No), ("attention.kv_lora_rank", U(32)), ("attention.key_length", U(24)), ("attention.value_length", U(16)), ("rope.dimension_count", U(8)), ("expert_gating_func", U(2))]);
    deepseek2_mla = Arch::moe("deepseek2").keys(&MLA);
    deepseek2_ocr = Arch::moe("deepseek2-ocr").keys(&[("attention.head_count_kv", No)]);
    dots1 = Arch::moe("dots1").keys(&[("attention.head_count_kv", No), ("expert_gating_func", U(2))]);
    ernie4_5_moe = Arch::moe("ernie4_5-moe");
    exaone_moe = Arch::moe("exaone-moe").keys(&[("block_count", U(4)), ("expert_gating_func", U(2))]);
    gemma4_moe = Arch::moe("gemma4").keys(&[("block_count", U(2)), ("attention.sliding_window_pattern", Bs(&[true, false])), ("embedding_length_per_layer_input", U(0)), ("attention.key_length_swa", U(16)), ("attention.value_length_swa", U(16)), ("expert_count", U(2))]);
    glm4moe = Arch::moe("glm4moe");
    gpt_oss = Arch::moe("gpt-oss").keys(&[("block_count", U(2))]);
    granite_moe_swa = Arch::moe("granite_swa").keys(&[("block_count", U(2)), ("logit_scale", F(4.0)), ("attention.sliding_window_pattern", Bs(&[true, false]))]);
    granitemoe = Arch::moe("granitemoe").keys(&[("logit_scale", F(4.0)), ("residual_scale", F(0.22)), ("embedding_scale", F(3.0)), ("attention.scale", F(0.1))]);
    grok = Arch::moe("grok").keys(&[("expert_count", U(2))]);
    grovemoe = Arch::moe("grovemoe").keys(&[("expert_chunk_feed_forward_length", U(32)), ("expert_group_scale", F(0.05)), ("experts_per_group", U(2))]);
    hunyuan_moe = Arch::moe("hunyuan-moe");
    hy_v3 = Arch::moe("hy_v3");
    laguna = Arch::moe("laguna").keys(&[("block_count", U(4)), ("attention.sliding_window_pattern", Bs(&[true, false, true, false]))]);
    llama4 = Arch::moe("llama4").keys(&[("block_count", U(4)), ("attention.sliding_window", No), ("expert_used_count", U(1))]);
    llama_moe = Arch::moe("llama");
    maple = Arch::moe("maple").keys(&[("block_count", U(2)), ("attention.sliding_window_pattern", Bs(&[true, false])), ("swiglu_clamp_exp", Fs(&[1.0, 1.5]))]);
    mellum = Arch::moe("mellum");
    mimo2 = Arch::moe("mimo2").keys(&[("block_count", U(2)), ("attention.sliding_window_pattern", Bs(&[true, false])), ("rope.freq_base_swa", F(1e4))]);
    minimax_m2 = Arch::moe("minimax-m2").keys(&[("expert_gating_func", U(2))]);
    mistral3_moe = Arch::moe("mistral3");
    mistral4 = Arch::moe("mistral4").keys(&MLA);
    olmoe = Arch::moe("olmoe").keys(&[("attention.head_count_kv", No)]);
    phimoe = Arch::moe("phimoe");
    qwen2moe = Arch::moe("qwen2moe");
    qwen3moe = Arch::moe("qwen3moe");
    qwen3vlmoe = Arch::moe("qwen3vlmoe").keys(&[SECTIONS]);
    smallthinker = Arch::moe("smallthinker").keys(&[("attention.sliding_window", No), ("expert_gating_func", U(2))]);
    step35 = Arch::moe("step35").keys(&[("block_count", U(2)), ("attention.sliding_window_pattern", Bs(&[true, false])), ("rope.freq_base_swa", F(1e4)), ("swiglu_clamp_exp", Fs(&[0.0, 1.5])), ("swiglu_clamp_shexp", Fs(&[0.0, 1.5]))]);
}
