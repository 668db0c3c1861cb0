//! Real purchases through a real Kafka and a real Redis: every feature and every prediction against an independent oracle.

use std::process::Command;

use crate::process::{World, python, root, shared_data};
use crate::servers::{Kafka, Redis};

const PIPELINE: &str = "pipelines/churn";

/// To the end of the topics, with small checkpoints. The shipped model knows another shop, so its monitor is left waiting.
const RUN: [&str; 9] = [
    "run",
    PIPELINE,
    "--until-end",
    "--listen",
    "none",
    "--set",
    "monitor.warm_up=3650d",
    "--set",
    "offline.checkpoint.rows=4000",
];

/// The CSV as the source declares it: dates as milliseconds, keys as text.
const TO_PARQUET: &str = "
import sys, pandas
rows = pandas.read_csv(sys.argv[1], dtype={'customer_id': str})
rows['purchased_at'] = pandas.to_datetime(rows.pop('date'), utc=True).astype('datetime64[ms, UTC]').astype('int64')
rows.to_parquet(sys.argv[2])
";

fn run_python(arguments: &[&std::ffi::OsStr]) -> String {
    let output = Command::new(python()).args(arguments).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A churn pipeline on a Kafka and a Redis of its own, all purchases in its topic.
struct Shop {
    world: World,
    _servers: (Kafka, Redis),
}

impl Shop {
    fn open(csv: &str) -> Self {
        let (kafka, redis) = (Kafka::start(), Redis::start());
        let mut world = World::new();
        world.set("KAFKA_BROKERS", &kafka.address());
        world.set("REDIS_URL", &redis.url());
        world.run(&["topic", "create", "--pipeline", PIPELINE, "--sources"]);
        world.run(&["replay", csv, "-p", PIPELINE, "-s", "purchases", "--map", "purchased_at=date"]);
        Self { world, _servers: (kafka, redis) }
    }

    /// Committed predictions, as JSON texts.
    fn predictions(&self) -> Vec<String> {
        let tailed = self.world.run(&["topic", "tail", "churn.predictions", "-p", PIPELINE]);
        let value =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["value"].as_str().unwrap().to_owned();
        tailed.lines().map(value).collect()
    }
}

#[test]
fn killed_around_every_side_effect_no_prediction_is_missing_or_doubled() {
    let Some(csv) = shared_data("cdnow_purchases.csv") else { return };
    let shop = Shop::open(csv.to_str().unwrap());
    for point in [
        "features.after_online=kill@1",
        "publish.before_commit=kill@2",
        "broker.commit.before=kill@1",
        "broker.commit.after=kill@1",
        "features.after_commit=kill@2",
        "offline.rows_written=kill@1",
        "offline.manifest_written=kill@1",
    ] {
        let killed = shop.world.command(&RUN).env("DRIFTLINE_FAILPOINTS", point).output().unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&killed.status);
        assert_eq!(signal, Some(libc::SIGKILL), "{point}: {}", String::from_utf8_lossy(&killed.stderr));
    }
    shop.world.run(&RUN);
    let id = |text: &String| {
        serde_json::from_str::<serde_json::Value>(text).unwrap()["prediction_id"].as_str().unwrap().to_owned()
    };
    let predictions = shop.predictions();
    let ids: std::collections::BTreeSet<String> = predictions.iter().map(id).collect();
    assert_eq!((predictions.len(), ids.len()), (69_659, 69_659));
}

#[test]
fn features_and_predictions_of_every_purchase_equal_the_oracle() {
    let Some(csv) = shared_data("cdnow_purchases.csv") else { return };
    let csv = csv.to_str().unwrap();
    let shop = Shop::open(csv);
    let world = &shop.world;
    world.run(&RUN);
    let values = shop.predictions();
    assert_eq!(values.len(), 69_659, "one prediction a purchase");
    let (predictions, events) = (world.path("predictions.jsonl"), world.path("events.parquet"));
    std::fs::write(&predictions, values.join("\n")).unwrap();
    run_python(&["-c".as_ref(), TO_PARQUET.as_ref(), csv.as_ref(), events.as_os_str()]);
    let report = run_python(&[
        "tests/it/oracle.py".as_ref(),
        "pipelines/churn/pipeline.toml".as_ref(),
        "purchases".as_ref(),
        events.as_os_str(),
        world.path("offline/churn/features").as_os_str(),
        predictions.as_os_str(),
        "pipelines/churn/bundle".as_ref(),
    ]);
    eprintln!("compared: {report}");
    let found: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(found["predictions"], 69_659);

    // Nothing is left to do, and nothing is done twice.
    world.run(&RUN);
    assert_eq!(shop.predictions().len(), 69_659);
}
