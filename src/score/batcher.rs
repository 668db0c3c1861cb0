//! The micro-batcher: what waits, and when it closes. A state machine without a clock: instants come from outside.

use std::time::{Duration, Instant};

use crate::config::plan::ScorePlan;

/// Why a batch closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// It holds as many rows as one batch may.
    Rows,
    /// It holds as many bytes as one batch may.
    Bytes,
    /// Its first row has waited long enough.
    Linger,
    /// A checkpoint is due, and it needs all that was applied to be committed.
    Checkpoint,
    /// Nothing more will come.
    Shutdown,
}

impl CloseReason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Rows, Self::Bytes, Self::Linger, Self::Checkpoint, Self::Shutdown];

    /// Fixed word for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Bytes => "bytes",
            Self::Linger => "linger",
            Self::Checkpoint => "checkpoint",
            Self::Shutdown => "shutdown",
        }
    }
}

/// When a batch closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// At this many rows, …
    pub rows: usize,
    /// … at this many bytes, …
    pub bytes: usize,
    /// … or this long after its first item.
    pub wait: Duration,
}

impl BatchLimits {
    /// The limits of a pipeline.
    pub fn of(plan: &ScorePlan) -> Self {
        Self { rows: plan.batch_rows, bytes: plan.batch_bytes, wait: plan.batch_wait }
    }
}

/// A closed batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed<T> {
    /// Why.
    pub reason: CloseReason,
    /// What waited, in the order it came.
    pub items: Vec<T>,
    /// Rows of all items.
    pub rows: usize,
    /// Bytes of all items.
    pub bytes: usize,
}

/// Collects items until a limit is reached. An item is never split: a batch goes beyond a limit by its last item at most.
#[derive(Debug)]
pub struct Batcher<T> {
    limits: BatchLimits,
    items: Vec<Item<T>>,
    rows: usize,
    bytes: usize,
    /// When the first item came.
    since: Option<Instant>,
}

#[derive(Debug)]
struct Item<T> {
    value: T,
    rows: usize,
    bytes: usize,
}

impl<T> Batcher<T> {
    /// An empty batcher.
    pub fn new(limits: BatchLimits) -> Self {
        Self { limits, items: Vec::new(), rows: 0, bytes: 0, since: None }
    }

    /// Closes batches by other limits from now on, what waits among them.
    pub fn limit(&mut self, limits: BatchLimits) {
        self.limits = limits;
    }

    /// Adds an item that came at `now`, and closes the batch where that fills it. Where rows and bytes fill it at once, the
    /// reason is rows.
    pub fn push(&mut self, value: T, rows: usize, bytes: usize, now: Instant) -> Option<Closed<T>> {
        self.items.push(Item { value, rows, bytes });
        self.rows += rows;
        self.bytes = self.bytes.saturating_add(bytes);
        self.since.get_or_insert(now);
        self.full()
    }

    fn full(&mut self) -> Option<Closed<T>> {
        if self.rows >= self.limits.rows {
            self.close(CloseReason::Rows)
        } else if self.bytes >= self.limits.bytes {
            self.close(CloseReason::Bytes)
        } else {
            None
        }
    }

    /// Closes the batch where its first item has waited long enough at `now`, or it is full by limits that came since.
    pub fn poll(&mut self, now: Instant) -> Option<Closed<T>> {
        self.full().or_else(|| match self.deadline() {
            Some(deadline) if now >= deadline => self.close(CloseReason::Linger),
            _ => None,
        })
    }

    /// Closes what waits, because a checkpoint is due.
    pub fn checkpoint(&mut self) -> Option<Closed<T>> {
        self.close(CloseReason::Checkpoint)
    }

    /// Closes what waits, because nothing more will come.
    pub fn shut_down(&mut self) -> Option<Closed<T>> {
        self.close(CloseReason::Shutdown)
    }

    /// Gives up what does not satisfy `keep`, as if it had never come: its source will bring it again. The deadline stays
    /// for as long as anything waits.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.items.retain(|item| keep(&item.value));
        self.rows = self.items.iter().map(|item| item.rows).sum();
        self.bytes = self.items.iter().map(|item| item.bytes).sum();
        if self.items.is_empty() {
            self.since = None;
        }
    }

    /// When [`Batcher::poll`] will close the batch; nothing where nothing waits.
    pub fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + self.limits.wait)
    }

    /// Rows that wait.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// True where nothing waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn close(&mut self, reason: CloseReason) -> Option<Closed<T>> {
        self.since = None;
        let (rows, bytes) = (std::mem::take(&mut self.rows), std::mem::take(&mut self.bytes));
        let items: Vec<T> = self.items.drain(..).map(|item| item.value).collect();
        (!items.is_empty()).then_some(Closed { reason, items, rows, bytes })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;
    use crate::runtime::clock::monotonic;

    const LIMITS: BatchLimits = BatchLimits { rows: 10, bytes: 1000, wait: Duration::from_millis(5) };

    #[rstest]
    #[case::one_row_short(9, 1, None)]
    #[case::rows(10, 1, Some(CloseReason::Rows))]
    #[case::more_rows_than_fit(25, 1, Some(CloseReason::Rows))]
    #[case::one_byte_short(1, 999, None)]
    #[case::bytes(1, 1000, Some(CloseReason::Bytes))]
    #[case::both(10, 1000, Some(CloseReason::Rows))]
    #[case::nothing_in_it(0, 0, None)]
    fn an_item_closes_a_batch_for_its_size(
        #[case] rows: usize,
        #[case] bytes: usize,
        #[case] expected: Option<CloseReason>,
    ) {
        let closed = Batcher::new(LIMITS).push('a', rows, bytes, monotonic());
        assert_eq!(closed.map(|closed| closed.reason), expected);
    }

    #[rstest]
    #[case::before(4, false)]
    #[case::at(5, true)]
    #[case::after(6, true)]
    fn the_first_item_sets_the_deadline(#[case] after: u64, #[case] closes: bool) {
        let start = monotonic();
        let mut batcher = Batcher::new(LIMITS);
        assert_eq!(batcher.deadline(), None);
        batcher.push('a', 1, 1, start);
        batcher.push('b', 1, 1, start + Duration::from_millis(3));
        assert_eq!(batcher.deadline(), Some(start + LIMITS.wait));
        let closed = batcher.poll(start + Duration::from_millis(after));
        let expected = Closed { reason: CloseReason::Linger, items: vec!['a', 'b'], rows: 2, bytes: 2 };
        assert_eq!(closed, closes.then_some(expected));
    }

    #[test]
    fn limits_that_come_later_count_for_what_waits() {
        let start = monotonic();
        let mut batcher = Batcher::new(LIMITS);
        batcher.push('a', 5, 1, start);
        batcher.limit(BatchLimits { rows: 100, wait: Duration::from_millis(50), ..LIMITS });
        assert_eq!(batcher.deadline(), Some(start + Duration::from_millis(50)));
        assert_eq!(batcher.push('b', 15, 1, start + Duration::from_millis(20)), None);
        assert_eq!(batcher.poll(start + Duration::from_millis(20)), None);
        batcher.limit(LIMITS);
        let expected = Closed { reason: CloseReason::Rows, items: vec!['a', 'b'], rows: 20, bytes: 2 };
        assert_eq!(batcher.poll(start), Some(expected));
    }

    #[test]
    fn an_empty_batch_never_closes() {
        let mut batcher = Batcher::<()>::new(LIMITS);
        assert_eq!(batcher.poll(monotonic() + Duration::from_secs(60)), None);
        assert_eq!(batcher.shut_down(), None);
    }

    #[test]
    fn what_is_given_up_does_not_come_back_and_what_stays_counts_on() {
        let start = monotonic();
        let mut batcher = Batcher::new(LIMITS);
        batcher.push('a', 5, 600, start);
        batcher.push('b', 4, 300, start);
        batcher.retain(|item| *item == 'b');
        assert_eq!((batcher.rows(), batcher.deadline()), (4, Some(start + LIMITS.wait)));
        assert_eq!(batcher.push('c', 5, 600, start), None, "9 rows and 900 bytes");
        let expected = Closed { reason: CloseReason::Rows, items: vec!['b', 'c', 'd'], rows: 10, bytes: 901 };
        assert_eq!(batcher.push('d', 1, 1, start), Some(expected));

        batcher.push('e', 9, 1, start);
        batcher.retain(|_| false);
        assert!(batcher.is_empty() && batcher.deadline().is_none());
        assert_eq!(batcher.push('f', 9, 1, start), None);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push { rows: usize, bytes: usize },
        Wait { millis: u64 },
        Checkpoint,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let push = (0_usize..15, 0_usize..1500).prop_map(|(rows, bytes)| Step::Push { rows, bytes });
        let wait = (0_u64..8).prop_map(|millis| Step::Wait { millis });
        prop::collection::vec(prop_oneof![4 => push, 4 => wait, 1 => Just(Step::Checkpoint)], 0..60)
    }

    proptest! {
        #[test]
        fn every_item_leaves_once_in_order_and_in_time(steps in steps()) {
            let mut now = monotonic();
            let mut batcher = Batcher::new(LIMITS);
            let (mut pushed, mut closed) = (Vec::new(), Vec::new());
            for step in steps {
                let out = match step {
                    Step::Push { rows, bytes } => {
                        let id = pushed.len();
                        pushed.push((id, rows, bytes, now));
                        batcher.push((id, now), rows, bytes, now)
                    }
                    Step::Wait { millis } => {
                        // A caller that waits no longer than the deadline closes no batch late.
                        let until = now + Duration::from_millis(millis);
                        now = batcher.deadline().map_or(until, |deadline| until.min(deadline));
                        batcher.poll(now)
                    }
                    Step::Checkpoint => batcher.checkpoint(),
                };
                closed.extend(out.map(|batch| (batch, now)));
            }
            closed.extend(batcher.shut_down().map(|batch| (batch, now)));

            let left: Vec<usize> = closed.iter().flat_map(|(batch, _)| batch.items.iter().map(|(id, _)| *id)).collect();
            prop_assert_eq!(left, (0..pushed.len()).collect::<Vec<_>>());
            for (batch, at) in &closed {
                let rows: Vec<usize> = batch.items.iter().map(|(id, _)| pushed[*id].1).collect();
                let bytes: usize = batch.items.iter().map(|(id, _)| pushed[*id].2).sum();
                prop_assert_eq!(batch.rows, rows.iter().sum::<usize>());
                prop_assert_eq!(batch.bytes, bytes);
                // Without its last item no batch was full.
                prop_assert!(batch.rows - rows[rows.len() - 1] < LIMITS.rows);
                prop_assert!(*at <= batch.items[0].1 + LIMITS.wait);
                match batch.reason {
                    CloseReason::Rows => prop_assert!(batch.rows >= LIMITS.rows),
                    CloseReason::Bytes => prop_assert!(batch.rows < LIMITS.rows && batch.bytes >= LIMITS.bytes),
                    CloseReason::Linger => prop_assert_eq!(*at, batch.items[0].1 + LIMITS.wait),
                    CloseReason::Checkpoint | CloseReason::Shutdown => prop_assert!(batch.rows < LIMITS.rows && batch.bytes < LIMITS.bytes),
                }
            }
        }
    }
}
