//! The cold store: states of entities that are not in memory, in an embedded database on local disk.
//!
//! Nothing in it is needed after the process: its file has no name once it is open, so that the system gives its space back
//! however the process ends, and nothing waits for the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use redb::{Builder, Database, ReadableDatabase as _, StorageBackend, TableDefinition};

use super::OfflineError;
use crate::window::ColdStore;

const STATES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("states");

/// Memory of a store's cache, in bytes: pages between two writes.
const CACHE: usize = 4 << 20;

/// End of the names of files that were never opened to the end.
const SUFFIX: &str = ".cold";

/// States of one task on disk.
#[derive(Debug)]
pub struct DiskStates {
    database: Database,
    folder: PathBuf,
    file: std::sync::Arc<File>,
}

impl DiskStates {
    /// An empty one in a folder, which is made where there is none. `name` tells the task from others.
    ///
    /// # Errors
    /// Where the folder cannot be written.
    pub fn open(folder: &Path, name: &str) -> Result<Self, OfflineError> {
        let failed = |during, path: &Path, error: &io::Error| OfflineError::io(during, path, error);
        std::fs::create_dir_all(folder).map_err(|e| failed("make the folder", folder, &e))?;
        // A process that was killed just after it had made its file.
        for entry in std::fs::read_dir(folder).map_err(|e| failed("list", folder, &e))?.flatten() {
            if entry.file_name().to_string_lossy().ends_with(SUFFIX) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let path = folder.join(format!("{name}-{:016x}{SUFFIX}", rand::random::<u64>()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = std::sync::Arc::new(file.map_err(|e| failed("make", &path, &e))?);
        // Gone already where another task has just tidied up.
        let _ = std::fs::remove_file(&path);
        let backend = Nameless(std::sync::Arc::clone(&file));
        let open = || -> Result<Database, redb::Error> {
            let database = Builder::new().set_cache_size(CACHE).create_with_backend(backend)?;
            let transaction = database.begin_write()?;
            transaction.open_table(STATES)?;
            transaction.commit()?;
            Ok(database)
        };
        let database = open().map_err(|e| failed("make", &path, &io::Error::other(e.to_string())))?;
        Ok(Self { database, folder: folder.to_owned(), file })
    }

    fn failed(&self, error: impl Into<redb::Error>) -> String {
        let error = error.into();
        format!("{}: {error}; see that the disk is whole and has space, then start again", self.folder.display())
    }
}

impl ColdStore for DiskStates {
    fn put(&mut self, states: &[(u64, Vec<u8>)]) -> Result<(), String> {
        let put = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            {
                let mut table = transaction.open_table(STATES)?;
                for (number, state) in states {
                    table.insert(number, state.as_slice())?;
                }
            }
            Ok(transaction.commit()?)
        };
        put().map_err(|error| self.failed(error))
    }

    fn get(&self, number: u64) -> Result<Vec<u8>, String> {
        let get = || -> Result<Option<Vec<u8>>, redb::Error> {
            let table = self.database.begin_read()?.open_table(STATES)?;
            Ok(table.get(number)?.map(|state| state.value().to_vec()))
        };
        let found = get().map_err(|error| self.failed(error))?;
        found.ok_or_else(|| format!("{}: a state is missing; start again", self.folder.display()))
    }

    fn remove(&mut self, numbers: &[u64]) -> Result<(), String> {
        let remove = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            {
                let mut table = transaction.open_table(STATES)?;
                for number in numbers {
                    table.remove(number)?;
                }
            }
            Ok(transaction.commit()?)
        };
        remove().map_err(|error| self.failed(error))
    }

    fn disk_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }

    fn memory_bytes(&self) -> usize {
        CACHE
    }
}

/// A file that nobody else can open and that need not outlive the process.
#[derive(Debug)]
struct Nameless(std::sync::Arc<File>);

impl StorageBackend for Nameless {
    fn len(&self) -> io::Result<u64> {
        self.0.metadata().map(|metadata| metadata.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_of_each_number_and_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("left-over.cold"), "x").unwrap();
        std::fs::write(folder.path().join("somebody's.toml"), "x").unwrap();
        let mut one = DiskStates::open(folder.path(), "shop-0").unwrap();
        let mut other = DiskStates::open(folder.path(), "shop-1").unwrap();
        let states = |range: std::ops::Range<u64>, salt: u8| -> Vec<(u64, Vec<u8>)> {
            range.map(|number| (number, vec![salt; number as usize])).collect()
        };
        one.put(&states(0..3000, 1)).unwrap();
        other.put(&states(5..6, 3)).unwrap();
        let before = one.disk_bytes();
        for _ in 0..20 {
            one.put(&states(1000..3000, 2)).unwrap();
        }
        assert!(
            one.disk_bytes() < 4 * before,
            "{} after {before}: replaced states give their space back",
            one.disk_bytes()
        );
        for number in [0, 1, 999, 1000, 2999] {
            let salt = if number < 1000 { 1 } else { 2 };
            assert_eq!(one.get(number).unwrap(), vec![salt; number as usize]);
        }
        assert_eq!(other.get(5).unwrap(), [3; 5]);
        // What is removed makes room for others.
        let removed: Vec<u64> = (1000..3000).collect();
        one.remove(&removed).unwrap();
        let full = one.disk_bytes();
        one.put(&states(3000..4500, 4)).unwrap();
        assert!(one.disk_bytes() <= full + full / 4, "{} after {full}", one.disk_bytes());
        assert!(one.get(1000).is_err() && one.get(999).is_ok());
        one.remove(&[1000, 7777]).expect("what is not there is not there");
        assert!(other.get(6).unwrap_err().contains(&*folder.path().to_string_lossy()));
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["somebody's.toml"]);
    }
}
