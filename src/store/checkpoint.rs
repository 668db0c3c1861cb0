//! Checkpoints: a task's state, rows and offsets, committed together or not at all.

use std::collections::BTreeSet;
use std::io::Write;

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::TimestampMillisecondType;
use arrow::error::ArrowError;
use arrow::ipc::writer::FileWriter;
use object_store::path::Path;
use object_store::{ObjectStoreExt as _, WriteMultipart};

use super::manifest::{
    DataFile, KEPT, Manifest, StateFile, WINDOWS, WindowFile, data_file_name, manifest_folder, manifest_path,
    part_file_name, rows_folder, sequence_of, state_folder, windows_folder,
};
use super::offline::{OfflineError, OfflineStore};
use crate::broker::Offsets;
use crate::runtime::{clock, failpoint};
use crate::telemetry::metrics::{CHECKPOINTS, OFFLINE_ROWS};
use crate::window::{emitted_columns, row_columns};

/// Rows of one batch in a file. Micro-batches are joined to this size, because a batch costs some kilobytes of metadata.
const FILE_BATCH_ROWS: usize = 65_536;
/// Bytes handed to the object store at a time, and parts of that size under way.
const PART_BYTES: usize = 8 << 20;
const PARTS: usize = 4;

/// What a task hands over at a checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint<'a> {
    /// Partition number of the task.
    pub partition: i32,
    /// First offset of each source that is not in `state` yet.
    pub next: Offsets,
    /// Parts of the state that [`OfflineStore::write_state`] has written.
    pub parts: Vec<StateFile>,
    /// The rest of the state, in batches of one schema.
    pub state: Vec<RecordBatch>,
    /// True where the state holds what changed since `previous`, false where it is the whole.
    pub follows: bool,
    /// Feature rows since the checkpoint before, in batches of one schema.
    pub rows: Vec<RecordBatch>,
    /// Rows of emitted windows since the checkpoint before, by the windows' name, each in batches of one schema.
    pub windows: Vec<(String, Vec<RecordBatch>)>,
    /// The checkpoint before: what [`OfflineStore::latest`] or the last [`OfflineStore::commit`] gave.
    pub previous: Option<&'a Manifest>,
}

impl OfflineStore {
    /// The newest checkpoint of a partition, `None` before the first.
    ///
    /// A manifest cut off by a power failure was never committed: it is set aside (`.torn`), and the one before holds.
    ///
    /// # Errors
    /// Where the store does not answer, or the manifest is not one of this pipeline and format.
    pub fn latest(&self, partition: i32) -> Result<Option<Manifest>, OfflineError> {
        for sequence in self.manifests(partition)?.into_iter().rev() {
            if let Some(manifest) = self.manifest(partition, sequence)? {
                return Ok(Some(manifest));
            }
        }
        Ok(None)
    }

    /// The state of a checkpoint, in the batches it is stored in, in the order they were written; none where there was no
    /// state.
    ///
    /// # Errors
    /// Where the file cannot be read or is not what was written.
    pub fn load_state(&self, manifest: &Manifest) -> Result<Vec<RecordBatch>, OfflineError> {
        self.read_state(manifest).collect()
    }

    /// As [`OfflineStore::load_state`], one batch after the other. Ends at the first error.
    pub fn read_state<'a>(
        &'a self,
        manifest: &'a Manifest,
    ) -> impl Iterator<Item = Result<RecordBatch, OfflineError>> + 'a {
        let mut files = manifest.state_files();
        let mut open = None;
        std::iter::from_fn(move || {
            loop {
                if open.is_none() {
                    let file = files.next()?;
                    match self.batches(&file.path, file.bytes, None) {
                        Ok(batches) => open = Some((file, batches, 0)),
                        Err(error) => return Some(Err(error)),
                    }
                }
                let (file, batches, rows) = open.as_mut()?;
                match batches.next() {
                    Some(batch) => {
                        *rows += batch.as_ref().map_or(0, |batch| batch.num_rows() as u64);
                        return Some(batch);
                    }
                    None if *rows != file.rows => {
                        let reason = format!("{rows} rows where the manifest says {}", file.rows);
                        return Some(Err(OfflineError::corrupt(&file.path, reason)));
                    }
                    None => open = None,
                }
            }
        })
        .scan(false, |failed, batch: Result<RecordBatch, OfflineError>| {
            (!std::mem::replace(failed, batch.is_err())).then_some(batch)
        })
    }

    /// Writes a part of the state of a checkpoint to come, `part` being the number of those before it: so that nobody has to
    /// hold the whole in memory. It is on disk when this returns, and counts once [`OfflineStore::commit`] names it.
    ///
    /// # Errors
    /// Where the store does not take it. The same part can then be written again.
    pub fn write_state(
        &self,
        partition: i32,
        previous: Option<&Manifest>,
        part: usize,
        batches: &[RecordBatch],
    ) -> Result<Option<StateFile>, OfflineError> {
        let sequence = previous.map_or(0, |m| m.sequence) + 1;
        let path = format!("{}/{}", state_folder(partition), part_file_name(sequence, rand::random(), part));
        let written = self.write_arrow(&path, batches, true)?;
        self.failpoint("offline.part_written", &path)?;
        Ok(written.map(|(rows, bytes)| StateFile { path, rows, bytes }))
    }

    /// Commits a checkpoint: rows file, state file, then the manifest that names both. All are on disk when this returns.
    /// Without rows there is no new rows file.
    ///
    /// # Errors
    /// [`OfflineError::Fenced`] where another owner of the partition has committed since `previous`. After any other
    /// error the checkpoint before still holds and the same checkpoint can be committed again.
    pub fn commit(&self, checkpoint: &Checkpoint<'_>) -> Result<Manifest, OfflineError> {
        let partition = checkpoint.partition;
        let previous = checkpoint.previous.map_or(0, |m| m.sequence);
        let sequence = previous + 1;
        if self.manifests(partition)?.last().copied().unwrap_or(0) != previous {
            return Err(OfflineError::Fenced { partition, sequence });
        }
        let mut written = Vec::new();
        let manifest = self.write_files(checkpoint, sequence, &mut written).inspect_err(|_| {
            // Whatever is tried again gets new names: without this, a full disk would only get fuller.
            for path in &written {
                if let Err(error) = self.delete(&Path::from(path.as_str())) {
                    tracing::debug!(%error, "left for the sweep");
                }
            }
        })?;

        let path = manifest_path(partition, sequence);
        let text = serde_json::to_vec(&manifest).expect("a manifest is plain data");
        match self.put_new(&path, text) {
            Ok(true) => {}
            Ok(false) => return Err(OfflineError::Fenced { partition, sequence }),
            Err(error) => return Err(error),
        }
        self.failpoint("offline.manifest_written", &path)?;
        // A manifest that a successor has swept since is free to be created again, far behind the newest.
        if self.manifests(partition)?.last().copied() != Some(sequence) {
            return Err(OfflineError::Fenced { partition, sequence });
        }
        let rows = checkpoint.rows.iter().map(|b| b.num_rows() as u64).sum();
        metrics::counter!(OFFLINE_ROWS, "pipeline" => self.pipeline.clone()).increment(rows);
        metrics::counter!(CHECKPOINTS, "pipeline" => self.pipeline.clone()).increment(1);
        Ok(manifest)
    }

    /// Removes what no checkpoint needs: manifests and states but the newest three, and files of earlier attempts that no
    /// manifest names. Files of a checkpoint still to come are left alone. Returns the number of files removed.
    ///
    /// # Errors
    /// Where the store does not answer. What is left is swept the next time.
    pub fn sweep(&self, partition: i32) -> Result<usize, OfflineError> {
        let Some(newest) = self.latest(partition)? else { return Ok(0) };
        let mut sequences = self.manifests(partition)?;
        let kept = sequences.split_off(sequences.len().saturating_sub(KEPT));
        let mut doomed: Vec<Path> = sequences.into_iter().map(|s| Path::from(manifest_path(partition, s))).collect();
        let mut named: BTreeSet<String> = newest.files.iter().map(|f| f.path.clone()).collect();
        for sequence in kept {
            let manifest = self.manifest(partition, sequence)?;
            named.extend(manifest.iter().flat_map(Manifest::state_files).map(|s| s.path.clone()));
        }
        named.extend(newest.windows.iter().map(|f| f.path.clone()));
        let windows = self.folders(WINDOWS)?;
        let windows = windows.iter().map(|window| windows_folder(window, partition));
        for folder in [rows_folder(partition), state_folder(partition)].into_iter().chain(windows) {
            let dead = |path: &str| sequence_of(path).is_some_and(|s| s <= newest.sequence) && !named.contains(path);
            doomed.extend(self.list(&folder)?.into_iter().map(|f| f.location).filter(|f| dead(f.as_ref())));
            self.sweep_staged(&folder, &dead)?;
        }
        for path in &doomed {
            self.delete(path)?;
        }
        Ok(doomed.len())
    }

    /// Numbers of the partition's manifests, rising.
    fn manifests(&self, partition: i32) -> Result<Vec<u64>, OfflineError> {
        let files = self.list(&manifest_folder(partition))?;
        let is_manifest = |path: &str| path.ends_with(".json");
        Ok(files.iter().map(|f| f.location.as_ref()).filter(|p| is_manifest(p)).filter_map(sequence_of).collect())
    }

    /// Reads one manifest; `None` where it is gone, or was cut off and is now set aside.
    fn manifest(&self, partition: i32, sequence: u64) -> Result<Option<Manifest>, OfflineError> {
        let path = manifest_path(partition, sequence);
        let Some(manifest) = self.read_record::<Manifest>(&path)? else { return Ok(None) };
        if (&manifest.pipeline, manifest.partition, manifest.sequence) != (&self.pipeline, partition, sequence) {
            return Err(OfflineError::moved(&path));
        }
        Ok(Some(manifest))
    }

    fn write_files(
        &self,
        checkpoint: &Checkpoint<'_>,
        sequence: u64,
        written: &mut Vec<String>,
    ) -> Result<Manifest, OfflineError> {
        let partition = checkpoint.partition;
        let name = data_file_name(sequence, rand::random());
        let mut files = checkpoint.previous.map_or_else(Vec::new, |m| m.files.clone());
        let path = format!("{}/{name}", rows_folder(partition));
        self.failpoint("offline.before_rows", &path)?;
        if let Some((rows, bytes)) = self.write_arrow(&path, &checkpoint.rows, false)? {
            written.push(path.clone());
            let (from, to) = instants(&checkpoint.rows, row_columns::EVENT_TIME)
                .ok_or_else(|| OfflineError::corrupt(&path, "feature rows without an event time"))?;
            files.push(DataFile {
                path: path.clone(),
                definition: self.definition.features.clone(),
                rows,
                bytes,
                from,
                to,
            });
        }
        let mut windows = checkpoint.previous.map_or_else(Vec::new, |m| m.windows.clone());
        for (window, emitted) in &checkpoint.windows {
            let path = format!("{}/{name}", windows_folder(window, partition));
            if let Some((rows, bytes)) = self.write_arrow(&path, emitted, false)? {
                written.push(path.clone());
                let (from, to) = instants(emitted, emitted_columns::END)
                    .ok_or_else(|| OfflineError::corrupt(&path, "rows of windows without an end"))?;
                windows.push(WindowFile { window: window.clone(), path, rows, bytes, from, to });
            }
        }
        self.failpoint("offline.rows_written", &path)?;
        let path = format!("{}/{name}", state_folder(partition));
        let rest = self.write_arrow(&path, &checkpoint.state, true)?.map(|(rows, bytes)| {
            written.push(path.clone());
            StateFile { path: path.clone(), rows, bytes }
        });
        self.failpoint("offline.state_written", &path)?;
        let before = checkpoint.previous.filter(|_| checkpoint.follows).into_iter().flat_map(Manifest::state_files);
        let mut updates: Vec<StateFile> = before.chain(&checkpoint.parts).cloned().chain(rest).collect();
        let state = (!updates.is_empty()).then(|| updates.remove(0));
        Ok(Manifest {
            format: Manifest::FORMAT,
            pipeline: self.pipeline.clone(),
            definition: self.definition.features.clone(),
            windows_definition: Some(self.definition.windows.clone()).filter(|windows| !windows.is_empty()),
            partition,
            sequence,
            created_at: clock::now_ms(),
            next: checkpoint.next.clone(),
            state,
            updates,
            files,
            windows,
        })
    }

    /// Writes batches as one Arrow IPC file and waits until it is on disk. Returns rows and bytes. Where there are no rows,
    /// nothing is written unless the schema is worth keeping: its metadata say something.
    fn write_arrow(
        &self,
        path: &str,
        batches: &[RecordBatch],
        keep_schema: bool,
    ) -> Result<Option<(u64, u64)>, OfflineError> {
        let schema_only = batches.first().filter(|_| keep_schema && batches.iter().all(|b| b.num_rows() == 0));
        let batches: Vec<&RecordBatch> = batches.iter().filter(|b| b.num_rows() > 0).chain(schema_only).collect();
        let Some(first) = batches.first() else { return Ok(None) };
        let schema = first.schema();
        let upload = self
            .runtime
            .block_on(self.store.put_multipart(&Path::from(path)))
            .map_err(|e| self.error("write", path, e))?;
        let upload = Upload {
            store: self,
            parts: WriteMultipart::new_with_chunk_size(upload, PART_BYTES),
            bytes: 0,
            error: None,
        };
        let mut writer = FileWriter::try_new(std::io::BufWriter::with_capacity(1 << 20, upload), &schema)
            .expect("a header fits into the buffer");
        let result = (|| {
            let mut rows = 0;
            let mut start = 0;
            while start < batches.len() {
                let mut count = 0;
                let some = batches[start..].iter().take_while(|b| {
                    let fits = count == 0 || count + b.num_rows() <= FILE_BATCH_ROWS;
                    count += b.num_rows();
                    fits
                });
                let end = start + some.count();
                let batch = concat_batches(&schema, batches[start..end].iter().copied())?;
                rows += batch.num_rows() as u64;
                writer.write(&batch)?;
                start = end;
            }
            writer.finish()?;
            writer.flush()?;
            Ok::<_, ArrowError>(rows)
        })();
        let mut upload = match writer.into_inner().map(std::io::BufWriter::into_parts) {
            Ok((upload, _)) => upload,
            Err(error) => return Err(OfflineError::corrupt(path, error)),
        };
        match (result, upload.error.take()) {
            (Ok(rows), None) => {
                let bytes = upload.bytes;
                self.runtime.block_on(upload.parts.finish()).map_err(|e| self.error("write", path, e))?;
                self.sync(path)?;
                Ok(Some((rows, bytes)))
            }
            (_, Some(error)) => {
                self.give_up(upload);
                Err(self.error("write", path, error))
            }
            (Err(error), None) => {
                self.give_up(upload);
                Err(OfflineError::corrupt(path, error))
            }
        }
    }

    fn give_up(&self, upload: Upload<'_>) {
        if let Err(error) = self.runtime.block_on(upload.parts.abort()) {
            tracing::debug!(%error, "left for the sweep");
        }
    }

    fn failpoint(&self, name: &'static str, path: &str) -> Result<(), OfflineError> {
        if failpoint::hit(name) {
            let failure = std::io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(OfflineError::io("write", std::path::Path::new(path), &failure));
        }
        Ok(())
    }
}

/// Earliest and latest instant of a column.
fn instants(batches: &[RecordBatch], column: &str) -> Option<(i64, i64)> {
    batches.iter().filter(|b| b.num_rows() > 0).try_fold((i64::MAX, i64::MIN), |(from, to), batch| {
        let times = batch.column_by_name(column)?.as_primitive_opt::<TimestampMillisecondType>()?;
        Some((from.min(arrow::compute::min(times)?), to.max(arrow::compute::max(times)?)))
    })
}

/// A file on its way to the object store, in parts.
struct Upload<'a> {
    store: &'a OfflineStore,
    parts: WriteMultipart,
    bytes: u64,
    /// The store's own error, which an `io::Error` would hide.
    error: Option<object_store::Error>,
}

impl Write for Upload<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // Parts are tasks of the runtime.
        let _runtime = self.store.runtime.enter();
        if let Err(error) = self.store.runtime.block_on(self.parts.wait_for_capacity(PARTS)) {
            self.error = Some(error);
            return Err(std::io::Error::other("the object store failed"));
        }
        self.parts.write(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
