//! Feature groups and derived features: names, functions, windows, tiles, SQL over the feature row.

use std::collections::{BTreeSet, HashMap};

use super::entity::ROW_COLUMNS;
use super::sources::Draft;
use super::{column, identifier, number_of, reference, sql, tiles, unit};
use crate::config::document::{Collector, Site};
use crate::config::plan::{ByPlan, Column, DataType, DerivedPlan, EntityPlan, Function, GroupPlan, Plan, WindowPlan};
use crate::config::spec::{GroupSpec, Spec};
use crate::config::{names, units};
use crate::source::expression::Expression;
use crate::store::feast;
use crate::window::{EXACT, Window};

/// Name of the prediction among the columns that the monitor watches.
const SCORE: &str = "score";

/// The features, and what is not known of them for other faults.
pub(super) struct Features {
    pub(super) groups: Vec<GroupPlan>,
    pub(super) derived: Vec<DerivedPlan>,
    /// All columns so far, in order.
    columns: Vec<Column>,
    /// Features of other entities, and why they are not among the columns.
    of_others: Vec<(String, String)>,
    /// Groups some of whose features are unknown.
    broken_groups: Vec<String>,
    /// Derived features whose type is unknown.
    broken_derived: BTreeSet<String>,
    /// Names that no other feature may have, and what has them.
    taken: HashMap<String, String>,
}

impl Features {
    /// All features, in order.
    pub(super) fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// Adds a group, of which perhaps not all is known (`complete`). Reports features with the name of something else.
    fn add(
        &mut self,
        (group, complete): (GroupPlan, bool),
        of_other: Option<String>,
        (kind, site): (&str, &Site<'_>),
        taken: &mut HashMap<String, String>,
        faults: &mut Collector,
    ) {
        if !complete {
            self.broken_groups.push(group.name.clone());
        }
        for (_, _, column) in &group.features {
            if let Some(what) = taken.insert(column.name.to_string(), format!("a feature of {kind} `{}`", group.name)) {
                faults.report(&site.key(), format!("feature `{}` has the name of {what}", column.name), None);
            }
            match &of_other {
                None => self.columns.push(column.clone()),
                Some(reason) => self.of_others.push((column.name.to_string(), reason.clone())),
            }
        }
        self.groups.push(group);
    }

    /// True where the feature would perhaps exist if another fault were not there.
    pub(super) fn may_exist(&self, name: &str) -> bool {
        self.broken_derived.contains(name)
            || self
                .broken_groups
                .iter()
                .any(|group| name.strip_prefix(group.as_str()).is_some_and(|n| n.starts_with('_')))
    }

    /// Adds a feature that no group has. Reports one with the name of another.
    pub(super) fn add_column(&mut self, column: Column, site: &Site<'_>, faults: &mut Collector) {
        if self.taken.contains_key(&*column.name) {
            let what = &self.taken[&*column.name];
            faults.report(&site.key(), format!("feature `{}` has the name of {what}", column.name), None);
        }
        self.taken.insert(column.name.to_string(), "a feature of a lookup".to_owned());
        self.columns.push(column);
    }

    /// Finds a feature, or reports that there is none.
    pub(super) fn find(&self, name: &str, site: &Site<'_>, faults: &mut Collector) -> Option<&Column> {
        let found = self.columns.iter().find(|c| *c.name == *name);
        if found.is_none() && !self.may_exist(name) {
            let known = self.columns.iter().map(|c| &*c.name);
            let (message, help) = match self.of_others.iter().find(|(other, _)| other == name) {
                Some((_, reason)) => (format!("`{name}` {reason}"), None),
                None => (format!("unknown feature `{name}`"), names::suggestion(name, "features", known)),
            };
            faults.report(&site.value(), message, help);
        }
        found
    }
}

pub(super) fn features(
    spec: &Spec,
    root: &Site<'_>,
    (entities, first): (&[EntityPlan], usize),
    tables: Vec<(GroupPlan, bool)>,
    sources: &mut [Draft<'_>],
    faults: &mut Collector,
) -> Features {
    let site = root.get("features");
    if spec.features.is_empty() && spec.windows.is_empty() && spec.tables.is_empty() {
        let help = "aggregate a source: [features.spend] with source, of, functions and windows";
        faults.report(&site.key(), "there is no feature group", Some(help.into()));
    }
    let mut taken: HashMap<String, String> = HashMap::new();
    taken.extend(ROW_COLUMNS.iter().map(|name| ((*name).to_owned(), "a column of feature rows".to_owned())));
    taken.extend(entities.iter().flat_map(|e| &e.keys).map(|key| (key.name.to_string(), "a join key".to_owned())));
    taken.insert(SCORE.to_owned(), "the monitor's name for the prediction".to_owned());

    let mut features = Features {
        groups: Vec::new(),
        derived: Vec::new(),
        columns: Vec::new(),
        of_others: Vec::new(),
        broken_groups: Vec::new(),
        broken_derived: BTreeSet::new(),
        taken: HashMap::new(),
    };
    let of_other = |sources: &[Draft<'_>], source: usize| {
        let other = sources[source].entity.filter(|entity| *entity != first)?;
        Some(format!("is a feature of entity `{}`, and the row is of `{}`", entities[other].name, entities[first].name))
    };
    for (table, complete) in tables {
        let site = root.get("tables").get(&table.name);
        own_view(&table.name, &site, faults);
        let of_other = of_other(sources, table.source);
        features.add((table, complete), of_other, ("table", &site), &mut taken, faults);
    }
    for (name, group) in &spec.features {
        let site = site.get(name);
        let before = faults.count();
        identifier(name, "feature group", &site.key(), faults);
        own_view(name, &site, faults);
        if spec.tables.contains_key(name) {
            faults.report(
                &site.key(),
                format!("`{name}` is the name of a table, whose columns are features, too"),
                None,
            );
        }
        let plan = group_plan(name, group, &site, sources, faults);
        let complete = plan
            .as_ref()
            .is_some_and(|plan| plan.of.is_some() == group.of.is_some() && plan.by.is_some() != group.by.is_empty());
        let complete = faults.count() == before && !site.has_fault() && complete;
        match plan {
            Some(plan) => {
                let of_other = of_other(sources, plan.source);
                features.add((plan, complete), of_other, ("group", &site), &mut taken, faults);
            }
            None => features.broken_groups.push(name.clone()),
        }
    }
    shared_tiles(spec, &site, &features, faults);
    features.taken = taken;
    derived(spec, root, false, &mut features, faults);
    features
}

/// The names in `[derived]` of what uses features that are looked up, or others that do.
fn derived_from_lookups(spec: &Spec) -> BTreeSet<String> {
    let stored = spec.lookups.iter().flat_map(|(name, lookup)| lookup.features.keys().map(move |of| (name, of)));
    let mut looked_up: BTreeSet<String> = stored.map(|(name, of)| format!("{name}_{}", name_part(of))).collect();
    let mut found = BTreeSet::new();
    for (name, text) in &spec.derived {
        if Expression::names_in(text).iter().any(|used| looked_up.contains(used)) {
            looked_up.insert(name.clone());
            found.insert(name.clone());
        }
    }
    found
}

/// Reports a name that a Feast feature view of driftline's own has.
fn own_view(name: &str, site: &Site<'_>, faults: &mut Collector) {
    if name == feast::DERIVED_VIEW {
        faults.report(&site.key(), format!("`{name}` is the name of the derived features' own group"), None);
    }
}

/// Groups of one source read their windows from the same tiles. Reports, in the later of two groups, each window that
/// cannot. Groups with other faults are not judged: their tiles may not be what was meant.
fn shared_tiles(spec: &Spec, site: &Site<'_>, features: &Features, faults: &mut Collector) {
    let mut before: Vec<(&GroupPlan, Window)> = Vec::new();
    for group in features.groups.iter().filter(|group| !features.broken_groups.contains(&group.name)) {
        let site = site.get(&group.name);
        let tiling = |window: &Window| match window.is_exact() {
            true => "without tiles".to_owned(),
            false => format!("in tiles of {}", units::label_ms(window.tile)),
        };
        let own: Vec<Window> = group
            .windows
            .iter()
            .filter_map(|window| {
                let (label, tile) = (window.label.clone(), window.tile_ms);
                window.length_ms.map(|length| Window { label, length, tile })
            })
            .collect();
        for window in &own {
            let others = before.iter().filter(|(other, _)| other.source == group.source);
            let Some((other, theirs)) = others.clone().find(|(_, theirs)| !window.shares_with(theirs)) else {
                continue;
            };
            let fits = |tile: i64| {
                let tiled = Window { tile, ..window.clone() };
                let neighbours = own.iter().filter(|own| own.length != window.length);
                others.clone().map(|(_, theirs)| theirs).chain(neighbours).all(|theirs| tiled.shares_with(theirs))
            };
            let help = match tiles::fitting_tile(window.length, fits) {
                _ if window.is_exact() => format!("give window `{}` another length", window.label),
                Some(tile) => format!("tile = {{ \"{}\" = \"{}\" }} would do", window.label, units::label_ms(tile)),
                None => format!("give window `{}` of group `{}` another tile", theirs.label, other.name),
            };
            let written = site.get("tile").get(&window.label);
            let listed = spec.features[&group.name].windows.iter().position(|label| *label == window.label);
            let place = match listed {
                Some(index) if !written.is_given() => site.get("windows").item(index).value(),
                _ => written.value(),
            };
            let message = format!(
                "window `{}` {} and window `{}` of group `{}` {} cannot share state: {}",
                window.label,
                tiling(window),
                theirs.label,
                other.name,
                tiling(theirs),
                if window.is_exact() || theirs.is_exact() {
                    "the exact one has to be longer by a tile at least, or not longer"
                } else {
                    "one tile has to divide the other, and the longer window's be the larger"
                }
            );
            faults.report(&place, message, Some(help));
        }
        before.extend(own.into_iter().map(|window| (group, window)));
    }
}

/// Adds the derived features: those that use what is looked up, which has been added by then, or the others.
pub(super) fn derived(spec: &Spec, root: &Site<'_>, looked_up: bool, features: &mut Features, faults: &mut Collector) {
    let from_lookups = derived_from_lookups(spec);
    for (name, text) in spec.derived.iter().filter(|(name, _)| from_lookups.contains(*name) == looked_up) {
        let site = root.get("derived").get(name);
        identifier(name, "feature", &site.key(), faults);
        if let Some(what) = features.taken.insert(name.clone(), "another derived feature".to_owned()) {
            faults.report(&site.key(), format!("derived feature `{name}` has the name of {what}"), None);
        }
        let mut later: Vec<(String, String)> = spec
            .derived
            .keys()
            .skip_while(|other| *other != name)
            .map(|other| (other.clone(), "is not derived yet: move it before this one".to_owned()))
            .collect();
        later.extend(features.of_others.iter().cloned());
        // There are no functions that could take one.
        let (lists, columns): (Vec<&Column>, Vec<&Column>) =
            features.columns.iter().partition(|column| column.data_type.is_list());
        let reason = "is a list, of which SQL here has no functions";
        later.extend(lists.into_iter().map(|list| (list.name.to_string(), reason.to_owned())));
        let columns: Vec<Column> = columns.into_iter().cloned().collect();
        let unknown: Vec<String> = Expression::names_in(text)
            .into_iter()
            .filter(|used| !features.columns.iter().any(|c| *c.name == **used) && features.may_exist(used))
            .collect();
        let expression = if unknown.is_empty() {
            sql(text, false, Some(&columns), &later, &site, faults)
        } else {
            // Any type will do: all that is found this way are names that surely do not exist.
            let guessed = unknown.iter().map(|name| column(name, DataType::Float64));
            let columns: Vec<Column> = columns.into_iter().chain(guessed).collect();
            for error in Expression::compile_all(text, &columns).err().into_iter().flatten() {
                if error.message.starts_with("unknown ") {
                    faults.report(&site.text(error.span), error.message, error.help);
                }
            }
            None
        };
        match expression {
            Some(expression) => {
                let column = column(name, expression.data_type());
                features.columns.push(column.clone());
                features.derived.push(DerivedPlan { column, sql: text.clone(), looked_up });
            }
            None => {
                features.broken_derived.insert(name.clone());
            }
        }
    }
}

fn group_plan(
    name: &str,
    spec: &GroupSpec,
    site: &Site<'_>,
    sources: &mut [Draft<'_>],
    faults: &mut Collector,
) -> Option<GroupPlan> {
    let (source, of) = events(spec, site, sources, faults);
    let by = source.and_then(|source| categories(spec, &mut sources[source], &site.get("by"), faults));
    let half_life_ms = half_life(spec, &site.get("decay"), faults);
    functions(spec, of.as_ref(), &site.get("functions"), faults);
    let windows = windows(spec, site, faults);

    let mut plan = GroupPlan {
        name: name.to_owned(),
        source: source?,
        of,
        filter: spec.filter.clone(),
        half_life_ms,
        by,
        windows,
        features: Vec::new(),
    };
    let mut features = Vec::new();
    let mut of_feature = Vec::new();
    let mut functions: Vec<Function> = Vec::new();
    for function in &spec.functions {
        if functions.contains(function) {
            continue;
        }
        functions.push(*function);
        let Some(data_type) = plan.output_type(*function) else { continue };
        let parts = match &plan.by {
            Some(by) => by.categories.iter().map(|category| format!("{}_", name_part(category))).collect(),
            None => vec![String::new()],
        };
        for (category, part) in parts.iter().enumerate() {
            for (index, window) in plan.windows.iter().enumerate() {
                let feature = format!("{name}_{function}_{part}{}", window.label);
                features.push((*function, index, column(&feature, data_type)));
                of_feature.push(category);
            }
        }
    }
    plan.features = features;
    plan.by = plan.by.map(|by| ByPlan { of_feature, ..by });
    Some(plan)
}

/// The source and the column that are aggregated, where they are known; the condition is checked, too.
pub(super) fn events(
    spec: &GroupSpec,
    site: &Site<'_>,
    sources: &mut [Draft<'_>],
    faults: &mut Collector,
) -> (Option<usize>, Option<Column>) {
    let place = site.get("source");
    if sources.iter().any(|source| source.table().is_some() && source.name() == spec.source) {
        let help = format!("its columns are features already: `{}_<column>`", spec.source);
        faults.report(&place.value(), format!("`{}` is a table: it has no windows", spec.source), Some(help));
        return (None, None);
    }
    let tables = sources.iter().filter(|source| source.table().is_some()).count();
    let known: Vec<String> = sources[tables..].iter().map(|source| source.name().to_owned()).collect();
    let source = reference(&spec.source, "source", known.iter().map(String::as_str), &place, faults);
    let source = source.map(|source| tables + source);
    let of = match (source, &spec.of) {
        (Some(source), Some(of)) => sources[source].column(of, &site.get("of"), faults),
        _ => None,
    };
    if let Some(filter) = &spec.filter {
        let place = site.get("where");
        let columns = source.and_then(|source| sources[source].columns());
        let unusable = source.map(|source| sources[source].unusable().to_vec()).unwrap_or_default();
        let compiled = sql(filter, true, columns.as_deref(), &unusable, &place, faults);
        if let (Some(compiled), Some(source)) = (compiled, source) {
            sources[source].uses(compiled.columns());
        }
    }
    (source, of)
}

/// The half-life of a group's events, in milliseconds.
pub(super) fn half_life(spec: &GroupSpec, site: &Site<'_>, faults: &mut Collector) -> Option<i64> {
    let half_life = unit(units::duration(spec.decay.as_ref()?), site, faults)?;
    let milliseconds = i64::try_from(half_life.as_millis()).ok().filter(|milliseconds| *milliseconds > 0);
    if milliseconds.is_none() {
        faults.report(&site.value(), "a half-life is at least 1ms", Some("such as decay = \"7d\"".into()));
    }
    milliseconds
}

/// The column and the categories of a group, without its features.
pub(super) fn categories(
    spec: &GroupSpec,
    source: &mut Draft<'_>,
    site: &Site<'_>,
    faults: &mut Collector,
) -> Option<ByPlan> {
    let (name, categories) = spec.by.first()?;
    if let Some((other, _)) = spec.by.get_index(1) {
        let help = format!("derive one that has both: {name} || '_' || {other}");
        faults.report(&site.get(other).key(), "a group has one column of categories", Some(help));
    }
    let site = site.get(name);
    let column = source.column(name, &site, faults)?;
    if categories.is_empty() {
        faults.report(&site.value(), "there are no categories", Some(format!("list them: {name} = [\"…\"]")));
    }
    let mut found: Vec<String> = Vec::new();
    for (index, category) in categories.iter().enumerate() {
        let site = site.item(index);
        let problem = match column.data_type {
            DataType::String => None,
            DataType::Int64 => category.parse::<i64>().err().map(|_| "is no integer"),
            DataType::Boolean => category.parse::<bool>().err().map(|_| "is neither true nor false"),
            DataType::Float64 | DataType::Timestamp | DataType::List(_) => Some("cannot be a category"),
        };
        if let Some(problem) = problem {
            let message = format!("`{category}` {problem}: `{name}` is of type {}", column.data_type);
            faults.report(&site.value(), message, None);
        } else if category.is_empty() {
            faults.report(&site.value(), "an empty text names no feature", Some("derive another text for it".into()));
        } else if let Some(other) = found.iter().find(|other| name_part(other) == name_part(category)) {
            let message = format!("features of `{category}` would have the names of those of `{other}`");
            faults.report(&site.value(), message, Some(format!("both are called `{}` in names", name_part(category))));
        } else {
            found.push(category.clone());
        }
    }
    Some(ByPlan { column, categories: found, of_feature: Vec::new() })
}

/// A category or column within the name of a feature: SQL can use it as it stands.
pub(super) fn name_part(category: &str) -> String {
    category.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

pub(super) fn functions(spec: &GroupSpec, of: Option<&Column>, site: &Site<'_>, faults: &mut Collector) {
    if spec.functions.is_empty() {
        faults.report(&site.key(), "there is nothing to compute: `functions` is empty", None);
    }
    for (index, function) in spec.functions.iter().enumerate() {
        let site = site.item(index);
        if spec.functions[..index].contains(function) {
            faults.report(&site.value(), format!("`{function}` is asked for twice"), None);
        } else if spec.of.is_none() && function.output_type(None).is_none() {
            let help = "say which: of = \"amount\"";
            faults.report(&site.value(), format!("`{function}` needs a column to aggregate"), Some(help.into()));
        } else if let Some(of) = of
            && function.output_type(Some(of.data_type)).is_none()
        {
            let help = match of.data_type {
                _ if *function == Function::Ratio => {
                    let source = &spec.source;
                    format!("it takes a condition: derive a boolean column of source `{source}` first")
                }
                DataType::Boolean => format!("derive a number from it first: cast({} as int)", of.name),
                _ => "count, first, last and seconds_since_last take any type".to_owned(),
            };
            faults.report(
                &site.value(),
                format!("there is no {function} of `{}`, which is of type {}", of.name, of.data_type),
                Some(help),
            );
        } else if spec.decay.is_some() && function.decayed_type(of.map(|of| of.data_type)).is_none() {
            let help = "only count, sum and mean can: ask for it in a group without `decay`";
            faults.report(&site.value(), format!("`{function}` cannot decay"), Some(help.into()));
        } else if function.needs_length()
            && let Some(label) = spec.windows.iter().find(|label| matches!(units::window(label), Ok(None)))
        {
            let message = format!("a `{label}` has no length, and so no {function}");
            faults.report(&site.value(), message, Some("ask for it in a group without a lifetime".into()));
        }
    }
}

/// The windows, shortest first, with their tiles.
fn windows(spec: &GroupSpec, site: &Site<'_>, faults: &mut Collector) -> Vec<WindowPlan> {
    let windows_site = site.get("windows");
    if spec.windows.is_empty() {
        faults.report(&windows_site.key(), "there is nothing to compute: `windows` is empty", None);
    }
    let mut windows: Vec<WindowPlan> = Vec::new();
    for (index, label) in spec.windows.iter().enumerate() {
        let site = windows_site.item(index);
        let Some(length_ms) = unit(units::window(label), &site, faults) else { continue };
        match windows.iter().find(|window| window.length_ms == length_ms) {
            Some(same) => {
                let message = format!("window `{label}` is as long as `{}`", same.label);
                faults.report(&site.value(), message, Some("leave one out".into()));
            }
            None => windows.push(WindowPlan { label: label.clone(), length_ms, tile_ms: 0 }),
        }
    }
    windows.sort_by_key(|window| window.length_ms.unwrap_or(i64::MAX));

    let tile_site = site.get("tile");
    if spec.exact {
        if !windows.is_empty() && windows.iter().all(|window| window.length_ms.is_none()) {
            let message = "a lifetime has no tail that could be exact";
            faults.report(&site.get("exact").key(), message, Some("leave `exact` out".into()));
        }
        if let Some(label) = spec.tile.keys().next() {
            let help = "leave out `tile`, or make a group without `exact` for the windows with tiles";
            faults.report(&tile_site.get(label).key(), "exact windows have no tiles", Some(help.into()));
        }
        for window in windows.iter_mut().filter(|window| window.length_ms.is_some()) {
            window.tile_ms = EXACT;
        }
        return windows;
    }
    for label in spec.tile.keys().filter(|label| !windows.iter().any(|window| window.label == **label)) {
        if !windows_site.has_fault() {
            let help = names::suggestion(label, "windows", windows.iter().map(|window| window.label.as_str()));
            faults.report(&tile_site.get(label).key(), format!("`{label}` is not one of the windows"), help);
        }
    }
    let mut larger: Option<(i64, String)> = None;
    for window in windows.iter_mut().rev() {
        let site = tile_site.get(&window.label);
        let written = spec.tile.get(&window.label);
        let Some(length) = window.length_ms else {
            if written.is_some() {
                faults.report(&site.key(), "a lifetime has no tail, and so no tiles", None);
            }
            continue;
        };
        window.tile_ms = match written {
            None => tiles::default_tile(length, larger.as_ref().map(|(tile, _)| *tile)),
            Some(text) => tile(text, length, larger.as_ref(), &site, faults)
                .unwrap_or_else(|| tiles::default_tile(length, larger.as_ref().map(|(tile, _)| *tile))),
        };
        let count = length / window.tile_ms;
        if count > tiles::MAX_TILES {
            let place = if written.is_some() { site.value() } else { windows_site.value() };
            let help = format!("at most {}: set tile = {{ \"{}\" = \"…\" }}", tiles::MAX_TILES, window.label);
            let message = format!(
                "window `{}` has {}",
                window.label,
                number_of(usize::try_from(count).unwrap_or(usize::MAX), "tile")
            );
            faults.report(&place, message, Some(help));
        }
        larger = Some((window.tile_ms, window.label.clone()));
    }
    windows
}

/// A tile that was written, in milliseconds, where it keeps the rules.
fn tile(
    text: &str,
    window: i64,
    larger: Option<&(i64, String)>,
    site: &Site<'_>,
    faults: &mut Collector,
) -> Option<i64> {
    let Some(length) = unit(units::window(text), site, faults)? else {
        faults.report(&site.value(), "a tile has a length", None);
        return None;
    };
    let suggested = units::label_ms(tiles::default_tile(window, larger.map(|(tile, _)| *tile)));
    let message = match larger {
        _ if window % length != 0 => {
            format!("the tile `{text}` does not divide the window `{}`", units::label_ms(window))
        }
        _ if !tiles::fits_days(length) => format!("the tile `{text}` neither divides a day nor is a number of days"),
        Some((tile, label)) if tile % length != 0 => {
            format!(
                "the tile `{text}` does not divide the tile `{}` of the larger window `{label}`",
                units::label_ms(*tile)
            )
        }
        _ => return Some(length),
    };
    faults.report(&site.value(), message, Some(format!("`{suggested}` would do")));
    None
}

/// Feast keeps features under 32-bit hashes of their names; two that collide would overwrite each other.
pub(super) fn collisions(plan: &Plan, root: &Site<'_>, faults: &mut Collector) {
    for collision in feast::field_collisions(&feast::views(plan)) {
        let (view, feature) = &collision.second;
        let site = match view {
            view if view == feast::DERIVED_VIEW => root.get("derived").get(feature),
            view if plan.sources.iter().any(|source| source.table.is_some() && *source.name == **view) => {
                root.get("tables").get(view)
            }
            view => root.get("features").get(view),
        };
        // The same name twice is reported as that.
        if collision.first.1 != *feature {
            let message =
                format!("feature `{feature}` would share a field of the online store with `{}`", collision.first.1);
            faults.report(
                &site.key(),
                message,
                Some("rename one of the two: Feast's hash of their names is the same".into()),
            );
        }
    }
}
