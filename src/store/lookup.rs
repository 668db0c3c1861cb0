//! One entity's online row for a person or a program: values, when they are as of, and what their absence means.

use std::fmt;

use indexmap::IndexMap;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::feast::{View, views};
use super::{GroupRead, OnlineError, OnlineStore, Value};
use crate::config::plan::{DataType, EntityPlan, Plan};

/// What a value that was read means. The words are Feast's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Status {
    /// The value is there and means what it says.
    Present,
    /// The row is there and has no value: nothing in the window to compute it from.
    NullValue,
    /// Nothing was ever written for this entity and group.
    NotFound,
    /// The row is older than the group's longest window, so that its events have left all windows since.
    OutsideMaxAge,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Present => "PRESENT",
            Self::NullValue => "NULL_VALUE",
            Self::NotFound => "NOT_FOUND",
            Self::OutsideMaxAge => "OUTSIDE_MAX_AGE",
        })
    }
}

/// One feature as read.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureRead {
    /// Feature name.
    pub name: String,
    /// Value as stored, also where the status says that it is too old.
    pub value: Value,
    /// What it means.
    pub status: Status,
}

/// One feature group as read.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupAnswer {
    /// Group name; `derived` for the derived features.
    pub group: String,
    /// What the group's row means: [`Status::NullValue`] where all of its values are null.
    pub status: Status,
    /// Instant the values are as of, milliseconds since 1970 UTC; `None` where nothing was found.
    pub event_time: Option<i64>,
    /// The group's features in the plan's order.
    pub features: Vec<FeatureRead>,
}

/// One entity as read from the online store.
#[derive(Debug, Clone, PartialEq)]
pub struct OnlineRow {
    /// Entity name.
    pub entity: String,
    /// Key name and value, in the plan's order.
    pub key: Vec<(String, Value)>,
    /// Instant of the lookup, milliseconds since 1970 UTC: what ages are measured from.
    pub asked_at: i64,
    /// One answer a feature group, in the plan's order, derived features last.
    pub groups: Vec<GroupAnswer>,
}

/// Reads one entity. Ages are measured from `asked_at` (milliseconds since 1970 UTC, usually now).
///
/// # Errors
/// Those of [`OnlineStore::read`].
pub fn lookup(plan: &Plan, store: &dyn OnlineStore, key: &[Value], asked_at: i64) -> Result<OnlineRow, OnlineError> {
    let read = store.read(key)?;
    let groups = views(plan).iter().zip(read).map(|(view, (_, read))| answer(view, read, asked_at)).collect();
    let names = plan.entity.keys.iter().map(|k| k.name.to_string());
    Ok(OnlineRow { entity: plan.entity.name.clone(), key: names.zip(key.iter().cloned()).collect(), asked_at, groups })
}

fn answer(view: &View, read: GroupRead, asked_at: i64) -> GroupAnswer {
    let (event_time, values) = match read {
        GroupRead::NotFound => (None, vec![Value::Null; view.columns.len()]),
        GroupRead::Found { event_time, values } => (Some(event_time), values),
    };
    let row = match (event_time, view.max_age_ms) {
        (None, _) => Status::NotFound,
        (Some(at), Some(max_age)) if asked_at.saturating_sub(at) >= max_age => Status::OutsideMaxAge,
        _ => Status::Present,
    };
    let status = |value: &Value| if row == Status::Present && *value == Value::Null { Status::NullValue } else { row };
    let features: Vec<_> = view
        .columns
        .iter()
        .zip(values)
        .map(|(column, value)| FeatureRead { name: column.name.to_string(), status: status(&value), value })
        .collect();
    let all_null = features.iter().all(|f| f.status == Status::NullValue);
    let status = if all_null && !features.is_empty() { Status::NullValue } else { row };
    GroupAnswer { group: view.name.clone(), status, event_time, features }
}

/// Reads key values as a person types them, in the plan's order.
///
/// # Errors
/// Where their number is not the number of the entity's keys, or one that should be an integer is not.
pub fn key_from_text(entity: &EntityPlan, texts: &[String]) -> Result<Vec<Value>, OnlineError> {
    let error = |reason| OnlineError::Key { entity: entity.name.clone(), reason };
    if texts.len() != entity.keys.len() {
        let names: Vec<_> = entity.keys.iter().map(|k| &*k.name).collect();
        return Err(error(format!("{} values given, {} needed: {}", texts.len(), names.len(), names.join(", "))));
    }
    let value = |(key, text): (&crate::config::plan::Column, &String)| match key.data_type {
        DataType::Int64 => {
            text.parse().map(Value::Int64).map_err(|_| error(format!("{} is an integer, '{text}' is not", key.name)))
        }
        _ => Ok(Value::String(text.clone())),
    };
    entity.keys.iter().zip(texts).map(value).collect()
}

/// As JSON: timestamps as RFC 3339 text, floats that JSON cannot hold as null.
impl Serialize for Value {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => out.serialize_unit(),
            Self::Int64(v) => out.serialize_i64(*v),
            Self::Float64(v) => out.serialize_f64(*v),
            Self::Boolean(v) => out.serialize_bool(*v),
            Self::String(v) => out.serialize_str(v),
            Self::Timestamp(v) => out.serialize_str(&rfc3339(*v)),
            Self::List(values) => out.collect_seq(values),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.pad("–"),
            Self::Int64(v) => f.pad(&v.to_string()),
            Self::Float64(v) => f.pad(&v.to_string()),
            Self::Boolean(v) => f.pad(if *v { "true" } else { "false" }),
            Self::String(v) => f.pad(v),
            Self::Timestamp(v) => f.pad(&rfc3339(*v)),
            Self::List(values) => {
                let values: Vec<String> = values.iter().map(ToString::to_string).collect();
                f.pad(&format!("[{}]", values.join(", ")))
            }
        }
    }
}

fn rfc3339(ms: i64) -> String {
    match chrono::DateTime::from_timestamp_millis(ms) {
        Some(at) => at.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true),
        None => format!("{ms} ms"),
    }
}

/// As `{"entity", "key": {name: value}, "groups": {group: {"status", "event_time", "age_seconds", "features": {name:
/// {"value", "status"}}}}}`, in the plan's order.
impl Serialize for OnlineRow {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Group<'a> {
            status: Status,
            event_time: Option<String>,
            age_seconds: Option<f64>,
            features: IndexMap<&'a str, Feature<'a>>,
        }
        #[derive(Serialize)]
        struct Feature<'a> {
            value: &'a Value,
            status: Status,
        }
        impl<'a> Group<'a> {
            fn of(g: &'a GroupAnswer, asked_at: i64) -> Self {
                let feature = |f: &'a FeatureRead| (f.name.as_str(), Feature { value: &f.value, status: f.status });
                Self {
                    status: g.status,
                    event_time: g.event_time.map(rfc3339),
                    age_seconds: g.event_time.map(|at| (asked_at - at) as f64 / 1000.0),
                    features: g.features.iter().map(feature).collect(),
                }
            }
        }
        let mut row = out.serialize_struct("OnlineRow", 3)?;
        row.serialize_field("entity", &self.entity)?;
        row.serialize_field("key", &self.key.iter().map(|(n, v)| (n.as_str(), v)).collect::<IndexMap<_, _>>())?;
        let groups: IndexMap<_, _> =
            self.groups.iter().map(|g| (g.group.as_str(), Group::of(g, self.asked_at))).collect();
        row.serialize_field("groups", &groups)?;
        row.end()
    }
}

/// A table for a person: one block a group, one line a feature.
impl fmt::Display for OnlineRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key: Vec<_> = self.key.iter().map(|(name, value)| format!("{name}={value}")).collect();
        writeln!(f, "{} {}", self.entity, key.join(" "))?;
        if self.groups.iter().all(|group| group.status == Status::NotFound) {
            return writeln!(f, "\n{}: no feature of it is stored", Status::NotFound);
        }
        let width = |of: &dyn Fn(&FeatureRead) -> String| {
            self.groups.iter().flat_map(|g| &g.features).map(|f| of(f).chars().count()).max().unwrap_or(0)
        };
        let name_width = width(&|f| f.name.clone());
        let value_width = width(&|f| f.value.to_string());
        for group in &self.groups {
            write!(f, "\n{}  {}", group.group, group.status)?;
            if let Some(at) = group.event_time {
                let age = std::time::Duration::from_secs(self.asked_at.saturating_sub(at).unsigned_abs() / 1000);
                let side = if self.asked_at >= at { "ago" } else { "ahead" };
                let age = humantime::format_duration(age).to_string();
                // The two largest units say enough: `1month 3days`.
                let age: Vec<&str> = age.split(' ').take(2).collect();
                write!(f, "  as of {} ({} {side})", rfc3339(at), age.join(" "))?;
            }
            writeln!(f)?;
            for feature in &group.features {
                write!(f, "  {:<name_width$}  {:>value_width$}", feature.name, feature.value)?;
                if feature.status != group.status {
                    write!(f, "  {}", feature.status)?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}
