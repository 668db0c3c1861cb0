//! What a batch becomes on the log: predictions, or feature rows where scoring runs apart.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{Int32Type, Int64Type};
use arrow::util::display::array_value_to_string;

use super::RunError;
use super::context::Context;
use crate::broker::{Broker, BrokerError, NextOffset, OutRecord, Producer, TopicPartition};
use crate::score::{Encoded, FeatureEncoder, PredictionEncoder, Scores};
use crate::source::{DeadLetter, dead_letter};
use crate::window::row_columns;

enum Encoder {
    Predictions(PredictionEncoder),
    Features(FeatureEncoder),
    /// The pipeline has no model: rows go to the stores only.
    Nothing,
}

/// Encodes batches and sends them.
pub(super) struct Output {
    encoder: Encoder,
    topic: Arc<str>,
    partitions: i32,
    encoded: Encoded,
    /// Source partition of each encoded record, in the batch's rows.
    at: Vec<i32>,
}

impl Output {
    /// For the stages of this process.
    pub fn new(context: &Context) -> Result<Self, RunError> {
        let plan = &context.plan;
        let (encoder, topic) = match &plan.score {
            Some(score) if context.stages.score => {
                (Encoder::Predictions(PredictionEncoder::new(plan, "champion")), Arc::clone(&score.topic))
            }
            Some(_) => (Encoder::Features(FeatureEncoder::new(plan)), plan.features_topic().into()),
            None => (Encoder::Nothing, "".into()),
        };
        let partitions = if matches!(encoder, Encoder::Nothing) {
            1
        } else {
            let info = context.wiring.broker.topic(&topic)?;
            let info = info.ok_or_else(|| BrokerError::NoSuchTopic {
                topic: topic.to_string(),
                broker: context.wiring.broker.describe(),
            })?;
            i32::try_from(info.partitions.len()).unwrap_or(i32::MAX).max(1)
        };
        Ok(Self { encoder, topic, partitions, encoded: Encoded::default(), at: Vec::new() })
    }

    /// Encodes a batch in place of the last one.
    pub fn encode(&mut self, rows: &RecordBatch, scores: Option<&Scores>) -> Result<(), RunError> {
        self.encoded.clear();
        self.at.clear();
        match (&mut self.encoder, scores) {
            (Encoder::Predictions(encoder), Some(scores)) => encoder.encode(rows, scores, &mut self.encoded)?,
            (Encoder::Features(encoder), _) if rows.num_rows() > 0 => encoder.encode(rows, &mut self.encoded)?,
            _ => return Ok(()),
        }
        let partitions = column(rows, row_columns::PARTITION).as_primitive::<Int32Type>();
        self.at.extend(partitions.values());
        Ok(())
    }

    /// Sends what was encoded. Rows of one entity stay in one partition, in their order: that of its source events.
    pub fn send(&self, producer: &mut dyn Producer) -> Result<(), BrokerError> {
        for record in self.encoded.iter() {
            producer.send(OutRecord {
                topic: &self.topic,
                partition: Some(self.at[record.row] % self.partitions),
                key: Some(record.key),
                value: Some(record.value),
                ..OutRecord::default()
            })?;
        }
        Ok(())
    }
}

fn column<'a>(rows: &'a RecordBatch, name: &str) -> &'a ArrayRef {
    rows.column_by_name(name).expect("every batch of feature rows has the columns of row_columns")
}

/// Dead letters for rows that the model could not score: the events that asked for them, read again from their topic.
pub(super) fn unscorable(
    broker: &dyn Broker,
    rows: &RecordBatch,
    scores: &Scores,
) -> Result<Vec<DeadLetter>, BrokerError> {
    let topics = column(rows, row_columns::TOPIC);
    let partitions = column(rows, row_columns::PARTITION).as_primitive::<Int32Type>();
    let offsets = column(rows, row_columns::OFFSET).as_primitive::<Int64Type>();
    let of = |(row, reason): &(usize, String)| {
        let at = TopicPartition::new(text(topics, *row), partitions.value(*row));
        let offset = offsets.value(*row);
        let error = format!(
            "{at} offset {offset}: model {} version {} could not score the features of this event: {reason}",
            scores.model, scores.version
        );
        let (event, _) = broker.read(&at, NextOffset(offset), 1, Duration::from_secs(10))?;
        if event.offsets.first() == Some(&offset) {
            return Ok(dead_letter::from_records(&event, 0, "score", "unscorable", error));
        }
        // The event has expired meanwhile: its coordinates are what is left of it.
        Ok(DeadLetter {
            partition: at,
            offset,
            timestamp: -1,
            key: None,
            value: None,
            headers: Vec::new(),
            stage: "score",
            reason: "unscorable",
            error,
        })
    };
    scores.failed.iter().map(of).collect()
}

/// A text of a plain or dictionary-encoded column.
fn text(column: &ArrayRef, row: usize) -> String {
    array_value_to_string(column, row).unwrap_or_default()
}
