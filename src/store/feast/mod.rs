//! Feast's Redis encoding: entity keys (serialisation version 3), hash fields, `feast.types.Value` and
//! `google.protobuf.Timestamp`. Pure bytes, checked against vectors made by Feast 0.67.
//!
//! One hash an entity. Its key names the join keys, their values and the project. Its fields are four bytes of hash a
//! feature, `_ts:<view>` a view, and driftline's own `_seq:<pipeline>`, which Feast ignores.

mod layout;
mod repository;

pub use layout::{EncodedRows, Layout};
pub use repository::python_repository;

use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint, encoded_len_varint, skip_field};

use super::Value;
use crate::config::plan::{Column, DataType, Element, Plan, WindowPlan};

/// View of the derived features, which belong to no feature group.
pub const DERIVED_VIEW: &str = "derived";

/// A Feast feature view: one feature group, or the derived features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Name: the group's.
    pub name: String,
    /// Features in the plan's order.
    pub columns: Vec<Column>,
    /// Longest window in milliseconds: how long a row means anything without another event. `None` where it always does.
    pub max_age_ms: Option<i64>,
}

/// The plan's views: one a group in the order of the file, then the derived features, if there are any.
pub fn views(plan: &Plan) -> Vec<View> {
    let mut views: Vec<View> = plan
        .groups
        .iter()
        .map(|group| View {
            name: group.name.clone(),
            columns: group.features.iter().map(|(_, _, column)| column.clone()).collect(),
            max_age_ms: longest(&group.windows),
        })
        .collect();
    // What is derived from another entity's features is as of the moment it was looked up, and not of this entity alone.
    let derived: Vec<Column> = plan.own_derived().map(|d| d.column.clone()).collect();
    if !derived.is_empty() {
        views.push(View {
            name: DERIVED_VIEW.to_owned(),
            columns: derived,
            max_age_ms: longest(plan.groups.iter().flat_map(|g| &g.windows)),
        });
    }
    views
}

/// Length of the longest window, in milliseconds; `None` where one is a lifetime.
fn longest<'a>(windows: impl IntoIterator<Item = &'a WindowPlan>) -> Option<i64> {
    windows.into_iter().try_fold(0, |longest, window| window.length_ms.map(|length| length.max(longest)))
}

/// Name of the hash field of a feature: murmur3 (x86, 32 bits, seed 0) of `view:feature`, little-endian.
pub fn field(view: &str, feature: &str) -> [u8; 4] {
    let name = format!("{view}:{feature}");
    murmur3::murmur3_32(&mut name.as_bytes(), 0).expect("reading from memory cannot fail").to_le_bytes()
}

/// Name of the hash field with a view's event time.
pub fn timestamp_field(view: &str) -> String {
    format!("_ts:{view}")
}

/// Two features that Feast's layout would put into one hash field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldCollision {
    /// View and feature that come first.
    pub first: (String, String),
    /// View and feature that would overwrite it.
    pub second: (String, String),
}

/// Finds features whose hash fields are the same, in any two views of one entity. One of each pair has to be renamed.
pub fn field_collisions(views: &[View]) -> Vec<FieldCollision> {
    let mut seen = std::collections::HashMap::new();
    let mut collisions = Vec::new();
    for view in views {
        for column in &view.columns {
            let name = (view.name.clone(), column.name.to_string());
            match seen.entry(field(&view.name, &column.name)) {
                std::collections::hash_map::Entry::Vacant(slot) => {
                    slot.insert(name);
                }
                std::collections::hash_map::Entry::Occupied(first) => {
                    collisions.push(FieldCollision { first: first.get().clone(), second: name });
                }
            }
        }
    }
    collisions
}

/// Type numbers of `feast.types.ValueType` that keys can have.
const KEY_STRING: u32 = 2;
const KEY_INT64: u32 = 4;

/// Appends the part of an entity key that all entities share: the sorted names of the join keys.
fn put_key_names<'a>(names: impl ExactSizeIterator<Item = &'a str>, out: &mut Vec<u8>) {
    out.extend_from_slice(&length(names.len()));
    for name in names {
        out.extend_from_slice(&KEY_STRING.to_le_bytes());
        out.extend_from_slice(&length(name.len()));
        out.extend_from_slice(name.as_bytes());
    }
}

/// Appends one string key value.
fn put_key_string(value: &str, out: &mut impl bytes::BufMut) {
    out.put_u32_le(KEY_STRING);
    out.put_slice(&length(value.len()));
    out.put_slice(value.as_bytes());
}

/// Appends one integer key value.
fn put_key_int64(value: i64, out: &mut impl bytes::BufMut) {
    out.put_u32_le(KEY_INT64);
    out.put_u32_le(8);
    out.put_i64_le(value);
}

fn length(length: usize) -> [u8; 4] {
    u32::try_from(length).expect("names and keys are far shorter than 4 GiB").to_le_bytes()
}

/// Tags of `feast.types.Value`.
mod tag {
    pub const BYTES: u32 = 1;
    pub const STRING: u32 = 2;
    pub const INT32: u32 = 3;
    pub const INT64: u32 = 4;
    pub const DOUBLE: u32 = 5;
    pub const FLOAT: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const UNIX_TIMESTAMP: u32 = 8;
    pub const NULL: u32 = 19;
    /// That of a list of values is the value's and this.
    pub const LIST: u32 = 10;
}

fn put_varint(tag: u32, value: u64, out: &mut impl bytes::BufMut) {
    encode_key(tag, WireType::Varint, out);
    encode_varint(value, out);
}

fn put_int64(value: i64, out: &mut impl bytes::BufMut) {
    put_varint(tag::INT64, value.cast_unsigned(), out);
}

fn put_bool(value: bool, out: &mut impl bytes::BufMut) {
    put_varint(tag::BOOL, u64::from(value), out);
}

fn put_unix_timestamp(milliseconds: i64, out: &mut impl bytes::BufMut) {
    put_varint(tag::UNIX_TIMESTAMP, seconds(milliseconds).cast_unsigned(), out);
}

/// Feast's timestamps are whole seconds: what is below is cut off, towards the past.
fn seconds(milliseconds: i64) -> i64 {
    milliseconds.div_euclid(1000)
}

fn put_double(value: f64, out: &mut impl bytes::BufMut) {
    encode_key(tag::DOUBLE, WireType::SixtyFourBit, out);
    out.put_f64_le(value);
}

fn put_string(value: &str, out: &mut impl bytes::BufMut) {
    encode_key(tag::STRING, WireType::LengthDelimited, out);
    encode_varint(value.len() as u64, out);
    out.put_slice(value.as_bytes());
}

/// Appends a list of values, which is a message of its own with one repeated field. `items` is what [`put_item`] wrote.
fn put_list(element: Element, items: &[u8], out: &mut impl bytes::BufMut) {
    let (tag, packed) = match element {
        Element::Int64 => (tag::INT64, true),
        Element::Float64 => (tag::DOUBLE, true),
        Element::Boolean => (tag::BOOL, true),
        Element::Timestamp => (tag::UNIX_TIMESTAMP, true),
        Element::String => (tag::STRING, false),
    };
    // Without values proto3 leaves the field out. Texts are a field each.
    let packed = packed && !items.is_empty();
    let head = if packed { 1 + encoded_len_varint(items.len() as u64) } else { 0 };
    encode_key(tag + tag::LIST, WireType::LengthDelimited, out);
    encode_varint((head + items.len()) as u64, out);
    if packed {
        encode_key(1, WireType::LengthDelimited, out);
        encode_varint(items.len() as u64, out);
    }
    out.put_slice(items);
}

/// One value of a list.
enum Item<'a> {
    /// An integer, a boolean, or seconds.
    Varint(i64),
    Double(f64),
    Text(&'a str),
}

fn put_item(item: Item<'_>, out: &mut impl bytes::BufMut) {
    match item {
        Item::Varint(value) => encode_varint(value.cast_unsigned(), out),
        Item::Double(value) => out.put_f64_le(value),
        Item::Text(text) => {
            encode_key(1, WireType::LengthDelimited, out);
            encode_varint(text.len() as u64, out);
            out.put_slice(text.as_bytes());
        }
    }
}

/// Reads a `feast.types.Value` as a feature of the type `expected`. Accepts what Feast itself may have pushed: 32-bit
/// integers and floats, integers for floats, and an unset value, which is null.
///
/// # Errors
/// In words, where the bytes are not such a message or hold a value of another type.
pub fn value(mut bytes: &[u8], expected: DataType) -> Result<Value, String> {
    let buf = &mut bytes;
    let mut value = Value::Null;
    while !buf.is_empty() {
        let (tag, wire) = decode_key(buf).map_err(|e| e.to_string())?;
        value = match (tag, wire) {
            (tag::NULL, WireType::Varint) => {
                varint(buf)?;
                Value::Null
            }
            (tag::BYTES..=tag::UNIX_TIMESTAMP, _) if !expected.is_list() => scalar_value(tag, wire, buf, expected)?,
            (_, WireType::LengthDelimited) if let DataType::List(element) = expected => {
                let length = usize::try_from(varint(buf)?).map_err(|_| "negative length".to_owned())?;
                list(tag, buf.split_off(..length).ok_or("the value ends early")?, element)?
            }
            _ => return Err(format!("value type {tag} where {expected} was expected")),
        };
    }
    Ok(value)
}

/// Reads a value that is no list, after its tag.
fn scalar_value(tag: u32, wire: WireType, buf: &mut &[u8], expected: DataType) -> Result<Value, String> {
    match (tag, wire) {
        // A 32-bit integer is sign-extended to ten bytes on the wire.
        (tag::INT64 | tag::INT32, WireType::Varint) => number(varint(buf)?, expected),
        (tag::BOOL, WireType::Varint) => typed(Value::Boolean(varint(buf)? != 0), DataType::Boolean, expected),
        (tag::UNIX_TIMESTAMP, WireType::Varint) => {
            let seconds = varint(buf)?;
            let ms = seconds.checked_mul(1000).ok_or_else(|| format!("timestamp {seconds} s is out of range"))?;
            typed(Value::Timestamp(ms), DataType::Timestamp, expected)
        }
        (tag::DOUBLE, WireType::SixtyFourBit) => {
            typed(Value::Float64(f64::from_le_bytes(fixed(buf)?)), DataType::Float64, expected)
        }
        (tag::FLOAT, WireType::ThirtyTwoBit) => {
            typed(Value::Float64(f32::from_le_bytes(fixed(buf)?).into()), DataType::Float64, expected)
        }
        (tag::STRING | tag::BYTES, WireType::LengthDelimited) => {
            let length = usize::try_from(varint(buf)?).map_err(|_| "negative length".to_owned())?;
            let text = buf.split_off(..length).ok_or("the value ends early")?;
            let text = std::str::from_utf8(text).map_err(|e| e.to_string())?;
            typed(Value::String(text.to_owned()), DataType::String, expected)
        }
        _ => Err(format!("value type {tag} where {expected} was expected")),
    }
}

/// Reads the message of a list.
fn list(tag: u32, mut bytes: &[u8], element: Element) -> Result<Value, String> {
    let expected = DataType::from(element);
    let scalar = tag.checked_sub(tag::LIST).filter(|scalar| (tag::BYTES..=tag::UNIX_TIMESTAMP).contains(scalar));
    let scalar = scalar.ok_or_else(|| format!("value type {tag} where a list was expected"))?;
    let wire = match scalar {
        tag::BYTES | tag::STRING => WireType::LengthDelimited,
        tag::DOUBLE => WireType::SixtyFourBit,
        tag::FLOAT => WireType::ThirtyTwoBit,
        _ => WireType::Varint,
    };
    let buf = &mut bytes;
    let mut items = Vec::new();
    while !buf.is_empty() {
        let (field, found) = decode_key(buf).map_err(|e| e.to_string())?;
        match (field, found) {
            (1, found) if found == wire => items.push(scalar_value(scalar, wire, buf, expected)?),
            // Numbers are packed, as a rule.
            (1, WireType::LengthDelimited) => {
                let length = usize::try_from(varint(buf)?).map_err(|_| "negative length".to_owned())?;
                let mut packed = buf.split_off(..length).ok_or("the list ends early")?;
                while !packed.is_empty() {
                    items.push(scalar_value(scalar, wire, &mut packed, expected)?);
                }
            }
            (field, found) => {
                skip_field(found, field, buf, prost::encoding::DecodeContext::default()).map_err(|e| e.to_string())?;
            }
        }
    }
    Ok(Value::List(items))
}

fn varint(buf: &mut &[u8]) -> Result<i64, String> {
    decode_varint(buf).map(u64::cast_signed).map_err(|e| e.to_string())
}

fn fixed<const N: usize>(buf: &mut &[u8]) -> Result<[u8; N], String> {
    buf.split_off(..N).and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| "the value ends early".to_owned())
}

fn number(value: i64, expected: DataType) -> Result<Value, String> {
    match expected {
        DataType::Float64 => Ok(Value::Float64(value as f64)),
        _ => typed(Value::Int64(value), DataType::Int64, expected),
    }
}

fn typed(value: Value, found: DataType, expected: DataType) -> Result<Value, String> {
    if found == expected { Ok(value) } else { Err(format!("{found} where {expected} was expected")) }
}

/// Appends an instant (milliseconds since 1970 UTC) as `google.protobuf.Timestamp`. Zeros are left out, as proto3 does.
pub fn put_timestamp(milliseconds: i64, out: &mut impl bytes::BufMut) {
    let (seconds, nanos) = (milliseconds.div_euclid(1000), milliseconds.rem_euclid(1000) * 1_000_000);
    if seconds != 0 {
        put_varint(1, seconds.cast_unsigned(), out);
    }
    if nanos != 0 {
        put_varint(2, nanos.cast_unsigned(), out);
    }
}

/// Reads a `google.protobuf.Timestamp` as milliseconds since 1970 UTC; finer parts are cut off, towards the past.
///
/// # Errors
/// In words, where the bytes are not such a message.
pub fn timestamp(mut bytes: &[u8]) -> Result<i64, String> {
    let buf = &mut bytes;
    let (mut seconds, mut nanos) = (0_i64, 0_i64);
    while !buf.is_empty() {
        match decode_key(buf).map_err(|e| e.to_string())? {
            (1, WireType::Varint) => seconds = varint(buf)?,
            (2, WireType::Varint) => nanos = varint(buf)?,
            (tag, wire) => {
                skip_field(wire, tag, buf, prost::encoding::DecodeContext::default()).map_err(|e| e.to_string())?;
            }
        }
    }
    seconds
        .checked_mul(1000)
        .and_then(|ms| ms.checked_add(nanos.div_euclid(1_000_000)))
        .ok_or_else(|| format!("{seconds} s is out of range"))
}

/// Bytes of [`put_version`].
pub const VERSION_BYTES: usize = 20;

/// Appends what decides which of two rows is newer: event time as seconds (i64) and nanoseconds (i32), then the sequence
/// (i64), all little-endian. Split, because Redis scripts compute in doubles, which hold whole numbers up to 2⁵³ only.
pub fn put_version(event_time_ms: i64, sequence: i64, out: &mut impl bytes::BufMut) {
    out.put_i64_le(event_time_ms.div_euclid(1000));
    let nanos = event_time_ms.rem_euclid(1000) * 1_000_000;
    out.put_i32_le(i32::try_from(nanos).expect("below 10⁹"));
    out.put_i64_le(sequence);
}

/// Appends to a version how often the definition that computed the row has changed (u32, little-endian): a row of a later
/// definition is newer whatever its event time. Nothing before the first change, so that rows from before there were
/// epochs are of epoch 0.
pub fn put_epoch(epoch: u32, out: &mut impl bytes::BufMut) {
    if epoch > 0 {
        out.put_u32_le(epoch);
    }
}

/// Reads what [`put_version`] wrote, in an order that compares as age does.
pub fn version(bytes: &[u8]) -> Option<(i64, i32, i64)> {
    let (seconds, rest) = bytes.split_first_chunk()?;
    let (nanos, rest) = rest.split_first_chunk()?;
    let sequence = rest.try_into().ok()?;
    Some((i64::from_le_bytes(*seconds), i32::from_le_bytes(*nanos), i64::from_le_bytes(sequence)))
}

#[cfg(test)]
mod tests;
