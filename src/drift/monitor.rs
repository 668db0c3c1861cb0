//! The monitor: predictions in, verdicts and incidents out. A state machine without clock, log or threads.
//!
//! Per model version it fills one window at a time with counts, judges it when it closes, and keeps the evidence from window to
//! window. A version's incident opens with its first drifted column, goes on as others join, and is resolved when none is drifted
//! any more, or when another version has taken over and looks quiet. Its memory is bounded by bins, columns and versions,
//! whatever the length of the stream. [`Monitor::snapshot`] and [`Monitor::restore`] at any row give the same as never having
//! stopped.

mod version;
mod window;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::version::State;
use self::window::Watched;
use super::prediction::PredictionRows;
use super::profile::Profile;
use super::verdict::Rule;
use super::{ColumnEvidence, DriftEvent};
use crate::config::plan::{MonitorWindow, Plan};
use crate::retrain::RetrainingEvent;
use crate::retrain::policy::{Policy, PolicyError};
use crate::source::skip::nests_too_deeply;

/// The prediction's column, in profiles and in evidence.
pub const SCORE: &str = "score";

/// Versions without a profile that are remembered by name.
const MOST_UNMONITORED: usize = 64;

/// Answers with the reference profiles of model versions.
pub trait Profiles {
    /// The profile of a version.
    ///
    /// # Errors
    /// Where there is none now, or none ever.
    fn profile(&self, model_version: &str) -> Result<Arc<Profile>, NoProfile>;
}

/// Why a profile cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoProfile {
    /// Asking again may help: the registry is away.
    Later(String),
    /// It will not: there is no such version, or its profile is broken.
    Never(String),
}

/// A monitor that cannot work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// The pipeline has no such section.
    #[error("pipeline '{pipeline}' has no [{section}] section, so there is nothing to monitor")]
    NotPlanned {
        /// Pipeline.
        pipeline: String,
        /// Section that is needed.
        section: &'static str,
    },
    /// `[retraining] when` cannot be understood.
    #[error("[retraining] when: {0}")]
    Policy(#[from] PolicyError),
    /// A snapshot that this version cannot read.
    #[error("the monitor's state cannot be read: {reason}")]
    Snapshot {
        /// What is wrong with it.
        reason: String,
    },
}

/// What a closed window led to.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowClosed {
    /// Model version that it is about.
    pub model_version: String,
    /// Number of the window, from 1, counted per model version.
    pub window: u64,
    /// Predictions in it.
    pub rows: u64,
    /// Smallest event time, milliseconds since 1970 UTC (inclusive).
    pub from: i64,
    /// Largest event time (inclusive).
    pub to: i64,
    /// All watched columns, drifted ones first, then by evidence.
    pub columns: Vec<ColumnEvidence>,
    /// The version's incident, where one is open after this window.
    pub incident: Option<String>,
    /// Events to publish, in order.
    pub events: Vec<DriftEvent>,
    /// Retraining to ask for.
    pub retraining: Option<RetrainingEvent>,
}

/// How far [`Monitor::observe`] came.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// First row that was not taken.
    pub next: usize,
    /// The window that closed before that row.
    pub closed: Option<WindowClosed>,
    /// Why the next row cannot be taken yet: its version's profile cannot be had now.
    pub held: Option<String>,
    /// Versions met without a profile: name, why. Their rows are counted and not judged.
    pub unmonitored: Vec<(String, String)>,
}

/// Rows that were taken and not judged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unjudged {
    /// Before the end of the warm-up.
    pub warm_up: u64,
    /// Of model versions without a profile.
    pub unmonitored: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Monitor {
    settings: Settings,
    state: State,
    /// What is watched of each version in use; `None` where it has no profile.
    watched: HashMap<String, Option<Watched>>,
}

#[derive(Debug)]
struct Settings {
    pipeline: String,
    definition: String,
    model: String,
    /// Columns of the predictions: watched features, then the score.
    columns: Vec<String>,
    window: MonitorWindow,
    warm_up_ms: i64,
    rule: Rule,
    retraining: Option<Retraining>,
}

#[derive(Debug)]
struct Retraining {
    policy: Policy,
    cooldown_ms: i64,
    lookback_ms: i64,
}

impl Monitor {
    /// A monitor that has seen nothing.
    ///
    /// # Errors
    /// Where the plan has no monitor or no score section, or its retraining policy cannot be understood.
    pub fn new(plan: &Plan) -> Result<Self, MonitorError> {
        let missing = |section| MonitorError::NotPlanned { pipeline: plan.name.clone(), section };
        let monitor = plan.monitor.as_ref().ok_or_else(|| missing("monitor"))?;
        let score = plan.score.as_ref().ok_or_else(|| missing("score"))?;
        let retraining = plan.retraining.as_ref().map(|retraining| {
            Ok::<_, PolicyError>(Retraining {
                policy: Policy::parse(&retraining.when)?,
                cooldown_ms: milliseconds(retraining.cooldown),
                lookback_ms: milliseconds(retraining.lookback),
            })
        });
        let settings = Settings {
            pipeline: plan.name.clone(),
            definition: plan.definition.clone(),
            model: score.model.clone(),
            columns: monitor.features.iter().cloned().chain([SCORE.to_owned()]).collect(),
            window: monitor.window,
            warm_up_ms: milliseconds(monitor.warm_up),
            rule: Rule {
                alpha: monitor.alpha,
                horizon_windows: monitor.horizon_windows,
                tolerance: monitor.tolerance,
                resolve_after: monitor.resolve_after.max(1),
            },
            retraining: retraining.transpose()?,
        };
        Ok(Self { settings, state: State::new(), watched: HashMap::new() })
    }

    /// Takes rows from `range` until a window closes, a profile cannot be had, or all are taken.
    ///
    /// Rows come in event-time order as far as it is known; a row that is late is counted in the window that is open.
    pub fn observe(&mut self, rows: &PredictionRows, range: Range<usize>, profiles: &dyn Profiles) -> Observed {
        let mut observed = Observed { next: range.start, closed: None, held: None, unmonitored: Vec::new() };
        while observed.next < range.end {
            let row = observed.next;
            let first = *self.state.first_event_time.get_or_insert(rows.event_times[row]);
            let warm_from = first.saturating_add(self.settings.warm_up_ms);
            if rows.event_times[row] < warm_from {
                self.take(rows, row..row + 1);
                self.state.unjudged.warm_up += 1;
                observed.next += 1;
                continue;
            }
            // A run: rows of one version, all of them to be judged.
            let run = (row..range.end)
                .find(|&r| rows.versions[r] != rows.versions[row] || rows.event_times[r] < warm_from)
                .unwrap_or(range.end);
            let name = rows.version(row);
            if let Err(reason) = self.meet(name, profiles, &mut observed.unmonitored) {
                observed.held = Some(reason);
                return observed;
            }
            let Some(watched) = self.watched.get(&**name).and_then(Option::as_ref) else {
                self.take(rows, row..run);
                self.state.unjudged.unmonitored += (run - row) as u64;
                observed.next = run;
                continue;
            };
            let index = self.state.index(name).expect("a watched version has a state");
            let version = &mut self.state.versions[index];
            let end = match self.settings.window {
                MonitorWindow::Rows(most) => {
                    let room = most.max(1).saturating_sub(version.open.rows);
                    run.min(row.saturating_add(usize::try_from(room).unwrap_or(usize::MAX)))
                }
                MonitorWindow::Time(length) => {
                    let until = version.open.until(rows.event_times[row], milliseconds(length).max(1));
                    (row..run).find(|&r| rows.event_times[r] >= until).unwrap_or(run)
                }
            };
            version.open.count(watched, rows, row..end);
            self.take(rows, row..end);
            let version = &mut self.state.versions[index];
            version.seen = self.state.rows;
            version.quiet_elsewhere = 0;
            observed.next = end;
            let full = match self.settings.window {
                MonitorWindow::Rows(most) => version.open.rows >= most.max(1),
                MonitorWindow::Time(_) => end < run,
            };
            if full {
                observed.closed = Some(self.close(index));
                return observed;
            }
        }
        observed
    }

    /// Rows that were taken and not judged.
    pub fn unjudged(&self) -> &Unjudged {
        &self.state.unjudged
    }

    /// All that the monitor knows, as JSON.
    pub fn snapshot(&self) -> String {
        sonic_rs::to_string(&self.state).expect("finite numbers, strings and lists always have a JSON form")
    }

    /// Goes on from a snapshot.
    ///
    /// Where a version's profile or the watched columns have changed since, its open window and its evidence start anew.
    ///
    /// # Errors
    /// A text that is no snapshot, or of another format; the monitor is then unchanged.
    pub fn restore(&mut self, snapshot: &[u8]) -> Result<(), MonitorError> {
        if nests_too_deeply(snapshot) {
            return Err(MonitorError::Snapshot { reason: "it is nested more deeply than any snapshot".into() });
        }
        let state: State =
            sonic_rs::from_slice(snapshot).map_err(|error| MonitorError::Snapshot { reason: error.to_string() })?;
        state.check_format()?;
        self.state = state;
        // Whether the counts fit the profiles is checked as each version is met again.
        self.watched.clear();
        Ok(())
    }

    /// Forgets all that it has seen.
    pub fn reset(&mut self) {
        self.state = State::new();
        self.watched.clear();
    }

    fn take(&mut self, rows: &PredictionRows, range: Range<usize>) {
        self.state.rows += range.len() as u64;
        let newest = rows.event_times[range].iter().copied().max();
        self.state.newest_event_time = self.state.newest_event_time.max(newest);
    }

    /// Makes sure that it is known what to watch of a version, and that its state fits that.
    fn meet(
        &mut self,
        name: &str,
        profiles: &dyn Profiles,
        unmonitored: &mut Vec<(String, String)>,
    ) -> Result<(), String> {
        if self.watched.contains_key(name) {
            return Ok(());
        }
        let watched = match profiles.profile(name) {
            Ok(profile) => {
                let (watched, unknown) = Watched::new(profile, &self.settings.columns);
                if !unknown.is_empty() {
                    let columns = unknown.join(", ");
                    tracing::warn!(model_version = name, columns, "the reference profile lacks columns: not watched");
                }
                Some(watched)
            }
            Err(NoProfile::Later(reason)) => return Err(reason),
            Err(NoProfile::Never(reason)) => {
                unmonitored.push((name.to_owned(), reason));
                if self.watched.values().filter(|watched| watched.is_none()).count() >= MOST_UNMONITORED {
                    self.watched.retain(|_, watched| watched.is_some());
                }
                None
            }
        };
        if let Some(watched) = &watched {
            self.state.fit(name, watched);
        }
        self.watched.insert(name.to_owned(), watched);
        Ok(())
    }

    fn close(&mut self, index: usize) -> WindowClosed {
        let Self { settings, state, watched } = self;
        let newest = state.newest_event_time;
        let version = &mut state.versions[index];
        let watching =
            watched.get(&version.name).and_then(Option::as_ref).expect("a window is open for watched versions");
        let (window, quiet) = version.close(settings, watching);
        let events = version.incident_event(&window).into_iter();
        let retraining = version.retraining(&window, newest.unwrap_or(window.open.to), state.retraining_at);
        if retraining.is_some() {
            state.retraining_at = newest;
        }
        let closed = WindowClosed {
            model_version: version.name.clone(),
            window: version.windows,
            rows: window.open.rows,
            from: window.open.from,
            to: window.open.to,
            columns: window.columns.clone(),
            incident: version.incident.as_ref().map(|incident| incident.id.clone()),
            events: Vec::new(),
            retraining,
        };
        let events = events.chain(state.superseded(index, &window, &quiet)).collect();
        watched.retain(|name, watched| watched.is_none() || state.index(name).is_some());
        WindowClosed { events, ..closed }
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
