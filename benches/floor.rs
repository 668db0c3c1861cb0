//! The floor under the comparison with other stream processors: what reading, parsing and writing the same events costs with
//! the same client library and nothing in between.
//!
//!     cargo bench --bench floor -- BROKERS TOPIC OUTPUT-TOPIC [THREADS]
//!
//! Prints a line for each of reading, reading and parsing, and reading, parsing and writing a record for each event: CPU
//! microseconds (user and system) and wall-clock seconds. `benches/peers/compare.py` runs it.

use std::thread;
use std::time::Duration;

use driftline::runtime::clock;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer as _};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Work {
    Read,
    Parse,
    Write,
}

/// The fields that the pipelines of `benches/peers` use.
#[derive(serde::Deserialize)]
struct Event<'a> {
    customer_id: &'a str,
    amount: f64,
    happened_at: i64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [brokers, input, output, rest @ ..] = arguments.as_slice() else {
        println!("floor: skipped; give BROKERS TOPIC OUTPUT-TOPIC [THREADS]");
        return;
    };
    let threads = rest.first().map_or(2, |threads| threads.parse().expect("THREADS is a number"));
    for (name, work) in [("read", Work::Read), ("parse", Work::Parse), ("write", Work::Write)] {
        let (started, cpu) = (clock::monotonic(), cpu_seconds());
        let events: u64 = thread::scope(|scope| {
            let run = |part| scope.spawn(move || run(brokers, input, output, work, part, threads));
            let running: Vec<_> = (0..threads).map(run).collect();
            running.into_iter().map(|thread| thread.join().expect("a part does not panic")).sum()
        });
        let micros = (cpu_seconds() - cpu) * 1e6 / events as f64;
        println!("{name} {events} {micros:.3} {:.2}", started.elapsed().as_secs_f64());
    }
}

/// Reads every `threads`th partition from its beginning to its end.
fn run(brokers: &str, input: &str, output: &str, work: Work, part: usize, threads: usize) -> u64 {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    let consumer: BaseConsumer = config
        .clone()
        .set("group.id", "floor")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("queued.min.messages", "50000")
        .set("queued.max.messages.kbytes", "16384")
        .create()
        .expect("the settings are valid");
    // driftline's own settings of a producer.
    let producer: BaseProducer<DefaultProducerContext> = config
        .set("compression.type", "lz4")
        .set("linger.ms", "5")
        .set("queue.buffering.max.messages", "200000")
        .set("queue.buffering.max.kbytes", "131072")
        .set("enable.idempotence", "true")
        .set("delivery.report.only.error", "true")
        .create()
        .expect("the settings are valid");
    let metadata = consumer.fetch_metadata(Some(input), Duration::from_secs(10)).expect("the broker answers");
    let partitions: Vec<i32> =
        metadata.topics()[0].partitions().iter().map(|p| p.id()).skip(part).step_by(threads).collect();
    let mut list = TopicPartitionList::new();
    let mut left = 0;
    for partition in partitions {
        let (low, high) =
            consumer.fetch_watermarks(input, partition, Duration::from_secs(10)).expect("the broker answers");
        left += high - low;
        list.add_partition_offset(input, partition, Offset::Beginning).expect("the beginning is an offset");
    }
    consumer.assign(&list).expect("the partitions are there");
    let (mut events, mut check, mut value) = (0_u64, 0.0, String::new());
    while left > 0 {
        let Some(message) = consumer.poll(Duration::from_millis(100)) else { continue };
        let message = message.expect("the broker answers");
        left -= 1;
        events += 1;
        if work == Work::Read {
            continue;
        }
        let event: Event<'_> = sonic_rs::from_slice(message.payload().unwrap_or_default()).expect("a JSON event");
        check += event.amount;
        if work == Work::Write {
            write(&producer, output, message.partition(), &event, &mut value);
        }
    }
    producer.flush(Duration::from_secs(60)).expect("the broker acknowledges");
    assert!(work == Work::Read || check > 0.0, "amounts are positive");
    events
}

/// A record as large as a row of five features.
fn write(
    producer: &BaseProducer<DefaultProducerContext>,
    topic: &str,
    partition: i32,
    event: &Event<'_>,
    value: &mut String,
) {
    use std::fmt::Write as _;

    value.clear();
    let Event { customer_id, amount, happened_at } = event;
    write!(
        value,
        r#"{{"customer_id":"{customer_id}","event_time":{happened_at},"features":{{"amount_count_10m":1,"amount_sum_10m":{amount},"amount_count_1h":1,"amount_sum_1h":{amount},"level_mean_1h":{amount}}}}}"#
    )
    .expect("a text takes all");
    let mut record =
        BaseRecord::<[u8], [u8]>::to(topic).partition(partition).key(customer_id.as_bytes()).payload(value.as_bytes());
    while let Err((_, back)) = producer.send(record) {
        producer.poll(Duration::from_millis(5));
        record = back;
    }
}

/// User and system time of this process so far.
fn cpu_seconds() -> f64 {
    // SAFETY: the call fills in the structure.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
