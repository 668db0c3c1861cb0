//! How a batch of records lies in the file: a short head, then columns, all little-endian.
//!
//! ```text
//! u8 format (1) │ u8 dense (1) or sparse (0) │ u32 rows │ i64 newest timestamp
//! sparse only: u32 × rows, offset − base, rising
//! i64 × rows timestamps │ u32 × rows key lengths │ u32 × rows value lengths (0xffff_ffff is a null)
//! u32 rows with headers; each: u32 row, u32 headers; each: u32 length, name, u32 length, value
//! key bytes │ value bytes
//! ```
//! The base offset is the batch's key in the table. A dense batch holds `base, base + 1, …`.

use std::ops::Range;

use crate::broker::{Blobs, Header, Records};

const FORMAT: u8 = 1;
const NULL: u32 = u32::MAX;

/// A batch whose bytes do not follow the format.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a batch of records is damaged")]
pub(super) struct Damaged;

/// Encodes these rows. Offsets are relative to `base` and rise.
pub(super) fn encode(records: &Records, rows: Range<usize>, base: i64) -> Vec<u8> {
    let deltas: Vec<u32> = records.offsets[rows.clone()].iter().map(|offset| narrow(offset - base)).collect();
    let dense = deltas.iter().enumerate().all(|(row, delta)| *delta as usize == row);
    let newest = records.timestamps[rows.clone()].iter().copied().max().unwrap_or(-1);

    let mut out = Vec::with_capacity(32 + 20 * rows.len());
    out.push(FORMAT);
    out.push(u8::from(dense));
    out.extend(narrow(rows.len()).to_le_bytes());
    out.extend(newest.to_le_bytes());
    if !dense {
        out.extend(deltas.iter().flat_map(|delta| delta.to_le_bytes()));
    }
    out.extend(records.timestamps[rows.clone()].iter().flat_map(|t| t.to_le_bytes()));
    for column in [&records.keys, &records.values] {
        out.extend(rows.clone().flat_map(|row| column.get(row).map_or(NULL, |v| narrow(v.len())).to_le_bytes()));
    }
    let with_headers: Vec<_> = records.headers.iter().filter(|(row, _)| rows.contains(row)).collect();
    out.extend(narrow(with_headers.len()).to_le_bytes());
    for (row, headers) in with_headers {
        out.extend(narrow(row - rows.start).to_le_bytes());
        out.extend(narrow(headers.len()).to_le_bytes());
        for header in headers {
            for part in [header.name.as_bytes(), &header.value] {
                out.extend(narrow(part.len()).to_le_bytes());
                out.extend(part);
            }
        }
    }
    for column in [&records.keys, &records.values] {
        rows.clone().filter_map(|row| column.get(row)).for_each(|value| out.extend(value));
    }
    out
}

fn narrow(n: impl TryInto<u32>) -> u32 {
    n.try_into().ok().filter(|n| *n != NULL).expect("the log bounds batches far below 4 GiB")
}

/// The newest timestamp in a batch, without decoding the rest.
pub(super) fn newest_timestamp(batch: &[u8]) -> Result<i64, Damaged> {
    let mut at = Cursor(batch);
    at.take(6)?;
    at.i64()
}

/// Appends the rows with offsets from `from` (inclusive) on to `out`, until it holds `max` rows or `max_bytes` bytes of keys and
/// values (at least one row is taken). Returns true where rows are left.
pub(super) fn decode(
    batch: &[u8],
    base: i64,
    from: i64,
    max: usize,
    max_bytes: usize,
    out: &mut Records,
) -> Result<bool, Damaged> {
    let mut at = Cursor(batch);
    if at.take(1)? != [FORMAT] {
        return Err(Damaged);
    }
    let dense = at.take(1)? == [1];
    let rows = at.u32()? as usize;
    at.i64()?;
    let deltas = if dense { &[] } else { at.take(4 * rows)? };
    let offset = |row: usize| if dense { base + row as i64 } else { base + i64::from(u32_at(deltas, row)) };
    let first = if dense {
        usize::try_from(from.saturating_sub(base)).unwrap_or(0).min(rows)
    } else {
        let (mut low, mut high) = (0, rows);
        while low < high {
            let middle = low.midpoint(high);
            if offset(middle) < from { low = middle + 1 } else { high = middle }
        }
        low
    };
    let timestamps = at.take(8 * rows)?;
    let key_lengths = at.take(4 * rows)?;
    let value_lengths = at.take(4 * rows)?;
    let mut headers = Vec::new();
    for _ in 0..at.u32()? {
        let row = at.u32()? as usize;
        let list = (0..at.u32()?).map(|_| at.header()).collect::<Result<Vec<_>, _>>()?;
        headers.push((row, list));
    }
    let size = |lengths: &[u8], rows: Range<usize>| -> usize {
        rows.map(|row| u32_at(lengths, row)).filter(|n| *n != NULL).map(|n| n as usize).sum()
    };
    let mut keys = Cursor(at.take(size(key_lengths, 0..rows))?);
    let mut values = Cursor(at.take(size(value_lengths, 0..rows))?);
    keys.take(size(key_lengths, 0..first))?;
    values.take(size(value_lengths, 0..first))?;

    let mut headers = headers.into_iter().skip_while(|(row, _)| *row < first).peekable();
    for row in first..rows {
        if out.len() >= max || (!out.is_empty() && out.keys.bytes() + out.values.bytes() >= max_bytes) {
            return Ok(true);
        }
        let offset = offset(row);
        // A reader goes on behind the last one.
        if out.offsets.last().is_some_and(|last| *last >= offset) {
            return Err(Damaged);
        }
        if let Some((_, list)) = headers.next_if(|(at, _)| *at == row) {
            out.headers.push((out.len(), list));
        }
        let timestamp = i64::from_le_bytes(timestamps[8 * row..8 * row + 8].try_into().expect("eight bytes"));
        let key = keys.blob(u32_at(key_lengths, row))?;
        let value = values.blob(u32_at(value_lengths, row))?;
        out.push(offset, timestamp, key, value);
    }
    Ok(false)
}

fn u32_at(column: &[u8], row: usize) -> u32 {
    u32::from_le_bytes(column[4 * row..4 * row + 4].try_into().expect("four bytes"))
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Damaged> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(Damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, Damaged> {
        self.take(4).map(|b| u32_at(b, 0))
    }

    fn i64(&mut self) -> Result<i64, Damaged> {
        self.take(8).map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")))
    }

    fn blob(&mut self, length: u32) -> Result<Option<&'a [u8]>, Damaged> {
        if length == NULL { Ok(None) } else { self.take(length as usize).map(Some) }
    }

    fn header(&mut self) -> Result<Header, Damaged> {
        let length = self.u32()? as usize;
        let name = String::from_utf8(self.take(length)?.to_vec()).map_err(|_| Damaged)?;
        let length = self.u32()? as usize;
        Ok(Header { name, value: self.take(length)?.to_vec() })
    }
}

/// A column with the rows for which `keep` holds.
pub(super) fn retain(records: &Records, keep: impl Fn(usize) -> bool) -> Records {
    let mut kept = Records::new(records.partition.clone());
    let mut headers = records.headers.iter().peekable();
    let column = |blobs: &Blobs, row| blobs.get(row).map(<[u8]>::to_vec);
    for row in 0..records.len() {
        let header = headers.next_if(|(at, _)| *at == row);
        if keep(row) {
            if let Some((_, list)) = header {
                kept.headers.push((kept.len(), list.clone()));
            }
            let (key, value) = (column(&records.keys, row), column(&records.values, row));
            kept.push(records.offsets[row], records.timestamps[row], key.as_deref(), value.as_deref());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::broker::TopicPartition;

    fn bytes() -> impl Strategy<Value = Option<Vec<u8>>> {
        prop::option::of(prop::collection::vec(any::<u8>(), 0..12))
    }

    fn headers() -> impl Strategy<Value = Vec<Header>> {
        let header = ("[a-z]{0,5}", prop::collection::vec(any::<u8>(), 0..5));
        prop::collection::vec(header.prop_map(|(name, value)| Header { name, value }), 0..3)
    }

    prop_compose! {
        fn records()(rows in prop::collection::vec((1_i64..3, any::<i64>(), bytes(), bytes(), headers()), 0..40)) -> Records {
            let mut records = Records::new(TopicPartition::new("t", 0));
            let mut offset = -1;
            for (gap, timestamp, key, value, headers) in rows {
                offset += gap;
                if !headers.is_empty() {
                    records.headers.push((records.len(), headers));
                }
                records.push(offset, timestamp, key.as_deref(), value.as_deref());
            }
            records
        }
    }

    fn same(a: &Records, b: &Records) -> bool {
        a.offsets == b.offsets
            && a.timestamps == b.timestamps
            && a.keys == b.keys
            && a.values == b.values
            && a.headers == b.headers
    }

    proptest! {
        #[test]
        fn a_batch_comes_back(records in records(), base in 0_i64..1000) {
            let mut moved = records.clone();
            moved.offsets.iter_mut().for_each(|offset| *offset += base);
            let batch = encode(&moved, 0..moved.len(), base);
            let mut out = Records::new(moved.partition.clone());
            prop_assert_eq!(decode(&batch, base, 0, usize::MAX, usize::MAX, &mut out), Ok(false));
            prop_assert!(same(&out, &moved));
            prop_assert_eq!(newest_timestamp(&batch), Ok(moved.timestamps.iter().copied().max().unwrap_or(-1)));
        }

        #[test]
        fn reading_in_steps_reads_the_same(records in records(), step in 1_usize..5) {
            let batch = encode(&records, 0..records.len(), 0);
            let mut all = Records::new(records.partition.clone());
            loop {
                let from = all.next().map_or(0, |next| next.0);
                let before = all.len();
                let more = decode(&batch, 0, from, before + step, usize::MAX, &mut all).expect("sound");
                prop_assert!(all.len() - before <= step);
                if !more {
                    break;
                }
            }
            prop_assert!(same(&all, &records));
        }

        #[test]
        fn any_part_of_the_rows_can_be_written(records in records(), a in 0_usize..40, b in 0_usize..40) {
            let rows = a.min(b).min(records.len())..a.max(b).min(records.len());
            let batch = encode(&records, rows.clone(), 0);
            let mut out = Records::new(records.partition.clone());
            decode(&batch, 0, 0, usize::MAX, usize::MAX, &mut out).expect("sound");
            prop_assert!(same(&out, &retain(&records, |row| rows.contains(&row))));
        }

        #[test]
        fn damage_is_an_error_and_no_panic(records in records(), cut in 0_usize..400, noise in prop::collection::vec(any::<u8>(), 0..200)) {
            let batch = encode(&records, 0..records.len(), 0);
            let mut out = Records::new(records.partition.clone());
            if cut < batch.len() {
                prop_assert_eq!(decode(&batch[..cut], 0, 0, usize::MAX, usize::MAX, &mut out), Err(Damaged));
            }
            let _ = decode(&noise, 0, 0, usize::MAX, usize::MAX, &mut out);
        }
    }

    #[test]
    fn bytes_bound_a_read_but_never_to_nothing() {
        let mut records = Records::new(TopicPartition::new("t", 0));
        for offset in 0..4 {
            records.push(offset, 0, None, Some(&[0; 100]));
        }
        let batch = encode(&records, 0..4, 0);
        for (limit, rows) in [(0, 1), (100, 1), (101, 2), (1000, 4)] {
            let mut out = Records::new(records.partition.clone());
            let more = decode(&batch, 0, 0, usize::MAX, limit, &mut out).expect("sound");
            assert_eq!((out.len(), more), (rows, rows < 4), "limit {limit}");
        }
    }
}
