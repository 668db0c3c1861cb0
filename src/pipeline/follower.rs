//! The input of a version that follows another: only what that one has committed.
//!
//! So the state of a following version is never ahead of the committed offsets. When it takes over, it goes on from its own
//! checkpoint, computes again without output what is committed, and publishes from there: nothing is left out, and nothing
//! comes twice. Topics that the serving version does not read are read to their end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::broker::{
    Broker, BrokerError, Consumer, GroupToken, NextOffset, Notes, Offsets, Poll, Records, TopicPartition,
};
use crate::runtime::clock;

/// How often the committed offsets are asked for.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// See the module.
pub(super) struct Follower {
    inner: Box<dyn Consumer>,
    broker: Arc<dyn Broker>,
    /// Group of the serving version.
    group: String,
    /// Topics that it reads.
    topics: Vec<Arc<str>>,
    /// Its committed offsets, all of one answer, so that they are one cut through the sources.
    committed: Offsets,
    asked: Option<Instant>,
    /// What was read beyond them.
    held: BTreeMap<TopicPartition, VecDeque<Records>>,
    /// What the worker has paused.
    paused: BTreeSet<TopicPartition>,
}

impl Follower {
    /// Follows what `group` commits of `topics`.
    pub fn new(inner: Box<dyn Consumer>, broker: Arc<dyn Broker>, group: String, topics: Vec<Arc<str>>) -> Self {
        let (held, paused) = (BTreeMap::new(), BTreeSet::new());
        Self { inner, broker, group, topics, committed: Offsets::new(), asked: None, held, paused }
    }

    /// The first offset that may not be handed out yet; `None` where all may.
    fn limit(&self, at: &TopicPartition) -> Option<i64> {
        self.topics.contains(&at.topic).then(|| self.committed.get(at).map_or(0, |next| next.0))
    }

    fn ask(&mut self) -> Result<(), BrokerError> {
        let now = clock::monotonic();
        if self.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= ASK_EVERY) {
            self.committed = self.broker.committed(&self.group, &self.topics)?;
            self.asked = Some(now);
        }
        Ok(())
    }

    /// Fetches again what is neither held nor paused by the worker.
    fn go_on(&mut self, mut partitions: Vec<TopicPartition>) -> Result<(), BrokerError> {
        partitions.retain(|at| !self.held.contains_key(at) && !self.paused.contains(at));
        if partitions.is_empty() { Ok(()) } else { self.inner.resume(&partitions) }
    }

    /// Takes out what may be handed out by now; goes on fetching where nothing is left.
    fn release(&mut self) -> Result<Vec<Records>, BrokerError> {
        let mut released = Vec::new();
        let mut empty = Vec::new();
        let limits: Vec<Option<i64>> = self.held.keys().map(|at| self.limit(at)).collect();
        for ((at, queue), limit) in self.held.iter_mut().zip(limits) {
            while let Some(records) = queue.pop_front() {
                let (below, beyond) = split(records, limit);
                released.extend(Some(below).filter(|records| !records.is_empty()));
                if !beyond.is_empty() {
                    queue.push_front(beyond);
                    break;
                }
            }
            if queue.is_empty() {
                empty.push(at.clone());
            }
        }
        for at in &empty {
            self.held.remove(at);
        }
        self.go_on(empty)?;
        Ok(released)
    }
}

impl Consumer for Follower {
    fn poll(&mut self, max: usize, timeout: Duration) -> Result<Poll, BrokerError> {
        self.ask()?;
        let released = self.release()?;
        let wait = if released.is_empty() { timeout } else { Duration::ZERO };
        let mut poll = self.inner.poll(max, wait)?;
        let gone = |at: &TopicPartition| poll.revoked.contains(at);
        self.held.retain(|at, _| !gone(at));
        self.paused.retain(|at| !gone(at));
        let mut records: Vec<Records> = released.into_iter().filter(|records| !gone(&records.partition)).collect();
        let mut paused = Vec::new();
        for read in std::mem::take(&mut poll.records) {
            let at = read.partition.clone();
            // What is held comes first.
            let limit = if self.held.contains_key(&at) { Some(i64::MIN) } else { self.limit(&at) };
            let (below, beyond) = split(read, limit);
            records.extend(Some(below).filter(|records| !records.is_empty()));
            if !beyond.is_empty() {
                self.held.entry(at.clone()).or_default().push_back(beyond);
                paused.push(at);
            }
        }
        if !paused.is_empty() {
            self.inner.pause(&paused)?;
        }
        poll.records = records;
        Ok(poll)
    }

    fn note(&mut self, notes: &Notes) {
        self.inner.note(notes);
    }

    fn committed(&self, partitions: &[TopicPartition]) -> Result<(Offsets, Notes), BrokerError> {
        self.inner.committed(partitions)
    }

    fn commit(&mut self, offsets: &Offsets) -> Result<(), BrokerError> {
        self.inner.commit(offsets)
    }

    fn token(&self) -> Result<GroupToken, BrokerError> {
        self.inner.token()
    }

    fn end(&self, partition: &TopicPartition) -> Option<NextOffset> {
        let end = self.inner.end(partition)?;
        Some(self.limit(partition).map_or(end, |limit| NextOffset(end.0.min(limit))))
    }

    fn caught_up(&self, partition: &TopicPartition) -> bool {
        let first_held = self.held.get(partition).and_then(|queue| queue.front()).and_then(|r| r.offsets.first());
        match (first_held, self.limit(partition)) {
            (Some(first), Some(limit)) => *first >= limit,
            (Some(_), None) => false,
            // Nothing was committed of it: there is nothing to read.
            (None, Some(0)) => true,
            (None, _) => self.inner.caught_up(partition),
        }
    }

    fn seek(&mut self, offsets: &Offsets) -> Result<(), BrokerError> {
        let again: Vec<TopicPartition> = offsets.keys().filter(|at| self.held.remove(*at).is_some()).cloned().collect();
        self.inner.seek(offsets)?;
        self.go_on(again)
    }

    fn pause(&mut self, partitions: &[TopicPartition]) -> Result<(), BrokerError> {
        self.paused.extend(partitions.iter().cloned());
        self.inner.pause(partitions)
    }

    fn resume(&mut self, partitions: &[TopicPartition]) -> Result<(), BrokerError> {
        self.paused.retain(|at| !partitions.contains(at));
        self.go_on(partitions.to_vec())
    }
}

/// Records below an offset, and the others.
fn split(records: Records, limit: Option<i64>) -> (Records, Records) {
    let none = || Records::new(records.partition.clone());
    let Some(limit) = limit else {
        let none = none();
        return (records, none);
    };
    let at = records.offsets.partition_point(|offset| *offset < limit);
    if at == 0 {
        return (none(), records);
    }
    if at == records.len() {
        let none = none();
        return (records, none);
    }
    let part = |rows: std::ops::Range<usize>| {
        let mut part = none();
        for row in rows.clone() {
            part.push(records.offsets[row], records.timestamps[row], records.keys.get(row), records.values.get(row));
        }
        let headers = records.headers.iter().filter(|(row, _)| rows.contains(row));
        part.headers = headers.map(|(row, headers)| (row - rows.start, headers.clone())).collect();
        part
    };
    (part(0..at), part(at..records.len()))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::broker::Header;

    #[rstest]
    #[case(None, 3)]
    #[case(Some(0), 0)]
    #[case(Some(4), 0)]
    #[case(Some(5), 1)]
    #[case(Some(9), 2)]
    #[case(Some(10), 3)]
    fn records_are_cut_at_an_offset(#[case] limit: Option<i64>, #[case] below: usize) {
        let mut records = Records::new(TopicPartition::new("t", 0));
        for offset in [4, 6, 9] {
            records.push(offset, offset, Some(b"k"), Some(offset.to_string().as_bytes()));
        }
        records.headers = vec![(1, vec![Header { name: "h".into(), value: vec![1] }])];
        let (head, tail) = split(records.clone(), limit);
        assert_eq!((head.len(), tail.len()), (below, 3 - below));
        let offsets: Vec<i64> = head.offsets.iter().chain(&tail.offsets).copied().collect();
        assert_eq!(offsets, records.offsets);
        for part in [&head, &tail] {
            for (row, offset) in part.offsets.iter().enumerate() {
                assert_eq!(part.values.get(row), Some(offset.to_string().as_bytes()));
            }
            for (row, headers) in &part.headers {
                assert_eq!((part.offsets[*row], headers.len()), (6, 1));
            }
        }
        assert_eq!(head.headers.len() + tail.headers.len(), 1);
    }
}
