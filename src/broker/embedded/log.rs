//! The log's file: topics, batches, group offsets and producer epochs as tables of one redb database, and what of it is
//! kept in memory.
//!
//! redb lets one writer in at a time, so whoever holds the write transaction has seen every earlier commit. An append
//! checks its right to publish inside it, and a member that takes up a partition looks up its offset behind it.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use redb::{Database, ReadOnlyTable, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::codec::{self, Damaged};
use super::group::Group;
use crate::broker::{BrokerError, NextOffset, Notes, Offsets, Records, TopicPartition, TopicSettings};
use crate::runtime::clock;

/// Name → number, partitions, compacted, retention in milliseconds.
const TOPICS: TableDefinition<&str, (u32, u32, bool, Option<i64>)> = TableDefinition::new("topics");
/// Topic number, partition, base offset → batch.
const BATCHES: TableDefinition<(u32, u32, i64), &[u8]> = TableDefinition::new("batches");
/// Topic number, partition → earliest offset, next offset, offset up to which superseded records have been dropped, and how
/// many records were left then.
const RANGES: TableDefinition<(u32, u32), (i64, i64, i64, i64)> = TableDefinition::new("ranges");
/// Group, topic, partition → next offset to read.
const OFFSETS: TableDefinition<(&str, &str, u32), i64> = TableDefinition::new("offsets");
/// Group, topic, partition → note beside the offset.
const NOTES: TableDefinition<(&str, &str, u32), i64> = TableDefinition::new("notes");
/// Transactional id → epoch of its newest producer.
const EPOCHS: TableDefinition<&str, u64> = TableDefinition::new("epochs");
/// Facts about the file.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const FORMAT: u64 = 1;

/// A batch holds at most this many records …
const BATCH_ROWS: usize = 1024;
/// … and is closed when it holds this many bytes, so that reading a part of it stays cheap.
const BATCH_BYTES: usize = 1 << 20;
/// A compacted partition is cleaned when this many records have come since it last was, and as many as it then held.
const CLEAN_AFTER: i64 = 4096;
/// A tombstone stays readable at least this long.
const TOMBSTONES_MS: i64 = 24 * 3600 * 1000;
/// How often expired batches are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(60);

/// An open log.
pub(super) struct Log {
    path: PathBuf,
    db: Arc<Database>,
    pub(super) state: Mutex<State>,
    /// Told when records arrive or a group changes.
    pub(super) changed: Condvar,
}

/// What of the log is in memory.
#[derive(Default)]
pub(super) struct State {
    pub(super) topics: BTreeMap<Arc<str>, Topic>,
    pub(super) groups: HashMap<String, Group>,
    epochs: HashMap<String, u64>,
    expired_at: Option<Instant>,
}

/// A topic.
#[derive(Debug, Clone)]
pub(super) struct Topic {
    number: u32,
    pub(super) settings: TopicSettings,
    pub(super) ranges: Vec<Span>,
}

/// What a partition holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    /// Earliest offset.
    pub(super) start: i64,
    /// Next offset.
    pub(super) end: i64,
    /// Superseded records before this offset are gone …
    clean: i64,
    /// … and this many are left of them.
    left: i64,
}

impl State {
    pub(super) fn span(&self, partition: &TopicPartition) -> Option<Span> {
        let topic = self.topics.get(&partition.topic)?;
        topic.ranges.get(usize::try_from(partition.partition).ok()?).copied()
    }
}

/// The right to append.
#[derive(Debug, Clone, Copy)]
pub(super) enum Right<'a> {
    /// Anybody may append.
    Free,
    /// The newest producer of this transactional id.
    Producer(&'a str, u64),
}

/// Offsets to be committed by a member of a group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Commit<'a> {
    pub(super) group: &'a str,
    pub(super) member: u64,
    pub(super) generation: u64,
    pub(super) offsets: &'a Offsets,
    pub(super) notes: &'a Notes,
}

/// A snapshot to read batches from.
pub(super) struct Snapshot<'a> {
    log: &'a Log,
    batches: ReadOnlyTable<(u32, u32, i64), &'static [u8]>,
}

impl Log {
    pub(super) fn open(path: PathBuf, db: Arc<Database>) -> Result<Self, BrokerError> {
        let log = Self { path, db, state: Mutex::default(), changed: Condvar::new() };
        let state = log.load().map_err(|error| log.failed(error))?;
        *log.state.lock() = state;
        log.tidy()?;
        Ok(log)
    }

    fn load(&self) -> Result<State, redb::Error> {
        let txn = self.db.begin_write()?;
        let mut state = State::default();
        {
            let mut meta = txn.open_table(META)?;
            let format = meta.get("format")?.map_or(FORMAT, |v| v.value());
            if format != FORMAT {
                let reason = format!("it was written in format {format}, this driftline reads format {FORMAT}");
                return Err(redb::Error::Corrupted(reason));
            }
            meta.insert("format", FORMAT)?;
            txn.open_table(BATCHES)?;
            txn.open_table(OFFSETS)?;
            for epoch in txn.open_table(EPOCHS)?.iter()? {
                let (id, epoch) = epoch?;
                state.epochs.insert(id.value().to_owned(), epoch.value());
            }
            let ranges = txn.open_table(RANGES)?;
            for topic in txn.open_table(TOPICS)?.iter()? {
                let (name, topic) = topic?;
                let (number, partitions, compacted, retention_ms) = topic.value();
                let ranges = (0..partitions).map(|p| span_in(&ranges, number, p)).collect::<Result<_, _>>()?;
                let settings = TopicSettings { partitions, compacted, retention_ms };
                state.topics.insert(name.value().into(), Topic { number, settings, ranges });
            }
        }
        txn.commit()?;
        Ok(state)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn describe(&self) -> String {
        format!("embedded {}", self.path.display())
    }

    pub(super) fn no_such_topic(&self, topic: &str) -> BrokerError {
        BrokerError::NoSuchTopic { topic: topic.to_owned(), broker: self.describe() }
    }

    fn failed(&self, error: impl std::fmt::Display) -> BrokerError {
        BrokerError::Storage { path: self.path.display().to_string(), reason: error.to_string() }
    }

    /// Changes the file in one transaction that is on disk when this returns.
    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T, Stop>) -> Result<T, BrokerError> {
        let txn = self.db.begin_write().map_err(|error| self.failed(error))?;
        let changed = match change(&txn) {
            Ok(changed) => changed,
            Err(Stop::Refused(error)) => return Err(error),
            Err(Stop::Storage(error)) => return Err(self.failed(error)),
        };
        txn.commit().map_err(|error| self.failed(error))?;
        Ok(changed)
    }

    /// Creates a topic, unless it is there.
    pub(super) fn create_topic(&self, name: &str, settings: &TopicSettings) -> Result<(), BrokerError> {
        let created = self.write(|txn| {
            let mut topics = txn.open_table(TOPICS)?;
            if topics.get(name)?.is_some() {
                return Ok(None);
            }
            let mut meta = txn.open_table(META)?;
            let number = meta.get("topics")?.map_or(0, |v| v.value());
            meta.insert("topics", number + 1)?;
            let number = u32::try_from(number).expect("nobody creates four billion topics");
            topics.insert(name, (number, settings.partitions, settings.compacted, settings.retention_ms))?;
            Ok(Some(number))
        })?;
        if let Some(number) = created {
            let ranges = vec![Span { start: 0, end: 0, clean: 0, left: 0 }; settings.partitions as usize];
            let topic = Topic { number, settings: settings.clone(), ranges };
            self.state.lock().topics.insert(name.into(), topic);
        }
        Ok(())
    }

    /// Makes the caller the newest producer of an id, and fences the one before.
    pub(super) fn next_epoch(&self, id: &str) -> Result<u64, BrokerError> {
        self.write(|txn| {
            let mut epochs = txn.open_table(EPOCHS)?;
            let epoch = epochs.get(id)?.map_or(0, |v| v.value()) + 1;
            epochs.insert(id, epoch)?;
            // Inside the transaction: an append of the older producer comes wholly before or is refused.
            self.state.lock().epochs.insert(id.to_owned(), epoch);
            Ok(epoch)
        })
    }

    /// Appends records and commits offsets: all of it or nothing. Offsets within `batches` are replaced by the log's.
    pub(super) fn append(
        &self,
        batches: &[Records],
        right: Right<'_>,
        commit: Option<Commit<'_>>,
    ) -> Result<(), BrokerError> {
        let ends = self.write(|txn| {
            check(&self.state.lock(), right, commit)?;
            let mut table = txn.open_table(BATCHES)?;
            let mut ranges = txn.open_table(RANGES)?;
            let mut ends = Vec::with_capacity(batches.len());
            for records in batches {
                let (number, partition) = self.key_of(&records.partition)?;
                let span = span_in(&ranges, number, partition)?;
                for rows in chunks(records) {
                    let base = span.end + i64::try_from(rows.start).expect("a count of rows fits");
                    table.insert(
                        (number, partition, base),
                        &*codec::encode(records, rows.clone(), signed(rows.start)),
                    )?;
                }
                let end = span.end + signed(records.len());
                ranges.insert((number, partition), (span.start, end, span.clean, span.left))?;
                ends.push(end);
            }
            if let Some(commit) = commit {
                let mut offsets = txn.open_table(OFFSETS)?;
                let mut notes = txn.open_table(NOTES)?;
                for (partition, next) in commit.offsets {
                    let key = (commit.group, &*partition.topic, unsigned(partition.partition));
                    offsets.insert(key, next.0)?;
                    match commit.notes.get(partition) {
                        Some(note) => notes.insert(key, note)?,
                        None => notes.remove(key)?,
                    };
                }
            }
            Ok(ends)
        })?;
        let mut state = self.state.lock();
        for (records, end) in batches.iter().zip(ends) {
            let topic = state.topics.get_mut(&records.partition.topic).expect("topics are never removed");
            let span = &mut topic.ranges[unsigned(records.partition.partition) as usize];
            // A later append may have told its end already.
            span.end = span.end.max(end);
        }
        drop(state);
        self.changed.notify_all();
        // The records are committed, whatever becomes of old ones.
        if let Err(error) = self.tidy() {
            tracing::warn!(%error, "expired or superseded records could not be dropped");
        }
        Ok(())
    }

    /// Committed offsets of a group. Sees every commit that was allowed before the call.
    pub(super) fn committed(&self, group: &str, partitions: &[TopicPartition]) -> Result<Offsets, BrokerError> {
        let find = || -> Result<Offsets, redb::Error> {
            // Waits for a commit that passed its check before a rebalance and is on its way to the disk.
            let txn = self.db.begin_write()?;
            let table = txn.open_table(OFFSETS)?;
            let mut found = Offsets::new();
            for partition in partitions {
                if let Some(next) = table.get((group, &*partition.topic, unsigned(partition.partition)))? {
                    found.insert(partition.clone(), NextOffset(next.value()));
                }
            }
            Ok(found)
        };
        find().map_err(|error| self.failed(error))
    }

    /// Notes beside the committed offsets of a group; as [`Log::committed`].
    pub(super) fn notes(&self, group: &str, partitions: &[TopicPartition]) -> Result<Notes, BrokerError> {
        let find = || -> Result<Notes, redb::Error> {
            let txn = self.db.begin_write()?;
            let table = txn.open_table(NOTES)?;
            let mut found = Notes::new();
            for partition in partitions {
                if let Some(note) = table.get((group, &*partition.topic, unsigned(partition.partition)))? {
                    found.insert(partition.clone(), note.value());
                }
            }
            Ok(found)
        };
        find().map_err(|error| self.failed(error))
    }

    /// A view to read from: all that was appended before.
    pub(super) fn snapshot(&self) -> Result<Snapshot<'_>, BrokerError> {
        let open = || -> Result<_, redb::Error> { Ok(self.db.begin_read()?.open_table(BATCHES)?) };
        open().map(|batches| Snapshot { log: self, batches }).map_err(|error| self.failed(error))
    }

    /// Drops what has expired or was superseded, where enough has come together.
    fn tidy(&self) -> Result<(), BrokerError> {
        let (now, now_ms) = (clock::monotonic(), clock::now_ms());
        let (expiring, unclean) = {
            let mut state = self.state.lock();
            let due = state.expired_at.is_none_or(|last| now.duration_since(last) >= EXPIRE_EVERY);
            if due {
                state.expired_at = Some(now);
            }
            let (mut expiring, mut unclean) = (Vec::new(), Vec::new());
            for (name, topic) in &state.topics {
                for (number, span) in topic.ranges.iter().enumerate() {
                    let partition =
                        || TopicPartition::new(name.clone(), i32::try_from(number).expect("few partitions"));
                    if let Some(kept) = topic.settings.retention_ms.filter(|_| due && span.start < span.end) {
                        expiring.push((partition(), now_ms - kept));
                    }
                    if topic.settings.compacted && span.end - span.clean >= CLEAN_AFTER.max(span.left) {
                        unclean.push(partition());
                    }
                }
            }
            (expiring, unclean)
        };
        for (partition, oldest) in &expiring {
            self.expire(partition, *oldest)?;
        }
        for partition in &unclean {
            self.clean(partition, now_ms)?;
        }
        Ok(())
    }

    /// Drops the oldest batches of which no record has a timestamp of `oldest` or later.
    fn expire(&self, partition: &TopicPartition, oldest: i64) -> Result<(), BrokerError> {
        let start = self.write(|txn| {
            let (topic, number) = self.key_of(partition)?;
            let mut ranges = txn.open_table(RANGES)?;
            let span = span_in(&ranges, topic, number)?;
            let mut batches = txn.open_table(BATCHES)?;
            let (mut start, mut gone) = (span.end, Vec::new());
            for batch in batches.range((topic, number, i64::MIN)..=(topic, number, i64::MAX))? {
                let (key, batch) = batch?;
                if codec::newest_timestamp(batch.value())? >= oldest {
                    start = key.value().2;
                    break;
                }
                gone.push(key.value());
            }
            for key in gone {
                batches.remove(key)?;
            }
            ranges.insert((topic, number), (start, span.end, span.clean, span.left))?;
            Ok(start)
        })?;
        self.change_span(partition, |span| span.start = start);
        Ok(())
    }

    /// Drops records that a newer one of the same key supersedes, and old tombstones. Offsets stay as they are.
    fn clean(&self, partition: &TopicPartition, now_ms: i64) -> Result<(), BrokerError> {
        let (end, left) = self.write(|txn| {
            let (topic, number) = self.key_of(partition)?;
            let mut ranges = txn.open_table(RANGES)?;
            let span = span_in(&ranges, topic, number)?;
            let all = (topic, number, i64::MIN)..=(topic, number, i64::MAX);
            let mut batches = txn.open_table(BATCHES)?;
            let decoded = |key: (u32, u32, i64), batch: &[u8]| -> Result<Records, Damaged> {
                let mut records = Records::new(partition.clone());
                codec::decode(batch, key.2, i64::MIN, usize::MAX, usize::MAX, &mut records)?;
                Ok(records)
            };
            let mut newest: HashMap<Vec<u8>, i64> = HashMap::new();
            for batch in batches.range(all.clone())? {
                let (key, batch) = batch?;
                let records = decoded(key.value(), batch.value())?;
                for row in 0..records.len() {
                    newest.insert(records.keys.get(row).unwrap_or_default().to_vec(), records.offsets[row]);
                }
            }
            let (mut changed, mut left) = (Vec::new(), 0);
            for batch in batches.range(all)? {
                let (key, batch) = batch?;
                let records = decoded(key.value(), batch.value())?;
                let kept = codec::retain(&records, |row| {
                    let offset = records.offsets[row];
                    let superseded = newest[records.keys.get(row).unwrap_or_default()] != offset;
                    let forgotten = records.values.get(row).is_none()
                        && records.timestamps[row] < now_ms - TOMBSTONES_MS
                        && offset + 1 != span.end;
                    !superseded && !forgotten
                });
                left += signed(kept.len());
                if kept.len() != records.len() {
                    changed.push((key.value(), kept));
                }
            }
            for (key, kept) in changed {
                batches.remove(key)?;
                if !kept.is_empty() {
                    batches.insert(key, &*codec::encode(&kept, 0..kept.len(), key.2))?;
                }
            }
            ranges.insert((topic, number), (span.start, span.end, span.end, left))?;
            Ok((span.end, left))
        })?;
        self.change_span(partition, |span| (span.clean, span.left) = (end, left));
        Ok(())
    }

    /// Topic number and partition, as the tables' keys have them.
    fn key_of(&self, partition: &TopicPartition) -> Result<(u32, u32), Stop> {
        let state = self.state.lock();
        let topic = state.topics.get(&partition.topic).filter(|_| state.span(partition).is_some());
        let number = topic.ok_or_else(|| Stop::Refused(self.no_such_topic(&partition.topic)))?.number;
        Ok((number, unsigned(partition.partition)))
    }

    fn change_span(&self, partition: &TopicPartition, change: impl FnOnce(&mut Span)) {
        let mut state = self.state.lock();
        let topic = state.topics.get_mut(&partition.topic).expect("topics are never removed");
        change(&mut topic.ranges[unsigned(partition.partition) as usize]);
    }
}

impl Snapshot<'_> {
    /// Appends committed records with offsets in `span` to `out`, until it holds `max` rows or `max_bytes` bytes. Returns true
    /// where records are left. The span's end is one that the state has told: the file may be ahead of it.
    pub(super) fn read(
        &self,
        span: Range<i64>,
        max: usize,
        max_bytes: usize,
        out: &mut Records,
    ) -> Result<bool, BrokerError> {
        let number = {
            let state = self.log.state.lock();
            let topic = state.topics.get(&out.partition.topic);
            topic.ok_or_else(|| self.log.no_such_topic(&out.partition.topic))?.number
        };
        let mut read = || -> Result<bool, Stop> {
            let partition = unsigned(out.partition.partition);
            let all = (number, partition, i64::MIN);
            let first = self.batches.range(all..=(number, partition, span.start))?.next_back();
            let first = first.transpose()?.map_or(span.start, |(key, _)| key.value().2);
            for batch in self.batches.range((number, partition, first)..(number, partition, span.end))? {
                let (key, batch) = batch?;
                if out.len() >= max || codec::decode(batch.value(), key.value().2, span.start, max, max_bytes, out)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        read().map_err(|stop| match stop {
            Stop::Refused(error) => error,
            Stop::Storage(error) => self.log.failed(error),
        })
    }
}

/// Why a write was given up.
enum Stop {
    Refused(BrokerError),
    Storage(String),
}

impl<E: Into<redb::Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Storage(error.into().to_string())
    }
}

impl From<Damaged> for redb::Error {
    fn from(damaged: Damaged) -> Self {
        Self::Corrupted(damaged.to_string())
    }
}

/// What a partition holds, by the file: the state may be behind it while another thread's append returns.
fn span_in(
    ranges: &impl ReadableTable<(u32, u32), (i64, i64, i64, i64)>,
    topic: u32,
    partition: u32,
) -> Result<Span, redb::Error> {
    let (start, end, clean, left) = ranges.get((topic, partition))?.map_or((0, 0, 0, 0), |v| v.value());
    Ok(Span { start, end, clean, left })
}

fn check(state: &State, right: Right<'_>, commit: Option<Commit<'_>>) -> Result<(), Stop> {
    if let Right::Producer(id, epoch) = right
        && state.epochs.get(id) != Some(&epoch)
    {
        return Err(Stop::Refused(BrokerError::Fenced { taken: format!("transactional id '{id}'") }));
    }
    if let Some(commit) = commit
        && !state.groups.get(commit.group).is_some_and(|g| g.may_commit(commit.member, commit.generation))
    {
        return Err(Stop::Refused(BrokerError::Fenced { taken: format!("partitions of group '{}'", commit.group) }));
    }
    Ok(())
}

/// Cuts records into batches.
fn chunks(records: &Records) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next;
        let mut bytes = 0;
        while next < records.len() && next - start < BATCH_ROWS && bytes < BATCH_BYTES {
            bytes += records.keys.get(next).map_or(0, <[u8]>::len) + records.values.get(next).map_or(0, <[u8]>::len);
            next += 1;
        }
        (start < next).then_some(start..next)
    })
}

fn unsigned(partition: i32) -> u32 {
    u32::try_from(partition).expect("a partition's number is checked before it gets here")
}

fn signed(rows: usize) -> i64 {
    i64::try_from(rows).expect("a count of rows fits")
}
