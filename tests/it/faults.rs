//! The whole binary under bad input and faults. Each test asks the same: does it say what is wrong, where and what to do;
//! does the rest go on; and is every record accounted for once, as a prediction, a row of the offline files or a dead letter.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};

use arrow::array::AsArray as _;
use arrow::datatypes::{Int32Type, Int64Type};
use arrow::ipc::reader::FileReader;
use chrono::DateTime;
use driftline::window::row_columns;
use rand::{Rng as _, SeedableRng as _};
use rstest::rstest;
use serde_json::Value;

use crate::process::{World, root};
use crate::servers::{Consumed, Kafka, Process, Redis, SchemaRegistry, unique};

/// 2025-01-01, ms.
const FIRST_DAY: i64 = 1_735_689_600_000;
const PARTITIONS: i32 = 2;
const CUSTOMERS: usize = 40;

/// When purchase number `n` is made: a minute passes between two of them.
fn time(n: usize) -> i64 {
    FIRST_DAY + i64::try_from(n).unwrap() * 60_000
}

/// Customer, quantity and amount of purchase number `n`.
fn purchase(n: usize) -> (String, i64, f64) {
    (format!("c{}", n % CUSTOMERS), 1 + i64::try_from(n % 4).unwrap(), 1.25 * (1 + n % 100) as f64)
}

fn as_json(n: usize, at: i64) -> Vec<u8> {
    let (customer, quantity, amount) = purchase(n);
    format!(r#"{{"customer_id":"{customer}","purchased_at":{at},"quantity":{quantity},"amount":{amount}}}"#)
        .into_bytes()
}

/// The partition of a purchase: that of its customer.
fn partition(n: usize) -> i32 {
    i32::try_from(n % CUSTOMERS).unwrap() % PARTITIONS
}

/// A pipeline of a test's own: that of `tests/pipelines/cdnow` under another name, with JSON records on two partitions and
/// nothing behind the predictions.
struct Shop<'a> {
    kafka: &'a Kafka,
    world: World,
    name: String,
    definition: toml::Table,
    /// By partition: the offset that the next record gets.
    ends: [i64; PARTITIONS as usize],
    /// Ids of the predictions that are due.
    due: Vec<String>,
}

impl<'a> Shop<'a> {
    /// With its topics created.
    fn open(kafka: &'a Kafka, redis: &Redis) -> Self {
        let shop = Self::without_topics(kafka, redis);
        kafka.create(&shop.topic("purchases"), PARTITIONS);
        kafka.create(&shop.topic("predictions"), PARTITIONS);
        shop
    }

    fn without_topics(kafka: &'a Kafka, redis: &Redis) -> Self {
        let name = unique("faults");
        let mut world = World::new();
        world.set("KAFKA_BROKERS", &kafka.address());
        world.set("REDIS_URL", &redis.url());
        let definition = definition(&name);
        let shop = Self { kafka, world, name, definition, ends: [0; PARTITIONS as usize], due: Vec::new() };
        shop.define(|_| {});
        shop
    }

    /// Says how its groups share partitions out.
    fn share_out_by(&mut self, group_protocol: &str) {
        let broker = self.definition["broker"].as_table_mut().unwrap();
        if group_protocol == "consumer" {
            // When a member is missed is the brokers' to say.
            broker.remove("properties");
        }
        broker.insert("group_protocol".into(), group_protocol.into());
        self.define(|_| {});
    }

    /// Writes the definition with some changes.
    fn define(&self, change: impl FnOnce(&mut toml::Table)) {
        let mut definition = self.definition.clone();
        change(&mut definition);
        self.world.define("pipeline", &toml::to_string(&definition).unwrap());
    }

    fn pipeline(&self) -> PathBuf {
        self.world.path("pipeline")
    }

    fn topic(&self, what: &str) -> String {
        format!("{}.{what}", self.name)
    }

    /// Sends purchases, for each of which a prediction is due.
    fn send(&mut self, numbers: std::ops::Range<usize>) {
        let records: Vec<_> = numbers.map(|n| (partition(n), purchase(n).0, as_json(n, time(n)))).collect();
        for (partition, ..) in &records {
            self.expect(*partition, true);
        }
        let records = records.iter().map(|(partition, key, value)| (*partition, key.as_bytes(), value.as_slice()));
        self.kafka.produce(&self.topic("purchases"), records);
    }

    /// Counts the next record of a partition, and its prediction where one is due. Returns the record's offset.
    fn expect(&mut self, partition: i32, due: bool) -> i64 {
        let end = &mut self.ends[usize::try_from(partition).unwrap()];
        let offset = *end;
        *end += 1;
        if due {
            self.due.push(format!("{}-{partition}-{offset}", self.topic("purchases")));
        }
        offset
    }

    /// `driftline run` with these arguments, and small batches and checkpoints, so that faults find some half done.
    fn command(&self, more: &[&str]) -> std::process::Command {
        let mut command = self.world.command(&["run"]);
        command.arg(self.pipeline());
        command.args(["--listen", "none", "--view", "none"]);
        command.args(["--set", "score.batch.rows=40", "--set", "offline.checkpoint.rows=200"]).args(more);
        command
    }

    fn start(&self) -> Process {
        self.world.start(self.command(&[]))
    }

    /// Runs until nothing is left to read, which must end well.
    fn run_to_end(&self) {
        let mut running = self.world.start(self.command(&["--until-end"]));
        let exit = running.end();
        assert!(exit.success(), "{exit}:\n{}", running.printed());
    }

    fn predictions(&self) -> Vec<String> {
        self.kafka.consume(&self.topic("predictions")).iter().map(prediction_id).collect()
    }

    /// Ids of the predictions that the rows of the offline files were for. A file counts if the newest manifest names it.
    fn rows(&self) -> Vec<String> {
        let store = self.world.path("offline").join(&self.name);
        let mut ids = Vec::new();
        for folder in sorted(&store.join("manifest")) {
            let newest = sorted(&folder).pop().expect("a checkpoint has been written");
            let manifest: Value = serde_json::from_slice(&fs::read(newest).unwrap()).unwrap();
            for file in manifest["files"].as_array().unwrap() {
                let file = fs::File::open(store.join(file["path"].as_str().unwrap())).unwrap();
                for batch in FileReader::try_new(file, None).unwrap() {
                    let batch = batch.unwrap();
                    let column = |name| batch.column_by_name(name).unwrap();
                    let topics = column(row_columns::TOPIC).as_string::<i32>();
                    let partitions = column(row_columns::PARTITION).as_primitive::<Int32Type>();
                    let offsets = column(row_columns::OFFSET).as_primitive::<Int64Type>();
                    ids.extend(
                        (0..batch.num_rows()).map(|row| {
                            format!("{}-{}-{}", topics.value(row), partitions.value(row), offsets.value(row))
                        }),
                    );
                }
            }
        }
        ids
    }

    /// One prediction and one offline row for each record that they are due for, and none besides.
    fn expect_all(&self) {
        assert_same("predictions", self.predictions(), &self.due);
        assert_same("offline rows", self.rows(), &self.due);
    }
}

/// The definition of `tests/pipelines/cdnow`, changed as [`Shop`] says. Runs on the embedded log and store where the
/// environment names no servers.
pub fn definition(name: &str) -> toml::Table {
    let folder = root().join("tests/pipelines/cdnow");
    let mut definition: toml::Table = fs::read_to_string(folder.join("pipeline.toml")).unwrap().parse().unwrap();
    for section in ["labels", "monitor", "retraining"] {
        definition.remove(section).unwrap();
    }
    definition["name"] = name.into();
    definition["registry"]["initial"] = folder.join("bundle").to_str().unwrap().into();
    // A member that was killed is missed after this long, and only then its partitions are given to the next one.
    definition["broker"].as_table_mut().unwrap().insert(
        "properties".into(),
        r#""session.timeout.ms" = "2000"
        "heartbeat.interval.ms" = "500""#
            .parse::<toml::Table>()
            .unwrap()
            .into(),
    );
    let source = definition["sources"]["purchases"].as_table_mut().unwrap();
    source["topic"] = format!("{name}.purchases").into();
    source["format"] = "json".into();
    source["schema"] = root().join("schemas/churn/purchase.avsc").to_str().unwrap().into();
    definition
}

fn sorted(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries
}

fn prediction_id(record: &Consumed) -> String {
    let value: Value = serde_json::from_slice(record.value.as_deref().unwrap()).unwrap();
    value["prediction_id"].as_str().unwrap().to_owned()
}

/// The same ids, each as often.
fn assert_same(what: &str, found: Vec<String>, due: &[String]) {
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    for id in &found {
        *counts.entry(id).or_default() += 1;
    }
    for id in due {
        *counts.entry(id).or_default() -= 1;
    }
    counts.retain(|_, count| *count != 0);
    let some: Vec<_> = counts.iter().take(8).collect();
    assert!(
        counts.is_empty(),
        "{what}: {} found, {} due; too many (+) or missing (-): {some:?}",
        found.len(),
        due.len()
    );
}

/// Asks it to stop, which must end well. Its last checkpoint may be missing if the group was just being rebalanced; the next
/// run makes up for that.
fn interrupt(running: &mut Process, signal: libc::c_int) {
    running.signal(signal);
    assert_eq!(running.end().code(), Some(0), "{}", running.printed());
}

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' is not in:\n{text}");
    }
}

#[test]
fn an_interrupted_run_commits_its_open_batch_and_the_next_one_does_nothing_twice() {
    let (kafka, redis) = (Kafka::shared(), Redis::start());
    let mut shop = Shop::open(kafka, &redis);
    shop.send(0..100);
    let release = shop.world.path("release");
    // A single worker, so that no rebalance takes its partitions away just then.
    let mut command = shop.command(&["--workers", "1"]);
    command.env("DRIFTLINE_FAILPOINTS", "publish.before_commit=pause").env("DRIFTLINE_FAILPOINT_RELEASE", &release);
    let mut running = shop.world.start(command);
    // The last thing before the commit.
    running.until("rows are in the online store", || redis.command(&[b"DBSIZE"]) != b"0");
    running.signal(libc::SIGINT);
    running.until_printed("stopping: finishing the open batch and writing a checkpoint");
    assert!(shop.predictions().is_empty());
    shop.send(100..200);
    fs::write(&release, "").unwrap();
    assert_eq!(running.end().code(), Some(0), "{}", running.printed());
    let committed = shop.predictions();
    assert!((1..=100).contains(&committed.len()), "{} predictions of the open batch", committed.len());
    assert_same("offline rows", shop.rows(), &committed);

    shop.run_to_end();
    shop.expect_all();
    shop.run_to_end();
    shop.expect_all();
}

#[rstest]
#[case::classic("classic")]
#[case::kafka_4("consumer")]
fn killed_at_any_moment_no_prediction_or_row_is_missing_or_doubled(#[case] group_protocol: &str) {
    let kafka = Kafka::shared();
    let mut shop = Shop::open(kafka, Redis::shared());
    shop.share_out_by(group_protocol);
    let mut follower = kafka.follow(&shop.topic("predictions"));
    let mut moments = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let mut sent = 0;
    for _ in 0..6 {
        let seen = follower.read().len() + moments.random_range(1..400);
        let mut running = shop.start();
        running.until("it has made more predictions", || {
            shop.send(sent..sent + 20);
            sent += 20;
            follower.read().len() >= seen
        });
        running.signal(libc::SIGKILL);
        running.end();
    }
    shop.run_to_end();
    shop.expect_all();
}

#[test]
fn a_full_disk_holds_the_stream_and_loses_nothing() {
    /// More than the log of a run, less than a checkpoint.
    const SPACE: libc::rlim_t = 24 << 10;
    let kafka = Kafka::shared();
    let mut shop = Shop::open(kafka, Redis::shared());
    // Registers the model, which takes more space than there will be.
    shop.run_to_end();
    shop.send(0..4000);
    let full = |shop: &Shop<'_>| {
        let mut command = shop.command(&[]);
        // SAFETY: both calls are async-signal-safe and touch no memory of this process.
        unsafe {
            command.pre_exec(|| {
                // Writes beyond the limit then fail like those on a full disk, instead of killing the process.
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                let limit = libc::rlimit { rlim_cur: SPACE, rlim_max: libc::RLIM_INFINITY };
                match libc::setrlimit(libc::RLIMIT_FSIZE, &limit) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            })
        };
        let mut running = shop.world.start(command);
        running.until_printed("offline store could not write");
        running
    };
    let mut running = full(&shop);
    interrupt(&mut running, libc::SIGINT);
    assert_says(&running.printed(), &["free space on that disk", "stopping without this checkpoint"]);

    // Again, and now space is made while it runs: it goes on by itself.
    let mut running = full(&shop);
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the call reads one struct and writes none.
    let raised = unsafe { libc::prlimit(running.id(), libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) };
    assert_eq!(raised, 0, "{}", std::io::Error::last_os_error());
    let mut follower = kafka.follow(&shop.topic("predictions"));
    running.until("it has made all predictions", || follower.read().len() >= shop.due.len());
    interrupt(&mut running, libc::SIGINT);
    assert_says(&running.printed(), &["the offline store is back"]);
    shop.run_to_end();
    shop.expect_all();
}

#[test]
fn a_redis_that_goes_and_comes_holds_the_stream_and_loses_nothing() {
    let (kafka, redis) = (Kafka::shared(), Redis::start());
    let mut shop = Shop::open(kafka, &redis);
    let mut follower = kafka.follow(&shop.topic("predictions"));
    redis.kill();
    shop.send(0..500);
    let mut running = shop.start();
    running.until_printed("waiting for at most 30s: online store redis");
    redis.restart();
    running.until("it has made all predictions", || follower.read().len() >= shop.due.len());

    redis.kill();
    shop.send(500..1000);
    running.until_printed("holding back: rows wait for the online store");
    assert_eq!(follower.read().len(), 500, "predictions whose rows are not in the online store");
    redis.restart();
    running.until("it has made all predictions", || follower.read().len() >= shop.due.len());

    // Stopped while Redis is away: what is open is left to the next start.
    redis.kill();
    shop.send(1000..3000);
    running.until_printed("holding back: rows wait for the online store");
    interrupt(&mut running, libc::SIGINT);
    assert_says(
        &running.printed(),
        &["the online store was away when the stop came", "nothing is lost", "check [online] redis"],
    );
    redis.restart();
    shop.run_to_end();
    shop.expect_all();
    for newest in [2999, 2998, 2960] {
        let found = shop.world.run(&["get", shop.pipeline().to_str().unwrap(), &purchase(newest).0, "--json"]);
        let found: Value = serde_json::from_str(&found).unwrap();
        let orders = &found["groups"]["orders"];
        let at = DateTime::parse_from_rfc3339(orders["event_time"].as_str().unwrap()).unwrap();
        assert_eq!(at.timestamp_millis(), time(newest), "{found}");
        assert_eq!(orders["features"]["orders_count_lifetime"]["value"], 3000 / CUSTOMERS);
    }
}

#[test]
fn without_a_redis_it_says_so_and_exits() {
    let kafka = Kafka::shared();
    let redis = Redis::start();
    redis.kill();
    let shop = Shop::open(kafka, &redis);
    let output = shop.command(&["--patience", "1ms"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_says(&said, &[&format!("online store redis {} does not answer", redis.address()), "check [online] redis"]);
}

#[rstest]
#[case::classic("classic")]
#[case::kafka_4("consumer")]
fn a_broker_that_goes_and_comes_holds_the_stream_and_doubles_nothing(#[case] group_protocol: &str) {
    let (kafka, redis) = (Kafka::start(), Redis::shared());
    let mut shop = Shop::open(&kafka, redis);
    shop.share_out_by(group_protocol);
    shop.send(0..2000);
    let mut follower = kafka.follow(&shop.topic("predictions"));
    kafka.kill();
    let mut running = shop.start();
    running.until_printed("waiting for at most 30s: no broker reachable at");
    kafka.restart();
    running.until("it has made predictions", || follower.read().len() >= 300);

    kafka.kill();
    running.until_printed("holding: ");
    kafka.restart();
    shop.send(2000..2500);
    running.until("it has made all predictions", || follower.read().len() >= shop.due.len());
    interrupt(&mut running, libc::SIGINT);
    shop.run_to_end();
    shop.expect_all();
}

#[test]
fn without_a_broker_it_says_so_and_exits() {
    let mut world = World::new();
    world.set("KAFKA_BROKERS", "127.0.0.1:1");
    let output = world.output(&["run", "tests/pipelines/cdnow", "--listen", "none", "--patience", "1ms"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_says(&said, &["no broker reachable at 127.0.0.1:1: ", "check [broker] brokers"]);
}

#[test]
fn a_missing_topic_is_named_and_an_empty_one_is_waited_on() {
    let kafka = Kafka::shared();
    let mut shop = Shop::without_topics(kafka, Redis::shared());
    let output = shop.command(&["--until-end"]).output().unwrap();
    let (said, topic) = (String::from_utf8_lossy(&output.stderr), shop.topic("purchases"));
    assert_eq!(output.status.code(), Some(1), "{said}");
    let advice = format!("driftline topic create {topic}");
    assert_says(&said, &[&format!("topic '{topic}' does not exist on kafka {}", kafka.address()), &advice]);

    kafka.create(&topic, PARTITIONS);
    shop.run_to_end();
    assert!(shop.predictions().is_empty());
    let mut running = shop.start();
    running.until_printed("owns partition");
    let mut follower = kafka.follow(&shop.topic("predictions"));
    shop.send(0..100);
    running.until("it has made all predictions", || follower.read().len() >= shop.due.len());
    interrupt(&mut running, libc::SIGTERM);
    shop.run_to_end();
    shop.expect_all();
}

#[test]
fn every_fault_of_a_definition_is_told_at_once_with_its_place_and_a_way_out() {
    let world = World::new();
    let text = fs::read_to_string(root().join("tests/pipelines/cdnow/pipeline.toml")).unwrap();
    let mut broken = text.replace("../../../schemas", root().join("schemas").to_str().unwrap());
    let mut expected = Vec::new();
    for (good, bad, marked, says) in [
        ("\n[offline]\n", "\n[ofline]\n", "ofline", vec!["unknown key `ofline`", "did you mean `offline`?"]),
        ("warm_up = \"365d\"", "warmup = \"365d\"", "warmup", vec!["unknown key `warmup`", "did you mean `warm_up`?"]),
        ("where = \"quantity > 0\"", "where = \"quantiy > 0\"", "quantiy", vec!["did you mean `quantity`?"]),
        ("of = \"quantity\"", "of = \"quantty\"", "quantty", vec!["no field `quantty`", "did you mean `quantity`?"]),
        ("price_mean_90d, 0)", "price_mean_90d, 0", "price_mean_90d, 0\"", vec!["expected: )"]),
        ("rows = 500", "rows = \"many\"", "\"many\"", vec!["takes an integer, but this is a string"]),
    ] {
        assert!(broken.contains(good), "{good} is not there to be broken");
        broken = broken.replacen(good, bad, 1);
        expected.push((marked, says));
    }
    let folder = world.define("broken", &broken);

    let output = world.output(&["check", &folder]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    for (marked, says) in &expected {
        let line = 1 + broken.lines().position(|line| line.contains(marked)).unwrap();
        let place = format!("pipeline.toml:{line}:");
        let fault = said.split("\n\n").find(|fault| fault.contains(&place));
        assert_says(fault.unwrap_or_else(|| panic!("nothing is said of {place}\n{said}")), says);
    }
    assert_says(&said, &[&format!("{} faults", expected.len())]);
    // `run` says the same, and runs nothing.
    let run = world.output(&["run", &folder, "--listen", "none"]);
    assert_eq!((run.status.code(), String::from_utf8_lossy(&run.stderr)), (Some(2), said));
}

/// A pipeline on the embedded log and store.
fn embedded(change: impl FnOnce(&mut toml::Table)) -> (World, PathBuf) {
    let world = World::new();
    let mut definition = definition("embedded");
    let log = world.path("log");
    definition["broker"].as_table_mut().unwrap().insert("path".into(), log.to_str().unwrap().into());
    change(&mut definition);
    let folder = world.define("pipeline", &toml::to_string(&definition).unwrap());
    (world, folder.into())
}

#[test]
fn without_onnx_runtime_it_says_where_it_looked_and_how_to_get_it() {
    let (mut world, folder) = embedded(|_| {});
    world.set("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so");
    let output = world.output(&["run", folder.to_str().unwrap(), "--listen", "none", "--until-end"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_says(
        &said,
        &["ONNX Runtime's library", "/nowhere/libonnxruntime.so: ", "pip install onnxruntime", "ORT_DYLIB_PATH"],
    );
}

#[test]
fn a_model_of_other_features_is_refused_with_the_differences() {
    let (world, folder) = embedded(|definition| {
        let features = definition["score"]["features"].as_array_mut().unwrap();
        features.retain(|name| name.as_str() != Some("price_min_90d"));
        features.push("orders_count_lifetime".into());
    });
    let arguments = ["run", folder.to_str().unwrap(), "--listen", "none", "--until-end"];
    let output = world.output(&arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_says(
        &said,
        &["model 'cdnow' does not fit [score] features", "price_min_90d", "orders_count_lifetime", "train"],
    );
}

/// What a record becomes.
enum Fate {
    Prediction,
    /// Left out by `where`.
    Filtered,
    /// A dead letter of this reason, whose error has these parts.
    Dead(&'static str, &'static [&'static str]),
}

/// Purchases before and after the odd ones.
const BEFORE: usize = 20;
const AFTER: usize = 20;
/// When the odd ones are made.
const THEN: i64 = FIRST_DAY + 20 * 60_000;

/// A record that is not like the others: key, value, what it becomes.
type Odd<'a> = (Option<&'a str>, Option<Vec<u8>>, Fate);

/// Partition, key and value of a record to send.
type Sent = (i32, Option<Vec<u8>>, Option<Vec<u8>>);

/// Sends odd records, each after a good one and with good ones around all of them, and compares predictions and dead letters
/// with what they are to become.
fn expect_fates(shop: &mut Shop<'_>, good: fn(usize, i64) -> Vec<u8>, odd: Vec<Odd<'_>>) {
    let mut records: Vec<Sent> = Vec::new();
    let mut dead = BTreeMap::new();
    let send_good = |shop: &mut Shop<'_>, records: &mut Vec<_>, partition, n, at| {
        shop.expect(partition, true);
        records.push((partition, Some(purchase(n).0.into_bytes()), Some(good(n, at))));
    };
    for n in 0..BEFORE {
        send_good(shop, &mut records, partition(n), n, time(n));
    }
    for (n, (key, value, fate)) in odd.into_iter().enumerate() {
        send_good(shop, &mut records, partition(n), n, THEN);
        let offset = shop.expect(partition(n), matches!(fate, Fate::Prediction));
        let key = key.map(|key| key.as_bytes().to_vec());
        if let Fate::Dead(reason, parts) = fate {
            dead.insert((partition(n), offset), (reason, parts, key.clone(), value.clone()));
        }
        records.push((partition(n), key, value));
    }
    for n in BEFORE + 1..BEFORE + 1 + AFTER {
        send_good(shop, &mut records, partition(n), n, time(n));
    }
    let sent = records.iter().map(|(partition, key, value)| (*partition, key.as_deref(), value.as_deref()));
    shop.kafka.produce_any(&shop.topic("purchases"), sent);
    shop.run_to_end();
    shop.expect_all();

    let letters = shop.kafka.consume(&shop.topic("dead-letters"));
    assert_eq!(letters.len(), dead.len(), "{letters:#?}");
    for letter in letters {
        let header = |name: &str| {
            let name = format!("driftline.{name}");
            let (_, value) = letter.headers.iter().find(|(known, _)| *known == name).expect("driftline's headers");
            String::from_utf8(value.clone()).unwrap()
        };
        assert_eq!(header("topic"), shop.topic("purchases"));
        let at = (header("partition").parse().unwrap(), header("offset").parse().unwrap());
        let (reason, parts, key, value) =
            dead.remove(&at).unwrap_or_else(|| panic!("{at:?} is no dead letter, or twice"));
        let error = header("error");
        eprintln!("{reason}: {error}");
        assert_eq!(header("reason"), reason, "{error}");
        assert_says(&error, parts);
        assert_eq!((letter.key, letter.value), (key, Some(value.unwrap_or_default())));
    }
}

#[test]
fn broken_json_becomes_dead_letters_and_its_neighbours_predictions() {
    use Fate::{Dead, Filtered, Prediction};
    let mut shop = Shop::open(Kafka::shared(), Redis::shared());
    let then = THEN.to_string();
    // A good one, but for this field; without it where there is no value.
    let with = |field: &str, value: &str| {
        let good = [("customer_id", r#""c1""#), ("purchased_at", &then), ("quantity", "2"), ("amount", "3.5")];
        let mut fields = BTreeMap::from(good);
        fields.insert(field, value);
        let fields: Vec<_> =
            fields.iter().filter(|(_, v)| !v.is_empty()).map(|(f, v)| format!("\"{f}\":{v}")).collect();
        Some(format!("{{{}}}", fields.join(",")).into_bytes())
    };
    let text = |text: &str| Some(text.as_bytes().to_vec());
    let deep = format!("{{\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let odd = vec![
        (Some("c1"), text("not json"), Dead("malformed", &["byte 0"])),
        (Some("c1"), text(r#"{"customer_id":"c1","purchased_at":17357"#), Dead("malformed", &[])),
        (Some("c1"), text(""), Dead("malformed", &[])),
        (Some("c1"), text("[]"), Dead("malformed", &[])),
        (Some("c1"), text("{} {}"), Dead("malformed", &[])),
        (Some("c1"), text(&deep), Dead("malformed", &[])),
        (Some("c1"), Some(b"{\"customer_id\":\"\xff\"}".to_vec()), Dead("malformed", &["invalid UTF-8 at byte 16"])),
        (Some("c1"), None, Dead("null_value", &["tombstone"])),
        (None, None, Dead("null_value", &[])),
        (Some("c1"), with("customer_id", "null"), Dead("null_key", &["'customer_id'"])),
        (Some("c1"), with("customer_id", ""), Dead("null_key", &["'customer_id'"])),
        (Some("c1"), with("customer_id", "{\"id\":1}"), Dead("wrong_type", &["customer_id"])),
        (Some("c1"), with("quantity", "\"many\""), Dead("wrong_type", &["quantity", "many"])),
        (Some("c1"), with("quantity", "9223372036854775808"), Dead("wrong_type", &["quantity"])),
        (Some("c1"), with("quantity", "1.5"), Dead("wrong_type", &["quantity"])),
        (Some("c1"), with("purchased_at", "null"), Dead("null_event_time", &["purchased_at"])),
        (Some("c1"), with("purchased_at", ""), Dead("null_event_time", &["purchased_at"])),
        (Some("c1"), with("purchased_at", "\"yesterday\""), Dead("wrong_type", &["yesterday", "declared unit"])),
        (Some("c1"), with("purchased_at", "1735690800000000000"), Dead("bad_event_time", &["ns"])),
        (Some("c1"), with("purchased_at", "253402300800000"), Dead("bad_event_time", &["9999"])),
        (Some("c1"), with("purchased_at", "-62135596800001"), Dead("bad_event_time", &[])),
        (Some("c1"), with("purchased_at", "253402300799999"), Dead("ahead_of_clock", &["9999-12-31"])),
        (Some("c1"), with("purchased_at", "-62135596800000"), Dead("late", &["out_of_order"])),
        (Some("c1"), with("purchased_at", "-1"), Dead("late", &["out_of_order"])),
        (Some("c1"), with("quantity", "0"), Filtered),
        (Some("c1"), with("quantity", "-9223372036854775808"), Filtered),
        (Some("c1"), with("quantity", "null"), Filtered),
        // Odd, but events.
        (None, with("note", "\"a key that Kafka does not have\""), Prediction),
        (Some("c7"), with("note", "\"another customer's key\""), Prediction),
        (Some("c1"), with("amount", "NaN"), Prediction),
        (Some("c1"), with("amount", "-Infinity"), Prediction),
        (Some("c1"), with("amount", "1e308"), Prediction),
        (Some("c1"), with("amount", "1e308"), Prediction),
        (Some("c1"), with("note", &format!("\"{}\"", "x".repeat(500_000))), Prediction),
    ];
    expect_fates(&mut shop, as_json, odd);
}

/// A purchase in Avro, as the specification has it: zigzag varints, length and bytes of a text, little-endian doubles.
fn avro(customer: &str, at: i64, quantity: i64, amount: f64) -> Vec<u8> {
    fn long(out: &mut Vec<u8>, value: i64) {
        let mut left = ((value << 1) ^ (value >> 63)) as u64;
        while left > 0x7f {
            out.push(left as u8 | 0x80);
            left >>= 7;
        }
        out.push(left as u8);
    }
    let mut out = Vec::new();
    long(&mut out, customer.len() as i64);
    out.extend(customer.as_bytes());
    long(&mut out, at);
    long(&mut out, quantity);
    out.extend(amount.to_le_bytes());
    out
}

fn as_avro(n: usize, at: i64) -> Vec<u8> {
    let (customer, quantity, amount) = purchase(n);
    avro(&customer, at, quantity, amount)
}

#[test]
fn broken_avro_becomes_dead_letters_and_its_neighbours_predictions() {
    use Fate::{Dead, Filtered, Prediction};
    let mut shop = Shop::without_topics(Kafka::shared(), Redis::shared());
    shop.world.set("SCHEMA_REGISTRY_URL", &SchemaRegistry::shared().url());
    shop.define(|definition| definition["sources"]["purchases"]["format"] = "avro".into());
    for topic in ["purchases", "predictions"] {
        shop.kafka.create(&shop.topic(topic), PARTITIONS);
    }
    let good = || avro("c1", THEN, 2, 3.5);
    let cut = |bytes: Vec<u8>, length: usize| bytes[..length].to_vec();
    let framed = |id: u32, data: Vec<u8>| [&[0], &id.to_be_bytes()[..], &data].concat();
    let mut odd: Vec<(Vec<u8>, Fate)> = vec![
        (Vec::new(), Dead("malformed", &[])),
        (b"{\"customer_id\":\"c1\"}".to_vec(), Dead("malformed", &[])),
        ([good(), vec![0]].concat(), Dead("malformed", &[])),
        (vec![0xff; 64], Dead("malformed", &[])),
        // A text of more bytes than there are, and of a negative number of them.
        (vec![0xfe, 0xff, 0xff, 0xff, 0x0f, b'c'], Dead("malformed", &[])),
        (vec![0x01, b'c'], Dead("malformed", &[])),
        (framed(987_654_321, good()), Dead("unknown_schema", &["987654321", "http://"])),
        (framed(987_654_321, cut(good(), 9)), Dead("unknown_schema", &["987654321"])),
        (avro("c1", i64::MIN, 2, 3.5), Dead("bad_event_time", &["purchased_at"])),
        (avro("c1", i64::MAX, 2, 3.5), Dead("bad_event_time", &["purchased_at"])),
        (avro("c1", 253_402_300_799_999, 2, 3.5), Dead("ahead_of_clock", &["9999-12-31"])),
        (avro("c1", -62_135_596_800_000, 2, 3.5), Dead("late", &["out_of_order"])),
        (avro("c1", THEN, i64::MIN, 3.5), Filtered),
        (avro("c1", THEN, 1, f64::NAN), Prediction),
        (avro("c1", THEN, 1, f64::NEG_INFINITY), Prediction),
        (avro("c1", THEN, i64::MAX, f64::MAX), Prediction),
        (avro("c1", THEN, i64::MAX, f64::MAX), Prediction),
    ];
    // Cut off after each byte.
    odd.extend((1..good().len()).map(|length| (cut(good(), length), Dead("malformed", &["at byte"]))));
    let odd = odd.into_iter().map(|(value, fate)| (Some("c1"), Some(value), fate));
    expect_fates(&mut shop, as_avro, odd.collect());
}
