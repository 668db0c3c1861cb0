//! What becomes of the failures that a consumer's client reports on its own.

use rdkafka::consumer::Consumer as _;
use rdkafka::error::RDKafkaErrorCode as Code;

use super::consumer::KafkaConsumer;
use super::event::Fault;
use super::{GLANCE, PATIENCE, is_passing, is_refusal};
use crate::broker::{BrokerError, NextOffset, StartAt};
use crate::config::plan::GroupProtocol;

/// What becomes of a failure that the client reports on its own.
pub(super) enum Verdict {
    /// Nothing: it passes.
    Passes,
    /// The membership is over; another begins.
    JoinAnew(GroupProtocol),
}

impl KafkaConsumer {
    /// Decides about a failure that the client reports on its own: most pass by themselves.
    pub(super) fn judge(&mut self, fault: &Fault) -> Result<Verdict, BrokerError> {
        match fault.code {
            Code::AutoOffsetReset | Code::OffsetOutOfRange => self.out_of_range(fault),
            _ if fault.fatal && self.is_not_shared_by_brokers() => Ok(Verdict::JoinAnew(GroupProtocol::Classic)),
            _ => self.failure(fault).map(|()| Verdict::Passes),
        }
    }

    fn failure(&mut self, fault: &Fault) -> Result<(), BrokerError> {
        let context = self.client.context();
        context.fail(fault.code, &fault.reason);
        match fault.code {
            Code::FencedInstanceId => Err(self.fenced()),
            Code::Fatal => match self.client.client().fatal_error() {
                Some((Code::FencedInstanceId, _)) => Err(self.fenced()),
                _ => Err(self.link.fault("reading", fault.code, &fault.reason, context)),
            },
            Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => {
                let Some((topic, ..)) = &fault.partition else { return Ok(()) };
                let gone = self.client.fetch_metadata(Some(topic), GLANCE).is_ok_and(|metadata| {
                    let known = metadata.topics().iter().find(|t| t.name() == topic);
                    known.is_none_or(|t| t.error().map(Code::from) == Some(Code::UnknownTopicOrPartition))
                });
                if gone { Err(self.link.no_such_topic(topic)) } else { Ok(()) }
            }
            _ if fault.fatal => Err(self.link.fault("reading", fault.code, &fault.reason, context)),
            Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed => {
                Err(self.link.fault("reading", fault.code, &fault.reason, context))
            }
            code if is_refusal(code) => Err(self.link.fault("reading", code, &fault.reason, context)),
            Code::AllBrokersDown | Code::BrokerTransportFailure | Code::Resolve => Ok(()),
            Code::PollExceeded => {
                tracing::warn!(group = self.group, "too long between two polls: the group goes on without this member");
                Ok(())
            }
            code if is_passing(code) => Ok(()),
            _ => Err(BrokerError::Client {
                during: "reading",
                broker: self.link.describe(),
                reason: fault.reason.clone(),
                retriable: true,
            }),
        }
    }

    /// A position that the log no longer has: an error where a task's state depends on it, else the earliest record.
    fn out_of_range(&mut self, fault: &Fault) -> Result<Verdict, BrokerError> {
        let Some((topic, number, _)) = &fault.partition else { return Ok(Verdict::Passes) };
        let Some(index) = self.index_of(topic, *number) else { return Ok(Verdict::Passes) };
        let context = self.client.context();
        context.fail(fault.code, &fault.reason);
        let (earliest, end) = self
            .client
            .fetch_watermarks(topic, *number, PATIENCE)
            .map_err(|error| self.link.error("asking for the ends of the log", &error, context))?;
        let owned = &mut self.owned[index];
        let offset = owned.next.unwrap_or(earliest);
        if matches!(owned.start, StartAt::Offset(_)) {
            return Err(BrokerError::OffsetOutOfRange { partition: owned.partition.clone(), offset, earliest });
        }
        tracing::warn!(
            partition = %owned.partition, committed = offset, earliest, end,
            "the committed offset is not in the log any more: going on at the earliest record"
        );
        owned.next = Some(earliest);
        match self.protocol {
            GroupProtocol::Classic => self.assign().map(|()| Verdict::Passes),
            // What has failed can only be assigned anew, and that is the group's to do.
            GroupProtocol::Consumer => {
                self.instead.insert(owned.partition.clone(), NextOffset(earliest));
                Ok(Verdict::JoinAnew(self.protocol))
            }
        }
    }
}
