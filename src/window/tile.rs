//! Where windows and tiles begin and end: arithmetic on event times in milliseconds.

use super::WindowError;

/// The tile of an exact window: event times are whole milliseconds.
pub(crate) const EXACT: i64 = 1;

/// One window of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    /// As written: `30d`.
    pub label: String,
    /// Milliseconds.
    pub length: i64,
    /// Length of the steps in which its tail moves, milliseconds; [`EXACT`] for an exact window.
    pub tile: i64,
}

impl Window {
    /// Whether its tail moves with every millisecond: it is added up from single events, not from tiles.
    pub fn is_exact(&self) -> bool {
        self.tile == EXACT
    }

    /// Where the window as of `as_of` begins: it holds the events after this instant.
    pub fn cut(&self, as_of: i64) -> i64 {
        let start = as_of.saturating_sub(self.length);
        if self.is_exact() { start } else { floor(start, self.tile) }
    }

    /// Whether this window and another one of the same source can be read from the same tiles: one tile has to divide the
    /// other, and as of the same instant the longer window may not begin after the shorter one.
    pub fn shares_with(&self, other: &Self) -> bool {
        let swap = (self.length, self.tile) > (other.length, other.tile);
        let (shorter, longer) = if swap { (other, self) } else { (self, other) };
        let (small, large) = (shorter.tile.min(longer.tile), shorter.tile.max(longer.tile));
        let ordered = longer.tile >= shorter.tile || longer.length - shorter.length >= shorter.tile;
        small > 0 && large % small == 0 && ordered
    }
}

/// The windows of one source, and the sizes of tiles that serve them.
///
/// A tile of length τ ends at a multiple of τ and covers the τ milliseconds up to and including its end. It may be as
/// long as no window can begin inside it, for any instant from the horizon on.
#[derive(Debug, Clone)]
pub(super) struct Windows {
    /// Shortest first. For the same instant, each begins no earlier than the next.
    windows: Vec<Window>,
    /// Distinct tile lengths, ascending; each divides the next. For each: which windows have a shorter tile. Only of the
    /// windows that are read from tiles.
    levels: Vec<(i64, Vec<usize>)>,
    /// Which windows are exact. What one of them or a shorter window covers is kept as single events.
    exact: Vec<usize>,
    /// All events ever, besides.
    pub lifetime: bool,
}

/// What the windows of a source need at a horizon.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// For each level: tiles of its length may end here and before. The first is unlimited.
    ends: Vec<i64>,
    /// What lies at or before this instant is in no window any more.
    pub oldest: i64,
    /// What lies after this instant is in an exact window, and stays single events.
    pub single: i64,
}

impl Windows {
    /// Sorts and checks the windows of the source `source`.
    pub fn new(source: &std::sync::Arc<str>, mut windows: Vec<Window>, lifetime: bool) -> Result<Self, WindowError> {
        windows.sort_by_key(|window| (window.length, window.tile));
        windows.dedup_by_key(|window| (window.length, window.tile));
        for (at, shorter) in windows.iter().enumerate() {
            for longer in &windows[at + 1..] {
                if !shorter.shares_with(longer) {
                    return Err(WindowError::Tiles {
                        source_name: source.clone(),
                        shorter: shorter.label.clone(),
                        shorter_tile_ms: shorter.tile,
                        longer: longer.label.clone(),
                        longer_tile_ms: longer.tile,
                    });
                }
            }
        }
        let exact: Vec<usize> = (0..windows.len()).filter(|&window| windows[window].is_exact()).collect();
        let first_tiled = exact.last().map_or(0, |last| last + 1);
        let mut tiles: Vec<i64> = windows[first_tiled..].iter().map(|window| window.tile).collect();
        tiles.sort_unstable();
        tiles.dedup();
        let finer = |tile: i64| (first_tiled..windows.len()).filter(|&window| windows[window].tile < tile).collect();
        let levels = tiles.iter().map(|&tile| (tile, finer(tile))).collect();
        Ok(Self { windows, levels, exact, lifetime })
    }

    /// Index of a window, by length and tile; a lifetime is after all others.
    pub fn index(&self, length: Option<i64>, tile: i64) -> Option<usize> {
        match length {
            None => self.lifetime.then_some(self.windows.len()),
            Some(length) => self.windows.iter().position(|window| (window.length, window.tile) == (length, tile)),
        }
    }

    /// Number of windows, a lifetime included.
    pub fn len(&self) -> usize {
        self.windows.len() + usize::from(self.lifetime)
    }

    /// Indexes of the exact windows, ascending.
    #[inline]
    pub fn exact(&self) -> &[usize] {
        &self.exact
    }

    /// Whether the window with this index is exact.
    #[inline]
    pub fn is_exact(&self, window: usize) -> bool {
        self.windows.get(window).is_some_and(Window::is_exact)
    }

    /// Index of the first window that is read from tiles: the one after the longest exact one.
    pub fn first_tiled(&self) -> usize {
        self.exact.last().map_or(0, |last| last + 1)
    }

    /// Length of the longest exact window, ms; 0 for none.
    pub fn longest_exact(&self) -> i64 {
        self.exact.last().map_or(0, |&last| self.windows[last].length)
    }

    /// Most tiles that one entity can have.
    pub fn most_tiles(&self) -> usize {
        let mut covered = self.longest_exact();
        let mut tiles = 0;
        for window in &self.windows[self.first_tiled()..] {
            tiles += usize::try_from((window.length - covered).max(0) / window.tile).unwrap_or(usize::MAX) + 2;
            covered = covered.max(window.length);
        }
        tiles
    }

    /// What may be merged and forgotten when no row will be asked for as of an instant before `horizon`.
    pub fn limits(&self, horizon: i64, limits: &mut Limits) {
        limits.ends.clear();
        limits.ends.extend(
            self.levels.iter().map(|(_, finer)| {
                finer.iter().map(|&window| self.windows[window].cut(horizon)).min().unwrap_or(i64::MAX)
            }),
        );
        limits.oldest = self.windows.last().map_or(i64::MAX, |window| window.cut(horizon));
        limits.single = self.exact.last().map_or(i64::MAX, |&last| self.windows[last].cut(horizon));
    }

    /// End of the longest tile that may hold an event of this time.
    pub fn tile_end(&self, time: i64, limits: &Limits) -> i64 {
        for ((tile, _), &limit) in self.levels.iter().zip(&limits.ends).skip(1).rev() {
            if time <= limit {
                let end = ceil(time, *tile);
                if end <= limit {
                    return end;
                }
            }
        }
        self.levels.first().map_or(time, |(tile, _)| ceil(time, *tile))
    }

    /// End of the shortest tile that may hold an event of this time.
    pub fn finest_end(&self, time: i64) -> i64 {
        self.levels.first().map_or(time, |(tile, _)| ceil(time, *tile))
    }
}

impl Limits {
    /// Before any horizon is known.
    pub fn unknown() -> Self {
        Self { ends: Vec::new(), oldest: i64::MIN, single: i64::MIN }
    }
}

/// The beginnings of all windows as of one instant, recomputed only when one of them moves.
#[derive(Debug, Clone)]
pub(super) struct Cuts {
    cuts: Vec<i64>,
    /// The cuts hold from this instant …
    from: i64,
    /// … to before this one.
    until: i64,
}

impl Cuts {
    pub fn new() -> Self {
        Self { cuts: Vec::new(), from: i64::MAX, until: i64::MIN }
    }

    /// One a window, shortest window first; a lifetime's is `i64::MIN`.
    #[inline]
    pub fn at(&mut self, windows: &Windows, as_of: i64) -> &[i64] {
        if !(self.from <= as_of && as_of < self.until) {
            self.recompute(windows, as_of);
        }
        &self.cuts
    }

    fn recompute(&mut self, windows: &Windows, as_of: i64) {
        // Exact windows move with every event; the others are divided anew only when they move, too.
        self.cuts.resize(windows.len(), i64::MIN);
        (self.from, self.until) = (i64::MIN, i64::MAX);
        for (window, cut) in windows.windows.iter().zip(&mut self.cuts) {
            if !(0..window.tile).contains(&as_of.saturating_sub(window.length).saturating_sub(*cut)) {
                *cut = window.cut(as_of);
            }
            self.from = self.from.max(cut.saturating_add(window.length));
            self.until = self.until.min(cut.saturating_add(window.length).saturating_add(window.tile));
        }
    }
}

/// Largest multiple of `step` that is not after `time`.
#[inline]
pub(super) fn floor(time: i64, step: i64) -> i64 {
    time.div_euclid(step).saturating_mul(step)
}

/// Smallest multiple of `step` that is not before `time`.
fn ceil(time: i64, step: i64) -> i64 {
    let floor = floor(time, step);
    if floor == time { time } else { floor.saturating_add(step) }
}
