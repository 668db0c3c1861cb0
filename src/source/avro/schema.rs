//! Avro schemas as driftline needs them: a flat list of types that refer to one another by index, so that recursive schemas
//! are nothing special.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::config::plan::{DataType, TimeUnit};

/// An Avro schema.
#[derive(Debug, Clone)]
pub struct AvroSchema {
    text: Arc<str>,
    types: Vec<Type>,
    root: TypeId,
}

/// Index of a type in its schema.
pub(crate) type TypeId = usize;

/// One type of a schema, with the logical type that it carries.
#[derive(Debug, Clone)]
pub(crate) struct Type {
    pub kind: Kind,
    pub logical: Option<Logical>,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Null,
    Boolean,
    Int,
    Long,
    Float,
    Double,
    Bytes,
    Text,
    Fixed { name: String, size: usize },
    Enum { name: String, symbols: Vec<Arc<str>>, default: Option<Arc<str>> },
    Array(TypeId),
    Map(TypeId),
    Union(Vec<TypeId>),
    Record { name: String, fields: Vec<RecordField> },
}

/// One field of a record type.
#[derive(Debug, Clone)]
pub(crate) struct RecordField {
    pub name: Arc<str>,
    pub aliases: Vec<String>,
    pub of: TypeId,
    pub default: Option<Value>,
}

/// Logical types that change what a value means here. Others are ignored, as the specification asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Logical {
    /// Days since 1970 in an int.
    Date,
    /// An instant (local ones are taken as UTC) in a long.
    Instant(TimeUnit),
    /// An unscaled two's-complement integer in bytes or a fixed, to be divided by 10^scale.
    Decimal { scale: u32 },
}

/// A field that can become a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AvroField {
    /// Name; dots lead into nested records.
    pub name: String,
    /// Type of the column.
    pub data_type: DataType,
    /// True where the field, or a record around it, may be null.
    pub nullable: bool,
}

/// A text that is not an Avro schema.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an Avro schema: {reason}{}", if path.is_empty() { String::new() } else { format!(" (at {path})") })]
pub struct AvroSchemaError {
    /// Where in the schema: `Purchase.amount`.
    pub path: String,
    /// What is wrong.
    pub reason: String,
}

impl AvroSchema {
    /// Reads a schema.
    ///
    /// # Errors
    /// Says what is wrong and in which field.
    pub fn parse(text: &str) -> Result<Self, AvroSchemaError> {
        Self::parse_with(text, &[])
    }

    /// Reads a schema that refers to types of others, which come before those that use them.
    ///
    /// # Errors
    /// Says what is wrong and in which field.
    pub fn parse_with(text: &str, references: &[String]) -> Result<Self, AvroSchemaError> {
        let mut parser = Parser { types: Vec::new(), names: HashMap::new(), path: Vec::new() };
        for reference in references {
            parser.document(reference)?;
        }
        let root = parser.document(text)?;
        Ok(Self { text: text.into(), types: parser.types, root })
    }

    /// The schema as it was written.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Names of the record's own fields, in the schema's order. Empty where the schema is no record.
    pub fn record_fields(&self) -> Vec<String> {
        match &self.types[self.root].kind {
            Kind::Record { fields, .. } => fields.iter().map(|field| field.name.to_string()).collect(),
            _ => Vec::new(),
        }
    }

    pub(crate) fn root(&self) -> TypeId {
        self.root
    }

    pub(crate) fn get(&self, id: TypeId) -> &Type {
        &self.types[id]
    }

    /// Number of types; ids are below it.
    pub(crate) fn len(&self) -> usize {
        self.types.len()
    }

    /// The fields that can become columns, in the schema's order, nested ones by their dotted paths. Arrays, maps and
    /// recursive records are left out.
    pub fn fields(&self) -> Vec<AvroField> {
        let mut fields = Vec::new();
        self.collect_fields(self.root, "", false, &mut Vec::new(), &mut fields);
        fields
    }

    fn collect_fields(
        &self,
        id: TypeId,
        path: &str,
        nullable: bool,
        above: &mut Vec<TypeId>,
        out: &mut Vec<AvroField>,
    ) {
        if above.contains(&id) {
            return;
        }
        match &self.types[id].kind {
            Kind::Record { fields, .. } => {
                above.push(id);
                for field in fields {
                    let path = if path.is_empty() { field.name.to_string() } else { format!("{path}.{}", field.name) };
                    self.collect_fields(field.of, &path, nullable, above, out);
                }
                above.pop();
            }
            Kind::Union(branches) => {
                let nullable = nullable || branches.iter().any(|b| matches!(self.types[*b].kind, Kind::Null));
                let mut values = branches.iter().filter(|b| !matches!(self.types[**b].kind, Kind::Null));
                match (values.next(), values.next()) {
                    (Some(only), None) => self.collect_fields(*only, path, nullable, above, out),
                    _ => {
                        if let Some(data_type) = self.data_type(id) {
                            out.push(AvroField { name: path.to_owned(), data_type, nullable });
                        }
                    }
                }
            }
            _ => {
                if let Some(data_type) = self.data_type(id) {
                    out.push(AvroField { name: path.to_owned(), data_type, nullable });
                }
            }
        }
    }

    /// The column type that holds every value of this type. A union of numbers becomes the wider one.
    fn data_type(&self, id: TypeId) -> Option<DataType> {
        let this = &self.types[id];
        match (&this.kind, this.logical) {
            (_, Some(Logical::Date | Logical::Instant(_))) => Some(DataType::Timestamp),
            (_, Some(Logical::Decimal { .. })) => Some(DataType::Float64),
            (Kind::Boolean, _) => Some(DataType::Boolean),
            (Kind::Int | Kind::Long, _) => Some(DataType::Int64),
            (Kind::Float | Kind::Double, _) => Some(DataType::Float64),
            (Kind::Text | Kind::Bytes | Kind::Enum { .. }, _) => Some(DataType::String),
            (Kind::Union(branches), _) => {
                let mut types = branches
                    .iter()
                    .filter(|branch| !matches!(self.types[**branch].kind, Kind::Null))
                    .map(|branch| self.data_type(*branch));
                let first = types.next()??;
                types.try_fold(first, |held, next| match (held, next?) {
                    (a, b) if a == b => Some(a),
                    (DataType::Int64, DataType::Float64) | (DataType::Float64, DataType::Int64) => {
                        Some(DataType::Float64)
                    }
                    _ => None,
                })
            }
            _ => None,
        }
    }
}

/// The type in words, for error messages.
pub(crate) fn describe(schema: &AvroSchema, id: TypeId) -> String {
    let this = schema.get(id);
    match (&this.kind, this.logical) {
        (_, Some(Logical::Date)) => "date".into(),
        (_, Some(Logical::Instant(_))) => "timestamp".into(),
        (_, Some(Logical::Decimal { .. })) => "decimal".into(),
        (Kind::Null, _) => "null".into(),
        (Kind::Boolean, _) => "boolean".into(),
        (Kind::Int, _) => "int".into(),
        (Kind::Long, _) => "long".into(),
        (Kind::Float, _) => "float".into(),
        (Kind::Double, _) => "double".into(),
        (Kind::Bytes, _) => "bytes".into(),
        (Kind::Text, _) => "string".into(),
        (Kind::Fixed { name, .. }, _) => format!("fixed {name}"),
        (Kind::Enum { name, .. }, _) => format!("enum {name}"),
        (Kind::Array(_), _) => "array".into(),
        (Kind::Map(_), _) => "map".into(),
        (Kind::Record { name, .. }, _) => format!("record {name}"),
        (Kind::Union(branches), _) => {
            branches.iter().map(|branch| describe(schema, *branch)).collect::<Vec<_>>().join(" or ")
        }
    }
}

struct Parser {
    types: Vec<Type>,
    /// Full names of records, enums and fixed types.
    names: HashMap<String, TypeId>,
    /// Names that lead to the place being parsed.
    path: Vec<String>,
}

impl Parser {
    fn document(&mut self, text: &str) -> Result<TypeId, AvroSchemaError> {
        let value: Value = serde_json::from_str(text).map_err(|error| self.fault(format!("not JSON: {error}")))?;
        self.parse(&value, "")
    }

    fn fault(&self, reason: impl Into<String>) -> AvroSchemaError {
        AvroSchemaError { path: self.path.join("."), reason: reason.into() }
    }

    fn add(&mut self, kind: Kind) -> TypeId {
        self.types.push(Type { kind, logical: None });
        self.types.len() - 1
    }

    fn parse(&mut self, value: &Value, namespace: &str) -> Result<TypeId, AvroSchemaError> {
        match value {
            Value::String(name) => self.named(name, namespace),
            Value::Array(branches) => {
                let mut ids = Vec::with_capacity(branches.len());
                for branch in branches {
                    if branch.is_array() {
                        return Err(self.fault("a union may not hold a union"));
                    }
                    ids.push(self.parse(branch, namespace)?);
                }
                if ids.is_empty() {
                    return Err(self.fault("a union without branches has no values"));
                }
                Ok(self.add(Kind::Union(ids)))
            }
            Value::Object(object) => self.object(object, namespace),
            other => Err(self.fault(format!("expected a type, found {other}"))),
        }
    }

    fn named(&mut self, name: &str, namespace: &str) -> Result<TypeId, AvroSchemaError> {
        let kind = match name {
            "null" => Kind::Null,
            "boolean" => Kind::Boolean,
            "int" => Kind::Int,
            "long" => Kind::Long,
            "float" => Kind::Float,
            "double" => Kind::Double,
            "bytes" => Kind::Bytes,
            "string" => Kind::Text,
            _ => {
                let full = full_name(name, namespace);
                let found = self.names.get(&full).or_else(|| self.names.get(name)).copied();
                return found.ok_or_else(|| {
                    self.fault(format!(
                        "unknown type '{name}': a primitive, or a type defined before this place, is expected"
                    ))
                });
            }
        };
        Ok(self.add(kind))
    }

    fn object(&mut self, object: &Map<String, Value>, namespace: &str) -> Result<TypeId, AvroSchemaError> {
        let kind = match object.get("type") {
            None => return Err(self.fault("a type without \"type\"")),
            Some(Value::String(kind)) => kind.as_str(),
            Some(nested) => return self.parse(nested, namespace),
        };
        match kind {
            "record" | "error" => self.record(object, namespace),
            "enum" => {
                let name = self.name(object, namespace)?;
                let symbols: Vec<Arc<str>> = self
                    .member(object, "symbols")?
                    .as_array()
                    .and_then(|symbols| symbols.iter().map(|s| s.as_str().map(Arc::from)).collect())
                    .ok_or_else(|| self.fault("\"symbols\" must be a list of texts"))?;
                let default = object.get("default").and_then(Value::as_str).map(Arc::from);
                if default.as_ref().is_some_and(|default| !symbols.contains(default)) {
                    return Err(self.fault("the enum's default is not one of its symbols"));
                }
                let id = self.add(Kind::Enum { name: name.clone(), symbols, default });
                self.define(name, id)
            }
            "fixed" => {
                let name = self.name(object, namespace)?;
                let size = self
                    .member(object, "size")?
                    .as_u64()
                    .and_then(|size| usize::try_from(size).ok())
                    .ok_or_else(|| self.fault("\"size\" must be a whole number"))?;
                let id = self.add(Kind::Fixed { name: name.clone(), size });
                self.types[id].logical = self.logical(object, id);
                self.define(name, id)
            }
            "array" => {
                let items = self.parse(self.member(object, "items")?, namespace)?;
                Ok(self.add(Kind::Array(items)))
            }
            "map" => {
                let values = self.parse(self.member(object, "values")?, namespace)?;
                Ok(self.add(Kind::Map(values)))
            }
            primitive => {
                let id = self.named(primitive, namespace)?;
                if let Some(logical) = self.logical(object, id) {
                    self.types[id].logical = Some(logical);
                }
                Ok(id)
            }
        }
    }

    fn record(&mut self, object: &Map<String, Value>, namespace: &str) -> Result<TypeId, AvroSchemaError> {
        let name = self.name(object, namespace)?;
        let namespace = name.rsplit_once('.').map_or("", |(namespace, _)| namespace).to_owned();
        // The name is known before the fields are, so that they can refer to it.
        let id = self.add(Kind::Record { name: name.clone(), fields: Vec::new() });
        self.define(name.clone(), id)?;
        let short = name.rsplit('.').next().unwrap_or(&name).to_owned();
        self.path.push(short);
        let listed =
            self.member(object, "fields")?.as_array().ok_or_else(|| self.fault("\"fields\" must be a list"))?;
        let mut fields: Vec<RecordField> = Vec::with_capacity(listed.len());
        for field in listed {
            let Value::Object(field) = field else { return Err(self.fault("a field must be an object")) };
            let field_name = self.member(field, "name")?.as_str().ok_or_else(|| self.fault("\"name\" must be text"))?;
            if fields.iter().any(|other| &*other.name == field_name) {
                return Err(self.fault(format!("field '{field_name}' is there twice")));
            }
            self.path.push(field_name.to_owned());
            let of = match self.member(field, "type")? {
                // Beside the field's own keys some writers put those of its type, such as a logical type.
                Value::String(_) => self.object(field, &namespace)?,
                other => self.parse(other, &namespace)?,
            };
            let aliases = field
                .get("aliases")
                .and_then(Value::as_array)
                .map_or_else(Vec::new, |aliases| aliases.iter().filter_map(Value::as_str).map(str::to_owned).collect());
            fields.push(RecordField { name: field_name.into(), aliases, of, default: field.get("default").cloned() });
            self.path.pop();
        }
        self.path.pop();
        self.types[id].kind = Kind::Record { name, fields };
        Ok(id)
    }

    fn member<'a>(&self, object: &'a Map<String, Value>, key: &str) -> Result<&'a Value, AvroSchemaError> {
        object.get(key).ok_or_else(|| self.fault(format!("\"{key}\" is missing")))
    }

    fn name(&self, object: &Map<String, Value>, namespace: &str) -> Result<String, AvroSchemaError> {
        let name = self.member(object, "name")?.as_str().ok_or_else(|| self.fault("\"name\" must be text"))?;
        if name.is_empty() {
            return Err(self.fault("\"name\" is empty"));
        }
        Ok(full_name(name, object.get("namespace").and_then(Value::as_str).unwrap_or(namespace)))
    }

    fn define(&mut self, name: String, id: TypeId) -> Result<TypeId, AvroSchemaError> {
        if self.names.contains_key(&name) {
            return Err(self.fault(format!("type '{name}' is defined twice")));
        }
        self.names.insert(name, id);
        Ok(id)
    }

    /// The logical type that `object` gives to the type `id`; `None` where it does not apply to it.
    fn logical(&self, object: &Map<String, Value>, id: TypeId) -> Option<Logical> {
        let instant = |unit| matches!(self.types[id].kind, Kind::Long).then_some(Logical::Instant(unit));
        match object.get("logicalType")?.as_str()? {
            "date" => matches!(self.types[id].kind, Kind::Int).then_some(Logical::Date),
            "timestamp-millis" | "local-timestamp-millis" => instant(TimeUnit::Ms),
            "timestamp-micros" | "local-timestamp-micros" => instant(TimeUnit::Us),
            "timestamp-nanos" | "local-timestamp-nanos" => instant(TimeUnit::Ns),
            "decimal" => {
                // 38 digits are what a 128-bit integer holds; a longer decimal stays bytes.
                let fits = object.get("precision")?.as_u64()? <= 38;
                let scale = object.get("scale").map_or(Some(0), Value::as_u64)?;
                let scale = u32::try_from(scale).ok().filter(|scale| *scale <= 38)?;
                let holds = matches!(self.types[id].kind, Kind::Bytes | Kind::Fixed { .. });
                (fits && holds).then_some(Logical::Decimal { scale })
            }
            _ => None,
        }
    }
}

fn full_name(name: &str, namespace: &str) -> String {
    if name.contains('.') || namespace.is_empty() { name.to_owned() } else { format!("{namespace}.{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[test]
    fn lists_the_fields_that_can_be_columns() {
        let schema = AvroSchema::parse(
            r#"{"type": "record", "name": "Purchase", "namespace": "shop", "fields": [
                {"name": "customer_id", "type": "string"},
                {"name": "amount", "type": ["null", "double"], "default": null},
                {"name": "quantity", "type": "int"},
                {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
                {"name": "day", "type": "int", "logicalType": "date"},
                {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 10, "scale": 2}},
                {"name": "gift", "type": "boolean"},
                {"name": "channel", "type": {"type": "enum", "name": "Channel", "symbols": ["web", "store"]}},
                {"name": "second_channel", "type": ["null", "Channel"]},
                {"name": "number", "type": ["null", "int", "double"]},
                {"name": "mixed", "type": ["int", "string"]},
                {"name": "tags", "type": {"type": "array", "items": "string"}},
                {"name": "labels", "type": {"type": "map", "values": "int"}},
                {"name": "address", "type": ["null", {"type": "record", "name": "Address", "fields": [
                    {"name": "city", "type": "string"},
                    {"name": "next", "type": ["null", "Address"]}]}]},
                {"name": "hash", "type": {"type": "fixed", "name": "Hash", "size": 16}}
            ]}"#,
        )
        .unwrap();
        let fields: Vec<_> =
            schema.fields().into_iter().map(|field| (field.name, field.data_type, field.nullable)).collect();
        let expected = [
            ("customer_id", DataType::String, false),
            ("amount", DataType::Float64, true),
            ("quantity", DataType::Int64, false),
            ("at", DataType::Timestamp, false),
            ("day", DataType::Timestamp, false),
            ("price", DataType::Float64, false),
            ("gift", DataType::Boolean, false),
            ("channel", DataType::String, false),
            ("second_channel", DataType::String, true),
            ("number", DataType::Float64, true),
            ("address.city", DataType::String, true),
        ];
        assert_eq!(fields, expected.map(|(name, data_type, nullable)| (name.to_owned(), data_type, nullable)));
    }

    #[rstest]
    #[case("{", "not JSON")]
    #[case("42", "expected a type, found 42")]
    #[case(r#""money""#, "unknown type 'money'")]
    #[case(r#"{"name": "a"}"#, "without \"type\"")]
    #[case(r#"{"type": "record", "name": "A"}"#, "\"fields\" is missing (at A)")]
    #[case(r#"{"type": "record", "name": "A", "fields": [{"name": "x", "type": "money"}]}"#, "unknown type 'money'")]
    #[case(r#"{"type": "record", "name": "A", "fields": [{"name": "x", "type": "money"}]}"#, "(at A.x)")]
    #[case(
        r#"{"type": "record", "name": "A", "fields": [{"name": "x", "type": "int"}, {"name": "x", "type": "int"}]}"#,
        "twice"
    )]
    #[case(r#"{"type": "enum", "name": "E", "symbols": ["a"], "default": "b"}"#, "default is not one of its symbols")]
    #[case(r#"{"type": "fixed", "name": "F", "size": -1}"#, "whole number")]
    #[case(r#"["null", ["int"]]"#, "may not hold a union")]
    #[case("[]", "without branches")]
    fn names_the_fault(#[case] text: &str, #[case] expected: &str) {
        let error = AvroSchema::parse(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn refers_to_types_of_other_schemas() {
        let address = r#"{"type": "record", "name": "shop.Address", "fields": [{"name": "city", "type": "string"}]}"#;
        let customer =
            r#"{"type": "record", "name": "shop.Customer", "fields": [{"name": "home", "type": "Address"}]}"#;
        assert!(AvroSchema::parse(customer).is_err());
        let schema = AvroSchema::parse_with(customer, &[address.to_owned()]).unwrap();
        assert_eq!(schema.fields()[0].name, "home.city");
    }
}
