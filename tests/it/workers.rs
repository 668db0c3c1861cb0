//! The workers of the feature stage on a log: every record is applied, filtered or a dead letter, once, however a run ends.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use driftline::broker::{Broker, NextOffset, Offsets, OutRecord, TopicPartition, TopicSettings};
use driftline::config::{self, plan::Plan};
use driftline::pipeline::{self, Context, RunOptions, Stages, Wiring};
use driftline::runtime::shutdown::Stop;
use driftline::source::dead_letter;
use driftline::store::feast::Layout;
use driftline::store::{GroupRead, OnlineError, OnlineStore, Value};
use driftline::telemetry::board::Board;
use driftline::window::FeatureRows;
use rstest::rstest;

use crate::servers::{Kafka, unique, until};

const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);
const PARTITIONS: u32 = 2;
const STAGES: Stages = Stages { features: true, score: false, drift: false, retrain: false };

/// Two sources, of which one asks for feature rows. A batch closes for its rows alone, so that what is left when a run ends
/// is still open.
const PIPELINE: &str = r#"
name = "${NAME}"
[broker]
brokers = "${BROKERS:-}"
partitions = 2
[entities.customer]
key = { customer_id = "string" }
[sources.orders]
topic = "${NAME}.orders"
format = "json"
fields = { customer_id = "string", at = "int64", amount = "float64" }
event_time = { field = "at", unit = "ms" }
out_of_order = "10s"
where = "amount > 0"
[sources.visits]
topic = "${NAME}.visits"
format = "json"
fields = { customer_id = "string", at = "int64" }
event_time = { field = "at", unit = "ms" }
out_of_order = "10s"
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
batch = { rows = 100, wait = "1h" }
"#;

/// A record's coordinates.
type At = (String, i32, i64);

/// What is to become of the records that were written.
#[derive(Debug, Default, PartialEq, Eq)]
struct Fates {
    /// Orders that ask for a feature row.
    rows: BTreeSet<At>,
    /// Dead letters and their reason.
    dead: BTreeSet<(At, String)>,
}

struct Shop {
    name: String,
    plan: Arc<Plan>,
    broker: Arc<dyn Broker>,
    runtime: tokio::runtime::Runtime,
    /// Removed with the shop, where it is its own.
    folder: Option<tempfile::TempDir>,
}

/// How a run ended: the board, and the run's own result.
struct Ended {
    board: Arc<Board>,
    result: Result<(), pipeline::RunError>,
}

impl Shop {
    fn open(kafka: Option<&Kafka>) -> Self {
        Self::open_with(kafka, &[])
    }

    fn open_with(kafka: Option<&Kafka>, settings: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shop = Self::at(folder.path(), unique("shop"), kafka, settings);
        for source in &shop.plan.sources {
            let settings = TopicSettings { partitions: PARTITIONS, compacted: false, retention_ms: None };
            shop.broker.create_topic(&source.topic, &settings).unwrap();
        }
        Self { folder: Some(folder), ..shop }
    }

    /// The pipeline of a folder, with settings laid over its file.
    fn at(folder: &Path, name: String, kafka: Option<&Kafka>, settings: &[(&str, &str)]) -> Self {
        let pipeline = folder.join("pipelines/shop");
        std::fs::create_dir_all(&pipeline).unwrap();
        std::fs::write(pipeline.join("pipeline.toml"), PIPELINE).unwrap();
        let brokers = kafka.map(Kafka::address);
        let environment = |variable: &str| if variable == "NAME" { Some(name.clone()) } else { brokers.clone() };
        let settings: Vec<_> = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let plan = Arc::new(config::load_with(&pipeline, &environment, &settings).unwrap());
        let broker = driftline::broker::open(&plan.broker, "test").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { name, plan, broker, runtime, folder: None }
    }

    fn topic(&self, source: usize) -> String {
        self.plan.sources[source].topic.to_string()
    }

    /// Writes a mix of everything, in which the last records of each partition are ones that become dead letters.
    fn write(&self) -> Fates {
        self.write_late_by(0)
    }

    /// As [`Shop::write`], each record up to `most` milliseconds of event time after its turn.
    fn write_late_by(&self, most: i64) -> Fates {
        let mut fates = Fates::default();
        let mut producer = self.broker.producer(None).unwrap();
        for partition in 0..PARTITIONS.cast_signed() {
            for (source, rows) in [(0, 950_i64), (1, 400)] {
                let mut records = Vec::new();
                for number in 0..rows {
                    // The two sources cover the same time at different paces.
                    let time = 1_700_000_000_000 + number * 950_000 / rows;
                    let order = |time: i64, amount: f64| {
                        Some(format!(r#"{{"customer_id":"c{}","at":{time},"amount":{amount}}}"#, number % 3))
                    };
                    let (value, fate) = match number % 10 {
                        _ if number == rows - 1 => (order(time - 600_000, 1.0), Some("late")),
                        4 if number > 100 => (order(time - 60_000, 1.0), Some("late")),
                        5 => (Some(r#"{"customer_id":"#.into()), Some("malformed")),
                        6 => (None, Some("null_value")),
                        7 if source == 0 => (order(time, 0.0), Some("filtered")),
                        _ => (order(time, 1.5 + number as f64), None),
                    };
                    let last = number == rows - 1;
                    records.push((if last { i64::MAX } else { time + number * 7919 % (most + 1) }, value, fate));
                }
                records.sort_by_key(|(arrival, ..)| *arrival);
                let topic = self.topic(source);
                for (offset, (_, value, fate)) in (0..).zip(records) {
                    let at = (topic.clone(), partition, offset);
                    match fate {
                        Some("filtered") => {}
                        Some(reason) => {
                            fates.dead.insert((at, reason.into()));
                        }
                        None if source == 0 => {
                            fates.rows.insert(at);
                        }
                        None => {}
                    }
                    let value = value.as_ref().map(String::as_bytes);
                    let record = OutRecord { topic: &topic, partition: Some(partition), value, ..OutRecord::default() };
                    producer.send(record).unwrap();
                }
            }
        }
        producer.commit(&Offsets::new(), None).unwrap();
        fates
    }

    /// Feature rows in the order of the features topic, by partition, without their events' coordinates.
    fn feature_rows(&self) -> BTreeMap<i32, Vec<serde_json::Value>> {
        let mut rows: BTreeMap<i32, Vec<serde_json::Value>> = BTreeMap::new();
        for records in self.records(&self.plan.features_topic()) {
            for row in 0..records.len() {
                let mut value: serde_json::Value = serde_json::from_slice(records.values.get(row).unwrap()).unwrap();
                value["pipeline"].take();
                value["source"].take();
                rows.entry(records.partition.partition).or_default().push(value);
            }
        }
        rows
    }

    /// Runs the feature stage to the end of the topics, or until `stop`, against what `online` makes of the online store.
    fn run(&self, stop: &Stop, online: impl FnOnce(Arc<dyn OnlineStore>) -> Arc<dyn OnlineStore>) -> Ended {
        let mut wiring = Wiring::open(&self.plan, STAGES, self.runtime.handle(), stop, LIMIT).unwrap();
        wiring.online = wiring.online.map(online);
        let board = Board::new(self.plan.sources.iter().map(|source| source.name.as_ref()));
        let options = RunOptions { until_end: true, instance: Some("test".into()), ..RunOptions::default() };
        let context =
            Context::new(Arc::clone(&self.plan), STAGES, wiring, Arc::clone(&board), options, stop.clone()).unwrap();
        let result = pipeline::run(&context);
        Ended { board, result }
    }

    fn run_to_the_end(&self) -> Arc<Board> {
        let ended = self.run(&Stop::new(), |store| store);
        ended.result.unwrap();
        ended.board
    }

    /// What has become of the records. Nothing may have happened twice.
    fn fates(&self) -> Fates {
        let mut fates = Fates::default();
        for records in self.records(&self.plan.features_topic()) {
            for row in 0..records.len() {
                let value: serde_json::Value = serde_json::from_slice(records.values.get(row).unwrap()).unwrap();
                let source = &value["source"];
                let (partition, offset) = (source["partition"].as_i64().unwrap(), source["offset"].as_i64().unwrap());
                let at = (source["topic"].as_str().unwrap().to_owned(), i32::try_from(partition).unwrap(), offset);
                assert!(fates.rows.insert(at), "twice: {value}");
            }
        }
        for records in self.records(&self.plan.dead_letter_topic()) {
            for row in 0..records.len() {
                let letter = dead_letter::read_back(&records, row).unwrap();
                let at = (letter.partition.topic.to_string(), letter.partition.partition, letter.offset);
                assert!(fates.dead.insert((at, letter.reason.clone())), "twice: {letter:?}");
            }
        }
        fates
    }

    fn records(&self, topic: &str) -> Vec<driftline::broker::Records> {
        let info = self.broker.topic(topic).unwrap().unwrap();
        let mut all = Vec::new();
        for (number, (start, end)) in info.partitions.iter().enumerate() {
            let at = TopicPartition::new(topic, i32::try_from(number).unwrap());
            let mut next: NextOffset = *start;
            while next < *end {
                let (records, after) = self.broker.read(&at, next, 1000, LIMIT).unwrap();
                assert!(after > next);
                all.push(records);
                next = after;
            }
        }
        all
    }

    /// Says that every record has had its fate, in the log and in the offline files.
    fn expect(&self, expected: &Fates) {
        // Kafka shows what a transaction has committed a moment after the commit has returned.
        until("all is shown", LIMIT, || {
            let fates = self.fates();
            fates.rows.len() >= expected.rows.len() && fates.dead.len() >= expected.dead.len()
        });
        let found = self.fates();
        assert_eq!(found.rows.symmetric_difference(&expected.rows).collect::<Vec<_>>(), Vec::<&At>::new());
        assert_eq!(found.dead.symmetric_difference(&expected.dead).next(), None);
        let offline = driftline::store::OfflineStore::open(&self.plan, self.runtime.handle().clone()).unwrap();
        let rows = |partition| {
            let newest = offline.latest(partition).unwrap().expect("a run ends with a checkpoint");
            newest.files.iter().map(|file| file.rows).sum::<u64>()
        };
        let rows: u64 = (0..PARTITIONS.cast_signed()).map(rows).sum();
        assert_eq!(rows, expected.rows.len() as u64, "rows of the offline files");
    }
}

/// An online store that is lost while it is written to.
struct Lost {
    store: Arc<dyn OnlineStore>,
    /// Writes that succeed before that.
    left: AtomicUsize,
    /// What happens then; true where the write itself still succeeds.
    losing: Box<dyn Fn() -> bool + Send + Sync>,
}

impl OnlineStore for Lost {
    fn write(&self, rows: &FeatureRows, give_up: &dyn Fn() -> bool) -> Result<(), OnlineError> {
        if self.left.fetch_sub(1, Ordering::Relaxed) > 0 {
            return self.store.write(rows, give_up);
        }
        if (self.losing)() {
            return Ok(());
        }
        assert!(give_up(), "a store that is away gives up for a stop only");
        Err(OnlineError::Unreachable { store: "test".into(), reason: "lost".into() })
    }

    fn read(&self, key: &[Value]) -> Result<Vec<(String, GroupRead)>, OnlineError> {
        self.store.read(key)
    }

    fn look_up(&self, layout: &Layout, keys: &[Vec<u8>], timeout: Duration) -> Result<Vec<GroupRead>, OnlineError> {
        self.store.look_up(layout, keys, timeout)
    }

    fn describe(&self) -> String {
        self.store.describe()
    }

    fn ping(&self) -> Result<(), OnlineError> {
        self.store.ping()
    }
}

#[test]
fn at_the_end_every_record_is_applied_filtered_or_a_dead_letter() {
    let shop = Shop::open(None);
    let expected = shop.write();
    let board = shop.run_to_the_end();
    shop.expect(&expected);
    for (source, (_, counts)) in board.sources.iter().enumerate() {
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let of = |wanted: &dyn Fn(&str) -> bool| {
            let topic = shop.topic(source);
            expected.dead.iter().filter(|((t, ..), reason)| *t == topic && wanted(reason)).count() as u64
        };
        assert_eq!(count(&counts.late), of(&|reason| reason == "late"));
        assert_eq!(count(&counts.dead), of(&|reason| reason != "late"));
        assert_eq!(count(&counts.read), [1900, 800][source]);
        assert_eq!(
            count(&counts.read),
            count(&counts.applied) + count(&counts.filtered) + count(&counts.late) + count(&counts.dead)
        );
    }
    shop.run_to_the_end();
    shop.expect(&expected);
}

#[test]
fn under_a_backlog_checkpoints_keep_their_pace() {
    const ROWS: i64 = 40_000;
    // Nothing but a checkpoint, or the end, closes a batch.
    let never = [("score.batch.rows", "1000000"), ("score.batch.bytes", "1GiB")];
    let shop = Shop::open_with(None, &[never[0], never[1], ("offline.checkpoint.rows", "1000")]);
    let mut producer = shop.broker.producer(None).unwrap();
    for number in 0..2 * ROWS {
        let value = format!(r#"{{"customer_id":"c{}","at":{},"amount":1}}"#, number % 7, 1_700_000_000_000 + number);
        let topic = &shop.topic(0);
        let partition = Some((number % 2) as i32);
        let record = OutRecord { topic, partition, value: Some(value.as_bytes()), ..OutRecord::default() };
        producer.send(record).unwrap();
    }
    producer.commit(&Offsets::new(), None).unwrap();
    shop.run_to_the_end();

    let offline = driftline::store::OfflineStore::open(&shop.plan, shop.runtime.handle().clone()).unwrap();
    for partition in 0..PARTITIONS.cast_signed() {
        let newest = offline.latest(partition).unwrap().unwrap();
        let rows: Vec<u64> = newest.files.iter().map(|file| file.rows).collect();
        assert_eq!(rows.iter().sum::<u64>(), ROWS.unsigned_abs(), "{rows:?}");
        // While one checkpoint is being written, rows gather up to twice the limit and by one poll more.
        assert!(rows.iter().all(|rows| *rows <= 2 * 1000 + 16_384), "{rows:?}");
    }
    let rows: usize = shop.fates().rows.len();
    assert_eq!(rows, 2 * 40_000, "every row once");
}

/// All of one source comes after all of the other.
#[rstest]
fn a_source_that_waits_for_another_is_not_fetched_meanwhile(
    #[values(false, true)] on_kafka: bool,
    #[values("arrival", "event_time")] emit: &str,
) {
    const ROWS: i64 = 200_000;
    const VISITS: i64 = 240_000;
    let kafka = on_kafka.then(Kafka::shared);
    let never = ["sources.orders.idle_after", "sources.visits.idle_after"].map(|key| (key, "1h"));
    let settings = [("score.emit", emit), ("score.batch.rows", "10000"), never[0], never[1]];
    let shop = Shop::open_with(kafka, &settings);
    let mut producer = shop.broker.producer(None).unwrap();
    let mut write = |source: usize, number: i64, time: i64| {
        let value = format!(r#"{{"customer_id":"c{}","at":{},"amount":1}}"#, number % 7, 1_700_000_000_000 + time);
        let partition = Some((number % 2) as i32);
        let topic = &shop.topic(source);
        let record = OutRecord { topic, partition, value: Some(value.as_bytes()), ..OutRecord::default() };
        producer.send(record).unwrap();
    };
    for number in 0..ROWS {
        write(0, number, number * 10);
    }
    for number in 0..VISITS {
        write(1, number, 2_000_000 + number * 10);
    }
    producer.commit(&Offsets::new(), None).unwrap();
    let board = shop.run_to_the_end();

    let counts = |source: usize| {
        let counts = &board.sources[source].1;
        [&counts.applied, &counts.pauses].map(|count| count.load(Ordering::Relaxed))
    };
    // On Kafka a partition may change hands and be read again, and may bring all orders first.
    if !on_kafka {
        assert_eq!([counts(0)[0], counts(1)[0]], [ROWS, VISITS].map(i64::unsigned_abs));
        assert!(counts(1)[1] > 0, "{:?}", counts(1));
    }
    let topic = shop.plan.features_topic();
    until("all is shown", LIMIT, || {
        shop.records(&topic).iter().map(|records| records.len() as i64).sum::<i64>() >= ROWS
    });
    for (partition, rows) in shop.feature_rows() {
        // Every 14th order is of the same customer and partition, and all lie within the hour.
        let before = (ROWS - 2 + i64::from(partition)) / 14;
        let last = &rows[rows.len() - 1]["features"];
        assert_eq!(last["spend_sum_1h"], 1.0 + before as f64, "partition {partition}: {last}");
    }
}

#[test]
fn a_stop_while_the_online_store_is_away_loses_nothing() {
    for writes in [0, 1] {
        let shop = Shop::open(None);
        let expected = shop.write();
        let stop = Stop::new();
        let ended = shop.run(&stop, |store| {
            let stop = stop.clone();
            let losing = Box::new(move || {
                stop.request();
                false
            });
            Arc::new(Lost { store, left: AtomicUsize::new(writes), losing })
        });
        ended.result.unwrap();
        assert!(shop.fates().rows.len() < expected.rows.len(), "it stopped on the way");
        shop.run_to_the_end();
        shop.expect(&expected);
    }
}

#[test]
fn a_stop_while_the_broker_is_away_loses_nothing() {
    let kafka = Arc::new(Kafka::start());
    let shop = Shop::open(Some(&kafka));
    let expected = shop.write();
    let stop = Stop::new();
    let ended = shop.run(&stop, |store| {
        let (kafka, stop) = (Arc::clone(&kafka), stop.clone());
        let losing = Box::new(move || {
            kafka.kill();
            stop.request();
            true
        });
        Arc::new(Lost { store, left: AtomicUsize::new(1), losing })
    });
    ended.result.unwrap();
    assert!(stop.requested(), "it stopped on the way");
    kafka.restart();
    shop.run_to_the_end();
    shop.expect(&expected);
}

/// The child of the next test: runs the pipeline of a folder to its end. Does nothing when run by itself.
#[test]
fn workers_crash_child() {
    let (Ok(folder), Ok(name)) = (std::env::var("DRIFTLINE_TEST_FOLDER"), std::env::var("DRIFTLINE_TEST_PIPELINE"))
    else {
        return;
    };
    let settings: Vec<(&str, &str)> = match std::env::var("DRIFTLINE_TEST_EMIT").as_deref() {
        Ok("event_time") => EVENT_TIME.to_vec(),
        Ok("little_memory") => LITTLE_MEMORY.to_vec(),
        _ => Vec::new(),
    };
    let ended = Shop::at(Path::new(&folder), name, None, &settings).run(&Stop::new(), |store| store);
    println!("ended with {:?}", ended.result.map_err(|error| error.to_string()));
}

/// Rows in event-time order, and checkpoints while some are held.
const EVENT_TIME: [(&str, &str); 2] = [("score.emit", "event_time"), ("offline.checkpoint.rows", "100")];

/// The same, with all states on disk whenever no event needs them.
const LITTLE_MEMORY: [(&str, &str); 3] = [EVENT_TIME[0], EVENT_TIME[1], ("state.memory", "1KiB")];

#[test]
fn a_pipeline_that_only_publishes_keeps_its_state_and_nothing_else() {
    let rows = [&[][..], &[("online.enabled", "false"), ("offline.rows", "false")]].map(|settings| {
        let shop = Shop::open_with(None, settings);
        let mut expected = shop.write();
        shop.run_to_the_end();
        // What the next run makes of one more order depends on the state that the last one has left.
        let order = br#"{"customer_id":"c0","at":1700000950000,"amount":1.0}"#;
        let mut producer = shop.broker.producer(None).unwrap();
        for source in [0, 1] {
            let topic = shop.topic(source);
            let record = OutRecord { topic: &topic, partition: Some(0), value: Some(order), ..OutRecord::default() };
            producer.send(record).unwrap();
        }
        producer.commit(&Offsets::new(), None).unwrap();
        expected.rows.insert((shop.topic(0), 0, 950));
        shop.run_to_the_end();
        assert_eq!(shop.fates(), expected);
        let folder = Path::new(shop.plan.offline.url.strip_prefix("file://").unwrap()).join(&shop.name);
        assert!(folder.join("state").is_dir());
        assert_eq!(folder.join("features").is_dir(), settings.is_empty());
        shop.feature_rows()
    });
    assert_eq!(rows[0], rows[1]);
}

#[test]
fn in_event_time_the_output_does_not_depend_on_the_order_of_arrival() {
    let rows = [0, 8_000].map(|late_by| {
        let shop = Shop::open_with(None, &EVENT_TIME);
        let expected = shop.write_late_by(late_by);
        shop.run_to_the_end();
        shop.expect(&expected);
        shop.feature_rows()
    });
    let times = |rows: &[serde_json::Value]| rows.iter().map(|row| row["event_time"].as_i64()).collect::<Vec<_>>();
    assert!(rows[0].values().all(|rows| times(rows).is_sorted()));
    assert_eq!(rows[0], rows[1]);
}

#[cfg(feature = "failpoints")]
#[rstest::rstest]
#[case::as_events_arrive("arrival", &[])]
#[case::in_event_time("event_time", &EVENT_TIME)]
#[case::with_states_on_disk("little_memory", &LITTLE_MEMORY)]
fn a_worker_that_fails_or_is_killed_on_the_way_loses_nothing_and_repeats_nothing(
    #[case] emit: &str,
    #[case] settings: &[(&str, &str)],
) {
    use std::os::unix::process::ExitStatusExt;

    let shop = Shop::open_with(None, settings);
    let expected = shop.write_late_by(8_000);
    let Shop { name, broker, plan, folder, runtime } = shop;
    // The log belongs to one process at a time.
    drop((broker, plan, runtime));
    let folder = folder.unwrap();
    for (point, killed) in [
        ("features.after_window=error@1", false),
        ("features.after_window=error@2", false),
        ("features.after_online=kill@1", true),
        ("publish.before_commit=kill@1", true),
        ("broker.commit.after=kill@1", true),
        ("offline.rows_written=kill@1", true),
        ("offline.manifest_written=kill@1", true),
    ] {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "workers::workers_crash_child", "--nocapture"])
            .env("DRIFTLINE_TEST_FOLDER", folder.path())
            .env("DRIFTLINE_TEST_PIPELINE", &name)
            .env("DRIFTLINE_FAILPOINTS", point)
            .env("DRIFTLINE_TEST_EMIT", emit)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert_eq!(child.status.signal(), killed.then_some(libc::SIGKILL), "{point}: {child:?}");
        assert_eq!(said.contains(r#"ended with Err("feature rows: failpoint")"#), !killed, "{point}: {said}");
    }
    let shop = Shop { folder: None, ..Shop::at(folder.path(), name, None, settings) };
    shop.run_to_the_end();
    shop.expect(&expected);
    if emit != "arrival" {
        let undisturbed = Shop::open_with(None, &EVENT_TIME);
        undisturbed.write();
        undisturbed.run_to_the_end();
        assert_eq!(shop.feature_rows(), undisturbed.feature_rows());
    }
}
