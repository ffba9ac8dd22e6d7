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
    patient_threads();
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

/// Begin again with threads that spin for a tenth of a millisecond or so before they sleep: libgomp
/// reads that once, when it is loaded, and by itself spins for some five. Where all cores are busy,
/// whoever waits then lets those run that it waits for.
#[cfg(target_os = "linux")]
fn patient_threads() {
    use std::os::unix::process::CommandExt;
    const SPINS: &str = "GOMP_SPINCOUNT";
    let said = [SPINS, "OMP_WAIT_POLICY"].map(std::env::var_os);
    let mut args = std::env::args_os();
    let (Some(name), [None, None]) = (args.next(), said) else {
        return;
    };
    let Ok(program) = std::env::current_exe() else {
        return;
    };
    // It returns only if it fails: then as it is.
    let _ = std::process::Command::new(program)
        .arg0(name)
        .args(args)
        .env(SPINS, "10000")
        .exec();
}

#[cfg(not(target_os = "linux"))]
fn patient_threads() {}
