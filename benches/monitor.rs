//! Predictions a second through the drift monitor, one thread, 30 watched features and the score: decoding the records alone,
//! and taking decoded rows into windows of 1,000 that are judged as they close.

#![allow(missing_docs, reason = "criterion's macros")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use driftline::config::plan::{DataType, MonitorPlan, MonitorWindow, Plan};
use driftline::drift::monitor::{Monitor, NoProfile, Profiles};
use driftline::drift::prediction::{PredictionDecoder, PredictionRows};
use driftline::drift::profile::{Profile, ProfileBuilder};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde_json::json;

#[path = "../tests/it/scoring_plan.rs"]
mod scoring_plan;

const FEATURES: usize = 30;
const WINDOW: u64 = 1000;
const ROWS: usize = 10_000;

fn features() -> Vec<String> {
    (0..FEATURES).map(|feature| format!("spend_mean_{feature}d")).collect()
}

fn plan() -> Plan {
    let names = features();
    let columns: Vec<(&str, DataType)> = names.iter().map(|name| (name.as_str(), DataType::Float64)).collect();
    let mut plan = scoring_plan::scoring_plan(&std::env::temp_dir(), &columns);
    plan.monitor = Some(MonitorPlan {
        window: MonitorWindow::Rows(WINDOW),
        features: names,
        warm_up: Duration::ZERO,
        alpha: 0.05,
        horizon_windows: 200,
        tolerance: 0.02,
        resolve_after: 3,
        topic: "test.drift".into(),
        state_topic: "test.monitor-state".into(),
    });
    plan
}

/// Values of all columns, a row each.
fn values(rows: usize) -> Vec<Vec<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    (0..rows).map(|_| (0..=FEATURES).map(|_| StandardNormal.sample(&mut rng)).collect()).collect()
}

struct Known(Arc<Profile>);

impl Profiles for Known {
    fn profile(&self, _: &str) -> Result<Arc<Profile>, NoProfile> {
        Ok(Arc::clone(&self.0))
    }
}

fn decode(c: &mut Criterion) {
    let names = features();
    let record = |(row, values): (usize, &Vec<f64>)| {
        let features: serde_json::Map<_, _> = names.iter().cloned().zip(values.iter().map(|v| json!(v))).collect();
        json!({
            "prediction_id": format!("purchases-0-{row}"), "pipeline": "test", "definition": "0123456789abcdef",
            "entity": { "customer_id": format!("C{row:06}") }, "event_time": 1_700_000_000_000_i64 + row as i64,
            "watermark": 1_700_000_000_000_i64, "source": { "topic": "purchases", "partition": 0, "offset": row },
            "model": "m", "model_version": "1", "variant": "champion", "score": values[FEATURES], "label": 0,
            "features": features,
        })
        .to_string()
    };
    let records: Vec<String> = values(ROWS).iter().enumerate().map(record).collect();
    let mut group = c.benchmark_group("monitor");
    group.throughput(Throughput::Elements(ROWS as u64));
    let (mut decoder, mut rows) = (PredictionDecoder::new(&names), PredictionRows::new(FEATURES + 1));
    group.bench_function("decode", |b| {
        b.iter(|| {
            rows.clear();
            for (offset, record) in records.iter().enumerate() {
                let decoded = decoder.decode(0, offset as i64, black_box(record.as_bytes()), &mut rows);
                decoded.expect("the records are predictions");
            }
            rows.len()
        });
    });
    group.finish();
}

fn observe(c: &mut Criterion) {
    let plan = plan();
    let mut profile = ProfileBuilder::new(features().into_iter().chain(["score".to_owned()]), WINDOW);
    let mut rows = PredictionRows::new(FEATURES + 1);
    for (row, values) in values(2 * ROWS).iter().enumerate() {
        match row < ROWS {
            true => profile.push(row as i64, values),
            false => rows.push(row as i64, 0, (row - ROWS) as i64, "1", values),
        }
    }
    let known = Known(Arc::new(profile.finish()));
    let mut group = c.benchmark_group("monitor");
    group.throughput(Throughput::Elements(ROWS as u64));
    group.bench_function("observe and judge", |b| {
        let fresh = || Monitor::new(&plan).expect("the plan has a monitor");
        let through = |mut monitor: Monitor| {
            let (mut next, mut closed) = (0, 0);
            while next < rows.len() {
                let observed = monitor.observe(black_box(&rows), next..rows.len(), &known);
                next = observed.next;
                closed += usize::from(observed.closed.is_some());
            }
            assert_eq!(closed, ROWS / WINDOW as usize);
        };
        b.iter_batched(fresh, through, BatchSize::SmallInput);
    });
    group.finish();
}

criterion_group!(benches, decode, observe);
criterion_main!(benches);
