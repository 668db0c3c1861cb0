//! Whose turn it is: rows of several sources merged by event time.
//!
//! Rows of one source are applied in offset order. The next row of a source may be applied once no other source can still
//! bring an earlier one: it has a row waiting, is caught up, or is idle. Among waiting rows the earliest goes first, of
//! equal times the one of the source that comes first in the plan. A replay through several topics thus sees each event
//! with what was known as of it, and live traffic is not held back.

use std::collections::VecDeque;
use std::ops::Range;

use super::TaskClock;
use super::entities::Keys;
use crate::broker::NextOffset;

/// Rows of one source, in the form in which states keep them.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// Event times.
    pub times: Vec<i64>,
    pub offsets: Vec<i64>,
    /// Where the source is keyed anew: partition and offset before, which order rows of one event time.
    pub origins: Option<Vec<(i32, i64)>>,
    /// Flat rows: time, mask, values.
    pub rows: Vec<u64>,
    pub keys: Keys,
    /// The offset after the last record read.
    pub next: i64,
    /// Records that were read and are not among the rows.
    pub filtered: u64,
    /// Records that were read and became dead letters.
    pub dead: u64,
}

impl Prepared {
    pub fn bytes(&self) -> usize {
        8 * (self.times.capacity() + self.offsets.capacity() + self.rows.capacity()) + self.keys.bytes()
    }
}

/// What one source has waiting.
#[derive(Debug, Default)]
struct Queue {
    batches: VecDeque<Prepared>,
    /// First waiting row of the first batch.
    cursor: usize,
    rows: usize,
    /// Where the source stands when nothing waits.
    position: Option<NextOffset>,
}

impl Queue {
    fn head(&self) -> Option<i64> {
        self.batches.front().map(|batch| batch.times[self.cursor])
    }
}

/// The rows that wait for their turn.
#[derive(Debug)]
pub(super) struct Synchroniser {
    queues: Vec<Queue>,
}

/// What finishing a batch accounts for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Finished {
    pub filtered: u64,
    pub dead: u64,
}

impl Synchroniser {
    /// A synchroniser whose sources stand at these positions.
    pub fn new(positions: Vec<Option<NextOffset>>) -> Self {
        Self { queues: positions.into_iter().map(|position| Queue { position, ..Queue::default() }).collect() }
    }

    /// The least offset that the next batch of a source may start with.
    pub fn expected(&self, source: usize) -> Option<NextOffset> {
        let queue = &self.queues[source];
        queue.batches.back().map(|batch| NextOffset(batch.next)).or(queue.position)
    }

    /// Adds a batch. One without rows is returned where nothing waits before it: it is finished at once.
    pub fn push(&mut self, source: usize, batch: Prepared) -> Option<Finished> {
        let queue = &mut self.queues[source];
        if let (true, Some(last)) = (batch.times.is_empty(), queue.batches.back_mut()) {
            last.next = batch.next;
            last.filtered += batch.filtered;
            last.dead += batch.dead;
            return None;
        }
        if batch.times.is_empty() {
            queue.position = Some(NextOffset(batch.next));
            return Some(Finished { filtered: batch.filtered, dead: batch.dead });
        }
        queue.rows += batch.times.len();
        queue.batches.push_back(batch);
        None
    }

    /// The source whose turn it is and the rows of its first batch that go before any other source's; at most `limit`.
    pub fn turn(&self, clock: &TaskClock<'_>, limit: usize) -> Option<(usize, Range<usize>)> {
        let mut first: Option<(i64, usize)> = None;
        let mut second: Option<(i64, usize)> = None;
        for (source, queue) in self.queues.iter().enumerate() {
            match queue.head() {
                Some(time) if first.is_none_or(|first| (time, source) < first) => {
                    (second, first) = (first, Some((time, source)))
                }
                Some(time) if second.is_none_or(|second| (time, source) < second) => second = Some((time, source)),
                Some(_) => {}
                None if clock.caught_up[source] || clock.idle[source] => {}
                None => return None,
            }
        }
        let (_, source) = first?;
        let queue = &self.queues[source];
        let waiting = &queue.batches[0].times[queue.cursor..];
        let waiting = &waiting[..waiting.len().min(limit)];
        let run = match second {
            None => waiting.len(),
            Some(second) => waiting.iter().take_while(|&&time| (time, source) < second).count(),
        };
        Some((source, queue.cursor..queue.cursor + run))
    }

    /// The batch whose turn it is.
    pub fn batch(&self, source: usize) -> &Prepared {
        &self.queues[source].batches[0]
    }

    /// Marks `rows` rows of the first batch as applied.
    pub fn applied(&mut self, source: usize, rows: usize) -> Finished {
        let queue = &mut self.queues[source];
        queue.rows -= rows;
        queue.cursor += rows;
        let batch = &queue.batches[0];
        if queue.cursor < batch.times.len() {
            return Finished::default();
        }
        let finished = Finished { filtered: batch.filtered, dead: batch.dead };
        queue.position = Some(NextOffset(batch.next));
        queue.cursor = 0;
        queue.batches.pop_front();
        finished
    }

    /// First unapplied offset of each source.
    pub fn next(&self) -> Vec<Option<NextOffset>> {
        let next = self.queues.iter().map(|queue| match queue.batches.front() {
            Some(batch) => Some(NextOffset(batch.offsets[queue.cursor])),
            None => queue.position,
        });
        next.collect()
    }

    /// Rows of a source that wait.
    pub fn waiting(&self, source: usize) -> usize {
        self.queues[source].rows
    }

    /// Bytes of what waits.
    pub fn bytes(&self) -> usize {
        self.queues.iter().flat_map(|queue| &queue.batches).map(Prepared::bytes).sum()
    }

    /// Calls `change` with all flat rows of a source that wait.
    pub fn for_each_batch(&mut self, source: usize, mut change: impl FnMut(&mut [u64])) {
        self.queues[source].batches.iter_mut().for_each(|batch| change(&mut batch.rows));
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn batch(times: &[i64], first_offset: i64) -> Prepared {
        let offsets: Vec<i64> = (first_offset..).take(times.len()).collect();
        let next = first_offset + times.len() as i64;
        Prepared { times: times.to_vec(), offsets, next, ..Prepared::default() }
    }

    fn drain(synchroniser: &mut Synchroniser, caught_up: &[bool], idle: &[bool]) -> Vec<(usize, i64)> {
        let mut order = Vec::new();
        while let Some((source, rows)) = synchroniser.turn(&TaskClock { caught_up, idle }, 1000) {
            let run = rows.len();
            assert!(run > 0);
            order.extend(synchroniser.batch(source).times[rows].iter().map(|&time| (source, time)));
            synchroniser.applied(source, run);
        }
        order
    }

    #[test]
    fn merges_by_time_then_source_then_offset() {
        let mut synchroniser = Synchroniser::new(vec![None, None]);
        synchroniser.push(0, batch(&[10, 20, 15, 40], 0));
        synchroniser.push(1, batch(&[10, 16, 20, 30], 0));
        let order = drain(&mut synchroniser, &[true, true], &[false, false]);
        assert_eq!(order, [(0, 10), (1, 10), (1, 16), (0, 20), (0, 15), (1, 20), (1, 30), (0, 40)]);
    }

    #[rstest]
    #[case::unknown(false, false, 0)]
    #[case::caught_up(true, false, 2)]
    #[case::idle(false, true, 2)]
    fn waits_for_a_source_that_may_bring_an_earlier_row(
        #[case] caught_up: bool,
        #[case] idle: bool,
        #[case] expected: usize,
    ) {
        let mut synchroniser = Synchroniser::new(vec![None, None]);
        synchroniser.push(0, batch(&[10, 20], 0));
        assert_eq!(drain(&mut synchroniser, &[false, caught_up], &[false, idle]).len(), expected);
        assert_eq!(synchroniser.waiting(0), 2 - expected);
    }

    #[test]
    fn goes_on_only_as_far_as_the_others_have_rows() {
        let mut synchroniser = Synchroniser::new(vec![None, None]);
        synchroniser.push(0, batch(&[10, 20, 30], 0));
        synchroniser.push(1, batch(&[20], 7));
        assert_eq!(drain(&mut synchroniser, &[false; 2], &[false; 2]), [(0, 10), (0, 20), (1, 20)]);
        assert_eq!(synchroniser.next(), [Some(NextOffset(2)), Some(NextOffset(8))]);
    }

    #[test]
    fn positions_pass_records_that_left_no_row_only_when_nothing_waits_before_them() {
        let mut synchroniser = Synchroniser::new(vec![Some(NextOffset(5)), None]);
        let empty = |next, filtered| Prepared { next, filtered, ..Prepared::default() };
        assert_eq!(synchroniser.push(0, empty(8, 3)), Some(Finished { filtered: 3, dead: 0 }));
        assert_eq!(synchroniser.next()[0], Some(NextOffset(8)));
        synchroniser.push(0, batch(&[1, 2], 8));
        assert_eq!(synchroniser.push(0, empty(12, 2)), None);
        assert_eq!((synchroniser.next()[0], synchroniser.expected(0)), (Some(NextOffset(8)), Some(NextOffset(12))));
        assert_eq!(synchroniser.applied(0, 1), Finished::default());
        assert_eq!(synchroniser.next()[0], Some(NextOffset(9)));
        assert_eq!(synchroniser.applied(0, 1), Finished { filtered: 2, dead: 0 });
        assert_eq!(synchroniser.next()[0], Some(NextOffset(12)));
    }
}
