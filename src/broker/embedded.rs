//! The log in one file of this machine: topics, groups and transactions without a server.
//!
//! The semantics are Kafka's, so that a pipeline cannot tell the difference: transactions become visible at once together
//! with their offsets, an older producer of an id is fenced, groups rebalance, keys go to the partitions that Kafka's own
//! clients choose. A commit is on disk when it returns. The file belongs to one process at a time; within it, all who open
//! the same folder share one log.

mod codec;
mod consumer;
mod group;
mod log;
mod partitioner;
mod producer;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use redb::{Builder, Database, DatabaseError};

use super::{
    Broker, BrokerError, Consumer, ConsumerSettings, MAX_POLL_BYTES, NextOffset, Notes, Offsets, Producer, Records,
    Retention, TopicInfo, TopicPartition, TopicSettings,
};
use crate::runtime::clock;
use consumer::EmbeddedConsumer;
use log::Log;
use producer::EmbeddedProducer;

/// Memory that one database may use to cache its file.
const CACHE: usize = 64 << 20;

/// How long opening waits for this process's own previous handle to be closed by another thread.
const CLOSING: Duration = Duration::from_secs(1);

/// Open databases of this process, by canonical path.
static DATABASES: LazyLock<Mutex<HashMap<PathBuf, Weak<Database>>>> = LazyLock::new(Mutex::default);

/// Open logs of this process, by canonical folder.
static LOGS: LazyLock<Mutex<HashMap<PathBuf, Weak<Log>>>> = LazyLock::new(Mutex::default);

/// Opens a redb file, creating it and its folder where they are missing. Within the process all callers with the same path
/// share one handle.
///
/// # Errors
/// [`BrokerError::Locked`] where another process has the file open, [`BrokerError::Storage`] where it cannot be read or written.
pub fn database(path: &Path) -> Result<Arc<Database>, BrokerError> {
    let failed = |reason: String| BrokerError::Storage { path: path.display().to_string(), reason };
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed("not the path of a file".to_owned()));
    };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    std::fs::create_dir_all(folder).map_err(|e| failed(e.to_string()))?;
    let key = folder.canonicalize().map_err(|e| failed(e.to_string()))?.join(name);
    let mut databases = DATABASES.lock();
    if let Some(open) = databases.get(&key).and_then(Weak::upgrade) {
        return Ok(open);
    }
    let ours = databases.contains_key(&key);
    let deadline = clock::monotonic() + CLOSING;
    loop {
        match Builder::new().set_cache_size(CACHE).create(&key) {
            Ok(database) => {
                let database = Arc::new(database);
                databases.insert(key, Arc::downgrade(&database));
                return Ok(database);
            }
            // The last handle is gone from memory but its thread has not closed the file yet.
            Err(DatabaseError::DatabaseAlreadyOpen) if ours && clock::monotonic() < deadline => {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            Err(DatabaseError::DatabaseAlreadyOpen) => {
                return Err(BrokerError::Locked { path: path.display().to_string() });
            }
            Err(error) => return Err(failed(error.to_string())),
        }
    }
}

/// The log's file in its folder.
const FILE: &str = "log.redb";

/// The embedded log.
pub struct EmbeddedBroker {
    log: Arc<Log>,
}

impl EmbeddedBroker {
    /// True where a folder holds a log already.
    pub fn exists(folder: &Path) -> bool {
        folder.join(FILE).exists()
    }

    /// Opens `<folder>/log.redb`, a new one where there is none.
    ///
    /// # Errors
    /// As [`database`].
    pub fn open(folder: &Path) -> Result<Self, BrokerError> {
        let path = folder.join(FILE);
        let database = database(&path)?;
        let key = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let mut logs = LOGS.lock();
        if let Some(log) = logs.get(&key).and_then(Weak::upgrade) {
            return Ok(Self { log });
        }
        let log = Arc::new(Log::open(path, database)?);
        logs.insert(key, Arc::downgrade(&log));
        Ok(Self { log })
    }
}

impl EmbeddedBroker {
    fn partitions(&self, topics: &[Arc<str>]) -> Vec<TopicPartition> {
        let mut partitions = Vec::new();
        for topic in topics {
            let count = self.log.state.lock().topics.get(topic).map_or(0, |t| t.ranges.len());
            let numbers = 0..i32::try_from(count).expect("few partitions");
            partitions.extend(numbers.map(|p| TopicPartition::new(topic.clone(), p)));
        }
        partitions
    }
}

impl Broker for EmbeddedBroker {
    fn consumer(&self, settings: ConsumerSettings) -> Result<Box<dyn Consumer>, BrokerError> {
        for topic in &settings.topics {
            if !self.log.state.lock().topics.contains_key(topic) {
                return Err(self.log.no_such_topic(topic));
            }
        }
        Ok(Box::new(EmbeddedConsumer::join(self.log.clone(), settings)))
    }

    fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>, BrokerError> {
        Ok(Box::new(EmbeddedProducer::open(self.log.clone(), transactional_id)?))
    }

    fn topic(&self, name: &str) -> Result<Option<TopicInfo>, BrokerError> {
        let state = self.log.state.lock();
        Ok(state.topics.get_key_value(name).map(|(name, topic)| info(name, topic)))
    }

    fn topics(&self) -> Result<Vec<TopicInfo>, BrokerError> {
        Ok(self.log.state.lock().topics.iter().map(|(name, topic)| info(name, topic)).collect())
    }

    fn create_topic(&self, name: &str, settings: &TopicSettings) -> Result<(), BrokerError> {
        if settings.partitions == 0 {
            return Err(BrokerError::Client {
                during: "creating a topic",
                broker: self.describe(),
                reason: format!("{name}: a topic needs at least one partition"),
                retriable: false,
            });
        }
        self.log.create_topic(name, settings)
    }

    fn retention(&self, topic: &str) -> Result<Option<Retention>, BrokerError> {
        let state = self.log.state.lock();
        Ok(state.topics.get(topic).map(|topic| {
            let TopicSettings { compacted, retention_ms, .. } = topic.settings;
            Retention { compacted, ms: retention_ms, bytes: None }
        }))
    }

    fn committed(&self, group: &str, topics: &[Arc<str>]) -> Result<Offsets, BrokerError> {
        self.log.committed(group, &self.partitions(topics))
    }

    fn notes(&self, group: &str, topics: &[Arc<str>]) -> Result<Notes, BrokerError> {
        self.log.notes(group, &self.partitions(topics))
    }

    fn read(
        &self,
        partition: &TopicPartition,
        from: NextOffset,
        max: usize,
        timeout: Duration,
    ) -> Result<(Records, NextOffset), BrokerError> {
        let deadline = clock::monotonic() + timeout;
        let mut state = self.log.state.lock();
        let end = loop {
            let span = state.span(partition).ok_or_else(|| self.log.no_such_topic(&partition.topic))?;
            if from.0 < span.start || from.0 > span.end {
                let (partition, offset, earliest) = (partition.clone(), from.0, span.start);
                return Err(BrokerError::OffsetOutOfRange { partition, offset, earliest });
            }
            if from.0 < span.end {
                break span.end;
            }
            if self.log.changed.wait_until(&mut state, deadline).timed_out() {
                return Ok((Records::new(partition.clone()), from));
            }
        };
        drop(state);
        let mut records = Records::new(partition.clone());
        let more = self.log.snapshot()?.read(from.0..end, max, MAX_POLL_BYTES, &mut records)?;
        let next = match records.next() {
            Some(next) if more => next,
            // What follows was superseded, up to the end that was known before.
            Some(next) => next.max(NextOffset(end)),
            None if more => from,
            None => NextOffset(end),
        };
        Ok((records, next))
    }

    fn describe(&self) -> String {
        format!("embedded {}", self.log.path().display())
    }
}

fn info(name: &Arc<str>, topic: &log::Topic) -> TopicInfo {
    let partitions = topic.ranges.iter().map(|span| (NextOffset(span.start), NextOffset(span.end))).collect();
    TopicInfo { name: name.clone(), partitions }
}
