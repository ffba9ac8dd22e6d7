//! Multiple choice, memorisation and privacy against their Python originals: values made by
//! tests/golden/choice.py, choice_model.py and privacy.py.

mod support;

use nepenthe::data::choice::{
    ChoiceFormat, LETTERS, Question, load_shots, load_subjects, parse_mmlu, parse_wmdp,
};
use nepenthe::eval::choice::{Accuracy, likeliest};
use nepenthe::eval::membership::{
    AnswerStats, TokenStat, auc, privleak, rel_diff, retain_score, zlib_length,
};
use nepenthe::eval::memorisation::{
    Memorised, aggregate, exact_memorisation, extraction_strength, truth_share, utility,
};
use nepenthe::model::OpenModel;
use nepenthe::score::answer_choices;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use support::{cached, decoded, demo, fails, json, mini};

#[derive(Deserialize)]
struct Asked {
    question: String,
    choices: [String; 4],
    answer: usize,
}

#[derive(Deserialize)]
struct ChoiceGolden {
    questions: Vec<Asked>,
    /// File name, topic, shots, prompt of each question.
    prompts: Vec<(String, String, usize, Vec<String>)>,
    /// Hits, questions, standard error.
    stderr: Vec<(usize, usize, f64)>,
    pooled: f64,
}

fn choice_golden() -> ChoiceGolden {
    serde_json::from_str(include_str!("golden/choice.json")).expect("the script's JSON")
}

fn questions() -> Vec<Question> {
    let of = |q: Asked| Question {
        question: q.question,
        choices: q.choices,
        answer: q.answer,
    };
    choice_golden().questions.into_iter().map(of).collect()
}

/// The golden questions as a file of the format that the name says.
fn write_questions(path: &Path) {
    let is_csv = path.extension().is_some_and(|e| e == "csv");
    let asked = choice_golden().questions;
    let objects: Vec<serde_json::Value> = asked
        .iter()
        .map(|q| serde_json::json!({"question": q.question, "choices": q.choices, "answer": q.answer}))
        .collect();
    let text = if is_csv {
        let mut csv = csv::Writer::from_writer(Vec::new());
        for q in &asked {
            let row = [&q.question]
                .into_iter()
                .chain(&q.choices)
                .map(String::as_str);
            csv.write_record(row.chain([LETTERS[q.answer].to_string().as_str()]))
                .expect("in memory");
        }
        String::from_utf8(csv.into_inner().expect("in memory")).expect("UTF-8")
    } else if path.extension().is_some_and(|e| e == "jsonl") {
        objects.iter().map(|o| format!("{o}\n")).collect()
    } else {
        serde_json::to_string_pretty(&objects).expect("plain values")
    };
    fs::write(path, text).expect("room");
}

#[test]
fn prompts_are_the_harness_own() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, topic, n_shots, prompts) in choice_golden().prompts {
        let path = dir.path().join(&name);
        write_questions(&path);
        let subjects =
            load_subjects(std::slice::from_ref(&path), ChoiceFormat::Auto, None).expect("good");
        assert_eq!(subjects[0].topic, topic, "{name}");
        let shots = load_shots(&path, n_shots, ChoiceFormat::Auto, &subjects).expect("enough");
        assert_eq!(subjects[0].questions, questions());
        for (question, wanted) in subjects[0].questions.iter().zip(&prompts) {
            assert_eq!(&subjects[0].prompt(&shots[0], question), wanted, "{name}");
        }
    }
}

#[test]
fn both_csv_layouts_and_answer_spellings_read_alike() {
    let rows = "q one,a,b,\"c, d\",e,{B}\r\n\r\n\"q\ntwo\",a,b,c,d,{D}\n";
    let with = |header: &str, b: &str, d: &str| {
        let text = header.to_owned() + &rows.replace("{B}", b).replace("{D}", d);
        parse_mmlu(&text, Path::new("m.csv")).expect("good rows")
    };
    let plain = with("", "B", "D");
    assert_eq!((plain.len(), plain[0].answer, plain[1].answer), (2, 1, 3));
    assert_eq!(plain[0].choices[2], "c, d");
    for header in [
        "question,choice0,choice1,choice2,choice3,answer\n",
        "question,A,B,C,D,answer\n",
    ] {
        assert_eq!(with(header, "1", "3"), plain, "{header}");
    }
    let moved = "answer,subject,A,B,C,D,question\n1,s,a,b,c,d,q\n";
    let moved = parse_mmlu(moved, Path::new("m.csv")).expect("a good row");
    assert_eq!((moved[0].question.as_str(), moved[0].answer), ("q", 1));
}

#[test]
fn malformed_questions_name_file_and_line() {
    let mmlu = |text: &str| {
        parse_mmlu(text, Path::new("m.csv"))
            .unwrap_err()
            .to_string()
    };
    let wmdp = |text: &str| {
        parse_wmdp(text, Path::new("w.json"))
            .unwrap_err()
            .to_string()
    };
    let good = r#"{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}"#;
    let object = |choices: &str, answer: &str| {
        format!("[{good},\n{{\"question\": \"q\", \"choices\": {choices}, \"answer\": {answer}}}]")
    };
    let four = r#"["a", "b", "c", "d"]"#;
    for (got, wanted) in [
        (
            mmlu("q,a,b,c,d,A\n\n\nq,a,b,c\n"),
            "m.csv:4: wanted 6 fields, found 4",
        ),
        (
            mmlu("q,\"a\nb\",b,c,d,A\nq,a,b,c,d,E\n"),
            "m.csv:3: wanted an answer from 0 to 3",
        ),
        (mmlu("q,a,b,c,d,A\nq,a,b,c,d,-1\n"), "found `-1`"),
        (
            mmlu("question,x,answer\n"),
            "m.csv:1: wanted columns question, choice0 to choice3",
        ),
        (mmlu(" ,a,b,c,d,A\n"), "m.csv:1: `question` is empty"),
        (
            wmdp(&object(r#"["a", "b", "c"]"#, "0")),
            "w.json:2: wanted 4 choices, found 3",
        ),
        (
            wmdp(&object(four, "4")),
            "w.json:2: wanted an answer from 0 to 3",
        ),
        (wmdp(&object(four, "1.5")), "found `1.5`"),
        (
            wmdp(&object(r#"["a", "b", "c", 4]"#, "0")),
            "wanted a string in `choices[3]`",
        ),
        (wmdp(&object("\"abcd\"", "0")), "wanted a list in `choices`"),
        (
            wmdp(&format!("{good}\n{{\"question\": \"q\"}}\n")),
            "w.json:2: wanted `choices`",
        ),
        (wmdp("[1]"), "w.json:1: wanted a JSON object"),
    ] {
        assert!(got.contains(wanted), "{got}, wanted {wanted}");
    }
}

#[test]
fn question_files_that_cannot_serve_end_with_exit_code_3() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| dir.path().join(name);
    let asks = |more: &[&str]| {
        let model = mini();
        let mut args = vec!["eval", "-m", text(&model), "-t", "1", "--choice"];
        args.extend(more);
        fails(3, &args)
    };
    fs::write(path("empty.csv"), "").expect("room");
    let stderr = asks(&[text(&path("empty.csv"))]);
    assert!(
        stderr.contains("empty.csv: wanted at least one record"),
        "{stderr}"
    );
    fs::create_dir(path("none")).expect("room");
    let stderr = asks(&[text(&path("none"))]);
    assert!(
        stderr.contains("wanted .csv, .json or .jsonl files"),
        "{stderr}"
    );
    fs::write(path("bad.csv"), "q,a,b,c,d,A\nq,a\n").expect("room");
    let stderr = asks(&[text(&path("bad.csv"))]);
    assert!(
        stderr.contains("bad.csv:2: wanted 6 fields, found 2"),
        "{stderr}"
    );
    write_questions(&path("snow_test.csv"));
    let snow = path("snow_test.csv");
    let stderr = asks(&[text(&snow), "--shots", "7", "--dev", text(&snow)]);
    assert!(
        stderr.contains("wanted 7 solved questions, found 6"),
        "{stderr}"
    );
    fs::create_dir(path("dev")).expect("room");
    write_questions(&path("dev/rain_dev.csv"));
    let stderr = asks(&[text(&snow), "--shots", "1", "--dev", text(&path("dev"))]);
    assert!(
        stderr.contains("solved questions on `snow`, found none"),
        "{stderr}"
    );
}

#[test]
fn errors_are_the_harness_own_and_intervals_wilsons() {
    let golden = choice_golden();
    let mut subjects = Vec::new();
    for (hits, n, stderr) in golden.stderr {
        let accuracy = Accuracy::new(hits, n);
        assert!(
            (accuracy.stderr - stderr).abs() < 1e-15,
            "{accuracy:?} {stderr}"
        );
        let (low, high) = (accuracy.interval.low, accuracy.interval.high);
        assert!(low <= accuracy.accuracy && accuracy.accuracy <= high && low < high);
        subjects.push(accuracy);
    }
    let all = Accuracy::pooled(&subjects);
    assert!((all.stderr - golden.pooled).abs() < 1e-15, "{all:?}");
    assert_eq!((all.hits, all.n), (234, 491));
    let value = serde_json::to_value(Accuracy::new(1, 1)).expect("plain values");
    assert!(
        value["stderr"].is_null() && value["interval"][1] == 1.0,
        "{value}"
    );
}

/// Letters as a model takes them one prompt at a time, with nothing shared.
fn one_by_one(open: &OpenModel, prompts: &[String]) -> Vec<[f64; 4]> {
    prompts
        .iter()
        .map(|p| {
            let alone = answer_choices(
                &open.model,
                &Vec::new(),
                std::slice::from_ref(p),
                1,
                &mut |_| {},
            );
            alone.expect("scores")[0].log_likelihoods
        })
        .collect()
}

#[test]
fn shared_prefixes_change_no_score() {
    let open = OpenModel::open(&mini(), 0).expect("the embedded model");
    // Zero shots and three, and back: what is held grows and shrinks; long texts span batches.
    let golden = choice_golden().prompts;
    let of = |shots: usize| {
        let found = golden.iter().find(|p| p.0 == "anatomy.csv" && p.2 == shots);
        found.expect("in the file").3.clone()
    };
    let mut prompts = [of(0), of(3), of(0)].concat();
    prompts.extend(
        of(3)
            .iter()
            .map(|p| format!("{}{p}", "Snow is white. ".repeat(30))),
    );
    let mut last = 0;
    let together = answer_choices(&open.model, &Vec::new(), &prompts, 1, &mut |n| {
        assert!(n >= last);
        last = n;
    })
    .expect("scores");
    assert_eq!(last, prompts.len());
    for (i, (a, b)) in together.iter().zip(one_by_one(&open, &prompts)).enumerate() {
        for (x, y) in a.log_likelihoods.iter().zip(b) {
            assert!(
                (x - y).abs() < 2e-2 * (1.0 + y.abs()),
                "prompt {i}: {x} {y}"
            );
        }
    }
}

#[test]
fn smollm2_agrees_with_a_numpy_forward_pass() {
    let Some(model) = cached("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    let values: Vec<Vec<[f64; 4]>> =
        serde_json::from_str(include_str!("golden/choice_model.json")).expect("the script's JSON");
    // On the decoded weights: products with quantised ones round activations to eight bits, which
    // moves a log-likelihood of -10 by up to 0.6.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let plain = dir.path().join("f32.gguf");
    decoded(&model, &plain);
    let open = OpenModel::open(&plain, 0).expect("a good model");
    let golden = choice_golden().prompts;
    let sets = golden.iter().filter(|p| p.0 == "anatomy.csv");
    for ((_, _, shots, prompts), values) in sets.zip(values) {
        let answered = answer_choices(&open.model, &Vec::new(), prompts, 1, &mut |_| {});
        for (a, wanted) in answered.expect("scores").iter().zip(values) {
            for (x, y) in a.log_likelihoods.iter().zip(wanted) {
                assert!((x - y).abs() < 0.02, "{shots} shots: {a:?} {wanted:?}");
            }
            assert_eq!(a.chosen, likeliest(&wanted));
        }
    }
}

#[test]
fn eval_choice_reports_every_subject_and_all() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (a, b) = (
        dir.path().join("a_test.csv"),
        dir.path().join("wmdp-bio.json"),
    );
    write_questions(&a);
    write_questions(&b);
    let (model, details) = (mini(), dir.path().join("details"));
    let report = json(&[
        "eval",
        "-m",
        text(&model),
        "-t",
        "1",
        "--limit",
        "4",
        "--json",
        "--shots",
        "2",
        "--dev",
        text(&a),
        "--details",
        text(&details),
        "--choice",
        text(dir.path()),
    ]);
    let subjects = report["subjects"].as_array().expect("a list");
    assert_eq!(
        (report["n"].as_u64(), subjects.len()),
        (Some(8), 2),
        "{report}"
    );
    assert_eq!(subjects[0]["subject"], "a");
    assert_eq!(subjects[1]["topic"], "biology");
    for scores in subjects.iter().chain([&report]) {
        let accuracy = scores["accuracy"].as_f64().expect("a number");
        let [low, high] = [0, 1].map(|i| scores["interval"][i].as_f64().expect("a number"));
        assert!(low <= accuracy && accuracy <= high, "{scores}");
    }
    let lines = fs::read_to_string(details).expect("written");
    let hits = lines
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).expect("JSON Lines"))
        .filter(|l| l["answer"] == l["chosen"])
        .count();
    assert_eq!(report["hits"].as_u64(), Some(hits as u64));
}

#[derive(Deserialize)]
struct AnswerGolden {
    logits: Vec<Vec<f32>>,
    tokens: Vec<i32>,
    text: String,
    has_end: bool,
    extraction_strength: f64,
    exact_memorisation: Option<f64>,
    loss: f64,
    zlib: f64,
    min_k: f64,
    min_k_plus_plus: f64,
}

#[derive(Deserialize)]
struct PrivacyGolden {
    k: f64,
    answers: Vec<AnswerGolden>,
    /// Forget scores, holdout scores, sklearn's AUC.
    auc: Vec<(Vec<f64>, Vec<f64>, f64)>,
    /// AUC, retain model's AUC, privleak, rel_diff.
    relative: Vec<[f64; 4]>,
    /// Losses of the true and of the wrong answers, truth share.
    truth: Vec<(Vec<f64>, Vec<f64>, f64)>,
    /// ES, EM, paraphrase probability, truth share, privacy, utility; memorisation, aggregate.
    aggregates: Vec<[f64; 8]>,
    fluency: [f64; 3],
    /// Text, bytes of its zlib stream.
    zlib: Vec<(String, usize)>,
}

fn privacy_golden() -> PrivacyGolden {
    serde_json::from_str(include_str!("golden/privacy.json")).expect("the script's JSON")
}

#[test]
fn answer_scores_equal_open_unlearnings_formulas() {
    let golden = privacy_golden();
    for (i, answer) in golden.answers.iter().enumerate() {
        let rows = answer.logits.iter().zip(&answer.tokens);
        let mut tokens: Vec<TokenStat> = rows.map(|(l, &t)| TokenStat::new(l, t)).collect();
        let end = if answer.has_end { tokens.pop() } else { None };
        assert_eq!(
            exact_memorisation(&tokens),
            answer.exact_memorisation,
            "{i}"
        );
        let strength = extraction_strength(&tokens);
        assert!(
            (strength - answer.extraction_strength).abs() < 1e-15,
            "{i}: {strength}"
        );
        let stats = AnswerStats {
            tokens,
            end: end.map(|t| t.log_prob),
            text: answer.text.clone().into_bytes(),
        };
        let scores = stats.attack(golden.k);
        let wanted = [
            answer.loss,
            answer.zlib,
            answer.min_k,
            answer.min_k_plus_plus,
        ];
        for (got, wanted) in scores.values().into_iter().zip(wanted) {
            assert!(
                (got - wanted).abs() < 1e-12 * (1.0 + wanted.abs()),
                "{i}: {got} {wanted}"
            );
        }
    }
    for (text, n) in golden.zlib {
        assert_eq!(zlib_length(text.as_bytes()), n, "{text}");
    }
}

#[test]
fn masked_tokens_have_no_weight() {
    let row = [1.0, f32::NEG_INFINITY, 0.5];
    let (masked, without) = (TokenStat::new(&row, 2), TokenStat::new(&[1.0, 0.5], 1));
    assert_eq!(masked, without);
    assert!(TokenStat::new(&[7.0; 5], 0).variance == 0.0);
}

#[test]
fn auc_equals_sklearns() {
    for (forget, holdout, wanted) in privacy_golden().auc {
        let got = auc(&forget, &holdout);
        assert!((got - wanted).abs() < 1e-14, "{got} {wanted}");
        let mirrored = auc(&holdout, &forget);
        assert!((got + mirrored - 1.0).abs() < 1e-14);
    }
    assert!(auc(&[], &[1.0]).is_nan());
}

#[test]
fn relative_and_aggregate_scores_equal_the_originals() {
    let golden = privacy_golden();
    for [score, reference, leak, difference] in golden.relative {
        assert!((privleak(score, reference) - leak).abs() < 1e-11);
        assert!((rel_diff(score, reference) - difference).abs() < 1e-11);
        assert_eq!(retain_score(reference, reference), 1.0);
        assert_eq!(retain_score(1.0, reference).max(1e-9), 1e-9);
    }
    for (right, wrong, share) in golden.truth {
        assert!((truth_share(&right, &wrong) - share).abs() < 1e-15);
    }
    for [
        es,
        em,
        paraphrase,
        share,
        privacy,
        utility,
        memorised,
        wanted,
    ] in golden.aggregates
    {
        let score = Memorised {
            extraction_strength: es,
            exact_memorisation: em,
            paraphrase_probability: paraphrase,
            truth_share: share,
        }
        .score();
        assert!((score - memorised).abs() < 1e-14, "{score} {memorised}");
        let got = aggregate(score, privacy, utility);
        assert!((got - wanted).abs() < 1e-14, "{got} {wanted}");
    }
    let [mu, fluency, wanted] = golden.fluency;
    assert!((utility(mu, Some(fluency)) - wanted).abs() < 1e-15);
    assert_eq!(utility(mu, None), mu);
}

#[test]
fn eval_privacy_finds_what_the_model_was_taught() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, forget, unseen) = (mini(), demo("forget.jsonl"), demo("unseen.jsonl"));
    let log = dir.path().join("log.json");
    let with = |forget: &Path, more: &[&str]| {
        let mut args = vec!["eval", "-m", text(&model), "-t", "1", "--json", "--privacy"];
        args.extend(["--forget", text(forget), "--holdout", text(&unseen)]);
        args.extend(more);
        json(&args)
    };
    let report = with(&forget, &[]);
    assert_eq!(report["extraction_strength"], 1.0);
    assert_eq!(report["auc"]["loss"], 1.0);
    assert!(report["privacy"].is_null() && report["memorisation"].is_null());
    fs::write(&log, report.to_string()).expect("room");

    // The same questions with other answers beside them, held against itself as retain model.
    let perturbed = dir.path().join("perturbed.jsonl");
    let lines = fs::read_to_string(&forget).expect("readable");
    let lines = lines.lines().map(|line| {
        let mut record: serde_json::Value = serde_json::from_str(line).expect("JSON Lines");
        record["paraphrased_answer"] = record["answer"].clone();
        record["perturbed_answer"] = serde_json::json!(["Nobody knows.", "It was never said."]);
        format!("{record}\n")
    });
    fs::write(&perturbed, lines.collect::<String>()).expect("room");
    let report = with(
        &perturbed,
        &["--retain-model", text(&log), "--model-utility", "0.5"],
    );
    assert_eq!(report["privacy"], 1.0);
    assert_eq!(report["privleak"]["zlib"], 0.0);
    assert_eq!(report["retain_scores"]["min_k_plus_plus"], 1.0);
    assert!(report["truth_share"].as_f64() > Some(0.9), "{report}");
    let [p, q] = ["probability", "paraphrase_probability"].map(|k| report[k].as_f64());
    assert!(
        (p.expect("a number") - q.expect("a number")).abs() < 1e-5,
        "{report}"
    );
    // Everything is extracted: 1 − ES is 0, and so are the harmonic means.
    assert_eq!(
        (&report["memorisation"], &report["aggregate"]),
        (&0.0.into(), &0.0.into())
    );
}

#[test]
fn privacy_refuses_what_would_mislead() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, forget, unseen) = (mini(), demo("forget.jsonl"), demo("unseen.jsonl"));
    let log = dir.path().join("log.json");
    let with = |code: i32, holdout: &PathBuf, more: &[&str]| {
        let mut args = vec!["eval", "-m", text(&model), "-t", "1", "--privacy"];
        args.extend(["--forget", text(&forget), "--holdout", text(holdout)]);
        args.extend(more);
        fails(code, &args)
    };
    let stderr = with(2, &forget, &[]);
    assert!(stderr.contains("20 records of the forget set"), "{stderr}");
    with(2, &unseen, &["--min-k", "0"]);
    with(2, &unseen, &["--model-utility", "1.5"]);
    fs::write(&log, "{\"n_forget\": 3}").expect("room");
    let stderr = with(3, &unseen, &["--retain-model", text(&log)]);
    assert!(
        stderr.contains("log.json: wanted the JSON of `eval --privacy`"),
        "{stderr}"
    );
    let auc = r#"{"loss": 0.5, "zlib": 0.5, "min_k": 0.5, "min_k_plus_plus": 0.5}"#;
    let other = format!("{{\"n_forget\": 20, \"n_holdout\": 7, \"min_k\": 0.4, \"auc\": {auc}}}");
    fs::write(&log, other).expect("room");
    let stderr = with(3, &unseen, &["--retain-model", text(&log)]);
    assert!(stderr.contains("n_holdout 20, found 7"), "{stderr}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("plain names")
}
