//! Random changes to valid inputs that keep most of their structure.

use rand::Rng;
use rand::seq::IndexedRandom as _;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// What a part of an input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Bytes of a binary format.
    Bytes,
    /// Words, numbers and signs.
    Text,
    /// A JSON document.
    Json,
}

/// An input may become this long, in bytes, by repeating parts of it.
const LONGEST: usize = 1 << 18;

/// Numbers at which arithmetic and casts go wrong.
const NUMBERS: &[i64] = &[
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    -32_768,
    65_535,
    i32::MAX as i64,
    i32::MIN as i64,
    u32::MAX as i64,
    1 << 53,
    i64::MAX,
    i64::MAX - 1,
    i64::MIN,
    i64::MIN + 1,
    -62_135_596_800_000,
    253_402_300_800_000,
];

/// Texts at which parsers go wrong.
const TEXTS: &[&str] = &[
    "",
    " ",
    "\0",
    "\u{feff}",
    "\u{10ffff}",
    "é",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    "'",
    "''",
    "$",
    "${",
    "${A:-",
    "}",
    "{",
    "[",
    "]",
    "(",
    ")",
    ",",
    ":",
    ".",
    "..",
    "-",
    "-0",
    "+1",
    "0x",
    "1e",
    "1e999",
    "-1e-999",
    "NaN",
    "Infinity",
    "-Infinity",
    "null",
    "true",
    "99999999999999999999999999",
    "2024-02-30",
    "9999-12-31T23:59:60Z",
    "-0001-01-01",
    "1970-01-01T00:00:00+99:99",
    "\r\n",
    "--",
    "/*",
    "#",
    "=",
    ";",
    "%",
    "\u{202e}",
    "a.b",
    "a.b.c.d",
    "0.1",
    "9223372036854775808",
];

/// Makes inputs out of a corpus.
pub struct Mutator<'a> {
    pub rng: &'a mut ChaCha8Rng,
    pub corpus: &'a [Vec<Vec<u8>>],
    pub words: &'a [&'a str],
}

impl Mutator<'_> {
    /// One input: a valid one with one to eight changes, most of them in one part.
    pub fn input(&mut self, shapes: &[Shape]) -> Vec<Vec<u8>> {
        let mut input = self.corpus.choose(self.rng).expect("a corpus is not empty").clone();
        let changes = 1 << self.rng.random_range(0..4);
        let usual = self.rng.random_range(0..shapes.len());
        for _ in 0..changes {
            let part = if self.rng.random_ratio(3, 4) { usual } else { self.rng.random_range(0..shapes.len()) };
            let bytes = std::mem::take(&mut input[part]);
            // Some changes ignore the structure: cut texts, broken escapes, bytes that are no UTF-8.
            input[part] = match shapes[part] {
                Shape::Json if self.rng.random_ratio(3, 4) => self.json(bytes),
                Shape::Json | Shape::Text if self.rng.random_ratio(2, 3) => self.text(bytes),
                _ => self.bytes(bytes, part),
            };
        }
        input
    }

    fn bytes(&mut self, mut bytes: Vec<u8>, part: usize) -> Vec<u8> {
        let length = bytes.len();
        let at = self.rng.random_range(0..=length);
        let some = self.range(length);
        match self.rng.random_range(0..12) {
            0 if at < length => bytes[at] ^= 1 << self.rng.random_range(0..8),
            1 if at < length => bytes[at] = *[0, 1, 2, 0x7f, 0x80, 0xfe, 0xff].choose(self.rng).expect("not empty"),
            2 => bytes.insert(at, self.rng.random()),
            3 => drop(bytes.drain(some)),
            4 => bytes.truncate(at),
            5 => {
                let piece = bytes[some].to_vec();
                let times = if self.rng.random_ratio(1, 50) { LONGEST / piece.len().max(1) } else { 1 };
                if length + piece.len() * times <= 2 * LONGEST {
                    drop(bytes.splice(at..at, piece.repeat(times)));
                }
            }
            6 => {
                let other = self.corpus.choose(self.rng).expect("a corpus is not empty")[part].clone();
                let from = self.range(other.len());
                bytes.splice(some, other[from].iter().copied());
            }
            7 | 8 => {
                // A number as binary formats hold it, written over what is there.
                let number = self.number();
                let digits: Vec<u8> = match self.rng.random_range(0..6) {
                    0 => number.to_le_bytes().to_vec(),
                    1 => number.to_be_bytes().to_vec(),
                    2 => (number as i32).to_le_bytes().to_vec(),
                    3 => (number as i32).to_be_bytes().to_vec(),
                    4 => varint((number << 1 ^ number >> 63) as u64),
                    _ => varint(number as u64),
                };
                let end = (at + digits.len()).min(length);
                bytes.splice(at..end, digits);
            }
            9 if !self.words.is_empty() => {
                let word = self.words.choose(self.rng).expect("not empty");
                bytes.splice(at..at, word.bytes());
            }
            10 => bytes[some].reverse(),
            _ => bytes[some].iter_mut().for_each(|byte| *byte = byte.wrapping_add(1)),
        }
        bytes
    }

    fn text(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let Ok(text) = String::from_utf8(bytes.clone()) else { return self.bytes(bytes, 0) };
        let mut words = words(&text);
        let at = self.rng.random_range(0..=words.len());
        let some = self.range(words.len());
        match self.rng.random_range(0..9) {
            0 => drop(words.drain(some)),
            1 if at < words.len() => words[at] = self.word(),
            2 => {
                let word = self.word();
                words.insert(at, word);
            }
            3 => {
                let piece = words[some].to_vec();
                words.splice(at..at, piece);
            }
            4 if at < words.len() => {
                let other = self.rng.random_range(0..words.len());
                words.swap(at, other);
            }
            // Nested as deep as a stack might not like.
            5 if self.rng.random_ratio(1, 20) => {
                let (open, close) =
                    *[("(", ")"), ("[", "]"), ("{\"a\":", "}"), ("not ", ""), ("-", ""), ("{ a = ", " }")]
                        .choose(self.rng)
                        .expect("not empty");
                let depth = *[10, 200, 5_000, 100_000].choose(self.rng).expect("not empty");
                words.insert(at, open.repeat(depth));
                let end = self.rng.random_range(at + 1..=words.len());
                words.insert(end, close.repeat(depth));
            }
            6 if at < words.len() && words[at].bytes().all(|b| b.is_ascii_digit()) => {
                words[at] = self.number().to_string()
            }
            7 => {
                // A line of another input.
                let other = self.corpus.choose(self.rng).expect("a corpus is not empty");
                let other = String::from_utf8_lossy(other.choose(self.rng).expect("an input has parts")).into_owned();
                let lines: Vec<&str> = other.split_inclusive('\n').collect();
                if let Some(line) = lines.choose(self.rng) {
                    words.insert(at, (*line).to_owned());
                }
            }
            _ => words.truncate(at),
        }
        words.concat().into_bytes()
    }

    fn json(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let Ok(mut document) = serde_json::from_slice::<Value>(&bytes) else { return self.text(bytes) };
        let mut places = count(&document);
        places = self.rng.random_range(0..places);
        let node = nth(&mut document, &mut places).expect("the place was counted");
        self.change(node);
        // Deep nesting, which serde_json's own values would not survive, as text around the document.
        if self.rng.random_ratio(1, 200) {
            let depth = *[100, 1_000, 200_000].choose(self.rng).expect("not empty");
            return format!("{{\"unknown\":{}{}, \"x\":{document}}}", "[".repeat(depth), "]".repeat(depth))
                .into_bytes();
        }
        document.to_string().into_bytes()
    }

    fn change(&mut self, node: &mut Value) {
        match node {
            Value::Object(fields) if !fields.is_empty() && self.rng.random_ratio(2, 3) => {
                let names: Vec<String> = fields.keys().cloned().collect();
                let name = names.choose(self.rng).expect("not empty");
                let other = names.choose(self.rng).expect("not empty");
                match self.rng.random_range(0..5) {
                    0 => drop(fields.remove(name)),
                    1 => {
                        let value = fields.remove(name).expect("it is there");
                        fields.insert(self.word(), value);
                    }
                    2 => {
                        let value = fields[name].clone();
                        fields.insert(other.clone(), value);
                    }
                    3 => {
                        let value = self.value();
                        fields.insert(self.word(), value);
                    }
                    _ => {
                        let value = self.value();
                        fields.insert(name.clone(), value);
                    }
                }
            }
            Value::Array(items) if !items.is_empty() && self.rng.random_ratio(2, 3) => {
                let at = self.rng.random_range(0..items.len());
                match self.rng.random_range(0..4) {
                    0 => drop(items.remove(at)),
                    1 => items.push(items[at].clone()),
                    2 => items[at] = self.value(),
                    _ => items.reverse(),
                }
            }
            Value::Number(_) if self.rng.random_ratio(2, 3) => *node = json!(self.number()),
            Value::String(text) if self.rng.random_ratio(1, 3) => *text += &self.word(),
            _ => {
                let inner = std::mem::take(node);
                *node = match self.rng.random_range(0..4) {
                    0 => json!([inner]),
                    1 => Value::Object(Map::from_iter([(self.word(), inner)])),
                    _ => self.value(),
                };
            }
        }
    }

    fn value(&mut self) -> Value {
        match self.rng.random_range(0..8) {
            0 => Value::Null,
            1 => json!(self.rng.random::<bool>()),
            2 => json!(self.number()),
            3 => json!(
                *[0.5, -0.0, 1e300, 5e-324, 1.7e308, 9_007_199_254_740_993.0].choose(self.rng).expect("not empty")
            ),
            4 => json!(self.word()),
            5 => json!([]),
            6 => json!({}),
            _ => {
                // A node of another input.
                let other = self.corpus.choose(self.rng).expect("a corpus is not empty");
                let other = other.choose(self.rng).expect("an input has parts");
                let Ok(mut document) = serde_json::from_slice::<Value>(other) else { return Value::Null };
                let mut place = self.rng.random_range(0..count(&document));
                nth(&mut document, &mut place).expect("the place was counted").take()
            }
        }
    }

    fn word(&mut self) -> String {
        let all = self.words.len() + TEXTS.len();
        match self.rng.random_range(0..all + all / 4) {
            n if n < self.words.len() => self.words[n].to_owned(),
            n if n < all => TEXTS[n - self.words.len()].to_owned(),
            _ => self.number().to_string(),
        }
    }

    fn number(&mut self) -> i64 {
        match self.rng.random_range(0..4) {
            0 => self.rng.random(),
            1 => self.rng.random_range(-1000..1000),
            _ => *NUMBERS.choose(self.rng).expect("not empty"),
        }
    }

    /// A range within a length, mostly a short one.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.rng.random_range(0..=length);
        let most = if self.rng.random_ratio(3, 4) { 8 } else { length };
        let end = start + self.rng.random_range(0..=most.min(length - start));
        start..end
    }
}

/// Number of nodes of a document.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// The node that is `place` steps further, in the order of the text.
fn nth<'a>(value: &'a mut Value, place: &mut usize) -> Option<&'a mut Value> {
    if *place == 0 {
        return Some(value);
    }
    *place -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, place)),
        Value::Object(fields) => fields.values_mut().find_map(|field| nth(field, place)),
        _ => None,
    }
}

/// Words, runs of white space, and signs one by one.
fn words(text: &str) -> Vec<String> {
    let kind = |c: char| {
        if c.is_alphanumeric() || c == '_' {
            1
        } else if c.is_whitespace() {
            2
        } else {
            0
        }
    };
    let mut words: Vec<String> = Vec::new();
    let mut last = 0;
    for c in text.chars() {
        match words.last_mut() {
            Some(word) if kind(c) == last && last != 0 => word.push(c),
            _ => words.push(c.to_string()),
        }
        last = kind(c);
    }
    words
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}
