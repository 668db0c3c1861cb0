//! Entities on their way to the columns of a checkpoint.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, ListArray, RecordBatch, StringArray, TimestampMillisecondArray, UInt64Array};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{Field, SchemaRef};

use super::packed::{Packed, SourceParts};
use super::{ENTITY_WORDS, GONE};
use crate::window::emitted::pieces;
use crate::window::engine::{Engine, Source};
use crate::window::entities::{Keys, decode_keys};
use crate::window::ordered::visit;
use crate::window::state::State;
use crate::window::texts::Texts;

/// A batch is closed at this many entities …
const BATCH_ENTITIES: usize = 1 << 16;

/// … or this many words.
const BATCH_WORDS: usize = 1 << 22;

/// A list column, being written.
#[derive(Debug)]
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

#[derive(Debug, Default)]
pub(super) struct SourceColumns {
    rows: Lists<u64>,
    tiles: Lists<u64>,
    beyond: Lists<u64>,
    merged: Vec<Option<i64>>,
}

/// Rows of entities that are not yet a batch.
#[derive(Debug)]
pub(in crate::window) struct Encoder {
    schema: SchemaRef,
    keys: Keys,
    newest: Vec<i64>,
    texts: Lists<String>,
    columns: Vec<SourceColumns>,
    words: usize,
}

impl Encoder {
    /// Of a task with this many sources, for batches of this schema.
    pub fn new(schema: SchemaRef, sources: usize) -> Self {
        let mut columns = Vec::new();
        columns.resize_with(sources, SourceColumns::default);
        Self { schema, keys: Keys::default(), newest: Vec::new(), texts: Lists::default(), columns, words: 0 }
    }

    /// Adds an entity whose states are in memory with all events. Returns the words that it takes.
    pub fn add(&mut self, engine: &Engine, key: &[u8], newest: i64, states: &[State], texts: &Texts) -> usize {
        self.keys.push(key);
        self.newest.push(newest);
        let mut local = HashMap::new();
        let mut words = ENTITY_WORDS;
        for ((state, source), columns) in states.iter().zip(&engine.sources).zip(&mut self.columns) {
            words += columns.add(source, state, |word| {
                if *word != 0 {
                    let next = local.len() as u64 + 1;
                    *word = *local.entry(*word).or_insert_with(|| {
                        self.texts.values.push(texts.get(*word).to_owned());
                        next
                    });
                }
            });
        }
        self.texts.close();
        self.words += words;
        words
    }

    /// Adds an entity whose states are not in memory, with all events. Returns the words that it takes.
    pub fn add_packed(&mut self, key: &[u8], newest: i64, packed: Packed) -> usize {
        self.keys.push(key);
        self.newest.push(newest);
        self.texts.values.extend(packed.texts);
        self.texts.close();
        let mut words = ENTITY_WORDS;
        for (SourceParts { rows, tiles, beyond, merged, .. }, columns) in
            packed.sources.into_iter().zip(&mut self.columns)
        {
            for (list, part) in [(&mut columns.rows, rows), (&mut columns.tiles, tiles), (&mut columns.beyond, beyond)]
            {
                words += part.len();
                list.values.extend(part);
                list.close();
            }
            columns.merged.push(merged);
        }
        self.words += words;
        words
    }

    /// Words of the entities that are not yet a batch.
    pub fn words(&self) -> usize {
        self.words
    }

    /// Adds the key of an entity that is forgotten. Returns the words that it takes.
    pub fn add_gone(&mut self, engine: &Engine, key: &[u8]) -> usize {
        let none = State::default();
        self.keys.push(key);
        self.newest.push(GONE);
        self.texts.close();
        for (source, columns) in engine.sources.iter().zip(&mut self.columns) {
            columns.add(source, &none, |_| ());
        }
        self.words += ENTITY_WORDS;
        ENTITY_WORDS
    }

    pub fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    pub fn is_empty(&self) -> bool {
        self.newest.is_empty()
    }

    /// True where the batch has to be closed.
    pub fn is_full(&self) -> bool {
        self.newest.len() >= BATCH_ENTITIES || self.words >= BATCH_WORDS
    }

    /// What was added since the last call.
    pub fn close(&mut self, engine: &Engine) -> RecordBatch {
        let (keys, newest) = (std::mem::take(&mut self.keys), std::mem::take(&mut self.newest));
        let rows = newest.len();
        let mut arrays = decode_keys((0..rows).map(|row| keys.get(row)), &engine.keys);
        arrays.push(Arc::new(TimestampMillisecondArray::from(newest).with_timezone("UTC")));
        arrays.push(std::mem::take(&mut self.texts).finish(|texts| Arc::new(StringArray::from(texts))));
        for columns in &mut self.columns {
            let SourceColumns { rows, tiles, beyond, merged } = std::mem::take(columns);
            for words in [rows, tiles, beyond] {
                arrays.push(words.finish(|words| Arc::new(UInt64Array::from(words))));
            }
            arrays.push(Arc::new(TimestampMillisecondArray::from(merged).with_timezone("UTC")));
        }
        arrays.extend(engine.emitted.iter().map(|_| pieces::none(rows)));
        self.words = 0;
        RecordBatch::try_new(self.schema.clone(), arrays).expect("the columns are those of the schema, of equal length")
    }
}

impl SourceColumns {
    /// The parts of the one state that was added.
    pub fn into_parts(self) -> SourceParts {
        let merged = self.merged.into_iter().next().flatten();
        SourceParts {
            rows: self.rows.values,
            tiles: self.tiles.values,
            beyond: self.beyond.values,
            merged,
            chunks: Vec::new(),
        }
    }

    pub fn add(&mut self, source: &Source, state: &State, mut renumber: impl FnMut(&mut u64)) -> usize {
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
