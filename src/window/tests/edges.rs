//! Edge cases, one by one.

use rstest::rstest;

use super::oracle::{Oracle, assert_same};
use super::*;
use crate::broker::NextOffset;
use crate::window::{Late, WindowError};

/// A task of one source with one group over `amount`.
pub(super) fn task(out_of_order_ms: u64, windows: &[WindowPlan]) -> Task {
    let group = group("g", 0, Some("amount"), None, windows);
    Task::new(Engine::new(&plan(vec![source("purchases", out_of_order_ms)], vec![group], Some(0))).unwrap(), 3)
}

pub(super) fn advance(task: &mut Task) -> crate::window::Applied {
    let sources = task.next().len();
    task.advance(&TaskClock { caught_up: &vec![true; sources], idle: &vec![false; sources] }, usize::MAX).unwrap()
}

pub(super) fn int(row: &Row, name: &str) -> i64 {
    match &row[name] {
        Cell::Int(value) => *value,
        other => panic!("{name} is {other:?}"),
    }
}

fn float(row: &Row, name: &str) -> f64 {
    match &row[name] {
        Cell::Float(bits) => f64::from_bits(*bits),
        other => panic!("{name} is {other:?}"),
    }
}

/// Whether an event at `time` is in the window (1 s, tiles of 0.1 s) as of `as_of`; alone, and merged with many others.
#[rstest]
#[case::at_the_cut(0, 1000, false)]
#[case::just_after_the_cut(1, 1000, true)]
#[case::tail_moves_by_tiles(1, 1099, true)]
#[case::tail_has_moved(100, 1100, false)]
#[case::first_of_the_next_tile(101, 1100, true)]
#[case::before_1970(-1100, -1, false)]
#[case::just_after_the_cut_before_1970(-1099, -1, true)]
#[case::across_1970(-999, 0, true)]
#[case::at_the_cut_across_1970(-1000, 0, false)]
#[case::at_the_instant_itself(5, 5, true)]
fn covers_left_open_right_closed(
    #[case] time: i64,
    #[case] as_of: i64,
    #[case] inside: bool,
    #[values(1, 100)] copies: i64,
) {
    let mut events = vec![event(time, 1.0); copies as usize];
    events.push(event(as_of, 1.0));
    let (rows, online) = run_one(group("g", 0, Some("amount"), None, &[window(1000, 100)]), 0, &events);
    let expected = if inside { copies + 1 } else { 1 };
    assert_eq!(int(rows.last().unwrap(), "g_Count_1000x100"), expected);
    assert_eq!(int(&online[0], "g_Count_1000x100"), expected);
}

#[rstest]
#[case::one(&[3.0], None)]
#[case::two(&[1.0, 2.0], Some(0.5f64.sqrt()))]
#[case::all_the_same(&[0.1; 40], Some(0.0))]
#[case::far_from_zero(&[1e9, 1e9 + 1.0, 1e9 + 2.0], Some(1.0))]
#[case::too_large_to_square(&[1e200, 3e200], None)]
fn std_is_of_a_sample(#[case] amounts: &[f64], #[case] expected: Option<f64>) {
    let events: Vec<Event> = (0..).zip(amounts).map(|(time, &amount)| event(time, amount)).collect();
    let (rows, _) = run_one(group("g", 0, Some("amount"), None, &[window(1000, 100)]), 0, &events);
    let found = &rows.last().unwrap()["g_Std_1000x100"];
    assert_eq!(*found, expected.map_or(Cell::Null, Cell::float));
}

#[test]
fn std_of_integers_is_exact_as_long_as_their_squares_fit() {
    let units = |units: &[i64]| {
        let events: Vec<Event> =
            (0..).zip(units).map(|(time, &units)| Event { units: Some(units), ..event(time, 1.0) }).collect();
        let (rows, _) = run_one(group("g", 0, Some("units"), None, &[window(1000, 100)]), 0, &events);
        rows.last().unwrap()["g_Std_1000x100"].clone()
    };
    let large = 1i64 << 62;
    assert_eq!(units(&[large, large + 1, large + 2]), Cell::float(1.0));
    assert_eq!(units(&[i64::MIN, i64::MAX]), Cell::float(2f64.powi(127).sqrt()));
    assert_eq!(units(&[i64::MIN; 5]), Cell::Null, "the sum of squares does not fit 128 bits");
}

#[test]
fn of_events_at_the_same_time_the_first_to_come_is_the_first() {
    let kinds = ["b", "a", "c", "d"];
    let times = [5, 3, 3, 5];
    let events: Vec<Event> =
        times.into_iter().zip(kinds).map(|(time, kind)| Event { kind: Some(kind), ..event(time, 1.0) }).collect();
    let (rows, online) = run_one(group("g", 0, Some("kind"), None, &[window(1000, 100)]), 10, &events);
    let both = |row: &Row| (row["g_First_1000x100"].clone(), row["g_Last_1000x100"].clone());
    let text = |text: &str| Cell::Text(text.to_owned());
    let found: Vec<_> = rows.iter().map(both).collect();
    assert_eq!(found, [("b", "b"), ("a", "a"), ("a", "c"), ("a", "d")].map(|(first, last)| (text(first), text(last))));
    assert_eq!(both(&online[0]), (text("a"), text("d")));
}

/// Forty events a day in tiles of a day, on top of a value that is large beside their differences.
#[test]
fn a_trend_over_a_year_of_milliseconds_loses_nothing() {
    const DAY: i64 = 86_400_000;
    let start = 1_735_689_600_001;
    let year = [window(365 * DAY, DAY)];
    let events: Vec<Event> =
        (0..365 * 40).map(|at| event(start + at * DAY / 40, 1e9 + (at % 2) as f64 + at as f64 / 16.0)).collect();
    let (rows, _) = run_one(group("g", 0, Some("amount"), None, &year), 0, &events);
    // A sixteenth a step, and a zigzag, whose own slope is 3/(n² − 1) a step.
    let n = events.len() as f64;
    let steps = 40.0 / 86_400.0;
    let expected = (1.0 / 16.0 + 3.0 / (n * n - 1.0)) * steps;
    let found = float(rows.last().unwrap(), &format!("g_Slope_{}x{DAY}", 365 * DAY));
    assert!((found - expected).abs() <= 1e-15 * expected, "{found:e}, not {expected:e}");
}

#[test]
fn rates_are_of_the_whole_window() {
    let units = |units: i64, time: i64| Event { units: Some(units), ..event(time, 1.0) };
    let events = [units(7, 0), units(i64::MAX, 500), units(i64::MAX, 600), units(-4, 1600)];
    let row = |of: Option<&str>| {
        let (rows, _) = run_one(group("g", 0, of, None, &[window(2000, 100), window(500, 100)]), 0, &events);
        rows.into_iter().map(|row| row["g_Rate_2000x100"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(row(None), [0.5, 1.0, 1.5, 2.0].map(Cell::float));
    assert_eq!(row(Some("units"))[0], Cell::float(3.5));
    assert_eq!(row(Some("units"))[2], Cell::float(2f64.powi(63)), "though the sum does not fit");
}

#[test]
fn old_events_weigh_less() {
    let units = |units: i64, time: i64| Event { units: Some(units), ..event(time, 1.0) };
    let events = [units(8, 0), units(2, 1000), units(0, 3000)];
    let group = decayed(group("g", 0, Some("units"), None, &[window(0, 0), window(2500, 100)]), 1000);
    let (rows, online) = run_one(group, 0, &events);
    let all = |row: &Row, window: &str| ["Count", "Sum", "Mean"].map(|name| row[&format!("g_{name}_{window}")].clone());
    assert_eq!(all(&rows[0], "lifetime"), [1.0, 8.0, 8.0].map(Cell::float));
    assert_eq!(all(&rows[1], "lifetime"), [1.5, 6.0, 4.0].map(Cell::float));
    assert_eq!(all(&rows[2], "lifetime"), [1.375, 1.5, 1.5 / 1.375].map(Cell::float));
    assert_eq!(all(&rows[2], "2500x100"), [1.25, 0.5, 0.4].map(Cell::float), "the first one is out of the window");
    assert_eq!(&online[0], &rows[2]);
}

#[test]
fn only_some_functions_decay() {
    let mut group = group("g", 0, Some("units"), None, &[window(1000, 100)]);
    group.half_life_ms = Some(1000);
    group.features.retain(|(function, ..)| *function == Function::Max);
    let error = Engine::new(&plan(vec![source("purchases", 0)], vec![group], Some(0))).unwrap_err();
    assert!(error.to_string().contains("max cannot decay"), "{error}");
}

#[test]
fn a_lifetime_has_no_rate() {
    let mut lifetime = group("g", 0, None, None, &[window(0, 0)]);
    lifetime.features[0] = (Function::Rate, 0, column("g", DataType::Float64));
    let error = Engine::new(&plan(vec![source("purchases", 0)], vec![lifetime], Some(0))).unwrap_err();
    assert!(error.to_string().contains("no rate"), "{error}");
}

#[test]
fn empty_windows_count_and_sum_to_zero_list_nothing_and_have_nothing_else() {
    let windows = [window(10, 1), window(0, 0)];
    let group = group("g", 0, Some("amount"), Some("units > 2"), &windows);
    let (rows, _) = run_one(group, 0, &[event(0, 5.0)]);
    for (name, value) in rows[0].iter().filter(|(name, _)| name.starts_with("g_")) {
        let expected = match name.as_str() {
            "g_Count_10x1" | "g_Count_lifetime" | "g_Distinct_10x1" | "g_Distinct_lifetime" => Cell::Int(0),
            "g_Sum_10x1" | "g_Sum_lifetime" | "g_Rate_10x1" => Cell::float(0.0),
            list if list.contains("LastN") => Cell::List(vec![]),
            _ => Cell::Null,
        };
        assert_eq!(*value, expected, "{name}");
    }
}

#[test]
fn nulls_and_what_is_not_finite_are_not_there() {
    let events = [
        Event { amount: None, ..event(0, 0.0) },
        event(1, f64::NAN),
        event(2, f64::INFINITY),
        event(3, 7.0),
        event(4, f64::NEG_INFINITY),
    ];
    let (rows, _) = run_one(group("g", 0, Some("amount"), None, &[window(10, 1)]), 0, &events);
    let last = rows.last().unwrap();
    assert_eq!(rows.len(), 5);
    assert_eq!((int(last, "g_Count_10x1"), float(last, "g_Sum_10x1"), float(last, "g_Last_10x1")), (1, 7.0, 7.0));
    assert_eq!(float(last, "g_SecondsSinceLast_10x1"), 0.001);
    assert_eq!(rows[2]["g_Max_10x1"], Cell::Null);
}

#[test]
fn sums_that_do_not_fit_are_null_until_they_fit_again() {
    let units = [i64::MAX, 1, -5];
    let events: Vec<Event> =
        (0..).zip(units).map(|(time, units)| Event { units: Some(units), ..event(time, 1.0) }).collect();
    let (rows, _) = run_one(group("g", 0, Some("units"), None, &[window(10, 1)]), 0, &events);
    let sums: Vec<_> = rows.iter().map(|row| row["g_Sum_10x1"].clone()).collect();
    assert_eq!(sums, [Cell::Int(i64::MAX), Cell::Null, Cell::Int(i64::MAX - 4)]);
    assert_eq!(float(&rows[1], "g_Mean_10x1"), 2f64.powi(62));

    let (rows, _) =
        run_one(group("g", 0, Some("amount"), None, &[window(10, 1)]), 0, &[event(0, f64::MAX), event(1, f64::MAX)]);
    assert_eq!((&rows[1]["g_Sum_10x1"], &rows[1]["g_Mean_10x1"]), (&Cell::Null, &Cell::Null));
}

#[test]
fn a_lifetime_forgets_nothing() {
    let events: Vec<Event> = (0..500).map(|at| event(at * at * 50, at as f64)).collect();
    let windows = [window(1000, 100), window(0, 0)];
    let (rows, online) = run_one(group("g", 0, Some("amount"), None, &windows), 0, &events);
    let last = rows.last().unwrap();
    assert_eq!((int(last, "g_Count_1000x100"), int(last, "g_Count_lifetime")), (1, 500));
    assert_eq!((float(last, "g_Sum_lifetime"), float(last, "g_Min_lifetime")), (124_750.0, 0.0));
    assert_eq!(&online[0], last);
}

#[test]
fn only_what_is_behind_the_watermark_is_late() {
    let mut task = task(100, &[window(1000, 100)]);
    let events = [event(1000, 1.0), event(900, 2.0), event(899, 4.0), event(1200, 8.0), event(1100, 16.0)];
    let late = Late { source: 0, offset: 2, event_time: 899, watermark: 900 };
    assert_eq!(task.offer(batch(0, &events, 0)).unwrap(), [late]);
    let applied = advance(&mut task);
    assert_eq!(applied.late, [late]);
    assert_eq!((applied.counts[0].read, applied.counts[0].applied, applied.counts[0].late), (5, 4, 1));
    assert_eq!(applied.watermark, Some(1100));
    let sums: Vec<_> = rows(&applied.rows).iter().map(|(_, row)| float(row, "g_Sum_1000x100")).collect();
    assert_eq!(sums, [1.0, 2.0, 11.0, 19.0], "each as of its own time");
    assert_eq!(applied.rows.sequence, [1, 2, 4, 5]);
    assert_eq!(applied.next, [Some(NextOffset(5))]);
    assert_eq!(float(&rows(&applied.online)[0].1, "g_Sum_1000x100"), 27.0, "as of the newest event");
}

#[test]
fn the_ledger_takes_in_filtered_and_dead_records_with_their_batch() {
    let mut task = task(0, &[window(1000, 100)]);
    let mut records = batch(0, &[event(1, 1.0), event(2, 1.0)], 10);
    (records.read, records.filtered, records.next) = (7, 3, 17);
    task.offer(records).unwrap();
    let clock = TaskClock { caught_up: &[true], idle: &[false] };
    let first = task.advance(&clock, 1).unwrap();
    assert_eq!((first.more, first.next[0], first.counts[0].read), (true, Some(NextOffset(11)), 1));
    let second = task.advance(&clock, 1).unwrap();
    assert_eq!((second.more, second.next[0]), (false, Some(NextOffset(17))));
    let counts = second.counts[0];
    assert_eq!((counts.read, counts.applied, counts.filtered, counts.dead), (6, 1, 3, 2));
    let mut nothing = batch(0, &[], 20);
    (nothing.read, nothing.filtered) = (3, 3);
    task.offer(nothing).unwrap();
    let third = task.advance(&clock, 1).unwrap();
    assert_eq!((third.counts[0].read, third.counts[0].filtered, third.next[0]), (3, 3, Some(NextOffset(20))));
}

#[test]
fn a_source_that_comes_back_from_idleness_is_not_shown_later_tiles() {
    let groups = vec![group("g", 1, Some("amount"), None, &[window(1000, 10)])];
    let engine = Engine::new(&plan(vec![source("a", 0), source("b", 0)], groups, Some(0))).unwrap();
    let mut task = Task::new(engine, 3);
    let events: Vec<Event> = (0..300).map(|time| event(time, 1.0)).collect();
    task.offer(batch(1, &events, 0)).unwrap();
    task.advance(&TaskClock { caught_up: &[true, true], idle: &[true, false] }, usize::MAX).unwrap();
    task.offer(batch(0, &[event(101, 0.0)], 0)).unwrap();
    let applied = advance(&mut task);
    // Events 0 to 100 belong there, 101 does not (source b is after a); those up to 110 share its tile.
    let count = int(&rows(&applied.rows)[0].1, "g_Count_1000x10");
    assert!((101..=111).contains(&count), "{count}");
}

#[test]
fn quiet_entities_are_forgotten_but_for_lifetimes() {
    for (windows, expected) in [(vec![window(1000, 100)], 1), (vec![window(1000, 100), window(0, 0)], 201)] {
        let mut task = task(0, &windows);
        let many = |time: i64| (0..200).map(move |key| Event { key, ..event(time, 1.0) });
        let events: Vec<Event> = many(0).chain(many(1)).collect();
        task.offer(batch(0, &events, 0)).unwrap();
        advance(&mut task);
        assert_eq!(task.entities(), 200);
        let before = task.memory().state;
        for round in 0..20 {
            task.offer(batch(0, &[Event { key: 200, ..event(5000 + round, 1.0) }], 400 + round)).unwrap();
            advance(&mut task);
        }
        assert_eq!(task.entities(), expected);
        assert!(expected > 1 || task.memory().state < before);
        task.offer(batch(0, &[event(6000, 1.0)], 420)).unwrap();
        let row = rows(&advance(&mut task).rows).remove(0).1;
        assert_eq!(int(&row, "g_Count_1000x100"), 1);
        assert!(expected == 1 || int(&row, "g_Count_lifetime") == 3);
    }
}

#[test]
fn without_score_there_are_online_rows_only() {
    let group = group("g", 0, Some("amount"), None, &[window(1000, 100)]);
    let engine = Engine::new(&plan(vec![source("purchases", 500)], vec![group], None)).unwrap();
    let mut task = Task::new(engine, 3);
    task.offer(batch(0, &[event(100, 1.0), event(500, 2.0), event(200, 4.0)], 0)).unwrap();
    let applied = advance(&mut task);
    assert_eq!(applied.rows.batch.num_rows(), 0);
    let online = rows(&applied.online);
    assert_eq!((online.len(), online[0].0), (1, 3));
    assert_eq!((int(&online[0].1, "event_time"), float(&online[0].1, "g_Sum_1000x100")), (500, 7.0));
}

#[test]
fn derived_features_use_those_before_them_and_failures_are_nulls() {
    let mut plan = plan(
        vec![source("purchases", 0)],
        vec![group("g", 0, Some("units"), Some("units / (units - 1) >= 0"), &[window(1000, 100)])],
        Some(0),
    );
    plan.derived = vec![
        derived("mean", DataType::Float64, "\"g_Sum_1000x100\" * 1.0 / \"g_Count_1000x100\""),
        derived("twice", DataType::Float64, "mean * 2"),
        derived("whole", DataType::Int64, "10 / \"g_Sum_1000x100\""),
    ];
    let mut task = Task::new(Engine::new(&plan).unwrap(), 3);
    let units = [Some(1), Some(2), Some(5)];
    let events: Vec<Event> = (0..).zip(units).map(|(time, units)| Event { units, ..event(time, 1.0) }).collect();
    task.offer(batch(0, &events, 0)).unwrap();
    let applied = advance(&mut task);
    let rows: Vec<Row> = rows(&applied.rows).into_iter().map(|(_, row)| row).collect();
    assert_eq!((&rows[0]["mean"], &rows[0]["twice"], &rows[0]["whole"]), (&Cell::Null, &Cell::Null, &Cell::Null));
    assert_eq!((float(&rows[1], "twice"), int(&rows[1], "whole")), (4.0, 5));
    assert_eq!((float(&rows[2], "twice"), int(&rows[2], "whole")), (7.0, 1));
    assert_eq!(applied.failures.rows, 2, "the filter of the first event, and 10 / 0: {:?}", applied.failures.first);
}

#[test]
fn many_series_and_many_features() {
    let groups = (0..70).map(|at| {
        let filter = format!("units > {at}");
        group(&format!("g{at}"), 0, Some("units"), Some(&filter), &[window(1000, 100), window(0, 0)])
    });
    let engine = Engine::new(&plan(vec![source("purchases", 0)], groups.collect(), Some(0))).unwrap();
    let mut task = Task::new(engine, 3);
    let events: Vec<Event> = (0..100).map(|time| Event { units: Some(time % 71), ..event(time, 1.0) }).collect();
    task.offer(batch(0, &events, 0)).unwrap();
    let row = rows(&advance(&mut task).rows).pop().unwrap().1;
    for at in 0..70 {
        let expected = (0..100).filter(|time| time % 71 > at).count() as i64;
        assert_eq!(
            (int(&row, &format!("g{at}_Count_1000x100")), int(&row, &format!("g{at}_Count_lifetime"))),
            (expected, expected)
        );
    }
}

#[test]
fn texts_outlive_the_collection_of_unused_ones() {
    let group = group("g", 0, Some("kind"), None, &[window(100_000, 1000)]);
    let engine = Engine::new(&plan(vec![source("purchases", 0)], vec![group], Some(0))).unwrap();
    let mut task = Task::new(engine.clone(), 3);
    let first = Event { kind: Some("kept"), ..event(0, 1.0) };
    task.offer(batch(0, &[first], 0)).unwrap();
    for round in 0..30i64 {
        let kinds: Vec<&'static str> =
            (0..400).map(|at| &*Box::leak(format!("{}", round * 400 + at).into_boxed_str())).collect();
        let events: Vec<Event> = (0..)
            .zip(kinds)
            .map(|(at, kind)| Event { key: 1, kind: Some(kind), ..event(round * 400 + at, 1.0) })
            .collect();
        task.offer(batch(0, &events, 1 + round * 400)).unwrap();
        let applied = advance(&mut task);
        let row = rows(&applied.rows).pop().unwrap().1;
        assert_eq!(row["g_Last_100000x1000"], Cell::Text((round * 400 + 399).to_string()));
    }
    let mut restored = Task::restore(engine, 3, &task.snapshot().unwrap()).unwrap();
    for task in [&mut task, &mut restored] {
        task.offer(batch(0, &[Event { kind: None, ..event(12_000, 1.0) }], 12_001)).unwrap();
        assert_eq!(rows(&advance(task).rows)[0].1["g_Last_100000x1000"], Cell::Text("kept".to_owned()));
    }
}

/// One entity, thousands of events that cannot be merged yet, a tenth of them out of order.
#[test]
fn a_hot_entity_with_a_wide_bound_equals_the_oracle() {
    let windows = [window(500, 10), window(3000, 50), window(0, 0)];
    let plan = plan(vec![source("purchases", 1000)], vec![group("g", 0, Some("amount"), None, &windows)], Some(0));
    let engine = Engine::new(&plan).unwrap();
    let events: Vec<Event> = (0..3000i64)
        .map(|at| {
            let back = if at % 10 == 3 { (at * 7919) % 1050 } else { 0 };
            event(at - back, ((at * 31) % 1000) as f64 / 8.0)
        })
        .collect();
    let mut task = Task::new(engine.clone(), 3);
    let mut oracle = Oracle::new(&plan);
    oracle.offer(0, 0, &events);
    let (mut found, mut restored) = (Vec::new(), Vec::new());
    let all = &events;
    for (start, events) in (0..).step_by(500).zip(events.chunks(500)) {
        task.offer(batch(0, events, start)).unwrap();
        found.extend(rows(&advance(&mut task).rows));
        if start == 1000 {
            let mut copy = Task::restore(engine.clone(), 3, &task.snapshot().unwrap()).unwrap();
            copy.offer(batch(0, &all[1500..], 1500)).unwrap();
            restored = rows(&advance(&mut copy).rows);
        }
    }
    let (expected, _) = oracle.advance(&[true]);
    assert_eq!(found.len(), expected.len());
    for ((_, found), expected) in found.iter().zip(&expected) {
        assert_same(found, expected, 1000.0);
    }
    assert!(!restored.is_empty());
    assert_eq!(found[found.len() - restored.len()..], restored);
}

#[rstest]
#[case::of_another_definition("ffff", 3, "definition 0123456789abcdef")]
#[case::of_another_partition("0123456789abcdef", 4, "partition 3")]
fn refuses_checkpoints(#[case] definition: &str, #[case] partition: i32, #[case] expected: &str) {
    let snapshot = task(0, &[window(1000, 100)]).snapshot().unwrap();
    let mut plan =
        plan(vec![source("purchases", 0)], vec![group("g", 0, Some("amount"), None, &[window(1000, 100)])], Some(0));
    plan.definition = definition.to_owned();
    let error = Task::restore(Engine::new(&plan).unwrap(), partition, &snapshot).unwrap_err();
    assert!(error.to_string().contains(expected), "{error}");
    let foreign = RecordBatch::new_empty(Arc::new(Schema::empty()));
    let error = Task::restore(Engine::new(&plan).unwrap(), partition, &[foreign]).unwrap_err();
    assert!(error.to_string().contains("not a checkpoint"), "{error}");
}

#[test]
fn refuses_batches_that_do_not_fit() {
    let mut task = task(0, &[window(1000, 100)]);
    task.offer(batch(0, &[event(0, 1.0), event(1, 1.0)], 5)).unwrap();
    let overlap = task.offer(batch(0, &[event(2, 1.0)], 6)).unwrap_err();
    assert!(overlap.to_string().contains("before 7"), "{overlap}");
    let mut short = batch(0, &[event(2, 1.0)], 7);
    short.event_times.clear();
    assert!(matches!(task.offer(short), Err(WindowError::Batch { .. })));
    let mut renamed = batch(0, &[event(2, 1.0)], 7);
    let columns = (0..6).collect::<Vec<_>>();
    renamed.columns = renamed.columns.project(&columns).unwrap();
    assert!(task.offer(renamed).unwrap_err().to_string().contains("`flag`"));
    let mut unkeyed = batch(0, &[event(2, 1.0)], 7);
    let mut arrays = unkeyed.columns.columns().to_vec();
    arrays[0] = Arc::new(StringArray::from(vec![None::<&str>]));
    unkeyed.columns = RecordBatch::try_new(unkeyed.columns.schema(), arrays).unwrap();
    assert!(task.offer(unkeyed).unwrap_err().to_string().contains("key `name`"));
    assert_eq!(advance(&mut task).counts[0].applied, 2);
}

#[test]
fn refuses_plans_that_cannot_work() {
    let engine = |groups: Vec<GroupPlan>| Engine::new(&plan(vec![source("purchases", 0)], groups, Some(0)));
    let uneven = engine(vec![group("g", 0, None, None, &[window(1000, 30), window(5000, 100)])]).unwrap_err();
    assert!(matches!(uneven, WindowError::Tiles { shorter_tile_ms: 30, longer_tile_ms: 100, .. }), "{uneven}");
    let mut texts = group("g", 0, Some("kind"), None, &[window(1000, 100)]);
    texts.features[0].0 = Function::Sum;
    assert!(engine(vec![texts]).unwrap_err().to_string().contains("sum cannot be taken of `kind`"));
    let syntax = engine(vec![group("g", 0, None, Some("units >"), &[window(1000, 100)])]).unwrap_err();
    assert!(matches!(syntax, WindowError::Group { .. }), "{syntax}");
}

/// A tile with sketches pays only where it stands for hundreds of events, so that only a bound can be told of those.
#[rstest]
#[case::of_few_words(false)]
#[case::with_sketches(true)]
fn predicts_bytes_an_entity(#[case] sketches: bool) {
    let windows = [window(3_600_000, 60_000), window(86_400_000, 900_000)];
    let mut group = group("g", 0, Some("amount"), None, &windows);
    let is_sketch = |function| matches!(function, Function::Distinct | Function::Quantile(_) | Function::Top(_));
    group.features.retain(|(function, ..)| sketches || !is_sketch(*function));
    let plan = plan(vec![source("purchases", 0)], vec![group], Some(0));
    let predicted = crate::window::state_bytes(&plan).unwrap();
    let engine = Engine::new(&plan).unwrap();
    let bytes = |events: Vec<Event>| {
        let mut task = Task::new(engine.clone(), 3);
        task.offer(batch(0, &events, 0)).unwrap();
        advance(&mut task);
        task.memory().state
    };
    assert!(predicted.least <= bytes(vec![event(0, 1.0)]));
    let full: Vec<Event> = (0..20_000).map(|at| event(at * 5000, 1.0)).collect();
    let (most, held) = (predicted.most, bytes(full));
    assert!(held <= 2 * most, "predicted {most}, holds {held}");
    assert!(sketches || most <= 2 * held, "predicted {most}, holds {held}");
}
