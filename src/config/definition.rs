//! The hash of a pipeline's definition: equal where the features' values are.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::plan::{Column, Emit, EmittedPlan, Plan, Span};

/// First 16 hex digits of SHA-256 over canonical JSON of all that decides feature values: entity, sources (fields, keys,
/// event time, lateness, SQL), feature groups and derived features. Where the log and the stores are is no part of it, nor
/// are topics' names and formats: the same events give the same features wherever they come from.
pub(super) fn hash(plan: &Plan) -> String {
    // serde_json writes objects in the order given here or sorted by key, depending on its features; arrays are always
    // in order, so that only they are used.
    let sources: Vec<Value> = plan
        .sources
        .iter()
        .map(|source| {
            json!([
                &*source.name,
                columns(&source.fields),
                source.key_fields.iter().map(|field| &**field).collect::<Vec<_>>(),
                &*source.event_time,
                source.event_time_unit,
                source.out_of_order.as_nanos().to_string(),
                source.ahead.as_nanos().to_string(),
                source.filter,
                source.derive.iter().map(|(c, sql)| json!([&*c.name, c.data_type, sql])).collect::<Vec<_>>(),
            ])
        })
        .collect();
    let groups: Vec<Value> = plan
        .groups
        .iter()
        .map(|group| {
            let mut parts = vec![json!([
                group.name,
                group.source,
                group.of.as_ref().map(|c| &*c.name),
                group.filter,
                group.windows.iter().map(|w| json!([w.length_ms, w.tile_ms])).collect::<Vec<_>>(),
                group.features.iter().map(|(f, w, c)| json!([f, w, &*c.name, c.data_type])).collect::<Vec<_>>(),
            ])];
            parts.extend(group.by.as_ref().map(|by| json!(["by", &*by.column.name, by.categories, by.of_feature])));
            parts.extend(group.half_life_ms.map(|half_life| json!(["decay", half_life])));
            // What is not set leaves no trace, so that definitions from before the key are still the same.
            if parts.len() == 1 { parts.remove(0) } else { Value::Array(parts) }
        })
        .collect();
    let derived: Vec<Value> =
        plan.derived.iter().map(|d| json!([&*d.column.name, d.column.data_type, d.sql])).collect();
    let mut canonical =
        vec![json!(1), json!(columns(&plan.entity.keys)), json!(sources), json!(groups), json!(derived)];
    let tables: Vec<Value> = plan
        .sources
        .iter()
        .filter_map(|source| source.table.as_ref())
        .map(|table| json!([columns(&table.columns), table.record_time, table.record_key]))
        .collect();
    if !tables.is_empty() {
        canonical.push(json!(["tables", tables]));
    }
    let lookups: Vec<Value> = plan
        .lookups
        .iter()
        .map(|lookup| {
            let keys: Vec<_> = lookup.keys.iter().map(|(key, of)| json!([&*key.name, key.data_type, &**of])).collect();
            let stored: Vec<_> = lookup.columns.iter().map(|(stored, _)| stored.clone()).collect();
            json!([lookup.name, lookup.project, lookup.view, keys, columns(&stored), lookup.max_age_ms])
        })
        .collect();
    if !lookups.is_empty() {
        canonical.push(json!(["lookups", lookups]));
    }
    // What came later is named where it differs from what was: the hashes of older pipelines stay.
    if plan.score.as_ref().is_some_and(|score| score.emit == Emit::EventTime) {
        canonical.push(json!("emit in event-time order"));
    }
    let rekeyed = plan.sources.iter().filter(|source| source.rekeyed.is_some());
    canonical.extend(rekeyed.map(|source| json!(["rekeyed", &*source.name])));
    digest(&Value::from(canonical))
}

impl Plan {
    /// As the definition, of all that decides what `[windows]` emit beyond it; empty where there are none. No feature's value
    /// depends on them, so they are no part of the definition.
    pub fn windows_definition(&self) -> String {
        if self.windows.is_empty() {
            return String::new();
        }
        let table = |windows: &EmittedPlan| {
            let span = match windows.span {
                Span::Hopping { length_ms, step_ms } => json!(["hopping", length_ms, step_ms]),
                Span::Session { gap_ms } => json!(["session", gap_ms]),
            };
            let of = windows.of.as_ref().map(|of| &*of.name);
            let functions: Vec<Value> =
                windows.functions.iter().map(|(f, column)| json!([f, &*column.name, column.data_type])).collect();
            let by = windows.by.as_ref().map(|by| json!([&*by.column.name, by.categories, by.of_feature]));
            let half_life = windows.half_life_ms;
            json!([windows.name, windows.source, of, windows.filter, span, functions, windows.early_ms, half_life, by])
        };
        digest(&json!([1, self.windows.iter().map(table).collect::<Vec<_>>()]))
    }
}

fn digest(canonical: &Value) -> String {
    hex::encode(&Sha256::digest(canonical.to_string().as_bytes())[..8])
}

fn columns(columns: &[Column]) -> Vec<Value> {
    columns.iter().map(|c| json!([&*c.name, c.data_type])).collect()
}
