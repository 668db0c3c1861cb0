//! Tumbling and hopping windows: panes of one step each, with the entities that had events in them.
//!
//! An event is added to one pane, however many windows overlap there; a window is put together from its panes when it
//! closes. A pane is dropped once the last window that it is in has closed.

use std::collections::VecDeque;

use hashbrown::HashTable;

use super::capture::{NEW, Telling};
use crate::window::aggregate::Lanes;
use crate::window::tile::floor;

/// Words of a piece of state before its lanes: the pane's start, and whether it changed since the last early results.
pub(super) const HEAD: usize = 2;

/// Bytes of an entity in a pane besides its lanes, its key taken to have 16 bytes.
pub(super) const ENTRY_BYTES: usize = size_of::<Entry>() + 16 + 2 * size_of::<u32>();

/// See the module.
#[derive(Debug)]
pub(super) struct Panes {
    length: i64,
    step: i64,
    /// Ascending by start.
    panes: VecDeque<Pane>,
    /// Windows that end here or before have closed. A multiple of the step.
    closed: i64,
    /// End of the first window that is open.
    due: i64,
    /// Where windows of several panes are put together.
    merged: Pane,
    order: Vec<u32>,
}

/// The entities that had events in one step of time.
#[derive(Debug, Default)]
struct Pane {
    start: i64,
    table: HashTable<u32>,
    entries: Vec<Entry>,
    keys: Vec<u8>,
    lanes: Vec<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    hash: u64,
    /// Where its key ends; it starts where that of the entry before ends.
    key_end: usize,
    /// It changed since the last early results.
    fresh: bool,
    /// The generation in which it last changed, as `capture.rs` counts.
    changed: u32,
}

impl Pane {
    /// The entry of a key, made empty if it is new.
    #[inline]
    fn entry(&mut self, lanes: &Lanes, hash: u64, key: &[u8]) -> usize {
        let (entries, keys) = (&self.entries, &self.keys);
        let found = self.table.find(hash, |&at| {
            let at = at as usize;
            entries[at].hash == hash && key_at(entries, keys, at) == key
        });
        if let Some(&at) = found {
            return at as usize;
        }
        let at = self.entries.len();
        self.keys.extend_from_slice(key);
        self.entries.push(Entry { hash, key_end: self.keys.len(), fresh: false, changed: NEW });
        self.lanes.resize((at + 1) * lanes.width(), 0);
        lanes.clear(&mut self.lanes[at * lanes.width()..]);
        let entries = &self.entries;
        let number = u32::try_from(at).expect("a pane of a task has fewer than 2³² entities");
        self.table.insert_unique(hash, number, |&at| entries[at as usize].hash);
        at
    }

    fn key(&self, at: usize) -> &[u8] {
        key_at(&self.entries, &self.keys, at)
    }

    /// Calls `piece` with the key, head and lanes of an entry.
    fn piece(&self, at: usize, width: usize, piece: &mut impl FnMut(&[u8], &[u64], &[u64])) {
        let head = [self.start as u64, u64::from(self.entries[at].fresh)];
        piece(self.key(at), &head, &self.lanes[at * width..][..width]);
    }

    /// An entry is about to change.
    #[cold]
    fn tell(&mut self, at: usize, width: usize, to: &mut Telling<'_>) {
        if to.before_change((self.start, at), &mut self.entries[at].changed) {
            self.piece(at, width, &mut |key, head, lanes| to.put(key, head, lanes));
        }
    }

    fn clear(&mut self) {
        self.table.clear();
        self.entries.clear();
        self.keys.clear();
        self.lanes.clear();
    }

    /// Adds a later pane.
    fn unite(&mut self, lanes: &Lanes, other: &Self) {
        let width = lanes.width();
        for (at, entry) in other.entries.iter().enumerate() {
            let own = self.entry(lanes, entry.hash, other.key(at));
            self.entries[own].fresh |= entry.fresh;
            lanes.unite(&mut self.lanes[own * width..][..width], &other.lanes[at * width..][..width]);
        }
    }

    /// Numbers of the entries that are `wanted`, by key.
    fn order(&self, wanted: impl Fn(&Entry) -> bool, order: &mut Vec<u32>) {
        order.clear();
        order.extend((0..self.entries.len()).filter(|&at| wanted(&self.entries[at])).map(|at| at as u32));
        order.sort_unstable_by(|&a, &b| self.key(a as usize).cmp(self.key(b as usize)));
    }

    /// The pane is about to go.
    fn end(&self, width: usize, to: &mut Telling<'_>) {
        for (at, entry) in self.entries.iter().enumerate() {
            if to.before_end((self.start, at), entry.changed) {
                self.piece(at, width, &mut |key, head, lanes| to.put(key, head, lanes));
            }
        }
    }

    fn bytes(&self) -> usize {
        self.table.allocation_size()
            + size_of::<Entry>() * self.entries.capacity()
            + self.keys.capacity()
            + 8 * self.lanes.capacity()
    }
}

#[inline]
fn key_at<'a>(entries: &[Entry], keys: &'a [u8], at: usize) -> &'a [u8] {
    let start = if at == 0 { 0 } else { entries[at - 1].key_end };
    &keys[start..entries[at].key_end]
}

impl Panes {
    pub fn new(length: i64, step: i64) -> Self {
        let (panes, merged) = (VecDeque::new(), Pane::default());
        Self { length, step, panes, closed: i64::MIN, due: i64::MAX, merged, order: Vec::new() }
    }

    pub fn due(&self) -> i64 {
        self.due
    }

    /// Windows that end at `watermark` or before have closed, and were emitted.
    pub fn closed_to(&mut self, watermark: i64) {
        self.closed = self.closed.max(floor(watermark, self.step));
        self.drop_closed(self.closed, |_| ());
        self.due = self.panes.front().map_or(i64::MAX, |first| self.first_end(first.start));
    }

    /// Drops the panes of which the last window ends at `end` or before, each after `tell`.
    fn drop_closed(&mut self, end: i64, mut tell: impl FnMut(&Pane)) {
        while self.panes.front().is_some_and(|first| first.start.saturating_add(self.length) <= end) {
            self.panes.pop_front().iter().for_each(&mut tell);
        }
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.panes.iter().map(|pane| pane.entries.len()).sum()
    }

    /// Takes the checkpoint's walk on from an entry of the pane that starts at `start`, or after it. True at the end.
    pub fn walk(&self, width: usize, (start, entry): (i64, usize), to: &mut Telling<'_>) -> bool {
        let first = self.panes.partition_point(|pane| pane.start < start);
        for pane in self.panes.range(first..) {
            for at in if pane.start == start { entry } else { 0 }..pane.entries.len() {
                match to.visit((pane.start, at), pane.entries[at].changed) {
                    Some(true) => pane.piece(at, width, &mut |key, head, lanes| to.put(key, head, lanes)),
                    Some(false) => (),
                    None => return false,
                }
            }
        }
        true
    }

    /// End of the first window, of those that have not closed, that holds a pane.
    fn first_end(&self, start: i64) -> i64 {
        start.max(self.closed).saturating_add(self.step)
    }

    #[inline]
    pub fn insert(&mut self, lanes: &Lanes, hash: u64, key: &[u8], row: &[u64], to: &mut Telling<'_>) {
        let start = floor(row[0] as i64, self.step);
        let pane = self.pane(start);
        let at = pane.entry(lanes, hash, key);
        if !to.is_told(pane.entries[at].changed) {
            pane.tell(at, lanes.width(), to);
        }
        pane.entries[at].fresh = true;
        lanes.add_event(&mut pane.lanes[at * lanes.width()..], row);
    }

    #[inline]
    fn pane(&mut self, start: i64) -> &mut Pane {
        let after = self.panes.iter().rposition(|pane| pane.start <= start).map_or(0, |at| at + 1);
        if after > 0 && self.panes[after - 1].start == start {
            return &mut self.panes[after - 1];
        }
        self.due = self.due.min(self.first_end(start));
        self.panes.insert(after, Pane { start, ..Pane::default() });
        &mut self.panes[after]
    }

    /// Emits all windows that end at `watermark` or before: key, start, end, lanes.
    pub fn close(
        &mut self,
        lanes: &Lanes,
        watermark: i64,
        to: &mut Telling<'_>,
        mut emit: impl FnMut(&[u8], i64, i64, &[u64]),
    ) {
        let last = floor(watermark, self.step);
        while self.due <= last {
            let end = self.due;
            self.window(lanes, end, |_| true, &mut emit);
            self.drop_closed(end, |pane| pane.end(lanes.width(), to));
            self.closed = end;
            self.due = self.panes.front().map_or(i64::MAX, |first| self.first_end(first.start));
        }
        self.closed = self.closed.max(last);
    }

    /// Emits all open windows of entities with new events since the last call.
    pub fn early(&mut self, lanes: &Lanes, to: &mut Telling<'_>, mut emit: impl FnMut(&[u8], i64, i64, &[u64])) {
        let Some(last) = self.panes.back().map(|pane| pane.start) else { return };
        let mut end = self.due;
        while end <= last.saturating_add(self.length) {
            self.window(lanes, end, |entry| entry.fresh, &mut emit);
            end += self.step;
        }
        for pane in &mut self.panes {
            for at in 0..pane.entries.len() {
                if pane.entries[at].fresh {
                    pane.tell(at, lanes.width(), to);
                    pane.entries[at].fresh = false;
                }
            }
        }
    }

    /// Puts the window that ends at `end` together and emits the entities that are `wanted`, by key.
    fn window(
        &mut self,
        lanes: &Lanes,
        end: i64,
        wanted: impl Fn(&Entry) -> bool,
        emit: &mut impl FnMut(&[u8], i64, i64, &[u64]),
    ) {
        let (start, width) = (end.saturating_sub(self.length), lanes.width());
        let from = self.panes.partition_point(|pane| pane.start < start);
        let to = self.panes.partition_point(|pane| pane.start < end);
        let whole = match to - from {
            0 => return,
            1 => &self.panes[from],
            _ => {
                self.merged.clear();
                self.panes.range(from..to).for_each(|pane| self.merged.unite(lanes, pane));
                &self.merged
            }
        };
        whole.order(wanted, &mut self.order);
        for &at in &self.order {
            let at = at as usize;
            emit(whole.key(at), start, end, &whole.lanes[at * width..][..width]);
        }
    }

    pub fn bytes(&self) -> usize {
        self.panes.iter().map(Pane::bytes).sum::<usize>() + self.merged.bytes()
    }

    pub fn for_each_lanes(&mut self, change: &mut impl FnMut(&mut [u64])) {
        self.panes.iter_mut().for_each(|pane| change(&mut pane.lanes));
    }

    pub fn for_each_piece(&self, width: usize, piece: &mut impl FnMut(&[u8], &[u64], &[u64])) {
        for pane in &self.panes {
            (0..pane.entries.len()).for_each(|at| pane.piece(at, width, piece));
        }
    }

    pub fn restore_piece(&mut self, lanes: &Lanes, hash: u64, key: &[u8], words: &[u64], generation: u32) {
        let pane = self.pane(words[0] as i64);
        let at = pane.entry(lanes, hash, key);
        pane.entries[at].fresh = words[1] != 0;
        pane.entries[at].changed = generation;
        pane.lanes[at * lanes.width()..][..lanes.width()].copy_from_slice(&words[HEAD..]);
    }
}
