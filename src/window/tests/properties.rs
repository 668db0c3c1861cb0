//! Random streams against the oracle, and against the engine itself, cut otherwise.

use std::sync::Arc;

use proptest::prelude::*;

use super::oracle::{Oracle, assert_same};
use super::*;
use crate::broker::NextOffset;

/// Tiles divide each other; lengths need not be multiples of them. Those with tiles of a millisecond are exact.
const WINDOWS: [(i64, i64); 11] = [
    (10, 1),
    (60, 5),
    (333, 10),
    (400, 20),
    (700, 1),
    (1000, 20),
    (4000, 1),
    (5000, 100),
    (30_000, 1),
    (30_000, 500),
    (0, 0),
];

const KINDS: [Option<&str>; 5] = [None, Some("a"), Some("b"), Some(""), Some("it's")];

/// Columns of categories, one category that never comes, one that needs quotes.
const CATEGORIES: [(&str, &[&str]); 3] =
    [("kind", &["a", "it's", "b"]), ("units", &["0", "3", "-7"]), ("flag", &["true", "false"])];

const COLUMNS: [Option<&str>; 6] = [None, Some("amount"), Some("units"), Some("kind"), Some("due"), Some("flag")];

pub(super) fn events(most: usize, out_of_order: i64) -> impl Strategy<Value = Vec<Event>> {
    let step = prop_oneof![6 => 0i64..20, 2 => Just(0), 1 => 0i64..2000];
    let back = prop_oneof![3 => Just(0), 2 => 0..=out_of_order, 1 => 0..=2 * out_of_order + 5];
    let amount = prop_oneof![8 => (0i64..100_000).prop_map(|cents| Some(cents as f64 / 100.0)), 1 => Just(None), 1 => Just(Some(f64::NAN))];
    let units = prop_oneof![5 => (0i64..6).prop_map(Some), 1 => Just(None)];
    let key = prop_oneof![2 => Just(0u8), 2 => 0u8..5];
    let one = (step, back, key, amount, units, 0..KINDS.len());
    prop::collection::vec(one, 0..most).prop_map(|steps| {
        let mut now = 0;
        let mut events = Vec::new();
        for (step, back, key, amount, units, kind) in steps {
            now += step;
            events.push(Event { key, time: now - back, amount, units, kind: KINDS[kind] });
        }
        events
    })
}

#[derive(Debug, Clone)]
pub(super) struct Scenario {
    pub plan: Plan,
    pub logs: Vec<Vec<Event>>,
}

pub(super) fn scenario(most: usize) -> impl Strategy<Value = Scenario> {
    let bounds = prop::collection::vec(prop_oneof![Just(0u64), 1u64..200, Just(3000)], 1..4);
    (bounds, any::<bool>()).prop_flat_map(move |(bounds, with_table)| {
        let sources = bounds.len();
        let tables = usize::from(with_table && sources > 1);
        let logs: Vec<_> = bounds.iter().map(|&bound| events(most, bound as i64)).collect();
        let windows = prop::sample::subsequence(WINDOWS.to_vec(), 1..5);
        let by = prop::option::weighted(0.3, prop::sample::select(CATEGORIES.to_vec()));
        let half_life = prop::option::weighted(0.2, prop_oneof![Just(1i64), Just(50), Just(100_000)]);
        // Lists alone take few words, so that few events are merged already.
        let lists = prop::bool::weighted(0.2);
        let one =
            (tables..sources, prop::sample::select(COLUMNS.to_vec()), any::<bool>(), windows, by, half_life, lists);
        let groups = prop::collection::vec(one, 1..4);
        let start = prop_oneof![Just(-4321i64), Just(0), Just(1_700_000_000_000)];
        let facts = prop::sample::subsequence(FIELDS[2..].to_vec(), 1..=5);
        (Just(bounds), logs, groups, start, prop::option::weighted(0.8, tables..sources), facts).prop_map(
            move |(bounds, mut logs, groups, start, on, facts)| {
                logs.iter_mut().flatten().for_each(|event| event.time += start);
                logs[..tables].iter_mut().flatten().for_each(delete_some);
                let sources = bounds.iter().enumerate().map(|(at, &bound)| match at < tables {
                    true => table(&format!("t{at}"), bound, &facts),
                    false => source(&format!("s{at}"), bound),
                });
                let sources: Vec<_> = sources.collect();
                let of_tables = (0..tables).map(|at| group_of_table(at, &sources[at]));
                let of_tables: Vec<_> = of_tables.collect();
                let groups = groups.into_iter().enumerate().map(
                    |(at, (source, of, filter, windows, categories, half_life, lists))| {
                        let windows: Vec<_> = windows.into_iter().map(|(length, tile)| window(length, tile)).collect();
                        let group = group(&format!("g{at}"), source, of, filter.then_some("units > 2"), &windows);
                        let group = match half_life {
                            Some(half_life) => decayed(group, half_life),
                            None if lists && of.is_some() => only_lists(group, 6),
                            None => group,
                        };
                        match categories {
                            Some((column, categories)) => super::by(group, column, categories),
                            None => group,
                        }
                    },
                );
                let groups = of_tables.into_iter().chain(groups).collect();
                Scenario { plan: plan(sources, groups, on), logs }
            },
        )
    })
}

/// Makes some rows of a table end what was true.
fn delete_some(event: &mut Event) {
    if event.units == Some(0) {
        (event.amount, event.units, event.kind) = (None, None, None);
    }
}

/// One step of a run: offer this many events of this source, then advance with these sources caught up.
#[derive(Debug, Clone)]
pub(super) struct Step {
    pub source: usize,
    pub events: usize,
    pub caught_up: [bool; 3],
    pub limit: usize,
    pub restart: bool,
}

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let limit = prop_oneof![Just(usize::MAX), 1usize..20];
    let step = (0usize..3, 0usize..30, any::<[bool; 3]>(), limit, prop::bool::weighted(0.2));
    prop::collection::vec(
        step.prop_map(|(source, events, caught_up, limit, restart)| Step { source, events, caught_up, limit, restart }),
        0..40,
    )
}

/// A task, and what it was given so far.
struct Run<'a> {
    scenario: &'a Scenario,
    engine: Arc<Engine>,
    task: Task,
    offered: Vec<usize>,
    rows: Vec<(i64, Row)>,
    online: BTreeMap<String, (i64, Row)>,
    late: Vec<(usize, i64)>,
    counts: u64,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        let engine = Engine::new(&scenario.plan).unwrap();
        let offered = vec![0; scenario.logs.len()];
        let task = Task::new(engine.clone(), 3);
        Self { scenario, engine, task, offered, rows: Vec::new(), online: BTreeMap::new(), late: Vec::new(), counts: 0 }
    }

    fn offer(&mut self, source: usize, events: usize) -> std::ops::Range<usize> {
        let log = &self.scenario.logs[source];
        let start = self.offered[source];
        let end = log.len().min(start.saturating_add(events));
        self.task.offer(batch(source, &log[start..end], start as i64)).unwrap();
        self.offered[source] = end;
        start..end
    }

    fn advance(&mut self, caught_up: &[bool], limit: usize) -> super::super::Applied {
        let idle = vec![false; caught_up.len()];
        let applied = self.task.advance(&TaskClock { caught_up, idle: &idle }, limit).unwrap();
        self.rows.extend(rows(&applied.rows));
        for (sequence, row) in rows(&applied.online) {
            self.online.insert(format!("{:?} {:?}", row["name"], row["number"]), (sequence, row));
        }
        self.late.extend(applied.late.iter().map(|late| (late.source, late.offset)));
        for counts in &applied.counts {
            assert_eq!(counts.read, counts.applied + counts.filtered + counts.late + counts.dead);
            self.counts += counts.read;
        }
        assert_eq!(applied.failures.rows, 0);
        applied
    }

    /// As after a crash: the state is restored, and what was not applied is read again.
    fn restart(&mut self) {
        let snapshot = self.task.snapshot().unwrap();
        self.task = Task::restore(self.engine.clone(), 3, &snapshot).unwrap();
        for (offered, next) in self.offered.iter_mut().zip(self.task.next()) {
            *offered = next.map_or(0, |NextOffset(next)| next as usize);
        }
    }

    fn finish(&mut self) {
        for source in 0..self.scenario.logs.len() {
            self.offer(source, usize::MAX);
        }
        while self.advance(&vec![true; self.scenario.logs.len()], usize::MAX).more {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_the_oracle_whatever_arrives_when(scenario in scenario(120), steps in steps()) {
        let mut run = Run::new(&scenario);
        let mut oracle = Oracle::new(&scenario.plan);
        let sources = scenario.logs.len();
        let everything = Step { source: 0, events: 0, caught_up: [true; 3], limit: usize::MAX, restart: false };
        let rest = (0..sources).map(|source| Step { source, events: usize::MAX, ..everything.clone() });
        for step in steps.into_iter().filter(|step| step.source < sources).chain(rest) {
            let offered = run.offer(step.source, step.events);
            oracle.offer(step.source, offered.start as i64, &scenario.logs[step.source][offered]);
            let before = run.rows.len();
            run.online.clear();
            while run.advance(&step.caught_up[..sources], usize::MAX).more {}
            let (expected, expected_online) = oracle.advance(&step.caught_up[..sources]);
            prop_assert_eq!(run.rows.len() - before, expected.len());
            for ((_, found), expected) in run.rows[before..].iter().zip(&expected) {
                assert_same(found, expected, 1000.0);
            }
            prop_assert_eq!(run.online.len(), expected_online.len());
            for expected in expected_online.values() {
                let key = format!("{:?} {:?}", expected["name"], expected["number"]);
                assert_same(&run.online[&key].1, expected, 1000.0);
            }
            prop_assert_eq!(&run.late, &oracle.late);
        }
        prop_assert_eq!(run.counts as usize, scenario.logs.iter().map(Vec::len).sum::<usize>());
        prop_assert!(run.rows.windows(2).all(|pair| pair[0].0 < pair[1].0), "sequences rise");
    }

    #[test]
    fn does_not_depend_on_batches_and_restarts(scenario in scenario(250), steps in steps()) {
        let mut whole = Run::new(&scenario);
        whole.finish();
        let mut cut = Run::new(&scenario);
        for step in steps.iter().filter(|step| step.source < scenario.logs.len()) {
            if step.restart {
                cut.restart();
            }
            cut.offer(step.source, step.events);
            cut.advance(&vec![false; scenario.logs.len()], step.limit);
        }
        cut.restart();
        cut.finish();
        prop_assert_eq!(&whole.rows, &cut.rows);
        prop_assert_eq!(&whole.online, &cut.online);
        prop_assert_eq!(&whole.late, &cut.late);
        prop_assert_eq!(whole.counts, cut.counts);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Arrival within the bounds, in whatever order, leaves the same newest rows.
    #[test]
    fn shuffling_within_the_bounds_changes_no_final_row(scenario in scenario(150), jitter in prop::collection::vec(0u64..1000, 150)) {
        let mut sorted = scenario;
        let mut shuffled = sorted.clone();
        for (source, log) in sorted.logs.iter_mut().enumerate() {
            let bound = sorted.plan.sources[source].out_of_order.as_millis() as u64;
            log.sort_by_key(|event| event.time);
            // Events of the same time keep their order, since it decides which is the last.
            let mut arrival: Vec<(i64, usize)> = Vec::new();
            for (at, event) in log.iter().enumerate() {
                let tied = at > 0 && log[at - 1].time == event.time;
                let delay = if tied { arrival[at - 1].0 - event.time } else { (jitter[at] * bound / 1000) as i64 };
                arrival.push((event.time + delay, at));
            }
            arrival.sort();
            shuffled.logs[source] = arrival.into_iter().map(|(_, at)| log[at].clone()).collect();
        }
        let finals = |scenario: &Scenario| {
            let mut run = Run::new(scenario);
            run.finish();
            assert!(run.late.is_empty());
            let features = |row: Row| row.into_iter().filter(|(name, _)| !name.starts_with("source")).collect::<Row>();
            run.online.into_iter().map(|(key, (_, row))| (key, features(row))).collect::<BTreeMap<_, _>>()
        };
        prop_assert_eq!(finals(&sorted), finals(&shuffled));
    }
}
