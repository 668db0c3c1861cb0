//! What is published of the source whose events ask for rows.

use super::Task;
use crate::broker::NextOffset;

/// The rows of the asking source below an offset; where they were applied in event-time order, only those up to an instant:
/// those after it were held when the offset was committed. Offset and instant are committed together with the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// The committed offset.
    pub next: NextOffset,
    /// The instant, ms, inclusive. `None` where rows were applied as they arrived: then all below `next` are published.
    pub frontier: Option<i64>,
}

impl Published {
    /// True where the row of the event at `offset` is published.
    pub fn has(&self, offset: i64, event_time: i64) -> bool {
        offset < self.next.0 && self.frontier.is_none_or(|frontier| event_time <= frontier)
    }

    /// What is published once all rows are that `task` has given so far, where that is more. `source` is the asking one.
    pub fn after(&self, task: &Task, source: usize) -> Option<Self> {
        let next = task.settled()[source]?;
        let mut frontier = None;
        if task.is_in_event_time() {
            // Before the first row is let go all are held: that has to be said, too.
            frontier = Some(task.frontier().unwrap_or(i64::MIN)).max(self.frontier);
        }
        // The frontier alone moves where a source was idle, or at the end.
        let moved = next == self.next && self.frontier.is_some() && frontier > self.frontier;
        (next > self.next || moved).then_some(Self { next, frontier })
    }
}
