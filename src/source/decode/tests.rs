use std::time::Duration;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{Float64Type, Int64Type, TimestampMillisecondType};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::broker::registry::tests::StubRegistry;
use crate::broker::{Header, TopicPartition};
use crate::config::plan::{EntityPlan, LabelsPlan};
use crate::source::avro::AvroEncoder;
use crate::source::{LabelDecoder, sample};

const AT: i64 = 1_700_000_000_000;

const SCHEMA: &str = r#"{"type": "record", "name": "Purchase", "fields": [
    {"name": "customer_id", "type": "string"},
    {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
    {"name": "note", "type": ["null", "string"], "default": null},
    {"name": "amount", "type": ["null", "double"], "default": null},
    {"name": "quantity", "type": ["null", "long"], "default": null},
    {"name": "gift", "type": ["null", "boolean"], "default": null}
]}"#;

fn column(name: &str, data_type: DataType) -> Column {
    Column { name: name.into(), data_type }
}

fn plan(format: Format) -> SourcePlan {
    let fields = [
        ("customer_id", DataType::String),
        ("at", DataType::Timestamp),
        ("amount", DataType::Float64),
        ("quantity", DataType::Int64),
        ("gift", DataType::Boolean),
    ];
    sample::purchases("churn.purchases", format, &fields)
}

fn json_plan() -> SourcePlan {
    plan(Format::Json)
}

fn avro_plan() -> SourcePlan {
    plan(Format::Avro { schema: SCHEMA.into() })
}

fn records<'a>(values: impl IntoIterator<Item = Option<&'a [u8]>>) -> Records {
    let mut records = Records::new(TopicPartition::new("churn.purchases", 3));
    for (row, value) in values.into_iter().enumerate() {
        records.push(100 + 2 * row as i64, AT, Some(b"key"), value);
    }
    records
}

fn decode(plan: &SourcePlan, records: &Records) -> Decoded {
    SourceDecoder::new(0, plan, None).unwrap().decode(records).unwrap()
}

/// The rows as JSON, for comparisons.
fn rows(decoded: &Decoded) -> Vec<Value> {
    let batch = &decoded.batch.columns;
    let cell = |array: &dyn Array, row: usize| match array.data_type() {
        _ if array.is_null(row) => Value::Null,
        arrow::datatypes::DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        arrow::datatypes::DataType::Int64 => array.as_primitive::<Int64Type>().value(row).into(),
        arrow::datatypes::DataType::Float64 => array.as_primitive::<Float64Type>().value(row).into(),
        arrow::datatypes::DataType::Boolean => array.as_boolean().value(row).into(),
        _ => array.as_primitive::<TimestampMillisecondType>().value(row).into(),
    };
    (0..batch.num_rows())
        .map(|row| {
            let fields = batch.schema().fields().clone();
            fields.iter().zip(batch.columns()).map(|(f, c)| (f.name().clone(), cell(c, row))).collect()
        })
        .collect()
}

fn good(id: &str) -> Vec<u8> {
    json!({"customer_id": id, "at": AT, "amount": 12.5, "quantity": 2, "gift": true, "more": [1, {"x": null}]})
        .to_string()
        .into_bytes()
}

fn good_row(id: &str) -> Value {
    json!({"customer_id": id, "at": AT, "amount": 12.5, "quantity": 2, "gift": true})
}

/// Decodes the value between two good ones, which must come out as if it were not there.
fn decode_between(
    plan: &SourcePlan,
    before: &[u8],
    value: Option<&[u8]>,
    after: &[u8],
) -> (Vec<Value>, Vec<DeadLetter>) {
    let decoded = decode(plan, &records([Some(before), value, Some(after)]));
    let mut found = rows(&decoded);
    let kept = found.len();
    assert_eq!(kept + decoded.dead.len(), 3);
    assert_eq!(decoded.batch.next, 105);
    assert_eq!((decoded.batch.read, decoded.batch.filtered), (3, 0));
    assert_eq!(decoded.batch.offsets, if kept == 3 { vec![100, 102, 104] } else { vec![100, 104] });
    assert_eq!(found.remove(0), good_row("before"));
    assert_eq!(found.pop().unwrap(), good_row("after"));
    (found, decoded.dead)
}

fn decode_json(value: Option<&[u8]>) -> (Vec<Value>, Vec<DeadLetter>) {
    decode_between(&json_plan(), &good("before"), value, &good("after"))
}

#[rstest]
#[case(r#"{"customer_id": "c", "at": 1}"#, json!([null, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "amount": null}"#, json!([null, null, null]))]
#[case(r#"{"gift": false, "quantity": -3, "amount": 1e2, "at": 1, "customer_id": "c"}"#, json!([100.0, -3, false]))]
#[case(r#"{"customer_id": "c", "at": 1, "amount": 3}"#, json!([3.0, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "quantity": 3.0}"#, json!([null, 3, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "quantity": -0}"#, json!([null, 0, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "quantity": 9223372036854775807}"#, json!([null, i64::MAX, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "quantity": -9223372036854775808}"#, json!([null, i64::MIN, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "amount": 18446744073709551615}"#, json!([1.8446744073709552e19, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "amount": 1, "amount": 2}"#, json!([2.0, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "amount": "bad", "amount": 2}"#, json!([2.0, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "amount": 2, "amount": null}"#, json!([null, null, null]))]
#[case(r#"{"customer_id": "longer", "customer_id": "c", "at": 1}"#, json!([null, null, null]))]
#[case(r#"{"customer_id": "\u0063", "\u0061t": 1}"#, json!([null, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1.0}"#, json!([null, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1.75}"#, json!([null, null, null]))]
#[case(" \t\r\n{ \"customer_id\" : \"c\" , \"at\" : 1 } \n", json!([null, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "amount": NaN, "other": "NaN \" Infinity"}"#, json!([null, null, null]))]
#[case(r#"{"customer_id": "c", "at": 1, "amount": -Infinity, "quantity": 4}"#, json!([null, 4, null]))]
fn reads_json(#[case] text: &str, #[case] expected: Value) {
    let (found, dead) = decode_json(Some(text.as_bytes()));
    assert!(dead.is_empty(), "{}", dead[0].error);
    let expected =
        json!({"customer_id": "c", "at": 1, "amount": expected[0], "quantity": expected[1], "gift": expected[2]});
    assert_eq!(found, [expected]);
}

#[rstest]
#[case("", "malformed", "the value is empty")]
#[case("   ", "malformed", "the value is empty")]
#[case("[1]", "malformed", "expected a JSON object, found \"[1]\" at byte 0")]
#[case("  17", "malformed", "expected a JSON object, found \"17\" at byte 2")]
#[case("null", "malformed", "expected a JSON object")]
#[case("{", "malformed", "cut short at byte 1")]
#[case(r#"{"customer_id": "c", "at": 1"#, "malformed", "cut short at byte 28")]
#[case(r#"{"customer_id": "c"#, "malformed", "cut short")]
#[case(r#"{"customer_id": "c", "at": 1,}"#, "malformed", "not JSON")]
#[case(r#"{"customer_id": "c", "at": 01}"#, "malformed", "not JSON")]
#[case(r#"{"customer_id": "c", "at": 1} x"#, "malformed", "at byte 30")]
#[case(r#"{"customer_id": "c", "at": 1}{}"#, "malformed", "not JSON")]
#[case(r#"{"customer_id": 'c', "at": 1}"#, "malformed", "at byte 16")]
#[case(r#"{"customer_id": "c", "at": 1, "x": tru}"#, "malformed", "not JSON")]
#[case(r#"{"customer_id": "c", "at": 1, "x": [1, }}"#, "malformed", "not JSON")]
#[case(r#"{"customer_id": "\ud800", "at": 1}"#, "malformed", "not JSON")]
#[case("{\"customer_id\": \"a\nb\", \"at\": 1}", "malformed", "not JSON")]
#[case(r#"{"customer_id": "c", "at": 1, "amount": 1e999}"#, "malformed", "finite")]
#[case(
    r#"{"customer_id": "c", "at": 1, "amount": "12.5"}"#,
    "wrong_type",
    "field 'amount': expected float64, found text \"12.5\" at byte 40; a number in quotes"
)]
#[case(r#"{"customer_id": "c", "at": 1, "quantity": "2"}"#, "wrong_type", "a number in quotes")]
#[case(
    r#"{"customer_id": "c", "at": 1, "quantity": 3.5}"#,
    "wrong_type",
    "field 'quantity': expected int64, found number 3.5 at byte 42; it has a fraction"
)]
#[case(r#"{"customer_id": "c", "at": 1, "quantity": 9223372036854775808}"#, "wrong_type", "out of the range")]
#[case(r#"{"customer_id": "c", "at": 1, "quantity": -9223372036854775809}"#, "wrong_type", "out of the range")]
#[case(r#"{"customer_id": "c", "at": 1, "quantity": 1e300}"#, "wrong_type", "out of the range")]
#[case(r#"{"customer_id": "c", "at": 1, "gift": 1}"#, "wrong_type", "expected boolean, found number 1")]
#[case(r#"{"customer_id": "c", "at": 1, "gift": "true"}"#, "wrong_type", "true or false without quotes")]
#[case(r#"{"customer_id": "c", "at": 1, "amount": true}"#, "wrong_type", "expected float64, found true")]
#[case(r#"{"customer_id": "c", "at": 1, "amount": [1]}"#, "wrong_type", "found an array at byte 40")]
#[case(r#"{"customer_id": "c", "at": 1, "amount": {"v": 1}}"#, "wrong_type", "found an object at byte 40")]
#[case(r#"{"customer_id": 17, "at": 1}"#, "wrong_type", "expected string, found number 17 at byte 16")]
#[case(r#"{"customer_id": null, "at": 1}"#, "null_key", "key field 'customer_id' is null or missing")]
#[case(r#"{"at": 1}"#, "null_key", "'customer_id'")]
#[case(r#"{"customer_id": "c"}"#, "null_event_time", "'at' is null or missing")]
#[case(r#"{"customer_id": "c", "at": null}"#, "null_event_time", "'at'")]
#[case(r#"{"customer_id": "c", "at": NaN}"#, "null_event_time", "'at'")]
#[case(r#"{"customer_id": "c", "at": "2024-05-01"}"#, "wrong_type", "set event_time.unit = \"iso\"")]
#[case(r#"{"customer_id": "c", "at": "soon"}"#, "wrong_type", "expected timestamp, found text \"soon\" at byte 27")]
#[case(r#"{"customer_id": "c", "at": 1700000000000000}"#, "bad_event_time", "as unit \"us\"")]
#[case(r#"{"customer_id": "c", "at": -9223372036854775808}"#, "bad_event_time", "not within the years")]
#[case(r#"{"customer_id": "c", "at": 1e30}"#, "wrong_type", "overflows")]
#[case(r#"{"customer_id": "c", "at": 1700003600001}"#, "ahead_of_clock", "3600 s ahead")]
fn quarantines_json(#[case] text: &str, #[case] reason: &str, #[case] error: &str) {
    let (found, dead) = decode_json(Some(text.as_bytes()));
    assert!(found.is_empty(), "{found:?}");
    assert_eq!(dead[0].reason, reason, "{}", dead[0].error);
    assert!(dead[0].error.contains(error), "{}", dead[0].error);
    assert!(dead[0].error.starts_with("churn.purchases[3] offset 102: "), "{}", dead[0].error);
    assert!(!dead[0].error.contains('\n'), "{}", dead[0].error);
    assert_eq!((dead[0].offset, dead[0].stage, dead[0].value.as_deref()), (102, "decode", Some(text.as_bytes())));
}

#[test]
fn quarantines_a_tombstone() {
    let (found, dead) = decode_json(None);
    assert!(found.is_empty());
    assert_eq!((dead[0].reason, dead[0].value.as_deref()), ("null_value", None));
}

#[test]
fn quarantines_invalid_utf8() {
    let (found, dead) = decode_json(Some(b"{\"customer_id\": \"c\xff\", \"at\": 1}"));
    assert!(found.is_empty());
    assert_eq!(dead[0].reason, "malformed");
    assert!(dead[0].error.ends_with("invalid UTF-8 at byte 18"), "{}", dead[0].error);
}

#[test]
fn keeps_key_and_headers_of_a_dead_letter() {
    let mut records = records([Some(&good("c")[..]), Some(b"?")]);
    let header = Header { name: "trace".into(), value: b"1".to_vec() };
    records.headers.push((1, vec![header.clone()]));
    let decoded = decode(&json_plan(), &records);
    let dead = &decoded.dead[0];
    assert_eq!((&dead.headers, dead.key.as_deref(), dead.timestamp), (&vec![header], Some(&b"key"[..]), AT));
}

#[rstest]
#[case(250, true)]
#[case(300, false)]
#[case(1_000_000, false)]
fn bounds_nesting(#[case] depth: usize, #[case] fine: bool) {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let inner = if open == "[" { "" } else { "1" };
        let deep = format!("{}{inner}{}", open.repeat(depth), close.repeat(depth));
        let text = format!(r#"{{"customer_id": "c", "x": {deep}, "at": 1}}"#);
        let (found, dead) = decode_json(Some(text.as_bytes()));
        assert_eq!(found.len(), usize::from(fine));
        if !fine {
            assert!(dead[0].error.contains("nested more than"), "{}", dead[0].error);
        }
    }
}

#[test]
fn reads_a_huge_record() {
    let text = json!({"customer_id": "c", "blob": "é\"".repeat(2_000_000), "at": 1}).to_string();
    let (found, _) = decode_json(Some(text.as_bytes()));
    assert_eq!(found.len(), 1);
}

#[test]
fn counts_nonfinite_values() {
    let text = br#"{"customer_id": "c", "at": 1, "amount": NaN}"#;
    let decoded = decode(&json_plan(), &records([Some(&text[..])]));
    assert_eq!((decoded.batch.columns.num_rows(), decoded.nonfinite), (1, 0));
    let encoder = AvroEncoder::plain(AvroSchema::parse(SCHEMA).unwrap());
    let mut value = encoder.to_vec(&json!({"customer_id": "c", "at": 1, "amount": 1.0})).unwrap();
    let at = value.windows(8).position(|bytes| bytes == 1f64.to_le_bytes()).unwrap();
    value[at..at + 8].copy_from_slice(&f64::NAN.to_le_bytes());
    let decoded = decode(&avro_plan(), &records([Some(&value[..])]));
    assert_eq!((rows(&decoded)[0]["amount"].clone(), decoded.nonfinite), (Value::Null, 1));
}

#[test]
fn reads_confluent_framed_json() {
    let framed = [b"\x00\x00\x00\x00\x07", &good("c")[..]].concat();
    let (found, _) = decode_json(Some(&framed));
    assert_eq!(found, [good_row("c")]);
    let (_, dead) = decode_json(Some(b"\x00\x00\x00\x00\x07{\"customer_id\": 1}"));
    assert!(dead[0].error.contains("at byte 21"), "{}", dead[0].error);
}

#[test]
fn reads_nested_fields() {
    let mut plan = json_plan();
    plan.fields = vec![
        column("who.id", DataType::String),
        column("at", DataType::Timestamp),
        column("basket.total.net", DataType::Float64),
        column("basket.items", DataType::Int64),
    ];
    plan.key_fields = vec!["who.id".into()];
    let decode = |text: &str| decode(&plan, &records([Some(text.as_bytes())]));
    let found = decode(
        r#"{"basket": {"x": 1, "items": 2, "total": {"gross": 9, "net": 8.5}}, "at": 1, "who": {"name": "n", "id": "c"}}"#,
    );
    assert_eq!(rows(&found), [json!({"who.id": "c", "at": 1, "basket.total.net": 8.5, "basket.items": 2})]);
    let found = decode(r#"{"basket": {"items": 2}, "basket": {"total": null}, "at": 1, "who": {"id": "c"}}"#);
    assert_eq!(rows(&found), [json!({"who.id": "c", "at": 1, "basket.total.net": null, "basket.items": null})]);
    let found = decode(r#"{"basket": {"total": {"net": "8"}}, "at": 1, "who": {"id": "c"}}"#);
    assert!(
        found.dead[0].error.contains("field 'basket.total.net': expected float64, found text \"8\" at byte 29"),
        "{}",
        found.dead[0].error
    );
    let found = decode(r#"{"basket": {"total": 8}, "at": 1, "who": {"id": "c"}}"#);
    assert!(
        found.dead[0].error.contains("found a number at byte 21; an object should hold"),
        "{}",
        found.dead[0].error
    );
}

#[rstest]
#[case(TimeUnit::S, "1700000000", AT)]
#[case(TimeUnit::S, "1700000000.25", AT + 250)]
#[case(TimeUnit::Ms, "1700000000000", AT)]
#[case(TimeUnit::Us, "1700000000000999", AT)]
#[case(TimeUnit::Ns, "1700000000000999999", AT)]
#[case(TimeUnit::Iso, "\"2023-11-14T22:13:20Z\"", AT)]
#[case(TimeUnit::Iso, "\"2023-11-14\"", 1_699_920_000_000)]
fn reads_event_times(#[case] unit: TimeUnit, #[case] text: &str, #[case] expected: i64) {
    let mut plan = json_plan();
    plan.event_time_unit = unit;
    let text = format!(r#"{{"customer_id": "c", "at": {text}}}"#);
    let decoded = decode(&plan, &records([Some(text.as_bytes())]));
    assert_eq!(decoded.batch.event_times, [expected]);
    assert_eq!(rows(&decoded)[0]["at"], expected);
}

#[rstest]
#[case(DataType::Int64, TimeUnit::S, "1700000000", Some(AT))]
#[case(DataType::Float64, TimeUnit::S, "1700000000.5", Some(AT + 500))]
#[case(DataType::String, TimeUnit::Iso, "\"2023-11-14T22:13:20Z\"", Some(AT))]
#[case(DataType::String, TimeUnit::Iso, "\"soon\"", None)]
fn reads_event_times_of_other_types(
    #[case] data_type: DataType,
    #[case] unit: TimeUnit,
    #[case] text: &str,
    #[case] expected: Option<i64>,
) {
    let mut plan = json_plan();
    plan.event_time_unit = unit;
    plan.fields[1].data_type = data_type;
    let text = format!(r#"{{"customer_id": "c", "at": {text}}}"#);
    let decoded = decode(&plan, &records([Some(text.as_bytes())]));
    assert_eq!(decoded.batch.event_times, expected.into_iter().collect::<Vec<_>>());
    if expected.is_none() {
        assert_eq!(decoded.dead[0].reason, "bad_event_time");
    }
}

#[test]
fn a_record_without_timestamp_is_never_ahead() {
    let text = br#"{"customer_id": "c", "at": 4000000000000}"#;
    let mut records = records([Some(&text[..])]);
    assert_eq!(decode(&json_plan(), &records).dead[0].reason, "ahead_of_clock");
    records.timestamps[0] = -1;
    assert_eq!(decode(&json_plan(), &records).batch.event_times, [4_000_000_000_000]);
}

#[test]
fn derives_then_filters() {
    let mut plan = json_plan();
    plan.derive = vec![
        (column("price", DataType::Float64), "amount / quantity".into()),
        (column("units", DataType::Int64), "100 / quantity".into()),
        (column("dear", DataType::Boolean), "price > 10".into()),
    ];
    plan.filter = Some("dear".into());
    let record = |amount: f64, quantity: i64| {
        json!({"customer_id": "c", "at": AT, "amount": amount, "quantity": quantity}).to_string().into_bytes()
    };
    let values = [record(30.0, 2), record(30.0, 0), b"?".to_vec(), record(1.0, 1), record(44.0, 4), record(20.0, 2)];
    let decoded = decode(&plan, &records(values.iter().map(|value| Some(&value[..]))));
    assert_eq!(decoded.batch.offsets, [100, 108]);
    assert_eq!(decoded.batch.event_times.len(), 2);
    assert_eq!((decoded.batch.read, decoded.batch.filtered), (6, 2));
    let reasons: Vec<_> = decoded.dead.iter().map(|dead| (dead.offset, dead.reason)).collect();
    assert_eq!(reasons, [(102, "expression"), (104, "malformed")]);
    assert!(decoded.dead[0].error.contains("100 / quantity"), "{}", decoded.dead[0].error);
    let names: Vec<_> = decoded.batch.columns.schema().fields().iter().map(|field| field.name().clone()).collect();
    assert_eq!(names[5..], ["price", "units", "dear"]);
    assert_eq!(rows(&decoded)[1]["price"], 11.0);
}

#[test]
fn an_empty_poll_gives_an_empty_batch() {
    let decoded = decode(&json_plan(), &records([]));
    assert_eq!((decoded.batch.columns.num_rows(), decoded.batch.next), (0, -1));
}

#[test]
fn the_plan_must_fit_the_schema() {
    let mut plan = avro_plan();
    plan.fields[2].name = "amuont".into();
    let error = SourceDecoder::new(0, &plan, None).unwrap_err().to_string();
    assert!(error.contains("'amuont'") && error.contains("no such field"), "{error}");
    let mut plan = avro_plan();
    plan.fields[2].data_type = DataType::String;
    let error = SourceDecoder::new(0, &plan, None).unwrap_err().to_string();
    assert!(error.contains("expected string, but the writer's type is double"), "{error}");
    let mut plan = json_plan();
    plan.filter = Some("amonut > 1".into());
    assert!(matches!(SourceDecoder::new(0, &plan, None), Err(SourceError::Expression { .. })));
}

fn avro(id: &str) -> Vec<u8> {
    let encoder = AvroEncoder::plain(AvroSchema::parse(SCHEMA).unwrap());
    encoder
        .to_vec(&json!({"customer_id": id, "at": AT, "note": "n", "amount": 12.5, "quantity": 2, "gift": true}))
        .unwrap()
}

fn decode_avro(value: &[u8]) -> (Vec<Value>, Vec<DeadLetter>) {
    decode_between(&avro_plan(), &avro("before"), Some(value), &avro("after"))
}

#[test]
fn reads_avro() {
    assert_eq!(decode_avro(&avro("c")).0, [good_row("c")]);
}

#[test]
fn quarantines_every_truncation_and_every_excess_of_avro() {
    let whole = avro("c");
    for length in 0..whole.len() {
        let (found, dead) = decode_avro(&whole[..length]);
        assert!(found.is_empty());
        assert_eq!(dead[0].reason, "malformed");
        assert!(dead[0].error.contains(&format!("cut short at byte {length}")), "{}", dead[0].error);
    }
    let (_, dead) = decode_avro(&[&whole[..], b"\x00"].concat());
    assert!(dead[0].error.contains("more bytes follow"), "{}", dead[0].error);
}

#[test]
fn a_record_waits_for_an_absent_registry() {
    let stub = StubRegistry::start();
    stub.put(7, SCHEMA);
    stub.set_away(true);
    let mut decoder = SourceDecoder::new(0, &avro_plan(), Some(stub.client())).unwrap();
    let framed = [b"\x00\x00\x00\x00\x07", &avro("framed")[..]].concat();
    let (first, last) = (avro("first"), avro("last"));
    let records = records([Some(&first[..]), Some(&framed), Some(&last)]);
    for _ in 0..2 {
        assert!(decoder.decode(&records).unwrap_err().is_retriable());
    }
    stub.set_away(false);
    let decoded = decoder.decode(&records).unwrap();
    assert_eq!(rows(&decoded), [good_row("first"), good_row("framed"), good_row("last")]);
    stub.set_away(true);
    assert_eq!(decoder.decode(&records).unwrap().batch.columns, decoded.batch.columns);
}

fn labels(format: Format) -> (LabelsPlan, EntityPlan) {
    let plan = LabelsPlan {
        topic: "churn.labels".into(),
        format,
        fields: vec![
            column("customer", DataType::String),
            column("as_of", DataType::Timestamp),
            column("churned", DataType::Boolean),
        ],
        key_fields: vec!["customer".into()],
        as_of: ("as_of".into(), TimeUnit::Ms),
        value: "churned".into(),
        horizon: Duration::from_secs(1),
    };
    (plan, EntityPlan { name: "customer".into(), keys: vec![column("customer_id", DataType::String)] })
}

#[test]
fn reads_labels() {
    let (plan, entity) = labels(Format::Json);
    let values = [
        r#"{"customer": "a", "as_of": 1, "churned": true}"#,
        r#"{"customer": "b", "as_of": 2, "churned": 0}"#,
        r#"{"customer": "c", "as_of": 3, "churned": null}"#,
        r#"{"customer": "d", "as_of": 4}"#,
        r#"{"customer": null, "as_of": 5, "churned": 1}"#,
        r#"{"customer": "f", "as_of": 6, "churned": "yes"}"#,
        r#"{"customer": "g", "as_of": 7, "churned": 0.25}"#,
    ];
    let records = records(values.iter().map(|value| Some(value.as_bytes())));
    let found = LabelDecoder::new(&plan, &entity, None).unwrap().decode(&records).unwrap();
    assert_eq!(found.keys.schema().field(0).name(), "customer_id");
    let keys: Vec<_> = found.keys.column(0).as_string::<i32>().iter().flatten().collect();
    assert_eq!((keys, found.as_of, found.values), (vec!["a", "b", "g"], vec![1, 2, 7], vec![1.0, 0.0, 0.25]));
    assert_eq!((found.offsets, found.next, found.read), (vec![100, 102, 112], 113, 7));
    let reasons: Vec<_> = found.dead.iter().map(|dead| dead.reason).collect();
    assert_eq!(reasons, ["null_label", "null_label", "null_key", "wrong_type"]);
}

#[test]
fn reads_avro_labels() {
    let schema = r#"{"type": "record", "name": "Label", "fields": [{"name": "customer", "type": "string"},
        {"name": "churned", "type": ["boolean", "int"]}, {"name": "as_of", "type": "long"}]}"#;
    let (plan, entity) = labels(Format::Avro { schema: schema.into() });
    let encoder = AvroEncoder::plain(AvroSchema::parse(schema).unwrap());
    let value = encoder.to_vec(&json!({"customer": "a", "as_of": 1, "churned": true})).unwrap();
    let found = LabelDecoder::new(&plan, &entity, None).unwrap().decode(&records([Some(&value[..])])).unwrap();
    assert_eq!((found.as_of, found.values), (vec![1], vec![1.0]));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-1000i64..1000).prop_map(|n| Value::from(n as f64 / 8.0)),
        "\\PC{0,12}".prop_map(Value::from),
        "[\\x00-\\x7f]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z]{1,3}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn any_record() -> impl Strategy<Value = Value> {
    let field = |name: &'static str, good: BoxedStrategy<Value>| {
        prop_oneof![4 => good, 1 => any_json(), 1 => Just(Value::Null)].prop_map(move |value| (name.to_owned(), value))
    };
    let fields = [
        field("customer_id", "\\PC{0,8}".prop_map(Value::from).boxed()).boxed(),
        field("at", (0..AT).prop_map(Value::from).boxed()).boxed(),
        field("amount", any::<f64>().prop_map(Value::from).boxed()).boxed(),
        field("quantity", any::<i64>().prop_map(Value::from).boxed()).boxed(),
        field("gift", any::<bool>().prop_map(Value::from).boxed()).boxed(),
        ("[a-z]{1,4}", any_json()).boxed(),
    ];
    prop::sample::subsequence(fields.to_vec(), 0..=6)
        .prop_flat_map(|fields| fields)
        .prop_map(|fields| Value::Object(fields.into_iter().collect()))
}

/// What the record should decode to, by looking at it as a whole; `None` for a dead letter.
fn expected(record: &Value) -> Option<Value> {
    let whole = |value: &Value| match value {
        Value::Number(number) => number.as_i64().or_else(|| {
            let float = number.as_f64()?;
            (!number.is_u64() && float.fract() == 0.0 && float.abs() <= 2f64.powi(53)).then_some(float as i64)
        }),
        _ => None,
    };
    let text = record.get("customer_id")?.as_str()?;
    let at = record.get("at")?;
    let at = whole(at).or_else(|| {
        at.as_f64().filter(|at| at.abs() < 9e15).map(|at| (at * 1e3).round() as i64).map(|us| us.div_euclid(1000))
    })?;
    if !is_plausible(at) || at > AT + 3_600_000 {
        return None;
    }
    let field = |name: &str| record.get(name).unwrap_or(&Value::Null);
    let amount = field("amount");
    let quantity = field("quantity");
    let gift = field("gift");
    if !(amount.is_null() || amount.is_number())
        || !(quantity.is_null() || whole(quantity).is_some())
        || !(gift.is_null() || gift.is_boolean())
    {
        return None;
    }
    Some(json!({"customer_id": text, "at": at, "amount": amount.as_f64(), "quantity": whole(quantity), "gift": gift}))
}

fn mutated(whole: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let length = whole.len();
    let whole = Just(whole);
    prop_oneof![
        (whole.clone(), 0..length).prop_map(|(mut bytes, at)| {
            bytes.truncate(at);
            bytes
        }),
        (whole.clone(), 0..length, any::<u8>()).prop_map(|(mut bytes, at, byte)| {
            bytes[at] = byte;
            bytes
        }),
        (whole.clone(), 0..length, any::<u8>()).prop_map(|(mut bytes, at, byte)| {
            bytes.insert(at, byte);
            bytes
        }),
        (whole.clone(), 0..length).prop_map(|(mut bytes, at)| {
            bytes.remove(at);
            bytes
        }),
        (whole, 0..length, 0..length).prop_map(|(mut bytes, a, b)| {
            bytes.swap(a, b);
            bytes
        }),
    ]
}

proptest! {
    #[test]
    fn agrees_with_serde_json(record in any_record(), pretty: bool) {
        let text = if pretty { serde_json::to_string_pretty(&record) } else { serde_json::to_string(&record) }.unwrap();
        let (found, dead) = decode_json(Some(text.as_bytes()));
        let expected = expected(&record);
        prop_assert_eq!(found.first(), expected.as_ref(), "{:?}", dead.first().map(|dead| &dead.error));
    }

    #[test]
    fn any_bytes_leave_their_neighbours_alone(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        decode_json(Some(&bytes));
        decode_avro(&bytes);
    }

    #[test]
    fn any_text_leaves_its_neighbours_alone(text in "[{}\\[\\]:,\"\\\\0-9eE.+\\-a-z \\n]{0,60}") {
        decode_json(Some(text.as_bytes()));
    }

    #[test]
    fn mutated_json_leaves_its_neighbours_alone(bytes in mutated(good("c"))) {
        let (found, _) = decode_json(Some(&bytes));
        // serde_json refuses NaN and Infinity, and nothing that single changes make of this record besides.
        prop_assert!(found.is_empty() || serde_json::from_slice::<Value>(&bytes).is_ok());
    }

    #[test]
    fn mutated_avro_leaves_its_neighbours_alone(bytes in mutated(avro("c"))) {
        decode_avro(&bytes);
    }
}
