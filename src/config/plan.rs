//! The plan: a pipeline as validated, with every default filled in. Stages read plans, never specs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use super::function::{Function, LONGEST_LIST};
use crate::source::protobuf::Message;

/// A whole pipeline, ready to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Pipeline name: prefix of its topics, groups and metrics labels.
    pub name: String,
    /// Folder of `pipeline.toml`, absolute.
    pub folder: PathBuf,
    /// The project's root, absolute: the nearest folder above that holds `pipelines/` and `schemas/` (or only `pipelines/`
    /// with this one in it), else the pipeline's own folder. Relative data paths start here and commands run here, whatever
    /// directory driftline is started in.
    pub root: PathBuf,
    /// First 16 hex digits of SHA-256 over everything that decides feature values: entities, sources, features, derived.
    pub definition: String,
    /// The log.
    pub broker: BrokerPlan,
    /// The online store.
    pub online: OnlinePlan,
    /// The offline store and its checkpoints.
    pub offline: OfflinePlan,
    /// Where window state may be.
    pub state: StatePlan,
    /// The model registry.
    pub registry: RegistryPlan,
    /// What features are about.
    pub entity: EntityPlan,
    /// The same pipeline's plans for its other entities, each with the sources, groups and windows about it. Their names are
    /// `<pipeline>.by-<entity>`.
    pub others: Vec<Arc<Plan>>,
    /// In one of [`Plan::others`]: the pipeline's name.
    pub pipeline: Option<String>,
    /// Tables, then event sources, each in the order of the file, then those that are keyed anew: of what happens at the same instant, the tables' rows come
    /// first. All have the same number of partitions.
    pub sources: Vec<SourcePlan>,
    /// Feature groups, in the order of the file.
    pub groups: Vec<GroupPlan>,
    /// Expressions over the feature row, in the order of the file; each may use those before it.
    pub derived: Vec<DerivedPlan>,
    /// Windows that are emitted when they close, in the order of the file.
    pub windows: Vec<EmittedPlan>,
    /// Features of other entities, read from the online store, in the order of the file.
    pub lookups: Vec<LookupPlan>,
    /// Scoring, where the pipeline predicts.
    pub score: Option<ScorePlan>,
    /// Labels, where they come.
    pub labels: Option<LabelsPlan>,
    /// Drift monitoring.
    pub monitor: Option<MonitorPlan>,
    /// Retraining.
    pub retraining: Option<RetrainingPlan>,
}

/// Where window state may be.
#[derive(Debug, Clone, Default)]
pub struct StatePlan {
    /// Bytes of it in the memory of a process; `None` for as many as there are.
    pub memory: Option<usize>,
    /// Folder on local disk for the rest.
    pub path: PathBuf,
}

/// Where the log is.
#[derive(Debug, Clone)]
pub enum BrokerPlan {
    /// A Kafka cluster.
    Kafka {
        /// Bootstrap servers.
        brokers: String,
        /// Confluent-compatible schema registry.
        schema_registry: Option<String>,
        /// librdkafka properties as the user wrote them (`security.protocol`, `sasl.*`, …). Values may be secret.
        properties: BTreeMap<String, Secret>,
        /// Partitions and replication factor of topics that driftline creates.
        partitions: u32,
        /// Replication factor of topics that driftline creates; −1 is the broker's default.
        replication: i32,
        /// How consumer groups share partitions out.
        group_protocol: GroupProtocol,
    },
    /// The embedded log.
    Embedded {
        /// Folder of the log and the online store.
        path: PathBuf,
        /// Partitions of topics that driftline creates.
        partitions: u32,
    },
}

/// How the members of a consumer group share partitions out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GroupProtocol {
    /// A member does, and each time all give back everything first. All versions of Kafka have it.
    #[default]
    Classic,
    /// The broker does, partition by partition (KIP-848): only what moves stops. From Kafka 4.0 on.
    Consumer,
}

/// A value that never prints.
#[derive(Clone, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(transparent)]
pub struct Secret(pub String);

impl serde::Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Where the newest feature rows are.
#[derive(Debug, Clone)]
pub enum OnlinePlan {
    /// Redis, in Feast's layout.
    Redis {
        /// `redis://`, `rediss://`, `redis-cluster://` …
        url: Secret,
        /// Feast project: last part of every key. Default: the pipeline's name.
        project: String,
        /// Expiry of an entity's hash, renewed by every write.
        ttl: Option<Duration>,
    },
    /// The embedded store, beside the embedded log, with the same layout.
    Embedded {
        /// Folder.
        path: PathBuf,
        /// Feast project.
        project: String,
    },
    /// Nowhere.
    Off,
}

/// Where history is kept.
#[derive(Debug, Clone)]
pub struct OfflinePlan {
    /// `file://…` or any URL the `object_store` crate opens. Files lie under `<url>/<pipeline>/`.
    pub url: String,
    /// Files hold the rows, beside the state.
    pub rows: bool,
    /// A checkpoint is taken this long after the last one, if anything was applied.
    pub checkpoint_interval: Duration,
    /// … or after this many feature rows of one task, whichever comes first. Does not count where files hold no rows.
    pub checkpoint_rows: usize,
}

/// Where model versions are.
#[derive(Debug, Clone)]
pub struct RegistryPlan {
    /// A folder registry: `file://…`.
    pub url: String,
    /// Bundle that becomes version 1, with the pipeline's alias, where the registry does not know the model yet.
    pub initial: Option<PathBuf>,
}

/// Types that keys, fields and features have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Deserialize)]
#[serde(from = "Element")]
pub enum DataType {
    /// 64-bit signed.
    Int64,
    /// 64-bit IEEE 754.
    Float64,
    /// True or false.
    Boolean,
    /// UTF-8.
    String,
    /// Milliseconds since 1970 UTC.
    Timestamp,
    /// Values of one type in an order, none of them null. Features have it, and neither keys nor fields.
    List(Element),
}

/// Types that keys and fields have, and the values of lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Element {
    /// 64-bit signed.
    Int64,
    /// 64-bit IEEE 754.
    Float64,
    /// True or false.
    Boolean,
    /// UTF-8.
    String,
    /// Milliseconds since 1970 UTC.
    Timestamp,
}

impl From<Element> for DataType {
    fn from(element: Element) -> Self {
        match element {
            Element::Int64 => Self::Int64,
            Element::Float64 => Self::Float64,
            Element::Boolean => Self::Boolean,
            Element::String => Self::String,
            Element::Timestamp => Self::Timestamp,
        }
    }
}

impl DataType {
    /// The Arrow type of a column of this type.
    pub fn to_arrow(self) -> arrow::datatypes::DataType {
        use arrow::datatypes as a;
        match self {
            Self::Int64 => a::DataType::Int64,
            Self::Float64 => a::DataType::Float64,
            Self::Boolean => a::DataType::Boolean,
            Self::String => a::DataType::Utf8,
            Self::Timestamp => a::DataType::Timestamp(a::TimeUnit::Millisecond, Some("UTC".into())),
            Self::List(element) => {
                a::DataType::List(Arc::new(a::Field::new_list_field(Self::from(element).to_arrow(), false)))
            }
        }
    }

    /// The same as a type of lists' values; none for a list.
    pub fn element(self) -> Option<Element> {
        match self {
            Self::Int64 => Some(Element::Int64),
            Self::Float64 => Some(Element::Float64),
            Self::Boolean => Some(Element::Boolean),
            Self::String => Some(Element::String),
            Self::Timestamp => Some(Element::Timestamp),
            Self::List(_) => None,
        }
    }

    /// True for lists.
    pub fn is_list(self) -> bool {
        matches!(self, Self::List(_))
    }
}

impl serde::Serialize for DataType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// That of [`Element`]: no one declares a list.
impl schemars::JsonSchema for DataType {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "DataType".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        Element::json_schema(generator)
    }
}

impl std::fmt::Display for DataType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Int64 => "int64",
            Self::Float64 => "float64",
            Self::Boolean => "boolean",
            Self::String => "string",
            Self::Timestamp => "timestamp",
            Self::List(element) => return write!(f, "list<{}>", Self::from(*element)),
        })
    }
}

/// A named, typed column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: Arc<str>,
    /// Type.
    pub data_type: DataType,
}

/// What features are about.
#[derive(Debug, Clone)]
pub struct EntityPlan {
    /// Entity name.
    pub name: String,
    /// Join keys in the order of the file: `Int64` or `String` each.
    pub keys: Vec<Column>,
}

/// How a record's value is written.
#[derive(Debug, Clone)]
pub enum Format {
    /// One JSON object a record.
    Json,
    /// Avro, with or without Confluent framing (told apart record by record).
    Avro {
        /// The reader's schema, as JSON text.
        schema: String,
    },
    /// Protobuf, with or without Confluent framing (told apart record by record).
    Protobuf {
        /// The message that each record is, from a descriptor set.
        message: Arc<Message>,
    },
}

/// Unit of an event-time field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TimeUnit {
    /// Seconds since 1970 UTC (fractions allowed).
    S,
    /// Milliseconds since 1970 UTC.
    Ms,
    /// Microseconds since 1970 UTC.
    Us,
    /// Nanoseconds since 1970 UTC.
    Ns,
    /// RFC 3339 text, or a date `YYYY-MM-DD` meaning its midnight UTC.
    Iso,
}

/// One source topic.
#[derive(Debug, Clone)]
pub struct SourcePlan {
    /// Name in the file.
    pub name: Arc<str>,
    /// Topic.
    pub topic: Arc<str>,
    /// Value format.
    pub format: Format,
    /// Declared fields of the record that anything uses: the entity's keys, the event time, what `where`, `derive`
    /// and the feature groups need. Other fields are skipped while decoding.
    pub fields: Vec<Column>,
    /// For each entity key, in the entity's order: the field that holds it.
    pub key_fields: Vec<Arc<str>>,
    /// Field with the event time; empty for a table that goes by its records' timestamps.
    pub event_time: Arc<str>,
    /// Its unit.
    pub event_time_unit: TimeUnit,
    /// How far an event may lie behind the newest event of its partition.
    pub out_of_order: Duration,
    /// How far an event may lie ahead of its Kafka record timestamp before it is quarantined.
    pub ahead: Duration,
    /// After this long without a record a partition no longer holds back the others of its task.
    pub idle_after: Duration,
    /// Keeps the records for which it is true (SQL; null is not true).
    pub filter: Option<String>,
    /// Added columns: name, SQL over the record and the columns before it, type.
    pub derive: Vec<(Column, String)>,
    /// Where the topic is a table instead of events.
    pub table: Option<TablePlan>,
    /// Where the topic is driftline's own, with the events of another source keyed by this one's entity.
    pub rekeyed: Option<Arc<RekeyPlan>>,
}

/// What a table has besides: a topic whose newest row of a key is what is true of it. Its feature group has one feature a
/// column, `<table>_<column>`, of function `last` over the lifetime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablePlan {
    /// Columns of its source that are features, in the order of its group's features.
    pub columns: Vec<Column>,
    /// The instant of a row is its record's Kafka timestamp, and there is no event-time field. That of a row without a value
    /// always is.
    pub record_time: bool,
    /// How the record's key is read, which is all that a row without a value has.
    pub record_key: RecordKey,
}

/// How a record's key is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RecordKey {
    /// The join key itself: UTF-8 text, or an integer in decimal digits.
    Text,
    /// A JSON object with the fields of the join keys.
    Json,
    /// Eight bytes, the most significant first, as Java's `LongSerializer` writes them.
    Long,
    /// Avro: framed with the id of its schema in the registry, a record with the fields of the join keys or the join key itself;
    /// or the join key alone, plain.
    Avro,
}

/// Events of a source that are keyed anew.
#[derive(Debug, Clone)]
pub struct RekeyPlan {
    /// The source, with the fields that keying takes: the keys of the other entity, the event time, what `where` needs.
    pub from: SourcePlan,
    /// Partitions of the topic, where declared; else as many as the source's.
    pub partitions: Option<u32>,
    /// How long the topic keeps its records; `None` is for ever.
    pub retention: Option<Duration>,
}

/// One window of a feature group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowPlan {
    /// As written: `30d`, `lifetime`. The suffix of the feature's name.
    pub label: String,
    /// Length in milliseconds; `None` is a lifetime.
    pub length_ms: Option<i64>,
    /// Tile length in milliseconds: the tail moves in steps of this, so that the value at *t* covers
    /// `(floor((t − length) / tile) · tile, t]`. Divides the length, one day (or is a multiple of it), and every larger
    /// window's tile. 1 for an exact window: its events are kept one by one. 0 for a lifetime.
    pub tile_ms: i64,
}

/// Aggregations of one source's field over windows.
#[derive(Debug, Clone)]
pub struct GroupPlan {
    /// Name: prefix of its features, and the name of its Feast feature view.
    pub name: String,
    /// Index in [`Plan::sources`].
    pub source: usize,
    /// Column of the source to aggregate; `None` counts events.
    pub of: Option<Column>,
    /// Keeps the events for which it is true (SQL over the source's row).
    pub filter: Option<String>,
    /// Half-life of the events in milliseconds, where they decay.
    pub half_life_ms: Option<i64>,
    /// Categories, where each feature is of one of them.
    pub by: Option<ByPlan>,
    /// Windows, shortest first, a lifetime last.
    pub windows: Vec<WindowPlan>,
    /// Features in order: function, index in `windows`, output column named `<group>_<function>_<window>`, or
    /// `<group>_<function>_<category>_<window>`.
    pub features: Vec<(Function, usize, Column)>,
}

/// Categories of the events of a feature group, or of windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByPlan {
    /// Column of the source that has the category: `String`, `Int64` or `Boolean`.
    pub column: Column,
    /// Categories, as written.
    pub categories: Vec<String>,
    /// For each feature of the group, or function of the windows: the index of its category.
    pub of_feature: Vec<usize>,
}

impl GroupPlan {
    /// Type of a function's values in this group, `None` where there is no such aggregate.
    pub fn output_type(&self, function: Function) -> Option<DataType> {
        let of = self.of.as_ref().map(|of| of.data_type);
        if self.half_life_ms.is_some() { function.decayed_type(of) } else { function.output_type(of) }
    }
}

impl ByPlan {
    /// SQL that is true of the events of a category.
    pub fn condition(&self, category: usize) -> String {
        let category = &self.categories[category];
        let literal = match self.column.data_type {
            DataType::String => format!("'{}'", category.replace('\'', "''")),
            _ => category.clone(),
        };
        format!("\"{}\" = {literal}", self.column.name.replace('"', "\"\""))
    }
}

/// A feature computed from the feature row.
#[derive(Debug, Clone)]
pub struct DerivedPlan {
    /// Output column.
    pub column: Column,
    /// SQL.
    pub sql: String,
    /// Uses features that are looked up, or others that do: computed once those are there. These come last.
    pub looked_up: bool,
}

/// Where the windows that are emitted begin and end. Event times in milliseconds; beginnings inclusive, ends exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// `[k · step, k · step + length)` for every whole k. `step` divides `length`; where they are equal the windows tumble.
    Hopping {
        /// Length of a window, ms.
        length_ms: i64,
        /// From the beginning of one to that of the next, ms.
        step_ms: i64,
    },
    /// From an entity's first event to `gap` after the last one that came less than `gap` after the one before it.
    Session {
        /// Gap, ms.
        gap_ms: i64,
    },
}

/// Windows that are emitted when they close.
#[derive(Debug, Clone)]
pub struct EmittedPlan {
    /// Name.
    pub name: String,
    /// Index in [`Plan::sources`].
    pub source: usize,
    /// Column of the source to aggregate; `None` counts events.
    pub of: Option<Column>,
    /// Keeps the events for which it is true (SQL over the source's row).
    pub filter: Option<String>,
    /// Their beginnings and ends.
    pub span: Span,
    /// Half-life of the events in milliseconds, where they decay. Weights are as of a window's end.
    pub half_life_ms: Option<i64>,
    /// Categories, where each function is of one of them.
    pub by: Option<ByPlan>,
    /// Functions in order, each with its output column, named `<function>`, or `<function>_<category>`.
    pub functions: Vec<(Function, Column)>,
    /// Open windows that have changed are emitted once in so much event time, ms.
    pub early_ms: Option<i64>,
    /// Topic of the rows.
    pub topic: Arc<str>,
}

impl EmittedPlan {
    /// The feature group that aggregates the same events by the same functions.
    pub(crate) fn as_group(&self) -> GroupPlan {
        GroupPlan {
            name: self.name.clone(),
            source: self.source,
            of: self.of.clone(),
            filter: self.filter.clone(),
            half_life_ms: self.half_life_ms,
            by: self.by.clone(),
            windows: Vec::new(),
            features: self.functions.iter().map(|(function, column)| (*function, 0, column.clone())).collect(),
        }
    }
}

/// Features of another entity that are read from the online store.
#[derive(Debug, Clone)]
pub struct LookupPlan {
    /// Name: prefix of its features.
    pub name: String,
    /// Feast project that they are stored under.
    pub project: String,
    /// Feast feature view that they belong to.
    pub view: String,
    /// Join keys of that entity, each with the feature of the row that has its value.
    pub keys: Vec<(Column, Arc<str>)>,
    /// The features as they are stored, and what they are in the row: `<lookup>_<feature>`.
    pub columns: Vec<(Column, Column)>,
    /// Rows that are older than the event by more than this do not count, ms.
    pub max_age_ms: Option<i64>,
    /// How long an answer may take.
    pub timeout: Duration,
    /// What to do without one.
    pub unavailable: Unavailable,
    /// With [`Unavailable::Stale`]: so long after they were read, features are still used, …
    pub stale_for: Duration,
    /// … those of so many entities a worker.
    pub stale_entities: usize,
}

/// What to do where the online store does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unavailable {
    /// Hold the events back until it does.
    Wait,
    /// Go on without the features.
    Null,
    /// Go on with those that were read last, for a while.
    Stale,
}

/// Exactly once or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// Output and offsets in one transaction.
    ExactlyOnce,
    /// Output acknowledged before offsets are committed; duplicates after a crash.
    AtLeastOnce,
}

/// When events are applied and scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Emit {
    /// As they arrive. What an event out of order changes, those before it have missed.
    Arrival,
    /// Once the watermark has passed them, in event-time order: the output does not depend on their order of arrival.
    EventTime,
}

/// Scoring.
#[derive(Debug, Clone)]
pub struct ScorePlan {
    /// Index in [`Plan::sources`] of the events that ask for a prediction.
    pub on: usize,
    /// When events are applied, those of all sources.
    pub emit: Emit,
    /// Name in the registry.
    pub model: String,
    /// Alias to follow.
    pub alias: String,
    /// Names of the model's inputs among [`Plan::feature_columns`], in order. All numeric or boolean.
    pub features: Vec<String>,
    /// A micro-batch closes at this many rows …
    pub batch_rows: usize,
    /// … or this many bytes …
    pub batch_bytes: usize,
    /// … or this long after its first row.
    pub batch_wait: Duration,
    /// How often the registry is asked whether the alias moved.
    pub poll_alias: Duration,
    /// Delivery of feature rows and predictions.
    pub delivery: Delivery,
    /// Topic of predictions: `<pipeline>.predictions`.
    pub topic: Arc<str>,
    /// ONNX Runtime execution providers in order of preference (`tensorrt`, `cuda`, `cpu`).
    pub providers: Vec<String>,
    /// Threads within one ONNX operator.
    pub threads: usize,
}

/// Labels.
#[derive(Debug, Clone)]
pub struct LabelsPlan {
    /// Topic, JSON or Avro like a source.
    pub topic: Arc<str>,
    /// Value format.
    pub format: Format,
    /// The fields below with their types: keys, `as_of`, `value`.
    pub fields: Vec<Column>,
    /// For each entity key: the field that holds it.
    pub key_fields: Vec<Arc<str>>,
    /// Field with the instant that the label is about (the prediction's event time), and its unit.
    pub as_of: (Arc<str>, TimeUnit),
    /// Field with the outcome: 0/1, boolean, or a number.
    pub value: Arc<str>,
    /// How long after the prediction its outcome is known.
    pub horizon: Duration,
}

/// When a monitoring window closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MonitorWindow {
    /// After this many predictions.
    Rows(u64),
    /// After this much event time.
    Time(Duration),
}

/// Drift monitoring.
#[derive(Debug, Clone)]
pub struct MonitorPlan {
    /// Window.
    pub window: MonitorWindow,
    /// Features to watch; the default is all of the model's. The prediction is always watched.
    pub features: Vec<String>,
    /// Predictions of so much event time after the first one are not judged: long windows are still filling up.
    pub warm_up: Duration,
    /// False-alarm budget: probability that a run of `horizon_windows` windows without drift raises any alarm.
    pub alpha: f64,
    /// Number of windows the budget is meant for.
    pub horizon_windows: u32,
    /// Tolerated shift: PSI up to this is not drift.
    pub tolerance: f64,
    /// Windows in a row without evidence before an incident resolves.
    pub resolve_after: u32,
    /// Topic of drift events: `<pipeline>.drift`.
    pub topic: Arc<str>,
    /// Compacted topic of the monitor's own state: `<pipeline>.monitor-state`.
    pub state_topic: Arc<str>,
}

/// Retraining.
#[derive(Debug, Clone)]
pub struct RetrainingPlan {
    /// Condition over a window's verdict: `drifted_features >= 1 for 2 windows`.
    pub when: String,
    /// No second event sooner than this after one (event time).
    pub cooldown: Duration,
    /// Program and arguments, run in the project's root. See docs/configuration.md for its contract.
    pub command: Vec<String>,
    /// The command is stopped after this long.
    pub timeout: Duration,
    /// How far the training range reaches back from the newest labelled row (event time).
    pub lookback: Duration,
    /// Labelled rows since the shift that must be there before training starts.
    pub fresh_labels: usize,
    /// Gates.
    pub gates: GatesPlan,
    /// Topic of retraining events: `<pipeline>.retraining`.
    pub topic: Arc<str>,
    /// Topic of the audit trail: `<pipeline>.audit`.
    pub audit_topic: Arc<str>,
}

/// What a candidate must pass.
#[derive(Debug, Clone)]
pub struct GatesPlan {
    /// Metric compared with the champion on the same held-out rows: `auc`, `brier`, `log_loss`, `rmse`, `mae`.
    pub metric: String,
    /// Least improvement over the champion (in the metric's better direction; may be negative).
    pub min_gain: f64,
    /// Least value of the metric, whatever the champion's (greatest for errors), if given.
    pub threshold: Option<f64>,
    /// Largest expected calibration error, if given.
    pub max_ece: Option<f64>,
    /// Longest p99 of scoring one row, if given.
    pub max_latency: Option<Duration>,
}

impl Plan {
    /// All features in order: the groups', then the derived ones, then those of lookups, then those derived from them.
    pub fn feature_columns(&self) -> Vec<Column> {
        self.groups
            .iter()
            .flat_map(|g| g.features.iter().map(|(_, _, c)| c.clone()))
            .chain(self.own_derived().map(|d| d.column.clone()))
            .chain(self.lookups.iter().flat_map(|lookup| lookup.columns.iter().map(|(_, column)| column.clone())))
            .chain(self.looked_up_derived().map(|d| d.column.clone()))
            .collect()
    }

    /// Features derived from the groups'.
    pub fn own_derived(&self) -> impl Iterator<Item = &DerivedPlan> {
        self.derived.iter().filter(|derived| !derived.looked_up)
    }

    /// Features derived from those that are looked up.
    pub fn looked_up_derived(&self) -> impl Iterator<Item = &DerivedPlan> {
        self.derived.iter().filter(|derived| derived.looked_up)
    }

    /// True where events are held until the watermark has passed them, and then applied in event-time order: where the
    /// pipeline asks for it, and where sources are keyed anew.
    pub fn is_in_event_time(&self) -> bool {
        self.score.as_ref().is_some_and(|score| score.emit == Emit::EventTime)
            || self.sources.iter().any(|source| source.rekeyed.is_some())
    }

    /// The sources that are keyed anew, of all entities.
    pub fn rekeyed(&self) -> impl Iterator<Item = (&SourcePlan, &Arc<RekeyPlan>)> {
        let plans = std::iter::once(self).chain(self.others.iter().map(Arc::as_ref));
        plans.flat_map(|plan| &plan.sources).filter_map(|source| Some((source, source.rekeyed.as_ref()?)))
    }

    /// The plan about an entity, by its name.
    pub fn about(&self, entity: &str) -> Option<&Plan> {
        let plans = std::iter::once(self).chain(self.others.iter().map(Arc::as_ref));
        plans.into_iter().find(|plan| plan.entity.name == entity)
    }

    /// Consumer group of a stage: `<pipeline>.<stage>`. The fused run and the features stage share `features`, because
    /// they consume the same sources to the same end.
    pub fn group(&self, stage: &str) -> String {
        format!("{}.{stage}", self.name)
    }

    /// Topic of feature rows between the stages when they run apart.
    pub fn features_topic(&self) -> String {
        format!("{}.features", self.name)
    }

    /// Topic of dead letters of all stages.
    pub fn dead_letter_topic(&self) -> String {
        format!("{}.dead-letters", self.pipeline.as_deref().unwrap_or(&self.name))
    }

    /// Compacted topic that remembers which dead letters were replayed.
    pub fn replayed_letters_topic(&self) -> String {
        format!("{}.dead-letters-replayed", self.name)
    }
}
