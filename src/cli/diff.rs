//! `nepenthe diff`.

use crate::error::Error;
use crate::gguf::GgufSet;
use crate::merge::diff::{Diff, TensorDiff, diff};
use crate::replace;
use clap::Args;
use std::path::PathBuf;

/// Say what differs between two models
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// First model (GGUF; any part of a split one)
    a: PathBuf,
    /// Second model
    b: PathBuf,
    /// Report as JSON on stdout
    #[arg(long)]
    json: bool,
}

impl DiffArgs {
    pub(super) fn run(&self) -> Result<(), Error> {
        replace::pending(&self.a)?;
        replace::pending(&self.b)?;
        let found = diff(&GgufSet::open(&self.a)?, &GgufSet::open(&self.b)?)?;
        if self.json {
            super::emit(&found);
        } else {
            print(&found);
        }
        Ok(())
    }
}

fn print(d: &Diff) {
    if d.identical {
        println!("identical: all metadata and all {} tensors", d.n_same);
        return;
    }
    let lists = [
        ("key added", &d.keys_added),
        ("key removed", &d.keys_removed),
        ("key changed", &d.keys_changed),
        ("tensor added", &d.tensors_added),
        ("tensor removed", &d.tensors_removed),
    ];
    for (what, names) in lists {
        for name in names {
            println!("{what}: {name}");
        }
    }
    if !d.tensors.is_empty() {
        println!(
            "{:<32} {:<14} {:>16} {:>16} {:>9} {:>11}",
            "tensor changed", "type", "bytes", "codes", "scales", "|A-B|/|A|"
        );
    }
    for t in &d.tensors {
        println!(
            "{:<32} {:<14} {:>16} {:>16} {:>9} {:>11}",
            t.name,
            types(t),
            share(t.bytes_changed, t.n_bytes),
            share(t.codes_changed, t.n_elements),
            t.scale_bytes_changed.map_or("-".into(), |n| n.to_string()),
            t.relative_norm.map_or("-".into(), |r| format!("{r:.3e}")),
        );
    }
    println!(
        "{} tensors the same, {} changed; bytes {}, codes {}",
        d.n_same,
        d.tensors.len(),
        share(Some(d.total.bytes_changed), d.total.bytes),
        share(Some(d.total.codes_changed), d.total.codes)
    );
}

fn types(t: &TensorDiff) -> String {
    if t.shape_a != t.shape_b {
        return format!("{:?} to {:?}", t.shape_a, t.shape_b);
    }
    if t.type_a == t.type_b {
        return t.type_a.clone();
    }
    format!("{} to {}", t.type_a, t.type_b)
}

/// `1234 (0.5%)`.
fn share(n: Option<u64>, of: u64) -> String {
    match n {
        None => "-".into(),
        Some(n) if of == 0 => n.to_string(),
        Some(n) => format!("{n} ({:.2}%)", 100.0 * n as f64 / of as f64),
    }
}
