//! The command line: parse, run, print the error and its causes, exit.

use clap::Parser;
use nepenthe::cli::{Cli, llama_style};
use std::error::Error as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    // `nepenthe diff A B | head` ends quietly, as other filters do.
    sigpipe::reset();
    nepenthe::ggml::return_large_blocks();
    let cli = match Cli::try_parse_from(llama_style(std::env::args_os())) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprint!("nepenthe: {e}");
            let mut cause = e.source();
            while let Some(c) = cause {
                eprint!(": {c}");
                cause = c.source();
            }
            eprintln!();
            ExitCode::from(e.exit_code())
        }
    }
}
