//! Which partitions are not fetched for now, because what they brought waits for another source.
//!
//! Sources are read side by side but applied in the order of event time. One that is read faster than its siblings come
//! forward in time would gather all of that lead in memory, so its partition is paused. This cannot come to a standstill:
//! only a source that others hold back is paused, never the one that holds them back.

use std::sync::atomic::Ordering;

use super::context::Context;
use crate::broker::{BrokerError, Consumer, TopicPartition};
use crate::telemetry::metrics as names;
use crate::window::Task;

/// Rows of one source that may wait in one task. Some polls' worth, so that a pause does not starve the task.
const MOST_WAITING: usize = 65_536;

/// The paused partitions of one task: one for each source.
pub(super) struct Pauses {
    paused: Vec<bool>,
}

impl Pauses {
    /// Nothing is paused, of so many sources.
    pub fn new(sources: usize) -> Self {
        Self { paused: vec![false; sources] }
    }

    /// True while a source is not fetched. It is not idle then: it has more to bring.
    pub fn has(&self, source: usize) -> bool {
        self.paused[source]
    }

    /// Pauses and resumes what is to be after the task has applied what it can.
    ///
    /// # Errors
    /// The client refuses.
    pub fn follow(&mut self, task: &Task, context: &Context, consumer: &mut dyn Consumer) -> Result<(), BrokerError> {
        for (paused, (source, plan)) in self.paused.iter_mut().zip(context.plan.sources.iter().enumerate()) {
            let pause = is_paused(*paused, task.is_held_back(source), task.buffered(source));
            if pause == *paused {
                continue;
            }
            let partition = [TopicPartition::new(plan.topic.clone(), task.partition())];
            if pause {
                consumer.pause(&partition)?;
                metrics::counter!(names::SOURCE_PAUSES, "pipeline" => context.plan.name.clone(), "source" => plan.name.to_string())
                    .increment(1);
                context.board.sources[source].1.pauses.fetch_add(1, Ordering::Relaxed);
            } else {
                consumer.resume(&partition)?;
            }
            *paused = pause;
        }
        Ok(())
    }

    /// Pauses again what the consumer may have taken up afresh in a rebalance.
    ///
    /// # Errors
    /// The client refuses.
    pub fn renew(&self, task: &Task, context: &Context, consumer: &mut dyn Consumer) -> Result<(), BrokerError> {
        let paused = self.paused.iter().zip(&context.plan.sources).filter(|(paused, _)| **paused);
        let partitions: Vec<_> =
            paused.map(|(_, plan)| TopicPartition::new(plan.topic.clone(), task.partition())).collect();
        if partitions.is_empty() { Ok(()) } else { consumer.pause(&partitions) }
    }
}

/// True where a source with so many `waiting` rows is not to be fetched. One that is paused stays so until half are gone,
/// for a pause drops what the client has fetched ahead.
fn is_paused(paused: bool, held_back: bool, waiting: usize) -> bool {
    held_back && waiting >= if paused { MOST_WAITING / 2 } else { MOST_WAITING }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::few(false, true, MOST_WAITING - 1, false)]
    #[case::many(false, true, MOST_WAITING, true)]
    #[case::many_of_the_one_that_others_wait_for(false, false, usize::MAX, false)]
    #[case::stays_until_half_are_gone(true, true, MOST_WAITING / 2, true)]
    #[case::goes_on_then(true, true, MOST_WAITING / 2 - 1, false)]
    #[case::goes_on_where_others_have_come_to_wait_for_it(true, false, MOST_WAITING, false)]
    fn pauses_what_gathers(
        #[case] paused: bool,
        #[case] held_back: bool,
        #[case] waiting: usize,
        #[case] expected: bool,
    ) {
        assert_eq!(is_paused(paused, held_back, waiting), expected);
    }
}
