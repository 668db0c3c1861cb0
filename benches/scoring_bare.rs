//! ONNX Runtime alone on the model of `scoring`: one session, one borrowed tensor, the same options. What driftline adds to
//! this is the difference to `scoring`'s figures.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use driftline::model::Bundle;
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{OutputSelector, RunOptions, Session};
use ort::value::TensorRef;
use rand::{Rng, SeedableRng};

#[path = "../tests/it/bundles.rs"]
mod bundles;

const FEATURES: usize = 30;

fn bare(criterion: &mut Criterion) {
    let bundle = Bundle::load(&bundles::bundles().join("trees")).expect("the fixture is a sound bundle");
    let environment = ort::init().build().expect("ORT_DYLIB_PATH names ONNX Runtime's library");
    environment.set_log_level(ort::logging::LogLevel::Error);
    let mut session = session(&environment, bundle.model()).expect("the fixture loads");
    let options = RunOptions::new().expect("options need no more than memory");
    let options = options.with_outputs(OutputSelector::no_default().with("probabilities"));
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let mut group = criterion.benchmark_group("scoring");
    for batch in [1_usize, 8, 64, 1024] {
        let cell = |_| if rng.random_bool(0.9) { rng.random_range(0.0..5.0_f32) } else { f32::NAN };
        let values: Vec<f32> = (0..batch * FEATURES).map(cell).collect();
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new("bare", batch), |bencher| {
            bencher.iter(|| {
                let tensor = TensorRef::from_array_view(([batch, FEATURES], &*values)).expect("the shape fits");
                let outputs = session.run_with_options(ort::inputs![tensor], &options).expect("the rows are sound");
                black_box(outputs[0].try_extract_tensor::<f32>().expect("probabilities are float32"));
            });
        });
    }
    group.finish();
}

fn session(environment: &ort::environment::Environment, model: &[u8]) -> ort::Result<Session> {
    Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_parallel_execution(false)?
        .with_inter_threads(1)?
        .with_intra_threads(1)?
        .with_intra_op_spinning(false)?
        .with_memory_pattern(false)?
        .commit_from_memory(model)
}

criterion_group!(benches, bare);
criterion_main!(benches);
