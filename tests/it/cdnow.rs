//! Real purchases through a real Kafka and a real Redis, against independent oracles: every feature and prediction, the
//! online store as Feast's SDK reads it, drift where there is some and none where there is none, and `kill -9` around every
//! side effect.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::Path;

use driftline::store::feast::python_repository;
use serde_json::Value;

use crate::process::{World, oracle, root, run_python, shared_data};
use crate::servers::{Kafka, Redis, SchemaRegistry};

const CHURN: &str = "pipelines/churn";
const CDNOW: &str = "tests/pipelines/cdnow";
const PURCHASES: usize = 69_659;
const CUSTOMERS: usize = 23_570;

/// To the end of the topics, with small checkpoints.
const TO_THE_END: [&str; 5] = ["--until-end", "--listen", "none", "--set", "offline.checkpoint.rows=4000"];
/// The shipped model knows another shop, so its monitor is left waiting.
const UNMONITORED: [&str; 2] = ["--set", "monitor.warm_up=3650d"];

/// The CSV as the source declares it: dates as milliseconds, keys as text.
const TO_PARQUET: &str = "
import sys, pandas
rows = pandas.read_csv(sys.argv[1], dtype={'customer_id': str})
rows['purchased_at'] = pandas.to_datetime(rows.pop('date'), utc=True).astype('datetime64[ms, UTC]').astype('int64')
rows.to_parquet(sys.argv[2])
";

/// The CSV with all amounts from a date on multiplied.
const SHIFTED: &str = "
import sys, pandas
rows = pandas.read_csv(sys.argv[1], dtype=str)
later = rows['date'] >= sys.argv[3]
assert later.any() and not later.all()
rows.loc[later, 'amount'] = (rows.loc[later, 'amount'].astype(float) * float(sys.argv[4])).round(2).astype(str)
rows.to_csv(sys.argv[2], index=False)
";

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// A pipeline on a Kafka and a Redis of its own, purchases in its topic.
struct Shop {
    world: World,
    pipeline: &'static str,
    servers: (Kafka, Redis),
}

impl Shop {
    fn open(pipeline: &'static str, csv: &Path) -> Self {
        Self::open_with(pipeline, csv, None)
    }

    /// With a schema registry, records are framed as Confluent's clients do.
    fn open_with(pipeline: &'static str, csv: &Path, registry: Option<String>) -> Self {
        let servers = (Kafka::start(), Redis::start());
        let mut world = World::new();
        world.set("KAFKA_BROKERS", &servers.0.address());
        world.set("REDIS_URL", &servers.1.url());
        if let Some(registry) = registry {
            world.set("SCHEMA_REGISTRY_URL", &registry);
        }
        world.run(&["topic", "create", "--pipeline", pipeline, "--sources"]);
        let csv = csv.to_str().unwrap();
        world.run(&["replay", csv, "-p", pipeline, "-s", "purchases", "--map", "purchased_at=date"]);
        Self { world, pipeline, servers }
    }

    /// `driftline run`, or a single stage, to the end of its topics.
    fn arguments<'a>(&'a self, stage: &'a str) -> Vec<&'a str> {
        let unmonitored: &[&str] = if self.pipeline == CHURN { &UNMONITORED } else { &[] };
        [&[stage, self.pipeline], &TO_THE_END[..], unmonitored].concat()
    }

    fn run(&self, stage: &str) {
        self.world.run(&self.arguments(stage));
    }

    /// Values of all committed records of a topic, which are JSON texts.
    fn values(&self, topic: &str) -> Vec<String> {
        let tailed = self.world.run(&["topic", "tail", topic, "-p", self.pipeline]);
        tailed.lines().map(|line| json(line)["value"].as_str().unwrap().to_owned()).collect()
    }

    fn predictions(&self) -> Vec<String> {
        self.values("churn.predictions")
    }

    fn rows(&self) -> std::path::PathBuf {
        self.world.path("offline/churn/features")
    }
}

fn ids(predictions: &[String]) -> BTreeSet<String> {
    predictions.iter().map(|text| json(text)["prediction_id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn features_predictions_and_stores_of_every_purchase_equal_the_oracles() {
    let Some(csv) = shared_data("cdnow_purchases.csv") else { return };
    let shop = Shop::open(CHURN, &csv);
    shop.run("run");
    let values = shop.predictions();
    assert_eq!(values.len(), PURCHASES, "one prediction a purchase");
    let (predictions, events) = (shop.world.path("predictions.jsonl"), shop.world.path("events.parquet"));
    std::fs::write(&predictions, values.join("\n")).unwrap();
    run_python(&[&"-c", &TO_PARQUET, &csv, &events]);
    let purchases: [&dyn AsRef<OsStr>; 6] = [
        &"pipelines/churn/pipeline.toml",
        &"purchases",
        &events,
        &shop.rows(),
        &predictions,
        &"pipelines/churn/bundle",
    ];
    let found = oracle("oracle.py", &purchases);
    eprintln!("compared with the oracle: {found}");
    assert_eq!((found["predictions"].as_u64(), found["events"].as_u64()), (Some(69_659), Some(69_659)));

    // Redis, as Feast's SDK reads it.
    let plan = driftline::config::load_with(&root().join(CHURN), &|_| None, &[]).unwrap();
    std::fs::write(shop.world.path("definitions.py"), python_repository(&plan)).unwrap();
    let redis = shop.servers.1.address();
    let found = oracle("feast_last_rows.py", &[&shop.world.path(""), &redis, &plan.name, &shop.rows()]);
    eprintln!("compared with Feast: {found}");
    assert_eq!(found["entities"], CUSTOMERS);
    assert_eq!(found["features"], plan.feature_columns().len());

    // Nothing is left to do, and nothing is done twice.
    shop.run("run");
    assert_eq!(shop.predictions().len(), PURCHASES);
}

#[test]
fn killed_around_every_side_effect_no_prediction_is_missing_or_doubled() {
    let Some(csv) = shared_data("cdnow_purchases.csv") else { return };
    let shop = Shop::open(CHURN, &csv);
    let points = [
        "features.after_online=kill@1",
        "publish.before_commit=kill@2",
        "broker.commit.before=kill@1",
        "broker.commit.after=kill@1",
        "features.after_commit=kill@2",
        "offline.rows_written=kill@1",
        "offline.manifest_written=kill@1",
    ];
    shop.world.killed_at(&shop.arguments("run"), &points);
    shop.run("run");
    let predictions = shop.predictions();
    assert_eq!((predictions.len(), ids(&predictions).len()), (PURCHASES, PURCHASES));
    let rows = run_python(&[&"-c", &COUNT_ROWS, &shop.rows()]);
    assert_eq!(json(&rows), serde_json::json!([PURCHASES, PURCHASES]), "offline rows, and different ones among them");
}

/// Rows in the Arrow files, and how many different events they are of.
const COUNT_ROWS: &str = "
import sys, pathlib, pyarrow as pa
files = sorted(pathlib.Path(sys.argv[1]).rglob('*.arrow'))
rows = pa.concat_tables([pa.ipc.open_file(file).read_all() for file in files])
at = set(zip(rows['source_partition'].to_pylist(), rows['source_offset'].to_pylist()))
print([rows.num_rows, len(at)])
";

#[test]
fn stages_apart_on_framed_records_predict_what_the_fused_run_predicts_on_plain_ones() {
    let Some(csv) = shared_data("cdnow_purchases.csv") else { return };
    let score = |values: &[String]| -> BTreeMap<String, Value> {
        let of = |text: &String| {
            let mut value = json(text);
            let id = value["prediction_id"].as_str().unwrap().to_owned();
            // The watermark depends on how far other customers' events had been read.
            value.as_object_mut().unwrap().remove("watermark");
            (id, value)
        };
        values.iter().map(of).collect()
    };
    let world = World::new();
    let part = world.path("part.csv");
    let text = std::fs::read_to_string(csv).unwrap();
    std::fs::write(&part, text.lines().take(8_001).collect::<Vec<_>>().join("\n")).unwrap();
    let fused = Shop::open(CHURN, &part);
    fused.run("run");
    let apart = Shop::open_with(CHURN, &part, Some(SchemaRegistry::shared().url()));
    assert_eq!(apart.servers.0.consume("churn.purchases")[0].value.as_ref().unwrap()[0], 0, "Confluent's magic byte");
    apart.run("features");
    apart.run("score");
    let (fused, apart) = (fused.predictions(), apart.predictions());
    assert_eq!((fused.len(), apart.len()), (8_000, 8_000));
    assert_eq!(score(&apart), score(&fused));
}

#[test]
fn unshifted_purchases_raise_no_alarm() {
    let Some(csv) = shared_data("cdnow_purchases.csv") else { return };
    let shop = Shop::open(CDNOW, &csv);
    shop.run("run");
    assert!(shop.values("cdnow.predictions").len() > 69_000, "the monitor had something to judge");
    assert_eq!(shop.values("cdnow.drift"), Vec::<String>::new());
    assert_eq!(shop.values("cdnow.retraining"), Vec::<String>::new());
}

#[test]
fn amounts_raised_by_a_third_raise_one_alarm_that_names_the_right_features() {
    const FROM: &str = "1998-03-01";
    const FROM_MS: i64 = 888_710_400_000;
    let Some(csv) = shared_data("cdnow_purchases.csv") else { return };
    let world = World::new();
    let shifted = world.path("shifted.csv");
    run_python(&[&"-c", &SHIFTED, &csv, &shifted, &FROM, &"1.3333333"]);
    let shop = Shop::open(CDNOW, &shifted);
    shop.run("run");

    let events: Vec<Value> = shop.values("cdnow.drift").iter().map(|text| json(text)).collect();
    let opened: Vec<&Value> = events.iter().filter(|event| event["state"] == "opened").collect();
    assert_eq!(opened.len(), 1, "one incident: {events:#?}");
    let opened = opened[0];
    eprintln!("opened: window {}, {}", opened["window"], opened["reason"]);
    // The window in which the shift begins is part old, part new; the alarm comes with one of the two after it at the latest.
    let times: Vec<i64> =
        shop.values("cdnow.predictions").iter().map(|t| json(t)["event_time"].as_i64().unwrap()).collect();
    let to = opened["to"].as_i64().unwrap();
    let shifted_rows = times.iter().filter(|time| (FROM_MS..=to).contains(*time)).count();
    assert!(opened["from"].as_i64().unwrap() >= FROM_MS - 9 * 86_400_000, "not before the shift: {opened:#}");
    assert!((1..=1500).contains(&shifted_rows), "{shifted_rows} rows of the raised amounts until the alarm");
    let names = |value: &Value| value.as_array().unwrap().iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let drifted: BTreeSet<String> = opened["columns"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|column| column["drifted"] == true)
        .map(|column| column["name"].as_str().unwrap().to_owned())
        .collect();
    let of_amounts = ["basket_vs_usual", "price_vs_usual", "spend_mean_30d", "spend_max_30d", "score"];
    assert!(!drifted.is_empty() && drifted.iter().all(|name| of_amounts.contains(&name.as_str())), "{drifted:?}");
    assert!(drifted.contains("price_vs_usual"), "{drifted:?}");

    let asked = shop.values("cdnow.retraining");
    assert_eq!(asked.len(), 1, "one retraining, not many: {asked:#?}");
    let asked = json(&asked[0]);
    assert_eq!(asked["incident_id"], opened["incident_id"]);
    let asked: BTreeSet<String> = names(&asked["drifted"]);
    assert!(asked.contains("price_vs_usual"), "{asked:?}");
}
