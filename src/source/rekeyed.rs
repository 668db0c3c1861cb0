//! Records of topics that are keyed anew: what the re-keyer writes, and what is read of it.
//!
//! A record is that of the source, byte for byte, with its timestamp and its headers, and three headers more: where it was
//! read. Its key is the other entity's. Between them are *marks*, records without key and value, in every partition of the
//! topic: the event time of each partition of the source, as of all records before the mark.

use serde::{Deserialize, Serialize};

use super::{Mark, Rekeyed};
use crate::broker::{Header, Records};

/// Names of the headers.
pub mod headers {
    /// Topic that the record was read from.
    pub const TOPIC: &str = "driftline.rekey.topic";
    /// Its partition there, decimal.
    pub const PARTITION: &str = "driftline.rekey.partition";
    /// Its offset there, decimal.
    pub const OFFSET: &str = "driftline.rekey.offset";
    /// In a mark: JSON, as [`super::MarkRecord`].
    pub const MARK: &str = "driftline.rekey.mark";
}

/// Partitions of a source that a mark may tell of at most: what it says is kept in memory for each.
const MOST_PARTITIONS: usize = 1 << 16;

/// The partition of records that no re-keyer wrote. They come first of their event time, and tell nothing of it.
const UNKNOWN: i32 = -1;

/// What a mark says: the number of partitions of the source, and of some of them partition, highest event time, and whether
/// they are idle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkRecord {
    /// Number of partitions of the source.
    pub partitions: usize,
    /// Partition, highest event time in ms, idle.
    pub at: Vec<(i32, Option<i64>, bool)>,
}

/// The headers of a record that was read there.
pub fn record_headers(own: &[Header], topic: &str, partition: i32, offset: i64) -> Vec<Header> {
    let header = |name: &str, value: &str| Header { name: name.to_owned(), value: value.as_bytes().to_vec() };
    // A record that was keyed anew before says where it is from now.
    let kept = own.iter().filter(|h| ![headers::TOPIC, headers::PARTITION, headers::OFFSET].contains(&h.name.as_str()));
    let mut all: Vec<Header> = kept.cloned().collect();
    all.push(header(headers::TOPIC, topic));
    all.push(header(headers::PARTITION, &partition.to_string()));
    all.push(header(headers::OFFSET, &offset.to_string()));
    all
}

/// The headers of a mark.
pub fn mark_headers(mark: &MarkRecord) -> Vec<Header> {
    let value = serde_json::to_vec(mark).expect("numbers and booleans are JSON");
    vec![Header { name: headers::MARK.to_owned(), value }]
}

/// Takes the marks from among the records. The origins are those of the records that are left, by row.
pub fn unpack(records: &Records) -> (Records, Rekeyed) {
    let mut events = Records::new(records.partition.clone());
    let mut rekeyed = Rekeyed::default();
    let mut with_headers = records.headers.iter().peekable();
    for row in 0..records.len() {
        let own = with_headers.next_if(|(at, _)| *at == row).map(|(_, headers)| headers.as_slice()).unwrap_or_default();
        let value = |name: &str| own.iter().find(|header| header.name == name).map(|header| header.value.as_slice());
        let mark = value(headers::MARK).filter(|_| records.values.get(row).is_none());
        let mark = mark.and_then(|mark| serde_json::from_slice::<MarkRecord>(mark).ok());
        if let Some(mark) = mark.filter(|mark| mark.partitions <= MOST_PARTITIONS) {
            let channels = mark.partitions;
            let marks = mark.at.into_iter();
            rekeyed.marks.extend(marks.map(|(partition, newest, idle)| Mark { partition, channels, newest, idle }));
            continue;
        }
        let number = |name: &str| std::str::from_utf8(value(name)?).ok()?.parse::<i64>().ok();
        let partition = number(headers::PARTITION).and_then(|partition| i32::try_from(partition).ok());
        let (partition, offset) = match (partition, number(headers::OFFSET)) {
            (Some(partition), Some(offset)) => (partition, offset),
            _ => (UNKNOWN, records.offsets[row]),
        };
        rekeyed.origins.push((partition, offset));
        if !own.is_empty() {
            events.headers.push((events.len(), own.to_vec()));
        }
        events.push(records.offsets[row], records.timestamps[row], records.keys.get(row), records.values.get(row));
    }
    (events, rekeyed)
}

/// What `unpack` told of `records`, of the rows at these offsets, which are some of theirs.
pub fn of_rows(all: &Rekeyed, records: &Records, offsets: &[i64]) -> Rekeyed {
    let mut at = records.offsets.iter().zip(&all.origins);
    let origins = offsets.iter().filter_map(|offset| at.find(|(other, _)| *other == offset).map(|(_, origin)| *origin));
    Rekeyed { origins: origins.collect(), marks: all.marks.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::TopicPartition;

    #[test]
    fn marks_are_told_from_events_and_events_keep_all_they_had() {
        let mut records = Records::new(TopicPartition::new("shop.purchases.by-product", 1));
        let own = vec![Header { name: "trace".into(), value: b"1".to_vec() }];
        let mark = MarkRecord { partitions: 2, at: vec![(0, Some(70), false), (1, None, true)] };
        records.headers.push((0, record_headers(&own, "shop.purchases", 0, 41)));
        records.push(5, 1000, Some(b"p1"), Some(b"{}"));
        records.headers.push((1, mark_headers(&mark)));
        records.push(6, 1001, None, None);
        records.push(9, 1002, Some(b"p2"), Some(b"[]"));
        let (events, rekeyed) = unpack(&records);
        assert_eq!((events.offsets.as_slice(), events.timestamps.as_slice()), (&[5, 9][..], &[1000, 1002][..]));
        assert_eq!((events.keys.get(0), events.values.get(1)), (Some(&b"p1"[..]), Some(&b"[]"[..])));
        assert_eq!(events.headers, [(0, record_headers(&own, "shop.purchases", 0, 41))]);
        assert_eq!(rekeyed.origins, [(0, 41), (UNKNOWN, 9)]);
        let of = |partition, newest, idle| Mark { partition, channels: 2, newest, idle };
        assert_eq!(rekeyed.marks, [of(0, Some(70), false), of(1, None, true)]);
        let again = record_headers(&events.headers[0].1, "other", 3, 7);
        assert_eq!(again.len(), 4);
        assert_eq!((&again[0], again[3].value.as_slice()), (&own[0], &b"7"[..]));
    }
}
