//! Lists of the newest values: `last_n`.

use proptest::prelude::*;

use super::oracle::{Oracle, assert_same};
use super::properties::events;
use super::*;
use crate::config::plan::{Element, LONGEST_LIST};
use crate::window::state_bytes;

fn lists(of: &str, most: &[u16], windows: &[WindowPlan]) -> GroupPlan {
    let data_type = field(of).data_type;
    let features = windows.iter().enumerate().flat_map(|(index, window)| {
        most.iter().map(move |&most| {
            let function = Function::LastN(most);
            let data_type = function.output_type(Some(data_type)).expect("any column has one");
            (function, index, column(&format!("g_{function}_{}", window.label), data_type))
        })
    });
    GroupPlan { features: features.collect(), ..group("g", 0, Some(of), None, windows) }
}

fn floats(values: &[f64]) -> Cell {
    Cell::List(values.iter().copied().map(Cell::float).collect())
}

#[test]
fn are_the_newest_values_with_the_oldest_of_them_first() {
    let group = lists("amount", &[1, 3], &[window(100, 10), window(0, 0)]);
    let mut log: Vec<Event> = [(0, 1.0), (10, 2.0), (10, 3.0), (95, 4.0), (300, 5.0)].map(|(t, v)| event(t, v)).into();
    log.insert(3, Event { amount: None, ..event(20, 0.0) });
    log.insert(4, event(5, 9.0));
    let (rows, _) = run_one(group, 50, &log);
    let of = |name: &str| rows.iter().map(|row| row[name].clone()).collect::<Vec<_>>();
    let three = [&[1.0][..], &[1.0, 2.0], &[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0], &[1.0, 9.0], &[2.0, 3.0, 4.0], &[5.0]];
    assert_eq!(of("g_last_3_100x10"), three.map(floats));
    assert_eq!(of("g_last_1_100x10"), [1.0, 2.0, 3.0, 3.0, 9.0, 4.0, 5.0].map(|value| floats(&[value])));
    assert_eq!(of("g_last_3_lifetime")[6], floats(&[3.0, 4.0, 5.0]));
}

/// Before the first event there is a list without values, as the count is 0 then.
#[test]
fn are_empty_without_events() {
    let group = lists("kind", &[2], &[window(10, 1)]);
    let log = [Event { kind: None, ..event(0, 1.0) }, event(1, 1.0), event(500, 1.0)];
    let (rows, _) = run_one(group, 0, &log[..1]);
    assert_eq!(rows[0]["g_last_2_10x1"], Cell::List(vec![]));
    let group = lists("kind", &[2], &[window(10, 1)]);
    let with_null = [log[1].clone(), Event { kind: None, ..log[2].clone() }];
    let (rows, _) = run_one(group, 0, &with_null);
    assert_eq!(rows[1]["g_last_2_10x1"], Cell::List(vec![]));
}

#[test]
fn are_columns_of_arrow_lists() {
    let engine = Engine::new(&plan(vec![source("s", 0)], vec![lists("due", &[2], &[window(0, 0)])], Some(0))).unwrap();
    let field = engine.schema().field_with_name("g_last_2_lifetime").unwrap();
    assert_eq!(*field.data_type(), DataType::List(Element::Timestamp).to_arrow());
    let ArrowType::List(item) = field.data_type() else { panic!("{field}") };
    assert!(matches!(item.data_type(), ArrowType::Timestamp(..)) && !item.is_nullable());
}

/// Sixteen bytes a value in each tile and window, as `check` tells.
#[test]
fn take_memory_by_their_length() {
    let bytes = |most: u16| {
        let groups = vec![lists("units", &[most], &[window(100_000, 1000)])];
        state_bytes(&plan(vec![source("s", 0)], groups, Some(0))).unwrap().most
    };
    let tiles = 100;
    assert!(bytes(LONGEST_LIST) - bytes(100) >= 16 * 156 * tiles, "{} {}", bytes(LONGEST_LIST), bytes(100));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Of so many events that most are merged, the longest lists, too.
    #[test]
    fn equal_the_oracle_over_many_events(
        log in events(1500, 300),
        of in prop::sample::select(vec!["amount", "units", "kind", "flag"]),
        most in prop::sample::subsequence(vec![1u16, 4, 40, LONGEST_LIST], 1..4),
        windows in prop::sample::subsequence(vec![(400, 20), (700, 1), (5000, 100), (30_000, 500), (0, 0)], 1..4),
        poll in 1usize..400,
        restarts in any::<u64>(),
    ) {
        let windows: Vec<_> = windows.into_iter().map(|(length, tile)| window(length, tile)).collect();
        let plan = plan(vec![source("s", 300)], vec![lists(of, &most, &windows)], Some(0));
        let engine = Engine::new(&plan).unwrap();
        let mut task = Task::new(engine.clone(), 3);
        let mut oracle = Oracle::new(&plan);
        for (number, events) in log.chunks(poll).enumerate() {
            if restarts >> (number % 64) & 1 == 1 {
                task = Task::restore(engine.clone(), 3, &task.snapshot().unwrap()).unwrap();
            }
            let first = (number * poll) as i64;
            task.offer(batch(0, events, first)).unwrap();
            oracle.offer(0, first, events);
            let applied = task.advance(&TaskClock { caught_up: &[true], idle: &[false] }, usize::MAX).unwrap();
            let (expected, _) = oracle.advance(&[true]);
            let found = rows(&applied.rows);
            prop_assert_eq!(found.len(), expected.len());
            // Comparing each row with an oracle that reads all events takes long: every seventh will do.
            for ((_, found), expected) in found.iter().zip(&expected).step_by(7) {
                assert_same(found, expected, 1000.0);
            }
        }
    }
}
