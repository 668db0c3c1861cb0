use std::sync::Arc;

use rstest::rstest;

use super::*;

const GOOD: &str = r#"
format = 1
name = "churn"
created_at = 2026-01-31T12:00:00Z
threshold = 0.4

[signature]
inputs = [{ name = "spend_sum_30d", type = "float64" }, { name = "logins_count_1d", type = "int64" }]
output = { name = "churn_probability", task = "binary_classification" }

[metrics]
auc = 0.81
rows = 1000

[lineage]
seed = 7
libraries = { lightgbm = "4.7.0" }
"#;

/// A sealed bundle, whose graphs are not graphs: nothing here runs them.
fn sealed(manifest: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(MANIFEST), manifest).unwrap();
    std::fs::write(dir.path().join(PREPROCESSOR), b"pre").unwrap();
    std::fs::write(dir.path().join(MODEL), b"model").unwrap();
    std::fs::write(dir.path().join(PROFILE), b"{\"format\":1}").unwrap();
    Bundle::seal(dir.path()).unwrap();
    dir
}

fn faults(dir: &Path) -> Vec<(String, String)> {
    let error = Bundle::load(dir).unwrap_err();
    error.faults.into_iter().map(|fault| (fault.file, fault.problem)).collect()
}

#[test]
fn a_sealed_bundle_loads_as_written() {
    let dir = sealed(GOOD);
    let bundle = Bundle::load(dir.path()).unwrap();
    assert_eq!(bundle.manifest.created_at, "2026-01-31T12:00:00Z");
    assert_eq!(bundle.manifest.metrics["rows"], 1000.0);
    assert_eq!(bundle.manifest.lineage["libraries"]["lightgbm"].as_str(), Some("4.7.0"));
    assert_eq!(bundle.model(), b"model");
    assert_eq!(bundle.profile(), b"{\"format\":1}");
    let names: Vec<&str> = bundle.contents().map(|(name, _)| name).collect();
    assert_eq!(names, [MANIFEST, MODEL, PREPROCESSOR, PROFILE]);
}

#[test]
fn sealing_again_changes_nothing_and_keeps_comments() {
    let dir = sealed(&format!("# by hand\n{GOOD}"));
    let first = std::fs::read_to_string(dir.path().join(MANIFEST)).unwrap();
    let digest = Bundle::seal(dir.path()).unwrap().digest();
    assert_eq!(std::fs::read_to_string(dir.path().join(MANIFEST)).unwrap(), first);
    assert!(first.contains("# by hand"));
    assert_eq!(digest, Bundle::load(dir.path()).unwrap().digest());
}

#[test]
fn further_files_are_part_of_the_bundle() {
    let dir = sealed(GOOD);
    std::fs::write(dir.path().join("card.md"), b"# Churn").unwrap();
    let text = std::fs::read_to_string(dir.path().join(MANIFEST)).unwrap();
    std::fs::write(dir.path().join(MANIFEST), text.replace("[files]", "[files]\n\"card.md\" = \"\"")).unwrap();
    assert_eq!(faults(dir.path())[0].0, "card.md");
    assert_eq!(Bundle::seal(dir.path()).unwrap().file("card.md"), Some(&b"# Churn"[..]));
}

#[test]
fn a_folder_that_is_no_bundle_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = Bundle::load(dir.path()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("model bundle {} cannot be used\n  bundle.toml: ", dir.path().display())));
    assert!(error.contains("no model bundle; check the path"), "{error}");
}

#[test]
fn all_damaged_files_are_named_at_once() {
    let dir = sealed(GOOD);
    std::fs::write(dir.path().join(MODEL), b"modem").unwrap();
    std::fs::remove_file(dir.path().join(PREPROCESSOR)).unwrap();
    let found = faults(dir.path());
    let files: Vec<&str> = found.iter().map(|(file, _)| file.as_str()).collect();
    assert_eq!(files, [MODEL, PREPROCESSOR]);
    assert!(found[0].1.starts_with("its SHA-256 is "), "{}", found[0].1);
    assert_eq!(found[1].1, "bundle.toml names it and it is not there");
}

#[rstest]
#[case::format("format = 1", "format = 2", "format is 2, this build reads 1")]
#[case::name("\"churn\"", "\"../churn\"", "name '../churn' starts with a dot")]
#[case::instant("2026-01-31T12:00:00Z", "\"yesterday\"", "created_at 'yesterday' is no RFC 3339 instant")]
#[case::threshold("threshold = 0.4", "threshold = nan", "threshold is not a finite number")]
#[case::kind("\"int64\"", "\"string\"", "signature.inputs: logins_count_1d is a string")]
#[case::twice("logins_count_1d", "spend_sum_30d", "signature.inputs names spend_sum_30d twice")]
#[case::unknown_key("threshold", "treshold", "unknown field `treshold`")]
#[case::unknown_type("\"int64\"", "\"int46\"", "unknown variant `int46`")]
#[case::outside("[files]", "[files]\n\"../x\" = \"00\"", "[files] names '../x'")]
#[case::itself("[files]", "[files]\n\"bundle.toml\" = \"00\"", "[files] names 'bundle.toml'")]
fn a_wrong_manifest_says_what_is_wrong(#[case] good: &str, #[case] bad: &str, #[case] expected: &str) {
    let dir = sealed(GOOD);
    let text = std::fs::read_to_string(dir.path().join(MANIFEST)).unwrap();
    assert!(text.contains(good));
    std::fs::write(dir.path().join(MANIFEST), text.replacen(good, bad, 1)).unwrap();
    let found = faults(dir.path());
    assert!(found.iter().any(|(file, problem)| file == MANIFEST && problem.contains(expected)), "{found:?}");
}

#[test]
fn what_is_not_listed_is_missing() {
    let dir = sealed(GOOD);
    std::fs::write(dir.path().join(MANIFEST), GOOD).unwrap();
    let problems: Vec<String> = faults(dir.path()).into_iter().map(|(_, problem)| problem).collect();
    assert_eq!(problems, PARTS.map(|part| format!("[files] does not name {part}")));
}

#[test]
fn a_bundle_without_its_parts_cannot_be_sealed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(MANIFEST), GOOD).unwrap();
    std::fs::write(dir.path().join(MODEL), b"model").unwrap();
    let error = Bundle::seal(dir.path()).unwrap_err();
    let files: Vec<&str> = error.faults.iter().map(|fault| fault.file.as_str()).collect();
    assert_eq!(files, [PREPROCESSOR, PROFILE]);
}

#[test]
fn classifiers_label_from_the_threshold_on() {
    let dir = sealed(GOOD);
    let mut manifest = Bundle::load(dir.path()).unwrap().manifest;
    assert_eq!(manifest.label(0.4), Some(1));
    assert_eq!(manifest.label(0.399_999), Some(0));
    manifest.threshold = None;
    assert_eq!(manifest.label(0.499_999), Some(0));
    assert_eq!(manifest.label(0.5), Some(1));
    manifest.signature.output.task = Task::Regression;
    assert_eq!(manifest.label(7.0), None);
}

fn columns(columns: &[(&str, DataType)]) -> Vec<Column> {
    columns.iter().map(|(name, data_type)| Column { name: Arc::from(*name), data_type: *data_type }).collect()
}

#[rstest]
#[case::missing(&[("a", DataType::Float64)], "it needs b, which the list lacks")]
#[case::extra(
    &[("a", DataType::Float64), ("b", DataType::Int64), ("c", DataType::Int64), ("d", DataType::Int64)],
    "it does not know c, d"
)]
#[case::order(
    &[("b", DataType::Int64), ("a", DataType::Float64)],
    "the order differs from position 1 on: model a, pipeline b"
)]
#[case::types(
    &[("a", DataType::Int64), ("b", DataType::Int64)],
    "a is float64 in the model and int64 in the pipeline"
)]
#[case::renamed(
    &[("a", DataType::Boolean), ("bb", DataType::Int64)],
    "it needs b, which the list lacks; it does not know bb; a is float64 in the model and boolean in the pipeline"
)]
fn a_signature_says_how_it_differs(#[case] wanted: &[(&str, DataType)], #[case] expected: &str) {
    let signature = Signature {
        inputs: vec![
            Input { name: "a".into(), data_type: DataType::Float64 },
            Input { name: "b".into(), data_type: DataType::Int64 },
        ],
        output: Output { name: "p".into(), task: Task::BinaryClassification },
    };
    assert_eq!(signature.differences(&columns(&[("a", DataType::Float64), ("b", DataType::Int64)])), None);
    let mismatch = signature.differences(&columns(wanted)).unwrap();
    let message = SignatureMismatch { model: "churn".into(), ..mismatch }.to_string();
    assert_eq!(
        message,
        format!(
            "model 'churn' does not fit [score] features: {expected}; mend the list in pipeline.toml or train the model on it"
        )
    );
}
