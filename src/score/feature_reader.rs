//! Feature rows read back from their topic, for the scoring stage on its own.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanBuilder, Float64Builder, Int32Builder, Int64Builder, ListArray, RecordBatch, StringBuilder,
    TimestampMillisecondBuilder,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{Field as ArrowField, FieldRef, SchemaRef};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};

use super::ScoreError;
use super::json::{self, Names, Object, Parsed};
use crate::broker::Records;
use crate::config::plan::{Column, DataType, Plan};
use crate::source::skip::Skip;
use crate::source::{DeadLetter, dead_letter};
use crate::window::row_columns;

/// What a poll's feature records of one partition gave.
#[derive(Debug, Clone)]
pub struct FeatureRead {
    /// The rows, as the window stage made them.
    pub batch: RecordBatch,
    /// Offset of each row's record.
    pub offsets: Vec<i64>,
    /// Records that are no feature rows of this pipeline.
    pub dead: Vec<DeadLetter>,
}

/// Reads [`FeatureRecord`](super::FeatureRecord) records.
#[derive(Debug)]
pub struct FeatureReader {
    schema: SchemaRef,
    definition: String,
    /// Topic and name of each source.
    sources: Vec<(Arc<str>, Arc<str>)>,
    keys: Names,
    features: Names,
    scratch: Scratch,
}

/// One record's cells, before it is known to be good.
#[derive(Debug, Default)]
struct Scratch {
    keys: Vec<Parsed>,
    features: Vec<Parsed>,
    text: String,
    /// Values of lists.
    items: Vec<Parsed>,
}

impl FeatureReader {
    /// Reads rows of a pipeline into batches of `schema`, which is that of the window stage's rows.
    pub fn new(plan: &Plan, schema: SchemaRef) -> Self {
        Self {
            schema,
            definition: plan.definition.clone(),
            sources: plan.sources.iter().map(|source| (source.topic.clone(), source.name.clone())).collect(),
            keys: Names::new(plan.entity.keys.clone()),
            features: Names::new(plan.feature_columns()),
            scratch: Scratch::default(),
        }
    }

    /// Reads a poll's records of one partition.
    ///
    /// # Errors
    /// Where the schema given to [`FeatureReader::new`] is not one of feature rows of this plan.
    pub fn read(&mut self, records: &Records) -> Result<FeatureRead, ScoreError> {
        let mut rows = Builders::new(&self.schema, self.keys.columns(), self.features.columns());
        let mut offsets = Vec::with_capacity(records.len());
        let mut dead = Vec::new();
        let mut refuse =
            |row, reason, error| dead.push(dead_letter::from_records(records, row, "score", reason, error));
        for row in 0..records.len() {
            let Some(value) = records.values.get(row) else {
                refuse(row, "null_value", "a feature row without a value".to_owned());
                continue;
            };
            match read_one(value, &self.keys, &self.features, &mut self.scratch) {
                Ok(head) if head.definition != self.definition => refuse(
                    row,
                    "definition",
                    format!(
                        "computed by definition {}, and this stage runs {}: run 'driftline features' and 'driftline score' \
                         with the same pipeline.toml",
                        head.definition, self.definition
                    ),
                ),
                Ok(head) => {
                    let known = self.sources.iter().find(|(topic, _)| **topic == *head.source.topic);
                    rows.append(&head, known.map_or("", |(_, name)| name), &self.scratch);
                    offsets.push(records.offsets[row]);
                }
                Err(error) => refuse(row, "malformed", format!("no feature row of this pipeline: {error}")),
            }
        }
        Ok(FeatureRead { batch: rows.finish(&self.schema)?, offsets, dead })
    }
}

fn read_one<'de>(value: &'de [u8], keys: &Names, features: &Names, scratch: &mut Scratch) -> Result<Head<'de>, String> {
    scratch.keys.clear();
    scratch.features.clear();
    scratch.text.clear();
    scratch.items.clear();
    let found = json::read(value, Record { keys, features, scratch: &mut *scratch })?;
    let head = Head {
        definition: found.definition.ok_or("it lacks 'definition'")?,
        event_time: found.event_time.ok_or("it lacks 'event_time'")?,
        watermark: found.watermark,
        source: found.source.ok_or("it lacks 'source'")?,
    };
    complete(keys, &scratch.keys, "entity", false)?;
    complete(features, &scratch.features, "features", true)?;
    Ok(head)
}

/// Every name must be there, so that a renamed feature is noticed instead of scored as missing.
fn complete(names: &Names, cells: &[Parsed], object: &str, nulls: bool) -> Result<(), String> {
    if cells.is_empty() && !names.columns().is_empty() {
        return Err(format!("it lacks '{object}'"));
    }
    for (column, cell) in names.columns().iter().zip(cells) {
        match cell {
            Parsed::Absent => return Err(format!("{object} lack '{}'", column.name)),
            Parsed::Null if !nulls => return Err(format!("{object}: '{}' is null", column.name)),
            _ => {}
        }
    }
    Ok(())
}

struct Head<'de> {
    definition: Cow<'de, str>,
    event_time: i64,
    watermark: Option<i64>,
    source: Origin<'de>,
}

#[derive(Deserialize)]
struct Origin<'a> {
    #[serde(borrow)]
    topic: Cow<'a, str>,
    partition: i32,
    offset: i64,
}

#[derive(Default)]
struct Found<'de> {
    definition: Option<Cow<'de, str>>,
    event_time: Option<i64>,
    watermark: Option<i64>,
    source: Option<Origin<'de>>,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Definition,
    Entity,
    EventTime,
    Watermark,
    Source,
    Features,
    #[serde(other)]
    Other,
}

/// Text that is borrowed from the record where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

struct Record<'a> {
    keys: &'a Names,
    features: &'a Names,
    scratch: &'a mut Scratch,
}

impl<'de> DeserializeSeed<'de> for Record<'_> {
    type Value = Found<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Record<'_> {
    type Value = Found<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a feature row")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found<'de>, A::Error> {
        let mut found = Found::default();
        let Scratch { keys, features, text, items } = self.scratch;
        while let Some(field) = map.next_key::<Field>()? {
            match field {
                Field::Definition => found.definition = Some(map.next_value::<Text<'de>>()?.0),
                Field::EventTime => found.event_time = Some(map.next_value()?),
                Field::Watermark => found.watermark = map.next_value()?,
                Field::Source => found.source = Some(map.next_value()?),
                Field::Entity => map.next_value_seed(Object { names: self.keys, cells: keys, text, items })?,
                Field::Features => {
                    map.next_value_seed(Object { names: self.features, cells: features, text, items })?
                }
                Field::Other => {
                    map.next_value_seed(Skip)?;
                }
            }
        }
        Ok(found)
    }
}

/// The columns of a batch of feature rows, growing.
struct Builders {
    keys: Vec<Builder>,
    event_time: TimestampMillisecondBuilder,
    source: StringBuilder,
    topic: StringBuilder,
    partition: Int32Builder,
    offset: Int64Builder,
    watermark: TimestampMillisecondBuilder,
    features: Vec<Builder>,
}

impl Builders {
    fn new(schema: &SchemaRef, keys: &[Column], features: &[Column]) -> Self {
        let time = |name: &str| {
            let builder = TimestampMillisecondBuilder::new();
            match schema.field_with_name(name) {
                Ok(field) => builder.with_data_type(field.data_type().clone()),
                Err(_) => builder,
            }
        };
        Self {
            keys: keys.iter().map(Builder::new).collect(),
            event_time: time(row_columns::EVENT_TIME),
            source: StringBuilder::new(),
            topic: StringBuilder::new(),
            partition: Int32Builder::new(),
            offset: Int64Builder::new(),
            watermark: time(row_columns::WATERMARK),
            features: features.iter().map(Builder::new).collect(),
        }
    }

    fn append(&mut self, head: &Head<'_>, source: &str, scratch: &Scratch) {
        for (builder, cell) in self.keys.iter_mut().zip(&scratch.keys) {
            builder.append(*cell, scratch);
        }
        self.event_time.append_value(head.event_time);
        self.source.append_value(source);
        self.topic.append_value(&head.source.topic);
        self.partition.append_value(head.source.partition);
        self.offset.append_value(head.source.offset);
        self.watermark.append_option(head.watermark);
        for (builder, cell) in self.features.iter_mut().zip(&scratch.features) {
            builder.append(*cell, scratch);
        }
    }

    fn finish(mut self, schema: &SchemaRef) -> Result<RecordBatch, ScoreError> {
        let mut columns: Vec<(&str, ArrayRef)> = vec![
            (row_columns::EVENT_TIME, Arc::new(self.event_time.finish())),
            (row_columns::SOURCE, Arc::new(self.source.finish())),
            (row_columns::TOPIC, Arc::new(self.topic.finish())),
            (row_columns::PARTITION, Arc::new(self.partition.finish())),
            (row_columns::OFFSET, Arc::new(self.offset.finish())),
            (row_columns::WATERMARK, Arc::new(self.watermark.finish())),
        ];
        let builders = self.keys.iter_mut().chain(&mut self.features);
        let built: Vec<(Arc<str>, ArrayRef)> = builders.map(Builder::finish).collect();
        columns.extend(built.iter().map(|(name, array)| (&**name, array.clone())));
        let find = |name: &str| columns.iter().find(|(column, _)| *column == name).map(|(_, array)| array.clone());
        let arrays = schema.fields().iter().map(|field| {
            let problem = "is in the schema and not among the columns of feature rows".to_owned();
            find(field.name()).ok_or(ScoreError::Column { name: field.name().clone(), problem })
        });
        RecordBatch::try_new(schema.clone(), arrays.collect::<Result<_, _>>()?)
            .map_err(|e| ScoreError::Column { name: "schema".to_owned(), problem: e.to_string() })
    }
}

enum Typed {
    Int64(Int64Builder),
    Float64(Float64Builder),
    Boolean(BooleanBuilder),
    String(StringBuilder),
    Timestamp(TimestampMillisecondBuilder),
    List { items: Box<Builder>, field: FieldRef, lengths: Vec<usize>, valid: Vec<bool> },
}

struct Builder {
    name: Arc<str>,
    typed: Typed,
}

impl Builder {
    fn new(column: &Column) -> Self {
        let typed = match column.data_type {
            DataType::Int64 => Typed::Int64(Int64Builder::new()),
            DataType::Float64 => Typed::Float64(Float64Builder::new()),
            DataType::Boolean => Typed::Boolean(BooleanBuilder::new()),
            DataType::String => Typed::String(StringBuilder::new()),
            DataType::Timestamp => {
                Typed::Timestamp(TimestampMillisecondBuilder::new().with_data_type(DataType::Timestamp.to_arrow()))
            }
            DataType::List(element) => {
                let item = Column { name: column.name.clone(), data_type: element.into() };
                Typed::List {
                    field: Arc::new(ArrowField::new_list_field(item.data_type.to_arrow(), false)),
                    items: Box::new(Self::new(&item)),
                    lengths: Vec::new(),
                    valid: Vec::new(),
                }
            }
        };
        Self { name: column.name.clone(), typed }
    }

    /// Appends a cell of the column's own type; [`Object`] reads no other.
    fn append(&mut self, cell: Parsed, scratch: &Scratch) {
        match (&mut self.typed, cell) {
            (Typed::Int64(builder), Parsed::Int64(value)) => builder.append_value(value),
            (Typed::Float64(builder), Parsed::Float64(value)) => builder.append_value(value),
            (Typed::Boolean(builder), Parsed::Boolean(value)) => builder.append_value(value),
            (Typed::String(builder), Parsed::String(start, end)) => builder.append_value(&scratch.text[start..end]),
            (Typed::Timestamp(builder), Parsed::Int64(value)) => builder.append_value(value),
            (Typed::Int64(builder), _) => builder.append_null(),
            (Typed::Float64(builder), _) => builder.append_null(),
            (Typed::Boolean(builder), _) => builder.append_null(),
            (Typed::String(builder), _) => builder.append_null(),
            (Typed::Timestamp(builder), _) => builder.append_null(),
            (Typed::List { items, lengths, valid, .. }, Parsed::List(start, end)) => {
                scratch.items[start..end].iter().for_each(|item| items.append(*item, scratch));
                lengths.push(end - start);
                valid.push(true);
            }
            (Typed::List { lengths, valid, .. }, _) => {
                lengths.push(0);
                valid.push(false);
            }
        }
    }

    fn finish(&mut self) -> (Arc<str>, ArrayRef) {
        let array: ArrayRef = match &mut self.typed {
            Typed::Int64(builder) => Arc::new(builder.finish()),
            Typed::Float64(builder) => Arc::new(builder.finish()),
            Typed::Boolean(builder) => Arc::new(builder.finish()),
            Typed::String(builder) => Arc::new(builder.finish()),
            Typed::Timestamp(builder) => Arc::new(builder.finish()),
            Typed::List { items, field, lengths, valid } => {
                let offsets = OffsetBuffer::from_lengths(std::mem::take(lengths));
                let nulls = NullBuffer::from(std::mem::take(valid));
                let nulls = (nulls.null_count() > 0).then_some(nulls);
                Arc::new(ListArray::new(field.clone(), offsets, items.finish().1, nulls))
            }
        };
        (self.name.clone(), array)
    }
}

#[cfg(test)]
mod tests;
