//! Replaying a file of events into a source's topic.

mod cell;
mod convert;
mod file;
mod pace;
#[cfg(test)]
mod tests;

pub use convert::{ConvertError, Converter, ReplayRecord};
pub use file::{FileError, FileFormat, Next, ReplayFile, ReplayRow, RowError};
pub use pace::{Pace, Pacer};

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::broker::{Broker, BrokerError, Offsets, OutRecord, SchemaRegistry, TopicSettings};
use crate::config::plan::SourcePlan;
use crate::runtime::clock;
use crate::runtime::shutdown::Stop;

/// Records between two waits for the broker's acknowledgement.
const BATCH: u64 = 10_000;
/// Waits shorter than this are taken together with the next one.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);
/// Bad rows kept for the report.
const KEPT_ERRORS: usize = 10;

/// What timestamps the records get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timestamps {
    /// When they are sent.
    Now,
    /// Their event times. A topic with a retention time removes old ones at once.
    Event,
}

/// How to replay.
#[derive(Debug, Clone)]
pub struct ReplayOptions {
    /// Format of the file; `None` goes by its name.
    pub format: Option<FileFormat>,
    /// Column of each field whose column has another name.
    pub map: BTreeMap<String, String>,
    /// Speed.
    pub pace: Pace,
    /// Stops at the first bad row instead of counting it.
    pub strict: bool,
    /// Timestamps of the records.
    pub timestamps: Timestamps,
    /// Creates the topic like this where it does not exist.
    pub create_topic: Option<TopicSettings>,
}

impl Default for ReplayOptions {
    /// As fast as the broker takes it, past bad rows, into a topic that exists.
    fn default() -> Self {
        Self {
            format: None,
            map: BTreeMap::new(),
            pace: Pace::AsFast,
            strict: false,
            timestamps: Timestamps::Now,
            create_topic: None,
        }
    }
}

/// How far a replay has come, and at its end what it did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows read.
    pub rows: u64,
    /// Records sent. After [`run`] returns, all are acknowledged.
    pub sent: u64,
    /// Rows that could not be used.
    pub bad: u64,
    /// The first of them, at most ten, each with its line or row.
    pub errors: Vec<String>,
    /// Least and greatest event time sent, milliseconds since 1970 UTC.
    pub event_times: Option<(i64, i64)>,
    /// True where it was asked to stop before the end.
    pub stopped: bool,
}

/// Why a replay ended before the end of its file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A bad row, where none is allowed.
    #[error("{file}: {row}")]
    Row {
        /// The file.
        file: String,
        /// The row and what is wrong with it.
        row: RowError,
    },
    /// The rows cannot become records of this source.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// The log.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Replays a file into a source's topic, in the order of the file, partitioned by the entity key. `progress` is called
/// after each batch and before each wait of the pace.
///
/// # Errors
/// The first thing that cannot be passed over. Records sent before it may be in the topic.
pub fn run(
    broker: &dyn Broker,
    plan: &SourcePlan,
    registry: Option<&SchemaRegistry>,
    path: &Path,
    options: &ReplayOptions,
    stop: &Stop,
    mut progress: impl FnMut(&Report),
) -> Result<Report, ReplayError> {
    let file = ReplayFile::open(path, options.format)?;
    let mut converter = Converter::new(plan, registry, options.map.clone())?;
    if broker.topic(&plan.topic)?.is_none() {
        match &options.create_topic {
            Some(settings) => broker.create_topic(&plan.topic, settings)?,
            None => {
                let topic = plan.topic.to_string();
                return Err(BrokerError::NoSuchTopic { topic, broker: broker.describe() }.into());
            }
        }
    }
    let mut producer = broker.producer(None)?;
    producer.begin()?;
    let mut pacer = Pacer::new(options.pace);
    let mut started = None;
    let mut unacknowledged = 0;
    let mut report = Report::default();
    for next in file {
        if stop.requested() {
            report.stopped = true;
            break;
        }
        report.rows += 1;
        let record = match next? {
            Next::Bad(error) => Err(error),
            Next::Row(row) => {
                let number = row.number;
                converter.convert(row).map_err(|reason| RowError { noun: noun(path, options), number, reason })
            }
        };
        let record = match record {
            Ok(record) => record,
            Err(row) if options.strict => {
                producer.commit(&Offsets::new(), None)?;
                return Err(ReplayError::Row { file: path.display().to_string(), row });
            }
            Err(row) => {
                report.bad += 1;
                if report.errors.len() < KEPT_ERRORS {
                    report.errors.push(row.to_string());
                }
                continue;
            }
        };
        let began = *started.get_or_insert_with(clock::monotonic);
        let wait = pacer.wait(record.event_time, clock::monotonic() - began);
        if wait >= SHORTEST_WAIT {
            // What is due must be visible before the wait, not after it.
            if unacknowledged > 0 {
                producer.commit(&Offsets::new(), None)?;
                producer.begin()?;
                unacknowledged = 0;
            }
            progress(&report);
            if stop.wait(wait) {
                report.stopped = true;
                break;
            }
        }
        producer.send(OutRecord {
            topic: &plan.topic,
            partition: None,
            key: Some(&record.key),
            value: Some(&record.value),
            timestamp: (options.timestamps == Timestamps::Event).then_some(record.event_time),
            headers: &[],
        })?;
        report.sent += 1;
        unacknowledged += 1;
        let (least, greatest) = report.event_times.unwrap_or((record.event_time, record.event_time));
        report.event_times = Some((least.min(record.event_time), greatest.max(record.event_time)));
        if unacknowledged == BATCH {
            producer.commit(&Offsets::new(), None)?;
            producer.begin()?;
            unacknowledged = 0;
            progress(&report);
        }
    }
    producer.commit(&Offsets::new(), None)?;
    progress(&report);
    Ok(report)
}

fn noun(path: &Path, options: &ReplayOptions) -> &'static str {
    match options.format.or_else(|| FileFormat::of(path)) {
        Some(FileFormat::JsonLines | FileFormat::Csv) | None => "line",
        Some(FileFormat::Parquet | FileFormat::Avro | FileFormat::Arrow) => "row",
    }
}
