//! Writes to the embedded log. A commit is one write to one file, so its outcome is never open.

use std::collections::HashMap;
use std::sync::Arc;

use super::log::{Commit, Log, Right};
use super::partitioner::partition_of;
use crate::broker::{BrokerError, GroupToken, Notes, Offsets, OutRecord, Producer, Records, TopicPartition};
use crate::runtime::{clock, failpoint};

/// A record may be this large.
const MAX_RECORD: usize = 16 << 20;
/// Outside of a transaction, what was sent is written when it amounts to this many bytes, or at the next commit.
const WRITE_AT: usize = 4 << 20;
/// A transaction is kept in memory until it is committed and may be this large.
const MAX_TRANSACTION: usize = 1 << 30;

pub(super) struct EmbeddedProducer {
    log: Arc<Log>,
    /// Transactional id and epoch.
    id: Option<(String, u64)>,
    open: bool,
    /// What was sent since the last commit, by partition, with offsets 0, 1, …
    sent: Vec<Records>,
    /// Index in `sent` of each partition in it.
    index: HashMap<TopicPartition, usize>,
    bytes: usize,
    /// Where the next record without a key goes.
    keyless: u32,
    /// Topics sent to so far: name, partitions, compacted.
    topics: HashMap<Box<str>, (Arc<str>, u32, bool)>,
    notes: Notes,
}

impl EmbeddedProducer {
    pub(super) fn open(log: Arc<Log>, id: Option<&str>) -> Result<Self, BrokerError> {
        let id = id.map(|id| log.next_epoch(id).map(|epoch| (id.to_owned(), epoch))).transpose()?;
        Ok(Self {
            log,
            id,
            open: false,
            sent: Vec::new(),
            index: HashMap::new(),
            bytes: 0,
            keyless: 0,
            topics: HashMap::new(),
            notes: Notes::new(),
        })
    }

    fn right(&self) -> Right<'_> {
        self.id.as_ref().map_or(Right::Free, |(id, epoch)| Right::Producer(id, *epoch))
    }

    fn clear(&mut self) {
        self.sent.clear();
        self.index.clear();
        self.bytes = 0;
        self.open = false;
    }

    fn topic(&mut self, name: &str) -> Result<(Arc<str>, u32, bool), BrokerError> {
        if let Some(known) = self.topics.get(name) {
            return Ok(known.clone());
        }
        let state = self.log.state.lock();
        let Some((full, topic)) = state.topics.get_key_value(name) else {
            drop(state);
            return Err(self.log.no_such_topic(name));
        };
        let known = (full.clone(), topic.settings.partitions, topic.settings.compacted);
        self.topics.insert(name.into(), known.clone());
        Ok(known)
    }
}

impl Producer for EmbeddedProducer {
    fn begin(&mut self) -> Result<(), BrokerError> {
        self.open = self.id.is_some();
        Ok(())
    }

    fn send(&mut self, record: OutRecord<'_>) -> Result<(), BrokerError> {
        let (topic, partitions, compacted) = self.topic(record.topic)?;
        let refuse = |reason: String| Err(BrokerError::Refused { topic: record.topic.to_owned(), reason });
        let bytes = record.key.map_or(0, <[u8]>::len) + record.value.map_or(0, <[u8]>::len);
        if bytes > MAX_RECORD {
            return refuse(format!("a record of {bytes} bytes is larger than {MAX_RECORD}"));
        }
        if compacted && record.key.is_none() {
            return refuse("a record of a compacted topic needs a key".to_owned());
        }
        if self.id.is_some() && !self.open {
            return refuse("no transaction is open".to_owned());
        }
        if self.id.is_some() && self.bytes + bytes > MAX_TRANSACTION {
            return refuse(format!("the transaction is larger than {MAX_TRANSACTION} bytes"));
        }
        let partition = match (record.partition, record.key) {
            (Some(given), _) => match u32::try_from(given).ok().filter(|p| *p < partitions) {
                Some(partition) => partition,
                None => return refuse(format!("it has no partition {given}")),
            },
            (None, Some(key)) => partition_of(key, partitions),
            (None, None) => {
                self.keyless = self.keyless.wrapping_add(1);
                self.keyless % partitions
            }
        };
        let partition = TopicPartition::new(topic, i32::try_from(partition).expect("few partitions"));
        let index = *self.index.entry(partition).or_insert_with_key(|partition| {
            self.sent.push(Records::new(partition.clone()));
            self.sent.len() - 1
        });
        let records = &mut self.sent[index];
        if !record.headers.is_empty() {
            records.headers.push((records.len(), record.headers.to_vec()));
        }
        let offset = i64::try_from(records.len()).expect("a count of rows fits");
        records.push(offset, record.timestamp.unwrap_or_else(clock::now_ms), record.key, record.value);
        self.bytes += bytes;
        if self.id.is_none() && self.bytes >= WRITE_AT {
            self.log.append(&self.sent, Right::Free, None)?;
            self.clear();
        }
        Ok(())
    }

    fn note(&mut self, notes: &Notes) {
        self.notes.clone_from(notes);
    }

    fn commit(&mut self, offsets: &Offsets, token: Option<&GroupToken>) -> Result<(), BrokerError> {
        if failpoint::hit("broker.commit.before") {
            return Err(BrokerError::Client {
                during: "committing",
                broker: self.log.describe(),
                reason: "failpoint".to_owned(),
                retriable: true,
            });
        }
        if self.id.is_some() && !self.open {
            return Ok(());
        }
        let commit = match token {
            Some(GroupToken::Embedded { group, member, generation }) if self.id.is_some() && !offsets.is_empty() => {
                Some(Commit { group, member: *member, generation: *generation, offsets, notes: &self.notes })
            }
            _ => None,
        };
        if !self.sent.is_empty() || commit.is_some() {
            let committed = self.log.append(&self.sent, self.right(), commit);
            if committed.as_ref().is_err_and(BrokerError::is_fenced) {
                self.clear();
            }
            committed?;
        }
        self.clear();
        failpoint::hit("broker.commit.after");
        Ok(())
    }

    fn abort(&mut self) -> Result<(), BrokerError> {
        if self.id.is_some() {
            self.clear();
        }
        Ok(())
    }
}
