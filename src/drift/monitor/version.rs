//! What the monitor keeps of each model version: its evidence, its incident, what it has asked for.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::window::{OpenWindow, Watched};
use super::{MonitorError, SCORE, Settings, Unjudged};
use crate::drift::verdict::Judge;
use crate::drift::{ColumnEvidence, DriftEvent, IncidentState};
use crate::retrain::RetrainingEvent;
use crate::retrain::policy::WindowFacts;

/// Model versions kept at once. Beyond it the one that was seen longest ago is let go when a window closes.
const MOST_VERSIONS: usize = 8;
/// Format of the snapshot.
const FORMAT: u32 = 1;

/// All of a monitor that outlives the process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    format: u32,
    pub(super) first_event_time: Option<i64>,
    pub(super) newest_event_time: Option<i64>,
    /// Newest event time when the newest retraining event was made.
    pub(super) retraining_at: Option<i64>,
    /// Rows taken, of all versions.
    pub(super) rows: u64,
    pub(super) unjudged: Unjudged,
    /// In the order in which they came.
    pub(super) versions: Vec<Version>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Version {
    pub(super) name: String,
    columns: Vec<String>,
    /// Of the profile that the counts belong to.
    digest: String,
    judge: Judge,
    pub(super) open: OpenWindow,
    /// Windows closed.
    pub(super) windows: u64,
    pub(super) incident: Option<Incident>,
    history: VecDeque<WindowFacts>,
    /// The policy has asked for retraining, and its cause is not over.
    asked: bool,
    /// [`State::rows`] when its newest row came.
    pub(super) seen: u64,
    /// Quiet windows of other versions in a row since then.
    pub(super) quiet_elsewhere: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Incident {
    pub(super) id: String,
    since: i64,
    /// Columns that are or have been part of it.
    columns: Vec<String>,
}

/// A closed window and what it showed.
pub(super) struct Window<'a> {
    settings: &'a Settings,
    pub(super) open: OpenWindow,
    pub(super) columns: Vec<ColumnEvidence>,
    /// Columns that drifted with this window, the strongest evidence first.
    joined: Vec<String>,
    number: u64,
    version: String,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            format: FORMAT,
            first_event_time: None,
            newest_event_time: None,
            retraining_at: None,
            rows: 0,
            unjudged: Unjudged::default(),
            versions: Vec::new(),
        }
    }

    pub(super) fn check_format(&self) -> Result<(), MonitorError> {
        if self.format == FORMAT {
            return Ok(());
        }
        let reason = format!("its format is {}, and this driftline reads {FORMAT}", self.format);
        Err(MonitorError::Snapshot { reason })
    }

    pub(super) fn index(&self, version: &str) -> Option<usize> {
        self.versions.iter().position(|known| known.name == version)
    }

    /// Makes a version's state fit what is watched of it: a new one, or anew where it was of other bins.
    pub(super) fn fit(&mut self, name: &str, watched: &Watched) {
        let fresh = Version::new(name, watched);
        match self.versions.iter_mut().find(|version| version.name == name) {
            None => self.versions.push(fresh),
            Some(version)
                if version.columns == fresh.columns
                    && version.digest == fresh.digest
                    && version.judge.columns() == fresh.judge.columns()
                    && version.open.fits(watched) => {}
            Some(version) => {
                tracing::warn!(
                    model_version = name,
                    "its profile or the watched columns changed: its evidence starts anew"
                );
                // The incident is kept: its end has to be told, which the next window does.
                let (windows, incident, asked) = (version.windows, version.incident.take(), version.asked);
                *version = Version { windows, incident, asked, ..fresh };
            }
        }
    }

    /// After a window of the version at `index`: lets go of versions that it has replaced, and tells the end of their
    /// incidents. `quiet` tells of each of the window's columns whether it looks quiet.
    pub(super) fn superseded(
        &mut self,
        index: usize,
        window: &Window<'_>,
        quiet: &HashMap<String, bool>,
    ) -> Vec<DriftEvent> {
        let calm = window.columns.iter().all(|column| !column.drifted);
        let enough = window.settings.rule.resolve_after;
        let mut replaced = Vec::new();
        for (other, version) in self.versions.iter_mut().enumerate().filter(|(other, _)| *other != index) {
            let moved = version.incident.iter().flat_map(|incident| &incident.columns);
            let is_quiet = calm && moved.clone().all(|column| quiet.get(column).copied().unwrap_or(true));
            version.quiet_elsewhere = if is_quiet { version.quiet_elsewhere + 1 } else { 0 };
            if version.quiet_elsewhere >= enough {
                replaced.push(other);
            }
        }
        let mut kept = self.versions.len() - replaced.len();
        let mut by_age: Vec<usize> = (0..self.versions.len()).filter(|other| *other != index).collect();
        by_age.sort_by_key(|other| self.versions[*other].seen);
        for other in by_age {
            if kept > MOST_VERSIONS && !replaced.contains(&other) {
                replaced.push(other);
                kept -= 1;
            }
        }
        replaced.sort_unstable();
        let mut events = Vec::new();
        for other in replaced.into_iter().rev() {
            let version = self.versions.remove(other);
            if let Some(incident) = &version.incident {
                let reason = if version.quiet_elsewhere >= enough {
                    format!(
                        "version {} is in use instead, and {enough} of its windows in a row were quiet",
                        window.version
                    )
                } else {
                    format!("version {} has not been in use for long", version.name)
                };
                let event = window.event(incident, IncidentState::Resolved, reason);
                events.push(DriftEvent { model_version: version.name, window: version.windows, ..event });
            }
        }
        events.reverse();
        events
    }
}

impl Version {
    fn new(name: &str, watched: &Watched) -> Self {
        let columns = watched.names();
        Self {
            name: name.to_owned(),
            digest: watched.digest.clone(),
            judge: Judge::new(columns.len()),
            columns,
            open: OpenWindow::new(watched),
            windows: 0,
            incident: None,
            history: VecDeque::new(),
            asked: false,
            seen: 0,
            quiet_elsewhere: 0,
        }
    }

    /// Judges the open window and starts the next one. Answers also, column by column, with whether it looks quiet.
    pub(super) fn close<'a>(
        &mut self,
        settings: &'a Settings,
        watched: &Watched,
    ) -> (Window<'a>, HashMap<String, bool>) {
        let open = std::mem::replace(&mut self.open, OpenWindow::new(watched));
        self.windows += 1;
        let samples = open.samples(watched, &settings.rule);
        let verdicts = self.judge.window(&settings.rule, &samples, open.from);
        let mut columns = open.evidence(watched, &samples, &verdicts);
        let quiet =
            columns.iter().zip(&verdicts).map(|(column, verdict)| (column.name.clone(), verdict.quiet)).collect();
        let mut joined: Vec<(f64, String)> = columns
            .iter()
            .zip(&verdicts)
            .filter(|(_, verdict)| verdict.joined)
            .map(|(column, verdict)| (verdict.ln_e_value, column.name.clone()))
            .collect();
        joined.sort_by(|a, b| b.0.total_cmp(&a.0));
        columns.sort_by(|a, b| {
            b.drifted.cmp(&a.drifted).then(b.e_value.total_cmp(&a.e_value)).then(b.psi.total_cmp(&a.psi))
        });

        let features = columns.iter().filter(|column| column.drifted && column.name != SCORE).count();
        self.history.push_back(WindowFacts {
            drifted_features: u32::try_from(features).unwrap_or(u32::MAX),
            score_drifted: columns.iter().any(|column| column.drifted && column.name == SCORE),
            max_psi: columns.iter().map(|column| column.psi).fold(0.0, f64::max),
        });
        let kept = settings.retraining.as_ref().map_or(1, |retraining| retraining.policy.windows());
        while self.history.len() > kept {
            self.history.pop_front();
        }
        let joined = joined.into_iter().map(|(_, name)| name).collect();
        (Window { settings, open, columns, joined, number: self.windows, version: self.name.clone() }, quiet)
    }

    /// Opens, goes on with or resolves the version's incident.
    pub(super) fn incident_event(&mut self, window: &Window<'_>) -> Option<DriftEvent> {
        let drifted: Vec<&str> = window.drifted().collect();
        match (&mut self.incident, drifted.is_empty()) {
            (None, true) => None,
            (None, false) => {
                let incident = Incident {
                    id: window.incident_id(),
                    since: window.since(),
                    columns: drifted.iter().map(|name| (*name).to_owned()).collect(),
                };
                let event = window.event(&incident, IncidentState::Opened, format!("{} moved", several(&drifted)));
                self.incident = Some(incident);
                Some(event)
            }
            (Some(incident), false) if !window.joined.is_empty() => {
                for name in &window.joined {
                    if !incident.columns.contains(name) {
                        incident.columns.push(name.clone());
                    }
                }
                incident.since = incident.since.min(window.since());
                let joined: Vec<&str> = window.joined.iter().map(String::as_str).collect();
                let reason = format!("{} moved too: {} columns now", several(&joined), drifted.len());
                Some(window.event(incident, IncidentState::Ongoing, reason))
            }
            (Some(_), false) => None,
            (Some(_), true) => {
                let incident = self.incident.take()?;
                let reason = "all columns are back within the tolerance".to_owned();
                Some(window.event(&incident, IncidentState::Resolved, reason))
            }
        }
    }

    /// Asks for retraining where the policy says so: once an incident, and not within the cooldown after the last time.
    /// `newest`: newest event time seen; `last`: the same when retraining was asked for last.
    pub(super) fn retraining(
        &mut self,
        window: &Window<'_>,
        newest: i64,
        last: Option<i64>,
    ) -> Option<RetrainingEvent> {
        let Settings { retraining, pipeline, definition, model, .. } = window.settings;
        let retraining = retraining.as_ref()?;
        let holds = retraining.policy.holds(&self.history);
        if self.asked {
            self.asked = holds || self.incident.is_some();
            return None;
        }
        if !holds || last.is_some_and(|last| newest < last.saturating_add(retraining.cooldown_ms)) {
            return None;
        }
        self.asked = true;
        let incident = self.incident.as_ref();
        let cause = incident.map_or_else(|| window.incident_id(), |incident| incident.id.clone());
        let id = hex::encode(&Sha256::digest(format!("retraining\n{cause}"))[..8]);
        Some(RetrainingEvent {
            id: format!("{pipeline}-r-{id}"),
            pipeline: pipeline.clone(),
            definition: definition.clone(),
            model: model.clone(),
            model_version: self.name.clone(),
            cause: "drift".to_owned(),
            policy: retraining.policy.text().to_owned(),
            incident_id: incident.map(|incident| incident.id.clone()),
            drifted: window.drifted().map(str::to_owned).collect(),
            since: incident.map_or(window.open.from, |incident| incident.since),
            train_from: newest.saturating_sub(retraining.lookback_ms),
            asked_at: newest,
        })
    }
}

impl Window<'_> {
    fn drifted(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().filter(|column| column.drifted).map(|column| column.name.as_str())
    }

    /// Start of the evidence of what drifts now.
    fn since(&self) -> i64 {
        let since = self.columns.iter().filter(|column| column.drifted).filter_map(|column| column.since);
        since.min().unwrap_or(self.open.from)
    }

    /// The same for the same window of the same predictions, whenever it is computed.
    fn incident_id(&self) -> String {
        let Settings { pipeline, model, .. } = self.settings;
        let evidence = sonic_rs::to_string(&self.open.evidence).expect("integers always have a JSON form");
        let text = format!("{pipeline}\n{model}\n{}\n{}\n{evidence}", self.version, self.number);
        let hash = hex::encode(&Sha256::digest(text)[..4]);
        format!("{pipeline}-v{}-w{}-{hash}", self.version, self.number)
    }

    fn event(&self, incident: &Incident, state: IncidentState, reason: String) -> DriftEvent {
        DriftEvent {
            incident_id: incident.id.clone(),
            state,
            pipeline: self.settings.pipeline.clone(),
            model: self.settings.model.clone(),
            model_version: self.version.clone(),
            window: self.number,
            rows: self.open.rows,
            from: self.open.from,
            to: self.open.to,
            since: incident.since,
            reason,
            columns: self.columns.clone(),
            alpha: self.settings.rule.alpha,
            tolerance: self.settings.rule.tolerance,
            evidence: self.open.evidence.clone(),
        }
    }
}

/// `spend_mean_30d`, `spend_mean_30d and spend_max_30d`, `spend_mean_30d and 4 more columns`.
fn several(names: &[&str]) -> String {
    let name = |name: &str| if name == SCORE { "the prediction".to_owned() } else { name.to_owned() };
    match names {
        [] => "nothing".to_owned(),
        [only] => name(only),
        [first, second] => format!("{} and {}", name(first), name(second)),
        [first, rest @ ..] => format!("{} and {} more columns", name(first), rest.len()),
    }
}
