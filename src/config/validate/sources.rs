//! Sources, tables and labels: topics, schemas, keys, event time, and SQL over the record.

use std::collections::BTreeSet;
use std::sync::Arc;

use indexmap::IndexMap;

use super::{Folders, column, duration, entity, identifier, some_duration, sql, topic_like};
use crate::config::document::{Collector, Site};
use crate::config::names;
use crate::config::plan::{
    Column, DataType, EntityPlan, Format, LabelsPlan, RekeyPlan, SourcePlan, TablePlan, TimeUnit,
};
use crate::config::schema_file::{SchemaFile, SchemaFileError};
use crate::config::spec::{FormatSpec, RekeySpec, SourceSpec, Spec, TableSpec, TimeSpec};

/// A source whose used fields are still being found.
pub(super) struct Draft<'d> {
    /// Where it is declared.
    pub(super) site: Site<'d>,
    /// Index of its entity; `None` where that is unknown for another fault.
    pub(super) entity: Option<usize>,
    /// The plan, without its fields.
    plan: SourcePlan,
    record: Record,
    used: BTreeSet<Arc<str>>,
    /// What decides whether an event counts, and when: the event time and what `where` needs.
    decides: BTreeSet<Arc<str>>,
}

/// What is known of a topic's records.
#[derive(Clone)]
struct Record {
    format: Format,
    /// The declared fields; `None` where they are unknown for another fault.
    fields: Option<Vec<Column>>,
    /// Fields that cannot be columns, and why.
    unusable: Vec<(String, String)>,
}

impl<'d> Draft<'d> {
    /// Name in the file.
    pub(super) fn name(&self) -> &str {
        &self.plan.name
    }

    /// What it has where it is a table.
    pub(super) fn table(&self) -> Option<&TablePlan> {
        self.plan.table.as_ref()
    }

    /// Says that it is a table.
    pub(super) fn set_table(&mut self, table: TablePlan) {
        self.used.extend(table.columns.iter().map(|column| column.name.clone()));
        self.plan.table = Some(table);
    }

    /// Fields that say which entity's, and when: no facts.
    pub(super) fn is_coordinate(&self, name: &str) -> bool {
        *self.plan.event_time == *name || self.plan.key_fields.iter().any(|key| **key == *name)
    }

    /// Its topic.
    pub(super) fn topic(&self) -> &str {
        &self.plan.topic
    }

    /// Fields and derived columns, for the feature groups; `None` where they are unknown for another fault.
    pub(super) fn columns(&self) -> Option<Vec<Column>> {
        if self.site.get("derive").has_fault() {
            return None;
        }
        let derived = self.plan.derive.iter().map(|(column, _)| column.clone());
        self.record.fields.as_ref().map(|fields| fields.iter().cloned().chain(derived).collect())
    }

    /// Fields that cannot be columns, and why.
    pub(super) fn unusable(&self) -> &[(String, String)] {
        &self.record.unusable
    }

    /// Finds a column for a group, or reports that there is none.
    pub(super) fn column(&mut self, name: &str, site: &Site<'_>, faults: &mut Collector) -> Option<Column> {
        let columns = self.columns()?;
        let found = find(&columns, &self.record.unusable, name, self.name(), site, faults)?;
        self.used.insert(found.name.clone());
        Some(found)
    }

    /// Notes the columns that a group's condition uses.
    pub(super) fn uses<'a>(&mut self, names: impl Iterator<Item = &'a Arc<str>>) {
        self.used.extend(names.cloned());
    }

    /// The same events, keyed by another entity, from a topic of driftline's own.
    pub(super) fn rekeyed(
        &self,
        (name, spec): (&str, &RekeySpec),
        topic: &str,
        entity: (usize, &EntityPlan),
        site: Site<'d>,
        faults: &mut Collector,
    ) -> Self {
        let keys = key_fields(&spec.key, Some(entity.1), &self.record, self.name(), &site, faults);
        let retention = spec.retention.as_ref().map(|text| some_duration(text, &site.get("retention"), faults));
        let decides = self.decides.iter().chain(&keys).cloned().collect();
        let fields = pick(&self.record, &decides);
        let from = SourcePlan { fields, key_fields: keys.clone(), derive: Vec::new(), ..self.plan.clone() };
        let rekeyed = RekeyPlan { from, partitions: spec.partitions, retention };
        let used = self.used.iter().chain(&keys).cloned().collect();
        let plan = SourcePlan {
            name: name.into(),
            topic: topic.into(),
            key_fields: keys,
            rekeyed: Some(Arc::new(rekeyed)),
            ..self.plan.clone()
        };
        Self { site, entity: Some(entity.0), plan, record: self.record.clone(), used, decides: self.decides.clone() }
    }

    /// The plan, with the fields that are used, in the record's order.
    pub(super) fn finish(self) -> SourcePlan {
        SourcePlan { fields: pick(&self.record, &self.used), ..self.plan }
    }
}

/// The fields of these names, in the record's order.
fn pick(record: &Record, names: &BTreeSet<Arc<str>>) -> Vec<Column> {
    record.fields.iter().flatten().filter(|column| names.contains(&column.name)).cloned().collect()
}

/// What sources and tables say of their topic in the same way.
struct Declared<'s> {
    topic: &'s str,
    format: FormatSpec,
    schema: (Option<&'s str>, Option<&'s str>),
    fields: &'s IndexMap<String, DataType>,
    entity: Option<&'s str>,
    key: &'s IndexMap<String, String>,
    event_time: Option<&'s TimeSpec>,
    out_of_order: &'s str,
    ahead: &'s str,
    idle_after: &'s str,
    filter: Option<&'s str>,
    derive: &'s IndexMap<String, String>,
}

impl<'s> From<&'s SourceSpec> for Declared<'s> {
    fn from(spec: &'s SourceSpec) -> Self {
        Self {
            topic: &spec.topic,
            format: spec.format,
            schema: (spec.schema.as_deref(), spec.message.as_deref()),
            fields: &spec.fields,
            entity: spec.entity.as_deref(),
            key: &spec.key,
            event_time: Some(&spec.event_time),
            out_of_order: &spec.out_of_order,
            ahead: &spec.ahead,
            idle_after: &spec.idle_after,
            filter: spec.filter.as_deref(),
            derive: &spec.derive,
        }
    }
}

impl<'s> From<&'s TableSpec> for Declared<'s> {
    fn from(spec: &'s TableSpec) -> Self {
        Self {
            topic: &spec.topic,
            format: spec.format,
            schema: (spec.schema.as_deref(), spec.message.as_deref()),
            fields: &spec.fields,
            entity: spec.entity.as_deref(),
            key: &spec.key,
            event_time: spec.event_time.as_ref(),
            out_of_order: &spec.out_of_order,
            ahead: &spec.ahead,
            idle_after: &spec.idle_after,
            filter: spec.filter.as_deref(),
            derive: &spec.derive,
        }
    }
}

/// The tables' drafts, then the sources'.
pub(super) fn sources<'d>(
    spec: &Spec,
    root: &Site<'d>,
    entities: &[EntityPlan],
    folders: &Folders<'_>,
    faults: &mut Collector,
) -> Vec<Draft<'d>> {
    let (site, tables) = (root.get("sources"), root.get("tables"));
    if spec.sources.is_empty() {
        let help = "declare a topic with events: [sources.purchases]";
        faults.report(&site.key(), "there is no source", Some(help.into()));
    }
    let mut topics: IndexMap<&str, &str> = IndexMap::new();
    for output in [
        "predictions",
        "features",
        "drift",
        "retraining",
        "audit",
        "dead-letters",
        "dead-letters-replayed",
        "monitor-state",
    ] {
        let own = format!("{}.{output}", spec.name);
        let sources = spec.sources.iter().map(|(name, source)| (&site, name, &source.topic));
        let mut all = spec.tables.iter().map(|(name, table)| (&tables, name, &table.topic)).chain(sources);
        if let Some((site, name, topic)) = all.find(|(_, _, topic)| **topic == own) {
            let help = format!("driftline writes the pipeline's {output} there");
            let place = site.get(name).get("topic").value();
            faults.report(&place, format!("`{topic}` is one of the pipeline's own topics"), Some(help));
        }
    }
    let mut drafts = Vec::new();
    let of_tables = spec.tables.iter().map(|(name, table)| (tables.get(name), name, Declared::from(table)));
    let of_sources = spec.sources.iter().map(|(name, source)| (site.get(name), name, Declared::from(source)));
    for (site, name, source) in of_tables.chain(of_sources) {
        match topics.get(source.topic) {
            Some(first) => {
                let kind = if spec.tables.contains_key(*first) { "table" } else { "source" };
                let help = format!("{kind} `{first}` reads it already; give that one what both need");
                faults.report(
                    &site.get("topic").value(),
                    format!("topic `{}` is read twice", source.topic),
                    Some(help),
                );
            }
            None => {
                topics.insert(source.topic, name);
            }
        }
        drafts.push(draft(name, &source, site, entities, folders, faults));
    }
    drafts
}

fn draft<'d>(
    name: &str,
    spec: &Declared<'_>,
    site: Site<'d>,
    entities: &[EntityPlan],
    folders: &Folders<'_>,
    faults: &mut Collector,
) -> Draft<'d> {
    identifier(name, "source", &site.key(), faults);
    topic_like(spec.topic, "topic", &site.get("topic"), faults);
    let names = entities.iter().map(|entity| entity.name.as_str());
    let index = match spec.entity {
        Some(_) if entities.is_empty() => None,
        Some(named) => entity::find(named, entities, &site.get("entity"), faults),
        None if entities.len() > 1 => {
            let help = format!("one of {}: entity = \"{}\"", names.collect::<Vec<_>>().join(", "), entities[0].name);
            faults.report(&site.key(), format!("which entity source `{name}` is keyed by has to be said"), Some(help));
            None
        }
        None => (!entities.is_empty()).then_some(0),
    };
    let entity = index.map(|index| &entities[index]);
    let record = record(spec.format, spec.schema, Some(spec.fields), &site, folders, faults);
    let key_fields = key_fields(spec.key, entity, &record, name, &site, faults);
    let (event_time, event_time_unit) = match spec.event_time {
        Some(event_time) => instant(event_time, &record, name, &site.get("event_time"), faults),
        None => ("".into(), TimeUnit::Ms),
    };

    let fields = record.fields.as_deref();
    let mut used: BTreeSet<Arc<str>> = key_fields.iter().cloned().chain([event_time.clone()]).collect();
    let mut decides = BTreeSet::from([event_time.clone()]);
    if let Some(filter) = spec.filter {
        let place = site.get("where");
        let mut unusable = record.unusable.clone();
        let later = "is derived after the filter; a feature group's `where` can use it";
        unusable.extend(spec.derive.keys().map(|name| (name.clone(), later.to_owned())));
        if let Some(filter) = sql(filter, true, fields, &unusable, &place, faults) {
            used.extend(filter.columns().cloned());
            decides.extend(filter.columns().cloned());
        }
    }
    let mut columns = fields.map(<[Column]>::to_vec);
    let mut derive = Vec::new();
    for (name, text) in spec.derive {
        let site = site.get("derive").get(name);
        identifier(name, "column", &site.key(), faults);
        if columns.iter().flatten().any(|c| *c.name == **name) {
            faults.report(&site.key(), format!("the record has a field `{name}` already"), None);
        }
        let compiled = sql(text, false, columns.as_deref(), &record.unusable, &site, faults);
        match compiled {
            Some(expression) => {
                used.extend(expression.columns().cloned());
                let column = column(name, expression.data_type());
                columns.iter_mut().for_each(|columns| columns.push(column.clone()));
                derive.push((column, text.clone()));
            }
            // What uses this column cannot be judged.
            None => columns = None,
        }
    }
    let complete = columns.is_some();
    let plan = SourcePlan {
        name: name.into(),
        topic: spec.topic.into(),
        format: record.format.clone(),
        fields: Vec::new(),
        key_fields,
        event_time,
        event_time_unit,
        out_of_order: duration(spec.out_of_order, &site.get("out_of_order"), faults),
        ahead: duration(spec.ahead, &site.get("ahead"), faults),
        idle_after: some_duration(spec.idle_after, &site.get("idle_after"), faults),
        filter: spec.filter.map(str::to_owned),
        derive,
        table: None,
        rekeyed: None,
    };
    let record = if complete { record } else { Record { fields: None, ..record } };
    Draft { site, entity: index, plan, record, used, decides }
}

pub(super) fn labels(
    spec: &Spec,
    root: &Site<'_>,
    entity: Option<&EntityPlan>,
    folders: &Folders<'_>,
    faults: &mut Collector,
) -> Option<LabelsPlan> {
    let labels = spec.labels.as_ref()?;
    let site = root.get("labels");
    topic_like(&labels.topic, "topic", &site.get("topic"), faults);
    let record = match labels.format {
        // JSON names its fields here: the types are those of what they are used for.
        FormatSpec::Json if labels.schema.is_none() => {
            Record { format: Format::Json, fields: None, unusable: Vec::new() }
        }
        format => record(format, (labels.schema.as_deref(), labels.message.as_deref()), None, &site, folders, faults),
    };
    let key_fields = key_fields(&labels.key, entity, &record, "labels", &site, faults);
    let as_of = instant(&labels.as_of, &record, "labels", &site.get("as_of"), faults);
    let value_type = match &record.fields {
        None => DataType::Float64,
        Some(fields) => {
            let site = site.get("value");
            let found = find(fields, &record.unusable, &labels.value, "labels", &site, faults);
            let data_type = found.map_or(DataType::Float64, |c| c.data_type);
            if !matches!(data_type, DataType::Int64 | DataType::Float64 | DataType::Boolean) {
                let message =
                    format!("an outcome is a number or a boolean, but `{}` is of type {data_type}", labels.value);
                faults.report(&site.value(), message, None);
            }
            data_type
        }
    };
    let mut fields: Vec<Column> = Vec::new();
    for (field, key) in key_fields.iter().zip(entity.map(|e| e.keys.as_slice()).unwrap_or_default()) {
        fields.push(column(field, key.data_type));
    }
    let time_type = record.fields.iter().flatten().find(|c| c.name == as_of.0).map(|c| c.data_type);
    fields.push(column(&as_of.0, time_type.unwrap_or(DataType::Timestamp)));
    fields.push(column(&labels.value, value_type));
    Some(LabelsPlan {
        topic: labels.topic.as_str().into(),
        format: record.format,
        fields,
        key_fields,
        as_of,
        value: labels.value.as_str().into(),
        horizon: some_duration(&labels.horizon, &site.get("horizon"), faults),
    })
}

/// Format and fields, from the schema file (and the message in it) or the fields of the pipeline.
fn record(
    format: FormatSpec,
    (schema, message): (Option<&str>, Option<&str>),
    fields: Option<&IndexMap<String, DataType>>,
    site: &Site<'_>,
    folders: &Folders<'_>,
    faults: &mut Collector,
) -> Record {
    let written = fields.filter(|fields| !fields.is_empty());
    let empty = match format {
        FormatSpec::Avro => Format::Avro { schema: String::new() },
        FormatSpec::Json => Format::Json,
        FormatSpec::Protobuf => Format::Protobuf { message: Arc::default() },
    };
    let unknown = Record { format: empty, fields: None, unusable: Vec::new() };
    match (format, message) {
        (FormatSpec::Protobuf, None) if !site.get("message").has_fault() => {
            let help = "the full name of the records' message: message = \"shop.Order\"";
            faults.report(&site.key(), "a Protobuf topic needs `message`", Some(help.into()));
        }
        (FormatSpec::Json | FormatSpec::Avro, Some(_)) => {
            let help = "leave it out, or set format = \"protobuf\"";
            faults.report(&site.get("message").key(), "only Protobuf has messages", Some(help.into()));
        }
        _ => {}
    }
    let Some(schema) = schema else {
        return match (format, written) {
            (FormatSpec::Json, Some(written)) => {
                let fields = written.iter().map(|(name, data_type)| column(name, *data_type)).collect();
                Record { format: Format::Json, fields: Some(fields), unusable: Vec::new() }
            }
            (FormatSpec::Json, None) => {
                let help = "name the fields that are used: fields = { amount = \"float64\" }, or give a schema file";
                let table = if site.get("fields").is_given() { site.get("fields").key() } else { site.key() };
                if !site.get("fields").has_fault() {
                    faults.report(&table, "a JSON source needs `fields` or `schema`", Some(help.into()));
                }
                unknown
            }
            (FormatSpec::Avro, _) => {
                let help = "name an .avsc file, from the pipeline's folder";
                faults.report(&site.key(), "an Avro topic needs `schema`", Some(help.into()));
                unknown
            }
            (FormatSpec::Protobuf, _) => {
                let help =
                    "name a descriptor set: protoc --include_imports --descriptor_set_out=order.binpb order.proto";
                faults.report(&site.key(), "a Protobuf topic needs `schema`", Some(help.into()));
                unknown
            }
        };
    };
    if written.is_some() {
        let help = "the fields are those of the schema; leave one of the two out";
        faults.report(&site.get("fields").key(), "`fields` and `schema` cannot both be given", Some(help.into()));
    }
    let schema_site = site.get("schema");
    if schema_site.has_fault() {
        return unknown;
    }
    let (path, shown) = (folders.pipeline.join(schema), folders.shown.join(schema).display().to_string());
    let read = match (format, message) {
        (FormatSpec::Protobuf, None) => return unknown,
        (FormatSpec::Protobuf, Some(message)) => SchemaFile::read_protobuf(&path, &shown, message),
        _ => SchemaFile::read(&path, &shown, format),
    };
    match read {
        Ok(file) => Record { format: file.format, fields: Some(file.columns), unusable: file.unusable },
        Err(SchemaFileError::Here(message, help)) => {
            faults.report(&schema_site.value(), message, help);
            unknown
        }
        Err(SchemaFileError::There(fault)) => {
            faults.push(fault);
            unknown
        }
    }
}

/// Finds a field by name, or reports that there is none.
fn find(
    columns: &[Column],
    unusable: &[(String, String)],
    name: &str,
    of: &str,
    site: &Site<'_>,
    faults: &mut Collector,
) -> Option<Column> {
    let found = columns.iter().find(|c| *c.name == *name).cloned();
    if found.is_none() {
        let (message, help) = match unusable.iter().find(|(field, _)| field == name) {
            Some((_, reason)) => (format!("field `{name}` of `{of}` {reason}"), None),
            None => {
                let help = names::suggestion(name, "fields", columns.iter().map(|c| &*c.name));
                (format!("`{of}` has no field `{name}`"), help)
            }
        };
        faults.report(&site.value(), message, help);
    }
    found
}

/// The field of each of the entity's keys.
fn key_fields(
    written: &IndexMap<String, String>,
    entity: Option<&EntityPlan>,
    record: &Record,
    of: &str,
    site: &Site<'_>,
    faults: &mut Collector,
) -> Vec<Arc<str>> {
    let Some(entity) = entity else { return Vec::new() };
    let key_site = site.get("key");
    for name in written.keys().filter(|name| !entity.keys.iter().any(|key| *key.name == ***name)) {
        let help = names::suggestion(name, "join keys", entity.keys.iter().map(|key| &*key.name));
        let message = format!("entity `{}` has no join key `{name}`", entity.name);
        faults.report(&key_site.get(name).key(), message, help);
    }
    let mut fields = Vec::new();
    for key in &entity.keys {
        let field: &str = written.get(&*key.name).map_or(&key.name, String::as_str);
        fields.push(field.into());
        let Some(columns) = &record.fields else { continue };
        let place = key_site.get(&key.name);
        let found = if place.is_given() {
            find(columns, &record.unusable, field, of, &place, faults)
        } else {
            let found = columns.iter().find(|c| *c.name == *field).cloned();
            if found.is_none() {
                let near = names::nearest(field, columns.iter().map(|c| &*c.name)).unwrap_or("…");
                let help = format!("say which field it is: key = {{ {} = \"{near}\" }}", key.name);
                let message = format!("`{of}` has no field for the join key `{}`", key.name);
                faults.report(&site.key(), message, Some(help));
            }
            found
        };
        if let Some(found) = found
            && found.data_type != key.data_type
        {
            let message = format!(
                "join key `{}` is of type {}, but field `{field}` of `{of}` is of type {}",
                key.name, key.data_type, found.data_type
            );
            let place = if place.is_given() { place.value() } else { site.key() };
            faults.report(&place, message, Some("change the entity's key type, or the schema".into()));
        }
    }
    fields
}

/// The field and unit of an instant.
fn instant(
    spec: &TimeSpec,
    record: &Record,
    of: &str,
    site: &Site<'_>,
    faults: &mut Collector,
) -> (Arc<str>, TimeUnit) {
    let name: Arc<str> = spec.field.as_str().into();
    let field_site = site.get("field");
    let found = match &record.fields {
        Some(fields) => find(fields, &record.unusable, &name, of, &field_site, faults),
        None => None,
    };
    // Their schemas have types for instants.
    let has_instants = matches!(record.format, Format::Avro { .. } | Format::Protobuf { .. });
    let data_type = found.map(|field| field.data_type);
    let unit = match (data_type, spec.unit) {
        (Some(DataType::Boolean), _) => {
            faults.report(&field_site.value(), format!("`{name}` is a boolean, not an instant"), None);
            spec.unit
        }
        (Some(DataType::String), Some(unit)) if unit != TimeUnit::Iso => {
            let help = "a text is read with unit = \"iso\"";
            faults.report(&site.get("unit").value(), format!("`{name}` is a string, not a number"), Some(help.into()));
            spec.unit
        }
        (Some(DataType::Int64 | DataType::Float64), Some(TimeUnit::Iso)) => {
            let message = format!("`{name}` is a number, not a text");
            faults.report(&site.get("unit").value(), message, Some("its unit is one of s, ms, us, ns".into()));
            spec.unit
        }
        (Some(DataType::String), None) => Some(TimeUnit::Iso),
        (Some(DataType::Timestamp), None) if has_instants => Some(TimeUnit::Ms),
        (Some(DataType::Int64 | DataType::Float64 | DataType::Timestamp) | None, None) => {
            // Nothing is known of the fields of a schema that could not be read, and labels in JSON have no schema.
            if data_type.is_some() || !has_instants {
                let help = "one of s, ms, us, ns since 1970, or iso";
                faults.report(&site.key(), format!("the unit of `{name}` is missing"), Some(help.into()));
            }
            None
        }
        (_, unit) => unit,
    };
    (name, unit.unwrap_or(TimeUnit::Ms))
}
