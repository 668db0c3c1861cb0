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
//! What the words of rows and lanes mean is in the schema's metadata (`driftline.layout`, one line a source) and explained
//! in `aggregate.rs`. A text is its place in `texts`, counted from 1; 0 is none; `name#` is the hash of a text. Metadata
//! besides: `driftline.format`, `driftline.definition`, `driftline.partition`, and `driftline.task`, the clock and the
//! positions as JSON.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, ListArray, RecordBatch, StringArray, TimestampMillisecondArray, UInt64Array,
};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType as ArrowType, Field, Schema, SchemaRef, TimestampMillisecondType, UInt64Type};
use serde::{Deserialize, Serialize};

use super::WindowError;
use super::emitted::pieces;
use super::engine::{Engine, Source, Value};
use super::entities::{Keys, decode_keys};
use super::held::Standing;
use super::ordered::visit;
use super::state::State;
use super::task::Task;
use crate::broker::NextOffset;
use crate::config::plan::DataType;

/// Version of the layout described above.
const FORMAT: &str = "1";

/// A batch is closed at this many entities …
const BATCH_ENTITIES: usize = 1 << 16;

/// … or this many words.
const BATCH_WORDS: usize = 1 << 24;

const KEY_FORMAT: &str = "driftline.format";
const KEY_DEFINITION: &str = "driftline.definition";
const KEY_PARTITION: &str = "driftline.partition";
const KEY_LAYOUT: &str = "driftline.layout";
const KEY_TASK: &str = "driftline.task";
const KEY_WINDOWS: &str = "driftline.windows";

/// `newest_event_time` of the rows that are no entities.
pub(super) const PIECE: i64 = i64::MIN;

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

/// A list column, being written.
struct Lists<T> {
    values: Vec<T>,
    ends: Vec<i32>,
}

impl<T> Default for Lists<T> {
    fn default() -> Self {
        Self { values: Vec::new(), ends: vec![0] }
    }
}

impl<T> Lists<T> {
    fn close(&mut self) {
        self.ends.push(i32::try_from(self.values.len()).expect("batches are closed far below 2³¹ words"));
    }

    fn finish(self, array: impl FnOnce(Vec<T>) -> ArrayRef) -> ArrayRef {
        let values = array(self.values);
        let field = Arc::new(Field::new_list_field(values.data_type().clone(), false));
        Arc::new(ListArray::new(field, OffsetBuffer::new(ScalarBuffer::from(self.ends)), values, None))
    }
}

#[derive(Default)]
struct SourceColumns {
    rows: Lists<u64>,
    tiles: Lists<u64>,
    beyond: Lists<u64>,
    merged: Vec<Option<i64>>,
}

pub(super) fn take(task: &Task) -> Result<Vec<RecordBatch>, WindowError> {
    let schema = schema(task)?;
    let mut batches = Vec::new();
    let mut ids = Vec::new();
    let mut texts = Lists::default();
    let mut columns: Vec<SourceColumns> = Vec::new();
    columns.resize_with(task.engine.sources(), SourceColumns::default);
    let mut words = 0;
    for id in task.entities.ids() {
        ids.push(id);
        let mut local = HashMap::new();
        for ((state, source), columns) in task.entities.states(id).iter().zip(&task.engine.sources).zip(&mut columns) {
            words += columns.add(source, state, |word| {
                if *word != 0 {
                    let next = local.len() as u64 + 1;
                    *word = *local.entry(*word).or_insert_with(|| {
                        texts.values.push(task.texts.get(*word).to_owned());
                        next
                    });
                }
            });
        }
        texts.close();
        if ids.len() >= BATCH_ENTITIES || words >= BATCH_WORDS {
            batches.push(close(task, &schema, &mut ids, &mut texts, &mut columns)?);
            words = 0;
        }
    }
    let pieces = pieces::take(task, &schema)?;
    if !ids.is_empty() || (batches.is_empty() && pieces.is_empty()) {
        batches.push(close(task, &schema, &mut ids, &mut texts, &mut columns)?);
    }
    batches.extend(pieces);
    Ok(batches)
}

impl SourceColumns {
    fn add(&mut self, source: &Source, state: &State, mut renumber: impl FnMut(&mut u64)) -> usize {
        let layout = &source.layout;
        let parts = state.parts();
        let start = self.rows.values.len();
        // Chunks lie between some rows and others; sorting is stable, and no time is in two of the pieces.
        self.rows.values.extend_from_slice(parts.rows);
        if parts.chunks.iter().next().is_some() {
            parts.chunks.iter().for_each(|rows| self.rows.values.extend_from_slice(rows));
            let mut rows: Vec<&[u64]> = self.rows.values[start..].chunks_exact(layout.row).collect();
            rows.sort_by_key(|row| row[0] as i64);
            let sorted = rows.concat();
            self.rows.values.truncate(start);
            self.rows.values.extend_from_slice(&sorted);
        }
        let tiles = self.tiles.values.len();
        self.tiles.values.extend_from_slice(parts.tiles);
        let beyond = self.beyond.values.len();
        self.beyond.values.extend_from_slice(parts.beyond);
        visit(&mut self.rows.values[start..], layout.row, 0, &source.text_words, &mut renumber);
        visit(&mut self.tiles.values[tiles..], layout.tile, 1, &source.text_lanes, &mut renumber);
        visit(&mut self.beyond.values[beyond..], layout.lanes.width().max(1), 0, &source.text_lanes, &mut renumber);
        let added = self.rows.values.len() - start + parts.tiles.len() + parts.beyond.len();
        [&mut self.rows, &mut self.tiles, &mut self.beyond].into_iter().for_each(Lists::close);
        self.merged.push((parts.merged != i64::MIN).then_some(parts.merged));
        added
    }
}

fn close(
    task: &Task,
    schema: &SchemaRef,
    ids: &mut Vec<u32>,
    texts: &mut Lists<String>,
    columns: &mut [SourceColumns],
) -> Result<RecordBatch, WindowError> {
    let mut arrays = decode_keys(ids.iter().map(|&id| task.entities.key(id)), &task.engine.keys);
    let newest = ids.iter().map(|&id| task.entities.get(id).newest);
    arrays.push(Arc::new(TimestampMillisecondArray::from_iter_values(newest).with_timezone("UTC")));
    arrays.push(std::mem::take(texts).finish(|texts| Arc::new(StringArray::from(texts))));
    for columns in columns {
        let SourceColumns { rows, tiles, beyond, merged } = std::mem::take(columns);
        for words in [rows, tiles, beyond] {
            arrays.push(words.finish(|words| Arc::new(UInt64Array::from(words))));
        }
        arrays.push(Arc::new(TimestampMillisecondArray::from(merged).with_timezone("UTC")));
    }
    arrays.extend(task.engine.emitted.iter().map(|_| pieces::none(ids.len())));
    ids.clear();
    RecordBatch::try_new(schema.clone(), arrays).map_err(|error| WindowError::Rows(error.to_string()))
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

fn schema(task: &Task) -> Result<SchemaRef, WindowError> {
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
        }),
    };
    let record = serde_json::to_string(&record).map_err(|error| WindowError::Rows(error.to_string()))?;
    let metadata = [
        (KEY_FORMAT, FORMAT.to_owned()),
        (KEY_DEFINITION, task.engine.definition.clone()),
        (KEY_PARTITION, task.partition.to_string()),
        (KEY_LAYOUT, layout_in_words(&task.engine)),
        (KEY_TASK, record),
    ];
    let windows = pieces::layout_in_words(&task.engine).map(|layout| (KEY_WINDOWS, layout));
    let metadata = metadata.into_iter().chain(windows).map(|(key, value)| (key.to_owned(), value)).collect();
    Ok(Arc::new(Schema::new_with_metadata(columns_schema(&task.engine), metadata)))
}

pub(super) fn restore(engine: Arc<Engine>, partition: i32, batches: &[RecordBatch]) -> Result<Task, WindowError> {
    let corrupt = |reason: String| WindowError::Corrupt { reason };
    let first = batches.first().ok_or_else(|| corrupt("it has no batch".to_owned()))?;
    let schema = first.schema();
    let metadata = |key: &str| {
        let found = schema.metadata().get(key).map(String::as_str);
        found.ok_or_else(|| corrupt(format!("its schema has no `{key}`; it is not a checkpoint of driftline")))
    };
    let format = metadata(KEY_FORMAT)?;
    if format != FORMAT {
        return Err(corrupt(format!("it has format {format}, this version of driftline reads format {FORMAT}")));
    }
    let definition = metadata(KEY_DEFINITION)?;
    if definition != engine.definition {
        return Err(WindowError::OtherDefinition { expected: engine.definition.clone(), found: definition.to_owned() });
    }
    let found = metadata(KEY_PARTITION)?;
    if found != partition.to_string() {
        return Err(corrupt(format!("it is of partition {found}, not {partition}")));
    }
    let windows = pieces::layout_in_words(&engine).unwrap_or_default();
    let found = schema.metadata().get(KEY_WINDOWS).cloned().unwrap_or_default();
    if found != windows {
        return Err(WindowError::OtherWindows { expected: windows, found });
    }
    let layout = metadata(KEY_LAYOUT)?;
    if layout != layout_in_words(&engine) {
        return Err(corrupt(format!("its words are laid out as `{layout}`, not as `{}`", layout_in_words(&engine))));
    }
    let record: TaskRecord =
        serde_json::from_str(metadata(KEY_TASK)?).map_err(|error| corrupt(format!("{KEY_TASK}: {error}")))?;
    if record.sources.len() != engine.sources() {
        return Err(corrupt(format!("it has {} sources, not {}", record.sources.len(), engine.sources())));
    }
    let fields = columns_schema(&engine);
    let mut task = Task::at(engine, partition, record.sources.iter().map(|source| source.next).collect());
    for (index, source) in record.sources.iter().enumerate() {
        task.applied[index] = source.applied;
        task.time.sources[index].newest = source.newest;
    }
    task.time.settled = record.settled;
    task.time.watermark = record.watermark;
    task.offered = task.time.sources.clone();
    if let (Some(held), Some(saved)) = (&mut task.held, record.held) {
        task.reordered = saved.rows;
        for (offered, &newest) in task.offered.iter_mut().zip(&saved.newest) {
            offered.newest = newest;
        }
        let resumed = record.sources.iter().zip(saved.newest);
        let resumed = resumed.map(|(source, newest)| Standing { next: source.next, newest });
        held.restore(saved.frontier.unwrap_or(i64::MIN), saved.read.into_iter().zip(resumed));
    }
    for batch in batches {
        let found = batch.schema();
        let same = found.fields().len() == fields.len()
            && found
                .fields()
                .iter()
                .zip(&fields)
                .all(|(found, field)| found.name() == field.name() && found.data_type() == field.data_type());
        if !same {
            return Err(corrupt(format!("its columns are {:?}", found.fields())));
        }
        restore_batch(&mut task, batch).map_err(corrupt)?;
    }
    task.entities.account();
    Ok(task)
}

fn restore_batch(task: &mut Task, batch: &RecordBatch) -> Result<(), String> {
    let engine = task.engine.clone();
    let width = engine.keys.len();
    let key_columns: Vec<usize> = (0..width).collect();
    let keys = Keys::encode(batch, &key_columns, &engine.keys)
        .map_err(|part| format!("key `{}` has a null", engine.keys[part].name))?;
    let newest = batch.column(width).as_primitive::<TimestampMillisecondType>();
    let texts = batch.column(width + 1).as_list::<i32>();
    for entity in 0..batch.num_rows() {
        let local = texts.value(entity);
        let numbers: Vec<u64> =
            local.as_string::<i32>().iter().map(|text| task.texts.number(text.unwrap_or(""))).collect();
        if newest.value(entity) == PIECE {
            pieces::restore(task, batch, entity, keys.get(entity), &numbers)?;
            continue;
        }
        let id = task.entities.entity(keys.get(entity));
        task.entities.get_mut(id).newest = newest.value(entity);
        for (index, source) in engine.sources.iter().enumerate() {
            let layout = &source.layout;
            let columns = &batch.columns()[width + 2 + 4 * index..][..4];
            let mut damaged = false;
            let mut words = |column: usize, item: usize, head: usize, at: &[usize]| {
                let list = columns[column].as_list::<i32>().value(entity);
                let mut words = list.as_primitive::<UInt64Type>().values().to_vec();
                damaged |= item == 0 && !words.is_empty() || item > 0 && words.len() % item != 0;
                visit(&mut words, item.max(1), head, if damaged { &[] } else { at }, &mut |word| {
                    if *word != 0 {
                        let number = numbers.get(*word as usize - 1);
                        damaged |= number.is_none();
                        *word = number.copied().unwrap_or(0);
                    }
                });
                words
            };
            let rows = words(0, layout.row, 0, &source.text_words);
            let tiles = words(1, layout.tile, 1, &source.text_lanes);
            let beyond = words(2, layout.lanes.width(), 0, &source.text_lanes);
            if damaged {
                return Err(format!("the words of source {} in row {entity} do not fit its layout", source.name));
            }
            let merged = columns[3].as_primitive::<TimestampMillisecondType>();
            let merged = if merged.is_valid(entity) { merged.value(entity) } else { i64::MIN };
            *task.entities.state(id, index) = State::from_parts(layout, rows, tiles, beyond, merged);
        }
    }
    Ok(())
}
