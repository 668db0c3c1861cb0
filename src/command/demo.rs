//! `demo`: the whole loop on generated data, in one process, without servers.

use std::fs;
use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Failure, Outcome, load_from, printed, runtime, stop_on_signals};
use crate::cli::DemoArgs;
use crate::config::plan::Plan;
use crate::generate::{ChurnStream, Feed, GenerateOptions, Payload, Shift, Stamp};
use crate::pipeline::{self, Context, RunOptions, Stages, Wiring};
use crate::runtime::clock;
use crate::runtime::shutdown::Stop;
use crate::telemetry::board::{Board, Kind, Milestone};
use crate::telemetry::metrics;
use crate::telemetry::screen::{Asked, Screen};
use crate::telemetry::view::{self, Chapter, ChapterState, Gauge, Story};

/// Marks a folder as one that a demo wrote and a demo may empty.
const MARKER: &str = ".driftline-demo";

/// The made-up world of the demo.
const CUSTOMERS: u32 = 6_000;
const DAYS: u32 = 330;
/// Day from which on everything costs more.
const SHIFT_DAY: u32 = 150;
const SHIFT: &str = "amount*1.6@150";
/// Events a second handed to the pipeline; it could take more, but a person wants to watch.
const RATE: u64 = 20_000;
/// Records that may wait in the log before the feed pauses.
const MOST_LAG: u64 = 20_000;
/// A promoted version that is not in use after this long does not load; the log says why, and the demo goes on.
const LOADING_MS: i64 = 10_000;
/// Once so many more outcomes than a training needs are in the log, the feed waits for it to begin, but not longer than this.
const MORE_OUTCOMES: f64 = 1.2;
const BEGINNING: Duration = Duration::from_secs(15);
/// What happens after the last chapter is still shown for this long.
const EPILOGUE: Duration = Duration::from_secs(3);

pub(super) fn run(args: &DemoArgs) -> Outcome {
    let folder = prepare(&args.folder)?;
    let plan = plan(&args.pipeline, &folder)?;
    let runtime = runtime()?;
    let stop = Stop::new();
    stop_on_signals(&runtime, &stop);
    metrics::install().map_err(Failure::Failed)?;
    let board = Board::new(plan.sources.iter().map(|s| s.name.as_ref()));
    board.show_elsewhere();
    let live = !args.plain && std::io::stdout().is_terminal();
    if !live {
        println!("driftline demo: pipeline '{}', embedded log and store in {}", plan.name, folder.display());
        println!(
            "{} features of {} sources; {CUSTOMERS} customers; on day {SHIFT_DAY} everything gets more expensive ({SHIFT})",
            plan.feature_columns().len(),
            plan.sources.len()
        );
    }
    let stages = Stages::all(&plan);
    let wiring = Wiring::open(&plan, stages, runtime.handle(), &stop, Duration::ZERO).map_err(Failure::failed)?;
    let context =
        Context::new(Arc::clone(&plan), stages, wiring, Arc::clone(&board), RunOptions::default(), stop.clone())
            .map_err(Failure::failed)?;
    context.prepare_topics().map_err(Failure::failed)?;

    let feeding = Arc::new(Feeding::default());
    let pipeline = {
        let context = Arc::clone(&context);
        spawn("pipeline", move || pipeline::run(&context).map_err(|e| e.to_string()))?
    };
    let feed = {
        let (context, feeding, seed) = (Arc::clone(&context), Arc::clone(&feeding), args.seed);
        spawn("feed", move || feed(&context, &feeding, seed))?
    };
    let finished = watch(live, &plan, &board, &feeding, &stop);
    stop.request();
    let fed = feed.join().unwrap_or_else(|_| Err("the feed panicked".into()));
    let ran = pipeline.join().unwrap_or_else(|_| Err("the pipeline panicked".into()));
    summary(&plan, &args.pipeline, &board, &args.folder, &feeding).map_err(Failure::failed)?;
    fed.and(ran).map_err(Failure::Failed)?;
    match finished {
        Ended::Whole | Ended::Left => Ok(()),
        Ended::Short => {
            Err(Failure::Failed("the stream ended before the incident was resolved; see what happened above".into()))
        }
    }
}

/// Empties a folder of an earlier demo, or makes a new one.
fn prepare(folder: &Path) -> Result<PathBuf, Failure> {
    let io = |e: std::io::Error| Failure::Failed(format!("{}: {e}", folder.display()));
    let occupied = fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !folder.join(MARKER).exists() {
        return Err(Failure::Usage(format!(
            "{} holds something that is not a demo's; choose another --folder",
            folder.display()
        )));
    }
    if occupied {
        fs::remove_dir_all(folder).map_err(io)?;
    }
    fs::create_dir_all(folder).map_err(io)?;
    fs::write(folder.join(MARKER), "written by driftline demo\n").map_err(io)?;
    std::path::absolute(folder).map_err(io)
}

/// The pipeline as it is, but for where it writes: no servers, whatever the environment says.
fn plan(pipeline: &Path, folder: &Path) -> Result<Arc<Plan>, Failure> {
    let at = |name: &str| folder.join(name).display().to_string();
    let set = [
        ("broker.path", at("log")),
        ("online.path", at("log")),
        ("offline.url", format!("file://{}", at("offline"))),
        ("offline.checkpoint.interval", "2s".into()),
        ("registry.url", format!("file://{}", at("models"))),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    let python = std::env::var("DRIFTLINE_PYTHON").ok().or_else(|| {
        let private = Path::new(".venv/bin/python");
        private.exists().then(|| private.display().to_string())
    });
    load_from(pipeline, &|name| if name == "DRIFTLINE_PYTHON" { python.clone() } else { None }, &set)
}

/// Where the feed stands.
#[derive(Default)]
struct Feeding {
    /// Newest event time handed over, milliseconds.
    time: AtomicI64,
    sent: AtomicU64,
    shifted: AtomicBool,
    over: AtomicBool,
}

fn feed(context: &Context, feeding: &Feeding, seed: u64) -> Result<(), String> {
    let shift: Shift = SHIFT.parse().map_err(|e| format!("{e}"))?;
    let options = GenerateOptions {
        customers: CUSTOMERS,
        days: DAYS,
        seed,
        shifts: vec![shift.clone()],
        ..GenerateOptions::default()
    };
    let shift_at = options.start + shift.from;
    let mut feed =
        Feed::open(&context.plan, context.wiring.broker.as_ref(), context.wiring.schemas.as_deref(), Stamp::Now)
            .map_err(|e| e.to_string())?;
    let started = clock::monotonic();
    let mut paused = Duration::ZERO;
    let enough = context.plan.retraining.as_ref().map(|r| (r.fresh_labels as f64 * MORE_OUTCOMES) as usize);
    let mut outcomes = 0;
    for event in ChurnStream::new(options) {
        let time = event.event_time();
        if time >= shift_at && !feeding.shifted.swap(true, Ordering::Relaxed) {
            context.board.say(Kind::Shift, Some(time), format!("the demo raises all prices from now on ({SHIFT})"));
        }
        feed.send(&event).map_err(|e| e.to_string())?;
        feeding.time.fetch_max(time, Ordering::Relaxed);
        if matches!(&event.payload, Payload::Label(label) if label.as_of >= shift_at) {
            outcomes += 1;
        }
        if feed.sent().is_multiple_of(1_000) {
            feed.flush().map_err(|e| e.to_string())?;
            feeding.sent.store(feed.sent(), Ordering::Relaxed);
            let due = Duration::from_secs_f64(feed.sent() as f64 / RATE as f64);
            let ahead = due.saturating_sub(started.elapsed() - paused);
            if context.stop.wait(ahead) {
                return Ok(());
            }
            let pause = clock::monotonic();
            if enough.is_some_and(|enough| outcomes >= enough) {
                outcomes = 0;
                while !has_trained(&context.board) && pause.elapsed() < BEGINNING {
                    if context.stop.wait(Duration::from_millis(20)) {
                        return Ok(());
                    }
                }
            }
            while is_training(&context.board) {
                if context.stop.wait(Duration::from_millis(20)) {
                    return Ok(());
                }
            }
            paused += pause.elapsed();
            while context.board.lag.load(Ordering::Relaxed) > MOST_LAG {
                if context.stop.wait(Duration::from_millis(5)) {
                    return Ok(());
                }
            }
        }
    }
    feed.flush().map_err(|e| e.to_string())?;
    feeding.over.store(true, Ordering::Relaxed);
    Ok(())
}

/// True from the first training's start on. Its rows are in the offline files some seconds after they were computed: of the
/// demo's time weeks, in which the outcomes would go on and leave the times before the shift behind.
fn has_trained(board: &Board) -> bool {
    board.milestones().iter().any(|(_, milestone)| *milestone == Milestone::Training)
}

/// True from a training's start until its outcome is in use. A day of the demo is some milliseconds long, in which nobody could
/// train a model: so its time stands still meanwhile.
fn is_training(board: &Board) -> bool {
    let reached = board.milestones();
    let Some(start) = reached.iter().rposition(|(_, m)| *m == Milestone::Training) else { return false };
    let since = &reached[start..];
    let promoted = since.iter().position(|(_, m)| matches!(m, Milestone::Promoted { .. }));
    match promoted {
        Some(promoted) => {
            let in_use = since[promoted..].iter().any(|(_, m)| matches!(m, Milestone::InUse { .. }));
            !in_use && clock::now_ms() - since[promoted].0 < LOADING_MS
        }
        None => !since.iter().any(|(_, m)| *m == Milestone::NotPromoted),
    }
}

enum Ended {
    /// All chapters were told.
    Whole,
    /// The stream was over first.
    Short,
    /// The person left.
    Left,
}

/// Shows the board until the story is over.
fn watch(live: bool, plan: &Plan, board: &Board, feeding: &Feeding, stop: &Stop) -> Ended {
    let mut gauge = Gauge::new(clock::monotonic());
    let mut screen = if live { Screen::open().ok() } else { None };
    let (mut told, mut line_due, mut over_since) = (0, clock::monotonic(), None);
    let every = if screen.is_some() { Duration::from_millis(200) } else { Duration::from_millis(500) };
    loop {
        if stop.wait(every) {
            return Ended::Left;
        }
        let now = clock::monotonic();
        let chapters = chapters(plan, board, feeding);
        let story = Story {
            title: format!("driftline demo: {}", plan.name),
            now: now_text(&chapters).to_owned(),
            progress: Some(progress(&chapters, feeding)),
            chapters,
        };
        let whole = story.chapters.iter().all(|c| c.state == ChapterState::Done);
        match &mut screen {
            Some(screen) => {
                let reading = gauge.read(board, now);
                if screen.draw(&story, &reading, &gauge.history, &board.happenings(0)).is_err()
                    || screen.asked_to_leave() == Asked::Yes
                {
                    return Ended::Left;
                }
            }
            None => {
                for happening in board.happenings(told) {
                    told = happening.number;
                    println!("{}", view::happening_line(&happening));
                }
                if now >= line_due {
                    line_due = now + Duration::from_secs(2);
                    println!("{}", view::line(&gauge.read(board, now)));
                }
            }
        }
        let drained = feeding.over.load(Ordering::Relaxed) && board.lag.load(Ordering::Relaxed) == 0;
        if whole || drained {
            let since = *over_since.get_or_insert(now);
            let patience = if whole { EPILOGUE } else { Duration::from_secs(20) };
            if now - since >= patience {
                return if whole { Ended::Whole } else { Ended::Short };
            }
        }
    }
}

/// The story so far.
fn chapters(plan: &Plan, board: &Board, feeding: &Feeding) -> Vec<Chapter> {
    let reached: Vec<Milestone> = board.milestones().into_iter().map(|(_, m)| m).collect();
    let time = feeding.time.load(Ordering::Relaxed);
    let start = GenerateOptions::default().start;
    let warm_up = plan.monitor.as_ref().map_or(0, |m| i64::try_from(m.warm_up.as_millis()).unwrap_or(i64::MAX));
    let promoted = reached.iter().position(|m| matches!(m, Milestone::Promoted { .. }));
    let in_use = promoted.is_some_and(|p| reached[p..].iter().any(|m| matches!(m, Milestone::InUse { .. })));
    let done = [
        ("history", time >= start.saturating_add(warm_up)),
        ("steady", feeding.shifted.load(Ordering::Relaxed)),
        ("shift → alarm", reached.iter().any(|m| matches!(m, Milestone::DriftOpened { .. }))),
        ("labels, training", reached.contains(&Milestone::Trained)),
        ("promotion", promoted.is_some() && in_use),
        ("recovery", reached.iter().any(|m| matches!(m, Milestone::DriftResolved { .. }))),
    ];
    let mut before = true;
    done.into_iter()
        .map(|(name, done)| {
            let state = match (before, done) {
                (_, true) => ChapterState::Done,
                (true, false) => ChapterState::Now,
                (false, false) => ChapterState::Ahead,
            };
            before &= done;
            Chapter { name, state }
        })
        .collect()
}

fn now_text(chapters: &[Chapter]) -> &'static str {
    match chapters.iter().find(|c| c.state == ChapterState::Now).map(|c| c.name) {
        Some("history") => "Replaying history, so that the windows are full.",
        Some("steady") => "Business as usual: events become features, features become predictions, nothing drifts.",
        Some("shift → alarm") => "Prices have risen. The monitor looks at every window of predictions.",
        Some("labels, training") => {
            "The alarm asked for a retraining. It waits for outcomes of the new times, then trains."
        }
        Some("promotion") => "The candidate goes through the gates and becomes the next version, without a restart.",
        Some("recovery") => "The new version predicts; the monitor compares with its reference.",
        _ => "The new version fits the new times: the incident is resolved.",
    }
}

fn progress(chapters: &[Chapter], feeding: &Feeding) -> f64 {
    let done = chapters.iter().filter(|c| c.state == ChapterState::Done).count() as f64 / chapters.len() as f64;
    let day = (feeding.time.load(Ordering::Relaxed) - GenerateOptions::default().start) as f64 / 86_400_000.0;
    done.max((day / f64::from(DAYS)).clamp(0.0, 0.99))
}

fn summary(plan: &Plan, pipeline: &Path, board: &Board, folder: &Path, feeding: &Feeding) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    let happened: Vec<String> = board
        .happenings(0)
        .iter()
        .filter(|h| matches!(h.kind, Kind::Shift | Kind::Drift | Kind::Retraining | Kind::Model | Kind::Warning))
        .map(view::happening_line)
        .collect();
    let versions: Vec<String> =
        board.versions().iter().map(|(v, n)| format!("{} by version {v}", view::count(*n))).collect();
    let set = folder.display();
    let pipeline = pipeline.display();
    let text = format!(
        "\n── what happened ──\n{}\n\n── in numbers ──\n{} events, {} feature rows with {} features each, {} predictions ({})\n\n── files ──\n\
         log, offsets, online store  {set}/log\nfeature rows, checkpoints   {set}/offline/{}\nmodel versions              {set}/models\n\n── try next ──\n\
         driftline topic tail {}.drift --embedded {set}/log\n\
         driftline topic tail {}.predictions --embedded {set}/log -n 3\n\
         driftline get {pipeline} C000042 --set broker.path={set}/log --set online.path={set}/log\n\
         driftline check {pipeline}\n\
         KAFKA_BROKERS=… REDIS_URL=… driftline run {pipeline}     the same pipeline on your servers\n",
        happened.join("\n"),
        view::count(feeding.sent.load(Ordering::Relaxed)),
        view::count(board.rows.load(Ordering::Relaxed)),
        plan.feature_columns().len(),
        view::count(board.predictions.load(Ordering::Relaxed)),
        if versions.is_empty() { "none".to_owned() } else { versions.join(", ") },
        plan.name,
        plan.name,
        plan.name,
    );
    printed(out.write_all(text.as_bytes())).map_err(|_| "the summary could not be printed".to_owned())
}

fn spawn<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>, Failure> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map_err(|e| Failure::Failed(format!("thread {name} could not be started: {e}")))
}
