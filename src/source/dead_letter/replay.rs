//! Putting dead letters back on the topics they came from, each once.
//!
//! A letter and the mark that it was replayed are one transaction, and the marks are read after the producer has fenced every
//! other one of its id. So however a replay ends, and however many run at once, a letter is put back once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;

use super::letters::{Filter, Letter, ReadError, read, replayed};
use crate::broker::{Broker, BrokerError, Header, Offsets, OutRecord, Producer, TopicSettings};
use crate::runtime::shutdown::Stop;
use crate::source::dead_letter_headers as names;

/// Letters in one transaction at most …
const LETTERS: usize = 1000;
/// … and bytes of their keys and values.
const BYTES: usize = 8 << 20;
/// How long to wait between two attempts while the broker is away.
const WAIT: Duration = Duration::from_millis(500);

/// The word of letters whose events have been applied to the features already.
const UNSCORABLE: &str = "unscorable";
/// The stage of letters whose events may have been applied to the features of another entity already.
const REKEY: &str = "rekey";

/// Why a replay failed. What it had committed before is replayed and marked; the rest is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The letters cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The log failed.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// Another replay of this pipeline has begun meanwhile.
    #[error("another replay of this pipeline's dead letters has taken over; this one stops")]
    TakenOver,
}

/// What to replay, from where.
#[derive(Debug, Clone)]
pub struct Replay<'a> {
    /// Dead-letter topic.
    pub letters: &'a str,
    /// Compacted topic of marks, created where it is missing.
    pub marks: &'a str,
    /// Transactional id, the same for every replay of the pipeline.
    pub transactional_id: &'a str,
    /// Which letters.
    pub filter: Filter,
    /// This many at most.
    pub limit: Option<u64>,
    /// A record that has been replayed this often already is left alone.
    pub most_replays: u32,
    /// Write nothing, only count.
    pub dry_run: bool,
}

/// What became of the letters that the filter let pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Put back (or, in a dry run, would be), by topic.
    pub sent: BTreeMap<Arc<str>, u64>,
    /// Had been put back before.
    pub already: u64,
    /// Had died again as often as allowed.
    pub too_often: u64,
    /// Events that the features have applied already, which only scoring or keying anew failed on: not replayed unless the filter names
    /// their reason, because a second copy would count twice.
    pub applied: u64,
    /// Only the coordinates are known: the record had expired before the letter was written.
    pub expired: u64,
    /// The topic or partition they came from is not there any more, by topic.
    pub nowhere: BTreeMap<Arc<str>, u64>,
    /// Records on the dead-letter topic that are no dead letters.
    pub foreign: u64,
    /// A stop was asked for, or the limit was reached, before the end.
    pub cut_short: bool,
}

impl Replayed {
    /// Number of letters put back.
    pub fn total(&self) -> u64 {
        self.sent.values().sum()
    }
}

/// Puts letters back: the same key, value, headers and timestamp, on the same partition, with a header that counts the replays.
///
/// # Errors
/// Where the dead-letter topic does not exist, the broker does not answer, or refuses a record. The transaction that was
/// open is rolled back with its marks, so a repeated call does the rest.
pub fn replay(broker: &dyn Broker, what: &Replay<'_>, stop: &Stop) -> Result<Replayed, ReplayError> {
    if broker.topic(what.letters)?.is_none() {
        let error = BrokerError::NoSuchTopic { topic: what.letters.to_owned(), broker: broker.describe() };
        return Err(error.into());
    }
    let mut sender = None;
    if !what.dry_run {
        let settings = TopicSettings { partitions: 1, compacted: true, retention_ms: None };
        broker.create_topic(what.marks, &settings)?;
        // Before the marks are read: from here on no other replay can add any.
        sender = Some(Sender { producer: broker.producer(Some(what.transactional_id))?, marks: what.marks, stop });
    }
    let mut run = Run {
        broker,
        what,
        marks: replayed(broker, what.marks, stop)?,
        partitions: FxHashMap::default(),
        sender,
        chunk: Vec::new(),
        bytes: 0,
        report: Replayed::default(),
    };
    let read = read(broker, what.letters, stop, |letter| run.take(letter));
    match read {
        Ok(foreign) => run.report.foreign = foreign,
        // What was taken is finished first.
        Err(ReplayError::Read(ReadError::Stopped)) => run.report.cut_short = true,
        Err(error) => return Err(error),
    }
    run.flush()?;
    Ok(run.report)
}

struct Run<'a> {
    broker: &'a dyn Broker,
    what: &'a Replay<'a>,
    marks: FxHashMap<String, i64>,
    /// Number of partitions of each topic that letters came from; 0 where it is not there.
    partitions: FxHashMap<Arc<str>, usize>,
    sender: Option<Sender<'a>>,
    chunk: Vec<Letter>,
    bytes: usize,
    report: Replayed,
}

impl Run<'_> {
    /// Takes or leaves a letter. Returns false where no more is wanted.
    fn take(&mut self, letter: Letter) -> Result<bool, ReplayError> {
        let (filter, stored) = (&self.what.filter, &letter.stored);
        if !filter.lets(&letter) {
            return Ok(true);
        }
        let unscorable = stored.reason == UNSCORABLE;
        let elsewhere = stored.stage == REKEY && filter.reason.is_none();
        let topic = stored.partition.topic.clone();
        let report = &mut self.report;
        if self.marks.contains_key(&stored.identity()) {
            report.already += 1;
        } else if stored.replays >= self.what.most_replays {
            report.too_often += 1;
        } else if unscorable && stored.timestamp < 0 && stored.value.is_empty() {
            report.expired += 1;
        } else if elsewhere || unscorable && filter.reason.as_deref() != Some(UNSCORABLE) {
            report.applied += 1;
        } else if !is_there(self.broker, &mut self.partitions, stored)? {
            *report.nowhere.entry(topic).or_default() += 1;
        } else {
            if self.what.limit.is_some_and(|limit| report.total() >= limit) {
                report.cut_short = true;
                return Ok(false);
            }
            *report.sent.entry(topic).or_default() += 1;
            // A letter written twice, by a crash in at-least-once delivery, is one record.
            self.marks.insert(stored.identity(), letter.written_at);
            if self.sender.is_some() {
                self.bytes += stored.key.as_ref().map_or(0, Vec::len) + stored.value.len();
                self.chunk.push(letter);
                if self.chunk.len() >= LETTERS || self.bytes >= BYTES {
                    self.flush()?;
                }
            }
        }
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), ReplayError> {
        self.bytes = 0;
        let chunk = std::mem::take(&mut self.chunk);
        match &mut self.sender {
            Some(sender) if !chunk.is_empty() => sender.commit(&chunk),
            _ => Ok(()),
        }
    }
}

/// True where the partition that the record came from can be written to.
fn is_there(
    broker: &dyn Broker,
    known: &mut FxHashMap<Arc<str>, usize>,
    stored: &super::StoredDeadLetter,
) -> Result<bool, BrokerError> {
    let topic = &stored.partition.topic;
    if !known.contains_key(topic) {
        let count = broker.topic(topic)?.map_or(0, |info| info.partitions.len());
        known.insert(topic.clone(), count);
    }
    Ok(usize::try_from(stored.partition.partition).is_ok_and(|partition| partition < known[topic]))
}

struct Sender<'a> {
    producer: Box<dyn Producer>,
    marks: &'a str,
    stop: &'a Stop,
}

impl Sender<'_> {
    /// Sends letters and their marks in one transaction. A broker that is away is waited for; a transaction that was rolled
    /// back is sent again; one whose outcome is open is asked about until it is known.
    fn commit(&mut self, chunk: &[Letter]) -> Result<(), ReplayError> {
        let mut undecided = false;
        loop {
            let sent = if undecided { Ok(()) } else { self.send(chunk) };
            let error = match sent.and_then(|()| self.producer.commit(&Offsets::new(), None)) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_fenced() => return Err(ReplayError::TakenOver),
                Err(error) if error.is_retriable() || error.is_aborted() || error.is_undecided() => error,
                Err(error) => {
                    // Rolled back by the next producer of this id at latest.
                    let _ = self.producer.abort();
                    return Err(error.into());
                }
            };
            tracing::warn!(%error, "waiting for the broker");
            undecided = error.is_undecided() || (undecided && error.is_retriable());
            if !undecided {
                match self.producer.abort() {
                    Err(fenced) if fenced.is_fenced() => return Err(ReplayError::TakenOver),
                    Err(other) if !other.is_retriable() && !other.is_aborted() => return Err(other.into()),
                    _ => {}
                }
            }
            if self.stop.wait(WAIT) {
                return Err(error.into());
            }
        }
    }

    fn send(&mut self, chunk: &[Letter]) -> Result<(), BrokerError> {
        self.producer.begin()?;
        for letter in chunk {
            let stored = &letter.stored;
            let mut headers = stored.headers.clone();
            let replays = stored.replays.saturating_add(1);
            headers.push(Header { name: names::REPLAYS.to_owned(), value: replays.to_string().into_bytes() });
            self.producer.send(OutRecord {
                topic: &stored.partition.topic,
                partition: Some(stored.partition.partition),
                key: stored.key.as_deref(),
                value: stored.original_value(),
                timestamp: Some(stored.timestamp).filter(|timestamp| *timestamp >= 0),
                headers: &headers,
            })?;
            let mark = serde_json::json!({
                "letter": { "partition": letter.partition, "offset": letter.offset }, "replays": replays,
            });
            self.producer.send(OutRecord {
                topic: self.marks,
                partition: Some(0),
                key: Some(stored.identity().as_bytes()),
                value: Some(mark.to_string().as_bytes()),
                ..OutRecord::default()
            })?;
        }
        Ok(())
    }
}
