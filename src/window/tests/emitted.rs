//! Windows that are emitted when they close, against an oracle that keeps all events.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use rstest::rstest;

use super::checkpoints::Kept;
use super::oracle::{assert_same, counts, is_in, value};
use super::properties::{events, steps};
use super::*;
use crate::broker::NextOffset;
use crate::config::plan::{Emit, EmittedPlan, Span};
use crate::window::WindowError;

pub(super) fn windows(
    name: &str,
    of: Option<&str>,
    filter: Option<&str>,
    span: Span,
    early_ms: Option<i64>,
) -> EmittedPlan {
    windows_of(group(name, 0, of, filter, &[window(1000, 10)]), span, early_ms)
}

/// Windows that aggregate what a group does.
pub(super) fn windows_of(group: GroupPlan, span: Span, early_ms: Option<i64>) -> EmittedPlan {
    let name = group.name;
    let functions = group.features.into_iter().enumerate().map(|(at, (function, _, c))| {
        let category = group.by.as_ref().map(|by| format!("_{}", by.categories[by.of_feature[at]]));
        (function, column(&format!("{function}{}", category.unwrap_or_default()), c.data_type))
    });
    let functions = functions.collect();
    EmittedPlan {
        topic: format!("test.windows.{name}").into(),
        name,
        source: 0,
        of: group.of,
        filter: group.filter,
        span,
        half_life_ms: group.half_life_ms,
        by: group.by,
        functions,
        early_ms,
    }
}

pub(super) fn hopping(length_ms: i64, step_ms: i64) -> Span {
    Span::Hopping { length_ms, step_ms }
}

pub(super) fn session(gap_ms: i64) -> Span {
    Span::Session { gap_ms }
}

pub(super) fn plan_of(windows: Vec<EmittedPlan>, out_of_order_ms: u64) -> Plan {
    Plan { windows, ..plan(vec![source("purchases", out_of_order_ms)], Vec::new(), None) }
}

pub(super) fn rows_of(batch: &RecordBatch) -> Vec<Row> {
    let schema = batch.schema();
    let row = |index: usize| {
        let columns = schema.fields().iter().zip(batch.columns());
        columns.map(|(field, array)| (field.name().clone(), cell(array, index))).collect()
    };
    (0..batch.num_rows()).map(row).collect()
}

/// All rows that a plan's windows emit, computed from the definition of a window.
pub(super) struct Oracle<'a> {
    windows: &'a EmittedPlan,
    /// Events that were not late: offset, event.
    accepted: Vec<(i64, Event)>,
    /// Windows of open events that changed since the last early results: key and an event of each.
    fresh: BTreeSet<(u8, i64)>,
    rows: Vec<Row>,
}

impl Oracle<'_> {
    fn run(windows: &EmittedPlan, bound: i64, log: &[Event]) -> Vec<Row> {
        Self::run_to(windows, bound, i64::MAX, log)
    }

    /// As `run`, where event time does not pass `end`.
    pub fn run_to(windows: &EmittedPlan, bound: i64, end: i64, log: &[Event]) -> Vec<Row> {
        let mut oracle = Oracle { windows, accepted: Vec::new(), fresh: BTreeSet::new(), rows: Vec::new() };
        let mut newest: Option<i64> = None;
        for (offset, event) in (0..).zip(log) {
            if newest.is_some_and(|newest| event.time < newest - bound) {
                continue;
            }
            let before = newest;
            newest = newest.max(Some(event.time.min(end)));
            if let (Some(before), Some(newest)) = (before, newest) {
                oracle.close(before - bound, newest - bound, offset);
                let early = windows.early_ms;
                if early.is_some_and(|every| before.div_euclid(every) < newest.div_euclid(every)) {
                    oracle.early(newest - bound, offset);
                }
            }
            if counts(&oracle.group(), event) {
                oracle.fresh.insert((event.key, event.time));
                oracle.accepted.push((offset, event.clone()));
            }
        }
        oracle.rows
    }

    fn group(&self) -> GroupPlan {
        self.windows.as_group()
    }

    /// All windows of a key: start, end, the events in them.
    fn windows_of(&self, key: u8) -> Vec<(i64, i64, Vec<&Event>)> {
        let mut own: Vec<&(i64, Event)> = self.accepted.iter().filter(|(_, event)| event.key == key).collect();
        own.sort_by_key(|(offset, event)| (event.time, *offset));
        let own: Vec<&Event> = own.into_iter().map(|(_, event)| event).collect();
        match self.windows.span {
            Span::Hopping { length_ms, step_ms } => {
                let hops = length_ms / step_ms;
                let starts = own.iter().flat_map(|event| {
                    let last = event.time.div_euclid(step_ms);
                    (last - hops + 1..=last).map(|hop| hop * step_ms)
                });
                let starts: BTreeSet<i64> = starts.collect();
                let inside = |start: i64| {
                    own.iter().copied().filter(move |e| start <= e.time && e.time < start + length_ms).collect()
                };
                starts.into_iter().map(|start| (start, start + length_ms, inside(start))).collect()
            }
            Span::Session { gap_ms } => {
                let mut sessions: Vec<(i64, i64, Vec<&Event>)> = Vec::new();
                for event in own {
                    match sessions.last_mut() {
                        Some((_, end, events)) if event.time < *end => {
                            *end = event.time + gap_ms;
                            events.push(event);
                        }
                        _ => sessions.push((event.time, event.time + gap_ms, vec![event])),
                    }
                }
                sessions
            }
        }
    }

    fn keys(&self) -> Vec<u8> {
        let mut keys: Vec<u8> = self.accepted.iter().map(|(_, event)| event.key).collect();
        // By key bytes: the name with its length before it, then the number.
        keys.sort_by_key(|key| (key / 2, key % 2));
        keys.dedup();
        keys
    }

    fn close(&mut self, before: i64, watermark: i64, offset: i64) {
        let mut closed = Vec::new();
        for (rank, key) in self.keys().into_iter().enumerate() {
            let windows = self.windows_of(key).into_iter();
            for (start, end, events) in windows.filter(|(_, end, _)| before < *end && *end <= watermark) {
                closed.push((end, rank, self.row(key, start, end, &events, true, offset)));
            }
        }
        closed.sort_by_key(|(end, rank, _)| (*end, *rank));
        self.rows.extend(closed.into_iter().map(|(_, _, row)| row));
    }

    fn early(&mut self, watermark: i64, offset: i64) {
        let mut found = Vec::new();
        for (rank, key) in self.keys().into_iter().enumerate() {
            for (start, end, events) in self.windows_of(key) {
                if end > watermark && events.iter().any(|event| self.fresh.contains(&(key, event.time))) {
                    // Sessions come by entity, hopping windows by end.
                    let place = if matches!(self.windows.span, Span::Session { .. }) { start } else { end };
                    found.push((place, rank, self.row(key, start, end, &events, false, offset)));
                }
            }
        }
        match self.windows.span {
            Span::Session { .. } => found.sort_by_key(|(start, rank, _)| (*rank, *start)),
            Span::Hopping { .. } => found.sort_by_key(|(end, rank, _)| (*end, *rank)),
        }
        self.rows.extend(found.into_iter().map(|(_, _, row)| row));
        self.fresh.clear();
    }

    fn row(&self, key: u8, start: i64, end: i64, events: &[&Event], last: bool, offset: i64) -> Row {
        let mut row = Row::from([
            ("name".to_owned(), Cell::Text(format!("customer {}", key / 2))),
            ("number".to_owned(), Cell::Int(i64::from(key % 2))),
            ("window_start".to_owned(), Cell::Int(start)),
            ("window_end".to_owned(), Cell::Int(end)),
            ("final".to_owned(), Cell::Int(i64::from(last))),
            ("source_offset".to_owned(), Cell::Int(offset)),
        ]);
        let group = self.group();
        for (at, (function, column)) in self.windows.functions.iter().enumerate() {
            let events: Vec<&Event> = events.iter().copied().filter(|event| is_in(&group, at, event)).collect();
            row.insert(column.name.to_string(), value(&group, *function, end, Some(end - start), &events));
        }
        row
    }
}

/// A task over one log, cut into batches and restarted at will.
struct Run {
    engine: Arc<Engine>,
    task: Task,
    kept: Kept,
    offered: usize,
    rows: Vec<Vec<Row>>,
}

impl Run {
    fn new(plan: &Plan) -> Self {
        let engine = Engine::new(plan).unwrap();
        Self {
            task: Task::new(engine.clone(), 3),
            kept: Kept::default(),
            offered: 0,
            rows: vec![Vec::new(); plan.windows.len()],
            engine,
        }
    }

    fn step(&mut self, log: &[Event], count: usize, limit: usize, restart: bool) {
        if restart {
            self.kept.take(&mut self.task);
            self.task = Task::restore(self.engine.clone(), 3, &self.kept.batches).unwrap();
            self.offered = self.task.next()[0].map_or(0, |NextOffset(next)| next as usize);
        }
        let from = self.offered;
        let to = log.len().min(from.saturating_add(count));
        self.offered = to;
        self.task.offer(batch(0, &log[from..to], from as i64)).unwrap();
        loop {
            let clock = TaskClock { caught_up: &[self.offered == log.len()], idle: &[false] };
            let applied = self.task.advance(&clock, limit).unwrap();
            for (rows, emitted) in self.rows.iter_mut().zip(&applied.emitted) {
                rows.extend(emitted.iter().flat_map(|emitted| rows_of(&emitted.batch)));
            }
            if !applied.more {
                break;
            }
        }
    }
}

fn spans() -> impl Strategy<Value = Span> {
    prop::sample::select(vec![
        hopping(1, 1),
        hopping(10, 10),
        hopping(700, 700),
        hopping(60, 20),
        hopping(400, 5),
        hopping(5000, 1000),
        session(1),
        session(15),
        session(300),
        session(4000),
    ])
}

/// Tables of windows of the first source.
pub(super) fn tables() -> impl Strategy<Value = Vec<EmittedPlan>> {
    let columns = [None, Some("amount"), Some("units"), Some("kind"), Some("due"), Some("flag")];
    let early = prop::option::of(prop::sample::select(vec![7i64, 50, 900]));
    let half_life = prop::option::weighted(0.3, prop::sample::select(vec![1i64, 40, 3000]));
    let categories =
        [("kind", vec!["a", "none such"]), ("units", vec!["-3", "0", "1", "2"]), ("flag", vec!["true", "false"])];
    let categories = prop::option::weighted(0.5, prop::sample::select(categories.to_vec()));
    let one = (prop::sample::select(columns.to_vec()), any::<bool>(), spans(), early, half_life, categories);
    prop::collection::vec(one, 1..4).prop_map(|tables| {
        let tables = tables.into_iter().enumerate().map(|(at, (of, filter, span, early, half_life, categories))| {
            let group = group(&format!("w{at}"), 0, of, filter.then_some("units > 2"), &[window(1000, 10)]);
            let group = match half_life {
                Some(half_life) => decayed(group, half_life),
                None => group,
            };
            let group = match categories {
                Some((column, categories)) => super::by(group, column, &categories),
                None => group,
            };
            windows_of(group, span, early)
        });
        tables.collect()
    })
}

fn plans() -> impl Strategy<Value = Plan> {
    let bound = prop_oneof![Just(0u64), 1u64..200, Just(3000)];
    (tables(), bound).prop_map(|(tables, bound)| plan_of(tables, bound))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn emitted_windows_equal_the_oracle_however_they_are_cut(
        plan in plans(),
        log in events(120, 150),
        start in prop_oneof![Just(-4321i64), Just(1_700_000_000_000)],
        steps in prop::collection::vec((0usize..40, prop_oneof![Just(usize::MAX), 1usize..20], prop::bool::weighted(0.3)), 0..20),
    ) {
        let mut log = log;
        log.iter_mut().for_each(|event| event.time += start);
        let mut run = Run::new(&plan);
        for (count, limit, restart) in steps {
            run.step(&log, count, limit, restart);
        }
        run.step(&log, usize::MAX, usize::MAX, true);
        let bound = plan.sources[0].out_of_order.as_millis() as i64;
        for (windows, found) in plan.windows.iter().zip(&run.rows) {
            let expected = Oracle::run(windows, bound, &log);
            prop_assert_eq!(found.len(), expected.len(), "{:?}\nfound {:?}\nexpected {:?}", windows.span, found, expected);
            for (found, expected) in found.iter().zip(&expected) {
                assert_same(found, expected, 1000.0);
            }
        }
    }

    /// In event-time order the rows are those of the sorted log, closed by its watermark, however it is polled and restarted.
    #[test]
    fn in_event_time_order_the_order_of_arrival_is_nothing(plan in plans(), log in events(80, 150), steps in steps()) {
        let bound = plan.sources[0].out_of_order.as_millis() as i64;
        let mut plan = Plan { windows: plan.windows, ..super::plan(plan.sources, Vec::new(), Some(0)) };
        plan.score.as_mut().unwrap().emit = Emit::EventTime;
        let mut newest = i64::MIN;
        let mut sorted = Vec::new();
        for event in &log {
            if event.time >= newest.saturating_sub(bound) {
                newest = newest.max(event.time);
                sorted.push(event.clone());
            }
        }
        sorted.sort_by_key(|event| event.time);
        let mut run = Run::new(&plan);
        for step in steps {
            run.step(&log, step.events, step.limit, step.restart);
        }
        run.task.end();
        run.step(&log, usize::MAX, usize::MAX, false);
        for (windows, found) in plan.windows.iter().zip(&run.rows) {
            let expected = Oracle::run_to(windows, 0, newest.saturating_sub(bound), &sorted);
            prop_assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                let without_offset = |row: &Row| Row::from_iter(row.clone().into_iter().filter(|(name, _)| name != "source_offset"));
                assert_same(&without_offset(found), &without_offset(expected), 1000.0);
            }
        }
    }

    /// Beside feature groups of the same source, which may share filters and columns with them.
    #[test]
    fn emitted_windows_and_features_leave_each_other_alone(plan in plans(), log in events(80, 150), of in prop::option::of(Just("units"))) {
        let groups = vec![group("g", 0, of, Some("units > 2"), &[window(1000, 20)])];
        let both = Plan { groups, score: super::plan(Vec::new(), Vec::new(), Some(0)).score, ..plan.clone() };
        let features = Plan { windows: Vec::new(), ..both.clone() };
        let run = |plan: &Plan| {
            let mut run = Run::new(plan);
            run.task.offer(batch(0, &log, 0)).unwrap();
            let applied = run.task.advance(&TaskClock { caught_up: &[true], idle: &[false] }, usize::MAX).unwrap();
            let emitted: Vec<_> = applied.emitted.iter().map(|rows| rows.as_ref().map(|rows| rows_of(&rows.batch))).collect();
            (rows(&applied.rows), rows(&applied.online), emitted)
        };
        let (alone, with) = (run(&plan), run(&both));
        prop_assert_eq!(alone.2, with.2.clone());
        let without = run(&features);
        prop_assert_eq!((without.0, without.1), (with.0, with.1));
    }
}

fn emit(windows: EmittedPlan, out_of_order_ms: u64, times: &[i64]) -> Vec<(i64, i64, Cell, i64)> {
    let log: Vec<Event> = times.iter().map(|&time| event(time, 1.0)).collect();
    let mut run = Run::new(&plan_of(vec![windows], out_of_order_ms));
    run.step(&log, usize::MAX, usize::MAX, false);
    let int = |row: &Row, name: &str| match &row[name] {
        Cell::Int(value) => *value,
        other => panic!("{name} is {other:?}"),
    };
    let short = |row: &Row| (int(row, "window_start"), int(row, "window_end"), row["count"].clone(), int(row, "final"));
    run.rows[0].iter().map(short).collect()
}

#[rstest]
#[case::the_beginning_belongs_to_it_and_the_end_does_not(hopping(10, 10), 0, &[10, 19, 20], &[(10, 20, 2)])]
#[case::it_waits_for_what_may_come(hopping(10, 10), 5, &[10, 20, 16, 25], &[(10, 20, 2)])]
#[case::times_before_1970(hopping(10, 10), 0, &[-10, -1, 0], &[(-10, 0, 2)])]
#[case::windows_without_events_are_no_rows(hopping(10, 10), 0, &[0, 1000, 1010], &[(0, 10, 1), (1000, 1010, 1)])]
#[case::a_window_for_each_hop(hopping(20, 10), 0, &[10, 40], &[(0, 20, 1), (10, 30, 1)])]
#[case::events_of_two_panes(hopping(20, 10), 0, &[5, 15, 60], &[(-10, 10, 1), (0, 20, 2), (10, 30, 1)])]
#[case::a_session_ends_after_the_gap(session(10), 0, &[0, 9, 18, 28], &[(0, 28, 3)])]
#[case::a_gap_is_as_long_as_it_says(session(10), 0, &[0, 10, 20], &[(0, 10, 1), (10, 20, 1)])]
#[case::a_late_comer_joins_two_sessions(session(10), 100, &[0, 15, 8, 200], &[(0, 25, 3)])]
#[case::a_late_comer_goes_before(session(10), 100, &[15, 0, 200], &[(0, 10, 1), (15, 25, 1)])]
fn windows_begin_and_end(
    #[case] span: Span,
    #[case] out_of_order_ms: u64,
    #[case] times: &[i64],
    #[case] expected: &[(i64, i64, i64)],
) {
    let expected: Vec<_> = expected.iter().map(|&(start, end, count)| (start, end, Cell::Int(count), 1)).collect();
    assert_eq!(emit(windows("w", None, None, span, None), out_of_order_ms, times), expected);
}

#[test]
fn early_results_tell_what_changed() {
    let found = emit(windows("w", None, None, hopping(100, 100), Some(10)), 0, &[1, 5, 12, 25, 31, 32, 104]);
    let counts: Vec<_> = found.into_iter().map(|(_, _, count, last)| (count, last)).collect();
    // As of 12, 25 and 31, without the event that asked; then the final one; of the new window there is nothing yet.
    let expected = [(2, 0), (3, 0), (4, 0), (6, 1)].map(|(count, last)| (Cell::Int(count), last));
    assert_eq!(counts, expected);
}

#[test]
fn open_windows_are_not_carried_over_to_others() {
    let plain = || group("w", 0, None, None, &[window(1000, 10)]);
    let tumbling = |group| windows_of(group, hopping(10, 10), None);
    let different = [
        vec![],
        vec![tumbling(plain())],
        vec![windows("w", None, None, hopping(20, 10), None)],
        vec![tumbling(decayed(plain(), 1))],
        vec![tumbling(decayed(plain(), 2))],
        vec![tumbling(super::by(plain(), "kind", &["a", "b"]))],
        vec![tumbling(super::by(plain(), "kind", &["b", "a"]))],
        vec![tumbling(super::by(plain(), "units", &["1", "2"]))],
    ];
    for (from, windows) in different.iter().enumerate().skip(1) {
        let mut run = Run::new(&plan_of(windows.clone(), 0));
        run.step(&[event(1, 1.0)], 1, usize::MAX, false);
        let snapshot = run.task.snapshot().unwrap();
        for (to, others) in different.iter().enumerate() {
            let restored = Task::restore(Engine::new(&plan_of(others.clone(), 0)).unwrap(), 3, &snapshot);
            match restored {
                Ok(_) => assert_eq!(from, to),
                Err(refused) => assert!(from != to && matches!(refused, WindowError::OtherWindows { .. }), "{refused}"),
            }
        }
    }
}

/// Of an event 5 ms before the end with a half-life of 5 ms half a weight is left, at the end one would be left whole.
#[test]
fn weights_are_as_of_the_end() {
    let group = decayed(group("w", 0, Some("amount"), None, &[window(1000, 10)]), 5);
    let mut run = Run::new(&plan_of(vec![windows_of(group, hopping(10, 10), Some(4))], 0));
    run.step(&[event(5, 8.0), event(8, 1.0), event(25, 1.0)], usize::MAX, usize::MAX, false);
    let found: Vec<_> = run.rows[0].iter().map(|row| (row["final"].clone(), row["sum"].clone())).collect();
    let last = 4.0 + 2f64.powf(-0.4);
    assert_eq!(found, [(Cell::Int(0), Cell::float(4.0)), (Cell::Int(1), Cell::float(last))]);
}

/// An event without a declared category is in its window, which has a row; but in none of the columns.
#[test]
fn an_event_of_no_category_makes_a_row() {
    let group = super::by(group("w", 0, Some("units"), None, &[window(1000, 10)]), "kind", &["a", "b"]);
    let log = [("a", 1), ("c", 12), ("b", 14), ("c", 33), ("c", 55)];
    let log: Vec<Event> = log.map(|(kind, time)| Event { kind: Some(kind), ..event(time, 1.0) }).into();
    let mut run = Run::new(&plan_of(vec![windows_of(group, hopping(10, 10), None)], 0));
    run.step(&log, usize::MAX, usize::MAX, false);
    let counts = run.rows[0].iter().map(|row| [&row["window_start"], &row["count_a"], &row["count_b"]]);
    let expected = [[0, 1, 0], [10, 0, 1], [30, 0, 0]];
    let counts: Vec<_> = counts.map(|cells| cells.map(Clone::clone)).collect();
    assert_eq!(counts, expected.map(|row| row.map(Cell::Int)));
}

#[test]
fn rows_of_derived_features_alone_are_there_beside_windows() {
    let windows = vec![windows("w", None, None, hopping(10, 10), None)];
    let one = vec![derived("one", DataType::Int64, "1")];
    let plan = Plan { windows, derived: one, ..plan(vec![source("purchases", 0)], Vec::new(), Some(0)) };
    let log: Vec<Event> = [1, 5, 12].map(|time| event(time, 1.0)).into();
    let engine = Engine::new(&plan).unwrap();
    let mut task = Task::new(engine, 3);
    task.offer(batch(0, &log, 0)).unwrap();
    let applied = task.advance(&TaskClock { caught_up: &[true], idle: &[false] }, usize::MAX).unwrap();
    let found: Vec<Cell> = rows(&applied.rows).into_iter().map(|(_, row)| row["one"].clone()).collect();
    assert_eq!(found, [Cell::Int(1), Cell::Int(1), Cell::Int(1)]);
    assert_eq!(applied.emitted[0].as_ref().unwrap().batch.num_rows(), 1);
}
