//! Lookups: keys, features and their types, what to do without an answer.

use super::features::{Features, name_part};
use super::{column, identifier, some_duration, unit};
use crate::config::document::{Collector, Site};
use crate::config::plan::{DataType, LookupPlan, Unavailable};
use crate::config::spec::{LookupSpec, Spec};
use crate::config::units;

pub(super) fn lookups(
    spec: &Spec,
    root: &Site<'_>,
    features: &mut Features,
    faults: &mut Collector,
) -> Vec<LookupPlan> {
    let site = root.get("lookups");
    let own = spec.online.project.as_deref().unwrap_or(&spec.name);
    let known: Vec<_> =
        spec.lookups.iter().map(|(name, lookup)| keys(lookup, &site.get(name), features, faults)).collect();
    let mut plans = Vec::new();
    for ((name, lookup), keys) in spec.lookups.iter().zip(known) {
        let site = site.get(name);
        identifier(name, "lookup", &site.key(), faults);
        if lookup.features.is_empty() && !site.get("features").has_fault() {
            let help = "name them with their types: features = { price_mean_30d = \"float64\" }";
            faults.report(&site.get("features").key(), "there is nothing to look up", Some(help.into()));
        }
        let max_age_ms = lookup.max_age.as_ref().and_then(|text| {
            let max_age = unit(units::duration(text), &site.get("max_age"), faults)?;
            Some(i64::try_from(max_age.as_millis()).unwrap_or(i64::MAX))
        });
        let mut columns = Vec::new();
        for (stored, data_type) in &lookup.features {
            let feature = column(&format!("{name}_{}", name_part(stored)), *data_type);
            features.add_column(feature.clone(), &site.get("features").get(stored), faults);
            columns.push((column(stored, *data_type), feature));
        }
        plans.push(LookupPlan {
            name: name.clone(),
            project: lookup.project.clone().unwrap_or_else(|| own.to_owned()),
            view: lookup.view.clone().unwrap_or_else(|| name.clone()),
            keys,
            columns,
            max_age_ms,
            timeout: some_duration(&lookup.timeout, &site.get("timeout"), faults),
            unavailable: lookup.unavailable,
            stale_for: some_duration(&lookup.stale_for, &site.get("stale_for"), faults),
            stale_entities: lookup.stale_entities as usize,
        });
        for key in ["stale_for", "stale_entities"] {
            if lookup.unavailable != Unavailable::Stale && site.get(key).is_given() {
                let message = format!("`{key}` is about values that are used again, and these are not");
                let help = "say unavailable = \"stale\", or leave it out";
                faults.report(&site.get(key).key(), message, Some(help.into()));
            }
        }
    }
    plans
}

/// The join keys, with the row's features that have their values.
fn keys(
    spec: &LookupSpec,
    site: &Site<'_>,
    features: &Features,
    faults: &mut Collector,
) -> Vec<(crate::config::plan::Column, std::sync::Arc<str>)> {
    let site = site.get("key");
    if spec.key.is_empty() && !site.has_fault() {
        let help = "the join key and the feature that has it: key = { product_id = \"item_last_lifetime\" }";
        faults.report(&site.key(), "the entity to look up has no key", Some(help.into()));
    }
    let mut keys = Vec::new();
    for (key, feature) in &spec.key {
        let site = site.get(key);
        let Some(found) = features.find(feature, &site, faults) else { continue };
        if matches!(found.data_type, DataType::Int64 | DataType::String) {
            keys.push((column(key, found.data_type), found.name.clone()));
        } else {
            let message = format!("`{feature}` is of type {}, and join keys are int64 or string", found.data_type);
            faults.report(&site.value(), message, None);
        }
    }
    keys
}
