//! Reading offline files back: a batch at a time, over any object store.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch, Scalar, TimestampMillisecondArray};
use arrow::buffer::Buffer;
use arrow::compute::kernels::cmp::{gt_eq, lt};
use arrow::compute::{and, filter_record_batch};
use arrow::datatypes::{Schema, TimestampMillisecondType};
use arrow::error::ArrowError;
use arrow::ipc::convert::fb_to_schema;
use arrow::ipc::reader::{FileDecoder, read_footer_length};
use arrow::ipc::{Block, root_as_footer};
use object_store::ObjectStoreExt as _;
use object_store::path::Path;

use super::manifest::{DataFile, Manifest, WindowFile};
use super::offline::{OfflineError, OfflineStore};
use crate::broker::Offsets;
use crate::runtime::guard::guarded;
use crate::window::row_columns;

/// One partition's newest checkpoint in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionSummary {
    /// Partition number.
    pub partition: i32,
    /// Number of the checkpoint.
    pub sequence: u64,
    /// When it was taken, by the wall clock, milliseconds since 1970 UTC.
    pub created_at: i64,
    /// Hash of the feature definitions it was taken with.
    pub definition: String,
    /// First offset of each source that is not in it yet.
    pub next: Offsets,
    /// Files of feature rows.
    pub files: usize,
    /// Feature rows in them.
    pub rows: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of the state.
    pub state_bytes: u64,
}

impl OfflineStore {
    /// Feature rows with event time in `range` (milliseconds since 1970 UTC; start inclusive, end exclusive), computed with
    /// this plan's definition: the files that the newest checkpoints name, partition by partition in the order they were
    /// written. `columns` picks columns and their order; `None` is all. Holds one batch in memory.
    ///
    /// # Errors
    /// Where a manifest cannot be read. Files are opened later, by the iterator.
    pub fn read_rows(&self, range: Range<i64>, columns: Option<&[&str]>) -> Result<RowReader<'_>, OfflineError> {
        let manifests = self.newest_manifests()?;
        let wanted =
            |f: &DataFile| f.definition == self.definition.features && f.from < range.end && f.to >= range.start;
        let files = manifests.into_iter().flat_map(|m| m.files).filter(wanted).collect();
        let columns = columns.map(|names| names.iter().map(|n| (*n).to_owned()).collect());
        Ok(RowReader { store: self, range, columns, files, open: None })
    }

    /// All feature rows of one partition that were computed with this definition, in the order they were written.
    ///
    /// # Errors
    /// Where a manifest cannot be read. Files are opened later, by the iterator.
    pub fn read_partition(&self, partition: i32) -> Result<RowReader<'_>, OfflineError> {
        let files = self.latest(partition)?.into_iter().flat_map(|m| m.files);
        let files = files.filter(|f| f.definition == self.definition.features).collect();
        Ok(RowReader { store: self, range: i64::MIN..i64::MAX, columns: None, files, open: None })
    }

    /// All rows of a table of emitted windows of one partition, in the order they were written.
    ///
    /// # Errors
    /// Where a manifest cannot be read. Files are opened later, by the iterator.
    pub fn read_windows<'a>(
        &'a self,
        window: &str,
        partition: i32,
    ) -> Result<impl Iterator<Item = Result<RecordBatch, OfflineError>> + use<'a>, OfflineError> {
        let files = self.latest(partition)?.into_iter().flat_map(|m| m.windows);
        let files: Vec<WindowFile> = files.filter(|file| file.window == window).collect();
        Ok(files.into_iter().flat_map(|file| {
            let (batches, error) = match self.batches(&file.path, file.bytes, None) {
                Ok(batches) => (Some(batches), None),
                Err(error) => (None, Some(Err(error))),
            };
            batches.into_iter().flatten().chain(error)
        }))
    }

    /// Names of the emitted windows of which there are rows.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub fn windows(&self) -> Result<BTreeSet<String>, OfflineError> {
        Ok(self.newest_manifests()?.into_iter().flat_map(|m| m.windows).map(|file| file.window).collect())
    }

    /// The newest checkpoint of every partition, by partition number.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub fn summary(&self) -> Result<Vec<PartitionSummary>, OfflineError> {
        let summary = |m: Manifest| PartitionSummary {
            partition: m.partition,
            sequence: m.sequence,
            created_at: m.created_at,
            files: m.files.len(),
            rows: m.rows(),
            bytes: m.files.iter().map(|f| f.bytes).sum(),
            state_bytes: m.state_files().map(|s| s.bytes).sum(),
            definition: m.definition,
            next: m.next,
        };
        Ok(self.newest_manifests()?.into_iter().map(summary).collect())
    }

    fn newest_manifests(&self) -> Result<Vec<Manifest>, OfflineError> {
        let folders = self.folders("manifest")?;
        let mut partitions: Vec<i32> =
            folders.iter().filter_map(|f| f.strip_prefix("partition=")?.parse().ok()).collect();
        partitions.sort_unstable();
        let mut manifests = Vec::new();
        for partition in partitions {
            manifests.extend(self.latest(partition)?);
        }
        Ok(manifests)
    }

    /// A small file's bytes; `None` where there is none.
    pub(super) fn get(&self, path: &str) -> Result<Option<bytes::Bytes>, OfflineError> {
        let at = Path::from(path);
        let get = async { self.store.get(&at).await?.bytes().await };
        match self.runtime.block_on(get) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.error("read", path, error)),
        }
    }

    /// The batches of an Arrow IPC file of a known size, read one by one.
    pub(super) fn batches(
        &self,
        path: &str,
        size: u64,
        columns: Option<&[String]>,
    ) -> Result<Batches<'_>, OfflineError> {
        let corrupt = |e: ArrowError| OfflineError::corrupt(path, e);
        let damaged = |reason: String| OfflineError::corrupt(path, reason);
        let tail = self.range(path, size.saturating_sub(10)..size)?;
        let tail = tail.as_ref().try_into().map_err(|_| OfflineError::corrupt(path, "it ends early"))?;
        let footer_length = read_footer_length(tail).map_err(corrupt)? as u64;
        let end = size - 10;
        let footer = self.range(path, end.saturating_sub(footer_length)..end)?;
        let footer = root_as_footer(&footer).map_err(|e| OfflineError::corrupt(path, format!("{e:?}")))?;
        let schema = footer.schema().ok_or_else(|| OfflineError::corrupt(path, "no schema"))?;
        let schema = guarded(|| fb_to_schema(schema)).map_err(damaged)?;
        let version = footer.version();
        let projection = columns.map(|columns| project(path, &schema, columns)).transpose()?;
        let mut decoder = FileDecoder::new(Arc::new(schema), version);
        if let Some(projection) = projection {
            decoder = decoder.with_projection(projection);
        }
        for block in footer.dictionaries().iter().flatten() {
            let data = self.block(path, block)?;
            guarded(|| decoder.read_dictionary(block, &data)).map_err(damaged)?.map_err(corrupt)?;
        }
        let blocks = footer.recordBatches().iter().flatten().copied().collect();
        Ok(Batches { store: self, path: path.to_owned(), decoder, blocks })
    }

    fn block(&self, path: &str, block: &Block) -> Result<Buffer, OfflineError> {
        let bad = || OfflineError::corrupt(path, "its footer is damaged");
        let start = u64::try_from(block.offset()).map_err(|_| bad())?;
        let metadata = u64::try_from(block.metaDataLength()).map_err(|_| bad())?;
        let body = u64::try_from(block.bodyLength()).map_err(|_| bad())?;
        let end = start.checked_add(metadata).and_then(|end| end.checked_add(body)).ok_or_else(bad)?;
        Ok(Buffer::from(self.range(path, start..end)?))
    }

    fn range(&self, path: &str, range: Range<u64>) -> Result<bytes::Bytes, OfflineError> {
        self.runtime.block_on(self.store.get_range(&Path::from(path), range)).map_err(|e| self.error("read", path, e))
    }
}

/// Indexes of the wanted columns.
fn project(path: &str, schema: &Schema, columns: &[String]) -> Result<Vec<usize>, OfflineError> {
    let index = |column: &String| {
        schema
            .index_of(column)
            .map_err(|_| OfflineError::NoSuchColumn { path: path.to_owned(), column: column.clone() })
    };
    columns.iter().map(index).collect()
}

/// Batches of one file.
pub(super) struct Batches<'a> {
    store: &'a OfflineStore,
    path: String,
    decoder: FileDecoder,
    blocks: VecDeque<Block>,
}

impl Iterator for Batches<'_> {
    type Item = Result<RecordBatch, OfflineError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let block = self.blocks.pop_front()?;
            let batch = self.store.block(&self.path, &block).and_then(|data| {
                guarded(|| self.decoder.read_record_batch(&block, &data))
                    .map_err(|reason| OfflineError::corrupt(&self.path, reason))?
                    .map_err(|e| OfflineError::corrupt(&self.path, e))
            });
            match batch.transpose() {
                // A message without rows.
                None => {}
                Some(batch) => return Some(batch),
            }
        }
    }
}

/// Feature rows of a range of event time.
pub struct RowReader<'a> {
    store: &'a OfflineStore,
    range: Range<i64>,
    columns: Option<Vec<String>>,
    files: VecDeque<DataFile>,
    open: Option<Open<'a>>,
}

/// The file being read.
struct Open<'a> {
    batches: Batches<'a>,
    /// False where all of its rows are in range.
    filter: bool,
    /// True where the event time was read for the filter alone, as the last column.
    drop_last: bool,
}

impl<'a> RowReader<'a> {
    fn open(&self, file: &DataFile) -> Result<Open<'a>, OfflineError> {
        let filter = file.from < self.range.start || file.to >= self.range.end;
        let mut columns = self.columns.clone();
        let mut drop_last = false;
        if let Some(columns) = &mut columns
            && filter
            && !columns.iter().any(|c| c == row_columns::EVENT_TIME)
        {
            columns.push(row_columns::EVENT_TIME.to_owned());
            drop_last = true;
        }
        let batches = self.store.batches(&file.path, file.bytes, columns.as_deref())?;
        Ok(Open { batches, filter, drop_last })
    }
}

impl Open<'_> {
    fn keep(&self, batch: RecordBatch, range: &Range<i64>) -> Result<RecordBatch, ArrowError> {
        let mut batch = batch;
        if self.filter {
            let times = batch
                .column_by_name(row_columns::EVENT_TIME)
                .and_then(|c| c.as_primitive_opt::<TimestampMillisecondType>())
                .ok_or_else(|| ArrowError::SchemaError("event_time is not a timestamp in milliseconds".into()))?;
            let bound =
                |at: i64| Scalar::new(TimestampMillisecondArray::from_value(at, 1).with_timezone_opt(times.timezone()));
            let mask = and(&gt_eq(times, &bound(range.start))?, &lt(times, &bound(range.end))?)?;
            batch = filter_record_batch(&batch, &mask)?;
        }
        if self.drop_last {
            batch.remove_column(batch.num_columns() - 1);
        }
        Ok(batch)
    }
}

impl Iterator for RowReader<'_> {
    type Item = Result<RecordBatch, OfflineError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some(open) = &mut self.open else {
                let file = self.files.pop_front()?;
                match self.open(&file) {
                    Ok(open) => self.open = Some(open),
                    Err(error) => return Some(Err(error)),
                }
                continue;
            };
            let Some(batch) = open.batches.next() else {
                self.open = None;
                continue;
            };
            let kept = batch.and_then(|batch| {
                open.keep(batch, &self.range).map_err(|e| OfflineError::corrupt(&open.batches.path, e))
            });
            match kept {
                Ok(batch) if batch.num_rows() == 0 => {}
                kept => return Some(kept),
            }
        }
    }
}
