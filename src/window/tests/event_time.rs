//! `emit = "event_time"`: rows are held until the watermark has passed them.

use arrow::compute::concat_batches;
use proptest::prelude::*;

use super::checkpoints::Kept;
use super::oracle::{Oracle, assert_same};
use super::properties::{Scenario, scenario, steps};
use super::*;
use crate::broker::NextOffset;
use crate::config::plan::Emit;
use crate::window::{Applied, Published};

/// The plan, with an asking source in any case.
fn in_event_time(plan: &Plan) -> Plan {
    let tables = plan.sources.iter().filter(|source| source.table.is_some()).count();
    let on = plan.score.as_ref().map_or(tables, |score| score.on);
    let mut plan = super::plan(plan.sources.clone(), plan.groups.clone(), Some(on));
    plan.score.as_mut().expect("it was just asked for").emit = Emit::EventTime;
    plan
}

/// The rows of a log that are not late, by the definition of late: offsets.
pub(super) fn accepted(log: &[Event], bound: i64) -> Vec<usize> {
    let mut newest = i64::MIN;
    let mut accepted = Vec::new();
    for (offset, event) in log.iter().enumerate() {
        if event.time >= newest.saturating_sub(bound) {
            newest = newest.max(event.time);
            accepted.push(offset);
        }
    }
    accepted
}

fn bound(plan: &Plan, source: usize) -> i64 {
    plan.sources[source].out_of_order.as_millis() as i64
}

/// A task, and how far its logs are read.
struct Reader<'a> {
    logs: &'a [Vec<Event>],
    engine: Arc<Engine>,
    task: Task,
    offered: Vec<usize>,
}

impl<'a> Reader<'a> {
    fn new(plan: &Plan, logs: &'a [Vec<Event>]) -> Self {
        let engine = Engine::new(plan).unwrap();
        Self { logs, task: Task::new(engine.clone(), 3), engine, offered: vec![0; logs.len()] }
    }

    fn offer(&mut self, source: usize, events: usize) {
        let start = self.offered[source];
        let end = self.logs[source].len().min(start.saturating_add(events));
        self.task.offer(batch(source, &self.logs[source][start..end], start as i64)).unwrap();
        self.offered[source] = end;
    }

    fn advance(&mut self, idle: &[bool], limit: usize) -> Applied {
        let caught_up: Vec<bool> = self.offered.iter().zip(self.logs).map(|(&at, log)| at == log.len()).collect();
        let applied = self.task.advance(&TaskClock { caught_up: &caught_up, idle }, limit).unwrap();
        for counts in &applied.counts {
            assert_eq!(counts.read, counts.applied + counts.filtered + counts.late + counts.dead);
        }
        for (next, settled) in applied.next.iter().zip(self.task.settled()) {
            assert!(*next <= settled, "{next:?} {settled:?}");
        }
        applied
    }

    /// Reads on from a snapshot, or from the beginning.
    fn restore(&mut self, snapshot: Option<&[RecordBatch]>) {
        self.task = match snapshot {
            Some(snapshot) => Task::restore(self.engine.clone(), 3, snapshot).unwrap(),
            None => Task::new(self.engine.clone(), 3),
        };
        self.offered = self.task.next().iter().map(|next| next.map_or(0, |NextOffset(next)| next as usize)).collect();
    }

    /// Reads the rest and lets everything go.
    fn finish(&mut self, mut take: impl FnMut(Applied)) {
        let nobody = vec![false; self.logs.len()];
        for source in 0..self.logs.len() {
            self.offer(source, usize::MAX);
        }
        self.task.end();
        loop {
            let applied = self.advance(&nobody, usize::MAX);
            let more = applied.more;
            take(applied);
            if !more {
                break;
            }
        }
        assert!((0..self.logs.len()).all(|source| self.task.buffered(source) == 0));
    }
}

pub(super) fn without_offset((_, mut row): (i64, Row)) -> Row {
    row.remove("source_offset").expect("every row has it");
    row
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    /// Each event is applied once, as of all that is not late and before it, however it is polled and restarted.
    #[test]
    fn equals_the_oracle_on_sorted_logs(scenario in scenario(100), steps in steps()) {
        let Scenario { plan, mut logs } = scenario;
        let plan = in_event_time(&plan);
        // A late row of a table counts from when it comes, which is not the same in all runs.
        for (source, log) in logs.iter_mut().enumerate().filter(|(source, _)| plan.sources[*source].table.is_some()) {
            *log = accepted(log, bound(&plan, source)).into_iter().map(|offset| log[offset].clone()).collect();
        }
        let mut oracle = Oracle::new(&plan);
        let mut count = 0;
        for (source, log) in logs.iter().enumerate() {
            let offsets = accepted(log, bound(&plan, source));
            let mut events: Vec<Event> = offsets.into_iter().map(|offset| log[offset].clone()).collect();
            events.sort_by_key(|event| event.time);
            count += events.len() as u64;
            oracle.offer(source, 0, &events);
        }
        let (expected, expected_online) = oracle.advance(&vec![true; logs.len()]);

        let mut reader = Reader::new(&plan, &logs);
        let (mut found, mut online, mut applied_count) = (Vec::new(), BTreeMap::new(), 0);
        let mut sequence = i64::MIN;
        let mut take = |applied: Applied| {
            applied_count += applied.counts.iter().map(|counts| counts.applied).sum::<u64>();
            for (next, row) in rows(&applied.rows) {
                assert!(next > sequence, "sequences rise");
                sequence = next;
                found.push(without_offset((next, row)));
            }
            for row in rows(&applied.online).into_iter().map(without_offset) {
                online.insert(format!("{:?} {:?}", row["name"], row["number"]), row);
            }
        };
        let mut kept = Kept::default();
        for step in steps.iter().filter(|step| step.source < logs.len()) {
            if step.restart {
                kept.take(&mut reader.task);
                reader.restore(Some(&kept.batches));
            }
            reader.offer(step.source, step.events);
            take(reader.advance(&vec![false; logs.len()], step.limit));
        }
        reader.finish(&mut take);
        prop_assert_eq!(applied_count, count);
        prop_assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert_same(found, &without_offset((0, expected)), 1000.0);
        }
        prop_assert_eq!(online.len(), expected_online.len());
        for expected in expected_online.into_values().map(|row| without_offset((0, row))) {
            assert_same(&online[&format!("{:?} {:?}", expected["name"], expected["number"])], &expected, 1000.0);
        }
    }

    /// Arrival within the bounds, in whatever order and whatever polls, leaves the same bytes: all columns but the offsets.
    #[test]
    fn shuffling_within_the_bounds_changes_nothing(
        scenario in scenario(150),
        jitter in prop::collection::vec(0u64..1000, 150),
        polls in prop::collection::vec(1usize..60, 2),
    ) {
        let Scenario { plan, mut logs } = scenario;
        let plan = in_event_time(&plan);
        let mut shuffled = logs.clone();
        for (source, log) in logs.iter_mut().enumerate() {
            log.sort_by_key(|event| event.time);
            // Events of the same time keep their order, since it decides which is the last.
            let mut arrival: Vec<(i64, usize)> = Vec::new();
            for (at, event) in log.iter().enumerate() {
                let tied = at > 0 && log[at - 1].time == event.time;
                let delay = if tied { arrival[at - 1].0 - event.time } else { jitter[at] as i64 * bound(&plan, source) / 1000 };
                arrival.push((event.time + delay, at));
            }
            arrival.sort();
            shuffled[source] = arrival.into_iter().map(|(_, at)| log[at].clone()).collect();
        }
        let output = |logs: &[Vec<Event>], poll: usize| {
            let mut reader = Reader::new(&plan, logs);
            let mut batches = Vec::new();
            let mut take = |applied: Applied| {
                assert!(applied.late.is_empty());
                batches.push(applied.rows.batch);
            };
            while reader.offered.iter().zip(logs).any(|(&offered, log)| offered < log.len()) {
                (0..logs.len()).for_each(|source| reader.offer(source, poll + source));
                take(reader.advance(&vec![false; logs.len()], usize::MAX));
            }
            reader.finish(&mut take);
            let mut all = concat_batches(&batches[0].schema(), &batches).unwrap();
            all.remove_column(all.schema().index_of("source_offset").unwrap());
            all
        };
        prop_assert_eq!(output(&logs, polls[0]), output(&shuffled, polls[1]));
    }
}

/// What happens to a worker.
#[derive(Debug, Clone)]
enum Happening {
    Poll { source: usize, events: usize, idle: [bool; 2], limit: usize },
    Commit,
    Checkpoint,
    Crash,
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let limit = prop_oneof![Just(usize::MAX), 1usize..10];
    let idle = prop_oneof![3 => Just([false; 2]), 1 => any::<[bool; 2]>()];
    let poll = (0usize..2, 1usize..20, idle, limit).prop_map(|(source, events, idle, limit)| Happening::Poll {
        source,
        events,
        idle,
        limit,
    });
    let one = prop_oneof![10 => poll, 4 => Just(Happening::Commit), 1 => Just(Happening::Checkpoint), 1 => Just(Happening::Crash)];
    prop::collection::vec(one, 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Commits of one offset and one instant publish every row once, whatever is idle and wherever it crashes.
    #[test]
    fn every_row_is_published_once(
        scenario in scenario(80).prop_filter("two sources", |scenario| scenario.logs.len() == 2),
        happenings in happenings(),
    ) {
        let Scenario { plan, logs } = scenario;
        let plan = in_event_time(&plan);
        let on = plan.score.as_ref().unwrap().on;
        let mut reader = Reader::new(&plan, &logs);
        let mut committed = Published { next: NextOffset(0), frontier: None };
        let mut checkpoint: Option<Vec<RecordBatch>> = None;
        let mut open: Vec<(i64, i64)> = Vec::new();
        let mut published: Vec<usize> = Vec::new();
        let coordinates = |applied: Applied| {
            let cell = |row: &Row, name: &str| match row[name] {
                Cell::Int(value) => value,
                ref other => panic!("{name} is {other:?}"),
            };
            let rows = rows(&applied.rows).into_iter();
            rows.map(|(_, row)| (cell(&row, "source_offset"), cell(&row, "event_time"))).collect::<Vec<_>>()
        };
        let mut commit = |open: &mut Vec<(i64, i64)>, committed: &mut Published, task: &Task| {
            let before = published.len();
            let fresh = open.drain(..).filter(|&(offset, time)| !committed.has(offset, time));
            published.extend(fresh.map(|(offset, _)| offset as usize));
            match committed.after(task, on) {
                Some(after) => *committed = after,
                None => assert_eq!(published.len(), before, "what is published has to be told"),
            }
        };
        for happening in happenings {
            match happening {
                Happening::Poll { source, events, idle, limit } => {
                    reader.offer(source, events);
                    open.extend(coordinates(reader.advance(&idle, limit)));
                }
                Happening::Commit => commit(&mut open, &mut committed, &reader.task),
                Happening::Checkpoint => {
                    commit(&mut open, &mut committed, &reader.task);
                    checkpoint = Some(reader.task.snapshot().unwrap());
                }
                Happening::Crash => {
                    open.clear();
                    reader.restore(checkpoint.as_deref());
                    reader.task.resume(on, &committed);
                }
            }
        }
        reader.finish(|applied| open.extend(coordinates(applied)));
        commit(&mut open, &mut committed, &reader.task);
        published.sort_unstable();
        prop_assert_eq!(published, accepted(&logs[on], bound(&plan, on)));
    }
}

#[test]
fn an_idle_source_holds_back_nothing_and_is_heard_when_it_comes_back() {
    let groups = vec![group("g", 1, Some("amount"), None, &[window(1000, 10)])];
    let plan = in_event_time(&plan(vec![source("a", 100), source("b", 50)], groups, Some(0)));
    let logs = vec![vec![event(1000, 0.0), event(1300, 0.0), event(1250, 0.0)], vec![event(990, 1.0), event(970, 2.0)]];
    let mut reader = Reader::new(&plan, &logs);
    let offsets = |applied: &Applied| {
        rows(&applied.rows).into_iter().map(|(_, row)| row["source_offset"].clone()).collect::<Vec<_>>()
    };
    reader.offer(0, 2);
    let waiting = reader.advance(&[false, false], usize::MAX);
    assert_eq!((offsets(&waiting), reader.task.frontier()), (vec![], None), "the other source may bring anything");
    let alone = reader.advance(&[false, true], usize::MAX);
    assert_eq!((offsets(&alone), reader.task.frontier()), (vec![Cell::Int(0)], Some(1199)));
    assert_eq!((reader.task.next(), reader.task.settled()[0]), (vec![Some(NextOffset(1)), None], Some(NextOffset(2))));
    reader.offer(1, 2);
    let back = reader.advance(&[false, false], usize::MAX);
    assert_eq!(back.counts[1].applied, 2, "they are not late by their own partition");
    reader.offer(0, 1);
    let nobody = reader.advance(&[true, true], usize::MAX);
    assert_eq!(offsets(&nobody), [Cell::Int(0); 0], "both wait for their own bounds");
    reader.task.end();
    let rest = reader.advance(&[false, false], 1);
    assert_eq!((offsets(&rest), rest.more), (vec![Cell::Int(2)], true));
    let rest = reader.advance(&[false, false], 1);
    assert_eq!((offsets(&rest), rest.more, rest.next), (vec![Cell::Int(1)], false, reader.task.settled()));
    assert_eq!(rows(&rest.rows)[0].1["g_Sum_1000x10"], Cell::float(3.0));
}
