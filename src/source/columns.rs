//! Columns that are filled record by record: a record's fields are set one after the other, then the whole row is
//! committed, or rolled back without a trace.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BooleanArray, BooleanBufferBuilder, Float64Array, Int64Array, StringArray,
    TimestampMillisecondArray,
};
use arrow::buffer::{Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};

use super::event_time;
use super::fault::excerpt;
use crate::config::plan::{DataType, TimeUnit};

/// Integers up to this magnitude are exact as a float64: 2^53.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// What a decoder must know about one field.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    /// Name; dots lead into nested records.
    pub name: Arc<str>,
    /// Type of the column.
    pub data_type: DataType,
    /// Unit of plain numbers in a timestamp field. `None`: numbers are milliseconds, and text is read as ISO 8601 too.
    pub unit: Option<TimeUnit>,
    /// Takes true and false for 1 and 0 in a float64 field.
    pub takes_booleans: bool,
}

impl Field {
    pub(crate) fn new(name: &Arc<str>, data_type: DataType) -> Self {
        Self { name: name.clone(), data_type, unit: None, takes_booleans: false }
    }
}

/// A field's value that does not fit, kept until the row is finished: a later duplicate of the field may still mend it.
#[derive(Debug, Clone)]
pub(crate) struct Misfit {
    /// What was found, in words.
    pub found: String,
    /// What to do about it; may be empty.
    pub help: &'static str,
    /// Byte of the record at which it starts, where the decoder knows it at once.
    pub at: Option<usize>,
}

/// The row's value of one column, until it is committed.
#[derive(Debug)]
enum Pending {
    Null,
    Nonfinite,
    Integer(i64),
    Float(f64),
    Boolean(bool),
    /// The bytes after the last committed text.
    Text,
    Misfit(Box<Misfit>),
}

#[derive(Debug)]
enum Values {
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Booleans(BooleanBufferBuilder),
    Texts { bytes: Vec<u8>, ends: Vec<i32> },
}

/// One column in the making.
#[derive(Debug)]
pub(crate) struct ColumnBuilder {
    field: Field,
    pending: Pending,
    values: Values,
    valid: BooleanBufferBuilder,
    nulls: usize,
    nonfinite: u64,
}

const QUOTED_NUMBER: &str = "a number in quotes is text: send it without quotes, or declare the field as string";
const NOT_ISO: &str = "write 2024-05-01T12:30:00Z or 2024-05-01";

impl ColumnBuilder {
    fn new(field: Field) -> Self {
        let values = match field.data_type {
            DataType::Int64 | DataType::Timestamp => Values::Integers(Vec::new()),
            DataType::Float64 => Values::Floats(Vec::new()),
            DataType::Boolean => Values::Booleans(BooleanBufferBuilder::new(0)),
            DataType::String => Values::Texts { bytes: Vec::new(), ends: Vec::new() },
            DataType::List(_) => unreachable!("no field is declared as a list"),
        };
        Self { field, pending: Pending::Null, values, valid: BooleanBufferBuilder::new(0), nulls: 0, nonfinite: 0 }
    }

    pub(crate) fn field(&self) -> &Field {
        &self.field
    }

    /// The row has no value here. Also forgets what an earlier duplicate set.
    #[inline]
    pub(crate) fn set_null(&mut self) {
        self.pending = Pending::Null;
    }

    #[inline]
    pub(crate) fn set_integer(&mut self, value: i64) {
        self.pending = match self.field.data_type {
            DataType::Int64 => Pending::Integer(value),
            DataType::Float64 => Pending::Float(value as f64),
            DataType::Timestamp => match event_time::from_integer(value, self.field.unit.unwrap_or(TimeUnit::Ms)) {
                Some(ms) => Pending::Integer(ms),
                None if self.field.unit == Some(TimeUnit::Iso) => misfit(
                    format!("number {value}"),
                    "the unit is \"iso\", which is text; set the unit of these numbers",
                ),
                None => misfit(format!("number {value}"), "it overflows in milliseconds; is the unit right?"),
            },
            DataType::Boolean => misfit(format!("number {value}"), "send true or false"),
            DataType::String | DataType::List(_) => {
                misfit(format!("number {value}"), "send text, or declare the field as int64")
            }
        };
    }

    #[inline]
    pub(crate) fn set_unsigned(&mut self, value: u64) {
        match (i64::try_from(value), self.field.data_type) {
            (Ok(value), _) => self.set_integer(value),
            (Err(_), DataType::Float64) => self.pending = Pending::Float(value as f64),
            (Err(_), DataType::String | DataType::Boolean | DataType::List(_)) => self.set_integer(i64::MAX),
            (Err(_), DataType::Int64 | DataType::Timestamp) => {
                self.pending = misfit(format!("number {value}"), "it is out of the range of 64-bit signed integers");
            }
        }
    }

    #[inline]
    pub(crate) fn set_float(&mut self, value: f64) {
        self.pending = match self.field.data_type {
            DataType::Float64 if value.is_finite() => Pending::Float(value),
            DataType::Float64 | DataType::Int64 | DataType::Timestamp if !value.is_finite() => Pending::Nonfinite,
            DataType::Int64 if value.fract() != 0.0 => misfit(
                format!("number {value}"),
                "it has a fraction: send a whole number, or declare the field as float64",
            ),
            DataType::Int64 if value.abs() <= EXACT => Pending::Integer(value as i64),
            DataType::Int64 => misfit(
                format!("number {value:e}"),
                "it is out of the range in which floats are whole numbers exactly (and maybe of int64)",
            ),
            DataType::Timestamp => match event_time::from_float(value, self.field.unit.unwrap_or(TimeUnit::Ms)) {
                Some(ms) => Pending::Integer(ms),
                None if self.field.unit == Some(TimeUnit::Iso) => misfit(
                    format!("number {value}"),
                    "the unit is \"iso\", which is text; set the unit of these numbers",
                ),
                None => misfit(format!("number {value:e}"), "it overflows in milliseconds; is the unit right?"),
            },
            DataType::Boolean => misfit(format!("number {value}"), "send true or false"),
            _ => misfit(format!("number {value}"), "send text, or declare the field as float64"),
        };
    }

    /// An instant whose unit the record's own schema gives.
    #[inline]
    pub(crate) fn set_instant(&mut self, value: i64, unit: TimeUnit) {
        self.pending = match (self.field.data_type, event_time::from_integer(value, unit)) {
            (DataType::Timestamp, Some(ms)) => Pending::Integer(ms),
            (DataType::Timestamp, None) => misfit(format!("instant {value}"), "it overflows in milliseconds"),
            _ => return self.set_integer(value),
        };
    }

    #[inline]
    pub(crate) fn set_boolean(&mut self, value: bool) {
        self.pending = match self.field.data_type {
            DataType::Boolean => Pending::Boolean(value),
            DataType::Float64 if self.field.takes_booleans => Pending::Float(f64::from(u8::from(value))),
            _ => misfit(value.to_string(), "declare the field as boolean"),
        };
    }

    #[inline]
    pub(crate) fn set_text(&mut self, value: &str) {
        self.pending = match (self.field.data_type, &mut self.values) {
            (DataType::String, Values::Texts { bytes, ends }) => {
                bytes.truncate(ends.last().map_or(0, |end| *end as usize));
                bytes.extend_from_slice(value.as_bytes());
                Pending::Text
            }
            (DataType::Timestamp, _) => match (self.field.unit, event_time::parse_iso(value)) {
                (None | Some(TimeUnit::Iso), Some(ms)) => Pending::Integer(ms),
                (None | Some(TimeUnit::Iso), None) => misfit(format!("text {}", excerpt(value)), NOT_ISO),
                (Some(_), Some(_)) => misfit(
                    format!("text {}", excerpt(value)),
                    "the unit is a number's: send a number, or set event_time.unit = \"iso\"",
                ),
                (Some(_), None) => misfit(format!("text {}", excerpt(value)), "send a number in the declared unit"),
            },
            (DataType::Boolean, _) => misfit(format!("text {}", excerpt(value)), "send true or false without quotes"),
            _ if value.trim().parse::<f64>().is_ok() => misfit(format!("text {}", excerpt(value)), QUOTED_NUMBER),
            _ => misfit(format!("text {}", excerpt(value)), ""),
        };
    }

    /// The row has something here that no column can hold.
    #[cold]
    pub(crate) fn set_misfit(&mut self, found: &str, help: &'static str) {
        self.pending = misfit(found.to_owned(), help);
    }

    /// Says where the value that was just set starts, for the message of a misfit.
    #[inline]
    pub(crate) fn note_position(&mut self, at: usize) {
        if let Pending::Misfit(misfit) = &mut self.pending {
            misfit.at = Some(at);
        }
    }

    fn misfit(&self) -> Option<&Misfit> {
        match &self.pending {
            Pending::Misfit(misfit) => Some(misfit),
            _ => None,
        }
    }

    /// True if the row to be committed is null here.
    pub(crate) fn is_null(&self) -> bool {
        matches!(self.pending, Pending::Null | Pending::Nonfinite)
    }

    /// The instant that the row to be committed has here, milliseconds. Plain numbers and text are read by `unit`.
    /// `None` where it cannot be told.
    pub(crate) fn instant(&self, unit: TimeUnit) -> Option<i64> {
        match (&self.pending, self.field.data_type) {
            (Pending::Integer(ms), DataType::Timestamp) => Some(*ms),
            (Pending::Integer(value), _) => event_time::from_integer(*value, unit),
            (Pending::Float(value), _) => event_time::from_float(*value, unit),
            (Pending::Text, _) if unit == TimeUnit::Iso => event_time::parse_iso(self.pending_text()),
            _ => None,
        }
    }

    /// The row's value here in words, for error messages.
    #[cold]
    pub(crate) fn describe(&self) -> String {
        match &self.pending {
            Pending::Null | Pending::Nonfinite => "null".into(),
            Pending::Integer(value) => value.to_string(),
            Pending::Float(value) => value.to_string(),
            Pending::Boolean(value) => value.to_string(),
            Pending::Text => excerpt(self.pending_text()),
            Pending::Misfit(misfit) => misfit.found.clone(),
        }
    }

    /// The row's value here as it is written into a record's key: text as it is, a number in decimal.
    pub(crate) fn plain_text(&self) -> String {
        match &self.pending {
            Pending::Text => self.pending_text().to_owned(),
            _ => self.describe(),
        }
    }

    /// The row's value here as JSON, for keys of several parts.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match &self.pending {
            Pending::Integer(value) => (*value).into(),
            Pending::Float(value) => (*value).into(),
            Pending::Boolean(value) => (*value).into(),
            Pending::Text => self.pending_text().into(),
            Pending::Null | Pending::Nonfinite | Pending::Misfit(_) => serde_json::Value::Null,
        }
    }

    fn pending_text(&self) -> &str {
        let Values::Texts { bytes, ends } = &self.values else { return "" };
        let start = ends.last().map_or(0, |end| *end as usize);
        std::str::from_utf8(&bytes[start..]).expect("only whole texts are appended")
    }

    #[inline]
    fn start(&mut self) {
        self.pending = Pending::Null;
        if let Values::Texts { bytes, ends } = &mut self.values {
            bytes.truncate(ends.last().map_or(0, |end| *end as usize));
        }
    }

    #[inline]
    fn commit(&mut self) {
        let mut valid = true;
        match (&self.pending, &mut self.values) {
            (Pending::Integer(value), Values::Integers(values)) => values.push(*value),
            (Pending::Float(value), Values::Floats(values)) => values.push(*value),
            (Pending::Boolean(value), Values::Booleans(values)) => values.append(*value),
            (Pending::Text, Values::Texts { bytes, ends }) => ends.push(end_of(bytes)),
            (pending, values) => {
                valid = false;
                self.nulls += 1;
                self.nonfinite += u64::from(matches!(pending, Pending::Nonfinite));
                match values {
                    Values::Integers(values) => values.push(0),
                    Values::Floats(values) => values.push(0.0),
                    Values::Booleans(values) => values.append(false),
                    Values::Texts { bytes, ends } => {
                        // An earlier duplicate of the field may have left a text behind.
                        bytes.truncate(ends.last().map_or(0, |end| *end as usize));
                        ends.push(end_of(bytes));
                    }
                }
            }
        }
        self.valid.append(valid);
    }

    fn finish(&mut self) -> ArrayRef {
        self.start();
        let valid = self.valid.finish();
        let nulls = (std::mem::take(&mut self.nulls) > 0).then(|| NullBuffer::new(valid));
        match &mut self.values {
            Values::Integers(values) => {
                let values = std::mem::take(values).into();
                if self.field.data_type == DataType::Timestamp {
                    Arc::new(TimestampMillisecondArray::new(values, nulls).with_timezone("UTC"))
                } else {
                    Arc::new(Int64Array::new(values, nulls))
                }
            }
            Values::Floats(values) => Arc::new(Float64Array::new(std::mem::take(values).into(), nulls)),
            Values::Booleans(values) => Arc::new(BooleanArray::new(values.finish(), nulls)),
            Values::Texts { bytes, ends } => {
                let mut offsets = Vec::with_capacity(ends.len() + 1);
                offsets.push(0);
                offsets.append(ends);
                let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
                Arc::new(StringArray::new(offsets, Buffer::from_vec(std::mem::take(bytes)), nulls))
            }
        }
    }
}

#[inline]
fn end_of(bytes: &[u8]) -> i32 {
    i32::try_from(bytes.len()).expect("a poll is bounded far below 2 GiB")
}

#[cold]
fn misfit(found: String, help: &'static str) -> Pending {
    Pending::Misfit(Box::new(Misfit { found, help, at: None }))
}

/// All columns of a source in the making.
#[derive(Debug)]
pub(crate) struct RowBuilder {
    columns: Vec<ColumnBuilder>,
    rows: usize,
}

impl RowBuilder {
    pub(crate) fn new(fields: Vec<Field>) -> Self {
        Self { columns: fields.into_iter().map(ColumnBuilder::new).collect(), rows: 0 }
    }

    /// Begins a row with every field null, and forgets the last one if it was not committed.
    #[inline]
    pub(crate) fn start(&mut self) {
        for column in &mut self.columns {
            column.start();
        }
    }

    #[inline]
    pub(crate) fn column(&mut self, index: usize) -> &mut ColumnBuilder {
        &mut self.columns[index]
    }

    pub(crate) fn columns(&self) -> &[ColumnBuilder] {
        &self.columns
    }

    /// The first field whose value does not fit.
    #[inline]
    pub(crate) fn misfit(&self) -> Option<(usize, &Misfit)> {
        self.columns.iter().enumerate().find_map(|(index, column)| column.misfit().map(|misfit| (index, misfit)))
    }

    /// Keeps the row. It has no misfit.
    #[inline]
    pub(crate) fn commit(&mut self) {
        for column in &mut self.columns {
            column.commit();
        }
        self.rows += 1;
    }

    /// The committed rows as arrays, and how many NaN and infinite values among them became null. Empties the builder.
    pub(crate) fn finish(&mut self) -> (Vec<ArrayRef>, u64) {
        let rows = std::mem::take(&mut self.rows);
        let arrays: Vec<ArrayRef> = self.columns.iter_mut().map(ColumnBuilder::finish).collect();
        debug_assert!(arrays.iter().all(|array| array.len() == rows));
        (arrays, self.columns.iter_mut().map(|column| std::mem::take(&mut column.nonfinite)).sum())
    }
}
