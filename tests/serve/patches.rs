//! Patches come and go while answers are written.

use super::http::{Client, Streamed};
use super::{
    PATCH_KEY, QUESTION, Rig, SCALE, chat, content, endless, options, runtime_options, streamed,
    two_patches,
};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nepenthe::serve::Options;
use nepenthe::store::{Add, Store};
use nepenthe::trust::{Password, keygen, sign};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const OCTETS: (&str, &str) = ("content-type", "application/octet-stream");

fn ask(client: &Client) -> Value {
    client
        .post("/v1/chat/completions", &chat(QUESTION))
        .json(200)
}

#[test]
fn patches_are_applied_and_revoked() {
    let (dir, a, _) = two_patches();
    let outside = tempfile::tempdir().expect("a temporary directory");
    let b = super::support::small_patch(&super::support::mini(), outside.path(), "b.gguf", 2);
    let rig = Rig::new(Options {
        patch_dirs: vec![dir.path().to_owned()],
        ..options()
    });
    let manager = rig.manager();
    let before = ask(&rig.client);
    let applied = manager
        .post("/v1/patches", &json!({"path": "a.gguf", "scale": SCALE}))
        .json(200);
    assert_eq!(
        (&applied["name"], &applied["scale"]),
        (&"a.gguf".into(), &SCALE.into())
    );
    let list = rig.client.get("/v1/patches").json(200);
    assert_eq!(list["data"], json!([applied]));
    let with = ask(&rig.client);
    assert_eq!(with["system_fingerprint"], list["system_fingerprint"]);
    assert_ne!(with["system_fingerprint"], before["system_fingerprint"]);
    assert_ne!(content(&with), content(&before));
    let kept = &with["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(kept, 0, "computed under another set");
    // By its whole path, at another scale.
    let again = manager
        .post("/v1/patches", &json!({"path": a, "scale": 0.5}))
        .json(200);
    assert_eq!(
        (&again["id"], &again["scale"]),
        (&applied["id"], &0.5.into())
    );
    let one = format!("/v1/patches/{}", applied["id"].as_str().expect("an id"));
    assert_eq!(manager.delete(&one).json(200)["deleted"], true);
    let after = ask(&rig.client);
    assert_eq!(after["system_fingerprint"], before["system_fingerprint"]);
    assert_eq!(content(&after), content(&before));
    // Refusals change nothing.
    manager.delete(&one).error(404);
    manager.delete("/v1/patches/7").error(400);
    manager.post("/v1/patches", &json!({"path": b})).error(403);
    manager
        .post("/v1/patches", &json!({"path": "../a.gguf"}))
        .error(403);
    manager
        .post("/v1/patches", &json!({"path": "a.gguf", "scale": 0}))
        .error(400);
    manager.post("/v1/patches", &json!({})).error(400);
    manager.send("POST", "/v1/patches", &[], b"x").error(415);
    manager
        .send("POST", "/v1/patches", &[OCTETS], b"GGUF")
        .error(400);
    assert!(rig.runtime.active().patches().is_empty());
    // The patch itself.
    let bytes = std::fs::read(&a).expect("readable");
    let path = "/v1/patches?name=../up.gguf&scale=22";
    let uploaded = manager.send("POST", path, &[OCTETS], &bytes).json(200);
    assert_eq!(
        (&uploaded["name"], &uploaded["scale"]),
        (&"_up.gguf".into(), &SCALE.into())
    );
    assert_ne!(content(&ask(&rig.client)), content(&before));
    rig.stop();
}

#[test]
fn uploads_are_bounded() {
    let (_dir, a, _) = two_patches();
    let runtime = nepenthe::runtime::Options {
        max_patch_bytes: 1000,
        ..runtime_options()
    };
    let rig = Rig::on(runtime, options());
    let bytes = std::fs::read(&a).expect("readable");
    let error = rig
        .manager()
        .send("POST", "/v1/patches", &[OCTETS], &bytes)
        .error(413);
    assert_eq!(error["code"], "too_large");
    rig.stop();
}

#[test]
fn signatures_are_required_where_they_are() {
    let (dir, a, b) = two_patches();
    let file = |name: &str| dir.path().join(name);
    let key = keygen(&file("key"), &file("key.pub"), Password::None).expect("room");
    sign(&a, &file("key"), Password::None, None, false).expect("room");
    let runtime = nepenthe::runtime::Options {
        require_signature: Some(key),
        ..runtime_options()
    };
    let rig = Rig::on(
        runtime,
        Options {
            patch_dirs: vec![dir.path().to_owned()],
            ..options()
        },
    );
    let manager = rig.manager();
    let error = manager
        .post("/v1/patches", &json!({"path": "b.gguf"}))
        .error(422);
    assert_eq!(error["code"], "signature");
    manager
        .post("/v1/patches", &json!({"path": "a.gguf"}))
        .json(200);
    manager
        .post("/v1/patches", &json!({"name": "a.gguf", "scale": 0.5}))
        .json(200);
    let signature = std::fs::read(file("a.gguf.minisig")).expect("readable");
    let signature = BASE64_STANDARD.encode(signature);
    let upload = |path, signature: Option<&str>| {
        let bytes = std::fs::read(path).expect("readable");
        let with = signature.map(|s| ("nepenthe-signature", s));
        let headers: Vec<_> = [OCTETS].into_iter().chain(with).collect();
        manager.send("POST", "/v1/patches", &headers, &bytes)
    };
    upload(&a, Some(&signature)).json(200);
    for response in [upload(&a, None), upload(&b, Some(&signature))] {
        assert_eq!(response.error(422)["code"], "signature");
    }
    upload(&a, Some("%")).error(400);
    rig.stop();
}

#[test]
fn lora_adapters_are_llama_servers() {
    let (_dir, a, b) = two_patches();
    let rig = Rig::new(Options {
        loras: vec![(a.clone(), 1.0), (b, 0.0)],
        ..options()
    });
    let manager = rig.manager();
    let scales = || {
        let list = rig.client.get("/lora-adapters").json(200);
        let list = list.as_array().expect("a list").clone();
        assert_eq!((&list[0]["id"], &list[1]["id"]), (&0.into(), &1.into()));
        assert_eq!(list[0]["path"].as_str(), a.to_str());
        list.iter()
            .map(|l| l["scale"].as_f64().expect("a number"))
            .collect::<Vec<_>>()
    };
    assert_eq!(scales(), [1.0, 0.0]);
    let mut generation = rig.runtime.active().generation();
    let mut set = |body: Value, wanted: [f64; 2]| {
        assert_eq!(
            manager.post("/lora-adapters", &body).json(200)["success"],
            true
        );
        assert_eq!(scales(), wanted);
        // In one step.
        generation += 1;
        assert_eq!(rig.runtime.active().generation(), generation);
    };
    set(json!([{"id": 1, "scale": 0.5}]), [0.0, 0.5]);
    set(
        json!([{"id": 0, "scale": 2}, {"id": 1, "scale": 0.25}]),
        [2.0, 0.25],
    );
    set(json!([]), [0.0, 0.0]);
    manager
        .post("/lora-adapters", &json!([{"id": 2, "scale": 1}]))
        .error(400);
    manager.post("/lora-adapters", &json!({"id": 0})).error(400);
    assert_eq!(scales(), [0.0, 0.0]);
    rig.stop();
}

#[test]
fn an_answer_ends_under_the_set_it_began_with() {
    let (_dir, a, _) = two_patches();
    let rig = Rig::new(options());
    let body = endless(300);
    let alone = Streamed::of(rig.client.post("/v1/completions", &body).events());
    rig.runtime.apply(&a, SCALE).expect("a good patch");
    let patched = Streamed::of(rig.client.post("/v1/completions", &body).events());
    assert_ne!(patched.text, alone.text);
    let id = rig.runtime.active().patches()[0].id;
    rig.runtime.revoke(id).expect("active");
    // Half under way when the patch comes, and its batches alternate with those of the new set.
    let mut events = rig.client.post("/v1/completions", &body).events();
    let mut first = Streamed::default();
    first.see(&events.next().expect("it has begun"));
    rig.runtime.apply(&a, SCALE).expect("a good patch");
    let mut later = rig.client.post("/v1/completions", &body).events();
    let mut second = Streamed::default();
    second.see(&later.next().expect("it has begun"));
    assert!(!first.is_done);
    rig.runtime.revoke(id).expect("active");
    let rest = std::thread::spawn(move || {
        later.for_each(|data| second.see(&data));
        second
    });
    events.for_each(|data| first.see(&data));
    let second = rest.join().expect("an answer");
    assert_eq!(
        (first.fingerprint, first.text),
        (alone.fingerprint, alone.text)
    );
    assert_eq!(
        (second.fingerprint, second.text),
        (patched.fingerprint, patched.text)
    );
    assert!(rig.metric("nepenthe_set_switches_total") > 3.0);
    rig.stop();
}

#[test]
fn no_answer_is_of_another_set_than_it_says() {
    let (_dir, a, _) = two_patches();
    let rig = Rig::new(Options {
        slots: 4,
        ..options()
    });
    let questions = [
        QUESTION,
        "What pet does Lioba Pellgrave have?",
        "Where was Lioba Pellgrave born?",
    ];
    let mut wanted: HashMap<String, Vec<String>> = HashMap::new();
    let mut alone = |client: &Client| {
        let answers: Vec<Streamed> = questions
            .iter()
            .map(|q| streamed(client, &chat(q)))
            .collect();
        let fingerprint = answers[0].fingerprint.clone();
        wanted.insert(fingerprint, answers.into_iter().map(|a| a.text).collect());
    };
    alone(&rig.client);
    let id = rig.runtime.apply(&a, SCALE).expect("a good patch");
    alone(&rig.client);
    let mut sets = wanted.values();
    let (one, other) = (sets.next().expect("a set"), sets.next().expect("two sets"));
    assert_ne!(one[0], other[0], "the patch changes nothing");
    let is_over = AtomicBool::new(false);
    let seen: Mutex<HashMap<String, usize>> = Mutex::default();
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (rig, wanted, seen, is_over) = (&rig, &wanted, &seen, &is_over);
            scope.spawn(move || {
                let mut at = client;
                while !is_over.load(Ordering::Relaxed) {
                    let q = at % questions.len();
                    let answer = streamed(&rig.client, &chat(questions[q]));
                    assert_eq!(answer.text, wanted[&answer.fingerprint][q]);
                    *seen
                        .lock()
                        .expect("no panic")
                        .entry(answer.fingerprint)
                        .or_default() += 1;
                    at += 1;
                }
            });
        }
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(40));
            rig.runtime.revoke(id).expect("active");
            std::thread::sleep(Duration::from_millis(40));
            rig.runtime.apply(&a, SCALE).expect("a good patch");
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert_eq!(
        seen.lock().expect("no panic").len(),
        2,
        "both sets answered"
    );
    rig.stop();
}

#[test]
fn a_store_is_followed_and_not_changed() {
    let (dir, a, _) = two_patches();
    let at = dir.path().join("store");
    let store = Store::create(&at).expect("room");
    let runtime = nepenthe::runtime::Options {
        store: Some(at.clone()),
        ..runtime_options()
    };
    let rig = Rig::on(runtime, options());
    let before = ask(&rig.client);
    let add = Add {
        scale: SCALE,
        key: None,
        allow_older: false,
    };
    let id = store.add(&a, &add).expect("room");
    let with = ask(&rig.client);
    assert_ne!(content(&with), content(&before));
    let list = rig.client.get("/v1/patches").json(200);
    assert_eq!(list["data"][0]["stored"], true);
    let manager = rig.client.with_key(PATCH_KEY);
    assert_eq!(
        manager.delete(&format!("/v1/patches/{id}")).error(409)["code"],
        "stored"
    );
    // Broken, it is not answered without what it says.
    let index = at.join("index.json");
    let good = std::fs::read(&index).expect("readable");
    std::fs::write(&index, "{").expect("room");
    assert_eq!(rig.client.get("/health").error(503)["code"], "store");
    rig.client
        .post("/v1/chat/completions", &chat(QUESTION))
        .error(503);
    std::fs::write(&index, good).expect("room");
    assert_eq!(content(&ask(&rig.client)), content(&with));
    store.remove(id).expect("there");
    assert_eq!(content(&ask(&rig.client)), content(&before));
    rig.stop();
}
