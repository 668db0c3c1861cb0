//! When a worker takes checkpoints, and how it does so without standing still.
//!
//! A checkpoint begins after a commit, with nothing applied that is not committed: then only positions are copied, and the
//! rows gathered so far are set apart. Its state follows slice by slice, one a turn, while the stream goes on.

use std::sync::Arc;
use std::time::Instant;

use arrow::array::RecordBatch;

use super::super::RunError;
use super::super::checkpointer::Job;
use super::{Slot, Worker};
use crate::broker::{Offsets, TopicPartition};
use crate::config::plan::OfflinePlan;
use crate::runtime::clock;
use crate::window::Extent;

/// Entities of which a turn copies the state at most: some milliseconds' work.
const SLICE_ENTITIES: usize = 4096;

/// What a checkpoint being taken holds besides state.
pub(super) struct Open {
    extent: Extent,
    next: Offsets,
    rows: Vec<RecordBatch>,
    windows: Vec<(String, Vec<RecordBatch>)>,
}

impl Slot {
    /// True where there are rows or time enough for a checkpoint. Rows gather while one is being written, up to twice the
    /// limit; then a slow disk holds the stream back instead of filling memory.
    fn is_due(&self, offline: &OfflinePlan, busy: bool, now: Instant) -> bool {
        let full = if busy { self.is_overdue(offline) } else { self.rows_count >= offline.checkpoint_rows };
        let old = now.saturating_duration_since(self.checkpointed) >= offline.checkpoint_interval;
        full || (old && !busy)
    }

    fn is_overdue(&self, offline: &OfflinePlan) -> bool {
        self.rows_count >= 2 * offline.checkpoint_rows
    }
}

impl Worker<'_> {
    /// Goes on with the checkpoints being taken, and begins those that are due. With `last`, ends them all, and takes one of
    /// all that hold anything new.
    pub(super) fn checkpoints(&mut self, last: bool) -> Result<(), RunError> {
        self.checkpointer.check()?;
        let (context, now) = (self.context, clock::monotonic());
        self.slices(last)?;
        let due = |slot: &Slot, busy| slot.dirty && (last || slot.is_due(&context.plan.offline, busy, now));
        let busy = self.is_busy();
        if !self.slots.values().any(|slot| due(slot, busy)) {
            return Ok(());
        }
        // While a batch is open, the state is ahead of the committed offsets.
        if let Some(closed) = self.batcher.checkpoint() {
            self.flush(closed)?;
        }
        let partitions: Vec<i32> = self.slots.keys().copied().collect();
        for partition in partitions {
            let busy = self.is_busy();
            if self.slots.get(&partition).is_some_and(|slot| due(slot, busy)) {
                self.begin(partition, now)?;
                self.slices(last)?;
            }
        }
        Ok(())
    }

    /// True where polling must not wait: a slice can be taken.
    pub(super) fn has_slices(&self) -> bool {
        self.slots.values().any(|slot| slot.open.is_some()) && self.checkpointer.has_room()
    }

    fn is_busy(&self) -> bool {
        self.checkpointer.is_busy() || self.slots.values().any(|slot| slot.open.is_some())
    }

    fn begin(&mut self, partition: i32, now: Instant) -> Result<(), RunError> {
        let plan = &self.context.plan;
        let Some(slot) = self.slots.get_mut(&partition) else { return Ok(()) };
        let started = clock::monotonic();
        let positions = slot.task.next();
        let next = positions.iter().zip(&plan.sources).filter_map(|(next, source)| {
            next.map(|next| (TopicPartition::new(Arc::clone(&source.topic), partition), next))
        });
        let windows = slot.windows.iter_mut().map(std::mem::take);
        slot.open = Some(Open {
            extent: slot.task.begin_checkpoint()?,
            next: next.collect(),
            rows: std::mem::take(&mut slot.rows),
            windows: plan.windows.iter().map(|w| w.name.clone()).zip(windows).collect(),
        });
        slot.rows_count = 0;
        slot.dirty = false;
        slot.checkpointed = now;
        self.paused_since(started);
        Ok(())
    }

    /// One slice of the checkpoint being taken, if there is one and room for it; all of one whose task has too many rows
    /// since; with `all`, of every one.
    fn slices(&mut self, all: bool) -> Result<(), RunError> {
        let offline = &self.context.plan.offline;
        let open = self.slots.iter().filter(|(_, slot)| slot.open.is_some());
        let open: Vec<(i32, bool)> = open.map(|(at, slot)| (*at, all || slot.is_overdue(offline))).collect();
        for (partition, to_the_end) in open {
            if to_the_end {
                while !self.slice(partition)? {}
            } else if self.checkpointer.has_room() {
                self.slice(partition)?;
            }
        }
        Ok(())
    }

    /// One slice. True if it was the last.
    fn slice(&mut self, partition: i32) -> Result<bool, RunError> {
        let Some(slot) = self.slots.get_mut(&partition) else { return Ok(true) };
        let started = clock::monotonic();
        let slice = slot.task.checkpoint_slice(SLICE_ENTITIES)?;
        let open = if slice.last { slot.open.take() } else { None };
        self.paused_since(started);
        match open {
            Some(Open { extent, next, rows, windows }) => {
                self.checkpointer.write(partition, Job { next, state: slice.batches, extent, rows, windows })?;
            }
            None if slice.batches.is_empty() => (),
            None => self.checkpointer.slice(partition, slice.batches)?,
        }
        Ok(slice.last)
    }

    fn paused_since(&self, started: Instant) {
        let pause = clock::monotonic().saturating_duration_since(started);
        self.checkpoint_pause.record(pause.as_secs_f64());
    }
}
