//! What can be wrong with a patch.

use std::path::PathBuf;
use thiserror::Error;

/// Why a patch is refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum PatchError {
    #[error("{}: wanted a LoRA adapter with {key} = {wanted}, found {found}", path.display())]
    Kind {
        path: PathBuf,
        key: &'static str,
        wanted: &'static str,
        found: String,
    },
    #[error("{}: wanted patch format {wanted} or older, found {found}: this patch needs a newer nepenthe", path.display())]
    Format {
        path: PathBuf,
        wanted: u32,
        found: u32,
    },
    #[error("{}: key {key}: {problem}", path.display())]
    Key {
        path: PathBuf,
        key: String,
        problem: String,
    },
    #[error("{what} must hold {wanted} values, found {found}")]
    Factors {
        what: &'static str,
        wanted: usize,
        found: usize,
    },
    #[error("{}: this build reads no PEFT adapters; wanted a LoRA GGUF", path.display())]
    NoPeft { path: PathBuf },
    #[error("{}: the adapter holds no lora_a and lora_b tensors", path.display())]
    NoTensors { path: PathBuf },
    #[error("{}: tensor {found}: wanted {wanted} beside it, found none", path.display())]
    Unpaired {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    #[error("{}: tensor {tensor}: wanted names that end in .lora_a or .lora_b", path.display())]
    Stray { path: PathBuf, tensor: String },
    #[error("{}: tensor {tensor}: wanted {wanted}, found {found}", path.display())]
    Shape {
        path: PathBuf,
        tensor: String,
        wanted: String,
        found: String,
    },
    #[error("{}: tensor {tensor}: element {at} is not a finite number in f16's range", path.display())]
    NotFinite {
        path: PathBuf,
        tensor: String,
        at: usize,
    },
    #[error(
        "{}: made for {}, whose {tensor} is {found:?}; the model's is {wanted:?}",
        path.display(),
        base.as_deref().unwrap_or("another model")
    )]
    Misfit {
        path: PathBuf,
        tensor: String,
        wanted: Vec<u64>,
        found: [usize; 2],
        base: Option<String>,
    },
    #[error("{}: made for the architecture {found}, the model is {wanted}", path.display())]
    Arch {
        path: PathBuf,
        wanted: String,
        found: String,
    },
    #[error("{}: this patch is merged into {} already, or was given twice", path.display(), model.display())]
    Merged { path: PathBuf, model: PathBuf },
    #[error("{}: adapts {tensor}, which the model does not have", path.display())]
    NoSuchTensor { path: PathBuf, tensor: String },
    #[error("{}: wanted a patch of at most {wanted} bytes, found {found}", path.display())]
    TooLarge {
        path: PathBuf,
        wanted: u64,
        found: u64,
    },
    #[error(
        "{}: wanted a patch that says which model it was made for, found an adapter without provenance",
        path.display()
    )]
    NoProvenance { path: PathBuf },
    #[error(
        "{}: made for {base} (sha256 {wanted}...), the model has sha256 {found}... and differs in {tensor}",
        path.display()
    )]
    Base {
        path: PathBuf,
        base: String,
        wanted: String,
        found: String,
        tensor: String,
    },
}

impl PatchError {
    /// Whether the patch is well formed but for another base or program.
    pub fn is_mismatch(&self) -> bool {
        matches!(
            self,
            Self::Format { .. }
                | Self::Merged { .. }
                | Self::Arch { .. }
                | Self::NoSuchTensor { .. }
                | Self::Misfit { .. }
                | Self::NoProvenance { .. }
                | Self::Base { .. }
        )
    }
}
