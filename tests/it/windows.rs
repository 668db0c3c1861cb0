//! Windows emitted when they close: on Kafka, by the whole binary, killed on the way, against DuckDB.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::process::{World, oracle};
use crate::servers::{Kafka, unique};

const PARTITIONS: i32 = 3;
const EVENTS: usize = 30_000;
const OUT_OF_ORDER_MS: i64 = 5_000;
/// 2025-01-01, ms.
const START: i64 = 1_735_689_600_000;

const PIPELINE: &str = r#"
name = "NAME"
broker = { brokers = "${KAFKA_BROKERS}" }
offline = { url = "${OFFLINE_URL}", checkpoint = { interval = "50ms", rows = 1000 } }
[entities.customer]
key = { customer_id = "string" }
[sources.orders]
topic = "NAME.orders"
format = "json"
fields = { customer_id = "string", at = "int64", amount = "float64" }
event_time = { field = "at", unit = "ms" }
out_of_order = "5s"
ahead = "36500d"
[windows.minutes]
source = "orders"
of = "amount"
functions = ["count", "sum", "mean", "min", "max"]
tumbling = "1m"
[windows.hours]
source = "orders"
of = "amount"
functions = ["count", "sum", "mean", "min", "max"]
hopping = "1h"
step = "5m"
[windows.visits]
source = "orders"
of = "amount"
functions = ["count", "sum", "mean", "min", "max"]
session = "3m"
"#;

/// Two hours of orders: some customers order often, most seldom; some orders come late, none too late.
fn orders(folder: &Path, kafka: &Kafka, topic: &str) {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let mut offsets = [0_i64; PARTITIONS as usize];
    let (mut lines, mut records) = (String::new(), Vec::new());
    for number in 0..EVENTS {
        let customer = (300.0 * rng.random::<f64>().powi(4)) as i32;
        let now = START + i64::try_from(number).unwrap() * 7_200_000 / EVENTS as i64;
        let at = now - if rng.random_bool(0.1) { rng.random_range(0..OUT_OF_ORDER_MS - 1_000) } else { 0 };
        let amount = f64::from(rng.random_range(1..100_000)) / 100.0;
        let partition = customer % PARTITIONS;
        let offset = &mut offsets[usize::try_from(partition).unwrap()];
        writeln!(
            lines,
            r#"{{"partition":{partition},"offset":{offset},"customer_id":"c{customer}","at":{at},"amount":{amount}}}"#
        )
        .unwrap();
        *offset += 1;
        let value = format!(r#"{{"customer_id":"c{customer}","at":{at},"amount":{amount}}}"#);
        records.push((partition, format!("c{customer}"), value));
    }
    fs::write(folder.join("events.jsonl"), lines).unwrap();
    let records = records.iter().map(|(partition, key, value)| (*partition, key.as_bytes(), value.as_bytes()));
    kafka.produce(topic, records);
}

/// The Arrow files of one table's windows that the newest manifests name.
fn files(offline: &Path, window: &str) -> Vec<String> {
    let mut found = Vec::new();
    for partition in 0..PARTITIONS {
        let manifests = offline.join(format!("manifest/partition={partition}"));
        let newest = fs::read_dir(manifests).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
        let manifest: Value = serde_json::from_slice(&fs::read(newest).unwrap()).unwrap();
        let files = manifest["windows"].as_array().into_iter().flatten().filter(|file| file["window"] == window);
        found.extend(files.map(|file| offline.join(file["path"].as_str().unwrap()).display().to_string()));
    }
    found
}

#[test]
fn closed_windows_are_emitted_once_however_often_the_process_is_killed() {
    let kafka = Kafka::start();
    let name = unique("windows");
    let mut world = World::new();
    world.set("KAFKA_BROKERS", &kafka.address());
    let pipeline = world.define("pipeline", &PIPELINE.replace("NAME", &name));
    kafka.create(&format!("{name}.orders"), PARTITIONS);
    orders(&world.path(""), &kafka, &format!("{name}.orders"));

    let run = ["run", &pipeline, "--until-end", "--listen", "none", "--view", "none", "--instance", "test"];
    let points = [
        "features.after_window=kill@2",
        "publish.before_commit=kill@1",
        "offline.rows_written=kill@1",
        "offline.manifest_written=kill@1",
        "broker.commit.after=kill@1",
    ];
    world.killed_at(&run, &points);
    world.run(&run);

    let spans = json!({
        "minutes": { "kind": "hopping", "length": 60_000, "step": 60_000 },
        "hours": { "kind": "hopping", "length": 3_600_000, "step": 300_000 },
        "visits": { "kind": "session", "gap": 180_000 },
    });
    let mut windows = spans.as_object().unwrap().clone();
    for (window, spec) in &mut windows {
        let mut lines = Vec::new();
        for record in kafka.consume(&format!("{name}.windows.{window}")) {
            let value = record.value.expect("rows have a value");
            let row: Value = serde_json::from_slice(&value).unwrap();
            let customer = row["customer_id"].as_str().unwrap();
            assert_eq!(record.key.as_deref(), Some(customer.as_bytes()));
            // A customer's rows stay in the partition of its orders.
            assert_eq!(record.partition, customer[1..].parse::<i32>().unwrap() % PARTITIONS);
            lines.extend_from_slice(&value);
            lines.push(b'\n');
        }
        let path = world.path(&format!("{window}.jsonl"));
        fs::write(&path, lines).unwrap();
        spec["rows"] = json!(path);
        spec["files"] = json!(files(&world.path("offline").join(&name), window));
    }
    fs::write(world.path("windows.json"), json!(windows).to_string()).unwrap();
    let (events, out_of_order) = (world.path("events.jsonl"), OUT_OF_ORDER_MS.to_string());
    let sizes = oracle("windows_oracle.py", &[&events, &out_of_order, &world.path("windows.json")]);
    for window in spans.as_object().unwrap().keys() {
        assert!(sizes[window].as_u64().unwrap() > 1_000, "{sizes}");
    }
}
