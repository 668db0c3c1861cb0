//! JSON records, straight into columns.
//!
//! One pass with sonic-rs's SIMD parser; fields that the plan does not use are skipped. The first pass only notes which
//! field does not fit; where in the record it stands is looked up afterwards, for that record alone. The last of duplicate
//! keys wins, as in JavaScript, Python and serde_json. NaN, Infinity and -Infinity, which Python's writer emits although they
//! are not JSON, count as null.
//!

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer as _, MapAccess, SeqAccess, Visitor};

use super::columns::{Field, Misfit, RowBuilder};
use super::fault::{RecordFault, excerpt, reason};
use super::skip::Skip;

/// Bytes of Confluent framing: a zero byte, and the schema's id.
const FRAME: usize = 5;

/// Fills columns from JSON objects.
#[derive(Debug)]
pub(crate) struct JsonDecoder {
    root: Node,
}

/// Names at one level of nesting.
#[derive(Debug, Default)]
struct Node {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    name: Box<str>,
    /// Column that holds the value itself.
    column: Option<usize>,
    /// Names within it, where it is an object.
    nested: Option<Node>,
    /// All columns at or below this name.
    below: Vec<usize>,
}

impl Node {
    fn insert(&mut self, path: &str, column: usize) {
        let (head, rest) = path.split_once('.').map_or((path, None), |(head, rest)| (head, Some(rest)));
        let index = self.entries.iter().position(|entry| &*entry.name == head).unwrap_or_else(|| {
            self.entries.push(Entry { name: head.into(), column: None, nested: None, below: Vec::new() });
            self.entries.len() - 1
        });
        let entry = &mut self.entries[index];
        entry.below.push(column);
        match rest {
            None => entry.column = Some(column),
            Some(rest) => entry.nested.get_or_insert_default().insert(rest, column),
        }
    }

    /// Index of the entry with this name. `expected` is tried first: records repeat the order of their keys.
    #[inline]
    fn find(&self, name: &str, expected: usize) -> Option<usize> {
        match self.entries.get(expected) {
            Some(entry) if &*entry.name == name => Some(expected),
            _ => self.entries.iter().position(|entry| &*entry.name == name),
        }
    }
}

impl JsonDecoder {
    pub(crate) fn new<'a>(fields: impl IntoIterator<Item = &'a Field>) -> Self {
        let mut root = Node::default();
        for (column, field) in fields.into_iter().enumerate() {
            root.insert(&field.name, column);
        }
        Self { root }
    }

    /// Sets the row's fields from one record. The row has been started; the caller commits it if this succeeds.
    pub(crate) fn decode(&self, value: &[u8], rows: &mut RowBuilder) -> Result<(), RecordFault> {
        // JSON text cannot start with a zero byte, so this is Confluent's framing and nothing else.
        let skipped = if value.first() == Some(&0) && value.len() >= FRAME { FRAME } else { 0 };
        let text = std::str::from_utf8(&value[skipped..]).map_err(|error| {
            RecordFault::malformed(format!("invalid UTF-8 at byte {}", skipped + error.valid_up_to()))
        })?;
        // The parser would pass over a value of another kind as deep as it nests.
        if !text.trim_start_matches([' ', '\t', '\n', '\r']).starts_with('{') {
            return Err(no_object(text, skipped));
        }
        if let Err(error) = self.parse(text, rows) {
            self.parse_leniently(text, rows).ok_or_else(|| syntax_fault(text, skipped, &error))?;
        }
        match rows.misfit() {
            None => Ok(()),
            Some((column, misfit)) => {
                let field = rows.columns()[column].field();
                let at = locate(text, &field.name);
                Err(RecordFault::new(reason::WRONG_TYPE, misfit_text(field, misfit, at.map(|at| at + skipped))))
            }
        }
    }

    fn parse(&self, text: &str, rows: &mut RowBuilder) -> sonic_rs::Result<()> {
        let mut parser = sonic_rs::Deserializer::from_str(text);
        (&mut parser).deserialize_map(ObjectVisitor { node: &self.root, rows })?;
        parser.end()
    }

    /// Tries again with NaN and infinities replaced by null. `None` where there are none, or where more is wrong.
    #[cold]
    fn parse_leniently(&self, text: &str, rows: &mut RowBuilder) -> Option<()> {
        let text = without_nonfinite(text)?;
        rows.start();
        self.parse(&text, rows).ok()
    }
}

/// The text with `NaN`, `Infinity` and `-Infinity` outside of strings replaced by null, or `None` where there is none.
fn without_nonfinite(text: &str) -> Option<String> {
    const TOKENS: [&str; 3] = ["NaN", "-Infinity", "Infinity"];
    let mut out = String::with_capacity(text.len() + 8);
    let mut rest = text;
    let mut in_string = false;
    let mut replaced = false;
    while let Some(first) = rest.chars().next() {
        if !in_string && let Some(token) = TOKENS.iter().find(|token| rest.starts_with(**token)) {
            out.push_str("null");
            rest = &rest[token.len()..];
            replaced = true;
            continue;
        }
        let mut taken = first.len_utf8();
        match first {
            '"' => in_string = !in_string,
            '\\' if in_string => taken += rest[1..].chars().next().map_or(0, char::len_utf8),
            _ => {}
        }
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    replaced.then_some(out)
}

struct ObjectVisitor<'a> {
    node: &'a Node,
    rows: &'a mut RowBuilder,
}

impl<'de> Visitor<'de> for ObjectVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    #[inline]
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut expected = 0;
        while let Some(found) = map.next_key_seed(KeySeed { node: self.node, expected })? {
            match found {
                Some(index) => {
                    expected = index + 1;
                    map.next_value_seed(ValueSeed { entry: &self.node.entries[index], rows: self.rows })?;
                }
                None => map.next_value_seed(Skip)?,
            }
        }
        Ok(())
    }
}

struct KeySeed<'a> {
    node: &'a Node,
    expected: usize,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Option<usize>;

    #[inline]
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    #[inline]
    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.node.find(key, self.expected))
    }
}

/// Puts a value into its column, or descends where the plan names fields within it.
struct ValueSeed<'a> {
    entry: &'a Entry,
    rows: &'a mut RowBuilder,
}

impl ValueSeed<'_> {
    /// Sets the value's own column, and nulls those below it.
    #[inline]
    fn set(self, set: impl FnOnce(&mut super::columns::ColumnBuilder), found: &'static str) {
        if self.entry.nested.is_some() {
            for &column in &self.entry.below {
                if found == NULL {
                    self.rows.column(column).set_null();
                } else {
                    self.rows.column(column).set_misfit(found, "an object should hold this field");
                }
            }
        }
        if let Some(column) = self.entry.column {
            set(self.rows.column(column));
        }
    }
}

const NULL: &str = "null";

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = ();

    #[inline]
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    #[inline]
    fn visit_unit<E>(self) -> Result<(), E> {
        self.set(|column| column.set_null(), NULL);
        Ok(())
    }

    #[inline]
    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.set(|column| column.set_boolean(value), "a boolean");
        Ok(())
    }

    #[inline]
    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.set(|column| column.set_integer(value), "a number");
        Ok(())
    }

    #[inline]
    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.set(|column| column.set_unsigned(value), "a number");
        Ok(())
    }

    #[inline]
    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.set(|column| column.set_float(value), "a number");
        Ok(())
    }

    #[inline]
    fn visit_str<E>(self, value: &str) -> Result<(), E> {
        self.set(|column| column.set_text(value), "text");
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<(), A::Error> {
        self.set(|column| column.set_misfit("an array", ""), "an array");
        Skip.visit_seq(seq)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        let Self { entry, rows } = self;
        for &column in &entry.below {
            rows.column(column).set_null();
        }
        if let Some(column) = entry.column {
            rows.column(column).set_misfit("an object", "name the field within it with a dot: outer.inner");
        }
        match &entry.nested {
            Some(node) => ObjectVisitor { node, rows }.visit_map(map),
            None => Skip.visit_map(map),
        }
    }
}

/// The sentence about a field that does not fit.
pub(crate) fn misfit_text(field: &Field, misfit: &Misfit, at: Option<usize>) -> String {
    let Misfit { found, help, .. } = misfit;
    let mut text = format!("field '{}': expected {}, found {found}", field.name, field.data_type);
    if let Some(at) = at {
        text.push_str(&format!(" at byte {at}"));
    }
    if !help.is_empty() {
        text.push_str("; ");
        text.push_str(help);
    }
    text
}

#[cold]
fn no_object(text: &str, skipped: usize) -> RecordFault {
    let opening = text.trim_start();
    if opening.is_empty() {
        return RecordFault::malformed("the value is empty: expected a JSON object");
    }
    RecordFault::malformed(format!(
        "expected a JSON object, found {} at byte {}",
        excerpt(opening),
        skipped + text.len() - opening.len()
    ))
}

#[cold]
fn syntax_fault(text: &str, skipped: usize, error: &sonic_rs::Error) -> RecordFault {
    // The parser's own text goes on with a drawing of the record over several lines.
    let message = error.to_string();
    let message = message.lines().next().unwrap_or_default();
    let message = message.split(" at line").next().unwrap_or(message).trim_end_matches('.');
    if message.contains("layers deep") {
        return RecordFault::malformed("arrays and objects are nested more than 254 levels deep");
    }
    let (what, at) = match error.is_eof() {
        true => ("the record is cut short", text.len()),
        false => (message, error.offset().min(text.len())),
    };
    RecordFault::malformed(format!("not JSON: {what} at byte {}", skipped + at))
}

/// Byte position of the value of a field, given the path to it. The text has been parsed before, so it nests only so deep.
#[cold]
fn locate(text: &str, path: &str) -> Option<usize> {
    let (head, rest) = path.split_once('.').map_or((path, None), |(head, rest)| (head, Some(rest)));
    let value = sonic_rs::to_object_iter(text)
        .filter_map(Result::ok)
        .filter(|(key, _)| **key == *head)
        .last()
        .map(|(_, value)| value)?;
    let raw = value.as_raw_str();
    let start = (raw.as_ptr() as usize).checked_sub(text.as_ptr() as usize).filter(|start| *start < text.len())?;
    match rest {
        Some(rest) if raw.starts_with('{') => locate(&text[start..start + raw.len()], rest).map(|at| start + at),
        _ => Some(start),
    }
}
