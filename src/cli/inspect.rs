//! `nepenthe inspect`.

use crate::error::Error;
use crate::gguf::{Array, Gguf, Value};
use crate::patch::Patch;
use crate::patch::merged::{KEY_BASE, merged};
use clap::Args;
use serde_json::{Map, Value as Json, json};
use std::path::PathBuf;

/// Longest list or text shown in full.
const SHOWN: usize = 8;
const SHOWN_TEXT: usize = 120;

/// Show what is in a patch, or in any GGUF
#[derive(Debug, Args)]
pub struct Inspect {
    /// The file
    file: PathBuf,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Report as JSON on stdout
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(super) fn run(&self) -> Result<(), Error> {
        let gguf = Gguf::open(&self.file)?;
        let kind = gguf
            .metadata()
            .get_opt::<&str>("general.type")?
            .unwrap_or("model");
        let info = match kind {
            "adapter" => Patch::open(&self.file)?.info,
            _ => None,
        };
        let merged = merged(&gguf)?;
        if self.json {
            let mut report = json!({
                "file": self.file,
                "bytes": gguf.file_len(),
                "version": gguf.version(),
                "type": kind,
                "metadata": metadata(&gguf),
                "tensor_types": types(&gguf).into_iter().map(|(ty, n, bytes)| json!({ "type": ty, "tensors": n, "bytes": bytes })).collect::<Vec<_>>(),
                "patch": info,
                "merged": merged,
            });
            if self.tensors {
                let list = gguf.tensors().iter().map(|t| json!({ "name": t.name, "shape": t.dims(), "type": t.ty.name(), "bytes": t.n_bytes }));
                report["tensors"] = list.collect();
            }
            super::emit(&report);
            return Ok(());
        }
        println!(
            "{}: GGUF {}, {kind}, {} bytes",
            self.file.display(),
            gguf.version(),
            gguf.file_len()
        );
        for (key, value) in gguf.metadata().iter() {
            // Shown below, one line per tensor.
            if !key.starts_with("nepenthe.tensor.") && !key.starts_with("nepenthe.merged.") {
                println!("  {key} = {}", short(value));
            }
        }
        if let Some(base) = gguf.metadata().value(KEY_BASE) {
            println!("  merged into a model of sha256 {}", short(base));
        }
        for m in &merged {
            println!(
                "  contains {} at scale {} (sha256 {})",
                m.name, m.scale, m.sha256
            );
        }
        for (ty, n, bytes) in types(&gguf) {
            println!("  {n} tensors of {ty}, {bytes} bytes");
        }
        if let Some(info) = &info {
            println!(
                "  {:<32} {:>4} {:>6} {:>9} {:>11}",
                "adapted tensor", "rank", "retain", "|dW|/|W|", "|P'dW|/|dW|"
            );
            for t in &info.tensors {
                println!(
                    "  {:<32} {:>4} {:>6} {:>8.3}% {:>11.2e}",
                    t.name,
                    t.rank,
                    t.retain_rank,
                    100.0 * t.relative_norm,
                    t.retain_fraction
                );
            }
        }
        if self.tensors {
            for t in gguf.tensors() {
                println!(
                    "  {:<40} {:?} {} {} bytes",
                    t.name,
                    t.dims(),
                    t.ty.name(),
                    t.n_bytes
                );
            }
        }
        Ok(())
    }
}

/// (type, tensors, bytes), in order of first use.
fn types(gguf: &Gguf) -> Vec<(&'static str, usize, u64)> {
    let mut out: Vec<(&'static str, usize, u64)> = Vec::new();
    for t in gguf.tensors() {
        match out.iter_mut().find(|(ty, ..)| *ty == t.ty.name()) {
            Some((_, n, bytes)) => {
                *n += 1;
                *bytes += t.n_bytes;
            }
            None => out.push((t.ty.name(), 1, t.n_bytes)),
        }
    }
    out
}

fn metadata(gguf: &Gguf) -> Json {
    let entries = gguf
        .metadata()
        .iter()
        .map(|(k, v)| (k.to_owned(), to_json(v)));
    Json::Object(entries.collect::<Map<_, _>>())
}

fn to_json(value: &Value) -> Json {
    match value {
        Value::Bool(b) => json!(b),
        Value::F32(x) => json!(x),
        Value::F64(x) => json!(x),
        Value::String(s) => json!(String::from_utf8_lossy(s.as_bytes())),
        Value::Array(a) if a.len() > SHOWN => {
            json!(format!("{} of {}", a.len(), a.element_type().name()))
        }
        Value::Array(Array::String(v)) => v
            .iter()
            .map(|s| String::from_utf8_lossy(s.as_bytes()))
            .collect(),
        Value::Array(Array::F32(v)) => json!(v),
        Value::Array(Array::F64(v)) => json!(v),
        Value::Array(a) => match a.integers() {
            Some(v) => v.iter().map(|n| Json::from(*n as i64)).collect(),
            None => json!(format!("{} of {}", a.len(), a.element_type().name())),
        },
        other => other
            .integer()
            .and_then(|n| i64::try_from(n).ok())
            .map_or(Json::Null, Json::from),
    }
}

/// One line for a value.
fn short(value: &Value) -> String {
    let text = to_json(value).to_string();
    if text.chars().count() <= SHOWN_TEXT {
        return text;
    }
    let start: String = text.chars().take(SHOWN_TEXT).collect();
    format!("{start}... ({} characters)", text.chars().count())
}
