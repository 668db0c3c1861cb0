//! Records that have more than a value: tables' keys, and what a re-keyer writes.

use std::sync::Arc;

use driftline::broker::{Header, Records, TopicPartition};
use driftline::config::plan::{Emit, Plan, RecordKey, RekeyPlan, SourcePlan, TablePlan};
use driftline::source::SourceDecoder;
use driftline::source::rekeyed::{headers, of_rows, unpack};
use driftline::window::{Engine, Task, TaskClock};

use super::harness::Target;
use super::mutate::Shape;
use super::plan;
use super::records::{ORDERS, WORDS, decode, records, run};

/// The plan's orders as rows of a table, whose records' keys are written in some way.
fn table(plan: &Plan, record_key: RecordKey, keys: usize) -> SourcePlan {
    let orders = &plan.sources[0];
    let columns = orders.fields.iter().filter(|field| ["amount", "paid"].contains(&&*field.name)).cloned().collect();
    SourcePlan {
        key_fields: orders.key_fields[..keys].to_vec(),
        table: Some(TablePlan { columns, record_time: false, record_key }),
        ..orders.clone()
    }
}

#[test]
fn table_rows() {
    let plan = plan();
    let keys: [&[u8]; 4] = [b"c1", br#"{"customer_id":"c1","branch":3}"#, &[0, 0, 0, 0, 0, 0, 1, 2], &[4, b'c', b'1']];
    let target = Target {
        name: "table-rows",
        shapes: &[Shape::Json, Shape::Bytes, Shape::Json],
        corpus: keys.iter().map(|key| vec![ORDERS[0].into(), key.to_vec(), keys[1].to_vec()]).collect(),
        words: WORDS,
        cases: 15_000,
    };
    let kinds = [(RecordKey::Text, 1), (RecordKey::Json, 2), (RecordKey::Avro, 1), (RecordKey::Avro, 2)];
    let decoders = kinds.map(|(kind, keys)| SourceDecoder::new(0, &table(&plan, kind, keys), None).unwrap());
    let mut long = table(&plan, RecordKey::Long, 1);
    long.key_fields = vec!["branch".into()];
    let long = SourceDecoder::new(0, &long, None).unwrap();
    let decoders: Vec<SourceDecoder> = decoders.into_iter().chain([long]).collect();
    run(&target, decoders, |decoders, parts| {
        let mut records = records("fuzz.orders", &parts[..2]);
        // What is deleted is known by the key alone.
        for key in &parts[1..] {
            records.push(records.offsets.len() as i64, 1_700_000_000_000, Some(key), None);
        }
        decoders.iter_mut().for_each(|decoder| decode(decoder, &records));
    });
}

#[test]
fn events_keyed_anew() {
    let mut plan = plan();
    let from = plan.sources[0].clone();
    plan.sources[0].rekeyed = Some(Arc::new(RekeyPlan { from, partitions: None, retention: None }));
    plan.score.as_mut().unwrap().emit = Emit::EventTime;
    let mark = r#"{"partitions":3,"at":[[0,1700000000000,false],[1,null,true],[2,1700000000999,false]]}"#;
    let target = Target {
        name: "events-keyed-anew",
        shapes: &[Shape::Json, Shape::Json, Shape::Text],
        corpus: ORDERS
            .iter()
            .map(|o| vec![o.as_bytes().to_vec(), mark.into(), b"fuzz.orders\n2\n41".to_vec()])
            .collect(),
        words: &["partitions", "at", "1700000000000", "18446744073709551615", "-9223372036854775808"],
        cases: 10_000,
    };
    let engine = Engine::new(&plan).unwrap();
    let decoder = SourceDecoder::new(0, &plan.sources[0], None).unwrap();
    run(&target, decoder, |decoder, parts| {
        let header = |name: &str, value: &[u8]| Header { name: name.into(), value: value.to_vec() };
        let mut origin = parts[2].split(|byte| *byte == b'\n');
        let names = [headers::TOPIC, headers::PARTITION, headers::OFFSET];
        let origin = names.map(|name| header(name, origin.next().unwrap_or_default())).to_vec();
        let mark = vec![header(headers::MARK, &parts[1])];
        let mut records = Records::new(TopicPartition::new("fuzz.orders.by-branch", 0));
        for (value, headers) in
            [(Some(ORDERS[0].as_bytes()), &origin), (Some(&parts[0]), &origin), (None, &mark), (None, &origin)]
        {
            records.headers.push((records.len(), headers.clone()));
            records.push(records.len() as i64, 1_700_000_000_000, Some(b"3"), value);
        }
        let (events, rekeyed) = unpack(&records);
        assert!(events.len() == 4 || events.len() == 3, "a record is an event or a mark");
        assert_eq!(rekeyed.origins.len(), events.len());
        decode(decoder, &events);
        let mut batch = decoder.decode(&events).unwrap().batch;
        batch.next = 4;
        batch.rekeyed = Some(of_rows(&rekeyed, &events, &batch.offsets));
        let rows = batch.offsets.len();
        let mut task = Task::new(Arc::clone(&engine), 0);
        let late = task.offer(batch).unwrap().len();
        task.end();
        let applied = task.advance(&TaskClock { caught_up: &[true; 2], idle: &[false; 2] }, usize::MAX).unwrap();
        assert_eq!(applied.counts[0].applied as usize + late, rows, "an event is lost");
    });
}
