//! The plan in words, for `driftline check`.

use std::fmt::Write as _;

use super::plan::{
    BrokerPlan, Emit, Format, GroupPlan, GroupProtocol, MonitorWindow, OnlinePlan, Plan, SourcePlan, Span, Unavailable,
};
use super::units::{label, label_bytes, label_ms};
use crate::window::{EXACT, state_bytes};

impl Plan {
    /// Describes the plan for a person: where things are, sources, windows and their tiles, features, state, topics, and
    /// what is watched and retrained. Shows no secrets.
    pub fn explain(&self) -> String {
        let mut out = format!("pipeline {} (definition {})\n", self.name, self.definition);
        self.explain_places(&mut out);
        self.explain_sources(&mut out);
        self.explain_features(&mut out);
        self.explain_windows(&mut out);
        for other in &self.others {
            other.explain_sources(&mut out);
            other.explain_features(&mut out);
            other.explain_windows(&mut out);
        }
        self.explain_topics(&mut out);
        self.explain_model(&mut out);
        out
    }

    fn explain_places(&self, out: &mut String) {
        let log = match &self.broker {
            BrokerPlan::Kafka { brokers, schema_registry, partitions, group_protocol, .. } => {
                let registry = schema_registry.as_deref().map(|r| format!(", schemas at {r}")).unwrap_or_default();
                let groups = match group_protocol {
                    GroupProtocol::Classic => "",
                    GroupProtocol::Consumer => ", groups by Kafka 4's own protocol",
                };
                format!("Kafka at {brokers}{registry}{groups}; new topics get {partitions} partitions")
            }
            BrokerPlan::Embedded { path, partitions } => {
                format!("embedded in {}; new topics get {partitions} partitions", path.display())
            }
        };
        let online = match &self.online {
            OnlinePlan::Redis { project, ttl, .. } => {
                let ttl = ttl.map_or("kept for good".to_owned(), |ttl| format!("expire after {}", label(ttl)));
                format!("Redis, Feast project {project}; rows {ttl}")
            }
            OnlinePlan::Embedded { path, project } => {
                format!("embedded in {}, Feast project {project}", path.display())
            }
            OnlinePlan::Off => "none".to_owned(),
        };
        let what = match self.offline.rows {
            true => format!(" or {} rows", self.offline.checkpoint_rows),
            false => ", of the state alone".to_owned(),
        };
        let offline = format!(
            "{}/{}; a checkpoint every {}{what}",
            self.offline.url.trim_end_matches('/'),
            self.name,
            label(self.offline.checkpoint_interval),
        );
        for (what, place) in
            [("log", &log), ("online", &online), ("offline", &offline), ("registry", &self.registry.url)]
        {
            let _ = writeln!(out, "  {what:<9} {place}");
        }
        if let Some(memory) = self.state.memory {
            let _ = writeln!(
                out,
                "  state     {} in memory, the rest in {}",
                label_bytes(memory),
                self.state.path.display()
            );
        }
    }

    fn explain_sources(&self, out: &mut String) {
        let keys: Vec<String> =
            self.entity.keys.iter().map(|key| format!("{} ({})", key.name, key.data_type)).collect();
        let _ = writeln!(out, "\nentity {} by {}\n\nsources", self.entity.name, keys.join(", "));
        for source in &self.sources {
            let format = match source.format {
                Format::Json => "JSON",
                Format::Avro { .. } => "Avro",
                Format::Protobuf { .. } => "Protobuf",
            };
            let fields: Vec<&str> = source.fields.iter().map(|field| &*field.name).collect();
            let (name, table) = (&source.name, if source.table.is_some() { " (table)" } else { "" });
            let _ = writeln!(out, "  {name}{table}: topic {}, {format}; uses {}", source.topic, fields.join(", "));
            if let Some(rekeyed) = &source.rekeyed {
                let partitions = rekeyed.partitions.map_or("as many".to_owned(), |partitions| partitions.to_string());
                let kept =
                    rekeyed.retention.map_or("for ever".to_owned(), |retention| format!("for {}", label(retention)));
                let _ = writeln!(
                    out,
                    "    the events of {} keyed by {}, {partitions} partitions, kept {kept}; taken in event-time order",
                    rekeyed.from.name,
                    source.key_fields.join(", ")
                );
            }
            let _ = writeln!(
                out,
                "    event time {}; up to {} out of order, {} ahead; idle after {}",
                if source.event_time.is_empty() { "that of the record" } else { &source.event_time },
                label(source.out_of_order),
                label(source.ahead),
                label(source.idle_after)
            );
            if let Some(filter) = &source.filter {
                let _ = writeln!(out, "    where {filter}");
            }
            for (column, sql) in &source.derive {
                let _ = writeln!(out, "    {} = {sql} ({})", column.name, column.data_type);
            }
        }
    }

    fn explain_features(&self, out: &mut String) {
        if self.feature_columns().is_empty() {
            return;
        }
        let number = count(self.feature_columns().len(), "feature");
        let _ = writeln!(out, "\n{number}, named <group>_<function>_<window>, <group>_<function>_<category>_<window>");
        for group in &self.groups {
            self.explain_group(group, out);
        }
        self.explain_tails(out);
        for derived in &self.derived {
            let _ = writeln!(out, "  {} = {} ({})", derived.column.name, derived.sql, derived.column.data_type);
        }
        for lookup in &self.lookups {
            let keys: Vec<String> = lookup.keys.iter().map(|(key, of)| format!("{} = {of}", key.name)).collect();
            let names: Vec<&str> = lookup.columns.iter().map(|(_, column)| &*column.name).collect();
            let (view, project, timeout) = (&lookup.view, &lookup.project, label(lookup.timeout));
            let without = match lookup.unavailable {
                Unavailable::Wait => "events wait".to_owned(),
                Unavailable::Null => "they are null".to_owned(),
                Unavailable::Stale => format!("they are those read last, for {}", label(lookup.stale_for)),
            };
            let _ =
                writeln!(out, "  {}: read online from {view} of project {project} by {}", lookup.name, keys.join(", "));
            let _ = writeln!(out, "    {}; without an answer in {timeout} {without}", names.join(", "));
        }
        // What cannot be estimated cannot run either, and whatever runs it says why.
        if let Ok(state) = state_bytes(self) {
            let _ = writeln!(
                out,
                "\nstate of one {}: {} with one event in each source, at most {} with events in every tile",
                self.entity.name,
                label_bytes(state.least),
                label_bytes(state.most)
            );
            for single in &state.single {
                let a_second = usize::try_from(single.length_ms / 1000).unwrap_or(usize::MAX);
                let _ = writeln!(
                    out,
                    "  and each event of the last {} of {}, for its exact windows: {} B each; one a second would be {}",
                    label_ms(single.length_ms),
                    self.sources[single.source].name,
                    single.bytes,
                    label_bytes(a_second.saturating_mul(single.bytes))
                );
                if self.state.memory.is_some() {
                    let _ = writeln!(out, "    {} B of each stay in memory where they go to disk", single.spilled);
                }
            }
        }
    }

    fn explain_windows(&self, out: &mut String) {
        if !self.windows.is_empty() {
            let _ = writeln!(out, "\nwindows emitted when they close");
        }
        let bytes = state_bytes(self).map(|state| state.windows).unwrap_or_default();
        for (number, windows) in self.windows.iter().enumerate() {
            let source = &self.sources[windows.source];
            let aggregated = aggregated(&windows.as_group(), source);
            let _ = writeln!(out, "  {}: {aggregated}, to topic {}", windows.name, windows.topic);
            let span = match windows.span {
                Span::Hopping { length_ms, step_ms } if length_ms == step_ms => {
                    format!("every {}", label_ms(length_ms))
                }
                Span::Hopping { length_ms, step_ms } => {
                    format!("of {} every {}", label_ms(length_ms), label_ms(step_ms))
                }
                Span::Session { gap_ms } => format!("sessions with gaps shorter than {}", label_ms(gap_ms)),
            };
            let functions: Vec<&str> = windows.functions.iter().map(|(_, column)| &*column.name).collect();
            let early = windows.early_ms.map(|early| format!(", early results every {}", label_ms(early)));
            let _ = writeln!(
                out,
                "    {span}: {}; closed {} behind the newest event{}",
                functions.join(", "),
                label(source.out_of_order),
                early.unwrap_or_default()
            );
            if let Some(bytes) = bytes.get(number) {
                let of = match windows.span {
                    Span::Hopping { step_ms, .. } => format!("{} in which it has events", label_ms(step_ms)),
                    Span::Session { .. } => "open session".to_owned(),
                };
                let _ = writeln!(out, "    state of one {}: {bytes} B for each {of}", self.entity.name);
            }
        }
    }

    /// One line a group, however many features it has: their names follow from it.
    fn explain_group(&self, group: &GroupPlan, out: &mut String) {
        if self.sources[group.source].table.is_some() {
            let names: Vec<&str> = group.features.iter().map(|(_, _, column)| &*column.name).collect();
            let _ = writeln!(out, "  {}: the newest row: {}", group.name, names.join(", "));
            return;
        }
        let mut functions: Vec<String> = Vec::new();
        for (function, _, _) in &group.features {
            let function = function.to_string();
            if !functions.contains(&function) {
                functions.push(function);
            }
        }
        let windows: Vec<&str> = group.windows.iter().map(|window| &*window.label).collect();
        let _ = writeln!(
            out,
            "  {}: {}: {} over {}",
            group.name,
            aggregated(group, &self.sources[group.source]),
            functions.join(", "),
            windows.join(", ")
        );
    }

    /// How the tails of each source's windows move, shortest first. Groups of a source mostly share them.
    fn explain_tails(&self, out: &mut String) {
        for (index, source) in self.sources.iter().enumerate() {
            let groups = self.groups.iter().filter(|group| group.source == index);
            let mut windows: Vec<(i64, i64)> = groups
                .flat_map(|group| &group.windows)
                .filter_map(|window| Some((window.length_ms?, window.tile_ms)))
                .collect();
            windows.sort_unstable();
            windows.dedup();
            let tails: Vec<String> = windows.into_iter().map(|(length, tile)| tail(length, tile)).collect();
            if !tails.is_empty() {
                let _ = writeln!(out, "  tails of windows over {} move by {}", source.name, tails.join(", "));
            }
        }
    }

    fn explain_topics(&self, out: &mut String) {
        let plans = || std::iter::once(self).chain(self.others.iter().map(AsRef::as_ref));
        let own = plans().flat_map(|plan| &plan.sources).filter(|source| source.rekeyed.is_none());
        let mut reads: Vec<&str> = own.map(|source| &*source.topic).collect();
        for (_, rekeyed) in
            self.rekeyed().filter(|(_, rekeyed)| !reads.contains(&&*rekeyed.from.topic)).collect::<Vec<_>>()
        {
            reads.push(&rekeyed.from.topic);
        }
        reads.extend(self.labels.iter().map(|labels| &*labels.topic));
        let windows = plans().flat_map(|plan| &plan.windows).map(|windows| windows.topic.to_string());
        let mut writes: Vec<String> =
            self.rekeyed().map(|(source, _)| source.topic.to_string()).chain(windows).collect();
        if let Some(score) = &self.score {
            writes.extend([score.topic.to_string(), self.features_topic()]);
        }
        if let Some(monitor) = &self.monitor {
            writes.extend([monitor.topic.to_string(), monitor.state_topic.to_string()]);
        }
        if let Some(retraining) = &self.retraining {
            writes.extend([retraining.topic.to_string(), retraining.audit_topic.to_string()]);
        }
        writes.push(self.dead_letter_topic());
        let _ = writeln!(out, "\ntopics\n  reads  {}\n  writes {}", reads.join(", "), writes.join(", "));
    }

    /// The model's inputs: `50 features`, and where most of all features are among them, which are not.
    fn inputs(&self, inputs: &[String]) -> String {
        let columns = self.feature_columns();
        let others: Vec<&str> = columns
            .iter()
            .map(|column| &*column.name)
            .filter(|name| !inputs.iter().any(|input| input == name))
            .collect();
        let number = count(inputs.len(), "feature");
        match others.len() {
            0 => number,
            some if some < inputs.len() => format!("{number} (all but {})", others.join(", ")),
            _ => number,
        }
    }

    fn explain_model(&self, out: &mut String) {
        let _ = writeln!(out, "\nstages");
        let does = match self.feature_columns().is_empty() {
            true => "every event goes into the open windows",
            false => "every event updates the online store",
        };
        for (source, rekeyed) in self.rekeyed() {
            let _ =
                writeln!(out, "  rekey: every event of {} goes to {}, exactly once", rekeyed.from.name, source.topic);
        }
        let _ = writeln!(out, "  features: {does}; checkpoints go to the offline store");
        if let Some(score) = &self.score {
            let _ = writeln!(
                out,
                "  score: events of {}{} ask model {} ({}) for a prediction from {}; batches close at {} rows, {} or {}; {}",
                self.sources[score.on].name,
                match score.emit {
                    Emit::Arrival => "",
                    Emit::EventTime => ", once the watermark has passed them and in event-time order,",
                },
                score.model,
                score.alias,
                self.inputs(&score.features),
                score.batch_rows,
                label_bytes(score.batch_bytes),
                label(score.batch_wait),
                match score.delivery {
                    super::plan::Delivery::ExactlyOnce => "exactly once",
                    super::plan::Delivery::AtLeastOnce => "at least once",
                }
            );
        }
        if let Some(monitor) = &self.monitor {
            let window = match monitor.window {
                MonitorWindow::Rows(rows) => format!("{rows} predictions"),
                MonitorWindow::Time(time) => format!("{} of event time", label(time)),
            };
            let _ = writeln!(
                out,
                "  drift: looks at {} and the prediction every {window}; in {} windows without a shift beyond PSI {} it \
                 raises a false alarm with probability {} at most",
                count(monitor.features.len(), "feature"),
                monitor.horizon_windows,
                monitor.tolerance,
                monitor.alpha
            );
        }
        if let Some(retraining) = &self.retraining {
            let gates = &retraining.gates;
            let _ = writeln!(
                out,
                "  retrain: when {}, at most every {}; runs `{}` on the last {} once {} new labels are there; promotes a \
                 model whose {} is better by {} or more",
                retraining.when,
                label(retraining.cooldown),
                retraining.command.join(" "),
                label(retraining.lookback),
                retraining.fresh_labels,
                gates.metric,
                gates.min_gain
            );
        }
    }
}

/// What is aggregated: "`amount` of purchases by channel (web, shop) where amount < 10000, half-life 7d".
fn aggregated(group: &GroupPlan, source: &SourcePlan) -> String {
    let of = group.of.as_ref().map_or("events".to_owned(), |column| format!("`{}`", column.name));
    let filter = group.filter.as_ref().map(|filter| format!(" where {filter}")).unwrap_or_default();
    let by = group.by.as_ref().map(|by| format!(" by {} ({})", by.column.name, by.categories.join(", ")));
    let by = by.unwrap_or_default();
    let decay = group.half_life_ms.map(|ms| format!(", half-life {}", label_ms(ms))).unwrap_or_default();
    format!("{of} of {}{by}{filter}{decay}", source.name)
}

/// By how much a window's tail moves: `12h of 30d (1.7 %)`.
fn tail(length_ms: i64, tile_ms: i64) -> String {
    let length = label_ms(length_ms);
    if tile_ms == EXACT {
        return format!("each millisecond of {length} (exact)");
    }
    let share = 100.0 * tile_ms as f64 / length_ms as f64;
    format!("{} of {length} ({share:.1} %)", label_ms(tile_ms))
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}
