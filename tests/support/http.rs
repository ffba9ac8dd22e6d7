//! An HTTP client for tests and benches: one connection a request, bodies whole or as events.
#![allow(dead_code, reason = "each user takes its part")]

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

/// A server, and the key that is brought to it.
#[derive(Clone)]
pub struct Client {
    pub address: SocketAddr,
    pub key: Option<String>,
}

/// The head of a response, and its body as it comes.
pub struct Response {
    pub status: u16,
    headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
    is_chunked: bool,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self { address, key: None }
    }

    pub fn with_key(&self, key: &str) -> Self {
        Self {
            key: Some(key.to_owned()),
            ..self.clone()
        }
    }

    pub fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        let kind = ("content-type", "application/json");
        self.send("POST", path, &[kind], body.to_string().as_bytes())
    }

    pub fn delete(&self, path: &str) -> Response {
        self.send("DELETE", path, &[], b"")
    }

    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        if headers.iter().all(|(name, _)| *name != "host") {
            head += &format!("host: {}\r\n", self.address);
        }
        if let Some(key) = &self.key {
            head += &format!("authorization: Bearer {key}\r\n");
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("content-length: {}\r\n\r\n", body.len());
        let mut stream = TcpStream::connect(self.address).expect("a server that listens");
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .expect("a socket");
        stream
            .write_all(head.as_bytes())
            .expect("a server that reads");
        // One that refuses a body need not read it.
        let _ = stream.write_all(body);
        Response::read(stream)
    }
}

impl Response {
    /// Read the head that comes on `stream`.
    pub fn read(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut line = || {
            let mut line = String::new();
            reader.read_line(&mut line).expect("a response");
            line.trim_end().to_owned()
        };
        let first = line();
        let status = first.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status line: {first:?}"));
        let mut headers = Vec::new();
        loop {
            let line = line();
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let is_chunked = headers
            .iter()
            .any(|(n, v)| n == "transfer-encoding" && v == "chunked");
        Self {
            status,
            headers,
            reader,
            is_chunked,
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(n, _)| n == name);
        found.next().map(|(_, v)| v.as_str())
    }

    /// The next chunk of a chunked body; empty after the last.
    fn chunk(&mut self) -> Vec<u8> {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("a chunk");
        let n = usize::from_str_radix(line.trim(), 16).unwrap_or(0);
        let mut data = vec![0; n + 2];
        if self.reader.read_exact(&mut data).is_err() {
            return Vec::new();
        }
        data.truncate(n);
        data
    }

    /// The whole body.
    pub fn text(mut self) -> String {
        let mut body = Vec::new();
        if self.is_chunked {
            loop {
                let chunk = self.chunk();
                if chunk.is_empty() {
                    break;
                }
                body.extend(chunk);
            }
        } else {
            let n = self.header("content-length").and_then(|n| n.parse().ok());
            body.resize(n.unwrap_or(0), 0);
            self.reader.read_exact(&mut body).expect("the whole body");
        }
        String::from_utf8(body).expect("UTF-8")
    }

    /// The whole body of a response that has this status.
    pub fn json(self, status: u16) -> Value {
        let found = self.status;
        let text = self.text();
        assert_eq!(found, status, "{text}");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// The error of a response that has this status.
    pub fn error(self, status: u16) -> Value {
        let mut body = self.json(status);
        let error = body["error"].take();
        assert!(
            error["message"].is_string() && error["type"].is_string(),
            "{error}"
        );
        error
    }

    /// The data of server-sent events, as they come.
    pub fn events(self) -> Events {
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        Events {
            response: self,
            pending: String::new(),
        }
    }
}

/// Server-sent events.
pub struct Events {
    response: Response,
    pending: String,
}

impl Events {
    /// Go away in the middle.
    pub fn hang_up(self) {
        let stream = self.response.reader.get_ref();
        stream.shutdown(Shutdown::Both).expect("an open socket");
    }
}

impl Iterator for Events {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.pending.find("\n\n") {
                let event: String = self.pending.drain(..end + 2).collect();
                // Comments keep the connection alive and say nothing.
                match event.strip_prefix("data: ") {
                    Some(data) => return Some(data.trim_end().to_owned()),
                    None => continue,
                }
            }
            let chunk = self.response.chunk();
            if chunk.is_empty() {
                return None;
            }
            self.pending
                .push_str(&String::from_utf8(chunk).expect("UTF-8"));
        }
    }
}

/// What the events of a streamed answer with one text say.
#[derive(Debug, Default)]
pub struct Streamed {
    pub text: String,
    pub finish: String,
    pub fingerprint: String,
    pub usage: Value,
    /// Where log-probabilities were asked for.
    pub tokens: Vec<i32>,
    pub is_done: bool,
}

impl Streamed {
    /// Take in the next event.
    pub fn see(&mut self, data: &str) {
        assert!(!self.is_done, "an event after [DONE]: {data}");
        if data == "[DONE]" {
            self.is_done = true;
            return;
        }
        let chunk: Value = serde_json::from_str(data).expect("JSON");
        assert!(chunk["error"].is_null(), "{data}");
        self.fingerprint = chunk["system_fingerprint"]
            .as_str()
            .expect("one")
            .to_owned();
        let choice = &chunk["choices"][0];
        if choice.is_null() {
            self.usage = chunk["usage"].clone();
        }
        let text = choice["delta"]["content"].as_str();
        self.text += text.or(choice["text"].as_str()).unwrap_or_default();
        for token in choice["logprobs"]["content"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let id = token["id"].as_i64().expect("a token's id");
            self.tokens.push(id as i32);
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            assert_eq!(self.finish, "");
            self.finish = reason.to_owned();
        }
    }

    /// Of all of `events`.
    pub fn of(events: Events) -> Self {
        let mut streamed = Self::default();
        for data in events {
            streamed.see(&data);
        }
        assert!(streamed.is_done, "no [DONE]");
        streamed
    }
}
