//! Losses of TOFU-like answers with and without what they share computed once, as a ratio in one
//! run. `cargo bench --bench shared_prefix [-- MODEL.gguf [TOFU_FOLDER]]`; without arguments the
//! embedded model and its own facts.

use nepenthe::data::{Record, Sample, TofuQuestion, build_samples, load_records, load_tofu};
use nepenthe::model::OpenModel;
use nepenthe::score::{answer_losses, scoring_context, shared_losses};
use std::path::{Path, PathBuf};
use std::time::Instant;

const N_QUESTIONS: usize = 8;
const N_ROUNDS: usize = 3;

fn main() {
    let mut args = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = args
        .next()
        .map_or(root.join("models/nepenthe-mini.gguf"), PathBuf::from);
    let questions = match args.next() {
        Some(dir) => load_tofu(&Path::new(&dir).join("forget01_perturbed.json"), true),
        None => Ok(facts(&root.join("models/demo/forget.jsonl"))),
    };
    let questions = questions.expect("questions");
    let open = OpenModel::open(&model, 0).expect("a model");
    let template = open.template().expect("a template or none");
    let groups: Vec<Vec<Sample>> = questions[..N_QUESTIONS]
        .iter()
        .map(|q| {
            let records: Vec<Record> = q.records().collect();
            let set = build_samples(&records, &open.model, &template, 512);
            set.expect("answers").samples
        })
        .collect();
    let samples: Vec<Sample> = groups.iter().flatten().cloned().collect();
    let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let mut context = scoring_context(&open.model, &[], longest, 1).expect("a context");
    let (mut alone, mut shared, mut worst) = (f64::INFINITY, f64::INFINITY, 0f64);
    for _ in 0..N_ROUNDS {
        let began = Instant::now();
        let one = answer_losses(&mut context, &samples, &mut |_| {}).expect("losses");
        alone = alone.min(began.elapsed().as_secs_f64());
        let began = Instant::now();
        let other = shared_losses(&mut context, &groups, &mut |_| Ok(())).expect("losses");
        shared = shared.min(began.elapsed().as_secs_f64());
        for (a, b) in one.iter().zip(other.iter().flatten()) {
            worst = worst.max((a.per_token() - b.per_token()).abs());
        }
    }
    println!(
        "{}: {} answers to {N_QUESTIONS} questions, best of {N_ROUNDS}\n\
         alone {alone:.3} s, shared {shared:.3} s: {:.2}x; largest difference {worst:.1e} nats a token",
        model.display(),
        samples.len(),
        alone / shared,
    );
}

/// Facts with the answers of others as the wrong ones.
fn facts(path: &Path) -> Vec<TofuQuestion> {
    let records = load_records(path).expect("part of the repository");
    let answer = |i: usize| records[i % records.len()].answer().to_owned();
    let question = |record: &Record| match record {
        Record::Qa { question, .. } => question.clone(),
        _ => unreachable!("the demo's facts are questions and answers"),
    };
    let facts = records.iter().enumerate().map(|(i, record)| TofuQuestion {
        question: question(record),
        answer: answer(i),
        paraphrased: Some(format!("It is said that {}", answer(i))),
        perturbed: [5, 10, 15].map(|k| answer(i + k)).to_vec(),
    });
    facts.collect()
}
