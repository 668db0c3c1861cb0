//! Checkpoints of changes, taken in slices, against whole snapshots of the same instants.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::TimestampMillisecondType;
use arrow::util::display::array_value_to_string;
use proptest::prelude::*;
use rstest::rstest;

use super::super::{Applied, ColdStore, Extent, WindowError};
use super::emitted::{hopping, plan_of, rows_of, session, tables, windows};
use super::properties::{Scenario, scenario};
use super::*;
use crate::broker::NextOffset;
use crate::config::plan::Span;

/// The batches of the checkpoints that a restore reads.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub batches: Vec<RecordBatch>,
}

impl Kept {
    /// Takes a checkpoint at once.
    pub fn take(&mut self, task: &mut Task) {
        let extent = task.begin_checkpoint().unwrap();
        let mut batches = Vec::new();
        loop {
            let slice = task.checkpoint_slice(2).unwrap();
            batches.extend(slice.batches);
            if slice.last {
                break;
            }
        }
        self.add(extent, batches);
    }

    fn add(&mut self, extent: Extent, batches: Vec<RecordBatch>) {
        if extent == Extent::Whole {
            self.batches.clear();
        }
        self.batches.extend(batches);
    }
}

/// A cold store in memory, for tests.
#[derive(Debug, Default)]
pub(super) struct InMemory {
    states: HashMap<u64, Vec<u8>>,
    /// Bytes that were ever put.
    pub written: Arc<AtomicU64>,
    /// Nothing can be read any more.
    pub broken: Arc<AtomicBool>,
}

impl ColdStore for InMemory {
    fn put(&mut self, states: &[(u64, Vec<u8>)]) -> Result<(), String> {
        let bytes: usize = states.iter().map(|(_, state)| state.len()).sum();
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
        self.states.extend(states.iter().cloned());
        Ok(())
    }

    fn get(&self, number: u64) -> Result<Vec<u8>, String> {
        if self.broken.load(Ordering::Relaxed) {
            return Err("the disk is gone".to_owned());
        }
        self.states.get(&number).cloned().ok_or_else(|| format!("there is no state {number}"))
    }

    fn remove(&mut self, numbers: &[u64]) -> Result<(), String> {
        self.states.retain(|number, _| !numbers.contains(number));
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        self.states.values().map(|bytes| bytes.len() as u64).sum()
    }

    fn memory_bytes(&self) -> usize {
        0
    }
}

/// All rows of a snapshot in words, sorted, and what its metadata say.
fn in_words(snapshot: &[RecordBatch]) -> (Vec<String>, BTreeMap<String, String>) {
    let row = |batch: &RecordBatch, row: usize| {
        let cells = batch.columns().iter().map(|column| array_value_to_string(column, row).unwrap());
        cells.collect::<Vec<_>>().join(" | ")
    };
    let mut rows: Vec<String> =
        snapshot.iter().flat_map(|batch| (0..batch.num_rows()).map(move |at| row(batch, at))).collect();
    rows.sort();
    (rows, snapshot[0].schema().metadata().clone().into_iter().collect())
}

#[derive(Debug, Clone)]
enum Happening {
    Poll { source: usize, events: usize, limit: usize },
    Begin,
    Slice(usize),
    Crash,
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let limit = prop_oneof![Just(usize::MAX), 1usize..20];
    let poll =
        (0usize..3, 0usize..15, limit).prop_map(|(source, events, limit)| Happening::Poll { source, events, limit });
    let slice = (0usize..4).prop_map(Happening::Slice);
    prop::collection::vec(
        prop_oneof![8 => poll, 3 => Just(Happening::Begin), 6 => slice, 1 => Just(Happening::Crash)],
        0..120,
    )
}

/// A task that goes on from these batches, if there are any, within this memory.
pub(super) fn restored(engine: &Arc<Engine>, limit: Option<usize>, batches: &[RecordBatch]) -> Task {
    let cold = limit.map(|limit| (Box::<InMemory>::default() as Box<dyn ColdStore>, limit));
    Task::restore_within::<WindowError>(engine.clone(), 3, batches.iter().cloned().map(Ok), cold).unwrap()
}

/// A task, what it has told, and its checkpoints.
struct Run<'a> {
    scenario: &'a Scenario,
    /// Bytes of state in memory.
    limit: Option<usize>,
    engine: Arc<Engine>,
    task: Task,
    offered: Vec<usize>,
    rows: BTreeMap<i64, Row>,
    /// Rows of windows, by table and all that tells them apart.
    emitted: BTreeMap<String, Row>,
    kept: Kept,
    /// The checkpoint being taken, and a whole snapshot of the instant it began.
    open: Option<(Extent, Vec<RecordBatch>, Vec<RecordBatch>)>,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario, limit: Option<usize>) -> Self {
        let engine = Engine::new(&scenario.plan).unwrap();
        let task = restored(&engine, limit, &[]);
        let offered = vec![0; scenario.logs.len()];
        let (rows, emitted, kept) = (BTreeMap::new(), BTreeMap::new(), Kept::default());
        Self { scenario, limit, engine, task, offered, rows, emitted, kept, open: None }
    }

    fn offer(&mut self, source: usize, events: usize) {
        let (log, start) = (&self.scenario.logs[source], self.offered[source]);
        let end = log.len().min(start.saturating_add(events));
        self.task.offer(batch(source, &log[start..end], start as i64)).unwrap();
        self.offered[source] = end;
    }

    fn advance(&mut self, caught_up: &[bool], limit: usize) -> bool {
        let idle = vec![false; caught_up.len()];
        let applied = self.task.advance(&TaskClock { caught_up, idle: &idle }, limit).unwrap();
        for (sequence, row) in rows(&applied.rows) {
            if let Some(before) = self.rows.insert(sequence, row.clone()) {
                assert_eq!(before, row, "a row that is computed again is the same");
            }
        }
        let told = applied.emitted.iter().enumerate();
        for (table, told) in told.filter_map(|(table, told)| Some((table, told.as_ref()?))) {
            for row in rows_of(&told.batch) {
                let place = ["source_offset", "name", "number", "window_start", "window_end", "final"];
                let place = format!("{table} {:?}", place.map(|column| &row[column]));
                if let Some(before) = self.emitted.insert(place, row.clone()) {
                    assert_eq!(before, row, "a window that closes again is the same");
                }
            }
        }
        applied.more
    }

    fn slice(&mut self, most: usize) {
        let Some((_, batches, _)) = &mut self.open else { return };
        let slice = self.task.checkpoint_slice(most).unwrap();
        batches.extend(slice.batches);
        if slice.last {
            let (extent, batches, whole) = self.open.take().expect("it was there above");
            self.kept.add(extent, batches);
            let restored = restored(&self.engine, self.limit, &self.kept.batches);
            assert_eq!(in_words(&restored.snapshot().unwrap()), in_words(&whole));
        }
    }

    fn happen(&mut self, happening: &Happening) {
        match *happening {
            Happening::Poll { source, events, limit } if source < self.offered.len() => {
                self.offer(source, events);
                self.advance(&vec![false; self.offered.len()], limit);
            }
            Happening::Poll { .. } => (),
            Happening::Begin if self.open.is_none() => {
                let whole = self.task.snapshot().unwrap();
                let extent = self.task.begin_checkpoint().unwrap();
                self.open = Some((extent, Vec::new(), whole));
            }
            Happening::Begin => (),
            Happening::Slice(most) => self.slice(most),
            Happening::Crash => {
                self.open = None;
                self.task = restored(&self.engine, self.limit, &self.kept.batches);
                let next = self.task.next();
                self.offered = next.iter().map(|next| next.map_or(0, |NextOffset(next)| next as usize)).collect();
            }
        }
    }

    fn finish(&mut self) {
        for source in 0..self.scenario.logs.len() {
            self.offer(source, usize::MAX);
        }
        while self.advance(&vec![true; self.scenario.logs.len()], usize::MAX) {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens between the slices of checkpoints, and after: they hold what a whole snapshot holds, and a task
    /// that goes on from them tells what one tells that was never killed, however little memory it has.
    #[test]
    fn of_changes_equal_whole_ones(
        mut scenario in scenario(250),
        windows in prop::option::of(tables()),
        happenings in happenings(),
        limit in prop::option::of(prop::sample::select(vec![0usize, 3000, 10_000])),
    ) {
        // Of the last source: the first one may be a table.
        scenario.plan.windows = windows.unwrap_or_default();
        scenario.plan.windows.iter_mut().for_each(|windows| windows.source = scenario.logs.len() - 1);
        let mut undisturbed = Run::new(&scenario, None);
        undisturbed.finish();
        let mut run = Run::new(&scenario, limit);
        for happening in &happenings {
            run.happen(happening);
        }
        run.happen(&Happening::Begin);
        while run.open.is_some() {
            run.slice(1);
        }
        run.happen(&Happening::Crash);
        run.finish();
        prop_assert_eq!(run.rows, undisturbed.rows);
        prop_assert_eq!(run.emitted, undisturbed.emitted);
    }
}

/// Purchases of so many entities, one each, a minute apart.
fn purchases(task: &mut Task, keys: std::ops::Range<usize>, at: i64) -> Applied {
    let first = task.next()[0].map_or(0, |NextOffset(next)| next);
    let events: Vec<Event> = keys.clone().map(|_| event(at, 1.0)).collect();
    let mut batch = batch(0, &events, first);
    let names = keys.map(|key| Some(format!("c{key}"))).collect::<StringArray>();
    let mut columns = batch.columns.columns().to_vec();
    columns[0] = Arc::new(names);
    batch.columns = RecordBatch::try_new(batch.columns.schema(), columns).unwrap();
    task.offer(batch).unwrap();
    task.advance(&TaskClock { caught_up: &[true], idle: &[false] }, usize::MAX).unwrap()
}

#[test]
fn of_a_few_changes_are_small_and_tell_whom_the_sweep_forgot() {
    let groups = vec![group("g", 0, Some("amount"), None, &[window(1000, 10)])];
    let engine = Engine::new(&plan(vec![source("s", 0)], groups, Some(0))).unwrap();
    let mut task = Task::new(engine.clone(), 3);
    let mut kept = Kept::default();
    let newest = |kept: &Kept, from: usize| -> Vec<i64> {
        let column = |batch: &RecordBatch| batch.column(2).as_primitive::<TimestampMillisecondType>().values().to_vec();
        kept.batches[from..].iter().flat_map(column).collect()
    };
    purchases(&mut task, 0..1000, 0);
    kept.take(&mut task);
    assert_eq!(newest(&kept, 0), [0; 1000]);
    let before = kept.batches.len();
    purchases(&mut task, 0..5, 10);
    kept.take(&mut task);
    assert_eq!(newest(&kept, before), [10; 5], "only those that changed");
    // Long after, one event a call: the sweep comes by all the others, by and by.
    let before = kept.batches.len();
    for at in 0..4 {
        purchases(&mut task, 0..1, 1_000_000 + at);
    }
    kept.take(&mut task);
    let told = newest(&kept, before);
    assert_eq!(told.iter().filter(|&&newest| newest == i64::MIN + 1).count() + task.entities(), 1000);
    assert!(told.len() > 100 && task.entities() < 900, "{} told, {} left", told.len(), task.entities());
    let restored = Task::restore(engine, 3, &kept.batches).unwrap();
    assert_eq!(in_words(&restored.snapshot().unwrap()), in_words(&task.snapshot().unwrap()));
}

#[rstest]
#[case::tumbling(hopping(1000, 1000), 1000)]
#[case::hopping(hopping(1000, 100), 1000)]
#[case::session(session(1000), 1000)]
fn of_open_windows_are_sliced_and_hold_what_changed(#[case] span: Span, #[case] pieces: usize) {
    let table = windows("w", Some("amount"), None, span, None);
    let mut plan = plan_of(vec![table], 0);
    plan.entity.keys.truncate(1);
    plan.sources[0].key_fields.truncate(1);
    let engine = Engine::new(&plan).unwrap();
    let mut task = Task::new(engine.clone(), 3);
    let mut kept = Kept::default();
    let count = |batches: &[RecordBatch]| batches.iter().map(RecordBatch::num_rows).sum::<usize>();
    purchases(&mut task, 0..1000, 0);
    assert_eq!(task.begin_checkpoint().unwrap(), Extent::Whole);
    let (mut slices, mut batches) = (0, Vec::new());
    loop {
        // Between two slices, some that are still to be told change, and some that are told.
        purchases(&mut task, slices..slices + 1, 1);
        purchases(&mut task, 999 - slices..1000 - slices, 1);
        slices += 1;
        let slice = task.checkpoint_slice(100).unwrap();
        batches.extend(slice.batches);
        if slice.last {
            break;
        }
    }
    assert!(slices >= 10, "{slices} slices of at most a hundred");
    assert_eq!(count(&batches), pieces);
    kept.add(Extent::Whole, batches);
    kept.take(&mut task);
    assert_eq!(count(&kept.batches), pieces + 2 * slices, "only those that changed");
    let restored = Task::restore(engine.clone(), 3, &kept.batches).unwrap();
    assert_eq!(in_words(&restored.snapshot().unwrap()), in_words(&task.snapshot().unwrap()));
    // All close, and one opens: what is left is told as a whole.
    purchases(&mut task, 0..1, 1_000_000);
    kept.take(&mut task);
    assert_eq!(count(&kept.batches), 1);
    let restored = Task::restore(engine, 3, &kept.batches).unwrap();
    assert_eq!(in_words(&restored.snapshot().unwrap()), in_words(&task.snapshot().unwrap()));
}

#[rstest]
#[case::tumbling(hopping(1000, 1000))]
#[case::session(session(1000))]
fn bytes_of_open_windows_are_predicted(#[case] span: Span) {
    let mut plan = plan_of(vec![windows("w", Some("amount"), None, span, None)], 0);
    plan.entity.keys.truncate(1);
    plan.sources[0].key_fields.truncate(1);
    let mut task = Task::new(Engine::new(&plan).unwrap(), 3);
    let before = task.memory().state;
    purchases(&mut task, 0..8000, 0);
    let each = (task.memory().state - before) / 8000;
    let predicted = crate::window::state_bytes(&plan).unwrap().windows[0];
    assert!(predicted <= 2 * each && each <= 2 * predicted, "predicted {predicted}, holds {each}");
}

#[test]
fn a_whole_one_comes_again_before_the_others_outweigh_it() {
    let groups = vec![group("g", 0, Some("amount"), None, &[window(1000, 10)])];
    let engine = Engine::new(&plan(vec![source("s", 0)], groups, Some(0))).unwrap();
    let mut task = Task::new(engine, 3);
    purchases(&mut task, 0..1000, 0);
    let mut extents = |changed: usize, count: usize| -> Vec<bool> {
        let one = |_| {
            purchases(&mut task, 0..changed, 0);
            let extent = task.begin_checkpoint().unwrap();
            while !task.checkpoint_slice(1000).unwrap().last {}
            extent == Extent::Whole
        };
        (0..count).map(one).collect()
    };
    let first = extents(300, 5);
    assert_eq!(first, [true, false, false, true, false], "each has 0.3 of the entities, with ever more events");
    let few = extents(1, 40);
    assert_eq!(few.iter().position(|whole| *whole), Some(31), "a restore reads a bounded number");
    assert_eq!(few.iter().filter(|whole| **whole).count(), 1);
}

#[test]
fn refuses_parts_in_another_order() {
    let groups = vec![group("g", 0, Some("amount"), None, &[window(1000, 10)])];
    let engine = Engine::new(&plan(vec![source("s", 0)], groups, Some(0))).unwrap();
    let mut task = Task::new(engine.clone(), 3);
    let mut kept = Kept::default();
    for keys in [0..100, 0..1, 1..2] {
        purchases(&mut task, keys, 0);
        kept.take(&mut task);
    }
    let batches = kept.batches;
    let (whole, changes) = batches.split_at(batches.len() - 2);
    for wrong in [vec![&changes[0]], vec![&whole[0], &changes[1]], vec![&whole[0], &changes[1], &changes[0]]] {
        let wrong: Vec<RecordBatch> = wrong.into_iter().cloned().collect();
        let error = Task::restore(engine.clone(), 3, &wrong).unwrap_err().to_string();
        assert!(error.contains("follows"), "{error}");
    }
}

#[test]
fn state_stays_below_its_limit_and_values_the_same() {
    let groups = || vec![group("g", 0, Some("amount"), None, &[window(1000, 10), window(400_000, 1000)])];
    let engine = Engine::new(&plan(vec![source("s", 0)], groups(), Some(0))).unwrap();
    let limit = 1 << 20;
    let (mut free, mut tight) = (restored(&engine, None, &[]), restored(&engine, Some(limit), &[]));
    let (mut kept, mut most, mut on_disk) = (Kept::default(), 0, 0);
    for round in 0..60 {
        let keys = if round % 3 == 0 { 0..3000 } else { round * 10..round * 10 + 300 };
        let told = purchases(&mut free, keys.clone(), round as i64 * 5000);
        assert_eq!(rows(&purchases(&mut tight, keys, round as i64 * 5000).rows), rows(&told.rows), "round {round}");
        assert!(tight.memory().state <= limit, "round {round}: {} bytes", tight.memory().state);
        most = most.max(free.memory().state);
        on_disk = on_disk.max(tight.memory().on_disk);
        if round % 7 == 0 {
            kept.take(&mut tight);
        }
        if round % 20 == 0 {
            kept.take(&mut tight);
            tight = restored(&engine, Some(limit), &kept.batches);
            let tighter = restored(&engine, Some(limit / 2), &kept.batches);
            for (task, limit) in [(&tight, limit), (&tighter, limit / 2)] {
                assert!(task.memory().state <= limit, "round {round}: {:?}", task.memory());
            }
            assert_eq!(in_words(&tighter.snapshot().unwrap()), in_words(&tight.snapshot().unwrap()));
        }
    }
    assert!(most > 2 * limit && on_disk > limit as u64, "it would hold {most} bytes, {on_disk} were on disk");
    // All but one are quiet long since, and forgotten without being read.
    for at in 0..60 {
        purchases(&mut tight, 0..1, 10_000_000 + at);
    }
    assert_eq!(tight.entities(), 1);
    assert!(tight.memory().on_disk < on_disk / 10, "{:?} of {on_disk} are still on disk", tight.memory());
}

#[test]
fn what_a_lifetime_needs_stays_on_disk() {
    let groups = || vec![group("g", 0, Some("amount"), None, &[window(1000, 10), window(0, 0)])];
    let engine = Engine::new(&plan(vec![source("s", 0)], groups(), Some(0))).unwrap();
    let (mut free, mut tight) = (restored(&engine, None, &[]), restored(&engine, Some(0), &[]));
    for task in [&mut free, &mut tight] {
        purchases(task, 0..1000, 0);
        for at in 0..60 {
            purchases(task, 0..1, 10_000_000 + at);
        }
        assert_eq!(task.entities(), 1000);
    }
    let told = rows(&purchases(&mut free, 0..1000, 10_000_100).rows);
    assert_eq!(rows(&purchases(&mut tight, 0..1000, 10_000_100).rows), told);
}
