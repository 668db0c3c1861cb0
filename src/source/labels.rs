//! Labels: decoded as events are, into entity, instant and outcome.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Float64Type, SchemaRef};

use super::DeadLetter;
use super::avro::DecodeError;
use super::columns::Field;
use super::decode::{RecordDecoder, SourceError, arrow_schema, dead_row};
use super::fault::{RecordFault, reason};
use crate::broker::{BrokerError, Records, SchemaRegistry};
use crate::config::plan::{DataType, EntityPlan, LabelsPlan};

/// Labels of one partition, in offset order.
#[derive(Debug, Clone)]
pub struct DecodedLabels {
    /// The entity's keys, named and typed as the plan's entity says; without nulls.
    pub keys: RecordBatch,
    /// The instant that each label is about, milliseconds since 1970 UTC.
    pub as_of: Vec<i64>,
    /// Outcome; true is 1. Always finite.
    pub values: Vec<f64>,
    /// Offset of each label.
    pub offsets: Vec<i64>,
    /// The offset after the last record read; −1 where there was none.
    pub next: i64,
    /// Records read.
    pub read: u64,
    /// Records that could not be used.
    pub dead: Vec<DeadLetter>,
}

/// Decodes the records of the labels topic. Belongs to one thread.
#[derive(Debug)]
pub struct LabelDecoder {
    records: RecordDecoder,
    keys: SchemaRef,
    value: usize,
}

impl LabelDecoder {
    /// A decoder for a pipeline's labels.
    ///
    /// # Errors
    /// The plan does not fit the labels' schema.
    pub fn new(
        plan: &LabelsPlan,
        entity: &EntityPlan,
        registry: Option<Arc<SchemaRegistry>>,
    ) -> Result<Self, SourceError> {
        let (time, unit) = &plan.as_of;
        let mut fields: Vec<Field> =
            plan.key_fields.iter().zip(&entity.keys).map(|(name, key)| Field::new(name, key.data_type)).collect();
        fields.push(Field { unit: Some(*unit), ..Field::new(time, DataType::Timestamp) });
        fields.push(Field { takes_booleans: true, ..Field::new(&plan.value, DataType::Float64) });
        let value = fields.len() - 1;
        let as_of = Some((time, *unit));
        let records = RecordDecoder::new(&plan.topic, &plan.format, fields, &plan.key_fields, as_of, registry)?;
        Ok(Self { records, keys: arrow_schema(&entity.keys), value })
    }

    /// Decodes the records of one poll.
    ///
    /// # Errors
    /// Only while the schema registry does not answer for a schema that is not known yet: call again with the same
    /// records.
    pub fn decode(&mut self, records: &Records) -> Result<DecodedLabels, BrokerError> {
        let mut dead = Vec::new();
        let mut offsets = Vec::with_capacity(records.len());
        let mut as_of = Vec::with_capacity(records.len());
        for row in 0..records.len() {
            let decoded = self.records.row(records.values.get(row)).and_then(|instant| {
                let outcome = &self.records.rows.columns()[self.value];
                match outcome.is_null() {
                    false => Ok(instant),
                    true => {
                        let name = &outcome.field().name;
                        let error = format!("outcome field '{name}' is null, missing or not finite");
                        Err(RecordFault::new(reason::NULL_LABEL, error).into())
                    }
                }
            });
            match decoded {
                Ok(instant) => {
                    self.records.rows.commit();
                    as_of.push(instant);
                    offsets.push(records.offsets[row]);
                }
                Err(DecodeError::Record(fault)) => dead.push(dead_row(records, row, fault)),
                Err(DecodeError::Registry(error)) => {
                    self.records.rows.finish();
                    return Err(error);
                }
            }
        }
        let (mut arrays, _) = self.records.rows.finish();
        let values = arrays[self.value].as_primitive::<Float64Type>().values().to_vec();
        arrays.truncate(self.keys.fields().len());
        let options = RecordBatchOptions::new().with_row_count(Some(offsets.len()));
        let keys = RecordBatch::try_new_with_options(self.keys.clone(), arrays, &options)
            .expect("the keys are the first fields, in the entity's order");
        debug_assert!(keys.columns().iter().all(|key| key.null_count() == 0));
        let next = records.next().map_or(-1, |next| next.0);
        Ok(DecodedLabels { keys, as_of, values, offsets, next, read: records.len() as u64, dead })
    }
}
