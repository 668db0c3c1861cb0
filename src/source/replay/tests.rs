use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Date32Array, Float64Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{Float64Type, Int64Type};
use rstest::rstest;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::broker::embedded::EmbeddedBroker;
use crate::broker::{NextOffset, Records, TopicPartition};
use crate::config::plan::{DataType, Format, TimeUnit};
use crate::source::{SourceDecoder, sample};

const SCHEMA: &str = r#"{"type": "record", "name": "Purchase", "fields": [
    {"name": "customer_id", "type": "string"},
    {"name": "purchased_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
    {"name": "quantity", "type": "long"},
    {"name": "amount", "type": ["null", "double"], "default": null}
]}"#;

fn plan(format: Format, event_time_unit: TimeUnit) -> SourcePlan {
    let fields = [
        ("customer_id", DataType::String),
        ("purchased_at", DataType::Timestamp),
        ("quantity", DataType::Int64),
        ("amount", DataType::Float64),
    ];
    SourcePlan { event_time_unit, ..sample::purchases("churn.purchases", format, &fields) }
}

fn avro_plan() -> SourcePlan {
    plan(Format::Avro { schema: SCHEMA.into() }, TimeUnit::Ms)
}

struct World {
    folder: TempDir,
    broker: EmbeddedBroker,
    stop: Stop,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let broker = EmbeddedBroker::open(folder.path()).unwrap();
        Self { folder, broker, stop: Stop::new() }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn replay(&self, plan: &SourcePlan, path: &Path, options: &ReplayOptions) -> Result<Report, ReplayError> {
        run(&self.broker, plan, None, path, options, &self.stop, |_| {})
    }

    /// All records of the topic's only partition.
    fn records(&self, plan: &SourcePlan) -> Records {
        let partition = TopicPartition::new(plan.topic.clone(), 0);
        self.broker.read(&partition, NextOffset(0), 1_000_000, Duration::from_secs(5)).unwrap().0
    }

    /// Key, event time, quantity, amount of each event, as the pipeline reads them.
    fn events(&self, plan: &SourcePlan) -> Vec<(String, i64, Option<i64>, Option<f64>)> {
        let records = self.records(plan);
        let decoded = SourceDecoder::new(0, plan, None).unwrap().decode(&records).unwrap();
        assert!(decoded.dead.is_empty(), "{}", decoded.dead[0].error);
        let batch = &decoded.batch;
        let keys = batch.columns.column(0).as_string::<i32>();
        let quantities = batch.columns.column(2).as_primitive::<Int64Type>();
        let amounts = batch.columns.column(3).as_primitive::<Float64Type>();
        (0..keys.len())
            .map(|row| {
                assert_eq!(records.keys.get(row), Some(keys.value(row).as_bytes()));
                let quantity = quantities.iter().nth(row).flatten();
                (keys.value(row).to_owned(), batch.event_times[row], quantity, amounts.iter().nth(row).flatten())
            })
            .collect()
    }
}

fn one_partition() -> ReplayOptions {
    let settings = TopicSettings { partitions: 1, compacted: false, retention_ms: None };
    ReplayOptions { create_topic: Some(settings), ..ReplayOptions::default() }
}

fn mapped(pairs: &[(&str, &str)]) -> ReplayOptions {
    let map = pairs.iter().map(|(field, column)| ((*field).to_owned(), (*column).to_owned())).collect();
    ReplayOptions { map, ..one_partition() }
}

const DAY: i64 = 852_076_800_000;

fn expected() -> Vec<(String, i64, Option<i64>, Option<f64>)> {
    vec![("00001".into(), DAY, Some(1), Some(11.77)), ("00004".into(), DAY + 86_400_000, Some(2), None)]
}

const CSV: &str = "customer_id,date,quantity,amount\n00001,1997-01-01,1,11.77\n00004,1997-01-02,2,\n";

#[rstest]
#[case::avro(avro_plan())]
#[case::plain_avro(plan(Format::Avro { schema: SCHEMA.replace(r#"{"type": "long", "logicalType": "timestamp-millis"}"#, r#""long""#) }, TimeUnit::S))]
#[case::micros(plan(Format::Avro { schema: SCHEMA.replace("millis", "micros") }, TimeUnit::Ms))]
#[case::text(plan(Format::Avro { schema: SCHEMA.replace(r#"{"type": "long", "logicalType": "timestamp-millis"}"#, r#""string""#) }, TimeUnit::Iso))]
#[case::json(plan(Format::Json, TimeUnit::Ms))]
#[case::json_seconds(plan(Format::Json, TimeUnit::S))]
#[case::json_text(plan(Format::Json, TimeUnit::Iso))]
fn replays_csv(#[case] plan: SourcePlan) {
    let world = World::new();
    let path = world.file("p.csv", CSV);
    let report = world.replay(&plan, &path, &mapped(&[("purchased_at", "date")])).unwrap();
    assert_eq!((report.rows, report.sent, report.bad), (2, 2, 0));
    assert_eq!(report.event_times, Some((DAY, DAY + 86_400_000)));
    assert_eq!(world.events(&plan), expected());
}

#[rstest]
#[case::bom("\u{feff}customer_id,date,quantity,amount\r\n00001,1997-01-01,1,11.77\r\n00004,1997-01-02,2,\r\n", "p.csv")]
#[case::semicolons("customer_id;date;quantity;amount\n00001;1997-01-01;1;11.77\n00004;1997-01-02;2;\n", "p.csv")]
#[case::tabs("customer_id\tdate\tquantity\tamount\n00001\t1997-01-01\t1\t11.77\n00004\t1997-01-02\t2\t\n", "p.tsv")]
#[case::quotes(
    "\"amount\",\"date\",more,\"customer_id\",\"quantity\"\n\"11.77\",\"1997-01-01\",\"a\n,b\",\"00001\",1.0\n,1997-01-02,,00004,2",
    "p.csv"
)]
#[case::other_texts(
    "customer_id,date,quantity,amount\n00001,1997-01-01T00:00:00Z,1,1177e-2\n00004,852163200000,2,NaN\n",
    "p.csv"
)]
fn reads_dialects_of_csv(#[case] content: &str, #[case] name: &str) {
    let world = World::new();
    let plan = avro_plan();
    let path = world.file(name, content);
    world.replay(&plan, &path, &mapped(&[("purchased_at", "date")])).unwrap();
    assert_eq!(world.events(&plan), expected());
}

#[test]
fn replays_json_lines() {
    let world = World::new();
    let lines = concat!(
        "{\"customer_id\": \"00001\", \"purchased_at\": 852076800000, \"quantity\": 1, \"amount\": 11.77, \"more\": {\"x\": [1]}}\n",
        "\n",
        "  {\"customer_id\": \"00004\", \"purchased_at\": \"1997-01-02\", \"quantity\": 2.0, \"amount\": null}"
    );
    let path = world.file("p.jsonl", lines);
    for plan in [avro_plan(), SourcePlan { topic: "other".into(), ..plan(Format::Json, TimeUnit::Ms) }] {
        assert_eq!(world.replay(&plan, &path, &one_partition()).unwrap().sent, 2);
        assert_eq!(world.events(&plan), expected());
        if matches!(plan.format, Format::Json) {
            let records = world.records(&plan);
            let first: Value = serde_json::from_slice(records.values.get(0).unwrap()).unwrap();
            assert_eq!(first["more"], json!({"x": [1]}), "what the plan does not use is carried too");
        }
    }
}

fn table() -> RecordBatch {
    let micros = TimestampMicrosecondArray::from(vec![DAY * 1_000, (DAY + 86_400_000) * 1_000]);
    RecordBatch::try_from_iter([
        ("customer_id", Arc::new(StringArray::from(vec!["00001", "00004"])) as ArrayRef),
        ("purchased_at", Arc::new(micros.with_timezone("UTC"))),
        ("quantity", Arc::new(Int64Array::from(vec![1, 2]))),
        ("amount", Arc::new(Float64Array::from(vec![Some(11.77), None]))),
    ])
    .unwrap()
}

#[rstest]
#[case("p.parquet")]
#[case("p.arrow")]
#[case("p.avro")]
fn replays_columnar_files(#[case] name: &str) {
    let world = World::new();
    let path = world.folder.path().join(name);
    let table = table();
    let file = fs::File::create(&path).unwrap();
    match name {
        "p.parquet" => {
            let mut writer = parquet::arrow::ArrowWriter::try_new(file, table.schema(), None).unwrap();
            writer.write(&table).unwrap();
            writer.close().unwrap();
        }
        "p.arrow" => {
            let mut writer = arrow::ipc::writer::FileWriter::try_new(file, &table.schema()).unwrap();
            writer.write(&table).unwrap();
            writer.finish().unwrap();
        }
        _ => {
            use apache_avro::types::Value as Avro;
            let schema = apache_avro::Schema::parse_str(SCHEMA).unwrap();
            let mut writer = apache_avro::Writer::new(&schema, file);
            for (id, at, quantity, amount) in expected() {
                let amount =
                    amount.map_or(Avro::Union(0, Box::new(Avro::Null)), |a| Avro::Union(1, Box::new(Avro::Double(a))));
                let fields = vec![
                    ("customer_id".to_owned(), Avro::String(id)),
                    ("purchased_at".to_owned(), Avro::TimestampMillis(at)),
                    ("quantity".to_owned(), Avro::Long(quantity.unwrap())),
                    ("amount".to_owned(), amount),
                ];
                writer.append(Avro::Record(fields)).unwrap();
            }
            writer.flush().unwrap();
        }
    }
    for plan in [avro_plan(), SourcePlan { topic: "json".into(), ..plan(Format::Json, TimeUnit::Iso) }] {
        assert_eq!(world.replay(&plan, &path, &one_partition()).unwrap().sent, 2);
        assert_eq!(world.events(&plan), expected());
    }
}

#[test]
fn reads_dates_of_columnar_files() {
    let world = World::new();
    let path = world.folder.path().join("p.arrow");
    let table = RecordBatch::try_from_iter([
        ("customer_id", Arc::new(StringArray::from(vec!["00001"])) as ArrayRef),
        ("purchased_at", Arc::new(Date32Array::from(vec![9_862]))),
        ("quantity", Arc::new(Int64Array::from(vec![1]))),
    ])
    .unwrap();
    let mut writer =
        arrow::ipc::writer::FileWriter::try_new(fs::File::create(&path).unwrap(), &table.schema()).unwrap();
    writer.write(&table).unwrap();
    writer.finish().unwrap();
    world.replay(&avro_plan(), &path, &one_partition()).unwrap();
    assert_eq!(world.events(&avro_plan()), [("00001".to_owned(), DAY, Some(1), None)]);
}

#[test]
fn counts_bad_rows_and_goes_on() {
    let world = World::new();
    let plan = avro_plan();
    let lines = [
        "customer_id,purchased_at,quantity,amount",
        "00001,1997-01-01,1,11.77",
        "00002,1997-01-01,1",
        "00002,1997-01-01,one,1",
        "00002,1997-01-01,1.5,1",
        "00002,yesterday,1,1",
        "00002,,1,1",
        ",1997-01-01,1,1",
        "00002,1997-01-01,1,much",
        "00002,1997-01-01,,1",
        "00004,1997-01-02,2,",
    ];
    let mut content = lines.join("\n").into_bytes();
    content.extend(b"\n\xff,1997-01-01,1,1\n00009,1997-01-03,1,1\n");
    let path = world.file("p.csv", content);
    let report = world.replay(&plan, &path, &one_partition()).unwrap();
    assert_eq!((report.rows, report.sent, report.bad), (12, 3, 9));
    assert_eq!(world.events(&plan)[..2], expected());
    let wanted = [
        "line 3: 3 values, but the header has 4",
        "line 4: field 'quantity': expected a whole number, found text \"one\"",
        "line 5: field 'quantity': expected a whole number, found text \"1.5\"",
        "line 6: field 'purchased_at': expected an instant",
        "line 7: field 'purchased_at': expected timestamp, found null",
        "line 8: field 'customer_id': expected string, found null",
        "line 9: field 'amount': expected a number, found text \"much\"",
        "line 10: field 'quantity': expected long, found null",
        "line 12: value 1 is not UTF-8",
    ];
    for (error, wanted) in report.errors.iter().zip(wanted) {
        assert!(error.starts_with(wanted), "{error} is not {wanted}");
    }
    assert_eq!(report.errors.len(), wanted.len());

    let strict = ReplayOptions { strict: true, ..one_partition() };
    let error = world.replay(&plan, &path, &strict).unwrap_err().to_string();
    assert!(error.contains("p.csv: line 3: 3 values"), "{error}");
}

#[test]
fn counts_bad_json_lines() {
    let world = World::new();
    let plan = plan(Format::Json, TimeUnit::Ms);
    let lines = [
        "[{\"customer_id\": \"00001\"}]",
        "{\"customer_id\": \"00001\"",
        "17",
        "{\"customer_id\": \"00001\", \"purchased_at\": 852076800000, \"quantity\": true}",
        "{\"customer_id\": \"00001\", \"purchased_at\": null}",
        "{\"customer_id\": \"00001\", \"purchased_at\": 852076800000}",
    ];
    let path = world.file("p.ndjson", lines.join("\n"));
    let report = world.replay(&plan, &path, &one_partition()).unwrap();
    assert_eq!((report.sent, report.bad), (1, 5));
    let wanted = ["jq -c", "not JSON", "found 17", "expected int64, found true", "null or missing"];
    for ((error, wanted), line) in report.errors.iter().zip(wanted).zip(1..) {
        assert!(error.starts_with(&format!("line {line}: ")) && error.contains(wanted), "{error}");
    }
}

#[rstest]
#[case("p.xyz", "", &[], "its name does not tell its format")]
#[case("p.csv", "", &[], "it has no header row")]
#[case("p.csv", "a,b,a\n", &[], "names column 'a' twice")]
#[case("p.parquet", "not parquet", &[], "not a Parquet file")]
#[case("p.avro", "not avro", &[], "not an Avro container file")]
#[case("p.arrow", "not arrow at all", &[], "not an Arrow IPC file")]
#[case("p.csv", CSV, &[("at", "date")], "no field 'at' that a column could be mapped to")]
fn says_why_a_file_cannot_be_replayed(
    #[case] name: &str,
    #[case] content: &str,
    #[case] map: &[(&str, &str)],
    #[case] expected: &str,
) {
    let world = World::new();
    let path = world.file(name, content);
    let error = world.replay(&avro_plan(), &path, &mapped(map)).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn a_missing_column_is_named() {
    let world = World::new();
    let path = world.file("p.csv", CSV);
    let report = world.replay(&avro_plan(), &path, &mapped(&[("purchased_at", "day")])).unwrap();
    assert_eq!((report.sent, report.bad), (0, 2));
    assert!(
        report.errors[0].contains("there is no column 'day'") && report.errors[0].contains("customer_id, date"),
        "{}",
        report.errors[0]
    );
}

#[test]
fn a_missing_topic_is_not_made_unasked() {
    let world = World::new();
    let path = world.file("p.csv", CSV);
    let error = world.replay(&avro_plan(), &path, &ReplayOptions::default()).unwrap_err();
    assert!(matches!(error, ReplayError::Broker(BrokerError::NoSuchTopic { .. })), "{error}");
}

#[test]
fn keeps_the_pace_and_stops_when_asked() {
    let world = World::new();
    let plan = avro_plan();
    let path = world.file("p.csv", CSV);
    // A day of event time in a tenth of a second.
    let options = ReplayOptions {
        pace: Pace::Times(864_000.0),
        timestamps: Timestamps::Event,
        ..mapped(&[("purchased_at", "date")])
    };
    let began = clock::monotonic();
    world.replay(&plan, &path, &options).unwrap();
    assert!(clock::monotonic() - began >= Duration::from_millis(100));
    assert_eq!(world.records(&plan).timestamps, [DAY, DAY + 86_400_000]);

    let options = ReplayOptions { pace: Pace::Rate(0.001), ..options };
    let stop = world.stop.clone();
    let report = run(&world.broker, &plan, None, &path, &options, &world.stop, |report| {
        if report.sent == 1 {
            stop.request();
        }
    });
    let report = report.unwrap();
    assert_eq!((report.sent, report.stopped), (1, true));
    assert_eq!(world.records(&plan).len(), 3, "what was sent before the wait is in the log");
}

#[test]
fn writes_composite_keys() {
    let mut plan = plan(Format::Json, TimeUnit::Ms);
    plan.key_fields = vec!["quantity".into(), "customer_id".into()];
    let mut converter = Converter::new(&plan, None, BTreeMap::new()).unwrap();
    let Value::Object(values) = json!({"customer_id": "a\"b", "quantity": 7, "purchased_at": DAY}) else { panic!() };
    let record = converter.convert(ReplayRow { number: 1, values }).unwrap();
    assert_eq!(String::from_utf8(record.key).unwrap(), r#"[7,"a\"b"]"#);
}

#[test]
fn maps_nested_fields() {
    let mut plan = plan(Format::Json, TimeUnit::Ms);
    plan.fields[0].name = "who.id".into();
    plan.key_fields = vec!["who.id".into()];
    let map = BTreeMap::from([("who.id".to_owned(), "id".to_owned())]);
    let mut converter = Converter::new(&plan, None, map).unwrap();
    let Value::Object(values) = json!({"id": "7", "who": {"age": "3"}, "purchased_at": DAY}) else { panic!() };
    // The column of the same name comes after the mapped one, and must not undo it.
    let record = converter.convert(ReplayRow { number: 1, values }).unwrap();
    let value: Value = serde_json::from_slice(&record.value).unwrap();
    assert_eq!(value["who"]["id"], "7");
}

/// The real purchases, where they lie in or beside a folder above the crate.
#[test]
fn replays_the_real_purchases() {
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let Some(path) = above.map(|folder| folder.join("shared/data/cdnow_purchases.csv")).find(|path| path.exists())
    else {
        eprintln!("skipped: there is no shared/data/cdnow_purchases.csv in or above {}", env!("CARGO_MANIFEST_DIR"));
        return;
    };
    let world = World::new();
    let plan = avro_plan();
    let report = world.replay(&plan, &path, &mapped(&[("purchased_at", "date")])).unwrap();
    assert_eq!((report.rows, report.sent, report.bad), (69_659, 69_659, 0), "{:?}", report.errors);
    let events = world.events(&plan);
    assert_eq!(events[0], ("00001".into(), DAY, Some(1), Some(11.77)));
    let mut customers: Vec<_> = events.iter().map(|event| &*event.0).collect();
    customers.sort_unstable();
    customers.dedup();
    assert_eq!(customers.len(), 23_570);
    assert!(customers.iter().all(|id| id.len() == 5));
    let content = fs::read_to_string(&path).unwrap();
    for (line, (id, at, quantity, amount)) in content.lines().skip(1).zip(&events) {
        let cells: Vec<_> = line.split(',').collect();
        let day = chrono::NaiveDate::parse_from_str(cells[1], "%Y-%m-%d").unwrap().and_hms_opt(0, 0, 0).unwrap();
        assert_eq!((cells[0], day.and_utc().timestamp_millis()), (&**id, *at));
        assert_eq!((cells[2].parse().ok(), cells[3].parse().ok()), (*quantity, *amount));
    }
}
