//! Sums of floats in twice the precision of a float, so that a sum does not depend on how its terms were grouped.
//!
//! A value is the unevaluated sum of two floats, the second at most half a unit in the last place of the first: 106 bits.
//! Adding is exact while all terms are multiples of some *u* and the sum stays below 2¹⁰⁴·u: amounts in cents, sensor
//! readings and most else, whose grouping then cannot matter at all. Otherwise the relative error of one addition is
//! below 2⁻¹⁰⁴ (of the terms, where they cancel), and two groupings round to different floats about once in 2⁵⁰ sums.
//!
//! The algorithms are Knuth's two-sum, Dekker's product (no fused multiply-add, which not every machine has) and the
//! accurate addition of Hida, Li and Bailey, "Library for Double-Double and Quad-Double Arithmetic", 2007.

const TWO_POW_64: f64 = (1u128 << 64) as f64;

/// The unevaluated sum of two floats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct DoubleDouble {
    /// The sum, rounded to a float. Not finite once the sum has left the range of floats.
    pub high: f64,
    /// What the rounding left over.
    pub low: f64,
}

impl DoubleDouble {
    pub const ZERO: Self = Self { high: 0.0, low: 0.0 };

    /// An integer, to 106 bits.
    pub fn from_i128(value: i128) -> Self {
        let magnitude = Self::from_u128(value.unsigned_abs());
        if value < 0 { Self { high: -magnitude.high, low: -magnitude.low } } else { magnitude }
    }

    /// An integer, to 106 bits.
    pub fn from_u128(value: u128) -> Self {
        // The upper and the lower 64 bits are each exact as the sum of two floats.
        let (upper, lower) = ((value >> 64) as u64, value as u64);
        let halves = [(upper >> 32) << 32, upper & 0xffff_ffff].map(|part| part as f64 * TWO_POW_64);
        let mut sum = Self { high: halves[0], low: 0.0 }.plus(halves[1]);
        for part in [(lower >> 32) << 32, lower & 0xffff_ffff] {
            sum = sum.plus(part as f64);
        }
        sum
    }

    /// The square of a float, exactly (unless it leaves the range of floats).
    #[inline]
    pub fn square_of(value: f64) -> Self {
        Self::product(value, value)
    }

    /// The product of two floats, exactly (unless it leaves the range of floats).
    #[inline]
    pub fn product(a: f64, b: f64) -> Self {
        let (high, low) = two_product(a, b);
        Self { high, low }
    }

    /// Adds a float.
    #[inline]
    pub fn plus(self, value: f64) -> Self {
        let (sum, error) = two_sum(self.high, value);
        let (high, low) = quick_two_sum(sum, error + self.low);
        Self { high, low }
    }

    /// Adds another.
    #[inline]
    pub fn plus_double(self, other: Self) -> Self {
        let (high, error) = two_sum(self.high, other.high);
        let (low, low_error) = two_sum(self.low, other.low);
        let (high, low) = quick_two_sum(high, error + low);
        let (high, low) = quick_two_sum(high, low + low_error);
        Self { high, low }
    }

    /// Multiplies with another.
    #[inline]
    pub fn times(self, other: Self) -> Self {
        let (product, error) = two_product(self.high, other.high);
        let (high, low) = quick_two_sum(product, error + (self.high * other.low + self.low * other.high));
        Self { high, low }
    }

    /// Multiplies with a float: exactly where 106 bits hold the product.
    #[inline]
    pub fn times_float(self, factor: f64) -> Self {
        Self::product(self.high, factor).plus_double(Self::product(self.low, factor))
    }

    /// Divides by a float.
    #[inline]
    pub fn divided_by(self, divisor: f64) -> Self {
        // The quotient's correction needs few bits, so that the two divisions need not wait for each other.
        let (first, reciprocal) = (self.high / divisor, 1.0 / divisor);
        let (product, error) = two_product(first, divisor);
        let rest = (self.high - product) - error + self.low;
        let (high, low) = quick_two_sum(first, rest * reciprocal);
        Self { high, low }
    }

    /// Negated.
    pub fn negated(self) -> Self {
        Self { high: -self.high, low: -self.low }
    }
}

/// `a + b` and its rounding error.
#[inline]
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_part = sum - a;
    (sum, (a - (sum - b_part)) + (b - b_part))
}

/// `a + b` and its rounding error, for |a| ≥ |b|.
#[inline]
fn quick_two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    (sum, b - (sum - a))
}

/// `a · b` and its rounding error.
#[inline]
fn two_product(a: f64, b: f64) -> (f64, f64) {
    let product = a * b;
    let ((a_high, a_low), (b_high, b_low)) = (split(a), split(b));
    (product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low)
}

/// Two halves of 26 bits each.
#[inline]
fn split(a: f64) -> (f64, f64) {
    let scaled = 134_217_729.0 * a;
    let high = scaled - (scaled - a);
    (high, a - high)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn sum(terms: impl IntoIterator<Item = f64>) -> DoubleDouble {
        terms.into_iter().fold(DoubleDouble::ZERO, DoubleDouble::plus)
    }

    #[rstest]
    #[case(&[0.1; 10], 1.0)]
    #[case(&[1e16, 1.0, -1e16], 1.0)]
    #[case(&[1e30, 1.0, -1e30, 2.0], 3.0)]
    #[case(&[f64::MAX, -f64::MAX, 5.0], 5.0)]
    #[case(&[], 0.0)]
    fn keeps_what_floats_lose(#[case] terms: &[f64], #[case] expected: f64) {
        assert_eq!(sum(terms.iter().copied()).high, expected);
    }

    #[test]
    fn leaves_the_range_of_floats_as_something_not_finite() {
        assert!(!sum([f64::MAX, f64::MAX]).high.is_finite());
        assert!(!sum([f64::MAX, f64::MAX, -f64::MAX]).high.is_finite());
        assert!(!DoubleDouble::square_of(1e200).high.is_finite());
    }

    #[rstest]
    #[case(0)]
    #[case(1)]
    #[case(u128::from(u64::MAX))]
    #[case((1 << 106) - 1)]
    #[case(((1 << 53) - 1) << 74)]
    fn holds_integers_of_106_bits_exactly(#[case] value: u128) {
        let double = DoubleDouble::from_u128(value);
        assert_eq!(double.high as i128 + double.low as i128, value as i128);
        let negative = DoubleDouble::from_i128(-(value as i128));
        assert_eq!((negative.high, negative.low), (-double.high, -double.low));
    }

    #[test]
    fn divides_to_the_nearest_float() {
        assert_eq!(sum([1e16, 1.0, 1.0, 1.0]).divided_by(4.0).high, 2.5e15 + 0.75);
        assert_eq!(DoubleDouble { high: 1.0, low: 0.0 }.divided_by(3.0).high, 1.0 / 3.0);
    }

    proptest! {
        #[test]
        fn does_not_depend_on_order_or_grouping(cents in prop::collection::vec(-1_000_000_000_000i64..1_000_000_000_000, 0..200), cut in 0usize..200) {
            let amounts: Vec<f64> = cents.iter().map(|&cents| cents as f64 / 100.0).collect();
            let forward = sum(amounts.iter().copied());
            let backward = sum(amounts.iter().rev().copied());
            let (left, right) = amounts.split_at(cut.min(amounts.len()));
            let grouped = sum(left.iter().copied()).plus_double(sum(right.iter().copied()));
            prop_assert_eq!(forward, backward);
            prop_assert_eq!(forward, grouped);
        }

        #[test]
        fn squares_exactly(value in -(1i64 << 53)..(1i64 << 53)) {
            let square = DoubleDouble::square_of(value as f64);
            prop_assert_eq!(square.high as i128 + square.low as i128, i128::from(value) * i128::from(value));
        }
    }
}
