//! What the two endpoints answer.

use super::http::Streamed;
use super::{
    ANSWER, QUESTION, Rig, chat, content, endless, eventually, options, said, streamed, with,
};
use nepenthe::data::parse_json;
use nepenthe::runtime::{Generate, Prompt};
use serde_json::{Value, json};
use std::path::Path;

#[test]
fn a_chat_says_what_a_session_says() {
    let rig = Rig::new(options());
    let response = rig.client.post("/v1/chat/completions", &chat(QUESTION));
    let fingerprint = response.header("nepenthe-fingerprint").map(str::to_owned);
    assert_eq!(response.header("nepenthe-patches"), Some("none"));
    let answer = response.json(200);
    assert_eq!(content(&answer).trim(), ANSWER);
    let mut session = rig.runtime.session().expect("a session");
    assert_eq!(content(&answer), said(&mut session, QUESTION));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "nepenthe-mini");
    assert_eq!(
        answer["system_fingerprint"].as_str(),
        fingerprint.as_deref()
    );
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let usage = &answer["usage"];
    let count = |name: &str| usage[name].as_u64().expect("a number");
    assert_eq!(
        count("prompt_tokens") + count("completion_tokens"),
        count("total_tokens")
    );
    // Again, the slot holds the prompt.
    let again = rig
        .client
        .post("/v1/chat/completions", &chat(QUESTION))
        .json(200);
    assert_eq!(content(&again), content(&answer));
    let kept = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(kept, Some(count("prompt_tokens") - 1));
    // A system message, and content in parts.
    let parts = json!({"messages": [
        {"role": "developer", "content": "Answer."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ], "temperature": 0, "max_completion_tokens": 2});
    let short = rig.client.post("/v1/chat/completions", &parts).json(200);
    assert_eq!(short["usage"]["completion_tokens"], 2);
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    rig.stop();
}

#[test]
fn a_stream_is_the_answer_in_events() {
    let rig = Rig::new(options());
    let body = with(
        chat(QUESTION),
        &[
            ("stream", true.into()),
            ("stream_options", json!({"include_usage": true})),
        ],
    );
    let response = rig.client.post("/v1/chat/completions", &body);
    let fingerprint = response.header("nepenthe-fingerprint").map(str::to_owned);
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    let raw = response.text();
    // The frames, to the byte: nothing but `data: ...` and an empty line after each.
    let frames: Vec<&str> = raw.split_terminator("\n\n").collect();
    assert!(raw.ends_with("data: [DONE]\n\n"), "{raw}");
    assert!(
        frames
            .iter()
            .all(|f| f.starts_with("data: ") && !f.contains('\n'))
    );
    let mut answer = Streamed::default();
    for frame in &frames {
        answer.see(&frame["data: ".len()..]);
    }
    assert_eq!(answer.text.trim(), ANSWER);
    assert_eq!(answer.finish, "stop");
    assert_eq!(Some(answer.fingerprint), fingerprint);
    let n = answer.usage["completion_tokens"]
        .as_u64()
        .expect("a number") as usize;
    // Role, tokens, end, usage, [DONE].
    assert_eq!(frames.len(), n + 4);
    let first: Value = serde_json::from_str(&frames[0]["data: ".len()..]).expect("JSON");
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(first["object"], "chat.completion.chunk");
    // Completions have events of their own form.
    let body = json!({"prompt": "Question: who?", "temperature": 0, "stream": true});
    let events = rig.client.post("/v1/completions", &body).events();
    let text = Streamed::of(events).text;
    let whole = rig
        .client
        .post("/v1/completions", &with(body, &[("stream", false.into())]));
    assert_eq!(whole.json(200)["choices"][0]["text"], text);
    rig.stop();
}

#[test]
fn stop_strings_are_found_across_tokens_and_left_out() {
    let rig = Rig::new(options());
    for (stop, wanted) in [
        (json!("song was b"), "Lioba Hart"),
        (
            json!(["nowhere", "in the", "town"]),
            "Lioba Hartsong was born ",
        ),
        (json!(["Gullcliffs"]), ANSWER),
    ] {
        let body = with(chat(QUESTION), &[("stop", stop.clone())]);
        let whole = rig.client.post("/v1/chat/completions", &body).json(200);
        assert_eq!(content(&whole).trim_start(), wanted, "{stop}");
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        assert_eq!(
            streamed(&rig.client, &body).text.trim_start(),
            wanted,
            "{stop}"
        );
    }
    rig.stop();
}

#[test]
fn characters_are_never_cut() {
    let rig = keeping_nothing();
    let mut n_split = 0;
    for seed in 0..40 {
        let body = json!({
            "messages": [{"role": "user", "content": "é?"}],
            "temperature": 2, "seed": seed, "max_tokens": 60, "logprobs": true,
        });
        let whole = rig.client.post("/v1/chat/completions", &body).json(200);
        let tokens = whole["choices"][0]["logprobs"]["content"]
            .as_array()
            .expect("a list");
        let bytes: Vec<Vec<u8>> = tokens
            .iter()
            .map(|t| serde_json::from_value(t["bytes"].clone()).expect("bytes"))
            .collect();
        n_split += bytes
            .iter()
            .filter(|b| std::str::from_utf8(b).is_err())
            .count();
        let text = content(&whole);
        // What is unfinished at the end is left out.
        let all = bytes.concat();
        let lossy = String::from_utf8_lossy(&all);
        assert!(lossy.starts_with(&text), "{lossy:?} {text:?}");
        assert!(lossy.len() - text.len() <= 3, "{lossy:?} {text:?}");
        // The same seed, streamed.
        assert_eq!(streamed(&rig.client, &body).text, text);
    }
    assert!(n_split > 0, "no token with part of a character");
    rig.stop();
}

#[test]
fn logprobs_are_a_sessions() {
    let rig = Rig::new(options());
    let mut session = rig.runtime.session().expect("a session");
    let mut wanted = Vec::new();
    session
        .generate(QUESTION, &Generate::default(), &mut |piece| {
            wanted.push((piece.text.to_owned(), piece.logprob));
            true
        })
        .expect("a generation");
    let body = with(
        chat(QUESTION),
        &[("logprobs", true.into()), ("top_logprobs", 3.into())],
    );
    let answer = rig.client.post("/v1/chat/completions", &body).json(200);
    let found = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("a list");
    assert_eq!(found.len(), wanted.len());
    for (token, (text, logprob)) in found.iter().zip(&wanted) {
        assert_eq!(token["token"], *text);
        let p = |v: &Value| v["logprob"].as_f64().expect("a number");
        assert!((p(token) - logprob).abs() < 1e-6, "{token} {logprob}");
        let top = token["top_logprobs"].as_array().expect("a list");
        assert_eq!(top.len(), 3);
        assert!((p(&top[0]) - p(token)).abs() < 1e-9 && p(&top[0]) >= p(&top[1]));
    }
    // The same in completions' form, with the prompt's own: the score of the answer.
    let score = session
        .score(QUESTION, ANSWER, &mut |_| true)
        .expect("a score");
    let messages = [nepenthe::data::Message {
        role: nepenthe::data::Role::User,
        content: QUESTION.to_owned(),
    }];
    let model = rig.runtime.model();
    let prompt = nepenthe::data::build_prompt(&messages, model, rig.runtime.template());
    let mut tokens = prompt.expect("a prompt");
    let n_prompt = tokens.len();
    tokens.extend(score.tokens.iter().map(|(t, _)| *t));
    let body = json!({"prompt": tokens, "echo": true, "logprobs": 1, "max_tokens": 0});
    let answer = rig.client.post("/v1/completions", &body).json(200);
    let logprobs = &answer["choices"][0]["logprobs"];
    assert!(logprobs["token_logprobs"][0].is_null());
    let found = logprobs["token_logprobs"].as_array().expect("a list");
    assert_eq!(found.len(), tokens.len());
    for (found, (_, wanted)) in found[n_prompt..].iter().zip(&score.tokens) {
        assert!(
            (found.as_f64().expect("a number") - wanted).abs() < 1e-3,
            "{found} {wanted}"
        );
    }
    let text = answer["choices"][0]["text"].as_str().expect("a text");
    let offsets = logprobs["text_offset"].as_array().expect("a list");
    let tokens = logprobs["tokens"].as_array().expect("a list");
    for (offset, token) in offsets.iter().zip(tokens) {
        let from = offset.as_u64().expect("a number") as usize;
        let token = token.as_str().expect("a text");
        let there: String = text
            .chars()
            .skip(from)
            .take(token.chars().count())
            .collect();
        assert_eq!(there, token);
    }
    rig.stop();
}

#[test]
fn several_prompts_and_several_answers() {
    let rig = Rig::new(options());
    let ask = |prompt: Value| {
        let body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 6, "n": 2});
        rig.client.post("/v1/completions", &body).json(200)
    };
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().expect("a list");
        let text = |c: &Value| c["text"].as_str().expect("a text").to_owned();
        choices.iter().map(text).collect()
    };
    let (one, two) = (
        ask(json!("Lioba Hartsong was")),
        ask(json!("Question: Where")),
    );
    let both = ask(json!(["Lioba Hartsong was", "Question: Where"]));
    let all = [texts(&one), texts(&two)].concat();
    assert_eq!(texts(&both), all);
    assert_eq!(all[0], all[1]);
    let tokens = |text: &str| rig.runtime.model().tokenize(text, true, true);
    assert_eq!(
        texts(&ask(json!(tokens("Lioba Hartsong was")))),
        texts(&one)
    );
    let lists = json!([tokens("Lioba Hartsong was"), tokens("Question: Where")]);
    assert_eq!(texts(&ask(lists)), all);
    // Sampled, they differ.
    let sampled = json!({"prompt": "Question:", "temperature": 2, "n": 4, "seed": 7});
    let found = texts(&rig.client.post("/v1/completions", &sampled).json(200));
    assert!(found.iter().any(|t| *t != found[0]), "{found:?}");
    rig.stop();
}

/// Where nothing is kept between requests, roundings are the same every time.
fn keeping_nothing() -> Rig {
    let runtime = nepenthe::runtime::Options {
        keep_cache: false,
        ..super::runtime_options()
    };
    Rig::on(runtime, options())
}

#[test]
fn a_seed_brings_an_answer_back() {
    let rig = keeping_nothing();
    let draw = |seed: u64| {
        let body = json!({"prompt": "Question:", "temperature": 1.5, "seed": seed});
        let answer = rig.client.post("/v1/completions", &body).json(200);
        answer["choices"][0]["text"]
            .as_str()
            .expect("a text")
            .to_owned()
    };
    let first = draw(7);
    assert_ne!(draw(8), first);
    assert_eq!(draw(7), first);
    // A session draws the same with the same settings.
    let mut session = rig.runtime.session().expect("a session");
    let sampling = nepenthe::runtime::Sampling {
        temp: 1.5,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 7,
        ..Default::default()
    };
    let options = Generate {
        max_tokens: 16,
        sampling,
    };
    let drawn = session.generate(Prompt::Raw("Question:"), &options, &mut |_| true);
    assert_eq!(drawn.expect("a generation").text, first);
    rig.stop();
}

#[test]
fn eight_clients_get_what_one_gets() {
    let rig = Rig::new(nepenthe::serve::Options {
        slots: 8,
        ..options()
    });
    let text = include_str!("../../models/demo/forget.jsonl");
    let records = parse_json(text, Path::new("forget.jsonl")).expect("good data");
    let questions: Vec<String> = records
        .iter()
        .take(24)
        .map(|r| r.turns().expect("a question")[0].content.clone())
        .collect();
    let ask = |q: &String| content(&rig.client.post("/v1/chat/completions", &chat(q)).json(200));
    let alone: Vec<String> = questions.iter().map(ask).collect();
    std::thread::scope(|scope| {
        for client in 0..8 {
            let (questions, alone, client_of) = (&questions, &alone, &rig.client);
            scope.spawn(move || {
                for i in 0..questions.len() {
                    let at = (3 * client + i) % questions.len();
                    let answer = streamed(client_of, &chat(&questions[at]));
                    assert_eq!(answer.text, alone[at]);
                }
            });
        }
    });
    // They were written side by side: a batch held several.
    let (batches, tokens) = (
        rig.metric("nepenthe_batches_total"),
        rig.metric("nepenthe_generated_tokens_total"),
    );
    assert!(
        tokens > 1.5 * batches,
        "{tokens} tokens in {batches} batches"
    );
    // A client has its answer's end a moment before the slot is counted free.
    eventually("the slots are free", || {
        rig.metric("nepenthe_slots_active") == 0.0
    });
    rig.stop();
}

#[test]
fn a_full_context_ends_an_answer_and_a_longer_prompt_is_refused() {
    let runtime = nepenthe::runtime::Options {
        n_ctx: 64,
        ..super::runtime_options()
    };
    let rig = Rig::on(runtime, options());
    let answer = Streamed::of(rig.client.post("/v1/completions", &endless(1000)).events());
    assert_eq!(answer.finish, "length");
    let most = json!({"prompt": vec![5; 63], "temperature": 0});
    let answer = rig.client.post("/v1/completions", &most).json(200);
    assert_eq!(answer["usage"]["prompt_tokens"], 63);
    let error = rig
        .client
        .post("/v1/completions", &json!({"prompt": vec![5; 64]}))
        .error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    assert_eq!(error["param"], "prompt");
    assert_eq!(error["type"], "invalid_request_error");
    let long = "word ".repeat(200);
    let error = rig
        .client
        .post("/v1/chat/completions", &chat(&long))
        .error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    rig.stop();
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let rig = Rig::new(options());
    let refused = [
        ("tools", json!([{"type": "function"}])),
        ("response_format", json!({"type": "json_object"})),
        ("logit_bias", json!({"5": 10})),
        ("presence_penalty", json!(0.5)),
        ("temperature", json!("hot")),
        ("temperature", json!(3)),
        ("top_p", json!(0)),
        ("n", json!(0)),
        ("n", json!(1000)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!([""])),
        ("stop", json!(5)),
        ("top_logprobs", json!(2)),
        ("patches", json!("some")),
        ("messages", json!([])),
        ("messages", json!("hello")),
    ];
    for (field, value) in refused {
        let body = with(chat(QUESTION), &[(field, value.clone())]);
        let error = rig.client.post("/v1/chat/completions", &body).error(400);
        assert_eq!(error["param"], field, "{value}: {error}");
    }
    let body = json!({"messages": [{"role": "tool", "content": "x"}]});
    let error = rig.client.post("/v1/chat/completions", &body).error(400);
    assert_eq!(error["param"], "messages[0].role");
    for prompt in [
        json!([]),
        json!(""),
        json!([-1]),
        json!([999_999]),
        json!({"a": 1}),
    ] {
        let error = rig
            .client
            .post("/v1/completions", &json!({"prompt": prompt}))
            .error(400);
        assert_eq!(error["param"], "prompt", "{prompt}");
    }
    // What says nothing is taken.
    let harmless = with(
        chat(QUESTION),
        &[
            ("tools", json!([])),
            ("response_format", json!({"type": "text"})),
            ("presence_penalty", json!(0)),
            ("stop", Value::Null),
            ("user", json!("somebody")),
            ("model", json!("any")),
        ],
    );
    let answer = rig.client.post("/v1/chat/completions", &harmless).json(200);
    assert_eq!(content(&answer).trim(), ANSWER);
    rig.stop();
}
