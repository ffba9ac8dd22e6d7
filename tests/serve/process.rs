//! `nepenthe serve` as a process.

use super::http::Client;
use super::support::{fails, mini};
use super::{ANSWER, QUESTION, chat, content, endless};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Stdio};

/// Start it on any free port; where it listens, and the rest of what it prints.
fn start(args: &[&str]) -> (Child, Client, BufReader<ChildStderr>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_nepenthe"))
        .args(["serve", "--port", "0", "--threads", "1", "-m"])
        .arg(mini())
        .args(args)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary was built");
    let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    stderr.read_line(&mut line).expect("a line");
    let address = line.trim().strip_prefix("nepenthe: listening on http://");
    let address = address.unwrap_or_else(|| panic!("{line}"));
    let client = Client::new(address.parse().expect("an address"));
    (child, client, stderr)
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status();
    assert!(sent.expect("kill is at hand").success());
}

#[test]
fn a_signal_ends_it_when_its_answers_are_written() {
    for name in ["-TERM", "-INT"] {
        let (mut child, client, _stderr) = start(&[]);
        let answer = client
            .post("/v1/chat/completions", &chat(QUESTION))
            .json(200);
        assert_eq!(content(&answer).trim(), ANSWER);
        let mut running = client.post("/v1/completions", &endless(800)).events();
        running.next().expect("it has begun");
        signal(&child, name);
        assert_eq!(running.last().as_deref(), Some("[DONE]"));
        assert_eq!(child.wait().expect("an end").code(), Some(0));
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (mut child, client, mut stderr) = start(&[]);
    let mut running = client.post("/v1/completions", &endless(1900)).events();
    running.next().expect("it has begun");
    signal(&child, "-TERM");
    let mut line = String::new();
    while !line.contains("once more") {
        line.clear();
        assert!(
            stderr.read_line(&mut line).expect("a line") > 0,
            "no notice"
        );
    }
    signal(&child, "-TERM");
    assert_eq!(child.wait().expect("an end").code(), Some(130));
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).expect("UTF-8");
    assert_eq!(rest, "");
}

#[test]
fn keys_come_from_files_and_are_not_printed() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("keys");
    std::fs::write(&file, "first\n\n second \n").expect("room");
    let path = file.to_str().expect("plain");
    let (mut child, client, _stderr) = start(&["--api-key-file", path, "--host", "localhost"]);
    client.get("/v1/models").error(401);
    for key in ["first", "second"] {
        client.with_key(key).get("/v1/models").json(200);
    }
    signal(&child, "-TERM");
    assert_eq!(child.wait().expect("an end").code(), Some(0));
}

#[test]
fn bad_settings_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, empty) = (mini(), dir.path().join("empty"));
    std::fs::write(&empty, "\n").expect("room");
    let (model, empty) = (
        model.to_str().expect("plain"),
        empty.to_str().expect("plain"),
    );
    let refused = |code, args: &[&str]| {
        fails(
            code,
            &[&["serve", "-m", model, "--threads", "1"], args].concat(),
        )
    };
    refused(2, &["--slots", "0"]);
    refused(2, &["--ctx", "1"]);
    refused(2, &["--host", "no such host"]);
    refused(2, &["--api-key-file", empty]);
    refused(2, &["--api-key", ""]);
    assert!(refused(2, &["--allow-unpatched"]).contains("--patch-key"));
    refused(6, &["--patch-dir", "/no/such/folder", "--port", "0"]);
    refused(3, &["--lora", empty, "--port", "0"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("bound").port().to_string();
    assert!(refused(6, &["--port", &port]).contains("cannot listen on 127.0.0.1"));
}
