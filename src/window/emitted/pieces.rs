//! What is open of windows, in checkpoints: rows of their own, after those of the entities. See `window/snapshot.rs`.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, ListArray, RecordBatch, StringArray, TimestampMillisecondArray, UInt64Array, new_empty_array,
    new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType as ArrowType, Field, FieldRef, SchemaRef, UInt64Type};

use crate::window::engine::Engine;
use crate::window::entities::decode_keys;
use crate::window::snapshot::PIECE;
use crate::window::task::Task;
use crate::window::texts::Texts;

/// A batch is closed at this many pieces: some milliseconds' work.
const BATCH_PIECES: usize = 1 << 15;

/// The columns of windows in a checkpoint.
pub(in crate::window) fn fields(engine: &Engine) -> impl Iterator<Item = Field> + '_ {
    engine.emitted.iter().map(|emitted| Field::new(format!("window:{}", emitted.name), list_type(), false))
}

fn list_type() -> ArrowType {
    ArrowType::List(item())
}

fn item() -> FieldRef {
    Arc::new(Field::new_list_field(ArrowType::UInt64, false))
}

/// A column without pieces, for entities.
pub(in crate::window) fn none(rows: usize) -> ArrayRef {
    Arc::new(ListArray::new(item(), OffsetBuffer::new_zeroed(rows), new_empty_array(&ArrowType::UInt64), None))
}

/// Pieces that are not yet a batch.
#[derive(Debug, Default)]
pub(in crate::window) struct Pending {
    keys: Vec<u8>,
    key_ends: Vec<usize>,
    texts: Vec<String>,
    text_counts: Vec<usize>,
    /// The table of each.
    tables: Vec<usize>,
    words: Vec<u64>,
    word_counts: Vec<usize>,
}

/// All pieces of a task, in batches of the checkpoint's schema.
pub(in crate::window) fn take(task: &Task, schema: &SchemaRef) -> Vec<RecordBatch> {
    let engine = &task.engine;
    let (mut pending, mut batches) = (Pending::default(), Vec::new());
    task.windows.for_each_piece(engine, |table, key, head, lanes| {
        pending.add(engine, &task.texts, table, key, head, lanes);
        if pending.is_full() {
            batches.push(std::mem::take(&mut pending).close(engine, schema));
        }
    });
    if !pending.is_empty() {
        batches.push(pending.close(engine, schema));
    }
    batches
}

impl Pending {
    /// Adds a piece of a table.
    pub fn add(&mut self, engine: &Engine, texts: &Texts, table: usize, key: &[u8], head: &[u64], lanes: &[u64]) {
        let (before, start) = (self.texts.len(), self.words.len());
        self.words.extend_from_slice(head);
        self.words.extend_from_slice(lanes);
        let words = &mut self.words[start..];
        for word in engine.emitted[table].text_words() {
            if words[word] != 0 {
                self.texts.push(texts.get(words[word]).to_owned());
                words[word] = (self.texts.len() - before) as u64;
            }
        }
        self.word_counts.push(words.len());
        self.text_counts.push(self.texts.len() - before);
        self.keys.extend_from_slice(key);
        self.key_ends.push(self.keys.len());
        self.tables.push(table);
    }

    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// True where the batch has to be closed.
    pub fn is_full(&self) -> bool {
        self.tables.len() >= BATCH_PIECES
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let texts: usize = self.texts.iter().map(|text| size_of::<String>() + text.len()).sum();
        self.keys.capacity() + texts + 8 * self.words.capacity() + 4 * size_of::<usize>() * self.tables.capacity()
    }

    /// The batch.
    pub fn close(self, engine: &Engine, schema: &SchemaRef) -> RecordBatch {
        let rows = self.tables.len();
        let mut from = 0;
        let keys = self.key_ends.iter().map(|&end| &self.keys[std::mem::replace(&mut from, end)..end]);
        let mut columns = decode_keys(keys, &engine.keys);
        columns.push(Arc::new(TimestampMillisecondArray::from_value(PIECE, rows).with_timezone("UTC")));
        let texts = Arc::new(StringArray::from(self.texts));
        let field = Arc::new(Field::new_list_field(ArrowType::Utf8, false));
        columns.push(Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(self.text_counts), texts, None)));
        let windows = schema.fields().len() - engine.emitted.len();
        for field in &schema.fields()[columns.len()..windows] {
            columns.push(match field.data_type() {
                ArrowType::List(_) => none(rows),
                other => new_null_array(other, rows),
            });
        }
        for table in 0..engine.emitted.len() {
            let own = |at: usize| if self.tables[at] == table { self.word_counts[at] } else { 0 };
            let mut words = Vec::new();
            let mut from = 0;
            for at in 0..rows {
                let to = from + self.word_counts[at];
                words.extend_from_slice(&self.words[from..from + own(at)]);
                from = to;
            }
            let offsets = OffsetBuffer::from_lengths((0..rows).map(own));
            columns.push(Arc::new(ListArray::new(item(), offsets, Arc::new(UInt64Array::from(words)), None)));
        }
        RecordBatch::try_new(schema.clone(), columns).expect("the columns are those of the schema, of equal length")
    }
}

/// Puts the piece in row `row` of a checkpoint's batch back. `texts` are the numbers of its texts.
pub(in crate::window) fn restore(
    task: &mut Task,
    batch: &RecordBatch,
    row: usize,
    key: &[u8],
    texts: &[u64],
) -> Result<(), String> {
    let engine = task.engine.clone();
    let first = batch.num_columns() - engine.emitted.len();
    for (table, emitted) in engine.emitted.iter().enumerate() {
        let list = batch.column(first + table).as_list::<i32>().value(row);
        let mut words = list.as_primitive::<UInt64Type>().values().to_vec();
        if words.is_empty() {
            continue;
        }
        let misfit = || format!("the words of window {} in row {row} do not fit its layout", emitted.name);
        for at in emitted.text_words() {
            let word = words.get_mut(at).ok_or_else(misfit)?;
            if *word != 0 {
                *word = *texts.get(*word as usize - 1).ok_or_else(misfit)?;
            }
        }
        if !task.windows.restore_piece(&engine, table, key, &words) {
            return Err(misfit());
        }
    }
    Ok(())
}

/// Of all tables together, for [`WindowError::OtherWindows`]. Nothing where there is none.
pub(in crate::window) fn layout_in_words(engine: &Engine) -> Option<String> {
    let lines = || engine.emitted.iter().map(|emitted| emitted.layout_in_words());
    (!engine.emitted.is_empty()).then(|| lines().collect())
}
