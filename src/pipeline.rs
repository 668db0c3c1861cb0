//! Wiring: the one place that names every stage, thread and channel.
//!
//! ```text
//! main thread      supervises; ends all when one ends
//! rekey-SOURCE-N   source topic → the same events by another entity's key            one consumer, one producer
//! worker-N         poll → decode → window → (online store ‖ model) → produce → commit       one consumer, one producer
//! checkpoint-N     writes worker N's checkpoints; channel of one, so a slow disk holds the worker back
//! model-watch      follows the alias, loads and warms versions beside the running one
//! score-N          features topic → predictions topic, where the stages run apart
//! version-watch    ends the run in order when another version of the definition begins to serve
//! drift            predictions topic → drift and retraining topics
//! retrain          retraining topic → training → gates → alias
//! ```
//!
//! Shutdown order, on Ctrl-C or when a thread ends: workers stop polling, finish their open batch (online store, produce,
//! commit) and write a last checkpoint; then the monitor and the retrain worker stop at their next step; then the model
//! watch ends. Nothing is in flight when a consumer leaves its group.

mod account;
mod backpressure;
mod checkpointer;
mod context;
mod features;
mod follower;
mod instance;
mod lookups;
mod output;
mod publish;
mod rekey;
mod role;
mod scoring;
mod worker;

pub use context::{Context, RunOptions, Stages, Wiring};

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use crate::drift::worker::DriftWorker;
use crate::retrain::worker::RetrainWorker;
use crate::runtime::shutdown::Stop;
use crate::telemetry::board::Kind;

/// Why a run ended badly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The log.
    #[error(transparent)]
    Broker(#[from] crate::broker::BrokerError),
    /// The online store.
    #[error(transparent)]
    Online(#[from] crate::store::OnlineError),
    /// The offline store.
    #[error(transparent)]
    Offline(#[from] crate::store::OfflineError),
    /// Decoding.
    #[error(transparent)]
    Source(#[from] crate::source::SourceError),
    /// Windows.
    #[error(transparent)]
    Window(#[from] crate::window::WindowError),
    /// Models.
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
    /// Encoding output.
    #[error(transparent)]
    Score(#[from] crate::score::ScoreError),
    /// The drift monitor.
    #[error(transparent)]
    Drift(#[from] crate::drift::worker::DriftError),
    /// The retrain worker.
    #[error(transparent)]
    Retrain(#[from] crate::retrain::worker::RetrainError),
    /// The definition cannot be run as asked.
    #[error("{0}")]
    Definition(String),
    /// The definition is none of the pipeline's versions.
    #[error(
        "version {serving} of the pipeline serves, with definition {saved}; pipeline.toml has definition {now} now. `driftline versions bootstrap` computes it beside that one, to be compared and switched to; --rebuild recomputes state and offline files from the beginning of the topics in its place"
    )]
    NoVersion {
        /// The version that serves.
        serving: u32,
        /// Its definition.
        saved: String,
        /// Hash of the plan.
        now: String,
    },
    /// The saved state belongs to another definition.
    #[error(
        "partition {partition}: the saved state is of definition {saved}, the pipeline is now {now}; run once with --rebuild to recompute state and offline files from the beginning of the topics, or point [offline] url elsewhere"
    )]
    DefinitionChanged {
        /// Task.
        partition: i32,
        /// Hash in the manifest.
        saved: String,
        /// Hash of the plan.
        now: String,
    },
    /// A stop came while something was away. What was open is left as if it had never been read.
    #[error(
        "the {what} was away when the stop came ({reason}); nothing is lost, the next start goes on from the last commit"
    )]
    Interrupted {
        /// `broker`, `online store` or `registry`.
        what: &'static str,
        /// What it said.
        reason: String,
    },
    /// A thread panicked: a bug.
    #[error("{thread} panicked: {message}; this is a bug in driftline, please report it")]
    Panic {
        /// Thread.
        thread: String,
        /// Panic message.
        message: String,
    },
}

impl RunError {
    /// True where another instance took over, or the producer is spent, and this worker has to join again with fresh state.
    fn is_lost(&self) -> bool {
        match self {
            Self::Broker(e) => e.is_fenced() || e.is_aborted() || e.is_spent(),
            Self::Offline(e) => e.is_fenced(),
            _ => false,
        }
    }

    /// True where the offline store may answer later.
    fn is_offline_away(&self) -> bool {
        self.away() == Some("offline")
    }

    /// What is away, where a worker can go on with fresh state once it is back.
    fn away(&self) -> Option<&'static str> {
        match self {
            Self::Broker(e) if e.is_retriable() => Some("broker"),
            Self::Online(e) if e.is_retriable() => Some("online"),
            Self::Offline(e) if e.is_retriable() => Some("offline"),
            _ => None,
        }
    }
}

type Job = Box<dyn FnOnce() -> Result<(), RunError> + Send>;

/// Runs the stages until all end by themselves, one fails, or a stop is asked for.
///
/// # Errors
/// The first failure, after all threads have ended in order.
pub fn run(context: &Arc<Context>) -> Result<(), RunError> {
    // A broker that has just answered may be gone again.
    for each in std::iter::once(context).chain(&context.others) {
        match each.hold("broker", |error: &RunError| error.away().is_some(), || each.prepare_topics()) {
            Err(RunError::Interrupted { .. }) => return Ok(()),
            prepared => prepared?,
        }
    }
    let mut jobs: Vec<(String, Job)> = Vec::new();
    let stages = context.stages;
    if stages.features {
        for worker in 0..context.workers {
            let context = Arc::clone(context);
            jobs.push((format!("worker-{worker}"), Box::new(move || features::run(&context, worker))));
        }
        for other in &context.others {
            for worker in 0..other.workers {
                let context = Arc::clone(other);
                let name = format!("worker-{}-{worker}", context.plan.entity.name);
                jobs.push((name, Box::new(move || features::run(&context, worker))));
            }
        }
        for (source, plan) in context.plan.rekeyed() {
            for worker in 0..context.rekeyers(plan)? {
                let (context, source, plan) = (Arc::clone(context), source.clone(), Arc::clone(plan));
                let name = format!("rekey-{}-{worker}", source.name);
                jobs.push((name, Box::new(move || rekey::run(&context, &source, &plan, worker))));
            }
        }
    } else if stages.score {
        for worker in 0..context.workers {
            let context = Arc::clone(context);
            jobs.push((format!("score-{worker}"), Box::new(move || scoring::run(&context, worker))));
        }
    }
    if stages.drift {
        let context = Arc::clone(context);
        jobs.push(("drift".into(), Box::new(move || run_drift(&context))));
    }
    if stages.retrain {
        let context = Arc::clone(context);
        jobs.push(("retrain".into(), Box::new(move || run_retrain(&context))));
    }
    let finished = Stop::new();
    thread::scope(|scope| {
        for context in std::iter::once(context).chain(&context.others).filter(|_| stages.features) {
            let watch = || context.watch_role(&finished);
            if let Err(error) = thread::Builder::new().name("version-watch".into()).spawn_scoped(scope, watch) {
                finished.request();
                return Err(RunError::Definition(format!("thread version-watch could not be started: {error}")));
            }
        }
        let result = supervise(context, jobs);
        finished.request();
        result
    })
}

fn supervise(context: &Context, jobs: Vec<(String, Job)>) -> Result<(), RunError> {
    let (ended, ends) = mpsc::channel();
    let mut first_error = None;
    let mut left: Vec<String> = jobs.iter().map(|(name, _)| name.clone()).collect();
    context.drain(&left);
    thread::scope(|scope| {
        let mut running = jobs.len();
        for (name, job) in jobs {
            let ended = ended.clone();
            let thread_name = name.clone();
            let spawned = thread::Builder::new().name(name.clone()).spawn_scoped(scope, move || {
                let result = std::panic::catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|panic| {
                    Err(RunError::Panic { thread: thread_name.clone(), message: panic_message(panic.as_ref()) })
                });
                // The receiver outlives all threads of the scope.
                let _ = ended.send((thread_name, result));
            });
            if let Err(error) = spawned {
                running -= 1;
                first_error.get_or_insert(RunError::Definition(format!("thread {name} could not be started: {error}")));
                context.stop.request();
            }
        }
        while running > 0 {
            let Ok((name, result)) = ends.recv() else { break };
            running -= 1;
            left.retain(|other| *other != name);
            context.drain(&left);
            match result {
                Ok(()) => tracing::debug!(thread = name, "ended"),
                Err(error) => {
                    context.board.say(Kind::Warning, None, format!("{name} ended: {error}"));
                    first_error.get_or_insert(error);
                    context.stop.request();
                }
            }
        }
    });
    context.end_models();
    match first_error {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

fn run_drift(context: &Arc<Context>) -> Result<(), RunError> {
    let worker = DriftWorker::new(
        Arc::clone(&context.plan),
        Arc::clone(&context.wiring.broker),
        Arc::clone(&context.wiring.registry),
    )?;
    let board = Arc::clone(&context.board);
    worker.run(&context.stop, &context.drain_drift, &|observation| {
        context::show_drift(&board, &context.plan, observation)
    })?;
    Ok(())
}

fn run_retrain(context: &Arc<Context>) -> Result<(), RunError> {
    let worker = RetrainWorker::new(
        Arc::clone(&context.plan),
        Arc::clone(&context.wiring.broker),
        Arc::clone(&context.wiring.registry),
        Arc::clone(&context.wiring.offline),
        context.wiring.schemas.clone(),
    )?;
    let board = Arc::clone(&context.board);
    worker.run(&context.stop, &context.drain_retrain, &|step| context::show_retraining(&board, step))?;
    Ok(())
}
