//! Tables: which of their columns are features, and how their records' keys are read.

use super::column;
use super::features::name_part;
use super::sources::Draft;
use crate::config::document::{Collector, Site};
use crate::config::plan::{Column, DataType, EntityPlan, Function, GroupPlan, RecordKey, TablePlan, WindowPlan};
use crate::config::spec::{Spec, TableSpec};

/// Makes the first drafts, which are those of the tables, tables. Returns each one's feature group, and whether all of it is
/// known.
pub(super) fn tables(
    spec: &Spec,
    root: &Site<'_>,
    entities: &[EntityPlan],
    drafts: &mut [Draft<'_>],
    faults: &mut Collector,
) -> Vec<(GroupPlan, bool)> {
    let mut groups = Vec::new();
    let registry = spec.broker.schema_registry.as_deref();
    for (source, ((name, table), draft)) in spec.tables.iter().zip(drafts).enumerate() {
        let site = root.get("tables").get(name);
        let before = faults.count();
        if spec.sources.contains_key(name) {
            faults.report(&site.key(), format!("`{name}` is the name of a source, too"), None);
        }
        let known = draft.columns();
        let columns = columns(table, known.as_deref(), draft, &site.get("columns"), faults);
        if columns.is_empty() && known.is_some() && faults.count() == before {
            let help = "a column besides the keys and the event time";
            faults.report(&site.key(), format!("table `{name}` has no column"), Some(help.into()));
        }
        let entity = draft.entity.map(|entity| &entities[entity]);
        let record_key = record_key(table, entity, registry, &site.get("record_key"), faults);
        let of_column = |of: &Column| {
            let feature = format!("{name}_{}", name_part(&of.name));
            (Function::Last, 0, column(&feature, of.data_type))
        };
        groups.push((
            GroupPlan {
                name: name.clone(),
                source,
                of: None,
                filter: None,
                half_life_ms: None,
                by: None,
                windows: vec![WindowPlan { label: "newest".into(), length_ms: None, tile_ms: 0 }],
                features: columns.iter().map(of_column).collect(),
            },
            known.is_some() && faults.count() == before && !site.has_fault(),
        ));
        draft.set_table(TablePlan { columns, record_time: table.event_time.is_none(), record_key });
    }
    groups
}

/// The columns that are features.
fn columns(
    spec: &TableSpec,
    known: Option<&[Column]>,
    draft: &mut Draft<'_>,
    site: &Site<'_>,
    faults: &mut Collector,
) -> Vec<Column> {
    let Some(named) = &spec.columns else {
        let facts = known.unwrap_or_default().iter().filter(|column| !draft.is_coordinate(&column.name));
        return facts.cloned().collect();
    };
    let mut found: Vec<Column> = Vec::new();
    for (index, name) in named.iter().enumerate() {
        let site = site.item(index);
        if named[..index].contains(name) {
            faults.report(&site.value(), format!("`{name}` is listed twice"), None);
        } else if draft.is_coordinate(name) {
            let help = "a row has its entity's keys and its event time anyway";
            faults.report(
                &site.value(),
                format!("`{name}` is no fact but the table's key or event time"),
                Some(help.into()),
            );
        } else {
            found.extend(draft.column(name, &site, faults));
        }
    }
    found
}

fn record_key(
    spec: &TableSpec,
    entity: Option<&EntityPlan>,
    registry: Option<&str>,
    site: &Site<'_>,
    faults: &mut Collector,
) -> RecordKey {
    let keys = entity.map(|entity| entity.keys.as_slice()).unwrap_or_default();
    let problem = match (spec.record_key, keys) {
        (None, [_, _, ..]) => return RecordKey::Json,
        (None, _) => return RecordKey::Text,
        (Some(RecordKey::Text | RecordKey::Long), [_, _, ..]) => Some("holds one join key, and the entity has several"),
        (Some(RecordKey::Long), [key]) if key.data_type != DataType::Int64 => {
            Some("is an integer, and the join key is not")
        }
        (Some(RecordKey::Avro), [_, _, ..]) if registry.is_none_or(str::is_empty) => {
            Some("of several join keys has the schema that [broker] schema_registry knows, and there is none")
        }
        _ => None,
    };
    if let Some(problem) = problem {
        let help = "with record_key = \"json\" it is an object with the fields of the join keys";
        faults.report(&site.value(), format!("such a key {problem}"), Some(help.into()));
    }
    spec.record_key.unwrap_or(RecordKey::Text)
}
