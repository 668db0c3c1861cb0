//! A change of `[windows]` alone: computed beside what serves, compared, switched to and back on Kafka, killed on the way. No
//! window is emitted twice, and none is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;

use serde_json::{Value, json};

use crate::process::{World, killed_at};
use crate::servers::{Follower, Kafka, Process, unique};

/// 2025-01-01, ms.
const START: i64 = 1_735_689_600_000;
const MINUTE: i64 = 60_000;
const OUT_OF_ORDER: i64 = 3 * MINUTE;
const PARTITIONS: usize = 2;
const CUSTOMERS: usize = 40;
/// Orders come one a minute.
const EVENTS: usize = 6_000;
/// Version 2 takes orders of more than this.
const LEAST: f64 = 60.0;
const SHORT: i64 = 120 * MINUTE;
const LONG: i64 = 360 * MINUTE;

const PIPELINE: &str = r#"
name = "NAME"
broker = { brokers = "${KAFKA_BROKERS}", properties = { "session.timeout.ms" = "2000", "heartbeat.interval.ms" = "500" } }
online = { enabled = false }
offline = { url = "${OFFLINE_URL}", checkpoint = { interval = "1s", rows = 200 } }
[entities.customer]
key = { customer_id = "string" }
[sources.orders]
topic = "NAME.orders"
format = "json"
fields = { customer_id = "string", at = "int64", amount = "float64" }
event_time = { field = "at", unit = "ms" }
out_of_order = "3m"
ahead = "36500d"
[windows.short]
source = "orders"
of = "amount"
tumbling = "2h"
"#;

/// What each version adds to `[windows.short]`, and behind it.
const VERSIONS: [(&str, &str); 2] = [
    ("v1", "functions = [\"count\", \"sum\"]\n"),
    (
        "v2",
        "functions = [\"count\", \"sum\", \"max\"]\nwhere = \"amount > 60\"\n[windows.long]\nsource = \"orders\"\nof = \"amount\"\nfunctions = [\"count\", \"sum\"]\ntumbling = \"6h\"\n",
    ),
];

fn amount(n: usize) -> f64 {
    1.25 * (1 + n * 7 % 100) as f64
}

fn time(n: usize) -> i64 {
    START + i64::try_from(n).unwrap() * MINUTE
}

fn partition(n: usize) -> usize {
    n % CUSTOMERS % PARTITIONS
}

/// The least event time whose event, with all before it, closes a window.
fn closing(end: i64) -> i64 {
    end + OUT_OF_ORDER
}

/// The values of each window that the first `events` orders close in a partition, by its end and customer, of orders of more
/// than `least`: count, sum, and the largest where it is asked for.
fn windows(part: usize, events: usize, length: i64, least: f64, largest: bool) -> BTreeMap<(i64, String), Value> {
    let own = || (0..events).filter(|n| partition(*n) == part);
    let newest = own().map(time).max().unwrap_or(i64::MIN);
    let mut found: BTreeMap<(i64, String), Vec<f64>> = BTreeMap::new();
    for n in own().filter(|n| amount(*n) > least) {
        let end = (time(n).div_euclid(length) + 1) * length;
        if closing(end) <= newest {
            found.entry((end, format!("c{}", n % CUSTOMERS))).or_default().push(amount(n));
        }
    }
    let value = |amounts: &Vec<f64>| {
        let mut value = json!({ "count": amounts.len(), "sum": amounts.iter().sum::<f64>() });
        if largest {
            value["max"] = amounts.iter().copied().fold(0.0, f64::max).into();
        }
        value
    };
    found.iter().map(|(key, amounts)| (key.clone(), value(amounts))).collect()
}

struct Shop<'a> {
    kafka: &'a Kafka,
    world: World,
    name: String,
}

impl<'a> Shop<'a> {
    fn open(kafka: &'a Kafka) -> Self {
        let mut shop = Self { kafka, world: World::new(), name: unique("windows") };
        shop.world.set("KAFKA_BROKERS", &kafka.address());
        for (folder, more) in VERSIONS {
            shop.world.define(folder, &format!("{PIPELINE}{more}").replace("NAME", &shop.name));
        }
        for topic in ["orders", "windows.short", "windows.long"] {
            kafka.create(&shop.topic(topic), 2);
        }
        shop
    }

    fn topic(&self, what: &str) -> String {
        format!("{}.{what}", self.name)
    }

    fn send(&self, numbers: std::ops::Range<usize>) {
        let record = |n: usize| {
            let customer = format!("c{}", n % CUSTOMERS);
            let value = json!({ "customer_id": customer, "at": time(n), "amount": amount(n) }).to_string();
            (i32::try_from(partition(n)).unwrap(), customer, value)
        };
        let records: Vec<_> = numbers.map(record).collect();
        let records = records.iter().map(|(partition, key, value)| (*partition, key.as_bytes(), value.as_bytes()));
        self.kafka.produce(&self.topic("orders"), records);
    }

    fn command(&self, verb: &[&str], folder: &str) -> Command {
        let mut command = self.world.command(verb);
        command.arg(self.world.path(folder));
        command
    }

    fn running(&self, verb: &[&str], folder: &str) -> Command {
        let mut command = self.command(verb, folder);
        command.args(["--listen", "none", "--view", "none", "--instance", "test", "--workers", "1"]);
        command
    }

    fn start(&self, folder: &str) -> Process {
        self.world.start(self.running(&["run"], folder))
    }

    fn done(&self, mut command: Command) -> String {
        let output = command.output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?} ended with {}:\n{errors}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    fn serving(&self) -> Value {
        let listed: Value =
            serde_json::from_str(&self.done(self.command(&["versions", "list", "--json"], "v1"))).unwrap();
        listed["serving"].clone()
    }

    /// The rows of a table: by partition, end and customer; of each its values.
    fn rows(&self, table: &str) -> Vec<BTreeMap<(i64, String), Value>> {
        let mut rows = vec![BTreeMap::new(); PARTITIONS];
        for record in self.kafka.consume(&self.topic(table)) {
            let mut row: Value = serde_json::from_slice(&record.value.unwrap()).unwrap();
            let fields = row.as_object_mut().unwrap();
            let mut take = |name: &str| fields.remove(name).unwrap();
            let (customer, end) = (take("customer_id"), take("window_end").as_i64().unwrap());
            assert_eq!((take("window_start").as_i64() < Some(end), take("final")), (true, true.into()));
            let customer = customer.as_str().unwrap().to_owned();
            let number: usize = customer[1..].parse().unwrap();
            let before = rows[partition(number)].insert((end, customer), row);
            assert_eq!(before, None, "a window is emitted once");
        }
        rows
    }
}

/// Waits until the windows that the first `events` orders close are there.
fn come(reader: &mut Follower, running: &mut Process, events: usize) {
    let last = |part: usize| {
        let newest = (0..events).filter(|n| partition(*n) == part).map(time).max().unwrap();
        (newest - OUT_OF_ORDER).div_euclid(SHORT) * SHORT
    };
    running.until(&format!("the windows of {events} orders are there"), || {
        let mut ends = [i64::MIN; PARTITIONS];
        for record in reader.read() {
            let row: Value = serde_json::from_slice(record.value.as_ref().unwrap()).unwrap();
            let number: usize = row["customer_id"].as_str().unwrap()[1..].parse().unwrap();
            let end = &mut ends[partition(number)];
            *end = (*end).max(row["window_end"].as_i64().unwrap());
        }
        (0..PARTITIONS).all(|part| ends[part] == last(part))
    });
}

/// `kill -9`, at once.
fn kill(mut running: Process) {
    running.signal(libc::SIGKILL);
    assert_eq!(running.end().signal(), Some(libc::SIGKILL));
}

#[test]
fn other_windows_are_switched_to_and_back_and_each_window_is_emitted_once() {
    let kafka = Kafka::shared();
    let shop = Shop::open(kafka);
    let mut reader = kafka.follow(&shop.topic("windows.short"));
    shop.send(0..1_500);
    let mut first = shop.start("v1");
    come(&mut reader, &mut first, 1_500);

    let refused = shop.running(&["run"], "v2").output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("versions bootstrap"), "{said}");
    for point in ["versions.bootstrapped=kill", "offline.manifest_written=kill@2"] {
        killed_at(shop.running(&["versions", "bootstrap", "--until-caught-up"], "v2"), point);
    }
    shop.done(shop.running(&["versions", "bootstrap", "--until-caught-up"], "v2"));
    // Rows of the first one are in its files once it has ended.
    first.signal(libc::SIGINT);
    assert_eq!(first.end().code(), Some(0), "{}", first.printed());
    let compared = shop.done(shop.command(&["versions", "compare", "--json"], "v2"));
    compare(&serde_json::from_str(&compared).unwrap(), 1_500);
    let strict = shop.command(&["versions", "compare", "--strict"], "v2").output().unwrap();
    let said = String::from_utf8_lossy(&strict.stdout).into_owned();
    assert!(strict.status.code() == Some(1) && said.contains("only in version 2: windows long"), "{said}");

    let (mut first, mut second) = (shop.start("v1"), shop.start("v2"));
    shop.send(1_500..3_000);
    come(&mut reader, &mut first, 3_000);
    killed_at(shop.command(&["versions", "switch"], "v2"), "versions.before_record=kill");
    assert_eq!(shop.serving(), 1);
    shop.done(shop.command(&["versions", "switch"], "v2"));
    kill(second);
    second = shop.start("v2");
    // Whoever has learned of it may still publish what it has polled, until it has left.
    second.until_printed("owns partitions 0-1");
    shop.send(3_000..4_500);
    come(&mut reader, &mut second, 4_500);

    killed_at(shop.command(&["versions", "rollback"], "v2"), "versions.before_record=kill");
    assert_eq!(shop.serving(), 2);
    if cfg!(feature = "failpoints") {
        killed_at(shop.command(&["versions", "rollback"], "v2"), "versions.recorded=kill");
    } else {
        shop.done(shop.command(&["versions", "rollback"], "v2"));
    }
    assert_eq!(shop.serving(), 1);
    kill(first);
    first = shop.start("v1");
    first.until_printed("owns partitions 0-1");
    shop.send(4_500..EVENTS);
    come(&mut reader, &mut first, EVENTS);
    for mut running in [first, second] {
        running.signal(libc::SIGINT);
        assert_eq!(running.end().code(), Some(0), "{}", running.printed());
    }

    let (short, long) = (shop.rows("windows.short"), shop.rows("windows.long"));
    for part in 0..PARTITIONS {
        let expected = [windows(part, EVENTS, SHORT, 0.0, false), windows(part, EVENTS, SHORT, LEAST, true)];
        let ends: BTreeSet<i64> = expected[0].keys().map(|(end, _)| *end).collect();
        let mut versions: Vec<(i64, usize)> = Vec::new();
        for end in ends {
            let of = |rows: &BTreeMap<(i64, String), Value>| -> BTreeMap<String, Value> {
                rows.iter()
                    .filter(|((at, _), _)| *at == end)
                    .map(|((_, who), row)| (who.clone(), row.clone()))
                    .collect()
            };
            let (found, expected) = (of(&short[part]), [of(&expected[0]), of(&expected[1])]);
            let version = usize::from(found.values().any(|row| row.get("max").is_some()));
            assert_eq!(found, expected[version], "windows that end at {end} in partition {part}");
            versions.push((end, version));
        }
        let mut order: Vec<usize> = versions.iter().map(|(_, version)| *version).collect();
        order.dedup();
        assert_eq!(order, [0, 1, 0], "partition {part} changes its version at one offset each time");
        // A window that only version 2 has comes whole, although it began before that one served.
        let second: BTreeSet<i64> = versions.iter().filter(|(_, v)| *v == 1).map(|(end, _)| *end).collect();
        let mut expected = windows(part, EVENTS, LONG, 0.0, false);
        expected.retain(|(end, _), _| second.contains(end));
        assert!(!expected.is_empty());
        assert_eq!(long[part], expected, "partition {part}");
    }
}

/// What `versions compare` says of the first `events` orders.
fn compare(compared: &Value, events: usize) {
    assert_eq!(compared["windows_only_in_with"], json!(["long"]), "{compared}");
    let tables = compared["windows"].as_array().unwrap();
    assert_eq!(tables.len(), 1);
    let (mut all, mut large) = (BTreeMap::new(), BTreeMap::new());
    for part in 0..PARTITIONS {
        all.extend(windows(part, events, SHORT, 0.0, false));
        large.extend(windows(part, events, SHORT, LEAST, false));
    }
    let differ = large.iter().filter(|(window, row)| all[*window] != **row).count();
    let (table, both) = (&tables[0], large.len());
    assert!(differ > 100 && differ < both && both < all.len(), "{differ} {both} {}", all.len());
    assert_eq!(
        (&table["window"], &table["rows"], &table["rows_equal"], &table["rows_only_in_with"]),
        (&json!("short"), &json!(both), &json!(both - differ), &json!(0)),
        "{compared}"
    );
    // Before the first row of version 2 in a partition nothing is compared.
    let missing = table["rows_only_in_base"].as_u64().unwrap()
        + table["rows_not_compared"]["before_the_other_begins"].as_u64().unwrap();
    assert_eq!(missing, (all.len() - both) as u64, "{compared}");
    assert_eq!(table["rows_not_compared"]["after_the_other_ends"], 0);
    assert_eq!(table["features_only_in_with"], json!(["max"]));
    let column = |name: &str| table["features"].as_array().unwrap().iter().find(|f| f["feature"] == name).unwrap();
    assert_eq!(column("count")["differing"], json!(differ));
}
