//! Files: those that driftline writes and reads back, and those that are replayed into topics.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, RecordBatch, TimestampMillisecondArray, UInt64Array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Schema, TimeUnit, TimestampMillisecondType, UInt64Type};
use driftline::broker::{NextOffset, Records, TopicPartition};
use driftline::config::plan::Plan;
use driftline::source::SourceDecoder;
use driftline::source::replay::{Converter, FileFormat, Next, ReplayFile};
use driftline::store::{Checkpoint, Manifest, OfflineStore};
use driftline::window::{Engine, Task, TaskClock, WindowError};

use super::harness::Target;
use super::mutate::Shape;
use super::plan;

const CLOCK: TaskClock<'_> = TaskClock { caught_up: &[true, true], idle: &[false, false] };

/// Orders with offsets from `first` on, applied to a task. Gives what the task had to say.
pub(super) fn apply(plan: &Plan, task: &mut Task, first: i64) -> Result<Vec<RecordBatch>, WindowError> {
    let mut records = Records::new(TopicPartition::new(&*plan.sources[0].topic, 0));
    for n in 0..30 {
        let (offset, time) = (first + n, 1_700_000_000_000 + (first + n) * 600_000);
        let value = format!(
            r#"{{"customer_id":"c{}","branch":1,"at":{time},"amount":{n}.5,"paid":true,"due":{time},"basket":{{"size":2}}}}"#,
            n % 3
        );
        records.push(offset, time, None, Some(value.as_bytes()));
    }
    let mut decoder = SourceDecoder::new(0, &plan.sources[0], None).unwrap();
    task.offer(decoder.decode(&records).unwrap().batch)?;
    let mut rows = Vec::new();
    loop {
        let applied = task.advance(&CLOCK, 1000)?;
        rows.push(applied.rows.batch);
        if !applied.more {
            return Ok(rows);
        }
    }
}

/// A partition's first checkpoint on disk, as the feature stage writes it.
struct Stored {
    plan: Plan,
    engine: Arc<Engine>,
    store: OfflineStore,
    manifest: Manifest,
    state: Vec<RecordBatch>,
    folder: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Stored {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut plan = plan();
        plan.offline.url = format!("file://{}", folder.path().display());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let engine = Engine::new(&plan).unwrap();
        let mut task = Task::new(engine.clone(), 0);
        let rows = apply(&plan, &mut task, 0).unwrap();
        assert_eq!(rows.iter().map(RecordBatch::num_rows).sum::<usize>(), 30, "each order gives a row");
        let state = task.snapshot().unwrap();
        let store = OfflineStore::open(&plan, runtime.handle().clone()).unwrap();
        let next = [(TopicPartition::new(&*plan.sources[0].topic, 0), NextOffset(30))].into();
        let checkpoint = Checkpoint {
            partition: 0,
            next,
            parts: Vec::new(),
            state: state.clone(),
            follows: false,
            rows,
            windows: Vec::new(),
            previous: None,
        };
        let manifest = store.commit(&checkpoint).unwrap();
        Self { plan, engine, store, manifest, state, folder, _runtime: runtime }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(&self.plan.name).join(path)
    }

    /// Goes on from a state as a worker does that has taken up the partition.
    fn go_on(&self, state: &[RecordBatch]) {
        if let Ok(mut task) = Task::restore(self.engine.clone(), 0, state) {
            let first = task.next()[0].map_or(0, |next| next.0);
            if (0..1 << 40).contains(&first) {
                let _ = apply(&self.plan, &mut task, first);
            }
            let _ = task.snapshot();
        }
    }
}

#[test]
fn manifests() {
    let stored = Stored::new();
    let path = stored.path("manifest/partition=0/00000000000000000001.json");
    let good = std::fs::read(&path).expect("the manifest lies there");
    let target = Target {
        name: "manifests",
        shapes: &[Shape::Json],
        corpus: vec![vec![good]],
        words: &["format", "next", "state", "files", "offset", "../../../etc/passwd", "state/partition=0/x.arrow"],
        cases: 2_000,
    };
    target.run(|parts| {
        std::fs::write(&path, &parts[0]).unwrap();
        if let Ok(Some(manifest)) = stored.store.latest(0) {
            drop(stored.store.load_state(&manifest));
            if let Ok(rows) = stored.store.read_rows(i64::MIN..i64::MAX, None) {
                rows.take(3).for_each(drop);
            }
        }
        let _ = stored.store.summary();
    });
}

#[test]
fn state_files() {
    let stored = Stored::new();
    let path = stored.path(&stored.manifest.state.as_ref().unwrap().path);
    let target = Target {
        name: "state-files",
        shapes: &[Shape::Bytes],
        corpus: vec![vec![std::fs::read(&path).unwrap()]],
        words: &["ARROW1", "customer_id", "orders:rows"],
        cases: 2_000,
    };
    assert!(Task::restore(stored.engine.clone(), 0, &stored.store.load_state(&stored.manifest).unwrap()).is_ok());
    target.run(|parts| {
        std::fs::write(&path, &parts[0]).unwrap();
        // The manifest of a file that was cut or grew would say so.
        let mut manifest = stored.manifest.clone();
        manifest.state.as_mut().unwrap().bytes = parts[0].len() as u64;
        if let Ok(state) = stored.store.load_state(&manifest) {
            stored.go_on(&state);
        }
    });
}

#[test]
fn feature_files() {
    let stored = Stored::new();
    let path = stored.path(&stored.manifest.files[0].path);
    let manifest = stored.path("manifest/partition=0/00000000000000000001.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let good = std::fs::read(&path).unwrap();
    let bytes = format!("\"bytes\":{}", good.len());
    assert!(text.contains(&bytes));
    let target = Target {
        name: "feature-files",
        shapes: &[Shape::Bytes],
        corpus: vec![vec![good]],
        words: &["ARROW1", "event_time", "source_topic"],
        cases: 1_000,
    };
    target.run(|parts| {
        std::fs::write(&path, &parts[0]).unwrap();
        std::fs::write(&manifest, text.replace(&bytes, &format!("\"bytes\":{}", parts[0].len()))).unwrap();
        let rows =
            stored.store.read_rows(1_700_000_000_000..1_700_003_600_000, None).expect("the manifest is a good one");
        let _ = rows.take(3).collect::<Result<Vec<_>, _>>();
    });
}

/// Changes words of a snapshot: each edit is a column, a place in it, and the new word, of two, two and eight bytes.
fn edited(state: &[RecordBatch], edits: &[u8], task: &[u8]) -> Option<Vec<RecordBatch>> {
    let task = String::from_utf8(task.to_vec()).ok()?;
    let edit = |batch: &RecordBatch| -> Option<RecordBatch> {
        let mut columns = batch.columns().to_vec();
        for edit in edits.chunks_exact(12) {
            let number = |at: usize| usize::from(u16::from_le_bytes([edit[at], edit[at + 1]]));
            let value = i64::from_le_bytes(edit[4..].try_into().ok()?);
            let column = number(0) % columns.len();
            columns[column] = with_word(&columns[column], number(2), value)?;
        }
        let mut metadata = batch.schema().metadata().clone();
        metadata.insert("driftline.task".into(), task.clone());
        let fields = batch.schema().fields().clone();
        RecordBatch::try_new(Arc::new(Schema::new_with_metadata(fields, metadata)), columns).ok()
    };
    state.iter().map(edit).collect()
}

/// The column with one word changed, or, for odd places of a list, with lists that end elsewhere.
fn with_word(column: &ArrayRef, place: usize, value: i64) -> Option<ArrayRef> {
    Some(match column.data_type() {
        DataType::Timestamp(TimeUnit::Millisecond, _) if !column.is_empty() => {
            let mut values: Vec<Option<i64>> = column.as_primitive::<TimestampMillisecondType>().iter().collect();
            let at = place % values.len();
            values[at] = Some(value);
            Arc::new(TimestampMillisecondArray::from(values).with_timezone("UTC"))
        }
        DataType::List(field) if field.data_type() == &DataType::UInt64 => {
            let list = column.as_list::<i32>();
            let mut words = list.values().as_primitive::<UInt64Type>().values().to_vec();
            let mut lengths: Vec<usize> = list.offsets().lengths().collect();
            if words.is_empty() {
                return Some(column.clone());
            }
            let at = place / 2 % words.len();
            if place.is_multiple_of(2) {
                words[at] = value.cast_unsigned();
            } else {
                let longest = lengths.iter().position(|length| *length > 0)?;
                lengths[longest] -= 1;
                words.pop();
            }
            let lengths = OffsetBuffer::from_lengths(lengths);
            Arc::new(ListArray::new(field.clone(), lengths, Arc::new(UInt64Array::from(words)), None))
        }
        _ => column.clone(),
    })
}

#[test]
fn snapshots() {
    let stored = Stored::new();
    let schema = stored.state[0].schema();
    let task = schema.metadata()["driftline.task"].as_bytes().to_vec();
    let edit = |column: u16, place: u16, value: i64| {
        [&column.to_le_bytes()[..], &place.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let mut corpus = vec![vec![Vec::new(), task.clone()]];
    for column in 0..u16::try_from(names.len()).unwrap() {
        for (place, value) in [(0, -1), (4, 1), (9, i64::MAX), (40, 1_700_000_000_000)] {
            corpus.push(vec![edit(column, place, value), task.clone()]);
        }
    }
    assert!(Task::restore(stored.engine.clone(), 0, &edited(&stored.state, &[], &task).unwrap()).is_ok());
    let shapes = [Shape::Bytes, Shape::Json];
    let target = Target { name: "snapshots", shapes: &shapes, corpus, words: &names, cases: 5_000 };
    target.run(|parts| {
        if let Some(state) = edited(&stored.state, &parts[0], &parts[1]) {
            stored.go_on(&state);
        }
    });
}

/// Rows of orders as a batch, for files with columns.
fn columns() -> RecordBatch {
    let lines = ORDERS.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()).collect::<Vec<_>>();
    let text = |name: &str| lines.iter().map(|l| l[name].as_str().map(str::to_owned)).collect::<Vec<_>>();
    let whole = |name: &str| lines.iter().map(|l| l[name].as_i64()).collect::<Vec<_>>();
    let columns: [(&str, ArrayRef); 5] = [
        ("customer_id", Arc::new(arrow::array::StringArray::from(text("customer_id")))),
        ("branch", Arc::new(arrow::array::Int64Array::from(whole("branch")))),
        ("at", Arc::new(TimestampMillisecondArray::from(whole("at")))),
        ("amount", Arc::new(lines.iter().map(|l| l["amount"].as_f64()).collect::<arrow::array::Float64Array>())),
        ("paid", Arc::new(lines.iter().map(|l| l["paid"].as_bool()).collect::<arrow::array::BooleanArray>())),
    ];
    RecordBatch::try_from_iter(columns).unwrap()
}

const ORDERS: &str = r#"{"customer_id":"c1","branch":1,"at":1700000000000,"amount":1.5,"paid":true,"due":"2024-01-01","basket.size":3}
{"customer_id":"é","branch":-2,"at":1700000000001,"amount":null,"paid":false,"due":null,"basket.size":null}
{"customer_id":"c3","branch":3,"at":1700000000002,"amount":2e10,"paid":null,"due":1700000000000,"basket.size":0}
"#;

/// Reads every row and makes a record of it, as `driftline replay` does.
fn replay(plan: &Plan, path: &Path, format: FileFormat) -> usize {
    let Ok(file) = ReplayFile::open(path, Some(format)) else { return 0 };
    let mut converters: Vec<Converter> =
        plan.sources.iter().map(|source| Converter::new(source, None, BTreeMap::new()).unwrap()).collect();
    let _ = file.columns();
    let mut records = 0;
    for next in file.take(10_000) {
        if let Ok(Next::Row(row)) = next {
            for converter in &mut converters {
                records += usize::from(converter.convert(row.clone()).is_ok());
            }
        }
    }
    records
}

fn replays(name: &str, format: FileFormat, shape: Shape, files: Vec<Vec<u8>>, cases: u64) {
    let plan = plan();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for file in &files {
        std::fs::write(&path, file).unwrap();
        assert_eq!(replay(&plan, &path, format), 3, "{name}: each row of the corpus becomes a record");
    }
    let target = Target {
        name,
        shapes: &[shape],
        corpus: files.into_iter().map(|file| vec![file]).collect(),
        words: &["customer_id", "branch", "at", "amount", "paid", "due", "basket.size", "PAR1", "ARROW1", "Obj\x01"],
        cases,
    };
    target.run(|parts| {
        std::fs::write(&path, &parts[0]).unwrap();
        replay(&plan, &path, format);
    });
}

#[test]
fn replayed_json_lines() {
    replays("replay-jsonl", FileFormat::JsonLines, Shape::Text, vec![ORDERS.into()], 3_000);
}

#[test]
fn replayed_csv() {
    let plain = "customer_id,branch,at,amount,paid\nc1,1,1700000000000,1.5,true\n\"é,\"\"\n\",-2,1700000000001,,false\nc3,3,1700000000002,2e10,\n";
    let semicolons = plain.replace("é,", "é").replace(',', ";");
    replays("replay-csv", FileFormat::Csv, Shape::Text, vec![plain.into(), semicolons.into()], 3_000);
}

#[test]
fn replayed_parquet() {
    use parquet::arrow::ArrowWriter;
    use parquet::basic::{Compression, ZstdLevel};
    use parquet::file::properties::WriterProperties;
    let rows = columns();
    let file = |compression: Compression| {
        let properties = WriterProperties::builder().set_compression(compression).build();
        let mut writer = ArrowWriter::try_new(Vec::new(), rows.schema(), Some(properties)).unwrap();
        writer.write(&rows).unwrap();
        writer.into_inner().unwrap()
    };
    let files = [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default())].map(file);
    replays("replay-parquet", FileFormat::Parquet, Shape::Bytes, files.into(), 2_000);
}

#[test]
fn replayed_arrow() {
    let rows = columns();
    let mut writer = arrow::ipc::writer::FileWriter::try_new(Vec::new(), &rows.schema()).unwrap();
    writer.write(&rows).unwrap();
    let file = writer.into_inner().unwrap();
    replays("replay-arrow", FileFormat::Arrow, Shape::Bytes, vec![file], 2_000);
}
