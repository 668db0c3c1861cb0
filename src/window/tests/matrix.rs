//! Every function over every type of column, in every kind of window and order of arrival, on every way that state can take.
//! Each combination must have told values, and all values are compared with the oracle's. A function that is not told of in
//! [`takes`] does not compile.

use rand::{Rng as _, SeedableRng as _};
use rstest::rstest;

use super::checkpoints::{Kept, restored};
use super::emitted::{self, rows_of, windows_of};
use super::event_time::{accepted, without_offset};
use super::oracle::{Oracle, assert_same};
use super::*;
use crate::broker::NextOffset;
use crate::config::plan::{EmittedPlan, Span};
use crate::window::Applied;

/// Types of columns by the function that takes them, where `None` are events without a column. The oracle of a function that is
/// new here is [`super::oracle::value`]'s.
fn takes(function: Function) -> Vec<Option<DataType>> {
    let numbers = [DataType::Int64, DataType::Float64];
    let of = |types: &[DataType]| types.iter().copied().map(Some).collect::<Vec<_>>();
    let any = of(&[DataType::Int64, DataType::Float64, DataType::String, DataType::Boolean, DataType::Timestamp]);
    match function {
        Function::Count | Function::SecondsSinceLast => [&[None], &any[..]].concat(),
        Function::Rate => [&[None], &of(&numbers)[..]].concat(),
        Function::Sum | Function::Mean | Function::Var | Function::Std | Function::Slope | Function::Quantile(_) => {
            of(&numbers)
        }
        Function::Min | Function::Max => [of(&numbers), of(&[DataType::Timestamp])].concat(),
        Function::First | Function::Last | Function::Distinct | Function::Top(_) | Function::LastN(_) => any,
        Function::Ratio => of(&[DataType::Boolean]),
    }
}

#[test]
fn functions_take_the_types_that_they_are_documented_to_take() {
    let types = FIELDS.iter().map(|(_, data_type)| Some(*data_type)).chain([None]);
    for (function, of) in types.flat_map(|of| Function::all().map(move |function| (function, of))) {
        assert_eq!(function.output_type(of).is_some(), takes(function).contains(&of), "{function} of {of:?}");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Sorted,
    /// No event is late.
    Shuffled,
    Late,
    /// Many events of each instant.
    Ties,
    /// Two sources, each shuffled.
    Sources,
}

/// How state goes on after some polls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    InMemory,
    Snapshot,
    Checkpoints,
    /// Checkpoints, and whatever is not in use is in the cold store.
    Cold,
}

const EVENTS: usize = 160;
const BOUND: i64 = 120;
/// A category is that of `kind`, and of `flag` where `kind` is what is counted.
const COLUMNS: [Option<&str>; 6] = [None, Some("amount"), Some("units"), Some("kind"), Some("due"), Some("flag")];

const SPANS: [Span; 3] = [
    Span::Hopping { length_ms: 300, step_ms: 300 },
    Span::Hopping { length_ms: 400, step_ms: 100 },
    Span::Session { gap_ms: 40 },
];

fn logs(order: Order) -> Vec<Vec<Event>> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    let mut log = || {
        let mut now = -300;
        let mut arrivals: Vec<(i64, Event)> = Vec::new();
        for number in 0..EVENTS {
            // Now and then everybody is quiet, so that sessions end.
            now += if number % 40 == 0 { 180 } else { 0 };
            now += if order == Order::Ties { 30 * i64::from(rng.random_bool(0.2)) } else { rng.random_range(1..12) };
            let delay = match order {
                Order::Sorted | Order::Ties => 0,
                Order::Late if rng.random_bool(0.1) => rng.random_range(2 * BOUND..4 * BOUND),
                Order::Late | Order::Shuffled | Order::Sources => rng.random_range(0..=BOUND),
            };
            let amount = rng.random_bool(0.9).then(|| f64::from(rng.random_range(-12..12)) / 4.0);
            let event = Event {
                key: [0, 0, 0, 0, 0, 0, 1, 2][rng.random_range(0..8)],
                time: now,
                amount: amount.map(|amount| if amount == 0.75 { f64::NAN } else { amount }),
                units: rng.random_bool(0.9).then(|| rng.random_range(-5..11)),
                kind: [Some("a"), Some("a"), Some("b"), Some("b"), Some(""), Some("it's"), Some("ü"), None]
                    [rng.random_range(0..8)],
            };
            arrivals.push((now + delay, event));
        }
        arrivals.sort_by_key(|(arrival, _)| *arrival);
        arrivals.into_iter().map(|(_, event)| event).collect()
    };
    (0..if order == Order::Sources { 2 } else { 1 }).map(|_| log()).collect()
}

/// All of it in one pipeline. Where there are several sources, groups and windows are shared out among them.
fn whole_plan(sources: usize, emit: Emit) -> Plan {
    let lengths = [window(700, 1), window(700, 20), window(0, 0)];
    let (mut groups, mut tables) = (Vec::new(), Vec::new());
    for (at, of) in COLUMNS.into_iter().enumerate() {
        for (decays, has_categories) in [(false, false), (false, true), (true, true), (true, false)] {
            let varied = |group: GroupPlan| {
                let group = if decays { decayed(group, 150) } else { group };
                match (has_categories, of) {
                    (false, _) => group,
                    (true, Some("kind")) => by(group, "flag", &["true", "false"]),
                    (true, _) => by(group, "kind", &["a", "b"]),
                }
            };
            let source = (at + groups.len() / 2) % sources;
            let whole = |name: String, windows: &[WindowPlan]| {
                varied(group_with(all_functions_of, &name, source, of, None, windows))
            };
            groups.push(whole(format!("g{}", groups.len()), &lengths));
            for span in SPANS {
                let group = whole(format!("w{}", tables.len()), &lengths[..1]);
                tables.push(EmittedPlan { source, ..windows_of(group, span, Some(70)) });
            }
        }
    }
    let bounds = (0..sources).map(|at| source(&format!("s{at}"), BOUND as u64)).collect();
    let mut plan = Plan { windows: tables, ..plan(bounds, groups, Some(sources - 1)) };
    plan.score.as_mut().expect("it was just asked for").emit = emit;
    plan
}

/// What came out.
#[derive(Debug, Default)]
struct Told {
    rows: Vec<Row>,
    online: BTreeMap<String, Row>,
    emitted: Vec<Vec<Row>>,
}

impl Told {
    fn online(&mut self, row: Row) {
        self.online.insert(format!("{:?} {:?}", row["name"], row["number"]), row);
    }

    fn take(&mut self, applied: &Applied) {
        self.rows.extend(rows(&applied.rows).into_iter().map(|(_, row)| row));
        rows(&applied.online).into_iter().for_each(|(_, row)| self.online(row));
        self.emitted.resize(applied.emitted.len(), Vec::new());
        for (all, emitted) in self.emitted.iter_mut().zip(&applied.emitted) {
            all.extend(emitted.iter().flat_map(|emitted| rows_of(&emitted.batch)));
        }
    }

    /// In event-time order, offsets are those of other logs in the oracle.
    fn without_offsets(self) -> Self {
        let without = |row: Row| without_offset((0, row));
        let rows = self.rows.into_iter().map(without).collect();
        let online = self.online.into_iter().map(|(key, row)| (key, without(row))).collect();
        let emitted = self.emitted.into_iter().map(|rows| rows.into_iter().map(without).collect()).collect();
        Self { rows, online, emitted }
    }
}

fn expected(plan: &Plan, order: Order, logs: &[Vec<Event>], emit: Emit) -> Told {
    let newest = |log: &[Event]| log.iter().map(|event| event.time).max().expect("there are events");
    // In event-time order, what is on time counts as if it came sorted.
    let read = logs.iter().map(|log| match emit {
        Emit::Arrival => (log.clone(), BOUND, i64::MAX),
        Emit::EventTime => {
            let mut sorted: Vec<Event> = accepted(log, BOUND).into_iter().map(|at| log[at].clone()).collect();
            sorted.sort_by_key(|event| event.time);
            (sorted, 0, newest(log) - BOUND)
        }
    });
    let read: Vec<(Vec<Event>, i64, i64)> = read.collect();
    let mut oracle = Oracle::new(plan);
    for (source, (log, ..)) in read.iter().enumerate() {
        oracle.offer(source, 0, log);
    }
    let (rows, online) = oracle.advance(&vec![true; logs.len()]);
    assert_eq!(oracle.late.is_empty(), order != Order::Late || emit == Emit::EventTime);
    let emitted = plan.windows.iter().map(|windows| {
        let (log, bound, end) = &read[windows.source];
        emitted::Oracle::run_to(windows, *bound, *end, log)
    });
    let mut told = Told { rows, emitted: emitted.collect(), ..Told::default() };
    online.into_values().for_each(|row| told.online(row));
    told
}

fn found(plan: &Plan, logs: &[Vec<Event>], emit: Emit, way: Way) -> Told {
    let engine = Engine::new(plan).unwrap();
    let memory = (way == Way::Cold).then_some(0);
    let (mut task, mut kept, mut told) = (restored(&engine, memory, &[]), Kept::default(), Told::default());
    let mut offered = vec![0; logs.len()];
    // What waits for the watermark is read again after each restart: less than comes until the next one.
    for poll in 1..1000 {
        for (source, log) in logs.iter().enumerate() {
            let end = log.len().min(offered[source] + 13 + source);
            task.offer(batch(source, &log[offered[source]..end], offered[source] as i64)).unwrap();
            offered[source] = end;
        }
        let done = offered.iter().zip(logs).all(|(offered, log)| *offered == log.len());
        if done && emit == Emit::EventTime {
            task.end();
        }
        let clock = TaskClock { caught_up: &vec![done; logs.len()], idle: &vec![false; logs.len()] };
        loop {
            let applied = task.advance(&clock, 50).unwrap();
            told.take(&applied);
            if !applied.more {
                break;
            }
        }
        if done {
            return told;
        }
        if poll % 4 != 0 {
            continue;
        }
        match way {
            Way::InMemory => continue,
            Way::Snapshot => task = Task::restore(engine.clone(), 3, &task.snapshot().unwrap()).unwrap(),
            Way::Checkpoints | Way::Cold => {
                kept.take(&mut task);
                task = restored(&engine, memory, &kept.batches);
            }
        }
        offered = task.next().iter().map(|next| next.map_or(0, |NextOffset(next)| next as usize)).collect();
    }
    panic!("the logs have an end")
}

/// A combination that has to tell something: type, function, kind of window, by category, decayed.
type Combination = (Option<DataType>, String, &'static str, bool, bool);

/// Those of feature groups that tell something in a row.
fn told_by_groups(plan: &Plan, row: &Row, told: &mut BTreeMap<String, usize>) {
    for group in &plan.groups {
        let of = group.of.as_ref().map(|of| of.data_type);
        for (function, window, column) in &group.features {
            let kind = match group.windows[*window] {
                WindowPlan { length_ms: None, .. } => "lifetime",
                WindowPlan { tile_ms: 1, .. } => "exact",
                _ => "tiled",
            };
            if row[&*column.name] != Cell::Null {
                let combination: Combination =
                    (of, function.to_string(), kind, group.by.is_some(), group.half_life_ms.is_some());
                *told.entry(format!("{combination:?}")).or_default() += 1;
            }
        }
    }
}

/// Those of emitted windows.
fn told_by_windows(windows: &EmittedPlan, row: &Row, told: &mut BTreeMap<String, usize>) {
    let kind = match (windows.span, &row["final"]) {
        (Span::Hopping { length_ms, step_ms }, Cell::Int(1)) if length_ms == step_ms => "tumbling",
        (Span::Hopping { .. }, Cell::Int(1)) => "hopping",
        (Span::Session { .. }, Cell::Int(1)) => "session",
        (Span::Hopping { .. }, _) => "early hopping",
        (Span::Session { .. }, _) => "early session",
    };
    for (function, column) in &windows.functions {
        if row[&*column.name] != Cell::Null {
            let of = windows.of.as_ref().map(|of| of.data_type);
            let combination: Combination =
                (of, function.to_string(), kind, windows.by.is_some(), windows.half_life_ms.is_some());
            *told.entry(format!("{combination:?}")).or_default() += 1;
        }
    }
}

/// All that there must be.
fn combinations() -> Vec<String> {
    let mut all = Vec::new();
    for (function, of) in Function::all().flat_map(|function| takes(function).into_iter().map(move |of| (function, of)))
    {
        // There are two booleans.
        if of == Some(DataType::Boolean) && matches!(function, Function::Top(3..)) {
            continue;
        }
        let mut one = |kind, by, decays| {
            let combination: Combination = (of, function.to_string(), kind, by, decays);
            all.push(format!("{combination:?}"));
        };
        let kinds = ["lifetime", "exact", "tiled", "tumbling", "hopping", "session", "early hopping", "early session"];
        for kind in kinds.into_iter().filter(|kind| *kind != "lifetime" || function != Function::Rate) {
            let numbers = of.is_none_or(|of| matches!(of, DataType::Int64 | DataType::Float64));
            let can_decay =
                function == Function::Count || matches!(function, Function::Sum | Function::Mean) && numbers;
            for by in [false, true] {
                // A session that is still open has not five values of one category by then.
                if by && kind == "early session" && matches!(function, Function::Top(4..)) {
                    continue;
                }
                one(kind, by, false);
                if can_decay {
                    one(kind, by, true);
                }
            }
        }
    }
    all
}

#[rstest]
fn every_function_tells_the_oracles_value_in_every_window_order_and_way(
    #[values(Order::Sorted, Order::Shuffled, Order::Late, Order::Ties, Order::Sources)] order: Order,
    #[values(Emit::Arrival, Emit::EventTime)] emit: Emit,
) {
    let logs = logs(order);
    let plan = whole_plan(logs.len(), emit);
    let settle = |told: Told| if emit == Emit::EventTime { told.without_offsets() } else { told };
    let wanted = settle(expected(&plan, order, &logs, emit));
    let mut told = BTreeMap::new();
    wanted.rows.iter().for_each(|row| told_by_groups(&plan, row, &mut told));
    for (windows, rows) in plan.windows.iter().zip(&wanted.emitted) {
        rows.iter().for_each(|row| told_by_windows(windows, row, &mut told));
    }
    let missing: Vec<String> = combinations().into_iter().filter(|one| !told.contains_key(one)).collect();
    assert!(missing.is_empty(), "nothing is told by {missing:#?}");

    for way in [Way::InMemory, Way::Snapshot, Way::Checkpoints, Way::Cold] {
        let found = settle(found(&plan, &logs, emit, way));
        let all = |told: &Told| -> Vec<(String, Vec<Row>)> {
            let online = told.online.iter().map(|(key, row)| (format!("online, {key}"), vec![row.clone()]));
            let tables = plan.windows.iter().zip(told.emitted.clone());
            let tables = tables.map(|(windows, rows)| (format!("{} {:?}", windows.name, windows.span), rows));
            [("rows".to_owned(), told.rows.clone())].into_iter().chain(online).chain(tables).collect()
        };
        let (found, wanted) = (all(&found), all(&wanted));
        assert_eq!(found.len(), wanted.len());
        for ((what, found), (wanted_of, wanted)) in found.iter().zip(&wanted) {
            assert_eq!((what, found.len()), (wanted_of, wanted.len()), "{way:?}");
            found.iter().zip(wanted).for_each(|(found, wanted)| assert_same(found, wanted, 1000.0));
        }
    }
}
