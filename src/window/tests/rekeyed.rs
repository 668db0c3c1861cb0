//! Sources that are keyed anew: several partitions, mixed as it happened, are one order of events.

use proptest::prelude::*;

use super::properties::events;
use super::*;
use crate::config::plan::{Emit, RekeyPlan};
use crate::source::{Mark, Rekeyed};
use crate::window::Applied;

const CHANNELS: usize = 3;

/// What is written in one transaction: of which partitions how many events.
type Written = Vec<(usize, usize)>;

/// The topic after keying anew: the events of the partitions as they are mixed by `writes`, each a batch with its marks.
fn mixed(channels: &[Vec<Event>], writes: &[Written]) -> Vec<SourceBatch> {
    let mut next = vec![0_usize; channels.len()];
    let mut newest: Vec<Option<i64>> = vec![None; channels.len()];
    let mut first = 0;
    let rest = (0..channels.len()).map(|channel| vec![(channel, usize::MAX)]);
    let mut batches = Vec::new();
    for write in writes.iter().cloned().chain(rest) {
        let (mut events, mut origins) = (Vec::new(), Vec::new());
        for (channel, count) in write {
            let (channel, from) = (channel % channels.len(), next[channel % channels.len()]);
            let to = channels[channel].len().min(from.saturating_add(count));
            for (offset, event) in channels[channel].iter().enumerate().take(to).skip(from) {
                events.push(event.clone());
                origins.push((channel as i32, offset as i64));
                newest[channel] = newest[channel].max(Some(event.time));
            }
            next[channel] = to;
        }
        // The channels of other workers are told by theirs; here all are told at the end.
        let marks = (0..channels.len()).map(|channel| Mark {
            partition: channel as i32,
            channels: channels.len(),
            newest: newest[channel],
            idle: channels[channel].is_empty(),
        });
        let rekeyed = Rekeyed { origins, marks: marks.collect() };
        let next_offset = first + events.len() as i64 + 1;
        let mut batch = SourceBatch { rekeyed: Some(rekeyed), ..batch(0, &events, first) };
        // The marks have an offset of their own.
        batch.next = next_offset;
        first = next_offset;
        batches.push(batch);
    }
    batches
}

fn output(plan: &Plan, batches: &[SourceBatch], restarts: &[bool]) -> Vec<Row> {
    let engine = Engine::new(plan).unwrap();
    let mut task = Task::new(engine.clone(), 3);
    let mut found = Vec::new();
    let mut take = |applied: Applied| {
        assert!(applied.late.is_empty(), "what was on time at the source is not late here");
        found.extend(rows(&applied.rows).into_iter().map(|(_, mut row)| {
            row.remove("source_offset");
            row
        }));
    };
    let clock = TaskClock { caught_up: &[false], idle: &[true] };
    for (at, batch) in batches.iter().enumerate() {
        task.offer(batch.clone()).unwrap();
        take(task.advance(&clock, usize::MAX).unwrap());
        if restarts.get(at) == Some(&true) {
            task = Task::restore(engine.clone(), 3, &task.snapshot().unwrap()).unwrap();
            let left = task.next()[0].map_or(0, |next| next.0);
            for again in batches[..=at].iter().filter(|batch| batch.next > left) {
                let keep = again.offsets.partition_point(|offset| *offset < left);
                let mut again = again.clone();
                let count = again.offsets.len() - keep;
                again.columns = again.columns.slice(keep, count);
                again.event_times.drain(..keep);
                again.offsets.drain(..keep);
                again.rekeyed.as_mut().unwrap().origins.drain(..keep);
                again.read = count as u64;
                task.offer(again).unwrap();
            }
            take(task.advance(&clock, usize::MAX).unwrap());
        }
    }
    task.end();
    take(task.advance(&clock, usize::MAX).unwrap());
    assert_eq!(task.buffered(0), 0);
    found
}

fn writes() -> impl Strategy<Value = Vec<Written>> {
    prop::collection::vec(prop::collection::vec((0..CHANNELS, 0usize..6), 1..4), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// However the re-keyer was batched or killed, and wherever the reader was restarted: the rows are those of the events in
    /// the order of event time, partition and offset at the source.
    #[test]
    fn the_order_does_not_depend_on_how_partitions_were_mixed(
        logs in prop::collection::vec(events(30, 150), CHANNELS),
        bound in prop_oneof![Just(0u64), 1u64..200, Just(3000)],
        mixes in prop::collection::vec(writes(), 2),
        restarts in prop::collection::vec(prop::bool::weighted(0.2), 43),
    ) {
        let channels: Vec<Vec<Event>> = logs.into_iter().map(|log| {
            let mut newest = i64::MIN;
            log.into_iter().filter(|event| {
                let on_time = event.time >= newest.saturating_sub(bound as i64);
                newest = if on_time { newest.max(event.time) } else { newest };
                on_time
            }).collect()
        }).collect();
        let groups = vec![group("g", 0, Some("amount"), None, &[window(1000, 10)])];
        let mut plan = plan(vec![source("a", bound)], groups, Some(0));
        plan.score.as_mut().unwrap().emit = Emit::EventTime;

        let mut sorted: Vec<(i64, usize, &Event)> = Vec::new();
        for (channel, log) in channels.iter().enumerate() {
            sorted.extend(log.iter().map(|event| (event.time, channel, event)));
        }
        sorted.sort_by_key(|(time, channel, _)| (*time, *channel));
        let sorted: Vec<Event> = sorted.into_iter().map(|(_, _, event)| event.clone()).collect();
        let expected = output(&plan, &[batch(0, &sorted, 0)], &[]);

        let from = plan.sources[0].clone();
        let rekeyed = RekeyPlan { from, partitions: None, retention: None };
        plan.sources[0].rekeyed = Some(Arc::new(rekeyed));
        for mix in &mixes {
            prop_assert_eq!(&output(&plan, &mixed(&channels, mix), &[]), &expected);
            prop_assert_eq!(&output(&plan, &mixed(&channels, mix), &restarts), &expected);
        }
    }
}
