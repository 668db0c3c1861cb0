//! Checkpoints: a task's state as Arrow batches, and back.
//!
//! One row an entity. Columns:
//!
//! | column | type | content |
//! |---|---|---|
//! | the entity's keys | int64, utf8 | |
//! | `newest_event_time` | timestamp ms | event time of its newest event of any source |
//! | `texts` | list of utf8 | texts that the words refer to |
//! | `<source>:rows` | list of uint64 | single events, ascending by time: time, mask, values |
//! | `<source>:tiles` | list of uint64 | aggregates, ascending by end: end, lanes |
//! | `<source>:beyond` | list of uint64 | lanes of all before the longest window, for lifetime windows; else empty |
//! | `<source>:merged` | timestamp ms | newest event time in tiles or beyond; null for none |
//! | `window:<name>` | list of uint64 | a piece of what is open of a table of `[windows]`: head, lanes |
//!
//! A piece of an open window has a row of its own, whose `newest_event_time` is the least there is and whose other lists are
//! empty. What its words mean is in `driftline.windows`.
//!
//! A checkpoint of what changed (`driftline.follows` in the metadata: the number of checkpoints it follows since the whole
//! one) has the entities that changed, the pieces of open windows that changed, and for each entity that is forgotten a row
//! whose `newest_event_time` is the least but one. Batches are read in the order they were taken in; of two rows of an entity
//! the later one counts, and of the metadata the last. Of the pieces of a tumbling or hopping window the later one of each key
//! and start counts; the sessions of an entity that are in one checkpoint take the place of all its sessions before. What had
//! closed by the last checkpoint's watermark is not open any more, whatever pieces there are.
//!
//! What the words of rows and lanes mean is in the schema's metadata (`driftline.layout`, one line a source) and explained
//! in `aggregate.rs`. A text is its place in `texts`, counted from 1; 0 is none; `name#` is the hash of a text. Metadata
//! besides: `driftline.format`, `driftline.definition`, `driftline.partition`, and `driftline.task`, the clock and the
//! positions as JSON.

mod encode;
mod packed;
mod restore;

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType as ArrowType, Field, Schema, SchemaRef};
use serde::{Deserialize, Serialize};

pub(super) use self::encode::Encoder;
pub(super) use self::packed::{Packed, PackedRows};
pub(super) use self::restore::Restore;
use super::WindowError;
use super::channels::Channels;
use super::cold::OUT;
use super::emitted::pieces;
use super::engine::{Engine, Source, Value};
use super::state::State;
use super::task::Task;
use crate::broker::NextOffset;
use crate::config::plan::DataType;

/// Version of the layout described above.
const FORMAT: &str = "1";

/// Version of checkpoints that hold only some of the pieces of open windows, so that who takes them for all refuses them.
const FORMAT_OF_CHANGES: &str = "2";

const KEY_FORMAT: &str = "driftline.format";
const KEY_DEFINITION: &str = "driftline.definition";
const KEY_PARTITION: &str = "driftline.partition";
const KEY_LAYOUT: &str = "driftline.layout";
const KEY_TASK: &str = "driftline.task";
const KEY_WINDOWS: &str = "driftline.windows";
const KEY_FOLLOWS: &str = "driftline.follows";

/// `newest_event_time` of the rows that are no entities.
pub(super) const PIECE: i64 = i64::MIN;

/// `newest_event_time` of the rows of entities that are forgotten.
const GONE: i64 = i64::MIN + 1;

/// Words that an entity takes besides those of its states.
const ENTITY_WORDS: usize = 4;

/// What a task knows besides its entities.
#[derive(Debug, Serialize, Deserialize)]
struct TaskRecord {
    sources: Vec<SourceRecord>,
    /// Rows will be asked for as of this instant and later, ms.
    settled: i64,
    watermark: Option<i64>,
    /// Where rows are applied in event-time order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    held: Option<HeldRecord>,
}

/// What tells applied rows from those that were held: they are not in the snapshot.
#[derive(Debug, Serialize, Deserialize)]
struct HeldRecord {
    /// Of the rows of each source below `read`, those up to this instant are applied. `None` before the first.
    frontier: Option<i64>,
    read: Vec<Option<NextOffset>>,
    /// Highest event time of each source before its `next`.
    newest: Vec<Option<i64>>,
    /// Rows applied.
    rows: i64,
    /// By source: event times of the partitions before, where it is keyed anew.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    channels: Vec<Option<Channels>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SourceRecord {
    name: String,
    /// First unapplied offset.
    next: Option<NextOffset>,
    /// The offset after the last applied row, 0 before the first.
    applied: i64,
    /// Highest event time.
    newest: Option<i64>,
}

/// The whole state of a task.
pub(super) fn take(task: &Task) -> Result<Vec<RecordBatch>, WindowError> {
    let schema = schema(task, 0)?;
    let mut batches = Vec::new();
    let mut encoder = Encoder::new(schema.clone(), task.engine.sources());
    for id in task.entities.ids() {
        let (key, newest) = (task.entities.key(id), task.entities.get(id).newest);
        let states = task.entities.states(id);
        let packed = match &task.cold {
            Some(cold) if task.entities.get(id).changed & OUT != 0 => cold.get(&task.engine, id).map(Some),
            Some(cold) if states.iter().any(State::is_spilled) => {
                cold.pack(&task.engine, states, &task.texts).map(Some)
            }
            _ => Ok(None),
        };
        match packed.map_err(|reason| WindowError::Cold { reason })? {
            Some(packed) => encoder.add_packed(key, newest, packed),
            None => encoder.add(&task.engine, key, newest, states, &task.texts),
        };
        if encoder.is_full() {
            batches.push(encoder.close(&task.engine));
        }
    }
    let pieces = pieces::take(task, &schema);
    if !encoder.is_empty() || (batches.is_empty() && pieces.is_empty()) {
        batches.push(encoder.close(&task.engine));
    }
    batches.extend(pieces);
    Ok(batches)
}

/// Words that the rows of a batch take.
pub(super) fn words(batch: &RecordBatch) -> usize {
    let lists = batch.columns().iter().filter_map(|column| column.as_list_opt::<i32>());
    let numbers = lists.filter(|list| list.value_type() == ArrowType::UInt64);
    ENTITY_WORDS * batch.num_rows() + numbers.map(|list| list.values().len()).sum::<usize>()
}

fn columns_schema(engine: &Engine) -> Vec<Field> {
    let time = DataType::Timestamp.to_arrow();
    let list = |item: ArrowType| ArrowType::List(Arc::new(Field::new_list_field(item, false)));
    let keys = engine.keys.iter().map(|key| Field::new(key.name.as_ref(), key.data_type.to_arrow(), false));
    let mut fields: Vec<Field> = keys.collect();
    fields.push(Field::new("newest_event_time", time.clone(), false));
    fields.push(Field::new("texts", list(ArrowType::Utf8), false));
    for source in &engine.sources {
        for part in ["rows", "tiles", "beyond"] {
            fields.push(Field::new(format!("{}:{part}", source.name), list(ArrowType::UInt64), false));
        }
        fields.push(Field::new(format!("{}:merged", source.name), time.clone(), true));
    }
    fields.extend(pieces::fields(engine));
    fields
}

/// One line a source.
fn layout_in_words(engine: &Engine) -> String {
    let line = |source: &Source| {
        let layout = &source.layout;
        let masks = vec!["mask"; layout.lanes.mask_words()];
        let value =
            |value: &Value| format!("{}{}", source.columns[value.column].name, if value.hashed { "#" } else { "" });
        let values: Vec<String> = source.values.iter().map(value).collect();
        let lanes: Vec<String> = layout.lanes.names().collect();
        format!("{} row: time {} {} lanes: {}\n", source.name, masks.join(" "), values.join(" "), lanes.join(" "))
    };
    engine.sources.iter().map(line).collect()
}

/// Of the batches of a checkpoint that follows so many others since the whole one.
pub(super) fn schema(task: &Task, follows: u32) -> Result<SchemaRef, WindowError> {
    let sources = task.engine.sources.iter().zip(task.next()).zip(&task.applied).zip(&task.time.sources);
    let record = TaskRecord {
        sources: sources
            .map(|(((source, next), &applied), time)| SourceRecord {
                name: source.name.to_string(),
                next,
                applied,
                newest: time.newest,
            })
            .collect(),
        settled: task.time.settled,
        watermark: task.time.watermark,
        held: task.held.as_ref().map(|held| HeldRecord {
            frontier: held.frontier(),
            read: held.read(),
            newest: held.left().into_iter().map(|left| left.newest).collect(),
            rows: task.reordered,
            channels: match task.settled_channels.iter().any(Option::is_some) {
                true => task.settled_channels.clone(),
                false => Vec::new(),
            },
        }),
    };
    let record = serde_json::to_string(&record).map_err(|error| WindowError::Rows(error.to_string()))?;
    let format = if follows > 0 && !task.engine.emitted.is_empty() { FORMAT_OF_CHANGES } else { FORMAT };
    let metadata = [
        (KEY_FORMAT, format.to_owned()),
        (KEY_DEFINITION, task.engine.definition.clone()),
        (KEY_PARTITION, task.partition.to_string()),
        (KEY_LAYOUT, layout_in_words(&task.engine)),
        (KEY_TASK, record),
    ];
    let windows = pieces::layout_in_words(&task.engine).map(|layout| (KEY_WINDOWS, layout));
    let follows = (follows > 0).then(|| (KEY_FOLLOWS, follows.to_string()));
    let metadata =
        metadata.into_iter().chain(windows).chain(follows).map(|(key, value)| (key.to_owned(), value)).collect();
    Ok(Arc::new(Schema::new_with_metadata(columns_schema(&task.engine), metadata)))
}
