//! Files of events, read row by row in bounded memory: JSON lines, CSV, Parquet, Avro container files, Arrow IPC files.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::error::ArrowError;
use serde_json::{Map, Value};

use super::cell::cell;
use crate::runtime::guard::guarded;

/// Longest line of a text file.
const LONGEST_LINE: u64 = 64 << 20;
/// Rows of a columnar file in memory at once.
const BATCH: usize = 1024;

/// Format of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFormat {
    /// One JSON object a line.
    JsonLines,
    /// Comma-separated values with a header row; tabs and semicolons are recognised.
    Csv,
    /// Apache Parquet.
    Parquet,
    /// Avro object container file.
    Avro,
    /// Arrow IPC file.
    Arrow,
}

impl FileFormat {
    /// The format that a file's name tells.
    pub fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        Some(match extension.as_str() {
            "jsonl" | "ndjson" | "json" => Self::JsonLines,
            "csv" | "tsv" => Self::Csv,
            "parquet" => Self::Parquet,
            "avro" => Self::Avro,
            "arrow" | "feather" => Self::Arrow,
            _ => return None,
        })
    }
}

impl std::str::FromStr for FileFormat {
    type Err = String;

    /// Reads `jsonl`, `csv`, `parquet`, `avro` or `arrow`.
    fn from_str(text: &str) -> Result<Self, String> {
        Self::of(Path::new(&format!("f.{text}")))
            .ok_or_else(|| format!("'{text}' is no file format: jsonl, csv, parquet, avro and arrow are"))
    }
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", file.display())]
pub struct FileError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong, and what to do.
    pub reason: String,
}

/// One row of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplayRow {
    /// Line where it starts, from 1, in a text file; number of the row, from 1, in others.
    pub number: u64,
    /// Values by column. Texts of a CSV file are not interpreted, and empty ones are null.
    pub values: Map<String, Value>,
}

/// A row that could not be read; those after it can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{noun} {number}: {reason}")]
pub struct RowError {
    /// `line` or `row`.
    pub noun: &'static str,
    /// Line or row, from 1.
    pub number: u64,
    /// What is wrong.
    pub reason: String,
}

/// What comes next in a file.
#[derive(Debug)]
pub enum Next {
    /// A row.
    Row(ReplayRow),
    /// A row that could not be read.
    Bad(RowError),
}

/// An open file: an iterator over its rows. After an error there are no more.
pub struct ReplayFile {
    path: PathBuf,
    rows: Rows,
    noun: &'static str,
    failed: bool,
}

enum Rows {
    Lines { reader: BufReader<File>, line: u64 },
    Csv { reader: Box<csv::Reader<File>>, names: Vec<String>, record: csv::StringRecord },
    Columns { batches: Batches, current: Option<RecordBatch>, at: usize, number: u64 },
}

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>;

impl ReplayFile {
    /// Opens a file. Its name tells the format, unless one is given.
    ///
    /// # Errors
    /// The file is not there, its format cannot be told, or it is not of that format.
    pub fn open(path: &Path, format: Option<FileFormat>) -> Result<Self, FileError> {
        let fault = |reason: String| FileError { file: path.to_owned(), reason };
        let format = format.or_else(|| FileFormat::of(path)).ok_or_else(|| {
            fault("its name does not tell its format: give one of jsonl, csv, parquet, avro, arrow".into())
        })?;
        let file = File::open(path).map_err(|error| fault(error.to_string()))?;
        let columns = |batches: Batches| Rows::Columns { batches, current: None, at: 0, number: 0 };
        let open = || match format {
            FileFormat::JsonLines => {
                Ok(("line", Rows::Lines { reader: BufReader::with_capacity(1 << 18, file), line: 0 }))
            }
            FileFormat::Csv => Ok(("line", open_csv(path, file)?)),
            FileFormat::Parquet => {
                let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file)
                    .and_then(|builder| builder.with_batch_size(BATCH).build())
                    .map_err(|error| format!("not a Parquet file: {error}"))?;
                Ok(("row", columns(Box::new(reader))))
            }
            FileFormat::Avro => {
                let reader = arrow_avro::reader::ReaderBuilder::new()
                    .with_batch_size(BATCH)
                    .build(BufReader::with_capacity(1 << 18, file))
                    .map_err(|error| format!("not an Avro container file: {error}"))?;
                Ok(("row", columns(Box::new(reader))))
            }
            FileFormat::Arrow => {
                check_blocks(&file).map_err(|reason| format!("not an Arrow IPC file: {reason}"))?;
                let reader = arrow::ipc::reader::FileReader::try_new(BufReader::new(file), None)
                    .map_err(|error| format!("not an Arrow IPC file: {error}"))?;
                Ok(("row", columns(Box::new(reader))))
            }
        };
        let (noun, rows) = guarded(open).unwrap_or_else(Err).map_err(fault)?;
        Ok(Self { path: path.to_owned(), rows, noun, failed: false })
    }

    /// Names of the columns, where the file says them before its rows: all formats but JSON lines.
    pub fn columns(&self) -> Option<Vec<String>> {
        match &self.rows {
            Rows::Csv { names, .. } => Some(names.clone()),
            _ => None,
        }
    }

    fn fault(&mut self, reason: impl Into<String>) -> FileError {
        self.failed = true;
        FileError { file: self.path.clone(), reason: reason.into() }
    }

    fn bad(&self, number: u64, reason: impl Into<String>) -> Next {
        Next::Bad(RowError { noun: self.noun, number, reason: reason.into() })
    }

    fn read(&mut self) -> Result<Option<Next>, FileError> {
        match &mut self.rows {
            Rows::Lines { reader, line } => loop {
                let mut text = Vec::new();
                *line += 1;
                let number = *line;
                let read = reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut text);
                let read = read.map_err(|error| format!("line {number}: {error}"));
                let read = match read {
                    Ok(read) => read,
                    Err(reason) => return Err(self.fault(reason)),
                };
                if read == 0 {
                    return Ok(None);
                }
                if read as u64 == LONGEST_LINE && text.last() != Some(&b'\n') {
                    return Err(
                        self.fault(format!("line {number} is longer than 64 MiB: is this a file of JSON lines?"))
                    );
                }
                let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text).trim_ascii();
                if !text.is_empty() {
                    return Ok(Some(match json_row(text) {
                        Ok(values) => Next::Row(ReplayRow { number, values }),
                        Err(reason) => self.bad(number, reason),
                    }));
                }
            },
            Rows::Csv { reader, names, record } => match reader.read_record(record) {
                Ok(false) => Ok(None),
                Ok(true) => {
                    let number = record.position().map_or(0, csv::Position::line);
                    if record.len() != names.len() {
                        let reason = format!("{} values, but the header has {}", record.len(), names.len());
                        return Ok(Some(self.bad(number, reason)));
                    }
                    let value = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
                    let values = names.iter().cloned().zip(record.iter().map(value)).collect();
                    Ok(Some(Next::Row(ReplayRow { number, values })))
                }
                Err(error) => match error.kind() {
                    csv::ErrorKind::Utf8 { pos, err } => {
                        let number = pos.as_ref().map_or(0, csv::Position::line);
                        let reason = format!("value {} is not UTF-8", err.field() + 1);
                        Ok(Some(self.bad(number, reason)))
                    }
                    _ => Err(self.fault(error.to_string())),
                },
            },
            Rows::Columns { batches, current, at, number } => loop {
                if let Some(batch) = current
                    && *at < batch.num_rows()
                {
                    let row = *at;
                    *at += 1;
                    *number += 1;
                    let number = *number;
                    let fields = batch.schema();
                    let values = fields.fields().iter().zip(batch.columns()).map(|(field, column)| {
                        let value =
                            cell(column, row).map_err(|reason| format!("column '{}': {reason}", field.name()))?;
                        Ok((field.name().clone(), value))
                    });
                    return Ok(Some(match values.collect::<Result<_, String>>() {
                        Ok(values) => Next::Row(ReplayRow { number, values }),
                        Err(reason) => self.bad(number, reason),
                    }));
                }
                let next = guarded(|| batches.next()).map(|next| next.map(|read| read.map_err(|e| e.to_string())));
                match next.unwrap_or_else(|reason| Some(Err(reason))) {
                    None => return Ok(None),
                    Some(Ok(batch)) => {
                        *current = Some(batch);
                        *at = 0;
                    }
                    Some(Err(reason)) => {
                        let after = *number;
                        return Err(self.fault(format!("broken after row {after}: {reason}")));
                    }
                }
            },
        }
    }
}

impl Iterator for ReplayFile {
    type Item = Result<Next, FileError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed { None } else { self.read().transpose() }
    }
}

fn open_csv(path: &Path, file: File) -> Result<Rows, String> {
    let mut header = Vec::new();
    let read = BufReader::new(&file).take(LONGEST_LINE).read_until(b'\n', &mut header);
    read.map_err(|error| error.to_string())?;
    // The header is read again as CSV from the start.
    (&file).rewind().map_err(|error| error.to_string())?;
    let tab_named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tsv"));
    let delimiter = match () {
        () if tab_named => b'\t',
        () if header.contains(&b',') => b',',
        () => *[b'\t', b';', b'|'].iter().find(|delimiter| header.contains(delimiter)).unwrap_or(&b','),
    };
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(file);
    let names: Vec<String> = match reader.headers() {
        Ok(names) => names.iter().map(|name| name.trim().to_owned()).collect(),
        Err(error) => return Err(format!("its header row cannot be read: {error}")),
    };
    if names.iter().all(String::is_empty) {
        return Err("it has no header row, which names the columns".into());
    }
    if let Some(double) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        return Err(format!("its header row names column '{}' twice", double.1));
    }
    Ok(Rows::Csv { reader: Box::new(reader), names, record: csv::StringRecord::new() })
}

/// Sees to it that an Arrow file's blocks lie within it: its reader makes room for a block before it reads it, however large the
/// footer says that it is.
fn check_blocks(mut file: &File) -> Result<(), String> {
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    let read = |from: u64, count: usize| -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; count];
        file.seek(SeekFrom::Start(from))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|error| error.to_string())?;
        Ok(bytes)
    };
    check_footer(length, read)?;
    file.rewind().map_err(|error| error.to_string())
}

fn check_footer(length: u64, mut read: impl FnMut(u64, usize) -> Result<Vec<u8>, String>) -> Result<(), String> {
    let end = length.checked_sub(10).ok_or("it ends early")?;
    let tail = read(end, 10)?.try_into().map_err(|_| "it ends early")?;
    let footer = arrow::ipc::reader::read_footer_length(tail).map_err(|error| error.to_string())?;
    let start = end.checked_sub(footer as u64).ok_or("its footer is damaged")?;
    let footer = read(start, footer)?;
    let footer = arrow::ipc::root_as_footer(&footer).map_err(|error| format!("its footer is damaged: {error}"))?;
    for block in footer.dictionaries().iter().flatten().chain(footer.recordBatches().iter().flatten()) {
        let parts = [block.offset(), i64::from(block.metaDataLength()), block.bodyLength()];
        let sum = parts.iter().try_fold(0_u64, |sum, part| sum.checked_add(u64::try_from(*part).ok()?));
        if sum.is_none_or(|sum| sum > length) {
            return Err("a block lies outside of it".into());
        }
    }
    Ok(())
}

fn json_row(text: &[u8]) -> Result<Map<String, Value>, String> {
    if text.starts_with(b"[") {
        return Err("expected a JSON object, found an array; write one object a line (jq -c '.[]' FILE)".into());
    }
    // sonic-rs reads floats exactly; serde_json's own parser may be off by one in the last bit.
    let value: Value = sonic_rs::from_slice(text).map_err(|error| {
        let message = error.to_string();
        let message = message.lines().next().unwrap_or_default();
        let message = message.split(" at line").next().unwrap_or(message);
        format!("not JSON: {message} at byte {}", error.offset())
    })?;
    match value {
        Value::Object(values) => Ok(values),
        other => Err(format!("expected a JSON object, found {other}")),
    }
}
