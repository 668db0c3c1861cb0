//! The log: topics of partitions of records, consumer groups, transactions.
//!
//! Two brokers keep the same semantics behind one set of traits: [`kafka`] talks to a real cluster, [`embedded`]
//! keeps the log in one file on disk for laptops, demos and tests. Everything above this module sees [`Broker`],
//! [`Consumer`] and [`Producer`] only.
//!
//! All calls block and each consumer or producer belongs to one thread: a worker polls, computes, produces and
//! commits in that order, so that nothing is in flight while it polls and a rebalance finds a settled position.

pub mod embedded;
pub mod kafka;
mod record;
pub mod registry;
pub mod tool;

pub use record::{Blobs, Header, OutRecord, Records};
pub use registry::{RegisteredSchema, SchemaRegistry};

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::config::plan::BrokerPlan;

/// Bytes of keys and values after which a poll or a read takes no further record, whatever its `max`.
pub const MAX_POLL_BYTES: usize = 64 << 20;

/// Opens the broker that a plan names. `client_id` is this process's name in logs and in the broker's metrics.
///
/// # Errors
/// [`BrokerError::Unreachable`] where no broker answers (retriable), [`BrokerError::Locked`] where another process has the
/// embedded log, [`BrokerError::Client`] where a property is unknown or the credentials are refused.
pub fn open(plan: &BrokerPlan, client_id: &str) -> Result<Arc<dyn Broker>, BrokerError> {
    Ok(match plan {
        BrokerPlan::Kafka { brokers, properties, replication, group_protocol, .. } => {
            Arc::new(kafka::KafkaBroker::open(brokers, properties, *replication, *group_protocol, client_id)?)
        }
        BrokerPlan::Embedded { path, .. } => Arc::new(embedded::EmbeddedBroker::open(path)?),
    })
}

/// The first offset that has not been read (or applied, or committed, as the context says). Never the last read one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct NextOffset(pub i64);

/// One partition of one topic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct TopicPartition {
    /// Topic name.
    pub topic: Arc<str>,
    /// Partition number, from 0.
    pub partition: i32,
}

impl TopicPartition {
    /// Names a partition of a topic.
    pub fn new(topic: impl Into<Arc<str>>, partition: i32) -> Self {
        Self { topic: topic.into(), partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.topic, self.partition)
    }
}

/// Next offsets by partition: what a transaction commits, what a checkpoint names, what a consumer starts from.
pub type Offsets = BTreeMap<TopicPartition, NextOffset>;

/// A number beside the committed offsets of some partitions (in Kafka their metadata): what else a group has to know of how
/// far it is.
pub type Notes = BTreeMap<TopicPartition, i64>;

/// What a topic is created with when driftline creates it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicSettings {
    /// Number of partitions.
    pub partitions: u32,
    /// Keeps the newest record of each key for ever, instead of all records.
    pub compacted: bool,
    /// Milliseconds a record is kept; `None` keeps records for ever.
    pub retention_ms: Option<i64>,
}

/// A topic as the broker describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicInfo {
    /// Topic name.
    pub name: Arc<str>,
    /// Per partition: earliest offset and next offset to be written.
    pub partitions: Vec<(NextOffset, NextOffset)>,
}

/// How long a topic keeps its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Of each key only the newest record is sure to be kept.
    pub compacted: bool,
    /// Milliseconds that a record is kept, by its own timestamp; `None` keeps records for ever.
    pub ms: Option<i64>,
    /// Bytes that a partition keeps; `None` keeps all.
    pub bytes: Option<i64>,
}

/// Where a newly assigned partition starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartAt {
    /// At the group's committed offset, or at the earliest where there is none.
    Committed,
    /// At the earliest record, whatever the group has committed: a task without a checkpoint rebuilds its state.
    Earliest,
    /// At this offset whatever the group has committed: a task restores its state by reading from its checkpoint.
    Offset(NextOffset),
}

/// Decides, when partitions are assigned, where each one starts. Called inside [`Consumer::poll`].
pub type StartPolicy = Box<dyn FnMut(&TopicPartition) -> StartAt + Send>;

/// How to open a consumer.
pub struct ConsumerSettings {
    /// Consumer group.
    pub group: String,
    /// Topics to subscribe to. All must exist.
    pub topics: Vec<Arc<str>>,
    /// Client name for logs and broker metrics.
    pub client_id: String,
    /// Where newly assigned partitions start.
    pub start: StartPolicy,
    /// Name of a fixed member of the group (Kafka's `group.instance.id`): a restart takes up its old partitions without a
    /// rebalance, and a second instance of the same name fences the first.
    pub static_member: Option<String>,
}

/// What one call of [`Consumer::poll`] brought. In order: what was lost, what was gained, what was read.
///
/// A partition in `revoked` and in `assigned` was lost and came back: its task is dropped and restored.
#[derive(Debug, Default)]
pub struct Poll {
    /// Records by partition, each in offset order. Only committed records (read_committed).
    pub records: Vec<Records>,
    /// Partitions gained since the last poll, at latest together with their first records.
    pub assigned: Vec<TopicPartition>,
    /// Partitions lost since the last poll: their tasks must be dropped and must publish nothing more. No record of an
    /// earlier ownership follows.
    pub revoked: Vec<TopicPartition>,
}

impl Poll {
    /// Number of records over all partitions.
    pub fn len(&self) -> usize {
        self.records.iter().map(Records::len).sum()
    }

    /// True if no record came.
    pub fn is_empty(&self) -> bool {
        self.records.iter().all(Records::is_empty)
    }
}

/// Opaque proof of group membership that a transactional commit carries, so that the broker can fence a zombie.
pub enum GroupToken {
    /// Kafka's group metadata.
    Kafka {
        /// Group, member and epoch.
        metadata: Arc<rdkafka::consumer::ConsumerGroupMetadata>,
        /// How to tell a token that is merely old from one whose member has lost something. Classic groups have none: there
        /// every new epoch takes all partitions.
        renewal: Option<kafka::Renewal>,
    },
    /// The embedded broker's group name and membership generation.
    Embedded {
        /// Group name.
        group: String,
        /// The member's number in this process.
        member: u64,
        /// Generation of the membership.
        generation: u64,
    },
}

/// Opens consumers and producers, and answers questions about topics.
pub trait Broker: Send + Sync {
    /// Joins a consumer group.
    fn consumer(&self, settings: ConsumerSettings) -> Result<Box<dyn Consumer>, BrokerError>;

    /// Opens a producer. With a transactional id, everything sent between `begin` and `commit` becomes visible at once,
    /// and an older producer of the same id is fenced.
    fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>, BrokerError>;

    /// Describes one topic, or `None` where it does not exist.
    fn topic(&self, name: &str) -> Result<Option<TopicInfo>, BrokerError>;

    /// Describes all topics, by name.
    fn topics(&self) -> Result<Vec<TopicInfo>, BrokerError>;

    /// Creates a topic. An existing one is left as it is, whatever its settings.
    fn create_topic(&self, name: &str, settings: &TopicSettings) -> Result<(), BrokerError>;

    /// How long a topic keeps its records. `None` where it does not exist, or this client may not know.
    fn retention(&self, topic: &str) -> Result<Option<Retention>, BrokerError>;

    /// Committed next offsets of a group for these topics. Partitions without a commit are absent.
    fn committed(&self, group: &str, topics: &[Arc<str>]) -> Result<Offsets, BrokerError>;

    /// Notes beside the committed offsets of a group for these topics. Partitions without one are absent.
    fn notes(&self, group: &str, topics: &[Arc<str>]) -> Result<Notes, BrokerError>;

    /// Reads one partition without a group: committed records from `from` (inclusive) on, at most `max` records,
    /// waiting at most `timeout` for the first one. Returns the position to go on from.
    fn read(
        &self,
        partition: &TopicPartition,
        from: NextOffset,
        max: usize,
        timeout: Duration,
    ) -> Result<(Records, NextOffset), BrokerError>;

    /// Where this broker is, for messages: `kafka localhost:9092` or `embedded ./data/churn/log.redb`.
    fn describe(&self) -> String;
}

/// A member of a consumer group. Belongs to one thread.
pub trait Consumer: Send {
    /// Waits up to `timeout` for the first record, then takes what is there, at most `max` records. Returns at once
    /// where partitions were gained or lost.
    ///
    /// # Errors
    /// [`BrokerError::Unreachable`] while no broker answers: the client goes on trying, so poll again.
    /// [`BrokerError::Fenced`] where a static member of the same name has joined.
    /// [`BrokerError::OffsetOutOfRange`] where [`StartAt::Offset`] asked for records that have expired. A committed
    /// offset that has expired is logged and the partition goes on at the earliest record.
    fn poll(&mut self, max: usize, timeout: Duration) -> Result<Poll, BrokerError>;

    /// Sets the notes of the commits that follow: of the partitions whose offsets they name, each keeps its note or has none.
    fn note(&mut self, notes: &Notes);

    /// Commits outside of a transaction (at-least-once delivery), and waits for the broker's answer.
    ///
    /// # Errors
    /// [`BrokerError::Fenced`] where a rebalance has given the partitions to another member.
    fn commit(&mut self, offsets: &Offsets) -> Result<(), BrokerError>;

    /// Proof of membership for [`Producer::commit`].
    fn token(&self) -> Result<GroupToken, BrokerError>;

    /// The partition's end as of the last fetch (exclusive): the offset that the next record will get, or `None` before
    /// the first fetch. Costs no round trip. For lag; whether anything is left to read, [`Consumer::caught_up`] knows.
    fn end(&self, partition: &TopicPartition) -> Option<NextOffset>;

    /// True where all that the partition holds has been handed out, as of the last fetch: no committed record lies between
    /// the position and the partition's end. Transaction markers and records of aborted or open transactions do not
    /// count. False before the first fetch has told. Costs no round trip.
    fn caught_up(&self, partition: &TopicPartition) -> bool;

    /// Committed next offsets of the consumer's group for these partitions, and the notes beside them. What has none is absent.
    fn committed(&self, partitions: &[TopicPartition]) -> Result<(Offsets, Notes), BrokerError>;

    /// Goes on from these positions; partitions that are not named or not assigned are left as they are. For going back
    /// after a transaction was rolled back.
    fn seek(&mut self, offsets: &Offsets) -> Result<(), BrokerError>;

    /// Stops fetching these partitions until [`Consumer::resume`]; they stay assigned.
    fn pause(&mut self, partitions: &[TopicPartition]) -> Result<(), BrokerError>;

    /// Goes on fetching.
    fn resume(&mut self, partitions: &[TopicPartition]) -> Result<(), BrokerError>;
}

/// Writes records. Belongs to one thread.
pub trait Producer: Send {
    /// Opens a transaction. Does nothing for a producer without a transactional id, or where one is open.
    fn begin(&mut self) -> Result<(), BrokerError>;

    /// Hands over a record. It may still be in memory when this returns; waits where the buffer is full.
    fn send(&mut self, record: OutRecord<'_>) -> Result<(), BrokerError>;

    /// As [`Consumer::note`], for commits with a transactional id.
    fn note(&mut self, notes: &Notes);

    /// Waits until all that was sent is acknowledged, then commits the transaction together with the group's offsets.
    /// Without a transactional id it only waits; the caller then commits through the consumer.
    ///
    /// # Errors
    /// A retriable error leaves all as it was: call again with the same arguments, or abort. [`BrokerError::Undecided`]: the
    /// broker was asked to commit and did not answer, so the transaction is committed or not, and only a further `commit`
    /// with the same arguments tells; until it does, `send` and `abort` give this error too. A new producer of the same id
    /// settles it as well. [`BrokerError::Aborted`]: the transaction is rolled back; read its input again. [`BrokerError::Fenced`]: rolled back too, and the right to
    /// publish is lost: drop the tasks, open a new producer and go on with what [`Consumer::poll`] assigns.
    fn commit(&mut self, offsets: &Offsets, token: Option<&GroupToken>) -> Result<(), BrokerError>;

    /// Gives up the transaction: nothing that was sent becomes visible. Does nothing where none is open.
    ///
    /// # Errors
    /// Retriable where the broker is away; what is left of it is then rolled back by the next `abort` or `begin`.
    /// [`BrokerError::Undecided`] where the outcome of a commit is open.
    fn abort(&mut self) -> Result<(), BrokerError>;
}

/// What can go wrong at the log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// No broker answered.
    #[error(
        "no broker reachable at {address}: {reason}; check [broker] brokers, that the server runs, and that this host may reach it"
    )]
    Unreachable {
        /// Bootstrap address.
        address: String,
        /// The client's words.
        reason: String,
    },
    /// A topic that should be there is not.
    #[error(
        "topic '{topic}' does not exist on {broker}; create it (driftline topic create {topic}) or mend its name in pipeline.toml"
    )]
    NoSuchTopic {
        /// Topic name.
        topic: String,
        /// Where it was looked for.
        broker: String,
    },
    /// The offset to start from is no longer in the log.
    #[error(
        "{partition}: offset {offset} is gone from the log (earliest is {earliest}): records expired before they were read; restore from an older checkpoint is impossible, see docs/operations.md"
    )]
    OffsetOutOfRange {
        /// Where.
        partition: TopicPartition,
        /// Wanted offset.
        offset: i64,
        /// First offset still there.
        earliest: i64,
    },
    /// A newer producer with the same transactional id, or a rebalance, has taken this one's right to publish.
    #[error("fenced: another instance has taken over {taken}; this one stops publishing")]
    Fenced {
        /// What it took: `transactional id 'x'`, `partitions of group 'g'`, `static member 'm' of group 'g'`.
        taken: String,
    },
    /// The transaction was rolled back and nothing of it is visible; its input has to be read again.
    #[error("transaction of '{transactional_id}' rolled back: {reason}")]
    Aborted {
        /// The producer's id.
        transactional_id: String,
        /// The broker's words.
        reason: String,
    },
    /// The broker was asked to commit and its answer did not come: what was sent may be visible or not.
    #[error("the commit of '{transactional_id}' was asked for and is not answered yet: {reason}")]
    Undecided {
        /// The producer's id.
        transactional_id: String,
        /// The client's words.
        reason: String,
    },
    /// The client has given up for good, whatever became of its last transaction: the next producer of the id finds out.
    #[error("the producer '{transactional_id}' cannot go on, a new one takes its place: {reason}")]
    Spent {
        /// The producer's id.
        transactional_id: String,
        /// The client's words.
        reason: String,
    },
    /// One record is too large for the broker, or otherwise refused for its own sake.
    #[error("{topic}: the broker refused a record: {reason}")]
    Refused {
        /// Topic name.
        topic: String,
        /// The broker's words.
        reason: String,
    },
    /// The embedded log is in use by another process.
    #[error(
        "the embedded log {path} is in use by another driftline process; stop that one, or set [broker] brokers to use Kafka, which several processes can share"
    )]
    Locked {
        /// File path.
        path: String,
    },
    /// The embedded log's storage failed.
    #[error("the embedded log {path} failed: {reason}")]
    Storage {
        /// File path.
        path: String,
        /// The storage's words.
        reason: String,
    },
    /// The schema registry failed or refused.
    #[error("schema registry {url}: {reason}")]
    Registry {
        /// Registry address.
        url: String,
        /// What it said.
        reason: String,
    },
    /// Anything else the client reports.
    #[error("{during} on {broker}: {reason}")]
    Client {
        /// What was being done.
        during: &'static str,
        /// Where.
        broker: String,
        /// The client's words.
        reason: String,
        /// True if trying again may help.
        retriable: bool,
    },
}

impl BrokerError {
    /// True where the same call may succeed later without anybody changing anything.
    pub fn is_retriable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Registry { .. } => true,
            Self::Client { retriable, .. } => *retriable,
            _ => false,
        }
    }

    /// True where this instance has lost its right to publish and must drop its tasks and rejoin.
    pub fn is_fenced(&self) -> bool {
        matches!(self, Self::Fenced { .. })
    }

    /// True where everything has to begin again with a new producer, from what the log says is committed.
    pub fn is_spent(&self) -> bool {
        matches!(self, Self::Spent { .. })
    }

    /// True where only a further commit, or a new producer of the same id, tells what became of a transaction.
    pub fn is_undecided(&self) -> bool {
        matches!(self, Self::Undecided { .. })
    }

    /// True where the transaction is gone and its input has to be read again.
    pub fn is_aborted(&self) -> bool {
        matches!(self, Self::Aborted { .. })
    }
}
