//! The meaning of features, computed the slow way: all events are kept, and each value is computed from its definition.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};

use super::{Cell, Event, Row};
use crate::config::plan::{DataType, Function, GroupPlan, Plan};
use crate::window::aggregate::distinct::{hash_text, hash_word};

/// An applied event: source, offset, event.
pub(super) type Entry = (usize, i64, Event);

/// Everything that was applied, in the order of application, and what was late.
pub(super) struct Oracle<'a> {
    plan: &'a Plan,
    pub applied: Vec<Entry>,
    pub late: Vec<(usize, i64)>,
    newest: Vec<Option<i64>>,
    waiting: Vec<Vec<(i64, Event)>>,
    /// Rows of tables, by table and key: time, offset, event.
    facts: BTreeMap<(usize, u8), BTreeMap<(i64, i64), Event>>,
}

impl<'a> Oracle<'a> {
    pub fn new(plan: &'a Plan) -> Self {
        let sources = plan.sources.len();
        Self {
            plan,
            applied: Vec::new(),
            late: Vec::new(),
            newest: vec![None; sources],
            waiting: vec![Vec::new(); sources],
            facts: BTreeMap::new(),
        }
    }

    pub fn offer(&mut self, source: usize, first_offset: i64, events: &[Event]) {
        self.waiting[source].extend((first_offset..).zip(events.iter().cloned()));
    }

    /// Applies what may be applied; gives the rows of the events of the asking source, and the online rows.
    pub fn advance(&mut self, caught_up: &[bool]) -> (Vec<Row>, BTreeMap<u8, Row>) {
        let mut rows = Vec::new();
        let mut touched = BTreeMap::new();
        loop {
            let heads: Vec<Option<i64>> =
                self.waiting.iter().map(|queue| queue.first().map(|(_, event)| event.time)).collect();
            let Some((time, source)) =
                heads.iter().enumerate().filter_map(|(at, head)| head.map(|head| (head, at))).min()
            else {
                break;
            };
            let settled = (0..heads.len())
                .all(|other| other == source || caught_up[other] || heads[other].is_some_and(|head| head >= time));
            if !settled {
                break;
            }
            let (offset, event) = self.waiting[source].remove(0);
            let bound = self.plan.sources[source].out_of_order.as_millis() as i64;
            let is_late = self.newest[source].is_some_and(|newest| time < newest - bound);
            if self.plan.sources[source].table.is_some() {
                let watermark = self.newest[source].max(Some(time)).map_or(i64::MIN, |newest| newest - bound);
                let rows = self.facts.entry((source, event.key)).or_default();
                // A deletion is remembered as long as rows may be out of order.
                let next = rows.range((time, i64::MAX)..).next().map(|(at, next)| {
                    (
                        *at,
                        self.plan.sources[source]
                            .table
                            .iter()
                            .flat_map(|table| &table.columns)
                            .any(|column| fact(next, &column.name) != Cell::Null),
                    )
                });
                if let Some((at, false)) = next.filter(|(at, _)| is_late && at.0 < watermark) {
                    rows.remove(&at);
                }
                rows.insert((time, offset), event.clone());
            } else if is_late {
                self.late.push((source, offset));
                continue;
            }
            self.newest[source] = self.newest[source].max(Some(time));
            self.applied.push((source, offset, event.clone()));
            touched.insert(event.key, (source, offset));
            if self.plan.score.as_ref().is_some_and(|score| score.on == source) {
                rows.push(self.row(event.key, time, source, (source, offset)));
            }
        }
        let online = touched.into_iter().map(|(key, origin)| {
            let events = self.applied.iter().filter(|(_, _, event)| event.key == key);
            let newest = events.map(|(_, _, event)| event.time).max().expect("it was just touched");
            (key, self.row(key, newest, usize::MAX, origin))
        });
        let online = online.collect();
        (rows, online)
    }

    /// The row of an entity as of `time`, events of that instant counting up to the source `up_to`.
    pub fn row(&self, key: u8, time: i64, up_to: usize, origin: (usize, i64)) -> Row {
        let seen: Vec<&Entry> = self
            .applied
            .iter()
            .filter(|(source, _, event)| {
                event.key == key && (event.time < time || event.time == time && *source <= up_to)
            })
            .collect();
        let mut row: Row = BTreeMap::new();
        row.insert("name".to_owned(), Cell::Text(format!("customer {}", key / 2)));
        row.insert("number".to_owned(), Cell::Int(i64::from(key % 2)));
        row.insert("event_time".to_owned(), Cell::Int(time));
        row.insert("source".to_owned(), Cell::Text(self.plan.sources[origin.0].name.to_string()));
        row.insert("source_topic".to_owned(), Cell::Text(self.plan.sources[origin.0].topic.to_string()));
        row.insert("source_offset".to_owned(), Cell::Int(origin.1));
        for group in &self.plan.groups {
            if let Some(table) = &self.plan.sources[group.source].table {
                let last = if group.source <= up_to { time } else { time - 1 };
                let rows = self.facts.get(&(group.source, key));
                let newest = rows.and_then(|rows| rows.range(..=(last, i64::MAX)).next_back());
                for (of, (_, _, column)) in table.columns.iter().zip(&group.features) {
                    let value = newest.map_or(Cell::Null, |(_, event)| fact(event, &of.name));
                    row.insert(column.name.to_string(), value);
                }
                continue;
            }
            for (at, (function, window, column)) in group.features.iter().enumerate() {
                let cut = group.windows[*window].length_ms.map_or(i64::MIN, |length| {
                    let tile = group.windows[*window].tile_ms;
                    (time - length).div_euclid(tile) * tile
                });
                let mut events: Vec<&Entry> = seen
                    .iter()
                    .copied()
                    .filter(|(source, _, event)| {
                        *source == group.source && event.time > cut && counts(group, event) && is_in(group, at, event)
                    })
                    .collect();
                events.sort_by_key(|(_, offset, event)| (event.time, *offset));
                let length = group.windows[*window].length_ms;
                let events: Vec<&Event> = events.iter().map(|(_, _, event)| event).collect();
                let value = value(group, *function, time, length, &events);
                row.insert(column.name.to_string(), value);
            }
        }
        row
    }
}

/// The value of a table's column in a row.
fn fact(event: &Event, column: &str) -> Cell {
    match column {
        "amount" => event.amount.filter(|amount| amount.is_finite()).map_or(Cell::Null, Cell::float),
        "kind" => event.kind.map_or(Cell::Null, |kind| Cell::Text(kind.to_owned())),
        "units" => event.units.map_or(Cell::Null, Cell::Int),
        "due" => event.units.map_or(Cell::Null, |units| Cell::Int(units * 1000)),
        "flag" => event.units.map_or(Cell::Null, |units| Cell::Int(i64::from(units > 2))),
        other => panic!("the oracle knows no column {other}"),
    }
}

pub(super) fn counts(group: &GroupPlan, event: &Event) -> bool {
    let kept = match group.filter.as_deref() {
        None => true,
        Some("units > 2") => event.units.is_some_and(|units| units > 2),
        Some(other) => panic!("the oracle does not know {other}"),
    };
    kept && match group.of.as_ref().map(|of| of.name.as_ref()) {
        None => true,
        Some("amount") => event.amount.is_some_and(f64::is_finite),
        Some("kind") => event.kind.is_some(),
        Some(_) => event.units.is_some(),
    }
}

/// Whether an event has the category of a group's feature.
pub(super) fn is_in(group: &GroupPlan, feature: usize, event: &Event) -> bool {
    let Some(by) = &group.by else { return true };
    let category = match by.column.name.as_ref() {
        "kind" => event.kind.map(str::to_owned),
        "units" => event.units.map(|units| units.to_string()),
        "flag" => event.units.map(|units| (units > 2).to_string()),
        other => panic!("the oracle knows no categories of {other}"),
    };
    category.as_ref() == Some(&by.categories[by.of_feature[feature]])
}

pub(super) fn value(group: &GroupPlan, function: Function, time: i64, length: Option<i64>, events: &[&Event]) -> Cell {
    let data_type = group.of.as_ref().map(|of| of.data_type);
    let name = group.of.as_ref().map_or("", |of| of.name.as_ref());
    let integer = |event: &Event| match name {
        "due" => event.units.expect("counted") * 1000,
        "flag" => i64::from(event.units.expect("counted") > 2),
        _ => event.units.expect("counted"),
    };
    let own = |event: &Event| match name {
        "amount" => Cell::float(event.amount.expect("counted")),
        "kind" => Cell::Text(event.kind.expect("counted").to_owned()),
        _ => Cell::Int(integer(event)),
    };
    let floats: Vec<f64> = events
        .iter()
        .map(|event| if name == "amount" { event.amount.expect("counted") } else { event.units.unwrap_or(0) as f64 })
        .collect();
    let count = events.len() as f64;
    if let Some(half_life) = group.half_life_ms {
        let weights: Vec<f64> =
            events.iter().map(|event| 2f64.powf((event.time - time) as f64 / half_life as f64)).collect();
        let weight = weights.iter().sum::<f64>();
        let weighted = weights.iter().zip(&floats).map(|(weight, value)| weight * value).sum::<f64>();
        return match function {
            Function::Count => Cell::float(weight),
            Function::Sum => Cell::float(weighted + 0.0),
            _ if events.is_empty() => Cell::Null,
            // Of old events the weights as of now can be too small for a float: those as of the newest are not.
            _ => {
                let newest = events.iter().map(|event| event.time).max().expect("not empty");
                let weight = |event: &&Event| 2f64.powf((event.time - newest) as f64 / half_life as f64);
                let weighted: f64 = events.iter().zip(&floats).map(|(event, value)| weight(event) * value).sum();
                Cell::float(weighted / events.iter().map(weight).sum::<f64>())
            }
        };
    }
    let is_float = data_type == Some(DataType::Float64);
    match function {
        Function::Count => Cell::Int(events.len() as i64),
        Function::SecondsSinceLast => {
            events.last().map_or(Cell::Null, |event| Cell::float((time - event.time) as f64 / 1000.0))
        }
        Function::First => events.first().map_or(Cell::Null, |event| own(event)),
        Function::Last => events.last().map_or(Cell::Null, |event| own(event)),
        Function::LastN(most) => {
            let newest = &events[events.len().saturating_sub(most.into())..];
            Cell::List(newest.iter().map(|event| own(event)).collect())
        }
        Function::Rate => {
            let seconds = length.expect("a rate needs a length") as f64 / 1000.0;
            Cell::float(if data_type.is_none() { count } else { floats.iter().sum::<f64>() } / seconds)
        }
        Function::Sum if is_float => Cell::float(floats.iter().sum::<f64>() + 0.0),
        Function::Sum => {
            let sum: i128 = events.iter().map(|event| i128::from(integer(event))).sum();
            i64::try_from(sum).map_or(Cell::Null, Cell::Int)
        }
        Function::Distinct => {
            let distinct: HashSet<String> = events.iter().map(|event| format!("{:?}", own(event))).collect();
            Cell::Int(distinct.len() as i64)
        }
        Function::Top(rank) => {
            let mut seen: Vec<(Cell, usize, i64)> = Vec::new();
            for event in events {
                match seen.iter_mut().find(|(value, ..)| *value == own(event)) {
                    Some((_, count, newest)) => (*count, *newest) = (*count + 1, event.time.max(*newest)),
                    None => seen.push((own(event), 1, event.time)),
                }
            }
            let hash = |value: &Cell| match value {
                Cell::Int(value) => hash_word(*value as u64),
                Cell::Float(bits) => hash_word(*bits),
                Cell::Text(text) => hash_text(text),
                Cell::Null | Cell::List(_) => panic!("neither nulls nor lists are counted"),
            };
            seen.sort_by_key(|(value, count, newest)| (Reverse((*count, *newest)), hash(value)));
            let found = seen.get(usize::from(rank) - 1).filter(|_| seen.len() <= 128);
            found.map_or(Cell::Null, |(value, ..)| value.clone())
        }
        _ if events.is_empty() => Cell::Null,
        Function::Quantile(per_mille) => Cell::float(quantile(floats, per_mille)),
        Function::Mean => Cell::float(floats.iter().sum::<f64>() / count),
        Function::Min if is_float => Cell::float(floats.iter().copied().fold(f64::INFINITY, f64::min)),
        Function::Max if is_float => Cell::float(floats.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
        Function::Min => Cell::Int(events.iter().map(|event| integer(event)).min().expect("not empty")),
        Function::Max => Cell::Int(events.iter().map(|event| integer(event)).max().expect("not empty")),
        Function::Ratio => Cell::float(events.iter().map(|event| integer(event) as f64).sum::<f64>() / count),
        Function::Slope => slope(&events.iter().map(|event| event.time).collect::<Vec<_>>(), &floats),
        Function::Var | Function::Std if events.len() < 2 => Cell::Null,
        Function::Var | Function::Std => {
            let mean = floats.iter().sum::<f64>() / count;
            let squares: f64 = floats.iter().map(|value| (value - mean) * (value - mean)).sum();
            let variance = squares / (count - 1.0);
            Cell::float(if function == Function::Std { variance.sqrt() } else { variance })
        }
    }
}

/// The quantile; of more than 256 values the middle of its bucket, at the first level where 256 are enough.
fn quantile(mut values: Vec<f64>, per_mille: u16) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * usize::from(per_mille)).div_ceil(1000);
    let exact = values[rank - 1];
    if values.len() <= 256 || exact == 0.0 {
        return exact;
    }
    let level = (0..).map(|level| (1.01f64 / 0.99).ln() * 2f64.powi(level - 3)).find(|log_gamma| {
        let bucket = |value: &f64| if *value == 0.0 { i64::MIN } else { (value.ln() / log_gamma).ceil() as i64 };
        values.iter().map(bucket).collect::<HashSet<_>>().len() <= 256
    });
    let gamma = level.expect("one bucket is enough in the end").exp();
    2.0 * gamma.powf((exact.ln() / gamma.ln()).ceil()) / (gamma + 1.0)
}

/// The slope per second as a fraction of whole numbers: values are multiples of 2⁻⁶⁰ here, below 2¹⁰.
fn slope(times: &[i64], values: &[f64]) -> Cell {
    let n = times.len() as i128;
    let times: Vec<i128> = times.iter().map(|time| i128::from(time - times[0])).collect();
    let total: i128 = times.iter().sum();
    let below: i128 = times.iter().map(|time| (n * time - total) * time).sum();
    if below == 0 {
        return Cell::Null;
    }
    let scale = 2f64.powi(60);
    let above: i128 = times.iter().zip(values).map(|(time, value)| (n * time - total) * (value * scale) as i128).sum();
    Cell::float(above as f64 / scale / below as f64 * 1000.0)
}

/// Asserts that two rows are the same, floats to 1e-12 of the largest value that can be in them, and numbers of more than 256
/// distinct values to five standard errors of an estimate.
pub(super) fn assert_same(found: &Row, expected: &Row, scale: f64) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected_cell) in expected {
        let found_cell = &found[name];
        let same = match (found_cell, expected_cell) {
            (Cell::Float(found), Cell::Float(expected)) => {
                let (found, expected) = (f64::from_bits(*found), f64::from_bits(*expected));
                (found - expected).abs() <= 1e-12 * expected.abs().max(scale)
            }
            (Cell::Int(found), Cell::Int(expected)) if name.contains("_Distinct_") && *expected > 256 => {
                *found > 256 && (*found as f64 / *expected as f64 - 1.0).abs() < 0.115
            }
            (found, expected) => found == expected,
        };
        assert!(
            same,
            "{name}: found {found_cell:?}, expected {expected_cell:?}\nfound    {found:?}\nexpected {expected:?}"
        );
    }
}
