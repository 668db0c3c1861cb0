//! The rows of all entities as they are now.

use proptest::prelude::*;

use super::*;

const HOUR: i64 = 3_600_000;

fn events() -> impl Strategy<Value = Vec<Event>> {
    let one = (0..6_u8, 0..20 * HOUR, 0..50_i64).prop_map(|(key, time, units)| Event {
        key,
        units: Some(units),
        ..event(time, units as f64 / 4.0)
    });
    proptest::collection::vec(one, 1..60)
}

/// Rows without what says of which event they are.
fn values(rows: &FeatureRows, into: &mut BTreeMap<String, Row>) {
    for (_, mut row) in super::rows(rows) {
        for origin in ["source", "source_topic", "source_offset"] {
            row.remove(origin);
        }
        into.insert(format!("{:?} {:?}", row["name"], row["number"]), row);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// While no window has lost anything, each entity's row is the last one that it had.
    #[test]
    fn they_are_the_last_online_rows(events in events(), out_of_order in 0..20 * HOUR, limit in 1..9_usize, restored: bool) {
        let windows = [window(24 * HOUR, HOUR), window(0, 0)];
        let groups = vec![group("g", 0, Some("units"), None, &windows)];
        let sources = vec![source("purchases", out_of_order as u64), source("visits", 0)];
        let engine = Engine::new(&plan(sources, groups, Some(0))).unwrap();
        let mut task = Task::new(Arc::clone(&engine), 3);
        let mut last = BTreeMap::new();
        for (offset, event) in events.iter().enumerate() {
            task.offer(batch(0, std::slice::from_ref(event), offset as i64)).unwrap();
            let applied = task.advance(&TaskClock { caught_up: &[true, true], idle: &[false, true] }, usize::MAX).unwrap();
            values(&applied.online, &mut last);
        }
        let sequence = task.applied.iter().sum::<i64>();
        if restored {
            task = Task::restore(engine, 3, &task.snapshot().unwrap()).unwrap();
        }
        let (mut current, mut from, mut calls) = (BTreeMap::new(), Some(0), 0);
        while let Some(first) = from {
            let (rows, next) = task.current_rows(first, limit).unwrap();
            prop_assert!(rows.sequence.iter().all(|found| *found == sequence));
            prop_assert!(rows.batch.num_rows() <= limit);
            values(&rows, &mut current);
            (from, calls) = (next, calls + 1);
        }
        prop_assert_eq!(calls, last.len().div_ceil(limit).max(1));
        // Seconds since the last event, and what is divided by them, go on with the watermark.
        for rows in [&mut current, &mut last] {
            for row in rows.values_mut() {
                row.retain(|name, _| !["SecondsSinceLast", "Rate", "Slope"].iter().any(|moving| name.contains(moving)));
            }
        }
        prop_assert_eq!(current, last);
    }
}
