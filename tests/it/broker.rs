//! What every broker must do, asked of both: the embedded log and a real Kafka.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use driftline::broker::{
    self, Broker, BrokerError, Consumer, ConsumerSettings, GroupToken, Header, NextOffset, Notes, Offsets, OutRecord,
    Poll, Producer, Records, Retention, StartAt, TopicPartition, TopicSettings,
};
use driftline::config::plan::{BrokerPlan, GroupProtocol};
use driftline::runtime::clock;
use rstest::rstest;

use crate::servers::{Kafka, unique, until};

const SOON: Duration = Duration::from_millis(300);
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
enum Kind {
    Embedded,
    /// Groups shared out by a member.
    Kafka,
    /// Groups shared out by the brokers.
    Kafka4,
}

struct Subject {
    broker: Arc<dyn Broker>,
    _folder: Option<tempfile::TempDir>,
}

impl Subject {
    fn new(kind: Kind) -> Self {
        match kind {
            Kind::Embedded => {
                let folder = tempfile::tempdir().unwrap();
                Self { broker: open_embedded(folder.path()), _folder: Some(folder) }
            }
            Kind::Kafka => Self { broker: open_kafka(Kafka::shared()), _folder: None },
            Kind::Kafka4 => Self { broker: open_kafka_with(Kafka::shared(), GroupProtocol::Consumer), _folder: None },
        }
    }

    fn topic(&self, partitions: u32) -> Arc<str> {
        let name = unique("topic");
        let settings = TopicSettings { partitions, compacted: false, retention_ms: None };
        self.broker.create_topic(&name, &settings).unwrap();
        name.into()
    }

    fn consumer(&self, group: &str, topic: &Arc<str>) -> Box<dyn Consumer> {
        self.consumer_from(group, topic, |_| StartAt::Committed)
    }

    fn consumer_from(
        &self,
        group: &str,
        topic: &Arc<str>,
        start: impl FnMut(&TopicPartition) -> StartAt + Send + 'static,
    ) -> Box<dyn Consumer> {
        self.broker.consumer(settings(group, topic, start)).unwrap()
    }

    /// Writes values to one partition outside of any transaction.
    fn write(&self, topic: &str, partition: i32, values: impl IntoIterator<Item = u32>) {
        let mut producer = self.broker.producer(None).unwrap();
        for value in values {
            send(&mut *producer, topic, partition, value);
        }
        producer.commit(&Offsets::new(), None).unwrap();
    }

    /// All committed values of a topic.
    fn values(&self, topic: &Arc<str>) -> Vec<u32> {
        let info = self.broker.topic(topic).unwrap().unwrap();
        let mut values = Vec::new();
        for (number, (start, end)) in info.partitions.iter().enumerate() {
            let partition = TopicPartition::new(topic.clone(), i32::try_from(number).unwrap());
            let mut next = *start;
            while next < *end {
                let (records, after) = self.broker.read(&partition, next, 1000, LIMIT).unwrap();
                values.extend(numbers(&records));
                next = after;
            }
        }
        values
    }
}

/// Waits until a topic holds as many values as expected, and says that they are those, in any order. Kafka shows what a
/// transaction has committed a moment after the commit has returned.
fn expect_values(subject: &Subject, topic: &Arc<str>, expected: impl IntoIterator<Item = u32>) {
    let expected: Vec<u32> = expected.into_iter().collect();
    let mut values = Vec::new();
    until("the values are there", LIMIT, || {
        values = subject.values(topic);
        values.len() >= expected.len()
    });
    values.sort_unstable();
    let differs = values.iter().zip(&expected).position(|(got, wanted)| got != wanted);
    assert!(differs.is_none() && values.len() == expected.len(), "{} values, first wrong: {differs:?}", values.len());
}

pub fn open_embedded(folder: &Path) -> Arc<dyn Broker> {
    broker::open(&BrokerPlan::Embedded { path: folder.to_owned(), partitions: 1 }, "test").unwrap()
}

pub fn open_kafka(kafka: &Kafka) -> Arc<dyn Broker> {
    open_kafka_with(kafka, GroupProtocol::Classic)
}

fn open_kafka_with(kafka: &Kafka, group_protocol: GroupProtocol) -> Arc<dyn Broker> {
    let plan = BrokerPlan::Kafka {
        brokers: kafka.address(),
        schema_registry: None,
        properties: BTreeMap::new(),
        partitions: 1,
        replication: 1,
        group_protocol,
    };
    broker::open(&plan, "test").unwrap()
}

fn settings(
    group: &str,
    topic: &Arc<str>,
    start: impl FnMut(&TopicPartition) -> StartAt + Send + 'static,
) -> ConsumerSettings {
    ConsumerSettings {
        group: group.to_owned(),
        topics: vec![topic.clone()],
        client_id: "test".to_owned(),
        start: Box::new(start),
        static_member: None,
    }
}

fn send(producer: &mut dyn Producer, topic: &str, partition: i32, value: u32) {
    let value = value.to_string();
    let record = OutRecord {
        topic,
        partition: Some(partition),
        key: Some(b"k"),
        value: Some(value.as_bytes()),
        ..OutRecord::default()
    };
    producer.send(record).unwrap();
}

fn numbers(records: &Records) -> Vec<u32> {
    (0..records.len())
        .map(|row| std::str::from_utf8(records.values.get(row).unwrap()).unwrap().parse().unwrap())
        .collect()
}

/// Polls until `done` is true of all polls so far.
fn poll_until(consumer: &mut dyn Consumer, mut done: impl FnMut(&Poll) -> bool) {
    let deadline = clock::monotonic() + LIMIT;
    while !done(&consumer.poll(1000, Duration::from_millis(100)).unwrap()) {
        assert!(clock::monotonic() < deadline, "nothing came in {LIMIT:?}");
    }
}

fn wait_assigned(consumer: &mut dyn Consumer) -> Vec<TopicPartition> {
    let mut assigned = Vec::new();
    poll_until(consumer, |poll| {
        assert!(poll.is_empty(), "records before partitions");
        assigned.extend(poll.assigned.iter().cloned());
        !assigned.is_empty()
    });
    assigned
}

fn take(consumer: &mut dyn Consumer, count: usize) -> Vec<u32> {
    let mut values = Vec::new();
    poll_until(consumer, |poll| {
        poll.records.iter().for_each(|records| values.extend(numbers(records)));
        values.len() >= count
    });
    values
}

fn at(topic: &Arc<str>, partition: i32, next: i64) -> Offsets {
    Offsets::from([(TopicPartition::new(topic.clone(), partition), NextOffset(next))])
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn records_come_back_in_order_and_whole(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(1);
    let headers =
        [Header { name: "h".into(), value: b"\x00\xff".to_vec() }, Header { name: "empty".into(), value: Vec::new() }];
    let mut producer = subject.broker.producer(None).unwrap();
    let record = |key, value, headers| OutRecord {
        topic: &topic,
        partition: Some(0),
        key,
        value,
        timestamp: Some(1234),
        headers,
    };
    producer.send(record(Some(b"key"), Some(b"value"), &[])).unwrap();
    producer.send(record(None, Some(b""), &headers)).unwrap();
    producer.send(record(Some(b""), None, &[])).unwrap();
    producer.commit(&Offsets::new(), None).unwrap();

    let mut consumer = subject.consumer(&unique("g"), &topic);
    let mut polled = Vec::new();
    poll_until(&mut *consumer, |poll| {
        polled.extend(poll.records.iter().cloned());
        polled.iter().map(Records::len).sum::<usize>() == 3
    });
    let partition = TopicPartition::new(topic.clone(), 0);
    let (read, next) = subject.broker.read(&partition, NextOffset(0), 10, LIMIT).unwrap();
    assert_eq!(next, NextOffset(3));
    for records in [&polled[0], &read] {
        assert_eq!(records.partition, partition);
        assert_eq!(records.offsets, [0, 1, 2]);
        assert_eq!(records.timestamps, [1234; 3]);
        let column = |blobs: &broker::Blobs| (0..3).map(|row| blobs.get(row).map(<[u8]>::to_vec)).collect::<Vec<_>>();
        assert_eq!(column(&records.keys), [Some(b"key".to_vec()), None, Some(Vec::new())]);
        assert_eq!(column(&records.values), [Some(b"value".to_vec()), Some(Vec::new()), None]);
        assert_eq!(records.headers, [(1, headers.to_vec())]);
    }
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_read_goes_on_where_the_last_one_ended(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(1);
    subject.write(&topic, 0, 0..2500);
    let partition = TopicPartition::new(topic.clone(), 0);
    let (mut next, mut values) = (NextOffset(10), Vec::new());
    while next < NextOffset(2500) {
        let (records, after) = subject.broker.read(&partition, next, 700, LIMIT).unwrap();
        assert!(records.len() <= 700 && after > next);
        values.extend(numbers(&records));
        next = after;
    }
    assert_eq!(values, (10..2500).collect::<Vec<_>>());
    let (records, after) = subject.broker.read(&partition, next, 700, SOON).unwrap();
    assert_eq!((records.len(), after), (0, next), "nothing more");
    let error = subject.broker.read(&partition, NextOffset(9999), 1, LIMIT).unwrap_err();
    assert!(matches!(error, BrokerError::OffsetOutOfRange { offset: 9999, earliest: 0, .. }), "{error}");
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_poll_takes_no_more_than_asked(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(2);
    subject.write(&topic, 0, 0..50);
    subject.write(&topic, 1, 50..100);
    let mut consumer = subject.consumer(&unique("g"), &topic);
    wait_assigned(&mut *consumer);
    let mut values = Vec::new();
    until("all was read", LIMIT, || {
        let poll = consumer.poll(7, SOON).unwrap();
        assert!(poll.len() <= 7);
        poll.records.iter().for_each(|records| values.extend(numbers(records)));
        values.len() == 100
    });
    values.sort_unstable();
    assert_eq!(values, (0..100).collect::<Vec<_>>());
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_transaction_appears_at_once_and_only_when_committed(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(2);
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    producer.begin().unwrap();
    for value in 0..2000_u32 {
        send(&mut *producer, &topic, (value % 2).cast_signed(), value);
    }
    for number in 0..2 {
        let partition = TopicPartition::new(topic.clone(), number);
        let (records, _) = subject.broker.read(&partition, NextOffset(0), 10, SOON).unwrap();
        assert!(records.is_empty(), "seen before the commit");
    }
    producer.commit(&Offsets::new(), None).unwrap();
    expect_values(&subject, &topic, 0..2000);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn an_aborted_transaction_leaves_nothing(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(1);
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    producer.begin().unwrap();
    (0..500).for_each(|value| send(&mut *producer, &topic, 0, value));
    producer.abort().unwrap();
    producer.begin().unwrap();
    send(&mut *producer, &topic, 0, 7);
    producer.commit(&Offsets::new(), None).unwrap();
    drop(producer);
    expect_values(&subject, &topic, [7]);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn an_older_producer_of_an_id_is_fenced(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (topic, id) = (subject.topic(1), unique("id"));
    let mut older = subject.broker.producer(Some(&id)).unwrap();
    older.begin().unwrap();
    send(&mut *older, &topic, 0, 1);
    let mut newer = subject.broker.producer(Some(&id)).unwrap();
    let error = older.commit(&Offsets::new(), None).unwrap_err();
    assert!(error.is_fenced() && !error.is_retriable(), "{error}");
    newer.begin().unwrap();
    send(&mut *newer, &topic, 0, 2);
    newer.commit(&Offsets::new(), None).unwrap();
    expect_values(&subject, &topic, [2]);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
#[case::kafka_4(Kind::Kafka4)]
fn a_group_goes_on_where_it_committed(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (topic, output, group) = (subject.topic(1), subject.topic(1), unique("g"));
    subject.write(&topic, 0, 0..10);
    assert!(subject.broker.committed(&group, std::slice::from_ref(&topic)).unwrap().is_empty());

    let mut consumer = subject.consumer(&group, &topic);
    assert_eq!(take(&mut *consumer, 10).len(), 10);
    consumer.commit(&at(&topic, 0, 4)).unwrap();
    assert_eq!(subject.broker.committed(&group, std::slice::from_ref(&topic)).unwrap(), at(&topic, 0, 4));
    drop(consumer);

    let mut consumer = subject.consumer(&group, &topic);
    assert_eq!(take(&mut *consumer, 6), (4..10).collect::<Vec<_>>());
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    producer.begin().unwrap();
    send(&mut *producer, &output, 0, 1);
    producer.commit(&at(&topic, 0, 8), Some(&consumer.token().unwrap())).unwrap();
    drop(consumer);

    let mut consumer = subject.consumer(&group, &topic);
    assert_eq!(take(&mut *consumer, 2), [8, 9]);
    expect_values(&subject, &output, [1]);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn notes_stand_beside_the_offsets_that_they_were_committed_with(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (topic, output, group) = (subject.topic(2), subject.topic(1), unique("g"));
    (0..2).for_each(|partition| subject.write(&topic, partition, 0..10));
    let mut consumer = subject.consumer(&group, &topic);
    assert_eq!(take(&mut *consumer, 20).len(), 20);
    let found = || {
        let topics = std::slice::from_ref(&topic);
        (subject.broker.committed(&group, topics).unwrap(), subject.broker.notes(&group, topics).unwrap())
    };
    assert_eq!(found(), (Offsets::new(), Notes::new()));

    let place = |partition| TopicPartition::new(topic.clone(), partition);
    let offsets = |next| Offsets::from([(place(0), NextOffset(next)), (place(1), NextOffset(next))]);
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    let mut publish = |offsets: &Offsets, notes: &Notes| {
        producer.begin().unwrap();
        send(&mut *producer, &output, 0, 1);
        producer.note(notes);
        producer.commit(offsets, Some(&consumer.token().unwrap())).unwrap();
    };
    let first = Notes::from([(place(0), i64::MIN), (place(1), 7)]);
    publish(&offsets(2), &first);
    until("the commit is shown", LIMIT, || found() == (offsets(2), first.clone()));
    let second = Notes::from([(place(1), i64::MAX)]);
    publish(&at(&topic, 1, 2), &second);
    let both = Notes::from([(place(0), i64::MIN), (place(1), i64::MAX)]);
    until("the other partition keeps its note", LIMIT, || found() == (offsets(2), both.clone()));
    publish(&offsets(3), &second);
    until("an offset without a note has none", LIMIT, || found() == (offsets(3), second.clone()));

    let third = Notes::from([(place(0), -5)]);
    consumer.note(&third);
    consumer.commit(&offsets(4)).unwrap();
    assert_eq!(found(), (offsets(4), third));
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
#[case::kafka_4(Kind::Kafka4)]
fn offsets_of_an_aborted_transaction_are_not_committed(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (topic, output, group) = (subject.topic(1), subject.topic(1), unique("g"));
    subject.write(&topic, 0, 0..3);
    let mut consumer = subject.consumer(&group, &topic);
    take(&mut *consumer, 3);
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    producer.begin().unwrap();
    send(&mut *producer, &output, 0, 1);
    producer.abort().unwrap();
    assert!(subject.broker.committed(&group, std::slice::from_ref(&topic)).unwrap().is_empty());
    consumer.seek(&at(&topic, 0, 1)).unwrap();
    assert_eq!(take(&mut *consumer, 2), [1, 2], "read again");
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
#[case::kafka_4(Kind::Kafka4)]
fn a_start_policy_overrules_the_committed_offset(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (topic, group) = (subject.topic(2), unique("g"));
    subject.write(&topic, 0, 0..10);
    subject.write(&topic, 1, 10..20);
    let mut consumer = subject.consumer(&group, &topic);
    wait_assigned(&mut *consumer);
    consumer.commit(&at(&topic, 0, 9)).unwrap();
    consumer.commit(&at(&topic, 1, 9)).unwrap();
    drop(consumer);

    let mut consumer = subject.consumer_from(&group, &topic, |partition| match partition.partition {
        0 => StartAt::Offset(NextOffset(2)),
        _ => StartAt::Committed,
    });
    let mut values = take(&mut *consumer, 9);
    values.sort_unstable();
    assert_eq!(values, [2, 3, 4, 5, 6, 7, 8, 9, 19]);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_checkpoint_that_the_log_does_not_reach_is_an_error(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(1);
    subject.write(&topic, 0, 0..3);
    let mut consumer = subject.consumer_from(&unique("g"), &topic, |_| StartAt::Offset(NextOffset(1000)));
    let mut error = None;
    until("the consumer says so", LIMIT, || {
        error = consumer.poll(10, SOON).err();
        error.is_some()
    });
    let error = error.unwrap();
    assert!(matches!(error, BrokerError::OffsetOutOfRange { offset: 1000, earliest: 0, .. }), "{error}");
    assert!(!error.is_retriable());
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
#[case::kafka_4(Kind::Kafka4)]
fn a_committed_offset_that_the_log_does_not_reach_goes_on_at_the_earliest_record(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (topic, group) = (subject.topic(1), unique("g"));
    subject.write(&topic, 0, 0..3);
    let mut consumer = subject.consumer(&group, &topic);
    wait_assigned(&mut *consumer);
    consumer.commit(&at(&topic, 0, 1000)).unwrap();
    drop(consumer);
    let mut consumer = subject.consumer(&group, &topic);
    assert_eq!(take(&mut *consumer, 3), [0, 1, 2]);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
#[case::kafka_4(Kind::Kafka4)]
fn partitions_move_when_members_come_and_go(#[case] kind: Kind) {
    let (subject, kept) = (Subject::new(kind), matches!(kind, Kind::Kafka4));
    let (topic, output, group) = (subject.topic(4), subject.topic(1), unique("g"));
    let all = |numbers: &[i32]| numbers.iter().map(|n| TopicPartition::new(topic.clone(), *n)).collect::<BTreeSet<_>>();
    let mut first = subject.consumer(&group, &topic);
    assert_eq!(wait_assigned(&mut *first).into_iter().collect::<BTreeSet<_>>(), all(&[0, 1, 2, 3]));
    let stale = first.token().unwrap();

    let mut second = subject.consumer(&group, &topic);
    let (mut of_first, mut of_second) = (all(&[0, 1, 2, 3]), BTreeSet::new());
    let apply = |poll: Poll, owned: &mut BTreeSet<TopicPartition>| {
        for partition in &poll.revoked {
            assert!(owned.remove(partition), "{partition} was not owned");
        }
        for partition in poll.assigned {
            assert!(owned.insert(partition), "assigned twice");
        }
    };
    until("the partitions are shared", LIMIT, || {
        apply(first.poll(1, Duration::from_millis(50)).unwrap(), &mut of_first);
        apply(second.poll(1, Duration::from_millis(50)).unwrap(), &mut of_second);
        of_first.len() == 2 && of_second.len() == 2
    });
    assert_eq!(&of_first | &of_second, all(&[0, 1, 2, 3]));

    // Whoever still commits under the old assignment has lost its right to.
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    producer.begin().unwrap();
    send(&mut *producer, &output, 0, 1);
    let error = producer.commit(&at(&topic, 0, 1), Some(&stale)).unwrap_err();
    assert!(error.is_fenced(), "{error}");
    // A rebalance takes the transaction, not the producer.
    producer.begin().unwrap();
    send(&mut *producer, &output, 0, 2);
    producer.commit(&at(&topic, 0, 1), Some(&first.token().unwrap())).unwrap();
    expect_values(&subject, &output, [2]);

    let before = first.token().unwrap();
    drop(second);
    until("the first has all again", LIMIT, || {
        apply(first.poll(1, Duration::from_millis(50)).unwrap(), &mut of_first);
        of_first.len() == 4
    });
    producer.begin().unwrap();
    send(&mut *producer, &output, 0, 3);
    let error = producer.commit(&at(&topic, 0, 1), Some(&before)).unwrap_err();
    // Only where the brokers share them out has it kept its partitions meanwhile, so that it may commit again.
    assert_eq!((error.is_aborted(), error.is_fenced()), (kept, !kept), "{error}");
    producer.begin().unwrap();
    send(&mut *producer, &output, 0, 4);
    producer.commit(&at(&topic, 0, 1), Some(&first.token().unwrap())).unwrap();
    expect_values(&subject, &output, [2, 4]);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
#[case::kafka_4(Kind::Kafka4)]
fn a_partition_number_is_of_one_member_in_all_topics(#[case] kind: Kind) {
    type Owned = BTreeSet<(i32, Arc<str>)>;
    let subject = Subject::new(kind);
    let (topics, group) = ([subject.topic(4), subject.topic(4)], unique("g"));
    let join = || {
        let settings = settings(&group, &topics[0], |_| StartAt::Committed);
        subject.broker.consumer(ConsumerSettings { topics: topics.to_vec(), ..settings }).unwrap()
    };
    let mut members: Vec<(Box<dyn Consumer>, Owned)> = Vec::new();
    for wanted in [1, 2, 3, 2, 1] {
        members.truncate(wanted);
        while members.len() < wanted {
            members.push((join(), BTreeSet::new()));
        }
        until("all is shared out", LIMIT, || {
            for (consumer, owned) in &mut members {
                let poll = consumer.poll(1, Duration::from_millis(20)).unwrap();
                for at in &poll.revoked {
                    assert!(owned.remove(&(at.partition, at.topic.clone())), "{at} was not owned");
                }
                owned.extend(poll.assigned.into_iter().map(|at| (at.partition, at.topic)));
                let of =
                    |topic: &Arc<str>| owned.iter().filter(|(_, t)| t == topic).map(|(n, _)| *n).collect::<Vec<_>>();
                assert_eq!(of(&topics[0]), of(&topics[1]));
            }
            let numbers: BTreeSet<_> = members.iter().flat_map(|(_, owned)| owned).map(|(number, _)| *number).collect();
            let fair = members.iter().all(|(_, owned)| owned.len() / 2 >= 4 / wanted);
            fair && numbers.len() == 4 && members.iter().map(|(_, owned)| owned.len()).sum::<usize>() == 8
        });
    }
}

#[test]
fn brokers_that_do_not_share_partitions_out_are_no_obstacle() {
    let kafka = Kafka::start_with("group.coordinator.rebalance.protocols=classic\n");
    let subject = Subject { broker: open_kafka_with(&kafka, GroupProtocol::Consumer), _folder: None };
    let (topic, group) = (subject.topic(1), unique("g"));
    subject.write(&topic, 0, 0..3);
    for _ in 0..2 {
        let mut consumer = subject.consumer(&group, &topic);
        assert_eq!(take(&mut *consumer, 3), [0, 1, 2]);
    }
}

/// Ends copying threads, also where the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Copies values from one topic to another in transactions until told to stop.
fn copy(broker: &dyn Broker, input: &Arc<str>, output: &str, group: &str, id: &str, stop: &AtomicBool) {
    let mut consumer = broker.consumer(settings(group, input, |_| StartAt::Committed)).unwrap();
    let mut producer = broker.producer(Some(id)).unwrap();
    while !stop.load(Ordering::Relaxed) {
        let poll = consumer.poll(20, Duration::from_millis(20)).unwrap();
        if poll.is_empty() {
            continue;
        }
        loop {
            producer.begin().unwrap();
            let mut offsets = Offsets::new();
            for records in &poll.records {
                numbers(records).into_iter().for_each(|value| send(&mut *producer, output, 0, value));
                offsets.insert(records.partition.clone(), records.next().unwrap());
            }
            match producer.commit(&offsets, Some(&consumer.token().unwrap())) {
                Err(error) if error.is_aborted() => {}
                Err(error) => break assert!(error.is_fenced(), "{error}"),
                Ok(()) => break,
            }
        }
    }
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
#[case::kafka_4(Kind::Kafka4)]
fn nothing_is_lost_or_doubled_while_members_come_and_go(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (input, output, group) = (subject.topic(4), subject.topic(1), unique("g"));
    let (stop_first, stop_second) = (AtomicBool::new(false), AtomicBool::new(false));
    let ids = [unique("id"), unique("id")];
    thread::scope(|scope| {
        let broker = &*subject.broker;
        let (_first_stops, second_stops) = (Stop(&stop_first), Stop(&stop_second));
        scope.spawn(|| copy(broker, &input, &output, &group, &ids[0], &stop_first));
        (0..4).for_each(|p| subject.write(&input, p, p.cast_unsigned() * 1000..p.cast_unsigned() * 1000 + 500));
        until("the first copies", LIMIT, || !subject.values(&output).is_empty());
        let second = scope.spawn(|| copy(broker, &input, &output, &group, &ids[1], &stop_second));
        (0..4).for_each(|p| subject.write(&input, p, p.cast_unsigned() * 1000 + 500..p.cast_unsigned() * 1000 + 900));
        until("most is copied", LIMIT, || subject.values(&output).len() >= 3000);
        drop(second_stops);
        second.join().unwrap();
        (0..4).for_each(|p| subject.write(&input, p, p.cast_unsigned() * 1000 + 900..p.cast_unsigned() * 1000 + 1000));
        until("all is copied", LIMIT, || subject.values(&output).len() >= 4000);
    });
    expect_values(&subject, &output, 0..4000);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
#[case::kafka_4(Kind::Kafka4)]
fn a_paused_partition_brings_nothing(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(2);
    let mut consumer = subject.consumer(&unique("g"), &topic);
    wait_assigned(&mut *consumer);
    let paused = [TopicPartition::new(topic.clone(), 0)];
    consumer.pause(&paused).unwrap();
    subject.write(&topic, 0, 0..5);
    subject.write(&topic, 1, 5..10);
    assert_eq!(take(&mut *consumer, 5), (5..10).collect::<Vec<_>>());
    assert!(consumer.poll(10, SOON).unwrap().is_empty());
    consumer.resume(&paused).unwrap();
    assert_eq!(take(&mut *consumer, 5), (0..5).collect::<Vec<_>>());
}

/// What one member has paused, the next owner of the partition reads; so does the same one, once it has it back.
#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_pause_ends_with_the_assignment(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (topic, group) = (subject.topic(1), unique("g"));
    let mut first = subject.consumer(&group, &topic);
    wait_assigned(&mut *first);
    first.pause(&[TopicPartition::new(topic.clone(), 0)]).unwrap();
    subject.write(&topic, 0, 0..5);
    let mut second = subject.consumer(&group, &topic);
    let mut read = Vec::new();
    until("one of the two reads", LIMIT, || {
        read.extend([&mut first, &mut second].into_iter().flat_map(|consumer| {
            let poll = consumer.poll(10, Duration::from_millis(20)).unwrap();
            poll.records.iter().map(|records| records.len()).collect::<Vec<_>>()
        }));
        read.iter().sum::<usize>() == 5
    });
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_newer_static_member_takes_over(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let (topic, group) = (subject.topic(1), unique("g"));
    let member = || ConsumerSettings {
        static_member: Some("monitor".to_owned()),
        ..settings(&group, &topic, |_| StartAt::Committed)
    };
    let mut older = subject.broker.consumer(member()).unwrap();
    wait_assigned(&mut *older);
    let mut newer = subject.broker.consumer(member()).unwrap();
    wait_assigned(&mut *newer);
    let mut error = None;
    until("the older one is told", LIMIT, || {
        error = older.poll(1, Duration::from_millis(50)).err();
        error.is_some()
    });
    let error = error.unwrap();
    assert!(error.is_fenced() && error.to_string().contains("monitor"), "{error}");
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_missing_topic_is_named(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let missing: Arc<str> = unique("missing").into();
    assert_eq!(subject.broker.topic(&missing).unwrap(), None);
    let told = |error: BrokerError| {
        assert!(matches!(&error, BrokerError::NoSuchTopic { topic, .. } if **topic == *missing), "{error}");
    };
    told(subject.broker.consumer(settings("g", &missing, |_| StartAt::Committed)).err().unwrap());
    let record = OutRecord { topic: &missing, value: Some(b"1"), ..OutRecord::default() };
    told(subject.broker.producer(None).unwrap().send(record).unwrap_err());
    told(subject.broker.read(&TopicPartition::new(missing.clone(), 0), NextOffset(0), 1, SOON).unwrap_err());
    assert_eq!(subject.broker.topic(&missing).unwrap(), None, "asking creates nothing");
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn a_record_that_is_too_large_is_refused(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(1);
    let mut producer = subject.broker.producer(None).unwrap();
    let large = vec![0; 17 << 20];
    let record = OutRecord { topic: &topic, value: Some(&large), ..OutRecord::default() };
    let error = producer.send(record).and_then(|()| producer.commit(&Offsets::new(), None)).unwrap_err();
    assert!(matches!(error, BrokerError::Refused { .. }), "{error}");
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn caught_up_knows_transaction_markers(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(1);
    let partition = TopicPartition::new(topic.clone(), 0);
    let mut consumer = subject.consumer(&unique("g"), &topic);
    wait_assigned(&mut *consumer);
    let caught_up = |consumer: &mut dyn Consumer| {
        until("the consumer has caught up", LIMIT, || {
            assert!(consumer.poll(10, Duration::from_millis(20)).unwrap().is_empty());
            consumer.caught_up(&partition)
        });
    };
    caught_up(&mut *consumer);

    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    producer.begin().unwrap();
    (0..5).for_each(|value| send(&mut *producer, &topic, 0, value));
    producer.commit(&Offsets::new(), None).unwrap();
    let first = consumer.poll(2, LIMIT).unwrap();
    assert_eq!(first.len(), 2);
    assert!(!consumer.caught_up(&partition), "three are left");
    assert_eq!(take(&mut *consumer, 3), [2, 3, 4]);
    caught_up(&mut *consumer);

    producer.begin().unwrap();
    (5..8).for_each(|value| send(&mut *producer, &topic, 0, value));
    producer.abort().unwrap();
    caught_up(&mut *consumer);
    let end = consumer.end(&partition).unwrap();
    assert!(end >= NextOffset(5), "{end:?}");

    // A member that starts behind the last marker has caught up too.
    let mut late = subject.consumer_from(&unique("g"), &topic, move |_| StartAt::Offset(end));
    assert!(!late.caught_up(&partition), "not assigned yet");
    wait_assigned(&mut *late);
    caught_up(&mut *late);
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn topics_are_listed_and_created_once(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    let topic = subject.topic(3);
    let again = TopicSettings { partitions: 7, compacted: true, retention_ms: Some(1) };
    subject.broker.create_topic(&topic, &again).unwrap();
    subject.write(&topic, 1, 0..4);
    let info = subject.broker.topic(&topic).unwrap().unwrap();
    let zero = NextOffset(0);
    assert_eq!(info.partitions, [(zero, zero), (zero, NextOffset(4)), (zero, zero)]);
    let all = subject.broker.topics().unwrap();
    assert!(all.contains(&info));
    assert!(all.is_sorted_by(|a, b| a.name < b.name) && all.iter().all(|t| !t.name.starts_with("__")));
}

#[rstest]
#[case::embedded(Kind::Embedded)]
#[case::kafka(Kind::Kafka)]
fn topics_say_how_long_they_keep_records(#[case] kind: Kind) {
    let subject = Subject::new(kind);
    for (compacted, retention_ms) in [(false, None), (false, Some(86_400_000)), (true, None)] {
        let topic = unique("kept");
        subject.broker.create_topic(&topic, &TopicSettings { partitions: 1, compacted, retention_ms }).unwrap();
        let expected = Retention { compacted, ms: retention_ms, bytes: None };
        assert_eq!(subject.broker.retention(&topic).unwrap(), Some(expected));
    }
    assert_eq!(subject.broker.retention(&unique("missing")).unwrap(), None);
}

#[test]
fn keys_go_to_the_same_partitions_everywhere() {
    let keys: Vec<String> = (0..200).map(|i| format!("customer-{i}")).chain([String::new()]).collect();
    let [embedded, kafka] = [Kind::Embedded, Kind::Kafka].map(|kind| {
        let subject = Subject::new(kind);
        let topic = subject.topic(7);
        let mut producer = subject.broker.producer(None).unwrap();
        for key in &keys {
            let record =
                OutRecord { topic: &topic, key: Some(key.as_bytes()), value: Some(b"1"), ..OutRecord::default() };
            producer.send(record).unwrap();
        }
        producer.commit(&Offsets::new(), None).unwrap();
        let mut placed = BTreeMap::new();
        for number in 0..7 {
            let partition = TopicPartition::new(topic.clone(), number);
            let end = subject.broker.topic(&topic).unwrap().unwrap().partitions[usize::try_from(number).unwrap()].1;
            if end == NextOffset(0) {
                continue;
            }
            let (records, _) = subject.broker.read(&partition, NextOffset(0), 1000, LIMIT).unwrap();
            placed.extend((0..records.len()).map(|row| (records.keys.get(row).unwrap().to_vec(), number)));
        }
        placed
    });
    assert_eq!(embedded.len(), keys.len());
    assert_eq!(embedded, kafka);
}

#[test]
fn a_lost_cluster_is_waited_for_and_nothing_is_lost() {
    let kafka = Kafka::start();
    let broker = open_kafka(&kafka);
    let subject = Subject { broker, _folder: None };
    let (topic, output, group) = (subject.topic(1), subject.topic(1), unique("g"));
    let mut plain = subject.broker.producer(None).unwrap();
    (0..5).for_each(|value| send(&mut *plain, &topic, 0, value));
    plain.commit(&Offsets::new(), None).unwrap();
    let mut consumer = subject.consumer(&group, &topic);
    assert_eq!(take(&mut *consumer, 5), (0..5).collect::<Vec<_>>());
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    producer.begin().unwrap();
    (0..5).for_each(|value| send(&mut *producer, &output, 0, value));
    producer.commit(&at(&topic, 0, 5), Some(&consumer.token().unwrap())).unwrap();

    producer.begin().unwrap();
    send(&mut *producer, &output, 0, 5);

    kafka.kill();
    until("the consumer says that no broker answers", LIMIT, || match consumer.poll(10, Duration::from_millis(100)) {
        Ok(poll) => {
            assert!(poll.is_empty());
            false
        }
        Err(error) => {
            assert!(error.is_retriable() && matches!(error, BrokerError::Unreachable { .. }), "{error}");
            true
        }
    });
    let asked = subject.broker.topic(&topic).unwrap_err();
    assert!(asked.is_retriable(), "{asked}");
    let refused = consumer.commit(&at(&topic, 0, 5)).unwrap_err();
    assert!(refused.is_retriable(), "{refused}");
    let unsent = producer.commit(&at(&topic, 0, 6), Some(&consumer.token().unwrap())).unwrap_err();
    assert!(unsent.is_retriable(), "{unsent}");
    send(&mut *plain, &topic, 0, 5);
    let waiting = plain.commit(&Offsets::new(), None).unwrap_err();
    assert!(waiting.is_retriable(), "{waiting}");

    kafka.restart();
    until("what was sent in the outage is acknowledged", LIMIT, || match plain.commit(&Offsets::new(), None) {
        Ok(()) => true,
        Err(error) => {
            assert!(error.is_retriable(), "{error}");
            false
        }
    });
    let mut values = Vec::new();
    until("the consumer goes on", LIMIT, || {
        match consumer.poll(10, Duration::from_millis(100)) {
            Ok(poll) => poll.records.iter().for_each(|records| values.extend(numbers(records))),
            Err(error) => assert!(error.is_retriable(), "{error}"),
        }
        !values.is_empty()
    });
    assert_eq!(values, [5]);
    until("the transaction is given up and made anew", LIMIT, || {
        let attempt = producer.abort().and_then(|()| producer.begin()).and_then(|()| {
            send(&mut *producer, &output, 0, 5);
            producer.commit(&at(&topic, 0, 6), Some(&consumer.token().unwrap()))
        });
        match attempt {
            Ok(()) => true,
            Err(error) => {
                assert!(error.is_retriable() || error.is_aborted(), "{error}");
                false
            }
        }
    });
    expect_values(&subject, &output, 0..6);
}

#[test]
fn a_commit_that_is_not_answered_is_settled_by_a_further_one() {
    let kafka = Kafka::start();
    let subject = Subject { broker: open_kafka(&kafka), _folder: None };
    let topic = subject.topic(1);
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    let commit = |producer: &mut dyn Producer| producer.commit(&Offsets::new(), None);
    producer.begin().unwrap();
    (0..5).for_each(|value| send(&mut *producer, &topic, 0, value));
    until("the records are in the log", LIMIT, || kafka.written(&topic) == 5);
    // Answers of one connection keep their order: the producer has the acknowledgements once it has this one.
    let nowhere = OutRecord { topic: "nowhere", value: Some(b"1"), ..OutRecord::default() };
    assert!(matches!(producer.send(nowhere), Err(BrokerError::NoSuchTopic { .. })));

    kafka.kill();
    let open = |result: Result<(), BrokerError>| {
        let error = result.unwrap_err();
        assert!(error.is_undecided() && !error.is_retriable(), "{error}");
    };
    open(commit(&mut *producer));
    open(producer.abort());
    open(producer.send(OutRecord { topic: &topic, value: Some(b"9"), ..OutRecord::default() }));
    open(commit(&mut *producer));
    kafka.restart();
    until("the outcome is known", LIMIT, || match commit(&mut *producer) {
        Ok(()) => true,
        Err(error) => {
            assert!(error.is_undecided(), "{error}");
            false
        }
    });
    producer.begin().unwrap();
    send(&mut *producer, &topic, 0, 5);
    commit(&mut *producer).unwrap();
    expect_values(&subject, &topic, 0..6);
}

#[test]
fn offsets_that_nobody_takes_are_given_up_with_their_transaction() {
    let kafka = Kafka::start();
    let subject = Subject { broker: open_kafka(&kafka), _folder: None };
    let (topic, output) = (subject.topic(1), subject.topic(1));
    kafka.produce(&topic, [(0, &b"k"[..], &b"0"[..])]);
    let mut consumer = subject.consumer(&unique("g"), &topic);
    assert_eq!(take(&mut *consumer, 1), [0]);
    let token = consumer.token().unwrap();
    let mut producer = subject.broker.producer(Some(&unique("id"))).unwrap();
    producer.begin().unwrap();
    (0..5).for_each(|value| send(&mut *producer, &output, 0, value));
    until("the records are in the log", LIMIT, || kafka.written(&output) == 5);
    // Answers of one connection keep their order: the producer has the acknowledgements once it has this one.
    let nowhere = OutRecord { topic: "nowhere", value: Some(b"1"), ..OutRecord::default() };
    assert!(matches!(producer.send(nowhere), Err(BrokerError::NoSuchTopic { .. })));

    kafka.kill();
    for _ in 0..2 {
        let unsent = producer.commit(&at(&topic, 0, 1), Some(&token)).unwrap_err();
        assert!(unsent.is_retriable() && matches!(unsent, BrokerError::Unreachable { .. }), "{unsent}");
    }
    for _ in 0..2 {
        let left = producer.abort().unwrap_err();
        assert!(left.is_retriable(), "{left}");
    }
    kafka.restart();
    until("the transaction is given up and made anew", LIMIT, || {
        let attempt = producer.abort().and_then(|()| producer.begin()).and_then(|()| {
            (0..5).for_each(|value| send(&mut *producer, &output, 0, value));
            producer.commit(&at(&topic, 0, 1), Some(&consumer.token()?))
        });
        match attempt {
            Ok(()) => true,
            Err(error) => {
                // The broker may have struck the silent member off; it comes back by polling.
                assert!(error.is_retriable() || error.is_aborted() || error.is_fenced(), "{error}");
                let _ = consumer.poll(1, Duration::from_millis(10));
                false
            }
        }
    });
    expect_values(&subject, &output, 0..5);
}

#[test]
fn the_embedded_log_drops_superseded_records_and_keeps_offsets() {
    let folder = tempfile::tempdir().unwrap();
    let topic: Arc<str> = "state".into();
    let partition = TopicPartition::new(topic.clone(), 0);
    let end = {
        let broker = open_embedded(folder.path());
        broker.create_topic(&topic, &TopicSettings { partitions: 1, compacted: true, retention_ms: None }).unwrap();
        let mut producer = broker.producer(None).unwrap();
        let keyless = OutRecord { topic: &topic, value: Some(b"1"), ..OutRecord::default() };
        assert!(matches!(producer.send(keyless), Err(BrokerError::Refused { .. })));
        for round in 0..1000_u32 {
            for key in 0..5_u8 {
                let value = round.to_string();
                let value = (key != 4 || round < 999).then_some(value.as_bytes());
                producer.send(OutRecord { topic: &topic, key: Some(&[key]), value, ..OutRecord::default() }).unwrap();
            }
            producer.commit(&Offsets::new(), None).unwrap();
        }
        broker.topic(&topic).unwrap().unwrap().partitions[0].1
    };
    assert_eq!(end, NextOffset(5000));
    let broker = open_embedded(folder.path());
    let (mut next, mut newest, mut count) = (NextOffset(0), BTreeMap::new(), 0);
    while next < end {
        let (records, after) = broker.read(&partition, next, 100, LIMIT).unwrap();
        assert!(records.offsets.is_sorted() && after > next);
        for row in 0..records.len() {
            newest.insert(records.keys.get(row).unwrap().to_vec(), records.values.get(row).map(<[u8]>::to_vec));
        }
        count += records.len();
        next = after;
    }
    let last = Some(b"999".to_vec());
    assert_eq!(newest.into_values().collect::<Vec<_>>(), [last.clone(), last.clone(), last.clone(), last, None]);
    assert!(count < 1000, "{count} records were read of 5000 written");

    let mut consumer = broker.consumer(settings("g", &topic, |_| StartAt::Committed)).unwrap();
    until("the consumer has caught up", LIMIT, || {
        consumer.poll(7, SOON).unwrap();
        consumer.caught_up(&partition)
    });
}

#[test]
fn the_embedded_log_drops_expired_records() {
    let folder = tempfile::tempdir().unwrap();
    let topic: Arc<str> = "events".into();
    {
        let broker = open_embedded(folder.path());
        let hour = TopicSettings { partitions: 1, compacted: false, retention_ms: Some(3_600_000) };
        broker.create_topic(&topic, &hour).unwrap();
        let mut producer = broker.producer(None).unwrap();
        for age in [7_200_000, 0] {
            let timestamp = Some(clock::now_ms() - age);
            let record =
                OutRecord { topic: &topic, partition: Some(0), value: Some(b"1"), timestamp, ..OutRecord::default() };
            producer.send(record).unwrap();
            producer.commit(&Offsets::new(), None).unwrap();
        }
    }
    let broker = open_embedded(folder.path());
    assert_eq!(broker.topic(&topic).unwrap().unwrap().partitions, [(NextOffset(1), NextOffset(2))]);
    let error = broker.read(&TopicPartition::new(topic, 0), NextOffset(0), 1, SOON).unwrap_err();
    assert!(matches!(error, BrokerError::OffsetOutOfRange { offset: 0, earliest: 1, .. }), "{error}");
}

#[test]
fn the_embedded_log_is_shared_within_a_process_and_kept_when_closed() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (open_embedded(folder.path()), open_embedded(folder.path()));
    let subject = Subject { broker: one, _folder: None };
    let topic = subject.topic(1);
    subject.write(&topic, 0, 0..3);
    assert_eq!(two.topic(&topic).unwrap().unwrap().partitions, [(NextOffset(0), NextOffset(3))]);
    drop((subject, two));
    let subject = Subject { broker: open_embedded(folder.path()), _folder: None };
    assert_eq!(subject.values(&topic), [0, 1, 2]);
    assert!(subject.broker.describe().ends_with("log.redb"));
}

/// The child of the next test: commits transactions, says so, until it is killed. Does nothing when run by itself.
#[test]
fn embedded_crash_child() {
    let Ok(folder) = std::env::var("DRIFTLINE_TEST_FOLDER") else { return };
    let broker = open_embedded(Path::new(&folder));
    let topic: Arc<str> = "input".into();
    let mut consumer = broker.consumer(settings("g", &topic, |_| StartAt::Committed)).unwrap();
    wait_assigned(&mut *consumer);
    let Ok(token @ GroupToken::Embedded { .. }) = consumer.token() else { panic!("not an embedded token") };
    let mut producer = broker.producer(Some("id")).unwrap();
    for round in 0.. {
        producer.begin().unwrap();
        for number in 0..20 {
            send(&mut *producer, ["a", "b"][number as usize % 2], 0, round * 100 + number);
        }
        producer.commit(&at(&topic, 0, i64::from(round) + 1), Some(&token)).unwrap();
        println!("committed {round}");
    }
}

#[test]
fn the_embedded_log_survives_a_kill_whole() {
    let folder = tempfile::tempdir().unwrap();
    {
        let broker = open_embedded(folder.path());
        for topic in ["input", "a", "b"] {
            let settings = TopicSettings { partitions: 1, compacted: false, retention_ms: None };
            broker.create_topic(topic, &settings).unwrap();
        }
    }
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "broker::embedded_crash_child", "--nocapture"])
            .env("DRIFTLINE_TEST_FOLDER", folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        // Kept open until the kill: a child whose reader is gone would end by itself.
        let mut rounds =
            lines.filter_map(|line| line.split_once("committed ").and_then(|(_, n)| n.trim().parse::<u32>().ok()));
        let last = rounds.by_ref().take(30).last().unwrap();
        let plan = BrokerPlan::Embedded { path: folder.path().to_owned(), partitions: 1 };
        let locked = broker::open(&plan, "test").err().unwrap();
        assert!(matches!(locked, BrokerError::Locked { .. }), "{locked}");
        child.kill().unwrap();
        child.wait().unwrap();
        drop(rounds);

        let subject = Subject { broker: open_embedded(folder.path()), _folder: None };
        let [a, b] = ["a", "b"].map(|topic| subject.values(&topic.into()));
        let committed = subject.broker.committed("g", &["input".into()]).unwrap();
        let rounds = u32::try_from(committed.values().next().unwrap().0).unwrap();
        assert!(rounds > last, "round {last} was acknowledged, {rounds} were kept");
        let newest = |values: &[u32]| values[values.len() - 10..].to_vec();
        let expected = |odd| (0..10).map(|i| (rounds - 1) * 100 + 2 * i + odd).collect::<Vec<_>>();
        assert_eq!((newest(&a), newest(&b)), (expected(0), expected(1)), "both halves of the last transaction");
        assert_eq!(a.len(), b.len());
        assert_eq!(a.len() % 10, 0, "nothing half");
    }
}
