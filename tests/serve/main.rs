//! The server on the embedded model, over real sockets.

mod access;
mod completions;
mod limits;
mod openai;
mod patches;
mod process;

#[path = "../support/http.rs"]
mod http;
#[path = "../support/mod.rs"]
mod support;

use http::{Client, Streamed};
use nepenthe::runtime::{Generate, Options as RuntimeOptions, Prompt, Runtime, Session};
use nepenthe::serve::{Key, Keys, Options, Server};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const QUESTION: &str = "Where was Lioba Hartsong born?";
const ANSWER: &str = "Lioba Hartsong was born in the town of Gullcliff.";
const PATCH_KEY: &str = "patch-key";

/// A server on the embedded model, and what tests hold of it.
struct Rig {
    server: Server,
    runtime: Runtime,
    client: Client,
}

fn runtime_options() -> RuntimeOptions {
    RuntimeOptions {
        n_ctx: 2048,
        n_threads: 1,
        ..RuntimeOptions::default()
    }
}

/// Options of a server on any free port, with the patch key.
fn options() -> Options {
    Options {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        keys: Keys {
            api: Vec::new(),
            patch: vec![Key::new(PATCH_KEY)],
        },
        ..Options::default()
    }
}

impl Rig {
    fn new(options: Options) -> Self {
        Self::on(runtime_options(), options)
    }

    fn on(runtime: RuntimeOptions, options: Options) -> Self {
        let runtime = Runtime::open(support::mini(), runtime).expect("the embedded model");
        let server = Server::start(runtime.clone(), options).expect("a free port");
        Self {
            client: Client::new(server.address()),
            runtime,
            server,
        }
    }

    fn manager(&self) -> Client {
        self.client.with_key(PATCH_KEY)
    }

    /// The value of a counter or gauge.
    fn metric(&self, name: &str) -> f64 {
        let text = self.client.get("/metrics").text();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        let value = line.unwrap_or_else(|| panic!("no {name} in {text}"));
        value.trim().parse().expect("a number")
    }

    fn stop(self) {
        self.server.stop(Duration::from_secs(10)).expect("it ran");
    }
}

fn chat(question: &str) -> Value {
    json!({"messages": [{"role": "user", "content": question}], "temperature": 0})
}

fn with(mut body: Value, more: &[(&str, Value)]) -> Value {
    for (name, value) in more {
        body[*name] = value.clone();
    }
    body
}

/// A request that is written for long: what repeats becomes likelier, so that it never ends.
fn endless(max_tokens: usize) -> Value {
    json!({
        "prompt": "Lioba", "temperature": 0, "repeat_penalty": 0.1, "max_tokens": max_tokens,
        "stream": true,
    })
}

fn streamed(client: &Client, body: &Value) -> Streamed {
    let response = client.post(
        "/v1/chat/completions",
        &with(body.clone(), &[("stream", true.into())]),
    );
    assert_eq!(response.status, 200);
    Streamed::of(response.events())
}

fn content(answer: &Value) -> String {
    answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_else(|| panic!("no content: {answer}"))
        .to_owned()
}

/// What a session says, greedily.
fn said(session: &mut Session, question: &str) -> String {
    session.clear();
    let options = Generate {
        max_tokens: 64,
        ..Generate::default()
    };
    let answer = session.generate(Prompt::User(question), &options, &mut |_| true);
    answer.expect("a generation").text
}

/// Wait until `holds`, at most ten seconds.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A scale at which the first of [`two_patches`] changes the answer to [`QUESTION`].
const SCALE: f32 = 22.0;

/// A folder with two patches.
fn two_patches() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let a = support::small_patch(&support::mini(), dir.path(), "a.gguf", 1);
    let b = support::small_patch(&support::mini(), dir.path(), "b.gguf", 2);
    (dir, a, b)
}
