//! What a patch costs a program that embeds the runtime, in one run: how long `apply` takes, part
//! by part, and how much slower tokens come with the patch than without.
//!
//! `cargo bench --bench apply -- --model GGUF --patch GGUF [--threads N] [--rounds N] [--tokens N]`
//!
//! Rounds alternate between the two states of one session; medians. A round generates up to the given
//! number of tokens in both, from the same raw text.

mod support;

use nepenthe::runtime::{Generate, Options, Prompt, Runtime, Session};
use std::path::Path;
use std::time::Instant;
use support::{Args, Fallible};

const TEXT: &str = "The library stood at the end of the street, and on most days";

fn main() -> Fallible<()> {
    let args = Args::parse();
    let (Some(model), Some(patch)) = (args.value("--model"), args.value("--patch")) else {
        println!("skipped: --model and --patch say what to run");
        return Ok(());
    };
    let rounds = args.number("--rounds")?.unwrap_or(9);
    let n_tokens = args.number("--tokens")?.unwrap_or(64);
    let options = |prove| -> Fallible<Options> {
        Ok(Options {
            n_ctx: 512,
            n_threads: args.number("--threads")?.unwrap_or(1),
            prove,
            ..Options::default()
        })
    };
    let (model, patch) = (Path::new(model), Path::new(patch));
    let proved = applied(&Runtime::open(model, options(true)?)?, patch, rounds)?;
    let runtime = Runtime::open(model, options(false)?)?;
    let trusted = applied(&runtime, patch, rounds)?;
    let first = |times: &[f64]| times.first().copied().unwrap_or(f64::NAN) * 1e3;
    println!("apply, ms: first, median of {rounds}");
    for (what, times) in [("with its canaries", &proved), ("without", &trusted)] {
        let rest = median(times.clone()) * 1e3;
        println!("  {what:<18} {:>8.1} {rest:>8.1}", first(times));
    }
    let mut session = runtime.session()?;
    let (mut bare, mut patched) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        bare.push(seconds_a_token(&mut session, n_tokens)?);
        let id = runtime.apply(patch, 1.0)?;
        session.refresh()?;
        patched.push(seconds_a_token(&mut session, n_tokens)?);
        runtime.revoke(id)?;
        session.refresh()?;
    }
    let ratios: Vec<f64> = patched.iter().zip(&bare).map(|(p, b)| p / b).collect();
    println!(
        "a token, ms: {:.2} without, {:.2} with the patch: {:.3}x (median of {rounds} pairs)",
        median(bare) * 1e3,
        median(patched) * 1e3,
        median(ratios)
    );
    Ok(())
}

/// Seconds of each `apply`; revoked after each.
fn applied(runtime: &Runtime, patch: &Path, rounds: usize) -> Fallible<Vec<f64>> {
    (0..rounds)
        .map(|_| {
            let began = Instant::now();
            let id = runtime.apply(patch, 1.0)?;
            let took = began.elapsed().as_secs_f64();
            runtime.revoke(id)?;
            Ok(took)
        })
        .collect()
}

/// Seconds between tokens after the first: decoding alone, without the prompt.
fn seconds_a_token(session: &mut Session, n_tokens: usize) -> Fallible<f64> {
    let options = Generate {
        max_tokens: n_tokens,
        ..Generate::default()
    };
    let mut began = None;
    let mut seen = 0usize;
    let mut took = 0.0;
    session.generate(Prompt::Raw(TEXT), &options, &mut |_| {
        let start = *began.get_or_insert_with(Instant::now);
        took = start.elapsed().as_secs_f64();
        seen += 1;
        true
    })?;
    if seen < 2 {
        return Err("the model ends after one token: nothing to time".into());
    }
    Ok(took / (seen - 1) as f64)
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of.get(of.len() / 2).copied().unwrap_or(f64::NAN)
}
