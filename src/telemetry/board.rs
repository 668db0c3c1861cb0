//! The board: counters and happenings of a running process, for the live view, the plain lines and `/status`.
//!
//! Stages write to it once a batch; readers never block them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use super::latency::Latency;
use crate::runtime::clock;

/// Happenings kept for late readers.
const KEPT: usize = 1000;

/// What kind of thing happened; decides its mark in the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A stage started, stopped, or said something of note.
    Stage,
    /// Partitions came or went.
    Rebalance,
    /// A model version came into use.
    Model,
    /// Something drifted or recovered.
    Drift,
    /// A retraining step.
    Retraining,
    /// The demo changed the data.
    Shift,
    /// Something is wrong; the process goes on.
    Warning,
}

/// Something worth showing once.
#[derive(Debug, Clone, Serialize)]
pub struct Happening {
    /// Rises by one.
    pub number: u64,
    /// Wall clock, milliseconds since 1970 UTC.
    pub at: i64,
    /// Event time it is about, where it has one.
    pub event_time: Option<i64>,
    /// Kind.
    pub kind: Kind,
    /// One line for a person.
    pub text: String,
}

/// A turn in a pipeline's life that others wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Milestone {
    /// An incident opened.
    DriftOpened {
        /// Incident.
        incident: String,
        /// Columns, the strongest evidence first.
        columns: Vec<String>,
    },
    /// An incident was resolved.
    DriftResolved {
        /// Incident.
        incident: String,
    },
    /// The monitor asked for a retraining.
    RetrainingAsked {
        /// Request.
        id: String,
    },
    /// The training set is there, and a candidate is being trained.
    Training,
    /// A candidate was trained.
    Trained,
    /// The alias means a new version.
    Promoted {
        /// Version.
        version: String,
    },
    /// The candidate was turned down, or training failed.
    NotPromoted,
    /// A version is in use by the scoring stage.
    InUse {
        /// Version.
        version: String,
    },
}

/// Counts of one source: `read = applied + filtered + late + dead`, plus what is still waiting for the other sources.
#[derive(Debug, Default)]
pub struct SourceCounts {
    /// Records read.
    pub read: AtomicU64,
    /// Rows applied to state.
    pub applied: AtomicU64,
    /// Records that `where` left out.
    pub filtered: AtomicU64,
    /// Rows later than allowed.
    pub late: AtomicU64,
    /// Records that could not be used.
    pub dead: AtomicU64,
    /// Times that a partition was not fetched for a while, because its rows waited for another source.
    pub pauses: AtomicU64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Board {
    /// Per source in the plan's order.
    pub sources: Vec<(String, SourceCounts)>,
    /// Feature rows computed for scoring.
    pub rows: AtomicU64,
    /// Predictions committed.
    pub predictions: AtomicU64,
    /// Entities in memory, over all tasks.
    pub entities: AtomicU64,
    /// Bytes of window state in memory, over all tasks.
    pub state_bytes: AtomicU64,
    /// Bytes of it on disk.
    pub state_disk_bytes: AtomicU64,
    /// Records between the group's position and the end of the log.
    pub lag: AtomicU64,
    /// Newest event time applied, milliseconds since 1970 UTC; 0 before the first.
    pub event_time: AtomicU64,
    /// From a record's arrival in the log to its committed prediction (or feature row).
    pub latency: Latency,
    /// Windows judged by the drift monitor.
    pub windows: AtomicU64,
    /// Version → predictions.
    versions: Mutex<BTreeMap<String, u64>>,
    model: Mutex<Option<String>>,
    /// Newest drift numbers, by column: evidence, and whether it counts as drifted.
    drift: Mutex<Vec<(String, f64, f64, bool)>>,
    incident: Mutex<Option<String>>,
    /// Lag, entities and bytes by worker; the atomics above hold their sums.
    workers: Mutex<BTreeMap<usize, (u64, u64, u64, u64)>>,
    happenings: Mutex<(u64, VecDeque<Happening>)>,
    milestones: Mutex<Vec<(i64, Milestone)>>,
    /// True where somebody shows the happenings, so that the log need not.
    shown: AtomicBool,
}

impl Board {
    /// A board for these sources.
    pub fn new<'a>(sources: impl IntoIterator<Item = &'a str>) -> Arc<Self> {
        let sources = sources.into_iter().map(|name| (name.to_owned(), SourceCounts::default())).collect();
        Arc::new(Self { sources, ..Self::default() })
    }

    /// Keeps happenings out of the log from now on, because the caller shows them.
    pub fn show_elsewhere(&self) {
        self.shown.store(true, Ordering::Relaxed);
    }

    /// Notes a happening.
    pub fn say(&self, kind: Kind, event_time: Option<i64>, text: impl Into<String>) {
        let text = text.into();
        match kind {
            _ if self.shown.load(Ordering::Relaxed) => {}
            Kind::Warning => tracing::warn!("{text}"),
            _ => tracing::info!("{text}"),
        }
        let mut guard = self.happenings.lock();
        guard.0 += 1;
        let number = guard.0;
        if guard.1.len() == KEPT {
            guard.1.pop_front();
        }
        guard.1.push_back(Happening { number, at: clock::now_ms(), event_time, kind, text });
    }

    /// Notes a milestone.
    pub fn reach(&self, milestone: Milestone) {
        self.milestones.lock().push((clock::now_ms(), milestone));
    }

    /// All milestones so far, with the wall clock (milliseconds) of each.
    pub fn milestones(&self) -> Vec<(i64, Milestone)> {
        self.milestones.lock().clone()
    }

    /// Happenings with a number greater than `after`, oldest first.
    pub fn happenings(&self, after: u64) -> Vec<Happening> {
        self.happenings.lock().1.iter().filter(|h| h.number > after).cloned().collect()
    }

    /// Counts committed predictions of a version.
    pub fn predicted(&self, version: &str, rows: u64) {
        self.predictions.fetch_add(rows, Ordering::Relaxed);
        let mut versions = self.versions.lock();
        match versions.get_mut(version) {
            Some(count) => *count += rows,
            None => drop(versions.insert(version.to_owned(), rows)),
        }
    }

    /// Predictions by version.
    pub fn versions(&self) -> BTreeMap<String, u64> {
        self.versions.lock().clone()
    }

    /// Notes a worker's lag, entities and bytes of state, in memory and on disk.
    pub fn set_worker(&self, number: usize, lag: u64, entities: u64, (bytes, on_disk): (u64, u64)) {
        let mut workers = self.workers.lock();
        workers.insert(number, (lag, entities, bytes, on_disk));
        let sum = |pick: fn(&(u64, u64, u64, u64)) -> u64| workers.values().map(pick).sum();
        self.lag.store(sum(|w| w.0), Ordering::Relaxed);
        self.entities.store(sum(|w| w.1), Ordering::Relaxed);
        self.state_bytes.store(sum(|w| w.2), Ordering::Relaxed);
        self.state_disk_bytes.store(sum(|w| w.3), Ordering::Relaxed);
    }

    /// Notes the version in use.
    pub fn set_model(&self, version: &str) {
        *self.model.lock() = Some(version.to_owned());
    }

    /// The version in use.
    pub fn model(&self) -> Option<String> {
        self.model.lock().clone()
    }

    /// Notes a window's evidence: column, PSI, e-value, drifted; strongest first.
    pub fn set_drift(&self, columns: Vec<(String, f64, f64, bool)>, incident: Option<String>) {
        *self.drift.lock() = columns;
        *self.incident.lock() = incident;
    }

    /// The newest window's evidence.
    pub fn drift(&self) -> Vec<(String, f64, f64, bool)> {
        self.drift.lock().clone()
    }

    /// The open incident.
    pub fn incident(&self) -> Option<String> {
        self.incident.lock().clone()
    }

    /// Records read over all sources.
    pub fn read(&self) -> u64 {
        self.sources.iter().map(|(_, c)| c.read.load(Ordering::Relaxed)).sum()
    }

    /// The board as JSON, for `/status`.
    pub fn to_json(&self) -> serde_json::Value {
        let load = |v: &AtomicU64| v.load(Ordering::Relaxed);
        let sources: serde_json::Map<_, _> = self
            .sources
            .iter()
            .map(|(name, c)| {
                let counts = serde_json::json!({
                    "read": load(&c.read), "applied": load(&c.applied), "filtered": load(&c.filtered),
                    "late": load(&c.late), "dead": load(&c.dead), "pauses": load(&c.pauses),
                });
                (name.clone(), counts)
            })
            .collect();
        serde_json::json!({
            "sources": sources,
            "feature_rows": load(&self.rows),
            "predictions": load(&self.predictions),
            "predictions_by_version": self.versions(),
            "model_version": self.model(),
            "entities": load(&self.entities),
            "state_bytes": load(&self.state_bytes),
            "state_disk_bytes": load(&self.state_disk_bytes),
            "lag": load(&self.lag),
            "event_time": load(&self.event_time),
            "windows": load(&self.windows),
            "incident": self.incident(),
            "happenings": self.happenings(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn happenings_are_numbered_and_bounded() {
        let board = Board::new(["a"]);
        for i in 0..KEPT + 5 {
            board.say(Kind::Stage, None, format!("line {i}"));
        }
        let all = board.happenings(0);
        assert_eq!(all.len(), KEPT);
        assert_eq!(all[0].number, 6);
        assert_eq!(board.happenings(all.last().unwrap().number - 2).len(), 2);
    }

    #[test]
    fn predictions_are_counted_by_version() {
        let board = Board::new([]);
        board.predicted("1", 3);
        board.predicted("2", 4);
        board.predicted("1", 1);
        assert_eq!(board.predictions.load(Ordering::Relaxed), 8);
        assert_eq!(board.versions(), BTreeMap::from([("1".to_owned(), 4), ("2".to_owned(), 4)]));
    }
}
