//! docs/configuration.md says what is true: compared with the JSON Schema, and tried.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::*;
use crate::config::json_schema;

/// A row of one of the page's tables.
struct Row {
    key: String,
    kind: String,
    default: String,
    bounds: String,
    example: String,
}

fn rows() -> Vec<Row> {
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    include_str!("../../../../docs/configuration.md")
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| {
            let [key, kind, default, bounds, example, meaning] = cells(line).try_into().expect(line);
            assert!(!meaning.is_empty(), "{line}");
            Row { key: code(&key).expect(line).to_owned(), kind, default, bounds, example }
        })
        .collect()
}

/// The text of a cell that is code and nothing else.
fn code(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`').filter(|text| !text.contains('`'))
}

/// A key of the schema.
struct Leaf {
    schema: Json,
    required: bool,
    /// The user chooses the key's name.
    free: bool,
}

/// All keys that hold no table, with `<>` where the user chooses the name.
fn leaves() -> BTreeMap<String, Leaf> {
    fn resolve<'s>(root: &'s Json, schema: &'s Json) -> &'s Json {
        if let Some(reference) = schema["$ref"].as_str() {
            return resolve(root, root.pointer(&reference[1..]).unwrap());
        }
        let some = schema["anyOf"].as_array().and_then(|all| all.iter().find(|one| one["type"] != "null"));
        some.map_or(schema, |one| resolve(root, one))
    }
    fn walk(root: &Json, path: &str, schema: &Json, leaf: Leaf, found: &mut BTreeMap<String, Leaf>) {
        let resolved = resolve(root, schema);
        let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        if let Some(properties) = resolved["properties"].as_object() {
            for (key, property) in properties {
                let required = resolved["required"].as_array().is_some_and(|all| all.contains(&json!(key)));
                walk(root, &below(key), property, Leaf { schema: Json::Null, required, free: false }, found);
            }
        } else if resolved["additionalProperties"].is_object() {
            let leaf = Leaf { schema: Json::Null, required: false, free: true };
            walk(root, &below("<>"), &resolved["additionalProperties"], leaf, found);
        } else {
            let mut merged = resolved.clone();
            for (name, value) in schema.as_object().unwrap() {
                merged[name] = value.clone();
            }
            if let Some(items) = resolved.get("items") {
                merged["items"] = resolve(root, items).clone();
            }
            found.insert(path.to_owned(), Leaf { schema: merged, ..leaf });
        }
    }
    let root: Json = serde_json::from_str(&json_schema()).unwrap();
    let mut found = BTreeMap::new();
    walk(&root, "", &root, Leaf { schema: Json::Null, required: true, free: false }, &mut found);
    found
}

/// `sources.<source>.topic` → `sources.<>.topic`.
fn anonymous(key: &str) -> String {
    key.split('.').map(|part| if part.starts_with('<') { "<>" } else { part }).collect::<Vec<_>>().join(".")
}

/// What the page calls a schema's type.
fn kinds(schema: &Json) -> Vec<String> {
    let mut words: Vec<&str> = Vec::new();
    for one in schema["oneOf"].as_array().into_iter().flatten().chain([schema]) {
        words.extend(one["const"].as_str());
        words.extend(one["enum"].as_array().into_iter().flatten().filter_map(Json::as_str));
    }
    if !words.is_empty() {
        return vec![words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(" ")];
    }
    let kind = match &schema["type"] {
        Json::Array(kinds) => kinds.iter().find(|kind| *kind != "null").unwrap(),
        kind => kind,
    };
    let strings = ["string", "name", "path", "URL", "SQL", "duration", "size"];
    match kind.as_str().unwrap() {
        "string" => strings.map(str::to_owned).to_vec(),
        "array" => kinds(&schema["items"])
            .iter()
            .map(|kind| format!("list of {kind}{}", if strings.contains(&&**kind) { "s" } else { "" }))
            .collect(),
        other => vec![other.to_owned()],
    }
}

#[test]
fn the_page_has_all_keys_with_their_types_and_defaults() {
    let mut leaves = leaves();
    for Row { key, kind, default, bounds, .. } in rows() {
        let Some(leaf) = leaves.remove(&anonymous(&key)) else { panic!("{key} is not a key, or is there twice") };
        let expected = kinds(&leaf.schema);
        assert!(expected.contains(&kind), "{key} is {kind} on the page, and should be one of {expected:?}");
        match (leaf.schema.get("default").filter(|default| !default.is_null()), code(&default)) {
            _ if leaf.free => {}
            (Some(schema), Some(page)) => {
                assert_eq!(serde_json::from_str::<Json>(page).expect(page), *schema, "default of {key}");
            }
            (None, None) => assert_eq!(default == "required", leaf.required, "{key}"),
            (schema, _) => panic!("{key}: the default is {schema:?}, the page has {default}"),
        }
        let bounded = leaf.schema.get("minimum").is_some() || leaf.schema.get("maximum").is_some();
        let measured = matches!(&*kind, "integer" | "number" | "duration" | "size");
        assert_eq!(bounds.is_empty(), !(bounded || measured), "bounds of {key}");
    }
    assert_eq!(leaves.keys().collect::<Vec<_>>(), [""; 0], "keys that the page does not have");
}

/// Fields of the table that the page's examples are tried in.
const TABLE_FIELDS: &str = r#"{ customer_id = "string", user = "string", age = "int64", plan = "string", closed = "boolean", changed_at = "int64" }"#;

/// A pipeline in which each key can be set by itself.
struct Trial(Project);

impl Trial {
    fn new() -> Self {
        let pipeline = PIPELINE.replace("window = { rows = 2000 }\n", "").replace(", \"seconds_since_last\"]", "]");
        let pipeline = pipeline.replace("features = [\"spend_sum_30d\", \"spend_trend\"]\n", "");
        let project = Project::new(&pipeline, PURCHASE);
        let label = r#"{"type": "record", "name": "Label", "fields": [{"name": "customer_id", "type": "string"},
            {"name": "as_of", "type": "long"}, {"name": "churned", "type": "boolean"}]}"#;
        std::fs::write(project.folder().join("../../schemas/churn/label.avsc"), label).unwrap();
        let customer = r#"{"type": "record", "name": "Customer", "fields": [{"name": "customer_id", "type": "string"},
            {"name": "age", "type": "int"}]}"#;
        std::fs::write(project.folder().join("../../schemas/churn/customer.avsc"), customer).unwrap();
        Self(project)
    }

    fn faults(&self, key: &str, value: &str) -> Vec<String> {
        let key = match key {
            "sources.<source>.fields.<field>" => "sources.logins.fields.extra",
            "sources.<source>.key.<key>" => "sources.logins.key.customer_id",
            "features.<group>.by.<column>" => "features.login.by.user",
            "features.<group>.decay" => "features.login.decay",
            "windows.<table>.by.<column>" => "windows.visits.by.channel",
            "broker.properties.<property>" => "broker.properties.\"security.protocol\"",
            // The other group has tiles.
            "features.<group>.exact" => "features.login.exact",
            // Only Protobuf has messages, and needs one.
            "sources.<source>.message" | "tables.<table>.message" | "labels.message" => {
                return self.protobuf(key, value);
            }
            "tables.<table>.fields.<field>" => "tables.visits.fields.extra",
            "tables.<table>.key.<key>" => "tables.visits.key.customer_id",
            key => key,
        };
        let key = [
            ("<source>", "purchases"),
            ("<group>", "spend"),
            ("<entity>", "customer"),
            ("<key>", "customer_id"),
            ("<window>", "30d"),
            ("<feature>", "extra"),
            ("<lookup>", "item"),
            ("<column>", "extra"),
            ("<name>", "spent"),
        ]
        .iter()
        .fold(key.to_owned(), |key, (placeholder, name)| key.replace(placeholder, name));
        let key = key.replace("<table>", "visits");
        assert!(!key.contains('<'), "{key}");
        let mut set = Vec::new();
        if let Some(own) = key.strip_prefix("windows.visits.") {
            set.extend([("source", r#""purchases""#), ("of", r#""quantity""#), ("functions", r#"["count"]"#)]);
            set.push(match own {
                "hopping" => ("step", r#""1m""#),
                "step" => ("hopping", r#""1h""#),
                _ => ("tumbling", r#""1m""#),
            });
            // The kinds exclude each other.
            set.retain(|(name, _)| *name != own && !(*name == "tumbling" && own == "session"));
        }
        let mut set: Vec<_> = set.into_iter().map(|(name, value)| (format!("windows.visits.{name}"), value)).collect();
        if let Some(own) = key.strip_prefix("tables.visits.") {
            let mut table = vec![("topic", r#""t""#)];
            match own {
                "format" | "schema" => {
                    table.extend([("format", r#""avro""#), ("schema", r#""../../schemas/churn/customer.avsc""#)]);
                }
                _ => table.extend([("format", r#""json""#), ("fields", TABLE_FIELDS)]),
            }
            table.extend((own == "event_time.field").then_some(("event_time.unit", r#""ms""#)));
            table.extend((own == "event_time.unit").then_some(("event_time.field", r#""changed_at""#)));
            table.retain(|(name, _)| *name != own);
            set.extend(table.into_iter().map(|(name, value)| (format!("tables.visits.{name}"), value)));
        }
        if let Some(own) = key.strip_prefix("lookups.item.") {
            let group = [
                ("source", r#""purchases""#),
                ("of", r#""note""#),
                ("functions", r#"["last"]"#),
                ("windows", r#"["lifetime"]"#),
            ];
            set.extend(group.map(|(name, value)| (format!("features.bought.{name}"), value)));
            let lookup =
                [("key", r#"{ product_id = "bought_last_lifetime" }"#), ("features", r#"{ price = "float64" }"#)];
            let others = lookup.into_iter().filter(|(name, _)| *name != own);
            set.extend(others.map(|(name, value)| (format!("lookups.item.{name}"), value)));
            if own.starts_with("stale_") {
                set.push(("lookups.item.unavailable".to_owned(), r#""stale""#));
            }
        }
        if key.starts_with("rekey.spent.") {
            let own = [("source", r#""purchases""#), ("entity", r#""customer""#), ("key.customer_id", r#""channel""#)];
            set.extend(own.map(|(name, value)| (format!("rekey.spent.{name}"), value)));
            set.retain(|(name, _)| *name != key);
            set.push(("score.emit".to_owned(), r#""event_time""#));
        }
        let mut set: Vec<_> = set.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        set.push((&key, value));
        lines(self.0.load(&[], &set))
    }

    /// Faults besides those of the other records' schemas, which are none of Protobuf.
    fn protobuf(&self, key: &str, value: &str) -> Vec<String> {
        let key = key.replace("<source>", "purchases").replace("<table>", "visits");
        let format = key.replace("message", "format");
        let topic = key.replace("message", "topic");
        let faults = lines(self.0.load(&[], &[(&key, value), (&format, "protobuf"), (&topic, "t")]));
        faults.into_iter().filter(|fault| fault.contains("message`")).collect()
    }
}

#[test]
fn every_example_can_be_written() {
    let trial = Trial::new();
    for Row { key, example, .. } in rows() {
        let example = code(&example).unwrap_or_else(|| panic!("{key} has no example"));
        assert_eq!(trial.faults(&key, example), [""; 0], "{key} = {example}");
    }
}

#[test]
fn every_bound_holds() {
    let trial = Trial::new();
    for Row { key, kind, bounds, .. } in rows() {
        let is_text = matches!(&*kind, "duration" | "size");
        let accepted = |value: &str, expected: bool| {
            let value = if is_text { format!("\"{value}\"") } else { value.to_owned() };
            let faults = trial.faults(&key, &value);
            assert_eq!(faults.is_empty(), expected, "{key} = {value} with bounds {bounds}: {faults:?}");
        };
        let beside = |value: &str, step: i64| (value.parse::<i64>().expect("a whole bound") + step).to_string();
        if let Some((least, greatest)) = bounds.split_once(" to ") {
            accepted(least, true);
            accepted(greatest, true);
            accepted(&beside(least, -1), false);
            accepted(&beside(greatest, 1), false);
            continue;
        }
        for bound in bounds.split(" and ").filter(|bound| !bound.is_empty()) {
            match bound.split_once(' ') {
                Some((">" | "<", excluded)) => accepted(excluded, false),
                Some(("≥", least)) => {
                    accepted(least, true);
                    if !is_text {
                        accepted(&beside(least, -1), false);
                    }
                }
                Some(("≤", greatest)) => {
                    accepted(greatest, true);
                    accepted(&beside(greatest, 1), false);
                }
                _ => assert_eq!(bound, "any", "{key}"),
            }
        }
    }
}

/// docs/functions.md: each function's name, what it takes, and the type of its values.
#[test]
fn the_page_of_functions_is_true() {
    const ALL: [Option<DataType>; 6] = [
        None,
        Some(DataType::Int64),
        Some(DataType::Float64),
        Some(DataType::Boolean),
        Some(DataType::String),
        Some(DataType::Timestamp),
    ];
    let takes = |what: &str| -> Vec<Option<DataType>> {
        match what {
            "nothing" => vec![None],
            "number" => vec![Some(DataType::Int64), Some(DataType::Float64)],
            "timestamp" => vec![Some(DataType::Timestamp)],
            "boolean" => vec![Some(DataType::Boolean)],
            "any column" => ALL[1..].to_vec(),
            other => panic!("the page says `{other}`"),
        }
    };
    let mut page: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for line in include_str!("../../../../docs/functions.md").lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        for name in cells[0].split(", ").map(|name| code(name).expect(line)) {
            let types = page.entry(name.to_owned()).or_default();
            for of in cells[1].split(", ").map(|what| what.trim_start_matches("or ")).flat_map(takes) {
                let of_name = of.map_or("nothing".to_owned(), |of| of.to_string());
                let value = cells[2].replace("that of `of`", &of_name).replace("list of ", "list<");
                let value = if value.starts_with("list<") { format!("{value}>") } else { value };
                assert!(types.insert(of_name, value).is_none(), "{line}");
            }
        }
    }
    let root: Json = serde_json::from_str(&json_schema()).unwrap();
    let names = root["$defs"]["Function"]["oneOf"][0]["enum"].as_array().unwrap();
    let with_numbers = ["p1", "p50", "p99_9", "last_1", "last_20"];
    assert_eq!(page.len(), names.len() + with_numbers.len());
    for name in names.iter().map(|name| name.as_str().unwrap()).chain(with_numbers) {
        let function: Function = name.parse().unwrap();
        let types = ALL.iter().filter_map(|of| {
            let of_name = of.map_or("nothing".to_owned(), |of| of.to_string());
            function.output_type(*of).map(|value| (of_name, value.to_string()))
        });
        assert_eq!(page[name], types.collect(), "{name}");
    }
}
