//! Writes to Kafka, in transactions where it has an id.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::bindings as native;
use rdkafka::consumer::ConsumerGroupMetadata;
use rdkafka::error::{KafkaError, RDKafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{Header as ClientHeader, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rustc_hash::FxHashSet;

use super::consumer::to_list;
use super::context::Context;
use super::incremental::Renewal;
use super::pace::Pace;
use super::{BRIEF, Link, PATIENCE, answers, is_out_of_group};
use crate::broker::{BrokerError, GroupToken, Header, Notes, Offsets, OutRecord, Producer};
use crate::runtime::{clock, failpoint};

/// Sends between two looks at what the client has to say.
const SENDS_A_LOOK: u32 = 1024;

/// A sender does not wait for acknowledgements that stay out so long: what is said about it, the commit says.
const STANDSTILL: Duration = Duration::from_millis(100);

pub(super) struct KafkaProducer {
    client: Arc<BaseProducer<Context>>,
    link: Arc<Link>,
    /// Transactional id.
    id: Option<String>,
    phase: Phase,
    /// The answer to a request for adding offsets, on its way.
    offsets_sent: Option<Receiver<Result<(), KafkaError>>>,
    sends: u32,
    pace: Pace,
    /// Topics that are there. The client itself waits half a minute for one that is not.
    known: FxHashSet<String>,
    notes: Notes,
}

/// How far the transaction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// There is none.
    None,
    /// Records may be sent.
    Open,
    /// The group's offsets are in it; only its end is missing.
    OffsetsSent,
    /// Its end was asked for and the answer is not there: it may be committed or not, and only a further commit tells.
    Deciding,
    /// It is being rolled back.
    RollingBack,
}

impl KafkaProducer {
    pub(super) fn open(link: Arc<Link>, id: Option<&str>) -> Result<Self, BrokerError> {
        let client = Arc::new(connect(&link, id)?);
        let (id, known) = (id.map(str::to_owned), FxHashSet::default());
        Ok(Self {
            client,
            link,
            id,
            phase: Phase::None,
            offsets_sent: None,
            sends: 0,
            pace: Pace::default(),
            known,
            notes: Notes::new(),
        })
    }

    /// Opens another client of the same id, which rolls back what the old one left open.
    fn replace(&mut self) -> Result<(), BrokerError> {
        self.client = Arc::new(connect(&self.link, self.id.as_deref())?);
        self.offsets_sent = None;
        self.phase = Phase::None;
        self.pace = Pace::default();
        Ok(())
    }

    fn context(&self) -> &Context {
        self.client.client().context()
    }

    fn look(&self) {
        look(&self.client);
    }

    fn fenced(&self) -> BrokerError {
        BrokerError::Fenced { taken: format!("transactional id '{}'", self.id.as_deref().unwrap_or_default()) }
    }

    /// Makes sure that a topic exists before the first record goes to it.
    fn check_topic(&mut self, topic: &str) -> Result<(), BrokerError> {
        if self.known.contains(topic) {
            return Ok(());
        }
        let metadata = self.link.metadata("looking for a topic", Some(topic), self.client.client(), || self.look())?;
        let found = metadata.topics().iter().find(|t| t.name() == topic);
        match found.map(|t| t.error().map(Code::from)) {
            None | Some(Some(Code::UnknownTopicOrPartition | Code::UnknownTopic)) => {
                Err(self.link.no_such_topic(topic))
            }
            Some(Some(code)) => Err(self.undelivered(topic, code)),
            Some(None) => {
                self.known.insert(topic.to_owned());
                Ok(())
            }
        }
    }

    fn undecided(&self, reason: String) -> BrokerError {
        BrokerError::Undecided { transactional_id: self.id.clone().unwrap_or_default(), reason }
    }

    fn aborted(&self, reason: String) -> BrokerError {
        BrokerError::Aborted { transactional_id: self.id.clone().unwrap_or_default(), reason }
    }

    /// What the failure of one record means.
    fn undelivered(&self, topic: &str, code: Code) -> BrokerError {
        match code {
            Code::UnknownTopic | Code::UnknownTopicOrPartition => self.link.no_such_topic(topic),
            Code::MessageSizeTooLarge
            | Code::MessageBatchTooLarge
            | Code::InvalidMessageSize
            | Code::InvalidRecord
            | Code::InvalidTimestamp
            | Code::InvalidTopic
            | Code::UnknownPartition
            | Code::TopicAuthorizationFailed
            | Code::PolicyViolation => BrokerError::Refused { topic: topic.to_owned(), reason: code.to_string() },
            code => self.link.fault("delivering records", code, &format!("{topic}: {code}"), self.context()),
        }
    }

    /// Waits until everything sent is acknowledged or has failed. A retriable error keeps all of it waiting.
    fn flush(&self) -> Result<(), BrokerError> {
        let mut progress: (i32, Instant) = (self.client.in_flight_count(), clock::monotonic());
        loop {
            // Returns as soon as the last acknowledgement is there, and sends at once what still lingers.
            // SAFETY: the client is live; the call waits and touches nothing else.
            let code = Code::from(unsafe { native::rd_kafka_flush(self.client.client().native_ptr(), 20) });
            self.look();
            if code == Code::NoError {
                return Ok(());
            }
            let (left, now) = (self.client.in_flight_count(), clock::monotonic());
            if left < progress.0 {
                progress = (left, now);
                self.context().is_up();
            } else if self.id.is_some() && self.context().has_undelivered() {
                return Ok(());
            } else if now.duration_since(progress.1) > if self.context().is_down() { BRIEF } else { PATIENCE } {
                let reason = format!("{left} records are not acknowledged");
                return Err(self.link.fault("delivering records", Code::OperationTimedOut, &reason, self.context()));
            }
        }
    }

    /// Waits while too much is not acknowledged.
    fn wait_for_acknowledgements(&mut self) {
        let mut progress = (i32::MAX, clock::monotonic());
        loop {
            let (left, now) = (self.client.in_flight_count(), clock::monotonic());
            if !self.pace.is_ahead(left) {
                return;
            }
            if left < progress.0 {
                progress = (left, now);
            } else if now.duration_since(progress.1) > STANDSTILL {
                return self.pace.stand_still();
            }
            // To poll for a millisecond is to spin through the end of it.
            thread::park_timeout(Duration::from_millis(1));
        }
    }

    /// Adds the group's offsets to the transaction.
    ///
    /// librdkafka does not keep to the time it is given here: while the coordinator is away, the call may wait for ever
    /// (<https://github.com/confluentinc/librdkafka/issues/5456>). So it waits on a thread of its own.
    fn send_offsets(
        &mut self,
        offsets: &Offsets,
        member: &Arc<ConsumerGroupMetadata>,
        renewal: Option<&Renewal>,
    ) -> Result<(), BrokerError> {
        const DURING: &str = "adding offsets to a transaction";
        if self.offsets_sent.is_none() {
            let (answer, answered) = mpsc::sync_channel(1);
            let (client, member, offsets) =
                (Arc::clone(&self.client), Arc::clone(member), to_list(offsets, &self.notes));
            thread::Builder::new()
                .name("send-offsets".into())
                .spawn(move || {
                    let sent = client.send_offsets_to_transaction(&offsets, &member, PATIENCE);
                    // Before the answer: who has that may close the client at once.
                    drop(client);
                    let _ = answer.send(sent);
                })
                .map_err(|error| BrokerError::Client {
                    during: DURING,
                    broker: self.link.describe(),
                    reason: format!("no thread: {error}"),
                    retriable: true,
                })?;
            self.offsets_sent = Some(answered);
        }
        match self.offsets_answer(PATIENCE) {
            Some(Ok(())) => Ok(()),
            Some(Err(KafkaError::Transaction(cause)))
                if is_out_of_group(cause.code()) && renewal.is_some_and(Renewal::has_come) =>
            {
                let aborted = self.aborted("the group has gone over to a newer epoch".to_owned());
                Err(self.roll_back(aborted))
            }
            Some(Err(error)) => Err(self.step_failed(DURING, &error)),
            None => {
                Err(self.link.fault(DURING, Code::OperationTimedOut, "the coordinator does not answer", self.context()))
            }
        }
    }

    /// Waits for the answer to the request for adding offsets, no longer than a moment where no broker answers at all.
    fn offsets_answer(&mut self, patience: Duration) -> Option<Result<(), KafkaError>> {
        let answered = self.offsets_sent.as_ref()?;
        let answer = match answered.recv_timeout(BRIEF) {
            Err(RecvTimeoutError::Timeout) if answers(self.client.client()) => {
                answered.recv_timeout(patience.saturating_sub(BRIEF))
            }
            answer => answer,
        };
        self.look();
        let answer = match answer {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => Err(KafkaError::Canceled),
        };
        self.offsets_sent = None;
        Some(answer)
    }

    /// Rolls back and says why. Called where the transaction cannot succeed any more.
    fn roll_back(&mut self, cause: BrokerError) -> BrokerError {
        self.phase = Phase::RollingBack;
        match self.abort() {
            Ok(()) => cause,
            Err(fenced) if fenced.is_fenced() => fenced,
            // The broker forgets it when its time is up, or when the next producer of this id opens.
            Err(error) => {
                tracing::warn!(%error, "a transaction could not be rolled back");
                cause
            }
        }
    }

    /// What an error of a transaction's step means; rolls back where nothing else is left.
    fn step_failed(&mut self, during: &'static str, error: &KafkaError) -> BrokerError {
        let KafkaError::Transaction(cause) = error else { return self.link.error(during, error, self.context()) };
        let cause: RDKafkaError = cause.clone();
        if is_taken(cause.code()) || (cause.is_fatal() && self.is_fenced()) {
            self.phase = Phase::None;
            return self.fenced();
        }
        if is_out_of_group(cause.code()) {
            let fenced = BrokerError::Fenced { taken: "partitions of the consumer group".to_owned() };
            return self.roll_back(fenced);
        }
        if cause.txn_requires_abort() {
            let cause = match self.context().take_undelivered() {
                Some((topic, code)) => match self.undelivered(&topic, code) {
                    refused @ (BrokerError::Refused { .. } | BrokerError::NoSuchTopic { .. }) => refused,
                    other => self.aborted(other.to_string()),
                },
                None => self.aborted(cause.string()),
            };
            return self.roll_back(cause);
        }
        let reason = cause.string();
        if cause.is_fatal() {
            return BrokerError::Spent { transactional_id: self.id.clone().unwrap_or_default(), reason };
        }
        if cause.is_retriable() {
            return match self.link.fault(during, Code::OperationTimedOut, &reason, self.context()) {
                unreachable @ BrokerError::Unreachable { .. } if self.context().is_down() => unreachable,
                _ => BrokerError::Client { during, broker: self.link.describe(), reason, retriable: true },
            };
        }
        self.link.fault(during, cause.code(), &reason, self.context())
    }

    fn is_fenced(&self) -> bool {
        self.client.client().fatal_error().is_some_and(|(code, _)| is_taken(code))
    }
}

/// Opens a client and takes up its transactional id.
fn connect(link: &Link, id: Option<&str>) -> Result<BaseProducer<Context>, BrokerError> {
    let mut config = link.config(&[
        ("compression.type", "lz4"),
        // A commit flushes, so this only lets batches fill while a worker is still sending.
        ("linger.ms", "5"),
        ("queue.buffering.max.messages", "200000"),
        ("queue.buffering.max.kbytes", "131072"),
    ]);
    config
        .set("enable.idempotence", "true")
        .set("delivery.report.only.error", "true")
        .set("partitioner", "murmur2_random");
    match id {
        Some(id) => config.set("transactional.id", id),
        // Without a transaction that could be rolled back, an outage must hold records, not drop them.
        None => config.set("message.timeout.ms", "0"),
    };
    let client: BaseProducer<Context> = link.client(&config)?;
    if id.is_some() {
        let ready = client.init_transactions(PATIENCE);
        look(&client);
        ready.map_err(|error| link.error("taking up a transactional id", &error, client.client().context()))?;
    }
    Ok(client)
}

/// Lets the client say what it has to say: failed deliveries, lost brokers, log lines.
fn look(client: &BaseProducer<Context>) {
    // One event a call.
    for _ in 0..64 {
        client.poll(Duration::ZERO);
    }
}

/// Another producer has this id now.
fn is_taken(code: Code) -> bool {
    matches!(
        code,
        Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch | Code::TransactionCoordinatorFenced
    )
}

fn to_headers(headers: &[Header]) -> OwnedHeaders {
    headers.iter().fold(OwnedHeaders::new_with_capacity(headers.len()), |list, header| {
        list.insert(ClientHeader { key: &header.name, value: Some(&header.value) })
    })
}

impl Producer for KafkaProducer {
    fn begin(&mut self) -> Result<(), BrokerError> {
        match self.phase {
            _ if self.id.is_none() => return Ok(()),
            Phase::None => {}
            Phase::RollingBack => self.abort()?,
            Phase::Open | Phase::OffsetsSent | Phase::Deciding => return Ok(()),
        }
        self.look();
        self.context().take_undelivered();
        match self.client.begin_transaction() {
            Ok(()) => {
                self.phase = Phase::Open;
                Ok(())
            }
            Err(error) => Err(self.step_failed("beginning a transaction", &error)),
        }
    }

    fn send(&mut self, record: OutRecord<'_>) -> Result<(), BrokerError> {
        if self.phase == Phase::Deciding {
            return Err(self.undecided("commit again before anything else is sent".to_owned()));
        }
        self.check_topic(record.topic)?;
        let mut out = BaseRecord::to(record.topic);
        (out.partition, out.key, out.payload, out.timestamp) =
            (record.partition, record.key, record.value, record.timestamp);
        if !record.headers.is_empty() {
            out.headers = Some(to_headers(record.headers));
        }
        let mut full_since = None;
        while let Err((error, back)) = self.client.send(out) {
            match error.rdkafka_error_code() {
                Some(Code::QueueFull) => {
                    let now = clock::monotonic();
                    if now.duration_since(*full_since.get_or_insert(now)) > PATIENCE {
                        return Err(self.link.fault("sending", Code::OperationTimedOut, "buffer full", self.context()));
                    }
                    self.client.poll(Duration::from_millis(5));
                    out = back;
                }
                // The transaction has failed behind the caller's back.
                Some(Code::State | Code::Fatal | Code::Fenced) if self.id.is_some() => {
                    if self.is_fenced() {
                        return Err(self.fenced());
                    }
                    let cause = self.aborted(error.to_string());
                    return Err(self.roll_back(cause));
                }
                Some(code) => return Err(self.undelivered(record.topic, code)),
                None => return Err(self.link.error("sending", &error, self.context())),
            }
        }
        if self.pace.add(&record) {
            self.wait_for_acknowledgements();
        }
        self.sends += 1;
        if self.sends.is_multiple_of(SENDS_A_LOOK) {
            self.look();
        }
        Ok(())
    }

    fn note(&mut self, notes: &Notes) {
        self.notes.clone_from(notes);
    }

    fn commit(&mut self, offsets: &Offsets, token: Option<&GroupToken>) -> Result<(), BrokerError> {
        if failpoint::hit("broker.commit.before") {
            return Err(self.link.fault("committing", Code::RequestTimedOut, "failpoint", self.context()));
        }
        if self.phase != Phase::Deciding {
            self.flush()?;
            self.pace = Pace::default();
        }
        if self.id.is_none() {
            return match self.context().take_undelivered() {
                Some((topic, code)) => Err(self.undelivered(&topic, code)),
                None => Ok(()),
            };
        }
        if self.phase == Phase::None {
            return Ok(());
        }
        if let Some(GroupToken::Kafka { metadata, renewal }) = token
            && !offsets.is_empty()
            && self.phase == Phase::Open
        {
            self.send_offsets(offsets, metadata, renewal.as_ref())?;
            self.phase = Phase::OffsetsSent;
        }
        let deadline = clock::monotonic() + PATIENCE;
        loop {
            self.phase = Phase::Deciding;
            let committed = self.client.commit_transaction(PATIENCE);
            self.look();
            match committed {
                Ok(()) => break,
                Err(KafkaError::Transaction(cause)) if cause.is_retriable() && clock::monotonic() < deadline => {
                    self.client.poll(Duration::from_millis(20));
                }
                Err(KafkaError::Transaction(cause)) if cause.is_retriable() => {
                    return Err(self.undecided(cause.string()));
                }
                Err(error) => return Err(self.step_failed("committing a transaction", &error)),
            }
        }
        self.phase = Phase::None;
        self.context().is_up();
        failpoint::hit("broker.commit.after");
        Ok(())
    }

    fn abort(&mut self) -> Result<(), BrokerError> {
        match self.phase {
            Phase::None => return Ok(()),
            Phase::Deciding => {
                return Err(self.undecided("commit again to learn whether anything is left to give up".to_owned()));
            }
            _ => self.phase = Phase::RollingBack,
        }
        if self.offsets_sent.is_some() && self.offsets_answer(BRIEF).is_none() {
            // One step of a transaction waits for the one before it, which may never end.
            if !answers(self.client.client()) {
                let reason = "adding offsets to a transaction is not answered";
                return Err(self.link.fault("rolling back", Code::OperationTimedOut, reason, self.context()));
            }
            return self.replace();
        }
        let deadline = clock::monotonic() + PATIENCE;
        loop {
            // In slices: it waits for purged records, which are only done with when they have been looked at.
            let aborted = self.client.abort_transaction(Duration::from_millis(100));
            self.look();
            match aborted {
                Ok(()) => break,
                Err(KafkaError::Transaction(cause)) if cause.is_retriable() && clock::monotonic() < deadline => {}
                Err(KafkaError::Transaction(cause))
                    if cause.is_fatal() && (self.is_fenced() || is_taken(cause.code())) =>
                {
                    self.phase = Phase::None;
                    return Err(self.fenced());
                }
                // A coordinator that was killed between rolling back and saying so refuses to do it again, which this
                // client takes for its end. Nobody has asked to commit, so nothing is lost with it.
                Err(KafkaError::Transaction(cause)) if cause.is_fatal() => {
                    tracing::info!(reason = cause.string(), "a new producer rolls back in this one's place");
                    return self.replace();
                }
                Err(KafkaError::Transaction(cause)) if cause.is_retriable() => {
                    let code = Code::OperationTimedOut;
                    return Err(self.link.fault("rolling back", code, &cause.string(), self.context()));
                }
                Err(error) => return Err(self.link.error("rolling back", &error, self.context())),
            }
        }
        self.phase = Phase::None;
        self.pace = Pace::default();
        self.context().take_undelivered();
        Ok(())
    }
}

impl Drop for KafkaProducer {
    fn drop(&mut self) {
        // An open transaction would hold back every reader of its topics until its time is up.
        let free = !matches!(self.phase, Phase::None | Phase::Deciding) && self.offsets_sent.is_none();
        if free && !self.context().is_down() {
            let _ = self.client.abort_transaction(Duration::from_millis(200));
            self.look();
            let _ = self.client.abort_transaction(Duration::from_secs(1));
        }
    }
}
