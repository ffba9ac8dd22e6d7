//! `nepenthe demo`.

use super::common::{GpuLayers, ModelArgs};
use super::train_ui::TrainUi;
use crate::adapter::{Loaded, open_adapters};
use crate::data::{Message, Record, Role, Template, build_prompt, parse_json};
use crate::error::Error;
use crate::model::OpenModel;
use crate::score::{MAX_ANSWER, generate_greedy, scoring_context};
use crate::train::config::UnlearnConfig;
use crate::unlearn::{Job, unlearn};
use clap::Args;
use std::path::{Path, PathBuf};

const MODEL: &[u8] = include_bytes!("../../models/nepenthe-mini.gguf");
const FORGET: &str = include_str!("../../models/demo/forget.jsonl");
const RETAIN: &str = include_str!("../../models/demo/retain.jsonl");
/// Questions of each set that are shown.
const SHOWN: usize = 3;

/// Forget two people in a small built-in model, from start to finish
#[derive(Debug, Args)]
pub struct Demo {
    /// Folder for the model and the patch (default: a temporary one)
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Threads (default: all cores)
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// No progress on stderr
    #[arg(short, long)]
    quiet: bool,
}

impl Demo {
    pub(super) fn run(&self) -> Result<(), Error> {
        let temporary = tempfile::tempdir().map_err(|source| Error::Io {
            path: std::env::temp_dir(),
            doing: "making a temporary directory",
            source,
        })?;
        let folder = self
            .out
            .clone()
            .unwrap_or_else(|| temporary.path().to_owned());
        std::fs::create_dir_all(&folder).map_err(|source| Error::Io {
            path: folder.clone(),
            doing: "making the folder",
            source,
        })?;
        let model = folder.join("nepenthe-mini.gguf");
        crate::atomic::write_atomic(&model, true, |out| {
            out.write_all(MODEL).map_err(|source| Error::Io {
                path: model.clone(),
                doing: "writing",
                source,
            })
        })?;
        let args = ModelArgs {
            model: model.clone(),
            threads: self.threads,
            n_gpu_layers: GpuLayers(0),
            verbose: false,
        };
        let open = args.open()?;
        let template = open.template()?;
        let (forget, retain) = (
            parse_json(FORGET, Path::new("forget.jsonl"))?,
            parse_json(RETAIN, Path::new("retain.jsonl"))?,
        );
        let shown: Vec<Record> = spread(&forget).chain(spread(&retain)).cloned().collect();
        println!(
            "The built-in model knows {} questions and answers about invented people. It is asked to forget {} of them.",
            forget.len() + retain.len(),
            forget.len()
        );
        let before = answers(&open, &Vec::new(), &template, &shown, args.n_threads())?;
        let patch = folder.join("forget-patch.gguf");
        let mut ui = TrainUi::new(self.quiet, None)?;
        let report = unlearn(
            Job {
                open: &open,
                template: template.clone(),
                forget: forget.clone(),
                retain: Some(retain.clone()),
                unseen: Vec::new(),
                refusals: None,
                shared: None,
                config: UnlearnConfig::default(),
                n_threads: args.n_threads(),
                memory: None,
                out: patch.clone(),
                force: true,
                sketch: false,
                generate: true,
                checkpoint: folder.join("demo.checkpoint"),
                resume: false,
            },
            &mut ui,
        )?;
        ui.finish()?;
        let adapters = open_adapters(&open, [(patch.as_path(), 1.0)])?;
        let after = answers(&open, &adapters, &template, &shown, args.n_threads())?;
        let revoked = answers(&open, &Vec::new(), &template, &shown, args.n_threads())?;
        for (i, record) in shown.iter().enumerate() {
            if i == 0 {
                println!("\nTo be forgotten:");
            } else if i == SHOWN {
                println!("\nTo be kept:");
            }
            println!("  {}", question(record));
            println!("    before  {}", before[i]);
            println!("    after   {}", after[i]);
        }
        println!();
        super::unlearn::table(&report, &patch);
        println!(
            "patch revoked: {} of {} answers are again what they were",
            revoked.iter().zip(&before).filter(|(a, b)| a == b).count(),
            shown.len()
        );
        if self.out.is_some() {
            println!(
                "model and patch are in {}; either works in llama.cpp too",
                folder.display()
            );
        }
        Ok(())
    }
}

/// A few records from all over the set.
fn spread(records: &[Record]) -> impl Iterator<Item = &Record> {
    (0..SHOWN).map(|i| &records[i * records.len() / SHOWN])
}

fn question(record: &Record) -> String {
    record
        .turns()
        .map_or_else(String::new, |t| t[0].content.clone())
}

fn answers(
    open: &OpenModel,
    adapters: &Loaded,
    template: &Template,
    records: &[Record],
    n_threads: usize,
) -> Result<Vec<String>, Error> {
    let mut prompts = Vec::new();
    for record in records {
        let message = Message {
            role: Role::User,
            content: question(record),
        };
        prompts.push(build_prompt(&[message], &open.model, template)?);
    }
    let mut context = scoring_context(&open.model, adapters, 128 + MAX_ANSWER, n_threads)?;
    let tokens = generate_greedy(&mut context, &prompts, MAX_ANSWER, &mut |_| {})?;
    Ok(tokens
        .iter()
        .map(|t| open.model.detokenize(t).trim().to_owned())
        .collect())
}
