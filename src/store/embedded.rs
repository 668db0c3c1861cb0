//! The online store in one file, for one process: same keys, same values, same rules as in Redis.
//!
//! A commit is on disk when `write` returns. Offsets are committed after it and the embedded log's commits are durable,
//! so anything weaker could lose, with the power, rows whose offsets are never read again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::RwLock;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::feast::{EncodedRows, Layout, VERSION_BYTES, version};
use super::online::{Backoff, remedy};
use super::{GroupRead, OnlineError, OnlineStore, Value};
use crate::runtime::failpoint;
use crate::telemetry::metrics::{HOLDS, ONLINE_ROWS};
use crate::window::FeatureRows;

/// Hash key → version, then length (u32 little-endian) and bytes of each view's timestamp and values, in the order of
/// [`Layout`]'s fields, each preceded by its field's name in the same way.
type Hashes<'a> = TableDefinition<'a, &'static [u8], &'static [u8]>;

/// One redb file.
pub(super) struct EmbeddedOnline {
    path: PathBuf,
    layout: Layout,
    pipeline: String,
    /// Table of this pipeline.
    table: String,
    /// `None` after a failure: the next call opens the file anew, which repairs it.
    database: RwLock<Option<Database>>,
}

impl EmbeddedOnline {
    pub(super) fn open(folder: &Path, pipeline: &str, layout: Layout) -> Result<Self, OnlineError> {
        let store = Self {
            path: folder.join("online.redb"),
            layout,
            pipeline: pipeline.to_owned(),
            table: format!("hashes.{pipeline}"),
            database: RwLock::new(None),
        };
        store.reopen()?;
        Ok(store)
    }

    /// Works with the open file, opening it where it is not.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, OnlineError> {
        if self.database.read().is_none() {
            self.reopen()?;
        }
        let database = self.database.read();
        let Some(database) = &*database else {
            return Err(self.io(&std::io::Error::other("it failed under another worker and is being opened again")));
        };
        work(database).map_err(|e| self.storage(e))
    }

    fn reopen(&self) -> Result<(), OnlineError> {
        let mut database = self.database.write();
        if database.is_none() {
            if let Some(folder) = self.path.parent() {
                std::fs::create_dir_all(folder).map_err(|e| self.io(&e))?;
            }
            *database = Some(Database::create(&self.path).map_err(|e| match e {
                DatabaseError::DatabaseAlreadyOpen => OnlineError::Locked { path: self.path.display().to_string() },
                e => self.storage(e.into()),
            })?);
        }
        Ok(())
    }

    fn try_write(&self, rows: &EncodedRows) -> Result<(), OnlineError> {
        if failpoint::hit("online.before_write") {
            return Err(self.io(&std::io::Error::other("failpoint online.before_write")));
        }
        if let Err(error) = self.with(|database| self.put(database, rows)) {
            // redb refuses everything after a failed write until the file is opened again.
            *self.database.write() = None;
            return Err(error);
        }
        if failpoint::hit("online.written") {
            return Err(self.io(&std::io::Error::other("failpoint online.written")));
        }
        Ok(())
    }

    fn put(&self, database: &Database, rows: &EncodedRows) -> Result<(), redb::Error> {
        let transaction = database.begin_write()?;
        {
            let mut table = transaction.open_table(Hashes::new(&self.table))?;
            let mut hash = Vec::new();
            for row in 0..rows.len() {
                let (key, new) = (rows.key(row), rows.version(row));
                let stored = table.get(&*key)?;
                if stored
                    .is_some_and(|hash| version(&hash.value()[..VERSION_BYTES.min(hash.value().len())]) > version(&new))
                {
                    continue;
                }
                hash.clear();
                hash.extend_from_slice(&new);
                let fields = (0..self.layout.views().len()).flat_map(|view| self.layout.fields(view));
                for (field, value) in fields.zip(rows.values(row)) {
                    for part in [field, &value] {
                        let length = u32::try_from(part.len()).expect("far below 4 GiB");
                        hash.extend_from_slice(&length.to_le_bytes());
                        hash.extend_from_slice(part);
                    }
                }
                table.insert(&*key, &*hash)?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// The hashes with these keys, of one transaction; empty where there is none.
    fn hashes(&self, database: &Database, table: &str, keys: &[&[u8]]) -> Result<Vec<Vec<u8>>, redb::Error> {
        let transaction = database.begin_read()?;
        let table = match transaction.open_table(Hashes::new(table)) {
            Ok(table) => table,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(vec![Vec::new(); keys.len()]),
            Err(e) => return Err(e.into()),
        };
        let hash = |key: &&[u8]| Ok(table.get(*key)?.map_or_else(Vec::new, |hash| hash.value().to_vec()));
        keys.iter().map(hash).collect()
    }

    fn corrupt(&self, key: &[u8], reason: String) -> OnlineError {
        OnlineError::Corrupt { store: self.describe(), key: hex::encode(key), reason }
    }

    fn storage(&self, error: redb::Error) -> OnlineError {
        match error {
            redb::Error::Io(e) => self.io(&e),
            error => OnlineError::Storage {
                path: self.path.display().to_string(),
                reason: error.to_string(),
                remedy: "see that the disk is well; the file can be removed where it cannot be saved, rows come again with their entities' next events",
                retriable: matches!(error, redb::Error::PreviousIo | redb::Error::DatabaseClosed),
            },
        }
    }

    fn io(&self, error: &std::io::Error) -> OnlineError {
        let (remedy, retriable) = remedy(error);
        OnlineError::Storage { path: self.path.display().to_string(), reason: error.to_string(), remedy, retriable }
    }
}

impl OnlineStore for EmbeddedOnline {
    fn write(&self, rows: &FeatureRows, give_up: &dyn Fn() -> bool) -> Result<(), OnlineError> {
        let encoded = self.layout.encode(rows);
        if encoded.is_empty() {
            return Ok(());
        }
        let mut backoff = Backoff::new();
        let mut held = false;
        loop {
            match self.try_write(&encoded) {
                Ok(()) => break,
                Err(error) if error.is_retriable() && !give_up() => {
                    if !std::mem::replace(&mut held, true) {
                        tracing::warn!(%error, "holding back: rows wait for the online store");
                        metrics::counter!(HOLDS, "pipeline" => self.pipeline.clone(), "what" => "online").increment(1);
                    }
                    for step in Backoff::steps(backoff.pause()).take_while(|_| !give_up()) {
                        std::thread::park_timeout(step);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        metrics::counter!(ONLINE_ROWS, "pipeline" => self.pipeline.clone()).increment(encoded.len() as u64);
        Ok(())
    }

    fn read(&self, key: &[Value]) -> Result<Vec<(String, GroupRead)>, OnlineError> {
        let key = self.layout.key(key)?;
        let hash = self.with(|database| self.hashes(database, &self.table, &[&key]))?.swap_remove(0);
        let fields = fields(&hash).ok_or_else(|| self.corrupt(&key, "the hash ends early".to_owned()))?;
        let stored = |view, field| {
            let name = &self.layout.fields(view)[field];
            fields.iter().find(|(n, _)| name == n).map(|(_, value)| *value)
        };
        self.layout.decode(stored).map_err(|reason| self.corrupt(&key, reason))
    }

    fn look_up(&self, layout: &Layout, keys: &[Vec<u8>], _: Duration) -> Result<Vec<GroupRead>, OnlineError> {
        // A pipeline's own project has its table, and another one is another pipeline's of the name.
        let table = match layout.project() == self.layout.project() {
            true => self.table.clone(),
            false => format!("hashes.{}", layout.project()),
        };
        let all: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let hashes = self.with(|database| self.hashes(database, &table, &all))?;
        let decode = |(key, hash): (&Vec<u8>, Vec<u8>)| {
            let fields = fields(&hash).ok_or_else(|| self.corrupt(key, "the hash ends early".to_owned()))?;
            let stored = |field: usize| {
                let name = &layout.fields(0)[field];
                fields.iter().find(|(n, _)| name == n).map(|(_, value)| *value)
            };
            layout.decode_first(stored).map_err(|reason| self.corrupt(key, reason))
        };
        keys.iter().zip(hashes).map(decode).collect()
    }

    fn describe(&self) -> String {
        format!("embedded {}", self.path.display())
    }

    fn ping(&self) -> Result<(), OnlineError> {
        self.with(|_| Ok(()))
    }
}

/// The fields and values of a stored hash; `None` where it is cut off.
fn fields(hash: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    if hash.is_empty() {
        return Some(Vec::new());
    }
    let mut rest = hash.get(VERSION_BYTES..)?;
    let mut fields = Vec::new();
    while !rest.is_empty() {
        let field = part(&mut rest)?;
        fields.push((field, part(&mut rest)?));
    }
    Some(fields)
}

fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, tail) = rest.split_first_chunk()?;
    let (part, tail) = tail.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    *rest = tail;
    Some(part)
}
