//! `replay`: a file's rows into a source's topic.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{Failure, Outcome, load_with, printed, runtime, stop_on_signals};
use crate::broker::{self, SchemaRegistry};
use crate::cli::{RecordTime, ReplayArgs};
use crate::config::names::suggestion;
use crate::config::plan::BrokerPlan;
use crate::runtime::clock;
use crate::runtime::shutdown::Stop;
use crate::source::replay::{self, FileFormat, Pace, ReplayOptions, Timestamps};
use crate::telemetry::view;

pub(super) fn run(args: &ReplayArgs) -> Outcome {
    let plan = load_with(&args.pipeline, &args.set)?;
    let pace: Pace = args.speed.parse().map_err(|e| Failure::Usage(format!("--speed: {e}")))?;
    let names: Vec<&str> = plan.sources.iter().map(|s| s.name.as_ref()).collect();
    let source = match &args.source {
        Some(name) => plan.sources.iter().find(|s| s.name.as_ref() == name.as_str()).ok_or_else(|| {
            let hint = suggestion(name, "source", names.iter().copied()).unwrap_or_default();
            Failure::Usage(format!(
                "pipeline '{}' has no source '{name}'; it has {}. {hint}",
                plan.name,
                names.join(", ")
            ))
        })?,
        None if plan.sources.len() == 1 => &plan.sources[0],
        None => {
            return Err(Failure::Usage(format!(
                "--source is needed: pipeline '{}' has {}",
                plan.name,
                names.join(", ")
            )));
        }
    };
    if source.event_time.is_empty() {
        return Err(Failure::Usage(format!(
            "table '{}' has no event_time: its rows are true since they were written, which a file does not say",
            source.name
        )));
    }
    let format = match &args.format {
        Some(name) => Some(
            FileFormat::of(Path::new(&format!("file.{name}")))
                .ok_or_else(|| Failure::Usage(format!("--format '{name}' is not one of jsonl, csv, parquet, avro")))?,
        ),
        None => None,
    };
    let runtime = runtime()?;
    let stop = Stop::new();
    stop_on_signals(&runtime, &stop);
    let broker = broker::open(&plan.broker, "driftline-replay").map_err(Failure::failed)?;
    let schemas = match &plan.broker {
        BrokerPlan::Kafka { schema_registry: Some(url), .. } => {
            Some(Arc::new(SchemaRegistry::new(url, runtime.handle().clone()).map_err(Failure::failed)?))
        }
        _ => None,
    };
    if matches!(plan.broker, BrokerPlan::Embedded { .. }) {
        super::topic::create_inputs(&plan, broker.as_ref(), None)?;
    }
    let options = ReplayOptions {
        format,
        map: args.map.iter().cloned().collect(),
        pace,
        strict: args.strict,
        timestamps: match args.record_time {
            RecordTime::Now => Timestamps::Now,
            RecordTime::Event => Timestamps::Event,
        },
        create_topic: None,
    };
    let started = clock::monotonic();
    let mut told = started;
    let report = replay::run(broker.as_ref(), source, schemas.as_deref(), &args.file, &options, &stop, |progress| {
        if told.elapsed() >= Duration::from_secs(2) {
            told = clock::monotonic();
            let upto = progress.event_times.map_or_else(|| "-".into(), |(_, last)| view::date(last));
            tracing::info!("{} rows sent, up to {upto}", view::count(progress.sent));
        }
    })
    .map_err(Failure::failed)?;
    for error in &report.errors {
        tracing::warn!("{}: {error}", args.file.display());
    }
    let seconds = started.elapsed().as_secs_f64();
    printed(writeln!(
        std::io::stdout(),
        "{} of {} rows sent to {} in {seconds:.1} s ({}/s){}{}",
        view::count(report.sent),
        view::count(report.rows),
        source.topic,
        view::count((report.sent as f64 / seconds.max(1e-9)) as u64),
        if report.bad > 0 {
            format!("; {} could not be used, the first of them are told above", view::count(report.bad))
        } else {
            String::new()
        },
        if report.stopped { "; stopped before the end" } else { "" },
    ))
}
