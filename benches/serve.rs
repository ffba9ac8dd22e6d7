//! Stress: streaming clients while a patch is applied and revoked every second.
//!
//!     cargo bench --bench serve -- [--model GGUF] [--patch GGUF] [--scale X] [--clients N] [--seconds S]
//!         [--threads N] [--max-tokens N] [--questions FILE]
//!
//! Without a patch, a random one; it needs a scale of 20 to change most answers of the built-in
//! model, which is the default. A real patch wants `--scale 1` and, in `--questions`, what it makes
//! the model forget.
//!
//! Every question is first answered by a lone client, under each of the two sets. Under load an
//! answer says which set it was made under, and must be that set's. Sums are rounded otherwise
//! when a prompt's beginning is kept from another, or when several texts share a batch, so that
//! where two tokens are about as likely as each other another may be taken than alone. An answer
//! that differs is therefore scored, alone, under both sets. Its gap under a set is the largest
//! number of nats, over its tokens, by which another token was likelier. It passes as a near tie
//! if its gap is smaller under the set it names than under the other one, and no larger than that
//! of a lone answer under its own set can be, [`NOISE`] times the largest seen of these; it counts
//! as wrong otherwise. The lone answers are scored under the other set too, to show that the gaps
//! tell the sets apart.

#[path = "../tests/support/http.rs"]
mod http;
#[path = "../tests/support/mod.rs"]
mod support;

use http::{Client, Response, Streamed};
use nepenthe::data::{Message, Record, Role, build_prompt, load_records};
use nepenthe::runtime::{Options as RuntimeOptions, Runtime};
use nepenthe::serve::{Key, Keys, Options, Server};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// A rounding may move both tokens of a near tie, and there are many more answers than lone ones.
const NOISE: f64 = 3.0;
const PATCH_KEY: &str = "bench";
/// Of a small model's kind, short and long.
const BUILT_IN: [&str; 12] = [
    "Where was Lioba Hartsong born?",
    "What pet does Lioba Pellgrave have?",
    "In which city is the Louvre museum?",
    "Which city is the capital of Germany?",
    "What is the capital of Kenya?",
    "Who wrote Romeo and Juliet, and when was it first performed?",
    "Name three rivers of Europe and say where each of them ends.",
    "Why is the sky blue?",
    "Give me a recipe for a simple soup with carrots, onions and whatever else is at hand.",
    "What is seven times eight?",
    "Tell me a short story about a dog that learns to sail.",
    "How does a bicycle stay upright?",
];

/// The questions of this run.
static QUESTIONS: OnceLock<Vec<String>> = OnceLock::new();

fn question(at: usize) -> &'static str {
    &QUESTIONS.get().expect("set at the start")[at]
}

/// Those of a file of questions and answers, the first of each 3, or the built-in ones.
fn questions(file: Option<&Path>) -> Vec<String> {
    let Some(file) = file else {
        return BUILT_IN.map(str::to_owned).to_vec();
    };
    let records = load_records(file).expect("a file of questions");
    let question = |r: Record| match r {
        Record::Qa { question, .. } => Some(question),
        _ => None,
    };
    let all = records.into_iter().filter_map(question);
    all.step_by(3).take(BUILT_IN.len()).collect()
}

struct Args {
    model: PathBuf,
    questions: Option<PathBuf>,
    patch: Option<PathBuf>,
    scale: f32,
    clients: usize,
    seconds: u64,
    threads: usize,
    max_tokens: usize,
}

fn args() -> Args {
    let mut args = Args {
        model: support::mini(),
        questions: None,
        patch: None,
        scale: 20.0,
        clients: 8,
        seconds: 60,
        threads: 1,
        max_tokens: 48,
    };
    let mut given = std::env::args().skip(1).filter(|a| a != "--bench");
    while let Some(flag) = given.next() {
        let value = given
            .next()
            .unwrap_or_else(|| panic!("{flag} wants a value"));
        let number = || value.parse().unwrap_or_else(|_| panic!("{flag}: {value}"));
        match flag.as_str() {
            "--model" => args.model = value.into(),
            "--questions" => args.questions = Some(value.into()),
            "--patch" => args.patch = Some(value.into()),
            "--scale" => args.scale = value.parse().expect("a number"),
            "--clients" => args.clients = number(),
            "--seconds" => args.seconds = number() as u64,
            "--threads" => args.threads = number(),
            "--max-tokens" => args.max_tokens = number(),
            _ => panic!("no flag {flag}"),
        }
    }
    args
}

/// What one request came to.
struct Seen {
    question: usize,
    status: u16,
    fingerprint: String,
    text: String,
    tokens: Vec<i32>,
    finish: String,
    first: Duration,
    all: Duration,
}

fn ask(client: &Client, at: usize, max_tokens: usize) -> Seen {
    let begun = Instant::now();
    let response = client.post(
        "/v1/chat/completions",
        &json!({
            "messages": [{"role": "user", "content": question(at)}],
            "temperature": 0, "max_tokens": max_tokens, "stream": true, "logprobs": true,
        }),
    );
    let status = response.status;
    let mut seen = Seen {
        question: at,
        status,
        fingerprint: String::new(),
        text: String::new(),
        tokens: Vec::new(),
        finish: String::new(),
        first: Duration::ZERO,
        all: Duration::ZERO,
    };
    if status != 200 {
        return seen;
    }
    let mut streamed = Streamed::default();
    for data in response.events() {
        streamed.see(&data);
        if seen.first.is_zero() && !streamed.text.is_empty() {
            seen.first = begun.elapsed();
        }
    }
    assert!(streamed.is_done, "a stream that broke off");
    seen.all = begun.elapsed();
    Seen {
        fingerprint: streamed.fingerprint,
        text: streamed.text,
        tokens: streamed.tokens,
        finish: streamed.finish,
        ..seen
    }
}

/// The largest number of nats by which another token was likelier than the answer's, at any of
/// its tokens, under the set that is active.
fn gap(client: &Client, runtime: &Runtime, answer: &Seen) -> f64 {
    let message = Message {
        role: Role::User,
        content: question(answer.question).to_owned(),
    };
    let prompt = build_prompt(&[message], runtime.model(), runtime.template());
    let mut tokens = prompt.expect("answered before");
    let n_prompt = tokens.len();
    tokens.extend(&answer.tokens);
    if answer.finish == "stop" {
        tokens.extend(runtime.model().eos());
    }
    let scored = client.post(
        "/v1/completions",
        &json!({"prompt": tokens, "echo": true, "logprobs": 1, "max_tokens": 0}),
    );
    let scored = scored.json(200)["choices"][0]["logprobs"].take();
    let numbers = |v: &Value| v.as_f64().expect("a number");
    let chosen = scored["token_logprobs"].as_array().expect("a list");
    let top = scored["top_logprobs"].as_array().expect("a list");
    chosen
        .iter()
        .zip(top)
        .skip(n_prompt)
        .take(tokens.len() - n_prompt)
        .map(|(p, best)| {
            let best = best.as_object().and_then(|m| m.values().next());
            numbers(best.expect("one")) - numbers(p)
        })
        .fold(0.0, f64::max)
}

fn percentile(sorted: &[Duration], q: f64) -> f64 {
    let at = ((sorted.len() as f64 * q).ceil() as usize).clamp(1, sorted.len());
    1e3 * sorted[at - 1].as_secs_f64()
}

fn table(name: &str, mut times: Vec<Duration>) {
    times.sort();
    if !times.is_empty() {
        println!(
            "{name:<24} {:>7.0} {:>7.0} {:>7.0} {:>7.0}   ({} of them)",
            percentile(&times, 0.5),
            percentile(&times, 0.95),
            percentile(&times, 0.99),
            percentile(&times, 1.0),
            times.len()
        );
    }
}

fn main() {
    let args = args();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let patch = args
        .patch
        .clone()
        .unwrap_or_else(|| support::small_patch(&args.model, dir.path(), "small.gguf", 1));
    let runtime = Runtime::open(
        &args.model,
        RuntimeOptions {
            n_ctx: 512,
            n_threads: args.threads,
            ..RuntimeOptions::default()
        },
    )
    .expect("a model");
    let options = Options {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        slots: args.clients,
        queue: args.clients,
        keys: Keys {
            api: Vec::new(),
            patch: vec![Key::new(PATCH_KEY)],
        },
        loras: vec![(patch, 0.0)],
        ..Options::default()
    };
    let server = Server::start(runtime.clone(), options).expect("a server");
    let client = Client::new(server.address());
    let manager = client.with_key(PATCH_KEY);
    let set_scale = |scale: f32| -> Response {
        manager.post("/lora-adapters", &json!([{"id": 0, "scale": scale}]))
    };
    let n = QUESTIONS
        .get_or_init(|| questions(args.questions.as_deref()))
        .len();

    // Alone.
    let mut alone: BTreeMap<String, Vec<Seen>> = BTreeMap::new();
    let mut fingerprints = Vec::new();
    for scale in [0.0, args.scale] {
        set_scale(scale).json(200);
        let answers: Vec<Seen> = (0..n).map(|q| ask(&client, q, args.max_tokens)).collect();
        fingerprints.push(answers[0].fingerprint.clone());
        alone.insert(answers[0].fingerprint.clone(), answers);
    }
    let told_apart = (0..n)
        .filter(|&q| alone[&fingerprints[0]][q].text != alone[&fingerprints[1]][q].text)
        .count();
    // Lone answers under their own set and under the other.
    let (mut own, mut crossed) = (0f64, Vec::new());
    for (at, scale) in [(0, 0.0), (1, args.scale)] {
        set_scale(scale).json(200);
        let score = |a: &Seen| gap(&client, &runtime, a);
        own = alone[&fingerprints[at]]
            .iter()
            .map(score)
            .fold(own, f64::max);
        let differs = |a: &&Seen| a.text != alone[&fingerprints[at]][a.question].text;
        let others = alone[&fingerprints[1 - at]].iter().filter(differs);
        crossed.extend(others.map(score));
    }
    crossed.sort_by(f64::total_cmp);
    println!(
        "{told_apart} of {n} questions are answered differently under the two sets; lone answers \
         have gaps of at most {own:.4} nats under their own set, and of {crossed:.3?} under the other"
    );

    // Under load.
    let seen = Mutex::new(Vec::new());
    let is_over = AtomicBool::new(false);
    let mut changes = Vec::new();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for c in 0..args.clients {
            let (client, seen, is_over) = (&client, &seen, &is_over);
            scope.spawn(move || {
                let mut question = c;
                while !is_over.load(Ordering::Relaxed) {
                    let one = ask(client, question % n, args.max_tokens);
                    seen.lock().expect("no panic").push(one);
                    question += 5;
                }
            });
        }
        let mut scale = 0.0;
        while begun.elapsed() < Duration::from_secs(args.seconds) {
            std::thread::sleep(Duration::from_secs(1));
            scale = args.scale - scale;
            let asked = Instant::now();
            set_scale(scale).json(200);
            changes.push(asked.elapsed());
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let took = begun.elapsed().as_secs_f64();
    let seen = seen.into_inner().expect("no panic");

    // What came of it.
    let mut by_status: BTreeMap<u16, usize> = BTreeMap::new();
    let mut by_set: BTreeMap<&str, usize> = BTreeMap::new();
    let mut differing: BTreeMap<(String, usize, String), (usize, &Seen)> = BTreeMap::new();
    for s in &seen {
        *by_status.entry(s.status).or_default() += 1;
        if s.status != 200 {
            continue;
        }
        let at = fingerprints.iter().position(|f| *f == s.fingerprint);
        let set = at.map_or("neither", |at| ["without", "with"][at]);
        *by_set.entry(set).or_default() += 1;
        let expected = alone
            .get(&s.fingerprint)
            .map(|a| a[s.question].text.as_str());
        if expected != Some(&s.text) {
            let key = (s.fingerprint.clone(), s.question, s.text.clone());
            differing.entry(key).or_insert((0, s)).0 += 1;
        }
    }
    let mut gaps: BTreeMap<&(String, usize, String), [f64; 2]> = BTreeMap::new();
    for (at, scale) in [(0, 0.0), (1, args.scale)] {
        set_scale(scale).json(200);
        for (key, (_, s)) in &differing {
            gaps.entry(key).or_default()[at] = gap(&client, &runtime, s);
        }
    }
    let (mut ties, mut wrong, mut widest) = (0, 0, 0f64);
    for (key, (count, s)) in &differing {
        let named = fingerprints.iter().position(|f| *f == s.fingerprint);
        let (here, there) = named.map_or((f64::INFINITY, 0.0), |at| {
            (gaps[key][at], gaps[key][1 - at])
        });
        if here < there && here <= NOISE * own {
            ties += count;
            widest = widest.max(here);
        } else {
            wrong += count;
            println!(
                "wrong ({here:.3} nats, {there:.3} under the other set): {:?}",
                s.text
            );
        }
    }
    let n_ok = by_status.get(&200).copied().unwrap_or(0);
    println!(
        "{} clients, {took:.0} s, {} changes: {} answers, by status {by_status:?}, by set {by_set:?}",
        args.clients,
        changes.len(),
        seen.len()
    );
    println!(
        "as alone: {}; near ties: {ties} (gaps of at most {widest:.4} nats); wrong: {wrong}",
        n_ok - ties - wrong
    );
    println!(
        "{:<24} {:>7} {:>7} {:>7} {:>7}",
        "ms", "p50", "p95", "p99", "max"
    );
    let ok = || seen.iter().filter(|s| s.status == 200);
    table("first token", ok().map(|s| s.first).collect());
    table("whole answer", ok().map(|s| s.all).collect());
    table("apply or revoke", changes);
    let metrics = client.get("/metrics").text();
    for line in metrics
        .lines()
        .filter(|l| l.contains("_total ") && !l.starts_with('#'))
    {
        println!("{line}");
    }
    server
        .stop(Duration::from_secs(5))
        .expect("a server that ran");
    let unexpected: usize = by_status
        .iter()
        .filter(|(status, _)| ![200, 429].contains(*status))
        .map(|(_, n)| n)
        .sum();
    assert_eq!(
        (wrong, unexpected),
        (0, 0),
        "wrong answers, errors other than 429"
    );
    let can_tell = crossed.last().is_some_and(|widest| *widest > NOISE * own);
    assert!(told_apart > 0 && can_tell, "the sets must differ");
}
