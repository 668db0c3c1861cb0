//! Collections of events in the order of event time: flat items whose first word is a time, and chunks of them.

use std::sync::Arc;

use super::aggregate::Lanes;
use super::cold::Block;

/// A run of single events, ascending by time, and their aggregate.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Nothing while they are on disk alone.
    rows: Vec<u64>,
    pub lanes: Box<[u64]>,
    first: i64,
    last: i64,
    /// Where they are on disk, as they are.
    block: Option<Arc<Block>>,
    /// They came, or came back, since [`Chunk::rest`] was last called.
    used: bool,
}

impl Chunk {
    pub fn new(lanes: &Lanes, width: usize, rows: Vec<u64>) -> Self {
        let mut sum = vec![0; lanes.width()].into_boxed_slice();
        lanes.clear(&mut sum);
        rows.chunks_exact(width).for_each(|row| lanes.add_later(&mut sum, row));
        let (first, last) = (rows[0] as i64, rows[rows.len() - width] as i64);
        Self { rows, lanes: sum, first, last, block: None, used: true }
    }

    /// Of events that are on disk.
    pub fn on_disk(first: i64, last: i64, lanes: Box<[u64]>, block: Arc<Block>) -> Self {
        Self { rows: Vec::new(), lanes, first, last, block: Some(block), used: false }
    }

    pub fn first(&self) -> i64 {
        self.first
    }

    pub fn last(&self) -> i64 {
        self.last
    }

    /// The events, which are in memory.
    pub fn rows(&self) -> &[u64] {
        assert!(!self.is_out(), "events are brought back before they are read: see State::missing");
        &self.rows
    }

    /// The events, where they are in memory, to give texts other numbers; else nothing.
    pub fn rows_to_renumber(&mut self) -> &mut [u64] {
        &mut self.rows
    }

    /// The events; nothing where they are not in memory.
    pub fn into_rows(self) -> Vec<u64> {
        self.rows
    }

    /// Inserts an event at or before the last one.
    pub fn insert(&mut self, lanes: &Lanes, width: usize, row: &[u64]) {
        assert!(!self.is_out(), "events are brought back before they change: see State::missing_at");
        insert_sorted(&mut self.rows, width, row);
        lanes.add_later(&mut self.lanes, row);
        self.first = self.rows[0] as i64;
        (self.block, self.used) = (None, true);
    }

    /// True where the events are on disk alone.
    pub fn is_out(&self) -> bool {
        self.rows.is_empty()
    }

    /// Where the events are on disk, as they are.
    pub fn block(&self) -> Option<&Arc<Block>> {
        self.block.as_ref()
    }

    /// Whether the events were of use since the last call.
    pub fn rest(&mut self) -> bool {
        std::mem::take(&mut self.used)
    }

    /// Drops the events, which are in this block.
    pub fn put_out(&mut self, block: Arc<Block>) {
        self.block = Some(block);
        self.rows = Vec::new();
    }

    /// Takes back the events of its block.
    pub fn bring_back(&mut self, rows: Vec<u64>) {
        (self.rows, self.used) = (rows, true);
    }

    pub fn bytes(&self) -> usize {
        8 * (self.rows.capacity() + self.lanes.len())
    }
}

/// Items of a flat collection from the newest to the oldest. The first word of each is its time.
pub(super) struct Cursor<'a> {
    items: &'a [u64],
    width: usize,
}

impl<'a> Cursor<'a> {
    /// Leaves out the items after `as_of`.
    #[inline]
    pub fn up_to(items: &'a [u64], width: usize, as_of: i64) -> Self {
        if items.len() >= width && items[items.len() - width] as i64 > as_of {
            return Self { items: &items[..width * count_up_to(items, width, as_of)], width };
        }
        Self { items, width }
    }

    /// The next item, if it is after `cut`.
    #[inline]
    pub fn after(&mut self, cut: i64) -> Option<&'a [u64]> {
        let at = self.items.len().checked_sub(self.width)?;
        let (before, item) = self.items.split_at(at);
        if item[0] as i64 <= cut {
            return None;
        }
        self.items = before;
        Some(item)
    }

    /// Time of the next item, `i64::MIN` for none.
    #[inline]
    pub fn peek(&self) -> i64 {
        self.items.len().checked_sub(self.width).map_or(i64::MIN, |at| self.items[at] as i64)
    }
}

/// A step of a [`ChunkCursor`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Piece<'a> {
    /// A single event.
    Row(&'a [u64]),
    /// All events of a chunk.
    Chunk(&'a Chunk),
}

/// Chunks from the newest to the oldest, whole where a window covers them.
pub(super) struct ChunkCursor<'a> {
    chunks: &'a [Chunk],
    /// What is left of the chunk after `chunks`, where some of it was taken.
    open: Cursor<'a>,
}

impl<'a> ChunkCursor<'a> {
    pub fn up_to(chunks: &'a [Chunk], width: usize, as_of: i64) -> Self {
        let whole = chunks.partition_point(|chunk| chunk.last <= as_of);
        let open = chunks.get(whole).filter(|chunk| chunk.first <= as_of).map_or(&[][..], Chunk::rows);
        Self { chunks: &chunks[..whole], open: Cursor::up_to(open, width, as_of) }
    }

    /// The next event or whole chunk, if all of it is after `cut`; of a chunk that is so in part, the events that are.
    pub fn after(&mut self, cut: i64) -> Option<Piece<'a>> {
        if let Some(row) = self.open.after(cut) {
            return Some(Piece::Row(row));
        }
        let (last, before) = self.chunks.split_last()?;
        if !self.open.items.is_empty() || last.last <= cut {
            return None;
        }
        self.chunks = before;
        if last.first() > cut {
            return Some(Piece::Chunk(last));
        }
        self.open = Cursor { items: last.rows(), width: self.open.width };
        self.open.after(cut).map(Piece::Row)
    }

    /// Adds the events after `cut` to `sum`; `tail` becomes the time of the oldest.
    pub fn fold(&mut self, lanes: &Lanes, cut: i64, sum: &mut [u64], tail: &mut i64) {
        while let Some(piece) = self.after(cut) {
            match piece {
                Piece::Row(row) => {
                    *tail = (*tail).min(row[0] as i64);
                    lanes.add_earlier(sum, row);
                }
                Piece::Chunk(chunk) => {
                    *tail = (*tail).min(chunk.first());
                    lanes.unite(sum, &chunk.lanes);
                }
            }
        }
    }

    /// Time of the next event, `i64::MIN` for none.
    pub fn peek(&self) -> i64 {
        self.open.peek().max(self.chunks.last().map_or(i64::MIN, Chunk::last))
    }
}

/// Rows of chunks, one slice a chunk; nothing for those that are not in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChunkRows<'a>(pub &'a [Chunk]);

impl<'a> ChunkRows<'a> {
    pub fn iter(&self) -> impl Iterator<Item = &'a [u64]> + use<'a> {
        self.0.iter().map(|chunk| &chunk.rows[..])
    }

    /// Those that are not in memory.
    pub fn out(&self) -> impl Iterator<Item = &'a Chunk> + use<'a> {
        self.0.iter().filter(|chunk| chunk.is_out())
    }
}

/// Calls `change` with the words `at` of every item, counted from `head`.
pub(super) fn visit(items: &mut [u64], width: usize, head: usize, at: &[usize], change: &mut impl FnMut(&mut u64)) {
    if at.is_empty() {
        return;
    }
    for item in items.chunks_exact_mut(width) {
        at.iter().for_each(|&word| change(&mut item[head + word]));
    }
}

/// Inserts after all items that are not later.
#[inline]
pub(super) fn insert_sorted(items: &mut Vec<u64>, width: usize, item: &[u64]) {
    let time = item[0] as i64;
    let old = items.len();
    items.extend_from_slice(item);
    if old > 0 && items[old - width] as i64 > time {
        let at = width * count_up_to(&items[..old], width, time);
        items[at..].rotate_right(width);
    }
}

/// Number of items that are not after `time`.
#[inline]
pub(super) fn count_up_to(items: &[u64], width: usize, time: i64) -> usize {
    let (mut low, mut high) = (0, items.len() / width);
    while low < high {
        let middle = low.midpoint(high);
        if items[middle * width] as i64 <= time { low = middle + 1 } else { high = middle }
    }
    low
}
