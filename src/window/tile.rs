//! Where windows and tiles begin and end: arithmetic on event times in milliseconds.

use super::WindowError;

/// One window of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    /// As written: `30d`.
    pub label: String,
    /// Milliseconds.
    pub length: i64,
    /// Length of the steps in which its tail moves, milliseconds.
    pub tile: i64,
}

impl Window {
    /// Where the window as of `as_of` begins: it holds the events after this instant.
    pub fn cut(&self, as_of: i64) -> i64 {
        floor(as_of.saturating_sub(self.length), self.tile)
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
    /// Distinct tile lengths, ascending; each divides the next. For each: how many windows have a shorter tile.
    levels: Vec<(i64, Vec<usize>)>,
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
        let mut tiles: Vec<i64> = windows.iter().map(|window| window.tile).collect();
        tiles.sort_unstable();
        tiles.dedup();
        let finer = |tile: i64| (0..windows.len()).filter(|&window| windows[window].tile < tile).collect();
        let levels = tiles.iter().map(|&tile| (tile, finer(tile))).collect();
        Ok(Self { windows, levels, lifetime })
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

    /// Most tiles that one entity can have.
    pub fn most_tiles(&self) -> usize {
        let mut covered = 0;
        let mut tiles = 0;
        for window in &self.windows {
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
        Self { ends: Vec::new(), oldest: i64::MIN }
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
        self.cuts.clear();
        (self.from, self.until) = (i64::MIN, i64::MAX);
        for window in &windows.windows {
            let cut = window.cut(as_of);
            self.cuts.push(cut);
            self.from = self.from.max(cut.saturating_add(window.length));
            self.until = self.until.min(cut.saturating_add(window.length).saturating_add(window.tile));
        }
        if windows.lifetime {
            self.cuts.push(i64::MIN);
        }
    }
}

/// Largest multiple of `step` that is not after `time`.
fn floor(time: i64, step: i64) -> i64 {
    time.div_euclid(step).saturating_mul(step)
}

/// Smallest multiple of `step` that is not before `time`.
fn ceil(time: i64, step: i64) -> i64 {
    let floor = floor(time, step);
    if floor == time { time } else { floor.saturating_add(step) }
}
