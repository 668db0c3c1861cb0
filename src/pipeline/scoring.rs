//! A worker of the scoring stage where it runs apart: features topic in, predictions topic out. It keeps no state: a batch's
//! predictions and offsets are one transaction, and after a crash the batch is read again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow::compute::concat_batches;

use super::RunError;
use super::account::{Account, sample};
use super::context::Context;
use super::worker::{self, Ends, IDLE_POLL, Progress};
use crate::broker::{NextOffset, Notes, Offsets, Poll, Records, StartAt, TopicPartition};
use crate::runtime::clock;
use crate::runtime::failpoint;
use crate::score::{BatchLimits, Batcher, Closed, FeatureRead, FeatureReader, Scorer};
use crate::source::DeadLetter;
use crate::telemetry::metrics::{Step, Steps};

/// Name of the stage: of its consumer group and in metrics.
const STAGE: &str = "score";

/// Runs a worker until a stop is asked for, or, with `until_end`, until nothing is left to read.
pub(super) fn run(context: &Arc<Context>, number: usize) -> Result<(), RunError> {
    let Some(mut scorer) = context.scorer(number) else {
        return Err(RunError::Definition("the scoring stage needs [score]".into()));
    };
    worker::keep_joined(context, STAGE, number, |progress| {
        let ended = Worker::open(context, number, &mut scorer, progress).and_then(Worker::run);
        context.owned.lock().remove(&number);
        ended
    })
}

/// Decoded records of one partition, and the offset after them.
struct Piece {
    decoded: FeatureRead,
    at: TopicPartition,
    next: NextOffset,
    read: u64,
    /// Arrival in the log of some of the records, wall clock ms.
    samples: Vec<i64>,
}

struct Worker<'a> {
    context: &'a Arc<Context>,
    number: usize,
    ends: Ends<'a>,
    decoder: FeatureReader,
    scorer: &'a mut Scorer,
    account: Account,
    steps: Steps,
    batcher: Batcher<Piece>,
    /// Next offset to commit of each partition.
    owned: BTreeMap<TopicPartition, i64>,
}

impl<'a> Worker<'a> {
    fn open(
        context: &'a Arc<Context>,
        number: usize,
        scorer: &'a mut Scorer,
        progress: &'a Progress,
    ) -> Result<Self, RunError> {
        let plan = &context.plan;
        let score = plan.score.as_ref().expect("the caller has a scorer, so there is a [score]");
        let start = Box::new(|_: &TopicPartition| StartAt::Committed);
        Ok(Self {
            ends: Ends::open(context, STAGE, number, vec![context.features_topic().into()], start, progress)?,
            decoder: FeatureReader::new(plan, Arc::clone(context.engine.schema())),
            scorer,
            account: Account::new(context, STAGE, number),
            steps: Steps::of(&plan.name),
            batcher: Batcher::new(BatchLimits::of(score)),
            owned: BTreeMap::new(),
            context,
            number,
        })
    }

    fn run(mut self) -> Result<(), RunError> {
        loop {
            let at_end = self.context.options.until_end
                && !self.owned.is_empty()
                && self.owned.keys().all(|at| self.ends.consumer.caught_up(at));
            if self.context.stop.requested() || at_end {
                return match self.batcher.shut_down() {
                    Some(closed) => self.flush(closed),
                    None => Ok(()),
                };
            }
            let wait = worker::poll_wait(self.batcher.deadline(), IDLE_POLL);
            let Some(poll) = self.ends.poll(wait)? else { continue };
            self.rebalance(&poll);
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

    fn rebalance(&mut self, poll: &Poll) {
        if poll.assigned.is_empty() && poll.revoked.is_empty() {
            return;
        }
        self.owned.retain(|at, _| !poll.revoked.contains(at));
        self.batcher.retain(|piece| !poll.revoked.contains(&piece.at));
        self.owned.extend(poll.assigned.iter().map(|at| (at.clone(), 0)));
        self.context.owned.lock().insert(self.number, self.owned.keys().map(|at| at.partition).collect());
    }

    fn decode(&mut self, records: &Records) -> Result<Piece, RunError> {
        let mut clock = self.steps.start();
        let decoded = self.decoder.read(records)?;
        clock.end(Step::Decode);
        Ok(Piece {
            decoded,
            at: records.partition.clone(),
            next: records.next().expect("only polls with records come here"),
            read: records.len() as u64,
            samples: sample(records).collect(),
        })
    }

    fn flush(&mut self, closed: Closed<Piece>) -> Result<(), RunError> {
        let context = self.context;
        let mut clock = self.steps.start();
        let schema = closed.items[0].decoded.batch.schema();
        let rows = concat_batches(&schema, closed.items.iter().map(|p| &p.decoded.batch))
            .map_err(|e| RunError::Window(crate::window::WindowError::Rows(e.to_string())))?;
        let scores = self.scorer.score(&rows)?;
        clock.end(Step::Score);
        let mut dead: Vec<DeadLetter> = closed.items.iter().flat_map(|p| p.decoded.dead.iter().cloned()).collect();
        dead.extend(self.ends.unscorable(&rows, &scores)?);
        self.ends.output.encode(&rows, Some(&scores))?;
        clock.end(Step::Encode);
        let mut offsets = Offsets::new();
        for piece in &closed.items {
            offsets.insert(piece.at.clone(), piece.next);
        }
        self.ends.publish(&offsets, &Notes::new(), &dead)?;
        clock.end(Step::Commit);
        failpoint::hit("score.after_commit");
        for (at, next) in &offsets {
            self.owned.insert(at.clone(), next.0);
        }
        let read = closed.items.iter().map(|piece| piece.read).sum();
        context.board.sources[0].1.read.fetch_add(read, Ordering::Relaxed);
        let samples = closed.items.iter().flat_map(|piece| piece.samples.iter().copied());
        self.account.committed(closed.reason, &dead, Some(&scores), samples);
        let behind = |(at, next): (&TopicPartition, &i64)| {
            self.ends.consumer.end(at).map_or(0, |end| u64::try_from(end.0 - next).unwrap_or(0))
        };
        self.account.holds(self.owned.iter().map(behind).sum(), 0, (0, 0));
        Ok(())
    }
}
