//! Everything at once, on a real Kafka and Redis: processes are killed at failpoints around every side effect and at random
//! moments, frozen past their sessions, join and leave; the broker and Redis are stopped and killed. In the end nothing may
//! tell what is left behind from what an undisturbed run leaves behind.
//!
//! `DRIFTLINE_CHAOS_KILLS` sets how many processes are killed (50), `DRIFTLINE_CHAOS_SEED` what is done when. Nothing waits
//! for time to pass: a moment is drawn as a number of predictions that a consumer of committed records sees.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use driftline::config;
use driftline::store::OfflineStore;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::faults;
use crate::outcome::{DEAD_LETTERS, Outcome};
use crate::process::{World, failpoints};
use crate::servers::{Follower, Kafka, Process, Redis, unique, until};

/// 2025-01-01, ms.
const START: i64 = 1_735_689_600_000;
const PARTITIONS: i32 = 4;
const CUSTOMERS: usize = 60;
/// Processes that run at the same time at most.
const MOST: usize = 3;
/// Records that are sent at a time, and with them one that is late and one that is broken.
const SLICE: usize = 40;
const LIMIT: Duration = Duration::from_secs(120);

/// Failpoints that a run of features and scoring does not pass, and the tests that are killed there.
const ELSEWHERE: &[&str] = &[
    // tests/it/cdnow.rs and tests/it/drift.rs
    "drift.after_commit",
    "drift.before_commit",
    // tests/it/cdnow.rs
    "retrain.after_promote",
    "retrain.after_register",
    "retrain.before_promote",
    "retrain.before_register",
    // Scoring apart from features: tests/it/cdnow.rs
    "score.after_commit",
    // A state of several parts: tests/it/stores/offline.rs
    "offline.part_written",
    // Events under another key: tests/it/rekey.rs
    "rekey.after_commit",
    "rekey.sent",
    // A second version of the definition: tests/it/versions.rs
    "role.watch",
    "features.handing_over",
    "versions.before_record",
    "versions.bootstrapped",
    "versions.recorded",
];

/// Failpoints that only the first process passes, which finds no model in the registry.
const FIRST: &[&str] = &["model.register", "model.alias"];

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The pipeline under test: features, windows with early results, and predictions.
fn definition(name: &str, topic: &str) -> toml::Table {
    let mut definition = faults::definition(name);
    definition["sources"]["purchases"]["topic"] = topic.into();
    let more = r#"
        [minutes]
        source = "purchases"
        of = "amount"
        functions = ["count", "sum", "max", "last"]
        tumbling = "10m"
        [visits]
        source = "purchases"
        of = "quantity"
        functions = ["count", "mean", "mode"]
        session = "20m"
        early = "30m"
    "#;
    definition.insert("windows".into(), more.parse::<toml::Table>().unwrap().into());
    let properties = definition["broker"]["properties"].as_table_mut().unwrap();
    properties.insert("session.timeout.ms".into(), "1500".into());
    properties.insert("heartbeat.interval.ms".into(), "300".into());
    definition["offline"].as_table_mut().unwrap().insert(
        "checkpoint".into(),
        r#"interval = "200ms"
        rows = 150"#
            .parse::<toml::Table>()
            .unwrap()
            .into(),
    );
    definition["score"].as_table_mut().unwrap().insert("batch".into(), toml::toml! { rows = 40 }.into());
    definition
}

/// One driftline process, by the name that it keeps.
struct Member {
    instance: String,
    process: Process,
}

struct Chaos<'a> {
    kafka: &'a Kafka,
    redis: &'a Redis,
    world: World,
    name: String,
    /// Topic that both runs read.
    topic: String,
    rng: ChaCha8Rng,
    running: Vec<Member>,
    follower: Follower,
    /// Purchases sent, of which each is due a prediction.
    sent: usize,
    started: usize,
    kills: BTreeMap<String, usize>,
}

impl<'a> Chaos<'a> {
    fn new(kafka: &'a Kafka, redis: &'a Redis, seed: u64) -> Self {
        let mut world = World::new();
        world.set("KAFKA_BROKERS", &kafka.address());
        world.set("REDIS_URL", &redis.url());
        let name = unique("chaos");
        let topic = kafka.topic("purchases", PARTITIONS);
        kafka.create(&format!("{name}.predictions"), PARTITIONS);
        let follower = kafka.follow(&format!("{name}.predictions"));
        let chaos = Self {
            kafka,
            redis,
            world,
            rng: ChaCha8Rng::seed_from_u64(seed),
            running: Vec::new(),
            follower,
            sent: 0,
            started: 0,
            kills: BTreeMap::new(),
            name,
            topic,
        };
        chaos.define(&chaos.name);
        chaos
    }

    fn folder(&self, pipeline: &str) -> PathBuf {
        self.world.path("pipelines").join(pipeline)
    }

    fn define(&self, pipeline: &str) {
        let definition = toml::to_string(&definition(pipeline, &self.topic)).unwrap();
        self.world.define(&format!("pipelines/{pipeline}"), &definition);
    }

    fn command(&self, pipeline: &str, instance: &str) -> std::process::Command {
        let mut command = self.world.command(&["run"]);
        command.arg(self.folder(pipeline));
        command.args(["--listen", "none", "--view", "none", "--workers", "1", "--instance", instance]);
        command
    }

    /// Starts a process, that is killed at a failpoint where one is given.
    fn start(&mut self, failpoint: Option<&str>) {
        // Names come back as processes do, so that a new process meets what a killed one of its name has left.
        let taken: BTreeSet<&str> = self.running.iter().map(|member| member.instance.as_str()).collect();
        let names: Vec<String> =
            (0..=MOST).map(|n| format!("member-{n}")).filter(|n| !taken.contains(n.as_str())).collect();
        let instance = names.choose(&mut self.rng).unwrap().clone();
        let mut command = self.command(&self.name, &instance);
        if let Some(failpoint) = failpoint {
            command.env("DRIFTLINE_FAILPOINTS", failpoint);
        }
        self.started += 1;
        self.running.push(Member { process: self.world.start(command), instance });
    }

    /// Sends more purchases once all that were sent before are predicted.
    fn pump(&mut self) {
        if self.follower.read().len() >= self.sent {
            self.send();
        }
    }

    /// Sends a slice of purchases.
    fn send(&mut self) {
        let mut records = Vec::new();
        for n in self.sent..self.sent + SLICE {
            // A few customers buy most; two minutes pass between two purchases of a partition, some come out of order.
            let draw = (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            let customer = draw as usize / 2 % if draw.is_multiple_of(2) { CUSTOMERS } else { 8 };
            let at = START + n as i64 * 30_000 - (n as i64 * 7_919 % 9_000);
            let partition = customer as i32 % PARTITIONS;
            let value = |at: i64| {
                format!(
                    r#"{{"customer_id":"c{customer}","purchased_at":{at},"quantity":{},"amount":{}}}"#,
                    1 + n % 4,
                    1.25 * (1 + n % 100) as f64
                )
            };
            records.push((partition, format!("c{customer}"), value(at)));
            match n % SLICE {
                7 => records.push((partition, format!("c{customer}"), "broken".to_owned())),
                // Late in every order in which a partition has these.
                8 if n > SLICE => records.push((partition, format!("late-{n}"), value(START - 1_000_000))),
                _ => {}
            }
        }
        self.sent += SLICE;
        let records = records.iter().map(|(partition, key, value)| (*partition, key.as_bytes(), value.as_bytes()));
        self.kafka.produce(&self.topic, records);
    }

    /// Pumps until `ready`. No process may end by itself on the way.
    fn until(&mut self, what: &str, mut ready: impl FnMut(&mut Self) -> bool) {
        let done = std::cell::Cell::new(false);
        until(what, LIMIT, || {
            self.pump();
            for member in &mut self.running {
                if let Some(exit) = member.process.ended() {
                    panic!("{} ended ({exit}) before {what}:\n{}", member.instance, member.process.printed());
                }
            }
            done.set(ready(self));
            done.get()
        });
    }

    /// Until a consumer has seen so many more predictions.
    fn until_more(&mut self, more: usize) {
        let wanted = self.follower.read().len() + more;
        self.until("more predictions are made", |chaos| chaos.follower.read().len() >= wanted);
    }

    fn killed(&mut self, how: &str, exit: ExitStatus, printed: &str) {
        let signal = std::os::unix::process::ExitStatusExt::signal(&exit);
        assert_eq!(signal, Some(libc::SIGKILL), "{how}: {exit}:\n{printed}");
        *self.kills.entry(how.to_owned()).or_default() += 1;
    }

    /// A process dies at a failpoint, at the n-th passing.
    fn kill_at(&mut self, point: &str, passing: u64) {
        self.start(Some(&format!("{point}=kill@{passing}")));
        let mut member = self.running.pop().unwrap();
        let mut exit = None;
        self.until(&format!("a process is killed at {point}, passing {passing}"), |_| {
            exit = member.process.ended();
            exit.is_some()
        });
        self.killed(point, exit.unwrap(), &member.process.printed());
    }

    /// A process dies at a random moment.
    fn kill_at_random(&mut self) {
        if self.running.is_empty() {
            self.start(None);
        }
        let more = self.rng.random_range(1..80);
        self.until_more(more);
        let victim = self.rng.random_range(0..self.running.len());
        let mut member = self.running.swap_remove(victim);
        member.process.signal(libc::SIGKILL);
        let exit = member.process.end();
        self.killed("at random", exit, &member.process.printed());
    }

    /// A process is frozen until the others have done its work, and goes on then: its session is over, and others own what it
    /// had read.
    fn freeze(&mut self) {
        while self.running.len() < 2 {
            self.start(None);
        }
        self.until_more(60);
        let victim = self.rng.random_range(0..self.running.len());
        self.running[victim].process.signal(libc::SIGSTOP);
        // Each slice has records for all partitions.
        self.until_more(5 * SLICE);
        self.running[victim].process.signal(libc::SIGCONT);
        self.until_more(3 * SLICE);
    }

    /// A process leaves in order.
    fn leave(&mut self) {
        if self.running.len() < 2 {
            self.start(None);
        }
        self.until_more(20);
        let leaver = self.rng.random_range(0..self.running.len());
        let mut member = self.running.swap_remove(leaver);
        send_away(&mut member.process);
    }

    /// A server goes and comes while processes are at work.
    fn restart(&mut self, what: &str, stop: impl Fn(), start: impl Fn()) {
        if self.running.is_empty() {
            self.start(None);
        }
        let more = self.rng.random_range(1..60);
        self.until_more(more);
        stop();
        start();
        eprintln!("{what}");
        self.until_more(2 * SLICE);
    }

    /// Runs a pipeline alone until nothing is left.
    fn run_to_the_end(&self, pipeline: &str) {
        self.run_with(pipeline, &["--until-end"]);
    }

    fn run_with(&self, pipeline: &str, arguments: &[&str]) {
        let mut command = self.command(pipeline, "last");
        command.args(arguments);
        let mut process = self.world.start(command);
        let exit = process.end();
        assert!(exit.success(), "{exit}:\n{}", process.printed());
    }

    fn outcome(&self, pipeline: &str) -> Outcome {
        let environment = |name: &str| self.world.variable(name);
        let plan = config::load_with(&self.folder(pipeline), &environment, &[]).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let broker = driftline::broker::open(&plan.broker, "chaos").unwrap();
        let offline = OfflineStore::open(&plan, runtime.handle().clone()).unwrap();
        Outcome::read(&plan, broker.as_ref(), &offline, &self.world.path("offline").join(pipeline))
    }

    /// Every key of a pipeline's project with every field, the project left out of both.
    fn online(&self, pipeline: &str) -> BTreeMap<Vec<u8>, BTreeMap<Vec<u8>, Vec<u8>>> {
        let keys = self.redis.list(&[b"KEYS", format!("*{pipeline}").as_bytes()]);
        let hash = |key: Vec<u8>| {
            let mut fields = BTreeMap::new();
            let mut parts = self.redis.list(&[b"HGETALL", &key]).into_iter();
            while let (Some(mut field), Some(value)) = (parts.next(), parts.next()) {
                // driftline's own field has the project in its name.
                field.truncate(field.len() - if field.ends_with(pipeline.as_bytes()) { pipeline.len() } else { 0 });
                fields.insert(field, value);
            }
            (key[..key.len() - pipeline.len()].to_vec(), fields)
        };
        keys.into_iter().map(hash).collect()
    }
}

/// Asks a process to leave, which must end well. One that has only just started may not know yet what the signal means.
fn send_away(process: &mut Process) {
    process.signal(libc::SIGTERM);
    let exit = process.end();
    let signal = std::os::unix::process::ExitStatusExt::signal(&exit);
    assert!(exit.success() || signal == Some(libc::SIGTERM), "{exit}: {}", process.printed());
}

/// What is to be done next.
#[derive(Debug, Clone, Copy)]
enum Act<'a> {
    KillAt(&'a str),
    KillAtRandom,
    Join,
    Leave,
    Freeze,
    StopKafka,
    KillKafka,
    StopRedis,
    KillRedis,
}

#[test]
fn nothing_tells_a_run_under_chaos_from_an_undisturbed_one() {
    let kills = usize::try_from(from_environment("DRIFTLINE_CHAOS_KILLS", 50)).unwrap();
    let seed = from_environment("DRIFTLINE_CHAOS_SEED", 1);
    eprintln!("DRIFTLINE_CHAOS_SEED={seed} DRIFTLINE_CHAOS_KILLS={kills}");
    let (kafka, redis) = (Kafka::start(), Redis::start());
    let mut chaos = Chaos::new(&kafka, &redis, seed);

    for point in FIRST {
        chaos.kill_at(point, 1);
    }
    let points: Vec<&str> =
        failpoints().iter().copied().filter(|point| !ELSEWHERE.contains(point) && !FIRST.contains(point)).collect();
    assert_eq!(
        points.len() + ELSEWHERE.len() + FIRST.len(),
        failpoints().len(),
        "names of failpoints that there are not"
    );
    // Each failpoint at least once, in every round that there is room for.
    let mut acts: Vec<Act<'_>> = Vec::new();
    let mut left = kills.saturating_sub(FIRST.len());
    while left > 0 {
        let at_points = if left >= points.len() { points.len() } else { 0 };
        acts.extend(points[..at_points].iter().map(|point| Act::KillAt(point)));
        let at_random = (left - at_points).min(points.len());
        acts.extend(std::iter::repeat_n(Act::KillAtRandom, at_random));
        left -= at_points + at_random;
        acts.extend([Act::Join, Act::Join, Act::Leave, Act::Freeze]);
        acts.extend([Act::StopKafka, Act::KillKafka, Act::StopRedis, Act::KillRedis]);
    }
    acts.shuffle(&mut chaos.rng);
    for (number, act) in acts.iter().enumerate() {
        eprintln!("{number}: {act:?}, {} processes, {} purchases sent", chaos.running.len(), chaos.sent);
        match act {
            Act::KillAt(point) => {
                let passing = chaos.rng.random_range(1..4);
                chaos.kill_at(point, passing);
            }
            Act::KillAtRandom => chaos.kill_at_random(),
            Act::Join => {}
            Act::Leave => chaos.leave(),
            Act::Freeze => chaos.freeze(),
            Act::StopKafka => chaos.restart("Kafka was stopped", || kafka.stop(), || kafka.restart()),
            Act::KillKafka => chaos.restart("Kafka was killed", || kafka.kill(), || kafka.restart()),
            Act::StopRedis => chaos.restart("Redis was stopped", || redis.stop(), || redis.restart()),
            Act::KillRedis => chaos.restart("Redis was killed", || redis.kill(), || redis.restart()),
        }
        let wanted = chaos.rng.random_range(0..MOST);
        if chaos.running.len() < wanted || (matches!(act, Act::Join) && chaos.running.len() < MOST) {
            chaos.start(None);
        }
    }
    eprintln!("killed {:?}, {} processes, {} purchases", chaos.kills, chaos.started, chaos.sent);
    assert!(chaos.kills.values().sum::<usize>() >= kills);
    while let Some(mut member) = chaos.running.pop() {
        send_away(&mut member.process);
    }
    let name = chaos.name.clone();
    chaos.run_to_the_end(&name);

    // The same input, undisturbed.
    let calm = unique("calm");
    chaos.define(&calm);
    chaos.run_to_the_end(&calm);
    let mut wanted = Outcome::default();
    until("all predictions of the undisturbed run are shown", LIMIT, || {
        wanted = chaos.outcome(&calm);
        wanted.records("predictions").count() >= chaos.sent
    });
    assert!(wanted.records(DEAD_LETTERS).count() >= 2 * chaos.sent / SLICE - 1);
    assert!(wanted.records("windows.minutes").count() > chaos.sent / 20);
    assert!(wanted.records("windows.visits").any(|row| row.contains(r#""final":false"#)));
    let mut found = Outcome::default();
    until("all is shown", LIMIT, || {
        found = chaos.outcome(&name);
        wanted.topics.keys().all(|topic| found.records(topic).count() >= wanted.records(topic).count())
    });

    // Each purchase is predicted, once.
    let id = |record: &str| -> String {
        let value: Value = serde_json::from_str(record.split('\t').nth(1).unwrap()).unwrap();
        value["prediction_id"].as_str().unwrap().to_owned()
    };
    let ids: BTreeSet<String> = found.records("predictions").map(id).collect();
    assert_eq!((found.records("predictions").count(), ids.len()), (chaos.sent, chaos.sent));
    found.assert_same(&wanted, "chaos");
    let (found, wanted) = (chaos.online(&name), chaos.online(&calm));
    assert_eq!(wanted.len(), wanted.keys().collect::<BTreeSet<_>>().len());
    assert!(!wanted.is_empty());
    assert_eq!(found, wanted, "Redis");
}

#[test]
fn what_redis_has_lost_comes_back_with_the_next_events_or_a_rebuild() {
    // Keeps what it was told to save, and loses everything after that when it is killed.
    let (kafka, redis) = (Kafka::shared(), Redis::start_with(["--appendonly", "no"]));
    let mut chaos = Chaos::new(kafka, &redis, 0);
    let name = chaos.name.clone();
    let send = |chaos: &mut Chaos<'_>, slices: usize| (0..slices).for_each(|_| chaos.send());
    send(&mut chaos, 10);
    chaos.run_to_the_end(&name);
    assert_eq!(redis.command(&[b"SAVE"]), b"OK");
    let saved = chaos.online(&name);
    send(&mut chaos, 10);
    chaos.run_to_the_end(&name);
    let complete = chaos.online(&name);
    assert_ne!(complete, saved);
    redis.kill();
    redis.restart();
    assert_eq!(chaos.online(&name), saved);
    // Nothing has come since: a run has nothing to write.
    chaos.run_to_the_end(&name);
    assert_eq!(chaos.online(&name), saved);
    chaos.run_with(&name, &["--until-end", "--rebuild"]);
    assert_eq!(chaos.online(&name), complete);

    redis.kill();
    redis.restart();
    assert_eq!(chaos.online(&name), saved);
    // Each customer buys again.
    send(&mut chaos, 25);
    chaos.run_to_the_end(&name);
    let calm = unique("calm");
    chaos.define(&calm);
    chaos.run_to_the_end(&calm);
    assert_eq!(chaos.online(&name), chaos.online(&calm));
    until("all predictions are shown", LIMIT, || chaos.follower.read().len() >= chaos.sent);
    assert_eq!(chaos.follower.read().len(), chaos.sent, "predictions do not depend on what Redis holds");
}
