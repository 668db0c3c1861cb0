//! Rows a second through a LightGBM of 100 trees over 30 features: driftline's sessions on a filled matrix, the whole scorer
//! on Arrow columns; and records a second through the encoders. `scoring_bare` has ONNX Runtime alone, to compare with: a
//! process has one ONNX Runtime environment, so it cannot be measured here.
//!
//! `DRIFTLINE_PYTHON` names the interpreter that makes the bundle; the default is `.venv/bin/python`.

use std::hint::black_box;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray, TimestampMillisecondArray,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use driftline::config::plan::{DataType, Plan};
use driftline::model::{Bundle, FeatureColumns, FeatureMatrix, Model, Provider, SessionOptions};
use driftline::score::{Encoded, FeatureEncoder, PredictionEncoder, Scorer};
use driftline::window::row_columns;
use rand::{Rng, SeedableRng};

#[path = "../tests/it/bundles.rs"]
mod bundles;
#[path = "../tests/it/scoring_plan.rs"]
mod scoring_plan;

const BATCHES: [usize; 4] = [1, 8, 64, 1024];
const FEATURES: usize = 30;

fn bundle() -> Bundle {
    Bundle::load(&bundles::bundles().join("trees")).expect("the fixture is a sound bundle")
}

fn plan() -> Plan {
    let names: Vec<String> = (0..FEATURES).map(|feature| format!("f{feature}")).collect();
    let features: Vec<(&str, DataType)> = names.iter().map(|name| (name.as_str(), DataType::Float64)).collect();
    scoring_plan::scoring_plan(&std::env::temp_dir(), &features)
}

/// Feature rows as the window stage makes them, a tenth of the values missing.
fn rows(count: usize) -> RecordBatch {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let each = 0..count as i64;
    let time = |offset: i64| -> ArrayRef {
        let times = each.clone().map(|row| 1_700_000_000_000 + row * 1000 - offset);
        Arc::new(TimestampMillisecondArray::from_iter_values(times).with_timezone("UTC"))
    };
    let mut columns: Vec<(String, ArrayRef)> = vec![
        (
            "customer_id".into(),
            Arc::new(StringArray::from_iter_values(each.clone().map(|row| format!("customer-{row}")))),
        ),
        (row_columns::EVENT_TIME.into(), time(0)),
        (row_columns::SOURCE.into(), Arc::new(StringArray::from(vec!["purchases"; count]))),
        (row_columns::TOPIC.into(), Arc::new(StringArray::from(vec!["churn.purchases"; count]))),
        (row_columns::PARTITION.into(), Arc::new(Int32Array::from(vec![3; count]))),
        (row_columns::OFFSET.into(), Arc::new(Int64Array::from_iter_values(each.clone()))),
        (row_columns::WATERMARK.into(), time(10_000)),
    ];
    for feature in 0..FEATURES {
        let values = (0..count).map(|_| rng.random_bool(0.9).then(|| rng.random_range(0.0..5.0_f64)));
        columns.push((format!("f{feature}"), Arc::new(Float64Array::from_iter(values))));
    }
    RecordBatch::try_from_iter(columns).expect("all columns have the same length")
}

fn scoring(criterion: &mut Criterion) {
    let (bundle, options) = (bundle(), SessionOptions { providers: vec![Provider::Cpu], threads: 1, batch_rows: 1024 });
    let names: Vec<String> = (0..FEATURES).map(|feature| format!("f{feature}")).collect();
    let mut model = Model::load(&bundle, &options).expect("the fixture loads");
    let mut scorer = Scorer::of_bundle(&bundle, "1".into(), &options).expect("the fixture loads");
    let mut group = criterion.benchmark_group("scoring");
    for batch in BATCHES {
        let rows = rows(batch);
        group.throughput(Throughput::Elements(batch as u64));
        let mut matrix = FeatureMatrix::default();
        matrix.fill(&FeatureColumns::new(&names).of(&rows).expect("the rows have all features"), 0, batch);
        let mut scores = Vec::new();
        group.bench_function(BenchmarkId::new("model", batch), |bencher| {
            bencher.iter(|| {
                scores.clear();
                model.run(matrix.values(), &mut scores).expect("the rows are sound");
                black_box(&scores);
            });
        });
        group.bench_function(BenchmarkId::new("scorer", batch), |bencher| {
            bencher.iter(|| black_box(scorer.score(&rows).expect("the rows are sound")));
        });
    }
    group.finish();
}

fn records(criterion: &mut Criterion) {
    let (plan, rows) = (plan(), rows(1024));
    let options = SessionOptions { providers: vec![Provider::Cpu], threads: 1, batch_rows: 1024 };
    let mut scorer = Scorer::of_bundle(&bundle(), "1".into(), &options).expect("the fixture loads");
    let scores = scorer.score(&rows).expect("the rows are sound");
    let mut out = Encoded::default();
    let mut group = criterion.benchmark_group("records");
    group.throughput(Throughput::Elements(1024));
    let mut predictions = PredictionEncoder::new(&plan, "champion");
    group.bench_function("encode predictions", |bencher| {
        bencher.iter(|| {
            out.clear();
            predictions.encode(&rows, &scores, &mut out).expect("the rows have all columns");
            black_box(out.bytes());
        });
    });
    let mut features = FeatureEncoder::new(&plan);
    group.bench_function("encode feature rows", |bencher| {
        bencher.iter(|| {
            out.clear();
            features.encode(&rows, &mut out).expect("the rows have all columns");
            black_box(out.bytes());
        });
    });
    group.finish();
}

criterion_group!(benches, scoring, records);
criterion_main!(benches);
