//! Least-squares trends: the slope of a value over event time.
//!
//! With *x* the event times in milliseconds, *y* the values and *n* their number,
//! slope = (n Σxy − Σx Σy) / (n Σx² − (Σx)²). Event times are far from zero and close to each other, so that both differences
//! are taken where nothing is lost. The sums over times alone, and all sums over integers, are kept exactly (modulo 2¹²⁸),
//! and moved to the mean time *m*, rounded down to a millisecond, before anything is multiplied: with r = Σx − n m,
//!
//! ```text
//! slope = (n Σ(x − m)y − r Σy) / (n Σ(x − m)² − r²)
//! ```
//!
//! Of floats, Σxy is kept as Σhy and Σly with x = h 2²¹ + l, each a double-double: exact while the values are multiples of
//! some *u* and their sum stays below 2⁸³·u, which no grouping of them can change.
//!
//! | words | content |
//! |---|---|
//! | 2 | Σx, an `i128`, low word first |
//! | 2 | Σx² modulo 2¹²⁸, low word first |
//! | 2 | of integers: Σxy modulo 2¹²⁸; of floats: Σhy, high part first |
//! | 2 | of floats: Σly |

use super::{ValueKind, double, pair, put_double, put_wide, wide};
use crate::window::double_double::DoubleDouble;

/// Bits of a time that are its lower part.
const LOW_BITS: u32 = 21;

/// Names of the words.
pub(super) fn names(kind: ValueKind) -> &'static [&'static str] {
    match kind {
        ValueKind::Float => &["times", "times+", "times²", "times²+", "high", "high+", "low", "low+"],
        _ => &["times", "times+", "times²", "times²+", "products", "products+"],
    }
}

pub(super) fn add(kind: ValueKind, lanes: &mut [u64], time: i64, value: u64) {
    let wide_time = i128::from(time);
    add_wide(lanes, 0, wide_time as u128);
    add_wide(lanes, 2, (wide_time * wide_time) as u128);
    if kind == ValueKind::Float {
        let (high, low) = parts(time);
        let value = f64::from_bits(value);
        add_double(lanes, 4, DoubleDouble::product(high, value));
        add_double(lanes, 6, DoubleDouble::product(low, value));
    } else {
        add_wide(lanes, 4, (wide_time * i128::from(value as i64)) as u128);
    }
}

pub(super) fn unite(kind: ValueKind, lanes: &mut [u64], other: &[u64]) {
    let other = |at: usize| [other[at], other[at + 1]];
    add_wide(lanes, 0, wide(&other(0)));
    add_wide(lanes, 2, wide(&other(2)));
    if kind == ValueKind::Float {
        add_double(lanes, 4, double(&other(4)));
        add_double(lanes, 6, double(&other(6)));
    } else {
        add_wide(lanes, 4, wide(&other(4)));
    }
}

/// The slope per second, from the number of values and their sum besides. `None` where all are of one instant, where there is
/// none, or where n² times the variance of the times does not fit 128 bits: 10⁹ events within a year do.
pub(super) fn slope(kind: ValueKind, count: u64, sum: [u64; 2], lanes: &[u64]) -> Option<f64> {
    let lane = |at: usize| [lanes[at], lanes[at + 1]];
    let n = i128::from(count);
    let times = wide(&lane(0)) as i128;
    let mean = times.checked_div_euclid(n)?;
    let rest = times - mean * n;
    let square = |a: i128| a.wrapping_mul(a);
    // Σ(x − m)², which is not negative and small, so that what wrapped comes back.
    let spread = (wide(&lane(2)) as i128)
        .wrapping_sub(times.wrapping_mul(mean).wrapping_mul(2))
        .wrapping_add(n.wrapping_mul(square(mean))) as u128;
    if spread == 0 {
        return None;
    }
    let below = spread.checked_mul(u128::from(count))? - square(rest) as u128;
    let above = if kind == ValueKind::Float {
        let (mean_high, mean_low) = parts(mean as i64);
        let (sum, high, low) = (double(&sum), double(&lane(4)), double(&lane(6)));
        let high = high.plus_double(sum.times_float(mean_high).negated());
        let low = low.plus_double(sum.times_float(mean_low).negated());
        let products = high.times_float((1u64 << LOW_BITS) as f64).plus_double(low);
        products.times_float(count as f64).plus_double(sum.times_float(rest as f64).negated())
    } else {
        let sum = wide(&sum) as i128;
        // |Σ(x − m)y| is at most 2⁶³ √(n Σ(x − m)²), which the product above holds below 2¹²⁷.
        let products = (wide(&lane(4)) as i128).wrapping_sub(mean.wrapping_mul(sum));
        let exactly = products.checked_mul(n).zip(sum.checked_mul(rest)).and_then(|(a, b)| a.checked_sub(b));
        exactly.map_or_else(
            || {
                let part = |value: i128, factor: i128| DoubleDouble::from_i128(value).times_float(factor as f64);
                part(products, n).plus_double(part(sum, rest).negated())
            },
            DoubleDouble::from_i128,
        )
    };
    Some(above.high / below as f64 * 1000.0)
}

/// A time as `high · 2²¹ + low`, both exact as floats for any time within 2⁷³ of 1970.
fn parts(time: i64) -> (f64, f64) {
    ((time >> LOW_BITS) as f64, (time & ((1 << LOW_BITS) - 1)) as f64)
}

fn add_wide(lanes: &mut [u64], at: usize, value: u128) {
    let lane = pair(lanes, at);
    put_wide(lane, wide(lane).wrapping_add(value));
}

fn add_double(lanes: &mut [u64], at: usize, value: DoubleDouble) {
    let lane = pair(lanes, at);
    put_double(lane, double(lane).plus_double(value));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Count, sum and trend of some events.
    struct Events {
        kind: ValueKind,
        count: u64,
        sum: [u64; 2],
        lanes: [u64; 8],
    }

    impl Events {
        fn new(kind: ValueKind, events: &[(i64, u64)]) -> Self {
            let mut all = Self { kind, count: 0, sum: [0; 2], lanes: [0; 8] };
            for &(time, value) in events {
                all.count += 1;
                if kind == ValueKind::Float {
                    add_double(&mut all.sum, 0, DoubleDouble { high: f64::from_bits(value), low: 0.0 });
                } else {
                    add_wide(&mut all.sum, 0, i128::from(value as i64) as u128);
                }
                add(kind, &mut all.lanes, time, value);
            }
            all
        }

        fn unite(&mut self, other: &Self) {
            self.count += other.count;
            if self.kind == ValueKind::Float {
                add_double(&mut self.sum, 0, double(&other.sum));
            } else {
                add_wide(&mut self.sum, 0, wide(&other.sum));
            }
            unite(self.kind, &mut self.lanes, &other.lanes);
        }

        fn slope(&self) -> Option<f64> {
            slope(self.kind, self.count, self.sum, &self.lanes)
        }
    }

    fn floats(events: &[(i64, f64)]) -> Option<f64> {
        let events: Vec<(i64, u64)> = events.iter().map(|&(time, value)| (time, value.to_bits())).collect();
        Events::new(ValueKind::Float, &events).slope()
    }

    fn integers(events: &[(i64, i64)]) -> Option<f64> {
        let events: Vec<(i64, u64)> = events.iter().map(|&(time, value)| (time, value as u64)).collect();
        Events::new(ValueKind::Integer, &events).slope()
    }

    const NOW: i64 = 1_767_225_600_000;
    const YEAR: i64 = 365 * 86_400_000;

    #[test]
    fn has_no_slope_at_one_instant() {
        assert_eq!(floats(&[]), None);
        assert_eq!(floats(&[(NOW, 1.0)]), None);
        assert_eq!(integers(&[(NOW, 1), (NOW, 5), (NOW, -7)]), None);
    }

    #[test]
    fn is_exact_where_it_can_be() {
        assert_eq!(floats(&[(NOW, 1.0), (NOW + 1, 2.0)]), Some(1000.0));
        assert_eq!(floats(&[(NOW, 0.1), (NOW + 1, 0.1), (NOW + YEAR, 0.1)]), Some(0.0));
        assert_eq!(integers(&[(NOW, i64::MAX), (NOW + 7, i64::MAX), (NOW + YEAR, i64::MAX)]), Some(0.0));
        assert_eq!(integers(&[(-500, -1), (500, 1)]), Some(2.0));
        assert_eq!(integers(&[(NOW, i64::MIN), (NOW + 1000, i64::MAX)]), Some(2f64.powi(64)));
    }

    /// `scipy.stats.linregress(t, y).slope` with t in seconds from the first, of the same numbers.
    #[test]
    fn equals_scipy() {
        let events: Vec<(i64, f64)> = (0..1000i64)
            .map(|at| (NOW + at * 31_536_000 + at * at % 977, ((at * 7919) % 1009) as f64 / 8.0 + at as f64 * 1e-3))
            .collect();
        let found = floats(&events).unwrap();
        assert!((found - 3.219442720509754e-8).abs() <= 1e-15 * found, "{found:e}");
    }

    /// The same in whole numbers: the values are multiples of 1 / `scale`.
    fn exact(events: &[(i64, i128)], scale: f64) -> f64 {
        let n = events.len() as i128;
        let first = events[0].0;
        let times: Vec<i128> = events.iter().map(|(time, _)| i128::from(time - first)).collect();
        let total: i128 = times.iter().sum();
        let above: i128 = times.iter().zip(events).map(|(time, (_, value))| (n * time - total) * value).sum();
        let below: i128 = times.iter().map(|time| (n * time - total) * time).sum();
        above as f64 / scale / below as f64 * 1000.0
    }

    proptest! {
        #[test]
        fn equals_fractions_however_it_is_cut(
            start in prop_oneof![Just(NOW), Just(0), -YEAR..YEAR],
            events in prop::collection::vec((0i64..YEAR, -1_000_000i64..1_000_000), 2..60),
            cut in 0usize..60,
        ) {
            prop_assume!(events.iter().any(|event| event.0 != events[0].0));
            let integers: Vec<(i64, u64)> =
                events.iter().map(|&(time, value)| (start + time, value as u64)).collect();
            // Cents, which no float holds exactly.
            let floats: Vec<(i64, u64)> =
                events.iter().map(|&(time, value)| (start + time, (value as f64 / 100.0).to_bits())).collect();
            for (kind, events) in [(ValueKind::Integer, integers), (ValueKind::Float, floats)] {
                let whole = Events::new(kind, &events).slope().unwrap();
                let (left, right) = events.split_at(cut.min(events.len()));
                let mut cut = Events::new(kind, right);
                cut.unite(&Events::new(kind, left));
                prop_assert_eq!(cut.slope().unwrap().to_bits(), whole.to_bits());
                let scale = if kind == ValueKind::Float { 2f64.powi(60) } else { 1.0 };
                let scaled: Vec<(i64, i128)> = events
                    .iter()
                    .map(|&(time, value)| match kind {
                        ValueKind::Float => (time, (f64::from_bits(value) * scale) as i128),
                        _ => (time, i128::from(value as i64)),
                    })
                    .collect();
                let expected = exact(&scaled, scale);
                prop_assert!((whole - expected).abs() <= 1e-15 * expected.abs(), "{whole:e} {expected:e}");
            }
        }
    }
}
