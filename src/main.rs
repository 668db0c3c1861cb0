//! The `driftline` binary: parses, runs, returns the exit code.

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    driftline::command::run(driftline::cli::Cli::parse())
}
