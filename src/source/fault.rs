//! Why one record cannot be used: the fixed words that metrics count by, and the sentence that a person reads.

use std::fmt;

/// The fixed words. Each is a value of the metric label `reason` and of the header `driftline.reason`.
pub mod reason {
    /// The record has no value at all (a tombstone).
    pub const NULL_VALUE: &str = "null_value";
    /// The bytes are not a record of the source's format: cut short, too long, not UTF-8, not JSON, not the schema.
    pub const MALFORMED: &str = "malformed";
    /// A field is there but has not the declared type, or lies outside of its range.
    pub const WRONG_TYPE: &str = "wrong_type";
    /// A field of the entity's key is null or missing.
    pub const NULL_KEY: &str = "null_key";
    /// The event-time field is null or missing.
    pub const NULL_EVENT_TIME: &str = "null_event_time";
    /// The event time cannot be read, or is not within the years 1 to 9999.
    pub const BAD_EVENT_TIME: &str = "bad_event_time";
    /// The event lies further ahead of its Kafka record timestamp than the source allows.
    pub const AHEAD_OF_CLOCK: &str = "ahead_of_clock";
    /// The record names a writer schema that the registry does not have, or that is not Avro.
    pub const UNKNOWN_SCHEMA: &str = "unknown_schema";
    /// The writer's schema cannot be read as the pipeline's.
    pub const INCOMPATIBLE_SCHEMA: &str = "incompatible_schema";
    /// `derive` or `where` failed on the record.
    pub const EXPRESSION: &str = "expression";
    /// The outcome of a label is null or missing.
    pub const NULL_LABEL: &str = "null_label";
}

/// What is wrong with one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordFault {
    /// One of [`reason`].
    pub reason: &'static str,
    /// What is wrong, where in the value, and what to do.
    pub error: String,
}

impl RecordFault {
    /// A fault with its sentence.
    #[cold]
    pub fn new(reason: &'static str, error: impl Into<String>) -> Self {
        Self { reason, error: error.into() }
    }

    /// Bytes that are not a record of the format.
    #[cold]
    pub fn malformed(error: impl Into<String>) -> Self {
        Self::new(reason::MALFORMED, error)
    }
}

impl fmt::Display for RecordFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)
    }
}

impl std::error::Error for RecordFault {}

/// A text of the record for an error message: quoted, escaped, and cut where it is long.
pub fn excerpt(text: &str) -> String {
    const LONGEST: usize = 48;
    match text.char_indices().nth(LONGEST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}… ({} bytes)", &text[..end], text.len()),
    }
}
