//! The online store: its contract, what can go wrong with it, and the choice between the two that driftline has.

use std::sync::Arc;
use std::time::Duration;

use super::embedded::EmbeddedOnline;
use super::feast::Layout;
use super::redis::RedisOnline;
use super::{GroupRead, Value};
use crate::config::plan::{OnlinePlan, Plan};
use crate::window::FeatureRows;

/// The newest feature row of each entity.
///
/// Writes are idempotent and newest-wins on (event time, sequence), decided inside the store, so that they can be
/// repeated in any order.
pub trait OnlineStore: Send + Sync {
    /// Writes each row's feature groups; of several rows of an entity only the newest. Returns when the store has them:
    /// only then may their offsets be committed. Where the store is away it retries with jitter until `give_up` says true.
    ///
    /// # Errors
    /// The last failure, once `give_up` says true or where trying again cannot help.
    fn write(&self, rows: &FeatureRows, give_up: &dyn Fn() -> bool) -> Result<(), OnlineError>;

    /// Reads one entity: its key values in the plan's order → one answer a feature group, derived features last (group
    /// `derived`).
    ///
    /// # Errors
    /// Where the store does not answer, or holds something that neither driftline nor Feast writes.
    fn read(&self, key: &[Value]) -> Result<Vec<(String, GroupRead)>, OnlineError>;

    /// Reads other entities than the pipeline's own, in one round trip: for each key, which is one of [`Layout::key`], the only
    /// view of the layout.
    ///
    /// # Errors
    /// As [`OnlineStore::read`]; where the answer takes longer than `timeout`, too.
    fn look_up(&self, layout: &Layout, keys: &[Vec<u8>], timeout: Duration) -> Result<Vec<GroupRead>, OnlineError>;

    /// Where this store is, for messages, without secrets.
    fn describe(&self) -> String;

    /// One round trip, to say early and plainly that the store is not there.
    ///
    /// # Errors
    /// Where the store does not answer or refuses this client.
    fn ping(&self) -> Result<(), OnlineError>;
}

/// Opens the plan's online store. Returns at once: the first answer of a Redis is what [`OnlineStore::ping`] waits for.
/// Its calls block, so they must not come from a thread of the runtime.
///
/// # Errors
/// Where the URL is not one of a Redis, the embedded file cannot be opened, or the plan has none.
pub fn open_online(plan: &Plan, runtime: tokio::runtime::Handle) -> Result<Arc<dyn OnlineStore>, OnlineError> {
    open_online_at(plan, 0, runtime)
}

/// As [`open_online`], to write rows of a definition that is the `epoch`th to serve after the first. In Redis they are newer
/// than those of earlier epochs, whatever their event time: a process that is late to learn of the change overwrites
/// nothing. The embedded store has one process, and no need of that.
///
/// # Errors
/// As [`open_online`].
pub fn open_online_at(
    plan: &Plan,
    epoch: u32,
    runtime: tokio::runtime::Handle,
) -> Result<Arc<dyn OnlineStore>, OnlineError> {
    Ok(match &plan.online {
        OnlinePlan::Redis { url, project, ttl } => {
            let layout = Layout::new(plan, project).at_epoch(epoch);
            Arc::new(RedisOnline::open(url, *ttl, &plan.name, layout, runtime)?)
        }
        OnlinePlan::Embedded { path, project } => {
            Arc::new(EmbeddedOnline::open(path, &plan.name, Layout::new(plan, project))?)
        }
        OnlinePlan::Off => return Err(OnlineError::Off),
    })
}

/// What can go wrong at the online store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OnlineError {
    /// There is none.
    #[error("this pipeline keeps no online store ([online] enabled = false)")]
    Off,
    /// No answer.
    #[error(
        "online store {store} does not answer: {reason}; check [online] redis and that the server runs; offsets are held back until it does"
    )]
    Unreachable {
        /// Where.
        store: String,
        /// The client's words.
        reason: String,
    },
    /// It answers, and cannot do the work for now: loading, failing over, out of memory, out of disk.
    #[error("online store {store} cannot take a {command} for now: {reason}; offsets are held back until it can")]
    Unready {
        /// Where.
        store: String,
        /// Command.
        command: &'static str,
        /// The store's words.
        reason: String,
    },
    /// The store refused.
    #[error("online store {store} refused a {command}: {reason}")]
    Refused {
        /// Where.
        store: String,
        /// Command.
        command: &'static str,
        /// The store's words.
        reason: String,
    },
    /// `[online] redis` is not a URL that the client understands.
    #[error(
        "[online] redis is not the URL of a Redis: {reason}; write redis://HOST:PORT/DATABASE, rediss:// for TLS, redis-cluster:// for a cluster"
    )]
    Url {
        /// What is wrong with it; never the URL, which may hold a password.
        reason: String,
    },
    /// The embedded store is in use by another process.
    #[error(
        "the embedded online store {path} is in use by another driftline process; stop that one, or set [online] redis, which several processes can share"
    )]
    Locked {
        /// File path.
        path: String,
    },
    /// The embedded store's file failed.
    #[error("the embedded online store {path} failed: {reason}; {remedy}")]
    Storage {
        /// File path.
        path: String,
        /// The system's words.
        reason: String,
        /// What to do.
        remedy: &'static str,
        /// True where it may work later.
        retriable: bool,
    },
    /// The key to look up does not fit the entity.
    #[error("not a key of entity {entity}: {reason}")]
    Key {
        /// Entity name.
        entity: String,
        /// What is wrong.
        reason: String,
    },
    /// What is stored is not what driftline or Feast writes.
    #[error("online store {store}, key {key}: {reason}")]
    Corrupt {
        /// Where.
        store: String,
        /// Key in hexadecimal.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

impl OnlineError {
    /// True where the same call may succeed later without anybody changing anything.
    pub fn is_retriable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Unready { .. } => true,
            Self::Storage { retriable, .. } => *retriable,
            _ => false,
        }
    }
}

/// What a person can do about a failing file, and whether waiting may be enough.
pub(super) fn remedy(error: &std::io::Error) -> (&'static str, bool) {
    use std::io::ErrorKind as K;
    match error.kind() {
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge => {
            ("free space on that disk (or raise the quota); driftline holds back and tries again", true)
        }
        K::PermissionDenied => ("give this user the right to write there; driftline holds back and tries again", true),
        K::ReadOnlyFilesystem => ("mount that disk for writing; driftline holds back and tries again", true),
        K::NotADirectory | K::IsADirectory | K::AlreadyExists => {
            ("a file is where a folder should be, or a folder where a file should be: move it away", false)
        }
        _ => ("see that the disk is well; driftline holds back and tries again", true),
    }
}

/// Pauses between attempts: doubling from 50 ms to 5 s, each shortened by up to half at random, so that the workers of a
/// restarted store do not come back all at once.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(50);
    const LONGEST: Duration = Duration::from_secs(5);

    pub(super) fn new() -> Self {
        Self { next: Self::FIRST }
    }

    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next.mul_f64(1.0 - rand::random::<f64>() / 2.0);
        self.next = (self.next * 2).min(Self::LONGEST);
        pause
    }

    /// A pause in parts, between which to ask whether to go on waiting.
    pub(super) fn steps(pause: Duration) -> impl Iterator<Item = Duration> {
        let step = Self::FIRST.as_millis();
        let parts = pause.as_millis().div_ceil(step);
        (0..parts).map(|_| Self::FIRST)
    }
}
