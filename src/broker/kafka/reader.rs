//! Reads one partition without being a member of a group.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::RDKafkaErrorCode as Code;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::context::Context;
use super::event::{EventQueue, Said};
use super::{GLANCE, Link, PATIENCE};
use crate::broker::{BrokerError, MAX_POLL_BYTES, NextOffset, Records, TopicPartition};
use crate::config::plan::GroupProtocol;
use crate::runtime::clock;

/// Readers that a broker keeps open.
pub(super) const KEPT: usize = 32;

pub(super) struct Reader {
    /// Before `client`, which must outlive it.
    queue: EventQueue,
    client: BaseConsumer<Context>,
    link: Arc<Link>,
    partition: TopicPartition,
    /// Where the next record comes from; `None` before the first read.
    at: Option<i64>,
}

impl Reader {
    pub(super) fn open(link: Arc<Link>, partition: TopicPartition) -> Result<Self, BrokerError> {
        // librdkafka wants a group's name to be assigned partitions. It is never joined, asked or committed to.
        let mut config = link.reading("driftline.reader", GroupProtocol::Classic);
        config.set("queued.max.messages.kbytes", "4096");
        let client: BaseConsumer<Context> = link.client(&config)?;
        // SAFETY: the client lives in the same structure, after the queue.
        let queue = unsafe { EventQueue::of_consumer(client.client().native_ptr()) };
        Ok(Self { queue, client, link, partition, at: None })
    }

    pub(super) fn read(
        &mut self,
        from: NextOffset,
        max: usize,
        timeout: Duration,
    ) -> Result<(Records, NextOffset), BrokerError> {
        let during = "reading a partition";
        if self.at != Some(from.0) {
            let mut list = TopicPartitionList::with_capacity(1);
            list.add_partition_offset(&self.partition.topic, self.partition.partition, Offset::Offset(from.0))
                .expect("a position is not negative");
            let context = self.client.context();
            self.client.assign(&list).map_err(|error| self.link.error(during, &error, context))?;
            // Until this read has ended well, a second one must not go on from here.
            self.at = None;
        }
        let mut records = Records::new(self.partition.clone());
        let mut at = from.0;
        let deadline = clock::monotonic() + timeout;
        while records.len() < max && records.keys.bytes() + records.values.bytes() < MAX_POLL_BYTES {
            let wait = if records.is_empty() {
                deadline.saturating_duration_since(clock::monotonic())
            } else {
                Duration::ZERO
            };
            let Some(event) = self.queue.next(wait) else { break };
            match event.said() {
                Said::Record(message) => {
                    let headers = message.headers();
                    if !headers.is_empty() {
                        records.headers.push((records.len(), headers));
                    }
                    records.push(message.offset(), message.timestamp(), message.key(), message.value());
                    at = message.offset() + 1;
                }
                // The end lies behind transaction markers that no record follows.
                Said::End(_, _, end) if end > at => {
                    at = end;
                    break;
                }
                Said::Error(fault) => {
                    let context = self.client.context();
                    context.fail(fault.code, &fault.reason);
                    match fault.code {
                        Code::AutoOffsetReset | Code::OffsetOutOfRange => {
                            let (earliest, _) = self
                                .client
                                .fetch_watermarks(&self.partition.topic, self.partition.partition, PATIENCE)
                                .map_err(|error| self.link.error(during, &error, context))?;
                            let partition = self.partition.clone();
                            return Err(BrokerError::OffsetOutOfRange { partition, offset: from.0, earliest });
                        }
                        Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => {
                            return Err(self.link.no_such_topic(&self.partition.topic));
                        }
                        Code::TopicAuthorizationFailed => {
                            return Err(self.link.fault(during, fault.code, &fault.reason, context));
                        }
                        _ if fault.fatal => return Err(self.link.fault(during, fault.code, &fault.reason, context)),
                        _ => {}
                    }
                }
                Said::Log(level, facility, text) => self.client.context().line(level, &facility, &text),
                Said::End(..) | Said::Assign(_) | Said::Revoke(_) | Said::Committed(_) | Said::Other => {}
            }
        }
        let context = self.client.context();
        if !records.is_empty() || at > from.0 {
            context.is_up();
        } else if context.is_down() {
            match self.client.fetch_metadata(Some(&self.partition.topic), GLANCE) {
                Ok(_) => context.is_up(),
                Err(error) => return Err(self.link.error(during, &error, context)),
            }
        }
        self.at = Some(at);
        Ok((records, NextOffset(at)))
    }
}
