//! JSON Schema (draft 2020-12, and what older drafts share with it) as the source of field types.
//!
//! Read are `type`, `enum`, `const`, `format` of texts, `properties`, `$ref` within the document (`#`, `#/$defs/…`,
//! `#/definitions/…`, and any other JSON pointer), `allOf`, and `anyOf` and `oneOf` whose alternatives are of one type, null
//! aside. Properties of objects within the record become columns with dotted names. What only restricts values (`required`,
//! `minimum`, `pattern`, `additionalProperties`, …) is not enforced: a record is judged by the types of the fields that the
//! pipeline uses. References to other documents, anchors and `$dynamicRef` are not followed, and properties that appear only
//! under `if`, `dependentSchemas`, `patternProperties` or `not` are not columns.

use std::cell::Cell;

use serde_json::{Map, Value};

use crate::config::plan::DataType;

/// References and combinations are followed this deep.
const DEEPEST: usize = 32;
/// Fields at most: a document of few lines can spell out very many.
const MOST_FIELDS: usize = 10_000;
/// Schemas looked at, at most.
const MOST_STEPS: u32 = 200_000;

/// Fields of records that a JSON Schema describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonSchema {
    fields: Vec<(String, DataType)>,
    unusable: Vec<(String, String)>,
}

/// A text that is no JSON Schema of records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a JSON Schema of objects: {0}")]
pub struct JsonSchemaError(String);

/// What a schema says of a value.
#[derive(Debug, Clone, PartialEq)]
enum Shape<'a> {
    Null,
    Value(DataType),
    /// An object with these properties.
    Object(Vec<(&'a str, &'a Value)>),
    /// No column can hold it, for this reason.
    Other(String),
}

impl JsonSchema {
    /// True where a JSON document looks like a JSON Schema, and not like an Avro schema.
    pub fn is_one(document: &Value) -> bool {
        let Value::Object(root) = document else { return false };
        let own = ["$schema", "$ref", "$defs", "properties", "allOf", "anyOf", "oneOf"];
        own.iter().any(|key| root.contains_key(*key)) || root.get("type").is_some_and(|of| of == "object")
    }

    /// Reads a schema.
    ///
    /// # Errors
    /// Where it is not JSON, or does not describe an object.
    pub fn parse(text: &str) -> Result<Self, JsonSchemaError> {
        let document: Value = serde_json::from_str(text).map_err(|error| JsonSchemaError(error.to_string()))?;
        let reader = Reader { document: &document, left: Cell::new(MOST_STEPS) };
        let properties = match reader.shape(&document, 0) {
            Shape::Object(properties) => properties,
            Shape::Null => return Err(JsonSchemaError("it allows null only".into())),
            Shape::Value(of) => return Err(JsonSchemaError(format!("it describes values of type {of}"))),
            Shape::Other(reason) => return Err(JsonSchemaError(format!("what it describes {reason}"))),
        };
        let mut schema = Self { fields: Vec::new(), unusable: Vec::new() };
        reader.add("", &properties, 0, &mut schema)?;
        Ok(schema)
    }

    /// The fields that can be columns, with dots into nested objects, by name.
    pub fn fields(&self) -> &[(String, DataType)] {
        &self.fields
    }

    /// The other fields, and why they cannot be columns.
    pub fn unusable(&self) -> &[(String, String)] {
        &self.unusable
    }
}

struct Reader<'a> {
    document: &'a Value,
    /// Schemas that may still be looked at: combinations of references can be worth more than anybody has time for.
    left: Cell<u32>,
}

impl<'a> Reader<'a> {
    fn add(
        &self,
        prefix: &str,
        properties: &[(&'a str, &'a Value)],
        depth: usize,
        to: &mut JsonSchema,
    ) -> Result<(), JsonSchemaError> {
        for (name, schema) in properties {
            if to.fields.len() + to.unusable.len() >= MOST_FIELDS {
                return Err(JsonSchemaError(format!("it has more than {MOST_FIELDS} fields")));
            }
            let path = format!("{prefix}{name}");
            if name.contains('.') || name.is_empty() {
                to.unusable.push((path, "has a name with a dot or without letters, which cannot be a column's".into()));
                continue;
            }
            match self.shape(schema, 0) {
                Shape::Value(of) => to.fields.push((path, of)),
                Shape::Null => to.unusable.push((path, "is always null".into())),
                Shape::Other(reason) => to.unusable.push((path, reason)),
                Shape::Object(_) if depth >= DEEPEST => to.unusable.push((path, "is nested too deeply".into())),
                Shape::Object(inner) if inner.is_empty() => {
                    to.unusable.push((path, "is an object without named properties, which cannot be a column".into()));
                }
                // An object that holds itself ends at the bound on nesting: few of its fields are ever named.
                Shape::Object(inner) if self.holds_itself(schema, &inner) => {
                    to.unusable.push((path, "is an object that may hold itself, which cannot be a column".into()));
                }
                Shape::Object(inner) => {
                    to.unusable.push((path.clone(), "is an object; name a field within it with a dot".into()));
                    self.add(&format!("{path}."), &inner, depth + 1, to)?;
                }
            }
        }
        Ok(())
    }

    /// True where one of the properties, at any depth, refers to what `schema` refers to.
    fn holds_itself(&self, schema: &'a Value, properties: &[(&'a str, &'a Value)]) -> bool {
        let Some(own) = schema.get("$ref").and_then(Value::as_str) else { return false };
        let mut seen = vec![own];
        let mut next: Vec<&Value> = properties.iter().map(|(_, schema)| *schema).collect();
        while let Some(schema) = next.pop() {
            match schema {
                Value::Object(object) => {
                    if let Some(target) = object.get("$ref").and_then(Value::as_str) {
                        if target == own || target == "#" {
                            return true;
                        }
                        if !seen.contains(&target) {
                            seen.push(target);
                            next.extend(self.find(target));
                        }
                    }
                    next.extend(object.values());
                }
                Value::Array(items) => next.extend(items),
                _ => {}
            }
        }
        false
    }

    fn shape(&self, schema: &'a Value, depth: usize) -> Shape<'a> {
        let Value::Object(schema) = schema else {
            return Shape::Other("may be anything, which cannot be a column".into());
        };
        if depth > DEEPEST {
            return Shape::Other("refers to itself".into());
        }
        self.left.set(self.left.get().saturating_sub(1));
        if self.left.get() == 0 {
            return Shape::Other("is described by too many references".into());
        }
        // Several keywords may speak at once; a value must satisfy all of them.
        let mut shapes = Vec::new();
        if let Some(target) = schema.get("$ref") {
            shapes.push(match target.as_str().and_then(|target| self.find(target)) {
                Some(found) => self.shape(found, depth + 1),
                None => Shape::Other(format!("refers to {target}, which is not a place in the same document")),
            });
        }
        if schema.contains_key("$dynamicRef") {
            shapes.push(Shape::Other("uses $dynamicRef, which is not supported".into()));
        }
        if let Some(parts) = schema.get("allOf").and_then(Value::as_array) {
            shapes.extend(parts.iter().map(|part| self.shape(part, depth + 1)));
        }
        for key in ["anyOf", "oneOf"] {
            if let Some(parts) = schema.get(key).and_then(Value::as_array) {
                shapes.push(either(parts.iter().map(|part| self.shape(part, depth + 1))));
            }
        }
        shapes.extend(own(schema));
        // A part that only restricts values says nothing of their type.
        shapes.retain(|shape| !matches!(shape, Shape::Other(reason) if reason == UNTYPED));
        shapes.into_iter().reduce(both).unwrap_or_else(|| Shape::Other(UNTYPED.into()))
    }

    /// The schema at a reference within the document.
    fn find(&self, target: &str) -> Option<&'a Value> {
        let pointer = target.strip_prefix('#')?;
        // A reference is a URI fragment: what is not plain is percent-encoded.
        let pointer =
            url::form_urlencoded::parse(format!("p={}", pointer.replace('+', "%2B").replace('&', "%26")).as_bytes())
                .next()
                .map(|(_, pointer)| pointer.into_owned())?;
        self.document.pointer(&pointer)
    }
}

const UNTYPED: &str = "has no type, so it may be anything, which cannot be a column";

/// What a schema's own keywords say.
fn own(schema: &Map<String, Value>) -> Option<Shape<'_>> {
    let as_text = |name: &str| schema.get(name).and_then(Value::as_str);
    let typed = |name: &str| match name {
        "null" => Shape::Null,
        "boolean" => Shape::Value(DataType::Boolean),
        "integer" => Shape::Value(DataType::Int64),
        "number" => Shape::Value(DataType::Float64),
        "string" => match as_text("format") {
            Some("date-time" | "date") => Shape::Value(DataType::Timestamp),
            _ => Shape::Value(DataType::String),
        },
        "object" => Shape::Object(properties(schema)),
        "array" => Shape::Other("is an array, which cannot be a column".into()),
        other => Shape::Other(format!("is of type {other:?}, which JSON Schema does not have")),
    };
    let listed = |values: &[Value]| {
        either(values.iter().map(|value| match value {
            Value::Null => Shape::Null,
            Value::Bool(_) => Shape::Value(DataType::Boolean),
            Value::Number(number) if number.is_f64() => Shape::Value(DataType::Float64),
            Value::Number(_) => Shape::Value(DataType::Int64),
            Value::String(_) => Shape::Value(DataType::String),
            Value::Array(_) | Value::Object(_) => {
                Shape::Other("lists arrays or objects, which cannot be a column".into())
            }
        }))
    };
    match (schema.get("type"), schema.get("enum"), schema.get("const")) {
        (Some(Value::String(name)), ..) => Some(typed(name)),
        (Some(Value::Array(names)), ..) => Some(either(names.iter().map(|name| match name {
            Value::String(name) => typed(name),
            other => Shape::Other(format!("is of type {other}, which JSON Schema does not have")),
        }))),
        (Some(other), ..) => Some(Shape::Other(format!("is of type {other}, which JSON Schema does not have"))),
        (None, Some(Value::Array(values)), _) => Some(listed(values)),
        (None, _, Some(value)) => Some(listed(std::slice::from_ref(value))),
        (None, ..) if schema.contains_key("properties") => Some(Shape::Object(properties(schema))),
        (None, ..) => None,
    }
}

fn properties(schema: &Map<String, Value>) -> Vec<(&str, &Value)> {
    let properties = schema.get("properties").and_then(Value::as_object);
    properties.map_or_else(Vec::new, |properties| properties.iter().map(|(name, of)| (name.as_str(), of)).collect())
}

/// A value of one shape or another.
fn either<'a>(shapes: impl Iterator<Item = Shape<'a>>) -> Shape<'a> {
    let merged = shapes.reduce(|one, other| match (one, other) {
        (Shape::Null, shape) | (shape, Shape::Null) => shape,
        (Shape::Other(reason), _) | (_, Shape::Other(reason)) => Shape::Other(reason),
        (one, other) if one == other => one,
        (Shape::Value(DataType::Int64), Shape::Value(DataType::Float64))
        | (Shape::Value(DataType::Float64), Shape::Value(DataType::Int64)) => Shape::Value(DataType::Float64),
        (Shape::Value(DataType::Timestamp), Shape::Value(DataType::String))
        | (Shape::Value(DataType::String), Shape::Value(DataType::Timestamp)) => Shape::Value(DataType::String),
        // Of records of several kinds, each field is there or is not.
        (Shape::Object(one), Shape::Object(other)) => joined(one, other),
        _ => Shape::Other("is of several types, which cannot be a column".into()),
    });
    merged.unwrap_or_else(|| Shape::Other(UNTYPED.into()))
}

/// A value of both shapes.
fn both<'a>(one: Shape<'a>, other: Shape<'a>) -> Shape<'a> {
    match (one, other) {
        (Shape::Other(reason), _) | (_, Shape::Other(reason)) => Shape::Other(reason),
        (one, other) if one == other => one,
        (Shape::Value(DataType::Int64), Shape::Value(DataType::Float64))
        | (Shape::Value(DataType::Float64), Shape::Value(DataType::Int64)) => Shape::Value(DataType::Int64),
        (Shape::Value(DataType::Timestamp), Shape::Value(DataType::String))
        | (Shape::Value(DataType::String), Shape::Value(DataType::Timestamp)) => Shape::Value(DataType::Timestamp),
        (Shape::Object(one), Shape::Object(other)) => joined(one, other),
        _ => Shape::Other("must be of several types at once, which nothing is".into()),
    }
}

/// All properties of two objects. One that both have must say the same of it.
fn joined<'a>(mut one: Vec<(&'a str, &'a Value)>, other: Vec<(&'a str, &'a Value)>) -> Shape<'a> {
    for (name, schema) in other {
        match one.iter().find(|(known, _)| *known == name) {
            Some((_, known)) if *known != schema => {
                return Shape::Other(format!("has a property '{name}' that is described in two ways"));
            }
            Some(_) => {}
            None => one.push((name, schema)),
        }
    }
    Shape::Object(one)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn of(property: Value) -> Result<DataType, String> {
        let text = json!({
            "type": "object", "properties": {"x": property},
            "$defs": {"money": {"type": "number", "minimum": 0}, "loop": {"$ref": "#/$defs/loop"}, "a/b%": {"type": "string"}},
        })
        .to_string();
        let schema = JsonSchema::parse(&text).expect("a schema of objects");
        match (schema.fields(), schema.unusable()) {
            ([(name, of)], []) if name == "x" => Ok(*of),
            ([], [(name, reason)]) if name == "x" => Err(reason.clone()),
            other => panic!("{other:?}"),
        }
    }

    #[rstest]
    #[case(json!({"type": "integer"}), DataType::Int64)]
    #[case(json!({"type": "number", "exclusiveMinimum": 0}), DataType::Float64)]
    #[case(json!({"type": ["null", "boolean"]}), DataType::Boolean)]
    #[case(json!({"type": ["integer", "number"]}), DataType::Float64)]
    #[case(json!({"type": "string", "format": "email"}), DataType::String)]
    #[case(json!({"type": ["string", "null"], "format": "date-time"}), DataType::Timestamp)]
    #[case(json!({"enum": ["a", "b", null]}), DataType::String)]
    #[case(json!({"enum": [1, 2.5]}), DataType::Float64)]
    #[case(json!({"const": 3}), DataType::Int64)]
    #[case(json!({"$ref": "#/$defs/money"}), DataType::Float64)]
    #[case(json!({"$ref": "#/$defs/money", "type": "integer"}), DataType::Int64)]
    #[case(json!({"$ref": "#/$defs/a~1b%25"}), DataType::String)]
    #[case(json!({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/money"}]}), DataType::Float64)]
    #[case(json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}), DataType::Float64)]
    #[case(json!({"allOf": [{"type": "string"}, {"minLength": 1}]}), DataType::String)]
    #[case(json!({"type": "integer", "anyOf": [{"minimum": 3}, {"maximum": 1}]}), DataType::Int64)]
    fn a_property_becomes_a_column(#[case] property: Value, #[case] expected: DataType) {
        assert_eq!(of(property), Ok(expected));
    }

    #[rstest]
    #[case(json!(true), "anything")]
    #[case(json!({}), "anything")]
    #[case(json!({"type": "null"}), "always null")]
    #[case(json!({"type": "array", "items": {"type": "string"}}), "an array")]
    #[case(json!({"type": "object"}), "without named properties")]
    #[case(json!({"type": ["string", "integer"]}), "several types")]
    #[case(json!({"allOf": [{"type": "string"}, {"type": "integer"}]}), "at once")]
    #[case(json!({"type": "text"}), "JSON Schema does not have")]
    #[case(json!({"type": 3}), "JSON Schema does not have")]
    #[case(json!({"$ref": "other.json#/x"}), "not a place in the same document")]
    #[case(json!({"$ref": "#money"}), "not a place in the same document")]
    #[case(json!({"$ref": "#/$defs/loop"}), "refers to itself")]
    #[case(json!({"$dynamicRef": "#x"}), "$dynamicRef")]
    fn what_is_no_column_says_why(#[case] property: Value, #[case] expected: &str) {
        let reason = of(property).expect_err("no column");
        assert!(reason.contains(expected), "{reason}");
    }

    #[test]
    fn objects_are_reached_with_dots() {
        let schema = JsonSchema::parse(
            r##"{"$ref": "#/$defs/order", "$defs": {
              "order": {"allOf": [{"type": "object", "properties": {"id": {"type": "string"}}},
                                  {"properties": {"buyer": {"$ref": "#/$defs/person"}, "a.b": {"type": "string"}}}]},
              "person": {"type": "object", "properties": {"age": {"type": "integer"},
                 "parent": {"$ref": "#/$defs/person"},
                 "home": {"type": "object", "properties": {"zip": {"type": "string"}}}}}}}"##,
        )
        .unwrap();
        // A person may hold a person: no end of fields.
        assert_eq!(schema.fields(), [("id".to_owned(), DataType::String)]);
        let names: Vec<&str> = schema.unusable().iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a.b", "buyer"]);

        let schema = JsonSchema::parse(
            r#"{"properties": {"a": {"properties": {"b": {"properties": {"c": {"type": "number"}}}, "d": {"type": "boolean"}}}}}"#,
        )
        .unwrap();
        assert_eq!(schema.fields(), [("a.b.c".to_owned(), DataType::Float64), ("a.d".to_owned(), DataType::Boolean)]);
    }

    #[rstest]
    #[case("{", "EOF")]
    #[case("[]", "anything")]
    #[case(r#"{"type": "string"}"#, "type string")]
    #[case(r#"{"type": "array"}"#, "an array")]
    #[case(r##"{"$ref": "#"}"##, "refers to itself")]
    fn what_describes_no_object_is_refused(#[case] text: &str, #[case] expected: &str) {
        let error = JsonSchema::parse(text).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn is_told_from_an_avro_schema() {
        let avro = json!({"type": "record", "name": "R", "fields": []});
        assert!(!JsonSchema::is_one(&avro) && !JsonSchema::is_one(&json!(["null"])));
        assert!(JsonSchema::is_one(&json!({"type": "object"})) && JsonSchema::is_one(&json!({"$ref": "#/$defs/a"})));
    }

    #[test]
    fn a_schema_that_grows_without_end_is_refused_or_ends() {
        // Each level names the next twice: two to the thirtieth fields.
        let mut definitions = Map::new();
        for level in 0..30 {
            let next = json!({"$ref": format!("#/$defs/l{}", level + 1)});
            definitions.insert(format!("l{level}"), json!({"properties": {"a": next, "b": next}}));
        }
        definitions.insert("l30".into(), json!({"type": "string"}));
        let text = json!({"$ref": "#/$defs/l0", "$defs": definitions}).to_string();
        assert!(JsonSchema::parse(&text).unwrap_err().to_string().contains("more than"));
        let thrice = |level: usize| json!({"allOf": vec![json!({"$ref": format!("#/$defs/l{level}")}); 3]});
        let mut definitions: Map<_, _> = (0..15).map(|level| (format!("l{level}"), thrice(level + 1))).collect();
        definitions.insert("l15".into(), json!({"type": "string"}));
        let text = json!({"properties": {"x": thrice(0)}, "$defs": definitions}).to_string();
        assert!(JsonSchema::parse(&text).unwrap().unusable()[0].1.contains("too many references"));
    }
}
