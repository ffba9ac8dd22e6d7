//! Model-shaped synthetic GGUFs: random Llamas in Q4_K_M, and a random patch for each.
//!
//! `cargo bench --bench shapes -- --shape 1b|3b|7b|8b -o FILE [--patch FILE] [--blocks N]
//! [--adapt PART] [--seed N]`
//!
//! `--blocks` cuts the model to its first N blocks, `--adapt` the patch to matrices with this in
//! their names (`attn`). A seed gives the same bytes every time.

mod blocks;
mod llama;
#[path = "../support/mod.rs"]
mod support;

use llama::Shape;
use nepenthe::gguf::Gguf;
use std::path::Path;
use support::{Args, Fallible};

fn main() -> Fallible<()> {
    let args = Args::parse();
    let (Some(shape), Some(out)) = (args.value("--shape"), args.value("-o")) else {
        println!("skipped: --shape 1b|3b|7b|8b and -o FILE say what to write");
        return Ok(());
    };
    let shape = Shape::find(shape, args.number("--blocks")?)?;
    let seed = args.number("--seed")?.unwrap_or(1) as u64;
    let vocabulary = Gguf::open(support::mini())?;
    let out = Path::new(out);
    let n_bytes = llama::write_model(out, &shape, &vocabulary, seed)?;
    println!(
        "{}: {n_bytes} bytes, {} blocks of the {} shape",
        out.display(),
        shape.n_layer,
        shape.name
    );
    if let Some(patch) = args.value("--patch") {
        let adapted = args.value("--adapt").unwrap_or_default();
        let n = llama::write_patch(Path::new(patch), out, &shape, adapted, seed)?;
        println!("{patch}: rank {} on {n} tensors", llama::RANK);
    }
    Ok(())
}
