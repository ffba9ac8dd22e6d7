//! RILA and retain bases of all adaptable tensors: the solve beside the forward pass that feeds
//! it, and beside a dense eigendecomposition of the same covariances.
//!
//! `cargo bench --bench subspace -- [--model GGUF] [--data DIR] [--threads N] [--rounds N]`

mod support;

use nepenthe::capture::pooled_outputs;
use nepenthe::graph::trace::trace;
use nepenthe::model::OpenModel;
use nepenthe::subspace::{Moments, Pooled, Retain, SubspaceConfig, solve, solve_all, solve_dense};
use std::time::Instant;
use support::{Args, Fallible, Sets, cpu_seconds, median};

fn main() -> Fallible<()> {
    let args = Args::parse();
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
        let full = timed(rounds, || {
            let moments = |h: &[f32]| -> Fallible<Moments> {
                let mut m = Moments::new(n_out)?;
                m.push(name, h)?;
                Ok(m)
            };
            solve_dense(config, name, &moments(&f.h)?, &moments(&r.h)?)?;
            Ok(())
        })?;
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
