//! Protobuf records and JSON Schema against other implementations: Google's encoder, Python's validator, a real registry.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Float64Type, Int64Type, TimestampMillisecondType};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use driftline::broker::{Records, TopicPartition};
use driftline::config::plan::{DataType, Format};
use driftline::source::protobuf::Message;
use driftline::source::{Decoded, SourceDecoder};
use serde_json::{Value, json};

use crate::process::run_python;
use crate::servers::{SchemaRegistry, unique};
use crate::source_plan::purchases;

/// What Google's implementation wrote and says of it: one JSON object a record.
pub struct Oracle {
    folder: tempfile::TempDir,
    records: Vec<Value>,
}

impl Oracle {
    pub fn run() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let printed = run_python(&[&"tests/it/protobuf_oracle.py", &folder.path()]);
        let records: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(records.len(), 800);
        Self { folder, records }
    }

    /// A descriptor set.
    pub fn set(&self, schema: &str) -> Vec<u8> {
        std::fs::read(self.folder.path().join(format!("{schema}.binpb"))).unwrap()
    }

    pub fn message(&self, schema: &str) -> Message {
        Message::find(&self.set(schema), &format!("shop.{schema}.Outer.Event")).unwrap()
    }

    /// Records of a schema, and what they hold.
    pub fn of(&self, schema: &str) -> impl Iterator<Item = (Vec<u8>, &Value)> {
        let bytes = |record: &Value| BASE64_STANDARD.decode(record["value"].as_str().unwrap()).unwrap();
        self.records.iter().filter(move |r| r["schema"] == schema).map(move |r| (bytes(r), &r["expected"]))
    }
}

/// A decoder of all columns of a message.
pub fn decoder(message: &Message) -> SourceDecoder {
    let fields: Vec<(&str, DataType)> = message.fields().iter().map(|(name, of)| (name.as_str(), *of)).collect();
    let plan = purchases("orders", Format::Protobuf { message: Arc::new(message.clone()) }, &fields);
    SourceDecoder::new(0, &plan, None).unwrap()
}

fn decode(decoder: &mut SourceDecoder, values: &[Vec<u8>]) -> Decoded {
    let mut records = Records::new(TopicPartition::new("orders", 0));
    for (offset, value) in (0..).zip(values) {
        records.push(offset, -1, None, Some(value));
    }
    decoder.decode(&records).unwrap()
}

/// The row as JSON.
fn row(batch: &RecordBatch, row: usize) -> Value {
    let cell = |column: &dyn Array| match column.data_type() {
        _ if column.is_null(row) => Value::Null,
        arrow::datatypes::DataType::Int64 => json!(column.as_primitive::<Int64Type>().value(row)),
        arrow::datatypes::DataType::Float64 => json!(column.as_primitive::<Float64Type>().value(row)),
        arrow::datatypes::DataType::Boolean => json!(column.as_boolean().value(row)),
        arrow::datatypes::DataType::Utf8 => json!(column.as_string::<i32>().value(row)),
        _ => json!(column.as_primitive::<TimestampMillisecondType>().value(row)),
    };
    let schema = batch.schema();
    schema.fields().iter().zip(batch.columns()).map(|(field, column)| (field.name().clone(), cell(column))).collect()
}

#[test]
fn protobuf_records_hold_what_googles_own_implementation_says() {
    let oracle = Oracle::run();
    for schema in ["new", "old"] {
        let message = oracle.message(schema);
        let mut decoder = decoder(&message);
        let (values, expected): (Vec<Vec<u8>>, Vec<&Value>) = oracle.of(schema).unzip();
        let mut names: Vec<&str> = message.fields().iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        let known: Vec<&str> =
            expected.iter().find_map(|e| e.as_object()).unwrap().keys().map(String::as_str).collect();
        let mut known = known;
        known.sort_unstable();
        assert_eq!(names, known, "the columns of {schema}");

        // As they are, and framed as Confluent's serialisers do for message 1 within message 2 of a file.
        let framed: Vec<Vec<u8>> = values.iter().map(|v| [&[0, 0, 0, 0, 7, 4, 4, 2], &v[..]].concat()).collect();
        for values in [values, framed] {
            let decoded = decode(&mut decoder, &values);
            let mut good = 0;
            for (offset, expected) in expected.iter().enumerate() {
                let found = decoded.batch.offsets.iter().position(|o| *o == i64::try_from(offset).unwrap());
                match found {
                    Some(place) => {
                        assert_eq!(&row(&decoded.batch.columns, place), *expected, "{schema} {offset}");
                        good += 1;
                    }
                    None => assert!(expected.is_null(), "{schema} {offset}: {:?}", decoded.dead.first()),
                }
            }
            assert!(good > 200 && decoded.dead.len() + good == values.len());
            assert!(decoded.dead.iter().all(|letter| letter.reason == "wrong_type"), "numbers beyond 64 signed bits");
        }
    }
}

#[test]
fn a_record_of_another_message_or_cut_short_is_a_dead_letter() {
    let oracle = Oracle::run();
    let mut decoder = decoder(&oracle.message("new"));
    let (value, _) = oracle.of("new").max_by_key(|(value, _)| value.len()).unwrap();
    let other = [&[0, 0, 0, 0, 7, 0], &value[..]].concat();
    let decoded = decode(&mut decoder, &[other]);
    assert_eq!(decoded.dead[0].reason, "incompatible_schema");
    assert!(
        decoded.dead[0].error.contains("message [0]") && decoded.dead[0].error.contains("[2, 1]"),
        "{:?}",
        decoded.dead
    );

    // Whatever is cut off or changed, nobody panics, and each record is a row or a letter.
    let values: Vec<Vec<u8>> = (0..value.len())
        .flat_map(|at| {
            let mut changed = value.clone();
            changed[at] ^= 0xff;
            [value[..at].to_vec(), changed]
        })
        .collect();
    let decoded = decode(&mut decoder, &values);
    assert_eq!(decoded.batch.offsets.len() + decoded.dead.len(), values.len());
    assert!(decoded.dead.iter().any(|letter| letter.error.contains("cut short")));
}

/// Registers a schema of another kind than Avro, as its producers do, and returns its id.
fn register(url: &str, kind: &str, schema: &str) -> u32 {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let subject = unique("framed");
    let answer: Value = runtime.block_on(async {
        let body = json!({"schemaType": kind, "schema": schema});
        let url = format!("{url}/subjects/{subject}-value/versions");
        reqwest::Client::new().post(url).json(&body).send().await.unwrap().json().await.unwrap()
    });
    u32::try_from(answer["id"].as_u64().unwrap_or_else(|| panic!("{answer}"))).unwrap()
}

const JSON_SCHEMA: &str = r##"{"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": "#/$defs/order", "$defs": {
  "money": {"type": ["number", "null"], "minimum": 0},
  "order": {"type": "object", "required": ["customer_id"], "properties": {
    "customer_id": {"type": "string"}, "at": {"type": "string", "format": "date-time"}, "amount": {"$ref": "#/$defs/money"},
    "count": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "kind": {"enum": ["a", "b"]},
    "basket": {"type": "object", "properties": {"size": {"type": "integer"}, "tags": {"type": "array"}}}}}}}"##;

const PIPELINE: &str = r#"
name = "schemas"
[entities.customer]
key = { customer_id = "string" }
[sources.orders]
topic = "schemas.orders"
format = "json"
schema = "order.schema.json"
event_time = { field = "at", unit = "iso" }
where = "kind = 'a' and \"basket.size\" > 0 and count is not null"
[features.spend]
source = "orders"
of = "amount"
functions = ["sum"]
windows = ["1h"]
"#;

#[test]
fn records_framed_with_a_registered_json_schema_are_read_by_it() {
    let url = SchemaRegistry::shared().url();
    let id = register(&url, "JSON", JSON_SCHEMA);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("pipeline.toml"), PIPELINE).unwrap();
    std::fs::write(folder.path().join("order.schema.json"), JSON_SCHEMA).unwrap();
    let plan =
        driftline::config::load(folder.path(), &|_| None).unwrap_or_else(|faults| panic!("{}", faults.render(false)));
    let order = |size: Value, amount: Value| json!({"customer_id": "c", "at": "2024-01-01T00:00:00Z", "amount": amount, "count": 1, "kind": "a", "basket": {"size": size}});
    let cases = [
        (order(json!(2), json!(1.5)), true),
        (order(json!(2), Value::Null), true),
        (order(json!("2"), json!(1.5)), false),
        (order(json!(2), json!("1.5")), false),
        (order(json!(2.5), json!(1)), false),
    ];
    // Python's validator judges the same: a value that has not the schema's type is no row.
    let judge = "import json, sys, jsonschema; print(jsonschema.Draft202012Validator(json.loads(sys.argv[1])).is_valid(json.loads(sys.argv[2])))";
    for (record, fits) in &cases {
        let said = run_python(&[&"-c", &judge, &JSON_SCHEMA, &record.to_string()]);
        assert_eq!(said.trim(), if *fits { "True" } else { "False" }, "{record}");
    }
    let mut decoder = SourceDecoder::new(0, &plan.sources[0], None).unwrap();
    for (record, fits) in cases {
        let framed = [&[0][..], &id.to_be_bytes(), record.to_string().as_bytes()].concat();
        for value in [framed, record.to_string().into_bytes()] {
            let decoded = decode(&mut decoder, &[value]);
            assert_eq!((decoded.batch.offsets.len() == 1, decoded.dead.is_empty()), (fits, fits), "{record}");
        }
    }
}

#[test]
fn records_framed_with_a_registered_protobuf_schema_are_read() {
    let url = SchemaRegistry::shared().url();
    let text = "syntax = \"proto3\"; package shop.new; message Inner { string code = 1; sint32 level = 2; }";
    let id = register(&url, "PROTOBUF", text);
    let oracle = Oracle::run();
    let message = Message::find(&oracle.set("new"), "shop.new.Inner").unwrap();
    let fields = [("code", DataType::String), ("level", DataType::Int64)];
    let plan = purchases("orders", Format::Protobuf { message: Arc::new(message) }, &fields);
    let mut decoder = SourceDecoder::new(0, &plan, None).unwrap();
    // code = "x", level = -2; the first message of its file.
    let framed = [&[0][..], &id.to_be_bytes(), &[0, 0x0a, 1, b'x', 0x10, 3]].concat();
    let decoded = decode(&mut decoder, &[framed]);
    assert_eq!(row(&decoded.batch.columns, 0), json!({"code": "x", "level": -2}), "{:?}", decoded.dead);
}
