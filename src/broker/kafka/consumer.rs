//! A member of a Kafka consumer group.

use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rdkafka::bindings as native;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::RDKafkaErrorCode as Code;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::context::Context;
use super::event::{EventQueue, Message, Said, TopicId};
use super::failure::Verdict;
use super::incremental::Membership;
use super::{BRIEF, GLANCE, Link, PATIENCE, is_out_of_group, patiently};
use crate::broker::{
    BrokerError, Consumer, ConsumerSettings, GroupToken, MAX_POLL_BYTES, NextOffset, Notes, Offsets, Poll, Records,
    StartAt, StartPolicy, TopicPartition,
};
use crate::config::plan::GroupProtocol;
use crate::runtime::clock;

pub(super) struct KafkaConsumer {
    /// Before `client`, which must outlive it.
    pub(super) queue: EventQueue,
    /// Shared with the tokens that it has given.
    pub(super) client: Arc<BaseConsumer<Context>>,
    pub(super) link: Arc<Link>,
    pub(super) group: String,
    client_id: String,
    topics: Vec<Arc<str>>,
    static_member: Option<String>,
    pub(super) start: StartPolicy,
    pub(super) protocol: GroupProtocol,
    pub(super) owned: Vec<Owned>,
    /// What the group gave but was not taken up yet, because the committed offsets could not be asked for.
    pub(super) given: Option<Vec<(TopicPartition, StartAt)>>,
    /// Partitions that the group has left to this member, of a number of which it has taken others: nobody reads them
    /// until it has given these back, too. Only where the brokers share partitions out.
    pub(super) stranded: Vec<TopicPartition>,
    /// Where partitions go on whatever the group has committed, because that is not in the log any more.
    pub(super) instead: Offsets,
    pub(super) membership: Arc<Membership>,
    /// An error that came behind records; the next poll reports it.
    pub(super) postponed: Option<BrokerError>,
    notes: Notes,
}

/// An assigned partition.
pub(super) struct Owned {
    pub(super) partition: TopicPartition,
    pub(super) start: StartAt,
    /// After the newest record handed out, or where it starts; `None` is the earliest record.
    pub(super) next: Option<i64>,
    /// The partition's end when the fetcher last reached it.
    pub(super) end: Option<i64>,
    /// Something was fetched since the partition was assigned, so that what librdkafka remembers is news.
    pub(super) fetched: bool,
    paused: bool,
}

/// Records of one poll as they gather: parallel to the owned partitions.
pub(super) struct Gathered {
    pub(super) records: Vec<Option<Records>>,
    count: usize,
    bytes: usize,
    /// Where the previous record went: they come in long runs of one partition.
    last: Option<(TopicId, i32, usize)>,
}

impl Gathered {
    /// All records but those of some partitions.
    pub(super) fn except(self, lost: &[TopicPartition]) -> Vec<Records> {
        self.records.into_iter().flatten().filter(|records| !lost.contains(&records.partition)).collect()
    }
}

/// Opens a client that joins a group by a protocol, and the queue that it speaks through.
fn subscribed(
    link: &Link,
    protocol: GroupProtocol,
    group: &str,
    topics: &[Arc<str>],
    client_id: &str,
    static_member: Option<&str>,
) -> Result<(EventQueue, Arc<BaseConsumer<Context>>), BrokerError> {
    let mut config = link.reading(group, protocol);
    config.set("client.id", client_id);
    if let Some(name) = static_member {
        config.set("group.instance.id", name);
    }
    let client: BaseConsumer<Context> = link.client(&config)?;
    let topics: Vec<&str> = topics.iter().map(AsRef::as_ref).collect();
    client.subscribe(&topics).map_err(|error| link.error("subscribing", &error, client.context()))?;
    // SAFETY: the caller keeps both, and drops the queue first.
    let queue = unsafe { EventQueue::of_consumer(client.client().native_ptr()) };
    Ok((queue, Arc::new(client)))
}

impl KafkaConsumer {
    pub(super) fn join(link: Arc<Link>, settings: ConsumerSettings) -> Result<Self, BrokerError> {
        let ConsumerSettings { group, topics, client_id, start, static_member } = settings;
        // In a classic group a static member of the same name takes the older one's place; the brokers' own protocol
        // turns the newer one away until the older one's session has ended.
        let protocol = if static_member.is_some() { GroupProtocol::Classic } else { link.protocol() };
        let (queue, client) = subscribed(&link, protocol, &group, &topics, &client_id, static_member.as_deref())?;
        Ok(Self {
            queue,
            client,
            link,
            group,
            client_id,
            topics,
            static_member,
            start,
            protocol,
            owned: Vec::new(),
            given: None,
            stranded: Vec::new(),
            instead: Offsets::new(),
            membership: Arc::default(),
            postponed: None,
            notes: Notes::new(),
        })
    }

    /// Leaves the group and joins it anew. All partitions are lost.
    pub(super) fn rejoin(&mut self, protocol: GroupProtocol) -> Result<Vec<TopicPartition>, BrokerError> {
        let (link, group, name) = (&self.link, &self.group, self.static_member.as_deref());
        let (queue, client) = subscribed(link, protocol, group, &self.topics, &self.client_id, name)?;
        // The queue goes before its client.
        self.queue = queue;
        self.client = client;
        self.protocol = protocol;
        self.membership.losses.fetch_add(1, Ordering::Relaxed);
        (self.given, self.stranded) = (None, Vec::new());
        Ok(self.owned.drain(..).map(|o| o.partition).collect())
    }

    fn find(&self, partition: &TopicPartition) -> Option<&Owned> {
        self.owned.iter().find(|o| o.partition == *partition)
    }

    pub(super) fn index_of(&self, topic: &str, partition: i32) -> Option<usize> {
        self.owned.iter().position(|o| o.partition.partition == partition && *o.partition.topic == *topic)
    }

    fn gather(&mut self, message: Message<'_>, gathered: &mut Gathered) {
        let (id, partition) = (message.topic_id(), message.partition());
        let index = match gathered.last {
            Some((last, number, index)) if last == id && number == partition => index,
            _ => match self.index_of(message.topic(), partition) {
                Some(index) => index,
                // Fetched for an ownership that has ended.
                None => return,
            },
        };
        gathered.last = Some((id, partition, index));
        let owned = &mut self.owned[index];
        owned.next = Some(message.offset() + 1);
        owned.fetched = true;
        let records = gathered.records[index].get_or_insert_with(|| Records::new(owned.partition.clone()));
        let headers = message.headers();
        if !headers.is_empty() {
            records.headers.push((records.len(), headers));
        }
        records.push(message.offset(), message.timestamp(), message.key(), message.value());
        gathered.count += 1;
        gathered.bytes += message.key().map_or(0, <[u8]>::len) + message.value().map_or(0, <[u8]>::len);
    }

    /// Takes up what the group gave: asks for committed offsets where the start policy wants them.
    pub(super) fn take_up(&mut self) -> Result<Vec<TopicPartition>, BrokerError> {
        let Some(given) = &self.given else { return Ok(Vec::new()) };
        let mut ask = TopicPartitionList::new();
        for (partition, _) in given.iter().filter(|(_, start)| *start == StartAt::Committed) {
            ask.add_partition(&partition.topic, partition.partition);
        }
        let committed = match ask.count() {
            0 => Offsets::new(),
            _ => committed(&self.link, &self.client, ask)?.0,
        };
        let owned: Vec<Owned> = given
            .iter()
            .map(|(partition, start)| Owned {
                partition: partition.clone(),
                start: *start,
                next: match start {
                    StartAt::Offset(next) => Some(next.0),
                    StartAt::Committed => self.instead.get(partition).or(committed.get(partition)).map(|next| next.0),
                    StartAt::Earliest => None,
                },
                end: None,
                fetched: false,
                paused: false,
            })
            .collect();
        let assigned = owned.iter().map(|o| o.partition.clone()).collect();
        match self.protocol {
            GroupProtocol::Classic => {
                self.owned = owned;
                self.assign()?;
            }
            GroupProtocol::Consumer => self.assign_more(owned)?,
        }
        self.given = None;
        self.instead.clear();
        Ok(assigned)
    }

    /// Makes librdkafka fetch what is owned, from where each partition stands.
    pub(super) fn assign(&mut self) -> Result<(), BrokerError> {
        let mut list = TopicPartitionList::with_capacity(self.owned.len());
        for owned in &mut self.owned {
            let from = owned.next.map_or(Offset::Beginning, Offset::Offset);
            list.add_partition_offset(&owned.partition.topic, owned.partition.partition, from)
                .expect("a position is not negative");
            (owned.end, owned.fetched) = (None, false);
        }
        let context = self.client.context();
        self.client.assign(&list).map_err(|error| self.link.error("taking up partitions", &error, context))?;
        // librdkafka keeps a partition paused that was so when it was given back, though it says that it starts to fetch it.
        let partitions = |paused| self.owned.iter().filter(move |o| o.paused == paused).map(|o| o.partition.clone());
        let (paused, others): (Vec<_>, Vec<_>) = (partitions(true).collect(), partitions(false).collect());
        if !others.is_empty() {
            self.resume(&others)?;
        }
        if paused.is_empty() { Ok(()) } else { self.pause(&paused) }
    }

    /// Gives back all partitions. The group waits for it.
    fn give_back(&mut self) -> Result<Vec<TopicPartition>, BrokerError> {
        let context = self.client.context();
        self.client.unassign().map_err(|error| self.link.error("giving back partitions", &error, context))?;
        self.membership.losses.fetch_add(1, Ordering::Relaxed);
        // What was given but never taken up, the caller never heard of.
        self.given = None;
        Ok(self.owned.drain(..).map(|o| o.partition).collect())
    }

    pub(super) fn fenced(&self) -> BrokerError {
        let taken = match &self.static_member {
            Some(name) => format!("static member '{name}' of group '{}'", self.group),
            None => format!("partitions of group '{}'", self.group),
        };
        BrokerError::Fenced { taken }
    }

    /// Position as librdkafka counts it: past transaction markers.
    fn position(&self, owned: &Owned) -> i64 {
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition(&owned.partition.topic, owned.partition.partition);
        // SAFETY: client and list are live; the call fills in offsets and touches nothing else.
        unsafe { native::rd_kafka_position(self.client.client().native_ptr(), list.ptr()) };
        match list.elements().first().map(|element| element.offset()) {
            Some(Offset::Offset(offset)) => offset,
            _ => -1,
        }
    }

    /// High watermark of the newest fetch.
    fn high(&self, owned: &Owned) -> Option<i64> {
        let topic = CString::new(&*owned.partition.topic).ok()?;
        let (mut low, mut high) = (-1, -1);
        // SAFETY: client and name are live; the call reads two numbers that the client keeps.
        let code = unsafe {
            native::rd_kafka_get_watermark_offsets(
                self.client.client().native_ptr(),
                topic.as_ptr(),
                owned.partition.partition,
                &raw mut low,
                &raw mut high,
            )
        };
        (Code::from(code) == Code::NoError && high >= 0).then_some(high)
    }

    /// Asks for a commit and waits for the answer.
    fn commit_once(&self, offsets: &Offsets) -> Code {
        let client = self.client.client().native_ptr();
        // A queue for this answer alone: the answer to a commit that was given up on must not be taken for a later one's.
        // SAFETY: the client outlives this call.
        let answers = unsafe { EventQueue::for_answers(client) };
        let list = to_list(offsets, &self.notes);
        // SAFETY: client, list and queue are live; without a callback the answer becomes an event.
        let code = Code::from(unsafe {
            native::rd_kafka_commit_queue(client, list.ptr(), answers.as_ptr(), None, std::ptr::null_mut())
        });
        match code {
            Code::NoError => {
                let brief = answers.next(BRIEF);
                let answer = match brief {
                    None if super::answers(self.client.client()) => answers.next(PATIENCE - BRIEF),
                    brief => brief,
                };
                match answer.as_ref().map(|event| event.said()) {
                    Some(Said::Committed(code)) => code,
                    _ => Code::OperationTimedOut,
                }
            }
            code => code,
        }
    }

    pub(super) fn list(partitions: &[TopicPartition]) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&partition.topic, partition.partition);
        }
        list
    }

    fn set_paused(&mut self, partitions: &[TopicPartition], paused: bool) {
        for owned in self.owned.iter_mut().filter(|o| partitions.contains(&o.partition)) {
            owned.paused = paused;
        }
    }
}

impl Consumer for KafkaConsumer {
    fn poll(&mut self, max: usize, timeout: Duration) -> Result<Poll, BrokerError> {
        if let Some(error) = self.postponed.take() {
            return Err(error);
        }
        if self.membership.over.swap(false, Ordering::Relaxed) {
            return Ok(Poll { revoked: self.rejoin(self.protocol)?, ..Poll::default() });
        }
        let assigned = self.take_up()?;
        if !assigned.is_empty() {
            return Ok(Poll { assigned, ..Poll::default() });
        }
        let deadline = clock::monotonic() + timeout;
        let mut gathered =
            Gathered { records: self.owned.iter().map(|_| None).collect(), count: 0, bytes: 0, last: None };
        let mut anew = None;
        while gathered.count < max && gathered.bytes < MAX_POLL_BYTES {
            let wait = match gathered.count {
                0 => deadline.saturating_duration_since(clock::monotonic()),
                _ => Duration::ZERO,
            };
            let Some(event) = self.queue.next(wait) else { break };
            match event.said() {
                Said::Record(message) => self.gather(message, &mut gathered),
                Said::End(topic, partition, end) => {
                    if let Some(index) = self.index_of(&topic, partition) {
                        (self.owned[index].end, self.owned[index].fetched) = (Some(end), true);
                    }
                    self.client.context().is_up();
                }
                Said::Assign(given) => {
                    let start = &mut self.start;
                    let given = given.into_iter().map(|(topic, partition)| TopicPartition::new(topic, partition));
                    let given: Vec<_> = given.collect();
                    self.client.context().is_up();
                    if self.protocol == GroupProtocol::Consumer {
                        let revoked = self.receive(given);
                        return self.after_more(gathered, revoked);
                    }
                    let given = given.into_iter().map(|partition| (start(&partition), partition));
                    self.given = Some(given.map(|(at, partition)| (partition, at)).collect());
                    return Ok(Poll { assigned: self.take_up()?, ..Poll::default() });
                }
                Said::Revoke(lost) if self.protocol == GroupProtocol::Consumer => {
                    let revoked = self.give_back_some(lost)?;
                    return Ok(Poll { records: gathered.except(&revoked), revoked, ..Poll::default() });
                }
                // A classic group takes all back, so nothing gathered here may be handed out any more.
                Said::Revoke(_) => return Ok(Poll { revoked: self.give_back()?, ..Poll::default() }),
                Said::Error(fault) => match self.judge(&fault) {
                    Ok(Verdict::Passes) => {}
                    Ok(Verdict::JoinAnew(protocol)) => {
                        anew = Some(protocol);
                        break;
                    }
                    Err(error) if gathered.count == 0 => return Err(error),
                    Err(error) => {
                        self.postponed = Some(error);
                        break;
                    }
                },
                Said::Log(level, facility, text) => self.client.context().line(level, &facility, &text),
                Said::Committed(_) | Said::Other => {}
            }
        }
        // No event of the old client is left here, which it would wait for.
        if let Some(protocol) = anew {
            return Ok(Poll { revoked: self.rejoin(protocol)?, ..Poll::default() });
        }
        let context = self.client.context();
        if gathered.count > 0 {
            context.is_up();
        } else if context.is_down() {
            match self.client.fetch_metadata(None, GLANCE) {
                Ok(_) => context.is_up(),
                Err(_) => return Err(self.link.fault("reading", Code::AllBrokersDown, "no broker answers", context)),
            }
        }
        Ok(Poll { records: gathered.records.into_iter().flatten().collect(), ..Poll::default() })
    }

    fn note(&mut self, notes: &Notes) {
        self.notes.clone_from(notes);
    }

    fn commit(&mut self, offsets: &Offsets) -> Result<(), BrokerError> {
        let mut code;
        loop {
            let renewal = (self.protocol == GroupProtocol::Consumer).then(|| self.renewal());
            code = self.commit_once(offsets);
            if !(is_out_of_group(code) && renewal.is_some_and(|renewal| renewal.has_come())) {
                break;
            }
        }
        match code {
            Code::NoError | Code::NoOffset => Ok(()),
            code if is_out_of_group(code) => Err(self.fenced()),
            code => Err(self.link.fault("committing offsets", code, &code.to_string(), self.client.context())),
        }
    }

    fn token(&self) -> Result<GroupToken, BrokerError> {
        let metadata = self.client.group_metadata().expect("a consumer with a group has group metadata");
        let renewal = match self.protocol {
            GroupProtocol::Classic => None,
            GroupProtocol::Consumer => Some(self.renewal()),
        };
        Ok(GroupToken::Kafka { metadata: Arc::new(metadata), renewal })
    }

    fn end(&self, partition: &TopicPartition) -> Option<NextOffset> {
        let owned = self.find(partition).filter(|o| o.fetched)?;
        self.high(owned).max(owned.end).map(NextOffset)
    }

    fn caught_up(&self, partition: &TopicPartition) -> bool {
        let Some(owned) = self.find(partition).filter(|o| o.fetched) else { return false };
        // The fetcher tells the end a moment after the last record; the watermark that came with that record knows at once.
        let told = owned.end.is_some_and(|end| end >= owned.next.unwrap_or(0));
        told || self
            .high(owned)
            .is_some_and(|high| owned.next.is_some_and(|next| next >= high) || self.position(owned) >= high)
    }

    fn committed(&self, partitions: &[TopicPartition]) -> Result<(Offsets, Notes), BrokerError> {
        let list = Self::list(partitions);
        match self.protocol {
            GroupProtocol::Classic => committed(&self.link, &self.client, list),
            // A member is refused while its epoch is on its way to it; who is none is not.
            GroupProtocol::Consumer => group_state(&self.link, &self.group, list),
        }
    }

    fn seek(&mut self, offsets: &Offsets) -> Result<(), BrokerError> {
        for owned in &mut self.owned {
            if let Some(next) = offsets.get(&owned.partition) {
                (owned.next, owned.start) = (Some(next.0), StartAt::Offset(*next));
            }
        }
        match self.protocol {
            GroupProtocol::Classic => self.assign(),
            GroupProtocol::Consumer => self.move_to(offsets),
        }
    }

    fn pause(&mut self, partitions: &[TopicPartition]) -> Result<(), BrokerError> {
        let context = self.client.context();
        self.client.pause(&Self::list(partitions)).map_err(|error| self.link.error("pausing", &error, context))?;
        self.set_paused(partitions, true);
        Ok(())
    }

    fn resume(&mut self, partitions: &[TopicPartition]) -> Result<(), BrokerError> {
        let context = self.client.context();
        self.client.resume(&Self::list(partitions)).map_err(|error| self.link.error("resuming", &error, context))?;
        self.set_paused(partitions, false);
        Ok(())
    }
}

/// Offsets and notes as librdkafka takes them.
pub(super) fn to_list(offsets: &Offsets, notes: &Notes) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(offsets.len());
    for (partition, next) in offsets {
        let mut element = list.add_partition(&partition.topic, partition.partition);
        element.set_offset(Offset::Offset(next.0)).expect("a position is not negative");
        if let Some(note) = notes.get(partition) {
            element.set_metadata(note.to_string());
        }
    }
    list
}

/// Asks for the committed offsets of a group, and the notes beside them, without being a member of it.
pub(super) fn group_state(link: &Link, group: &str, list: TopicPartitionList) -> Result<(Offsets, Notes), BrokerError> {
    let client: BaseConsumer<Context> = link.client(&link.reading(group, GroupProtocol::Classic))?;
    committed(link, &client, list)
}

/// Asks for the committed offsets of the client's group, and the notes beside them. Partitions without are absent.
pub(super) fn committed(
    link: &Link,
    client: &BaseConsumer<Context>,
    list: TopicPartitionList,
) -> Result<(Offsets, Notes), BrokerError> {
    let during = "asking for committed offsets";
    let answer = patiently(client.client(), |timeout| client.committed_offsets(list.clone(), timeout))
        .map_err(|error| link.error(during, &error, client.context()))?;
    let (mut offsets, mut notes) = (Offsets::new(), Notes::new());
    for element in answer.elements() {
        element.error().map_err(|error| link.error(during, &error, client.context()))?;
        if let Offset::Offset(next) = element.offset() {
            let partition = TopicPartition::new(element.topic(), element.partition());
            // What other tools write there is no note.
            if let Ok(note) = element.metadata().parse() {
                notes.insert(partition.clone(), note);
            }
            offsets.insert(partition, NextOffset(next));
        }
    }
    Ok((offsets, notes))
}
