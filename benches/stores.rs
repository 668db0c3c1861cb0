//! Feature rows a second into the stores, one writing thread: 30 float features in three views, a string key, every row
//! another customer. Redis is a `redis-server` of this bench on loopback, without persistence. What `redis-benchmark` reaches
//! with plain HSETs of the same size is printed to compare with.

#![allow(missing_docs, reason = "criterion's macros")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{
    ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray, TimestampMillisecondArray,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use driftline::broker::Offsets;
use driftline::config::plan::{
    BrokerPlan, Column, DataType, EntityPlan, Function, GroupPlan, GroupProtocol, OfflinePlan, OnlinePlan, Plan,
    RegistryPlan, Secret, StatePlan, WindowPlan,
};
use driftline::store::feast::Layout;
use driftline::store::{Checkpoint, OfflineStore, open_online};
use driftline::window::{FeatureRows, row_columns};

const GROUPS: usize = 3;
const FEATURES: usize = 10;
/// Rows of a micro-batch for the online stores.
const BATCH: usize = 4096;
/// Rows of a checkpoint.
const CHECKPOINT: usize = 200_000;
const START: i64 = 1_767_323_045_123;

fn feature(group: usize, feature: usize) -> String {
    format!("group{group}_mean_{feature}d")
}

fn plan(online: OnlinePlan, folder: &std::path::Path) -> Plan {
    let column = |name: String, data_type| Column { name: name.into(), data_type };
    let group = |g: usize| GroupPlan {
        name: format!("group{g}"),
        source: 0,
        of: None,
        filter: None,
        half_life_ms: None,
        by: None,
        windows: (1..=FEATURES as i64)
            .map(|d| WindowPlan { label: format!("{d}d"), length_ms: Some(d * 86_400_000), tile_ms: 1_800_000 })
            .collect(),
        features: (0..FEATURES).map(|f| (Function::Mean, f, column(feature(g, f), DataType::Float64))).collect(),
    };
    Plan {
        others: Vec::new(),
        pipeline: None,
        name: "bench".into(),
        folder: PathBuf::new(),
        root: PathBuf::new(),
        definition: "0123456789abcdef".into(),
        broker: BrokerPlan::Kafka {
            brokers: String::new(),
            schema_registry: None,
            properties: BTreeMap::new(),
            partitions: 1,
            replication: 1,
            group_protocol: GroupProtocol::default(),
        },
        online,
        offline: OfflinePlan {
            url: format!("file://{}", folder.display()),
            rows: true,
            checkpoint_interval: Duration::from_secs(30),
            checkpoint_rows: CHECKPOINT,
        },
        state: StatePlan::default(),
        registry: RegistryPlan { url: String::new(), initial: None },
        entity: EntityPlan { name: "customer".into(), keys: vec![column("customer_id".into(), DataType::String)] },
        sources: Vec::new(),
        groups: (0..GROUPS).map(group).collect(),
        windows: Vec::new(),
        lookups: Vec::new(),
        derived: Vec::new(),
        score: None,
        labels: None,
        monitor: None,
        retraining: None,
    }
}

fn rows(count: usize) -> FeatureRows {
    let n = || 0..count as i64;
    let times = |at: Vec<i64>| -> ArrayRef { Arc::new(TimestampMillisecondArray::from(at).with_timezone("UTC")) };
    let text = |value: &'static str| -> ArrayRef { Arc::new(StringArray::from_iter_values(n().map(|_| value))) };
    let mut columns: Vec<(String, ArrayRef)> = vec![
        ("customer_id".into(), Arc::new(StringArray::from_iter_values(n().map(|i| format!("C{i:08}"))))),
        (row_columns::EVENT_TIME.into(), times(n().map(|i| START + i).collect())),
        (row_columns::SOURCE.into(), text("purchases")),
        (row_columns::TOPIC.into(), text("bench.purchases")),
        (row_columns::PARTITION.into(), Arc::new(Int32Array::from_iter_values(n().map(|_| 0)))),
        (row_columns::OFFSET.into(), Arc::new(Int64Array::from_iter_values(n()))),
        (row_columns::WATERMARK.into(), times(n().map(|i| START + i - 10_000).collect())),
    ];
    for g in 0..GROUPS {
        for f in 0..FEATURES {
            let values = n().map(|i| (i * 31 + (g * FEATURES + f) as i64) as f64 / 7.0);
            columns.push((feature(g, f), Arc::new(Float64Array::from_iter_values(values))));
        }
    }
    let batch = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true)))
        .expect("all columns have the same length");
    FeatureRows { batch, sequence: n().collect() }
}

struct Redis(Child, u16);

impl Redis {
    fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a loopback port is free")
            .port();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--port"]).arg(port.to_string()).stdout(Stdio::null());
        Self(command.spawn().expect("redis-server is installed"), port)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.0.kill().expect("the server runs");
        self.0.wait().expect("the server ends");
    }
}

fn stores(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let folder = tempfile::tempdir().expect("a folder for the files");
    let never = || false;
    let batch = rows(BATCH);
    let mut group = c.benchmark_group("stores");
    group.sample_size(20).throughput(Throughput::Elements(BATCH as u64));

    let embedded = OnlinePlan::Embedded { path: folder.path().to_owned(), project: "bench".into() };
    let embedded = plan(embedded, folder.path());
    let layout = Layout::new(&embedded, "bench");
    group.bench_function("encode", |b| b.iter(|| black_box(layout.encode(&batch))));

    let store = open_online(&embedded, runtime.handle().clone()).expect("the folder is writable");
    group.bench_function("embedded", |b| b.iter(|| store.write(&batch, &never).expect("the disk takes it")));

    let redis = Redis::start();
    let url = Secret(format!("redis://127.0.0.1:{}", redis.1));
    let plan = plan(OnlinePlan::Redis { url, project: "bench".into(), ttl: None }, folder.path());
    let store = open_online(&plan, runtime.handle().clone()).expect("the URL is good");
    group.bench_function("redis", |b| b.iter(|| store.write(&batch, &never).expect("Redis runs")));
    redis_benchmark(redis.1);

    let rows = rows(CHECKPOINT);
    let batches: Vec<_> = (0..CHECKPOINT).step_by(1000).map(|from| rows.batch.slice(from, 1000)).collect();
    let offline = OfflineStore::open(&plan, runtime.handle().clone()).expect("the folder is writable");
    let mut previous = None;
    group.sample_size(10).throughput(Throughput::Elements(CHECKPOINT as u64));
    group.bench_function("checkpoint", |b| {
        b.iter(|| {
            let checkpoint = Checkpoint {
                partition: 0,
                next: Offsets::new(),
                parts: Vec::new(),
                state: Vec::new(),
                follows: false,
                rows: batches.clone(),
                windows: Vec::new(),
                previous: previous.as_ref(),
            };
            previous = Some(offline.commit(&checkpoint).expect("the disk takes it"));
        });
    });
    group.finish();
}

/// What Redis' own tool reaches with as many fields and bytes a command, pipelined as deep: HSET, without any comparison.
fn redis_benchmark(port: u16) {
    let mut command = Command::new("redis-benchmark");
    command.args(["-q", "-n", "200000", "-r", "4096", "-c", "1", "-P", "256", "-p"]).arg(port.to_string());
    command.args(["HSET", "0100000002000000b000000customer_id:__rand_int__"]);
    for g in 0..GROUPS {
        command.arg(format!("_ts:group{g}")).arg("0123456789ab");
        for f in 0..FEATURES {
            command.arg(format!("{g}{f:03}")).arg("012345678");
        }
    }
    command.args(["_seq:bench", "01234567890123456789"]);
    let output = command.output().expect("redis-benchmark is installed").stdout;
    let output = String::from_utf8_lossy(&output);
    let result = output.rsplit(": ").next().unwrap_or_default();
    println!("redis-benchmark, the same HSET without comparing: {}", result.trim());
}

criterion_group!(benches, stores);
criterion_main!(benches);
