use arrow::array::AsArray;
use rstest::rstest;
use serde_json::json;

use super::*;
use crate::broker::TopicPartition;
use crate::score::{Encoded, FeatureEncoder, sample};

const KEYS: &[(&str, DataType)] = &[("shop", DataType::String), ("till", DataType::Int64)];

fn records<'a>(values: impl IntoIterator<Item = Option<&'a [u8]>>) -> Records {
    let mut records = Records::new(TopicPartition::new("churn.features", 2));
    for (row, value) in values.into_iter().enumerate() {
        records.push(100 + 2 * row as i64, 0, Some(b"key"), value);
    }
    records
}

fn reader(plan: &Plan) -> FeatureReader {
    FeatureReader::new(plan, sample::schema(plan))
}

#[test]
fn what_is_written_is_read_back() {
    let plan = sample::plan(KEYS);
    let mut rows = sample::rows(&plan);
    let mut encoded = Encoded::default();
    FeatureEncoder::new(&plan).encode(&rows, &mut encoded).unwrap();
    let read = reader(&plan).read(&records(encoded.iter().map(|record| Some(record.value)))).unwrap();
    assert!(read.dead.is_empty(), "{:?}", read.dead);
    assert_eq!(read.offsets, [100, 102, 104, 106]);

    // JSON has no NaN: it comes back as a missing value.
    let spend = rows.schema().index_of("spend").unwrap();
    let mut columns = rows.columns().to_vec();
    let values = columns[spend].as_primitive::<arrow::datatypes::Float64Type>();
    columns[spend] = Arc::new(values.iter().map(|v| v.filter(|v| !v.is_nan())).collect::<arrow::array::Float64Array>());
    rows = RecordBatch::try_new(rows.schema(), columns).unwrap();
    assert_eq!(read.batch, rows);
}

#[test]
fn a_poll_without_records_gives_an_empty_batch() {
    let plan = sample::plan(KEYS);
    let read = reader(&plan).read(&records([])).unwrap();
    assert_eq!((read.batch.num_rows(), read.batch.schema()), (0, sample::schema(&plan)));
}

fn good() -> serde_json::Value {
    json!({
        "pipeline": "churn", "definition": "0123456789abcdef", "entity": {"till": 7, "shop": "a"}, "event_time": 5,
        "watermark": null, "source": {"offset": 3, "partition": 1, "topic": "churn.logins", "key": "ignored"},
        "features": {
            "visits": 2, "spend": 3, "more": {"not": ["asked", "for"]}, "member": null, "last_seen": 9, "last_\"shop\"": "b",
            "amounts": [1, 2.5], "shops": ["x", "y\"z"]
        },
        "future": [1, 2, {"field": "of a newer version"}],
    })
}

#[test]
fn order_and_further_names_do_not_matter() {
    let plan = sample::plan(KEYS);
    let value = serde_json::to_vec(&good()).unwrap();
    let read = reader(&plan).read(&records([Some(&value[..])])).unwrap();
    assert!(read.dead.is_empty(), "{:?}", read.dead);
    let text = |name: &str| read.batch.column_by_name(name).unwrap().as_string::<i32>().value(0).to_owned();
    assert_eq!([text("shop"), text("source"), text("last_\"shop\"")], ["a", "logins", "b"]);
    let spend = read.batch.column_by_name("spend").unwrap().as_primitive::<arrow::datatypes::Float64Type>();
    assert_eq!(spend.value(0), 3.0);
    let list = |name: &str| read.batch.column_by_name(name).unwrap().as_list::<i32>().value(0);
    let (amounts, shops) = (list("amounts"), list("shops"));
    assert_eq!(amounts.as_primitive::<arrow::datatypes::Float64Type>().values()[..], [1.0, 2.5]);
    assert_eq!(shops.as_string::<i32>().iter().flatten().collect::<Vec<_>>(), ["x", "y\"z"]);
}

#[rstest]
#[case::definition("/definition", json!("fedcba9876543210"), "definition", "computed by definition fedcba9876543210")]
#[case::type_of_a_number("/features/visits", json!(1.5), "malformed", "a whole number or null for 'visits'")]
#[case::type_of_a_text("/features/spend", json!("3"), "malformed", "a number or null for 'spend'")]
#[case::a_list_for_a_number("/features/visits", json!([1]), "malformed", "a whole number or null for 'visits'")]
#[case::no_list("/features/amounts", json!(1), "malformed", "a list or null for 'amounts'")]
#[case::type_in_a_list("/features/shops", json!(["a", 1]), "malformed", "a text or null for 'shops'")]
#[case::null_in_a_list("/features/shops", json!(["a", null]), "malformed", "a null in the list of 'shops'")]
#[case::list_in_a_list("/features/shops", json!([["a"]]), "malformed", "a text or null for 'shops'")]
#[case::beyond_64_bits("/features/visits", json!(u64::MAX), "malformed", "a whole number or null for 'visits'")]
#[case::null_key("/entity/till", json!(null), "malformed", "entity: 'till' is null")]
#[case::no_object("/features", json!([1]), "malformed", "expected an object")]
#[case::event_time("/event_time", json!(null), "malformed", "no feature row of this pipeline")]
#[case::source("/source/offset", json!("3"), "malformed", "no feature row of this pipeline")]
fn a_wrong_record_fails_alone(
    #[case] place: &str,
    #[case] bad: serde_json::Value,
    #[case] reason: &str,
    #[case] expected: &str,
) {
    let plan = sample::plan(KEYS);
    let mut wrong = good();
    *wrong.pointer_mut(place).unwrap() = bad;
    assert_dead(&plan, &serde_json::to_vec(&wrong).unwrap(), reason, expected);
}

#[rstest]
#[case("/definition", "it lacks 'definition'")]
#[case("/entity", "it lacks 'entity'")]
#[case("/features", "it lacks 'features'")]
#[case("/source", "it lacks 'source'")]
#[case("/event_time", "it lacks 'event_time'")]
#[case("/features/member", "features lack 'member'")]
#[case("/entity/shop", "entity lack 'shop'")]
fn what_is_missing_is_named(#[case] place: &str, #[case] expected: &str) {
    let plan = sample::plan(KEYS);
    let (parent, name) = place.rsplit_once('/').unwrap();
    let mut wrong = good();
    wrong.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name).unwrap();
    assert_dead(&plan, &serde_json::to_vec(&wrong).unwrap(), "malformed", expected);
}

#[rstest]
#[case::cut(b"{\"definition\":\"01234", "no feature row of this pipeline")]
#[case::nothing(b"", "no feature row of this pipeline")]
#[case::after_it(b"{} {}", "no feature row of this pipeline")]
#[case::bytes(b"{\"definition\":\"\xff\"}", "not UTF-8")]
#[case::another_value(b"17", "expected a feature row")]
fn what_is_no_json_is_dead(#[case] value: &[u8], #[case] expected: &str) {
    assert_dead(&sample::plan(KEYS), value, "malformed", expected);
}

/// A bad record between two good ones.
fn assert_dead(plan: &Plan, value: &[u8], reason: &str, expected: &str) {
    let good = serde_json::to_vec(&good()).unwrap();
    let read = reader(plan).read(&records([Some(&good[..]), Some(value), Some(&good)])).unwrap();
    assert_eq!((read.batch.num_rows(), &read.offsets[..]), (2, &[100, 104][..]));
    let [dead] = &read.dead[..] else { panic!("{:?}", read.dead) };
    assert_eq!((dead.offset, dead.stage, dead.reason), (102, "score", reason));
    assert_eq!((dead.partition.partition, dead.value.as_deref()), (2, Some(value)));
    assert!(dead.error.contains(expected), "{}", dead.error);
}

#[test]
fn a_tombstone_is_dead_too() {
    let plan = sample::plan(KEYS);
    let read = reader(&plan).read(&records([None])).unwrap();
    assert_eq!((read.batch.num_rows(), read.dead[0].reason), (0, "null_value"));
}
