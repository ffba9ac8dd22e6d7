//! What the benches share: where model and data are, TOFU's samples, this process's cost.
#![allow(dead_code, reason = "each bench uses its part")]

use nepenthe::data::{Record, Sample, Template, build_samples, load_records};
use nepenthe::model::OpenModel;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The retain authors: the eight before the two to be forgotten.
const RETAIN_ROWS: Range<usize> = 3800..3960;
const MAX_TOKENS: usize = 512;

/// The command line: `--flag value` pairs.
pub struct Args(Vec<String>);

impl Args {
    pub fn parse() -> Self {
        Self(std::env::args().skip(1).collect())
    }

    pub fn value(&self, flag: &str) -> Option<&str> {
        let at = self.0.iter().position(|a| a == flag)?;
        self.0.get(at + 1).map(String::as_str)
    }

    pub fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|a| a == flag)
    }

    /// The number after `flag`, if it is there.
    pub fn number(&self, flag: &str) -> Fallible<Option<usize>> {
        let found = self.value(flag).map(str::parse).transpose();
        found.map_err(|e| format!("{flag}: {e}").into())
    }

    /// Model and TOFU folder, or the printed reason why the bench is skipped.
    pub fn inputs(&self) -> Option<(PathBuf, PathBuf)> {
        let model = self
            .value("--model")
            .map_or_else(|| cache().join("gemma-3-270m-q4_k_m.gguf"), PathBuf::from);
        let data = self.value("--data").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/tofu"),
            PathBuf::from,
        );
        for (path, hint) in [
            (&model, "models/fetch.sh gets it, --model names another"),
            (&data, "--data names another folder with TOFU's files"),
        ] {
            if !path.exists() {
                println!("skipped: {} is not at hand ({hint})", path.display());
                return None;
            }
        }
        Some((model, data))
    }

    /// One thread and all cores, or what `--threads` says.
    pub fn threads(&self) -> Fallible<Vec<usize>> {
        if let Some(t) = self.value("--threads") {
            return Ok(vec![t.parse()?]);
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(if cores > 1 { vec![1, cores] } else { vec![1] })
    }
}

/// The embedded model.
pub fn mini() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nepenthe-mini.gguf")
}

fn cache() -> PathBuf {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    var("NEPENTHE_CACHE").unwrap_or_else(|| {
        var("XDG_CACHE_HOME")
            .unwrap_or_else(|| var("HOME").unwrap_or_default().join(".cache"))
            .join("nepenthe")
    })
}

/// TOFU: two authors to forget (40 pairs), the eight before them to keep (160).
pub struct Sets {
    pub forget: Vec<Sample>,
    pub retain: Vec<Sample>,
}

impl Sets {
    pub fn load(open: &OpenModel, data: &Path) -> Fallible<Self> {
        let template = open.template().unwrap_or(Template::None);
        let samples = |records: &[Record]| -> Fallible<Vec<Sample>> {
            Ok(build_samples(records, &open.model, &template, MAX_TOKENS)?.samples)
        };
        let forget = load_records(&data.join("forget01.json"))?;
        let full = load_records(&data.join("full.json"))?;
        Ok(Self {
            forget: samples(&forget)?,
            retain: samples(&full[RETAIN_ROWS])?,
        })
    }
}

/// User and system time of this process, all threads, to the clock tick.
pub fn cpu_seconds() -> Fallible<f64> {
    cpu_at(11)
}

/// The same of all children that have ended.
pub fn child_cpu_seconds() -> Fallible<f64> {
    cpu_at(13)
}

/// Two neighbouring times in `/proc/self/stat`, fields counted from the one after the name.
fn cpu_at(first: usize) -> Fallible<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .ok_or("/proc/self/stat has no name")?
        .1
        .split_whitespace()
        .collect();
    let ticks: f64 = fields[first].parse::<f64>()? + fields[first + 1].parse::<f64>()?;
    // Linux reports in USER_HZ, which is 100 on every architecture this runs on.
    Ok(ticks / 100.0)
}

/// The largest resident size of this process so far.
pub fn peak_bytes() -> Fallible<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .ok_or("/proc/self/status has no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024.0)
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

/// What a process has used.
#[derive(Debug, Default)]
pub struct Used {
    /// Most pages of all kinds at a time, bytes.
    pub peak: u64,
    /// Most pages from files.
    pub file: u64,
    /// Most pages of its own.
    pub anon: u64,
    /// User and system seconds.
    pub cpu: f64,
}

/// Between looks at a process.
const INTERVAL: Duration = Duration::from_millis(20);

/// Run `command` to its end, which must be one of `codes`.
pub fn watch(command: &mut Command, codes: &[i32]) -> Fallible<Used> {
    let (began, before) = (Instant::now(), child_cpu_seconds()?);
    let mut child = command.spawn()?;
    let mut used = Used::default();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        // The process may end between the question and this.
        if let Ok(text) = std::fs::read_to_string(format!("/proc/{}/status", child.id())) {
            used.peak = used.peak.max(field(&text, "VmHWM:"));
            used.file = used.file.max(field(&text, "RssFile:"));
            used.anon = used.anon.max(field(&text, "RssAnon:"));
        }
        std::thread::sleep(INTERVAL);
    };
    used.cpu = child_cpu_seconds()? - before;
    if !status.code().is_some_and(|c| codes.contains(&c)) {
        return Err(format!("{command:?}: {status} after {:.0?}", began.elapsed()).into());
    }
    Ok(used)
}

/// Bytes of a field of `/proc/PID/status`; 0 where a dying process no longer has it.
fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|l| l.strip_prefix(name));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    1024 * kib.unwrap_or(0)
}
