//! How windows are cut into tiles.
//!
//! A window's tail moves in steps of its tile. Tiles are aligned to the epoch, so that a tile has to divide a day or be a
//! number of days; and each tile of a group has to divide the next larger one, so that larger tiles can be put together
//! from smaller ones.

const SECOND: i64 = 1_000;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;
pub(super) const DAY: i64 = 24 * HOUR;

/// Tile lengths in milliseconds that are chosen by default: each divides the next.
const LADDER: [i64; 12] = [
    SECOND,
    5 * SECOND,
    15 * SECOND,
    MINUTE,
    5 * MINUTE,
    15 * MINUTE,
    HOUR,
    3 * HOUR,
    6 * HOUR,
    12 * HOUR,
    DAY,
    7 * DAY,
];

/// A default tile is at most this part of its window.
const PARTS: i64 = 48;

/// Most tiles of one window: what an entity with events in all of them keeps in memory.
pub(super) const MAX_TILES: i64 = 10_000;

/// The tile of a window by default: the largest of the ladder that is at most a 48th of the window (a second, for short
/// windows), divides it, and divides the tile of the next larger window.
pub(super) fn default_tile(window: i64, larger: Option<i64>) -> i64 {
    LADDER
        .into_iter()
        .rev()
        .find(|tile| *tile <= window / PARTS && window % tile == 0 && larger.is_none_or(|larger| larger % tile == 0))
        .unwrap_or(SECOND)
}

/// The largest tile of the ladder that a window of this length can have and that `fits` its neighbours.
pub(super) fn fitting_tile(window: i64, fits: impl Fn(i64) -> bool) -> Option<i64> {
    let mut ladder = LADDER.into_iter().rev();
    ladder.find(|tile| {
        window % tile == 0 && window / tile >= PARTS.min(window / SECOND) && window / tile <= MAX_TILES && fits(*tile)
    })
}

/// True where tiles of this length begin at midnight UTC every so many days.
pub(super) fn fits_days(tile: i64) -> bool {
    tile > 0 && (DAY % tile == 0 || tile % DAY == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    #[rstest]
    #[case(30 * SECOND, SECOND)]
    #[case(HOUR, MINUTE)]
    #[case(6 * HOUR, 5 * MINUTE)]
    #[case(DAY, 15 * MINUTE)]
    #[case(7 * DAY, 3 * HOUR)]
    #[case(30 * DAY, 12 * HOUR)]
    #[case(90 * DAY, DAY)]
    #[case(364 * DAY, 7 * DAY)]
    #[case(365 * DAY, DAY)]
    #[case(61 * MINUTE + SECOND, SECOND)]
    fn default_tiles(#[case] window: i64, #[case] tile: i64) {
        assert_eq!(default_tile(window, None), tile);
    }

    proptest! {
        #[test]
        fn defaults_keep_the_rules(windows in prop::collection::btree_set(1..100_000_000i64, 1..6)) {
            let mut larger = None;
            for window in windows.into_iter().rev().map(|seconds| seconds * SECOND) {
                let tile = default_tile(window, larger);
                prop_assert!(fits_days(tile) && window % tile == 0);
                prop_assert!(larger.is_none_or(|larger| larger % tile == 0));
                larger = Some(tile);
            }
        }
    }
}
