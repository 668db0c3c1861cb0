//! The monitor's state in its compacted topic: the newest record under the pipeline's name.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::DriftError;
use crate::broker::{Broker, BrokerError, NextOffset, TopicPartition};
use crate::source::skip::nests_too_deeply;

/// Records looked through at the end of the topic before all of it is read.
const NEWEST: i64 = 64;
/// How long one read waits for its first record.
const WAIT: Duration = Duration::from_secs(5);

/// A record of `<pipeline>.monitor-state`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct StateRecord {
    /// Partition of the predictions topic → next offset to read.
    pub(super) offsets: BTreeMap<i32, i64>,
    /// The monitor's snapshot, as JSON text: what it holds is its own affair.
    pub(super) monitor: String,
}

impl StateRecord {
    pub(super) fn to_json(&self) -> String {
        sonic_rs::to_string(self).expect("strings and integers always have a JSON form")
    }
}

/// Reads the newest state of a pipeline, or `None` where there is none yet.
pub(super) fn newest(broker: &dyn Broker, topic: &str, pipeline: &str) -> Result<Option<StateRecord>, DriftError> {
    let info = broker.topic(topic)?;
    let info = info.ok_or_else(|| BrokerError::NoSuchTopic { topic: topic.to_owned(), broker: broker.describe() })?;
    let Some(&(earliest, end)) = info.partitions.first() else { return Ok(None) };
    let near = NextOffset(end.0.saturating_sub(NEWEST).max(earliest.0));
    if let Some(record) = newest_from(broker, topic, pipeline, near, end)? {
        return Ok(Some(record));
    }
    if near > earliest { newest_from(broker, topic, pipeline, earliest, near) } else { Ok(None) }
}

fn newest_from(
    broker: &dyn Broker,
    topic: &str,
    pipeline: &str,
    from: NextOffset,
    end: NextOffset,
) -> Result<Option<StateRecord>, DriftError> {
    let partition = TopicPartition::new(topic, 0);
    let mut newest: Option<(i64, Vec<u8>)> = None;
    let mut position = from;
    while position < end {
        let (records, next) = broker.read(&partition, position, 256, WAIT)?;
        for row in 0..records.len() {
            if let (true, Some(value)) = (records.keys.get(row) == Some(pipeline.as_bytes()), records.values.get(row)) {
                newest = Some((records.offsets[row], value.to_vec()));
            }
        }
        // An open transaction may hold the end back: what it writes is not committed, so not the state.
        if next == position {
            break;
        }
        position = next;
    }
    let Some((offset, value)) = newest else { return Ok(None) };
    let damaged = |reason: String| DriftError::State { topic: topic.to_owned(), offset, reason };
    if nests_too_deeply(&value) {
        return Err(damaged("it is nested more deeply than any state".to_owned()));
    }
    sonic_rs::from_slice(&value).map(Some).map_err(|error| damaged(error.to_string()))
}
