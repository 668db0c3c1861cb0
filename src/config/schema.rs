//! The JSON Schema of `pipeline.toml`, generated from the types, and a document's conformity to it: unknown and missing
//! keys, wrong types, unknown words, numbers out of range.

use std::sync::LazyLock;

use serde_json::{Map, Value as Json};

use super::document::{Collector, Entry, Node, Place, Text, Value};
use super::names;
use super::plan::Function;
use super::spec::Spec;

static SCHEMA: LazyLock<Json> = LazyLock::new(|| {
    serde_json::to_value(schemars::schema_for!(Spec)).expect("a generated schema can be written as JSON")
});

/// The JSON Schema (draft 2020-12) of `pipeline.toml`, for editors.
pub fn json_schema() -> String {
    let mut text = serde_json::to_string_pretty(&*SCHEMA).expect("a JSON value can be written");
    text.push('\n');
    text
}

/// Reports all that does not fit the schema and puts muted stand-ins in its place, so that what remains always
/// deserialises, and all other faults are found too.
pub(super) fn conform(root: &mut Node, faults: &mut Collector) {
    let at = Context { key: Place::start_of(&root.place), path: String::new(), in_map: false };
    check(root, &SCHEMA, &at, faults);
}

/// The table or key that a value belongs to.
struct Context {
    key: Place,
    path: String,
    /// True where the keys are the user's to choose.
    in_map: bool,
}

impl Context {
    fn child(&self, entry: &Entry, in_map: bool) -> Self {
        let path = if self.path.is_empty() { entry.key.clone() } else { format!("{}.{}", self.path, entry.key) };
        Self { key: entry.place.clone(), path, in_map }
    }

    /// ` in [sources.purchases]`, or nothing at the top.
    fn inside(&self) -> String {
        if self.path.is_empty() { String::new() } else { format!(" in [{}]", self.path) }
    }
}

/// What a schema asks for, as far as generated schemas go.
enum Shape<'s> {
    Word(Vec<&'s str>),
    Table { properties: &'s Map<String, Json>, required: Vec<&'s str> },
    Map(&'s Json),
    Array(&'s Json),
    String,
    Integer { least: Option<i64>, greatest: Option<i64> },
    Number,
    Boolean,
}

fn resolve(schema: &Json) -> &Json {
    if let Some(reference) = schema.get("$ref").and_then(Json::as_str) {
        let target = reference.strip_prefix('#').and_then(|pointer| SCHEMA.pointer(pointer));
        return resolve(target.expect("generated references have targets"));
    }
    let alternatives = schema.get("anyOf").and_then(Json::as_array);
    match alternatives.and_then(|all| all.iter().find(|one| one.get("type").is_none_or(|kind| kind != "null"))) {
        Some(one) => resolve(one),
        None => schema,
    }
}

fn shape(schema: &Json) -> Shape<'_> {
    let schema = resolve(schema);
    let mut words: Vec<&str> = Vec::new();
    for one in schema.get("oneOf").and_then(Json::as_array).into_iter().flatten().chain([schema]) {
        words.extend(one.get("const").and_then(Json::as_str));
        words.extend(one.get("enum").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str));
    }
    if !words.is_empty() {
        return Shape::Word(words);
    }
    let kind = match schema.get("type") {
        Some(Json::Array(kinds)) => kinds.iter().filter_map(Json::as_str).find(|kind| *kind != "null"),
        kind => kind.and_then(Json::as_str),
    };
    let bound = |name: &str| schema.get(name).and_then(|bound| bound.as_i64().or(bound.as_f64().map(|b| b as i64)));
    match kind {
        Some("object") => match schema.get("properties").and_then(Json::as_object) {
            Some(properties) => Shape::Table {
                properties,
                required: schema
                    .get("required")
                    .and_then(Json::as_array)
                    .into_iter()
                    .flatten()
                    .filter_map(Json::as_str)
                    .collect(),
            },
            None => Shape::Map(schema.get("additionalProperties").expect("a generated map says what its values are")),
        },
        Some("array") => Shape::Array(schema.get("items").expect("a generated array says what its items are")),
        Some("integer") => Shape::Integer { least: bound("minimum"), greatest: bound("maximum") },
        Some("number") => Shape::Number,
        Some("boolean") => Shape::Boolean,
        _ => Shape::String,
    }
}

/// What a schema says about words that it has patterns for. Only functions have some: `p50`, `last_20`.
fn pattern(schema: &Json) -> Option<String> {
    let alternatives = resolve(schema).get("oneOf")?.as_array()?.iter();
    let patterns = alternatives.filter(|one| one.get("pattern").is_some());
    let described: Vec<&str> = patterns.filter_map(|one| one.get("description")?.as_str()).collect();
    (!described.is_empty()).then(|| described.join(", or "))
}

/// A value of the right type for a muted place.
fn stand_in(schema: &Json) -> Value {
    let text = |text: &str| Value::String(Text::new(text.to_owned(), vec![0; text.len() + 1], false));
    match shape(schema) {
        Shape::Word(words) => text(words[0]),
        Shape::String => text(""),
        Shape::Integer { least, .. } => Value::Integer(least.unwrap_or(0).max(0)),
        Shape::Number => Value::Float(0.0),
        Shape::Boolean => Value::Boolean(false),
        Shape::Array(_) => Value::Array(Vec::new()),
        Shape::Map(_) => Value::Table(Vec::new()),
        Shape::Table { properties, required } => Value::Table(
            required
                .into_iter()
                .map(|key| {
                    let place = Place::nowhere();
                    let mut node = Node { value: stand_in(&properties[key]), place: place.clone() };
                    node.mute();
                    Entry { key: key.to_owned(), place, node }
                })
                .collect(),
        ),
    }
}

fn check(node: &mut Node, schema: &Json, at: &Context, faults: &mut Collector) {
    let shape = shape(schema);
    convert_text(node, &shape, faults);
    let wrong = match (&mut node.value, &shape) {
        (Value::Table(entries), Shape::Table { properties, required }) => {
            check_table(entries, properties, required, at, faults);
            return;
        }
        (Value::Table(entries), Shape::Map(values)) => {
            for entry in entries {
                let at = at.child(entry, true);
                check(&mut entry.node, values, &at, faults);
            }
            return;
        }
        (Value::Array(items), Shape::Array(schema)) => {
            for item in items {
                let at = Context { key: item.place.clone(), path: at.path.clone(), in_map: false };
                check(item, schema, &at, faults);
            }
            return;
        }
        (Value::String(text), Shape::Word(words)) => {
            let pattern = pattern(schema);
            let is_one = |word: &str| words.contains(&word) || pattern.is_some() && word.parse::<Function>().is_ok();
            if is_one(&text.value) {
                return;
            }
            let meant = synonym(&text.value).filter(|word| is_one(word));
            let help = match meant {
                Some(word) => Some(format!("did you mean `{word}`?")),
                None => names::suggestion(&text.value, "one of", words.iter().copied())
                    .or_else(|| pattern.map(|pattern| format!("one of: {}, or {pattern}", words.join(", ")))),
            };
            Some((format!("`{}` is not one of the words that `{}` takes", text.value, at.path), help))
        }
        (Value::Integer(integer), Shape::Integer { least, greatest }) => {
            let bound = match (least, greatest) {
                (Some(least), _) if *integer < *least => Some(format!("at least {least}")),
                (_, Some(greatest)) if *integer > *greatest => Some(format!("at most {greatest}")),
                _ => None,
            };
            match bound {
                None => return,
                Some(bound) => Some((format!("`{}` has to be {bound}", at.path), description(schema))),
            }
        }
        (Value::Float(float), Shape::Number) if float.is_finite() => return,
        (Value::String(_), Shape::String)
        | (Value::Integer(_), Shape::Number)
        | (Value::Boolean(_), Shape::Boolean) => return,
        _ => None,
    };
    let (message, help) = wrong.unwrap_or_else(|| {
        let expected = match shape {
            Shape::Word(_) | Shape::String => "a string",
            Shape::Table { .. } | Shape::Map(_) => "a table",
            Shape::Array(_) => "an array",
            Shape::Integer { .. } => "an integer",
            Shape::Number => "a finite number",
            Shape::Boolean => "true or false",
        };
        let help = match (&node.value, &shape) {
            (Value::Table(_), Shape::String) if at.in_map => {
                Some("a key with dots needs quotes: \"security.protocol\"".to_owned())
            }
            _ => description(schema),
        };
        (format!("`{}` takes {expected}, but this is {}", at.path, node.value.kind()), help)
    });
    // A table is long: its key is the better place to point at.
    let place = if matches!(node.value, Value::Table(_)) { at.key.clone() } else { node.place.clone() };
    let place = place.muted_if(node.place.is_muted());
    faults.report(&place, message, help);
    node.value = stand_in(schema);
    node.mute();
}

fn check_table(
    entries: &mut Vec<Entry>,
    properties: &Map<String, Json>,
    required: &[&str],
    at: &Context,
    faults: &mut Collector,
) {
    let mut misspelt = Vec::new();
    entries.retain(|entry| {
        let known = properties.contains_key(&entry.key);
        if !known {
            let keys = properties.keys().map(String::as_str);
            misspelt.extend(names::nearest(&entry.key, keys.clone()).map(str::to_owned));
            let help = names::suggestion(&entry.key, "known keys", keys);
            faults.report(&entry.place, format!("unknown key `{}`{}", entry.key, at.inside()), help);
        }
        known
    });
    for entry in entries.iter_mut() {
        let at = at.child(entry, false);
        check(&mut entry.node, &properties[&entry.key], &at, faults);
    }
    for key in required {
        if entries.iter().any(|entry| entry.key == *key) {
            continue;
        }
        if !misspelt.iter().any(|word| word == key) {
            let message = match at.path.as_str() {
                "" => format!("`{key}` is missing"),
                path => format!("[{path}] lacks `{key}`"),
            };
            faults.report(&at.key, message, description(&properties[*key]));
        }
        let mut node = Node { value: stand_in(&properties[*key]), place: at.key.clone() };
        node.mute();
        entries.push(Entry { key: (*key).to_owned(), place: at.key.clone(), node });
    }
}

/// A text from the environment or the command line stands for what the key takes: `partitions = "${PARTITIONS:-4}"`; and
/// a number on the command line for a text.
fn convert_text(node: &mut Node, shape: &Shape<'_>, faults: &Collector) {
    let converted = match (&node.value, shape) {
        (Value::String(text), Shape::Integer { .. }) if text.interpolated => {
            text.value.trim().parse().ok().map(Value::Integer)
        }
        (Value::String(text), Shape::Number) if text.interpolated => text.value.trim().parse().ok().map(Value::Float),
        (Value::String(text), Shape::Boolean) if text.interpolated => {
            text.value.trim().parse().ok().map(Value::Boolean)
        }
        (Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime, Shape::String | Shape::Word(_))
            if faults.is_command_line(&node.place) =>
        {
            let text = faults.written(&node.place).to_owned();
            let start = node.place.start();
            let origins = (start..=start + text.len()).collect();
            Some(Value::String(Text::new(text, origins, false)))
        }
        _ => None,
    };
    if let Some(value) = converted {
        node.value = value;
    }
}

/// Words of other systems for what driftline calls by SQL's and Kafka's.
fn synonym(word: &str) -> Option<&'static str> {
    Some(match word.to_ascii_lowercase().as_str() {
        "avg" | "average" => "mean",
        "stddev" | "stdev" | "std_dev" | "sd" => "std",
        "minimum" => "min",
        "maximum" => "max",
        "total" => "sum",
        "variance" | "var_samp" => "var",
        "earliest" | "oldest" | "first_value" => "first",
        "latest" | "newest" | "last_value" => "last",
        "per_second" => "rate",
        "trend" | "deriv" => "slope",
        "share" | "fraction" => "ratio",
        "nunique" | "uniq" | "unique" | "count_distinct" | "approx_distinct" | "cardinality" => "distinct",
        "median" => "p50",
        "most_frequent" | "top" | "top_1" | "top_k" => "mode",
        "recency" | "since_last" => "seconds_since_last",
        "int" | "integer" | "long" | "int32" | "bigint" => "int64",
        "float" | "double" | "number" | "float32" => "float64",
        "bool" => "boolean",
        "text" | "str" | "varchar" | "utf8" => "string",
        "datetime" | "date" | "timestamp_ms" => "timestamp",
        "millis" | "milliseconds" => "ms",
        "seconds" | "sec" => "s",
        "micros" | "microseconds" => "us",
        "nanos" | "nanoseconds" => "ns",
        "rfc3339" | "iso8601" => "iso",
        "gpu" => "cuda",
        "roc_auc" => "auc",
        "logloss" => "log_loss",
        _ => return None,
    })
}

/// The first sentence of what the schema says about a value.
fn description(schema: &Json) -> Option<String> {
    let text = schema.get("description").or_else(|| resolve(schema).get("description"))?.as_str()?;
    let sentence = text.split_once(". ").map_or(text, |(first, _)| first);
    Some(sentence.replace('\n', " ").trim_end_matches('.').to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::defaults;
    use super::*;

    fn default_of(table: &str, key: &str) -> Json {
        let place = match table {
            "" => format!("/properties/{key}/default"),
            table => format!("/$defs/{table}/properties/{key}/default"),
        };
        SCHEMA.pointer(&place).unwrap_or_else(|| panic!("{table}.{key} has no default")).clone()
    }

    #[test]
    fn the_schema_has_the_defaults() {
        assert_eq!(default_of("BrokerSpec", "partitions"), defaults::partitions());
        assert_eq!(default_of("BrokerSpec", "replication"), defaults::replication());
        assert_eq!(default_of("OfflineSpec", "url"), defaults::offline_url());
        assert_eq!(default_of("StateSpec", "path"), defaults::state_path());
        assert_eq!(default_of("CheckpointSpec", "rows"), defaults::checkpoint_rows());
        assert_eq!(default_of("SourceSpec", "out_of_order"), defaults::out_of_order());
        assert_eq!(default_of("SourceSpec", "ahead"), defaults::ahead());
        assert_eq!(default_of("SourceSpec", "idle_after"), defaults::idle_after());
        assert_eq!(default_of("ScoreSpec", "delivery"), "exactly_once");
        assert_eq!(default_of("ScoreSpec", "providers"), serde_json::json!(["cuda", "cpu"]));
        assert_eq!(default_of("BatchSpec", "wait"), defaults::batch_wait());
        assert_eq!(default_of("MonitorSpec", "alpha"), defaults::alpha());
        assert_eq!(default_of("RetrainingSpec", "when"), defaults::when());
        assert_eq!(default_of("GatesSpec", "metric"), "auc");
    }

    #[test]
    fn every_key_is_described() {
        let tables = SCHEMA["$defs"].as_object().unwrap().values().chain([&*SCHEMA]);
        for table in tables {
            for (key, property) in table.get("properties").and_then(Json::as_object).into_iter().flatten() {
                assert!(description(property).is_some(), "{key} has no description");
            }
        }
    }

    #[test]
    fn tables_are_closed() {
        for (name, table) in SCHEMA["$defs"].as_object().unwrap() {
            if table.get("properties").is_some() {
                assert_eq!(table["additionalProperties"], false, "{name}");
            }
        }
    }
}
