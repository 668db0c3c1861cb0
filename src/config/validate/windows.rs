//! Windows that are emitted when they close: their kind, functions and topic.

use std::collections::HashMap;

use indexmap::IndexMap;

use super::features::{categories, events, functions, half_life, name_part};
use super::sources::Draft;
use super::{column, identifier, some_duration, topic_like};
use crate::config::document::{Collector, Site};
use crate::config::plan::{ByPlan, Column, EmittedPlan, EntityPlan, Function, Span};
use crate::config::spec::{GroupSpec, Spec, WindowSpec};
use crate::config::units;
use crate::window::emitted_columns;

pub(super) fn windows(
    spec: &Spec,
    root: &Site<'_>,
    entities: &[EntityPlan],
    sources: &mut [Draft<'_>],
    faults: &mut Collector,
) -> Vec<EmittedPlan> {
    let site = root.get("windows");
    let mut topics: HashMap<String, String> = HashMap::new();
    let mut plans = Vec::new();
    for (name, window) in &spec.windows {
        let site = site.get(name);
        identifier(name, "window", &site.key(), faults);
        let topic = match &window.topic {
            Some(topic) => {
                topic_like(topic, "topic", &site.get("topic"), faults);
                topic.clone()
            }
            None => format!("{}.windows.{name}", spec.name),
        };
        if sources.iter().any(|source| source.topic() == topic) {
            let message = format!("`{topic}` is the topic of a source: what is emitted would be read again");
            faults.report(&site.get("topic").value(), message, None);
        }
        if let Some(other) = topics.insert(topic.clone(), name.clone()) {
            faults.report(&site.get("topic").value(), format!("window `{other}` has the topic `{topic}`, too"), None);
        }
        plans.extend(window_plan(name, window, topic, &site, entities, sources, faults));
    }
    plans
}

fn window_plan(
    name: &str,
    spec: &WindowSpec,
    topic: String,
    site: &Site<'_>,
    entities: &[EntityPlan],
    sources: &mut [Draft<'_>],
    faults: &mut Collector,
) -> Option<EmittedPlan> {
    let group = GroupSpec {
        source: spec.source.clone(),
        of: spec.of.clone(),
        functions: spec.functions.clone(),
        windows: Vec::new(),
        filter: spec.filter.clone(),
        decay: spec.decay.clone(),
        by: spec.by.clone(),
        tile: IndexMap::new(),
        exact: false,
    };
    let (source, of) = events(&group, site, sources, faults);
    let by = source.and_then(|source| categories(&group, &mut sources[source], &site.get("by"), faults));
    let half_life_ms = half_life(&group, &site.get("decay"), faults);
    functions(&group, of.as_ref(), &site.get("functions"), faults);
    let (computed, of_feature) = columns(&group, of.as_ref(), by.as_ref());
    for (index, (function, column)) in computed.iter().enumerate() {
        // The parts of a name can be cut in two ways: `p99` of `9_1`, and `p99_9` of `1`.
        if let Some((other, _)) = computed[..index].iter().find(|(_, other)| other.name == column.name) {
            let message = format!("`{function}` and `{other}` would both give a column `{}`", column.name);
            faults.report(&site.get("functions").value(), message, None);
        }
    }
    let entity = source.and_then(|source| sources[source].entity).map(|entity| &entities[entity]);
    for key in entity.iter().flat_map(|entity| &entity.keys) {
        let taken = emitted_columns::ALL.contains(&&*key.name) || computed.iter().any(|(_, c)| c.name == key.name);
        if taken {
            let message =
                format!("the rows of this window would have two columns `{}`: it is a join key, too", key.name);
            faults.report(&site.key(), message, Some("call the join key by another name".into()));
        }
    }
    let span = span(spec, site, faults)?;
    let early_ms = spec.early.as_ref().map(|early| milliseconds(early, &site.get("early"), faults));
    let known = spec.of.is_some() == of.is_some() && spec.by.is_empty() == by.is_none();
    let source = source.filter(|_| known)?;
    Some(EmittedPlan {
        name: name.to_owned(),
        source,
        of,
        filter: spec.filter.clone(),
        span,
        half_life_ms,
        by: by.map(|by| ByPlan { of_feature, ..by }),
        functions: computed,
        early_ms,
        topic: topic.into(),
    })
}

/// The functions with their columns, and for each of them its category.
fn columns(group: &GroupSpec, of: Option<&Column>, by: Option<&ByPlan>) -> (Vec<(Function, Column)>, Vec<usize>) {
    let of = of.map(|of| of.data_type);
    let (mut computed, mut of_feature) = (Vec::new(), Vec::new());
    for (index, function) in group.functions.iter().enumerate() {
        let decays = group.decay.is_some();
        let data_type = if decays { function.decayed_type(of) } else { function.output_type(of) };
        let Some(data_type) = data_type.filter(|_| !group.functions[..index].contains(function)) else { continue };
        let names: Vec<String> = match by {
            Some(by) => by.categories.iter().map(|category| format!("{function}_{}", name_part(category))).collect(),
            None => vec![function.to_string()],
        };
        for (category, name) in names.iter().enumerate() {
            computed.push((*function, column(name, data_type)));
            of_feature.push(category);
        }
    }
    (computed, of_feature)
}

fn span(spec: &WindowSpec, site: &Site<'_>, faults: &mut Collector) -> Option<Span> {
    let help = || Some("one of tumbling = \"1m\"; hopping = \"1h\" with step = \"5m\"; session = \"30m\"".to_owned());
    let kinds = [&spec.tumbling, &spec.hopping, &spec.session];
    match kinds.iter().filter(|kind| kind.is_some()).count() {
        0 => faults.report(&site.key(), "what kind of window this is has to be said", help()),
        1 => {}
        _ => faults.report(&site.key(), "a window is of one kind", help()),
    }
    if spec.step.is_some() && spec.hopping.is_none() {
        faults.report(&site.get("step").key(), "only hopping windows have a step", help());
    }
    if let Some(text) = &spec.session {
        return Some(Span::Session { gap_ms: milliseconds(text, &site.get("session"), faults) });
    }
    if let Some(text) = &spec.tumbling {
        let length_ms = milliseconds(text, &site.get("tumbling"), faults);
        return Some(Span::Hopping { length_ms, step_ms: length_ms });
    }
    let length_ms = milliseconds(spec.hopping.as_ref()?, &site.get("hopping"), faults);
    let Some(step) = &spec.step else {
        faults.report(&site.get("hopping").key(), "a hopping window needs a step", help());
        return None;
    };
    let step_ms = milliseconds(step, &site.get("step"), faults);
    if length_ms % step_ms != 0 {
        let message = format!("the step {} does not divide the window {}", step, units::label_ms(length_ms));
        faults.report(&site.get("step").value(), message, Some("an event is in as many windows as steps fit".into()));
        return None;
    }
    Some(Span::Hopping { length_ms, step_ms })
}

/// A duration of whole milliseconds; one where it has a fault.
fn milliseconds(text: &str, site: &Site<'_>, faults: &mut Collector) -> i64 {
    let duration = some_duration(text, site, faults);
    if !duration.subsec_nanos().is_multiple_of(1_000_000) {
        faults.report(&site.value(), "event time has milliseconds, and no parts of them", None);
    }
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).max(1)
}
