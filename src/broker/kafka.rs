//! The log on a Kafka cluster, through librdkafka.
//!
//! Readers see committed records only and never commit on their own; writers are idempotent, and transactional where they
//! have an id. A lost cluster is an error that says so and may be retried, while the client goes on trying by itself.

mod consumer;
mod context;
mod event;
mod failure;
mod incremental;
mod pace;
mod producer;
mod reader;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context as TaskContext, Poll as TaskPoll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use parking_lot::Mutex;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::Client;
use rdkafka::config::{ClientConfig, FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::metadata::Metadata;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::{
    Broker, BrokerError, Consumer, ConsumerSettings, NextOffset, Notes, Offsets, Producer, Records, Retention,
    TopicInfo, TopicPartition, TopicSettings,
};
use crate::config::plan::{GroupProtocol, Secret};
use crate::runtime::clock;
use consumer::KafkaConsumer;
use context::Context;
pub use incremental::Renewal;
use producer::KafkaProducer;
use reader::Reader;

/// How long a request may wait for a cluster that answers before it is reported as retriable.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a request waits before it looks whether any broker is left.
const BRIEF: Duration = Duration::from_secs(2);

/// How long a client waits for one answer before it looks again whether any broker is left.
const GLANCE: Duration = Duration::from_millis(500);

/// What keeps the guarantees: properties from `pipeline.toml` do not override these.
pub(crate) const PROTECTED: &[&str] = &[
    "auto.offset.reset",
    "bootstrap.servers",
    "delivery.report.only.error",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "enable.partition.eof",
    "group.id",
    "group.instance.id",
    "group.protocol",
    "isolation.level",
    "partition.assignment.strategy",
    "partitioner",
    "transactional.id",
];

/// What a client says itself in classic groups, and the brokers say in those of Kafka 4's own protocol.
pub(crate) const OF_CLASSIC_GROUPS: &[&str] = &["session.timeout.ms", "heartbeat.interval.ms"];

/// A Kafka cluster.
pub struct KafkaBroker {
    link: Arc<Link>,
    /// Answers questions about topics.
    asker: Mutex<BaseConsumer<Context>>,
    /// Open readers by the partition that they read, so that reading on costs no new connection.
    readers: Mutex<HashMap<TopicPartition, Reader>>,
    replication: i32,
}

/// How to reach the cluster, and how to speak of it.
struct Link {
    address: String,
    client_id: String,
    properties: BTreeMap<String, Secret>,
    /// Groups are shared out by the brokers. False from the moment that they turn out to be unable to.
    shared_by_brokers: AtomicBool,
}

impl Link {
    /// Settings of a client: what all share, `own`, then what the user wrote.
    fn config(&self, own: &[(&str, &str)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.address)
            .set("client.id", &self.client_id)
            .set("reconnect.backoff.max.ms", "2000")
            .set("topic.metadata.refresh.interval.ms", "30000")
            .set_log_level(RDKafkaLogLevel::Info);
        for (name, value) in own {
            config.set(*name, *value);
        }
        for (name, value) in &self.properties {
            if !PROTECTED.contains(&name.as_str()) {
                config.set(name, &value.0);
            }
        }
        config
    }

    /// Settings of a client that only reads, starting where it is told. Out of range is an event, not a silent jump.
    fn reading(&self, group: &str, protocol: GroupProtocol) -> ClientConfig {
        let mut config = self.config(&[
            ("session.timeout.ms", "10000"),
            // A member learns by its next heartbeat that another one has joined, and the group waits for it until then.
            ("heartbeat.interval.ms", "500"),
            // The end of a partition is told by the answer after the last record, so this bounds how late it is known.
            ("fetch.wait.max.ms", "100"),
            ("fetch.queue.backoff.ms", "10"),
            ("queued.min.messages", "50000"),
            ("queued.max.messages.kbytes", "16384"),
        ]);
        config
            .set("group.id", group)
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true");
        // A task reads the same partition number of all its topics, and only the range assignors keep these together.
        match protocol {
            GroupProtocol::Classic => config.set("partition.assignment.strategy", "range"),
            GroupProtocol::Consumer => {
                OF_CLASSIC_GROUPS.iter().for_each(|name| _ = config.remove(name));
                config.set("group.protocol", "consumer").set("group.remote.assignor", "range")
            }
        };
        config
    }

    fn protocol(&self) -> GroupProtocol {
        match self.shared_by_brokers.load(Ordering::Relaxed) {
            true => GroupProtocol::Consumer,
            false => GroupProtocol::Classic,
        }
    }

    fn client<C>(&self, config: &ClientConfig) -> Result<C, BrokerError>
    where
        C: FromClientConfigAndContext<Context>,
    {
        config.create_with_context(Context::default()).map_err(|error| BrokerError::Client {
            during: "opening a client",
            broker: self.describe(),
            reason: match &error {
                // The value may be a secret.
                KafkaError::ClientConfig(_, reason, name, _) => format!("[broker] properties.\"{name}\": {reason}"),
                _ => error.to_string(),
            },
            retriable: false,
        })
    }

    fn describe(&self) -> String {
        format!("kafka {}", self.address)
    }

    /// Asks about one topic or all. Gives up early where no broker is left, which `look` lets the client tell.
    fn metadata(
        &self,
        during: &'static str,
        topic: Option<&str>,
        client: &Client<Context>,
        look: impl Fn(),
    ) -> Result<Metadata, BrokerError> {
        let started = clock::monotonic();
        loop {
            let answer = client.fetch_metadata(topic, GLANCE);
            look();
            let waited = clock::monotonic().duration_since(started);
            match answer {
                Ok(metadata) => {
                    client.context().is_up();
                    return Ok(metadata);
                }
                Err(error) => {
                    let error = self.error(during, &error, client.context());
                    let hopeless = client.context().is_down() && waited > BRIEF;
                    if !error.is_retriable() || hopeless || waited > PATIENCE {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn no_such_topic(&self, topic: &str) -> BrokerError {
        BrokerError::NoSuchTopic { topic: topic.to_owned(), broker: self.describe() }
    }

    /// Says what an error means to the caller.
    fn error(&self, during: &'static str, error: &KafkaError, context: &Context) -> BrokerError {
        let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
        self.fault(during, code, &code.to_string(), context)
    }

    /// Says what a code means to the caller.
    fn fault(&self, during: &'static str, code: Code, reason: &str, context: &Context) -> BrokerError {
        let no_answer = matches!(
            code,
            Code::AllBrokersDown
                | Code::BrokerTransportFailure
                | Code::Resolve
                | Code::OperationTimedOut
                | Code::TimedOutQueue
                | Code::RequestTimedOut
        );
        match context.fault() {
            // Wrong credentials look like a lost broker in every other respect, but waiting does not help.
            Some((code, reason)) if no_answer && is_refusal(code) => {
                BrokerError::Client { during, broker: self.describe(), reason, retriable: false }
            }
            Some((_, reason)) if no_answer => BrokerError::Unreachable { address: self.address.clone(), reason },
            None if no_answer && code != Code::RequestTimedOut => {
                BrokerError::Unreachable { address: self.address.clone(), reason: reason.to_owned() }
            }
            _ => BrokerError::Client {
                during,
                broker: self.describe(),
                reason: reason.to_owned(),
                retriable: is_passing(code),
            },
        }
    }
}

/// The broker's door is closed to these credentials.
fn is_refusal(code: Code) -> bool {
    matches!(code, Code::Authentication | Code::SaslAuthenticationFailed | Code::SSL | Code::UnsupportedSASLMechanism)
}

/// The same request may succeed later. Those of the brokers are Kafka's own retriable errors, but for an unknown topic.
fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::OperationTimedOut
            | Code::RequestTimedOut
            | Code::TimedOutQueue
            | Code::WaitingForCoordinator
            | Code::InProgress
            | Code::Retry
            | Code::LeaderNotAvailable
            | Code::NotLeaderForPartition
            | Code::PreferredLeaderNotAvailable
            | Code::FencedLeaderEpoch
            | Code::UnknownLeaderEpoch
            | Code::ReplicaNotAvailable
            | Code::OffsetNotAvailable
            | Code::ListenerNotFound
            | Code::BrokerNotAvailable
            | Code::NetworkException
            | Code::CoordinatorLoadInProgress
            | Code::CoordinatorNotAvailable
            | Code::NotCoordinator
            | Code::NotEnoughReplicas
            | Code::NotEnoughReplicasAfterAppend
            | Code::NotController
            | Code::ConcurrentTransactions
            | Code::KafkaStorageError
            | Code::UnstableOffsetCommit
            | Code::ThrottlingQuotaExceeded
    )
}

/// The group goes on without this member.
fn is_out_of_group(code: Code) -> bool {
    matches!(
        code,
        Code::IllegalGeneration
            | Code::UnknownMemberId
            | Code::FencedInstanceId
            | Code::RebalanceInProgress
            | Code::AssignmentLost
            | Code::FencedMemberEpoch
            | Code::StaleMemberEpoch
    )
}

impl KafkaBroker {
    /// Connects, and waits until the cluster answers.
    ///
    /// # Errors
    /// [`BrokerError::Unreachable`] where no broker answers within a few seconds; [`BrokerError::Client`] where a property is
    /// not one of librdkafka's or the cluster refuses the credentials.
    pub fn open(
        brokers: &str,
        properties: &BTreeMap<String, Secret>,
        replication: i32,
        protocol: GroupProtocol,
        client_id: &str,
    ) -> Result<Self, BrokerError> {
        for name in properties.keys().filter(|name| PROTECTED.contains(&name.as_str())) {
            tracing::warn!(
                property = name,
                "[broker] property ignored: driftline's guarantees depend on its own value"
            );
        }
        let link = Link {
            address: brokers.to_owned(),
            client_id: client_id.to_owned(),
            properties: properties.clone(),
            shared_by_brokers: AtomicBool::new(protocol == GroupProtocol::Consumer),
        };
        let mut config = link.config(&[]);
        config.set("isolation.level", "read_committed").set_log_level(RDKafkaLogLevel::Emerg);
        let asker: BaseConsumer<Context> = link.client(&config)?;
        let broker = Self { link: Arc::new(link), asker: Mutex::new(asker), readers: Mutex::default(), replication };
        broker.metadata("connecting", None)?;
        Ok(broker)
    }

    /// Asks about one topic or all.
    fn metadata(&self, during: &'static str, topic: Option<&str>) -> Result<Metadata, BrokerError> {
        let asker = self.asker.lock();
        // Serves what the client says on its own: one event a call.
        let look = || (0..16).for_each(|_| drop(asker.poll(Duration::ZERO)));
        self.link.metadata(during, topic, asker.client(), look)
    }

    /// Numbers of partitions of a topic, or `None` where it does not exist. All of them have a leader.
    fn partitions(&self, topic: &str) -> Result<Option<Vec<i32>>, BrokerError> {
        let metadata = self.metadata("describing a topic", Some(topic))?;
        let found = metadata.topics().iter().find(|t| t.name() == topic);
        match found.map(|t| (t, t.error().map(Code::from))) {
            Some((t, None)) if t.partitions().iter().any(|p| p.leader() < 0) => {
                let asker = self.asker.lock();
                let reason = format!("{topic}: {}", Code::LeaderNotAvailable);
                Err(self.link.fault("describing a topic", Code::LeaderNotAvailable, &reason, asker.context()))
            }
            Some((t, None)) if !t.partitions().is_empty() => Ok(Some(t.partitions().iter().map(|p| p.id()).collect())),
            None | Some((_, None | Some(Code::UnknownTopicOrPartition | Code::UnknownTopic))) => Ok(None),
            Some((_, Some(code))) => {
                let asker = self.asker.lock();
                Err(self.link.fault("describing a topic", code, &format!("{topic}: {code}"), asker.context()))
            }
        }
    }

    /// Earliest offsets and ends of these partitions.
    fn ranges(&self, partitions: &[TopicPartition]) -> Result<Vec<(NextOffset, NextOffset)>, BrokerError> {
        let asker = self.asker.lock();
        let ask = |at: Offset| -> Result<Vec<NextOffset>, BrokerError> {
            let mut list = TopicPartitionList::with_capacity(partitions.len());
            for partition in partitions {
                list.add_partition_offset(&partition.topic, partition.partition, at)
                    .expect("a logical offset is valid");
            }
            let during = "asking for the ends of the log";
            // Instead of a time these two ask for the first and the last offset; the answers keep the order.
            let found = patiently(asker.client(), |timeout| asker.offsets_for_times(list.clone(), timeout))
                .map_err(|error| self.link.error(during, &error, asker.context()))?;
            found
                .elements()
                .iter()
                .map(|element| match (element.error(), element.offset()) {
                    (Ok(()), Offset::Offset(offset)) => Ok(NextOffset(offset)),
                    (Err(error), _) => Err(self.link.error(during, &error, asker.context())),
                    (Ok(()), _) => Err(self.link.fault(during, Code::OffsetNotAvailable, "no offset", asker.context())),
                })
                .collect()
        };
        Ok(ask(Offset::Beginning)?.into_iter().zip(ask(Offset::End)?).collect())
    }
}

impl KafkaBroker {
    /// Committed offsets and notes of a group for these topics.
    fn group_state(&self, group: &str, topics: &[Arc<str>]) -> Result<(Offsets, Notes), BrokerError> {
        let mut list = TopicPartitionList::new();
        for topic in topics {
            for partition in self.partitions(topic)?.unwrap_or_default() {
                list.add_partition(topic, partition);
            }
        }
        if list.count() == 0 {
            return Ok((Offsets::new(), Notes::new()));
        }
        consumer::group_state(&self.link, group, list)
    }
}

impl Broker for KafkaBroker {
    fn consumer(&self, settings: ConsumerSettings) -> Result<Box<dyn Consumer>, BrokerError> {
        for topic in &settings.topics {
            if self.partitions(topic)?.is_none() {
                return Err(self.link.no_such_topic(topic));
            }
        }
        Ok(Box::new(KafkaConsumer::join(self.link.clone(), settings)?))
    }

    fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>, BrokerError> {
        Ok(Box::new(KafkaProducer::open(self.link.clone(), transactional_id)?))
    }

    fn topic(&self, name: &str) -> Result<Option<TopicInfo>, BrokerError> {
        let Some(numbers) = self.partitions(name)? else { return Ok(None) };
        let name: Arc<str> = name.into();
        let partitions: Vec<_> = numbers.into_iter().map(|p| TopicPartition::new(name.clone(), p)).collect();
        Ok(Some(TopicInfo { name, partitions: self.ranges(&partitions)? }))
    }

    fn topics(&self) -> Result<Vec<TopicInfo>, BrokerError> {
        let metadata = self.metadata("listing topics", None)?;
        let mut names: Vec<(Arc<str>, usize)> = metadata
            .topics()
            .iter()
            .filter(|t| t.error().is_none() && !t.name().starts_with("__"))
            .map(|t| (t.name().into(), t.partitions().len()))
            .collect();
        names.sort();
        let mut all = Vec::new();
        for (name, count) in &names {
            all.extend(
                (0..*count).map(|p| TopicPartition::new(name.clone(), i32::try_from(p).expect("Kafka's own type"))),
            );
        }
        let mut ranges = self.ranges(&all)?.into_iter();
        let info = |(name, count)| TopicInfo { name, partitions: ranges.by_ref().take(count).collect() };
        Ok(names.into_iter().map(info).collect())
    }

    fn create_topic(&self, name: &str, settings: &TopicSettings) -> Result<(), BrokerError> {
        let during = "creating a topic";
        let admin: AdminClient<Context> = self.link.client(&self.link.config(&[]))?;
        let context = admin.inner().context();
        let partitions = i32::try_from(settings.partitions).unwrap_or(i32::MAX);
        let retention = settings.retention_ms.unwrap_or(-1).to_string();
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(self.replication))
            .set("cleanup.policy", if settings.compacted { "compact" } else { "delete" })
            .set("retention.ms", &retention);
        let options = AdminOptions::new().request_timeout(Some(PATIENCE)).operation_timeout(Some(PATIENCE));
        // A controller that is stopped meanwhile answers with no more than that something went wrong.
        let fault = |code: Code, reason: String| match code {
            Code::Unknown => BrokerError::Client { during, broker: self.link.describe(), reason, retriable: true },
            code => self.link.fault(during, code, &reason, context),
        };
        let made = wait_for(admin.create_topics([&topic], &options))
            .map_err(|error| fault(error.rdkafka_error_code().unwrap_or(Code::Unknown), format!("{name}: {error}")))?;
        for result in made {
            match result {
                Ok(_) | Err((_, Code::TopicAlreadyExists)) => {}
                Err((topic, code)) => return Err(fault(code, format!("{topic}: {code}"))),
            }
        }
        // The controller has made it; the broker that answers clients hears of it a moment later.
        let deadline = clock::monotonic() + PATIENCE;
        while self.partitions(name).map_or_else(|e| if e.is_retriable() { Ok(None) } else { Err(e) }, Ok)?.is_none() {
            if clock::monotonic() > deadline {
                return Err(self.link.fault(
                    during,
                    Code::RequestTimedOut,
                    &format!("{name} has no leader yet"),
                    context,
                ));
            }
            thread::park_timeout(Duration::from_millis(10));
        }
        Ok(())
    }

    fn retention(&self, topic: &str) -> Result<Option<Retention>, BrokerError> {
        let during = "asking how long a topic keeps its records";
        let admin: AdminClient<Context> = self.link.client(&self.link.config(&[]))?;
        let context = admin.inner().context();
        let options = AdminOptions::new().request_timeout(Some(PATIENCE));
        let told = wait_for(admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options)).map_err(|error| {
            let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
            self.link.fault(during, code, &format!("{topic}: {error}"), context)
        })?;
        let config = match told.into_iter().next() {
            Some(Ok(config)) => config,
            None | Some(Err(Code::UnknownTopicOrPartition | Code::TopicAuthorizationFailed)) => return Ok(None),
            Some(Err(code)) => return Err(self.link.fault(during, code, &format!("{topic}: {code}"), context)),
        };
        let value = |name| config.get(name).and_then(|entry| entry.value.as_deref());
        let Some(policy) = value("cleanup.policy") else { return Ok(None) };
        // Deleting is one policy, compacting another, and a topic may have both.
        let most = |name| value(name).and_then(|text| text.parse::<i64>().ok()).filter(|most| *most >= 0);
        let deletes = policy.contains("delete");
        Ok(Some(Retention {
            compacted: policy.contains("compact"),
            ms: most("retention.ms").filter(|_| deletes),
            bytes: most("retention.bytes").filter(|_| deletes),
        }))
    }

    fn committed(&self, group: &str, topics: &[Arc<str>]) -> Result<Offsets, BrokerError> {
        Ok(self.group_state(group, topics)?.0)
    }

    fn notes(&self, group: &str, topics: &[Arc<str>]) -> Result<Notes, BrokerError> {
        Ok(self.group_state(group, topics)?.1)
    }

    fn read(
        &self,
        partition: &TopicPartition,
        from: NextOffset,
        max: usize,
        timeout: Duration,
    ) -> Result<(Records, NextOffset), BrokerError> {
        let idle = self.readers.lock().remove(partition);
        let mut reader = match idle {
            Some(reader) => reader,
            None => {
                let known = self.partitions(&partition.topic)?.is_some_and(|all| all.contains(&partition.partition));
                if !known {
                    return Err(self.link.no_such_topic(&partition.topic));
                }
                Reader::open(self.link.clone(), partition.clone())?
            }
        };
        let read = reader.read(from, max, timeout)?;
        let mut readers = self.readers.lock();
        if readers.len() >= reader::KEPT {
            readers.clear();
        }
        readers.insert(partition.clone(), reader);
        Ok(read)
    }

    fn describe(&self) -> String {
        self.link.describe()
    }
}

/// Makes a blocking request with all patience where a broker answers at all, and a short one where none does.
fn patiently<T>(
    client: &Client<Context>,
    request: impl Fn(Duration) -> Result<T, KafkaError>,
) -> Result<T, KafkaError> {
    match request(BRIEF) {
        Err(error) if error.rdkafka_error_code() == Some(Code::OperationTimedOut) && answers(client) => {
            request(PATIENCE - BRIEF)
        }
        answer => answer,
    }
}

/// True where any broker answers.
fn answers(client: &Client<Context>) -> bool {
    client.fetch_metadata(None, 2 * GLANCE).is_ok()
}

/// Waits for an answer of the admin client, which speaks in futures that its own thread completes.
fn wait_for<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut TaskContext::from_waker(&waker)) {
            TaskPoll::Ready(output) => return output,
            TaskPoll::Pending => thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn link() -> Link {
        let properties =
            [("isolation.level", "read_uncommitted"), ("session.timeout.ms", "7000"), ("sasl.password", "x")];
        Link {
            address: "127.0.0.1:1".into(),
            client_id: "test".into(),
            properties: properties.map(|(name, value)| (name.to_owned(), Secret(value.to_owned()))).into(),
            shared_by_brokers: AtomicBool::new(false),
        }
    }

    #[test]
    fn users_tune_clients_but_do_not_weaken_them() {
        let config = link().reading("g", GroupProtocol::Classic);
        assert_eq!(config.get("isolation.level"), Some("read_committed"));
        assert_eq!(config.get("session.timeout.ms"), Some("7000"));
        assert_eq!(config.get("sasl.password"), Some("x"));
    }

    #[test]
    fn an_unknown_property_is_named_without_its_value() {
        let mut link = link();
        link.properties.insert("sasl.pasword".into(), Secret("hunter2".into()));
        let error = link.client::<BaseConsumer<Context>>(&link.config(&[])).err().expect("refused").to_string();
        assert!(error.contains("sasl.pasword") && !error.contains("hunter2"), "{error}");
    }

    #[test]
    fn a_cluster_that_is_not_there_is_retriable_and_says_why() {
        let error = KafkaBroker::open("127.0.0.1:1", &BTreeMap::new(), 1, GroupProtocol::Classic, "test")
            .err()
            .expect("nothing listens there");
        assert!(error.is_retriable(), "{error}");
        assert!(error.to_string().contains("refused"), "{error}");
    }

    #[rstest]
    #[case::a_leader_that_is_behind_its_own_epoch_after_a_crash(Code::UnknownLeaderEpoch, true)]
    #[case::a_leader_of_before(Code::FencedLeaderEpoch, true)]
    #[case::a_leader_that_does_not_know_its_end_yet(Code::OffsetNotAvailable, true)]
    #[case::a_topic_that_is_not_there(Code::UnknownTopicOrPartition, false)]
    #[case::no_permission(Code::TopicAuthorizationFailed, false)]
    fn what_passes_with_the_cluster_s_recovery_is_retriable(#[case] code: Code, #[case] retriable: bool) {
        let error = link().fault("asking for the ends of the log", code, &code.to_string(), &Context::default());
        assert_eq!(error.is_retriable(), retriable, "{error}");
    }

    #[test]
    fn refused_credentials_are_not_waited_for() {
        let context = Context::default();
        context.fail(Code::Authentication, "SASL authentication error: invalid credentials");
        let error = link().fault("connecting", Code::BrokerTransportFailure, "down", &context);
        assert!(!error.is_retriable());
        assert!(error.to_string().contains("invalid credentials"));
    }
}
