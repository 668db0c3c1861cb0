//! How far a producer runs ahead of the broker.
//!
//! librdkafka has at most five requests a partition on their way, of a megabyte each. While more than that is ready, its
//! thread spins until an answer comes, on the processor that the answer needs.

use crate::broker::OutRecord;

/// Bytes that may be unacknowledged.
const MOST_UNACKNOWLEDGED: u64 = 4 << 20;

/// Bytes sent between two looks at how many are not acknowledged.
const BYTES_A_LOOK: u64 = 256 << 10;

/// What was sent since all was acknowledged.
#[derive(Debug, Default)]
pub(super) struct Pace {
    records: u64,
    bytes: u64,
    /// Bytes when it was last time to look.
    looked: u64,
    stands: bool,
}

impl Pace {
    /// Counts a record. True where it is time to look.
    pub(super) fn add(&mut self, record: &OutRecord<'_>) -> bool {
        self.records += 1;
        self.bytes += (record.key.map_or(0, <[u8]>::len) + record.value.map_or(0, <[u8]>::len)) as u64;
        let due = !self.stands && self.bytes - self.looked >= BYTES_A_LOOK;
        if due {
            self.looked = self.bytes;
        }
        due
    }

    /// True where so many records, of average size, are more than may be unacknowledged.
    pub(super) fn is_ahead(&self, unacknowledged: i32) -> bool {
        u64::try_from(unacknowledged).unwrap_or(0) * self.bytes > MOST_UNACKNOWLEDGED * self.records
    }

    /// Acknowledgements stay out: nothing is waited for until all is acknowledged or given up.
    pub(super) fn stand_still(&mut self) {
        self.stands = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_producer_looks_now_and_then_and_is_ahead_by_bytes() {
        let value = [0; 1024];
        let record = || OutRecord { value: Some(&value), ..OutRecord::default() };
        let mut pace = Pace::default();
        let looks: Vec<u64> = (1..=1024).filter(|_| pace.add(&record())).collect();
        assert_eq!(looks, [256, 512, 768, 1024]);
        assert!(!pace.is_ahead(0) && !pace.is_ahead(4096));
        assert!(pace.is_ahead(4097));
        pace.stand_still();
        assert!(!(0..1024).any(|_| pace.add(&record())));
    }
}
