//! From records to columns: decoding, event time, filters, and what becomes of records that fit nowhere.

pub mod avro;
mod columns;
pub mod dead_letter;
mod decode;
pub mod event_time;
pub mod expression;
pub mod fault;
mod json;
pub mod json_schema;
mod labels;
pub mod protobuf;
pub mod rekeyed;
pub mod replay;
pub(crate) mod skip;
mod table;
#[cfg(test)]
#[path = "../../tests/it/source_plan.rs"]
mod sample;

pub use decode::{SourceDecoder, SourceError};
pub use labels::{DecodedLabels, LabelDecoder};

use std::sync::Arc;

use arrow::array::RecordBatch;

use crate::broker::{Header, TopicPartition};

/// Rows of one partition of one source, decoded and filtered, in offset order.
#[derive(Debug, Clone)]
pub struct SourceBatch {
    /// Index of the source in the plan.
    pub source: usize,
    /// Partition read.
    pub partition: i32,
    /// The source's fields and derived columns, in the plan's order (`fields`, then `derive`).
    pub columns: RecordBatch,
    /// Event time of each row, milliseconds since 1970 UTC.
    pub event_times: Vec<i64>,
    /// Offset of each row.
    pub offsets: Vec<i64>,
    /// The offset after the last record read, kept or not: what the task's position becomes once this batch is applied.
    pub next: i64,
    /// Records read to make this batch, kept or not.
    pub read: u64,
    /// Records that `where` left out. None of a table: there they are rows without facts, as are records without a value.
    pub filtered: u64,
    /// Of a source that is keyed anew: where the rows come from.
    pub rekeyed: Option<Rekeyed>,
}

/// Where the rows of a batch were before their source was keyed anew, and how far it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rekeyed {
    /// Partition and offset of each row. They order rows of one event time.
    pub origins: Vec<(i32, i64)>,
    /// What the batch says of event time, in order.
    pub marks: Vec<Mark>,
}

/// Event time of a partition of the source before, all of whose events up to there are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The partition.
    pub partition: i32,
    /// How many there are.
    pub channels: usize,
    /// Its highest event time, ms; `None` before the first event.
    pub newest: Option<i64>,
    /// Nothing has come for so long that it holds back the others no more.
    pub idle: bool,
}

/// A record that could not be used, with all that is needed to understand and replay it.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// Where it was read.
    pub partition: TopicPartition,
    /// Its offset.
    pub offset: i64,
    /// Its Kafka timestamp, milliseconds; −1 for none.
    pub timestamp: i64,
    /// Its key, as read.
    pub key: Option<Vec<u8>>,
    /// Its value, as read.
    pub value: Option<Vec<u8>>,
    /// Its headers, as read.
    pub headers: Vec<Header>,
    /// Stage that gave up: `decode`, `window`, `score`, `monitor`.
    pub stage: &'static str,
    /// Short fixed word for metrics: those of [`fault::reason`], and `late`, `unscorable`, … of later stages.
    pub reason: &'static str,
    /// What is wrong, where and what to do, for a person.
    pub error: String,
}

/// What decoding a poll's records of one partition gave.
#[derive(Debug, Clone)]
pub struct Decoded {
    /// The good rows.
    pub batch: SourceBatch,
    /// The others.
    pub dead: Vec<DeadLetter>,
    /// NaN and infinite values in the good rows before `where`, which became null.
    pub nonfinite: u64,
}

/// Names of a dead letter's headers, shared with whatever lists and replays them.
pub mod dead_letter_headers {
    /// Topic the record was read from.
    pub const TOPIC: &str = "driftline.topic";
    /// Its partition, decimal.
    pub const PARTITION: &str = "driftline.partition";
    /// Its offset, decimal.
    pub const OFFSET: &str = "driftline.offset";
    /// Its timestamp, decimal milliseconds.
    pub const TIMESTAMP: &str = "driftline.timestamp";
    /// Stage that gave up.
    pub const STAGE: &str = "driftline.stage";
    /// Fixed word.
    pub const REASON: &str = "driftline.reason";
    /// What is wrong, for a person.
    pub const ERROR: &str = "driftline.error";
    /// `none` where the record had no value: that of the letter is empty then.
    pub const VALUE: &str = "driftline.value";
    /// How often a record has been replayed, decimal. Not the letter's but the record's: `dead-letters replay` writes it.
    pub const REPLAYS: &str = "driftline.replays";
}

/// Shared name of a source's column set.
pub type Name = Arc<str>;
