//! Predictions and feature rows as records: JSON written straight from columns, all rows of a batch into one buffer.

mod windows;

use std::sync::Arc;

use arrow::array::{Array, RecordBatch};
use serde::Serialize;

use super::rows::{Cell, Cells, Layout, Rows};
use super::{ScoreError, Scores};
use crate::config::plan::Plan;

pub use windows::WindowEncoder;

/// Records made of a batch's rows.
#[derive(Debug, Default)]
pub struct Encoded {
    rows: Vec<usize>,
    keys: Vec<u8>,
    key_ends: Vec<usize>,
    values: Vec<u8>,
    value_ends: Vec<usize>,
}

/// One record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodedRecord<'a> {
    /// Row of the batch that it was made of.
    pub row: usize,
    /// The entity key.
    pub key: &'a [u8],
    /// JSON.
    pub value: &'a [u8],
}

impl Encoded {
    /// Forgets all records and keeps the memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.keys.clear();
        self.key_ends.clear();
        self.values.clear();
        self.value_ends.clear();
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        self.keys.len() + self.values.len()
    }

    /// All records, in the order of their rows.
    pub fn iter(&self) -> impl Iterator<Item = EncodedRecord<'_>> {
        let starts = |ends: &[usize], record: usize| if record == 0 { 0 } else { ends[record - 1] };
        self.rows.iter().enumerate().map(move |(record, &row)| EncodedRecord {
            row,
            key: &self.keys[starts(&self.key_ends, record)..self.key_ends[record]],
            value: &self.values[starts(&self.value_ends, record)..self.value_ends[record]],
        })
    }

    fn end(&mut self, row: usize) {
        self.rows.push(row);
        self.key_ends.push(self.keys.len());
        self.value_ends.push(self.values.len());
    }
}

/// Writes [`Prediction`](super::Prediction) records.
#[derive(Debug)]
pub struct PredictionEncoder {
    layout: Layout,
    fields: Fields,
    variant: Vec<u8>,
}

impl PredictionEncoder {
    /// Predictions of a pipeline under a variant's name (`champion`).
    pub fn new(plan: &Plan, variant: &str) -> Self {
        let features = plan.score.as_ref().map(|score| score.features.as_slice()).unwrap_or_default();
        let features: Vec<Arc<str>> = features.iter().map(|name| name.as_str().into()).collect();
        let mut text = b",\"variant\":".to_vec();
        json(&mut text, variant);
        Self { fields: Fields::new(plan, &features), layout: Layout::new(plan, features), variant: text }
    }

    /// Appends a record for each row that has a score, in the order of the rows.
    ///
    /// # Errors
    /// A batch that lacks a column of feature rows.
    ///
    /// # Panics
    /// Where `scores` are of another batch.
    pub fn encode(&mut self, batch: &RecordBatch, scores: &Scores, out: &mut Encoded) -> Result<(), ScoreError> {
        assert_eq!(batch.num_rows(), scores.scores.len(), "scores are of this batch");
        let rows = self.layout.rows(batch)?;
        let mut model = b",\"model\":".to_vec();
        json(&mut model, &*scores.model);
        model.extend_from_slice(b",\"model_version\":");
        json(&mut model, &*scores.version);
        model.extend_from_slice(&self.variant);
        model.extend_from_slice(b",\"score\":");

        let mut topic = Topic::default();
        for row in 0..batch.num_rows() {
            let score = scores.scores[row];
            if score.is_nan() {
                continue;
            }
            let value = &mut out.values;
            value.extend_from_slice(b"{\"prediction_id\":\"");
            value.extend_from_slice(topic.escaped(rows.topic.value(row)));
            value.push(b'-');
            json(value, &rows.partition.value(row));
            value.push(b'-');
            json(value, &rows.offset.value(row));
            value.extend_from_slice(b"\",");
            self.fields.head(&rows, row, &mut topic, value);
            value.extend_from_slice(&model);
            json(value, &score);
            value.extend_from_slice(b",\"label\":");
            json(value, &scores.labels[row]);
            value.extend_from_slice(b",\"features\":{");
            for (name, cells) in self.fields.features.iter().zip(&rows.features) {
                value.extend_from_slice(name);
                match cells.cell(row) {
                    // What the model sees is a number.
                    Cell::Boolean(flag) => value.push(if flag { b'1' } else { b'0' }),
                    other => cell(value, other),
                }
            }
            value.extend_from_slice(b"}}");
            write_key(&rows.keys, row, &mut out.keys);
            out.end(row);
        }
        Ok(())
    }
}

/// Writes [`FeatureRecord`](super::FeatureRecord) records.
#[derive(Debug)]
pub struct FeatureEncoder {
    layout: Layout,
    fields: Fields,
}

impl FeatureEncoder {
    /// Feature rows of a pipeline, with all its features.
    pub fn new(plan: &Plan) -> Self {
        let features: Vec<Arc<str>> = plan.feature_columns().into_iter().map(|column| column.name).collect();
        Self { fields: Fields::new(plan, &features), layout: Layout::new(plan, features) }
    }

    /// Appends a record for each row.
    ///
    /// # Errors
    /// A batch that lacks a column of feature rows.
    pub fn encode(&mut self, batch: &RecordBatch, out: &mut Encoded) -> Result<(), ScoreError> {
        let rows = self.layout.rows(batch)?;
        let mut topic = Topic::default();
        for row in 0..batch.num_rows() {
            let value = &mut out.values;
            value.push(b'{');
            self.fields.head(&rows, row, &mut topic, value);
            value.extend_from_slice(b",\"features\":{");
            for (name, cells) in self.fields.features.iter().zip(&rows.features) {
                value.extend_from_slice(name);
                cell_or_list(value, cells, row);
            }
            value.extend_from_slice(b"}}");
            write_key(&rows.keys, row, &mut out.keys);
            out.end(row);
        }
        Ok(())
    }
}

/// What is the same in every record of a pipeline, escaped once.
#[derive(Debug)]
struct Fields {
    /// `"pipeline":…,"definition":…,"entity":{`.
    pipeline: Vec<u8>,
    /// `"name":` of the first key, `,"name":` of the others.
    keys: Vec<Vec<u8>>,
    /// The same for features.
    features: Vec<Vec<u8>>,
}

impl Fields {
    fn new(plan: &Plan, features: &[Arc<str>]) -> Self {
        let mut pipeline = b"\"pipeline\":".to_vec();
        json(&mut pipeline, &plan.name);
        pipeline.extend_from_slice(b",\"definition\":");
        json(&mut pipeline, &plan.definition);
        pipeline.extend_from_slice(b",\"entity\":{");
        let names = |names: &mut dyn Iterator<Item = &Arc<str>>| names.enumerate().map(|(i, n)| field(i, n)).collect();
        Self {
            pipeline,
            keys: names(&mut plan.entity.keys.iter().map(|key| &key.name)),
            features: names(&mut features.iter()),
        }
    }

    /// From the pipeline to the source's coordinates.
    fn head(&self, rows: &Rows<'_>, row: usize, topic: &mut Topic, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.pipeline);
        for (name, cells) in self.keys.iter().zip(&rows.keys) {
            out.extend_from_slice(name);
            cell(out, cells.cell(row));
        }
        out.extend_from_slice(b"},\"event_time\":");
        json(out, &rows.event_time.value(row));
        out.extend_from_slice(b",\"watermark\":");
        json(out, &rows.watermark.is_valid(row).then(|| rows.watermark.value(row)));
        out.extend_from_slice(b",\"source\":{\"topic\":\"");
        out.extend_from_slice(topic.escaped(rows.topic.value(row)));
        out.extend_from_slice(b"\",\"partition\":");
        json(out, &rows.partition.value(row));
        out.extend_from_slice(b",\"offset\":");
        json(out, &rows.offset.value(row));
        out.push(b'}');
    }
}

/// The topic of the last row, escaped: rows of one task rarely change it.
#[derive(Default)]
struct Topic {
    name: String,
    escaped: Vec<u8>,
}

impl Topic {
    /// The topic's name as it stands between the quotes of a JSON string.
    fn escaped(&mut self, name: &str) -> &[u8] {
        if self.name != name || self.escaped.is_empty() {
            name.clone_into(&mut self.name);
            self.escaped.clear();
            json(&mut self.escaped, name);
            self.escaped.pop();
            self.escaped.remove(0);
        }
        &self.escaped
    }
}

fn field(position: usize, name: &str) -> Vec<u8> {
    let mut text = if position == 0 { Vec::new() } else { vec![b','] };
    json(&mut text, name);
    text.push(b':');
    text
}

/// A number, text or `null` in JSON: the shortest digits that read back as the same float, `null` for NaN and infinities.
#[inline]
fn json<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value).expect("plain values are JSON, and a vector takes all bytes");
}

#[inline]
fn cell(out: &mut Vec<u8>, cell: Cell<'_>) {
    match cell {
        Cell::Null => out.extend_from_slice(b"null"),
        Cell::Int64(value) => json(out, &value),
        Cell::Float64(value) => json(out, &value),
        Cell::Boolean(value) => out.extend_from_slice(if value { b"true" } else { b"false" }),
        Cell::String(value) => json(out, value),
    }
}

/// The value of a row, which may be a list.
#[inline]
fn cell_or_list(out: &mut Vec<u8>, cells: &Cells<'_>, row: usize) {
    let Some((items, range)) = cells.list(row) else { return cell(out, cells.cell(row)) };
    out.push(b'[');
    for item in range.clone() {
        if item > range.start {
            out.push(b',');
        }
        cell(out, items.cell(item));
    }
    out.push(b']');
}

/// An entity's key as records carry it: the text of a single key, a JSON array of several.
fn write_key(keys: &[Cells<'_>], row: usize, out: &mut Vec<u8>) {
    match keys {
        [single] => match single.cell(row) {
            Cell::String(text) => out.extend_from_slice(text.as_bytes()),
            other => cell(out, other),
        },
        several => {
            for (position, cells) in several.iter().enumerate() {
                out.push(if position == 0 { b'[' } else { b',' });
                cell(out, cells.cell(row));
            }
            out.push(b']');
        }
    }
}

#[cfg(test)]
mod tests;
