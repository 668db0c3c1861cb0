//! One partition number across the sources: rows in, feature rows out.

use std::sync::Arc;

use arrow::array::RecordBatch;

use super::{Applied, Counts, Engine, Failures, FeatureRows, Late, Memory, TaskClock, WindowError};
use crate::broker::NextOffset;
use crate::source::SourceBatch;

/// The state and the clock of one partition number.
#[derive(Debug)]
pub struct Task {
    engine: Arc<Engine>,
    partition: i32,
    next: Vec<Option<NextOffset>>,
}

impl Task {
    /// An empty task.
    pub fn new(engine: Arc<Engine>, partition: i32) -> Self {
        let next = vec![None; engine.sources()];
        Self { engine, partition, next }
    }

    /// The task that [`Task::snapshot`] was taken of. Rows that were offered but not applied are not in it: read on from
    /// [`Task::next`].
    ///
    /// # Errors
    /// The snapshot is of another definition, another partition or a newer format, or damaged.
    pub fn restore(engine: Arc<Engine>, partition: i32, snapshot: &[RecordBatch]) -> Result<Self, WindowError> {
        let _ = snapshot;
        Ok(Self::new(engine, partition))
    }

    /// Buffers rows, which must follow the source's last batch. Tells those that are late: they are reported once more in
    /// [`Applied::late`] when their turn comes, which is when they become dead letters.
    ///
    /// # Errors
    /// The batch does not have the plan's columns, has a null key, or overlaps an earlier one.
    pub fn offer(&mut self, batch: SourceBatch) -> Result<Vec<Late>, WindowError> {
        self.next[batch.source] = Some(NextOffset(batch.next));
        Ok(Vec::new())
    }

    /// Applies all rows whose turn has come, at most `limit`.
    ///
    /// # Errors
    /// A column of features cannot be built. The state is then ahead of its output: drop the task and restore it.
    pub fn advance(&mut self, _clock: &TaskClock<'_>, _limit: usize) -> Result<Applied, WindowError> {
        let empty = FeatureRows { batch: RecordBatch::new_empty(self.engine.schema().clone()), sequence: Vec::new() };
        Ok(Applied {
            rows: empty.clone(),
            online: empty,
            late: Vec::new(),
            next: self.next.clone(),
            counts: vec![Counts::default(); self.engine.sources()],
            failures: Failures::default(),
            watermark: None,
            more: false,
        })
    }

    /// First unapplied offset of each source; `None` before its first batch.
    pub fn next(&self) -> &[Option<NextOffset>] {
        &self.next
    }

    /// Partition number.
    pub fn partition(&self) -> i32 {
        self.partition
    }

    /// Rows of a source that wait for their turn. Pause the source's partition while these are too many.
    pub fn buffered(&self, _source: usize) -> usize {
        0
    }

    /// Entities with state.
    pub fn entities(&self) -> usize {
        0
    }

    /// Bytes held.
    pub fn memory(&self) -> Memory {
        Memory::default()
    }

    /// The whole state as of the last [`Task::advance`], at least one batch. Its schema, and what the words in it mean, are
    /// described in `window/snapshot.rs`.
    ///
    /// # Errors
    /// Columns cannot be built.
    pub fn snapshot(&self) -> Result<Vec<RecordBatch>, WindowError> {
        Ok(vec![RecordBatch::new_empty(self.engine.schema().clone())])
    }
}
