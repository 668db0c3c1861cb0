//! The rules: from what was written to a plan, with every fault on the way.
//!
//! Values that the schema's check has replaced are muted: rules read them like any other, and what they report about them
//! is dropped. What depends on something broken is not judged at all.

mod entity;
mod features;
mod lookups;
mod model;
mod rekey;
mod sources;
mod stores;
mod tables;
mod tiles;
mod windows;

use std::path::Path;
use std::time::Duration;

use super::document::{Collector, Place, Site};
use super::plan::{Column, Plan};
use super::spec::Spec;
use super::units::{self, UnitError};
use super::{names, plan};
use crate::source::expression::{Expression, ExpressionError};

/// Where a pipeline lies.
pub(super) struct Folders<'p> {
    /// Folder of `pipeline.toml`, absolute.
    pub(super) pipeline: &'p Path,
    /// The same as the user named it, for messages.
    pub(super) shown: &'p Path,
    /// The project's root, absolute.
    pub(super) root: &'p Path,
}

/// Builds the plan. `None` where something is missing that it cannot do without; a plan is only of use where the
/// collector has no faults.
pub(super) fn plan(spec: &Spec, root: &Site<'_>, folders: &Folders<'_>, faults: &mut Collector) -> Option<Plan> {
    topic_like(&spec.name, "pipeline", &root.get("name"), faults);
    // The longest suffix that driftline adds is `.monitor-state`.
    if spec.name.len() > 200 {
        faults.report(&root.get("name").value(), "the pipeline's name is longer than 200 bytes", None);
    }
    let stores = stores::stores(spec, root, folders, faults);
    let entities = entity::entities(spec, root, faults);
    let mut drafts = sources::sources(spec, root, &entities, folders, faults);
    let tables = tables::tables(spec, root, &entities, &mut drafts, faults);
    rekey::rekeyed(spec, root, &entities, &mut drafts, faults);
    let first = rekey::first_entity(spec, &drafts);
    let mut features = features::features(spec, root, (&entities, first), tables, &mut drafts, faults);
    let lookups = lookups::lookups(spec, root, &mut features, faults);
    features::derived(spec, root, true, &mut features, faults);
    let windows = windows::windows(spec, root, &entities, &mut drafts, faults);
    let labels = sources::labels(spec, root, entities.get(first), folders, faults);
    let model = model::model(spec, root, &features, faults);

    let about: Option<Vec<usize>> = drafts.iter().map(|draft| draft.entity).collect();
    let plan = Plan {
        name: spec.name.clone(),
        folder: folders.pipeline.to_owned(),
        root: folders.root.to_owned(),
        definition: String::new(),
        broker: stores.broker,
        online: stores.online,
        offline: stores.offline,
        state: stores.state,
        registry: stores.registry,
        entity: entities.get(first)?.clone(),
        others: Vec::new(),
        pipeline: None,
        sources: drafts.into_iter().map(sources::Draft::finish).collect(),
        groups: features.groups,
        derived: features.derived,
        windows,
        lookups,
        score: model.score,
        labels,
        monitor: model.monitor,
        retraining: model.retraining,
    };
    let plan = rekey::divide(plan, entities, &about?, first);
    rekey::check_emit(&plan, root, faults);
    for plan in std::iter::once(&plan).chain(plan.others.iter().map(AsRef::as_ref)) {
        features::collisions(plan, root, faults);
    }
    Some(plan)
}

/// Reports what a text's parser found, at its place within the string.
fn unit<T>(parsed: Result<T, UnitError>, site: &Site<'_>, faults: &mut Collector) -> Option<T> {
    parsed.map_err(|error| faults.report(&site.text(error.span), error.message, Some(error.help.into()))).ok()
}

/// A duration; zero where it has a fault.
fn duration(text: &str, site: &Site<'_>, faults: &mut Collector) -> Duration {
    unit(units::duration(text), site, faults).unwrap_or_default()
}

/// A duration longer than nothing.
fn some_duration(text: &str, site: &Site<'_>, faults: &mut Collector) -> Duration {
    let Some(found) = unit(units::duration(text), site, faults) else { return Duration::ZERO };
    if found.is_zero() {
        faults.report(&site.value(), "the duration has to be longer than nothing", None);
    }
    found
}

/// A name that becomes part of a topic, group or folder.
fn topic_like(name: &str, what: &str, site: &Site<'_>, faults: &mut Collector) {
    if !names::is_topic(name) {
        let help = "letters, digits, `.`, `_` and `-`, at most 249 of them";
        faults.report(&site.value(), format!("`{name}` cannot name a {what}"), Some(help.into()));
    }
}

/// A name that SQL uses as it stands. `place` is that of the name.
fn identifier(name: &str, what: &str, place: &Place, faults: &mut Collector) -> bool {
    let valid = names::is_identifier(name);
    if !valid {
        let help = "a letter, then letters, digits and `_`, so that SQL can use it as it stands";
        faults.report(place, format!("`{name}` cannot name a {what}"), Some(help.into()));
    }
    valid
}

/// Compiles SQL at its place in the file. Without columns (they are not known, for another fault) only its syntax is
/// checked. `unusable` are names that exist and cannot be used, with the reason.
fn sql(
    text: &str,
    condition: bool,
    columns: Option<&[Column]>,
    unusable: &[(String, String)],
    site: &Site<'_>,
    faults: &mut Collector,
) -> Option<Expression> {
    let compiled = match (columns, condition) {
        (None, _) => match Expression::check_syntax(text) {
            errors if errors.is_empty() => return None,
            errors => Err(errors),
        },
        (Some(columns), true) => Expression::compile_condition(text, columns),
        (Some(columns), false) => Expression::compile_all(text, columns),
    };
    let errors = match compiled {
        Ok(expression) => return Some(expression),
        Err(errors) => errors,
    };
    for ExpressionError { message, mut help, span } in errors {
        let word = text.get(span.clone()).unwrap_or_default().trim_matches('"');
        if let Some((_, reason)) = unusable.iter().find(|(name, _)| name == word) {
            help = Some(format!("`{word}` {reason}"));
        }
        faults.report(&site.text(span), message, help);
    }
    None
}

/// The index of a table among others, or a fault at the value that names it. Silent where the table itself is missing for
/// another fault.
fn reference<'a>(
    name: &str,
    kind: &str,
    known: impl IntoIterator<Item = &'a str> + Clone,
    site: &Site<'_>,
    faults: &mut Collector,
) -> Option<usize> {
    let found = known.clone().into_iter().position(|one| one == name);
    if found.is_none() {
        faults.report(
            &site.value(),
            format!("unknown {kind} `{name}`"),
            names::suggestion(name, &format!("{kind}s"), known),
        );
    }
    found
}

/// `1 window`, `2 windows`.
fn number_of(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// A column that stands for one that has a fault.
fn column(name: &str, data_type: plan::DataType) -> Column {
    Column { name: name.into(), data_type }
}
