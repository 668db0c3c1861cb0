//! What features are about.

use super::identifier;
use crate::config::document::{Collector, Site};
use crate::config::names;
use crate::config::plan::{Column, DataType, EntityPlan};
use crate::config::spec::{EntitySpec, KeyType, Spec};
use crate::window::row_columns;

/// Columns of feature rows that are neither keys nor features, so that neither can have their names.
pub(super) const ROW_COLUMNS: &[&str] = &[
    row_columns::EVENT_TIME,
    row_columns::SOURCE,
    row_columns::TOPIC,
    row_columns::PARTITION,
    row_columns::OFFSET,
    row_columns::WATERMARK,
];

pub(super) fn entities(spec: &Spec, root: &Site<'_>, faults: &mut Collector) -> Vec<EntityPlan> {
    let site = root.get("entities");
    if spec.entities.is_empty() {
        let help = "declare it: [entities.customer] with key = { customer_id = \"string\" }";
        faults.report(&site.key(), "there is no entity", Some(help.into()));
    }
    spec.entities.iter().filter_map(|(name, entity)| entity_plan(name, entity, &site.get(name), faults)).collect()
}

fn entity_plan(name: &str, entity: &EntitySpec, site: &Site<'_>, faults: &mut Collector) -> Option<EntityPlan> {
    identifier(name, "entity", &site.key(), faults);
    let key = site.get("key");
    if entity.key.is_empty() {
        faults.report(&key.key(), format!("entity `{name}` has no key"), None);
        return None;
    }
    let mut keys = Vec::new();
    for (key_name, key_type) in &entity.key {
        let site = key.get(key_name);
        identifier(key_name, "join key", &site.key(), faults);
        if ROW_COLUMNS.contains(&key_name.as_str()) {
            faults.report(&site.key(), format!("`{key_name}` is the name of another column of feature rows"), None);
        }
        let data_type = match key_type {
            KeyType::Int64 => DataType::Int64,
            KeyType::String => DataType::String,
        };
        keys.push(Column { name: key_name.as_str().into(), data_type });
    }
    Some(EntityPlan { name: name.to_owned(), keys })
}

/// The index of a named entity, or a fault.
pub(super) fn find(name: &str, entities: &[EntityPlan], site: &Site<'_>, faults: &mut Collector) -> Option<usize> {
    let names = entities.iter().map(|entity| entity.name.as_str());
    let found = names.clone().position(|known| known == name);
    if found.is_none() {
        let help = names::suggestion(name, "entities", names);
        faults.report(&site.value(), format!("unknown entity `{name}`"), help);
    }
    found
}
