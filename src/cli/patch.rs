//! `nepenthe patch`: the patches of a store, and what single ones are worth.

use super::common::{AdapterSpec, TrustArgs, threads};
#[cfg(feature = "merge")]
use super::patch_several::{CheckSeveral, Combine};
use crate::error::Error;
use crate::model::OpenModel;
use crate::patch::{Intake, Patch, PatchId};
use crate::proof::{Effect, ProofError, measure};
use crate::store::{Add, Store};
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::PathBuf;

/// Add, list, remove, verify, compare and combine patches
#[derive(Debug, Args)]
pub struct PatchArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Add(AddPatch),
    List(List),
    Remove(Remove),
    Rollback(Rollback),
    Verify(Verify),
    Export(Export),
    #[cfg(feature = "merge")]
    Check(CheckSeveral),
    #[cfg(feature = "merge")]
    Combine(Combine),
}

impl PatchArgs {
    pub(super) fn run(&self) -> Result<(), Error> {
        match &self.command {
            Command::Add(c) => c.run(),
            Command::List(c) => c.run(),
            Command::Remove(c) => c.run(),
            Command::Rollback(c) => c.run(),
            Command::Verify(c) => c.run(),
            Command::Export(c) => c.run(),
            #[cfg(feature = "merge")]
            Command::Check(c) => c.run(),
            #[cfg(feature = "merge")]
            Command::Combine(c) => c.run(),
        }
    }
}

/// Which store.
#[derive(Debug, Args)]
struct StoreArg {
    /// Directory of the patch store
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
}

/// Make patches active in a store, which is made if it is not there
#[derive(Debug, Args)]
struct AddPatch {
    #[command(flatten)]
    store: StoreArg,
    /// The patches, each with an optional scale
    #[arg(required = true, value_name = "FILE[:SCALE]")]
    files: Vec<AdapterSpec>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Take a patch whose signature's sequence number is not above those taken before
    #[arg(long)]
    allow_older: bool,
}

impl AddPatch {
    fn run(&self) -> Result<(), Error> {
        let key = self.trust.key()?;
        let store = Store::create(&self.store.store)?;
        for file in &self.files {
            let how = Add {
                scale: file.scale,
                key: key.as_ref(),
                allow_older: self.allow_older,
            };
            println!("{}", store.add(&file.path, &how)?);
        }
        Ok(())
    }
}

/// List the active patches of a store
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    store: StoreArg,
    /// Report as JSON on stdout, with the earlier sets
    #[arg(long)]
    json: bool,
}

impl List {
    fn run(&self) -> Result<(), Error> {
        let index = Store::open(&self.store.store)?.index()?;
        if self.json {
            super::emit(&index);
            return Ok(());
        }
        println!("sequence {}", index.sequence);
        for e in &index.patches {
            println!("{}  {:>6}  {}", e.id, e.scale, e.name);
        }
        for past in &index.history {
            let names: Vec<&str> = past.patches.iter().map(|e| e.name.as_str()).collect();
            println!("before: sequence {}: {}", past.sequence, names.join(", "));
        }
        Ok(())
    }
}

/// Take patches out of a store
#[derive(Debug, Args)]
struct Remove {
    #[command(flatten)]
    store: StoreArg,
    /// Their ids, or the beginnings of them
    #[arg(required = true)]
    ids: Vec<String>,
}

impl Remove {
    fn run(&self) -> Result<(), Error> {
        let store = Store::open(&self.store.store)?;
        for id in &self.ids {
            store.remove(store.find(id)?.id)?;
        }
        Ok(())
    }
}

/// Go back to an earlier set of a store
#[derive(Debug, Args)]
struct Rollback {
    #[command(flatten)]
    store: StoreArg,
    /// The sequence number it had, as `list` shows
    #[arg(long, value_name = "SEQUENCE")]
    to: u64,
}

impl Rollback {
    fn run(&self) -> Result<(), Error> {
        let now = Store::open(&self.store.store)?.rollback(self.to)?;
        eprintln!(
            "the set of sequence {} is now that of sequence {now}",
            self.to
        );
        Ok(())
    }
}

/// Copy a patch, and its signature, out of a store
#[derive(Debug, Args)]
struct Export {
    #[command(flatten)]
    store: StoreArg,
    /// Its id, or the beginning of it
    id: String,
    /// Where it goes
    #[arg(short, long)]
    out: PathBuf,
    /// Replace files that exist
    #[arg(long)]
    force: bool,
}

impl Export {
    fn run(&self) -> Result<(), Error> {
        let store = Store::open(&self.store.store)?;
        store.export(store.find(&self.id)?.id, &self.out, self.force)
    }
}

/// Whether patches are whole, signed, for a model, and act on it
#[derive(Debug, Args)]
struct Verify {
    /// Verify every active patch of this store
    #[arg(long, value_name = "DIR", required_unless_present = "files")]
    store: Option<PathBuf>,
    /// Patch files to verify
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// The model they must be for
    #[arg(short, long, value_name = "GGUF")]
    model: Option<PathBuf>,
    /// Run each patch's canaries on the model: it must act as when it was made
    #[arg(long, requires = "model")]
    live: bool,
    /// Threads (default: all cores)
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// Report as JSON on stdout
    #[arg(long)]
    json: bool,
}

impl Verify {
    fn run(&self) -> Result<(), Error> {
        let key = self.trust.key()?;
        let model = self.model.as_deref();
        let open = model.map(|path| OpenModel::open(path, 0)).transpose()?;
        let scratch = tempfile::tempdir().map_err(|source| Error::Io {
            path: std::env::temp_dir(),
            doing: "making a temporary directory",
            source,
        })?;
        let mut files = self.files.clone();
        if let Some(dir) = &self.store {
            let store = Store::open(dir)?;
            for entry in store.index()?.patches {
                store.verify(entry.id, key.as_ref())?;
                files.push(store.path_of(entry.id));
            }
        }
        let mut report = Vec::new();
        for file in &files {
            let intake = Intake::read(file, scratch.path(), u64::MAX, key.as_ref())?;
            let patch = intake.patch()?;
            let mut effect = None;
            if let Some(open) = &open {
                patch.check_shapes(&open.weights)?;
                patch.check_base(&open.weights)?;
                if self.live {
                    effect = Some(self.effect(open, &intake, &patch)?);
                }
            }
            if !self.json {
                print_verified(intake.id(), file, key.is_some(), open.is_some(), effect);
            }
            report.push(json!({
                "file": file, "id": intake.id(), "signed": key.is_some(),
                "fits": open.is_some(), "effect": effect,
            }));
        }
        if self.json {
            super::emit(&report);
        }
        Ok(())
    }

    fn effect(&self, open: &OpenModel, intake: &Intake, patch: &Patch) -> Result<Effect, Error> {
        let name = intake.path().display().to_string();
        let canaries = patch.info.iter().flat_map(|i| &i.canaries).cloned();
        let canaries: Vec<_> = canaries.collect();
        let adapters = vec![(intake.adapter(&open.model)?, 1.0)];
        let effect = measure(&open.model, &adapters, &canaries, threads(self.threads))?;
        let Some(effect) = effect else {
            return Err(ProofError::NoCanaries { patch: name }.into());
        };
        effect.believe(&name)?;
        Ok(effect)
    }
}

fn print_verified(
    id: PatchId,
    file: &std::path::Path,
    signed: bool,
    fits: bool,
    effect: Option<Effect>,
) {
    let mut said = vec!["whole".to_owned()];
    said.extend(signed.then(|| "signed".into()));
    said.extend(fits.then(|| "for this model".into()));
    said.extend(effect.map(|e| format!("active (strength {:.2})", e.strength)));
    println!("{id}  {}: {}", file.display(), said.join(", "));
}
