//! What this process may do with its definition: publish, or follow the version that does.
//!
//! The newest record of the offline store says which version serves ([`Versions`]). A process asks it
//!
//! - at its start;
//! - about once a second: where the answer is another, it ends in order (open batch, checkpoint, commit, leaving the group);
//! - **each time partitions are assigned to it**, before it builds a task. That closes the race. An owner of version N + 1
//!   has read a record that names it after the partition became its own. Whoever gets the partition after it is assigned it
//!   later still, and reads that record or a newer one; so no process of version N gets to publish again. And one that was
//!   its owner before has lost the partition: its transactions carry an older generation of the group, which the broker
//!   refuses. Each partition changes the version at one offset.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::RunError;
use super::context::{Context, RunOptions};
use crate::config::plan::Plan;
use crate::runtime::clock;
use crate::runtime::failpoint;
use crate::runtime::shutdown::Stop;
use crate::store::{Definition, OfflineError, OfflineStore, Role, Versions};
use crate::telemetry::board::Kind;

/// How often the record is asked for.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Topics of the sources, for the record.
pub(super) fn topics(plan: &Plan) -> Vec<String> {
    plan.sources.iter().map(|source| source.topic.to_string()).collect()
}

/// The role of a process that computes features; writes the pipeline's first record where there is none.
///
/// # Errors
/// A definition that is none of the pipeline's versions, without `--rebuild`.
pub(super) fn begin(plan: &Plan, offline: &OfflineStore, options: &RunOptions) -> Result<Role, RunError> {
    let definition = Definition::of(plan);
    loop {
        let now = clock::now_ms();
        let record = match offline.versions()? {
            None => {
                let (definitions, _) = offline.checkpointed()?;
                if let Some(saved) = definitions.into_iter().find(|saved| *saved != plan.definition)
                    && !options.rebuild
                {
                    return Err(RunError::NoVersion { serving: 1, saved, now: definition.to_string() });
                }
                Versions::first(&plan.name, &definition, topics(plan), now)
            }
            Some(versions) => match versions.role(&definition) {
                Role::Unknown { .. } if options.rebuild => versions.rebuilt(&definition, topics(plan), now),
                Role::Unknown { .. } => return Err(no_version(plan, &versions)),
                role => return Ok(role),
            },
        };
        // Where another process was faster, its record is as good.
        if offline.record_versions(&record)? {
            return Ok(record.role(&definition));
        }
    }
}

/// The definition is none of these versions.
pub(super) fn no_version(plan: &Plan, versions: &Versions) -> RunError {
    let saved = versions.number(versions.serving).map(|v| v.recorded().to_string()).unwrap_or_default();
    RunError::NoVersion { serving: versions.serving, saved, now: Definition::of(plan).to_string() }
}

impl Context {
    /// True where this process publishes nothing.
    pub fn is_following(&self) -> bool {
        self.wiring.role.is_following() && self.stages.features
    }

    /// True once the run has ended, or is to end, because the version's role is another.
    pub fn has_new_role(&self) -> bool {
        self.new_role.load(Ordering::Acquire) || self.others.iter().any(|other| other.has_new_role())
    }

    /// Asks whether the version's role is still what it was when the run began; where not, the run is asked to end.
    ///
    /// # Errors
    /// [`RunError::Interrupted`] where a stop came while the offline store was away.
    pub(super) fn keeps_role(&self) -> Result<bool, RunError> {
        let role = self.hold("offline", OfflineError::is_retriable, || self.wiring.offline.role())?;
        Ok(self.compare_role(role))
    }

    /// As [`Context::keeps_role`], of an answer.
    fn compare_role(&self, role: Role) -> bool {
        if role == self.wiring.role {
            return true;
        }
        if !self.new_role.swap(true, Ordering::AcqRel) {
            self.board.say(Kind::Stage, None, format!("{}; ending in order", told(role, self.wiring.role.version())));
        }
        self.stop.request();
        false
    }

    /// Asks from time to time until `finished`.
    pub(super) fn watch_role(&self, finished: &Stop) {
        while !finished.wait(ASK_EVERY) {
            // The failpoint is a process that is late to learn of a switch.
            if failpoint::hit("role.watch") {
                continue;
            }
            match self.wiring.offline.role() {
                Ok(role) if !self.compare_role(role) => return,
                Ok(_) => {}
                // Whoever needs the store says that it is away.
                Err(error) => tracing::debug!("which version serves could not be asked: {error}"),
            }
        }
    }

    /// Topics of the sources that the serving version reads, too.
    pub(super) fn followed_topics(&self) -> Result<Vec<Arc<str>>, RunError> {
        let versions = self.hold("offline", OfflineError::is_retriable, || self.wiring.offline.versions())?;
        let serving = versions.as_ref().and_then(|versions| versions.number(versions.serving));
        let read = |topic: &Arc<str>| serving.is_some_and(|serving| serving.topics.iter().any(|t| **t == **topic));
        Ok(self.source_topics().into_iter().filter(read).collect())
    }

    /// Consumer group of a stage. The version that serves has the pipeline's own group for its features, whichever it is;
    /// those that follow have one each. The scoring stage reads a topic of its version, in a group of its version.
    pub(super) fn group(&self, stage: &str) -> String {
        let group = self.plan.group(stage);
        match self.wiring.role {
            Role::Following { version, .. } if self.stages.features => format!("{group}.v{version}"),
            role if stage == "score" => versioned(group, role.version()),
            _ => group,
        }
    }

    /// Topic of feature rows between the stages: those of different definitions do not mix.
    pub(super) fn features_topic(&self) -> String {
        self.out_topic(&versioned(self.plan.features_topic(), self.wiring.role.version()))
    }

    /// Where output for a topic goes: beside it, where this process follows.
    pub(super) fn out_topic(&self, topic: &str) -> String {
        match self.wiring.role {
            Role::Following { version, .. } if self.stages.features => format!("{topic}.shadow-v{version}"),
            _ => topic.to_owned(),
        }
    }

    /// True where nothing at all is written to topics.
    pub(super) fn is_silent(&self) -> bool {
        self.is_following() && !self.options.shadow_topics
    }
}

/// A name that the first version has as it is.
fn versioned(name: String, version: u32) -> String {
    if version > 1 { format!("{name}.v{version}") } else { name }
}

fn told(role: Role, own: u32) -> String {
    match role {
        Role::Serving { version, .. } if version == own => format!("version {own} serves now"),
        Role::Serving { version: serving, .. } | Role::Following { serving, .. } | Role::Unknown { serving, .. } => {
            format!("version {own} does not serve any more, version {serving} does")
        }
    }
}
