//! Puts the predictions of several partitions into one order: event time, then partition, then offset.
//!
//! A row is given out only once every other partition has shown that it holds nothing earlier: by a row of its own, or by being
//! over, which the caller knows. So a monitor that reads history partition by partition sees what a live one saw.

use std::collections::{BTreeMap, VecDeque};

use super::prediction::PredictionRows;
use crate::source::DeadLetter;

/// Rows read and not yet given out, by partition.
#[derive(Debug)]
pub(super) struct Merge {
    columns: usize,
    buffers: BTreeMap<i32, Buffer>,
}

#[derive(Debug)]
pub(super) struct Buffer {
    /// Decoded rows; those before `next` are given out.
    pub(super) rows: PredictionRows,
    next: usize,
    /// Records that are no predictions, in offset order.
    pub(super) dead: VecDeque<DeadLetter>,
    /// The offset after all that was read.
    pub(super) position: i64,
}

impl Buffer {
    fn head(&self) -> Option<i64> {
        self.rows.event_times.get(self.next).copied()
    }

    /// Rows waiting.
    pub(super) fn len(&self) -> usize {
        self.rows.len() - self.next
    }
}

impl Merge {
    pub(super) fn new(columns: usize) -> Self {
        Self { columns, buffers: BTreeMap::new() }
    }

    /// Starts anew with these partitions at these offsets (first unread).
    pub(super) fn start(&mut self, positions: impl IntoIterator<Item = (i32, i64)>) {
        let buffer =
            |position| Buffer { rows: PredictionRows::new(self.columns), next: 0, dead: VecDeque::new(), position };
        self.buffers = positions.into_iter().map(|(partition, position)| (partition, buffer(position))).collect();
    }

    pub(super) fn get_mut(&mut self, partition: i32) -> Option<&mut Buffer> {
        self.buffers.get_mut(&partition)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (i32, &Buffer)> {
        self.buffers.iter().map(|(partition, buffer)| (*partition, buffer))
    }

    /// True if nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.buffers.values().all(|buffer| buffer.len() == 0)
    }

    /// Moves rows to `out`, in order, until it has `most` or until a partition that is not `over` has none left.
    pub(super) fn take(&mut self, over: impl Fn(i32) -> bool, most: usize, out: &mut PredictionRows) {
        while out.len() < most {
            let mut first: Option<(i64, i32)> = None;
            let mut second = (i64::MAX, i32::MAX);
            for (&partition, buffer) in &self.buffers {
                let Some(event_time) = buffer.head() else {
                    if over(partition) {
                        continue;
                    }
                    return;
                };
                match first {
                    Some(best) if best <= (event_time, partition) => second = second.min((event_time, partition)),
                    _ => {
                        second = first.unwrap_or(second).min(second);
                        first = Some((event_time, partition));
                    }
                }
            }
            let Some((_, partition)) = first else { return };
            let buffer = self.buffers.get_mut(&partition).expect("it was found there");
            while out.len() < most && buffer.head().is_some_and(|event_time| (event_time, partition) < second) {
                out.push_row(&buffer.rows, buffer.next);
                buffer.next += 1;
            }
            if buffer.len() == 0 {
                buffer.rows.clear();
                buffer.next = 0;
            }
        }
    }

    /// The first offset of a partition that is not given out. Dead letters before it are due.
    pub(super) fn first_waiting(&self, partition: i32) -> Option<i64> {
        let buffer = self.buffers.get(&partition)?;
        Some(buffer.rows.offsets.get(buffer.next).copied().unwrap_or(buffer.position))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(partitions: &[(i32, &[i64])]) -> Merge {
        let mut merge = Merge::new(1);
        merge.start(partitions.iter().map(|(partition, _)| (*partition, 0)));
        for (partition, times) in partitions {
            let buffer = merge.get_mut(*partition).unwrap();
            for (offset, time) in times.iter().enumerate() {
                buffer.rows.push(*time, *partition, offset as i64, "1", &[0.5]);
                buffer.position = offset as i64 + 1;
            }
        }
        merge
    }

    fn take(merge: &mut Merge, over: bool, most: usize) -> Vec<(i64, i32)> {
        let mut out = PredictionRows::new(1);
        merge.take(|_| over, most, &mut out);
        out.event_times.into_iter().zip(out.partitions).collect()
    }

    #[test]
    fn rows_come_by_event_time_then_partition() {
        let mut merge = merge(&[(0, &[10, 20, 40]), (1, &[10, 15, 30, 30]), (2, &[])]);
        let all = [(10, 0), (10, 1), (15, 1), (20, 0), (30, 1), (30, 1), (40, 0)];
        assert_eq!(take(&mut merge, true, 5), all[..5]);
        assert_eq!(
            (merge.first_waiting(0), merge.first_waiting(1), merge.first_waiting(2)),
            (Some(2), Some(3), Some(0))
        );
        assert_eq!(take(&mut merge, true, 99), all[5..]);
        assert_eq!((merge.first_waiting(0), merge.first_waiting(1)), (Some(3), Some(4)));
        assert!(merge.is_empty());
    }

    #[test]
    fn a_partition_that_may_hold_earlier_rows_is_waited_for() {
        let mut merge = merge(&[(0, &[10, 20]), (1, &[15])]);
        assert_eq!(take(&mut merge, false, 99), [(10, 0), (15, 1)]);
        assert_eq!(take(&mut merge, false, 99), []);
        assert_eq!(take(&mut merge, true, 99), [(20, 0)]);
    }

    #[test]
    fn rows_out_of_order_within_a_partition_keep_their_order() {
        let mut merge = merge(&[(0, &[30, 10, 20]), (1, &[25])]);
        assert_eq!(take(&mut merge, true, 99), [(25, 1), (30, 0), (10, 0), (20, 0)]);
    }
}
