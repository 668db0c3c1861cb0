//! Models: real graphs in ONNX Runtime against Python's onnxruntime, broken bundles, moving aliases under load.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch};
use driftline::config::plan::{DataType, Plan};
use driftline::model::{
    Bundle, FolderRegistry, MODEL, Model, ModelError, ModelEvent, ModelWatch, Provider, Registry, SessionOptions,
    Version, ensure_initial, open_registry,
};
use driftline::score::{Scorer, Scores};
use rstest::rstest;

use crate::bundles::bundles;
use crate::scoring_plan::scoring_plan;

/// Longest wait for something that takes milliseconds.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(serde::Deserialize)]
struct Expected {
    rows: Vec<Vec<Option<f64>>>,
    scores: Vec<f64>,
    /// What the trainer's own library says, where it was asked.
    direct: Option<Vec<f64>>,
}

static EXPECTED: LazyLock<BTreeMap<String, Expected>> =
    LazyLock::new(|| serde_json::from_slice(&std::fs::read(bundles().join("expected.json")).unwrap()).unwrap());

fn bundle(name: &str) -> Bundle {
    Bundle::load(&bundles().join(name)).unwrap()
}

fn options(batch_rows: usize) -> SessionOptions {
    SessionOptions { providers: vec![Provider::Cpu], threads: 1, batch_rows }
}

/// Rows as columns of the types that the bundle asks for.
fn batch(bundle: &Bundle, rows: &[Vec<Option<f64>>]) -> RecordBatch {
    let columns = bundle.manifest.signature.inputs.iter().enumerate().map(|(position, input)| {
        let values = rows.iter().map(|row| row[position]);
        let array: ArrayRef = match input.data_type {
            DataType::Int64 => Arc::new(Int64Array::from_iter(values.map(|value| value.map(|v| v as i64)))),
            DataType::Boolean => Arc::new(BooleanArray::from_iter(values.map(|value| value.map(|v| v != 0.0)))),
            _ => Arc::new(Float64Array::from_iter(values)),
        };
        (input.name.clone(), array, true)
    });
    RecordBatch::try_from_iter_with_nullable(columns).unwrap()
}

/// `amount`, `visits`, `member`.
fn row(amount: f64, visits: f64, member: f64) -> Vec<Option<f64>> {
    vec![Some(amount), Some(visits), Some(member)]
}

fn score(name: &str, batch_rows: usize, rows: &[Vec<Option<f64>>]) -> Scores {
    let bundle = bundle(name);
    let mut scorer = Scorer::of_bundle(&bundle, "1".into(), &options(batch_rows)).unwrap();
    scorer.score(&batch(&bundle, rows)).unwrap()
}

fn assert_close(scores: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(scores.len(), expected.len());
    for (row, (score, expected)) in scores.iter().zip(expected).enumerate() {
        assert!((score - expected).abs() <= tolerance * expected.abs().max(1.0), "row {row}: {score}, not {expected}");
    }
}

#[rstest]
fn scores_equal_those_of_python(
    #[values("linear", "regression", "trees")] name: &str,
    #[values(1, 7, 1024)] batch_rows: usize,
) {
    let expected = &EXPECTED[name];
    let scores = score(name, batch_rows, &expected.rows);
    assert_close(&scores.scores, &expected.scores, 1e-6);
    assert!(scores.failed.is_empty());
    let labels: Vec<Option<i64>> = match name {
        "regression" => vec![None; expected.rows.len()],
        _ => expected.scores.iter().map(|score| Some(i64::from(*score >= 0.5))).collect(),
    };
    assert_eq!(scores.labels, labels);
}

#[test]
fn converted_trees_agree_with_lightgbm_itself() {
    let expected = &EXPECTED["trees"];
    assert_close(&score("trees", 64, &expected.rows).scores, expected.direct.as_ref().unwrap(), 1e-5);
}

#[cfg(feature = "failpoints")]
#[rstest]
fn bound_and_padded_tensors_give_the_same_scores(
    #[values("linear", "regression", "trees")] name: &str,
    #[values(1, 5, 32, 200)] batch_rows: usize,
) {
    use driftline::model::{FeatureColumns, FeatureMatrix};

    let (bundle, expected) = (bundle(name), &EXPECTED[name]);
    let batch = batch(&bundle, &expected.rows);
    let names: Vec<String> = bundle.manifest.signature.inputs.iter().map(|input| input.name.clone()).collect();
    let mut matrix = FeatureMatrix::default();
    matrix.fill(&FeatureColumns::new(&names).of(&batch).unwrap(), 0, batch.num_rows());

    let mut model = Model::load(&bundle, &options(batch_rows)).unwrap();
    let (mut direct, mut bound) = (Vec::new(), Vec::new());
    model.run(matrix.values(), &mut direct).unwrap();
    model.bind_on_host().unwrap();
    // Rows that change under tensors that are bound again and again.
    for size in [batch_rows, 1, batch_rows, 3] {
        bound.clear();
        for part in matrix.values().chunks(size * model.width()) {
            model.run(part, &mut bound).unwrap();
        }
        assert_eq!(bound, direct);
    }
}

#[test]
fn no_rows_have_no_scores() {
    let scores = score("linear", 16, &[]);
    assert!(scores.scores.is_empty() && scores.labels.is_empty() && scores.failed.is_empty());
}

#[rstest]
#[case::one_row(1)]
#[case::small(4)]
#[case::all_at_once(1024)]
fn bad_rows_fail_alone(#[case] batch_rows: usize) {
    // The graph knows visits from −10 to 9, and fails as a whole for any other.
    let mut rows: Vec<_> = (0..200).map(|position| row(0.0, f64::from(position % 10), 0.0)).collect();
    let bad = [0, 77, 78, 199];
    for position in bad {
        rows[position][1] = Some(1000.0);
    }
    let scores = score("lookup", batch_rows, &rows);
    let failed: Vec<usize> = scores.failed.iter().map(|(row, _)| *row).collect();
    assert_eq!(failed, bad);
    assert!(scores.failed[0].1.starts_with("model.onnx failed on 1 rows: "), "{}", scores.failed[0].1);
    for (position, score) in scores.scores.iter().enumerate() {
        match bad.contains(&position) {
            true => assert!(score.is_nan() && scores.labels[position].is_none()),
            false => assert!((score - 0.1 * (position % 10) as f64).abs() < 1e-6, "row {position}: {score}"),
        }
    }
}

#[test]
fn scores_that_are_no_numbers_are_failures() {
    let rows = [row(1.0, 0.0, 0.0), row(-1.0, 0.0, 0.0), row(0.0, 0.0, 0.0), row(std::f64::consts::E, 0.0, 0.0)];
    let scores = score("logarithm", 16, &rows);
    let failed: Vec<(usize, &str)> = scores.failed.iter().map(|(row, why)| (*row, why.as_str())).collect();
    assert_eq!(failed, [(1, "the model answered NaN"), (2, "the model answered -inf")]);
    assert_close(&[scores.scores[0], scores.scores[3]], &[0.0, 1.0], 1e-6);
}

#[test]
fn a_row_without_a_feature_is_an_error_and_no_failed_row() {
    let bundle = bundle("linear");
    let mut scorer = Scorer::of_bundle(&bundle, "1".into(), &options(16)).unwrap();
    let rows = batch(&bundle, &[row(1.0, 2.0, 0.0)]);
    let error = scorer.score(&rows.project(&[0, 2]).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "feature 'visits': the feature rows have no such column");
    assert_eq!(scorer.score(&rows).unwrap().scores.len(), 1);
}

#[rstest]
#[case("wrong_input_name", "preprocessor.onnx: its input is 'x', and must be 'features'")]
#[case("wrong_width", "preprocessor.onnx: input 'features' has 4 columns, and bundle.toml lists 3")]
#[case("wrong_between", "model.onnx: input 'inputs' has 4 columns, and preprocessor.onnx gives 3")]
#[case("wrong_output_name", "model.onnx: it gives 'p', and no 'probabilities'")]
#[case("wrong_columns", "model.onnx: output 'probabilities' has 3 columns, and 1 to 2 are known")]
#[case("wrong_rows", "preprocessor.onnx: input 'features' is fixed to 1 rows; export it with a free first dimension")]
#[case("wrong_type", "model.onnx: output 'probabilities' is f64, and must be float32")]
#[case("wrong_batches", "model.onnx failed on 8 rows: ")]
#[case("not_onnx", "model.onnx: ONNX Runtime refuses it: ")]
fn graphs_that_are_not_of_the_format_are_refused(#[case] name: &str, #[case] expected: &str) {
    let error = Model::load(&bundle(name), &options(64)).unwrap_err().to_string();
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn providers_that_cannot_be_used_are_passed_over_with_their_reasons() {
    let providers = vec![Provider::Tensorrt, Provider::Cuda, Provider::Cpu];
    let options = SessionOptions { providers, ..options(16) };
    let mut model = Model::load(&bundle("linear"), &options).unwrap();
    let passed: Vec<Provider> = model.passed_over().iter().map(|(provider, _)| *provider).collect();
    match model.provider() {
        Provider::Cpu => assert_eq!(passed, [Provider::Tensorrt, Provider::Cuda]),
        Provider::Cuda => assert_eq!(passed, [Provider::Tensorrt]),
        Provider::Tensorrt => assert!(passed.is_empty()),
    }
    assert!(model.passed_over().iter().all(|(_, reason)| !reason.is_empty()), "{:?}", model.passed_over());
    // Whatever computes, the scores are the same.
    let (expected, mut scores) = (&EXPECTED["linear"], Vec::new());
    let values: Vec<f32> = expected.rows.iter().flatten().map(|v| v.unwrap_or(f64::NAN) as f32).collect();
    model.run(&values, &mut scores).unwrap();
    assert_close(&scores, &expected.scores, 1e-3);
}

/// A pipeline that scores `amount`, `visits`, `member` with model `m`.
fn plan(root: &Path) -> Plan {
    scoring_plan(root, &[("amount", DataType::Float64), ("visits", DataType::Int64), ("member", DataType::Boolean)])
}

/// A pipeline's registry with these bundles as versions 1, 2, …, the alias on the first.
struct World {
    root: tempfile::TempDir,
    plan: Plan,
    registry: Arc<dyn Registry>,
}

impl World {
    fn new(versions: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let plan = plan(root.path());
        let registry = open_registry(&plan.registry).unwrap();
        let world = Self { root, plan, registry };
        for name in versions {
            world.registry.register("m", &bundles().join(name)).unwrap();
        }
        if !versions.is_empty() {
            world.point("1");
        }
        world
    }

    fn point(&self, version: &str) {
        self.registry.set_alias("m", "production", &version.into()).unwrap();
    }

    fn alias_file(&self) -> PathBuf {
        self.root.path().join("models/m/aliases/production")
    }

    fn watch(&self, sessions: usize) -> (ModelWatch, Vec<Scorer>, Receiver<ModelEvent>) {
        let (send, events) = channel();
        let (watch, slots) = start(self, sessions, send).unwrap();
        let score = self.plan.score.as_ref().unwrap();
        (watch, slots.into_iter().map(|slot| Scorer::new(score, slot)).collect(), events)
    }
}

fn start(
    world: &World,
    sessions: usize,
    events: Sender<ModelEvent>,
) -> Result<(ModelWatch, Vec<driftline::model::ModelSlot>), ModelError> {
    // The receiver may be gone when a test ends.
    ModelWatch::start(&world.plan, world.registry.clone(), sessions, move |event| drop(events.send(event)))
}

fn ready(events: &Receiver<ModelEvent>) -> Version {
    match events.recv_timeout(LIMIT).unwrap() {
        ModelEvent::Ready { version, .. } => version,
        other => panic!("{other:?}"),
    }
}

#[test]
fn under_load_aliases_move_and_no_batch_is_mixed_or_lost() {
    let world = World::new(&["constant_a", "constant_b"]);
    let (watch, scorers, events) = world.watch(2);
    assert_eq!(ready(&events), "1".into());

    let stop = Arc::new(AtomicBool::new(false));
    let rows: Vec<_> = (0..300).map(|position| row(f64::from(position), 1.0, 0.0)).collect();
    let rows = batch(&bundle("constant_a"), &rows);
    let threads: Vec<_> = scorers
        .into_iter()
        .map(|mut scorer| {
            let (stop, rows, (seen, changes)) = (stop.clone(), rows.clone(), channel::<Arc<str>>());
            let thread = std::thread::spawn(move || {
                let (mut batches, mut last) = (0_u64, None);
                while !stop.load(Ordering::Relaxed) {
                    let scores = scorer.score(&rows).unwrap();
                    let expected = if &*scores.version == "1" { 0.25 } else { 0.75 };
                    assert!(scores.failed.is_empty());
                    assert!(scores.scores.iter().all(|score| *score == expected), "version {}", scores.version);
                    if last.as_ref() != Some(&scores.version) {
                        seen.send(scores.version.clone()).unwrap();
                        last = Some(scores.version);
                    }
                    batches += 1;
                }
                batches
            });
            (thread, changes)
        })
        .collect();

    let changed = |to: &str| {
        for (_, changes) in &threads {
            assert_eq!(&*changes.recv_timeout(LIMIT).unwrap(), to);
        }
    };
    changed("1");
    for step in 0..50 {
        let to = if step % 2 == 0 { "2" } else { "1" };
        world.point(to);
        watch.ask_now();
        assert_eq!(ready(&events), to.into());
        changed(to);
    }
    stop.store(true, Ordering::Relaxed);
    for (thread, _) in threads {
        assert!(thread.join().unwrap() > 50);
    }
}

#[test]
fn versions_that_do_not_fit_are_refused_once_and_the_running_one_stays() {
    let world = World::new(&["constant_a", "constant_b", "trees", "wrong_width", "constant_b"]);
    std::fs::write(world.root.path().join("models/m/versions/2").join(MODEL), b"cut").unwrap();
    let (watch, mut scorers, events) = world.watch(1);
    assert_eq!(ready(&events), "1".into());
    let rows = batch(&bundle("constant_a"), &[row(1.0, 2.0, 1.0)]);

    let reasons = [
        ("2", "its SHA-256 is "),
        ("3", "model 'm' does not fit [score] features: it needs f0, f1"),
        ("4", "input 'features' has 4 columns, and bundle.toml lists 3"),
        ("17", "has no version 17 of model 'm'; it has 1, 2, 3, 4, 5"),
    ];
    for (version, expected) in reasons {
        // The registry itself would not let an alias mean a broken version. Replaced whole, because the watch may be reading.
        let partial = world.root.path().join("alias");
        std::fs::write(&partial, version).unwrap();
        std::fs::rename(&partial, world.alias_file()).unwrap();
        for _ in 0..3 {
            watch.ask_now();
        }
        match events.recv_timeout(LIMIT).unwrap() {
            ModelEvent::Refused { version: refused, reason, .. } => {
                assert_eq!(refused, version.into());
                assert!(reason.contains(expected), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        let scores = scorers[0].score(&rows).unwrap();
        assert_eq!((&*scores.version, scores.scores[0]), ("1", 0.25));
    }
    world.point("5");
    watch.ask_now();
    // Had a refusal been told twice, it would come before this.
    assert_eq!(ready(&events), "5".into());
    assert_eq!(scorers[0].score(&rows).unwrap().scores, [0.75]);
}

#[test]
fn a_lost_alias_is_told_once_and_so_is_its_return() {
    let world = World::new(&["constant_a", "constant_b"]);
    let (watch, mut scorers, events) = world.watch(1);
    assert_eq!(ready(&events), "1".into());
    std::fs::remove_file(world.alias_file()).unwrap();
    watch.ask_now();
    match events.recv_timeout(LIMIT).unwrap() {
        ModelEvent::Unresolved { reason } => {
            let expected = "has no alias 'production' of model 'm'; its newest version is 2: give it the alias";
            assert!(reason.contains(expected), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(scorers[0].version(), "1".into());
    world.point("2");
    watch.ask_now();
    assert_eq!(events.recv_timeout(LIMIT).unwrap(), ModelEvent::Resolved);
    assert_eq!(ready(&events), "2".into());
    assert_eq!(scorers[0].version(), "2".into());
}

#[test]
fn nothing_behind_the_alias_is_an_error_at_the_start() {
    let world = World::new(&[]);
    let error = start(&world, 1, channel().0).unwrap_err().to_string();
    let expected = "has no alias 'production' of model 'm'; the model has no version at all: set [registry] initial";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn the_initial_bundle_becomes_version_one_once() {
    let mut world = World::new(&[]);
    world.plan.registry.initial = Some(bundles().join("constant_a"));
    for _ in 0..2 {
        ensure_initial(&*world.registry, &world.plan).unwrap();
        assert_eq!(world.registry.versions("m").unwrap(), ["1".into()]);
        assert_eq!(world.registry.resolve("m", "production").unwrap(), Some("1".into()));
    }
    // A run that was killed between the version and its alias.
    std::fs::remove_file(world.alias_file()).unwrap();
    ensure_initial(&*world.registry, &world.plan).unwrap();
    assert_eq!(world.registry.resolve("m", "production").unwrap(), Some("1".into()));
    // Whoever moves the alias keeps it.
    world.registry.register("m", &bundles().join("constant_b")).unwrap();
    world.point("2");
    ensure_initial(&*world.registry, &world.plan).unwrap();
    assert_eq!(world.registry.resolve("m", "production").unwrap(), Some("2".into()));
}

#[test]
fn an_initial_bundle_that_does_not_fit_is_not_registered() {
    let mut world = World::new(&[]);
    world.plan.registry.initial = Some(bundles().join("trees"));
    let error = ensure_initial(&*world.registry, &world.plan).unwrap_err();
    assert!(matches!(error, ModelError::Signature(_)), "{error}");
    assert!(world.registry.versions("m").unwrap().is_empty());
}

/// This program again, for one test that needs a process of its own.
fn child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("models::{test}"), "--ignored", "--nocapture"]);
    command
}

#[rstest]
#[case::missing("/nowhere/libonnxruntime.so", "/nowhere/libonnxruntime.so: failed to load")]
#[case::another_library("libc.so.6", "libc.so.6: libc.so.6 does not export `OrtGetApiBase`")]
fn without_a_fitting_library_the_error_says_where_it_was_looked_for(#[case] path: &str, #[case] expected: &str) {
    bundles();
    let output = child("loads_a_model").env("ORT_DYLIB_PATH", path).output().unwrap();
    let output = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.contains("ONNX Runtime's library (1.24 or newer) could not be loaded. Looked at:"), "{output}");
    assert!(output.contains(expected), "{output}");
    assert!(output.contains("pip install onnxruntime") && output.contains("set ORT_DYLIB_PATH"), "{output}");
}

#[test]
#[ignore = "run by another test as a process of its own"]
fn loads_a_model() {
    if let Err(error) = Model::load(&bundle("linear"), &options(16)) {
        println!("{error}");
    }
}

#[test]
fn processes_that_register_at_once_get_different_versions() {
    bundles();
    let root = tempfile::tempdir().unwrap();
    let url = format!("file://{}", root.path().display());
    let spawn = |_| child("registers_ten_versions").env("DRIFTLINE_TEST_REGISTRY", &url).spawn().unwrap();
    let children: Vec<_> = (0..3).map(spawn).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let registry = FolderRegistry::open(&url).unwrap();
    assert_eq!(registry.versions("m").unwrap().len(), 30);
    for version in registry.versions("m").unwrap() {
        registry.load("m", &version).unwrap();
    }
}

#[test]
#[ignore = "run by another test as a process of its own"]
fn registers_ten_versions() {
    let registry = FolderRegistry::open(&std::env::var("DRIFTLINE_TEST_REGISTRY").unwrap()).unwrap();
    for _ in 0..10 {
        registry.register("m", &bundles().join("constant_a")).unwrap();
    }
}
