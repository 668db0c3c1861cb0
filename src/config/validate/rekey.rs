//! Sources whose events are keyed anew, and the plans of several entities.

use std::sync::Arc;

use super::entity;
use super::sources::Draft;
use super::{identifier, reference, topic_like};
use crate::config::definition;
use crate::config::document::{Collector, Site};
use crate::config::plan::{Emit, EmittedPlan, EntityPlan, GroupPlan, OnlinePlan, Plan, ScorePlan};
use crate::config::spec::Spec;

/// Adds the sources that `[rekey]` makes of others.
pub(super) fn rekeyed<'d>(
    spec: &Spec,
    root: &Site<'d>,
    entities: &[EntityPlan],
    drafts: &mut Vec<Draft<'d>>,
    faults: &mut Collector,
) {
    for (name, rekey) in &spec.rekey {
        let site = root.get("rekey").get(name);
        identifier(name, "source", &site.key(), faults);
        if spec.sources.contains_key(name) || spec.tables.contains_key(name) {
            faults.report(&site.key(), format!("there is a source or a table `{name}` already"), None);
        }
        let known = spec.sources.keys().map(String::as_str);
        // The drafts of the tables come before those of the sources.
        let from =
            reference(&rekey.source, "source", known, &site.get("source"), faults).map(|at| spec.tables.len() + at);
        let entity = entity::find(&rekey.entity, entities, &site.get("entity"), faults);
        let (Some(from), Some(entity)) = (from, entity) else { continue };
        if drafts[from].entity == Some(entity) && rekey.key.is_empty() {
            let message = format!("source `{}` is keyed by entity `{}` already", rekey.source, rekey.entity);
            let help = "aggregate the source itself, or say which other field is the key";
            faults.report(&site.get("entity").value(), message, Some(help.into()));
        }
        let topic =
            rekey.topic.clone().unwrap_or_else(|| format!("{}.{}.by-{}", spec.name, rekey.source, rekey.entity));
        let place = site.get("topic");
        topic_like(&topic, "topic", &place, faults);
        if let Some(other) = drafts.iter().find(|other| other.topic() == topic) {
            let message = format!("`{topic}` is the topic of `{}`, too", other.name());
            let at = if place.is_given() { place.value() } else { site.key() };
            faults.report(&at, message, Some("give it another: topic = \"…\"".into()));
        }
        let draft = drafts[from].rekeyed((name, rekey), &topic, (entity, &entities[entity]), site, faults);
        drafts.push(draft);
    }
}

/// The entity that the pipeline is about in the first place: that of the events that ask for predictions, or else the first
/// one of which anything is computed.
pub(super) fn first_entity(spec: &Spec, drafts: &[Draft<'_>]) -> usize {
    let of = |name: &str| drafts.iter().find(|draft| draft.name() == name).and_then(|draft| draft.entity);
    let asks = spec.score.as_ref().and_then(|score| of(&score.on));
    let computed = spec.features.values().map(|group| &group.source).chain(spec.windows.values().map(|w| &w.source));
    asks.or_else(|| computed.filter_map(|source| of(source)).min()).unwrap_or(0)
}

/// Divides a plan whose sources are about several entities: each entity's plan has the sources, groups and windows about it.
/// `about` says of each source which entity it is about. An entity of which nothing is computed has no plan.
pub(super) fn divide(mut plan: Plan, entities: Vec<EntityPlan>, about: &[usize], first: usize) -> Plan {
    let part = |of: usize| {
        let own: Vec<usize> = (0..about.len()).filter(|source| about[*source] == of).collect();
        let place = |source: usize| own.iter().position(|own| *own == source);
        let groups = plan.groups.iter().filter_map(|group| {
            let source = place(group.source)?;
            Some(GroupPlan { source, ..group.clone() })
        });
        let windows = plan.windows.iter().filter_map(|windows| {
            let source = place(windows.source)?;
            Some(EmittedPlan { source, ..windows.clone() })
        });
        let score = plan.score.as_ref().and_then(|score| {
            let on = place(score.on)?;
            Some(ScorePlan { on, ..score.clone() })
        });
        let sources = own.iter().map(|source| plan.sources[*source].clone()).collect();
        (sources, groups.collect::<Vec<_>>(), windows.collect::<Vec<_>>(), score)
    };
    let mut others = Vec::new();
    for (of, entity) in entities.iter().enumerate().filter(|(of, _)| *of != first) {
        let (sources, groups, windows, _) = part(of);
        if groups.is_empty() && windows.is_empty() {
            continue;
        }
        let mut online = plan.online.clone();
        if let OnlinePlan::Embedded { path, .. } = &mut online {
            *path = path.join(format!("by-{}", entity.name));
        }
        let mut other = Plan {
            name: format!("{}.by-{}", plan.name, entity.name),
            pipeline: Some(plan.name.clone()),
            online,
            entity: entity.clone(),
            sources,
            groups,
            windows,
            derived: Vec::new(),
            lookups: Vec::new(),
            score: None,
            labels: None,
            monitor: None,
            retraining: None,
            ..plan.clone()
        };
        other.definition = definition::hash(&other);
        others.push(Arc::new(other));
    }
    let (sources, groups, windows, score) = part(first);
    plan.entity = entities[first].clone();
    (plan.sources, plan.groups, plan.windows, plan.score) = (sources, groups, windows, score);
    plan.definition = definition::hash(&plan);
    plan.others = others;
    plan
}

/// What asks for predictions is taken in event-time order where the entity's sources are keyed anew.
pub(super) fn check_emit(plan: &Plan, root: &Site<'_>, faults: &mut Collector) {
    let Some(score) = plan.score.as_ref().filter(|score| score.emit == Emit::Arrival) else { return };
    if let Some(source) = plan.sources.iter().find(|source| source.rekeyed.is_some()) {
        let site = root.get("score");
        let message = format!(
            "events of `{}` ask for predictions as they arrive, but `{}` is keyed anew: all that is about `{}` is taken in event-time order",
            plan.sources[score.on].name, source.name, plan.entity.name
        );
        let place = if site.get("emit").is_given() { site.get("emit").value() } else { site.key() };
        faults.report(&place, message, Some("set emit = \"event_time\"".into()));
    }
}
