//! When people shop: factors on all rates by hour of the day and day of the week, UTC.

use super::DAY_MS;

const HOUR_MS: i64 = DAY_MS / 24;

/// Relative activity by hour: a low at four in the morning, peaks at noon and in the evening.
const HOURS: [f64; 24] = [
    0.35, 0.22, 0.15, 0.11, 0.10, 0.14, 0.30, 0.60, 0.90, 1.10, 1.25, 1.40, 1.50, 1.40, 1.25, 1.20, 1.25, 1.40, 1.60,
    1.85, 1.95, 1.75, 1.25, 0.70,
];

/// Relative activity from Monday to Sunday.
const WEEKDAYS: [f64; 7] = [0.90, 0.85, 0.90, 0.95, 1.05, 1.25, 1.10];

/// Activity by hour of the week, scaled to a mean of 1.
#[derive(Debug, Clone)]
pub(super) struct Season {
    factors: [f64; 168],
    greatest: f64,
}

impl Season {
    pub(super) fn new() -> Self {
        let mut factors: [f64; 168] = std::array::from_fn(|i| WEEKDAYS[i / 24] * HOURS[i % 24]);
        let mean = factors.iter().sum::<f64>() / 168.0;
        factors.iter_mut().for_each(|f| *f /= mean);
        let greatest = factors.iter().copied().fold(0.0, f64::max);
        Self { factors, greatest }
    }

    /// Factor at an instant, milliseconds since 1970 UTC.
    pub(super) fn at(&self, time: i64) -> f64 {
        // 1970 began on a Thursday, three days after a Monday.
        let hour = (time.div_euclid(HOUR_MS) + 72).rem_euclid(168);
        self.factors[hour as usize]
    }

    /// The greatest factor of the week.
    pub(super) fn greatest(&self) -> f64 {
        self.greatest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_one_and_peaks_on_saturday_evening() {
        let season = Season::new();
        let monday = 4 * DAY_MS;
        let hours: Vec<f64> = (0..168).map(|h| season.at(monday + h * HOUR_MS)).collect();
        assert!((hours.iter().sum::<f64>() / 168.0 - 1.0).abs() < 1e-12);
        let peak = (0..168).max_by(|a, b| hours[*a].total_cmp(&hours[*b])).unwrap();
        assert_eq!((peak / 24, peak % 24), (5, 20), "Saturday, 20 h");
        assert_eq!(hours[peak], season.greatest());
    }
}
