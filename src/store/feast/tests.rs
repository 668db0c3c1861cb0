use super::*;
use proptest::prelude::*;
use rstest::rstest;

/// Writes a value as the columns' encoder does.
fn put_value(value: &Value, data_type: DataType, out: &mut Vec<u8>) {
    match (value, data_type) {
        (Value::Null, _) => {}
        (Value::Int64(v), _) => put_int64(*v, out),
        (Value::Float64(v), _) => put_double(*v, out),
        (Value::Boolean(v), _) => put_bool(*v, out),
        (Value::String(v), _) => put_string(v, out),
        (Value::Timestamp(v), _) => put_unix_timestamp(*v, out),
        (Value::List(values), DataType::List(element)) => {
            let mut items = Vec::new();
            for value in values {
                let item = match value {
                    Value::Int64(v) => Item::Varint(*v),
                    Value::Boolean(v) => Item::Varint((*v).into()),
                    Value::Timestamp(v) => Item::Varint(seconds(*v)),
                    Value::Float64(v) => Item::Double(*v),
                    Value::String(v) => Item::Text(v),
                    other => panic!("{other:?} is in no list"),
                };
                put_item(item, &mut items);
            }
            put_list(element, &items, out);
        }
        (other, data_type) => panic!("{other:?} as {data_type}"),
    }
}

fn encoded(value: &Value) -> String {
    let mut out = Vec::new();
    put_value(value, DataType::Int64, &mut out);
    hex::encode(out)
}

/// Vectors of Feast 0.67's `Value_pb2`: `Value(int64_list_val=Int64List(val=[…])).SerializeToString()`.
#[rstest]
#[case::doubles(Element::Float64, vec![Value::Float64(1.0), Value::Float64(2.0)], "7a120a10000000000000f03f0000000000000040")]
#[case::integers(Element::Int64, vec![Value::Int64(3), Value::Int64(0), Value::Int64(-1)], "720e0a0c0300ffffffffffffffffff01")]
#[case::no_integers(Element::Int64, vec![], "7200")]
#[case::booleans(Element::Boolean, vec![Value::Boolean(true), Value::Boolean(false)], "8a01040a020100")]
#[case::texts(Element::String, vec![Value::String("ab".into()), Value::String(String::new()), Value::String("c".into())], "62090a0261620a000a0163")]
#[case::no_texts(Element::String, vec![], "6200")]
#[case::instants(Element::Timestamp, vec![Value::Timestamp(5000), Value::Timestamp(-5000)], "92010d0a0b05fbffffffffffffffff01")]
fn lists_are_feasts(#[case] element: Element, #[case] values: Vec<Value>, #[case] expected: &str) {
    let (value, data_type) = (Value::List(values), DataType::List(element));
    let mut out = Vec::new();
    put_value(&value, data_type, &mut out);
    assert_eq!(hex::encode(&out), expected);
    assert_eq!(super::value(&out, data_type), Ok(value));
}

fn key(project: &str, keys: &[(&str, Value)]) -> String {
    let mut sorted: Vec<_> = keys.iter().collect();
    sorted.sort_by_key(|(name, _)| *name);
    let mut out = Vec::new();
    put_key_names(sorted.iter().map(|(name, _)| *name), &mut out);
    for (_, value) in sorted {
        match value {
            Value::String(v) => put_key_string(v, &mut out),
            Value::Int64(v) => put_key_int64(*v, &mut out),
            other => panic!("{other:?} is no key"),
        }
    }
    out.extend_from_slice(project.as_bytes());
    hex::encode(out)
}

#[test]
fn entity_keys_are_feasts() {
    assert_eq!(
        key("p1", &[("user_id", Value::Int64(1001))]),
        "010000000200000007000000757365725f69640400000008000000e9030000000000007031"
    );
    assert_eq!(
        key("p1", &[("user_id", Value::Int64(1001)), ("merchant", Value::String("m1".into()))]),
        "0200000002000000080000006d65726368616e740200000007000000757365725f6964\
         02000000020000006d310400000008000000e9030000000000007031"
    );
}

#[rstest]
#[case("user_stats", "amt_sum_1h", "20aad607")]
#[case("user_stats", "cnt_1h", "8d813c0f")]
#[case("driver_hourly_stats", "conv_rate", "6160e3da")]
fn fields_are_feasts(#[case] view: &str, #[case] feature: &str, #[case] expected: &str) {
    assert_eq!(hex::encode(field(view, feature)), expected);
}

#[rstest]
#[case(Value::Float64(12.5), "290000000000002940")]
#[case(Value::Int64(3), "2003")]
#[case(Value::Int64(0), "2000")]
#[case(Value::Int64(-1), "20ffffffffffffffffff01")]
#[case(Value::Boolean(true), "3801")]
#[case(Value::Boolean(false), "3800")]
#[case(Value::String("ab".into()), "12026162")]
#[case(Value::String(String::new()), "1200")]
#[case(Value::Null, "")]
fn values_are_feasts(#[case] value: Value, #[case] expected: &str) {
    assert_eq!(encoded(&value), expected);
}

#[rstest]
#[case("350000003f", DataType::Float64, Value::Float64(0.5))]
#[case("1803", DataType::Int64, Value::Int64(3))]
#[case("18ffffffffffffffffff01", DataType::Int64, Value::Int64(-1))]
#[case("2003", DataType::Float64, Value::Float64(3.0))]
#[case("", DataType::Int64, Value::Null)]
#[case("980100", DataType::String, Value::Null)]
#[case("0a026162", DataType::String, Value::String("ab".into()))]
#[case("4005", DataType::Timestamp, Value::Timestamp(5000))]
fn what_feast_pushes_is_read(#[case] bytes: &str, #[case] expected: DataType, #[case] value: Value) {
    assert_eq!(super::value(&hex::decode(bytes).unwrap(), expected), Ok(value));
}

#[rstest]
#[case::another_type("12026162", DataType::Int64)]
#[case::a_list("7a120a10000000000000f03f0000000000000040", DataType::Float64)]
#[case::no_list("290000000000002940", DataType::List(Element::Float64))]
#[case::a_list_of_others("7a120a10000000000000f03f0000000000000040", DataType::List(Element::Int64))]
#[case::a_list_cut_off("7a120a10000000000000f03f00000000000000", DataType::List(Element::Float64))]
#[case::a_list_that_says_it_is_longer("7a120a11000000000000f03f0000000000000040", DataType::List(Element::Float64))]
#[case::cut_off("2900000000", DataType::Float64)]
#[case::cut_off_text("120361", DataType::String)]
#[case::not_text("1201ff", DataType::String)]
#[case::noise("ffffffff", DataType::Int64)]
fn other_bytes_are_refused(#[case] bytes: &str, #[case] expected: DataType) {
    assert!(super::value(&hex::decode(bytes).unwrap(), expected).is_err());
}

#[test]
fn timestamps_are_feasts() {
    // 2026-01-02T03:04:05.123456Z, as Feast writes it: what is finer than a millisecond is cut off.
    assert_eq!(timestamp(&hex::decode("08a5ebdcca06108094ef3a").unwrap()), Ok(1_767_323_045_123));
    let mut out = Vec::new();
    put_timestamp(1_767_323_045_000, &mut out);
    assert_eq!(hex::encode(&out), "08a5ebdcca06", "zero nanoseconds are left out");
}

#[test]
fn colliding_fields_are_found() {
    let column = |name: &str| Column { name: name.into(), data_type: DataType::Int64 };
    let view = |name: &str, columns| View { name: name.to_owned(), columns, max_age_ms: None };
    let views = [
        view("view", vec![column("feature_81591"), column("other"), column("feature_97170")]),
        view("elsewhere", vec![column("feature_81591")]),
    ];
    assert_eq!(
        field_collisions(&views),
        [FieldCollision {
            first: ("view".into(), "feature_81591".into()),
            second: ("view".into(), "feature_97170".into())
        }]
    );
}

fn any_value() -> impl Strategy<Value = (Value, DataType)> {
    let one = any_element();
    let list = prop_oneof![
        prop::collection::vec(any::<i64>().prop_map(Value::Int64), 0..9).prop_map(|list| (list, Element::Int64)),
        prop::collection::vec(any::<bool>().prop_map(Value::Boolean), 0..9).prop_map(|list| (list, Element::Boolean)),
        prop::collection::vec(any::<String>().prop_map(Value::String), 0..9).prop_map(|list| (list, Element::String)),
        prop::collection::vec((-9_000_000i64..9_000_000).prop_map(|s| Value::Timestamp(s * 1000)), 0..9)
            .prop_map(|list| (list, Element::Timestamp)),
        prop::collection::vec((-1e300..1e300).prop_map(Value::Float64), 0..9).prop_map(|list| (list, Element::Float64)),
    ];
    prop_oneof![one, list.prop_map(|(list, element)| (Value::List(list), DataType::List(element)))]
}

fn any_element() -> impl Strategy<Value = (Value, DataType)> {
    prop_oneof![
        any::<i64>().prop_map(|v| (Value::Int64(v), DataType::Int64)),
        any::<f64>()
            .prop_filter("NaN never occurs", |v| !v.is_nan())
            .prop_map(|v| (Value::Float64(v), DataType::Float64)),
        any::<bool>().prop_map(|v| (Value::Boolean(v), DataType::Boolean)),
        any::<String>().prop_map(|v| (Value::String(v), DataType::String)),
        (-9_000_000_000_000..9_000_000_000_000_i64)
            .prop_map(|seconds| (Value::Timestamp(seconds * 1000), DataType::Timestamp)),
        Just((Value::Null, DataType::Float64)),
    ]
}

proptest! {
    #[test]
    fn values_round_trip((value, data_type) in any_value()) {
        let mut out = Vec::new();
        put_value(&value, data_type, &mut out);
        prop_assert_eq!(super::value(&out, data_type), Ok(value));
    }

    #[test]
    fn instants_round_trip(ms in -9_000_000_000_000_000..9_000_000_000_000_000_i64) {
        let mut out = Vec::new();
        put_timestamp(ms, &mut out);
        prop_assert_eq!(timestamp(&out), Ok(ms));
    }

    #[test]
    fn versions_compare_as_event_time_then_sequence(
        a in (-9_000_000_000_000_000..9_000_000_000_000_000_i64, any::<i64>()),
        b in (-9_000_000_000_000_000..9_000_000_000_000_000_i64, any::<i64>()),
    ) {
        let encoded = |(t, s)| { let mut out = Vec::new(); put_version(t, s, &mut out); out };
        let (x, y) = (encoded(a), encoded(b));
        prop_assert_eq!(x.len(), VERSION_BYTES);
        prop_assert_eq!(version(&x).cmp(&version(&y)), a.cmp(&b));
    }

    #[test]
    fn noise_is_an_error_or_a_value_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        for data_type in [DataType::Int64, DataType::Float64, DataType::Boolean, DataType::String, DataType::Timestamp] {
            let _ = super::value(&bytes, data_type);
            let _ = super::value(&bytes, DataType::List(data_type.element().unwrap()));
        }
        let _ = timestamp(&bytes);
        let _ = version(&bytes);
    }
}
