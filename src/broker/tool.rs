//! What `driftline topic` does: lists topics, sends lines to them, prints their records.

use std::io::{self, BufRead, Write};
use std::str::FromStr;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::{Broker, BrokerError, Header, NextOffset, Offsets, OutRecord, Producer, Records, TopicPartition};
use crate::runtime::shutdown::Stop;

/// Lines sent between two commits.
const LINES_A_COMMIT: u64 = 10_000;
/// Records read at once.
const RECORDS_A_READ: usize = 1000;
/// How long to wait for records before looking at the other partitions, and at whether to stop.
const WAIT: Duration = Duration::from_millis(200);

/// Why a topic command failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The log failed.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The topic has no such partition.
    #[error("topic '{topic}' has no partition {partition}; it has {count}, numbered from 0")]
    NoSuchPartition {
        /// Topic name.
        topic: String,
        /// What was asked for.
        partition: i32,
        /// Number of partitions.
        count: usize,
    },
    /// A line has no key.
    #[error("line {line}: no {separator:?} between key and value; {sent} lines before it were sent")]
    NoKey {
        /// Line number, from 1.
        line: u64,
        /// What should part key and value.
        separator: String,
        /// Lines sent.
        sent: u64,
    },
    /// The input cannot be read.
    #[error("line {line}: {source}")]
    Input {
        /// Line number, from 1.
        line: u64,
        /// Why.
        source: io::Error,
    },
    /// The output cannot be written.
    #[error("cannot write: {0}")]
    Output(#[source] io::Error),
}

/// Prints a table of all topics: one line a partition, with its earliest and its next offset.
///
/// # Errors
/// Where the broker does not answer or the output cannot be written.
pub fn list(broker: &dyn Broker, out: &mut dyn Write) -> Result<(), ToolError> {
    let topics = broker.topics()?;
    let width = topics.iter().map(|t| t.name.len()).max().unwrap_or(0).max("TOPIC".len());
    let mut table = format!("{:width$}  PARTITION  EARLIEST        NEXT\n", "TOPIC");
    for topic in &topics {
        for (number, (start, end)) in topic.partitions.iter().enumerate() {
            table += &format!("{:width$}  {number:>9}  {:>8}  {:>10}\n", topic.name, start.0, end.0);
        }
    }
    write_all(out, table.as_bytes()).map(|_| ())
}

/// How lines become records.
#[derive(Debug, Clone, Default)]
pub struct SendOptions {
    /// Each line is a key, this separator, and a value. Without it lines are values.
    pub key_separator: Option<String>,
    /// Headers of every record.
    pub headers: Vec<Header>,
}

/// Sends each line as a record, until the input ends or a stop is asked for, and returns how many are acknowledged. A broker
/// that is away is waited for.
///
/// # Errors
/// Where the topic does not exist, a line has no key, a record is refused, the input cannot be read, or a stop is asked for
/// while the broker is away. Lines before the failing one are sent.
pub fn send(
    broker: &dyn Broker,
    topic: &str,
    lines: &mut dyn BufRead,
    options: &SendOptions,
    stop: &Stop,
) -> Result<u64, ToolError> {
    if broker.topic(topic)?.is_none() {
        return Err(BrokerError::NoSuchTopic { topic: topic.to_owned(), broker: broker.describe() }.into());
    }
    let mut producer = broker.producer(None)?;
    let (mut sent, mut line) = (0, Vec::new());
    let failed = loop {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(0) => break None,
            Ok(_) if stop.requested() => break None,
            Ok(_) => {}
            Err(source) => break Some(ToolError::Input { line: sent + 1, source }),
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let (key, value) = match &options.key_separator {
            None => (None, text),
            Some(separator) => match split(text, separator.as_bytes()) {
                Some((key, value)) => (Some(key), value),
                None => break Some(ToolError::NoKey { line: sent + 1, separator: separator.clone(), sent }),
            },
        };
        let record = OutRecord { topic, key, value: Some(value), headers: &options.headers, ..OutRecord::default() };
        patiently(stop, || producer.send(record.clone()))?;
        sent += 1;
        if sent % LINES_A_COMMIT == 0 {
            acknowledge(&mut *producer, stop)?;
        }
    };
    acknowledge(&mut *producer, stop)?;
    failed.map_or(Ok(sent), Err)
}

fn acknowledge(producer: &mut dyn Producer, stop: &Stop) -> Result<(), BrokerError> {
    patiently(stop, || producer.commit(&Offsets::new(), None))
}

/// Repeats what may succeed later, until it does or a stop is asked for.
fn patiently(stop: &Stop, mut attempt: impl FnMut() -> Result<(), BrokerError>) -> Result<(), BrokerError> {
    loop {
        match attempt() {
            Err(error) if error.is_retriable() => {
                tracing::warn!(%error, "waiting for the broker");
                if stop.wait(WAIT) {
                    return Err(error);
                }
            }
            done => return done,
        }
    }
}

fn split<'a>(line: &'a [u8], separator: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = line.windows(separator.len().max(1)).position(|window| window == separator)?;
    Some((&line[..at], &line[at + separator.len()..]))
}

/// Where to begin printing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TailFrom {
    /// At the earliest record.
    Beginning,
    /// Behind the newest record.
    End,
    /// At this offset of each partition.
    Offset(NextOffset),
    /// At this many offsets before the end of each partition. Transaction markers count.
    Last(u32),
}

impl FromStr for TailFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let offset = || text.parse().ok().filter(|offset| *offset >= 0).map(|offset| Self::Offset(NextOffset(offset)));
        let last = || text.strip_prefix('-')?.parse().ok().map(Self::Last);
        match text {
            "beginning" => Ok(Self::Beginning),
            "end" => Ok(Self::End),
            _ => last().or_else(offset).ok_or_else(|| {
                format!("'{text}' is not where records begin: write beginning, end, an offset, or -N for the last N")
            }),
        }
    }
}

/// What to print.
#[derive(Debug, Clone, Copy)]
pub struct TailOptions {
    /// Where to begin.
    pub from: TailFrom,
    /// Only this partition.
    pub partition: Option<i32>,
    /// Stop after this many records.
    pub limit: Option<u64>,
    /// Wait for more at the end, until a stop is asked for.
    pub follow: bool,
}

/// How a value is printed.
pub enum Shown<V> {
    /// As the text that it is, or else in base64.
    AsItIs,
    /// As this JSON.
    Json(V),
    /// In base64, with what is wrong with it.
    Broken(String),
}

/// Prints committed records as JSON lines and returns how many: partition by partition up to the ends that the topic has now,
/// then, if asked to follow, as they come. `read` says how each value is printed. Ends quietly where the output is closed
/// (`| head`).
///
/// # Errors
/// Where topic or partition do not exist, the offset is not in the log, the broker does not answer (while following it is
/// waited for), or the output cannot be written.
pub fn tail<V: serde::Serialize>(
    broker: &dyn Broker,
    topic: &str,
    options: &TailOptions,
    read: impl FnMut(&[u8]) -> Shown<V>,
    out: &mut dyn Write,
    stop: &Stop,
) -> Result<u64, ToolError> {
    let Some(info) = broker.topic(topic)? else {
        return Err(BrokerError::NoSuchTopic { topic: topic.to_owned(), broker: broker.describe() }.into());
    };
    let mut positions = Vec::new();
    for (number, (start, end)) in info.partitions.iter().enumerate() {
        let number = i32::try_from(number).expect("a topic has few partitions");
        if options.partition.is_none_or(|wanted| wanted == number) {
            let from = match options.from {
                TailFrom::Beginning => *start,
                TailFrom::End => *end,
                TailFrom::Offset(offset) => offset,
                TailFrom::Last(count) => (*start).max(NextOffset(end.0 - i64::from(count))),
            };
            positions.push((TopicPartition::new(info.name.clone(), number), from, *end));
        }
    }
    if let (Some(partition), true) = (options.partition, positions.is_empty()) {
        let (topic, count) = (topic.to_owned(), info.partitions.len());
        return Err(ToolError::NoSuchPartition { topic, partition, count });
    }
    let mut printer = Printer { broker, read, left: options.limit.unwrap_or(u64::MAX), printed: 0, out };
    for (partition, next, end) in &mut positions {
        while *next < *end && printer.left > 0 && !stop.requested() {
            if !printer.print(partition, next, Some(*end))? {
                return Ok(printer.printed);
            }
        }
    }
    while options.follow && printer.left > 0 && !stop.requested() {
        for (partition, next, _) in &mut positions {
            match printer.print(partition, next, None) {
                Ok(true) => {}
                Ok(false) => return Ok(printer.printed),
                Err(ToolError::Broker(error)) if error.is_retriable() => {
                    tracing::warn!(%error, "waiting for the broker");
                    stop.wait(WAIT);
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(printer.printed)
}

struct Printer<'a, R> {
    broker: &'a dyn Broker,
    read: R,
    /// Records that may still be printed.
    left: u64,
    printed: u64,
    out: &'a mut dyn Write,
}

impl<V: serde::Serialize, R: FnMut(&[u8]) -> Shown<V>> Printer<'_, R> {
    /// Prints what one read brings, before `end` where there is one. Returns false where the output is closed.
    fn print(
        &mut self,
        partition: &TopicPartition,
        next: &mut NextOffset,
        end: Option<NextOffset>,
    ) -> Result<bool, ToolError> {
        let max = usize::try_from(self.left).unwrap_or(usize::MAX).min(RECORDS_A_READ);
        let (records, after) = self.broker.read(partition, *next, max, WAIT)?;
        let mut lines = Vec::new();
        for row in 0..records.len() {
            if end.is_none_or(|end| records.offsets[row] < end.0) {
                let shown = records.values.get(row).map_or(Shown::AsItIs, &mut self.read);
                serde_json::to_writer(&mut lines, &Line::of(&records, row, shown))
                    .expect("a line has only text and numbers");
                lines.push(b'\n');
                self.left -= 1;
                self.printed += 1;
            }
        }
        *next = after;
        write_all(self.out, &lines)
    }
}

/// Writes and flushes. Returns false where nobody reads any more.
fn write_all(out: &mut dyn Write, bytes: &[u8]) -> Result<bool, ToolError> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(ToolError::Output(error)),
    }
}

/// A record as it is printed. Bytes that are not UTF-8 are in the fields that say so.
#[derive(serde::Serialize)]
struct Line<'a, V> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    /// Milliseconds since 1970 UTC.
    timestamp: Option<i64>,
    #[serde(flatten)]
    key: Key<'a>,
    #[serde(flatten)]
    value: Content<'a, V>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    headers: Vec<HeaderLine<'a>>,
}

#[derive(serde::Serialize)]
struct HeaderLine<'a> {
    name: &'a str,
    #[serde(flatten)]
    value: Value<'a>,
}

#[derive(serde::Serialize)]
enum Key<'a> {
    #[serde(rename = "key")]
    Text(Option<&'a str>),
    #[serde(rename = "key_base64")]
    Bytes(String),
}

#[derive(serde::Serialize)]
enum Value<'a> {
    #[serde(rename = "value")]
    Text(Option<&'a str>),
    #[serde(rename = "value_base64")]
    Bytes(String),
}

#[derive(serde::Serialize)]
#[serde(untagged)]
enum Content<'a, V> {
    Bytes(Value<'a>),
    Read { value: V },
}

impl<'a> Value<'a> {
    fn of(bytes: Option<&'a [u8]>) -> Self {
        match bytes.map(|bytes| str::from_utf8(bytes).map_err(|_| BASE64.encode(bytes))).transpose() {
            Ok(text) => Self::Text(text),
            Err(encoded) => Self::Bytes(encoded),
        }
    }
}

impl<'a, V> Line<'a, V> {
    fn of(records: &'a Records, row: usize, shown: Shown<V>) -> Self {
        let bytes = records.values.get(row);
        let (value, error) = match shown {
            Shown::AsItIs => (Content::Bytes(Value::of(bytes)), None),
            Shown::Json(value) => (Content::Read { value }, None),
            Shown::Broken(error) => {
                (Content::Bytes(Value::Bytes(BASE64.encode(bytes.unwrap_or_default()))), Some(error))
            }
        };
        let headers = records.headers.iter().find(|(at, _)| *at == row).map_or(&[][..], |(_, headers)| headers);
        Self {
            topic: &records.partition.topic,
            partition: records.partition.partition,
            offset: records.offsets[row],
            timestamp: Some(records.timestamps[row]).filter(|t| *t >= 0),
            key: match Value::of(records.keys.get(row)) {
                Value::Text(text) => Key::Text(text),
                Value::Bytes(encoded) => Key::Bytes(encoded),
            },
            value,
            error,
            headers: headers.iter().map(|h| HeaderLine { name: &h.name, value: Value::of(Some(&h.value)) }).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::TopicSettings;
    use crate::broker::embedded::EmbeddedBroker;

    fn broker() -> (tempfile::TempDir, EmbeddedBroker) {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let broker = EmbeddedBroker::open(folder.path()).expect("the folder is writable");
        let settings = TopicSettings { partitions: 1, compacted: false, retention_ms: None };
        broker.create_topic("t", &settings).expect("the topic is new");
        (folder, broker)
    }

    fn send_text(broker: &EmbeddedBroker, text: &[u8], options: &SendOptions) -> Result<u64, ToolError> {
        send(broker, "t", &mut &*text, options, &Stop::new())
    }

    fn as_it_is(_: &[u8]) -> Shown<()> {
        Shown::AsItIs
    }

    fn tail_lines(broker: &EmbeddedBroker, from: &str, limit: Option<u64>) -> Vec<serde_json::Value> {
        tail_shown(broker, from, limit, as_it_is)
    }

    fn tail_shown<V: serde::Serialize>(
        broker: &EmbeddedBroker,
        from: &str,
        limit: Option<u64>,
        read: impl FnMut(&[u8]) -> Shown<V>,
    ) -> Vec<serde_json::Value> {
        let from = from.parse().expect("a place to begin");
        let options = TailOptions { from, partition: None, limit, follow: false };
        let mut out = Vec::new();
        let count = tail(broker, "t", &options, read, &mut out, &Stop::new()).expect("the topic can be read");
        let lines: Vec<_> = out
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).expect("each line is JSON"))
            .collect();
        assert_eq!(count, lines.len() as u64);
        lines
    }

    #[test]
    fn lines_come_back_as_json() {
        let (_folder, broker) = broker();
        let headers = vec![Header { name: "h".into(), value: b"x".to_vec() }];
        let keyed = SendOptions { key_separator: Some("\t".into()), headers };
        assert_eq!(send_text(&broker, b"a\t{\"n\":1}\r\nb\t\xff\n", &keyed).expect("sent"), 2);
        assert_eq!(send_text(&broker, b"plain\n\nlast", &SendOptions::default()).expect("sent"), 3);
        let mut lines = tail_lines(&broker, "beginning", None);
        for line in &mut lines {
            assert!(line.as_object_mut().expect("an object").remove("timestamp").expect("a time").is_i64());
        }
        let header = serde_json::json!([{"name": "h", "value": "x"}]);
        let expected = [
            serde_json::json!({"topic": "t", "partition": 0, "offset": 0, "key": "a", "value": "{\"n\":1}", "headers": header}),
            serde_json::json!({"topic": "t", "partition": 0, "offset": 1, "key": "b", "value_base64": "/w==", "headers": header}),
            serde_json::json!({"topic": "t", "partition": 0, "offset": 2, "key": null, "value": "plain"}),
            serde_json::json!({"topic": "t", "partition": 0, "offset": 3, "key": null, "value": ""}),
            serde_json::json!({"topic": "t", "partition": 0, "offset": 4, "key": null, "value": "last"}),
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn values_are_shown_as_their_reader_says() {
        let (_folder, broker) = broker();
        send_text(&broker, b"text\n1\nbad\n", &SendOptions::default()).expect("sent");
        let read = |value: &[u8]| match value {
            b"1" => Shown::Json(serde_json::json!({"n": 1})),
            b"bad" => Shown::Broken("cut short".into()),
            _ => Shown::AsItIs,
        };
        let mut lines = tail_shown(&broker, "beginning", None, read);
        for line in &mut lines {
            line.as_object_mut()
                .expect("an object")
                .retain(|name, _| matches!(name.as_str(), "value" | "value_base64" | "error"));
        }
        let expected = [
            serde_json::json!({"value": "text"}),
            serde_json::json!({"value": {"n": 1}}),
            serde_json::json!({"value_base64": "YmFk", "error": "cut short"}),
        ];
        assert_eq!(lines, expected);
    }

    #[rstest::rstest]
    #[case("beginning", None, 0..5)]
    #[case("end", None, 0..0)]
    #[case("3", None, 3..5)]
    #[case("-2", None, 3..5)]
    #[case("-9", None, 0..5)]
    #[case("1", Some(2), 1..3)]
    fn printing_begins_and_ends_where_told(
        #[case] from: &str,
        #[case] limit: Option<u64>,
        #[case] expected: std::ops::Range<i64>,
    ) {
        let (_folder, broker) = broker();
        send_text(&broker, b"0\n1\n2\n3\n4\n", &SendOptions::default()).expect("sent");
        let offsets: Vec<_> = tail_lines(&broker, from, limit).iter().map(|line| line["offset"].as_i64()).collect();
        assert_eq!(offsets, expected.map(Some).collect::<Vec<_>>());
    }

    #[test]
    fn a_place_that_makes_no_sense_is_refused() {
        for text in ["", "start", "-x", "--2", "1.5"] {
            assert!(text.parse::<TailFrom>().expect_err("refused").contains("beginning"));
        }
    }

    #[test]
    fn a_line_without_a_key_is_named_and_those_before_it_are_sent() {
        let (_folder, broker) = broker();
        let keyed = SendOptions { key_separator: Some("::".into()), headers: Vec::new() };
        let error = send_text(&broker, b"k::v\nnothing\nk::v\n", &keyed).expect_err("no key");
        assert_eq!(error.to_string(), "line 2: no \"::\" between key and value; 1 lines before it were sent");
        assert_eq!(tail_lines(&broker, "beginning", None).len(), 1);
    }

    #[test]
    fn missing_topics_and_partitions_are_named() {
        let (_folder, broker) = broker();
        let stop = Stop::new();
        let sent = send(&broker, "nope", &mut &b"x\n"[..], &SendOptions::default(), &stop).expect_err("no topic");
        assert!(sent.to_string().contains("'nope'"), "{sent}");
        let options = TailOptions { from: TailFrom::Beginning, partition: Some(7), limit: None, follow: true };
        let error = tail(&broker, "t", &options, as_it_is, &mut Vec::new(), &stop).expect_err("no partition");
        assert_eq!(error.to_string(), "topic 't' has no partition 7; it has 1, numbered from 0");
    }

    #[test]
    fn following_prints_what_comes_until_stopped() {
        let (_folder, broker) = broker();
        let stop = Stop::new();
        let options = TailOptions { from: TailFrom::End, partition: None, limit: Some(2), follow: true };
        let mut out = Vec::new();
        std::thread::scope(|scope| {
            let following = scope.spawn(|| tail(&broker, "t", &options, as_it_is, &mut out, &stop));
            // However the two start, two records come behind the end that following began at.
            while !following.is_finished() {
                send_text(&broker, b"x\n", &SendOptions::default()).expect("sent");
            }
            assert_eq!(following.join().expect("no panic").expect("read"), 2);
        });
        stop.request();
        let all = TailOptions { limit: None, ..options };
        assert_eq!(tail(&broker, "t", &all, as_it_is, &mut Vec::new(), &stop).expect("stopped"), 0);
    }

    #[test]
    fn topics_are_listed_as_a_table() {
        let (_folder, broker) = broker();
        send_text(&broker, b"x\n", &SendOptions::default()).expect("sent");
        let mut out = Vec::new();
        list(&broker, &mut out).expect("listed");
        let table = String::from_utf8(out).expect("text");
        assert_eq!(table, "TOPIC  PARTITION  EARLIEST        NEXT\nt              0         0           1\n");
    }
}
