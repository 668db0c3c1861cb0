use apache_avro::Schema;
use apache_avro::types::Value as Oracle;
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::broker::registry::tests::StubRegistry;
use crate::config::plan::{DataType, TimeUnit};
use arrow::array::ArrayRef;
use arrow::util::display::array_value_to_string;

fn field(name: &str, data_type: DataType) -> Field {
    Field::new(&name.into(), data_type)
}

fn record(fields: &str) -> String {
    format!(r#"{{"type": "record", "name": "R", "fields": [{fields}]}}"#)
}

fn one(of: &str) -> String {
    record(&format!(r#"{{"name": "x", "type": {of}}}"#))
}

/// Decodes plain Avro of `writer` as `reader` says; the values as text, null as an empty one.
fn read(writer: &str, reader: &str, fields: &[Field], bytes: &[u8]) -> Result<Vec<String>, String> {
    let (writer, reader) = (AvroSchema::parse(writer).unwrap(), AvroSchema::parse(reader).unwrap());
    let wanted = Wanted::new(fields);
    let program = Program::compile(&writer, &reader, fields, &wanted).map_err(|error| error.reason)?;
    let mut rows = RowBuilder::new(fields.to_vec());
    rows.start();
    program.run(bytes, &mut rows).map_err(|broken| broken.what.to_owned())?;
    fitting(&rows, 0).map_err(|fault| fault.error)?;
    rows.commit();
    let (arrays, _) = rows.finish();
    Ok(arrays.iter().map(|array: &ArrayRef| array_value_to_string(array, 0).unwrap()).collect())
}

/// Writes `value` with the oracle, as `writer` says.
fn write(writer: &str, value: Oracle) -> Vec<u8> {
    apache_avro::to_avro_datum(&Schema::parse_str(writer).unwrap(), value).unwrap()
}

fn x(value: Oracle) -> Oracle {
    Oracle::Record(vec![("x".into(), value)])
}

#[rstest]
#[case::int_as_float(r#""int""#, r#""double""#, DataType::Float64, Oracle::Int(3), "3.0")]
#[case::int_as_long(r#""int""#, r#""long""#, DataType::Int64, Oracle::Int(-3), "-3")]
#[case::long_as_double(r#""long""#, r#""double""#, DataType::Float64, Oracle::Long(1 << 40), "1099511627776.0")]
#[case::float(r#""float""#, r#""double""#, DataType::Float64, Oracle::Float(0.5), "0.5")]
#[case::whole_double(r#""double""#, r#""long""#, DataType::Int64, Oracle::Double(4.0), "4")]
#[case::bytes_as_text(r#""bytes""#, r#""string""#, DataType::String, Oracle::Bytes(b"abc".to_vec()), "abc")]
#[case::boolean(r#""boolean""#, r#""boolean""#, DataType::Boolean, Oracle::Boolean(true), "true")]
#[case::optional(r#"["null", "long"]"#, r#""long""#, DataType::Int64, Oracle::Union(1, Box::new(Oracle::Long(5))), "5")]
#[case::null(
    r#"["long", "null"]"#,
    r#"["null", "long"]"#,
    DataType::Int64,
    Oracle::Union(1, Box::new(Oracle::Null)),
    ""
)]
#[case::wider_union(
    r#"["null", "int", "double"]"#,
    r#""double""#,
    DataType::Float64,
    Oracle::Union(1, Box::new(Oracle::Int(5))),
    "5.0"
)]
#[case::millis(
    r#"{"type": "long", "logicalType": "timestamp-millis"}"#,
    r#""long""#,
    DataType::Timestamp,
    Oracle::TimestampMillis(5),
    "1970-01-01T00:00:00.005Z"
)]
#[case::micros(
    r#"{"type": "long", "logicalType": "timestamp-micros"}"#,
    r#"{"type": "long", "logicalType": "timestamp-millis"}"#,
    DataType::Timestamp,
    Oracle::TimestampMicros(5_999),
    "1970-01-01T00:00:00.005Z"
)]
#[case::reader_decides(
    r#""long""#,
    r#"{"type": "long", "logicalType": "timestamp-micros"}"#,
    DataType::Timestamp,
    Oracle::Long(5_000),
    "1970-01-01T00:00:00.005Z"
)]
#[case::date(
    r#"{"type": "int", "logicalType": "date"}"#,
    r#"{"type": "int", "logicalType": "date"}"#,
    DataType::Timestamp,
    Oracle::Date(1),
    "1970-01-02T00:00:00Z"
)]
#[case::days(r#"{"type": "int", "logicalType": "date"}"#, r#""int""#, DataType::Int64, Oracle::Date(-1), "-1")]
#[case::plain_instant(r#""long""#, r#""long""#, DataType::Timestamp, Oracle::Long(5), "1970-01-01T00:00:00.005Z")]
#[case::iso(r#""string""#, r#""string""#, DataType::Timestamp, Oracle::String("1970-01-02".into()), "1970-01-02T00:00:00Z")]
#[case::symbol(r#"{"type": "enum", "name": "E", "symbols": ["a", "b"]}"#, r#""string""#, DataType::String, Oracle::Enum(1, "b".into()), "b")]
#[case::known_symbol(r#"{"type": "enum", "name": "E", "symbols": ["a", "b"]}"#, r#"{"type": "enum", "name": "E", "symbols": ["b"]}"#, DataType::String, Oracle::Enum(1, "b".into()), "b")]
#[case::default_symbol(r#"{"type": "enum", "name": "E", "symbols": ["a", "b"]}"#, r#"{"type": "enum", "name": "E", "symbols": ["b", "other"], "default": "other"}"#, DataType::String, Oracle::Enum(0, "a".into()), "other")]
fn resolves(
    #[case] writer: &str,
    #[case] reader: &str,
    #[case] data_type: DataType,
    #[case] value: Oracle,
    #[case] expected: &str,
) {
    let bytes = write(&one(writer), x(value));
    assert_eq!(read(&one(writer), &one(reader), &[field("x", data_type)], &bytes), Ok(vec![expected.to_owned()]));
}

#[rstest]
#[case::unknown_symbol(r#"{"type": "enum", "name": "E", "symbols": ["a", "b"]}"#, r#"{"type": "enum", "name": "E", "symbols": ["b"]}"#, DataType::String, &[0], "symbol \"a\"")]
#[case::symbol_out_of_range(r#"{"type": "enum", "name": "E", "symbols": ["a", "b"]}"#, r#""string""#, DataType::String, &[4], "no such symbol")]
#[case::branch_out_of_range(r#"["null", "long"]"#, r#"["null", "long"]"#, DataType::Int64, &[4, 0], "no such branch")]
#[case::negative_branch(r#"["null", "long"]"#, r#"["null", "long"]"#, DataType::Int64, &[1, 0], "no such branch")]
#[case::odd_branch(r#"["long", "string"]"#, r#""long""#, DataType::Int64, &[2, 0], "found a value of type string")]
#[case::fraction(r#""double""#, r#""long""#, DataType::Int64, &[0, 0, 0, 0, 0, 0, 0xe0, 0x3f], "it has a fraction")]
#[case::wrong_type(r#""string""#, r#""long""#, DataType::Int64, &[0], "expected int64, but the writer's type is string")]
#[case::text_for_numbers(r#""boolean""#, r#""long""#, DataType::Int64, &[0], "expected int64, but the writer's type is boolean")]
#[case::array(r#"{"type": "array", "items": "long"}"#, r#""long""#, DataType::Int64, &[0], "the writer's type is array")]
#[case::not_utf8(r#""string""#, r#""string""#, DataType::String, &[2, 0xff], "not UTF-8")]
#[case::negative_length(r#""string""#, r#""string""#, DataType::String, &[1], "length is negative")]
#[case::endless_length(r#""string""#, r#""string""#, DataType::String, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], "cut short")]
#[case::odd_boolean(r#""boolean""#, r#""boolean""#, DataType::Boolean, &[2], "neither 0 nor 1")]
#[case::int_too_long(r#""int""#, r#""int""#, DataType::Int64, &[0x80, 0x80, 0x80, 0x80, 0x10], "more than 32 bits")]
fn refuses(
    #[case] writer: &str,
    #[case] reader: &str,
    #[case] data_type: DataType,
    #[case] bytes: &[u8],
    #[case] expected: &str,
) {
    let error = read(&one(writer), &one(reader), &[field("x", data_type)], bytes).unwrap_err();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn finds_fields_by_alias_and_default() {
    let writer =
        record(r#"{"name": "old", "type": "long"}, {"name": "unused", "type": {"type": "map", "values": "int"}}"#);
    let reader = record(
        r#"{"name": "new", "aliases": ["older", "old"], "type": "long"},
           {"name": "number", "type": "long", "default": 7},
           {"name": "ratio", "type": "double", "default": 1},
           {"name": "text", "type": ["string", "null"], "default": "none"},
           {"name": "nothing", "type": ["null", "string"], "default": null},
           {"name": "flag", "type": "boolean", "default": true},
           {"name": "day", "type": {"type": "int", "logicalType": "date"}, "default": 1},
           {"name": "micros", "type": {"type": "long", "logicalType": "timestamp-micros"}, "default": 5000},
           {"name": "inner", "type": {"type": "record", "name": "I", "fields": [
               {"name": "a", "type": "long"}, {"name": "b", "type": "long", "default": 9}]}, "default": {"a": 8}}"#,
    );
    let fields = [
        field("number", DataType::Int64),
        field("new", DataType::Int64),
        field("ratio", DataType::Float64),
        field("text", DataType::String),
        field("nothing", DataType::String),
        field("flag", DataType::Boolean),
        field("day", DataType::Timestamp),
        field("micros", DataType::Timestamp),
        field("inner.a", DataType::Int64),
        field("inner.b", DataType::Int64),
    ];
    let value = Oracle::Record(vec![
        ("old".into(), Oracle::Long(3)),
        ("unused".into(), Oracle::Map([("k".to_owned(), Oracle::Int(1))].into_iter().collect())),
    ]);
    let found = read(&writer, &reader, &fields, &write(&writer, value)).unwrap();
    let expected = ["7", "3", "1.0", "none", "", "true", "1970-01-02T00:00:00Z", "1970-01-01T00:00:00.005Z", "8", "9"];
    assert_eq!(found, expected);
}

#[test]
fn a_missing_field_without_default_is_incompatible() {
    let error =
        read(&one(r#""long""#), &record(r#"{"name": "y", "type": "long"}"#), &[field("y", DataType::Int64)], &[]);
    assert!(error.unwrap_err().contains("gives no default"));
}

#[test]
fn reads_nested_records() {
    let schema = record(
        r#"{"name": "before", "type": {"type": "array", "items": {"type": "record", "name": "Item", "fields": [
               {"name": "sku", "type": "string"}, {"name": "next", "type": ["null", "Item"]}]}}},
           {"name": "who", "type": ["null", {"type": "record", "name": "Who", "fields": [
               {"name": "id", "type": "string"}, {"name": "age", "type": ["null", "int"]}]}]},
           {"name": "hash", "type": {"type": "fixed", "name": "Hash", "size": 3}},
           {"name": "after", "type": "long"}"#,
    );
    let fields =
        [field("after", DataType::Int64), field("who.age", DataType::Int64), field("who.id", DataType::String)];
    let item = |next: Option<Oracle>| {
        let next = next.map_or(Oracle::Union(0, Box::new(Oracle::Null)), |next| Oracle::Union(1, Box::new(next)));
        Oracle::Record(vec![("sku".into(), Oracle::String("s".into())), ("next".into(), next)])
    };
    let whole = |who: Oracle| {
        Oracle::Record(vec![
            ("before".into(), Oracle::Array(vec![item(Some(item(None))), item(None)])),
            ("who".into(), who),
            ("hash".into(), Oracle::Fixed(3, vec![1, 2, 3])),
            ("after".into(), Oracle::Long(11)),
        ])
    };
    let who = Oracle::Record(vec![
        ("id".into(), Oracle::String("c".into())),
        ("age".into(), Oracle::Union(1, Box::new(Oracle::Int(30)))),
    ]);
    let bytes = write(&schema, whole(Oracle::Union(1, Box::new(who))));
    assert_eq!(read(&schema, &schema, &fields, &bytes).unwrap(), ["11", "30", "c"]);
    let bytes = write(&schema, whole(Oracle::Union(0, Box::new(Oracle::Null))));
    assert_eq!(read(&schema, &schema, &fields, &bytes).unwrap(), ["11", "", ""]);
}

#[test]
fn skips_sized_blocks_and_hostile_counts() {
    let schema = record(
        r#"{"name": "a", "type": {"type": "array", "items": "long"}}, {"name": "n", "type": {"type": "array", "items": "null"}},
           {"name": "x", "type": "long"}"#,
    );
    let fields = [field("x", DataType::Int64)];
    // Two longs in a block of a negative count and its size, then 2^62 nulls, which take no bytes.
    let mut bytes = vec![3, 4, 2, 4, 0];
    cursor::write_long(1 << 62, &mut bytes);
    bytes.extend([0, 10]);
    assert_eq!(read(&schema, &schema, &fields, &bytes).unwrap(), ["5"]);
    let mut hostile = Vec::new();
    cursor::write_long(i64::MAX, &mut hostile);
    hostile.extend([2, 2]);
    assert_eq!(read(&schema, &schema, &fields, &hostile), Err("the record is cut short".into()));
    assert_eq!(read(&schema, &schema, &fields, &[3, 3]), Err("a block has a negative size".into()));
    for size in [1, 3] {
        let wrong = [3, 2 * size, 2, 4, 0, 0, 10];
        let refused = Err("a block is not as long as it says".into());
        assert_eq!(read(&schema, &schema, &fields, &wrong), refused, "{size}");
    }
}

#[test]
fn bounds_recursion() {
    let schema = record(r#"{"name": "next", "type": ["null", "R"]}, {"name": "x", "type": "long"}"#);
    let fields = [field("x", DataType::Int64)];
    let nested = |depth: usize| [vec![2; depth], vec![0], vec![10; depth + 1]].concat();
    assert_eq!(read(&schema, &schema, &fields, &nested(50)).unwrap(), ["5"]);
    assert!(read(&schema, &schema, &fields, &nested(1_000_000)).unwrap_err().contains("nested more than"));
}

#[rstest]
#[case("12.34", "bytes", "12.34")]
#[case("-0.01", "bytes", "-0.01")]
#[case("0", "bytes", "0.0")]
#[case("1.28", "bytes", "1.28")]
#[case("-1.28", "bytes", "-1.28")]
#[case("123456789012345678901234.56", "bytes", "1.2345678901234569e23")]
#[case("-99.99", "fixed", "-99.99")]
fn reads_decimals(#[case] text: &str, #[case] kind: &str, #[case] expected: &str) {
    let of = match kind {
        "bytes" => r#"{"type": "bytes", "logicalType": "decimal", "precision": 30, "scale": 2}"#,
        _ => {
            r#"{"type": {"type": "fixed", "name": "D", "size": 20, "logicalType": "decimal", "precision": 30, "scale": 2}}"#
        }
    };
    let schema = one(of);
    let bytes = AvroEncoder::plain(AvroSchema::parse(&schema).unwrap()).to_vec(&json!({ "x": text })).unwrap();
    assert_eq!(read(&schema, &schema, &[field("x", DataType::Float64)], &bytes).unwrap(), [expected]);
}

#[rstest]
#[case(json!({"x": 3}), r#""long""#, Oracle::Long(3))]
#[case(json!({"x": 3.0}), r#""long""#, Oracle::Long(3))]
#[case(json!({"x": -3}), r#""int""#, Oracle::Int(-3))]
#[case(json!({"x": 3}), r#""double""#, Oracle::Double(3.0))]
#[case(json!({"x": 0.5}), r#""float""#, Oracle::Float(0.5))]
#[case(json!({"x": "é"}), r#""string""#, Oracle::String("é".into()))]
#[case(json!({"x": null}), r#"["null", "long"]"#, Oracle::Union(0, Box::new(Oracle::Null)))]
#[case(json!({}), r#"["null", "long"]"#, Oracle::Union(0, Box::new(Oracle::Null)))]
#[case(json!({"x": 3}), r#"["null", "long"]"#, Oracle::Union(1, Box::new(Oracle::Long(3))))]
#[case(json!({"x": {"long": 3}}), r#"["null", "long"]"#, Oracle::Union(1, Box::new(Oracle::Long(3))))]
#[case(json!({"x": 2.5}), r#"["null", "long", "string", "double"]"#, Oracle::Union(3, Box::new(Oracle::Double(2.5))))]
#[case(json!({"x": "1970-01-02"}), r#"{"type": "long", "logicalType": "timestamp-millis"}"#, Oracle::TimestampMillis(86_400_000))]
#[case(json!({"x": "1970-01-02T00:00:00.5Z"}), r#"{"type": "long", "logicalType": "timestamp-micros"}"#, Oracle::TimestampMicros(86_400_500_000))]
#[case(json!({"x": "1970-01-02T23:00:00Z"}), r#"{"type": "int", "logicalType": "date"}"#, Oracle::Date(1))]
#[case(json!({"x": "b"}), r#"{"type": "enum", "name": "E", "symbols": ["a", "b"]}"#, Oracle::Enum(1, "b".into()))]
#[case(json!({"x": [1, 2]}), r#"{"type": "array", "items": "long"}"#, Oracle::Array(vec![Oracle::Long(1), Oracle::Long(2)]))]
#[case(json!({"x": []}), r#"{"type": "array", "items": "long"}"#, Oracle::Array(vec![]))]
#[case(json!({"x": {"k": true}}), r#"{"type": "map", "values": "boolean"}"#, Oracle::Map([("k".to_owned(), Oracle::Boolean(true))].into_iter().collect()))]
#[case(json!({"x": "abc"}), r#"{"type": "fixed", "name": "F", "size": 3}"#, Oracle::Fixed(3, b"abc".to_vec()))]
fn writes_what_the_oracle_reads(#[case] value: Value, #[case] of: &str, #[case] expected: Oracle) {
    let schema = one(of);
    let bytes = AvroEncoder::plain(AvroSchema::parse(&schema).unwrap()).to_vec(&value).unwrap();
    let parsed = Schema::parse_str(&schema).unwrap();
    assert_eq!(apache_avro::from_avro_datum(&parsed, &mut &bytes[..], None).unwrap(), x(expected));
}

#[rstest]
#[case(json!({"x": 3.5}), r#""long""#, "field 'x': expected long, found 3.5")]
#[case(json!({"x": 3_000_000_000u64}), r#""int""#, "does not fit 32 bits")]
#[case(json!({"x": "3"}), r#"["null", "double"]"#, "field 'x': expected double, found text \"3\"")]
#[case(json!({"x": "c"}), r#"{"type": "enum", "name": "E", "symbols": ["a", "b"]}"#, "not one of the symbols a, b")]
#[case(json!({}), r#""long""#, "field 'x': missing, and the schema has no default")]
#[case(json!({"x": 1, "y": 2}), r#""long""#, "has no field 'y'")]
#[case(json!([1]), r#""long""#, "expected record R, found an array")]
#[case(json!({"x": {"i": 1}}), r#"{"type": "record", "name": "I", "fields": [{"name": "i", "type": "string"}]}"#, "field 'x.i': expected string, found 1")]
#[case(json!({"x": true}), r#"["int", "string"]"#, "expected int or string, found true")]
#[case(json!({"x": "1.234"}), r#"{"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}"#, "expected decimal")]
fn says_why_it_cannot_write(#[case] value: Value, #[case] of: &str, #[case] expected: &str) {
    let encoder = AvroEncoder::plain(AvroSchema::parse(&one(of)).unwrap());
    let mut out = b"before".to_vec();
    let error = encoder.encode(&value, &mut out).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    assert_eq!(out, b"before");
}

/// Decodes one value of `{x: string, y: long}` records against a registry.
struct Framing {
    stub: StubRegistry,
    decoder: AvroDecoder,
}

const PAIR: &str =
    r#"{"type": "record", "name": "R", "fields": [{"name": "x", "type": "string"}, {"name": "y", "type": "long"}]}"#;

impl Framing {
    fn new() -> Self {
        let stub = StubRegistry::start();
        let fields = vec![field("x", DataType::String), field("y", DataType::Int64)];
        let decoder = AvroDecoder::new(AvroSchema::parse(PAIR).unwrap(), fields, Some(stub.client())).unwrap();
        Self { stub, decoder }
    }

    fn read(&mut self, bytes: &[u8]) -> Result<Vec<String>, (&'static str, String)> {
        let mut rows = RowBuilder::new(self.decoder.fields.clone());
        rows.start();
        match self.decoder.decode(bytes, &mut rows) {
            Ok(()) => {}
            Err(DecodeError::Record(fault)) => return Err((fault.reason, fault.error)),
            Err(DecodeError::Registry(error)) => return Err(("away", error.to_string())),
        }
        rows.commit();
        Ok(rows.finish().0.iter().map(|array| array_value_to_string(array, 0).unwrap()).collect())
    }

    fn framed(id: u32, schema: &str, value: &Value) -> Vec<u8> {
        AvroEncoder::framed(AvroSchema::parse(schema).unwrap(), id).to_vec(value).unwrap()
    }
}

#[test]
fn tells_framed_and_plain_records_apart() {
    let mut framing = Framing::new();
    let older =
        r#"{"type": "record", "name": "R", "fields": [{"name": "y", "type": "int"}, {"name": "x", "type": "string"}]}"#;
    framing.stub.put(1, PAIR);
    framing.stub.put(2, older);
    let value = json!({"x": "a", "y": 5});
    let plain = AvroEncoder::plain(AvroSchema::parse(PAIR).unwrap());
    for _ in 0..3 {
        assert_eq!(framing.read(&Framing::framed(1, PAIR, &value)).unwrap(), ["a", "5"]);
        assert_eq!(framing.read(&Framing::framed(2, older, &value)).unwrap(), ["a", "5"]);
        assert_eq!(framing.read(&plain.to_vec(&value).unwrap()).unwrap(), ["a", "5"]);
        // An empty text makes a plain record start with a zero byte. Short ones cannot be framed at all.
        assert_eq!(framing.read(&plain.to_vec(&json!({"x": "", "y": 5})).unwrap()).unwrap(), ["", "5"]);
        // Its next four bytes are an id that the registry does not know …
        let long = plain.to_vec(&json!({"x": "", "y": i64::MAX})).unwrap();
        assert!(long.len() > FRAME);
        assert_eq!(framing.read(&long).unwrap(), ["", "9223372036854775807"]);
    }
    assert_eq!(framing.stub.asked(), 3);
}

#[test]
fn a_plain_record_that_looks_framed_is_read_by_what_fits() {
    // A plain record of two empty texts and a long starts like a frame of id 1.
    let schema = r#"{"type": "record", "name": "R", "fields": [{"name": "a", "type": "string"}, {"name": "b", "type": "string"},
        {"name": "c", "type": "string"}, {"name": "d", "type": "string"}, {"name": "y", "type": "long"}]}"#;
    let stub = StubRegistry::start();
    stub.put(1, PAIR);
    let fields = vec![field("y", DataType::Int64)];
    let mut decoder =
        AvroDecoder::new(AvroSchema::parse(schema).unwrap(), fields.clone(), Some(stub.client())).unwrap();
    let mut rows = RowBuilder::new(fields);
    rows.start();
    assert!(decoder.decode(&[0, 0, 0, 0, 1], &mut rows).is_ok(), "the frame's rest is empty, so it is plain");
}

#[test]
fn says_what_is_wrong_with_a_framed_record() {
    let mut framing = Framing::new();
    framing.stub.put(1, PAIR);
    framing.stub.put_answer(3, json!({"schema": "syntax = \"proto3\";", "schemaType": "PROTOBUF"}));
    framing.stub.put(4, r#"{"type": "record", "name": "R", "fields": [{"name": "x", "type": "string"}]}"#);
    framing.stub.put(5, r#"{"type": "record"}"#);
    framing.stub.put(6, r#""string""#);
    let value = json!({"x": "abc", "y": 5});
    let good = Framing::framed(1, PAIR, &value);

    let (reason, error) = framing.read(&good[..good.len() - 1]).unwrap_err();
    assert_eq!(reason, "malformed");
    assert!(error.contains("id 1 in the registry") && error.contains("cut short at byte 9"), "{error}");
    for (id, reason, expected) in [
        (9, "unknown_schema", "schema id 9, which the registry"),
        (3, "unknown_schema", "of type PROTOBUF"),
        (4, "incompatible_schema", "field 'y'"),
        (5, "unknown_schema", "\"name\" is missing"),
        (6, "incompatible_schema", "only a record has fields"),
    ] {
        let (found, error) = framing.read(&Framing::framed(id, PAIR, &value)).unwrap_err();
        assert_eq!(found, reason, "{error}");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_record_waits_for_a_schema_that_is_registered_behind_it() {
    let mut framing = Framing::new();
    framing.stub.put_later(1, PAIR, 3);
    let value = json!({"x": "abc", "y": 5});
    assert_eq!(framing.read(&Framing::framed(1, PAIR, &value)).unwrap(), ["abc", "5"]);
    assert_eq!(framing.stub.asked(), 3);
}

#[test]
fn an_absent_registry_holds_only_what_needs_it() {
    let mut framing = Framing::new();
    framing.stub.put(1, PAIR);
    framing.stub.set_away(true);
    let value = json!({"x": "abc", "y": 5});
    assert_eq!(framing.read(&Framing::framed(1, PAIR, &value)).unwrap_err().0, "away");
    let plain = AvroEncoder::plain(AvroSchema::parse(PAIR).unwrap());
    assert_eq!(framing.read(&plain.to_vec(&value).unwrap()).unwrap(), ["abc", "5"]);
    framing.stub.set_away(false);
    assert_eq!(framing.read(&Framing::framed(1, PAIR, &value)).unwrap(), ["abc", "5"]);
}

#[test]
fn advises_a_registry_where_frames_come_without_one() {
    let fields = vec![field("x", DataType::String), field("y", DataType::Int64)];
    let mut decoder = AvroDecoder::new(AvroSchema::parse(PAIR).unwrap(), fields.clone(), None).unwrap();
    let mut rows = RowBuilder::new(fields);
    rows.start();
    let framed = Framing::framed(7, PAIR, &json!({"x": "abc", "y": 5}));
    let Err(DecodeError::Record(fault)) = decoder.decode(&framed, &mut rows) else { panic!("it is not plain") };
    assert!(fault.error.contains("schema id (7), set [broker] schema_registry"), "{}", fault.error);
}

const WIDE: &str = r#"{"type": "record", "name": "R", "fields": [
    {"name": "flag", "type": "boolean"},
    {"name": "list", "type": {"type": "array", "items": ["null", "string", "double"]}},
    {"name": "number", "type": ["null", "long"]},
    {"name": "map", "type": {"type": "map", "values": {"type": "array", "items": "int"}}},
    {"name": "ratio", "type": "double"},
    {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["a", "b", "c"]}},
    {"name": "hash", "type": {"type": "fixed", "name": "Hash", "size": 4}},
    {"name": "inner", "type": ["null", {"type": "record", "name": "Inner", "fields": [
        {"name": "small", "type": "float"}, {"name": "text", "type": "string"}]}]},
    {"name": "raw", "type": "bytes"},
    {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}}
]}"#;

fn wide_fields() -> Vec<Field> {
    vec![
        field("at", DataType::Timestamp),
        field("inner.text", DataType::String),
        field("number", DataType::Int64),
        field("ratio", DataType::Float64),
        field("kind", DataType::String),
        field("flag", DataType::Boolean),
    ]
}

fn any_wide() -> impl Strategy<Value = Oracle> {
    let item = prop_oneof![
        Just(Oracle::Union(0, Box::new(Oracle::Null))),
        "\\PC{0,5}".prop_map(|text| Oracle::Union(1, Box::new(Oracle::String(text)))),
        (-1e9..1e9f64).prop_map(|number| Oracle::Union(2, Box::new(Oracle::Double(number)))),
    ];
    let number = prop::option::of(any::<i64>()).prop_map(|n| {
        n.map_or(Oracle::Union(0, Box::new(Oracle::Null)), |n| Oracle::Union(1, Box::new(Oracle::Long(n))))
    });
    let inner = prop::option::of((-1e9..1e9f32, "\\PC{0,9}")).prop_map(|inner| match inner {
        None => Oracle::Union(0, Box::new(Oracle::Null)),
        Some((small, text)) => Oracle::Union(
            1,
            Box::new(Oracle::Record(vec![
                ("small".into(), Oracle::Float(small)),
                ("text".into(), Oracle::String(text)),
            ])),
        ),
    });
    let ints = prop::collection::vec(any::<i32>().prop_map(Oracle::Int), 0..3).prop_map(Oracle::Array);
    (
        any::<bool>(),
        prop::collection::vec(item, 0..4),
        number,
        prop::collection::hash_map("[a-z]{1,3}", ints, 0..3),
        -1e9..1e9f64,
        0u32..3,
        any::<[u8; 4]>(),
        inner,
        prop::collection::vec(any::<u8>(), 0..9),
        -1_000_000_000_000i64..4_000_000_000_000,
    )
        .prop_map(|(flag, list, number, map, ratio, kind, hash, inner, raw, at)| {
            Oracle::Record(vec![
                ("flag".into(), Oracle::Boolean(flag)),
                ("list".into(), Oracle::Array(list)),
                ("number".into(), number),
                ("map".into(), Oracle::Map(map)),
                ("ratio".into(), Oracle::Double(ratio)),
                ("kind".into(), Oracle::Enum(kind, ["a", "b", "c"][kind as usize].into())),
                ("hash".into(), Oracle::Fixed(4, hash.to_vec())),
                ("inner".into(), inner),
                ("raw".into(), Oracle::Bytes(raw)),
                ("at".into(), Oracle::TimestampMillis(at)),
            ])
        })
}

/// What the columns of [`wide_fields`] should hold.
fn expected(value: &Oracle) -> Vec<String> {
    let Oracle::Record(fields) = value else { panic!("a record") };
    let get = |name: &str| match &fields.iter().find(|(key, _)| key == name).unwrap().1 {
        Oracle::Union(_, inner) => (**inner).clone(),
        other => other.clone(),
    };
    let show = |value: Oracle| match value {
        Oracle::Null => String::new(),
        Oracle::String(text) | Oracle::Enum(_, text) => text,
        Oracle::Long(number) => number.to_string(),
        Oracle::Boolean(flag) => flag.to_string(),
        other => panic!("unexpected {other:?}"),
    };
    let text = match get("inner") {
        Oracle::Record(fields) => show(fields[1].1.clone()),
        _ => String::new(),
    };
    let Oracle::TimestampMillis(at) = get("at") else { panic!("an instant") };
    let Oracle::Double(ratio) = get("ratio") else { panic!("a double") };
    let at = arrow::array::TimestampMillisecondArray::from(vec![at]).with_timezone("UTC");
    let ratio = arrow::array::Float64Array::from(vec![ratio]);
    vec![
        array_value_to_string(&at, 0).unwrap(),
        text,
        show(get("number")),
        array_value_to_string(&ratio, 0).unwrap(),
        show(get("kind")),
        show(get("flag")),
    ]
}

proptest! {
    #[test]
    fn reads_what_the_oracle_writes(value in any_wide()) {
        let bytes = write(WIDE, value.clone());
        prop_assert_eq!(read(WIDE, WIDE, &wide_fields(), &bytes), Ok(expected(&value)));
    }

    #[test]
    fn refuses_every_truncation(value in any_wide(), cut in 0usize..400) {
        let bytes = write(WIDE, value);
        let cut = cut % bytes.len();
        prop_assert!(read(WIDE, WIDE, &wide_fields(), &bytes[..cut]).is_err());
    }

    #[test]
    fn refuses_no_bytes_that_the_oracle_takes(value in any_wide(), at in 0usize..400, byte: u8) {
        let mut bytes = write(WIDE, value);
        let at = at % bytes.len();
        bytes[at] = byte;
        let schema = Schema::parse_str(WIDE).unwrap();
        // A changed length may ask the oracle for gigabytes.
        apache_avro::util::max_allocation_bytes(1 << 20);
        let mut rest = &bytes[..];
        let oracle = apache_avro::from_avro_datum(&schema, &mut rest, None);
        let found = read(WIDE, WIDE, &wide_fields(), &bytes);
        if let Ok(value) = oracle && rest.is_empty() {
            let nonfinite = expected(&value)[3].parse::<f64>().is_ok_and(|ratio| !ratio.is_finite());
            // The oracle drops the bits of a number beyond the 64th, and does not look at the sizes of blocks.
            let stricter = ["more than 64 bits", "a block has a negative size", "a block is not as long as it says"];
            let refused = found.as_ref().is_err_and(|why| stricter.iter().any(|what| why.contains(what)));
            if !nonfinite && !refused {
                prop_assert_eq!(found, Ok(expected(&value)));
            }
        }
    }

    #[test]
    fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        let _ = read(WIDE, WIDE, &wide_fields(), &bytes);
        let _ = read_whole(WIDE, &bytes);
    }

    #[test]
    fn reads_whole_records_as_the_oracle_wrote_them(value in any_wide()) {
        let bytes = write(WIDE, value.clone());
        let found = read_whole(WIDE, &bytes).unwrap();
        prop_assert_eq!(serde_json::to_value(&found).unwrap(), as_json(&value));
        for end in 0..bytes.len() {
            prop_assert!(read_whole(WIDE, &bytes[..end]).is_err());
        }
        prop_assert!(read_whole(WIDE, &[&bytes[..], b"x"].concat()).is_err());
    }
}

fn read_whole(schema: &str, bytes: &[u8]) -> Result<AvroValue, String> {
    AvroReader::new(None, Some(AvroSchema::parse(schema).unwrap())).read(bytes).expect("there is a schema")
}

/// JSON of what the oracle wrote. Bytes that are no text are base64.
fn as_json(value: &Oracle) -> Value {
    let bytes = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!({"base64": base64::Engine::encode(&base64::prelude::BASE64_STANDARD, bytes)}),
    };
    match value {
        Oracle::Null => Value::Null,
        Oracle::Boolean(flag) => json!(flag),
        Oracle::Int(number) => json!(number),
        Oracle::Long(number) | Oracle::TimestampMillis(number) => json!(number),
        Oracle::Float(number) => json!(number.to_string().parse::<f64>().unwrap()),
        Oracle::Double(number) => json!(number),
        Oracle::String(text) | Oracle::Enum(_, text) => json!(text),
        Oracle::Bytes(raw) | Oracle::Fixed(_, raw) => bytes(raw),
        Oracle::Union(_, inner) => as_json(inner),
        Oracle::Array(items) => items.iter().map(as_json).collect(),
        Oracle::Map(items) => items.iter().map(|(key, item)| (key.clone(), as_json(item))).collect(),
        Oracle::Record(fields) => fields.iter().map(|(name, item)| (name.clone(), as_json(item))).collect(),
        other => panic!("unexpected {other:?}"),
    }
}

#[rstest]
#[case(r#"{"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}"#, json!("12.50"))]
#[case(r#"{"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}"#, json!("-0.05"))]
#[case(r#"{"type": "fixed", "name": "F", "size": 20, "logicalType": "decimal", "precision": 9, "scale": 3}"#, json!("-1.000"))]
#[case(r#"{"type": "bytes", "logicalType": "decimal", "precision": 38}"#, json!("-99999999999999999999999999999999999999"))]
#[case(r#"{"type": "array", "items": "long"}"#, json!([1, -2]))]
#[case(r#"["null", {"type": "map", "values": "boolean"}]"#, json!({"a": true}))]
fn what_is_written_from_json_is_read_as_json(#[case] of: &str, #[case] value: Value) {
    let schema = one(of);
    let written = AvroEncoder::plain(AvroSchema::parse(&schema).unwrap()).to_vec(&json!({"x": value})).unwrap();
    let found = read_whole(&schema, &written).unwrap();
    assert_eq!(serde_json::to_value(&found).unwrap(), json!({"x": value}));
}

#[test]
fn whole_records_keep_the_order_of_their_fields_and_odd_floats() {
    let schema = r#"{"type": "record", "name": "R", "fields": [{"name": "z", "type": "float"}, {"name": "a", "type": "double"}]}"#;
    let bytes = [&0.1f32.to_le_bytes()[..], &f64::NAN.to_le_bytes()].concat();
    let found = read_whole(schema, &bytes).unwrap();
    assert_eq!(serde_json::to_string(&found).unwrap(), r#"{"z":0.1,"a":"NaN"}"#);
}

#[test]
fn a_record_that_asks_for_billions_of_values_is_refused() {
    let schema = one(r#"{"type": "array", "items": "null"}"#);
    // A block of 2^40 nulls, which take no bytes.
    let mut bytes = Vec::new();
    super::cursor::write_long(1 << 40, &mut bytes);
    bytes.push(0);
    assert!(read_whole(&schema, &bytes).unwrap_err().contains("more than a million values"));
    let endless = r#"{"type": "record", "name": "R", "fields": [{"name": "x", "type": ["null", "R"]}]}"#;
    assert!(read_whole(endless, &[2; 10_000]).unwrap_err().contains("nested too deeply"));
}

#[test]
fn framed_records_are_read_with_their_own_schema_or_say_why_not() {
    let stub = StubRegistry::start();
    stub.put(1, PAIR);
    stub.put_answer(3, json!({"schema": "syntax = \"proto3\";", "schemaType": "PROTOBUF"}));
    let value = json!({"x": "abc", "y": 5});
    let framed = Framing::framed(1, PAIR, &value);
    let mut reader = AvroReader::new(Some(stub.client()), None);
    assert_eq!(serde_json::to_value(reader.read(&framed).unwrap().unwrap()).unwrap(), value);
    assert_eq!(reader.read(b"{\"x\": 1}"), None, "nothing says that it is Avro");
    let mut refused = |bytes: &[u8]| reader.read(bytes).unwrap().unwrap_err();
    assert!(refused(&framed[..framed.len() - 1]).contains("cut short at byte 9"));
    assert!(refused(&Framing::framed(9, PAIR, &value)).contains("does not know schema id 9"));
    assert!(refused(&Framing::framed(3, PAIR, &value)).contains("of type PROTOBUF"));
    stub.set_away(true);
    let asked = stub.asked();
    for _ in 0..5 {
        assert!(refused(&Framing::framed(8, PAIR, &value)).contains("503"));
    }
    assert_eq!(stub.asked(), asked + 1, "a registry that is away is left alone for a while");
    assert!(reader.read(&framed).unwrap().is_ok());
    assert!(AvroReader::new(None, None).read(&framed).unwrap().unwrap_err().contains("--schema-registry"));
}

#[test]
fn units_of_plain_longs_come_from_the_plan() {
    let schema = one(r#""long""#);
    let fields = [Field { unit: Some(TimeUnit::S), ..field("x", DataType::Timestamp) }];
    let bytes = write(&schema, x(Oracle::Long(5)));
    assert_eq!(read(&schema, &schema, &fields, &bytes).unwrap(), ["1970-01-01T00:00:05Z"]);
}
