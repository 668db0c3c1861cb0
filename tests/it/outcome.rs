//! All that a pipeline has left behind: what a consumer of committed records reads on its topics, the offline files that the
//! newest manifests name, and the online store. Two runs are the same if these are.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use arrow::ipc::reader::FileReader;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use driftline::broker::{Broker, NextOffset, Records, TopicPartition};
use driftline::config::plan::Plan;
use driftline::store::{OfflineStore, OnlineStore, Value, key_from_text, lookup};
use serde_json::{Map, Value as Json, json};

use crate::servers::until;

const LIMIT: Duration = Duration::from_secs(60);

/// Topic of dead letters, as [`Outcome::topics`] names it.
pub const DEAD_LETTERS: &str = "dead-letters";

/// See the module. The pipeline's name and the hash of its definition are left out of all texts: runs that are compared may
/// have different ones.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// By topic (without the pipeline's name) and partition: key, value and headers of each record, in the order of offsets.
    /// Dead letters, whose order is not defined, are sorted and in one partition.
    pub topics: BTreeMap<String, BTreeMap<i32, Vec<String>>>,
    /// By kind (`features`, or the name of emitted windows): each row of the files, column by column, sorted.
    pub files: BTreeMap<String, Vec<String>>,
    /// By entity key: `events`, the event time of each feature group, and `features`.
    pub online: BTreeMap<Vec<String>, Json>,
}

impl Outcome {
    /// Reads what a plan's topics and files hold. `offline` is the folder of the pipeline's files.
    pub fn read(plan: &Plan, broker: &dyn Broker, store: &OfflineStore, offline: &Path) -> Self {
        let mut outcome = Self::default();
        // Topics that other tests are just making on the same brokers have no leader yet.
        let mut topics = Vec::new();
        until("all topics have leaders", LIMIT, || match broker.topics() {
            Ok(found) => {
                topics = found;
                true
            }
            Err(error) => {
                assert!(error.is_retriable(), "{error}");
                false
            }
        });
        for topic in topics {
            let inputs = plan.sources.iter().any(|source| source.topic == topic.name);
            let Some(name) = topic.name.strip_prefix(&format!("{}.", plan.name)).filter(|_| !inputs) else { continue };
            let mut partitions = BTreeMap::new();
            for (number, (start, end)) in (0..).zip(&topic.partitions) {
                let records = records(plan, broker, &TopicPartition::new(topic.name.clone(), number), *start, *end);
                if !records.is_empty() {
                    partitions.insert(number, records);
                }
            }
            if name == DEAD_LETTERS {
                let mut all: Vec<String> = std::mem::take(&mut partitions).into_values().flatten().collect();
                all.sort();
                partitions.insert(0, all);
            }
            outcome.topics.insert(name.to_owned(), partitions);
        }
        let partitions =
            broker.topic(&plan.sources[0].topic).unwrap().expect("the source's topic exists").partitions.len();
        for partition in 0..i32::try_from(partitions).unwrap() {
            let Some(manifest) = store.latest(partition).unwrap() else { continue };
            let features = manifest.files.iter().map(|file| ("features", file.path.as_str()));
            let windows = manifest.windows.iter().map(|file| (file.window.as_str(), file.path.as_str()));
            for (kind, path) in features.chain(windows) {
                outcome.files.entry(kind.to_owned()).or_default().extend(rows(plan, &offline.join(path)));
            }
        }
        outcome.files.values_mut().for_each(|rows| rows.sort());
        outcome
    }

    /// Adds what the online store holds of these entities. Those that it does not know are left out.
    pub fn read_online(&mut self, plan: &Plan, online: &dyn OnlineStore, keys: impl IntoIterator<Item = Vec<String>>) {
        for key in keys {
            let found = lookup(plan, online, &key_from_text(&plan.entity, &key).unwrap(), 0).unwrap();
            // All groups of an entity are written together.
            if found.groups.iter().all(|group| group.event_time.is_none()) {
                continue;
            }
            let events: Map<String, Json> =
                found.groups.iter().map(|group| (group.group.clone(), group.event_time.into())).collect();
            let features = found.groups.iter().flat_map(|group| &group.features);
            let features: Map<String, Json> = features.map(|f| (f.name.clone(), as_json(&f.value))).collect();
            self.online.insert(key, json!({ "events": events, "features": features }));
        }
    }

    /// Records of a topic over all partitions.
    pub fn records(&self, topic: &str) -> impl Iterator<Item = &str> {
        self.topics.get(topic).into_iter().flat_map(|by| by.values().flatten()).map(String::as_str)
    }

    /// Says that two runs have left the same behind, or names the first thing that differs.
    pub fn assert_same(&self, wanted: &Self, run: &str) {
        for topic in self.topics.keys().chain(wanted.topics.keys()) {
            // A topic that nothing was written to need not be there.
            let none = BTreeMap::new();
            let (found, wanted) = (self.topics.get(topic).unwrap_or(&none), wanted.topics.get(topic).unwrap_or(&none));
            for partition in found.keys().chain(wanted.keys()) {
                let of = |all: &BTreeMap<i32, Vec<String>>| all.get(partition).cloned().unwrap_or_default();
                assert_lines(&format!("{run}: {topic}[{partition}]"), &of(found), &of(wanted));
            }
        }
        for kind in self.files.keys().chain(wanted.files.keys()) {
            let of = |all: &BTreeMap<String, Vec<String>>| all.get(kind).cloned().unwrap_or_default();
            assert_lines(&format!("{run}: files of {kind}"), &of(&self.files), &of(&wanted.files));
        }
        let lines = |online: &BTreeMap<Vec<String>, Json>| -> Vec<String> {
            online.iter().map(|(key, row)| format!("{key:?} {row}")).collect()
        };
        assert_lines(&format!("{run}: online store"), &lines(&self.online), &lines(&wanted.online));
    }
}

/// The same lines in the same order, or the first that differs.
fn assert_lines(what: &str, found: &[String], wanted: &[String]) {
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b).unwrap_or(found.len().min(wanted.len()));
    assert!(
        found == wanted,
        "{what}: {} found, {} wanted; the first that differs, number {differs}:\nfound  {:?}\nwanted {:?}",
        found.len(),
        wanted.len(),
        found.get(differs),
        wanted.get(differs)
    );
}

fn records(plan: &Plan, broker: &dyn Broker, at: &TopicPartition, start: NextOffset, end: NextOffset) -> Vec<String> {
    let mut all = Vec::new();
    let mut next = start;
    while next < end {
        let (records, after) = broker.read(at, next, 1000, LIMIT).unwrap();
        assert!(after > next, "{at} does not go on at {next:?}");
        all.extend((0..records.len()).map(|row| anonymous(plan, &text(&records, row))));
        next = after;
    }
    all
}

fn as_json(value: &Value) -> Json {
    match value {
        Value::Null => Json::Null,
        Value::Int64(value) | Value::Timestamp(value) => (*value).into(),
        Value::Float64(value) => (*value).into(),
        Value::Boolean(value) => (*value).into(),
        Value::String(value) => value.as_str().into(),
        Value::List(values) => values.iter().map(as_json).collect(),
    }
}

/// Key, value and headers.
fn text(records: &Records, row: usize) -> String {
    let part = |bytes: Option<&[u8]>| bytes.map_or_else(|| "null".to_owned(), |b| b.escape_ascii().to_string());
    // Texts are read as they are: escaped quotes would hide what differs.
    let value = records.values.get(row).map(|v| String::from_utf8(v.to_vec()).unwrap_or_else(|_| part(Some(v))));
    let headers = records.headers.iter().find(|(at, _)| *at == row).map(|(_, headers)| headers.as_slice());
    let headers: Vec<_> = headers
        .unwrap_or_default()
        .iter()
        .map(|h| format!("{}={}", h.name, String::from_utf8_lossy(&h.value)))
        .collect();
    format!("{}\t{}\t{}", part(records.keys.get(row)), value.as_deref().unwrap_or("null"), headers.join("\t"))
}

fn rows(plan: &Plan, path: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let options = FormatOptions::new().with_null("null");
    for batch in FileReader::try_new(File::open(path).unwrap(), None).unwrap() {
        let batch = batch.unwrap();
        let schema = batch.schema();
        let columns: Vec<_> = schema
            .fields()
            .iter()
            .zip(batch.columns())
            .map(|(field, column)| (field.name(), ArrayFormatter::try_new(column, &options).unwrap()))
            .collect();
        for row in 0..batch.num_rows() {
            let cells: Vec<_> = columns.iter().map(|(name, column)| format!("{name}={}", column.value(row))).collect();
            lines.push(anonymous(plan, &cells.join("\t")));
        }
    }
    lines
}

fn anonymous(plan: &Plan, text: &str) -> String {
    text.replace(&plan.definition, "DEFINITION").replace(&format!("{}.", plan.name), "").replace(&plan.name, "NAME")
}
