//! Rows of closed windows on their way to columns.

use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Int64Array, RecordBatch, TimestampMillisecondArray};

use super::Emitted;
use crate::config::plan::Column;
use crate::window::entities::decode_keys;
use crate::window::rows::build_column;
use crate::window::texts::Texts;
use crate::window::{EmittedRows, WindowError};

/// Rows of one table's windows, column by column.
#[derive(Debug, Default)]
pub(super) struct EmittedBuffer {
    keys: Vec<u8>,
    key_ends: Vec<usize>,
    starts: Vec<i64>,
    ends: Vec<i64>,
    finals: Vec<bool>,
    offsets: Vec<i64>,
    /// Event times of the events at the offsets.
    times: Vec<i64>,
    /// For each function: words, and one bit a row that says that there is a value.
    values: Vec<(Vec<u64>, Vec<u64>)>,
    /// For each function that gives lists: their values. Its words are their lengths.
    items: Vec<Vec<u64>>,
}

impl EmittedBuffer {
    pub fn new(functions: usize) -> Self {
        Self { values: vec![Default::default(); functions], items: vec![Vec::new(); functions], ..Self::default() }
    }

    /// Appends a row without values. [`EmittedBuffer::set`] and [`EmittedBuffer::set_list`] then give it some.
    pub fn push(&mut self, key: &[u8], start: i64, end: i64, last: bool, (offset, time): (i64, i64)) {
        let row = self.starts.len();
        self.keys.extend_from_slice(key);
        self.key_ends.push(self.keys.len());
        self.starts.push(start);
        self.ends.push(end);
        self.finals.push(last);
        self.offsets.push(offset);
        self.times.push(time);
        for (words, valid) in &mut self.values {
            words.push(0);
            if row.is_multiple_of(64) {
                valid.push(0);
            }
        }
    }

    /// Sets a function's value in the last row.
    #[inline]
    pub fn set(&mut self, function: usize, value: Option<u64>) {
        if let Some(value) = value {
            let row = self.starts.len() - 1;
            let (words, valid) = &mut self.values[function];
            words[row] = value;
            valid[row / 64] |= 1 << (row % 64);
        }
    }

    /// Sets a function's list in the last row.
    pub fn set_list(&mut self, function: usize, values: impl Iterator<Item = u64>) {
        let items = &mut self.items[function];
        let before = items.len();
        items.extend(values);
        let length = items.len() - before;
        self.set(function, Some(length as u64));
    }

    /// Takes all rows; `None` where there are none.
    pub fn build(
        &mut self,
        emitted: &Emitted,
        keys: &[Column],
        texts: &Texts,
    ) -> Result<Option<EmittedRows>, WindowError> {
        if self.starts.is_empty() {
            return Ok(None);
        }
        let rows = std::mem::replace(self, Self::new(emitted.columns.len()));
        let mut from = 0;
        let parts = rows.key_ends.iter().map(|&end| &rows.keys[std::mem::replace(&mut from, end)..end]);
        let mut columns: Vec<ArrayRef> = decode_keys(parts, keys);
        for instants in [rows.starts, rows.ends] {
            columns.push(Arc::new(TimestampMillisecondArray::from(instants).with_timezone("UTC")));
        }
        for (((words, valid), items), column) in rows.values.into_iter().zip(rows.items).zip(&emitted.columns) {
            columns.push(build_column(words, valid, items, column.data_type, texts));
        }
        columns.push(Arc::new(BooleanArray::from(rows.finals)));
        columns.push(Arc::new(Int64Array::from(rows.offsets)));
        RecordBatch::try_new(emitted.schema.clone(), columns)
            .map(|batch| Some(EmittedRows { batch, event_times: rows.times }))
            .map_err(|error| WindowError::Rows(error.to_string()))
    }
}
