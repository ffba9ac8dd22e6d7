//! `nepenthe eval`.

use super::common::{AdapterArgs, ModelArgs, Output, TemplateArg, TrustArgs};
use super::eval_choice::ChoiceArgs;
use super::eval_privacy::PrivacyArgs;
use super::eval_tofu::{Shared, TofuArgs};
use crate::data::load_records;
use crate::error::Error;
use crate::ggml::{Context, ContextOptions};
use crate::progress::Progress;
use crate::score::{evaluate, perplexity};
use clap::Args;
use std::path::{Path, PathBuf};

/// Measure answers, perplexity, TOFU's scores, multiple choice or privacy
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["data", "text", "tofu", "choice", "privacy"])))]
pub struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    adapters: AdapterArgs,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    template: TemplateArg,
    /// Questions with answers (JSON Lines)
    #[arg(long)]
    data: Option<PathBuf>,
    /// Running text: print its perplexity
    #[arg(long)]
    text: Option<PathBuf>,
    #[command(flatten)]
    tofu: TofuArgs,
    #[command(flatten)]
    choice: ChoiceArgs,
    #[command(flatten)]
    privacy: PrivacyArgs,
    /// Only the first N records (of each file or set)
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Only the first N tokens of the text
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Window of the perplexity, in tokens
    #[arg(short, long = "ctx-size", default_value_t = 512)]
    ctx_size: usize,
    /// Do not write answers, only score the given ones
    #[arg(long)]
    no_generate: bool,
    /// Cut samples to this many tokens
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    /// Write every record's scores and answer to a file (JSON Lines)
    #[arg(long, value_name = "FILE")]
    details: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

impl Eval {
    pub(super) fn run(&self) -> Result<(), Error> {
        if let Some(dir) = &self.tofu.tofu {
            let shared = Shared {
                model: &self.model,
                adapters: &self.adapters,
                trust: &self.trust,
                template: &self.template,
                limit: self.limit,
                max_tokens: self.max_tokens,
                generate: !self.no_generate,
                output: self.output,
            };
            return self.tofu.run(dir, &shared);
        }
        if !self.choice.choice.is_empty() {
            return self.run_choice();
        }
        if self.privacy.privacy {
            return self.run_privacy();
        }
        let open = self.model.open()?;
        let adapters = self.adapters.open(&open, &self.trust)?;
        let mut progress = Progress::new("scoring", self.output.quiet || self.output.json);
        if let Some(path) = &self.text {
            return self.perplexity(&open, &adapters, path, &mut progress);
        }
        let mut records = load_records(self.data.as_deref().expect("one of the group"))?;
        records.truncate(self.limit.unwrap_or(usize::MAX).max(1));
        let result = evaluate(
            &open.model,
            &adapters,
            &self.template.of(&open)?,
            &records,
            !self.no_generate,
            (self.max_tokens, self.model.n_threads()),
            &mut |done, total| progress.set(done, total),
        )?;
        drop(progress);
        if let Some(path) = &self.details {
            write_details(path, &records, &result.scored)?;
        }
        if self.output.json {
            super::emit(&result);
        } else {
            println!("samples             {}", result.n);
            println!("answer probability  {:.4}", result.prob);
            if let Some(r) = result.rouge_l {
                println!("ROUGE-L recall      {r:.4}");
            }
            println!("answer NLL          {:.4} nats per token", result.nll);
            println!("answer tokens       {}", result.tokens);
        }
        Ok(())
    }

    fn run_choice(&self) -> Result<(), Error> {
        let subjects = self.choice.load(self.limit)?;
        let open = self.model.open()?;
        let adapters = self.adapters.open(&open, &self.trust)?;
        let report = (self.details.as_deref(), self.output);
        self.choice
            .run(&subjects, (&open, &adapters), &self.model, report)
    }

    fn run_privacy(&self) -> Result<(), Error> {
        let sets = self.privacy.load(self.limit)?;
        let open = self.model.open()?;
        let adapters = self.adapters.open(&open, &self.trust)?;
        let template = self.template.of(&open)?;
        let report = (self.details.as_deref(), self.output);
        let limits = (&self.model, self.max_tokens);
        self.privacy
            .run(&sets, (&open, &adapters, &template), limits, report)
    }

    fn perplexity(
        &self,
        open: &crate::model::OpenModel,
        adapters: &crate::adapter::Loaded,
        path: &Path,
        progress: &mut Progress,
    ) -> Result<(), Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            doing: "reading",
            source,
        })?;
        let mut tokens = open.model.tokenize(&text, true, false);
        tokens.truncate(self.tokens.unwrap_or(usize::MAX));
        if self.ctx_size < 8 || tokens.len() < self.ctx_size {
            return Err(Error::Setting {
                setting: "text",
                wanted: format!(
                    "at least one window of {} tokens (8 or more)",
                    self.ctx_size
                ),
                found: format!("{} tokens", tokens.len()),
            });
        }
        let mut context = Context::new(
            &open.model,
            ContextOptions {
                n_ctx: self.ctx_size as u32,
                n_batch: self.ctx_size.min(512) as u32,
                n_threads: self.model.n_threads(),
                flash_attn: true,
                ..ContextOptions::default()
            },
        )?;
        context.set_adapters(adapters)?;
        let bos = open.model.bos().filter(|&b| tokens.first() == Some(&b));
        let (ppl, n) = perplexity(&mut context, &tokens, self.ctx_size, bos, &mut |d, t| {
            progress.set(d, t)
        })?;
        if self.output.json {
            super::emit(
                &serde_json::json!({ "perplexity": ppl, "tokens": n, "ctx_size": self.ctx_size }),
            );
        } else {
            println!(
                "perplexity {ppl:.4} over {n} tokens in windows of {}",
                self.ctx_size
            );
        }
        Ok(())
    }
}

fn write_details(
    path: &Path,
    records: &[crate::data::Record],
    scored: &[crate::score::Scored],
) -> Result<(), Error> {
    crate::atomic::write_atomic(path, true, |out| {
        for (record, s) in records.iter().zip(scored) {
            let line = serde_json::json!({
                "prompt": record.turns().and_then(|t| t.iter().rev().nth(1).map(|m| m.content.clone())),
                "reference": record.answer(),
                "answer": s.answer,
                "rouge_l": s.rouge_l,
                "nll": s.nll,
                "tokens": s.tokens,
            });
            writeln!(out, "{line}").map_err(|source| Error::Io {
                path: path.to_owned(),
                doing: "writing",
                source,
            })?;
        }
        Ok(())
    })
}
