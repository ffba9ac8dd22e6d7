//! RILA and retain bases of all adaptable tensors: the solve beside the forward pass that feeds
//! it, and beside a dense eigendecomposition of the same covariances.
//!
//! `cargo bench --bench subspace -- [--model GGUF] [--data DIR] [--threads N] [--rounds N]`
//! `cargo bench --bench subspace -- --shape 1b|8b [--numpy PYTHON] [--rounds N]`
//!
//! With `--shape`, one tensor of every width of such a Llama, random outputs, one thread: ours
//! beside the dense way in faer (up to its limit of 4,096) and in NumPy (`subspace_numpy.py`).

mod support;

use nepenthe::capture::pooled_outputs;
use nepenthe::graph::trace::trace;
use nepenthe::model::OpenModel;
use nepenthe::rng::SplitMix64;
use nepenthe::subspace::{Moments, Pooled, Retain, SubspaceConfig, solve, solve_all, solve_dense};
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use support::{Args, Fallible, Sets, cpu_seconds, median};

fn main() -> Fallible<()> {
    let args = Args::parse();
    if let Some(shape) = args.value("--shape") {
        return shapes(shape, &args);
    }
    let Some((model, data)) = args.inputs() else {
        return Ok(());
    };
    let rounds: usize = args.value("--rounds").unwrap_or("3").parse()?;
    let open = OpenModel::open(&model, 0)?;
    let adaptable = trace(&open.model, &open.weights)?.adaptable;
    let sets = Sets::load(&open, &data)?;
    let config = SubspaceConfig::default();
    println!(
        "{} tensors, {} forget and {} retain samples, rank {}, k {}",
        adaptable.len(),
        sets.forget.len(),
        sets.retain.len(),
        config.rank,
        config.retain_rank
    );
    println!("{:<36} {:>8} {:>8}", "", "wall s", "CPU s");
    let row = |name: &str, (wall, cpu): (f64, f64)| println!("{name:<36} {wall:>8.3} {cpu:>8.3}");
    for n_threads in args.threads()? {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .build()?;
        let mut outputs = Vec::new();
        let forward = timed(1, || {
            let mut quiet = |_| {};
            for samples in [&sets.forget, &sets.retain] {
                outputs.push(pooled_outputs(
                    &open.model,
                    &adaptable,
                    samples,
                    n_threads,
                    &mut quiet,
                )?);
            }
            Ok(())
        })?;
        row(&format!("forward pass, {n_threads} thread(s)"), forward);
        let pooled: Vec<Pooled<'_>> = outputs[0]
            .iter()
            .zip(&outputs[1])
            .map(|(f, r)| Pooled {
                tensor: &f.tensor.name,
                n_out: f.tensor.n_out,
                forget: &f.h,
                retain: Retain::Pooled(&r.h),
            })
            .collect();
        let solved = timed(rounds, || {
            pool.install(|| solve_all(&config, &pooled))?;
            Ok(())
        })?;
        row("all tensors, thin QR", solved);
        if n_threads == 1 {
            pool.install(|| dense(&config, &outputs, rounds, &row))?;
        }
    }
    Ok(())
}

/// Samples of the forget and the retain set.
const SAMPLES: [usize; 2] = [40, 160];
/// Above this, covariances are not formed.
const DENSE: usize = 4096;

fn shapes(shape: &str, args: &Args) -> Fallible<()> {
    let widths = match shape {
        "1b" => [512, 2048, 8192],
        "8b" => [1024, 4096, 14336],
        other => return Err(format!("--shape: wanted 1b or 8b, found {other}").into()),
    };
    let rounds = args.number("--rounds")?.unwrap_or(1);
    let config = SubspaceConfig::default();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    println!(
        "{:>6} {:>12} {:>12} {:>12}",
        "n_out", "ours, CPU s", "faer, dense", "NumPy, dense"
    );
    for n_out in widths {
        let mut rng = SplitMix64(n_out as u64);
        let [h_f, h_r] = SAMPLES.map(|n| {
            let values = (0..n * n_out).map(|_| rng.normal());
            values.collect::<Vec<f32>>()
        });
        let (_, ours) = pool.install(|| {
            timed(rounds, || {
                solve(&config, "tensor", &h_f, &h_r, n_out)?;
                Ok(())
            })
        })?;
        let faer = match n_out <= DENSE {
            true => {
                let (_, s) = pool.install(|| timed(1, || densely(&config, &h_f, &h_r, n_out)))?;
                format!("{s:.2}")
            }
            false => "-".into(),
        };
        let numpy = match args.value("--numpy") {
            Some(python) if n_out <= DENSE => numpy(python, n_out, &config)?,
            _ => "-".into(),
        };
        println!("{n_out:>6} {ours:>12.3} {faer:>12} {numpy:>12}");
    }
    Ok(())
}

fn densely(config: &SubspaceConfig, h_f: &[f32], h_r: &[f32], n_out: usize) -> Fallible<()> {
    let moments = |h: &[f32]| -> Fallible<Moments> {
        let mut m = Moments::new(n_out)?;
        m.push("tensor", h)?;
        Ok(m)
    };
    solve_dense(config, "tensor", &moments(h_f)?, &moments(h_r)?)?;
    Ok(())
}

/// CPU seconds, as printed.
fn numpy(python: &str, n_out: usize, config: &SubspaceConfig) -> Fallible<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/subspace_numpy.py");
    let [n_f, n_r] = SAMPLES;
    let sizes = [n_out, n_f, n_r, config.rank, config.retain_rank].map(|n| n.to_string());
    let out = Command::new(python)
        .arg(script)
        .args(sizes)
        .arg(config.beta.to_string())
        .envs([("OPENBLAS_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "1")])
        .output()?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into_owned().into());
    }
    let seconds: f64 = String::from_utf8(out.stdout)?.trim().parse()?;
    Ok(format!("{seconds:.2}"))
}

/// One tensor of every width of the first block, both ways.
fn dense(
    config: &SubspaceConfig,
    outputs: &[Vec<nepenthe::capture::PooledOutputs>],
    rounds: usize,
    row: &impl Fn(&str, (f64, f64)),
) -> Fallible<()> {
    let mut widths = Vec::new();
    for (f, r) in outputs[0].iter().zip(&outputs[1]) {
        let n_out = f.tensor.n_out;
        if widths.contains(&n_out) {
            continue;
        }
        widths.push(n_out);
        let name = &f.tensor.name;
        let thin = timed(rounds, || {
            solve(config, name, &f.h, &r.h, n_out)?;
            Ok(())
        })?;
        let full = timed(rounds, || densely(config, &f.h, &r.h, n_out))?;
        row(&format!("{name} [{n_out}], thin QR"), thin);
        row("  dense", full);
        println!("  ratio {:.1}x", full.1 / thin.1);
    }
    Ok(())
}

/// Medians of wall and CPU seconds of one call; short calls are repeated within a round, since
/// CPU time comes in ticks of 10 ms.
fn timed(rounds: usize, mut work: impl FnMut() -> Fallible<()>) -> Fallible<(f64, f64)> {
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (began, before) = (Instant::now(), cpu_seconds()?);
        let mut calls = 0.0;
        while calls < 1.0 || (rounds > 1 && began.elapsed().as_secs_f64() < 0.5) {
            work()?;
            calls += 1.0;
        }
        wall.push(began.elapsed().as_secs_f64() / calls);
        cpu.push((cpu_seconds()? - before) / calls);
    }
    Ok((median(wall), median(cpu)))
}
