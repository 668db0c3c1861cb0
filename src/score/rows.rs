//! Feature batches as the encoders read them: columns found once a schema, and read cell by cell without conversions.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray,
    TimestampMillisecondArray,
};
use arrow::datatypes::{DataType, Float64Type, Int32Type, Int64Type, SchemaRef, TimeUnit, TimestampMillisecondType};

use super::ScoreError;
use crate::config::plan::Plan;
use crate::window::row_columns;

/// Where the columns of feature rows are in batches of one schema.
#[derive(Debug)]
pub(super) struct Layout {
    keys: Vec<Arc<str>>,
    features: Vec<Arc<str>>,
    known: Option<(SchemaRef, Indexes)>,
}

#[derive(Debug, Clone)]
struct Indexes {
    keys: Vec<usize>,
    features: Vec<usize>,
    event_time: usize,
    topic: usize,
    partition: usize,
    offset: usize,
    watermark: usize,
}

impl Layout {
    /// Rows of a plan with these features, in this order.
    pub(super) fn new(plan: &Plan, features: impl IntoIterator<Item = Arc<str>>) -> Self {
        let keys = plan.entity.keys.iter().map(|key| key.name.clone()).collect();
        Self { keys, features: features.into_iter().collect(), known: None }
    }

    /// The columns of a batch.
    pub(super) fn rows<'a>(&mut self, batch: &'a RecordBatch) -> Result<Rows<'a>, ScoreError> {
        let schema = batch.schema_ref();
        let known = self.known.as_ref().filter(|(known, _)| SchemaRef::ptr_eq(known, schema) || known == schema);
        let indexes = match known {
            Some((_, indexes)) => indexes.clone(),
            None => {
                let indexes = self.find(schema)?;
                self.known = Some((schema.clone(), indexes.clone()));
                indexes
            }
        };
        let cells = |index: &usize| Cells::of(schema.field(*index).name(), batch.column(*index));
        let typed = |index: usize| (schema.field(index).name().as_str(), batch.column(index));
        Ok(Rows {
            keys: indexes.keys.iter().map(cells).collect::<Result<_, _>>()?,
            features: indexes.features.iter().map(cells).collect::<Result<_, _>>()?,
            event_time: time(typed(indexes.event_time))?,
            watermark: time(typed(indexes.watermark))?,
            topic: text(typed(indexes.topic))?,
            partition: int32(typed(indexes.partition))?,
            offset: int64(typed(indexes.offset))?,
        })
    }

    fn find(&self, schema: &SchemaRef) -> Result<Indexes, ScoreError> {
        let index = |name: &str| {
            schema
                .index_of(name)
                .map_err(|_| ScoreError::Column { name: name.to_owned(), problem: "is missing".into() })
        };
        let all = |names: &[Arc<str>]| names.iter().map(|name| index(name)).collect::<Result<Vec<_>, _>>();
        Ok(Indexes {
            keys: all(&self.keys)?,
            features: all(&self.features)?,
            event_time: index(row_columns::EVENT_TIME)?,
            topic: index(row_columns::TOPIC)?,
            partition: index(row_columns::PARTITION)?,
            offset: index(row_columns::OFFSET)?,
            watermark: index(row_columns::WATERMARK)?,
        })
    }
}

/// The columns of a batch of feature rows.
pub(super) struct Rows<'a> {
    pub(super) keys: Vec<Cells<'a>>,
    pub(super) features: Vec<Cells<'a>>,
    pub(super) event_time: &'a TimestampMillisecondArray,
    pub(super) watermark: &'a TimestampMillisecondArray,
    pub(super) topic: &'a StringArray,
    pub(super) partition: &'a Int32Array,
    pub(super) offset: &'a Int64Array,
}

/// A typed column.
pub(super) enum Cells<'a> {
    Int64(&'a Int64Array),
    Float64(&'a Float64Array),
    Boolean(&'a BooleanArray),
    String(&'a StringArray),
    Timestamp(&'a TimestampMillisecondArray),
    List(&'a ListArray, Box<Cells<'a>>),
}

/// One value that is no list.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Cell<'a> {
    Null,
    Int64(i64),
    Float64(f64),
    Boolean(bool),
    String(&'a str),
}

impl<'a> Cells<'a> {
    pub(super) fn of(name: &str, column: &'a ArrayRef) -> Result<Self, ScoreError> {
        match column.data_type() {
            DataType::Int64 => Ok(Self::Int64(column.as_primitive::<Int64Type>())),
            DataType::Float64 => Ok(Self::Float64(column.as_primitive::<Float64Type>())),
            DataType::Boolean => Ok(Self::Boolean(column.as_boolean())),
            DataType::Utf8 => Ok(Self::String(column.as_string::<i32>())),
            DataType::Timestamp(TimeUnit::Millisecond, _) => {
                Ok(Self::Timestamp(column.as_primitive::<TimestampMillisecondType>()))
            }
            DataType::List(_) => {
                let lists = column.as_list::<i32>();
                Ok(Self::List(lists, Box::new(Self::of(name, lists.values())?)))
            }
            other => Err(wrong(name, other)),
        }
    }

    /// The list of a row, where it is one: its values as cells, and which of them.
    #[inline]
    pub(super) fn list(&self, row: usize) -> Option<(&Self, Range<usize>)> {
        let Self::List(lists, items) = self else { return None };
        let offsets = lists.value_offsets();
        lists.is_valid(row).then(|| (items.as_ref(), offsets[row] as usize..offsets[row + 1] as usize))
    }

    /// The value of a row; timestamps in milliseconds since 1970 UTC. A list is read by [`Cells::list`], and none here.
    #[inline]
    pub(super) fn cell(&self, row: usize) -> Cell<'a> {
        fn some<'a, T>(
            array: &'a impl Array,
            row: usize,
            value: impl FnOnce() -> T,
            cell: fn(T) -> Cell<'a>,
        ) -> Cell<'a> {
            if array.is_null(row) { Cell::Null } else { cell(value()) }
        }
        match self {
            Self::Int64(array) => some(*array, row, || array.value(row), Cell::Int64),
            Self::Float64(array) => some(*array, row, || array.value(row), Cell::Float64),
            Self::Boolean(array) => some(*array, row, || array.value(row), Cell::Boolean),
            Self::String(array) => some(*array, row, || array.value(row), Cell::String),
            Self::Timestamp(array) => some(*array, row, || array.value(row), Cell::Int64),
            Self::List(..) => Cell::Null,
        }
    }
}

fn wrong(name: &str, found: &DataType) -> ScoreError {
    ScoreError::Column { name: name.to_owned(), problem: format!("has the type {found}") }
}

fn time<'a>((name, column): (&str, &'a ArrayRef)) -> Result<&'a TimestampMillisecondArray, ScoreError> {
    column.as_primitive_opt::<TimestampMillisecondType>().ok_or_else(|| wrong(name, column.data_type()))
}

fn text<'a>((name, column): (&str, &'a ArrayRef)) -> Result<&'a StringArray, ScoreError> {
    column.as_string_opt::<i32>().ok_or_else(|| wrong(name, column.data_type()))
}

fn int32<'a>((name, column): (&str, &'a ArrayRef)) -> Result<&'a Int32Array, ScoreError> {
    column.as_primitive_opt::<Int32Type>().ok_or_else(|| wrong(name, column.data_type()))
}

fn int64<'a>((name, column): (&str, &'a ArrayRef)) -> Result<&'a Int64Array, ScoreError> {
    column.as_primitive_opt::<Int64Type>().ok_or_else(|| wrong(name, column.data_type()))
}
