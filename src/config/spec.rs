//! `pipeline.toml` as written. The field documentation becomes the JSON Schema's.
//!
//! Durations are texts such as `5ms`, `30s`, `1h30m` or `90d`; sizes are texts such as `4MiB`.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults;
use super::plan::{DataType, Delivery, Emit, Function, GroupProtocol, RecordKey, Secret, TimeUnit, Unavailable};

/// A driftline pipeline: from topics to features, predictions, drift monitoring and retraining.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "driftline pipeline")]
pub struct Spec {
    /// Name of the pipeline: first part of the names of its topics and consumer groups. Letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// The log: a Kafka cluster, or the embedded log where `brokers` is absent or empty.
    #[serde(default)]
    pub broker: BrokerSpec,
    /// The online store: Redis in Feast's layout, or the embedded store where `redis` is absent or empty.
    #[serde(default)]
    pub online: OnlineSpec,
    /// The offline store: feature rows and checkpoints as Arrow files.
    #[serde(default)]
    pub offline: OfflineSpec,
    /// Window state: how much of it may be in memory.
    #[serde(default)]
    pub state: StateSpec,
    /// The model registry.
    #[serde(default)]
    pub registry: RegistrySpec,
    /// What features are about: a customer, a product.
    pub entities: IndexMap<String, EntitySpec>,
    /// Topics with events, their schema, key and event time.
    pub sources: IndexMap<String, SourceSpec>,
    /// Tables: topics of facts about an entity, the newest row of each key being what is true. Each of its columns is a
    /// feature, `<table>_<column>`, and the table's name is that of their Feast feature view.
    #[serde(default)]
    pub tables: IndexMap<String, TableSpec>,
    /// Events of a source keyed anew, by another entity: a source of that name, for feature groups and windows.
    #[serde(default)]
    pub rekey: IndexMap<String, RekeySpec>,
    /// Feature groups: aggregations of one source's column over windows. The table's name is the prefix of the features'
    /// names, and the name of the group's Feast feature view.
    #[serde(default)]
    pub features: IndexMap<String, GroupSpec>,
    /// Windows that are emitted when they close: one row an entity and window, on a topic and in the offline store.
    #[serde(default)]
    pub windows: IndexMap<String, WindowSpec>,
    /// Features of other entities, read from the online store when an event asks for a row. Each is a feature,
    /// `<lookup>_<feature>`, that the model may use.
    #[serde(default)]
    pub lookups: IndexMap<String, LookupSpec>,
    /// Features computed by SQL from the feature row: name = "SQL". Each may use the ones before it.
    #[serde(default)]
    pub derived: IndexMap<String, String>,
    /// Scoring: which events ask for a prediction, of which model, from which features.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<ScoreSpec>,
    /// Labels: the outcomes that predictions are judged by and models are trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<LabelsSpec>,
    /// Drift monitoring of the features that were scored and of the predictions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<MonitorSpec>,
    /// Retraining: when to ask for it, how to do it, and what a new model must pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retraining: Option<RetrainingSpec>,
}

/// The log.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BrokerSpec {
    /// Kafka bootstrap servers, `host:port` separated by commas. Absent or empty: the embedded log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brokers: Option<String>,
    /// URL of a Confluent-compatible schema registry. Absent or empty: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema_registry: Option<String>,
    /// More librdkafka properties, such as `"security.protocol" = "SASL_SSL"`. The names need quotes, for their dots.
    #[serde(default)]
    pub properties: IndexMap<String, Secret>,
    /// Partitions of the topics that driftline creates.
    #[serde(default = "defaults::partitions")]
    #[schemars(range(min = 1, max = 10_000))]
    pub partitions: u32,
    /// Replication factor of the topics that driftline creates; -1 is the cluster's default.
    #[serde(default = "defaults::replication")]
    #[schemars(range(min = -1, max = 32))]
    pub replication: i32,
    /// How consumer groups share partitions out. `consumer` is Kafka 4's own way (KIP-848): only the partitions that move
    /// stop, and the broker's settings decide when a dead member is missed.
    #[serde(default)]
    pub group_protocol: GroupProtocol,
    /// Folder of the embedded log, from the project's root. Default: `data/` and the pipeline's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// The online store.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OnlineSpec {
    /// False: no row goes to an online store, for pipelines that publish to topics alone.
    #[serde(default = "defaults::yes")]
    pub enabled: bool,
    /// URL of Redis, `redis://…`, `rediss://…` or `redis-cluster://…`. Absent or empty: the embedded store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<Secret>,
    /// Feast project, the last part of every key. Default: the pipeline's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// How long after its last write an entity's features expire. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
    /// Folder of the embedded store, from the project's root. Default: that of the embedded log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// The offline store.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfflineSpec {
    /// Where the files go: `file://./data` (from the project's root) or `file:///var/lib/driftline`. They lie in a folder
    /// with the pipeline's name.
    #[serde(default = "defaults::offline_url")]
    pub url: String,
    /// False: files hold the state alone, and neither feature rows nor rows of emitted windows.
    #[serde(default = "defaults::yes")]
    pub rows: bool,
    /// When state and files are committed.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
}

/// Window state.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StateSpec {
    /// So much of it a process holds in memory (`2GiB`); the states of entities that had no event for the longest time go to
    /// disk and come back with their next event; of an entity with many events those in the middle of its exact windows. Absent or
    /// empty: no limit. Keys and about 100 bytes an entity stay in memory.
    pub memory: Option<String>,
    /// Folder for states that are not in memory, on a local disk. Nothing in it outlives the process.
    #[serde(default = "defaults::state_path")]
    pub path: String,
}

/// When a checkpoint is taken: whichever comes first.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointSpec {
    /// This long after the last one, if anything happened since.
    #[serde(default = "defaults::checkpoint_interval")]
    pub interval: String,
    /// After this many feature rows of one partition.
    #[serde(default = "defaults::checkpoint_rows")]
    #[schemars(range(min = 1))]
    pub rows: u64,
}

/// The model registry.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegistrySpec {
    /// Folder of the registry: `file://./data/models` (from the project's root) or `file:///srv/models`.
    #[serde(default = "defaults::registry_url")]
    pub url: String,
    /// Folder of a model bundle, from the pipeline's folder, that becomes version 1 where the registry does not know the
    /// model yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial: Option<String>,
}

/// What features are about.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EntitySpec {
    /// Join keys and their types, in order: `{ customer_id = "string" }`.
    pub key: IndexMap<String, KeyType>,
}

/// Type of a join key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeyType {
    /// 64-bit signed integer.
    Int64,
    /// UTF-8 text.
    String,
}

/// How a record's value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FormatSpec {
    /// Avro, with or without Confluent framing.
    Avro,
    /// One JSON object a record.
    Json,
    /// Protobuf, with or without Confluent framing.
    Protobuf,
}

/// A topic with events.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceSpec {
    /// Topic.
    pub topic: String,
    /// How the records are written.
    pub format: FormatSpec,
    /// Schema file, from the pipeline's folder: Avro (`.avsc`), JSON Schema, or a descriptor set of `protoc`. For JSON it
    /// can stand for `fields`; the other formats need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Full name of the Protobuf message that each record is: `shop.Order`. Needed for Protobuf.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Fields of JSON records and their types: `{ amount = "float64" }`.
    #[serde(default)]
    pub fields: IndexMap<String, DataType>,
    /// Entity that the events are about. Default: the pipeline's only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity: Option<String>,
    /// Field of each of the entity's join keys, where it has another name: `{ customer_id = "buyer" }`.
    #[serde(default)]
    pub key: IndexMap<String, String>,
    /// Field with the instant when the event happened.
    pub event_time: TimeSpec,
    /// How far an event may lie behind the newest one of its partition. Later ones go to the dead letters.
    #[serde(default = "defaults::out_of_order")]
    pub out_of_order: String,
    /// How far an event may lie ahead of its Kafka timestamp. Those further ahead go to the dead letters.
    #[serde(default = "defaults::ahead")]
    pub ahead: String,
    /// After this long without a record a partition no longer holds back the others.
    #[serde(default = "defaults::idle_after")]
    pub idle_after: String,
    /// SQL condition over the record: keeps the events for which it is true.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Columns to add: name = "SQL over the record and the columns before it".
    #[serde(default)]
    pub derive: IndexMap<String, String>,
}

/// A topic of facts about an entity, usually compacted. As of an instant, the newest row of the entity's key is what is true.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TableSpec {
    /// Topic. It has as many partitions as those of the sources.
    pub topic: String,
    /// How the records are written.
    pub format: FormatSpec,
    /// Schema file, as for sources.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Full name of the Protobuf message that each record is. Needed for Protobuf.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Fields of JSON records and their types.
    #[serde(default)]
    pub fields: IndexMap<String, DataType>,
    /// Entity that the facts are about. Default: the pipeline's only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity: Option<String>,
    /// Field of each of the entity's join keys, where it has another name.
    #[serde(default)]
    pub key: IndexMap<String, String>,
    /// How the Kafka key of a record without a value is written, which deletes the key's row. Default: `text`, or `json`
    /// where the entity has several join keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_key: Option<RecordKey>,
    /// Field with the instant since when the facts are true. Default: none; then the record's Kafka timestamp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_time: Option<TimeSpec>,
    /// Columns that become features. Default: all fields but the keys and the event time, then the derived columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// How far a row may lie behind the newest one of its partition where `[score] emit = "event_time"` waits for it. Later
    /// ones count, too, from when they come.
    #[serde(default = "defaults::out_of_order")]
    pub out_of_order: String,
    /// How far a row may lie ahead of its Kafka timestamp. Those further ahead go to the dead letters.
    #[serde(default = "defaults::ahead")]
    pub ahead: String,
    /// After this long without a record the table no longer holds back the sources.
    #[serde(default = "defaults::idle_after")]
    pub idle_after: String,
    /// SQL condition over the row. A row for which it is not true deletes the key's row.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Columns to add: name = "SQL over the row and the columns before it".
    #[serde(default)]
    pub derive: IndexMap<String, String>,
}

/// Events of a source, keyed by another entity.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RekeySpec {
    /// Source whose events are keyed anew.
    pub source: String,
    /// Entity that keys them now.
    pub entity: String,
    /// Field of each of the entity's join keys, where it has another name.
    #[serde(default)]
    pub key: IndexMap<String, String>,
    /// Topic of the events by their new key. Default: `<pipeline>.<source>.by-<entity>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// Partitions of that topic. Default: as many as the source's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub partitions: Option<u32>,
    /// How long that topic keeps its records. Default: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<String>,
}

/// A field with an instant.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TimeSpec {
    /// Name of the field.
    pub field: String,
    /// Unit of the field: `s`, `ms`, `us` or `ns` since 1970 UTC, or `iso` text. Default: what the Avro schema says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<TimeUnit>,
}

/// A feature group.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// Source whose events are aggregated.
    pub source: String,
    /// Column to aggregate. Default: none; then only `count`, `rate` and `seconds_since_last` make sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// What to compute.
    pub functions: Vec<Function>,
    /// Over how long back from each event: `["1h", "30d", "lifetime"]`.
    pub windows: Vec<String>,
    /// SQL condition over the source's columns: keeps the events for which it is true.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Half-life of the events: one of this age weighs half of a new one, in `count`, `sum` and `mean`. Default: none; all
    /// events of a window weigh the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<String>,
    /// One feature for each of these categories, of the events that have it in this column: `{ channel = ["web", "shop"] }`.
    /// Default: none.
    #[serde(default)]
    pub by: IndexMap<String, Vec<String>>,
    /// Steps in which a window's tail moves, by window: `{ "90d" = "1d" }`. Default: about a fiftieth of the window.
    #[serde(default)]
    pub tile: IndexMap<String, String>,
    /// The windows' tails move with every millisecond. Keeps all events of the longest window, with
    /// `state.memory` mostly on disk.
    #[serde(default)]
    pub exact: bool,
}

/// Windows that are emitted when they close: tumbling, hopping or session windows, one of the three.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WindowSpec {
    /// Source whose events are aggregated.
    pub source: String,
    /// Column to aggregate. Default: none; then only `count`, `rate` and `seconds_since_last` make sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// What to compute.
    pub functions: Vec<Function>,
    /// Length of windows that follow one another, aligned to 1970 UTC: `"1m"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tumbling: Option<String>,
    /// Length of windows that overlap: `"1h"`. Needs `step`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hopping: Option<String>,
    /// A hopping window begins at each multiple of this, which divides its length: `"5m"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// A session ends when an entity had no event for so long: `"30m"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// SQL condition over the source's columns: keeps the events for which it is true.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Half-life of the events in `count`, `sum` and `mean`: one this long before its window's end weighs half of one at the
    /// end. Default: none; all events of a window weigh the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<String>,
    /// One column a function for each of these categories, of the events that have it in this column:
    /// `{ channel = ["web", "shop"] }`. Default: none.
    #[serde(default)]
    pub by: IndexMap<String, Vec<String>>,
    /// Emits open windows that have changed, too, at most once in so much event time. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early: Option<String>,
    /// Topic of the rows. Default: `<pipeline>.windows.<name>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
}

/// Features of another entity, as another pipeline, or Feast, has written them to this pipeline's online store.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LookupSpec {
    /// Feast project that they are stored under; that of a pipeline of driftline is its name, unless it says otherwise.
    /// Default: this pipeline's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// Feature view that they belong to: the name of a feature group or table. Default: the lookup's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<String>,
    /// The other entity's join keys, each with the feature of this pipeline's row that has its value.
    pub key: IndexMap<String, String>,
    /// Features to read and their types.
    pub features: IndexMap<String, DataType>,
    /// Features that are older than the event by more than this are null. Default: none are too old.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<String>,
    /// How long an answer of the store may take.
    #[serde(default = "defaults::lookup_timeout")]
    pub timeout: String,
    /// Without an answer the events wait for one, or their features are null, or those that were read last.
    #[serde(default = "defaults::unavailable")]
    pub unavailable: Unavailable,
    /// With `unavailable = "stale"`: how long after they were read features stay in use. They are null then.
    #[serde(default = "defaults::stale_for")]
    pub stale_for: String,
    /// With `unavailable = "stale"`: of how many entities each worker remembers what was read last.
    #[serde(default = "defaults::stale_entities")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub stale_entities: u32,
}

/// Scoring.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreSpec {
    /// Source whose events ask for a prediction.
    pub on: String,
    /// Whether events are applied and scored as they arrive, or in event-time order once the watermark has passed them.
    #[serde(default = "defaults::emit")]
    pub emit: Emit,
    /// Name of the model in the registry.
    pub model: String,
    /// Alias to follow.
    #[serde(default = "defaults::alias")]
    pub alias: String,
    /// The model's inputs, in order. Default: all features that are numbers or booleans.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
    /// Features that are none of its inputs, where those are not listed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// When a micro-batch is scored.
    #[serde(default)]
    pub batch: BatchSpec,
    /// How often the registry is asked whether the alias moved.
    #[serde(default = "defaults::poll_alias")]
    pub poll_alias: String,
    /// Whether predictions and offsets are committed in one transaction.
    #[serde(default = "defaults::delivery")]
    pub delivery: Delivery,
    /// ONNX Runtime execution providers in order of preference.
    #[serde(default = "defaults::providers")]
    pub providers: Vec<Provider>,
    /// Threads within one ONNX operator.
    #[serde(default = "defaults::threads")]
    #[schemars(range(min = 1, max = 1024))]
    pub threads: u32,
}

/// When a micro-batch is scored: whichever comes first.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchSpec {
    /// This many rows.
    #[serde(default = "defaults::batch_rows")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rows: u32,
    /// This long after its first row.
    #[serde(default = "defaults::batch_wait")]
    pub wait: String,
    /// This many bytes of features.
    #[serde(default = "defaults::batch_bytes")]
    pub bytes: String,
}

/// An ONNX Runtime execution provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Provider {
    /// NVIDIA TensorRT.
    Tensorrt,
    /// NVIDIA CUDA.
    Cuda,
    /// The processor.
    Cpu,
}

/// Labels.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelsSpec {
    /// Topic.
    pub topic: String,
    /// How the records are written.
    pub format: FormatSpec,
    /// Schema file, as for sources. JSON does without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Full name of the Protobuf message that each record is. Needed for Protobuf.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Field of each of the entity's join keys, where it has another name.
    #[serde(default)]
    pub key: IndexMap<String, String>,
    /// Field with the instant that the label is about: the event time of the prediction.
    pub as_of: TimeSpec,
    /// Field with the outcome: 0 or 1, a boolean, or a number.
    pub value: String,
    /// How long after a prediction its outcome is known.
    pub horizon: String,
}

/// Drift monitoring.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MonitorSpec {
    /// When a window of predictions closes.
    #[serde(default)]
    pub window: MonitorWindowSpec,
    /// Features to watch; the prediction is always watched. Default: all of the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
    /// Predictions of so much event time at the beginning are not judged, while long windows are still filling up.
    #[serde(default = "defaults::warm_up")]
    pub warm_up: String,
    /// False-alarm budget: the probability that `horizon_windows` windows without drift raise any alarm.
    #[serde(default = "defaults::alpha")]
    pub alpha: f64,
    /// Number of windows that the budget is meant for.
    #[serde(default = "defaults::horizon_windows")]
    #[schemars(range(min = 1))]
    pub horizon_windows: u32,
    /// Tolerated shift: a population stability index up to this is not drift.
    #[serde(default = "defaults::tolerance")]
    pub tolerance: f64,
    /// Windows in a row without evidence before an incident is resolved.
    #[serde(default = "defaults::resolve_after")]
    #[schemars(range(min = 1))]
    pub resolve_after: u32,
}

/// When a window of predictions closes: after a number of rows or a stretch of event time, not both.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MonitorWindowSpec {
    /// After this many predictions. Default: 5000, where `time` is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 100))]
    pub rows: Option<u64>,
    /// After this much event time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
}

/// Retraining.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetrainingSpec {
    /// Condition over the monitor's verdicts: comparisons of `drifted_features`, `score_drifted` and `max_psi`, joined by
    /// `and` and `or`, each perhaps `for n windows`.
    #[serde(default = "defaults::when")]
    pub when: String,
    /// No second retraining sooner than this after one, in event time.
    #[serde(default = "defaults::cooldown")]
    pub cooldown: String,
    /// The training program and its arguments, run in the project's root.
    pub command: Vec<String>,
    /// The program is stopped after this long.
    #[serde(default = "defaults::timeout")]
    pub timeout: String,
    /// How far the training range reaches back, in event time.
    #[serde(default = "defaults::lookback")]
    pub lookback: String,
    /// Labelled rows since the shift that must be there before training starts.
    #[serde(default = "defaults::fresh_labels")]
    pub fresh_labels: u64,
    /// What a new model must pass.
    #[serde(default)]
    pub gates: GatesSpec,
}

/// What a new model must pass on held-out rows.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatesSpec {
    /// Metric in which it is compared with the model in use.
    #[serde(default = "defaults::metric")]
    pub metric: Metric,
    /// By how much it must be better; negative allows it to be that much worse.
    #[serde(default = "defaults::min_gain")]
    pub min_gain: f64,
    /// Least value of the metric (greatest, for errors), whatever the model in use has. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Largest expected calibration error. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ece: Option<f64>,
    /// Longest 99th percentile of scoring one row. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_latency: Option<String>,
}

/// A metric of held-out rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Area under the ROC curve; more is better.
    Auc,
    /// Brier score; less is better.
    Brier,
    /// Logarithmic loss; less is better.
    LogLoss,
    /// Root mean squared error; less is better.
    Rmse,
    /// Mean absolute error; less is better.
    Mae,
}

impl Metric {
    /// The name, as written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auc => "auc",
            Self::Brier => "brier",
            Self::LogLoss => "log_loss",
            Self::Rmse => "rmse",
            Self::Mae => "mae",
        }
    }
}

impl Provider {
    /// The name, as written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tensorrt => "tensorrt",
            Self::Cuda => "cuda",
            Self::Cpu => "cpu",
        }
    }
}

impl Default for BrokerSpec {
    fn default() -> Self {
        Self {
            brokers: None,
            schema_registry: None,
            properties: IndexMap::new(),
            partitions: defaults::partitions(),
            replication: defaults::replication(),
            group_protocol: GroupProtocol::default(),
            path: None,
        }
    }
}

impl Default for OnlineSpec {
    fn default() -> Self {
        Self { enabled: defaults::yes(), redis: None, project: None, ttl: None, path: None }
    }
}

impl Default for OfflineSpec {
    fn default() -> Self {
        Self { url: defaults::offline_url(), rows: defaults::yes(), checkpoint: CheckpointSpec::default() }
    }
}

impl Default for StateSpec {
    fn default() -> Self {
        Self { memory: None, path: defaults::state_path() }
    }
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { interval: defaults::checkpoint_interval(), rows: defaults::checkpoint_rows() }
    }
}

impl Default for RegistrySpec {
    fn default() -> Self {
        Self { url: defaults::registry_url(), initial: None }
    }
}

impl Default for BatchSpec {
    fn default() -> Self {
        Self { rows: defaults::batch_rows(), wait: defaults::batch_wait(), bytes: defaults::batch_bytes() }
    }
}

impl Default for GatesSpec {
    fn default() -> Self {
        Self {
            metric: defaults::metric(),
            min_gain: defaults::min_gain(),
            threshold: None,
            max_ece: None,
            max_latency: None,
        }
    }
}
