//! `generate`: a realistic stream for the churn pipeline.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use super::{Failure, Outcome, load, printed, runtime, stop_on_signals};
use crate::broker;
use crate::broker::SchemaRegistry;
use crate::cli::GenerateArgs;
use crate::config::plan::BrokerPlan;
use crate::generate::{ChurnStream, Feed, GenerateOptions, GeneratedEvent, Stamp};
use crate::runtime::clock;
use crate::runtime::shutdown::Stop;
use crate::source::event_time;
use crate::source::replay::{Pace, Pacer};
use crate::telemetry::view;

pub(super) fn run(args: &GenerateArgs) -> Outcome {
    let plan = load(&args.pipeline)?;
    let start = event_time::parse_iso(&args.start)
        .ok_or_else(|| Failure::Usage(format!("--start '{}' is no date: expected YYYY-MM-DD", args.start)))?;
    let pace: Pace = args.speed.parse().map_err(|e| Failure::Usage(format!("--speed: {e}")))?;
    let horizon = plan.labels.as_ref().map_or(GenerateOptions::default().label_horizon, |l| l.horizon);
    let options = GenerateOptions {
        customers: args.customers,
        days: args.days,
        start,
        seed: args.seed,
        shifts: args.shift.clone(),
        label_horizon: horizon,
        ..GenerateOptions::default()
    };
    let mut left = args.limit.unwrap_or(u64::MAX);
    let events = ChurnStream::new(options).take_while(|event| {
        let counts = is_event(event, start);
        let wanted = !counts || left > 0;
        left -= u64::from(counts && wanted);
        wanted
    });
    if args.stdout {
        return to_stdout(events);
    }
    let runtime = runtime()?;
    let stop = Stop::new();
    stop_on_signals(&runtime, &stop);
    let broker = broker::open(&plan.broker, "driftline-generate").map_err(Failure::failed)?;
    let registry = match &plan.broker {
        BrokerPlan::Kafka { schema_registry: Some(url), .. } => {
            Some(Arc::new(SchemaRegistry::new(url, runtime.handle().clone()).map_err(Failure::failed)?))
        }
        _ => None,
    };
    super::topic::create_inputs(&plan, broker.as_ref(), None)?;
    let mut feed = Feed::open(&plan, broker.as_ref(), registry.as_deref(), Stamp::Now).map_err(Failure::failed)?;
    let started = clock::monotonic();
    let mut told = started;
    let mut paced_since = None;
    let mut pacer = Pacer::new(pace);
    let mut last = start;
    for event in events {
        last = last.max(event.event_time());
        let wait = if is_event(&event, start) {
            let since = paced_since.get_or_insert_with(clock::monotonic);
            pacer.wait(event.event_time(), since.elapsed())
        } else {
            Duration::ZERO
        };
        if wait >= Duration::from_millis(1) {
            feed.flush().map_err(Failure::failed)?;
            if stop.wait(wait) {
                break;
            }
        }
        feed.send(&event).map_err(Failure::failed)?;
        if feed.sent().is_multiple_of(1_000) {
            if stop.requested() {
                break;
            }
            if told.elapsed() >= Duration::from_secs(2) {
                told = clock::monotonic();
                tracing::info!("{} events, up to {}", view::count(feed.sent()), view::date(last));
            }
        }
    }
    feed.flush().map_err(Failure::failed)?;
    let seconds = started.elapsed().as_secs_f64();
    printed(writeln!(
        std::io::stdout(),
        "{} events in {seconds:.1} s ({}/s), event times {} to {}",
        view::count(feed.sent()),
        view::count((feed.sent() as f64 / seconds) as u64),
        view::date(start),
        view::date(last)
    ))
}

/// True but for what the shop knows about its customers when the stream begins: that is there at once, and no event.
fn is_event(event: &GeneratedEvent, start: i64) -> bool {
    event.timestamp > start
}

/// JSON lines: the source's name and the record. One without a value comes with its key and timestamp.
fn to_stdout(events: impl Iterator<Item = GeneratedEvent>) -> Outcome {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut line = Vec::new();
    for event in events {
        line.clear();
        line.extend_from_slice(format!("{{\"source\":\"{}\",", event.source()).as_bytes());
        if event.is_tombstone() {
            let key = format!("\"key\":\"{}\",\"timestamp\":{},", event.customer(), event.timestamp);
            line.extend_from_slice(key.as_bytes());
        }
        line.extend_from_slice(b"\"record\":");
        event.write_json(&mut line);
        line.extend_from_slice(b"}\n");
        if let Err(error) = out.write_all(&line) {
            return printed(Err(error));
        }
    }
    printed(out.flush())
}
