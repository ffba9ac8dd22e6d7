//! Flags that several subcommands share.

use crate::adapter::{Loaded, open_adapters, open_signed};
use crate::data::Template;
use crate::error::Error;
use crate::model::OpenModel;
use crate::trust::PublicKey;
use clap::Args;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Which model, on how many threads.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Model file (GGUF; any part of a split one)
    #[arg(short, long, value_name = "GGUF")]
    pub model: PathBuf,
    /// Threads (default: all cores)
    #[arg(short, long, value_name = "N")]
    pub threads: Option<usize>,
    /// Layers to offload to a GPU: a number, auto or all
    #[arg(
        long = "n-gpu-layers",
        visible_alias = "gpu-layers",
        value_name = "N|auto|all",
        default_value = "0"
    )]
    pub n_gpu_layers: GpuLayers,
    /// Print llama.cpp's log
    #[arg(short, long)]
    pub verbose: bool,
}

impl ModelArgs {
    /// Number of threads to use.
    pub fn n_threads(&self) -> usize {
        threads(self.threads)
    }

    /// Open the model.
    ///
    /// # Errors
    /// As [`OpenModel::open`].
    pub fn open(&self) -> Result<OpenModel, Error> {
        crate::ggml::set_verbose(self.verbose);
        self.n_gpu_layers.note();
        OpenModel::open(&self.model, self.n_gpu_layers.0)
    }
}

/// As many threads as asked for, else as there are cores.
pub fn threads(asked: Option<usize>) -> usize {
    asked
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
        .max(1)
}

/// `-ngl`: a number, `auto` or `all`.
#[derive(Debug, Clone, Copy)]
pub struct GpuLayers(pub i32);

impl GpuLayers {
    /// Say so where there is no GPU to put any on.
    pub fn note(self) {
        if self.0 != 0 && crate::ggml::gpu_name().is_none() {
            eprintln!(
                "nepenthe: no GPU, or built without the feature for it (cuda, metal, vulkan): computing on the CPU"
            );
        }
    }
}

impl FromStr for GpuLayers {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" | "all" => Ok(Self(-1)),
            n => n
                .parse()
                .map(Self)
                .map_err(|_| format!("wanted a number, auto or all, found {n:?}")),
        }
    }
}

/// A patch or adapter with its scale: `FILE` or `FILE:SCALE`.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSpec {
    /// The file.
    pub path: PathBuf,
    /// Scale, 1 when not given.
    pub scale: f32,
}

impl FromStr for AdapterSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        // A colon may belong to the path: only a number after the last one is a scale.
        if let Some((path, scale)) = s.rsplit_once(':')
            && let Ok(scale) = scale.parse::<f32>()
            && !path.is_empty()
        {
            if !scale.is_finite() {
                return Err(format!("wanted a finite scale, found {scale}"));
            }
            return Ok(Self {
                path: path.into(),
                scale,
            });
        }
        Ok(Self {
            path: s.into(),
            scale: 1.0,
        })
    }
}

/// Which patches apply.
#[derive(Debug, Clone, Args)]
pub struct AdapterArgs {
    /// Patch or LoRA adapter, with an optional scale; may be given several times
    #[arg(long, value_name = "FILE[:SCALE]")]
    pub lora: Vec<AdapterSpec>,
    /// The same with the scale spelled out, as llama.cpp has it
    #[arg(long, value_name = "FILE:SCALE")]
    pub lora_scaled: Vec<AdapterSpec>,
}

impl AdapterArgs {
    /// Files and scales, in order.
    ///
    /// # Errors
    /// The same file twice.
    pub fn specs(&self) -> Result<Vec<(&Path, f32)>, Error> {
        let specs: Vec<_> = self
            .lora
            .iter()
            .chain(&self.lora_scaled)
            .map(|s| (s.path.as_path(), s.scale))
            .collect();
        for (i, (path, _)) in specs.iter().enumerate() {
            if specs[..i].iter().any(|(p, _)| p == path) {
                return Err(Error::Setting {
                    setting: "lora",
                    wanted: "each patch once".into(),
                    found: format!("{} twice", path.display()),
                });
            }
        }
        Ok(specs)
    }

    /// Check and load them on `open`.
    ///
    /// # Errors
    /// As [`open_adapters`] or [`open_signed`].
    pub fn open(&self, open: &OpenModel, trust: &TrustArgs) -> Result<Loaded, Error> {
        match trust.key()? {
            Some(key) => open_signed(open, self.specs()?, &key),
            None => open_adapters(open, self.specs()?),
        }
    }
}

/// Whose patches are believed.
#[derive(Debug, Clone, Args)]
pub struct TrustArgs {
    /// Take only patches that this minisign public key (its text or file) signed, in FILE.minisig
    #[arg(long, value_name = "KEY")]
    pub require_signature: Option<String>,
}

impl TrustArgs {
    /// The key, if there is one.
    ///
    /// # Errors
    /// Neither a key nor a file with one.
    pub fn key(&self) -> Result<Option<PublicKey>, Error> {
        let key = self.require_signature.as_deref();
        key.map(PublicKey::parse).transpose()
    }
}

/// How much memory training may take.
#[cfg(feature = "train")]
#[derive(Debug, Clone, Copy, Args)]
pub struct MemoryArg {
    /// Most memory the process may take beside the mapped model file, such as 4G, 2.5GB or 800M;
    /// less of it makes steps slower (default: 80% of what is free)
    #[arg(long, value_name = "BUDGET")]
    pub memory: Option<crate::train::memory::Budget>,
}

/// Which chat template.
#[derive(Debug, Clone, Args)]
pub struct TemplateArg {
    /// Chat template: the model's own, none, or a Jinja file
    #[arg(long, value_name = "gguf|none|FILE", default_value = "gguf")]
    pub template: String,
}

impl TemplateArg {
    /// The template for `open`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn of(&self, open: &OpenModel) -> Result<Template, Error> {
        match self.template.as_str() {
            "gguf" => open.template(),
            "none" => Ok(Template::None),
            file => Ok(Template::from_file(Path::new(file))?),
        }
    }
}

/// How a command reports.
#[derive(Debug, Clone, Copy, Args)]
pub struct Output {
    /// Report as JSON on stdout
    #[arg(long)]
    pub json: bool,
    /// No progress on stderr
    #[arg(short, long)]
    pub quiet: bool,
}
