//! Protobuf records: descriptor sets, and decoding into columns straight from the wire format.
//!
//! # Plain or framed
//!
//! No plain message starts with a zero byte (there is no field 0), so one that does is framed as Confluent's serialisers do:
//! the zero byte, the schema's id in the registry (32 bits, big-endian), and the path to the message within the writer's file
//! (a count and as many numbers, zig-zag; a single zero for the first message). Field numbers alone say what a record holds,
//! so the registry is not asked; but a record of another message of the same file is refused rather than misread.
//!
//! # Values
//!
//! A field that tracks presence (`optional`, a member of a `oneof`, any field of proto2, a wrapper) is null where it is absent;
//! one that does not has its type's zero. Enums are texts, `google.protobuf.Timestamp` is a timestamp, and fields of messages
//! within the record have dotted names. The last of several values of a field wins, and of several members of a `oneof`, and
//! messages within the record are merged, as the format asks. Repeated fields, maps, bytes and messages that hold themselves
//! are no columns. A field whose wire type is not the schema's makes the record a dead letter: schemas that far apart would
//! lose the value without a word.

mod decode;
mod descriptor;
#[cfg(test)]
mod tests;

pub(crate) use decode::ProtobufDecoder;
pub use descriptor::{DescriptorError, Message};
