//! The fields of a schema file, as columns: Avro, for records in JSON a JSON Schema too, and descriptor sets of Protobuf.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::faults::Fault;
use super::plan::{Column, DataType, Format};
use super::spec::FormatSpec;
use crate::source::avro::AvroSchema;
use crate::source::json_schema::JsonSchema;
use crate::source::protobuf::Message;

/// What a schema file says about the records.
#[derive(Debug, Clone)]
pub(super) struct SchemaFile {
    /// How to read the records.
    pub(super) format: Format,
    /// The fields that can be columns, in the schema's order.
    pub(super) columns: Vec<Column>,
    /// The other fields, and why they cannot.
    pub(super) unusable: Vec<(String, String)>,
}

/// Why a schema file is of no use.
#[derive(Debug)]
pub(super) enum SchemaFileError {
    /// To be reported where the pipeline names the file.
    Here(String, Option<String>),
    /// In the schema file itself.
    There(Fault),
}

impl SchemaFile {
    /// Reads a descriptor set, in which `message` is that of the records; `shown` is its name in messages.
    pub(super) fn read_protobuf(path: &Path, shown: &str, message: &str) -> Result<Self, SchemaFileError> {
        let set = std::fs::read(path).map_err(|error| unreadable(shown, &error))?;
        let message = Message::find(&set, message)
            .map_err(|error| SchemaFileError::Here(format!("schema file {shown}: {error}"), None))?;
        let (columns, unusable) = (columns(message.fields()), message.unusable().to_vec());
        Ok(Self { format: Format::Protobuf { message: Arc::new(message) }, columns, unusable })
    }

    /// Reads a file that describes records in JSON or Avro; `shown` is its name in messages.
    pub(super) fn read(path: &Path, shown: &str, format: FormatSpec) -> Result<Self, SchemaFileError> {
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(shown, &error))?;
        if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(&text) {
            let line_start: usize = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
            let at = line_start + error.column().saturating_sub(1);
            let message = error.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            return Err(SchemaFileError::There(Fault::at(
                shown,
                &text,
                at..at + 1,
                format!("not JSON: {message}"),
                None,
            )));
        }
        let parsed = match format {
            FormatSpec::Json if serde_json::from_str(&text).is_ok_and(|document| JsonSchema::is_one(&document)) => {
                Self::parse_json_schema(&text)
            }
            _ => Self::parse(&text, format),
        };
        parsed.map_err(|message| {
            let at = 0..0;
            SchemaFileError::There(Fault { source: String::new(), ..Fault::at(shown, "", at, message, None) })
        })
    }

    fn parse_json_schema(text: &str) -> Result<Self, String> {
        let schema = JsonSchema::parse(text).map_err(|error| error.to_string())?;
        let (columns, unusable) = (columns(schema.fields()), schema.unusable().to_vec());
        Ok(Self { format: Format::Json, columns, unusable })
    }

    fn parse(text: &str, format: FormatSpec) -> Result<Self, String> {
        let schema = AvroSchema::parse(text).map_err(|error| error.to_string())?;
        let columns: Vec<Column> = schema
            .fields()
            .into_iter()
            .map(|field| Column { name: field.name.into(), data_type: field.data_type })
            .collect();
        let json: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let Some(fields) = json.get("fields").and_then(Value::as_array) else {
            return Err("the schema is not a record: its fields are the source's columns".into());
        };
        let unusable = fields
            .iter()
            .filter_map(|field| Some((field.get("name")?.as_str()?, field.get("type")?)))
            .filter(|(name, _)| !columns.iter().any(|c| *c.name == **name))
            .map(|(name, kind)| (name.to_owned(), format!("is {}, which cannot be a column", describe(kind))))
            .collect();
        let format = match format {
            FormatSpec::Avro => Format::Avro { schema: text.to_owned() },
            _ => Format::Json,
        };
        Ok(Self { format, columns, unusable })
    }
}

fn columns(fields: &[(String, DataType)]) -> Vec<Column> {
    fields.iter().map(|(name, of)| Column { name: name.as_str().into(), data_type: *of }).collect()
}

fn unreadable(shown: &str, error: &std::io::Error) -> SchemaFileError {
    let help = "the path is relative to the folder of pipeline.toml";
    SchemaFileError::Here(format!("schema file {shown} cannot be read: {error}"), Some(help.into()))
}

/// What a field without a column is, in words.
fn describe(kind: &Value) -> String {
    match kind {
        Value::String(word) if word == "null" => "always null".into(),
        Value::String(word) => format!("of Avro type {word}"),
        Value::Array(_) => "a union of several types".into(),
        _ => match kind.get("type").and_then(Value::as_str) {
            Some(word @ ("map" | "record")) => format!("a {word}"),
            Some("array") => "an array".into(),
            _ => "of a type".into(),
        },
    }
}
