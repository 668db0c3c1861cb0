//! Event time of a source whose events were keyed anew.
//!
//! A partition of such a source holds records of all partitions of the source before it, its *channels*, mixed as it happened.
//! Each channel by itself is in the order of its log, and the bound of disorder holds for it alone. So each has its own event
//! time, which the re-keyer tells all partitions in *marks*, and what has passed of the partition is what has passed of all
//! channels that are not idle: an event that is on time at the source is on time here, whatever was written before it.

use serde::{Deserialize, Serialize};

use crate::source::Rekeyed;

/// Event time of one channel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Channel {
    /// Highest event time so far, of all its events, those that went to other partitions among them.
    newest: Option<i64>,
    /// It holds back the others no more.
    idle: bool,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Channels {
    /// By partition of the source before; empty before the first mark.
    of: Vec<Channel>,
}

impl Channels {
    /// Follows a batch: its events, then its marks, which are never behind them.
    pub fn take(&mut self, batch: &Rekeyed, event_times: &[i64]) {
        let known = batch.marks.iter().map(|mark| mark.channels).max().unwrap_or(0);
        self.of.resize(self.of.len().max(known), Channel::default());
        for (&(partition, _), &time) in batch.origins.iter().zip(event_times) {
            if let Some(channel) = self.at(partition) {
                *channel = Channel { newest: channel.newest.max(Some(time)), idle: false };
            }
        }
        for mark in &batch.marks {
            if let Some(channel) = self.at(mark.partition) {
                *channel = Channel { newest: channel.newest.max(mark.newest), idle: mark.idle };
            }
        }
    }

    fn at(&mut self, partition: i32) -> Option<&mut Channel> {
        usize::try_from(partition).ok().and_then(|partition| self.of.get_mut(partition))
    }

    /// True where no channel holds back another.
    pub fn are_idle(&self) -> bool {
        !self.of.is_empty() && self.of.iter().all(|channel| channel.idle)
    }

    /// The highest event time that all channels have reached, but for idle ones; of all where all are idle. `None` while one
    /// that is not idle has none.
    pub fn newest(&self) -> Option<i64> {
        if self.are_idle() {
            return self.of.iter().filter_map(|channel| channel.newest).max();
        }
        let mut active = self.of.iter().filter(|channel| !channel.idle).map(|channel| channel.newest);
        let first = active.next()??;
        active.try_fold(first, |least, newest| Some(least.min(newest?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Mark;

    fn mark(partition: i32, newest: Option<i64>, idle: bool) -> Mark {
        Mark { partition, channels: 3, newest, idle }
    }

    #[test]
    fn what_has_passed_is_what_has_passed_of_all_channels_that_are_not_idle() {
        let mut channels = Channels::default();
        let mut take = |origins: &[i32], times: &[i64], marks: Vec<Mark>| {
            let origins = origins.iter().map(|partition| (*partition, 0)).collect();
            channels.take(&Rekeyed { origins, marks }, times);
            (channels.newest(), channels.are_idle())
        };
        assert_eq!(take(&[0], &[50], vec![]), (None, false), "how many there are is not known yet");
        assert_eq!(take(&[0], &[50], vec![mark(0, Some(60), false)]), (None, false), "two have said nothing");
        assert_eq!(take(&[1], &[40], vec![mark(2, None, true)]), (Some(40), false));
        assert_eq!(take(&[], &[], vec![mark(1, Some(70), false)]), (Some(60), false));
        assert_eq!(take(&[2], &[10], vec![]), (Some(10), false), "one that comes back holds back again");
        let idle = (0..3).map(|partition| mark(partition, None, true)).collect();
        assert_eq!(take(&[], &[], idle), (Some(70), true));
    }
}
