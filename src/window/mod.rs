//! Windows: tiles, aggregates, the state of a task, and its checkpoints.
//!
//! A task owns one partition number across the co-partitioned sources. It merges their rows by event time, applies them
//! to the state of their entities and answers with feature rows.

use arrow::array::RecordBatch;

/// Columns of a feature batch that are not entity keys or features. Entity keys come first, then these, then all features.
pub mod row_columns {
    /// Instant the row is as of, timestamp (ms, UTC).
    pub const EVENT_TIME: &str = "event_time";
    /// Name of the source whose event asked for the row.
    pub const SOURCE: &str = "source";
    /// Topic of that event.
    pub const TOPIC: &str = "source_topic";
    /// Partition of that event, int32.
    pub const PARTITION: &str = "source_partition";
    /// Offset of that event, int64.
    pub const OFFSET: &str = "source_offset";
    /// Watermark of the task when the row was computed, timestamp (ms, UTC), null before the first.
    pub const WATERMARK: &str = "watermark";
}

/// Feature rows of one task.
#[derive(Debug, Clone)]
pub struct FeatureRows {
    /// Entity keys, the columns of [`row_columns`], then all features of the plan in order.
    pub batch: RecordBatch,
    /// Order of the rows among all that the task ever wrote: the sum of the next offsets of its sources after the event
    /// was applied. Rises with every event; equal after a replay. Breaks ties of event time in the online store.
    pub sequence: Vec<i64>,
}
