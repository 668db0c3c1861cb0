//! From the batches of checkpoints back to a task.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Field, SchemaRef, TimestampMillisecondType, UInt64Type};

use super::{
    FORMAT, FORMAT_OF_CHANGES, GONE, KEY_DEFINITION, KEY_FOLLOWS, KEY_FORMAT, KEY_LAYOUT, KEY_PARTITION, KEY_TASK,
    KEY_WINDOWS, PIECE, TaskRecord, columns_schema, layout_in_words, words,
};
use crate::window::WindowError;
use crate::window::capture::{CLEAN, Captures, Chain};
use crate::window::cold::{Cold, OUT};
use crate::window::emitted::pieces;
use crate::window::engine::Engine;
use crate::window::entities::Keys;
use crate::window::held::Standing;
use crate::window::ordered::visit;
use crate::window::state::State;
use crate::window::task::Task;

/// A task being restored, batch by batch.
#[derive(Debug)]
pub(in crate::window) struct Restore {
    task: Task,
    fields: Vec<Field>,
    /// Of the last batch.
    schema: Option<SchemaRef>,
    record: Option<TaskRecord>,
    follows: u32,
    chain: Chain,
}

impl Restore {
    /// Of this partition, with a cold store where memory has a limit.
    pub fn new(engine: Arc<Engine>, partition: i32, cold: Option<Cold>) -> Self {
        let fields = columns_schema(&engine);
        let positions = vec![None; engine.sources()];
        let mut task = Task::at(engine, partition, positions);
        task.cold = cold;
        Self { task, fields, schema: None, record: None, follows: 0, chain: Chain::default() }
    }

    /// Takes the next batch.
    pub fn push(&mut self, batch: &RecordBatch) -> Result<(), WindowError> {
        let schema = batch.schema();
        if self.schema.as_ref().is_none_or(|last| !Arc::ptr_eq(last, &schema)) {
            self.check(&schema)?;
            self.schema = Some(schema);
        }
        let held = |task: &Task| task.entities.len() + task.windows.pieces();
        let before = held(&self.task);
        restore_batch(&mut self.task, batch).map_err(corrupt)?;
        let added = held(&self.task).saturating_sub(before);
        self.chain.add(self.follows, words(batch), added);
        if self.task.cold.is_some() {
            self.task.entities.account();
            self.task.settle()?;
        }
        Ok(())
    }

    /// Reads the metadata.
    fn check(&mut self, schema: &SchemaRef) -> Result<(), WindowError> {
        let engine = &self.task.engine;
        let metadata = |key: &str| {
            let found = schema.metadata().get(key).map(String::as_str);
            found.ok_or_else(|| corrupt(format!("its schema has no `{key}`; it is not a checkpoint of driftline")))
        };
        let format = metadata(KEY_FORMAT)?;
        if ![FORMAT, FORMAT_OF_CHANGES].contains(&format) {
            let reads = format!("this version of driftline reads formats {FORMAT} and {FORMAT_OF_CHANGES}");
            return Err(corrupt(format!("it has format {format}, {reads}")));
        }
        let found = metadata(KEY_DEFINITION)?;
        if found != engine.definition {
            return Err(WindowError::OtherDefinition { expected: engine.definition.clone(), found: found.to_owned() });
        }
        let found = metadata(KEY_PARTITION)?;
        if found != self.task.partition.to_string() {
            return Err(corrupt(format!("it is of partition {found}, not {}", self.task.partition)));
        }
        let windows = pieces::layout_in_words(engine).unwrap_or_default();
        let found = schema.metadata().get(KEY_WINDOWS).cloned().unwrap_or_default();
        if found != windows {
            return Err(WindowError::OtherWindows { expected: windows, found });
        }
        let (layout, expected) = (metadata(KEY_LAYOUT)?, layout_in_words(engine));
        if layout != expected {
            return Err(corrupt(format!("its words are laid out as `{layout}`, not as `{expected}`")));
        }
        let record: TaskRecord =
            serde_json::from_str(metadata(KEY_TASK)?).map_err(|error| corrupt(format!("{KEY_TASK}: {error}")))?;
        if record.sources.len() != engine.sources() {
            return Err(corrupt(format!("it has {} sources, not {}", record.sources.len(), engine.sources())));
        }
        let found = schema.fields();
        let same = found.len() == self.fields.len()
            && found
                .iter()
                .zip(&self.fields)
                .all(|(found, field)| found.name() == field.name() && found.data_type() == field.data_type());
        if !same {
            return Err(corrupt(format!("its columns are {found:?}")));
        }
        let follows = schema.metadata().get(KEY_FOLLOWS).map_or("0", String::as_str);
        let follows: u32 = follows.parse().map_err(|_| corrupt(format!("{KEY_FOLLOWS} is `{follows}`")))?;
        let expected = if self.record.is_none() { 0 } else { self.follows + 1 };
        if follows != expected && (self.record.is_none() || follows != self.follows) {
            return Err(corrupt(format!("a part that follows {follows} others stands where {expected} are before it")));
        }
        if follows != self.follows {
            self.task.windows.next_checkpoint();
        }
        self.follows = follows;
        self.record = Some(record);
        Ok(())
    }

    /// The task.
    pub fn finish(self) -> Result<Task, WindowError> {
        let Self { mut task, record, chain, .. } = self;
        let record = record.ok_or_else(|| corrupt("it has no batch".to_owned()))?;
        task.go_on_at(record.sources.iter().map(|source| source.next).collect());
        for (index, source) in record.sources.iter().enumerate() {
            task.applied[index] = source.applied;
            task.time.sources[index].newest = source.newest;
        }
        task.time.settled = record.settled;
        task.time.watermark = record.watermark;
        for (offered, source) in task.offered.iter_mut().zip(&record.sources) {
            offered.newest = source.newest;
        }
        let mut channels = Vec::new();
        if let (Some(held), Some(saved)) = (&mut task.held, record.held) {
            task.reordered = saved.rows;
            for (offered, &newest) in task.offered.iter_mut().zip(&saved.newest) {
                offered.newest = newest;
            }
            if saved.channels.len() == task.offered.len() {
                channels = saved.channels;
            }
            let resumed = record.sources.iter().zip(saved.newest);
            let resumed = resumed.map(|(source, newest)| Standing { next: source.next, newest });
            held.restore(saved.frontier.unwrap_or(i64::MIN), saved.read.into_iter().zip(resumed));
        }
        if !channels.is_empty() {
            task.restore_channels(channels);
        }
        task.entities.account();
        task.entities.all_clean();
        task.captures = Captures::new(chain);
        task.windows.restored(&task.engine, &task.texts, &task.time.sources);
        Ok(task)
    }
}

fn corrupt(reason: String) -> WindowError {
    WindowError::Corrupt { reason }
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
        match newest.value(entity) {
            PIECE => {
                pieces::restore(task, batch, entity, keys.get(entity), &numbers)?;
                continue;
            }
            GONE => {
                if let Some((id, out)) = task.entities.remove(keys.get(entity))
                    && let Some(cold) = &mut task.cold
                {
                    cold.forget(id, out);
                }
                continue;
            }
            _ => (),
        }
        let id = task.entities.entity(keys.get(entity));
        let changed = &mut task.entities.get_mut(id).changed;
        if *changed & OUT != 0
            && let Some(cold) = &mut task.cold
        {
            cold.forget(id, true);
        }
        *changed = CLEAN;
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
