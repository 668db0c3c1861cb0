//! Tables: on Kafka, from a topic that was compacted, by the whole binary, killed on the way, against DuckDB's ASOF JOIN.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;

use driftline::runtime::clock;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::process::{World, oracle};
use crate::servers::{Kafka, START, unique, until};

const PARTITIONS: i32 = 3;
const CUSTOMERS: i64 = 60;
const OUT_OF_ORDER_MS: i64 = 5_000;
/// 2025-01-01, ms.
const BEGIN: i64 = 1_735_689_600_000;
/// Half of it happens in so many milliseconds, then comes a gap, then the other half.
const SPAN: i64 = 3_600_000;
const GAP: i64 = 3_600_000;

const PIPELINE: &str = r#"
name = "NAME"
broker = { brokers = "${KAFKA_BROKERS}" }
offline = { url = "${OFFLINE_URL}", checkpoint = { interval = "50ms", rows = 500 } }
[entities.customer]
key = { customer_id = "string" }
[sources.orders]
topic = "NAME.orders"
format = "json"
fields = { customer_id = "string", at = "int64" }
event_time = { field = "at", unit = "ms" }
out_of_order = "5s"
ahead = "36500d"
[tables.profile]
topic = "NAME.profiles"
format = "json"
fields = { customer_id = "string", since = "int64", age = "int64", city = "string", vip = "boolean", score = "float64", born = "timestamp" }
event_time = { field = "since", unit = "ms" }
out_of_order = "5s"
ahead = "36500d"
[tables.plan]
topic = "NAME.plans"
format = "json"
fields = { customer = "string", name = "string", price = "float64" }
key = { customer_id = "customer" }
record_key = "json"
out_of_order = "5s"
where = "price > 0"
derive = { dear = "price > 50" }
[score]
on = "orders"
emit = "event_time"
model = "none"
"#;

struct Feed {
    rng: rand_chacha::ChaCha8Rng,
}

/// A record: its partition, timestamp, key and value.
type Sent = (i32, i64, String, Option<String>);

impl Feed {
    /// Someone, and an instant within the bound behind the one after the `number`-th of `count` parts of the span.
    fn next(&mut self, number: i64, count: i64) -> (i64, i64) {
        let now = BEGIN + number * 2 * SPAN / count + if 2 * number < count { 0 } else { GAP };
        let back = if self.rng.random_bool(0.2) { self.rng.random_range(0..OUT_OF_ORDER_MS - 1_000) } else { 0 };
        // Whole seconds, so that there are ties.
        (self.rng.random_range(0..CUSTOMERS), (now - back) / 1_000 * 1_000)
    }

    fn profiles(&mut self, numbers: std::ops::Range<i64>, count: i64) -> Vec<Sent> {
        let row = |number: i64| {
            let (customer, since) = self.next(number, count);
            let mut some = |value: Value| if self.rng.random_bool(0.15) { Value::Null } else { value };
            let value = json!({
                "customer_id": format!("c{customer}"), "since": since, "age": some(json!(number % 90)),
                "city": some(json!(["Bern", "Köln", "", "Győr"][number as usize % 4])),
                "vip": some(json!(number % 3 == 0)), "score": some(json!(number as f64 / 7.0)),
                "born": some(json!(number * 86_400_000 - 1_000)),
            });
            let value = (number % 11 != 0).then(|| value.to_string());
            ((customer % i64::from(PARTITIONS)) as i32, since, format!("c{customer}"), value)
        };
        numbers.map(row).collect()
    }

    fn plans(&mut self, numbers: std::ops::Range<i64>, count: i64) -> Vec<Sent> {
        let row = |number: i64| {
            let (customer, since) = self.next(number, count);
            let price = if number % 7 == 0 { json!(0.0) } else { json!((number % 100) as f64) };
            let value =
                json!({ "customer": format!("c{customer}"), "name": format!("plan {}", number % 5), "price": price });
            let key = json!({ "customer": format!("c{customer}") }).to_string();
            let value = (number % 13 != 0).then(|| value.to_string());
            ((customer % i64::from(PARTITIONS)) as i32, since, key, value)
        };
        numbers.map(row).collect()
    }
}

fn send(kafka: &Kafka, topic: &str, records: &[Sent]) {
    kafka.produce_at(
        topic,
        records.iter().map(|(partition, timestamp, key, value)| {
            (*partition, Some(*timestamp), Some(key.as_bytes()), value.as_deref().map(str::as_bytes))
        }),
    );
}

/// The rows at these places of their partitions, as lines for the oracle.
fn facts(sent: &[Sent], is_kept: impl Fn(i32, i64) -> bool) -> String {
    let (mut offsets, mut lines) = ([0_i64; PARTITIONS as usize], String::new());
    for (partition, timestamp, key, value) in sent {
        let offset = offsets[*partition as usize];
        offsets[*partition as usize] += 1;
        if is_kept(*partition, offset) {
            let key = serde_json::from_str::<Value>(key).map_or(json!(key), |key| key["customer"].clone());
            let mut row = value.as_deref().map_or(json!({}), |value| serde_json::from_str(value).unwrap());
            (row["customer_id"], row["since"], row["offset"]) = (key, json!(timestamp), json!(offset));
            writeln!(lines, "{row}").unwrap();
        }
    }
    lines
}

/// Where the records of a topic that was compacted lie.
fn places(kafka: &Kafka, topic: &str) -> Vec<(i32, i64, Option<Vec<u8>>)> {
    kafka.consume(topic).into_iter().map(|record| (record.partition, record.offset, record.key)).collect()
}

#[test]
fn events_are_joined_with_the_facts_as_of_their_time() {
    let kafka = Kafka::start();
    let name = unique("tables");
    let mut world = World::new();
    world.set("KAFKA_BROKERS", &kafka.address());
    let pipeline = world.define("pipeline", &PIPELINE.replace("NAME", &name));
    let topic = |of: &str| format!("{name}.{of}");
    kafka.create(&topic("orders"), PARTITIONS);
    // What was written before the gap is compacted, and what was written after it is not.
    let lag = clock::now_ms() - (BEGIN + SPAN + GAP / 2);
    let settings = [
        ("cleanup.policy", "compact"),
        ("min.cleanable.dirty.ratio", "0.0001"),
        ("segment.ms", "100"),
        ("min.compaction.lag.ms", &lag.to_string()),
    ];
    kafka.create_with(&topic("profiles"), PARTITIONS, &settings);
    kafka.create_with(&topic("plans"), PARTITIONS, &[("cleanup.policy", "compact")]);

    let mut feed = Feed { rng: rand_chacha::ChaCha8Rng::seed_from_u64(11) };
    const ROWS: i64 = 3_000;
    let profiles = feed.profiles(0..ROWS, ROWS);
    let plans = feed.plans(0..ROWS, ROWS);
    // Each part begins a segment.
    profiles.chunks(250).for_each(|part| send(&kafka, &topic("profiles"), part));
    send(&kafka, &topic("plans"), &plans);
    let before_gap =
        |partition: i32| profiles[..ROWS as usize / 2].iter().filter(|record| record.0 == partition).count() as i64;
    until("the first half is compacted", START, || {
        let mut keys = BTreeSet::new();
        let old = places(&kafka, &topic("profiles")).into_iter();
        old.filter(|(partition, offset, _)| *offset < before_gap(*partition)).all(|(_, _, key)| keys.insert(key))
    });
    let kept = places(&kafka, &topic("profiles"));
    assert!((kept.len() as i64) < 2 * ROWS / 3);
    let is_kept = |partition, offset| kept.iter().any(|place| (place.0, place.1) == (partition, offset));
    fs::write(world.path("profiles.jsonl"), facts(&profiles, is_kept)).unwrap();
    fs::write(world.path("plans.jsonl"), facts(&plans, |_, _| true)).unwrap();
    let (mut offsets, mut lines, mut orders) = ([0_i64; PARTITIONS as usize], String::new(), Vec::new());
    for number in 0..4 * ROWS {
        let (customer, at) = feed.next(number, 4 * ROWS);
        let (partition, customer) = (customer % i64::from(PARTITIONS), format!("c{customer}"));
        let offset = &mut offsets[partition as usize];
        writeln!(lines, "{}", json!({ "partition": partition, "offset": offset, "customer_id": customer, "at": at }))
            .unwrap();
        *offset += 1;
        orders.push((partition as i32, customer.clone(), json!({ "customer_id": customer, "at": at }).to_string()));
    }
    kafka.produce(
        &topic("orders"),
        orders.iter().map(|(partition, key, value)| (*partition, key.as_bytes(), value.as_bytes())),
    );
    fs::write(world.path("orders.jsonl"), lines).unwrap();
    let run = ["features", &pipeline, "--until-end", "--listen", "none", "--view", "none", "--instance", "test"];
    let points = [
        "features.after_window=kill@2",
        "publish.before_commit=kill@1",
        "broker.commit.after=kill@1",
        "offline.manifest_written=kill@1",
    ];
    world.killed_at(&run, &points);
    world.run(&run);
    assert_eq!(places(&kafka, &topic("profiles")), kept, "nothing was compacted meanwhile");

    let mut rows = String::new();
    for record in kafka.consume(&topic("features")) {
        let record: Value = serde_json::from_slice(&record.value.unwrap()).unwrap();
        let mut row = record["features"].clone();
        (row["customer_id"], row["event_time"]) =
            (record["entity"]["customer_id"].clone(), record["event_time"].clone());
        (row["partition"], row["offset"]) = (record["source"]["partition"].clone(), record["source"]["offset"].clone());
        writeln!(rows, "{row}").unwrap();
    }
    fs::write(world.path("rows.jsonl"), rows).unwrap();
    let lines = ["orders", "profiles", "plans", "rows"].map(|of| world.path(&format!("{of}.jsonl")));
    let found = oracle("tables_oracle.py", &[&lines[0], &lines[1], &lines[2], &lines[3]]);
    assert_eq!(found["rows"], 4 * ROWS);
    assert!(found["profile"].as_i64().unwrap() > ROWS && found["plan"].as_i64().unwrap() > ROWS, "{found}");
    assert_eq!(kafka.consume(&topic("dead-letters")).len(), 0);
}

#[test]
fn a_table_with_other_partitions_is_refused() {
    let kafka = Kafka::shared();
    let name = unique("tables");
    let mut world = World::new();
    world.set("KAFKA_BROKERS", &kafka.address());
    let pipeline = world.define("pipeline", &PIPELINE.replace("NAME", &name));
    for (of, partitions) in [("orders", 3), ("profiles", 3), ("plans", 2)] {
        kafka.create(&format!("{name}.{of}"), partitions);
    }
    let refused = world.output(&["features", &pipeline, "--until-end", "--listen", "none", "--view", "none"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    assert!(said.contains("sources and tables") && said.contains(&format!("{name}.plans has 2")), "{said}");
}
