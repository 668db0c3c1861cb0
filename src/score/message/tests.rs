use indexmap::IndexMap;
use rstest::rstest;
use serde_json::json;

use super::*;
use crate::config::plan::DataType;
use crate::score::{FeatureRecord, Prediction, sample};

const SINGLE: &[(&str, DataType)] = &[("customer_id", DataType::String)];
const NUMBER: &[(&str, DataType)] = &[("id", DataType::Int64)];
const COMPOSITE: &[(&str, DataType)] = &[("shop", DataType::String), ("till", DataType::Int64)];

fn scores() -> Scores {
    Scores {
        scores: vec![0.25, f64::NAN, 1e-7, -3.5],
        labels: vec![Some(0), None, Some(1), None],
        model: "churn".into(),
        version: "17".into(),
        failed: vec![(1, "no reason".into())],
    }
}

/// The entity of a row of the sample.
fn entity(keys: &[(&str, DataType)], row: usize) -> IndexMap<String, serde_json::Value> {
    let texts = ["plain", "q\"uote\\", "line\nbreak\u{1}", "ünï çødé 🦀"];
    let numbers = [i64::MIN, -1, 0, i64::MAX];
    let value = |data_type| match data_type {
        DataType::Int64 => json!(numbers[row]),
        _ => json!(texts[row]),
    };
    keys.iter().map(|(name, data_type)| ((*name).to_owned(), value(*data_type))).collect()
}

/// Names as they stand in the text, in order.
fn names(value: &[u8]) -> Vec<String> {
    let object: IndexMap<String, serde_json::Value> = serde_json::from_slice(value).unwrap();
    object.keys().cloned().collect()
}

#[rstest]
#[case::text(SINGLE, &["plain", "q\"uote\\", "line\nbreak\u{1}", "ünï çødé 🦀"])]
#[case::number(NUMBER, &["-9223372036854775808", "-1", "0", "9223372036854775807"])]
#[case::composite(
    COMPOSITE,
    &[
        r#"["plain",-9223372036854775808]"#,
        r#"["q\"uote\\",-1]"#,
        r#"["line\nbreak\u0001",0]"#,
        r#"["ünï çødé 🦀",9223372036854775807]"#
    ]
)]
fn keys_are_text_or_an_array(#[case] keys: &[(&str, DataType)], #[case] expected: &[&str]) {
    let plan = sample::plan(keys);
    let mut out = Encoded::default();
    FeatureEncoder::new(&plan).encode(&sample::rows(&plan), &mut out).unwrap();
    let keys: Vec<&str> = out.iter().map(|record| std::str::from_utf8(record.key).unwrap()).collect();
    assert_eq!(keys, expected);
}

#[test]
fn predictions_are_what_serde_would_write() {
    let plan = sample::plan(COMPOSITE);
    let rows = sample::rows(&plan);
    let mut out = Encoded::default();
    PredictionEncoder::new(&plan, "champion").encode(&rows, &scores(), &mut out).unwrap();

    let sources = [("churn.purchases", 0, 0), ("churn.logins", 1, 7), ("churn.purchases", 2, 8)];
    let sources = [sources[0], sources[1], sources[2], ("churn.purchases", i32::MAX, i64::MAX)];
    let features = [
        [("member", Some(1.0)), ("spend", Some(0.1 + 0.2)), ("visits", Some(9_007_199_254_740_993_i64 as f64))],
        [("member", Some(0.0)), ("spend", None), ("visits", None)],
        [("member", None), ("spend", None), ("visits", Some(-3.0))],
        [("member", Some(1.0)), ("spend", Some(-1.797_693_134_862_315_7e308)), ("visits", Some(0.0))],
    ];
    let event_times = [0, -1, 1_700_000_000_123, i64::MAX];
    let watermarks = [None, Some(5), Some(1_700_000_000_000), Some(0)];
    let expected = |row: usize| Prediction {
        prediction_id: format!("{}-{}-{}", sources[row].0, sources[row].1, sources[row].2),
        pipeline: plan.name.clone(),
        definition: plan.definition.clone(),
        entity: entity(COMPOSITE, row),
        event_time: event_times[row],
        watermark: watermarks[row],
        source: crate::score::SourceRef {
            topic: sources[row].0.to_owned(),
            partition: sources[row].1,
            offset: sources[row].2,
        },
        model: "churn".into(),
        model_version: "17".into(),
        variant: "champion".into(),
        score: scores().scores[row],
        label: scores().labels[row],
        features: features[row].iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
    };

    assert_eq!(out.len(), 3);
    for (record, row) in out.iter().zip([0, 2, 3]) {
        assert_eq!(record.row, row);
        let text = std::str::from_utf8(record.value).unwrap();
        assert_eq!(serde_json::from_slice::<Prediction>(record.value).unwrap(), expected(row), "{text}");
        let by_serde = serde_json::to_vec(&expected(row)).unwrap();
        assert_eq!(names(record.value), names(&by_serde), "{text}");
    }
}

#[test]
fn feature_records_are_what_serde_would_write() {
    let plan = sample::plan(SINGLE);
    let mut out = Encoded::default();
    FeatureEncoder::new(&plan).encode(&sample::rows(&plan), &mut out).unwrap();
    let records: Vec<FeatureRecord> = out.iter().map(|r| serde_json::from_slice(r.value).unwrap()).collect();
    assert_eq!(records.len(), 4);
    assert_eq!(records[3].entity, entity(SINGLE, 3));
    let features = [
        json!({"spend": 0.1 + 0.2, "visits": 9_007_199_254_740_993_i64, "member": true, "last_\"shop\"": "plain", "last_seen": 1, "amounts": [0.1 + 0.2, -0.5], "shops": ["q\"uote\\", ""]}),
        json!({"spend": null, "visits": null, "member": false, "last_\"shop\"": null, "last_seen": null, "amounts": [], "shops": []}),
        json!({"spend": null, "visits": -3, "member": null, "last_\"shop\"": "line\nbreak\u{1}", "last_seen": -62_135_596_800_000_i64, "amounts": null, "shops": null}),
        json!({"spend": -1.797_693_134_862_315_7e308, "visits": 0, "member": true, "last_\"shop\"": "ünï çødé 🦀", "last_seen": 0, "amounts": [1e300, 7.0, 0.0], "shops": ["ünï çødé 🦀", "line\nbreak\u{1}", "plain"]}),
    ];
    for ((record, features), encoded) in records.iter().zip(features).zip(out.iter()) {
        assert_eq!(json!(record.features), features);
        assert_eq!(names(encoded.value), names(&serde_json::to_vec(record).unwrap()));
        let in_order: Vec<&String> = record.features.keys().collect();
        assert_eq!(in_order, ["spend", "visits", "member", "last_\"shop\"", "last_seen", "amounts", "shops"]);
    }
}

#[test]
fn records_of_several_batches_are_kept_apart() {
    let plan = sample::plan(SINGLE);
    let rows = sample::rows(&plan);
    let mut encoder = FeatureEncoder::new(&plan);
    let (mut both, mut tail) = (Encoded::default(), Encoded::default());
    encoder.encode(&rows.slice(0, 2), &mut both).unwrap();
    encoder.encode(&rows.slice(2, 2), &mut both).unwrap();
    encoder.encode(&rows.slice(2, 2), &mut tail).unwrap();
    let last: Vec<EncodedRecord<'_>> = both.iter().skip(2).collect();
    assert_eq!(last, tail.iter().collect::<Vec<_>>());
    assert_eq!(both.bytes(), both.iter().map(|record| record.key.len() + record.value.len()).sum::<usize>());
    both.clear();
    assert!(both.is_empty() && both.iter().next().is_none() && both.bytes() == 0);
}

#[test]
fn a_batch_without_a_feature_is_refused_by_name() {
    let plan = sample::plan(SINGLE);
    let rows = sample::rows(&plan);
    let without = rows.project(&[0, 1, 2, 3, 4, 5, 6, 7, 9]).unwrap();
    let error = PredictionEncoder::new(&plan, "champion").encode(&without, &scores(), &mut Encoded::default());
    assert_eq!(error.unwrap_err().to_string(), "feature rows: column 'visits' is missing");
}
