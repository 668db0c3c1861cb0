//! A changed definition beside the one that serves: bootstrapped, compared, switched to under load and back, by the whole
//! binary on Kafka and Redis, killed at every step.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use driftline::broker::{Broker, Offsets, OutRecord, TopicSettings};
use serde_json::Value;

use crate::process::{World, killed_at, root};
use crate::servers::{Kafka, Process, Redis, unique};

/// 2025-01-01, ms.
const FIRST_DAY: i64 = 1_735_689_600_000;
const PARTITIONS: usize = 2;
const CUSTOMERS: usize = 40;
/// A minute passes between two purchases: less than seven days in all, so that windows of seven days and more hold everything.
const EVENTS: usize = 6_000;
/// Version 2 counts purchases of more than this.
const LEAST: f64 = 60.0;

fn amount(n: usize) -> f64 {
    1.25 * (1 + n % 100) as f64
}

fn quantity(n: usize) -> i64 {
    1 + i64::try_from(n % 4).unwrap()
}

/// Partition and offset of purchase number `n`.
fn at(n: usize) -> (usize, usize) {
    let partition = n % CUSTOMERS % PARTITIONS;
    // Customers alternate between two partitions.
    (partition, n / PARTITIONS)
}

/// What each definition says of a purchase, computed one by one: (customer's items, spend of version 1, of version 2). A sum
/// of nothing is 0.
fn oracle() -> Vec<(i64, f64, f64)> {
    let mut customers = vec![(0, 0.0, 0.0); CUSTOMERS];
    (0..EVENTS)
        .map(|n| {
            let (items, all, large) = &mut customers[n % CUSTOMERS];
            *items += quantity(n);
            *all += amount(n);
            *large += if amount(n) > LEAST { amount(n) } else { 0.0 };
            (*items, *all, *large)
        })
        .collect()
}

/// What a prediction says.
struct Told {
    definition: String,
    items: i64,
    spend: f64,
}

impl Told {
    /// The version that it is of, whose values it must have.
    fn version(&self, definitions: &[String], n: usize, (items, all, large): (i64, f64, f64)) -> usize {
        let version = definitions.iter().position(|d| *d == self.definition).unwrap() + 1;
        let spend = if version == 1 { all } else { large };
        assert_eq!((self.items, self.spend), (items, spend), "event {n}, version {version}");
        version
    }
}

struct Shop<'a> {
    kafka: Option<&'a Kafka>,
    world: World,
    name: String,
}

impl<'a> Shop<'a> {
    fn open(kafka: &'a Kafka, redis: &Redis) -> Self {
        let mut shop = Self::embedded();
        shop.world.set("KAFKA_BROKERS", &kafka.address());
        shop.world.set("REDIS_URL", &redis.url());
        kafka.create(&shop.topic("purchases"), 2);
        kafka.create(&shop.topic("predictions"), 2);
        Self { kafka: Some(kafka), ..shop }
    }

    /// On the embedded log and store.
    fn embedded() -> Self {
        let shop = Self { kafka: None, world: World::new(), name: unique("versions") };
        shop.define("v1", "");
        shop.define("v2", &format!("where = \"amount > {LEAST}\""));
        shop
    }

    /// The committed predictions of a topic: what each says of its event, by the event's number.
    fn told(&self, topic: &str) -> BTreeMap<usize, Told> {
        let values: Vec<Value> = match self.kafka {
            Some(kafka) => kafka
                .consume(&self.topic(topic))
                .into_iter()
                .map(|record| serde_json::from_slice(&record.value.unwrap()).unwrap())
                .collect(),
            None => {
                let log = self.world.path("log").display().to_string();
                let lines = self.world.run(&["topic", "tail", &self.topic(topic), "--embedded", &log]);
                lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["value"].clone()).collect()
            }
        };
        let mut told = BTreeMap::new();
        for value in values {
            let value = if let Value::String(text) = &value { serde_json::from_str(text).unwrap() } else { value };
            let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
            let (partition, offset) = (number(&value["source"]["partition"]), number(&value["source"]["offset"]));
            let n = offset * PARTITIONS + partition;
            assert_eq!(at(n), (partition, offset));
            let said = Told {
                definition: value["definition"].as_str().unwrap().to_owned(),
                items: value["features"]["items_sum_30d"].as_i64().unwrap(),
                spend: value["features"]["spend_sum_30d"].as_f64().unwrap(),
            };
            assert!(told.insert(n, said).is_none(), "event {n} has one prediction");
        }
        told
    }

    /// Definitions of the versions, the first one's first.
    fn definitions(&self) -> Vec<String> {
        let listed = self.list();
        let versions = listed["versions"].as_array().unwrap();
        versions.iter().map(|version| version["definition"].as_str().unwrap().to_owned()).collect()
    }

    /// The definition of `tests/pipelines/cdnow` on JSON records, with more in `[features.spend]`.
    fn define(&self, folder: &str, spend: &str) {
        let cdnow = root().join("tests/pipelines/cdnow");
        let mut definition: toml::Table = fs::read_to_string(cdnow.join("pipeline.toml")).unwrap().parse().unwrap();
        for section in ["labels", "monitor", "retraining"] {
            definition.remove(section).unwrap();
        }
        let set = |table: &mut toml::Value, key: &str, value: &str| {
            table.as_table_mut().unwrap().insert(key.to_owned(), value.into());
        };
        set(&mut definition["registry"], "initial", cdnow.join("bundle").to_str().unwrap());
        set(&mut definition["broker"], "path", self.world.path("log").to_str().unwrap());
        definition["broker"].as_table_mut().unwrap().insert("partitions".into(), 2.into());
        let properties = "\"session.timeout.ms\" = \"2000\"\n\"heartbeat.interval.ms\" = \"500\"";
        let properties: toml::Table = properties.parse().unwrap();
        definition["broker"].as_table_mut().unwrap().insert("properties".into(), properties.into());
        let source = &mut definition["sources"]["purchases"];
        set(source, "topic", &self.topic("purchases"));
        set(source, "format", "json");
        set(source, "schema", root().join("schemas/churn/purchase.avsc").to_str().unwrap());
        definition.insert("name".into(), self.name.as_str().into());
        definition["features"]["spend"].as_table_mut().unwrap().extend(spend.parse::<toml::Table>().unwrap());
        self.world.define(folder, &toml::to_string(&definition).unwrap());
    }

    fn pipeline(&self, folder: &str) -> PathBuf {
        self.world.path(folder)
    }

    fn topic(&self, what: &str) -> String {
        format!("{}.{what}", self.name)
    }

    fn send(&self, numbers: std::ops::Range<usize>) {
        let records: Vec<(i32, String, String)> = numbers
            .map(|n| {
                let customer = format!("c{}", n % CUSTOMERS);
                let time = FIRST_DAY + i64::try_from(n).unwrap() * 60_000;
                let (quantity, amount) = (quantity(n), amount(n));
                let value = format!(
                    r#"{{"customer_id":"{customer}","purchased_at":{time},"quantity":{quantity},"amount":{amount}}}"#
                );
                (i32::try_from(at(n).0).unwrap(), customer, value)
            })
            .collect();
        let Some(kafka) = self.kafka else {
            let broker = driftline::broker::embedded::EmbeddedBroker::open(&self.world.path("log")).unwrap();
            return write(&broker, &self.topic("purchases"), &records);
        };
        let records = records.iter().map(|(partition, key, value)| (*partition, key.as_bytes(), value.as_bytes()));
        kafka.produce(&self.topic("purchases"), records);
    }

    fn command(&self, verb: &[&str], folder: &str) -> Command {
        let mut command = self.world.command(verb);
        command.arg(self.pipeline(folder));
        command
    }

    /// With small batches and checkpoints, so that kills find some half done.
    fn running(&self, verb: &[&str], folder: &str) -> Command {
        let mut command = self.command(verb, folder);
        command.args(["--listen", "none", "--view", "none", "--instance", "test", "--workers", "1"]);
        command.args(["--set", "score.batch.rows=40", "--set", "offline.checkpoint.rows=200"]);
        command.args(["--set", "offline.checkpoint.interval=1s"]);
        command
    }

    fn done(&self, mut command: Command) -> String {
        let output = command.output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?} ended with {}:\n{errors}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    fn list(&self) -> Value {
        let mut command = self.command(&["versions", "list", "--json"], "v1");
        serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
    }

    /// A customer's spend over thirty days, as the online store has it.
    fn spend(&self, folder: &str, customer: usize) -> Option<f64> {
        let mut command = self.command(&["get", "--json"], folder);
        let output = command.arg(format!("c{customer}")).output().unwrap();
        let row: Value = serde_json::from_slice(&output.stdout).unwrap();
        find(&row, "spend_sum_30d").and_then(Value::as_f64)
    }
}

/// The value of a key, wherever it stands; of an object with a `value`, that.
fn find<'v>(value: &'v Value, key: &str) -> Option<&'v Value> {
    match value {
        Value::Object(fields) => match fields.get(key) {
            Some(found) => Some(found.get("value").unwrap_or(found)),
            None if fields.get("name").and_then(Value::as_str) == Some(key) => fields.get("value"),
            None => fields.values().find_map(|value| find(value, key)),
        },
        Value::Array(values) => values.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}

/// Writes records to the embedded log.
fn write(broker: &dyn Broker, topic: &str, records: &[(i32, String, String)]) {
    let settings = TopicSettings { partitions: 2, compacted: false, retention_ms: None };
    broker.create_topic(topic, &settings).unwrap();
    let mut producer = broker.producer(None).unwrap();
    for (partition, key, value) in records {
        let (key, value) = (Some(key.as_bytes()), Some(value.as_bytes()));
        producer.send(OutRecord { topic, partition: Some(*partition), key, value, ..OutRecord::default() }).unwrap();
    }
    producer.commit(&Offsets::new(), None).unwrap();
}

/// Lets the load go on to its end when it is dropped.
struct NoLimit<'a>(&'a AtomicUsize);

impl Drop for NoLimit<'_> {
    fn drop(&mut self) {
        self.0.store(usize::MAX / 2, Ordering::Release);
    }
}

fn interrupt(mut running: Process) {
    running.signal(libc::SIGINT);
    assert_eq!(running.end().code(), Some(0), "{}", running.printed());
}

#[test]
#[allow(clippy::too_many_lines, reason = "one story")]
fn versions_are_switched_under_load_and_back_and_every_event_has_one_prediction() {
    let (kafka, redis) = (Kafka::shared(), Redis::start());
    let shop = Shop::open(kafka, &redis);
    let oracle = oracle();
    let predicted = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        // A failure ends the load, too.
        let _no_limit = NoLimit(&predicted);
        // The load: as many purchases as the predictions keep up with.
        scope.spawn(|| {
            for start in (0..EVENTS).step_by(20) {
                while start > predicted.load(Ordering::Acquire) + 300 {
                    std::thread::park_timeout(std::time::Duration::from_millis(2));
                }
                shop.send(start..start + 20);
            }
        });
        let mut reader = kafka.follow(&shop.topic("predictions"));
        let mut come = |running: &mut Process, count: usize| {
            running.until(&format!("there are {count} predictions"), || {
                let found = reader.read().len();
                predicted.store(found, Ordering::Release);
                found >= count
            });
        };
        // It dies when it is to take over again, after the rollback.
        let mut command = shop.running(&["run"], "v1");
        if cfg!(feature = "failpoints") {
            command.env("DRIFTLINE_FAILPOINTS", "features.handing_over=kill");
        }
        let mut first = shop.world.start(command);
        come(&mut first, 600);

        // Nothing but version 1 may run as it is.
        let refused = shop.running(&["run"], "v2").output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(1) && said.contains("versions bootstrap"), "{said}");

        for point in ["versions.before_record=kill", "versions.bootstrapped=kill", "offline.manifest_written=kill@2"] {
            killed_at(shop.running(&["versions", "bootstrap", "--until-caught-up"], "v2"), point);
        }
        let done = shop.done(shop.running(&["versions", "bootstrap", "--until-caught-up"], "v2"));
        assert!(done.is_empty(), "{done}");
        let listed = shop.list();
        assert_eq!((&listed["serving"], listed["versions"].as_array().unwrap().len()), (&1.into(), 2), "{listed}");

        // It goes on beside the first one, and dies when it is to take over.
        let mut command = shop.running(&["run"], "v2");
        if cfg!(feature = "failpoints") {
            command.env("DRIFTLINE_FAILPOINTS", "features.handing_over=kill");
        }
        let mut second = shop.world.start(command);
        come(&mut first, 2_000);
        killed_at(shop.command(&["versions", "switch"], "v2"), "versions.before_record=kill");
        assert_eq!(shop.list()["serving"], 1);
        killed_at(shop.command(&["versions", "switch"], "v2"), "versions.recorded=kill");
        if cfg!(feature = "failpoints") {
            assert_eq!(second.end().signal(), Some(libc::SIGKILL), "{}", second.printed());
            second = shop.world.start(shop.running(&["run"], "v2"));
        } else {
            shop.done(shop.command(&["versions", "switch"], "v2"));
        }
        assert_eq!(shop.list()["serving"], 2);
        come(&mut second, 4_000);
        first.until_printed("version 1 does not serve any more, version 2 does");

        killed_at(shop.command(&["versions", "rollback"], "v2"), "versions.before_record=kill");
        assert_eq!(shop.list()["serving"], 2);
        killed_at(shop.command(&["versions", "rollback"], "v2"), "versions.recorded=kill");
        if cfg!(feature = "failpoints") {
            assert_eq!(first.end().signal(), Some(libc::SIGKILL), "{}", first.printed());
            first = shop.world.start(shop.running(&["run"], "v1"));
        } else {
            shop.done(shop.command(&["versions", "rollback"], "v2"));
        }
        come(&mut first, EVENTS);
        assert_eq!(shop.list()["serving"], 1);
        for customer in 0..CUSTOMERS {
            let n = EVENTS - CUSTOMERS + customer;
            assert_eq!(shop.spend("v1", customer), Some(oracle[n].1), "customer {customer}");
        }

        // Without a new event, the online store gets all rows of the version that serves now.
        shop.done(shop.command(&["versions", "switch"], "v2"));
        let last = |customer: usize| Some(oracle[EVENTS - CUSTOMERS + customer].2);
        second.until("the online store has the rows of version 2", || {
            (0..CUSTOMERS).all(|customer| shop.spend("v2", customer) == last(customer))
        });
        // The first one follows up to the end, so that all rows can be compared.
        first.until("version 1 has all rows", || {
            let listed = shop.list();
            let versions = listed["versions"].as_array().unwrap();
            versions.iter().all(|version| version["checkpoints_behind"][shop.topic("purchases")] == 0)
        });
        interrupt(second);
        interrupt(first);
    });

    let definitions = shop.definitions();
    let told = shop.told("predictions");
    assert_eq!(told.len(), EVENTS, "each event has a prediction");
    for partition in 0..PARTITIONS {
        let of_partition = told.iter().filter(|(n, _)| at(**n).0 == partition);
        let mut versions: Vec<usize> =
            of_partition.map(|(n, told)| told.version(&definitions, *n, oracle[*n])).collect();
        versions.dedup();
        assert_eq!(versions, [1, 2, 1], "partition {partition} changes its version at one offset each time");
    }

    let compared = shop.done(shop.command(&["versions", "compare", "--json", "--base", "1", "--with", "2"], "v2"));
    let compared: Value = serde_json::from_str(&compared).unwrap();
    let feature = |name: &str| compared["features"].as_array().unwrap().iter().find(|f| f["feature"] == name).unwrap();
    assert_eq!((&compared["rows"], &compared["rows_only_in_base"]), (&EVENTS.into(), &0.into()), "{compared}");
    let differ: Vec<usize> = (0..EVENTS).filter(|n| oracle[*n].1 != oracle[*n].2).collect();
    let largest = oracle.iter().map(|(_, all, large)| all - large).fold(0.0, f64::max);
    let spend = feature("spend_sum_30d");
    assert_eq!((&spend["differing"], &spend["equal"]), (&differ.len().into(), &(EVENTS - differ.len()).into()));
    assert_eq!(spend["largest_difference"].as_f64(), Some(largest));
    let (partition, offset) = at(differ[0]);
    assert_eq!(
        (&spend["first"]["event"]["partition"], &spend["first"]["event"]["offset"]),
        (&partition.into(), &offset.into())
    );
    assert_eq!(feature("items_sum_30d")["differing"], 0);
    let strict = shop.command(&["versions", "compare", "--strict"], "v1").output().unwrap();
    assert_eq!(strict.status.code(), Some(1), "{strict:?}");

    shop.done({
        let mut command = shop.command(&["versions", "drop"], "v2");
        command.arg("1");
        command
    });
    assert!(
        !shop
            .world
            .path("offline")
            .join(&shop.name)
            .join("features/partition=0")
            .read_dir()
            .is_ok_and(|mut d| d.next().is_some())
    );
    let none = shop.command(&["versions", "rollback"], "v2").output().unwrap();
    assert_eq!(none.status.code(), Some(1), "{none:?}");
}

#[test]
fn a_process_that_has_not_learned_of_a_switch_gets_no_partition_any_more() {
    if !cfg!(feature = "failpoints") {
        return;
    }
    let (kafka, redis) = (Kafka::shared(), Redis::start());
    let shop = Shop::open(kafka, &redis);
    shop.send(0..400);
    // It does not ask which version serves while it runs.
    let mut command = shop.running(&["run"], "v1");
    command.env("DRIFTLINE_FAILPOINTS", "role.watch=error");
    let mut first = shop.world.start(command);
    first.until("all is predicted", || shop.told("predictions").len() == 400);
    shop.done(shop.running(&["versions", "bootstrap", "--until-caught-up"], "v2"));
    shop.done(shop.command(&["versions", "switch"], "v2"));
    // It still owns its partitions and goes on: nobody else publishes yet.
    shop.send(400..600);
    first.until("it goes on", || shop.told("predictions").len() == 600);
    // Another member comes. Whatever is assigned to the first one now, it does not take.
    let mut second = shop.world.start(shop.running(&["run"], "v2"));
    first.until_printed("version 1 does not serve any more, version 2 does");
    shop.send(600..1_000);
    second.until("all is predicted", || shop.told("predictions").len() == 1_000);
    interrupt(second);
    interrupt(first);
    let (definitions, oracle) = (shop.definitions(), oracle());
    for (n, told) in shop.told("predictions") {
        assert_eq!(told.version(&definitions, n, oracle[n]), if n < 600 { 1 } else { 2 }, "event {n}");
    }
}

#[test]
fn stages_apart_keep_the_rows_of_two_versions_apart_and_a_shadow_shows_what_would_come() {
    let (kafka, redis) = (Kafka::shared(), Redis::start());
    let shop = Shop::open(kafka, &redis);
    let oracle = oracle();
    let stages = |folder: &str| {
        for stage in ["features", "score"] {
            let mut command = shop.running(&[stage], folder);
            command.arg("--until-end");
            shop.done(command);
        }
    };
    shop.send(0..300);
    stages("v1");
    let mut shadow = shop.running(&["versions", "bootstrap", "--until-caught-up", "--shadow-topics"], "v2");
    shadow.args(["--set", "score.batch.rows=7"]);
    // What is behind what the first version has committed is not read.
    shop.send(300..500);
    shop.done(shadow);
    let definitions = shop.definitions();
    let shadowed = shop.told("predictions.shadow-v2");
    assert_eq!(shadowed.keys().copied().collect::<Vec<_>>(), (0..300).collect::<Vec<_>>());
    for (n, told) in &shadowed {
        assert_eq!(told.version(&definitions, *n, oracle[*n]), 2);
    }
    assert_eq!(shop.told("predictions").len(), 300);

    shop.done(shop.command(&["versions", "switch"], "v2"));
    let refused = shop.running(&["versions", "bootstrap"], "v2").output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "it serves: {refused:?}");
    stages("v2");
    shop.send(500..600);
    shop.done(shop.command(&["versions", "rollback"], "v1"));
    stages("v1");
    let told = shop.told("predictions");
    assert_eq!(told.len(), 600);
    for (n, told) in &told {
        let version = if (300..500).contains(n) { 2 } else { 1 };
        assert_eq!(told.version(&definitions, *n, oracle[*n]), version, "event {n}");
    }
    let letters = kafka.consume(&shop.topic("dead-letters"));
    assert!(letters.is_empty(), "no row met a model of another definition: {letters:?}");
}

#[test]
fn on_the_embedded_log_a_switch_ends_the_run_and_the_next_one_goes_on() {
    let shop = Shop::embedded();
    let oracle = oracle();
    shop.send(0..200);
    let run = |folder: &str| {
        let mut command = shop.running(&["run"], folder);
        command.arg("--until-end");
        shop.done(command);
    };
    run("v1");
    shop.done(shop.running(&["versions", "bootstrap", "--until-caught-up"], "v2"));
    let compared = shop.done(shop.command(&["versions", "compare", "--json"], "v2"));
    let compared: Value = serde_json::from_str(&compared).unwrap();
    assert_eq!((&compared["base"], &compared["with"], &compared["rows"]), (&1.into(), &2.into(), &200.into()));

    let mut first = shop.world.start(shop.running(&["run"], "v1"));
    first.until_printed("owns partitions");
    shop.done(shop.command(&["versions", "switch"], "v2"));
    assert_eq!(first.end().code(), Some(0), "{}", first.printed());
    shop.send(200..320);
    run("v2");
    let definitions = shop.definitions();
    let told = shop.told("predictions");
    assert_eq!(told.len(), 320);
    for (n, told) in &told {
        assert_eq!(told.version(&definitions, *n, oracle[*n]), if *n < 200 { 1 } else { 2 }, "event {n}");
    }
    for customer in 0..CUSTOMERS {
        assert_eq!(shop.spend("v2", customer), Some(oracle[280 + customer].2), "customer {customer}");
    }
}
