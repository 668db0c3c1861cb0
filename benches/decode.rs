//! Records a second from bytes to columns, one thread: JSON and Avro purchases of about 100 and 30 bytes, four fields used.

#![allow(missing_docs, reason = "criterion's macros")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use driftline::broker::{Records, TopicPartition};
use driftline::config::plan::{Column, DataType, Format, SourcePlan};
use driftline::source::SourceDecoder;
use driftline::source::avro::{AvroEncoder, AvroSchema};
use serde_json::{Value, json};

#[path = "../tests/it/source_plan.rs"]
mod source_plan;

const ROWS: usize = 10_000;

const SCHEMA: &str = r#"{"type": "record", "name": "Purchase", "fields": [
    {"name": "customer_id", "type": "string"},
    {"name": "purchased_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
    {"name": "channel", "type": "string"},
    {"name": "quantity", "type": "long"},
    {"name": "amount", "type": "double"}
]}"#;

fn plan(format: Format) -> SourcePlan {
    let fields = [
        ("customer_id", DataType::String),
        ("purchased_at", DataType::Timestamp),
        ("quantity", DataType::Int64),
        ("amount", DataType::Float64),
    ];
    source_plan::purchases("purchases", format, &fields)
}

fn event(row: usize) -> Value {
    json!({
        "customer_id": format!("C{:06}", row * 7919 % 50_000),
        "purchased_at": 1_700_000_000_000_i64 + row as i64 * 137,
        "channel": if row.is_multiple_of(3) { "web" } else { "store" },
        "quantity": 1 + row % 7,
        "amount": (row * 31 % 10_000) as f64 / 100.0,
    })
}

fn records(encode: impl Fn(&Value) -> Vec<u8>) -> Records {
    let mut records = Records::new(TopicPartition::new("purchases", 0));
    for row in 0..ROWS {
        records.push(row as i64, 1_800_000_000_000, None, Some(&encode(&event(row))));
    }
    records
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements(ROWS as u64));
    let schema = AvroSchema::parse(SCHEMA).expect("the schema is written above");
    let encoder = AvroEncoder::plain(schema);
    let avro = Format::Avro { schema: SCHEMA.into() };
    let dirty = |event: &Value| match event["quantity"].as_i64() {
        Some(7) => b"{\"customer_id\": \"C000001\"".to_vec(),
        _ => event.to_string().into_bytes(),
    };
    let filtered = |format: Format| SourcePlan {
        filter: Some("quantity > 1".into()),
        derive: vec![(Column { name: "price".into(), data_type: DataType::Float64 }, "amount / quantity".into())],
        ..plan(format)
    };
    let cases = [
        ("json", plan(Format::Json), records(|event| event.to_string().into_bytes())),
        ("json, every seventh record broken", plan(Format::Json), records(dirty)),
        ("json, derived and filtered", filtered(Format::Json), records(|event| event.to_string().into_bytes())),
        ("avro", plan(avro), records(|event| encoder.to_vec(event).expect("the event fits the schema"))),
    ];
    for (name, plan, records) in cases {
        let mut decoder = SourceDecoder::new(0, &plan, None).expect("the plan fits");
        group.bench_function(name, |b| {
            b.iter(|| decoder.decode(black_box(&records)).expect("no registry is asked").batch.columns.num_rows());
        });
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
