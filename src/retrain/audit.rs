//! The audit trail: what a retraining did, step by step, on `<pipeline>.audit`.

use serde::{Deserialize, Serialize};

/// Steps of a retraining, in the order they happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The request was taken up.
    Requested,
    /// Not enough outcomes are known yet.
    WaitingForLabels,
    /// Rows and labels are joined.
    TrainingSetBuilt,
    /// The training command ended well and left a bundle.
    Trained,
    /// The candidate is good enough.
    GatesPassed,
    /// The candidate is not good enough.
    GatesFailed,
    /// The candidate is a version in the registry.
    Registered,
    /// The pipeline's alias means the candidate now.
    Promoted,
    /// The candidate was turned down; the champion stays.
    Rejected,
    /// Something went wrong; the champion stays.
    Failed,
}

impl Step {
    /// True where nothing comes after it for the same request.
    pub fn is_last(self) -> bool {
        matches!(self, Self::Promoted | Self::Rejected | Self::Failed)
    }

    /// As in the record.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::WaitingForLabels => "waiting_for_labels",
            Self::TrainingSetBuilt => "training_set_built",
            Self::Trained => "trained",
            Self::GatesPassed => "gates_passed",
            Self::GatesFailed => "gates_failed",
            Self::Registered => "registered",
            Self::Promoted => "promoted",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
        }
    }
}

/// A record of `<pipeline>.audit`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Wall clock, milliseconds since 1970 UTC.
    pub at: i64,
    /// Request: [`super::RetrainingEvent::id`].
    pub retraining_id: String,
    /// Pipeline.
    pub pipeline: String,
    /// Model.
    pub model: String,
    /// Step.
    pub step: Step,
    /// What happened, for a person.
    pub detail: String,
    /// Numbers and names of the step: rows, metrics, version, files.
    pub facts: serde_json::Value,
}
