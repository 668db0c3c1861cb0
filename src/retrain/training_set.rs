//! Training sets: feature rows from the offline files, joined with the labels topic.
//!
//! A label belongs to the feature rows of its entity whose event time is the label's `as_of`. Rows and values are those that
//! were served: nothing is computed again, so nothing can differ.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, RecordBatch};
use arrow::compute::{concat_batches, sort_to_indices, take_record_batch};
use arrow::datatypes::{DataType, Field, Schema, TimestampMillisecondType};
use arrow::error::ArrowError;
use arrow::ipc::writer::FileWriter;
use arrow::util::display::{ArrayFormatter, FormatOptions};

use super::worker::RetrainError;
use crate::broker::{Broker, NextOffset, SchemaRegistry, TopicPartition};
use crate::config::plan::{LabelsPlan, Plan};
use crate::source::LabelDecoder;
use crate::store::OfflineStore;
use crate::window::row_columns;

/// Name of the label column.
pub const LABEL: &str = "label";

/// Records taken in one read of the labels topic.
const READ_RECORDS: usize = 16_384;

/// Outcomes by entity and instant, read from the labels topic as far as it goes. Remembers where it stands: the next
/// [`Labels::refresh`] reads on. A later label of the same entity and instant corrects the earlier one.
pub struct Labels {
    plan: LabelsPlan,
    decoder: LabelDecoder,
    positions: Vec<NextOffset>,
    /// 128-bit hash of the entity's key and the instant → instant and outcome: 32 bytes a label, whatever the keys' lengths.
    outcomes: HashMap<u128, (i64, f64)>,
    newest: Option<i64>,
    unusable: u64,
}

impl Labels {
    /// Nothing read yet.
    ///
    /// # Errors
    /// The plan does not fit the labels' schema.
    pub fn new(plan: &Plan, labels: &LabelsPlan, registry: Option<Arc<SchemaRegistry>>) -> Result<Self, RetrainError> {
        Ok(Self {
            decoder: LabelDecoder::new(labels, &plan.entity, registry)?,
            plan: labels.clone(),
            positions: Vec::new(),
            outcomes: HashMap::new(),
            newest: None,
            unusable: 0,
        })
    }

    /// Reads what has come since the last time; `from` (milliseconds, inclusive) is the earliest instant of interest.
    ///
    /// # Errors
    /// The broker's or the schema registry's.
    pub fn refresh(&mut self, broker: &dyn Broker, from: i64) -> Result<(), RetrainError> {
        let Some(info) = broker.topic(&self.plan.topic)? else {
            return Err(crate::broker::BrokerError::NoSuchTopic {
                topic: self.plan.topic.to_string(),
                broker: broker.describe(),
            }
            .into());
        };
        for (partition, (earliest, _)) in info.partitions.iter().enumerate().skip(self.positions.len()) {
            debug_assert_eq!(partition, self.positions.len());
            self.positions.push(*earliest);
        }
        for (partition, (_, end)) in info.partitions.iter().enumerate() {
            let at = TopicPartition::new(Arc::clone(&self.plan.topic), i32::try_from(partition).unwrap_or(i32::MAX));
            while self.positions[partition] < *end {
                let (records, next) =
                    broker.read(&at, self.positions[partition], READ_RECORDS, Duration::from_millis(200))?;
                if next == self.positions[partition] {
                    break;
                }
                let decoded = self.decoder.decode(&records)?;
                let keys = Keys::new(decoded.keys.columns())?;
                for (row, (as_of, value)) in decoded.as_of.iter().zip(&decoded.values).enumerate() {
                    if *as_of >= from {
                        self.outcomes.insert(keys.hash(row, *as_of), (*as_of, *value));
                    }
                    self.newest = self.newest.max(Some(*as_of));
                }
                self.unusable += decoded.dead.len() as u64;
                self.positions[partition] = next;
            }
        }
        Ok(())
    }

    /// The newest instant that any label is about, milliseconds since 1970 UTC.
    pub fn newest(&self) -> Option<i64> {
        self.newest
    }

    /// Number of labels about instants at or after `from` (milliseconds).
    pub fn since(&self, from: i64) -> usize {
        self.outcomes.values().filter(|(as_of, _)| *as_of >= from).count()
    }

    /// Labels that could not be read.
    pub fn unusable(&self) -> u64 {
        self.unusable
    }
}

/// A joined set, in memory, ordered by event time.
pub struct TrainingSet {
    /// Entity keys, event time, features, label.
    pub rows: RecordBatch,
    /// Feature rows that were looked at.
    pub seen: u64,
    /// Those of them without a label.
    pub unlabelled: u64,
}

impl TrainingSet {
    /// Joins the feature rows from `from` (milliseconds, inclusive) on with their labels. Rows without one are left out.
    ///
    /// # Errors
    /// Where offline files cannot be read.
    pub fn join(
        plan: &Plan,
        offline: &OfflineStore,
        labels: &Labels,
        features: &[String],
        from: i64,
    ) -> Result<Self, RetrainError> {
        let keys: Vec<&str> = plan.entity.keys.iter().map(|k| k.name.as_ref()).collect();
        let columns: Vec<&str> =
            keys.iter().copied().chain([row_columns::EVENT_TIME]).chain(features.iter().map(String::as_str)).collect();
        let (mut joined, mut seen, mut kept) = (Vec::new(), 0_u64, 0_u64);
        let mut schema = None;
        for batch in offline.read_rows(from..i64::MAX, Some(&columns))? {
            let batch = batch?;
            seen += batch.num_rows() as u64;
            let hashes = Keys::new(&batch.columns()[..keys.len()])?;
            let times = batch.column(keys.len()).as_primitive::<TimestampMillisecondType>();
            let label: Float64Array = (0..batch.num_rows())
                .map(|row| labels.outcomes.get(&hashes.hash(row, times.value(row))).map(|(_, value)| *value))
                .collect();
            let labelled = arrow::compute::is_not_null(&label)?;
            let mut fields: Vec<Arc<Field>> = batch.schema().fields().iter().cloned().collect();
            fields.push(Arc::new(Field::new(LABEL, DataType::Float64, true)));
            let with_label = Arc::new(Schema::new(fields));
            let mut arrays = batch.columns().to_vec();
            arrays.push(Arc::new(label));
            let batch = RecordBatch::try_new(Arc::clone(&with_label), arrays)?;
            let batch = arrow::compute::filter_record_batch(&batch, &labelled)?;
            kept += batch.num_rows() as u64;
            joined.push(batch);
            schema.get_or_insert(with_label);
        }
        let rows = match schema {
            Some(schema) => sorted(&concat_batches(&schema, &joined)?)?,
            None => RecordBatch::new_empty(Arc::new(Schema::empty())),
        };
        Ok(Self { rows, seen, unlabelled: seen - kept })
    }

    /// Event times, rising.
    pub fn times(&self) -> &[i64] {
        let column = self.rows.column_by_name(row_columns::EVENT_TIME);
        column.map_or(&[], |c| c.as_primitive::<TimestampMillisecondType>().values().as_ref())
    }

    /// Number of rows with event time at or after `from` (milliseconds).
    pub fn rows_since(&self, from: i64) -> usize {
        let times = self.times();
        times.len() - times.partition_point(|t| *t < from)
    }

    /// Labels of the rows from `row` on.
    pub fn labels(&self, row: usize) -> Vec<f64> {
        let column = self.rows.column_by_name(LABEL).map(|c| c.as_primitive::<arrow::datatypes::Float64Type>());
        column.map(|c| c.values()[row..].to_vec()).unwrap_or_default()
    }

    /// Writes an Arrow IPC file.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), RetrainError> {
        let io = |source| RetrainError::File { path: PathBuf::from(path), source };
        let file = File::create(path).map_err(io)?;
        let mut writer = FileWriter::try_new_buffered(file, &self.rows.schema())?;
        writer.write(&self.rows)?;
        writer.finish()?;
        Ok(())
    }
}

fn sorted(rows: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let Some(times) = rows.column_by_name(row_columns::EVENT_TIME) else { return Ok(rows.clone()) };
    // A stable order makes training repeatable; files come in a fixed order.
    let order = sort_to_indices(times, None, None)?;
    take_record_batch(rows, &order)
}

/// Key columns as text, so that labels and rows meet whatever their encodings.
struct Keys<'a> {
    columns: Vec<ArrayFormatter<'a>>,
}

impl<'a> Keys<'a> {
    fn new(columns: &'a [ArrayRef]) -> Result<Self, ArrowError> {
        let options = FormatOptions::default();
        Ok(Self {
            columns: columns
                .iter()
                .map(|c: &ArrayRef| ArrayFormatter::try_new(c as &dyn Array, &options))
                .collect::<Result<_, _>>()?,
        })
    }

    fn hash(&self, row: usize, instant: i64) -> u128 {
        let (mut low, mut high) = (DefaultHasher::new(), DefaultHasher::new());
        high.write_u8(1);
        for column in &self.columns {
            let text = column.value(row).to_string();
            for half in [&mut low, &mut high] {
                half.write(text.as_bytes());
                half.write_u8(0xff);
            }
        }
        low.write_i64(instant);
        high.write_i64(instant);
        u128::from(low.finish()) | u128::from(high.finish()) << 64
    }
}
