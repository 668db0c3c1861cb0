//! Versions of a pipeline's definition: which one serves, which are prepared beside it, and since when.
//!
//! ```text
//! <url>/<pipeline>/versions/<sequence>.json     one record a change; the newest holds
//!                  features/ state/ manifest/   files of version 1
//!                  v2/features/ …               files of version 2, and so on
//! ```
//!
//! A record is created only if nobody else has (as a manifest is), and never removed: of two who change something at once,
//! one is refused, and the records tell what happened when. A pipeline without records has one version, its first.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::manifest::sequence_of;
use super::offline::{OfflineError, OfflineStore, Record};
use crate::config::plan::Plan;
use crate::runtime::{clock, failpoint};

/// Folder of the records.
const FOLDER: &str = "versions";

/// All versions of a pipeline, as of one change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versions {
    /// Version of this format.
    pub format: u32,
    /// Pipeline.
    pub pipeline: String,
    /// Number of this record, from 1, without gaps.
    pub sequence: u64,
    /// When it was written, by the wall clock, milliseconds since 1970 UTC.
    pub at: i64,
    /// What it changed.
    pub action: Action,
    /// Number of the version that publishes.
    pub serving: u32,
    /// The version that served before the last switch, where it has not been dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<u32>,
    /// How often the serving version has changed.
    pub epoch: u32,
    /// All versions that ever were, by number.
    pub versions: Vec<Version>,
}

/// What a record changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The first version began.
    Began,
    /// A version was prepared beside the one that serves.
    Bootstrapped,
    /// Another version serves.
    Switched,
    /// The previous version serves again.
    RolledBack,
    /// A version's files were removed.
    Dropped,
    /// The serving version was recomputed with another definition (`--rebuild`).
    Rebuilt,
}

/// What tells one version from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Hash of all that decides features.
    pub features: String,
    /// Hash of `[windows]`; empty where there are none.
    pub windows: String,
}

impl Definition {
    /// A plan's.
    pub fn of(plan: &Plan) -> Self {
        Self { features: plan.definition.clone(), windows: plan.windows_definition() }
    }
}

impl fmt::Display for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { features, windows } = self;
        if windows.is_empty() { f.write_str(features) } else { write!(f, "{features} with windows {windows}") }
    }
}

/// One definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version {
    /// Number, from 1.
    pub number: u32,
    /// Hash of the features' definition.
    pub definition: String,
    /// Hash of `[windows]`, empty where there are none; `None` in records from before they were part of a version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub windows: Option<String>,
    /// Topics of its sources.
    pub topics: Vec<String>,
    /// When it was prepared, milliseconds since 1970 UTC.
    pub created_at: i64,
    /// When it last began to serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_from: Option<i64>,
    /// When it last ceased to serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_to: Option<i64>,
    /// When its files were removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped_at: Option<i64>,
}

/// What a process with a given definition may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It publishes.
    Serving {
        /// Its version.
        version: u32,
        /// How often the serving version has changed.
        epoch: u32,
    },
    /// It keeps its state and its files beside the version that serves, and publishes nothing.
    Following {
        /// Its version.
        version: u32,
        /// The one that serves.
        serving: u32,
    },
    /// The definition is none of the pipeline's versions.
    Unknown {
        /// The version that serves.
        serving: u32,
        /// How often the serving version has changed.
        epoch: u32,
    },
}

impl Role {
    /// Number of the version.
    pub fn version(self) -> u32 {
        match self {
            Self::Serving { version, .. } | Self::Following { version, .. } => version,
            Self::Unknown { serving, .. } => serving,
        }
    }

    /// How often the serving version had changed when the version began to serve; 0 where it does not.
    pub fn epoch(self) -> u32 {
        match self {
            Self::Serving { epoch, .. } | Self::Unknown { epoch, .. } => epoch,
            Self::Following { .. } => 0,
        }
    }

    /// True where the process publishes nothing.
    pub fn is_following(self) -> bool {
        matches!(self, Self::Following { .. })
    }
}

impl Record for Versions {
    const FORMAT: u32 = Self::FORMAT;

    fn format(&self) -> u32 {
        self.format
    }
}

impl Versions {
    /// Version of the format that this driftline writes, and the only one it reads.
    pub const FORMAT: u32 = 1;

    /// The record of a pipeline's first version.
    pub fn first(pipeline: &str, definition: &Definition, topics: Vec<String>, at: i64) -> Self {
        let version = Version { served_from: Some(at), ..Version::new(1, definition, topics, at) };
        Self {
            format: Self::FORMAT,
            pipeline: pipeline.to_owned(),
            sequence: 1,
            at,
            action: Action::Began,
            serving: 1,
            previous: None,
            epoch: 0,
            versions: vec![version],
        }
    }

    /// The version of a definition: the newest of those that are not dropped. One whose windows are not known is meant where
    /// no other is.
    pub fn of(&self, definition: &Definition) -> Option<&Version> {
        let unknown = |v: &&Version| v.windows.is_none() && v.definition == definition.features;
        self.exactly(definition).or_else(|| self.kept().rev().find(unknown))
    }

    fn exactly(&self, definition: &Definition) -> Option<&Version> {
        self.kept().rev().find(|v| v.is(definition))
    }

    fn kept(&self) -> impl DoubleEndedIterator<Item = &Version> {
        self.versions.iter().filter(|v| v.dropped_at.is_none())
    }

    /// A version by its number, where it is not dropped.
    pub fn number(&self, number: u32) -> Option<&Version> {
        self.kept().find(|v| v.number == number)
    }

    /// What a process with this definition may do.
    pub fn role(&self, definition: &Definition) -> Role {
        let serving = self.serving;
        match self.of(definition) {
            // Of two with one definition, the one that serves is meant.
            _ if self.number(serving).is_some_and(|v| v.is(definition)) => {
                Role::Serving { version: serving, epoch: self.epoch }
            }
            Some(version) if version.number == serving => Role::Serving { version: serving, epoch: self.epoch },
            Some(version) => Role::Following { version: version.number, serving },
            None => Role::Unknown { serving, epoch: self.epoch },
        }
    }

    /// The record with one version more, and its number. `None` where the definition has one already.
    pub fn bootstrapped(&self, definition: &Definition, topics: Vec<String>, at: i64) -> Option<(Self, u32)> {
        if self.exactly(definition).is_some() {
            return None;
        }
        let number = self.versions.iter().map(|v| v.number).max().unwrap_or(0) + 1;
        let mut next = self.next(Action::Bootstrapped, at);
        next.versions.push(Version::new(number, definition, topics, at));
        Some((next, number))
    }

    /// The record with another version serving. `None` where there is no such version, or it serves already.
    pub fn switched(&self, to: u32, action: Action, at: i64) -> Option<Self> {
        if to == self.serving || self.number(to).is_none() {
            return None;
        }
        let mut next = self.next(action, at);
        next.previous = Some(self.serving);
        next.serving = to;
        next.epoch += 1;
        for version in &mut next.versions {
            if version.number == to {
                version.served_from = Some(at);
            } else if version.number == self.serving {
                version.served_to = Some(at);
            }
        }
        Some(next)
    }

    /// The record without a version. `None` where there is no such version, or it serves.
    pub fn dropped(&self, number: u32, at: i64) -> Option<Self> {
        if number == self.serving || self.number(number).is_none() {
            return None;
        }
        let mut next = self.next(Action::Dropped, at);
        next.previous = next.previous.filter(|previous| *previous != number);
        next.versions.iter_mut().filter(|v| v.number == number).for_each(|v| v.dropped_at = Some(at));
        Some(next)
    }

    /// The record with another definition of the serving version.
    pub fn rebuilt(&self, definition: &Definition, topics: Vec<String>, at: i64) -> Self {
        let mut next = self.next(Action::Rebuilt, at);
        for version in next.versions.iter_mut().filter(|v| v.number == self.serving) {
            version.definition.clone_from(&definition.features);
            version.windows = Some(definition.windows.clone());
            version.topics.clone_from(&topics);
        }
        next
    }

    fn next(&self, action: Action, at: i64) -> Self {
        Self { sequence: self.sequence + 1, action, at, ..self.clone() }
    }
}

impl Version {
    fn new(number: u32, definition: &Definition, topics: Vec<String>, at: i64) -> Self {
        Self {
            number,
            definition: definition.features.clone(),
            windows: Some(definition.windows.clone()),
            topics,
            created_at: at,
            served_from: None,
            served_to: None,
            dropped_at: None,
        }
    }

    /// What it was recorded with.
    pub fn recorded(&self) -> Definition {
        Definition { features: self.definition.clone(), windows: self.windows.clone().unwrap_or_default() }
    }

    /// True where it is of this definition. One whose windows are not known is taken to have none.
    pub fn is(&self, definition: &Definition) -> bool {
        self.definition == definition.features && self.windows.as_deref().unwrap_or_default() == definition.windows
    }
}

/// Folder of a version's files below the pipeline's; `None` for the first, whose files lie in the pipeline's own.
pub(super) fn folder(number: u32) -> Option<String> {
    (number > 1).then(|| format!("v{number}"))
}

fn path(sequence: u64) -> String {
    format!("{FOLDER}/{sequence:020}.json")
}

/// Says that a version's rows have come to the online store after the switch numbered `epoch`.
fn handed_over(epoch: u32, partition: i32) -> String {
    format!("online/epoch={epoch}/partition={partition}")
}

impl OfflineStore {
    /// The newest record of the pipeline's versions; `None` where there is none yet.
    ///
    /// # Errors
    /// Where the store does not answer, or a record is not one of this pipeline and format.
    pub fn versions(&self) -> Result<Option<Versions>, OfflineError> {
        let root = self.root();
        let files = root.files_in(FOLDER)?;
        for path in files.iter().rev().filter(|path| path.ends_with(".json") && sequence_of(path).is_some()) {
            let Some(versions) = root.read_record::<Versions>(path)? else { continue };
            if versions.pipeline != self.pipeline || sequence_of(path) != Some(versions.sequence) {
                return Err(OfflineError::moved(path));
            }
            return Ok(Some(versions));
        }
        Ok(None)
    }

    /// Makes a record the newest, on disk when this returns. False where somebody else has written one since.
    ///
    /// # Errors
    /// Where the store does not answer: the record is written or not, and [`OfflineStore::versions`] tells.
    pub fn record_versions(&self, versions: &Versions) -> Result<bool, OfflineError> {
        let path = path(versions.sequence);
        failpoint::hit("versions.before_record");
        let text = serde_json::to_vec_pretty(versions).expect("a record is plain data");
        let written = self.root().put_new(&path, text)?;
        failpoint::hit("versions.recorded");
        Ok(written)
    }

    /// What a process with the store's definition may do. Without a record it is the first version, which serves.
    ///
    /// # Errors
    /// As [`OfflineStore::versions`].
    pub fn role(&self) -> Result<Role, OfflineError> {
        Ok(self.versions()?.map_or(Role::Serving { version: 1, epoch: 0 }, |v| v.role(&self.definition)))
    }

    /// True once [`OfflineStore::hand_over`] was called for this switch and partition.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub fn is_handed_over(&self, epoch: u32, partition: i32) -> Result<bool, OfflineError> {
        // Before the first switch there is nothing to hand over.
        Ok(epoch == 0 || self.root().get(&handed_over(epoch, partition))?.is_some())
    }

    /// Says that the online store has all of a partition's rows since the switch numbered `epoch`.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub fn hand_over(&self, epoch: u32, partition: i32) -> Result<(), OfflineError> {
        let text = serde_json::json!({ "at": clock::now_ms(), "definition": self.definition.features });
        self.root().put_new(&handed_over(epoch, partition), text.to_string().into_bytes())?;
        Ok(())
    }

    /// Definitions of the newest checkpoints, and the topics they know.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub fn checkpointed(&self) -> Result<(BTreeSet<String>, BTreeSet<String>), OfflineError> {
        let found = self.summary()?;
        let topics = found.iter().flat_map(|partition| partition.next.keys().map(|at| at.topic.to_string())).collect();
        Ok((found.into_iter().map(|partition| partition.definition).collect(), topics))
    }

    /// Removes a version's files: rows, states and manifests. Returns their number.
    ///
    /// # Errors
    /// Where the store does not answer. What is left is removed by the next call.
    pub fn remove_version(&self, number: u32) -> Result<usize, OfflineError> {
        let root = self.root();
        let below = folder(number).map_or_else(String::new, |folder| format!("{folder}/"));
        let mut removed = 0;
        // Manifests first: what they name may only go after them.
        for part in ["manifest", "state", "features", "windows"] {
            for path in root.files_in(&format!("{below}{part}"))? {
                root.delete(&object_store::path::Path::from(path))?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(features: &str, windows: &str) -> Definition {
        Definition { features: features.into(), windows: windows.into() }
    }

    fn first() -> Versions {
        Versions::first("p", &definition("a", ""), vec!["t".into()], 1)
    }

    #[test]
    fn a_version_is_prepared_serves_and_gives_way_again() {
        let v1 = first();
        assert_eq!(v1.role(&definition("a", "")), Role::Serving { version: 1, epoch: 0 });
        assert_eq!(v1.role(&definition("b", "")), Role::Unknown { serving: 1, epoch: 0 });
        let (both, number) = v1.bootstrapped(&definition("b", ""), vec!["t".into()], 2).unwrap();
        assert_eq!((number, both.sequence), (2, 2));
        assert_eq!(both.bootstrapped(&definition("b", ""), Vec::new(), 3), None, "it has a version");
        assert_eq!(both.role(&definition("b", "")), Role::Following { version: 2, serving: 1 });

        let switched = both.switched(2, Action::Switched, 4).unwrap();
        assert_eq!(switched.role(&definition("b", "")), Role::Serving { version: 2, epoch: 1 });
        assert_eq!(switched.role(&definition("a", "")), Role::Following { version: 1, serving: 2 });
        assert_eq!((switched.previous, switched.versions[0].served_to), (Some(1), Some(4)));
        assert_eq!(switched.switched(2, Action::Switched, 5), None, "it serves");
        assert_eq!(switched.switched(3, Action::Switched, 5), None, "there is none");
        assert_eq!(switched.dropped(2, 5), None, "it serves");

        let back = switched.switched(1, Action::RolledBack, 6).unwrap();
        assert_eq!((back.role(&definition("a", "")), back.previous), (Role::Serving { version: 1, epoch: 2 }, Some(2)));
        let dropped = back.dropped(2, 7).unwrap();
        assert_eq!(
            (dropped.role(&definition("b", "")), dropped.previous),
            (Role::Unknown { serving: 1, epoch: 2 }, None)
        );
        assert_eq!(dropped.switched(2, Action::Switched, 8), None, "its files are gone");
        let (again, number) = dropped.bootstrapped(&definition("b", ""), Vec::new(), 9).unwrap();
        assert_eq!(number, 3, "numbers are not used again");
        assert_eq!(again.role(&definition("b", "")), Role::Following { version: 3, serving: 1 });
    }

    #[test]
    fn a_rebuild_keeps_the_number() {
        let rebuilt = first().rebuilt(&definition("c", ""), vec!["u".into()], 5);
        assert_eq!(rebuilt.role(&definition("c", "")), Role::Serving { version: 1, epoch: 0 });
        assert_eq!(rebuilt.role(&definition("a", "")), Role::Unknown { serving: 1, epoch: 0 });
        assert_eq!(rebuilt.versions[0].topics, ["u"]);
    }

    #[test]
    fn other_windows_are_another_version() {
        let (one, two) = (definition("a", "w"), definition("a", "x"));
        let v1 = Versions::first("p", &one, Vec::new(), 1);
        assert_eq!(v1.role(&one), Role::Serving { version: 1, epoch: 0 });
        for other in [&two, &definition("a", "")] {
            assert_eq!(v1.role(other), Role::Unknown { serving: 1, epoch: 0 });
        }
        let (both, _) = v1.bootstrapped(&two, Vec::new(), 2).unwrap();
        assert_eq!((both.role(&one).version(), both.role(&two)), (1, Role::Following { version: 2, serving: 1 }));

        // In a record from before, what serves is of any windows, until there is one that says that it is of these.
        let mut before = v1.clone();
        before.versions[0].windows = None;
        assert_eq!((before.role(&one), before.role(&two)), (v1.role(&one), v1.role(&one)));
        let (both, _) = before.bootstrapped(&two, Vec::new(), 2).unwrap();
        assert_eq!((both.role(&one), both.role(&two)), (v1.role(&one), Role::Following { version: 2, serving: 1 }));
        assert_eq!(before.bootstrapped(&definition("a", ""), Vec::new(), 2), None, "nothing is known to have changed");
    }

    #[test]
    fn a_record_round_trips() {
        let (record, _) = first().bootstrapped(&definition("b", ""), Vec::new(), 2).unwrap();
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Versions>(&text).unwrap(), record);
    }
}
