//! One membership of the consumer group: from the newest state to the first loss of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::state::{self, StateRecord};
use super::{DriftError, DriftObservation, DriftWorker, PAUSE, RegistryProfiles, Reporter, STAGE};
use crate::broker::{
    BrokerError, Consumer, ConsumerSettings, NextOffset, Offsets, OutRecord, Producer, Records, StartAt, TopicPartition,
};
use crate::drift::merge::Merge;
use crate::drift::monitor::{Monitor, WindowClosed};
use crate::drift::prediction::{PredictionDecoder, PredictionRows};
use crate::runtime::shutdown::Stop;
use crate::runtime::{clock, failpoint};
use crate::source::dead_letter;

/// Records taken by one poll.
const POLL: usize = 4096;
/// How long a poll waits for the first record.
const WAIT: Duration = Duration::from_millis(200);
/// Rows given to the monitor at once.
const BATCH: usize = 4096;
/// Rows waiting of one partition from which on it is not read until the others have caught up.
const MOST_WAITING: usize = 16 * POLL;
/// A partition that is read to its end may still be behind the others: its features may be computed later, on another worker.
/// It is waited for until nothing has come for this long.
const PATIENCE: Duration = Duration::from_secs(30);
/// State is committed after this many rows, even if no window closes: a restart reads no more than these again.
const COMMIT_ROWS: u64 = 100_000;

/// Why a session ended.
pub(super) enum Ended {
    Stopped,
    Drained,
    /// Partitions came or went: go on with the committed state.
    Rebalanced,
}

pub(super) struct Session<'a> {
    worker: &'a DriftWorker,
    reporter: &'a Reporter<'a>,
    consumer: Box<dyn Consumer>,
    producer: Box<dyn Producer>,
    monitor: Monitor,
    decoder: PredictionDecoder,
    merge: Merge,
    /// Rows in order, of which those before `next` are taken.
    rows: PredictionRows,
    next: usize,
    /// Next offsets of the newest state, where the consumer starts.
    starts: Arc<Mutex<BTreeMap<i32, i64>>>,
    assigned: bool,
    /// When each partition last brought a record.
    last_record: BTreeMap<i32, Instant>,
    paused: Vec<i32>,
    uncommitted: u64,
    committed: bool,
}

impl<'a> Session<'a> {
    /// Restores the newest state and joins the group.
    pub(super) fn open(worker: &'a DriftWorker, reporter: &'a Reporter<'a>) -> Result<Self, DriftError> {
        let DriftWorker { plan, monitor: monitor_plan, score, broker, .. } = worker;
        // The producer first: it fences an older instance, which may be about to write another state.
        let producer = broker.producer(Some(&format!("{}-{STAGE}", plan.name)))?;
        let mut monitor = Monitor::new(plan)?;
        let mut offsets = BTreeMap::new();
        if let Some(record) = state::newest(broker.as_ref(), &monitor_plan.state_topic, &plan.name)? {
            monitor.restore(record.monitor.as_bytes())?;
            offsets = record.offsets;
        }
        let topic = broker
            .topic(&score.topic)?
            .ok_or_else(|| BrokerError::NoSuchTopic { topic: score.topic.to_string(), broker: broker.describe() })?;
        for (partition, (earliest, _)) in topic.partitions.iter().enumerate() {
            let partition = i32::try_from(partition).unwrap_or(i32::MAX);
            if let Some(offset) = offsets.get_mut(&partition).filter(|offset| **offset < earliest.0) {
                let gone = earliest.0 - *offset;
                tracing::warn!(topic = %score.topic, partition, gone, "predictions expired before they were monitored");
                *offset = earliest.0;
            }
        }
        let starts = Arc::new(Mutex::new(offsets));
        let consumer = broker.consumer(ConsumerSettings {
            group: plan.group(STAGE),
            topics: vec![Arc::clone(&score.topic)],
            client_id: plan.group(STAGE),
            start: Box::new({
                let starts = Arc::clone(&starts);
                move |partition| match starts.lock().get(&partition.partition) {
                    Some(offset) => StartAt::Offset(NextOffset(*offset)),
                    None => StartAt::Committed,
                }
            }),
            static_member: Some(STAGE.to_owned()),
        })?;
        let columns = monitor_plan.features.len() + 1;
        Ok(Self {
            worker,
            reporter,
            consumer,
            producer,
            monitor,
            decoder: PredictionDecoder::new(&monitor_plan.features),
            merge: Merge::new(columns),
            rows: PredictionRows::new(columns),
            next: 0,
            starts,
            assigned: false,
            last_record: BTreeMap::new(),
            paused: Vec::new(),
            uncommitted: 0,
            committed: false,
        })
    }

    /// True once anything was committed.
    pub(super) fn has_committed(&self) -> bool {
        self.committed
    }

    pub(super) fn run(&mut self, stop: &Stop, drain: &Stop) -> Result<Ended, DriftError> {
        loop {
            // Read before the poll: what was in the log when the drain was asked for is then seen by the poll.
            let draining = drain.requested();
            if stop.requested() {
                self.commit(None)?;
                return Ok(Ended::Stopped);
            }
            let poll = match self.consumer.poll(POLL, WAIT) {
                Ok(poll) => poll,
                Err(error) if error.is_retriable() => {
                    self.reporter.held("broker", error.to_string());
                    stop.wait(PAUSE);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if !poll.revoked.is_empty() || (self.assigned && !poll.assigned.is_empty()) {
                return Ok(Ended::Rebalanced);
            }
            if !poll.assigned.is_empty() {
                self.assigned = true;
                self.start(&poll.assigned)?;
            }
            let quiet = poll.is_empty();
            for records in &poll.records {
                self.decode(records);
            }
            if !self.judge(stop, draining)? {
                continue;
            }
            self.hold_back()?;
            if self.uncommitted >= COMMIT_ROWS || self.dead_letters_due() {
                self.commit(None)?;
            }
            if draining && quiet && self.assigned && self.merge.is_empty() && self.all_caught_up() {
                self.commit(None)?;
                return Ok(Ended::Drained);
            }
        }
    }

    fn topic_partition(&self, partition: i32) -> TopicPartition {
        TopicPartition::new(Arc::clone(&self.worker.score.topic), partition)
    }

    /// Positions of the partitions that this session was given.
    fn start(&mut self, assigned: &[TopicPartition]) -> Result<(), DriftError> {
        let DriftWorker { plan, score, broker, .. } = self.worker;
        let committed = broker.committed(&plan.group(STAGE), &[Arc::clone(&score.topic)])?;
        let info = broker.topic(&score.topic)?;
        let earliest = |partition: i32| {
            let place = usize::try_from(partition).ok()?;
            Some(info.as_ref()?.partitions.get(place)?.0.0)
        };
        let now = clock::monotonic();
        self.last_record = assigned.iter().map(|tp| (tp.partition, now)).collect();
        let starts = self.starts.lock();
        self.merge.start(assigned.iter().map(|tp| {
            let position = starts
                .get(&tp.partition)
                .copied()
                .or_else(|| committed.get(tp).map(|next| next.0))
                .or_else(|| earliest(tp.partition))
                .unwrap_or_default();
            (tp.partition, position)
        }));
        Ok(())
    }

    fn decode(&mut self, records: &Records) {
        let partition = records.partition.partition;
        self.last_record.insert(partition, clock::monotonic());
        let Some(buffer) = self.merge.get_mut(partition) else { return };
        for row in 0..records.len() {
            let offset = records.offsets[row];
            buffer.position = offset + 1;
            let decoded = match records.values.get(row) {
                Some(value) => self
                    .decoder
                    .decode(partition, offset, value, &mut buffer.rows)
                    .map_err(|error| ("malformed", format!("this is no prediction: {error}"))),
                None => Err(("null_value", "a prediction has a value; this record has none".to_owned())),
            };
            if let Err((reason, error)) = decoded {
                buffer.dead.push_back(dead_letter::from_records(records, row, "monitor", reason, error));
            }
        }
    }

    /// Gives all rows that are in order to the monitor, and commits each window that closes. False where a stop came first.
    /// With `draining`, nothing more will be written than is there.
    fn judge(&mut self, stop: &Stop, draining: bool) -> Result<bool, DriftError> {
        let now = clock::monotonic();
        loop {
            if self.next == self.rows.len() {
                self.rows.clear();
                self.next = 0;
                let Self { consumer, merge, rows, worker, last_record, .. } = self;
                let topic = &worker.score.topic;
                let over = |partition| {
                    let silent = last_record.get(&partition).is_none_or(|last| now.duration_since(*last) >= PATIENCE);
                    (draining || silent) && consumer.caught_up(&TopicPartition::new(Arc::clone(topic), partition))
                };
                merge.take(over, BATCH, rows);
                if rows.is_empty() {
                    return Ok(true);
                }
            }
            let profiles =
                RegistryProfiles { registry: self.worker.registry.as_ref(), model: &self.worker.score.model };
            let observed = self.monitor.observe(&self.rows, self.next..self.rows.len(), &profiles);
            self.uncommitted += (observed.next - self.next) as u64;
            self.next = observed.next;
            for (model_version, reason) in observed.unmonitored {
                tracing::warn!(model_version, reason, "predictions of this version are not monitored");
                self.reporter.tell(DriftObservation::Unmonitored { model_version, reason });
            }
            if let Some(closed) = observed.closed {
                self.commit(Some(closed))?;
            } else if let Some(reason) = observed.held {
                self.reporter.held("registry", reason);
                if stop.wait(PAUSE) {
                    return Ok(false);
                }
            }
            if stop.requested() {
                return Ok(false);
            }
        }
    }

    /// Pauses partitions that have run far ahead of the others, and resumes them.
    fn hold_back(&mut self) -> Result<(), DriftError> {
        let full: Vec<i32> = self
            .merge
            .iter()
            .filter(|(_, buffer)| buffer.len() >= MOST_WAITING)
            .map(|(partition, _)| partition)
            .collect();
        let name =
            |partitions: Vec<i32>| partitions.into_iter().map(|partition| self.topic_partition(partition)).collect();
        let pause: Vec<TopicPartition> = name(full.iter().copied().filter(|p| !self.paused.contains(p)).collect());
        let resume: Vec<TopicPartition> = name(self.paused.iter().copied().filter(|p| !full.contains(p)).collect());
        if !pause.is_empty() {
            self.consumer.pause(&pause)?;
        }
        if !resume.is_empty() {
            self.consumer.resume(&resume)?;
        }
        self.paused = full;
        Ok(())
    }

    /// The first offset of each partition that is not taken.
    fn positions(&self) -> BTreeMap<i32, i64> {
        let mut positions = BTreeMap::new();
        for (partition, _) in self.merge.iter() {
            let waiting = (self.next..self.rows.len()).find(|&row| self.rows.partitions[row] == partition);
            let position = waiting.map(|row| self.rows.offsets[row]).or_else(|| self.merge.first_waiting(partition));
            positions.extend(position.map(|position| (partition, position)));
        }
        positions
    }

    fn dead_letters_due(&self) -> bool {
        let positions = self.positions();
        self.merge.iter().any(|(partition, buffer)| {
            buffer.dead.front().is_some_and(|dead| positions.get(&partition).is_some_and(|next| dead.offset < *next))
        })
    }

    fn all_caught_up(&self) -> bool {
        self.merge.iter().all(|(partition, _)| self.consumer.caught_up(&self.topic_partition(partition)))
    }

    fn lag(&self, positions: &BTreeMap<i32, i64>) -> u64 {
        let behind = positions.iter().map(|(partition, position)| {
            let end = self.consumer.end(&self.topic_partition(*partition));
            end.map_or(0, |end| u64::try_from(end.0 - position).unwrap_or(0))
        });
        behind.sum()
    }

    /// Writes state, events, dead letters and offsets of all that was taken, at once.
    fn commit(&mut self, closed: Option<WindowClosed>) -> Result<(), DriftError> {
        let positions = self.positions();
        let unchanged = *self.starts.lock() == positions;
        if !self.assigned || (closed.is_none() && unchanged) {
            return Ok(());
        }
        let result = self.transact(closed.as_ref(), &positions);
        if let Err(error) = result {
            // The session ends with this error, and the next one reads from the committed offsets again.
            if let Err(abort) = self.producer.abort() {
                tracing::debug!(%abort, "the transaction could not be given up; opening a new producer does that");
            }
            return Err(error);
        }
        self.committed = true;
        for (partition, position) in &positions {
            let Some(buffer) = self.merge.get_mut(*partition) else { continue };
            while buffer.dead.front().is_some_and(|dead| dead.offset < *position) {
                buffer.dead.pop_front();
            }
        }
        let lag = self.lag(&positions);
        *self.starts.lock() = positions;
        let rows = std::mem::take(&mut self.uncommitted);
        self.reporter.goes_on();
        self.reporter.tell(DriftObservation::Progress { rows, lag });
        if let Some(closed) = closed {
            self.reporter.tell(DriftObservation::Window { closed: Box::new(closed), lag });
        }
        if failpoint::hit("drift.after_commit") {
            return Err(DriftError::Failpoint("drift.after_commit"));
        }
        Ok(())
    }

    fn transact(&mut self, closed: Option<&WindowClosed>, positions: &BTreeMap<i32, i64>) -> Result<(), DriftError> {
        let DriftWorker { plan, monitor: monitor_plan, .. } = self.worker;
        self.producer.begin()?;
        let dead_letters = plan.dead_letter_topic();
        for (partition, buffer) in self.merge.iter() {
            let position = positions.get(&partition).copied().unwrap_or(0);
            for dead in buffer.dead.iter().take_while(|dead| dead.offset < position) {
                let headers = dead.out_headers();
                self.producer.send(dead.to_record(&dead_letters, &headers))?;
            }
        }
        for event in closed.iter().flat_map(|closed| &closed.events) {
            let value = sonic_rs::to_string(event).expect("finite numbers and strings always have a JSON form");
            self.producer.send(OutRecord {
                topic: &monitor_plan.topic,
                key: Some(event.incident_id.as_bytes()),
                value: Some(value.as_bytes()),
                ..OutRecord::default()
            })?;
        }
        if let (Some(event), Some(retraining)) = (closed.and_then(|c| c.retraining.as_ref()), &plan.retraining) {
            let value = sonic_rs::to_string(event).expect("integers and strings always have a JSON form");
            self.producer.send(OutRecord {
                topic: &retraining.topic,
                key: Some(event.id.as_bytes()),
                value: Some(value.as_bytes()),
                ..OutRecord::default()
            })?;
        }
        let state = StateRecord { offsets: positions.clone(), monitor: self.monitor.snapshot() }.to_json();
        self.producer.send(OutRecord {
            topic: &monitor_plan.state_topic,
            partition: Some(0),
            key: Some(plan.name.as_bytes()),
            value: Some(state.as_bytes()),
            ..OutRecord::default()
        })?;
        if failpoint::hit("drift.before_commit") {
            return Err(DriftError::Failpoint("drift.before_commit"));
        }
        let offsets: Offsets =
            positions.iter().map(|(partition, next)| (self.topic_partition(*partition), NextOffset(*next))).collect();
        let token = self.consumer.token()?;
        Ok(self.producer.commit(&offsets, Some(&token))?)
    }
}
