//! A headless Chromium, driven over its DevTools protocol by two named pipes.

use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(120);
const NAMES: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "chrome"];

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: File,
    from: Receiver<Value>,
    n_calls: u64,
    session: Value,
    is_loaded: bool,
    /// What the page's console holds of errors, refusals of its policy among them.
    pub complaints: Vec<String>,
    _dir: TempDir,
}

/// The program, or the printed reason why the test is skipped.
fn chromium() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("NEPENTHE_CHROMIUM") {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .flat_map(|dir| NAMES.map(|name| dir.join(name)))
        .find(|p| p.is_file());
    if found.is_none() {
        eprintln!("skipped: no Chromium is at hand (NEPENTHE_CHROMIUM names one)");
    }
    found
}

impl Browser {
    /// A page at `url`, `width` by `height`; none where there is no Chromium.
    pub fn open(url: &str, width: u32, height: u32) -> Option<Self> {
        let chromium = chromium()?;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let pipes = ["in", "out"].map(|name| dir.path().join(name));
        let made = Command::new("mkfifo").args(&pipes).status();
        assert!(made.expect("mkfifo runs").success());
        // It reads commands from 3 and writes to 4. The shell waits for the pipes' other ends.
        let child = Command::new("sh")
            .args([
                "-c",
                r#"in=$1 out=$2; shift 2; exec "$@" 3<"$in" 4>"$out""#,
                "sh",
            ])
            .args(&pipes)
            .arg(chromium)
            .args([
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
            ])
            .args(["--disable-dev-shm-usage", "--remote-debugging-pipe"])
            .arg(format!(
                "--user-data-dir={}",
                dir.path().join("data").display()
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let to = OpenOptions::new()
            .write(true)
            .open(&pipes[0])
            .expect("a pipe");
        let mut browser = Self {
            child,
            to,
            from: listen(&pipes[1]),
            n_calls: 0,
            session: Value::Null,
            is_loaded: false,
            complaints: Vec::new(),
            _dir: dir,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let target = json!({"targetId": target["targetId"], "flatten": true});
        browser.session = browser.call("Target.attachToTarget", target)["sessionId"].take();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser.resize(width, height);
        browser.is_loaded = false;
        browser.call("Page.navigate", json!({"url": url}));
        while !browser.is_loaded {
            let message = browser.next();
            browser.note(&message);
        }
        Some(browser)
    }

    /// Make the page this large, as a telephone would be where it is narrow.
    pub fn resize(&mut self, width: u32, height: u32) {
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
        });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
    }

    /// Type `text` where the focus is.
    pub fn write(&mut self, text: &str) {
        self.call("Input.insertText", json!({"text": text}));
    }

    /// Press and release a key: `Enter`, `Tab`, `Space` or `Escape`.
    pub fn press(&mut self, code: &str) {
        let (key, text, number) = match code {
            "Enter" => ("Enter", "\r", 13),
            "Tab" => ("Tab", "", 9),
            "Space" => (" ", " ", 32),
            "Escape" => ("Escape", "", 27),
            other => panic!("no such key here: {other}"),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({
                "type": kind, "key": key, "code": code, "windowsVirtualKeyCode": number,
            });
            if kind == "keyDown" && !text.is_empty() {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    /// The value of a JavaScript expression in the page.
    pub fn eval(&mut self, expression: &str) -> Value {
        let asked = json!({"expression": expression, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", asked);
        assert!(
            answer["exceptionDetails"].is_null(),
            "{expression}: {answer}"
        );
        answer["result"]["value"].take()
    }

    /// Wait until the expression is true.
    pub fn wait_for(&mut self, expression: &str) {
        let end = Instant::now() + PATIENCE;
        while self.eval(&format!("Boolean({expression})")) != json!(true) {
            assert!(Instant::now() < end, "waited for: {expression}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Press Tab until the element with this id has the focus.
    pub fn tab_to(&mut self, id: &str) {
        for _ in 0..40 {
            self.press("Tab");
            if self.eval("document.activeElement.id") == json!(id) {
                return;
            }
        }
        panic!("Tab does not lead to #{id}");
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.n_calls += 1;
        let mut message = json!({"id": self.n_calls, "method": method, "params": params});
        if !self.session.is_null() {
            message["sessionId"] = self.session.clone();
        }
        let bytes = format!("{message}\0");
        self.to
            .write_all(bytes.as_bytes())
            .expect("a browser that reads");
        loop {
            let mut answer = self.next();
            if answer["id"] == json!(self.n_calls) {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].take();
            }
            self.note(&answer);
        }
    }

    fn next(&self) -> Value {
        self.from
            .recv_timeout(PATIENCE)
            .expect("a browser that answers")
    }

    /// Take note of an event.
    fn note(&mut self, event: &Value) {
        let entry = &event["params"]["entry"];
        match event["method"].as_str() {
            Some("Page.loadEventFired") => self.is_loaded = true,
            Some("Runtime.exceptionThrown") => self.complaints.push(event.to_string()),
            Some("Log.entryAdded") if entry["level"] == "error" => {
                self.complaints.push(entry.to_string());
            }
            _ => {}
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What comes out of `pipe`: JSON, each closed by a NUL.
fn listen(pipe: &Path) -> Receiver<Value> {
    let from = File::open(pipe).expect("a pipe");
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for message in BufReader::new(from).split(0) {
            let message = message.ok().and_then(|m| serde_json::from_slice(&m).ok());
            if message.is_none_or(|m: Value| sender.send(m).is_err()) {
                break;
            }
        }
    });
    receiver
}
