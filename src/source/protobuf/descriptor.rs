//! What `protoc --descriptor_set_out` writes, as far as columns need it.

use std::collections::HashMap;
use std::sync::Arc;

use prost::Message as _;

use crate::config::plan::DataType;

/// Fields of all messages within a record, at most: messages may hold messages twice over.
const MOST_FIELDS: usize = 10_000;
/// Messages within messages are followed this deep.
const DEEPEST: usize = 32;

/// The parts of `google/protobuf/descriptor.proto` that say how to read a message.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Set {
        #[prost(message, repeated, tag = "1")]
        pub file: Vec<File>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct File {
        #[prost(string, optional, tag = "1")]
        pub name: Option<String>,
        #[prost(string, optional, tag = "2")]
        pub package: Option<String>,
        #[prost(string, repeated, tag = "3")]
        pub dependency: Vec<String>,
        #[prost(message, repeated, tag = "4")]
        pub message_type: Vec<Descriptor>,
        #[prost(message, repeated, tag = "5")]
        pub enum_type: Vec<Enum>,
        #[prost(message, optional, tag = "8")]
        pub options: Option<FileOptions>,
        #[prost(string, optional, tag = "12")]
        pub syntax: Option<String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct FileOptions {
        #[prost(message, optional, tag = "50")]
        pub features: Option<Features>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Descriptor {
        #[prost(string, optional, tag = "1")]
        pub name: Option<String>,
        #[prost(message, repeated, tag = "2")]
        pub field: Vec<Field>,
        #[prost(message, repeated, tag = "3")]
        pub nested_type: Vec<Descriptor>,
        #[prost(message, repeated, tag = "4")]
        pub enum_type: Vec<Enum>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Field {
        #[prost(string, optional, tag = "1")]
        pub name: Option<String>,
        #[prost(int32, optional, tag = "3")]
        pub number: Option<i32>,
        #[prost(int32, optional, tag = "4")]
        pub label: Option<i32>,
        #[prost(int32, optional, tag = "5")]
        pub r#type: Option<i32>,
        #[prost(string, optional, tag = "6")]
        pub type_name: Option<String>,
        #[prost(message, optional, tag = "8")]
        pub options: Option<FieldOptions>,
        #[prost(int32, optional, tag = "9")]
        pub oneof_index: Option<i32>,
        #[prost(bool, optional, tag = "17")]
        pub proto3_optional: Option<bool>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct FieldOptions {
        #[prost(message, optional, tag = "21")]
        pub features: Option<Features>,
    }

    /// What editions say instead of a syntax.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Features {
        #[prost(int32, optional, tag = "1")]
        pub field_presence: Option<i32>,
        #[prost(int32, optional, tag = "5")]
        pub message_encoding: Option<i32>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Enum {
        #[prost(string, optional, tag = "1")]
        pub name: Option<String>,
        #[prost(message, repeated, tag = "2")]
        pub value: Vec<EnumValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct EnumValue {
        #[prost(string, optional, tag = "1")]
        pub name: Option<String>,
        #[prost(int32, optional, tag = "2")]
        pub number: Option<i32>,
    }

    pub const LABEL_REPEATED: i32 = 3;
    pub const IMPLICIT: i32 = 2;
    pub const DELIMITED: i32 = 2;
}

/// Why a descriptor set is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// The bytes are none.
    #[error(
        "not a descriptor set ({0}); make it with protoc --include_imports --descriptor_set_out=event.binpb event.proto"
    )]
    Malformed(String),
    /// It has no such message.
    #[error("it has no message '{name}'; it has {known}")]
    NoMessage {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A type that it refers to is missing.
    #[error("it lacks '{missing}', the type of field '{field}'; make it with protoc --include_imports")]
    NoType {
        /// Name of the type.
        missing: String,
        /// Field of that type.
        field: String,
    },
}

/// One message type of a descriptor set, with all that it needs.
#[derive(Debug, Clone, Default)]
pub struct Message {
    pub(super) name: String,
    pub(super) types: Vec<MessageType>,
    /// Index of the message itself.
    pub(super) root: usize,
    /// The path to it within its file, as Confluent's framing writes it.
    pub(super) indexes: Vec<i64>,
    fields: Vec<(String, DataType)>,
    unusable: Vec<(String, String)>,
}

/// A message type.
#[derive(Debug, Clone, Default)]
pub(super) struct MessageType {
    /// By number, ascending.
    pub(super) fields: Vec<MessageField>,
}

/// A field of a message type.
#[derive(Debug, Clone)]
pub(super) struct MessageField {
    pub(super) name: Arc<str>,
    pub(super) number: u32,
    pub(super) kind: Kind,
    /// Null where it is absent.
    pub(super) tracks_presence: bool,
    /// Members of one `oneof` have the same number here.
    pub(super) oneof: Option<i32>,
}

/// What a field holds.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    Double,
    Float,
    /// int32, int64.
    Int,
    Uint64,
    Uint32,
    /// sint32, sint64.
    Zigzag,
    Fixed32,
    Fixed64,
    Sfixed32,
    Sfixed64,
    Bool,
    Text,
    Enum(Arc<HashMap<i32, Arc<str>>>),
    /// Index of its type; true where it is written between two tags.
    Message(usize, bool),
    /// `google.protobuf.Timestamp`.
    Instant,
    /// One of `google/protobuf/wrappers.proto`: a message with this value in field 1.
    Wrapper(Box<Kind>),
    /// No column can hold it, for this reason.
    Other(&'static str),
}

impl Kind {
    fn column(&self) -> Option<DataType> {
        Some(match self {
            Self::Double | Self::Float => DataType::Float64,
            Self::Int
            | Self::Uint64
            | Self::Uint32
            | Self::Zigzag
            | Self::Fixed32
            | Self::Fixed64
            | Self::Sfixed32
            | Self::Sfixed64 => DataType::Int64,
            Self::Bool => DataType::Boolean,
            Self::Text | Self::Enum(_) => DataType::String,
            Self::Instant => DataType::Timestamp,
            Self::Wrapper(inner) => return inner.column(),
            Self::Message(..) | Self::Other(_) => return None,
        })
    }
}

impl Message {
    /// Finds a message type by its full name in what `protoc --descriptor_set_out` has written.
    ///
    /// # Errors
    /// The bytes are no descriptor set, it lacks the message, or a type that the message needs.
    pub fn find(set: &[u8], name: &str) -> Result<Self, DescriptorError> {
        let set = wire::Set::decode(set).map_err(|error| DescriptorError::Malformed(error.to_string()))?;
        if set.file.is_empty() {
            return Err(DescriptorError::Malformed("it has no file".into()));
        }
        let mut known = Known::default();
        for file in &set.file {
            let package = file.package.as_deref().unwrap_or_default();
            file.enum_type.iter().for_each(|of| known.add_enum(package, of));
            for (index, message) in (0..).zip(&file.message_type) {
                known.add_message(file, package, message, vec![index]);
            }
        }
        let name = name.trim_start_matches('.');
        let Some((_, _, indexes)) = known.messages.get(name) else {
            let mut names: Vec<&str> = known.messages.keys().map(String::as_str).collect();
            names.sort_unstable();
            names.retain(|name| !name.starts_with("google.protobuf."));
            let more = names.len().saturating_sub(20);
            names.truncate(20);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            return Err(DescriptorError::NoMessage { name: name.into(), known: names.join(", ") + &more });
        };
        let indexes = indexes.clone();
        let mut compiler = Compiler { known: &known, types: Vec::new(), indexes: HashMap::new() };
        let root = compiler.message(name)?;
        let (fields, unusable) = (Vec::new(), Vec::new());
        let mut message = Self { name: name.to_owned(), types: compiler.types, root, indexes, fields, unusable };
        message.collect(root, "", &mut vec![root]);
        Ok(message)
    }

    /// The fields that can be columns, with dots into messages, in the descriptor's order.
    pub fn fields(&self) -> &[(String, DataType)] {
        &self.fields
    }

    /// The other fields, and why they cannot be columns.
    pub fn unusable(&self) -> &[(String, String)] {
        &self.unusable
    }

    fn collect(&mut self, of: usize, prefix: &str, above: &mut Vec<usize>) {
        for field in self.types[of].fields.clone() {
            let path = format!("{prefix}{}", field.name);
            if self.fields.len() + self.unusable.len() >= MOST_FIELDS {
                return;
            }
            match (field.kind.column(), &field.kind) {
                (Some(data_type), _) => self.fields.push((path, data_type)),
                (None, Kind::Other(reason)) => self.unusable.push((path, (*reason).to_owned())),
                (None, Kind::Message(inner, _)) if above.contains(inner) || above.len() > DEEPEST => {
                    self.unusable.push((path, "is a message that may hold itself, which cannot be a column".into()));
                }
                (None, Kind::Message(inner, _)) => {
                    self.unusable.push((path.clone(), "is a message; name a field within it with a dot".into()));
                    above.push(*inner);
                    self.collect(*inner, &format!("{path}."), above);
                    above.pop();
                }
                (None, _) => {}
            }
        }
    }
}

/// All types of a descriptor set by their full names.
#[derive(Default)]
struct Known<'a> {
    messages: HashMap<String, (&'a wire::File, &'a wire::Descriptor, Vec<i64>)>,
    enums: HashMap<String, &'a wire::Enum>,
}

impl<'a> Known<'a> {
    fn add_message(&mut self, file: &'a wire::File, scope: &str, message: &'a wire::Descriptor, indexes: Vec<i64>) {
        let name = full_name(scope, message.name.as_deref());
        message.enum_type.iter().for_each(|of| self.add_enum(&name, of));
        // prost bounds how deep a set may nest, and so this.
        for (index, nested) in (0..).zip(&message.nested_type) {
            let mut path = indexes.clone();
            path.push(index);
            self.add_message(file, &name, nested, path);
        }
        self.messages.insert(name, (file, message, indexes));
    }

    fn add_enum(&mut self, scope: &str, of: &'a wire::Enum) {
        self.enums.insert(full_name(scope, of.name.as_deref()), of);
    }
}

fn full_name(scope: &str, name: Option<&str>) -> String {
    let name = name.unwrap_or_default();
    if scope.is_empty() { name.to_owned() } else { format!("{scope}.{name}") }
}

struct Compiler<'a> {
    known: &'a Known<'a>,
    types: Vec<MessageType>,
    indexes: HashMap<String, usize>,
}

impl Compiler<'_> {
    /// Index of a message type, compiled once.
    fn message(&mut self, name: &str) -> Result<usize, DescriptorError> {
        // Not by recursion: one message may lead to very many.
        let root = self.reserve(name);
        let mut open = vec![(root, name.to_owned())];
        while let Some((index, name)) = open.pop() {
            let (file, message, _) = &self.known.messages[&name];
            let mut fields = Vec::with_capacity(message.field.len());
            for field in &message.field {
                if let Some(compiled) = self.field(file, field, &mut open)? {
                    fields.push(compiled);
                }
            }
            fields.sort_by_key(|field| field.number);
            self.types[index].fields = fields;
        }
        Ok(root)
    }

    fn reserve(&mut self, name: &str) -> usize {
        self.types.push(MessageType::default());
        self.indexes.insert(name.to_owned(), self.types.len() - 1);
        self.types.len() - 1
    }

    fn field(
        &mut self,
        file: &wire::File,
        field: &wire::Field,
        open: &mut Vec<(usize, String)>,
    ) -> Result<Option<MessageField>, DescriptorError> {
        let (Some(name), Some(number)) = (&field.name, field.number.and_then(|n| u32::try_from(n).ok())) else {
            return Ok(None);
        };
        let feature = |of: fn(&wire::Features) -> Option<i32>| {
            let own = field.options.as_ref().and_then(|options| options.features.as_ref()).and_then(of);
            own.or_else(|| file.options.as_ref().and_then(|options| options.features.as_ref()).and_then(of))
        };
        let repeated = field.label == Some(wire::LABEL_REPEATED);
        let kind = self.kind(field, name, feature(|f| f.message_encoding) == Some(wire::DELIMITED), open)?;
        let is_message = matches!(kind, Kind::Message(..) | Kind::Instant | Kind::Wrapper(_));
        let tracks_presence = is_message
            || field.oneof_index.is_some()
            || match file.syntax.as_deref() {
                Some("proto3") => field.proto3_optional == Some(true),
                Some("editions") => feature(|f| f.field_presence) != Some(wire::IMPLICIT),
                _ => true,
            };
        Ok(Some(MessageField {
            name: name.as_str().into(),
            number,
            kind: if repeated { Kind::Other("is repeated, which cannot be a column") } else { kind },
            tracks_presence,
            // An `optional` of proto3 is a oneof of its own.
            oneof: field.oneof_index,
        }))
    }

    fn kind(
        &mut self,
        field: &wire::Field,
        name: &str,
        delimited: bool,
        open: &mut Vec<(usize, String)>,
    ) -> Result<Kind, DescriptorError> {
        let type_name = field.type_name.as_deref().unwrap_or_default().trim_start_matches('.');
        let missing = || DescriptorError::NoType { missing: type_name.to_owned(), field: name.to_owned() };
        Ok(match field.r#type.unwrap_or_default() {
            1 => Kind::Double,
            2 => Kind::Float,
            3 | 5 => Kind::Int,
            4 => Kind::Uint64,
            6 => Kind::Fixed64,
            7 => Kind::Fixed32,
            8 => Kind::Bool,
            9 => Kind::Text,
            kind @ (10 | 11) => match well_known(type_name) {
                Some(kind) => kind,
                None if self.known.messages.contains_key(type_name) => {
                    let index = match self.indexes.get(type_name) {
                        Some(index) => *index,
                        None => {
                            let index = self.reserve(type_name);
                            open.push((index, type_name.to_owned()));
                            index
                        }
                    };
                    Kind::Message(index, kind == 10 || delimited)
                }
                None => return Err(missing()),
            },
            12 => Kind::Other("is of type bytes, which cannot be a column"),
            13 => Kind::Uint32,
            14 => {
                let of = self.known.enums.get(type_name).ok_or_else(missing)?;
                let value = |value: &wire::EnumValue| Some((value.number?, value.name.as_deref()?.into()));
                // Of two names of one number, the first is the one that counts.
                Kind::Enum(Arc::new(of.value.iter().rev().filter_map(value).collect()))
            }
            15 => Kind::Sfixed32,
            16 => Kind::Sfixed64,
            17 | 18 => Kind::Zigzag,
            _ => Kind::Other("is of a type that Protobuf does not have"),
        })
    }
}

/// Messages of Google's own that stand for values.
fn well_known(name: &str) -> Option<Kind> {
    let wrapper = |kind| Some(Kind::Wrapper(Box::new(kind)));
    match name.strip_prefix("google.protobuf.")? {
        "Timestamp" => Some(Kind::Instant),
        "DoubleValue" => wrapper(Kind::Double),
        "FloatValue" => wrapper(Kind::Float),
        "Int64Value" | "Int32Value" => wrapper(Kind::Int),
        "UInt64Value" => wrapper(Kind::Uint64),
        "UInt32Value" => wrapper(Kind::Uint32),
        "BoolValue" => wrapper(Kind::Bool),
        "StringValue" => wrapper(Kind::Text),
        "BytesValue" => Some(Kind::Other("is of type bytes, which cannot be a column")),
        "Struct" | "Value" | "ListValue" | "Any" => Some(Kind::Other("may hold anything, which cannot be a column")),
        _ => None,
    }
}
