//! Tables: when a deletion gives way to a late row.

use rstest::rstest;

use super::*;

const NEVER: Option<f64> = None;

fn fact(key: u8, time: i64, amount: Option<f64>) -> Event {
    Event { key, time, amount, units: None, kind: None }
}

/// A table that waits 100 ms for late rows, and what is asked for as of events.
fn task() -> Task {
    let facts = table("facts", 100, &[("amount", DataType::Float64)]);
    let group = group_of_table(0, &facts);
    Task::new(Engine::new(&plan(vec![facts, source("asks", 1_000)], vec![group], Some(1))).unwrap(), 3)
}

/// Gives a task events of a source, and takes the amounts that are told.
fn give(task: &mut Task, source: usize, events: &[Event]) -> Vec<Cell> {
    let first = task.next()[source].map_or(0, |next| next.0);
    task.offer(batch(source, events, first)).unwrap();
    let applied = task.advance(&TaskClock { caught_up: &[true; 2], idle: &[false; 2] }, usize::MAX).unwrap();
    rows(&applied.rows).into_iter().map(|(_, row)| row["facts_amount"].clone()).collect()
}

/// What is true of key 0 as of an instant.
fn ask(task: &mut Task, time: i64) -> Cell {
    give(task, 1, &[fact(0, time, NEVER)]).remove(0)
}

/// Deleted at 50, then the table's time moves to `newest`, then a row of 40 comes.
#[rstest]
#[case::the_watermark_has_passed_it(151, Cell::float(2.0))]
#[case::the_watermark_is_there(150, Cell::Null)]
#[case::the_watermark_is_behind_it(149, Cell::Null)]
fn a_late_row_counts_where_the_deletion_after_it_is_old(#[case] newest: i64, #[case] expected: Cell) {
    let mut task = task();
    give(&mut task, 0, &[fact(0, 10, Some(1.0)), fact(0, 50, NEVER), fact(2, newest, Some(9.0))]);
    assert_eq!(ask(&mut task, 600), Cell::Null, "it is deleted");
    give(&mut task, 0, &[fact(0, 40, Some(2.0))]);
    assert_eq!(ask(&mut task, 600), expected);
}

/// Whether the deletion was still in memory, or forgotten because nobody could ask for what was before it, is all the same.
#[test]
fn a_deletion_that_was_forgotten_and_one_that_was_not_tell_the_same() {
    for sweeps in [0, 200] {
        let mut task = task();
        give(&mut task, 0, &[fact(0, 10, Some(1.0)), fact(0, 50, NEVER), fact(2, 5_000, Some(9.0))]);
        // Asking moves the time up to which rows are kept apart, and each call looks after all entities.
        for n in 0..sweeps {
            give(&mut task, 1, &[fact(4, 10_000 + n, NEVER)]);
        }
        give(&mut task, 0, &[fact(0, 40, Some(2.0))]);
        assert_eq!(ask(&mut task, 20_000), Cell::float(2.0), "{sweeps} sweeps");
    }
}

#[test]
fn only_the_deletion_right_after_a_late_row_gives_way() {
    let mut task = task();
    let facts = [fact(0, 10, Some(1.0)), fact(0, 30, NEVER), fact(0, 50, NEVER), fact(0, 60, Some(3.0))];
    give(&mut task, 0, &facts);
    give(&mut task, 0, &[fact(2, 500, Some(9.0)), fact(0, 20, Some(2.0))]);
    let told: Vec<Cell> = [25, 35, 55, 70].map(|time| ask(&mut task, time)).to_vec();
    assert_eq!(told, [Cell::float(2.0), Cell::float(2.0), Cell::Null, Cell::float(3.0)]);
}
