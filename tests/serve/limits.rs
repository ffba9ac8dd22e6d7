//! Bounds: the queue, bodies, time, and clients that go away.

use super::http::{Client, Response};
use super::{ANSWER, QUESTION, Rig, chat, content, endless, eventually, options};
use nepenthe::serve::Options;
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const LONG: usize = 1900;

#[test]
fn a_full_queue_is_said() {
    let rig = Rig::new(Options {
        slots: 1,
        queue: 1,
        ..options()
    });
    let mut running = rig.client.post("/v1/completions", &endless(LONG)).events();
    running.next().expect("it has begun");
    let client = rig.client.clone();
    let waiting = std::thread::spawn(move || {
        client
            .post("/v1/chat/completions", &chat(QUESTION))
            .json(200)
    });
    eventually("the second waits", || {
        rig.metric("nepenthe_queue_length") == 1.0
    });
    let refused = rig.client.post("/v1/chat/completions", &chat(QUESTION));
    assert_eq!(refused.header("retry-after"), Some("1"));
    let error = refused.error(429);
    assert_eq!(
        (&error["type"], &error["code"]),
        (&"rate_limit_error".into(), &"queue_full".into())
    );
    // The others are not disturbed.
    assert_eq!(content(&waiting.join().expect("an answer")).trim(), ANSWER);
    assert_eq!(running.last().as_deref(), Some("[DONE]"));
    let answer = rig
        .client
        .post("/v1/chat/completions", &chat(QUESTION))
        .json(200);
    assert_eq!(content(&answer).trim(), ANSWER);
    rig.stop();
}

#[test]
fn a_client_that_goes_away_frees_its_slot() {
    let rig = Rig::new(Options {
        slots: 1,
        queue: 1,
        ..options()
    });
    let mut running = rig.client.post("/v1/completions", &endless(LONG)).events();
    running.next().expect("it has begun");
    // One that waits and one that runs.
    let mut waiting = TcpStream::connect(rig.client.address).expect("it listens");
    let body = chat(QUESTION).to_string();
    write!(
        waiting,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("it reads");
    eventually("the second waits", || {
        rig.metric("nepenthe_queue_length") == 1.0
    });
    drop(waiting);
    eventually("it is forgotten", || {
        rig.metric("nepenthe_queue_length") == 0.0
    });
    running.hang_up();
    let answer = rig
        .client
        .post("/v1/chat/completions", &chat(QUESTION))
        .json(200);
    assert_eq!(content(&answer).trim(), ANSWER);
    eventually("the slot is free", || {
        rig.metric("nepenthe_slots_active") == 0.0
    });
    let written = rig.metric("nepenthe_generated_tokens_total");
    assert!(
        written < LONG as f64,
        "{written} tokens: the first was written to its end"
    );
    rig.stop();
}

#[test]
fn bodies_are_bounded_and_must_be_json() {
    let rig = Rig::new(Options {
        max_body: 10_000,
        ..options()
    });
    let large = json!({"prompt": "x".repeat(20_000)});
    let error = rig.client.post("/v1/completions", &large).error(413);
    assert_eq!(error["code"], "too_large");
    for bad in [
        "{\"prompt\": ",
        "",
        "[]",
        "\"prompt\"",
        "\u{0}",
        "{\"prompt\": \"x\"} y",
    ] {
        let response = rig
            .client
            .send("POST", "/v1/completions", &[], bad.as_bytes());
        response.error(400);
    }
    rig.client.send("PUT", "/v1/models", &[], b"").error(405);
    rig.client.get("/v2").error(404);
    rig.client.get("/v1/models/other").error(404);
    rig.stop();
}

#[test]
fn slow_senders_are_given_up() {
    let rig = Rig::new(Options {
        read_timeout: Duration::from_millis(300),
        max_connections: 2,
        ..options()
    });
    let open = |text: &str| {
        let mut stream = TcpStream::connect(rig.client.address).expect("it listens");
        stream.write_all(text.as_bytes()).expect("it reads");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a socket");
        stream
    };
    // A body that does not come.
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{";
    Response::read(open(head)).error(408);
    // A head that does not come, on as many connections as there may be.
    let begun = Instant::now();
    let mut idle = [open("GET / HT"), open("")];
    let answer = rig
        .client
        .post("/v1/chat/completions", &chat(QUESTION))
        .json(200);
    assert_eq!(content(&answer).trim(), ANSWER);
    for stream in &mut idle {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("an end");
    }
    assert!(begun.elapsed() < Duration::from_secs(8));
    rig.stop();
}

#[test]
fn an_ending_server_lets_answers_finish() {
    let rig = Rig::new(options());
    let address = rig.client.address;
    let mut running = rig.client.post("/v1/completions", &endless(600)).events();
    running.next().expect("it has begun");
    let ending = std::thread::spawn(move || rig.stop());
    assert_eq!(running.last().as_deref(), Some("[DONE]"));
    ending.join().expect("an orderly end");
    assert!(TcpStream::connect(address).is_err(), "it still listens");
}

#[test]
fn an_ending_server_waits_no_longer_than_it_may() {
    let rig = Rig::new(options());
    let mut running = rig.client.post("/v1/completions", &endless(LONG)).events();
    running.next().expect("it has begun");
    let begun = Instant::now();
    rig.server.stop(Duration::ZERO).expect("it ran");
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        running.all(|data| data != "[DONE]"),
        "an answer that was cut off says it is whole"
    );
}

#[test]
fn health_models_and_metrics() {
    let rig = Rig::new(options());
    let client: &Client = &rig.client;
    assert_eq!(client.get("/health").json(200)["status"], "ok");
    let models = client.get("/v1/models").json(200);
    assert_eq!(models["data"][0]["id"], "nepenthe-mini");
    assert_eq!(
        client.get("/v1/models/nepenthe-mini").json(200),
        models["data"][0]
    );
    client
        .post("/v1/chat/completions", &chat(QUESTION))
        .json(200);
    let metrics = client.get("/metrics");
    assert!(
        metrics
            .header("content-type")
            .is_some_and(|t| t.starts_with("text/plain"))
    );
    let text = metrics.text();
    for wanted in [
        "nepenthe_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "nepenthe_answer_seconds_count 1",
        "nepenthe_first_token_seconds_bucket{le=\"+Inf\"} 1",
        "nepenthe_slots 4",
        "nepenthe_patches_active 0",
    ] {
        assert!(text.lines().any(|l| l == wanted), "{wanted} in {text}");
    }
    rig.stop();
}
