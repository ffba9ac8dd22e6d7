//! How much of an update each way of merging loses, per tensor, on inputs that were not used to
//! round: the table of MERGE.
//!
//!     cargo bench --bench merge_error -- --model MODEL [--patch PATCH]
//!
//! Second moments come from the model's own inputs to each tensor, BOS left out: forget inputs
//! from TOFU forget01, retain inputs from TOFU retain90 and WikiText-2; every fourth text is held
//! out and measures. Without a patch ΔW is a product of rank 32 whose input side is drawn with
//! the covariance of the forget inputs, as sums of gradients are. Either is scaled to the wanted
//! ‖ΔW‖/‖W‖.

use clap::Parser;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use nepenthe::data::{Record, load_records};
use nepenthe::ggml::{
    Batch, Context, ContextOptions, DecodeError, Hook, Model, NodeView, quantize, sys,
};
use nepenthe::gguf::GgmlType;
use nepenthe::merge::decide::larger;
use nepenthe::merge::factor::Factor;
use nepenthe::merge::feedback::{Search, round_rows};
use nepenthe::merge::grid::Grid;
use nepenthe::merge::measure::{Measured, Merged, Moments, measure};
use nepenthe::merge::promote::promote_rows;
use nepenthe::model::OpenModel;
use nepenthe::patch::Patch;
use nepenthe::patch::delta::Delta;
use nepenthe::rng::SplitMix64;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const RANK: usize = 32;

#[derive(Parser)]
struct Args {
    /// Gemma-3-270M Q4_K_M, or another model with the three tensors
    #[arg(long)]
    model: Option<PathBuf>,
    /// Updates of a real patch instead of random ones
    #[arg(long)]
    patch: Option<PathBuf>,
    /// Where tofu/ and wikitext2/ are
    #[arg(long)]
    data: Option<PathBuf>,
    /// Keep the moments here, or take them from here
    #[arg(long)]
    moments: Option<PathBuf>,
    /// Block of the tensors; the first from here on that has the type
    #[arg(long, default_value_t = 8)]
    block: usize,
    /// Relative norms in percent
    #[arg(long, value_delimiter = ',', default_value = "0.3,1,3")]
    percent: Vec<f64>,
    /// Weight of the forget moments
    #[arg(long, default_value_t = 0.5)]
    lambda: f64,
    /// Part of the mean diagonal added to the moments
    #[arg(long, default_value_t = 0.01)]
    damping: f64,
    /// Passes of coordinate descent
    #[arg(long, value_delimiter = ',', default_value = "4,20")]
    passes: Vec<usize>,
    /// Passes over pairs of codes after the last of these
    #[arg(long, default_value_t = 0)]
    pair_passes: usize,
    /// Also fresh scales with feedback, and promotion to the next larger type
    #[arg(long)]
    promote: bool,
    /// Tokens of WikiText-2
    #[arg(long, default_value_t = 12_288)]
    wiki_tokens: usize,
    /// Seed of the random updates
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// cargo bench says so
    #[arg(long, hide = true)]
    bench: bool,
}

struct Target {
    name: String,
    ty: GgmlType,
    n_in: usize,
    n_out: usize,
}

/// Σ x·xᵀ per target, of one kind of text.
struct Sums {
    h: Vec<Vec<f64>>,
    n_tokens: usize,
}

impl Sums {
    /// Mean x·xᵀ of target `i`.
    fn mean(&self, i: usize) -> Vec<f32> {
        let scale = 1.0 / self.n_tokens.max(1) as f64;
        self.h[i].iter().map(|v| (v * scale) as f32).collect()
    }

    fn write(all: &[Self; 4], path: &Path) -> Result<()> {
        let mut out = Vec::new();
        for sums in all {
            out.extend((sums.n_tokens as f64).to_le_bytes());
            out.extend(sums.h.iter().flatten().flat_map(|v| v.to_le_bytes()));
        }
        Ok(std::fs::write(path, out)?)
    }

    fn read(path: &Path, targets: &[Target]) -> Result<[Self; 4]> {
        let bytes = std::fs::read(path)?;
        let wanted: usize = targets.iter().map(|t| t.n_in * t.n_in).sum();
        if bytes.len() != 4 * 8 * (1 + wanted) {
            return Err(format!("{}: moments of other tensors", path.display()).into());
        }
        let mut values = bytes
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")));
        let mut next = || {
            let n_tokens = values.next().expect("length checked") as usize;
            let h = targets
                .iter()
                .map(|t| values.by_ref().take(t.n_in * t.n_in).collect())
                .collect();
            Self { h, n_tokens }
        };
        Ok([next(), next(), next(), next()])
    }
}

struct Watch {
    index: HashMap<String, usize>,
    widths: Vec<usize>,
    h: Vec<Vec<f64>>,
    values: Vec<f32>,
    n_seen: usize,
}

struct Watcher(Arc<Mutex<Watch>>);

impl Hook for Watcher {
    fn want(&mut self, node: &NodeView<'_>) -> bool {
        node.op() == sys::GGML_OP_MUL_MAT
            && node
                .src_name(0)
                .is_some_and(|n| self.0.lock().expect("one thread").index.contains_key(&n))
    }

    fn seen(&mut self, node: &NodeView<'_>) -> bool {
        let watch = &mut *self.0.lock().expect("one thread");
        let Some(&i) = node.src_name(0).and_then(|n| watch.index.get(&n)) else {
            return true;
        };
        watch.n_seen += 1;
        if node.read_src(1, &mut watch.values).is_ok() {
            let n = watch.widths[i];
            // The first token of every batch is BOS, of huge activations and no meaning.
            let x = &watch.values[n..];
            let x = MatRef::from_row_major_slice(x, x.len() / n, n);
            let mut sum = vec![0f32; n * n];
            matmul(
                MatMut::from_row_major_slice_mut(&mut sum, n, n),
                Accum::Replace,
                x.transpose(),
                x,
                1.0,
                Par::Seq,
            );
            for (h, s) in watch.h[i].iter_mut().zip(&sum) {
                *h += f64::from(*s);
            }
        }
        true
    }

    /// Nothing of interest follows the last target.
    fn abort(&mut self) -> bool {
        let watch = self.0.lock().expect("one thread");
        watch.n_seen == watch.widths.len()
    }
}

fn capture(model: &Model, targets: &[Target], texts: &[Vec<i32>]) -> Result<Sums> {
    let watch = Arc::new(Mutex::new(Watch {
        index: targets
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect(),
        widths: targets.iter().map(|t| t.n_in).collect(),
        h: targets.iter().map(|t| vec![0.0; t.n_in * t.n_in]).collect(),
        values: Vec::new(),
        n_seen: 0,
    }));
    let longest = texts.iter().map(Vec::len).max().unwrap_or(1).max(64) as u32;
    let options = ContextOptions {
        n_ctx: longest,
        n_batch: longest,
        n_threads: 1,
        hook: Some(Box::new(Watcher(watch.clone()))),
        ..ContextOptions::default()
    };
    let mut context = Context::new(model, options)?;
    let mut n_tokens = 0;
    for text in texts {
        let mut batch = Batch::default();
        for (pos, &token) in text.iter().enumerate() {
            batch.push(token, pos as i32, 0, true);
        }
        context.clear();
        watch.lock().expect("one thread").n_seen = 0;
        match context.decode(&mut batch) {
            Ok(()) | Err(DecodeError::Aborted) => {}
            Err(e) => return Err(e.into()),
        }
        n_tokens += text.len() - 1;
    }
    drop(context);
    let h = std::mem::take(&mut watch.lock().expect("one thread").h);
    Ok(Sums { h, n_tokens })
}

/// Calibration and held-out texts: every fourth is held out.
fn split(texts: Vec<Vec<i32>>) -> (Vec<Vec<i32>>, Vec<Vec<i32>>) {
    let (mut fit, mut held) = (Vec::new(), Vec::new());
    for (i, t) in texts.into_iter().enumerate() {
        if i % 4 == 3 {
            held.push(t);
        } else {
            fit.push(t);
        }
    }
    (fit, held)
}

fn questions(model: &Model, path: &Path, most: usize) -> Result<Vec<Vec<i32>>> {
    let records = load_records(path)?;
    Ok(records
        .iter()
        .take(most)
        .map(|r| {
            let prompt = match r {
                Record::Qa { question, answer } => {
                    format!("Question: {question}\nAnswer: {answer}")
                }
                other => other.answer().to_owned(),
            };
            model.tokenize(&prompt, true, false)
        })
        .filter(|t| t.len() > 1)
        .collect())
}

fn prose(model: &Model, path: &Path, n_tokens: usize) -> Result<Vec<Vec<i32>>> {
    let text = std::fs::read_to_string(path)?;
    let end = text
        .char_indices()
        .map(|(i, _)| i)
        .find(|&i| i > 8 * n_tokens)
        .unwrap_or(text.len());
    let tokens = model.tokenize(&text[..end], true, false);
    let bos = tokens[0];
    Ok(tokens[1..]
        .chunks(512)
        .take(n_tokens.div_ceil(512))
        .map(|c| std::iter::once(bos).chain(c.iter().copied()).collect())
        .collect())
}

/// Moments of forget and retain inputs, each of calibration and held-out texts.
fn moments(
    model: &Model,
    targets: &[Target],
    data: &Path,
    wiki_tokens: usize,
) -> Result<[Sums; 4]> {
    let tofu = data.join("tofu");
    let forget = split(questions(model, &tofu.join("forget01.json"), 40)?);
    let mut retain = split(questions(model, &tofu.join("retain90.json"), 160)?);
    let wiki = data.join("wikitext2/wiki.test.raw");
    let wiki = split(prose(model, &wiki, wiki_tokens)?);
    retain.0.extend(wiki.0);
    retain.1.extend(wiki.1);
    Ok([
        capture(model, targets, &forget.0)?,
        capture(model, targets, &forget.1)?,
        capture(model, targets, &retain.0)?,
        capture(model, targets, &retain.1)?,
    ])
}

/// lora_a [n_in, RANK] with covariance `h`, lora_b [RANK, n_out] white.
fn random_update(h: &[f32], n_in: usize, n_out: usize, seed: u64) -> Result<(Vec<f32>, Vec<f32>)> {
    let mut rng = SplitMix64(seed);
    let white: Vec<f32> = (0..RANK * n_in).map(|_| rng.normal()).collect();
    let b: Vec<f32> = (0..RANK * n_out).map(|_| rng.normal()).collect();
    // H·z has covariance H²; a square root by diagonalisation gives H.
    let m = faer::Mat::<f64>::from_fn(n_in, n_in, |i, j| f64::from(h[i * n_in + j]));
    let eigen = m
        .self_adjoint_eigen(faer::Side::Lower)
        .map_err(|_| "no eigenvalues of the forget moments")?;
    let root: Vec<f64> = (0..n_in).map(|i| eigen.S()[i].max(0.0).sqrt()).collect();
    let z = faer::Mat::<f64>::from_fn(n_in, RANK, |i, j| root[i] * f64::from(white[j * n_in + i]));
    let a = eigen.U() * z;
    let a = (0..RANK)
        .flat_map(|j| (0..n_in).map(move |i| (i, j)))
        .map(|(i, j)| a[(i, j)] as f32)
        .collect();
    Ok((a, b))
}

fn cell(m: &Measured) -> String {
    format!("{:.4} / {:.1e}", m.err_f(), m.retain_noise())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let home = std::env::var_os("HOME")
        .map(PathBuf::from)
        .unwrap_or_default();
    let path = args
        .model
        .clone()
        .unwrap_or_else(|| home.join(".cache/nepenthe/gemma-3-270m-q4_k_m.gguf"));
    let data = args
        .data
        .clone()
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"));
    for needed in [&path, &data.join("tofu/forget01.json")] {
        if !needed.is_file() {
            println!("skipped: {} is not at hand", needed.display());
            return Ok(());
        }
    }
    let OpenModel { model, weights, .. } = OpenModel::open(&path, 0)?;
    let patch = args.patch.as_deref().map(Patch::open).transpose()?;
    let mut targets = Vec::new();
    for (kind, ty) in [
        ("attn_output", GgmlType::Q4_K),
        ("ffn_gate", GgmlType::Q5_0),
        ("ffn_down", GgmlType::Q4_K),
    ] {
        let found = (args.block..200)
            .map(|b| format!("blk.{b}.{kind}.weight"))
            .filter_map(|name| weights.info(&name).ok().cloned())
            .find(|t| t.ty == ty && patch.as_ref().is_none_or(|p| updates(p, &t.name)));
        match found {
            Some(t) => targets.push(Target {
                name: t.name,
                ty: t.ty,
                n_in: t.ne[0] as usize,
                n_out: t.ne[1] as usize,
            }),
            None => println!("no {kind} of type {ty} from block {} on", args.block),
        }
    }

    let start = Instant::now();
    let sums = match args.moments.as_deref().filter(|p| p.is_file()) {
        Some(path) => Sums::read(path, &targets)?,
        None => {
            let sums = moments(&model, &targets, &data, args.wiki_tokens)?;
            if let Some(path) = &args.moments {
                Sums::write(&sums, path)?;
            }
            sums
        }
    };
    let [forget, held_forget, retain, held_retain] = &sums;
    println!(
        "moments of {} + {} forget and {} + {} retain tokens (calibration + held out) in {:.1} s",
        forget.n_tokens,
        held_forget.n_tokens,
        retain.n_tokens,
        held_retain.n_tokens,
        start.elapsed().as_secs_f64()
    );
    println!(
        "lambda {}, damping {}; err_F / retain noise, held out\n",
        args.lambda, args.damping
    );

    print!("| tensor | % | same-scale rounding | re-encode | re-encode + importance | feedback |");
    for p in &args.passes {
        print!(" + {p} passes |");
    }
    if args.pair_passes > 0 {
        print!(" + {} pair passes |", args.pair_passes);
    }
    if args.promote {
        print!(" fresh scales + feedback | promoted | promoted + feedback |");
    }
    println!(" codes changed | factor s | feedback s | last s |");
    for (i, t) in targets.iter().enumerate() {
        let (n_in, n_out) = (t.n_in, t.n_out);
        let fit_f = forget.mean(i);
        let fit_r = retain.mean(i);
        let held_f = held_forget.mean(i);
        let held_r = held_retain.mean(i);
        let h = mix(&fit_r, &fit_f, n_in, args.lambda);
        let importance: Vec<f32> = h.iter().step_by(n_in + 1).copied().collect();
        let timer = Instant::now();
        let factor = Factor::new(h, n_in, args.damping)?;
        let factor_s = timer.elapsed().as_secs_f64();
        let base = weights.bytes(&t.name)?;
        let w = weights.decoded(&t.name)?;
        let grid = Grid::new(t.ty, n_in)?;

        let random;
        let (a, b, rank) = match patch.as_ref().and_then(|p| update_of(p, &t.name)) {
            Some(u) => (&u.lora_a, &u.lora_b, u.rank),
            None => {
                random = random_update(&fit_f, n_in, n_out, args.seed)?;
                (&random.0, &random.1, RANK)
            }
        };
        let mut full = vec![0f32; n_in * n_out];
        let mut unit = Delta::new(n_in, n_out);
        unit.push(a, b, rank, 1.0)?;
        for (r, row) in full.chunks_exact_mut(n_in).enumerate() {
            unit.add_row(r, row);
        }
        let square = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let natural = (square(&full) / square(&w)).sqrt();

        for percent in &args.percent {
            let scale = (percent / 100.0 / natural) as f32;
            let mut delta = Delta::new(n_in, n_out);
            delta.push(a, b, rank, scale)?;
            let update = |r: usize, row: &mut [f32]| delta.add_row(r, row);
            let judge = |after: (GgmlType, &[u8])| {
                let merged = Merged {
                    before: (t.ty, base),
                    after,
                    n_in,
                    update: &update,
                };
                measure(&merged, Moments::Full(&held_f), Moments::Full(&held_r))
            };
            let round = |factor: Option<&Factor>, passes, pair_passes| -> Result<_> {
                let mut bytes = base.to_vec();
                let timer = Instant::now();
                let search = Search {
                    passes,
                    pair_passes,
                    refits: 0,
                };
                let done = round_rows(&grid, &mut bytes, &update, factor, search)?;
                Ok((judge((t.ty, &bytes))?, done, timer.elapsed().as_secs_f64()))
            };
            let target: Vec<f32> = w.iter().zip(&full).map(|(w, d)| w + scale * d).collect();
            let fresh = judge((t.ty, &quantize(t.ty.id(), &target, n_in, None)?))?;
            let weighted = judge((
                t.ty,
                &quantize(t.ty.id(), &target, n_in, Some(&importance))?,
            ))?;
            let (plain, ..) = round(None, 0, 0)?;
            let (swept, mut done, swept_s) = round(Some(&factor), 0, 0)?;
            print!("| {} {} | {percent} |", t.name, t.ty.file_name());
            for m in [&plain, &fresh, &weighted, &swept] {
                print!(" {} |", cell(m));
            }
            let mut last_s = swept_s;
            let last = args.passes.last().copied().unwrap_or(0);
            let pairs = (args.pair_passes > 0).then_some((last, args.pair_passes));
            for (passes, pair_passes) in args.passes.iter().map(|p| (*p, 0)).chain(pairs) {
                let (m, d, s) = round(Some(&factor), passes, pair_passes)?;
                print!(" {} |", cell(&m));
                (done, last_s) = (d, s);
            }
            if args.promote {
                let larger = larger(t.ty, n_in).ok_or("no larger type")?;
                for (to, f) in [
                    (t.ty, Some(&factor)),
                    (larger, None),
                    (larger, Some(&factor)),
                ] {
                    let search = Search {
                        passes: last,
                        pair_passes: 0,
                        refits: 0,
                    };
                    let from = (t.ty, base);
                    let fresh = Some(&importance[..]);
                    let (after, _) = promote_rows(from, to, n_in, &update, fresh, f, search)?;
                    print!(" {} |", cell(&judge((to, &after))?));
                }
            }
            println!(
                " {:.2}% | {factor_s:.2} | {swept_s:.2} | {last_s:.2} |",
                100.0 * done.n_changed as f64 / done.n_elements as f64
            );
        }
    }
    Ok(())
}

fn update_of<'a>(patch: &'a Patch, name: &str) -> Option<&'a nepenthe::patch::Update> {
    patch.updates.iter().find(|u| u.tensor == name)
}

fn updates(patch: &Patch, name: &str) -> bool {
    update_of(patch, name).is_some()
}

/// H_R/tr(H_R) + `lambda`·H_F/tr(H_F), scaled to a trace of about n_in, as the merge weighs its
/// captured inputs.
fn mix(retain: &[f32], forget: &[f32], n_in: usize, lambda: f64) -> Vec<f32> {
    let scale = |h: &[f32], weight: f64| {
        let trace: f64 = h.iter().step_by(n_in + 1).map(|&v| f64::from(v)).sum();
        n_in as f64 * weight / trace
    };
    let (r, f) = (scale(retain, 1.0), scale(forget, lambda));
    let both = retain.iter().zip(forget);
    both.map(|(a, b)| (r * f64::from(*a) + f * f64::from(*b)) as f32)
        .collect()
}
