//! An opened model: the checked, mapped file and llama.cpp's own view of it.

use crate::data::{Template, Tokenize, TokenizeError};
use crate::error::Error;
#[cfg(feature = "train")]
use crate::ggml::{Backend, Offload};
use crate::ggml::{Model, ModelOptions};
#[cfg(feature = "train")]
use crate::graph::trace::trace;
use crate::graph::weights::Weights;
use std::path::Path;

/// A model file, validated by our reader, mapped, and loaded by llama.cpp.
pub struct OpenModel {
    /// llama.cpp's model.
    pub model: Model,
    /// The mapped file.
    pub weights: Weights,
    /// Layers on a GPU; negative: all.
    pub n_gpu_layers: i32,
}

impl OpenModel {
    /// Open `path`. The file is checked before llama.cpp sees it, because llama.cpp ends
    /// the process on some malformed ones.
    ///
    /// Weights are not repacked: our graphs and llama.cpp then share the mapped pages and
    /// agree to the bit.
    ///
    /// # Errors
    /// A malformed file, a file that is no model, or llama.cpp's refusal.
    pub fn open(path: &Path, n_gpu_layers: i32) -> Result<Self, Error> {
        crate::replace::pending(path)?;
        let weights = Weights::open(path)?;
        let kind = weights.set().metadata().get_opt::<&str>("general.type")?;
        if let Some(kind) = kind.filter(|k| *k != "model") {
            return Err(Error::NotAModel {
                path: path.to_owned(),
                found: kind.to_owned(),
            });
        }
        let options = ModelOptions {
            n_gpu_layers,
            repack: false,
            ..ModelOptions::default()
        };
        let model = Model::load(path, options)?;
        Ok(Self {
            model,
            weights,
            n_gpu_layers,
        })
    }

    /// Where its own graphs are computed: on `n_threads` threads, and on a GPU if it was opened for
    /// one and there is one.
    ///
    /// # Errors
    /// When it does not start.
    #[cfg(feature = "train")]
    pub fn backend(&self, n_threads: usize) -> Result<Backend, Error> {
        let cpu = Backend::new(n_threads)?;
        Ok(match self.n_gpu_layers {
            0 => cpu,
            n => cpu.on_gpu(Offload::layers(n, self.n_blocks()?))?,
        })
    }

    /// Blocks of the model.
    ///
    /// # Errors
    /// A file that does not say.
    #[cfg(feature = "train")]
    pub fn n_blocks(&self) -> Result<usize, Error> {
        let key = format!("{}.block_count", self.weights.arch()?);
        Ok(self.weights.set().metadata().get::<u32>(&key)? as usize)
    }

    /// llama.cpp's graph of it ([`trace`]). Where a GPU has a part of the model, the graph is that of
    /// the CPU, without the copies between them.
    ///
    /// # Errors
    /// As [`trace`].
    #[cfg(feature = "train")]
    pub fn trace(&self) -> Result<crate::graph::template::Template, Error> {
        let traced = if self.n_gpu_layers == 0 {
            trace(&self.model, &self.weights)
        } else {
            let options = ModelOptions {
                repack: false,
                ..ModelOptions::default()
            };
            trace(&Model::load(self.model.path(), options)?, &self.weights)
        };
        Ok(traced?)
    }

    /// Bytes of the file, or of all parts of a split one.
    pub fn file_bytes(&self) -> u64 {
        let parts = self.weights.set().parts();
        parts.iter().map(crate::gguf::Gguf::file_len).sum()
    }

    /// Give the mapped pages of the file back to the system, ours and llama.cpp's: between stages
    /// that read it through the one and through the other, they would count twice.
    pub fn release(&self) {
        for part in self.weights.set().parts() {
            crate::ggml::release_file(part.path());
        }
    }

    /// The chat template in the file, if it has one.
    ///
    /// # Errors
    /// A template key that is no string.
    pub fn template(&self) -> Result<Template, Error> {
        let source = self
            .weights
            .set()
            .metadata()
            .get_opt::<&str>("tokenizer.chat_template")?;
        Ok(source.map_or(Template::None, |s| Template::Gguf(s.to_owned())))
    }
}

impl Tokenize for Model {
    fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<i32>, TokenizeError> {
        let mut tokens = Model::tokenize(self, text, add_special, parse_special);
        // llama.cpp's `add_special` may close the text as well; an answer's end is ours to set.
        if add_special
            && !text.is_empty()
            && tokens.len() > 1
            && tokens.last().copied() == self.eos()
        {
            tokens.pop();
        }
        Ok(tokens)
    }

    fn end_of_answer(&self) -> Option<i32> {
        self.eos()
    }

    fn is_end(&self, token: i32) -> bool {
        Model::is_end(self, token)
    }

    fn bos_piece(&self) -> String {
        self.bos()
            .map_or_else(String::new, |t| lossy(&self.piece(t, true)))
    }

    fn eos_piece(&self) -> String {
        self.eos()
            .map_or_else(String::new, |t| lossy(&self.piece(t, true)))
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
