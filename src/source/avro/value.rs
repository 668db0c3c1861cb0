//! Whole records of any schema as JSON: for people who look at topics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustc_hash::FxHashMap;
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::FRAME;
use super::cursor::{Broken, Cursor};
use super::program::DEEPEST;
use super::schema::{AvroSchema, Kind, Logical, TypeId};
use crate::broker::SchemaRegistry;
use crate::runtime::clock;

/// Values in one record at most: elements of some types take no bytes, so that a few bytes could ask for billions.
const MOST_VALUES: usize = 1_000_000;

/// A registry that did not answer is not asked again for this long.
const AWAY_FOR: Duration = Duration::from_secs(10);

/// A value as JSON, with the fields of records in their schema's order.
///
/// Instants and dates are the numbers that were written, decimals are texts (`"12.50"`), bytes are text where they are UTF-8
/// and else base64 (`{"base64": "/w=="}`), and floats that JSON does not have are texts (`"NaN"`, `"inf"`).
#[derive(Debug, Clone, PartialEq)]
pub enum AvroValue {
    /// Null.
    Null,
    /// Boolean.
    Boolean(bool),
    /// Int or long.
    Integer(i64),
    /// Float or double.
    Float(f64),
    /// Text, symbol, decimal, or bytes that are text.
    Text(String),
    /// Bytes that are no text.
    Bytes(Vec<u8>),
    /// Array.
    List(Vec<Self>),
    /// Record or map.
    Fields(Vec<(Arc<str>, Self)>),
}

impl Serialize for AvroValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Boolean(value) => serializer.serialize_bool(*value),
            Self::Integer(value) => serializer.serialize_i64(*value),
            Self::Float(value) if value.is_finite() => serializer.serialize_f64(*value),
            Self::Float(value) => serializer.collect_str(value),
            Self::Text(text) => serializer.serialize_str(text),
            Self::Bytes(bytes) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("base64", &BASE64.encode(bytes))?;
                map.end()
            }
            Self::List(values) => serializer.collect_seq(values),
            Self::Fields(fields) => serializer.collect_map(fields.iter().map(|(name, value)| (&**name, value))),
        }
    }
}

/// Reads records of a topic that nobody has described, or that a pipeline describes.
#[derive(Debug)]
pub struct AvroReader {
    registry: Option<Arc<SchemaRegistry>>,
    plain: Option<AvroSchema>,
    framed: FxHashMap<u32, Result<AvroSchema, String>>,
    /// Until when the registry is not asked, and what it said.
    away: Option<(Instant, String)>,
}

impl AvroReader {
    /// Reads framed records with the registry's schemas, and plain ones with `plain`, where there are such.
    pub fn new(registry: Option<Arc<SchemaRegistry>>, plain: Option<AvroSchema>) -> Self {
        Self { registry, plain, framed: FxHashMap::default(), away: None }
    }

    /// The record, or why it cannot be read; `None` where nothing says that it is Avro.
    pub fn read(&mut self, value: &[u8]) -> Option<Result<AvroValue, String>> {
        let plain = self.plain.as_ref().map(|schema| decode(schema, value));
        match value.split_first_chunk::<FRAME>() {
            Some((&[0, a, b, c, d], rest)) => {
                let id = u32::from_be_bytes([a, b, c, d]);
                let framed = self.schema(id).and_then(|schema| {
                    decode(schema, rest).map_err(|Broken { at, what }| {
                        format!("not Avro of its schema (id {id} in the registry): {what} at byte {}", at + FRAME)
                    })
                });
                Some(framed.or_else(|error| plain.and_then(Result::ok).ok_or(error)))
            }
            _ => plain.map(|decoded| {
                decoded.map_err(|Broken { at, what }| format!("not Avro of the pipeline's schema: {what} at byte {at}"))
            }),
        }
    }

    fn schema(&mut self, id: u32) -> Result<&AvroSchema, String> {
        let Some(registry) = &self.registry else {
            return Err(format!("it may be Avro with schema id {id}: say where schemas are with --schema-registry"));
        };
        let now = clock::monotonic();
        if !self.framed.contains_key(&id) {
            if let Some((_, error)) = self.away.as_ref().filter(|(until, _)| now < *until) {
                return Err(error.clone());
            }
            let known = match registry.schema_by_id(id) {
                Ok(Some(known)) => known,
                // Not kept: it may be registered later.
                Ok(None) => return Err(format!("schema registry {} does not know schema id {id}", registry.url())),
                Err(error) => {
                    self.away = Some((now + AWAY_FOR, error.to_string()));
                    return Err(error.to_string());
                }
            };
            let schema = match &*known.schema_type {
                "AVRO" => AvroSchema::parse_with(&known.schema, &known.references)
                    .map_err(|error| format!("schema {id} of the registry cannot be used: {error}")),
                other => Err(format!("schema {id} is of type {other}, not Avro")),
            };
            self.framed.insert(id, schema);
        }
        self.framed[&id].as_ref().map_err(Clone::clone)
    }
}

/// Reads a whole record: nothing may follow it.
pub(super) fn decode(schema: &AvroSchema, bytes: &[u8]) -> Result<AvroValue, Broken> {
    let mut walk = Walk { schema, cursor: Cursor::new(bytes), depth: 0, values: 0 };
    let value = walk.value(schema.root())?;
    match walk.cursor.remaining() {
        0 => Ok(value),
        _ => Err(walk.cursor.broken("more bytes follow")),
    }
}

struct Walk<'a> {
    schema: &'a AvroSchema,
    cursor: Cursor<'a>,
    depth: usize,
    values: usize,
}

impl Walk<'_> {
    fn value(&mut self, id: TypeId) -> Result<AvroValue, Broken> {
        self.values += 1;
        if self.values > MOST_VALUES {
            return Err(self.cursor.broken("the record has more than a million values"));
        }
        if self.depth > DEEPEST {
            return Err(self.cursor.broken("the record is nested too deeply"));
        }
        self.depth += 1;
        let value = self.unchecked(id)?;
        self.depth -= 1;
        Ok(value)
    }

    fn unchecked(&mut self, id: TypeId) -> Result<AvroValue, Broken> {
        let schema = self.schema;
        let this = schema.get(id);
        Ok(match &this.kind {
            Kind::Null => AvroValue::Null,
            Kind::Boolean => AvroValue::Boolean(self.cursor.boolean()?),
            Kind::Int => AvroValue::Integer(self.cursor.int()?.into()),
            Kind::Long => AvroValue::Integer(self.cursor.long()?),
            // The shortest digits that read back as the same float: not those of the double nearest to it.
            Kind::Float => {
                let float = f32::from_le_bytes(self.cursor.array()?);
                AvroValue::Float(float.to_string().parse().expect("a float's text is a float's"))
            }
            Kind::Double => AvroValue::Float(f64::from_le_bytes(self.cursor.array()?)),
            Kind::Bytes => bytes(self.cursor.bytes()?, this.logical),
            Kind::Fixed { size, .. } => bytes(self.cursor.take(*size)?, this.logical),
            Kind::Text => {
                let text = std::str::from_utf8(self.cursor.bytes()?);
                AvroValue::Text(text.map_err(|_| self.cursor.broken("a text is not UTF-8"))?.to_owned())
            }
            Kind::Enum { symbols, .. } => {
                let index = self.cursor.index(symbols.len(), "an enum has no such symbol")?;
                AvroValue::Text(symbols[index].to_string())
            }
            Kind::Union(branches) => {
                let index = self.cursor.index(branches.len(), "a union has no such branch")?;
                self.value(branches[index])?
            }
            Kind::Array(item) => {
                let mut values = Vec::new();
                self.blocks(|walk| {
                    values.push(walk.value(*item)?);
                    Ok(())
                })?;
                AvroValue::List(values)
            }
            Kind::Map(item) => {
                let mut fields = Vec::new();
                self.blocks(|walk| {
                    let key = std::str::from_utf8(walk.cursor.bytes()?);
                    let key = key.map_err(|_| walk.cursor.broken("a key is not UTF-8"))?;
                    fields.push((key.into(), walk.value(*item)?));
                    Ok(())
                })?;
                AvroValue::Fields(fields)
            }
            Kind::Record { fields, .. } => {
                let read = fields.iter().map(|field| Ok((field.name.clone(), self.value(field.of)?)));
                AvroValue::Fields(read.collect::<Result<_, _>>()?)
            }
        })
    }

    /// The items of an array or map: blocks of some, the last one being empty.
    fn blocks(&mut self, mut item: impl FnMut(&mut Self) -> Result<(), Broken>) -> Result<(), Broken> {
        loop {
            let count = self.cursor.long()?;
            if count == 0 {
                return Ok(());
            }
            if count < 0 {
                // The block's length in bytes, for those who skip it.
                self.cursor.long()?;
            }
            for _ in 0..count.unsigned_abs() {
                item(self)?;
            }
        }
    }
}

fn bytes(bytes: &[u8], logical: Option<Logical>) -> AvroValue {
    if let Some(Logical::Decimal { scale }) = logical
        && let Some(text) = decimal(bytes, scale)
    {
        return AvroValue::Text(text);
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => AvroValue::Text(text.to_owned()),
        Err(_) => AvroValue::Bytes(bytes.to_vec()),
    }
}

/// The number in digits; `None` where it has more than 128 bits.
fn decimal(bytes: &[u8], scale: u32) -> Option<String> {
    let negative = bytes.first().is_some_and(|first| first & 0x80 != 0);
    let fill = if negative { 0xff } else { 0 };
    let cut = bytes.len().saturating_sub(16);
    if bytes[..cut].iter().any(|byte| *byte != fill) {
        return None;
    }
    let mut whole = [fill; 16];
    whole[16 - (bytes.len() - cut)..].copy_from_slice(&bytes[cut..]);
    let unscaled = i128::from_be_bytes(whole);
    if (unscaled < 0) != negative {
        return None;
    }
    let scale = scale as usize;
    let digits = format!("{:0>width$}", unscaled.unsigned_abs(), width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    let point = if scale > 0 { "." } else { "" };
    Some(format!("{}{whole}{point}{fraction}", if unscaled < 0 { "-" } else { "" }))
}
