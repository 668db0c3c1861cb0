//! From the wire format to columns: fields that the plan does not use are passed over.

use std::collections::HashMap;
use std::sync::Arc;

use super::descriptor::{Kind, Message};
use crate::config::plan::TimeUnit;
use crate::source::columns::{Field, RowBuilder};
use crate::source::fault::{RecordFault, reason};
use crate::source::json::misfit_text;

/// Groups within groups that are passed over, at most.
const DEEPEST: usize = 100;
/// Numbers in the path to a message that framing gives, at most.
const LONGEST_PATH: u64 = 64;

/// Bytes that are not what the descriptor says.
#[derive(Debug)]
struct Broken {
    at: usize,
    what: String,
}

/// Fills columns from Protobuf records.
#[derive(Debug)]
pub(crate) struct ProtobufDecoder {
    name: Arc<str>,
    indexes: Vec<i64>,
    fields: Vec<Field>,
    program: Program,
    progress: Progress,
}

/// What has been met in a record so far: a message that comes in several pieces is one message.
#[derive(Debug, Default)]
struct Progress {
    /// By node: some of it.
    entered: Vec<bool>,
    /// By column, of those that are messages on the wire: some of it.
    begun: Vec<bool>,
    /// By column: seconds and nanoseconds of an instant.
    instants: Vec<(i64, i64)>,
}

impl Progress {
    fn reset(&mut self, nodes: usize, columns: usize) {
        self.entered.clear();
        self.entered.resize(nodes, false);
        self.begun.clear();
        self.begun.resize(columns, false);
        self.instants.resize(columns, (0, 0));
    }
}

impl Progress {
    /// `google.protobuf.Timestamp`: seconds and nanoseconds, of which whole milliseconds count.
    fn instant(&mut self, rows: &mut RowBuilder, column: usize, reader: &mut Reader<'_>) -> Result<(), Broken> {
        if !std::mem::replace(&mut self.begun[column], true) {
            self.instants[column] = (0, 0);
        }
        let (seconds, nanos) = &mut self.instants[column];
        while let Some((number, wire)) = reader.tag()? {
            match (number, wire) {
                (1, VARINT) => *seconds = reader.varint()?.cast_signed(),
                (2, VARINT) => *nanos = i64::from(reader.varint()? as i32),
                _ => reader.skip(number, wire, 0)?,
            }
        }
        match seconds.checked_mul(1000).and_then(|ms| ms.checked_add(nanos.div_euclid(1_000_000))) {
            Some(ms) => rows.column(column).set_instant(ms, TimeUnit::Ms),
            None => rows
                .column(column)
                .set_misfit("an instant beyond 64-bit milliseconds", "is the producer's clock right?"),
        }
        Ok(())
    }

    /// One of `google/protobuf/wrappers.proto`: its zero, unless field 1 says otherwise.
    fn wrapper(
        &mut self,
        rows: &mut RowBuilder,
        column: usize,
        kind: &Kind,
        reader: &mut Reader<'_>,
    ) -> Result<(), Broken> {
        if !std::mem::replace(&mut self.begun[column], true) {
            zero(rows, column, kind);
        }
        while let Some((number, wire)) = reader.tag()? {
            match number {
                1 if wire == wire_of(kind) => set(rows, column, kind, reader)?,
                _ => reader.skip(number, wire, 0)?,
            }
        }
        Ok(())
    }
}

/// What to do with each field of each message that holds wanted ones. The first node is the record's.
#[derive(Debug, Default)]
struct Program {
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    /// By field number, ascending.
    slots: Vec<Slot>,
    /// Columns of fields that have a value even where they are absent.
    zeros: Vec<(usize, Kind)>,
}

#[derive(Debug)]
struct Slot {
    number: u32,
    name: Arc<str>,
    action: Action,
    /// Columns and nodes of the other members of its `oneof`, which it replaces.
    replaces: (Vec<usize>, Vec<usize>),
}

#[derive(Debug)]
enum Action {
    /// A value for a column.
    Set(usize, Kind),
    /// A message with wanted fields; true where it is written between two tags.
    Enter(usize, bool),
    /// Nobody wants it, but it replaces others.
    Skip,
}

/// A wanted field: the rest of its path, and its column.
type Wanted<'a> = (&'a str, usize);

impl ProtobufDecoder {
    /// Reads records as the message says.
    ///
    /// # Errors
    /// A field that the message does not have, or with another type: its name, and what is wrong.
    pub(crate) fn new(message: &Message, fields: Vec<Field>) -> Result<Self, (Arc<str>, String)> {
        for field in &fields {
            match message.fields().iter().find(|(name, _)| *name == *field.name) {
                Some(_) => {}
                None => {
                    let reason = message.unusable().iter().find(|(name, _)| *name == *field.name);
                    let reason = reason.map_or_else(
                        || format!("message '{}' has no such field", message.name),
                        |(_, reason)| format!("it {reason}"),
                    );
                    return Err((field.name.clone(), reason));
                }
            }
        }
        let mut program = Program::default();
        let wanted: Vec<Wanted<'_>> = fields.iter().enumerate().map(|(column, field)| (&*field.name, column)).collect();
        program.compile(message, message.root, &wanted);
        Ok(Self {
            name: message.name.as_str().into(),
            indexes: message.indexes.clone(),
            fields,
            program,
            progress: Progress::default(),
        })
    }

    /// Sets the row's fields from one record. The row has been started; the caller commits it if this succeeds.
    pub(crate) fn decode(&mut self, value: &[u8], rows: &mut RowBuilder) -> Result<(), RecordFault> {
        let mut reader = Reader { bytes: value, at: 0, end: value.len() };
        let broken = |Broken { at, what }: Broken| {
            RecordFault::malformed(format!("not Protobuf of message '{}': {what} at byte {at}", self.name))
        };
        if value.first() == Some(&0) {
            let path = reader.frame().map_err(broken)?;
            if path != self.indexes {
                return Err(RecordFault::new(
                    reason::INCOMPATIBLE_SCHEMA,
                    format!(
                        "the record's framing says message {path:?} of its schema's file, and '{}' is message {:?} of its own: \
                         another type of record on the same topic, or a file in another order",
                        self.name, self.indexes
                    ),
                ));
            }
        }
        self.progress.reset(self.program.nodes.len(), self.fields.len());
        self.program.run(0, &mut reader, None, &mut self.progress, rows).map_err(broken)?;
        match rows.misfit() {
            None => Ok(()),
            Some((column, misfit)) => {
                let text = misfit_text(&self.fields[column], misfit, misfit.at);
                Err(RecordFault::new(reason::WRONG_TYPE, text))
            }
        }
    }
}

impl Program {
    /// Index of the node of a message type of which these fields are wanted. The paths end, so recursion does.
    fn compile(&mut self, message: &Message, of: usize, wanted: &[Wanted<'_>]) -> usize {
        let index = self.nodes.len();
        self.nodes.push(Node::default());
        let mut node = Node::default();
        // Columns and nodes below each field, for those that share a oneof.
        let mut below: HashMap<u32, (Vec<usize>, Vec<usize>)> = HashMap::new();
        let fields = &message.types[of].fields;
        for field in fields {
            let exactly = wanted.iter().find(|(path, _)| *path == &*field.name);
            let within: Vec<Wanted<'_>> = wanted
                .iter()
                .filter_map(|(path, column)| Some((path.strip_prefix(&*field.name)?.strip_prefix('.')?, *column)))
                .collect();
            let action = match (&field.kind, exactly) {
                (Kind::Message(inner, delimited), _) if !within.is_empty() => {
                    let first = self.nodes.len();
                    let inner = self.compile(message, *inner, &within);
                    let columns = within.iter().map(|(_, column)| *column).collect();
                    below.insert(field.number, (columns, (first..self.nodes.len()).collect()));
                    Action::Enter(inner, *delimited)
                }
                (Kind::Message(..) | Kind::Other(_), _) | (_, None) => Action::Skip,
                (kind, Some((_, column))) => {
                    below.insert(field.number, (vec![*column], Vec::new()));
                    if !field.tracks_presence {
                        node.zeros.push((*column, kind.clone()));
                    }
                    Action::Set(*column, kind.clone())
                }
            };
            if !matches!(action, Action::Skip) || field.oneof.is_some() {
                let (number, name) = (field.number, field.name.clone());
                node.slots.push(Slot { number, name, action, replaces: Default::default() });
            }
        }
        let oneof_of = |number| fields.iter().find(|f| f.number == number).and_then(|f| f.oneof);
        for slot in &mut node.slots {
            let Some(own) = oneof_of(slot.number) else { continue };
            for (_, (columns, nodes)) in below.iter().filter(|(n, _)| **n != slot.number && oneof_of(**n) == Some(own))
            {
                slot.replaces.0.extend(columns);
                slot.replaces.1.extend(nodes);
            }
        }
        node.slots.retain(|slot| !matches!(slot.action, Action::Skip) || !slot.replaces.0.is_empty());
        self.nodes[index] = node;
        index
    }

    /// Reads a message up to the reader's end, or to the end of the group with this number.
    fn run(
        &self,
        node: usize,
        reader: &mut Reader<'_>,
        group: Option<u32>,
        progress: &mut Progress,
        rows: &mut RowBuilder,
    ) -> Result<(), Broken> {
        let Node { slots, zeros } = &self.nodes[node];
        if !std::mem::replace(&mut progress.entered[node], true) {
            for (column, kind) in zeros {
                zero(rows, *column, kind);
            }
        }
        // Writers write fields in the order of their numbers.
        let mut expected = 0;
        while let Some((number, wire)) = reader.tag()? {
            if wire == END {
                return if group == Some(number) {
                    Ok(())
                } else {
                    Err(reader.broken("a group ends that is not open"))
                };
            }
            let found = match slots.get(expected) {
                Some(slot) if slot.number == number => Some(expected),
                _ => slots.binary_search_by_key(&number, |slot| slot.number).ok(),
            };
            let Some(found) = found else {
                reader.skip(number, wire, 0)?;
                continue;
            };
            expected = found + 1;
            let slot = &slots[found];
            for column in &slot.replaces.0 {
                rows.column(*column).set_null();
                progress.begun[*column] = false;
            }
            slot.replaces.1.iter().for_each(|node| progress.entered[*node] = false);
            match &slot.action {
                Action::Skip => reader.skip(number, wire, 0)?,
                Action::Set(column, kind) => {
                    let at = reader.at;
                    reader.check(slot, wire, wire_of(kind))?;
                    match kind {
                        Kind::Instant => progress.instant(rows, *column, &mut reader.inside()?)?,
                        Kind::Wrapper(inner) => progress.wrapper(rows, *column, inner, &mut reader.inside()?)?,
                        kind => set(rows, *column, kind, reader)?,
                    }
                    rows.column(*column).note_position(at);
                }
                Action::Enter(inner, delimited) => {
                    reader.check(slot, wire, if *delimited { START } else { LENGTH })?;
                    if *delimited {
                        self.run(*inner, reader, Some(number), progress, rows)?;
                    } else {
                        let mut inside = reader.inside()?;
                        self.run(*inner, &mut inside, None, progress, rows)?;
                    }
                }
            }
        }
        match group {
            None => Ok(()),
            Some(_) => Err(reader.broken("the record is cut short")),
        }
    }
}

const VARINT: u8 = 0;
const EIGHT: u8 = 1;
const LENGTH: u8 = 2;
const START: u8 = 3;
const END: u8 = 4;
const FOUR: u8 = 5;

fn wire_of(kind: &Kind) -> u8 {
    match kind {
        Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => EIGHT,
        Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => FOUR,
        Kind::Int | Kind::Uint64 | Kind::Uint32 | Kind::Zigzag | Kind::Bool | Kind::Enum(_) => VARINT,
        Kind::Text | Kind::Instant | Kind::Wrapper(_) | Kind::Message(..) | Kind::Other(_) => LENGTH,
    }
}

/// Sets a column to its type's zero.
fn zero(rows: &mut RowBuilder, column: usize, kind: &Kind) {
    let column = rows.column(column);
    match kind {
        Kind::Double | Kind::Float => column.set_float(0.0),
        Kind::Bool => column.set_boolean(false),
        Kind::Text => column.set_text(""),
        Kind::Enum(names) => match names.get(&0) {
            Some(name) => column.set_text(name),
            None => column.set_text("0"),
        },
        Kind::Wrapper(_) | Kind::Instant | Kind::Message(..) | Kind::Other(_) => column.set_null(),
        _ => column.set_integer(0),
    }
}

/// Reads a value into its column. Its wire type has been checked.
fn set(rows: &mut RowBuilder, column: usize, kind: &Kind, reader: &mut Reader<'_>) -> Result<(), Broken> {
    match kind {
        Kind::Double => rows.column(column).set_float(f64::from_le_bytes(reader.array()?)),
        Kind::Float => rows.column(column).set_float(f64::from(f32::from_le_bytes(reader.array()?))),
        // Negative numbers of 32 bits are written with 64.
        Kind::Int => rows.column(column).set_integer(reader.varint()?.cast_signed()),
        Kind::Uint64 => rows.column(column).set_unsigned(reader.varint()?),
        Kind::Uint32 => rows.column(column).set_integer(i64::from(reader.varint()? as u32)),
        Kind::Zigzag => rows.column(column).set_integer(zigzag(reader.varint()?)),
        Kind::Fixed32 => rows.column(column).set_integer(u32::from_le_bytes(reader.array()?).into()),
        Kind::Sfixed32 => rows.column(column).set_integer(i32::from_le_bytes(reader.array()?).into()),
        Kind::Fixed64 => rows.column(column).set_unsigned(u64::from_le_bytes(reader.array()?)),
        Kind::Sfixed64 => rows.column(column).set_integer(i64::from_le_bytes(reader.array()?)),
        Kind::Bool => rows.column(column).set_boolean(reader.varint()? != 0),
        Kind::Text => {
            let inside = reader.inside()?;
            let text = std::str::from_utf8(&inside.bytes[inside.at..inside.end]);
            rows.column(column).set_text(text.map_err(|_| inside.broken("a string is not UTF-8"))?);
        }
        Kind::Enum(names) => {
            // Open enums may hold numbers that this descriptor does not name yet.
            let number = reader.varint()? as i32;
            match names.get(&number) {
                Some(name) => rows.column(column).set_text(name),
                None => rows.column(column).set_text(&number.to_string()),
            }
        }
        Kind::Instant | Kind::Wrapper(_) | Kind::Message(..) | Kind::Other(_) => {
            unreachable!("messages are read by those who know what came before")
        }
    }
    Ok(())
}

fn zigzag(bits: u64) -> i64 {
    (bits >> 1).cast_signed() ^ -(bits & 1).cast_signed()
}

/// A part of a record.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Reader<'a> {
    #[cold]
    fn broken(&self, what: &str) -> Broken {
        Broken { at: self.at, what: what.to_owned() }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Broken> {
        let found =
            self.bytes[self.at..self.end].first_chunk().ok_or_else(|| self.broken("the record is cut short"))?;
        self.at += N;
        Ok(*found)
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, Broken> {
        let mut bits = 0_u64;
        for (index, byte) in self.bytes[self.at..self.end].iter().enumerate().take(10) {
            bits |= u64::from(byte & 0x7f).wrapping_shl(7 * index as u32);
            if byte & 0x80 == 0 {
                self.at += index + 1;
                return Ok(bits);
            }
        }
        let cut = self.end - self.at < 10;
        Err(self.broken(if cut { "the record is cut short" } else { "a number has more than 64 bits" }))
    }

    /// Number and wire type of the next field; `None` at the end.
    #[inline]
    fn tag(&mut self) -> Result<Option<(u32, u8)>, Broken> {
        if self.at == self.end {
            return Ok(None);
        }
        let tag = self.varint()?;
        match u32::try_from(tag >> 3) {
            Ok(number @ 1..=0x1fff_ffff) => Ok(Some((number, (tag & 7) as u8))),
            _ => Err(self.broken("a field's number is out of range")),
        }
    }

    /// The bytes of a value with a length, which this reader passes over.
    fn inside(&mut self) -> Result<Reader<'a>, Broken> {
        let length = self.varint()?;
        let end = usize::try_from(length).ok().and_then(|length| self.at.checked_add(length));
        let end = end.filter(|end| *end <= self.end).ok_or_else(|| self.broken("the record is cut short"))?;
        let inside = Reader { bytes: self.bytes, at: self.at, end };
        self.at = end;
        Ok(inside)
    }

    fn skip(&mut self, number: u32, wire: u8, depth: usize) -> Result<(), Broken> {
        match wire {
            VARINT => drop(self.varint()?),
            EIGHT => drop(self.array::<8>()?),
            FOUR => drop(self.array::<4>()?),
            LENGTH => {
                self.inside()?;
            }
            START if depth == DEEPEST => return Err(self.broken("groups are nested more than 100 deep")),
            START => loop {
                match self.tag()? {
                    Some((end, END)) if end == number => break,
                    Some((_, END)) => return Err(self.broken("a group ends that is not open")),
                    Some((inner, wire)) => self.skip(inner, wire, depth + 1)?,
                    None => return Err(self.broken("the record is cut short")),
                }
            },
            _ => return Err(self.broken("a field has a wire type that Protobuf does not have")),
        }
        Ok(())
    }

    fn check(&self, slot: &Slot, found: u8, expected: u8) -> Result<(), Broken> {
        if found == expected {
            return Ok(());
        }
        let what = format!(
            "field {} ('{}') has wire type {found} where the descriptor's type has {expected}: is it the producer's schema?",
            slot.number, slot.name
        );
        Err(Broken { at: self.at, what })
    }

    /// Confluent's framing: a zero, an id, and the path to the message, which is returned.
    fn frame(&mut self) -> Result<Vec<i64>, Broken> {
        self.array::<5>()?;
        match zigzag(self.varint()?) {
            0 => Ok(vec![0]),
            count if (1..=LONGEST_PATH.cast_signed()).contains(&count) => {
                (0..count).map(|_| Ok(zigzag(self.varint()?))).collect()
            }
            _ => Err(self.broken("the path to the message in the record's framing is out of range")),
        }
    }
}
