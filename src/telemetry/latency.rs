//! A latency histogram that many threads add to and one reads: exponential buckets, an eighth of an octave wide, so that a
//! percentile is right to within 9 %.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const PER_OCTAVE: f64 = 8.0;
const BUCKETS: usize = 256;

/// Latencies from a microsecond to an hour.
#[derive(Debug)]
pub struct Latency {
    counts: [AtomicU64; BUCKETS],
}

impl Default for Latency {
    fn default() -> Self {
        Self { counts: [const { AtomicU64::new(0) }; BUCKETS] }
    }
}

impl Latency {
    /// Adds one observation.
    pub fn add(&self, latency: Duration) {
        let micros = latency.as_secs_f64() * 1e6;
        let bucket = if micros <= 1.0 { 0 } else { ((micros.log2() * PER_OCTAVE) as usize).min(BUCKETS - 1) };
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
    }

    /// Takes what was added since the last call.
    pub fn take(&self) -> Percentiles {
        Percentiles { counts: self.counts.iter().map(|c| c.swap(0, Ordering::Relaxed)).collect() }
    }
}

/// A histogram at rest.
#[derive(Debug, Clone, Default)]
pub struct Percentiles {
    counts: Vec<u64>,
}

impl Percentiles {
    /// Adds another one's observations.
    pub fn merge(&mut self, other: &Percentiles) {
        if self.counts.is_empty() {
            self.counts = vec![0; BUCKETS];
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }

    /// Upper bound of the bucket that holds the `q`-quantile (0 < q ≤ 1), or `None` without observations.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let total: u64 = self.counts.iter().sum();
        if total == 0 {
            return None;
        }
        let rank = ((q * total as f64).ceil() as u64).clamp(1, total);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Some(Duration::from_secs_f64(((bucket + 1) as f64 / PER_OCTAVE).exp2() * 1e-6));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_a_bucket_and_taking_empties() {
        let latency = Latency::default();
        for ms in 1..=1000 {
            latency.add(Duration::from_millis(ms));
        }
        let taken = latency.take();
        for (q, exact) in [(0.5, 0.5), (0.99, 0.99), (1.0, 1.0)] {
            let got = taken.quantile(q).unwrap().as_secs_f64();
            assert!(got >= exact && got <= exact * 1.1, "{q}: {got}");
        }
        assert!(latency.take().quantile(0.5).is_none());
    }

    #[test]
    fn merging_adds_up() {
        let (a, b) = (Latency::default(), Latency::default());
        a.add(Duration::from_millis(1));
        b.add(Duration::from_millis(100));
        let mut both = a.take();
        both.merge(&b.take());
        assert!(both.quantile(0.5).unwrap() < Duration::from_millis(2));
        assert!(both.quantile(1.0).unwrap() > Duration::from_millis(99));
    }
}
