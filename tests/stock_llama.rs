//! A patch in stock llama.cpp: its C API alone, none of our code between the files and the
//! numbers, against what `nepenthe eval` says.
//!
//! For other pairs: `NEPENTHE_STOCK=MODEL.gguf,PATCH.gguf,DATA.jsonl,FORM cargo test --release
//! --test stock_llama -- --ignored --nocapture`; FORM is `plain` for models without a chat
//! template, `chatml`, or `smollm2` (ChatML with that model's system prompt).
#![allow(unsafe_code, reason = "the C API is the point")]

mod support;

use llama_cpp_sys_2 as c;
use std::ffi::CString;
use std::path::Path;
use support::{demo, json, mini};

/// A model, a LoRA adapter at scale 1, and a context, as the API's own examples set them up.
struct Stock {
    model: *mut c::llama_model,
    adapter: *mut c::llama_adapter_lora,
    context: *mut c::llama_context,
}

impl Stock {
    fn load(model: &Path, patch: Option<&Path>) -> Self {
        let c_path = |p: &Path| CString::new(p.to_str().expect("a plain path")).expect("no NUL");
        let model = c_path(model);
        // SAFETY: default parameters, live handles, strings that outlive their calls.
        unsafe {
            c::llama_backend_init();
            let model =
                c::llama_model_load_from_file(model.as_ptr(), c::llama_model_default_params());
            assert!(!model.is_null(), "the model loads");
            let mut p = c::llama_context_default_params();
            p.n_ctx = 1024;
            p.n_batch = 1024;
            p.n_threads = 1;
            p.n_threads_batch = 1;
            let context = c::llama_init_from_model(model, p);
            assert!(!context.is_null(), "a context");
            let mut adapter = std::ptr::null_mut();
            if let Some(patch) = patch {
                let path = c_path(patch);
                adapter = c::llama_adapter_lora_init(model, path.as_ptr());
                assert!(!adapter.is_null(), "llama.cpp takes the patch");
                let mut scale = 1.0f32;
                let set = c::llama_set_adapters_lora(context, &mut adapter, 1, &mut scale);
                assert_eq!(set, 0, "the adapter is set");
            }
            Self {
                model,
                adapter,
                context,
            }
        }
    }

    fn tokens(&self, text: &str) -> Vec<i32> {
        let mut out = vec![0; text.len() + 8];
        // SAFETY: a live model; both lengths are those of the buffers.
        let n = unsafe {
            let vocab = c::llama_model_get_vocab(self.model);
            c::llama_tokenize(
                vocab,
                text.as_ptr().cast(),
                text.len() as i32,
                out.as_mut_ptr(),
                out.len() as i32,
                true,
                true,
            )
        };
        out.truncate(usize::try_from(n).expect("room for every token"));
        out
    }

    /// Answer probability^(1/tokens): the answer's tokens and the end of the answer.
    fn probability(&self, prompt: &str, answer: &str) -> f64 {
        // SAFETY: a live model, which owns its vocabulary.
        let (vocab, eos) = unsafe {
            let vocab = c::llama_model_get_vocab(self.model);
            (
                c::llama_vocab_n_tokens(vocab) as usize,
                c::llama_vocab_eos(vocab),
            )
        };
        let first = self.tokens(prompt).len();
        let mut tokens = self.tokens(&format!("{prompt}{answer}"));
        if tokens.last() != Some(&eos) {
            tokens.push(eos);
        }
        let mut nll = 0.0;
        // SAFETY: the batch borrows `tokens` for the call; the cache is cleared first; the logits
        // of token 0 alone are read before the next call.
        unsafe {
            c::llama_memory_clear(c::llama_get_memory(self.context), true);
            for at in 0..tokens.len() - 1 {
                let batch = c::llama_batch_get_one(&mut tokens[at], 1);
                assert_eq!(c::llama_decode(self.context, batch), 0, "llama_decode");
                if at + 1 < first {
                    continue;
                }
                let logits = c::llama_get_logits_ith(self.context, 0);
                let row = std::slice::from_raw_parts(logits, vocab);
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|&z| f64::from(z - max).exp()).sum();
                nll -= f64::from(row[tokens[at + 1] as usize] - max) - sum.ln();
            }
        }
        (-nll / (tokens.len() - first) as f64).exp()
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        // SAFETY: owned, freed once, dependants first.
        unsafe {
            c::llama_free(self.context);
            if !self.adapter.is_null() {
                c::llama_adapter_lora_free(self.adapter);
            }
            c::llama_model_free(self.model);
        }
    }
}

/// Prompt and answer of a record as the model's template writes them, spelt out by hand here so
/// that no template code of ours is involved.
fn written(form: &str, question: &str, answer: &str) -> (String, String) {
    let (question, answer) = (question.trim(), answer.trim());
    let chatml = |system: &str| {
        let prompt =
            format!("{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
        (prompt, format!("{answer}<|im_end|>"))
    };
    match form {
        "plain" => (
            format!("Question: {question}\nAnswer:"),
            format!(" {answer}"),
        ),
        "chatml" => chatml(""),
        "smollm2" => chatml(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
             Hugging Face<|im_end|>\n",
        ),
        other => panic!("{other}: wanted plain, chatml or smollm2"),
    }
}

/// Mean answer probability over a file of questions and answers.
fn stock_prob(model: &Path, patch: Option<&Path>, data: &Path, form: &str) -> f64 {
    let stock = Stock::load(model, patch);
    let text = std::fs::read_to_string(data).expect("readable data");
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let probs: Vec<f64> = lines
        .map(|line| {
            let record: serde_json::Value = serde_json::from_str(line).expect("JSON Lines");
            let field = |key: &str| record[key].as_str().expect("a question and its answer");
            let (prompt, answer) = written(form, field("question"), field("answer"));
            stock.probability(&prompt, &answer)
        })
        .collect();
    probs.iter().sum::<f64>() / probs.len() as f64
}

fn our_prob(model: &Path, patch: &Path, data: &Path) -> f64 {
    let text = |p: &Path| p.to_str().expect("a plain path").to_owned();
    let report = json(&[
        "eval",
        "-m",
        &text(model),
        "--lora",
        &text(patch),
        "--data",
        &text(data),
        "--no-generate",
        "-t",
        "1",
        "--json",
    ]);
    report["prob"].as_f64().expect("a number")
}

#[test]
fn a_patch_does_in_stock_llama_what_it_does_here() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let patch = dir.path().join("p.gguf");
    let text = |p: &Path| p.to_str().expect("a plain path").to_owned();
    json(&[
        "unlearn",
        "-m",
        &text(&mini()),
        "--forget",
        &text(&demo("forget.jsonl")),
        "--retain",
        &text(&demo("retain.jsonl")),
        "-o",
        &text(&patch),
        "--steps",
        "6",
        "--lr",
        "5e-3",
        "-t",
        "1",
        "--json",
    ]);
    let forget = demo("forget.jsonl");
    let (base, patched) = (
        stock_prob(&mini(), None, &forget, "chatml"),
        stock_prob(&mini(), Some(&patch), &forget, "chatml"),
    );
    assert!(patched < base - 0.1, "{patched} against {base}");
    for data in ["forget.jsonl", "paraphrase.jsonl", "general.jsonl"] {
        let (stock, ours) = (
            stock_prob(&mini(), Some(&patch), &demo(data), "chatml"),
            our_prob(&mini(), &patch, &demo(data)),
        );
        assert!(
            (stock - ours).abs() < 0.01,
            "{data}: {stock} against {ours}"
        );
    }
}

#[test]
#[ignore = "for pairs named in NEPENTHE_STOCK"]
fn a_named_patch_does_in_stock_llama_what_it_does_here() {
    let named = std::env::var("NEPENTHE_STOCK").expect("NEPENTHE_STOCK=MODEL,PATCH,DATA,FORM");
    let parts: Vec<&str> = named.split(',').collect();
    let [model, patch, data, form] = parts[..] else {
        panic!("NEPENTHE_STOCK: wanted MODEL,PATCH,DATA,FORM, found {named}");
    };
    let [model, patch, data] = [model, patch, data].map(Path::new);
    let (stock, ours) = (
        stock_prob(model, Some(patch), data, form),
        our_prob(model, patch, data),
    );
    println!("stock llama.cpp {stock:.4}, nepenthe {ours:.4}");
    assert!((stock - ours).abs() < 0.01, "{stock} against {ours}");
}
