//! Drift: reference profiles, statistics, verdicts, incidents.
//!
//! ```text
//! predictions topic ─> prediction (decode) ─> merge (event time order) ─> monitor (windows per model version)
//!                                                                           │  profile: the reference's histograms
//!                                                                           │  statistics: PSI, KS, χ² …
//!                                                                           └─ verdict: what has drifted
//! worker: all of it on one thread, with drift events, retraining event, state and offsets in one transaction
//! ```

mod merge;
pub mod monitor;
pub mod prediction;
pub mod profile;
pub mod statistics;
pub mod verdict;
pub mod worker;

use serde::{Deserialize, Serialize};

/// State of an incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IncidentState {
    /// First evidence.
    Opened,
    /// More of it: other features joined, or the policy asked to be reminded.
    Ongoing,
    /// The evidence is gone, or the model that it spoke about is no longer used.
    Resolved,
}

/// What one watched column showed in a window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ColumnEvidence {
    /// Feature, or `score` for the prediction.
    pub name: String,
    /// True if it is among the drifted ones.
    pub drifted: bool,
    /// Population stability index against the reference, natural logarithm.
    pub psi: f64,
    /// Kolmogorov-Smirnov distance at the profile's edges.
    pub ks: f64,
    /// Two-sample p-value of that distance (asymptotic; conservative with ties), the sizes divided by the design effect.
    pub ks_p_value: f64,
    /// Jensen-Shannon distance over the PSI's cells, base 2: between 0 and 1.
    pub jensen_shannon: f64,
    /// Wasserstein distance at the profile's edges, in the column's unit.
    pub wasserstein: f64,
    /// Tolerated PSI: the plan's, or more where the reference has too few rows to tell so little.
    pub tolerance: f64,
    /// p-value of 'PSI is at most the tolerance', this window alone.
    pub p_value: f64,
    /// Shiryaev-Roberts statistic over the windows so far, divided by the budget's horizon: an e-value. At most 1e300.
    pub e_value: f64,
    /// Share of missing values in the reference and in the window.
    pub missing: (f64, f64),
    /// Median of the reference and of the window, from the profile's bins.
    pub median: (Option<f64>, Option<f64>),
    /// Smallest event time (ms) of the first window since which the evidence has been growing.
    pub since: Option<i64>,
}

/// A record of `<pipeline>.drift`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DriftEvent {
    /// The incident: the same from opened to resolved.
    pub incident_id: String,
    /// State.
    pub state: IncidentState,
    /// Pipeline.
    pub pipeline: String,
    /// Model name.
    pub model: String,
    /// Model version that the evidence is about.
    pub model_version: String,
    /// Number of the window, from 1, counted per model version.
    pub window: u64,
    /// Predictions in the window.
    pub rows: u64,
    /// Smallest event time in the window, milliseconds since 1970 UTC (inclusive).
    pub from: i64,
    /// Largest event time in the window (inclusive).
    pub to: i64,
    /// Event time from which the data differ, as near as windows tell.
    pub since: i64,
    /// Why, for a person: `spend_mean_30d and 2 more features moved`.
    pub reason: String,
    /// All watched columns, the strongest evidence first.
    pub columns: Vec<ColumnEvidence>,
    /// False-alarm budget in force.
    pub alpha: f64,
    /// Tolerated PSI in force.
    pub tolerance: f64,
    /// Prediction records that the window is made of: partition → first and last offset, inclusive.
    pub evidence: std::collections::BTreeMap<i32, (i64, i64)>,
}
