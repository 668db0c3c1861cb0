//! Groups that the brokers share out themselves (KIP-848): partitions come and go one by one, and what stays goes on.
//!
//! A task reads the same partition number of all its topics. The range assignor keeps these together, but nothing promises
//! that they come and go in one step, so this file does: a number is handed out and taken as a whole.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rdkafka::bindings as native;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::RDKafkaErrorCode as Code;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::PATIENCE;
use super::consumer::{Gathered, KafkaConsumer, Owned};
use super::context::Context;
use crate::broker::{BrokerError, Offsets, Poll, TopicPartition};
use crate::config::plan::GroupProtocol;
use crate::runtime::clock;

/// How long an answer that tells a member's new epoch may be on its way after the broker has gone over to it.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// What a consumer and the tokens that it has given know of its membership.
#[derive(Default)]
pub(super) struct Membership {
    /// How often partitions were taken from this member.
    pub(super) losses: AtomicU64,
    /// A commit was refused for good: what it would have committed has to be read again, by a new membership.
    pub(super) over: AtomicBool,
}

/// Tells whether a member that was refused for its epoch has a newer one and has lost nothing since.
///
/// The broker renews an epoch whenever anything changes in the group, and tells the member a moment later. A commit in that
/// moment is refused although the member still owns all that it commits.
#[derive(Clone)]
pub struct Renewal {
    client: Weak<BaseConsumer<Context>>,
    epoch: i32,
    membership: Arc<Membership>,
    losses: u64,
}

impl Renewal {
    /// Waits a moment for a newer epoch. False where there is none, or where partitions were taken since: then the right to
    /// publish is gone, and the consumer's next poll begins anew.
    pub(super) fn has_come(&self) -> bool {
        let Some(client) = self.client.upgrade() else { return false };
        if self.membership.losses.load(Ordering::Relaxed) != self.losses {
            return false;
        }
        let deadline = clock::monotonic() + ON_ITS_WAY;
        // A member that was thrown out has epoch 0 until it has given back what it had, which takes a poll.
        while epoch(&client) <= self.epoch {
            if clock::monotonic() > deadline {
                self.membership.over.store(true, Ordering::Relaxed);
                return false;
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        true
    }
}

/// The epoch of the client's membership.
fn epoch(client: &BaseConsumer<Context>) -> i32 {
    // SAFETY: the client is live; the answer is a structure of ours, or null.
    unsafe {
        let metadata = native::rd_kafka_consumer_group_metadata(client.client().native_ptr());
        if metadata.is_null() {
            return -1;
        }
        let epoch = native::rd_kafka_consumer_group_metadata_generation_id(metadata);
        native::rd_kafka_consumer_group_metadata_destroy(metadata);
        epoch
    }
}

impl KafkaConsumer {
    pub(super) fn renewal(&self) -> Renewal {
        Renewal {
            client: Arc::downgrade(&self.client),
            epoch: epoch(&self.client),
            membership: Arc::clone(&self.membership),
            losses: self.membership.losses.load(Ordering::Relaxed),
        }
    }

    /// True where the brokers turn out not to share partitions out, from now on for all consumers.
    pub(super) fn is_not_shared_by_brokers(&self) -> bool {
        let refused = matches!(
            self.client.client().fatal_error(),
            Some((Code::UnsupportedVersion | Code::UnsupportedFeature, _))
        );
        if refused && self.protocol == GroupProtocol::Consumer {
            if self.link.shared_by_brokers.swap(false, Ordering::Relaxed) {
                tracing::warn!(
                    broker = self.link.describe(),
                    "the brokers do not know [broker] group_protocol = \"consumer\" (Kafka 4.0 and later do): going on with \"classic\""
                );
            }
            return true;
        }
        false
    }

    /// Notes what the group gives in addition. Returns what is taken from its present task because the same number comes
    /// with another topic: the task is built anew with all of them.
    pub(super) fn receive(&mut self, given: Vec<TopicPartition>) -> Vec<TopicPartition> {
        let comes = |at: &TopicPartition| given.iter().any(|g| g.partition == at.partition);
        let (torn, kept): (Vec<Owned>, Vec<Owned>) = self.owned.drain(..).partition(|o| comes(&o.partition));
        self.owned = kept;
        let torn: Vec<TopicPartition> = torn.into_iter().map(|o| o.partition).collect();
        self.stranded.extend(torn.iter().cloned());
        let mut all = given.clone();
        all.extend(self.stranded.iter().filter(|at| comes(at)).cloned());
        let start = &mut self.start;
        let all = all.into_iter().map(|at| {
            let start = start(&at);
            (at, start)
        });
        self.given.get_or_insert_default().extend(all);
        torn
    }

    /// Takes up what was given and hands out what was gathered; an error is told by the next poll.
    pub(super) fn after_more(&mut self, gathered: Gathered, revoked: Vec<TopicPartition>) -> Result<Poll, BrokerError> {
        let records = gathered.except(&revoked);
        let assigned = match self.take_up() {
            Ok(assigned) => assigned,
            Err(error) => {
                self.postponed = Some(error);
                Vec::new()
            }
        };
        Ok(Poll { records, assigned, revoked })
    }

    /// Makes librdkafka fetch more partitions, from where each starts.
    pub(super) fn assign_more(&mut self, more: Vec<Owned>) -> Result<(), BrokerError> {
        let context = self.client.context();
        let fail = |error| self.link.error("taking up partitions", &error, context);
        // Those that were here already start elsewhere now.
        let again: Vec<_> =
            self.stranded.iter().filter(|at| more.iter().any(|o| o.partition == **at)).cloned().collect();
        if !again.is_empty() {
            self.client.incremental_unassign(&Self::list(&again)).map_err(fail)?;
            self.stranded.retain(|at| !again.contains(at));
        }
        let mut list = TopicPartitionList::with_capacity(more.len());
        for owned in &more {
            let from = owned.next.map_or(Offset::Beginning, Offset::Offset);
            list.add_partition_offset(&owned.partition.topic, owned.partition.partition, from)
                .expect("a position is not negative");
        }
        self.client.incremental_assign(&list).map_err(fail)?;
        self.owned.extend(more);
        Ok(())
    }

    /// Gives back what the group takes, and lets go of what else is of the same numbers. The group waits for it.
    pub(super) fn give_back_some(&mut self, lost: Vec<(String, i32)>) -> Result<Vec<TopicPartition>, BrokerError> {
        let lost: Vec<_> = lost.into_iter().map(|(topic, number)| TopicPartition::new(topic, number)).collect();
        let context = self.client.context();
        self.client
            .incremental_unassign(&Self::list(&lost))
            .map_err(|error| self.link.error("giving back partitions", &error, context))?;
        self.membership.losses.fetch_add(1, Ordering::Relaxed);
        self.stranded.retain(|at| !lost.contains(at));
        let goes = |at: &TopicPartition| lost.iter().any(|l| l.partition == at.partition);
        // What was given but never taken up, the caller never heard of.
        if let Some(given) = &mut self.given {
            given.retain(|(at, _)| !lost.contains(at));
        }
        let (gone, kept): (Vec<Owned>, Vec<Owned>) = self.owned.drain(..).partition(|o| goes(&o.partition));
        self.owned = kept;
        let gone: Vec<TopicPartition> = gone.into_iter().map(|o| o.partition).collect();
        self.stranded.extend(gone.iter().filter(|at| !lost.contains(at)).cloned());
        Ok(gone)
    }

    /// Goes on elsewhere within what is owned.
    pub(super) fn move_to(&mut self, offsets: &Offsets) -> Result<(), BrokerError> {
        const DURING: &str = "going back";
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (at, next) in offsets.iter().filter(|(at, _)| self.owned.iter().any(|o| o.partition == **at)) {
            list.add_partition_offset(&at.topic, at.partition, Offset::Offset(next.0))
                .expect("a position is not negative");
        }
        let context = self.client.context();
        let fail = |error| self.link.error(DURING, &error, context);
        let moved = self.client.seek_partitions(list, PATIENCE).map_err(fail)?;
        moved.elements().iter().try_for_each(|element| element.error()).map_err(fail)?;
        for owned in self.owned.iter_mut().filter(|o| offsets.contains_key(&o.partition)) {
            (owned.end, owned.fetched) = (None, false);
        }
        Ok(())
    }
}
