//! Going through a dead-letter topic: which letters there are, and which of them were replayed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;

use super::{StoredDeadLetter, read_back};
use crate::broker::{Broker, BrokerError, Records, TopicInfo, TopicPartition};
use crate::runtime::shutdown::Stop;

/// Records read at once.
const RECORDS_A_READ: usize = 1000;
/// How long one read waits.
const WAIT: Duration = Duration::from_millis(500);

/// Why dead letters cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The log failed.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// A stop was asked for before the end.
    #[error("stopped before all letters were read")]
    Stopped,
}

/// Which letters. A condition that is absent lets all pass.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Stage that gave up.
    pub stage: Option<String>,
    /// Fixed word.
    pub reason: Option<String>,
    /// Topic that the record was read from.
    pub topic: Option<Arc<str>>,
    /// Written at this instant (inclusive) or later, milliseconds since 1970 UTC, by the letter's own timestamp.
    pub since: Option<i64>,
}

impl Filter {
    /// True where the letter meets all conditions.
    pub fn lets(&self, letter: &Letter) -> bool {
        let is = |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|wanted| wanted == found);
        is(&self.stage, &letter.stored.stage)
            && is(&self.reason, &letter.stored.reason)
            && self.topic.as_ref().is_none_or(|topic| *topic == letter.stored.partition.topic)
            && self.since.is_none_or(|since| letter.written_at >= since)
    }
}

/// A letter, and where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    /// Partition of the dead-letter topic.
    pub partition: i32,
    /// Offset within it.
    pub offset: i64,
    /// When it was written: its own Kafka timestamp, milliseconds; −1 for none.
    pub written_at: i64,
    /// What it holds.
    pub stored: StoredDeadLetter,
}

/// Hands every letter of a topic to `each`, partition by partition in offset order, up to the ends that the topic has now;
/// `each` ends it by returning false. Returns how many records are no dead letters: somebody else wrote them.
///
/// # Errors
/// Where the topic does not exist, the broker does not answer, a stop is asked for, or `each` fails.
pub fn read<E: From<ReadError>>(
    broker: &dyn Broker,
    topic: &str,
    stop: &Stop,
    mut each: impl FnMut(Letter) -> Result<bool, E>,
) -> Result<u64, E> {
    let mut foreign = 0;
    records(broker, topic, stop, |records| -> Result<bool, E> {
        for row in 0..records.len() {
            let Some(stored) = read_back(records, row) else {
                foreign += 1;
                continue;
            };
            let (partition, offset) = (records.partition.partition, records.offsets[row]);
            if !each(Letter { partition, offset, written_at: records.timestamps[row], stored })? {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    Ok(foreign)
}

/// Which records were replayed: the time of it, milliseconds, by [`StoredDeadLetter::identity`]. Empty where `topic` does not
/// exist.
///
/// # Errors
/// Where the broker does not answer, or a stop is asked for.
pub fn replayed(broker: &dyn Broker, topic: &str, stop: &Stop) -> Result<FxHashMap<String, i64>, ReadError> {
    let mut found = FxHashMap::default();
    if broker.topic(topic)?.is_none() {
        return Ok(found);
    }
    records(broker, topic, stop, |records| {
        for row in 0..records.len() {
            if let Some(identity) = records.keys.get(row).and_then(|key| std::str::from_utf8(key).ok()) {
                match records.values.get(row) {
                    Some(_) => found.insert(identity.to_owned(), records.timestamps[row]),
                    None => found.remove(identity),
                };
            }
        }
        Ok::<_, ReadError>(true)
    })?;
    Ok(found)
}

fn records<E: From<ReadError>>(
    broker: &dyn Broker,
    topic: &str,
    stop: &Stop,
    mut each: impl FnMut(&Records) -> Result<bool, E>,
) -> Result<(), E> {
    let found = broker.topic(topic).map_err(ReadError::from)?;
    let Some(TopicInfo { name, partitions }) = found else {
        let error = BrokerError::NoSuchTopic { topic: topic.to_owned(), broker: broker.describe() };
        return Err(ReadError::from(error).into());
    };
    for (number, (start, end)) in partitions.into_iter().enumerate() {
        let partition = TopicPartition::new(name.clone(), i32::try_from(number).expect("a topic has few partitions"));
        let mut next = start;
        while next < end {
            if stop.requested() {
                return Err(ReadError::Stopped.into());
            }
            let (mut records, after) = broker.read(&partition, next, RECORDS_A_READ, WAIT).map_err(ReadError::from)?;
            // What was written since belongs to the next look: a replay's own failures must not be replayed by it.
            let known = records.offsets.partition_point(|offset| *offset < end.0);
            records.offsets.truncate(known);
            if !records.is_empty() && !each(&records)? {
                return Ok(());
            }
            next = after;
        }
    }
    Ok(())
}

/// Letters of one stage, reason and topic.
#[derive(Debug, Clone)]
pub struct Group {
    /// How many.
    pub letters: u64,
    /// How many of them were replayed.
    pub replayed: u64,
    /// When the first one was written, milliseconds.
    pub first: i64,
    /// When the last one was written, milliseconds.
    pub last: i64,
    /// The newest one.
    pub example: Letter,
}

/// All letters of a topic, by stage, reason and the topic that they were read from.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// The groups.
    pub groups: BTreeMap<(String, String, Arc<str>), Group>,
    /// Records on the topic that are no dead letters.
    pub foreign: u64,
}

/// Counts the letters that `filter` lets pass.
///
/// # Errors
/// As [`read`].
pub fn summarise(
    broker: &dyn Broker,
    topic: &str,
    filter: &Filter,
    replayed: &FxHashMap<String, i64>,
    stop: &Stop,
) -> Result<Summary, ReadError> {
    let mut groups: BTreeMap<_, Group> = BTreeMap::new();
    let foreign = read(broker, topic, stop, |letter| {
        if filter.lets(&letter) {
            let stored = &letter.stored;
            let key = (stored.stage.clone(), stored.reason.clone(), stored.partition.topic.clone());
            let again = u64::from(replayed.contains_key(&stored.identity()));
            let at = letter.written_at;
            match groups.get_mut(&key) {
                Some(group) => {
                    group.letters += 1;
                    group.replayed += again;
                    group.first = group.first.min(at);
                    if at >= group.last {
                        (group.last, group.example) = (at, letter);
                    }
                }
                None => {
                    groups.insert(key, Group { letters: 1, replayed: again, first: at, last: at, example: letter });
                }
            }
        }
        Ok::<_, ReadError>(true)
    })?;
    Ok(Summary { groups, foreign })
}
