//! Windows: events a second through one task, from decoded columns to feature rows, and bytes of state.
//!
//! Each event asks for a row. One iteration is one poll of 1,000 events.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType as ArrowType, Field, Schema};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use driftline::config::plan::{
    BrokerPlan, Column, DataType, Delivery, Emit, EntityPlan, Format, Function, GroupPlan, OfflinePlan, OnlinePlan,
    Plan, RegistryPlan, ScorePlan, SourcePlan, StatePlan, TimeUnit, WindowPlan,
};
use driftline::runtime::clock::monotonic;
use driftline::source::SourceBatch;
use driftline::window::{Engine, Task, TaskClock};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Zipf};

const POLL: usize = 1000;

const MINUTE: i64 = 60_000;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// Label, length and tile of a window.
type Length = (&'static str, i64, i64);

/// Lengths and tiles as `check` prints them.
const WINDOWS: [Length; 4] =
    [("1h", HOUR, MINUTE), ("1d", DAY, 15 * MINUTE), ("30d", 30 * DAY, 12 * HOUR), ("90d", 90 * DAY, DAY)];

const FUNCTIONS: [Function; 5] = [Function::Count, Function::Sum, Function::Mean, Function::Max, Function::Std];

fn column(name: &str, data_type: DataType) -> Column {
    Column { name: name.into(), data_type }
}

fn group(of: Column, windows: &[Length]) -> GroupPlan {
    let features = windows.iter().enumerate().flat_map(|(window, (label, _, _))| {
        let of = of.clone();
        FUNCTIONS.map(move |function| {
            let data_type = match function {
                Function::Count => DataType::Int64,
                Function::Mean | Function::Std => DataType::Float64,
                _ => of.data_type,
            };
            (function, window, column(&format!("{}_{function:?}_{label}", of.name), data_type))
        })
    });
    let windows = windows.iter().map(|&(label, length, tile)| WindowPlan {
        label: label.to_owned(),
        length_ms: Some(length),
        tile_ms: tile,
    });
    GroupPlan {
        name: of.name.to_string(),
        source: 0,
        features: features.collect(),
        windows: windows.collect(),
        of: Some(of),
        filter: None,
        half_life_ms: None,
        by: None,
    }
}

fn plan(groups: Vec<GroupPlan>, out_of_order: Duration) -> Plan {
    let source = SourcePlan {
        name: "purchases".into(),
        topic: "bench.purchases".into(),
        format: Format::Json,
        fields: vec![
            column("customer_id", DataType::String),
            column("amount", DataType::Float64),
            column("quantity", DataType::Int64),
        ],
        key_fields: vec!["customer_id".into()],
        event_time: "at".into(),
        event_time_unit: TimeUnit::Ms,
        out_of_order,
        ahead: Duration::from_secs(3600),
        idle_after: Duration::from_secs(30),
        filter: None,
        derive: Vec::new(),
        table: None,
        rekeyed: None,
    };
    let nowhere = || "file:///nowhere".to_owned();
    Plan {
        others: Vec::new(),
        pipeline: None,
        name: "bench".to_owned(),
        folder: "bench".into(),
        root: "bench".into(),
        definition: String::new(),
        broker: BrokerPlan::Embedded { path: "data".into(), partitions: 1 },
        online: OnlinePlan::Embedded { path: "data".into(), project: "bench".to_owned() },
        offline: OfflinePlan {
            url: nowhere(),
            rows: true,
            checkpoint_interval: Duration::from_secs(30),
            checkpoint_rows: 1,
        },
        state: StatePlan::default(),
        registry: RegistryPlan { url: nowhere(), initial: None },
        entity: EntityPlan { name: "customer".to_owned(), keys: vec![column("customer_id", DataType::String)] },
        sources: vec![source],
        groups,
        windows: Vec::new(),
        lookups: Vec::new(),
        derived: Vec::new(),
        score: Some(ScorePlan {
            on: 0,
            model: "bench".to_owned(),
            alias: "production".to_owned(),
            features: Vec::new(),
            batch_rows: POLL,
            batch_bytes: 1 << 20,
            batch_wait: Duration::ZERO,
            poll_alias: Duration::ZERO,
            delivery: Delivery::ExactlyOnce,
            emit: Emit::Arrival,
            topic: "bench.predictions".into(),
            providers: Vec::new(),
            threads: 1,
        }),
        labels: None,
        monitor: None,
        retraining: None,
    }
}

/// An endless stream of purchases.
struct Stream {
    random: ChaCha8Rng,
    keys: Zipf<f64>,
    /// Share of the events that belong to one customer, on top.
    hot: f64,
    /// Share of the events that come up to 5 s late.
    out_of_order: f64,
    step_us: i64,
    offset: i64,
    schema: Arc<Schema>,
}

impl Stream {
    fn new(hot: f64, out_of_order: f64, events_per_second: i64) -> Self {
        let field = |name: &str, data_type| Field::new(name, data_type, true);
        Self {
            random: ChaCha8Rng::seed_from_u64(7),
            keys: Zipf::new(50_000.0, 1.1).expect("valid parameters"),
            hot,
            out_of_order,
            step_us: 1_000_000 / events_per_second,
            offset: 0,
            schema: Arc::new(Schema::new(vec![
                field("customer_id", ArrowType::Utf8),
                field("amount", ArrowType::Float64),
                field("quantity", ArrowType::Int64),
            ])),
        }
    }

    fn poll(&mut self) -> SourceBatch {
        let keys: Vec<u64> = (0..POLL)
            .map(|_| if self.random.random_bool(self.hot) { 1 } else { self.keys.sample(&mut self.random) as u64 })
            .collect();
        self.poll_of(&keys)
    }

    fn poll_of(&mut self, keys: &[u64]) -> SourceBatch {
        let first = self.offset;
        self.offset += keys.len() as i64;
        let offsets: Vec<i64> = (first..self.offset).collect();
        let times = offsets.iter().map(|offset| {
            let late = self.out_of_order > 0.0 && self.random.random_bool(self.out_of_order);
            1_700_000_000_000 + offset * self.step_us / 1000 - if late { self.random.random_range(0..5000) } else { 0 }
        });
        let event_times = times.collect();
        let amounts: Float64Array =
            keys.iter().map(|_| Some(self.random.random_range(1..100_000) as f64 / 100.0)).collect();
        let quantities: Int64Array = keys.iter().map(|_| Some(self.random.random_range(1..10))).collect();
        let columns: [ArrayRef; 3] = [
            Arc::new(StringArray::from_iter_values(keys.iter().map(|key| format!("customer-{key:07}")))),
            Arc::new(amounts),
            Arc::new(quantities),
        ];
        SourceBatch {
            rekeyed: None,
            source: 0,
            partition: 0,
            columns: RecordBatch::try_new(self.schema.clone(), columns.to_vec()).expect("columns fit the schema"),
            event_times,
            next: self.offset,
            read: keys.len() as u64,
            filtered: 0,
            offsets,
        }
    }
}

fn apply(task: &mut Task, batch: SourceBatch) {
    task.offer(batch).expect("the batch fits the plan");
    let clock = TaskClock { caught_up: &[true], idle: &[false] };
    black_box(task.advance(&clock, usize::MAX).expect("features can be computed"));
}

/// Times the polls of a task, without making them.
fn measure(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, task: &mut Task, stream: &mut Stream) {
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|polls| {
            let mut spent = Duration::ZERO;
            for _ in 0..polls {
                let batch = stream.poll();
                let start = monotonic();
                apply(task, batch);
                spent += start.elapsed();
            }
            spent
        });
    });
}

fn throughput(criterion: &mut Criterion) {
    let mut group_of = criterion.benchmark_group("windows");
    group_of.throughput(Throughput::Elements(POLL as u64)).measurement_time(Duration::from_secs(8));
    let cases = [
        ("50k Zipf keys, in order", 0.0, 0.0, 700, 0),
        ("one key with 14 %, in order", 0.14, 0.0, 700, 0),
        ("one key with 14 %, 2 % up to 5 s late", 0.14, 0.02, 700, 5),
        ("one key with 14 %, 2 % up to 5 s late, bound 1 h", 0.14, 0.02, 700, 3600),
        ("sparse: an event a minute", 0.0, 0.0, 1, 0),
    ];
    for (name, hot, late, rate, bound) in cases {
        let plan = plan(vec![group(column("amount", DataType::Float64), &WINDOWS)], Duration::from_secs(bound));
        let mut task = Task::new(Engine::new(&plan).expect("a valid plan"), 0);
        let mut stream = Stream::new(hot, late, rate);
        if name.starts_with("sparse") {
            stream.step_us = 60_000_000;
        }
        for _ in 0..1000 {
            let batch = stream.poll();
            apply(&mut task, batch);
        }
        measure(&mut group_of, name, &mut task, &mut stream);
    }
    group_of.finish();
}

/// One customer with 14 % of the events: 350,000 in an hour. What an event costs should not depend on the window.
fn exact(criterion: &mut Criterion) {
    let mut group_of = criterion.benchmark_group("exact windows, one key with 14 %");
    group_of.throughput(Throughput::Elements(POLL as u64)).measurement_time(Duration::from_secs(8));
    let tiled: &[Length] = &[("1h", HOUR, MINUTE)];
    let cases: [(&str, &[Length], f64); 7] = [
        ("1 h in tiles, for comparison", tiled, 0.0),
        ("10 s", &[("10s", 10_000, 1)], 0.0),
        ("1 min", &[("1m", MINUTE, 1)], 0.0),
        ("10 min", &[("10m", 10 * MINUTE, 1)], 0.0),
        ("1 h", &[("1h", HOUR, 1)], 0.0),
        ("1 h, 2 % up to 5 s late", &[("1h", HOUR, 1)], 0.02),
        (
            "10 min and 1 h exact, 1 d and 30 d in tiles",
            &[("10m", 10 * MINUTE, 1), ("1h", HOUR, 1), WINDOWS[1], WINDOWS[2]],
            0.0,
        ),
    ];
    for (name, windows, late) in cases {
        let plan = plan(vec![group(column("amount", DataType::Float64), windows)], Duration::from_secs(5));
        let mut task = Task::new(Engine::new(&plan).expect("a valid plan"), 0);
        let mut stream = Stream::new(0.14, late, 700);
        // Until the longest exact window is full.
        for _ in 0..2700 {
            let batch = stream.poll();
            apply(&mut task, batch);
        }
        measure(&mut group_of, name, &mut task, &mut stream);
    }
    group_of.finish();
}

/// What an event costs should depend neither on how long the windows are, nor on how many entities there are, and little on how
/// many windows share the tiles: each computes five values more.
fn flat(criterion: &mut Criterion) {
    let mut group_of = criterion.benchmark_group("flat");
    group_of.throughput(Throughput::Elements(POLL as u64));
    group_of.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
    // An entity has an event in each `interval_ms`, so many before the measurement.
    let mut case = |name: String, windows: &[Length], entities: u64, interval_ms: i64, before: u64| {
        let plan = plan(vec![group(column("amount", DataType::Float64), windows)], Duration::ZERO);
        let mut task = Task::new(Engine::new(&plan).expect("a valid plan"), 0);
        let mut stream = Stream::new(0.0, 0.0, 1000);
        stream.step_us = interval_ms * 1000 / entities as i64;
        for _ in 0..before {
            for first in (0..entities).step_by(POLL) {
                let keys: Vec<u64> = (first..(first + POLL as u64).min(entities)).collect();
                let batch = stream.poll_of(&keys);
                apply(&mut task, batch);
            }
        }
        group_of.bench_function(name, |bencher| {
            bencher.iter_custom(|polls| {
                let mut spent = Duration::ZERO;
                for _ in 0..polls {
                    let keys: Vec<u64> = (0..POLL).map(|_| stream.random.random_range(0..entities)).collect();
                    let batch = stream.poll_of(&keys);
                    let start = monotonic();
                    apply(&mut task, batch);
                    spent += start.elapsed();
                }
                spent
            });
        });
    };
    // Two events in each tile of the window under test, all of whose tiles are full.
    for window in WINDOWS {
        case(format!("one window of {}", window.0), &[window], 5_000, window.2 / 2, 200);
    }
    for count in 1..=WINDOWS.len() {
        case(format!("{count} windows, the shortest 1 h"), &WINDOWS[..count], 5_000, MINUTE / 2, 200);
    }
    for entities in [50_000, 500_000, 5_000_000] {
        case(format!("{entities} entities, an event in two days each"), &[WINDOWS[1]], entities, 2 * DAY, 1);
    }
    group_of.finish();
}

/// Partitions side by side, each with a thread of its own: an iteration is one poll in each.
fn partitions(criterion: &mut Criterion) {
    let mut group_of = criterion.benchmark_group("partitions");
    group_of.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
    for count in [1, 2] {
        group_of.throughput(Throughput::Elements(count * POLL as u64));
        let plan = plan(vec![group(column("amount", DataType::Float64), &WINDOWS)], Duration::ZERO);
        let mut tasks: Vec<(Task, Stream)> = (0..count)
            .map(|_| (Task::new(Engine::new(&plan).expect("a valid plan"), 0), Stream::new(0.14, 0.0, 700)))
            .collect();
        group_of.bench_function(format!("{count}"), |bencher| {
            bencher.iter_custom(|polls| {
                let batches = tasks.iter_mut().map(|(task, stream)| {
                    let batches: Vec<SourceBatch> = (0..polls).map(|_| stream.poll()).collect();
                    (task, batches)
                });
                let batches: Vec<_> = batches.collect();
                let start = monotonic();
                std::thread::scope(|scope| {
                    for (task, batches) in batches {
                        scope.spawn(move || batches.into_iter().for_each(|batch| apply(task, batch)));
                    }
                });
                start.elapsed()
            });
        });
    }
    group_of.finish();
}

/// Entities whose state a worker copies at a time.
const SLICE: usize = 4096;

/// Prints what checkpoints of a million entities cost the thread that applies events, one slice after each poll, and how large
/// they are.
fn checkpoints(_: &mut Criterion) {
    let groups = vec![
        group(column("amount", DataType::Float64), &WINDOWS),
        group(column("quantity", DataType::Int64), &WINDOWS),
    ];
    let mut task = Task::new(Engine::new(&plan(groups, Duration::from_secs(10))).expect("a valid plan"), 0);
    let mut stream = Stream::new(0.0, 0.0, 1);
    stream.step_us = 90 * DAY * 1000 / 5_000_000;
    let poll = |task: &mut Task, stream: &mut Stream, keys: u64| {
        let keys: Vec<u64> = (0..POLL).map(|_| stream.random.random_range(0..keys)).collect();
        let batch = stream.poll_of(&keys);
        let start = monotonic();
        apply(task, batch);
        start.elapsed()
    };
    for _ in 0..5000 {
        poll(&mut task, &mut stream, 1_000_000);
    }
    let mut checkpoint = |changed: u64| {
        // Few enough that the sweep's own changes do not hide those of the events.
        for _ in 0..changed.div_ceil(POLL as u64) {
            poll(&mut task, &mut stream, changed.max(1));
        }
        let (mut pauses, mut polls) = (Vec::new(), Vec::new());
        let (mut entities, mut bytes) = (0, 0);
        let start = monotonic();
        let extent = task.begin_checkpoint().expect("columns can be built");
        pauses.push(start.elapsed());
        loop {
            let start = monotonic();
            let slice = task.checkpoint_slice(SLICE).expect("nothing is on disk");
            pauses.push(start.elapsed());
            entities += slice.batches.iter().map(RecordBatch::num_rows).sum::<usize>();
            bytes += slice.batches.iter().map(RecordBatch::get_array_memory_size).sum::<usize>();
            if slice.last {
                break;
            }
            polls.push(poll(&mut task, &mut stream, 1_000_000));
        }
        pauses.sort_unstable();
        let ms = |at: usize| pauses[at.min(pauses.len() - 1)].as_secs_f64() * 1000.0;
        println!(
            "checkpoint: {extent:?} of {} entities, {entities} in it, {} MiB; {} pauses, p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms; \
             an event meanwhile {:.2} us",
            task.entities(),
            bytes >> 20,
            pauses.len(),
            ms(pauses.len() / 2),
            ms(pauses.len() * 99 / 100),
            ms(pauses.len()),
            polls.iter().sum::<Duration>().as_secs_f64() * 1e6 / (POLL * polls.len().max(1)) as f64,
        );
    };
    for changed in [0, 10_000, 100_000, 300_000] {
        checkpoint(changed);
    }
}

/// Not a timing: prints the bytes of state of a million entities with 50 feature values each.
fn memory(_: &mut Criterion) {
    let groups = || {
        let windows: Vec<_> = WINDOWS.into_iter().chain([("7d", 7 * DAY, 3 * HOUR)]).collect();
        let mut windows = windows;
        windows.sort_by_key(|window| window.1);
        vec![group(column("amount", DataType::Float64), &windows), group(column("quantity", DataType::Int64), &windows)]
    };
    for events in [1, 5, 10, 20, 40] {
        let mut task = Task::new(Engine::new(&plan(groups(), Duration::from_secs(10))).expect("a valid plan"), 0);
        let mut stream = Stream::new(0.0, 0.0, 1);
        stream.step_us = 90 * DAY * 1000 / (1_000_000 * events);
        for _ in 0..1000 * events {
            let keys: Vec<u64> = (0..POLL).map(|_| stream.random.random_range(0..1_000_000)).collect();
            let batch = stream.poll_of(&keys);
            apply(&mut task, batch);
        }
        let (entities, held) = (task.entities(), task.memory());
        println!(
            "memory: {entities} entities, 50 features each, {events} events an entity in 90 days: {} MiB, {} bytes an entity",
            held.state >> 20,
            held.state / entities
        );
    }
}

criterion_group!(benches, throughput, exact, flat, partitions, checkpoints, memory);
criterion_main!(benches);
