//! What driftline keeps for itself: the embedded log, the online stores, records of versions, states outside of memory, and the
//! marks of topics that are keyed anew.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use driftline::broker::embedded::{EmbeddedBroker, database};
use driftline::broker::{Broker as _, NextOffset, Offsets, OutRecord, Records, TopicPartition, TopicSettings};
use driftline::config::plan::{DataType, Element, Emit, OnlinePlan, RekeyPlan};
use driftline::source::rekeyed::{self, MarkRecord};
use driftline::source::{SourceBatch, SourceDecoder};
use driftline::store::feast::{self, Layout};
use driftline::store::{Definition, OfflineStore, Value, Versions, open_online};
use driftline::window::{ColdStore, Engine, Task, TaskClock, WindowError};
use redb::{Durability, ReadableDatabase as _, TableDefinition};

use super::files::apply;
use super::harness::Target;
use super::mutate::Shape;
use super::plan;

/// Topic number, partition, base offset → batch: as the log keeps them.
const BATCHES: TableDefinition<(u32, u32, i64), &[u8]> = TableDefinition::new("batches");

#[test]
fn batches_of_the_embedded_log() {
    let folder = tempfile::tempdir().unwrap();
    let broker = EmbeddedBroker::open(folder.path()).unwrap();
    broker.create_topic("t", &TopicSettings { partitions: 1, compacted: true, retention_ms: None }).unwrap();
    let mut producer = broker.producer(None).unwrap();
    // So many that superseded ones are dropped: then there are batches with gaps.
    let headers = [driftline::broker::Header { name: "trace".into(), value: b"1".to_vec() }];
    for number in 0..5_000_u32 {
        let key = format!("k{}", if number % 100 < 90 { number % 7 } else { number });
        let value = (number % 11 != 0).then(|| number.to_be_bytes());
        let headers = if number % 5 == 0 { &headers[..] } else { &[] };
        let (key, value) = (Some(key.as_bytes()), value.as_ref().map(|value| &value[..]));
        producer
            .send(OutRecord { topic: "t", partition: Some(0), key, value, headers, ..OutRecord::default() })
            .unwrap();
        if number % 50 == 0 {
            producer.commit(&Offsets::new(), None).unwrap();
        }
    }
    producer.commit(&Offsets::new(), None).unwrap();
    let file = database(&folder.path().join("log.redb")).unwrap();
    let batches: Vec<((u32, u32, i64), Vec<u8>)> = {
        let table = file.begin_read().unwrap().open_table(BATCHES).unwrap();
        let all = table.range((0, 0, i64::MIN)..=(u32::MAX, u32::MAX, i64::MAX)).unwrap();
        all.map(|batch| batch.map(|(key, batch)| (key.value(), batch.value().to_vec())).unwrap()).collect()
    };
    // The second byte says whether a batch has no gaps.
    let dense = batches.iter().rfind(|(_, batch)| batch[1] == 1).expect("the newest has no gaps");
    let sparse = batches.iter().find(|(_, batch)| batch[1] == 0).expect("an old one has some");
    let at = TopicPartition::new("t", 0);
    let end = broker.topic("t").unwrap().unwrap().partitions[0].1;
    let read = || {
        let (mut next, mut count) = (NextOffset(0), 0);
        while next < end {
            let Ok((records, after)) = broker.read(&at, next, 300, Duration::ZERO) else { return None };
            assert!(after > next, "a reader goes on");
            assert!(records.offsets.is_sorted_by(|a, b| a < b) && records.offsets.iter().all(|at| *at >= next.0));
            (next, count) = (after, count + records.len());
        }
        Some(count)
    };
    let whole = read().expect("all is well");
    assert!(whole > 100, "{whole} records");
    let target = Target {
        name: "log-batches",
        shapes: &[Shape::Bytes],
        corpus: vec![vec![dense.1.clone()], vec![sparse.1.clone()]],
        words: &["trace"],
        cases: 2_000,
    };
    target.run(|parts| {
        for (key, batch) in [dense, sparse] {
            let put = |bytes: &[u8]| {
                let mut transaction = file.begin_write().unwrap();
                transaction.set_durability(Durability::None).unwrap();
                transaction.open_table(BATCHES).unwrap().insert(key, bytes).unwrap();
                transaction.commit().unwrap();
            };
            put(&parts[0]);
            let _ = read();
            put(batch);
        }
    });
    assert_eq!(read(), Some(whole));
}

#[test]
fn values_of_the_online_store() {
    let plan = plan();
    let layout = Layout::new(&plan, "fuzz");
    // Messages of Feast's ValueProto: null, -3, 2.5, true, "é", an instant, and lists of integers, doubles and texts.
    let values = [
        vec![],
        vec![0x20, 0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
        [&[0x29][..], &2.5_f64.to_le_bytes()].concat(),
        vec![0x38, 0x01],
        vec![0x12, 0x02, 0xc3, 0xa9],
        vec![0x40, 0x80, 0xe2, 0xcf, 0xaa, 0x06],
        vec![0x72, 0x04, 0x0a, 0x02, 0x01, 0x02],
        [&[0x7a, 0x0a, 0x0a, 0x08][..], &2.5_f64.to_le_bytes()].concat(),
        vec![0x62, 0x07, 0x0a, 0x02, 0xc3, 0xa9, 0x0a, 0x01, 0x61],
    ];
    let (mut time, mut version) = (Vec::new(), Vec::new());
    feast::put_timestamp(1_700_000_000_123, &mut time);
    feast::put_version(1_700_000_000_123, 77, &mut version);
    feast::put_epoch(3, &mut version);
    let corpus = values.iter().map(|value| vec![value.clone(), time.clone(), version.clone()]).collect();
    let shapes = [Shape::Bytes, Shape::Bytes, Shape::Bytes];
    let target = Target { name: "online-values", shapes: &shapes, corpus, words: &[], cases: 50_000 };
    target.run(|parts| {
        let all = [DataType::Int64, DataType::Float64, DataType::Boolean, DataType::String, DataType::Timestamp];
        let lists = [Element::Int64, Element::Float64, Element::Boolean, Element::String, Element::Timestamp];
        for data_type in all.into_iter().chain(lists.map(DataType::List)) {
            let _ = feast::value(&parts[0], data_type);
        }
        let _ = (feast::timestamp(&parts[1]), feast::version(&parts[2]));
        let field = |view: usize, field: usize| {
            let stored = if field == 0 { &parts[1] } else { &parts[0] };
            (view + field < 40).then_some(stored.as_slice())
        };
        if let Ok(groups) = layout.decode(field) {
            assert_eq!(groups.len(), layout.views().len());
        }
        let _ = layout.decode_first(|at| field(0, at));
    });
}

#[test]
fn hashes_of_the_embedded_online_store() {
    const HASHES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("hashes.fuzz");
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut plan = plan();
    plan.online = OnlinePlan::Embedded { path: folder.path().to_owned(), project: "fuzz".into() };
    let mut task = Task::new(Engine::new(&plan).unwrap(), 0);
    let rows = apply(&plan, &mut task, 0).unwrap();
    let rows = driftline::window::FeatureRows { sequence: vec![0; rows[0].num_rows()], batch: rows[0].clone() };
    open_online(&plan, runtime.handle().clone()).unwrap().write(&rows, &|| true).unwrap();
    let key = [Value::String("c1".into()), Value::Int64(1)];
    let path = folder.path().join("online.redb");
    let (stored, hash) = {
        let database = redb::Database::open(&path).unwrap();
        let table = database.begin_read().unwrap().open_table(HASHES).unwrap();
        let stored = Layout::new(&plan, "fuzz").key(&key).unwrap();
        let hash = table.get(stored.as_slice()).unwrap().expect("c1 has a row").value().to_vec();
        (stored, hash)
    };
    let read = || open_online(&plan, runtime.handle().clone()).unwrap().read(&key);
    assert!(read().is_ok());
    let target = Target {
        name: "online-hashes",
        shapes: &[Shape::Bytes],
        corpus: vec![vec![hash]],
        words: &["_ts:spend"],
        cases: 300,
    };
    target.run(|parts| {
        let database = redb::Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(HASHES).unwrap().insert(stored.as_slice(), parts[0].as_slice()).unwrap();
        transaction.commit().unwrap();
        drop(database);
        let _ = read();
        // A row over it, whatever is there.
        let _ = open_online(&plan, runtime.handle().clone()).unwrap().write(&rows, &|| true);
    });
}

#[test]
fn records_of_versions() {
    let folder = tempfile::tempdir().unwrap();
    let mut plan = plan();
    plan.offline.url = format!("file://{}", folder.path().display());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let store = OfflineStore::open(&plan, runtime.handle().clone()).unwrap();
    let current = Definition::of(&plan);
    let other = |features: &str| Definition { features: features.into(), windows: String::new() };
    let first = Versions::first(&plan.name, &other("another"), vec!["fuzz.orders".into()], 1);
    let (second, _) = first.bootstrapped(&current, vec!["fuzz.orders".into()], 2).unwrap();
    for record in [&first, &second] {
        assert!(store.record_versions(record).unwrap());
    }
    let (_, path) = versions_files(folder.path()).pop().expect("a record was written");
    let good = std::fs::read(&path).unwrap();
    assert_eq!(store.versions().unwrap(), Some(second));
    let target = Target {
        name: "versions",
        shapes: &[Shape::Json],
        corpus: vec![vec![good]],
        words: &["fuzz", "serving", "versions", &plan.definition, "epoch", "number"],
        cases: 2_000,
    };
    target.run(|parts| {
        // One that was cut off is set aside.
        std::fs::write(&path, &parts[0]).unwrap();
        if let Ok(Some(versions)) = store.versions() {
            let _ = (versions.role(&current), versions.of(&other("another")).cloned(), versions.number(2).cloned());
            let _ = versions.bootstrapped(&other("third"), Vec::new(), 3);
            let _ = versions.dropped(1, 3);
            for to in [1, 2, u32::MAX] {
                let _ = versions.switched(to, driftline::store::Action::Switched, 3);
            }
        }
        let _ = store.role();
    });
}

/// The files of versions below a folder, by name.
fn versions_files(folder: &std::path::Path) -> Vec<(std::ffi::OsString, std::path::PathBuf)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(versions_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "json") {
            found.push((path.file_name().unwrap().to_owned(), path));
        }
    }
    found.sort();
    found
}

/// A cold store that gives back something else than it was given.
#[derive(Debug, Default)]
struct Damaging {
    states: HashMap<u64, Vec<u8>>,
    /// In place of what was put, once there is something.
    given: Arc<Mutex<Option<Vec<u8>>>>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl ColdStore for Damaging {
    fn put(&mut self, states: &[(u64, Vec<u8>)]) -> Result<(), String> {
        self.seen.lock().unwrap().extend(states.iter().map(|(_, state)| state.clone()));
        self.states.extend(states.iter().cloned());
        Ok(())
    }

    fn get(&self, number: u64) -> Result<Vec<u8>, String> {
        let given = self.given.lock().unwrap().clone();
        given.or_else(|| self.states.get(&number).cloned()).ok_or_else(|| "there is no such state".to_owned())
    }

    fn remove(&mut self, numbers: &[u64]) -> Result<(), String> {
        self.states.retain(|number, _| !numbers.contains(number));
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        0
    }

    fn memory_bytes(&self) -> usize {
        0
    }
}

#[test]
fn states_outside_of_memory() {
    let plan = plan();
    let engine = Engine::new(&plan).unwrap();
    let task = |store: Damaging| {
        let cold = (Box::new(store) as Box<dyn ColdStore>, 0);
        Task::restore_within::<WindowError>(engine.clone(), 0, std::iter::empty(), Some(cold)).unwrap()
    };
    let seen = Arc::<Mutex<Vec<Vec<u8>>>>::default();
    let mut first = task(Damaging { seen: seen.clone(), ..Damaging::default() });
    for offset in [0, 30, 60] {
        apply(&plan, &mut first, offset).unwrap();
    }
    let corpus: Vec<_> = seen.lock().unwrap().iter().map(|state| vec![state.clone()]).collect();
    assert!(!corpus.is_empty(), "states go out");
    let target = Target { name: "cold-states", shapes: &[Shape::Bytes], corpus, words: &["c1"], cases: 3_000 };
    target.run(|parts| {
        let given = Arc::<Mutex<Option<Vec<u8>>>>::default();
        let mut task = task(Damaging { given: given.clone(), ..Damaging::default() });
        apply(&plan, &mut task, 0).unwrap();
        *given.lock().unwrap() = Some(parts[0].clone());
        let _ = apply(&plan, &mut task, 30);
        let _ = task.snapshot();
    });
}

#[test]
fn marks_of_topics_that_are_keyed_anew() {
    let mut plan = plan();
    let from = plan.sources[0].clone();
    let rekeyed = RekeyPlan { from, partitions: None, retention: None };
    plan.sources[0].rekeyed = Some(Arc::new(rekeyed));
    plan.score.as_mut().unwrap().emit = Emit::EventTime;
    let engine = Engine::new(&plan).unwrap();
    let mark = |at: &[(i32, Option<i64>, bool)]| {
        let record = MarkRecord { partitions: 2, at: at.to_vec() };
        rekeyed::mark_headers(&record).remove(0).value
    };
    let line = |partition: &str, offset: &str| format!("{partition}\n{offset}").into_bytes();
    let target = Target {
        name: "marks",
        shapes: &[Shape::Json, Shape::Text],
        corpus: vec![
            vec![mark(&[(0, Some(1_700_000_000_000), false), (1, None, true)]), line("0", "41")],
            vec![mark(&[(1, Some(1_700_000_500_000), false)]), line("1", "0")],
        ],
        words: &["partitions", "at"],
        cases: 3_000,
    };
    target.run(|parts| {
        let mut records = Records::new(TopicPartition::new("fuzz.orders", 0));
        let mut lines = parts[1].splitn(2, |byte| *byte == b'\n');
        let mut header = |name: &str| driftline::broker::Header {
            name: name.to_owned(),
            value: lines.next().unwrap_or_default().to_vec(),
        };
        let origin = vec![header(rekeyed::headers::PARTITION), header(rekeyed::headers::OFFSET)];
        let mut event = |offset: i64, headers: Vec<driftline::broker::Header>, is_mark: bool| {
            records.headers.push((records.len(), headers));
            let time = 1_700_000_000_000 + offset * 1_000;
            let value = format!(r#"{{"customer_id":"c1","branch":1,"at":{time},"amount":1.5}}"#);
            records.push(offset, time, None, (!is_mark).then_some(value.as_bytes()));
        };
        event(0, origin, false);
        event(
            1,
            vec![driftline::broker::Header { name: rekeyed::headers::MARK.into(), value: parts[0].clone() }],
            true,
        );
        event(2, Vec::new(), false);
        let (events, told) = rekeyed::unpack(&records);
        assert_eq!(told.origins.len(), events.len());
        assert!(events.len() >= 2, "what is no mark is an event");
        let mut decoder = SourceDecoder::new(0, &plan.sources[0], None).unwrap();
        let batch = decoder.decode(&events).unwrap().batch;
        let told = rekeyed::of_rows(&told, &events, &batch.offsets);
        let mut task = Task::new(engine.clone(), 0);
        task.offer(SourceBatch { rekeyed: Some(told), ..batch }).unwrap();
        let _ = task.advance(&TaskClock { caught_up: &[true, true], idle: &[false, false] }, 1000);
        let restored = Task::restore(engine.clone(), 0, &task.snapshot().unwrap());
        restored.expect("what it writes it can read");
    });
}
