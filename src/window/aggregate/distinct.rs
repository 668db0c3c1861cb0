//! Numbers of distinct values: exact up to a limit, estimated beyond.
//!
//! Values are told apart by 64-bit hashes ([`hash_word`], [`hash_text`]). Up to [`EXACT`] of them are kept as they are. More
//! than that become the registers of a HyperLogLog of 2¹¹ registers, whose estimate has a standard error of 1.04/√2¹¹ = 2.3 %.
//! What the words hold depends on the set of values alone, not on how it came about: the same values give the same words in
//! whatever order and grouping.
//!
//! | words | content |
//! |---|---|
//! | 1 | number of hashes, or [`REGISTERS`] |
//! | 256 | the hashes, ascending, then zeros; or a byte a register, eight to a word, the first the lowest |
//!
//! P. Flajolet, É. Fusy, O. Gandouet, F. Meunier, "HyperLogLog", 2007; the estimator is that of O. Ertl, "New cardinality
//! estimation algorithms for HyperLogLog sketches", 2017, algorithm 6, which needs no tables of corrections.

/// So many distinct values are counted exactly.
pub(in crate::window) const EXACT: usize = 256;

/// Words of a set.
pub(super) const WORDS: usize = 1 + EXACT;

/// In the place of the number of hashes: the words are registers.
const REGISTERS: u64 = u64::MAX;

/// Bits of a hash that choose its register: 2¹¹ bytes are 256 words.
const INDEX_BITS: u32 = 11;

/// Largest value of a register less one: bits of a hash that are left.
const RANK_BITS: u32 = 64 - INDEX_BITS;

/// The hash of a 64-bit value. Different values have different hashes: the finaliser of MurmurHash3 can be undone.
#[inline]
pub(in crate::window) fn hash_word(value: u64) -> u64 {
    let mut hash = value ^ 0x9e37_79b9_7f4a_7c15;
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

/// The hash of a text: half of its 128-bit MurmurHash3.
pub(in crate::window) fn hash_text(text: &str) -> u64 {
    murmur3::murmur3_x64_128(&mut text.as_bytes(), 0).expect("reading from memory cannot fail") as u64
}

/// Adds a value by its hash.
pub(super) fn add(set: &mut [u64], hash: u64) {
    let (head, words) = split(set);
    if *head == REGISTERS {
        raise(words, hash);
        return;
    }
    let count = *head as usize;
    let Err(at) = words[..count].binary_search(&hash) else { return };
    if count < EXACT {
        words.copy_within(at..count, at + 1);
        words[at] = hash;
        *head += 1;
    } else {
        make_registers(head, words);
        raise(words, hash);
    }
}

/// Adds all values of another set.
pub(super) fn unite(set: &mut [u64], other: &[u64]) {
    let (head, words) = split(set);
    let (other_head, other) = (other[0], &other[1..WORDS]);
    if other_head == REGISTERS {
        if *head != REGISTERS {
            make_registers(head, words);
        }
        words.iter_mut().zip(other).for_each(|(word, other)| *word = greater_bytes(*word, *other));
    } else if *head == REGISTERS {
        other[..other_head as usize].iter().for_each(|&hash| raise(words, hash));
    } else if *head == 0 {
        *head = other_head;
        words.copy_from_slice(other);
    } else {
        unite_hashes(head, words, &other[..other_head as usize]);
    }
}

fn unite_hashes(head: &mut u64, words: &mut [u64; EXACT], other: &[u64]) {
    let own = *words;
    let (mut left, mut right) = (&own[..*head as usize], other);
    let mut count = 0;
    while let Some(next) = left.first().into_iter().chain(right.first()).min().copied() {
        if count == EXACT {
            *words = own;
            make_registers(head, words);
            other.iter().for_each(|&hash| raise(words, hash));
            return;
        }
        words[count] = next;
        count += 1;
        left = &left[usize::from(left.first() == Some(&next))..];
        right = &right[usize::from(right.first() == Some(&next))..];
    }
    *head = count as u64;
}

/// Number of distinct values.
pub(super) fn count(set: &[u64]) -> u64 {
    if set[0] != REGISTERS {
        return set[0];
    }
    // It is known to be more than what can be counted exactly.
    (estimate(&set[1..WORDS]).round() as u64).max(EXACT as u64 + 1)
}

fn split(set: &mut [u64]) -> (&mut u64, &mut [u64; EXACT]) {
    let (head, words) = set.split_first_mut().expect("a set has a head");
    (head, words.first_chunk_mut().expect("a set has its words"))
}

fn make_registers(head: &mut u64, words: &mut [u64; EXACT]) {
    let hashes = std::mem::replace(words, [0; EXACT]);
    hashes[..*head as usize].iter().for_each(|&hash| raise(words, hash));
    *head = REGISTERS;
}

/// Adds a hash to the registers: its first bits choose one, the position of the first one among the others is its value.
#[inline]
fn raise(words: &mut [u64; EXACT], hash: u64) {
    let index = (hash >> RANK_BITS) as usize;
    let rank = u64::from((hash << INDEX_BITS).leading_zeros().min(RANK_BITS) + 1);
    let (word, shift) = (&mut words[index / 8], 8 * (index % 8));
    if (*word >> shift & 0xff) < rank {
        *word = *word & !(0xff << shift) | rank << shift;
    }
}

/// The greater of each two bytes, all of which are below 128.
#[inline]
fn greater_bytes(a: u64, b: u64) -> u64 {
    const TOPS: u64 = 0x8080_8080_8080_8080;
    let not_less = ((a | TOPS) - b) & TOPS;
    let mask = (not_less >> 7) * 0xff;
    a & mask | b & !mask
}

fn estimate(words: &[u64]) -> f64 {
    let mut counts = [0u32; RANK_BITS as usize + 2];
    words.iter().flat_map(|word| word.to_le_bytes()).for_each(|register| counts[usize::from(register)] += 1);
    let registers = (8 * words.len()) as f64;
    let (first, last) = (f64::from(counts[0]), f64::from(counts[RANK_BITS as usize + 1]));
    let middle = &counts[1..=RANK_BITS as usize];
    let sum = middle.iter().rev().fold(registers * tau(1.0 - last / registers), |sum, &n| 0.5 * (sum + f64::from(n)));
    registers * registers / (2.0 * std::f64::consts::LN_2 * (sum + registers * sigma(first / registers)))
}

/// x + Σ x^(2^k) 2^(k−1) over k ≥ 1: the part of the registers without any value.
fn sigma(mut x: f64) -> f64 {
    let (mut sum, mut weight) = (x, 1.0);
    if x == 1.0 {
        return f64::INFINITY;
    }
    loop {
        x *= x;
        let next = sum + x * weight;
        if next == sum {
            return sum;
        }
        (sum, weight) = (next, 2.0 * weight);
    }
}

/// (1 − x − Σ (1 − x^(2^−k))² 2^−k over k ≥ 1) / 3: the part of the registers that are full.
fn tau(mut x: f64) -> f64 {
    if x == 0.0 || x == 1.0 {
        return 0.0;
    }
    let (mut sum, mut weight) = (1.0 - x, 1.0);
    loop {
        x = x.sqrt();
        weight *= 0.5;
        let next = sum - (1.0 - x) * (1.0 - x) * weight;
        if next == sum {
            return sum / 3.0;
        }
        sum = next;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn set(values: impl IntoIterator<Item = u64>) -> [u64; WORDS] {
        let mut set = [0; WORDS];
        values.into_iter().for_each(|value| add(&mut set, hash_word(value)));
        set
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn is_the_same_however_it_comes_about(
            parts in prop::collection::vec(prop::collection::vec(0u64..600, 0..300), 1..5),
            order in any::<prop::sample::Index>(),
        ) {
            let values: Vec<u64> = parts.concat();
            let whole = set(values.iter().copied());
            let mut united = [0; WORDS];
            let start = order.index(parts.len());
            for part in parts[start..].iter().chain(&parts[..start]) {
                unite(&mut united, &set(part.iter().rev().copied()));
            }
            prop_assert_eq!(united, whole);
            let exact = values.iter().collect::<HashSet<_>>().len();
            if exact <= EXACT {
                prop_assert_eq!(count(&whole), exact as u64);
            } else {
                // Five standard errors.
                prop_assert!((count(&whole) as f64 / exact as f64 - 1.0).abs() < 0.115, "{} of {exact}", count(&whole));
            }
        }
    }

    /// The mean and the spread of the relative error over 200 sets, against what theory says of 2¹¹ registers.
    #[test]
    fn errs_as_much_as_theory_says() {
        for size in [300u64, 3_000, 10_000, 100_000] {
            let errors: Vec<f64> = (0..200u64)
                .map(|round| count(&set((0..size).map(|at| round << 32 | at))) as f64 / size as f64 - 1.0)
                .collect();
            let mean = errors.iter().sum::<f64>() / 200.0;
            let spread = (errors.iter().map(|error| error * error).sum::<f64>() / 200.0).sqrt();
            assert!(mean.abs() < 0.006 && spread < 0.027, "{size}: mean error {mean}, standard error {spread}");
            assert!(size < 3_000 || spread > 0.015, "{size}: {spread} is too good to be true");
        }
    }

    #[test]
    fn texts_have_hashes_of_their_own() {
        let hashes: HashSet<u64> = (0..100_000).map(|at| hash_text(&format!("customer {at}"))).collect();
        assert_eq!(hashes.len(), 100_000);
        assert_eq!(hash_text(""), 0);
    }

    #[test]
    fn compares_bytes_in_words() {
        let (a, b) = (0x7f00_0102_0304_3605, 0x0000_0201_0405_7f7f);
        assert_eq!(greater_bytes(a, b), 0x7f00_0202_0405_7f7f);
    }
}
