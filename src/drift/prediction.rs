//! Predictions as columns: what the monitor needs of each record, decoded without building the rest.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};

use crate::source::skip::{Skip, nests_too_deeply};

/// Predictions by column. Missing values are NaN.
#[derive(Debug, Clone, Default)]
pub struct PredictionRows {
    /// Instant that the features are as of, milliseconds since 1970 UTC.
    pub event_times: Vec<i64>,
    /// Partition of the predictions topic.
    pub partitions: Vec<i32>,
    /// Offset in it.
    pub offsets: Vec<i64>,
    /// Model versions, by their place in `names`.
    pub versions: Vec<u32>,
    /// Names of the model versions that occur.
    pub names: Vec<Arc<str>>,
    /// A column for each watched feature in the plan's order, then the score.
    pub columns: Vec<Vec<f64>>,
}

impl PredictionRows {
    /// No rows, of this many columns, the score included.
    pub fn new(columns: usize) -> Self {
        Self { columns: vec![Vec::new(); columns], ..Self::default() }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.event_times.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.event_times.is_empty()
    }

    /// Model version of a row.
    pub fn version(&self, row: usize) -> &Arc<str> {
        &self.names[self.versions[row] as usize]
    }

    /// Appends a row: its values are those of [`PredictionRows::columns`].
    ///
    /// # Panics
    /// Where there is not exactly one value a column.
    pub fn push(&mut self, event_time: i64, partition: i32, offset: i64, version: &str, values: &[f64]) {
        assert_eq!(values.len(), self.columns.len(), "one value a column");
        let version = self.name(version);
        self.event_times.push(event_time);
        self.partitions.push(partition);
        self.offsets.push(offset);
        self.versions.push(version);
        for (column, value) in self.columns.iter_mut().zip(values) {
            column.push(*value);
        }
    }

    /// Appends a row of other rows with the same columns.
    pub(super) fn push_row(&mut self, from: &Self, row: usize) {
        let version = self.name(from.version(row));
        self.event_times.push(from.event_times[row]);
        self.partitions.push(from.partitions[row]);
        self.offsets.push(from.offsets[row]);
        self.versions.push(version);
        for (column, from) in self.columns.iter_mut().zip(&from.columns) {
            column.push(from[row]);
        }
    }

    /// Forgets all rows and keeps the memory.
    pub fn clear(&mut self) {
        self.event_times.clear();
        self.partitions.clear();
        self.offsets.clear();
        self.versions.clear();
        self.names.clear();
        self.columns.iter_mut().for_each(Vec::clear);
    }

    /// Versions change rarely: the newest name is nearly always the one.
    fn name(&mut self, version: &str) -> u32 {
        let place = self.names.iter().rposition(|name| &**name == version).unwrap_or_else(|| {
            self.names.push(version.into());
            self.names.len() - 1
        });
        u32::try_from(place).expect("a batch holds far fewer versions than rows")
    }
}

/// Decodes records of the predictions topic.
#[derive(Debug, Clone)]
pub struct PredictionDecoder {
    /// Watched feature → column.
    places: HashMap<Box<str>, usize>,
    /// Features in the order of the newest record: the next record nearly always has the same.
    order: Vec<(Box<str>, Option<usize>)>,
    row: Vec<f64>,
}

impl PredictionDecoder {
    /// Decodes these features, in this order, and the score after them.
    pub fn new(features: &[String]) -> Self {
        let places = features.iter().enumerate().map(|(place, name)| (name.as_str().into(), place)).collect();
        Self { places, order: Vec::new(), row: vec![f64::NAN; features.len() + 1] }
    }

    /// Appends one record to `rows`.
    ///
    /// # Errors
    /// What is wrong with the record, for a person; `rows` is then unchanged.
    pub fn decode(
        &mut self,
        partition: i32,
        offset: i64,
        value: &[u8],
        rows: &mut PredictionRows,
    ) -> Result<(), String> {
        if nests_too_deeply(value) {
            return Err("it is nested more deeply than any prediction".to_owned());
        }
        self.row.fill(f64::NAN);
        let mut deserializer = sonic_rs::Deserializer::from_slice(value);
        let seed = Record { places: &self.places, order: &mut self.order, row: &mut self.row };
        let head = seed.deserialize(&mut deserializer).and_then(|head| deserializer.end().map(|()| head));
        let head = head.map_err(|error| error.to_string())?;
        *self.row.last_mut().expect("the score has a place") = head.score;
        rows.push(head.event_time, partition, offset, &head.model_version, &self.row);
        Ok(())
    }
}

struct Head<'de> {
    event_time: i64,
    model_version: std::borrow::Cow<'de, str>,
    score: f64,
}

/// A record of the predictions topic; its features go to `row`.
struct Record<'a> {
    places: &'a HashMap<Box<str>, usize>,
    order: &'a mut Vec<(Box<str>, Option<usize>)>,
    row: &'a mut [f64],
}

impl<'de> DeserializeSeed<'de> for Record<'_> {
    type Value = Head<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Head<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Record<'_> {
    type Value = Head<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a prediction, a JSON object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Head<'de>, M::Error> {
        let Record { places, order, row } = self;
        let (mut event_time, mut model_version, mut score, mut features) = (None, None, None, false);
        while let Some(field) = map.next_key_seed(Text(field))? {
            match field {
                Field::EventTime => event_time = Some(map.next_value()?),
                Field::ModelVersion => model_version = Some(map.next_value_seed(Text(|text| text))?),
                Field::Score => score = Some(map.next_value::<f64>()?),
                Field::Features => {
                    map.next_value_seed(Features { places, order, row })?;
                    features = true;
                }
                Field::Other => map.next_value_seed(Skip)?,
            }
        }
        if !features {
            return Err(M::Error::missing_field("features"));
        }
        Ok(Head {
            event_time: event_time.ok_or_else(|| M::Error::missing_field("event_time"))?,
            model_version: model_version.ok_or_else(|| M::Error::missing_field("model_version"))?,
            score: score.ok_or_else(|| M::Error::missing_field("score"))?,
        })
    }
}

enum Field {
    EventTime,
    ModelVersion,
    Score,
    Features,
    Other,
}

fn field(name: std::borrow::Cow<'_, str>) -> Field {
    match &*name {
        "event_time" => Field::EventTime,
        "model_version" => Field::ModelVersion,
        "score" => Field::Score,
        "features" => Field::Features,
        _ => Field::Other,
    }
}

/// A string, borrowed where the record holds it without escapes.
struct Text<F>(F);

impl<'de, T, F: FnOnce(std::borrow::Cow<'de, str>) -> T> DeserializeSeed<'de> for Text<F> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de, T, F: FnOnce(std::borrow::Cow<'de, str>) -> T> Visitor<'de> for Text<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<T, E> {
        Ok(self.0(text.into()))
    }

    fn visit_str<E>(self, text: &str) -> Result<T, E> {
        Ok(self.0(text.to_owned().into()))
    }
}

struct Features<'a> {
    places: &'a HashMap<Box<str>, usize>,
    order: &'a mut Vec<(Box<str>, Option<usize>)>,
    row: &'a mut [f64],
}

impl<'de> DeserializeSeed<'de> for Features<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Features<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of features")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        let Features { places, order, row } = self;
        let mut number = 0;
        loop {
            let place = map.next_key_seed(Text(|name: std::borrow::Cow<'_, str>| match order.get(number) {
                Some((known, place)) if **known == *name => *place,
                _ => {
                    let place = places.get(&*name).copied();
                    order.truncate(number);
                    order.push((name.into(), place));
                    place
                }
            }))?;
            match place {
                Some(Some(place)) => row[place] = map.next_value::<Option<f64>>()?.unwrap_or(f64::NAN),
                Some(None) => map.next_value_seed(Skip)?,
                None => return Ok(()),
            }
            number += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const GOOD: &str = r#"{"prediction_id":"a-0-1","entity":{"id":"x"},"event_time":1700000000000,"watermark":null,
        "source":{"topic":"a","partition":0,"offset":1},"model":"m","model_version":"3","variant":"champion","score":0.125,
        "label":0,"features":{"a":1.5,"unwatched":7,"b":null,"c":2}}"#;

    fn decode(values: &[&str]) -> (PredictionRows, Vec<String>) {
        let mut decoder = PredictionDecoder::new(&["c".into(), "b".into(), "a".into()]);
        let mut rows = PredictionRows::new(4);
        let mut errors = Vec::new();
        for (offset, value) in values.iter().enumerate() {
            errors.extend(decoder.decode(2, offset as i64, value.as_bytes(), &mut rows).err());
        }
        (rows, errors)
    }

    #[test]
    fn values_come_in_the_plans_order_and_missing_ones_as_nan() {
        let reordered =
            GOOD.replace(r#""a":1.5,"unwatched":7,"b":null,"c":2"#, r#""b":4,"a":5"#).replace(r#""3""#, r#""4""#);
        let (rows, errors) = decode(&[GOOD, &reordered, GOOD]);
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(rows.event_times, [1_700_000_000_000; 3]);
        assert_eq!((rows.partitions, rows.offsets), (vec![2; 3], vec![0, 1, 2]));
        assert_eq!((rows.versions, rows.names), (vec![0, 1, 0], vec!["3".into(), "4".into()]));
        let bits = |column: &[f64]| column.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let expected = [[2.0, f64::NAN, 2.0], [f64::NAN, 4.0, f64::NAN], [1.5, 5.0, 1.5], [0.125; 3]];
        for (column, expected) in rows.columns.iter().zip(expected) {
            assert_eq!(bits(column), bits(&expected));
        }
    }

    #[test]
    fn a_record_of_brackets_is_refused() {
        let deep = |field: &str| GOOD.replace(field, &format!("{field}{}", "[".repeat(100_000)));
        let (rows, errors) = decode(&["[".repeat(100_000).as_str(), &deep(r#""score":"#), &deep(r#""entity":"#), GOOD]);
        assert_eq!((rows.len(), errors.len()), (1, 3));
    }

    #[rstest]
    #[case::truncated(&GOOD[..200])]
    #[case::trailing(r#"{"event_time":1,"model_version":"1","score":1,"features":{}} x"#)]
    #[case::no_object("[1,2]")]
    #[case::empty("")]
    #[case::no_time(r#"{"model_version":"1","score":1,"features":{}}"#)]
    #[case::no_version(r#"{"event_time":1,"score":1,"features":{}}"#)]
    #[case::no_score(r#"{"event_time":1,"model_version":"1","features":{}}"#)]
    #[case::null_score(r#"{"event_time":1,"model_version":"1","score":null,"features":{}}"#)]
    #[case::no_features(r#"{"event_time":1,"model_version":"1","score":1}"#)]
    #[case::text(r#"{"event_time":1,"model_version":"1","score":1,"features":{"a":"x"}}"#)]
    #[case::fractional_time(r#"{"event_time":1.5,"model_version":"1","score":1,"features":{}}"#)]
    fn a_malformed_record_leaves_no_row(#[case] value: &str) {
        let (rows, errors) = decode(&[value, GOOD]);
        assert_eq!((rows.len(), errors.len()), (1, 1), "{errors:?}");
        assert!(rows.columns.iter().all(|column| column.len() == 1));
    }

    #[test]
    fn numbers_are_read_to_the_last_bit() {
        let mut decoder = PredictionDecoder::new(&["a".into()]);
        let mut rows = PredictionRows::new(2);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut expected = Vec::new();
        for offset in 0..2000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = f64::from_bits(state & 0x7fef_ffff_ffff_ffff);
            expected.push(value.to_bits());
            let record = format!(r#"{{"event_time":1,"model_version":"1","score":0,"features":{{"a":{value:?}}}}}"#);
            decoder.decode(0, offset, record.as_bytes(), &mut rows).unwrap();
        }
        assert_eq!(rows.columns[0].iter().map(|value| value.to_bits()).collect::<Vec<_>>(), expected);
    }
}
