//! Dead letters on their topic: the record as it was, with headers that say where it came from and what is wrong.
//!
//! [`read`] goes through them, [`summarise`] groups them, and [`replay`] puts records back where they came from.

mod letters;
mod replay;

use std::borrow::Cow;

use super::fault::reason;
use super::{DeadLetter, dead_letter_headers as names};
use crate::broker::{Header, OutRecord, Records, TopicPartition};

pub use letters::{Filter, Group, Letter, ReadError, Summary, read, replayed, summarise};
pub use replay::{Replay, ReplayError, Replayed, replay};

/// Longest error text that is put into a header: brokers count headers towards the largest message.
const LONGEST_ERROR: usize = 4096;

/// Copies the record at `row` out of a poll, with what is wrong with it.
pub fn from_records(
    records: &Records,
    row: usize,
    stage: &'static str,
    reason: &'static str,
    error: String,
) -> DeadLetter {
    let headers = records
        .headers
        .binary_search_by_key(&row, |(at, _)| *at)
        .map(|found| records.headers[found].1.clone())
        .unwrap_or_default();
    DeadLetter {
        partition: records.partition.clone(),
        offset: records.offsets[row],
        timestamp: records.timestamps[row],
        key: records.keys.get(row).map(<[u8]>::to_vec),
        value: records.values.get(row).map(<[u8]>::to_vec),
        headers,
        stage,
        reason,
        error,
    }
}

impl DeadLetter {
    /// All headers of the dead letter as it is written: the record's own, then driftline's.
    ///
    /// A record that was read from a dead-letter topic and failed again keeps the coordinates of this reading only. One that
    /// was replayed and failed again still says how often that was.
    pub fn out_headers(&self) -> Vec<Header> {
        let mut headers: Vec<Header> = self.headers.iter().filter(|header| !is_ours(&header.name)).cloned().collect();
        let mut add = |name: &str, value: Cow<'_, str>| {
            headers.push(Header { name: name.to_owned(), value: value.into_owned().into_bytes() });
        };
        add(names::TOPIC, Cow::Borrowed(&self.partition.topic));
        add(names::PARTITION, self.partition.partition.to_string().into());
        add(names::OFFSET, self.offset.to_string().into());
        add(names::TIMESTAMP, self.timestamp.to_string().into());
        add(names::STAGE, self.stage.into());
        add(names::REASON, self.reason.into());
        add(names::ERROR, cut(&self.error).into());
        if self.value.is_none() {
            add(names::VALUE, "none".into());
        }
        headers
    }

    /// The record to write to the dead-letter topic. `headers` are those of [`DeadLetter::out_headers`], which the caller
    /// keeps for as long as the record is borrowed.
    ///
    /// A dead letter without a value is written with an empty one: a null would be a tombstone, which compaction removes.
    pub fn to_record<'a>(&'a self, topic: &'a str, headers: &'a [Header]) -> OutRecord<'a> {
        OutRecord {
            topic,
            partition: None,
            key: self.key.as_deref(),
            value: Some(self.value.as_deref().unwrap_or_default()),
            timestamp: None,
            headers,
        }
    }
}

/// A dead letter as read back from its topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredDeadLetter {
    /// Where the record was read.
    pub partition: TopicPartition,
    /// Its offset.
    pub offset: i64,
    /// Its Kafka timestamp, milliseconds; −1 for none.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<Vec<u8>>,
    /// Its value; empty for a record that had none.
    pub value: Vec<u8>,
    /// It had one.
    pub has_value: bool,
    /// Its own headers, without that of [`StoredDeadLetter::replays`].
    pub headers: Vec<Header>,
    /// How often it had been replayed before it was read.
    pub replays: u32,
    /// Stage that gave up.
    pub stage: String,
    /// Fixed word.
    pub reason: String,
    /// What is wrong, for a person.
    pub error: String,
}

/// Reads the record at `row` of a dead-letter topic back. `None` where it lacks driftline's headers.
pub fn read_back(records: &Records, row: usize) -> Option<StoredDeadLetter> {
    let found = records.headers.binary_search_by_key(&row, |(at, _)| *at).ok()?;
    let headers = &records.headers[found].1;
    let text = |name: &str| {
        let header = headers.iter().rev().find(|header| header.name == name)?;
        std::str::from_utf8(&header.value).ok()
    };
    Some(StoredDeadLetter {
        partition: TopicPartition::new(text(names::TOPIC)?, text(names::PARTITION)?.parse().ok()?),
        offset: text(names::OFFSET)?.parse().ok()?,
        timestamp: text(names::TIMESTAMP)?.parse().ok()?,
        key: records.keys.get(row).map(<[u8]>::to_vec),
        value: records.values.get(row).unwrap_or_default().to_vec(),
        // Letters from before there was the header say it by their reason.
        has_value: text(names::VALUE).is_none() && text(names::REASON) != Some(reason::NULL_VALUE),
        headers: headers
            .iter()
            .filter(|header| !is_ours(&header.name) && header.name != names::REPLAYS)
            .cloned()
            .collect(),
        // What others may have written there counts as a first replay: a loop ends sooner, never later.
        replays: text(names::REPLAYS).map_or(0, |count| count.parse().unwrap_or(1)),
        stage: text(names::STAGE)?.to_owned(),
        reason: text(names::REASON)?.to_owned(),
        error: text(names::ERROR)?.to_owned(),
    })
}

impl StoredDeadLetter {
    /// Tells the record that died from every other: its coordinates, and its timestamp, because a topic that was created
    /// anew counts its offsets from zero again. A letter that was written twice has the same identity.
    pub fn identity(&self) -> String {
        format!("{}/{}/{}/{}", self.partition.topic, self.partition.partition, self.offset, self.timestamp)
    }

    /// The value as it was: letters of records without one are written with an empty one.
    pub fn original_value(&self) -> Option<&[u8]> {
        self.has_value.then_some(&*self.value)
    }
}

fn is_ours(name: &str) -> bool {
    use names::{ERROR, OFFSET, PARTITION, REASON, STAGE, TIMESTAMP, TOPIC, VALUE};
    [TOPIC, PARTITION, OFFSET, TIMESTAMP, STAGE, REASON, ERROR, VALUE].contains(&name)
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(LONGEST_ERROR);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, value: &str) -> Header {
        Header { name: name.into(), value: value.into() }
    }

    fn letter() -> DeadLetter {
        let mut records = Records::new(TopicPartition::new("churn.purchases", 3));
        records.push(10, 1_000, Some(b"good"), Some(b"{}"));
        records.push(17, 2_000, Some(b"c1"), Some(b"\xff\x00"));
        records.headers.push((1, vec![header("trace", "abc"), header(names::REASON, "older")]));
        from_records(&records, 1, "decode", "malformed", "not JSON".into())
    }

    #[test]
    fn survives_the_topic() {
        let letter = letter();
        let headers = letter.out_headers();
        let out = letter.to_record("churn.dead-letters", &headers);
        assert_eq!((out.topic, out.partition, out.timestamp), ("churn.dead-letters", None, None));

        let mut stored = Records::new(TopicPartition::new("churn.dead-letters", 0));
        stored.push(0, 5_000, None, Some(b"not a dead letter"));
        stored.push(1, 5_000, out.key, out.value);
        stored.headers.push((1, out.headers.to_vec()));
        assert_eq!(read_back(&stored, 0), None);
        let back = read_back(&stored, 1).unwrap();
        assert_eq!(
            back,
            StoredDeadLetter {
                partition: TopicPartition::new("churn.purchases", 3),
                offset: 17,
                timestamp: 2_000,
                key: Some(b"c1".to_vec()),
                value: b"\xff\x00".to_vec(),
                has_value: true,
                headers: vec![header("trace", "abc")],
                replays: 0,
                stage: "decode".into(),
                reason: "malformed".into(),
                error: "not JSON".into(),
            }
        );
    }

    /// The letter as it reads back.
    fn stored(letter: &DeadLetter) -> StoredDeadLetter {
        let headers = letter.out_headers();
        let out = letter.to_record("t", &headers);
        let mut stored = Records::new(TopicPartition::new("t", 0));
        stored.push(0, 5_000, out.key, out.value);
        stored.headers.push((0, headers.clone()));
        read_back(&stored, 0).unwrap()
    }

    #[test]
    fn counts_replays_beside_the_records_own_headers() {
        for (count, expected) in [("1", 1), ("7", 7), ("-1", 1), ("", 1), ("many", 1)] {
            let letter =
                DeadLetter { headers: vec![header(names::REPLAYS, count), header("trace", "abc")], ..letter() };
            let back = stored(&letter);
            assert_eq!((back.replays, back.headers), (expected, vec![header("trace", "abc")]), "{count:?}");
        }
    }

    #[test]
    fn tells_a_missing_value_from_an_empty_one() {
        let empty = DeadLetter { value: Some(Vec::new()), ..letter() };
        assert_eq!(stored(&empty).original_value(), Some(&[][..]));
        for reason in [reason::NULL_VALUE, reason::NULL_KEY] {
            let missing = DeadLetter { value: None, reason, ..letter() };
            assert_eq!(stored(&missing).original_value(), None, "{reason}");
        }
    }

    #[test]
    fn writes_a_tombstone_as_an_empty_value() {
        let letter = DeadLetter { value: None, key: None, ..letter() };
        let headers = letter.out_headers();
        let out = letter.to_record("t", &headers);
        assert_eq!((out.key, out.value), (None, Some(&[][..])));
    }

    #[test]
    fn cuts_long_errors_between_characters() {
        let letter = DeadLetter { error: format!("x{}", "é".repeat(LONGEST_ERROR)), ..letter() };
        let headers = letter.out_headers();
        let error = headers.iter().find(|h| h.name == names::ERROR).unwrap();
        assert_eq!(error.value.len(), LONGEST_ERROR - 1);
        assert!(std::str::from_utf8(&error.value).is_ok());
    }
}
