//! Rows of a table: facts about a key, or their end.
//!
//! A record without a value (a tombstone), and a row for which `where` is not true, ends what was true of its key: a row
//! with the keys alone.

use std::sync::Arc;

use arrow::array::{BooleanArray, RecordBatch};
use arrow::compute::nullif;

use super::avro::{AvroKeyDecoder, DecodeError};
use super::columns::{Field, RowBuilder};
use super::decode::RecordDecoder;
use super::event_time::is_plausible;
use super::fault::{RecordFault, excerpt, reason};
use super::json::JsonDecoder;
use crate::broker::{Records, SchemaRegistry};
use crate::config::plan::{DataType, RecordKey, TablePlan};

/// What a table's records need besides the decoding of their values.
#[derive(Debug)]
pub(super) struct TableDecoder {
    record_time: bool,
    /// Columns of the keys.
    keys: Vec<usize>,
    key: KeyDecoder,
}

#[derive(Debug)]
enum KeyDecoder {
    Text,
    Long,
    Json(JsonDecoder),
    Avro(AvroKeyDecoder),
}

impl TableDecoder {
    pub fn new(plan: &TablePlan, keys: &[Arc<str>], fields: &[Field], registry: Option<&Arc<SchemaRegistry>>) -> Self {
        let keys: Vec<usize> =
            keys.iter().filter_map(|key| fields.iter().position(|field| field.name == *key)).collect();
        let key = match plan.record_key {
            RecordKey::Text => KeyDecoder::Text,
            RecordKey::Long => KeyDecoder::Long,
            RecordKey::Json => KeyDecoder::Json(JsonDecoder::new(fields)),
            RecordKey::Avro => {
                let types: Vec<DataType> = keys.iter().map(|key| fields[*key].data_type).collect();
                KeyDecoder::Avro(AvroKeyDecoder::new(&types, registry.cloned()))
            }
        };
        Self { record_time: plan.record_time, keys, key }
    }

    /// Starts a row and sets it from a record. Returns its instant; the caller commits the row.
    pub fn row(&mut self, decoder: &mut RecordDecoder, records: &Records, row: usize) -> Result<i64, DecodeError> {
        let value = records.values.get(row);
        let instant = match value {
            Some(_) => decoder.row(value)?,
            None => {
                decoder.rows.start();
                self.set_key(&mut decoder.rows, records.keys.get(row))?;
                decoder.check_keys()?;
                0
            }
        };
        if value.is_some() && !self.record_time {
            return Ok(instant);
        }
        match records.timestamps[row] {
            timestamp if timestamp >= 0 && is_plausible(timestamp) => Ok(timestamp),
            timestamp => {
                let error =
                    format!("the record's Kafka timestamp, {timestamp} ms, says not when the row came to be true");
                Err(RecordFault::new(reason::BAD_EVENT_TIME, error).into())
            }
        }
    }

    fn set_key(&mut self, rows: &mut RowBuilder, key: Option<&[u8]>) -> Result<(), DecodeError> {
        let Some(key) = key else {
            let error = "the record has neither key nor value: nothing says whose row it deletes";
            return Err(RecordFault::new(reason::NULL_KEY, error).into());
        };
        let fault = |expected: &str| {
            let found = excerpt(&String::from_utf8_lossy(key));
            let help = "it has no value, so that its key says whose row it deletes; see record_key of the table";
            RecordFault::malformed(format!("the record's key should be {expected}, found {found}; {help}"))
        };
        match &mut self.key {
            KeyDecoder::Avro(decoder) => decoder.decode(key, &self.keys, rows),
            KeyDecoder::Json(decoder) => {
                Ok(decoder.decode(key, rows).map_err(|error| fault(&format!("JSON ({error})")))?)
            }
            KeyDecoder::Long => {
                let key = key.try_into().map_err(|_| fault("eight bytes"))?;
                self.keys.iter().for_each(|&column| rows.column(column).set_integer(i64::from_be_bytes(key)));
                Ok(())
            }
            KeyDecoder::Text => {
                let text = std::str::from_utf8(key).map_err(|_| fault("UTF-8 text"))?;
                for &column in &self.keys {
                    let column = rows.column(column);
                    match column.field().data_type {
                        DataType::Int64 => column.set_integer(text.parse().map_err(|_| fault("an integer"))?),
                        _ => column.set_text(text),
                    }
                }
                Ok(())
            }
        }
    }

    /// The columns with nothing but the keys where `deleted`.
    pub fn without_deleted(&self, columns: RecordBatch, deleted: &[bool]) -> RecordBatch {
        if !deleted.contains(&true) {
            return columns;
        }
        let deleted = BooleanArray::from(deleted.to_vec());
        let kept = columns.columns().iter().enumerate().map(|(index, column)| match self.keys.contains(&index) {
            true => Arc::clone(column),
            false => nullif(column, &deleted).expect("there is a value a row"),
        });
        RecordBatch::try_new(columns.schema(), kept.collect()).expect("all columns may be null")
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Array, AsArray};
    use arrow::datatypes::{Float64Type, Int64Type};
    use rstest::rstest;

    use super::super::{Decoded, SourceDecoder, sample};
    use crate::broker::registry::tests::StubRegistry;
    use crate::broker::{Records, TopicPartition};
    use crate::config::plan::{Column, DataType, Format, RecordKey, SourcePlan, TablePlan};

    /// 2024-05-01, ms.
    const AT: i64 = 1_714_521_600_000;

    fn plan(record_key: RecordKey, record_time: bool) -> SourcePlan {
        let fields = [("customer_id", DataType::String), ("at", DataType::Timestamp), ("amount", DataType::Float64)];
        let plan = sample::purchases("churn.customers", Format::Json, &fields);
        let double = Column { name: "double".into(), data_type: DataType::Float64 };
        SourcePlan {
            event_time: if record_time { "".into() } else { plan.event_time },
            filter: Some("amount is null or amount < 100".into()),
            derive: vec![(double, "coalesce(amount, 7) * 2".into())],
            table: Some(TablePlan { columns: plan.fields[2..].to_vec(), record_time, record_key }),
            ..plan
        }
    }

    /// Timestamp, key and value of a record.
    type Sent<'a> = (i64, Option<&'a [u8]>, Option<&'a str>);

    fn decode(plan: &SourcePlan, records: &[Sent<'_>]) -> Decoded {
        let mut all = Records::new(TopicPartition::new("churn.customers", 3));
        for (offset, (timestamp, key, value)) in records.iter().enumerate() {
            all.push(offset as i64, *timestamp, *key, value.map(str::as_bytes));
        }
        SourceDecoder::new(0, plan, None).unwrap().decode(&all).unwrap()
    }

    /// Key, amount and its double of each row.
    fn rows(decoded: &Decoded) -> Vec<(String, Option<f64>, Option<f64>)> {
        let columns = &decoded.batch.columns;
        let number = |name: &str, row: usize| {
            let numbers = columns.column_by_name(name).unwrap().as_primitive::<Float64Type>();
            numbers.is_valid(row).then(|| numbers.value(row))
        };
        let key = |row: usize| columns.column(0).as_string::<i32>().value(row).to_owned();
        (0..columns.num_rows()).map(|row| (key(row), number("amount", row), number("double", row))).collect()
    }

    #[test]
    fn what_has_no_value_or_is_not_kept_ends_what_was_true() {
        let decoded = decode(
            &plan(RecordKey::Text, false),
            &[
                (AT + 5, None, Some(&format!(r#"{{"customer_id":"a","at":{AT},"amount":3}}"#))),
                (AT + 6, Some(b"b"), None),
                (AT + 7, None, Some(&format!(r#"{{"customer_id":"c","at":{AT},"amount":200}}"#))),
                (AT + 8, None, Some(&format!(r#"{{"customer_id":"d","at":{AT}}}"#))),
            ],
        );
        let row = |key: &str, amount, double| (key.to_owned(), amount, double);
        let expected = [row("a", Some(3.0), Some(6.0)), row("b", None, None), row("c", None, None)];
        assert_eq!(rows(&decoded)[..3], expected);
        assert_eq!(rows(&decoded)[3], row("d", None, Some(14.0)), "there are facts, one of which is missing");
        assert_eq!(decoded.batch.event_times, [AT, AT + 6, AT, AT]);
        assert_eq!((decoded.batch.read, decoded.batch.filtered, decoded.dead.len()), (4, 0, 0));
    }

    #[test]
    fn goes_by_the_records_timestamps_where_there_is_no_field() {
        let value = Some(r#"{"customer_id":"a","amount":3}"#);
        let decoded =
            decode(&plan(RecordKey::Text, true), &[(AT, None, value), (-1, None, value), (AT + 9, None, value)]);
        assert_eq!((&decoded.batch.event_times[..], &decoded.batch.offsets[..]), (&[AT, AT + 9][..], &[0, 2][..]));
        assert_eq!(decoded.dead[0].reason, "bad_event_time");
    }

    #[rstest]
    #[case::json(RecordKey::Json, br#"{"customer_id": "a"}"#, Ok("a"))]
    #[case::json_of_another(RecordKey::Json, br#"{"customer": "a"}"#, Err("null_key"))]
    #[case::no_json(RecordKey::Json, b"a", Err("malformed"))]
    #[case::no_text(RecordKey::Text, b"\xff", Err("malformed"))]
    #[case::empty_text(RecordKey::Text, b"", Ok(""))]
    fn reads_the_records_key(#[case] record_key: RecordKey, #[case] key: &[u8], #[case] expected: Result<&str, &str>) {
        let decoded = decode(&plan(record_key, true), &[(AT, Some(key), None), (AT, None, None)]);
        let found = rows(&decoded).first().map(|row| row.0.clone());
        assert_eq!(found.as_deref(), expected.ok());
        let reasons: Vec<&str> = decoded.dead.iter().map(|letter| letter.reason).collect();
        let expected: Vec<&str> = expected.err().into_iter().chain(["null_key"]).collect();
        assert_eq!(reasons, expected);
    }

    #[rstest]
    #[case::text(DataType::String, &[2, b'a'], Ok(Some("a")))]
    #[case::empty_text(DataType::String, &[0], Ok(Some("")))]
    #[case::integer(DataType::Int64, &[0x53], Ok(None))]
    #[case::long_text(DataType::String, &[8, b'a'], Err("malformed"))]
    #[case::more(DataType::Int64, &[2, 2], Err("malformed"))]
    fn reads_plain_avro_keys(
        #[case] data_type: DataType,
        #[case] key: &[u8],
        #[case] expected: Result<Option<&str>, &str>,
    ) {
        let mut plan = plan(RecordKey::Avro, true);
        plan.fields[0].data_type = data_type;
        let decoded = decode(&plan, &[(AT, Some(key), None)]);
        match expected {
            Ok(Some(text)) => assert_eq!(rows(&decoded)[0].0, text),
            // Zigzag: 0x53 is -42.
            Ok(None) => assert_eq!(decoded.batch.columns.column(0).as_primitive::<Int64Type>().values(), &[-42]),
            Err(reason) => assert_eq!(decoded.dead[0].reason, reason),
        }
    }

    #[test]
    fn reads_framed_avro_keys_as_the_registry_says() {
        let registry = StubRegistry::start();
        registry.put(
            7,
            r#"{"type":"record","name":"Key","fields":[{"name":"more","type":"int"},{"name":"customer_id","type":["null","string"]}]}"#,
        );
        registry.put(8, r#""string""#);
        registry.put(9, r#""long""#);
        let keys: [&[u8]; 5] = [
            &[0, 0, 0, 0, 7, 4, 2, 2, b'a'],
            &[0, 0, 0, 0, 7, 4, 0],
            &[0, 0, 0, 0, 8, 4, b'b', b'c'],
            &[0, 0, 0, 0, 9, 4],
            &[0, 0, 0, 0, 8, 4, b'b'],
        ];
        let mut all = Records::new(TopicPartition::new("churn.customers", 3));
        keys.iter().enumerate().for_each(|(offset, key)| all.push(offset as i64, AT, Some(key), None));
        let plan = plan(RecordKey::Avro, true);
        let decoded = SourceDecoder::new(0, &plan, Some(registry.client())).unwrap().decode(&all).unwrap();
        let found: Vec<String> = rows(&decoded).into_iter().map(|row| row.0).collect();
        assert_eq!(found, ["a", "bc"]);
        let dead: Vec<(i64, &str)> = decoded.dead.iter().map(|letter| (letter.offset, letter.reason)).collect();
        assert_eq!(dead, [(1, "null_key"), (3, "wrong_type"), (4, "malformed")]);
    }

    #[rstest]
    #[case::digits(RecordKey::Text, b"-42", Some(-42))]
    #[case::no_digits(RecordKey::Text, b"4x", None)]
    #[case::long(RecordKey::Long, &[0, 0, 0, 0, 0, 0, 1, 2], Some(258))]
    #[case::short(RecordKey::Long, &[1, 2], None)]
    fn reads_integer_keys(#[case] record_key: RecordKey, #[case] key: &[u8], #[case] expected: Option<i64>) {
        let mut plan = plan(record_key, true);
        plan.fields[0].data_type = DataType::Int64;
        let decoded = decode(&plan, &[(AT, Some(key), None)]);
        let keys = decoded.batch.columns.column(0).as_primitive::<Int64Type>();
        assert_eq!(keys.values().first().copied(), expected);
        assert_eq!(decoded.dead.len(), usize::from(expected.is_none()));
    }
}
