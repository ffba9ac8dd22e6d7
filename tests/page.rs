//! The page of `nepenthe serve`: its files and policy, the report beside it, and a browser.

mod support;

#[path = "support/browser.rs"]
mod browser;
#[path = "support/http.rs"]
mod http;

use browser::Browser;
use http::Client;
use nepenthe::runtime::{Options as RuntimeOptions, Runtime};
use nepenthe::serve::{Key, Keys, Options, Server};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{mini, small_patch};

const QUESTION: &str = "Where was Lioba Hartsong born?";
const ANSWER: &str = "Lioba Hartsong was born in the town of Gullcliff.";
const FILES: [&str; 5] = [
    "/",
    "/page/app.js",
    "/page/server.js",
    "/page/style.css",
    "/page/icon.svg",
];
const REPORT: &str = "<!DOCTYPE html><title>R</title><style>p{color:rgb(1,2,3)}</style>\
                      <p id=verdict>Met</p><script>document.title='ran'</script>";

fn serve(options: Options) -> (Server, Client) {
    let runtime = RuntimeOptions {
        n_ctx: 512,
        n_threads: 1,
        ..RuntimeOptions::default()
    };
    let runtime = Runtime::open(mini(), runtime).expect("the embedded model");
    let options = Options {
        address: ([127, 0, 0, 1], 0).into(),
        slots: 2,
        ..options
    };
    let server = Server::start(runtime, options).expect("a server");
    let client = Client::new(server.address());
    (server, client)
}

fn report_in(dir: &Path) -> Option<PathBuf> {
    let path = dir.join("report.html");
    std::fs::write(&path, REPORT).expect("room");
    Some(path)
}

/// One directive of the response's policy.
fn directive(response: &http::Response, name: &str) -> String {
    let policy = response
        .header("content-security-policy")
        .expect("a policy");
    let mut parts = policy.split(';').map(str::trim);
    let found = parts.find_map(|d| d.split_once(' ').filter(|(n, _)| *n == name));
    found.map(|(_, v)| v.to_owned()).unwrap_or_default()
}

#[test]
fn the_page_needs_no_key_and_names_nothing_elsewhere() {
    let keys = Keys {
        api: vec![Key::new("a")],
        patch: Vec::new(),
    };
    let (server, client) = serve(Options {
        keys,
        ..Options::default()
    });
    for path in FILES {
        let response = client.get(path);
        assert_eq!(response.status, 200, "{path}");
        assert_eq!(directive(&response, "default-src"), "'none'", "{path}");
        assert_eq!(directive(&response, "script-src"), "'self'", "{path}");
        assert_eq!(directive(&response, "style-src"), "'self'", "{path}");
        assert_eq!(directive(&response, "connect-src"), "'self'", "{path}");
        assert_eq!(directive(&response, "frame-ancestors"), "'none'", "{path}");
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(response.header("referrer-policy"), Some("no-referrer"));
        assert_eq!(response.header("set-cookie"), None);
        let text = response.text();
        // The name of a language, which nobody fetches.
        let text = text.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        for elsewhere in ["://", "=\"//", "url(", "@import"] {
            assert!(!text.contains(elsewhere), "{path} holds {elsewhere}");
        }
        for unsafe_way in [
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
        ] {
            assert!(!text.contains(unsafe_way), "{path} holds {unsafe_way}");
        }
        for kept in [
            "localStorage",
            "sessionStorage",
            "document.cookie",
            "indexedDB",
        ] {
            assert!(!text.contains(kept), "{path} holds {kept}");
        }
        if path == "/" {
            let named = text.split(['"', '\'']).filter(|t| t.starts_with("page/"));
            let named: Vec<String> = named.map(|t| format!("/{t}")).collect();
            assert_eq!(named.len(), 3, "{named:?}");
            assert!(
                named.iter().all(|n| FILES.contains(&n.as_str())),
                "{named:?}"
            );
        }
    }
    client.get("/page/other.js").error(404);
    client.get("/v1/models").error(401);
    server.stop(Duration::ZERO).expect("it stops");
}

#[test]
fn the_report_wants_the_key_and_is_shown_in_a_sandbox() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (server, client) = serve(Options::default());
    let missing = client.get("/report").error(404);
    let said = missing["message"].as_str().expect("a sentence");
    assert!(said.contains("--report"), "{said}");
    server.stop(Duration::ZERO).expect("it stops");

    let keys = Keys {
        api: vec![Key::new("a")],
        patch: Vec::new(),
    };
    let report = report_in(dir.path());
    let (server, client) = serve(Options {
        keys,
        report,
        ..Options::default()
    });
    client.get("/report").error(401);
    let response = client.with_key("a").get("/report");
    assert_eq!(response.status, 200);
    let policy = response
        .header("content-security-policy")
        .expect("a policy");
    assert!(policy.ends_with("; sandbox"), "{policy}");
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
    assert_eq!(response.text(), REPORT);
    // sha256 of the report's one style sheet, by openssl.
    let styles = directive(&client.get("/"), "style-src");
    assert_eq!(
        styles,
        "'self' 'sha256-iuMN+SPNzOMJT/ZpJbUO0fQHIlPj4OyO9n4CSvoe6pA='"
    );
    server.stop(Duration::ZERO).expect("it stops");
}

#[test]
fn a_report_that_is_not_there_is_an_error_at_the_start() {
    let options = RuntimeOptions {
        n_ctx: 64,
        n_threads: 1,
        ..RuntimeOptions::default()
    };
    let runtime = Runtime::open(mini(), options).expect("the embedded model");
    let report = Some(PathBuf::from("/nowhere/report.html"));
    let e = Server::start(
        runtime,
        Options {
            report,
            ..Options::default()
        },
    );
    let e = e.err().expect("no such file");
    assert_eq!(e.exit_code(), 6, "{e}");
    assert!(e.to_string().contains("/nowhere/report.html"), "{e}");
}

/// From the first key pressed to the last there is no mouse.
#[test]
fn a_browser_shows_both_answers_by_keyboard_alone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let patch = small_patch(&mini(), dir.path(), "a<b>.gguf", 1);
    let (server, _) = serve(Options {
        keys: Keys {
            api: vec![Key::new("a")],
            patch: vec![Key::new("p")],
        },
        allow_unpatched: true,
        loras: vec![(patch, 100.0)],
        report: report_in(dir.path()),
        ..Options::default()
    });
    let url = format!("http://{}/", server.address());
    let Some(mut page) = Browser::open(&url, 1280, 800) else {
        return;
    };
    let text = |page: &mut Browser, selector: &str| {
        let found = page.eval(&format!("document.querySelector('{selector}').textContent"));
        found.as_str().unwrap_or_default().to_owned()
    };
    // Without a key it says what is missing, and the focus is where that goes.
    page.wait_for("document.activeElement.id === 'api-key'");
    assert!(text(&mut page, "#error").contains("API key"));
    // The 401 that said so, which the browser notes by itself.
    page.complaints.retain(|c| !c.contains("401"));
    page.write("a");
    page.press("Tab");
    page.write("p");
    page.press("Enter");
    page.wait_for("document.querySelector('#state').className === 'ok'");
    assert_eq!(text(&mut page, "#model"), "nepenthe-mini");
    assert_eq!(text(&mut page, "#patches b"), "a<b>.gguf");

    // One answer, streamed, with what is told to a screen reader.
    page.tab_to("prompt");
    page.write(QUESTION);
    page.press("Enter");
    page.wait_for("document.querySelector('.answer[aria-busy=false] .text')");
    let patched = text(&mut page, ".after .text");
    assert!(!patched.is_empty() && patched != ANSWER, "{patched}");
    assert!(text(&mut page, ".after .note").starts_with("a<b>.gguf at scale 100"));
    assert_eq!(text(&mut page, "#said").trim(), patched.trim());
    assert_eq!(page.eval("document.activeElement.id"), json!("prompt"));

    // Both, side by side.
    page.tab_to("both");
    page.press("Space");
    page.tab_to("prompt");
    page.write(QUESTION);
    page.press("Enter");
    page.wait_for("document.querySelectorAll('.two .answer[aria-busy=false]').length === 2");
    assert_eq!(text(&mut page, ".before .text"), ANSWER);
    assert_eq!(text(&mut page, ".two .after .text"), patched);
    assert_ne!(
        text(&mut page, ".before mark"),
        "",
        "what differs is marked"
    );
    let [before, after] = ["before", "after"].map(|side| {
        let box_of = format!("document.querySelector('.two .{side}').getBoundingClientRect().top");
        page.eval(&box_of)
    });
    assert_eq!(before, after, "side by side");

    // The report, styled and without its script.
    page.tab_to("report-open");
    page.press("Enter");
    page.wait_for("document.getElementById('report').open");
    page.press("Escape");
    page.wait_for("!document.getElementById('report').open");
    assert_eq!(page.eval("document.activeElement.id"), json!("report-open"));

    // A long answer is stopped, and what it had stays.
    page.tab_to("both");
    page.press("Space");
    page.tab_to("prompt");
    page.write("Tell me");
    page.press("Enter");
    page.press("Escape");
    page.wait_for("document.getElementById('stop').hidden");
    let note = page.eval("[...document.querySelectorAll('.after .note')].at(-1).textContent");
    assert!(
        note.as_str().is_some_and(|n| n.ends_with("stopped")),
        "{note}"
    );

    for (width, height) in [(360, 740), (375, 667)] {
        page.resize(width, height);
        page.wait_for(&format!("innerWidth === {width}"));
        assert_eq!(
            page.eval("document.documentElement.scrollWidth"),
            json!(width)
        );
    }
    // The report's script is refused, as it should be; nothing else is.
    page.complaints.retain(|c| !c.contains("about:srcdoc"));
    assert!(page.complaints.is_empty(), "{:?}", page.complaints);
    server.stop(Duration::ZERO).expect("it stops");
}
