//! The older part of an exact window, as a stack of aggregates.
//!
//! An exact window is cut in two at some instant between its beginning and the newest event. What is newer is a running
//! aggregate that new events join. What is older is a stack: its lowest item holds the newest event before that instant,
//! each further item one event more, or one chunk more, and the top all. An event that drops out of the window takes its
//! item off; a chunk into which the window's beginning moves is replaced by its events. Once the beginning reaches the
//! instant, a new one is chosen half a window later, and all is added up again from the chunks.
//!
//! So each event is added to the running part once, to a stack once, and through its chunk twice more: no function has to
//! be undone, and the cost of an event does not depend on the window's length. The stack holds a copy of the lanes for each
//! event of one chunk and for each chunk of half a window.
//!
//! An event that comes out of order is added where it belongs to the running part. Where it belongs to the stack, the
//! stack is made anew: the event then lies more than about half a window behind the newest.

use super::ordered::{Chunk, ChunkCursor, Cursor, Piece, count_up_to};
use super::state::{Layout, WINDOW_HEAD};

/// The single events of a state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw<'a> {
    /// Before and after the chunks.
    pub rows: &'a [u64],
    pub chunks: &'a [Chunk],
    /// Time of the newest event.
    pub newest: i64,
    /// Time of the newest event that is no longer a single one; `i64::MIN` for none.
    pub merged: i64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// False before the first use, and after an event has come into the middle.
    valid: bool,
    /// Time of the newest event that has dropped out.
    edge: i64,
    /// The events after this instant are the running part's.
    middle: i64,
    /// The stack, flat: time of the oldest event of this item, time of the newest that is not in the item below, then lanes
    /// of all from the oldest to `middle`. As wide as a running window.
    pub items: Vec<u64>,
}

impl Tail {
    /// Whether events have dropped out that a window from `cut` on covers.
    #[inline]
    pub fn is_after(&self, cut: i64) -> bool {
        self.valid && cut < self.edge
    }

    /// The instant at which a window from `cut` on, of events up to `newest`, is cut in two anew, where it has to be. `running`
    /// is its newer part.
    pub fn next_middle(&self, cut: i64, newest: i64, running: &[u64]) -> Option<i64> {
        (!self.holds(cut, running)).then(|| middle(cut, newest))
    }

    fn holds(&self, cut: i64, running: &[u64]) -> bool {
        self.valid && (cut < self.middle || cut < running[1] as i64)
    }

    /// Learns of a new event at `time`.
    #[inline]
    pub fn disturb(&mut self, time: i64) {
        if self.edge < time && time <= self.middle {
            self.valid = false;
        }
    }

    /// Lets the window begin at `cut`, which is not before `edge`. `running` is its newer part.
    #[inline]
    pub fn follow(&mut self, layout: &Layout, raw: Raw<'_>, cut: i64, running: &mut [u64]) {
        if self.holds(cut, running) {
            while self.items.len() >= layout.window && self.top(layout)[0] as i64 <= cut {
                self.drop_oldest(layout, raw, cut);
            }
        } else {
            self.build(layout, raw, cut, running);
        }
    }

    /// Adds the stack's events to `lanes`, those of the running part.
    #[inline]
    pub fn unite_with(&self, layout: &Layout, lanes: &mut [u64]) {
        if !self.items.is_empty() {
            layout.lanes.unite(lanes, &self.top(layout)[WINDOW_HEAD..]);
        }
    }

    fn top(&self, layout: &Layout) -> &[u64] {
        &self.items[self.items.len() - layout.window..]
    }

    /// Takes off the top, of which at least the oldest event is not after `cut`.
    fn drop_oldest(&mut self, layout: &Layout, raw: Raw<'_>, cut: i64) {
        let last = self.top(layout)[1] as i64;
        self.items.truncate(self.items.len() - layout.window);
        self.edge = last;
        if last > cut {
            // The chunk is as it was when it was added: what changes it comes into the middle.
            let chunk = &raw.chunks[raw.chunks.partition_point(|chunk| chunk.last() < last)];
            let (old, new) = chunk.rows().split_at(layout.row * count_up_to(chunk.rows(), layout.row, cut));
            self.edge = old[old.len() - layout.row] as i64;
            new.chunks_exact(layout.row).rev().for_each(|row| self.add_row(layout, row));
        }
    }

    fn build(&mut self, layout: &Layout, raw: Raw<'_>, cut: i64, running: &mut [u64]) {
        self.valid = true;
        self.items.clear();
        self.middle = middle(cut, raw.newest);
        let mut rows = Cursor::up_to(raw.rows, layout.row, i64::MAX);
        let mut chunks = ChunkCursor::up_to(raw.chunks, layout.row, i64::MAX);
        let (head, sum) = running.split_at_mut(WINDOW_HEAD);
        let mut oldest = i64::MAX;
        layout.lanes.clear(sum);
        while let Some(row) = rows.after(self.middle) {
            oldest = oldest.min(row[0] as i64);
            layout.lanes.add_earlier(sum, row);
        }
        chunks.fold(&layout.lanes, self.middle, sum, &mut oldest);
        (head[0], head[1]) = (self.middle as u64, oldest as u64);
        // Some rows are newer than all chunks, the others older.
        loop {
            let row = if rows.peek() > chunks.peek() { rows.after(cut).map(Piece::Row) } else { chunks.after(cut) };
            match row {
                Some(Piece::Row(row)) => self.add_row(layout, row),
                Some(Piece::Chunk(chunk)) => {
                    let lanes = self.add_item(layout, chunk.first(), chunk.last());
                    layout.lanes.unite(lanes, &chunk.lanes);
                }
                None => break,
            }
        }
        self.edge = rows.peek().max(chunks.peek()).max(raw.merged);
    }

    fn add_row(&mut self, layout: &Layout, row: &[u64]) {
        let time = row[0] as i64;
        let lanes = self.add_item(layout, time, time);
        layout.lanes.add_earlier(lanes, row);
    }

    /// Adds an item with the events of the one below it, and returns its lanes.
    fn add_item(&mut self, layout: &Layout, first: i64, last: i64) -> &mut [u64] {
        let below = self.items.len();
        if below == 0 {
            self.items.resize(layout.window, 0);
            layout.lanes.clear(&mut self.items[WINDOW_HEAD..]);
        } else {
            self.items.extend_from_within(below - layout.window..);
        }
        let item = &mut self.items[below..];
        (item[0], item[1]) = (first as u64, last as u64);
        &mut item[WINDOW_HEAD..]
    }
}

/// Where a window from `cut` to `newest` is cut in two.
pub(super) fn middle(cut: i64, newest: i64) -> i64 {
    cut.saturating_add((newest.saturating_sub(cut) / 2).max(0))
}
