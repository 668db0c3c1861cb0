//! Reading objects whose names are known beforehand, cell by cell, in one pass, skipping what is not asked for.

use std::fmt;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::config::plan::{Column, DataType};
use crate::source::skip::{Skip, nests_too_deeply};

/// Reads one JSON value with nothing after it.
pub(super) fn read<'de, S: DeserializeSeed<'de>>(bytes: &'de [u8], seed: S) -> Result<S::Value, String> {
    if nests_too_deeply(bytes) {
        return Err("it is nested more deeply than any row".to_owned());
    }
    let text = std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8: {e}"))?;
    let mut parser = sonic_rs::Deserializer::from_str(text);
    let value = seed.deserialize(&mut parser).map_err(|e| one_line(&e))?;
    parser.end().map_err(|e| one_line(&e))?;
    Ok(value)
}

/// sonic-rs draws the place below its message; the first line says what is wrong.
fn one_line(error: &sonic_rs::Error) -> String {
    error.to_string().lines().next().unwrap_or("malformed JSON").trim_end().to_owned()
}

/// Names that an object may have, with the type of each one's value.
#[derive(Debug)]
pub(super) struct Names {
    columns: Vec<Column>,
    positions: FxHashMap<Arc<str>, usize>,
}

/// One value of an object. Text is in the buffer that was given to [`Object`], from one byte to another, and so are the
/// values of a list among the items.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Parsed {
    Absent,
    Null,
    Int64(i64),
    Float64(f64),
    Boolean(bool),
    String(usize, usize),
    List(usize, usize),
}

impl Names {
    pub(super) fn new(columns: Vec<Column>) -> Self {
        let positions = columns.iter().enumerate().map(|(position, column)| (column.name.clone(), position)).collect();
        Self { columns, positions }
    }

    pub(super) fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// Position of a name. Writers keep an order, so the one after the last is tried first.
    fn position(&self, name: &str, expected: usize) -> Option<usize> {
        match self.columns.get(expected) {
            Some(column) if *column.name == *name => Some(expected),
            _ => self.positions.get(name).copied(),
        }
    }
}

/// Reads an object into one cell a name. Names that are not known are skipped, cells of names that are not there are
/// [`Parsed::Absent`].
pub(super) struct Object<'a> {
    pub(super) names: &'a Names,
    pub(super) cells: &'a mut Vec<Parsed>,
    pub(super) text: &'a mut String,
    pub(super) items: &'a mut Vec<Parsed>,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.cells.clear();
        self.cells.resize(self.names.columns.len(), Parsed::Absent);
        let mut expected = 0;
        while let Some(position) = map.next_key_seed(Name { names: self.names, expected })? {
            match position {
                Some(position) => {
                    let column = &self.names.columns[position];
                    let cell =
                        Cell { name: &column.name, data_type: column.data_type, text: self.text, items: self.items };
                    self.cells[position] = map.next_value_seed(cell)?;
                    expected = position + 1;
                }
                None => {
                    map.next_value_seed(Skip)?;
                }
            }
        }
        Ok(())
    }
}

struct Name<'a> {
    names: &'a Names,
    expected: usize,
}

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<usize>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Option<usize>, E> {
        Ok(self.names.position(name, self.expected))
    }
}

struct Cell<'a> {
    name: &'a str,
    data_type: DataType,
    text: &'a mut String,
    items: &'a mut Vec<Parsed>,
}

impl<'de> DeserializeSeed<'de> for Cell<'_> {
    type Value = Parsed;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Parsed, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Cell<'_> {
    type Value = Parsed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.data_type {
            DataType::Int64 => "a whole number",
            DataType::Float64 => "a number",
            DataType::Boolean => "true or false",
            DataType::String => "a text",
            DataType::Timestamp => "milliseconds since 1970",
            DataType::List(_) => "a list",
        };
        write!(f, "{kind} or null for '{}'", self.name)
    }

    fn visit_unit<E: Error>(self) -> Result<Parsed, E> {
        Ok(Parsed::Null)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Parsed, E> {
        match self.data_type {
            DataType::Int64 | DataType::Timestamp => Ok(Parsed::Int64(value)),
            DataType::Float64 => Ok(Parsed::Float64(value as f64)),
            _ => Err(E::invalid_type(serde::de::Unexpected::Signed(value), &self)),
        }
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Parsed, E> {
        match (i64::try_from(value), self.data_type) {
            (Ok(value), _) => self.visit_i64(value),
            (Err(_), DataType::Float64) => Ok(Parsed::Float64(value as f64)),
            (Err(_), _) => Err(E::invalid_value(serde::de::Unexpected::Unsigned(value), &self)),
        }
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Parsed, E> {
        match self.data_type {
            DataType::Float64 => Ok(Parsed::Float64(value)),
            _ => Err(E::invalid_type(serde::de::Unexpected::Float(value), &self)),
        }
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Parsed, E> {
        match self.data_type {
            DataType::Boolean => Ok(Parsed::Boolean(value)),
            _ => Err(E::invalid_type(serde::de::Unexpected::Bool(value), &self)),
        }
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Parsed, E> {
        match self.data_type {
            DataType::String => {
                let start = self.text.len();
                self.text.push_str(value);
                Ok(Parsed::String(start, self.text.len()))
            }
            _ => Err(E::invalid_type(serde::de::Unexpected::Str(value), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Parsed, A::Error> {
        let DataType::List(element) = self.data_type else {
            return Err(A::Error::invalid_type(serde::de::Unexpected::Seq, &self));
        };
        let start = self.items.len();
        loop {
            let (data_type, before) = (DataType::from(element), self.items.len());
            let cell = Cell { name: self.name, data_type, text: self.text, items: self.items };
            match list.next_element_seed(cell)? {
                None => return Ok(Parsed::List(start, before)),
                Some(Parsed::Null) => return Err(A::Error::custom(format!("a null in the list of '{}'", self.name))),
                Some(item) => self.items.push(item),
            }
        }
    }
}
