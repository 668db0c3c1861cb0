//! The whole binary on a real Kafka and a real Redis of this bench, on loopback: the churn pipeline, generated events.
//!
//! Backlog: all events are in the topics; `driftline run --until-end` reads them, computes, stores, scores and publishes.
//! Wall time and CPU time include the start of the process. CPU and peak memory are those of the process, as the system
//! counts them; the servers' are not in them, but they share the cores.
//!
//! Latency: events arrive at a fixed rate; from an event's timestamp (its producer's clock, when it was sent) until a consumer
//! with `read_committed` in this process holds its prediction. A first part of the stream is not counted.
//!
//! `cargo bench --bench end_to_end` prints a table. Not criterion's: one run takes seconds, and a process is what is measured.

#![allow(clippy::unwrap_used, reason = "a bench fails by panicking")]

#[allow(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/servers.rs"]
mod servers;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use driftline::runtime::clock;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::{ClientConfig, TopicPartitionList as Partitions};
use servers::{Kafka, Redis, unique, until};

const PIPELINE: &str = "pipelines/churn";
const SCORED: &str = "churn.purchases";
const PREDICTIONS: &str = "churn.predictions";
/// Events a second offered to the latency runs, and how many events of each are sent.
const RATES: [u64; 3] = [1_000, 5_000, 20_000];
const SECONDS: u64 = 20;
/// Share of a latency run that warms it up.
const WARM_UP: f64 = 0.3;

fn main() {
    // `cargo test` runs benches once to see that they work; that needs no long run.
    let customers = if std::env::args().any(|a| a == "--test") { 500 } else { 20_000 };
    println!("cores: {}", thread::available_parallelism().unwrap());
    println!(
        "\n| backlog | events | seconds | events/s | predictions/s | CPU s per million events | peak memory MiB |\n|---|---|---|---|---|---|---|"
    );
    for (name, command, settings) in [
        ("fused: features, Redis, Arrow files, model, predictions", "run", &[][..]),
        ("features, Redis, Arrow files, feature rows", "features", &[][..]),
    ] {
        backlog(name, command, settings, customers);
    }
    if customers < 1000 {
        return;
    }
    println!(
        "\n| events/s offered | predictions | p50 ms | p90 ms | p99 ms | p99.9 ms | max ms |\n|---|---|---|---|---|---|---|"
    );
    for rate in RATES {
        latency(rate);
    }
}

struct Place {
    kafka: Kafka,
    redis: Redis,
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            kafka: Kafka::start(),
            redis: Redis::start_with(["--appendonly", "no"]),
            folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        }
    }

    fn driftline(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_driftline"));
        let at = |name: &str| format!("file://{}", self.folder.path().join(name).display());
        command
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("KAFKA_BROKERS", self.kafka.address())
            .env("REDIS_URL", self.redis.url())
            .env("OFFLINE_URL", at("offline"))
            .env("MODEL_REGISTRY", at("models"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.log()).unwrap());
        command
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("stderr.log")
    }

    fn run(&self, arguments: &[&str]) {
        let status = self.driftline(arguments).status().unwrap();
        assert!(status.success(), "{arguments:?}: {}", std::fs::read_to_string(self.log()).unwrap());
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.kafka.address()).set("group.id", unique("bench"));
        config.set("enable.auto.commit", "false").set("isolation.level", "read_committed");
        config
    }

    /// Records in a topic, transaction markers included.
    fn records(&self, topic: &str) -> i64 {
        let consumer: BaseConsumer = self.client().create().unwrap();
        let cluster = consumer.fetch_metadata(Some(topic), Duration::from_secs(10)).unwrap();
        let partitions = cluster.topics()[0].partitions().iter();
        partitions.map(|p| consumer.fetch_watermarks(topic, p.id(), Duration::from_secs(10)).unwrap().1).sum()
    }
}

/// What the system counts of a child that has ended.
struct Usage {
    cpu: f64,
    peak_mib: f64,
}

fn measured(mut command: Command, log: &Path) -> (f64, Usage) {
    let started = clock::monotonic();
    #[expect(clippy::zombie_processes, reason = "wait4 waits for it, and tells what it used")]
    let child = command.spawn().unwrap();
    let pid = libc::pid_t::try_from(child.id()).unwrap();
    let mut status = 0;
    // SAFETY: all zeroes is a valid rusage; the child is this process's and is waited for nowhere else.
    let (waited, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::wait4(pid, &raw mut status, 0, &raw mut usage), usage)
    };
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!((waited, status), (pid, 0), "{}", std::fs::read_to_string(log).unwrap());
    let time = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    (seconds, Usage { cpu: time(usage.ru_utime) + time(usage.ru_stime), peak_mib: usage.ru_maxrss as f64 / 1024.0 })
}

const UNWATCHED: [&str; 4] = ["--listen", "none", "--set", "monitor.warm_up=3650d"];

fn backlog(name: &str, stage: &str, settings: &[&str], customers: u32) {
    let place = Place::new();
    let customers = customers.to_string();
    place.run(&["generate", PIPELINE, "--customers", &customers, "--days", "120"]);
    let events: i64 = ["purchases", "logins", "support"].iter().map(|s| place.records(&format!("churn.{s}"))).sum();
    let purchases = place.records(SCORED);
    let arguments = [&[stage, PIPELINE, "--until-end"], &UNWATCHED[..], settings].concat();
    let (seconds, usage) = measured(place.driftline(&arguments), &place.log());
    println!(
        "| {name} | {events} | {seconds:.1} | {:.0} | {:.0} | {:.2} | {:.0} |",
        events as f64 / seconds,
        purchases as f64 / seconds,
        usage.cpu * 1e6 / events as f64,
        usage.peak_mib
    );
}

#[derive(serde::Deserialize)]
struct Prediction {
    source: Source,
}

#[derive(serde::Deserialize)]
struct Source {
    partition: i32,
    offset: i64,
}

fn assignment(consumer: &BaseConsumer, topic: &str) -> Partitions {
    let cluster = consumer.fetch_metadata(Some(topic), Duration::from_secs(10)).unwrap();
    let mut list = TopicPartitionList::new();
    for partition in cluster.topics()[0].partitions() {
        list.add_partition_offset(topic, partition.id(), Offset::Beginning).unwrap();
    }
    list
}

fn latency(rate: u64) {
    let place = Place::new();
    place.run(&["topic", "create", "--pipeline", PIPELINE, "--sources"]);
    place.run(&["topic", "create", PREDICTIONS, "--pipeline", PIPELINE]);
    let arguments = [&["run", PIPELINE], &UNWATCHED[..]].concat();
    let mut running = place.driftline(&arguments).spawn().unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let reader = {
        let consumer: BaseConsumer = place.client().set("fetch.wait.max.ms", "5").create().unwrap();
        consumer.assign(&assignment(&consumer, PREDICTIONS)).unwrap();
        let over = Arc::clone(&over);
        thread::spawn(move || {
            let mut seen = Vec::new();
            loop {
                match consumer.poll(Duration::from_millis(200)) {
                    Some(message) => {
                        let (at, message) = (clock::now_ms(), message.unwrap());
                        let found: Prediction = serde_json::from_slice(message.payload().unwrap()).unwrap();
                        seen.push((found.source.partition, found.source.offset, at));
                    }
                    None if over.load(Ordering::Relaxed) => return seen,
                    None => {}
                }
            }
        })
    };
    // The pipeline owns its partitions before the first event comes: it has an instance lock and a ready model by then.
    let log = place.log();
    until("driftline owns its partitions", Duration::from_secs(60), || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("owns partitions"))
    });
    let mut generate = Command::new(env!("CARGO_BIN_EXE_driftline"));
    let events = (rate * SECONDS).to_string();
    generate
        .args(["generate", PIPELINE, "--customers", "20000", "--speed", &format!("{rate}/s"), "--limit", &events])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("KAFKA_BROKERS", place.kafka.address())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    assert!(generate.status().unwrap().success());
    // The reader sees nothing for 200 ms once all has come.
    over.store(true, Ordering::Relaxed);
    let seen = reader.join().unwrap();
    // SAFETY: the child has not been waited for, so the id is still its own.
    unsafe { libc::kill(libc::pid_t::try_from(running.id()).unwrap(), libc::SIGINT) };
    assert!(running.wait().unwrap().success());

    let sent = timestamps(&place, SCORED);
    let mut times: Vec<i64> = seen.iter().map(|(p, o, at)| at - sent[&(*p, *o)]).collect();
    times.drain(..(times.len() as f64 * WARM_UP) as usize);
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("| {rate} | {} | {} | {} | {} | {} | {} |", times.len(), at(0.5), at(0.9), at(0.99), at(0.999), at(1.0));
}

/// When each record of a topic was sent, milliseconds.
fn timestamps(place: &Place, topic: &str) -> HashMap<(i32, i64), i64> {
    let consumer: BaseConsumer = place.client().set("enable.partition.eof", "true").create().unwrap();
    let list = assignment(&consumer, topic);
    consumer.assign(&list).unwrap();
    let (mut found, mut open) = (HashMap::new(), list.count());
    while open > 0 {
        match consumer.poll(Duration::from_secs(1)) {
            Some(Ok(message)) => {
                found.insert((message.partition(), message.offset()), message.timestamp().to_millis().unwrap());
            }
            Some(Err(_)) => open -= 1,
            None => {}
        }
    }
    found
}
