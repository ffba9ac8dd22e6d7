//! The `gguf` module against hostile, random, split and real files.

mod atomic;
mod build;
mod hostile;
mod metadata;
mod roundtrip;
mod split;
mod types;
