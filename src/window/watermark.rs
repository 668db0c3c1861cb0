//! Event time of a task: what is late, what is settled.

use super::engine::Source;
use super::{Late, TaskClock};

/// Event time of one source's partition. Depends on its log alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SourceTime {
    /// Highest event time so far.
    pub newest: Option<i64>,
    out_of_order: i64,
    /// Rows behind the watermark count all the same: they are a table's.
    takes_late: bool,
}

impl SourceTime {
    pub(super) fn of(source: &Source) -> Self {
        Self { takes_late: source.table.is_some(), ..Self::new(source.out_of_order_ms, None) }
    }

    /// Of events that may be out of order by so many milliseconds, of which the newest so far is of this time.
    pub fn new(out_of_order: i64, newest: Option<i64>) -> Self {
        Self { newest, out_of_order, takes_late: false }
    }

    /// Of rows that are applied in event-time order. Rows of a table that are late count, too, out of order.
    pub(super) fn in_order(source: &Source) -> Self {
        let out_of_order = if source.table.is_some() { source.out_of_order_ms } else { 0 };
        Self { out_of_order, ..Self::of(source) }
    }

    /// No event before this instant is accepted any more.
    #[inline]
    pub fn watermark(&self) -> Option<i64> {
        self.newest.map(|newest| newest.saturating_sub(self.out_of_order))
    }

    /// Takes the next row: `Err` with the watermark if it is late. Late rows move nothing.
    #[inline]
    pub fn observe(&mut self, event_time: i64) -> Result<(), i64> {
        match self.watermark() {
            Some(watermark) if event_time < watermark && !self.takes_late => Err(watermark),
            _ => {
                self.newest = Some(self.newest.map_or(event_time, |newest| newest.max(event_time)));
                Ok(())
            }
        }
    }

    /// Takes a row that was not late when it was offered, in event-time order. `watermark` is the source's as of the last row
    /// offered: rows beyond it are taken only where the end was told, and then an earlier one may still come.
    #[inline]
    pub fn pass(&mut self, event_time: i64, watermark: Option<i64>) {
        self.newest = self.newest.max(watermark.map(|watermark| watermark.min(event_time)));
    }

    /// As [`SourceTime::observe`], telling the late row.
    pub fn late(&mut self, source: usize, offset: i64, event_time: i64) -> Option<Late> {
        self.observe(event_time).err().map(|watermark| Late { source, offset, event_time, watermark })
    }

    /// Tells a late row, and takes none.
    pub fn is_late(&self, source: usize, offset: i64, event_time: i64) -> Option<Late> {
        let watermark = self.watermark().filter(|watermark| event_time < *watermark)?;
        Some(Late { source, offset, event_time, watermark })
    }
}

/// Event time of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TaskTime {
    pub sources: Vec<SourceTime>,
    idle: Vec<bool>,
    /// The source whose events ask for rows.
    on: Option<usize>,
    /// Rows will be asked for as of this instant and later. Without `on`, `i64::MAX`: only as of the entities' newest events.
    pub settled: i64,
    /// Least watermark of the sources that are not idle, once each has one. Never goes back.
    pub watermark: Option<i64>,
}

impl TaskTime {
    pub fn new(sources: Vec<SourceTime>, on: Option<usize>) -> Self {
        let settled = if on.is_some() { i64::MIN } else { i64::MAX };
        Self { idle: vec![false; sources.len()], sources, on, settled, watermark: None }
    }

    /// Learns which sources are idle.
    pub fn update(&mut self, clock: &TaskClock<'_>) {
        self.idle.copy_from_slice(clock.idle);
        self.refresh();
    }

    /// Follows the watermark of `source`, which has taken a row.
    #[inline]
    pub fn follow(&mut self, source: usize) {
        if self.on == Some(source) {
            self.settled = self.settled.max(self.sources[source].watermark().unwrap_or(i64::MIN));
        }
        if self.sources.len() == 1 {
            self.watermark = self.sources[0].watermark();
        } else {
            self.refresh();
        }
    }

    fn refresh(&mut self) {
        if let Some(least) = self.least() {
            self.watermark = Some(self.watermark.map_or(least, |watermark| watermark.max(least)));
            // While the asking source is idle it is taken to be where the others are.
            if self.on.is_some_and(|on| self.idle[on]) {
                self.settled = self.settled.max(least);
            }
        }
    }

    /// Least watermark of the sources that are not idle; `None` where one of them has none, or all are idle.
    fn least(&self) -> Option<i64> {
        self.least_of(&self.sources)
    }

    fn least_of(&self, sources: &[SourceTime]) -> Option<i64> {
        let mut active = sources.iter().zip(&self.idle).filter(|(_, idle)| !**idle);
        active.try_fold(None, |least: Option<i64>, (source, _)| {
            let watermark = source.watermark()?;
            Some(Some(least.map_or(watermark, |least| least.min(watermark))))
        })?
    }

    /// What has passed of sources that stand at `offered`, where applied rows are behind: the least watermark of those that
    /// are not idle; where all are idle, and none holds back another, the greatest.
    pub fn passed(&self, offered: &[SourceTime]) -> Option<i64> {
        if self.idle.iter().all(|&idle| idle) {
            return offered.iter().filter_map(SourceTime::watermark).max();
        }
        self.least_of(offered)
    }

    /// No event will come, and no row be asked for, before this instant: what an entity that is quiet since before it needs.
    pub fn quiet(&self) -> i64 {
        self.watermark.map_or(i64::MIN, |watermark| watermark.min(self.settled))
    }
}
