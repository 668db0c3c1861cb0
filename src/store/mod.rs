//! Stores: the newest feature row of each entity online, all of them offline, and the manifest that commits state and
//! offline files together.

use crate::window::FeatureRows;

/// One value in the online store or a feature row.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// No value.
    Null,
    /// 64-bit signed.
    Int64(i64),
    /// 64-bit IEEE 754.
    Float64(f64),
    /// True or false.
    Boolean(bool),
    /// UTF-8.
    String(String),
    /// Milliseconds since 1970 UTC.
    Timestamp(i64),
}

/// What a read of one feature group of one entity found.
#[derive(Debug, Clone, PartialEq)]
pub enum GroupRead {
    /// Nothing was ever written for this entity and group.
    NotFound,
    /// The group's row: event time (ms), and values in the plan's order.
    Found {
        /// Instant the values are as of.
        event_time: i64,
        /// One value a feature of the group.
        values: Vec<Value>,
    },
}

/// The newest feature row of each entity.
///
/// Writes are idempotent and newest-wins on (event time, sequence), decided inside the store, so that they can be
/// repeated in any order.
pub trait OnlineStore: Send + Sync {
    /// Writes each row's feature groups. Returns when the store has them: only then may their offsets be committed.
    /// Where the store is away it retries with jitter until `give_up` says true.
    fn write(&self, rows: &FeatureRows, give_up: &dyn Fn() -> bool) -> Result<(), OnlineError>;

    /// Reads one entity: its key values in the plan's order → one answer a feature group, derived features last (group
    /// `derived`).
    fn read(&self, key: &[Value]) -> Result<Vec<(String, GroupRead)>, OnlineError>;

    /// Where this store is, for messages, without secrets.
    fn describe(&self) -> String;

    /// One round trip, to say early and plainly that the store is not there.
    fn ping(&self) -> Result<(), OnlineError>;
}

/// What can go wrong at the online store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OnlineError {
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
        matches!(self, Self::Unreachable { .. })
    }
}
