//! Makes the embedded model from nothing but a seed: corpus, vocabulary, random weights,
//! pretraining through this project's own graph, quantisation.
//!
//! `cargo run --release --example recipe -- models` writes `models/nepenthe-mini.gguf` and
//! `models/demo/*.jsonl`.

mod bpe;
mod corpus;

use nepenthe::data::{Record, Sample, build_samples};
use nepenthe::ggml::{Backend, quantize};
use nepenthe::gguf::{Array, GgmlType, Gguf, GgufWriter, Metadata, Value};
use nepenthe::graph::batch::{Packed, Sequence, pack};
use nepenthe::graph::tape::{End, Part, Parts, Tape};
use nepenthe::graph::trace::trace;
use nepenthe::graph::trained::{FreeWeights, Trained};
use nepenthe::graph::weights::Multiplying;
use nepenthe::model::OpenModel;
use nepenthe::rng::SplitMix64;
use nepenthe::score::evaluate;
use nepenthe::train::adamw::{AdamWConfig, Moments};
use nepenthe::train::loss::{RowObjective, Target, grade};
use nepenthe::train::order::Order;
use rayon::prelude::*;
use std::io::Write;
use std::path::Path;

const SEED: u64 = 2026;
const N_VOCAB: usize = 1536;
const N_EMBD: usize = 256;
const N_LAYER: usize = 5;
const N_HEAD: usize = 4;
const N_FF: usize = 768;
const N_CTX: u32 = 512;
const EPOCHS: usize = 20;
const PEAK_LR: f32 = 2e-3;
const BATCH_TOKENS: usize = 512;
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const TEMPLATE: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Fallible<()> {
    let out = std::env::args()
        .nth(1)
        .ok_or("usage: recipe OUTPUT_FOLDER")?;
    let out = Path::new(&out);
    let corpus = corpus::generate(SEED);
    write_demo(out, &corpus)?;
    let work = tempfile::tempdir()?;
    let start = work.path().join("start.gguf");
    write_start(&start, &corpus)?;
    let trained = work.path().join("trained.gguf");
    pretrain(&start, &trained, &corpus.training)?;
    let model = out.join("nepenthe-mini.gguf");
    quantise(&trained, &model)?;
    report(&model, &corpus)
}

/// The data files of the demo, one JSON object a line.
fn write_demo(out: &Path, corpus: &corpus::Corpus) -> Fallible<()> {
    let demo = out.join("demo");
    std::fs::create_dir_all(&demo)?;
    for (name, records) in [
        ("forget", &corpus.forget),
        ("retain", &corpus.retain),
        ("paraphrase", &corpus.paraphrase),
        ("unseen", &corpus.unseen),
        ("general", &corpus.general),
    ] {
        let mut file = std::fs::File::create(demo.join(format!("{name}.jsonl")))?;
        for r in records {
            if let Record::Qa { question, answer } = r {
                writeln!(
                    file,
                    "{}",
                    serde_json::json!({ "question": question, "answer": answer })
                )?;
            }
        }
    }
    Ok(())
}

/// Random weights in F32: normal of standard deviation 0.02, products that write to the
/// residual stream divided by √(2·n_layer) (GPT-2).
fn write_start(path: &Path, corpus: &corpus::Corpus) -> Fallible<()> {
    let texts: Vec<String> = corpus
        .training
        .iter()
        .map(|r| match r.turns() {
            Some(turns) => turns
                .iter()
                .map(|t| format!("{}\n{}\n", t.role.as_str(), t.content))
                .collect(),
            None => r.answer().to_owned(),
        })
        .collect();
    let vocab = bpe::train(&texts, N_VOCAB, &CONTROL);
    let mut meta = Metadata::new();
    meta.set("general.architecture", "llama");
    meta.set("general.name", "nepenthe-mini");
    meta.set("general.license", "MIT");
    let number =
        |meta: &mut Metadata, key: &str, v: usize| meta.set(&format!("llama.{key}"), v as u32);
    number(&mut meta, "context_length", N_CTX as usize);
    number(&mut meta, "embedding_length", N_EMBD);
    number(&mut meta, "block_count", N_LAYER);
    number(&mut meta, "feed_forward_length", N_FF);
    number(&mut meta, "attention.head_count", N_HEAD);
    number(&mut meta, "rope.dimension_count", N_EMBD / N_HEAD);
    meta.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    let n = vocab.tokens.len();
    let types: Vec<i32> = (0..n)
        .map(|i| if i < n - vocab.n_control { 1 } else { 3 })
        .collect();
    meta.set("tokenizer.ggml.model", "gpt2");
    meta.set("tokenizer.ggml.pre", "gpt-2");
    meta.set("tokenizer.ggml.tokens", vocab.tokens);
    meta.set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    meta.set("tokenizer.ggml.merges", vocab.merges);
    let end = n as u32 - 1;
    meta.set("tokenizer.ggml.bos_token_id", end - 1);
    meta.set("tokenizer.ggml.eos_token_id", end);
    meta.set("tokenizer.ggml.padding_token_id", end - 2);
    meta.set("tokenizer.ggml.add_bos_token", false);
    meta.set("tokenizer.chat_template", TEMPLATE);
    let mut tensors: Vec<(String, Vec<u64>, f32)> = Vec::new();
    let (d, f, v) = (N_EMBD as u64, N_FF as u64, N_VOCAB as u64);
    let residual = 0.02 / (2.0 * N_LAYER as f32).sqrt();
    tensors.push(("token_embd.weight".into(), vec![d, v], 0.02));
    for l in 0..N_LAYER {
        let mut block = |name: &str, ne: &[u64], deviation: f32| {
            tensors.push((format!("blk.{l}.{name}.weight"), ne.to_vec(), deviation))
        };
        block("attn_norm", &[d], 0.0);
        for name in ["attn_q", "attn_k", "attn_v"] {
            block(name, &[d, d], 0.02);
        }
        block("attn_output", &[d, d], residual);
        block("ffn_norm", &[d], 0.0);
        block("ffn_gate", &[d, f], 0.02);
        block("ffn_up", &[d, f], 0.02);
        block("ffn_down", &[f, d], residual);
    }
    tensors.push(("output_norm.weight".into(), vec![d], 0.0));
    tensors.push(("output.weight".into(), vec![d, v], 0.02));
    let mut rng = SplitMix64::stream(SEED, 11);
    let values: Vec<Vec<f32>> = tensors
        .iter()
        .map(|(_, ne, deviation)| {
            let n = ne.iter().product::<u64>();
            (0..n)
                .map(|_| {
                    if *deviation == 0.0 {
                        1.0
                    } else {
                        deviation * rng.normal()
                    }
                })
                .collect()
        })
        .collect();
    let mut file = GgufWriter::new(path, meta);
    for ((name, ne, _), values) in tensors.iter().zip(&values) {
        file.tensor_from_bytes(name, ne, GgmlType::F32, bytemuck::cast_slice(values))?;
    }
    file.save(true)?;
    Ok(())
}

/// Train every weight on the answers of `records` (and all of running text).
fn pretrain(start: &Path, trained: &Path, records: &[Record]) -> Fallible<()> {
    let open = OpenModel::open(start, 0)?;
    let samples = build_samples(records, &open.model, &open.template()?, N_CTX as usize)?.samples;
    let n_tokens: usize = samples.iter().map(|s| s.tokens.len()).sum();
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut cpu = Backend::new(n_threads)?;
    let template = trace(&open.model, &open.weights)?;
    let names: Vec<String> = open
        .weights
        .set()
        .tensors()
        .map(|(_, t)| t.name.clone())
        .collect();
    let mut free = FreeWeights::new(&cpu, &open.weights, names.clone())?;
    let mut params: Vec<Vec<f32>> = (0..names.len())
        .map(|i| free.read(i))
        .collect::<Result<_, _>>()?;
    let mut moments: Vec<Moments> = params.iter().map(|p| Moments::new(p.len())).collect();
    let parts = Parts {
        template: &template,
        weights: &open.weights,
        window: None,
        recompute: None,
        part: Part::Whole,
    };
    let mut transposed = Multiplying::default();
    let mut tape: Option<Tape> = None;
    let n_steps = EPOCHS * n_tokens.div_ceil(BATCH_TOKENS);
    eprintln!(
        "{} samples, {n_tokens} tokens, {n_steps} steps",
        samples.len()
    );
    let mut order = Order::new(SEED, 13, samples.len());
    let (mut logits, mut grad) = (Vec::new(), Vec::new());
    let mut seen = 0.0;
    for step in 0..n_steps {
        let mut batch: Vec<&Sample> = Vec::new();
        let mut tokens = 0;
        while tokens + 64 < BATCH_TOKENS {
            let sample = &samples[order.draw()];
            tokens += sample.tokens.len() - 1;
            batch.push(sample);
        }
        let (packed, targets) = pack_batch(&batch);
        let shape = (packed.n_tokens(), packed.n_padded_rows());
        if tape.as_ref().is_none_or(|t| t.shape() != shape) {
            drop(tape.take());
            tape = Some(Tape::new(
                &parts,
                Trained::Weights(&free),
                End::Logits,
                shape,
                true,
                &cpu,
                &mut transposed,
            )?);
        }
        let tape = tape.as_mut().expect("made above");
        tape.forward(&mut cpu, &packed, &mut logits)?;
        let rows = packed.n_rows;
        logits[rows * N_VOCAB..].fill(0.0);
        let losses: Vec<f64> = logits
            .par_chunks_mut(N_VOCAB)
            .zip(&targets)
            .map(|(row, target)| grade(row, *target, true).nll)
            .collect();
        tape.backward(&mut cpu, &logits)?;
        let done = step as f32 / n_steps as f32;
        let lr = PEAK_LR
            * (step as f32 / 50.0).min(1.0)
            * (0.02 + 0.98 * 0.5 * (1.0 + (std::f32::consts::PI * done).cos()));
        let mut grads = Vec::with_capacity(params.len());
        for (i, p) in params.iter().enumerate() {
            grad.resize(p.len(), 0.0);
            tape.read_grad(i, &mut grad)?;
            grads.push(grad.clone());
        }
        let norm = grads
            .iter()
            .flatten()
            .map(|g| f64::from(*g).powi(2))
            .sum::<f64>()
            .sqrt();
        let clip = (1.0 / norm.max(1.0)) as f32;
        for (i, p) in params.iter_mut().enumerate() {
            let weight_decay = if names[i].contains("norm") { 0.0 } else { 0.05 };
            let config = AdamWConfig {
                weight_decay,
                beta2: 0.98,
                ..AdamWConfig::default()
            };
            moments[i].update(&config, p, &grads[i], lr, clip, step as u64 + 1);
            free.write(i, p)?;
        }
        seen += losses.iter().sum::<f64>() / losses.len() as f64;
        if (step + 1) % 50 == 0 {
            eprintln!("step {:>5} of {n_steps}: loss {:.4}", step + 1, seen / 50.0);
            seen = 0.0;
        }
    }
    let mut file = GgufWriter::new(trained, open.weights.set().metadata().clone());
    for (name, values) in names.iter().zip(&params) {
        let info = open.weights.info(name)?;
        file.tensor_from_bytes(
            name,
            info.dims(),
            GgmlType::F32,
            bytemuck::cast_slice(values),
        )?;
    }
    file.save(true)?;
    Ok(())
}

fn pack_batch(batch: &[&Sample]) -> (Packed, Vec<Target<'static>>) {
    let lengths: Vec<usize> = batch.iter().map(|s| s.tokens.len() - 1).collect();
    let order: Vec<usize> = pack(&lengths, usize::MAX).into_iter().flatten().collect();
    let rows: Vec<Vec<usize>> = batch
        .iter()
        .map(|s| s.answers.iter().cloned().flatten().map(|j| j - 1).collect())
        .collect();
    let sequences: Vec<Sequence<'_>> = order
        .iter()
        .map(|&i| Sequence {
            tokens: &batch[i].tokens[..lengths[i]],
            rows: &rows[i],
        })
        .collect();
    let n: usize = rows.iter().map(Vec::len).sum();
    let targets = order
        .iter()
        .flat_map(|&i| rows[i].iter().map(move |&r| (i, r)))
        .map(|(i, r)| Target {
            token: batch[i].tokens[r + 1],
            objective: RowObjective::CrossEntropy,
            teacher: None,
            weight: 1.0 / n as f32,
        })
        .collect();
    (Packed::new(&sequences), targets)
}

/// The mix of real Q4_K_M files: most matrices Q4_K, half of attn_v and ffn_down Q6_K, the
/// embedding and the output Q8_0, norms F32.
fn quantise(trained: &Path, path: &Path) -> Fallible<()> {
    let gguf = Gguf::open(trained)?;
    let mut meta = gguf.metadata().clone();
    const MOSTLY_Q4_K_M: u32 = 15;
    meta.set("general.file_type", MOSTLY_Q4_K_M);
    meta.set("general.quantization_version", 2u32);
    let mut encoded = Vec::new();
    for info in gguf.tensors() {
        let bytes = gguf.read_tensor(&info.name)?;
        let values: Vec<f32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        let deep = info
            .name
            .split('.')
            .nth(1)
            .and_then(|l| l.parse::<usize>().ok())
            .is_some_and(|l| l % 2 == 0);
        let ty = match info.name.as_str() {
            _ if info.n_dims == 1 => GgmlType::F32,
            "token_embd.weight" | "output.weight" => GgmlType::Q8_0,
            n if deep && (n.contains("attn_v") || n.contains("ffn_down")) => GgmlType::Q6_K,
            _ => GgmlType::Q4_K,
        };
        encoded.push((
            info,
            ty,
            quantize(ty.id(), &values, info.ne[0] as usize, None)?,
        ));
    }
    let mut file = GgufWriter::new(path, meta);
    for (info, ty, bytes) in &encoded {
        file.tensor_from_bytes(&info.name, info.dims(), *ty, bytes)?;
    }
    let n = file.save(true)?;
    eprintln!("{}: {n} bytes", path.display());
    Ok(())
}

/// What the quantised file knows.
fn report(path: &Path, corpus: &corpus::Corpus) -> Fallible<()> {
    let open = OpenModel::open(path, 0)?;
    let template = open.template()?;
    for (name, records) in [
        ("forget", &corpus.forget),
        ("retain", &corpus.retain),
        ("paraphrase", &corpus.paraphrase),
        ("unseen", &corpus.unseen),
        ("general", &corpus.general),
    ] {
        let e = evaluate(
            &open.model,
            &Vec::new(),
            &template,
            records,
            true,
            (512, 1),
            &mut |_, _| {},
        )?;
        println!(
            "{name:<11} {:>4} samples, answer probability {:.3}, ROUGE-L {:.3}",
            e.n,
            e.prob,
            e.rouge_l.unwrap_or(f64::NAN)
        );
        for (r, s) in records.iter().zip(&e.scored).take(2) {
            let question = r.turns().map(|t| t[0].content.clone()).unwrap_or_default();
            println!("    {question} -> {}", s.answer.as_deref().unwrap_or(""));
        }
    }
    Ok(())
}
