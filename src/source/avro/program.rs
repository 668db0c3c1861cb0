//! Reading one writer schema into columns: schema resolution is done once, and what is left is a list of steps.
//!
//! A decoder that resolves by itself, instead of arrow-avro's, because a record that breaks off in its middle must leave no
//! trace: arrow-avro's row decoder appends to its columns as it reads, so that one truncated record shifts them against
//! one another.
//!
//! Resolution follows the Avro specification for the fields that the plan uses: by name or by an alias of the reader's field,
//! the reader's default where the writer has no such field, promotion of numbers and between text and bytes, enum
//! defaults. It is more lenient where nothing can go wrong: a double is read as an int64 where it is a whole number, and
//! fields that the plan does not use may differ as they like.

use std::sync::Arc;

use serde_json::Value;

use super::cursor::{Broken, Cursor};
use super::schema::{AvroSchema, Kind, Logical, RecordField, TypeId, describe};
use crate::config::plan::{DataType, TimeUnit};
use crate::source::columns::{ColumnBuilder, Field, RowBuilder};

/// Records and unions of recursive schemas may nest this deep.
pub(super) const DEEPEST: usize = 128;

/// Names at one level of nesting that the plan uses.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    /// The full path, for messages.
    path: Arc<str>,
    column: Option<usize>,
    nested: Wanted,
}

impl Wanted {
    pub(crate) fn new(fields: &[Field]) -> Self {
        let mut wanted = Self::default();
        for (column, field) in fields.iter().enumerate() {
            wanted.insert(&field.name, &field.name, column);
        }
        wanted
    }

    fn insert(&mut self, rest: &str, path: &Arc<str>, column: usize) {
        let (head, below) = rest.split_once('.').map_or((rest, None), |(head, below)| (head, Some(below)));
        let index = self.entries.iter().position(|entry| entry.name == head).unwrap_or_else(|| {
            let entry = Entry { name: head.to_owned(), path: path.clone(), column: None, nested: Self::default() };
            self.entries.push(entry);
            self.entries.len() - 1
        });
        match below {
            None => self.entries[index].column = Some(column),
            Some(below) => self.entries[index].nested.insert(below, path, column),
        }
    }
}

/// Why a writer's schema cannot be read as the pipeline's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Incompatible {
    /// The plan's field.
    pub field: Arc<str>,
    /// What is wrong.
    pub reason: String,
}

/// Reads records of one writer schema.
#[derive(Debug)]
pub(crate) struct Program {
    writer: AvroSchema,
    root: Step,
    /// Values of columns that the writer does not have.
    defaults: Vec<(usize, Constant)>,
    /// By type: true where a value takes no bytes at all.
    empty: Vec<bool>,
}

#[derive(Debug)]
enum Step {
    /// Passes over a value of the writer.
    Skip(TypeId),
    /// Reads a value into a column.
    Take {
        column: usize,
        take: Take,
    },
    /// A value that the column cannot hold: one branch of a union whose other branches it can.
    Misfit {
        column: usize,
        of: TypeId,
        found: String,
    },
    Record(Vec<Step>),
    Union(Vec<Step>),
}

#[derive(Debug)]
enum Take {
    Boolean,
    Int,
    Long,
    Date,
    Instant(TimeUnit),
    Float,
    Double,
    Text,
    Decimal {
        scale: u32,
        size: Option<usize>,
    },
    /// By the writer's index: the symbol, or none where the reader does not know it.
    Enum(Vec<Result<Arc<str>, Arc<str>>>),
}

#[derive(Debug, Clone)]
enum Constant {
    Boolean(bool),
    Integer(i64),
    Instant(i64, TimeUnit),
    Float(f64),
    Text(Arc<str>),
}

impl Program {
    /// Resolves `writer` against `reader` for the plan's fields.
    pub(crate) fn compile(
        writer: &AvroSchema,
        reader: &AvroSchema,
        fields: &[Field],
        wanted: &Wanted,
    ) -> Result<Self, Incompatible> {
        let mut compiler = Compiler { writer, reader, fields, defaults: Vec::new() };
        let root = match &writer.get(writer.root()).kind {
            Kind::Record { fields, .. } => compiler.record(fields, reader.root(), wanted)?,
            _ => {
                let found = describe(writer, writer.root());
                return Err(Incompatible {
                    field: wanted.entries.first().map_or_else(|| "".into(), |entry| entry.path.clone()),
                    reason: format!("the schema is of type {found}, and only a record has fields"),
                });
            }
        };
        let defaults = compiler.defaults;
        Ok(Self { writer: writer.clone(), root, defaults, empty: empty_types(writer) })
    }

    /// Sets the row's fields from `bytes`, which must be one whole record and no more.
    pub(crate) fn run(&self, bytes: &[u8], rows: &mut RowBuilder) -> Result<(), Broken> {
        for (column, constant) in &self.defaults {
            constant.set(rows.column(*column));
        }
        let mut cursor = Cursor::new(bytes);
        self.step(&self.root, &mut cursor, rows)?;
        match cursor.remaining() {
            0 => Ok(()),
            _ => Err(cursor.broken("the record ends, but more bytes follow")),
        }
    }

    #[inline]
    fn step(&self, step: &Step, cursor: &mut Cursor<'_>, rows: &mut RowBuilder) -> Result<(), Broken> {
        match step {
            Step::Take { column, take } => {
                let (at, column) = (cursor.position(), rows.column(*column));
                take.run(cursor, column)?;
                column.note_position(at);
                Ok(())
            }
            Step::Skip(of) => self.skip(*of, cursor, 0),
            Step::Record(steps) => steps.iter().try_for_each(|step| self.step(step, cursor, rows)),
            Step::Union(branches) => {
                let branch = cursor.index(branches.len(), "the union has no such branch")?;
                self.step(&branches[branch], cursor, rows)
            }
            Step::Misfit { column, of, found } => {
                rows.column(*column).set_misfit(found, "");
                rows.column(*column).note_position(cursor.position());
                self.skip(*of, cursor, 0)
            }
        }
    }

    fn skip(&self, of: TypeId, cursor: &mut Cursor<'_>, depth: usize) -> Result<(), Broken> {
        if depth > DEEPEST {
            return Err(cursor.broken("records are nested more than 128 levels deep"));
        }
        match &self.writer.get(of).kind {
            Kind::Null => Ok(()),
            Kind::Boolean => cursor.boolean().map(drop),
            Kind::Int => cursor.int().map(drop),
            Kind::Long => cursor.long().map(drop),
            Kind::Float => cursor.take(4).map(drop),
            Kind::Double => cursor.take(8).map(drop),
            Kind::Bytes | Kind::Text => cursor.bytes().map(drop),
            Kind::Fixed { size, .. } => cursor.take(*size).map(drop),
            Kind::Enum { symbols, .. } => cursor.index(symbols.len(), "the enum has no such symbol").map(drop),
            Kind::Union(branches) => {
                let branch = cursor.index(branches.len(), "the union has no such branch")?;
                self.skip(branches[branch], cursor, depth + 1)
            }
            Kind::Record { fields, .. } => fields.iter().try_for_each(|field| self.skip(field.of, cursor, depth + 1)),
            Kind::Array(item) => {
                self.skip_blocks(cursor, self.empty[*item], |cursor| self.skip(*item, cursor, depth + 1))
            }
            Kind::Map(item) => self.skip_blocks(cursor, false, |cursor| {
                cursor.bytes()?;
                self.skip(*item, cursor, depth + 1)
            }),
        }
    }

    /// Passes over the blocks of an array or a map. Items that take no bytes are not counted out: a few bytes could ask for
    /// 2^63 of them.
    fn skip_blocks<'a>(
        &self,
        cursor: &mut Cursor<'a>,
        empty: bool,
        mut item: impl FnMut(&mut Cursor<'a>) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        loop {
            match cursor.long()? {
                0 => return Ok(()),
                count if count < 0 => {
                    // A negative count is followed by the block's size in bytes. Going by it alone would take what follows
                    // a damaged one for something else.
                    let size = cursor.long()?;
                    let size = usize::try_from(size).map_err(|_| cursor.broken("a block has a negative size"))?;
                    let end = cursor.position().checked_add(size);
                    if !empty {
                        (0..count.unsigned_abs()).try_for_each(|_| item(cursor))?;
                    }
                    if end != Some(cursor.position()) {
                        return Err(cursor.broken("a block is not as long as it says"));
                    }
                }
                _ if empty => {}
                count => (0..count).try_for_each(|_| item(cursor))?,
            }
        }
    }
}

impl Take {
    #[inline]
    fn run(&self, cursor: &mut Cursor<'_>, column: &mut ColumnBuilder) -> Result<(), Broken> {
        match self {
            Self::Boolean => column.set_boolean(cursor.boolean()?),
            Self::Int => column.set_integer(i64::from(cursor.int()?)),
            Self::Long => column.set_integer(cursor.long()?),
            Self::Date => {
                let days = i64::from(cursor.int()?);
                if column.field().data_type == DataType::Timestamp {
                    column.set_instant(days * 86_400_000, TimeUnit::Ms);
                } else {
                    column.set_integer(days);
                }
            }
            Self::Instant(unit) => column.set_instant(cursor.long()?, *unit),
            Self::Float => column.set_float(f64::from(f32::from_le_bytes(cursor.array()?))),
            Self::Double => column.set_float(f64::from_le_bytes(cursor.array()?)),
            Self::Text => {
                let at = cursor.position();
                let bytes = cursor.bytes()?;
                match std::str::from_utf8(bytes) {
                    Ok(text) => column.set_text(text),
                    Err(_) => return Err(Broken { at, what: "a text is not UTF-8" }),
                }
            }
            Self::Decimal { scale, size } => {
                let bytes = match size {
                    Some(size) => cursor.take(*size)?,
                    None => cursor.bytes()?,
                };
                match unscaled(bytes) {
                    Some(unscaled) => column.set_float(decimal(unscaled, *scale)),
                    None => column.set_misfit("a decimal of more than 128 bits", ""),
                }
            }
            Self::Enum(symbols) => match &symbols[cursor.index(symbols.len(), "the enum has no such symbol")?] {
                Ok(symbol) => column.set_text(symbol),
                Err(unknown) => column.set_misfit(
                    &format!("symbol {unknown:?}"),
                    "the pipeline's enum has neither this symbol nor a default: add it to the schema",
                ),
            },
        }
        Ok(())
    }
}

impl Constant {
    fn set(&self, column: &mut ColumnBuilder) {
        match self {
            Self::Boolean(value) => column.set_boolean(*value),
            Self::Integer(value) => column.set_integer(*value),
            Self::Instant(value, unit) => column.set_instant(*value, *unit),
            Self::Float(value) => column.set_float(*value),
            Self::Text(value) => column.set_text(value),
        }
    }
}

/// The two's-complement big-endian integer, where 128 bits hold it.
fn unscaled(bytes: &[u8]) -> Option<i128> {
    let negative = bytes.first().is_some_and(|first| first & 0x80 != 0);
    let fill = if negative { 0xff } else { 0 };
    let extra = bytes.len().saturating_sub(16);
    let (padding, digits) = bytes.split_at(extra);
    let sign_kept = digits.first().is_none_or(|first| (first & 0x80 != 0) == negative);
    if padding.iter().any(|byte| *byte != fill) || !sign_kept {
        return None;
    }
    let mut whole = [fill; 16];
    whole[16 - digits.len()..].copy_from_slice(digits);
    Some(i128::from_be_bytes(whole))
}

/// `unscaled / 10^scale`, correctly rounded.
fn decimal(unscaled: i128, scale: u32) -> f64 {
    // Both operands are exact here, so that IEEE division rounds once.
    if unscaled.unsigned_abs() < 1 << 53 && scale <= 22 {
        return unscaled as f64 / 10f64.powi(scale as i32);
    }
    format!("{unscaled}e-{scale}").parse().expect("digits, e and an exponent are a float")
}

fn empty_types(schema: &AvroSchema) -> Vec<bool> {
    // A record is empty until a field shows otherwise; that spreads through the records that hold it.
    let mut empty: Vec<bool> = (0..schema.len())
        .map(|id| match &schema.get(id).kind {
            Kind::Null | Kind::Record { .. } => true,
            Kind::Fixed { size, .. } => *size == 0,
            _ => false,
        })
        .collect();
    loop {
        let mut changed = false;
        for id in 0..schema.len() {
            if let Kind::Record { fields, .. } = &schema.get(id).kind
                && empty[id]
                && fields.iter().any(|field| !empty[field.of])
            {
                empty[id] = false;
                changed = true;
            }
        }
        if !changed {
            return empty;
        }
    }
}

struct Compiler<'a> {
    writer: &'a AvroSchema,
    reader: &'a AvroSchema,
    fields: &'a [Field],
    defaults: Vec<(usize, Constant)>,
}

impl Compiler<'_> {
    /// `reader` is the reader's record, or a union that holds it.
    fn record(&mut self, writer: &[RecordField], reader: TypeId, wanted: &Wanted) -> Result<Step, Incompatible> {
        let mut by_writer: Vec<Option<(&Entry, TypeId)>> = vec![None; writer.len()];
        for entry in &wanted.entries {
            let known =
                reader_fields(self.reader, reader).and_then(|fields| fields.iter().find(|f| *f.name == *entry.name));
            let Some(known) = known else {
                return Err(entry.incompatible("the pipeline's schema has no such field"));
            };
            let at = writer
                .iter()
                .position(|field| field.name == known.name)
                .or_else(|| writer.iter().position(|field| known.aliases.iter().any(|alias| **alias == *field.name)));
            match (at, &known.default) {
                (Some(at), _) => by_writer[at] = Some((entry, known.of)),
                (None, Some(default)) => self.default(entry, known.of, default)?,
                (None, None) => {
                    return Err(entry.incompatible(
                        "the writer does not have it, and the pipeline's schema gives no default for it: add one",
                    ));
                }
            }
        }
        let steps = writer.iter().zip(by_writer).map(|(field, target)| match target {
            Some((entry, reader)) => self.value(field.of, reader, entry),
            None => Ok(Step::Skip(field.of)),
        });
        Ok(Step::Record(steps.collect::<Result<_, _>>()?))
    }

    fn value(&mut self, writer: TypeId, reader: TypeId, entry: &Entry) -> Result<Step, Incompatible> {
        let (schema, this) = (self.writer, self.writer.get(writer));
        match &this.kind {
            Kind::Null => Ok(Step::Skip(writer)),
            Kind::Union(branches) => {
                let mut steps = Vec::with_capacity(branches.len());
                let mut fault = None;
                let mut usable = false;
                for &branch in branches {
                    let is_null = matches!(schema.get(branch).kind, Kind::Null);
                    match (self.value(branch, reader, entry), entry.column) {
                        (Ok(step), _) => {
                            usable |= !is_null;
                            steps.push(step);
                        }
                        (Err(error), Some(column)) => {
                            let found = format!("a value of type {}", describe(schema, branch));
                            steps.push(Step::Misfit { column, of: branch, found });
                            fault.get_or_insert(error);
                        }
                        (Err(error), None) => return Err(error),
                    }
                }
                match fault {
                    Some(fault) if !usable => Err(fault),
                    _ => Ok(Step::Union(steps)),
                }
            }
            Kind::Record { fields, .. } if entry.column.is_none() => self.record(fields, reader, &entry.nested),
            kind => {
                let Some(column) = entry.column.filter(|_| entry.nested.entries.is_empty()) else {
                    let found = describe(schema, writer);
                    return Err(entry.incompatible(format!("it lies within a {found}, and only records have fields")));
                };
                let expected = self.fields[column].data_type;
                let take = self.take(kind, this.logical, reader);
                match take.filter(|take| take.fits(&self.fields[column])) {
                    Some(take) => Ok(Step::Take { column, take }),
                    None => Err(entry.incompatible(format!(
                        "expected {}, but the writer's type is {}",
                        expected,
                        describe(schema, writer)
                    ))),
                }
            }
        }
    }

    /// How to read a scalar of the writer; `None` for what is not one.
    fn take(&self, kind: &Kind, logical: Option<Logical>, reader: TypeId) -> Option<Take> {
        // A plain long of the writer means what the reader's logical type says.
        let logical = logical.or_else(|| scalar_logical(self.reader, reader));
        Some(match (kind, logical) {
            (Kind::Int, Some(Logical::Date)) => Take::Date,
            (Kind::Long, Some(Logical::Instant(unit))) => Take::Instant(unit),
            (Kind::Bytes, Some(Logical::Decimal { scale })) => Take::Decimal { scale, size: None },
            (Kind::Fixed { size, .. }, Some(Logical::Decimal { scale })) => Take::Decimal { scale, size: Some(*size) },
            (Kind::Boolean, _) => Take::Boolean,
            (Kind::Int, _) => Take::Int,
            (Kind::Long, _) => Take::Long,
            (Kind::Float, _) => Take::Float,
            (Kind::Double, _) => Take::Double,
            (Kind::Text | Kind::Bytes, _) => Take::Text,
            (Kind::Enum { symbols, .. }, _) => {
                let reader = reader_enum(self.reader, reader);
                let resolve = |symbol: &Arc<str>| match reader {
                    // The reader takes any text.
                    None => Ok(symbol.clone()),
                    Some(Symbols { known, .. }) if known.contains(symbol) => Ok(symbol.clone()),
                    Some(Symbols { default: Some(default), .. }) => Ok(default.clone()),
                    Some(Symbols { default: None, .. }) => Err(symbol.clone()),
                };
                Take::Enum(symbols.iter().map(resolve).collect())
            }
            _ => return None,
        })
    }

    /// Sets the columns at or below `entry` to the reader's default.
    fn default(&mut self, entry: &Entry, reader: TypeId, default: &Value) -> Result<(), Incompatible> {
        if let Some(column) = entry.column {
            let constant = match default {
                Value::Null => return Ok(()),
                Value::Bool(value) => Some(Constant::Boolean(*value)),
                Value::String(text) => Some(Constant::Text(text.as_str().into())),
                Value::Number(number) => match (number.as_i64(), scalar_logical(self.reader, reader)) {
                    (Some(value), Some(Logical::Instant(unit))) => Some(Constant::Instant(value, unit)),
                    (Some(value), Some(Logical::Date)) => {
                        Some(Constant::Instant(value.saturating_mul(86_400_000), TimeUnit::Ms))
                    }
                    (Some(value), _) => Some(Constant::Integer(value)),
                    (None, _) => number.as_f64().map(Constant::Float),
                },
                _ => None,
            };
            let constant =
                constant.ok_or_else(|| entry.incompatible(format!("its default {default} is not a scalar")))?;
            self.defaults.push((column, constant));
        }
        for below in &entry.nested.entries {
            match default {
                Value::Null => {}
                Value::Object(values) => {
                    let field = reader_fields(self.reader, reader)
                        .and_then(|fields| fields.iter().find(|field| *field.name == *below.name))
                        .ok_or_else(|| below.incompatible("the pipeline's schema has no such field"))?;
                    let value = values.get(&below.name).or(field.default.as_ref()).cloned().unwrap_or(Value::Null);
                    self.default(below, field.of, &value)?;
                }
                other => return Err(below.incompatible(format!("the default {other} of its record is not an object"))),
            }
        }
        Ok(())
    }
}

impl Entry {
    fn incompatible(&self, reason: impl Into<String>) -> Incompatible {
        Incompatible { field: self.path.clone(), reason: reason.into() }
    }
}

impl Take {
    fn fits(&self, field: &Field) -> bool {
        match (self, field.data_type) {
            (Self::Boolean, DataType::Boolean) => true,
            (Self::Boolean, DataType::Float64) => field.takes_booleans,
            (
                Self::Int | Self::Long | Self::Float | Self::Double,
                DataType::Int64 | DataType::Float64 | DataType::Timestamp,
            ) => true,
            (Self::Date | Self::Instant(_), DataType::Timestamp | DataType::Int64 | DataType::Float64) => true,
            (Self::Decimal { .. }, DataType::Float64 | DataType::Int64) => true,
            (Self::Text | Self::Enum(_), DataType::String) => true,
            (Self::Text, DataType::Timestamp) => matches!(field.unit, None | Some(TimeUnit::Iso)),
            _ => false,
        }
    }
}

/// Fields of the record `id`, or of the first record in the union `id`.
fn reader_fields(schema: &AvroSchema, id: TypeId) -> Option<&[RecordField]> {
    match &schema.get(id).kind {
        Kind::Record { fields, .. } => Some(fields),
        Kind::Union(branches) => branches.iter().find_map(|branch| reader_fields(schema, *branch)),
        _ => None,
    }
}

/// What a reader's enum knows.
#[derive(Clone, Copy)]
struct Symbols<'a> {
    known: &'a [Arc<str>],
    default: Option<&'a Arc<str>>,
}

/// The enum `id`, or the enum in the union `id` where that does not take any text.
fn reader_enum(schema: &AvroSchema, id: TypeId) -> Option<Symbols<'_>> {
    match &schema.get(id).kind {
        Kind::Enum { symbols, default, .. } => Some(Symbols { known: symbols, default: default.as_ref() }),
        Kind::Union(branches) => {
            let takes_text = branches.iter().any(|branch| matches!(schema.get(*branch).kind, Kind::Text));
            branches.iter().find_map(|branch| reader_enum(schema, *branch)).filter(|_| !takes_text)
        }
        _ => None,
    }
}

fn scalar_logical(schema: &AvroSchema, id: TypeId) -> Option<Logical> {
    match &schema.get(id).kind {
        Kind::Union(branches) => branches.iter().find_map(|branch| schema.get(*branch).logical),
        _ => schema.get(id).logical,
    }
}
