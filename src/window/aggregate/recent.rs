//! The newest values, in their order.
//!
//! | words | content |
//! |---|---|
//! | 1 | number of values |
//! | 2 · N | of each value, the newest first: event time, value as in a row; then zeros |
//!
//! Windows are added up from their newest events to the oldest, which are thus put at the end.

/// Words of a value: event time, value.
const ENTRY: usize = 2;

/// Words of a set that holds at most so many values.
pub(super) const fn words(most: u16) -> usize {
    1 + ENTRY * most as usize
}

/// The words that hold values.
pub(super) fn value_words(most: u16) -> impl Iterator<Item = usize> {
    (0..usize::from(most)).map(|entry| 1 + ENTRY * entry + 1)
}

/// Adds an event: after all of the same time, or before them.
pub(super) fn add<const LATER: bool>(set: &mut [u64], time: i64, value: u64) {
    let count = set[0] as usize;
    let (entries, _) = set[1..].as_chunks_mut::<ENTRY>();
    let known = &entries[..count];
    let newer = |entry: &[u64; ENTRY]| if LATER { entry[0] as i64 > time } else { entry[0] as i64 >= time };
    // Most come at one of the ends.
    let at = match (known.first(), known.last()) {
        (Some(first), _) if !newer(first) => 0,
        (_, Some(last)) if newer(last) => count,
        _ => known.partition_point(newer),
    };
    if at < entries.len() {
        let kept = count.min(entries.len() - 1);
        entries.copy_within(at..kept, at + 1);
        entries[at] = [time as u64, value];
        set[0] = kept as u64 + 1;
    }
}

/// Adds another set, whose events come before those of the same time.
pub(super) fn unite(set: &mut [u64], other: &[u64]) {
    let (count, others) = (set[0] as usize, other[0] as usize);
    let (entries, _) = set[1..].as_chunks_mut::<ENTRY>();
    let (other, _) = other[1..].as_chunks::<ENTRY>();
    let other = &other[..others];
    let Some(newest) = other.first() else { return };
    let total = entries.len().min(count + others);
    // Most of the time all of the other set is older, or newer.
    let after = entries[..count].partition_point(|entry| entry[0] as i64 >= newest[0] as i64);
    if after == count {
        entries[count..total].copy_from_slice(&other[..total - count]);
    } else {
        let rest = entries[after..count].to_vec();
        let (mut mine, mut theirs) = (rest.iter().peekable(), other.iter().peekable());
        for entry in &mut entries[after..total] {
            let from_other = match (mine.peek(), theirs.peek()) {
                (Some(mine), Some(theirs)) => (theirs[0] as i64) > mine[0] as i64,
                (mine, _) => mine.is_none(),
            };
            let next = if from_other { theirs.next() } else { mine.next() };
            *entry = *next.expect("there are as many entries in the two as in both");
        }
    }
    set[0] = total as u64;
}

/// So many of the newest values, the oldest of them first.
pub(super) fn newest(set: &[u64], most: u16) -> impl Iterator<Item = u64> {
    let (entries, _) = set[1..].as_chunks::<ENTRY>();
    let count = (set[0] as usize).min(usize::from(most));
    entries[..count].iter().rev().map(|entry| entry[1])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOST: u16 = 7;

    fn listed(set: &[u64], most: u16) -> Vec<u64> {
        newest(set, most).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        /// Events have their number as value; of the same time, those of lesser numbers come first.
        #[test]
        fn is_the_newest_in_order_however_it_comes_about(
            times in prop::collection::vec(-4i64..4, 0..40),
            spread in prop_oneof![Just(1i64), Just(1 << 40)],
            parts in prop::collection::vec(0usize..4, 40),
            backwards in any::<bool>(),
        ) {
            let events: Vec<(i64, u64)> = times.iter().map(|time| time * spread).zip(1u64..).collect();
            let mut sorted = events.clone();
            sorted.sort_by_key(|&(time, _)| time);
            let expected = |most: usize| -> Vec<u64> {
                sorted[sorted.len().saturating_sub(most)..].iter().map(|(_, value)| *value).collect()
            };
            // Parts of the events, each holding events of instants of its own or all of them of one order.
            let mut whole = [0u64; words(MOST)];
            if backwards {
                events.iter().rev().for_each(|&(time, value)| add::<false>(&mut whole, time, value));
            } else {
                events.iter().for_each(|&(time, value)| add::<true>(&mut whole, time, value));
            }
            let mut ordered = [[0u64; words(MOST)]; 4];
            for (at, &(time, value)) in events.iter().enumerate() {
                // The parts follow one another, so that of the same time those of the earlier part come first.
                let part = at * 4 / events.len();
                add::<true>(&mut ordered[part], time, value);
            }
            let mut united = ordered[3];
            ordered[..3].iter().rev().for_each(|part| unite(&mut united, part));
            // And parts of different times, in any order.
            let mut by_time = [[0u64; words(MOST)]; 4];
            for &(time, value) in &events {
                add::<true>(&mut by_time[parts[(time / spread + 4) as usize]], time, value);
            }
            let mut mixed = by_time[2];
            [1, 3, 0].iter().for_each(|&part: &usize| unite(&mut mixed, &by_time[part]));
            for most in [1, 3, MOST] {
                let expected = expected(usize::from(most));
                prop_assert_eq!(listed(&whole, most), expected.clone());
                prop_assert_eq!(listed(&united, most), expected.clone());
                prop_assert_eq!(listed(&mixed, most), expected);
            }
            prop_assert_eq!(&whole, &united);
            prop_assert_eq!(whole, mixed);
        }
    }
}
