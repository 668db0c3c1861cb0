//! What the workers of the feature stage and of the scoring stage share: their two ends on the log, and joining again after
//! a loss.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::RunError;
use super::context::Context;
use super::follower::Follower;
use super::output::{self, Output};
use super::publish::Publisher;
use crate::broker::{BrokerError, Consumer, ConsumerSettings, Notes, Offsets, Poll, Producer, StartPolicy};
use crate::config::plan::Delivery;
use crate::runtime::backoff::Backoff;
use crate::runtime::clock;
use crate::score::Scores;
use crate::source::DeadLetter;
use crate::telemetry::board::Kind;

/// Records taken in one poll.
pub(super) const POLL_RECORDS: usize = 16_384;
/// How long a poll waits at most; also how soon a stop is noticed.
pub(super) const IDLE_POLL: Duration = Duration::from_millis(100);
/// Losses in a row, without a commit between them, after which a worker gives up: joining again does not help.
const MOST_LOSSES: u32 = 20;

/// How long a poll may wait: until the open batch is due, and no longer than `most`.
pub(super) fn poll_wait(due: Option<Instant>, most: Duration) -> Duration {
    due.map_or(most, |due| due.saturating_duration_since(clock::monotonic()).min(most))
}

/// True once a worker has committed anything since it joined.
#[derive(Debug, Default)]
pub(super) struct Progress(Cell<bool>);

impl Progress {
    /// Says that something is committed.
    pub fn note(&self) {
        self.0.set(true);
    }
}

/// Runs sessions of a worker until one ends for good. A session that has lost its partitions or its right to publish is
/// followed by one with fresh state.
pub(super) fn keep_joined(
    context: &Context,
    stage: &str,
    number: usize,
    mut session: impl FnMut(&Progress) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let name = name(stage, number);
    let mut losses = Losses::new();
    let mut away = Backoff::for_server();
    loop {
        let progress = Progress::default();
        let ended = session(&progress);
        match ended {
            Err(error) if error.is_lost() && losses.allow_another(&progress) => {
                context.board.say(Kind::Rebalance, None, format!("{name} joins again: {error}"));
                if losses.backoff.wait(&context.stop) {
                    return Ok(());
                }
            }
            // A server that went away in a step that does not wait by itself, such as opening the two ends.
            Err(error) if let Some(what) = error.away() => {
                if progress.0.get() {
                    away = Backoff::for_server();
                }
                context.holding(what, &error, &away);
                if away.wait(&context.stop) {
                    return Ok(());
                }
            }
            Err(error @ RunError::Interrupted { .. }) => {
                context.board.say(Kind::Warning, None, format!("{name} stops: {error}"));
                return Ok(());
            }
            other => return other,
        }
    }
}

/// With `--until-end`: true where a worker may leave its group without leaving anything to others. `owned` is what all
/// workers of its process own, `idle` says that none of it is its own, `finished` is what is read to its end and kept. One
/// without partitions may have some on their way to it as long as any of the `partitions` is unfinished.
pub(super) fn may_leave(
    idle: bool,
    owned: &[i32],
    finished: &BTreeSet<i32>,
    partitions: impl FnOnce() -> usize,
) -> bool {
    owned.iter().all(|partition| finished.contains(partition))
        && (!idle || (!finished.is_empty() && finished.len() >= partitions()))
}

fn name(stage: &str, number: usize) -> String {
    if stage == "features" { format!("worker {number}") } else { format!("{stage} worker {number}") }
}

/// Counts the losses of a worker that came to nothing.
struct Losses {
    backoff: Backoff,
}

impl Losses {
    fn new() -> Self {
        Self { backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(10)) }
    }

    /// True where the worker may try again after a session that came this far.
    fn allow_another(&mut self, progress: &Progress) -> bool {
        if progress.0.get() {
            *self = Self::new();
        }
        self.backoff.attempts() < MOST_LOSSES
    }
}

/// The polls of a worker, which wait for a broker that is away.
pub(super) struct Polls<'a> {
    context: &'a Context,
    name: String,
    /// Polls in a row that found no broker.
    away: Backoff,
}

impl<'a> Polls<'a> {
    /// Those of worker `number` of a stage.
    pub fn new(context: &'a Context, stage: &str, number: usize) -> Self {
        Self { context, name: name(stage, number), away: Backoff::for_server() }
    }

    /// Polls for at most so many records; nothing where no broker answers, after a pause.
    pub fn poll(&mut self, consumer: &mut dyn Consumer, most: usize, wait: Duration) -> Result<Option<Poll>, RunError> {
        let context = self.context;
        match consumer.poll(most, wait) {
            Ok(poll) => {
                if self.away.attempts() > 0 {
                    context.board.say(Kind::Stage, None, format!("{}: the broker is back", self.name));
                    self.away = Backoff::for_server();
                }
                Ok(Some(poll))
            }
            Err(error) if error.is_retriable() => {
                context.holding("broker", &error, &self.away);
                self.away.wait(&context.stop);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// A worker's consumer, its producer, and what it writes.
pub(super) struct Ends<'a> {
    context: &'a Arc<Context>,
    polls: Polls<'a>,
    /// Reads the stage's input.
    pub consumer: Box<dyn Consumer>,
    /// Encodes the stage's output.
    pub output: Output,
    producer: Box<dyn Producer>,
    transactional: bool,
    progress: &'a Progress,
}

impl<'a> Ends<'a> {
    /// Opens the ends of worker `number`, which reads `topics` as a member of the group of `stage`.
    pub fn open(
        context: &'a Arc<Context>,
        stage: &str,
        number: usize,
        topics: Vec<Arc<str>>,
        start: StartPolicy,
        progress: &'a Progress,
    ) -> Result<Self, RunError> {
        let plan = &context.plan;
        let transactional = plan.score.as_ref().is_none_or(|score| score.delivery == Delivery::ExactlyOnce);
        let id = context.transactional_id(&number.to_string());
        let group = context.group(stage);
        let settings = ConsumerSettings { group, topics, client_id: id.clone(), start, static_member: None };
        let broker = &context.wiring.broker;
        // Both wait for a coordinator of their own. Opening the producer aborts what a killed predecessor left open, which
        // would hold back readers.
        let (producer, consumer) = thread::scope(|scope| {
            let producer = scope.spawn(|| broker.producer(transactional.then_some(id.as_str())));
            let consumer = broker.consumer(settings);
            (producer.join().expect("opening a producer does not panic"), consumer)
        });
        let (producer, mut consumer) = (producer?, consumer?);
        if context.is_following() {
            let broker = Arc::clone(&context.wiring.broker);
            consumer = Box::new(Follower::new(consumer, broker, plan.group(stage), context.followed_topics()?));
        }
        Ok(Self {
            context,
            polls: Polls::new(context, stage, number),
            consumer,
            output: Output::new(context)?,
            producer,
            transactional,
            progress,
        })
    }

    /// Polls; nothing where no broker answers, after a pause.
    pub fn poll(&mut self, wait: Duration) -> Result<Option<Poll>, RunError> {
        self.polls.poll(self.consumer.as_mut(), POLL_RECORDS, wait)
    }

    /// Dead letters for the rows that the model could not score.
    pub fn unscorable(&self, rows: &arrow::array::RecordBatch, scores: &Scores) -> Result<Vec<DeadLetter>, RunError> {
        let broker = self.context.wiring.broker.as_ref();
        self.context.hold("broker", BrokerError::is_retriable, || output::unscorable(broker, rows, scores))
    }

    /// Commits what [`Ends::output`] has encoded, the dead letters and the offsets with their notes.
    pub fn publish(&mut self, offsets: &Offsets, notes: &Notes, dead: &[DeadLetter]) -> Result<(), RunError> {
        let Self { context, consumer, producer, output, .. } = self;
        producer.note(notes);
        consumer.note(notes);
        let dead = if context.is_silent() { &[] } else { dead };
        Publisher {
            producer: producer.as_mut(),
            consumer: consumer.as_mut(),
            transactional: self.transactional,
            dead_letters: &context.out_topic(&context.plan.dead_letter_topic()),
            stop: &context.stop,
            holding: &|error, backoff| context.holding("broker", error, backoff),
        }
        .publish(offsets, dead, |producer| output.send(producer))?;
        self.progress.note();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::nothing_read_yet(true, &[], &[], false)]
    #[case::it_reads(false, &[0, 1], &[0], false)]
    #[case::another_reads(false, &[0, 1, 2], &[0, 1], false)]
    #[case::all_of_this_process_is_read(false, &[0, 1], &[0, 1], true)]
    #[case::read_by_one_that_lost_it_since(false, &[1], &[0, 1], true)]
    #[case::its_partition_is_on_the_way(true, &[0, 1], &[0, 1], false)]
    #[case::the_last_partition_is_on_the_way(true, &[], &[0, 1, 2], false)]
    #[case::nothing_is_left_for_it(true, &[0, 1], &[0, 1, 2, 3], true)]
    fn a_worker_leaves_when_nothing_is_left_for_any(
        #[case] idle: bool,
        #[case] owned: &[i32],
        #[case] finished: &[i32],
        #[case] leaves: bool,
    ) {
        assert_eq!(may_leave(idle, owned, &finished.iter().copied().collect(), || 4), leaves);
    }

    #[test]
    fn only_losses_without_a_commit_between_them_end_a_worker() {
        let (nothing, committed) = (Progress::default(), Progress(Cell::new(true)));
        let mut losses = Losses::new();
        let mut lose = |progress| {
            let allowed = losses.allow_another(progress);
            losses.backoff.next_wait();
            allowed
        };
        for round in 0..50 {
            assert!(lose(&committed), "round {round}");
            for loss in 1..MOST_LOSSES {
                assert!(lose(&nothing), "round {round}, loss {loss}");
            }
        }
        assert!(!lose(&nothing));
        assert!(lose(&committed));
    }
}
