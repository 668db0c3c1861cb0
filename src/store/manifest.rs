//! The manifest: one file that commits a task's state, its offline files and its offsets together. Pure.
//!
//! | state of the files after a crash | what holds |
//! |---|---|
//! | parts of the state written, no manifest | the previous checkpoint; the parts are swept |
//! | feature rows written, no manifest | the previous checkpoint; the rows file is swept |
//! | the rest of the state written too, no manifest | the previous checkpoint; all these files are swept |
//! | manifest written | the new checkpoint |

use serde::{Deserialize, Serialize};

use super::offline::Record;
use crate::broker::{NextOffset, Offsets, TopicPartition};

/// Manifests, and states, that are kept: the newest and those before it.
pub(super) const KEPT: usize = 3;

/// One checkpoint of one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// Pipeline.
    pub pipeline: String,
    /// Hash of the feature definitions that state and rows were computed with.
    pub definition: String,
    /// Hash of the definition of emitted windows, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub windows_definition: Option<String>,
    /// Partition number of the task.
    pub partition: i32,
    /// Number of this checkpoint, from 1, without gaps.
    pub sequence: u64,
    /// When it was taken, by the wall clock, milliseconds since 1970 UTC.
    pub created_at: i64,
    /// First offset of each source that is not in the state yet.
    #[serde(with = "offsets")]
    pub next: Offsets,
    /// The whole state, or the first part of it; `None` where there was nothing to keep.
    pub state: Option<StateFile>,
    /// State files to be read after it, in this order: its other parts, then what changed since, one checkpoint after the
    /// other. Their number is bounded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub updates: Vec<StateFile>,
    /// All feature rows of this task up to `next`, oldest file first.
    pub files: Vec<DataFile>,
    /// All rows of emitted windows of this task up to `next`, oldest file first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub windows: Vec<WindowFile>,
}

/// A file of task state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// Path below the pipeline's folder.
    pub path: String,
    /// Rows.
    pub rows: u64,
    /// Size.
    pub bytes: u64,
}

/// A file of feature rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// Path below the pipeline's folder.
    pub path: String,
    /// Hash of the feature definitions that the rows were computed with.
    pub definition: String,
    /// Rows.
    pub rows: u64,
    /// Size.
    pub bytes: u64,
    /// Earliest event time in the file, milliseconds since 1970 UTC (inclusive).
    pub from: i64,
    /// Latest event time in the file (inclusive).
    pub to: i64,
}

/// A file of rows of emitted windows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowFile {
    /// Name of the windows.
    pub window: String,
    /// Path below the pipeline's folder.
    pub path: String,
    /// Rows.
    pub rows: u64,
    /// Size.
    pub bytes: u64,
    /// Earliest end of a window in the file, milliseconds since 1970 UTC (inclusive).
    pub from: i64,
    /// Latest end of a window in the file (inclusive).
    pub to: i64,
}

impl Record for Manifest {
    const FORMAT: u32 = Self::FORMAT;

    fn format(&self) -> u32 {
        self.format
    }
}

impl Manifest {
    /// Version of the format that this driftline writes, and the only one it reads.
    pub const FORMAT: u32 = 1;

    /// All files of the state, in the order to read them.
    pub fn state_files(&self) -> impl Iterator<Item = &StateFile> {
        self.state.iter().chain(&self.updates)
    }

    /// Feature rows over all files.
    pub fn rows(&self) -> u64 {
        self.files.iter().map(|f| f.rows).sum()
    }
}

/// Offsets as a list, because JSON's keys are texts.
mod offsets {
    use super::{Deserialize, NextOffset, Offsets, Serialize, TopicPartition};
    use serde::{Deserializer, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Entry {
        topic: std::sync::Arc<str>,
        partition: i32,
        offset: i64,
    }

    pub fn serialize<S: Serializer>(offsets: &Offsets, out: S) -> Result<S::Ok, S::Error> {
        out.collect_seq(offsets.iter().map(|(at, next)| Entry {
            topic: at.topic.clone(),
            partition: at.partition,
            offset: next.0,
        }))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Offsets, D::Error> {
        let entries = Vec::<Entry>::deserialize(input)?;
        Ok(entries.into_iter().map(|e| (TopicPartition::new(e.topic, e.partition), NextOffset(e.offset))).collect())
    }
}

/// Folder of a partition's manifests.
pub(super) fn manifest_folder(partition: i32) -> String {
    format!("manifest/partition={partition}")
}

/// Folder of a partition's feature rows.
pub(super) fn rows_folder(partition: i32) -> String {
    format!("features/partition={partition}")
}

/// Folder of the rows of emitted windows.
pub(super) const WINDOWS: &str = "windows";

/// Folder of a partition's rows of emitted windows.
pub(super) fn windows_folder(window: &str, partition: i32) -> String {
    format!("{WINDOWS}/{window}/partition={partition}")
}

/// Folder of a partition's states.
pub(super) fn state_folder(partition: i32) -> String {
    format!("state/partition={partition}")
}

/// Path of a manifest. It has no unique part: whoever writes it first owns this checkpoint.
pub(super) fn manifest_path(partition: i32, sequence: u64) -> String {
    format!("{}/{sequence:020}.json", manifest_folder(partition))
}

/// Name of a data file. The unique part keeps a stopped owner of the partition, which may yet wake up, from overwriting
/// what its successor writes for the same checkpoint.
pub(super) fn data_file_name(sequence: u64, unique: u32) -> String {
    format!("{sequence:020}-{unique:08x}.arrow")
}

/// Name of a part of a checkpoint's state, counted from 0.
pub(super) fn part_file_name(sequence: u64, unique: u32, part: usize) -> String {
    format!("{sequence:020}-{unique:08x}-{part}.arrow")
}

/// The checkpoint that a file belongs to, by its name.
pub(super) fn sequence_of(path: &str) -> Option<u64> {
    let name = path.rsplit('/').next()?;
    let digits = name.get(..20)?;
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_round_trips_and_its_text_is_stable() {
        let manifest = Manifest {
            format: Manifest::FORMAT,
            pipeline: "churn".into(),
            definition: "00ff".into(),
            windows_definition: None,
            partition: 3,
            sequence: 7,
            created_at: 1_700_000_000_000,
            next: [(TopicPartition::new("purchases", 3), NextOffset(41))].into(),
            state: Some(StateFile { path: "state/partition=3/x.arrow".into(), rows: 1, bytes: 2 }),
            updates: Vec::new(),
            files: vec![DataFile {
                path: "features/partition=3/x.arrow".into(),
                definition: "00ff".into(),
                rows: 5,
                bytes: 6,
                from: -1,
                to: 9,
            }],
            windows: Vec::new(),
        };
        let text = serde_json::to_string(&manifest).unwrap();
        assert_eq!(
            text,
            r#"{"format":1,"pipeline":"churn","definition":"00ff","partition":3,"sequence":7,"created_at":1700000000000,"next":[{"topic":"purchases","partition":3,"offset":41}],"state":{"path":"state/partition=3/x.arrow","rows":1,"bytes":2},"files":[{"path":"features/partition=3/x.arrow","definition":"00ff","rows":5,"bytes":6,"from":-1,"to":9}]}"#
        );
        assert_eq!(serde_json::from_str::<Manifest>(&text).unwrap(), manifest);
        let update = StateFile { path: "state/partition=3/y.arrow".into(), rows: 3, bytes: 4 };
        let manifest = Manifest { updates: vec![update], windows_definition: Some("aa00".into()), ..manifest };
        let text = serde_json::to_string(&manifest).unwrap();
        assert!(
            text.contains(r#","updates":[{"path":"state/partition=3/y.arrow","rows":3,"bytes":4}],"files""#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Manifest>(&text).unwrap(), manifest);
        assert_eq!(manifest.state_files().map(|file| file.bytes).collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn names_tell_their_checkpoint() {
        assert_eq!(manifest_path(3, 7), "manifest/partition=3/00000000000000000007.json");
        assert_eq!(data_file_name(7, 0xabc), "00000000000000000007-00000abc.arrow");
        assert_eq!(sequence_of(&part_file_name(7, 0xabc, 12)), Some(7));
        assert_eq!(sequence_of("a/00000000000000000007-00000abc.arrow"), Some(7));
        assert_eq!(sequence_of("a/notes.txt"), None);
        assert_eq!(sequence_of("a/+0000000000000000007.json"), None);
    }
}
