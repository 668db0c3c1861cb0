//! Exact windows of entities with so many events that they are kept in chunks.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use rstest::rstest;

use super::super::{ColdStore, WindowError};
use super::checkpoints::{InMemory, Kept, restored};
use super::edges::{advance, int, task};
use super::oracle::{Oracle, assert_same};
use super::*;
use crate::broker::NextOffset;
use crate::config::plan::Function;

/// Whether an event at `time` is in the window of 1 s as of `as_of`; alone, and among many others of that instant.
#[rstest]
#[case::at_the_cut(0, 1000, false)]
#[case::just_after_the_cut(1, 1000, true)]
#[case::the_tail_moves_by_milliseconds(99, 1099, false)]
#[case::just_after_it_has_moved(100, 1099, true)]
#[case::at_the_cut_before_1970(-1001, -1, false)]
#[case::just_after_the_cut_across_1970(-999, 0, true)]
fn covers_to_the_millisecond(
    #[case] time: i64,
    #[case] as_of: i64,
    #[case] inside: bool,
    #[values(1, 40, 700)] copies: i64,
) {
    let mut events = vec![event(time, 1.0); copies as usize];
    events.push(event(as_of, 1.0));
    let (rows, online) = run_one(group("g", 0, Some("amount"), None, &[window(1000, 1)]), 0, &events);
    let expected = if inside { copies + 1 } else { 1 };
    assert_eq!(int(rows.last().unwrap(), "g_Count_1000x1"), expected);
    assert_eq!(int(&online[0], "g_Count_1000x1"), expected);
}

/// Events of one customer: dense stretches and gaps, some out of order, several of the same instant.
fn burst(most: usize, out_of_order: i64) -> impl Strategy<Value = Vec<Event>> {
    let step = prop_oneof![12 => 0i64..4, 1 => 0i64..400];
    let back = prop_oneof![6 => Just(0), 1 => 0..=out_of_order];
    let units = prop_oneof![8 => (0i64..1000).prop_map(Some), 1 => Just(None)];
    prop::collection::vec((step, back, units), most / 2..most).prop_map(|steps| {
        let mut now = 0;
        let events = steps.into_iter().map(|(step, back, units)| {
            now += step;
            let amount = units.map(|units| units as f64 / 8.0);
            Event { key: 0, time: now - back, amount, units, kind: units.map(|units| ["a", "b"][units as usize % 2]) }
        });
        events.collect()
    })
}

/// A pipeline of two sources with exact windows, with tiles and without, and their logs.
fn scenario() -> impl Strategy<Value = (Plan, Vec<Vec<Event>>)> {
    let bound = prop_oneof![Just(0u64), Just(50), Just(1500)];
    let mix = prop::sample::select(vec![
        vec![(300, 1)],
        vec![(40, 1), (1300, 1)],
        vec![(300, 1), (1000, 20), (0, 0)],
        vec![(60, 5), (600, 1), (2000, 20)],
        vec![(100, 20), (150, 1), (600, 1), (5000, 100), (0, 0)],
    ]);
    let column = prop::sample::select(vec![None, Some("amount"), Some("units"), Some("kind")]);
    let one = || (bound.clone(), mix.clone(), column.clone(), any::<bool>());
    (one(), one(), 0usize..3).prop_flat_map(|(first, second, on)| {
        let logs = (burst(900, first.0 as i64), burst(250, second.0 as i64));
        (Just((first, second, on)), logs).prop_map(|((first, second, on), logs)| {
            let mut sources = Vec::new();
            let mut groups = Vec::new();
            for (at, (bound, mix, column, filter)) in [first, second].into_iter().enumerate() {
                sources.push(source(&format!("s{at}"), bound));
                let windows: Vec<_> = mix.into_iter().map(|(length, tile)| window(length, tile)).collect();
                groups.push(group(&format!("g{at}"), at, column, filter.then_some("units > 2"), &windows));
            }
            (plan(sources, groups, (on < 2).then_some(on)), vec![logs.0, logs.1])
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_the_oracle(
        (plan, logs) in scenario(),
        poll in 1usize..400,
        restarts in any::<u64>(),
        limit in prop::option::weighted(0.8, prop::sample::select(vec![0usize, 40_000, 100_000, 200_000])),
    ) {
        let engine = Engine::new(&plan).unwrap();
        let mut task = Task::new(engine.clone(), 3);
        // Within little memory, so that chunks go to disk and come back.
        let mut twin = restored(&engine, limit, &[]);
        let mut kept = Kept::default();
        let mut oracle = Oracle::new(&plan);
        let mut offered = [0, 0];
        for round in 0.. {
            let caught_up = [round % 3 == 0, round % 2 == 0];
            for (source, log) in logs.iter().enumerate() {
                let events = &log[offered[source]..log.len().min(offered[source] + poll)];
                for task in [&mut task, &mut twin] {
                    task.offer(batch(source, events, offered[source] as i64)).unwrap();
                }
                oracle.offer(source, offered[source] as i64, events);
                offered[source] += events.len();
            }
            let done = offered == [logs[0].len(), logs[1].len()];
            let caught_up = if done { [true; 2] } else { caught_up };
            let clock = TaskClock { caught_up: &caught_up, idle: &[false; 2] };
            let (applied, same) = (task.advance(&clock, usize::MAX).unwrap(), twin.advance(&clock, usize::MAX).unwrap());
            let (found, found_online) = (rows(&applied.rows), rows(&applied.online));
            prop_assert_eq!(&found, &rows(&same.rows), "restarts and little memory change nothing, to the bit");
            prop_assert_eq!(&found_online, &rows(&same.online));
            let (expected, expected_online) = oracle.advance(&caught_up);
            prop_assert_eq!(found.len(), expected.len());
            for ((_, found), expected) in found.iter().zip(&expected) {
                assert_same(found, expected, 1000.0);
            }
            prop_assert_eq!(found_online.len(), expected_online.len());
            for ((_, found), expected) in found_online.iter().zip(expected_online.values()) {
                assert_same(found, expected, 1000.0);
            }
            if done {
                break;
            }
            if restarts >> (round % 64) & 1 == 1 {
                let next = twin.next();
                match restarts >> (round * 7 % 64) & 1 {
                    0 => kept.take(&mut twin),
                    _ => kept.batches = twin.snapshot().unwrap(),
                }
                twin = restored(&engine, limit, &kept.batches);
                for (source, log) in logs.iter().enumerate() {
                    let start = next[source].map_or(0, |NextOffset(next)| next as usize);
                    twin.offer(batch(source, &log[start..offered[source]], start as i64)).unwrap();
                }
            }
        }
    }
}

#[test]
fn texts_in_stacks_outlive_the_collection_of_unused_ones() {
    let group = group("g", 0, Some("kind"), None, &[window(6000, 1)]);
    let engine = Engine::new(&plan(vec![source("purchases", 0)], vec![group], Some(0))).unwrap();
    let mut task = Task::new(engine, 3);
    for round in 0..30i64 {
        let event = |at: i64| {
            let kind: &'static str = Box::leak(format!("{at}").into_boxed_str());
            Event { kind: Some(kind), ..event(at, 1.0) }
        };
        let events: Vec<Event> = (round * 400..(round + 1) * 400).map(event).collect();
        task.offer(batch(0, &events, round * 400)).unwrap();
        advance(&mut task);
    }
    // Events without a text drive the window's beginning through the stack, down to the last event that has one.
    let quiet: Vec<Event> = (0..6000).map(|at| Event { kind: None, ..event(12_000 + at, 1.0) }).collect();
    task.offer(batch(0, &quiet, 12_000)).unwrap();
    for (at, (_, row)) in (0..).zip(rows(&advance(&mut task).rows)) {
        let expected = if at < 5999 { Cell::Text("11999".to_owned()) } else { Cell::Null };
        assert_eq!((int(&row, "g_Count_6000x1"), &row["g_Last_6000x1"]), ((5999 - at).max(0), &expected), "{at}");
    }
}

#[test]
fn predicts_bytes_of_single_events_and_forgets_what_no_window_covers() {
    let windows = [window(3_600_000, 1), window(60_000, 1), window(30 * 86_400_000, 43_200_000)];
    let plan = plan(vec![source("purchases", 0)], vec![group("g", 0, Some("amount"), None, &windows)], Some(0));
    let predicted = crate::window::state_bytes(&plan).unwrap();
    let single = predicted.single[0];
    assert_eq!((single.source, single.length_ms), (0, 3_600_000));
    let mut task = task(0, &windows);
    let mut held = Vec::new();
    for poll in 0..120 {
        let events: Vec<Event> = (0..3600).map(|at| event(poll * 360_000 + at * 100, 1.0)).collect();
        task.offer(batch(0, &events, poll * 3600)).unwrap();
        let row = rows(&advance(&mut task).rows).pop().unwrap().1;
        assert_eq!(int(&row, "g_Count_3600000x1"), 3600 * (poll + 1).min(10));
        held.push(task.memory().state);
    }
    let expected = predicted.most + 36_000 * single.bytes;
    assert!(held.iter().all(|&held| held <= 3 * expected / 2), "predicted {expected}, holds {held:?}");
    assert!(2 * held[119] >= expected, "predicted {expected}, holds {held:?}");
    assert!(held[119] <= held[40] + held[40] / 4, "it grows: {held:?}");
}

/// Of so many events of one entity in an exact window of an hour, within a limit far below their size.
#[test]
fn an_entity_larger_than_memory_has_its_edges_there() {
    let functions = [Function::Count, Function::Sum, Function::First, Function::Last];
    let mut group = group("g", 0, Some("amount"), None, &[window(3_600_000, 1), window(7_200_000, 60_000)]);
    group.features.retain(|(function, ..)| functions.contains(function));
    let engine = Engine::new(&plan(vec![source("purchases", 500)], vec![group], Some(0))).unwrap();
    let limit = 400 << 10;
    let store = InMemory::default();
    let written = store.written.clone();
    let mut tight =
        Task::restore_within::<WindowError>(engine.clone(), 3, std::iter::empty(), Some((Box::new(store), limit)))
            .unwrap();
    let mut free = Task::new(engine, 3);
    let (polls, each) = (60, 2000);
    let (mut most, mut on_disk) = (0, Vec::new());
    for poll in 0..polls {
        // 20 a second, some out of order.
        let one = |at: i64| event(poll * 100_000 + at * 50 - at % 7 * 60, (at % 10) as f64);
        let events: Vec<Event> = (0..each).map(one).collect();
        for task in [&mut tight, &mut free] {
            task.offer(batch(0, &events, poll * each)).unwrap();
        }
        assert_eq!(rows(&advance(&mut tight).rows), rows(&advance(&mut free).rows), "poll {poll}");
        assert!(tight.memory().state <= limit, "poll {poll}: {:?}", tight.memory());
        most = most.max(free.memory().state);
        on_disk.push(tight.memory().on_disk);
    }
    assert!(most > 4 * limit, "it would hold {most} bytes");
    let raw = (polls * each) as u64 * 8 * 3;
    let written = written.load(Ordering::Relaxed);
    assert!(written < raw + raw / 4, "{written} bytes written of {raw} that came: events go out once");
    let (hour, last) = (on_disk[36], on_disk[59]);
    assert!(last < hour + hour / 4, "what expires is given back: {on_disk:?}");
}

#[test]
fn events_that_cannot_be_read_back_are_an_error() {
    let mut group = group("g", 0, Some("amount"), None, &[window(2000, 1), window(8000, 100)]);
    group.features.retain(|(function, ..)| *function == Function::Sum);
    let engine = Engine::new(&plan(vec![source("purchases", 0)], vec![group], Some(0))).unwrap();
    let store = InMemory::default();
    let broken = store.broken.clone();
    // Enough for what stays of the entity, so that it is not on disk as a whole.
    let cold = Some((Box::new(store) as Box<dyn ColdStore>, 40_000));
    let mut task = Task::restore_within::<WindowError>(engine, 3, std::iter::empty(), cold).unwrap();
    for poll in 0..20 {
        let events: Vec<Event> = (0..500).map(|at| event(poll * 500 + at, 1.0)).collect();
        broken.store(poll == 19, Ordering::Relaxed);
        task.offer(batch(0, &events, poll * 500)).unwrap();
        let applied = task.advance(&TaskClock { caught_up: &[true], idle: &[false] }, usize::MAX);
        match applied {
            Ok(_) => assert!(poll < 19),
            Err(error) => assert!(poll == 19 && error.to_string().contains("the disk is gone"), "{poll}: {error}"),
        }
    }
}
