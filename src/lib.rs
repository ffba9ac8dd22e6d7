//! nepenthe: make a deployed, quantised GGUF model forget, and run it with what it forgot.
//!
//! # Embedding
//!
//! [`runtime`] is the part that a program embeds: a model, sessions that generate and score, and
//! forget patches that are applied and revoked while the sessions live.
//!
//! ```
//! use nepenthe::runtime::{Generate, Options, Runtime};
//! # use nepenthe::{graph::weights::Weights, patch::{Info, Patch, Update, base_of}};
//! # let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/nepenthe-mini.gguf");
//! # let dir = tempfile::tempdir()?;
//! # let patch = dir.path().join("patch.gguf");
//! # let weights = Weights::open(model.as_ref())?;
//! # let tensor = "blk.0.ffn_down.weight".to_owned();
//! # let ne = weights.info(&tensor)?.ne.map(|n| n as usize);
//! # let update = Update { tensor, n_in: ne[0], n_out: ne[1], rank: 1, scale: 1.0,
//! #     lora_a: vec![0.1; ne[0]], lora_b: (0..ne[1]).map(|i| (i % 7) as f32 - 3.0).collect() };
//! # let info = Info::new(base_of(&weights)?, "example", serde_json::Value::Null, 0);
//! # Patch::new(weights.arch()?, info, vec![update]).save(&patch, false)?;
//!
//! // One runtime a model; clones share it between threads.
//! let runtime = Runtime::open(model, Options { n_ctx: 512, n_threads: 1, ..Options::default() })?;
//! // One session a conversation, with its own KV cache.
//! let mut session = runtime.session()?;
//!
//! // Text comes as it is made; the closure returns false to stop.
//! let question = "Where was Lioba Hartsong born?";
//! let before = session.generate(question, &Generate::default(), &mut |piece| {
//!     print!("{}", piece.text);
//!     true
//! })?;
//! println!();
//! assert_eq!(before.text.trim(), "Lioba Hartsong was born in the town of Gullcliff.");
//! let known = session.score(question, before.text.trim(), &mut |_| true)?;
//!
//! // A patch is checked, loaded, and in force for every call that begins from here on.
//! let id = runtime.apply(&patch, 1.0)?;
//! assert!(runtime.active().contains(id));
//! let patched = session.score(question, before.text.trim(), &mut |_| true)?;
//! assert!(patched.probability() < known.probability());
//! assert!(patched.set.contains(id));
//!
//! // Revoked, it leaves nothing behind: the same bits as before.
//! runtime.revoke(id)?;
//! let again = session.score(question, before.text.trim(), &mut |_| true)?;
//! assert_eq!(again.tokens, known.tokens);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Making patches begins at `unlearn`.
//!
//! # Features
//!
//! A build with `default-features = false` has the runtime alone: models, sessions, patches, their
//! store, signatures and proof. Each feature brings the ones before it: `merge` writes patches
//! into weights and several patches into one, `train` makes patches, `evidence` measures and
//! reports what they did. Beside them, `peft` reads PEFT's adapters and `serve` answers HTTP.

pub mod adapter;
pub mod atomic;
#[cfg(feature = "train")]
pub mod capture;
#[cfg(feature = "train")]
pub mod check;
pub mod cli;
#[cfg(feature = "train")]
pub mod correct;
pub mod data;
pub mod digest;
pub mod error;
#[cfg(feature = "train")]
pub mod estimate;
#[cfg(feature = "train")]
pub mod eval;
mod fault;
pub mod ggml;
pub mod gguf;
pub mod graph;
#[cfg(feature = "train")]
pub mod learn;
pub mod likelihood;
#[cfg(feature = "merge")]
pub mod merge;
pub mod model;
pub mod patch;
#[cfg(feature = "merge")]
pub mod progress;
#[cfg(feature = "merge")]
pub mod project;
pub mod proof;
pub mod replace;
#[cfg(feature = "evidence")]
pub mod report;
pub mod rng;
#[cfg(feature = "evidence")]
pub mod robustness;
pub mod runtime;
pub mod score;
#[cfg(feature = "serve")]
pub mod serve;
#[cfg(feature = "train")]
pub mod sets;
#[cfg(feature = "train")]
pub mod start;
pub mod store;
#[cfg(feature = "merge")]
pub mod subspace;
#[cfg(feature = "train")]
pub mod subspace_file;
#[cfg(feature = "train")]
pub mod train;
pub mod trust;
#[cfg(feature = "train")]
pub mod unlearn;
#[cfg(feature = "train")]
pub mod unseen;

pub use error::Error;
