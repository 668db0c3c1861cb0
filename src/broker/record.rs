//! Records as they come from and go to the log: columns of bytes, no copy per record.

use super::{NextOffset, TopicPartition};

/// A column of optional byte strings in one buffer.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Blobs {
    data: Vec<u8>,
    /// End of each value in `data`; a null has the end of its predecessor.
    ends: Vec<u32>,
    nulls: Vec<bool>,
}

impl Blobs {
    /// Appends a value or a null.
    pub fn push(&mut self, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.data.extend_from_slice(value);
        }
        self.ends.push(u32::try_from(self.data.len()).expect("a poll is bounded far below 4 GiB"));
        self.nulls.push(value.is_none());
    }

    /// The value at `row`, or `None` for a null.
    pub fn get(&self, row: usize) -> Option<&[u8]> {
        if self.nulls[row] {
            return None;
        }
        let start = if row == 0 { 0 } else { self.ends[row - 1] as usize };
        Some(&self.data[start..self.ends[row] as usize])
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True if there is no value.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes held by all values.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }
}

/// One header of one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Name.
    pub name: String,
    /// Value; a null header is empty.
    pub value: Vec<u8>,
}

/// Records of one partition in offset order, by column. Offsets rise but need not be dense.
#[derive(Debug, Clone)]
pub struct Records {
    /// Where they were read.
    pub partition: TopicPartition,
    /// Offset of each record.
    pub offsets: Vec<i64>,
    /// Kafka timestamp of each record, milliseconds since 1970 UTC; −1 where the broker has none.
    pub timestamps: Vec<i64>,
    /// Keys.
    pub keys: Blobs,
    /// Values.
    pub values: Blobs,
    /// Headers of the few records that have any: row, headers.
    pub headers: Vec<(usize, Vec<Header>)>,
}

impl Records {
    /// An empty column set for a partition.
    pub fn new(partition: TopicPartition) -> Self {
        Self {
            partition,
            offsets: Vec::new(),
            timestamps: Vec::new(),
            keys: Blobs::default(),
            values: Blobs::default(),
            headers: Vec::new(),
        }
    }

    /// Appends a record.
    pub fn push(&mut self, offset: i64, timestamp: i64, key: Option<&[u8]>, value: Option<&[u8]>) {
        self.offsets.push(offset);
        self.timestamps.push(timestamp);
        self.keys.push(key);
        self.values.push(value);
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// The offset after the last record here, or `None` where there is no record.
    pub fn next(&self) -> Option<NextOffset> {
        self.offsets.last().map(|last| NextOffset(last + 1))
    }
}

/// A record to be written. Borrowed, because the client copies it.
#[derive(Debug, Clone, Default)]
pub struct OutRecord<'a> {
    /// Topic name.
    pub topic: &'a str,
    /// Partition; `None` lets the client choose by the key's murmur2 hash, as Java clients do.
    pub partition: Option<i32>,
    /// Key.
    pub key: Option<&'a [u8]>,
    /// Value; `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    /// Milliseconds since 1970 UTC; `None` is now.
    pub timestamp: Option<i64>,
    /// Headers.
    pub headers: &'a [Header],
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blobs_give_back_what_was_pushed(values in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..20)), 0..50)) {
            let mut blobs = Blobs::default();
            for value in &values {
                blobs.push(value.as_deref());
            }
            prop_assert_eq!(blobs.len(), values.len());
            prop_assert_eq!(blobs.is_empty(), values.is_empty());
            prop_assert_eq!(blobs.bytes(), values.iter().flatten().map(Vec::len).sum::<usize>());
            for (row, value) in values.iter().enumerate() {
                prop_assert_eq!(blobs.get(row), value.as_deref());
            }
        }

        #[test]
        fn next_follows_the_last_offset(gaps in prop::collection::vec(1_i64..5, 0..20)) {
            let mut records = Records::new(TopicPartition::new("t", 0));
            let mut offset = -1;
            for gap in gaps {
                offset += gap;
                records.push(offset, 0, None, None);
            }
            prop_assert_eq!(records.next(), (offset >= 0).then_some(NextOffset(offset + 1)));
        }
    }
}
