//! `run`, `features`, `score`, `drift`, `retrain`.

use std::io::IsTerminal;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use super::{Failure, Outcome, load, runtime, stop_on_signals};
use crate::cli::{Listen, RetrainArgs, RunArgs, View};
use crate::config::plan::{BrokerPlan, Plan};
use crate::pipeline::{self, Context, RunError, RunOptions, Stages, Wiring};
use crate::runtime::clock;
use crate::runtime::shutdown::Stop;
use crate::telemetry::board::Board;
use crate::telemetry::screen::{Asked, Screen};
use crate::telemetry::view::{self, Gauge, Story};
use crate::telemetry::{http, metrics};

/// Which command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    All,
    Features,
    Score,
    Drift,
    Retrain,
}

impl Which {
    fn stages(self, plan: &Plan) -> Result<Stages, Failure> {
        let none = Stages { features: false, score: false, drift: false, retrain: false };
        let need = |there: bool, section: &str| {
            if there {
                Ok(())
            } else {
                Err(Failure::Usage(format!(
                    "{} has no [{section}], so there is nothing to run",
                    plan.folder.join("pipeline.toml").display()
                )))
            }
        };
        match self {
            Self::All => Ok(Stages::all(plan)),
            Self::Features => Ok(Stages { features: true, ..none }),
            Self::Score => need(plan.score.is_some(), "score").map(|()| Stages { score: true, ..none }),
            Self::Drift => need(plan.monitor.is_some(), "monitor").map(|()| Stages { drift: true, ..none }),
            Self::Retrain => need(plan.retraining.is_some(), "retraining").map(|()| Stages { retrain: true, ..none }),
        }
    }
}

pub(super) fn run(args: &RunArgs, which: Which) -> Outcome {
    start(args, which, false, |_| Ok(()))
}

pub(super) fn retrain(args: &RetrainArgs) -> Outcome {
    if !args.now {
        return start(&args.run, Which::Retrain, false, |_| Ok(()));
    }
    let mut run = args.run.clone();
    run.until_end = true;
    start(&run, Which::Retrain, false, |context| {
        let id = context.ask_for_retraining().map_err(Failure::failed)?;
        tracing::info!(id, "asked for a retraining");
        Ok(())
    })
}

/// The context of the run that is under way.
type Running = Arc<Mutex<Option<Arc<Context>>>>;

/// Runs, and again each time the version of this definition gets another role.
pub(super) fn start(
    args: &RunArgs,
    which: Which,
    shadow_topics: bool,
    before: impl FnOnce(&Context) -> Outcome,
) -> Outcome {
    let plan = load(&args.pipeline)?;
    let stages = which.stages(&plan)?;
    let runtime = runtime()?;
    let stop = Stop::new();
    stop_on_signals(&runtime, &stop);
    let recorder = metrics::install().map_err(Failure::Failed)?;
    let board = Board::new(plan.sources.iter().map(|s| s.name.as_ref()));
    let mut options = RunOptions {
        workers: args.workers.map(usize::from),
        until_end: args.until_end,
        rebuild: args.rebuild,
        shadow_topics,
        instance: args.instance.clone(),
    };
    let open = |options: &RunOptions| {
        let wiring = Wiring::open(&plan, stages, runtime.handle(), &stop, args.patience)?;
        Context::new(Arc::clone(&plan), stages, wiring, Arc::clone(&board), options.clone(), stop.child())
    };
    let mut context = match open(&options) {
        Err(RunError::Interrupted { .. }) => return Ok(()),
        opened => opened.map_err(Failure::failed)?,
    };
    before(&context)?;
    let running: Running = Arc::new(Mutex::new(Some(Arc::clone(&context))));
    if let Listen::On(address) = args.listen {
        let ready = Arc::clone(&running);
        let is_ready = move || ready.lock().as_ref().is_some_and(|context| context.is_ready());
        let server = http::serve(address, recorder, Arc::clone(&board), plan.name.clone(), is_ready);
        let address = runtime.block_on(server).map_err(Failure::Failed)?;
        tracing::info!("metrics, health and status at http://{address}/metrics, /health, /ready, /status");
    }
    let finished = Stop::new();
    let watcher = watch(args.view, &plan, &board, &stop, &finished);
    let result = loop {
        tracing::info!(
            pipeline = plan.name,
            definition = plan.definition,
            version = context.wiring.role.version(),
            following = context.is_following(),
            broker = context.wiring.broker.describe(),
            online = context.wiring.online.as_ref().map(|o| o.describe()),
            "starting"
        );
        let result = pipeline::run(&context);
        // The embedded log belongs to one process: whoever has the definition that serves is to have it.
        let again = context.has_new_role() && !matches!(plan.broker, BrokerPlan::Embedded { .. });
        if result.is_err() || !again || stop.requested() {
            break result;
        }
        // Names and connections of the old role go before those of the new one come.
        *running.lock() = None;
        drop(context);
        options.rebuild = false;
        context = match open(&options) {
            Err(RunError::Interrupted { .. }) => return Ok(()),
            opened => opened.map_err(Failure::failed)?,
        };
        *running.lock() = Some(Arc::clone(&context));
    };
    finished.request();
    if let Some(watcher) = watcher {
        let _ = watcher.join();
    }
    result.map_err(Failure::failed)
}

/// Shows the board while the pipeline runs.
fn watch(view: View, plan: &Plan, board: &Arc<Board>, stop: &Stop, finished: &Stop) -> Option<JoinHandle<()>> {
    let board = Arc::clone(board);
    let finished = finished.clone();
    let stop = stop.clone();
    let story = Story {
        title: format!("driftline: {}", plan.name),
        now: plan.folder.display().to_string(),
        ..Story::default()
    };
    let lines = |board: Arc<Board>, finished: Stop, every: Duration| {
        spawn(move || {
            let mut gauge = Gauge::new(clock::monotonic());
            while !finished.wait(every) {
                tracing::info!("{}", view::line(&gauge.read(&board, clock::monotonic())).trim());
            }
        })
    };
    match view {
        View::None => None,
        View::Auto => lines(board, finished, Duration::from_secs(10)),
        View::Plain => lines(board, finished, Duration::from_secs(1)),
        View::Live if !std::io::stdout().is_terminal() => lines(board, finished, Duration::from_secs(1)),
        View::Live => spawn(move || {
            let mut gauge = Gauge::new(clock::monotonic());
            let Ok(mut screen) = Screen::open() else { return };
            while !finished.wait(Duration::from_millis(250)) {
                let reading = gauge.read(&board, clock::monotonic());
                if screen.draw(&story, &reading, &gauge.history, &board.happenings(0)).is_err() {
                    return;
                }
                if screen.asked_to_leave() == Asked::Yes {
                    stop.request();
                }
            }
        }),
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
    std::thread::Builder::new().name("view".into()).spawn(work).ok()
}
