//! Instants: from the numbers and texts that producers write to milliseconds since 1970 UTC.

use crate::config::plan::TimeUnit;

/// First instant that may be an event time: 0001-01-01T00:00:00Z.
pub const EARLIEST: i64 = -62_135_596_800_000;
/// Last instant that may be an event time: 9999-12-31T23:59:59.999Z.
pub const LATEST: i64 = 253_402_300_799_999;

const MS_PER_DAY: i64 = 86_400_000;

/// Milliseconds of `value` counted in `unit`, rounded down, or `None` where that overflows or the unit is not a number's.
pub fn from_integer(value: i64, unit: TimeUnit) -> Option<i64> {
    match unit {
        TimeUnit::S => value.checked_mul(1000),
        TimeUnit::Ms => Some(value),
        TimeUnit::Us => Some(value.div_euclid(1_000)),
        TimeUnit::Ns => Some(value.div_euclid(1_000_000)),
        TimeUnit::Iso => None,
    }
}

/// Milliseconds of `value` counted in `unit`, rounded down, or `None` where that overflows or the unit is not a number's.
///
/// The value is first rounded to whole microseconds, which is finer than a float of today's dates can tell apart, so that
/// `1700000000.123` seconds are 1 700 000 000 123 ms although the float lies just below.
pub fn from_float(value: f64, unit: TimeUnit) -> Option<i64> {
    let micros = match unit {
        TimeUnit::S => value * 1e6,
        TimeUnit::Ms => value * 1e3,
        TimeUnit::Us => value,
        TimeUnit::Ns => value / 1e3,
        TimeUnit::Iso => return None,
    }
    .round();
    // Above 2^63 the cast below would saturate.
    (micros.abs() < 9.2e18).then(|| (micros as i64).div_euclid(1_000))
}

/// The inverse of [`from_integer`] for a whole number of milliseconds; for `Iso` the milliseconds themselves.
/// `None` where that overflows.
pub fn to_integer(ms: i64, unit: TimeUnit) -> Option<i64> {
    match unit {
        TimeUnit::S => Some(ms.div_euclid(1_000)),
        TimeUnit::Ms | TimeUnit::Iso => Some(ms),
        TimeUnit::Us => ms.checked_mul(1_000),
        TimeUnit::Ns => ms.checked_mul(1_000_000),
    }
}

/// True where `ms` may be an event time.
pub fn is_plausible(ms: i64) -> bool {
    (EARLIEST..=LATEST).contains(&ms)
}

/// The unit by which `value` would lie between 1990 and 2100, if there is one: for error messages.
pub fn likely_unit(value: i64) -> Option<&'static str> {
    const FROM: i64 = 631_152_000_000;
    const TO: i64 = 4_102_444_800_000;
    [(TimeUnit::S, "s"), (TimeUnit::Ms, "ms"), (TimeUnit::Us, "us"), (TimeUnit::Ns, "ns")]
        .into_iter()
        .find(|(unit, _)| from_integer(value, *unit).is_some_and(|ms| (FROM..TO).contains(&ms)))
        .map(|(_, name)| name)
}

/// `ms` as RFC 3339 text with milliseconds and `Z`. Only for instants within [`EARLIEST`] and [`LATEST`].
pub fn to_iso(ms: i64) -> String {
    let (year, month, day) = civil_from_days(ms.div_euclid(MS_PER_DAY));
    let rest = ms.rem_euclid(MS_PER_DAY);
    let (hour, minute, second, milli) = (rest / 3_600_000, rest / 60_000 % 60, rest / 1_000 % 60, rest % 1_000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
}

/// Reads RFC 3339 text (`2024-05-01T12:30:00.25+02:00`; `T` may be a space; seconds and the offset may be missing, no
/// offset means UTC) or a date (`2024-05-01`, its midnight UTC). Digits beyond milliseconds are dropped. `None` for
/// anything else, and for days and hours that do not exist.
pub fn parse_iso(text: &str) -> Option<i64> {
    let mut at = Cursor { bytes: text.as_bytes() };
    let year = at.digits(4)?;
    at.expect(b'-')?;
    let month = at.digits(2)?;
    at.expect(b'-')?;
    let day = at.digits(2)?;
    if year == 0 || !(1..=12).contains(&month) || day == 0 || day > days_in_month(year, month) {
        return None;
    }
    let midnight = days_from_civil(year, month, day) * MS_PER_DAY;
    if at.bytes.is_empty() {
        return Some(midnight);
    }
    if !matches!(at.next()?, b'T' | b't' | b' ') {
        return None;
    }
    let hour = at.digits(2)?;
    at.expect(b':')?;
    let minute = at.digits(2)?;
    let mut ms = 0;
    let mut second = 0;
    if at.take(b':') {
        second = at.digits(2)?;
        if at.take(b'.') || at.take(b',') {
            ms = at.fraction()?;
        }
    }
    // 60 is a leap second, which counts as the first second of the next minute.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let offset = at.offset()?;
    Some(midnight + (hour * 60 + minute - offset) * 60_000 + second * 1_000 + ms)
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl Cursor<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.bytes.first() == Some(&byte);
        if found {
            self.bytes = &self.bytes[1..];
        }
        found
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.take(byte).then_some(())
    }

    fn digits(&mut self, count: usize) -> Option<i64> {
        let (digits, rest) = self.bytes.split_at_checked(count)?;
        self.bytes = rest;
        digits.iter().try_fold(0, |number, &d| d.is_ascii_digit().then(|| number * 10 + i64::from(d - b'0')))
    }

    /// At least one digit; those after the third are dropped.
    fn fraction(&mut self) -> Option<i64> {
        let length = self.bytes.iter().take_while(|b| b.is_ascii_digit()).count();
        if length == 0 {
            return None;
        }
        let (digits, rest) = self.bytes.split_at(length);
        self.bytes = rest;
        Some((0..3).fold(0, |ms, i| ms * 10 + digits.get(i).map_or(0, |d| i64::from(d - b'0'))))
    }

    /// Minutes east of UTC; must be the end of the text.
    fn offset(&mut self) -> Option<i64> {
        let sign = match self.next() {
            None => return Some(0),
            Some(b'Z' | b'z') => return self.bytes.is_empty().then_some(0),
            Some(b'+') => 1,
            Some(b'-') => -1,
            Some(_) => return None,
        };
        let hours = self.digits(2)?;
        self.take(b':');
        let minutes = self.digits(2)?;
        (hours < 24 && minutes < 60 && self.bytes.is_empty()).then_some(sign * (hours * 60 + minutes))
    }
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        _ => 31,
    }
}

/// Days from 1970-01-01 in the proleptic Gregorian calendar. Counts in eras of 400 years (146 097 days) that start on a
/// 1 March, so that the leap day is the last of its year.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// The inverse of [`days_from_civil`].
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = (shifted_month + 2) % 12 + 1;
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::{DateTime, SecondsFormat, TimeZone, Utc};
    use proptest::prelude::*;
    use rstest::rstest;

    #[rstest]
    #[case("1970-01-01", Some(0))]
    #[case("1997-01-01", Some(852_076_800_000))]
    #[case("2024-02-29", Some(1_709_164_800_000))]
    #[case("2023-02-29", None)]
    #[case("1900-02-29", None)]
    #[case("2000-02-29", Some(951_782_400_000))]
    #[case("2024-04-31", None)]
    #[case("2024-13-01", None)]
    #[case("2024-00-01", None)]
    #[case("2024-01-00", None)]
    #[case("0000-01-01", None)]
    #[case("0001-01-01", Some(EARLIEST))]
    #[case("9999-12-31T23:59:59.999Z", Some(LATEST))]
    #[case("2024-05-01T12:30:00Z", Some(1_714_566_600_000))]
    #[case("2024-05-01t12:30:00z", Some(1_714_566_600_000))]
    #[case("2024-05-01 12:30:00", Some(1_714_566_600_000))]
    #[case("2024-05-01T12:30", Some(1_714_566_600_000))]
    #[case("2024-05-01T12:30Z", Some(1_714_566_600_000))]
    #[case("2024-05-01T14:30:00+02:00", Some(1_714_566_600_000))]
    #[case("2024-05-01T14:30:00+0200", Some(1_714_566_600_000))]
    #[case("2024-05-01T07:00:00-05:30", Some(1_714_566_600_000))]
    #[case("2024-05-01T12:30:00.25Z", Some(1_714_566_600_250))]
    #[case("2024-05-01T12:30:00,25Z", Some(1_714_566_600_250))]
    #[case("2024-05-01T12:30:00.999999999Z", Some(1_714_566_600_999))]
    #[case("2016-12-31T23:59:60Z", Some(1_483_228_800_000))]
    #[case("2024-05-01T12:30:00.Z", None)]
    #[case("2024-05-01T24:00:00Z", None)]
    #[case("2024-05-01T12:60:00Z", None)]
    #[case("2024-05-01T12:30:61Z", None)]
    #[case("2024-05-01T12:30:00Zx", None)]
    #[case("2024-05-01T12:30:00+2", None)]
    #[case("2024-05-01T12:30:00+24:00", None)]
    #[case("2024-05-01T", None)]
    #[case("2024-5-1", None)]
    #[case("2024-05-01x", None)]
    #[case("", None)]
    #[case("yesterday", None)]
    #[case("+024-05-01", None)]
    #[case("２０２４-05-01", None)]
    fn reads_iso_text(#[case] text: &str, #[case] expected: Option<i64>) {
        assert_eq!(parse_iso(text), expected);
    }

    #[rstest]
    #[case(1_700_000_000, TimeUnit::S, Some(1_700_000_000_000))]
    #[case(i64::MAX, TimeUnit::S, None)]
    #[case(-1, TimeUnit::Us, Some(-1))]
    #[case(-1, TimeUnit::Ns, Some(-1))]
    #[case(1_999, TimeUnit::Us, Some(1))]
    #[case(i64::MIN, TimeUnit::Ms, Some(i64::MIN))]
    #[case(5, TimeUnit::Iso, None)]
    fn converts_integers(#[case] value: i64, #[case] unit: TimeUnit, #[case] expected: Option<i64>) {
        assert_eq!(from_integer(value, unit), expected);
    }

    #[rstest]
    #[case(1_700_000_000.123, TimeUnit::S, Some(1_700_000_000_123))]
    #[case(1_700_000_000_123.0, TimeUnit::Ms, Some(1_700_000_000_123))]
    #[case(1_700_000_000_123.9, TimeUnit::Ms, Some(1_700_000_000_123))]
    #[case(-0.0005, TimeUnit::S, Some(-1))]
    #[case(1e300, TimeUnit::S, None)]
    #[case(f64::NAN, TimeUnit::S, None)]
    #[case(f64::INFINITY, TimeUnit::Ns, None)]
    #[case(1.0, TimeUnit::Iso, None)]
    fn converts_floats(#[case] value: f64, #[case] unit: TimeUnit, #[case] expected: Option<i64>) {
        assert_eq!(from_float(value, unit), expected);
    }

    #[rstest]
    #[case(1_700_000_000, Some("s"))]
    #[case(1_700_000_000_000, Some("ms"))]
    #[case(1_700_000_000_000_000, Some("us"))]
    #[case(1_700_000_000_000_000_000, Some("ns"))]
    #[case(3, None)]
    fn guesses_units(#[case] value: i64, #[case] expected: Option<&str>) {
        assert_eq!(likely_unit(value), expected);
    }

    proptest! {
        #[test]
        fn agrees_with_chrono(ms in EARLIEST..=LATEST, minutes in -23 * 60..23 * 60) {
            let instant = Utc.timestamp_millis_opt(ms).unwrap();
            prop_assert_eq!(to_iso(ms), instant.to_rfc3339_opts(SecondsFormat::Millis, true));
            prop_assert_eq!(parse_iso(&to_iso(ms)), Some(ms));
            let zone = chrono::FixedOffset::east_opt(minutes * 60).unwrap();
            let local = instant.with_timezone(&zone).to_rfc3339();
            // chrono writes years outside of 0..=9999 with a sign, which RFC 3339 does not know.
            if local.as_bytes()[0].is_ascii_digit() && &local[..4] != "0000" {
                prop_assert_eq!(parse_iso(&local), Some(ms));
            }
        }

        #[test]
        fn accepts_only_what_chrono_accepts(text in "[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-6][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-][0-2][0-9]:[0-6][0-9])") {
            let expected = DateTime::parse_from_rfc3339(&text).ok().map(|t| t.timestamp_millis());
            if !text.starts_with("0000") {
                prop_assert_eq!(parse_iso(&text), expected);
            }
        }

        #[test]
        fn never_panics(text in "\\PC{0,40}") {
            let _ = parse_iso(&text);
        }
    }
}
