//! Quantiles: exact for few values, of a bounded relative error beyond.
//!
//! The quantile *q* of *n* values is the ⌈q n⌉-th smallest (SQL's `percentile_disc`). Up to [`EXACT`] values are kept as they
//! are. More than that are counted in buckets: those of level *l* end at powers of γ^(2^l), so that two values in one bucket
//! differ by at most that factor. When more than [`EXACT`] buckets have values, each two neighbours become one, and the
//! level goes up. What the words hold depends on the values alone, not on their order and grouping: the level is the
//! lowest at which they fill few enough buckets.
//!
//! | words | content |
//! |---|---|
//! | 1 | number of values; or 2³² · (level + 1) + number of buckets |
//! | 256 | values, ascending, as bits that order as integers; or buckets, ascending, key · 2⁴⁰ + number of values |
//!
//! C. Masson, J. E. Rim, H. K. Lee, "DDSketch", 2019; the collapse of all buckets alike is that of I. Epicoco et al.,
//! "UDDSketch: Accurate Tracking of Quantiles in Data Streams", 2020.

use super::ordered;

/// So many values are kept exactly, and so many buckets else.
pub(super) const EXACT: usize = 256;

/// Words of a sketch.
pub(super) const WORDS: usize = 1 + EXACT;

/// Bits of a bucket that hold the number of its values.
const COUNT_BITS: u32 = 40;

/// The key of zero. Keys of positive values are above, of negative ones below.
const ZERO: i64 = 1 << 23;

/// What is added to the index of a bucket, so that those of positive values are above that of zero.
const SHIFT: i64 = 1 << 22;

/// Level at which the relative error is at most 1 %.
const LEVEL_OF_A_PERCENT: i32 = 3;

/// ln γ^(2^l). γ^8 is 1.01 / 0.99.
fn log_gamma(level: u32) -> f64 {
    (1.01f64 / 0.99).ln() * 2f64.powi(level as i32 - LEVEL_OF_A_PERCENT)
}

/// Adds a value, which is finite.
pub(super) fn add(sketch: &mut [u64], value: f64) {
    let (head, words) = split(sketch);
    // Adding 0 makes +0 of −0.
    let value = value + 0.0;
    let (level, count) = form(*head);
    let Some(level) = level else {
        let word = value_to_word(value);
        let at = words[..count].partition_point(|&known| known <= word);
        if count < EXACT {
            words.copy_within(at..count, at + 1);
            words[at] = word;
            *head += 1;
        } else {
            let mut buckets = Buckets::of_values(words);
            buckets.add(key_of(value), 1);
            buckets.write(head, words);
        }
        return;
    };
    let key = at_level(key_of(value), level);
    let at = words[..count].partition_point(|&bucket| key_at(bucket) < key);
    if at < count && key_at(words[at]) == key {
        words[at] += 1;
    } else if count < EXACT {
        words.copy_within(at..count, at + 1);
        words[at] = bucket(key, 1);
        *head += 1;
    } else {
        let mut buckets = Buckets::read(level, words);
        buckets.add(key, 1);
        buckets.write(head, words);
    }
}

/// Adds all values of another sketch.
pub(super) fn unite(sketch: &mut [u64], other: &[u64]) {
    let (head, words) = split(sketch);
    let (other_head, other) = (other[0], &other[1..WORDS]);
    let ((level, count), (other_level, other_count)) = (form(*head), form(other_head));
    if other_count == 0 {
        return;
    }
    if count == 0 {
        *head = other_head;
        words.copy_from_slice(other);
        return;
    }
    let other = &other[..other_count];
    if level.is_none() && other_level.is_none() && count + other_count <= EXACT {
        // From the greatest down, into the room after the own ones.
        let (mut left, mut right) = (count, other_count);
        while right > 0 {
            let own = left > 0 && words[left - 1] > other[right - 1];
            words[left + right - 1] = if own { words[left - 1] } else { other[right - 1] };
            if own { left -= 1 } else { right -= 1 }
        }
        *head += other_count as u64;
        return;
    }
    let read = |level: Option<u32>, words: &[u64]| match level {
        Some(level) => Buckets::read(level, words),
        None => Buckets::of_values(words),
    };
    let (mut all, mut rest) = (read(level, &words[..count]), read(other_level, other));
    while all.level != rest.level {
        if all.level < rest.level { &mut all } else { &mut rest }.collapse();
    }
    all.merge(&rest);
    all.write(head, words);
}

/// The value of this quantile, given per mille: exact, or the middle of its bucket. `None` without values.
pub(super) fn quantile(sketch: &[u64], per_mille: u16) -> Option<f64> {
    let (level, count) = form(sketch[0]);
    let words = &sketch[1..=count];
    let values = match level {
        None => count as u64,
        Some(_) => words.iter().copied().map(count_at).sum(),
    };
    let rank = (u128::from(values) * u128::from(per_mille)).div_ceil(1000).max(1) as u64;
    let Some(level) = level else {
        return words.get(rank as usize - 1).copied().map(word_to_value);
    };
    let mut below = 0;
    let found = words.iter().find(|&&bucket| {
        below += count_at(bucket);
        below >= rank
    });
    found.map(|&bucket| middle(key_at(bucket), level))
}

/// The level of buckets, `None` for values; and how many there are.
fn form(head: u64) -> (Option<u32>, usize) {
    (((head >> 32) as u32).checked_sub(1), head as u32 as usize)
}

fn split(sketch: &mut [u64]) -> (&mut u64, &mut [u64; EXACT]) {
    let (head, words) = sketch.split_first_mut().expect("a sketch has a head");
    (head, words.first_chunk_mut().expect("a sketch has its words"))
}

/// A value as a word that orders as it does.
fn value_to_word(value: f64) -> u64 {
    ordered(value.to_bits()) as u64 ^ 1 << 63
}

fn word_to_value(word: u64) -> f64 {
    // What makes a float's bits order as an integer's is its own inverse.
    f64::from_bits(ordered(word ^ 1 << 63) as u64)
}

fn bucket(key: i64, count: u64) -> u64 {
    (key as u64) << COUNT_BITS | count
}

fn key_at(bucket: u64) -> i64 {
    (bucket >> COUNT_BITS) as i64
}

fn count_at(bucket: u64) -> u64 {
    bucket & ((1 << COUNT_BITS) - 1)
}

/// The key of a value's bucket at level 0. What is too small for a float's full precision is zero.
fn key_of(value: f64) -> i64 {
    let magnitude = value.abs();
    if magnitude < f64::MIN_POSITIVE {
        return ZERO;
    }
    let index = (magnitude.ln() / log_gamma(0)).ceil() as i64 + SHIFT;
    if value > 0.0 { ZERO + index } else { ZERO - index }
}

/// The key at a level of the bucket that has this one at level 0.
fn at_level(key: i64, level: u32) -> i64 {
    (0..level).fold(key, |key, _| parent(key))
}

/// The key of the bucket one level up: that of γ^i is ⌈i / 2⌉.
fn parent(key: i64) -> i64 {
    let up = |index: i64| (index - SHIFT + 1).div_euclid(2) + SHIFT;
    match key - ZERO {
        0 => ZERO,
        index if index > 0 => ZERO + up(index),
        index => ZERO - up(-index),
    }
}

/// The value whose relative error within a bucket is least: 2 γ^i / (γ + 1).
fn middle(key: i64, level: u32) -> f64 {
    if key == ZERO {
        return 0.0;
    }
    let (log, index) = (log_gamma(level), (key - ZERO).abs() - SHIFT);
    let magnitude = (((index - 1) as f64 * log).exp() * (2.0 / (1.0 + (-log).exp()))).min(f64::MAX);
    if key > ZERO { magnitude } else { -magnitude }
}

/// Buckets that may be too many.
struct Buckets {
    level: u32,
    buckets: Vec<u64>,
}

impl Buckets {
    fn read(level: u32, words: &[u64]) -> Self {
        Self { level, buckets: words.to_vec() }
    }

    fn of_values(words: &[u64]) -> Self {
        let mut buckets: Vec<u64> = Vec::with_capacity(2 * EXACT);
        for &word in words {
            let key = key_of(word_to_value(word));
            match buckets.last_mut() {
                Some(last) if key_at(*last) == key => *last += 1,
                _ => buckets.push(bucket(key, 1)),
            }
        }
        Self { level: 0, buckets }
    }

    fn add(&mut self, key: i64, count: u64) {
        let at = self.buckets.partition_point(|&bucket| key_at(bucket) < key);
        match self.buckets.get_mut(at) {
            Some(found) if key_at(*found) == key => *found += count,
            _ => self.buckets.insert(at, bucket(key, count)),
        }
    }

    fn merge(&mut self, other: &Self) {
        let mut left = self.buckets.iter().copied().peekable();
        let mut right = other.buckets.iter().copied().peekable();
        let mut merged = Vec::with_capacity(self.buckets.len() + other.buckets.len());
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(&a), Some(&b)) if key_at(a) == key_at(b) => {
                    left.next();
                    right.next();
                    Some(a + count_at(b))
                }
                (Some(a), Some(b)) if key_at(*a) > key_at(*b) => right.next(),
                (Some(_), _) => left.next(),
                (None, _) => right.next(),
            };
            let Some(next) = next else { break };
            merged.push(next);
        }
        self.buckets = merged;
    }

    fn collapse(&mut self) {
        self.level += 1;
        let mut written = 0;
        for read in 0..self.buckets.len() {
            let (key, count) = (parent(key_at(self.buckets[read])), count_at(self.buckets[read]));
            if written > 0 && key_at(self.buckets[written - 1]) == key {
                self.buckets[written - 1] += count;
            } else {
                self.buckets[written] = bucket(key, count);
                written += 1;
            }
        }
        self.buckets.truncate(written);
    }

    fn write(mut self, head: &mut u64, words: &mut [u64; EXACT]) {
        while self.buckets.len() > EXACT {
            self.collapse();
        }
        let count = self.buckets.len();
        *head = u64::from(self.level + 1) << 32 | count as u64;
        words[..count].copy_from_slice(&self.buckets);
        words[count..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sketch(values: &[f64]) -> [u64; WORDS] {
        let mut sketch = [0; WORDS];
        values.iter().for_each(|&value| add(&mut sketch, value));
        sketch
    }

    fn exact(values: &[f64], per_mille: u16) -> f64 {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let rank = (values.len() * usize::from(per_mille)).div_ceil(1000).max(1);
        sorted[rank - 1]
    }

    fn values() -> impl Strategy<Value = f64> {
        prop_oneof![
            4 => (1i64..5000).prop_map(|cents| cents as f64 / 100.0),
            1 => -1000.0..1000.0f64,
            1 => prop_oneof![Just(0.0), Just(-0.0), Just(5e-324), Just(f64::MAX), Just(f64::MIN), Just(f64::MIN_POSITIVE)],
            1 => any::<f64>().prop_filter("finite", |value| value.is_finite()),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn is_the_same_however_it_comes_about(
            parts in prop::collection::vec(prop::collection::vec(values(), 0..400), 1..5),
            order in any::<prop::sample::Index>(),
            per_mille in 1u16..1000,
        ) {
            let all = parts.concat();
            let whole = sketch(&all);
            let mut united = [0; WORDS];
            let start = order.index(parts.len());
            for part in parts[start..].iter().chain(&parts[..start]) {
                let reversed: Vec<f64> = part.iter().rev().copied().collect();
                unite(&mut united, &sketch(&reversed));
            }
            prop_assert_eq!(united, whole);
            let found = quantile(&whole, per_mille);
            prop_assert_eq!(found.is_some(), !all.is_empty());
            if let Some(found) = found {
                let expected = exact(&all, per_mille);
                let level = form(whole[0]).0;
                let error = level.map_or(0.0, |level| (log_gamma(level) / 2.0).tanh() * (1.0 + 1e-9));
                prop_assert_eq!(level.is_none(), all.len() <= EXACT);
                let smallest = if level.is_some() { f64::MIN_POSITIVE } else { 0.0 };
                prop_assert!(
                    (found - expected).abs() <= expected.abs() * error + smallest, "{found:e} for {expected:e}, {error}"
                );
            }
        }

        /// A factor of γ^(8·255), and of its powers, is what 256 buckets of a level cover wherever they begin.
        #[test]
        fn the_error_is_bounded_by_the_range_of_the_values(
            logs in prop::collection::vec(0.0..1.0f64, 300..3000),
            scale in -100.0..100.0f64,
        ) {
            for (factor, error) in [(164.0f64, 0.01), (2.69e4, 0.02), (7.2e8, 0.04)] {
                let values: Vec<f64> = logs.iter().map(|log| (scale + log * factor.ln()).exp()).collect();
                let sketch = sketch(&values);
                for per_mille in [1, 10, 250, 500, 950, 990, 999] {
                    let (found, expected) = (quantile(&sketch, per_mille).unwrap(), exact(&values, per_mille));
                    prop_assert!((found - expected).abs() <= error * (1.0 + 1e-9) * expected, "{found:e} {expected:e}");
                }
            }
        }
    }

    #[test]
    fn ranks_are_those_of_percentile_disc() {
        let sketch = sketch(&[4.0, 1.0, 3.0, 2.0]);
        let found = [1, 250, 251, 500, 501, 750, 999].map(|per_mille| quantile(&sketch, per_mille).unwrap());
        assert_eq!(found, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0]);
        assert_eq!(quantile(&[0; WORDS], 500), None);
    }
}
