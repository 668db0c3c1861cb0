//! Golden folders: `tests/golden/NAME` has a pipeline, its input and the answers of an independent oracle. Each is run whole, at
//! several parallelisms, killed again and again, and with its input in another order and on other numbers of partitions.
//!
//! A new folder needs `pipeline.toml`, `input.toml` (of which `make_input.py` makes `input.jsonl`, or an `input.jsonl` of its own),
//! `expected/` from `oracle.py`, and its name in the list below.

mod folder;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use rstest::rstest;
use serde_json::{Value, json};

use self::folder::{Folder, Line};
use crate::outcome::{DEAD_LETTERS, Outcome};
use crate::servers::Kafka;

/// All folders under tests/golden.
const FOLDERS: &[&str] =
    &["avro", "bad-records", "by", "decay", "emitted", "event-time", "exact", "lists", "sliding", "sources", "sql"];

#[test]
fn every_golden_folder_is_run() {
    let mut found: Vec<String> = std::fs::read_dir(crate::process::root().join("tests/golden"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("pipeline.toml").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, FOLDERS);
}

#[rstest]
#[case::avro("avro")]
#[case::bad_records("bad-records")]
#[case::by("by")]
#[case::decay("decay")]
#[case::emitted("emitted")]
#[case::event_time("event-time")]
#[case::exact("exact")]
#[case::lists("lists")]
#[case::sliding("sliding")]
#[case::sources("sources")]
#[case::sql("sql")]
fn golden(#[case] name: &str) {
    assert!(FOLDERS.contains(&name));
    let folder = Folder::open(name);
    let input = folder.input();

    // Whole, by one worker, in this process.
    let whole = folder.log(&input, 4);
    let ledger = whole.run_here();
    let outcome = whole.outcome();
    let answers = folder.answers(&input);
    assert_eq!(answers, folder.expected(), "expected/ of {name} is not the oracle's: run oracle.py");
    assert_eq!(ledger, answers["ledger"]);
    assert_answers(&outcome, &answers, "whole");

    // At other parallelisms: the same bytes in the same partitions.
    for workers in [2, 4] {
        let log = folder.log(&input, 4);
        log.run(workers);
        log.outcome().assert_same(&outcome, &format!("{workers} workers"));
    }

    // Killed at every failpoint there is on the way, with more input after each.
    let killed = folder.log(&[], 4);
    let points = folder.points_passed(&folder.log(&[], 4), &input);
    let kills = killed.killed(&input, &points, 1, folder.is_settled_by_arrival());
    assert!(kills >= 8, "{kills} kills");
    killed.outcome().assert_same(&outcome, "killed");

    // With fewer partitions: other logs, whose answers are computed anew.
    for partitions in [1, 2] {
        let laid: Vec<Line> = input.iter().map(|line| line.on(line.partition % partitions)).collect();
        let log = folder.log(&laid, partitions);
        log.run(2);
        assert_answers(&log.outcome(), &folder.answers(&laid), &format!("{partitions} partitions"));
    }

    // In another order of arrival.
    let shuffled = folder.shuffled(&input, 1);
    assert_ne!(shuffled, input);
    let log = folder.log(&shuffled, 4);
    log.run(2);
    let found = log.outcome();
    assert_answers(&found, &folder.answers(&shuffled), "shuffled");
    assert_independent_of_order(&folder, &found, &outcome);
}

/// How the brokers share partitions out, and when they miss a member that was killed.
const CLASSIC: &[(&str, &str)] =
    &[("broker.properties", r#"{ "session.timeout.ms" = "1500", "heartbeat.interval.ms" = "300" }"#)];
const CONSUMER: &[(&str, &str)] = &[("broker.group_protocol", "consumer")];

/// A broker that soon misses a member of a group of its own protocol.
fn kafka() -> &'static Kafka {
    static KAFKA: LazyLock<Kafka> = LazyLock::new(|| Kafka::start_with("group.consumer.session.timeout.ms=1500\n"));
    &KAFKA
}

/// On Kafka as on the embedded log: the same bytes by one, two and four workers.
#[rstest]
#[case::avro("avro")]
#[case::bad_records("bad-records")]
#[case::by("by")]
#[case::decay("decay")]
#[case::emitted("emitted")]
#[case::event_time("event-time")]
#[case::exact("exact")]
#[case::sliding("sliding")]
#[case::sources("sources")]
#[case::sql("sql")]
fn golden_on_kafka(#[case] name: &str) {
    assert!(FOLDERS.contains(&name));
    let folder = Folder::open(name);
    let input = folder.input();
    let embedded = folder.log(&input, 4);
    embedded.run(1);
    let wanted = embedded.outcome();
    for (workers, protocol) in [(1, CONSUMER), (2, CLASSIC), (4, CONSUMER)] {
        let log = folder.log_on(kafka(), protocol, &input, 4);
        log.run(workers);
        log.outcome_when(&wanted).assert_same(&wanted, &format!("{workers} workers, {protocol:?}"));
    }
}

/// One folder of each kind of output and of waiting, killed at every failpoint that it passes on Kafka.
#[rstest]
#[case::dead_letters("bad-records")]
#[case::windows("emitted")]
#[case::rows_that_wait("event-time")]
#[case::rows("exact")]
fn golden_on_kafka_killed(#[case] name: &str) {
    let folder = Folder::open(name);
    let input = folder.input();
    let embedded = folder.log(&input, 4);
    embedded.run(1);
    let wanted = embedded.outcome();
    let points = folder.points_passed(&folder.log_on(kafka(), CLASSIC, &[], 4), &input);
    let log = folder.log_on(kafka(), CLASSIC, &[], 4);
    let kills = log.killed(&input, &points, 2, folder.is_settled_by_arrival());
    assert!(kills >= 8, "{kills} kills");
    log.outcome_when(&wanted).assert_same(&wanted, "killed on Kafka");
}

/// What the order of arrival within `out_of_order` must not change: rows of closed windows, the online store in the end, and,
/// in event-time order, all rows and their order.
fn assert_independent_of_order(folder: &Folder, found: &Outcome, whole: &Outcome) {
    // Where events are late by themselves, another order makes others late.
    if whole.records(DEAD_LETTERS).next().is_some() {
        return;
    }
    assert_eq!(found.online, whole.online);
    for table in folder.windows() {
        let closed = |outcome: &Outcome| {
            let mut rows: Vec<String> = outcome
                .records(&format!("windows.{table}"))
                .filter(|r| r.contains(r#""final":true"#))
                .map(str::to_owned)
                .collect();
            rows.sort();
            rows
        };
        assert_eq!(closed(found), closed(whole), "{table}");
    }
    if folder.is_in_event_time() {
        // An event that arrives elsewhere has another offset, and nothing else.
        let rows = |outcome: &Outcome| -> BTreeMap<i32, Vec<Value>> {
            let row = |record: &String| {
                let mut row: Value = serde_json::from_str(record.split('\t').nth(1).unwrap()).unwrap();
                row["source"].as_object_mut().unwrap().remove("offset").unwrap();
                row
            };
            outcome.topics["features"].iter().map(|(p, records)| (*p, records.iter().map(row).collect())).collect()
        };
        assert_eq!(rows(found), rows(whole));
    }
}

/// Compares with the oracle: integers, texts and instants exactly, floats to 1e-12 of the larger. Then the files with the topics.
fn assert_answers(found: &Outcome, answers: &BTreeMap<String, Vec<Value>>, run: &str) {
    for (name, wanted) in answers {
        let got: Vec<Value> = match name.as_str() {
            "ledger" => continue,
            "online" => found.online.iter().map(|(key, row)| online(key, row)).collect(),
            DEAD_LETTERS => found.records(name).map(dead_letter).collect(),
            _ => published(name, found),
        };
        // Records are in order within their partition; entities and dead letters have no order.
        let by_place = |rows: &[Value]| {
            let mut by: BTreeMap<String, Vec<Value>> = BTreeMap::new();
            for row in rows {
                let place = match name.as_str() {
                    "online" => row["key"].to_string(),
                    DEAD_LETTERS => row.to_string(),
                    _ => row["partition"].to_string(),
                };
                let mut row = row.clone();
                if name.starts_with("windows.") {
                    row.as_object_mut().unwrap().remove("offset");
                }
                by.entry(place).or_default().push(row);
            }
            by
        };
        let (got, wanted) = (by_place(&got), by_place(wanted));
        assert_eq!(got.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{run}: {name}");
        for (place, wanted) in wanted {
            let got = &got[&place];
            for (number, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                if let Some(difference) = difference(got, wanted, "") {
                    panic!("{run}: {name} of {place}, row {number}: {difference}\nfound  {got}\nwanted {wanted}");
                }
            }
            assert_eq!(got.len(), wanted.len(), "{run}: {name} of {place}");
        }
    }
    for (topic, rows) in found.topics.iter().filter(|(topic, _)| topic.as_str() != DEAD_LETTERS) {
        let kind = topic.strip_prefix("windows.").unwrap_or(topic);
        let files = found.files.get(kind).into_iter().flatten();
        let mut files: Vec<BTreeMap<String, String>> = files.map(|row| cells(row)).collect();
        let mut records = Vec::new();
        for record in rows.values().flatten() {
            let record: Value = serde_json::from_str(record.split('\t').nth(1).unwrap()).unwrap();
            let flat =
                [&record, &record["entity"], &record["features"]].into_iter().filter_map(Value::as_object).flatten();
            let cell = |(name, value): (&String, &Value)| (!value.is_object()).then(|| (name.clone(), as_cell(value)));
            let mut row: BTreeMap<String, String> = flat.filter_map(cell).collect();
            for (name, column) in
                [("topic", "source_topic"), ("partition", "source_partition"), ("offset", "source_offset")]
            {
                if let Some(value) = record["source"].get(name) {
                    row.insert(column.into(), as_cell(value));
                }
            }
            row.retain(|name, _| name != "pipeline" && name != "definition");
            records.push(row);
        }
        // Files may have columns that records have not.
        let columns: Vec<String> = records.first().into_iter().flat_map(|row| row.keys().cloned()).collect();
        files.iter_mut().for_each(|row| row.retain(|name, _| columns.contains(name)));
        files.sort();
        records.sort();
        for (file, record) in files.iter().zip(&records) {
            assert_eq!(file, record, "{run}: files of {kind} (left) and records (right)");
        }
        assert_eq!(files.len(), records.len(), "{run}: rows of {kind} in the files");
    }
}

/// The cells of a row of a file. Numbers are read as those of records are: serde_json may miss the last bit.
fn cells(row: &str) -> BTreeMap<String, String> {
    let instant = |text: &str| chrono::DateTime::parse_from_rfc3339(text).ok().map(|at| at.timestamp_millis() as f64);
    let number = |text: &str| serde_json::from_str::<f64>(text).ok().or_else(|| instant(text));
    let plain = |value: &str| number(value).map_or_else(|| value.to_owned(), |number| format!("{number:?}"));
    let cell = |cell: &str| {
        let (name, value) = cell.split_once('=').unwrap();
        let list = value.strip_prefix('[').and_then(|list| list.strip_suffix(']'));
        let value = match list {
            Some(list) => format!("[{}]", list.split(", ").map(plain).collect::<Vec<_>>().join(", ")),
            None => plain(value),
        };
        (name.to_owned(), value)
    };
    row.split('\t').map(cell).collect()
}

/// A value of a record, as [`cells`] has it.
fn as_cell(value: &Value) -> String {
    match (value.as_f64(), value.as_str()) {
        (Some(number), _) => format!("{number:?}"),
        (_, Some(text)) => text.to_owned(),
        _ => match value.as_array() {
            Some(list) => format!("[{}]", list.iter().map(as_cell).collect::<Vec<_>>().join(", ")),
            None => value.to_string(),
        },
    }
}

/// Records of feature rows or of windows, as the oracle writes them.
fn published(topic: &str, found: &Outcome) -> Vec<Value> {
    let mut rows = Vec::new();
    for (partition, records) in found.topics.get(topic).into_iter().flatten() {
        for record in records {
            let mut row: Value = serde_json::from_str(record.split('\t').nth(1).unwrap()).unwrap();
            let source = row.as_object_mut().unwrap().remove("source").unwrap_or_default();
            let fields = row.as_object_mut().unwrap();
            if topic == "features" {
                assert!(fields.remove("pipeline").is_some() && fields.remove("definition").is_some());
                assert_eq!(source["partition"], *partition);
                fields.insert("offset".into(), source["offset"].clone());
            }
            fields.insert("partition".into(), (*partition).into());
            rows.push(row);
        }
    }
    rows
}

fn dead_letter(record: &str) -> Value {
    let header = |name: &str| {
        let start = format!("driftline.{name}=");
        record.split('\t').find_map(|part| part.strip_prefix(&start)).unwrap().to_owned()
    };
    let number = |name: &str| header(name).parse::<i64>().unwrap();
    json!({
        "source": header("topic"), "partition": number("partition"), "offset": number("offset"), "reason": header("reason"),
    })
}

fn online(key: &[String], row: &Value) -> Value {
    let events = row["events"].as_object().unwrap();
    let event_time = events.values().next().unwrap();
    assert!(events.values().all(|time| time == event_time), "one instant for all groups: {events:?}");
    json!({ "key": key, "event_time": event_time, "features": row["features"] })
}

/// Where two answers differ.
fn difference(found: &Value, wanted: &Value, at: &str) -> Option<String> {
    match (found, wanted) {
        (Value::Object(f), Value::Object(w)) => {
            let names =
                |map: &serde_json::Map<String, Value>| map.keys().cloned().collect::<std::collections::BTreeSet<_>>();
            let only: Vec<_> = names(f).symmetric_difference(&names(w)).cloned().collect();
            if !only.is_empty() {
                return Some(format!("only one has {only:?}"));
            }
            f.iter().find_map(|(name, value)| difference(value, &w[name], name))
        }
        (Value::Number(f), Value::Number(w)) if f.is_f64() && w.is_f64() => {
            let (f, w) = (f.as_f64().unwrap(), w.as_f64().unwrap());
            ((f - w).abs() > 1e-12 * f.abs().max(w.abs())).then(|| format!("{at}: found {f}, wanted {w}"))
        }
        _ => (found != wanted).then(|| format!("{at}: found {found}, wanted {wanted}")),
    }
}
