//! Rows that are held until the watermark has passed them: `emit = "event_time"`.
//!
//! A row is let go once no row before it can still come: its event time lies before the watermarks of all sources that are
//! not idle. Rows are let go in the order of (event time, source, offset), where the source is keyed anew by partition and
//! offset before, so that what is computed from them does not
//! depend on the order in which they arrived within their sources' bounds.
//!
//! What is let go is no prefix of the log. It is known all the same from one offset a source and one instant, the
//! *frontier*: of the rows below the offset, those up to the frontier are applied and those after it are held. An instant
//! is let go whole, and a row that comes when the frontier has passed it (its source was idle) goes at once, so that this
//! holds whenever a call of [`Task::advance`](super::Task::advance) has returned. A checkpoint thus names the first held
//! offset to go on from and says which of the rows from there on are in the state already.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::synchroniser::Prepared;
use super::watermark::SourceTime;
use super::{Counts, Late};
use crate::broker::NextOffset;

/// See the module.
#[derive(Debug)]
pub(super) struct Held {
    queues: Vec<Queue>,
    waiting: BinaryHeap<Reverse<Place>>,
    /// All rows up to this instant are let go, of those that were offered.
    frontier: i64,
    /// Nothing more will come: everything is let go.
    ended: bool,
    /// More could be let go than the last call was allowed to.
    more: bool,
    /// What was held when the state was saved is not all read again yet.
    resuming: bool,
    /// What was published before the restoration, of the sources of which anything was.
    published: Vec<Published>,
    /// Late rows that are still to be told.
    pub late: Vec<Late>,
}

/// Of the rows of `source` below `offset`, those up to `frontier` are published, and none after it.
#[derive(Debug, Clone, Copy)]
struct Published {
    source: usize,
    offset: NextOffset,
    frontier: i64,
    /// A row from `offset` on has come that is not after `frontier`: the frontier had passed it.
    passed: bool,
}

/// A held row. Ordered as rows are let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    time: i64,
    source: usize,
    /// Partition and offset before it was keyed anew; elsewhere its offset alone.
    origin: (i32, i64),
    offset: i64,
    batch: u64,
    row: usize,
}

#[derive(Debug)]
struct Queue {
    batches: VecDeque<Batch>,
    /// Number of the first of them.
    first: u64,
    rows: usize,
    /// All before was offered.
    offered: Option<NextOffset>,
    /// As of the last output.
    standing: Standing,
    /// Of the rows below this offset, those up to this instant are in the state that was restored.
    restored: (i64, i64),
    /// Where reading goes on after the restoration.
    resumed: Standing,
}

/// Where a source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    /// First offset that is left.
    pub next: Option<NextOffset>,
    /// Highest event time among the accepted rows before it.
    pub newest: Option<i64>,
}

#[derive(Debug)]
struct Batch {
    rows: Prepared,
    /// For each row that is held: the highest event time before it.
    held: Vec<Option<Option<i64>>>,
    /// The first row that is held.
    cursor: usize,
}

impl Held {
    /// Nothing, of sources that stand at these positions.
    pub fn new(positions: &[Option<NextOffset>]) -> Self {
        let queue = |&next: &Option<NextOffset>| Queue {
            batches: VecDeque::new(),
            first: 0,
            rows: 0,
            offered: next,
            standing: Standing { next, newest: None },
            restored: (i64::MIN, i64::MIN),
            resumed: Standing { next, newest: None },
        };
        Self {
            queues: positions.iter().map(queue).collect(),
            waiting: BinaryHeap::new(),
            frontier: i64::MIN,
            ended: false,
            more: false,
            resuming: false,
            published: Vec::new(),
            late: Vec::new(),
        }
    }

    /// Goes on from a snapshot: of the rows of each source below `read`, those up to `frontier` are in the state. Reading
    /// goes on at `resumed`, and nothing is let go before it has come to `read` again.
    pub fn restore(&mut self, frontier: i64, sources: impl Iterator<Item = (Option<NextOffset>, Standing)>) {
        self.frontier = frontier;
        self.resuming = true;
        for (queue, (read, resumed)) in self.queues.iter_mut().zip(sources) {
            queue.restored = (read.map_or(i64::MIN, |NextOffset(read)| read), frontier);
            queue.standing.next = read;
            queue.resumed = resumed;
        }
    }

    /// Says what was published before, so that one offset and one frontier go on telling it: nothing after the frontier is
    /// let go before the offset is read again, and what comes from then on is let go at once where it is not after it.
    pub fn resume(&mut self, source: usize, offset: NextOffset, frontier: i64) {
        self.published.push(Published { source, offset, frontier, passed: false });
    }

    /// The least offset that the next batch of a source may start with.
    pub fn expected(&self, source: usize) -> Option<NextOffset> {
        self.queues[source].offered
    }

    /// Takes a batch. Late rows are told and counted; so is what left no row.
    pub fn push(&mut self, source: usize, rows: Prepared, clock: &mut SourceTime, counts: &mut Counts) -> Vec<Late> {
        let queue = &mut self.queues[source];
        let batch = queue.first + queue.batches.len() as u64;
        let (mut held, mut late) = (Vec::with_capacity(rows.times.len()), Vec::new());
        for (row, (&time, &offset)) in rows.times.iter().zip(&rows.offsets).enumerate() {
            let before = clock.newest;
            let again = offset < queue.restored.0;
            let (is_late, origin) = match &rows.origins {
                // The clock is that of the slowest partition before: it follows marks. What was held is not late now.
                Some(origins) => (clock.is_late(source, offset, time).filter(|_| !again), origins[row]),
                None => (clock.late(source, offset, time), (0, offset)),
            };
            let known = again && time <= queue.restored.1;
            let waits = is_late.is_none() && !known;
            late.extend(is_late);
            for published in self.published.iter_mut().filter(|published| published.source == source) {
                published.passed |= offset >= published.offset.0 && time <= published.frontier;
            }
            held.push(waits.then_some(before));
            if waits {
                queue.rows += 1;
                self.waiting.push(Reverse(Place { time, source, origin, offset, batch, row }));
            }
        }
        let missed = late.len() as u64;
        counts.read += rows.filtered + rows.dead + missed;
        counts.filtered += rows.filtered;
        counts.dead += rows.dead;
        counts.late += missed;
        self.late.extend_from_slice(&late);
        queue.offered = Some(NextOffset(rows.next));
        queue.batches.push_back(Batch { rows, held, cursor: 0 });
        queue.drop_done();
        late
    }

    /// Lets go everything at the next call of [`Held::release`], as if the watermark had passed it.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Lets go the rows before `watermark`: all of an instant or none, and no further instant after `limit` rows. One batch
    /// a source, each in order. `caught_up` and `widths`, the words of a row, are by source.
    pub fn release(
        &mut self,
        watermark: Option<i64>,
        limit: usize,
        caught_up: &[bool],
        widths: &[usize],
    ) -> Vec<Prepared> {
        let mut released: Vec<Prepared> = self.queues.iter().map(|_| Prepared::default()).collect();
        // Records that have expired since are not waited for.
        let again = |(queue, &caught_up): (&Queue, &bool)| caught_up || queue.offered >= queue.standing.next;
        if self.resuming && !self.queues.iter().zip(caught_up).all(again) {
            return released;
        }
        self.resuming = false;
        let (mut watermark, mut ended) = (watermark, self.ended);
        // Up to here no limit holds: it is told as let go already.
        let mut at_least = self.frontier;
        let end = |published: &Published| Some(published.frontier.saturating_add(1));
        for published in self.published.iter().filter(|published| published.passed) {
            watermark = watermark.max(end(published));
            at_least = at_least.max(published.frontier);
        }
        let unread =
            |p: &&Published| !p.passed && !caught_up[p.source] && self.queues[p.source].offered < Some(p.offset);
        for published in self.published.iter().filter(unread) {
            (watermark, ended) = (watermark.min(end(published)), false);
        }
        let mut count = 0;
        let mut last = self.frontier;
        self.more = false;
        while let Some(&Reverse(place)) = self.waiting.peek() {
            if place.time > last {
                if !ended && watermark.is_none_or(|watermark| place.time >= watermark) {
                    break;
                }
                if count >= limit && place.time > at_least {
                    self.more = true;
                    break;
                }
                last = place.time;
            }
            self.waiting.pop();
            count += 1;
            self.queues[place.source].take(place, widths[place.source], &mut released[place.source]);
        }
        if !self.more {
            self.ended &= !ended;
            last = last.max(watermark.map_or(i64::MIN, |watermark| watermark.saturating_sub(1)));
        }
        self.frontier = last;
        self.queues.iter_mut().for_each(Queue::drop_done);
        released
    }

    /// Notes that all that was let go is applied. `clocks` are the sources' as of the last row offered.
    pub fn settle(&mut self, clocks: &[SourceTime]) {
        if self.resuming {
            return;
        }
        for (queue, clock) in self.queues.iter_mut().zip(clocks) {
            queue.standing = Standing { next: queue.offered, newest: clock.newest };
        }
    }

    /// True where what was held before the restoration is not all read again yet.
    pub fn is_resuming(&self) -> bool {
        self.resuming
    }

    /// More could be let go at once.
    pub fn more(&self) -> bool {
        self.more
    }

    /// All rows up to this instant are let go, of those below [`Held::read`]; `None` before the first.
    pub fn frontier(&self) -> Option<i64> {
        (self.frontier != i64::MIN).then_some(self.frontier)
    }

    /// The offset after the last row that is applied or held, as of the last output.
    pub fn read(&self) -> Vec<Option<NextOffset>> {
        self.queues.iter().map(|queue| queue.standing.next).collect()
    }

    /// Where a restored task has to go on reading, by source: at the first row that is held.
    pub fn left(&self) -> Vec<Standing> {
        self.queues.iter().map(|queue| if self.resuming { queue.resumed } else { queue.left() }).collect()
    }

    /// Held rows of a source.
    pub fn waiting(&self, source: usize) -> usize {
        self.queues[source].rows
    }

    /// Bytes of what is held.
    pub fn bytes(&self) -> usize {
        let batch = |batch: &Batch| batch.rows.bytes() + size_of::<Option<Option<i64>>>() * batch.held.capacity();
        let batches: usize = self.queues.iter().flat_map(|queue| &queue.batches).map(batch).sum();
        batches + size_of::<Place>() * self.waiting.capacity()
    }

    /// Calls `change` with all flat rows of a source that are held.
    pub fn for_each_batch(&mut self, source: usize, mut change: impl FnMut(&mut [u64])) {
        self.queues[source].batches.iter_mut().for_each(|batch| change(&mut batch.rows.rows));
    }
}

impl Queue {
    /// Moves a row.
    fn take(&mut self, place: Place, width: usize, to: &mut Prepared) {
        let index = usize::try_from(place.batch - self.first).expect("a held row's batch is in memory");
        let batch = &mut self.batches[index];
        batch.held[place.row] = None;
        self.rows -= 1;
        to.times.push(place.time);
        to.offsets.push(place.offset);
        to.rows.extend_from_slice(&batch.rows.rows[place.row * width..][..width]);
        to.keys.push(batch.rows.keys.get(place.row));
        to.next = to.next.max(place.offset + 1);
    }

    /// Forgets batches of which nothing is held.
    fn drop_done(&mut self) {
        while let Some(batch) = self.batches.front_mut() {
            batch.cursor += batch.held[batch.cursor..].iter().take_while(|held| held.is_none()).count();
            if batch.cursor < batch.held.len() {
                return;
            }
            self.batches.pop_front();
            self.first += 1;
        }
    }

    fn left(&self) -> Standing {
        let held = self.batches.front().map(|batch| Standing {
            next: Some(NextOffset(batch.rows.offsets[batch.cursor])),
            newest: batch.held[batch.cursor].expect("the cursor is at a row that is held"),
        });
        // What was offered since the last output is not told yet, so it has to be read again.
        held.filter(|held| held.next < self.standing.next).unwrap_or(self.standing)
    }
}
