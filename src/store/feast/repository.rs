//! A plan as a Feast repository, so that Feast's SDK and servers read what driftline wrote.

use std::fmt::Write as _;

use crate::config::plan::{DataType, Plan};

/// A Python module that declares the plan to Feast: one entity a join key, one feature view a feature group, one for the
/// derived features, and a feature service with the model's inputs where the plan scores.
///
/// The views have no source that Feast could materialise from: driftline writes them. Feast wants one all the same, so
/// each has a push source over a Parquet file that need not exist.
pub fn python_repository(plan: &Plan) -> String {
    let mut text = String::new();
    let name = &plan.name;
    let out = &mut text;
    put(
        out,
        format_args!(
            "\"\"\"Feast definitions of the driftline pipeline {name}. driftline writes these views online.\"\"\"\n"
        ),
    );
    put(out, format_args!("from datetime import timedelta\n"));
    put(
        out,
        format_args!("from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType"),
    );
    put(out, format_args!("from feast.types import Array, Bool, Float64, Int64, String, UnixTimestamp\n"));

    for key in &plan.entity.keys {
        let value_type = if key.data_type == DataType::Int64 { "INT64" } else { "STRING" };
        let key = quoted(&key.name);
        put(
            out,
            format_args!(
                "{} = Entity(name={key}, join_keys=[{key}], value_type=ValueType.{value_type})",
                identifier("entity", &key)
            ),
        );
    }
    let entities: Vec<_> = plan.entity.keys.iter().map(|k| identifier("entity", &k.name)).collect();
    let views = super::views(plan);
    for view in &views {
        let source = quoted(&format!("{name}_{}", view.name));
        let path = quoted(&format!("data/{name}_{}.parquet", view.name));
        // Feast's ttl of zero is 'for ever'.
        let ttl = view.max_age_ms.unwrap_or(0);
        put(out, format_args!("\n{} = FeatureView(", identifier("view", &view.name)));
        put(out, format_args!("    name={},", quoted(&view.name)));
        put(out, format_args!("    entities=[{}],", entities.join(", ")));
        put(out, format_args!("    ttl=timedelta(milliseconds={ttl}),"));
        put(out, format_args!("    schema=["));
        for column in plan.entity.keys.iter().chain(&view.columns) {
            put(
                out,
                format_args!("        Field(name={}, dtype={}),", quoted(&column.name), feast_type(column.data_type)),
            );
        }
        put(out, format_args!("    ],"));
        put(out, format_args!("    online=True,"));
        put(out, format_args!("    source=PushSource("));
        put(out, format_args!("        name={source},"));
        put(
            out,
            format_args!(
                "        batch_source=FileSource(name={}, path={path}, timestamp_field=\"event_time\"),",
                quoted(&format!("{name}_{}_file", view.name))
            ),
        );
        put(out, format_args!("    ),"));
        put(out, format_args!(")"));
    }
    if let Some(score) = &plan.score {
        put(out, format_args!("\n{} = FeatureService(", identifier("service", &score.model)));
        put(out, format_args!("    name={},", quoted(&score.model)));
        put(out, format_args!("    features=["));
        for view in &views {
            let wanted: Vec<_> = view
                .columns
                .iter()
                .filter(|c| score.features.iter().any(|f| **f == *c.name))
                .map(|c| quoted(&c.name))
                .collect();
            if !wanted.is_empty() {
                put(out, format_args!("        {}[[{}]],", identifier("view", &view.name), wanted.join(", ")));
            }
        }
        put(out, format_args!("    ],"));
        put(out, format_args!(")"));
    }
    text
}

fn put(out: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(out, "{line}").expect("writing to memory cannot fail");
}

fn feast_type(data_type: DataType) -> String {
    let plain = match data_type {
        DataType::Int64 => "Int64",
        DataType::Float64 => "Float64",
        DataType::Boolean => "Bool",
        DataType::String => "String",
        DataType::Timestamp => "UnixTimestamp",
        DataType::List(element) => return format!("Array({})", feast_type(element.into())),
    };
    plain.to_owned()
}

/// A Python string literal. JSON's escapes are Python's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A Python name for a declaration: ASCII letters, digits and underscores.
fn identifier(kind: &str, name: &str) -> String {
    let name: String =
        name.trim_matches('"').chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("{kind}_{name}")
}
