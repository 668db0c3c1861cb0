//! Predictions read back for the drift monitor: only the columns it watches.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::json::{self, Names, Object, Parsed};
use crate::broker::Records;
use crate::config::plan::{Column, DataType};
use crate::source::{DeadLetter, dead_letter};

/// Predictions of one partition, by column, in offset order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PredictionBatch {
    /// Offset of each record.
    pub offsets: Vec<i64>,
    /// Version that scored it. Equal versions share their memory.
    pub model_versions: Vec<Arc<str>>,
    /// Event time, milliseconds since 1970 UTC.
    pub event_times: Vec<i64>,
    /// Score.
    pub scores: Vec<f64>,
    /// One column for each name that was asked for, in that order; NaN where a value is missing.
    pub features: Vec<Vec<f64>>,
}

/// Reads [`Prediction`](super::Prediction) records.
#[derive(Debug)]
pub struct PredictionReader {
    names: Names,
    versions: Vec<Arc<str>>,
    cells: Vec<Parsed>,
    text: String,
}

impl PredictionReader {
    /// Reads these features and skips the others.
    pub fn new(features: &[String]) -> Self {
        let column = |name: &String| Column { name: name.as_str().into(), data_type: DataType::Float64 };
        Self {
            names: Names::new(features.iter().map(column).collect()),
            versions: Vec::new(),
            cells: Vec::new(),
            text: String::new(),
        }
    }

    /// Reads a poll's records of one partition. Those that are no predictions come back as dead letters.
    pub fn read(&mut self, records: &Records) -> (PredictionBatch, Vec<DeadLetter>) {
        let mut batch =
            PredictionBatch { features: vec![Vec::new(); self.names.columns().len()], ..Default::default() };
        let mut dead = Vec::new();
        let mut refuse =
            |row, reason, error| dead.push(dead_letter::from_records(records, row, "monitor", reason, error));
        for row in 0..records.len() {
            let Some(value) = records.values.get(row) else {
                refuse(row, "null_value", "a prediction without a value".to_owned());
                continue;
            };
            match self.read_one(value) {
                Ok((version, event_time, score)) => {
                    batch.offsets.push(records.offsets[row]);
                    batch.model_versions.push(version);
                    batch.event_times.push(event_time);
                    batch.scores.push(score);
                    for (column, cell) in batch.features.iter_mut().zip(&self.cells) {
                        column.push(if let Parsed::Float64(value) = cell { *value } else { f64::NAN });
                    }
                }
                Err(error) => refuse(row, "malformed", format!("no prediction of driftline: {error}")),
            }
        }
        (batch, dead)
    }

    fn read_one(&mut self, value: &[u8]) -> Result<(Arc<str>, i64, f64), String> {
        self.cells.clear();
        self.text.clear();
        let features = Object { names: &self.names, cells: &mut self.cells, text: &mut self.text };
        let head = json::read(value, Head { features: Some(features) })?;
        let version = head.model_version.ok_or("it lacks 'model_version'")?;
        let event_time = head.event_time.ok_or("it lacks 'event_time'")?;
        let score = head.score.ok_or("it lacks 'score'")?;
        if !head.features {
            return Err("it lacks 'features'".to_owned());
        }
        Ok((intern(&mut self.versions, &version), event_time, score))
    }
}

/// A version's shared text. There are a few of them at a time.
fn intern(versions: &mut Vec<Arc<str>>, version: &str) -> Arc<str> {
    if let Some(known) = versions.iter().rev().find(|known| ***known == *version) {
        return known.clone();
    }
    versions.push(version.into());
    versions.last().expect("one was just added").clone()
}

struct Head<'a> {
    features: Option<Object<'a>>,
}

#[derive(Default)]
struct Found<'de> {
    model_version: Option<Cow<'de, str>>,
    event_time: Option<i64>,
    score: Option<f64>,
    features: bool,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    ModelVersion,
    EventTime,
    Score,
    Features,
    #[serde(other)]
    Other,
}

/// Text that is borrowed from the record where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> DeserializeSeed<'de> for Head<'_> {
    type Value = Found<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Head<'_> {
    type Value = Found<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a prediction")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Found<'de>, A::Error> {
        let mut found = Found::default();
        while let Some(field) = map.next_key::<Field>()? {
            match field {
                Field::ModelVersion => found.model_version = Some(map.next_value::<Text<'de>>()?.0),
                Field::EventTime => found.event_time = Some(map.next_value()?),
                Field::Score => found.score = Some(map.next_value()?),
                Field::Features if self.features.is_some() => {
                    let features = self.features.take().expect("it is there");
                    map.next_value_seed(features)?;
                    found.features = true;
                }
                Field::Features | Field::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
