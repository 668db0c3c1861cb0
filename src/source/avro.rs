//! Avro records: schemas, decoding into columns, encoding from JSON values, reading whole ones as JSON.
//!
//! # Plain or framed
//!
//! A record is either plain Avro data, written with the pipeline's own schema, or framed as Confluent's serialisers do: a
//! zero byte, the schema's id in the registry (32 bits, big-endian), then the data, written with that schema. Each record
//! is told apart by itself. A plain record may start with a zero byte too (an empty text, a zero, a null in a union), so:
//!
//! 1. Without a registry, all records are plain.
//! 2. A record that does not start with a zero byte, or is shorter than five bytes, is plain.
//! 3. Otherwise, where the registry knows the id and the rest decodes with that schema to its last byte, it is framed.
//! 4. Otherwise, where all of it decodes with the pipeline's schema to its last byte, it is plain.
//! 5. Otherwise it is a dead letter, and the error is that of rule 3.
//!
//! An id is asked for once. One that the registry does not know is waited for a few seconds before rule 5 applies: its
//! schema may be registered a moment after the record was written. While the registry does not answer, a record that rule 3
//! needs it for is neither decoded nor given up: the caller gets a retriable error for the whole poll and decodes it again
//! later.

mod cursor;
mod encode;
mod key;
mod program;
mod schema;
#[cfg(test)]
mod tests;
mod value;

use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;

pub use encode::{AvroEncoder, EncodeError};
pub(super) use key::AvroKeyDecoder;
pub use schema::{AvroField, AvroSchema, AvroSchemaError};
pub use value::{AvroReader, AvroValue};

use self::cursor::Broken;
use self::program::{Incompatible, Program, Wanted};
use super::columns::{Field, RowBuilder};
use super::fault::{RecordFault, reason};
use super::json::misfit_text;
use crate::broker::{BrokerError, RegisteredSchema, SchemaRegistry};

/// How long a record waits for a schema that the registry does not know.
const PATIENCE: Duration = Duration::from_secs(3);

/// Bytes of Confluent framing: a zero byte, and the schema's id.
pub(crate) const FRAME: usize = 5;

/// Fills columns from Avro records.
#[derive(Debug)]
pub(crate) struct AvroDecoder {
    reader: AvroSchema,
    fields: Vec<Field>,
    wanted: Wanted,
    plain: Program,
    registry: Option<Arc<SchemaRegistry>>,
    /// What to do with records of each schema id seen.
    framed: FxHashMap<u32, Result<Program, RecordFault>>,
}

/// Why a record was not decoded.
#[derive(Debug)]
pub(crate) enum DecodeError {
    /// The record is at fault.
    Record(RecordFault),
    /// The registry did not answer; the record may be as good as any.
    Registry(BrokerError),
}

impl From<RecordFault> for DecodeError {
    fn from(fault: RecordFault) -> Self {
        Self::Record(fault)
    }
}

impl AvroDecoder {
    /// Reads records as `reader`, the pipeline's schema, says.
    ///
    /// # Errors
    /// A field that the schema does not have, or not with a fitting type: its name, and what is wrong.
    pub(crate) fn new(
        reader: AvroSchema,
        fields: Vec<Field>,
        registry: Option<Arc<SchemaRegistry>>,
    ) -> Result<Self, (Arc<str>, String)> {
        let wanted = Wanted::new(&fields);
        let plain = Program::compile(&reader, &reader, &fields, &wanted)
            .map_err(|Incompatible { field, reason }| (field, reason))?;
        Ok(Self { reader, fields, wanted, plain, registry, framed: FxHashMap::default() })
    }

    /// Sets the row's fields from one record. The row has been started; the caller commits it if this succeeds.
    pub(crate) fn decode(&mut self, value: &[u8], rows: &mut RowBuilder) -> Result<(), DecodeError> {
        let fault = match self.framed(value)? {
            None => return Ok(self.plain(value, rows)?),
            Some((id, Ok(program))) => match program.run(&value[FRAME..], rows) {
                Ok(()) => return Ok(fitting(rows, FRAME)?),
                Err(Broken { at, what }) => RecordFault::malformed(format!(
                    "not Avro of its schema (id {id} in the registry): {what} at byte {}",
                    at + FRAME
                )),
            },
            Some((_, Err(fault))) => fault.clone(),
        };
        rows.start();
        match self.plain.run(value, rows) {
            Ok(()) => Ok(fitting(rows, 0)?),
            Err(_) => Err(fault.into()),
        }
    }

    /// Where the record looks framed: its schema's id, and how to read it.
    #[expect(clippy::type_complexity, reason = "the pair is taken apart at once")]
    fn framed(&mut self, value: &[u8]) -> Result<Option<(u32, Result<&Program, &RecordFault>)>, DecodeError> {
        let Some(registry) = &self.registry else { return Ok(None) };
        let Some((&[0, a, b, c, d], _)) = value.split_first_chunk::<FRAME>() else { return Ok(None) };
        let id = u32::from_be_bytes([a, b, c, d]);
        if !self.framed.contains_key(&id) {
            let mut known = registry.schema_by_id(id).map_err(DecodeError::Registry)?;
            if known.is_none() {
                // Nothing is kept here: the registry may learn of it.
                if self.plain_fits(value) {
                    return Ok(None);
                }
                known = registry.schema_by_id_within(id, PATIENCE).map_err(DecodeError::Registry)?;
            }
            let Some(known) = known else { return Err(unknown(id, registry.url()).into()) };
            let program = self.program(&known);
            self.framed.insert(id, program);
        }
        Ok(self.framed.get(&id).map(|program| (id, program.as_ref())))
    }

    fn program(&self, known: &RegisteredSchema) -> Result<Program, RecordFault> {
        let id = known.id;
        if known.schema_type != "AVRO" {
            let found = &known.schema_type;
            return Err(RecordFault::new(reason::UNKNOWN_SCHEMA, format!("schema {id} is of type {found}, not Avro")));
        }
        let writer = AvroSchema::parse_with(&known.schema, &known.references).map_err(|error| {
            RecordFault::new(reason::UNKNOWN_SCHEMA, format!("schema {id} of the registry cannot be used: {error}"))
        })?;
        Program::compile(&writer, &self.reader, &self.fields, &self.wanted).map_err(|Incompatible { field, reason }| {
            RecordFault::new(
                reason::INCOMPATIBLE_SCHEMA,
                format!("schema {id} of the registry cannot be read as the pipeline's: field '{field}': {reason}"),
            )
        })
    }

    fn plain_fits(&self, value: &[u8]) -> bool {
        let mut rows = RowBuilder::new(self.fields.clone());
        self.plain.run(value, &mut rows).is_ok()
    }

    fn plain(&self, value: &[u8], rows: &mut RowBuilder) -> Result<(), RecordFault> {
        self.plain.run(value, rows).map_err(|broken| self.plain_fault(value, broken))?;
        fitting(rows, 0)
    }

    #[cold]
    fn plain_fault(&self, value: &[u8], Broken { at, what }: Broken) -> RecordFault {
        let mut error = format!("not Avro of the pipeline's schema: {what} at byte {at}");
        if let (None, Some((&[0, a, b, c, d], _))) = (&self.registry, value.split_first_chunk::<FRAME>()) {
            let id = u32::from_be_bytes([a, b, c, d]);
            error.push_str(&format!(
                "; if it is framed with a schema id ({id}), set [broker] schema_registry so that its schema can be fetched"
            ));
        }
        RecordFault::malformed(error)
    }
}

fn unknown(id: u32, url: &str) -> RecordFault {
    RecordFault::new(
        reason::UNKNOWN_SCHEMA,
        format!(
            "the record starts with a zero byte and schema id {id}, which the registry {url} does not know, and it is not \
             plain Avro of the pipeline's schema either; is this the registry that its producer uses?"
        ),
    )
}

/// The first misfit of the row, if there is one. `skipped` bytes of the record came before its Avro data.
fn fitting(rows: &RowBuilder, skipped: usize) -> Result<(), RecordFault> {
    match rows.misfit() {
        None => Ok(()),
        Some((column, misfit)) => {
            let field = rows.columns()[column].field();
            Err(RecordFault::new(reason::WRONG_TYPE, misfit_text(field, misfit, misfit.at.map(|at| at + skipped))))
        }
    }
}
