//! Records of topics: the sources' and labels', and those that one stage writes for another.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use arrow::array::RecordBatch;
use driftline::broker::{Header, Records, SchemaRegistry, TopicPartition};
use driftline::config::plan::{Format, Plan};
use driftline::drift::DriftEvent;
use driftline::drift::monitor::{Monitor, NoProfile, Profiles};
use driftline::drift::prediction::{PredictionDecoder, PredictionRows};
use driftline::drift::profile::{Profile, ProfileBuilder};
use driftline::retrain::RetrainingEvent;
use driftline::retrain::audit::AuditRecord;
use driftline::score::FeatureReader;
use driftline::source::avro::{AvroEncoder, AvroReader, AvroSchema};
use driftline::source::{LabelDecoder, SourceDecoder, dead_letter};
use driftline::window::Engine;
use serde_json::json;

use crate::protobuf::{self, Oracle};

use super::harness::Target;
use super::mutate::Shape;
use super::{VISIT, plan, schema};

pub(super) const ORDERS: [&str; 5] = [
    r#"{"customer_id":"c1","branch":3,"at":1700000000000,"amount":12.5,"paid":true,"due":"2023-11-15T10:00:00Z","basket":{"size":4,"x":[1,{"y":2}]}}"#,
    r#"{"branch":-1,"customer_id":"","at":1700000000123,"amount":null,"paid":null,"due":1700000000000,"basket":null}"#,
    r#"{"customer_id":"é\u0000\ud83d\ude00","branch":9223372036854775807,"at":1700000000999,"amount":1e300,"more":{"a":"b"}}"#,
    r#"{"customer_id":"c2","branch":0,"at":1700000000001,"amount":NaN,"basket":{"size":2.0}}"#,
    r#"{"customer_id":"c3","customer_id":"c4","branch":1,"at":"1700000000002","amount":"1.5"}"#,
];

pub(super) const WORDS: &[&str] =
    &["customer_id", "branch", "at", "amount", "paid", "due", "basket", "size", "NaN", "basket.size"];

/// One record with this value; with its own timestamp, key and headers where more parts are given.
pub(super) fn records(topic: &str, parts: &[Vec<u8>]) -> Records {
    let mut records = Records::new(TopicPartition::new(topic, 0));
    let part = |n: usize| parts.get(n).map(Vec::as_slice);
    let timestamp = part(1).and_then(|b| b.first_chunk()).map_or(1_700_000_000_000, |b| i64::from_le_bytes(*b));
    records.push(0, -1, None, Some(b"{}"));
    records.push(1, timestamp, part(1), part(0));
    if let Some(text) = part(2) {
        let header = |line: &[u8]| {
            let mut halves = line.splitn(2, |byte| *byte == b'=');
            let name = String::from_utf8_lossy(halves.next().unwrap_or_default()).into_owned();
            Header { name, value: halves.next().unwrap_or_default().to_vec() }
        };
        records.headers.push((1, text.split(|byte| *byte == b'\n').map(header).collect()));
    }
    records.push(2, 0, None, None);
    records
}

/// Decodes records of a source. Each ends as a row, filtered, or as a letter that reads back.
pub(super) fn decode(decoder: &mut SourceDecoder, records: &Records) {
    let decoded = decoder.decode(records).expect("the registry answers");
    let rows = decoded.batch.columns.num_rows();
    assert_eq!(rows + decoded.dead.len() + decoded.batch.filtered as usize, records.len(), "a record is lost");
    assert_eq!((rows, rows), (decoded.batch.offsets.len(), decoded.batch.event_times.len()));
    for letter in &decoded.dead {
        let headers = letter.out_headers();
        let out = letter.to_record("letters", &headers);
        let mut stored = Records::new(TopicPartition::new("letters", 0));
        stored.push(0, 0, out.key, out.value);
        stored.headers.push((0, out.headers.to_vec()));
        let back = dead_letter::read_back(&stored, 0).expect("what is written can be read");
        assert_eq!((&back.partition, back.offset, &back.key), (&letter.partition, letter.offset, &letter.key));
        assert_eq!(back.original_value(), letter.value.as_deref());
    }
}

fn corpus(inputs: &[&str]) -> Vec<Vec<Vec<u8>>> {
    inputs.iter().map(|input| vec![input.as_bytes().to_vec()]).collect()
}

/// Runs a target whose decoder is used again and again, as a stage does.
pub(super) fn run<D>(target: &Target<'_>, decoder: D, decode: impl Fn(&mut D, &[Vec<u8>])) {
    let decoder = Mutex::new(decoder);
    // A decoder that has panicked may be in any state; the test fails anyway.
    target.run(|parts| decode(&mut decoder.lock().unwrap_or_else(std::sync::PoisonError::into_inner), parts));
}

#[test]
fn json_events() {
    let plan = plan();
    let headers = "trace=abc\ndriftline.topic=t\ndriftline.partition=1\ndriftline.replays=2";
    let key = 1_700_000_000_000_i64.to_le_bytes();
    let target = Target {
        name: "json-events",
        shapes: &[Shape::Json, Shape::Bytes, Shape::Text],
        corpus: ORDERS.iter().map(|o| vec![o.as_bytes().to_vec(), key.to_vec(), headers.into()]).collect(),
        words: WORDS,
        cases: 30_000,
    };
    let decoder = SourceDecoder::new(0, &plan.sources[0], None).unwrap();
    run(&target, decoder, |decoder, parts| decode(decoder, &records("fuzz.orders", parts)));
}

#[test]
fn labels() {
    let plan = plan();
    let target = Target {
        name: "labels",
        shapes: &[Shape::Json],
        corpus: corpus(&[
            r#"{"customer_id":"c1","branch":3,"as_of":1700000000000,"churned":true}"#,
            r#"{"customer_id":"c1","branch":3,"as_of":1700000000000,"churned":0.5}"#,
        ]),
        words: &["customer_id", "branch", "as_of", "churned"],
        cases: 10_000,
    };
    let decoder = LabelDecoder::new(plan.labels.as_ref().unwrap(), &plan.entity, None).unwrap();
    run(&target, decoder, |decoder, parts| {
        let decoded = decoder.decode(&records("fuzz.labels", parts)).expect("no registry is asked");
        assert_eq!(decoded.as_of.len() + decoded.dead.len(), 3);
        assert!(decoded.values.iter().all(|value| value.is_finite()));
    });
}

/// Visits in Avro, the second one nested.
fn visits() -> Vec<Vec<u8>> {
    let encoder = AvroEncoder::plain(AvroSchema::parse(&schema()).unwrap());
    let mut visit: serde_json::Value = serde_json::from_str(VISIT).unwrap();
    let mut values = vec![encoder.to_vec(&visit).unwrap()];
    visit["next"] = visit.clone();
    visit["weight"] = json!(null);
    visit["page"] = json!(null);
    values.push(encoder.to_vec(&visit).unwrap());
    values
}

#[test]
fn avro_events() {
    let plan = plan();
    let target = Target {
        name: "avro-events",
        shapes: &[Shape::Bytes],
        corpus: visits().into_iter().map(|visit| vec![visit]).collect(),
        words: &[],
        cases: 30_000,
    };
    let decoder = SourceDecoder::new(1, &plan.sources[1], None).unwrap();
    let reader = AvroReader::new(None, Some(AvroSchema::parse(&schema()).unwrap()));
    run(&target, (decoder, reader), |(decoder, reader), parts| {
        decode(decoder, &records("fuzz.visits", parts));
        if let Some(Ok(value)) = reader.read(&parts[0]) {
            serde_json::to_string(&value).expect("what was read is JSON");
        }
    });
}

#[test]
fn protobuf_events() {
    let oracle = Oracle::run();
    for schema in ["new", "old"] {
        let values: Vec<Vec<u8>> =
            oracle.of(schema).filter(|(_, expected)| !expected.is_null()).map(|(value, _)| value).take(60).collect();
        let framed = values.iter().take(5).map(|value| [&[0, 0, 0, 0, 7, 4, 4, 2], &value[..]].concat());
        let target = Target {
            name: &format!("protobuf-{schema}"),
            shapes: &[Shape::Bytes],
            corpus: values.iter().cloned().chain(framed).map(|value| vec![value]).collect(),
            words: &["\x0b", "\x0c", "\u{7f}"],
            cases: 10_000,
        };
        let decoder = protobuf::decoder(&oracle.message(schema));
        run(&target, decoder, |decoder, parts| decode(decoder, &records("orders", parts)));
    }
}

/// A registry that knows one schema, under any id that it is asked for.
struct Stub {
    answer: Arc<Mutex<String>>,
    url: String,
}

impl Stub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port is free");
        let url = format!("http://{}", listener.local_addr().expect("a bound socket has an address"));
        let answer: Arc<Mutex<String>> = Arc::default();
        let shared = Arc::clone(&answer);
        // Ends with the process: the listener is never closed.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().expect("a socket can be shared"));
                    let mut stream = stream;
                    let mut line = String::new();
                    while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
                        if line.trim().is_empty() {
                            let body = shared.lock().unwrap().clone();
                            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:";
                            if stream.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes()).is_err() {
                                return;
                            }
                        }
                        line.clear();
                    }
                });
            }
        });
        Self { answer, url }
    }
}

#[test]
fn avro_events_of_other_writers() {
    let plan = plan();
    let stub = Stub::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let registry = Arc::new(SchemaRegistry::new(&stub.url, runtime.handle().clone()).unwrap());
    let target = Target {
        name: "avro-writers",
        shapes: &[Shape::Json, Shape::Bytes],
        corpus: visits().into_iter().map(|visit| vec![schema().into_bytes(), visit]).collect(),
        words: AVRO_WORDS,
        cases: 3_000,
    };
    let decoder = SourceDecoder::new(1, &plan.sources[1], Some(registry.clone())).unwrap();
    let reader = AvroReader::new(Some(registry), None);
    // Each case has a schema id of its own, which is asked for once.
    let id = AtomicU32::new(1);
    run(&target, (decoder, reader), |(decoder, reader), parts| {
        let id = id.fetch_add(1, Ordering::Relaxed);
        *stub.answer.lock().unwrap() = json!({"schema": String::from_utf8_lossy(&parts[0])}).to_string();
        let framed = [&[0][..], &id.to_be_bytes(), &parts[1]].concat();
        decode(decoder, &records("fuzz.visits", std::slice::from_ref(&framed)));
        drop(reader.read(&framed));
    });
}

/// Words of Avro schemas.
pub(super) const AVRO_WORDS: &[&str] = &[
    "type",
    "name",
    "namespace",
    "fields",
    "items",
    "values",
    "symbols",
    "size",
    "default",
    "aliases",
    "logicalType",
    "precision",
    "scale",
    "null",
    "boolean",
    "int",
    "long",
    "float",
    "double",
    "bytes",
    "string",
    "record",
    "enum",
    "array",
    "map",
    "fixed",
    "decimal",
    "uuid",
    "date",
    "time-millis",
    "time-micros",
    "timestamp-millis",
    "timestamp-micros",
    "timestamp-nanos",
    "local-timestamp-millis",
    "Visit",
    "fuzz.Visit",
    "fuzz.Kind",
    "error",
];

#[test]
fn feature_rows() {
    let plan = plan();
    let columns = Engine::new(&plan).unwrap().schema().clone();
    let features: serde_json::Map<_, _> =
        plan.feature_columns().iter().map(|column| (column.name.to_string(), json!(null))).collect();
    let row = json!({
        "pipeline": "fuzz", "definition": plan.definition, "entity": {"customer_id": "c1", "branch": 7},
        "event_time": 1_700_000_000_000_i64, "watermark": null,
        "source": {"topic": "fuzz.orders", "partition": 0, "offset": 5}, "features": features,
    });
    let names: Vec<String> = plan.feature_columns().iter().map(|column| column.name.to_string()).collect();
    let mut words: Vec<&str> = names.iter().map(String::as_str).collect();
    words.extend(["pipeline", "definition", "entity", "event_time", "watermark", "source", "topic", "features"]);
    let target = Target {
        name: "feature-rows",
        shapes: &[Shape::Json],
        corpus: vec![vec![row.to_string().into_bytes()]],
        words: &words,
        cases: 20_000,
    };
    let mut reader = FeatureReader::new(&plan, columns);
    let read = reader.read(&records("fuzz.features", &target.corpus[0])).unwrap();
    assert_eq!(read.batch.num_rows(), 1, "the row that is changed is a good one: {:?}", read.dead);
    run(&target, reader, |reader, parts| {
        let read = reader.read(&records("fuzz.features", parts)).expect("the schema is that of the plan");
        assert_eq!(read.batch.num_rows() + read.dead.len(), 3, "a record is lost");
    });
}

/// Predictions as the scoring stage writes them.
fn prediction(number: i64, version: &str) -> String {
    json!({
        "prediction_id": format!("fuzz.orders-0-{number}"), "pipeline": "fuzz", "definition": "d",
        "entity": {"customer_id": "c1", "branch": 7}, "event_time": 1_700_000_000_000_i64 + number, "watermark": null,
        "source": {"topic": "fuzz.orders", "partition": 0, "offset": number}, "model": "m", "model_version": version,
        "variant": "champion", "score": 0.25, "label": 0,
        "features": {"spend_sum_1h": 1.5, "spend_mean_30d": null, "spend_trend": 2},
    })
    .to_string()
}

fn watched(plan: &Plan) -> Vec<String> {
    plan.monitor.as_ref().unwrap().features.clone()
}

#[test]
fn predictions() {
    let features = watched(&plan());
    let target = Target {
        name: "predictions",
        shapes: &[Shape::Json],
        corpus: corpus(&[&prediction(1, "1"), &prediction(2, "é\n")]),
        words: &["event_time", "model_version", "score", "features", "spend_sum_1h", "spend_mean_30d", "spend_trend"],
        cases: 30_000,
    };
    let columns = features.len() + 1;
    let decoder = PredictionDecoder::new(&features);
    run(&target, (decoder, PredictionRows::new(columns)), |(decoder, rows), parts| {
        let before = rows.len();
        let read = decoder.decode(0, 0, &parts[0], rows).is_ok();
        assert_eq!(rows.len(), before + usize::from(read), "a broken record leaves nothing");
        assert!(rows.columns.iter().all(|column| column.len() == rows.len()));
        rows.clear();
    });
}

/// The same profile for every version but one.
struct Known(Arc<Profile>);

impl Profiles for Known {
    fn profile(&self, model_version: &str) -> Result<Arc<Profile>, NoProfile> {
        if model_version == "unknown" { Err(NoProfile::Never("no such version".into())) } else { Ok(self.0.clone()) }
    }
}

#[test]
fn monitor_state() {
    let plan = plan();
    let columns = watched(&plan).len() + 1;
    let mut names = watched(&plan);
    names.push("score".into());
    let mut builder = ProfileBuilder::new(names, 50);
    for n in 0..400 {
        builder.push(n, &vec![(n * 37 % 101) as f64; columns]);
    }
    let profiles = Known(Arc::new(builder.finish()));
    // Two windows and a half, of values that the profile does not have so many of.
    let mut rows = PredictionRows::new(columns);
    for n in 0..250_i64 {
        rows.push(1_700_000_000_000 + n * 1000, 0, n, "1", &vec![(n % 7) as f64 + 90.0; columns]);
    }
    let observe = |monitor: &mut Monitor, rows: &PredictionRows| {
        let mut next = 0;
        while next < rows.len() {
            let observed = monitor.observe(rows, next..rows.len(), &profiles);
            assert!(observed.next > next, "no row is taken");
            next = observed.next;
        }
    };
    let mut monitor = Monitor::new(&plan).unwrap();
    let empty = monitor.snapshot();
    observe(&mut monitor, &rows);
    let target = Target {
        name: "monitor-state",
        shapes: &[Shape::Json],
        corpus: corpus(&[&monitor.snapshot(), &empty]),
        words: &["unknown", "1", "2"],
        cases: 2_000,
    };
    target.run(|parts| {
        let mut monitor = Monitor::new(&plan).unwrap();
        if monitor.restore(&parts[0]).is_ok() {
            observe(&mut monitor, &rows);
            let again = monitor.snapshot();
            monitor.restore(again.as_bytes()).expect("what it writes it can read");
        }
    });
}

#[test]
fn events_of_monitor_and_retrain_worker() {
    let drift = json!({
        "incident_id": "i", "state": "opened", "pipeline": "p", "model": "m", "model_version": "1", "window": 3, "rows": 20,
        "from": 1, "to": 2, "since": 1, "reason": "r", "alpha": 0.05, "tolerance": 0.02, "evidence": {"0": [1, 2]},
        "columns": [{"name": "a", "drifted": true, "psi": 0.1, "ks": 0.1, "ks_p_value": 0.1, "jensen_shannon": 0.1,
            "wasserstein": 0.1, "tolerance": 0.1, "p_value": 0.1, "e_value": 0.1, "missing": [0.0, 0.1],
            "median": [null, 0.5], "since": 1}],
    });
    let retraining = json!({
        "id": "r", "pipeline": "p", "definition": "d", "model": "m", "model_version": "1", "cause": "drift", "policy": "x",
        "incident_id": null, "drifted": ["a"], "since": 1, "train_from": 1, "asked_at": 1,
    });
    serde_json::from_value::<DriftEvent>(drift.clone()).expect("a good one");
    serde_json::from_value::<RetrainingEvent>(retraining.clone()).expect("a good one");
    let target = Target {
        name: "events",
        shapes: &[Shape::Json],
        corpus: corpus(&[&drift.to_string(), &retraining.to_string()]),
        words: &[],
        cases: 5_000,
    };
    target.run(|parts| {
        drop(serde_json::from_slice::<DriftEvent>(&parts[0]));
        drop(serde_json::from_slice::<RetrainingEvent>(&parts[0]));
        drop(serde_json::from_slice::<AuditRecord>(&parts[0]));
    });
}

#[test]
fn dead_letters() {
    let headers = "driftline.topic=t\ndriftline.partition=1\ndriftline.offset=7\ndriftline.timestamp=-1\n\
                   driftline.stage=decode\ndriftline.reason=malformed\ndriftline.error=é\ndriftline.replays=2\nown=x";
    let target = Target {
        name: "dead-letters",
        shapes: &[Shape::Bytes, Shape::Bytes, Shape::Text],
        corpus: vec![vec![b"value".to_vec(), vec![0; 8], headers.into()]],
        words: &["driftline.topic", "driftline.offset", "driftline.replays", "null_value"],
        cases: 20_000,
    };
    let good = dead_letter::read_back(&records("letters", &target.corpus[0]), 1).expect("a good one");
    assert_eq!((good.replays, good.headers.len()), (2, 1));
    target.run(|parts| {
        let records = records("letters", parts);
        for row in 0..records.len() {
            if let Some(letter) = dead_letter::read_back(&records, row) {
                assert!(
                    !letter.identity().is_empty()
                        && letter.value.len() >= letter.original_value().map_or(0, <[u8]>::len)
                );
            }
        }
    });
}

/// A pipeline's rows are not needed here, only that a source with Avro and one with JSON are what the names say.
#[test]
fn the_pipeline_is_what_the_targets_need() {
    let plan = plan();
    assert!(matches!(plan.sources[0].format, Format::Json) && matches!(plan.sources[1].format, Format::Avro { .. }));
    let decoded = |source: usize, value: &[u8]| -> RecordBatch {
        let records = records(&plan.sources[source].topic, &[value.to_vec()]);
        SourceDecoder::new(source, &plan.sources[source], None).unwrap().decode(&records).unwrap().batch.columns
    };
    assert_eq!(decoded(0, ORDERS[0].as_bytes()).num_rows(), 1);
    assert!(visits().iter().all(|visit| decoded(1, visit).num_rows() == 1));
}
