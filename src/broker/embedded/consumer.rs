//! A member of a consumer group of the embedded log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::group::Turn;
use super::log::{Commit, Log, Right};
use crate::broker::{
    BrokerError, Consumer, ConsumerSettings, GroupToken, MAX_POLL_BYTES, NextOffset, Notes, Offsets, Poll, Records,
    StartAt, StartPolicy, TopicPartition,
};
use crate::runtime::clock;

static NEXT_MEMBER: AtomicU64 = AtomicU64::new(1);

pub(super) struct EmbeddedConsumer {
    log: Arc<Log>,
    group: String,
    topics: Vec<Arc<str>>,
    static_member: Option<String>,
    member: u64,
    generation: u64,
    start: StartPolicy,
    owned: Vec<Owned>,
    /// Index of the partition that the next poll begins with, so that none starves.
    first: usize,
    notes: Notes,
}

struct Owned {
    partition: TopicPartition,
    start: StartAt,
    next: i64,
    paused: bool,
}

impl EmbeddedConsumer {
    pub(super) fn join(log: Arc<Log>, settings: ConsumerSettings) -> Self {
        let mut consumer = Self {
            log,
            group: settings.group,
            topics: settings.topics,
            static_member: settings.static_member,
            member: 0,
            generation: 0,
            start: settings.start,
            owned: Vec::new(),
            first: 0,
            notes: Notes::new(),
        };
        consumer.enter();
        consumer
    }

    /// Enters the group as a new member.
    fn enter(&mut self) {
        self.member = NEXT_MEMBER.fetch_add(1, Ordering::Relaxed);
        let mut state = self.log.state.lock();
        let group = state.groups.entry(self.group.clone()).or_default();
        group.join(self.member, self.topics.clone(), self.static_member.clone(), clock::monotonic());
        drop(state);
        self.log.changed.notify_all();
    }

    fn find(&self, partition: &TopicPartition) -> Option<&Owned> {
        self.owned.iter().find(|o| o.partition == *partition)
    }

    fn give_back(&mut self) -> Poll {
        let revoked = self.owned.drain(..).map(|o| o.partition).collect();
        self.log.changed.notify_all();
        Poll { revoked, ..Poll::default() }
    }

    fn take_up(&mut self, partitions: Vec<TopicPartition>) -> Result<Poll, BrokerError> {
        let committed = self.log.committed(&self.group, &partitions)?;
        for partition in &partitions {
            let start = (self.start)(partition);
            let known = match start {
                StartAt::Offset(next) => Some(next),
                StartAt::Committed => committed.get(partition).copied(),
                StartAt::Earliest => None,
            };
            let next = match known {
                Some(next) => next.0,
                None => self.log.state.lock().span(partition).map_or(0, |span| span.start),
            };
            self.owned.push(Owned { partition: partition.clone(), start, next, paused: false });
        }
        Ok(Poll { assigned: partitions, ..Poll::default() })
    }

    /// Reads what is there up to `ends`, each partition its share.
    fn take(&mut self, max: usize, ends: &[i64]) -> Result<Poll, BrokerError> {
        let snapshot = self.log.snapshot()?;
        let count = self.owned.len();
        let mut open: Vec<usize> = (0..count).map(|i| (self.first + i) % count).collect();
        self.first = (self.first + 1) % count;
        open.retain(|i| !self.owned[*i].paused);
        let mut read: Vec<Records> = self.owned.iter().map(|o| Records::new(o.partition.clone())).collect();
        let (mut left, mut bytes) = (max, MAX_POLL_BYTES);
        while left > 0 && bytes > 0 && !open.is_empty() {
            let share = left.div_ceil(open.len());
            let mut more = Vec::new();
            for i in open {
                let (owned, records) = (&mut self.owned[i], &mut read[i]);
                let before = (records.len(), records.keys.bytes() + records.values.bytes());
                let limit = before.0 + share.min(left);
                if limit == before.0 || bytes == 0 {
                    break;
                }
                if snapshot.read(owned.next..ends[i], limit, before.1 + bytes, records)? {
                    more.push(i);
                }
                owned.next = records.next().map_or(owned.next, |next| next.0);
                left -= records.len() - before.0;
                bytes = bytes.saturating_sub(records.keys.bytes() + records.values.bytes() - before.1);
            }
            open = more;
        }
        read.retain(|records| !records.is_empty());
        Ok(Poll { records: read, ..Poll::default() })
    }
}

impl Consumer for EmbeddedConsumer {
    fn committed(&self, partitions: &[TopicPartition]) -> Result<(Offsets, Notes), BrokerError> {
        Ok((self.log.committed(&self.group, partitions)?, self.log.notes(&self.group, partitions)?))
    }

    fn poll(&mut self, max: usize, timeout: Duration) -> Result<Poll, BrokerError> {
        let deadline = clock::monotonic() + timeout;
        loop {
            let mut state = self.log.state.lock();
            let mut group = state.groups.remove(&self.group).expect("a group is there while it has a member");
            let turn = group.turn(self.member, clock::monotonic(), |topic| {
                state.topics.get(topic).map_or(0, |t| t.settings.partitions)
            });
            let gathering = group.deadline();
            state.groups.insert(self.group.clone(), group);
            match turn {
                Turn::Same => {}
                Turn::Revoked(_) => {
                    drop(state);
                    return Ok(self.give_back());
                }
                Turn::LeftBehind => {
                    drop(state);
                    self.enter();
                    return Ok(self.give_back());
                }
                Turn::Assigned(partitions, generation) => {
                    drop(state);
                    self.generation = generation;
                    self.log.changed.notify_all();
                    return self.take_up(partitions);
                }
                Turn::Fenced => {
                    let name = self.static_member.as_deref().unwrap_or_default();
                    let taken = format!("static member '{name}' of group '{}'", self.group);
                    return Err(BrokerError::Fenced { taken });
                }
            }
            let mut ends = Vec::with_capacity(self.owned.len());
            let mut ready = false;
            for owned in &mut self.owned {
                let span = state.span(&owned.partition).expect("topics are never removed");
                if owned.next < span.start || owned.next > span.end {
                    let (partition, offset) = (owned.partition.clone(), owned.next);
                    if matches!(owned.start, StartAt::Offset(_)) {
                        return Err(BrokerError::OffsetOutOfRange { partition, offset, earliest: span.start });
                    }
                    tracing::warn!(
                        %partition, committed = offset, earliest = span.start, end = span.end,
                        "the committed offset is not in the log any more: going on at the earliest record"
                    );
                    owned.next = span.start;
                }
                ends.push(span.end);
                ready |= !owned.paused && owned.next < span.end;
            }
            if ready && max > 0 {
                drop(state);
                return self.take(max, &ends);
            }
            let until = gathering.map_or(deadline, |gathering| gathering.min(deadline));
            if self.log.changed.wait_until(&mut state, until).timed_out() && clock::monotonic() >= deadline {
                return Ok(Poll::default());
            }
        }
    }

    fn note(&mut self, notes: &Notes) {
        self.notes.clone_from(notes);
    }

    fn commit(&mut self, offsets: &Offsets) -> Result<(), BrokerError> {
        let (group, notes) = (&self.group, &self.notes);
        let commit = Commit { group, member: self.member, generation: self.generation, offsets, notes };
        self.log.append(&[], Right::Free, Some(commit))
    }

    fn token(&self) -> Result<GroupToken, BrokerError> {
        Ok(GroupToken::Embedded { group: self.group.clone(), member: self.member, generation: self.generation })
    }

    fn end(&self, partition: &TopicPartition) -> Option<NextOffset> {
        self.find(partition)?;
        self.log.state.lock().span(partition).map(|span| NextOffset(span.end))
    }

    fn caught_up(&self, partition: &TopicPartition) -> bool {
        let Some(owned) = self.find(partition) else { return false };
        self.log.state.lock().span(partition).is_some_and(|span| owned.next >= span.end)
    }

    fn seek(&mut self, offsets: &Offsets) -> Result<(), BrokerError> {
        for owned in &mut self.owned {
            if let Some(next) = offsets.get(&owned.partition) {
                (owned.next, owned.start) = (next.0, StartAt::Offset(*next));
            }
        }
        Ok(())
    }

    fn pause(&mut self, partitions: &[TopicPartition]) -> Result<(), BrokerError> {
        self.owned.iter_mut().filter(|o| partitions.contains(&o.partition)).for_each(|o| o.paused = true);
        Ok(())
    }

    fn resume(&mut self, partitions: &[TopicPartition]) -> Result<(), BrokerError> {
        self.owned.iter_mut().filter(|o| partitions.contains(&o.partition)).for_each(|o| o.paused = false);
        Ok(())
    }
}

impl Drop for EmbeddedConsumer {
    fn drop(&mut self) {
        let mut state = self.log.state.lock();
        if let Some(group) = state.groups.get_mut(&self.group) {
            group.leave(self.member, clock::monotonic());
        }
        drop(state);
        self.log.changed.notify_all();
    }
}
