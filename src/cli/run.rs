//! `nepenthe run`.

use super::common::{AdapterArgs, ModelArgs, TemplateArg, TrustArgs};
use crate::adapter::open_adapters;
use crate::data::{Message, Role, build_prompt};
use crate::error::Error;
use crate::ggml::{Context, ContextOptions};
use crate::score::{Sampling, generate_streaming};
use crate::store::Store;
use clap::Args;
use std::io::{Read, Write};
use std::path::PathBuf;

/// Generate text
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    adapters: AdapterArgs,
    #[command(flatten)]
    trust: TrustArgs,
    /// Apply the active patches of this store as well
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// What to say to the model
    #[arg(short, long, conflicts_with = "file")]
    prompt: Option<String>,
    /// File with what to say (without this and -p: stdin)
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// System message
    #[arg(long)]
    system: Option<String>,
    /// Continue the prompt as it is, without a chat template
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    template: TemplateArg,
    /// Most tokens to generate
    #[arg(
        short = 'n',
        long = "n-predict",
        visible_alias = "predict",
        default_value_t = 256
    )]
    n_predict: usize,
    /// Context length in tokens
    #[arg(short, long = "ctx-size", default_value_t = 2048)]
    ctx_size: u32,
    /// Temperature; 0 takes the likeliest token every time
    #[arg(long, default_value_t = 0.0)]
    temp: f32,
    /// Sample from the K likeliest tokens (0: all)
    #[arg(long, default_value_t = 40)]
    top_k: i32,
    /// Sample from the likeliest tokens up to this probability
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Sample from tokens at least this likely relative to the likeliest
    #[arg(long, default_value_t = 0.05)]
    min_p: f32,
    /// Penalty on repetition (1: none)
    #[arg(long, default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Seed
    #[arg(short, long, default_value_t = 42)]
    seed: u32,
    /// Print JSON: prompt tokens, text, tokens
    #[arg(long)]
    json: bool,
}

impl Run {
    pub(super) fn run(&self) -> Result<(), Error> {
        let text = self.text()?;
        let open = self.model.open()?;
        let mut adapters = self.adapters.open(&open, &self.trust)?;
        if let Some(dir) = &self.store {
            let (store, key) = (Store::open(dir)?, self.trust.key()?);
            for entry in store.index()?.patches {
                store.verify(entry.id, key.as_ref())?;
                let path = store.path_of(entry.id);
                adapters.extend(open_adapters(&open, [(path.as_path(), entry.scale)])?);
            }
        }
        let tokens = if self.raw {
            open.model.tokenize(&text, true, true)
        } else {
            let mut messages = Vec::new();
            let system = self.system.iter().map(|s| (Role::System, s.clone()));
            for (role, content) in system.chain([(Role::User, text)]) {
                messages.push(Message { role, content });
            }
            build_prompt(&messages, &open.model, &self.template.of(&open)?)?
        };
        let n_ctx = self.ctx_size as usize;
        if tokens.is_empty() || tokens.len() >= n_ctx {
            return Err(Error::Setting {
                setting: "prompt",
                wanted: format!("1 to {} tokens", n_ctx.saturating_sub(1)),
                found: tokens.len().to_string(),
            });
        }
        let mut context = Context::new(
            &open.model,
            ContextOptions {
                n_ctx: self.ctx_size,
                n_batch: 512.min(self.ctx_size),
                n_threads: self.model.n_threads(),
                flash_attn: true,
                ..ContextOptions::default()
            },
        )?;
        context.set_adapters(&adapters)?;
        let sampling = Sampling {
            temp: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed,
        };
        let mut stdout = std::io::stdout().lock();
        let json = self.json;
        let (out, _) = generate_streaming(
            &mut context,
            &tokens,
            0,
            self.n_predict,
            &sampling,
            &mut |token, _| {
                // A reader that went away ends the generation, not the program.
                json || stdout
                    .write_all(&open.model.piece(token, false))
                    .and_then(|()| stdout.flush())
                    .is_ok()
            },
        )?;
        if json {
            super::emit(&serde_json::json!({
                "prompt_tokens": tokens.len(),
                "tokens": out.len(),
                "text": open.model.detokenize(&out),
            }));
        } else {
            let _ = writeln!(stdout);
        }
        Ok(())
    }

    fn text(&self) -> Result<String, Error> {
        if let Some(p) = &self.prompt {
            return Ok(p.clone());
        }
        let (path, read) = match &self.file {
            Some(path) => (path.clone(), std::fs::read_to_string(path)),
            None => {
                let mut text = String::new();
                (
                    PathBuf::from("stdin"),
                    std::io::stdin().read_to_string(&mut text).map(|_| text),
                )
            }
        };
        read.map_err(|source| Error::Io {
            path,
            doing: "reading",
            source,
        })
    }
}
