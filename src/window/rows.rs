//! Feature rows on their way to columns.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Float64Array, Int32Array, Int64Array, ListArray, RecordBatch, RecordBatchOptions,
    StringArray, TimestampMillisecondArray, new_null_array,
};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{Field, Schema};

use super::engine::Engine;
use super::entities::{Entities, EntityId, decode_keys};
use super::texts::Texts;
use super::{Failures, FeatureRows, WindowError};
use crate::config::plan::DataType;

/// Where a row comes from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin {
    pub entity: EntityId,
    /// Index of the source of the event.
    pub source: usize,
    pub offset: i64,
    pub sequence: i64,
    /// The instant that the row is as of.
    pub event_time: i64,
    pub watermark: Option<i64>,
}

/// Rows of the groups' features, row by row: a 64-bit word a feature, which of a list is its length; the values of the lists;
/// and one bit a feature that says null.
#[derive(Debug)]
pub(super) struct RowBuffer {
    features: usize,
    /// Where the values of each list are among the words of a row.
    lists: Vec<Option<Range<usize>>>,
    width: usize,
    null_words: usize,
    words: Vec<u64>,
    nulls: Vec<u64>,
    origins: Vec<Origin>,
}

/// One row, being written.
pub(super) struct RowMut<'a> {
    words: &'a mut [u64],
    nulls: &'a mut [u64],
    lists: &'a [Option<Range<usize>>],
}

impl RowMut<'_> {
    #[inline]
    pub fn set(&mut self, column: usize, value: Option<u64>) {
        let (word, bit) = (column / 64, 1 << (column % 64));
        match value {
            Some(value) => {
                self.words[column] = value;
                self.nulls[word] &= !bit;
            }
            None => self.nulls[word] |= bit,
        }
    }

    /// Sets a list, which is not longer than the feature's longest.
    pub fn set_list(&mut self, column: usize, values: impl Iterator<Item = u64>) {
        let place = self.lists[column].clone().expect("the feature is a list");
        let mut length = 0;
        for (word, value) in self.words[place].iter_mut().zip(values) {
            *word = value;
            length += 1;
        }
        self.set(column, Some(length));
    }
}

impl RowBuffer {
    pub fn new(engine: &Engine) -> Self {
        let features = engine.features.len();
        Self {
            features,
            lists: engine.lists.clone(),
            width: engine.row_words,
            null_words: features.div_ceil(64),
            words: Vec::new(),
            nulls: Vec::new(),
            origins: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.origins.len()
    }

    pub fn clear(&mut self) {
        self.words.clear();
        self.nulls.clear();
        self.origins.clear();
    }

    /// Appends a row that is a copy of the first row of `template`.
    #[inline]
    pub fn push(&mut self, origin: Origin, template: &Self, row: usize) -> RowMut<'_> {
        let (word, null) = (self.words.len(), self.nulls.len());
        self.words.extend_from_slice(&template.words[row * self.width..][..self.width]);
        self.nulls.extend_from_slice(&template.nulls[row * self.null_words..][..self.null_words]);
        self.origins.push(origin);
        RowMut { words: &mut self.words[word..], nulls: &mut self.nulls[null..], lists: &self.lists }
    }

    /// Appends a row of nulls.
    pub fn push_nulls(&mut self, origin: Origin) -> RowMut<'_> {
        let (word, null) = (self.words.len(), self.nulls.len());
        self.words.resize(word + self.width, 0);
        self.nulls.resize(null + self.null_words, u64::MAX);
        self.origins.push(origin);
        RowMut { words: &mut self.words[word..], nulls: &mut self.nulls[null..], lists: &self.lists }
    }

    /// Watermark of a row.
    pub fn watermark(&self, row: usize) -> Option<i64> {
        self.origins[row].watermark
    }

    /// The rows as columns, derived features included.
    pub fn build(
        &self,
        engine: &Engine,
        entities: &Entities,
        texts: &Texts,
        partition: i32,
        failures: &mut Failures,
    ) -> Result<FeatureRows, WindowError> {
        let fault = |error: arrow::error::ArrowError| WindowError::Rows(error.to_string());
        let mut columns = decode_keys(self.origins.iter().map(|origin| entities.key(origin.entity)), &engine.keys);
        columns.extend(self.origin_columns(engine, partition));
        let first = columns.len();
        columns.extend(self.feature_columns(engine, texts));
        let options = RecordBatchOptions::new().with_row_count(Some(self.len()));
        if !engine.derived.is_empty() {
            let mut fields: Vec<Arc<Field>> = engine.schema().fields()[first..columns.len()].to_vec();
            for (index, (_, expression)) in engine.derived.iter().enumerate() {
                let schema = Arc::new(Schema::new(fields.clone()));
                let row =
                    RecordBatch::try_new_with_options(schema, columns[first..].to_vec(), &options).map_err(fault)?;
                let computed = expression.evaluate_rows(&row).map_err(|error| WindowError::Rows(error.to_string()))?;
                failures.rows += computed.failed.len() as u64;
                if failures.first.is_none() {
                    failures.first = computed.failed.into_iter().next().map(|failure| failure.reason);
                }
                columns.push(computed.values);
                fields.push(engine.schema().fields()[first + engine.features.len() + index].clone());
            }
        }
        columns.extend(engine.lookups.iter().map(|of| new_null_array(&of.to_arrow(), self.len())));
        let batch = RecordBatch::try_new_with_options(engine.schema().clone(), columns, &options).map_err(fault)?;
        Ok(FeatureRows { batch, sequence: self.origins.iter().map(|origin| origin.sequence).collect() })
    }

    fn origin_columns(&self, engine: &Engine, partition: i32) -> [ArrayRef; 6] {
        let origins = || self.origins.iter();
        let source = |origin: &Origin| &engine.sources[origin.source];
        [
            Arc::new(TimestampMillisecondArray::from_iter_values(origins().map(|o| o.event_time)).with_timezone("UTC")),
            Arc::new(StringArray::from_iter_values(origins().map(|o| &source(o).name))),
            Arc::new(StringArray::from_iter_values(origins().map(|o| &source(o).topic))),
            Arc::new(Int32Array::from_value(partition, self.len())),
            Arc::new(Int64Array::from_iter_values(origins().map(|o| o.offset))),
            Arc::new(origins().map(|o| o.watermark).collect::<TimestampMillisecondArray>().with_timezone("UTC")),
        ]
    }

    /// Transposes the rows, 64 at a time so that they stay in the processor's nearest cache.
    fn feature_columns(&self, engine: &Engine, texts: &Texts) -> Vec<ArrayRef> {
        let count = self.len();
        let mut words: Vec<Vec<u64>> = (0..self.features).map(|_| Vec::with_capacity(count)).collect();
        let mut valid: Vec<Vec<u64>> = (0..self.features).map(|_| Vec::with_capacity(count.div_ceil(64))).collect();
        for start in (0..count).step_by(64) {
            let end = count.min(start + 64);
            let rows = &self.words[start * self.width..end * self.width];
            let nulls = &self.nulls[start * self.null_words..end * self.null_words];
            for column in 0..self.features {
                words[column].extend(rows[column..].iter().step_by(self.width));
                let nulls = nulls[column / 64..].iter().step_by(self.null_words);
                let bits = nulls.rev().fold(0, |bits, word| bits << 1 | (!word >> (column % 64) & 1));
                valid[column].push(bits);
            }
        }
        // The values of a list, row by row.
        let items_of = |place: &Option<Range<usize>>, lengths: &[u64]| -> Vec<u64> {
            let Some(place) = place else { return Vec::new() };
            let rows = self.words.chunks_exact(self.width.max(1)).zip(lengths);
            rows.flat_map(|(row, &length)| &row[place.clone()][..length as usize]).copied().collect()
        };
        let columns = words.into_iter().zip(valid).zip(&engine.features).zip(&self.lists);
        columns
            .map(|(((words, valid), column), place)| {
                let items = items_of(place, &words);
                build_column(words, valid, items, column.data_type, texts)
            })
            .collect()
    }
}

/// A column of its rows' words. Those of lists are their lengths, 0 for a null; `items` are the values of all of them.
pub(super) fn build_column(
    words: Vec<u64>,
    valid: Vec<u64>,
    items: Vec<u64>,
    data_type: DataType,
    texts: &Texts,
) -> ArrayRef {
    let count = words.len();
    let nulls = NullBuffer::new(BooleanBuffer::new(Buffer::from_vec(valid), 0, count));
    let nulls = (nulls.null_count() > 0).then_some(nulls);
    match data_type {
        DataType::Int64 => Arc::new(Int64Array::new(ScalarBuffer::new(Buffer::from_vec(words), 0, count), nulls)),
        DataType::Float64 => Arc::new(Float64Array::new(ScalarBuffer::new(Buffer::from_vec(words), 0, count), nulls)),
        DataType::Timestamp => {
            let values = ScalarBuffer::new(Buffer::from_vec(words), 0, count);
            Arc::new(TimestampMillisecondArray::new(values, nulls).with_timezone("UTC"))
        }
        DataType::Boolean => {
            Arc::new(BooleanArray::new(BooleanBuffer::collect_bool(count, |row| words[row] != 0), nulls))
        }
        DataType::String => {
            let valid = |row: usize| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row));
            Arc::new(
                words
                    .iter()
                    .enumerate()
                    .map(|(row, &word)| valid(row).then(|| texts.get(word)))
                    .collect::<StringArray>(),
            )
        }
        DataType::List(element) => {
            let element = DataType::from(element);
            let all = vec![u64::MAX; items.len().div_ceil(64)];
            let offsets = OffsetBuffer::from_lengths(words.into_iter().map(|length| length as usize));
            let field = Arc::new(Field::new_list_field(element.to_arrow(), false));
            let items = build_column(items, all, Vec::new(), element, texts);
            Arc::new(ListArray::new(field, offsets, items, nulls))
        }
    }
}
