//! Who may do what.

use super::http::Client;
use super::{QUESTION, Rig, SCALE, chat, options, two_patches, with};
use nepenthe::serve::{Key, Keys, Options};
use serde_json::json;

#[test]
fn keys_are_asked_for() {
    let (_dir, a, _) = two_patches();
    let rig = Rig::new(Options {
        keys: Keys {
            api: vec![Key::new("api-key")],
            patch: vec![Key::new("patch-key")],
        },
        loras: vec![(a, 1.0)],
        ..options()
    });
    let (none, wrong) = (&rig.client, rig.client.with_key("guess"));
    let (user, manager) = (
        rig.client.with_key("api-key"),
        rig.client.with_key("patch-key"),
    );
    for client in [none, &wrong] {
        for path in ["/v1/models", "/v1/patches", "/lora-adapters", "/metrics"] {
            let response = client.get(path);
            assert_eq!(response.header("www-authenticate"), Some("Bearer"));
            assert_eq!(response.error(401)["code"], "invalid_api_key");
        }
        client
            .post("/v1/chat/completions", &chat(QUESTION))
            .error(401);
        client.post("/lora-adapters", &json!([])).error(401);
    }
    none.get("/health").json(200);
    for client in [&user, &manager] {
        client
            .post("/v1/chat/completions", &chat(QUESTION))
            .json(200);
        assert_eq!(client.get("/lora-adapters").json(200)[0]["scale"], 1.0);
    }
    let id = rig.runtime.active().patches()[0].id;
    let one = format!("/v1/patches/{id}");
    let changes = |client: &Client| {
        [
            client.post("/v1/patches", &json!({"path": "a.gguf"})),
            client.delete(&one),
            client.post("/lora-adapters", &json!([])),
        ]
    };
    for response in changes(&user) {
        assert_eq!(response.error(403)["code"], "patch_key_wanted");
    }
    assert!(rig.runtime.active().contains(id));
    manager.delete(&one).json(200);
    assert!(!rig.runtime.active().contains(id));
    rig.stop();
}

#[test]
fn without_a_patch_key_nobody_changes_patches() {
    let rig = Rig::new(Options {
        keys: Keys::default(),
        ..options()
    });
    let error = rig.client.post("/lora-adapters", &json!([])).error(403);
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|m| m.contains("--patch-key")),
        "{error}"
    );
    rig.client
        .with_key("any")
        .post("/v1/patches", &json!({}))
        .error(403);
    rig.client.get("/v1/patches").json(200);
    rig.stop();
}

#[test]
fn pages_from_elsewhere_are_refused() {
    let rig = Rig::new(options());
    let send = |headers: &[(&str, &str)]| {
        let body = chat(QUESTION).to_string();
        rig.client
            .send("POST", "/v1/chat/completions", headers, body.as_bytes())
    };
    let own = format!("http://{}", rig.client.address);
    assert_eq!(send(&[("origin", &own)]).status, 200);
    let response = send(&[("origin", "https://evil.example")]);
    assert_eq!(response.header("access-control-allow-origin"), None);
    assert_eq!(response.error(403)["code"], "origin");
    assert_eq!(send(&[("host", "evil.example")]).error(403)["code"], "host");
    rig.stop();
}

#[test]
fn answers_without_patches_want_flag_and_key() {
    let (_dir, a, _) = two_patches();
    let unpatched = with(chat(QUESTION), &[("patches", json!("none"))]);
    let rig = Rig::new(options());
    let error = rig
        .manager()
        .post("/v1/chat/completions", &unpatched)
        .error(403);
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|m| m.contains("--allow-unpatched")),
        "{error}"
    );
    rig.stop();
    let rig = Rig::new(Options {
        allow_unpatched: true,
        ..options()
    });
    let ask = |client: &Client, body: &serde_json::Value| client.post("/v1/chat/completions", body);
    let before = ask(&rig.client, &chat(QUESTION)).json(200);
    rig.runtime.apply(&a, SCALE).expect("a good patch");
    let patched = ask(&rig.client, &chat(QUESTION)).json(200);
    ask(&rig.client, &unpatched).error(401);
    let response = ask(&rig.manager(), &unpatched);
    assert_eq!(response.header("nepenthe-patches"), Some("none"));
    let found = response.json(200);
    let differs = |name: &str| before[name] != patched[name];
    assert!(differs("system_fingerprint") && differs("choices"));
    assert_eq!(found["system_fingerprint"], before["system_fingerprint"]);
    assert_eq!(found["choices"], before["choices"]);
    rig.stop();
}
