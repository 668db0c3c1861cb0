//! Where each value of a plan goes in Feast's hashes, and rows of Arrow columns encoded to that place.

use std::ops::Range;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, ListArray, StringArray, TimestampMillisecondArray,
};
use arrow::datatypes::{Float64Type, Int64Type, TimestampMillisecondType};
use bytes::{Bytes, BytesMut};
use rustc_hash::FxHashMap;

use super::{Item, View, put_key_int64, put_key_names, put_key_string};
use crate::config::plan::{Column, DataType, Element, EntityPlan, LookupPlan, Plan};
use crate::store::{GroupRead, OnlineError, Value};
use crate::window::{FeatureRows, row_columns};

/// All of the encoding that does not depend on the row.
#[derive(Debug, Clone)]
pub struct Layout {
    entity: EntityPlan,
    /// Indexes of the entity's keys in the order of their names, which is Feast's.
    sorted: Vec<usize>,
    /// Number of join keys and their names.
    prefix: Vec<u8>,
    project: String,
    views: Vec<View>,
    /// Per view: `_ts:<view>`, then its features' fields.
    fields: Vec<Vec<Bytes>>,
    private_field: Bytes,
    /// How often the definition has changed.
    epoch: u32,
}

impl Layout {
    /// Lays out a plan's entity and views in a Feast project.
    pub fn new(plan: &Plan, project: &str) -> Self {
        Self::of(plan.entity.clone(), super::views(plan), project, &plan.name)
    }

    /// Where a lookup finds its features.
    pub fn of_lookup(lookup: &LookupPlan) -> Self {
        let keys = lookup.keys.iter().map(|(key, _)| key.clone()).collect();
        let columns = lookup.columns.iter().map(|(stored, _)| stored.clone()).collect();
        let view = View { name: lookup.view.clone(), columns, max_age_ms: lookup.max_age_ms };
        Self::of(EntityPlan { name: lookup.name.clone(), keys }, vec![view], &lookup.project, &lookup.project)
    }

    fn of(entity: EntityPlan, views: Vec<View>, project: &str, pipeline: &str) -> Self {
        let keys = &entity.keys;
        let mut sorted: Vec<usize> = (0..keys.len()).collect();
        sorted.sort_by(|a, b| keys[*a].name.cmp(&keys[*b].name));
        let mut prefix = Vec::new();
        put_key_names(sorted.iter().map(|i| &*keys[*i].name), &mut prefix);
        let fields = views
            .iter()
            .map(|view| {
                let features = view.columns.iter().map(|c| Bytes::copy_from_slice(&super::field(&view.name, &c.name)));
                std::iter::once(Bytes::from(super::timestamp_field(&view.name))).chain(features).collect()
            })
            .collect();
        let private_field = Bytes::from(format!("_seq:{pipeline}"));
        Self { entity, sorted, prefix, project: project.to_owned(), views, fields, private_field, epoch: 0 }
    }

    /// The layout for rows of a definition that is the `epoch`th to serve after the first.
    pub fn at_epoch(self, epoch: u32) -> Self {
        Self { epoch, ..self }
    }

    /// The project.
    pub fn project(&self) -> &str {
        &self.project
    }

    /// The views, in the order of the fields.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// Field names of a view: its timestamp's, then its features'.
    pub fn fields(&self, view: usize) -> &[Bytes] {
        &self.fields[view]
    }

    /// Field with the version of the newest row. Longer than the four bytes of a feature's field, so that it cannot
    /// collide with one, and named after the pipeline, so that two pipelines may share an entity.
    pub fn private_field(&self) -> &Bytes {
        &self.private_field
    }

    /// The hash key of one entity.
    ///
    /// # Errors
    /// Where number or types of the values are not those of the entity's keys.
    pub fn key(&self, values: &[Value]) -> Result<Vec<u8>, OnlineError> {
        let error = |reason| OnlineError::Key { entity: self.entity.name.clone(), reason };
        let keys = &self.entity.keys;
        if values.len() != keys.len() {
            return Err(error(format!("{} values for {} keys", values.len(), keys.len())));
        }
        let mut key = self.prefix.clone();
        for &i in &self.sorted {
            match (&values[i], keys[i].data_type) {
                (Value::String(v), DataType::String) => put_key_string(v, &mut key),
                (Value::Int64(v), DataType::Int64) => put_key_int64(*v, &mut key),
                (v, expected) => return Err(error(format!("{} is {expected:?}, not {v:?}", keys[i].name))),
            }
        }
        key.extend_from_slice(self.project.as_bytes());
        Ok(key)
    }

    /// Encodes the newest row of each entity in a batch.
    pub fn encode(&self, rows: &FeatureRows) -> EncodedRows {
        let columns = self.columns(rows);
        let newest = self.newest(&columns, &rows.sequence);
        let values: usize = self.fields.iter().map(Vec::len).sum();
        // A number takes at most eleven bytes; strings make the buffer grow.
        let mut data = BytesMut::with_capacity(newest.len() * (64 + 12 * values));
        let mut ends = Vec::with_capacity(newest.len() * (2 + values));
        for row in newest {
            self.put_key(&columns, row, &mut data);
            ends.push(data.len());
            let event_time = columns.event_time.value(row);
            super::put_version(event_time, rows.sequence[row], &mut data);
            super::put_epoch(self.epoch, &mut data);
            ends.push(data.len());
            for (view, columns) in columns.views.iter().enumerate() {
                super::put_timestamp(event_time, &mut data);
                ends.push(data.len());
                debug_assert_eq!(columns.len() + 1, self.fields[view].len());
                for column in columns {
                    column.put(row, &mut data);
                    ends.push(data.len());
                }
            }
        }
        EncodedRows { data: data.freeze(), ends, parts: 2 + values }
    }

    /// What a read of this entity's fields found: `stored` answers for one field.
    ///
    /// # Errors
    /// In words, where a value is not what driftline or Feast writes.
    pub fn decode<'a>(
        &self,
        stored: impl Fn(usize, usize) -> Option<&'a [u8]>,
    ) -> Result<Vec<(String, GroupRead)>, String> {
        let mut groups = Vec::with_capacity(self.views.len());
        for (v, view) in self.views.iter().enumerate() {
            let read = match stored(v, 0) {
                None => GroupRead::NotFound,
                Some(bytes) => {
                    let event_time = super::timestamp(bytes).map_err(|e| format!("_ts:{}: {e}", view.name))?;
                    let value = |(f, column): (usize, &Column)| match stored(v, f + 1) {
                        None => Ok(Value::Null),
                        Some(bytes) => super::value(bytes, column.data_type)
                            .map_err(|e| format!("{}:{}: {e}", view.name, column.name)),
                    };
                    let values = view.columns.iter().enumerate().map(value).collect::<Result<_, _>>()?;
                    GroupRead::Found { event_time, values }
                }
            };
            groups.push((view.name.clone(), read));
        }
        Ok(groups)
    }

    /// The same for the first view alone.
    ///
    /// # Errors
    /// As [`Layout::decode`].
    pub fn decode_first<'a>(&self, stored: impl Fn(usize) -> Option<&'a [u8]>) -> Result<GroupRead, String> {
        let mut groups = self.decode(|view, field| if view == 0 { stored(field) } else { None })?;
        Ok(groups.swap_remove(0).1)
    }

    fn put_key(&self, columns: &Columns<'_>, row: usize, out: &mut BytesMut) {
        out.extend_from_slice(&self.prefix);
        for &i in &self.sorted {
            match &columns.keys[i] {
                Typed::String(a) => put_key_string(a.value(row), out),
                Typed::Int64(a) => put_key_int64(a.value(row), out),
                _ => unreachable!("plans have string and int64 keys only"),
            }
        }
        out.extend_from_slice(self.project.as_bytes());
    }

    /// The rows to write: of each entity the one that is newest by (event time, sequence), the later of equals.
    fn newest(&self, columns: &Columns<'_>, sequence: &[i64]) -> Vec<usize> {
        let version = |row: usize| (columns.event_time.value(row), sequence[row]);
        let mut keys = BytesMut::new();
        let mut place: FxHashMap<Bytes, usize> = FxHashMap::default();
        let mut newest = Vec::new();
        for row in 0..sequence.len() {
            self.put_key(columns, row, &mut keys);
            let key = keys.split().freeze();
            match place.entry(key) {
                std::collections::hash_map::Entry::Vacant(slot) => {
                    slot.insert(newest.len());
                    newest.push(row);
                }
                std::collections::hash_map::Entry::Occupied(slot) => {
                    let best = &mut newest[*slot.get()];
                    if version(row) >= version(*best) {
                        *best = row;
                    }
                }
            }
        }
        newest
    }

    fn columns<'a>(&self, rows: &'a FeatureRows) -> Columns<'a> {
        let batch = &rows.batch;
        assert_eq!(batch.num_rows(), rows.sequence.len(), "each feature row has a sequence");
        let keys =
            self.entity.keys.iter().enumerate().map(|(i, key)| Typed::of(batch.column(i), key.data_type)).collect();
        let event_time = batch.column_by_name(row_columns::EVENT_TIME).expect("feature rows have an event time");
        // The features come after the watermark; what was looked up comes after those, and is none of the entity's.
        let mut next = 1 + batch.schema_ref().index_of(row_columns::WATERMARK).expect("feature rows have a watermark");
        let views = self
            .views
            .iter()
            .map(|view| {
                let first = next;
                next += view.columns.len();
                view.columns.iter().zip(first..).map(|(c, i)| Typed::of(batch.column(i), c.data_type)).collect()
            })
            .collect();
        Columns { keys, event_time: event_time.as_primitive::<TimestampMillisecondType>(), views }
    }
}

/// A batch's columns, with their types settled once.
struct Columns<'a> {
    keys: Vec<Typed<'a>>,
    event_time: &'a TimestampMillisecondArray,
    views: Vec<Vec<Typed<'a>>>,
}

enum Typed<'a> {
    Int64(&'a Int64Array),
    Float64(&'a Float64Array),
    Boolean(&'a BooleanArray),
    String(&'a StringArray),
    Timestamp(&'a TimestampMillisecondArray),
    List(&'a ListArray, Element, Box<Typed<'a>>),
}

impl<'a> Typed<'a> {
    fn of(array: &'a ArrayRef, data_type: DataType) -> Self {
        match data_type {
            DataType::Int64 => Self::Int64(array.as_primitive::<Int64Type>()),
            DataType::Float64 => Self::Float64(array.as_primitive::<Float64Type>()),
            DataType::Boolean => Self::Boolean(array.as_boolean()),
            DataType::String => Self::String(array.as_string::<i32>()),
            DataType::Timestamp => Self::Timestamp(array.as_primitive::<TimestampMillisecondType>()),
            DataType::List(element) => {
                let lists = array.as_list::<i32>();
                Self::List(lists, element, Box::new(Self::of(lists.values(), element.into())))
            }
        }
    }

    fn put(&self, row: usize, out: &mut BytesMut) {
        match self {
            Self::Int64(a) if a.is_valid(row) => super::put_int64(a.value(row), out),
            Self::Float64(a) if a.is_valid(row) => super::put_double(a.value(row), out),
            Self::Boolean(a) if a.is_valid(row) => super::put_bool(a.value(row), out),
            Self::String(a) if a.is_valid(row) => super::put_string(a.value(row), out),
            Self::Timestamp(a) if a.is_valid(row) => super::put_unix_timestamp(a.value(row), out),
            Self::List(a, element, items) if a.is_valid(row) => {
                let (from, to) = (a.value_offsets()[row] as usize, a.value_offsets()[row + 1] as usize);
                let mut values = Vec::new();
                (from..to).for_each(|item| super::put_item(items.item(item), &mut values));
                super::put_list(*element, &values, out);
            }
            // A null is a message without a value, no bytes at all: so Feast writes it. Its SDK reads the other null,
            // `null_val`, as the integer 0.
            _ => {}
        }
    }
}

impl Typed<'_> {
    /// A value of a list.
    fn item(&self, at: usize) -> Item<'_> {
        match self {
            Self::Int64(a) => Item::Varint(a.value(at)),
            Self::Float64(a) => Item::Double(a.value(at)),
            Self::Boolean(a) => Item::Varint(a.value(at).into()),
            Self::String(a) => Item::Text(a.value(at)),
            Self::Timestamp(a) => Item::Varint(super::seconds(a.value(at))),
            Self::List(..) => unreachable!("a list has no lists in it"),
        }
    }
}

/// Rows ready to be sent: all bytes in one buffer, so that a value costs no allocation.
#[derive(Debug, Clone)]
pub struct EncodedRows {
    data: Bytes,
    /// End of each part in `data`.
    ends: Vec<usize>,
    /// Parts a row: key, version, then per view its timestamp and values.
    parts: usize,
}

impl EncodedRows {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ends.len() / self.parts
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of one row.
    pub fn row_bytes(&self, row: usize) -> usize {
        self.range(row * self.parts + self.parts - 1).end - self.range(row * self.parts).start
    }

    /// The row's hash key.
    pub fn key(&self, row: usize) -> Bytes {
        self.part(row, 0)
    }

    /// The row's version, as [`super::put_version`] and [`super::put_epoch`] write it.
    pub fn version(&self, row: usize) -> Bytes {
        self.part(row, 1)
    }

    /// The row's values: per view its timestamp, then its features.
    pub fn values(&self, row: usize) -> impl Iterator<Item = Bytes> {
        (2..self.parts).map(move |part| self.part(row, part))
    }

    fn part(&self, row: usize, part: usize) -> Bytes {
        self.data.slice(self.range(row * self.parts + part))
    }

    fn range(&self, i: usize) -> Range<usize> {
        (if i == 0 { 0 } else { self.ends[i - 1] })..self.ends[i]
    }
}
