//! A worker of the feature stage, and of the fused run: one thread, one consumer, one producer, its tasks.
//!
//! Each turn polls, decodes and applies; rows gather in an open batch until it closes for a named reason. Then, in this
//! order: the online store has the newest rows, the model has scored, everything is produced, and one transaction commits
//! output and offsets together. Without a model and lookups the online store has the rows at the end of each turn, long before
//! that: a write may be repeated, so that it need not wait for the commit, only the commit for it. Checkpoints follow commits, so a
//! checkpoint never names an offset that is not committed.
//!
//! After a crash the task is restored from its newest checkpoint and reads on from there; rows below the committed offset
//! are computed again for the offline files, but neither produced nor committed again.

mod checkpoints;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arrow::array::{AsArray, BooleanArray, RecordBatch};
use arrow::compute::{concat_batches, filter_record_batch};
use arrow::datatypes::{Int64Type, TimestampMillisecondType};
use parking_lot::Mutex;

use self::checkpoints::Open;
use super::RunError;
use super::account::{Account, Ledger, sample};
use super::backpressure::Pauses;
use super::checkpointer::Checkpointer;
use super::context::Context;
use super::lookups::Lookups;
use super::worker::{self, Ends, IDLE_POLL, Progress};
use crate::broker::{BrokerError, NextOffset, Notes, Offsets, Poll, Records, StartAt, TopicPartition};
use crate::config::plan::{SourcePlan, Unavailable};
use crate::runtime::clock;
use crate::runtime::failpoint;
use crate::score::{BatchLimits, Batcher, CloseReason, Closed, Scorer, Scores};
use crate::source::{DeadLetter, Decoded, SourceDecoder, dead_letter, rekeyed};
use crate::store::{Definition, Manifest, OfflineError, OnlineError};
use crate::telemetry::board::Kind;
use crate::telemetry::metrics::{CHECKPOINT_PAUSE, Step, Steps};
use crate::window::{Applied, FeatureRows, Published, Task, TaskClock, WindowError, emitted_columns, row_columns};

/// Name of the stage: of its consumer group and in metrics.
const STAGE: &str = "features";
/// Rows a task applies before the next one has its turn.
const ADVANCE_ROWS: usize = 16_384;
/// How long a batch stays open where nothing is scored: the online store does not wait for its end, and emitted windows may
/// wait for each other. A transaction costs the broker more than their rows do.
const COMMIT_WAIT: Duration = Duration::from_millis(100);
/// The limits of a batch while a poll's worth and more is left to read: its rows are late already, and a transaction costs
/// as much for few as for many.
const BACKLOG: BatchLimits = BatchLimits { rows: 65_536, bytes: 64 << 20, wait: Duration::from_millis(250) };
/// How long a poll waits while rows are held back for another source, or this worker for the others to finish.
const HELD_POLL: Duration = Duration::from_millis(20);

/// Runs a worker until a stop is asked for, or, with `until_end`, until nothing is left to read.
pub(super) fn run(context: &Arc<Context>, number: usize) -> Result<(), RunError> {
    let mut scorer = context.scorer(number);
    worker::keep_joined(context, STAGE, number, |progress| {
        let ended = Worker::open(context, number, &mut scorer, progress).and_then(Worker::run);
        context.owned.lock().remove(&number);
        ended
    })
}

/// What the start policy found for a partition number, for the task that is built after the poll.
type Starts = Arc<Mutex<BTreeMap<i32, Result<Option<Manifest>, RunError>>>>;

/// One task and what surrounds it.
struct Slot {
    task: Task,
    /// Committed next offset of each source; no dead letter below it is produced again.
    committed: Vec<i64>,
    /// What is published of each source, and is neither produced nor committed again.
    published: Vec<Published>,
    /// Dead letters whose offset is not yet passed by the task.
    dead: VecDeque<DeadLetter>,
    /// When each source last brought a record.
    last_record: Vec<Instant>,
    pauses: Pauses,
    /// Committed feature rows since the last checkpoint.
    rows: Vec<RecordBatch>,
    /// Committed rows of each of the plan's emitted windows since the last checkpoint.
    windows: Vec<Vec<RecordBatch>>,
    /// Number of rows since the last checkpoint, those of the open batch among them.
    rows_count: usize,
    online: Online,
    /// True if anything was applied since the last checkpoint.
    dirty: bool,
    checkpointed: Instant,
    /// The checkpoint being taken.
    open: Option<Open>,
}

/// What the online store has of a task. When another version begins to serve, it gets the rows of all entities once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Online {
    /// Rows of the version that served before: the task has not come to where that one ended, so none of its own yet.
    Behind,
    /// Rows of the entities from this number on are to follow; those of new events go there as they come.
    From(u32),
    /// All.
    Complete,
}

struct Worker<'a> {
    context: &'a Arc<Context>,
    number: usize,
    ends: Ends<'a>,
    starts: Starts,
    decoders: Vec<SourceDecoder>,
    scorer: &'a mut Option<Scorer>,
    account: Account,
    ledger: Ledger,
    steps: Steps,
    lookups: Lookups,
    slots: BTreeMap<i32, Slot>,
    checkpointer: Checkpointer,
    checkpoint_pause: metrics::Histogram,
    /// What is applied and not yet published, by partition number.
    batcher: Batcher<(i32, Applied)>,
    /// Rows of the open batch that the online store does not have yet, by partition number.
    unwritten: Vec<(i32, FeatureRows)>,
    /// When a batch closes where there is no backlog.
    limits: BatchLimits,
    /// Arrival in the log of some records of the open batch, wall clock ms.
    samples: Vec<i64>,
}

impl<'a> Worker<'a> {
    fn open(
        context: &'a Arc<Context>,
        number: usize,
        scorer: &'a mut Option<Scorer>,
        progress: &'a Progress,
    ) -> Result<Self, RunError> {
        let plan = &context.plan;
        let starts: Starts = Arc::default();
        let start = start_policy(context, &starts);
        let ends = Ends::open(context, STAGE, number, context.source_topics(), start, progress)?;
        let decoders = plan
            .sources
            .iter()
            .enumerate()
            .map(|(i, s)| SourceDecoder::new(i, s, context.wiring.schemas.clone()))
            .collect::<Result<_, _>>()?;
        let unscored = BatchLimits { rows: ADVANCE_ROWS, bytes: 64 << 20, wait: COMMIT_WAIT };
        let limits = plan.score.as_ref().map_or(unscored, BatchLimits::of);
        Ok(Self {
            ends,
            checkpointer: Checkpointer::start(context, number)?,
            checkpoint_pause: metrics::histogram!(CHECKPOINT_PAUSE, "pipeline" => plan.name.clone()),
            account: Account::new(context, STAGE, number),
            ledger: Ledger::new(context, number),
            steps: Steps::of(&plan.name),
            lookups: Lookups::new(plan)?,
            context,
            number,
            starts,
            decoders,
            scorer,
            slots: BTreeMap::new(),
            batcher: Batcher::new(limits),
            unwritten: Vec::new(),
            limits,
            samples: Vec::new(),
        })
    }

    fn run(mut self) -> Result<(), RunError> {
        loop {
            if self.context.stop.requested() {
                return self.end();
            }
            let Some(poll) = self.ends.poll(self.poll_wait())? else { continue };
            self.rebalance(&poll)?;
            self.batcher.limit(self.limits_of(&poll.records));
            self.take(&poll.records)?;
            self.advance()?;
            // A model that computes meanwhile is worth waiting for, and what is looked up must not wait for a store that is away.
            if self.scorer.is_none() && self.context.wiring.lookups.is_none() {
                self.write_online()?;
            }
            self.hand_over()?;
            if let Some(closed) = self.batcher.poll(clock::monotonic()) {
                self.flush(closed)?;
            }
            self.checkpoints(false)?;
            if self.context.options.until_end && self.may_end()? {
                return self.end();
            }
        }
    }

    fn poll_wait(&self) -> Duration {
        // What waits for the watermark needs a new record, or an idle source, and neither comes that soon.
        let held = self.slots.values().any(|slot| {
            let waits = |source| slot.task.buffered(source) > 0;
            !slot.task.is_in_event_time() && (0..self.context.engine.sources()).any(waits)
        });
        let idle = if held || self.is_finished() { HELD_POLL } else { IDLE_POLL };
        worker::poll_wait(self.batcher.deadline(), if self.has_slices() { Duration::ZERO } else { idle })
    }

    /// When the batch closes that these records come into. A model gets its micro-batches as the pipeline has them.
    fn limits_of(&self, polled: &[Records]) -> BatchLimits {
        let behind = |records: &Records| {
            let (end, next) = (self.ends.consumer.end(&records.partition), records.next());
            end.zip(next).is_some_and(|(end, next)| end.0 - next.0 >= worker::POLL_RECORDS as i64)
        };
        let own = self.limits;
        if self.scorer.is_some() || !polled.iter().any(behind) {
            return own;
        }
        let (rows, bytes) = (own.rows.max(BACKLOG.rows), own.bytes.max(BACKLOG.bytes));
        BatchLimits { rows, bytes, wait: own.wait.max(BACKLOG.wait) }
    }

    /// Drops the tasks that were lost and builds those that were gained.
    fn rebalance(&mut self, poll: &Poll) -> Result<(), RunError> {
        if !poll.revoked.is_empty() {
            let lost: Vec<i32> = numbers(&poll.revoked);
            self.slots.retain(|partition, _| !lost.contains(partition));
            // What a lost task applied is not committed, so its next owner will apply it again.
            self.batcher.retain(|(partition, _)| !lost.contains(partition));
            self.unwritten.retain(|(partition, _)| !lost.contains(partition));
        }
        let mut gained = numbers(&poll.assigned);
        // Another version may serve by now: see `role`. The run then ends in order, without these partitions.
        if !gained.is_empty() && !self.context.keeps_role()? {
            gained.clear();
        }
        // How many tasks there are decides how much memory each of them may take, while it is restored, too.
        if !gained.is_empty() {
            let owned = self.slots.keys().chain(&gained).copied().collect();
            self.context.owned.lock().insert(self.number, owned);
        }
        for partition in &gained {
            let started = clock::monotonic();
            let found = self.starts.lock().remove(partition).unwrap_or(Ok(None))?;
            let slot = self.restore(*partition, found)?;
            tracing::debug!(partition, entities = slot.task.entities(), took = ?started.elapsed(), "task restored");
            self.slots.insert(*partition, slot);
        }
        if !poll.revoked.is_empty() || !gained.is_empty() {
            for slot in self.slots.values() {
                slot.pauses.renew(&slot.task, self.context, &mut *self.ends.consumer)?;
            }
            let owned: Vec<i32> = self.slots.keys().copied().collect();
            let text = match owned.len() {
                0 => format!("worker {} owns no partition", self.number),
                _ => format!("worker {} owns partitions {}", self.number, ranges(&owned)),
            };
            self.context.board.say(Kind::Rebalance, None, text);
            self.context.owned.lock().insert(self.number, owned);
        }
        Ok(())
    }

    fn restore(&mut self, partition: i32, manifest: Option<Manifest>) -> Result<Slot, RunError> {
        let context = self.context;
        let mut task = context.hold("offline", RunError::is_offline_away, || -> Result<Task, RunError> {
            let engine = Arc::clone(&context.engine);
            let state = manifest.iter().flat_map(|manifest| context.wiring.offline.read_state(manifest));
            Task::restore_within(engine, partition, state.map(|batch| Ok(batch?)), context.cold_states(partition)?)
        })?;
        let topics = context.source_topics();
        let of_task: Vec<_> = topics.iter().map(|topic| TopicPartition::new(Arc::clone(topic), partition)).collect();
        let consumer = &self.ends.consumer;
        let (committed, notes) = context.hold("broker", BrokerError::is_retriable, || consumer.committed(&of_task))?;
        let next = |at| committed.get(at).copied().unwrap_or(NextOffset(0));
        let published = of_task.iter().map(|at| Published { next: next(at), frontier: notes.get(at).copied() });
        let published: Vec<Published> = published.collect();
        published.iter().enumerate().for_each(|(source, published)| task.resume(source, published));
        let epoch = context.wiring.role.epoch();
        let handed_over = context.wiring.online.is_none()
            || context.hold("offline", OfflineError::is_retriable, || {
                context.wiring.offline.is_handed_over(epoch, partition)
            })?;
        let online = if handed_over { Online::Complete } else { Online::Behind };
        self.checkpointer.begin(partition, manifest)?;
        context.rebuilt.lock().insert(partition);
        let now = clock::monotonic();
        Ok(Slot {
            task,
            committed: of_task.iter().map(|at| next(at).0).collect(),
            published,
            dead: VecDeque::new(),
            last_record: vec![now; topics.len()],
            pauses: Pauses::new(topics.len()),
            rows: Vec::new(),
            windows: vec![Vec::new(); context.plan.windows.len()],
            rows_count: 0,
            online,
            dirty: false,
            checkpointed: now,
            open: None,
        })
    }

    /// Decodes what was polled and offers it to the tasks.
    fn take(&mut self, polled: &[Records]) -> Result<(), RunError> {
        let mut clock = self.steps.start();
        for records in polled {
            let partition = records.partition.partition;
            // Records of a partition that this worker does not own any more are somebody else's.
            if records.is_empty() || !self.slots.contains_key(&partition) {
                continue;
            }
            let plan = &self.context.plan;
            let source = plan
                .sources
                .iter()
                .position(|s| s.topic == records.partition.topic)
                .expect("only the sources' topics are subscribed");
            let unpacked = plan.sources[source].rekeyed.is_some().then(|| rekeyed::unpack(records));
            let (next, records) = (records.next(), unpacked.as_ref().map_or(records, |(events, _)| events));
            let mut decoded = self.decode(source, records)?;
            if let (Some((_, rekeyed)), Some(NextOffset(next))) = (&unpacked, next) {
                decoded.batch.next = next;
                decoded.batch.rekeyed = Some(rekeyed::of_rows(rekeyed, records, &decoded.batch.offsets));
            }
            self.samples.extend(sample(records));
            self.ledger.nonfinite(source, decoded.nonfinite);
            let slot = self.slots.get_mut(&partition).expect("it was there a few lines above");
            slot.last_record[source] = clock::monotonic();
            slot.dead.extend(decoded.dead);
            let late = slot.task.offer(decoded.batch)?;
            for late in late {
                let row = records.offsets.binary_search(&late.offset).expect("a late row is one of those just offered");
                let error = format!(
                    "{} offset {}: event time {} lies {} ms behind the watermark {}; raise out_of_order of source '{}' if such events are to count",
                    records.partition,
                    late.offset,
                    late.event_time,
                    late.watermark - late.event_time,
                    late.watermark,
                    plan.sources[source].name
                );
                slot.dead.push_back(dead_letter::from_records(records, row, "window", "late", error));
            }
            slot.dead.make_contiguous().sort_by_key(|d| d.offset);
        }
        clock.end(Step::Decode);
        Ok(())
    }

    /// Decodes, waiting for a schema registry that is away.
    fn decode(&mut self, source: usize, records: &Records) -> Result<Decoded, RunError> {
        let decoder = &mut self.decoders[source];
        self.context.hold("registry", BrokerError::is_retriable, || decoder.decode(records))
    }

    /// Lets the tasks apply what may be applied, and publishes whenever that fills a batch.
    fn advance(&mut self) -> Result<(), RunError> {
        let sources = &self.context.plan.sources;
        let now = clock::monotonic();
        let partitions: Vec<i32> = self.slots.keys().copied().collect();
        for partition in partitions {
            let rekeyed = self.rekeyed(partition);
            let slot = self.slots.get_mut(&partition).expect("only a rebalance removes slots");
            for (_, last) in slot.last_record.iter_mut().enumerate().filter(|(source, _)| slot.pauses.has(*source)) {
                *last = now;
            }
            let idle =
                |(source, last): (&SourcePlan, &Instant)| now.saturating_duration_since(*last) >= source.idle_after;
            let mut idle: Vec<bool> = sources.iter().zip(&slot.last_record).map(idle).collect();
            let caught_up: Vec<bool> = sources
                .iter()
                .map(|s| self.ends.consumer.caught_up(&TopicPartition::new(Arc::clone(&s.topic), partition)))
                .collect();
            // The end of what a version follows is the end of nothing.
            if self.context.options.until_end && !self.context.is_following() {
                if rekeyed && caught_up.iter().all(|caught_up| *caught_up) {
                    slot.task.end();
                }
                // The end of a topic is the end of its time: a source that is paused for it need not wait any longer.
                if slot.task.is_in_event_time() {
                    idle.iter_mut().zip(&caught_up).for_each(|(idle, caught_up)| *idle |= caught_up);
                }
            }
            loop {
                let mut clock = self.steps.start();
                let slot = self.slots.get_mut(&partition).expect("only a rebalance removes slots");
                let applied = slot.task.advance(&TaskClock { caught_up: &caught_up, idle: &idle }, ADVANCE_ROWS)?;
                clock.end(Step::Window);
                if failpoint::hit("features.after_window") {
                    return Err(RunError::Window(WindowError::Rows("failpoint".to_owned())));
                }
                let more = applied.more;
                if let Some(first) = &applied.failures.first {
                    tracing::warn!(
                        rows = applied.failures.rows,
                        partition,
                        "features could not be computed, they are null: {first}"
                    );
                }
                if applied.counts.iter().any(|c| c.read > 0) {
                    slot.dirty = true;
                    let emitted = applied.emitted.iter().flatten().map(|rows| &rows.batch);
                    let (mut rows, mut bytes) = (0, 0);
                    for batch in emitted.chain([&applied.rows.batch]) {
                        rows += batch.num_rows();
                        bytes += batch.get_array_memory_size();
                    }
                    // Rows that no file will hold are gone once they are published.
                    if self.context.plan.offline.rows {
                        slot.rows_count += rows;
                    }
                    // What is behind gets the rows of all its entities once it has come up.
                    if slot.online != Online::Behind && applied.online.batch.num_rows() > 0 {
                        self.unwritten.push((partition, applied.online.clone()));
                    }
                    if let Some(closed) = self.batcher.push((partition, applied), rows, bytes, now) {
                        self.flush(closed)?;
                    }
                }
                if !more {
                    break;
                }
            }
            let slot = self.slots.get_mut(&partition).expect("only a rebalance removes slots");
            slot.pauses.follow(&slot.task, self.context, &mut *self.ends.consumer)?;
        }
        Ok(())
    }

    /// Writes rows of all entities to the online store, some at a turn, where another version served before.
    fn hand_over(&mut self) -> Result<(), RunError> {
        let context = self.context;
        let Some(store) = context.wiring.online.as_deref() else { return Ok(()) };
        for (partition, slot) in &mut self.slots {
            if slot.online == Online::Behind {
                let settled = slot.task.settled();
                let mut sources = context.plan.sources.iter().zip(settled).zip(&slot.committed);
                let reached = sources.all(|((source, settled), committed)| {
                    let at = TopicPartition::new(Arc::clone(&source.topic), *partition);
                    settled.is_some_and(|next| next.0 >= *committed) || self.ends.consumer.caught_up(&at)
                });
                if !reached {
                    continue;
                }
                slot.online = Online::From(0);
            }
            let Online::From(first) = slot.online else { continue };
            let (rows, next) = slot.task.current_rows(first, ADVANCE_ROWS)?;
            store.write(&rows, &|| context.stop.requested()).map_err(given_up)?;
            failpoint::hit("features.handing_over");
            slot.online = next.map_or(Online::Complete, Online::From);
            if slot.online == Online::Complete {
                let epoch = context.wiring.role.epoch();
                context.hold("offline", OfflineError::is_retriable, || {
                    context.wiring.offline.hand_over(epoch, *partition)
                })?;
                tracing::debug!(partition, entities = slot.task.entities(), "the online store has all rows");
            }
        }
        Ok(())
    }

    /// True where the re-keyers of this process have ended, and all that they wrote is read of a partition.
    fn rekeyed(&self, partition: i32) -> bool {
        let sources = self.context.plan.sources.iter().enumerate();
        let mut own = sources.filter(|(_, source)| source.rekeyed.is_some()).peekable();
        if own.peek().is_none() {
            return true;
        }
        let (wrote, ends) = (&self.context.rekeyed.wrote, self.context.rekeyed.ends.lock());
        let (Some(ends), Some(slot)) = (ends.as_ref(), self.slots.get(&partition)) else { return false };
        let settled = slot.task.settled();
        own.all(|(source, plan)| {
            let at = TopicPartition::new(Arc::clone(&plan.topic), partition);
            let Some(end) = ends.get(&at).filter(|end| end.0 > 0) else { return true };
            // A committed transaction becomes visible a moment after its commit is answered.
            let visible = !wrote.load(Ordering::Acquire) || settled[source].is_some_and(|next| next.0 >= end.0 - 1);
            visible && self.ends.consumer.end(&at) >= Some(*end)
        })
    }

    /// With `--until-end`: true where this worker may leave its group. The others would have to give back what they are
    /// reading and begin again at their last checkpoints, so it stays until all that they own is finished, too. What is
    /// finished may change hands: whoever gets it has nothing left to do.
    fn may_end(&mut self) -> Result<bool, RunError> {
        if self.at_end() && !self.is_finished() {
            self.publish_open()?;
            self.checkpointer.wait()?;
            self.context.finished.lock().extend(self.slots.keys());
        }
        let owned: Vec<i32> = self.context.owned.lock().values().flatten().copied().collect();
        let finished = self.context.finished.lock().clone();
        Ok(worker::may_leave(self.slots.is_empty(), &owned, &finished, || {
            // A broker that does not answer now is asked again after the next poll.
            let topic = self.context.wiring.broker.topic(&self.context.plan.sources[0].topic).ok().flatten();
            topic.map_or(usize::MAX, |topic| topic.partitions.len())
        }))
    }

    /// True where this worker owns partitions, and all of them are finished.
    fn is_finished(&self) -> bool {
        let finished = self.context.finished.lock();
        !self.slots.is_empty() && self.slots.keys().all(|partition| finished.contains(partition))
    }

    /// True where nothing is left to read or apply.
    fn at_end(&self) -> bool {
        let sources = &self.context.plan.sources;
        !self.slots.is_empty()
            && self.slots.keys().all(|partition| self.rekeyed(*partition))
            && self.slots.iter().all(|(partition, slot)| {
                (0..sources.len()).all(|s| {
                    // A version that follows goes on holding what the watermark has not passed.
                    let held = slot.task.is_in_event_time() && self.context.is_following();
                    (held || slot.task.buffered(s) == 0)
                        && slot.online == Online::Complete
                        && self.ends.consumer.caught_up(&TopicPartition::new(Arc::clone(&sources[s].topic), *partition))
                })
            })
    }

    /// Publishes a closed batch and commits it. It holds all that any task applied since the last commit.
    fn flush(&mut self, closed: Closed<(i32, Applied)>) -> Result<(), RunError> {
        let context = self.context;
        let mut clock = self.steps.start();
        let (reason, mut open) = (closed.reason, closed.items);
        self.look_up(&mut open)?;
        let fresh = open.iter().map(|(partition, applied)| self.not_yet_published(*partition, &applied.rows.batch));
        let fresh = concat(context, fresh.collect::<Result<Vec<_>, _>>()?.into_iter())?;

        let scores = match self.scorer.as_mut() {
            Some(scorer) if fresh.num_rows() > 0 => {
                // The online store and the model do not need each other: the write waits for the network while the model computes.
                let rows = unwritten(context, &mut self.unwritten)?;
                let (written, scores) = std::thread::scope(|scope| {
                    let writer = scope.spawn(|| write_online(context, &rows));
                    let scores = scorer.score(&fresh);
                    (writer.join().expect("the online store does not panic"), scores)
                });
                let scores = scores?;
                written?;
                clock.end(Step::OnlineAndScore);
                Some(scores)
            }
            _ => {
                self.write_online()?;
                clock = self.steps.start();
                None
            }
        };

        let (mut offsets, mut notes) = (Offsets::new(), Notes::new());
        let mut dead = Vec::new();
        for (partition, slot) in &mut self.slots {
            let next = slot.task.settled();
            for (source, published) in slot.published.iter().enumerate() {
                if let Some(published) = published.after(&slot.task, source) {
                    let at = TopicPartition::new(Arc::clone(&context.plan.sources[source].topic), *partition);
                    notes.extend(published.frontier.map(|frontier| (at.clone(), frontier)));
                    offsets.insert(at, published.next);
                }
            }
            let committed = slot.committed.clone();
            let position = |d: &DeadLetter| context.plan.sources.iter().position(|s| s.topic == d.partition.topic);
            let passed = |d: &DeadLetter| position(d).is_some_and(|s| next[s].is_some_and(|n| d.offset < n.0));
            let (out, kept): (Vec<_>, Vec<_>) = slot.dead.drain(..).partition(passed);
            slot.dead = kept.into();
            dead.extend(out.into_iter().filter(|d| position(d).is_some_and(|s| d.offset >= committed[s])));
        }
        if let Some(scores) = &scores {
            dead.extend(self.ends.unscorable(&fresh, scores)?);
        }
        self.ends.output.encode(&fresh, scores.as_ref())?;
        for (partition, applied) in &open {
            let Some(slot) = self.slots.get(partition) else { continue };
            for (number, rows) in applied.emitted.iter().enumerate() {
                if let Some(rows) = rows {
                    let published = &slot.published[context.plan.windows[number].source];
                    let offsets = rows.batch.column_by_name(emitted_columns::OFFSET).expect("rows of windows have it");
                    let offsets = offsets.as_primitive::<Int64Type>().values().iter();
                    let rows = not_published(&rows.batch, published, offsets.zip(&rows.event_times))?;
                    self.ends.output.encode_windows(number, *partition, &rows)?;
                }
            }
        }
        clock.end(Step::Encode);
        self.ends.publish(&offsets, &notes, &dead)?;
        clock.end(Step::Commit);
        failpoint::hit("features.after_commit");
        self.committed(&offsets, &notes);
        self.account(reason, &open, &dead, scores.as_ref());
        for (partition, applied) in open {
            let Some(slot) = self.slots.get_mut(&partition).filter(|_| context.plan.offline.rows) else { continue };
            if applied.rows.batch.num_rows() > 0 {
                slot.rows.push(applied.rows.batch);
            }
            for (rows, emitted) in slot.windows.iter_mut().zip(applied.emitted) {
                rows.extend(emitted.map(|emitted| emitted.batch));
            }
        }
        Ok(())
    }

    /// Writes what the online store does not have yet of the open batch.
    fn write_online(&mut self) -> Result<(), RunError> {
        if self.unwritten.is_empty() {
            return Ok(());
        }
        let mut clock = self.steps.start();
        write_online(self.context, &unwritten(self.context, &mut self.unwritten)?)?;
        clock.end(Step::Online);
        Ok(())
    }

    /// Reads the features of other entities for the rows of an open batch.
    fn look_up(&mut self, open: &mut [(i32, Applied)]) -> Result<(), RunError> {
        let context = self.context;
        let Some(store) = context.wiring.lookups.as_deref() else { return Ok(()) };
        self.lookups.fill(open.iter_mut().map(|(_, applied)| &mut applied.rows.batch), |lookup, layout, keys| {
            let attempt = || store.look_up(layout, keys, lookup.timeout);
            match lookup.unavailable {
                Unavailable::Wait => context.hold("online", OnlineError::is_retriable, attempt).map(Some),
                without @ (Unavailable::Null | Unavailable::Stale) => match attempt() {
                    Ok(found) => Ok(Some(found)),
                    Err(error) if error.is_retriable() => {
                        let are = if without == Unavailable::Null { "null" } else { "those read last" };
                        tracing::warn!(lookup = lookup.name, "features are {are}, because {error}");
                        Ok(None)
                    }
                    Err(error) => Err(error.into()),
                },
            }
        })
    }

    /// Rows of one task that are not published yet.
    fn not_yet_published(&self, partition: i32, rows: &RecordBatch) -> Result<RecordBatch, RunError> {
        let Some(slot) = self.slots.get(&partition) else { return Ok(rows.slice(0, 0)) };
        let column = |name| rows.column_by_name(name).expect("the row schema has it");
        let offsets = column(row_columns::OFFSET).as_primitive::<Int64Type>().values();
        let times = column(row_columns::EVENT_TIME).as_primitive::<TimestampMillisecondType>().values();
        let Some(score) = &self.context.plan.score else { return Ok(rows.clone()) };
        not_published(rows, &slot.published[score.on], offsets.iter().zip(times))
    }

    fn committed(&mut self, offsets: &Offsets, notes: &Notes) {
        let sources = &self.context.plan.sources;
        for (at, next) in offsets {
            let source = sources.iter().position(|s| s.topic == at.topic);
            if let (Some(slot), Some(source)) = (self.slots.get_mut(&at.partition), source) {
                slot.committed[source] = next.0;
                slot.published[source] = Published { next: *next, frontier: notes.get(at).copied() };
            }
        }
    }

    /// Moves counters and gauges, once a batch.
    fn account(&mut self, reason: CloseReason, open: &[(i32, Applied)], dead: &[DeadLetter], scores: Option<&Scores>) {
        self.ledger.committed(&self.context.board, open.iter().map(|(_, applied)| applied));
        self.account.committed(reason, dead, scores, self.samples.drain(..));
        let (mut lag, mut entities, mut bytes) = (0_u64, 0_u64, (0_u64, 0_u64));
        let limit = self.context.state_limit();
        for (partition, slot) in &mut self.slots {
            limit.into_iter().for_each(|limit| slot.task.set_limit(limit));
            entities += slot.task.entities() as u64;
            let memory = slot.task.memory();
            bytes = (bytes.0 + memory.state as u64, bytes.1 + memory.on_disk);
            for (source, committed) in self.context.plan.sources.iter().zip(&slot.committed) {
                let at = TopicPartition::new(Arc::clone(&source.topic), *partition);
                let end = self.ends.consumer.end(&at);
                lag += end.map_or(0, |end| u64::try_from(end.0 - committed).unwrap_or(0));
            }
        }
        self.ledger.holds(entities, bytes);
        self.account.holds(lag, entities, bytes);
    }

    /// Publishes what is open, writes a last checkpoint, leaves the group.
    fn end(mut self) -> Result<(), RunError> {
        self.publish_open()?;
        self.checkpointer.finish()
    }

    /// Publishes what is open and hands over checkpoints of all that is new.
    fn publish_open(&mut self) -> Result<(), RunError> {
        if let Some(closed) = self.batcher.shut_down() {
            self.flush(closed)?;
        }
        self.checkpoints(true)
    }
}

/// Takes rows together.
fn unwritten(context: &Context, rows: &mut Vec<(i32, FeatureRows)>) -> Result<FeatureRows, RunError> {
    let batch = concat(context, rows.iter().map(|(_, rows)| rows.batch.clone()))?;
    Ok(FeatureRows { batch, sequence: rows.drain(..).flat_map(|(_, rows)| rows.sequence).collect() })
}

/// Writes rows to the online store, where there is one.
fn write_online(context: &Context, rows: &FeatureRows) -> Result<(), RunError> {
    if let Some(store) = context.wiring.online.as_deref().filter(|_| rows.batch.num_rows() > 0) {
        store.write(rows, &|| context.stop.requested()).map_err(given_up)?;
    }
    failpoint::hit("features.after_online");
    Ok(())
}

/// The online store gives up on a lost server only because a stop was asked for.
fn given_up(error: OnlineError) -> RunError {
    match error.is_retriable() {
        true => RunError::Interrupted { what: "online store", reason: error.to_string() },
        false => error.into(),
    }
}

fn numbers(partitions: &[TopicPartition]) -> Vec<i32> {
    let mut numbers: Vec<i32> = partitions.iter().map(|p| p.partition).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// `0-3, 5`.
fn ranges(numbers: &[i32]) -> String {
    let mut out: Vec<String> = Vec::new();
    let mut start = 0;
    for end in 0..numbers.len() {
        if end + 1 == numbers.len() || numbers[end + 1] != numbers[end] + 1 {
            out.push(if start == end {
                numbers[end].to_string()
            } else {
                format!("{}-{}", numbers[start], numbers[end])
            });
            start = end + 1;
        }
    }
    out.join(", ")
}

/// Rows that are not published yet, given the offset and the event time of the event that each is owed to.
fn not_published<'a>(
    rows: &RecordBatch,
    published: &Published,
    events: impl Iterator<Item = (&'a i64, &'a i64)>,
) -> Result<RecordBatch, RunError> {
    let fresh = BooleanArray::from_iter(events.map(|(offset, time)| Some(!published.has(*offset, *time))));
    if fresh.true_count() == rows.num_rows() {
        return Ok(rows.clone());
    }
    filter_record_batch(rows, &fresh).map_err(|e| RunError::Window(WindowError::Rows(e.to_string())))
}

/// One batch of all tasks' rows. A single one is not copied.
fn concat(context: &Context, rows: impl Iterator<Item = RecordBatch>) -> Result<RecordBatch, RunError> {
    let rows: Vec<RecordBatch> = rows.filter(|batch| batch.num_rows() > 0).collect();
    concat_batches(context.engine.schema(), &rows).map_err(|e| RunError::Window(WindowError::Rows(e.to_string())))
}

/// Each task starts where its newest checkpoint says, or at the beginning of the log where it has none: state below the
/// committed offsets has to be computed again either way.
fn start_policy(context: &Arc<Context>, starts: &Starts) -> crate::broker::StartPolicy {
    let context = Arc::clone(context);
    let starts = Arc::clone(starts);
    Box::new(move |at| {
        let mut starts = starts.lock();
        let found = starts.entry(at.partition).or_insert_with(|| newest_checkpoint(&context, at.partition));
        match found {
            Ok(Some(manifest)) => manifest.next.get(at).map_or(StartAt::Earliest, |next| StartAt::Offset(*next)),
            // The error is reported when the task is built, right after this poll.
            Ok(None) | Err(_) => StartAt::Earliest,
        }
    })
}

fn newest_checkpoint(context: &Context, partition: i32) -> Result<Option<Manifest>, RunError> {
    let offline = &context.wiring.offline;
    let newest = context.hold("offline", OfflineError::is_retriable, || offline.latest(partition))?;
    match newest {
        // Starting over goes on with the numbers of the checkpoints, and with none of their contents.
        Some(manifest) if context.is_rebuilt(partition) => {
            let nothing = Manifest {
                next: Offsets::new(),
                state: None,
                updates: Vec::new(),
                files: Vec::new(),
                windows: Vec::new(),
                ..manifest
            };
            let Definition { features, windows } = Definition::of(&context.plan);
            Ok(Some(Manifest { definition: features, windows_definition: Some(windows), ..nothing }))
        }
        Some(manifest) => {
            let now = Definition::of(&context.plan);
            // Without windows, or from before they were told: what is open of them tells.
            let windows = manifest.windows_definition.clone().unwrap_or_else(|| now.windows.clone());
            let saved = Definition { features: manifest.definition.clone(), windows };
            if saved == now {
                return Ok(Some(manifest));
            }
            Err(RunError::DefinitionChanged { partition, saved: saved.to_string(), now: now.to_string() })
        }
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(&[], "")]
    #[case(&[3], "3")]
    #[case(&[0, 1, 2, 3], "0-3")]
    #[case(&[0, 1, 3, 5, 6], "0-1, 3, 5-6")]
    fn partitions_are_told_as_ranges(#[case] numbers: &[i32], #[case] text: &str) {
        assert_eq!(ranges(numbers), text);
    }
}
