//! Retraining: when to ask for it, and the worker that does it.

pub mod audit;
pub mod gates;
pub mod policy;
mod trainer;
pub mod training_set;
pub mod worker;

use serde::{Deserialize, Serialize};

/// A record of `<pipeline>.retraining`: all that a trainer needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrainingEvent {
    /// Idempotency key: a second event with the same one is the same request.
    pub id: String,
    /// Pipeline.
    pub pipeline: String,
    /// Hash of the feature definitions.
    pub definition: String,
    /// Model to retrain.
    pub model: String,
    /// Version in use when it was asked for.
    pub model_version: String,
    /// `drift` or `manual`.
    pub cause: String,
    /// The policy that fired, as written.
    pub policy: String,
    /// Incident, where one is the cause.
    pub incident_id: Option<String>,
    /// Names of the drifted columns, the strongest evidence first.
    pub drifted: Vec<String>,
    /// Event time from which the data differ, milliseconds since 1970 UTC.
    pub since: i64,
    /// Suggested training range, event time in milliseconds: from (inclusive).
    pub train_from: i64,
    /// Newest event time seen when it was asked for; a trainer may go further as labels arrive.
    pub asked_at: i64,
}
