//! `dead-letters`: list, show, replay.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::{Failure, Outcome, load, open_existing, printed, runtime, stop_on_signals, topic};
use crate::broker::{Broker, BrokerError, Header, NextOffset, TopicPartition};
use crate::cli::{DeadLettersArgs, DeadLettersCommand, LetterArgs, PipelineArgs};
use crate::config::names::suggestion;
use crate::config::plan::{Format, Plan};
use crate::config::units;
use crate::runtime::clock;
use crate::runtime::shutdown::Stop;
use crate::source::dead_letter::{self, Filter, Letter, ReadError, Replay, ReplayError, Replayed};
use crate::source::event_time;
use crate::telemetry::view;

/// How these commands name themselves to a broker.
const CLIENT: &str = "driftline-dead-letters";
/// Characters of an error in a list.
const ERROR: usize = 160;
/// Bytes of a value that text output shows in hexadecimal.
const HEX: usize = 4096;

pub(super) fn run(args: &DeadLettersArgs) -> Outcome {
    match &args.command {
        DeadLettersCommand::List { pipeline, filter, each, limit, json } => {
            let place = Place::open(pipeline)?;
            let filter = place.filter(filter)?;
            let text = match each {
                false => place.groups(&filter, limit.unwrap_or(usize::MAX), *json)?,
                true => place.each(&filter, limit.unwrap_or(usize::MAX), *json)?,
            };
            printed(write!(std::io::stdout(), "{text}"))
        }
        DeadLettersCommand::Show { pipeline, letter, json } => Place::open(pipeline)?.show(letter, *json),
        DeadLettersCommand::Replay { pipeline, filter, limit, max_replays, dry_run, json } => {
            let place = Place::open(pipeline)?;
            let (letters, marks) = (place.plan.dead_letter_topic(), place.plan.replayed_letters_topic());
            let what = Replay {
                letters: &letters,
                marks: &marks,
                transactional_id: &marks,
                filter: place.filter(filter)?,
                limit: *limit,
                most_replays: *max_replays,
                dry_run: *dry_run,
            };
            let replayed =
                dead_letter::replay(place.broker.as_ref(), &what, &place.stop).map_err(|error| match error {
                    ReplayError::Read(error) => place.failed(error),
                    error => Failure::failed(error),
                })?;
            let text = if *json { pretty(&replay_json(&replayed, *dry_run)) } else { replay_text(&replayed, &what) };
            printed(write!(std::io::stdout(), "{text}"))
        }
    }
}

/// A pipeline's dead letters.
struct Place {
    plan: Arc<Plan>,
    broker: Arc<dyn Broker>,
    runtime: tokio::runtime::Runtime,
    stop: Stop,
}

impl Place {
    fn open(args: &PipelineArgs) -> Result<Self, Failure> {
        let plan = load(args)?;
        let broker = open_existing(&plan.broker, CLIENT)?;
        let (runtime, stop) = (runtime()?, Stop::new());
        stop_on_signals(&runtime, &stop);
        Ok(Self { plan, broker, runtime, stop })
    }

    fn failed(&self, error: ReadError) -> Failure {
        match error {
            ReadError::Broker(BrokerError::NoSuchTopic { topic, broker }) => Failure::Failed(format!(
                "topic '{topic}' does not exist on {broker}: pipeline '{}' has not run there yet, so it has no dead letters",
                self.plan.name
            )),
            error => Failure::failed(error),
        }
    }

    fn filter(&self, args: &LetterArgs) -> Result<Filter, Failure> {
        let since = args.since.as_deref().map(|text| since(text, clock::now_ms())).transpose();
        Ok(Filter {
            stage: args.stage.clone(),
            reason: args.reason.clone(),
            topic: args.source.as_deref().map(|name| self.topic_of(name)).transpose()?,
            since: since.map_err(Failure::Usage)?,
        })
    }

    /// The topic of a source, or a topic that stages read from.
    fn topic_of(&self, name: &str) -> Result<Arc<str>, Failure> {
        let plan = &self.plan;
        let known = || {
            let between = [Some(plan.features_topic().into()), plan.score.as_ref().map(|score| score.topic.clone())];
            plan.sources.iter().map(|source| source.topic.clone()).chain(between.into_iter().flatten())
        };
        let of_source = plan.sources.iter().find(|source| *source.name == *name).map(|source| source.topic.clone());
        of_source.or_else(|| known().find(|topic| **topic == *name)).ok_or_else(|| {
            let names: Vec<&str> = plan.sources.iter().map(|source| &*source.name).collect();
            let hint = suggestion(name, "source", names.iter().copied()).unwrap_or_default();
            let (pipeline, names) = (&plan.name, names.join(", "));
            Failure::Usage(format!("--source: pipeline '{pipeline}' has no source '{name}'; it has {names}. {hint}"))
        })
    }

    /// What a person calls a topic: the source that reads it.
    fn source_of<'a>(&'a self, topic: &'a str) -> &'a str {
        self.plan.sources.iter().find(|source| *source.topic == *topic).map_or(topic, |source| &source.name)
    }

    fn marks(&self) -> Result<rustc_hash::FxHashMap<String, i64>, Failure> {
        let topic = self.plan.replayed_letters_topic();
        dead_letter::replayed(self.broker.as_ref(), &topic, &self.stop).map_err(Failure::failed)
    }

    fn groups(&self, filter: &Filter, limit: usize, json: bool) -> Result<String, Failure> {
        let topic = self.plan.dead_letter_topic();
        let marks = self.marks()?;
        let summary = dead_letter::summarise(self.broker.as_ref(), &topic, filter, &marks, &self.stop)
            .map_err(|error| self.failed(error))?;
        let mut groups: Vec<_> = summary.groups.iter().collect();
        // The largest first; equal ones as the map orders them.
        groups.sort_by_key(|(_, group)| std::cmp::Reverse(group.letters));
        let letters: u64 = groups.iter().map(|(_, group)| group.letters).sum();
        let left_out = groups.len().saturating_sub(limit);
        groups.truncate(limit);
        if json {
            let groups: Vec<Value> = groups
                .iter()
                .map(|((stage, reason, topic), group)| {
                    json!({
                        "stage": stage, "reason": reason, "source": self.source_of(topic), "topic": topic,
                        "letters": group.letters, "replayed": group.replayed,
                        "first": iso(group.first), "last": iso(group.last),
                        "example": { "letter": name(&group.example), "error": group.example.stored.error },
                    })
                })
                .collect();
            return Ok(pretty(&json!({
                "pipeline": self.plan.name, "topic": topic, "letters": letters, "groups": groups,
                "groups_left_out": left_out, "foreign_records": summary.foreign,
            })));
        }
        if letters == 0 {
            return Ok(format!("no dead letters{}\n", foreign(summary.foreign)));
        }
        let head = ["STAGE", "REASON", "SOURCE", "LETTERS", "REPLAYED", "FIRST", "LAST", "NEWEST"].map(str::to_owned);
        let lines: Vec<[String; 8]> = std::iter::once(head)
            .chain(groups.iter().map(|((stage, reason, topic), group)| {
                [
                    printable(stage),
                    printable(reason),
                    printable(self.source_of(topic)),
                    view::count(group.letters),
                    view::count(group.replayed),
                    time(group.first),
                    time(group.last),
                    name(&group.example),
                ]
            }))
            .collect();
        let mut text = String::new();
        for (index, line) in table(&lines, &[3, 4]).into_iter().enumerate() {
            text += &line;
            if let Some((_, group)) = index.checked_sub(1).and_then(|index| groups.get(index)) {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "    {}", short(&group.example.stored.error));
            }
        }
        if left_out > 0 {
            let _ = writeln!(text, "… and {left_out} smaller groups");
        }
        let _ = writeln!(text, "\n{} dead letters{}", view::count(letters), foreign(summary.foreign));
        Ok(text)
    }

    fn each(&self, filter: &Filter, limit: usize, json: bool) -> Result<String, Failure> {
        let marks = self.marks()?;
        let mut newest = VecDeque::new();
        let mut left_out = 0_u64;
        dead_letter::read(self.broker.as_ref(), &self.plan.dead_letter_topic(), &self.stop, |letter| {
            if filter.lets(&letter) {
                newest.push_back(letter);
                if newest.len() > limit {
                    newest.pop_front();
                    left_out += 1;
                }
            }
            Ok::<_, ReadError>(true)
        })
        .map_err(|error| self.failed(error))?;
        let replayed = |letter: &Letter| marks.get(&letter.stored.identity()).copied();
        if json {
            // One object a line: the list may be long.
            return Ok(newest
                .iter()
                .map(|letter| {
                    let mut line = self.coordinates(letter);
                    line["replayed"] = replayed(letter).map_or(Value::Null, iso);
                    format!("{line}\n")
                })
                .collect());
        }
        let head = ["LETTER", "WRITTEN", "STAGE", "REASON", "RECORD", "REPLAYED", "ERROR"].map(str::to_owned);
        let lines: Vec<[String; 7]> = std::iter::once(head)
            .chain(newest.iter().map(|letter| {
                let stored = &letter.stored;
                [
                    name(letter),
                    time(letter.written_at),
                    printable(&stored.stage),
                    printable(&stored.reason),
                    format!("{} offset {}", printable(&stored.partition.to_string()), stored.offset),
                    replayed(letter).map_or_else(|| "-".to_owned(), time),
                    short(&stored.error),
                ]
            }))
            .collect();
        let before =
            if left_out > 0 { format!("… {} older letters\n", view::count(left_out)) } else { String::new() };
        Ok(table(&lines, &[]).concat() + &before)
    }

    fn show(&self, named: &str, json: bool) -> Outcome {
        let (partition, offset) = position(named).map_err(Failure::Usage)?;
        let letter = self.letter(partition, offset)?;
        let replayed = self.marks()?.get(&letter.stored.identity()).copied();
        let content = self.content(&letter)?;
        let text = match json {
            true => {
                let mut object = self.coordinates(&letter);
                object["replayed"] = replayed.map_or(Value::Null, iso);
                object["replays"] = letter.stored.replays.into();
                object["headers"] = letter
                    .stored
                    .headers
                    .iter()
                    .map(|Header { name, value }| {
                        let mut header = json!({ "name": name });
                        put(&mut header, "value", Some(value));
                        header
                    })
                    .collect();
                put(&mut object, "key", letter.stored.key.as_deref());
                put(&mut object, "value", letter.stored.original_value());
                if let Some(read) = content.read {
                    object["decoded"] = read;
                }
                if let Some(why) = content.why_not {
                    object["not_decoded"] = why.into();
                }
                pretty(&object)
            }
            false => self.letter_text(&letter, replayed, &content),
        };
        printed(write!(std::io::stdout(), "{text}"))
    }

    /// The letter at a position of the dead-letter topic.
    fn letter(&self, partition: i32, offset: i64) -> Result<Letter, Failure> {
        let topic = self.plan.dead_letter_topic();
        let Some(info) = self.broker.topic(&topic).map_err(Failure::failed)? else {
            let broker = self.broker.describe();
            return Err(self.failed(ReadError::Broker(BrokerError::NoSuchTopic { topic, broker })));
        };
        let at = TopicPartition::new(info.name, partition);
        let range = usize::try_from(partition).ok().and_then(|partition| info.partitions.get(partition));
        let none = |what: String| Failure::Failed(format!("{at} {what}; `driftline dead-letters list` names letters"));
        let Some((start, end)) = range else {
            let partitions = info.partitions.len();
            return Err(none(format!("does not exist: the topic has {partitions} partitions, numbered from 0")));
        };
        if offset < start.0 || offset >= end.0 {
            return Err(none(format!("has no offset {offset}: it holds {} to {} (exclusive)", start.0, end.0)));
        }
        let (records, _) =
            self.broker.read(&at, NextOffset(offset), 1, Duration::from_secs(10)).map_err(Failure::failed)?;
        if records.offsets.first() != Some(&offset) {
            return Err(none(format!(
                "has no record at offset {offset}: a transaction's marker may take up that offset"
            )));
        }
        match dead_letter::read_back(&records, 0) {
            Some(stored) => Ok(Letter { partition, offset, written_at: records.timestamps[0], stored }),
            None => Err(none(format!("offset {offset} is no dead letter: it lacks driftline's headers"))),
        }
    }

    fn coordinates(&self, letter: &Letter) -> Value {
        let stored = &letter.stored;
        json!({
            "letter": name(letter), "written": iso(letter.written_at),
            "stage": stored.stage, "reason": stored.reason, "error": stored.error,
            "source": self.source_of(&stored.partition.topic),
            "topic": stored.partition.topic, "partition": stored.partition.partition, "offset": stored.offset,
            "timestamp": iso(stored.timestamp),
        })
    }

    fn letter_text(&self, letter: &Letter, replayed: Option<i64>, content: &Content) -> String {
        let stored = &letter.stored;
        let mut text = String::new();
        let mut line = |label: &str, value: &str| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{label:<10} {value}");
        };
        line("letter", &format!("{} on {}", name(letter), self.plan.dead_letter_topic()));
        line("written", &instant(letter.written_at));
        line("stage", &printable(&stored.stage));
        line("reason", &printable(&stored.reason));
        line("error", &printable(&stored.error));
        line("record", &format!("{} offset {}", printable(&stored.partition.to_string()), stored.offset));
        line("timestamp", &instant(stored.timestamp));
        line("replayed", &replayed.map_or_else(|| "no".to_owned(), instant));
        if stored.replays > 0 {
            line("", &format!("and {} times before it died here", stored.replays));
        }
        for Header { name, value } in &stored.headers {
            line("header", &format!("{}: {}", printable(name), bytes_text(value)));
        }
        line("key", &stored.key.as_deref().map_or_else(|| "none".to_owned(), bytes_text));
        let Some(value) = stored.original_value() else {
            line("value", "none");
            return text;
        };
        line("value", &format!("{} bytes, {}", value.len(), content.kind));
        if let Some(why) = &content.why_not {
            line("", &printable(why));
        }
        text.push('\n');
        match (&content.read, std::str::from_utf8(value)) {
            (Some(read), _) => text += &pretty(read),
            (None, Ok(plain)) => {
                text += plain.lines().map(|line| printable(line) + "\n").collect::<String>().as_str();
            }
            (None, Err(_)) => text += &hex(value),
        }
        text
    }

    /// What a letter's value says, where it can be told.
    fn content(&self, letter: &Letter) -> Result<Content, Failure> {
        let Some(value) = letter.stored.original_value() else { return Ok(Content::default()) };
        let topic = &letter.stored.partition.topic;
        let format = self.plan.sources.iter().find(|source| source.topic == *topic).map(|source| &source.format);
        let utf8 = std::str::from_utf8(value);
        if let Ok(read) = serde_json::from_slice(value) {
            return Ok(Content { kind: "JSON", read: Some(read), why_not: None });
        }
        // A JSON text cannot begin with a zero byte: this is Confluent's framing.
        if let Some((&[0, a, b, c, d], rest)) = value.split_first_chunk::<5>()
            && let Ok(read) = serde_json::from_slice(rest)
        {
            let id = u32::from_be_bytes([a, b, c, d]);
            let why_not = Some(format!("framed: schema id {id} of the registry"));
            return Ok(Content { kind: "JSON", read: Some(read), why_not });
        }
        let avro = matches!(format, Some(Format::Avro { .. }));
        if avro {
            let mut reader = topic::avro_reader(topic, None, Some(&self.plan), self.runtime.handle())?;
            match reader.read(value) {
                Some(Ok(read)) => {
                    let read = serde_json::to_value(read).map_err(Failure::failed)?;
                    return Ok(Content { kind: "Avro", read: Some(read), why_not: None });
                }
                Some(Err(error)) => {
                    let kind = if utf8.is_ok() { "text" } else { "no text" };
                    return Ok(Content { kind, read: None, why_not: Some(error) });
                }
                None => {}
            }
        }
        Ok(Content { kind: if utf8.is_ok() { "text" } else { "no text" }, read: None, why_not: None })
    }
}

/// What a value says.
#[derive(Default)]
struct Content {
    /// In a word or two.
    kind: &'static str,
    /// As JSON.
    read: Option<Value>,
    /// Why it could not be read, or what else there is to say.
    why_not: Option<String>,
}

fn replay_json(replayed: &Replayed, dry_run: bool) -> Value {
    json!({
        "dry_run": dry_run, "replayed": replayed.total(), "topics": replayed.sent,
        "left_alone": {
            "replayed_before": replayed.already, "died_too_often": replayed.too_often,
            "applied_already": replayed.applied, "record_expired": replayed.expired,
            "topic_missing": replayed.nowhere,
        },
        "foreign_records": replayed.foreign, "cut_short": replayed.cut_short,
    })
}

fn replay_text(replayed: &Replayed, what: &Replay<'_>) -> String {
    let mut text = String::new();
    let mut line = |count: u64, words: &str| {
        if count > 0 {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{:>12} {words}", view::count(count));
        }
    };
    let verb = if what.dry_run { "would be put back" } else { "put back" };
    for (topic, count) in &replayed.sent {
        line(*count, &format!("{verb} on {topic}"));
    }
    line(replayed.already, "left alone: replayed before");
    let times = what.most_replays;
    line(replayed.too_often, &format!("left alone: died again after {times} replays; --max-replays allows more"));
    let help = "left alone: the features have applied these events, only scoring failed; a second copy would count twice; \
                --reason unscorable replays them all the same";
    line(replayed.applied, help);
    line(replayed.expired, "left alone: the record had expired from its topic before the letter was written");
    for (topic, count) in &replayed.nowhere {
        line(*count, &format!("left alone: {topic}, or the partition, does not exist any more"));
    }
    line(replayed.foreign, "records on the dead-letter topic are no dead letters");
    if replayed.total() == 0 {
        text += if what.dry_run { "nothing would be replayed\n" } else { "nothing was replayed\n" };
    }
    if replayed.cut_short {
        text += "stopped before the end: call again for the rest\n";
    }
    text
}

/// A letter's place in `show`'s words.
fn position(text: &str) -> Result<(i32, i64), String> {
    let (partition, offset) = text.split_once(':').unwrap_or(("0", text));
    let parsed = partition.parse().ok().zip(offset.parse().ok()).filter(|(p, o): &(i32, i64)| *p >= 0 && *o >= 0);
    parsed.ok_or_else(|| {
        format!("'{text}' names no letter: write PARTITION:OFFSET as `driftline dead-letters list` does")
    })
}

fn name(letter: &Letter) -> String {
    format!("{}:{}", letter.partition, letter.offset)
}

/// The instant before which letters do not count, milliseconds.
fn since(text: &str, now_ms: i64) -> Result<i64, String> {
    if let Ok(back) = units::duration(text) {
        return Ok(now_ms.saturating_sub(i64::try_from(back.as_millis()).unwrap_or(i64::MAX)));
    }
    event_time::parse_iso(text).ok_or_else(|| {
        format!("--since: '{text}' is neither a duration, such as 2h, nor an instant, such as 2026-01-31T12:00:00Z")
    })
}

/// A time in a table, UTC.
fn time(ms: i64) -> String {
    if ms < 0 { "-".to_owned() } else { view::date(ms) }
}

/// A time by itself.
fn instant(ms: i64) -> String {
    if ms < 0 { "none".to_owned() } else { event_time::to_iso(ms) }
}

fn iso(ms: i64) -> Value {
    if ms < 0 { Value::Null } else { event_time::to_iso(ms).into() }
}

fn foreign(count: u64) -> String {
    match count {
        0 => String::new(),
        count => format!(" ({} other records on the topic are no dead letters)", view::count(count)),
    }
}

/// On one line, without what would steer a terminal: the texts come from records.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn short(text: &str) -> String {
    let text = printable(text);
    match text.char_indices().nth(ERROR) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

fn bytes_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => printable(text),
        Err(_) => bytes.iter().fold(String::from("0x"), |text, byte| text + &format!("{byte:02x}")),
    }
}

/// Bytes as debuggers show them: offset, sixteen bytes, the same as text.
fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (row, bytes) in bytes[..bytes.len().min(HEX)].chunks(16).enumerate() {
        let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let plain: String = bytes.iter().map(|b| if (0x20..0x7f).contains(b) { char::from(*b) } else { '.' }).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:08x}  {:<47}  {plain}", row * 16, digits.join(" "));
    }
    if bytes.len() > HEX {
        let _ = writeln!(text, "… {} more bytes; --json has them all", bytes.len() - HEX);
    }
    text
}

/// Sets `name` to the bytes as text, or `<name>_base64` where they are none.
fn put(object: &mut Value, name: &str, bytes: Option<&[u8]>) {
    match bytes.map(|bytes| std::str::from_utf8(bytes).map_err(|_| bytes)) {
        None => object[name] = Value::Null,
        Some(Ok(text)) => object[name] = text.into(),
        Some(Err(bytes)) => object[format!("{name}_base64")] = BASE64.encode(bytes).into(),
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Lines of aligned cells; those of `right` to the right.
fn table<const N: usize>(lines: &[[String; N]], right: &[usize]) -> Vec<String> {
    let widths: [usize; N] =
        std::array::from_fn(|cell| lines.iter().map(|line| line[cell].chars().count()).max().unwrap_or(0));
    let one = |line: &[String; N]| {
        let cells: Vec<String> = (0..N)
            .map(|cell| {
                let (text, width) = (&line[cell], widths[cell]);
                if right.contains(&cell) { format!("{text:>width$}") } else { format!("{text:<width$}") }
            })
            .collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    lines.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("17", Some((0, 17)))]
    #[case("2:0", Some((2, 0)))]
    #[case("", None)]
    #[case("-1", None)]
    #[case("a:1", None)]
    #[case("1:2:3", None)]
    #[case("4294967296:1", None)]
    fn letters_are_named_by_their_place(#[case] text: &str, #[case] expected: Option<(i32, i64)>) {
        assert_eq!(position(text).ok(), expected);
    }

    #[rstest::rstest]
    #[case("2h", Some(1_000_000_000_000 - 7_200_000))]
    #[case("2001-09-09", Some(999_993_600_000))]
    #[case("2001-09-09T01:46:40Z", Some(1_000_000_000_000))]
    #[case("yesterday", None)]
    fn since_is_a_duration_or_an_instant(#[case] text: &str, #[case] expected: Option<i64>) {
        assert_eq!(since(text, 1_000_000_000_000).ok(), expected);
    }

    #[test]
    fn bytes_are_shown_as_debuggers_do() {
        assert_eq!(
            hex(b"\x00Avro\xff and more bytes"),
            "00000000  00 41 76 72 6f ff 20 61 6e 64 20 6d 6f 72 65 20  .Avro. and more \n\
             00000010  62 79 74 65 73                                   bytes\n"
        );
        assert!(hex(&vec![0; HEX + 3]).ends_with("… 3 more bytes; --json has them all\n"));
    }

    #[test]
    fn texts_of_records_do_not_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a [2Jb c");
        assert_eq!(bytes_text(b"\xff\x00"), "0xff00");
        assert_eq!(short(&"é".repeat(ERROR + 1)).chars().count(), ERROR + 1);
    }
}
