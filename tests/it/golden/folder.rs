//! One golden folder, and the logs that its input is laid on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use driftline::broker::{self, Broker, Offsets, OutRecord, TopicSettings};
use driftline::config;
use driftline::config::plan::{Format, Plan};
use driftline::pipeline::{self, Context, RunOptions, Stages, Wiring};
use driftline::runtime::shutdown::Stop;
use driftline::store::{OfflineStore, open_online};
use driftline::telemetry::board::{Board, SourceCounts};
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::outcome::Outcome;
use crate::process::{World, root, run_python};
use crate::servers::{Kafka, unique, until};

const LIMIT: Duration = Duration::from_secs(60);
/// Parts in which input comes while a pipeline is killed again and again.
const PARTS: usize = 12;

/// One record of the input.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub source: String,
    pub partition: i32,
    pub timestamp: i64,
    pub key: String,
    /// JSON, in the oracle's words.
    all: Value,
}

impl Line {
    fn of(all: Value) -> Self {
        let text = |name: &str| all[name].as_str().unwrap().to_owned();
        Self {
            source: text("source"),
            partition: i32::try_from(all["partition"].as_i64().unwrap()).unwrap(),
            timestamp: all["timestamp"].as_i64().unwrap(),
            key: text("key"),
            all,
        }
    }

    /// The same record in another partition.
    pub fn on(&self, partition: i32) -> Self {
        let mut all = self.all.clone();
        all["partition"] = partition.into();
        Self::of(all)
    }
}

/// See the module.
pub struct Folder {
    path: PathBuf,
    spec: toml::Table,
}

impl Folder {
    pub fn open(name: &str) -> Self {
        let path = root().join("tests/golden").join(name);
        let spec = fs::read_to_string(path.join("pipeline.toml")).unwrap().parse().unwrap();
        Self { path, spec }
    }

    pub fn input(&self) -> Vec<Line> {
        let text = fs::read_to_string(self.path.join("input.jsonl")).unwrap();
        text.lines().map(|line| Line::of(serde_json::from_str(line).unwrap())).collect()
    }

    /// Names of `[windows]`.
    pub fn windows(&self) -> impl Iterator<Item = &String> {
        self.spec.get("windows").and_then(toml::Value::as_table).into_iter().flat_map(|windows| windows.keys())
    }

    pub fn is_in_event_time(&self) -> bool {
        self.spec
            .get("score")
            .and_then(|score| score.get("emit"))
            .is_some_and(|emit| emit.as_str() == Some("event_time"))
    }

    /// True where it depends on arrival which of two sources' events is taken first: their input must be there from the start.
    pub fn is_settled_by_arrival(&self) -> bool {
        !self.is_in_event_time() && self.spec["sources"].as_table().unwrap().len() > 1
    }

    /// The oracle's answers for other input, by name: `features`, `windows.NAME`, `online`, `dead-letters`, `ledger`.
    pub fn answers(&self, input: &[Line]) -> BTreeMap<String, Vec<Value>> {
        let world = World::new();
        let (given, out) = (world.path("input.jsonl"), world.path("answers"));
        fs::write(&given, lines(input)).unwrap();
        run_python(&[&"tests/golden/oracle.py", &self.path, &given, &out]);
        read_answers(&out)
    }

    /// The answers that are committed.
    pub fn expected(&self) -> BTreeMap<String, Vec<Value>> {
        read_answers(&self.path.join("expected"))
    }

    /// The input in another order of arrival, in which nothing is late that was not. Events of one time keep their order.
    pub fn shuffled(&self, input: &[Line], seed: u64) -> Vec<Line> {
        let arrival = |line: &Line| {
            let source = &self.spec["sources"][&line.source];
            let bound = source.get("out_of_order").and_then(toml::Value::as_str).unwrap_or("10s");
            let bound = i64::try_from(config::units::duration(bound).unwrap().as_millis()).unwrap();
            let field = source["event_time"]["field"].as_str().unwrap();
            let time = line.all.get("value").and_then(|value| value[field].as_i64());
            // Records without a time, and those that are to be late or ahead, come when they came.
            match time.filter(|time| (line.timestamp - bound..=line.timestamp).contains(time)) {
                Some(time) => {
                    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed ^ time.unsigned_abs());
                    time + rng.random_range(0..=bound)
                }
                None => line.timestamp,
            }
        };
        let mut shuffled: Vec<Line> = input.to_vec();
        shuffled.sort_by_key(arrival);
        shuffled
    }

    /// An embedded log with this input.
    pub fn log(&self, input: &[Line], partitions: i32) -> Log {
        let mut world = World::new();
        let path = world.path("log").display().to_string();
        world.set("LOG", &path);
        self.log_in(world, &[], input, partitions)
    }

    /// Kafka with this input, under a name of its own.
    pub fn log_on(&self, kafka: &Kafka, settings: &[(&str, &str)], input: &[Line], partitions: i32) -> Log {
        let mut world = World::new();
        let path = world.path("online").display().to_string();
        world.set("LOG", &path);
        world.set("KAFKA_BROKERS", &kafka.address());
        world.set("RUN", &unique("-run"));
        self.log_in(world, settings, input, partitions)
    }

    fn log_in(&self, world: World, settings: &[(&str, &str)], input: &[Line], partitions: i32) -> Log {
        let environment = |name: &str| world.variable(name);
        let settings: Vec<_> = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let plan = config::load_with(&self.path, &environment, &settings).unwrap();
        let log = Log { folder: self.path.clone(), world, settings, plan, keys: self.keys() };
        let broker = log.open();
        let settings = TopicSettings { partitions: partitions.unsigned_abs(), compacted: false, retention_ms: None };
        for source in &log.plan.sources {
            broker.create_topic(&source.topic, &settings).unwrap();
        }
        drop(broker);
        log.write(input);
        log
    }

    /// Keys of all entities in the input.
    fn keys(&self) -> BTreeSet<Vec<String>> {
        let entities = self.spec["entities"].as_table().unwrap();
        let keys: Vec<&String> = entities.values().next().unwrap()["key"].as_table().unwrap().keys().collect();
        let key = |line: &Line| -> Option<Vec<String>> {
            let renamed = self.spec["sources"][&line.source].get("key");
            let field =
                |key: &String| renamed.and_then(|r| r.get(key)).and_then(toml::Value::as_str).unwrap_or(key).to_owned();
            let value = line.all.get("value")?;
            keys.iter()
                .map(|key| value.get(field(key)).map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)))
                .collect()
        };
        self.input().iter().filter_map(key).collect()
    }

    /// Failpoints that a run on this log, which is empty, passes: those that only its first run passes, and the others.
    pub fn points_passed(&self, log: &Log, input: &[Line]) -> Points {
        let all = crate::process::failpoints();
        let say: Vec<String> = all.iter().map(|point| format!("{point}=say")).collect();
        let mut passed = input.chunks(input.len().div_ceil(2)).map(|part| {
            log.write(part);
            let output = log.command(1).env("DRIFTLINE_FAILPOINTS", say.join(";")).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let passed = |point: &&'static str| said.lines().any(|line| line == format!("failpoint {point}"));
            all.iter().copied().filter(passed).collect::<Vec<_>>()
        });
        let (mut first, always) = (passed.next().unwrap(), passed.next().unwrap());
        first.retain(|point| !always.contains(point));
        Points { first, always }
    }
}

/// Failpoints on the way of a folder's runs.
pub struct Points {
    /// Passed by the first run alone.
    first: Vec<&'static str>,
    /// Passed by each run that finds new input.
    always: Vec<&'static str>,
}

fn lines(input: &[Line]) -> String {
    input.iter().map(|line| format!("{}\n", line.all)).collect()
}

fn read_answers(folder: &std::path::Path) -> BTreeMap<String, Vec<Value>> {
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        let rows = fs::read_to_string(&path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (path.file_stem().unwrap().to_str().unwrap().to_owned(), rows)
    };
    fs::read_dir(folder).unwrap().map(read).collect()
}

/// A log with some input, and what a pipeline makes of it.
pub struct Log {
    folder: PathBuf,
    world: World,
    /// Laid over the definition.
    settings: Vec<(String, String)>,
    plan: Plan,
    keys: BTreeSet<Vec<String>>,
}

impl Log {
    fn open(&self) -> Arc<dyn Broker> {
        broker::open(&self.plan.broker, "golden").unwrap()
    }

    fn write(&self, input: &[Line]) {
        let broker = self.open();
        let mut producer = broker.producer(None).unwrap();
        for line in input {
            let source = self.plan.sources.iter().find(|source| *source.name == *line.source).unwrap();
            let value = match (line.all.get("value"), line.all.get("text"), &source.format) {
                (Some(value), _, Format::Avro { schema }) => {
                    let schema = apache_avro::Schema::parse_str(schema).unwrap();
                    let value = apache_avro::types::Value::from(value.clone()).resolve(&schema).unwrap();
                    Some(apache_avro::to_avro_datum(&schema, value).unwrap())
                }
                (Some(value), ..) => Some(value.to_string().into_bytes()),
                (None, text, _) => text.map(|text| text.as_str().unwrap().as_bytes().to_vec()),
            };
            let record = OutRecord {
                topic: &source.topic,
                partition: Some(line.partition),
                key: Some(line.key.as_bytes()),
                value: value.as_deref(),
                timestamp: Some(line.timestamp),
                ..OutRecord::default()
            };
            producer.send(record).unwrap();
        }
        producer.commit(&Offsets::new(), None).unwrap();
    }

    /// The stage of features and windows, to the end of the log.
    fn command(&self, workers: usize) -> Command {
        let mut command = self.endless(workers);
        command.arg("--until-end");
        command
    }

    fn endless(&self, workers: usize) -> Command {
        let mut command = self.world.command(&["features"]);
        command.arg(&self.folder).args(["--listen", "none", "--view", "none", "--workers", &workers.to_string()]);
        for (key, value) in &self.settings {
            command.args(["--set", &format!("{key}={value}")]);
        }
        command
    }

    /// Runs to the end of the log in this process. Gives what has become of the records, by source.
    pub fn run_here(&self) -> Vec<Value> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (plan, stop) = (Arc::new(self.plan.clone()), Stop::new());
        let stages = Stages { features: true, score: false, drift: false, retrain: false };
        let wiring = Wiring::open(&plan, stages, runtime.handle(), &stop, LIMIT).unwrap();
        let board = Board::new(plan.sources.iter().map(|source| source.name.as_ref()));
        let options = RunOptions { until_end: true, instance: Some("golden".into()), ..RunOptions::default() };
        pipeline::run(&Context::new(plan, stages, wiring, Arc::clone(&board), options, stop).unwrap()).unwrap();
        let ledger = |(source, counts): &(String, SourceCounts)| {
            let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            json!({
                "source": source, "read": count(&counts.read), "applied": count(&counts.applied),
                "filtered": count(&counts.filtered), "late": count(&counts.late), "dead": count(&counts.dead),
            })
        };
        board.sources.iter().map(ledger).collect()
    }

    pub fn run(&self, workers: usize) {
        let output = self.command(workers).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs it part by part by so many workers, killed at one of these failpoints each time, then to the end. Gives the
    /// number of kills.
    pub fn killed(&self, input: &[Line], points: &Points, workers: usize, at_once: bool) -> usize {
        let parts = if at_once { 1 } else { PARTS };
        let mut kills = 0;
        for (number, part) in input.chunks(input.len().div_ceil(parts)).enumerate() {
            self.write(part);
            let mut now: Vec<&str> = if number == 0 { points.first.clone() } else { Vec::new() };
            match at_once {
                true => now.extend(&points.always),
                false => now.push(points.always[number % points.always.len()]),
            }
            for point in now {
                // With all input there from the start, one that has come to the end is not killed any more.
                let mut command = if at_once { self.command(workers) } else { self.endless(workers) };
                let mut process = {
                    command.env("DRIFTLINE_FAILPOINTS", format!("{point}=kill@1"));
                    self.world.start(command)
                };
                let exit = process.end();
                match exit.signal() {
                    Some(libc::SIGKILL) => kills += 1,
                    _ => assert!(at_once && exit.success(), "{point}: {exit}: {}", process.printed()),
                }
            }
        }
        self.run(workers);
        kills
    }

    pub fn outcome(&self) -> Outcome {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let offline = OfflineStore::open(&self.plan, runtime.handle().clone()).unwrap();
        let files = self.world.path("offline").join(&self.plan.name);
        let mut outcome = Outcome::read(&self.plan, self.open().as_ref(), &offline, &files);
        if !self.plan.groups.is_empty() {
            let online = open_online(&self.plan, runtime.handle().clone()).unwrap();
            outcome.read_online(&self.plan, online.as_ref(), self.keys.iter().cloned());
        }
        outcome
    }

    /// The same, once Kafka shows as many records as there are in `wanted`: it does a moment after a commit has returned.
    pub fn outcome_when(&self, wanted: &Outcome) -> Outcome {
        let mut found = Outcome::default();
        until("all is shown", LIMIT, || {
            found = self.outcome();
            wanted.topics.keys().all(|topic| found.records(topic).count() >= wanted.records(topic).count())
        });
        found
    }
}
