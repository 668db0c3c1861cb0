//! Windows: tiles, aggregates, the state of a task, and its checkpoints.
//!
//! A task owns one partition number across the co-partitioned sources. It merges their rows by event time, applies them
//! to the state of their entities and answers with feature rows.
//!
//! ```text
//!  SourceBatch ─ offer ─> synchroniser ─ advance ─> state of the row's entity ─> rows of `[score] on`, online rows
//!                         by event time             raw rows │ tiles │ beyond     late rows, next offsets, ledger
//! ```
//!
//! What a value means:
//!
//! - A window of length *w* with tiles of length *τ*, as of *t*, covers the events in `(floor((t − w)/τ)·τ, t]`. Events of
//!   the instant *t* itself count if they come before the asking event in (source order, offset) order, or are it. An
//!   exact window has tiles of a millisecond: it covers `(t − w, t]`.
//! - An event whose filter is not true, or whose `of` value is null or not finite, is not there for that group.
//! - An empty window has `count`, `distinct`, `sum` and `rate` 0; every other function is null. `std` and `var` are the sample's,
//!   null for fewer than two values; `slope` is null for fewer than two distinct instants. A sum of integers that does not
//!   fit 64 bits is null, and so is a float result that is not finite. docs/functions.md has each function's exact meaning.
//! - Values do not depend on how the state is cut into tiles, when it was flushed, or whether it was restored: integers are
//!   summed exactly and floats in twice the precision (see `double_double` for the limits of that), and a sketch is a function
//!   of the values in it, not of their order or grouping.

mod aggregate;
mod capture;
mod channels;
mod cold;
mod double_double;
mod emitted;
mod engine;
mod entities;
mod exact;
mod held;
mod ordered;
mod prepare;
mod published;
mod rows;
mod snapshot;
mod state;
mod synchroniser;
mod task;
mod texts;
mod tile;
mod watermark;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use arrow::array::RecordBatch;

use crate::broker::NextOffset;

pub use capture::{Extent, Slice};
pub use cold::ColdStore;
pub use engine::{Engine, SingleEvents, StateBytes, state_bytes};
pub use published::Published;
pub use task::Task;
pub(crate) use tile::{EXACT, Window};
pub(crate) use watermark::SourceTime;

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
    /// Watermark of the task when the row was computed, timestamp (ms, UTC), null before the first. Where rows are applied in
    /// event-time order: the row's own event time, which the watermark had passed.
    pub const WATERMARK: &str = "watermark";
}

/// Columns of an emitted batch that are not entity keys or functions. Entity keys come first, then the window's beginning and
/// end, then the functions, then the others.
pub mod emitted_columns {
    /// Beginning of the window, timestamp (ms, UTC), inclusive. Of a session: its first event.
    pub const START: &str = "window_start";
    /// End of the window, timestamp (ms, UTC), exclusive. Of a session: its last event and the gap.
    pub const END: &str = "window_end";
    /// True once the window is closed: there is one such row a window. False for early results.
    pub const FINAL: &str = "final";
    /// Offset of the event whose event time closed the window (or asked for the early result), int64.
    pub const OFFSET: &str = "source_offset";
    /// All of them.
    pub const ALL: &[&str] = &[START, END, FINAL, OFFSET];
}

/// Feature rows of one task.
#[derive(Debug, Clone)]
pub struct FeatureRows {
    /// Entity keys, the columns of [`row_columns`], then all features of the plan in order.
    pub batch: RecordBatch,
    /// Order of the rows among all that the task ever wrote: the sum over its sources of the offset after the last applied
    /// row, and where rows are applied in event-time order the number of rows besides. Rises with every event; equal after a
    /// replay. Breaks ties of event time in the online store.
    pub sequence: Vec<i64>,
}

/// Rows of one table of emitted windows.
#[derive(Debug, Clone)]
pub struct EmittedRows {
    /// Entity keys, beginning and end, the functions, the rest of [`emitted_columns`].
    pub batch: RecordBatch,
    /// For each row: the event time, ms, of the event at its offset.
    pub event_times: Vec<i64>,
}

/// What a task knows of its sources beyond the rows it was offered. One entry a source, in the plan's order.
#[derive(Debug, Clone, Copy)]
pub struct TaskClock<'a> {
    /// All that the partition holds has been offered: the source no longer holds back the others while it has no row.
    pub caught_up: &'a [bool],
    /// No record came for [`idle_after`](crate::config::plan::SourcePlan::idle_after): as above, and the source's watermark
    /// no longer counts in the task's.
    pub idle: &'a [bool],
}

/// A row behind its partition's watermark: not applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Late {
    /// Index of the source in the plan.
    pub source: usize,
    /// Offset of the row.
    pub offset: i64,
    /// Its event time, ms.
    pub event_time: i64,
    /// The watermark of its partition when it came, ms: event times below it are late.
    pub watermark: i64,
}

/// The ledger of one source: `read = applied + filtered + late + dead`, always.
///
/// A batch's filtered and dead records enter it together with the last row of the batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records accounted for.
    pub read: u64,
    /// Applied to the state.
    pub applied: u64,
    /// Left out by the source's `where`.
    pub filtered: u64,
    /// Behind the watermark.
    pub late: u64,
    /// Given up while decoding: already dead letters.
    pub dead: u64,
}

/// Expressions that had no value for some rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failures {
    /// Number of (row, expression) pairs.
    pub rows: u64,
    /// The first one, in words.
    pub first: Option<String>,
}

/// What a call of [`Task::advance`] did.
#[derive(Debug, Clone)]
pub struct Applied {
    /// One row an event of `[score] on`, in the order of application, as of that event. Empty without `[score]`.
    pub rows: FeatureRows,
    /// One row an entity that any event touched, as of the entity's newest event.
    pub online: FeatureRows,
    /// Rows of the windows that closed and of early results, for each of the plan's windows that has any. In the order in which
    /// the events at [`emitted_columns::OFFSET`] were applied.
    pub emitted: Vec<Option<EmittedRows>>,
    /// Rows that came too late, in the order of their source; each was also told by [`Task::offer`].
    pub late: Vec<Late>,
    /// First unapplied offset of each source; `None` before its first batch.
    pub next: Vec<Option<NextOffset>>,
    /// What this call accounts for, by source.
    pub counts: Vec<Counts>,
    /// Rows for which a group's filter (not kept) or a derived feature (null) could not be computed.
    pub failures: Failures,
    /// Watermark of the task, ms: the least of its sources that are not idle. `None` while one of them has none.
    pub watermark: Option<i64>,
    /// More rows can be applied at once: `advance` stopped at its limit.
    pub more: bool,
}

/// What a task holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes of the state, as allocated.
    pub state: usize,
    /// Bytes of rows offered and not yet applied.
    pub buffered: usize,
    /// Bytes of states on disk.
    pub on_disk: u64,
}

/// What can go wrong in windows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// The plan asks for what there is not.
    #[error("feature group {group}: {reason}")]
    Group {
        /// Group or derived feature.
        group: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The windows of one source cannot share tiles.
    #[error(
        "source {source_name}: window {shorter} with tiles of {shorter_tile_ms} ms and window {longer} with tiles of \
         {longer_tile_ms} ms cannot share state: the one tile must divide the other, the longer window's being the larger; \
         set `tile` in the feature group"
    )]
    Tiles {
        /// Source.
        source_name: Arc<str>,
        /// The shorter window's label.
        shorter: String,
        /// Its tile, ms.
        shorter_tile_ms: i64,
        /// The longer window's label.
        longer: String,
        /// Its tile, ms.
        longer_tile_ms: i64,
    },
    /// A batch is not what the source stage makes.
    #[error("source {source_name}, partition {partition}, offsets from {offset}: {reason}")]
    Batch {
        /// Source.
        source_name: Arc<str>,
        /// Partition.
        partition: i32,
        /// First offset of the batch, or its next where it has no row.
        offset: i64,
        /// What is wrong.
        reason: String,
    },
    /// A checkpoint is of another definition.
    #[error(
        "the checkpoint was written for definition {found} of the features, this is definition {expected}: state cannot be \
         carried over; start from the beginning of the log with an empty offline folder, or restore the old definition"
    )]
    OtherDefinition {
        /// Hash now.
        expected: String,
        /// Hash in the checkpoint.
        found: String,
    },
    /// A checkpoint is of other windows.
    #[error(
        "the checkpoint was written with other [windows]: `{found}`, and these are `{expected}`. What is open of them cannot be \
         carried over: `driftline versions bootstrap` computes these beside the old ones, --rebuild in their place"
    )]
    OtherWindows {
        /// Layout now.
        expected: String,
        /// Layout in the checkpoint.
        found: String,
    },
    /// A checkpoint cannot be read.
    #[error("the checkpoint cannot be restored: {reason}")]
    Corrupt {
        /// What is wrong.
        reason: String,
    },
    /// States that went to disk are gone, or no more go there. A restart restores them from the checkpoint.
    #[error("state on disk ([state] path): {reason}")]
    Cold {
        /// What is wrong.
        reason: String,
    },
    /// Columns could not be built or evaluated.
    #[error("feature rows: {0}")]
    Rows(String),
}
