//! What one entity has of one source.
//!
//! Three collections of events, each in the order of event time, disjoint, and read together:
//!
//! - *rows*: single events. All events start here, and where there are few they stay: below some size a row takes less
//!   memory than a tile and is read as fast.
//! - *chunks*: runs of single events too new to be merged (an out-of-order event may yet ask for the state between two of
//!   them) and too many to be read one by one, each with its aggregate.
//! - *tiles*: aggregates of the events between two instants at which windows can begin, the newer the finer.
//!
//! What no window can reach is forgotten, or united into one aggregate where the source has a lifetime window. The size
//! of a state is thus bounded by the number of tiles and the events within the source's out-of-order bound.
//!
//! An entity with tiles also keeps its windows *running*: aggregates as of its newest event that each new event joins,
//! each valid until an event drops out of its tail. An event in order then costs as much as its windows have lanes.
//!
//! What an exact window covers is not merged: it stays rows and chunks. Of such a window only the newer part is running,
//! and each event that drops out of the older part takes an aggregate off a stack (see `exact.rs`).
//!
//! Of two events at the same time, the one inserted later counts as the newer. Rows and chunks keep such events in order;
//! chunks are cut between different times; and what is in a tile was inserted before any row of the same time.

use std::sync::Arc;

use super::aggregate::Lanes;
use super::cold::Block;
use super::exact::{self, Raw, Tail};
use super::ordered::{Chunk, ChunkCursor, ChunkRows, Cursor, count_up_to, insert_sorted, visit};
use super::tile::{Limits, Windows};

/// Rows that an entity keeps before anything is merged; more where a window takes as much memory as more rows.
const FEW_ROWS: usize = 32;

/// Rows in a chunk, at first. Doubles as chunks become many, up to eight times this.
const CHUNK_ROWS: usize = 64;

/// Words before the lanes of a running window: `edge` and `tail`.
pub(super) const WINDOW_HEAD: usize = 2;

/// How the states of one source are laid out.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub lanes: Lanes,
    pub windows: Windows,
    /// Words of a row: time, mask, values.
    pub row: usize,
    /// Words of a tile: its end, then lanes.
    pub tile: usize,
    /// Words of a running window: `edge`, `tail`, then lanes. It holds exactly the events after any instant `cut` with
    /// `edge <= cut < tail`. Of an exact window it holds those after `edge`, of which `tail` is the oldest.
    pub window: usize,
    /// So many rows take as much memory as a tile.
    rows_per_tile: usize,
    /// So many rows are kept before anything is merged.
    few_rows: usize,
    /// The source is a table: of the rows that no other is asked for before, the newest is kept and the others are forgotten.
    table: bool,
}

/// What may be merged and forgotten.
#[derive(Debug, Clone)]
pub(super) struct Horizon {
    /// Events up to this time may be merged: no row will be asked for as of an earlier instant.
    pub merge: i64,
    /// What windows need from then on.
    pub limits: Limits,
    /// Of a table: deletions before this time may be forgotten.
    pub deletions: i64,
}

/// What one entity has of one source. Empty states allocate nothing.
#[derive(Debug, Default)]
pub(super) struct State {
    rows: Vec<u64>,
    dense: Option<Box<Dense>>,
}

/// What entities with many events have besides.
#[derive(Debug, Default)]
struct Dense {
    tiles: Vec<u64>,
    chunks: Vec<Chunk>,
    /// What lies before all windows with an end: lanes, for sources with a lifetime window.
    beyond: Vec<u64>,
    /// Running windows, or nothing.
    running: Vec<u64>,
    /// The older parts of the exact ones among them.
    tails: Vec<Tail>,
    /// Time of the newest event.
    newest: i64,
    /// Time of the newest event that was merged into a tile.
    merged: i64,
    /// Some chunks may not be in memory.
    spilled: bool,
    /// Merges when there are this many rows.
    merge_at: usize,
    /// An event came since the last sweep.
    active: bool,
    /// Bytes when they were last counted.
    bytes: usize,
}

/// The parts of a state, for checkpoints.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts<'a> {
    /// Flat rows, ascending by time.
    pub rows: &'a [u64],
    /// Flat rows of the chunks, each ascending by time, in order.
    pub chunks: ChunkRows<'a>,
    /// Flat tiles, ascending by end.
    pub tiles: &'a [u64],
    /// Lanes of what lies before all windows with an end, or nothing.
    pub beyond: &'a [u64],
    /// Time of the newest event that was merged into a tile; `i64::MIN` for none.
    pub merged: i64,
}

impl Layout {
    pub fn new(lanes: Lanes, windows: Windows, values: usize) -> Self {
        let row = 1 + lanes.mask_words() + values;
        let tile = 1 + lanes.width();
        let rows_per_tile = tile.div_ceil(row).max(2);
        let window = WINDOW_HEAD + lanes.width();
        let few_rows = FEW_ROWS.max(window / row);
        Self { lanes, windows, row, tile, window, rows_per_tile, few_rows, table: false }
    }

    /// That of a table, which has rows and nothing else.
    pub fn of_table(lanes: Lanes, windows: Windows, values: usize) -> Self {
        Self { few_rows: 2, table: true, ..Self::new(lanes, windows, values) }
    }

    /// Words of all windows.
    pub fn windows_words(&self) -> usize {
        self.windows.len() * self.window
    }

    /// First lane of a window in the words of all windows.
    pub fn window_lanes(&self, window: usize) -> usize {
        window * self.window + WINDOW_HEAD
    }

    /// Word of a row that holds a value.
    pub fn value_word(&self, value: usize) -> usize {
        1 + self.lanes.mask_words() + value
    }

    /// Bytes of a state with one event, and of one with events in every tile.
    pub fn state_bytes(&self) -> (usize, usize) {
        if self.table {
            let bytes = 8 * self.row.next_power_of_two().max(4);
            return (bytes, bytes);
        }
        let words = self.windows.most_tiles() * self.tile + self.windows_words() + 2 * self.few_rows * self.row;
        (8 * self.row.next_power_of_two().max(4), size_of::<Dense>() + 8 * words)
    }

    /// Bytes of an event that is kept for exact windows, where there are many: its row, its part of a chunk's aggregate, and
    /// for each exact window its part of a stack, which holds every chunk of half a window and the events of one.
    pub fn single_event_bytes(&self) -> usize {
        8 * self.row + self.spilled_event_bytes()
    }

    /// Bytes in memory of an event that is on disk.
    pub fn spilled_event_bytes(&self) -> usize {
        (8 * self.lanes.width() + size_of::<Chunk>()).div_ceil(CHUNK_ROWS)
            + self.windows.exact().len() * (8 * self.window).div_ceil(2 * CHUNK_ROWS)
    }
}

impl State {
    /// Adds an event, which is later than all others of the same time. Says whether it is time to [merge](State::merge).
    #[inline]
    pub fn insert(&mut self, layout: &Layout, row: &[u64]) -> bool {
        let time = row[0] as i64;
        let mut merge_at = layout.few_rows;
        if let Some(dense) = &mut self.dense {
            dense.active = true;
            dense.newest = dense.newest.max(time);
            dense.run(layout, row);
            merge_at = dense.merge_at;
            if !dense.chunks.is_empty() && dense.insert_in_chunk(layout, row) {
                return false;
            }
        }
        insert_sorted(&mut self.rows, layout.row, row);
        self.rows.len() >= merge_at * layout.row
    }

    /// Time of the newest event, `i64::MIN` for none.
    #[inline]
    pub fn newest(&self, layout: &Layout) -> i64 {
        match &self.dense {
            Some(dense) => dense.newest,
            None if self.rows.is_empty() => i64::MIN,
            None => self.rows[self.rows.len() - layout.row] as i64,
        }
    }

    /// True if nothing was ever added, or all is forgotten.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.dense.is_none()
    }

    /// Of a table: the newest row up to `as_of`.
    #[inline]
    pub fn row_at(&self, layout: &Layout, as_of: i64) -> Option<&[u64]> {
        let last = count_up_to(&self.rows, layout.row, as_of).checked_sub(1)?;
        Some(&self.rows[last * layout.row..][..layout.row])
    }

    /// Of a table: makes way for a late row of this time. A deletion right after it is forgotten where that is due, so that
    /// what is true after it does not depend on whether it was.
    pub fn forget_deletion(&mut self, layout: &Layout, time: i64, deletions: i64) {
        let at = layout.row * count_up_to(&self.rows, layout.row, time);
        if self.rows.get(at..at + layout.row).is_some_and(|row| is_deletion(layout, row, deletions)) {
            self.rows.drain(at..at + layout.row);
        }
    }

    /// Of a table: forgets the rows that no one can ask for. Those are all that may be merged but the newest of them, and
    /// that, too, where it is an old deletion. Says whether there were any.
    fn replace(&mut self, layout: &Layout, horizon: &Horizon) -> bool {
        let Some(last) = count_up_to(&self.rows, layout.row, horizon.merge).checked_sub(1) else { return false };
        let deletion = is_deletion(layout, &self.rows[last * layout.row..][..layout.row], horizon.deletions);
        let forgotten = last + usize::from(deletion);
        self.rows.drain(..forgotten * layout.row);
        forgotten > 0
    }

    /// Writes all windows as of `as_of`, which begin at `cuts`, to `out`: one [`Layout::window`] after the other.
    #[inline]
    pub fn windows(&mut self, layout: &Layout, as_of: i64, cuts: &[i64], out: &mut [u64]) {
        let Some(dense) = &mut self.dense else {
            return self.fold(layout, as_of, cuts, out);
        };
        let mut exact = dense.tails.iter().zip(layout.windows.exact());
        if as_of < dense.newest || exact.any(|(tail, &window)| tail.is_after(cuts[window])) {
            return self.fold(layout, as_of, cuts, out);
        }
        let (mut running, mut tails) = (std::mem::take(&mut dense.running), std::mem::take(&mut dense.tails));
        let tiled = |window: usize| !layout.windows.is_exact(window);
        let stale = if running.is_empty() {
            tails.clear();
            running.resize(layout.windows_words(), 0);
            (0..cuts.len()).rposition(tiled)
        } else {
            let windows = running.chunks_exact(layout.window).zip(cuts).enumerate();
            windows.rev().find_map(|(at, (window, &cut))| {
                (!(window[0] as i64 <= cut && cut < window[1] as i64) && tiled(at)).then_some(at)
            })
        };
        if let Some(stale) = stale {
            self.fold(layout, as_of, &cuts[..=stale], out);
            for window in (0..=stale).filter(|&window| tiled(window)) {
                let words = window * layout.window..(window + 1) * layout.window;
                running[words.clone()].copy_from_slice(&out[words]);
            }
        }
        let dense = self.dense.as_deref().expect("it was there above, and folding changes nothing");
        let raw = Raw { rows: &self.rows, chunks: &dense.chunks, newest: dense.newest, merged: dense.merged };
        tails.resize_with(layout.windows.exact().len(), Tail::default);
        for (tail, &window) in tails.iter_mut().zip(layout.windows.exact()) {
            tail.follow(layout, raw, cuts[window], &mut running[window * layout.window..][..layout.window]);
        }
        out.copy_from_slice(&running);
        for (tail, &window) in tails.iter().zip(layout.windows.exact()) {
            tail.unite_with(layout, &mut out[layout.window_lanes(window)..][..layout.lanes.width()]);
        }
        let dense = self.dense.as_mut().expect("it was there above");
        (dense.running, dense.tails) = (running, tails);
    }

    /// Adds up the first `cuts.len()` windows, each from the one before: newest events first.
    fn fold(&self, layout: &Layout, as_of: i64, cuts: &[i64], out: &mut [u64]) {
        let lanes = &layout.lanes;
        let mut rows = Cursor::up_to(&self.rows, layout.row, as_of);
        let mut rest = self.dense.as_deref().map(|dense| dense.cursors(layout, as_of));
        let mut tail = i64::MAX;
        // All that the exact windows and the shorter ones cover are single events, unless the asking source was idle and
        // comes back with old events: then tiles are all that is left of it.
        let mut first_tiled = layout.windows.first_tiled();
        if self.dense.as_ref().is_some_and(|dense| as_of < dense.merged) {
            first_tiled = 0;
        }
        for (window, &cut) in cuts.iter().enumerate() {
            let (done, slot) = out.split_at_mut(window * layout.window);
            let slot = &mut slot[..layout.window];
            if window == 0 {
                lanes.clear(&mut slot[WINDOW_HEAD..]);
            } else {
                slot.copy_from_slice(&done[(window - 1) * layout.window..]);
            }
            let sum = &mut slot[WINDOW_HEAD..];
            while let Some(row) = rows.after(cut) {
                tail = tail.min(row[0] as i64);
                lanes.add_earlier(sum, row);
            }
            let mut edge = rows.peek();
            if let Some((dense, chunks, tiles)) = &mut rest {
                chunks.fold(lanes, cut, sum, &mut tail);
                edge = edge.max(chunks.peek());
                if window < first_tiled {
                    edge = edge.max(dense.merged);
                } else {
                    while let Some(tile) = tiles.after(cut) {
                        tail = tail.min(tile[0] as i64);
                        lanes.unite(sum, &tile[1..]);
                    }
                    edge = edge.max(tiles.peek());
                }
                if cut == i64::MIN && !dense.beyond.is_empty() {
                    lanes.unite(sum, &dense.beyond);
                }
            }
            (slot[0], slot[1]) = (edge as u64, tail as u64);
        }
    }

    /// Merges and forgets what the horizon allows. Says whether that changed the [parts](State::parts).
    pub fn merge(&mut self, layout: &Layout, horizon: &Horizon) -> bool {
        if layout.table {
            return self.replace(layout, horizon);
        }
        let newest = self.newest(layout);
        let dense = self
            .dense
            .get_or_insert_with(|| Box::new(Dense { newest, merged: i64::MIN, active: true, ..Dense::default() }));
        let mut changed = dense.coarsen(layout, &horizon.limits);
        changed |= dense.dissolve_chunks(layout, horizon.merge, &mut self.rows);
        changed |= dense.merge_rows(layout, horizon, &mut self.rows);
        dense.seal_chunks(layout, horizon.merge, &mut self.rows);
        let kept = self.rows.len() / layout.row;
        dense.merge_at = (kept + (kept / 2).max(FEW_ROWS / 2)).max(layout.few_rows);
        self.rows.shrink_to(dense.merge_at * layout.row);
        changed
    }

    /// Merges and forgets what the horizon allows of an entity to which no event may come for long. Says whether that changed
    /// the [parts](State::parts).
    pub fn sweep(&mut self, layout: &Layout, horizon: &Horizon) -> bool {
        if layout.table {
            let changed = self.replace(layout, horizon);
            self.rows.shrink_to_fit();
            return changed;
        }
        if self.newest(layout) <= horizon.limits.oldest && !layout.windows.lifetime {
            *self = Self::default();
            return true;
        }
        let oldest = horizon.limits.oldest.min(horizon.merge);
        let forgets = self.rows.first().is_some_and(|&time| time as i64 <= oldest);
        let Some(dense) = &mut self.dense else {
            if forgets && layout.windows.lifetime {
                return self.merge(layout, horizon);
            } else if forgets {
                self.rows.drain(..layout.row * count_up_to(&self.rows, layout.row, oldest));
                self.rows.shrink_to_fit();
            }
            return forgets;
        };
        if std::mem::take(&mut dense.active) {
            return false;
        }
        (dense.running, dense.tails) = (Vec::new(), Vec::new());
        let mut changed = self.merge(layout, horizon);
        self.rows.shrink_to_fit();
        let few = self.rows.len() < layout.few_rows * layout.row;
        if let Some(dense) = &mut self.dense {
            dense.tiles.shrink_to_fit();
            if few && dense.tiles.is_empty() && dense.chunks.is_empty() && dense.beyond.is_empty() {
                changed |= dense.merged != i64::MIN;
                self.dense = None;
            }
        }
        changed
    }

    /// Bytes allocated beyond the state itself; of tiles and chunks as of the last [`State::account`].
    #[inline]
    pub fn bytes(&self) -> usize {
        8 * self.rows.capacity() + self.dense.as_ref().map_or(0, |dense| dense.bytes)
    }

    /// Counts the bytes of tiles and chunks.
    pub fn account(&mut self) {
        if let Some(dense) = &mut self.dense {
            dense.bytes = dense.count_bytes();
        }
    }

    /// What a checkpoint has to keep.
    pub fn parts(&self) -> Parts<'_> {
        let dense = self.dense.as_deref();
        Parts {
            rows: &self.rows,
            chunks: ChunkRows(dense.map_or(&[], |dense| &dense.chunks)),
            tiles: dense.map_or(&[], |dense| &dense.tiles),
            beyond: dense.map_or(&[], |dense| &dense.beyond),
            merged: dense.map_or(i64::MIN, |dense| dense.merged),
        }
    }

    /// The state of which [`State::parts`] were these, the rows of its chunks among `rows`.
    pub fn from_parts(layout: &Layout, mut rows: Vec<u64>, tiles: Vec<u64>, beyond: Vec<u64>, merged: i64) -> Self {
        let count = rows.len() / layout.row;
        let newest = count.checked_sub(1).map_or(merged, |last| merged.max(rows[last * layout.row] as i64));
        let mut dense = (!tiles.is_empty() || !beyond.is_empty() || count > layout.few_rows && !layout.table)
            .then(|| Box::new(Dense { tiles, beyond, newest, merged, active: true, ..Dense::default() }));
        if let Some(dense) = &mut dense {
            // A whole exact window of single events is not to be read one by one until the first merge.
            if !layout.windows.exact().is_empty() {
                dense.seal_chunks(layout, i64::MIN, &mut rows);
            }
            dense.merge_at = (rows.len() / layout.row + 1).max(layout.few_rows);
        }
        Self { rows, dense }
    }

    /// With these chunks, between whose times no other single event is. `merged` is that of [`State::from_parts`].
    pub fn with_chunks(mut self, layout: &Layout, merged: i64, chunks: Vec<Chunk>) -> Self {
        let Some(last) = chunks.last().map(Chunk::last) else { return self };
        let newest = self.newest(layout).max(last);
        let dense = self.dense.get_or_insert_with(|| {
            Box::new(Dense { merged, merge_at: layout.few_rows, active: true, ..Dense::default() })
        });
        // What was cut into chunks is none between these.
        let rows: Vec<u64> = dense.chunks.drain(..).flat_map(Chunk::into_rows).collect();
        rows.chunks_exact(layout.row).for_each(|row| insert_sorted(&mut self.rows, layout.row, row));
        (dense.chunks, dense.newest, dense.spilled) = (chunks, newest, true);
        dense.merge_at = (self.rows.len() / layout.row + 1).max(layout.few_rows);
        self
    }

    /// True where some events may be on disk alone.
    #[inline]
    pub fn is_spilled(&self) -> bool {
        self.dense.as_ref().is_some_and(|dense| dense.spilled)
    }

    /// Chunks that have to be in memory for [`State::windows`], which begin at `cuts`, as of `as_of`.
    pub fn missing(&self, layout: &Layout, as_of: i64, cuts: &[i64]) -> Vec<usize> {
        let Some(dense) = self.dense.as_deref().filter(|dense| dense.spilled) else { return Vec::new() };
        let middles = layout.windows.exact().iter().enumerate().filter_map(|(at, &window)| {
            let middle = || Some(exact::middle(cuts[window], dense.newest));
            let running = dense.running.chunks_exact(layout.window).nth(window);
            dense
                .tails
                .get(at)
                .zip(running)
                .map_or_else(middle, |(tail, running)| tail.next_middle(cuts[window], dense.newest, running))
        });
        let instants = cuts.iter().copied().chain(middles).chain([as_of]);
        let mut missing: Vec<usize> = instants.filter_map(|instant| dense.is_cut_at(instant)).collect();
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    /// The chunk that has to be in memory before an event at `time` is inserted.
    pub fn missing_at(&self, time: i64) -> Option<usize> {
        let dense = self.dense.as_deref().filter(|dense| dense.spilled)?;
        let at = dense.chunks.partition_point(|chunk| chunk.last() < time);
        if at == 0 && dense.chunks.first().is_some_and(|first| time < first.first()) {
            return None;
        }
        dense.chunks.get(at).is_some_and(Chunk::is_out).then_some(at)
    }

    /// The first chunk that has to be in memory for [`State::merge`], and up to when can be merged without those after it.
    pub fn missing_to_merge(&self, layout: &Layout, horizon: &Horizon) -> Option<(usize, i64)> {
        let dense = self.dense.as_deref().filter(|dense| dense.spilled)?;
        let mut old = dense.chunks.iter().enumerate().take_while(|(_, chunk)| chunk.last() <= horizon.merge);
        let needed = |chunk: &Chunk| layout.windows.lifetime || chunk.last() > horizon.limits.oldest;
        old.find(|(_, chunk)| chunk.is_out() && needed(chunk)).map(|(at, chunk)| (at, chunk.last()))
    }

    /// The chunks, to move them to disk and back. Whoever does so counts their bytes with [`State::account`].
    pub fn chunks(&mut self) -> &mut [Chunk] {
        match &mut self.dense {
            Some(dense) => {
                dense.spilled |= !dense.chunks.is_empty();
                &mut dense.chunks
            }
            None => &mut [],
        }
    }

    /// Where its chunks are on disk, in their order.
    pub fn blocks(&self) -> Vec<Arc<Block>> {
        let chunks = self.dense.iter().flat_map(|dense| &dense.chunks);
        chunks.filter_map(|chunk| chunk.block().cloned()).collect()
    }

    /// True where there are chunks.
    pub fn has_chunks(&self) -> bool {
        self.dense.as_ref().is_some_and(|dense| !dense.chunks.is_empty())
    }

    /// Calls `change` with these words of every row and these lanes of every aggregate.
    pub fn for_each_word(
        &mut self,
        layout: &Layout,
        words: &[usize],
        lanes: &[usize],
        mut change: impl FnMut(&mut u64),
    ) {
        let width = layout.lanes.width();
        visit(&mut self.rows, layout.row, 0, words, &mut change);
        let Some(dense) = &mut self.dense else { return };
        for chunk in &mut dense.chunks {
            visit(chunk.rows_to_renumber(), layout.row, 0, words, &mut change);
            visit(&mut chunk.lanes, width, 0, lanes, &mut change);
        }
        visit(&mut dense.tiles, layout.tile, 1, lanes, &mut change);
        visit(&mut dense.beyond, width, 0, lanes, &mut change);
        for window in dense.running.chunks_exact_mut(layout.window) {
            visit(&mut window[WINDOW_HEAD..], width, 0, lanes, &mut change);
        }
        for tail in &mut dense.tails {
            visit(&mut tail.items, layout.window, WINDOW_HEAD, lanes, &mut change);
        }
    }
}

impl Dense {
    /// Adds a new event to the running windows.
    #[inline]
    fn run(&mut self, layout: &Layout, row: &[u64]) {
        let time = row[0] as i64;
        for window in self.running.chunks_exact_mut(layout.window) {
            if time > window[0] as i64 {
                window[1] = (window[1] as i64).min(time) as u64;
                layout.lanes.add_later(&mut window[WINDOW_HEAD..], row);
            }
        }
        self.tails.iter_mut().for_each(|tail| tail.disturb(time));
    }

    /// The chunk that is not in memory and has events up to an instant and after it.
    fn is_cut_at(&self, instant: i64) -> Option<usize> {
        let at = self.chunks.partition_point(|chunk| chunk.last() <= instant);
        self.chunks.get(at).is_some_and(|chunk| chunk.is_out() && chunk.first() <= instant).then_some(at)
    }

    fn cursors<'a>(&'a self, layout: &'a Layout, as_of: i64) -> (&'a Self, ChunkCursor<'a>, Cursor<'a>) {
        // Only a source that was idle and comes back with old events asks for an instant before what was merged. Its rows
        // then cannot tell events within the shortest tile apart.
        let tiles = if as_of < self.merged { layout.windows.finest_end(as_of) } else { i64::MAX };
        (self, ChunkCursor::up_to(&self.chunks, layout.row, as_of), Cursor::up_to(&self.tiles, layout.tile, tiles))
    }

    /// Drops tiles that no window reaches and unites those between which none can begin. Says whether there were any.
    fn coarsen(&mut self, layout: &Layout, limits: &Limits) -> bool {
        let (mut written, mut changed) = (0, false);
        for read in (0..self.tiles.len()).step_by(layout.tile) {
            let end = self.tiles[read] as i64;
            let (kept, tile) = self.tiles.split_at_mut(read);
            let tile = &mut tile[..layout.tile];
            if end <= limits.oldest {
                if layout.windows.lifetime {
                    // In ascending order: the tile is later than all beyond, but no two events of it and beyond are equal in time.
                    unite_beyond(layout, &mut self.beyond, &tile[1..]);
                }
                continue;
            }
            let old_end = end;
            let end = layout.windows.tile_end(end, limits);
            changed |= end != old_end;
            let last = written - if written == 0 { 0 } else { layout.tile };
            if written > 0 && kept[last] as i64 == end {
                layout.lanes.unite(&mut kept[last + 1..last + layout.tile], &tile[1..]);
            } else {
                tile[0] = end as u64;
                self.tiles.copy_within(read..read + layout.tile, written);
                written += layout.tile;
            }
        }
        changed |= written < self.tiles.len();
        self.tiles.truncate(written);
        changed
    }

    /// Moves chunks without any event after `merge` back to the rows. Those that are not in memory are forgotten: no window
    /// reaches their events (see [`State::missing_to_merge`]). Says whether there were any of these.
    fn dissolve_chunks(&mut self, layout: &Layout, merge: i64, rows: &mut Vec<u64>) -> bool {
        let old = self.chunks.iter().take_while(|chunk| chunk.last() <= merge).count();
        if old == 0 {
            return false;
        }
        let forgets = self.chunks[..old].iter().any(Chunk::is_out);
        let first = self.chunks[0].first();
        let at = layout.row * count_up_to(rows, layout.row, first.saturating_sub(1));
        let dissolved = self.chunks.drain(..old).flat_map(Chunk::into_rows);
        rows.splice(at..at, dissolved);
        forgets
    }

    /// Unites rows into tiles where that saves memory, and with the tiles that are there. Says whether there were any.
    fn merge_rows(&mut self, layout: &Layout, horizon: &Horizon, rows: &mut Vec<u64>) -> bool {
        let width = layout.row;
        let limits = &horizon.limits;
        let old = count_up_to(rows, width, horizon.merge);
        let mut at = count_up_to(rows, width, horizon.merge.min(limits.oldest));
        if layout.windows.lifetime {
            for row in rows[..at * width].chunks_exact(width) {
                if self.beyond.is_empty() {
                    self.beyond.resize(layout.lanes.width(), 0);
                    layout.lanes.clear(&mut self.beyond);
                }
                layout.lanes.add_later(&mut self.beyond, row);
                self.merged = self.merged.max(row[0] as i64);
            }
        }
        let mut kept = 0;
        while at < old {
            let time = rows[at * width] as i64;
            let end = layout.windows.tile_end(time, limits);
            let run = at..at
                + rows[at * width..old * width].chunks_exact(width).take_while(|row| row[0] as i64 <= end).count();
            let tile = match self.find_tile(layout, end) {
                Ok(tile) => Some(tile),
                Err(tile) if run.len() >= layout.rows_per_tile => {
                    self.tiles.splice(tile..tile, std::iter::repeat_n(0, layout.tile));
                    self.tiles[tile] = end as u64;
                    layout.lanes.clear(&mut self.tiles[tile + 1..tile + layout.tile]);
                    Some(tile)
                }
                Err(_) => None,
            };
            let words = run.start * width..run.end * width;
            if let Some(tile) = tile {
                let lanes = &mut self.tiles[tile + 1..tile + layout.tile];
                rows[words].chunks_exact(width).for_each(|row| layout.lanes.add_later(lanes, row));
                self.merged = self.merged.max(rows[(run.end - 1) * width] as i64);
            } else {
                rows.copy_within(words, kept * width);
                kept += run.len();
            }
            at = run.end;
        }
        rows.drain(kept * width..old * width);
        kept < old
    }

    /// Finds the tile with this end, or where it has to be inserted: word index.
    fn find_tile(&self, layout: &Layout, end: i64) -> Result<usize, usize> {
        let before = layout.tile * count_up_to(&self.tiles, layout.tile, end.saturating_sub(1));
        if self.tiles.get(before).is_some_and(|&found| found as i64 == end) { Ok(before) } else { Err(before) }
    }

    /// Moves rows after `merge` into chunks where there are many, all but the newest.
    fn seal_chunks(&mut self, layout: &Layout, merge: i64, rows: &mut Vec<u64>) {
        let width = layout.row;
        let size = CHUNK_ROWS << (self.chunks.len() / CHUNK_ROWS).min(3);
        let sealed_to = self.chunks.last().map_or(i64::MIN, |chunk| chunk.last());
        let start = count_up_to(rows, width, merge.max(sealed_to));
        let mut at = start;
        while rows.len() / width - at >= 2 * size {
            // Between two different times, so that events of the same time stay together and in order.
            let time = rows[(at + size - 1) * width] as i64;
            let end = count_up_to(rows, width, time);
            if rows.len() / width - end < CHUNK_ROWS / 2 {
                break;
            }
            self.chunks.push(Chunk::new(&layout.lanes, layout.row, rows[at * width..end * width].to_vec()));
            at = end;
        }
        rows.drain(start * width..at * width);
    }

    /// Inserts an event that lies among the chunks.
    fn insert_in_chunk(&mut self, layout: &Layout, row: &[u64]) -> bool {
        let time = row[0] as i64;
        let beyond = |chunk: &Chunk| chunk.last() < time;
        if self.chunks.last().is_none_or(beyond) || time < self.chunks[0].first() {
            return false;
        }
        let index = self.chunks.partition_point(beyond);
        let chunk = &mut self.chunks[index];
        chunk.insert(&layout.lanes, layout.row, row);
        let rows = chunk.rows().len() / layout.row;
        if rows >= 16 * CHUNK_ROWS {
            let time = chunk.rows()[rows / 2 * layout.row] as i64;
            let half = layout.row * count_up_to(chunk.rows(), layout.row, time);
            if half < chunk.rows().len() {
                let (lower, upper) = chunk.rows().split_at(half);
                let (lower, upper) = (lower.to_vec(), upper.to_vec());
                *chunk = Chunk::new(&layout.lanes, layout.row, lower);
                self.chunks.insert(index + 1, Chunk::new(&layout.lanes, layout.row, upper));
            }
        }
        true
    }

    fn count_bytes(&self) -> usize {
        let chunks: usize = self.chunks.iter().map(Chunk::bytes).sum();
        let tails: usize = self.tails.iter().map(|tail| size_of::<Tail>() + 8 * tail.items.capacity()).sum();
        let chunks = chunks + tails;
        let words = self.tiles.capacity() + self.beyond.capacity() + self.running.capacity();
        size_of::<Self>() + 8 * words + chunks + size_of::<Chunk>() * self.chunks.capacity()
    }
}

/// True of a table's row without facts before `deletions`.
fn is_deletion(layout: &Layout, row: &[u64], deletions: i64) -> bool {
    (row[0] as i64) < deletions && row[1..=layout.lanes.mask_words()].iter().all(|mask| *mask == 0)
}

/// Unites a tile with what lies before all windows. The tile's events are the later ones.
fn unite_beyond(layout: &Layout, beyond: &mut Vec<u64>, tile: &[u64]) {
    if beyond.is_empty() {
        beyond.extend_from_slice(tile);
    } else {
        layout.lanes.unite(beyond, tile);
    }
}
