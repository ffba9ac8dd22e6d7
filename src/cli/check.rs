//! `nepenthe check`.

use super::common::{MemoryArg, ModelArgs, Output};
use crate::check::check;
use crate::error::Error;
use clap::Args;

/// Whether a model can be trained here, and at what cost
#[derive(Debug, Args)]
#[command(after_long_help = concat!(
    "Architectures of the llama.cpp inside. Those that are trained are tested on models of random\nweights.\n\n",
    include_str!("../architectures.md")
))]
pub struct Check {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    memory: MemoryArg,
    #[command(flatten)]
    output: Output,
}

impl Check {
    pub(super) fn run(&self) -> Result<(), Error> {
        let open = self.model.open()?;
        let c = check(&open, self.model.n_threads(), self.memory.memory)?;
        if self.output.json {
            super::emit(&c);
            return Ok(());
        }
        println!("architecture     {}", c.arch);
        println!(
            "adaptable        {} tensors: {}",
            c.adaptable,
            c.kinds.join(", ")
        );
        if let Some(e) = &c.experts {
            println!(
                "experts          {} of {} for each token, in {} stacks ({} MiB): frozen, with the matrices that choose them",
                e.used,
                e.count,
                e.stacks,
                e.bytes >> 20
            );
            if e.decoded > 0 {
                println!(
                    "                 {} of the stacks are decoded anew on every way back: there is no memory for copies of them",
                    e.decoded
                );
            }
        }
        println!(
            "parity           largest logit difference {:.3e} ({:.3e} relative), same likeliest token {:.1}% of {}",
            c.max_abs_diff,
            c.max_rel_diff,
            100.0 * c.argmax_agree,
            c.n_tokens
        );
        match (&c.missing_rule, &c.step) {
            (Some(op), _) => println!("training         not possible: {op} has no gradient rule"),
            (None, Some(s)) => println!(
                "training step    {} tokens in {:.2} s (forward {:.2} s), {} MiB beside the mapped file",
                s.tokens,
                s.seconds,
                s.forward_seconds,
                s.memory_bytes >> 20
            ),
            (None, None) => {}
        }
        if let Some(gpu) = c.step.and_then(|s| s.gpu) {
            let on_cpu: usize = gpu.on_cpu.values().sum();
            println!(
                "GPU              {}: {} of {} operations",
                gpu.name,
                gpu.nodes - on_cpu,
                gpu.nodes
            );
            if on_cpu > 0 {
                let ops = gpu.on_cpu.iter().map(|(op, n)| format!("{n} {op}"));
                println!(
                    "                 on the CPU: {}",
                    ops.collect::<Vec<_>>().join(", ")
                );
            }
        }
        Ok(())
    }
}
