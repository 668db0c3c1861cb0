//! A TOML document as a tree in which every key and value knows its place in the text.

use std::borrow::Cow;
use std::ops::Range;

use serde::de::value::{Error as ValueError, MapDeserializer, SeqDeserializer};
use serde::de::{IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::faults::Fault;

/// What faults in `--set` settings are reported under.
const COMMAND_LINE: &str = "command line";

/// A stretch of one of the texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Which text, as numbered by [`Collector::add_text`].
    text: usize,
    /// Bytes.
    span: Range<usize>,
    /// True within what has a fault already: further ones would only be its consequences.
    muted: bool,
    /// True where the line must not be shown.
    secret: bool,
}

impl Place {
    fn new(text: usize, span: Range<usize>) -> Self {
        Self { text, span, muted: false, secret: false }
    }

    /// The beginning of the same text.
    pub(super) fn start_of(place: &Self) -> Self {
        Self::new(place.text, 0..0)
    }

    /// Where nothing is reported.
    pub(super) fn nowhere() -> Self {
        Self { muted: true, ..Self::new(0, 0..0) }
    }

    /// First byte.
    pub(super) fn start(&self) -> usize {
        self.span.start
    }

    /// True where nothing more is reported.
    pub(super) fn is_muted(&self) -> bool {
        self.muted
    }

    /// The same place, muted if it was or `muted` says so.
    pub(super) fn muted_if(mut self, muted: bool) -> Self {
        self.muted |= muted;
        self
    }

    /// The same place, for a value that must not be printed.
    pub(super) fn secret(mut self) -> Self {
        self.secret = true;
        self
    }
}

/// Collects the faults, and the texts that they point into.
#[derive(Debug, Default)]
pub(super) struct Collector {
    texts: Vec<(String, String)>,
    faults: Vec<Fault>,
}

impl Collector {
    /// Adds a text under the name that faults in it are reported with; returns its number.
    pub(super) fn add_text(&mut self, name: &str, text: &str) -> usize {
        self.texts.push((name.to_owned(), text.to_owned()));
        self.texts.len() - 1
    }

    /// Reports a fault, unless it is at a place that has one already.
    pub(super) fn report(&mut self, place: &Place, message: impl Into<String>, help: Option<String>) {
        if place.muted {
            return;
        }
        let (name, text) = &self.texts[place.text];
        let mut fault = Fault::at(name, text, place.span.clone(), message.into(), help);
        if place.secret {
            fault.source.clear();
        }
        self.faults.push(fault);
    }

    /// Reports a fault made elsewhere, such as in another file.
    pub(super) fn push(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    /// How many faults there are so far.
    pub(super) fn count(&self) -> usize {
        self.faults.len()
    }

    /// The text behind a place, as written.
    pub(super) fn written(&self, place: &Place) -> &str {
        self.texts[place.text].1.get(place.span.clone()).unwrap_or_default()
    }

    /// True for what was set on the command line.
    pub(super) fn is_command_line(&self, place: &Place) -> bool {
        self.texts.get(place.text).is_some_and(|(name, _)| name == COMMAND_LINE)
    }

    /// The faults, unsorted.
    pub(super) fn into_faults(self) -> Vec<Fault> {
        self.faults
    }
}

/// A string value, in which each byte knows where it was written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Text {
    /// The value.
    pub(super) value: String,
    /// For each byte of the value, and for its end, the byte of the document that it comes from.
    origins: Vec<usize>,
    /// True where environment variables took part.
    pub(super) interpolated: bool,
}

impl Text {
    /// A value with the origin of each of its bytes and of its end.
    pub(super) fn new(value: String, origins: Vec<usize>, interpolated: bool) -> Self {
        debug_assert_eq!(value.len() + 1, origins.len());
        Self { value, origins, interpolated }
    }

    /// Where the byte at `at` was written; the end for what lies beyond.
    pub(super) fn origin(&self, at: usize) -> usize {
        self.origins[at.min(self.value.len())]
    }
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    String(Text),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    /// TOML has dates and times; no key takes one.
    Datetime,
    Array(Vec<Node>),
    Table(Vec<Entry>),
}

impl Value {
    /// What it is, for a message.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::String(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Boolean(_) => "a boolean",
            Self::Datetime => "a date or time",
            Self::Array(_) => "an array",
            Self::Table(_) => "a table",
        }
    }
}

/// A value and where it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) place: Place,
}

/// A key with its value; in a table in the order of the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) place: Place,
    pub(super) node: Node,
}

impl Node {
    /// Marks the value as a stand-in for one that has a fault: nothing more is reported there.
    pub(super) fn mute(&mut self) {
        self.place.muted = true;
    }

    fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Table(entries) => entries,
            _ => &[],
        }
    }
}

/// Parses a document; syntax faults go to the collector, all of them. Empty where the document has any.
pub(super) fn parse(text_number: usize, text: &str, faults: &mut Collector) -> Node {
    let before = faults.count();
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let place = Place::new(text_number, error.span().unwrap_or(0..0));
        let mut lines = error.message().lines();
        let message = lines.next().unwrap_or("malformed TOML").to_owned();
        let help: Vec<&str> = lines.collect();
        faults.report(&place, message, if help.is_empty() { None } else { Some(help.join("; ")) });
    }
    let source = Source { number: text_number, text, base: 0 };
    let mut root = source.node(table.map_table(), faults);
    if faults.count() > before {
        root.value = Value::Table(Vec::new());
    }
    root
}

/// Lays `--set key=value` settings over the document. Each is TOML; a value that is not is taken as a string.
pub(super) fn set(root: &mut Node, overrides: &[(String, String)], faults: &mut Collector) {
    let mut lines = String::new();
    let mut starts = Vec::new();
    for (key, value) in overrides {
        let key_start = lines.len() + "--set ".len();
        starts.push((key_start, key_start + key.len() + 1));
        lines.push_str(&format!("--set {key}={value}\n"));
    }
    let number = faults.add_text(COMMAND_LINE, &lines);
    for ((key, value), (key_start, value_start)) in overrides.iter().zip(starts) {
        let Some(keys) = parse_key(key) else {
            let place = Place::new(number, key_start..key_start + key.len());
            faults.report(&place, format!("`{key}` is not a key"), Some("write it like monitor.window.rows".into()));
            continue;
        };
        let node = match DeValue::parse(value) {
            Ok(parsed) => Source { number, text: value, base: value_start }.node(parsed, faults),
            Err(_) => Node {
                value: Value::String(Text::new(
                    value.clone(),
                    (value_start..=value_start + value.len()).collect(),
                    false,
                )),
                place: Place::new(number, value_start..value_start + value.len()),
            },
        };
        let keys = keys
            .into_iter()
            .map(|(name, span)| (name, Place::new(number, key_start + span.start..key_start + span.end)));
        insert(root, keys.collect(), node, faults);
    }
}

fn parse_key(key: &str) -> Option<Vec<(String, Range<usize>)>> {
    let text = format!("{key} = 0");
    let table = DeTable::parse(&text).ok()?.into_inner();
    let mut keys = Vec::new();
    let mut table = &table;
    loop {
        let mut entries = table.iter();
        let (name, value) = entries.next()?;
        if entries.next().is_some() || name.span().end > key.len() {
            return None;
        }
        keys.push((name.get_ref().to_string(), name.span()));
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => return Some(keys),
        }
    }
}

fn insert(node: &mut Node, keys: Vec<(String, Place)>, value: Node, faults: &mut Collector) {
    let mut node = node;
    let last = keys.len() - 1;
    for (depth, (key, place)) in keys.into_iter().enumerate() {
        let kind = node.value.kind();
        let Value::Table(entries) = &mut node.value else {
            faults.report(&place, format!("`{key}` cannot be set in {kind}"), None);
            return;
        };
        let index = match entries.iter().position(|e| e.key == key) {
            Some(index) => index,
            None => {
                let table = Node { value: Value::Table(Vec::new()), place: place.clone() };
                entries.push(Entry { key, place: place.clone(), node: table });
                entries.len() - 1
            }
        };
        let entry = &mut entries[index];
        if depth == last {
            entry.place = place;
            entry.node = value;
            return;
        }
        node = &mut entry.node;
    }
}

/// Where a TOML text lies within one of the collector's texts.
struct Source<'t> {
    number: usize,
    text: &'t str,
    base: usize,
}

trait MapTable<'i> {
    fn map_table(self) -> Spanned<DeValue<'i>>;
}

impl<'i> MapTable<'i> for Spanned<DeTable<'i>> {
    fn map_table(self) -> Spanned<DeValue<'i>> {
        let span = self.span();
        Spanned::new(span, DeValue::Table(self.into_inner()))
    }
}

impl Source<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        Place::new(self.number, self.base + span.start..self.base + span.end)
    }

    fn node(&self, value: Spanned<DeValue<'_>>, faults: &mut Collector) -> Node {
        let span = value.span();
        let place = self.place(span.clone());
        let value = match value.into_inner() {
            DeValue::String(text) => {
                let raw = self.text.get(span.clone()).unwrap_or_default();
                let origins = string_origins(raw, &text).into_iter().map(|at| self.base + span.start + at).collect();
                Value::String(Text::new(Cow::into_owned(text), origins, false))
            }
            DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(integer) => Value::Integer(integer),
                Err(_) => {
                    faults.report(&place, "the integer does not fit 64 bits", None);
                    Value::Integer(0)
                }
            },
            DeValue::Float(float) => Value::Float(float.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::Boolean(boolean) => Value::Boolean(boolean),
            DeValue::Datetime(_) => Value::Datetime,
            DeValue::Array(items) => Value::Array(items.into_iter().map(|item| self.node(item, faults)).collect()),
            DeValue::Table(table) => {
                let mut entries: Vec<Entry> = table
                    .into_iter()
                    .map(|(key, value)| Entry {
                        place: self.place(key.span()),
                        key: Cow::into_owned(key.into_inner()),
                        node: self.node(value, faults),
                    })
                    .collect();
                entries.sort_by_key(|entry| entry.place.span.start);
                Value::Table(entries)
            }
        };
        Node { value, place }
    }
}

/// For each byte of a decoded string, and for its end, the byte of its TOML notation (quotes and all) that it comes from.
fn string_origins(raw: &str, decoded: &str) -> Vec<usize> {
    let (quote, literal) = match raw.as_bytes() {
        [b'"', b'"', b'"', ..] => (3, false),
        [b'\'', b'\'', b'\'', ..] => (3, true),
        [b'\'', ..] => (1, true),
        [b'"', ..] => (1, false),
        _ => (0, true),
    };
    let closed = raw.len() >= 2 * quote && raw.is_char_boundary(raw.len() - quote);
    let end = if closed { raw.len() - quote } else { raw.len() };
    let mut at = quote.min(end);
    if quote == 3 {
        at += raw[at..end].strip_prefix("\r\n").map_or(usize::from(raw[at..end].starts_with('\n')), |_| 2);
    }
    let mut origins = Vec::with_capacity(decoded.len() + 1);
    for letter in decoded.chars() {
        if !literal {
            // A backslash at the end of a line swallows white space up to the next text.
            while let Some(rest) = raw[at..end].strip_prefix('\\')
                && rest.starts_with([' ', '\t', '\r', '\n'])
            {
                at = end - rest.trim_start_matches([' ', '\t', '\r', '\n']).len();
            }
        }
        let width = match raw[at..end].chars().next() {
            Some('\\') if !literal => match raw.as_bytes()[at..end].get(1) {
                Some(b'u') => 6,
                Some(b'U') => 10,
                Some(b'x') => 4,
                _ => 2,
            },
            Some('\r') if letter == '\n' => 2,
            Some(c) => c.len_utf8(),
            None => 0,
        };
        origins.extend(std::iter::repeat_n(at, letter.len_utf8()));
        at += width;
        while at > end || !raw.is_char_boundary(at) {
            at -= 1;
        }
    }
    origins.push(at);
    origins
}

/// A value, or the lack of one, as the rules see it: where to look further, and where to point.
#[derive(Debug, Clone)]
pub(super) struct Site<'d> {
    node: Option<&'d Node>,
    key: Place,
}

impl<'d> Site<'d> {
    /// The document.
    pub(super) fn root(node: &'d Node) -> Self {
        Self { node: Some(node), key: Place::start_of(&node.place) }
    }

    /// A key of the table; where it is absent, a site that points at the table.
    pub(super) fn get(&self, key: &str) -> Self {
        match self.node.and_then(|node| node.entries().iter().find(|e| e.key == key)) {
            Some(entry) => {
                let mut key = entry.place.clone();
                key.muted |= self.key.muted;
                Site { node: Some(&entry.node), key }
            }
            None => Site { node: None, key: self.place_if_given() },
        }
    }

    /// An item of the array; where it is absent, a site that points at the array.
    pub(super) fn item(&self, index: usize) -> Self {
        match self.node.map(|node| &node.value) {
            Some(Value::Array(items)) if index < items.len() => {
                let mut key = items[index].place.clone();
                key.muted |= self.value().muted;
                Site { node: Some(&items[index]), key }
            }
            _ => Site { node: None, key: self.value() },
        }
    }

    /// True where the document has the value.
    pub(super) fn is_given(&self) -> bool {
        self.node.is_some()
    }

    /// True where the value, or something in it, stands in for one that has a fault.
    pub(super) fn has_fault(&self) -> bool {
        fn any(node: &Node) -> bool {
            node.place.muted
                || match &node.value {
                    Value::Array(items) => items.iter().any(any),
                    Value::Table(entries) => entries.iter().any(|e| any(&e.node)),
                    _ => false,
                }
        }
        self.key.muted || self.node.is_some_and(any)
    }

    /// Place of the key.
    pub(super) fn key(&self) -> Place {
        let mut place = self.key.clone();
        place.muted |= self.node.is_some_and(|node| node.place.muted);
        place
    }

    /// Place of the value; of the key where there is none.
    pub(super) fn value(&self) -> Place {
        let mut place = self.node.map_or_else(|| self.key.clone(), |node| node.place.clone());
        place.muted |= self.key.muted;
        place
    }

    /// Place of some bytes of a string value.
    pub(super) fn text(&self, span: Range<usize>) -> Place {
        let mut place = self.value();
        if let Some(Node { value: Value::String(text), .. }) = self.node {
            let start = text.origin(span.start);
            place.span = start..text.origin(span.end).max(start);
        }
        place
    }

    /// Place that stands for the table itself: its key, because the table may be long.
    fn place_if_given(&self) -> Place {
        self.key()
    }
}

impl<'de> IntoDeserializer<'de, ValueError> for &'de Node {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> serde::Deserializer<'de> for &'de Node {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match &self.value {
            Value::String(text) => visitor.visit_borrowed_str(&text.value),
            Value::Integer(integer) => visitor.visit_i64(*integer),
            Value::Float(float) => visitor.visit_f64(*float),
            Value::Boolean(boolean) => visitor.visit_bool(*boolean),
            Value::Datetime => visitor.visit_unit(),
            Value::Array(items) => visitor.visit_seq(SeqDeserializer::new(items.iter())),
            Value::Table(entries) => {
                visitor.visit_map(MapDeserializer::new(entries.iter().map(|e| (e.key.as_str(), &e.node))))
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        match &self.value {
            Value::String(text) => visitor.visit_enum(text.value.as_str().into_deserializer()),
            other => Err(serde::de::Error::custom(format!("expected a word, found {}", other.kind()))),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    fn written(toml: &str, at: Range<usize>) -> String {
        let mut faults = Collector::default();
        let number = faults.add_text("t", toml);
        let root = parse(number, toml, &mut faults);
        assert_eq!(faults.count(), 0);
        faults.written(&Site::root(&root).get("k").text(at)).to_owned()
    }

    #[rstest]
    #[case("k = \"abc def\"", 4..7, "def")]
    #[case("k = 'abc def'", 4..7, "def")]
    #[case("k = \"a\\\"b \\u00e4 def\"", 7..10, "def")]
    #[case("k = \"\"\"\nabc\n  def\"\"\"", 6..9, "def")]
    #[case("k = \"\"\"abc \\\n     def\"\"\"", 4..7, "def")]
    #[case("k = '''\nä def'''", 3..6, "def")]
    fn a_string_knows_where_its_bytes_were_written(
        #[case] toml: &str,
        #[case] at: Range<usize>,
        #[case] expected: &str,
    ) {
        assert_eq!(written(toml, at), expected);
    }

    #[test]
    fn tables_keep_the_order_of_the_file() {
        let toml = "[s.zebra]\nx = 1\n[s.ant]\nx = 2\n";
        let mut faults = Collector::default();
        let root = parse(0, toml, &mut faults);
        let Value::Table(entries) = &root.entries()[0].node.value else { panic!("a table") };
        assert_eq!(entries.iter().map(|e| e.key.as_str()).collect::<Vec<_>>(), ["zebra", "ant"]);
    }

    #[test]
    fn every_syntax_fault_is_reported() {
        let toml = "a = \nb = 1\nb = 2\nc = \"open\n";
        let mut faults = Collector::default();
        let number = faults.add_text("t", toml);
        parse(number, toml, &mut faults);
        let lines: Vec<usize> = faults.into_faults().iter().map(|f| f.line).collect();
        assert_eq!(lines, [1, 3, 4]);
    }

    #[test]
    fn settings_lie_over_the_document() {
        let mut faults = Collector::default();
        let mut root = parse(0, "[monitor.window]\nrows = 10\n", &mut faults);
        faults.add_text("pipeline.toml", "");
        let settings = [
            ("monitor.window.rows", "1000"),
            ("score.batch.wait", "30m"),
            ("monitor.window.rows.x", "1"),
            ("a b", "1"),
            ("features.\"x.y\"", "[1, 2]"),
        ];
        set(&mut root, &settings.map(|(k, v)| (k.to_owned(), v.to_owned())), &mut faults);
        let site = Site::root(&root);
        assert_eq!(site.get("monitor").get("window").get("rows").node.unwrap().value, Value::Integer(1000));
        assert_eq!(faults.written(&site.get("score").get("batch").get("wait").value()), "30m");
        assert!(matches!(site.get("features").get("x.y").node.unwrap().value, Value::Array(_)));
        let faults: Vec<_> = faults.into_faults().into_iter().map(|f| (f.file, f.line, f.column, f.message)).collect();
        assert_eq!(
            faults,
            [
                ("command line".to_owned(), 3, 27, "`x` cannot be set in an integer".to_owned()),
                ("command line".to_owned(), 4, 7, "`a b` is not a key".to_owned()),
            ]
        );
    }

    proptest! {
        #[test]
        fn origins_never_panic(raw in "[\"'\\\\ua-cä\n\r ]{0,16}", decoded in "[a-cä\n ]{0,12}") {
            let origins = string_origins(&raw, &decoded);
            prop_assert_eq!(origins.len(), decoded.len() + 1);
            for origin in origins {
                prop_assert!(raw.is_char_boundary(origin));
            }
        }
    }
}
