//! One ReGLU training step (4 forget + 4 retain TOFU samples) beside a forward pass alone and
//! beside the PyTorch reference, interleaved in one run.
//!
//! `cargo bench --bench step -- [--model GGUF] [--data DIR] [--torch PYTHON] [--threads N]
//! [--rounds N]`
//!
//! Every contender is a process of its own that answers one line per measurement, so that peak
//! memory is its own and none is measured twice in a row. A peak counts from the end of loading
//! on and includes the mapped pages of the model file.

mod support;

use nepenthe::data::Sample;
use nepenthe::ggml::{Batch, Context, ContextOptions};
use nepenthe::model::OpenModel;
use nepenthe::start::{start, subspace_config, subspaces};
use nepenthe::train::config::{Constraint, UnlearnConfig};
use nepenthe::train::engine::Engine;
use nepenthe::train::trainer::{Forget, StepBatch, Trainer};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;
use support::{Args, Fallible, Sets, cpu_seconds, median, peak_bytes};

/// Samples of either set in a step: 526 tokens, 319 of them answers, with Gemma's vocabulary.
const BATCH: Range<usize> = 16..20;
const N: usize = BATCH.end - BATCH.start;
const TORCH: [(&str, &str); 4] = [
    ("official", "f32"),
    ("official", "bf16"),
    ("tuned", "f32"),
    ("tuned", "bf16"),
];

fn main() -> Fallible<()> {
    let args = Args::parse();
    let Some((model, data)) = args.inputs() else {
        return Ok(());
    };
    let threads = args.threads()?;
    if let Some(contender) = args.value("--contender") {
        return contend(contender, &model, &data, threads[0]);
    }
    let bench = Bench {
        model,
        data,
        torch: args.value("--torch").map(str::to_owned),
        rounds: args.value("--rounds").unwrap_or("5").parse()?,
    };
    threads.into_iter().try_for_each(|t| bench.run(t))
}

fn batch(sets: &Sets) -> impl Iterator<Item = &Sample> {
    sets.forget[BATCH].iter().chain(&sets.retain[BATCH])
}

// ---- a contender: one process, one measurement a line --------------------------------------

/// What a measurement gives: seconds, bytes, and losses to see that all compute the same.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Report {
    wall: f64,
    cpu: f64,
    peak: f64,
    forget: Option<f64>,
    retain: Option<f64>,
}

fn contend(contender: &str, model: &Path, data: &Path, n_threads: usize) -> Fallible<()> {
    nepenthe::ggml::return_large_blocks();
    match contender {
        "ours" => ours(model, data, n_threads),
        "llama" => llama(model, data, n_threads),
        other => Err(format!("no contender is called {other}").into()),
    }
}

fn ours(model: &Path, data: &Path, n_threads: usize) -> Fallible<()> {
    let open = OpenModel::open(model, 0)?;
    let sets = Sets::load(&open, data)?;
    let config = UnlearnConfig::default();
    let engine = Engine::new(&open, n_threads, config.train.micro_tokens)?;
    let adaptable = engine.template.adaptable.clone();
    let found = subspaces(
        &open,
        &adaptable,
        (&sets.forget, &sets.retain),
        None,
        &subspace_config(&config),
        n_threads,
        None,
        &mut |_, _| {},
    )?;
    let pairs = start(&open, &adaptable, found, &config)?;
    // As `unlearn` does: what llama.cpp read of the file is not needed any more.
    open.release();
    let mut trainer = Trainer::new(engine, pairs)?;
    let step = StepBatch {
        forget: sets.forget[BATCH]
            .iter()
            .map(|sample| Forget {
                sample,
                preferred: None,
                reference: 0.0,
            })
            .collect(),
        retain: sets.retain[BATCH].iter().collect(),
        forget_share: 1.0,
    };
    let samples: Vec<&Sample> = batch(&sets).collect();
    assert_eq!(config.train.constraint, Constraint::Project);
    serve(|work| match work {
        "step" => {
            let r = trainer.step(&config.train, &step, config.train.lr)?;
            Ok((r.forget, r.retain))
        }
        _ => {
            let losses = trainer.losses(&samples)?;
            let mean = |part: &[nepenthe::likelihood::SampleLoss]| {
                let n: usize = part.iter().map(|l| l.n_tokens).sum();
                Some(part.iter().map(|l| l.nll).sum::<f64>() / n as f64)
            };
            Ok((mean(&losses[..N]), mean(&losses[N..])))
        }
    })
}

/// llama.cpp's own forward pass over the same samples, logits at the answer rows.
fn llama(model: &Path, data: &Path, n_threads: usize) -> Fallible<()> {
    let open = OpenModel::open(model, 0)?;
    let sets = Sets::load(&open, data)?;
    let samples: Vec<&Sample> = batch(&sets).collect();
    let mut context = Context::new(
        &open.model,
        ContextOptions {
            n_ctx: 1024,
            n_batch: 1024,
            n_seq_max: samples.len() as u32,
            n_threads,
            ..ContextOptions::default()
        },
    )?;
    serve(|_| {
        context.clear();
        let mut batch = Batch::default();
        for (seq, s) in samples.iter().enumerate() {
            for (i, &token) in s.tokens[..s.tokens.len() - 1].iter().enumerate() {
                let want = s.answers.iter().any(|a| a.contains(&(i + 1)));
                batch.push(token, i as i32, seq as i32, want);
            }
        }
        context.decode(&mut batch)?;
        Ok((None, None))
    })
}

/// Answer every line of stdin with a measurement of `work`.
fn serve(mut work: impl FnMut(&str) -> Fallible<(Option<f64>, Option<f64>)>) -> Fallible<()> {
    // The peak of loading is not the peak of training. Refused by some sandboxes: then it is.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    for line in std::io::stdin().lock().lines() {
        let (began, cpu) = (Instant::now(), cpu_seconds()?);
        let (forget, retain) = work(line?.trim())?;
        let report = Report {
            wall: began.elapsed().as_secs_f64(),
            cpu: cpu_seconds()? - cpu,
            peak: peak_bytes()?,
            forget,
            retain,
        };
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}

// ---- the race ------------------------------------------------------------------------------

struct Bench {
    model: PathBuf,
    data: PathBuf,
    torch: Option<String>,
    rounds: usize,
}

#[derive(Serialize)]
struct Job<'a> {
    lr: f32,
    forget: Vec<JobSample<'a>>,
    retain: Vec<JobSample<'a>>,
}

#[derive(Serialize)]
struct JobSample<'a> {
    tokens: &'a [i32],
    answers: Vec<[usize; 2]>,
}

struct Racer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Racer {
    fn start(command: &mut Command) -> Fallible<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        Ok(Self {
            child,
            stdin: stdin.expect("piped"),
            stdout: BufReader::new(stdout.expect("piped")),
        })
    }

    fn measure(&mut self, work: &str) -> Fallible<Report> {
        writeln!(self.stdin, "{work}")?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        serde_json::from_str(&line)
            .map_err(|e| format!("a contender answered {line:?}: {e}").into())
    }

    fn stop(mut self) -> Fallible<()> {
        drop(self.stdin);
        self.child.wait()?;
        Ok(())
    }
}

fn middle(of: &[Report], what: impl Fn(&Report) -> f64) -> f64 {
    median(of.iter().map(what).collect())
}

fn row(name: &str, reports: &[Report]) {
    println!(
        "{name:<24} {:>7.2} {:>7.2} {:>8.0}",
        middle(reports, |r| r.wall),
        middle(reports, |r| r.cpu),
        reports.iter().map(|r| r.peak).fold(0.0, f64::max) / 1e6,
    );
}

impl Bench {
    fn own(&self, contender: &str, n_threads: usize) -> Fallible<Racer> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args([
                "--contender",
                contender,
                "--threads",
                &n_threads.to_string(),
            ])
            .arg("--model")
            .arg(&self.model)
            .arg("--data")
            .arg(&self.data)
            .env("RAYON_NUM_THREADS", n_threads.to_string());
        Racer::start(&mut command)
    }

    fn write_job(&self, path: &Path) -> Fallible<()> {
        let open = OpenModel::open(&self.model, 0)?;
        let sets = Sets::load(&open, &self.data)?;
        fn part(samples: &[Sample]) -> Vec<JobSample<'_>> {
            let job = samples[BATCH].iter().map(|s| JobSample {
                tokens: &s.tokens,
                answers: s.answers.iter().map(|a| [a.start, a.end]).collect(),
            });
            job.collect()
        }
        let job = Job {
            lr: UnlearnConfig::default().train.lr,
            forget: part(&sets.forget),
            retain: part(&sets.retain),
        };
        std::fs::write(path, serde_json::to_vec(&job)?)?;
        let tokens: usize = batch(&sets).map(|s| s.tokens.len()).sum();
        let answers: usize = batch(&sets).map(Sample::n_answer_tokens).sum();
        println!("{N} + {N} samples, {tokens} tokens, {answers} of them answers");
        Ok(())
    }

    fn run(&self, n_threads: usize) -> Fallible<()> {
        let work = tempfile::tempdir()?;
        let job = work.path().join("job.json");
        println!("\n{n_threads} thread(s), medians of {} rounds", self.rounds);
        self.write_job(&job)?;
        let mut ours = self.own("ours", n_threads)?;
        let mut llama = self.own("llama", n_threads)?;
        let first = ours.measure("forward")?;
        // Not counted: copies are made, pages mapped, threads started.
        ours.measure("step")?;
        llama.measure("forward")?;
        println!("{:<24} {:>7} {:>7} {:>8}", "", "wall s", "CPU s", "peak MB");
        let (mut f, mut l) = (vec![], vec![]);
        for _ in 0..self.rounds {
            l.push(llama.measure("forward")?);
            f.push(ours.measure("forward")?);
        }
        row("llama.cpp forward", &l);
        row("ours forward", &f);
        llama.stop()?;
        let Some(python) = &self.torch else {
            let steps: Fallible<Vec<_>> = (0..self.rounds).map(|_| ours.measure("step")).collect();
            row("ours step", &steps?);
            println!("torch: no --torch PYTHON given, left out");
            return ours.stop();
        };
        for (style, dtype) in TORCH {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/step_torch.py");
            let mut torch = Racer::start(
                Command::new(python)
                    .arg(script)
                    .arg(&self.model)
                    .arg(&job)
                    .args(["--style", style, "--dtype", dtype])
                    .args(["--threads", &n_threads.to_string()]),
            )?;
            let same = torch.measure("forward")?;
            torch.measure("step")?;
            let (mut forward, mut step, mut own) = (vec![], vec![], vec![]);
            for _ in 0..self.rounds {
                step.push(torch.measure("step")?);
                own.push(ours.measure("step")?);
                forward.push(torch.measure("forward")?);
            }
            torch.stop()?;
            row("ours step", &own);
            row(&format!("torch {style} {dtype} step"), &step);
            row("  forward alone", &forward);
            let ratio = |what: fn(&Report) -> f64| middle(&step, what) / middle(&own, what);
            println!(
                "  step over ours: wall {:.2}x, CPU {:.2}x, memory {:.2}x; retain loss of the same \
                 forward pass {:.4}, ours {:.4}",
                ratio(|r| r.wall),
                ratio(|r| r.cpu),
                ratio(|r| r.peak),
                same.retain.unwrap_or(f64::NAN),
                first.retain.unwrap_or(f64::NAN),
            );
        }
        ours.stop()
    }
}
