//! What a batch becomes on the log: predictions, or feature rows where scoring runs apart.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{Int32Type, Int64Type};
use arrow::util::display::array_value_to_string;

use super::RunError;
use super::context::Context;
use crate::broker::{Broker, BrokerError, NextOffset, OutRecord, Producer, TopicPartition};
use crate::score::{Encoded, FeatureEncoder, PredictionEncoder, Scores, WindowEncoder};
use crate::source::{DeadLetter, dead_letter};
use crate::window::row_columns;

enum Encoder {
    Predictions(PredictionEncoder),
    Features(FeatureEncoder),
    /// The pipeline has no model, or its version publishes nothing: rows go to the stores only.
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
    /// One for each of the plan's emitted windows.
    windows: Vec<WindowOutput>,
}

/// What goes to the topic of one table `[windows.NAME]`.
struct WindowOutput {
    encoder: WindowEncoder,
    topic: Arc<str>,
    partitions: i32,
    encoded: Encoded,
    /// Source partition of the records up to a number of them.
    parts: Vec<(i32, usize)>,
}

impl Output {
    /// For the stages of this process.
    pub fn new(context: &Context) -> Result<Self, RunError> {
        let plan = &context.plan;
        let (encoder, topic): (_, Arc<str>) = match &plan.score {
            Some(score) if context.stages.score => {
                (Encoder::Predictions(PredictionEncoder::new(plan, "champion")), context.out_topic(&score.topic).into())
            }
            Some(_) if !context.is_silent() => {
                (Encoder::Features(FeatureEncoder::new(plan)), context.features_topic().into())
            }
            _ => (Encoder::Nothing, "".into()),
        };
        let partitions = if matches!(encoder, Encoder::Nothing) { 1 } else { partitions_of(context, &topic)? };
        let emits = context.stages.features && !context.is_silent();
        let windows = if emits { plan.windows.as_slice() } else { &[] };
        let windows = windows.iter().map(|windows| {
            let topic = context.out_topic(&windows.topic);
            Ok(WindowOutput {
                encoder: WindowEncoder::new(plan, windows),
                partitions: partitions_of(context, &topic)?,
                topic: topic.into(),
                encoded: Encoded::default(),
                parts: Vec::new(),
            })
        });
        let windows = windows.collect::<Result<_, RunError>>()?;
        Ok(Self { encoder, topic, partitions, encoded: Encoded::default(), at: Vec::new(), windows })
    }

    /// Encodes a batch in place of the last one.
    pub fn encode(&mut self, rows: &RecordBatch, scores: Option<&Scores>) -> Result<(), RunError> {
        self.encoded.clear();
        self.at.clear();
        for windows in &mut self.windows {
            windows.encoded.clear();
            windows.parts.clear();
        }
        match (&mut self.encoder, scores) {
            (Encoder::Predictions(encoder), Some(scores)) => encoder.encode(rows, scores, &mut self.encoded)?,
            (Encoder::Features(encoder), _) if rows.num_rows() > 0 => encoder.encode(rows, &mut self.encoded)?,
            _ => return Ok(()),
        }
        let partitions = column(rows, row_columns::PARTITION).as_primitive::<Int32Type>();
        self.at.extend(partitions.values());
        Ok(())
    }

    /// Encodes rows of emitted windows, by their number in the plan, behind those that are encoded already.
    pub fn encode_windows(&mut self, number: usize, partition: i32, rows: &RecordBatch) -> Result<(), RunError> {
        // A version that publishes nothing has none.
        let Some(windows) = self.windows.get_mut(number) else { return Ok(()) };
        windows.encoder.encode(rows, &mut windows.encoded)?;
        windows.parts.push((partition, windows.encoded.len()));
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
        self.windows.iter().try_for_each(|windows| windows.send(producer))
    }
}

impl WindowOutput {
    fn send(&self, producer: &mut dyn Producer) -> Result<(), BrokerError> {
        let mut parts = self.parts.iter();
        let mut part = parts.next();
        for (number, record) in self.encoded.iter().enumerate() {
            while part.is_some_and(|(_, end)| *end <= number) {
                part = parts.next();
            }
            producer.send(OutRecord {
                topic: &self.topic,
                partition: part.map(|(partition, _)| partition % self.partitions),
                key: Some(record.key),
                value: Some(record.value),
                ..OutRecord::default()
            })?;
        }
        Ok(())
    }
}

fn partitions_of(context: &Context, topic: &str) -> Result<i32, RunError> {
    let info = context.wiring.broker.topic(topic)?.ok_or_else(|| BrokerError::NoSuchTopic {
        topic: topic.to_owned(),
        broker: context.wiring.broker.describe(),
    })?;
    Ok(i32::try_from(info.partitions.len()).unwrap_or(i32::MAX).max(1))
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
