//! The schema registry client and Confluent framing against a real Apicurio registry.

use std::sync::Arc;
use std::thread;

use arrow::array::AsArray;
use arrow::datatypes::{Float64Type, Int64Type};
use driftline::broker::{BrokerError, Records, SchemaRegistry, TopicPartition};
use driftline::config::plan::{DataType, Format, SourcePlan};
use driftline::source::SourceDecoder;
use driftline::source::avro::{AvroEncoder, AvroSchema};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::servers::{self, unique};
use crate::source_plan::purchases;

const VERSION_1: &str = r#"{"type":"record","name":"Purchase","namespace":"shop","fields":[
    {"name":"customer_id","type":"string"},{"name":"at","type":{"type":"long","logicalType":"timestamp-millis"}},
    {"name":"amount","type":"double"}]}"#;

/// Adds a field with a default in the middle, and makes another one optional.
const VERSION_2: &str = r#"{"type":"record","name":"Purchase","namespace":"shop","fields":[
    {"name":"customer_id","type":"string"},{"name":"quantity","type":"long","default":1},
    {"name":"at","type":{"type":"long","logicalType":"timestamp-millis"}},
    {"name":"amount","type":["double","null"]}]}"#;

/// Nobody who reads with version 1 can use this.
const INCOMPATIBLE: &str = r#"{"type":"record","name":"Purchase","namespace":"shop","fields":[
    {"name":"customer_id","type":"long"},{"name":"at","type":"string"},{"name":"new","type":"string"}]}"#;

struct World {
    _runtime: Runtime,
    registry: Arc<SchemaRegistry>,
}

impl World {
    fn new() -> Self {
        Self::of(servers::SchemaRegistry::shared())
    }

    fn of(server: &servers::SchemaRegistry) -> Self {
        let runtime = Runtime::new().unwrap();
        let registry = Arc::new(SchemaRegistry::new(&server.url(), runtime.handle().clone()).unwrap());
        Self { _runtime: runtime, registry }
    }
}

fn plan(topic: &str, schema: &str) -> SourcePlan {
    let fields = [
        ("customer_id", DataType::String),
        ("at", DataType::Timestamp),
        ("amount", DataType::Float64),
        ("quantity", DataType::Int64),
    ];
    purchases(topic, Format::Avro { schema: schema.into() }, &fields)
}

fn encode(schema: &str, id: Option<u32>, value: &Value) -> Vec<u8> {
    let schema = AvroSchema::parse(schema).unwrap();
    let encoder = match id {
        Some(id) => AvroEncoder::framed(schema, id),
        None => AvroEncoder::plain(schema),
    };
    encoder.to_vec(value).unwrap()
}

#[test]
fn registers_finds_and_compares_schemas() {
    let World { registry, .. } = &World::new();
    let subject = format!("{}-value", unique("purchases"));
    assert_eq!(registry.latest(&subject).unwrap(), None);
    assert!(registry.is_compatible(&subject, VERSION_1).unwrap().compatible, "a new subject takes anything");

    let id = registry.register(&subject, VERSION_1).unwrap();
    assert_eq!(registry.register(&subject, VERSION_1).unwrap(), id);
    let latest = registry.latest(&subject).unwrap().unwrap();
    assert_eq!((latest.schema.id, &*latest.schema.schema_type), (id, "AVRO"));
    let stored = registry.schema_by_id(id).unwrap().unwrap();
    assert_eq!(AvroSchema::parse(&stored.schema).unwrap().fields(), AvroSchema::parse(VERSION_1).unwrap().fields());

    assert_ne!(registry.register(&subject, VERSION_2).unwrap(), id);
    assert_eq!(registry.schema_by_id(4_000_000).unwrap(), None);
}

#[test]
fn the_registry_refuses_what_is_no_schema() {
    let World { registry, .. } = &World::new();
    let error = registry.register(&unique("broken"), r#"{"type": "recrod"}"#).unwrap_err();
    assert!(matches!(error, BrokerError::Registry { .. }), "{error}");
}

#[test]
fn decodes_what_several_writers_framed() {
    let World { registry, .. } = &World::new();
    let topic = unique("purchases");
    let subject = format!("{topic}-value");
    let first = registry.register(&subject, VERSION_1).unwrap();
    let second = registry.register(&subject, VERSION_2).unwrap();
    let other = registry.register(&unique("other"), INCOMPATIBLE).unwrap();
    let at = 1_700_000_000_000_i64;
    let old = json!({"customer_id": "old", "at": at, "amount": 1.5});
    let new = json!({"customer_id": "new", "at": at, "amount": 2.5, "quantity": 3});
    let odd = json!({"customer_id": 1, "at": "now", "new": ""});
    let truncated = encode(VERSION_1, Some(first), &old);

    let mut records = Records::new(TopicPartition::new(&*topic, 0));
    for (offset, value) in [
        encode(VERSION_1, Some(first), &old),
        encode(VERSION_2, None, &new),
        encode(INCOMPATIBLE, Some(other), &odd),
        encode(VERSION_2, Some(second), &new),
        truncated[..truncated.len() - 1].to_vec(),
        encode(VERSION_1, Some(4_000_001), &old),
    ]
    .into_iter()
    .enumerate()
    {
        records.push(offset as i64, at, None, Some(&value));
    }
    let mut decoder = SourceDecoder::new(0, &plan(&topic, VERSION_2), Some(registry.clone())).unwrap();
    let decoded = decoder.decode(&records).unwrap();
    let columns = &decoded.batch.columns;
    let ids: Vec<_> = columns.column(0).as_string::<i32>().iter().flatten().collect();
    assert_eq!(ids, ["old", "new", "new"]);
    assert_eq!(columns.column(2).as_primitive::<Float64Type>().values()[..], [1.5, 2.5, 2.5]);
    assert_eq!(columns.column(3).as_primitive::<Int64Type>().values()[..], [1, 3, 3]);
    let reasons: Vec<_> = decoded.dead.iter().map(|dead| (dead.offset, dead.reason)).collect();
    assert_eq!(reasons, [(2, "incompatible_schema"), (4, "malformed"), (5, "unknown_schema")]);
}

#[test]
fn a_record_waits_for_its_schema() {
    // Ids are given in order, so that the next one of a registry that nobody else uses is known before it is given.
    let server = servers::SchemaRegistry::start();
    let (producer, consumer) = (World::of(&server), World::of(&server));
    let subject = format!("{}-value", unique("purchases"));
    let first = producer.registry.register(&subject, VERSION_1).unwrap();
    let next = first + 1;
    assert_eq!(consumer.registry.schema_by_id(next).unwrap(), None);

    let at = 1_700_000_000_000_i64;
    let mut records = Records::new(TopicPartition::new("purchases", 0));
    let record = json!({"customer_id": "early", "at": at, "amount": 2.5, "quantity": 3});
    records.push(0, at, None, Some(&encode(VERSION_2, Some(next), &record)));
    let mut decoder = SourceDecoder::new(0, &plan("purchases", VERSION_2), Some(consumer.registry)).unwrap();
    let decoded = thread::scope(|threads| {
        let decoded = threads.spawn(|| decoder.decode(&records).unwrap());
        assert_eq!(producer.registry.register(&subject, VERSION_2).unwrap(), next);
        decoded.join().unwrap()
    });
    assert!(decoded.dead.is_empty(), "{:?}", decoded.dead);
    assert_eq!(decoded.batch.columns.column(0).as_string::<i32>().value(0), "early");
}
