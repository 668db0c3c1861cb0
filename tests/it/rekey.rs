//! Several entities in one pipeline, and events keyed anew by the other one: on Kafka, by the whole binary, killed on the way,
//! against DuckDB.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use driftline::broker::embedded::EmbeddedBroker;
use driftline::broker::{Broker as _, Offsets, OutRecord, TopicSettings};
use rand::{Rng as _, SeedableRng as _};
use rstest::rstest;
use serde_json::{Value, json};

use crate::process::{World, oracle};
use crate::servers::{Kafka, unique};

const PARTITIONS: i32 = 3;
const EVENTS: usize = 12_000;
const OUT_OF_ORDER_MS: i64 = 5_000;
/// 2025-01-01, ms.
const START: i64 = 1_735_689_600_000;

const PIPELINE: &str = r#"
name = "NAME"
broker = { brokers = "${KAFKA_BROKERS}" }
offline = { url = "${OFFLINE_URL}", checkpoint = { interval = "50ms", rows = 500 } }
[entities.customer]
key = { customer_id = "string" }
[entities.product]
key = { product_id = "int64" }
[sources.orders]
topic = "NAME.orders"
format = "json"
fields = { customer_id = "string", product_id = "int64", at = "int64", amount = "float64" }
entity = "customer"
event_time = { field = "at", unit = "ms" }
out_of_order = "5s"
ahead = "36500d"
idle_after = "1h"
[rekey.orders_by_product]
source = "orders"
entity = "product"
partitions = 2
[features.sold]
source = "orders_by_product"
of = "amount"
functions = ["count", "last"]
windows = ["lifetime"]
[windows.customers]
source = "orders"
of = "amount"
functions = ["count", "sum", "first", "last"]
tumbling = "1m"
[windows.products]
source = "orders_by_product"
of = "amount"
functions = ["count", "sum", "first", "last"]
tumbling = "1m"
"#;

/// Of the same orders: what was sold of a product to a customer, which no source is keyed by, asked for by each order.
const PAIRS: &str = r#"
name = "NAME"
broker = { brokers = "${KAFKA_BROKERS:-}", path = "${LOG}", partitions = 3 }
online = { path = "${LOG}" }
offline = { url = "${OFFLINE_URL}", checkpoint = { interval = "50ms", rows = 500 } }
[entities.customer]
key = { customer_id = "string" }
[entities.pair]
key = { customer = "string", product_id = "int64" }
[sources.orders]
topic = "NAME.orders"
format = "json"
fields = { customer_id = "string", product_id = "int64", at = "int64", amount = "float64" }
entity = "customer"
event_time = { field = "at", unit = "ms" }
out_of_order = "5s"
ahead = "36500d"
idle_after = "1h"
[rekey.pairs]
source = "orders"
entity = "pair"
key = { customer = "customer_id" }
partitions = 2
[features.sold]
source = "pairs"
of = "amount"
functions = ["count", "last"]
windows = ["lifetime"]
[features.lately]
source = "pairs"
functions = ["count"]
windows = ["10m"]
exact = true
[score]
on = "pairs"
emit = "event_time"
model = "none"
batch = { rows = 300 }
"#;

struct Order {
    partition: i32,
    key: String,
    value: String,
    product: Option<i64>,
    at: i64,
    amount: f64,
}

/// Two hours of orders. Many are of the same instant, some out of order, some too late, and some of no product.
fn orders() -> Vec<Order> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
    let order = |number: usize| {
        let customer = (200.0 * rng.random::<f64>().powi(3)) as i32;
        let product = rng.random_bool(0.98).then(|| (40.0 * rng.random::<f64>().powi(2)) as i64);
        let now = START + i64::try_from(number).unwrap() * 7_200_000 / EVENTS as i64;
        let back = match rng.random_range(0..100) {
            0 => 3 * OUT_OF_ORDER_MS,
            1..10 => rng.random_range(0..OUT_OF_ORDER_MS - 2_000),
            _ => 0,
        };
        let at = (now - back) / 2_000 * 2_000;
        let amount = f64::from(rng.random_range(1..100_000)) / 100.0;
        let shown = product.map_or("null".to_owned(), |product| product.to_string());
        let value = format!(r#"{{"customer_id":"c{customer}","product_id":{shown},"at":{at},"amount":{amount}}}"#);
        Order { partition: customer % PARTITIONS, key: format!("c{customer}"), value, product, at, amount }
    };
    (0..EVENTS).map(order).collect()
}

fn compare(world: &World, rows: &Value) -> Value {
    fs::write(world.path("rows.json"), rows.to_string()).unwrap();
    let (events, out_of_order) = (world.path("events.jsonl"), OUT_OF_ORDER_MS.to_string());
    oracle("rekey_oracle.py", &[&events, &out_of_order, &world.path("rows.json")])
}

fn write_events(path: &Path, orders: &[Order]) {
    let mut offsets = [0_i64; PARTITIONS as usize];
    let mut lines = String::new();
    for order in orders {
        let offset = &mut offsets[usize::try_from(order.partition).unwrap()];
        writeln!(lines, r#"{{"partition":{},"offset":{offset},{}"#, order.partition, &order.value[1..]).unwrap();
        *offset += 1;
    }
    fs::write(path, lines).unwrap();
}

#[test]
fn features_by_another_entity_are_exact_however_often_the_process_is_killed() {
    let kafka = Kafka::start();
    let name = unique("rekey");
    let mut world = World::new();
    world.set("KAFKA_BROKERS", &kafka.address());
    let pipeline = world.define("pipeline", &PIPELINE.replace("NAME", &name));
    let topic = format!("{name}.orders");
    kafka.create(&topic, PARTITIONS);
    let orders = orders();
    write_events(&world.path("events.jsonl"), &orders);
    kafka.produce(&topic, orders.iter().map(|order| (order.partition, order.key.as_bytes(), order.value.as_bytes())));

    let run = ["run", &pipeline, "--until-end", "--listen", "none", "--view", "none", "--instance", "test"];
    let points = [
        "rekey.sent=kill@1",
        "rekey.after_commit=kill@1",
        "rekey.sent=kill@1",
        "features.after_window=kill@2",
        "publish.before_commit=kill@1",
        "broker.commit.after=kill@1",
        "offline.manifest_written=kill@1",
    ];
    world.killed_at(&run, &points);
    world.run(&run);

    let mut rows = BTreeMap::new();
    for (window, key) in [("customers", "customer_id"), ("products", "product_id")] {
        let records = kafka.consume(&format!("{name}.windows.{window}")).into_iter();
        let lines: Vec<String> =
            records.map(|record| String::from_utf8(record.value.expect("rows have a value")).unwrap()).collect();
        let path = world.path(&format!("{window}.jsonl"));
        fs::write(&path, lines.join("\n")).unwrap();
        rows.insert(window, json!({ "key": key, "rows": path }));
    }
    let counts = compare(&world, &json!(rows));
    for window in ["customers", "products"] {
        assert!(counts[window]["rows"].as_u64().unwrap() > 1_000, "{counts}");
    }

    // The ledger balances: each record of the source goes on once, byte for byte, or is one dead letter of this stage.
    let mut letters: HashMap<String, u64> = HashMap::new();
    for record in kafka.consume(&format!("{name}.dead-letters")) {
        let header =
            |name: &str| record.headers.iter().find(|(n, _)| n == name).map(|(_, v)| String::from_utf8_lossy(v));
        if header("driftline.stage").as_deref() == Some("rekey") {
            *letters.entry(header("driftline.reason").unwrap().into_owned()).or_default() += 1;
        }
    }
    let without_product = orders.iter().filter(|order| order.product.is_none()).count() as u64;
    assert_eq!(letters["null_key"], without_product);
    assert_eq!(letters["late"], counts["products"]["late"].as_u64().unwrap());
    assert_eq!(letters.len(), 2, "{letters:?}");
    let mut values: Vec<Vec<u8>> = Vec::new();
    let mut partition_of: HashMap<Vec<u8>, i32> = HashMap::new();
    for record in kafka.consume(&format!("{name}.orders.by-product")) {
        let Some(value) = record.value else { continue };
        let key = record.key.expect("events have a key");
        let event: Value = serde_json::from_slice(&value).unwrap();
        assert_eq!(key, event["product_id"].to_string().into_bytes());
        assert_eq!(*partition_of.entry(key).or_insert(record.partition), record.partition);
        values.push(value);
    }
    assert_eq!(values.len() as u64, orders.len() as u64 - letters.values().sum::<u64>());
    values.sort();
    let mut sent: Vec<&[u8]> = orders.iter().map(|order| order.value.as_bytes()).collect();
    sent.sort_unstable();
    assert!(values.iter().all(|value| sent.binary_search(&value.as_slice()).is_ok()), "bytes are as they were");

    // What is asked by product is the whole history of the product.
    let sold = &counts["products"]["newest"];
    for (product, (count, last)) in sold.as_object().unwrap().iter().map(|(p, v)| (p, (&v[0], &v[1]))).take(3) {
        let row: Value =
            serde_json::from_str(&world.run(&["get", &pipeline, product, "--entity", "product", "--json"])).unwrap();
        let text = row.to_string();
        assert!(
            text.contains(&format!("{count}")) && text.contains(&format!("{last}")),
            "{product}: {count} {last} {text}"
        );
    }
}

/// A row: customer, product, event time, orders and newest amount so far, orders of ten minutes.
type Row = (String, i64, i64, i64, f64, i64);

/// The row of each order that counts, worked out one by one: in the order of time, partition and offset.
fn rows_of_pairs(orders: &[Order]) -> Vec<Row> {
    let mut newest = [i64::MIN; PARTITIONS as usize];
    let mut counted: Vec<(i64, i32, usize)> = Vec::new();
    for (number, order) in orders.iter().enumerate().filter(|(_, order)| order.product.is_some()) {
        let newest = &mut newest[usize::try_from(order.partition).unwrap()];
        if order.at >= newest.saturating_sub(OUT_OF_ORDER_MS) {
            *newest = order.at.max(*newest);
            counted.push((order.at, order.partition, number));
        }
    }
    counted.sort_unstable();
    let mut times: HashMap<(&str, i64), Vec<i64>> = HashMap::new();
    let row = |(at, _, number): (i64, i32, usize)| {
        let (customer, product) = (&orders[number].key, orders[number].product.unwrap());
        let times = times.entry((customer, product)).or_default();
        times.push(at);
        let lately = times.iter().filter(|time| **time > at - 600_000).count();
        let count = |n: usize| i64::try_from(n).unwrap();
        (customer.clone(), product, at, count(times.len()), orders[number].amount, count(lately))
    };
    counted.into_iter().map(row).collect()
}

#[rstest]
#[case::embedded(None)]
#[case::kafka(Some(Kafka::shared()))]
fn events_keyed_anew_ask_for_the_features_of_a_composite_key(#[case] kafka: Option<&Kafka>) {
    let name = unique("pairs");
    let mut world = World::new();
    let log = world.path("log").display().to_string();
    world.set("LOG", &log);
    let pipeline = world.define("pipeline", &PAIRS.replace("NAME", &name));
    let topic = format!("{name}.orders");
    let orders = orders();
    let records = orders.iter().map(|order| (order.partition, order.key.as_bytes(), order.value.as_bytes()));
    if let Some(kafka) = kafka {
        world.set("KAFKA_BROKERS", &kafka.address());
        kafka.create(&topic, PARTITIONS);
        kafka.produce(&topic, records);
    } else {
        let broker = EmbeddedBroker::open(&world.path("log")).unwrap();
        broker.create_topic(&topic, &TopicSettings { partitions: 3, compacted: false, retention_ms: None }).unwrap();
        let mut producer = broker.producer(None).unwrap();
        for (partition, key, value) in records {
            let (partition, key, value) = (Some(partition), Some(key), Some(value));
            producer.send(OutRecord { topic: &topic, partition, key, value, ..OutRecord::default() }).unwrap();
        }
        producer.commit(&Offsets::new(), None).unwrap();
    }
    let run = ["features", &pipeline, "--until-end", "--listen", "none", "--view", "none", "--instance", "test"];
    world.killed_at(&run, &["rekey.sent=kill@2", "rekey.after_commit=kill@1", "features.after_commit=kill@1"]);
    world.run(&run);

    let values: Vec<Value> = match kafka {
        Some(kafka) => {
            let records = kafka.consume(&format!("{name}.features")).into_iter();
            records.map(|record| serde_json::from_slice(&record.value.unwrap()).unwrap()).collect()
        }
        None => {
            let lines = world.run(&["topic", "tail", &format!("{name}.features"), "--embedded", &log]);
            let value = |line: &str| -> Value {
                let record: Value = serde_json::from_str(line).unwrap();
                serde_json::from_str(record["value"].as_str().unwrap()).unwrap()
            };
            lines.lines().map(value).collect()
        }
    };
    let row = |value: &Value| -> Row {
        let (entity, features) = (&value["entity"], &value["features"]);
        let whole = |value: &Value| value.as_i64().unwrap_or_else(|| panic!("{value} is no whole number"));
        (
            entity["customer"].as_str().unwrap().to_owned(),
            whole(&entity["product_id"]),
            whole(&value["event_time"]),
            whole(&features["sold_count_lifetime"]),
            features["sold_last_lifetime"].as_f64().unwrap(),
            whole(&features["lately_count_10m"]),
        )
    };
    let mut found: Vec<Row> = values.iter().map(row).collect();
    let mut expected = rows_of_pairs(&orders);
    assert!(expected.iter().filter(|row| row.3 > 20 && row.5 < row.3).count() > 1_000, "pairs come again");
    for rows in [&mut found, &mut expected] {
        rows.sort_by(|a, b| (&a.0, a.1, a.3).cmp(&(&b.0, b.1, b.3)));
    }
    assert_eq!(found.len(), expected.len());
    let differs = found.iter().zip(&expected).find(|(found, expected)| found != expected);
    assert_eq!(differs, None, "the first row that differs");
    let (customer, product, .., count, last, _) = expected.iter().max_by_key(|row| row.3).unwrap();
    let stored = world.run(&["get", &pipeline, customer, &product.to_string(), "--json"]);
    let has = |value: String| stored.contains(&value);
    assert!(has(count.to_string()) && has(last.to_string()), "{customer}, {product}: {count} {last} {stored}");
}

#[test]
fn a_topic_that_would_lose_events_is_refused_or_told() {
    let kafka = Kafka::shared();
    let start = |settings: &[(&str, &str)]| {
        let name = unique("kept");
        let mut world = World::new();
        world.set("LOG", &world.path("log").display().to_string());
        world.set("KAFKA_BROKERS", &kafka.address());
        let pipeline = world.define("pipeline", &PAIRS.replace("NAME", &name));
        kafka.create(&format!("{name}.orders"), PARTITIONS);
        kafka.create_with(&format!("{name}.orders.by-pair"), 2, settings);
        let output = world.output(&["features", &pipeline, "--until-end", "--listen", "none", "--view", "none"]);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for policy in ["compact", "compact,delete"] {
        let (code, said) = start(&[("cleanup.policy", policy)]);
        assert!(code == Some(1) && said.contains("is compacted") && said.contains("[rekey.pairs]"), "{said}");
    }
    let (code, said) = start(&[("retention.ms", "604800000")]);
    assert!(code == Some(0) && said.contains("keeps 7d of events, which are to be kept for ever"), "{said}");
    let (code, said) = start(&[("retention.ms", "-1"), ("retention.bytes", "1000000")]);
    assert!(code == Some(0) && said.contains("keeps 1000000 bytes a partition"), "{said}");
    let (code, said) = start(&[("retention.ms", "-1")]);
    assert!(code == Some(0) && !said.contains("of events, which"), "{said}");
}
