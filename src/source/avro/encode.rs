//! Writing JSON values as Avro: for generated events, replays and records typed by hand.

use std::sync::Arc;

use serde_json::Value;

use super::FRAME;
use super::cursor::write_long;
use super::schema::{AvroSchema, Kind, Logical, TypeId, describe};
use crate::source::event_time;
use crate::source::fault::excerpt;

/// Writes records of one schema, with or without Confluent framing.
#[derive(Debug, Clone)]
pub struct AvroEncoder {
    schema: Arc<AvroSchema>,
    frame: Option<[u8; FRAME]>,
}

/// A value that the schema cannot hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{reason}", if path.is_empty() { String::new() } else { format!("field '{path}': ") })]
pub struct EncodeError {
    /// Path of the field; empty for the record itself.
    pub path: String,
    /// What is wrong.
    pub reason: String,
}

impl AvroEncoder {
    /// Writes plain Avro.
    pub fn plain(schema: AvroSchema) -> Self {
        Self { schema: Arc::new(schema), frame: None }
    }

    /// Writes a zero byte and the schema's id in the registry before each record, as Confluent's serialisers do.
    pub fn framed(schema: AvroSchema, id: u32) -> Self {
        let [a, b, c, d] = id.to_be_bytes();
        Self { schema: Arc::new(schema), frame: Some([0, a, b, c, d]) }
    }

    /// The schema that is written.
    pub fn schema(&self) -> &AvroSchema {
        &self.schema
    }

    /// Appends a record. Fields that the value lacks get the schema's default. Texts in RFC 3339 and dates are taken for
    /// timestamps and dates. A branch of a union is chosen by the value's kind, the first that holds it, or named as in
    /// Avro's JSON encoding: `{"double": 1.5}`.
    ///
    /// # Errors
    /// A field that is missing without a default, unknown to the schema, or of another type. Nothing is appended then.
    pub fn encode(&self, value: &Value, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        out.extend_from_slice(self.frame.as_ref().map_or(&[], |frame| &frame[..]));
        let mut writer = Writer { schema: &self.schema, path: Vec::new() };
        writer.value(self.schema.root(), value, out).inspect_err(|_| out.truncate(start))
    }

    /// The record by itself.
    ///
    /// # Errors
    /// As [`AvroEncoder::encode`].
    pub fn to_vec(&self, value: &Value) -> Result<Vec<u8>, EncodeError> {
        let mut out = Vec::with_capacity(64);
        self.encode(value, &mut out)?;
        Ok(out)
    }
}

struct Writer<'a> {
    schema: &'a AvroSchema,
    path: Vec<String>,
}

impl Writer<'_> {
    #[cold]
    fn fault(&self, reason: impl Into<String>) -> EncodeError {
        EncodeError { path: self.path.join("."), reason: reason.into() }
    }

    #[cold]
    fn mismatch(&self, id: TypeId, value: &Value) -> EncodeError {
        self.fault(format!("expected {}, found {}", describe(self.schema, id), show(value)))
    }

    fn value(&mut self, id: TypeId, value: &Value, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let this = self.schema.get(id);
        match (&this.kind, value) {
            (Kind::Null, Value::Null) => {}
            (Kind::Boolean, Value::Bool(value)) => out.push(u8::from(*value)),
            (Kind::Int, _) => {
                let number = self.integer(this.logical, value).ok_or_else(|| self.mismatch(id, value))?;
                let number = i32::try_from(number).map_err(|_| self.fault(format!("{number} does not fit 32 bits")))?;
                write_long(i64::from(number), out);
            }
            (Kind::Long, _) => {
                write_long(self.integer(this.logical, value).ok_or_else(|| self.mismatch(id, value))?, out);
            }
            (Kind::Float, Value::Number(number)) => {
                let number = number.as_f64().ok_or_else(|| self.mismatch(id, value))?;
                out.extend_from_slice(&(number as f32).to_le_bytes());
            }
            (Kind::Double, Value::Number(number)) => {
                let number = number.as_f64().ok_or_else(|| self.mismatch(id, value))?;
                out.extend_from_slice(&number.to_le_bytes());
            }
            (Kind::Bytes, _) if let Some(Logical::Decimal { scale }) = this.logical => {
                let unscaled = decimal(value, scale).ok_or_else(|| self.mismatch(id, value))?;
                // The shortest two's-complement form: leading bytes that only repeat the sign are dropped.
                let bytes = unscaled.to_be_bytes();
                let keep =
                    (0..15).find(|&i| i128::from_be_bytes(sign_extended(&bytes[i + 1..])) != unscaled).unwrap_or(15);
                write_bytes(&bytes[keep..], out);
            }
            (Kind::Fixed { size, .. }, _) if let Some(Logical::Decimal { scale }) = this.logical => {
                let unscaled = decimal(value, scale).ok_or_else(|| self.mismatch(id, value))?;
                let fill = if unscaled < 0 { 0xff } else { 0 };
                let bytes = unscaled.to_be_bytes();
                if *size < 16 && i128::from_be_bytes(sign_extended(&bytes[16 - size..])) != unscaled {
                    return Err(self.fault(format!("{} does not fit {size} bytes", show(value))));
                }
                out.extend(std::iter::repeat_n(fill, size.saturating_sub(16)));
                out.extend_from_slice(&bytes[16 - (*size).min(16)..]);
            }
            (Kind::Bytes | Kind::Text, Value::String(text)) => write_bytes(text.as_bytes(), out),
            (Kind::Fixed { size, .. }, Value::String(text)) => {
                if text.len() != *size {
                    return Err(self.fault(format!("expected {size} bytes, found {}", text.len())));
                }
                out.extend_from_slice(text.as_bytes());
            }
            (Kind::Enum { symbols, .. }, Value::String(text)) => {
                let index = symbols.iter().position(|symbol| **symbol == **text);
                let index = index.ok_or_else(|| {
                    self.fault(format!("{} is not one of the symbols {}", excerpt(text), symbols.join(", ")))
                })?;
                write_long(index as i64, out);
            }
            (Kind::Array(item), Value::Array(values)) => {
                let item = *item;
                write_block(values.len(), out);
                for (index, value) in values.iter().enumerate() {
                    self.within(index.to_string(), |writer| writer.value(item, value, out))?;
                }
                out.push(0);
            }
            (Kind::Map(item), Value::Object(values)) => {
                let item = *item;
                write_block(values.len(), out);
                for (key, value) in values {
                    write_bytes(key.as_bytes(), out);
                    self.within(key.clone(), |writer| writer.value(item, value, out))?;
                }
                out.push(0);
            }
            (Kind::Record { .. }, Value::Object(values)) => self.record(id, values, out)?,
            (Kind::Union(branches), _) => return self.union(id, branches, value, out),
            _ => return Err(self.mismatch(id, value)),
        }
        Ok(())
    }

    fn record(
        &mut self,
        id: TypeId,
        values: &serde_json::Map<String, Value>,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let schema = self.schema;
        let Kind::Record { fields, name } = &schema.get(id).kind else { return Ok(()) };
        let mut used = 0;
        for field in fields {
            let value = match (values.get(&*field.name), &field.default) {
                (Some(value), _) => {
                    used += 1;
                    value
                }
                (None, Some(default)) => default,
                (None, None) if self.takes_null(field.of) => &Value::Null,
                (None, None) => {
                    self.path.push(field.name.to_string());
                    return Err(self.fault("missing, and the schema has no default for it"));
                }
            };
            self.within(field.name.to_string(), |writer| writer.value(field.of, value, out))?;
        }
        if used < values.len() {
            let unknown = values.keys().find(|key| !fields.iter().any(|field| *field.name == ***key));
            let unknown = unknown.map_or("", String::as_str);
            return Err(self.fault(format!("record {name} has no field '{unknown}'")));
        }
        Ok(())
    }

    fn takes_null(&self, id: TypeId) -> bool {
        match &self.schema.get(id).kind {
            Kind::Null => true,
            Kind::Union(branches) => branches.iter().any(|branch| self.takes_null(*branch)),
            _ => false,
        }
    }

    fn union(&mut self, id: TypeId, branches: &[TypeId], value: &Value, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        let depth = self.path.len();
        let mut only = None;
        let values = branches.iter().filter(|branch| !matches!(self.schema.get(**branch).kind, Kind::Null)).count();
        let named = match value {
            Value::Object(object) if object.len() == 1 => object.iter().next(),
            _ => None,
        };
        for (index, &branch) in branches.iter().enumerate() {
            let by_name = named.filter(|(key, _)| self.is_named(branch, key)).map(|(_, value)| value);
            for value in [Some(value), by_name].into_iter().flatten() {
                write_long(index as i64, out);
                match self.value(branch, value, out) {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        out.truncate(start);
                        self.path.truncate(depth);
                        if values == 1 && !matches!(self.schema.get(branch).kind, Kind::Null) {
                            only.get_or_insert(error);
                        }
                    }
                }
            }
        }
        Err(match only {
            // Of an optional value the fault within it says more than that no branch fits.
            Some(error) if !value.is_null() => error,
            _ => self.mismatch(id, value),
        })
    }

    fn is_named(&self, id: TypeId, key: &str) -> bool {
        match &self.schema.get(id).kind {
            Kind::Record { name, .. } | Kind::Enum { name, .. } | Kind::Fixed { name, .. } => {
                name == key || name.rsplit('.').next() == Some(key)
            }
            Kind::Null => key == "null",
            Kind::Boolean => key == "boolean",
            Kind::Int => key == "int",
            Kind::Long => key == "long",
            Kind::Float => key == "float",
            Kind::Double => key == "double",
            Kind::Bytes => key == "bytes",
            Kind::Text => key == "string",
            Kind::Array(_) => key == "array",
            Kind::Map(_) => key == "map",
            Kind::Union(_) => false,
        }
    }

    /// A whole number, or an instant or date given as text.
    fn integer(&self, logical: Option<Logical>, value: &Value) -> Option<i64> {
        match (value, logical) {
            (Value::Number(number), _) => number.as_i64().or_else(|| {
                let float = number.as_f64()?;
                (float.fract() == 0.0 && float.abs() <= 9_007_199_254_740_992.0).then_some(float as i64)
            }),
            (Value::String(text), Some(Logical::Instant(unit))) => {
                event_time::to_integer(event_time::parse_iso(text)?, unit)
            }
            (Value::String(text), Some(Logical::Date)) => {
                event_time::parse_iso(text).map(|ms| ms.div_euclid(86_400_000))
            }
            _ => None,
        }
    }

    fn within<T>(
        &mut self,
        name: String,
        run: impl FnOnce(&mut Self) -> Result<T, EncodeError>,
    ) -> Result<T, EncodeError> {
        self.path.push(name);
        let result = run(self)?;
        self.path.pop();
        Ok(result)
    }
}

/// Begins the only block of an array or map; an empty one has none. A zero byte ends it.
fn write_block(length: usize, out: &mut Vec<u8>) {
    if length > 0 {
        write_long(length as i64, out);
    }
}

fn write_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    write_long(bytes.len() as i64, out);
    out.extend_from_slice(bytes);
}

fn sign_extended(bytes: &[u8]) -> [u8; 16] {
    let fill = if bytes.first().is_some_and(|first| first & 0x80 != 0) { 0xff } else { 0 };
    let mut whole = [fill; 16];
    whole[16 - bytes.len()..].copy_from_slice(bytes);
    whole
}

/// The unscaled integer of a number, or of a number's text, that has at most `scale` digits after the point.
fn decimal(value: &Value, scale: u32) -> Option<i128> {
    let text = match value {
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        _ => return None,
    };
    let (negative, digits) = text.strip_prefix('-').map_or((false, &*text), |rest| (true, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let fraction = fraction.trim_end_matches('0');
    let missing = (scale as usize).checked_sub(fraction.len())?;
    if whole.is_empty() || ![whole, fraction].iter().all(|part| part.bytes().all(|b| b.is_ascii_digit())) {
        return None;
    }
    let unscaled: i128 = format!("{whole}{fraction}{}", "0".repeat(missing)).parse().ok()?;
    Some(if negative { -unscaled } else { unscaled })
}

fn show(value: &Value) -> String {
    match value {
        Value::String(text) => format!("text {}", excerpt(text)),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
        other => other.to_string(),
    }
}
