//! The drift stage on a log: predictions in, drift and retraining events out, whatever happens in between.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use driftline::broker::{Broker, NextOffset, Offsets, OutRecord, Records, TopicPartition, TopicSettings};
use driftline::config::plan::{DataType, GatesPlan, MonitorPlan, MonitorWindow, Plan, RetrainingPlan};
use driftline::drift::profile::ProfileBuilder;
use driftline::drift::worker::{DriftObservation, DriftWorker};
use driftline::drift::{DriftEvent, IncidentState};
use driftline::model::{Bundle, FolderRegistry, Registry};
use driftline::retrain::RetrainingEvent;
use driftline::runtime::shutdown::Stop;
use driftline::score::{Prediction, SourceRef};
use driftline::source::dead_letter;
use indexmap::IndexMap;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rstest::rstest;

use crate::broker::{open_embedded, open_kafka};
use crate::scoring_plan::scoring_plan;
use crate::servers::{Kafka, unique, until};

const FEATURES: [&str; 3] = ["amount", "visits", "age"];
/// Predictions a window.
const ROWS: i64 = 500;
/// How long a log may take to show or give what it has.
const LIMIT: Duration = Duration::from_secs(60);
const HOUR: i64 = 3_600_000;
const STILL: [f64; 4] = [0.0; 4];
const MOVED: [f64; 4] = [1.0, 0.0, 0.0, 0.0];

#[derive(Debug, Clone, Copy)]
enum Kind {
    Embedded,
    Kafka,
}

/// A log with the topics of a monitored pipeline, and a registry that knows version 1 of its model.
struct Shop {
    plan: Arc<Plan>,
    broker: Arc<dyn Broker>,
    registry: Arc<dyn Registry>,
    rng: ChaCha8Rng,
    /// Predictions written so far: an hour apart, in the two partitions in turn.
    written: i64,
    folder: tempfile::TempDir,
}

fn monitored_plan(root: &Path, name: &str) -> Plan {
    let mut plan = scoring_plan(root, &FEATURES.map(|feature| (feature, DataType::Float64)));
    plan.name = name.to_owned();
    plan.score.as_mut().unwrap().topic = format!("{name}.predictions").into();
    plan.monitor = Some(MonitorPlan {
        window: MonitorWindow::Rows(ROWS.unsigned_abs()),
        features: FEATURES.map(String::from).to_vec(),
        warm_up: Duration::ZERO,
        alpha: 0.05,
        horizon_windows: 200,
        tolerance: 0.02,
        resolve_after: 3,
        topic: format!("{name}.drift").into(),
        state_topic: format!("{name}.monitor-state").into(),
    });
    plan.retraining = Some(RetrainingPlan {
        when: "drifted_features >= 1 for 2 windows".into(),
        cooldown: Duration::from_secs(30 * 86_400),
        command: Vec::new(),
        timeout: Duration::ZERO,
        lookback: Duration::from_secs(365 * 86_400),
        fresh_labels: 1,
        gates: GatesPlan { metric: "auc".into(), min_gain: 0.0, threshold: None, max_ece: None, max_latency: None },
        topic: format!("{name}.retraining").into(),
        audit_topic: format!("{name}.audit").into(),
    });
    plan
}

/// Registers version 1: the reference of all columns is the standard normal distribution.
fn register(root: &Path) -> Arc<dyn Registry> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut profile = ProfileBuilder::new(FEATURES.into_iter().chain(["score"]), ROWS.unsigned_abs());
    for time in 0..10_000 {
        profile.push(time, &STILL.map(|_: f64| StandardNormal.sample(&mut rng)));
    }
    let bundle = root.join("bundle");
    std::fs::create_dir(&bundle).unwrap();
    let inputs = FEATURES.map(|feature| format!("{{ name = \"{feature}\", type = \"float64\" }}")).join(", ");
    let manifest = format!(
        "format = 1\nname = \"m\"\ncreated_at = \"2026-01-01T00:00:00Z\"\n\
         [signature]\ninputs = [{inputs}]\noutput = {{ name = \"p\", task = \"regression\" }}\n"
    );
    std::fs::write(bundle.join("bundle.toml"), manifest).unwrap();
    std::fs::write(bundle.join("profile.json"), profile.finish().to_json()).unwrap();
    for graph in ["preprocessor.onnx", "model.onnx"] {
        std::fs::write(bundle.join(graph), "the monitor does not read it").unwrap();
    }
    Bundle::seal(&bundle).unwrap();
    let registry = open_registry(root);
    registry.register("m", &bundle).unwrap();
    registry
}

fn open_registry(root: &Path) -> Arc<dyn Registry> {
    Arc::new(FolderRegistry::open(&format!("file://{}/models", root.display())).unwrap())
}

impl Shop {
    fn open(kind: Kind) -> Self {
        Self::named(kind, &unique("shop"))
    }

    fn named(kind: Kind, name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let broker = match kind {
            Kind::Embedded => open_embedded(folder.path()),
            Kind::Kafka => open_kafka(Kafka::shared()),
        };
        let plan = monitored_plan(folder.path(), name);
        let (score, monitor) = (plan.score.as_ref().unwrap(), plan.monitor.as_ref().unwrap());
        let retraining = plan.retraining.as_ref().unwrap();
        let dead_letters = plan.dead_letter_topic();
        for (topic, partitions) in [
            (&*score.topic, 2),
            (&*monitor.topic, 1),
            (&*monitor.state_topic, 1),
            (&*retraining.topic, 1),
            (&*dead_letters, 1),
        ] {
            let compacted = *topic == *monitor.state_topic;
            broker.create_topic(topic, &TopicSettings { partitions, compacted, retention_ms: None }).unwrap();
        }
        let registry = register(folder.path());
        Self { plan: Arc::new(plan), broker, registry, rng: ChaCha8Rng::seed_from_u64(9), written: 0, folder }
    }

    /// Writes records to the predictions topic: what `value` makes of their number.
    fn write(&mut self, rows: i64, mut value: impl FnMut(&mut Self, i64) -> Option<Vec<u8>>) {
        let topic = Arc::clone(&self.plan.score.as_ref().unwrap().topic);
        let mut producer = self.broker.producer(None).unwrap();
        for _ in 0..rows {
            let number = self.written;
            let value = value(self, number);
            let record = OutRecord {
                topic: &topic,
                partition: Some((number % 2) as i32),
                key: Some(b"c"),
                value: value.as_deref(),
                ..OutRecord::default()
            };
            producer.send(record).unwrap();
            self.written += 1;
        }
        producer.commit(&Offsets::new(), None).unwrap();
    }

    /// Writes windows of predictions of a version, their columns moved by these standard deviations.
    fn predict(&mut self, version: &str, windows: i64, shift: [f64; 4]) {
        self.write(windows * ROWS, |shop, number| {
            let values = shift.map(|shift| shift + Distribution::<f64>::sample(&StandardNormal, &mut shop.rng));
            let prediction = Prediction {
                prediction_id: format!("orders-0-{number}"),
                pipeline: shop.plan.name.clone(),
                definition: shop.plan.definition.clone(),
                entity: IndexMap::from([("customer_id".to_owned(), "c".into())]),
                event_time: number * HOUR,
                watermark: None,
                source: SourceRef { topic: "orders".into(), partition: 0, offset: number },
                model: "m".into(),
                model_version: version.to_owned(),
                variant: "champion".into(),
                score: values[3],
                label: None,
                features: FEATURES.iter().zip(values).map(|(name, value)| ((*name).to_owned(), Some(value))).collect(),
            };
            Some(serde_json::to_vec(&prediction).unwrap())
        });
    }

    /// Runs the stage to the end of the predictions.
    fn run(&self, observer: &dyn Fn(DriftObservation)) {
        run(&self.plan, &self.broker, &self.registry, observer);
    }

    /// What is committed in a topic's only partition.
    fn records(&self, topic: &str) -> Vec<Records> {
        let (at, end) = (TopicPartition::new(topic, 0), self.broker.topic(topic).unwrap().unwrap().partitions[0].1);
        let (mut next, mut all) = (NextOffset(0), Vec::new());
        while next < end {
            let (records, after) = self.broker.read(&at, next, 1000, LIMIT).unwrap();
            assert!(after > next, "{topic} ends before {end:?}");
            all.push(records);
            next = after;
        }
        all
    }

    /// Values of a topic.
    fn texts(&self, topic: &str) -> Vec<String> {
        let text = |value: Option<&[u8]>| String::from_utf8(value.unwrap().to_vec()).unwrap();
        let of =
            |records: &Records| (0..records.len()).map(|row| text(records.values.get(row))).collect::<Vec<String>>();
        self.records(topic).iter().flat_map(of).collect()
    }

    fn drift_texts(&self) -> Vec<String> {
        self.texts(&self.plan.monitor.as_ref().unwrap().topic)
    }

    fn retraining_texts(&self) -> Vec<String> {
        self.texts(&self.plan.retraining.as_ref().unwrap().topic)
    }

    /// Partition, offset and reason of all dead letters.
    fn dead(&self) -> Vec<(i32, i64, String)> {
        let mut dead = Vec::new();
        for records in self.records(&self.plan.dead_letter_topic()) {
            for row in 0..records.len() {
                let letter = dead_letter::read_back(&records, row).expect("a dead letter says where it comes from");
                let why = format!("{}: {}", letter.stage, letter.reason);
                dead.push((letter.partition.partition, letter.offset, why));
            }
        }
        dead.sort();
        dead
    }
}

fn run(plan: &Arc<Plan>, broker: &Arc<dyn Broker>, registry: &Arc<dyn Registry>, observer: &dyn Fn(DriftObservation)) {
    let drain = Stop::new();
    drain.request();
    let worker = DriftWorker::new(Arc::clone(plan), Arc::clone(broker), Arc::clone(registry)).unwrap();
    worker.run(&Stop::new(), &drain, observer).unwrap();
}

/// A shift of one feature that goes away again, between records that are none.
fn write_a_shift(shop: &mut Shop) {
    shop.predict("1", 4, STILL);
    shop.write(3, |_, number| (number % 2 == 0).then(|| b"{\"event_time\":1".to_vec()));
    shop.predict("1", 4, MOVED);
    shop.predict("1", 5, STILL);
    shop.write(1, |_, _| Some(b"[]".to_vec()));
}

/// What [`write_a_shift`] is to lead to: the events' texts.
fn expect_a_shift(shop: &Shop) -> (Vec<String>, Vec<String>) {
    // Kafka shows what a transaction has committed a moment after the commit has returned.
    until("all is shown", LIMIT, || {
        shop.dead().len() >= 4 && shop.drift_texts().len() >= 2 && !shop.retraining_texts().is_empty()
    });
    let (drift, retraining) = (shop.drift_texts(), shop.retraining_texts());
    let events: Vec<DriftEvent> = drift.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
    let told: Vec<_> = events.iter().map(|event| (event.window, event.state)).collect();
    assert_eq!(told, [(5, IncidentState::Opened), (11, IncidentState::Resolved)]);
    assert_eq!(events[0].incident_id, events[1].incident_id);
    assert_eq!((events[0].reason.as_str(), events[0].model_version.as_str()), ("amount moved", "1"));
    assert_eq!((events[0].rows, events[0].since), (ROWS as u64, (4 * ROWS + 3) * HOUR));
    // Window 5 holds predictions 2003 to 2502: the even ones are in partition 0.
    assert_eq!(events[0].evidence, BTreeMap::from([(0, (1002, 1251)), (1, (1001, 1250))]));
    let asked: Vec<RetrainingEvent> = retraining.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
    assert_eq!(asked.len(), 1, "one retraining an incident");
    assert_eq!((asked[0].cause.as_str(), asked[0].drifted.as_slice()), ("drift", ["amount".to_owned()].as_slice()));
    assert_eq!(asked[0].incident_id.as_ref(), Some(&events[0].incident_id));
    assert_eq!(asked[0].asked_at, (4 * ROWS + 3 + 2 * ROWS - 1) * HOUR);
    let malformed = |partition, offset| (partition, offset, "monitor: malformed".to_owned());
    let end = (13 * ROWS + 3) / 2;
    assert_eq!(
        shop.dead(),
        [malformed(0, 1000), malformed(0, 1001), (1, 1000, "monitor: null_value".to_owned()), malformed(1, end)]
    );
    (drift, retraining)
}

/// What a stage of this pipeline tells that nothing happens to.
fn undisturbed(name: &str) -> (Vec<String>, Vec<String>) {
    let mut shop = Shop::named(Kind::Embedded, name);
    write_a_shift(&mut shop);
    shop.run(&|_| {});
    expect_a_shift(&shop)
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_shift_is_told_once_and_asks_for_one_retraining(#[case] kind: Kind) {
    let mut shop = Shop::open(kind);
    write_a_shift(&mut shop);
    let windows = Cell::new(0);
    shop.run(&|observation| match observation {
        DriftObservation::Window { .. } => windows.set(windows.get() + 1),
        DriftObservation::Unmonitored { reason, .. } => panic!("version 1 is known: {reason}"),
        _ => {}
    });
    assert_eq!(windows.get(), 13);
    expect_a_shift(&shop);

    // Nothing is left to do, and nothing is done twice.
    shop.run(&|observation| assert!(!matches!(observation, DriftObservation::Window { .. })));
    expect_a_shift(&shop);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn predictions_that_do_not_drift_lead_to_nothing(#[case] kind: Kind) {
    let mut shop = Shop::open(kind);
    shop.predict("1", 8, STILL);
    let windows = Cell::new(0);
    shop.run(&|observation| {
        if let DriftObservation::Window { closed, .. } = observation {
            assert!(closed.incident.is_none() && closed.columns.iter().all(|column| !column.drifted));
            windows.set(windows.get() + 1);
        }
    });
    assert_eq!(windows.get(), 8);
    assert_eq!((shop.drift_texts(), shop.retraining_texts()), (Vec::new(), Vec::new()));
    assert!(shop.dead().is_empty());
}

#[rstest]
#[case::embedded(Kind::Embedded, 1)]
#[case::kafka(Kind::Kafka, 3)]
fn a_stage_that_dies_after_its_commits_repeats_no_event_and_misses_none(#[case] kind: Kind, #[case] lives: u32) {
    /// What the stage dies of.
    struct Death;
    let mut shop = Shop::open(kind);
    write_a_shift(&mut shop);
    let mut deaths = 0;
    loop {
        let commits = Cell::new(0);
        // Told right after a commit, on the stage's thread: what it had not committed is gone with it.
        let dying = |observation| {
            if let DriftObservation::Progress { .. } = observation {
                commits.set(commits.get() + 1);
                if commits.get() == lives {
                    resume_unwind(Box::new(Death));
                }
            }
        };
        match catch_unwind(AssertUnwindSafe(|| shop.run(&dying))) {
            Ok(()) => break,
            Err(cause) => assert!(cause.is::<Death>(), "it died of something else"),
        }
        deaths += 1;
    }
    assert!(deaths >= 13 / lives, "{deaths}");
    let found = expect_a_shift(&shop);

    assert_eq!(found, undisturbed(&shop.plan.name));
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_version_that_nobody_knows_is_not_monitored_and_that_is_said(#[case] kind: Kind) {
    let mut shop = Shop::open(kind);
    shop.predict("9", 4, MOVED);
    shop.predict("1", 2, STILL);
    let (unmonitored, windows) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
    shop.run(&|observation| match observation {
        DriftObservation::Unmonitored { model_version, reason } => {
            assert!(reason.contains("version 9"), "{reason}");
            unmonitored.borrow_mut().push(model_version);
        }
        DriftObservation::Window { closed, .. } => windows.borrow_mut().push(closed.model_version),
        _ => {}
    });
    assert_eq!((unmonitored.into_inner(), windows.into_inner()), (vec!["9".to_owned()], vec!["1".to_owned(); 2]));
    assert!(shop.drift_texts().is_empty() && shop.dead().is_empty());
}

/// The child of the next test: monitors the pipeline of a folder. Does nothing when run by itself.
#[test]
fn drift_crash_child() {
    let (Ok(folder), Ok(name)) = (std::env::var("DRIFTLINE_TEST_FOLDER"), std::env::var("DRIFTLINE_TEST_PIPELINE"))
    else {
        return;
    };
    let folder = Path::new(&folder);
    run(&Arc::new(monitored_plan(folder, &name)), &open_embedded(folder), &open_registry(folder), &|_| {});
}

#[cfg(feature = "failpoints")]
#[test]
fn a_stage_that_is_killed_around_a_commit_repeats_no_event_and_misses_none() {
    let mut shop = Shop::open(Kind::Embedded);
    write_a_shift(&mut shop);
    let Shop { plan, registry, folder, broker, rng, written } = shop;
    // The log belongs to one process at a time.
    drop(broker);
    for point in [
        "drift.before_commit=kill@1",
        "broker.commit.after=kill@2",
        "drift.after_commit=kill@1",
        "drift.before_commit=kill@2",
        "broker.commit.before=kill@2",
        "drift.after_commit=kill@4",
    ] {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "drift::drift_crash_child"]);
        child.env("DRIFTLINE_TEST_FOLDER", folder.path()).env("DRIFTLINE_TEST_PIPELINE", &plan.name);
        crate::process::killed_at(child, point);
    }
    let broker = open_embedded(folder.path());
    let shop = Shop { plan, registry, folder, broker, rng, written };
    shop.run(&|_| {});
    let found = expect_a_shift(&shop);
    assert_eq!(found, undisturbed(&shop.plan.name));
}
