//! Keys of records in Avro: a record with the join keys, or the join key itself.

use std::collections::hash_map::Entry;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::cursor::Broken;
use super::schema::AvroSchema;
use super::value::{AvroValue, decode};
use super::{DecodeError, FRAME, PATIENCE, unknown};
use crate::broker::SchemaRegistry;
use crate::config::plan::DataType;
use crate::source::columns::RowBuilder;
use crate::source::fault::{RecordFault, reason};

/// Sets columns from keys: framed ones as the registry's schema of their id says, and plain ones that are a join key.
#[derive(Debug)]
pub(crate) struct AvroKeyDecoder {
    registry: Option<Arc<SchemaRegistry>>,
    /// Where there is one join key: the schema of its type.
    plain: Option<AvroSchema>,
    framed: FxHashMap<u32, Result<AvroSchema, RecordFault>>,
}

impl AvroKeyDecoder {
    /// Of join keys of these types.
    pub(crate) fn new(types: &[DataType], registry: Option<Arc<SchemaRegistry>>) -> Self {
        let schema = |data_type: &DataType| if *data_type == DataType::Int64 { r#""long""# } else { r#""string""# };
        let plain = match types {
            [only] => Some(AvroSchema::parse(schema(only)).expect("these are the names of Avro's types")),
            _ => None,
        };
        Self { registry, plain, framed: FxHashMap::default() }
    }

    /// Sets the columns of the join keys.
    pub(crate) fn decode(&mut self, key: &[u8], keys: &[usize], rows: &mut RowBuilder) -> Result<(), DecodeError> {
        let value = self.read(key)?;
        for &column in keys {
            let column = rows.column(column);
            let field = column.field();
            let part = match &value {
                AvroValue::Fields(fields) => fields.iter().find(|(name, _)| *name == field.name).map(|(_, part)| part),
                single => Some(single),
            };
            match (part, field.data_type) {
                (Some(AvroValue::Integer(value)), DataType::Int64) => column.set_integer(*value),
                (Some(AvroValue::Text(text)), DataType::String) => column.set_text(text),
                (None | Some(AvroValue::Null), _) => {}
                (Some(_), data_type) => {
                    let error = format!("the record's key: '{}' is not of type {data_type}", field.name);
                    return Err(RecordFault::new(reason::WRONG_TYPE, error).into());
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, key: &[u8]) -> Result<AvroValue, DecodeError> {
        let plain = self.plain.as_ref().map(|schema| decode(schema, key));
        let Some((&[0, a, b, c, d], rest)) = key.split_first_chunk::<FRAME>().filter(|_| self.registry.is_some())
        else {
            let whose = "not Avro of the join key's type; a framed one needs [broker] schema_registry";
            return Ok(plain.and_then(Result::ok).ok_or_else(|| malformed(whose))?);
        };
        let id = u32::from_be_bytes([a, b, c, d]);
        let framed = self.schema(id)?.and_then(|schema| {
            decode(schema, rest).map_err(|Broken { at, what }| {
                malformed(&format!("not Avro of its schema (id {id} in the registry): {what} at byte {}", at + FRAME))
            })
        });
        // An empty text, or a zero, begins as a frame does.
        Ok(framed.or_else(|fault| plain.and_then(Result::ok).ok_or(fault))?)
    }

    fn schema(&mut self, id: u32) -> Result<Result<&AvroSchema, RecordFault>, DecodeError> {
        let Some(registry) = &self.registry else { return Ok(Err(unknown(id, ""))) };
        let known = match self.framed.entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let Some(known) = registry.schema_by_id_within(id, PATIENCE).map_err(DecodeError::Registry)? else {
                    return Ok(Err(unknown(id, registry.url())));
                };
                let schema = match &*known.schema_type {
                    "AVRO" => AvroSchema::parse_with(&known.schema, &known.references)
                        .map_err(|error| format!("schema {id} of the registry cannot be used: {error}")),
                    other => Err(format!("schema {id} is of type {other}, not Avro")),
                };
                place.insert(schema.map_err(|error| RecordFault::new(reason::UNKNOWN_SCHEMA, error)))
            }
        };
        Ok(known.as_ref().map_err(|fault| fault.clone()))
    }
}

fn malformed(error: &str) -> RecordFault {
    let help = "it has no value, so that its key says whose row it deletes; see record_key of the table";
    RecordFault::malformed(format!("the record's key is {error}; {help}"))
}
