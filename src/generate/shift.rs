//! Changes injected into the stream from some day on.

use std::str::FromStr;

use super::DAY_MS;

/// What a shift multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantity {
    /// Amounts of purchases: prices rise or fall. Customers who buy cheap things leave sooner when they rise.
    Amount,
    /// Logins per day, of everyone, without anything else changing: an app that logs people out, or no longer does.
    Logins,
    /// Support contacts per day. Contacts annoy, so churn follows.
    Support,
    /// The rate at which active customers begin to leave.
    Churn,
}

impl Quantity {
    const NAMES: [(&'static str, Self); 4] =
        [("amount", Self::Amount), ("logins", Self::Logins), ("support", Self::Support), ("churn", Self::Churn)];
}

/// From some day on, a quantity is multiplied by a factor.
///
/// Written `QUANTITY*FACTOR@DAY` or `QUANTITY*FACTOR@DAY..DAY`, days counted from the stream's start: `amount*1.33@120`,
/// `support*4@90..97.5`.
#[derive(Debug, Clone, PartialEq)]
pub struct Shift {
    /// What changes.
    pub quantity: Quantity,
    /// The factor, greater than 0.
    pub factor: f64,
    /// Milliseconds after the stream's start from which on it holds (inclusive).
    pub from: i64,
    /// Milliseconds after the stream's start until which it holds (exclusive); `None` is for ever.
    pub until: Option<i64>,
}

/// Why a text is no shift.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ShiftError {
    /// It lacks `*` or `@`.
    #[error("`{0}` is not a shift: expected QUANTITY*FACTOR@DAY or QUANTITY*FACTOR@DAY..DAY, such as amount*1.33@120")]
    Form(String),
    /// It names something that does not shift.
    #[error("`{0}` does not shift: expected amount, logins, support or churn")]
    Quantity(String),
    /// The factor is not a positive number.
    #[error("`{0}` is not a factor: expected a number greater than 0")]
    Factor(String),
    /// The days are not numbers from 0 on, or end before they begin.
    #[error("`{0}` is not a day or a range of days: expected 120 or 90..97.5, counted from the stream's start")]
    Days(String),
}

impl FromStr for Shift {
    type Err = ShiftError;

    fn from_str(text: &str) -> Result<Self, ShiftError> {
        let form = || ShiftError::Form(text.to_owned());
        let (what, days) = text.split_once('@').ok_or_else(form)?;
        let (name, factor_text) = what.split_once('*').ok_or_else(form)?;
        let quantity = Quantity::NAMES
            .into_iter()
            .find_map(|(n, quantity)| (n == name.trim()).then_some(quantity))
            .ok_or_else(|| ShiftError::Quantity(name.trim().to_owned()))?;
        let factor = match factor_text.trim().parse::<f64>() {
            Ok(factor) if factor.is_finite() && factor > 0.0 => factor,
            _ => return Err(ShiftError::Factor(factor_text.trim().to_owned())),
        };
        let day = |day: &str| match day.trim().parse::<f64>() {
            Ok(day) if (0.0..=1e6).contains(&day) => Ok((day * DAY_MS as f64) as i64),
            _ => Err(ShiftError::Days(days.trim().to_owned())),
        };
        let (from, until) = match days.split_once("..") {
            Some((from, until)) => (day(from)?, Some(day(until)?)),
            None => (day(days)?, None),
        };
        if until.is_some_and(|until| until <= from) {
            return Err(ShiftError::Days(days.trim().to_owned()));
        }
        Ok(Self { quantity, factor, from, until })
    }
}

/// The factors in force at some instant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Levels {
    pub(super) amount: f64,
    pub(super) logins: f64,
    pub(super) support: f64,
    pub(super) churn: f64,
    /// The instant at which any of them changes next, milliseconds since 1970 UTC (exclusive end of these levels).
    pub(super) until: i64,
}

impl Levels {
    /// Multiplies the shifts in force at `time`; both instants in milliseconds since 1970 UTC.
    pub(super) fn at(shifts: &[Shift], start: i64, time: i64) -> Self {
        let mut levels = Self { amount: 1.0, logins: 1.0, support: 1.0, churn: 1.0, until: i64::MAX };
        for shift in shifts {
            let from = start + shift.from;
            let until = shift.until.map_or(i64::MAX, |until| start + until);
            if time < from {
                levels.until = levels.until.min(from);
            } else if time < until {
                levels.until = levels.until.min(until);
                *levels.factor(shift.quantity) *= shift.factor;
            }
        }
        levels
    }

    fn factor(&mut self, quantity: Quantity) -> &mut f64 {
        match quantity {
            Quantity::Amount => &mut self.amount,
            Quantity::Logins => &mut self.logins,
            Quantity::Support => &mut self.support,
            Quantity::Churn => &mut self.churn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("amount*1.33@120", Quantity::Amount, 1.33, 120.0, None)]
    #[case(" support * 4 @ 90 .. 97.5 ", Quantity::Support, 4.0, 90.0, Some(97.5))]
    fn reads_shifts(
        #[case] text: &str,
        #[case] quantity: Quantity,
        #[case] factor: f64,
        #[case] from: f64,
        #[case] until: Option<f64>,
    ) {
        let ms = |days: f64| (days * DAY_MS as f64) as i64;
        let expected = Shift { quantity, factor, from: ms(from), until: until.map(ms) };
        assert_eq!(text.parse(), Ok(expected));
    }

    #[rstest::rstest]
    #[case("amount 1.33", ShiftError::Form("amount 1.33".into()))]
    #[case("amount@3", ShiftError::Form("amount@3".into()))]
    #[case("price*2@3", ShiftError::Quantity("price".into()))]
    #[case("amount*-1@3", ShiftError::Factor("-1".into()))]
    #[case("amount*inf@3", ShiftError::Factor("inf".into()))]
    #[case("amount*2@soon", ShiftError::Days("soon".into()))]
    #[case("amount*2@5..4", ShiftError::Days("5..4".into()))]
    fn says_what_is_wrong(#[case] text: &str, #[case] error: ShiftError) {
        assert_eq!(text.parse::<Shift>(), Err(error));
    }

    #[test]
    fn levels_multiply_and_name_their_end() {
        let shifts: Vec<Shift> =
            ["amount*2@1..3", "amount*3@2", "churn*5@0..1"].iter().map(|s| s.parse().unwrap()).collect();
        let at = |day: i64| Levels::at(&shifts, 1000, 1000 + day * DAY_MS);
        assert_eq!((at(0).amount, at(0).churn, at(0).until), (1.0, 5.0, 1000 + DAY_MS));
        assert_eq!((at(1).amount, at(1).churn, at(1).until), (2.0, 1.0, 1000 + 2 * DAY_MS));
        assert_eq!((at(2).amount, at(2).until), (6.0, 1000 + 3 * DAY_MS));
        assert_eq!((at(3).amount, at(3).until), (3.0, i64::MAX));
    }
}
