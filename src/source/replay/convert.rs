//! From a row of a file to a record of a source, in the source's own format.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::{Map, Number, Value};

use super::file::ReplayRow;
use crate::broker::SchemaRegistry;
use crate::config::plan::{DataType, Format, SourcePlan, TimeUnit};
use crate::source::avro::{AvroEncoder, AvroSchema, DecodeError};
use crate::source::columns::Field;
use crate::source::decode::{RecordDecoder, SourceError};
use crate::source::event_time::{parse_iso, to_integer, to_iso};
use crate::source::fault::excerpt;

/// A record, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayRecord {
    /// Text of the entity key; a composite key is a JSON array of its parts.
    pub key: Vec<u8>,
    /// The event in the source's format.
    pub value: Vec<u8>,
    /// Event time, milliseconds since 1970 UTC.
    pub event_time: i64,
}

/// Turns rows into records of one source.
///
/// Fields are taken from the columns of their name, or as mapped. A text becomes the number, instant or truth value that the
/// field is declared as; other texts stay as they are. A JSON record carries all columns, an Avro record the fields of its
/// schema. Each record is then read as the pipeline will read it, so that what would become a dead letter is a bad row.
#[derive(Debug)]
pub struct Converter {
    encoder: Encoder,
    /// Types of the fields that are known, by name.
    types: HashMap<String, Kind>,
    /// Column by field.
    map: BTreeMap<String, String>,
    check: RecordDecoder,
    keys: Vec<usize>,
}

#[derive(Debug)]
enum Encoder {
    Json,
    /// The encoder, bytes of framing, and the schema's fields.
    Avro {
        encoder: AvroEncoder,
        frame: usize,
        fields: Vec<String>,
    },
}

/// What a field is declared as.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Number {
        whole: bool,
    },
    Boolean,
    Text,
    /// An instant in this unit; `None` where the schema's logical type decides, which the encoder knows.
    Instant {
        unit: Option<TimeUnit>,
        as_text: bool,
    },
}

impl Converter {
    /// A converter for a source. With a registry, Avro records are framed with the id under which their schema is
    /// registered for `<topic>-value`; it is registered where it is not.
    ///
    /// `map` names the column of each field whose column has another name.
    ///
    /// # Errors
    /// The plan does not fit its schema, `map` names an unknown field, or the registry does not answer or refuses.
    pub fn new(
        plan: &SourcePlan,
        registry: Option<&SchemaRegistry>,
        map: BTreeMap<String, String>,
    ) -> Result<Self, ConvertError> {
        let mut types = HashMap::new();
        let mut known = Vec::new();
        let encoder = match &plan.format {
            Format::Json => Encoder::Json,
            Format::Protobuf { .. } => return Err(ConvertError::Protobuf { topic: plan.topic.clone() }),
            Format::Avro { schema: text } => {
                let schema = AvroSchema::parse(text)
                    .map_err(|error| ConvertError::Plan(SourceError::Schema { topic: plan.topic.clone(), error }))?;
                let fields = schema.record_fields();
                known.extend(fields.iter().cloned());
                for field in schema.fields() {
                    if field.name.contains('.') {
                        known.push(field.name.clone());
                    }
                    types.insert(field.name, Kind::of(field.data_type, None));
                }
                match registry {
                    None => Encoder::Avro { encoder: AvroEncoder::plain(schema), frame: 0, fields },
                    Some(registry) => {
                        let id = registry.register(&format!("{}-value", plan.topic), text)?;
                        Encoder::Avro { encoder: AvroEncoder::framed(schema, id), frame: 5, fields }
                    }
                }
            }
        };
        let is_json = matches!(encoder, Encoder::Json);
        for column in &plan.fields {
            let is_time = column.name == plan.event_time;
            let kind = match (is_time, column.data_type) {
                (true, _) if plan.event_time_unit == TimeUnit::Iso => {
                    Kind::Instant { unit: Some(TimeUnit::Iso), as_text: true }
                }
                // A logical type of the schema knows its unit; a plain number has the plan's.
                (true, _) if types.get(&*column.name).is_some_and(|kind| matches!(kind, Kind::Instant { .. })) => {
                    continue;
                }
                (true, _) => Kind::Instant { unit: Some(plan.event_time_unit), as_text: false },
                (false, data_type) if is_json => Kind::of(data_type, Some(TimeUnit::Ms)),
                (false, _) => continue,
            };
            types.insert(column.name.to_string(), kind);
        }
        if let (Some(unknown), Encoder::Avro { .. }) = (map.keys().find(|field| !known.contains(field)), &encoder) {
            return Err(ConvertError::Map { field: unknown.clone(), known: known.join(", ") });
        }
        let fields: Vec<Field> = plan
            .fields
            .iter()
            .map(|column| Field {
                unit: (column.name == plan.event_time).then_some(plan.event_time_unit),
                ..Field::new(&column.name, column.data_type)
            })
            .collect();
        let index = |name: &Arc<str>| fields.iter().position(|field| field.name == *name);
        let keys = plan.key_fields.iter().filter_map(index).collect();
        let time = (!plan.event_time.is_empty()).then_some((&plan.event_time, plan.event_time_unit));
        let check = RecordDecoder::new(&plan.topic, &plan.format, fields, &plan.key_fields, time, None)
            .map_err(ConvertError::Plan)?;
        Ok(Self { encoder, types, map, check, keys })
    }

    /// Turns a row into a record.
    ///
    /// # Errors
    /// Says which column or field is wrong, and how.
    pub fn convert(&mut self, row: ReplayRow) -> Result<ReplayRecord, String> {
        let values = self.rename(row.values)?;
        let (value, frame) = match &self.encoder {
            Encoder::Json => {
                let mut record = Map::with_capacity(values.len());
                for (name, value) in values {
                    let value = self.typed(&name, value)?;
                    put(&mut record, &name, value)?;
                }
                (Value::Object(record).to_string().into_bytes(), 0)
            }
            Encoder::Avro { encoder, frame, fields } => {
                let mut record = Map::with_capacity(fields.len());
                for (name, value) in values {
                    let top = name.split_once('.').map_or(&*name, |(top, _)| top);
                    if fields.iter().any(|field| field == top) {
                        let value = self.typed(&name, value)?;
                        put(&mut record, &name, value)?;
                    }
                }
                (encoder.to_vec(&Value::Object(record)).map_err(|error| error.to_string())?, *frame)
            }
        };
        let event_time = match self.check.row(Some(&value[frame..])) {
            Ok(event_time) => event_time,
            Err(DecodeError::Record(fault)) => return Err(fault.error),
            Err(DecodeError::Registry(error)) => return Err(error.to_string()),
        };
        Ok(ReplayRecord { key: self.key(), value, event_time })
    }

    /// Values by field instead of by column.
    fn rename(&self, mut values: Map<String, Value>) -> Result<Vec<(String, Value)>, String> {
        let mut renamed = Vec::with_capacity(values.len());
        for (field, column) in &self.map {
            let value = values.get(column).cloned().ok_or_else(|| {
                let known = values.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                format!("there is no column '{column}', which field '{field}' is mapped to; there are {known}")
            })?;
            renamed.push((field.clone(), value));
        }
        for column in self.map.values() {
            values.remove(column);
        }
        renamed.extend(values.into_iter().filter(|(name, _)| !self.map.contains_key(name)));
        Ok(renamed)
    }

    /// The value as the field is declared. What already has a fitting kind, or no declaration, stays as it is.
    fn typed(&self, name: &str, value: Value) -> Result<Value, String> {
        let Some(kind) = self.types.get(name) else { return Ok(value) };
        let fault =
            |text: &str, expected: &str| format!("field '{name}': expected {expected}, found text {}", excerpt(text));
        Ok(match (kind, value) {
            (Kind::Number { whole: true }, Value::String(text)) => {
                let number = text.trim().parse::<i64>().ok().or_else(|| whole(text.trim().parse().ok()?));
                number.ok_or_else(|| fault(&text, "a whole number"))?.into()
            }
            (Kind::Number { whole: false }, Value::String(text)) => match text.trim().parse::<f64>() {
                // NaN and infinities have no place in JSON; they are null wherever they come from.
                Ok(number) => Number::from_f64(number).map_or(Value::Null, Value::Number),
                Err(_) => return Err(fault(&text, "a number")),
            },
            (Kind::Boolean, Value::String(text)) => match text.trim() {
                "true" | "True" | "TRUE" | "t" | "1" => true.into(),
                "false" | "False" | "FALSE" | "f" | "0" => false.into(),
                _ => return Err(fault(&text, "true or false")),
            },
            (Kind::Text, Value::Number(number)) => number.to_string().into(),
            (Kind::Text, Value::Bool(value)) => value.to_string().into(),
            (Kind::Instant { unit, as_text }, Value::String(text)) => {
                match (parse_iso(text.trim()), text.trim().parse::<i64>(), unit) {
                    (Some(ms), _, _) if *as_text => to_iso(ms).into(),
                    (Some(ms), _, Some(unit)) => {
                        to_integer(ms, *unit).ok_or_else(|| fault(&text, "an instant within 64 bits"))?.into()
                    }
                    (Some(_), _, None) => text.into(),
                    (None, Ok(number), _) if !*as_text => number.into(),
                    _ => match text.trim().parse::<f64>() {
                        Ok(number) if !*as_text => Number::from_f64(number).map_or(Value::Null, Value::Number),
                        _ => return Err(fault(&text, "an instant (2024-05-01T12:30:00Z, 2024-05-01 or a number)")),
                    },
                }
            }
            (_, value) => value,
        })
    }

    fn key(&self) -> Vec<u8> {
        let columns = self.check.rows.columns();
        match &self.keys[..] {
            [only] => columns[*only].plain_text().into_bytes(),
            keys => Value::Array(keys.iter().map(|key| columns[*key].to_json()).collect()).to_string().into_bytes(),
        }
    }
}

/// Why rows cannot be turned into records of a source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The plan does not fit its schema.
    #[error(transparent)]
    Plan(SourceError),
    /// The registry does not answer or refuses.
    #[error(transparent)]
    Registry(#[from] crate::broker::BrokerError),
    /// There is no encoder of that format.
    #[error(
        "topic '{topic}': a file's rows are written as JSON or Avro; records in Protobuf have to come from their producer"
    )]
    Protobuf {
        /// Topic of the records.
        topic: Arc<str>,
    },
    /// A mapping to nowhere.
    #[error("the source has no field '{field}' that a column could be mapped to; it has {known}")]
    Map {
        /// What was named.
        field: String,
        /// What there is.
        known: String,
    },
}

impl Kind {
    fn of(data_type: DataType, unit: Option<TimeUnit>) -> Self {
        match data_type {
            DataType::Int64 => Self::Number { whole: true },
            DataType::Float64 => Self::Number { whole: false },
            DataType::Boolean => Self::Boolean,
            DataType::String | DataType::List(_) => Self::Text,
            DataType::Timestamp => Self::Instant { unit, as_text: false },
        }
    }
}

/// A float that is a whole number exactly.
fn whole(number: f64) -> Option<i64> {
    (number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0).then_some(number as i64)
}

/// Sets a value at a dotted path.
fn put(record: &mut Map<String, Value>, path: &str, value: Value) -> Result<(), String> {
    match path.split_once('.') {
        None => {
            match (record.get_mut(path), value) {
                // Fields within it have been set from columns of their own.
                (Some(Value::Object(held)), Value::Object(values)) => {
                    for (name, value) in values {
                        held.entry(name).or_insert(value);
                    }
                }
                (_, value) => {
                    record.insert(path.to_owned(), value);
                }
            }
            Ok(())
        }
        Some((head, rest)) => {
            let inner = record.entry(head).or_insert_with(|| Value::Object(Map::new()));
            let inner = inner
                .as_object_mut()
                .ok_or_else(|| format!("column '{head}' is no object that could hold '{rest}'"))?;
            put(inner, rest, value)
        }
    }
}
