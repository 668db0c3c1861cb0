//! Exponentially decayed sums: an event of age *a* weighs 2^(−a / half-life).
//!
//! Time is cut into cells of 64 half-lives. Sums are kept as of the beginning of the newest event's cell, where its weight
//! is between 1 and 2⁶⁴; they move to a later cell by a power of two, which is exact. So the weight of an event is the same
//! number however the sums came about, and the sums, in twice the precision of a float, are as independent of order and
//! grouping as those of floats without a weight.
//!
//! | words | content |
//! |---|---|
//! | 1 | cell of the newest event, `i64::MIN` for none |
//! | 2 | sum of the weights, high part first |
//! | 2 | of numbers: sum of the weighted values, high part first |

use super::{ValueKind, double, pair, put_double};
use crate::window::double_double::DoubleDouble;

/// Half-lives in a cell.
const HALF_LIVES: i64 = 64;

/// The cell of no event.
pub(super) const NONE: i64 = i64::MIN;

/// Names of the words.
pub(super) fn names(kind: ValueKind) -> &'static [&'static str] {
    match kind {
        ValueKind::Integer | ValueKind::Float => &["cell", "weights", "weights+", "weighted", "weighted+"],
        ValueKind::Event | ValueKind::Opaque => &["cell", "weights", "weights+"],
    }
}

/// Adds an event's terms to the sums, each times its weight.
pub(super) fn add(half_life: i64, lanes: &mut [u64], time: i64, terms: [f64; 2]) {
    let own = time.div_euclid(half_life.saturating_mul(HALF_LIVES));
    let sums = advance(lanes, own);
    let cell = lanes[0] as i64;
    let weight = ((time - start(own, half_life)) as f64 / half_life as f64).exp2();
    for (at, term) in (1..).step_by(2).zip(terms).take(sums) {
        let lane = pair(lanes, at);
        put_double(lane, double(lane).plus_double(scaled(DoubleDouble::product(weight, term), own, cell)));
    }
}

/// Adds the sums of other events.
pub(super) fn unite(lanes: &mut [u64], other: &[u64]) {
    let own = other[0] as i64;
    if own == NONE {
        return;
    }
    let sums = advance(lanes, own);
    let cell = lanes[0] as i64;
    for at in (1..).step_by(2).take(sums) {
        let lane = pair(lanes, at);
        put_double(lane, double(lane).plus_double(scaled(double(&[other[at], other[at + 1]]), own, cell)));
    }
}

/// A sum as of an instant, which is not before any of its events. `at` counts the sums.
pub(super) fn sum(half_life: i64, lanes: &[u64], at: usize, as_of: i64) -> f64 {
    if lanes[0] as i64 == NONE {
        return 0.0;
    }
    let age = as_of.saturating_sub(start(lanes[0] as i64, half_life));
    f64::from_bits(lanes[1 + 2 * at]) * (-(age as f64) / half_life as f64).exp2()
}

/// Weighted values over weights, which is the same at any instant. `None` without an event.
pub(super) fn mean(lanes: &[u64]) -> Option<f64> {
    (lanes[0] as i64 != NONE).then(|| f64::from_bits(lanes[3]) / f64::from_bits(lanes[1]))
}

/// Moves the sums to a cell, if it is later than theirs. Gives their number.
fn advance(lanes: &mut [u64], cell: i64) -> usize {
    let sums = lanes.len() / 2;
    let known = lanes[0] as i64;
    if cell > known {
        lanes[0] = cell as u64;
        for at in (1..).step_by(2).take(sums) {
            let lane = pair(lanes, at);
            put_double(lane, scaled(double(lane), known, cell));
        }
    }
    sums
}

/// The first instant of a cell.
fn start(cell: i64, half_life: i64) -> i64 {
    cell.saturating_mul(half_life.saturating_mul(HALF_LIVES))
}

/// A sum as of one cell as of another one that is not before it.
fn scaled(sum: DoubleDouble, from: i64, to: i64) -> DoubleDouble {
    let halvings = to.saturating_sub(from).saturating_mul(HALF_LIVES).min(2048);
    if halvings == 0 {
        return sum;
    }
    let factor = 2f64.powi(-(halvings as i32));
    DoubleDouble { high: sum.high * factor, low: sum.low * factor }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: i64 = 86_400_000;

    fn sums(half_life: i64, events: &[(i64, f64)]) -> [u64; 5] {
        let mut lanes = [NONE as u64, 0, 0, 0, 0];
        events.iter().for_each(|&(time, value)| add(half_life, &mut lanes, time, [1.0, value]));
        lanes
    }

    #[test]
    fn halves_with_every_half_life() {
        let lanes = sums(7 * DAY, &[(0, 8.0), (7 * DAY, 4.0)]);
        let at = |days: i64| (sum(7 * DAY, &lanes, 0, days * DAY), sum(7 * DAY, &lanes, 1, days * DAY));
        assert_eq!((at(7), at(14), at(21)), ((1.5, 8.0), (0.75, 4.0), (0.375, 2.0)));
        assert_eq!(mean(&lanes), Some(8.0 / 1.5));
        assert_eq!(at(7 * 1200), (0.0, 0.0));
        assert_eq!((sum(DAY, &sums(DAY, &[]), 1, 5), mean(&sums(DAY, &[]))), (0.0, None));
    }

    proptest! {
        /// Over thousands of half-lives and many cells, before and after 1970.
        #[test]
        fn equals_the_definition_however_it_is_cut(
            events in prop::collection::vec((-40_000i64..40_000, -100_000i64..100_000), 1..80),
            half_life in prop_oneof![Just(1i64), 2..1000i64, Just(100_000)],
            cut in 0usize..80,
            age in 0i64..500,
        ) {
            let events: Vec<(i64, f64)> = events.iter().map(|&(time, cents)| (time, cents as f64 / 100.0)).collect();
            let whole = sums(half_life, &events);
            let (left, right) = events.split_at(cut.min(events.len()));
            let mut united = sums(half_life, right);
            unite(&mut united, &sums(half_life, left));
            let as_of = age + events.iter().map(|event| event.0).max().unwrap();
            for (at, term) in [|_: f64| 1.0, |value| value].into_iter().enumerate() {
                let found = sum(half_life, &whole, at, as_of);
                prop_assert_eq!(found.to_bits(), sum(half_life, &united, at, as_of).to_bits());
                let weight = |time: i64| 2f64.powf((time - as_of) as f64 / half_life as f64);
                let expected: f64 = events.iter().map(|&(time, value)| weight(time) * term(value)).sum();
                let scale: f64 = events.iter().map(|&(time, value)| weight(time) * term(value).abs()).sum();
                prop_assert!((found - expected).abs() <= 1e-13 * scale + 1e-300, "{found:e} {expected:e}");
            }
        }
    }
}
