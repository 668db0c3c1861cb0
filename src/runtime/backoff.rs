//! How long to wait before trying again: exponential, capped, with full jitter.

use std::time::Duration;

use rand::Rng;

use super::shutdown::Stop;

/// Waits between attempts. The n-th wait is uniform in (0, min(cap, base·2ⁿ)], so that many processes that lost the same
/// server do not come back at the same moment.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Backoff {
    /// Starts at `base`, never waits longer than `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempt: 0 }
    }

    /// The usual one for a server that went away: 50 ms to 5 s.
    pub fn for_server() -> Self {
        Self::new(Duration::from_millis(50), Duration::from_secs(5))
    }

    /// Number of waits so far.
    pub fn attempts(&self) -> u32 {
        self.attempt
    }

    /// The next wait.
    pub fn next_wait(&mut self) -> Duration {
        let ceiling = self.base.saturating_mul(2_u32.saturating_pow(self.attempt.min(20))).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        ceiling.mul_f64(1.0 - rand::rng().random::<f64>())
    }

    /// Waits; returns true where a stop was asked for meanwhile.
    pub fn wait(&mut self, stop: &Stop) -> bool {
        let wait = self.next_wait();
        stop.wait(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_never_beyond() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
        for attempt in 0..100_u32 {
            let ceiling = Duration::from_millis(10)
                .saturating_mul(2_u32.saturating_pow(attempt.min(20)))
                .min(Duration::from_secs(1));
            let wait = backoff.next_wait();
            assert!(wait <= ceiling, "attempt {attempt}: {wait:?} > {ceiling:?}");
        }
        assert_eq!(backoff.attempts(), 100);
    }
}
