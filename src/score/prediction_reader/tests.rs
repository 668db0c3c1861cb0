use rstest::rstest;

use super::*;
use crate::broker::TopicPartition;
use crate::score::{Encoded, PredictionEncoder, Scores, sample};

fn records<'a>(values: impl IntoIterator<Item = Option<&'a [u8]>>) -> Records {
    let mut records = Records::new(TopicPartition::new("churn.predictions", 1));
    for (row, value) in values.into_iter().enumerate() {
        records.push(40 + row as i64, 0, Some(b"key"), value);
    }
    records
}

fn encoded(version: &str) -> Encoded {
    let plan = sample::plan(&[("id", DataType::Int64)]);
    let scores = Scores {
        scores: vec![0.25, f64::NAN, 1e-7, -3.5],
        labels: vec![Some(0), None, Some(1), None],
        model: "churn".into(),
        version: version.into(),
        failed: vec![(1, "no reason".into())],
    };
    let mut out = Encoded::default();
    PredictionEncoder::new(&plan, "champion").encode(&sample::rows(&plan), &scores, &mut out).unwrap();
    out
}

/// NaN as a value that equals itself.
fn comparable(values: &[f64]) -> Vec<Option<f64>> {
    values.iter().map(|value| (!value.is_nan()).then_some(*value)).collect()
}

#[rstest]
#[case::in_order(&["member", "spend", "visits"])]
#[case::other_order(&["visits", "member", "spend"])]
#[case::some(&["visits"])]
#[case::none(&[])]
#[case::unknown(&["spend", "nowhere", "visits"])]
fn watched_columns_are_read_and_the_others_skipped(#[case] features: &[&str]) {
    let (first, second) = (encoded("7"), encoded("8"));
    let records = records(first.iter().chain(second.iter()).map(|record| Some(record.value)));
    let names: Vec<String> = features.iter().map(|&name| name.to_owned()).collect();
    let (batch, dead) = PredictionReader::new(&names).read(&records);
    assert!(dead.is_empty(), "{dead:?}");
    assert_eq!(batch.offsets, [40, 41, 42, 43, 44, 45]);
    assert_eq!(batch.scores, [0.25, 1e-7, -3.5, 0.25, 1e-7, -3.5]);
    assert_eq!(batch.event_times[..3], [0, 1_700_000_000_123, i64::MAX]);
    let versions: Vec<&str> = batch.model_versions.iter().map(|version| &**version).collect();
    assert_eq!(versions, ["7", "7", "7", "8", "8", "8"]);
    assert!(Arc::ptr_eq(&batch.model_versions[0], &batch.model_versions[2]));
    assert_eq!(batch.features.len(), features.len());
    for (name, column) in features.iter().zip(&batch.features) {
        let expected = match *name {
            "member" => [Some(1.0), None, Some(1.0)],
            "spend" => [Some(0.1 + 0.2), None, Some(-1.797_693_134_862_315_7e308)],
            "visits" => [Some(9_007_199_254_740_992.0), Some(-3.0), Some(0.0)],
            _ => [None, None, None],
        };
        assert_eq!(comparable(&column[..3]), expected, "{name}");
        assert_eq!(comparable(&column[3..]), expected, "{name}");
    }
}

#[rstest]
#[case::cut(b"{\"model_version\":\"7\"", "no prediction of driftline")]
#[case::other(b"{\"hello\":1}", "it lacks 'model_version'")]
#[case::no_time(b"{\"model_version\":\"7\",\"score\":1,\"features\":{}}", "it lacks 'event_time'")]
#[case::no_score(b"{\"model_version\":\"7\",\"event_time\":1,\"features\":{}}", "it lacks 'score'")]
#[case::no_features(b"{\"model_version\":\"7\",\"event_time\":1,\"score\":0.5}", "it lacks 'features'")]
#[case::null_score(b"{\"model_version\":\"7\",\"event_time\":1,\"score\":null,\"features\":{}}", "no prediction")]
#[case::text(b"{\"model_version\":\"7\",\"event_time\":1,\"score\":0.5,\"features\":{\"spend\":\"x\"}}", "for 'spend'")]
fn what_is_no_prediction_is_dead(#[case] value: &[u8], #[case] expected: &str) {
    let good = encoded("7");
    let good = good.iter().next().unwrap().value;
    let (batch, dead) =
        PredictionReader::new(&["spend".to_owned()]).read(&records([Some(good), Some(value), Some(good)]));
    assert_eq!((&batch.offsets[..], batch.features[0].len()), (&[40, 42][..], 2));
    let [dead] = &dead[..] else { panic!("{dead:?}") };
    assert_eq!((dead.offset, dead.stage, dead.reason), (41, "monitor", "malformed"));
    assert!(dead.error.contains(expected), "{}", dead.error);
}

#[test]
fn a_version_with_escapes_is_read() {
    let value = br#"{"model_version":"a\"b","event_time":1,"score":0.5,"features":{}}"#;
    let (batch, dead) = PredictionReader::new(&[]).read(&records([Some(&value[..]), None]));
    assert_eq!(&*batch.model_versions[0], "a\"b");
    assert_eq!(dead[0].reason, "null_value");
}
