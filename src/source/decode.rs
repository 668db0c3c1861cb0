//! From a poll's records of one partition to columns: decode, check the key and the event time, quarantine what is ahead of
//! the clock, derive, filter. A record that fails becomes a dead letter and leaves no trace in the columns.

use std::sync::Arc;

use arrow::array::{BooleanArray, RecordBatch, RecordBatchOptions};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{Field as ArrowField, Schema, SchemaRef};

use super::avro::{AvroDecoder, AvroSchema, AvroSchemaError, DecodeError};
use super::columns::{Field, RowBuilder};
use super::dead_letter;
use super::event_time::{is_plausible, likely_unit, to_iso};
use super::expression::{Expression, RowFailure};
use super::fault::{RecordFault, reason};
use super::json::JsonDecoder;
use super::protobuf::ProtobufDecoder;
use super::table::TableDecoder;
use super::{DeadLetter, Decoded, SourceBatch};
use crate::broker::{BrokerError, Records, SchemaRegistry};
use crate::config::plan::{Column, DataType, Format, SourcePlan, TimeUnit};

/// Name of this stage in dead letters.
pub(super) const STAGE: &str = "decode";

/// Why a decoder cannot be made from a plan. `driftline check` finds the same faults with their place in the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The Avro schema is none.
    #[error("topic '{topic}': {error}")]
    Schema {
        /// Topic of the records.
        topic: Arc<str>,
        /// What is wrong.
        error: AvroSchemaError,
    },
    /// A field that the schema does not have, or not with a fitting type.
    #[error("topic '{topic}': field '{field}': {reason}")]
    Field {
        /// Topic of the records.
        topic: Arc<str>,
        /// Name of the field.
        field: Arc<str>,
        /// What is wrong.
        reason: String,
    },
    /// A `derive` or `where` that cannot be compiled.
    #[error("source '{source_name}': `{sql}`: {reason}")]
    Expression {
        /// Name of the source.
        source_name: Arc<str>,
        /// The expression.
        sql: String,
        /// What is wrong.
        reason: String,
    },
}

/// Decodes the records of one source. Belongs to one thread; reuses its buffers from poll to poll.
#[derive(Debug)]
pub struct SourceDecoder {
    source: usize,
    records: RecordDecoder,
    ahead_ms: i64,
    fields: SchemaRef,
    derive: Vec<(ArrowField, Expression)>,
    filter: Option<Expression>,
    table: Option<TableDecoder>,
}

impl SourceDecoder {
    /// A decoder for the source at index `source` of the plan.
    ///
    /// # Errors
    /// The plan does not fit the schema, or an expression cannot be compiled.
    pub fn new(source: usize, plan: &SourcePlan, registry: Option<Arc<SchemaRegistry>>) -> Result<Self, SourceError> {
        let fields: Vec<Field> = plan
            .fields
            .iter()
            .map(|column| Field {
                unit: (column.name == plan.event_time).then_some(plan.event_time_unit),
                ..Field::new(&column.name, column.data_type)
            })
            .collect();
        let time = (!plan.event_time.is_empty()).then_some((&plan.event_time, plan.event_time_unit));
        let table =
            plan.table.as_ref().map(|table| TableDecoder::new(table, &plan.key_fields, &fields, registry.as_ref()));
        let records = RecordDecoder::new(&plan.topic, &plan.format, fields, &plan.key_fields, time, registry)?;

        let mut known = plan.fields.clone();
        let mut derive = Vec::with_capacity(plan.derive.len());
        let compile = |sql: &str, known: &[Column]| {
            Expression::compile(sql, known).map_err(|error| SourceError::Expression {
                source_name: plan.name.clone(),
                sql: sql.to_owned(),
                reason: error.to_string(),
            })
        };
        for (column, sql) in &plan.derive {
            let expression = compile(sql, &known)?;
            let data_type = expression.data_type();
            derive.push((ArrowField::new(&*column.name, data_type.to_arrow(), true), expression));
            known.push(Column { name: column.name.clone(), data_type });
        }
        let filter = plan.filter.as_ref().map(|sql| compile(sql, &known)).transpose()?;
        let ahead_ms = i64::try_from(plan.ahead.as_millis()).unwrap_or(i64::MAX);
        Ok(Self { source, records, ahead_ms, fields: arrow_schema(&plan.fields), derive, filter, table })
    }

    /// Decodes the records of one poll. The dead letters are in offset order; `batch.next` is −1 where there is no record.
    ///
    /// # Errors
    /// Only while the schema registry does not answer for a schema that is not known yet. Nothing is lost: call again with
    /// the same records.
    pub fn decode(&mut self, records: &Records) -> Result<Decoded, BrokerError> {
        let mut dead = Vec::new();
        let mut rows = Vec::with_capacity(records.len());
        let mut event_times = Vec::with_capacity(records.len());
        let mut deleted = Vec::new();
        for row in 0..records.len() {
            let decoded = match &mut self.table {
                Some(table) => table.row(&mut self.records, records, row),
                None => self.records.row(records.values.get(row)),
            };
            let decoded = decoded.and_then(|event_time| {
                ahead_fault(event_time, records.timestamps[row], self.ahead_ms)
                    .map_or(Ok(event_time), |fault| Err(fault.into()))
            });
            match decoded {
                Ok(event_time) => {
                    self.records.rows.commit();
                    rows.push(row);
                    event_times.push(event_time);
                    if self.table.is_some() {
                        deleted.push(records.values.get(row).is_none());
                    }
                }
                Err(DecodeError::Record(fault)) => dead.push(dead_row(records, row, fault)),
                Err(DecodeError::Registry(error)) => {
                    self.records.rows.finish();
                    return Err(error);
                }
            }
        }
        let (arrays, nonfinite) = self.records.rows.finish();
        let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
        let columns = RecordBatch::try_new_with_options(self.fields.clone(), arrays, &options)
            .expect("the builder makes one array a field, of its type");
        let mut batch = Batch { columns, rows, event_times, deleted };
        let mut filtered = 0;
        self.evaluate(&mut batch, &mut filtered, |row, reason| {
            dead.push(dead_row(records, row, RecordFault::new(reason::EXPRESSION, reason)));
        });
        if let Some(table) = &self.table {
            batch.columns = table.without_deleted(batch.columns, &batch.deleted);
        }
        dead.sort_by_key(|letter| letter.offset);
        Ok(Decoded {
            batch: SourceBatch {
                source: self.source,
                partition: records.partition.partition,
                columns: batch.columns,
                event_times: batch.event_times,
                offsets: batch.rows.iter().map(|row| records.offsets[*row]).collect(),
                next: records.next().map_or(-1, |next| next.0),
                read: records.len() as u64,
                filtered,
                rekeyed: None,
            },
            dead,
            nonfinite,
        })
    }

    /// Adds the derived columns in order, then filters. `fail` gets the record's row and the error of each row that fails.
    fn evaluate(&self, batch: &mut Batch, filtered: &mut u64, mut fail: impl FnMut(usize, String)) {
        const COMPILED: &str = "the expression was compiled over these columns";
        for (field, expression) in &self.derive {
            let values = expression.evaluate_rows(&batch.columns).expect(COMPILED);
            batch.push(field, values.values);
            batch.fail(&values.failed, &mut fail);
        }
        if let Some(expression) = &self.filter {
            let kept = expression.as_filter(&batch.columns).expect(COMPILED);
            if self.table.is_some() {
                batch.deleted.iter_mut().zip(kept.keep.values()).for_each(|(deleted, keep)| *deleted |= !keep);
                return batch.fail(&kept.failed, &mut fail);
            }
            let dropped = kept.keep.len() - kept.keep.true_count();
            *filtered = (dropped - kept.failed.len()) as u64;
            for RowFailure { row, reason } in kept.failed {
                fail(batch.rows[row], reason);
            }
            if dropped > 0 {
                batch.keep(&kept.keep);
            }
        }
    }
}

/// Decoded rows, with the record each one came from.
struct Batch {
    columns: RecordBatch,
    rows: Vec<usize>,
    event_times: Vec<i64>,
    /// Of a table: whether the row deletes its key's.
    deleted: Vec<bool>,
}

impl Batch {
    fn push(&mut self, field: &ArrowField, values: arrow::array::ArrayRef) {
        let schema = self.columns.schema();
        let fields: Vec<_> = schema.fields().iter().cloned().chain(std::iter::once(Arc::new(field.clone()))).collect();
        let mut arrays = self.columns.columns().to_vec();
        arrays.push(values);
        self.columns = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)
            .expect("an expression gives one value a row, of its type");
    }

    fn fail(&mut self, failed: &[RowFailure], fail: &mut impl FnMut(usize, String)) {
        if failed.is_empty() {
            return;
        }
        let mut keep = vec![true; self.rows.len()];
        for RowFailure { row, reason } in failed {
            keep[*row] = false;
            fail(self.rows[*row], reason.clone());
        }
        self.keep(&BooleanArray::from(keep));
    }

    fn keep(&mut self, keep: &BooleanArray) {
        self.columns = filter_record_batch(&self.columns, keep).expect("the filter has one value a row");
        let mut kept = keep.values().iter();
        self.rows.retain(|_| kept.next().unwrap_or(false));
        let mut kept = keep.values().iter();
        self.event_times.retain(|_| kept.next().unwrap_or(false));
        let mut kept = keep.values().iter();
        self.deleted.retain(|_| kept.next().unwrap_or(false));
    }
}

/// The part that sources and labels share: one record into one row, with its key and its instant.
#[derive(Debug)]
pub(super) struct RecordDecoder {
    format: FormatDecoder,
    pub(super) rows: RowBuilder,
    keys: Vec<usize>,
    /// The field with the instant, and its unit.
    time: Option<(usize, TimeUnit)>,
}

#[derive(Debug)]
enum FormatDecoder {
    Json(JsonDecoder),
    Avro(Box<AvroDecoder>),
    Protobuf(ProtobufDecoder),
}

impl RecordDecoder {
    pub(super) fn new(
        topic: &Arc<str>,
        format: &Format,
        fields: Vec<Field>,
        keys: &[Arc<str>],
        time: Option<(&Arc<str>, TimeUnit)>,
        registry: Option<Arc<SchemaRegistry>>,
    ) -> Result<Self, SourceError> {
        let index = |name: &Arc<str>| {
            fields.iter().position(|field| field.name == *name).ok_or_else(|| SourceError::Field {
                topic: topic.clone(),
                field: name.clone(),
                reason: "it is not among the fields to be read".into(),
            })
        };
        let keys = keys.iter().map(index).collect::<Result<_, _>>()?;
        let time = time.map(|(time, unit)| index(time).map(|time| (time, unit))).transpose()?;
        let rows = RowBuilder::new(fields.clone());
        let format =
            match format {
                Format::Json => FormatDecoder::Json(JsonDecoder::new(&fields)),
                Format::Avro { schema } => {
                    let schema = AvroSchema::parse(schema)
                        .map_err(|error| SourceError::Schema { topic: topic.clone(), error })?;
                    let decoder = AvroDecoder::new(schema, fields, registry)
                        .map_err(|(field, reason)| SourceError::Field { topic: topic.clone(), field, reason })?;
                    FormatDecoder::Avro(Box::new(decoder))
                }
                Format::Protobuf { message } => {
                    let decoder = ProtobufDecoder::new(message, fields)
                        .map_err(|(field, reason)| SourceError::Field { topic: topic.clone(), field, reason })?;
                    FormatDecoder::Protobuf(decoder)
                }
            };
        Ok(Self { format, rows, keys, time })
    }

    /// Starts a row and sets it from a record's value. Returns the row's instant, 0 where there is no field for it; the caller
    /// commits the row.
    #[inline]
    pub(super) fn row(&mut self, value: Option<&[u8]>) -> Result<i64, DecodeError> {
        let value = value.ok_or_else(|| {
            RecordFault::new(reason::NULL_VALUE, "the record has no value (a tombstone), and so no event")
        })?;
        self.rows.start();
        match &mut self.format {
            FormatDecoder::Json(decoder) => decoder.decode(value, &mut self.rows)?,
            FormatDecoder::Avro(decoder) => decoder.decode(value, &mut self.rows)?,
            FormatDecoder::Protobuf(decoder) => decoder.decode(value, &mut self.rows)?,
        }
        self.check_keys()?;
        let Some((time, unit)) = self.time else { return Ok(0) };
        match self.rows.columns()[time].instant(unit) {
            Some(ms) if is_plausible(ms) => Ok(ms),
            found => Err(self.time_fault(time, unit, found).into()),
        }
    }

    /// Checks that the row, which was set, has its keys.
    #[inline]
    pub(super) fn check_keys(&self) -> Result<(), RecordFault> {
        let columns = self.rows.columns();
        match self.keys.iter().find(|&&key| columns[key].is_null()) {
            None => Ok(()),
            Some(&key) => {
                let name = &columns[key].field().name;
                let error = format!("key field '{name}' is null or missing: the event belongs to no entity");
                Err(RecordFault::new(reason::NULL_KEY, error))
            }
        }
    }

    #[cold]
    fn time_fault(&self, time: usize, unit: TimeUnit, found: Option<i64>) -> RecordFault {
        let time = &self.rows.columns()[time];
        let name = &time.field().name;
        if time.is_null() {
            return RecordFault::new(reason::NULL_EVENT_TIME, format!("event-time field '{name}' is null or missing"));
        }
        let value = time.describe();
        let Some(ms) = found else {
            let error = format!("event-time field '{name}': {value} cannot be read as an instant");
            return RecordFault::new(reason::BAD_EVENT_TIME, error);
        };
        let hint = match likely_unit(raw(ms, time.field().data_type, unit)) {
            Some(unit) => format!("; as unit \"{unit}\" it would be a date of our time: is event_time.unit right?"),
            None => String::new(),
        };
        RecordFault::new(
            reason::BAD_EVENT_TIME,
            format!("event-time field '{name}': {ms} ms since 1970 is not within the years 1 to 9999{hint}"),
        )
    }
}

/// The number that the record held, as far as it can be told from its milliseconds.
fn raw(ms: i64, data_type: DataType, unit: TimeUnit) -> i64 {
    match (data_type, unit) {
        (DataType::Timestamp | DataType::Int64, TimeUnit::S) => ms / 1_000,
        (_, TimeUnit::Us) => ms.saturating_mul(1_000),
        (_, TimeUnit::Ns) => ms.saturating_mul(1_000_000),
        _ => ms,
    }
}

/// The fault of an event that lies too far ahead of its record's timestamp. The rule looks at the record alone, so that a
/// replay decides the same.
fn ahead_fault(event_time: i64, timestamp: i64, ahead_ms: i64) -> Option<RecordFault> {
    if timestamp < 0 || event_time <= timestamp.saturating_add(ahead_ms) {
        return None;
    }
    Some(RecordFault::new(
        reason::AHEAD_OF_CLOCK,
        format!(
            "event time {} lies {} s ahead of the record's timestamp {}, more than the {} s that `ahead` allows: the \
             producer's clock is wrong, or event_time.unit is",
            to_iso(event_time),
            (event_time - timestamp) / 1_000,
            if is_plausible(timestamp) { to_iso(timestamp) } else { format!("{timestamp} ms") },
            ahead_ms / 1_000
        ),
    ))
}

/// The dead letter of the record at `row`.
#[cold]
pub(super) fn dead_row(records: &Records, row: usize, fault: RecordFault) -> DeadLetter {
    let error = format!("{} offset {}: {}", records.partition, records.offsets[row], fault.error);
    dead_letter::from_records(records, row, STAGE, fault.reason, error)
}

/// All columns may be null: a field may be missing from a record.
pub(super) fn arrow_schema(columns: &[Column]) -> SchemaRef {
    let fields = columns.iter().map(|column| ArrowField::new(&*column.name, column.data_type.to_arrow(), true));
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests;
