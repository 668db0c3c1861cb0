//! A worker of the scoring stage where it runs apart: features topic in, predictions topic out. It keeps no state: a batch's
//! predictions and offsets are one transaction, and after a crash the batch is read again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::compute::concat_batches;

use super::RunError;
use super::context::Context;
use super::features::{IDLE_POLL, POLL_RECORDS};
use super::output::{Output, unscorable};
use super::publish::Publisher;
use crate::broker::{Consumer, ConsumerSettings, Offsets, Producer, Records, StartAt, TopicPartition};
use crate::config::plan::Delivery;
use crate::runtime::backoff::Backoff;
use crate::runtime::clock;
use crate::runtime::failpoint;
use crate::score::{BatchLimits, Batcher, Closed, FeatureRead, FeatureReader, Scorer};
use crate::source::DeadLetter;
use crate::telemetry::board::Kind;
use crate::telemetry::metrics::{self as names, Steps};

/// Runs a worker until a stop is asked for, or, with `until_end`, until nothing is left to read.
pub(super) fn run(context: &Arc<Context>, number: usize) -> Result<(), RunError> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    let Some(mut scorer) = context.scorer(number) else {
        return Err(RunError::Definition("the scoring stage needs [score]".into()));
    };
    loop {
        let result = Worker::open(context, number, &mut scorer).and_then(Worker::run);
        context.owned.lock().remove(&number);
        match result {
            Err(error) if error.is_lost() && backoff.attempts() < 20 => {
                context.board.say(Kind::Rebalance, None, format!("score worker {number} joins again: {error}"));
                if backoff.wait(&context.stop) {
                    return Ok(());
                }
            }
            other => return other,
        }
    }
}

/// Decoded records of one partition, and the offset after them.
struct Piece {
    decoded: FeatureRead,
    at: TopicPartition,
    next: crate::broker::NextOffset,
    read: u64,
    sampled: Vec<i64>,
}

struct Worker<'a> {
    context: &'a Arc<Context>,
    number: usize,
    consumer: Box<dyn Consumer>,
    producer: Box<dyn Producer>,
    transactional: bool,
    decoder: FeatureReader,
    scorer: &'a mut Scorer,
    output: Output,
    batcher: Batcher<Piece>,
    owned: BTreeMap<TopicPartition, i64>,
}

impl<'a> Worker<'a> {
    fn open(context: &'a Arc<Context>, number: usize, scorer: &'a mut Scorer) -> Result<Self, RunError> {
        let plan = &context.plan;
        let score = plan.score.as_ref().expect("the caller has a scorer, so there is a [score]");
        let transactional = score.delivery == Delivery::ExactlyOnce;
        let id = context.transactional_id(&number.to_string());
        let producer = context.wiring.broker.producer(transactional.then_some(id.as_str()))?;
        let consumer = context.wiring.broker.consumer(ConsumerSettings {
            group: plan.group("score"),
            topics: vec![plan.features_topic().into()],
            client_id: id,
            start: Box::new(|_| StartAt::Committed),
            static_member: None,
        })?;
        Ok(Self {
            consumer,
            producer,
            transactional,
            decoder: FeatureReader::new(plan, Arc::clone(context.engine.schema())),
            scorer,
            output: Output::new(context)?,
            batcher: Batcher::new(BatchLimits::of(score)),
            owned: BTreeMap::new(),
            context,
            number,
        })
    }

    fn run(mut self) -> Result<(), RunError> {
        let mut backoff = Backoff::for_server();
        loop {
            let at_end = self.context.options.until_end
                && !self.owned.is_empty()
                && self.owned.keys().all(|at| self.consumer.caught_up(at));
            if self.context.stop.requested() || at_end {
                return match self.batcher.shut_down() {
                    Some(closed) => self.flush(closed),
                    None => Ok(()),
                };
            }
            let wait = self.batcher.deadline().map_or(IDLE_POLL, |d| d.saturating_duration_since(clock::monotonic()));
            let poll = match self.consumer.poll(POLL_RECORDS, wait) {
                Ok(poll) => poll,
                Err(error) if error.is_retriable() => {
                    self.context.holding("broker", &error, &backoff);
                    backoff.wait(&self.context.stop);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            backoff = Backoff::for_server();
            if !poll.revoked.is_empty() {
                self.owned.retain(|at, _| !poll.revoked.contains(at));
                let now = clock::monotonic();
                for piece in self.batcher.shut_down().map(|closed| closed.items).unwrap_or_default() {
                    if !poll.revoked.contains(&piece.at) {
                        self.batcher.push(piece, 0, 0, now);
                    }
                }
            }
            self.owned.extend(poll.assigned.iter().map(|at| (at.clone(), 0)));
            if !poll.assigned.is_empty() || !poll.revoked.is_empty() {
                self.context.owned.lock().insert(self.number, self.owned.keys().map(|at| at.partition).collect());
            }
            for records in poll.records.iter().filter(|r| !r.is_empty()) {
                let piece = self.decode(records)?;
                let (rows, bytes) = (piece.decoded.batch.num_rows(), records.values.bytes());
                if let Some(closed) = self.batcher.push(piece, rows, bytes, clock::monotonic()) {
                    self.flush(closed)?;
                }
            }
            if let Some(closed) = self.batcher.poll(clock::monotonic()) {
                self.flush(closed)?;
            }
        }
    }

    fn decode(&mut self, records: &Records) -> Result<Piece, RunError> {
        Ok(Piece {
            decoded: self.decoder.read(records)?,
            at: records.partition.clone(),
            next: records.next().expect("only polls with records come here"),
            read: records.len() as u64,
            sampled: records.timestamps.iter().step_by(records.len().div_ceil(16)).copied().collect(),
        })
    }

    fn flush(&mut self, closed: Closed<Piece>) -> Result<(), RunError> {
        let context = self.context;
        let pipeline = context.plan.name.clone();
        let mut steps = Steps::start(&pipeline);
        let schema = closed.items[0].decoded.batch.schema();
        let rows = concat_batches(&schema, closed.items.iter().map(|p| &p.decoded.batch))
            .map_err(|e| RunError::Window(crate::window::WindowError::Rows(e.to_string())))?;
        let scores = self.scorer.score(&rows)?;
        steps.end("score");
        let mut dead: Vec<DeadLetter> = closed.items.iter().flat_map(|p| p.decoded.dead.iter().cloned()).collect();
        dead.extend(unscorable(context.wiring.broker.as_ref(), &rows, &scores)?);
        self.output.encode(&rows, Some(&scores))?;
        let mut offsets = Offsets::new();
        for piece in &closed.items {
            offsets.insert(piece.at.clone(), piece.next);
        }
        self.publish(&offsets, &dead)?;
        steps.end("commit");
        failpoint::hit("score.after_commit");
        for (at, next) in &offsets {
            self.owned.insert(at.clone(), next.0);
        }
        let scored = (rows.num_rows() - scores.failed.len()) as u64;
        context.board.predicted(&scores.version, scored);
        context.board.sources[0]
            .1
            .read
            .fetch_add(closed.items.iter().map(|p| p.read).sum(), std::sync::atomic::Ordering::Relaxed);
        metrics::counter!(names::PREDICTIONS, "pipeline" => pipeline.clone(), "model_version" => scores.version.to_string()).increment(scored);
        metrics::counter!(names::SCORE_FAILED, "pipeline" => pipeline.clone()).increment(scores.failed.len() as u64);
        metrics::counter!(names::BATCHES, "pipeline" => pipeline.clone(), "reason" => closed.reason.name())
            .increment(1);
        for letter in &dead {
            metrics::counter!(names::DEAD_LETTERS, "pipeline" => pipeline.clone(), "stage" => letter.stage, "reason" => letter.reason).increment(1);
        }
        let now = clock::now_ms();
        for at in closed.items.iter().flat_map(|p| &p.sampled).filter(|t| **t > 0) {
            context.board.latency.add(Duration::from_millis(u64::try_from(now - at).unwrap_or(0)));
        }
        let lag = self
            .owned
            .iter()
            .map(|(at, next)| self.consumer.end(at).map_or(0, |end| u64::try_from(end.0 - next).unwrap_or(0)))
            .sum();
        metrics::gauge!(names::LAG, "pipeline" => pipeline, "stage" => "score", "worker" => self.number.to_string())
            .set(lag as f64);
        context.board.set_worker(self.number, lag, 0, 0);
        Ok(())
    }

    fn publish(&mut self, offsets: &Offsets, dead: &[DeadLetter]) -> Result<(), RunError> {
        let output = &self.output;
        Publisher {
            producer: self.producer.as_mut(),
            consumer: self.consumer.as_mut(),
            transactional: self.transactional,
        }
        .publish(self.context, offsets, dead, |producer| output.send(producer))
    }
}
