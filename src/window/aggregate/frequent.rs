//! The most frequent values of few distinct ones.
//!
//! Values are told apart by the hashes of `distinct`. Up to [`EXACT`] of them are counted; beyond there is no answer, for what
//! is cheap and then still finds the frequent ones depends on the order in which values come. What the words hold depends
//! on the events alone, as it does there.
//!
//! | words | content |
//! |---|---|
//! | 1 | number of values, or [`TOO_MANY`] |
//! | 4 · 128 | for each value, ascending by hash: hash, value as in a row, number of events, time of the newest; then zeros |

/// So many distinct values are counted.
pub(in crate::window) const EXACT: usize = 128;

/// Words of a value: hash, value, number of events, time of the newest.
const ENTRY: usize = 4;

/// Words of a set.
pub(super) const WORDS: usize = 1 + ENTRY * EXACT;

/// In the place of the number of values: there were more than [`EXACT`].
const TOO_MANY: u64 = u64::MAX;

/// The words that hold values.
pub(super) fn value_words() -> impl Iterator<Item = usize> {
    (0..EXACT).map(|entry| 1 + ENTRY * entry + 1)
}

/// Adds an event.
pub(super) fn add(set: &mut [u64], hash: u64, value: u64, time: i64) {
    include(set, &[hash, value, 1, time as u64]);
}

/// Adds all events of another set.
pub(super) fn unite(set: &mut [u64], other: &[u64]) {
    if other[0] == TOO_MANY {
        overflow(set);
        return;
    }
    let (entries, _) = other[1..].as_chunks();
    entries[..other[0] as usize].iter().for_each(|entry| include(set, entry));
}

/// The value that is the `rank`-th most frequent, from 1; of equally frequent ones the one with the newer event comes first, of
/// the same instant the one with the lesser hash. `None` where there are too few values, or too many.
pub(super) fn ranked(set: &[u64], rank: u8) -> Option<u64> {
    let (entries, _) = set[1..].as_chunks::<ENTRY>();
    let entries = entries.get(..usize::try_from(set[0]).ok()?)?;
    let order = |&[hash, _, count, newest]: &[u64; ENTRY]| (count, newest as i64, !hash);
    let mut found: Option<&[u64; ENTRY]> = None;
    for _ in 0..rank {
        let rest = entries.iter().filter(|entry| found.is_none_or(|found| order(entry) < order(found)));
        found = Some(rest.max_by_key(|entry| order(entry))?);
    }
    found.map(|entry| entry[1])
}

fn include(set: &mut [u64], entry: &[u64; ENTRY]) {
    if set[0] == TOO_MANY {
        return;
    }
    let count = set[0] as usize;
    let (entries, _) = set[1..WORDS].as_chunks_mut::<ENTRY>();
    let &[hash, _, events, newest] = entry;
    match entries[..count].binary_search_by_key(&hash, |known| known[0]) {
        Ok(at) => {
            entries[at][2] += events;
            entries[at][3] = (entries[at][3] as i64).max(newest as i64) as u64;
        }
        Err(_) if count == EXACT => overflow(set),
        Err(at) => {
            entries.copy_within(at..count, at + 1);
            entries[at] = *entry;
            set[0] += 1;
        }
    }
}

fn overflow(set: &mut [u64]) {
    set[..WORDS].fill(0);
    set[0] = TOO_MANY;
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::window::aggregate::distinct::hash_word;

    fn set(events: &[(u64, i64)]) -> [u64; WORDS] {
        let mut set = [0; WORDS];
        events.iter().for_each(|&(value, time)| add(&mut set, hash_word(value), value, time));
        set
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn is_the_same_however_it_comes_about(
            most in prop_oneof![Just(6u64), Just(128), Just(200)],
            parts in prop::collection::vec(prop::collection::vec((any::<u64>(), -20i64..20), 0..200), 1..5),
            order in any::<prop::sample::Index>(),
        ) {
            let parts: Vec<Vec<(u64, i64)>> = parts
                .into_iter()
                .map(|part| part.into_iter().map(|(value, time)| (value % most, time)).collect())
                .collect();
            let all = parts.concat();
            let whole = set(&all);
            let mut united = [0; WORDS];
            let start = order.index(parts.len());
            for part in parts[start..].iter().chain(&parts[..start]) {
                let reversed: Vec<(u64, i64)> = part.iter().rev().copied().collect();
                unite(&mut united, &set(&reversed));
            }
            prop_assert_eq!(united, whole);
            let mut counts: HashMap<u64, (usize, i64)> = HashMap::new();
            for (value, time) in all {
                let (count, newest) = counts.entry(value).or_insert((0, i64::MIN));
                (*count, *newest) = (*count + 1, time.max(*newest));
            }
            let mut expected: Vec<u64> = counts.keys().copied().collect();
            expected.sort_by_key(|value| (Reverse(counts[value]), hash_word(*value)));
            if expected.len() > EXACT {
                expected.clear();
            }
            for rank in 1..=5 {
                prop_assert_eq!(ranked(&whole, rank), expected.get(usize::from(rank) - 1).copied());
            }
        }
    }
}
