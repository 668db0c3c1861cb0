//! The offline store: where its files lie, how they get there safely, and what can go wrong.
//!
//! ```text
//! <url>/<pipeline>/features/partition=<p>/<sequence>-<unique>.arrow    feature rows since the checkpoint before
//!                  state/partition=<p>/<sequence>-<unique>.arrow       the task's state, or what changed of it
//!                  manifest/partition=<p>/<sequence>.json              written last: the commit
//!                  versions/, v<number>/…                              other versions of the definition, see `versions`
//! ```
//!
//! Data files are Arrow IPC files, uncompressed, with plain columns (no dictionaries: the IPC file format allows only one
//! a column, and readers differ in how they merge those of several files), so that anything that reads Arrow maps them.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt as _;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutPayload};
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;

use super::online::remedy;
use super::versions::{self, Definition};
use crate::config::plan::Plan;

/// Feature rows and task states of one pipeline. Its calls block, so they must not come from a thread of the runtime.
pub struct OfflineStore {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) runtime: Handle,
    pub(super) pipeline: String,
    pub(super) definition: Definition,
    /// The folder of the version's files where the store is the local file system.
    local: Option<PathBuf>,
    name: String,
    /// The pipeline's own folder, where the version's files lie in one below it.
    root: Option<Box<OfflineStore>>,
}

impl OfflineStore {
    /// Opens the plan's offline store: the files of the version that has the plan's definition, where the pipeline has
    /// several, else those of the first. A folder is made where there is none; a relative one (`file://./data`) is below
    /// the working directory.
    ///
    /// # Errors
    /// Where the URL names no store that driftline can use, the folder cannot be made, or the store does not answer.
    pub fn open(plan: &Plan, runtime: Handle) -> Result<Self, OfflineError> {
        let root = Self::open_root(plan, runtime)?;
        match root.role()?.version() {
            1 => Ok(root),
            number => root.of_version(number, &Definition::of(plan)),
        }
    }

    /// Opens the files of a version by its number and definition.
    ///
    /// # Errors
    /// Where its folder cannot be made.
    pub fn of_version(&self, number: u32, definition: &Definition) -> Result<Self, OfflineError> {
        let root = self.root();
        let mut version = Self {
            store: Arc::clone(&root.store),
            runtime: root.runtime.clone(),
            pipeline: root.pipeline.clone(),
            definition: definition.clone(),
            local: root.local.clone(),
            name: root.name.clone(),
            root: None,
        };
        let Some(folder) = versions::folder(number) else { return Ok(version) };
        match &root.local {
            Some(local) => {
                let local = local.join(&folder);
                std::fs::create_dir_all(&local).map_err(|e| OfflineError::io("make the folder", &local, &e))?;
                let url = |e: object_store::Error| OfflineError::Url { url: root.name.clone(), reason: e.to_string() };
                version.store = Arc::new(LocalFileSystem::new_with_prefix(&local).map_err(url)?);
                version.local = Some(local);
            }
            None => version.store = Arc::new(PrefixStore::new(Arc::clone(&root.store), folder.as_str())),
        }
        version.name = format!("{}/{folder}", root.name);
        version.root = Some(Box::new(root.of_version(1, definition)?));
        Ok(version)
    }

    /// The pipeline's own folder.
    pub(super) fn root(&self) -> &Self {
        self.root.as_deref().unwrap_or(self)
    }

    fn open_root(plan: &Plan, runtime: Handle) -> Result<Self, OfflineError> {
        let url = &plan.offline.url;
        let bad = |reason: String| OfflineError::Url { url: url.clone(), reason };
        let (store, local): (Arc<dyn ObjectStore>, _) = match url.strip_prefix("file://") {
            Some(path) => {
                let folder = local_folder(path).map_err(bad)?.join(&plan.name);
                std::fs::create_dir_all(&folder).map_err(|e| OfflineError::io("make the folder", &folder, &e))?;
                let folder = folder.canonicalize().map_err(|e| OfflineError::io("open the folder", &folder, &e))?;
                let store = LocalFileSystem::new_with_prefix(&folder).map_err(|e| bad(e.to_string()))?;
                (Arc::new(store), Some(folder))
            }
            None => {
                let parsed = url::Url::parse(url).map_err(|e| bad(e.to_string()))?;
                let (store, path) =
                    object_store::parse_url_opts(&parsed, std::env::vars()).map_err(|e| bad(e.to_string()))?;
                (Arc::new(PrefixStore::new(store, path.join(plan.name.as_str()))), None)
            }
        };
        Ok(Self {
            store,
            runtime,
            pipeline: plan.name.clone(),
            definition: Definition::of(plan),
            name: local
                .as_ref()
                .map_or_else(|| format!("{}/{}", url.trim_end_matches('/'), plan.name), |f| f.display().to_string()),
            local,
            root: None,
        })
    }

    /// Where this store is, for messages.
    pub fn describe(&self) -> &str {
        &self.name
    }

    /// The folder of the version's files, where the store is on this machine's disk.
    pub fn folder(&self) -> Option<&FilePath> {
        self.local.as_deref()
    }

    /// Writes a whole new file, on disk when this returns. False where there is one of that name.
    pub(super) fn put_new(&self, path: &str, bytes: Vec<u8>) -> Result<bool, OfflineError> {
        let at = Path::from(path);
        let put = self.store.put_opts(&at, PutPayload::from(bytes), PutMode::Create.into());
        match self.runtime.block_on(put) {
            Ok(_) => self.sync(path).map(|()| true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(self.error("write", path, error)),
        }
    }

    /// Reads a record; `None` where it is gone, or was cut off by a power failure, never committed, and is now set aside.
    pub(super) fn read_record<R: Record>(&self, path: &str) -> Result<Option<R>, OfflineError> {
        let Some(text) = self.get(path)? else { return Ok(None) };
        // Unwritten blocks of a file read as zeros.
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        match serde_json::from_slice::<R>(text) {
            Ok(record) if record.format() == R::FORMAT => Ok(Some(record)),
            Ok(record) => {
                let reason = format!("format {}, this driftline reads {}", record.format(), R::FORMAT);
                Err(OfflineError::corrupt(path, reason))
            }
            Err(error) if error.is_eof() => {
                tracing::warn!(path, "cut off by a power failure: set aside, the one before it holds");
                self.set_aside(path)?;
                Ok(None)
            }
            Err(error) => Err(OfflineError::corrupt(path, error)),
        }
    }

    /// Gives a damaged file a name that nothing reads.
    fn set_aside(&self, path: &str) -> Result<(), OfflineError> {
        let (from, to) = (Path::from(path), Path::from(format!("{path}.torn")));
        let rename = self.store.rename(&from, &to);
        match self.runtime.block_on(rename) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.error("rename", path, error)),
        }
    }

    /// Removes files that a killed process was still writing: the local file system's, which it names `<file>#<n>`.
    pub(super) fn sweep_staged(&self, folder: &str, dead: &dyn Fn(&str) -> bool) -> Result<(), OfflineError> {
        let Some(root) = &self.local else { return Ok(()) };
        let folder = root.join(folder);
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(OfflineError::io("list", &folder, &e)),
        };
        for entry in entries {
            let path = entry.map_err(|e| OfflineError::io("list", &folder, &e))?.path();
            let staged = path.file_name().and_then(|n| n.to_str()).is_some_and(|name| name.contains('#') && dead(name));
            if staged {
                std::fs::remove_file(&path).map_err(|e| OfflineError::io("remove", &path, &e))?;
            }
        }
        Ok(())
    }

    /// Waits until a file, and the folders that name it, are on disk. The local file system alone needs telling.
    pub(super) fn sync(&self, path: &str) -> Result<(), OfflineError> {
        let Some(root) = &self.local else { return Ok(()) };
        let file = root.join(path);
        for path in file.ancestors().take_while(|p| p.starts_with(root)) {
            std::fs::File::open(path).and_then(|f| f.sync_all()).map_err(|e| OfflineError::io("flush", path, &e))?;
        }
        Ok(())
    }

    /// Names and sizes of the files in a folder, by name; none where there is no folder.
    pub(super) fn list(&self, folder: &str) -> Result<Vec<ObjectMeta>, OfflineError> {
        let listing = self.store.list(Some(&Path::from(folder))).try_collect::<Vec<_>>();
        let mut files = self.runtime.block_on(listing).map_err(|e| self.error("list", folder, e))?;
        files.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(files)
    }

    /// Paths of the files in a folder and below it, by name.
    pub(super) fn files_in(&self, folder: &str) -> Result<Vec<String>, OfflineError> {
        Ok(self.list(folder)?.into_iter().map(|file| file.location.to_string()).collect())
    }

    /// Names of the folders in a folder.
    pub(super) fn folders(&self, folder: &str) -> Result<Vec<String>, OfflineError> {
        let prefix = Path::from(folder);
        let listing = self.store.list_with_delimiter(Some(&prefix));
        match self.runtime.block_on(listing) {
            Ok(found) => Ok(found.common_prefixes.iter().filter_map(|p| p.filename().map(str::to_owned)).collect()),
            Err(object_store::Error::NotFound { .. }) => Ok(Vec::new()),
            Err(e) => Err(self.error("list", folder, e)),
        }
    }

    /// Removes a file; one that is gone already is as good.
    pub(super) fn delete(&self, path: &Path) -> Result<(), OfflineError> {
        match self.runtime.block_on(self.store.delete(path)) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.error("remove", path.as_ref(), e)),
        }
    }

    /// Says what an object store's error means for the file at `path`.
    pub(super) fn error(&self, during: &'static str, path: &str, error: object_store::Error) -> OfflineError {
        let path = match &self.local {
            Some(root) => root.join(path).display().to_string(),
            None => format!("{}/{path}", self.name),
        };
        if let Some(io) = io_error(&error) {
            return OfflineError::io(during, FilePath::new(&path), io);
        }
        let (remedy, retriable) = match &error {
            object_store::Error::NotFound { .. } => ("it was removed by hand, or the folder was moved", false),
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                ("check the credentials and rights of [offline] url; driftline holds back and tries again", true)
            }
            object_store::Error::NotSupported { .. } | object_store::Error::NotImplemented { .. } => {
                ("that store lacks what driftline needs (create if absent)", false)
            }
            _ => ("check [offline] url; driftline holds back and tries again", true),
        };
        OfflineError::Io { during, path, reason: error.to_string(), remedy, retriable }
    }
}

/// What is kept as a small JSON file of its own.
pub(super) trait Record: DeserializeOwned {
    /// Version of the format that this driftline reads.
    const FORMAT: u32;

    /// Version of the format that the record was written in.
    fn format(&self) -> u32;
}

/// The folder that the rest of a `file://` URL names.
fn local_folder(path: &str) -> Result<PathBuf, String> {
    if path.is_empty() {
        return Err("no folder follows file://".into());
    }
    if path.starts_with('/') {
        let url = url::Url::parse(&format!("file://{path}")).map_err(|e| e.to_string())?;
        return url.to_file_path().map_err(|()| "not a folder of this machine".to_owned());
    }
    std::path::absolute(path).map_err(|e| format!("no working directory: {e}"))
}

/// The operating system's error below an object store's, if there is one.
fn io_error(error: &object_store::Error) -> Option<&std::io::Error> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return Some(io);
        }
        cause = error.source();
    }
    None
}

/// What can go wrong at the offline store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OfflineError {
    /// `[offline] url` cannot be used.
    #[error("[offline] url {url}: {reason}; write file:///absolute/folder or file://./relative/folder")]
    Url {
        /// As written.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("offline store could not {during} {path}: {reason}; {remedy}")]
    Io {
        /// What was being done.
        during: &'static str,
        /// To which file or folder.
        path: String,
        /// The system's words.
        reason: String,
        /// What to do.
        remedy: &'static str,
        /// True where it may work later. Nothing is lost meanwhile: the checkpoint before still holds.
        retriable: bool,
    },
    /// Another owner of the partition has committed this checkpoint.
    #[error(
        "partition {partition}: checkpoint {sequence} was written by another owner of the partition; this one stops"
    )]
    Fenced {
        /// Partition number.
        partition: i32,
        /// Number of the checkpoint.
        sequence: u64,
    },
    /// A file is not what driftline wrote.
    #[error(
        "offline store: {path} is not what driftline writes: {reason}; restore it, or move the pipeline's folder away to start from the log's beginning"
    )]
    Corrupt {
        /// File.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A column that was asked for is not in the files.
    #[error("offline store: {path} has no column '{column}'")]
    NoSuchColumn {
        /// File.
        path: String,
        /// Column.
        column: String,
    },
}

impl OfflineError {
    /// True where the same call may succeed later.
    pub fn is_retriable(&self) -> bool {
        matches!(self, Self::Io { retriable: true, .. })
    }

    /// True where this instance has lost the partition and must drop its task.
    pub fn is_fenced(&self) -> bool {
        matches!(self, Self::Fenced { .. })
    }

    pub(super) fn io(during: &'static str, path: &FilePath, error: &std::io::Error) -> Self {
        let (remedy, retriable) = remedy(error);
        Self::Io { during, path: path.display().to_string(), reason: error.to_string(), remedy, retriable }
    }

    pub(super) fn moved(path: &str) -> Self {
        Self::corrupt(path, "it belongs elsewhere: files were moved by hand")
    }

    pub(super) fn corrupt(path: &str, reason: impl std::fmt::Display) -> Self {
        Self::Corrupt { path: path.to_owned(), reason: reason.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("/data", "/data")]
    #[case("/with%20blank", "/with blank")]
    fn absolute_folders(#[case] path: &str, #[case] expected: &str) {
        assert_eq!(local_folder(path).unwrap(), FilePath::new(expected));
    }

    #[rstest]
    #[case("./data", "data")]
    #[case("data/x", "data/x")]
    fn relative_folders_are_below_the_working_directory(#[case] path: &str, #[case] expected: &str) {
        assert_eq!(local_folder(path).unwrap(), std::env::current_dir().unwrap().join(expected));
    }

    #[rstest]
    #[case(libc::ENOSPC, true, "free space")]
    #[case(libc::EDQUOT, true, "free space")]
    #[case(libc::EACCES, true, "right to write")]
    #[case(libc::EROFS, true, "mount")]
    #[case(libc::ENOTDIR, false, "folder")]
    fn system_errors_say_what_to_do(#[case] code: i32, #[case] retriable: bool, #[case] remedy: &str) {
        let source = std::io::Error::from_raw_os_error(code);
        let wrapped = object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(source) };
        let io = io_error(&wrapped).expect("the cause is found");
        let error = OfflineError::io("write", FilePath::new("/data/x.arrow"), io);
        assert_eq!(error.is_retriable(), retriable);
        let text = error.to_string();
        assert!(text.contains("/data/x.arrow") && text.contains(remedy), "{text}");
    }
}
