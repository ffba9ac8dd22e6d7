//! Flags that several subcommands share.

use crate::error::Error;
use crate::model::OpenModel;
use clap::Args;
use std::path::PathBuf;
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
        self.threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
            .max(1)
    }

    /// Open the model.
    ///
    /// # Errors
    /// As [`OpenModel::open`].
    pub fn open(&self) -> Result<OpenModel, Error> {
        crate::ggml::set_verbose(self.verbose);
        OpenModel::open(&self.model, self.n_gpu_layers.0)
    }
}

/// `-ngl`: a number, `auto` or `all`.
#[derive(Debug, Clone, Copy)]
pub struct GpuLayers(pub i32);

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
