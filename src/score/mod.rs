//! Scoring: feature rows become predictions, a micro-batch at a time.
//!
//! [`Batcher`] says when a micro-batch closes, [`Scorer`] scores it, [`PredictionEncoder`] writes the records. Where stages
//! run apart, [`FeatureEncoder`] and [`FeatureReader`] carry the rows between them. The monitor reads predictions with a
//! decoder of its own, [`crate::drift::prediction`].

mod batcher;
mod error;
mod feature_reader;
mod json;
mod message;
mod rows;
#[cfg(test)]
mod sample;
mod scorer;

pub use batcher::{BatchLimits, Batcher, CloseReason, Closed};
pub use error::ScoreError;
pub use feature_reader::{FeatureRead, FeatureReader};
pub use message::{Encoded, EncodedRecord, FeatureEncoder, PredictionEncoder, WindowEncoder};
pub use scorer::{Scorer, Scores};

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// Coordinates of the event that asked for a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRef {
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: i32,
    /// Offset.
    pub offset: i64,
}

/// A record of `<pipeline>.predictions`: one scored feature row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// `<topic>-<partition>-<offset>` of the source event: the same after any restart.
    pub prediction_id: String,
    /// Pipeline.
    pub pipeline: String,
    /// Hash of the feature definitions.
    pub definition: String,
    /// Key name → value, in the entity's order.
    pub entity: IndexMap<String, serde_json::Value>,
    /// Instant the features are as of, milliseconds since 1970 UTC.
    pub event_time: i64,
    /// Watermark of the task at that moment, milliseconds; null before the first.
    pub watermark: Option<i64>,
    /// The event.
    pub source: SourceRef,
    /// Model name.
    pub model: String,
    /// Version, as the registry writes it.
    pub model_version: String,
    /// `champion`, or the challenger's name.
    pub variant: String,
    /// The model's output: a probability, or a regression's value.
    pub score: f64,
    /// Class for classifiers: score ≥ the bundle's threshold.
    pub label: Option<i64>,
    /// The values it was scored from, in the model's order; null where missing.
    pub features: IndexMap<String, Option<f64>>,
}

/// A record of `<pipeline>.features`: a feature row on its way from `driftline features` to `driftline score`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeatureRecord {
    /// Pipeline.
    pub pipeline: String,
    /// Hash of the feature definitions.
    pub definition: String,
    /// Key name → value, in the entity's order.
    pub entity: IndexMap<String, serde_json::Value>,
    /// Instant the features are as of, milliseconds since 1970 UTC.
    pub event_time: i64,
    /// Watermark of the task at that moment.
    pub watermark: Option<i64>,
    /// The event.
    pub source: SourceRef,
    /// All features, in the plan's order.
    pub features: IndexMap<String, serde_json::Value>,
}
