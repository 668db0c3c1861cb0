//! What the commands do. One file a family; each takes the arguments and returns a [`Failure`] or nothing.

mod check;
mod dead_letters;
mod demo;
mod generate;
mod get;
mod replay;
mod run;
mod status;
mod topic;
mod versions;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::CommandFactory;

use crate::broker::embedded::EmbeddedBroker;
use crate::broker::{self, Broker};
use crate::cli::{Cli, Command, PipelineArgs};
use crate::config;
use crate::config::plan::{BrokerPlan, Plan};
use crate::runtime::shutdown::Stop;
use crate::telemetry::log;

/// Why a command failed, for the exit code and for the person.
#[derive(Debug)]
enum Failure {
    /// Wrong usage or definition: exit code 2. The text has been printed already where it is empty.
    Usage(String),
    /// It could not be done: exit code 1.
    Failed(String),
}

impl Failure {
    fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }
}

type Outcome = Result<(), Failure>;

/// Runs the command and returns the process's exit code.
pub fn run(cli: Cli) -> ExitCode {
    if let Err(error) = log::init(cli.log_format, &cli.log) {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    let outcome = match cli.command {
        Command::Run(args) => run::run(&args, run::Which::All),
        Command::Features(args) => run::run(&args, run::Which::Features),
        Command::Score(args) => run::run(&args, run::Which::Score),
        Command::Drift(args) => run::run(&args, run::Which::Drift),
        Command::Retrain(args) => run::retrain(&args),
        Command::Check(args) => check::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Topic(args) => topic::run(&args),
        Command::DeadLetters(args) => dead_letters::run(&args),
        Command::Versions(args) => versions::run(&args),
        Command::Get(args) => get::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "driftline", &mut std::io::stdout());
            Ok(())
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(text)) => {
            say_error(&text);
            ExitCode::from(2)
        }
        Err(Failure::Failed(text)) => {
            say_error(&text);
            ExitCode::from(1)
        }
    }
}

fn say_error(text: &str) {
    if !text.is_empty() {
        eprintln!("error: {text}");
    }
}

/// Loads a pipeline, or prints all its faults.
fn load(args: &PipelineArgs) -> Result<Arc<Plan>, Failure> {
    load_with(&args.pipeline, &args.set)
}

fn load_with(pipeline: &Path, set: &[(String, String)]) -> Result<Arc<Plan>, Failure> {
    load_from(pipeline, &|name| std::env::var(name).ok(), set)
}

fn load_from(
    pipeline: &Path,
    env: &dyn Fn(&str) -> Option<String>,
    set: &[(String, String)],
) -> Result<Arc<Plan>, Failure> {
    match config::load_with(pipeline, env, set) {
        Ok(plan) => Ok(Arc::new(plan)),
        Err(faults) => {
            eprint!("{}", faults.render(std::io::IsTerminal::is_terminal(&std::io::stderr())));
            Err(Failure::Usage(String::new()))
        }
    }
}

/// Opens a broker for a look: an embedded log that is not there is not made.
fn open_existing(plan: &BrokerPlan, client_id: &str) -> Result<Arc<dyn Broker>, Failure> {
    if let BrokerPlan::Embedded { path, .. } = plan
        && !EmbeddedBroker::exists(path)
    {
        return Err(Failure::Failed(format!(
            "{} holds no embedded log; name the folder of one, or make one with `driftline topic create` or `driftline run`",
            path.display()
        )));
    }
    broker::open(plan, client_id).map_err(Failure::failed)
}

/// A runtime for the asynchronous clients; the stages are threads.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("io")
        .enable_all()
        .build()
        .map_err(|e| Failure::Failed(format!("the I/O runtime could not be started: {e}")))
}

/// The first Ctrl-C (or SIGTERM) asks for a stop in order; the second one ends the process at once with code 130.
fn stop_on_signals(runtime: &tokio::runtime::Runtime, stop: &Stop) {
    let stop = stop.clone();
    runtime.spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            return;
        };
        let asked = AtomicBool::new(false);
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if asked.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            tracing::info!("stopping: finishing the open batch and writing a checkpoint (again to end at once)");
            stop.request();
        }
    });
}

/// A broken pipe on standard output (`… | head`) ends a command quietly; anything else is a failure.
fn printed(result: std::io::Result<()>) -> Outcome {
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::failed(error)),
        _ => Ok(()),
    }
}
