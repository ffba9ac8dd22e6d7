//! `adapter_config.json`: what decides the scale, and what must not be there.

use super::PeftError;
use serde_json::{Map, Value};
use std::fs;
use std::path::Path;

/// Largest file read; real ones have a few kilobytes.
const MAX_BYTES: u64 = 4 << 20;

/// Keys that change what the adapter computes, and the values under which they do not (null
/// and absence always pass).
const NEUTRAL: [(&str, &str, &[&str]); 17] = [
    ("use_dora", "false", &["false"]),
    ("bias", "none", &["\"none\""]),
    ("lora_bias", "false", &["false"]),
    ("fan_in_fan_out", "false", &["false"]),
    ("modules_to_save", "none", &["[]"]),
    ("trainable_token_indices", "none", &["[]", "{}"]),
    ("target_parameters", "none", &["[]"]),
    ("layer_replication", "none", &["[]"]),
    ("use_qalora", "false", &["false"]),
    ("use_bdlora", "none", &["false"]),
    ("megatron_config", "none", &[]),
    ("alora_invocation_tokens", "none", &["[]"]),
    ("loftq_config", "none", &["{}"]),
    ("corda_config", "none", &["{}"]),
    ("arrow_config", "none", &["{}"]),
    // PiSSA, OLoRA, LoftQ and CorDA change the base weights too.
    (
        "init_lora_weights",
        "true, false, gaussian, eva or orthogonal",
        &["true", "false", "\"gaussian\"", "\"eva\"", "\"orthogonal\""],
    ),
    ("peft_type", "LORA", &["\"LORA\""]),
];

/// Ranks and scales by module.
#[derive(Debug)]
pub(super) struct Config {
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    ranks: Vec<(String, f64)>,
    alphas: Vec<(String, f64)>,
}

impl Config {
    pub fn read(path: &Path) -> Result<Self, PeftError> {
        let failed = |source| PeftError::Io {
            path: path.to_owned(),
            doing: "reading",
            source,
        };
        let bad = |problem: String| PeftError::Config {
            path: path.to_owned(),
            problem,
        };
        let len = fs::metadata(path).map_err(failed)?.len();
        if len > MAX_BYTES {
            return Err(bad(format!(
                "wanted at most {MAX_BYTES} bytes, found {len}"
            )));
        }
        let text = fs::read(path).map_err(failed)?;
        let map: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        for (key, wanted, neutral) in NEUTRAL {
            match map.get(key) {
                None | Some(Value::Null) => {}
                Some(value) if neutral.contains(&value.to_string().as_str()) => {}
                Some(value) => {
                    return Err(PeftError::Unsupported {
                        path: path.to_owned(),
                        key: key.to_owned(),
                        wanted,
                        found: value.to_string(),
                    });
                }
            }
        }
        let number = |key: &str| match map.get(key).and_then(Value::as_f64) {
            Some(n) if n.is_finite() => Ok(n),
            _ => Err(bad(format!("{key}: wanted a number"))),
        };
        let rank = number("r")?;
        check_rank(rank).map_err(|p| bad(format!("r: {p}")))?;
        let use_rslora = match map.get("use_rslora") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(b)) => *b,
            Some(other) => return Err(bad(format!("use_rslora: wanted a bool, found {other}"))),
        };
        let patterns = |key: &'static str| patterns(path, &map, key);
        let ranks = patterns("rank_pattern")?;
        for (key, rank) in &ranks {
            check_rank(*rank).map_err(|p| bad(format!("rank_pattern {key}: {p}")))?;
        }
        Ok(Self {
            rank: rank as usize,
            alpha: number("lora_alpha")?,
            use_rslora,
            ranks,
            alphas: patterns("alpha_pattern")?,
        })
    }

    /// r of a module.
    pub fn rank(&self, module: &str) -> usize {
        matching(&self.ranks, module).map_or(self.rank, |n| n as usize)
    }

    /// s of a module: alpha/r, or alpha/√r.
    pub fn scale(&self, module: &str) -> f32 {
        let alpha = matching(&self.alphas, module).unwrap_or(self.alpha);
        let r = self.rank(module) as f64;
        (alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }
}

fn check_rank(rank: f64) -> Result<(), String> {
    if (1.0..=65_536.0).contains(&rank) && rank.fract() == 0.0 {
        return Ok(());
    }
    Err(format!("wanted a rank from 1 to 65536, found {rank}"))
}

/// Module name endings and their numbers, in file order, which decides where two match.
fn patterns(
    path: &Path,
    map: &Map<String, Value>,
    key: &'static str,
) -> Result<Vec<(String, f64)>, PeftError> {
    let unsupported = |wanted, found: String| PeftError::Unsupported {
        path: path.to_owned(),
        key: key.to_owned(),
        wanted,
        found,
    };
    let entries = match map.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(unsupported("names and numbers", other.to_string())),
    };
    let mut out = Vec::new();
    for (name, value) in entries {
        // PEFT takes them as regular expressions. `^` at the start, for the whole name, is the
        // only one people write.
        let plain = name.strip_prefix('^').unwrap_or(name);
        let simple = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if plain.is_empty() || !plain.chars().all(simple) {
            return Err(unsupported("plain module names", format!("{name:?}")));
        }
        match value.as_f64().filter(|n| n.is_finite()) {
            Some(n) => out.push((name.clone(), n)),
            None => return Err(unsupported("numbers", value.to_string())),
        }
    }
    Ok(out)
}

/// The first pattern that is the module's name, or its last components.
fn matching(patterns: &[(String, f64)], module: &str) -> Option<f64> {
    let matches = |pattern: &str| match pattern.strip_prefix('^') {
        Some(whole) => module == whole,
        None => module
            .strip_suffix(pattern)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
    };
    let found = patterns.iter().find(|(pattern, _)| matches(pattern));
    found.map(|(_, n)| *n)
}
