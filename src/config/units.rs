//! Durations and sizes as texts.

use std::ops::Range;
use std::time::Duration;

/// What is wrong with a duration or size, and where in its text (bytes).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitError {
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub help: &'static str,
    /// Where.
    pub span: Range<usize>,
}

const DURATION_HELP: &str = "write a number and a unit, such as 5ms, 30s, 15m, 1h, 90d or 2w";
const SIZE_HELP: &str = "write a number and a unit, such as 64KiB, 4MiB or 1GiB";
const WINDOW_HELP: &str = "write a whole number and one unit of s, m, h, d, w, such as 15m, 1h or 30d; or lifetime";

/// Longest duration: a thousand years, so that sums with instants fit 64-bit milliseconds.
const MAX_DURATION: Duration = Duration::from_secs(1000 * 365 * 86_400);

/// Parses a duration of one or more parts: `5ms`, `1h30m`, `90d`. Units: us, ms, s, m (minutes), h, d, w.
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    let fail = |message: String, span: Range<usize>| UnitError { message, help: DURATION_HELP, span };
    let mut total = Duration::ZERO;
    let mut at = 0;
    let mut parts = 0;
    while let Some(start) = text[at..].find(|c: char| !c.is_whitespace()).map(|skip| at + skip) {
        let (number, number_end) = digits(text, start)
            .ok_or_else(|| fail(format!("`{text}` is not a duration"), start..next_boundary(text, start)))?;
        let unit_start = number_end + (text[number_end..].len() - text[number_end..].trim_start().len());
        let unit_end = text[unit_start..]
            .find(|c: char| c.is_whitespace() || c.is_ascii_digit())
            .map_or(text.len(), |end| unit_start + end);
        let unit_nanos: u64 = match &text[unit_start..unit_end] {
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" | "min" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "d" => 86_400_000_000_000,
            "w" => 7 * 86_400_000_000_000,
            "" => return Err(fail(format!("`{text}` has no unit"), start..number_end)),
            unit => return Err(fail(format!("unknown unit `{unit}`"), unit_start..unit_end)),
        };
        let nanos = u128::from(number) * u128::from(unit_nanos) + total.as_nanos();
        total = u64::try_from(nanos / 1_000_000_000)
            .ok()
            .map(|seconds| Duration::new(seconds, (nanos % 1_000_000_000) as u32))
            .filter(|total| *total <= MAX_DURATION)
            .ok_or_else(|| fail(format!("`{text}` is longer than a thousand years"), start..unit_end))?;
        at = unit_end;
        parts += 1;
    }
    if parts == 0 { Err(fail("the duration is empty".into(), 0..text.len())) } else { Ok(total) }
}

/// Parses a window's label into its length in milliseconds: a whole number and one unit, or `lifetime` for `None`.
pub fn window(label: &str) -> Result<Option<i64>, UnitError> {
    if label == "lifetime" {
        return Ok(None);
    }
    let fail = |message: String| UnitError { message, help: WINDOW_HELP, span: 0..label.len() };
    let not_a_window = || fail(format!("`{label}` is not a window"));
    let (number, end) = digits(label, 0).ok_or_else(not_a_window)?;
    let unit: u64 = match &label[end..] {
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "w" => 7 * 86_400_000,
        _ => return Err(not_a_window()),
    };
    let length = number
        .checked_mul(unit)
        .filter(|ms| Duration::from_millis(*ms) <= MAX_DURATION)
        .and_then(|ms| i64::try_from(ms).ok())
        .ok_or_else(|| fail(format!("`{label}` is longer than a thousand years")))?;
    if length == 0 || label.starts_with('0') { Err(not_a_window()) } else { Ok(Some(length)) }
}

/// Parses a size in bytes: `4MiB`, `64kB`, `1000`.
pub fn size(text: &str) -> Result<usize, UnitError> {
    let trimmed = text.trim();
    let fail = |message: String| UnitError { message, help: SIZE_HELP, span: 0..text.len() };
    let (number, end) = digits(trimmed, 0).ok_or_else(|| fail(format!("`{text}` is not a size")))?;
    let unit: u64 = match trimmed[end..].trim_start() {
        "" | "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        unit => return Err(fail(format!("unknown unit `{unit}`"))),
    };
    let bytes = number.checked_mul(unit).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| fail(format!("`{text}` is not a size that can be")))
}

/// Writes milliseconds as the shortest label: 90000 → `90s`, 86400000 → `1d`.
pub fn label_ms(ms: i64) -> String {
    for (unit, length) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)] {
        if ms >= length && ms % length == 0 {
            return format!("{}{unit}", ms / length);
        }
    }
    format!("{ms}ms")
}

/// Writes a duration as the shortest label.
pub fn label(duration: Duration) -> String {
    if duration.subsec_nanos().is_multiple_of(1_000_000) {
        return label_ms(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX));
    }
    format!("{}us", duration.as_micros())
}

/// Writes a number of bytes for a person: `512 B`, `1.5 KiB`.
pub fn label_bytes(bytes: usize) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

fn digits(text: &str, start: usize) -> Option<(u64, usize)> {
    let end = text[start..].find(|c: char| !c.is_ascii_digit()).map_or(text.len(), |end| start + end);
    text[start..end].parse().ok().map(|number| (number, end))
}

fn next_boundary(text: &str, start: usize) -> usize {
    text[start..].chars().next().map_or(text.len(), |c| start + c.len_utf8())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    #[rstest]
    #[case("5ms", 5)]
    #[case("90d", 90 * 86_400_000)]
    #[case("1h30m", 5_400_000)]
    #[case(" 1h 30m ", 5_400_000)]
    #[case("2 w", 14 * 86_400_000)]
    #[case("0s", 0)]
    #[case("1500us", 1)]
    fn reads_durations(#[case] text: &str, #[case] ms: u128) {
        assert_eq!(duration(text).unwrap().as_millis(), ms);
    }

    #[rstest]
    #[case("10", "`10` has no unit", 0..2)]
    #[case("10 parsecs", "unknown unit `parsecs`", 3..10)]
    #[case("soon", "`soon` is not a duration", 0..1)]
    #[case("", "the duration is empty", 0..0)]
    #[case("1h -3m", "`1h -3m` is not a duration", 3..4)]
    #[case("1.5h", "unknown unit `.`", 1..2)]
    #[case("99999999999d", "`99999999999d` is longer than a thousand years", 0..12)]
    #[case("99999999999999999999999s", "`99999999999999999999999s` is not a duration", 0..1)]
    fn refuses_durations(#[case] text: &str, #[case] message: &str, #[case] span: Range<usize>) {
        let error = duration(text).unwrap_err();
        assert_eq!((error.message.as_str(), error.span), (message, span));
    }

    #[rstest]
    #[case("1h", Some(Some(3_600_000)))]
    #[case("30d", Some(Some(30 * 86_400_000)))]
    #[case("lifetime", Some(None))]
    #[case("0h", None)]
    #[case("01h", None)]
    #[case("1h30m", None)]
    #[case("5ms", None)]
    #[case("h", None)]
    #[case("", None)]
    fn reads_windows(#[case] label: &str, #[case] expected: Option<Option<i64>>) {
        assert_eq!(window(label).ok(), expected);
    }

    #[rstest]
    #[case("4MiB", Some(4 << 20))]
    #[case("64 kB", Some(64_000))]
    #[case("1000", Some(1000))]
    #[case("0", None)]
    #[case("4 Mib", None)]
    #[case("99999999999GiB", None)]
    fn reads_sizes(#[case] text: &str, #[case] bytes: Option<usize>) {
        assert_eq!(size(text).ok(), bytes);
    }

    #[rstest]
    #[case(86_400_000, "1d")]
    #[case(90_000, "90s")]
    #[case(1_500, "1500ms")]
    fn writes_labels(#[case] ms: i64, #[case] text: &str) {
        assert_eq!(label_ms(ms), text);
    }

    proptest! {
        #[test]
        fn nothing_panics_and_spans_are_in_the_text(text in "[0-9a-zµ. ]{0,12}") {
            if let Err(error) = duration(&text) {
                prop_assert!(text.get(error.span).is_some());
            }
            let _ = window(&text);
            let _ = size(&text);
        }

        #[test]
        fn labels_read_back(ms in 1..10_000_000_000i64) {
            prop_assert_eq!(duration(&label_ms(ms)).unwrap().as_millis(), u128::from(ms.unsigned_abs()));
        }
    }
}
