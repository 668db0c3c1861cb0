//! How fast a file is replayed, as arithmetic: the caller has the clock and does the waiting.

use std::str::FromStr;
use std::time::Duration;

/// Speed of a replay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// As fast as the broker takes it.
    AsFast,
    /// Events a second.
    Rate(f64),
    /// Event time runs this many times as fast as the clock.
    Times(f64),
}

impl FromStr for Pace {
    type Err = String;

    /// Reads `max`, `500/s` or `60x`.
    fn from_str(text: &str) -> Result<Self, String> {
        let positive = |number: &str| number.trim().parse().ok().filter(|n: &f64| *n > 0.0 && n.is_finite());
        let pace = match text.trim() {
            "max" => Some(Self::AsFast),
            text => match (text.strip_suffix("/s"), text.strip_suffix('x')) {
                (Some(rate), _) => positive(rate).map(Self::Rate),
                (_, Some(times)) => positive(times).map(Self::Times),
                _ => None,
            },
        };
        pace.ok_or_else(|| format!("'{text}' is no speed: write max, 500/s (events a second) or 60x (of event time)"))
    }
}

/// Says of each event when it is due.
#[derive(Debug, Clone)]
pub struct Pacer {
    pace: Pace,
    events: u64,
    first: Option<i64>,
}

impl Pacer {
    /// Starts with the next event.
    pub fn new(pace: Pace) -> Self {
        Self { pace, events: 0, first: None }
    }

    /// How long to wait before sending the next event, which happened at `event_time` (milliseconds), where `elapsed` has
    /// passed since the first one was sent. An event older than the first is due at once.
    pub fn wait(&mut self, event_time: i64, elapsed: Duration) -> Duration {
        let first = *self.first.get_or_insert(event_time);
        let due = match self.pace {
            Pace::AsFast => 0.0,
            Pace::Rate(rate) => self.events as f64 / rate,
            Pace::Times(times) => event_time.saturating_sub(first) as f64 / 1e3 / times,
        };
        self.events += 1;
        Duration::try_from_secs_f64(due - elapsed.as_secs_f64()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("max", Some(Pace::AsFast))]
    #[case("500/s", Some(Pace::Rate(500.0)))]
    #[case("0.5/s", Some(Pace::Rate(0.5)))]
    #[case("60x", Some(Pace::Times(60.0)))]
    #[case("0x", None)]
    #[case("-1/s", None)]
    #[case("infx", None)]
    #[case("fast", None)]
    #[case("", None)]
    fn reads_speeds(#[case] text: &str, #[case] expected: Option<Pace>) {
        assert_eq!(text.parse::<Pace>().ok(), expected);
    }

    #[test]
    fn spreads_events_evenly() {
        let mut pacer = Pacer::new(Pace::Rate(4.0));
        let waits: Vec<_> = (0..4).map(|i| pacer.wait(0, Duration::from_millis(100 * i)).as_millis()).collect();
        assert_eq!(waits, [0, 150, 300, 450]);
    }

    #[test]
    fn scales_event_time() {
        let mut pacer = Pacer::new(Pace::Times(60.0));
        let ms = |ms| Duration::from_millis(ms);
        assert_eq!(pacer.wait(1_000_000, ms(0)), ms(0));
        assert_eq!(pacer.wait(1_060_000, ms(400)), ms(600));
        assert_eq!(pacer.wait(1_060_000, ms(1_500)), ms(0));
        assert_eq!(pacer.wait(900_000, ms(1_500)), ms(0));
        assert!(pacer.wait(i64::MAX, ms(1_500)) > ms(1_000_000));
    }

    #[test]
    fn the_fastest_never_waits() {
        let mut pacer = Pacer::new(Pace::AsFast);
        assert!((0..5).all(|i| pacer.wait(i * 1_000_000, Duration::ZERO).is_zero()));
    }
}
