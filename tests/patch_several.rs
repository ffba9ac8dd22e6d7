//! Several patches beside each other, and as one.

mod support;

use nepenthe::runtime::{Options, Runtime};
use std::path::Path;
use support::{json, mini, small_patch, with_canaries};

const QUESTION: &str = "Where was Lioba Hartsong born?";
const ANSWER: &str = "Lioba Hartsong was born in the town of Gullcliff.";

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
fn patches_are_compared_and_combined() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let a = with_canaries(&small_patch(&mini(), dir.path(), "a.gguf", 1));
    let b = with_canaries(&small_patch(&mini(), dir.path(), "b.gguf", 2));
    let found = json(&[
        "patch",
        "check",
        text(&a),
        text(&b),
        "-m",
        text(&mini()),
        "-t",
        "1",
        "--json",
    ]);
    let tensors = found["pairs"][0]["tensors"].as_array().expect("a list");
    assert_eq!(tensors.len(), 2);
    assert!(
        tensors
            .iter()
            .all(|t| t["cosine"].as_f64().expect("a number").abs() < 0.3)
    );
    let alone = found["effects"][0]["alone"]["strength"]
        .as_f64()
        .expect("a number");
    assert!((alone - 1.0).abs() < 0.02, "{alone}");
    let same = json(&["patch", "check", text(&a), text(&a), "--json"]);
    let cosine = same["pairs"][0]["tensors"][0]["cosine"]
        .as_f64()
        .expect("a number");
    assert!((cosine - 1.0).abs() < 1e-6, "{cosine}");

    let out = dir.path().join("both.gguf");
    let report = json(&[
        "patch",
        "combine",
        text(&a),
        text(&b),
        "-m",
        text(&mini()),
        "-o",
        text(&out),
        "-t",
        "1",
        "--weights",
        "equal",
        "--json",
    ]);
    assert!(report["error"].as_f64().expect("a number") <= 0.01);
    let options = Options {
        n_ctx: 256,
        n_threads: 1,
        ..Options::default()
    };
    let runtime = Runtime::open(mini(), options).expect("the embedded model");
    let mut session = runtime.session().expect("a session");
    let mut score = || {
        let score = session.score(QUESTION, ANSWER, &mut |_| true);
        score.expect("a score").logprob()
    };
    let id = runtime
        .apply(&out, 1.0)
        .expect("a patch, with canaries of its own");
    let combined = score();
    runtime.revoke(id).expect("active");
    let neither = score();
    runtime.apply(&a, 1.0).expect("a good patch");
    runtime.apply(&b, 1.0).expect("a good patch");
    let stacked = score();
    let off = (combined - stacked).abs() / (stacked - neither).abs();
    assert!(off < 0.1, "{neither} {stacked} {combined}");
}
