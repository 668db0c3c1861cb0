//! Keys the events of a source anew: from its topic, whose partitions are those of one entity's keys, to a topic of
//! driftline's own, whose partitions are those of another's.
//!
//! Records, dead letters and offsets are one transaction. What an event is worth, and whether it is late, is decided here,
//! where each partition is in its own order: with the records go marks of event time to every partition of the topic, by
//! which a reader knows what has passed ([`channels`](crate::window)). The only state is the highest event time of each
//! partition, a note beside its offset. Order and content of what a partition's records become thus do not depend on how
//! they were polled or when a process was killed; only how the partitions are mixed does, and readers order that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, Int64Type};
use metrics::Counter;
use serde_json::Value;

use super::RunError;
use super::context::Context;
use super::publish::Publisher;
use super::worker::{self, IDLE_POLL, Polls, Progress};
use crate::broker::{
    BrokerError, Consumer, ConsumerSettings, Header, NextOffset, Notes, Offsets, OutRecord, Poll, Producer, Records,
    StartAt, TopicPartition,
};
use crate::config::plan::{RekeyPlan, SourcePlan};
use crate::runtime::clock;
use crate::runtime::failpoint;
use crate::source::rekeyed::{MarkRecord, mark_headers, record_headers};
use crate::source::{DeadLetter, Decoded, SourceDecoder, dead_letter, event_time};
use crate::telemetry::metrics as names;
use crate::window::{Late, SourceTime};

/// Name of the stage in dead letters.
const STAGE: &str = "rekey";
/// How long records wait for others: the topic's readers wait for the watermark in any case, …
const WAIT: Duration = Duration::from_millis(50);
/// … and so many records do not wait. As many are polled at once.
const ROWS: usize = 4096;
/// A partition that is further ahead of another, in event time, is not read on (ms): its events would have to be held.
const AHEAD: i64 = 60_000;

/// Runs a worker of a source until a stop is asked for, or, with `until_end`, until nothing is left to read.
pub(super) fn run(
    context: &Arc<Context>,
    source: &SourcePlan,
    plan: &RekeyPlan,
    number: usize,
) -> Result<(), RunError> {
    let name = format!("{STAGE}.{}", source.name);
    worker::keep_joined(context, &name, number, |progress| {
        Worker::open(context, source, plan, number, progress).and_then(Worker::run)
    })
}

/// One partition of the source.
struct Channel {
    /// Event time of what is written or open.
    time: SourceTime,
    next: Option<NextOffset>,
    last_record: Instant,
    idle: bool,
}

/// Records of one poll that go on, each with its key.
struct Piece {
    records: Records,
    rows: Vec<(usize, Vec<u8>)>,
}

/// What a poll was worth.
#[derive(Default)]
struct Counts {
    read: u64,
    written: u64,
    filtered: u64,
    late: u64,
}

struct Worker<'a> {
    context: &'a Arc<Context>,
    source: &'a SourcePlan,
    plan: &'a RekeyPlan,
    progress: &'a Progress,
    consumer: Box<dyn Consumer>,
    producer: Box<dyn Producer>,
    decoder: SourceDecoder,
    group: String,
    /// Partitions of the source, and of the topic written.
    partitions: (usize, i32),
    channels: BTreeMap<i32, Channel>,
    paused: Vec<TopicPartition>,
    open: Vec<Piece>,
    rows: usize,
    /// When the first of what is open came.
    opened: Option<Instant>,
    dead: Vec<DeadLetter>,
    /// Something is to be told that no record tells.
    untold: bool,
    counts: Counts,
    counters: [Counter; 4],
    polls: Polls<'a>,
}

impl<'a> Worker<'a> {
    fn open(
        context: &'a Arc<Context>,
        source: &'a SourcePlan,
        plan: &'a RekeyPlan,
        number: usize,
        progress: &'a Progress,
    ) -> Result<Self, RunError> {
        let broker = &context.wiring.broker;
        let group = context.plan.group(&format!("{STAGE}.{}", source.name));
        let id = context.transactional_id(&format!("{STAGE}-{}-{number}", source.name));
        let count = |topic: &Arc<str>| -> Result<usize, RunError> {
            let info = broker.topic(topic)?;
            let info =
                info.ok_or_else(|| BrokerError::NoSuchTopic { topic: topic.to_string(), broker: broker.describe() })?;
            Ok(info.partitions.len())
        };
        let partitions = (count(&plan.from.topic)?, i32::try_from(count(&source.topic)?).unwrap_or(i32::MAX));
        // The producer comes first: opening it aborts what a killed predecessor left open.
        let producer = broker.producer(Some(&id))?;
        let consumer = broker.consumer(ConsumerSettings {
            group: group.clone(),
            topics: vec![Arc::clone(&plan.from.topic)],
            client_id: id,
            start: Box::new(|_| StartAt::Committed),
            static_member: None,
        })?;
        let counter = |name| metrics::counter!(name, "pipeline" => context.plan.name.clone(), "source" => source.name.to_string());
        Ok(Self {
            decoder: SourceDecoder::new(0, &plan.from, context.wiring.schemas.clone())?,
            context,
            source,
            plan,
            progress,
            consumer,
            producer,
            group,
            partitions,
            channels: BTreeMap::new(),
            paused: Vec::new(),
            open: Vec::new(),
            rows: 0,
            opened: None,
            dead: Vec::new(),
            untold: false,
            counts: Counts::default(),
            counters: [names::SOURCE_READ, names::REKEYED, names::SOURCE_FILTERED, names::WINDOW_LATE].map(counter),
            polls: Polls::new(context, &format!("{STAGE}.{}", source.name), number),
        })
    }

    fn run(mut self) -> Result<(), RunError> {
        loop {
            if self.context.stop.requested() {
                return self.flush();
            }
            let due = self.opened.map(|opened| opened + WAIT);
            let wait = worker::poll_wait(due, IDLE_POLL);
            let Some(poll) = self.polls.poll(self.consumer.as_mut(), ROWS, wait)? else { continue };
            self.rebalance(&poll)?;
            for records in poll.records.iter().filter(|records| !records.is_empty()) {
                self.take(records)?;
            }
            self.notice_idle();
            let now = clock::monotonic();
            let due = self.opened.is_some_and(|opened| now >= opened + WAIT) || self.rows >= ROWS;
            if due || (self.untold && self.opened.is_none()) {
                self.flush()?;
            }
            self.align()?;
            if self.context.options.until_end && self.at_end() {
                return self.flush();
            }
        }
    }

    fn at(&self, partition: i32) -> TopicPartition {
        TopicPartition::new(Arc::clone(&self.plan.from.topic), partition)
    }

    fn out_of_order(&self) -> i64 {
        i64::try_from(self.plan.from.out_of_order.as_millis()).unwrap_or(i64::MAX)
    }

    fn at_end(&self) -> bool {
        !self.channels.is_empty() && self.channels.keys().all(|partition| self.consumer.caught_up(&self.at(*partition)))
    }

    fn rebalance(&mut self, poll: &Poll) -> Result<(), RunError> {
        if poll.revoked.is_empty() && poll.assigned.is_empty() {
            return Ok(());
        }
        // What is open of a lost partition is its next owner's. The rest is read again, too, so that nothing has to be told apart.
        for lost in &poll.revoked {
            self.channels.remove(&lost.partition);
            self.open.retain(|piece| piece.records.partition != *lost);
            self.dead.retain(|letter| letter.partition != *lost);
        }
        self.rows = self.open.iter().map(|piece| piece.rows.len()).sum();
        self.paused.clear();
        let topics = [Arc::clone(&self.plan.from.topic)];
        let broker = &self.context.wiring.broker;
        let notes = self.context.hold("broker", BrokerError::is_retriable, || broker.notes(&self.group, &topics))?;
        for gained in &poll.assigned {
            let channel = Channel {
                time: SourceTime::new(self.out_of_order(), notes.get(gained).copied()),
                next: None,
                last_record: clock::monotonic(),
                idle: false,
            };
            self.channels.insert(gained.partition, channel);
        }
        Ok(())
    }

    fn take(&mut self, records: &Records) -> Result<(), RunError> {
        let (context, decoder) = (self.context, &mut self.decoder);
        let Some(channel) = self.channels.get_mut(&records.partition.partition) else { return Ok(()) };
        let Decoded { batch, dead, .. } =
            context.hold("registry", BrokerError::is_retriable, || decoder.decode(records))?;
        let keys: Vec<&ArrayRef> = self
            .plan
            .from
            .key_fields
            .iter()
            .map(|field| batch.columns.column_by_name(field).expect("the plan's fields have the keys among them"))
            .collect();
        let mut rows = Vec::with_capacity(batch.offsets.len());
        let mut late = Vec::new();
        for (decoded, (&offset, &time)) in batch.offsets.iter().zip(&batch.event_times).enumerate() {
            let row = records.offsets.binary_search(&offset).expect("a decoded row is one of the records");
            match channel.time.late(0, offset, time) {
                None => rows.push((row, key_bytes(&keys, decoded))),
                Some(Late { watermark, .. }) => {
                    let error = format!(
                        "{} offset {offset}: event time {} lies {} ms behind the watermark {}; raise out_of_order of source '{}' if such events are to count by entity '{}'",
                        records.partition,
                        event_time::to_iso(time),
                        watermark - time,
                        event_time::to_iso(watermark.max(event_time::EARLIEST)),
                        self.plan.from.name,
                        self.source.name
                    );
                    late.push(dead_letter::from_records(records, row, STAGE, "late", error));
                }
            }
        }
        channel.next = records.next();
        channel.last_record = clock::monotonic();
        channel.idle = false;
        self.counts.read += batch.read;
        self.counts.filtered += batch.filtered;
        self.counts.late += late.len() as u64;
        self.counts.written += rows.len() as u64;
        self.rows += rows.len();
        self.dead.extend(dead.into_iter().map(|letter| DeadLetter { stage: STAGE, ..letter }).chain(late));
        self.open.push(Piece { records: records.clone(), rows });
        self.opened.get_or_insert_with(clock::monotonic);
        Ok(())
    }

    /// Marks the partitions that have brought nothing for `idle_after` and have nothing to bring.
    fn notice_idle(&mut self) {
        let now = clock::monotonic();
        let topic = &self.plan.from.topic;
        for (partition, channel) in self.channels.iter_mut().filter(|(_, channel)| !channel.idle) {
            let quiet = now.saturating_duration_since(channel.last_record) >= self.plan.from.idle_after;
            if quiet && self.consumer.caught_up(&TopicPartition::new(Arc::clone(topic), *partition)) {
                channel.idle = true;
                self.untold = true;
            }
        }
    }

    /// Reads on only those partitions that are not far ahead of the others, whose events would have to be held for long.
    fn align(&mut self) -> Result<(), RunError> {
        let behind = self.channels.iter().filter(|(partition, _)| !self.consumer.caught_up(&self.at(**partition)));
        let least = behind.map(|(_, channel)| channel.time.newest.unwrap_or(i64::MIN)).min();
        let most = least.map_or(i64::MAX, |least| least.saturating_add(self.out_of_order().max(AHEAD)));
        let ahead = self.channels.iter().filter(|(_, channel)| channel.time.newest.is_some_and(|newest| newest > most));
        let ahead: Vec<TopicPartition> = ahead.map(|(partition, _)| self.at(*partition)).collect();
        let on: Vec<TopicPartition> = self.paused.iter().filter(|at| !ahead.contains(at)).cloned().collect();
        let off: Vec<TopicPartition> = ahead.iter().filter(|at| !self.paused.contains(at)).cloned().collect();
        if !on.is_empty() {
            self.consumer.resume(&on)?;
        }
        if !off.is_empty() {
            self.consumer.pause(&off)?;
        }
        self.paused = ahead;
        Ok(())
    }

    /// Writes what is open, and the marks, and commits.
    fn flush(&mut self) -> Result<(), RunError> {
        if self.opened.is_none() && !self.untold {
            return Ok(());
        }
        let mark = MarkRecord {
            partitions: self.partitions.0,
            at: self.channels.iter().map(|(partition, c)| (*partition, c.time.newest, c.idle)).collect(),
        };
        let (mut offsets, mut notes) = (Offsets::new(), Notes::new());
        for (partition, channel) in &self.channels {
            if let Some(next) = channel.next {
                offsets.insert(self.at(*partition), next);
                notes.extend(channel.time.newest.map(|newest| (self.at(*partition), newest)));
            }
        }
        let Self { context, source, consumer, producer, open, dead, .. } = self;
        let (topic, to, mark) = (&*source.topic, self.partitions.1, mark_headers(&mark));
        producer.note(&notes);
        consumer.note(&notes);
        Publisher {
            producer: producer.as_mut(),
            consumer: consumer.as_mut(),
            transactional: true,
            dead_letters: &context.plan.dead_letter_topic(),
            stop: &context.stop,
            holding: &|error, backoff| context.holding("broker", error, backoff),
        }
        .publish(&offsets, dead, |producer| {
            for Piece { records, rows } in open.iter() {
                send(producer, topic, records, rows)?;
            }
            let mark =
                |partition| OutRecord { topic, partition: Some(partition), headers: &mark, ..OutRecord::default() };
            (0..to).try_for_each(|partition| producer.send(mark(partition)))?;
            failpoint::hit("rekey.sent");
            Ok(())
        })?;
        failpoint::hit("rekey.after_commit");
        self.progress.note();
        self.context.rekeyed.wrote.store(true, Ordering::Release);
        let counts = std::mem::take(&mut self.counts);
        for (counter, count) in self.counters.iter().zip([counts.read, counts.written, counts.filtered, counts.late]) {
            counter.increment(count);
        }
        for letter in self.dead.drain(..) {
            metrics::counter!(names::DEAD_LETTERS, "pipeline" => self.context.plan.name.clone(), "stage" => letter.stage, "reason" => letter.reason).increment(1);
        }
        self.open.clear();
        (self.rows, self.opened, self.untold) = (0, None, false);
        Ok(())
    }
}

/// Sends the records that go on, as they were, by their new keys.
fn send(
    producer: &mut dyn Producer,
    topic: &str,
    records: &Records,
    rows: &[(usize, Vec<u8>)],
) -> Result<(), BrokerError> {
    let TopicPartition { topic: from, partition } = &records.partition;
    let mut own = records.headers.iter().peekable();
    for (row, key) in rows {
        while own.next_if(|(at, _)| at < row).is_some() {}
        let own: &[Header] = own.peek().filter(|(at, _)| at == row).map(|(_, own)| own.as_slice()).unwrap_or_default();
        let headers = record_headers(own, from, *partition, records.offsets[*row]);
        let timestamp = records.timestamps[*row];
        producer.send(OutRecord {
            topic,
            partition: None,
            key: Some(key),
            value: records.values.get(*row),
            timestamp: (timestamp >= 0).then_some(timestamp),
            headers: &headers,
        })?;
    }
    Ok(())
}

/// The bytes of an entity's key: a text as it is, an integer in decimal, several keys as a JSON array of them.
fn key_bytes(keys: &[&ArrayRef], row: usize) -> Vec<u8> {
    let value = |column: &&ArrayRef| match column.data_type() {
        DataType::Int64 => Value::from(column.as_primitive::<Int64Type>().value(row)),
        _ => Value::from(column.as_string::<i32>().value(row)),
    };
    debug_assert!(keys.iter().all(|column| column.is_valid(row)), "the decoder gives up records with null keys");
    let mut values: Vec<Value> = keys.iter().map(value).collect();
    match (values.len(), values.pop()) {
        (1, Some(Value::String(text))) => text.into_bytes(),
        (1, Some(number)) => number.to_string().into_bytes(),
        (_, last) => {
            values.extend(last);
            Value::Array(values).to_string().into_bytes()
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Int64Array, StringArray};

    use super::*;

    #[test]
    fn keys_are_written_as_producers_write_them() {
        let (product, store): (ArrayRef, ArrayRef) =
            (Arc::new(StringArray::from(vec!["p\u{e9} \"1\"", ""])), Arc::new(Int64Array::from(vec![-7, 12])));
        assert_eq!(key_bytes(&[&product], 0), "p\u{e9} \"1\"".as_bytes());
        assert_eq!(key_bytes(&[&product], 1), b"");
        assert_eq!(key_bytes(&[&store], 0), b"-7");
        assert_eq!(key_bytes(&[&product, &store], 1), br#"["",12]"#);
    }
}
