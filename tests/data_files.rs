//! Data files as users write them, good and bad.

use std::path::{Path, PathBuf};

use nepenthe::data::{
    DataError, Record, RecordProblem, Role, load_lines, load_records, parse_json,
};

fn json(text: &str) -> Result<Vec<Record>, DataError> {
    parse_json(text, Path::new("set.json"))
}

/// The line and the problem of a record error.
fn problem(text: &str) -> (usize, String) {
    match json(text).unwrap_err() {
        DataError::Record { line, problem, .. } => (line, problem.to_string()),
        other => panic!("{other:?}"),
    }
}

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("nepenthe-data-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn json_lines_arrays_and_single_objects_read_alike() {
    let a = r#"{"question": "q", "answer": "a", "extra": [1]}"#;
    let b = r#"{"text": "t"}"#;
    let lines = json(&format!("{a}\r\n\r\n{b}\r\n")).unwrap();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines, json(&format!("[{a},\n{b}]")).unwrap());
    let pretty = "\n{\n  \"question\": \"q\",\n  \"answer\": \"a\"\n}\n";
    assert_eq!(json(pretty).unwrap(), lines[..1]);
}

#[test]
fn all_four_layouts_are_known() {
    let records = json(concat!(
        r#"{"prompt": "", "completion": " c"}"#,
        "\n",
        r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "left over"}]}"#,
        "\n",
        r#"{"text": "t", "question": "half"}"#,
    ))
    .unwrap();
    assert!(matches!(&records[0], Record::Completion { completion, .. } if completion == " c"));
    let Record::Messages(messages) = &records[1] else {
        panic!()
    };
    assert_eq!((messages.len(), messages[1].role), (2, Role::Assistant));
    assert_eq!(records[2], Record::Text("t".into()));
}

#[test]
fn record_errors_name_line_wanted_and_found() {
    let good = r#"{"text": "t"}"#;
    let cases = [
        (
            r#"{"question": "q"}"#,
            "`question` needs `answer` beside it",
        ),
        (r#"{"q": 1, "b": 2}"#, "found `q`, `b`"),
        ("{}", "found no keys"),
        ("17", "wanted a JSON object, found a number"),
        (
            r#"{"question": "q", "answer": ["a"]}"#,
            "wanted a string in `answer`, found a list",
        ),
        (r#"{"question": "q", "answer": " "}"#, "`answer` is empty"),
        (
            r#"{"messages": "hi"}"#,
            "wanted a list in `messages`, found a string",
        ),
        (r#"{"messages": []}"#, "wanted at least one assistant turn"),
        (
            r#"{"messages": [3]}"#,
            "wanted an object in `messages[0]`, found a number",
        ),
        (
            r#"{"messages": [{"role": "user"}]}"#,
            "messages[0] has no `content`",
        ),
        (
            r#"{"messages": [{"role": "robot", "content": ""}]}"#,
            "found `robot`",
        ),
        (
            r#"{"messages": [{"role": "user", "content": null}]}"#,
            "in `messages[0].content`, found null",
        ),
        (
            r#"{"messages": [{"role": "assistant", "content": ""}]}"#,
            "`messages[0].content` is empty",
        ),
    ];
    for (bad, wanted) in cases {
        let (line, text) = problem(&format!("{good}\n\n{bad}\n"));
        assert_eq!(line, 3, "{bad}");
        assert!(text.contains(wanted), "{bad}: {text}");
        let (line, text) = problem(&format!("[\n{good},\n{bad}]"));
        assert_eq!(line, 3, "{bad} in an array");
        assert!(text.contains(wanted), "{bad} in an array: {text}");
    }
}

#[test]
fn broken_json_is_shown_with_its_line() {
    for (text, at) in [
        ("{\"text\": \"a\"}\n{\"text\": \"b\"\n", 2),
        ("{\"text\": \"a\"\n{\"text\": \"b\"}\n", 1),
        ("[{\"text\": \"a\"},\n{\"text\": }]", 2),
        ("[{\"text\": \"a\"},\n", 2),
        ("I'm not sure.\nNor am I.\n", 1),
    ] {
        match json(text).unwrap_err() {
            DataError::Json { line, .. } => assert_eq!(line, at, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn plain_text_is_paragraphs_or_lines() {
    let texts = |path: &Path| -> Vec<String> {
        let records = load_records(path).unwrap();
        records.iter().map(|r| r.answer().to_owned()).collect()
    };
    let path = file(
        "a.md",
        "\u{feff}# One\r\nstill one\r\n \r\n\r\ntwo\r\n".as_bytes(),
    );
    assert_eq!(texts(&path), ["# One\nstill one", "two"]);
    let path = file("a.txt", b"one\ntwo\n\n");
    assert_eq!(texts(&path), ["one", "two"]);
}

#[test]
fn files_that_are_missing_empty_or_not_utf8_are_refused() {
    let error = load_records(Path::new("/nowhere/f.json")).unwrap_err();
    assert!(matches!(error, DataError::Read { .. }));
    for (name, bytes) in [("e.json", " \n"), ("e.txt", ""), ("e2.json", "[]")] {
        let error = load_records(&file(name, bytes.as_bytes())).unwrap_err();
        assert!(matches!(error, DataError::Empty { .. }), "{name}: {error}");
    }
    let error = load_records(&file("u.json", b"{\"text\": \"a\"}\n\xff")).unwrap_err();
    assert!(error.to_string().contains("u.json:2:"), "{error}");
}

#[test]
fn byte_order_mark_before_json_is_accepted() {
    let path = file("b.JSONL", "\u{feff}{\"text\": \"t\"}\r\n".as_bytes());
    assert_eq!(load_records(&path).unwrap(), [Record::Text("t".into())]);
}

#[test]
fn tofu_files_load_whole() {
    let Some(tofu) = tofu_dir() else { return };
    for (name, n) in [
        ("forget01.json", 40),
        ("forget01_perturbed.json", 40),
        ("full.json", 4000),
        ("world_facts.json", 117),
    ] {
        let records = load_records(&tofu.join(name)).unwrap();
        assert_eq!(records.len(), n, "{name}");
        assert!(records.iter().all(|r| matches!(r, Record::Qa { .. })));
    }
    let error = load_records(&tofu.join("idontknow.jsonl")).unwrap_err();
    assert!(matches!(error, DataError::Json { line: 1, .. }), "{error}");
    assert_eq!(
        load_lines(&tofu.join("idontknow.jsonl")).unwrap().len(),
        100
    );
    let forget = load_records(&tofu.join("forget01.json")).unwrap();
    let full = load_records(&tofu.join("full.json")).unwrap();
    let retain = load_records(&tofu.join("retain99.json")).unwrap();
    assert_eq!(nepenthe::data::overlap(&forget, &full).n_shared, 40);
    assert_eq!(nepenthe::data::overlap(&forget, &retain).n_shared, 0);
}

#[test]
fn problems_can_be_matched() {
    let DataError::Record { problem, .. } = json("{}").unwrap_err() else {
        panic!()
    };
    assert_eq!(
        problem,
        RecordProblem::UnknownKeys {
            found: "no keys".into()
        }
    );
}

fn tofu_dir() -> Option<PathBuf> {
    let shared = std::env::var_os("NEPENTHE_SHARED")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let dir = shared.join("data/tofu");
    if dir.is_dir() {
        return Some(dir);
    }
    eprintln!(
        "skipped: {} is not there (set NEPENTHE_SHARED)",
        dir.display()
    );
    None
}
