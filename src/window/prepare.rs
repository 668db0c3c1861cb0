//! From a source's columns to the rows that states keep.

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray};
use arrow::datatypes::{DataType as ArrowType, Float64Type, Int64Type, TimestampMillisecondType};

use super::aggregate::distinct::hash_text;
use super::engine::{Engine, Source};
use super::entities::Keys;
use super::synchroniser::Prepared;
use super::texts::Texts;
use super::{Failures, WindowError};
use crate::source::SourceBatch;

impl Engine {
    /// Turns a batch into rows. A row whose filter cannot be computed does not belong to that group, and is told.
    pub(super) fn prepare(
        &self,
        batch: &SourceBatch,
        texts: &mut Texts,
        failures: &mut Failures,
    ) -> Result<Prepared, WindowError> {
        let source = &self.sources[batch.source];
        let fault = |reason: String| WindowError::Batch {
            source_name: source.name.clone(),
            partition: batch.partition,
            offset: batch.offsets.first().copied().unwrap_or(batch.next),
            reason,
        };
        let count = batch.event_times.len();
        let kept = count as u64 + batch.filtered;
        if batch.columns.num_rows() != count || batch.offsets.len() != count || batch.read < kept {
            return Err(fault(format!(
                "{} rows, {count} event times, {} offsets, {} filtered of {} records do not fit together",
                batch.columns.num_rows(),
                batch.offsets.len(),
                batch.filtered,
                batch.read
            )));
        }
        let schema = batch.columns.schema_ref();
        for (index, column) in source.columns.iter().enumerate() {
            let found = schema.fields().get(index).map(|field| (field.name().as_str(), field.data_type()));
            let expected = column.data_type.to_arrow();
            if found != Some((column.name.as_ref(), &expected)) {
                return Err(fault(format!("column {index} should be `{}`, {expected}; found {found:?}", column.name)));
            }
        }
        let keys = Keys::encode(&batch.columns, &source.key_columns, &self.keys)
            .map_err(|part| fault(format!("key `{}` has a null", self.keys[part].name)))?;
        let mut prepared = Prepared {
            times: batch.event_times.clone(),
            offsets: batch.offsets.clone(),
            origins: batch.rekeyed.as_ref().map(|rekeyed| rekeyed.origins.clone()),
            rows: vec![0; count * source.layout.row],
            keys,
            next: batch.next,
            filtered: batch.filtered,
            dead: batch.read - kept,
        };
        source.fill(batch, &mut prepared.rows, texts, failures).map_err(fault)?;
        Ok(prepared)
    }
}

impl Source {
    fn fill(
        &self,
        batch: &SourceBatch,
        rows: &mut [u64],
        texts: &mut Texts,
        failures: &mut Failures,
    ) -> Result<(), String> {
        let width = self.layout.row;
        if batch.event_times.is_empty() {
            return Ok(());
        }
        for (row, &time) in rows.chunks_exact_mut(width).zip(&batch.event_times) {
            row[0] = time as u64;
        }
        for (index, value) in self.values.iter().enumerate() {
            let word = self.layout.value_word(index);
            let words = rows[word..].iter_mut().step_by(width);
            let column = batch.columns.column(value.column);
            if value.hashed { fill_hashes(words, column) } else { fill_words(words, column, texts) }
        }
        let mut filters: Vec<BooleanArray> = Vec::with_capacity(self.filters.len());
        for filter in &self.filters {
            let kept = filter.as_filter(&batch.columns).map_err(|error| error.to_string())?;
            failures.rows += kept.failed.len() as u64;
            if failures.first.is_none() {
                failures.first = kept.failed.into_iter().next().map(|failure| failure.reason);
            }
            filters.push(kept.keep);
        }
        for (series, (filter, value)) in self.series.iter().enumerate() {
            let (word, bit) = (1 + series / 64, 1 << (series % 64));
            let filter = filter.map(|filter| &filters[filter]);
            let value = value.map(|value| batch.columns.column(self.values[value].column));
            let masks = rows[word..].iter_mut().step_by(width);
            match (filter, value.filter(|value| value.null_count() > 0 || *value.data_type() == ArrowType::Float64)) {
                (None, None) => masks.for_each(|mask| *mask |= bit),
                (filter, value) => {
                    let floats = value.and_then(|value| value.as_primitive_opt::<Float64Type>());
                    for (row, mask) in masks.enumerate() {
                        let there = filter.is_none_or(|filter| filter.value(row))
                            && value.is_none_or(|value| value.is_valid(row))
                            && floats.is_none_or(|floats| floats.value(row).is_finite());
                        *mask |= if there { bit } else { 0 };
                    }
                }
            }
        }
        Ok(())
    }
}

/// One word a row. Nulls are any word: no series has them.
fn fill_words<'a>(words: impl Iterator<Item = &'a mut u64>, values: &ArrayRef, texts: &mut Texts) {
    match values.data_type() {
        ArrowType::Int64 => {
            words.zip(values.as_primitive::<Int64Type>().values()).for_each(|(word, value)| *word = *value as u64);
        }
        ArrowType::Timestamp(..) => {
            let values = values.as_primitive::<TimestampMillisecondType>().values();
            words.zip(values).for_each(|(word, value)| *word = *value as u64);
        }
        ArrowType::Float64 => {
            words.zip(values.as_primitive::<Float64Type>().values()).for_each(|(word, value)| *word = value.to_bits());
        }
        ArrowType::Boolean => {
            let values = values.as_boolean();
            words.enumerate().for_each(|(row, word)| *word = u64::from(values.value(row)));
        }
        _ => {
            let values = values.as_string::<i32>();
            for (row, word) in words.enumerate() {
                *word = if values.is_valid(row) { texts.number(values.value(row)) } else { 0 };
            }
        }
    }
}

/// One word a row: the hash of its text. Nulls are any word.
fn fill_hashes<'a>(words: impl Iterator<Item = &'a mut u64>, values: &ArrayRef) {
    let values = values.as_string::<i32>();
    words
        .enumerate()
        .filter(|(row, _)| values.is_valid(*row))
        .for_each(|(row, word)| *word = hash_text(values.value(row)));
}
