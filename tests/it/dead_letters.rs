//! `driftline dead-letters`: what could not be used is found, shown, and put back once, whatever happens to the replay.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use driftline::broker::embedded::EmbeddedBroker;
use driftline::broker::kafka::KafkaBroker;
use driftline::broker::{
    Broker, Header, NextOffset, Offsets, OutRecord, Producer, Records, SchemaRegistry, TopicPartition, TopicSettings,
};
use driftline::config::plan::GroupProtocol;
use driftline::runtime::shutdown::Stop;
use driftline::source::DeadLetter;
use driftline::source::avro::{AvroEncoder, AvroSchema};
use driftline::source::dead_letter::{self, Filter, Replay, ReplayError};
use serde_json::{Value, json};

use crate::process::World;
use crate::servers::{self, Kafka, unique};

const LIMIT: Duration = Duration::from_secs(60);
const VISIT: &str = r#"{"type": "record", "name": "Visit", "fields": [{"name": "customer_id", "type": ["null", "string"]},
    {"name": "at", "type": "long"}, {"name": "pages", "type": "int"}]}"#;
const PIPELINE: &str = r#"
name = "NAME"
[broker]
brokers = "${KAFKA_BROKERS:-}"
schema_registry = "${SCHEMA_REGISTRY_URL:-}"
partitions = 2
replication = 1
[offline]
url = "${OFFLINE_URL}"
[entities.customer]
key = { customer_id = "string" }
[sources.orders]
topic = "NAME.orders"
format = "json"
fields = { customer_id = "string", at = "int64", amount = "float64" }
event_time = { field = "at", unit = "ms" }
[sources.visits]
topic = "NAME.visits"
format = "avro"
schema = "visit.avsc"
event_time = { field = "at", unit = "ms" }
[features.spend]
source = "orders"
of = "amount"
functions = ["sum"]
windows = ["1h"]
[features.visits]
source = "visits"
functions = ["count"]
windows = ["1h"]
[score]
on = "orders"
model = "m"
features = ["spend_sum_1h", "visits_count_1h"]
"#;

/// A pipeline in a folder of its own.
struct Shop {
    world: World,
    name: String,
}

impl Shop {
    fn new() -> Self {
        let shop = Self { world: World::new(), name: unique("letters") };
        shop.world.define("pipeline", &PIPELINE.replace("NAME", &shop.name));
        std::fs::write(shop.world.path("pipeline/visit.avsc"), VISIT).unwrap();
        shop
    }

    fn topic(&self, what: &str) -> String {
        format!("{}.{what}", self.name)
    }

    fn pipeline(&self) -> String {
        self.world.path("pipeline").display().to_string()
    }

    /// Arguments of a command on this pipeline, on the embedded log.
    fn arguments(&self, command: &[&str], more: &[&str]) -> Vec<String> {
        let mut all: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
        all.push(self.pipeline());
        all.extend(["--set".to_owned(), format!("broker.path={}", self.world.path("log").display())]);
        all.extend(more.iter().map(|word| (*word).to_owned()));
        all
    }

    fn letters(&self, command: &str, more: &[&str]) -> String {
        let all = self.arguments(&["dead-letters", command], more);
        self.world.run(&all.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn json(&self, command: &str, more: &[&str]) -> Value {
        serde_json::from_str(&self.letters(command, &[more, &["--json"]].concat())).unwrap()
    }

    fn run(&self) {
        let all = self.arguments(&["features"], &["--until-end", "--listen", "none"]);
        self.world.run(&all.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// The embedded log, in this process: none of the binary's may run meanwhile.
    fn log(&self) -> EmbeddedBroker {
        EmbeddedBroker::open(&self.world.path("log")).unwrap()
    }

    fn create_inputs(&self, broker: &dyn Broker) {
        let settings = TopicSettings { partitions: 2, compacted: false, retention_ms: None };
        for source in ["orders", "visits"] {
            broker.create_topic(&self.topic(source), &settings).unwrap();
        }
    }
}

/// Partition, offset and all else of each record of a topic.
fn records(broker: &dyn Broker, topic: &str) -> Vec<Record> {
    let Some(info) = broker.topic(topic).unwrap() else { return Vec::new() };
    let mut all = Vec::new();
    for (number, (start, end)) in info.partitions.iter().enumerate() {
        let at = TopicPartition::new(topic, i32::try_from(number).unwrap());
        let mut next: NextOffset = *start;
        while next < *end {
            let (records, after) = broker.read(&at, next, 1000, LIMIT).unwrap();
            assert!(after > next);
            all.extend((0..records.len()).map(|row| Record::of(&records, row)));
            next = after;
        }
    }
    all
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    partition: i32,
    timestamp: i64,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<Header>,
}

impl Record {
    fn of(records: &Records, row: usize) -> Self {
        Self {
            partition: records.partition.partition,
            timestamp: records.timestamps[row],
            key: records.keys.get(row).map(<[u8]>::to_vec),
            value: records.values.get(row).map(<[u8]>::to_vec),
            headers: records.headers.iter().find(|(at, _)| *at == row).map_or_else(Vec::new, |(_, h)| h.clone()),
        }
    }

    fn send(&self, producer: &mut dyn Producer, topic: &str) {
        let (key, value) = (self.key.as_deref(), self.value.as_deref());
        let (partition, timestamp) = (Some(self.partition), Some(self.timestamp));
        producer.send(OutRecord { topic, partition, key, value, timestamp, headers: &self.headers }).unwrap();
    }
}

fn header(name: &str, value: &[u8]) -> Header {
    Header { name: name.to_owned(), value: value.to_owned() }
}

const NOON: i64 = 1_700_000_000_000;

/// Orders that nobody can use, and the word for each.
fn broken_orders() -> Vec<(&'static str, Record)> {
    let record = |partition, value: Option<&[u8]>| Record {
        partition,
        timestamp: NOON + 500,
        key: Some(b"\xff\x00key".to_vec()),
        value: value.map(<[u8]>::to_vec),
        headers: vec![header("trace", b"\x80\x81"), header("driftline.other", b"kept")],
    };
    vec![
        ("malformed", record(1, Some(b"\xfe\xff\x00 is no text"))),
        ("malformed", record(0, Some(b"{\"customer_id\":"))),
        ("malformed", record(1, Some(b""))),
        ("null_value", record(1, None)),
        (
            "wrong_type",
            Record { key: None, ..record(0, Some(br#"{"customer_id":"a","at":1700000000000,"amount":"x"}"#)) },
        ),
        ("null_key", Record { headers: Vec::new(), ..record(0, Some(br#"{"at":1700000000000,"amount":1}"#)) }),
    ]
}

/// A log on which the broken orders lie among good ones, and a visit without a customer.
fn filled() -> Shop {
    let shop = Shop::new();
    let broker = shop.log();
    shop.create_inputs(&broker);
    let mut producer = broker.producer(None).unwrap();
    let good = |partition, at: i64| Record {
        partition,
        timestamp: NOON,
        key: None,
        value: Some(format!(r#"{{"customer_id":"a","at":{at},"amount":1}}"#).into_bytes()),
        headers: Vec::new(),
    };
    for (_, order) in broken_orders() {
        good(order.partition, NOON).send(&mut *producer, &shop.topic("orders"));
        order.send(&mut *producer, &shop.topic("orders"));
    }
    // An hour later than allowed.
    good(0, NOON - 3_600_000).send(&mut *producer, &shop.topic("orders"));
    let encoder = AvroEncoder::plain(AvroSchema::parse(VISIT).unwrap());
    let visit = encoder.to_vec(&json!({"customer_id": null, "at": NOON, "pages": 3})).unwrap();
    let visit = Record { value: Some(visit), ..good(1, NOON) };
    visit.send(&mut *producer, &shop.topic("visits"));
    producer.commit(&Offsets::new(), None).unwrap();
    drop((producer, broker));
    shop.run();
    shop
}

#[test]
fn letters_are_counted_by_stage_reason_and_source() {
    let shop = filled();
    let listed = shop.json("list", &[]);
    let groups: BTreeSet<String> = listed["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| format!("{} {} {} {} {}", g["stage"], g["reason"], g["source"], g["letters"], g["replayed"]))
        .collect();
    let expected = [
        r#""decode" "malformed" "orders" 3 0"#,
        r#""decode" "null_value" "orders" 1 0"#,
        r#""decode" "wrong_type" "orders" 1 0"#,
        r#""decode" "null_key" "orders" 1 0"#,
        r#""window" "late" "orders" 1 0"#,
        r#""decode" "null_key" "visits" 1 0"#,
    ];
    assert_eq!(groups, expected.map(str::to_owned).into());
    assert_eq!(listed["letters"], 8);
    assert_eq!(listed["groups"][0]["reason"], "malformed", "the largest comes first: {listed}");

    let letters = |more: &[&str]| shop.json("list", more)["letters"].as_u64().unwrap();
    assert_eq!(letters(&["--reason", "null_key"]), 2);
    assert_eq!(letters(&["--reason", "null_key", "--source", "visits"]), 1);
    assert_eq!(letters(&["--source", &shop.topic("orders")]), 7);
    assert_eq!(letters(&["--stage", "window"]), 1);
    assert_eq!(letters(&["--since", "1h"]), 8);
    assert_eq!(letters(&["--since", "9999-01-01"]), 0);
    assert_eq!(shop.letters("list", &["--since", "9999-01-01"]), "no dead letters\n");

    let table = shop.letters("list", &["-n", "2"]);
    assert_eq!(table.lines().filter(|line| line.starts_with("decode")).count(), 2, "{table}");
    assert!(table.contains("… and 4 smaller groups") && table.contains("8 dead letters"), "{table}");

    let each: Vec<Value> = shop
        .letters("list", &["--each", "--json", "--reason", "malformed", "-n", "2"])
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(each.len(), 2);
    assert!(each.iter().all(|letter| letter["reason"] == "malformed" && letter["letter"].is_string()), "{each:?}");
    assert!(shop.letters("list", &["--each", "-n", "1"]).contains("… 7 older letters"));
}

/// The letter of this reason whose record was the `nth` one of it.
fn letter(shop: &Shop, reason: &str, source: &str, nth: usize) -> String {
    let lines = shop.letters("list", &["--each", "--json", "--reason", reason, "--source", source]);
    let mut found: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    found.sort_by_key(|l| (l["partition"].as_i64(), l["offset"].as_i64()));
    found[nth]["letter"].as_str().unwrap().to_owned()
}

#[test]
fn a_letter_is_shown_whole_and_decoded_where_it_can_be() {
    let shop = filled();
    let wrong = shop.json("show", &[&letter(&shop, "wrong_type", "orders", 0)]);
    assert_eq!(
        (&wrong["key"], &wrong["decoded"]["amount"], &wrong["partition"]),
        (&Value::Null, &json!("x"), &json!(0))
    );
    assert_eq!(wrong["timestamp"], "2023-11-14T22:13:20.500Z");
    assert!(wrong["error"].as_str().unwrap().contains("'amount'"), "{wrong}");
    assert_eq!(wrong["headers"][0], json!({"name": "trace", "value_base64": "gIE="}));
    assert_eq!(wrong["headers"][1], json!({"name": "driftline.other", "value": "kept"}));

    // In partition 1 the bytes that are no text come first, the empty value second.
    let bytes = letter(&shop, "malformed", "orders", 1);
    let raw = shop.json("show", &[&bytes]);
    assert_eq!((&raw["key_base64"], raw.get("decoded")), (&json!("/wBrZXk="), None), "{raw}");
    let text = shop.letters("show", &[&bytes]);
    assert!(text.contains("key        0xff006b6579\n"), "{text}");
    assert!(text.contains("00000000  fe ff 00 20 69 73 20 6e 6f 20 74 65 78 74        ... is no text\n"), "{text}");

    let visit = shop.json("show", &[&letter(&shop, "null_key", "visits", 0)]);
    assert_eq!(visit["decoded"], json!({"customer_id": null, "at": NOON, "pages": 3}));
    assert!(shop.letters("show", &[&letter(&shop, "null_value", "orders", 0)]).contains("value      none\n"));

    for (named, code, said) in [("0:99999", 1, "holds"), ("7:0", 1, "partitions"), ("x", 2, "PARTITION:OFFSET")] {
        let all = shop.arguments(&["dead-letters", "show"], &[named]);
        let output = shop.world.output(&all.iter().map(String::as_str).collect::<Vec<_>>());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && errors.contains(said), "{named}: {errors}");
    }
}

#[test]
fn records_go_back_as_they_were_and_once() {
    let shop = filled();
    let orders = shop.topic("orders");
    let before = records(&shop.log(), &orders);

    let dry = shop.json("replay", &["--dry-run", "--source", "orders"]);
    assert_eq!((&dry["replayed"], &dry["topics"][&orders]), (&json!(7), &json!(7)));
    assert_eq!(records(&shop.log(), &orders), before);
    assert!(shop.log().topic(&shop.topic("dead-letters-replayed")).unwrap().is_none(), "a dry run makes no topic");

    // By parts: a filter, then a limit, then the rest, then nothing.
    let replay = |more: &[&str]| shop.json("replay", more)["replayed"].as_u64().unwrap();
    assert_eq!(replay(&["--reason", "malformed"]), 3);
    assert_eq!(replay(&["--source", "orders", "--limit", "1"]), 1);
    assert_eq!(replay(&["--stage", "decode", "--source", "orders"]), 2);
    let rest = shop.json("replay", &["--source", "orders", "--reason", "malformed"]);
    assert_eq!((&rest["replayed"], &rest["left_alone"]["replayed_before"]), (&json!(0), &json!(3)));

    let mut expected: Vec<Record> = broken_orders()
        .into_iter()
        .map(|(_, mut order)| {
            order.headers.push(header("driftline.replays", b"1"));
            order
        })
        .collect();
    let after = records(&shop.log(), &orders);
    let mut again: Vec<Record> = after.into_iter().filter(|record| !before.contains(record)).collect();
    let by_content = |record: &Record| (record.partition, record.value.clone(), record.key.clone());
    expected.sort_by_key(by_content);
    again.sort_by_key(by_content);
    assert_eq!(again, expected);

    // What dies again is a new letter, of which a replay knows how often it was replayed.
    shop.run();
    let listed = shop.json("list", &["--reason", "malformed"]);
    assert_eq!((&listed["groups"][0]["letters"], &listed["groups"][0]["replayed"]), (&json!(6), &json!(3)));
    let guarded = shop.json("replay", &["--reason", "malformed", "--max-replays", "1"]);
    assert_eq!((&guarded["replayed"], &guarded["left_alone"]["died_too_often"]), (&json!(0), &json!(3)));
    assert_eq!(replay(&["--reason", "malformed"]), 3);
    shop.run();
    let newest = shop.json("show", &[&letter(&shop, "malformed", "orders", 2)]);
    assert_eq!(newest["replays"], 2, "{newest}");
}

/// Letters as the stages write them, of records of `topic`.
fn write_letters(broker: &dyn Broker, to: &str, letters: impl IntoIterator<Item = DeadLetter>) {
    let mut producer = broker.producer(None).unwrap();
    for letter in letters {
        let headers = letter.out_headers();
        producer.send(letter.to_record(to, &headers)).unwrap();
    }
    producer.commit(&Offsets::new(), None).unwrap();
}

fn dead(topic: &str, partition: i32, offset: i64, reason: &'static str) -> DeadLetter {
    DeadLetter {
        partition: TopicPartition::new(topic, partition),
        offset,
        timestamp: NOON,
        key: None,
        value: Some(format!("{topic}/{partition}/{offset}").into_bytes()),
        headers: Vec::new(),
        stage: "decode",
        reason,
        error: String::new(),
    }
}

#[test]
fn letters_that_must_not_go_back_are_left_alone_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let broker = EmbeddedBroker::open(folder.path()).unwrap();
    for topic in ["t", "letters"] {
        broker.create_topic(topic, &TopicSettings { partitions: 1, compacted: false, retention_ms: None }).unwrap();
    }
    write_letters(
        &broker,
        "letters",
        [
            dead("t", 0, 1, "malformed"),
            // At-least-once delivery may write a letter twice; a topic made anew may hold another record at the offset.
            dead("t", 0, 1, "malformed"),
            DeadLetter { timestamp: NOON + 1, ..dead("t", 0, 1, "malformed") },
            dead("t", 1, 2, "malformed"),
            dead("t", -1, 2, "malformed"),
            dead("gone", 0, 2, "malformed"),
            dead("t", 0, 3, "unscorable"),
            DeadLetter { timestamp: -1, value: None, ..dead("t", 0, 4, "unscorable") },
        ],
    );
    let mut producer = broker.producer(None).unwrap();
    producer.send(OutRecord { topic: "letters", value: Some(b"foreign"), ..OutRecord::default() }).unwrap();
    producer.commit(&Offsets::new(), None).unwrap();

    let replay = |filter: Filter| {
        let what = Replay {
            letters: "letters",
            marks: "marks",
            transactional_id: "replay",
            filter,
            limit: None,
            most_replays: 3,
            dry_run: false,
        };
        dead_letter::replay(&broker, &what, &Stop::new()).unwrap()
    };
    let report = replay(Filter::default());
    assert_eq!((report.total(), report.already, report.applied, report.expired, report.foreign), (2, 1, 1, 1, 1));
    let nowhere: BTreeMap<Arc<str>, u64> = [("t".into(), 2), ("gone".into(), 1)].into();
    assert_eq!(report.nowhere, nowhere);
    let report = replay(Filter { reason: Some("unscorable".into()), ..Filter::default() });
    assert_eq!((report.total(), report.applied, report.expired), (1, 0, 1));
    assert_eq!(records(&broker, "t").len(), 3);
}

#[test]
fn an_embedded_log_is_neither_made_nor_shared() {
    let shop = Shop::new();
    for command in [&["list"][..], &["show"], &["replay"]] {
        let more: &[&str] = if command == ["show"] { &["0"] } else { &[] };
        let all = shop.arguments(&[&["dead-letters"], command].concat(), more);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let output = shop.world.output(&all);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && errors.contains("holds no embedded log"), "{errors}");
        assert!(!shop.world.path("log").exists());
    }
    let log = shop.log();
    let all = shop.arguments(&["dead-letters", "list"], &[]);
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let output = shop.world.output(&all);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && errors.contains("in use by another driftline process"), "{errors}");
    drop(log);
    let output = shop.world.output(&all);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && errors.contains("has not run there yet"), "{errors}");
}

/// A pipeline on Kafka with `count` letters of its orders.
fn on_kafka(count: i64) -> (Shop, KafkaBroker) {
    let mut shop = Shop::new();
    let kafka = Kafka::shared();
    shop.world.set("KAFKA_BROKERS", &kafka.address());
    let broker = KafkaBroker::open(&kafka.address(), &BTreeMap::new(), 1, GroupProtocol::default(), "test").unwrap();
    shop.create_inputs(&broker);
    let letters = shop.topic("dead-letters");
    broker.create_topic(&letters, &TopicSettings { partitions: 1, compacted: false, retention_ms: None }).unwrap();
    let orders = shop.topic("orders");
    let partition = |n: i64| i32::try_from(n % 2).unwrap();
    write_letters(&broker, &letters, (0..count).map(|n| dead(&orders, partition(n), n, "malformed")));
    (shop, broker)
}

/// Every letter has gone back to its partition, once.
fn all_are_back_once(shop: &Shop, broker: &dyn Broker, count: i64) {
    let orders = shop.topic("orders");
    let mut back: Vec<(i32, String)> = records(broker, &orders)
        .into_iter()
        .map(|record| (record.partition, String::from_utf8(record.value.unwrap()).unwrap()))
        .collect();
    let mut expected: Vec<(i32, String)> =
        (0..count).map(|n| (i32::try_from(n % 2).unwrap(), format!("{orders}/{}/{n}", n % 2))).collect();
    back.sort();
    expected.sort();
    assert!(back == expected, "{} records are back instead of {count}", back.len());
}

#[test]
fn a_killed_replay_is_finished_by_the_next_one_and_nothing_is_doubled() {
    const COUNT: i64 = 3500;
    let (shop, broker) = on_kafka(COUNT);
    let pipeline = shop.pipeline();
    // Letters are sent and the commit is not asked for; then it has been, and nobody has heard of it.
    for failpoint in ["broker.commit.before=kill@2", "broker.commit.after=kill@1", "broker.commit.before=kill@1"] {
        let mut command = shop.world.command(&["dead-letters", "replay", &pipeline]);
        let output = command.env("DRIFTLINE_FAILPOINTS", failpoint).output().unwrap();
        assert_eq!(output.status.code(), None, "{failpoint}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(records(&broker, &shop.topic("orders")).len(), 2000, "two transactions were committed");
    let mut command = shop.world.command(&["dead-letters", "replay", &pipeline, "--json"]);
    let output = command.env("DRIFTLINE_FAILPOINTS", "broker.commit.before=error@1").output().unwrap();
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&told["replayed"], &told["left_alone"]["replayed_before"]), (&json!(1500), &json!(2000)));
    all_are_back_once(&shop, &broker, COUNT);
}

#[test]
fn of_two_replays_at_once_the_later_one_wins_and_nothing_is_doubled() {
    const COUNT: i64 = 1200;
    let (shop, broker) = on_kafka(COUNT);
    let (pipeline, release) = (shop.pipeline(), shop.world.path("release"));
    let mut command = shop.world.command(&["dead-letters", "replay", &pipeline]);
    command.env("DRIFTLINE_FAILPOINTS", "broker.commit.before=pause@2").env("DRIFTLINE_FAILPOINT_RELEASE", &release);
    let mut first = shop.world.start(command);
    let marks = shop.topic("dead-letters-replayed");
    first.until("it has committed once", || !records(&broker, &marks).is_empty());
    let later: Value = serde_json::from_str(&shop.world.run(&["dead-letters", "replay", &pipeline, "--json"])).unwrap();
    assert_eq!((&later["replayed"], &later["left_alone"]["replayed_before"]), (&json!(200), &json!(1000)));
    std::fs::write(release, "").unwrap();
    assert_eq!(first.end().code(), Some(1));
    assert!(first.printed().contains(&ReplayError::TakenOver.to_string()), "{}", first.printed());
    all_are_back_once(&shop, &broker, COUNT);
}

#[test]
fn framed_records_are_shown_with_the_schemas_of_the_registry() {
    let (mut shop, broker) = on_kafka(0);
    let url = servers::SchemaRegistry::shared().url();
    shop.world.set("SCHEMA_REGISTRY_URL", &url);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let registry = SchemaRegistry::new(&url, runtime.handle().clone()).unwrap();
    let written = r#"{"type": "record", "name": "Visit", "fields": [{"name": "who", "type": "string"}]}"#;
    let id = registry.register(&format!("{}-value", shop.topic("visits")), written).unwrap();
    let value = AvroEncoder::framed(AvroSchema::parse(written).unwrap(), id).to_vec(&json!({"who": "Ada"})).unwrap();
    let letters = [
        DeadLetter { value: Some(value), ..dead(&shop.topic("visits"), 0, 0, "incompatible_schema") },
        DeadLetter { value: Some(b"\0\0\0\0\x07{\"a\":1}".to_vec()), ..dead(&shop.topic("orders"), 0, 1, "null_key") },
    ];
    write_letters(&broker, &shop.topic("dead-letters"), letters);
    let show = |letter: &str| -> Value {
        serde_json::from_str(&shop.world.run(&["dead-letters", "show", &shop.pipeline(), letter, "--json"])).unwrap()
    };
    assert_eq!(show("0:0")["decoded"], json!({"who": "Ada"}));
    assert_eq!(show("1")["decoded"], json!({"a": 1}));
}
