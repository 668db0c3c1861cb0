//! Stores: the newest feature row of each entity online, all of them offline, and the manifest that commits state and
//! offline files together.
//!
//! - Online: [`OnlineStore`] is Redis ([`redis`](self) in Feast's layout) or one embedded file with the same bytes;
//!   [`open_online`] picks, [`lookup`] reads one entity for a person.
//! - Offline: [`OfflineStore`] keeps feature rows and task state as Arrow files and commits them with one [`Manifest`].
//!   [`OfflineStore::read_rows`] reads history back.

mod checkpoint;
mod cold;
mod embedded;
pub mod feast;
mod lookup;
mod manifest;
mod offline;
mod online;
mod reader;
mod redis;
mod versions;

pub use checkpoint::Checkpoint;
pub use cold::DiskStates;
pub use lookup::{FeatureRead, GroupAnswer, OnlineRow, Status, key_from_text, lookup};
pub use manifest::{DataFile, Manifest, StateFile};
pub use offline::{OfflineError, OfflineStore};
pub use online::{OnlineError, OnlineStore, open_online, open_online_at};
pub use reader::{PartitionSummary, RowReader};
pub use versions::{Action, Definition, Role, Version, Versions};

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
    /// Values of one type, none of them null.
    List(Vec<Value>),
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
