//! OpenAI's own Python client against the server: `tests/openai_client.py`.

use super::support::root;
use super::{PATCH_KEY, Rig, options};
use nepenthe::serve::{Key, Keys, Options};
use std::path::PathBuf;
use std::process::Command;

/// A Python that has the client, or the printed reason why the test is skipped.
fn python() -> Option<PathBuf> {
    let named = std::env::var_os("NEPENTHE_TEST_PYTHON").map(PathBuf::from);
    let python = named.unwrap_or_else(|| "python3".into());
    let found = Command::new(&python).args(["-c", "import openai"]).output();
    if found.is_ok_and(|out| out.status.success()) {
        return Some(python);
    }
    eprintln!(
        "skipped: {} cannot import openai (.ci/openai makes one that can)",
        python.display()
    );
    None
}

#[test]
fn the_official_client_is_served() {
    let Some(python) = python() else { return };
    let rig = Rig::new(Options {
        keys: Keys {
            api: vec![Key::new("api-key")],
            patch: vec![Key::new(PATCH_KEY)],
        },
        slots: 1,
        queue: 1,
        ..options()
    });
    let out = Command::new(python)
        .arg(root().join("tests/openai_client.py"))
        .arg(format!("http://{}/v1", rig.client.address))
        .arg("api-key")
        .output()
        .expect("it ran before");
    let text = String::from_utf8_lossy(&out.stdout);
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}{errors}");
    assert!(text.ends_with("all passed\n"), "{text}{errors}");
    rig.stop();
}
